"""A backbone from nothing: learn to see which words people would use, where no ImageNet weights can be had.

    python pretrain.py --data data/scenes --out models/scenes-backbone.pth --image-size 96
    python train.py --data data/scenes --weights models/scenes-backbone.pth --image-size 96

A decoder's gradient says little about a photo, most of it is about grammar, so a ResNet-50 from random
weights learns slowly behind one. Asked instead which of the vocabulary's words occur in a photo's
captions (word detection, arXiv 1411.4952), it learns in a few epochs, from the same captions.
Frozen, it then serves `train.py` as the pretrained backbone does.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm.auto import tqdm

from checkpoint import write_file
from data_loader import CACHE, CaptionDataset, Photos, build_transform, read_batches
from errors import InputError, run_command
from model import FEATURE_SIZE, PARTS, EncoderCNN
from processes import this_process
from train import autocast, learning_rate_factor


@dataclass
class PretrainingConfig:
    """What the training of a backbone is made of; every field is an option of `python pretrain.py`."""

    out: Path  # the state dict of a torchvision ResNet-50 is written here
    data: Path = Path("data/scenes")  # the data set's folder, laid out as COCO is
    image_size: int = 96  # of the square that the backbone sees, in pixels
    vocab_threshold: int = 5  # how often a word must occur to be looked for
    batch_size: int = 32  # photos a step
    num_epochs: int = 5  # passes over all photos
    learning_rate: float = 1e-3  # Adam's, at its highest
    warmup_steps: int = 50  # over which it rises; then it falls to zero along a cosine
    workers: int = min(4, os.cpu_count() or 1)  # processes that read photos
    seed: int = 0  # of the weights, the order and the augmentation
    cache: Path = CACHE  # where tokenized captions are kept


def words_of_photos(data: CaptionDataset) -> Tensor:
    """Which words each photo's captions hold: (photos, vocabulary) bool."""
    words = torch.zeros(len(data.paths), len(data.vocab), dtype=torch.bool)
    photo = np.repeat(data.photo, data.lengths)
    words[torch.from_numpy(photo).long(), torch.from_numpy(data.tokens).long()] = True
    return words


def pretrain(config: PretrainingConfig) -> Path:
    """Train a backbone to detect the captions' words and write its state dict to `config.out`.

    Raises `InputError` for what the user can mend.
    """
    if config.num_epochs < 1 or config.batch_size < 2:
        raise InputError("num_epochs must be at least 1 and batch_size at least 2, for the batch norms.")
    if this_process().num_processes > 1:
        raise InputError("a backbone is pretrained by one process; start it with `python pretrain.py`.")
    device = this_process().device
    torch.manual_seed(config.seed)
    data = CaptionDataset(config.data, "train", None, None, config.vocab_threshold, config.cache)
    val = CaptionDataset(config.data, "val", None, data.vocab, cache=config.cache)
    encoder = EncoderCNN(1, "random", PARTS).to(device)
    detector = nn.Linear(FEATURE_SIZE, len(data.vocab)).to(device)
    parameters = [*encoder.resnet.parameters(), *detector.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
    present = words_of_photos(data)
    photos = Photos(data.paths, build_transform(True, config.image_size, normalise=False))
    steps = len(data.paths) // config.batch_size or 1
    for epoch in range(1, config.num_epochs + 1):
        order = np.random.default_rng((config.seed, epoch)).permutation(len(data.paths))
        batches = [
            [(int(i), config.seed + epoch) for i in batch] for batch in np.array_split(order, steps) if len(batch) > 1
        ]
        encoder.train()
        total = 0.0
        read = read_batches(photos, batches, config.workers)
        bar = tqdm(read, f"words {epoch}/{config.num_epochs}", total=len(batches), unit="step", disable=None)
        for step, (keys, images) in enumerate(bar, (epoch - 1) * len(batches)):
            factor = learning_rate_factor(step, len(batches) * config.num_epochs, config.warmup_steps)
            optimizer.param_groups[0]["lr"] = config.learning_rate * factor
            loss = _loss(encoder, detector, images.to(device), present[[i for i, _ in keys]].to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item()
        tqdm.write(
            f"words, epoch {epoch}: train loss {total / len(batches):.3f}, "
            f"validation loss {_validate(encoder, detector, val, config):.3f}"
        )
    state = {name: value.cpu() for name, value in encoder.state_dict().items() if name.startswith("resnet.")}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(config.out, lambda file: torch.save(state, file))
    return config.out


def _loss(encoder: EncoderCNN, detector: nn.Linear, images: Tensor, present: Tensor) -> Tensor:
    """The cross-entropy of each word being there or not, summed over the words, a photo."""
    with autocast(images.device, "auto"):
        logits = detector(encoder.features(images))
    return F.binary_cross_entropy_with_logits(logits.float(), present.float(), reduction="sum") / len(images)


@torch.inference_mode()
def _validate(encoder: EncoderCNN, detector: nn.Linear, val: CaptionDataset, config: PretrainingConfig) -> float:
    encoder.eval()
    device = detector.weight.device
    photos = Photos(val.paths, build_transform(False, config.image_size, normalise=False))
    present, total = words_of_photos(val), 0.0
    batches = [list(range(i, min(i + 64, len(photos)))) for i in range(0, len(photos), 64)]
    for keys, images in read_batches(photos, batches, config.workers):
        total += len(keys) * _loss(encoder, detector, images.to(device), present[keys].to(device)).item()
    return total / len(photos)


if __name__ == "__main__":
    run_command(lambda: pretrain(tyro.cli(PretrainingConfig, description=__doc__)))
