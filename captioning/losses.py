"""Encoder, decoder and objective as one module, from a batch of captions to its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from captioning.sequences import pack_tokens
from data_loader import CaptionDataset, EpochSampler, ImageBatches, LengthBatches
from model import DecoderModule, EncoderCNN

# Maximum number of float32 logits at a time; on a CPU they stay in its cache.
CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 26


@dataclass
class Batch:
    """A process's share of a training step: B captions and the P images that they describe.

    images: uint8 pixels (P, 3, H, W), or features (P, channels) or (P, cells, channels).
    image_of_caption: (B,) index into `images` of each caption's image.
    captions: (B, T) token indices, padded.
    lengths: (B,) on the CPU, whatever the device of the rest.
    image_index: (P,) each image's index in the data set.
    """

    images: Tensor
    image_of_caption: Tensor
    captions: Tensor
    lengths: Tensor
    image_index: np.ndarray | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `function` applied to the tensors that a device computes with."""
        names = ("images", "image_of_caption", "captions")
        return replace(self, **{name: function(getattr(self, name)) for name in names})

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; from pinned memory the copy is asynchronous."""
        is_pinned = device.type == "cuda"  # elsewhere, a source that is not kept may be overwritten while it is copied
        return self.map(lambda x: x.to(device, non_blocking=is_pinned))


class Objective(Protocol):
    """The interface of a training objective."""

    def build_sampler(self, data: CaptionDataset, batch_size: int, seed: int, frozen: bool) -> EpochSampler:
        """Build the batches of caption indices, one per step; `frozen` if the images' features are stored."""
        ...

    def count(self, lengths: np.ndarray, decoder: DecoderModule) -> tuple[int, int]:
        """Count the terms that the loss sums for captions of these lengths, and the captions."""
        ...

    def __call__(self, encoder: EncoderCNN, decoder: DecoderModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the summed attention penalty of a batch, both scalars on its device."""
        ...

    def format(self, loss: float) -> str:
        """Format the mean loss of a step for the log."""
        ...


class CrossEntropy:
    """The cross-entropy of each token of a ground-truth caption, given the ground-truth tokens before it."""

    def build_sampler(self, data: CaptionDataset, batch_size: int, seed: int, frozen: bool) -> EpochSampler:
        """Batch captions of one length where features are stored, else all captions of an image together."""
        if frozen:
            return LengthBatches(data.lengths, batch_size, seed)
        return ImageBatches(data.image_rows, batch_size, seed)

    def count(self, lengths: np.ndarray, decoder: DecoderModule) -> tuple[int, int]:
        """Count the tokens that the decoder predicts, and the captions."""
        return loss_tokens(lengths, decoder), len(lengths)

    def __call__(self, encoder: EncoderCNN, decoder: DecoderModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy of the captions' tokens, and the summed attention penalty."""
        embedded = embed_images(encoder, batch.images)
        hidden, attention = decoder.unroll(embedded, batch.captions, batch.lengths, batch.image_of_caption)
        targets = pack_tokens(batch.captions, batch.lengths, skip=int(decoder.attends))
        return linear_cross_entropy(hidden, decoder.linear, targets), attention_penalty(attention, hidden)

    def format(self, loss: float) -> str:
        """Format the perplexity per token."""
        return f"Perplexity: {math.exp(min(loss, 700)):.4f}"


class CaptioningModel(nn.Module):
    """Encoder and decoder with their objective: the one module that DistributedDataParallel wraps."""

    def __init__(self, encoder: EncoderCNN, decoder: DecoderModule, objective: Objective | None = None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.objective = CrossEntropy() if objective is None else objective

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the summed attention penalty of a batch."""
        return self.objective(self.encoder, self.decoder, batch)


def embed_images(encoder: EncoderCNN, images: Tensor) -> Tensor:
    """Embed pixels (P, 3, H, W) uint8 or features (P, ..., channels), each image once: (P, ..., embed_size)."""
    features = encoder.features(images) if images.dtype == torch.uint8 else images
    return encoder.embed(features.to(compute_dtype(encoder.embed.weight)))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of a matrix product with `x`: autocast's inside autocast, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def attention_penalty(attention: Tensor | None, hidden: Tensor) -> Tensor:
    """Compute (1 - a cell's summed weight) squared, averaged over the cells and summed over the captions.

    The doubly stochastic regularization of Show, Attend and Tell (equation 14); 0 without attention (B, cells).
    """
    if attention is None:
        return hidden.new_zeros((), dtype=torch.float32)
    return (1 - attention).square().mean(1).sum()


def linear_cross_entropy(
    hidden: Tensor, linear: nn.Linear, targets: Tensor, scale: Tensor | None = None, banned: Sequence[int] = ()
) -> Tensor:
    """Compute the summed cross-entropy of `linear(hidden)` with little more memory than the logits take.

    Args:
        hidden: (tokens, H). targets: (tokens,) indices.
        scale: (tokens,) factor of each token's cross-entropy.
        banned: indices whose probability is zero.

    Returns a float32 scalar.
    """
    never = torch.tensor(banned, device=hidden.device) if banned else None
    needs_gradient = torch.is_grad_enabled()
    dtype = compute_dtype(hidden)
    return LinearCrossEntropy.apply(hidden, linear.weight, linear.bias, targets, scale, never, dtype, needs_gradient)


class LinearCrossEntropy(torch.autograd.Function):
    """The autograd function of `linear_cross_entropy`.

    All logits are computed at once, in the type of the forward pass. A few rows at a time are copied to float32, and
    the gradient of the loss, softmax - one-hot, overwrites them. So neither float32 logits nor a separate gradient is
    ever held for all tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        scale: Tensor | None,
        banned: Tensor | None,
        dtype: torch.dtype,
        needs_gradient: bool,
    ) -> Tensor:
        """Compute the loss, and the gradients that `backward` multiplies."""
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        logits = hidden @ weight.T  # (tokens, V), without the bias
        rows = max(1, (CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK) // logits.shape[1])
        loss, bias_gradient = torch.zeros((), device=logits.device), torch.zeros_like(bias, dtype=torch.float32)
        for i in range(0, len(logits), rows):
            chunk, target = logits[i : i + rows], targets[i : i + rows, None]
            x = chunk.float().add_(bias)
            if banned is not None:
                x.index_fill_(1, banned, -torch.inf)
            of_target, largest = x.gather(1, target), x.amax(1, keepdim=True)
            total = x.sub_(largest).exp_().sum(1, keepdim=True)
            losses = total.log() + largest - of_target
            factor = torch.ones_like(total) if scale is None else scale[i : i + rows, None].float()
            loss += (losses * factor).sum()
            if needs_gradient:
                gradient = x.mul_(factor / total).scatter_add_(1, target, -factor)
                bias_gradient += gradient.sum(0)
                chunk.copy_(gradient)
        if needs_gradient:
            ctx.save_for_backward(hidden, weight, logits, bias_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias."""
        hidden, weight, gradient, bias_gradient = ctx.saved_tensors
        parts = gradient @ weight, (gradient.T @ hidden).float(), bias_gradient.clone()
        return *(part.mul_(grad) for part in parts), None, None, None, None, None


def loss_tokens(lengths: Any, decoder: DecoderModule) -> int:
    """Count the predicted tokens of captions of these lengths; `<start>` is predicted only from a single vector."""
    return int(lengths.sum()) - (len(lengths) if decoder.attends else 0)
