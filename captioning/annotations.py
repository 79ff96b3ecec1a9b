"""Read COCO annotation files entry by entry into flat arrays.

Files may be in any Unicode encoding, with or without a byte order mark; what captioning does not need, such as
"categories", is ignored.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from captioning.captions import MAX_CAPTION, UNSPACED, find_marks, is_missing, is_rejected, is_structure
from captioning.errors import InputError, warn_once
from captioning.files import CACHE, hash_file, is_within, require_regular, write_cache
from captioning.json_stream import stream_lists
from captioning.reports import Report
from captioning.shards import INDEX_SUFFIX, Member
from vocabulary import tokenize

# Mean length of words in scripts without spaces above which they are clauses. Chinese and Japanese words have about 2
# letters, those of the others, such as Thai, about 4.
CHINESE_WORD, THAI_WORD = 3, 6
_CHINESE = re.compile("[\u3040-\u30ff\u3400-\u9fff]")

# COCO's entries


def parse_image_id(value: Any) -> int:
    """Convert an image id from a JSON file to an integer: 7, 7.0 and "007" are all 7.

    Raises `InputError` for anything else, with a sentence fragment ("has ...") that follows the name of an entry.
    """
    if type(value) is not int:
        whole = isinstance(value, float) and value.is_integer()
        if whole and abs(value) >= 1 << 53:
            raise InputError(f"has an image id that a floating-point number rounds: {value!r}; write it as an integer")
        if not whole and not (isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", value)):
            raise InputError(f"has an image id that is not a whole number: {value!r:.80}")
        value = int(value)
    if abs(value) >= 1 << 63:
        raise InputError(f"has an image id of more than 64 bits: {value!r:.80}")
    return value


def _field(entry: Any, key: str) -> Any:
    if not isinstance(entry, dict):
        raise InputError("is not a JSON object")
    if key not in entry:
        raise InputError(f'lacks "{key}"')
    return entry[key]


def _parse_image(entry: Any) -> tuple[int, dict[str, Any]]:
    image_id, name = parse_image_id(_field(entry, "id")), _field(entry, "file_name")
    if not isinstance(name, str) or not name:
        raise InputError(f'has a "file_name" that is not a name: {name!r:.80}')
    if "\n" in name or "\0" in name:
        raise InputError(f'has a "file_name" with a line break or a zero byte: {name!r:.80}')
    if not is_within(name):
        raise InputError(f'has a "file_name" outside the image folder: {name!r:.80}')
    return image_id, entry


def _parse_caption(entry: Any) -> tuple[int, list[str] | None]:
    """Return the image id and its captions, "" for a missing one; None where they are rejected."""
    image_id, caption = parse_image_id(_field(entry, "image_id")), _field(entry, "caption")
    captions = caption or [None] if isinstance(caption, list) else [caption]
    captions = ["" if is_missing(text) else text for text in captions]
    if not all(isinstance(text, str) and not is_structure(text) for text in captions):
        raise InputError(f'has a "caption" that is not text: {caption!r:.80}')
    if any(len(text) > MAX_CAPTION for text in captions):
        raise InputError(f"has a caption of more than {MAX_CAPTION:,} characters")
    return image_id, None if is_rejected(entry) else captions


_PARSERS: dict[str, Callable[[Any], Any]] = {"images": _parse_image, "annotations": _parse_caption, "warnings": str}


def read_entries(path: Path, names: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield the entries of the lists "images" and "annotations" with these names: name, index, and a pair.

    That of an image is its id and the entry; that of an annotation is its image's id and its captions, with "" for a
    missing one, or None where they are rejected. Raises `InputError` for a file or an entry that cannot be used.
    """
    for name, number, entry in stream_lists(path, names):
        try:
            parsed = _PARSERS[name](entry)
        except InputError as error:
            raise InputError(f"{path}: {name}[{number}] {error}.") from None
        yield name, number, parsed


def read_images(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the images of an annotation file: image id, and the entry with all its fields."""
    for _, _, image in read_entries(path, ["images"]):
        yield image


def read_captions(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the captions of an annotation file as written: image id, caption. Skips missing and rejected ones."""
    for _, _, (image_id, captions) in read_entries(path, ["annotations"]):
        for caption in captions or ():
            if caption:
                yield image_id, caption


# Flat arrays


class Names(Sequence[str]):
    """File names in one block of bytes: a million take about 30 MB, and would take 80 MB as strings.

    block: uint8, the names in UTF-8 with newlines between them. starts, ends: (names,) each name's bounds in it.
    """

    def __init__(self, block: np.ndarray, starts: np.ndarray | None = None, ends: np.ndarray | None = None):
        self.block = block
        if starts is None or ends is None:
            ends = np.append(np.flatnonzero(block == ord("\n")), len(block))
            starts = np.append(0, ends[:-1] + 1)
        self.starts, self.ends = starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice | np.ndarray) -> Names: ...

    def __getitem__(self, index: int | slice | np.ndarray) -> str | Names:
        start, end = self.starts[index], self.ends[index]
        if isinstance(start, np.ndarray):
            return Names(self.block, start, end)
        return self.block[start:end].tobytes().decode()


class ImageFiles(Sequence[Path | Member]):
    """The image files of a data set: paths in a folder, or members of tar files, built when they are indexed.

    byte_ranges: (images, 2) each image's offset and size in its tar file, or None for images in a folder.
    """

    def __init__(self, folder: Path, names: Names, byte_ranges: np.ndarray | None = None):
        self.folder, self.names, self.byte_ranges = folder, names, byte_ranges

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path | Member: ...

    @overload
    def __getitem__(self, index: slice | np.ndarray) -> ImageFiles: ...

    def __getitem__(self, index: int | slice | np.ndarray) -> Path | Member | ImageFiles:
        name = self.names[index]
        byte_range = None if self.byte_ranges is None else self.byte_ranges[index]
        if isinstance(name, Names):
            return ImageFiles(self.folder, name, byte_range)
        if byte_range is None:
            return self.folder / name
        shard, _, member = name.partition("/")
        return Member(self.folder / shard, member, *byte_range.tolist())


@dataclass
class Annotations:
    """An annotation file as flat arrays.

    `tokens[offsets[i]:offsets[i + 1]]` are caption i's indices into `words`, which holds all words of the file in
    order of first appearance; `image_rows[i]` is the caption's image, a row of `image_ids` and `file_names`.
    """

    image_ids: np.ndarray  # (images,) int64
    file_names: Names
    words: list[str]
    tokens: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (captions + 1,) int64
    image_rows: np.ndarray  # (captions,) int32
    byte_ranges: np.ndarray | None  # (images, 2) int64 offset and size, where the images are in tar files
    warnings: list[str]  # sentences: one for each kind of entry that was left out, and others


def read_annotations(path: Path, cache: Path = CACHE) -> Annotations:
    """Read and tokenize a COCO captions or image_info file, or load the arrays that an earlier call has cached.

    Skips missing captions and, where the file has captions, images without any, and says so on stderr. Warns of
    training captions without spaces between words. Raises `InputError` where the file is missing, not JSON, not COCO's,
    or empty.
    """
    name = f"captions/{hash_file(path, b'13' + os.fsencode(path.name))[:32]}.npz"
    annotations = _load(cache / name)
    if annotations is None:
        annotations = _parse_annotations(path)
        write_cache(cache, name, lambda file: _save(annotations, file))
    where = "" if path.name.endswith(INDEX_SUFFIX) else f"{path}: "  # an index names the tar files itself
    for sentence in annotations.warnings:
        warn_once(where + sentence)
    return annotations


def _save(annotations: Annotations, file: BinaryIO) -> None:
    arrays = {**vars(annotations), "file_names": annotations.file_names.block}
    for key in ("words", "warnings"):
        arrays[key] = np.frombuffer("\n".join(arrays[key]).encode(), np.uint8)
    np.savez(file, **{key: array for key, array in arrays.items() if array is not None})


def _load(path: Path) -> Annotations | None:
    try:
        require_regular(path)
        with np.load(path) as file:
            arrays: dict[str, Any] = {"byte_ranges": None, **file}
        arrays["file_names"] = Names(arrays["file_names"])
        for key in ("words", "warnings"):
            text = arrays[key].tobytes().decode()
            arrays[key] = text.split("\n") if text else []
        return Annotations(**arrays)
    except Exception:  # a damaged file makes numpy raise nearly anything
        return None


def _parse_annotations(path: Path) -> Annotations:
    """Parse the file entry by entry into flat arrays; the parsed JSON as a whole would take ten times the memory."""
    is_index = path.name.endswith(INDEX_SUFFIX)
    lists = ["images"]
    if path.name.startswith("captions"):
        lists.append("annotations")
    if is_index:
        lists.append("warnings")
    image_ids, names, byte_ranges = array("q"), bytearray(), array("q")
    tokens, offsets, image_of = array("i"), array("q", [0]), array("q")
    index: dict[str, int] = {}
    report, sentences = Report(), []
    for name, number, entry in read_entries(path, lists):
        if name == "images":
            image_id, fields = entry
            image_ids.append(image_id)
            names += fields["file_name"].encode() + b"\n"
            if is_index:
                byte_ranges.extend((fields["offset"], fields["size"]))
        elif name == "annotations":
            image_id, captions = entry
            if captions is None:
                report.add("rejected caption{s}", f"annotations[{number}]")
            for caption in captions or ():
                words = tokenize(caption)
                if not words:
                    report.add("empty caption{s}", f"annotations[{number}]")
                    continue
                if not is_index and (marks := find_marks(caption)):  # an index reports them itself
                    report.add(marks, f"annotations[{number}]", "read")
                tokens.extend([index.setdefault(word, len(index)) for word in words])
                offsets.append(len(tokens))
                image_of.append(image_id)
        else:
            sentences.append(entry)
    if not image_ids:
        raise InputError(f'{path} holds no images: its list of "images" is empty.')
    if "annotations" in lists and not image_of:
        reason = "each of them is empty or rejected" if report.entries else 'its list of "annotations" is empty'
        raise InputError(f"{path} holds no captions: {reason}.")
    annotations = Annotations(
        np.frombuffer(image_ids, np.int64),
        Names(np.frombuffer(names, np.uint8)[:-1]),
        list(index),
        np.frombuffer(tokens, np.int32),
        np.frombuffer(offsets, np.int64),
        _find_rows(path, np.frombuffer(image_ids, np.int64), np.frombuffer(image_of, np.int64)),
        np.frombuffer(byte_ranges, np.int64).reshape(-1, 2) if is_index else None,
        sentences,
    )
    if image_of:
        _drop_images_without_captions(annotations, report)
    annotations.warnings += [f"{line}." for line in report.lines()]
    if path.name.startswith("captions_train") and lacks_spaces(annotations.words, np.bincount(annotations.tokens)):
        where = f"{path.name.removeprefix('captions_').removesuffix(INDEX_SUFFIX)}*.tar: " * is_index
        annotations.warnings.append(
            f"{where}the captions have no spaces between words, so that each whole sentence is learned as one word; "
            "split them into words first, with spaces between (as jieba, MeCab and PyThaiNLP do)."
        )
    return annotations


def lacks_spaces(words: Sequence[str], counts: np.ndarray) -> bool:
    """Return whether captions in scripts without spaces, such as Chinese, seem not to be split into words.

    counts: (words,) how often each of the words occurs.
    """
    is_unspaced = np.array([UNSPACED.search(word) is not None for word in words])
    lengths = np.array([len(word) for word in words])[is_unspaced]
    limits = np.array([CHINESE_WORD if _CHINESE.search(word) else THAI_WORD for word in words])[is_unspaced]
    counts, total = counts[is_unspaced], counts.sum()
    return bool(counts.sum() > 0.1 * total and lengths @ counts > limits @ counts)


def _find_rows(path: Path, image_ids: np.ndarray, image_of: np.ndarray) -> np.ndarray:
    """Find each caption's row in `image_ids`: (captions,) int32. Raises `InputError` for repeated or missing ids."""
    order = np.argsort(image_ids, kind="stable")
    repeated = np.flatnonzero(np.diff(image_ids[order]) == 0)
    if len(repeated):
        first, second = order[repeated[0]], order[repeated[0] + 1]
        raise InputError(
            f"{path}: images[{first}] and images[{second}] have the same id, {image_ids[first]}; remove one."
        )
    rows = order[np.searchsorted(image_ids, image_of, sorter=order).clip(max=len(order) - 1)]
    unknown = image_of[image_ids[rows] != image_of]
    if len(unknown):
        raise InputError(f'{path} has a caption of image {unknown[0]}, which is not in its "images".')
    return rows.astype(np.int32)


def _drop_images_without_captions(annotations: Annotations, report: Report) -> None:
    """Drop the images without captions, which training cannot use."""
    used, image_rows = np.unique(annotations.image_rows, return_inverse=True)
    names = annotations.file_names
    unused = np.setdiff1d(np.arange(len(names)), used)
    if not len(unused):
        return
    for row in unused:
        report.add("image{s} without captions", repr(names[row]))
    annotations.image_ids, annotations.image_rows = annotations.image_ids[used], image_rows.astype(np.int32)
    annotations.file_names = Names(np.frombuffer("\n".join(names[used]).encode(), np.uint8))
