"""What a command says on standard error about entries that it treats in one way: how many, and the first."""

from __future__ import annotations

import sys

from captioning.errors import printable


class Report:
    """Counts entries by kind and remembers the first of each."""

    def __init__(self):
        self.entries: dict[tuple[str, str], list] = {}

    def add(self, kind: str, entry: str, verb: str = "left out") -> None:
        """Count an entry; `kind` is a noun with "{s}" where its plural has an s."""
        self.entries.setdefault((verb, kind), [0, entry])[0] += 1

    def print(self) -> None:
        """One line a kind, such as "left out 3 empty captions, the first is captions.csv, line 5"."""
        for (verb, kind), (number, first) in self.entries.items():
            line = f"{verb} {number:,} {kind.format(s='' if number == 1 else 's')}"
            print(printable(f"{line}{': ' if number == 1 else ', the first is '}{first}"), file=sys.stderr)
