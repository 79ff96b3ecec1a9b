"""The encoder and the decoders of the captioning models.

    EncoderCNN          a backbone (ResNet-50, or any of timm's) and a linear layer on its features
    DecoderRNN          an LSTM that reads the image's feature once, before the first word (arXiv 1411.4555)
    AttentionDecoder    an LSTM that attends to a part of the image for every word (arXiv 1502.03044)
    TransformerDecoder  self-attention over the words, cross-attention over the image (arXiv 1706.03762)

Every decoder is a `DecoderModule`: `unroll` for training, `init_state` and `step` for decoding. A new decoder is one
class here and one line in `DECODERS`.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from captioning import backbones
from captioning.backbones import RESNET50, preprocessing_of
from captioning.errors import InputError
from captioning.sequences import pack_sequences
from vocabulary import END


class EncoderCNN(nn.Module):
    """A backbone without its classifier, and `embed`, a linear layer on its features.

    Args:
        embed_size: output size of `embed`.
        backbone: "resnet50" for torchvision's ResNet-50 (arXiv 1512.03385), or the name of a timm model.
        weights: "pretrained" (the published weights), "random", or a state-dict file of a backbone or encoder.
        fine_tune: number of stages to train, counted from the last; the other stages are frozen. The statistics of
            batch norms are updated only if all stages are trained.
        grid: return the features of all cells rather than their mean.
        grid_size: with `grid`, average the feature map to this many rows and columns.

    `num_stages` is the number of the backbone's stages (5 for ResNet-50: the stem and four), `feature_size` that of
    its channels (2048). Raises `InputError` for an unknown backbone and for weights that cannot be loaded.
    """

    def __init__(
        self,
        embed_size: int,
        backbone: str = RESNET50,
        weights: str | Path = "pretrained",
        fine_tune: int = 0,
        grid: bool = False,
        grid_size: int | None = None,
    ):
        super().__init__()
        self.backbone_name, self.grid, self.grid_size, self.fine_tune = backbone, grid, grid_size, fine_tune
        preprocessing = preprocessing_of(backbone)
        self.mean, self.std = preprocessing.mean, preprocessing.std
        self.module_name = "resnet" if backbone == RESNET50 else "backbone"  # as in the published weights
        self.add_module(self.module_name, backbones.build_backbone(backbone, weights))
        self.feature_size = 2048 if backbone == RESNET50 else self.network.num_features
        self.embed = nn.Linear(self.feature_size, embed_size)
        self.num_stages = backbones.freeze(backbone, self.network, fine_tune)
        backbones.use_channels_last(self.network)
        self.train()

    @property
    def network(self) -> Any:
        """The backbone; its state-dict keys begin with `module_name`."""
        return self.get_submodule(self.module_name)

    def train(self, mode: bool = True) -> EncoderCNN:
        """Set the training mode; a backbone with frozen stages stays in evaluation mode."""
        super().train(mode)
        self.network.train(mode and self.fine_tune == self.num_stages)
        return self

    def features(self, images: Tensor) -> Tensor:
        """Run the backbone: (B, 3, H, W) -> (B, feature_size), or (B, cells, feature_size) with `grid`.

        Images of integers, 0 to 255, are normalized here; floating-point ones must be normalized already.
        """
        dtype = next(self.network.parameters(), self.embed.weight).dtype
        if not images.is_floating_point():
            mean, std = (torch.tensor(x, device=images.device)[:, None, None] * 255 for x in (self.mean, self.std))
            images = (images - mean) / std
        images = images.to(dtype, memory_format=torch.channels_last)
        try:
            features = self.run_backbone(images)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            if problem := backbones.explain_failure(self.backbone_name, images, error):
                raise InputError(problem) from error
            raise
        backbones.require_one_map(self.backbone_name, features)
        cells = self._cells(features)  # (B, cells, C)
        return cells if self.grid else cells.mean(1)

    def run_backbone(self, images: Tensor) -> Tensor:
        """Compute the last features of normalized images (B, 3, H, W), in the layout of the backbone's family."""
        run = self.network[:-1] if isinstance(self.network, nn.Sequential) else self.network.forward_features
        return run(images)

    def _cells(self, features: Tensor) -> Tensor:
        """Pool (if `grid_size`) and flatten (B, C, h, w), (B, h, w, C) or (B, tokens, C) to (B, cells, C)."""
        if features.ndim == 3:  # a transformer's class and register tokens come before its square of patches
            prefix = features.shape[1] - math.isqrt(features.shape[1]) ** 2
            features = features[:, getattr(self.network, "num_prefix_tokens", prefix) :].transpose(1, 2)
        elif getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        if self.grid and self.grid_size is not None:
            grid = features.unflatten(2, (math.isqrt(features.shape[2]), -1)) if features.ndim == 3 else features
            features = backbones.pool_to_grid(grid.float(), self.grid_size)
        return features.flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, embed_size), or (B, cells, embed_size) with `grid`."""
        return self.embed(self.features(images).to(self.embed.weight.dtype))

    @torch.no_grad()
    def standardize(self, features: Tensor) -> None:
        """Scale and shift `embed` so that it maps these features (N, ..., feature_size) to mean 0 and deviation 1.

        Features of different images differ little compared with their mean, and without this data-dependent
        initialization (arXiv 1511.06422) the decoder learns to ignore them.
        """
        embedded = self.embed(features.to(self.embed.weight.dtype)).flatten(0, -2)
        std, mean = torch.std_mean(embedded, 0, correction=0)
        std = torch.where(std > 1e-6, std, 1.0)
        self.embed.weight /= std[:, None]
        self.embed.bias.copy_((self.embed.bias - mean) / std)

    def for_inference(self, dtype: torch.dtype) -> EncoderCNN:
        """Return an inference-only copy: batch norms folded into the preceding convolutions, backbone in `dtype`."""
        folded = copy.deepcopy(self).eval().requires_grad_(False)
        size = preprocessing_of(self.backbone_name).image_size
        image = next(self.network.parameters(), self.embed.weight).new_zeros(1, 3, size, size)
        backbones.fold_batch_norms(folded.network, lambda: folded.run_backbone(image))
        folded.network.to(dtype=dtype)
        return folded


class LSTM(nn.LSTM):
    """A batch-first LSTM that can take single steps.

    The forget gates' biases start at 1 (Jozefowicz et al. 2015), so that an untrained one remembers the image.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int):
        super().__init__(input_size, hidden_size, num_layers, batch_first=True)
        with torch.no_grad():
            for name, bias in self.named_parameters():
                if name.startswith("bias_ih"):
                    bias[hidden_size : 2 * hidden_size] = 1

    def step(self, inputs: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take a step: (B, input_size) and the state (B, layers, H) twice -> the output (B, H) and the next state."""
        steps = []
        for weights, *before in zip(self.all_weights, h.unbind(1), c.unbind(1), strict=True):
            inputs, cell = torch.lstm_cell(inputs, before, *weights)
            steps.append((inputs, cell))
        h, c = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        return inputs, h, c


class DecoderModule(nn.Module):
    """The interface of a decoder for training, decoding and export.

    An image is a grid of cells (cells, embed_size) for a decoder that attends, else one vector (embed_size).
    """

    attends: bool  # if so, the last tensor of a state is the attention over the cells
    sums_attention = False  # if so, `unroll` returns the summed attention, which --attention-penalty weighs
    embed: nn.Embedding  # the word embedding
    linear: nn.Linear  # the output layer, with a bias

    def unroll(
        self, features: Tensor, captions: Tensor, lengths: Tensor | None = None, image_of_caption: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the decoder over whole captions: the output layer's input for each token, given the tokens before it.

        Args:
            features: (P, embed_size) or (P, cells, embed_size), the embeddings of P images.
            captions: (B, T) from `<start>` on, padded; lengths: (B,), or None where there is no padding.
            image_of_caption: (B,) index into `features` of each caption's image; None if caption i belongs to image i.

        Returns the output layer's inputs (tokens, H) in the order of `sequences.pack_tokens`, for all tokens or, if the
        decoder attends, those after `<start>`; and the attention (B, cells) summed over each caption's tokens, longest
        first, or None without `sums_attention`.
        """
        raise NotImplementedError

    def init_state(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return the state before `<start>`, given the embedded images."""
        raise NotImplementedError

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Decode one token: tokens (B,) and the state -> the next token's logits (B, vocab_size) and the next state."""
        raise NotImplementedError

    def forward(self, features: Tensor, captions: Tensor) -> Tensor:
        """Return the logits of `unroll`'s tokens, (B, T or T - 1, vocab_size)."""
        logits = self.linear(self.unroll(features, captions)[0])
        return logits.unflatten(0, (-1, len(captions))).transpose(0, 1)


class DecoderRNN(DecoderModule):
    """The LSTM of Show and Tell (arXiv 1411.4555): its inputs are the image, `<start>` and the words.

    Args:
        embed_size: embedding dimension of the image and the words.
        hidden_size: size of the LSTM's state.
        vocab_size: number of words.
        num_layers: number of LSTM layers.
        dropout: rate, on the word embeddings and the output layer's input.
    """

    attends = False

    def __init__(self, embed_size: int, hidden_size: int, vocab_size: int, num_layers: int = 1, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.lstm = LSTM(embed_size, hidden_size, num_layers)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)

    def unroll(
        self, features: Tensor, captions: Tensor, lengths: Tensor | None = None, image_of_caption: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Run the LSTM over whole captions, without a step on padding."""
        if image_of_caption is not None:
            features = features.index_select(0, image_of_caption)  # deterministic gradient, unlike indexing
        words = self.dropout(self.embed(captions[:, :-1]))
        inputs = torch.cat([features[:, None], words], 1)  # (B, T, E): the image, <start>, words
        packed, _ = pack_sequences(inputs, lengths)
        return self.dropout(self.lstm(packed)[0].data), None

    def init_state(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, embed_size) -> the LSTM's state after the image: hidden and cell, each (B, layers, H)."""
        nothing = features.new_zeros(features.shape[0], self.lstm.num_layers, self.lstm.hidden_size)
        return self.lstm.step(features, nothing, nothing)[1:]

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Decode one token."""
        hidden, h, c = self.lstm.step(self.embed(tokens), *state)
        return self.linear(hidden), (h, c)

    @torch.no_grad()
    def sample(self, features: Tensor, max_len: int = 20) -> list[list[int]]:
        """Decode a batch greedily as the original recipe does: (B, embed_size) -> up to `max_len` tokens per image.

        The input is the image; a trained model predicts `<start>` first (`decoding.greedy` feeds it) and `<end>` last.
        """
        inputs, state, tokens = features[:, None], None, []
        for _ in range(max_len):
            hidden, state = self.lstm(inputs, state)
            tokens.append(self.linear(hidden[:, 0]).argmax(1))
            inputs = self.embed(tokens[-1])[:, None]
        rows = torch.stack(tokens, 1).tolist()
        return [row[: row.index(END) + 1] if END in row else row for row in rows]


class AttentionDecoder(DecoderModule):
    """An LSTM with soft attention over the image's cells (Show, Attend and Tell, arXiv 1502.03044).

    The mean of the cells initializes the state. At each word, attention weights the cells (equations 4 to 6); their
    gated weighted mean (section 4.2.1) is input together with the word. The arguments are those of `DecoderRNN`.
    """

    attends = sums_attention = True

    def __init__(self, embed_size: int, hidden_size: int, vocab_size: int, num_layers: int = 1, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.init_h = nn.Linear(embed_size, num_layers * hidden_size)
        self.init_c = nn.Linear(embed_size, num_layers * hidden_size)
        self.key = nn.Linear(embed_size, hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.score = nn.Linear(hidden_size, 1, bias=False)
        self.gate = nn.Linear(hidden_size, embed_size)
        self.lstm = LSTM(2 * embed_size, hidden_size, num_layers)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.num_layers, self.hidden_size = num_layers, hidden_size

    def init_state(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, cells, embed_size) -> hidden, cell (B, layers, H); cells, twice their keys; attention (B, cells)."""
        mean = features.mean(1)
        h, c = (torch.tanh(init(mean)).unflatten(1, (self.num_layers, -1)) for init in (self.init_h, self.init_c))
        return h, c, features, 2 * self.key(features), features.new_zeros(features.shape[:2])

    def _advance(self, words: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, c, features, keys, _ = state
        last = h[:, -1]  # (B, H)
        # tanh(x) is 2 sigmoid(2x) - 1, whose -1 does not change the softmax, and takes a CPU three times as long.
        sigmoid = (keys + 2 * self.query(last)[:, None]).sigmoid_()  # (B, cells, H)
        attention = (2 * self.score(sigmoid)[..., 0]).softmax(1)  # (B, cells)
        context = torch.bmm(attention[:, None].to(features.dtype), features)[:, 0]  # (B, E)
        context = torch.sigmoid(self.gate(last)) * context
        hidden, h, c = self.lstm.step(torch.cat([words, context], 1), h, c)
        return hidden, (h, c, features, keys, attention)

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Decode one token."""
        hidden, state = self._advance(self.embed(tokens), state)
        return self.linear(hidden), state

    def unroll(
        self, features: Tensor, captions: Tensor, lengths: Tensor | None = None, image_of_caption: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the LSTM over whole captions; the summed attention is for the doubly stochastic loss (equation 14)."""
        words = self.dropout(self.embed(captions[:, :-1]))
        packed, order = pack_sequences(words, None if lengths is None else lengths - 1)
        order = order if image_of_caption is None else image_of_caption.index_select(0, order)
        state = tuple(x.index_select(0, order) for x in self.init_state(features))
        hidden, attention = [], features.new_zeros(len(captions), features.shape[1], dtype=torch.float32)
        for step_words in packed.data.split(packed.batch_sizes.tolist()):  # finished captions are the last rows
            rows = len(step_words)
            state = state if rows == len(state[0]) else tuple(x[:rows] for x in state)
            h, state = self._advance(step_words, state)
            hidden.append(h)
            attention = attention + F.pad(state[-1].float(), (0, 0, 0, len(captions) - rows))
        return self.dropout(torch.cat(hidden)), attention


class TransformerLayer(nn.Module):
    """A pre-norm layer (arXiv 2002.04745): causal self-attention, cross-attention to the image, a feed-forward net."""

    def __init__(self, size: int, heads: int, hidden_size: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm_self, self.norm_cross, self.norm_feed = nn.LayerNorm(size), nn.LayerNorm(size), nn.LayerNorm(size)
        self.self_query_key_value = nn.Linear(size, 3 * size)
        self.self_out = nn.Linear(size, size)
        self.cross_query = nn.Linear(size, size)
        self.cross_key_value = nn.Linear(size, 2 * size)
        self.cross_out = nn.Linear(size, size)
        self.feed = nn.Sequential(nn.Linear(size, hidden_size), nn.GELU(), nn.Linear(hidden_size, size))
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, size) -> (B, heads, T, size / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, image: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer on words (B, T, size), causally or, after the t words of `history`, on one word.

        `image` (B, cells, 2 * size) and `history` (B, t, 2 * size) are keys and values. Returns the output
        (B, T, size), the keys and values of all words, and the queries of the cross-attention (B, T, size).
        """
        query, key_value = self.self_query_key_value(self.norm_self(x)).split([x.shape[2], 2 * x.shape[2]], 2)
        if history is not None:
            key_value = torch.cat([history, key_value], 1)
        attended = self._attend(query, key_value, causal=history is None)
        x = x + self.dropout(self.self_out(attended))
        query = self.cross_query(self.norm_cross(x))
        x = x + self.dropout(self.cross_out(self._attend(query, image)))
        x = x + self.dropout(self.feed(self.norm_feed(x)))
        return x, key_value, query

    def _attend(self, query: Tensor, key_value: Tensor, causal: bool = False) -> Tensor:
        query, key, value = (self.split_heads(x) for x in (query, *key_value.chunk(2, 2)))
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).flatten(2)

    def attention(self, query: Tensor, image: Tensor) -> Tensor:
        """Average the cross-attention over its heads: (B, T, size), (B, cells, 2 * size) -> (B, T, cells)."""
        query, key = self.split_heads(query), self.split_heads(image.chunk(2, 2)[0])
        return (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).float().softmax(3).mean(1)


class TransformerDecoder(DecoderModule):
    """A transformer decoder (Vaswani et al., arXiv 1706.03762) with cross-attention over the image's cells.

    Its layers are pre-norm and its positions learned. Decoding caches the keys and values of the words. The arguments
    are those of `DecoderRNN`; the layers are `embed_size` wide and their feed-forward networks `hidden_size`.
    """

    attends = True
    max_positions = 64  # positions beyond it share the last embedding

    def __init__(self, embed_size: int, hidden_size: int, vocab_size: int, num_layers: int = 1, dropout: float = 0.0):
        super().__init__()
        heads = max(n for n in (8, 4, 2, 1) if embed_size % n == 0)
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.position = nn.Embedding(self.max_positions, embed_size)
        self.norm_image = nn.LayerNorm(embed_size)
        layers = (TransformerLayer(embed_size, heads, hidden_size, dropout) for _ in range(num_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_size)
        self.linear = nn.Linear(embed_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def init_state(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, cells, E) -> keys and values of no words (B, 0, layers, 2 * E) and of the image; attention (B, cells)."""
        image = self.norm_image(features)
        image = torch.stack([layer.cross_key_value(image) for layer in self.layers], 2)  # pyright: ignore[reportCallIssue]
        return image[:, :0], image, features.new_zeros(features.shape[:2])

    def step(self, tokens: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Decode one token; the attention in the state is the last layer's."""
        history, image, _ = state
        position = min(history.shape[1], self.max_positions - 1)
        x = (self.embed(tokens) + self.position.weight[position])[:, None]  # (B, 1, E)
        key_values = []
        for i, layer in enumerate(self.layers):
            x, key_value, query = layer(x, image[:, :, i], history[:, :, i])
            key_values.append(key_value)
        attention = self.layers[-1].attention(query, image[:, :, -1])[:, 0]  # pyright: ignore[reportCallIssue]
        return self.linear(self.norm(x[:, 0])), (torch.stack(key_values, 2), image, attention)

    def hidden(self, features: Tensor, words: Tensor, image_of_caption: Tensor | None = None) -> Tensor:
        """Return the output layer's input: (P, cells, E), (B, T) -> (B, T, E); `image_of_caption` as in `unroll`."""
        _, image, _ = self.init_state(features)  # keys and values are computed once per image
        image = image if image_of_caption is None else image.index_select(0, image_of_caption)
        positions = torch.arange(words.shape[1], device=words.device).clamp(max=self.max_positions - 1)
        x = self.dropout(self.embed(words) + self.position(positions))
        for i, layer in enumerate(self.layers):
            x, _, _ = layer(x, image[:, :, i])
        return self.norm(x)

    def unroll(
        self, features: Tensor, captions: Tensor, lengths: Tensor | None = None, image_of_caption: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Run the transformer over whole captions at once; its attention is not recorded."""
        hidden = self.hidden(features, captions[:, :-1], image_of_caption)
        return pack_sequences(hidden, None if lengths is None else lengths - 1)[0].data, None

    def forward(self, features: Tensor, captions: Tensor) -> Tensor:
        """Return the logits of the tokens after `<start>`, unpacked, so that it can be traced."""
        return self.linear(self.hidden(features, captions[:, :-1]))


DECODERS: dict[str, type[DecoderModule]] = {
    "lstm": DecoderRNN,
    "attention": AttentionDecoder,
    "transformer": TransformerDecoder,
}
