"""A trained model as one ONNX file: photos in, words out, wherever ONNX runs, without PyTorch.

    python caption.py --export model.onnx --model models/scenes

The file holds the encoder and the decoder with its greedy loop, and in its metadata what else captioning
needs: the vocabulary and how a photo is cut. models/README.md shows how to use it.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import onnx
import torch
import torch.nn as nn
from torch import Tensor

# A loop in the graph, which ends with the last caption: unrolled, the same steps make six times as many
# nodes, up to thirty times the time to export, and run a quarter as fast or less.
from torch._higher_order_ops import while_loop

from captioning.checkpoint import load_model
from captioning.errors import InputError
from captioning.files import write_file
from captioning.hub import find_model
from captioning.images import build_transform
from vocabulary import END, START, UNK

LARGEST_ONNX = 2_000_000_000  # bytes of weights; protobuf ends at 2 GiB


class GreedyCaptioner(nn.Module):
    """Photos to words as one module: what `decoding.greedy` does, in operations that a graph can hold."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, words: int, max_length: int):
        super().__init__()
        self.encoder, self.decoder, self.max_length = encoder, decoder, max_length
        banned = torch.zeros(words)
        banned[[START, UNK]] = -torch.inf
        self.register_buffer("banned", banned)

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 photos (B, 3, H, W) -> tokens (B, max_length), padded with `<end>`; log p (B,)."""
        state = self.decoder.init_state(self.encoder(photos))
        batch = photos.shape[0]

        def unfinished(t: Tensor, last: Tensor, *_: Tensor) -> Tensor:
            return (t < self.max_length) & (last != END).any()

        def step(t: Tensor, last: Tensor, tokens: Tensor, total: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            logits, after = self.decoder.step(last, state)
            log_p, word = (logits.log_softmax(1) + self.banned).max(1)
            ended = last == END
            word = torch.where(ended, END, word)
            tokens = torch.where(torch.arange(self.max_length) == t, word[:, None], tokens)
            total = total + torch.where(ended, 0.0, log_p)
            # A loop hands on tensors of its own only, laid out alike in every round.
            after = (x.clone() if x is y else x.contiguous() for x, y in zip(after, state, strict=True))
            return (t + 1, word, tokens, total, *after)

        start = torch.full((batch,), START)
        tokens = torch.full((batch, self.max_length), END)
        first = (torch.tensor(0), start, tokens, torch.zeros(batch), *(x.contiguous() for x in state))
        _, _, tokens, total, *_ = while_loop(unfinished, step, first)
        return tokens, total


def export_onnx(model: str | Path, path: str | Path, max_length: int = 20) -> None:
    """Write a model's best epoch as one ONNX file that needs nothing beside it.

    Input `photos` (B, 3, image_size, image_size) uint8, any B. Outputs `tokens` (B, max_length) int64, which
    end with one `<end>` or more, or with none where the caption is cut; and `log_probability` (B,) float32,
    of the tokens up to the first `<end>`. Metadata: `vocabulary` (a JSON list), `image_size` and
    `shorter_side`, to which a photo is resized before its centre is cut out.

    model: a model's folder or its name on the Hub. Raises `InputError` where it cannot be read, onnxscript
    is missing, or the file cannot be written.
    """
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it and would fail far from here
        from onnx_ir.passes.common import RemoveUnusedNodesPass  # comes with onnxscript
    except ImportError as error:
        raise InputError(f"an export needs {error.name}, which is missing: pip install onnxscript") from None
    if max_length < 1:
        raise InputError(f"max_length is {max_length}, but it has to be at least 1.")
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}; make it first.")
    encoder, decoder, vocabulary, description = load_model(find_model(model))
    size = description.preprocessing.image_size
    captioner = GreedyCaptioner(encoder.for_inference(torch.float32), decoder, len(vocabulary), max_length)
    # float() also renews what an LSTM remembers of its weights, which it may not do inside of the loop.
    captioner.float().eval().requires_grad_(False)
    if sum(x.nbytes for x in captioner.state_dict().values()) > LARGEST_ONNX:
        raise InputError(f"{model} has over 2 GB of weights, which do not fit into one ONNX file.")
    photos = torch.zeros(2, 3, size, size, dtype=torch.uint8)  # of 1 the exporter would make a constant
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own, on how it does its work
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
        program = torch.onnx.export(
            captioner,
            (photos,),
            input_names=["photos"],
            output_names=["tokens", "log_probability"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    RemoveUnusedNodesPass()(program.model)  # or onnxruntime warns of each whenever it reads the file
    exported = program.model_proto
    about = {
        "vocabulary": json.dumps(vocabulary.words, ensure_ascii=False),
        "image_size": str(size),
        "shorter_side": str(build_transform(False, size).transforms[0].size),
    }
    onnx.helper.set_model_props(exported, about)
    content = exported.SerializeToString()
    write_file(path, lambda file: file.write(content))
    print(
        f"wrote {path}: uint8 photos (batch, 3, {size}, {size}) in, tokens (batch, {max_length}) out, "
        f"{len(content) / 1e6:.0f} MB",
        file=sys.stderr,
    )
