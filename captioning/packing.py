"""Layers for inference whose weights are laid out for fast matrix products on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from model import LSTM

ROWS = 16  # number of captions that are usually decoded at once, for which the layout is chosen


class PackedLinear(nn.Module):
    """A linear layer for inference, whose weights have the layout of oneDNN, as in models that Inductor compiles."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.source = (linear,)  # in a tuple, so that it is not registered as a submodule
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach().contiguous()  # oneDNN ignores its strides

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")

    def __reduce__(self) -> tuple[type[PackedLinear], tuple[nn.Linear]]:
        """Copy and pickle the layer that was packed, since tensors in oneDNN's layout cannot be."""
        return PackedLinear, self.source


class PackedLSTM(nn.Module):
    """An LSTM for inference, one packed linear layer for all gates of each of its layers."""

    def __init__(self, lstm: LSTM):
        super().__init__()
        self.num_layers, self.hidden_size = lstm.num_layers, lstm.hidden_size
        self.gates = nn.ModuleList(PackedLinear(_join_gates(*weights)) for weights in lstm.all_weights)

    def step(self, inputs: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take a step, as `LSTM.step` does."""
        steps = []
        for gates, hidden, cell in zip(self.gates, h.unbind(1), c.unbind(1), strict=True):
            i, f, g, o = gates(torch.cat([inputs, hidden], 1)).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            inputs = o.sigmoid() * cell.tanh()
            steps.append((inputs, cell))
        h, c = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        return inputs, h, c


def _join_gates(weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> nn.Linear:
    weight = torch.cat([weight_ih, weight_hh], 1).detach()
    linear = nn.Linear(weight.size(1), weight.size(0), device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter((bias_ih + bias_hh).detach())
    return linear


def pack_weights(module: nn.Module) -> Any:
    """Return a module of the same weights that is faster on a CPU, if most of its time is matrix products.

    Its results differ in rounding only. It shares embeddings, norms and biases with the module, whose weights must not
    change any more. A module on a GPU, or where PyTorch has no oneDNN, is returned as it is.
    """
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    return _pack(module) if on_cpu and has_onednn else module


def _pack(module: nn.Module) -> Any:
    if type(module) is nn.Linear:  # a subclass may compute something else
        return PackedLinear(module)
    if type(module) is LSTM:
        return PackedLSTM(module)
    is_container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    if type(module).__module__.startswith("torch.nn") and not is_container:
        return module  # PyTorch's own layers, such as attention, may read the weights of their parts
    packed = copy.copy(module)
    packed._modules = {name: _pack(child) for name, child in module.named_children()}
    return packed
