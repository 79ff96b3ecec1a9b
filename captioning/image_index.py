"""Find the images under a folder by their names in tables of captions."""

from __future__ import annotations

import os
import posixpath
import stat
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from captioning.errors import InputError
from captioning.image_formats import HEIF_SUFFIXES, image_suffixes

TEXT_SUFFIXES = (".txt", ".caption", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".md", ".zip")


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield all files under `folder`, in name order, those of shallow folders first.

    Hidden files and folders, and what macOS adds to archives, are left out. Symbolic links to folders are followed
    after all real folders; no folder is visited twice. Raises `InputError` where a folder cannot be read.
    """
    folders, links, visited = deque([folder]), deque[Path](), set()
    while folders or links:
        here = (folders or links).popleft()
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            advice = "; change its permissions" if isinstance(error, PermissionError) else ""
            advice += f", or move it out of {folder}" if advice and here != folder else ""
            raise InputError(f"{here} cannot be read ({error.strerror}){advice}.") from None
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                is_folder = False
            if is_folder:
                (links if entry.is_symlink() else folders).append(here / entry.name)
            else:
                yield here / entry.name


def find_in_other_form(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Find files under `folder` that are named in another Unicode form, as macOS does: name -> its name on disk.

    Names of which there is no file are left out.
    """

    @cache
    def entries(inside: str) -> dict[str, str]:
        try:
            return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder / inside)}
        except OSError:
            return {}

    found = {}
    for name in names:
        path = ""
        for part in PurePosixPath(name).parts:
            entry = entries(path).get(unicodedata.normalize("NFC", part))
            if entry is None:
                break
            path = posixpath.join(path, entry)
        else:
            if path != name:
                found[name] = path
    return found


class ImageIndex:
    """The images under a folder by their relative paths, with "/" between folders and in Unicode's composed form.

    Raises `InputError` where there are none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths: dict[str, list[Path]] = defaultdict(list)
        self.unreadable: list[Path] = []  # HEIC images where pillow-heif is not installed
        self.by_name: dict[str, set[str]] = defaultdict(set)  # file name -> keys of `paths`
        self.by_stem: dict[str, set[str]] = defaultdict(set)  # file name without its suffix -> keys
        self.by_casefold: dict[str, list[str]] = defaultdict(list)  # key without its case -> keys
        self.by_tail: dict[int, dict[str, list[str]]] = {}  # number of parts -> last parts without a suffix -> keys
        others: Counter[str] = Counter()  # suffixes of other files
        for path in walk_files(folder):
            if path.suffix.lower() in image_suffixes():
                key = _normalize(path.relative_to(folder).as_posix())
                self.paths[key].append(path)
                name = posixpath.basename(key)
                self.by_name[name].add(key)
                self.by_stem[posixpath.splitext(name)[0]].add(key)
                self.by_casefold[key.casefold()].append(key)
            elif path.suffix.lower() in HEIF_SUFFIXES:
                self.unreadable.append(path)
            elif path.suffix and path.suffix.lower() not in TEXT_SUFFIXES:
                others[path.suffix] += 1
        if not self.paths:
            what = "; name the folder of images with --images"
            if self.unreadable:
                what = f" but HEIC; `pip install pillow-heif` makes them readable{what}"
            elif others and others.most_common(1)[0][0] == ".tar":
                what = ", but tar files; unpack them or, if they hold captions, call them train-000000.tar and so on, "
                what += "which `train.py --data` reads as they are"
            elif others:
                suffix, count = others.most_common(1)[0]
                what = f", but {count:,} of {suffix}, which is not the suffix of an image; rename them{what}"
            raise InputError(f"{folder} holds no images{what}.")

    def holds_any(self, names: Iterable[str]) -> bool:
        """Return whether one of the names is an image's path relative to the folder."""
        return any(self._matches(name, anywhere=False) for name in names)

    def has_name(self, path: str) -> bool:
        """Return whether an image in any folder has the file name of a path, suffix included."""
        return posixpath.basename(_normalize(path.replace("\\", "/"))) in self.by_name

    def find(self, name: str, where: str, anywhere: bool = False) -> str | None:
        """Return the key in `paths` of the image that row `where` calls `name`, or None if there is none.

        The name is a path relative to the folder, or with `anywhere` the end of such a path; its suffix may be missing.
        Raises `InputError` where several images match, and where the matching one is not a regular file.
        """
        keys = self._matches(name, anywhere) or self._linked(name, where, anywhere)
        paths = [path for key in keys for path in self.paths[key]]
        if len(paths) > 1:
            raise InputError(
                f"{where}: {name} may be {paths[0]} or {paths[1]}; give the image's path in the captions, or name "
                "its folder with --images if all captions are of images in it."
            )
        if not keys:
            return None
        (path,) = paths
        try:
            is_regular = stat.S_ISREG(os.stat(path).st_mode)
        except PermissionError:
            raise InputError(f"{where}: {path} may not be accessed; change its folder's permissions.") from None
        except OSError:
            is_regular = False
        if not is_regular:
            raise InputError(f"{where}: {path} is a broken link, or is not a regular file.")
        return keys[0]

    def _matches(self, name: str, anywhere: bool) -> list[str]:
        for variant in (name, name.replace("\\", "/")):
            key = _normalize(variant)
            if os.path.isabs(key):
                with suppress(ValueError):  # on another drive of Windows
                    key = Path(os.path.relpath(key, os.path.abspath(self.folder))).as_posix()
            if not anywhere and key in self.paths:
                return [key]
            stem, suffix = posixpath.splitext(key)
            has_suffix = suffix.lower() in image_suffixes()
            keys = self._with_tail(stem if has_suffix else key)
            keys = [one for one in keys if not has_suffix or posixpath.splitext(one)[1] == suffix]
            keys = [one for one in keys if anywhere or posixpath.dirname(one) == posixpath.dirname(key)]
            if keys:
                return sorted(keys)
        return []

    def _with_tail(self, tail: str) -> list[str]:
        """Return the keys whose last parts, without a suffix, are `tail`."""
        parts = tail.count("/") + 1
        if parts not in self.by_tail:
            self.by_tail[parts] = defaultdict(list)
            for key in self.paths:
                last = posixpath.splitext(key)[0].rsplit("/", parts)
                self.by_tail[parts]["/".join(last[-parts:])].append(key)
        return self.by_tail[parts].get(tail, [])

    def _linked(self, name: str, where: str, anywhere: bool) -> list[str]:
        """Return the key of the image that a link leads to; raises `InputError` for a file that is not in the index."""
        file, target = self.folder / name, None
        if os.path.isfile(file):
            target = ""
            with suppress(ValueError):  # of another drive, on Windows
                relative = os.path.relpath(os.path.realpath(file), os.path.realpath(self.folder))
                target = _normalize(Path(relative).as_posix())
            if target in self.paths:
                return [target]
            if match := self.by_casefold.get(target.casefold()):  # on a file system that ignores case
                return match
        wanted = _normalize(name.replace("\\", "/"))
        for path in self.unreadable:
            key = _normalize(path.relative_to(self.folder).as_posix())
            is_wanted = key in (wanted, target) or key[: -len(path.suffix)] == wanted
            if is_wanted or (anywhere and key.endswith(f"/{wanted}")):
                raise InputError(f"{where}: {path} is readable after `pip install pillow-heif` only; install it.")
        if target is not None:
            if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(self.folder)):
                raise InputError(
                    f"{where}: {file} is not in {self.folder}; name the folder that holds all images with --images."
                )
            if file.suffix and file.suffix.lower() not in image_suffixes():
                raise InputError(
                    f"{where}: {file} is not recognized as an image, because {file.suffix} is not the suffix of one "
                    "that can be read; rename it, or convert it to JPEG or PNG."
                )
            raise InputError(
                f"{where}: {file} is not recognized as an image under {self.folder}, because it or its folder is "
                f"hidden, or it lacks the suffix of an image; rename it."
            )
        return []


def _normalize(name: str) -> str:
    return posixpath.normpath(unicodedata.normalize("NFC", name))
