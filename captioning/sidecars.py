"""Read the captions of an image from the files of its name: 0.txt, 0.caption or 0.json beside 0.jpg.

The files are in a folder or, for `shards`, in a tar file.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from captioning.captions import clean_caption, is_rejected, split_lines
from captioning.errors import InputError
from captioning.files import decode_text, is_at_most, read_bytes
from captioning.image_index import ImageIndex
from captioning.reports import Report
from captioning.tables import ENCODING_ADVICE, Row, is_split_list, parse_json

# Of several files, the first that holds a caption is used, or none if the .json file marks it as rejected.
CAPTION_SUFFIXES = (".txt", ".caption", ".json")

NUMBERED = re.compile(r"caption[ _.-]?\d+")  # keys of .json files
MAX_JSON = 1_000_000  # size limit of a .json file that may hold an image's captions, where there is no such image

File = TypeVar("File")
Places = list[tuple[str, Any]]  # captions, each after its place as messages name it


def read_caption_files(
    files: Mapping[str, File], read: Callable[[File], bytes], advice: str, report: Report, encoding: str | None = None
) -> tuple[File | None, list[tuple[str, str]]]:
    """Read an image's captions from its files, a dictionary by suffix.

    Each line of .txt or .caption is a caption; .json has "captions" or, without any, "caption", "caption_2" and so on.
    Returns the file that is used, and its captions with their places: in one line each, "" for a missing one. Another
    file with other captions is reported. `read` returns the bytes of a file, and `advice` is that of `decode_text`.
    Raises `InputError` that names the file and the caption that cannot be used.
    """
    lists = _read_files(files, read, advice, report, encoding)
    used: tuple[File | None, list[tuple[str, str]]] = None, []
    for file, captions in lists:
        if captions is None:
            report.add("rejected caption{s}", str(file))
            continue
        cleaned = [(where, clean_caption(caption, where)) for where, caption in captions]
        has_text = any(caption for _, caption in cleaned)
        if has_text or not used[1]:
            used = file, cleaned
        if has_text:
            break
    others: dict[File, set[str]] = {}
    with suppress(InputError):  # what is not used need not be readable
        for file, captions in lists:
            with suppress(InputError):
                others.setdefault(file, {clean_caption(caption, where) for where, caption in captions or ()})
    for file, texts in others.items():
        if file is not used[0] and not texts <= {"", *(caption for _, caption in used[1])}:
            report.add("file{s} of captions, since another file of the same image is used", str(file))
    return used


def _read_files(
    files: Mapping[str, File], read: Callable[[File], bytes], advice: str, report: Report, encoding: str | None
) -> Iterator[tuple[File, Places | None]]:
    """Yield each list of captions in the files, or None for the .json file by which all of them are rejected."""

    @functools.cache  # it is asked for up to three times
    def read_json(file: File) -> dict[str, Any]:
        data = read(file)
        try:
            content = parse_json(data if encoding is None else decode_text(data, file, encoding, advice))
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text (byte {error.start}); {advice}.") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is not JSON ({error}).") from None
        return content if isinstance(content, dict) else {}

    if ".json" in files:
        with suppress(InputError):  # it need not be readable if another file holds the captions
            if is_rejected(read_json(files[".json"])):
                yield files[".json"], None
                return
    for suffix, file in ((suffix, files[suffix]) for suffix in CAPTION_SUFFIXES if suffix in files):
        if suffix == ".json":
            content = read_json(file)
            single = ["caption", *filter(NUMBERED.fullmatch, content)]
            single = [key for key in single if key == "caption" or isinstance(content[key], str | list)]
            for keys in (["captions"], single):
                if present := [key for key in keys if key in content]:
                    captions = [text for key in present for text in _list_captions(key, content[key])]
                    yield file, [(f"{file}, caption {number}", caption) for number, caption in enumerate(captions, 1)]
            continue
        text, whole = decode_text(read(file), file, encoding, advice), None
        if ".json" in files and len(text.strip().split("\n")) > 1:
            with suppress(InputError):  # it need not be of img2dataset, nor hold captions
                whole = read_json(files[".json"]).get("caption")
        captions = _split(text, file, whole)
        if _is_wrapped([caption for _, caption in captions]):
            report.add(
                "file{s} whose captions may continue in the next line; each line is a caption", str(file), "read"
            )
        yield file, captions


def _list_captions(key: str, value: Any) -> list[Any]:
    """Return the captions of a key of a .json file: a list, a text with one in each line, or a single one."""
    if key == "captions" and isinstance(value, str):
        return split_lines(value)
    return value if isinstance(value, list) else [value]


def _split(text: str, file: object, whole: Any) -> Places:
    """Split the text of a file into captions, one a line; blank lines are left out, unless there are no others.

    A text that is the `whole` caption is a single one: img2dataset writes a caption's line breaks.
    """
    lines = [(f"{file}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if isinstance(whole, str) and whole.split() == text.split():
        return [(lines[0][0], whole)] if lines else []
    return lines or [(f"{file}, line 1", "")]


def _is_wrapped(lines: list[str]) -> bool:
    """Return whether lines seem to be those of one text: a capital at its start, and none after an open line."""
    after_open = [after.lstrip()[:1] for line, after in pairwise(lines) if line.rstrip()[-1:].isalnum()]
    goes_on = any(map(str.islower, after_open)) and not any(map(str.isupper, after_open))
    return goes_on and lines[0].lstrip()[:1].isupper()


def find_sidecars(folder: Path, files: list[Path], index: ImageIndex) -> set[Path]:
    """Find the files of `folder` that have the name of an image of the index: of 0.jpg, 0.txt or 0.jpg.txt."""
    images = [_compose(folder / key) for key in index.paths]
    names = {*images, *(image.with_suffix("") for image in images)}
    return {
        path for path in files if path.suffix.lower() in CAPTION_SUFFIXES and _compose(path.with_suffix("")) in names
    }


def _compose(path: Path) -> Path:
    """Return a path in Unicode's composed form; macOS writes names in the decomposed one."""
    return Path(unicodedata.normalize("NFC", str(path)))


def read_folder(
    folder: Path, files: list[Path], sidecars: set[Path], index: ImageIndex, encoding: str | None, report: Report
) -> list[Row]:
    """Read the captions of all images of the index from those of the `files` of `folder` that are their `sidecars`.

    Other files of captions are reported.
    """
    by_name: dict[Path, dict[str, Path]] = defaultdict(dict)  # without the suffix
    for path in files:
        suffix = path.suffix.lower()
        name = _compose(path.with_suffix(""))
        if suffix in CAPTION_SUFFIXES and by_name[name].setdefault(suffix, path) is not path:
            raise _two_files(by_name[name][suffix], path)
    owners: dict[Path, Path] = {}
    rows = []
    for key, (path, *_) in index.paths.items():
        image = _compose(folder / key)
        own, others = by_name.get(image.with_suffix(""), {}), by_name.get(image, {})
        for suffix in (suffix for suffix in CAPTION_SUFFIXES if suffix in own and suffix in others):
            pair = own[suffix], others[suffix]
            used = [path for path in pair if suffix != ".json" or has_captions(path, encoding)]
            if len(used) > 1:
                raise _two_files(*used)
            if used:
                own = {**own, suffix: used[0]}
        file, captions = read_caption_files(others | own, read_bytes, ENCODING_ADVICE, report, encoding)
        if file is not None and owners.setdefault(file, path) is not path:
            raise InputError(f"{file} may be of {owners[file]} or of {path}; keep one of the two images.")
        rows += [Row(where, key, [caption], "") for where, caption in captions]
    if rows:
        for path in sorted(path for named in by_name.values() for path in named.values() if path not in sidecars):
            if path.suffix.lower() == ".json" and not (is_at_most(path, MAX_JSON) and has_captions(path, encoding)):
                continue
            if not is_split_list(path, folder, index):  # which is reported as such
                report.add(f"{path.suffix.lower()} file{{s}} without an image", str(path))
    return rows


def has_captions(path: Path, encoding: str | None) -> bool:
    """Return whether a file that may be an image's holds a caption."""
    with suppress(InputError):
        _, captions = read_caption_files({path.suffix.lower(): path}, read_bytes, ENCODING_ADVICE, Report(), encoding)
        return any(caption for _, caption in captions)
    return False


def _two_files(one: Path, other: Path) -> InputError:
    return InputError(f"{one} and {other} are for one image; keep one of the two.")
