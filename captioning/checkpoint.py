"""The folder of a trained model: writing, safe reading, resuming.

    captioner.json    architecture, image preprocessing, vocabulary, data set, metrics of every epoch
    encoder-<i>.pkl   the encoder's state dict after epoch i, with the keys of the published weights
    decoder-<i>.pkl   the decoder's; both may be .safetensors files, as in models from the Hub
    backbone.pkl      the backbone's, if it is frozen and its weights are not the published ones
    resume.pt         what training resumes from; resume-previous.pt is the one before it

Every file is written to a temporary name, flushed to disk and renamed. Nothing that is read can
run code: state dicts are tensors only, the rest is JSON that is checked field by field.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from numbers import Integral
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn as nn
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator

from captioning.backbones import RESNET50, Preprocessing, preprocessing_of, rebuild
from captioning.errors import InputError, quoted, warn_once
from captioning.files import decode_text, missing_file, read_bytes, require_access, web_address, write_file
from captioning.lazy_compiler import meta_device
from captioning.weights import as_state_dict, load_weights, read_saved, read_state_dict
from model import DECODERS, DecoderModule, EncoderCNN
from vocabulary import Vocabulary

DESCRIPTION = "captioner.json"
MAX_DESCRIPTION = 64 << 20  # maximum size of captioner.json, in bytes
SAMPLE = "scenes"  # the folder that the sample data set is drawn into
MODELS = Path("models")
HUB_ADDRESS = re.compile(r"(?:(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)|hf:)/+([^/]+/[^/]+)")
SHIPPED = "photos"  # the model that comes with the project
RESUME_TYPES = {  # types of the values in resume.pt
    "format": int,
    "encoder": dict,
    "decoder": dict,
    "optimizer": dict,
    "objective": str,
    "first_epoch": int,
    "epoch": int,
    "step": int,
    "epoch_loss": (int, float),
    **dict.fromkeys(("epoch_tokens", "total_steps", "batch_size", "captions"), int),
    "epochs": list,
    "best_epoch": (int, NoneType),
    "log_bytes": int,
}
WEIGHT_SUFFIXES = (".pkl", ".safetensors")
MAX_SIZE, MAX_LAYERS, MAX_GRID = 1 << 14, 16, 64  # of embed_size and hidden_size, num_layers, and grid_size

if TYPE_CHECKING:
    DecoderName = str
else:
    # The command line offers the decoders that are here; of those added later, pydantic is satisfied, too.
    _also_later = WrapValidator(lambda name, check: name if name in list(DECODERS) else check(name))
    DecoderName = Annotated[Literal[tuple(DECODERS)], _also_later]


class Architecture(BaseModel):
    """What is needed to build the encoder and the decoder."""

    model_config = ConfigDict(extra="forbid")

    decoder: DecoderName
    embed_size: int = Field(strict=True, ge=1, le=MAX_SIZE)
    hidden_size: int = Field(strict=True, ge=1, le=MAX_SIZE)
    num_layers: int = Field(strict=True, ge=1, le=MAX_LAYERS)
    dropout: float = Field(ge=0, lt=1)
    backbone: str = Field(max_length=200)  # "resnet50", or the name of a timm model
    grid_size: int | None = Field(default=None, strict=True, ge=1, le=MAX_GRID)  # rows and columns, after averaging
    # Where its weights are: published under its name, in backbone.pkl for all epochs, or in every encoder-<i>.pkl.
    backbone_weights: Literal["published", "shared", "epoch"]

    def build_encoder(self, weights: str, fine_tune: int = 0) -> EncoderCNN:
        """Build the encoder; the arguments are those of `EncoderCNN`."""
        attends = DECODERS[self.decoder].attends
        return EncoderCNN(self.embed_size, self.backbone, weights, fine_tune, attends, self.grid_size)

    def build_decoder(self, words: int) -> DecoderModule:
        """Build the decoder for a vocabulary of this size."""
        return DECODERS[self.decoder](self.embed_size, self.hidden_size, words, self.num_layers, self.dropout)


class Description(BaseModel):
    """captioner.json: everything about a model but its weights."""

    format: Literal[2] = 2
    architecture: Architecture
    preprocessing: Preprocessing
    vocabulary: list[str] = Field(max_length=1 << 22)
    data: dict[str, Any] = {}
    training: dict[str, Any] = {}
    epochs: list[dict[str, Any]] = []
    best_epoch: int | None = Field(default=None, strict=True, ge=1)
    environment: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _read_format_1(cls, fields: Any) -> Any:
        """Convert format 1, of ResNet-50 only: torchvision's weights, or "stored" with every epoch."""
        if (
            not isinstance(fields, dict)
            or fields.get("format") != 1
            or not isinstance(fields.get("architecture"), dict)
        ):
            return fields
        where = {"IMAGENET1K_V1": "published", "stored": "epoch"}.get(fields["architecture"].get("backbone"))
        architecture = {**fields["architecture"], "backbone": RESNET50, "backbone_weights": where}
        rest = {key: value for key, value in fields.items() if key != "ranges"}  # no longer used
        return {**rest, "format": 2, "architecture": architecture}


def environment() -> dict[str, str | None]:
    """Record the versions of Python and the libraries, and the git revision of a checkout."""
    revision = None
    with suppress(OSError):  # where there is no git
        git = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        revision = done.stdout.strip() or None
    libraries = {
        name: version(name) for name in ("torch", "torchvision", "timm", "nltk", "numpy", "pillow", "accelerate")
    }
    return {"python": platform.python_version(), **libraries, "git_revision": revision}


def write_description(folder: Path, description: Description) -> None:
    """Write captioner.json, without an option that earlier versions do not know if it is not used."""
    unused = {"preprocessing": {"reduce_to"}} if description.preprocessing.reduce_to is None else None
    text = description.model_dump_json(indent=1, exclude=unused)
    write_file(folder / DESCRIPTION, lambda file: file.write(text.encode()))


def read_description(folder: str | Path) -> Description:
    """Read and check captioner.json; `InputError` says what is missing or wrong in it."""
    path = Path(folder) / DESCRIPTION
    if not os.path.exists(path):  # unlike Path.exists, False for a name that no file can have, too
        raise _no_model(Path(folder))
    text = decode_text(read_bytes(path, MAX_DESCRIPTION), path)
    if not text.strip():
        raise InputError(f"{path} is empty, and describes no model; restore it from a copy, or train the model again.")
    try:
        return Description.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise InputError(f"{path} does not describe a model: {reason}.") from None


def _no_model(folder: Path) -> InputError:
    """Return the error for a path that is not a model's folder."""
    if on_hub := HUB_ADDRESS.match(folder.as_posix()):
        return InputError(f"{on_hub[1]} is the name of this model on the Hub; write it without the address.")
    if web_address(folder):
        return missing_file(folder)
    require_access(folder)
    if os.path.isfile(folder) and os.path.exists(folder.parent / DESCRIPTION):
        return InputError(f"{folder} is a file of a model; name its folder, {folder.parent}.")
    is_near = os.path.isfile(MODELS / folder.name / DESCRIPTION)
    advice = f"did you mean {MODELS / folder.name}?" if is_near else f"{_how_to_train(folder)}."
    lacks = f"is not a trained model's folder: {folder / DESCRIPTION} is missing"
    return InputError(f"{folder} {lacks if os.path.lexists(folder) else 'does not exist'}; {advice}")


def _how_to_train(folder: str | Path) -> str:
    """Return how to train a model of this name, as a part of a sentence."""
    name = Path(folder).name
    if name == SAMPLE:
        return "`make demo` trains it"
    if name in {path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.toml")}:
        return f"`python train.py --config configs/{name}.toml` trains it"
    return "`python train.py` trains one, and `make demo` one of the sample data set"


def name_of_data(folder: Path) -> str:
    """Return the name under which a description records a data set's folder, also where it is given as "."."""
    return os.path.basename(os.path.abspath(folder))


def default_model(models: Path | None = None, data: str | None = None) -> Path:
    """Choose a model in `models` (default: models/ here, else the project's) when none was named.

    It is the newest one trained on a data set whose folder is called `data`; else the newest trained on photos, that
    is, on anything but the drawn sample; else the newest. The model that comes with the project counts as the
    oldest, whatever its date, and one without the weights of any epoch is chosen only if no other has them. Raises
    `InputError` if there is none.
    """
    if models is None:
        models = MODELS if any(MODELS.glob(f"*/{DESCRIPTION}")) else Path(__file__).parents[1] / MODELS
    descriptions = list(models.glob(f"*/{DESCRIPTION}"))
    descriptions.sort(key=lambda path: (path.parent.name != SHIPPED, path.stat().st_mtime))
    if not descriptions:
        raise InputError(
            f"there is no trained model in {models}/; make one with `make demo`, fetch one with "
            f"`python download.py weights`, or name one with --model."
        )
    folders = [path.parent for path in descriptions]
    trained = [folder for folder in folders if epochs_saved(folder)]  # one in its first epoch has no weights yet
    trained_on = {folder: _trained_on(folder) for folder in trained or folders}
    same = [folder for folder, name in trained_on.items() if name == data and data is not None]
    photos = [folder for folder, name in trained_on.items() if name != SAMPLE]
    return (same or photos or list(trained_on))[-1]


def _trained_on(folder: Path) -> object:
    try:
        return read_description(folder).data.get("folder")
    except InputError:
        return None


def resolve_weights(weights: str, backbone: str) -> str:
    """Convert --weights for `EncoderCNN`: a model's folder to the file that holds its backbone.

    Raises `InputError` if the model has another backbone.
    """
    folder = Path(weights)
    if weights in ("pretrained", "random") or not folder.is_dir():
        return weights
    description = read_description(folder)
    if description.architecture.backbone != backbone:
        raise InputError(
            f"{folder} has the backbone {description.architecture.backbone}, not {backbone}; add --backbone "
            f"{description.architecture.backbone}."
        )
    where = description.architecture.backbone_weights
    if where == "published":
        return "pretrained"
    if where == "shared":
        return str(weight_file(folder, "backbone"))
    return str(weight_files(folder, choose_epoch(folder, description))[0])


def epochs_saved(folder: Path) -> list[int]:
    """List the epochs whose encoder and decoder are both in the folder, in order."""
    names = {path.stem.split("-", 1)[1] for path in folder.glob("encoder-*") if path.suffix in WEIGHT_SUFFIXES}
    epochs = sorted(int(i) for i in names if i.isdecimal())
    return [i for i in epochs if all(path.exists() for path in weight_files(folder, i))]


def weight_file(folder: Path, name: str) -> Path:
    """Return the weight file of this name: .safetensors if there is no .pkl."""
    pickled, safe = (folder / f"{name}{suffix}" for suffix in WEIGHT_SUFFIXES)
    return safe if safe.exists() and not pickled.exists() else pickled


def weight_files(folder: Path, epoch: int) -> tuple[Path, Path]:
    """Return the weight files of an epoch's encoder and decoder."""
    return weight_file(folder, f"encoder-{epoch}"), weight_file(folder, f"decoder-{epoch}")


def choose_epoch(folder: Path, description: Description, epoch: int | None = None) -> int:
    """Return `epoch`, or without it the best one; raises `InputError` if its weights are missing.

    If the best one's are missing, the last epoch is returned, with a warning unless no epoch is recorded as the best.
    """
    saved = epochs_saved(folder)
    if epoch is None:
        if saved and description.best_epoch not in (None, *saved):
            warn_once(f"{folder} lacks the weights of its best epoch, {description.best_epoch}; the last one is used.")
        epoch = description.best_epoch if description.best_epoch in saved else max(saved, default=None)
    if not saved or epoch is None:
        raise InputError(
            f"{folder} is incomplete: it lacks any epoch's encoder-<i>.pkl and decoder-<i>.pkl; train it, or "
            f"resume: `python train.py --resume {quoted(folder)}`."
        )
    if epoch not in saved or not isinstance(epoch, Integral) or isinstance(epoch, bool):
        raise InputError(f"{folder} has no weights of epoch {epoch!r}; it has those of {', '.join(map(str, saved))}.")
    return epoch


def save_epoch(folder: Path, epoch: int, encoder: EncoderCNN, decoder: nn.Module, description: Description) -> None:
    """Write encoder-<epoch>.pkl and decoder-<epoch>.pkl, and backbone.pkl where all epochs share it.

    A backbone with published weights is named in captioner.json and not written.
    """
    where = description.architecture.backbone_weights
    if where == "shared" and not weight_file(folder, "backbone").exists():
        backbone = encoder.network.state_dict(prefix=f"{encoder.module_name}.")
        write_file(folder / "backbone.pkl", partial(torch.save, backbone))
    state = encoder.state_dict() if where == "epoch" else encoder.embed.state_dict(prefix="embed.")
    write_file(folder / f"encoder-{epoch}.pkl", partial(torch.save, state))
    write_file(folder / f"decoder-{epoch}.pkl", partial(torch.save, decoder.state_dict()))


def write_model(folder: Path, epoch: int, encoder: EncoderCNN, decoder: nn.Module, description: Description) -> None:
    """Write one epoch's model to a new folder, which is removed again if that fails; raises `InputError` then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_epoch(folder, epoch, encoder, decoder, description)
        write_description(folder, description)  # last, as it marks the folder as a model's
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{folder} cannot be written: {error.strerror}.") from None
        raise


def name_weights(description: Description, epoch: int | None) -> str:
    """Name the epoch, or the epochs whose mean the weights are."""
    averaged = description.training.get("averaged_epochs")
    return f"mean of epochs {', '.join(map(str, averaged))}" if isinstance(averaged, list) else f"epoch {epoch}"


def store_backbone(folder: Path, encoder: EncoderCNN) -> None:
    """Write the backbone into every epoch's encoder file, before it is fine-tuned."""
    backbone = encoder.network.state_dict(prefix=f"{encoder.module_name}.")
    for epoch in epochs_saved(folder):
        path, _ = weight_files(folder, epoch)
        write_file(path.with_suffix(".pkl"), partial(torch.save, {**backbone, **read_state_dict(path)}))


def remove_epoch(folder: Path, epoch: int) -> None:
    """Delete an epoch's weights."""
    for name in (f"{part}-{epoch}{suffix}" for part in ("encoder", "decoder") for suffix in WEIGHT_SUFFIXES):
        (folder / name).unlink(missing_ok=True)


def load_model(
    folder: str | Path, epoch: int | None = None
) -> tuple[EncoderCNN, DecoderModule, Vocabulary, Description]:
    """Load a model's encoder, decoder, vocabulary and description, on the CPU in evaluation mode.

    Without `epoch`, loads the best epoch, else the last. Raises `InputError` if files are missing or disagree.
    """
    folder = Path(folder)
    description = read_description(folder)
    parts = description.architecture
    try:
        vocabulary = Vocabulary(description.vocabulary)
        preprocessing_of(parts.backbone, description.preprocessing.image_size)  # which checks the backbone and the size
    except InputError as error:
        raise InputError(f"{folder / DESCRIPTION} does not describe a model: {error}") from None
    encoder_file, decoder_file = weight_files(folder, choose_epoch(folder, description, epoch))
    encoder_state, decoder_state = read_state_dict(encoder_file), read_state_dict(decoder_file)
    published = parts.backbone_weights == "published"
    with meta_device():  # nothing is allocated before the sizes are known to agree
        decoder = parts.build_decoder(len(vocabulary))
        if not published:
            encoder = parts.build_encoder("random")
    load_weights(decoder, decoder_state, decoder_file)
    if published:
        encoder = parts.build_encoder("pretrained")
    if parts.backbone_weights == "shared":
        encoder_state = {**read_state_dict(weight_file(folder, "backbone")), **encoder_state}
    load_encoder(encoder, encoder_state, encoder_file, parts)
    encoder.mean, encoder.std = description.preprocessing.mean, description.preprocessing.std
    return encoder.eval(), decoder.eval(), vocabulary, description


def load_encoder(encoder: EncoderCNN, state: dict[str, torch.Tensor], path: Path, architecture: Architecture) -> None:
    """Load an encoder's state dict, read from `path`; a published backbone may be absent from it."""
    optional = (f"{encoder.module_name}.",) if architecture.backbone_weights == "published" else ()
    load_weights(encoder, state, path, optional)
    if any(buffer.is_meta for buffer in encoder.buffers()):
        encoder.add_module(encoder.module_name, rebuild(architecture.backbone, encoder.network))
    encoder.network.to(memory_format=torch.channels_last)


def run_files(folder: Path) -> list[Path]:
    """List a run's files in a folder, the description first, since a folder without it is not a model's."""
    weights = ["backbone", *(f"{part}-{i}" for i in epochs_saved(folder) for part in ("encoder", "decoder"))]
    names = [DESCRIPTION, "resume.pt", "resume-previous.pt", *(f"{x}{end}" for x in weights for end in WEIGHT_SUFFIXES)]
    return [folder / name for name in names if os.path.lexists(folder / name)]


def remove_run(folder: Path) -> None:
    """Delete a run's files."""
    for path in run_files(folder):
        path.unlink()


def save_resume(folder: Path, state: dict[str, Any]) -> None:
    """Write resume.pt; the one before it stays as resume-previous.pt."""
    path, newest = folder / "resume.pt", folder / "resume-next.pt"
    write_file(newest, partial(torch.save, state))
    if path.exists():
        os.replace(path, folder / "resume-previous.pt")
    os.replace(newest, path)


def load_resume(folder: Path, log: Callable[[str], object]) -> dict[str, Any]:
    """Read resume.pt or, if it is damaged, the state before it, reported to `log`; else raises `InputError`."""
    problems: list[str] = []
    for name in ("resume.pt", "resume-previous.pt"):
        path = folder / name
        try:
            if not path.exists():
                raise InputError(f"{path} is missing.")
            if path.is_file():
                path.open("rb").close()  # raises if it may not be read, and is not damaged
            state = read_saved(path)
            if isinstance(state, dict):  # older versions lack these keys
                added = dict.fromkeys(("total_steps", "batch_size", "captions"), 0)
                state = {"objective": "cross-entropy", "first_epoch": 1, **added, **state}
            if not _is_resume_state(state):
                raise InputError(f"{path} is not the state of a training run.")
            for part in ("encoder", "decoder"):
                state[part] = as_state_dict(state[part], path)
            if problems:
                log(f"{problems[0]}; resuming from {path}")
            return state
        except InputError as error:
            problems.append(str(error).rstrip("."))
    raise InputError(f"{folder} cannot be resumed: {' and '.join(problems)}; start a new run.")


def _is_resume_state(state: object) -> bool:
    return (
        isinstance(state, dict)
        and state.keys() == RESUME_TYPES.keys()
        and all(isinstance(state[key], types) for key, types in RESUME_TYPES.items())
        and state["format"] == 2
        and state["objective"] in ("cross-entropy", "cider")
        and 1 <= state["first_epoch"] <= state["epoch"] == len(state["epochs"]) + 1
        and all(isinstance(epoch, dict) and _is_finite(epoch.get("CIDEr")) for epoch in state["epochs"])
        and _is_json(state["epochs"])
        and (state["best_epoch"] is None) == (not state["epochs"])
        and 1 <= (state["best_epoch"] or 1) <= max(1, len(state["epochs"]))
        and all(0 <= state[key] < 1 << 63 for key, types in RESUME_TYPES.items() if types is int)
        and _is_finite(state["epoch_loss"])
        and isinstance(groups := state["optimizer"].get("param_groups", []), list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
