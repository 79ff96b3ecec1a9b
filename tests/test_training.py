import json
import math
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import filelock
import numpy as np
import pytest
import torch
import torch.nn as nn
from accelerate import Accelerator
from conftest import EIGHT, write_split
from torch.utils._python_dispatch import TorchDispatchMode

from captioning import losses, training
from captioning.batches import EpochBatches, place_features, prefetch
from captioning.captioner import Captioner
from captioning.checkpoint import epochs_saved, load_model, read_description, resolve_weights
from captioning.config import resumed_config
from captioning.errors import InputError
from captioning.images import ImageDataset, build_transform
from captioning.losses import Batch, CaptioningModel, CrossEntropy, loss_tokens
from captioning.preparation import EMBED_LR_FACTOR, build_optimizer
from captioning.training import TrainingConfig, learning_rate_factor, read_log, train
from captioning.validation import validate
from captioning.weights import read_state_dict
from data_loader import CaptionDataset
from model import DECODERS, DecoderRNN, EncoderCNN, TransformerDecoder

ROOT = Path(__file__).parents[1]
Make = Callable[..., TrainingConfig]


def test_the_learning_rate_rises_and_then_falls_to_zero():
    factors = [learning_rate_factor(step, 100, 10) for step in range(100)]
    assert factors.index(max(factors)) == 10
    assert max(factors) == 1
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert 0 < factors[0] <= 0.1


def test_training_knows_eight_pictures_by_heart(memorized: Path, eight: Path):
    image_paths = [eight / "images" / "val" / name for name in EIGHT]
    captions = Captioner.load(memorized)(image_paths)
    assert [caption.text for caption in captions] == list(EIGHT.values())
    epochs = read_description(memorized).epochs
    assert epochs[-1]["Bleu_4"] == pytest.approx(1, abs=1e-3)
    assert epochs[-1]["val_loss"] < 0.1


# A run that starts from a trained model


def weights_of(folder: Path, epoch: int | None = None) -> dict[str, torch.Tensor]:
    encoder, decoder, _, _ = load_model(folder, epoch)
    return {**encoder.state_dict(prefix="encoder."), **decoder.state_dict(prefix="decoder.")}


@pytest.mark.parametrize(
    ("fields", "fine_tune"),
    [
        ({}, 0),
        ({"reduce_to": 40}, 0),
        ({"decoder": "attention", "grid_size": 2}, 0),
        ({"tie_weights": True, "hidden_size": 16, "decoder": "transformer"}, 0),
        ({"fine_tune": 1}, 0),
        ({}, 1),
    ],
    ids=str,
)
def test_a_run_starts_from_a_trained_model(fields: dict, fine_tune: int, small: Make, tiny_backbone: Callable):
    source = train(small(dropout=0.2, name="source", **fields))
    config = small(start_from=source, fine_tune=fine_tune, learning_rate=1e-9, backbone_learning_rate=1e-9)
    folder = train(config)
    before, after = weights_of(source), weights_of(folder)
    assert set(before) == set(after)
    for name, value in before.items():
        if "running" not in name and "tracked" not in name:  # statistics of a batch norm that is trained
            torch.testing.assert_close(after[name], value, atol=1e-6, rtol=0, msg=name)
    own, first = read_description(folder), read_description(source)
    assert own.vocabulary == first.vocabulary
    assert own.preprocessing == first.preprocessing
    assert own.preprocessing.reduce_to == fields.get("reduce_to")
    parts = own.architecture.model_dump(exclude={"backbone_weights"})
    assert parts == first.architecture.model_dump(exclude={"backbone_weights"})
    assert config.dropout == 0.2


def test_a_run_that_starts_from_a_model_learns_and_is_resumed_without_it(small: Make, tiny_backbone: Callable):
    source = train(small(name="source"))
    folder = train(small(start_from=source, objective="cider", vocab_threshold=100))
    assert read_description(folder).vocabulary == read_description(source).vocabulary
    before, after = weights_of(source), weights_of(folder)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    shutil.rmtree(source)
    config = resumed_config(folder)
    config.num_epochs = 2
    assert epochs_saved(train(config)) == [1, 2]


def test_a_frozen_backbone_is_bit_identical_after_training(small: Make, tmp_path: Path, tiny_backbone: Callable):
    weights = {k: v for k, v in tiny_backbone().state_dict().items() if not k.startswith("fc.")}
    torch.save(weights, tmp_path / "weights.pth")
    folder = train(small(weights=str(tmp_path / "weights.pth")))
    before = EncoderCNN(16, weights=tmp_path / "weights.pth").resnet.state_dict()
    after = read_state_dict(folder / "backbone.pkl")
    assert len(before) == len(weights)
    for key, value in before.items():
        assert torch.equal(after[f"resnet.{key}"], value), key


@pytest.mark.slow
@pytest.mark.parametrize("fine_tune", [2, 5])
def test_a_backbone_that_learns_changes_in_the_parts_that_learn(
    small: Make, tmp_path: Path, tiny_backbone: Callable, fine_tune: int
):
    torch.save(tiny_backbone().state_dict(), tmp_path / "weights.pth")
    folder = train(small(weights=str(tmp_path / "weights.pth"), fine_tune=fine_tune, image_size=32))
    before = EncoderCNN(16, weights=tmp_path / "weights.pth").resnet.state_dict()
    after = read_state_dict(folder / "encoder-1.pkl")
    changed = {key.split(".")[0] for key, value in before.items() if not torch.equal(after[f"resnet.{key}"], value)}
    assert changed == ({"6", "7"} if fine_tune == 2 else {"0", "1", "4", "5", "6", "7"})
    statistics = [key for key in before if "running_mean" in key]
    moved = [not torch.equal(after[f"resnet.{key}"], before[key]) for key in statistics]
    assert moved == [fine_tune == 5] * len(statistics)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_tied_weights_are_one_matrix(small: Make, decoder: str):
    for tied in (True, False):
        folder = train(small(decoder=decoder, tie_weights=tied, hidden_size=16))
        state = read_state_dict(folder / "decoder-1.pkl")
        assert torch.equal(state["linear.weight"], state["embed.weight"]) == tied
    with pytest.raises(InputError, match="equal embed_size and hidden_size, not 16 and 32"):
        small(tie_weights=True)


class WideDecoder(DecoderRNN):
    """A decoder of a user's, whose output layer has another size."""

    def __init__(self, embed_size: int, hidden_size: int, vocab_size: int, *options: Any, **more: Any):
        super().__init__(embed_size, hidden_size, vocab_size, *options, **more)
        self.linear = nn.Linear(2 * hidden_size, vocab_size)


@pytest.mark.slow
def test_a_decoder_that_is_added_later_is_trained_and_loaded(small: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(DECODERS, "mine", type("Mine", (TransformerDecoder,), {}))
    folder = train(small(decoder="mine", tie_weights=True))
    assert read_description(folder).architecture.decoder == "mine"
    assert type(load_model(folder)[1]).__name__ == "Mine"
    monkeypatch.setitem(DECODERS, "wide", WideDecoder)
    with pytest.raises(InputError, match="the weights of the decoder wide cannot be tied: their shapes differ"):
        train(small(decoder="wide", tie_weights=True, hidden_size=16))


@pytest.mark.slow
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
        match = re.fullmatch(
            rf"Epoch \[{epoch:.0f}/2\], Step \[{step:.0f}/{steps}\], Loss: ([\d.]+), Perplexity: ([\d.]+)",
            line,
        )
        assert float(match[1]) == loss
        assert float(match[2]) == pytest.approx(math.exp(loss), rel=1e-3)


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
    model = CaptioningModel(encoder, decoder).eval()
    dataset = ImageDataset(data.paths, build_transform(False, 64, normalize=False))
    pixels = torch.stack([dataset[i] for i in range(len(dataset))])
    captions, lengths = data.captions(np.arange(len(data)))
    with torch.no_grad():
        loss, _ = model(Batch(pixels, torch.from_numpy(data.image_rows).long(), captions, lengths))
    expected = loss.item() / loss_tokens(lengths, decoder)
    assert description.epochs[1]["val_loss"] == pytest.approx(expected, rel=1e-2)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Makes the epochs' validation give these CIDErs."""

    def judge(values: list[float]) -> None:
        left = iter(values)
        validation = {"val_loss": 1.0, "val_perplexity": math.e, "Bleu_4": 0.0, "captions": {}}
        monkeypatch.setattr(training, "validate", lambda *_: {**validation, "CIDEr": next(left)})

    return judge


@pytest.mark.slow
def test_the_best_epoch_and_every_save_every_th_are_saved(small: Make, tiny_backbone: Callable, judged: Callable):
    judged([0.1, 0.5, 0.4, 0.6, 0.3, 0.2, 0.1])
    folder = train(small(num_epochs=7, save_every=3, patience=9, batch_size=120))
    assert epochs_saved(folder) == [3, 4, 6, 7]
    description = read_description(folder)
    assert description.best_epoch == 4
    assert [epoch["CIDEr"] for epoch in description.epochs] == [0.1, 0.5, 0.4, 0.6, 0.3, 0.2, 0.1]
    encoder_state = load_model(folder)[0].state_dict()
    best = read_state_dict(folder / "encoder-4.pkl")
    assert torch.equal(encoder_state["embed.weight"], best["embed.weight"])


def test_the_epoch_that_an_objective_started_from_is_kept(small: Make, tiny_backbone: Callable, judged: Callable):
    judged([0.1, 0.5, 0.4, 0.6, 0.7])
    folder = train(small(num_epochs=3, save_every=9, batch_size=120))
    assert epochs_saved(folder) == [2, 3]
    config = resumed_config(folder, "cider")
    config.num_epochs = 2
    train(config)
    assert epochs_saved(folder) == [2, 3, 5]  # 4 was the best for an epoch


def test_a_warm_up_that_is_cut_is_said(small: Make, tiny_backbone: Callable, capsys: pytest.CaptureFixture):
    train(small(batch_size=60, warmup_steps=500))
    assert "the warm-up takes a tenth of the run's steps, 1, and not 500" in capsys.readouterr().out
    train(small(batch_size=60, warmup_steps=100))  # the default
    assert "the warm-up" not in capsys.readouterr().out


@pytest.mark.parametrize(("option", "file"), [("start_from", ""), ("weights", ""), ("weights", "captioner.json")])
def test_a_run_does_not_replace_the_model_that_it_starts_from(option: str, file: str, trained: Path, small: Make):
    source = trained / file
    with pytest.raises(InputError, match=f"{trained} holds what the run starts from; choose another --name"):
        small(**{option: source if option == "start_from" else str(source)}, models=trained.parent, name=trained.name)


def test_training_ends_when_nothing_has_been_better_for_a_while(small: Make, tiny_backbone: Callable, judged: Callable):
    judged([0.1, 0.5, 0.4, 0.3, 0.9])
    folder = train(small(num_epochs=5, patience=2, batch_size=120))
    assert len(read_description(folder).epochs) == 4


def test_a_new_training_leaves_nothing_of_the_one_before_in_its_folder(small: Make, tiny_backbone: Callable):
    config = small(num_epochs=2, batch_size=120)
    train(config)
    config.num_epochs = 1
    folder = config.models / config.name
    for name in ("backbone", "encoder-2", "decoder-2"):  # as a model from the Hub has them
        (folder / f"{name}.safetensors").write_bytes(b"")
    train(config)
    assert epochs_saved(folder) == [1]
    assert not list(folder.glob("*.safetensors"))
    assert len(read_description(folder).epochs) == 1
    assert set(read_log(folder / "training_log.txt")[:, 0]) == {1}


def test_the_vocabulary_can_come_from_a_file(small: Make, tmp_path: Path, tiny_backbone: Callable):
    words = ["<start>", "<end>", "<unk>", "a", "dog", "unicorn"]
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    folder = train(small(vocab_from_file=True, vocab_file=tmp_path / "vocab.json"))
    assert read_description(folder).vocabulary == words


@pytest.mark.slow
def test_real_images_and_captions_train(small: Make, shared: Path, tiny_backbone: Callable):
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
        pytest.raises(InputError, match=r"another run is writing to .*small"),
    ):
        train(config)
    assert train(config) == folder


@pytest.mark.parametrize("epoch_seed", [(1, 1), (0, 3)])
def test_augmentation_differs_between_epochs_and_seeds(small: Make, cache: Path, epoch_seed: tuple[int, int]):
    def pixels(seed: int, epoch: int) -> torch.Tensor:
        config = small(fine_tune=5, image_size=32, seed=seed, batch_size=200)
        data = CaptionDataset(config.data, "train", cache=cache)
        sampler = CrossEntropy().build_sampler(data, config.batch_size, seed, False)
        batches = list(EpochBatches(data, sampler, None, config).epoch(epoch, 0, torch.device("cpu")))
        assert len(batches) == 1  # of all images, in one order
        return batches[0][2].images

    first = pixels(0, 2)
    assert torch.equal(first, pixels(0, 2))
    assert not torch.equal(first, pixels(*epoch_seed))


def test_batches_gathered_in_a_thread_are_the_same_and_its_error_is_raised():
    def numbers(last: int) -> Iterator[float]:
        for i in range(last, -1, -1):
            yield 1 / i

    items = prefetch(numbers(5))
    assert [next(items) for _ in range(5)] == [1 / i for i in range(5, 0, -1)]
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert list(prefetch([])) == []
    threads = threading.active_count()
    left = prefetch(iter(range(100)))
    next(left)
    assert threading.active_count() == threads + 1
    left.close()
    assert threading.active_count() == threads


def test_features_stay_mapped_from_the_disk_without_a_gpu_or_where_it_lacks_memory(monkeypatch: pytest.MonkeyPatch):
    features = torch.zeros(3, 1, 8)
    assert place_features(features, torch.device("cpu")) is features
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * features.nbytes - 1, 0))
    assert place_features(features, torch.device("cuda")) is features
    moved = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * features.nbytes, 0))
    monkeypatch.setattr(torch.Tensor, "to", lambda _, device: moved.append(device))
    place_features(features, torch.device("cuda"))
    assert moved == [torch.device("cuda")]


@pytest.mark.parametrize("name", DECODERS)
def test_an_image_is_embedded_once_for_all_its_captions(name: str, tiny_backbone: Callable):
    encoder, decoder = EncoderCNN(8, weights="random", grid=DECODERS[name].attends), DECODERS[name](8, 16, 50)
    layers = [encoder.embed, *(module for path, module in decoder.named_modules() if path.endswith("cross_key_value"))]
    layers += [decoder.key] if name == "attention" else []
    rows = []
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    shape = (3, 4, encoder.feature_size) if encoder.grid else (3, encoder.feature_size)
    captions = torch.zeros(5, 7, dtype=torch.long)
    model = CaptioningModel(encoder, decoder)
    model(Batch(torch.zeros(shape), torch.tensor([0, 0, 1, 2, 2]), captions, torch.full((5,), 7), np.arange(3)))
    assert rows == [3] * (1 if name == "lstm" else 2)


@pytest.mark.parametrize("name", DECODERS)
def test_a_step_reads_no_value_from_the_device(name: str, tiny_backbone: Callable, monkeypatch: pytest.MonkeyPatch):
    """On the meta device there are no values: whatever reads one raises an error."""
    monkeypatch.setattr(losses, "compute_dtype", lambda x: x.dtype)  # the meta device has no autocast
    encoder = EncoderCNN(8, weights="random", grid=DECODERS[name].attends)
    model = CaptioningModel(encoder, DECODERS[name](8, 16, 50)).to("meta")
    shape = (3, 4, encoder.feature_size) if encoder.grid else (3, encoder.feature_size)
    features = torch.zeros(shape, device="meta")
    captions, rows = torch.zeros(5, 7, dtype=torch.long, device="meta"), torch.tensor([0, 0, 1, 2, 2], device="meta")
    loss, _ = model(Batch(features, rows, captions, torch.tensor([7, 6, 5, 7, 3]), np.arange(3)))
    loss.backward()
    assert model.decoder.linear.weight.grad.is_meta


@pytest.mark.slow
def test_losses_are_read_from_the_device_every_print_every_steps(small: Make, monkeypatch: pytest.MonkeyPatch):
    read, steps = training.Run.read_losses, []

    def counting(run: training.Run, unread: list) -> tuple[str, float, bool]:
        steps.append([x.step for x in unread])
        return read(run, unread)

    monkeypatch.setattr(training.Run, "read_losses", counting)
    folder = train(small(print_every=5))
    assert steps == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13]]
    assert read_log(folder / "training_log.txt")[:, 1].tolist() == [*range(1, 14)]


def test_validation_creates_no_float64_and_changes_nothing(
    small: Make, drawn: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Callable
):
    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
            result = function(*args, **(kwargs or {}))
            assert not (isinstance(result, torch.Tensor) and result.dtype == torch.float64), function
            return result

    data = CaptionDataset(drawn, "val", vocab_threshold=1, cache=cache)
    model = CaptioningModel(EncoderCNN(8, weights="random", fine_tune=5), DECODERS["lstm"](8, 16, len(data.vocab)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with NoFloat64():
        result = validate(Accelerator(cpu=True), model, data, None, small(image_size=32))
    assert result["val_loss"] == pytest.approx(math.log(len(data.vocab)), rel=0.1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_names_of_images_that_are_left_out_do_not_steer_the_terminal(
    small: Make, eight: Path, tmp_path: Path, tiny_backbone: Callable, capsys: pytest.CaptureFixture
):
    data = Path(shutil.copytree(eight, tmp_path / "data"))
    file, folder = data / "annotations" / "captions_train.json", data / "images" / "train"
    content = json.loads(file.read_text())
    image = content["images"][0]
    (folder / image["file_name"]).unlink()
    image["file_name"] = "a\x1b[2J.png"
    (folder / image["file_name"]).touch()
    file.write_text(json.dumps(content))
    train(small(data=data, skip_unreadable=True, image_size=32))
    output = capsys.readouterr().out
    assert "left out: " in output
    assert "\x1b" not in output


@pytest.mark.slow
def test_one_training_image_trains(small: Make, eight: Path, tmp_path: Path):
    shutil.copytree(eight / "images", tmp_path / "images")
    for split in ("train", "val"):
        write_split(tmp_path, split, {"0.png": ["a red dog runs on the beach."] * 5})
    folder = train(small(data=tmp_path, vocab_threshold=1, image_size=32))
    assert np.isfinite(read_log(folder / "training_log.txt")).all()


def test_a_batch_of_one_image_without_variance_is_a_sentence(small: Make, tiny_backbone: Callable):
    with pytest.raises(InputError, match=r"step 1 of epoch 1 has a single image.*another --batch-size"):
        train(small(fine_tune=5, batch_size=5, image_size=32))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_any_seed_that_is_taken_trains(small: Make, seed: int):
    assert epochs_saved(train(small(seed=seed, image_size=32))) == [1]


class Writer:
    """In the place of TensorBoard's."""

    scalars: ClassVar[dict] = {}

    def __init__(self, folder: Path, purge_step: int):
        self.scalars[folder] = self.rows = [purge_step]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.append((name, value, step))

    def close(self) -> None:
        self.rows.append("closed")


@pytest.mark.slow
def test_tensorboard_gets_the_scalars_of_steps_and_epochs(small: Make, monkeypatch: pytest.MonkeyPatch):
    config = small(tensorboard=True, num_epochs=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(InputError, match="pip install tensorboard"):
            train(config)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    folder = train(config)
    first, *rows, last = Writer.scalars[folder / "tensorboard"]
    assert (first, last) == (1, "closed")
    losses = [(step, round(value, 4)) for name, value, step in rows if name == "train/loss"]
    log = read_log(folder / "training_log.txt")
    assert losses == [*enumerate(log[:, 2].tolist(), 1)]
    epochs = read_description(folder).epochs
    assert [(value, step) for name, value, step in rows if name == "epoch/CIDEr"] == [
        (e["CIDEr"], e["epoch"]) for e in epochs
    ]
    resumed = resumed_config(folder)
    resumed.num_epochs, resumed.batch_size = 3, 2 * config.batch_size
    with monkeypatch.context() as patch:
        patch.setattr(training, "validate", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(resumed)
    first, *rows, _ = Writer.scalars[folder / "tensorboard"]
    assert first == len(log) + 1
    assert next(step for name, _, step in rows if name == "train/loss") == first
    train(resumed_config(folder))
    log = read_log(folder / "training_log.txt")
    assert Writer.scalars[folder / "tensorboard"][0] == len(log) + 1  # and not 3, the step of the epoch's metrics


def test_the_log_of_a_running_training_lacks_its_torn_last_line(trained: Path, tmp_path: Path):
    log = (trained / "training_log.txt").read_text()
    whole, lines = read_log(trained / "training_log.txt"), log.splitlines(keepends=True)
    path = tmp_path / "log.txt"
    for torn in range(1, len(lines[-1]), 7):
        path.write_text(log[:-torn])
        assert read_log(path).tolist() == whole[:-1].tolist()
    path.write_text("")
    assert read_log(path).shape == (0, 3)
    path.write_text(lines[0] + "something else\n" + lines[1])
    with pytest.raises(InputError, match=r"log\.txt, line 2 is not a training log line"):
        read_log(path)


def test_where_cider_is_0_the_epoch_with_the_lower_loss_is_the_best(small: Make, eight: Path, tmp_path: Path):
    shutil.copytree(eight / "images", tmp_path / "images")
    for split in ("train", "val"):
        write_split(tmp_path, split, {"0.png": ["a red dog runs on the beach."] * 5})
    about = read_description(train(small(data=tmp_path, vocab_threshold=1, image_size=32, num_epochs=3)))
    assert {epoch["CIDEr"] for epoch in about.epochs} == {0.0}
    assert about.best_epoch == min(about.epochs, key=lambda epoch: epoch["val_loss"])["epoch"] == 3


@pytest.mark.parametrize("name", ["pretrained", "random"])
def test_a_folder_called_like_a_kind_of_weights_is_not_taken_for_them(tmp_path: Path, monkeypatch, name: str):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_weights(name, "resnet50") == name


def test_a_model_with_another_backbone_is_no_source_of_weights(small: Make):
    with pytest.raises(
        InputError, match=r"photos has the backbone tf_efficientnet_lite2, not resnet50; add --backbone"
    ):
        train(small(weights=str(ROOT / "models" / "photos")))


def test_features_beyond_half_precision_are_a_sentence(small: Make, tiny_backbone: Callable, tmp_path: Path):
    network = tiny_backbone()
    network.layer4[-1].bn3.bias.data += 1e6
    torch.save(network.state_dict(), tmp_path / "resnet50.pth")
    with pytest.raises(InputError, match=r"features of .*\.jpg or an image after it are not finite .*other --weights"):
        train(small(weights=str(tmp_path / "resnet50.pth")))


def test_a_short_run_has_more_than_a_warm_up():
    factors = [learning_rate_factor(step, 30, 100) for step in range(30)]
    assert factors.index(max(factors)) == 3
    assert factors[-1] < 0.01


def test_an_empty_caption_list_stops_training(small: Make, tmp_path: Path):
    write_split(tmp_path / "data", "train", {"a.png": []})
    with pytest.raises(InputError, match=r"captions_train\.json holds no captions"):
        train(small(data=tmp_path / "data"))


def test_bfloat16_is_refused_where_the_processor_has_none(small: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "fast_dtype", lambda _: torch.float32)
    with pytest.raises(InputError, match="use --precision auto"):
        train(small(precision="bf16"))


@pytest.mark.parametrize("line", ["Loss: 5.1Epoch [1/3], Step [3/22], Loss: 5.0", "Loss: abc", "Loss: 5.1.0"])
def test_a_spoilt_line_within_the_log_is_a_sentence(line: str, tmp_path: Path):
    (tmp_path / "log.txt").write_text(f"Epoch [1/3], Step [2/22], {line}, Perplexity: 1\n")
    with pytest.raises(InputError, match=r"log\.txt, line 1 "):
        read_log(tmp_path / "log.txt")
    with pytest.raises(InputError, match=r"none\.txt cannot be read"):
        read_log(tmp_path / "none.txt")


def test_weight_decay_is_of_the_layer_on_the_image_features_alone():
    config = TrainingConfig(embed_weight_decay=100, learning_rate=0.01)
    encoder, decoder = EncoderCNN(8, weights="random"), DecoderRNN(8, 8, 10)
    optimizer = build_optimizer(encoder, decoder, [], config)
    before = {name: p.detach().clone() for module in (encoder.embed, decoder) for name, p in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    rate = 0.01 * EMBED_LR_FACTOR
    torch.testing.assert_close(encoder.embed.weight.detach(), before["weight"] * (1 - 100 * rate))
    assert all(torch.equal(p, before[name]) for name, p in decoder.named_parameters())
