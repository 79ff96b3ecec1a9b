"""Count the entries that an import or a data set leaves out."""

from __future__ import annotations

from captioning.errors import log


class Report:
    """Counts entries by kind and keeps the first of each."""

    def __init__(self):
        self.entries: dict[tuple[str, str], list] = {}

    def add(self, kind: str, entry: str, verb: str = "left out") -> None:
        """Count an entry; `kind` is a noun with "{s}" where its plural has an s."""
        self.entries.setdefault((verb, kind), [0, entry])[0] += 1

    def lines(self) -> list[str]:
        """Return one line for each kind, such as "left out 3 empty captions, the first is captions.csv, line 5"."""
        lines = []
        for (verb, kind), (count, first) in self.entries.items():
            plural, which = ("", ":") if count == 1 else ("s", ", the first is")
            lines.append(f"{verb} {count:,} {kind.replace('{s}', plural)}{which} {first}")
        return lines

    def clauses(self) -> str:
        """Return the lines as clauses to append to a sentence, each after a semicolon."""
        return "".join(f"; {line}" for line in self.lines())

    def print(self) -> None:
        """Print the lines on stderr."""
        for line in self.lines():
            log(line)
