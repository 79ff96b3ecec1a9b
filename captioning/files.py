"""Files: written whole, hashed, and told apart by their names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from captioning.errors import InputError

CACHE = Path("cache")


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
    """Write a file whole or not at all: beside its target, flushed to disk, renamed over it."""
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        beside.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise InputError(f"{path} cannot be written ({reason}); the files before it are intact.") from error


def check_output(path: Path) -> None:
    """Check, before long work, that its output can be written to `path`, and create the folder that it is in.

    Raises `InputError` where `write_file` would.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is not a file; name another one to write.")
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another file.") from None


@cache
def photo_suffixes() -> frozenset[str]:
    """How the names of files end that look like photos."""
    extensions = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in extensions if kind in Image.OPEN and kind != "EPS")
