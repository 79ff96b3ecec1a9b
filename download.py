"""COCO, whole or its first photos, and the original recipe's published weights, each by one command.

    python download.py coco --root data/coco --year 2017 [--limit 500]
    python download.py weights --to models/published

A download that was interrupted goes on where it stopped when the same command is given again; until it is
whole, everything lies in a folder `.download` inside the data set, and nothing that is there looks finished.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import shutil
import sys
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import tyro
from PIL import Image
from tqdm import tqdm

from captioning.errors import InputError, run_command
from importers import import_weights

COCO_SERVER = "http://images.cocodataset.org"  # its https certificate names another host; SHA-256 protects us
# Archive: (bytes, SHA-256), from tensorflow_datasets/url_checksums/coco.txt of github.com/tensorflow/datasets
COCO_ARCHIVES = {
    "annotations/annotations_trainval2014.zip": (
        252872794,
        "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
    ),
    "annotations/image_info_test2014.zip": (
        763464,
        "7cecc66f6b09c1671c1896a1bcc1f35eb09b7fcf00a5c18420a5f0f5983dc8c9",
    ),
    "zips/train2014.zip": (
        13510573713,
        "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
    ),
    "zips/val2014.zip": (
        6645013297,
        "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
    ),
    "zips/test2014.zip": (
        6660437059,
        "ead40c62230cb2cf70ff4c8b4c70abdc260a7556e77b3282621d06d8e2e35bdf",
    ),
    "annotations/annotations_trainval2017.zip": (
        252907541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    ),
    "annotations/image_info_test2017.zip": (
        1144034,
        "e52f412dd7195ac8f98d782b44c6dd30ea10241e9f42521f67610fbe055a74f8",
    ),
    "zips/train2017.zip": (
        19336861798,
        "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    ),
    "zips/val2017.zip": (
        815585330,
        "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    ),
    "zips/test2017.zip": (
        6646970404,
        "c7908c3c9f94ba2f3340ebbeec58c25db6be8774f18d68c2f15d0e369d95baba",
    ),
}

WEIGHTS_URL = "https://drive.google.com/uc?id=1s3aRAdt8ZMqn53UUSSFLCDBJ_F-KNbpE"
VOCAB_URL = "https://raw.githubusercontent.com/iamirmasoud/image_captioning/HEAD/vocab.pkl"
VOCAB_BYTES = 273174
VOCAB_SHA256 = "f1bc5899fc86273f07fc1c3bd18c192317cc35a51023faeadf9cabc6448fa8b1"
WEIGHTS_BYTES = 1_500_000_000  # room for the zip, what is taken from it, and the model's folder

ATTEMPTS = 5  # in a row without a single new byte
RETRY_SECONDS = 0.5  # doubled after every failure
TIMEOUT_SECONDS = 30.0
PHOTO_THREADS = 16
CHUNK_BYTES = 1 << 20
PHOTO_BYTES = 200_000  # a COCO photo has 163,000 on average
ANNOTATION_BYTES = 150_000_000  # the caption files of one year, unpacked


class _NetworkError(Exception):
    """A request failed; `permanent` when asking again would not help."""

    def __init__(self, reason: str, permanent: bool = False):
        super().__init__(reason)
        self.permanent = permanent


class _StoppedError(Exception):
    """Another thread failed, or the user interrupted."""


class _Progress:
    """A progress bar that many threads advance, and that tells them when to stop."""

    def __init__(self, total: int, unit: str, **options: Any):
        self._bar = tqdm(total=total, unit=unit, disable=None, **options)
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def advance(self, amount: int) -> None:
        if self.stop.is_set():
            raise _StoppedError
        with self._lock:
            self._bar.update(amount)

    def run(self, tasks: list[Callable[[], Any]], threads: int) -> list[Any]:
        """The results of all tasks; the first error stops the others, and so does Ctrl-C."""
        with ThreadPoolExecutor(max(1, threads)) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                return [future.result() for future in futures]
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                self._bar.close()


# ---------------------------------------------------------------- one file


def _request(url: str, start: int = 0) -> http.client.HTTPResponse:
    headers = {"User-Agent": "image-captioning"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        gone = 400 <= error.code < 500 and error.code not in (408, 429)
        raise _NetworkError(f"the server answers {error.code} {error.reason}", permanent=gone) from error
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(str(getattr(error, "reason", "") or error)) from error


def _read(response: http.client.HTTPResponse, size: int | None = None) -> bytes:
    try:
        return response.read(size)
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(f"the connection broke ({error})") from error


def fetch(url: str, path: Path, size: int, sha256: str, progress: _Progress) -> None:
    """Download `url` to `path`, going on from `path`.part where an earlier attempt left one.

    Args:
        size: How many bytes it must have.
        sha256: Their checksum.

    Raises:
        InputError: The server has another file, or cannot be reached after several attempts.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    progress.advance(min(have, size))
    failures = 0
    while have < size:
        reason, before = "the connection broke", have
        try:
            with _request(url, have) as response:
                if have and response.status != 206:  # a server without ranges sends it all again
                    progress.advance(-have)
                    have = 0
                offered = have + int(response.headers.get("Content-Length") or size - have)
                if offered != size:
                    raise InputError(f"{url} has {offered:,} bytes where {size:,} should be.")
                with part.open("ab" if have else "wb") as file:
                    while chunk := _read(response, CHUNK_BYTES):
                        file.write(chunk)
                        have += len(chunk)
                        progress.advance(len(chunk))
        except _NetworkError as error:
            reason = str(error)
            if error.permanent:
                raise InputError(f"{url} cannot be downloaded: {reason}.") from error
        failures = 0 if have > before else failures + 1
        if failures == ATTEMPTS:
            raise InputError(f"{url} cannot be downloaded: {reason}; run the same command again to go on.")
        if have < size:
            progress.stop.wait(RETRY_SECONDS * 2**failures)

    digest = hashlib.sha256()
    checking = tqdm(total=size, desc=f"checking {path.name}", unit="B", unit_scale=True, disable=None, leave=False)
    with part.open("rb") as file, checking:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            checking.update(len(chunk))
            progress.advance(0)
    if digest.hexdigest() != sha256:
        part.unlink()
        raise InputError(
            f"{url} came with the SHA-256 {digest.hexdigest()} where {sha256} should be, and was deleted; "
            "run the same command again."
        )
    os.replace(part, path)


def extract(archive: Path, members: dict[str, Path], progress: _Progress | None = None) -> None:
    """Unpack `members` of a zip: each whole or, when anything goes wrong, not at all.

    Args:
        members: A file's name in the archive, or a folder's with its closing slash -> where it goes.

    Raises:
        InputError: The archive is damaged, lacks a member, does not fit on the disk, or has a name that
            leads out of its folder.
    """
    temporary = archive.with_name(archive.name + ".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            chosen: list[tuple[zipfile.ZipInfo, Path]] = []
            for info in file.infolist():
                name = PurePosixPath(info.filename)
                if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in info.filename:
                    raise InputError(f"{archive.name} wants to write outside of its folder ({name}).")
                for index, member in enumerate(members):
                    if info.filename == member and not info.is_dir():
                        chosen.append((info, temporary / str(index)))
                    elif member.endswith("/") and info.filename.startswith(member) and not info.is_dir():
                        inside = name.relative_to(PurePosixPath(member))
                        chosen.append((info, temporary / str(index) / inside))
            for index, member in enumerate(members):
                if not any(path.is_relative_to(temporary / str(index)) for _, path in chosen):
                    raise InputError(f"{archive.name} holds no {member}.")
            _require_space(archive.parent, sum(info.file_size for info, _ in chosen))
            for info, path in tqdm(chosen, desc=archive.name, unit="file", disable=None, leave=False):
                path.parent.mkdir(parents=True, exist_ok=True)
                with file.open(info) as source, path.open("wb") as target:  # checks the CRC
                    shutil.copyfileobj(source, target, CHUNK_BYTES)
                if progress:
                    progress.advance(0)
        for index, target_path in enumerate(members.values()):
            target_path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / str(index), target_path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{archive} is not a whole zip archive: {error}; delete it.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_space(folder: Path, needed: int) -> None:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"{folder} needs {needed / 1e9:.1f} GB of free disk space and has {free / 1e9:.1f} GB; "
            "free some, or name a folder on another disk."
        )


# ---------------------------------------------------------------- COCO


def _members(archive: str) -> list[str]:
    """What the layout of a data set takes from an archive; a folder ends with a slash."""
    name = PurePosixPath(archive).stem
    if name.startswith("annotations_trainval"):
        return [f"annotations/captions_{split}{name[-4:]}.json" for split in ("train", "val")]
    return [f"annotations/{name}.json"] if name.startswith("image_info") else [f"{name}/"]


def _fetch_archives(archives: list[str], root: Path, work: Path) -> None:
    """Download and unpack COCO's archives into the layout below `root`, all at once."""
    wanted: dict[str, dict[str, Path]] = {}
    for archive in archives:
        targets = {m: root / (m if m.endswith(".json") else f"images/{m}") for m in _members(archive)}
        if not all(path.exists() for path in targets.values()):
            wanted[archive] = targets
    sizes = {archive: COCO_ARCHIVES[archive][0] for archive in wanted}
    # They are unpacked one at a time and removed, and photos do not compress: at worst all archives lie
    # on the disk, as archives or as photos, and the largest both ways.
    needed = int(1.03 * (sum(sizes.values()) + max(sizes.values(), default=0)))
    if any(path.suffix == ".json" for targets in wanted.values() for path in targets.values()):
        needed += ANNOTATION_BYTES
    already = sum(path.stat().st_size for path in work.glob("*.zip*") if path.is_file())
    _require_space(root, needed - already)
    unpacking = threading.Lock()

    def one(archive: str) -> None:
        path = work / PurePosixPath(archive).name
        size, sha256 = COCO_ARCHIVES[archive]
        if path.exists():  # it was whole when it got this name
            progress.advance(size)
        else:
            fetch(f"{COCO_SERVER}/{archive}", path, size, sha256, progress)
        with unpacking:
            extract(path, wanted[archive], progress)
            path.unlink()

    progress = _Progress(sum(sizes.values()), "B", unit_scale=True, desc="archives")
    progress.run([partial(one, archive) for archive in wanted], threads=len(wanted))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("info", {}), dict):
        raise InputError(f"{path} is not the JSON that COCO has; delete it.")
    return content


def _fetch_photo(image: dict[str, Any], path: Path, progress: _Progress) -> str | None:
    """Download one photo; the reason when it is not there to be had."""
    url, reason = image["coco_url"], ""
    for attempt in range(ATTEMPTS):
        if attempt:
            progress.stop.wait(RETRY_SECONDS * 2**attempt)
        progress.advance(0)
        try:
            with _request(url) as response:
                data = _read(response)
            with Image.open(io.BytesIO(data)) as photo:
                photo.load()
                if photo.size != (image["width"], image["height"]):
                    return f"it has {photo.size[0]} x {photo.size[1]} pixels"
        except _NetworkError as error:
            if error.permanent:
                return str(error)
            reason = str(error)
            continue
        except Exception:  # a broken file makes Pillow raise nearly anything
            return "it is not a photo"
        temporary = path.with_name(path.name + ".part")
        temporary.write_bytes(data)
        os.replace(temporary, path)
        return None
    raise InputError(f"{url} cannot be downloaded: {reason}; run the same command again to go on.")


def _fetch_first_photos(documents: dict[str, dict[str, Any]], limit: int, root: Path, work: Path) -> list[str]:
    """The first `limit` photos of each split, then its trimmed annotations; what could not be had."""
    waiting: list[tuple[dict[str, Any], Path]] = []
    for name, document in documents.items():
        folder = work / "images" / name.split("_")[-1].removesuffix(".json")
        folder.mkdir(parents=True, exist_ok=True)
        document["images"] = document["images"][:limit]
        for image in document["images"]:
            path = folder / PurePosixPath(image["file_name"]).name
            if not path.exists() and not (root / path.relative_to(work)).exists():
                waiting.append((image, path))

    def one(image: dict[str, Any], path: Path) -> str | None:
        reason = _fetch_photo(image, path, progress)
        progress.advance(1)
        return reason

    progress = _Progress(len(waiting), "photo", desc="photos")
    reasons = progress.run([partial(one, image, path) for image, path in waiting], PHOTO_THREADS)
    missing = {image["coco_url"]: why for (image, _), why in zip(waiting, reasons, strict=True) if why}

    for name, document in documents.items():
        document["images"] = [image for image in document["images"] if image["coco_url"] not in missing]
        if not document["images"]:
            url, why = next(iter(missing.items()))
            raise InputError(f"no photo of {name} could be downloaded, {url} first: {why}.")
    for path in sorted((work / "images").rglob("*.jpg")):
        target = root / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    for name, document in documents.items():
        kept = {image["id"] for image in document["images"]}
        if "annotations" in document:
            document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
        document["info"] = {**document.get("info", {}), "limit": limit}
        trimmed = work / "trimmed.json"
        trimmed.write_text(json.dumps(document))
        (root / "annotations").mkdir(exist_ok=True)
        os.replace(trimmed, root / "annotations" / name)
    return [f"{url} ({why})" for url, why in missing.items()]


def coco(
    root: Path = Path("data/coco"),
    year: Literal[2014, 2017] = 2017,
    limit: int | None = None,
) -> None:
    """Download COCO's captions and photos, checked against their published sizes and checksums.

    All of 2017 is 27 GB to download and needs 48 GB of disk space on the way.

    Args:
        root: The data set to write.
        year: The edition of COCO.
        limit: Only the first so many photos of each split, one by one: a small experiment in a minute.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, not {limit}.")
    work = root / ".download"
    archives = [archive for archive in COCO_ARCHIVES if archive.endswith(f"{year}.zip")]
    names = [Path(m).name for archive in archives for m in _members(archive) if m.endswith(".json")]
    other = 2014 + 2017 - year
    if list(root.glob(f"annotations/*{other}.json")):
        raise InputError(f"{root} holds COCO {other}, and a data set is of one year; name another --root.")
    try:
        for name in names:
            path = root / "annotations" / name
            found = _read_json(path).get("info", {}).get("limit") if path.exists() else limit
            if found != limit:
                what = f"the first {found} photos" if found else "all photos"
                raise InputError(f"{root} holds {what} of each split; delete it or name another --root.")
        if limit is None and (work / "images").exists():
            raise InputError(f"{root} holds an unfinished download with --limit; finish it or delete it.")
        missing: list[str] = []
        if limit is None:
            _fetch_archives(archives, root, work)
        elif not all((root / "annotations" / name).exists() for name in names):
            _require_space(root, len(names) * limit * PHOTO_BYTES)
            _fetch_archives([a for a in archives if a.startswith("annotations/")], work, work)
            documents = {name: _read_json(work / "annotations" / name) for name in names}
            missing = _fetch_first_photos(documents, limit, root, work)
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{root} cannot be written: {error.strerror or error}; run the same command again to go on."
        ) from error
    print(f"{root} is ready: python train.py --data {root}")
    if missing:
        raise InputError(
            f"{len(missing)} photos could not be downloaded and are left out of {root}: {', '.join(missing)}."
        )


def weights(to: Path = Path("models/published")) -> None:
    """Download the original recipe's published weights and vocabulary as a model's folder.

    Args:
        to: The model to write; it must not exist yet, or be empty.
    """
    try:
        import gdown  # only this command needs it
    except ImportError as error:
        raise InputError("the published weights lie on a drive that needs gdown: pip install gdown") from error
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to} exists and is not empty; delete it or name another folder.")
    work = to.with_name(to.name + ".download")
    archive, files = work / "weights.zip", [work / "encoder-3.pkl", work / "decoder-3.pkl"]
    try:
        _require_space(to, WEIGHTS_BYTES)
        work.mkdir(parents=True, exist_ok=True)
        progress = _Progress(VOCAB_BYTES, "B", unit_scale=True, desc="vocab.pkl")
        progress.run([partial(fetch, VOCAB_URL, work / "vocab.pkl", VOCAB_BYTES, VOCAB_SHA256, progress)], 1)
        if not archive.exists():
            try:
                gdown.download(WEIGHTS_URL, str(archive), quiet=not sys.stderr.isatty(), resume=True)
            except Exception as error:  # gdown's own errors share no base class with its HTTP library's
                reason = " ".join(str(error).split()) or type(error).__name__
                raise InputError(f"{WEIGHTS_URL} cannot be downloaded: {reason}") from error
        if not zipfile.is_zipfile(archive):
            archive.unlink(missing_ok=True)
            raise InputError(f"{WEIGHTS_URL} gave something else than a zip archive; try again later.")
        with zipfile.ZipFile(archive) as file:
            inside = {PurePosixPath(name).name: name for name in file.namelist()}
        extract(archive, {inside.get(path.name, path.name): path for path in files})
        import_weights(*files, work / "vocab.pkl", to)
        shutil.rmtree(work)
    except OSError as error:
        raise InputError(f"{to} cannot be written: {error.strerror or error}.") from error


def main() -> None:
    """The command line: what to download."""
    tyro.extras.subcommand_cli_from_dict(
        {"coco": coco, "weights": weights},
        description="Download COCO, or the original recipe's published weights.",
    )


if __name__ == "__main__":
    run_command(main)
