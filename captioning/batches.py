"""The batches of an epoch, one for each training step and process, from stored features or from image files."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from captioning.config import TrainingConfig
from captioning.images import ImageDataset, build_pixel_transform, read_batches
from captioning.losses import Batch
from data_loader import CaptionDataset, EpochSampler

T = TypeVar("T")

AHEAD = 2  # number of batches gathered ahead of the step that needs them
GPU_SHARE = 0.5  # maximum share of the GPU's free memory for features


def share(captions: np.ndarray, image: np.ndarray, rank: int, processes: int, whole_images: bool) -> np.ndarray:
    """Select the captions of a batch that this process trains on; every caption goes to one process.

    captions: (B,) caption indices. image: (captions,) each caption's image. whole_images: keep an image's captions
        together, so that only one process runs it through the backbone.
    """
    if not whole_images:
        return captions[rank::processes]
    return captions[np.unique(image[captions], return_inverse=True)[1] % processes == rank]


class EpochBatches:
    """Builds the batches of this process for any epoch.

    Args:
        sampler: batches of caption indices over all processes; its `set_epoch` chooses the epoch's order.
        features: (images, views, ...) stored features, or None where the backbone is trained on pixels.
        rank, processes: this process's index, and the number of processes.
    """

    def __init__(
        self,
        data: CaptionDataset,
        sampler: EpochSampler,
        features: Tensor | None,
        config: TrainingConfig,
        rank: int = 0,
        processes: int = 1,
    ):
        self.data, self.sampler, self.features, self.config = data, sampler, features, config
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        """Return the number of steps per epoch."""
        return len(self.sampler)

    def epoch(self, epoch: int, first_step: int, device: torch.device) -> Iterator[tuple[np.ndarray, bool, Batch]]:
        """Iterate over an epoch's steps after the first `first_step`.

        Yields the global batch's caption indices, whether this process has captions in it, and this process's batch.
        With none, the batch is a placeholder (the first caption) whose loss must be ignored.
        """
        self.sampler.set_epoch(epoch)
        order = list(self.sampler)[first_step:]
        image, whole_images = self.data.image_rows, self.features is None
        shares = [share(batch, image, self.rank, self.processes, whole_images) for batch in order]
        local = [own if len(own) else global_batch[:1] for own, global_batch in zip(shares, order, strict=True)]
        batches = self._from_pixels(local, epoch) if whole_images else self._from_features(local, epoch)
        if device.type == "cuda":
            batches = prefetch(batch.map(_pin) for batch in batches)
        for global_batch, own, batch in zip(order, shares, batches, strict=True):
            yield global_batch, len(own) > 0, batch.to(device)

    def _from_pixels(self, order: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        seed = int(np.random.SeedSequence((self.config.seed, epoch)).generate_state(1, np.uint64)[0])
        keys = [[(int(i), seed) for i in np.unique(self.data.image_rows[batch])] for batch in order]
        images = ImageDataset(self.data.paths, build_pixel_transform(self.config.preprocessing, train=True))
        pixels = (batch for _, batch in read_batches(images, keys, self.config.workers))
        for batch, inputs in zip(order, pixels, strict=True):
            index, image_of_caption = np.unique(self.data.image_rows[batch], return_inverse=True)
            yield Batch(inputs, torch.from_numpy(image_of_caption), *self.data.captions(batch), index)

    def _from_features(self, order: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        """Draw a view for each caption; the draw does not depend on the number of processes."""
        assert self.features is not None
        views = self.features.shape[1]
        rng = np.random.default_rng((self.config.seed, epoch))
        view = rng.integers(views, size=len(self.data.image_rows), dtype=np.int32)
        rows = self.features.flatten(0, 1)
        for batch in order:
            wanted, image_of_caption = np.unique(
                self.data.image_rows[batch].astype(np.int64) * views + view[batch], return_inverse=True
            )
            inputs = rows.index_select(0, torch.from_numpy(wanted).to(rows.device))
            yield Batch(inputs, torch.from_numpy(image_of_caption), *self.data.captions(batch), wanted // views)


def place_features(features: Tensor, device: torch.device) -> Tensor:
    """Copy stored features to the GPU if they leave memory for training; otherwise they stay memory-mapped."""
    if device.type != "cuda" or features.nbytes > GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return features
    return features.to(device)


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Iterate in a background thread, up to `AHEAD` items in advance, in the same order."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, iterator, end) for _ in range(AHEAD))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, iterator, end))
            yield item  # pyright: ignore[reportReturnType]  it is not `end`


def _pin(x: Tensor) -> Tensor:
    return x if x.is_cuda else x.pin_memory()
