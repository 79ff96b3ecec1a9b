"""Train an encoder and a decoder on a data set of photos and captions.

    python train.py --data data/scenes --name scenes --weights random
    python train.py --resume models/scenes
    python train.py --resume models/scenes --objective cider
    torchrun --nproc_per_node 2 train.py --data data/scenes      two processes, the same training

A frozen backbone's features are computed once (`features.py`) and training reads those; a backbone that
learns is fed pixels. Either way a batch is a list of captions, and `Training` below computes its loss. With
the objective cider the captions are the model's own (`self_critical.py`).
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tyro
from pydantic import TypeAdapter, ValidationError

from captioning import checkpoint
from captioning.errors import InputError, run_command
from captioning.training import Objective, TrainingConfig, train


@dataclass
class CommandOptions(TrainingConfig):
    """`TrainingConfig`, and what the command line takes besides."""

    resume: Path | None = None  # go on with the training in this model's folder; its options are then the defaults
    overwrite: bool = False  # delete the model that is there under this name


def resumed_config(folder: Path, objective: str | None = None) -> CommandOptions:
    """The configuration of the training in `folder`, set to go on, with another `objective` if one is given.

    Its fields may be changed before it does.
    """
    known = [field.name for field in dataclasses.fields(TrainingConfig)]
    saved = checkpoint.read_description(folder).training
    values = {name: saved[name] for name in known if name in saved}
    if objective is not None and objective != values.get("objective", "cross-entropy"):
        values["objective"] = objective
        for name in ("num_epochs", "learning_rate", "backbone_learning_rate"):  # not the other objective's
            values.pop(name, None)
    try:
        return TypeAdapter(CommandOptions).validate_python({**values, "resume": Path(folder)})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "training"
        raise InputError(
            f"{folder}/captioner.json holds no training's configuration: {where}: {first['msg']}."
        ) from None


def main() -> None:
    """`python train.py`: it deletes no model without being asked to."""
    options: dict[str, Any] = {}
    arguments = [part for argument in sys.argv[1:] for part in argument.split("=", 1)]
    if "--resume" in arguments[:-1]:
        given = arguments[arguments.index("--objective") + 1] if "--objective" in arguments[:-1] else None
        objective = given if given in get_args(Objective) else None
        options["default"] = resumed_config(Path(arguments[arguments.index("--resume") + 1]), objective)
    config = tyro.cli(CommandOptions, description=__doc__, **options)
    folder = config.models / config.name
    if config.resume is None and not config.overwrite and (folder / checkpoint.DESCRIPTION).exists():
        raise InputError(
            f"{folder} holds a model already; go on with its training with --resume {folder}, delete it with "
            f"--overwrite, or choose another --name."
        )
    train(config)


if __name__ == "__main__":
    run_command(main)
