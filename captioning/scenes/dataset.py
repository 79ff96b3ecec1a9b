"""Draw the sample data set in parallel, in COCO's layout.

A scene is planned first, then painted and captioned from the plan, so that `checking.check` can tell whether a caption
of the picture is right. Picture i of a split depends only on the seed, the split and i: the same seed gives the same
bytes with any number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from captioning.coco_layout import SPLITS
from captioning.errors import InputError, log
from captioning.files import require_local
from captioning.scenes.composition import paint_scene
from captioning.scenes.sentences import describe
from captioning.scenes.world import plan

VERSION = "5"
DRAWN_FILE = re.compile(
    r"images/(train|val|test)/[0-9]{12}\.jpg|annotations/(captions_(train|val|test)|image_info_test)\.json"
)
MAX_PICTURES = 1_000_000  # maximum number of pictures in a split, and number of ids reserved for it
MAX_SERIAL = 400  # maximum number of pictures that this process draws alone, as starting others takes longer


def draw_scene(rng: random.Random) -> tuple[Image.Image, dict, list[str]]:
    """Draw one picture (RGB, or L in greyscale), its ground truth and five captions, all from `rng`."""
    scene = plan(rng)
    return paint_scene(rng, scene), scene, describe(rng, scene)


def _image_id(split: str, index: int) -> int:
    return SPLITS.index(split) * MAX_PICTURES + index + 1


def _file_name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def _draw_picture(folder: Path, seed: int, split: str, index: int) -> tuple[dict, list[dict]]:
    """Write one picture; returns its entries in the annotation file."""
    image, scene, captions = draw_scene(random.Random(f"{seed}/{split}/{index}"))
    image_id = _image_id(split, index)
    name = _file_name(image_id)
    image.save(folder / "images" / split / name, quality=90)
    width, height = image.size
    entry = {
        "id": image_id,
        "file_name": name,
        "width": width,
        "height": height,
        "license": 1,
        "scene": scene,
    }
    notes = [{"id": image_id * 10 + k, "image_id": image_id, "caption": text} for k, text in enumerate(captions)]
    return entry, notes


def _draw_pictures(folder: Path, seed: int, jobs: list[tuple[str, int]]) -> list[tuple[dict, list[dict]]]:
    return [_draw_picture(folder, seed, split, index) for split, index in jobs]


def _drawn(folder: Path) -> list[dict | None]:
    """Read the "info" of the folder's annotation files, None for one that is missing or not of drawn scenes."""
    infos: list[dict | None] = []
    for name in (*(f"captions_{split}" for split in SPLITS), "image_info_test"):
        try:
            with open(folder / "annotations" / f"{name}.json", encoding="utf-8") as file:
                info = json.load(file)["info"]
            infos.append(info if "scenes" in info else None)
        except (OSError, ValueError, KeyError, TypeError):
            infos.append(None)
    return infos


def draw_dataset(folder: str | Path, train: int = 6000, val: int = 500, test: int = 500, seed: int = 0) -> Path:
    """Draw the sample data set into a folder, in COCO's layout; returns the folder.

    A folder that already holds the same data set is left unchanged; other drawn scenes are replaced. The folder is
    filled when everything is drawn, so that an interrupted run leaves no data set.

    Raises `InputError` if a number is negative or too large, if the folder holds something else, or if scenes
    that would be replaced have other files next to them.
    """
    folder, counts = Path(folder), {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        if not 0 <= count <= MAX_PICTURES:
            raise InputError(f"--{split} {count}: choose a number from 0 to {MAX_PICTURES}.")
    require_local(folder)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"{folder} is a file; name a folder for the data set.")
    partial_folder = folder / ".partial-scenes"
    info = {
        "description": "Drawn scenes with five captions each",
        "version": VERSION,
        "scenes": {"counts": counts, "seed": seed, "version": VERSION},
    }
    if folder.is_dir():
        infos = _drawn(folder)
        if all(drawn == info for drawn in infos) and all(
            {_file_name(_image_id(split, index)) for index in range(count)} <= _names(folder / "images" / split)
            for split, count in counts.items()
        ):
            return folder
        if not any(infos) and any(path != partial_folder for path in folder.iterdir()):
            raise InputError(f"{folder} holds something other than drawn scenes; name an empty or a new folder.")
        if any(infos):
            _require_only_scenes(folder)
            log(f"replacing the scenes in {folder}, which were drawn with other options or are incomplete")
    try:
        _draw_into(folder, partial_folder, counts, seed, info)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return folder


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _require_only_scenes(folder: Path) -> None:
    """Raise `InputError` where images/ or annotations/ hold another file, which replacing them would delete."""
    for path in (path for name in ("annotations", "images") for path in (folder / name).rglob("*")):
        inside = path.relative_to(folder).as_posix()
        if path.is_file() and not path.name.startswith(".") and not DRAWN_FILE.fullmatch(inside):
            raise InputError(f"{path} is not a drawn scene and would be deleted; move it, or name another folder.")


def _draw_into(folder: Path, partial_folder: Path, counts: dict[str, int], seed: int, info: dict) -> None:
    """Draw the pictures and write their captions into `partial_folder`, then move them to `folder`."""
    shutil.rmtree(partial_folder, ignore_errors=True)
    for split in SPLITS:
        (partial_folder / "images" / split).mkdir(parents=True)
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    chunks = [jobs[i : i + 50] for i in range(0, len(jobs), 50)]
    draw = partial(_draw_pictures, partial_folder, seed)
    pictures = []
    with tqdm(total=len(jobs), desc="drawing", unit="picture", disable=None) as bar:
        if len(jobs) <= MAX_SERIAL:
            for chunk in chunks:
                pictures += draw(chunk)
                bar.update(len(chunk))
        else:
            # not forked: the caller may have started torch's threads
            with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
                for done in pool.map(draw, chunks):
                    pictures += done
                    bar.update(len(done))
    _write_annotations(partial_folder / "annotations", info, jobs, pictures)
    for name in ("images", "annotations"):  # in this order: by its annotations, a folder is known as drawn scenes
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        os.replace(partial_folder / name, folder / name)
    partial_folder.rmdir()


def _write_annotations(
    folder: Path, info: dict, jobs: list[tuple[str, int]], pictures: list[tuple[dict, list[dict]]]
) -> None:
    """Write the annotation files of all splits."""
    folder.mkdir()
    licenses = [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]
    for split in SPLITS:
        mine = [picture for (job_split, _), picture in zip(jobs, pictures, strict=True) if job_split == split]
        images = {"info": info, "licenses": licenses, "images": [entry for entry, _ in mine]}
        captions = images | {"annotations": [note for _, notes in mine for note in notes]}
        files = {f"captions_{split}": captions} | ({"image_info_test": images} if split == "test" else {})
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
