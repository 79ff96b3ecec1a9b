"""The features of a frozen backbone, computed once for a data set and memory-mapped.

A frozen backbone computes the same feature for an image in every epoch and for each of its captions, so each image is
processed once. The features are in a folder named by a hash of all that they depend on: the backbone's weights, the
transform, the images' paths, sizes and dates. So a changed image, weight or setting is computed again. While all
processes of one run fill the folder, its name ends in ".partial"; the files `done-*` list the batches that are on disk,
and an interrupted pass resumes from there, with any number of processes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from captioning.backbones import Preprocessing
from captioning.distributed import choose_dtype, this_process
from captioning.errors import InputError, summarize_errors
from captioning.files import CACHE, format_bytes, write_file
from captioning.image_formats import HEIF_SUFFIXES
from captioning.images import ImageDataset, Views, find_unreadable, read_batches, split_batches
from captioning.shards import Member, stamp
from captioning.weights import hash_weights
from model import EncoderCNN

VERSION = "7"  # of the files; features of another version are computed again
# Images per batch: on a CPU, a small batch stays in its cache; for a GPU, each of many workers reads one at a time.
BATCH = 64 if torch.cuda.device_count() else 16


@torch.inference_mode()
def encode(
    encoder: EncoderCNN,
    dataset: ImageDataset,
    batches: Sequence[Sequence[int]],
    workers: int = 0,
    unreadable: Callable[[int, InputError], object] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Run batches of images through the backbone; yields their indices and features, on the encoder's device.

    `encoder` should be a copy `for_inference`. Features are (B, C) or, with the encoder's `grid`, (B, cells, C); a
    transform of several `Views` makes them (B, views, ...). `unreadable` is as in `read_batches`.
    """
    device = encoder.embed.weight.device
    for indices, images in read_batches(dataset, batches, workers, unreadable):
        if indices:
            images = images.to(device, non_blocking=device.type == "cuda")
            features = encoder.features(images.flatten(0, -4)).float()
            yield indices, features.unflatten(0, images.shape[:-3])


def stored_features(
    encoder: EncoderCNN,
    paths: Sequence[Path | Member],
    preprocessing: Preprocessing,
    views: int = 1,
    cache: Path = CACHE,
    workers: int = 0,
    precision: str = "auto",
) -> Tensor:
    """Return the memory-mapped float16 features of all images: (images, views, C) or (images, views, cells, C).

    Cached features are reused; each process of a run computes its share, and a concurrent run waits. If an image cannot
    be read, the rest are checked without the backbone, and an `InputError` lists all that cannot be read.
    """
    state = this_process()
    assert state.device is not None
    dtype = choose_dtype(state.device, precision)
    with ExitStack() as stack:
        location: list[Any] = [None, None, None]
        if state.is_main_process:
            store = cache / "features" / _key(encoder, paths, preprocessing, views, dtype)
            partial = store.with_name(f"{store.name}.{BATCH}.partial")
            stack.enter_context(_lock(store))
            if not store.exists():
                partial.mkdir(exist_ok=True)
                with torch.no_grad():
                    size = preprocessing.image_size
                    one = encoder.features(torch.zeros(1, 3, size, size, device=state.device))
                _allocate(partial / "features.npy", (len(paths), views, *one.shape[1:]))
            location = [store, partial, store.exists()]
        store, partial, complete = broadcast_object_list(location)
        if not os.path.isdir(store if complete else partial):
            raise InputError(f"{cache} is not the same folder on all machines; name one that they share with --cache.")
        if not complete:
            if failed := _fill(encoder, paths, preprocessing, views, dtype, partial, workers):
                raise _unreadable(failed, paths, partial, workers, cache)
            if state.is_main_process:
                os.replace(partial, store)
            state.wait_for_everyone()
        try:
            return torch.from_numpy(np.load(store / "features.npy", mmap_mode="c"))
        except (ValueError, EOFError, FileNotFoundError) as error:
            raise InputError(f"{store} is damaged ({error}); delete it to compute it again.") from None


def _unreadable(
    failed: dict[int, InputError], paths: Sequence[Path | Member], partial: Path, workers: int, cache: Path
) -> InputError:
    """Read the rest of the images, too, and return the error that lists all that cannot be read.

    The features that were computed are deleted if all of `failed` have to be changed to be read.
    """
    if this_process().is_main_process:
        again = find_unreadable(paths, workers, cache)
        if failed.keys() <= again.keys() and all(_is_damaged(paths[i]) for i in failed):
            shutil.rmtree(partial)  # once an image is repaired or left out, these features are of no use
        failed = dict(sorted((again | failed).items()))
    failed = broadcast_object_list([failed])[0]
    return InputError(
        f"{len(failed)} of {len(paths)} images cannot be read (--skip-unreadable trains without them): "
        f"{summarize_errors(failed.values())}"
    )


def _is_damaged(path: Path | Member) -> bool:
    """Return whether an unreadable image has to be changed to be read, unlike one that may not be read at present.

    That is one on a failing drive, without permission, or a HEIC image without pillow-heif.
    """
    if isinstance(path, Member):
        return True
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return path.suffix.lower() not in HEIF_SUFFIXES


def _lock(store: Path) -> AbstractContextManager:
    """Lock the features against other runs; waits for a run that computes them."""
    lock = filelock.FileLock(store.with_name(f"{store.name}.lock"), timeout=2)
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        try:
            return lock.acquire()
        except filelock.Timeout:
            tqdm.write("waiting for another run that computes the same features")
            return lock.acquire(timeout=-1)
    except OSError as error:
        place = error.filename or store.parent
        raise InputError(f"{place} cannot be written ({error.strerror}); name another folder with --cache.") from None


def _key(
    encoder: EncoderCNN, paths: Sequence[Path | Member], preprocessing: Preprocessing, views: int, dtype: torch.dtype
) -> str:
    about = [VERSION, encoder.backbone_name, preprocessing.as_key(), views, encoder.grid, encoder.grid_size, str(dtype)]
    digest = hashlib.sha256(json.dumps(about).encode())
    hash_weights(digest, encoder.network)
    for path in paths:
        digest.update(stamp(path))
    return digest.hexdigest()[:32]


def _allocate(path: Path, shape: tuple[int, ...]) -> None:
    """Allocate the array's file on disk; writing to a hole of a sparse file would kill the process on a full disk."""
    if path.exists():
        return
    size = 2 * math.prod(shape)

    def write(file: BinaryIO) -> None:
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, "the disk has less")
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        file.flush()
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), file.tell(), size)
        else:
            file.truncate(file.tell() + size)

    try:
        write_file(path, write)
    except InputError as error:
        reason = getattr(error.__cause__, "strerror", error)
        raise InputError(
            f"{path} needs {format_bytes(size)} and cannot be created ({reason}); make room, or name a folder on "
            f"another disk with --cache{', or use fewer --views' if shape[1] > 1 else ''}."
        ) from None


def _fill(
    encoder: EncoderCNN,
    paths: Sequence[Path | Member],
    preprocessing: Preprocessing,
    views: int,
    dtype: torch.dtype,
    folder: Path,
    workers: int,
) -> dict[int, InputError]:
    """Compute this process's share of the missing features, until a process meets a batch with an unreadable image.

    Returns the unreadable images of all processes.
    """
    state = this_process()
    features = np.load(folder / "features.npy", mmap_mode="r+")
    done = {int(i) for file in folder.glob("done-*") for i in np.fromfile(file, "<i8", file.stat().st_size // 8)}
    stop = folder / "stop"  # is there once a process has met an unreadable image
    if state.is_main_process:
        stop.unlink(missing_ok=True)
    state.wait_for_everyone()  # no process writes to what another still reads
    batches = [batch for batch in split_batches(len(paths), BATCH) if batch[0] not in done]
    batches = batches[state.process_index :: state.num_processes]
    failed: dict[int, InputError] = {}
    fast = encoder.for_inference(dtype).to(state.device)
    results = encode(fast, ImageDataset(paths, Views(preprocessing, views)), batches, workers, failed.__setitem__)
    progress = tqdm(
        total=len(batches) * BATCH,
        desc="backbone",
        unit="image",
        disable=None if state.is_main_process else True,
    )
    with open(folder / f"done-{state.process_index}-{state.num_processes}", "ab") as log, progress:
        log.truncate(log.tell() // 8 * 8)  # a kill may have torn the last entry
        for indices, batch in results:
            if failed:
                stop.touch()
            if stop.exists():
                break
            half = batch.half()
            if not half.isfinite().all():
                raise InputError(
                    f"the backbone's features of {paths[indices[0]]} or an image after it are not finite numbers in "
                    f"half precision; use other --weights, or fine-tune the backbone."
                )
            features[indices] = half.cpu().numpy()
            features.flush()
            log.write(np.int64(indices[0]).astype("<i8").tobytes())
            log.flush()
            os.fsync(log.fileno())
            progress.update(BATCH)
    return dict(gather_object([*failed.items()]))
