"""Read the lists of a large JSON file entry by entry, in any Unicode encoding, with or without a byte order mark."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from captioning.errors import InputError
from captioning.files import LFS_POINTER, LFS_START, is_at_most, read_text, require_regular

MAX_DEPTH = 100  # maximum nesting of lists and objects
OPENING = ("start_map", "start_array")
LONG_NUMBER = re.compile(rb"(?<![0-9])[0-9]{4301}")  # yajl, which ijson calls, crashes on numbers of more than 64 kB
# yajl would turn the first half of a surrogate pair that lacks its second half into "?".
LONE_SURROGATE = re.compile(
    rb"""
    (?<!\\)(?:\\\\)*                                                        # whose backslash is not itself escaped
    (?: \\u[dD][89abAB]..(?!\\u[dD][c-fC-F])(?=[^\\]|\\[^u]|\\u....)
      | (?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F] )
    """,
    re.VERBOSE | re.DOTALL,
)


class _Utf8:
    """A JSON file's bytes as ijson takes them: in UTF-8, without a byte order mark or lone surrogates."""

    def __init__(self, file: BinaryIO):
        encoding = json.detect_encoding(file.read(4))
        file.seek(len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
        self.file = file if encoding.startswith("utf-8") else codecs.EncodedFile(file, "utf-8", encoding)
        self.tail = b""

    def read(self, size: int) -> bytes:
        """Read about `size` bytes."""
        data = self.file.read(size)
        text = self.tail + data
        if LONG_NUMBER.search(text):
            raise ValueError("it holds a number of more than 4,300 digits")
        if (b"\\ud" in text or b"\\uD" in text) and (half := LONE_SURROGATE.search(text, 7)):
            near = text[max(0, half.start() - 40) : half.end() + 20].decode(errors="replace")
            raise UnicodeError(f"half of a surrogate pair, near {near!r}")
        self.tail = text[-64:]
        return data


def is_annotation_file(path: Path, limit: int) -> bool:
    """Return whether a .json file of at most `limit` bytes holds captions in COCO's layout."""
    with suppress(InputError):
        if path.suffix.lower() == ".json" and is_at_most(path, limit):
            text = read_text(path)
            return all(f'"{name}"' in text for name in ("annotations", "image_id", "caption"))
    return False


def stream_lists(path: Path, names: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield the entries of the lists with these names in a JSON object: name, index, entry.

    Holds one entry in memory at a time. Raises `InputError` where the file is not JSON or does not have each list once.
    """
    require_regular(path)
    try:
        with open(path, "rb") as file:
            yield from _entries(ijson.basic_parse(_Utf8(file)), names)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except InputError as error:
        raise InputError(f"{path} is not a COCO annotation file: it {error}.") from None
    except UnicodeError as error:
        raise InputError(f"{path} is not valid Unicode text ({error}); write it again in UTF-8.") from None
    except ArithmeticError:
        raise InputError(f"{path} is not JSON that can be read: it holds a number that is out of range.") from None
    except (ijson.JSONError, ValueError) as error:
        text = error.args[0] if error.args else ""
        reason, *near = (text.decode(errors="replace") if isinstance(text, bytes) else str(text)).split("\n")
        where = f", near {near[0].strip()!r}" if near and near[0].strip() else ""
        where += "; write null for NaN" * ("NaN" in where)
        if LFS_START.decode() in where:
            raise InputError(f"{path} {LFS_POINTER}.") from None
        if "invalid bytes in UTF8" in reason:
            raise InputError(f"{path} is not UTF-8 text; write it again in UTF-8.") from None
        raise InputError(f"{path} is not JSON ({reason}{where}).") from None


def _entries(events: Iterable[tuple[str, Any]], names: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Build the entries of the named lists from ijson's events; everything else is skipped."""
    events = iter(events)
    found: set[str] = set()
    name = ""
    start, _ = next(events)
    if start != "start_map":
        _skip(start, events)  # to the end of the file
    for event, value in events:
        if event == "map_key":
            name = value
        elif event == "start_array" and name in names:
            if name in found:
                raise InputError(f'has two lists of "{name}"')
            found.add(name)
            entries = iter(events.__next__, ("end_array", None))
            for index, (start, scalar) in enumerate(entries):
                yield name, index, _build(start, scalar, events, f"{name}[{index}]")
        else:
            _skip(event, events)
    for missing in (name for name in names if name not in found):
        raise InputError(f'has no list of "{missing}"')


def _build(event: str, value: Any, events: Iterator[tuple[str, Any]], entry: str, depth: int = 3) -> Any:
    """Build the value that begins with `event`, a part of `entry`, from the events that follow."""
    if event not in OPENING:
        return float(value) if type(value) is Decimal else value
    _check_depth(depth)
    if event == "start_array":
        items = iter(events.__next__, ("end_array", None))
        return [_build(*item, events, entry, depth + 1) for item in items]
    result: dict[str, Any] = {}
    for _, key in iter(events.__next__, ("end_map", None)):
        if key in result:
            raise InputError(f"has {key!r:.80} twice in {entry}")
        result[key] = _build(*next(events), events, entry, depth + 1)
    return result


def _skip(event: str, events: Iterator[tuple[str, Any]]) -> None:
    """Skip the value that begins with `event`."""
    depth = 1 + (event in OPENING)  # within the file's object
    while depth > 1:
        _check_depth(depth)
        event, _ = next(events)
        depth += (event in OPENING) - (event in ("end_map", "end_array"))


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InputError(f"is nested more than {MAX_DEPTH} deep")
