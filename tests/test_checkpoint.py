import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import KINDS, build_kind, write_kind

import model
from captioning import checkpoint
from captioning.captioner import Captioner
from captioning.checkpoint import (
    default_model,
    epochs_saved,
    load_model,
    load_resume,
    read_description,
    save_resume,
    write_description,
)
from captioning.errors import InputError
from captioning.files import require_writable, write_file
from captioning.hub import find_model
from captioning.training import train
from captioning.weights import read_state_dict
from train import resumed_config
from vocabulary import SPECIAL_WORDS, Vocabulary


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained model's folder that a test may spoil."""
    for name in ("captioner.json", "encoder-1.pkl", "decoder-1.pkl"):
        (tmp_path / "model").mkdir(exist_ok=True)
        shutil.copy(trained / name, tmp_path / "model" / name)
    return tmp_path / "model"


def edit_description(folder: Path, **changes: object) -> None:
    path = folder / "captioner.json"
    content = json.loads(path.read_text())
    for where, value in changes.items():
        *parents, last = where.split("__")
        part = content
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(content))


def test_the_description_says_what_it_takes_to_build_and_repeat_the_model(trained: Path, drawn: Path):
    description = read_description(trained)
    assert description.architecture.decoder == "lstm"
    assert description.preprocessing.image_size == 64
    assert description.vocabulary[:3] == ["<start>", "<end>", "<unk>"]
    assert description.training["seed"] == 0
    assert {"python", "torch", "torchvision", "numpy", "pillow", "git_revision"} <= set(description.environment)
    assert len(description.data["train_sha256"]) == 64
    assert str(drawn.parent) not in json.dumps(description.data)


def test_without_git_no_revision_is_known(monkeypatch: pytest.MonkeyPatch):
    assert checkpoint.environment()["git_revision"] != ""
    monkeypatch.setenv("PATH", "")
    assert checkpoint.environment()["git_revision"] is None


def test_a_description_is_read_as_it_was_written(trained: Path, tmp_path: Path):
    description = read_description(trained)
    write_description(tmp_path, description)
    assert read_description(tmp_path) == description
    assert [path.name for path in tmp_path.iterdir()] == ["captioner.json"]


def test_a_model_is_read_as_it_was_saved(trained: Path):
    for epoch in (1, 2):
        encoder, decoder, vocab, _ = load_model(trained, epoch)
        assert not encoder.training
        assert not decoder.training
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            state = read_state_dict(trained / f"{name}-{epoch}.pkl")
            if name == "encoder":
                state |= read_state_dict(trained / "backbone.pkl")
            assert set(state) == set(module.state_dict())
            assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
        assert decoder.linear.out_features == len(vocab)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_any_kind_is_read_as_it_was_written(kind: str, tiny_backbone: Callable, tmp_path: Path):
    networks = build_kind(kind, 30)
    write_kind(tmp_path, kind, *networks, [*SPECIAL_WORDS, *(f"word{i}" for i in range(27))])
    for written, read in zip(networks, load_model(tmp_path), strict=False):
        state = written.state_dict()
        assert state.keys() == read.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in read.state_dict().items())


def test_the_best_epoch_is_read_unless_another_is_asked_for(trained: Path):
    best = read_description(trained).best_epoch
    state = load_model(trained)[1].state_dict()
    assert all(torch.equal(state[k], v) for k, v in read_state_dict(trained / f"decoder-{best}.pkl").items())


def test_a_missing_best_epoch_is_warned_of(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    best = read_description(folder).best_epoch
    (folder / f"decoder-{best}.pkl").unlink()
    assert Captioner.load(folder).epoch == 3 - best
    warning = f"warning: {folder} lacks the weights of its best epoch, {best}; the last one is used.\n"
    assert capsys.readouterr().err == warning


def test_a_published_backbone_is_named_and_not_copied(
    folder: Path, tiny_backbone: Callable, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(7)
    published = tiny_backbone()
    monkeypatch.setattr(
        torchvision.models, "resnet50", lambda weights=None, **_: published if weights else tiny_backbone()
    )
    description = read_description(folder)
    description.architecture.backbone_weights = "published"
    encoder = model.EncoderCNN(16)
    decoder = model.DECODERS["lstm"](16, 32, len(description.vocabulary))
    checkpoint.save_epoch(folder, 1, encoder, decoder, description)
    write_description(folder, description)
    assert set(read_state_dict(folder / "encoder-1.pkl")) == {"embed.weight", "embed.bias"}
    loaded = load_model(folder)[0]
    assert torch.equal(loaded.embed.weight, encoder.embed.weight)
    assert torch.equal(loaded.resnet[0].weight, published.conv1.weight)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("coco", r"; `python train\.py --config configs/coco\.toml` trains it\."),
        ("scenes", r"; `make demo` trains it\."),
        ("mine", r"; `python train\.py` trains one, and `make demo` one of the sample data set\."),
        ("..", r"; `python train\.py` trains one"),
        ("a\0b", r"; `python train\.py` trains one"),
    ],
)
def test_of_a_missing_model_it_says_how_to_get_it(
    tmp_path: Path, name: str, advice: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # without the models of `make demo`
    with pytest.raises(InputError, match=advice):
        read_description(tmp_path / name)


def test_the_default_is_the_model_trained_last_on_the_kind_of_picture(tmp_path: Path, trained: Path):
    with pytest.raises(InputError, match="make demo"):
        default_model(tmp_path)
    description = read_description(trained)
    for name, time, data in (
        ("a", 2, "coco"),
        ("b", 3, "coco"),
        ("c", 1, "flickr8k"),
        ("d", 4, "scenes"),
        ("photos", 9, "flickr30k"),
    ):
        (tmp_path / name).mkdir()
        description.data["folder"] = data
        write_description(tmp_path / name, description)
        os.utime(tmp_path / name / "captioner.json", (time, time))
    assert default_model(tmp_path) == tmp_path / "b"
    assert default_model(tmp_path, "flickr8k") == tmp_path / "c"
    assert default_model(tmp_path, "scenes") == tmp_path / "d"
    assert default_model(tmp_path, "other") == tmp_path / "b"
    assert default_model(tmp_path, "flickr30k") == tmp_path / "photos"
    for name in "abc":
        shutil.rmtree(tmp_path / name)
    assert default_model(tmp_path) == tmp_path / "photos"
    shutil.rmtree(tmp_path / "photos")
    assert default_model(tmp_path) == tmp_path / "d"
    (tmp_path / "e").mkdir()  # a run in its first epoch
    write_description(tmp_path / "e", description)
    assert default_model(tmp_path) == tmp_path / "e"
    for part in ("encoder", "decoder"):
        (tmp_path / "d" / f"{part}-1.pkl").touch()
    assert default_model(tmp_path) == tmp_path / "d"


# Files


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "file"
    write_file(path, lambda file: file.write(b"first"))

    def fail(file: object) -> None:
        file.write(b"sec")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"file cannot be written \(No space left on device\)"):
        write_file(path, fail)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def read_only(trained: Path) -> Iterator[Path]:
    """A copy of the trained model's folder that its user may read and not write."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        copy = shutil.copytree(trained, Path(parent) / "model")
        copy.chmod(0o555)
        yield copy
        copy.chmod(0o755)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere; in this context it is another user."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_read_only_folder_is_refused_before_the_work(read_only: Path, monkeypatch: pytest.MonkeyPatch):
    config = resumed_config(read_only)
    monkeypatch.setattr("captioning.training.CaptionDataset", None)  # reading the data comes after
    with unprivileged():
        for act in (
            lambda: require_writable(read_only),
            lambda: write_file(read_only / "new", lambda file: None),
            lambda: write_file(read_only / "captioner.json", lambda file: None),
            lambda: train(config),
        ):
            with pytest.raises(
                InputError, match=r"model(/new|/captioner\.json)? cannot be written .*Permission denied"
            ):
                act()
        assert load_model(read_only)


def test_what_is_left_of_a_failed_write_cannot_hide_the_failure(tmp_path: Path):
    (tmp_path / "file.new").mkdir()
    with pytest.raises(InputError, match=r"file cannot be written \(Is a directory\)"):
        write_file(tmp_path / "file", lambda file: None)


# The state to resume from


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 3}, "is not the state of a training run"),
        ({"more": 1}, "is not the state of a training run"),
        ({"epoch": "2"}, "is not the state of a training run"),
        ({"optimizer": None}, "is not the state of a training run"),
        ({"epoch": -5}, "is not the state of a training run"),
        ({"epoch": 9}, "is not the state of a training run"),
        ({"first_epoch": 99}, "is not the state of a training run"),
        ({"step": -3}, "is not the state of a training run"),
        ({"log_bytes": -1}, "is not the state of a training run"),
        ({"best_epoch": 99}, "is not the state of a training run"),
        ({"best_epoch": -7}, "is not the state of a training run"),
        ({"best_epoch": None}, "is not the state of a training run"),
        ({"epochs": [{"a": 1}, {"a": 1}]}, "is not the state of a training run"),
        ({"objective": "xyz"}, "is not the state of a training run"),
        ({"epoch_tokens": 10**400}, "is not the state of a training run"),
        ({"epoch_loss": float("nan")}, "is not the state of a training run"),
        ({"epochs": [{"CIDEr": float("nan")}, {"CIDEr": 1.0}]}, "is not the state of a training run"),
        ({"epochs": [{"CIDEr": 1.0, "x": torch.zeros(2)}, {"CIDEr": 1.0}]}, "is not the state of a training run"),
        ({"encoder": {"embed.weight": 1}}, "holds no state dict"),
        ({"decoder": {"embed.weight": torch.zeros(1).expand(1 << 20)}}, "holds no state dict"),
        ({"optimizer": {"state": complex(1)}}, "__builtin__.complex"),
    ],
    ids=str,
)
def test_a_damaged_state_is_named_and_the_one_before_it_resumed(
    changes: dict, problem: str, trained: Path, folder: Path
):
    shutil.copy(trained / "resume.pt", folder)
    state = load_resume(folder, print)
    save_resume(folder, {**state, "step": 7})
    save_resume(folder, {**state, **changes})
    messages: list[str] = []
    assert load_resume(folder, messages.append)["step"] == 7
    [sentence] = messages
    assert problem in sentence
    assert sentence.startswith(f"{folder}/resume.pt ")
    assert sentence.endswith(f"; resuming from {folder}/resume-previous.pt")
    save_resume(folder, {**state, **changes})
    with pytest.raises(
        InputError, match=r"cannot be resumed: .*resume\.pt .* and .*resume-previous\.pt .*; start a new"
    ):
        load_resume(folder, print)


# A model's folder that is not whole


@pytest.mark.parametrize("name", ["captioner.json", "encoder-1.pkl", "decoder-1.pkl"])
def test_a_folder_that_lacks_a_file_is_refused(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(InputError, match=r"model.*captioner\.json|model is incomplete.*encoder-<i>\.pkl"):
        load_model(folder)


def test_an_image_size_that_the_backbone_cannot_take_is_named(folder: Path):
    about = json.loads((folder / "captioner.json").read_text())
    about["architecture"]["backbone"] = "vit_base_patch16_clip_224.openai"
    about["preprocessing"]["image_size"] = 256
    (folder / "captioner.json").write_text(json.dumps(about))
    with pytest.raises(
        InputError, match=r"captioner\.json does not describe a model: .* of 224 pixels only, not of 256"
    ):
        load_model(folder)


def test_an_epoch_that_was_not_saved(folder: Path):
    with pytest.raises(InputError, match=r"has no weights of epoch 9; it has those of 1\.$"):
        load_model(folder, 9)


@pytest.mark.parametrize("name", ["captioner.json", "encoder-1.pkl"])
def test_a_file_of_a_model_is_not_its_folder(folder: Path, name: str):
    with pytest.raises(InputError, match=rf"{name} is a file of a model; name its folder, {folder}\.$"):
        load_model(folder / name)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://huggingface.co/some-one/a.model", r"^some-one/a\.model is the name of .*; write it without"),
        ("https://huggingface.co/some-one/a.model/tree/main", r"^some-one/a\.model is the name"),
        ("huggingface.co/some-one/a.model", r"^some-one/a\.model is the name"),
        ("hf://some-one/a.model", r"^some-one/a\.model is the name"),
        ("https://example.org/model", r"^https://example\.org/model is a web address, and nothing is fetched"),
    ],
)
def test_an_address_is_not_a_folder(address: str, message: str):
    with pytest.raises(InputError, match=message):
        load_model(find_model(address))


def test_a_description_with_a_byte_order_mark_is_read(folder: Path):
    expected, path = read_description(folder), folder / "captioner.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_description(folder) == expected


@pytest.mark.parametrize(
    ("content", "message"), [(" \n", r"captioner\.json is empty"), ("{", r"describe a model: Invalid JSON: EOF")]
)
def test_a_description_that_was_lost(folder: Path, content: str, message: str):
    (folder / "captioner.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_only_whole_epochs_count(folder: Path):
    for name in ("encoder-2.pkl", "encoder-x.pkl", "encoder-².pkl", "decoder-3.pkl"):
        (folder / name).write_bytes(b"")
    assert epochs_saved(folder) == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture__hidden_size": 64},
        {"architecture__embed_size": 8},
        {"architecture__num_layers": 2},
        {"architecture__decoder": "attention"},
        {"vocabulary": ["<start>", "<end>", "<unk>", "dog"]},
    ],
    ids=str,
)
def test_weights_that_do_not_go_with_the_description_are_named(folder: Path, changes: dict):
    edit_description(folder, **changes)
    with pytest.raises(InputError, match=r"(en|de)coder-1\.pkl (has|lacks)"):
        load_model(folder)


def test_a_state_that_may_not_be_read_is_not_taken_for_a_damaged_one(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copy(trained / "resume.pt", folder)
    save_resume(folder, load_resume(folder, print))
    real = Path.open

    def refuse(path: Path, *arguments: object) -> object:
        if path.name == "resume.pt":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"resume\.pt"):
        load_resume(folder, print)


@pytest.mark.parametrize("read", [read_description, lambda folder: Vocabulary.load(folder / "vocab.json")])
def test_a_folder_that_may_not_be_entered_is_not_taken_for_an_empty_one(
    read: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="cannot be read \\(Permission denied\\); change its permissions"):
        read(tmp_path)
