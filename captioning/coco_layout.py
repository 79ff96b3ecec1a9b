"""COCO's layout of a data set: find its annotation files, and write a data set in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from captioning.errors import InputError, printable
from captioning.files import hash_file, is_within, require_new_folder
from captioning.image_files import describe_failure, open_image
from captioning.json_stream import is_annotation_file
from captioning.shards import Member
from captioning.tables import MAX_LIST, SPLIT_ALIASES

SPLITS = ("train", "val", "test")
COCO_PREFIX = re.compile("^COCO_[a-z]+[0-9]{4}_")
ANNOTATION_FILE = re.compile(r"(captions|image_info)_([a-z]+)[0-9]*\.json")


def find_annotation_files(folder: Path, split: str) -> Iterator[Path]:
    """Yield a split's captions_<split><year>.json and, for "test", its image_info_test<year>.json, if they exist.

    The name of a split is any of `SPLIT_ALIASES`. Raises `InputError` for a folder that holds several years or names of
    the split, or cannot be read.
    """
    for kind in ("captions", "image_info") if split == "test" else ("captions",):
        files = [path for path in _annotation_files(folder) if _kind_and_split(path) == (kind, split)]
        if len(files) > 1:
            one_name = len({path.stem.rstrip("0123456789") for path in files}) == 1
            several = "years" if one_name else f"files of the {split} split"
            names = ", ".join(path.name for path in files)
            raise InputError(f"{folder} holds several {several}: {names}; keep the one to use.")
        yield from files


def has_captions_of(folder: Path, split: str) -> bool:
    """Return whether a data set has an annotation file with the captions of a split."""
    return any(_kind_and_split(path) == ("captions", split) for path in _annotation_files(folder))


def image_folder_of(annotation_file: Path) -> Path:
    """Return the folder of an annotation file's images: images/val2017 for annotations/captions_val2017.json."""
    return annotation_file.parents[1] / "images" / annotation_file.stem.split("_")[-1]


AnyImage = TypeVar("AnyImage", bound=Path | Member)


def find_shared_images(training: Iterable[AnyImage], others: Iterable[AnyImage]) -> Iterator[AnyImage]:
    """Yield the images of `others` that have the name and content of a training image, once for each of those.

    COCO's names of 2014 and 2017 differ in a prefix only, which does not count.
    """
    by_name: dict[str, dict[int, list[AnyImage]]] = {}  # name -> size -> images
    by_content: dict[tuple[str, int], dict[str, list[AnyImage]]] = {}  # name and size -> hash -> images
    for image in others:
        with suppress(OSError):  # a missing file
            by_name.setdefault(_base_name(image), {}).setdefault(_size(image), []).append(image)
    for image in training:
        if sizes := by_name.get(name := _base_name(image)):
            with suppress(OSError, InputError):  # what is no longer there, or no regular file
                if (size := _size(image)) not in sizes:
                    continue
                if (name, size) not in by_content:
                    by_content[name, size] = {}
                    for other in sizes[size]:
                        by_content[name, size].setdefault(_hash(other), []).append(other)
                yield from by_content[name, size].get(_hash(image), ())


def _base_name(image: Path | Member) -> str:
    return COCO_PREFIX.sub("", os.path.basename(image.name))


def _size(image: Path | Member) -> int:
    return image.size if isinstance(image, Member) else image.stat().st_size


def _hash(image: Path | Member) -> str:
    return hashlib.sha256(image.read()).hexdigest() if isinstance(image, Member) else hash_file(image)


def find_unknown_files(folder: Path) -> list[Path]:
    """List the files in a data set's annotations/ that seem to hold captions, but are not named after a split."""
    return [
        path
        for path in _annotation_files(folder)
        if not _kind_and_split(path)
        and (re.search(r"captions?.*\.json$", path.name, re.IGNORECASE) or is_annotation_file(path, MAX_LIST))
    ]


def _annotation_files(folder: Path) -> list[Path]:
    annotations = folder / "annotations"
    try:
        return sorted(annotations.iterdir()) if os.path.isdir(annotations) else []
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}).") from None


def _kind_and_split(path: Path) -> tuple[str, str] | None:
    match = ANNOTATION_FILE.fullmatch(path.name)
    return (match[1], SPLIT_ALIASES[match[2]]) if match and match[2] in SPLIT_ALIASES else None


@dataclass
class SourceImage:
    """An image of a data set to write.

    path: its present path. name: its path below images/<split>/. id: None for any unused one. size: its width and
    height, None to read them from the file. scene: what a drawn image shows, for `scenes.checking.check`.
    """

    path: Path
    name: str
    split: str
    captions: list[str] = field(default_factory=list)
    id: int | None = None
    size: tuple[Any, Any] | None = None
    scene: dict[str, Any] | None = None


def write_dataset(images: list[SourceImage], destination: Path) -> None:
    """Write images/{split}/ and annotations/captions_{split}.json atomically, and print their numbers of entries.

    As in COCO, a test split also gets image_info_test.json, which includes the images without captions.
    Images are hard links where the file system allows it, else copies. Everything is written to a temporary folder
    next to `destination`, which is renamed at the end.

    Raises `InputError` if `destination` is not empty or cannot be written, if an image cannot be read, if two images
    have the same name or id, or if a name is not allowed.
    """
    require_new_folder(destination)
    target = Path(os.path.realpath(destination))  # "." gets a name, and a symbolic link is kept
    images = sorted(images, key=lambda image: SPLITS.index(image.split))
    _check_names(images)
    partial = target.with_name(f".{target.name}.importing")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_into(partial, images, target.name)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"{destination} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sizes = Counter(image.split for image in images)
    captions = sum(len(image.captions) for image in images)
    counts = ", ".join(f"{sizes[split]:,} {split}" for split in SPLITS)
    print(printable(f"{destination}: {counts} images, {captions:,} captions"))


def _check_names(images: list[SourceImage]) -> None:
    by_name: dict[tuple[str, str], Path] = {}
    by_id: dict[int, Path] = {}
    for image in images:
        printable_name = not any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in image.name)
        if not Path(image.name).name or not is_within(image.name) or not printable_name:
            raise InputError(f"{image.path} would be called {image.name!r}, which a data set cannot hold; rename it.")
        if (image.split, image.name) in by_name:
            other = by_name[image.split, image.name]
            raise InputError(f"{other} and {image.path} would both be {image.name} of the {image.split} split.")
        if image.id in by_id:
            other = by_id[image.id]
            raise InputError(f"{other} and {image.path} both have the image id {image.id}; give each its own.")
        by_name[image.split, image.name] = image.path
        if image.id is not None:
            by_id[image.id] = image.path


def _write_into(folder: Path, images: list[SourceImage], description: str) -> None:
    taken = {image.id for image in images}
    free_ids = (number for number in count(1) if number not in taken)
    caption_ids = count(1)
    documents = {split: {"images": [], "annotations": []} for split in SPLITS}
    (folder / "annotations").mkdir(parents=True)
    for image in tqdm(images, desc="images", unit="image", disable=None):
        width, height = image.size or _read_size(image.path)
        _link(image.path, folder / "images" / image.split / image.name)
        image_id = next(free_ids) if image.id is None else image.id
        document = documents[image.split]
        entry = {"id": image_id, "file_name": image.name, "width": width, "height": height}
        document["images"].append(entry if image.scene is None else {**entry, "scene": image.scene})
        for caption in image.captions:
            document["annotations"].append({"id": next(caption_ids), "image_id": image_id, "caption": caption})
    for split, document in documents.items():
        head = {"info": {"description": description}, "licenses": []}
        path = folder / "annotations" / f"captions_{split}.json"
        if document["annotations"]:
            captioned = {annotation["image_id"] for annotation in document["annotations"]}
            rows = [row for row in document["images"] if row["id"] in captioned]
            path.write_text(json.dumps({**head, "images": rows, "annotations": document["annotations"]}))
        if split == "test" and document["images"]:
            path.with_name("image_info_test.json").write_text(json.dumps({**head, "images": document["images"]}))


def _read_size(path: Path) -> tuple[int, int]:
    try:
        with open_image(path) as image:
            return image.size
    except Exception as error:
        reason = describe_failure(error)
        raise InputError(f"{path} cannot be read as an image ({reason}); replace or remove it.") from None


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except FileExistsError:  # a file system that ignores case, and "A.jpg" and "a.jpg"
        raise InputError(f"{source} would take the place of another image, {target.name}; rename it.") from None
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
