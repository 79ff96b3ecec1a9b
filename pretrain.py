"""Teach a backbone's last stages to see what people name in photos of another kind than it was trained on.

    python pretrain.py --data data/scenes --weights models/photos --image-size 96 --out models/scenes-backbone.pth
    python train.py --data data/scenes --weights models/scenes-backbone.pth --image-size 96

A decoder's gradient says little about a photo, most of it is about grammar. Asked instead which of the
vocabulary's words occur in a photo's captions (word detection, arXiv 1411.4952), a backbone learns in minutes,
from the same captions. Its first parts stay as they are and see each photo once. Frozen, it then serves
`train.py` as the pretrained one does.
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

from captioning.checkpoint import backbone_weights
from captioning.distributed import this_process
from captioning.errors import InputError, run_command
from captioning.features import stored_features
from captioning.files import CACHE, write_file
from captioning.training import autocast, learning_rate_factor
from data_loader import CaptionDataset
from model import PARTS, EncoderCNN


@dataclass
class PretrainingConfig:
    """What the training of a backbone is made of; every field is an option of `python pretrain.py`."""

    out: Path  # the backbone's state dict is written here
    data: Path = Path("data/scenes")  # the data set's folder, laid out as COCO is
    weights: str = "pretrained"  # to start from: "pretrained", a model's folder, or a file with a state dict
    fine_tune: int = 1  # how many of the backbone's five parts learn, counted from the last
    image_size: int = 224  # of the square that the backbone sees, in pixels; train.py's
    views: int = 1  # of a photo; more than 1 augments
    vocab_threshold: int = 5  # how often a word must occur to be looked for
    batch_size: int = 24  # photos a step
    num_epochs: int = 4  # passes over all photos
    learning_rate: float = 1e-3  # AdamW's, at its highest
    warmup_steps: int = 50  # over which it rises; then it falls to zero along a cosine
    weight_decay: float = 0.01  # as in AdamW (arXiv 1711.05101)
    workers: int = min(4, os.cpu_count() or 1)  # processes that read photos
    seed: int = 0  # of the detector's order of photos and of their views
    cache: Path = CACHE  # where tokenized captions and features are kept

    def __post_init__(self) -> None:
        if not 1 <= self.fine_tune < PARTS:
            raise InputError(f"fine_tune must be 1 to {PARTS - 1}, not {self.fine_tune}; `train.py` trains all parts.")
        for field in ("views", "batch_size", "num_epochs"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} must be at least 1, not {getattr(self, field)}.")


def word_shares(data: CaptionDataset) -> Tensor:
    """Which share of each photo's captions holds each word: (photos, vocabulary) float, 0 to 1."""
    caption = np.repeat(np.arange(len(data.photo)), data.lengths)
    once = np.unique(np.stack([caption, data.tokens]), axis=1)
    counts = torch.zeros(len(data.paths), len(data.vocab))
    places = torch.from_numpy(data.photo[once[0]]).long(), torch.from_numpy(once[1]).long()
    counts.index_put_(places, torch.ones(once.shape[1]), accumulate=True)
    return counts / torch.from_numpy(np.bincount(data.photo))[:, None]


def pretrain(config: PretrainingConfig) -> Path:
    """Train the last parts of a backbone to detect the captions' words; write its state dict to `config.out`.

    Raises `InputError` for what the user can mend.
    """
    if this_process().num_processes > 1:
        raise InputError("a backbone is pretrained by one process; start it with `python pretrain.py`.")
    device = this_process().device
    torch.manual_seed(config.seed)
    data = CaptionDataset(config.data, "train", None, None, config.vocab_threshold, config.cache)
    val = CaptionDataset(config.data, "val", None, data.vocab, cache=config.cache)
    encoder = EncoderCNN(1, backbone_weights(config.weights), config.fine_tune).to(device)
    frozen = encoder.frozen_part()
    stored = {"cache": config.cache, "workers": config.workers}
    seen = stored_features(frozen, data.paths, config.image_size, config.views, **stored)  # (photos, views, cells, C)
    val_seen = stored_features(frozen, val.paths, config.image_size, **stored)[:, 0]
    shares, val_shares = word_shares(data), word_shares(val)

    detector = nn.Linear(encoder.embed.in_features, len(data.vocab)).to(device)
    with torch.no_grad():  # at first, every word as often as it is
        detector.weight.zero_()
        detector.bias.copy_(torch.logit(shares.mean(0), eps=1e-3))
    learned = [p for p in encoder.resnet.parameters() if p.requires_grad] + list(detector.parameters())
    optimizer = torch.optim.AdamW(learned, weight_decay=config.weight_decay, fused=True)

    def loss(cells: Tensor, wanted: Tensor) -> Tensor:
        """The cross-entropy of each word being there, summed over the words, a photo."""
        with autocast(device, "auto"):
            logits = detector(encoder.finish(cells))
        total = F.binary_cross_entropy_with_logits(logits.float(), wanted.to(device), reduction="sum")
        return total / len(wanted)

    steps = max(1, len(data.paths) // config.batch_size)
    rng = np.random.default_rng(config.seed)
    for epoch in range(config.num_epochs):
        total = 0.0
        batches = np.array_split(rng.permutation(len(data.paths)), steps)
        for step, batch in enumerate(tqdm(batches, f"words {epoch + 1}/{config.num_epochs}", disable=None)):
            factor = learning_rate_factor(epoch * steps + step, config.num_epochs * steps, config.warmup_steps)
            optimizer.param_groups[0]["lr"] = config.learning_rate * factor
            view = torch.from_numpy(rng.integers(config.views, size=len(batch)))
            batch_loss = loss(seen[torch.from_numpy(batch), view], shares[batch])
            batch_loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += batch_loss.item()
        with torch.inference_mode():
            parts = zip(val_seen.split(64), val_shares.split(64), strict=True)
            val_loss = sum(len(cells) * loss(cells, wanted).item() for cells, wanted in parts) / len(val_seen)
        tqdm.write(f"words, epoch {epoch + 1}: train loss {total / steps:.3f}, validation loss {val_loss:.3f}")
    state = {name: value.cpu() for name, value in encoder.state_dict().items() if name.startswith("resnet.")}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(config.out, lambda file: torch.save(state, file))
    for paths, views, cells in ((data.paths, config.views, seen), (val.paths, 1, val_seen[:, None])):
        for encoder.grid, encoder.fine_tune in ((True, config.fine_tune), (False, 0)):  # for either decoder
            cells = stored_features(encoder, paths, config.image_size, views, **stored, seen=cells)
    return config.out


if __name__ == "__main__":
    run_command(lambda: pretrain(tyro.cli(PretrainingConfig, description=__doc__)))
