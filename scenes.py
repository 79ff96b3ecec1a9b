"""Draw the sample data set: scenes with five captions each, in COCO's layout.

python scenes.py data/scenes --train 6000 --val 500 --test 500 --seed 0
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, which take seconds, without a traceback

import tyro

from captioning.errors import printable, run_command
from captioning.scenes.dataset import draw_dataset


def main(
    out: Annotated[Path, tyro.conf.Positional],
    train: int = 6000,
    val: int = 500,
    test: int = 500,
    seed: int = 0,
) -> None:
    """Draw the sample data set: pictures with five captions each, in COCO's layout.

    Args:
        out: the folder to draw into.
        train: pictures to train on.
        val: pictures to choose a model with.
        test: pictures to measure the final model on.
        seed: random seed.
    """
    folder = draw_dataset(out, train, val, test, seed)
    counts = f"{train} pictures to train on, {val} to validate, {test} to test, five captions each"
    print(printable(f"{folder}: {counts}."))


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
