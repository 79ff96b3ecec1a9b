"""Photos and captions of a data set laid out as COCO is, as batches.

    <folder>/annotations/captions_{train,val,test}<year>.json, image_info_test<year>.json
    <folder>/images/{train,val,test}<year>/

or as tar files of photos and captions, <folder>/{train,val,test}-*.tar (`shards.py`). A caption file is read and
tokenized once; what comes of it, a few flat integer arrays, is kept in the cache folder under the file's hash, so
that training on COCO starts in a second the next time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T
from tqdm.auto import tqdm

from errors import InputError
from json_stream import stream_lists
from shards import INDEX, SUFFIX, Member, index_shards
from vocabulary import END, START, Vocabulary, tokenize

MODES = ("train", "val", "test")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CACHE = Path("cache")


# Photos


def build_transform(train: bool = False, image_size: int = 224, normalise: bool = True) -> T.Compose:
    """The recipe's transform of a PIL photo: resize the shorter side (256 for a crop of 224), crop, normalise.

    In training the crop is random and half the photos are flipped; otherwise the crop is the centre and
    the result is always the same. Without `normalise` the result stays uint8, (3, image_size, image_size),
    a quarter of the memory, and `EncoderCNN` normalises it on its own device.
    """
    crop = [T.RandomCrop(image_size), T.RandomHorizontalFlip()] if train else [T.CenterCrop(image_size)]
    tensor = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)] if normalise else [T.PILToTensor()]
    return T.Compose([T.Resize(round(image_size * 256 / 224)), *crop, *tensor])


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


# Captions


class Names(Sequence):
    """File names in one block of bytes: a million take some 30 MB, as strings they would take 80.

    block: uint8, the names in UTF-8 with newlines between them. starts, ends: (names,) where each lies in it.
    """

    def __init__(self, block: np.ndarray, starts: np.ndarray | None = None, ends: np.ndarray | None = None):
        self.block = block
        if starts is None:
            ends = np.append(np.flatnonzero(block == ord("\n")), len(block))
            starts = np.append(0, ends[:-1] + 1)
        self.starts, self.ends = starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int | slice | np.ndarray) -> str | Names:
        start, end = self.starts[index], self.ends[index]
        if isinstance(start, np.ndarray):
            return Names(self.block, start, end)
        return self.block[start:end].tobytes().decode()


class PhotoFiles(Sequence):
    """Where the photos of a data set lie, made when asked for: paths in a folder, or members of its tar files.

    places: (photos, 2) where in its tar file a photo begins and how long it is, or None.
    """

    def __init__(self, folder: Path, names: Names, places: np.ndarray | None = None):
        self.folder, self.names, self.places = folder, names, places

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice | np.ndarray) -> Path | Member | PhotoFiles:
        name = self.names[index]
        place = None if self.places is None else self.places[index]
        if isinstance(name, Names):
            return PhotoFiles(self.folder, name, place)
        if place is None:
            return self.folder / name
        shard, _, inside = name.partition("/")
        return Member(self.folder / shard, inside, *place.tolist())


@dataclass
class Annotations:
    """A caption file as flat arrays.

    `tokens[offsets[i]:offsets[i + 1]]` are caption i's indices into `words`, all the file's words in the
    order of their first appearance; `photo[i]` is its row in `image_ids` and `file_names`.
    """

    image_ids: np.ndarray  # (photos,) int64
    file_names: Names
    words: list[str]
    tokens: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (captions + 1,) int64
    photo: np.ndarray  # (captions,) int32
    places: np.ndarray | None  # (photos, 2) int64 offset and size, where the photos are in tar files


def read_annotations(path: Path, cache: Path = CACHE) -> Annotations:
    """Read and tokenize a COCO captions or image_info file, or take the arrays kept from the last time.

    Photos without a caption are left out where the file has captions. Raises `InputError` where it is
    missing, not JSON, not COCO's, or empty.
    """
    kept = cache / "captions" / f"{hash_file(path, b'2')[:32]}.npz"
    if kept.exists():
        try:
            with np.load(kept) as arrays:
                found = {key: arrays[key] for key in arrays.files}
            found["file_names"] = Names(found["file_names"])
            found["words"] = found["words"].tobytes().decode().split("\n")
            return Annotations(**{"places": None, **found})
        except Exception:  # torn, which makes its reader raise nearly anything: made anew below
            pass
    annotations = _parse_annotations(path)
    arrays = {**vars(annotations), "file_names": annotations.file_names.block}
    arrays["words"] = np.frombuffer("\n".join(annotations.words).encode(), np.uint8)
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = kept.with_name(f"{kept.stem}.{os.getpid()}.new")
    with open(beside, "wb") as file:
        np.savez(file, **{key: array for key, array in arrays.items() if array is not None})
    os.replace(beside, kept)
    return annotations


def hash_file(path: Path, before: bytes = b"") -> str:
    """The SHA-256 of a file, in hexadecimal, as if these bytes stood before it."""
    digest = hashlib.sha256(before)
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def _parse_annotations(path: Path) -> Annotations:
    """The file's entries are read one by one: all at once they would take ten times the memory of the arrays."""
    not_coco = f"{path} is not a COCO annotation file"
    lists = ["images", "annotations"] if path.name.startswith("captions") else ["images"]
    found: set[str] = set()
    image_ids, names, places = array("q"), bytearray(), array("q")
    tokens, offsets, image_of = array("i"), array("q", [0]), array("q")
    index: dict[str, int] = {}
    try:
        for list_name, number, entry in stream_lists(path, lists):
            if number < 0:
                if list_name in found:
                    raise InputError(f'{not_coco}: it has two lists of "{list_name}".')
                found.add(list_name)
            elif list_name == "images":
                name = entry.get("file_name") if isinstance(entry, dict) else None
                if not isinstance(name, str) or type(entry.get("id")) is not int:
                    raise InputError(f'{not_coco}: an entry of "images" lacks a whole-number "id" or a "file_name".')
                if not name or "\n" in name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                    raise InputError(f"{path} names a photo outside its folder: {name!r}.")
                if abs(entry["id"]) >= 1 << 63:
                    raise InputError(f"{not_coco}: the image id {entry['id']} occurs twice or is too large.")
                image_ids.append(entry["id"])
                names += name.encode() + b"\n"
                if path.name.endswith(INDEX):
                    places.extend((entry["offset"], entry["size"]))
            else:
                if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str):
                    raise InputError(f'{not_coco}: an entry of "annotations" lacks a "caption".')
                if type(entry.get("id")) not in (int, str):
                    raise InputError(f'{not_coco}: an entry of "annotations" lacks an "id".')
                image_id = entry.get("image_id")
                if type(image_id) is not int or abs(image_id) >= 1 << 63:
                    raise InputError(f'{path} has a caption of image {image_id}, which is not in its "images".')
                words = tokenize(entry["caption"])
                if not words:
                    raise InputError(f"{path} has an empty caption for image {image_id}; remove it.")
                tokens.extend([index.setdefault(word, len(index)) for word in words])
                offsets.append(len(tokens))
                image_of.append(image_id)
        "\n".join(index).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path} holds characters that are none ({error}).") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}).") from None
    for list_name in lists:
        if list_name not in found:
            raise InputError(f'{not_coco}: it has no list of "{list_name}".')
    if not image_ids:
        raise InputError(f'{path} holds no photos: its list of "images" is empty.')
    if "annotations" in lists and not image_of:
        raise InputError(f'{path} holds no captions: its list of "annotations" is empty.')

    image_ids, image_of = np.frombuffer(image_ids, np.int64), np.frombuffer(image_of, np.int64)
    file_names = Names(np.frombuffer(names, np.uint8)[:-1])
    order = np.argsort(image_ids, kind="stable")
    twice = np.flatnonzero(np.diff(image_ids[order]) == 0)
    if len(twice):
        raise InputError(f"{not_coco}: the image id {image_ids[order[twice[0]]]} occurs twice or is too large.")
    photo = order[np.searchsorted(image_ids, image_of, sorter=order).clip(max=len(order) - 1)]
    unknown = np.flatnonzero(image_ids[photo] != image_of)
    if len(unknown):
        raise InputError(f'{path} has a caption of image {image_of[unknown[0]]}, which is not in its "images".')
    if len(photo):  # photos without a caption have nothing to teach
        used, photo = np.unique(photo, return_inverse=True)
        if len(used) < len(image_ids):
            image_ids = image_ids[used]
            file_names = Names(np.frombuffer("\n".join(file_names[used]).encode(), np.uint8))
    return Annotations(
        image_ids,
        file_names,
        list(index),
        np.frombuffer(tokens, np.int32),
        np.frombuffer(offsets, np.int64),
        photo.astype(np.int32),
        np.frombuffer(places, np.int64).reshape(-1, 2) if places else None,
    )


def find_split(folder: Path, mode: str, cache: Path = CACHE) -> tuple[Path, Path]:
    """The annotation file and the photo folder of a data set's split ("train", "val" or "test").

    For "test" that is captions_test<year>.json where the captions are public, else image_info_test<year>.json.
    Of a folder of tar files, <mode>-*.tar, it is an index of them in the cache folder, and the folder itself.
    """
    if mode not in MODES:
        raise InputError(f'mode "{mode}" is not one of {", ".join(MODES)}.')
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that no folder can have, too
        raise InputError(
            f"{folder} does not exist; draw the sample data set with `python scenes.py {folder}`, or fetch "
            f"COCO with `python download.py coco --root {folder}`."
        )
    found: list[Path] = []
    for kind in ("captions", "image_info")[: 2 if mode == "test" else 1]:
        pattern = re.compile(rf"{kind}_{mode}\d*\.json")
        if not found and (folder / "annotations").is_dir():
            found = sorted(p for p in (folder / "annotations").iterdir() if pattern.fullmatch(p.name))
    shards = sorted(folder.glob(f"{mode}*{SUFFIX}"))
    if not found and shards:
        return index_shards(shards, mode, cache / "shards"), folder
    if not found:
        raise InputError(
            f"{folder} holds no annotations/captions_{mode}<year>.json and no {mode}-*{SUFFIX}; a data set is laid out "
            "as COCO or as WebDataset."
        )
    if len(found) > 1:
        raise InputError(f"{folder} holds several years: {', '.join(p.name for p in found)}; keep the one to use.")
    return found[0], folder / "images" / found[0].stem.split("_")[-1]


class CaptionDataset(Dataset):
    """A split's photos and captions; an item a caption, or in test mode a photo.

    In "train" and "val" mode `dataset[i]` is (photo, caption): what `transform` makes of caption i's photo,
    and its indices from `<start>` to `<end>`, (length,) int64. In "test" mode it is (image id, photo).
    Raises `InputError` where the folder's annotations or photos are missing or cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        mode: str = "train",
        transform: Callable | None = None,
        vocab: Vocabulary | None = None,
        vocab_threshold: int = 5,
        cache: Path = CACHE,
    ):
        self.mode = mode
        self.annotation_file, self.photo_folder = find_split(Path(folder), mode, cache)
        annotations = read_annotations(self.annotation_file, cache)
        self.image_ids = annotations.image_ids
        self.paths = PhotoFiles(self.photo_folder, annotations.file_names, annotations.places)
        if annotations.places is None:
            self._check_photos_exist()
        self.photo = annotations.photo  # (captions,) each caption's photo, a row of image_ids
        words = annotations.words
        if vocab is None:
            counts = np.bincount(annotations.tokens, minlength=len(words))
            vocab = Vocabulary.from_counts(dict(zip(words, counts.tolist(), strict=True)), vocab_threshold)
        self.vocab = vocab
        self.lengths = np.diff(annotations.offsets) + 2  # (captions,) with <start> and <end>
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.tokens = np.empty(self.offsets[-1], np.int32)
        inner = np.ones(len(self.tokens), bool)
        inner[self.offsets[:-1]] = inner[self.offsets[1:] - 1] = False
        self.tokens[self.offsets[:-1]], self.tokens[self.offsets[1:] - 1] = START, END
        self.tokens[inner] = np.array([vocab[word] for word in words], np.int32)[annotations.tokens]
        self.photos = Photos(self.paths, transform or build_transform(train=mode == "train"))

    def _check_photos_exist(self) -> None:
        """Names are compared by their hashes, a million of which take 8 MB."""
        names, there = self.paths.names, array("q")
        for inner in {os.path.dirname(name) for name in names}:
            if (self.photo_folder / inner).is_dir():
                entries = os.scandir(self.photo_folder / inner)
                there.extend(hash(os.path.join(inner, entry.name)) for entry in entries if entry.is_file())
        wanted = np.fromiter(map(hash, names), np.int64, len(names))
        missing = np.flatnonzero(~np.isin(wanted, np.frombuffer(there, np.int64)))
        if len(missing):
            raise InputError(
                f"{len(missing)} of {len(names)} photos of {self.annotation_file} are missing, the first is "
                f"{self.paths[missing[0]]}; put them there or take them out of the annotations."
            )

    def drop(self, rows: Iterable[int]) -> None:
        """Leave out the photos of these rows of `paths`, and their captions."""
        keep = np.ones(len(self.paths), bool)
        keep[list(rows)] = False
        captions = keep[self.photo]
        inside = np.repeat(captions, self.lengths)
        self.tokens, self.lengths = self.tokens[inside], self.lengths[captions]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.photo = (np.cumsum(keep) - 1)[self.photo[captions]].astype(np.int32)
        self.image_ids, self.paths = self.image_ids[keep], self.paths[keep]
        self.photos.paths = self.paths

    def caption(self, index: int) -> Tensor:
        """Caption `index` as indices from `<start>` to `<end>`, (length,) int64."""
        return torch.from_numpy(self.tokens[self.offsets[index] : self.offsets[index + 1]].astype(np.int64))

    def captions(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Captions as one batch: (batch, longest) int64, padded with `<end>` on the right, and their lengths."""
        lengths = self.lengths[indices]
        column = np.arange(lengths.max())
        inside = column < lengths[:, None]
        batch = np.where(inside, self.tokens[np.where(inside, self.offsets[indices][:, None] + column, 0)], END)
        return torch.from_numpy(batch.astype(np.int64)), torch.from_numpy(lengths)

    @cached_property
    def coco(self) -> COCO:
        """The annotation file behind pycocotools' API, read when first asked for."""
        try:
            with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
                return COCO(str(self.annotation_file))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.annotation_file} is not a COCO annotation file ({error!r}).") from None

    def references(self) -> dict[int, list[str]]:
        """The captions of each image id as they were written, for metrics."""
        return {int(i): [a["caption"] for a in self.coco.imgToAnns[int(i)]] for i in self.image_ids}

    def __len__(self) -> int:
        return len(self.paths) if self.mode == "test" else len(self.photo)

    def __getitem__(self, index: int) -> tuple:
        row = index if self.mode == "test" else int(self.photo[index])
        photo = self.photos[row, int(torch.randint(1 << 31, ()))]  # drawn anew each time, from torch's seed
        return (int(self.image_ids[row]), photo) if self.mode == "test" else (photo, self.caption(index))


# Batches


class LengthBatches(Sampler):
    """Batches of caption indices, each of one caption length, every caption exactly once an epoch.

    Captions of one length need no padding, so no step of the decoder is spent on it. The order depends on
    the seed and the epoch alone; `set_epoch` chooses the epoch, and each whole pass goes on to the next.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        per_length = np.bincount(lengths)
        self.batches = int(np.ceil(per_length / batch_size).sum())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[np.ndarray]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        order = order[np.argsort(self.lengths[order], kind="stable")]
        ends = np.cumsum(np.bincount(self.lengths))
        batches = [
            order[start : min(start + self.batch_size, end)]
            for begin, end in zip([0, *ends[:-1]], ends, strict=True)
            for start in range(begin, end, self.batch_size)
        ]
        for i in rng.permutation(len(batches)):
            yield batches[i]
        self.epoch += 1


class PhotoBatches(Sampler):
    """Batches of caption indices that hold all captions of each of their photos, every caption once an epoch.

    Where the backbone learns, it then sees a photo once an epoch rather than once a caption.
    """

    def __init__(self, photo: np.ndarray, batch_size: int, seed: int = 0):
        self.seed, self.epoch = seed, 0
        self.captions = np.argsort(photo, kind="stable")
        self.ends = np.cumsum(np.bincount(photo))  # photo i's are captions[ends[i - 1]:ends[i]]
        self.photos = max(1, round(batch_size * len(self.ends) / len(photo)))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.ends) // self.photos)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.ends))
        for start in range(0, len(order), self.photos):
            some = order[start : start + self.photos]
            yield np.concatenate([self.captions[self.ends[i - 1] if i else 0 : self.ends[i]] for i in some])
        self.epoch += 1


def get_loader(
    transform: Callable | None = None,
    mode: str = "train",
    batch_size: int = 1,
    vocab_threshold: int = 5,
    vocab_file: str | Path = "vocab.json",
    vocab_from_file: bool = True,
    num_workers: int = 0,
    cocoapi_loc: str | Path = "data/scenes",
) -> DataLoader:
    """The recipe's data loader over the data set in `cocoapi_loc`.

    Args:
        transform: of a PIL photo; the recipe's own of the mode by default.
        mode: "train" and "val" give (photos (B, 3, H, W), captions (B, length)), all captions of a batch of
            one length and each once an epoch; "test" gives (image ids (B,), photos) in the file's order.
        vocab_threshold: how often a word must occur to have an index of its own.
        vocab_from_file: read the vocabulary from `vocab_file`; otherwise (training only) build it and write it.

    `loader.dataset.vocab` is the vocabulary. Raises `InputError` for what cannot be used.
    """
    if not vocab_from_file and mode != "train":
        raise InputError(f'a vocabulary is built from training captions: use vocab_from_file=True in mode "{mode}".')
    vocab = Vocabulary.load(vocab_file) if vocab_from_file else None
    dataset = CaptionDataset(cocoapi_loc, mode, transform, vocab, vocab_threshold)
    if not vocab_from_file:
        dataset.vocab.save(vocab_file)
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    if mode == "test":
        return DataLoader(dataset, batch_size=batch_size, **options)
    return DataLoader(dataset, batch_sampler=LengthBatches(dataset.lengths, batch_size), **options)
