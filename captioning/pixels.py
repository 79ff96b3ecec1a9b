"""Convert decoded images of every mode into upright 8-bit RGB."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base

MAX_ASPECT = 32  # maximum ratio of an image's longer side to its shorter one; a longer image is cropped to its middle
BAND_PIXELS = 1 << 20  # number of pixels converted at a time
WHITES = (1, 255, 1023, 4095, 65535)  # usual levels of white in images of more than 8 bits per channel
OVERSHOOT = 16  # highest level in an image of fractions whose white is 1, apart from highlights
RINGING = 1.1  # factor by which a resize may exceed white in an image of floating-point numbers
HIGHLIGHTS = 0.001  # maximum share of an image's levels that lie beyond white, or below 0
SAMPLE = 1 << 17  # number of levels, or up to four times as many, from which the lowest and the highest are taken
GDAL_NODATA = 42113  # the tag by which a TIFF names its mark of missing cells
NO_DATA = 1e30  # geographic images also mark missing cells with numbers beyond this one, or with one of these:
NO_DATA_LEVELS = (-9999, -32768, -99999, -(2**31))

TRANSPOSE_OF_ORIENTATION = {  # EXIF orientation -> transpose that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Mode, bits and SampleFormat of TIFFs -> the type of their levels, where the mode has another type.
STORED_TYPES: dict[tuple[str, int, int], type[np.integer]] = {
    ("I", 32, 1): np.uint32,
    ("I", 16, 2): np.int16,
    ("L", 8, 2): np.int8,
}


@dataclass
class _Encoding:
    """How a grey image encodes its levels.

    stored: the type of the levels, if the image's mode has another one. no_data: the level of missing cells, or NaN.
    """

    stored: type[np.integer] | None
    no_data: float

    def levels(self, band: Image.Image) -> np.ndarray:
        """Return the levels of a band as float64, NaN for missing ones."""
        levels = np.asarray(band)
        levels = (levels if self.stored is None else levels.astype(self.stored)).astype(np.float64)
        present = (np.abs(levels) < NO_DATA) & ~np.isin(levels, (*NO_DATA_LEVELS, self.no_data))
        return np.where(present, levels, np.nan)


def upright_rgb(image: Any) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, upright, transparency over white.

    A very long image is cropped to its middle. A colour profile is ignored, as it was when the backbones' weights were
    trained.
    Raises `ValueError` for an image without pixels or without a level that is a number.
    """
    if 0 in image.size:
        raise ValueError("it has no pixels")
    image.load()  # Pillow applies a TIFF's orientation on load
    transpose = None
    with suppress(Exception):  # ignore the orientation if the EXIF data is invalid
        transpose = TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(Base.Orientation, 1))
    tags = getattr(image, "tag_v2", {})
    stored = STORED_TYPES.get((image.mode, tags.get(Base.BitsPerSample, (0,))[0], tags.get(Base.SampleFormat, (1,))[0]))
    upright = _to_rgb(_cut_long(image), _Encoding(stored, mark_of_no_data(image)))
    # Where level 0 is white: in a TIFF, Pillow handles that only up to 8 bits.
    if image.format == "XBM" or (image.mode.startswith(("I", "F")) and tags.get(Base.PhotometricInterpretation) == 0):
        upright = ImageOps.invert(upright)
    upright.info.clear()  # its orientation and transparency no longer apply
    return upright if transpose is None else upright.transpose(transpose)


def mark_of_no_data(image: Image.Image) -> float:
    """Return the level by which a TIFF marks missing cells, NaN where it names none."""
    try:
        mark = getattr(image, "tag_v2", {})[GDAL_NODATA]
        with np.errstate(over="ignore"):
            return float(np.float32(mark) if image.mode == "F" else mark)
    except (KeyError, TypeError, ValueError):
        return math.nan


def _cut_long(image: Image.Image) -> Image.Image:
    """Crop a very long image to its middle: resized to a given shorter side, it would take unbounded memory."""
    shorter = min(image.size)
    excess = [max(0, side - MAX_ASPECT * shorter) // 2 for side in image.size]  # at either end
    if not any(excess):
        return image
    left, top = excess
    middle = image.crop((left, top, image.width - left, image.height - top))
    middle.format = image.format  # by which the levels of white are known
    return middle


def _to_rgb(image: Image.Image, encoding: _Encoding) -> Image.Image:
    transparent = image.info.get("transparency")
    if encoding.stored is not None or image.mode.startswith(("I", "F")):
        low, high = _black_and_white(image, encoding)
        scale = 255 / (high - low) if high > low else 0.0
        hidden = transparent if isinstance(transparent, int) else None
        return _convert_bands(image, lambda band: _to_8_bits(encoding.levels(band), low, scale, hidden))
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or transparent is not None:
        return _convert_bands(image, _over_white)
    return image.convert("RGB")


def _convert_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image to RGB band by band, so that only the result takes additional memory."""
    rgb = Image.new("RGB", image.size)
    for box in bands(image):
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def bands(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Divide an image into boxes of whole rows with about `BAND_PIXELS` pixels each."""
    rows = max(1, BAND_PIXELS // image.width)
    return [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]


def _over_white(band: Image.Image) -> Image.Image:
    band = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)


def _black_and_white(image: Image.Image, encoding: _Encoding) -> tuple[float, float]:
    """Return the levels of black and white.

    Formats of 16 or 32 bits, except PGM, do not say how many of these bits are used; see `white_of`. White is 1 for
    fractions of at most `OVERSHOOT`, or beyond it in a few highlights only; of a signed type, it is at most its highest
    number. If more than a few levels exceed all `WHITES` or are negative, the lowest level is black and the highest is
    white, apart from a few. Raises `ValueError` where no level is a number.
    """
    if image.format == "PPM" and image.mode == "I":  # Pillow has scaled the levels by the file's own maximum
        return 0.0, 65535.0
    ringing = RINGING if image.mode == "F" else 1
    sample: list[np.ndarray] = []
    step, high = 1, -math.inf
    present = negative = up_to_1 = beyond_overshoot = 0
    beyond = np.zeros(len(WHITES), int)
    fractions = False
    for box in bands(image):
        levels = encoding.levels(image.crop(box))
        levels = levels[~np.isnan(levels)]
        sample.append(levels[::step].copy())
        if sum(map(len, sample)) > 4 * SAMPLE:
            sample, step = [part[::3].copy() for part in sample], 3 * step  # 3, as widths are often powers of 2
        high = max(high, levels.max(initial=-math.inf))
        present += len(levels)
        negative += (levels < 0).sum()
        up_to_1 += (levels <= 1).sum()
        beyond_overshoot += (levels > OVERSHOOT).sum()
        beyond += count_beyond(levels / ringing)
        fractions |= image.mode == "F" and bool((levels % 1 > 0).any())
    if not present:
        raise ValueError("none of its levels is a number, or all of them mark missing cells")
    has_highlights = up_to_1 > 0.5 * present and beyond_overshoot < HIGHLIGHTS * up_to_1
    few = HIGHLIGHTS * present
    if negative <= few and fractions and (high <= OVERSHOOT or has_highlights):
        return 0.0, 1.0
    if negative > few or beyond[-1] > few:
        low, high = np.quantile(np.concatenate(sample), (HIGHLIGHTS, 1 - HIGHLIGHTS))
        return float(low), float(high)
    most = np.iinfo(encoding.stored).max if encoding.stored in (np.int8, np.int16) else WHITES[-1]
    return 0.0, float(white_of(beyond, present, most))


def count_beyond(levels: np.ndarray) -> list[int]:
    """Count the levels beyond each of `WHITES`."""
    return [int((levels > white).sum()) for white in WHITES]


def white_of(beyond: np.ndarray, pixels: int, most: int = WHITES[-1]) -> int:
    """Return the level of white in an image: the lowest of `WHITES` that only a few levels exceed; of 1, none may.

    A few are highlights, or a mark for missing cells, such as 65535. `beyond` is what `count_beyond` counted; `most` is
    the highest level that the image's type can hold, in place of the `WHITES` above it.
    """
    few = [0, *[HIGHLIGHTS * pixels] * (len(WHITES) - 1)]
    whites = (white for white, n, limit in zip(WHITES, beyond, few, strict=True) if n <= limit and white < most)
    return next(whites, most)


def _to_8_bits(levels: np.ndarray, low: float, scale: float, transparent: int | None) -> Image.Image:
    grey = np.nan_to_num((levels - low) * scale).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey if transparent is None else np.where(levels == transparent, np.uint8(255), grey))


def join_bytes(upper: Image.Image, lower: Image.Image, channels: Sequence[int], no_data: float) -> None:
    """Scale colours of 16 bits to 8 bits, in place, such that the level of white becomes 255.

    `upper` and `lower` hold the two bytes of each level; `channels` are those of `lower` that belong to the channels
    of `upper`; colours of `no_data` become black. The level of white is `white_of` the levels, in the colours together
    and in the transparency.
    """
    pixels = upper.width * upper.height

    def levels(box: tuple[int, int, int, int]) -> np.ndarray:
        high, low = (np.asarray(image.crop(box), np.uint16) for image in (upper, lower))
        joined = 256 * high + low[..., channels]
        colours = joined[..., :3]
        colours[colours == no_data] = 0
        return joined

    counts = [[count_beyond(channel) for channel in np.moveaxis(levels(box), 2, 0)] for box in bands(upper)]
    beyond = np.sum(counts, 0)  # (channels, whites)
    whites = [white_of(beyond[:3].max(0), pixels)] * 3 + [white_of(alpha, pixels) for alpha in beyond[3:]]
    for box in bands(upper):
        scaled = (levels(box) * (255 / np.array(whites))).round().clip(0, 255)
        upper.paste(Image.fromarray(scaled.astype(np.uint8)), box)
    if isinstance(colour := upper.info.get("transparency"), tuple):
        upper.info["transparency"] = tuple(min(255, round(level * 255 / whites[0])) for level in colour)
