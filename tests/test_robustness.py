"""What comes from elsewhere: photos of every kind, files that are broken, files that mean harm."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_noise, write_split
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from captioning import images
from captioning.annotations import read_annotations
from captioning.backbones import Preprocessing
from captioning.captioner import Captioner
from captioning.checkpoint import load_model, load_resume, read_description
from captioning.errors import InputError
from captioning.features import stored_features
from captioning.fetching import extract
from captioning.images import find_unreadable, read_image
from captioning.listing import find_images
from captioning.metrics import score_results
from captioning.original_weights import read_vocab_pickle
from captioning.training import TrainingConfig, train
from captioning.weights import read_state_dict
from data_loader import CaptionDataset, get_loader
from importers import import_flickr, import_folder, import_karpathy
from model import EncoderCNN
from train import resumed_config
from vocabulary import Vocabulary

pytestmark = pytest.mark.slow

# Photos of every kind: red on the left, blue on the right, each 40 x 60

RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_colours() -> Image.Image:
    image = Image.new("RGB", (80, 60), RED)
    image.paste(BLUE, (40, 0, 80, 60))
    return image


def assert_two_colours(image: Image.Image, left: tuple = RED, right: tuple = BLUE, tolerance: int = 12) -> None:
    assert image.mode == "RGB"
    assert image.size == (80, 60)
    colours = np.array([image.getpixel((10, 30)), image.getpixel((70, 30))], int)
    assert np.abs(colours - np.array([left, right])).max() <= tolerance, colours


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_image_stands_upright(tmp_path: Path, orientation: int, form: str):
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = two_colours()
    if orientation in turns:  # stored the other way round
        image = image.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo", form, exif=exif)
    assert_two_colours(read_image(tmp_path / "photo"))
    with Image.open(tmp_path / "photo") as opened:
        assert_two_colours(read_image(opened))


def test_a_broken_exif_costs_the_turn_and_not_the_image(tmp_path: Path):
    two_colours().save(tmp_path / "photo.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12")
    assert_two_colours(read_image(tmp_path / "photo.jpg"))


@pytest.mark.parametrize("form", ["memory", "TIFF", "JPEG", "PNG", "GIF"])
@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "P", "RGBA", "RGBX"])
def test_any_mode_becomes_rgb(mode: str, form: str):
    holds = {"TIFF": ("CMYK", "LAB", "P", "RGBA", "RGBX"), "JPEG": ("CMYK", "YCbCr"), "PNG": ("P", "RGBA")}
    if form != "memory" and mode not in holds.get(form, ("P", "RGBA")):
        pytest.skip(f"{form} cannot hold {mode}")
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(two_colours(), *profiles, outputMode="LAB")
    else:
        image = two_colours().convert(mode)
    if form != "memory":
        file = io.BytesIO()
        image.save(file, form)
        image = Image.open(file)
    assert_two_colours(read_image(image), tolerance=25 if mode == "LAB" else 12)


@pytest.mark.parametrize("form", ["TIFF", "PNG", "memory"])
def test_sixteen_bits_keep_their_brightness(form: str):
    pixels = np.full((60, 80), 65535 // 4, np.uint16)
    pixels[:, 40:] = 3 * 65535 // 4
    image = Image.fromarray(pixels)
    if form != "memory":
        file = io.BytesIO()
        image.save(file, form)
        image = Image.open(file)
    assert_two_colours(read_image(image), (64,) * 3, (191,) * 3)


def test_floating_point_and_black_and_white():
    pixels = np.full((60, 80), 0.25, np.float32)
    pixels[:, 40:] = 1.0
    assert_two_colours(read_image(Image.fromarray(pixels)), (64,) * 3, (255,) * 3)
    image = two_colours().convert("L").point(lambda value: 255 * (value > 50)).convert("1")
    assert_two_colours(read_image(image), (255,) * 3, (0,) * 3)
    assert_two_colours(read_image(two_colours().convert("L")), (76,) * 3, (29,) * 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_white(mode: str):
    image = two_colours().convert("L").convert("RGBA") if mode == "LA" else two_colours().convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (40, 0, 80, 60))
    image.putalpha(alpha)
    left = image.getpixel((10, 30))[:3]
    assert_two_colours(read_image(image.convert(mode)), left, (255,) * 3)


def test_a_palette_s_transparent_colour_is_white(tmp_path: Path):
    image = Image.new("P", (80, 60), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (40, 0, 80, 60))
    for name in ("a.png", "a.gif"):
        image.save(tmp_path / name, transparency=1)
        assert_two_colours(read_image(tmp_path / name), RED, (255,) * 3)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_many_frames_the_first_counts(tmp_path: Path, form: str):
    others = [Image.new("RGB", (80, 60), "green")] * 2
    two_colours().save(tmp_path / "photo", form, save_all=True, append_images=others)
    assert Image.open(tmp_path / "photo").n_frames > 1
    assert_two_colours(read_image(tmp_path / "photo"))


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30}], ids=str)
@pytest.mark.parametrize("shorter_side", [None, 20])
def test_jpegs_of_every_kind(tmp_path: Path, options: dict, shorter_side: int | None):
    two_colours().resize((800, 600)).save(tmp_path / "photo.jpg", **options)
    assert_two_colours(read_image(tmp_path / "photo.jpg", shorter_side).resize((80, 60)))


# Photos that cannot be read


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is enormous."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(form: str) -> bytes:
    file = io.BytesIO()
    draw_noise(0, (320, 240)).save(file, form)
    return file.getvalue()


def test_unreadable_images_are_listed_in_one_pass(tmp_path: Path):
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"{i}.jpg")
        paths[-1].write_bytes(encoded("JPEG")[: 1500 if i in (1, 4) else None])
    for workers in (0, 2):
        unreadable = find_unreadable(paths, workers, tmp_path / str(workers))
        assert sorted(unreadable) == [1, 4]
        assert "1.jpg" in str(unreadable[1])


def test_readable_images_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [tmp_path / f"{i}.jpg" for i in range(4)]
    for path in paths:
        path.write_bytes(encoded("JPEG"))
    paths[2].write_bytes(b"")
    read: list[Path] = []

    def counting(path: Path, *arguments: object, **options: object) -> Image.Image:
        read.append(path)
        return read_image(path, *arguments, **options)

    def check() -> list[Path]:
        read.clear()
        assert list(find_unreadable(paths, cache=tmp_path)) == [2]
        return list(read)

    monkeypatch.setattr(images, "read_image", counting)
    assert check() == paths
    assert check() == [paths[2]]
    os.utime(paths[0], ns=(0, 0))
    assert check() == paths
    for torn in ("", "[2"):
        for path in (tmp_path / "unreadable").iterdir():
            path.write_text(torn)
        assert check() == paths


# The table of bad inputs


@dataclass
class Kit:
    """What a row of the table spoils: a data set of one photo, a photo, a vocabulary, a trained model."""

    folder: Path
    trained: Path
    small: Callable[..., TrainingConfig]

    @property
    def data(self) -> Path:
        """A data set whose training split is whole."""
        data = self.folder / "data"
        self.annotations = write_split(data, "train", {"a.png": ["a dog runs"] * 5})
        draw_noise(0).save(data / "images" / "train" / "a.png")
        return data

    def read_data(self, content: object) -> None:
        """Read a training split whose annotation file holds this."""
        data = self.data
        if isinstance(content, bytes):
            self.annotations.write_bytes(content)
        elif callable(content):
            whole = json.loads(self.annotations.read_text())
            content(whole)
            self.annotations.write_text(json.dumps(whole))
        else:
            self.annotations.write_text(json.dumps(content))
        CaptionDataset(data, "train", cache=self.folder / "cache")

    def read_vocabulary(self, content: str) -> None:
        """Read a vocabulary file that holds this."""
        (self.folder / "vocab.json").write_text(content)
        Vocabulary.load(self.folder / "vocab.json")

    def read_image(self, content: bytes) -> None:
        """Read a photo file that holds this."""
        (self.folder / "photo.jpg").write_bytes(content)
        read_image(self.folder / "photo.jpg")

    def model(self, name: str = "", content: bytes | None = None, **changes: object) -> Path:
        """A copy of the model's folder with a file replaced (or without it) or its description changed."""
        folder = self.folder / "model"
        folder.mkdir()
        for file in ("captioner.json", "backbone.pkl", "encoder-1.pkl", "decoder-1.pkl"):
            shutil.copy(self.trained / file, folder)
        if name and content is None:
            (folder / name).unlink()
        elif name:
            (folder / name).write_bytes(content)
        whole = json.loads((self.trained / "captioner.json").read_text())
        for where, value in changes.items():
            *parents, last = where.split("__")
            part = whole
            for parent in parents:
                part = part[parent]
            part[last] = value
        if changes:
            (folder / "captioner.json").write_text(json.dumps(whole))
        return folder

    def model_with(self, name: str, key: str, number: float) -> Path:
        """A copy of the model's folder with this number in a weight."""
        state, file = read_state_dict(self.trained / name), io.BytesIO()
        state[key].view(-1)[-1] = number
        torch.save(state, file)
        return self.model(name, file.getvalue())


def caption_with_overflow(folder: Path) -> None:
    encoder, *others = load_model(folder)
    encoder.embed.weight.data.fill_(3e38)
    captioner = Captioner(encoder, *others)
    captioner.folder = folder
    captioner(draw_noise(0))


def change(*path: object, to: object) -> Callable[[dict], None]:
    """Replaces what lies at this path in a JSON document."""

    def act(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return act


def append(key: str, value: object) -> Callable[[dict], None]:
    """Adds an entry to a list of a JSON document."""
    return lambda content: content[key].append(value)


def image(**fields: object) -> dict:
    return {"id": 1, "file_name": "a.png", **fields}


ROWS: dict[str, tuple[Callable[[Kit], object], str]] = {
    # a data set
    "no data folder": (lambda k: CaptionDataset(k.folder / "none"), r"none does not exist.*scenes\.py"),
    "a data folder that is a file": (lambda k: CaptionDataset(__file__), r"test_robustness\.py"),
    "no annotations": (lambda k: CaptionDataset(k.folder), r"holds no annotations/captions_train"),
    "a data folder with a name longer than any": (
        lambda k: CaptionDataset("a" * 999),
        r"a{999} does not exist",
    ),
    "a data folder with a path longer than any": (
        lambda k: CaptionDataset("a/" * 3000),
        r"a does not exist",
    ),
    "no validation split": (
        lambda k: CaptionDataset(k.data, "val"),
        r"no val\*\.tar; move some images .*images/val and annotations/captions_val\.json",
    ),
    "two years": (
        lambda k: (write_split(k.data, "train2017", {"a.png": ["a"]}), CaptionDataset(k.folder / "data")),
        r"several years: captions_train\.json, captions_train2017\.json",
    ),
    "no such mode": (
        lambda k: CaptionDataset(k.data, "training"),
        r'"training" is not one of train, val, test',
    ),
    "annotations that are a folder": (
        lambda k: (k.data, k.annotations.unlink(), k.annotations.mkdir(), CaptionDataset(k.folder / "data")),
        r"captions_train\.json is a folder, not a file",
    ),
    "annotations: empty file": (lambda k: k.read_data(b""), r"captions_train\.json is not JSON"),
    "annotations: a number that yajl cannot hold": (
        lambda k: k.read_data(b'{"x": ' + b"9" * 150_000 + b', "images": [], "annotations": []}'),
        r"captions_train\.json is not JSON \(it holds a number of more than 4,300 digits",
    ),
    "annotations: a number out of range": (
        lambda k: k.read_data(b'{"x": 1e99999999999999999999, "images": [], "annotations": []}'),
        r"captions_train\.json is not JSON that can be read: it holds a number that is out of range",
    ),
    "annotations: an endless caption": (
        lambda k: k.read_data(
            b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 1, "caption": "'
            + b"a " * 600_000
            + b'"}]}'
        ),
        r"annotations\[0\] has a caption of more than 5,000 characters",
    ),
    "annotations: torn": (lambda k: k.read_data(b'{"images": [{"id"'), r"captions_train\.json is not JSON"),
    "annotations: not UTF-8": (
        lambda k: k.read_data(b'{"images": "\xff"}'),
        r"captions_train\.json is not UTF-8 text; write it again in UTF-8",
    ),
    "annotations: half a UTF-16 character": (
        lambda k: k.read_data('{"images": [], "annotations": ["\ud800 "]}'.encode("utf-16", "surrogatepass")),
        r"captions_train\.json is not valid Unicode",
    ),
    "annotations: nested deeply": (
        lambda k: k.read_data(b"[" * 100_000),
        r"captions_train\.json .*nested more than 100 deep",
    ),
    "annotations: nested 990 deep": (
        lambda k: k.read_data(b'{"images": ' + b"[" * 990 + b"]" * 990 + b"}"),
        r"captions_train\.json .*nested more than 100 deep",
    ),
    "annotations: an object in objects": (
        lambda k: k.read_data(b'{"info": ' + b'{"a": ' * 100_000),
        r"captions_train\.json .*nested more than 100 deep",
    ),
    "annotations: a comma too many": (
        lambda k: k.read_data(b'{"images": [1, ]}'),
        r"captions_train\.json: images\[0\] is not a JSON object",
    ),
    "annotations: a comma too few": (
        lambda k: k.read_data(b'{"images": [], "annotations": [] "info": 0}'),
        r"captions_train\.json is not JSON \(parse error: .* near '.* \[\] \"info\": 0\}'",
    ),
    "annotations: more after the end": (
        lambda k: k.read_data(b'{"images": [], "annotations": []} {}'),
        r"captions_train\.json is not JSON \(parse error: trailing garbage",
    ),
    "annotations: two lists of images": (
        lambda k: k.read_data(b'{"images": [], "images": []}'),
        r'has two lists of "images"',
    ),
    "annotations: a list": (lambda k: k.read_data([1, 2]), r'has no list of "images"'),
    "annotations: images a number": (lambda k: k.read_data({"images": 5}), r'has no list of "images"'),
    "annotations: no images": (lambda k: k.read_data({"images": [], "annotations": []}), r"holds no images"),
    "annotations: an image is null": (
        lambda k: k.read_data(append("images", None)),
        r"captions_train\.json: images\[1\] is not a JSON object\.",
    ),
    "annotations: an image without id": (
        lambda k: k.read_data(append("images", {"file_name": "b.png"})),
        r'captions_train\.json: images\[1\] lacks "id"\.',
    ),
    "annotations: an image without a name": (
        lambda k: k.read_data(append("images", {"id": 2})),
        r'captions_train\.json: images\[1\] lacks "file_name"\.',
    ),
    "annotations: an image with a number for a name": (
        lambda k: k.read_data(append("images", image(id=2, file_name=7))),
        r'images\[1\] has a "file_name" that is not a name: 7\.',
    ),
    "annotations: an id that is a name": (
        lambda k: k.read_data(append("images", image(id="a1"))),
        r"images\[1\] has an image id that is not a whole number: 'a1'\.",
    ),
    "annotations: an id with a fraction": (
        lambda k: k.read_data(append("images", image(id=1.5))),
        r"images\[1\] has an image id that is not a whole number: 1\.5\.",
    ),
    "annotations: an id that is true": (
        lambda k: k.read_data(append("images", image(id=True))),
        r"images\[1\] has an image id that is not a whole number: True\.",
    ),
    "annotations: an id twice": (
        lambda k: k.read_data(append("images", image(id="1"))),
        r"captions_train\.json: images\[0\] and images\[1\] have the same id, 1;",
    ),
    "annotations: an id of 20 digits": (
        lambda k: k.read_data(append("images", image(id=10**20))),
        r"images\[1\] has an image id of more than 64 bits",
    ),
    "annotations: a photo above the folder": (
        lambda k: k.read_data(append("images", image(id=2, file_name="../../a.png"))),
        r"images\[1\] .*outside the image folder: '\.\./\.\./a\.png'",
    ),
    "annotations: a photo at the root": (
        lambda k: k.read_data(append("images", image(id=2, file_name="/etc/passwd"))),
        r"images\[1\] .*outside the image folder",
    ),
    "annotations: a photo with a zero byte": (
        lambda k: k.read_data(append("images", image(id=2, file_name="a\0.png"))),
        r"images\[1\] has a \"file_name\" with a line break or a zero byte: 'a\\x00\.png'",
    ),
    "annotations: a photo with a line break": (
        lambda k: k.read_data(append("images", image(id=2, file_name="a\n.png"))),
        r"images\[1\] has a \"file_name\" with a line break or a zero byte: 'a\\n\.png'",
    ),
    "annotations: a photo with a name longer than any": (
        lambda k: k.read_data(change("images", 0, "file_name", to=f"{'a' * 999}/{'b' * 5000}")),
        r"1 of 1 images .* are missing",
    ),
    "annotations: no captions list": (
        lambda k: k.read_data(lambda content: content.pop("annotations")),
        r'has no list of "annotations"',
    ),
    "annotations: no captions": (lambda k: k.read_data(change("annotations", to=[])), r"holds no captions"),
    "annotations: a caption is a number": (
        lambda k: k.read_data(change("annotations", 2, "caption", to=7)),
        r'captions_train\.json: annotations\[2\] has a "caption" that is not text: 7\.',
    ),
    "annotations: a caption is missing": (
        lambda k: k.read_data(change("annotations", 2, to={"image_id": 1})),
        r'captions_train\.json: annotations\[2\] lacks "caption"\.',
    ),
    "annotations: a caption is a list of numbers": (
        lambda k: k.read_data(change("annotations", 2, "caption", to=["a", 1])),
        r"captions_train\.json: annotations\[2\] has a \"caption\" that is not text: \['a', 1\]\.",
    ),
    "annotations: an annotation is null": (
        lambda k: k.read_data(append("annotations", None)),
        r"captions_train\.json: annotations\[5\] is not a JSON object\.",
    ),
    "annotations: each caption is empty": (
        lambda k: k.read_data(change("annotations", to=[{"image_id": 1, "caption": " \n"}])),
        r"captions_train\.json holds no captions: each of them is empty or rejected\.",
    ),
    "annotations: a caption with a name for its image": (
        lambda k: k.read_data(change("annotations", 0, "image_id", to="a.png")),
        r"captions_train\.json: annotations\[0\] has an image id that is not a whole number: 'a\.png'\.",
    ),
    "annotations: a caption of no image": (
        lambda k: k.read_data(change("annotations", 0, "image_id", to=7)),
        r"caption of image 7",
    ),
    "annotations: half a character": (
        lambda k: k.read_data(change("annotations", 0, "caption", to="a \ud800 dog")),
        r"captions_train\.json is not valid Unicode text",
    ),
    "annotations: the other half of a character": (
        lambda k: k.read_data(change("annotations", 0, "caption", to="a \udc00 dog")),
        r"captions_train\.json is not valid Unicode text",
    ),
    "annotations: a photo that is not there": (
        lambda k: k.read_data(change("images", 0, "file_name", to="b.png")),
        r"1 of 1 images .* are missing.*b\.png",
    ),
    "annotations: a photo that leads nowhere": (
        lambda k: (
            (k.data / "images" / "train" / "b.png").symlink_to(k.folder / "none"),
            k.read_data(change("images", 0, "file_name", to="b.png")),
        ),
        r"1 of 1 images .* are missing.*b\.png",
    ),
    "a threshold that leaves no word": (
        lambda k: CaptionDataset(k.data, vocab_threshold=6, cache=k.folder),
        r"lower --vocab-threshold",
    ),
    # a vocabulary
    "vocabulary: missing": (
        lambda k: Vocabulary.load(k.folder / "v.json"),
        r"v\.json .*vocab_from_file=False",
    ),
    "vocabulary: not JSON": (lambda k: k.read_vocabulary("a dog"), r"vocab\.json cannot be read"),
    "vocabulary: a dictionary": (lambda k: k.read_vocabulary('{"a": 1}'), r"vocab\.json is not a vocabulary"),
    "vocabulary: without special words": (
        lambda k: k.read_vocabulary('["a", "b", "c"]'),
        r"begins with <start>",
    ),
    "vocabulary: a word twice": (
        lambda k: k.read_vocabulary('["<start>", "<end>", "<unk>", "a", "a"]'),
        r"distinct strings",
    ),
    "vocabulary: a number": (
        lambda k: k.read_vocabulary('["<start>", "<end>", "<unk>", 5]'),
        r"must be distinct strings",
    ),
    "vocabulary: for building one of validation": (
        lambda k: get_loader(mode="val", vocab_from_file=False, cocoapi_loc=k.data),
        r"vocab_from_file=True",
    ),
    # a photo
    "photo: missing": (lambda k: read_image(k.folder / "none.jpg"), r"none\.jpg does not exist"),
    "photo: empty": (lambda k: k.read_image(b""), r"photo\.jpg cannot be read as an image"),
    "photo: text": (lambda k: k.read_image(b"no photo at all"), r"photo\.jpg cannot be read as an image"),
    "photo: a folder": (lambda k: read_image(k.folder), r"cannot be read as an image"),
    "photo: a torn JPEG": (lambda k: k.read_image(encoded("JPEG")[:1500]), r"photo\.jpg .*truncated"),
    "photo: a torn PNG": (lambda k: k.read_image(encoded("PNG")[:500]), r"photo\.jpg cannot be read"),
    "photo: a torn GIF": (lambda k: k.read_image(encoded("GIF")[:500]), r"photo\.jpg cannot be read"),
    "photo: a torn WebP": (lambda k: k.read_image(encoded("WEBP")[:500]), r"photo\.jpg cannot be read"),
    "photo: a program": (
        lambda k: k.read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
        r"photo\.jpg .*not in an image format",
    ),
    "photo: a name longer than any": (lambda k: find_images([Path("a" * 999)]) and read_image("a" * 999), r"a{999}"),
    "photo: a bomb": (lambda k: k.read_image(bomb(60_000, 60_000)), r"photo\.jpg .*more than 125 million pixels"),
    "photo: a folder without any": (lambda k: find_images([k.folder]), r"holds no images"),
    # a model's folder
    "model: no folder": (lambda k: load_model(k.folder / "none"), r"none does not exist"),
    "model: a name longer than any": (lambda k: Captioner.load("a" * 999), r"a{999} does not exist"),
    "model: no description": (lambda k: load_model(k.model("captioner.json")), r"captioner\.json is missing"),
    "model: description torn": (
        lambda k: load_model(k.model("captioner.json", b'{"format"')),
        r"captioner\.json",
    ),
    "model: description a list": (lambda k: load_model(k.model("captioner.json", b"[]")), r"captioner\.json"),
    "model: description nested deeply": (
        lambda k: load_model(k.model("captioner.json", b'{"data":' + b"[" * 100_000)),
        r"captioner\.json does not describe a model",
    ),
    "model: a format of the future": (lambda k: load_model(k.model(format=9)), r"captioner\.json .*format"),
    "model: an unknown decoder": (
        lambda k: load_model(k.model(architecture__decoder="gpt")),
        r"decoder: .*'lstm'",
    ),
    "model: an absurd size": (
        lambda k: load_model(k.model(architecture__hidden_size=10**9)),
        r"hidden_size: ",
    ),
    "model: a size that is true": (
        lambda k: load_model(k.model(architecture__num_layers=True)),
        r"num_layers: Input should be a valid integer",
    ),
    "model: an absurd depth": (
        lambda k: load_model(k.model(architecture__num_layers=10**6)),
        r"num_layers: ",
    ),
    "model: an absurd photo": (
        lambda k: load_model(k.model(preprocessing__image_size=10**6)),
        r"image_size must be from 32 to 2048",
    ),
    "model: the largest sizes": (
        lambda k: load_model(k.model(architecture__hidden_size=1 << 14, architecture__num_layers=16)),
        r"decoder-1\.pkl",
    ),
    "model: a negative size": (lambda k: load_model(k.model(architecture__embed_size=-1)), r"embed_size: "),
    "model: a size that is text": (
        lambda k: load_model(k.model(architecture__embed_size="big")),
        r"embed_size: ",
    ),
    "model: half a vocabulary": (
        lambda k: load_model(k.model(vocabulary=["<start>", "<end>", "<unk>", "a"])),
        r"decoder-1\.pkl has .* of size",
    ),
    "model: no vocabulary": (lambda k: load_model(k.model(vocabulary=[])), r"captioner\.json .*<start>"),
    "model: no encoder": (lambda k: load_model(k.model("encoder-1.pkl")), r"incomplete.*encoder-<i>\.pkl"),
    "model: no decoder": (lambda k: load_model(k.model("decoder-1.pkl")), r"incomplete.*encoder-<i>\.pkl"),
    "model: an empty decoder": (
        lambda k: load_model(k.model("decoder-1.pkl", b"")),
        r"decoder-1\.pkl is not",
    ),
    "model: a decoder of text": (
        lambda k: load_model(k.model("decoder-1.pkl", b"abc")),
        r"decoder-1\.pkl is not",
    ),
    "model: a torn decoder": (
        lambda k: load_model(k.model("decoder-1.pkl", (k.trained / "decoder-1.pkl").read_bytes()[:-500])),
        r"decoder-1\.pkl is not a file of weights",
    ),
    "model: two decoders": (
        lambda k: load_model(k.model("encoder-1.pkl", (k.trained / "decoder-1.pkl").read_bytes())),
        r"encoder-1\.pkl has embed\.weight of size",
    ),
    "model: a decoder with a nan": (
        lambda k: load_model(k.model_with("decoder-1.pkl", "linear.bias", float("nan"))),
        r"decoder-1\.pkl has nan in linear\.bias",
    ),
    "model: an encoder with an infinity": (
        lambda k: load_model(k.model_with("encoder-1.pkl", "embed.weight", float("-inf"))),
        r"encoder-1\.pkl has -inf in embed\.weight",
    ),
    "model: an encoder of weights that overflow": (
        lambda k: Captioner.load(k.model_with("encoder-1.pkl", "embed.weight", 1e38)),
        r"encoder-1\.pkl has 1e\+38 in embed\.weight",
    ),
    "model: weights that overflow together": (lambda k: caption_with_overflow(k.trained), r"small are so large"),
    # a training
    "training: a grid out of range": (lambda k: k.small(grid_size=0), r"grid_size must be at least 1, not 0"),
    "training: images of no size": (lambda k: k.small(image_size=0), r"image_size must be from 32 to 2048, not 0"),
    "training: a log for a lock": (lambda k: k.small(log_file=".lock"), r"log_file must not be named as a model's"),
    "training: batch size": (lambda k: k.small(batch_size=0), r"batch_size must be at least 1, not 0"),
    "training: no epochs": (lambda k: k.small(num_epochs=0), r"num_epochs must be at least 1"),
    "training: dropout": (lambda k: k.small(dropout=1.5), r"dropout must be at most"),
    "training: dropout that is no number": (lambda k: k.small(dropout=float("nan")), r"dropout must be"),
    "training: learning rate": (lambda k: k.small(learning_rate=-1.0), r"learning_rate must be above 0"),
    "training: a seed below 0": (lambda k: k.small(seed=-1), r"seed must be at least 0"),
    "training: tiny photos": (lambda k: k.small(image_size=16), r"image_size must be from 32 to 2048, not 16"),
    "training: absurd sizes": (lambda k: k.small(hidden_size=10**9), r"hidden_size must be at most"),
    "training: a log elsewhere": (lambda k: k.small(log_file="../log.txt"), r"log_file must be a name"),
    "training: a name elsewhere": (lambda k: k.small(name="../model"), r"name must be a name"),
    "training: six parts of five": (lambda k: train(k.small(fine_tune=6)), r"fine_tune .* stages, 0 to 5, not 6"),
    "training: no weights file": (lambda k: train(k.small(weights="none.pth")), r"none\.pth does not exist"),
    "training: a folder that is a file": (
        lambda k: train(k.small(models=Path(__file__))),
        r"cannot be written \(Not a directory\)",
    ),
    "training: nothing to resume": (
        lambda k: resumed_config(k.folder / "none"),
        r"none does not exist",
    ),
    "training: no state to resume": (
        lambda k: train(resumed_config(k.model())),
        r"model holds weights, but no training to resume; start a new run from them with --start-from",
    ),
    "training: a backbone of another shape": (
        lambda k: resumed_config(k.model(training={"backbone": 5})),
        r"captioner\.json does not hold valid options of a training run: backbone: Input should be a valid string",
    ),
    "training: options of another shape": (
        lambda k: resumed_config(k.model(training={"batch_size": "many"})),
        r"captioner\.json does not hold valid options of a training run: batch_size",
    ),
    "training: a log elsewhere, by a stranger": (
        lambda k: resumed_config(k.model(training={"log_file": "/etc/passwd"})),
        r"captioner\.json .*log_file",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_bad_input_gives_one_sentence_that_names_it(
    row: str,
    tmp_path: Path,
    trained: Path,
    small: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    act, expected = ROWS[row]
    with pytest.raises(InputError, match=expected) as caught:
        act(Kit(tmp_path, trained, small))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((".", ")"))


def test_an_image_without_permission_is_named(image_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(io, "FileIO", refuse)
    with pytest.raises(InputError, match=r"photo\.png cannot be read as an image .*Permission denied"):
        read_image(image_path)


# No pickle is executed


class Harm:
    """A pickle of it makes a folder when it is loaded as pickles are."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("form", ["pickle", "torch", "torch, old", "numpy"])
def test_no_pickle_is_executed_in_whatever_file_it_is_planted(
    form: str, tmp_path: Path, trained: Path, small: Callable[..., TrainingConfig], tiny_backbone: Callable
):
    proof = tmp_path / "proof"
    harm, file = Harm(proof), io.BytesIO()
    if form == "pickle":
        pickle.dump(harm, file)
    elif form == "numpy":
        np.savez(file, **dict.fromkeys(("tokens", "words", "file_names", "image_ids"), np.array([harm], object)))
    else:
        state = {"format": 2, "embed.weight": torch.zeros(1), "harm": harm}
        torch.save(state, file, _use_new_zipfile_serialization=form == "torch")
    planted = file.getvalue()
    kit = Kit(tmp_path, trained, small)
    folder = kit.model()
    readers: dict[str, Callable[[Path], object]] = {
        "captioner.json": lambda path: read_description(folder),
        "encoder-1.pkl": lambda path: load_model(folder, 1),
        "decoder-1.pkl": lambda path: load_model(folder, 1),
        "resume.pt": lambda path: load_resume(folder, print),
        "resume-previous.pt": lambda path: load_resume(folder, print),
        "weights.pth": lambda path: EncoderCNN(8, weights=path),
        "vocab.json": Vocabulary.load,
        "captions_train.json": lambda path: read_annotations(path, tmp_path),
        "photo.jpg": read_image,
        "encoder-7.safetensors": read_state_dict,
        "results.json": lambda path: score_results(trained / "captioner.json", path),
        "vocab.pkl": read_vocab_pickle,
        "dataset_coco.json": lambda path: import_karpathy(path, tmp_path / "out"),
        "captions.jsonl": lambda path: import_folder(path, tmp_path / "out"),
        "captions.csv": lambda path: import_folder(path, tmp_path / "out"),
        "captions.token.txt": lambda path: import_flickr(path, tmp_path / "out"),
        "archive.zip": lambda path: extract(path, {"a.jpg": tmp_path / "a.jpg"}),
    }
    for name, read in readers.items():
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(planted)
        with pytest.raises(InputError):
            read(folder / name)
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
        assert not proof.exists(), name
    # what was kept of an annotation file is made anew
    data = kit.data
    image_paths = [data / "images" / "train" / "a.png"]
    before = read_annotations(kit.annotations, tmp_path / "cache")
    next((tmp_path / "cache").rglob("*.npz")).write_bytes(planted)
    assert read_annotations(kit.annotations, tmp_path / "cache").words == before.words
    assert list(find_unreadable(image_paths, cache=tmp_path / "cache")) == []
    next((tmp_path / "cache" / "unreadable").iterdir()).write_bytes(planted)
    assert list(find_unreadable(image_paths, cache=tmp_path / "cache")) == []
    encoder = EncoderCNN(8, weights="random").eval()
    stored_features(encoder, image_paths, Preprocessing(32), cache=tmp_path / "cache")
    next((tmp_path / "cache").rglob("features.npy")).write_bytes(planted)
    with pytest.raises((ValueError, TypeError)):
        stored_features(encoder, image_paths, Preprocessing(32), cache=tmp_path / "cache")
    assert not proof.exists()
    pickle.loads(pickle.dumps(harm))  # the harm is real
    assert proof.exists()


# Anything at all

KEYS = st.sampled_from(["images", "annotations", "id", "image_id", "file_name", "caption", "format", "vocabulary"])
NUMBERS = st.integers(-(10**25), 10**25) | st.floats()
TEXTS = st.text(st.characters(), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | TEXTS, inner, max_size=4),
    max_leaves=20,
)
quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def as_bytes(content: object) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def only_sentences(act: Callable[[], object]) -> None:
    """Do it: it succeeds or raises `InputError`, and nothing else."""
    with contextlib.suppress(InputError):
        act()


@quick
@given(JSON | st.binary(max_size=200))
def test_any_vocabulary_file(tmp_path: Path, content: object):
    (tmp_path / "vocab.json").write_bytes(as_bytes(content))
    only_sentences(lambda: Vocabulary.load(tmp_path / "vocab.json"))


@quick
@given(st.lists(TEXTS, max_size=5))
def test_any_words_are_refused_or_preserved(tmp_path: Path, words: list[str]):
    words = ["<start>", "<end>", "<unk>", *words]

    def act() -> None:
        vocab = Vocabulary(words)
        vocab.save(tmp_path / "vocab.json")
        assert Vocabulary.load(tmp_path / "vocab.json").words == words
        vocab.decode(range(len(words)))

    only_sentences(act)


@quick
@given(
    JSON
    | st.binary(max_size=200)
    | st.fixed_dictionaries(
        {
            "images": st.lists(st.fixed_dictionaries({"id": NUMBERS | JSON, "file_name": TEXTS | JSON}), max_size=3),
            "annotations": st.lists(
                st.fixed_dictionaries({"id": JSON, "image_id": st.integers(0, 3) | JSON, "caption": TEXTS | JSON}),
                max_size=3,
            ),
        }
    )
    | st.fixed_dictionaries(
        {
            "images": st.just([{"id": 1, "file_name": "a.png"}]),
            "annotations": st.lists(
                st.fixed_dictionaries({"id": st.integers(), "image_id": st.just(1), "caption": TEXTS}),
                min_size=1,
            ),
        },
        optional={"categories": JSON, "info": JSON},
    )
)
def test_any_annotation_file(tmp_path: Path, content: object):
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "images" / "train").mkdir(parents=True, exist_ok=True)
    (tmp_path / "images" / "train" / "a.png").touch()
    (tmp_path / "annotations" / "captions_train.json").write_bytes(as_bytes(content))

    def act() -> None:
        data = CaptionDataset(tmp_path, "train", vocab_threshold=1, cache=tmp_path / "cache")
        data.references()
        assert data.captions(np.arange(len(data)))[0].shape[0] == len(data.image_rows)

    only_sentences(act)


@quick
@given(st.data())
def test_any_description(tmp_path: Path, trained: Path, data: st.DataObject):
    content = json.loads((trained / "captioner.json").read_text())
    if data.draw(st.booleans()):
        content = data.draw(JSON | st.binary(max_size=200))
    else:
        part = content
        if data.draw(st.booleans()):
            part = content[data.draw(st.sampled_from(["architecture", "preprocessing", "training", "data"]))]
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
    (tmp_path / "captioner.json").write_bytes(as_bytes(content))
    for name in ("encoder-1.pkl", "decoder-1.pkl"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(trained / name)
    only_sentences(lambda: read_description(tmp_path))
    only_sentences(lambda: resumed_config(tmp_path))
    only_sentences(lambda: load_model(tmp_path))


@quick
@given(
    form=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA"]),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    end=st.floats(0, 1),
)
@example(form="PNG", flips=[], end=1.0)
def test_any_image(tmp_path: Path, form: str, flips: list[tuple[float, int]], end: float):
    file = io.BytesIO()
    draw_noise(0, (64, 48)).save(file, form)
    content = bytearray(file.getvalue())
    for where, value in flips:
        content[int(where * len(content))] = value
    (tmp_path / "photo").write_bytes(content[: int(end * len(content))])

    def act() -> None:
        image = read_image(tmp_path / "photo", 32)
        assert image.mode == "RGB"
        assert ImageOps.exif_transpose(image).size == image.size

    only_sentences(act)


@quick
@given(TEXTS | st.text(min_size=256, max_size=300))
def test_any_path(path: str):
    only_sentences(lambda: [read_image(source) for source in find_images([Path(path)])])
    only_sentences(lambda: read_image(path))


@quick
@given(st.binary(max_size=300))
def test_any_bytes_are_no_image(tmp_path: Path, content: bytes):
    (tmp_path / "photo").write_bytes(content)
    only_sentences(lambda: read_image(tmp_path / "photo"))


def test_the_smallest_and_the_longest_images_are_captioned(trained: Path):
    captioner = Captioner.load(trained)
    for size in ((1, 1), (1, 50), (300, 2)):
        assert isinstance(captioner(Image.new("RGB", size, "green"))[0].text, str)
