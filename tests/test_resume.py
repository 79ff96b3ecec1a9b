"""Training that is interrupted, killed or out of room, and goes on as if nothing had happened."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import build_seeded_tiny

from captioning import checkpoint, features, files, training, validation
from captioning.checkpoint import epochs_saved, load_resume, read_description
from captioning.errors import InputError
from captioning.interruption import ending_signals
from captioning.training import TrainingConfig, read_log, train
from captioning.weights import read_state_dict
from model import EncoderCNN
from train import resumed_config

pytestmark = pytest.mark.slow

Make = Callable[..., TrainingConfig]


def assert_same_model(one: Path, other: Path) -> None:
    """Bit for bit: every epoch's weights, the log, the epochs' results."""
    assert epochs_saved(one) == epochs_saved(other) != []
    for epoch in epochs_saved(one):
        for name in (f"encoder-{epoch}.pkl", f"decoder-{epoch}.pkl"):
            a, b = read_state_dict(one / name), read_state_dict(other / name)
            assert set(a) == set(b)
            assert all(torch.equal(a[key], b[key]) for key in a), name
    assert (one / "training_log.txt").read_bytes() == (other / "training_log.txt").read_bytes()
    a, b = read_description(one), read_description(other)
    assert (a.epochs, a.best_epoch) == (b.epochs, b.best_epoch)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something in the middle of the training's step of this number, counted from 0 over all epochs."""
    factor = training.learning_rate_factor

    def acting(done: int, *arguments: int) -> float:
        if done == step:
            act()
        return factor(done, *arguments)

    monkeypatch.setattr(training, "learning_rate_factor", acting)


@pytest.fixture(autouse=True)
def hangup() -> Iterator[None]:
    """SIGHUP is heeded, also where the tests are run by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL) if hasattr(signal, "SIGHUP") else None
    yield
    if before is not None:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def config(small: Make, tiny_backbone: Callable) -> Make:
    """Two epochs of 13 steps, or 8 of a backbone that learns."""

    def make(**fields: object) -> TrainingConfig:
        return small(**{"num_epochs": 2, "dropout": 0.3, "image_size": 32, **fields})

    return make


@pytest.mark.parametrize(
    ("fields", "step", "number"),
    [
        ({}, 0, signal.SIGTERM),
        ({}, 5, signal.SIGINT),
        ({}, 6, getattr(signal, "SIGHUP", signal.SIGTERM)),
        ({}, 12, signal.SIGTERM),  # the last of an epoch
        ({}, 17, signal.SIGTERM),
        ({"decoder": "attention", "views": 2}, 15, signal.SIGTERM),
        ({"decoder": "transformer"}, 15, signal.SIGTERM),
        ({"decoder": "transformer", "tie_weights": True, "embed_size": 32}, 5, signal.SIGINT),
        ({"fine_tune": 5}, 11, signal.SIGTERM),
        ({"tie_weights": True, "embed_size": 32}, 5, signal.SIGTERM),
    ],
    ids=str,
)
def test_a_signal_saves_and_leaves_and_the_resumed_run_ends_the_same(
    config: Make, monkeypatch: pytest.MonkeyPatch, fields: dict, step: int, number: int
):
    undisturbed = train(config(**fields))
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), number))
        settings = config(**fields)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    folder = settings.models / settings.name
    assert len(read_log(folder / "training_log.txt")) == step + 1
    assert train(resumed_config(folder)) == folder
    assert_same_model(folder, undisturbed)


def test_the_backbone_s_last_parts_learn_once_the_decoder_has_settled(
    config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = train(config())
    best, epochs = read_description(folder).best_epoch, len(read_description(folder).epochs)

    def go_on(folder: Path) -> Path:
        return train(dataclasses.replace(resumed_config(folder), fine_tune=2, num_epochs=1))

    undisturbed = go_on(shutil.copytree(folder, tmp_path / "undisturbed"))
    reason = "resume.pt has other trained layers; starting from the best epoch"
    assert f"{undisturbed}/{reason}, {best}" in capsys.readouterr().out.splitlines()
    before, after = (read_state_dict(undisturbed / f"encoder-{i}.pkl") for i in (best, epochs + 1))
    moved = {key.split(".")[1] for key in before if key.startswith("resnet.") and not before[key].equal(after[key])}
    assert moved == {"6", "7"}
    description = read_description(undisturbed)
    assert (description.training["fine_tune"], description.training["before"]["fine_tune"]) == (2, 0)
    assert [epoch["epoch"] for epoch in description.epochs] == [1, 2, 3]
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            go_on(folder)
    capsys.readouterr()
    train(resumed_config(folder))
    assert "the best epoch" not in capsys.readouterr().out
    assert_same_model(folder, undisturbed)


def test_a_state_of_an_optimizer_of_other_parameters_is_refused_in_a_sentence(config: Make):
    folder = train(config(num_epochs=1))
    state = load_resume(folder, print)
    (folder / "resume-previous.pt").unlink()
    moments, groups = state["optimizer"]["state"], state["optimizer"]["param_groups"]
    short = {i: {**moment, "exp_avg": torch.zeros(3)} for i, moment in moments.items()}
    for optimizer in (
        {},
        {"state": {}, "param_groups": 5},
        {"state": {0: "x"}, "param_groups": groups},
        {"state": short, "param_groups": groups},  # with which torch would read beyond their ends
        {"state": {**moments, 0: {"step": torch.tensor(1.0)}}, "param_groups": groups},
        {"state": {**moments, 0: {k: v * math.nan for k, v in moments[0].items()}}, "param_groups": groups},
    ):
        torch.save({**state, "optimizer": optimizer}, folder / "resume.pt")
        with pytest.raises(InputError, match=r"resume.pt (belongs to another run|is not the state of a training run)"):
            train(resumed_config(folder))
    torch.save({**state, "step": 10**6}, folder / "resume.pt")
    with pytest.raises(InputError, match=r"resume.pt belongs to another run"):
        train(resumed_config(folder))


def test_a_backbone_that_had_only_a_name_is_stored_for_every_epoch_when_it_learns(
    small: Make, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torchvision.models, "resnet50", build_seeded_tiny)
    folder = train(small(weights="pretrained", image_size=32, num_epochs=2))
    published = {key: value.clone() for key, value in checkpoint.load_model(folder)[0].resnet.state_dict().items()}
    settings = dataclasses.replace(resumed_config(folder), fine_tune=1, num_epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_resume", lambda *_: 1 / 0)  # killed just after it has changed
        with pytest.raises(ZeroDivisionError):
            train(settings)
    assert read_description(folder).architecture.backbone_weights == "epoch"
    for epoch in (1, 2):
        stored = checkpoint.load_model(folder, epoch)[0].resnet.state_dict()
        assert all(stored[key].equal(published[key]) for key in published)
    train(resumed_config(folder))
    learned = checkpoint.load_model(folder, 3)[0].resnet.state_dict()
    changed = {key.split(".")[0] for key in published if not learned[key].equal(published[key])}
    assert changed == {"7"}


@pytest.mark.parametrize("fields", [{}, {"fine_tune": 5, "workers": 2}], ids=str)
def test_a_signal_in_validation_ends_it_and_costs_no_step(config: Make, monkeypatch: pytest.MonkeyPatch, fields: dict):
    undisturbed = train(config(**fields))
    settings = config(**fields)
    folder = settings.models / settings.name
    with monkeypatch.context() as patch:
        patch.setattr(validation, "greedy", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    assert set(read_log(folder / "training_log.txt")[:, 0]) == {1}
    assert read_description(folder).epochs == []
    train(resumed_config(folder))
    assert_same_model(folder, undisturbed)


def test_a_signal_as_the_epoch_s_last_step_ends_is_not_forgotten(config: Make, monkeypatch: pytest.MonkeyPatch):
    settings = config(print_every=13)
    folder = settings.models / settings.name
    write = training.tqdm.write
    with monkeypatch.context() as patch:
        patch.setattr(
            training.tqdm,
            "write",
            lambda line: (
                os.kill(os.getpid(), signal.SIGINT) if line.startswith("Epoch [1/2], Step [13") else write(line)
            ),
        )
        patch.setattr(validation, "greedy", lambda *_: pytest.fail("it validates"))
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    train(resumed_config(folder))
    assert_same_model(folder, train(config()))


def test_a_signal_during_the_backbones_pass_keeps_the_computed_features(
    config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    undisturbed = train(config())
    settings = config(cache=tmp_path)
    encode = features.encode

    def interrupted(*arguments: object) -> Iterator:
        for number, batch in enumerate(encode(*arguments)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(features, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    assert sum(path.stat().st_size for path in tmp_path.rglob("done-*")) == 8  # one batch
    assert_same_model(train(settings), undisturbed)


@pytest.mark.parametrize("fine_tune", [0, 5])
def test_a_crash_costs_only_what_came_after_the_last_save(
    config: Make, monkeypatch: pytest.MonkeyPatch, fine_tune: int
):
    undisturbed = train(config(fine_tune=fine_tune))
    settings = config(fine_tune=fine_tune)
    folder = settings.models / settings.name
    for step in (0, 10):  # before any save within the epoch, and in the second epoch
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(resumed_config(folder) if step else settings)
    assert train(resumed_config(folder)) == folder
    assert_same_model(folder, undisturbed)


def test_a_training_that_has_ended_stays_as_it_is(config: Make, capsys: pytest.CaptureFixture):
    folder = train(config())
    before = (folder / "decoder-2.pkl").read_bytes(), (folder / "training_log.txt").read_bytes()
    capsys.readouterr()
    train(resumed_config(folder))
    assert capsys.readouterr().out.endswith("all epochs are done; use --num-epochs 3 to train one more\n")
    assert before == ((folder / "decoder-2.pkl").read_bytes(), (folder / "training_log.txt").read_bytes())
    options = read_description(folder).training
    other = resumed_config(folder)
    other.learning_rate, other.seed = 3.0, 5
    train(other)
    assert read_description(folder).training == options  # those that it was trained with


def test_a_run_killed_before_its_last_description_is_described(config: Make, monkeypatch: pytest.MonkeyPatch):
    """The last epoch's resume.pt is written, captioner.json is not."""
    folder = train(config())
    about = (folder / "captioner.json").read_text()
    (folder / "captioner.json").write_text(json.dumps(json.loads(about) | {"epochs": json.loads(about)["epochs"][:1]}))
    train(resumed_config(folder))
    assert (folder / "captioner.json").read_text() == about


def test_a_run_killed_before_its_first_save_knows_its_new_log(config: Make, monkeypatch: pytest.MonkeyPatch):
    folder = train(config(num_epochs=1))
    resumed = resumed_config(folder)
    resumed.num_epochs, resumed.log_file = 2, "more.txt"
    with monkeypatch.context() as patch:
        at_step(patch, 13, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(resumed)
    assert (folder / "more.txt").exists()
    train(resumed)
    assert len(read_log(folder / "more.txt")) > 0


def test_the_step_of_an_older_state_is_counted(stopped: Path):
    state = load_resume(stopped, print)
    steps = state.pop("total_steps")
    torch.save(state, stopped / "resume.pt")
    train(resumed_config(stopped))
    log = read_log(stopped / "training_log.txt")
    assert 0 < steps < len(log) == load_resume(stopped, print)["total_steps"]


def test_a_run_keeps_its_crop_where_the_default_has_changed(stopped: Path):
    about = json.loads((stopped / "captioner.json").read_text())
    assert about["training"]["crop"] is None
    about["preprocessing"]["crop"] = "squash"
    (stopped / "captioner.json").write_text(json.dumps(about))
    assert resumed_config(stopped).preprocessing.crop == "squash"


def test_a_resumed_run_appends_to_no_other_file(config: Make):
    folder = train(config(num_epochs=1))
    (folder / "notes.txt").write_text("precious")
    resumed = resumed_config(folder)
    resumed.num_epochs, resumed.log_file = 2, "notes.txt"
    with pytest.raises(InputError, match=r"notes\.txt exists and is not the log of this run; name another --log-file"):
        train(resumed)
    assert (folder / "notes.txt").read_text() == "precious"


def test_a_training_that_stopped_early_stays_stopped_when_resumed(config: Make, monkeypatch: pytest.MonkeyPatch):
    validation = {"val_loss": 1.0, "val_perplexity": 2.7, "Bleu_4": 0.0, "CIDEr": 0.0, "captions": {}}
    monkeypatch.setattr(training, "validate", lambda *_: dict(validation))
    folder = train(config(num_epochs=9, patience=2, batch_size=120))
    assert len(read_description(folder).epochs) == 3
    before = (folder / "captioner.json").read_bytes()
    resumed = resumed_config(folder)
    resumed.learning_rate, resumed.seed = 3.0, 5  # no step is made with them
    train(resumed)
    assert (folder / "captioner.json").read_bytes() == before
    resumed = resumed_config(folder)
    resumed.patience, resumed.learning_rate = 3, 3e-3
    train(resumed)
    description = read_description(folder)
    assert (len(description.epochs), description.training["learning_rate"]) == (4, 3e-3)


def test_resuming_keeps_the_options_and_takes_new_ones(config: Make):
    folder = train(config(num_epochs=1, hidden_size=24, learning_rate=2e-3))
    resumed = resumed_config(folder)
    assert (resumed.hidden_size, resumed.learning_rate, resumed.resume) == (24, 2e-3, folder)
    resumed.num_epochs = 2
    train(resumed)
    assert epochs_saved(folder) == [1, 2]


def test_an_option_that_has_been_renamed_is_read_under_its_old_name(stopped: Path):
    path = stopped / "captioner.json"
    path.write_text(path.read_text().replace('"val_images": 5000', '"val_photos": 7'))
    assert resumed_config(stopped).val_images == 7


# Files torn and gone


@pytest.fixture
def stopped(config: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a training that was interrupted after two saves within its second epoch."""
    settings = config(save_minutes=0)
    with monkeypatch.context() as patch:
        at_step(patch, 15, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    return settings.models / settings.name


@pytest.mark.parametrize("damage", ["torn", "empty", "text", "foreign", "gone", "between two renames"])
def test_the_previous_state_is_used_with_a_warning(
    stopped: Path, config: Make, damage: str, capsys: pytest.CaptureFixture
):
    path = stopped / "resume.pt"
    if damage == "gone":
        path.unlink()
    elif damage == "between two renames":
        path.rename(stopped / "resume-next.pt")
    elif damage == "foreign":
        torch.save({"format": 2, "model": {}}, path)
    else:
        content = {"torn": path.read_bytes()[:-1000], "empty": b"", "text": b"no state"}
        path.write_bytes(content[damage])
    train(resumed_config(stopped))
    output = capsys.readouterr().out
    assert "resume.pt" in output
    assert "resuming from" in output
    assert "resume-previous.pt" in output
    assert_same_model(stopped, train(config()))


def test_without_any_good_state_the_sentence_names_both(stopped: Path):
    for name in ("resume.pt", "resume-previous.pt"):
        (stopped / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"resume\.pt is not a file .* and .*resume-previous\.pt is not a file"):
        load_resume(stopped, print)


def test_a_state_of_another_model_is_refused(stopped: Path, config: Make):
    other = train(config(hidden_size=16))
    shutil.copy(other / "resume.pt", stopped)
    with pytest.raises(InputError, match=r"resume\.pt has .* of size"):
        train(resumed_config(stopped))


def test_a_resumed_training_needs_its_first_weights_no_more(config: Make, tmp_path: Path, tiny_backbone: Callable):
    file = tmp_path / "resnet50.pth"
    torch.save(tiny_backbone().state_dict(), file)
    folder = train(config(weights=str(file), num_epochs=1))
    file.unlink()
    resumed = resumed_config(folder)
    resumed.num_epochs = 2
    train(resumed)
    assert epochs_saved(folder) == [1, 2]


def test_other_annotations_are_refused(stopped: Path, config: Make, drawn: Path, tmp_path: Path):
    shutil.copytree(drawn, tmp_path / "data")
    path = tmp_path / "data" / "annotations" / "captions_train.json"
    path.write_text(path.read_text().replace("a ", "one ", 1))
    resumed = resumed_config(stopped)
    resumed.data = tmp_path / "data"
    with pytest.raises(InputError, match=r"captions_train\.json is not the one that .* was begun with"):
        train(resumed)
    shutil.copy(drawn / "annotations" / "captions_train.json", path)
    path = path.with_name("captions_val.json")
    path.write_text(path.read_text().replace("a ", "one ", 1))
    with pytest.raises(InputError, match=r"captions_val\.json is not the one that .* was begun with"):
        train(resumed)


def test_a_data_set_that_is_not_where_it_was_is_asked_for(stopped: Path):
    resumed = dataclasses.replace(resumed_config(stopped), data=Path("no/set"))
    with pytest.raises(InputError, match=rf"^no/set, the data set of {stopped}, .* here; name it with --data"):
        train(resumed)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("image_size", 64),
        ("crop", "squash"),
        ("reduce_to", 100),
        ("weights", "pretrained"),
        ("num_layers", 2),
        ("vocab_threshold", 1),
        ("vocab_from_file", True),
        ("embed_size", 32),
        ("val_images", 3),
    ],
)
def test_what_a_training_cannot_change_is_refused(stopped: Path, option: str, value: object):
    resumed = resumed_config(stopped)
    setattr(resumed, option, value)
    with pytest.raises(InputError, match=f"is trained with {option} .*, which cannot change"):
        train(resumed)


@pytest.mark.parametrize("count", [1, 12])
def test_an_epoch_goes_on_without_images_that_became_unreadable(
    count: int,
    config: Make,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    data = Path(shutil.copytree(drawn, tmp_path / "scenes"))
    settings = config(data=data, skip_unreadable=True)
    with monkeypatch.context() as patch:
        at_step(patch, 22, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    folder = settings.models / settings.name
    assert load_resume(folder, print)["step"] == 10
    for path in sorted((data / "images" / "train").iterdir())[:count]:
        path.unlink()
    train(resumed_config(folder))
    assert "the rest of this epoch is drawn anew; some captions occur twice" in capsys.readouterr().out
    assert epochs_saved(folder) == [1, 2]


@pytest.mark.parametrize(
    ("batch_size", "state"), [(32, "new"), (8, "new"), (32, "older"), (32, "older than the description")]
)
def test_an_epoch_goes_on_with_another_batch_size(
    stopped: Path, batch_size: int, state: str, capsys: pytest.CaptureFixture
):
    saved = load_resume(stopped, print)
    step = saved["step"]
    if state == "older":  # of a version that saved no batch size
        del saved["batch_size"]
        torch.save(saved, stopped / "resume.pt")
    elif state == "older than the description":  # killed in between, or another process is faster
        description = read_description(stopped)
        description.training["batch_size"] = batch_size
        checkpoint.write_description(stopped, description)
    folder = train(dataclasses.replace(resumed_config(stopped), batch_size=batch_size))
    log = read_log(folder / "training_log.txt")
    assert log[13 + step, 1] == step * 16 // batch_size + 1  # after the first epoch's 13 steps
    assert "the rest of this epoch is drawn anew; some captions occur twice" in capsys.readouterr().out
    assert read_description(folder).epochs[-1]["epoch"] == 2


def test_a_log_that_was_deleted_goes_on_without_holes(stopped: Path):
    (stopped / "training_log.txt").unlink()
    train(resumed_config(stopped))
    assert set(read_log(stopped / "training_log.txt")[:, 0]) == {2}


@pytest.mark.parametrize("where", ["weights", "log"])
def test_a_full_disk_stops_with_one_sentence_and_leaves_what_was_good(
    config: Make, monkeypatch: pytest.MonkeyPatch, where: str
):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object) -> None:
        raise full

    settings = config(save_minutes=0)
    with monkeypatch.context() as patch:
        if where == "weights":
            at_step(patch, 15, lambda: patch.setattr(checkpoint.torch, "save", fail))
        else:
            at_step(patch, 15, lambda: patch.setattr(training.math, "exp", fail))  # as the line is made
        with pytest.raises(InputError, match="No space left on device"):
            train(settings)
    folder = settings.models / settings.name
    assert not list(folder.glob("*.new"))
    train(resumed_config(folder))
    assert_same_model(folder, train(config()))


def test_a_reader_of_the_output_that_has_gone_is_not_blamed_on_the_folder(
    config: Make, monkeypatch: pytest.MonkeyPatch
):
    def fail() -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    at_step(monkeypatch, 3, fail)
    with pytest.raises(BrokenPipeError):  # which `run_command` ends quietly
        train(config())


def test_a_folder_that_cannot_be_written_is_found_out_before_the_images_are_read(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(folder: Path) -> None:
        assert folder == tmp_path
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files, "_try_to_write", refuse)
    monkeypatch.setattr(training, "check_images", lambda *_: pytest.fail("the images were read"))
    with pytest.raises(InputError, match=rf"^{tmp_path} cannot be written to \(Permission denied\)"):
        train(config(fine_tune=1, models=tmp_path / "models"))


def test_a_folder_that_cannot_be_written_is_a_sentence(config: Make, tmp_path: Path):
    folder = train(config(num_epochs=1))
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").mkdir()  # as root, who may write anywhere, would not notice that the folder is read-only
    with pytest.raises(InputError, match=r"small cannot be written \(.*\); make it writable, or use a copy"):
        train(dataclasses.replace(resumed_config(folder), num_epochs=2))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file.* cannot be .*(written|created|made)"):
        train(config(cache=tmp_path / "file"))
    with pytest.raises(InputError, match=r"small cannot be written \(.*\); make it writable, or choose another"):
        train(config(models=tmp_path / "file"))


# Numbers go wrong


def test_a_loss_that_is_no_number_stops_with_step_and_rate(config: Make, monkeypatch: pytest.MonkeyPatch):
    settings = config()
    forward = training.CaptioningModel.forward
    with monkeypatch.context() as patch:
        at_step(
            patch,
            15,
            lambda: patch.setattr(
                training.CaptioningModel, "forward", lambda *a: tuple(x * float("nan") for x in forward(*a))
            ),
        )
        with pytest.raises(InputError, match=r"nan at step 3 of epoch 2 .*rate of \d.*--resume.*--learning-rate"):
            train(settings)
    folder = settings.models / settings.name
    train(resumed_config(folder))
    assert_same_model(folder, train(config()))


def test_weights_that_are_no_numbers_are_never_saved(config: Make, monkeypatch: pytest.MonkeyPatch):
    settings = config()
    with monkeypatch.context() as patch:
        step = torch.optim.AdamW.step
        at_step(patch, 15, lambda: patch.setattr(torch.optim.AdamW, "step", spoil))

        def spoil(optimizer: torch.optim.AdamW, *arguments: object) -> None:
            step(optimizer, *arguments)
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

        with pytest.raises(InputError, match="loss is nan at step 4 of epoch 2"):
            train(settings)
    folder = settings.models / settings.name
    assert all(x.isfinite().all() for x in load_resume(folder, print)["encoder"].values())
    train(resumed_config(folder))
    assert_same_model(folder, train(config()))


def test_weights_that_are_no_numbers_are_noticed_before_the_save_within_an_epoch(
    config: Make, monkeypatch: pytest.MonkeyPatch
):
    settings, step = config(save_minutes=0), torch.optim.AdamW.step

    def spoil(optimizer: torch.optim.AdamW, *arguments: object) -> None:
        step(optimizer, *arguments)
        optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    with monkeypatch.context() as patch:
        at_step(patch, 15, lambda: patch.setattr(torch.optim.AdamW, "step", spoil))
        with pytest.raises(InputError, match="a weight is not a finite number after step 3 of epoch 2; resume from"):
            train(settings)
    folder = settings.models / settings.name
    assert load_resume(folder, print)["step"] == 2
    train(resumed_config(folder))
    assert_same_model(folder, train(config()))


def test_too_little_gpu_memory_names_the_batch_size(config: Make, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.CaptioningModel, "forward", fail)
    with pytest.raises(InputError, match=r"batch of 16 captions; use a smaller --batch-size"):
        train(config())
    with monkeypatch.context() as patch:
        patch.setattr(training, "stored_features", fail)
        with pytest.raises(InputError, match=r"features with resnet50; use a smaller --image-size or another"):
            train(config())
    monkeypatch.setattr(EncoderCNN, "features", fail)
    with pytest.raises(InputError, match=r"features with resnet50; use a smaller --image-size or another"):
        train(config(fine_tune=1))


def test_too_little_gpu_memory_in_validation_loses_no_step(config: Make, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    undisturbed = train(config(num_epochs=1, name="undisturbed"))
    settings = config(num_epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "validate", fail)
        with pytest.raises(InputError, match=r"memory to validate; .* resume with `python train\.py --resume "):
            train(settings)
    folder = settings.models / settings.name
    assert load_resume(folder, print)["step"] > 0
    train(resumed_config(folder))
    assert_same_model(folder, undisturbed)


# Photos that cannot be read


@pytest.mark.parametrize("fine_tune", [0, 5])
def test_unreadable_images_stop_training_before_its_first_epoch_or_are_left_out(
    config: Make, eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fine_tune: int
):
    shutil.copytree(eight, tmp_path / "data")
    images = tmp_path / "data" / "images" / "train"
    (images / "2.png").write_bytes(b"")
    (images / "5.png").write_bytes((images / "5.png").read_bytes()[:100])
    fields = {"data": tmp_path / "data", "fine_tune": fine_tune, "num_epochs": 1, "batch_size": 300}
    with monkeypatch.context() as patch:
        at_step(patch, 0, lambda: pytest.fail("it has begun"))
        with pytest.raises(InputError, match=r"2 .*images cannot be read \(--skip-unreadable .*2\.png.*5\.png"):
            train(config(**fields))
    (images / "7.png").unlink()
    folder = train(config(**fields, skip_unreadable=True))
    description = read_description(folder)
    assert description.data["train_photos"] == 5
    assert description.data["train_captions"] == 500


# Killed at random moments


def train_or_go_on(config: TrainingConfig) -> None:
    """What the killed process runs: begins the training, or goes on where its folder is a model's."""
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    torchvision.models.resnet50 = build_seeded_tiny
    folder = config.models / config.name
    train(resumed_config(folder) if (folder / "captioner.json").exists() else config)


def test_a_run_killed_twenty_times_ends_as_one_never_killed(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")  # forks from a process that has imported all and run nothing
    context.set_forkserver_preload(["train"])
    config = small(
        weights="pretrained",
        image_size=32,
        num_epochs=2,
        dropout=0.3,
        save_minutes=0,
        cache=tmp_path / "cache",
    )

    def start(config: TrainingConfig) -> multiprocessing.Process:
        process = context.Process(target=train_or_go_on, args=(config,))
        process.start()
        return process

    first = start(config)  # starts the server too, so its time says nothing
    first.join()
    assert first.exitcode == 0
    undisturbed = config.models / config.name
    begun = time.monotonic()
    start(dataclasses.replace(config, name="timed")).join()
    takes = time.monotonic() - begun

    rng = random.Random(0)
    killed = dataclasses.replace(config, name="killed", cache=tmp_path / "other")
    kills = ended = 0
    while kills < 20 or not ended:
        begun, process = time.monotonic(), start(killed)
        process.join(rng.uniform(0, 0.7 * takes) if kills < 20 else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            assert_same_model(killed.models / killed.name, undisturbed)
            ended += 1
            takes = min(takes, time.monotonic() - begun)
            if kills < 20:  # it came to its end between the kills: once more from the beginning
                shutil.rmtree(killed.models / killed.name)
                shutil.rmtree(killed.cache)
                ended = 0
    assert kills == 20


@pytest.mark.parametrize("fields", [{"num_epochs": 3}, {"num_epochs": 3, "learning_rate": 2e-4}], ids=str)
def test_new_options_of_a_resumed_run_outlive_its_sudden_end(
    config: Make, monkeypatch: pytest.MonkeyPatch, fields: dict
):
    folder = train(config(num_epochs=1))
    with monkeypatch.context() as patch:

        class Killed(BaseException):
            pass

        def kill() -> None:
            raise Killed

        at_step(patch, 14, kill)
        with pytest.raises(Killed):
            train(changed(resumed_config(folder), fields))
    train(resumed_config(folder))
    assert len(read_description(folder).epochs) == 3
    assert {name: read_description(folder).training[name] for name in fields} == fields


def changed(config: TrainingConfig, fields: dict) -> TrainingConfig:
    for name, value in fields.items():
        setattr(config, name, value)
    return config


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_hangup_that_nohup_ignores_stays_ignored():
    assert signal.SIGHUP in ending_signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ending_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_objective_needs_the_weights_of_the_best_epoch(config: Make):
    folder = train(config(num_epochs=2))
    best = read_description(folder).best_epoch
    for path in folder.glob(f"*coder-{best}.*"):
        path.unlink()
    resumed = resumed_config(folder)
    resumed.objective, resumed.num_epochs = "cider", 1
    with pytest.raises(InputError, match=rf"has no weights of epoch {best}; it has those of {3 - best}"):
        train(resumed)
