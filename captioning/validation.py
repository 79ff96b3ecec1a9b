"""Validation after an epoch: the loss of a model and the metrics of its captions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from captioning.config import TrainingConfig
from captioning.decoding import greedy
from captioning.distributed import autocast, choose_dtype
from captioning.features import BATCH, encode
from captioning.images import ImageDataset, build_pixel_transform, split_batches
from captioning.losses import Batch, CaptioningModel, CrossEntropy, loss_tokens
from captioning.metrics import score
from data_loader import CaptionDataset

FEATURE_BATCH = 64  # batch size for images whose features are stored


@torch.inference_mode()
def validate(
    accelerator: Accelerator,
    model: CaptioningModel,
    val: CaptionDataset,
    features: Tensor | None,
    config: TrainingConfig,
) -> dict[str, Any]:
    """Score a model: loss and perplexity per token, and the metrics and captions of greedy decoding.

    The model is left in evaluation mode. Each process takes its share of the batches, which are the same for any
    number of processes; all of them return the result.

    features: (images, ...) stored features of the validation images, or None to run the backbone.
    """
    encoder, decoder, cross_entropy = model.eval().encoder, model.decoder, CrossEntropy()
    images = min(len(val.paths), config.val_images)
    size = BATCH if features is None else FEATURE_BATCH
    local = split_batches(images, size)[accelerator.process_index :: accelerator.num_processes]
    if features is not None:
        chunks = ((indices, features[indices[0] : indices[-1] + 1]) for indices in local)
    else:
        dataset = ImageDataset(val.paths, build_pixel_transform(config.preprocessing))
        dtype = choose_dtype(accelerator.device, config.precision)
        chunks = encode(encoder.for_inference(dtype), dataset, local, config.workers)
    order = np.argsort(val.image_rows, kind="stable")  # image i's captions are order[offsets[i]:offsets[i + 1]]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(val.image_rows, minlength=len(val.paths)))])
    loss, tokens, hypotheses = 0.0, 0, {}
    for indices, chunk in chunks:
        inputs = chunk.to(accelerator.device).float()
        first, last = indices[0], indices[-1]  # a batch's images are consecutive
        which = order[offsets[first] : offsets[last + 1]]
        batch = Batch(inputs, torch.from_numpy(val.image_rows[which].astype(np.int64) - first), *val.captions(which))
        with autocast(accelerator.device, config.precision):
            summed, _ = cross_entropy(encoder, decoder, batch.to(accelerator.device))
            captions = greedy(decoder, encoder.embed(inputs))
        loss, tokens = loss + summed.item(), tokens + loss_tokens(batch.lengths, decoder)
        for image, caption in zip(indices, captions, strict=True):
            hypotheses[int(val.image_ids[image])] = val.vocab.decode(caption.tokens)
    parts = gather_object([(loss, tokens, hypotheses)])  # as Python's floats: Apple's GPUs have no float64
    result = _summarize(parts, val, images) if accelerator.is_main_process else {}
    return broadcast_object_list([result])[0]


def _summarize(parts: list[tuple[float, int, dict[int, str]]], val: CaptionDataset, images: int) -> dict[str, Any]:
    """Combine the parts of all processes: summed loss, tokens, and captions by image id."""
    losses, tokens, captions = zip(*parts, strict=True)
    loss = sum(losses) / sum(tokens)
    hypotheses = {image_id: caption for part in captions for image_id, caption in part.items()}
    ids = [int(i) for i in val.image_ids[:images]]
    references = val.references()
    metrics = score({i: hypotheses[i] for i in ids}, {i: references[i] for i in ids}, java=False).metrics
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700)),
        **{name: value for name, value in metrics.items() if value is not None},
        "captions": {str(i): hypotheses[i] for i in ids[:3]},
    }
