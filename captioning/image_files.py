"""Read image files into RGB pixels, within limits of memory and time.

Reading a file takes at most 1.1 GB of memory beyond the file's own size: `MAX_BYTES` limits what its decoder
allocates, and so its number of pixels (33 million for a JPEG 2000, 62 million for a WebP, 66 million for an AVIF, 83
million for a HEIC of 8 bits and 47 million for one of more, 125 million for a PNG or TIFF). A JPEG may have 4,000
million, since it is decoded at a reduced size. An image of 12 megapixels takes 6 MB as a JPEG that is reduced to 256
pixels, and 100 MB as a PNG.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImagePalette, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile

from captioning.errors import InputError
from captioning.files import missing_file
from captioning.image_formats import describe_content, image_formats, register_heif
from captioning.metadata import limit_metadata
from captioning.pixels import HIGHLIGHTS, join_bytes, mark_of_no_data, upright_rgb
from captioning.shards import Member, is_shard, list_images

MAX_BYTES = 1_000_000_000  # memory limit for decoding one image, in bytes
MAX_FILE_BYTES = 512 << 20
MAX_SECONDS = 60  # limit of the processor time for reading one file
MAX_SCANS = 100  # maximum number of scans in a JPEG; encoders write about 10
MAX_SCANNED_PIXELS = 4_000_000_000  # maximum number of pixels in all scans of a JPEG, which take some 3 seconds
BYTES_PER_PIXEL = {"WEBP": 16, "AVIF": 15, "HEIF": 12, "JPEG2000": 30}  # measured memory of the decoders
DEEP_HEIF_BYTES_PER_PIXEL = 21  # of a HEIC of more than 8 bits per channel
DEFAULT_BYTES_PER_PIXEL = 8  # 4 for Pillow's image and 4 for the decoder or the RGB copy
RLE_ROWS = 255  # maximum number of rows that one code of a run-length encoded BMP can add below the image
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
# A JPEG marker followed by a length, or the end of the image; FF 00 and FF D0 to FF D7 occur within a scan's data.
JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA
JPEG_START = b"\xff\xd8\xff"
# Pillow's names of 16-bit channels of which it keeps the upper byte: channels, and byte order.
DEEP = re.compile(r"(RGB|RGBA|RGBX|LA);16([LBN])")
OTHER_DEEP = re.compile(r"(RGBa|CMYK|L);16[LBN]")  # whose lower byte cannot be had
GREY_LEVELS = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies the levels of 2 and 4 bits
OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
BOXES = (b"ftyp", b"meta", b"mdat", b"moov", b"free", b"skip")  # types of boxes of HEIC and AVIF files
MAX_BOXES = 100  # boxes of a HEIC or AVIF file whose ends are compared with the file's
DARK = 15  # highest upper byte of levels that use 12 of 16 bits

limit_metadata()

Source = str | os.PathLike | Member | Image.Image  # what an image is read from


def read_image(source: Source, shorter_side: int | None = None, longer_side: int | None = None) -> Image.Image:
    """Read an image as people see it: upright, in 8-bit RGB, transparency over white, only its first frame.

    A JPEG is decoded at a half, a quarter or an eighth of its size where its shorter side still has at least twice
    `shorter_side` pixels, or its longer side more than `longer_side`; that saves most of the time, and a resize to
    `shorter_side`, or to `longer_side` as a JPEG of medium quality, does not show it. A JPEG of more than 125 million
    pixels is always reduced. An image more than 32 times as long as it is wide is cropped to its middle. A PIL image
    that was opened, but not decoded, is read as its file is; decoding has lost the lower bits of 16-bit colours. The
    orientation in its EXIF data is applied; `ImageOps.exif_transpose` removes it there, and `rotate` does not.
    Raises `InputError` with the file's name for whatever cannot be read within the limits of this module.
    """
    if not isinstance(source, (str, os.PathLike, Member, Image.Image)):
        advice = (
            "; use Image.open" if is_content(source) else "; use Image.fromarray" if hasattr(source, "shape") else ""
        )
        raise InputError(f"an image is a path or a PIL image, not a {type(source).__name__}{advice}.")
    path = os.fspath(source) if isinstance(source, os.PathLike) else source
    name = "the image" if isinstance(path, Image.Image) else str(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(source, Image.Image) and not _is_undecoded(source):
                return upright_rgb(source.convert("RGB") if _has_false_alpha(source) else source)
            with _open_file(source) as file:
                image = _open_image(file)
                _draft(image, shorter_side, longer_side)
                _check_size(image)
                _load(image, file)
                _check_size(image)  # an icon's true size is in the PNG that it contains
                return upright_rgb(image)
    except FileNotFoundError:
        raise missing_file(name) from None
    except Exception as error:
        if isinstance(error, UnidentifiedImageError) and not isinstance(source, Member) and is_shard(Path(name)):
            deque(list_images(Path(name)), maxlen=0)  # says what is wrong with a tar file
        reason = describe_failure(error)
    raise InputError(f"{name} cannot be read as an image ({reason}).")


def is_content(source: object) -> bool:
    """Return whether something is the content of a file, or an open file, which `Image.open` takes."""
    return isinstance(source, bytes | bytearray | memoryview) or hasattr(source, "read")


def describe_failure(error: Exception) -> str:
    """Describe why an image cannot be read, by what Pillow raised: for a broken file, that is nearly anything."""
    if isinstance(error, UnidentifiedImageError):
        return "its content is not in an image format that can be read"
    if isinstance(error, Image.DecompressionBombError):  # Pillow's own limit is higher, and is not told
        return f"it has more than {MAX_BYTES // DEFAULT_BYTES_PER_PIXEL // 10**6} million pixels; save it smaller"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    cause = error.__cause__ or error  # a decoder in C hides why its file could not be read
    if isinstance(cause, struct.error):
        return "it is cut off"
    if isinstance(cause, IndexError) or str(cause) == "could not create decoder object":  # as of a cut QOI or WebP file
        return "it is damaged or cut off"
    return getattr(cause, "strerror", None) or str(cause).split("\n")[0] or type(cause).__name__


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file of any format that `read_image` reads, without decoding it; raises what Pillow raises."""
    with warnings.catch_warnings(), _open_file(path) as file:
        warnings.simplefilter("ignore")
        is_jpeg = file.read(len(JPEG_START)) == JPEG_START
        file.seek(0)
        yield JpegImageFile(file) if is_jpeg else _open_image(file)


class _TimedFile(io.BufferedReader):
    """A file that can be read while its thread computes for `MAX_SECONDS`; Pillow's decoders read it block by block.

    A slow disk, or other programs that keep the processor busy, do not count.
    """

    def __init__(self, raw: Any):
        super().__init__(raw)
        self.deadline = time.thread_time() + MAX_SECONDS

    def read(self, size: int | None = -1) -> bytes:
        self._check_time()
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        self._check_time()
        return super().readline(size)

    def _check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise ValueError(f"decoding it takes more than {MAX_SECONDS} seconds")


def _is_undecoded(image: Image.Image) -> bool:
    """Return whether an image was opened, at its first frame, and not decoded yet."""
    first_frame = getattr(image, "_min_frame", 0)  # 1 for a PSD
    return isinstance(image, ImageFile.ImageFile) and bool(image.tile) and image.tell() == first_frame


def _open_file(source: Source) -> _TimedFile:
    if isinstance(source, Image.Image):
        return _reopen(source)
    if isinstance(source, Member):
        size = source.size
    else:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
        size = status.st_size
    if size == 0:
        raise ValueError("it is empty")
    _check_file_size(size)
    return _TimedFile(io.BytesIO(source.read()) if isinstance(source, Member) else io.FileIO(source))


def _reopen(image: Any) -> _TimedFile:
    """Return the content of an undecoded image's file, whose position stays as it is."""
    if image.fp is None or image.fp.closed:
        raise ValueError("its file is closed; load() it before that, or name its path")
    position, size = image.fp.tell(), image.fp.seek(0, os.SEEK_END)
    try:
        _check_file_size(size)
        image.fp.seek(0)
        return _TimedFile(io.BytesIO(image.fp.read()))
    finally:
        image.fp.seek(position)


def _check_file_size(size: int) -> None:
    """Raise `ValueError` for a file of too many bytes."""
    if size > MAX_FILE_BYTES:
        raise ValueError(f"it has {size >> 20:,} MB, and an image may have {MAX_FILE_BYTES >> 20}; save a smaller copy")


def _open_image(file: _TimedFile) -> Image.Image:
    start = file.read(64)
    if _is_cut_off(file, start):
        raise ValueError("it is cut off")
    file.seek(0)
    if start.startswith(JPEG_START):
        scans = _count_scans(file.read())
        file.seek(0)
        image = JpegImageFile(file)  # unlike Image.open, this sets no limit to the size before `_draft`
        _check_scans(image, scans)
        return image
    try:
        image = Image.open(file, formats=image_formats())
        if image.format == "PSD" and image.mode == "1":  # Pillow takes its ones for white; they are black
            image.tile = [_with_raw_mode(tile, "1;I") for tile in image.tile]
        return _correct_tiff(image, file) if image.format == "TIFF" else image
    except UnidentifiedImageError:
        if content := describe_content(start):
            raise ValueError(content) from None
        if start.startswith((b"II*\0", b"MM\0*")):
            raise ValueError("it is a TIFF of a kind that cannot be read; save it as PNG or JPEG") from None
        if start[4:8] != b"ftyp" or start[8:12] not in HEIF_BRANDS:
            raise
    if not register_heif():
        raise ValueError("it is a HEIC image; `pip install pillow-heif` makes them readable")
    file.seek(0)
    return Image.open(file, formats=["HEIF"])


def _is_cut_off(file: Any, start: bytes) -> bool:
    """Return whether a TIFF's directory, or a box of a HEIC or AVIF image, is beyond the end of the file."""
    size = file.seek(0, os.SEEK_END)
    if start.startswith((b"II*\0", b"MM\0*")):
        return int.from_bytes(start[4:8], "little" if start.startswith(b"II") else "big") >= size
    end = 0  # of the boxes so far
    for _ in range(MAX_BOXES if start[4:8] == b"ftyp" else 0):
        file.seek(end)
        header = file.read(16)
        if header[4:8] not in BOXES:
            break
        end += int.from_bytes(header[8:] if header[:4] == b"\0\0\0\1" else header[:4], "big")
    return end > size


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


def _draft(image: Image.Image, shorter_side: int | None, longer_side: int | None) -> None:
    """Set a JPEG to be decoded at a half, a quarter or an eighth of its size."""
    width, height = image.size
    scale = 1
    while scale < 8 and (
        (shorter_side is not None and min(width, height) >= 2 * scale * 2 * shorter_side)
        or (longer_side is not None and max(width, height) > 2 * scale * longer_side)
        or width * height * DEFAULT_BYTES_PER_PIXEL > MAX_BYTES * scale**2
    ):
        scale *= 2
    if scale > 1:
        image.draft(None, (max(1, width // scale), max(1, height // scale)))


def _load(image: Any, file: _TimedFile) -> None:
    """Decode an image.

    Pillow keeps only the upper byte of 16-bit levels. If nearly all of a file's levels use at most 12 of the bits, that
    is nearly black; the file is then decoded again in the other byte order, which gives the lower byte. The level by
    which a file marks missing cells does not count.
    """
    raw_mode, decoder = (_raw_mode(image.tile[0]), image.tile[0].codec_name) if image.tile else ("", "")
    image.load()
    if isinstance(level := image.info.get("transparency"), int):
        image.info["transparency"] = level * GREY_LEVELS.get(raw_mode, 1)
    if _has_false_alpha(image):
        image.putalpha(255)
    layout = DEEP.fullmatch(raw_mode)
    if layout is None and not (OTHER_DEEP.fullmatch(raw_mode) or decoder == "SGI16"):
        return
    counts = np.reshape(image.histogram(), (-1, 256))  # of each level
    no_data = mark_of_no_data(image)
    if 256 * (DARK + 1) <= no_data < 65536:
        counts[:3, int(no_data) >> 8] = 0
    if raw_mode.startswith("RGBa") and counts[3, :255].any():  # its colours are divided by the transparency
        counts = counts[3:]
    elif image.mode != "CMYK":
        counts = counts[:3]
    if counts[:, DARK + 1 :].sum(1).max() > HIGHLIGHTS * image.width * image.height:
        if isinstance(colour := image.info.get("transparency"), tuple):
            image.info["transparency"] = tuple(level >> 8 for level in colour)
        return
    if layout is None or getattr(image, "tag_v2", {}).get(Base.PlanarConfiguration) == 2:
        raise ValueError("nearly all of its levels use fewer than 13 of their 16 bits; save it with 8 bits per channel")
    _check_size(image, besides=4)
    file.seek(0)
    lower: Any = Image.open(file, formats=[image.format])
    grey = layout[1] == "LA"  # Pillow has no other byte order for these; as RGBA, their four bytes are kept
    mode = "RGBA" if grey else f"{layout[1]};16{OTHER_ORDER[layout[2]]}"
    lower.tile = [_with_raw_mode(tile, mode) for tile in lower.tile]
    lower.load()
    join_bytes(image, lower, (1, 1, 1, 3) if grey else range(len(image.getbands())), no_data)


def _has_false_alpha(image: Image.Image) -> bool:
    """Return whether the fourth channel is not transparency: it is unused, or a PSD's, whose colours are over white."""
    return image.mode == "RGBA" and (
        image.format == "PSD"
        or (image.format in ("TGA", "ICO", "BMP") and image.getchannel("A").getextrema() == (0, 0))
    )


def _raw_mode(tile: Any) -> str:
    """Return Pillow's name for the layout of a part of a file."""
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _with_raw_mode(tile: Any, mode: str) -> Any:
    return tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode)


def _correct_tiff(image: Any, file: _TimedFile) -> Image.Image:
    """Correct what Pillow takes for samples of 8 bits, or for a wrong order of bytes, in some TIFFs."""
    tags, uncompressed = image.tag_v2, bool(image.tile) and image.tile[0].codec_name == "raw"
    if uncompressed and tags.get(Base.PlanarConfiguration) == 2 and max(tags.get(Base.BitsPerSample, (1,))) > 8:
        TiffImagePlugin.READ_LIBTIFF = True
        try:
            file.seek(0)
            return Image.open(file, formats=["TIFF"])
        finally:
            TiffImagePlugin.READ_LIBTIFF = False
    if image.mode == "P" and max(colours := tags[Base.ColorMap]) < 256:  # the standard demands 16 bits
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))
    if not uncompressed:  # libtiff returns numbers in the processor's order
        image.tile = [_with_raw_mode(tile, re.sub("B(?=[FS]$)", "N", _raw_mode(tile))) for tile in image.tile]
    return image


def _check_size(image: Image.Image, besides: int = 0) -> None:
    """Raise `ValueError` if decoding takes too much memory; `besides` are further bytes that each pixel needs."""
    width, height = image.size
    most = MAX_BYTES // (_bytes_per_pixel(image) + besides)
    if width * (height + RLE_ROWS * ("bmp_rle" in str(getattr(image, "tile", "")))) > most:
        raise ValueError(f"it has {width} x {height} pixels, more than {most // 10**6} million; save it smaller")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    width, height = tags.get(Base.TileWidth, 0), tags.get(Base.TileLength, 0)  # a tile may be larger than the image
    if width * height > most:
        raise ValueError(f"its tiles have {width} x {height} pixels, more than {most // 10**6} million; save it again")


def _bytes_per_pixel(image: Any) -> int:
    """Return the bytes that decoding takes for each pixel."""
    if image.format == "TIFF":  # a decoder holds all samples of a strip, which may be the whole image
        return max(DEFAULT_BYTES_PER_PIXEL, 4 + -(-sum(image.tag_v2.get(Base.BitsPerSample, (8,))) // 8))
    if image.format == "HEIF" and image.info.get("bit_depth", 8) > 8:
        return DEEP_HEIF_BYTES_PER_PIXEL
    return BYTES_PER_PIXEL.get(str(image.format), DEFAULT_BYTES_PER_PIXEL)
