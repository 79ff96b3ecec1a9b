"""A decoder whose output layer is laid out for fast matrix products on a CPU."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
from torch import Tensor

from model import DecoderModule

ROWS = 16  # number of captions that are usually decoded at once, for which the layout is chosen


class PackedLinear(nn.Module):
    """A linear layer for inference, whose weights have the layout of oneDNN, as in models that Inductor compiles."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.source = (linear,)  # in a tuple, so that it is not registered as a submodule
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias.detach().contiguous()  # oneDNN ignores its strides

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features)."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")

    def __reduce__(self) -> tuple[type[PackedLinear], tuple[nn.Linear]]:
        """Copy and pickle the layer that was packed, since tensors in oneDNN's layout cannot be."""
        return PackedLinear, self.source


def pack_output_layer(decoder: DecoderModule) -> DecoderModule:
    """Return a decoder with the same weights that is faster on a CPU, where most of its time is the output layer's.

    Its logits differ in rounding only. The other parts are shared; later changes to the output layer's weights have no
    effect on the copy. A decoder on a GPU, or where PyTorch has no oneDNN, is returned as it is.
    """
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if decoder.linear.weight.device.type != "cpu" or not has_onednn:
        return decoder
    packed = copy.copy(decoder)
    packed._modules = {**decoder._modules, "linear": PackedLinear(decoder.linear)}
    return packed
