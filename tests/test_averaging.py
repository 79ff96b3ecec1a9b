"""The average of several epochs is a model whose every weight is their mean."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import importers
from captioning.averaging import average_weights
from captioning.checkpoint import load_model, name_weights, read_description
from captioning.errors import InputError
from captioning.training import TrainingConfig, train


@pytest.fixture(params=["lstm", "attention"])
def epochs(request: pytest.FixtureRequest, small: Callable[..., TrainingConfig], tiny_backbone: Callable) -> Path:
    """A model of three epochs, with a backbone that learns, and batch norms that count, and tied weights."""
    options = {"num_epochs": 3, "fine_tune": 5, "tie_weights": True, "embed_size": 32, "hidden_size": 32}
    return train(small(decoder=request.param, **options))


@pytest.mark.slow
def test_every_weight_of_an_average_is_the_mean_of_the_epochs(epochs: Path, tmp_path: Path, capsys):
    average_weights([epochs], (3, 1), tmp_path / "average")
    assert capsys.readouterr().out == f"{tmp_path}/average: the mean of epochs 1, 3; evaluate.py scores it\n"
    encoder, decoder, _, description = load_model(tmp_path / "average")
    first, third = load_model(epochs, 1), load_model(epochs, 3)
    for module, one, other in zip((encoder, decoder), first, third, strict=False):
        for key, weight in module.state_dict().items():
            a, b = one.state_dict()[key], other.state_dict()[key]
            assert torch.equal(weight, (a + b) / 2 if weight.is_floating_point() else b), key
    assert not torch.equal(first[1].embed.weight, third[1].embed.weight)
    assert description.best_epoch == 3
    assert description.training["averaged_epochs"] == [1, 3]
    for name in ("encoder-3.pkl", "decoder-3.pkl"):  # tied weights are stored once
        assert (tmp_path / "average" / name).stat().st_size == (epochs / name).stat().st_size


def test_an_average_that_cannot_be_made_is_one_sentence(trained: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"has no weights of epoch 9; it has those of 1, "):
        average_weights([trained], (1, 9), tmp_path / "average")
    with pytest.raises(InputError, match="two epochs or more, named with --epochs, or two models or more"):
        average_weights([trained], (1, 1), tmp_path / "average")
    with pytest.raises(InputError, match="two epochs or more, named with --epochs, or two models or more"):
        average_weights([], (1, 2), tmp_path / "average")
    with pytest.raises(InputError, match="exists and is not empty"):
        average_weights([trained], (1, 2), trained)
    assert not (tmp_path / "average").exists()


@pytest.mark.parametrize("arguments", ["{0} {1} --epochs 1 2", "--epochs 1 2 -- {0} {1}"])
def test_the_command_takes_the_epochs_last_or_first(trained: Path, tmp_path: Path, monkeypatch, arguments: str):
    arguments = f"importers.py average {arguments.format(trained, tmp_path / 'average')}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    importers.main()
    assert load_model(tmp_path / "average")[3].training["averaged_epochs"] == [1, 2]
    monkeypatch.setattr(sys, "argv", ["importers.py", "average", str(trained)])
    with pytest.raises(InputError, match="name the model, or several, and then the folder to write"):
        importers.main()


def test_models_of_one_kind_have_a_mean(trained: Path, small: Callable[..., TrainingConfig], tmp_path: Path):
    second = train(small(name="second", start_from=trained, num_epochs=1, seed=7))
    average_weights([trained, second], (), tmp_path / "average")
    one, other, mean = (load_model(path)[1].state_dict() for path in (trained, second, tmp_path / "average"))
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    assert all(torch.equal(mean[key], (one[key] + other[key]) / 2) for key in mean)
    assert name_weights(load_model(tmp_path / "average")[3], 1) == f"mean of epochs {trained.name}-2, second-1"
    with pytest.raises(InputError, match="a model is named twice"):
        average_weights([trained, second, trained], (), tmp_path / "other")
    with pytest.raises(InputError, match="--epochs has no effect on several models"):
        average_weights([trained, second], (1, 2), tmp_path / "other")
    wider = train(small(name="wider", num_epochs=1, hidden_size=24))
    with pytest.raises(InputError, match=f"{trained} and {wider} differ in architecture, preprocessing or vocabulary"):
        average_weights([trained, wider], (), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_model_and_one_whose_backbone_was_fine_tuned_from_it_have_a_mean(
    small: Callable[..., TrainingConfig], tiny_backbone: Callable, tmp_path: Path
):
    first = train(small(name="first"))
    second = train(small(name="second", start_from=first, fine_tune=1, backbone_learning_rate=0.1))
    assert read_description(first).architecture.backbone_weights != "epoch"
    for number, models in enumerate(((first, second), (second, first))):
        average_weights(models, (), tmp_path / f"{number}")
        one, other, mean = (load_model(path)[0].state_dict() for path in (first, second, tmp_path / f"{number}"))
        trained = [key for key in mean if not torch.equal(one[key], other[key])]
        assert any(not key.startswith("embed") for key in trained)
        for key in trained:
            torch.testing.assert_close(mean[key], (one[key] + other[key]) / 2)


def test_tied_and_untied_weights_have_no_mean(trained: Path, small: Callable[..., TrainingConfig], tmp_path: Path):
    models = [train(small(name=str(tied), tie_weights=tied, embed_size=32)) for tied in (False, True)]
    with pytest.raises(InputError, match="or in whether weights are tied"):
        average_weights(models, (), tmp_path / "average")
