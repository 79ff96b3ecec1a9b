"""A peer: the encoder-decoder of Hugging Face's `transformers`, with random weights, on the same images and captions.

A ViT-S/16 (384 channels, 12 layers) and a GPT-2 of 6 layers of the same width, over the data set's words. Two choices
make the peer faster: it reads images like the project, and its encoder is frozen. As in the recipe, the encoder runs
for every caption.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.material import Material
from benchmarks.timing import DEVICE, best_rates, log
from benchmarks.training_speed import RECIPE_BATCH, WARM_UP
from captioning.distributed import autocast, fast_dtype
from captioning.features import BATCH
from captioning.images import ImageDataset, build_transform, read_batches, split_batches
from captioning.shards import Member
from data_loader import CaptionDataset
from vocabulary import END, START

WIDTH, HEADS, ENCODER_LAYERS, DECODER_LAYERS = 384, 6, 12, 6
LENGTH = 11  # words of a caption, the mean of the data set, as captions of random weights do not end


def measure_peer(material: Material, training_rate: float, captioning_rate: float) -> dict[str, float] | None:
    """Measure captions/s in training and images/s in captioning; returns None if transformers is not installed.

    training_rate, captioning_rate: the project's rates, for the ratios.
    """
    if find_spec("transformers") is None:
        log("transformers is not installed, so no peer is measured")
        return None
    settings = material.settings
    peer = build_peer(len(material.vocab), settings.image_size)
    steps = train_peer(peer, material)
    list(islice(steps, WARM_UP))
    trained = best_rates({"train": lambda: sum(islice(steps, settings.recipe_steps))}, settings.repeats)["train"]
    peer = peer.to(fast_dtype(DEVICE)).eval()
    paths = material.paths
    captioned = best_rates({"caption": lambda: len(caption_with_peer(peer, material, paths))}, settings.repeats)
    return {
        "parameters": sum(parameter.numel() for parameter in peer.parameters()),
        "captions_per_second": trained,
        "training_ratio": training_rate / trained,
        "photos_per_second": captioned["caption"],
        "captioning_ratio": captioning_rate / captioned["caption"],
    }


def build_peer(words: int, image_size: int) -> Any:
    """Build a VisionEncoderDecoderModel with random weights and a frozen encoder."""
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    tokens = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    sizes = {"num_hidden_layers": ENCODER_LAYERS, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
    vit = transformers.ViTConfig(hidden_size=WIDTH, image_size=image_size, **sizes)
    gpt = transformers.GPT2Config(vocab_size=words, n_embd=WIDTH, n_layer=DECODER_LAYERS, n_head=HEADS, **tokens)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt)
    config.decoder_start_token_id, config.pad_token_id = START, END
    peer = transformers.VisionEncoderDecoderModel(config=config).to(DEVICE)
    peer.encoder.requires_grad_(False)
    return peer


def read_pixels(
    material: Material, paths: Sequence[Path | Member], batches: Iterable[Sequence[int]], train: bool
) -> Iterator[Tensor]:
    """Yield batches of images for the ViT, (B, 3, H, W) from -1 to 1."""
    images = ImageDataset(paths, build_transform(train, material.settings.image_size, normalize=False))
    for _, pixels in read_batches(images, batches, material.settings.workers):
        yield pixels.to(DEVICE, non_blocking=True).float() / 127.5 - 1


def train_peer(peer: Any, material: Material) -> Iterator[int]:
    """Train on random captions; yields the number of captions of each step."""
    settings = material.settings
    data = CaptionDataset(material.data, "train", None, material.vocab, cache=material.folder / "cache-peer")
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4)
    rng = np.random.default_rng(0)
    steps = WARM_UP + settings.repeats * settings.recipe_steps
    order = [rng.integers(len(data.image_rows), size=RECIPE_BATCH) for _ in range(steps)]
    peer.train()
    pixels = read_pixels(material, data.paths, [data.image_rows[batch].tolist() for batch in order], train=True)
    for batch, images in zip(order, pixels, strict=True):
        captions, lengths = data.captions(batch)
        labels = captions[:, 1:].masked_fill(torch.arange(captions.shape[1] - 1) >= lengths[:, None] - 1, -100)
        with autocast(DEVICE, "auto"):
            loss = peer(pixel_values=images, labels=labels.to(DEVICE)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield len(batch)


@torch.inference_mode()
def caption_with_peer(peer: Any, material: Material, paths: Sequence[Path]) -> list[str]:
    """Caption images greedily, in batches."""
    batches = split_batches(len(paths), BATCH)
    options = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "num_beams": 1, "do_sample": False}
    tokens = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END}
    texts = []
    for pixels in read_pixels(material, paths, batches, train=False):
        rows = peer.generate(pixel_values=pixels.to(peer.dtype), **options, **tokens)
        texts += [material.vocab.decode(row) for row in rows[:, 1:].tolist()]
    return texts
