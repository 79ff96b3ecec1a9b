"""Packing of padded sequences, so that no step is computed on padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence


def pack_sequences(x: Tensor, lengths: Tensor | None) -> tuple[PackedSequence, Tensor]:
    """Pack padded sequences (B, T, ...), longest first; returns them and the order (B,) of their rows.

    `lengths` (B,) should be on the CPU, to avoid a synchronization; None means no padding.
    """
    lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
    lengths, order = lengths.cpu().sort(descending=True, stable=True)
    order = order.to(x.device, non_blocking=x.device.type == "cuda")
    return pack_padded_sequence(x.index_select(0, order), lengths, batch_first=True), order


def pack_tokens(captions: Tensor, lengths: Tensor, skip: int = 0) -> Tensor:
    """Pack the tokens of padded captions (B, T) after the first `skip`, time step by time step: (tokens,)."""
    return pack_sequences(captions[:, skip:], lengths - skip)[0].data
