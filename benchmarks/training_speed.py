"""Training: three epochs of the recipe and of the project, and the steps of each decoder and objective alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks import recipe
from benchmarks.material import Material, Settings, make_empty_data_set
from benchmarks.timing import DEVICE, best_rates, seconds_of
from captioning.backbones import RESNET50
from captioning.batches import place_features
from captioning.config import TrainingConfig
from captioning.training import Run, train
from model import DECODERS

RECIPE_BATCH = 32
WARM_UP = 2  # steps that are not timed
LENGTH_STEPS = 60  # steps after which a decoder ends its captions
GRID_SIZE = 4  # rows and columns of cells where the decoder attends
ATTENDING = [name for name, decoder in DECODERS.items() if decoder.attends]
LARGE_GRID = {"backbone": "tf_efficientnet_lite2", "grid_size": 8}  # 64 cells of 1,280 channels


def run_training(config: TrainingConfig) -> Path:
    """Train quietly; returns the model's folder."""
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
        return train(config)


def measure_training(material: Material) -> tuple[Path, dict[str, Any]]:
    """Measure captions/s over three epochs from the start: tokens, features, steps, validation and checkpoints.

    Returns the folder of the trained model and the measurements.
    """
    settings, config = material.settings, material.configure()
    annotations = material.data / "annotations" / "captions_train.json"
    words, size = material.vocab.words, settings.image_size
    plain = recipe.Captions(annotations, material.data / "images" / "train", words=words, image_size=size)
    encoder = recipe.Encoder(config.embed_size)
    decoder = recipe.Decoder(config.embed_size, config.hidden_size, len(words))
    losses = recipe.train(plain, encoder, decoder, RECIPE_BATCH, DEVICE)
    next(losses)  # a warm-up step, which allocates memory and chooses kernels
    recipe_seconds, seconds, after = [], [], []
    for repeat in range(settings.repeats):
        recipe_seconds.append(seconds_of(lambda: list(islice(losses, settings.recipe_steps))))
        config = material.configure(cache=material.folder / f"cache-{repeat}")
        seconds.append(seconds_of(lambda config=config: run_training(config)))
        after.append(seconds_of(lambda config=config: run_training(config)))
    captions = config.num_epochs * len(plain)
    recipe_rate = settings.recipe_steps * RECIPE_BATCH / min(recipe_seconds)
    return config.models / config.name, {
        "recipe_captions_per_second": recipe_rate,
        "recipe_steps_timed": settings.recipe_steps,
        "recipe_batch": RECIPE_BATCH,
        "captions_per_second": captions / min(seconds),
        "captions_seen": captions,
        "batch": config.batch_size,
        "seconds": min(seconds),
        "seconds_with_features_stored": min(after),
        "ratio": captions / min(seconds) / recipe_rate,
    }


def measure_decoders(material: Material, recipe_rate: float) -> dict[str, dict[str, float]]:
    """Measure captions/s in steps of each decoder on made-up features, of cross-entropy and then self-critical ones.

    recipe_rate: captions/s of the recipe's training, for the ratios.
    """
    data = make_empty_data_set(material.folder / "empty", material.settings.decoder_images)
    runs = {name: prepare_decoder(material, data, name) for name in DECODERS}
    large = {f"{name}, 64 cells": prepare_decoder(material, data, name, **LARGE_GRID) for name in ATTENDING}
    rates = measure_steps({**runs, **large}, material.settings)
    for run in runs.values():
        prepare_self_critical(run)
    rates |= {f"{name}, self-critical": rate for name, rate in measure_steps(runs, material.settings).items()}
    return {
        name: {"captions_per_second": rate, "ratio": rate / recipe_rate, "share_of_lstm": rate / rates["lstm"]}
        for name, rate in rates.items()
    }


def measure_steps(runs: dict[str, Run], settings: Settings) -> dict[str, float]:
    """Measure the captions/s of each run's steps."""
    for run in runs.values():
        train_steps(run, WARM_UP)
    turns: dict[str, Callable[[], int]] = {
        name: lambda run=run: train_steps(run, settings.decoder_steps) for name, run in runs.items()
    }
    return best_rates(turns, settings.repeats)


def prepare_decoder(
    material: Material, data: Path, name: str, backbone: str = RESNET50, grid_size: int = GRID_SIZE
) -> Run:
    """Prepare a training run of one decoder on made-up features of a frozen backbone."""
    attends = DECODERS[name].attends
    config = material.configure(
        data=data,
        name=f"steps-{name}-{backbone}",
        backbone=backbone,
        weights="random",
        decoder=name,
        grid_size=grid_size if attends else None,
        cache=material.folder / "cache-empty",
    )
    run = Run(config, config.models / config.name)
    run.encoder.to(run.device)
    cells = (grid_size**2,) if attends else ()
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(len(run.data.paths), 1, *cells, run.encoder.feature_size, generator=generator).half()
    run.features, run.val_features = place_features(features, run.device), None
    run.prepare(None)
    return run


def prepare_self_critical(run: Run) -> None:
    """Turn a run to self-critical training, once its decoder has learned how long captions are."""
    train_steps(run, LENGTH_STEPS)
    run.config.objective = "cider"
    run.config.learning_rate = 1e-6  # captions keep their lengths, on which the rate depends
    run.prepare(None)


def train_steps(run: Run, steps: int) -> int:
    """Train for the first steps of an epoch, the same batches every time; returns their number of captions."""
    run.model.train()
    captions = 0
    for step, (whole, has_share, batch) in enumerate(islice(run.batches.epoch(1, 0, run.device), steps), 1):
        run.train_step(step, whole, has_share, batch)
        captions += run.objective.count(run.data.lengths[whole], run.decoder)[1]
    return captions
