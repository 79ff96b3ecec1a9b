"""Time and memory as the data set grows from 1,000 images to 1,000,000, in one process and in two.

    python -m benchmarks.scale                            needs 6 GB of disk temporarily
    python -m benchmarks.scale --sizes 1000 10000         the two smaller sizes

The images are empty files, as they are not read; their features are made up, and their captions, five per image, have
the statistics of COCO's (`drawn.py`). Training is the project's own `train`, stopped within its first epoch. Writes the
results, with the slopes, to benchmarks/results/scale.json after every size, and prints a table.
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
from captioning.distributed import this_process
from captioning.errors import run_command
from captioning.files import check_output, write_file
from captioning.listing import stream_images
from data_loader import CaptionDataset, LengthBatches

CAPTIONS_PER_IMAGE = 5
FEATURE_SIZE = 2048  # of ResNet-50
CHUNK = 100_000  # captions that are drawn at once
ROWS = {  # rows of the printed table: key of the measurement -> label
    "captions": "captions",
    "words": "words that occur five times or more",
    "seconds_cold": "reading the captions for the first time, s",
    "seconds_warm": "reading the captions again, s",
    "seconds_folder": "listing the images in order, s",
    "seconds_order": "ordering an epoch, s",
    "seconds_to_first_step": "time to the first training step, s",
    "captions_per_second": "training on stored features, captions/s",
    "megabytes_of_arrays": "arrays of captions and names, MB",
    "megabytes_beyond_arrays": "further memory without libraries, MB",
    "megabytes_cold": "peak while reading for the first time, MB",
    "megabytes_training": "peak in training, MB",
}


@dataclass
class Settings:
    """What is measured."""

    sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)  # images
    processes: tuple[int, ...] = (1, 2)
    steps: int = 40  # of training, of 128 captions each; the first third is not counted
    results: Path = Path("benchmarks/results")  # folder for the JSON file
    measure: Path | None = None  # measure only the data set in this folder, in this process


def megabytes() -> float:
    """Return the memory of this process in MB, without memory-mapped files."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1000


class Peak:
    """A context manager that measures the peak memory in MB, sampled fifty times a second, and the seconds."""

    def __enter__(self) -> Peak:
        self.megabytes, self.start, self.ended = megabytes(), time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.ended.wait(0.02):
            self.megabytes = max(self.megabytes, megabytes())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.ended.set()
        self.thread.join()
        self.megabytes = max(self.megabytes, megabytes())


def make(folder: Path, image_count: int) -> None:
    """Write a data set of `image_count` training and 100 validation images, and their features."""
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
    """Return the size of a data set's arrays in MB."""
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
    """Measure a data set in this process; returns the measurements of all processes, one dictionary each."""
    process = this_process()
    row: dict[str, float] = {"process": process.process_index}
    first = process.is_main_process and not (folder / "cache").exists()
    process.wait_for_everyone()
    CaptionDataset(folder, "val", vocab_threshold=1, cache=folder / "cache")  # a warm-up, before memory is measured
    before = megabytes()
    if first:  # one process reads the captions for all
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
    """Run some steps of the project's own training on the made-up features."""
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
    """Make data sets of every size, measure each with every number of processes, and write the results."""
    path = settings.results / "scale.json"
    check_output(path)
    rows: list[dict[str, float]] = []
    for size in settings.sizes:
        with tempfile.TemporaryDirectory(prefix="scale-") as temporary:
            folder = Path(temporary) / "data"
            make(folder, size)
            for processes in settings.processes:
                rows += [{"processes": processes, **row} for row in _launch(settings, folder, processes)]
        results = {"environment": checkpoint.environment(), "rows": rows, "slopes": slopes(rows)}
        content = json.dumps(results, indent=1).encode() + b"\n"
        write_file(path, lambda file, content=content: file.write(content))
        print(f"{size:,} images measured", file=sys.stderr, flush=True)
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
    """Compute what a million more captions cost the main process, between the smallest and the largest size."""
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
    """Format the main process's measurements as a Markdown table with a column per size and number of processes."""
    mine = [row for row in rows if row["process"] == 0]
    head = [f"{row['photos']:,} images, {row['processes']} proc." for row in mine]
    lines = [["", *head], [":--", *["--:"] * len(mine)]]
    for name, text in ROWS.items():
        values = [row.get(name) for row in mine]
        lines.append([text, *("" if x is None else f"{x:,.1f}" if x < 1000 else f"{x:,.0f}" for x in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(settings: Settings) -> None:
    """Measure all sizes or, with --measure, the data set in a folder."""
    if settings.measure is None:
        run(settings)
        return
    rows = measure(settings.measure, settings.steps)
    if this_process().is_main_process:
        print(json.dumps(rows))


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Settings, description=__doc__)))
