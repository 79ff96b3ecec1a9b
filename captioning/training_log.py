"""The log of a training run, one line per step, and its scalars for TensorBoard."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np

from captioning.errors import InputError
from captioning.files import read_bytes

LINE = re.compile(r"Epoch \[(\d+)/\d+\], Step \[(\d+)/\d+\], Loss: (-?[0-9.]+(?:e[-+]?[0-9]+)?|-?inf|nan), .*")


def format_line(epoch: int, epochs: int, step: int, steps: int, loss: float, summary: str) -> str:
    """Format a step's line; `summary` is the loss as the objective formats it."""
    return f"Epoch [{epoch}/{epochs}], Step [{step}/{steps}], Loss: {loss:.4f}, {summary}"


def open_log(path: Path, size: int | None) -> BinaryIO:
    """Open the log of a new run (`size` None), or that of a resumed one, of which the first `size` bytes are kept."""
    file = open(path, "wb" if size is None else "ab")
    if size is not None and path.is_file():
        file.truncate(min(size, file.tell()))
    return file


def read_log(path: str | Path) -> np.ndarray:
    """Read a training log as an array (steps, 3): epoch, step in the epoch, loss.

    An unfinished last line is left out: the run may still be writing it. Raises `InputError` for any other line that
    is not a training log line.
    """
    rows = []
    *lines, _ = read_bytes(Path(path)).decode(errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if not match:
            raise InputError(f"{path}, line {number} is not a training log line; delete the line or the file.")
        try:
            rows.append([float(x) for x in match.groups()])
        except ValueError:
            raise InputError(f"{path}, line {number} has the loss {match[3]}, which is not a number.") from None
    return np.array(rows).reshape(-1, 3)


class Scalars:
    """TensorBoard scalars in the model's folder, or nothing unless `wanted`.

    What an interrupted run wrote from the step `first` on is replaced. Raises `InputError` if tensorboard is not
    installed.
    """

    first = 1

    def __init__(self, folder: Path, wanted: bool):
        self.folder, self.writer_class, self.writer = folder / "tensorboard", None, None
        if wanted:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("--tensorboard needs the package tensorboard; pip install tensorboard.") from None
            self.writer_class = SummaryWriter

    def remove(self) -> None:
        """Delete the scalars of an earlier run in the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, values: dict[str, float], step: int) -> None:
        """Write values at a step."""
        if self.writer_class is None:
            return
        if self.writer is None:
            self.writer = self.writer_class(self.folder, purge_step=self.first)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush what was written."""
        if self.writer is not None:
            self.writer.close()
