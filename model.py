"""The encoder and the decoders: a photo becomes a feature, a feature becomes words.

    EncoderCNN        a ResNet-50 and a linear layer on what it sees
    DecoderRNN        an LSTM that is shown the photo once, before the first word (arXiv 1411.4555)
    AttentionDecoder  an LSTM that looks at a part of the photo for every word (arXiv 1502.03044)

Every decoder offers `forward` for training and `init_state` and `step` for decoding; `decoding.py` and
`train.py` need nothing else of it, so a new decoder is one class here and one line in `DECODERS`.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torchvision.models import ResNet50_Weights, resnet50

from captioning.errors import InputError
from captioning.images import IMAGENET_MEAN, IMAGENET_STD
from captioning.quantized import QuantizedBackbone, Range
from captioning.weights import load_weights, read_state_dict
from vocabulary import END

PRETRAINED = ResNet50_Weights.IMAGENET1K_V1  # the weights that the published encoder was trained with
FEATURE_SIZE = 2048
PARTS = 5  # what of the backbone can be trained by itself: the stem and the four stages


class EncoderCNN(nn.Module):
    """ResNet-50 (arXiv 1512.03385) without its classifier, and `embed`, a linear layer on top.

    Args:
        embed_size: what `embed` maps the backbone's 2048 numbers to.
        weights: "pretrained" for torchvision's ImageNet weights, "random", or a file with the state dict
            of a torchvision ResNet-50 or of an EncoderCNN.
        fine_tune: how many of the backbone's five parts (the stem and four stages), counted from the
            last, are trained. Frozen parts never change, nor do their batch norms' statistics; those
            move only where all five parts are trained.
        grid: give the 7 x 7 grid (for photos of 224 x 224) rather than its mean.

    Raises `InputError` where the weights cannot be had.
    """

    def __init__(self, embed_size: int, weights: str | Path = "pretrained", fine_tune: int = 0, grid: bool = False):
        super().__init__()
        if not 0 <= fine_tune <= PARTS:
            raise InputError(f"fine_tune is how many of the backbone's {PARTS} parts are trained, not {fine_tune}.")
        self.fine_tune, self.grid = fine_tune, grid
        self.ranges: list[Range] | None = None  # of what the backbone's layers give, where they were observed
        self.resnet = nn.Sequential(*list(_resnet50(weights).children())[:-1])
        self.embed = nn.Linear(FEATURE_SIZE, embed_size)
        self.resnet.requires_grad_(False)
        stem, stages = self.resnet[:4], [self.resnet[i] for i in range(4, 8)]
        for part in [stem, *stages][PARTS - fine_tune :]:
            part.requires_grad_(True)
        self.resnet.to(memory_format=torch.channels_last)
        self.train()

    def train(self, mode: bool = True) -> EncoderCNN:
        """As nn.Module's, except that the batch norms of a backbone not trained whole stay as they are."""
        super().train(mode)
        self.resnet.train(mode and self.fine_tune == PARTS)
        return self

    def features(self, images: Tensor) -> Tensor:
        """What the backbone sees: (B, 3, H, W) -> (B, 2048), or (B, H/32 * W/32, 2048) with `grid`.

        uint8 images are normalised here; floats are taken as normalised already.
        """
        dtype = next(self.resnet.parameters(), self.embed.weight).dtype
        if images.dtype == torch.uint8:
            mean, std = (
                torch.tensor(x, device=images.device)[:, None, None] * 255 for x in (IMAGENET_MEAN, IMAGENET_STD)
            )
            images = (images - mean) / std
        images = images.to(dtype, memory_format=torch.channels_last)
        return self._pool(self.resnet[:-1](images))  # of (B, 2048, H/32, W/32)

    def frozen_part(self) -> EncoderCNN:
        """A copy that ends where training begins: its features are the grid that `finish` goes on from."""
        part = copy.deepcopy(self)
        part.resnet = nn.Sequential(*part.resnet[: -1 - self.fine_tune], nn.Identity())  # in the place of the mean
        part.grid = True
        return part

    def finish(self, cells: Tensor) -> Tensor:
        """The features of photos by what `frozen_part` sees of them, (B, rows * columns, channels), rows = columns."""
        side = round(cells.shape[1] ** 0.5)
        x = cells.to(self.resnet[0].weight).unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (B, channels, side, side)
        return self._pool(self.resnet[-1 - self.fine_tune : -1](x))

    def _pool(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2) if self.grid else x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, embed_size), or (B, cells, embed_size) with `grid`."""
        return self.embed(self.features(images).to(self.embed.weight.dtype))

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Scale and shift `embed` so that these features (N, ..., 2048) leave it with mean 0 and deviation 1.

        Photos' features differ little beside what they have in common, most of all before training; without this
        the decoder learns to ignore them (data-dependent initialisation, arXiv 1511.06422).
        """
        embedded = self.embed(features.to(self.embed.weight.dtype)).flatten(0, -2)
        std, mean = torch.std_mean(embedded, 0, correction=0)
        std = torch.where(std > 1e-6, std, 1.0)
        self.embed.weight /= std[:, None]
        self.embed.bias.copy_((self.embed.bias - mean) / std)

    def for_inference(self, dtype: torch.dtype) -> EncoderCNN:
        """A copy for use only: batch norms folded into their convolutions, the backbone in `dtype`.

        torch.int8 is for the CPU and needs `ranges`, as a trained model has them.
        """
        fused = copy.deepcopy(self).eval().requires_grad_(False)
        for module in list(fused.resnet.modules()):
            names = [name for name, _ in module.named_children()]
            for conv, norm in pairwise(names):
                pair = getattr(module, conv), getattr(module, norm)
                if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                    setattr(module, conv, fuse_conv_bn_eval(*pair))
                    setattr(module, norm, nn.Identity())
        if dtype == torch.int8:
            fused.resnet = nn.Sequential(QuantizedBackbone(fused.resnet, self.ranges), nn.Identity())
        else:
            fused.resnet.to(dtype=dtype, memory_format=torch.channels_last)
        return fused


def _resnet50(weights: str | Path) -> nn.Module:
    if str(weights) == "random":
        return resnet50(weights=None, zero_init_residual=True)
    if str(weights) == "pretrained":
        try:
            return resnet50(weights=PRETRAINED)
        except (URLError, OSError) as error:
            raise InputError(
                f"torchvision's ResNet-50 weights cannot be downloaded ({getattr(error, 'reason', error)}); use "
                f"--weights models/photos, --weights random, or --weights FILE with a state dict of a torchvision "
                f"ResNet-50."
            ) from None
    model = resnet50(weights=None)
    state = read_state_dict(weights)
    if any(key.startswith("resnet.") for key in state):
        names = [name for name, _ in model.named_children()]  # resnet.<i>. is the i-th child
        pairs = ((key.split(".", 2), value) for key, value in state.items() if key.startswith("resnet."))
        state = {
            f"{names[int(i)]}.{rest}": value for (_, i, rest), value in pairs if i.isdigit() and int(i) < len(names)
        }
    load_weights(model, {k: v for k, v in state.items() if not k.startswith("fc.")}, weights, may_lack=("fc.",))
    return model


@torch.no_grad()
def _remember(lstm: nn.LSTM) -> None:
    """Start with the forget gates open (Jozefowicz et al. 2015), or the photo is forgotten within a few words."""
    for name, bias in lstm.named_parameters():
        if name.startswith("bias_ih"):
            bias[lstm.hidden_size : 2 * lstm.hidden_size] = 1


class DecoderRNN(nn.Module):
    """The LSTM of Show and Tell (arXiv 1411.4555): the photo is its first input, then `<start>`, then words.

    Args:
        embed_size: of the photo's embedding and the words'.
        hidden_size: of the LSTM.
        vocab_size: words.
        num_layers: of the LSTM.
        dropout: on the embedded words and on what the output layer reads, in training.
    """

    attends = False

    def __init__(self, embed_size: int, hidden_size: int, vocab_size: int, num_layers: int = 1, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.lstm = nn.LSTM(embed_size, hidden_size, num_layers, batch_first=True)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        _remember(self.lstm)

    def unroll(
        self, features: Tensor, captions: Tensor, lengths: Tensor | None = None, row: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Run the decoder over whole captions: what the output layer reads for every token, `<start>` included.

        Args:
            features: (P, embed_size) embedded images.
            captions: (B, T) from `<start>` on, padded; lengths: (B,), or None where there is no padding.
            row: (B,) each caption's row in `features`, or None where caption i belongs to image i.

        Returns the hidden states (tokens, H), as `pack` orders the tokens. No step is computed on padding.
        """
        if row is not None:
            features = features.index_select(0, row)  # unlike [row], its gradient adds up in one order on any threads
        words = self.dropout(self.embed(captions[:, :-1]))
        inputs = torch.cat([features[:, None], words], 1)  # (B, T, E): the image, <start>, words
        packed, _ = pack_sequences(inputs, lengths)
        return self.dropout(self.lstm(packed)[0].data), None

    def forward(self, features: Tensor, captions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The logits of every token of the captions, `<start>` included, each given those before it.

        (B, embed_size), (B, T) -> (B, T, vocab_size), or with `lengths` (B,) only the tokens that are not padding, as
        `pack` orders them.
        """
        logits = self.linear(self.unroll(features, captions, lengths)[0])
        if lengths is not None:
            return logits
        return logits.unflatten(0, (captions.shape[1], -1)).transpose(0, 1)

    def init_state(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, embed_size) -> the LSTM's state after the photo: hidden and cell, each (B, layers, H)."""
        _, (h, c) = self.lstm(features[:, None])
        return h.transpose(0, 1), c.transpose(0, 1)

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One word on: tokens (B,) and the state -> the next token's logits (B, vocab_size) and the state."""
        h, c = (x.transpose(0, 1).contiguous() for x in state)
        hidden, (h, c) = self.lstm(self.embed(tokens)[:, None], (h, c))
        return self.linear(hidden[:, 0]), (h.transpose(0, 1), c.transpose(0, 1))

    @torch.no_grad()
    def sample(self, features: Tensor, max_len: int = 20) -> list[list[int]]:
        """The recipe's own greedy decoding of a batch: (B, embed_size) -> at most `max_len` tokens a photo.

        It feeds the photo and then its own choices, the first of which a trained model makes `<start>`,
        and ends after `<end>`. `decoding.greedy` starts from `<start>` instead and emits words only.
        """
        inputs, state, tokens = features[:, None], None, []
        for _ in range(max_len):
            hidden, state = self.lstm(inputs, state)
            tokens.append(self.linear(hidden[:, 0]).argmax(1))
            inputs = self.embed(tokens[-1])[:, None]
        rows = torch.stack(tokens, 1).tolist()
        return [row[: row.index(END) + 1] if END in row else row for row in rows]


class AttentionDecoder(nn.Module):
    """Soft attention over the photo's grid (Show, Attend and Tell, arXiv 1502.03044).

    For every word the LSTM weighs the grid's cells (equations 4 to 6), looks at their weighted mean
    through a gate (section 4.2.1), and starts from the mean of all cells. Arguments as `DecoderRNN`'s.
    """

    attends = True

    def __init__(self, embed_size: int, hidden_size: int, vocab_size: int, num_layers: int = 1, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.init_h = nn.Linear(embed_size, num_layers * hidden_size)
        self.init_c = nn.Linear(embed_size, num_layers * hidden_size)
        self.key = nn.Linear(embed_size, hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.score = nn.Linear(hidden_size, 1, bias=False)
        self.gate = nn.Linear(hidden_size, embed_size)
        self.lstm = nn.LSTM(2 * embed_size, hidden_size, num_layers, batch_first=True)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.num_layers, self.hidden_size = num_layers, hidden_size
        _remember(self.lstm)

    def init_state(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, cells, embed_size) -> hidden, cell (B, layers, H); cells, their keys; attention (B, cells)."""
        mean = features.mean(1)
        h, c = (torch.tanh(init(mean)).unflatten(1, (self.num_layers, -1)) for init in (self.init_h, self.init_c))
        return h, c, features, self.key(features), features.new_zeros(features.shape[:2])

    def _advance(self, words: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, c, features, keys, _ = state
        last = h[:, -1]  # (B, H)
        scores = self.score(torch.tanh(keys + self.query(last)[:, None]))[..., 0]  # (B, cells)
        attention = scores.softmax(1)
        seen = torch.bmm(attention[:, None].to(features.dtype), features)[:, 0]  # (B, E)
        seen = torch.sigmoid(self.gate(last)) * seen
        hidden, steps = torch.cat([words, seen], 1), []
        for weights, *before in zip(self.lstm.all_weights, h.unbind(1), c.unbind(1), strict=True):  # faster than `lstm`
            hidden, cell = torch.lstm_cell(hidden, before, *weights)
            steps.append((hidden, cell))
        h, c = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        return hidden, (h, c, features, keys, attention)

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One word on, as `DecoderRNN.step`; the last tensor of the state is where this step looked."""
        hidden, state = self._advance(self.embed(tokens), state)
        return self.linear(hidden), state

    def unroll(
        self, features: Tensor, captions: Tensor, lengths: Tensor | None = None, row: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `DecoderRNN.unroll`, for the tokens after `<start>`; and each cell's weight summed over the caption.

        features are (P, cells, embed_size). The weights are (B, cells), captions in the order of `pack`; the doubly
        stochastic regularisation (equation 14) draws them towards one. Keys are computed once per image.
        """
        words = self.dropout(self.embed(captions[:, :-1]))
        packed, order = pack_sequences(words, None if lengths is None else lengths - 1)
        order = order if row is None else row.index_select(0, order)
        state = tuple(x.index_select(0, order) for x in self.init_state(features))
        batch = len(captions)
        hidden, attention = [], features.new_zeros(batch, features.shape[1], dtype=torch.float32)
        for step_words in packed.data.split(packed.batch_sizes.tolist()):  # finished captions are the last rows
            rows = len(step_words)
            h, state = self._advance(step_words, tuple(x[:rows] for x in state))
            hidden.append(h)
            attention = attention + F.pad(state[-1].float(), (0, 0, 0, batch - rows))
        return self.dropout(torch.cat(hidden)), attention

    def forward(self, features: Tensor, captions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The logits of every token after `<start>`, each given those before it.

        (B, cells, embed_size), (B, T) -> (B, T - 1, vocab_size), or with `lengths` (B,) only the tokens that
        are not padding, as `pack` orders them.
        """
        logits = self.linear(self.unroll(features, captions, lengths)[0])
        if lengths is not None:
            return logits
        return logits.unflatten(0, (captions.shape[1] - 1, -1)).transpose(0, 1)


def pack_sequences(x: Tensor, lengths: Tensor | None) -> tuple[PackedSequence, Tensor]:
    """Padded sequences (B, T, ...) without their padding, and the order (B,) in which their rows come: longest first.

    lengths: (B,), on the CPU if it is not to wait for a device; None where there is no padding.
    """
    if lengths is None:
        lengths = torch.full((len(x),), x.shape[1])
    lengths, order = lengths.cpu().sort(descending=True, stable=True)
    order = order.to(x.device, non_blocking=True)
    return pack_padded_sequence(x.index_select(0, order), lengths, batch_first=True), order


def pack(captions: Tensor, lengths: Tensor, skip: int = 0) -> Tensor:
    """The tokens of padded captions (B, T) without padding and without the first `skip`, (tokens,).

    All first tokens come first, then all second ones, the longest captions leading.
    """
    return pack_sequences(captions[:, skip:], lengths - skip)[0].data


DECODERS: dict[str, type[nn.Module]] = {"lstm": DecoderRNN, "attention": AttentionDecoder}
