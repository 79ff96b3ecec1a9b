"""Images as people see them, and as a network takes them: read, transformed, in batches."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from tqdm.auto import tqdm

from captioning.errors import InputError
from captioning.files import CACHE
from captioning.shards import Member


def build_transform(
    train: bool = False,
    image_size: int = 224,
    normalise: bool = True,
    crop: str = "center",
    crop_pct: float = 224 / 256,
    interpolation: str = "bilinear",
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> T.Compose:
    """The transform of a PIL image into a backbone's input, by default the original recipe's.

    It resizes the shorter side (to 256 for a crop of 224), crops the center and normalises; in training the crop is
    random and half the images are flipped. `backbones.Preprocessing` explains the arguments, and its fields are the
    arguments for any backbone: `build_transform(train, **asdict(preprocessing))`. Without `normalise` the result stays
    uint8, (3, image_size, image_size), a quarter of the memory, and `EncoderCNN` normalises it on its own device.
    """
    how = T.InterpolationMode(interpolation)
    if crop == "center":
        resize = [T.Resize(round(image_size / crop_pct), how)]
        cut = [T.RandomCrop(image_size)] if train else [T.CenterCrop(image_size)]
    elif train:
        resize, cut = [], [T.RandomResizedCrop(image_size, (0.6, 1.0), (0.8, 1.25), how)]
    else:
        resize, cut = [T.Resize((image_size, image_size), how)], []
    flip = [T.RandomHorizontalFlip()] if train else []
    tensor = [T.ToTensor(), T.Normalize(mean, std)] if normalise else [T.PILToTensor()]
    return T.Compose([*resize, *cut, *flip, *tensor])


def read_photo(source: str | Path | Member | Image.Image, shorter_side: int | None = None) -> Image.Image:
    """A photo as people see it: upright, in 8-bit RGB, transparency over white, the first frame of many.

    A JPEG is decoded at a half, a quarter or an eighth of its size where that leaves `shorter_side` at
    least two times over, which saves most of the time and changes nothing that a resize would keep.
    Raises `InputError` with the file's name for whatever cannot be read.
    """
    name = "the image" if isinstance(source, Image.Image) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = source
            if not isinstance(source, Image.Image):
                image = Image.open(BytesIO(source.read()) if isinstance(source, Member) else source)
            if image.format == "EPS":  # which Pillow has another program run
                raise ValueError("EPS is a program that draws a picture")
            if shorter_side and image is not source:
                image.draft("RGB", (2 * shorter_side, 2 * shorter_side))
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):  # 16 or 32 bits: Pillow's own conversion would clip
                pixels = np.asarray(image, dtype=np.float64)
                white = 65535 if image.mode != "F" else max(float(pixels.max()), 1e-9)
                image = Image.fromarray((pixels / white * 255).clip(0, 255).astype(np.uint8))
            if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; check the path.") from None
    except Exception as error:  # a broken file makes Pillow's decoders raise nearly anything
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{name} cannot be read as a photo ({reason}).") from None


class Photos(Dataset):
    """The photos at `paths` (or PIL images), transformed; `photos[index]` or, for another draw, `photos[index, seed]`.

    A random transform draws from the seed and the index alone, so that what a worker returns depends on
    neither the number of workers nor on what was read before.
    """

    def __init__(self, paths: Sequence[str | Path | Member | Image.Image], transform: Callable):
        self.paths = paths
        self.transform = transform
        steps = getattr(transform, "transforms", [])
        sizes = [step.size for step in steps if isinstance(step, T.Resize)]
        self.shorter_side = sizes[0] if sizes and isinstance(sizes[0], int) else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]))
            return self.transform(read_photo(self.paths[index], self.shorter_side))


class _Attempts(Dataset):
    """The photos of `keys`, or in the place of one that cannot be read, its `InputError`."""

    def __init__(self, photos: Photos):
        self.photos = photos

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor | InputError:
        try:
            return self.photos[key]
        except InputError as error:
            return error


def _ignore_signals(_: int) -> None:
    """A worker ends with its parent, which decides what an interruption means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def read_batches(
    photos: Photos,
    batches: Iterable[list],
    workers: int = 0,
    unreadable: Callable[[int, InputError], object] | None = None,
) -> Iterator[tuple[list, Tensor]]:
    """Read batches of photos ahead in `workers` processes: yields each batch's keys and its photos, stacked.

    A photo that cannot be read is passed to `unreadable` and left out of its batch (which may leave it
    empty); without that, its `InputError` is raised.
    """
    pin = torch.cuda.is_available()
    batches = list(batches)
    loader = DataLoader(
        _Attempts(photos),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_ignore_signals,
    )
    for keys, items in zip(batches, loader, strict=True):
        kept = []
        for key, item in zip(keys, items, strict=True):
            if not isinstance(item, InputError):
                kept.append(key)
            elif unreadable is None:
                raise item
            else:
                unreadable(key[0] if isinstance(key, tuple) else key, item)
        stacked = torch.stack([item for item in items if not isinstance(item, InputError)]) if kept else torch.empty(0)
        yield kept, stacked.pin_memory() if pin else stacked


class _Attempted(Photos):
    """Photos read at an eighth of their size where their format allows it, which still reads every byte of them."""

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:
        read_photo(self.paths[int(key)], shorter_side=1)
        return torch.empty(0)


def find_unreadable(paths: Sequence[Path | Member], workers: int = 0, cache: Path = CACHE) -> dict[int, InputError]:
    """Read every photo once, in `workers` processes: the indices of those that cannot be read, and why.

    Of the same photos, by their names, sizes and dates, the next time only these are read again.
    """
    about = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        about.update(f"{path.absolute()}\n{stat.st_size}\n{stat.st_mtime_ns}\n".encode())
    kept = cache / "unreadable" / f"{about.hexdigest()[:32]}.json"
    rows: Sequence[int] = range(len(paths))
    with suppress(OSError, ValueError):
        rows = json.loads(kept.read_bytes())
    failed: dict[int, InputError] = {}
    batches = [rows[i : i + 64] for i in range(0, len(rows), 64)]
    for _ in tqdm(
        read_batches(_Attempted(paths, None), batches, workers, failed.__setitem__),
        total=len(batches),
        desc="checking photos",
        delay=2,
        disable=None,
    ):
        pass
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = kept.with_name(f"{kept.stem}.{os.getpid()}.new")
    beside.write_text(json.dumps(sorted(failed)))
    os.replace(beside, kept)
    return failed
