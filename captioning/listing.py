"""List the images at the paths that a command is given: files, folders, tar files and patterns."""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from glob import escape, glob
from pathlib import Path

from captioning.errors import InputError
from captioning.files import missing_file, web_address
from captioning.image_formats import HEIF_SUFFIXES, image_suffixes
from captioning.shards import TAR_SUFFIX, Member, is_shard, list_images

NAMES_PER_SCAN = 1 << 18  # names of a folder that are held in memory at once, about 30 MB
FOLDER, UNREADABLE_FOLDER = "/", "unreadable/"  # keys of folders among the counts of files left out by suffix
MAX_SUFFIXES_LISTED = 10  # suffixes that the message on files left out names

Log = Callable[[str], object]


def find_images(paths: Iterable[Path], recursive: bool = False, log: Log | None = None) -> list[Path | Member]:
    """List the images at the paths; see `stream_images`."""
    return list(stream_images(paths, recursive, log))


def stream_images(paths: Iterable[Path], recursive: bool = False, log: Log | None = None) -> Iterator[Path | Member]:
    """Yield the images at the paths in the given order; the images and tar files in a folder come in name order.

    With `recursive`, subfolders are visited in name order too, each once, even if links form a cycle. The images of a
    tar file come in its own order; one that cannot be read stands for itself, and `read_image` says why. Memory does
    not grow with the size of a folder. For each path, `log` receives a line that lists the files and folders left out,
    or that it holds no images; macOS's ._ files are ignored. A pattern such as photos/*.jpg, which some shells do not
    expand, means what matches. Raises `InputError` at once if no path has images, for a folder that cannot be read, and
    for a tar file that cannot be read if it is the only path.
    """
    paths = [path for pattern in paths for path in _expand(pattern)]
    without: dict[Path, str] = {}  # folders without images, and what they hold
    for path in paths:
        if web_address(path) and not os.path.exists(path):
            raise missing_file(path)
        left_out: Counter[str] = Counter()
        first = next(_images_at(path, recursive, left_out), None)
        if first == path and is_shard(path) and len(paths) == 1:
            next(list_images(path), None)  # raises
        if first is None:
            without[path] = f" but {_describe(left_out)}" if left_out else ""
    if without and len(without) == len(set(paths)):
        path, instead = next(iter(without.items()))
        raise InputError(f"{path} holds no images{instead}; name an image or a folder of images.")
    for path, instead in without.items():
        if log is not None:
            log(f"{path} holds no images{instead}")
    return _stream([path for path in paths if path not in without], recursive, log)


def _expand(pattern: Path) -> list[Path]:
    """List the paths that match a pattern with * or ?, in name order; "**" means folders of any depth.

    What exists is taken literally: a path, and the folders at the start of a pattern, such as those of album [1]/*.jpg.
    """
    folder = next((parent for parent in (pattern, *pattern.parents) if os.path.lexists(parent)), pattern)
    rest = str(pattern.relative_to(folder))
    if not set(rest) & {"*", "?"} or "\0" in rest:
        return [pattern]
    matches = sorted(map(Path, glob(os.path.join(escape(str(folder)), rest), recursive=True)))
    if "**" in rest:  # which also matches the folders above a file, and follows links in a circle
        matches = [path for path in matches if not path.is_dir()] or matches
        matches = list({(os.path.realpath(path.parent), path.name): path for path in reversed(matches)}.values())[::-1]
    return matches or [pattern]


def _stream(paths: list[Path], recursive: bool, log: Log | None) -> Iterator[Path | Member]:
    for path in paths:
        left_out: Counter[str] = Counter()
        yield from _images_at(path, recursive, left_out)
        if left_out and log is not None:
            log(f"left out of {path}: {_describe(left_out)}")


def _images_at(path: Path, recursive: bool, left_out: Counter[str]) -> Iterator[Path | Member]:
    if os.path.isdir(path):  # unlike Path.is_dir, also False for a name that is too long
        for file in _walk(path, recursive, left_out):
            yield from _images_at(file, False, left_out)
    elif is_shard(path) and (os.path.isfile(path) or not os.path.lexists(path)):
        try:
            yield from list_images(path)
        except InputError:
            yield path
    else:  # also a pipe or a link to nothing: `read_image` says so
        yield path


def _walk(folder: Path, recursive: bool, left_out: Counter[str]) -> Iterator[Path]:
    """Yield the images and tar files in a folder, and with `recursive` in its subfolders."""
    entered = {_identity(folder)}
    levels = [(folder, _names(folder, recursive, left_out))]
    while levels:
        parent, names = levels[-1]
        try:
            name = next(names, None)
        except InputError:
            if len(levels) == 1:
                raise
            left_out[UNREADABLE_FOLDER] += 1
            name = None
        if name is None:
            levels.pop()
        elif not (recursive and os.path.isdir(parent / name)):
            yield parent / name
        elif (identity := _identity(parent / name)) not in entered:
            entered.add(identity)
            levels.append((parent / name, _names(parent / name, recursive, left_out)))


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _names(folder: Path, recursive: bool, left_out: Counter[str]) -> Iterator[str]:
    """Yield the names to visit in a folder, in order; the folder is scanned once per `NAMES_PER_SCAN` names."""
    after = ""
    while True:
        try:
            with os.scandir(folder) as entries:
                wanted = (entry.name for entry in entries if _is_wanted(entry, recursive, None if after else left_out))
                names = heapq.nsmallest(NAMES_PER_SCAN, (name for name in wanted if name > after))
        except OSError as error:
            raise InputError(f"{folder} cannot be read ({error.strerror}).") from None
        yield from names
        if len(names) < NAMES_PER_SCAN:
            return
        after = names[-1]


def _is_wanted(entry: os.DirEntry[str], recursive: bool, left_out: Counter[str] | None) -> bool:
    """Return whether an entry is to be visited; if not, it is counted in `left_out` unless it is hidden."""
    if entry.name.startswith("._"):  # metadata that macOS writes to other file systems
        return False
    is_folder = False
    with suppress(OSError):  # a link that points to itself
        is_folder = entry.is_dir()
    hidden = entry.name.startswith(".")
    suffix = FOLDER if is_folder else os.path.splitext(entry.name)[1].lower()
    if (recursive and not hidden) if is_folder else (suffix in image_suffixes() or suffix == TAR_SUFFIX):
        return True
    if left_out is not None and not hidden:
        left_out[suffix] += 1
    return False


def _describe(left_out: Counter[str]) -> str:
    """Describe what was left out: the numbers of files, by suffix, and of folders."""
    parts = []
    for suffix, count in left_out.most_common(MAX_SUFFIXES_LISTED):
        plural = "s" if count > 1 else ""
        if suffix == FOLDER:
            parts.append(f"{count:,} folder{plural} (--recursive reads folders in folders)")
        elif suffix == UNREADABLE_FOLDER:
            parts.append(f"{count:,} folder{plural} that cannot be read")
        elif suffix in HEIF_SUFFIXES:
            parts.append(f"{count:,} {suffix} file{plural} (`pip install pillow-heif` makes them readable)")
        else:
            parts.append(f"{count:,} {suffix} file{plural}" if suffix else f"{count:,} file{plural} without a suffix")
    others = left_out.total() - sum(count for _, count in left_out.most_common(MAX_SUFFIXES_LISTED))
    return ", ".join([*parts, f"{others:,} others"] if others else parts)
