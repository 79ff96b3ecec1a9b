"""Packed layers give what the layers give."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from captioning.decoding import greedy
from captioning.packing import PackedLinear, pack_weights
from model import DECODERS

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.mark.skipif(not ONEDNN, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("rows", [1, 16, 50])
@torch.no_grad()
def test_logits_differ_in_rounding_only(name: str, rows: int):
    torch.manual_seed(0)
    decoder = DECODERS[name](24, 24, 1001, 2).eval()
    decoder.linear.weight = decoder.embed.weight
    images = torch.randn(rows, *((9,) if decoder.attends else ()), 24)
    packed = pack_weights(decoder)
    assert not [layer for layer in packed.modules() if isinstance(layer, torch.nn.Linear | torch.nn.LSTM)]
    states = [each.init_state(images) for each in (decoder, packed)]
    for tokens in torch.randint(4, 1001, (3, rows)):
        (expected, first), (actual, second) = (
            each.step(tokens, state) for each, state in zip((decoder, packed), states, strict=True)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)
        states = [first, second]
    assert [caption.tokens for caption in greedy(packed, images)] == [c.tokens for c in greedy(decoder, images)]


@pytest.mark.skipif(not ONEDNN, reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("part", ["weight", "bias"])
@torch.no_grad()
def test_weights_with_gaps_in_memory_are_packed_as_they_are(part: str):
    linear = torch.nn.Linear(64, 500)
    values = getattr(linear, part).detach()
    with_gaps = torch.stack([values, 7 * torch.ones_like(values)], -1)[..., 0]
    assert not with_gaps.is_contiguous()
    setattr(linear, part, torch.nn.Parameter(with_gaps))
    inputs = torch.randn(4, 64)
    torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_inputs_may_have_gaps_in_memory_and_any_number_of_dimensions():
    linear = torch.nn.Linear(64, 500)
    packed = pack_weights(linear)
    for inputs in (torch.randn(64, 4).T, torch.randn(2, 5, 64), torch.randn(4, 128)[:, ::2], torch.randn(0, 64)):
        torch.testing.assert_close(packed(inputs), linear(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda decoder: pickle.loads(pickle.dumps(decoder))])
@torch.no_grad()
def test_a_packed_decoder_can_be_copied_and_pickled(copy_of: Callable, name: str):
    packed = pack_weights(DECODERS[name](8, 16, 50).eval())
    images = torch.randn(3, *((9,) if packed.attends else ()), 8)
    logits = [each.step(torch.tensor([4, 5, 6]), each.init_state(images))[0] for each in (copy_of(packed), packed)]
    torch.testing.assert_close(*logits)


def test_the_decoder_itself_stays_as_it_is():
    decoder = DECODERS["lstm"](8, 16, 50).eval()
    names = list(decoder.state_dict())
    pack_weights(decoder)
    assert list(decoder.state_dict()) == names
    assert isinstance(decoder.linear, torch.nn.Linear)


def test_without_onednn_a_decoder_is_returned_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    decoder = DECODERS["lstm"](8, 16, 50).eval()
    assert pack_weights(decoder) is decoder


class Cosine(torch.nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(inputs, dim=-1) @ torch.nn.functional.normalize(self.weight, dim=-1).T


@torch.no_grad()
def test_layers_that_compute_something_else_are_left_as_they_are():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    inputs = torch.randn(3, 5, 16)
    for module in (Cosine(16, 40), torch.nn.Sequential(Cosine(16, 40), torch.nn.Linear(40, 8))):
        torch.testing.assert_close(pack_weights(module)(inputs), module(inputs), rtol=1e-5, atol=1e-5)
    layer = torch.nn.ModuleDict({"attention": attention})
    packed = pack_weights(layer)["attention"]
    torch.testing.assert_close(packed(inputs, inputs, inputs), attention(inputs, inputs, inputs))
    assert pack_weights(torch.nn.Tanh())(inputs).shape == inputs.shape
