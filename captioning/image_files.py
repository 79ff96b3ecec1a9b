"""Read image files into RGB pixels, within limits of memory and time.

Reading a file takes at most 1.1 GB of memory beyond the file's own size: `MAX_BYTES` limits what its decoder
allocates, and so its number of pixels (33 million for a JPEG 2000, 62 million for a WebP, 83 million for an AVIF or
HEIC, 125 million for a PNG or TIFF). A JPEG may have 4,000 million, since it is decoded at a reduced size. An image of
12 megapixels takes 6 MB as a JPEG that is reduced to 256 pixels, and 100 MB as a PNG.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import jpeg_factory

from captioning.errors import InputError
from captioning.files import image_formats, missing_file, register_heif
from captioning.shards import Member

MAX_BYTES = 1_000_000_000  # memory limit for decoding one image, in bytes
MAX_FILE_BYTES = 512 << 20
MAX_SECONDS = 60  # time limit for reading one file
MAX_SCANS = 100  # maximum number of scans in a JPEG; encoders write about 10
MAX_SCANNED_PIXELS = 4_000_000_000  # maximum number of pixels in all scans of a JPEG, which take some 3 seconds
MAX_ASPECT = 32  # maximum ratio of an image's longer side to its shorter one; a longer image is cropped to its middle
BYTES_PER_PIXEL = {"WEBP": 16, "AVIF": 12, "HEIF": 12, "JPEG2000": 30}  # measured memory of the decoders
DEFAULT_BYTES_PER_PIXEL = 8  # 4 for Pillow's image and 4 for the decoder or the RGB copy
RLE_ROWS = 255  # maximum number of rows that one code of a run-length encoded BMP can add below the image
BAND_PIXELS = 1 << 20  # number of pixels converted at a time
WHITES = (1, 255, 4095, 65535)  # usual levels of white in images of more than 8 bits per channel
OVERSHOOT = 16  # highest level in an image of fractions whose white is 1
NO_DATA = 1e30  # geographic images mark missing cells with numbers beyond it, or with one of these:
NO_DATA_LEVELS = (-9999, -32768, -99999)

TRANSPOSE_OF_ORIENTATION = {  # EXIF orientation -> transpose that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION = 0x0112, 258, 262
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
# A JPEG marker followed by a length, or the end of the image; FF 00 and FF D0 to FF D7 occur within a scan's data.
JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA
JPEG_START = b"\xff\xd8\xff"


def read_image(
    source: str | Path | Member | Image.Image,
    shorter_side: int | None = None,
    formats: Collection[str] | None = None,
) -> Image.Image:
    """Read an image as people see it: upright, in 8-bit RGB, transparency over white, only its first frame.

    A JPEG is decoded at a half, a quarter or an eighth of its size where its shorter side still has at least twice
    `shorter_side` pixels; that saves most of the time, and a resize to `shorter_side` does not show it. A JPEG of more
    than 125 million pixels is always reduced. An image more than 32 times as long as it is wide is cropped to its
    middle. `formats` are Pillow's names of the formats to accept, by default all that Pillow decodes.
    Raises `InputError` with the file's name for whatever cannot be read within the limits of this module.
    """
    if not isinstance(source, (str, os.PathLike, Member, Image.Image)):
        raise InputError(f"an image is a path or a PIL image, not a {type(source).__name__}; use Image.fromarray.")
    name = "the image" if isinstance(source, Image.Image) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(source, Image.Image):
                return _upright_rgb(source)
            with _open_file(source) as file:
                image = _open_image(file, formats)
                _draft(image, shorter_side)
                _check_size(image)
                image.load()
                _check_size(image)  # an icon's true size is in the PNG that it contains
                return _upright_rgb(image)
    except FileNotFoundError:
        raise missing_file(name) from None
    except UnidentifiedImageError:
        reason = "its content is not in an image format that can be read"
    except MemoryError:
        reason = "it takes more memory than there is"
    except Exception as raised:  # a broken file makes Pillow's decoders raise nearly anything
        error = raised.__cause__ or raised  # a decoder in C hides why its file could not be read
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
    raise InputError(f"{name} cannot be read as a photo ({reason}).")


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file of any format that `read_image` reads, without decoding it; raises what Pillow raises."""
    with warnings.catch_warnings(), _open_file(path) as file:
        warnings.simplefilter("ignore")
        is_jpeg = file.read(len(JPEG_START)) == JPEG_START
        file.seek(0)
        yield jpeg_factory(file) if is_jpeg else _open_image(file, None)


class _TimedFile(io.BufferedReader):
    """A file that can be read for `MAX_SECONDS`; Pillow's decoders read it block by block."""

    def __init__(self, raw: Any):
        super().__init__(raw)
        self.deadline = time.monotonic() + MAX_SECONDS

    def read(self, size: int | None = -1) -> bytes:
        self._check_time()
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        self._check_time()
        return super().readline(size)

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise ValueError(f"decoding it takes more than {MAX_SECONDS} seconds")


def _open_file(source: str | Path | Member) -> _TimedFile:
    if isinstance(source, Member):
        size = source.size
    else:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
        size = status.st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it has {size >> 20:,} MB, and a photo may have {MAX_FILE_BYTES >> 20}; save a smaller copy")
    return _TimedFile(io.BytesIO(source.read()) if isinstance(source, Member) else io.FileIO(source))


def _open_image(file: _TimedFile, formats: Collection[str] | None) -> Image.Image:
    start = file.read(12)
    file.seek(0)
    if start.startswith(JPEG_START) and (formats is None or "JPEG" in formats):
        scans = _count_scans(file.read())
        file.seek(0)
        image = jpeg_factory(file)  # unlike Image.open it sets no limit to the size before `_draft`
        _check_scans(image, scans)
        return image
    try:
        return Image.open(file, formats=image_formats() if formats is None else list(formats))
    except UnidentifiedImageError:
        if start[4:8] != b"ftyp" or start[8:12] not in HEIF_BRANDS or formats is not None:
            raise
    if not register_heif():
        raise ValueError("it is a HEIC image; `pip install pillow-heif` makes them readable")
    file.seek(0)
    return Image.open(file, formats=["HEIF"])


def _count_scans(jpeg: bytes) -> int:
    """Count the scans of a JPEG's first image, without those of thumbnails, other images and trailing video."""
    scans, at = 0, 2
    if jpeg.count(b"\xff\xda") == 1:
        return 1
    while (marker := JPEG_MARKER.search(jpeg, at)) and marker[1][0] != END_OF_IMAGE:
        scans += marker[1][0] == START_OF_SCAN
        at = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return scans


def _check_scans(image: Any, scans: int) -> None:
    """Raise `ValueError` for a JPEG whose scans take too long, or too much memory: several need all coefficients."""
    pixels = image.width * image.height
    if scans > MAX_SCANS or (scans > 1 and scans * pixels > MAX_SCANNED_PIXELS):
        raise ValueError(f"it has {scans:,} progressive scans, too many for its size; save it again")
    if scans > 1:
        widest, highest = (max(layer[i] for layer in image.layer) for i in (1, 2))
        planes = sum(layer[1] * layer[2] for layer in image.layer) / (widest * highest)
        if 2 * planes * pixels > MAX_BYTES:
            raise ValueError(f"it has {image.width} x {image.height} pixels, too many for a progressive JPEG")


def _draft(image: Image.Image, shorter_side: int | None) -> None:
    """Set a JPEG to be decoded at a half, a quarter or an eighth of its size."""
    width, height = image.size
    scale = 1
    while scale < 8 and (
        (shorter_side is not None and min(width, height) >= 2 * scale * 2 * shorter_side)
        or width * height * DEFAULT_BYTES_PER_PIXEL > MAX_BYTES * scale**2
    ):
        scale *= 2
    if scale > 1:
        image.draft(None, (max(1, width // scale), max(1, height // scale)))


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    most = MAX_BYTES // _bytes_per_pixel(image)
    if width * (height + RLE_ROWS * ("bmp_rle" in str(getattr(image, "tile", "")))) > most:
        raise ValueError(f"it has {width} x {height} pixels, more than {most // 10**6} million; save it smaller")


def _bytes_per_pixel(image: Any) -> int:
    """Return the bytes that decoding takes for each pixel."""
    if image.format == "TIFF":  # a decoder holds all samples of a strip, which may be the whole image
        return max(DEFAULT_BYTES_PER_PIXEL, 4 + -(-sum(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) // 8))
    return BYTES_PER_PIXEL.get(str(image.format), DEFAULT_BYTES_PER_PIXEL)


def _bound_tags(load: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Wrap Pillow's reader of TIFF and EXIF tags so that it reads a limited number of bytes.

    It reads the data of every tag, and thousands of tags may refer to the same megabyte.
    """

    class Bounded:
        def __init__(self, file: Any):
            self.file, self.seek, self.tell = file, file.seek, file.tell
            at = file.tell()
            file.seek(0, os.SEEK_END)
            self.left = file.tell() + (1 << 16)
            file.seek(at)

        def read(self, size: int = -1) -> bytes:
            content = self.file.read(size)
            self.left -= len(content)
            if self.left < 0:
                raise ValueError("its tags refer to the same bytes again and again")
            return content

    return lambda directory, file: load(directory, Bounded(file))


TiffImagePlugin.ImageFileDirectory_v2.load = _bound_tags(TiffImagePlugin.ImageFileDirectory_v2.load)  # pyright: ignore[reportAttributeAccessIssue]


def _upright_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError("it has no pixels")
    image.load()  # Pillow applies a TIFF's orientation on load
    transpose = None
    with suppress(Exception):  # ignore the orientation if the EXIF data is invalid
        transpose = TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(ORIENTATION, 1))
    upright = _to_rgb(_cut_long(image))
    if image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0:
        upright = ImageOps.invert(upright)  # level 0 is white, which Pillow handles only up to 8 bits
    upright.info.clear()  # its orientation, transparency and colour profile no longer apply
    return upright if transpose is None else upright.transpose(transpose)


def _cut_long(image: Image.Image) -> Image.Image:
    """Crop a very long image to its middle: resized to a given shorter side, it would take unbounded memory."""
    shorter = min(image.size)
    excess = [max(0, side - MAX_ASPECT * shorter) // 2 for side in image.size]  # at either end
    if not any(excess):
        return image
    left, top = excess
    return image.crop((left, top, image.width - left, image.height - top))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        low, high = _black_and_white(image)
        scale = 255 / (high - low) if high > low else 0.0
        return _convert_bands(image, lambda band: Image.fromarray(_to_8_bits(band, low, scale)))
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        return _convert_bands(image, _over_white)
    return image.convert("RGB")


def _convert_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image to RGB band by band, so that only the result takes additional memory."""
    rgb = Image.new("RGB", image.size)
    for box in _bands(image):
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def _bands(image: Image.Image) -> list[tuple[int, int, int, int]]:
    rows = max(1, BAND_PIXELS // image.width)
    return [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]


def _over_white(band: Image.Image) -> Image.Image:
    band = band.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)


def _levels(band: Image.Image) -> np.ndarray:
    """Return the levels of an image of 16 or 32 bits as float64, NaN for missing ones."""
    levels = np.asarray(band, dtype=np.float64)
    return np.where((np.abs(levels) < NO_DATA) & ~np.isin(levels, NO_DATA_LEVELS), levels, np.nan)


def _black_and_white(image: Image.Image) -> tuple[float, float]:
    """Return the levels of black and white.

    Formats of 16 or 32 bits do not say how many of these bits are used. White is the lowest of `WHITES` that no level
    exceeds, and 1 for fractions of at most `OVERSHOOT`. If levels exceed all `WHITES` or are negative, the lowest
    level is black and the highest is white. Raises `ValueError` where no level is a number.
    """
    ranges = [
        (np.fmin.reduce(levels, axis=None), np.fmax.reduce(levels, axis=None))
        for levels in (_levels(image.crop(box)) for box in _bands(image))
    ]
    lows, highs = np.array(ranges).T
    low, high = float(np.fmin.reduce(lows)), float(np.fmax.reduce(highs))
    if math.isnan(low):
        raise ValueError("none of its levels is a number")
    if low < 0 or high > WHITES[-1]:
        return low, high
    if (
        image.mode == "F"
        and high <= OVERSHOOT
        and any((_levels(image.crop(box)) % 1 > 0).any() for box in _bands(image))
    ):
        return 0.0, 1.0
    return 0.0, float(next(white for white in WHITES if high <= white))


def _to_8_bits(band: Image.Image, low: float, scale: float) -> np.ndarray:
    return np.nan_to_num((_levels(band) - low) * scale).round().clip(0, 255).astype(np.uint8)
