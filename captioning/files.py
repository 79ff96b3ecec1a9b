"""Files: written whole, hashed, and told apart by their names."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from captioning.errors import InputError

CACHE = Path("cache")
BYTE_ORDER_MARKS = {  # the longest first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def hash_file(path: Path, before: bytes = b"") -> str:
    """The SHA-256 of a file, in hexadecimal, as if these bytes stood before it."""
    digest = hashlib.sha256(before)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path} is not a regular file.")
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; `InputError` for anything else, pipes included."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is not a regular file.")
        if limit is not None and status.st_size > limit:
            raise InputError(f"{path} has {status.st_size:,} bytes; at most {limit:,} are read.")
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None


def read_text(path: Path, encoding: str | None = None, advice: str = "save it as UTF-8") -> str:
    """The text of a file with lines that end in "\\n": in the encoding of its byte order mark, or in UTF-8.

    A given `encoding` comes before both. Raises `InputError`, which ends with the `advice`, where the bytes are not
    text in that encoding, and where the file cannot be read.
    """
    data = read_bytes(path)
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding or marked)
    except LookupError:
        raise InputError(f"{encoding} is not a text encoding that Python knows; examples are cp1252, utf-16.") from None
    except UnicodeError as error:
        at, name = getattr(error, "start", 0), (encoding or marked).upper()
        line = data.count(b"\n", 0, at) + 1
        raise InputError(f"{path}, line {line}, is not {name} text (byte {at}); {advice}.") from None
    if "\0" in text:
        raise InputError(f"{path} holds zero bytes, as UTF-16 without a byte order mark does; {advice}.")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def require_new_folder(folder: Path) -> None:
    """Raise `InputError` unless `folder` does not exist yet, or is an empty folder."""
    try:
        if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
            raise InputError(f"{folder} exists and is not empty; delete it or name another folder.")
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}).") from None


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


@cache
def photo_suffixes() -> frozenset[str]:
    """How the names of files end that look like photos."""
    extensions = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in extensions if kind in Image.OPEN and kind != "EPS")
