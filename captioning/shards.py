"""Read images and captions from tar files in WebDataset's layout, without unpacking them.

A sample is the files of a tar file whose names differ only in their suffixes:

    000017.jpg   the image
    000017.txt   its captions, one a line; or 000017.json with "caption" or "captions"

The webdataset library reads a tar file from its beginning to its end. This module reads the headers first and images on
demand, which allows random access. For training, an index in the format of a COCO captions file locates each image.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile, mkdtemp
from typing import BinaryIO

from captioning.captions import find_marks
from captioning.errors import InputError, warn_once
from captioning.files import is_within, require_regular, write_cache, write_file
from captioning.image_formats import HEIF_SUFFIXES, describe_content, image_suffixes
from captioning.reports import Report
from captioning.sidecars import CAPTION_SUFFIXES, read_caption_files

TAR_SUFFIX = ".tar"
NUMBER = re.compile(r"\d+")
INDEX_SUFFIX = ".shards.json"  # end of an index's name
MAX_TEXT_BYTES = 1 << 20  # size limit for a file with an image's captions
LONG_HEADERS = (  # types of those that tarfile reads into memory
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
MAX_HEADER_BYTES = 1 << 20  # size limit for these
TEXT_ADVICE = "convert it to UTF-8 and pack the tar file again"


@dataclass(frozen=True, slots=True)
class Member:
    """A file within a tar file, as the offset and size of its bytes."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        """Read the file's bytes."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def stat(self) -> os.stat_result:
        """Return the status of the tar file, for its size and dates."""
        return self.shard.stat()

    def resolve(self) -> Member:
        """Return the same member with the tar file's path resolved, as by `Path.resolve`."""
        return Member(self.shard.resolve(), self.name, self.offset, self.size)


def stamp(path: Path | Member) -> bytes:
    """Return a file's path, size and date as bytes, for cache keys; raises `OSError` where it is missing."""
    status = path.stat()
    return f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape")


def is_shard(path: Path) -> bool:
    """Return whether a path has the suffix of a tar file."""
    return path.suffix.lower() == TAR_SUFFIX


def read_samples(shard: Path, report: Report) -> Iterator[tuple[Member | None, dict[str, Member]]]:
    """Yield each image of a tar file with the files that may hold its captions, by suffix; None for no image.

    Files with the same name apart from the suffix form a sample. An image left without captions takes those that share
    its WebDataset key (the name up to the first dot), if it is the only image with that key and they have different
    suffixes. Files need not be adjacent. What cannot be used is counted in `report`. Raises `InputError` where the tar
    file cannot be read.
    """
    require_regular(shard)
    groups: dict[str, list[Member]] = {}
    try:
        for member in _members(shard, report):
            folder, slash, name = member.name.rpartition("/")
            if not name.startswith("._"):  # macOS keeps a file's attributes in them
                key = unicodedata.normalize("NFC", folder + slash + name.split(".", 1)[0])
                groups.setdefault(key, []).append(member)
    except (OSError, ValueError, RecursionError, tarfile.TarError) as error:
        reason = _describe_start(shard) or getattr(error, "strerror", None) or error
        raise InputError(f"{shard} cannot be read as a tar file ({reason}).") from None
    for key, members in groups.items():
        yield from _pair_files(key, members, report)


def _pair_files(key: str, members: list[Member], report: Report) -> Iterator[tuple[Member | None, dict[str, Member]]]:
    """Pair the images with the caption files among the files of one WebDataset key; see `read_samples`."""
    images: dict[str, Member] = {}  # stem -> image
    texts: dict[str, dict[str, Member]] = {}  # stem -> suffix -> file
    for member in members:
        path = PurePosixPath(unicodedata.normalize("NFC", member.name))
        stem, suffix = str(path.with_suffix("")), path.suffix.lower()
        if suffix in CAPTION_SUFFIXES:
            texts.setdefault(stem, {}).setdefault(suffix, member)
        elif suffix in image_suffixes():
            images.setdefault(stem, member)
        else:
            hint = ", which `pip install pillow-heif` makes readable" if suffix in HEIF_SUFFIXES else ""
            report.add(f"{suffix} file{{s}}{hint}" if suffix else "file{s} without a suffix", repr(str(member)))
            continue
        if member not in (images.get(stem), *texts.get(stem, {}).values()):
            report.add("file{s} with the name of another", repr(str(member)))
    for stem in [stem for stem in images if key in images and stem != key and stem not in texts]:
        report.add("further image{s} of a sample", repr(str(images.pop(stem))))
    for stem, image in images.items():
        own = texts.pop(stem, {})
        if not own and len(images) == 1:
            # frame_0.5 and frame_0.7 are two samples, though WebDataset's key of both is frame_0.
            numbered = {other for other in texts if NUMBER.sub("0", other) == NUMBER.sub("0", stem)}
            candidates = [files for other, files in texts.items() if other not in numbered]
            others = [pair for files in candidates for pair in files.items()]
            if len(dict(others)) == len(others):  # else they are ambiguous
                own = dict(others)
                texts = {other: texts[other] for other in texts if other in numbered}
        yield image, own
    yield from ((None, files) for files in texts.values())


def _describe_start(shard: Path) -> str | None:
    """Describe a file that is not a tar file, such as a compressed one, by its first bytes, with a remedy."""
    try:
        with open(shard, "rb") as file:
            return describe_content(file.read(64))
    except OSError:
        return None


class _Header(tarfile.TarInfo):
    """A header of a tar file; one of `LONG_HEADERS` that is larger than `MAX_HEADER_BYTES` is refused."""

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size > MAX_HEADER_BYTES and self.type in LONG_HEADERS:
            raise tarfile.ReadError(f"the header of {self.name!r} has {self.size:,} bytes")
        return super()._proc_member(tarfile_)  # pyright: ignore[reportAttributeAccessIssue]


def _members(shard: Path, report: Report) -> Iterator[Member]:
    """Yield the files of a tar file; raises `tarfile.ReadError` where it is cut off or damaged."""
    size = os.stat(shard).st_size
    with tarfile.open(shard, "r:", tarinfo=_Header, encoding="utf-8", errors="backslashreplace") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  otherwise tarfile keeps every header
            if info.size < 0:
                raise tarfile.ReadError(f"{info.name!r} has a negative size")
            if info.offset_data + info.size > size:
                raise tarfile.ReadError(f"it ends within {info.name!r}")
            where = repr(f"{shard}/{info.name}")
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                report.add("link{s} or special file{s}", where)
            elif not is_within(info.name) or "\n" in info.name or "\0" in info.name:
                report.add("file{s} whose name leads out of the tar file or has a line break", where)
            elif not PurePosixPath(info.name).name:
                report.add("file{s} without a name", where)
            else:
                yield Member(shard, str(PurePosixPath(info.name)), info.offset_data, info.size)
        end = tar.offset
    with open(shard, "rb") as file:  # a header that is cut off or damaged also ends the loop above
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it is cut off or damaged at byte {end}")
        while padding := file.read(1 << 20):
            if padding.count(0) < len(padding):
                raise tarfile.ReadError(f"other data follows its end at byte {end}; were several tar files joined?")


def read_captions_of(files: dict[str, Member], report: Report) -> list[str]:
    """Read the captions of a sample from its files, by suffix; missing ones beside others are counted in `report`.

    Raises `InputError` that names the file and the caption that cannot be used.
    """
    _, captions = read_caption_files(files, _read, TEXT_ADVICE, report)
    texts = [caption for _, caption in captions if caption]
    for where in (where for where, caption in captions if texts and not caption):
        report.add("empty caption{s}", repr(where))
    return texts


def _read(file: Member) -> bytes:
    if file.size > MAX_TEXT_BYTES:
        raise InputError(f"{file} has {file.size:,} bytes; captions of at most {MAX_TEXT_BYTES:,} are read.")
    return file.read()


def list_images(shard: Path) -> Iterator[Member]:
    """Yield the images of a tar file, in its order; reports on stderr which kinds of files are left out."""
    report = Report()
    for member, _ in read_samples(shard, report):
        if member is not None:
            yield member
    for line in report.lines():
        warn_once(f"{shard}: {line}.")


def index_shards(shards: list[Path], mode: str, cache: Path) -> Path:
    """Write an index of tar files as a COCO captions file, or find a cached one; returns its path.

    An image's "file_name" is the tar file's name and its own; "offset" and "size" locate its bytes; the list
    "warnings" says what was left out. The tar files' paths, sizes and dates and the readable formats of images identify
    a cached index.
    """
    try:
        about = b"".join(map(stamp, shards))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}).") from None
    about += ",".join(sorted(image_suffixes())).encode()
    name = f"shards/{hashlib.sha256(b'14' + about).hexdigest()[:32]}/captions_{mode}{INDEX_SUFFIX}"
    path = cache / name
    if os.path.exists(path) or write_cache(cache, name, lambda file: _write_index(shards, mode, file)):
        return path
    folder = mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, path.name)
    write_file(path, lambda file: _write_index(shards, mode, file))
    return path


def _write_index(shards: list[Path], mode: str, file: BinaryIO) -> None:
    report = Report()
    image_count = captions = 0
    with TemporaryFile() as images:  # holds the list of images until all captions are written
        file.write(b'{"annotations": [')
        for shard in shards:
            for member, files in read_samples(shard, report):
                try:
                    texts = read_captions_of(files, report)
                except InputError:
                    if member is not None:
                        raise
                    report.add("file{s} of no image", repr(str(next(iter(files.values())))))
                    continue
                if member is None or not texts:
                    if member is not None:
                        report.add("image{s} without captions", repr(str(member)))
                    elif texts:
                        report.add("caption{s} without an image", repr(str(next(iter(files.values())))))
                    continue
                image_count += 1
                image = {"id": image_count, "file_name": f"{shard.name}/{member.name}"}
                image |= {"offset": member.offset, "size": member.size}
                images.write(b", " * (image_count > 1) + json.dumps(image).encode())
                for text in texts:
                    if marks := find_marks(text):
                        report.add(marks, repr(text[:80]), "read")
                    captions += 1
                    row = {"id": captions, "image_id": image_count, "caption": text}
                    file.write(b", " * (captions > 1) + json.dumps(row).encode())
        where, folder = f"{mode}*{TAR_SUFFIX}", os.path.join(shards[0].parent, "")
        if not image_count:
            about = f" ({'; '.join(lines)})" if (lines := report.lines()) else ""
            raise InputError(
                f"{folder}{where} hold no images with captions (in a .txt, .caption or .json of the same name){about}."
            )
        file.write(b'], "images": [')
        images.seek(0)
        shutil.copyfileobj(images, file)
        # Without the folder's path, the index and so its hash do not depend on where the folder is.
        names, folders = (map(re.escape, each) for each in ([x.name for x in shards], {folder, repr(folder)[1:-1]}))
        prefix = re.compile(rf"""(?<![^\s'"])(?:{"|".join(folders)})(?={"|".join(names)})""")
        lines = [f"{where}: {prefix.sub('', line)}." for line in report.lines()]
        file.write(f'], "warnings": {json.dumps(lines)}}}'.encode())
