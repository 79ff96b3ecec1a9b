"""How fast the project is, against the plain recipe in the same run, on the same photos and captions.

    python -m benchmarks.speed                    on drawn photos
    python -m benchmarks.speed --photos FOLDER    on real ones

Prints a table, writes it with a profile to benchmarks/results/<device>.json and draws images/speed.png.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet50

import caption
from benchmarks import drawn, recipe
from benchmarks.report import draw, format_table
from captioning import checkpoint
from captioning.distributed import fast_dtype
from captioning.errors import InputError, run_command
from captioning.features import BATCH
from captioning.images import Photos, build_transform, read_batches
from captioning.training import TrainingConfig, train
from vocabulary import Vocabulary

GPU = torch.cuda.is_available()
RECIPE_BATCH = 32
VAL_PHOTOS = 16  # a few, so that the project can validate: the recipe does not


@dataclass
class Settings:
    """What is measured, and how much of it."""

    photos: Path | None = None  # a folder of real photos; drawn ones by default
    count: int = 4096 if GPU else 384  # photos at most, each with five captions
    image_size: int = 224  # of the square that the encoder sees
    recipe_steps: int = 20 if GPU else 4  # of the recipe's training that are timed; all take as long
    recipe_photos: int = 128 if GPU else 24  # photos that the recipe captions
    repeats: int = 3  # of every measurement but the recipe's start-up; the best counts
    start_up_photos: int = drawn.PHOTOS  # of the simulated data set
    start_up_captions: int = drawn.CAPTIONS
    workers: int = min(4, os.cpu_count() or 1)  # processes that read photos for the project
    results: Path = Path("benchmarks/results")  # where the JSON is written
    figure: Path = Path("images/speed.png")


def measure(settings: Settings) -> dict[str, Any]:
    """Measure everything and return what is written as JSON."""
    device = torch.device("cuda" if GPU else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("preparing photos, captions and weights")
        paths = find_photos(settings, folder)
        data, words = make_data_set(folder, paths)
        weights = make_weights(folder / "resnet50.pth", paths, settings.image_size)
        results: dict[str, Any] = {
            "device": device_name(),
            "environment": checkpoint.environment(),
            "threads": torch.get_num_threads(),
            "photos": "drawn" if settings.photos is None else "real",
            "photo_count": len(paths),
            "photo_kilobytes": sum(path.stat().st_size for path in paths) / len(paths) / 1000,
            "words": len(words),
        }
        say("training")
        model, results["training"] = measure_training(settings, folder, data, words, weights, device)
        say("captioning")
        results["captioning"] = measure_captioning(settings, data, words, model, paths, device)
        say("where the time goes")
        results["profile"] = measure_profile(settings, folder, data, weights, model, paths)
        say(f"start-up with {settings.start_up_captions} captions")
        results["start_up"] = measure_start_up(settings, folder / "simulated")
    return results


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"... {text}", file=sys.stderr, flush=True)


def device_name() -> str:
    """The GPU's name, or the processor's with the number of its cores."""
    if GPU:
        return torch.cuda.get_device_name()
    names = re.findall(r"model name\s*: (.*)", _text("/proc/cpuinfo")) or [platform.processor() or platform.machine()]
    return f"{names[0].strip()}, {os.cpu_count()} cores"


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


# What is measured on


def find_photos(settings: Settings, folder: Path) -> list[Path]:
    """The photos to train on and to caption."""
    if settings.photos is None:
        return drawn.draw_photos(folder / "photos", settings.count)
    found = caption.find_photos([settings.photos])[: settings.count]
    if len(found) <= VAL_PHOTOS:
        raise InputError(f"{settings.photos} holds {len(found)} photos; more than {VAL_PHOTOS} are needed.")
    return [path.resolve() for path in found]


def make_data_set(folder: Path, paths: list[Path]) -> tuple[Path, list[str]]:
    """The photos with five captions each as a data set, and a vocabulary of COCO's size."""
    captions = drawn.draw_captions(drawn.CAPTIONS)
    words = Vocabulary.build(captions, 5).words
    Vocabulary(words).save(folder / "vocab.json")
    for split, some in (("train", paths), ("val", paths[:VAL_PHOTOS])):
        (folder / "data" / "images" / split).mkdir(parents=True)
        for path in some:
            (folder / "data" / "images" / split / path.name).symlink_to(path)
        annotations = folder / "data" / "annotations" / f"captions_{split}.json"
        drawn.write_annotations(annotations, [path.name for path in some], captions[: 5 * len(some)])
    return folder / "data", words


def make_weights(path: Path, photos: list[Path], image_size: int) -> Path:
    """A random ResNet-50 whose batch norms know the photos, so that its numbers are of an ordinary size."""
    torch.manual_seed(0)
    backbone = resnet50(weights=None).train()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    images = Photos(photos, build_transform(False, image_size))
    with torch.no_grad():
        backbone(torch.stack([images[i] for i in range(8)]))
    torch.save(backbone.state_dict(), path)
    return path


# Training


def configure(folder: Path, data: Path, weights: Path, settings: Settings, **fields: Any) -> TrainingConfig:
    """The project's training as it is by default, but of a frozen backbone from a file."""
    return TrainingConfig(
        data=data,
        name="speed",
        models=folder / "models",
        weights=str(weights),
        fine_tune=0,
        image_size=settings.image_size,
        vocab_from_file=True,
        vocab_file=folder / "vocab.json",
        workers=settings.workers,
        **fields,
    )


def plain_captions(settings: Settings, data: Path, words: list[str]) -> recipe.Captions:
    """The same data set as the recipe reads it."""
    annotations, photos = data / "annotations" / "captions_train.json", data / "images" / "train"
    return recipe.Captions(annotations, photos, words=words, image_size=settings.image_size)


def run_training(config: TrainingConfig) -> tuple[Path, float]:
    """Train quietly: the model's folder and the seconds it took."""
    start = time.perf_counter()
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
        model = train(config)
    return model, time.perf_counter() - start


def measure_training(
    settings: Settings, folder: Path, data: Path, words: list[str], weights: Path, device: torch.device
) -> tuple[Path, dict[str, Any]]:
    """Captions/s over three epochs from the start: tokens, features, steps, validation and checkpoints."""
    config = configure(folder, data, weights, settings)
    annotations = data / "annotations" / "captions_train.json"
    plain = recipe.Captions(annotations, data / "images" / "train", words=words, image_size=settings.image_size)
    encoder = recipe.Encoder(config.embed_size)
    decoder = recipe.Decoder(config.embed_size, config.hidden_size, len(words))
    losses = recipe.train(plain, encoder, decoder, RECIPE_BATCH, device)
    next(losses)  # memory and kernels are had by then
    recipe_seconds, seconds, after = [], [], []
    for repeat in range(settings.repeats):
        start = time.perf_counter()
        for _ in range(settings.recipe_steps):
            next(losses)
        recipe_seconds.append(time.perf_counter() - start)
        config = configure(folder, data, weights, settings, cache=folder / f"cache-{repeat}")
        model, whole = run_training(config)
        seconds.append(whole)
        after.append(run_training(config)[1])
    captions = config.num_epochs * len(plain)
    per_caption = min(recipe_seconds) / settings.recipe_steps / RECIPE_BATCH
    return model, {
        "recipe_captions_per_second": 1 / per_caption,
        "recipe_steps_timed": settings.recipe_steps,
        "recipe_batch": RECIPE_BATCH,
        "captions_per_second": captions / min(seconds),
        "captions_seen": captions,
        "batch": config.batch_size,
        "seconds": min(seconds),
        "seconds_with_features_stored": min(after),
        "ratio": captions / min(seconds) * per_caption,
    }


# Captioning


def best(repeats: int, work: Callable[[], object]) -> float:
    """The seconds that the fastest of several runs took."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_captioning(
    settings: Settings, data: Path, words: list[str], model: Path, paths: list[Path], device: torch.device
) -> dict[str, Any]:
    """Photos/s from file to sentence, of one model, and how fast the backbone could be at most."""
    encoder, decoder, _, _ = checkpoint.load_model(model)
    annotations = data / "annotations" / "captions_val.json"
    plain = recipe.Captions(annotations, data / "images" / "val", words=words, image_size=settings.image_size)
    plain_encoder = recipe.Encoder(encoder.embed.out_features).to(device).eval()
    plain_encoder.load_state_dict(encoder.state_dict())
    plain_decoder = recipe.Decoder(encoder.embed.out_features, decoder.lstm.hidden_size, len(words)).to(device).eval()
    plain_decoder.load_state_dict(decoder.state_dict())
    captioner = caption.Captioner.load(model)
    backbone = encoder.resnet.to(device, fast_dtype(device), memory_format=torch.channels_last).eval()
    images = torch.randn(BATCH, 3, settings.image_size, settings.image_size, device=device)
    images = images.to(fast_dtype(device), memory_format=torch.channels_last)
    pixels = (images.float() * 40 + 128).clamp(0, 255).byte().cpu()
    pixels = pixels.pin_memory() if GPU else pixels
    times = 20 if GPU else 5

    def captioned_plainly(path: Path) -> str:
        return recipe.caption(path, plain, plain_encoder, plain_decoder, device)

    def captioned() -> list:
        return list(captioner.stream(paths, caption.Decoding(), settings.workers))

    @torch.inference_mode()
    def forward() -> None:
        for _ in range(times):
            backbone(images)

    @torch.inference_mode()
    def encode() -> None:
        for _ in range(times):
            captioner.encoder.features(pixels.to(device, non_blocking=True))

    some = paths[: settings.recipe_photos]
    transform = build_transform(False, settings.image_size, normalise=False)
    batches = [list(range(len(paths)))[i : i + BATCH] for i in range(0, len(paths), BATCH)]
    turns: list[tuple[str, int, Callable[[], object]]] = [
        (
            "recipe",
            len(some),
            lambda: [captioned_plainly(path) for path in some],
        ),
        ("project", len(paths), captioned),
        ("forward", times * BATCH, forward),
        ("encode", times * BATCH, encode),
        ("read", len(paths), lambda: list(read_batches(Photos(paths, transform), batches, settings.workers))),
    ]
    speed = dict.fromkeys((name for name, _, _ in turns), 0.0)
    for _ in range(settings.repeats):  # in turns, so that what else the machine does hits all alike
        for name, photos, work in turns:
            speed[name] = max(speed[name], photos / best(1, work))
    one = statistics.median(best(1, lambda path=path: captioner(path, caption.Decoding())) for path in some)
    recipe_one = statistics.median(best(1, lambda path=path: captioned_plainly(path)) for path in some)
    return {
        "recipe_photos_per_second": speed["recipe"],
        "photos_per_second": speed["project"],
        "ratio": speed["project"] / speed["recipe"],
        "recipe_seconds_for_one": recipe_one,
        "seconds_for_one": one,
        "ratio_for_one": recipe_one / one,
        "batch": BATCH,
        "bare_forward_photos_per_second": speed["forward"],
        "share_of_bare_forward": speed["project"] / speed["forward"],
        "encoder_from_memory_photos_per_second": speed["encode"],
        "reading_photos_per_second": speed["read"],
    }


# Where the time goes


def measure_profile(
    settings: Settings, folder: Path, data: Path, weights: Path, model: Path, paths: list[Path]
) -> dict[str, Any]:
    """The operations that take most of the main process in a training epoch and in captioning."""
    config = configure(folder, data, weights, settings, cache=folder / "cache-0", num_epochs=1)
    captioner = caption.Captioner.load(model)
    decoding = caption.Decoding()
    return {
        "training_epoch": top_operations(lambda: run_training(config)),
        "captioning": top_operations(lambda: list(captioner.stream(paths, decoding, settings.workers))),
    }


def top_operations(work: Callable[[], object], count: int = 12) -> dict[str, list[dict[str, Any]]]:
    """The operations with most time of their own, on the CPU and on the GPU: name, seconds, share, calls."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        work()
    top = {}
    for place in ("cpu", "device")[: len(activities)]:
        self_time = f"self_{place}_time_total"  # in microseconds
        spent = {e.key: (getattr(e, self_time) / 1e6, e.count) for e in profiler.key_averages()}
        total = sum(seconds for seconds, _ in spent.values())
        order = sorted(spent.items(), key=lambda item: -item[1][0])[:count]
        top[place] = [
            {"operation": key, "seconds": seconds, "share": seconds / total, "calls": calls}
            for key, (seconds, calls) in order
        ]
    return top


# Start-up


def measure_start_up(settings: Settings, folder: Path) -> dict[str, Any]:
    """Seconds from the caption file to a vocabulary and captions as tokens, and the process's peak memory.

    Each in a process of its own; what it takes to import libraries is not counted, but their memory is.
    """
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(settings.start_up_photos)]
    annotations = folder / "annotations" / "captions_train2014.json"
    drawn.write_annotations(annotations, names, drawn.draw_captions(settings.start_up_captions))
    photos = folder / "images" / "train2014"
    photos.mkdir(parents=True)
    for name in names:
        (photos / name).touch()
    recipe_seconds, recipe_peak = start("recipe", annotations)
    cold, warm = [], []
    for repeat in range(settings.repeats):
        cold.append(start("project", folder, folder / f"cache-{repeat}"))
        warm.append(start("project", folder, folder / f"cache-{repeat}"))
    cold_seconds, warm_seconds = (min(seconds for seconds, _ in runs) for runs in (cold, warm))
    return {
        "photos": settings.start_up_photos,
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
    """Seconds and peak MB of `benchmarks.start_up` in a fresh Python."""
    command = [sys.executable, "-m", "benchmarks.start_up", which, *map(str, paths)]
    root = Path(__file__).parents[1]
    seconds, peak = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True).stdout.split()
    return float(seconds), float(peak)


def run(settings: Settings) -> Path:
    """Measure, print the table, write the JSON and draw the bars; returns the JSON's path."""
    results = measure(settings)
    print(format_table(results))
    name = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    path = settings.results / f"{name}.json"
    settings.results.mkdir(parents=True, exist_ok=True)
    checkpoint.write_file(path, lambda file: file.write(json.dumps(results, indent=1).encode()))
    caption.save_figure(draw(results), settings.figure)
    return path


if __name__ == "__main__":
    run_command(lambda: run(tyro.cli(Settings)))
