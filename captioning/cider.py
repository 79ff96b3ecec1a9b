"""CIDEr-D of many captions at once, fast enough to be the reward of self-critical training."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

from captioning.errors import InputError


class CiderD:
    """CIDEr-D (arXiv 1411.5726, equations 4 and 5) as a reward for self-critical training (arXiv 1612.00563).

    The value is pycocoevalcap's CIDEr (sigma 6, times 10), with document frequencies from all `references`. Their
    vectors are computed once, on construction; a call then scores tens of thousands of captions per second.

    references: image id -> its reference captions, each a sequence of tokens: vocabulary indices or words.
        Whether `<end>` is one of the tokens is the caller's choice, the same for references and hypotheses.

    Raises `InputError` for an image without references, for references that are all empty, and for more than 65,535
    different tokens.
    """

    def __init__(self, references: Mapping[Hashable, Sequence[Sequence[Hashable]]]) -> None:
        if not references or not all(len(group) for group in references.values()):
            raise InputError("CIDEr-D needs a reference caption for every image; leave out images without one.")
        self._row = {image: row for row, image in enumerate(references)}
        self._codes: dict[Hashable, int] = {}
        captions = [caption for group in references.values() for caption in group]
        counts = np.array([len(group) for group in references.values()])
        self._first = np.concatenate([[0], np.cumsum(counts)])  # (images + 1,) first reference of each image
        self._log_images = np.log(len(counts))

        owner, keys, self._lengths = _ngrams(self._encode(captions, self._codes))
        if not keys.size:
            raise InputError("CIDEr-D needs words in the references; all of them are empty.")
        self._keys, ngram = np.unique(keys, return_inverse=True)  # (ngrams,) sorted
        entries, frequency = np.unique(owner * len(self._keys) + ngram, return_counts=True)
        owner, self._ngram = np.divmod(entries, len(self._keys))  # (entries,) the references' n-grams
        image = np.repeat(np.arange(len(counts)), counts)
        # With return_counts, np.unique sorts; without, it hashes, 30 times slower here.
        documents, _ = np.unique(image[owner] * len(self._keys) + self._ngram, return_counts=True)
        frequency_in_images = np.bincount(documents % len(self._keys))
        self._idf = self._log_images - np.log(frequency_in_images)
        self._weight = frequency * self._idf[self._ngram]
        self._norms = _norms(owner, self._keys[self._ngram], self._weight, len(captions))
        self._start = np.searchsorted(owner, np.arange(len(captions) + 1))  # (references + 1,) into entries

    def _encode(self, captions: Iterable[Sequence[Hashable]], codes: dict[Hashable, int]) -> list[list[int]]:
        encoded = [[codes.setdefault(token, len(codes) + 1) for token in caption] for caption in captions]
        if len(codes) >= 1 << 16:
            raise InputError("CIDEr-D takes at most 65,535 different tokens; use a smaller vocabulary.")
        return encoded

    def __call__(self, ids: Sequence[Hashable], hypotheses: Sequence[Sequence[Hashable]]) -> np.ndarray:
        """Compute CIDEr-D of each hypothesis against its image's references: (captions,) float64, 0 to 10.

        ids: the image of each hypothesis, repeated if an image has several. Raises `InputError` for an image without
        references.
        """
        try:
            rows = np.array([self._row[image] for image in ids], dtype=np.int64)
        except KeyError as error:
            raise InputError(f"image {error.args[0]} has no reference captions for CIDEr-D.") from error
        if len(rows) != len(hypotheses):
            raise ValueError(f"{len(rows)} ids for {len(hypotheses)} hypotheses")
        entries, weights, norms, lengths = self._vectors(hypotheses)
        owner, reference = _ranges(self._first[rows], self._first[rows + 1])  # (pairs,) hypothesis, one of its image's
        dot = self._dot(entries, weights, owner, reference)
        scale = norms[owner] * self._norms[reference]
        similarity = np.divide(dot, scale, out=np.zeros_like(scale), where=scale > 0)  # (pairs, 4)
        difference = lengths[owner] - self._lengths[reference]
        value = similarity.mean(1) * np.exp(-(difference**2) / (2 * 6.0**2))
        return 10 * np.bincount(owner, value, len(rows)) / (self._first[rows + 1] - self._first[rows])

    def _vectors(
        self, hypotheses: Sequence[Sequence[Hashable]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Compute the vectors of the hypotheses: entries, weights, norms (hypotheses, 4) and lengths.

        The entries are hypothesis * (number of the references' n-grams) + n-gram, sorted, without other n-grams.
        """
        # A copy of the codes, so that tokens that occur only in hypotheses do not accumulate.
        owner, keys, lengths = _ngrams(self._encode(hypotheses, self._codes.copy()))
        distinct, ngram = np.unique(keys, return_inverse=True)
        entries, frequency = np.unique(owner * len(distinct) + ngram, return_counts=True)
        owner, ngram = np.divmod(entries, max(len(distinct), 1))
        place = np.minimum(np.searchsorted(self._keys, distinct), len(self._keys) - 1)
        known = self._keys[place] == distinct
        weights = frequency * np.where(known, self._idf[place], self._log_images)[ngram]
        norms = _norms(owner, distinct[ngram], weights, len(hypotheses))
        known = known[ngram]
        return owner[known] * len(self._keys) + place[ngram[known]], weights[known], norms, lengths

    def _dot(self, entries: np.ndarray, weights: np.ndarray, owner: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Multiply the vectors of hypotheses, each entry clipped to the reference's, by references': (pairs, 4).

        owner, reference: (pairs,) the hypothesis and the reference of each pair.
        """
        pair, of_reference = _ranges(self._start[reference], self._start[reference + 1])
        wanted = owner[pair] * len(self._keys) + self._ngram[of_reference]
        at = np.searchsorted(entries, wanted)
        hit = np.append(entries, -1)[at] == wanted
        pair, at, of_reference = pair[hit], at[hit], of_reference[hit]
        product = np.minimum(weights[at], self._weight[of_reference]) * self._weight[of_reference]
        order = _order(self._keys[self._ngram[of_reference]])
        return np.bincount(pair * 4 + order, product, len(owner) * 4).reshape(-1, 4)


def _ngrams(captions: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the caption and the key of every 1- to 4-gram, and every caption's length.

    A key is one integer, 16 bits per token. pycocoevalcap counts the length in bigrams.
    """
    sizes = np.array([len(caption) for caption in captions], dtype=np.int64)
    tokens = np.fromiter(chain.from_iterable(captions), dtype=np.uint64, count=sizes.sum())
    owner = np.repeat(np.arange(len(captions)), sizes)
    owners, keys, key = [owner], [tokens], tokens
    for n in range(1, 4):
        key = (key[:-1] << np.uint64(16)) | tokens[n:]
        inside = owner[: len(key)] == owner[n:]
        owners.append(owner[: len(key)][inside])
        keys.append(key[inside])
    return np.concatenate(owners), np.concatenate(keys), np.maximum(sizes - 1, 0)


def _order(keys: np.ndarray) -> np.ndarray:
    """Return n - 1 of each n-gram."""
    return (keys >> np.uint64(16) > 0).astype(int) + (keys >> np.uint64(32) > 0) + (keys >> np.uint64(48) > 0)


def _norms(owner: np.ndarray, keys: np.ndarray, weight: np.ndarray, captions: int) -> np.ndarray:
    return np.sqrt(np.bincount(owner * 4 + _order(keys), weight**2, captions * 4)).reshape(captions, 4)


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the i of each number in the ranges start[i]:stop[i], and the numbers, concatenated."""
    sizes = stop - start
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return owner, np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes - start, sizes)
