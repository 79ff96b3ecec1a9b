"""The backbone in 8-bit integers, by ONNX Runtime: on a processor without bfloat16 twice as fast as in float32.

Static post-training quantization (arXiv 1712.05877, 2004.09602): weights by one scale a channel, what a layer gives
by one scale and offset, which follow from the range it had on some photos. Weights take 7 bits only: the products of
8 bits with 8 overflow the 16 bits that processors without VNNI add them up in, and so the integers are the same on
every processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn as nn
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from captioning.errors import InputError

Range = tuple[float, float]
Name = tuple[str, np.float32, str, str]  # of a tensor in the graph: its own, its scale, its scale's, its zero point's

LARGEST_WEIGHT = 63
SMALLEST_RANGE = 1e-6  # of a layer that gives nothing but zeros


def _run(resnet: nn.Sequential, layers: _Observer | _Builder, x: Any) -> Any:
    """The backbone on `x` up to its grid, every layer done by `layers`, which meet them in the same order."""
    x = layers.max_pool(layers.conv(layers.photo(x), resnet[0], relu=True), resnet[3])
    for block in (block for stage in resnet[4:8] for block in stage):
        skipped = x if block.downsample is None else layers.conv(x, block.downsample[0])
        inside = layers.conv(layers.conv(x, block.conv1, relu=True), block.conv2, relu=True)
        x = layers.add(layers.conv(inside, block.conv3), skipped)
    return x


class _Observer:
    """Runs the layers and notes the range of what each gives."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []

    def photo(self, x: Tensor) -> Tensor:
        return self._note(x)

    def _note(self, x: Tensor) -> Tensor:
        low, high = x.aminmax()
        self.ranges.append((min(0.0, low.item()), max(0.0, high.item())))  # zero has to be one of the 256 values
        return x

    def conv(self, x: Tensor, conv: nn.Conv2d, relu: bool = False) -> Tensor:
        return self._note(conv(x).relu() if relu else conv(x))

    def max_pool(self, x: Tensor, pool: nn.MaxPool2d) -> Tensor:
        return pool(x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._note((x + y).relu())


@torch.inference_mode()
def observe(resnet: nn.Sequential, images: Tensor) -> list[Range]:
    """The ranges, lowest and highest, of what each layer gives for normalised photos, (B, 3, H, W).

    `resnet` has its batch norms folded into its convolutions, as `EncoderCNN.for_inference` does.
    """
    observer = _Observer()
    _run(resnet, observer, images)
    return observer.ranges


class _Builder:
    """Writes the layers as a graph of ONNX."""

    def __init__(self, ranges: list[Range]) -> None:
        self.ranges = iter(ranges)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def _constant(self, value: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, operation: str, *inputs: str, **attributes: Any) -> str:
        """Adds an operation and returns the name of its output."""
        name = f"output_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, inputs, [name], **attributes))
        return name

    def _scale(self) -> tuple[np.float32, str, str]:
        low, high = next(self.ranges)
        scale = np.float32(max(high - low, SMALLEST_RANGE) / 255)
        zero = np.uint8(np.clip(round(-low / float(scale)), 0, 255))
        return scale, self._constant(scale), self._constant(zero)

    def photo(self, x: str) -> Name:
        scale = self._scale()
        return self.node("QuantizeLinear", x, *scale[1:]), *scale

    def conv(self, x: Name, conv: nn.Conv2d, relu: bool = False) -> Name:
        # A ReLU is in the range already: nothing below zero can be told from zero.
        weight = conv.weight.float().numpy()
        scales = np.maximum(np.abs(weight).max((1, 2, 3)) / LARGEST_WEIGHT, np.finfo(np.float32).tiny)
        integers = np.rint(weight / scales[:, None, None, None]).astype(np.int8)
        bias = np.rint(conv.bias.double().numpy() / (scales.astype(np.float64) * x[1]))
        bias = bias.clip(-(2**31), 2**31 - 1).astype(np.int32)
        scale = self._scale()
        name = self.node(
            "QLinearConv",
            *(x[0], *x[2:]),
            *map(self._constant, (integers, scales, np.zeros(len(scales), np.int8))),
            *scale[1:],
            self._constant(bias),
            kernel_shape=conv.kernel_size,
            strides=conv.stride,
            pads=2 * conv.padding,
        )
        return name, *scale

    def max_pool(self, x: Name, pool: nn.MaxPool2d) -> Name:
        sizes = {"kernel_shape": 2 * [pool.kernel_size], "strides": 2 * [pool.stride], "pads": 4 * [pool.padding]}
        return self.node("MaxPool", x[0], **sizes), *x[1:]

    def add(self, x: Name, y: Name) -> Name:
        scale = self._scale()
        inputs = (x[0], *x[2:], y[0], *y[2:])
        return self.node("QLinearAdd", *inputs, *scale[1:], domain="com.microsoft"), *scale


class QuantizedBackbone(nn.Module):
    """A ResNet-50 in 8-bit integers, on the CPU.

    Args:
        resnet: its children without the classifier, batch norms folded into their convolutions.
        ranges: as `observe` finds them with this network.
    """

    def __init__(self, resnet: nn.Sequential, ranges: list[Range]):
        super().__init__()
        blocks = [block for stage in resnet[4:8] for block in stage]
        if len(ranges) != 2 + sum(4 + (block.downsample is not None) for block in blocks):
            raise InputError("the model's ranges are of another backbone; take them out of captioner.json.")
        builder = _Builder(ranges)
        name, _, *scale = _run(resnet, builder, "photos")
        grid = builder.node("DequantizeLinear", name, *scale)
        graph = helper.make_graph(
            builder.nodes,
            "backbone",
            [helper.make_tensor_value_info("photos", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
            [helper.make_tensor_value_info(grid, TensorProto.FLOAT, None)],
            builder.constants,
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others read photos meanwhile
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised photos (B, 3, H, W) -> the grid (B, 2048, H/32, W/32)."""
        return torch.from_numpy(self.session.run(None, {"photos": images.contiguous().numpy()})[0])
