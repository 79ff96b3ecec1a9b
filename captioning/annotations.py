"""COCO annotation files as flat arrays, cached."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captioning.errors import InputError
from captioning.files import CACHE, hash_file
from captioning.json_stream import stream_lists
from captioning.shards import INDEX, Member
from vocabulary import tokenize


def parse_image_id(value: object) -> int:
    """Convert an image id from a JSON file to an integer: 7, 7.0 and "007" are all 7.

    Raises `InputError` for anything else, with a sentence fragment ("has ...") that follows the name of an entry.
    """
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53  # beyond, a float is not exact
    if whole or (isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", value)):
        value = int(value)
    if type(value) is not int:
        raise InputError(f"has an image id that is not a whole number: {value!r:.80}")
    if abs(value) >= 1 << 63:
        raise InputError(f"has an image id of more than 64 bits: {value!r:.80}")
    return value


def read_captions(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the captions of an annotation file as they are written: image id, caption. Empty ones are skipped."""
    has_list = False
    try:
        for _, number, entry in stream_lists(path, ["annotations"]):
            has_list = True
            if number < 0:
                continue
            try:
                for key in ("image_id", "caption"):
                    if not isinstance(entry, dict) or key not in entry:
                        raise InputError(f'lacks "{key}"')
                image_id, caption = parse_image_id(entry["image_id"]), entry["caption"]
                captions = caption if isinstance(caption, list) else [caption]
                if not all(isinstance(text, str) for text in captions):
                    raise InputError(f'has a "caption" that is not text: {caption!r:.80}')
            except InputError as error:
                raise InputError(f"{path}: annotations[{number}] {error}.") from None
            yield from ((image_id, text) for text in captions if text.strip())
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}).") from None
    if not has_list:
        raise InputError(f'{path} is not a COCO annotation file: it has no list of "annotations".')


class Names(Sequence):
    """File names in one block of bytes: a million take some 30 MB, as strings they would take 80.

    block: uint8, the names in UTF-8 with newlines between them. starts, ends: (names,) where each lies in it.
    """

    def __init__(self, block: np.ndarray, starts: np.ndarray | None = None, ends: np.ndarray | None = None):
        self.block = block
        if starts is None:
            ends = np.append(np.flatnonzero(block == ord("\n")), len(block))
            starts = np.append(0, ends[:-1] + 1)
        self.starts, self.ends = starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int | slice | np.ndarray) -> str | Names:
        start, end = self.starts[index], self.ends[index]
        if isinstance(start, np.ndarray):
            return Names(self.block, start, end)
        return self.block[start:end].tobytes().decode()


class PhotoFiles(Sequence):
    """Where the photos of a data set lie, made when asked for: paths in a folder, or members of its tar files.

    places: (photos, 2) where in its tar file a photo begins and how long it is, or None.
    """

    def __init__(self, folder: Path, names: Names, places: np.ndarray | None = None):
        self.folder, self.names, self.places = folder, names, places

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice | np.ndarray) -> Path | Member | PhotoFiles:
        name = self.names[index]
        place = None if self.places is None else self.places[index]
        if isinstance(name, Names):
            return PhotoFiles(self.folder, name, place)
        if place is None:
            return self.folder / name
        shard, _, inside = name.partition("/")
        return Member(self.folder / shard, inside, *place.tolist())


@dataclass
class Annotations:
    """A caption file as flat arrays.

    `tokens[offsets[i]:offsets[i + 1]]` are caption i's indices into `words`, all the file's words in the
    order of their first appearance; `photo[i]` is its row in `image_ids` and `file_names`.
    """

    image_ids: np.ndarray  # (photos,) int64
    file_names: Names
    words: list[str]
    tokens: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (captions + 1,) int64
    photo: np.ndarray  # (captions,) int32
    places: np.ndarray | None  # (photos, 2) int64 offset and size, where the photos are in tar files


def read_annotations(path: Path, cache: Path = CACHE) -> Annotations:
    """Read and tokenize a COCO captions or image_info file, or take the arrays kept from the last time.

    Photos without a caption are left out where the file has captions. Raises `InputError` where it is
    missing, not JSON, not COCO's, or empty.
    """
    kept = cache / "captions" / f"{hash_file(path, b'2')[:32]}.npz"
    if kept.exists():
        try:
            with np.load(kept) as arrays:
                found = {key: arrays[key] for key in arrays.files}
            found["file_names"] = Names(found["file_names"])
            found["words"] = found["words"].tobytes().decode().split("\n")
            return Annotations(**{"places": None, **found})
        except Exception:  # torn, which makes its reader raise nearly anything: made anew below
            pass
    annotations = _parse_annotations(path)
    arrays = {**vars(annotations), "file_names": annotations.file_names.block}
    arrays["words"] = np.frombuffer("\n".join(annotations.words).encode(), np.uint8)
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = kept.with_name(f"{kept.stem}.{os.getpid()}.new")
    with open(beside, "wb") as file:
        np.savez(file, **{key: array for key, array in arrays.items() if array is not None})
    os.replace(beside, kept)
    return annotations


def _parse_annotations(path: Path) -> Annotations:
    """The file's entries are read one by one: all at once they would take ten times the memory of the arrays."""
    not_coco = f"{path} is not a COCO annotation file"
    lists = ["images", "annotations"] if path.name.startswith("captions") else ["images"]
    found: set[str] = set()
    image_ids, names, places = array("q"), bytearray(), array("q")
    tokens, offsets, image_of = array("i"), array("q", [0]), array("q")
    index: dict[str, int] = {}
    try:
        for list_name, number, entry in stream_lists(path, lists):
            if number < 0:
                if list_name in found:
                    raise InputError(f'{not_coco}: it has two lists of "{list_name}".')
                found.add(list_name)
            elif list_name == "images":
                name = entry.get("file_name") if isinstance(entry, dict) else None
                if not isinstance(name, str) or type(entry.get("id")) is not int:
                    raise InputError(f'{not_coco}: an entry of "images" lacks a whole-number "id" or a "file_name".')
                if not name or "\n" in name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                    raise InputError(f"{path} names a photo outside its folder: {name!r}.")
                if abs(entry["id"]) >= 1 << 63:
                    raise InputError(f"{not_coco}: the image id {entry['id']} occurs twice or is too large.")
                image_ids.append(entry["id"])
                names += name.encode() + b"\n"
                if path.name.endswith(INDEX):
                    places.extend((entry["offset"], entry["size"]))
            else:
                if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
                    raise InputError(f'{not_coco}: an entry of "annotations" lacks a "caption".')
                if type(entry.get("id")) not in (int, str):
                    raise InputError(f'{not_coco}: an entry of "annotations" lacks an "id".')
                image_id = entry.get("image_id")
                if type(image_id) is not int or abs(image_id) >= 1 << 63:
                    raise InputError(f'{path} has a caption of image {image_id}, which is not in its "images".')
                words = tokenize(entry["caption"])
                if not words:
                    raise InputError(f"{path} has an empty caption for image {image_id}; remove it.")
                tokens.extend([index.setdefault(word, len(index)) for word in words])
                offsets.append(len(tokens))
                image_of.append(image_id)
        "\n".join(index).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path} holds characters that are none ({error}).") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}).") from None
    for list_name in lists:
        if list_name not in found:
            raise InputError(f'{not_coco}: it has no list of "{list_name}".')
    if not image_ids:
        raise InputError(f'{path} holds no photos: its list of "images" is empty.')
    if "annotations" in lists and not image_of:
        raise InputError(f'{path} holds no captions: its list of "annotations" is empty.')

    image_ids, image_of = np.frombuffer(image_ids, np.int64), np.frombuffer(image_of, np.int64)
    file_names = Names(np.frombuffer(names, np.uint8)[:-1])
    order = np.argsort(image_ids, kind="stable")
    twice = np.flatnonzero(np.diff(image_ids[order]) == 0)
    if len(twice):
        raise InputError(f"{not_coco}: the image id {image_ids[order[twice[0]]]} occurs twice or is too large.")
    photo = order[np.searchsorted(image_ids, image_of, sorter=order).clip(max=len(order) - 1)]
    unknown = np.flatnonzero(image_ids[photo] != image_of)
    if len(unknown):
        raise InputError(f'{path} has a caption of image {image_of[unknown[0]]}, which is not in its "images".')
    if len(photo):  # photos without a caption have nothing to teach
        used, photo = np.unique(photo, return_inverse=True)
        if len(used) < len(image_ids):
            image_ids = image_ids[used]
            file_names = Names(np.frombuffer("\n".join(file_names[used]).encode(), np.uint8))
    return Annotations(
        image_ids,
        file_names,
        list(index),
        np.frombuffer(tokens, np.int32),
        np.frombuffer(offsets, np.int64),
        photo.astype(np.int32),
        np.frombuffer(places, np.int64).reshape(-1, 2) if places else None,
    )
