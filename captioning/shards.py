"""Photos and captions in tar files laid out as WebDataset has them, read where they lie.

A sample is the files of a shard whose names are alike up to the first dot, one after the other:

    000017.jpg   the photo
    000017.txt   its captions, one a line; or 000017.json with "caption" or "captions"

What makes a sample is up to the webdataset library. It reads shards from their beginning to their end; so that
photos can be drawn at random, and passed over where another process reads them, only the headers are read here, and
a photo where it is wanted. For training an index in COCO's form is written once, which says where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from captioning.errors import InputError
from captioning.files import photo_suffixes

SUFFIX = ".tar"
INDEX = ".shards.json"  # how the name of an index ends


@dataclass(frozen=True, slots=True)
class Member:
    """A file within a tar file: where its bytes are."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        """Its bytes."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def stat(self) -> os.stat_result:
        """The tar file's size and dates, as `Path.stat` gives a file's."""
        return self.shard.stat()

    def absolute(self) -> Member:
        """The same from the root of the file system, as `Path.absolute`."""
        return Member(self.shard.absolute(), self.name, self.offset, self.size)

    def resolve(self) -> Member:
        """The same where no link leads to it, as `Path.resolve`."""
        return Member(self.shard.resolve(), self.name, self.offset, self.size)


def is_shard(path: Path) -> bool:
    """Whether a path is a tar file's."""
    return path.suffix.lower() == SUFFIX


def read_samples(shard: Path) -> Iterator[dict[str, str | Member]]:
    """The samples of a shard, in its order: "__key__", and each file by what follows the first dot of its name.

    Raises `InputError` where it cannot be read, or webdataset is not installed.
    """
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError:
        raise InputError(f"{shard} needs the library webdataset; install it with `pip install webdataset`.") from None
    try:
        yield from group_by_keys(_members(shard))
    except (OSError, ValueError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error.args[0]
        raise InputError(f"{shard} cannot be read as a tar file ({reason}).") from None


def _members(shard: Path) -> Iterator[dict[str, Any]]:
    size = os.stat(shard).st_size
    with tarfile.open(shard, "r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # or it keeps a million headers
            if info.offset_data + info.size > size:
                raise tarfile.ReadError(f"it ends within {info.name}")
            if info.isreg():
                name = info.name.removeprefix("./")
                yield {"fname": name, "data": Member(shard, name, info.offset_data, info.size), "__url__": str(shard)}


def photo_of(sample: dict[str, str | Member]) -> Member | None:
    """The photo of a sample, the first where it holds several."""
    return next((file for suffix, file in sample.items() if f".{suffix}" in photo_suffixes()), None)


def captions_of(sample: dict[str, str | Member]) -> list[str]:
    """The captions of a sample: the lines of its .txt, or what its .json has as "captions" or "caption"."""
    lines: Any = []
    if "txt" in sample:
        lines = sample["txt"].read().decode("utf-8", "replace").splitlines()
    elif "json" in sample:
        try:
            content = json.loads(sample["json"].read())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{sample['json']} is not JSON ({error}).") from None
        found = content.get("captions", content.get("caption")) if isinstance(content, dict) else None
        lines = found if isinstance(found, list) else [found]
    return [" ".join(line.split()) for line in lines if isinstance(line, str) and line.strip()]


def read_photos(shard: Path) -> Iterator[Member]:
    """The photos of a shard, in its order."""
    for sample in read_samples(shard):
        photo = photo_of(sample)
        if photo is not None:
            yield photo


def index_shards(shards: list[Path], mode: str, folder: Path) -> Path:
    """Write what is in shards as a COCO captions file, or find what was written before; returns its path.

    A photo's "file_name" is that of its shard and its own, and "offset" and "size" say where it is in there.
    Samples without a photo or without captions are left out. What is kept in `folder` is found by the shards' names,
    sizes and dates.
    """
    about = "".join(f"{p.resolve()}\n{p.stat().st_size}\n{p.stat().st_mtime_ns}\n" for p in shards)
    kept = folder / hashlib.sha256(about.encode()).hexdigest()[:32] / f"captions_{mode}{INDEX}"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = kept.with_name(f"{kept.name}.{os.getpid()}.new")
    photos = captions = 0
    with open(beside, "w") as file, TemporaryFile("w+") as images:  # the photos, until all captions are written
        file.write('{"annotations": [')
        for shard in shards:
            for sample in read_samples(shard):
                photo, texts = photo_of(sample), captions_of(sample)
                if photo is None or not texts:
                    continue
                photos += 1
                where = {"file_name": f"{shard.name}/{photo.name}", "offset": photo.offset, "size": photo.size}
                images.write((", " if photos > 1 else "") + json.dumps({"id": photos, **where}))
                for text in texts:
                    captions += 1
                    row = {"id": captions, "image_id": photos, "caption": text}
                    file.write((", " if captions > 1 else "") + json.dumps(row))
        file.write('], "images": [')
        images.seek(0)
        shutil.copyfileobj(images, file)
        file.write("]}")
    if not photos:
        beside.unlink()
        where = f"{shards[0].parent}/{mode}*{SUFFIX}"
        raise InputError(f"{where} hold no photos with captions, in a .txt or .json of the same name.")
    os.replace(beside, kept)
    return kept
