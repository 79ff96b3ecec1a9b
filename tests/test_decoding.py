from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from captioning import decoding
from captioning.captioner import EnsembleDecoder
from captioning.decoding import Hypothesis, beam_search, greedy, sample
from captioning.errors import InputError
from model import DECODERS, AttentionDecoder, DecoderRNN
from vocabulary import END, START, UNK

REGIONS = 49


class Toy:
    """A recurrent decoder without training: its state remembers every token, features bias the logits."""

    attends = False

    def __init__(self, vocab_size: int, seed: int = 0, scale: float = 2.0):
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(vocab_size, 8, generator=generator)
        self.out = torch.randn(8, vocab_size, generator=generator) * scale
        self.look = torch.randn(8, REGIONS, generator=generator)
        self.rows = []

    def init_state(self, features):
        return torch.zeros(len(features), 8), features

    def step(self, tokens, state):
        self.rows.append(len(tokens))
        hidden = torch.tanh(0.7 * state[0] + self.embed[tokens])
        return hidden @ self.out + state[1], (hidden, state[1])


class AttendingToy(Toy):
    attends = True

    def init_state(self, features):
        return *super().init_state(features), torch.zeros(len(features), REGIONS)

    def step(self, tokens, state):
        logits, (hidden, features) = super().step(tokens, state)
        return logits, (hidden, features, (hidden @ self.look).softmax(1))


class GrowingToy(AttendingToy):
    """Its state holds the embeddings of all tokens so far, as the cache of a transformer does."""

    def init_state(self, features):
        return torch.zeros(len(features), 0, 8), features, torch.zeros(len(features), REGIONS)

    def step(self, tokens, state):
        self.rows.append(len(tokens))
        cache = torch.cat([state[0], self.embed[tokens][:, None]], 1)  # (B, t + 1, 8)
        decay = 0.7 ** torch.arange(cache.size(1)).flip(0)
        hidden = torch.tanh((decay[:, None] * cache).sum(1))
        return hidden @ self.out + state[1], (cache, state[1], (hidden @ self.look).softmax(1))


class ToyEnsemble(EnsembleDecoder):
    """Three toys, of which the second and the third attend, on the same features."""

    def __init__(self, vocab_size: int, seed: int = 0, scale: float = 2.0):
        kinds = (Toy, GrowingToy, AttendingToy)
        super().__init__([kind(vocab_size, seed + i, scale) for i, kind in enumerate(kinds)])

    def init_state(self, features):
        return super().init_state((features, features, features))


def features_of(images: int, vocab_size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(images, vocab_size, generator=torch.Generator().manual_seed(seed))


def real_decoder(kind):
    torch.manual_seed(3)
    decoder = kind(16, 32, 20, num_layers=2).eval()
    for parameter in decoder.parameters():
        parameter.data.mul_(5)  # as it is drawn, each word would be as likely as the others, whatever the image
    return decoder, 2 * torch.randn(7, 16) if kind is DecoderRNN else 2 * torch.randn(7, REGIONS, 16)


def some_decoders():
    yield Toy(12), features_of(7, 12)
    yield AttendingToy(12), features_of(7, 12)
    yield GrowingToy(12), features_of(7, 12)
    yield ToyEnsemble(12), features_of(7, 12)
    yield real_decoder(DecoderRNN)
    yield real_decoder(AttentionDecoder)


@torch.no_grad()
def rescore(decoder, feature, tokens):
    """Log-probability and attention of one image's caption, by teacher forcing."""
    state, total, attention = decoder.init_state(feature[None]), 0.0, []
    for last, token in itertools.pairwise([START, *tokens]):
        logits, state = decoder.step(torch.tensor([last]), state)
        total += logits[0].double().log_softmax(0)[token].item()
        attention.append(state[-1][0])
    return total, torch.stack(attention) if decoder.attends else None


def assert_same(one: Hypothesis, other: Hypothesis):
    assert one.tokens == other.tokens
    assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def flat(nested):
    return [h for hypotheses in nested for h in hypotheses]


def repeats_trigram(tokens):
    trigrams = list(zip(tokens, tokens[1:], tokens[2:]))  # noqa: B905
    return len(set(trigrams)) < len(trigrams)


def plain_beam_search(
    decoder,
    feature,
    beam_size,
    max_length,
    min_length,
    length_penalty,
    n_best,
    block_trigrams,
    groups,
    diversity,
):
    """The same search for one image in plain Python, recomputing each prefix."""

    def children(tokens):
        state = decoder.init_state(feature[None])
        for last in [START, *tokens]:
            logits, state = decoder.step(torch.tensor([last]), state)
        log_p = logits[0].double().log_softmax(0).tolist()
        allowed = [w for w in range(3, len(log_p)) if not (block_trigrams and repeats_trigram([*tokens, w]))]
        if len(tokens) >= min_length or not allowed:
            allowed.append(END)
        return [(w, log_p[w]) for w in allowed]

    def score(hypothesis):
        return hypothesis[1] / len(hypothesis[0]) ** length_penalty

    beams = [[([], 0.0)] for _ in range(groups)]
    for _ in range(max_length):
        chosen = []
        for g, beam in enumerate(beams):
            ended = [h for h in beam if h[0][-1:] == [END]]
            candidates = [
                (total + log_p - diversity * chosen.count(word), [*tokens, word], total + log_p)
                for tokens, total in beam
                if tokens[-1:] != [END]
                for word, log_p in children(tokens)
            ]
            candidates.sort(key=lambda c: -c[0])
            new = [(tokens, total) for _, tokens, total in candidates[: beam_size // groups - len(ended)]]
            beams[g] = ended + new
            chosen += [tokens[-1] for tokens, _ in new]
        if groups == 1:
            results = sorted((score(h) for h in beams[0] if h[0][-1] == END), reverse=True)
            worst = results[n_best - 1] if len(results) >= n_best else -math.inf
            beams[0] = [h for h in beams[0] if h[0][-1] == END or h[1] / max_length**length_penalty > worst]
    different = {tuple(h[0]): h for beam in beams for h in beam}
    return sorted(different.values(), key=score, reverse=True)[:n_best]


def test_greedy_takes_the_most_probable_word_at_every_step():
    decoder, features = Toy(12), features_of(7, 12)
    for feature, hypothesis in zip(features, greedy(decoder, features, max_length=15), strict=True):
        state, tokens = decoder.init_state(feature[None]), [START]
        while tokens[-1] != END and len(tokens) <= 15:
            logits, state = decoder.step(torch.tensor(tokens[-1:]), state)
            logits[0, [START, UNK]] = -torch.inf
            tokens.append(int(logits.argmax()))
        assert hypothesis.tokens == tokens[1:]


@pytest.mark.parametrize("decode", [greedy, lambda *args: [h[0] for h in beam_search(*args, beam_size=4)]])
def test_a_batch_decodes_as_its_images_one_at_a_time(decode):
    for decoder, features in some_decoders():
        alone = [decode(decoder, feature[None])[0] for feature in features]
        assert len({len(h.tokens) for h in alone}) > 1  # or dropping ended rows would go unnoticed
        for one, other in zip(decode(decoder, features), alone, strict=True):
            assert_same(one, other)


def test_a_beam_of_one_is_greedy():
    for decoder, features in some_decoders():
        for penalty in (0.0, 1.0):
            beams = beam_search(decoder, features, beam_size=1, length_penalty=penalty)
            for hypotheses, expected in zip(beams, greedy(decoder, features), strict=True):
                assert_same(hypotheses[0], expected)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
def test_a_beam_wide_enough_for_everything_finds_the_true_optimum(length_penalty):
    decoder, features = Toy(6, scale=1.0), features_of(8, 6)
    words, everything = range(3, 6), []
    for length in range(5):
        ends = [()] if length == 4 else [(END,)]
        everything += [c + end for c in itertools.product(words, repeat=length) for end in ends]
    assert len(everything) == 121
    beams = beam_search(decoder, features, 121, max_length=4, length_penalty=length_penalty, n_best=5)
    for feature, hypotheses in zip(features, beams, strict=True):
        scores = {c: rescore(decoder, feature, c)[0] / len(c) ** length_penalty for c in everything}
        best = sorted(scores, key=scores.get, reverse=True)[:5]
        assert [tuple(h.tokens) for h in hypotheses] == best


def test_the_optimum_depends_on_the_length_penalty():
    decoder, features = Toy(6, scale=1.0), features_of(8, 6)
    plain, normalized = (
        [h[0].tokens for h in beam_search(decoder, features, 121, max_length=4, length_penalty=p)] for p in (0, 1)
    )
    assert sum(map(len, plain)) < sum(map(len, normalized))


SETTINGS = [
    dict(beam_size=2),
    dict(beam_size=5, n_best=5),
    dict(beam_size=5, n_best=2, length_penalty=0.7),
    dict(beam_size=4, n_best=4, length_penalty=1.0, min_length=4),
    dict(beam_size=30, n_best=30, max_length=6, length_penalty=1.0),
    dict(beam_size=3, n_best=3, block_trigrams=True, min_length=6),
    dict(beam_size=4, n_best=4, groups=4, diversity=1.0),
    dict(beam_size=6, n_best=6, groups=2, diversity=0.5, length_penalty=0.7),
    dict(beam_size=6, n_best=3, groups=3, diversity=3.0, block_trigrams=True, min_length=2),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_beam_search_finds_what_a_plain_search_finds(setting):
    defaults = dict(
        max_length=9,
        min_length=0,
        length_penalty=0.0,
        n_best=1,
        block_trigrams=False,
        groups=1,
        diversity=0.5,
    )
    setting = {**defaults, **setting}
    for seed, kind in enumerate((Toy, GrowingToy, ToyEnsemble)):
        decoder, features = kind(9, seed, scale=1.0), features_of(4, 9, seed)
        features[:, END] += 1
        for feature, results in zip(features, beam_search(decoder, features, **setting), strict=True):
            expected = plain_beam_search(decoder, feature, **setting)
            assert [h.tokens for h in results] == [tokens for tokens, _ in expected]
            assert [h.log_probability for h in results] == pytest.approx([p for _, p in expected], abs=1e-4)
            scores = [p / len(tokens) ** setting["length_penalty"] for tokens, p in expected]
            assert [h.score for h in results] == pytest.approx(scores, abs=1e-4)


def all_ways(decoder, features):
    """Every way to decode, each as a list of hypotheses for each image."""
    yield [[h] for h in greedy(decoder, features)]
    yield [[h] for h in greedy(decoder, features, min_length=6, max_length=8)]
    yield beam_search(decoder, features, 5, n_best=5, length_penalty=0.7)
    yield beam_search(decoder, features, 4, n_best=4, groups=2, diversity=2.0)
    yield beam_search(decoder, features, 3, n_best=2, block_trigrams=True, min_length=7, max_length=9)
    for choice in ({}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 3}, {"top_p": 0.6}):
        drawn = sample(decoder, features, seed=3, n=3, **choice)
        yield [drawn[i : i + 3] for i in range(0, len(drawn), 3)]


def test_log_probabilities_and_attention_are_those_of_the_model():
    for decoder, features in some_decoders():
        for results in all_ways(decoder, features):
            assert len(results) == len(features)
            for feature, hypotheses in zip(features, results, strict=True):
                for h in hypotheses:
                    log_probability, attention = rescore(decoder, feature, h.tokens)
                    assert h.log_probability == pytest.approx(log_probability, abs=2e-4)
                    assert END not in h.tokens[:-1]
                    if decoder.attends:
                        assert h.attention.shape == (len(h.tokens), REGIONS)
                        torch.testing.assert_close(h.attention, attention, atol=1e-5, rtol=1e-4)
                    else:
                        assert h.attention is None


def test_start_and_unk_are_never_emitted():
    decoder, features = Toy(8), features_of(6, 8)
    features[:, [START, UNK]] += 6
    options = {"max_length": 6}
    results = greedy(decoder, features, **options) + sample(decoder, features, seed=0, n=20, **options)
    results += sample(decoder, features, seed=0, n=20, top_p=0.9, temperature=2.0, **options)
    results += flat(beam_search(decoder, features, 4, n_best=4, **options))
    emitted = {token for h in results for token in h.tokens}
    assert not {START, UNK} & emitted
    assert END in emitted


def test_a_caption_comes_even_if_end_is_impossible():
    decoder, features = Toy(8), features_of(3, 8)
    features[:, END] = -torch.inf
    results = greedy(decoder, features, max_length=5) + sample(decoder, features, max_length=5)
    for hypotheses in beam_search(decoder, features, 3, max_length=5, n_best=3, length_penalty=1.0):
        assert len(hypotheses) == 3
        results += hypotheses
    for h in results:
        assert len(h.tokens) == 5
        assert END not in h.tokens
        assert math.isfinite(h.log_probability)


def test_max_length_counts_end_and_min_length_words_before_it():
    decoder, features = Toy(10), features_of(8, 10)
    features[:, END] += 4
    for low, high in ((0, 1), (3, 4), (5, 5), (2, 9)):
        results = greedy(decoder, features, high, low) + sample(decoder, features, max_length=high, min_length=low)
        results += flat(beam_search(decoder, features, 4, high, low, n_best=4))
        for h in results:
            assert len([token for token in h.tokens if token != END]) >= low
            assert len(h.tokens) <= high
            assert h.tokens[-1] == END or len(h.tokens) == high
        assert any(h.tokens[-1] == END for h in results) == (low < high)


def test_a_caption_that_wants_to_end_does_so_right_after_min_length():
    decoder, features = Toy(10), features_of(3, 10)
    features[:, END] += 60
    for low in (0, 1, 4):
        results = greedy(decoder, features, min_length=low) + sample(decoder, features, min_length=low)
        results += flat(beam_search(decoder, features, 4, min_length=low))
        assert [len(h.tokens) for h in results] == [low + 1] * 9


@pytest.mark.parametrize("vocab_size", [3, 4])
def test_end_is_chosen_where_no_word_may_follow(vocab_size):
    decoder, features = Toy(vocab_size), features_of(2, vocab_size)
    features[:, END] -= 9
    for hypotheses in beam_search(decoder, features, 3, 12, min_length=8, block_trigrams=True):
        assert hypotheses[0].tokens == [3, 3, 3, END][4 - (1 if vocab_size == 3 else 4) :]
    if vocab_size == 3:
        results = greedy(decoder, features, min_length=2) + sample(decoder, features, min_length=2)
        assert [h.tokens for h in results] == [[END]] * 4


def test_no_trigram_repeats_when_blocked():
    decoder, features = Toy(6, scale=3.0), features_of(8, 6)
    features[:, END] -= 20
    plain = beam_search(decoder, features, 3, n_best=3, max_length=25)
    assert any(repeats_trigram(h.tokens) for hypotheses in plain for h in hypotheses)
    for hypotheses in beam_search(decoder, features, 3, n_best=3, max_length=25, block_trigrams=True):
        assert len(hypotheses) == 3
        assert not any(repeats_trigram(h.tokens) for h in hypotheses)


def test_diverse_groups_differ_more_than_a_plain_beam():
    decoder, features = Toy(20, scale=1.5), features_of(10, 20)
    first_words = {
        groups: [
            len({h.tokens[0] for h in hypotheses})
            for hypotheses in beam_search(decoder, features, 4, n_best=4, groups=groups, diversity=100.0)
        ]
        for groups in (1, 4)
    }
    assert first_words[4] == [4] * 10
    assert sum(first_words[1]) < 30


def test_groups_without_diversity_agree_and_are_returned_once():
    decoder, features = Toy(12), features_of(5, 12)
    expected = greedy(decoder, features)
    results = beam_search(decoder, features, 3, n_best=3, groups=3, diversity=0.0)
    for hypotheses, best in zip(results, expected, strict=True):
        assert len(hypotheses) == 1
        assert_same(hypotheses[0], best)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_n_best_are_different_and_sorted(length_penalty, groups):
    for decoder, features in some_decoders():
        results = beam_search(decoder, features, 6, n_best=6, length_penalty=length_penalty, groups=groups)
        for hypotheses in results:
            assert len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses)
            assert groups > 1 or len(hypotheses) == 6
            scores = [h.log_probability / len(h.tokens) ** length_penalty for h in hypotheses]
            assert scores == sorted(scores, reverse=True)


def test_the_best_of_a_beam_beats_greedy_on_average():
    decoder, features = Toy(30, scale=1.0), features_of(40, 30)
    features[:, END] += 2
    best = sum(h[0].log_probability for h in beam_search(decoder, features, 8))
    assert best > sum(h.log_probability for h in greedy(decoder, features)) + 1


@pytest.mark.parametrize("decode", [greedy, sample])
def test_ended_captions_are_not_computed_any_longer(decode):
    decoder = Toy(12)
    results = decode(decoder, features_of(9, 12))
    assert sum(decoder.rows) == sum(len(h.tokens) for h in results)


def test_hypotheses_that_cannot_be_returned_are_not_computed_any_longer():
    decoder, features = Toy(12), features_of(3, 12)
    features[0, END] += 50  # ends at once, and nothing that goes on can be as probable
    features[1:, END] -= 50
    beam_search(decoder, features, 5, max_length=6)
    assert decoder.rows == [3, 10, 10, 10, 10, 10]


def test_computing_in_parts_changes_nothing(monkeypatch):
    for decoder, features in some_decoders():
        whole = beam_search(decoder, features, 5, n_best=5, block_trigrams=True)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "CHUNK_ELEMENTS", 4 * max(x[0].numel() for x in decoder.init_state(features)))
            parts = beam_search(decoder, features, 5, n_best=5, block_trigrams=True)
        for one, other in zip(flat(whole), flat(parts), strict=True):
            assert_same(one, other)
            assert not decoder.attends or torch.allclose(one.attention, other.attention, atol=1e-5)


def test_no_images_give_no_captions():
    decoder, none = Toy(12), features_of(0, 12)
    assert greedy(decoder, none) == sample(decoder, none) == beam_search(decoder, none) == []


def test_a_seed_repeats_a_sample():
    decoder, features = Toy(12, scale=0.5), features_of(5, 12)
    draw = [[h.tokens for h in sample(decoder, features, seed=seed)] for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    torch.manual_seed(0)
    draw = [[h.tokens for h in sample(decoder, features)] for _ in range(2)]
    assert draw[0] != draw[1]
    torch.manual_seed(0)
    assert [h.tokens for h in sample(decoder, features)] == draw[0]


def test_a_sample_does_not_depend_on_the_images_after_it():
    for decoder, features in some_decoders():
        for n in (1, 3):
            together = sample(decoder, features, seed=5, n=n, top_p=0.9)
            for one, other in zip(sample(decoder, features[:2], seed=5, n=n, top_p=0.9), together, strict=False):
                assert_same(one, other)


def test_a_sample_depends_on_the_seed_and_the_image_s_index_alone():
    decoder, features = Toy(12, scale=0.5), features_of(1, 12).expand(9, 12)
    whole = sample(decoder, features, seed=5, n=2)
    assert len({tuple(h.tokens) for h in whole}) > 9
    for indices in ([0, 1, 2, 3], [7, 8], [4], [6, 5, 2]):
        part = sample(decoder, features[: len(indices)], seed=5, n=2, indices=indices)
        assert [h.tokens for h in part] == [whole[2 * i + j].tokens for i in indices for j in range(2)]
    assert [h.tokens for h in sample(decoder, features, seed=5)] == [h.tokens for h in whole[::2]]  # whatever n is


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODERS)
def test_a_gpu_draws_the_captions_of_the_cpu(name: str):
    torch.manual_seed(0)
    decoder = DECODERS[name](16, 16, 30).double().eval()
    features = torch.randn(20, *([9] if decoder.attends else []), 16).double()
    drawn = [h.tokens for h in sample(decoder, features, seed=5, n=3)]
    assert [h.tokens for h in sample(decoder.cuda(), features.cuda(), seed=5, n=3)] == drawn


def test_every_seed_of_64_bits_is_another():
    decoder, features = Toy(12, scale=0.5), features_of(8, 12)
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    assert len({str([h.tokens for h in sample(decoder, features, seed=seed)]) for seed in seeds}) == len(seeds)


def test_a_sample_does_not_depend_on_when_other_captions_end():
    decoder, features = Toy(12, scale=0.5), features_of(6, 12)
    expected = sample(decoder, features, seed=5)[3:]
    features[:3, END] += 60
    for one, other in zip(sample(decoder, features, seed=5)[3:], expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("narrow", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_a_narrow_sample_is_greedy(narrow):
    for decoder, features in some_decoders():
        drawn = sample(decoder, features, seed=0, n=2, **narrow)
        for i, expected in enumerate(greedy(decoder, features)):
            assert_same(drawn[2 * i], expected)
            assert_same(drawn[2 * i + 1], expected)


def allowed_distribution(logits, temperature, top_k, top_p):
    """What a token should be drawn from, {token: probability}, written as the papers define it."""
    weights = {w: math.exp(logits[w] / temperature) for w in range(len(logits)) if w not in (START, UNK)}
    order = sorted(weights, key=weights.get, reverse=True)[: top_k or None]
    total, nucleus = sum(weights[w] for w in order), []
    while sum(weights[w] for w in nucleus) < top_p * total * (1 - 1e-6):
        nucleus.append(order[len(nucleus)])
    return {w: weights[w] / sum(weights[v] for v in nucleus) for w in nucleus}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.75), (1.5, 4, 0.8)],
)
def test_samples_are_as_frequent_as_they_are_probable(temperature, top_k, top_p):
    decoder, features = Toy(8, scale=0.4), features_of(2, 8)
    n = 20000
    drawn = sample(decoder, features, temperature, top_k, top_p, seed=0, max_length=2, n=n)
    for i, feature in enumerate(features):
        counts = Counter(tuple(h.tokens) for h in drawn[i * n : (i + 1) * n])
        expected = {}
        logits, state = decoder.step(torch.tensor([START]), decoder.init_state(feature[None]))
        for first, p in allowed_distribution(logits[0].tolist(), temperature, top_k, top_p).items():
            if first == END:
                expected[END,] = p
                continue
            logits, _ = decoder.step(torch.tensor([first]), state)
            for second, q in allowed_distribution(logits[0].tolist(), temperature, top_k, top_p).items():
                expected[first, second] = p * q
        assert set(counts) <= set(expected)
        for caption, p in expected.items():
            assert counts[caption] / n == pytest.approx(p, abs=0.012)


def test_the_score_of_a_caption_is_its_mean_log_probability_per_token():
    decoder, features = Toy(12), features_of(7, 12)
    for h in greedy(decoder, features) + sample(decoder, features, seed=0):
        assert h.score == pytest.approx(h.log_probability / len(h.tokens))


def test_an_ensemble_averages_probabilities():
    decoder, features = ToyEnsemble(9), features_of(5, 9)
    tokens = torch.tensor([START, 3, 4, 5, 6])
    logits, state = decoder.step(tokens, decoder.init_state(features))
    mean = torch.stack([m.step(tokens, m.init_state(features))[0].softmax(1) for m in decoder.decoders]).mean(0)
    torch.testing.assert_close(logits.exp(), mean)
    torch.testing.assert_close(logits.logsumexp(1), torch.zeros(5), rtol=0, atol=1e-5)
    looked = decoder.decoders[1].step(tokens, decoder.decoders[1].init_state(features))[1][-1]
    torch.testing.assert_close(state[-1], looked)  # of the first that attends
    alone = EnsembleDecoder([Toy(9)])
    assert not alone.attends
    for one, other in zip(beam_search(alone, (features,)), beam_search(Toy(9), features), strict=True):
        assert_same(one[0], other[0])


def test_decoding_works_in_inference_mode_and_on_what_it_leaves():
    for decoder, features in some_decoders():
        expected = str(beam_search(decoder, features, 4, n_best=4)), str(sample(decoder, features, seed=0))
        with torch.inference_mode():
            features = features.clone()
            assert (
                str(beam_search(decoder, features, 4, n_best=4)),
                str(sample(decoder, features, seed=0)),
            ) == expected
        assert (str(beam_search(decoder, features, 4, n_best=4)), str(sample(decoder, features, seed=0))) == expected


def test_decoding_builds_no_graph():
    decoder, features = real_decoder(AttentionDecoder)
    features.requires_grad_()
    for results in all_ways(decoder, features):
        assert not any(h.attention.requires_grad for hypotheses in results for h in hypotheses)


@pytest.mark.parametrize(
    ("decode", "wrong"),
    [
        (greedy, {"max_length": 0}),
        (greedy, {"min_length": -1}),
        (greedy, {"max_length": 5, "min_length": 6}),
        (sample, {"max_length": 0}),
        (sample, {"max_length": 5, "min_length": 6}),
        (sample, {"temperature": 0.0}),
        (sample, {"temperature": -1.0}),
        (sample, {"temperature": math.nan}),
        (sample, {"temperature": math.inf}),
        (sample, {"top_p": math.nan}),
        (sample, {"seed": -1}),
        (sample, {"seed": 2**64}),
        (sample, {"top_k": -1}),
        (sample, {"top_p": 0.0}),
        (sample, {"top_p": 1.1}),
        (sample, {"n": 0}),
        (beam_search, {"beam_size": 0}),
        (beam_search, {"max_length": 0}),
        (beam_search, {"max_length": 5, "min_length": 6}),
        (beam_search, {"n_best": 4}),
        (beam_search, {"n_best": 0}),
        (beam_search, {"groups": 2}),
        (beam_search, {"groups": 6}),
        (beam_search, {"groups": 0}),
        (beam_search, {"length_penalty": -0.1}),
        (beam_search, {"length_penalty": math.nan}),
        (beam_search, {"length_penalty": math.inf}),
        (beam_search, {"length_penalty": 1000.0}),
        (beam_search, {"groups": 3, "diversity": math.nan}),
        (beam_search, {"groups": 3, "diversity": math.inf}),
        (beam_search, {"groups": 3, "diversity": -1.0}),
    ],
)
def test_a_value_out_of_range_is_refused_in_a_sentence_that_names_it(decode, wrong):
    with pytest.raises(InputError, match=rf"^{next(reversed(wrong))} is .*\.$"):
        decode(Toy(8), features_of(2, 8), **wrong)
