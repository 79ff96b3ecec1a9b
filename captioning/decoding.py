"""Greedy, beam and sampled decoding of captions, for any decoder that offers `init_state` and `step`.

Three rules hold for all of them. `<start>` is never chosen, nor `<unk>` unless `allow_unk`. What may be
chosen (those bans, `min_length`, blocked trigrams, temperature, top-k, top-p) never changes a
log-probability that is reported: that one is the model's own, over its full softmax. And where every word
is banned, `<end>` is chosen even if `min_length` has not been reached, so each image has a caption.

A decoder in training mode would drop units at random here too; call `decoder.eval()` first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from captioning.errors import InputError
from vocabulary import END, START, UNK

State = tuple[Tensor, ...]

# The numbers in the largest tensor that a CPU computes at once, 16 MB. The allocator asks the system for a
# larger one anew at every step: 500 photos with attention and a beam of 5 would take twice as long.
PART = 2**22


class Decoder(Protocol):
    """What decoding asks of a decoder.

    Every tensor of a state has the batch as its first dimension. A step leaves the state that it was given
    as it is; it may hand on a tensor of it untouched only if that depends on the image alone.
    """

    def init_state(self, features: Tensor) -> State:
        """The state after the features (B, ...) of B images have been read, before `<start>`."""

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, V) of the word after `tokens` (B,) int64, and the next state."""


@dataclass
class Hypothesis:
    """A caption as a decoder found it.

    tokens: word indices without `<start>`, with the closing `<end>` if it came within `max_length`.
    log_probability: natural logarithm of the tokens' joint probability, `<end>` included, under the model.
    attention: (len(tokens), regions), the weights while each token was predicted, `<end>` included, on the
        CPU; None unless `decoder.attends`. The regions' weights are taken from the last tensor of the state.
    """

    tokens: list[int]
    log_probability: float
    attention: Tensor | None = None


@torch.no_grad()
def greedy(
    decoder: Decoder, features: Tensor, max_length: int = 20, min_length: int = 0, allow_unk: bool = False
) -> list[Hypothesis]:
    """The most probable word at every step, for all images at once.

    features: (B, ...) what `decoder.init_state` takes.
    max_length: tokens at most, `<end>` included. min_length: words before `<end>` at least.
    Returns one hypothesis an image. Raises InputError if a length is out of range.
    """
    _check_lengths(max_length, min_length)

    def choose(logits: Tensor, rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        log_p, words = _best_words(logits, 1, t >= min_length, allow_unk)
        log_p, best = log_p.max(1, keepdim=True)
        return words.gather(1, best).squeeze(1), log_p.squeeze(1)

    return _decode(decoder, decoder.init_state(features), choose, max_length)


@torch.no_grad()
def sample(
    decoder: Decoder,
    features: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    max_length: int = 20,
    min_length: int = 0,
    n: int = 1,
    allow_unk: bool = False,
) -> list[Hypothesis]:
    """Captions drawn at random from the model, n for each image, all at once.

    features, max_length, min_length: as in `greedy`.
    temperature: the logits are divided by it; near 0 is greedy.
    top_k: draw from the k most probable words only (0: from all).
    top_p: then draw from the fewest words that hold this share of the probability (nucleus sampling,
        Holtzman et al., arXiv 1904.09751).
    seed: what is drawn for image i depends on it, on i and on n, not on the images after i nor on which
        captions end first. None uses torch's global generator.
    Returns B * n hypotheses, those of image i at [i * n : (i + 1) * n]; their log-probabilities are those of
    the model as it is, at temperature 1. Raises InputError if a value is out of range.
    """
    _check_lengths(max_length, min_length)
    _check(temperature > 0, f"temperature is {temperature}, but it has to be above 0.")
    _check(top_k >= 0, f"top_k is {top_k}, but it has to be at least 1, or 0 for all words.")
    _check(0 < top_p <= 1, f"top_p is {top_p}, but it has to be above 0 and at most 1.")
    _check(n >= 1, f"n is {n}, but at least 1 caption has to be drawn for an image.")
    state = decoder.init_state(features)
    device, images = state[0].device, state[0].size(0)
    if n > 1:
        state = _select(state, torch.arange(images, device=device).repeat_interleave(n))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    # On the CPU whatever the device, so a seed means the same everywhere; in (0, 1], never 0.
    uniform = (1 - torch.rand(images * n, max_length, generator=generator)).to(device)

    def choose(logits: Tensor, rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        first = UNK if allow_unk else UNK + 1
        options = logits[:, first:]
        may_end = t >= min_length or options.size(1) == 0
        if may_end:
            options = torch.cat([options, logits[:, END : END + 1]], 1)
        peak = options.amax(1, keepdim=True)
        p = ((options - peak) / temperature).softmax(1)
        order = None
        if top_k or top_p < 1:
            p, order = p.topk(min(top_k or p.size(1), p.size(1)), 1)
        cumulative = p.cumsum(1)
        share = top_p * cumulative[:, -1:]
        # The draw is scaled to the probability kept, so it cannot land on a word beyond it.
        kept = cumulative.gather(1, torch.searchsorted(cumulative, share))
        choice = torch.searchsorted(cumulative, uniform[rows, t, None] * kept)
        if order is not None:
            choice = order.gather(1, choice)
        is_end = (choice == options.size(1) - 1) & may_end
        token = torch.where(is_end, END, choice + first)
        return token.squeeze(1), logits.log_softmax(1).gather(1, token).squeeze(1)

    return _decode(decoder, state, choose, max_length)


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    features: Tensor,
    beam_size: int = 3,
    max_length: int = 20,
    min_length: int = 0,
    length_penalty: float = 1.0,
    n_best: int = 1,
    block_trigrams: bool = False,
    groups: int = 1,
    diversity: float = 0.5,
    allow_unk: bool = False,
) -> list[list[Hypothesis]]:
    """The best captions among those that a beam of `beam_size` keeps, for all images at once.

    An image has `beam_size` places. At every step the continuations of its live hypotheses compete for them
    by log-probability; one that ends keeps its place for good and is no longer continued. The search of an
    image is over when nothing in it is live, or at `max_length`, where live hypotheses count as results too,
    so there is always a best one. With beam_size=1 this is `greedy`.

    features, max_length, min_length: as in `greedy`.
    length_penalty: results are ranked by log p / length**length_penalty, length in tokens with `<end>`:
        0 ranks by probability, which favours short captions, 1 by the mean of the tokens' log p. (Wu et
        al., arXiv 1609.08144, section 7, divide by ((5 + length) / 6)**alpha instead.)
    n_best: hypotheses to return for an image; fewer where the beam holds fewer different ones.
    block_trigrams: never choose a word that would repeat three words of its caption (Paulus et al.,
        arXiv 1705.04304, section 2.5).
    groups: divide the beam into that many groups, each lowering the scores of words by `diversity` for
        every hypothesis of an earlier group that has chosen them at this step (Vijayakumar et al., arXiv
        1610.02424, Hamming diversity). That steers the choice; the log-probabilities stay the model's.

    A live hypothesis is dropped as soon as no continuation of it could be returned: log p only falls as
    words are added, so log p / max_length**length_penalty bounds what it can become, and that is compared
    with the worst of the n_best that have ended. An image with nothing live costs nothing more.

    Returns for each image its hypotheses, best first. Raises InputError if a value is out of range.
    """
    _check_lengths(max_length, min_length)
    _check(beam_size >= 1, f"beam_size is {beam_size}, but it has to be at least 1.")
    _check(1 <= n_best <= beam_size, f"n_best is {n_best}, but it has to be from 1 to {beam_size} beams.")
    divides = groups >= 1 and beam_size % groups == 0
    _check(divides, f"groups is {groups}, but it has to divide {beam_size} beams.")
    _check(length_penalty >= 0, f"length_penalty is {length_penalty}, but it has to be at least 0.")
    _check(diversity >= 0, f"diversity is {diversity}, but it has to be at least 0.")

    state = decoder.init_state(features)
    device, images = state[0].device, state[0].size(0)
    width = beam_size // groups
    # A place (image, beam) is live, ended, or empty: log p is -inf. At first one in each group is live.
    tokens = torch.full((images, beam_size, max_length), END, device=device)
    log_probability = torch.full((images, beam_size), -torch.inf, device=device)
    log_probability[:, ::width] = 0
    ended = torch.zeros_like(log_probability, dtype=torch.bool)
    attends = getattr(decoder, "attends", False)
    # The weights of all rows of all steps, and which of them belong to a token.
    attention, seen = [], torch.zeros_like(tokens)

    # The decoder computes live places only: row r of its batch is place live[r], counted over all images.
    live = (log_probability > -torch.inf).flatten().nonzero().squeeze(1)
    state = _select(state, live // beam_size)
    row_of = torch.zeros(images * beam_size, dtype=torch.int64, device=device)
    first_place = torch.arange(images, device=device)[:, None] * beam_size
    part_size = max(1, images * beam_size)
    for t in range(max_length):
        last = tokens.flatten(0, 1)[live, t - 1] if t else torch.full_like(live, START)
        repeats = _repeated_trigrams(tokens.flatten(0, 1)[live, :t]) if block_trigrams and t > 2 else None
        found, parts = [], []
        for i in range(0, max(1, len(live)), part_size):
            part = slice(i, i + part_size)
            before = tuple(x[part] for x in state)
            logits, after = decoder.step(last[part], before)
            banned = None if repeats is None else repeats[part]
            # Of one row, no more than beam_size words can win, even if diversity pushes some of them down.
            found.append(_best_words(logits, beam_size, t >= min_length, allow_unk, banned))
            parts.append(after)
        log_p, words = (torch.cat(x) for x in zip(*found, strict=True))
        constant = [x is y for x, y in zip(before, after, strict=True)]
        joined = zip(state, zip(*parts, strict=True), constant, strict=True)
        state = tuple(x if same else torch.cat(new) for x, new, same in joined)
        if device.type == "cpu":
            part_size = max(1, PART // max(x.shape[1:].numel() for x in (logits, *state)))

        options = log_p.size(1)
        # All places' continuations. That of an ended place is itself, with <end> written where <end> was.
        children = torch.full((images * beam_size, options), -torch.inf, device=device)
        children[live] = log_p + log_probability.flatten()[live, None]
        children[:, 0] = torch.where(ended.flatten(), log_probability.flatten(), children[:, 0])
        children = children.view(images, beam_size * options)
        child_words = torch.full((images * beam_size, options), END, device=device)
        child_words[live] = words
        child_words = child_words.view(images, beam_size * options)
        staying = ended.repeat_interleave(options, 1) & (children > -torch.inf)

        ranked, best = children.masked_fill(staying, torch.inf), []
        chosen = child_words[:, :0]
        for group in range(groups):
            part = slice(group * width * options, (group + 1) * width * options)
            met = (child_words[:, part, None] == chosen[:, None, :]).sum(2)
            best.append((ranked[:, part] - diversity * met).topk(width, 1).indices + part.start)
            if groups > 1:
                new = child_words.gather(1, best[-1]).masked_fill(staying.gather(1, best[-1]), -1)
                chosen = torch.cat([chosen, new], 1)
        best = torch.cat(best, 1)

        parents = first_place + best // options
        tokens = tokens.flatten(0, 1)[parents]
        tokens[:, :, t] = child_words.gather(1, best)
        log_probability = children.gather(1, best)
        ended = (tokens[:, :, t] == END) & (log_probability > -torch.inf)
        row_of[live] = torch.arange(len(live), device=device)
        if attends:
            seen = seen.flatten(0, 1)[parents]
            seen[:, :, t] = row_of[parents] + sum(len(weights) for weights in attention)
            attention.append(state[-1])

        score = log_probability / ((tokens != END).sum(2) + ended) ** length_penalty
        if groups == 1:  # two groups can end alike, so there the n_best that have ended may be fewer
            worst = score.masked_fill(~ended, -torch.inf).topk(n_best, 1).values[:, -1:]
            hopeless = ~ended & (log_probability / max_length**length_penalty <= worst)
            log_probability = log_probability.masked_fill(hopeless, -torch.inf)
            score = score.masked_fill(hopeless, -torch.inf)
        was_live, live = live, (~ended & (log_probability > -torch.inf)).flatten().nonzero().squeeze(1)
        if len(live) == 0 or t == max_length - 1:
            break
        rows = row_of[parents.flatten()[live]]
        # What a step hands on untouched, as the cells of a photo, is the same for all of an image's rows.
        same_images = any(constant) and torch.equal(was_live // beam_size, live // beam_size)
        untouched = [same and same_images for same in constant]
        state = tuple(x if same else x.index_select(0, rows) for x, same in zip(state, untouched, strict=True))

    order = score.argsort(1, descending=True)
    tokens = tokens.gather(1, order[:, :, None].expand_as(tokens)).tolist()
    log_probability = log_probability.gather(1, order).tolist()
    if attends:
        weights, seen = torch.cat(attention).cpu(), seen.gather(1, order[:, :, None].expand_as(seen)).cpu()
    results = []
    for i in range(images):
        different: dict[tuple[int, ...], Hypothesis] = {}
        for j in range(beam_size):
            if log_probability[i][j] > -torch.inf and len(different) < n_best:
                words = _through_end(tokens[i][j])
                seen_by = weights[seen[i, j, : len(words)]] if attends else None
                different.setdefault(tuple(words), Hypothesis(words, log_probability[i][j], seen_by))
        results.append(list(different.values()))
    return results


def _decode(
    decoder: Decoder,
    state: State,
    choose: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    max_length: int,
) -> list[Hypothesis]:
    """One caption for each row of `state`; `choose(logits, rows, t)` is what these rows get at step t.

    It returns the tokens and their log-probabilities.
    """
    device, captions = state[0].device, state[0].size(0)
    tokens = torch.full((captions, max_length), END, device=device)
    log_probability = torch.zeros(captions, device=device)
    attends, attention = getattr(decoder, "attends", False), None
    rows = torch.arange(captions, device=device)  # the captions that have not ended
    last = torch.full_like(rows, START)
    for t in range(max_length):
        logits, state = decoder.step(last, state)
        last, log_p = choose(logits.float(), rows, t)
        tokens[rows, t] = last
        log_probability[rows] += log_p
        if attends:
            if attention is None:
                attention = state[-1].new_zeros(captions, max_length, state[-1].size(1))
            attention[rows, t] = state[-1]
        going_on = (last != END).nonzero().squeeze(1)  # the one wait for the device in a step
        if len(going_on) == 0:
            break
        if len(going_on) < len(rows):
            rows, last, state = rows[going_on], last[going_on], _select(state, going_on)
    words = [_through_end(row) for row in tokens.tolist()]
    if attends and attention is not None:
        attention = attention.cpu()
        seen = [attention[i, : len(row)] for i, row in enumerate(words)]
    else:
        seen = [None] * captions
    return [Hypothesis(*parts) for parts in zip(words, log_probability.tolist(), seen, strict=True)]


def _best_words(
    logits: Tensor, k: int, may_end: bool, allow_unk: bool, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best words of each row of logits (B, V), and `<end>`: log p and indices, both (B, k + 1)."""
    log_p = logits.float().log_softmax(1)
    first = UNK if allow_unk else UNK + 1
    end = log_p[:, END : END + 1]
    allowed = log_p if banned is None else log_p.scatter(1, banned, -torch.inf)
    best, words = allowed[:, first:].topk(min(k, log_p.size(1) - first), 1)
    if not may_end:
        end = end.masked_fill(best.isfinite().any(1, keepdim=True), -torch.inf)
    ends = torch.full_like(end, END, dtype=words.dtype)
    return torch.cat([best, end], 1), torch.cat([words + first, ends], 1)


def _repeated_trigrams(tokens: Tensor) -> Tensor:
    """The words (B, t - 2) that would repeat a trigram of tokens (B, t); `<start>` where there is none."""
    repeats = (tokens[:, :-2] == tokens[:, -2:-1]) & (tokens[:, 1:-1] == tokens[:, -1:])
    return torch.where(repeats, tokens[:, 2:], START)


def _select(state: State, rows: Tensor) -> State:
    return tuple(part.index_select(0, rows) for part in state)


def _through_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_lengths(max_length: int, min_length: int) -> None:
    _check(max_length >= 1, f"max_length is {max_length}, but it has to be at least 1.")
    _check(
        0 <= min_length <= max_length,
        f"min_length is {min_length}, but it has to be from 0 to max_length, {max_length}.",
    )
