"""The backbone in 8-bit integers against the same backbone in float32."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from captioning import quantized
from captioning.captioner import Captioner
from captioning.checkpoint import load_model, read_description
from captioning.errors import InputError
from captioning.images import Photos, build_transform
from captioning.quantized import QuantizedBackbone, observe
from captioning.training import OBSERVED, train
from data_loader import CaptionDataset
from model import EncoderCNN
from train import resumed_config


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def images(drawn: Path) -> Tensor:
    photos = Photos(sorted((drawn / "images" / "val").iterdir()), build_transform(False, 96))
    return torch.stack([photos[i] for i in range(8)])  # (8, 3, 96, 96)


@pytest.fixture
def encoder() -> EncoderCNN:
    """One that was trained: what random layers give changes with the last digit of what they are given."""
    encoder = load_model("models/photos")[0]
    encoder.grid = False
    return encoder


def test_the_integers_see_what_float32_sees(encoder: EncoderCNN, images: Tensor):
    whole = encoder.for_inference(torch.float32)
    encoder.ranges = observe(whole.resnet, images)
    assert len(encoder.ranges) == 2 + 16 * 4 + 4
    fast = encoder.for_inference(torch.int8)
    expected, found = whole.features(images), fast.features(images)
    assert found.shape == expected.shape == (8, 2048)
    assert difference(found, expected) < 0.1
    # What a photo has of its own is there, too, not only what all have in common.
    assert difference(found - found.mean(0), expected - expected.mean(0)) < 0.2
    fast.grid = whole.grid = True
    assert difference(fast.features(images), whole.features(images)) < 0.15
    assert fast.features(images).shape == (8, 3 * 3, 2048)


def test_a_photo_is_seen_the_same_alone_and_among_others(encoder: EncoderCNN, images: Tensor):
    encoder.ranges = observe(encoder.for_inference(torch.float32).resnet, images)
    backbone = encoder.for_inference(torch.int8).resnet
    alone = torch.cat([backbone(image[None]) for image in images])
    assert torch.equal(backbone(images), alone)


def test_ranges_are_the_lowest_and_highest_of_all_photos_and_hold_zero(encoder: EncoderCNN, images: Tensor):
    resnet = encoder.for_inference(torch.float32).resnet
    together = observe(resnet, images)
    for image in images:
        for (low, high), (lowest, highest) in zip(observe(resnet, image[None]), together, strict=True):
            assert lowest - 1e-4 <= low <= high <= highest + 1e-4
    assert all(low <= 0 <= high for low, high in together)
    assert together[0] == (images.min().item(), images.max().item())
    stem = torch.relu(resnet[0](images))
    assert together[1] == pytest.approx((0, stem.max().item()))
    assert observe(resnet, images.abs() + 1)[0][0] == 0


def test_no_sum_of_two_products_overflows_16_bits(encoder: EncoderCNN, images: Tensor, monkeypatch: pytest.MonkeyPatch):
    kept = []
    constant = quantized._Builder._constant
    monkeypatch.setattr(quantized._Builder, "_constant", lambda s, value: kept.append(value) or constant(s, value))
    resnet = encoder.for_inference(torch.float32).resnet
    QuantizedBackbone(resnet, observe(resnet, images))
    weights = [x for x in kept if getattr(x, "ndim", 0) == 4]
    assert len(weights) == 53
    assert all(x.dtype == np.int8 for x in weights)
    assert 2 * 255 * max(int(np.abs(x.astype(int)).max()) for x in weights) < 1 << 15


def test_a_layer_of_zeros_is_no_trouble():
    encoder = EncoderCNN(8, "random").eval()  # the last batch norm of each block is zero
    images = torch.randn(2, 3, 64, 64)
    whole = encoder.for_inference(torch.float32)
    encoder.ranges = observe(whole.resnet, images)
    assert (0.0, 0.0) in encoder.ranges
    assert difference(encoder.for_inference(torch.int8).features(images), whole.features(images)) < 0.1


def test_ranges_of_another_backbone_are_refused(encoder: EncoderCNN, images: Tensor):
    resnet = encoder.for_inference(torch.float32).resnet
    with pytest.raises(InputError, match=r"ranges are of another backbone; take them out of captioner.json"):
        QuantizedBackbone(resnet, observe(resnet, images)[:-1])


# A trained model


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU computes in its own precision")
    monkeypatch.setattr("captioning.captioner.fast_dtype", lambda _: torch.float32)


def test_training_keeps_the_ranges_that_some_training_photos_have(trained: Path, drawn: Path):
    encoder, _, vocab, description = load_model(trained)
    assert set(description.ranges) == {1, 2}
    assert description.ranges[1] == description.ranges[2] == encoder.ranges  # of a frozen backbone
    data = CaptionDataset(drawn, "train", vocab=vocab)
    some = np.random.default_rng(0).permutation(len(data.paths))[:OBSERVED]
    photos = Photos(data.paths, build_transform(False, 64))
    expected = observe(encoder.for_inference(torch.float32).resnet, torch.stack([photos[i] for i in some]))
    assert encoder.ranges == [pytest.approx(pair, rel=1e-3, abs=1e-4) for pair in expected]


def test_a_backbone_that_learns_has_ranges_for_each_epoch_and_keeps_them_on_resuming(
    small: Callable, tiny_backbone: Callable
):
    folder = train(small(fine_tune=5, num_epochs=2, save_every=1))
    before = read_description(folder).ranges
    assert before[1] != before[2]
    config = resumed_config(folder)
    config.num_epochs = 3
    train(config)
    after = read_description(folder).ranges
    assert {epoch: after[epoch] for epoch in before} == before
    assert set(after) == {1, 2, 3}
    for epoch in after:
        assert load_model(folder, epoch)[0].ranges == after[epoch]


def test_with_bfloat16_it_computes_in_that(memorised: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("captioning.captioner.fast_dtype", lambda _: torch.bfloat16)
    assert Captioner.load(memorised).encoder.resnet[0].weight.dtype == torch.bfloat16


def test_a_model_without_ranges_computes_in_float32(memorised: Path, tmp_path: Path, without_bfloat16: None):
    folder = shutil.copytree(memorised, tmp_path / "model")
    description = json.loads((folder / "captioner.json").read_text())
    del description["ranges"]
    (folder / "captioner.json").write_text(json.dumps(description))
    assert Captioner.load(folder).encoder.resnet[0].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[1.0, 2.0]] * 70, "does not describe a model: ranges"),
        ([[-1.0, "NaN"]] * 70, "does not describe a model: ranges"),
        ([[0.0, 1e39]] * 70, "does not describe a model: ranges"),
        ("none", "does not describe a model: ranges"),
    ],
)
def test_ranges_that_are_none_are_a_sentence(
    memorised: Path, tmp_path: Path, without_bfloat16: None, ranges: object, message: str
):
    folder = shutil.copytree(memorised, tmp_path / "model")
    description = json.loads((folder / "captioner.json").read_text())
    description["ranges"] = dict.fromkeys(description["ranges"], ranges)
    (folder / "captioner.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=message):
        Captioner.load(folder)


def test_the_model_that_comes_with_the_project_has_its_ranges():
    encoder = load_model("models/photos")[0]
    assert encoder.ranges is not None
    low, high = encoder.ranges[0]
    assert -2.2 < low < -1.5 < 2 < high < 2.7  # black and white photos' pixels, normalised
