"""CIDEr-D for rewards is pycocoevalcap's CIDEr."""

from __future__ import annotations

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from captioning.cider import CiderD
from captioning.errors import InputError


def random_corpus(images=60, words=12, seed=0):
    """Captions of 0 to 14 words out of few, so that n-grams repeat within a caption and between images."""
    rng = np.random.default_rng(seed)

    def caption():
        return rng.integers(0, words, rng.integers(0, 15)).tolist()

    references = {f"photo {i}": [caption() for _ in range(rng.integers(1, 7))] for i in range(images)}
    hypotheses = [caption() + [words + i % 3] * (i % 4) for i in range(images)]
    return references, hypotheses


def official_cider(references, hypotheses):
    def text(caption):
        return " ".join(f"w{word}" for word in caption)

    truth = {i: [text(caption) for caption in group] for i, group in references.items()}
    return Cider().compute_score(truth, {i: [text(h)] for i, h in zip(references, hypotheses, strict=True)})


@pytest.mark.parametrize("seed", range(5))
def test_cider_d_is_pycocoevalcaps_cider(seed):
    references, hypotheses = random_corpus(seed=seed)
    total, each = official_cider(references, hypotheses)
    mine = CiderD(references)(list(references), hypotheses)
    np.testing.assert_allclose(mine, each, rtol=0, atol=1e-9)
    assert mine.mean() == pytest.approx(total)
    assert total > 0.1


def test_cider_d_takes_words_as_it_takes_indices():
    references, hypotheses = random_corpus()
    as_words = {i: [[f"w{word}" for word in c] for c in group] for i, group in references.items()}
    words = CiderD(as_words)(list(references), [[f"w{word}" for word in h] for h in hypotheses])
    np.testing.assert_array_equal(words, CiderD(references)(list(references), hypotheses))


def test_cider_d_scores_any_choice_of_images_in_any_order():
    references, hypotheses = random_corpus()
    scorer = CiderD(references)
    ids = list(references)
    whole = scorer(ids, hypotheses)
    pick = [5, 3, 3, 40]
    np.testing.assert_allclose(scorer([ids[i] for i in pick], [hypotheses[i] for i in pick]), whole[pick])
    assert scorer([], []).shape == (0,)


def test_cider_d_refuses_what_it_cannot_score():
    scorer = CiderD({1: [[4, 5, 6]]})
    with pytest.raises(InputError, match="image 2"):
        scorer([2], [[4]])
    with pytest.raises(ValueError, match="1 ids for 2"):
        scorer([1], [[4], [5]])
    for references in ({}, {1: []}, {1: [[]]}):
        with pytest.raises(InputError, match="CIDEr-D"):
            CiderD(references)
    with pytest.raises(InputError, match="65,535"):
        CiderD({1: [list(range(1 << 16))]})
    assert CiderD({1: [list(range(65535))]})([1], [[3]]).tolist() == [0.0]
