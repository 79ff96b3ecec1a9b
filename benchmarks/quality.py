"""What captions are worth after as many epochs of the plain recipe and of this project, on the same frozen backbone.

    python -m benchmarks.quality        on the sample data set, after `make demo`; an hour on two cores

The recipe trains as `recipe.py` does, in batches of 32; the project as `train.py` does when it is told nothing, and
as `make demo` has it. Each captions the validation split greedily. Prints a table and writes it to
benchmarks/results/quality.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from tqdm import tqdm

from benchmarks import recipe
from benchmarks.speed import RECIPE_BATCH
from captioning import checkpoint
from captioning.captioner import Captioner
from captioning.errors import run_command
from captioning.metrics import score
from captioning.training import TrainingConfig, train
from data_loader import CaptionDataset
from evaluate import check_scenes, evaluate
from model import EncoderCNN

EMBED_SIZE, HIDDEN_SIZE = 256, 512  # the recipe's, and the project's where it is told nothing
DEMO = {"hidden_size": 256, "tie_weights": True, "dropout": 0.1, "batch_size": 24, "learning_rate": 3e-3}


@dataclass
class Settings:
    """What is trained, and for how long."""

    data: Path = Path("data/scenes")
    weights: Path = Path("models/scenes-backbone.pth")  # of the backbone, frozen
    image_size: int = 96  # of the square that the encoder sees
    epochs: int = 3
    results: Path = Path("benchmarks/results")


def caption_plainly(settings: Settings, val: CaptionDataset) -> dict[int, str]:
    """Train the plain recipe; returns its caption of each validation photo."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    photos = settings.data / "images" / "train"
    data = recipe.Captions(
        settings.data / "annotations" / "captions_train.json", photos, image_size=settings.image_size
    )
    encoder = recipe.Encoder(EMBED_SIZE)
    encoder.resnet.load_state_dict(EncoderCNN(EMBED_SIZE, weights=settings.weights).resnet.state_dict())
    decoder = recipe.Decoder(EMBED_SIZE, HIDDEN_SIZE, len(data.index))
    steps = settings.epochs * -(-len(data) // RECIPE_BATCH)
    losses = islice(recipe.train(data, encoder, decoder, RECIPE_BATCH, device), steps)
    for _ in tqdm(losses, "plain recipe", steps, disable=None):
        pass
    encoder, decoder = encoder.eval(), decoder.eval()
    ids = val.image_ids.tolist()
    return {i: recipe.caption(p, data, encoder, decoder, device) for i, p in zip(ids, val.paths, strict=True)}


def caption_with(settings: Settings, val: CaptionDataset, **fields: Any) -> dict[int, str]:
    """Train the project; returns its caption of each validation photo."""
    with TemporaryDirectory() as models:
        config = TrainingConfig(
            data=settings.data,
            models=Path(models),
            weights=str(settings.weights),
            image_size=settings.image_size,
            num_epochs=settings.epochs,
            print_every=10_000,
            **fields,
        )
        found = evaluate(Captioner.load(train(config)), val, java=False)
    return {i: caption.text for i, caption in found.captions.items()}


def run(settings: Settings) -> Path:
    """Train, caption and score; prints the table, writes the JSON and returns its path."""
    val = CaptionDataset(settings.data, "val", vocab_threshold=1)
    references = val.references()
    ways: dict[str, Callable[[], dict[int, str]]] = {
        "plain recipe": lambda: caption_plainly(settings, val),
        "train.py": lambda: caption_with(settings, val),
        "train.py as make demo has it": lambda: caption_with(settings, val, **DEMO),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, captions in ways.items():
        found = captions()
        metrics = {key: value for key, value in score(found, references).metrics.items() if value is not None}
        rows[name] = {**metrics, **check_scenes(val, found)}
    columns = list(rows["plain recipe"])
    print(f"| {settings.epochs} epochs | {' | '.join(columns)} |\n| :-- {'| --: ' * len(columns)}|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |")
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / "quality.json"
    results = {"environment": checkpoint.environment(), "epochs": settings.epochs, "rows": rows}
    checkpoint.write_file(path, lambda file: file.write(json.dumps(results, indent=1).encode()))
    print(f"wrote {path}", file=sys.stderr)
    return path


if __name__ == "__main__":
    run_command(lambda: run(tyro.cli(Settings, description=__doc__)))
