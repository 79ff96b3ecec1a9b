"""The lists of a JSON file, entry by entry, in the memory that one entry takes.

COCO's annotation files are one object with long lists; read whole, their objects would take ten times their size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = "0123456789.eE+-"  # what a number may go on with
_DECODE = json.JSONDecoder().raw_decode


class _Text:
    """A file's text from where one has come to, read on as it is asked for."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.at, self.before = file, "", 0, 0

    def read_on(self) -> bool:
        """Read as much again as is held, so that a long value is not begun anew too often; False at the end."""
        more = self.file.read(max(1 << 18, len(self.text) - self.at))
        if more:
            self.text, self.before, self.at = self.text[self.at :] + more, self.before + self.at, 0
        return bool(more)

    def next(self) -> str:
        """The next character that is no space, left where it is; empty at the end."""
        while (at := _SPACE.match(self.text, self.at).end()) == len(self.text):
            self.at = at
            if not self.read_on():
                return ""
        self.at = at
        return self.text[at]

    def take(self, characters: str) -> str:
        """The next character, which has to be one of these."""
        found = self.next()
        if not found or found not in characters:
            raise self.error(f"expecting {' or '.join(characters)}", self.at)
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value, whatever it is."""
        self.next()
        while True:
            try:
                value, end = _DECODE(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self.read_on():
                    raise self.error(error.msg, error.pos) from None
                continue
            if self.text[end : end + 1] not in _NUMBER or not self.read_on():  # no character is in any text
                self.at = end
                return value

    def error(self, message: str, at: int) -> ValueError:
        """What is wrong, and where."""
        return ValueError(f"{message}: character {self.before + at}")


def stream_lists(path: Path, names: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """The entries of the lists of these names in the object that the file holds: name, index, entry.

    Before a list's first entry comes its name with the index -1. Raises `ValueError` for what is not JSON.
    """
    with open(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    with open(path, encoding=encoding, errors="surrogatepass", newline="") as file:
        text = _Text(file)
        if text.next() != "{":
            text.value()
        else:
            text.take("{")
            if text.next() == "}":
                text.take("}")
                more = False
            else:
                more = True
            while more:
                if text.next() != '"':
                    raise text.error('expecting "', text.at)
                name = text.value()
                text.take(":")
                if name in names and text.next() == "[":
                    yield name, -1, None
                    yield from ((name, number, entry) for number, entry in enumerate(_entries(text)))
                else:
                    text.value()
                more = text.take(",}") == ","
        if text.next():
            raise text.error("extra data", text.at)


def _entries(text: _Text) -> Iterator[Any]:
    text.take("[")
    if text.next() == "]":
        text.take("]")
        return
    yield text.value()
    while text.take(",]") == ",":
        yield text.value()
