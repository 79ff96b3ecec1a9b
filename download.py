"""Download COCO, all of it or its first images, or the published weights.

    python download.py coco --root data/coco --year 2017 [--limit 500]
    python download.py weights --to models/published

The same command resumes a download that was interrupted. Unfinished downloads are in `.download` inside the data set
(for the weights, in FOLDER.download): an archive's content is moved to its place once all of it is unpacked, and the
images of --limit once all are downloaded.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import os
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, which take seconds, without a traceback

import httpx
import tyro
from PIL import Image

from captioning.coco_layout import image_folder_of
from captioning.errors import InputError, printable, quoted, run_command
from captioning.fetching import (
    TIMEOUT_SECONDS,
    ConcurrentTasks,
    NetworkError,
    connect,
    describe_http_error,
    extract,
    fetch,
    move_into_place,
    read,
    require_space,
)
from captioning.files import lock_output, require_local, require_new_folder, write_file
from captioning.image_files import MAX_SCANS

COCO_SERVER = "http://images.cocodataset.org"  # its https certificate is for another host; SHA-256 protects
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
WEIGHTS_BYTES = 500_000_000  # size limit for the two weight files, zipped or not
WEIGHTS_SECONDS = 3600  # time limit for downloading them; the same command resumes after it

MAX_CONCURRENT_REQUESTS = 16  # for images
IMAGE_BYTES = 200_000  # disk space to reserve for an image; COCO's have 163,000 bytes on average
MAX_IMAGE_BYTES = 4_000_000  # COCO's images have at most 640 x 640 pixels
ANNOTATION_BYTES = 150_000_000  # size of one year's caption files, unpacked


def _members(archive: str) -> list[str]:
    """List what is taken from an archive; a folder ends with a slash."""
    name = PurePosixPath(archive).stem
    if name.startswith("annotations_trainval"):
        return [f"annotations/captions_{split}{name[-4:]}.json" for split in ("train", "val")]
    return [f"annotations/{name}.json"] if name.startswith("image_info") else [f"{name}/"]


async def _fetch_archives(archives: list[str], root: Path, work: Path) -> None:
    """Download COCO's archives concurrently, and unpack them into a data set in `root`."""
    wanted: dict[str, dict[str, Path]] = {}
    for archive in archives:
        targets = {m: root / (m if m.endswith(".json") else f"images/{m}") for m in _members(archive)}
        if not all(path.exists() for path in targets.values()):
            wanted[archive] = targets
    sizes = {archive: COCO_ARCHIVES[archive][0] for archive in wanted}
    # Archives are unpacked one at a time and then removed, and images do not compress: at worst the disk holds
    # every archive either packed or unpacked, and the largest in both forms.
    needed = int(1.03 * (sum(sizes.values()) + max(sizes.values(), default=0)))
    if any(path.suffix == ".json" for targets in wanted.values() for path in targets.values()):
        needed += ANNOTATION_BYTES
    already = sum(path.stat().st_size for path in work.glob("*.zip*") if path.is_file())
    require_space(root, needed - already)
    unpacking = asyncio.Lock()
    tasks = ConcurrentTasks(sum(sizes.values()), "B", unit_scale=True, desc="archives")

    async def fetch_one(client: httpx.AsyncClient, archive: str) -> None:
        path = work / PurePosixPath(archive).name
        size, sha256 = COCO_ARCHIVES[archive]
        if path.exists():  # `fetch` gives this name to a complete file only
            tasks.advance(size)
        else:
            await fetch(client, f"{COCO_SERVER}/{archive}", path, size, sha256, tasks)
        async with unpacking:
            await asyncio.to_thread(extract, path, wanted[archive], stop=tasks.stop)
            path.unlink()

    async with connect() as client:
        await tasks.run([partial(fetch_one, client, archive) for archive in wanted], len(wanted))


def _require_images(annotations: Path) -> None:
    """Raise `InputError` where there are fewer images than the annotation file lists."""
    folder = image_folder_of(annotations)
    expected, present = len(_read_json(annotations).get("images", ())), sum(1 for _ in os.scandir(folder))
    if present < expected:
        raise InputError(
            f"{folder} holds {present:,} of {expected:,} photos; delete it and run the same command again."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("info", {}), dict):
        raise InputError(f"{path} is not an annotation file of COCO; delete it.")
    return content


def _check_image(data: bytes, width: int, height: int) -> str | None:
    """Return why a downloaded image is not a JPEG of this size, or None if it is one."""
    if data.count(b"\xff\xda") > MAX_SCANS:
        return "it is not a photo"
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.size != (width, height):
                return f"it has {image.size[0]} x {image.size[1]} pixels"
            image.load()
    except Exception:  # a broken file makes Pillow raise nearly anything
        return "it is not a photo"
    return None


async def _fetch_image(client: httpx.AsyncClient, image: dict[str, Any], path: Path) -> str | None:
    """Download one image; returns the reason if that fails."""
    problem = None
    for _ in range(2):  # a body that is cut off need not raise an error
        try:
            data = await read(client, image["coco_url"], MAX_IMAGE_BYTES)
        except NetworkError as error:
            return str(error)
        problem = await asyncio.to_thread(_check_image, data, image["width"], image["height"])
        if problem is None:
            write_file(path, lambda file, data=data: file.write(data), sync=False)
            break
    return problem


async def _fetch_images(waiting: list[tuple[dict[str, Any], Path]]) -> dict[str, str]:
    """Download images to their paths; returns the addresses of those that failed, and the reasons."""
    tasks = ConcurrentTasks(len(waiting), "image", desc="images")

    async def fetch_one(client: httpx.AsyncClient, image: dict[str, Any], path: Path) -> str | None:
        problem = await _fetch_image(client, image, path)
        tasks.advance(1)
        return problem

    async with connect() as client:
        problems = await tasks.run([partial(fetch_one, client, *pair) for pair in waiting], MAX_CONCURRENT_REQUESTS)
    return {image["coco_url"]: problem for (image, _), problem in zip(waiting, problems, strict=True) if problem}


def _fetch_first_images(documents: dict[str, dict[str, Any]], limit: int, root: Path, work: Path) -> list[str]:
    """Write the first `limit` images of each split, then their annotations; returns what is missing, and why."""
    waiting: list[tuple[dict[str, Any], Path]] = []
    for name, document in documents.items():
        folder = image_folder_of(work / "annotations" / name)
        folder.mkdir(parents=True, exist_ok=True)
        document["images"] = document["images"][:limit]
        for image in document["images"]:
            path = folder / PurePosixPath(image["file_name"]).name
            if not path.exists() and not (root / path.relative_to(work)).exists():
                waiting.append((image, path))
    require_space(root, len(waiting) * IMAGE_BYTES)
    missing = asyncio.run(_fetch_images(waiting))
    for name, document in documents.items():
        document["images"] = [image for image in document["images"] if image["coco_url"] not in missing]
        if not document["images"]:
            url, why = next(iter(missing.items()))
            raise InputError(f"no photo of {name} could be downloaded, {url} first: {why}.")
    for path in sorted((work / "images").rglob("*.jpg")):
        target = root / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        move_into_place(path, target)
    for name, document in documents.items():
        ids = {image["id"] for image in document["images"]}
        if "annotations" in document:
            document["annotations"] = [a for a in document["annotations"] if a["image_id"] in ids]
        document["info"] = {**document.get("info", {}), "limit": limit}
        content = json.dumps(document).encode()
        (root / "annotations").mkdir(exist_ok=True)
        write_file(root / "annotations" / name, lambda file, content=content: file.write(content))
    return [f"{url} ({why})" for url, why in missing.items()]


def _require_same_options(root: Path, work: Path, names: list[str], archives: list[str], limit: int | None) -> None:
    """Raise `InputError` where an earlier download, finished or not, had other options."""
    for name in names:
        path = root / "annotations" / name
        present = _read_json(path).get("info", {}).get("limit") if path.exists() else limit
        if present != limit:
            what = f"the first {present} photos" if present else "all photos"
            raise InputError(f"{root} holds {what} of each split; delete it or name another --root.")
    if limit is None and (work / "images").exists():
        raise InputError(f"{root} holds an unfinished download with --limit; finish it or delete it.")
    own = tuple(PurePosixPath(archive).name for archive in archives)
    if others := sorted(path for path in work.glob("*.zip*") if not path.name.startswith(own)):
        raise InputError(f"{others[0]} is of an unfinished download with other options; finish it, or delete {work}.")


def coco(
    root: Path = Path("data/coco"),
    year: Literal[2014, 2017] = 2017,
    limit: int | None = None,
) -> None:
    """Download COCO's captions and photos. Archives are checked against their published sizes and checksums.

    All of COCO 2017 is 27 GB to download and needs 48 GB of disk space until it is unpacked.

    Args:
        root: folder of the data set to write.
        year: edition of COCO.
        limit: download only the first LIMIT photos of each split, each by itself; 500 take about a minute.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, not {limit}.")
    require_local(root)
    work = root / ".download"
    archives = [archive for archive in COCO_ARCHIVES if archive.endswith(f"{year}.zip")]
    names = [Path(m).name for archive in archives for m in _members(archive) if m.endswith(".json")]
    other = 2017 if year == 2014 else 2014
    if list(root.glob(f"annotations/*{other}.json")):
        raise InputError(f"{root} holds COCO {other}, and a data set is of one year; name another --root.")
    if others := sorted(path.name for path in root.glob("annotations/captions_*.json") if path.name not in names):
        raise InputError(f"{root} holds another data set ({others[0]}); name another --root.")
    is_new = not os.path.exists(root)  # False for a path of any length
    wanted = [archive for archive in archives if limit is None or archive.startswith("annotations/")]
    try:
        _require_same_options(root, work, names, wanted, limit)
        with lock_output(work, "name another --root"):
            missing: list[str] = []
            if limit is None:
                asyncio.run(_fetch_archives(wanted, root, work))
                for name in names:
                    _require_images(root / "annotations" / name)
            elif work.exists() or not all((root / "annotations" / name).exists() for name in names):
                asyncio.run(_fetch_archives(wanted, work, work))
                documents = {name: _read_json(work / "annotations" / name) for name in names}
                missing = _fetch_first_images(documents, limit, root, work)
            if not missing:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        is_unusable = isinstance(error, FileExistsError | NotADirectoryError | PermissionError)
        advice = "name another folder" if is_unusable else "run the same command again to resume"
        raise InputError(f"{root} cannot be written: {error.strerror or error}; {advice}.") from error
    finally:
        if is_new:
            with suppress(OSError):  # of a folder that is not empty
                root.rmdir()
    print(printable(f"{root} is ready: python train.py --data {quoted(root)}"))
    if missing:
        raise InputError(
            f"{len(missing):,} photos could not be downloaded and are left out of {root}, {', '.join(missing[:10])}"
            f"{' and others' if len(missing) > 10 else ''}; run the same command again to try these again."
        )


def weights(to: Path = Path("models/published")) -> None:
    """Download the original recipe's published weights and vocabulary, and convert them to a model folder.

    Args:
        to: folder of the model to write; it must not exist yet, or be empty.
    """
    try:
        import gdown  # only this command needs it
    except ImportError as error:
        raise InputError("the published weights are on Google Drive: pip install gdown") from error
    require_new_folder(to)
    from captioning.original_weights import convert_weights  # imports torch, which takes seconds

    to = Path(os.path.abspath(to))  # so that "." has a name
    work = to.with_name(to.name + ".download")
    archive, files = work / "weights.zip", (work / "encoder-3.pkl", work / "decoder-3.pkl")
    try:
        require_space(to, 3 * WEIGHTS_BYTES)  # for the archive, its unpacked files and the model folder
        work.mkdir(parents=True, exist_ok=True)
        asyncio.run(_fetch_vocabulary(work / "vocab.pkl"))
        if not archive.exists():
            _fetch_weights(gdown.download, archive)
        try:
            with zipfile.ZipFile(archive) as file:
                inside = {PurePosixPath(name).name: name for name in file.namelist()}
        except zipfile.BadZipFile:
            archive.unlink()
            raise InputError(f"{WEIGHTS_URL} did not return an intact zip archive; try again later.") from None
        extract(archive, {inside.get(path.name, path.name): path for path in files}, at_most=WEIGHTS_BYTES)
        convert_weights(*files, work / "vocab.pkl", to)
        shutil.rmtree(work)
    except OSError as error:
        raise InputError(f"{to} cannot be written: {error.strerror or error}.") from error


def _fetch_weights(download: Callable[..., object], archive: Path) -> None:
    """Download the archive of the published weights with gdown, within limits of size and time; resumes a part."""

    def check(received: int, _: int | None) -> None:
        if received > WEIGHTS_BYTES:
            raise NetworkError(f"it has more than {WEIGHTS_BYTES:,} bytes")

    if "cancel" not in inspect.signature(download).parameters:
        raise InputError("the installed gdown is older than 6.5: pip install --upgrade gdown")
    late = threading.Event()
    timer = threading.Timer(WEIGHTS_SECONDS, late.set)
    timer.start()
    options: dict[str, Any] = {"quiet": not sys.stderr.isatty(), "resume": True, "timeout": TIMEOUT_SECONDS}
    try:
        download(WEIGHTS_URL, str(archive), **options, progress=check, cancel=late)
    except NetworkError as error:
        shutil.rmtree(archive.parent)  # otherwise the next run would resume it
        raise InputError(f"{WEIGHTS_URL} cannot be downloaded: {error}.") from error
    except Exception as error:  # gdown's own errors share no base class with its HTTP library's
        reason = f"it takes more than {WEIGHTS_SECONDS:,} seconds; run the same command again to resume"
        raise InputError(
            f"{WEIGHTS_URL} cannot be downloaded: {reason if late.is_set() else describe_http_error(error)}."
        ) from error
    finally:
        timer.cancel()


async def _fetch_vocabulary(path: Path) -> None:
    tasks = ConcurrentTasks(VOCAB_BYTES, "B", unit_scale=True, desc=path.name)
    async with connect() as client:
        await tasks.run([partial(fetch, client, VOCAB_URL, path, VOCAB_BYTES, VOCAB_SHA256, tasks)], 1)


def main() -> None:
    """Run the command line."""
    tyro.extras.subcommand_cli_from_dict(
        {"coco": coco, "weights": weights},
        description="Download COCO, or the original recipe's published weights.",
    )


if __name__ == "__main__":
    run_command(main)
