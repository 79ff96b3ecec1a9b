"""The options of a training run: defaults, checks and the recipes in configs/."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from captioning import checkpoint
from captioning.backbones import Preprocessing, count_stages, full_name, preprocessing_of
from captioning.errors import InputError
from captioning.files import CACHE, read_text, require_local
from captioning.hub import find_model
from captioning.images import MAX_WORKERS, WORKERS
from model import DECODERS, TransformerDecoder

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ObjectiveName = Literal["cross-entropy", "cider"]

MAX_SEED = 2**64 - 1  # largest seed of torch.manual_seed

RENAMED = {"val_photos": "val_images"}  # former names of options, in older captioner.json files

# Options that a run that starts from a trained model takes from it, besides those of its vocabulary.
FROM_ARCHITECTURE = ("backbone", "grid_size", "decoder", "embed_size", "hidden_size", "num_layers")
FROM_PREPROCESSING = ("image_size", "crop", "reduce_to")

MAX_COUNT = 2**63 - 1  # largest number of images, steps, epochs or captions
MAX_MINUTES = 1e6  # two years: a longer --save-minutes is the same

# The minimum and the maximum of each number.
LIMITS: dict[str, tuple[float, float]] = {
    "grid_size": (1, checkpoint.MAX_GRID),
    "embed_size": (1, checkpoint.MAX_SIZE),
    "hidden_size": (1, checkpoint.MAX_SIZE),
    "num_layers": (1, checkpoint.MAX_LAYERS),
    "dropout": (0, 0.99),
    "learning_rate": (0, 10),
    "backbone_learning_rate": (0, 10),
    "embed_weight_decay": (0, 1e3),
    "clip_norm": (0, 1e9),
    "attention_penalty": (0, 1e6),
    "warmup_steps": (0, math.inf),
    "save_minutes": (0, math.inf),
    "workers": (0, MAX_WORKERS),
    "seed": (0, MAX_SEED),
    **dict.fromkeys(("views", "batch_size", "num_epochs", "save_every", "print_every"), (1, MAX_COUNT)),
    **dict.fromkeys(("val_images", "patience", "vocab_threshold"), (1, MAX_COUNT)),
}


@dataclass
class DataOptions:
    """Images and captions."""

    data: Path = Path("data/scenes")  # data set folder in COCO's layout, or of WebDataset tar files
    vocab_threshold: int = 5  # minimum count of a word in the captions
    vocab_from_file: bool = False  # take the vocabulary from --vocab-file rather than from the captions
    vocab_file: Path = Path("vocab.json")  # JSON list of words
    val_images: int = 5000  # number of validation images scored after each epoch
    skip_unreadable: bool = False  # leave out images that cannot be read, rather than stop


@dataclass
class ModelOptions:
    """Backbone and decoder."""

    # trained model, a folder or user/name on the Hub, whose weights, vocabulary and architecture the run starts from
    start_from: Path | None = None
    backbone: str = "resnet50"  # image backbone: torchvision's ResNet-50, or the name of a timm model
    weights: str = "pretrained"  # backbone weights: "pretrained", "random", a model folder or a state-dict file
    image_size: int | None = None  # input resolution in pixels; default: the backbone's own
    crop: Literal["center", "squash"] | None = None  # crop the center, or resize to a square; default: as the backbone
    # reduce larger images to JPEGs of this longer side in pixels first, so that they resemble small training images
    reduce_to: int | None = None
    # pool the feature map to this many rows and columns (attention and transformer decoders)
    grid_size: int | None = None
    views: int = 1  # views per image whose features are cached: the evaluation crop and views - 1 augmented ones
    decoder: checkpoint.DecoderName = "lstm"  # decoder architecture
    embed_size: int = 256  # embedding dimension
    hidden_size: int = 512  # hidden dimension of the LSTM, or of the transformer's feed-forward layers
    num_layers: int = 1  # layers of the decoder
    # dropout rate in the decoder; default 0, or that of --start-from; 0 with --objective cider
    dropout: float | None = None
    tie_weights: bool = False  # share the word embedding with the output layer (arXiv 1608.05859)


@dataclass
class OptimizationOptions:
    """Objective, batches and learning rate.

    A run resumed with another objective or fine_tune starts from its best epoch, and trains num_epochs more.
    """

    objective: ObjectiveName = "cross-entropy"  # likelihood of the captions, or CIDEr-D as a reward (arXiv 1612.00563)
    # number of backbone stages to fine-tune, counted from the output; default 0, or all with --weights random
    fine_tune: int | None = None
    num_epochs: int = 3  # passes over the training data
    batch_size: int = 128  # captions per step, over all processes
    learning_rate: float | None = None  # peak learning rate; default 1e-3, or 5e-4 for cider
    backbone_learning_rate: float | None = None  # for fine-tuned stages; default 1e-3, or 1e-5 for cider
    warmup_steps: int = 100  # steps of linear warm-up, at most a tenth of all, before a cosine decay to zero
    embed_weight_decay: float = 0.0  # decoupled weight decay (arXiv 1711.05101) of the layer on the image features
    clip_norm: float = 5.0  # gradients are clipped to this norm
    attention_penalty: float = 1.0  # weight of the doubly stochastic regularization (arXiv 1502.03044)
    patience: int = 3  # stop after this many epochs without a better CIDEr
    seed: int = 0  # random seed


@dataclass
class CheckpointOptions:
    """Checkpoints and logs."""

    name: str = ""  # model name; default: the name of the data folder
    models: Path = Path("models")  # folder in which the model's folder is created
    save_every: int = 1  # epochs between checkpoints; the best epoch is kept, until there is a better one
    save_minutes: float = 10.0  # minutes between saves within an epoch
    print_every: int = 100  # logging interval in steps
    log_file: str = "training_log.txt"  # log of every step's loss, in the model's folder
    tensorboard: bool = False  # write TensorBoard scalars to the model's folder


@dataclass
class DeviceOptions:
    """Devices and workers."""

    # precision of the backbone and of training; auto: bf16 if native to the device, else fp32
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    workers: int = WORKERS  # number of processes that read images
    cache: Path = CACHE  # folder for tokenized captions and image features


# In the order of `python train.py --help`.
GROUPS = (DataOptions, ModelOptions, OptimizationOptions, CheckpointOptions, DeviceOptions)


@dataclass
class TrainingConfig(DeviceOptions, CheckpointOptions, OptimizationOptions, ModelOptions, DataOptions):
    """All options of a training run; every field is an option of `python train.py`.

    With `start_from`, the weights, the vocabulary, the preprocessing and the architecture (but not dropout) are those
    of that model, and other values for them have no effect; `train.py` refuses these.
    `dataclasses.replace` keeps the values that were derived from other fields: the name, fine_tune and learning rates.
    Raises `InputError` for a value that cannot be used.
    """

    resume: ClassVar[Path | None] = None  # the model folder to resume, in a `ResumedConfig`

    def __post_init__(self) -> None:
        self._convert()
        if self.initial_model is not None:
            self.start_from = find_model(self.initial_model)
            self._take_from(checkpoint.read_description(self.start_from))
        self.name = self.name or self.data.resolve().name
        self._fill_defaults()
        self._check()

    @property
    def initial_model(self) -> Path | None:
        """The model that a new run starts from; None for a run that is resumed, whose own weights count."""
        return self.start_from if self.resume is None else None

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of images for the backbone."""
        return preprocessing_of(self.backbone, self.image_size, self.crop, self.reduce_to)

    def _convert(self) -> None:
        """Convert each value to its field's type."""
        types = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            setattr(self, field.name, _convert_value(field, types[field.name], getattr(self, field.name)))
        self.weights = os.path.expanduser(self.weights)

    def _take_from(self, model: checkpoint.Description) -> None:
        """Take the options that a trained model determines."""
        for name in FROM_ARCHITECTURE:
            setattr(self, name, getattr(model.architecture, name))
        for name in FROM_PREPROCESSING:
            setattr(self, name, getattr(model.preprocessing, name))
        self.weights = "pretrained" if model.architecture.backbone_weights == "published" else str(self.start_from)
        self.tie_weights = model.training.get("tie_weights") is True
        if self.dropout is None:
            self.dropout = model.architecture.dropout
        if self.preprocessing != model.preprocessing:
            raise InputError(f"{self.start_from} preprocesses images as this version cannot; train a new model.")

    def _fill_defaults(self) -> None:
        self.save_minutes = min(self.save_minutes, MAX_MINUTES)
        cider = self.objective == "cider"
        if self.weights == "pretrained" and self.resume is None:
            self.backbone = full_name(self.backbone)
        if self.fine_tune is None:
            self.fine_tune = count_stages(self.backbone) if self.weights == "random" else 0
        if self.dropout is None:
            self.dropout = 0.0
        if self.learning_rate is None:
            self.learning_rate = 5e-4 if cider else 1e-3
        if self.backbone_learning_rate is None:
            self.backbone_learning_rate = 1e-5 if cider else 1e-3

    def _check(self) -> None:
        if self.objective == "cider" and self.resume is None and self.initial_model is None:
            raise InputError(
                "objective cider needs a trained model to start from; add --resume models/NAME, or --start-from."
            )
        for field in ("learning_rate", "backbone_learning_rate", "clip_norm"):
            if not getattr(self, field) > 0:
                raise InputError(f"{field} must be above 0, not {getattr(self, field)}.")
        for field, (least, most) in LIMITS.items():
            value = getattr(self, field)
            if value is None:
                continue
            if not value >= least:
                raise InputError(f"{field} must be at least {least}, not {value}.")
            if value > most:
                raise InputError(f"{field} must be at most {most}, not {value}.")
        for folder in (self.models, self.cache):
            require_local(folder)
        _ = self.preprocessing  # which checks the backbone and the image size
        if (
            self.tie_weights
            and self.embed_size != self.hidden_size
            and not issubclass(DECODERS[self.decoder], TransformerDecoder)
        ):
            raise InputError(
                f"tie_weights needs equal embed_size and hidden_size, not {self.embed_size} and {self.hidden_size}."
            )
        for field in ("name", "log_file"):
            value = getattr(self, field)
            if value in ("", ".", "..") or Path(value).name != value or "\0" in value:
                raise InputError(f'{field} must be a name without folders, not "{value}".')
        own_suffixes = (".json", ".pkl", ".pt", ".safetensors", ".lock", ".new")
        if Path(self.log_file).suffix in own_suffixes or self.log_file in (".lock", "tensorboard"):
            raise InputError(f"log_file must not be named as a model's own files are: {self.log_file}; use NAME.txt.")
        sources = [self.initial_model, self.weights] if self.resume is None else []
        target = (self.models / self.name).resolve()
        paths = [Path(source).resolve() for source in sources if source is not None and os.path.exists(source)]
        if any(target in (path, *path.parents) for path in paths):
            raise InputError(f"{self.models / self.name} holds what the run starts from; choose another --name.")


def _convert_value(field: dataclasses.Field, kind: Any, value: Any) -> Any:
    if value == "" and kind is Path:
        raise InputError(f'{field.name} is empty; name a folder or a file, such as "{field.default}".')
    try:
        value = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{field.name}: {error.errors()[0]['msg']}.") from None
    if isinstance(value, str | Path) and any("\ud800" <= letter <= "\udfff" for letter in str(value)):
        raise InputError(f"{field.name} is not UTF-8, in which captioner.json records it: {str(value)!a}; rename it.")
    if not isinstance(value, Path):
        return value
    if "\0" in str(value):
        raise InputError(f"{field.name} holds a null character, which no path can have.")
    return Path(os.path.expanduser(value))


def explain_ineffective(config: TrainingConfig, given: Collection[str]) -> list[str]:
    """Explain, each in a sentence, which of the given options have no effect with these values of the others."""
    without = {
        "grid_size": (DECODERS[config.decoder].attends, "a decoder that does not attend"),
        "attention_penalty": (DECODERS[config.decoder].sums_attention, "this decoder"),
        "vocab_file": (config.vocab_from_file, "a vocabulary of the captions; add --vocab-from-file"),
        "backbone_learning_rate": (config.fine_tune, "a frozen backbone; add --fine-tune"),
        "vocab_threshold": (not config.vocab_from_file, "a vocabulary from a file"),
        "dropout": (config.objective != "cider", "self-critical training, which drops nothing"),
        "views": (not config.fine_tune, "a backbone that is fine-tuned, which sees new crops in every epoch"),
    }
    if config.initial_model is not None:
        taken = (*FROM_ARCHITECTURE, *FROM_PREPROCESSING, "weights", "tie_weights")
        taken += ("vocab_threshold", "vocab_from_file", "vocab_file")
        without |= dict.fromkeys(taken, (False, f"a run that starts from {config.initial_model}, which determines it"))
    if config.resume is not None:
        is_same_folder = (config.models / config.name).resolve() == config.resume.resolve()
        stays = f"a resumed run, which stays in {config.resume}; copy the folder to keep it as it is"
        without |= {"overwrite": (False, stays), **dict.fromkeys(("name", "models"), (is_same_folder, stays))}
    return [
        f"--{name.replace('_', '-')} has no effect on {what}."
        for name, (has_effect, what) in without.items()
        if name in given and not has_effect
    ]


def require_effect(config: TrainingConfig, given: Collection[str]) -> None:
    """Raise `InputError` if one of the given options has no effect with these values of the others."""
    if sentences := explain_ineffective(config, given):
        raise InputError(sentences[0])


@dataclass
class ResumedConfig(TrainingConfig):
    """The options of a run that is resumed from the folder `resume`."""

    resume: Path | None = None


def settings_of(config: TrainingConfig) -> dict[str, Any]:
    """Convert the options to JSON values for captioner.json."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainingConfig)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def resumed_config(folder: Path, objective: str | None = None) -> ResumedConfig:
    """Read the options of the run in `folder`, in order to resume it, with another `objective` if given.

    Its fields may be changed before `train` is called with it. Raises `InputError` if the folder holds no run.
    """
    if objective not in (None, *get_args(ObjectiveName)):
        raise InputError(f"objective is {objective!r}, but it has to be one of {', '.join(get_args(ObjectiveName))}.")
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    description = checkpoint.read_description(folder)
    saved = {RENAMED.get(name, name): value for name, value in description.training.items()}
    default = preprocessing_of(description.architecture.backbone)
    for name in FROM_PREPROCESSING:
        value = getattr(description.preprocessing, name)
        if saved.get(name) is None and value != getattr(default, name):
            saved[name] = value  # for some backbones, the default was another one
    values = {name: saved[name] for name in names if name in saved}
    if values.get("save_minutes", 0) is None:  # an earlier version's infinity, which JSON cannot hold
        values["save_minutes"] = MAX_MINUTES
    if objective is not None and objective != values.get("objective", "cross-entropy"):
        values["objective"] = objective
        for name in ("num_epochs", "learning_rate", "backbone_learning_rate"):  # the new objective has its own defaults
            values.pop(name, None)
    source = f"{folder}/captioner.json does not hold valid options of a training run"
    return build_config(ResumedConfig, {**values, "resume": Path(folder)}, source)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the options in a TOML file. Raises `InputError` for a file that cannot be used."""
    try:
        options = tomllib.loads(read_text(Path(path)))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not a TOML file ({error}).") from None
    known = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    types = get_type_hints(TrainingConfig, include_extras=True)
    unknown = [name for name in options if name not in known]
    if unknown:
        name = unknown[0].replace("-", "_")
        hint = f"write {name}" if name in known else "`python train.py --help` lists them"
        hint = f"give --{name} on the command line" if name in ("overwrite", "resume", "config") else hint
        raise InputError(f'{path} sets "{unknown[0]}", which is not a training option; {hint}.')
    for name, value in options.items():
        if isinstance(value, bool) and types[name] is not bool:
            raise InputError(f"{path} sets {name} to {str(value).lower()}, which is not a valid value.")
    try:
        return {name: _convert_value(known[name], types[name], value) for name, value in options.items()}
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from None


def load_config(path: str | Path, **overrides: Any) -> TrainingConfig:
    """Load a recipe such as configs/scenes.toml; `overrides` replace its values.

    Raises `InputError` for a file or value that cannot be used.
    """
    given = " with these options" if overrides else ""
    return build_config(TrainingConfig, {**read_recipe(path), **overrides}, f"{path}{given} cannot be used")


def build_config(kind: type[TrainingConfig], values: dict[str, Any], source: str) -> Any:
    """Build a config of these values; `source` begins the message of an error."""
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
