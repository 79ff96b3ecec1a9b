"""The material of the speed benchmark: images, a data set with a vocabulary of COCO's size, and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision.models import resnet50

from benchmarks import drawn
from benchmarks.timing import GPU
from captioning.errors import InputError
from captioning.files import missing_file
from captioning.images import WORKERS, ImageDataset, build_transform
from captioning.listing import find_images
from captioning.training import TrainingConfig
from vocabulary import Vocabulary

VAL_IMAGES = 16  # validation images; the project validates, the recipe does not


@dataclass
class Settings:
    """What is measured, and how much of it."""

    images: Path | None = None  # folder of real images; by default, images are drawn
    count: int = 4096 if GPU else 384  # maximum number of images, each with five captions
    image_size: int = 224  # side of the input of ResNet-50 and the peer, in pixels
    lite_image_size: int | None = None  # side of the input of EfficientNet-Lite2, in pixels; its own by default
    recipe_steps: int = 20 if GPU else 4  # timed training steps of the recipe and the peer; all steps take equally long
    recipe_images: int = 128 if GPU else 24  # images that the recipe captions
    decoder_steps: int = 60 if GPU else 8  # timed training steps of each decoder
    decoder_images: int = 20_000 if GPU else 2_000  # images of the data set for these steps, with five captions each
    repeats: int = 3  # of every measurement except the latencies and the recipe's start-up; the best counts
    start_up_images: int = drawn.IMAGES  # images of the simulated data set
    start_up_captions: int = drawn.CAPTIONS  # captions of the simulated data set
    workers: int = WORKERS  # processes that read images for the project and the peer
    results: Path = Path("benchmarks/results")  # folder for the JSON file
    figure: Path = Path("images/speed.png")


@dataclass
class Material:
    """The images at `paths`, a data set of them in `data`, and a ResNet-50 in the file `weights`; all in `folder`."""

    settings: Settings
    folder: Path
    paths: list[Path]
    data: Path
    vocab: Vocabulary
    weights: Path

    def configure(self, **fields: Any) -> TrainingConfig:
        """Configure a training run with the defaults of train.py, but with a frozen backbone from a file."""
        defaults = {
            "data": self.data,
            "name": "speed",
            "models": self.folder / "models",
            "weights": str(self.weights),
            "fine_tune": 0,
            "image_size": self.settings.image_size,
            "vocab_from_file": True,
            "vocab_file": self.folder / "vocab.json",
            "workers": self.settings.workers,
        }
        return TrainingConfig(**{**defaults, **fields})


def prepare(settings: Settings, folder: Path) -> Material:
    """Draw or find the images, and write the data set and the weights into the folder."""
    paths = choose_images(settings, folder)
    data, vocab = make_data_set(folder, paths)
    weights = make_weights(folder / "resnet50.pth", paths, settings.image_size)
    return Material(settings, folder, paths, data, vocab, weights)


def choose_images(settings: Settings, folder: Path) -> list[Path]:
    """Draw or find the images to train on and to caption."""
    if settings.images is None:
        return drawn.draw_images(folder / "drawn", settings.count)
    if not settings.images.exists():
        raise missing_file(settings.images)
    paths = [path for path in find_images([settings.images]) if isinstance(path, Path)][: settings.count]
    if len(paths) <= VAL_IMAGES:
        raise InputError(f"{settings.images} holds {len(paths)} images; more than {VAL_IMAGES} are needed.")
    return [path.resolve() for path in paths]


def make_data_set(folder: Path, paths: list[Path]) -> tuple[Path, Vocabulary]:
    """Make a data set of the images with five captions each, and a vocabulary of COCO's size."""
    captions = drawn.draw_captions(drawn.CAPTIONS)
    vocab = Vocabulary.build(captions, 5)
    vocab.save(folder / "vocab.json")
    for split, some in (("train", paths), ("val", paths[:VAL_IMAGES])):
        (folder / "data" / "images" / split).mkdir(parents=True)
        names = [f"{i:06}-{path.name}" for i, path in enumerate(some)]  # folders may hold images of the same name
        for name, path in zip(names, some, strict=True):
            (folder / "data" / "images" / split / name).symlink_to(path)
        annotations = folder / "data" / "annotations" / f"captions_{split}.json"
        drawn.write_annotations(annotations, names, captions[: 5 * len(some)])
    return folder / "data", vocab


def make_empty_data_set(folder: Path, images: int) -> Path:
    """Make a data set of empty files with five captions each, for training runs on made-up features."""
    for split, count in (("train", images), ("val", VAL_IMAGES)):
        names = [f"{i:012d}.jpg" for i in range(count)]
        (folder / "images" / split).mkdir(parents=True)
        for name in names:
            (folder / "images" / split / name).touch()
        annotations = folder / "annotations" / f"captions_{split}.json"
        drawn.write_annotations(annotations, names, drawn.draw_captions(5 * count))
    return folder


def make_weights(path: Path, paths: list[Path], image_size: int) -> Path:
    """Write a random ResNet-50 with batch norms fitted to the images, so that features have a usual scale."""
    torch.manual_seed(0)
    backbone = resnet50(weights=None).train()
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    images = ImageDataset(paths, build_transform(False, image_size))
    with torch.no_grad():
        backbone(torch.stack([images[i] for i in range(8)]))
    torch.save(backbone.state_dict(), path)
    return path
