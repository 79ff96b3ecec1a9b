"""A backbone's last parts learn which words the captions hold; its first parts stay as they are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_split
from PIL import Image

from captioning import features
from captioning.errors import InputError
from captioning.images import build_transform, read_photo
from captioning.training import train
from data_loader import CaptionDataset
from model import EncoderCNN
from pretrain import PretrainingConfig, pretrain, word_shares


@pytest.fixture
def weights(tiny_backbone: Callable, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {key: value for key, value in EncoderCNN(1, "random").state_dict().items() if "resnet" in key}
    torch.save(state, tmp_path / "random.pth")
    return tmp_path / "random.pth"


def config(drawn: Path, weights: Path, **fields: object) -> PretrainingConfig:
    settings = {"data": drawn, "weights": str(weights), "out": weights.with_name("learned.pth"), "image_size": 64}
    settings |= {"batch_size": 8, "warmup_steps": 2, "workers": 0, "cache": weights.with_name("cache")}
    return PretrainingConfig(**{**settings, **fields})


def test_shares_count_a_word_once_a_caption(tmp_path: Path):
    captions = {"a.jpg": ["a dog and a dog", "a cat"], "b.jpg": ["the dog"]}
    write_split(tmp_path, "train", captions)
    for name in captions:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "train" / name)
    data = CaptionDataset(tmp_path, "train", vocab_threshold=1, cache=tmp_path / "cache")
    shares = word_shares(data)
    found = {word: shares[:, data.vocab[word]].tolist() for word in ("a", "dog", "cat", "and", "the", "<start>")}
    assert found == {
        "a": [1, 0],
        "dog": [0.5, 1],
        "cat": [0.5, 0],
        "and": [0.5, 0],
        "the": [0, 1],
        "<start>": [1, 1],
    }


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("fine_tune", [1, 2, 4])
def test_the_frozen_part_and_the_rest_are_the_whole_backbone(tiny_backbone: Callable, fine_tune: int, grid: bool):
    encoder = EncoderCNN(4, "random", fine_tune, grid).eval()
    images = torch.rand(2, 3, 96, 96)
    cells = encoder.frozen_part().features(images)
    torch.testing.assert_close(encoder.finish(cells), encoder.features(images))
    encoder.finish(cells).sum().backward()
    learned = {name for name, p in encoder.resnet.named_parameters() if p.grad is not None}
    assert learned == {name for name, p in encoder.resnet.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_training_finds_what_the_learned_backbone_sees(
    drawn: Path, weights: Path, small: Callable, decoder: str, monkeypatch: pytest.MonkeyPatch
):
    settings = config(drawn, weights, num_epochs=1)
    learned = pretrain(settings)
    looked = []
    with monkeypatch.context() as patch:
        patch.setattr(features, "encode", lambda *arguments: looked.append(arguments) or iter(()))
        train(small(weights=str(learned), decoder=decoder, cache=settings.cache))
    assert looked == []
    stores = [np.load(store) for store in (settings.cache / "features").glob("*/features.npy")]
    dimensions = 4 if decoder == "attention" else 3
    found = next(x for x in stores if x.shape[0] == 24 and x.shape[-1] == 2048 and x.ndim == dimensions)
    encoder = EncoderCNN(4, learned, grid=found.ndim == 4).eval()
    images = torch.stack(
        [build_transform(image_size=64)(read_photo(p)) for p in sorted((drawn / "images/train").iterdir())]
    )
    with torch.no_grad():
        expected = encoder.features(images)
    assert (torch.from_numpy(found[:, 0]).float() - expected).norm() < 0.03 * expected.norm()


def test_the_last_part_learns_the_words_and_the_first_ones_do_not_move(
    drawn: Path, weights: Path, capsys: pytest.CaptureFixture
):
    settings = config(drawn, weights, num_epochs=20, learning_rate=3e-3)
    learned = pretrain(settings)
    losses = [float(line.split()[5].rstrip(",")) for line in capsys.readouterr().out.splitlines()]
    shares = word_shares(CaptionDataset(drawn, "train", cache=settings.cache))
    least = torch.nn.functional.binary_cross_entropy(shares, shares, reduction="sum").item() / len(shares)
    assert losses[0] - losses[-1] > 0.15 * (losses[0] - least)  # without seeing the photos it could not fall
    before, after = torch.load(weights), torch.load(learned)
    assert before.keys() == after.keys()
    moved = {key.split(".")[1] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"7"}  # the last stage
    assert all(torch.equal(before[key], after[key]) for key in before if "running" in key)
    EncoderCNN(4, learned)


def test_the_same_seed_gives_the_same_weights(drawn: Path, weights: Path):
    first = torch.load(pretrain(config(drawn, weights, num_epochs=1)))
    again = torch.load(pretrain(config(drawn, weights, num_epochs=1, out=weights.with_name("again.pth"))))
    other = torch.load(pretrain(config(drawn, weights, num_epochs=1, seed=1)))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_a_models_folder_gives_its_encoder(drawn: Path, weights: Path, small: Callable):
    folder = train(small(weights=str(weights), fine_tune=0))
    learned = torch.load(pretrain(config(drawn, folder, num_epochs=1)))
    assert torch.equal(learned["resnet.0.weight"], torch.load(weights)["resnet.0.weight"])


@pytest.mark.parametrize(("field", "value"), [("fine_tune", 0), ("fine_tune", 5), ("views", 0), ("batch_size", 0)])
def test_values_that_make_no_sense_are_named(drawn: Path, weights: Path, field: str, value: int):
    with pytest.raises(InputError, match=f"{field} must be"):
        config(drawn, weights, **{field: value})
