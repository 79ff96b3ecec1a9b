"""Merge data sets in COCO's layout."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from captioning.annotations import read_entries
from captioning.captions import find_marks
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
from captioning.files import missing_file, require_access, require_new_folder
from captioning.image_index import find_in_other_form
from captioning.reports import Report
from captioning.shards import TAR_SUFFIX


def merge_datasets(sources: list[Path], destination: Path) -> None:
    """Write the images and captions of several data sets as one, split by split.

    An image's name begins with the name of its source's folder; its id changes only where an image of another source
    or split has the same. Captions stay as they are. Reports on standard error what is left out, and how many images of
    the val and test splits have the name and content of a training image of another source.

    Raises `InputError` if there are fewer than two sources, if one is given twice or is not in COCO's layout, and where
    `write_dataset` does.
    """
    require_new_folder(destination)
    folders = [Path(os.path.realpath(source)) for source in sources]  # `Path.resolve` raises for a link to itself
    if len(folders) < 2:
        raise InputError("name at least two data sets to merge, and the folder to write.")
    for folder, times in Counter(folders).items():
        if times > 1:
            raise InputError(f"{folder} is named {times} times; name each data set once.")
    for source in sources:
        require_access(source)
        if not os.path.exists(source):
            raise missing_file(source)
        if not os.path.isdir(source):
            raise InputError(f"{source} is a file; name the folder of a data set.")
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
        for path in sorted(folder.glob(f"*{TAR_SUFFIX}")):
            report.add("tar file{s}, as only folders of images are merged", str(path))
        has_info = any(path.name.startswith("image_info") for _, path in files)  # it lists those of captions_test, too
        for split, path in files:
            uncaptioned = Report() if split == "test" and has_info else report
            new = [x for x in _read_images(path, prefix, split, report, uncaptioned) if x.path not in listed]
            listed.update(image.path for image in new)
            images += new
        if not files:
            unknown = "".join(f" (there is {path.name})" for path in find_unknown_files(folder)[:1])
            raise InputError(
                f"{folder} holds no annotations/captions_train<year>.json, nor one of val or test{unknown}; "
                "only data sets in COCO's layout can be merged."
            )
    if not images:
        raise InputError(f"these data sets hold no images with captions{report.clauses()}; nothing was written.")
    _make_ids_unique(images)
    _report_leaks(images, report)
    write_dataset(images, destination)
    report.print()


def _read_images(path: Path, prefix: str, split: str, report: Report, uncaptioned: Report) -> Iterator[SourceImage]:
    """Yield the images of an annotation file, with their captions if it has any; reports what is left out."""
    has_captions = path.name.startswith("captions")
    image_folder = image_folder_of(path)
    images: dict[int, SourceImage] = {}
    names: set[str] = set()
    captions: list[tuple[str, int, list[str] | None]] = []
    kinds = ["images", "annotations"] if has_captions else ["images"]
    for kind, number, (image_id, entry) in read_entries(path, kinds):
        where = f"{path}, {kind}[{number}]"
        if kind == "annotations":
            captions.append((where, image_id, entry))
            continue
        name = posixpath.normpath(entry["file_name"])
        if image_id in images:
            raise InputError(f"{where} has the id {image_id}, which an image before it has.")
        if name in names:
            raise InputError(f"{where} lists {name} again, with another id; give all captions of an image one id.")
        names.add(name)
        size = entry.get("width"), entry.get("height")
        size = size if all(type(side) is int for side in size) else None
        images[image_id] = SourceImage(
            image_folder / name, f"{prefix}/{name}", split, id=image_id, size=size, scene=entry.get("scene")
        )
    for where, image_id, texts in captions:
        if image_id not in images:
            raise InputError(f"{where} is a caption of image {image_id}, which is not in the file's images.")
        if texts is None:
            report.add("rejected caption{s}", where)
            continue
        for _ in range(texts.count("")):
            report.add("empty caption{s}", where)
        for marks in filter(None, map(find_marks, texts)):
            report.add(marks, where, "read")
        images[image_id].captions += filter(None, texts)
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
