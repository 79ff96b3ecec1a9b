"""Read a table of captions in CSV or TSV, with a header that names its columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from captioning.errors import InputError
from captioning.image_formats import image_suffixes

IMAGE_COLUMNS = ("photo", "image", "file_name", "filename", "image_name", "image_path")
CLASS_COLUMNS = ("class", "class_name", "category")
FOLDER_COLUMNS = (  # which may give the image's folder
    "filepath",
    "folder",
    "folder_name",
    "subfolder",
    "dir",
    "directory",
    *CLASS_COLUMNS,
)
CAPTION_COLUMNS = ("caption", "text", "sentence", "description", "comment", "raw")  # of several, the first is used
DELIMITERS = ",|;\t"
UNCLOSED_CELL = re.compile(r'\s*"[^"]*(?:"[^"]*"[^"]*)*')  # it starts with one of an odd number of quotation marks
CLOSE = "close every cell in its own row, with spaces for the line breaks of a caption"
UNCLOSED = f"has too few columns, or a quotation mark that is not closed in the line; {CLOSE}"

csv.field_size_limit(1 << 30)  # in characters; `clean_caption` limits the length of captions


def caption_columns(columns: list[str]) -> list[str]:
    """List all columns of the first kind of caption column that there is: caption, captions, caption_1, caption2."""
    for kind in CAPTION_COLUMNS:
        matching = [name for name in columns if re.fullmatch(rf"{kind}s?[ _.-]?\d*", name)]
        if matching:
            return matching
    return []


def read_csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a table's text: each one's place, and its cells by column.

    Raises `InputError` with the file and the line where it cannot be read.
    """
    lines = text.split("\n")
    start = next((at for at, line in enumerate(lines) if line.strip() and not re.fullmatch("sep=.", line)), 0)
    delimiter, columns = _read_header(path, start + 1, lines[start])
    image = next(index for index, name in enumerate(columns) if name in IMAGE_COLUMNS)
    captions = [columns.index(name) for name in caption_columns(columns)]
    caption, after_captions = min(captions), max(captions) + 1
    last_needed = max(image, caption)
    nameless = [at for at in range(caption, len(columns)) if re.fullmatch(r"(unnamed: \d+)?(\.\d+)?", columns[at])]
    rows = list(_read_cells(path, lines, start + 1, delimiter, columns))
    trailing = max(0, min((len(cells) for _, cells in rows if any(cells)), default=0) - len(columns))
    for number, cells in rows:
        where = f"{path}, line {number}"
        # A caption that contains the separator displaces the cells after it, of which the last may be blank.
        additional = len(cells) - len(columns) - trailing
        shifted = image < caption and additional > 0 and any(cells[caption + 1 : after_captions + additional])
        if shifted or any(cells[len(columns) :]) or any(cells[at] for at in nameless if at < len(cells)):
            raise InputError(
                f"{where}, has more columns than the header's {len(columns) - len(nameless)}; put a caption that "
                "contains the separator in double quotes, remove a separator at the line's end, or name the column in "
                "the header."
            )
        # One row of the Flickr30k CSV in circulation lacks the separator between its last two columns.
        glued = re.fullmatch(r"(\d+)\s+(.+)", cells[-1]) if columns[-2:] == ["comment_number", "comment"] else None
        if glued and len(cells) == len(columns) - 1:
            cells = [*cells[:-1], *glued.groups()]
        if any(cells) and len(cells) <= last_needed:
            raise InputError(
                f"{where}, has {len(cells)} of the header's {len(columns)} columns; write the others, too, in one line."
            )
        suffix = Path(cells[image]).suffix.lower() if len(cells) > image else ""
        if any(_holds_rows(cell, delimiter, suffix in image_suffixes()) for cell in cells):
            raise InputError(
                f"{where}, opens a quotation mark and closes it lines later, with what may be other rows between; "
                f"write a quotation mark within a quoted cell twice, and {CLOSE}."
            )
        yield where, dict(zip(columns, cells, strict=False))


def _read_header(path: Path, number: int, line: str) -> tuple[str, list[str]]:
    """Return the delimiter and the names of the columns; repeated names get a number."""
    delimiters = "\t" if path.suffix.lower() == ".tsv" else DELIMITERS
    for delimiter in delimiters:
        columns: dict[str, None] = {}
        for name in _split_line(line, delimiter):
            name = _unquote(name.strip(), f"{path}, line {number}").strip().lower()
            columns[f"{name}.{len(columns)}" if name in columns else name] = None
        if columns.keys() & IMAGE_COLUMNS and caption_columns(list(columns)):
            return delimiter, list(columns)
    raise InputError(
        f"{path}, line {number}, should name a column for the image ({', '.join(IMAGE_COLUMNS)}) and one for the "
        f"caption ({', '.join(CAPTION_COLUMNS)}), but reads {line[:80]!r}; put such a header first."
    )


def _read_cells(
    path: Path, lines: list[str], start: int, delimiter: str, columns: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """Yield every row after the header: the number of its first line, and its cells without surrounding space."""
    tabs, mark = len(columns) - 1, re.escape(delimiter)
    quoted_separator = re.compile(rf'(?:^|{mark})\s*"(?:[^"]|"")*{mark}(?:[^"]|"")*"\s*(?:{mark}|$)')
    # If no quoted cell spans lines, every row is a line, and an unclosed quotation mark in a whole row is only text.
    if delimiter == "|" or (delimiter == "\t" and all(line.count("\t") == tabs for line in lines[start:] if line)):
        for number, line in enumerate(lines[start:], start + 1):
            if line.strip():
                cells = line.split(delimiter)
                if len(cells) != len(columns) or quoted_separator.search(line):
                    has_unclosed = any(map(UNCLOSED_CELL.fullmatch, cells))
                    cells = _split_line(line, delimiter)
                    if len(cells) < len(columns) and has_unclosed:
                        raise InputError(f"{path}, line {number}, {UNCLOSED}.")
                yield number, [_unquote(cell.strip(), f"{path}, line {number}") for cell in cells]
        return
    rows = (line + "\n" for line in lines[start:])
    reader = csv.reader(rows, delimiter=delimiter, strict=True, skipinitialspace=True)
    number = start + 1
    try:
        for cells in reader:
            if cells:
                yield number, [cell.strip() for cell in cells]
            number = start + reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, line {number}, is not CSV: {error}; write a quotation mark within a quoted cell twice, and "
            "no space after a closing one."
        ) from None


def _split_line(line: str, delimiter: str) -> list[str]:
    """Split a line into cells, in which quotation marks may enclose the separator."""
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])


def _unquote(cell: str, where: str) -> str:
    """Remove the quotation marks around a cell, in which those of the text are doubled.

    Raises `InputError`, which names the cell by `where`, for marks that are escaped by backslashes.
    """
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    if not quoted and re.fullmatch(r'".*\\".*"', cell):
        raise InputError(f"{where}, escapes quotation marks by backslashes; write each one twice instead.")
    return quoted[1].replace('""', '"') if quoted else cell


def _holds_rows(cell: str, delimiter: str, has_suffixes: bool) -> bool:
    """Return whether a cell of several lines looks like rows that an unbalanced quotation mark has joined.

    If the table's images have suffixes (`has_suffixes`), only a line that names an image is a row.
    """
    lines = [line.split(delimiter) for line in cell.split("\n") if delimiter in line] if "\n" in cell else []
    if not has_suffixes:
        return bool(lines)
    return any(Path(part.strip(' "').lower()).suffix in image_suffixes() for parts in lines for part in parts)
