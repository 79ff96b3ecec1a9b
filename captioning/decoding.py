"""Greedy decoding, beam search and sampling of captions, for any decoder that offers `init_state` and `step`.

Three rules hold for all of them. `<start>` and `<unk>` are never chosen. Restrictions on the choice (these bans,
`min_length`, blocked trigrams, temperature, top-k, top-p) do not change the reported log-probabilities, which are the
model's own over its full softmax. If every word is banned, `<end>` is chosen even before `min_length`, so that every
image has a caption.

A decoder in training mode applies dropout here as well; call `decoder.eval()` first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from captioning.errors import InputError
from vocabulary import DEFAULT_LENGTH, END, START, UNK

State = tuple[Tensor, ...]
Choose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

FIRST_WORD = UNK + 1  # index of the first word that may be chosen

# Maximum number of elements of a tensor that a CPU computes at once, 16 MB of floats. The allocator requests larger
# ones from the system again at every step: 500 images with attention and a beam of 5 would take twice as long.
CHUNK_ELEMENTS = 2**22


class Decoder(Protocol):
    """The interface of a decoder.

    Every tensor of a state has the batch as its first dimension; its other dimensions may change from step to
    step. A step does not modify the state that it is given. It returns the same tensor again only if that tensor
    depends on the image alone, such as its cells; a beam search does not copy it.

    attends: whether the last tensor of a state after a step is the attention over the image, (B, cells).
    """

    attends: bool

    def init_state(self, features: Any) -> State:
        """Return the state after reading the features (B, ...) of B images, before `<start>`."""
        ...

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the logits (B, V) of the token that follows `tokens` (B,) int64, and the next state."""
        ...


@dataclass
class Hypothesis:
    """A caption as token indices, with its probability under the decoder.

    tokens: without `<start>`; with the closing `<end>` if it came within `max_length`.
    log_probability: natural logarithm of the tokens' joint probability, `<end>` included.
    score: log_probability / len(tokens)**length_penalty, by which a beam ranks; elsewhere the penalty is 1.
    attention: (len(tokens), cells) on the CPU, where the decoder looked when it predicted each token; None
        unless it attends.
    """

    tokens: list[int]
    log_probability: float
    score: float
    attention: Tensor | None = None


@torch.no_grad()
def greedy(decoder: Decoder, features: Any, max_length: int = DEFAULT_LENGTH, min_length: int = 0) -> list[Hypothesis]:
    """Choose the most probable token at every step, for all images at once.

    features: what `decoder.init_state` takes, (B, ...).
    max_length: maximum number of tokens, `<end>` included. min_length: minimum number of tokens before `<end>`.
    Returns one hypothesis per image. Raises `InputError` if a length is out of range.
    """
    check_lengths(max_length, min_length)

    def choose(logits: Tensor, rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        log_p, words = _best_words(logits, 1, t >= min_length, banned=None)
        log_p, best = log_p.max(1, keepdim=True)
        return words.gather(1, best).squeeze(1), log_p.squeeze(1)

    return _decode(decoder, decoder.init_state(features), choose, max_length)


@torch.no_grad()
def sample(
    decoder: Decoder,
    features: Any,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    max_length: int = DEFAULT_LENGTH,
    min_length: int = 0,
    n: int = 1,
    indices: Sequence[int] | None = None,
) -> list[Hypothesis]:
    """Sample n captions of each image from the decoder's distribution, all at once.

    features, max_length, min_length: as in `greedy`.
    temperature: divides the logits; near 0 is greedy.
    top_k: sample from the k most probable tokens only (0: from all).
    top_p: then sample from the smallest set of tokens with this share of the probability (nucleus sampling,
        Holtzman et al., arXiv 1904.09751).
    seed, indices: the random numbers of an image depend on the seed and on the image's index alone, not on the
        rest of the batch or the device. The indices (B,) are 0 to B - 1 by default. Without a seed, the numbers come
        from torch's global generator.
    Returns B * n hypotheses, those of image i at [i * n : (i + 1) * n]; their log-probabilities are the
    model's at temperature 1. Raises `InputError` if a value is out of range.
    """
    check_lengths(max_length, min_length)
    check_sampling(temperature, top_k, top_p, seed, n)
    state = decoder.init_state(features)
    device, images = state[0].device, state[0].size(0)
    if n > 1:
        state = _select(state, torch.arange(images, device=device).repeat_interleave(n))
    uniform = _uniform(seed, range(images) if indices is None else indices, n, max_length).to(device)

    def choose(logits: Tensor, rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        token = _sample_tokens(logits, uniform[rows, t, None], t >= min_length, temperature, top_k, top_p)
        return token.squeeze(1), logits.log_softmax(1).gather(1, token).squeeze(1)

    return _decode(decoder, state, choose, max_length)


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    features: Any,
    beam_size: int = 3,
    max_length: int = DEFAULT_LENGTH,
    min_length: int = 0,
    length_penalty: float = 1.0,
    n_best: int = 1,
    block_trigrams: bool = False,
    groups: int = 1,
    diversity: float = 0.5,
) -> list[list[Hypothesis]]:
    """Find the best captions by beam search, for all images at once.

    An image has `beam_size` places. At every step the continuations of its live hypotheses compete for them by
    log-probability; a hypothesis that ends keeps its place and is not continued. The search of an image is over
    when none of its hypotheses is live, or at `max_length`, where live ones count as results as well, so that there
    is always a best one. With beam_size=1 this is `greedy`.

    features, max_length, min_length: as in `greedy`.
    length_penalty: results are ranked by log p / length**length_penalty, where length counts `<end>`: 0 ranks by
        probability, which favours short captions, 1 by the mean log p per token. (Wu et al., arXiv 1609.08144,
        section 7, divide by ((5 + length) / 6)**alpha instead.)
    n_best: hypotheses to return per image; fewer if the beam holds fewer different ones.
    block_trigrams: never choose a word that would repeat three words of its caption (Paulus et al.,
        arXiv 1705.04304, section 2.5).
    groups: divide the beam into this many groups. Each lowers the score of a word by `diversity` for every
        hypothesis of an earlier group that has chosen it at this step (Vijayakumar et al., arXiv 1610.02424, Hamming
        diversity). That steers the choice; the log-probabilities stay the model's.

    Returns for each image its hypotheses, best first. Raises `InputError` if a value is out of range.
    """
    check_lengths(max_length, min_length)
    check_beam(beam_size, length_penalty, n_best, groups, diversity)
    state = decoder.init_state(features)
    beams = _Beams.start(state[0].size(0), beam_size, groups, max_length, state[0].device)
    attention: list[Tensor] = []  # of all rows at each step, (rows, cells)
    # The decoder runs on live places only: row r of its batch is the place live[r] among the places of all images.
    live = beams.live()
    state = _select(state, live // beam_size)
    chunk_size = max(1, beams.ended.numel())
    for t in range(max_length):
        tokens = beams.tokens.flatten(0, 1)[live, :t]  # (rows, t)
        last = tokens[:, -1] if t else torch.full_like(live, START)
        repeats = _repeated_trigrams(tokens) if block_trigrams and t > 2 else None
        # At most beam_size words of a row can be chosen, even if diversity lowers the scores of some.
        options = {"k": beam_size, "may_end": t >= min_length}
        log_p, words, state, constant, chunk_size = _expand(decoder, last, state, repeats, chunk_size, **options)
        parents = _select_children(beams, live, log_p, words, t, groups, diversity)
        rows = torch.searchsorted(live, parents)  # meaningless for parents that had ended
        if decoder.attends:
            beams.attention_rows[:, :, t] = rows + sum(len(weights) for weights in attention)
            attention.append(state[-1])
        if groups == 1:  # groups may end in the same caption, so n_best ended ones may not be n_best different ones
            _prune(beams, n_best, length_penalty)
        previous, live = live, beams.live()
        if len(live) == 0 or t == max_length - 1:
            break
        # A tensor that a step returns unchanged, such as an image's cells, is the same for all rows of an image.
        unmoved = any(constant) and torch.equal(previous // beam_size, live // beam_size)
        rows = rows.flatten()[live]
        pairs = zip(state, constant, strict=True)
        state = tuple(x if same and unmoved else x.index_select(0, rows) for x, same in pairs)
    return _results(beams, torch.cat(attention).cpu() if attention else None, n_best, length_penalty)


@dataclass
class _Beams:
    """The beams of all images; each place holds a live or an ended hypothesis, or none (its log p is -inf)."""

    tokens: Tensor  # (images, beam_size, max_length), padded with <end>
    log_probability: Tensor  # (images, beam_size)
    ended: Tensor  # (images, beam_size)
    attention_rows: Tensor  # (images, beam_size, max_length), the row of each token among the rows of all steps

    @classmethod
    def start(cls, images: int, beam_size: int, groups: int, max_length: int, device: torch.device) -> _Beams:
        """Create beams in which the first place of each group is live and the others are empty."""
        tokens = torch.full((images, beam_size, max_length), END, device=device)
        log_probability = torch.full((images, beam_size), -torch.inf, device=device)
        log_probability[:, :: beam_size // groups] = 0
        ended = torch.zeros_like(log_probability, dtype=torch.bool)
        return cls(tokens, log_probability, ended, torch.zeros_like(tokens))

    def live(self) -> Tensor:
        """Return the live places in order, numbered over all images."""
        return (~self.ended & (self.log_probability > -torch.inf)).flatten().nonzero().squeeze(1)

    def scores(self, length_penalty: float) -> Tensor:
        """Compute log p / length**length_penalty, (images, beam_size)."""
        return self.log_probability / ((self.tokens != END).sum(2) + self.ended) ** length_penalty


def _expand(
    decoder: Decoder, last: Tensor, state: State, banned: Tensor | None, chunk_size: int, **options: Any
) -> tuple[Tensor, Tensor, State, list[bool], int]:
    """Run the decoder for one step on all rows, `chunk_size` of them at once.

    last, banned: (rows,) the last tokens and (rows, any) the words not allowed at this step. options: of `_best_words`.
    Returns the best words' log p and indices, (rows, k + 1) each; the next state; for each of its tensors, whether the
    step returned it unchanged; and the chunk size for the next step.
    """
    best, states = [], []
    for start in range(0, max(1, len(last)), chunk_size):
        chunk = slice(start, start + chunk_size)
        before = tuple(x[chunk] for x in state)
        logits, after = decoder.step(last[chunk], before)
        best.append(_best_words(logits, banned=None if banned is None else banned[chunk], **options))
        states.append(after)
    log_p, words = (torch.cat(x) for x in zip(*best, strict=True))
    constant = [x is y for x, y in zip(before, after, strict=True)]
    joined = zip(state, zip(*states, strict=True), constant, strict=True)
    state = tuple(x if same else torch.cat(chunks) for x, chunks, same in joined)
    if last.device.type == "cpu":
        chunk_size = max(1, CHUNK_ELEMENTS // max(x.shape[1:].numel() for x in (logits, *state)))
    return log_p, words, state, constant, chunk_size


def _select_children(
    beams: _Beams, live: Tensor, log_p: Tensor, words: Tensor, t: int, groups: int, diversity: float
) -> Tensor:
    """Fill all places with the best continuations of their image and group; returns the places of their parents.

    live: (rows,) the places that were expanded; log_p, words: (rows, options) their continuations.
    """
    (images, beam_size), options = beams.ended.shape, log_p.size(1)
    width = beam_size // groups
    before = beams.log_probability.flatten()
    # The continuation of an ended place is itself, with <end> written after its <end>.
    children = before.new_full((images * beam_size, options), -torch.inf)
    children[live] = log_p + before[live, None]
    children[:, 0] = torch.where(beams.ended.flatten(), before, children[:, 0])
    children = children.view(images, beam_size * options)
    child_words = torch.full((images * beam_size, options), END, device=words.device)
    child_words[live] = words
    child_words = child_words.view(images, beam_size * options)
    staying = beams.ended.repeat_interleave(options, 1) & (children > -torch.inf)

    ranked, best = children.masked_fill(staying, torch.inf), []
    chosen = child_words[:, :0]  # words that earlier groups have chosen
    for start in range(0, beam_size * options, width * options):
        group = slice(start, start + width * options)
        num_chosen = (child_words[:, group, None] == chosen[:, None, :]).sum(2)
        best.append((ranked[:, group] - diversity * num_chosen).topk(width, 1).indices + start)
        if groups > 1:
            new = child_words.gather(1, best[-1]).masked_fill(staying.gather(1, best[-1]), -1)
            chosen = torch.cat([chosen, new], 1)
    best = torch.cat(best, 1)  # (images, beam_size)

    parents = torch.arange(images, device=best.device)[:, None] * beam_size + best // options
    beams.tokens = beams.tokens.flatten(0, 1)[parents]
    beams.tokens[:, :, t] = child_words.gather(1, best)
    beams.log_probability = children.gather(1, best)
    beams.ended = (beams.tokens[:, :, t] == END) & (beams.log_probability > -torch.inf)
    beams.attention_rows = beams.attention_rows.flatten(0, 1)[parents]
    return parents


def _prune(beams: _Beams, n_best: int, length_penalty: float) -> None:
    """Drop the live hypotheses of which no continuation can be among the n_best.

    log p only falls as words are added, so log p / max_length**length_penalty is an upper bound of a hypothesis's
    final score; it is compared with the worst of the n_best that have ended.
    """
    scores = beams.scores(length_penalty).masked_fill(~beams.ended, -torch.inf)
    worst = scores.topk(n_best, 1).values[:, -1:]
    bound = beams.log_probability / beams.tokens.size(2) ** length_penalty
    beams.log_probability.masked_fill_(~beams.ended & (bound <= worst), -torch.inf)


def _results(beams: _Beams, attention: Tensor | None, n_best: int, length_penalty: float) -> list[list[Hypothesis]]:
    """Return the n_best different hypotheses of each image, best first.

    attention: (rows of all steps, cells) on the CPU, if the decoder attends.
    """
    scores, order = beams.scores(length_penalty).sort(1, descending=True)
    by_score = order[:, :, None].expand_as(beams.tokens)
    tokens, rows = beams.tokens.gather(1, by_score).tolist(), beams.attention_rows.gather(1, by_score).cpu()
    log_p, scores = beams.log_probability.gather(1, order).tolist(), scores.tolist()
    results = []
    for i, image_tokens in enumerate(tokens):
        different: dict[tuple[int, ...], Hypothesis] = {}
        for j, words in enumerate(map(_through_end, image_tokens)):
            if log_p[i][j] > -math.inf and len(different) < n_best:
                weights = None if attention is None else attention[rows[i, j, : len(words)]]
                different.setdefault(tuple(words), Hypothesis(words, log_p[i][j], scores[i][j], weights))
        results.append(list(different.values()))
    return results


def _decode(decoder: Decoder, state: State, choose: Choose, max_length: int) -> list[Hypothesis]:
    """Decode one caption for each row of `state`.

    `choose(logits, rows, t)` returns the tokens of these rows at step t and their log-probabilities.
    """
    device, batch = state[0].device, state[0].size(0)
    tokens = torch.full((batch, max_length), END, device=device)
    log_probability = torch.zeros(batch, device=device)
    attention = None
    rows = torch.arange(batch, device=device)  # captions that have not ended
    last = torch.full_like(rows, START)
    for t in range(max_length):
        logits, state = decoder.step(last, state)
        last, log_p = choose(logits.float(), rows, t)
        tokens[rows, t] = last
        log_probability[rows] += log_p
        if decoder.attends:
            if attention is None:
                attention = state[-1].new_zeros(batch, max_length, state[-1].size(1))
            attention[rows, t] = state[-1]
        unfinished = (last != END).nonzero().squeeze(1)  # the only device sync per step
        if len(unfinished) == 0:
            break
        if len(unfinished) < len(rows):
            rows, last, state = rows[unfinished], last[unfinished], _select(state, unfinished)
    weights = [None] * batch if attention is None else attention.cpu()
    captions = zip(map(_through_end, tokens.tolist()), log_probability.tolist(), weights, strict=True)
    return [Hypothesis(row, p, p / len(row), None if x is None else x[: len(row)]) for row, p, x in captions]


def _best_words(logits: Tensor, k: int, may_end: bool, banned: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return log p and indices, both (B, k + 1), of the k best words of each row of logits (B, V) and of `<end>`."""
    log_p = logits.float().log_softmax(1)
    end = log_p[:, END : END + 1]
    allowed = log_p if banned is None else log_p.scatter(1, banned, -torch.inf)
    best, words = allowed[:, FIRST_WORD:].topk(min(k, log_p.size(1) - FIRST_WORD), 1)
    if not may_end:
        end = end.masked_fill(best.isfinite().any(1, keepdim=True), -torch.inf)
    ends = torch.full_like(end, END, dtype=words.dtype)
    return torch.cat([best, end], 1), torch.cat([words + FIRST_WORD, ends], 1)


def _sample_tokens(
    logits: Tensor, uniform: Tensor, may_end: bool, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Sample one token per row of logits (B, V) by inverse transform sampling.

    uniform: (B, 1) random numbers in (0, 1]. Returns the tokens, (B, 1).
    """
    options = logits[:, FIRST_WORD:]
    may_end = may_end or options.size(1) == 0
    if may_end:
        options = torch.cat([options, logits[:, END : END + 1]], 1)
    p = ((options - options.amax(1, keepdim=True)) / float(temperature)).softmax(1)
    order = None
    if top_k or top_p < 1:
        p, order = p.topk(min(top_k or p.size(1), p.size(1)), 1)
    cumulative = p.cumsum(1)
    last_option = torch.searchsorted(cumulative, top_p * cumulative[:, -1:])
    # uniform is scaled to the probability of the remaining options, so that none beyond them is chosen.
    choice = torch.searchsorted(cumulative, uniform * cumulative.gather(1, last_option))
    if order is not None:
        choice = order.gather(1, choice)
    is_end = (choice == options.size(1) - 1) & may_end
    return torch.where(is_end, END, choice + FIRST_WORD)


def _uniform(seed: int | None, indices: Sequence[int], n: int, max_length: int) -> Tensor:
    """Draw random numbers in (0, 1], (len(indices) * n, max_length), on the CPU; a seed gives each image a stream."""
    if seed is None:
        return 1 - torch.rand(len(indices) * n, max_length)
    streams = (np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,))) for i in indices)
    numbers = [1 - stream.random((n, max_length), dtype=np.float32) for stream in streams]
    return torch.from_numpy(np.array(numbers, dtype=np.float32)).view(-1, max_length)


def _repeated_trigrams(tokens: Tensor) -> Tensor:
    """Return the words (B, t - 2) that would repeat a trigram of tokens (B, t), padded with `<start>`."""
    repeats = (tokens[:, :-2] == tokens[:, -2:-1]) & (tokens[:, 1:-1] == tokens[:, -1:])
    return torch.where(repeats, tokens[:, 2:], START)


def _select(state: State, rows: Tensor) -> State:
    return tuple(x.index_select(0, rows) for x in state)


def _through_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


def check_lengths(max_length: int = DEFAULT_LENGTH, min_length: int = 0) -> None:
    """Raise InputError if a length is out of range."""
    _check(max_length >= 1, f"max_length is {max_length}, but it has to be at least 1.")
    _check_range("min_length", min_length, 0, max_length)


def check_sampling(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None, n: int = 1
) -> None:
    """Raise InputError if an option of `sample` is out of range."""
    _check_range("temperature", temperature, 1e-6, 1_000_000)
    _check(top_k >= 0, f"top_k is {top_k}, but it has to be at least 1, or 0 for all tokens.")
    _check(0 < top_p <= 1, f"top_p is {top_p}, but it has to be above 0 and at most 1.")
    _check(
        seed is None or 0 <= seed < 2**64,
        "seed is out of range: it has to be from 0 to 2**64 - 1, a number of 64 bits.",
    )
    _check(n >= 1, f"n is {n}, but it has to be at least 1.")


def check_beam(
    beam_size: int = 3, length_penalty: float = 1.0, n_best: int = 1, groups: int = 1, diversity: float = 0.5
) -> None:
    """Raise InputError if an option of `beam_search` is out of range."""
    _check(beam_size >= 1, f"beam_size is {beam_size}, but it has to be at least 1.")
    _check_range("n_best", n_best, 1, beam_size)
    _check(groups >= 1 and beam_size % groups == 0, f"groups is {groups}, but it has to divide beam_size, {beam_size}.")
    _check_range("length_penalty", length_penalty, 0, 10)
    _check_range("diversity", diversity, 0, 1000)


def _check_range(name: str, value: float, least: float, most: float) -> None:
    _check(least <= value <= most, f"{name} is {value}, but it has to be from {least:,} to {most:,}.")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
