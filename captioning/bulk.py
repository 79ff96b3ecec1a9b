"""Captions of any number of images, written to a file that a stopped run goes on with."""

from __future__ import annotations

import heapq
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import filelock
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from captioning.captioner import Caption, Captioner, Decoding, Source
from captioning.distributed import this_process
from captioning.errors import InputError
from captioning.features import BATCH
from captioning.files import photo_suffixes
from captioning.shards import SUFFIX, Member, is_shard, read_photos

NAMES = 1 << 18  # of a folder's files that are held at once, some 30 MB
CHUNK = 32 * BATCH  # photos that a process captions between two writes of --output


def find_photos(paths: Iterable[Path]) -> list[Path | Member]:
    """The photos at the paths, as `stream_photos` finds them."""
    return list(stream_photos(paths))


def stream_photos(paths: Iterable[Path]) -> Iterator[Path | Member]:
    """The photos at the paths, in the order given: of a folder the files that look like photos, in name order.

    A tar file's come in its order, where its name comes if it lies in a folder. A folder of any size is never held
    in memory whole. Raises `InputError` at once for a folder or a tar file that holds no photos or cannot be read.
    """
    paths = list(paths)
    for path in paths:
        if next(_photos_at(path), None) is None:
            raise InputError(f"{path} holds no photos; name a photo or a folder of them.")
    return chain.from_iterable(map(_photos_at, paths))


def _photos_at(path: Path) -> Iterator[Path | Member]:
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that no folder can have, too
        for name in _names(path):
            yield from _photos_at(path / name)
    elif is_shard(path):
        yield from read_photos(path)
    else:
        yield path


def _names(folder: Path) -> Iterator[str]:
    """The names of a folder's photos and tar files, in order; the folder is read once for each `NAMES` of them."""
    suffixes, after = photo_suffixes() | {SUFFIX}, ""
    while True:
        try:
            with os.scandir(folder) as entries:
                later = (entry for entry in entries if entry.name > after)
                meant = (entry for entry in later if os.path.splitext(entry.name)[1].lower() in suffixes)
                names = heapq.nsmallest(NAMES, (entry.name for entry in meant if entry.is_file()))
        except OSError as error:
            raise InputError(f"{folder} cannot be read ({error.strerror}).") from None
        yield from names
        if len(names) < NAMES:
            return
        after = names[-1]


def write_captions(
    captioner: Captioner, paths: Iterable[Path], how: Decoding, output: Path, workers: int = 0, strict: bool = False
) -> tuple[int, int]:
    """Caption the photos at the paths into a file of JSON Lines, one a photo, in order, by all processes together.

    Rows that a run wrote which was stopped stay, and it goes on after them. A photo that cannot be read has an
    "error" in its row. Returns how many photos there are, and how many cannot be read. Raises `InputError` where the
    rows are of other photos, or give them other captions than this model does with these options.
    """
    process = this_process()
    main = process.is_main_process
    done = failed = first_index = 0
    with ExitStack() as stack:
        if main:  # which alone looks for the photos and reads and writes the file
            photos = stream_photos(paths)
            stack.enter_context(_alone(output))
            file = stack.enter_context(open(output, "a+b"))
            done, failed, again = _read_rows(file, photos)
            photos = chain([photo for photo, _ in again], photos)  # in whole batches, as if never stopped
            first_index = done - len(again)
        progress = stack.enter_context(
            tqdm(desc="captions", initial=done, unit="photo", delay=2, disable=None if main else True)
        )
        while True:
            few = list(islice(photos, CHUNK * process.num_processes)) if main else []
            few, first_index = broadcast_object_list([few, first_index])
            if not few:
                break
            rows = gather_object(_caption_share(captioner, few, how, workers, strict, first_index))
            first_index += len(few)
            if not main:
                continue
            rows = [row for _, row in sorted(rows, key=itemgetter(0))]
            for (_, old), new in zip(again, rows, strict=False):
                readable = "caption" in old and "caption" in new
                if readable and (old["caption"] != new["caption"] or old.keys() != new.keys()):
                    raise InputError(
                        f"{output} holds other captions than this model gives with these options, of "
                        f"{old['photo']} for one; finish it as it was begun, or name another file."
                    )
            rows, again = rows[len(again) :], []
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
            for row in rows:
                if "error" in row:
                    tqdm.write(f"error: {row['error']}", file=sys.stderr)
                    failed += 1
            done += len(rows)
            progress.update(len(rows))
    return broadcast_object_list([(done, failed)])[0]


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Nobody else writes into the same file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output.with_name(f"{output.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"{output} is being written by another process; wait for it or name another file.") from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            os.unlink(lock.lock_file)


def _read_rows(file: BinaryIO, photos: Iterator[Path | Member]) -> tuple[int, int, list[tuple[Path | Member, dict]]]:
    """How many rows are there, how many of them are errors, and those of the last batch, with their photos.

    `photos` is moved on past them; a row that a kill has torn is cut off.
    """
    done = failed = end = 0
    batch: list[tuple[Path | Member, dict]] = []
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n") and line[:10] == b'{"photo": '[: len(line)]:
            break
        photo = next(photos, None)
        try:
            row = json.loads(line)
            if row["photo"] != str(photo):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"{file.name}, line {done + 1} is not of {photo or 'any photo'}; caption the photos that it was "
                "begun with, or name another file."
            ) from None
        if done % BATCH == 0:
            batch = []
        batch.append((photo, row))
        done, failed, end = done + 1, failed + ("error" in row), end + len(line)
    file.truncate(end)
    return done, failed, batch


def _caption_share(
    captioner: Captioner, photos: list[Path | Member], how: Decoding, workers: int, strict: bool, first_index: int
) -> list[tuple[int, dict[str, Any]]]:
    """This process's share of the photos as rows, with their indices, in any order."""
    rows: list[tuple[int, dict[str, Any]]] = []
    unreadable = None if strict else lambda i, error: rows.append((i, as_json(photos[i], error)))
    if len(photos) <= 2 * BATCH * this_process().num_processes:
        workers = 0
    for i, caption in captioner.stream(photos, how, workers, unreadable, shared=True, first_index=first_index):
        rows.append((i, as_json(photos[i], caption)))
    return rows


def as_json(source: Source, caption: Caption | InputError) -> dict[str, Any]:
    """A caption, or why there is none, as the JSON that `--json` prints and `--output` writes.

    Log-probabilities to four digits: those after them depend on how many threads computed them.
    """
    if isinstance(caption, InputError):
        return {"photo": str(source), "error": str(caption)}
    first, *others = (
        {"caption": found.text, "log_probability": round(found.log_probability, 4)}
        for found in (caption, *caption.alternatives)
    )
    return {"photo": str(source), **first, **({"alternatives": others} if others else {})}
