"""A packed output layer gives what the decoder gives."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from captioning.decoding import greedy
from captioning.packing import PackedLinear, pack_output_layer
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
    packed = pack_output_layer(decoder)
    assert isinstance(packed.linear, PackedLinear)
    tokens = torch.randint(4, 1001, (rows,))
    expected, actual = (each.step(tokens, each.init_state(images))[0] for each in (decoder, packed))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
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


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda decoder: pickle.loads(pickle.dumps(decoder))])
@torch.no_grad()
def test_a_packed_decoder_can_be_copied_and_pickled(copy_of: Callable):
    packed = pack_output_layer(DECODERS["lstm"](8, 16, 50).eval())
    inputs = torch.randn(3, 16)
    torch.testing.assert_close(copy_of(packed).linear(inputs), packed.linear(inputs))


def test_the_decoder_itself_stays_as_it_is():
    decoder = DECODERS["lstm"](8, 16, 50).eval()
    names = list(decoder.state_dict())
    pack_output_layer(decoder)
    assert list(decoder.state_dict()) == names
    assert isinstance(decoder.linear, torch.nn.Linear)


def test_without_onednn_a_decoder_is_returned_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    decoder = DECODERS["lstm"](8, 16, 50).eval()
    assert pack_output_layer(decoder) is decoder
