"""Find and read the captions of a folder of images: those of its tables, or of the files next to its images."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from captioning.csv_tables import CLASS_COLUMNS, IMAGE_COLUMNS, caption_columns
from captioning.errors import InputError, quoted
from captioning.files import is_at_most, read_text
from captioning.image_index import ImageIndex, walk_files
from captioning.json_stream import is_annotation_file
from captioning.reports import Report
from captioning.sidecars import CAPTION_SUFFIXES, find_sidecars, has_captions, read_folder
from captioning.splits import report_split_lists, split_of_file
from captioning.tables import ENCODING_ADVICE, MAX_LIST, Row, find_rows, parse_split, read_json, read_table

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
METADATA = ("metadata.csv", "metadata.jsonl")  # Hugging Face's names
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".feather")


@dataclass
class _Tables:
    """What may be a table of captions in a folder."""

    certain: list[Path]
    small: list[Path]  # of few images: a table beside others, else more likely remarks, or a file of one image
    empty: list[Path]  # without a row with an image and a caption
    json_files: list[Path]


def read_captions_of_folder(
    folder: Path, index: ImageIndex, encoding: str | None, report: Report
) -> tuple[list[Row], str]:
    """Read the captions of a folder's tables, else of the files next to its images.

    A .json file is a table if it names half of the images, with their suffixes, or if nothing else holds captions. A
    table of fewer than half of the images counts only if files next to images hold captions of even fewer. Also
    returns what an image without captions lacks: a "row" or a "caption in a .txt, .caption or .json file".
    """
    files = list(walk_files(folder))
    sidecars = find_sidecars(folder, files, index)
    here = [path for path in files if path.parent == folder and path not in sidecars]
    found = _find_tables(files, here, sidecars, index, encoding)
    tables = found.certain + found.small if found.certain else []
    rows = [] if tables else read_folder(folder, files, sidecars, index, encoding, report)
    if not tables and not any(row.captions[0] for row in rows):  # as in files of labels
        tables = found.small
        if not tables:
            tables, found.empty = found.empty or found.json_files, []
    read = {*sidecars, *tables, *found.certain, *found.small, *found.empty}
    unread = [path for path in files if path not in read]
    split_lists = report_split_lists(unread, folder, index, report)
    if not rows and not tables:
        advice = next(filter(None, (_advice(path, folder, index, encoding) for path in files)), "")
        raise InputError(
            f"{folder} holds no table of captions ({', '.join(TABLE_SUFFIXES)}, .json), and no .txt or .caption file "
            f'named after an image, nor a .json file with "caption" or "captions"{report.clauses()}{advice}.'
        )
    for path in unread:
        if path.suffix.lower() in (*TABLE_SUFFIXES, ".json", ".txt") and path not in split_lists:
            _report_unread(path, folder, index, encoding, report)
        elif path.suffix.lower() in SPREADSHEETS:
            report.add("spreadsheet{s}; save as CSV what holds captions", str(path))
    for path in found.empty:
        report.add("table{s} in which no row with an image and a caption can be read", str(path))
    if not tables:
        for path in found.small:
            report.add("table{s} of few images, as files next to the images hold captions", str(path))
        return rows, "caption in a .txt, .caption or .json file"
    tables = _choose_tables(folder, tables, report)
    for path in sorted(sidecars):
        report.add(f"{path.suffix.lower()} file{{s}} next to an image, as a table holds the captions", str(path))
    return read_tables(tables, folder, encoding, report), "row"


def _report_unread(path: Path, folder: Path, index: ImageIndex, encoding: str | None, report: Report) -> None:
    """Report a file that seems to be a table of captions of these images, or to be meant as one."""
    if not is_at_most(path, MAX_LIST):
        if path.parent == folder:
            report.add("file{s} too large to look into beside other captions", str(path))
        return
    if is_annotation_file(path, MAX_LIST):
        report.add("COCO annotation file{s} beside other captions", str(path))
        return
    if path.parent != folder:
        if _named_images(path, index, encoding):
            report.add(f"table{{s}} in a subfolder, where only {' and '.join(METADATA)} are read", str(path))
        return
    for row in find_rows(path, encoding):
        is_sentence = any(" " in caption for caption in row.captions)  # and no class
        if is_sentence and (row.image in index.by_stem or Path(row.image).stem in index.by_stem):
            report.add("table{s} beside other captions; name it if it holds the captions", str(path))
            return
    with suppress(InputError):
        text = read_text(path, encoding, ENCODING_ADVICE)
        if path.suffix.lower() == ".json" and any(
            index.has_name(name[1]) for name in re.finditer(r'"([^"\n]+)"', text)
        ):
            try:
                read_json(path, text)
            except InputError as error:
                report.add("table{s} that cannot be read", str(error).removesuffix("."))


def _find_tables(
    files: list[Path], here: list[Path], sidecars: Collection[Path], index: ImageIndex, encoding: str | None
) -> _Tables:
    """Sort the tables among the `files` of a folder; only metadata files may be in its subfolders, not `here`."""
    tables = [path for path in files if path.name.lower() in METADATA]
    tables += [path for path in here if path.suffix.lower() in TABLE_SUFFIXES and path not in tables]
    json_files = [path for path in here if path.suffix.lower() == ".json"]
    empty = []
    if len(tables) > 1 or sidecars or json_files:  # else the only one is read, and an error says what it lacks
        for path in tables:
            read_text(path, encoding, ENCODING_ADVICE)  # one that cannot be decoded is not empty
        empty = [path for path in tables if not any(find_rows(path, encoding))]
        empty = [path for path in empty if not (split_of_file(path) and _is_faulty(path, encoding))]
        if all(split_of_file(path) for path in tables if path not in empty):  # each split needs its table
            empty = [path for path in empty if not split_of_file(path) or _is_test_without_captions(path, encoding)]
    certain = [path for path in tables if path not in empty]
    groups = _groups(certain) if sidecars else []
    few = [path for group in groups if _have_few_rows(group, sidecars, index, encoding) for path in group]
    certain = [path for path in certain if path not in few]
    looked_into = [path for path in json_files if not certain or is_at_most(path, MAX_LIST)]
    named = {path: _named_images(path, index, encoding) for path in looked_into}
    if not certain:
        for group in _groups([path for path, n in named.items() if n]):
            is_most = sum(named[path] for path in group) >= len(index.paths) / 2
            if is_most or (split_of_file(group[0]) and not _have_few_rows(group, sidecars, index, encoding)):
                certain += group
    small = few + [path for path, n in named.items() if n and path not in certain]
    return _Tables(certain, small, empty, json_files)


def _groups(tables: list[Path]) -> list[list[Path]]:
    """Group tables into metadata files, those of splits, and each other one; the first two hold parts of a set."""
    metadata = [path for path in tables if path.name.lower() in METADATA]
    of_splits = [path for path in tables if path not in metadata and split_of_file(path)]
    groups = [metadata, of_splits, *([path] for path in tables if path not in metadata and path not in of_splits)]
    return [group for group in groups if group]


def _have_few_rows(tables: list[Path], sidecars: Collection[Path], index: ImageIndex, encoding: str | None) -> bool:
    """Return whether tables, such as one of remarks, have captions of few images, and files next to them of more."""
    images = len({(path.parent, row.image) for path in tables for row in find_rows(path, encoding)})
    if images >= len(index.paths) / 2 or any(_is_faulty(path, encoding) for path in tables):
        return False
    captions = (file for file in sidecars if has_captions(file, encoding) and b" " in file.read_bytes().strip())
    return images < len({file.with_suffix("") for file in captions})


def _is_faulty(path: Path, encoding: str | None) -> bool:
    """Return whether a table has a column of captions but cannot be read."""
    if not caption_columns(_first_words(path, encoding)):
        return False
    try:
        list(read_table(path, encoding, Report()))
    except InputError:
        return True
    return False


def _is_test_without_captions(path: Path, encoding: str | None) -> bool:
    """Return whether a table of a test split has a column of images and none of captions, as challenges publish it."""
    words = _first_words(path, encoding)
    return split_of_file(path) == "test" and not set(words).isdisjoint(IMAGE_COLUMNS) and not caption_columns(words)


def _first_words(path: Path, encoding: str | None) -> list[str]:
    """Return what may be names of columns in a table's first line."""
    return re.split(r'[,|;\t:{}"]+\s*', read_text(path, encoding, ENCODING_ADVICE).lstrip().split("\n", 1)[0].lower())


def _named_images(path: Path, index: ImageIndex, encoding: str | None) -> int:
    """Count the images of which a table has captions."""
    return len({row.image for row in find_rows(path, encoding) if index.has_name(row.image)})


def _advice(path: Path, folder: Path, index: ImageIndex, encoding: str | None) -> str:
    """Return what to do with a file where nothing else holds captions; "" if it holds none either."""
    suffix = path.suffix.lower()
    if suffix in SPREADSHEETS and (path.parent == folder or path.stem == "metadata"):
        return f"; save {path} as CSV"
    is_coco = path.parent == folder / "annotations" and path.name.startswith("captions_") and suffix == ".json"
    if is_coco and parse_split(path.stem.removeprefix("captions_")) and (folder / "images").is_dir():
        return f"; {path} is in COCO's layout, which `python train.py --data {quoted(folder)}` takes as it is"
    if path.parent == folder / "annotations" and is_annotation_file(path, MAX_LIST):
        return f"; call {path} annotations/captions_{{train,val,test}}.json, next to images/{{train,val,test}}"
    images = index.by_stem.get(path.stem) or index.by_name.get(path.stem)
    if suffix in CAPTION_SUFFIXES and not images:
        beginnings = (path.stem[: match.start()] for match in re.finditer(r"[ _.-]", path.stem))
        if stem := next((stem for stem in beginnings if stem in index.by_stem), ""):
            return f"; rename {path} to {stem}{suffix} if it holds the captions of that image"
    rows = list(find_rows(path, encoding)) if suffix in (*TABLE_SUFFIXES, ".txt", ".json") else []
    if any(index.has_name(row.image) or not (suffix == ".json" and images) for row in rows):
        parent = os.path.relpath(path.parent, index.folder)
        is_beside_images = index.holds_any(os.path.join(parent, row.image) for row in rows)
        if is_beside_images and parse_split(path.parent.name) and f"metadata{suffix}" in METADATA:
            return f"; call {path} and the tables of the other splits metadata{suffix}, each in the folder of its split"
        return f"; name {path} itself if it holds the captions"
    if suffix in CAPTION_SUFFIXES and images and has_captions(path, encoding):
        captions, near = path.parent, (index.folder / min(images)).parent
        if captions == near:
            return f"; name {captions} without --images if its files hold the captions"
        while captions.name == near.name != "":  # as in captions/train and images/train
            captions, near = captions.parent, near.parent
        hold_all = captions.parent == near.parent and all(
            (index.folder / key).is_relative_to(near) for key in index.paths
        )
        if captions.parent != folder and not hold_all:  # it is one of several folders
            return f"; put files of captions such as {path} next to their images"
        return f"; for captions such as {path}, name {captions} with --images {near}"
    return ""


def _choose_tables(folder: Path, tables: list[Path], report: Report) -> list[Path]:
    """Choose Hugging Face's metadata files, at most one per folder, or the tables of the splits, or the only table."""
    metadata = [path for path in tables if path.name.lower() in METADATA]
    others = [path for path in tables if path not in metadata]
    if any(path.parent == folder for path in metadata):
        for path in others:
            report.add("table{s} next to a metadata file, which holds the captions", str(path))
        others = []
    splits = {split_of_file(path) for path in others}
    if not metadata and "" not in splits and len(splits) == len(others):
        return others
    if metadata and others:
        raise _two_tables(metadata[0], others[0])
    by_folder: dict[Path, Path] = {}
    for path in metadata or others:
        if by_folder.setdefault(path.parent, path) is not path:
            raise _two_tables(by_folder[path.parent], path)
    return metadata or others


def _two_tables(one: Path, other: Path) -> InputError:
    return InputError(f"{one} and {other} may both hold the captions; name the one that does.")


def read_tables(tables: list[Path], folder: Path, encoding: str | None, report: Report) -> list[Row]:
    """Read the rows of all tables, with the images' paths relative to `folder`.

    The rows of a table without splits are of the split that its name gives, if it gives one.
    """
    rows = []
    for table in tables:
        parent, split = table.parent.relative_to(folder).as_posix(), split_of_file(table)
        added = list(read_table(table, encoding, report))
        if split and added and not any(row.split for row in added):
            report.add(f"table{{s}} as the {split} split, after its name", str(table), "read")
            for row in added:
                row.split = split
        for row in added:
            name = row.image.replace("\\", "/")
            if name.startswith("../") and os.path.isfile(beside := os.path.abspath(table.parent / name)):
                row.image = beside  # `ImageIndex` finds it by its absolute path
            elif parent != ".":
                row.image = os.path.join(parent, row.image)
        rows += added
    return rows


def require_one_folder(rows: list[Row], index: ImageIndex) -> None:
    """Raise `InputError` if a column gives several folders for an image whose name has none.

    A column of classes does so only where a part of one is the name of a folder with images, and not of a split.
    """
    with_images = {part for key in index.paths for part in key.split("/")[:-1] if not parse_split(part)}
    seen: dict[tuple[str, str], str] = {}  # image and column -> the image's folder
    for row in rows:
        for column, folder in row.folders.items():
            other = seen.setdefault((row.image, column), folder)
            are_folders = column not in CLASS_COLUMNS or not with_images.isdisjoint(f"{other}/{folder}".split("/"))
            if other != folder and are_folders:
                raise InputError(
                    f"{row.where}: {row.image} has the {column} {other:.80} and the {column} {folder:.80}; write "
                    f"folder and name in one column called image, or rename the column {column} if it holds no folder."
                )
