"""Files: written whole, hashed, and told apart by their names."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from PIL import Image

from captioning.errors import InputError

CACHE = Path("cache")
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})  # of images that Pillow reads with pillow-heif
# Formats that Pillow has another program draw, only recognises, or embeds others in without bounds.
NOT_DECODED = {"BLP", "BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
WEB_ADDRESS = re.compile(r"(https?|ftp|s3|gs):/+", re.IGNORECASE)


def hash_file(path: Path, before: bytes = b"") -> str:
    """The SHA-256 of a file, in hexadecimal, as if these bytes stood before it."""
    digest = hashlib.sha256(before)
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: under a temporary name, flushed to disk, renamed over it."""
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise InputError(f"{path} cannot be written ({reason}); the files before it are intact.") from error


def check_writable(path: Path) -> None:
    """Make the folder of an output before the work whose result goes there; `InputError` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.stat(path)
        except FileNotFoundError:
            TemporaryFile(dir=path.parent).close()
        else:
            open(path, "ab").close()
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another file.") from None


def missing_file(path: object) -> InputError:
    """The sentence on a file that is not there; of a web address, that nothing is fetched."""
    address = WEB_ADDRESS.match(str(path))
    if address is None:
        return InputError(f"{path} does not exist; check the path.")
    address = f"{address[1]}://{str(path)[address.end() :]}"  # pathlib drops a slash
    return InputError(f"{address} is a web address, and nothing is fetched; download the file and name it.")


def image_formats() -> list[str]:
    """The names of the formats that Pillow itself decodes, within bounds."""
    Image.init()
    return [name for name in Image.OPEN if name not in NOT_DECODED]


def register_heif() -> bool:
    """Have Pillow read HEIC, with pillow-heif; whether that is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


@cache
def photo_suffixes() -> frozenset[str]:
    """The suffixes of images' file names, in lower case."""
    formats = set(image_formats())
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return frozenset(suffixes | HEIF_SUFFIXES if find_spec("pillow_heif") else suffixes - HEIF_SUFFIXES)
