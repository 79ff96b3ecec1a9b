"""Files: written whole, hashed, and told apart by their names."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from captioning.errors import InputError, warn_once

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
    """Write a file whole or not at all: to a temporary name, flushed to disk, renamed to `path`."""
    try:
        _write_whole(path, path.with_name(path.name + ".new"), write)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise InputError(f"{path} cannot be written ({reason}); the files before it are intact.") from error


def write_cache(cache: Path, name: str, write: Callable[[BinaryIO], object]) -> bool:
    """Write the file `name` in the cache folder, whole or not at all; returns whether that was possible.

    A cache that cannot be written costs time and nothing else, so it is a warning on stderr, printed once.
    """
    path = cache / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may write the same file: each has a temporary name of its own.
        _write_whole(path, path.with_name(f"{path.name}.{os.getpid()}.new"), write)
    except OSError as error:
        warn_once(f"the cache folder {cache} cannot be written ({error.strerror}); what it would hold is not kept.")
        return False
    return True


def _write_whole(path: Path, temporary: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def require_writable(folder: Path) -> None:
    """Raise `InputError` if no file can be written into the folder, so that long work need not find out at its end."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to ({error.strerror}); make it writable, or use a copy of it."
        ) from None


@cache
def photo_suffixes() -> frozenset[str]:
    """How the names of files end that look like photos."""
    extensions = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in extensions if kind in Image.OPEN and kind != "EPS")
