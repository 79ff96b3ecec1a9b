"""Export of a trained model to one ONNX file, which captions images without PyTorch.

    python caption.py --export model.onnx --model models/scenes

The file contains the encoder and the decoder with its greedy loop; its metadata are the vocabulary and the
preprocessing. models/README.md shows how to use it.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

# A loop in the graph stops when the longest caption ends. If it is unrolled, the graph has six times as many nodes,
# takes up to thirty times as long to export, and runs at a quarter of the speed or less.
from torch._higher_order_ops import while_loop

from captioning.captioner import Decoding
from captioning.checkpoint import load_model
from captioning.errors import InputError, printable
from captioning.files import check_output, write_file
from captioning.hub import find_model
from captioning.images import build_transform
from model import DecoderModule
from vocabulary import DEFAULT_LENGTH, END, START, UNK

MAX_ONNX = 2_000_000_000  # size limit of the weights, in bytes; protobuf allows 2 GiB in all


class FixedShapeDecoder(nn.Module):
    """Wraps a decoder whose state grows with every word into one whose state has a constant shape.

    A loop in a graph carries tensors of constant shape only. At each step, this decoder runs `forward` on all words so
    far, padded to `max_length`, instead of `step` on the last word.
    """

    def __init__(self, decoder: DecoderModule, max_length: int):
        super().__init__()
        self.decoder, self.max_length = decoder, max_length

    def init_state(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features (B, ...) -> the features, the words so far (B, max_length + 1), and their number (B,)."""
        batch = features.shape[0]
        return features, torch.full((batch, self.max_length + 1), END), torch.zeros(batch, dtype=torch.long)

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Tokens (B,) and the state -> the logits of the next token (B, vocab_size) and the next state."""
        features, words, position = state
        words = torch.where(torch.arange(self.max_length + 1) == position[:, None], tokens[:, None], words)
        logits = self.decoder(features, words)[:, -self.max_length :]  # (B, max_length, vocab_size)
        index = position[:, None, None].expand(-1, 1, logits.shape[2])
        return logits.gather(1, index)[:, 0], (features, words, position + 1)


class GreedyCaptioner(nn.Module):
    """`decoding.greedy` from images to tokens as one traceable module."""

    banned: Tensor

    def __init__(
        self, encoder: nn.Module, decoder: DecoderModule | FixedShapeDecoder, vocab_size: int, max_length: int
    ):
        super().__init__()
        self.encoder, self.decoder, self.max_length = encoder, decoder, max_length
        banned = torch.zeros(vocab_size)
        banned[[START, UNK]] = -torch.inf
        self.register_buffer("banned", banned)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images (B, 3, H, W) -> tokens (B, max_length), padded with `<end>`; log p (B,)."""
        state = self.decoder.init_state(self.encoder(images))
        batch = images.shape[0]

        def unfinished(t: Tensor, last: Tensor, *_: Tensor) -> Tensor:
            return (t < self.max_length) & (last != END).any()

        def step(t: Tensor, last: Tensor, tokens: Tensor, total: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            logits, after = self.decoder.step(last, state)
            log_p, word = (logits.log_softmax(1) + self.banned).max(1)
            ended = last == END
            word = torch.where(ended, END, word)
            tokens = torch.where(torch.arange(self.max_length) == t, word[:, None], tokens)
            total = total + torch.where(ended, 0.0, log_p)
            return (t + 1, word, tokens, total, *map(_copy, after))

        start = torch.full((batch,), START)
        tokens = torch.full((batch, self.max_length), END)
        _, _, tokens, total, *_ = while_loop(
            unfinished, step, (torch.tensor(0), start, tokens, torch.zeros(batch), *map(_copy, state))
        )
        return tokens, total


def _copy(x: Tensor) -> Tensor:
    """Copy a tensor, as those that a loop carries must not share memory and must keep their layout."""
    return x.clone(memory_format=torch.contiguous_format)


def export_onnx(model: str | Path, path: str | Path, max_length: int = DEFAULT_LENGTH) -> None:
    """Write a model's best epoch as one self-contained ONNX file.

    Input: `images` (B, 3, image_size, image_size) uint8, any B. Outputs: `tokens` (B, max_length) int64, padded with
    `<end>`; and `log_probability` (B,) float32, of the tokens up to and including the first `<end>`. A caption that was
    cut at max_length has no `<end>`. Metadata: `vocabulary` (a JSON list); `resize` (JSON: the length of the shorter
    side, or both lengths), `interpolation` ("bilinear" or "bicubic") and `image_size`, the side of the center crop; and
    `reduce_to` (JSON: null, or the longer side of the JPEG, of quality 75, that a larger image has to become first).

    model: a model's folder or its name on the Hub. Raises `InputError` if the model cannot be read or exported,
    max_length is out of range, onnxscript is missing, or the file cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it and would fail later
        from onnx_ir.passes.common import RemoveUnusedNodesPass  # comes with onnxscript
    except ImportError as error:
        raise InputError(f"--export needs {error.name}, which is missing: pip install onnxscript") from None
    Decoding(max_length=max_length).check()
    path = Path(path)
    check_output(path)
    encoder, decoder, vocabulary, description = load_model(find_model(model))
    size = description.preprocessing.image_size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # a batch size of 1 would become a constant
    captioner = _build_captioner(encoder.for_inference(torch.float32), decoder, images, len(vocabulary), max_length)
    if sum(x.nbytes for x in captioner.state_dict().values()) > MAX_ONNX:
        raise InputError(f"{model} has over 2 GB of weights, which do not fit into one ONNX file.")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's internals
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
        program = run_exporter(
            captioner,
            images,
            f"{model}, with the backbone {encoder.backbone_name} and the decoder {description.architecture.decoder}, "
            "cannot be exported to ONNX",
            "train a model with another --backbone or --decoder",
            output_names=["tokens", "log_probability"],
        )
    assert program is not None
    RemoveUnusedNodesPass()(program.model)  # otherwise, onnxruntime warns of each whenever it reads the file
    exported = program.model_proto
    resize = build_transform(False, **{**vars(description.preprocessing), "reduce_to": None}).transforms[0]
    metadata = {
        "vocabulary": json.dumps(vocabulary.words, ensure_ascii=False),
        "resize": json.dumps(resize.size),
        "interpolation": resize.interpolation.value,
        "image_size": str(size),
        "reduce_to": json.dumps(description.preprocessing.reduce_to),
    }
    onnx.helper.set_model_props(exported, metadata)
    content = exported.SerializeToString()
    write_file(path, lambda file: file.write(content))
    shapes = f"uint8 images (batch, 3, {size}, {size}) in, tokens (batch, {max_length}) out"
    print(printable(f"wrote {path}: {shapes}, {len(content) / 1e6:.0f} MB"), file=sys.stderr)


def run_exporter(
    module: nn.Module, images: Tensor, problem: str, remedy: str, **options: Any
) -> torch.onnx.ONNXProgram | None:
    """Export a module that takes a batch of images of any size to ONNX; `options` are those of `torch.onnx.export`.

    Raises `InputError` if the exporter fails: `problem`, the type of its error, and `remedy`.
    """
    try:
        shapes = ({0: torch.export.Dim("batch")},)
        # Given the module itself, torch.onnx.export traces an LSTM twice, as its first way of tracing fails.
        program = torch.export.export(module, (images,), dynamic_shapes=shapes)
        return torch.onnx.export(program, input_names=["images"], dynamo=True, verbose=False, **options)
    except Exception as error:  # it raises many types
        raise InputError(f"{problem} ({type(error).__name__}); {remedy}.") from error


@torch.no_grad()
def _build_captioner(
    encoder: nn.Module, decoder: DecoderModule, images: Tensor, vocab_size: int, max_length: int
) -> GreedyCaptioner:
    for module in (encoder, decoder):
        module.eval().requires_grad_(False)
    state = decoder.init_state(encoder(images))
    _, after = decoder.step(torch.full((len(images),), START), state)
    if any(x.shape != y.shape for x, y in zip(state, after, strict=True)):
        return GreedyCaptioner(encoder, FixedShapeDecoder(decoder, max_length), vocab_size, max_length)
    return GreedyCaptioner(encoder, decoder, vocab_size, max_length)
