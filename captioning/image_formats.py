"""The formats of image files that are read: their names in Pillow, their suffixes, and files mistaken for images."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from PIL import Image

from captioning.files import ARCHIVES, LFS_POINTER, LFS_START

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})  # of images that Pillow reads with pillow-heif
# Formats that Pillow renders with another program, only identifies, or nests or expands without bounds.
NOT_DECODED = {"BLP", "BUFR", "EPS", "FITS", "GRIB", "HDF5", "ICNS", "IPTC", "MPEG", "MSP", "WMF", "XPM"}
NOT_IMAGES = {  # first bytes of files that are mistaken for images -> what to tell the user
    LFS_START: f"it {LFS_POINTER}",
    **{start: f"it is {kind}; unpack it first" for start, kind in ARCHIVES.items()},
    b"%PDF": "it is a PDF; save its pages as images",
}


def describe_content(start: bytes) -> str | None:
    """Describe a file that is not an image by its first bytes, with a remedy; None if they are not recognized."""
    return next((what for beginning, what in NOT_IMAGES.items() if start.startswith(beginning)), None)


def image_formats() -> list[str]:
    """List the formats that Pillow decodes itself with bounded memory."""
    Image.init()
    return [name for name in Image.OPEN if name not in NOT_DECODED]


def register_heif() -> bool:
    """Register pillow-heif with Pillow; returns whether it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


@cache
def image_suffixes() -> frozenset[str]:
    """List the suffixes of image files, in lower case."""
    formats = set(image_formats())
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return frozenset(suffixes | HEIF_SUFFIXES if find_spec("pillow_heif") else suffixes - HEIF_SUFFIXES)
