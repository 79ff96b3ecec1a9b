"""Merge data sets in COCO's layout."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioning.annotations import is_rejected, parse_image_id
from captioning.captions import check_caption, is_missing
from captioning.coco_layout import (
    SPLITS,
    SourceImage,
    find_annotation_files,
    find_shared_images,
    find_unknown_files,
    image_folder_of,
    write_dataset,
)
from captioning.errors import InputError
from captioning.files import is_within, read_text, require_new_folder
from captioning.image_index import find_in_other_form
from captioning.reports import Report
from captioning.tables import read_json


def merge_datasets(sources: list[Path], destination: Path) -> None:
    """Write the images and captions of several data sets as one, split by split.

    An image's name begins with the name of its source's folder; its id changes only where an image of another source
    or split has the same. Captions stay as they are. Reports on standard error what is left out, and how many images of
    the val and test splits have the name and content of a training image of another source.

    Raises:
        InputError: There are fewer than two sources, one is given twice or not in COCO's layout, or
            `write_dataset` raises it.
    """
    require_new_folder(destination)
    folders = [Path(os.path.realpath(source)) for source in sources]  # `Path.resolve` raises for a link to itself
    if len(folders) < 2:
        raise InputError("name at least two data sets to merge, and the folder to write.")
    for folder, times in Counter(folders).items():
        if times > 1:
            raise InputError(f"{folder} is named {times} times; name each data set once.")
    report = Report()
    images: list[SourceImage] = []
    listed: set[Path] = set()
    prefixes: set[str] = set()
    for folder in folders:
        names = (f"{folder.name}{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 1 + len(folders)))))
        prefix = next(name for name in names if name not in prefixes)
        prefixes.add(prefix)
        files = [(split, path) for split in SPLITS for path in find_annotation_files(folder, split)]
        for path in find_unknown_files(folder):
            report.add("annotation file{s} not named captions_{train,val,test}<year>.json", str(path))
        has_info = any(path.name.startswith("image_info") for _, path in files)  # it lists those of captions_test, too
        for split, path in files:
            uncaptioned = Report() if split == "test" and has_info else report
            new = [x for x in _read_images(path, prefix, split, report, uncaptioned) if x.path not in listed]
            listed.update(image.path for image in new)
            images += new
        if not files:
            raise InputError(
                f"{folder} holds no annotations/captions_train<year>.json, nor one of val or test; "
                "only data sets in COCO's layout can be merged."
            )
    _make_ids_unique(images)
    _report_leaks(images, report)
    write_dataset(images, destination)
    report.print()


def _read_images(path: Path, prefix: str, split: str, report: Report, uncaptioned: Report) -> Iterator[SourceImage]:
    """Yield the images of an annotation file, with their captions if it has any; reports what is left out."""
    document = read_json(path, read_text(path))
    has_captions = path.name.startswith("captions")
    image_folder = image_folder_of(path)
    images: dict[int, SourceImage] = {}
    names: set[str] = set()
    for where, entry in _entries(path, document, "images"):
        image_id, name = _parse_id(entry.get("id"), where), entry.get("file_name")
        if not isinstance(name, str) or not is_within(name) or "\0" in name:
            raise InputError(f"{where} has no file_name within the image folder: {name!r:.80}.")
        if image_id in images:
            raise InputError(f"{where} has the id {image_id}, which an image before it has.")
        size = entry.get("width"), entry.get("height")
        size = size if all(type(side) is int for side in size) else None
        name = posixpath.normpath(name)
        if name in names:
            raise InputError(f"{where} lists {name} again, with another id; give all captions of an image one id.")
        names.add(name)
        images[image_id] = SourceImage(
            image_folder / name, f"{prefix}/{name}", split, id=image_id, size=size, scene=entry.get("scene")
        )
    for where, entry in _entries(path, document, "annotations") if has_captions else ():
        image_id, caption = _parse_id(entry.get("image_id"), where), entry.get("caption")
        captions: list[Any] = caption or [None] if isinstance(caption, list) else [caption]
        texts = [text for text in captions if not is_missing(text)]
        if image_id not in images or "caption" not in entry or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where} has no caption, or is of image {image_id}, which is not in the file's images.")
        for text in texts:
            check_caption(text, where)
        if is_rejected(entry):
            report.add("rejected caption{s}", where)
            continue
        for _ in range(len(captions) - len(texts)):
            report.add("empty caption{s}", where)
        images[image_id].captions += texts
    missing = {
        image.name.removeprefix(f"{prefix}/"): image for image in images.values() if not os.path.isfile(image.path)
    }
    for name, actual in find_in_other_form(image_folder, missing).items():
        missing[name].path = image_folder / actual
    for image in images.values():
        if has_captions and not image.captions:
            uncaptioned.add("image{s} without a caption", str(image.path))
        elif not os.path.isfile(image.path):
            raise InputError(f"{image.path} is missing, but {path} names it.")
        else:
            yield image


def _entries(path: Path, document: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = document.get(key) if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise InputError(f'{path} is not a COCO annotation file: it has no list of "{key}".')
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{path}, {key}[{number}] is not an object.")
        yield f"{path}, {key}[{number}]", entry


def _parse_id(value: Any, where: str) -> int:
    try:
        return parse_image_id(value)
    except InputError as error:
        raise InputError(f"{where} {error}.") from None


def _make_ids_unique(images: list[SourceImage]) -> None:
    """Remove ids that an earlier image has, for which `write_dataset` chooses unused ones."""
    used: set[int | None] = set()
    for image in images:
        if image.id in used:
            image.id = None
        used.add(image.id)


def _report_leaks(images: list[SourceImage], report: Report) -> None:
    """Count images of val and test that have the name and content of a training image of another source."""

    def is_of(image: SourceImage, source: str) -> bool:
        return image.name.partition("/")[0] == source

    for source in dict.fromkeys(image.name.partition("/")[0] for image in images):
        training = [image.path for image in images if image.split == "train" and not is_of(image, source)]
        tested = [image.path for image in images if image.split != "train" and is_of(image, source)]
        for path in dict.fromkeys(find_shared_images(training, tested)):
            report.add("image{s} of val or test that another source seems to train on", str(path), "found")
