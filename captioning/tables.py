"""Read captions from tables (CSV and TSV by `csv_tables`, JSON, JSON Lines) and Flickr's token files, row by row."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

from captioning.captions import (
    clean_caption,
    is_rejected,
    is_structure,
    may_be_captions,
    parse_captions,
    require_text,
    split_lines,
)
from captioning.csv_tables import CAPTION_COLUMNS, FOLDER_COLUMNS, IMAGE_COLUMNS, caption_columns, read_csv
from captioning.errors import InputError
from captioning.files import is_at_most, read_text
from captioning.image_formats import image_suffixes
from captioning.image_index import ImageIndex
from captioning.json_stream import is_annotation_file
from captioning.reports import Report

SPLIT_ALIASES = {  # a split's name in other data sets -> its name here
    **dict.fromkeys(("train", "training", "trn", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
IMAGE_WORDS = "images?|imgs?|photos?|pictures?|pics?|frames?"
SPLIT_END = f"(?:[_ -]?(?:{IMAGE_WORDS}|set|split|data|small|resized?|[0-9]{{4}})|[_ -][0-9]{{3}}(?:x[0-9]{{3}})?)*"
SPLIT_NAME = re.compile(rf"(?:(?:{IMAGE_WORDS})[_ -])?({'|'.join(SPLIT_ALIASES)}){SPLIT_END}", re.IGNORECASE)
SPLIT_FILE = re.compile(  # the stem of a file of a split
    rf"(?:^|[_.\-])({'|'.join(SPLIT_ALIASES)}){SPLIT_END}(?:[_ -]?(?:list|ids?|names?|files?))?$", re.IGNORECASE
)
SPLIT_COLUMNS = ("split", "set", "subset")
SPLIT_MARK = re.compile(  # columns such as is_train, of 0 and 1
    rf"split|^(?:(?:is_)?(?:{'|'.join(SPLIT_ALIASES)})|(?:sub)?set|partition|phase|fold)$"
)
MAX_LIST = 50_000_000  # size limit of a JSON file that may be a list of splits or a table that is not used, in bytes
ENCODING_ADVICE = "save it as UTF-8, or name its encoding with --encoding"


@dataclass
class Row:
    """An image with some of its captions, as a table has them.

    where: the row, as messages name it. captions: one line each, "" for an empty one. split: "" if the table has none.
    folders: cells that may give the image's folder, by column, if its name has none.
    """

    where: str
    image: str
    captions: list[str]
    split: str
    folders: dict[str, str] = field(default_factory=dict)


def read_table(path: Path, encoding: str | None, report: Report) -> Iterator[Row]:
    """Read a table of captions; files other than .json, .jsonl and .ndjson are CSV with a header.

    One column of `IMAGE_COLUMNS` names the image. The captions, text or a list of texts, are in all columns of the
    first kind in `CAPTION_COLUMNS` that the table has (caption, captions, caption_1, caption2); the split is optional.
    A JSON object may also hold the rows in one list, or map the names of images to their captions, or numbers to rows.
    Rows with an "error" in place of a caption, as `caption.py --output` writes them, rejected captions, and texts in
    other columns called like captions are left out and counted in `report`. Raises `InputError` with the file and the
    line where the table cannot be read.
    """
    records = [(where, _lower_names(record, where)) for where, record in _read_records(path, encoding)]
    kinds = caption_columns(list(dict.fromkeys(name for _, record in records for name in record)))
    split_column = _split_column([record for _, record in records])
    if split_column not in SPLIT_COLUMNS:
        report.add("column{s} as the split of its rows", f"{path}, {split_column}", "read")
    for column in _unused_split_columns([record for _, record in records], split_column):
        report.add("column{s} of splits; only one called split is used", f"{path}, {column}", "ignored")
    for where, record in records:
        columns = [column for column in kinds if column in record]
        if all(_is_blank(record[column]) for column in columns) and not _is_blank(record.get("error")):
            report.add("row{s} with an error in place of a caption", where)
        elif is_rejected(record):
            report.add("rejected caption{s}", where)
        elif not all(map(_is_blank, record.values())):
            others = caption_columns(list(record))
            if not columns and any(may_be_captions(record[other]) for other in others):
                raise InputError(
                    f"{where}, has a text in {others[0]!r}, and other rows have their captions in {kinds[0]!r}; use "
                    "one column for all captions."
                )
            for column, value in record.items():
                like_captions = "caption" in column or caption_columns([column])
                is_read = column in columns or column.endswith(("lang", "language"))
                if like_captions and not is_read and may_be_captions(value):
                    report.add(f"text{{s}} in the column {column!r}", where)
            split = _split(record.get(split_column), where)
            image = _image(record, where)
            folders = _folders(record, image)
            has_folder = "/" in image or "\\" in image
            row = Row(where, image, _captions(record, columns, where), split, {} if has_folder else folders)
            if "filepath" in folders:
                report.add("filepath{s}; write folder and name in one column called image", where, "ignored")
            texts = [text for text in row.captions if text]
            if len(texts) > 2 and all(text.isascii() and " " not in text for text in texts):
                report.add("row{s} with captions of one word each; join words that are one caption", where, "read")
            yield row


def find_rows(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """Yield the rows with an image and a caption of a file that may be a table; what cannot be read is left out."""
    with suppress(InputError):
        for where, record in _read_records(path, encoding):
            with suppress(InputError):
                record = _lower_names(record, where)
                row = Row(where, _image(record, where), _captions(record, caption_columns(list(record)), where), "")
                if any(row.captions):
                    yield row


def is_split_list(path: Path, folder: Path, index: ImageIndex) -> bool:
    """Return whether a file under `folder` is, by name or content, a list of the images of splits, without captions."""
    suffix, stem = path.suffix.lower(), path.stem
    if suffix not in (".txt", ".lst", ".list", ".json", ".csv", ".tsv"):
        return False
    certain = stem.lower() in ("split", "splits")
    if suffix in (".json", ".csv", ".tsv"):
        certain |= parse_split(stem) is not None and not any(find_rows(path)) and not is_annotation_file(path, MAX_LIST)
    else:
        certain |= parse_split(stem) is not None or (path.parent == folder and bool(SPLIT_FILE.search(stem)))
    if certain or suffix == ".json":
        return certain or _is_json_of_splits(path)
    return bool(SPLIT_FILE.search(stem) or re.search("split|partition", stem, re.I)) and _lists_images(path, index)


def _is_json_of_splits(path: Path) -> bool:
    """Return whether a JSON file maps splits to their images, as many projects write it."""
    with suppress(InputError):
        return is_at_most(path, MAX_LIST) and _holds_splits(read_json(path, read_text(path)))
    return False


def _lists_images(path: Path, index: ImageIndex) -> bool:
    """Return whether one of the first lines of a text begins with the name of an image, and none has a caption."""
    with suppress(InputError):
        lines = read_text(path).split("\n")[:3]
        if any(len(line.split()) > 2 for line in lines):
            return False
        names = [name for line in lines for name in (line.strip(), *re.split(r"[\s,;]", line.strip(), maxsplit=1)[:1])]
        return any(name in index.by_stem or index.has_name(name) for name in names) and not any(find_rows(path))
    return False


def starts_as_token_file(path: Path, encoding: str | None = None) -> bool:
    """Return whether a file has the format that `read_token_file` reads, by its first line with text."""
    return re.match(r"\s*[^\t\n]+#\d+\t", read_text(path, encoding, ENCODING_ADVICE)) is not None


def read_token_file(path: Path, encoding: str | None = None) -> Iterator[Row]:
    """Read the captions of a file in Flickr's own format, a line `NAME.jpg#0<tab>CAPTION` each."""
    for number, line in enumerate(read_text(path, encoding, ENCODING_ADVICE).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        key, tab, caption = line.partition("\t")
        name, hash_sign, _ = key.rpartition("#")
        if not tab or not hash_sign:
            raise InputError(f"{where}, is not of the form NAME.jpg#0<tab>CAPTION.")
        yield Row(where, name.strip(), [clean_caption(caption, where)], "")


def _read_records(path: Path, encoding: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_text(path, encoding, ENCODING_ADVICE)
    read = _read_json if path.suffix.lower() in (".json", ".jsonl", ".ndjson") else read_csv
    return read(path, text)


def parse_split(name: str) -> str | None:
    """Return the split that a name such as "train", "val2017", "images_test" or "dev_small" means, or None."""
    match = SPLIT_NAME.fullmatch(name.strip())
    return SPLIT_ALIASES[match[1].lower()] if match else None


def read_json(path: Path, text: str) -> Any:
    """Parse the JSON text of a file; an `InputError` names the file and the line that is not JSON."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, is not JSON: {error.msg}.") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deeply nested lists
        raise InputError(f"{path} is not JSON that can be read: {error}.") from None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as `json.loads` does; a name that occurs twice in an object is a `ValueError`, too."""
    return json.loads(text, object_pairs_hook=_as_object)


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Convert the pairs of a JSON object to a dict; raises `ValueError` for a name that occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r:.80} occurs twice in an object")
    return result


# Columns


def _lower_names(record: dict[str, Any], where: str) -> dict[str, Any]:
    lower = {str(name).strip().lower(): value for name, value in record.items()}
    if len(lower) < len(record):
        raise InputError(f"{where}, has two columns whose names differ in case or spaces only; keep one of them.")
    return lower


def _is_blank(value: Any) -> bool:
    """Return whether a cell of any column is null, NaN or blank; see `is_missing` for captions."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _image(record: dict[str, Any], where: str) -> str:
    columns = [column for column in record if re.sub(r"\.\d+$", "", column) in IMAGE_COLUMNS]  # also a repeated one
    names = {column: record[column] for column in columns if not _is_blank(record[column])}
    if not names:
        raise InputError(f"{where}, has no image (a column called {', '.join(IMAGE_COLUMNS[:-1])} or image_path).")
    if not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{where}, must give the image's file name as text, each row in its own object.")
    relative = {column: text for column, text in names.items() if not re.match(r"/|\\|[a-z]+:", text.strip(), re.I)}
    names = relative or names
    name = max(map(str.strip, names.values()), key=len)
    if not all(_is_end(other.strip(), name) for other in names.values()):
        raise InputError(f"{where}, names different images in {' and '.join(names)}; keep one of these columns.")
    if is_structure(name):  # as when a column of images is saved as text
        raise InputError(f"{where}, has an image that is not a file name: {name:.80}; save the images as files.")
    return name


def _folders(record: dict[str, Any], image: str) -> dict[str, str]:
    """Return the cells that may give the image's folder, by column, without those with which its name begins."""
    texts = {column: record[column].strip(" /\\") for column in FOLDER_COLUMNS if isinstance(record.get(column), str)}
    near = os.path.dirname(image)
    return {
        name: text for name, text in texts.items() if text and not os.path.splitext(text)[1] and not _is_end(text, near)
    }


def _is_end(name: str, path: str) -> bool:
    """Return whether a name, whose suffix may be missing, consists of the last parts of a path."""
    name, path = (f"/{text}".replace("\\", "/") for text in (name, path))
    return path.endswith(name) or os.path.splitext(path)[0].endswith(name)


def _captions(record: dict[str, Any], columns: list[str], where: str) -> list[str]:
    if not columns:
        raise InputError(f"{where}, has no caption (a column called {', '.join(CAPTION_COLUMNS[:-1])} or raw).")
    captions: dict[str, list[str]] = {}  # by column
    for column in columns:
        value = record[column]
        if isinstance(value, dict):  # Label Studio's several texts
            value = value.get("text", value)
        texts = value if isinstance(value, list) else parse_captions(value)
        if isinstance(value, str) and texts == [value.strip()]:
            require_text(texts[0], where)  # also one without letters, such as [1, 2]
            texts = split_lines(texts[0]) if column.endswith("s") else texts
        captions[column] = [clean_caption(text, where) for text in texts]
    for column in columns:
        if others := captions.get(f"{column}s"):  # which repeat the caption in most tables that have both columns
            captions[column] = [text for text in captions[column] if text not in others]
    return list(chain.from_iterable(captions.values())) or [""]


def _split_column(records: list[dict[str, Any]]) -> str:
    """Find the column of splits: "split", or the first other of `SPLIT_COLUMNS` that names a split in some row.

    Where a table has none of these, it is the only column of which every row names a split, and not all the same.
    """
    for column in SPLIT_COLUMNS:
        values = [record[column] for record in records if not _is_blank(record.get(column))]
        if values and (column == "split" or any(parse_split(str(value)) for value in values)):
            return column
    names = set(chain.from_iterable(records)).difference(IMAGE_COLUMNS)
    names.difference_update(caption_columns(list(names)))
    records = [record for record in records if not all(map(_is_blank, record.values()))]
    if not names.isdisjoint(SPLIT_COLUMNS):
        return "split"
    columns = [name for name in names if all(parse_split(str(record.get(name))) for record in records)]
    columns = [name for name in columns if len({parse_split(str(record[name])) for record in records}) > 1]
    return columns[0] if len(columns) == 1 else "split"


def _unused_split_columns(records: list[dict[str, Any]], split_column: str) -> list[str]:
    """List the columns, besides the one that is used, that seem to give splits.

    Two of their values name splits or, if they are called like splits, one does or the values differ between rows.
    """
    names = dict.fromkeys(name for record in records for name in record)
    others = {split_column, *IMAGE_COLUMNS, *caption_columns(list(names))}
    records = [record for record in records if not all(map(_is_blank, record.values()))]
    unused = []
    for column in (name for name in names if name not in others):
        texts = {str(value) for record in records if not isinstance(value := record.get(column), list | dict)}
        splits = len(set(filter(None, map(parse_split, texts))))
        like_split = SPLIT_MARK.search(column)
        if splits > 1 or (like_split and (splits or (len(texts) > 1 and "split" not in column))):
            unused.append(column)
    return unused


def _split(value: Any, where: str) -> str:
    if _is_blank(value):
        return ""
    split = parse_split(str(value))
    if split is None:
        raise InputError(
            f"{where}: the split {value!r} is not one of train, val and test; correct it, or rename its column."
        )
    return split


# JSON


def _read_json(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if _is_json_lines(path, text):
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}, is not JSON: {error}.") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}, is not a JSON object.")
            yield f"{path}, line {number}", record
        return
    document = read_json(path, text)
    images = document.get("images") if isinstance(document, dict) else None
    is_coco = isinstance(images, list) and (images == [] or "annotations" in document)
    if is_coco or (_is_list_of_rows(images) and "sentences" in images[0]):
        raise InputError(
            f"{path} is an annotation file of COCO or Karpathy; lay it out as annotations/captions_train.json "
            "next to images/train/, or use `importers.py karpathy`."
        )
    if isinstance(document, dict) and _holds_columns(document):
        raise InputError(f"{path} holds no object for each row; in pandas, write it with orient='records'.")
    if isinstance(document, dict) and not _names_image(document):
        yield from _read_object(path, document)
        return
    for number, record in enumerate(document if isinstance(document, list) else [document], 1):
        if not isinstance(record, dict):
            raise InputError(f"{path}, entry {number}, is not a JSON object with an image and a caption.")
        yield f"{path}, entry {number}", record


def _read_object(path: Path, document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of an object that holds them in lists, or that maps images or numbers to captions or rows."""
    lists = [name for name, value in document.items() if _is_list_of_rows(value)]
    of_images = [name for name in lists if _names_image(document[name][0])]
    keys_are_images = all(Path(name).suffix.lower() in image_suffixes() for name in document)
    filled = [name for name, value in document.items() if value != []]
    if lists and not keys_are_images and (of_images or len(lists) == 1 or len(lists) < len(filled)):
        yield from _read_lists(path, document, of_images or lists)
        return
    for number, (name, value) in enumerate(document.items(), 1):
        rows = value if _is_list_of_rows(value) else [value if isinstance(value, dict) else {"caption": value}]
        for row in rows:  # a row under a number names its image itself
            yield f"{path}, entry {number}", row if _has_image(row) else {**row, "image": name}


def _read_lists(path: Path, document: dict[str, Any], lists: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of the one list, or of several whose rows all name an image and a split (NWPU-Captions).

    Raises `InputError` if other entries may hold further rows or the splits of these.
    """
    first, *others = lists
    rows = [(f"{path}, {name}[{at}]", row) for name in lists for at, row in enumerate(document[name])]
    unread = [name for name in document if name not in lists and parse_split(name) and _is_filled(document[name])]
    if not all(_names_image(row) and _gives_split(row) for _, row in rows):
        unread = [*others, *unread, *(name for name, value in document.items() if _holds_splits(value))]
    if unread:
        raise InputError(
            f"{path} holds rows in {first!r:.80} and {unread[0]!r:.80}; write one list, with a split in each row."
        )
    split = parse_split(first)
    for where, row in rows:
        yield where, {**row, "split": split} if split and not _gives_split(row) else row


def _holds_columns(document: dict[str, Any]) -> bool:
    """Return whether an object holds a list for each column, or the rows apart from the columns' names."""
    lists = {name.lower(): value for name, value in document.items() if isinstance(value, list)}
    if {"columns", "index", "data"} <= lists.keys():
        return True
    names_images = any(
        cells and all(isinstance(cell, str) and _is_image_name(cell) for cell in cells) for cells in lists.values()
    )
    return names_images and bool(caption_columns([key for key, cells in lists.items() if not _is_list_of_rows(cells)]))


def _is_image_name(cell: str) -> bool:
    return Path(cell.partition("?")[0]).suffix.lower() in image_suffixes()  # also of a web address


def _has_image(record: dict[str, Any]) -> bool:
    return any(name.lower() in IMAGE_COLUMNS and not _is_blank(record[name]) for name in record)


def _names_image(record: dict[str, Any]) -> bool:
    return not set(map(str.lower, record)).isdisjoint(IMAGE_COLUMNS)


def _is_list_of_rows(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _gives_split(record: dict[str, Any]) -> bool:
    return any(name.lower() in SPLIT_COLUMNS and parse_split(str(record[name])) for name in record)


def _holds_splits(value: Any) -> bool:
    """Return whether a value is an object that maps names of splits to lists or objects."""
    return isinstance(value, dict) and sum(bool(parse_split(name)) and _is_filled(value[name]) for name in value) > 1


def _is_filled(value: Any) -> bool:
    return isinstance(value, list | dict) and bool(value)


def _is_json_lines(path: Path, text: str) -> bool:
    """Return whether each line is a JSON object: in .jsonl files that are not an array, and in some .json files."""
    if path.suffix.lower() != ".json":
        return not text.lstrip().startswith("[")
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False
