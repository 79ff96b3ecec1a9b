"""Speed of the project and of the plain recipe, measured in the same run on the same images and captions.

    python -m benchmarks.speed                    on drawn images
    python -m benchmarks.speed --images FOLDER    on real images

Prints a table, writes it with a profile to benchmarks/results/<device>.json and draws images/speed.png.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import drawn
from benchmarks.captioning_speed import RESNET, measure_captioning
from benchmarks.material import Material, Settings, prepare
from benchmarks.peer import measure_peer
from benchmarks.report import draw, format_table
from benchmarks.timing import device_name, log, seconds_of, top_operations
from benchmarks.training_speed import measure_decoders, measure_training, run_training
from captioning.captioner import Captioner, Decoding
from captioning.checkpoint import environment
from captioning.errors import run_command
from captioning.figures import check_figure, save_figure
from captioning.files import check_output, write_file


def measure(settings: Settings) -> dict[str, Any]:
    """Measure everything and return the results to be written as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log("preparing images, captions and weights")
        material = prepare(settings, folder)
        paths = material.paths
        results: dict[str, Any] = {
            "device": device_name(),
            "environment": environment(),
            "threads": torch.get_num_threads(),
            "photos": "drawn" if settings.images is None else "real",
            "photo_count": len(paths),
            "photo_kilobytes": sum(path.stat().st_size for path in paths) / len(paths) / 1000,
            "words": len(material.vocab),
        }
        log("training")
        model, training = measure_training(material)
        results["training"] = training
        log("the decoders")
        results["decoders"] = measure_decoders(material, training["recipe_captions_per_second"])
        log("captioning")
        captioning = results["captioning"] = measure_captioning(material, model)
        log("the first caption of a program")
        results["first_caption"] = measure_first_caption(material)
        log("the peer")
        image_rate = captioning["backbones"][RESNET]["photos_per_second"]
        results["peer"] = measure_peer(material, training["captions_per_second"], image_rate)
        log("where the time goes")
        results["profile"] = measure_profile(material, model)
        log(f"start-up with {settings.start_up_captions} captions")
        results["start_up"] = measure_start_up(settings, folder / "simulated")
    return results


def measure_first_caption(material: Material) -> dict[str, float]:
    """Measure the seconds from the start to the end of a program that captions one image: the recipe's, and caption.py.

    caption.py takes models/photos; the recipe has random weights, which it need not read.
    """
    image, annotations = material.paths[0], material.data / "annotations" / "captions_val.json"
    commands = {
        "recipe_seconds": ["-m", "benchmarks.recipe", image, annotations],
        "seconds": ["caption.py", image, "--model", "models/photos"],
    }
    best = dict.fromkeys(commands, math.inf)
    for _ in range(material.settings.repeats):
        for name, arguments in commands.items():
            best[name] = min(best[name], seconds_of(lambda arguments=arguments: run_python(*arguments)))
    return {**best, "ratio": best["recipe_seconds"] / best["seconds"]}


def measure_profile(material: Material, model: Path) -> dict[str, Any]:
    """Profile the main process: the operations that take the most time in a training epoch and in captioning."""
    config = material.configure(cache=material.folder / "cache-0", num_epochs=1)
    captioner, workers = Captioner.load(model), material.settings.workers
    return {
        "training_epoch": top_operations(lambda: run_training(config)),
        "captioning": top_operations(lambda: list(captioner.stream(material.paths, Decoding(), workers))),
    }


def measure_start_up(settings: Settings, folder: Path) -> dict[str, Any]:
    """Measure the seconds from the caption file to a vocabulary and captions as tokens, and the peak memory.

    Each measurement runs in its own process. The time to import libraries is not counted, but their memory is.
    """
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(settings.start_up_images)]
    annotations = folder / "annotations" / "captions_train2014.json"
    drawn.write_annotations(annotations, names, drawn.draw_captions(settings.start_up_captions))
    images = folder / "images" / "train2014"
    images.mkdir(parents=True)
    for name in names:
        (images / name).touch()
    recipe_seconds, recipe_peak = start("recipe", annotations)
    cold, warm = [], []
    for repeat in range(settings.repeats):
        cold.append(start("project", folder, folder / f"cache-{repeat}"))
        warm.append(start("project", folder, folder / f"cache-{repeat}"))
    cold_seconds, warm_seconds = (min(seconds for seconds, _ in runs) for runs in (cold, warm))
    return {
        "photos": settings.start_up_images,
        "captions": settings.start_up_captions,
        "recipe_seconds": recipe_seconds,
        "cold_seconds": cold_seconds,
        "warm_seconds": warm_seconds,
        "ratio_cold": recipe_seconds / cold_seconds,
        "ratio_warm": recipe_seconds / warm_seconds,
        "recipe_peak_megabytes": recipe_peak,
        "cold_peak_megabytes": max(peak for _, peak in cold),
        "warm_peak_megabytes": max(peak for _, peak in warm),
    }


def start(which: str, *paths: Path) -> tuple[float, float]:
    """Run `benchmarks.start_up` in a new process; returns its seconds and its peak memory in MB."""
    seconds, peak = run_python("-m", "benchmarks.start_up", which, *paths).split()
    return float(seconds), float(peak)


def run_python(*arguments: str | Path) -> bytes:
    """Run Python in the project's folder; returns what it printed."""
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, *arguments], cwd=root, stdout=subprocess.PIPE, check=True).stdout


def run(settings: Settings) -> Path:
    """Measure, print the tables, write the JSON file and draw the bars; returns the path of the JSON file."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    path = settings.results / f"{name}.json"
    check_output(path)
    check_figure(settings.figure)
    results = measure(settings)
    print(format_table(results))
    write_file(path, lambda file: file.write(json.dumps(results, indent=1).encode()))
    save_figure(draw(results), settings.figure)
    return path


if __name__ == "__main__":
    run_command(lambda: run(tyro.cli(Settings, description=__doc__)))
