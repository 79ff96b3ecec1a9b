"""Captioning of any number of images into a file from which an interrupted run resumes."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from captioning.captioner import Caption, Captioner, Decoding, Source, choose_workers, other_captions
from captioning.distributed import this_process
from captioning.errors import InputError, printable
from captioning.features import BATCH
from captioning.files import lock_output, write_file
from captioning.listing import Log, stream_images
from captioning.shards import Member

ImageRow = tuple[Path | Member, dict[str, Any]]  # an image and its row in the file
CHUNK = 32 * BATCH  # images that a process captions before it gathers those of others
RETRIED = 16 * CHUNK  # earlier unreadable images between two writes, each of which writes the whole file anew
ROUNDING = 0.2  # tolerance of a caption's log-probability, which varies with the device and the number of threads


def write_captions(
    captioner: Captioner,
    paths: Iterable[Path],
    decode: Decoding,
    output: Path,
    workers: int = 0,
    strict: bool = False,
    recursive: bool = False,
    log: Log | None = None,
) -> tuple[int, int]:
    """Caption the images at the paths into a JSON Lines file, one row per image, in order, with all processes.

    Resumes after the rows of an interrupted run. An image that cannot be read has an "error" in its row, and is tried
    again when the file is resumed. `log` receives lines on the files left out and on the rows written. Returns the
    numbers of images and of unreadable ones. Raises `InputError` if earlier rows are of other images, or if their
    captions are not the ones that this model gives with these options.
    """
    process = this_process()
    images: Iterator[Path | Member] = iter(())
    rows, first_index = None, 0
    with ExitStack() as stack:
        if process.is_main_process:  # only this process lists the images and accesses the file
            images = stream_images(paths, recursive, log)
            stack.enter_context(lock_output(output))
            file = stack.enter_context(open(output, "a+b"))
            rows, again = _read_rows(output, file, images, log)
            first_index = rows.count - len(rows.to_verify)
            # From the start of a batch, so that batches are those of one run.
            images = chain([image for image, _ in rows.to_verify], again, images)
        earlier = 0 if rows is None else rows.count
        progress = stack.enter_context(
            tqdm(desc="captions", initial=earlier, unit="image", delay=2, disable=True if rows is None else None)
        )
        while True:
            chunk = list(islice(images, CHUNK * process.num_processes))
            chunk, first_index = broadcast_object_list([chunk, first_index])
            if not chunk:
                break
            share = _caption_share(captioner, chunk, decode, workers, strict, first_index)
            if process.num_processes > 1:
                share = [sorted(gather_object(list(chain.from_iterable(share))), key=itemgetter(0))]
            first_index += len(chunk)
            if rows is not None:
                for captioned in share:
                    progress.update(rows.append([row for _, row in captioned]))
        if rows is not None:  # model and options are known by now to be those of the earlier rows
            retried, unreadable = 0, iter(rows.unreadable.items())
            while some := dict(islice(unreadable, RETRIED)):
                retried += rows.replace(_retry(captioner, some, decode, workers, strict))
            if log is not None:
                note = f", {retried:,} of them without a caption until now" if retried else ""
                there = earlier + rows.same
                log(f"{output}: {rows.count - there:,} rows written, {there:,} were there{note}")
    result: list[Any] = [None if rows is None else (rows.count, rows.failed)]
    return broadcast_object_list(result)[0]


@dataclass
class _Rows:
    """The rows of the file, which only the main process accesses.

    count, size: number of rows, and their size in bytes. later: the lines after them, which hold errors only; `append`
    replaces them, and counts those that stay the same in `same`.
    unreadable: the rows of an earlier run with an "error", by index. to_verify: the last rows of an earlier run, whose
    images are captioned again to compare the rows. failed: number of rows with an "error".
    """

    output: Path
    file: BinaryIO
    count: int
    size: int
    later: list[bytes]
    unreadable: dict[int, ImageRow]
    to_verify: list[ImageRow]

    def __post_init__(self) -> None:
        self.failed, self.same = len(self.unreadable), 0

    def append(self, rows: list[dict[str, Any]]) -> int:
        """Compare the first rows with `to_verify`, write the others to disk, and return their number."""
        _compare_rows(self.to_verify, rows, self.output)
        self.to_verify, rows = self.to_verify[len(rows) :], rows[len(self.to_verify) :]
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(lines, self.later, strict=False)))
        self.size += sum(map(len, lines[:same]))
        self.same, self.later = self.same + same, self.later[same:]
        if lines[same:] and self.later:
            self.file.truncate(self.size)
            self.later = []
        self.size += sum(map(self.file.write, lines[same:]))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.failed += _print_errors(rows)
        self.count += len(rows)
        return len(rows)

    def replace(self, rows: dict[int, dict[str, Any]]) -> int:
        """Replace the rows with an "error", by index, and return the number of new captions; closes the file."""
        still = _print_errors(rows.values())
        self.failed += still - len(rows)
        if changed := {index: row for index, row in rows.items() if row != self.unreadable[index][1]}:
            self.file.close()  # Windows replaces no open file
            _replace_rows(self.output, changed)
        return len(rows) - still


def _print_errors(rows: Iterable[dict[str, Any]]) -> int:
    """Print the errors among rows on stderr, and return their number."""
    errors = [row["error"] for row in rows if "error" in row]
    for error in errors:
        tqdm.write(printable(f"error: {error}"), file=sys.stderr)
    return len(errors)


def _compare_rows(earlier: list[ImageRow], rows: list[dict[str, Any]], output: Path) -> None:
    """Raise `InputError` if rows of an earlier run differ from this run's rows for the same images."""
    for (_, old), new in zip(earlier, rows, strict=False):
        if "caption" in old and "caption" in new and not _agree(old, new):
            raise InputError(
                f"{output} holds other captions than this model gives with these options, for example of "
                f"{old['photo']}; resume with the first run's model, options and images, or name another file."
            )


def _agree(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether two rows hold the same captions, with log-probabilities that differ by rounding only."""
    try:
        pairs = list(zip([old, *old.get("alternatives", [])], [new, *new.get("alternatives", [])], strict=True))
        same = all(a["caption"] == b["caption"] for a, b in pairs)
        return same and all(abs(a["log_probability"] - b["log_probability"]) < ROUNDING for a, b in pairs)
    except (KeyError, TypeError, ValueError):
        return False


def _retry(
    captioner: Captioner,
    unreadable_rows: dict[int, ImageRow],
    decode: Decoding,
    workers: int,
    strict: bool,
) -> dict[int, dict[str, Any]]:
    """Caption images, by their indices, that could not be read before; returns their new rows."""
    positions, sources = list(unreadable_rows), [image for image, _ in unreadable_rows.values()]
    rows: dict[int, dict[str, Any]] = {}
    unreadable = None if strict else lambda i, error: rows.update({positions[i]: as_json(sources[i], error)})
    stream = captioner.stream(sources, decode, choose_workers(workers, len(sources)), unreadable, positions=positions)
    rows.update((positions[i], as_json(sources[i], caption, captioner.precision)) for i, caption in stream)
    return rows


def _replace_rows(output: Path, rows: dict[int, dict[str, Any]]) -> None:
    """Replace rows of the file, by their indices; the file is written atomically."""

    def write(new: BinaryIO) -> None:
        with open(output, "rb") as old:
            for index, line in enumerate(old):
                new.write(json.dumps(rows[index]).encode() + b"\n" if index in rows else line)

    write_file(Path(os.path.realpath(output)), write)  # a link stays one


def _read_rows(
    output: Path, file: BinaryIO, images: Iterator[Path | Member], log: Log | None
) -> tuple[_Rows, list[Path | Member]]:
    """Read the rows of an earlier run, up to its last batch that contains a caption; these rows are to be verified.

    Later rows, which hold errors only, count as not written; their images are returned. Advances `images` past all
    rows, and removes an incomplete last row. `log` receives a line on images that have changed since.
    """
    written = os.fstat(file.fileno()).st_mtime
    changed: list[Path | Member] = []
    unreadable: dict[int, ImageRow] = {}
    batch: list[ImageRow] = []  # rows of the current batch
    last: list[ImageRow] = []  # rows of the last batch with a caption
    later: list[tuple[Path | Member, bytes]] = []  # images and lines of the rows after it
    count = size = 0
    kept = count, size
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n") and b'{"photo": '.startswith(line[:10]) and not _is_json(line):
            break  # an interrupted run wrote a part of it
        image, row = _match_row(line, next(images, None), f"{file.name}, line {count + 1}")
        if count % BATCH == 0:
            batch = []
        batch.append((image, row))
        if "error" in row:
            unreadable[count] = image, row
        else:
            last = batch
            if _is_newer(image, written):
                changed.append(image)
        count, size = count + 1, size + len(line)
        if last is batch:
            kept, later = (count, size), []
        else:
            later.append((image, line.rstrip(b"\n") + b"\n"))
    if size < file.seek(0, os.SEEK_END):  # otherwise truncating would only change its date
        file.truncate(size)
    elif count and not line.endswith(b"\n"):  # as an editor may leave it
        file.write(b"\n")
        kept = (count, size + 1) if kept == (count, size) else kept
    if changed and log is not None:
        images_are = "1 image is" if len(changed) == 1 else f"{len(changed):,} images are"
        log(f"{images_are} newer than {file.name}, such as {changed[0]}; delete the file to caption all images again")
    unreadable = {index: row for index, row in unreadable.items() if index < kept[0]}
    return _Rows(output, file, *kept, [line for _, line in later], unreadable, last), [image for image, _ in later]


def _match_row(line: bytes, image: Path | Member | None, where: str) -> ImageRow:
    """Return an image and its row of an earlier run; raises `InputError` if the line is not the row of this image."""
    row: Any = None
    if not line.strip():
        raise InputError(f"{where} is empty; delete this line to resume.")
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
    if image is not None and isinstance(row, dict) and row.get("photo") == str(image):
        if not isinstance(row.get("caption", row.get("error")), str):
            raise InputError(f"{where} holds no caption; name another file.")
        return image, row
    raise InputError(
        f"{where} does not belong to {image or 'any of the images'}; name the first run's images, with new ones after "
        "them only, or another file."
    )


def _is_json(line: bytes) -> bool:
    with suppress(ValueError, RecursionError):
        json.loads(line)
        return True
    return False


def _is_newer(image: Path | Member, time: float) -> bool:
    try:
        return image.stat().st_mtime > time
    except OSError:
        return False


def _caption_share(
    captioner: Captioner, images: list[Path | Member], decode: Decoding, workers: int, strict: bool, first_index: int
) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Caption this process's share of the images; yields rows with their indices, batch by batch, in order.

    What is done before an error of `strict` is yielded, too.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    unreadable = None if strict else lambda i, error: rows.append((i, as_json(images[i], error)))
    workers = choose_workers(workers, math.ceil(len(images) / this_process().num_processes))
    positions = range(first_index, first_index + len(images))
    try:
        for i, caption in captioner.stream(images, decode, workers, unreadable, shared=True, positions=positions):
            start = i - i % BATCH
            if done := sorted((row for row in rows if row[0] < start), key=itemgetter(0)):
                yield done
                rows = [row for row in rows if row[0] >= start]
            rows.append((i, as_json(images[i], caption, captioner.precision)))
    except InputError:
        yield rows
        raise
    yield sorted(rows, key=itemgetter(0))


def as_json(source: Source, caption: Caption | InputError, precision: str | None = None) -> dict[str, Any]:
    """Convert a caption, or the error in its place, to the object that `--json` prints and `--output` writes.

    Alternatives are those of `other_captions`; `precision` is that of the backbone. Log-probabilities are rounded to
    four decimals, as further ones depend on the number of threads.
    """
    if isinstance(caption, InputError):
        return {"photo": str(source), "error": str(caption)}
    first, *others = (
        {"caption": each.text, "log_probability": round(each.log_probability, 4)}
        for each in (caption, *other_captions(caption))
    )
    row = {"photo": str(source), **first, **({"alternatives": others} if others else {})}
    return row if precision is None else {**row, "precision": precision}
