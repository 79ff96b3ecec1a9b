"""Photos and captions of a data set laid out as COCO is, as batches.

    <folder>/annotations/captions_{train,val,test}<year>.json, image_info_test<year>.json
    <folder>/images/{train,val,test}<year>/

or as tar files of photos and captions, <folder>/{train,val,test}-*.tar (`shards.py`). A caption file is read and
tokenized once; what comes of it, a few flat integer arrays, is kept in the cache folder under the file's hash, so
that training on COCO starts in a second the next time.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from captioning.annotations import PhotoFiles, read_annotations
from captioning.errors import InputError
from captioning.files import CACHE
from captioning.images import Photos, build_transform
from captioning.shards import SUFFIX, index_shards
from vocabulary import END, START, Vocabulary

MODES = ("train", "val", "test")


def find_split(folder: Path, mode: str, cache: Path = CACHE) -> tuple[Path, Path]:
    """The annotation file and the photo folder of a data set's split ("train", "val" or "test").

    For "test" that is captions_test<year>.json where the captions are public, else image_info_test<year>.json.
    Of a folder of tar files, <mode>-*.tar, it is an index of them in the cache folder, and the folder itself.
    """
    if mode not in MODES:
        raise InputError(f'mode "{mode}" is not one of {", ".join(MODES)}.')
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that no folder can have, too
        raise InputError(
            f"{folder} does not exist; draw the sample data set with `python scenes.py {folder}`, or fetch "
            f"COCO with `python download.py coco --root {folder}`."
        )
    found: list[Path] = []
    for kind in ("captions", "image_info")[: 2 if mode == "test" else 1]:
        pattern = re.compile(rf"{kind}_{mode}\d*\.json")
        if not found and (folder / "annotations").is_dir():
            found = sorted(p for p in (folder / "annotations").iterdir() if pattern.fullmatch(p.name))
    shards = sorted(folder.glob(f"{mode}*{SUFFIX}"))
    if not found and shards:
        return index_shards(shards, mode, cache / "shards"), folder
    if not found:
        raise InputError(
            f"{folder} holds no annotations/captions_{mode}<year>.json and no {mode}-*{SUFFIX}; a data set is laid out "
            "as COCO or as WebDataset."
        )
    if len(found) > 1:
        raise InputError(f"{folder} holds several years: {', '.join(p.name for p in found)}; keep the one to use.")
    return found[0], folder / "images" / found[0].stem.split("_")[-1]


class CaptionDataset(Dataset):
    """A split's photos and captions; an item a caption, or in test mode a photo.

    In "train" and "val" mode `dataset[i]` is (photo, caption): what `transform` makes of caption i's photo,
    and its indices from `<start>` to `<end>`, (length,) int64. In "test" mode it is (image id, photo).
    Raises `InputError` where the folder's annotations or photos are missing or cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        mode: str = "train",
        transform: Callable | None = None,
        vocab: Vocabulary | None = None,
        vocab_threshold: int = 5,
        cache: Path = CACHE,
        must_exist: bool = True,  # where False, a missing image raises `InputError` only when it is read
    ):
        self.mode = mode
        self.annotation_file, self.photo_folder = find_split(Path(folder), mode, cache)
        annotations = read_annotations(self.annotation_file, cache)
        self.image_ids = annotations.image_ids
        self.paths = PhotoFiles(self.photo_folder, annotations.file_names, annotations.places)
        if annotations.places is None and must_exist:
            self._check_photos_exist()
        self.photo = annotations.photo  # (captions,) each caption's photo, a row of image_ids
        words = annotations.words
        if vocab is None:
            counts = np.bincount(annotations.tokens, minlength=len(words))
            vocab = Vocabulary.from_counts(dict(zip(words, counts.tolist(), strict=True)), vocab_threshold)
        self.vocab = vocab
        self.lengths = np.diff(annotations.offsets) + 2  # (captions,) with <start> and <end>
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.tokens = np.empty(self.offsets[-1], np.int32)
        inner = np.ones(len(self.tokens), bool)
        inner[self.offsets[:-1]] = inner[self.offsets[1:] - 1] = False
        self.tokens[self.offsets[:-1]], self.tokens[self.offsets[1:] - 1] = START, END
        self.tokens[inner] = np.array([vocab[word] for word in words], np.int32)[annotations.tokens]
        self.photos = Photos(self.paths, transform or build_transform(train=mode == "train"))

    def _check_photos_exist(self) -> None:
        """Names are compared by their hashes, a million of which take 8 MB."""
        names, there = self.paths.names, array("q")
        for inner in {os.path.dirname(name) for name in names}:
            if (self.photo_folder / inner).is_dir():
                entries = os.scandir(self.photo_folder / inner)
                there.extend(hash(os.path.join(inner, entry.name)) for entry in entries if entry.is_file())
        wanted = np.fromiter(map(hash, names), np.int64, len(names))
        missing = np.flatnonzero(~np.isin(wanted, np.frombuffer(there, np.int64)))
        if len(missing):
            raise InputError(
                f"{len(missing)} of {len(names)} photos of {self.annotation_file} are missing, the first is "
                f"{self.paths[missing[0]]}; put them there or take them out of the annotations."
            )

    def drop(self, rows: Iterable[int]) -> None:
        """Leave out the photos of these rows of `paths`, and their captions."""
        keep = np.ones(len(self.paths), bool)
        keep[list(rows)] = False
        captions = keep[self.photo]
        inside = np.repeat(captions, self.lengths)
        self.tokens, self.lengths = self.tokens[inside], self.lengths[captions]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.photo = (np.cumsum(keep) - 1)[self.photo[captions]].astype(np.int32)
        self.image_ids, self.paths = self.image_ids[keep], self.paths[keep]
        self.photos.paths = self.paths

    def caption(self, index: int) -> Tensor:
        """Caption `index` as indices from `<start>` to `<end>`, (length,) int64."""
        return torch.from_numpy(self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64))

    def captions(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Captions as one batch: (batch, longest) int64, padded with `<end>` on the right, and their lengths."""
        lengths = self.lengths[indices]
        column = np.arange(lengths.max())
        inside = column < lengths[:, None]
        batch = np.where(inside, self.tokens[np.where(inside, self.offsets[indices][:, None] + column, 0)], END)
        return torch.from_numpy(batch.astype(np.int64)), torch.from_numpy(lengths)

    @cached_property
    def coco(self) -> COCO:
        """The annotation file behind pycocotools' API, read when first asked for."""
        try:
            with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
                return COCO(str(self.annotation_file))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.annotation_file} is not a COCO annotation file ({error!r}).") from None

    def references(self) -> dict[int, list[str]]:
        """The captions of each image id as they were written, for metrics."""
        return {int(i): [a["caption"] for a in self.coco.imgToAnns[int(i)]] for i in self.image_ids}

    def __len__(self) -> int:
        return len(self.paths) if self.mode == "test" else len(self.photo)

    def __getitem__(self, index: int) -> tuple:
        row = index if self.mode == "test" else int(self.photo[index])
        photo = self.photos[row, int(torch.randint(1 << 31, ()))]  # drawn anew each time, from torch's seed
        return (int(self.image_ids[row]), photo) if self.mode == "test" else (photo, self.caption(index))


# Batches


class LengthBatches(Sampler):
    """Batches of caption indices, each of one caption length, every caption exactly once an epoch.

    Captions of one length need no padding, so no step of the decoder is spent on it. The order depends on
    the seed and the epoch alone; `set_epoch` chooses the epoch, and each whole pass goes on to the next.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        per_length = np.bincount(lengths)
        self.batches = int(np.ceil(per_length / batch_size).sum())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng((self.seed, self.epoch))
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
        self.epoch += 1


class PhotoBatches(Sampler):
    """Batches of caption indices that hold all captions of each of their photos, every caption once an epoch.

    Where the backbone learns, it then sees a photo once an epoch rather than once a caption.
    """

    def __init__(self, photo: np.ndarray, batch_size: int, seed: int = 0):
        self.seed, self.epoch = seed, 0
        self.captions = np.argsort(photo, kind="stable")
        self.ends = np.cumsum(np.bincount(photo))  # photo i's are captions[ends[i - 1]:ends[i]]
        self.photos = max(1, round(batch_size * len(self.ends) / len(photo)))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.ends) // self.photos)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.ends))
        for start in range(0, len(order), self.photos):
            some = order[start : start + self.photos]
            yield np.concatenate([self.captions[self.ends[i - 1] if i else 0 : self.ends[i]] for i in some])
        self.epoch += 1


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
    """The recipe's data loader over the data set in `cocoapi_loc`.

    Args:
        transform: of a PIL photo; the recipe's own of the mode by default.
        mode: "train" and "val" give (photos (B, 3, H, W), captions (B, length)), all captions of a batch of
            one length and each once an epoch; "test" gives (image ids (B,), photos) in the file's order.
        vocab_threshold: how often a word must occur to have an index of its own.
        vocab_from_file: read the vocabulary from `vocab_file`; otherwise (training only) build it and write it.

    `loader.dataset.vocab` is the vocabulary. Raises `InputError` for what cannot be used.
    """
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
