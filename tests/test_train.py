import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from conftest import EIGHT, write_split

import train as train_module
from captioning import training
from captioning.captioner import Captioner
from captioning.checkpoint import epochs_saved, load_model, read_description
from captioning.errors import InputError
from captioning.images import Photos, build_transform
from captioning.training import Training, TrainingConfig, learning_rate_factor, loss_tokens, read_log, train
from captioning.weights import read_state_dict
from data_loader import CaptionDataset
from model import DECODERS, EncoderCNN

ROOT = Path(__file__).parents[1]
Make = Callable[..., TrainingConfig]


# The loss


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("lengths", [[5, 9, 7, 5], [7, 7, 7, 7]], ids=["ragged", "equal"])
def test_padding_never_enters_the_loss(tiny_backbone: Callable, name: str, lengths: list[int]):
    torch.manual_seed(0)
    decoder = DECODERS[name](8, 16, 30)
    model = Training(EncoderCNN(8, "random", grid=decoder.attends), decoder).eval()
    features = torch.randn(3, *((4,) if decoder.attends else ()), 2048)
    row, length = torch.tensor([2, 0, 1, 2]), torch.tensor(lengths)
    captions = torch.randint(3, 30, (4, max(lengths)))
    found = model(features, row, captions, length)
    alone = [model(features, row[i : i + 1], captions[i : i + 1, :n], length[i : i + 1]) for i, n in enumerate(lengths)]
    torch.testing.assert_close(found[0], sum(loss for loss, _ in alone))
    torch.testing.assert_close(found[1], sum(penalty for _, penalty in alone))
    captions[torch.arange(max(lengths)) >= length[:, None]] = 29  # whatever the padding is
    assert model(features, row, captions, length)[0] == found[0]


@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_is_the_cross_entropy_of_as_many_tokens_as_are_counted(tiny_backbone: Callable, name: str):
    decoder = DECODERS[name](8, 16, 30)
    torch.nn.init.zeros_(decoder.linear.weight)
    torch.nn.init.zeros_(decoder.linear.bias)  # every word is as probable as any other
    model = Training(EncoderCNN(8, "random", grid=decoder.attends), decoder)
    features = torch.randn(2, *((4,) if decoder.attends else ()), 2048)
    lengths = torch.tensor([5, 8])
    loss, _ = model(features, torch.arange(2), torch.randint(3, 30, (2, 8)), lengths)
    assert loss.item() == pytest.approx(loss_tokens(lengths, decoder) * math.log(30), rel=1e-5)


def test_the_learning_rate_rises_and_then_falls_to_zero():
    factors = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert factors.index(max(factors)) == 10
    assert max(factors) == 1
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert 0 < factors[0] <= 0.1


# Training


def test_training_knows_eight_pictures_by_heart(memorised: Path, eight: Path):
    photos = [eight / "images" / "val" / name for name in EIGHT]
    captions = Captioner.load(memorised)(photos)
    assert [caption.text for caption in captions] == list(EIGHT.values())
    epochs = read_description(memorised).epochs
    assert epochs[-1]["Bleu_4"] == pytest.approx(1, abs=1e-3)
    assert epochs[-1]["val_loss"] < 0.1


def test_a_frozen_backbone_is_bit_identical_after_training(small: Make, tmp_path: Path, tiny_backbone: Callable):
    weights = {k: v for k, v in tiny_backbone().state_dict().items() if not k.startswith("fc.")}
    torch.save(weights, tmp_path / "weights.pth")
    folder = train(small(weights=str(tmp_path / "weights.pth")))
    before = EncoderCNN(16, tmp_path / "weights.pth").resnet.state_dict()
    after = read_state_dict(folder / "encoder-1.pkl")
    assert len(before) == len(weights)
    for key, value in before.items():
        assert torch.equal(after[f"resnet.{key}"], value), key


@pytest.mark.parametrize("fine_tune", [2, 5])
def test_a_backbone_that_learns_changes_in_the_parts_that_learn(
    small: Make, tmp_path: Path, tiny_backbone: Callable, fine_tune: int
):
    torch.save(tiny_backbone().state_dict(), tmp_path / "weights.pth")
    folder = train(small(weights=str(tmp_path / "weights.pth"), fine_tune=fine_tune, image_size=32))
    before = EncoderCNN(16, tmp_path / "weights.pth").resnet.state_dict()
    after = read_state_dict(folder / "encoder-1.pkl")
    changed = {key.split(".")[0] for key, value in before.items() if not torch.equal(after[f"resnet.{key}"], value)}
    assert changed == ({"6", "7"} if fine_tune == 2 else {"0", "1", "4", "5", "6", "7"})
    statistics = [key for key in before if "running_mean" in key]
    moved = [not torch.equal(after[f"resnet.{key}"], before[key]) for key in statistics]
    assert moved == [fine_tune == 5] * len(statistics)


@pytest.mark.parametrize("decoder", DECODERS)
def test_tied_weights_are_one_matrix(small: Make, decoder: str):
    for tied in (True, False):
        folder = train(small(decoder=decoder, tie_weights=tied, hidden_size=16))
        state = read_state_dict(folder / "decoder-1.pkl")
        assert torch.equal(state["linear.weight"], state["embed.weight"]) == tied
    with pytest.raises(InputError, match="embed_size and hidden_size alike, not 16 and 32"):
        small(tie_weights=True)


@pytest.mark.parametrize("fine_tune", [0, 5])
def test_the_same_seed_gives_the_same_model_with_any_number_of_workers(
    small: Make, tmp_path: Path, tiny_backbone: Callable, fine_tune: int
):
    configs = [
        small(fine_tune=fine_tune, image_size=32, workers=workers, seed=seed, cache=tmp_path / str(workers))
        for workers, seed in ((0, 3), (2, 3), (0, 4))
    ]
    folders = [train(config) for config in configs]
    states = [
        {**read_state_dict(folder / "encoder-1.pkl"), **read_state_dict(folder / "decoder-1.pkl")} for folder in folders
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["linear.weight"], states[2]["linear.weight"])
    logs = [(folder / "training_log.txt").read_bytes() for folder in folders]
    assert logs[0] == logs[1] != logs[2]


def test_every_step_is_in_the_log(trained: Path):
    lines = (trained / "training_log.txt").read_text().splitlines()
    log = read_log(trained / "training_log.txt")
    steps = len(lines) // 2
    assert log.shape == (2 * steps, 3)
    assert log[:, 0].tolist() == [1] * steps + [2] * steps
    assert log[:, 1].tolist() == [*range(1, steps + 1)] * 2
    for line, (epoch, step, loss) in zip(lines, log, strict=True):
        found = re.fullmatch(
            rf"Epoch \[{epoch:.0f}/2\], Step \[{step:.0f}/{steps}\], Loss: ([\d.]+), Perplexity: ([\d.]+)",
            line,
        )
        assert float(found[1]) == loss
        assert float(found[2]) == pytest.approx(math.exp(loss), rel=1e-3)


def test_each_epoch_is_judged_by_its_validation(trained: Path, drawn: Path):
    description = read_description(trained)
    assert [epoch["epoch"] for epoch in description.epochs] == [1, 2]
    for epoch in description.epochs:
        assert {"train_loss", "val_loss", "val_perplexity", "Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"} < set(epoch)
        assert epoch["val_perplexity"] == pytest.approx(math.exp(epoch["val_loss"]))
        assert len(epoch["captions"]) == 3
    assert description.data["train_captions"] == 120
    assert description.data["train_photos"] == 24


def test_the_training_loss_of_an_epoch_is_its_steps_mean_over_tokens(trained: Path):
    log = read_log(trained / "training_log.txt")
    for epoch in (1, 2):
        mean = log[log[:, 0] == epoch, 2].mean()
        assert read_description(trained).epochs[epoch - 1]["train_loss"] == pytest.approx(mean, rel=0.02)


def test_the_validation_loss_is_what_the_saved_model_loses(trained: Path, drawn: Path, cache: Path):
    encoder, decoder, vocab, description = load_model(trained, epoch=2)
    data = CaptionDataset(drawn, "val", vocab=vocab, cache=cache)
    model = Training(encoder, decoder).eval()
    photos = Photos(data.paths, build_transform(False, 64, normalise=False))
    pixels = torch.stack([photos[i] for i in range(len(photos))])
    captions, lengths = data.captions(np.arange(len(data)))
    with torch.no_grad():
        loss, _ = model(pixels, torch.from_numpy(data.photo).long(), captions, lengths)
    expected = loss.item() / loss_tokens(lengths, decoder)
    assert description.epochs[1]["val_loss"] == pytest.approx(expected, rel=1e-2)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Makes the epochs' validation give these CIDErs."""

    def judge(values: list[float]) -> None:
        left = iter(values)
        found = {"val_loss": 1.0, "val_perplexity": math.e, "Bleu_4": 0.0, "captions": {}}
        monkeypatch.setattr(training, "validate", lambda *_: {**found, "CIDEr": next(left)})

    return judge


def test_the_best_epoch_is_kept_and_every_save_every_th(small: Make, tiny_backbone: Callable, judged: Callable):
    judged([0.1, 0.5, 0.4, 0.6, 0.3, 0.2, 0.1])
    folder = train(small(num_epochs=7, save_every=3, patience=9, batch_size=120))
    assert epochs_saved(folder) == [3, 4, 6, 7]
    description = read_description(folder)
    assert description.best_epoch == 4
    assert [epoch["CIDEr"] for epoch in description.epochs] == [0.1, 0.5, 0.4, 0.6, 0.3, 0.2, 0.1]
    encoder_state = load_model(folder)[0].state_dict()
    best = read_state_dict(folder / "encoder-4.pkl")
    assert torch.equal(encoder_state["embed.weight"], best["embed.weight"])


def test_training_ends_when_nothing_has_been_better_for_a_while(small: Make, tiny_backbone: Callable, judged: Callable):
    judged([0.1, 0.5, 0.4, 0.3, 0.9])
    folder = train(small(num_epochs=5, patience=2, batch_size=120))
    assert len(read_description(folder).epochs) == 4


def test_a_new_training_leaves_nothing_of_the_one_before_in_its_folder(small: Make, tiny_backbone: Callable):
    config = small(num_epochs=2, batch_size=120)
    train(config)
    config.num_epochs = 1
    folder = train(config)
    assert epochs_saved(folder) == [1]
    assert len(read_description(folder).epochs) == 1
    assert set(read_log(folder / "training_log.txt")[:, 0]) == {1}


def test_the_vocabulary_can_come_from_a_file(small: Make, tmp_path: Path, tiny_backbone: Callable):
    words = ["<start>", "<end>", "<unk>", "a", "dog", "unicorn"]
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    folder = train(small(vocab_from_file=True, vocab_file=tmp_path / "vocab.json"))
    assert read_description(folder).vocabulary == words


def test_real_photos_and_captions_train(small: Make, shared: Path, tiny_backbone: Callable):
    folder = train(small(data=shared / "coco-mini", image_size=32, vocab_threshold=4))
    description = read_description(folder)
    assert description.data["train_photos"] == 80
    assert description.epochs[0]["val_loss"] < math.log(len(description.vocabulary))


def test_a_second_training_into_the_folder_is_refused(small: Make, tiny_backbone: Callable):
    config = small()
    folder = config.models / config.name
    folder.mkdir()
    with (
        filelock.FileLock(folder / ".lock"),
        pytest.raises(InputError, match=r"another training is writing to .*small"),
    ):
        train(config)
    assert train(config) == folder


# The command line


def run(*arguments: object, cwd: Path, command: str = "train.py") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / command), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_trains_and_goes_on(eight: Path, tmp_path: Path):
    options = [
        "--data",
        eight,
        "--weights",
        "random",
        "--fine-tune",
        0,
        "--image-size",
        32,
        "--vocab-threshold",
        1,
    ]
    found = run(*options, "--num-epochs", 1, "--batch-size", 400, "--workers", 0, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "epoch 1: train loss" in found.stdout
    assert found.stderr == ""  # no progress bar into a pipe
    assert epochs_saved(tmp_path / "models" / "eight") == [1]
    found = run("--resume=models/eight", "--num-epochs", 2, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert epochs_saved(tmp_path / "models" / "eight") == [1, 2]
    assert set(read_log(tmp_path / "models" / "eight" / "training_log.txt")[:, 0]) == {1, 2}


def test_the_command_deletes_a_model_only_when_asked_to(
    small: Make, tmp_path: Path, tiny_backbone: Callable, monkeypatch: pytest.MonkeyPatch
):
    folder = train(small(models=tmp_path, num_epochs=2))
    started: list[TrainingConfig] = []
    monkeypatch.setattr(train_module, "train", started.append)
    options = ["train.py", "--models", str(tmp_path), "--name", "small"]
    monkeypatch.setattr(sys, "argv", options)
    with pytest.raises(InputError, match=r"small holds a model already; .*--resume .*--overwrite.*another --name"):
        train_module.main()
    assert started == []
    for more in (["--overwrite"], ["--name", "other"], ["--resume", str(folder), "--learning-rate", "0.5"]):
        monkeypatch.setattr(sys, "argv", options + more)
        train_module.main()
    assert [(config.name, config.resume, config.hidden_size) for config in started] == [
        ("small", None, 512),
        ("other", None, 512),
        ("small", folder, 32),
    ]
    assert started[2].learning_rate == 0.5
    assert not {"resume", "overwrite"} & set(read_description(folder).training)


def test_a_training_goes_on_with_its_own_options_or_not_at_all(small: Make):
    with pytest.raises(TypeError, match="resume"):
        TrainingConfig(resume=small().models)


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path):
    found = run("--data", "nowhere", "--weights", "random", cwd=tmp_path)
    assert found.returncode == 2
    assert re.fullmatch(r"error: nowhere does not exist; .*\n", found.stderr)
    assert found.stdout == ""


def test_an_empty_caption_list_stops_training(small: Make, tmp_path: Path):
    write_split(tmp_path / "data", "train", {"a.png": []})
    with pytest.raises(InputError, match=r"captions_train\.json holds no captions"):
        train(small(data=tmp_path / "data"))


def test_gradients_add_up_in_one_order_on_several_threads(tiny_backbone: Callable):
    torch.manual_seed(0)
    model = Training(EncoderCNN(256, "random"), DECODERS["lstm"](256, 8, 9)).eval()
    features, row = torch.randn(26, 2048), torch.arange(128) // 5
    captions, lengths = torch.randint(3, 9, (128, 3)), torch.full((128,), 3)
    threads, found = torch.get_num_threads(), set()
    try:
        torch.set_num_threads(2)
        for _ in range(30):
            model.zero_grad()
            model(features, row, captions, lengths)[0].backward()
            found.add(model.encoder.embed.weight.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_bfloat16_is_refused_where_the_processor_has_none(small: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("captioning.distributed.fast_dtype", lambda _: torch.float32)
    with pytest.raises(InputError, match="use --precision auto"):
        train(small(precision="bf16"))
