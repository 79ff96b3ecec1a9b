"""Scores of the plain recipe and of this project after the same number of epochs, on the same frozen backbone.

    python -m benchmarks.quality        on the sample data set, drawn by `python scenes.py data/scenes`

The recipe trains as `recipe.py` does, in batches of 32; the project trains with its defaults, and with
configs/scenes.toml. All three have the backbone and the image size of configs/scenes.toml, and caption the validation
split greedily. Prints a table and writes it to benchmarks/results/quality.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from tqdm import tqdm

from benchmarks import recipe
from benchmarks.timing import DEVICE
from benchmarks.training_speed import RECIPE_BATCH
from captioning.captioner import Captioner, Decoding
from captioning.checkpoint import environment, resolve_weights
from captioning.config import TrainingConfig, load_config
from captioning.errors import run_command
from captioning.files import check_output, write_file
from captioning.metrics import score
from captioning.training import train
from data_loader import CaptionDataset, find_split
from evaluate import evaluate, score_attributes
from model import EncoderCNN

EMBED_SIZE, HIDDEN_SIZE = 256, 512  # of the recipe; the project has the same defaults


@dataclass
class Settings:
    """What is trained, and for how long."""

    config: Path = Path("configs/scenes.toml")  # recipe of train.py; its backbone and image size are those of all runs
    data: Path | None = None  # data set folder; that of the config by default
    epochs: int = 3
    results: Path = Path("benchmarks/results")  # folder for the JSON file


def caption_plainly(config: TrainingConfig, val: CaptionDataset) -> dict[int, str]:
    """Train the plain recipe on the config's backbone; returns its captions of the validation images, by image id."""
    torch.manual_seed(0)
    annotations, images = find_split(config.data, "train", config.cache)
    inputs = config.preprocessing
    data = recipe.Captions(annotations, images, image_size=inputs.image_size, mean=inputs.mean, std=inputs.std)
    ours = EncoderCNN(EMBED_SIZE, config.backbone, resolve_weights(config.weights, config.backbone))
    encoder = recipe.Encoder(EMBED_SIZE, ours.network, ours.feature_size)
    decoder = recipe.Decoder(EMBED_SIZE, HIDDEN_SIZE, len(data.index))
    steps = config.num_epochs * -(-len(data) // RECIPE_BATCH)
    losses = islice(recipe.train(data, encoder, decoder, RECIPE_BATCH, DEVICE), steps)
    for _ in tqdm(losses, "plain recipe", steps, disable=None):
        pass
    encoder, decoder = encoder.eval(), decoder.eval()
    ids, paths = val.image_ids.tolist(), [path for path in val.paths if isinstance(path, Path)]
    return {i: recipe.caption(p, data, encoder, decoder, DEVICE) for i, p in zip(ids, paths, strict=True)}


def caption_with(config: TrainingConfig, val: CaptionDataset) -> dict[int, str]:
    """Train the project; returns its captions of the validation images, by image id."""
    with TemporaryDirectory() as models:
        config.models = Path(models)
        evaluation = evaluate(Captioner.load(train(config)), val, Decoding(), java=False)
    assert evaluation is not None  # it is None in further processes
    return evaluation.hypotheses()


def run(settings: Settings) -> Path:
    """Train, caption and score; prints the table, writes the JSON and returns its path."""
    path = settings.results / "quality.json"
    check_output(path)
    overrides = {} if settings.data is None else {"data": settings.data}
    config = load_config(settings.config, num_epochs=settings.epochs, print_every=10_000, **overrides)
    shared = ("data", "backbone", "weights", "image_size", "fine_tune", "num_epochs", "print_every")
    default = TrainingConfig(**{field: getattr(config, field) for field in shared})
    val = CaptionDataset(config.data, "val", vocab_threshold=1)
    references = val.references()
    ways: dict[str, Callable[[], dict[int, str]]] = {
        "plain recipe": lambda: caption_plainly(config, val),
        "train.py": lambda: caption_with(default, val),
        f"train.py --config {settings.config.name}": lambda: caption_with(config, val),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        captions = way()
        metrics = {key: value for key, value in score(captions, references).metrics.items() if value is not None}
        rows[name] = {**metrics, **score_attributes(val, captions)}
    columns = list(rows["plain recipe"])
    print(f"| {settings.epochs} epochs | {' | '.join(columns)} |\n| :-- {'| --: ' * len(columns)}|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |")
    about = {"environment": environment(), "backbone": config.backbone, "image_size": config.preprocessing.image_size}
    results = {**about, "epochs": settings.epochs, "rows": rows}
    write_file(path, lambda file: file.write(json.dumps(results, indent=1).encode()))
    print(f"wrote {path}", file=sys.stderr)
    return path


if __name__ == "__main__":
    run_command(lambda: run(tyro.cli(Settings, description=__doc__)))
