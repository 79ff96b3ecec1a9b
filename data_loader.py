"""Load the images and captions of a data set as batches.

A data set is a folder in COCO's layout,

    <folder>/annotations/captions_{train,val,test}<year>.json, image_info_test<year>.json
    <folder>/images/{train,val,test}<year>/

or in WebDataset's, <folder>/{train,val,test}*.tar (`captioning/shards.py`). An annotation file is tokenized once. The
result, a few flat integer arrays, is cached under the file's hash, so that training on COCO starts in a second the next
time.
"""

from __future__ import annotations

import io
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from captioning.annotations import Annotations, ImageFiles, Names, read_annotations, read_captions, read_images
from captioning.coco_layout import SPLITS, find_annotation_files, find_unknown_files, has_captions_of, image_folder_of
from captioning.errors import InputError, warn_once
from captioning.files import CACHE, require_access
from captioning.image_index import find_in_other_form
from captioning.images import ImageDataset, build_transform
from captioning.scenes.checking import is_scene
from captioning.shards import TAR_SUFFIX, index_shards, is_shard, stamp
from captioning.splits import SPLIT_WORD
from captioning.tables import SPLIT_ALIASES
from vocabulary import DEFAULT_LENGTH, END, START, UNK, Vocabulary

# What follows a split's name in that of a tar file which is not of the split, such as value-0.tar and testimonials.tar.
OTHER_WORDS = "(?!ing|id|ate|set|data|image|img|photo|split|sample|shard)[a-z]", "is another word"
UNKNOWN_SHARE = 0.2  # share of unknown training words above which there is a warning
LONG_SHARE = 0.2  # share of training captions longer than `DEFAULT_LENGTH` above which there is a warning
UNFINISHED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".part", ".partial", ".download")  # added to the names of tar files


def find_split(folder: Path, mode: str, cache: Path = CACHE) -> tuple[Path, Path]:
    """Find the annotation file and the image folder of a data set's split ("train", "val" or "test").

    For "test" the annotation file is captions_test<year>.json or, where the captions are not public,
    image_info_test<year>.json. For tar files, <mode>*.tar, it is their index in the cache, and the image folder is
    `folder`. Raises `InputError` where the split is missing.
    """
    if mode not in SPLITS:
        raise InputError(f'mode "{mode}" is not one of {", ".join(SPLITS)}.')
    require_access(folder)
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a path of any length
        raise _no_folder(folder)
    annotation_file = next(find_annotation_files(folder, mode), None)
    try:
        shards = sorted(path for path in folder.glob(f"{mode}*") if is_shard(path))
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}).") from None
    if annotation_file is not None:
        if shards:
            warn_once(f"{shards[0]} is not read, because {annotation_file} holds the {mode} split.")
        return annotation_file, image_folder_of(annotation_file)
    if shards:
        shards = _check_shards(shards, folder, mode)
        return index_shards(shards, mode, cache), folder
    raise _no_split(folder, mode)


def _check_shards(shards: list[Path], folder: Path, mode: str) -> list[Path]:
    """Return the split's shards without those of several splits, such as trainval-0.tar, if there are others.

    Warns of what is left out, and of a name that fits no split and is taken all the same.
    """
    for other, problem in ((f"[-_]?({'|'.join(SPLITS)})", "contains more than one split"), OTHER_WORDS):
        others = [path for path in shards if re.match(mode + other, path.name)]
        if others and len(others) == len(shards):
            warn_once(f"{others[0]} is taken as the {mode} split, though its name {problem}.")
        elif others:
            warn_once(f"{others[0]} is left out of the {mode} split, because its name {problem}.")
            shards = [path for path in shards if path not in others]
    packed = [path for path in _packed_shards(folder, mode) if path.suffix.lower() in UNFINISHED]
    if packed:
        warn_once(f"{packed[0]} is left out of the {mode} split; unpack it to a plain {TAR_SUFFIX} file, or delete it.")
    return shards


def _packed_shards(folder: Path, mode: str) -> list[Path]:
    """List files named like the split's tar files with a further suffix, or .tgz."""
    return [path for path in folder.glob(f"{mode}*") if re.search(r"\.tar\..|\.tgz$", path.name.lower())]


def _no_split(folder: Path, mode: str) -> InputError:
    """Return the error for a folder that lacks a split."""
    advice = "a data set is in the layout of COCO or of WebDataset."
    if folder.name in ("annotations", "images") and next(find_annotation_files(folder.parent, mode), None):
        advice = f"name the data set's folder, {folder.parent}."
    elif unknown := [path for path in find_unknown_files(folder) if _is_meant_for(mode, path.stem)]:
        advice = f"rename annotations/{unknown[0].name} to annotations/captions_{mode}.json if it holds the captions."
    elif packed := _packed_shards(folder, mode):
        advice = f"unpack {packed[0].name} to a plain tar file first."
    elif mode == "test" and _has_split(folder, "val"):
        advice = "there is a val split, which `evaluate.py --split val` scores."
    elif mode != "train" and _has_split(folder, "train"):
        advice = (
            f"move some images of the training split, with their captions, into a split of their own: images/{mode} "
            f"and annotations/captions_{mode}.json, or for tar files, rename one of them to {mode}-000000.tar."
        )
    elif tars := [tar for tar in _tar_files(folder) if _is_meant_for(mode, str(tar))]:
        advice = f"rename {tars[0]} to {mode}-000000.tar if it holds images with captions."
    return InputError(f"{folder} holds no annotations/captions_{mode}<year>.json and no {mode}*{TAR_SUFFIX}; {advice}")


def _has_split(folder: Path, split: str) -> bool:
    return any(map(is_shard, folder.glob(f"{split}*"))) or has_captions_of(folder, split)


def _tar_files(folder: Path) -> list[Path]:
    """List the tar files in a folder and in its subfolders, relative to it."""
    with suppress(OSError):
        paths = (path for pattern in ("*", "*/*") for path in folder.glob(pattern + TAR_SUFFIX))
        return sorted(path.relative_to(folder) for path in paths)
    return []


def _is_meant_for(mode: str, name: str) -> bool:
    """Return whether a name contains that of the split, or for "train" that of none."""
    splits = {SPLIT_ALIASES[word.lower()] for word in SPLIT_WORD.findall(name)}
    return splits == {mode} or (not splits and mode == "train")


def _no_folder(path: Path) -> InputError:
    """Return the error for a path that is not the folder of a data set."""
    if not os.path.isfile(path):
        return InputError(
            f"{path} does not exist; name another folder, draw the sample data set with `python scenes.py {path}`, "
            f"or download COCO with `python download.py coco --root {path}`."
        )
    if path.suffix.lower() == TAR_SUFFIX or path.parent.name == "annotations":
        folder = path.parent if path.suffix.lower() == TAR_SUFFIX else path.parent.parent
        return InputError(f"{path} is a file of a data set; name its folder, {folder}.")
    return InputError(
        f"{path} is a file, and a data set is a folder; unpack an archive and name its folder, or convert a table of "
        "captions with `python importers.py folder`."
    )


def _build_vocabulary(annotations: Annotations, threshold: int) -> Vocabulary:
    counts = np.bincount(annotations.tokens, minlength=len(annotations.words)).tolist()
    return Vocabulary.from_counts(dict(zip(annotations.words, counts, strict=True)), threshold)


class CaptionDataset(Dataset):
    """A split of a data set; an item is a caption with its image or, in test mode, an image.

    In "train" and "val" mode `dataset[i]` is (image, caption): caption i's image as `transform` returns it, and the
    caption's indices from `<start>` to `<end>`, (length,) int64. In "test" mode it is (image id, image).

    Args:
        vocab: by default, that of the words that occur `vocab_threshold` times in the captions.
        cache: folder of the tokenized captions.
        must_exist: if False, a missing image raises `InputError` only when it is read.

    Raises `InputError` where the annotations or the images are missing or cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        mode: str = "train",
        transform: Callable | None = None,
        vocab: Vocabulary | None = None,
        vocab_threshold: int = 5,
        cache: Path = CACHE,
        must_exist: bool = True,
    ):
        self.mode = mode
        self.annotation_file, self.image_folder = find_split(Path(folder), mode, cache)
        annotations = read_annotations(self.annotation_file, cache)
        self._stamp = stamp(self.annotation_file)
        self.image_ids = annotations.image_ids
        self.paths = ImageFiles(self.image_folder, annotations.file_names, annotations.byte_ranges)
        if annotations.byte_ranges is None:
            self._find_images(must_exist)
        self.image_rows = annotations.image_rows  # (captions,) each caption's image, a row of image_ids
        if vocab is None and mode != "train" and not len(self.image_rows):
            raise InputError(f"{self.annotation_file} has no captions; give the training split's vocabulary, vocab=.")
        self.vocab = _build_vocabulary(annotations, vocab_threshold) if vocab is None else vocab
        self._encode_captions(annotations)
        if mode == "train":
            self._check_captions(
                "lower --vocab-threshold" if vocab is None else "train a new model with a vocabulary of these captions"
            )
        self.images = ImageDataset(self.paths, transform or build_transform(train=mode == "train"))

    def _encode_captions(self, annotations: Annotations) -> None:
        """Store all captions as indices of the vocabulary, one after the other, each from `<start>` to `<end>`."""
        self.lengths = np.diff(annotations.offsets) + 2  # (captions,) with <start> and <end>
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])  # caption i is tokens[offsets[i]:offsets[i + 1]]
        starts, ends = self.offsets[:-1], self.offsets[1:] - 1
        is_word = np.ones(self.offsets[-1], bool)
        is_word[starts] = is_word[ends] = False
        self.tokens = np.empty(len(is_word), np.int32)
        self.tokens[starts], self.tokens[ends] = START, END
        index = np.array([self.vocab[word] for word in annotations.words], np.int32)
        self.tokens[is_word] = index[annotations.tokens]

    def _check_captions(self, advice: str) -> None:
        """Warn of many unknown words, with advice, and of many long captions; raises `InputError` if none is known."""
        words = len(self.tokens) - 2 * len(self.lengths)
        unknown = np.sum(self.tokens == UNK)
        if words and unknown == words:
            raise InputError(f"none of the words in {self.annotation_file} is in the vocabulary; {advice}.")
        is_punctuation = np.array([not any(map(str.isalnum, word)) for word in self.vocab.words])
        share = unknown / max(1, words - np.sum(is_punctuation[self.tokens]))
        if share > UNKNOWN_SHARE:
            warn_once(
                f"{share:.0%} of the words in {self.annotation_file} are not in the vocabulary, and are not learned; "
                f"{advice}."
            )
        long = np.sum(self.lengths - 1 > DEFAULT_LENGTH) / max(1, len(self.lengths))
        if long > LONG_SHARE:
            warn_once(
                f"{long:.0%} of the captions in {self.annotation_file} have more than {DEFAULT_LENGTH - 1} tokens, at "
                "which validation and self-critical training cut captions; shorten them, and caption with a higher "
                "--max-length."
            )

    def _find_images(self, must_exist: bool) -> None:
        """Find images whose files are named in another Unicode form, and raise `InputError` for missing ones.

        Compares hashes of names, as a million take only 8 MB.
        """
        names, present = self.paths.names, array("q")
        for folder in {os.path.dirname(os.path.normpath(name)) for name in names}:
            require_access(self.image_folder / folder)
            with suppress(OSError):  # a folder that is missing: all of its images are missing
                for entry in os.scandir(self.image_folder / folder):
                    # For a link to itself, `isfile` is False, and `is_file` raises an error.
                    if os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                        present.append(hash(os.path.join(folder, entry.name)))
        wanted = np.fromiter((hash(os.path.normpath(name)) for name in names), np.int64, len(names))
        if twice := len(wanted) - len(np.unique(wanted)):
            warn_once(
                f"{self.annotation_file} lists {twice:,} image{'s' * (twice > 1)} more than once, under several ids; "
                "give all captions of an image one id, as scores compare a caption with those of its id only."
            )
        missing = np.flatnonzero(~np.isin(wanted, np.frombuffer(present, np.int64)))
        found = find_in_other_form(self.image_folder, names[missing]) if len(missing) else {}
        if found:
            block = "\n".join(found.get(name, name) for name in names).encode()
            self.paths = ImageFiles(self.image_folder, Names(np.frombuffer(block, np.uint8)))
        missing = [row for row in missing.tolist() if names[row] not in found]
        if missing and must_exist:
            raise InputError(
                f"{len(missing)} of {len(names)} images of {self.annotation_file} are missing, the first is "
                f"{self.paths[missing[0]]}; put them there, remove them from the annotations, or leave them out with "
                "--skip-unreadable."
            )

    def drop(self, rows: Iterable[int]) -> None:
        """Remove the images in these rows of `paths`, and their captions."""
        keep_image = np.ones(len(self.paths), bool)
        keep_image[list(rows)] = False
        keep_caption = keep_image[self.image_rows]
        keep_token = np.repeat(keep_caption, self.lengths)
        self.tokens, self.lengths = self.tokens[keep_token], self.lengths[keep_caption]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.image_rows = (np.cumsum(keep_image) - 1)[self.image_rows[keep_caption]].astype(np.int32)
        self.image_ids, self.paths = self.image_ids[keep_image], self.paths[keep_image]
        self.images.paths = self.paths

    def caption(self, index: int) -> Tensor:
        """Return a caption's indices from `<start>` to `<end>`: (length,) int64."""
        index = range(len(self.lengths))[index]
        return torch.from_numpy(self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64))

    def captions(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return a batch of captions, (batch, longest) int64, padded with `<end>` on the right, and their lengths."""
        lengths, starts = self.lengths[indices], self.offsets[:-1][indices]
        column = np.arange(lengths.max())
        is_token = column < lengths[:, None]
        batch = np.where(is_token, self.tokens[np.where(is_token, starts[:, None] + column, 0)], END)
        return torch.from_numpy(batch.astype(np.int64)), torch.from_numpy(lengths)

    @cached_property
    def coco(self) -> COCO:
        """The split as a pycocotools `COCO`, for exploration: its images with all fields, its captions with new ids."""
        coco = COCO()
        captions = read_captions(self.annotation_file) if len(self.image_rows) else ()
        coco.dataset = {  # pyright: ignore[reportAttributeAccessIssue]  its stub has the fields of detection only
            "images": [{**entry, "id": i} for i, entry in read_images(self.annotation_file)],
            "annotations": [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions, 1)],
        }
        with redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def references(self) -> dict[int, list[str]]:
        """Read the original captions of each image, for metrics: image id -> captions."""
        references: dict[int, list[str]] = {int(i): [] for i in self.image_ids}
        if len(self.image_rows):
            for image_id, caption in read_captions(self.annotation_file):
                if image_id in references:
                    references[image_id].append(caption)
            if stamp(self.annotation_file) != self._stamp or not all(references.values()):
                raise InputError(f"{self.annotation_file} has changed since it was first read; start again.")
        return references

    def scenes(self) -> dict[int, Any]:
        """Read the ground truth of drawn scenes: image id -> scene; empty for other data sets."""
        ids = set(self.image_ids.tolist())
        images = read_images(self.annotation_file)
        named = {i: entry["scene"] for i, entry in images if i in ids and "scene" in entry}
        scenes = {i: scene for i, scene in named.items() if is_scene(scene)}
        if 0 < len(scenes) < len(named):
            wrong = len(named) - len(scenes)
            warn_once(f'{self.annotation_file} has an invalid "scene" of {wrong} images; draw the scenes again.')
        return scenes

    def __len__(self) -> int:
        return len(self.paths) if self.mode == "test" else len(self.image_rows)

    def __getitem__(self, index: int) -> tuple:
        row = index if self.mode == "test" else int(self.image_rows[index])
        image = self.images[row, int(torch.randint(1 << 31, ()))]  # a new random crop each time, from torch's seed
        return (int(self.image_ids[row]), image) if self.mode == "test" else (image, self.caption(index))


# Batches


class EpochSampler(Sampler):
    """Sample batches of caption indices in an order that depends on the seed and the epoch only.

    `set_epoch` chooses the epoch, and each complete pass advances it by one. Subclasses draw the batches of an epoch.
    """

    def __init__(self, seed: int):
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def draw(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the batches of an epoch."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[np.ndarray]:
        yield from self.draw(np.random.default_rng((self.seed, self.epoch)))
        self.epoch += 1


class LengthBatches(EpochSampler):
    """Batches of captions of equal length, every caption once per epoch.

    Captions of equal length need no padding, on which a transformer would compute as well.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0):
        super().__init__(seed)
        self.lengths, self.batch_size = lengths, batch_size
        per_length = np.bincount(lengths)
        self.batches = int(np.ceil(per_length / batch_size).sum())

    def __len__(self) -> int:
        return self.batches

    def draw(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the batches of an epoch."""
        order = rng.permutation(len(self.lengths))
        order = order[np.argsort(self.lengths[order], kind="stable")]
        ends = np.cumsum(np.bincount(self.lengths))
        batches = [
            order[start : min(start + self.batch_size, end)]
            for begin, end in zip([0, *ends[:-1]], ends, strict=True)
            for start in range(begin, end, self.batch_size)
        ]
        for i in rng.permutation(len(batches)):
            yield batches[i]


class ImageBatches(EpochSampler):
    """Batches that hold all captions of each of their images, every caption once per epoch.

    For training the backbone, which then processes an image once per epoch instead of once per caption.
    """

    def __init__(self, image_rows: np.ndarray, batch_size: int, seed: int = 0):
        super().__init__(seed)
        self.captions = np.argsort(image_rows, kind="stable")
        self.ends = np.cumsum(np.bincount(image_rows))  # image i has captions[ends[i - 1]:ends[i]]
        self.images_per_batch = max(1, round(batch_size * len(self.ends) / len(image_rows)))

    def __len__(self) -> int:
        return -(-len(self.ends) // self.images_per_batch)

    def draw(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the batches of an epoch."""
        order = rng.permutation(len(self.ends))
        for start in range(0, len(order), self.images_per_batch):
            rows = order[start : start + self.images_per_batch]
            yield np.concatenate([self.captions[self.ends[i - 1] if i else 0 : self.ends[i]] for i in rows])


def get_loader(
    transform: Callable | None = None,
    mode: str = "train",
    batch_size: int = 1,
    vocab_threshold: int = 5,
    vocab_file: str | Path = "vocab.json",
    vocab_from_file: bool = True,
    num_workers: int = 0,
    cocoapi_loc: str | Path = "data/scenes",
) -> DataLoader:
    """Build a data loader over the data set in the folder `cocoapi_loc`.

    Args:
        transform: from a PIL image to a tensor; by default `build_transform` for the mode.
        mode: "train" and "val" yield (images (B, 3, H, W), captions (B, length)), every caption once per epoch, in
            batches of captions of equal length; "test" yields (image ids (B,), images), in the order of the file.
        vocab_threshold: number of occurrences from which a word is in the vocabulary.
        vocab_from_file: read the vocabulary from `vocab_file`; otherwise (training only) build it and write it there.

    `loader.dataset.vocab` is the vocabulary. Raises `InputError` for arguments or data that cannot be used.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}.")
    if not vocab_from_file and mode != "train":
        raise InputError(f'a vocabulary is built from training captions: use vocab_from_file=True in mode "{mode}".')
    vocab = Vocabulary.load(vocab_file) if vocab_from_file else None
    dataset = CaptionDataset(cocoapi_loc, mode, transform, vocab, vocab_threshold)
    if not vocab_from_file:
        dataset.vocab.save(vocab_file)
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    if mode == "test":
        return DataLoader(dataset, batch_size=batch_size, **options)
    return DataLoader(dataset, batch_sampler=LengthBatches(dataset.lengths, batch_size), **options)
