import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from captioning import losses
from captioning.losses import Batch, CaptioningModel, loss_tokens
from model import DECODERS, EncoderCNN


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("lengths", [[5, 9, 7, 5], [7, 7, 7, 7]], ids=["ragged", "equal"])
def test_padding_never_enters_the_loss(tiny_backbone: Callable, name: str, lengths: list[int]):
    torch.manual_seed(0)
    decoder = DECODERS[name](8, 16, 30)
    model = CaptioningModel(EncoderCNN(8, weights="random", grid=decoder.attends), decoder).eval()
    features = torch.randn(3, *((4,) if decoder.attends else ()), 2048)
    image_of_caption, length = torch.tensor([2, 0, 1, 2]), torch.tensor(lengths)
    captions = torch.randint(3, 30, (4, max(lengths)))
    actual = model(Batch(features, image_of_caption, captions, length))
    each = [(image_of_caption[i : i + 1], captions[i : i + 1, :n], length[i : i + 1]) for i, n in enumerate(lengths)]
    alone = [model(Batch(features, *caption)) for caption in each]
    torch.testing.assert_close(actual[0], sum(loss for loss, _ in alone))
    torch.testing.assert_close(actual[1], sum(penalty for _, penalty in alone))
    captions[torch.arange(max(lengths)) >= length[:, None]] = 29  # whatever the padding is
    assert model(Batch(features, image_of_caption, captions, length))[0] == actual[0]


@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_is_the_cross_entropy_of_as_many_tokens_as_are_counted(tiny_backbone: Callable, name: str):
    decoder = DECODERS[name](8, 16, 30)
    torch.nn.init.zeros_(decoder.linear.weight)
    torch.nn.init.zeros_(decoder.linear.bias)  # every word is as probable as any other
    model = CaptioningModel(EncoderCNN(8, weights="random", grid=decoder.attends), decoder)
    features = torch.randn(2, *((4,) if decoder.attends else ()), 2048)
    lengths = torch.tensor([5, 8])
    loss, _ = model(Batch(features, torch.arange(2), torch.randint(3, 30, (2, 8)), lengths))
    assert loss.item() == pytest.approx(loss_tokens(lengths, decoder) * math.log(30), rel=1e-5)


@pytest.mark.parametrize("banned", [(), (0, 2)], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cross_entropy_of_the_output_layer_and_its_gradients_are_torch_s(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scaled: bool, banned: tuple[int, ...]
):
    monkeypatch.setattr(losses, "CPU_CHUNK", 7 * 50)  # rows that do not divide the tokens
    torch.manual_seed(0)
    linear, hidden = torch.nn.Linear(16, 50), torch.randn(40, 16, requires_grad=True)
    targets, scale = torch.randint(3, 50, (40,)), torch.randn(40) if scaled else None

    def plain() -> torch.Tensor:
        logits = linear(hidden).float()
        logits[:, list(banned)] = -torch.inf
        each = F.cross_entropy(logits, targets, reduction="none")
        return each.sum() if scale is None else (each * scale).sum()

    results = []
    for compute in (plain, lambda: losses.linear_cross_entropy(hidden, linear, targets, scale, banned)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = compute()
        inputs = (hidden, linear.weight, linear.bias)
        results.append([loss.detach(), *torch.autograd.grad(loss / 3, inputs)])
    for expected, value in zip(*results, strict=True):
        tolerance = (2e-2 if dtype == torch.bfloat16 else 1e-5) * expected.abs().max().item()
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)
        assert value.dtype == torch.float32
    with torch.inference_mode():
        value = losses.linear_cross_entropy(hidden, linear, targets, scale, banned)
        torch.testing.assert_close(value, plain())


@pytest.mark.slow
def test_gradients_add_up_in_one_order_on_several_threads(tiny_backbone: Callable):
    torch.manual_seed(0)
    model = CaptioningModel(EncoderCNN(256, weights="random"), DECODERS["lstm"](256, 8, 9)).eval()
    features, image_of_caption = torch.randn(26, 2048), torch.arange(128) // 5
    captions, lengths = torch.randint(3, 9, (128, 3)), torch.full((128,), 3)
    threads, gradients = torch.get_num_threads(), set()
    try:
        torch.set_num_threads(2)
        for _ in range(30):
            model.zero_grad()
            model(Batch(features, image_of_caption, captions, lengths))[0].backward()
            gradients.add(model.encoder.embed.weight.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(gradients) == 1
