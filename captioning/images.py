"""Transforms of images into network inputs, and a data set and batches of them."""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from captioning.backbones import Preprocessing
from captioning.errors import InputError
from captioning.files import CACHE, write_cache
from captioning.image_files import Source, read_image
from captioning.image_formats import image_suffixes
from captioning.interruption import ending_signals
from captioning.lazy_compiler import compiler_left_out
from captioning.resizing import RandomResizedCrop, Reduce, Resize
from captioning.shards import Member, stamp

with compiler_left_out():
    from torchvision import transforms as T

__all__ = [
    "WORKERS",
    "ImageDataset",
    "build_transform",
    "find_unreadable",
    "read_batches",
    "read_image",
    "split_batches",
]

# Interpolations of many pixels, also as Pillow's numbers; others show whether an image was decoded at a reduced size.
SMOOTH = {"bilinear", "bicubic", "lanczos", "hamming", 1, 2, 3, 5}
MAX_WORKERS = 1024
WORKERS = min(16 if torch.cuda.device_count() else 4, os.cpu_count() or 1)  # default number of DataLoader workers


def build_transform(
    train: bool = False,
    image_size: int = 224,
    normalize: bool = True,
    crop: str = "center",
    crop_pct: float = 224 / 256,
    interpolation: str = "bilinear",
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    reduce_to: int | None = None,
) -> T.Compose:
    """Build the transform of a PIL image into a backbone's input, by default the original recipe's.

    It resizes the shorter side (to 256 for a crop of 224), crops the center and normalizes; in training the crop is
    random and half the images are flipped. With crop="squash" it resizes the whole image to a square; in training a
    random 60 to 100% of it, in proportions of 4:5 to 5:4. `backbones.Preprocessing` explains the arguments, and its
    fields are the arguments for any backbone: `build_transform(train, **asdict(preprocessing))`. Without `normalize`
    the result stays uint8, (3, image_size, image_size), a quarter of the memory, and `EncoderCNN` normalizes it on its
    own device; the image is then resized by faster kernels (`resizing.resize_image`).
    """
    how = T.InterpolationMode(interpolation)
    resize_to, crop_to = (T.Resize, T.RandomResizedCrop) if normalize else (Resize, RandomResizedCrop)
    if crop == "center":
        resize = [resize_to(round(image_size / crop_pct), how)]
        cut = [T.RandomCrop(image_size)] if train else [T.CenterCrop(image_size)]
    elif train:
        resize, cut = [], [crop_to(image_size, (0.6, 1.0), (0.8, 1.25), how)]
    else:
        resize, cut = [resize_to((image_size, image_size), how)], []
    flip = [T.RandomHorizontalFlip()] if train else []
    tensor = [T.ToTensor(), T.Normalize(mean, std)] if normalize else [T.PILToTensor()]
    first = [] if reduce_to is None else [Reduce(reduce_to)]
    return T.Compose([*first, *resize, *cut, *flip, *tensor])


# Transforms that draw no numbers.
NOT_RANDOM = {Reduce, Resize, T.Resize, T.CenterCrop, T.PILToTensor, T.ToTensor, T.Normalize}


class ImageDataset(Dataset):
    """The images at `paths` (or PIL images), transformed: `dataset[index]`, or `dataset[index, seed]` for another draw.

    A random transform that takes its numbers from torch draws from the seed and the index alone, so that an image
    depends neither on the number of workers nor on what was read before.
    """

    def __init__(self, paths: Sequence[Source], transform: Callable):
        self.paths = paths
        self.transform = transform
        self.sides = resized_sides(transform)
        self.is_deterministic = isinstance(transform, T.Compose) and set(map(type, transform.transforms)) <= NOT_RANDOM

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        index = range(len(self))[index]  # also of -1
        if self.is_deterministic:
            return self._read(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]))
            return self._read(index)

    def _read(self, index: int) -> Tensor:
        try:
            return self.transform(read_image(self.paths[index], **self.sides))
        except MemoryError:
            raise InputError(f"{self.paths[index]} takes more memory than there is; make it smaller.") from None


def resized_sides(transform: Callable) -> dict[str, int]:
    """Return the sides of `read_image` that a transform's first step resizes to; none if that step is not a resize.

    An image may be decoded at a reduced size only before a resize; a crop would be different.
    """
    if isinstance(transform, Views):
        return resized_sides(transform.first)
    v2: Any = sys.modules.get("torchvision.transforms.v2", T)  # its import takes seconds; who uses it has imported it
    # Only these are known to take their steps in order, all of them and nothing else.
    first: Any = next(iter(transform.transforms), None) if type(transform) in (T.Compose, v2.Compose) else None
    if isinstance(first, Reduce):
        return {"longer_side": first.longer_side}
    if type(first) not in (Resize, T.Resize, v2.Resize) or first.size is None:  # v2 can also resize the longer side
        return {}
    if getattr(first.interpolation, "value", first.interpolation) not in SMOOTH:
        return {}
    return {"shorter_side": first.size if isinstance(first.size, int) else max(first.size)}


class _CatchErrors(Dataset):
    """Wraps a data set, and returns the `InputError` of an unreadable item instead of raising it."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor | InputError:
        try:
            return self.dataset[key]
        except InputError as error:
            return error


def _start_worker(_: int) -> None:
    """Make a worker ignore signals, since it ends with its parent, and leave the cores to the parent's backbone.

    The threads of the backbone wait for one another, so that each worker that displaces one of them delays them all.
    """
    for number in ending_signals():
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice") and not torch.cuda.device_count():  # Windows has no such function
        os.nice(19)


def split_batches(count: int, size: int) -> list[range]:
    """Split the indices 0 to `count` - 1 into batches of `size`, the last of which may be smaller."""
    return [range(count)[i : i + size] for i in range(0, count, size)]


def check_workers(workers: int) -> None:
    """Raise `InputError` if the number of processes that read images is out of range."""
    if not 0 <= workers <= MAX_WORKERS:
        raise InputError(f"--workers must be at least 0 and at most {MAX_WORKERS:,}, not {workers:,}.")


def read_batches(
    dataset: ImageDataset,
    batches: Iterable[Sequence[Any]],
    workers: int = 0,
    unreadable: Callable[[int, InputError], object] | None = None,
) -> Iterator[tuple[list[Any], Tensor]]:
    """Read batches of images in `workers` processes, ahead of their use; yields each batch's keys and stacked images.

    For an image that cannot be read, `unreadable` is called with its index and error, and its batch, which may become
    empty, is yielded without it. Without `unreadable`, its `InputError` is raised.
    """
    check_workers(workers)
    batches = list(batches)
    loader = DataLoader(
        _CatchErrors(dataset),
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]  ranges work, too
        num_workers=min(workers, len(batches)),
        collate_fn=_stack,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
    )
    for keys, (images, failed) in zip(batches, _name_lost_workers(loader), strict=True):
        for position, error in failed.items():
            if unreadable is None:
                raise error
            key = keys[position]
            unreadable(key[0] if isinstance(key, tuple) else key, error)
        yield [key for position, key in enumerate(keys) if position not in failed], images


def _stack(items: list[Tensor | InputError]) -> tuple[Tensor, dict[int, InputError]]:
    """Stack a batch's images in the worker, which then passes on one tensor; also returns the errors by position."""
    images = [item for item in items if not isinstance(item, InputError)]
    failed = {position: item for position, item in enumerate(items) if isinstance(item, InputError)}
    return default_collate(images) if images else torch.empty(0), failed  # in a worker, into shared memory


def _name_lost_workers(loader: DataLoader) -> Iterator[tuple[Tensor, dict[int, InputError]]]:
    """Yield the loader's batches; raises `InputError` if a worker cannot be started, or the system killed one."""
    iterator: Any = None
    others = multiprocessing.active_children()
    try:
        iterator = iter(loader)
        if shut_down := getattr(iterator, "_shutdown_workers", None):
            atexit.register(shut_down)  # Python waits for workers, and an error's traceback may hold this generator
        yield from iterator
    except OSError as error:
        if iterator is not None or not loader.num_workers:
            raise
        for process in set(multiprocessing.active_children()).difference(others):  # which ignore SIGTERM
            process.kill()
        raise InputError(
            f"the processes that read images cannot be started ({error.strerror or error}); use fewer --workers."
        ) from None
    except RuntimeError as error:
        if "shared memory" in str(error):
            raise InputError(
                "the shared memory of the processes that read images is full; use fewer --workers, or enlarge it "
                "(/dev/shm; docker run --shm-size 1g)."
            ) from None
        if not re.search(r"DataLoader worker .*(exited unexpectedly|is killed by signal)", str(error)):
            raise
        raise InputError(
            "a DataLoader worker was killed, perhaps because memory ran out; use fewer --workers."
        ) from None
    finally:
        if shut_down := getattr(iterator, "_shutdown_workers", None):
            atexit.unregister(shut_down)
            shut_down()  # the traceback of an error holds the iterator, which would end no worker


class _DecodeOnly(ImageDataset):
    """Decodes images at an eighth of their size if the format allows it, which still reads every byte."""

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:
        read_image(self.paths[int(key[0] if isinstance(key, tuple) else key)], shorter_side=1)
        return torch.empty(0)


def build_pixel_transform(preprocessing: Preprocessing, train: bool = False) -> T.Compose:
    """Build a backbone's transform of a PIL image into uint8 pixels, which `EncoderCNN` normalizes."""
    return build_transform(train, **asdict(preprocessing), normalize=False)


class Views:
    """A transform that returns several views of an image, (views, 3, image_size, image_size) uint8.

    The first is that of evaluation; the others are augmented as in training.
    """

    def __init__(self, preprocessing: Preprocessing, views: int):
        self.views = views
        self.first = build_pixel_transform(preprocessing)
        self.random = build_pixel_transform(preprocessing, train=True)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the views of a PIL image."""
        views: list[Any] = [self.first(image), *(self.random(image) for _ in range(self.views - 1))]
        return torch.stack(views)


def find_unreadable(paths: Sequence[Path | Member], workers: int = 0, cache: Path = CACHE) -> dict[int, InputError]:
    """Read every image once, in `workers` processes; returns the indices and errors of those that cannot be read.

    The result is cached for images with the same names, sizes and dates; then only the unreadable ones are read again.
    """
    key = hashlib.sha256(",".join(sorted(image_suffixes())).encode())  # of the formats that can be read here
    for path in paths:
        try:
            key.update(stamp(path))
        except OSError:  # reading it below reports the reason
            key.update(f"{path}\n".encode("utf-8", "surrogateescape"))
    name = f"unreadable/{key.hexdigest()[:32]}.json"
    rows: Sequence[int] = range(len(paths))
    with suppress(OSError, ValueError):
        rows = json.loads((cache / name).read_bytes())
    failed: dict[int, InputError] = {}
    batches = [rows[i : i + 64] for i in range(0, len(rows), 64)]
    for _ in tqdm(
        read_batches(_DecodeOnly(paths, T.PILToTensor()), batches, workers, failed.__setitem__),
        total=len(batches),
        desc="checking images",
        delay=2,
        disable=None,
    ):
        pass
    write_cache(cache, name, lambda file: file.write(json.dumps(sorted(failed)).encode()))
    return failed
