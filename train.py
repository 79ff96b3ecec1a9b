"""Train a model that writes captions, on a data set of images and captions.

    python train.py --config configs/scenes.toml               the sample data set, as `make demo` trains on it
    python train.py --data data/mine --name mine               your own images and captions, after `importers.py`
    python train.py --data data/mine --start-from models/photos    the same, from a trained model
    python train.py --resume models/mine                       continue a run that was interrupted
    python train.py --resume models/mine --objective cider     then raise the captions' CIDEr-D score
    torchrun --nproc_per_node 2 train.py --data data/mine      in two processes, on CPUs or GPUs

Options on the command line override those of --config, and those of the run that --resume continues, except for its
vocabulary, image preprocessing and architecture.
"""

from __future__ import annotations

import dataclasses
import itertools
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, which take seconds, without a traceback

import tyro

from captioning.config import (
    GROUPS,
    CheckpointOptions,
    DataOptions,
    DeviceOptions,
    ModelOptions,
    ObjectiveName,
    OptimizationOptions,
    ResumedConfig,
    TrainingConfig,
    build_config,
    explain_ineffective,
    read_recipe,
    require_effect,
    resumed_config,
)
from captioning.errors import InputError, run_command, warn_once
from captioning.preparation import require_new
from captioning.training import train

__all__ = ["TrainingConfig", "main", "resumed_config", "train"]


@dataclass
class RunOptions:
    """What the run starts from."""

    config: Path | None = None  # recipe to start from: a TOML file such as configs/scenes.toml
    resume: Path | None = None  # model folder of the run to resume
    overwrite: bool = False  # delete the files of an earlier run of this name


@dataclass
class CommandOptions:
    """All options, in the groups of `--help`."""

    run: RunOptions = field(default_factory=RunOptions)
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    devices: DeviceOptions = field(default_factory=DeviceOptions)


def parse_options(arguments: list[str]) -> tuple[TrainingConfig, RunOptions]:
    """Parse the options of a command line; the defaults are those of its recipe, or of the run that it resumes."""
    defaults = starting_values(arguments)
    options = tyro.cli(
        CommandOptions,
        prog="train.py",
        description=__doc__,
        args=arguments,
        default=grouped(defaults),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    groups = {name: value for name, value in vars(options).items() if name != "run"}
    fields = {name: value for group in groups.values() for name, value in vars(group).items()}
    if options.run.resume is not None:
        config: TrainingConfig = ResumedConfig(**fields, resume=options.run.resume)
    elif options.run.config is not None:
        config = build_config(TrainingConfig, fields, f"{options.run.config} with these options cannot be used")
    else:
        config = TrainingConfig(**fields)
    flags = (argument.split("=", 1)[0] for argument in arguments if argument.startswith("--"))
    given = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
    require_effect(config, given)
    if options.run.config is not None:
        check_recipe(options.run.config, defaults, config, given)
    return config, options.run


def check_recipe(path: Path, recipe: dict[str, Any], config: TrainingConfig, given: set[str]) -> None:
    """Warn of options of a recipe that have no effect with those given on the command line.

    Raises `InputError` for an option that has no effect with the recipe's own values either.
    """
    try:
        ineffective_alone = explain_ineffective(TrainingConfig(**recipe), recipe)
    except InputError:  # the command line completes the recipe
        ineffective_alone = []
    for sentence in explain_ineffective(config, recipe.keys() - given):
        if sentence in ineffective_alone:
            raise InputError(f"{path}: {sentence}")
        warn_once(f"{path}: {sentence}")


def starting_values(arguments: list[str]) -> dict[str, Any]:
    """Read the defaults that --config or --resume sets."""
    split = (argument.split("=", 1) if argument.startswith("--") else [argument] for argument in arguments)
    # Each argument with the one after it: all options with their values, and pairs that are never looked up.
    given = dict(itertools.pairwise(itertools.chain.from_iterable(split)))
    if "--config" in given and "--resume" in given:
        raise InputError("--config starts a run and --resume continues one with its own options; give one of them.")
    if "--start-from" in given and "--resume" in given:
        raise InputError("--start-from starts a run and --resume continues one; give one of them.")
    if "--resume" in given:
        objective = given.get("--objective")
        objective = objective if objective in get_args(ObjectiveName) else None
        return vars(resumed_config(Path(given["--resume"]), objective))
    if "--config" in given:
        return read_recipe(given["--config"])
    return {}


def grouped(values: dict[str, Any]) -> CommandOptions:
    """Build the groups of options, with these values as defaults."""

    def fill(group: type) -> Any:
        return group(**{x.name: values[x.name] for x in dataclasses.fields(group) if x.name in values})

    return CommandOptions(RunOptions(), *map(fill, GROUPS))


def main() -> None:
    """Run `python train.py`; the files of an earlier run are deleted with --overwrite only."""
    config, run = parse_options(sys.argv[1:])
    if not run.overwrite:
        require_new(config)
    train(config, run.overwrite)


if __name__ == "__main__":
    run_command(main)
