"""Images and captions for the benchmarks, drawn with COCO's sizes and statistics."""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.scenes.composition import paint_scene
from captioning.scenes.world import plan

# COCO's train2014
IMAGES, CAPTIONS = 82_783, 414_113
SIZES, SIZE_SHARES = ((640, 480), (640, 427), (480, 640), (500, 375), (427, 640)), (6, 6, 3, 1, 1)


def draw_images(folder: Path, count: int) -> list[Path]:
    """Draw images of COCO's sizes in pixels and, with noise, its sizes in bytes."""
    folder.mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        return list(pool.map(partial(_draw_image, folder), range(count), chunksize=8))


def _draw_image(folder: Path, index: int) -> Path:
    rng, noise = random.Random(f"speed/{index}"), np.random.default_rng(index)
    size = rng.choices(SIZES, SIZE_SHARES)[0]
    scene = paint_scene(rng, plan(rng)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    grain = noise.normal(0, rng.uniform(6, 24), (size[1], size[0], 1))
    path = folder / f"{index:012d}.jpg"
    Image.fromarray((np.asarray(scene) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=91)
    return path


def draw_captions(count: int, seed: int = 0) -> list[str]:
    """Draw captions of made-up words, with the lengths and the word frequencies of COCO's captions.

    In 414,113 captions, about 9,000 words occur five times or more.
    """
    rng = np.random.default_rng(seed)
    rank = np.arange(1, 60_001)
    frequency = 1 / (rank + 2) / (1 + rank / 300) ** 0.9
    words = [_word(i) for i in range(len(rank))]
    lengths = np.maximum(7, np.rint(rng.gamma(2.2, 1.75, count) + 6.4)).astype(int)
    drawn = rng.choice(len(words), lengths.sum(), p=frequency / frequency.sum()).tolist()
    ends = np.cumsum(lengths)
    sentences = ([words[i] for i in drawn[begin:end]] for begin, end in zip(ends - lengths, ends, strict=True))
    stops = np.where(rng.random(count) < 0.75, ".", "").tolist()
    return [" ".join(sentence).capitalize() + stop for sentence, stop in zip(sentences, stops, strict=True)]


def _word(index: int) -> str:
    """Write an index in syllables, so that frequent words are shorter: bab, bad, babeb."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    index, last = divmod(index + 900, len(consonants))
    syllables = consonants[last]
    while index:
        index, digit = divmod(index, 70)
        syllables = consonants[digit // 5] + vowels[digit % 5] + syllables
    return syllables


def write_annotations(path: Path, names: list[str], captions: list[str]) -> None:
    """Write a caption file with COCO's fields; caption i belongs to image i modulo the number of images."""
    host = "http://images.example.org"
    images = [
        {
            "license": 1,
            "file_name": name,
            "coco_url": f"{host}/train2014/{name}",
            "height": 480,
            "width": 640,
            "date_captured": "2013-11-14 17:02:52",
            "flickr_url": f"{host}/6116/6255196340_da26cf2c9e_z.jpg",
            "id": i + 1,
        }
        for i, name in enumerate(names)
    ]
    annotations = [{"image_id": i % len(names) + 1, "id": i + 1, "caption": text} for i, text in enumerate(captions)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))
