"""Atomic writes, locks, hashes, decoding of text and checks of paths."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import filelock

from captioning.errors import InputError, warn_once

CACHE = Path("cache")
BYTE_ORDER_MARKS = {  # UTF-32's come first, as they begin with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ARCHIVES = {  # by first bytes
    b"PK\3\4": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!\x1a": "a RAR archive",
}
RTF, WEB_PAGE = "an RTF document", "a web page"
BINARY_FILES = {  # files that are mistaken for text, by first bytes
    **ARCHIVES,
    b"PK\3\4": "a zip archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow file",  # of the streaming format
    b"%PDF-": "a PDF file",
    b"{\\rtf": RTF,
    **dict.fromkeys((b"<!DOCTYPE html", b"<!doctype html", b"<html"), WEB_PAGE),
    b"SQLite format 3": "an SQLite database",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    **dict.fromkeys((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"), "a Python pickle"),
}
LATIN = ("cp1252", "iso8859-1", "iso8859-15")  # names in `codecs`
LATIN_IN_UTF8 = re.compile(rb"[\xc2\xc3\xe2]")  # first bytes of accented letters and typographic marks
SPACES = b" \n\r\t,"  # show the byte order of UTF-16; in the other order, most letters and digits are characters, too
LFS_START, LFS_POINTER = b"version https://git-lfs", "is a Git LFS pointer; `git lfs pull` fetches the file itself"
BINARY_ADVICE = "unpack an archive and name its folder, or save a table as CSV in UTF-8"
DOCUMENTS = {RTF: "save it as plain text in UTF-8", WEB_PAGE: "download the file itself, perhaps after logging in"}
_WEB_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)  # C:/ is none


def hash_file(path: Path, prefix: bytes = b"") -> str:
    """Compute the SHA-256 of a file, with `prefix` prepended, in hexadecimal."""
    digest = hashlib.sha256(prefix)
    require_regular(path)
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def format_bytes(size: float) -> str:
    """Write a number of bytes in MB, or in GB from 1 GB on."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def require_regular(path: str | Path) -> None:
    """Raise `InputError` for a web address, and for a pipe, device or folder, which could block its reader forever."""
    try:
        is_regular = stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        if web_address(path):
            raise missing_file(path) from None
        return  # opening the file reports it
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder, not a file.")
    if not is_regular:
        raise InputError(f"{path} is not a regular file.")


def is_within(name: str) -> bool:
    """Return whether a file name, relative to a folder, stays within that folder."""
    return not Path(name).anchor and not (".." in name and ".." in Path(name).parts)  # "D:x" has one on Windows


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Read a regular file of at most `limit` bytes; raises `InputError` for anything else, pipes included."""
    require_regular(path)
    try:
        if limit is not None and (size := os.stat(path).st_size) > limit:
            raise InputError(f"{path} has {size:,} bytes; at most {limit:,} are read.")
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None


def read_text(path: Path, encoding: str | None = None, advice: str = "save it as UTF-8") -> str:
    """Read the text of a file, decoded by its byte order mark or else as UTF-8; every line ends in "\\n".

    A given `encoding` is that of files that are not in UTF-8. Raises `InputError` where the file cannot be read and,
    with the `advice` at the end, where its bytes are not text.
    """
    return decode_text(read_bytes(path), path, encoding, advice)


def decode_text(data: bytes, path: object, encoding: str | None = None, advice: str = "save it as UTF-8") -> str:
    """Decode the bytes of a file as `read_text` does; `path` names the file in the message of an `InputError`."""
    kind = next((kind for start, kind in BINARY_FILES.items() if data.startswith(start)), None)
    kind = "a tar archive" if data[257:262] == b"ustar" else kind
    if kind is not None:
        advice = "name the table or the folder of captions" if kind.endswith("image") else BINARY_ADVICE
        advice = DOCUMENTS.get(kind, advice)
        raise InputError(f"{path} is {kind}, not a text file; {advice}.")
    if data.startswith(LFS_START):
        raise InputError(f"{path} {LFS_POINTER}.")
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    name = marked or (encoding if encoding and not _is_utf8(data) else "utf-8")
    try:
        if codecs.lookup(encoding or name).name == "utf-16" and not marked and name == encoding:
            name = _utf_16_of(data, path)
        text = data.decode(name)
    except LookupError:
        raise InputError(f"{encoding} is not a text encoding that Python knows; examples are cp1252, utf-16.") from None
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        line = data.count(b"\n", 0, at) + 1
        raise InputError(f"{path}, line {line}, is not {name.upper()} text (byte {at}); {advice}.") from None
    if name == encoding and codecs.lookup(name).name in LATIN:
        _check_latin(data, text, path, name)
    if "\0" in text:
        raise InputError(f"{path} holds zero bytes, as UTF-16 without a byte order mark does; {advice}.")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _utf_16_of(data: bytes, path: object) -> str:
    """Return the form of UTF-16 without a byte order mark, for which Python would take the system's, by its spaces."""
    units = Counter(zip(data[::2], data[1::2], strict=False))
    little, big = sum(units[x, 0] for x in SPACES), sum(units[0, x] for x in SPACES)
    if little == big:
        raise InputError(f"{path} has no byte order mark; name its encoding as utf-16-le or utf-16-be with --encoding.")
    return "utf-16-le" if little > big else "utf-16-be"


def _check_latin(data: bytes, text: str, path: object, encoding: str) -> None:
    """Raise `InputError` where a Latin encoding, with which any bytes can be decoded, is not that of the bytes."""
    for number, (line, decoded) in enumerate(zip(data.split(b"\n"), text.split("\n"), strict=True), 1):
        if LATIN_IN_UTF8.search(line) and _is_utf8(line):
            raise InputError(
                f"{path}, line {number}, is UTF-8, but others are not; save the whole file in UTF-8 or in {encoding}."
            )
        if control := re.search("[\x80-\x84\x86-\x9f]", decoded):
            raise InputError(
                f"{path}, line {number}, holds the control character {control[0]!r} in {encoding}; try cp1252."
            )


def _is_utf8(data: bytes) -> bool:
    """Return whether bytes are UTF-8 text, without the zero bytes of UTF-16 and the escapes of ISO 2022."""
    try:
        data.decode()
    except UnicodeError:
        return False
    return b"\0" not in data and b"\x1b" not in data


def require_access(folder: Path) -> None:
    """Raise `InputError` for a web address, and for a folder that may not be entered or listed, or lies in one.

    A missing folder passes.
    """
    try:
        os.scandir(folder).close()
    except PermissionError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); change its permissions.") from None
    except (OSError, ValueError):
        if web_address(folder):
            raise missing_file(folder) from None
        return
    if not os.access(folder, os.X_OK):
        raise InputError(f"{folder} cannot be entered (Permission denied); change its permissions.")


def require_local(folder: Path) -> None:
    """Raise `InputError` for a web address; otherwise a folder of that name would be created."""
    if address := web_address(folder):
        raise InputError(f"{address} is a web address; name a place on this computer.")


def require_new_folder(folder: Path) -> None:
    """Raise `InputError` unless `folder` does not exist yet, or is an empty folder; also for a web address."""
    require_local(folder)
    try:
        if os.path.islink(folder) and not os.path.exists(folder):
            raise InputError(f"{folder} is a broken link; delete it or name another folder.")
        if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
            raise InputError(f"{folder} exists and is not empty; delete it or name another folder.")
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}).") from None


def write_file(path: Path, write: Callable[[BinaryIO], object], sync: bool = True) -> None:
    """Write a file atomically: under a temporary name, which is then renamed to `path`.

    With `sync` the content is on disk before the file is renamed, so that it survives a power failure.
    """
    try:
        _write_atomically(path, path.with_name(path.name + ".new"), write, sync)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise InputError(f"{path} cannot be written ({reason}); existing files are unchanged.") from error


def write_cache(cache: Path, name: str, write: Callable[[BinaryIO], object]) -> bool:
    """Write the file `name` in the cache folder atomically; returns whether that was possible.

    A cache that cannot be written only costs time, so that is a warning on stderr, printed once.
    """
    path = cache / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may write the same file, so each has its own temporary name.
        _write_atomically(path, path.with_name(f"{path.name}.{os.getpid()}.new"), write)
    except OSError as error:
        warn_once(f"the cache folder {cache} cannot be written ({error.strerror}); what it would hold is not kept.")
        return False
    return True


def _write_atomically(path: Path, temporary: Path, write: Callable[[BinaryIO], object], sync: bool = True) -> None:
    try:
        with open(temporary, "wb") as file:
            write(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def require_writable(folder: Path) -> None:
    """Raise `InputError` if no file can be written into the folder; call it before a long computation."""
    try:
        _try_to_write(folder)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to ({error.strerror}); make it writable, or use a copy of it."
        ) from None


def _try_to_write(folder: Path) -> None:
    """Write and delete a file; on Windows, `tempfile` would try for hours in a folder that may not be written."""
    if os.name != "nt":
        tempfile.TemporaryFile(dir=folder).close()
        return
    path = Path(folder, f".{secrets.token_hex(8)}.tmp")
    path.touch(exist_ok=False)
    path.unlink()


def check_output(path: Path) -> None:
    """Check before a long computation that a file can be written to `path`, and create its folder.

    Raises `InputError` where `write_file` would.
    """
    require_local(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} cannot be written: it is not a file; name another one.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.lstat(path.with_name(path.name + ".new"))  # raises if the name is too long
        _try_to_write(path.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another file.") from None


def web_address(path: object) -> str:
    """Return the web address that a path is, with the slashes that pathlib drops; "" for another path."""
    match = _WEB_ADDRESS.match(str(path))
    if match is None:
        return ""
    slashes = "///" if match[1].lower() == "file" else "//"
    return f"{match[1]}:{slashes}{str(path)[match.end() :]}"


def missing_file(path: object) -> InputError:
    """Return the error for a missing file; for a web address it says that nothing is downloaded."""
    address = web_address(path)
    if not address:
        return InputError(f"{path} does not exist; check the path." if str(path) else "a path is empty; name a file.")
    if address.lower().startswith("file:"):
        scheme = address.partition(":")[0]
        return InputError(f"{address} is an address; name the path itself, without {scheme}://.")
    return InputError(f"{address} is a web address, and nothing is fetched; download the file and name it.")


def is_at_most(path: Path, size: int) -> bool:
    """Return whether a file has at most `size` bytes; False for a broken link."""
    try:
        return path.stat().st_size <= size
    except OSError:
        return False


@contextmanager
def lock_output(output: Path, other: str = "name another file") -> Iterator[None]:
    """Lock a file or folder against other processes; raises `InputError`, with `other` as advice, if one holds it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"{output} is being written by another process; wait for it or {other}.") from None
    try:
        yield
    finally:
        # While it is held: afterwards, another run may hold it, and a third one would lock a new file. Windows deletes
        # no open file; there, the release deletes it.
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()
