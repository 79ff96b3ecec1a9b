"""How time and memory grow with the data set, from 1,000 photos to 1,000,000, in one process and in two.

    python -m benchmarks.scale                            takes 6 GB of disk for a while
    python -m benchmarks.scale --sizes 1000 10000         the first half of it

The photos are empty files, for nothing here looks at them; their features are made up, and their captions, five a
photo, have the statistics of COCO's (`drawn.py`). Training is the project's own `train`, stopped within its first
epoch. Writes the results, with the slopes, to benchmarks/results/scale.json after every size, and prints a table.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate.utils import gather_object

from benchmarks import drawn
from captioning import checkpoint, training
from captioning.bulk import stream_images
from captioning.distributed import this_process
from data_loader import CaptionDataset, LengthBatches

CAPTIONS_PER_IMAGE = 5
FEATURE_SIZE = 2048  # of ResNet-50
CHUNK = 100_000  # captions that are drawn at once
ROWS = {  # what is printed of what is measured
    "captions": "captions",
    "words": "words that occur five times or more",
    "seconds_cold": "the captions read, the first time, s",
    "seconds_warm": "the captions read again, s",
    "seconds_folder": "the photos' names in order, s",
    "seconds_order": "the order of an epoch, s",
    "seconds_to_first_step": "to the first step of training, s",
    "captions_per_second": "training on stored features, captions/s",
    "megabytes_of_arrays": "the captions' and names' arrays, MB",
    "megabytes_beyond_arrays": "held beyond them and the libraries, MB",
    "megabytes_cold": "at most while reading the first time, MB",
    "megabytes_training": "in training, MB",
}


@dataclass
class Settings:
    """What is measured."""

    sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)  # photos
    processes: tuple[int, ...] = (1, 2)
    steps: int = 40  # of training, of 128 captions each; the first third is not counted
    results: Path = Path("benchmarks/results")
    measure: Path | None = None  # only measure the data set in this folder, in this process


def megabytes() -> float:
    """What this process holds in memory now, without the files that it maps."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1000


class Peak:
    """The most memory that was held within a `with`, in MB, looked at fifty times a second; and its seconds."""

    def __enter__(self) -> Peak:
        self.megabytes, self.start, self.ended = megabytes(), time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.ended.wait(0.02):
            self.megabytes = max(self.megabytes, megabytes())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.ended.set()
        self.thread.join()
        self.megabytes = max(self.megabytes, megabytes())


def make(folder: Path, image_count: int) -> None:
    """Write a data set of so many photos, a hundred to validate on, and their features."""
    for split, size in (("train", image_count), ("val", 100)):
        inside = folder / "images" / split
        inside.mkdir(parents=True)
        for i in range(size):
            os.close(os.open(inside / f"{i:012d}.jpg", os.O_CREAT))
        path = folder / "annotations" / f"captions_{split}.json"
        path.parent.mkdir(exist_ok=True)
        with open(path, "w") as file:
            file.write('{"info": {}, "images": [')
            for i in range(size):
                image = {"license": 1, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640, "id": i + 1}
                file.write((", " if i else "") + json.dumps({**image, "date_captured": "2013-11-14 17:02:52"}))
            file.write('], "annotations": [')
            for i, text in enumerate(_captions(size * CAPTIONS_PER_IMAGE)):
                annotation = {"image_id": i % size + 1, "id": i + 1, "caption": text}
                file.write((", " if i else "") + json.dumps(annotation))
            file.write("]}")
        shape = (size, 1, FEATURE_SIZE)
        features = np.lib.format.open_memmap(folder / f"{split}.npy", mode="w+", dtype=np.float16, shape=shape)
        some = np.random.default_rng(0).random((1000, *shape[1:]), np.float32).astype(np.float16)
        for start in range(0, size, len(some)):
            features[start : start + len(some)] = some[: size - start]


def _captions(count: int) -> Iterator[str]:
    for seed, start in enumerate(range(0, count, CHUNK)):
        yield from drawn.draw_captions(min(CHUNK, count - start), seed)


def array_megabytes(data: CaptionDataset) -> float:
    """What the arrays of a data set take."""
    names = data.paths.names
    arrays = [
        data.image_ids,
        data.image_rows,
        data.lengths,
        data.offsets,
        data.tokens,
        names.block,
        names.starts,
        names.ends,
    ]
    return sum(array.nbytes for array in arrays) / 1e6


def measure(folder: Path, steps: int) -> list[dict[str, float]]:
    """Measure a data set in this process; returns what all processes measured, each as one dictionary."""
    process = this_process()
    row: dict[str, float] = {"process": process.process_index}
    first = process.is_main_process and not (folder / "cache").exists()
    process.wait_for_everyone()
    CaptionDataset(folder, "val", vocab_threshold=1, cache=folder / "cache")  # what is loaded once is no growth
    before = megabytes()
    if first:  # when one process reads the captions
        with Peak() as peak:
            CaptionDataset(folder, cache=folder / "cache")
        row |= {"seconds_cold": peak.seconds, "megabytes_cold": peak.megabytes - before}
    process.wait_for_everyone()
    with Peak() as peak:
        data = CaptionDataset(folder, cache=folder / "cache")
    held = megabytes() - before
    row |= {"seconds_warm": peak.seconds, "megabytes_warm": peak.megabytes - before}
    row |= {"photos": len(data.paths), "captions": len(data.image_rows)}
    row |= {"words": len(data.vocab), "megabytes_of_arrays": array_megabytes(data)}
    row["megabytes_beyond_arrays"] = held - row["megabytes_of_arrays"]
    with Peak() as peak:
        batches = sum(1 for _ in LengthBatches(data.lengths, 128))
    row |= {"seconds_order": peak.seconds, "batches": batches}
    with Peak() as peak:
        image_count = sum(1 for _ in stream_images([folder / "images" / "train"]))
    row["seconds_folder"] = peak.seconds
    assert image_count == len(data.paths)
    del data
    return gather_object([row | _train(folder, steps)])


def _train(folder: Path, steps: int) -> dict[str, float]:
    """Some steps of the project's own training, on the features that were made up."""
    times: list[float] = []
    factor = training.learning_rate_factor

    def timed(done: int, *arguments: int) -> float:
        times.append(time.perf_counter())
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return factor(done, *arguments)

    def stored(_: Any, paths: Any, *__: Any, **___: Any) -> torch.Tensor:
        return torch.from_numpy(np.load(folder / f"{paths.folder.name}.npy", mmap_mode="c"))

    training.learning_rate_factor, training.stored_features = timed, stored
    config = training.TrainingConfig(
        data=folder, name="scale", models=folder / "models", cache=folder / "cache", weights="random", fine_tune=0
    )
    start = time.perf_counter()
    with Peak() as peak, suppress(KeyboardInterrupt):
        training.train(config)
    counted = times[len(times) // 3 :]
    return {
        "seconds_to_first_step": times[0] - start,
        "captions_per_second": 128 * (len(counted) - 1) / (counted[-1] - counted[0]),
        "megabytes_training": peak.megabytes,
    }


def run(settings: Settings) -> Path:
    """Make data sets of every size, measure them in as many processes as are wanted, and write the results."""
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / "scale.json"
    rows: list[dict[str, float]] = []
    for size in settings.sizes:
        with tempfile.TemporaryDirectory(prefix="scale-") as temporary:
            folder = Path(temporary) / "data"
            make(folder, size)
            for processes in settings.processes:
                rows += [{"processes": processes, **row} for row in _launch(settings, folder, processes)]
        results = {"environment": checkpoint.environment(), "rows": rows, "slopes": slopes(rows)}
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{size:,} photos measured", file=sys.stderr, flush=True)
    print(format_table(rows))
    print(f"wrote {path}", file=sys.stderr)
    return path


def _launch(settings: Settings, folder: Path, processes: int) -> list[dict[str, float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, "-m", "benchmarks.scale", "--measure", folder, "--steps", settings.steps]
    shutil.rmtree(folder / "models", ignore_errors=True)
    output = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def slopes(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """What a million more captions cost the main process, between the smallest and the largest size."""
    per_million: dict[str, dict[str, float]] = {}
    for processes in sorted({row["processes"] for row in rows}):
        mine = [row for row in rows if row["processes"] == processes and row["process"] == 0]
        small, large = mine[0], mine[-1]
        if large["captions"] > small["captions"]:
            more = (large["captions"] - small["captions"]) / 1e6
            names = [name for name in small if name.startswith(("seconds", "megabytes"))]
            per_million[f"{processes} processes"] = {name: (large[name] - small[name]) / more for name in names}
    return per_million


def format_table(rows: list[dict[str, float]]) -> str:
    """The main process's measurements as a table of Markdown, a column a size and number of processes."""
    mine = [row for row in rows if row["process"] == 0]
    head = [f"{row['photos']:,} photos, {row['processes']} proc." for row in mine]
    lines = [["", *head], [":--", *["--:"] * len(mine)]]
    for name, text in ROWS.items():
        values = [row.get(name) for row in mine]
        lines.append([text, *("" if x is None else f"{x:,.1f}" if x < 1000 else f"{x:,.0f}" for x in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(settings: Settings) -> None:
    """Measure all sizes, or with --measure the one in a folder."""
    if settings.measure is None:
        run(settings)
        return
    rows = measure(settings.measure, settings.steps)
    if this_process().is_main_process:
        print(json.dumps(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
