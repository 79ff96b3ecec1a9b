import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import run_script

import train as train_module
from captioning import training
from captioning.checkpoint import epochs_saved, read_description
from captioning.config import load_config, resumed_config
from captioning.errors import InputError
from captioning.hub import find_model
from captioning.training import TrainingConfig, read_log, train
from model import DECODERS

ROOT = Path(__file__).parents[1]
Make = Callable[..., TrainingConfig]


# Options


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"seed": 99999999999999999999}, "seed must be at most 18446744073709551615, not 99999999999999999999"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"name": ".."}, 'name must be a name without folders, not ".."'),
        ({"name": "."}, 'name must be a name without folders, not "."'),
        ({"name": "a/b"}, 'name must be a name without folders, not "a/b"'),
        ({"name": "a\0b"}, "name must be a name without folders"),
        ({"data": Path("/"), "name": ""}, 'name must be a name without folders, not ""'),
        ({"log_file": ".."}, 'log_file must be a name without folders, not ".."'),
        ({"log_file": "resume.pt"}, "log_file must not be named as a model's own files are: resume.pt"),
        ({"log_file": "tensorboard"}, "log_file must not be named as a model's own files are: tensorboard"),
        ({"batch_size": 2**63}, "batch_size must be at most 9223372036854775807, not 9223372036854775808"),
        ({"val_images": 2**63}, "val_images must be at most 9223372036854775807"),
        ({"log_file": "decoder-1.pkl.new"}, "log_file must not be named as a model's own files are"),
        ({"log_file": "captioner.json"}, "log_file must not be named as a model's own files are"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"dropout": math.nan}, "dropout must be at least 0, not nan"),
        ({"attention_penalty": -1.0}, "attention_penalty must be at least 0, not -1.0"),
        ({"attention_penalty": math.inf}, "attention_penalty must be at most 1000000.0, not inf"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0, not nan"),
        ({"learning_rate": 1e30}, "learning_rate must be at most 10, not 1e+30"),
        ({"backbone_learning_rate": math.inf}, "learning_rate must be at most 10, not inf"),
        ({"clip_norm": math.inf}, "clip_norm must be at most 1000000000.0, not inf"),
        ({"workers": 10**20}, "workers must be at most 1024"),
        ({"precision": "fp16"}, "precision: Input should be 'auto', 'bf16' or 'fp32'"),
        ({"objective": "CIDER"}, "objective: Input should be 'cross-entropy' or 'cider'"),
        ({"decoder": "gru"}, "decoder: Input should be"),
        ({"batch_size": "many"}, "batch_size: Input should be a valid integer"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_used_is_a_sentence(small: Make, fields: dict, sentence: str):
    with pytest.raises(InputError, match=re.escape(sentence)):
        small(**fields)
    config = small()
    for name, value in fields.items():
        setattr(config, name, value)
    if config.name:  # else it is the data set's
        with pytest.raises(InputError, match=re.escape(sentence)):
            train(config)


def test_values_of_another_type_are_converted(small: Make, drawn: Path):
    config = small(data=str(drawn), models="models", batch_size="8", learning_rate=1)
    assert (config.data, config.models, config.batch_size, config.learning_rate) == (drawn, Path("models"), 8, 1.0)


def test_a_model_that_cannot_be_resumed_is_not_told_to_be(trained: Path, tmp_path: Path, run_here: Callable):
    folder = shutil.copytree(trained, tmp_path / "two words")
    command = ("train.py", train_module.main, "--data", tmp_path, "--models", tmp_path, "--name", "two words")
    assert "--resume '" in run_here(*command)[2]
    for name in ("resume.pt", "resume-previous.pt"):
        (folder / name).unlink()
    assert "--resume" not in run_here(*command)[2]


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path: Path, run_here: Callable, small: Make):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert small(cache="~/cache").cache == tmp_path / "cache"
    errors = run_here("train.py", train_module.main, "--data=~/none", "--name", "x")[2]
    assert f"{tmp_path}/none" in errors
    assert find_model("~/mine") == tmp_path / "mine"


def test_an_equals_sign_in_a_folder_s_name(trained: Path, tmp_path: Path):
    folder = shutil.copytree(trained, tmp_path / "lr=0.001")
    config, _ = train_module.parse_options(["--resume", str(folder)])
    assert config.resume == folder


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_can_be_used(recipe: Path):
    config = load_config(recipe, num_epochs=77)
    data = "coco" if recipe.stem in DECODERS else recipe.stem
    assert config.data == Path("data") / data
    assert (config.name, config.num_epochs) == (recipe.stem, 77)
    assert config.decoder == recipe.stem or recipe.stem not in DECODERS


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("overwrite = true", 'sets "overwrite", which is not a training option; give --overwrite on the command line'),
        ("batch_sise = 3", 'sets "batch_sise", which is not a training option'),
        ("[model]\nhidden_size = 3", 'sets "model", which is not a training option'),
        ('batch_size = "many"', "batch_size: Input should be a valid integer"),
        ("batch_size = 0", "batch_size must be at least 1, not 0"),
        ('decoder = "bert"', "decoder: Input should be"),
        ("batch_size = = 3", "is not a TOML file"),
        ("name = '\udcff'", "line 1, is not UTF-8 text"),
        (None, "cannot be read"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_a_sentence(tmp_path: Path, text: str | None, sentence: str):
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    for read in (lambda: load_config(path), lambda: train_module.parse_options(["--config", str(path)])):
        with pytest.raises(InputError, match=rf"recipe\.toml.*{re.escape(sentence)}"):
            read()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str):
    (tmp_path / "recipe.toml").write_text('name = "café"\r\nbatch_size = 24\r\n', encoding=encoding)
    config = load_config(tmp_path / "recipe.toml")
    assert (config.name, config.batch_size) == ("café", 24)


def test_options_on_the_command_line_win_over_the_recipe(tmp_path: Path):
    (tmp_path / "recipe.toml").write_text('name = "mine"\nbatch_size = 24\ntie_weights = true\nembed_size = 512\n')
    arguments = [f"--config={tmp_path / 'recipe.toml'}", "--batch-size", "7", "--objective", "cross-entropy"]
    config, _ = train_module.parse_options(arguments)
    assert (config.name, config.batch_size, config.tie_weights, config.hidden_size) == ("mine", 7, True, 512)
    config, _ = train_module.parse_options([*arguments, "--no-tie-weights"])
    assert not config.tie_weights
    with pytest.raises(InputError, match="--config starts a run and --resume continues one"):
        train_module.parse_options([*arguments, "--resume", "models/mine"])


def test_saving_never_within_an_epoch_can_be_resumed(trained: Path, tmp_path: Path):
    assert load_config(ROOT / "configs" / "scenes.toml", save_minutes=math.inf).save_minutes < math.inf
    folder = shutil.copytree(trained, tmp_path / "never")
    path = folder / "captioner.json"
    content = json.loads(path.read_text())
    content["training"]["save_minutes"] = None  # as an earlier version wrote an infinity
    path.write_text(json.dumps(content))
    assert resumed_config(folder).save_minutes > 1000


def test_every_option_is_in_a_group_of_the_help(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        train_module.parse_options(["--help"])
    text = capsys.readouterr().out
    for group in ("data", "model", "optimization", "checkpoints", "devices"):
        assert f" {group} options " in text
    for field in dataclasses.fields(TrainingConfig):
        assert re.search(rf"--{field.name.replace('_', '-')}[ ,]", text)
    assert not re.search(r"\.py`|def |Training\.forward|features\.py", text.split("options", 1)[1])


# The command line


@pytest.mark.slow
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
    done = run_script("train.py", *options, "--num-epochs", 1, "--batch-size", 400, "--workers", 0, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 1: train loss" in done.stdout
    assert re.fullmatch(r"warning: validation images such as .*\n", done.stderr)  # no progress bar into a pipe
    assert epochs_saved(tmp_path / "models" / "eight") == [1]
    done = run_script("train.py", "--resume=models/eight", "--num-epochs", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert epochs_saved(tmp_path / "models" / "eight") == [1, 2]
    assert set(read_log(tmp_path / "models" / "eight" / "training_log.txt")[:, 0]) == {1, 2}


def test_the_command_deletes_a_model_only_when_asked_to(
    small: Make, tmp_path: Path, tiny_backbone: Callable, monkeypatch: pytest.MonkeyPatch
):
    folder = train(small(models=tmp_path, num_epochs=2))
    started: list[TrainingConfig] = []
    monkeypatch.setattr(train_module, "train", lambda config, overwrite: started.append(config))
    options = ["train.py", "--models", str(tmp_path), "--name", "small"]
    monkeypatch.setattr(sys, "argv", options)
    with pytest.raises(InputError, match=r"small holds a model already; .*--resume .*another --name.*--overwrite"):
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


def test_a_model_that_another_run_wrote_during_the_preparation_is_not_deleted(
    small: Make, tmp_path: Path, tiny_backbone: Callable
):
    folder = train(small(models=tmp_path, num_epochs=1))
    files = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    other = small(models=tmp_path, num_epochs=1, seed=5)
    with pytest.raises(InputError, match=r"small holds a model already; .*another --name.*--overwrite") as caught:
        train(other, overwrite=False)  # `main` had found nothing
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == files
    train(other)  # the lock is free, although the error and its frames are kept
    assert (read_description(folder).training["seed"], caught.type) == (5, InputError)


def test_weights_without_a_description_are_not_deleted_either(small: Make, tmp_path: Path, run_here: Callable):
    (tmp_path / "small").mkdir()
    for name in ("encoder-3.pkl", "decoder-3.pkl"):
        (tmp_path / "small" / name).write_text("precious")
    done = run_here("train.py", train_module.main, "--models", tmp_path, "--name", "small", "--weights", "random")
    assert (done[0], "small holds a model already" in done[2]) == (2, True)
    assert len(list((tmp_path / "small").iterdir())) == 2


@pytest.mark.parametrize("name", ["backbone.safetensors", "resume.pt", "training_log.txt", "tensorboard"])
def test_nothing_of_another_origin_is_deleted(tmp_path: Path, run_here: Callable, name: str):
    (path := tmp_path / "small" / name).parent.mkdir()
    path.mkdir() if name == "tensorboard" else path.write_text("precious")
    done = run_here("train.py", train_module.main, "--models", tmp_path, "--name", "small", "--weights", "random")
    assert (done[0], f"small holds {name} already; choose another --name" in done[2]) == (2, True)
    assert path.exists()


def test_an_option_that_is_on_already_can_be_named(tmp_path: Path):
    (tmp_path / "r.toml").write_text("tie_weights = true\nembed_size = 256\nhidden_size = 256")
    recipe = ["--config", str(tmp_path / "r.toml")]
    assert train_module.parse_options([*recipe, "--tie-weights"])[0].tie_weights
    assert not train_module.parse_options([*recipe, "--no-tie-weights"])[0].tie_weights


def test_the_home_of_an_unknown_user_is_a_folder_that_does_not_exist(tmp_path: Path, run_here: Callable):
    done = run_here("train.py", train_module.main, "--data", "~nobody-of-this-name/coco", "--weights", "random")
    assert (done[0], done[2].startswith("error: ~nobody-of-this-name/coco does not exist")) == (2, True)


def test_the_precision_is_the_run_s_own_and_not_the_launcher_s(small: Make, monkeypatch: pytest.MonkeyPatch):
    used = []

    def accelerator(**options: object) -> Accelerator:
        used.append(Accelerator(**options))
        return used[-1]

    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` sets it
    monkeypatch.setattr(training, "Accelerator", accelerator)
    train(small())
    assert used[0].mixed_precision == "no"


def test_a_training_goes_on_with_its_own_options_or_not_at_all(small: Make):
    with pytest.raises(TypeError, match="resume"):
        TrainingConfig(resume=small().models)


def test_a_home_folder_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert TrainingConfig(weights="~/w.pth", models=Path("~/m")).weights == "/home/ann/w.pth"


def test_a_wrong_objective_is_not_blamed_on_the_model_s_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"^objective is 'CIDEr', but it has to be one of cross-entropy, cider\.$"):
        resumed_config(tmp_path, "CIDEr")


@pytest.mark.slow
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path):
    done = run_script("train.py", "--data", "nowhere", "--weights", "random", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: nowhere does not exist; .*\n", done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--grid-size", "3"], "--grid-size has no effect on a decoder that does not attend"),
        (["--attention-penalty=5"], "--attention-penalty has no effect on this decoder"),
        (["--vocab-file", "my.json"], "--vocab-file has no effect on a vocabulary of the captions; add --vocab-from"),
        (
            ["--vocab-threshold", "9", "--vocab-from-file"],
            "--vocab-threshold has no effect on a vocabulary from a file",
        ),
        (["--views", "4", "--fine-tune", "2"], "--views has no effect on a backbone that is fine-tuned"),
        (
            ["--backbone-learning-rate", "1e-4"],
            "--backbone-learning-rate has no effect on a frozen backbone; add --fin",
        ),
    ],
    ids=str,
)
def test_an_option_without_effect_is_refused(options: list[str], sentence: str):
    with pytest.raises(InputError, match=sentence):
        train_module.parse_options(options)


@pytest.mark.parametrize(
    "options",
    [
        ["--grid-size", "3", "--decoder", "attention"],
        ["--config", "configs/photos.toml", "--decoder", "lstm"],
        ["--config", "configs/photos.toml", "--fine-tune", "2", "--backbone-learning-rate", "1e-5"],
        ["--vocab-file", "my.json", "--vocab-from-file"],
    ],
    ids=str,
)
def test_an_option_that_has_an_effect_beside_the_others_is_not(options: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(train_module.__file__).parent)
    train_module.parse_options(options)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("grid_size = 2", ["--decoder", "attention"]),
        ('weights = "random"\nviews = 3', ["--fine-tune", "0"]),
        ("tie_weights = true\nembed_size = 64", ["--hidden-size", "64"]),
        ("tie_weights = true\nembed_size = 64", ["--decoder=transformer"]),
    ],
)
def test_the_command_line_may_complete_a_recipe(
    recipe: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "r.toml").write_text(recipe)
    with pytest.raises(InputError, match=r"^.*r\.toml.*(no effect|needs equal)"):
        train_module.parse_options(["--config", str(tmp_path / "r.toml")])
    train_module.parse_options(["--config", str(tmp_path / "r.toml"), *options])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ('vocab_file = "mine.json"', "--vocab-file has no effect on a vocabulary of the captions"),
        ("grid_size = 7", "--grid-size has no effect on a decoder that does not attend"),
        ("batch-size = 64", r'sets "batch-size", which is not a training option; write batch_size'),
        ("views = true", "sets views to true, which is not a valid value"),
        ('models = ""', 'models is empty; name a folder or a file, such as "models"'),
    ],
)
def test_a_recipe_is_checked_as_the_command_line_is(recipe: str, sentence: str, tmp_path: Path):
    (tmp_path / "r.toml").write_text(recipe)
    with pytest.raises(InputError, match=sentence):
        train_module.parse_options(["--config", str(tmp_path / "r.toml")])


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        ("views = 3", ["--fine-tune", "1"], "--views has no effect on a backbone that is fine-tuned"),
        ('decoder = "attention"\ngrid_size = 5', ["--decoder=lstm"], "--grid-size has no effect on a decoder"),
        ("views = 3", ["--views", "1"], ""),
    ],
)
def test_what_the_command_line_takes_the_effect_from_is_told(
    recipe: str, options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = tmp_path / "r.toml"
    path.write_text(recipe)
    train_module.parse_options(["--config", str(path), *options])
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {path}: {sentence}" if sentence else "")
    assert told.count("\n") == bool(sentence)


@pytest.mark.parametrize(
    "option",
    ["--decoder=lstm", "--embed-size=16", "--reduce-to=99", "--tie-weights", "--no-tie-weights", "--vocab-threshold=2"],
)
def test_an_option_that_the_model_to_start_from_determines_is_refused(option: str, trained: Path):
    arguments = ["--start-from", str(trained), "--dropout", "0.3"]
    config, _ = train_module.parse_options(arguments)
    assert (config.hidden_size, config.dropout) == (32, 0.3)
    named = option.split("=")[0].replace("--no-", "--")
    with pytest.raises(InputError, match=f"{named} has no effect on a run that starts from {trained}"):
        train_module.parse_options([*arguments, option])


def test_a_run_is_resumed_or_starts_from_a_model(trained: Path, tmp_path: Path):
    with pytest.raises(InputError, match="--start-from starts a run and --resume continues one"):
        train_module.parse_options(["--start-from", str(trained), "--resume", str(trained)])
    with pytest.raises(InputError, match=f"{tmp_path} .*captioner"):
        train_module.parse_options(["--start-from", str(tmp_path)])


def test_a_null_character_in_a_path_is_one_sentence(tmp_path: Path):
    (tmp_path / "recipe.toml").write_text('data = "a\\u0000b"')
    with pytest.raises(InputError, match=r"recipe\.toml cannot be used: data holds a null character"):
        train_module.parse_options(["--config", str(tmp_path / "recipe.toml")])


@pytest.mark.parametrize("field", ["name", "data", "models", "start_from"])
def test_a_name_that_is_not_utf_8_is_refused_before_the_work(field: str):
    with pytest.raises(InputError, match=rf"^{field} is not UTF-8, .*'caf\\udce9'; rename it"):
        TrainingConfig(**{field: "caf\udce9"})


def test_dropout_has_no_effect_on_self_critical_training(trained: Path):
    with pytest.raises(InputError, match="--dropout has no effect on self-critical training"):
        train_module.parse_options(["--resume", str(trained), "--objective", "cider", "--dropout", "0.3"])


@pytest.mark.parametrize("options", [["--name", "other"], ["--models", "elsewhere"], ["--overwrite"]], ids=str)
def test_a_training_that_is_resumed_stays_in_its_folder(options: list[str], trained: Path):
    train_module.parse_options(["--resume", str(trained), "--name", trained.name, "--models", str(trained.parent)])
    with pytest.raises(InputError, match=f"{options[0]} has no effect on a resumed run, which stays in"):
        train_module.parse_options(["--resume", str(trained), *options])


def test_validation_images_that_are_trained_on_are_warned_of(
    small: Make, drawn: Path, tmp_path: Path, tiny_backbone: Callable, capsys: pytest.CaptureFixture
):
    shutil.copytree(drawn, tmp_path / "mixed")
    first = sorted((tmp_path / "mixed" / "images" / "val").iterdir())[0]
    shutil.copy(first, tmp_path / "mixed" / "images" / "train" / first.name)
    file = tmp_path / "mixed" / "annotations" / "captions_train.json"
    document = json.loads(file.read_text())
    document["images"].append({"id": 999, "file_name": first.name})
    document["annotations"].append({"id": 999, "image_id": 999, "caption": "a scene"})
    file.write_text(json.dumps(document))
    train(small(data=drawn))
    assert "are also training images" not in capsys.readouterr().err
    train(small(data=tmp_path / "mixed"))
    assert f"validation images such as {first} are also training images" in capsys.readouterr().err
