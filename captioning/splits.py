"""Assign imported images to splits: by split files, folder names, or a hash of the name."""

from __future__ import annotations

import csv
import hashlib
import os
import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path

from captioning.coco_layout import SourceImage
from captioning.csv_tables import IMAGE_COLUMNS
from captioning.errors import InputError
from captioning.files import read_text
from captioning.image_index import ImageIndex
from captioning.reports import Report
from captioning.tables import ENCODING_ADVICE, SPLIT_ALIASES, SPLIT_FILE, is_split_list, parse_split

HELD_OUT = 0.05  # share of the images in each of val and test
SPLIT_WORD = re.compile(rf"(?:(?<![a-z])|(?<=\dk))(?:{'|'.join(SPLIT_ALIASES)})(?![a-z])", re.IGNORECASE)


def _position(name: str) -> float:
    """Return a pseudo-random number from 0 to 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def assign_splits(images: list[SourceImage], source: Path, report: Report) -> None:
    """Assign splits by a hash of the name to images without any: about 90% train, 5% val, 5% test, at least one each.

    If the images have splits but none of them is "val", about 5% of the training images are moved to "val". An image
    keeps its split when others are added, unless it was the only one of val or test.
    """
    without = [image for image in images if not image.split]
    if without and len(without) < len(images):
        raise InputError(f"{source} gives some images a split and others none; give a split to all of them or to none.")
    if without and len(images) < 3:
        raise InputError(
            f"{source} has too few captioned images to split ({len(images)}); at least three are needed"
            f"{report.clauses()}."
        )
    if not without and any(image.split == "val" for image in images):
        return
    by_name = {image.name: image for image in images if image.split in ("", "train")}
    order = sorted(by_name, key=_position)
    val = max(1, sum(_position(name) < HELD_OUT for name in order))
    test = max(1, sum(HELD_OUT <= _position(name) < 2 * HELD_OUT for name in order))
    if val + test >= len(order):
        val = test = 1
    if without:
        for i, name in enumerate(order):
            by_name[name].split = "val" if i < val else "test" if i < val + test else "train"
    elif len(order) > 1:
        for name in order[:val]:
            by_name[name].split = "val"
            report.add("image{s} of train to val, since there was no validation split", name, "moved")


def report_split_name(source: Path, report: Report) -> None:
    """Report a source of images without splits whose own name, or that of its table's folder, contains a split's."""
    source = Path(os.path.abspath(source))
    for path in (source,) if source.is_dir() else (source, source.parent):
        if SPLIT_WORD.search(path.stem):
            report.add("name{s}, as nothing else gives splits; its images are divided", str(path), "took no split from")


def set_split(splits: dict[str, tuple[str, str]], name: str, where: str, split: str) -> None:
    """Record an image's split and the line that gives it; raises `InputError` if an earlier line gives another."""
    if splits.setdefault(name, (where, split))[1] != split:
        raise InputError(f"{where}: {name} is in the {splits[name][1]} split already.")


def split_of_file(path: Path) -> str:
    """Return the split after which captions_val2017.json, train_captions.csv or train_list.txt is named, or ""."""
    match = SPLIT_FILE.search(re.sub("[_ -](captions?|annotations?)$", "", path.stem, flags=re.IGNORECASE))
    return SPLIT_ALIASES[match[1].lower()] if match else ""


def report_split_lists(
    files: Iterable[Path],
    folder: Path,
    index: ImageIndex,
    report: Report,
    advice: str = "a table gives splits in a column called split",
) -> set[Path]:
    """Report the lists of splits among the files of `folder`, which are not read; returns them."""
    lists = {path for path in files if is_split_list(path, folder, index)}
    for path in sorted(lists):
        report.add(f"list{{s}} of a split; {advice}", str(path))
    return lists


def read_split_files(
    paths: list[Path],
    captions: dict[str, list[str]],
    table: Path,
    encoding: str | None,
    splits: dict[str, tuple[str, str]],
) -> None:
    """Add the splits in the split files to `splits`; all names are in Unicode's composed form.

    A .csv file has the names in its first column, or in the one that its first line calls one of `IMAGE_COLUMNS`.
    """
    for path in paths:
        split, column = split_of_file(path), 0
        try:
            text = read_text(path)
        except InputError:  # as of names in the encoding of the captions
            text = read_text(path, encoding, ENCODING_ADVICE)
        for number, line in enumerate(text.split("\n"), 1):
            name, where = unicodedata.normalize("NFC", line.strip()), f"{path}, line {number}"
            if path.suffix.lower() == ".csv":
                cells = [cell.strip() for cell in next(csv.reader([name]), [])]
                if number == 1:
                    column = next((at for at, cell in enumerate(cells) if cell.lower() in IMAGE_COLUMNS), 0)
                name = cells[column] if len(cells) > column else ""
            if name not in captions and f"{name}.jpg" in captions:  # Flickr30k's files omit the suffix
                name += ".jpg"
            if not name or (name.lower() in IMAGE_COLUMNS and number == 1):
                continue
            if name not in captions:
                raise InputError(
                    f"{where}: {name} has no caption in {table}; correct the name, remove the line, or "
                    f"move {path.name} away if it is no list of images."
                )
            set_split(splits, name, where, split)


def splits_by_folder(names: Collection[str], report: Report) -> dict[str, str]:
    """Return the images' splits by a level of folders that are all named after splits, or an empty dict.

    It is the outermost one with several splits, such as that of train/train/ and train/val/, else the outermost one.
    Images are reported if only a part of them is in such folders, or if the names of their folders contain a split's.
    """
    folders = {name: [parse_split(parent) or "" for parent in name.split("/")[:-1]] for name in names}
    depth = min(map(len, folders.values()), default=0)
    levels = [{name: parents[level] for name, parents in folders.items()} for level in range(depth)]
    if of_splits := [level for level in levels if all(level.values())]:
        return next((level for level in of_splits if len(set(level.values())) > 1), of_splits[0])
    for name, parents in folders.items():
        if any(parents):
            report.add("image{s}, since other images are in no such folder", name, "ignored the split in the folder of")
        elif SPLIT_WORD.search(posixpath.dirname(name)):
            report.add("image{s}, whose folder's name is not just train, val or test", name, "took no split from")
    return {}
