"""Images of every kind become RGB within limits; only a transform that resizes first has a JPEG decoded smaller."""

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PEAK, draw_noise, run_code
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import v2

from captioning import image_files, image_formats, images
from captioning.backbones import Preprocessing
from captioning.errors import InputError
from captioning.image_files import read_image
from captioning.images import (
    ImageDataset,
    build_pixel_transform,
    build_transform,
    find_unreadable,
    read_batches,
)
from captioning.resizing import Reduce, Resize, resize_image

ROOT = Path(__file__).parents[1]


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def smooth(size: tuple[int, int]) -> Image.Image:
    """A picture without edges, of which every crop looks different."""
    return draw_noise(0, (32, 24)).resize(size, Image.Resampling.BICUBIC)


# Drafts


class CropAndResize(T.Resize):
    """A user's own step, which does something else before it resizes."""

    def forward(self, img: Image.Image) -> Image.Image:
        return super().forward(img.crop((0, 0, 400, 400)))


@pytest.mark.parametrize(
    ("steps", "drafted"),
    [
        ([T.Resize(32), T.CenterCrop(28)], True),
        ([v2.Resize(32), v2.CenterCrop(28)], True),
        ([T.Resize((32, 48))], True),
        ([T.Resize([32])], True),
        ([Resize(32)], True),
        ([T.CenterCrop(400), T.Resize(32)], False),
        ([T.RandomCrop(200), T.Resize(32)], False),
        ([T.RandomResizedCrop(32)], False),
        ([T.Pad(100), T.Resize(32)], False),
        ([T.Resize(32, interpolation=T.InterpolationMode.NEAREST)], False),
        ([T.Resize(32, interpolation=T.InterpolationMode.NEAREST_EXACT)], False),
        ([T.Resize(32, interpolation=T.InterpolationMode.BOX)], False),
        ([v2.Resize(32, interpolation=Image.Resampling.NEAREST)], False),
        ([v2.Resize(32, interpolation=0)], False),
        ([v2.Resize(32, interpolation=Image.Resampling.BICUBIC)], True),
        ([CropAndResize(32)], False),
        ([T.Compose([T.CenterCrop(400), T.Resize(32)])], False),
        ([T.RandomApply([T.Resize(32)], p=0.0)], False),
        ([], False),
    ],
)
def test_a_jpeg_is_decoded_smaller_only_for_a_resize_that_comes_first(tmp_path: Path, steps: list, drafted: bool):
    path = tmp_path / "a.jpg"
    smooth((800, 600)).save(path, quality=95)
    sizes: list[tuple[int, int]] = []

    def note(image: Image.Image) -> Image.Image:
        sizes.append(image.size)
        return image

    transform = T.Compose([*steps, T.PILToTensor()])
    dataset = ImageDataset([path], transform)
    read = dataset[0].float()
    torch.manual_seed(int(np.random.SeedSequence((0, 0)).generate_state(1, np.uint64)[0]))
    expected = transform(Image.open(path).convert("RGB")).float()
    assert (read - expected).abs().mean() < 2
    ImageDataset.__getitem__(_with(dataset, note), 0)
    assert (sizes[0] != (800, 600)) == drafted


class CropThenResize:
    """A user's transform with steps of its own, before which it does something else."""

    def __init__(self):
        self.transforms = [T.Resize(32), T.PILToTensor()]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return T.Compose(self.transforms)(T.CenterCrop(300)(image))


@pytest.mark.parametrize(
    "transform",
    [
        CropThenResize(),
        T.Compose([T.RandomApply([T.Resize(32)], p=0.0), T.PILToTensor()]),
        T.RandomApply([T.Resize(32), T.PILToTensor()], p=1.0),
        v2.RandomChoice([v2.Compose([v2.Resize(32), v2.PILToTensor()])]),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_only_a_sequence_of_steps_is_known_to_begin_with_the_first(tmp_path: Path, transform: Callable):
    smooth((800, 600)).save(tmp_path / "a.jpg", quality=95)
    expected = transform(Image.open(tmp_path / "a.jpg").convert("RGB"))
    dataset = ImageDataset([tmp_path / "a.jpg"], transform)
    assert torch.equal(dataset[0], expected)
    assert torch.equal(dataset[-1], expected)


def _with(dataset: ImageDataset, note: Callable) -> ImageDataset:
    """The same images read for the same size, of which `note` learns before they are transformed."""
    other = ImageDataset(dataset.paths, lambda image: T.PILToTensor()(note(image)))
    other.sides = dataset.sides
    return other


# Reduced images


def save_as_jpeg(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    file = io.BytesIO()
    resize_image(image, size, T.InterpolationMode.BICUBIC).save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize(
    ("size", "reduced"), [((400, 300), (200, 150)), ((300, 1000), (60, 200)), ((201, 3), (200, 3))]
)
def test_a_larger_image_is_reduced_to_a_small_jpeg(size: tuple[int, int], reduced: tuple[int, int]):
    image = draw_noise(2, size)
    assert Reduce(200)(image) == save_as_jpeg(image, reduced)


def test_an_image_that_is_small_enough_is_not_reduced():
    for size in ((200, 150), (150, 200), (1, 1)):
        image = draw_noise(2, size)
        assert Reduce(200)(image) is image


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("crop", ["center", "squash"])
def test_reducing_comes_before_everything_else(crop: str, train: bool):
    image = draw_noise(2, (400, 300))
    drawn = []
    for reduce_to, given in ((200, image), (None, save_as_jpeg(image, (200, 150)))):
        torch.manual_seed(5)
        drawn.append(build_pixel_transform(Preprocessing(64, crop, reduce_to=reduce_to), train)(given))
    assert torch.equal(*drawn)


def test_a_large_jpeg_is_decoded_smaller_before_it_is_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw_noise(1, (1600, 1200)).save(tmp_path / "large.jpg", quality=95)
    seen = []
    monkeypatch.setattr(Reduce, "__call__", lambda _, image: seen.append(image.size) or image)
    for reduce_to in (99, 100, 399, 400, 799, 800):
        ImageDataset([tmp_path / "large.jpg"], build_pixel_transform(Preprocessing(64, reduce_to=reduce_to)))[0]
    assert seen == [(200, 150), (200, 150), (400, 300), (800, 600), (800, 600), (1600, 1200)]


# Limits


def progressive_bomb(side: int, scans: int) -> bytes:
    """A grey progressive JPEG of a few bytes a scan, each of which goes over all its blocks."""

    def segment(marker: int, content: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content

    start = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([16] * 64))
    start += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
    start += segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + b"\x00")
    start += segment(0xC4, b"\x10" + bytes([1, 1] + [0] * 14) + b"\xe0\x00")
    start += segment(0xDA, bytes([1, 1, 0x00, 0, 0, 0]))
    return start + segment(0xDA, bytes([1, 1, 0x00, 1, 63, 0])) * scans + b"\xff\xd9"


def tag_bomb(tags: int, size: int) -> bytes:
    """EXIF or a TIFF of which every tag refers to the same bytes."""
    start = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack("<HHLL", tag + 1, 7, size, start) for tag in range(tags))
    return b"II*\0" + struct.pack("<LH", 8, tags) + entries + bytes(4) + bytes(size)


def with_exif(jpeg: bytes, exif: bytes) -> bytes:
    parts = [b"Exif\0\0" + exif[i : i + 65000] for i in range(0, len(exif), 65000)]
    return jpeg[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 2) + p for p in parts) + jpeg[2:]


def png_header(width: int, height: int, colours: int) -> bytes:
    """A PNG of a few bytes that says it is enormous; 0 is grey, 6 is RGBA."""
    header = b"IHDR" + struct.pack(">LLBBBBB", width, height, 8, colours, 0, 0, 0)
    chunk = struct.pack(">L", 13) + header + struct.pack(">L", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT"


def plain(width: int, height: int, form: str, mode: str = "RGB", **options: object) -> bytes:
    return encode(Image.new(mode, (width, height)), form, **options)


def bmp_delta(width: int) -> bytes:
    """A run-length encoded BMP of a kilobyte, of one row, which a code moves 255 rows up."""
    codes = b"\0\2\0\xff\0\1"
    start = 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 8, 1, len(codes), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(codes), 0, 0, start) + header + bytes(1024) + codes


def deep_tiff(side: int) -> bytes:
    """A TIFF of four channels of 16 bits, in one strip."""
    strip = zlib.compress(bytes(8 * side), 1)
    depths = 8 + 2 + 12 * 11 + 4
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 4, depths), (259, 3, 1, 8), (262, 3, 1, 2)]
    tags += [(273, 4, 1, depths + 8), (277, 3, 1, 4), (278, 4, 1, side), (279, 4, 1, len(strip))]
    tags += [(284, 3, 1, 1), (338, 3, 1, 2)]
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4) + struct.pack("<4H", *4 * [16]) + strip


def tile_tiff(side: int) -> bytes:
    """A grey TIFF of 100 x 100 pixels, in a tile of side x side."""
    tile = zlib.compress(bytes(side * side), 1)
    tags = [(256, 4, 1, 100), (257, 4, 1, 100), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [(322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8 + 2 + 12 * 10 + 4), (325, 4, 1, len(tile))]
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4) + tile


def with_segments(jpeg: bytes, number: int) -> bytes:
    """A JPEG with further segments, which are empty."""
    return jpeg[:2] + b"\xff\xe5\0\2" * number + jpeg[2:]


def with_chunks(png: bytes, *chunks: tuple[str, bytes], after: bool = False) -> bytes:
    """A PNG with further chunks, before or after its pixels."""
    at = len(png) - 12 if after else 33
    added = [(kind.encode() + content, len(content)) for kind, content in chunks]
    parts = [struct.pack(">L", size) + part + struct.pack(">L", zlib.crc32(part)) for part, size in added]
    return png[:at] + b"".join(parts) + png[at:]


def text(number: int, content: str, kind: str = "zTXt") -> tuple[str, bytes]:
    """A chunk of compressed text."""
    return kind, b"%d\0" % number + {"zTXt": b"\0", "iTXt": b"\1\0\0\0"}[kind] + zlib.compress(content.encode())


RED = Image.new("RGB", (64, 64), "red")
EXIF = tag_bomb(2000, 1 << 20)
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {  # the content of a file, and what is said of it
    "scans": (lambda: progressive_bomb(4000, 2000), "2,001 progressive scans"),
    "scans of a huge image": (lambda: progressive_bomb(16000, 60), "61 progressive scans"),
    "coefficients": (lambda: progressive_bomb(40000, 1), "too many for a progressive JPEG"),
    "tags of a TIFF": (lambda: EXIF, "refer to the same bytes"),
    "tags of a JPEG": (lambda: with_exif(encode(RED, "JPEG"), EXIF), "(64, 64)"),
    "tags of a PNG": (lambda: encode(RED, "PNG", exif=EXIF), "(64, 64)"),
    "texts of a PNG": (
        lambda: with_chunks(encode(RED, "PNG"), *[text(i, "a" * 10**6) for i in range(300)]),
        "(64, 64)",
    ),
    "wide texts of a PNG": (
        lambda: with_chunks(encode(RED, "PNG"), *[text(i, "😀" * 250_000, "iTXt") for i in range(300)]),
        "(64, 64)",
    ),
    "a text of a PNG": (lambda: with_chunks(encode(RED, "PNG"), ("tEXt", b"a\0" + bytes(40 << 20))), "(64, 64)"),
    "tags of a WebP": (lambda: encode(RED, "WEBP", exif=EXIF), "(64, 64)"),
    "pixels of a grey PNG": (lambda: png_header(13000, 12000, 0), "more than 125 million"),
    "pixels of an RGBA PNG": (lambda: png_header(13000, 12000, 6), "more than 125 million"),
    "pixels that Pillow refuses": (lambda: png_header(20000, 10000, 0), "it has more than 125 million pixels"),
    "pixels of a GIF": (lambda: plain(13000, 12000, "GIF", "P"), "more than 125 million"),
    "pixels of a WebP": (lambda: plain(9000, 8000, "WEBP", lossless=True, method=0), "more than 62 million"),
    "rows of a run-length encoded BMP": (lambda: bmp_delta(16_000_000), "16000000 x 1 pixels"),
    "pixels of a deep TIFF": (lambda: deep_tiff(9500), "more than 83 million"),
    "a tile of a TIFF": (lambda: tile_tiff(12000), "its tiles have 12000 x 12000 pixels, more than 125 million"),
    "a smaller tile of a TIFF": (lambda: tile_tiff(4000), "(100, 100)"),
    "segments of a JPEG": (lambda: with_segments(encode(RED, "JPEG"), 1_000_000), "more than 10,000 segments"),
    "fewer segments of a JPEG": (lambda: with_segments(encode(RED, "JPEG"), 9_000), "(64, 64)"),
    "a FITS": (lambda: b"SIMPLE  =                    T".ljust(2880), "not in an image format"),
    "an ICNS": (lambda: b"icns\0\0\x10\0ic10\0\0\x0f\xf8" + plain(64, 64, "JPEG2000"), "not in an image format"),
    "an MSP": (lambda: encode(Image.new("1", (64, 64)), "MSP"), "not in an image format"),
    "an XPM": (lambda: b'/* XPM */\n"1 1 1 1",\n"a c #ffffff",\n"a"', "not in an image format"),
    "pixels of a JPEG 2000": (lambda: plain(8000, 7000, "JPEG2000", "L"), "more than 33 million"),
}


def read_alone(path: Path, shorter_side: int | None = None) -> tuple[str, int]:
    """What reading a file gives, a size or a sentence, and its peak memory in MB, in a process that may take 3 GB."""
    script = (
        "from captioning.errors import InputError\n"
        "from captioning.image_files import read_image\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "before = peak()\n"
        "try: print(read_image(sys.argv[1], int(sys.argv[2]) or None).size)\n"
        "except InputError as error: print(error)\n"
        "print((peak() - before) // 2**20)\n"
    )
    output, peak = run_code(PEAK + script, path, shorter_side or 0).stdout.splitlines()
    return output, int(peak)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_neither_time_nor_memory(tmp_path: Path, name: str):
    content, expected = BOMBS[name]
    (tmp_path / "bomb").write_bytes(content())
    output, peak = read_alone(tmp_path / "bomb")
    assert expected in output
    assert peak < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("F", "TIFF"),
        ("RGB", "WEBP"),
        ("RGB", "AVIF"),
        ("RGBA", "AVIF"),
        ("RGB", "JPEG2000"),
    ],
)
def test_reading_takes_no_more_memory_than_documented(tmp_path: Path, mode: str, form: str):
    options = {"compress_level": 1} if form == "PNG" else {"method": 0} if form == "WEBP" else {}
    content = plain(2500, 2500, form, mode, **options)
    (tmp_path / "large").write_bytes(content)
    each = image_files.BYTES_PER_PIXEL.get(form, image_files.DEFAULT_BYTES_PER_PIXEL)
    assert read_alone(tmp_path / "large")[1] < (2500**2 * each * 1.1 + len(content)) / 1e6 + 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "each"),
    [("RGB", image_files.BYTES_PER_PIXEL["HEIF"]), ("RGB;16", image_files.DEEP_HEIF_BYTES_PER_PIXEL)],
    ids=["8 bits", "10 bits"],
)
def test_a_heic_takes_no_more_memory_than_documented(tmp_path: Path, mode: str, each: int):
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = np.random.default_rng(0).integers(0, 256, (2500, 2500, 3), np.uint16 if ";" in mode else np.uint8)
    pillow_heif.from_bytes(mode, (2500, 2500), pixels.tobytes()).save(tmp_path / "large.heic", quality=30)
    output, peak = read_alone(tmp_path / "large.heic")
    assert output == "(2500, 2500)"
    assert peak < (2500**2 * each * 1.1 + os.path.getsize(tmp_path / "large.heic")) / 1e6 + 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "MAX_BYTES", 2500**2 * each - 1)
        with pytest.raises(InputError, match="it has 2500 x 2500 pixels, more than"):
            read_image(tmp_path / "large.heic")


def test_the_documented_memory_is_the_sum_of_the_limits():
    for name in ("README.md", "docs/guarantees.md"):
        assert "2.6 GB" in (ROOT / name).read_text()
    assert 1.0e9 + 1.1 * image_files.MAX_BYTES + image_files.MAX_FILE_BYTES < 2.65e9


@pytest.mark.slow
@pytest.mark.parametrize("size", [(12000, 9000), (16320, 12240)], ids=["108 megapixels", "200 megapixels"])
def test_a_jpeg_of_a_phone_is_reduced_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]):
    Image.new("L", size, 99).save(tmp_path / "phone.jpg")
    output, peak = read_alone(tmp_path / "phone.jpg", 256)
    assert output == str((size[0] // 8, size[1] // 8))
    assert peak < 100
    with pytest.MonkeyPatch.context() as patch:  # and where nothing is said of the size that is needed
        patch.setattr(image_files, "MAX_BYTES", 40_000_000)
        assert read_image(tmp_path / "phone.jpg").size[0] in (size[0] // 8, size[0] // 4)


def test_progressive_images_are_read(tmp_path: Path):
    smooth((1200, 900)).save(tmp_path / "a.jpg", progressive=True, quality=95)
    assert (tmp_path / "a.jpg").read_bytes().count(b"\xff\xda") > 5
    assert read_image(tmp_path / "a.jpg").size == (1200, 900)


def test_only_the_scans_of_the_image_itself_count(tmp_path: Path):
    jpeg = encode(smooth((1200, 900)), "JPEG")
    thumbnail = with_exif(jpeg, b"II*\0\x08\0\0\0\0\0\0\0\0\0" + b"\xff\xda\0\x08" * 5000)
    (tmp_path / "phone.jpg").write_bytes(thumbnail + b"\xff\xda video" * 5000)
    assert read_image(tmp_path / "phone.jpg").size == (1200, 900)


LONG = "a" * 2_000_000
CHUNKS = {
    "zTXt": [text(0, LONG)],
    "iTXt": [text(0, LONG, "iTXt")],
    "tEXt": [("tEXt", b"a\0" + LONG.encode())],
    "many": [text(i, LONG[:500_000]) for i in range(200)],
    "iCCP": [("iCCP", b"a\0\0" + zlib.compress(LONG.encode()))],
    "of unknown compression": [("zTXt", b"a\0\7a"), ("iCCP", b"a\0\7a")],
    "short": [(kind, b"") for kind in ("iCCP", "eXIf", "gAMA", "cHRM", "sRGB", "pHYs")],
}


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after the pixels"])
@pytest.mark.parametrize("name", CHUNKS)
def test_a_png_is_read_in_spite_of_its_metadata(tmp_path: Path, name: str, after: bool):
    (tmp_path / "a.png").write_bytes(with_chunks(encode(RED, "PNG"), *CHUNKS[name], after=after))
    assert read_image(tmp_path / "a.png").getpixel((9, 9)) == (255, 0, 0)


def test_a_png_keeps_its_orientation_beside_long_texts(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    png = encode(Image.new("RGB", (64, 32)), "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(with_chunks(png, *[text(i, "a" * 10**6) for i in range(20)]))
    assert read_image(tmp_path / "a.png").size == (32, 64)


MPF = b"MPF\0II*\0\x08\0\0\0\x02\0\x01\xb0\4\0\1\0\0\0\xff\0\0\0\x02\xb0\7\0\4\0\0\0abcd\0\0\0\0"


@pytest.mark.parametrize(
    ("marker", "content"),
    [(0xE2, MPF), (0xE2, b"MPF\0"), (0xE0, b"JFIF\0"), (0xEE, b"Adobe\0"), (0xED, b"Photoshop 3.0\x008BIM")],
)
def test_a_jpeg_is_read_in_spite_of_its_metadata(tmp_path: Path, marker: int, content: bytes):
    jpeg = encode(RED, "JPEG", quality=95)
    segment = b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content
    (tmp_path / "a.jpg").write_bytes(jpeg[:2] + segment + jpeg[2:])
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg"), int) - (255, 0, 0)).max() < 9
    with image_files.open_image(tmp_path / "a.jpg") as image:
        assert image.size == (64, 64)


def test_a_slow_decoder_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw_noise(0).save(tmp_path / "a.png")
    monkeypatch.setattr(image_files, "MAX_SECONDS", -1)
    with pytest.raises(InputError, match=r"a\.png .*more than -1 seconds"):
        read_image(tmp_path / "a.png")


def test_a_slow_decoder_in_c_says_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def decode(*_: object) -> None:
        try:
            raise ValueError("decoding it takes more than 60 seconds")
        except ValueError as error:
            raise SystemError("returned a result with an exception set") from error

    draw_noise(0).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(InputError, match=r"a\.png .*more than 60 seconds"):
        read_image(tmp_path / "a.png")


def test_a_file_too_large_for_an_image_is_not_read(tmp_path: Path):
    with open(tmp_path / "a.webp", "wb") as file:
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(100 << 30)
    with pytest.raises(InputError, match=r"a\.webp .*102,400 MB"):
        read_image(tmp_path / "a.webp")


def test_nor_is_that_of_an_image_that_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    smooth((300, 200)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        position = image.fp.tell()
        with monkeypatch.context() as patch:
            patch.setattr(image_files, "MAX_FILE_BYTES", 100)
            with pytest.raises(InputError, match="an image may have"):
                read_image(image)
        assert image.fp.tell() == position
        assert read_image(image).size == (300, 200)


def test_an_icon_that_is_larger_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    png = plain(300, 300, "PNG")
    entry = struct.pack("<BBBBHHLL", 16, 16, 0, 0, 1, 32, len(png), 22)
    (tmp_path / "a.ico").write_bytes(struct.pack("<HHH", 0, 1, 1) + entry + png)
    assert read_image(tmp_path / "a.ico").size == (300, 300)
    monkeypatch.setattr(image_files, "MAX_BYTES", 8 * 299 * 300)
    with pytest.raises(InputError, match="300 x 300"):
        read_image(tmp_path / "a.ico")


@pytest.mark.parametrize("size", [(65000, 1), (1, 65000), (30000, 1), (16000, 40), (999, 10)])
@pytest.mark.parametrize("train", [False, True])
def test_thin_images_are_resized_from_their_middle(tmp_path: Path, size: tuple[int, int], train: bool):
    Image.new("RGB", size, (40, 160, 60)).save(tmp_path / "thin.png")
    image = read_image(tmp_path / "thin.png")
    assert max(image.size) in (32 * min(size), 32 * min(size) + 1)
    pixels = ImageDataset([tmp_path / "thin.png"], build_transform(train, 64, normalize=False))[0]
    assert pixels.flatten(1).float().mean(1).tolist() == [40, 160, 60]


def test_a_cut_leaves_what_the_centre_crop_takes():
    image = smooth((4001, 40))
    transform = build_transform(False, 64, normalize=False)
    assert (transform(read_image(image)).float() - transform(image).float()).abs().mean() < 1


def test_want_of_memory_loses_only_the_image_itself(tmp_path: Path):
    def transform(image: Image.Image) -> torch.Tensor:
        if image.width > 100:
            raise MemoryError
        return T.PILToTensor()(image)

    for i, width in enumerate((80, 800, 80)):
        draw_noise(i, (width, 60)).save(tmp_path / f"{i}.png")
    failed: dict[int, InputError] = {}
    dataset = ImageDataset(sorted(tmp_path.iterdir()), transform)
    for workers in (0, 1):
        ((keys, pixels),) = read_batches(dataset, [[0, 1, 2]], workers, failed.__setitem__)
        assert keys == [0, 2]
        assert len(pixels) == 2
        assert "1.png takes more memory than there is" in str(failed[1])


def test_a_worker_that_the_system_ends_is_a_sentence(tmp_path: Path):
    dataset = ImageDataset([tmp_path / "a.png"], lambda _: os._exit(9))
    draw_noise(0).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="use fewer --workers"):
        list(read_batches(dataset, [[0]], 1))
    for workers in (-1, 1025, 10**11):
        with pytest.raises(InputError, match=f"workers must be at least 0 and at most 1,024, not {workers:,}"):
            list(read_batches(dataset, [[0]], workers))


def test_no_more_workers_start_than_there_are_batches(monkeypatch: pytest.MonkeyPatch):
    started: list[int] = []
    monkeypatch.setattr(images, "DataLoader", lambda *_, num_workers, **__: started.append(num_workers) or [])
    for batches in ([[0], [0]], [[0]], []):
        with suppress(ValueError):  # as there are fewer results than batches
            list(read_batches(ImageDataset([], build_transform()), batches, 1000))
    assert started == [2, 1, 0]


@pytest.mark.skipif(not hasattr(os, "nice"), reason="the system has no priorities of this kind")
@pytest.mark.parametrize("workers", [0, 1])
def test_workers_leave_the_cores_to_the_process_that_computes(tmp_path: Path, workers: int):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    before = os.nice(0)
    dataset = ImageDataset([tmp_path / "a.png"], lambda image: torch.tensor(os.nice(0)))
    ((_, priority),) = read_batches(dataset, [[0]], workers)
    assert priority.item() == (19 if workers else before)
    assert os.nice(0) == before


# Formats


def test_avif_is_read(tmp_path: Path):
    RED.save(tmp_path / "a.avif")
    assert np.abs(np.asarray(read_image(tmp_path / "a.avif"), int) - (255, 0, 0)).max() < 9


@pytest.mark.parametrize("name", ["a.heic", "a.jpg", "a"])
def test_heic_is_read_whatever_its_name(tmp_path: Path, name: str):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(RED).save(tmp_path / "a.heif", quality=90)
    (tmp_path / "a.heif").rename(tmp_path / name)
    assert np.abs(np.asarray(read_image(tmp_path / name), int) - (255, 0, 0)).max() < 9


def test_the_sizes_of_all_images_that_are_read_are_known_without_decoding(tmp_path: Path, recwarn):
    huge = encode(RED, "JPEG")
    at = huge.index(b"\xff\xc0") + 5
    (tmp_path / "huge.jpg").write_bytes(huge[:at] + struct.pack(">HH", 13000, 14000) + huge[at + 4 :])
    pytest.importorskip("pillow_heif").from_pillow(RED).save(tmp_path / "a.heic")
    for name, size in (("huge.jpg", (14000, 13000)), ("a.heic", (64, 64))):
        with image_files.open_image(tmp_path / name) as image:
            assert image.size == size
    assert not list(recwarn)


def test_heic_without_pillow_heif_is_a_sentence_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InputError, match=r"a\.heic .*pip install pillow-heif"):
        read_image(tmp_path / "a.heic")
    monkeypatch.setattr(image_formats, "find_spec", lambda _: None)
    assert ".heic" not in image_formats.image_suffixes.__wrapped__()
    monkeypatch.setattr(image_formats, "find_spec", lambda _: True)
    assert {".heic", ".jpg"} <= image_formats.image_suffixes.__wrapped__()


@pytest.mark.parametrize(("form", "options"), [("TIFF", {"compression": "tiff_lzw"}), ("AVIF", {})])
def test_a_file_whose_end_is_missing_is_cut_off(tmp_path: Path, form: str, options: dict):
    content = encode(draw_noise(0, (320, 240)), form, **options)
    (tmp_path / "a").write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(InputError, match=r"a cannot be read as an image \(it is cut off\)"):
        read_image(tmp_path / "a")
    (tmp_path / "a").write_bytes(content + b"\n more of a phone")
    assert read_image(tmp_path / "a").size == (320, 240)


@pytest.mark.parametrize("form", ["WEBP", "QOI"])
def test_a_file_whose_end_is_missing_is_damaged_or_cut_off(tmp_path: Path, form: str):
    content = encode(draw_noise(0, (320, 240)), form)
    (tmp_path / "a").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a cannot be read as an image \(it is damaged or cut off\)"):
        read_image(tmp_path / "a")


@pytest.mark.parametrize("suffix", [".h5", ".mpg", ".eps", ".wmf", ".msp", ".xpm", ".pdf", ".grib"])
def test_files_that_are_no_images_are_not_taken_for_such(suffix: str):
    assert suffix not in image_formats.image_suffixes()


# Paths


def test_what_is_no_file_is_a_sentence(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to("gone.jpg")
    for path, expected in (
        (tmp_path / "pipe.jpg", "not a regular file"),
        (tmp_path / "loop.jpg", "symbolic links"),
        (tmp_path / "dangling.jpg", "does not exist"),
        (tmp_path, "it is a folder"),
        (tmp_path / ("a" * 300), r"name too long"),
        (Path("/".join(["a" * 200] * 30)), r"name too long"),
    ):
        with pytest.raises(InputError, match=expected):
            read_image(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "(it is empty)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer; `git lfs pull`"),
        (zlib.compress(b"a", wbits=31), "(it is a gzip archive; unpack it first)"),
        (b"PK\3\4", "(it is a zip archive; unpack it first)"),
        (b"%PDF-1.4", "(it is a PDF; save its pages as images)"),
        (b"not a photo", "(its content is not in an image format that can be read)"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, expected: str):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(expected)):
        read_image(tmp_path / "a.jpg")


def test_a_tar_file_says_what_is_wrong_with_it(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 200)
    with pytest.raises(InputError, match=r"a\.tar cannot be read as a tar file \("):
        read_image(tmp_path / "a.tar")


def test_an_entry_of_a_folder_is_a_path(tmp_path: Path):
    draw_noise(0, (80, 60)).save(tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    first, second = sorted(os.scandir(tmp_path), key=lambda entry: entry.name)
    assert read_image(first).size == (80, 60)
    with pytest.raises(InputError, match=f"^{tmp_path}/b.png cannot be read"):
        read_image(second)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_address_of_a_file_is_printed_as_it_was_given(kind: type):
    with pytest.raises(InputError, match=r"^file:///a/b\.jpg is an address; name the path itself, without file://\.$"):
        read_image(kind("file:///a/b.jpg"))


@pytest.mark.parametrize("address", ["https://example.org/a/b.jpg", "http://example.org/b.jpg", "s3://bucket/b.jpg"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_web_address_is_not_fetched(address: str, kind: type):
    with pytest.raises(InputError) as error:
        read_image(kind(address))
    assert str(error.value) == f"{address} is a web address, and nothing is fetched; download the file and name it."


def test_images_are_checked_again_once_other_formats_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw_noise(0).save(tmp_path / "a.png")
    assert not find_unreadable([tmp_path / "a.png"], cache=tmp_path / "cache")

    def read(path: Path, **sides: int) -> None:
        raise InputError(f"{path} is in a format of which the package was removed.")

    monkeypatch.setattr(images, "read_image", read)
    assert not find_unreadable([tmp_path / "a.png"], cache=tmp_path / "cache")
    monkeypatch.setattr(images, "image_suffixes", lambda: {".jpg"})
    assert list(find_unreadable([tmp_path / "a.png"], cache=tmp_path / "cache")) == [0]


def test_a_missing_image_is_reported_with_the_others(tmp_path: Path):
    draw_noise(0).save(tmp_path / "a.png")
    failed = find_unreadable([tmp_path / "a.png", tmp_path / "gone.png"], cache=tmp_path / "cache")
    assert list(failed) == [1]
    (tmp_path / "file").touch()
    assert list(find_unreadable([tmp_path / "gone.png"], cache=tmp_path / "file")) == [0]
    assert images.read_image is read_image


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "torch.TypedStorage._new_shared = fail",
            "the shared memory of the processes that read images is full",
        ),
        ("multiprocessing.process.BaseProcess.start = fail_second", "read images cannot be started .*unavailable"),
    ],
)
def test_processes_that_cannot_read_end_in_one_sentence(tmp_path: Path, code: str, says: str):
    program = f"""
import multiprocessing.process, torch
from captioning.errors import run_command
from captioning.images import ImageDataset, build_pixel_transform, read_batches
from captioning.backbones import Preprocessing
from PIL import Image

def fail(*_, **__):
    raise RuntimeError("unable to allocate shared memory(shm)")

start, started = multiprocessing.process.BaseProcess.start, []

def fail_second(process):
    started.append(1)
    if len(started) == 2:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    start(process)

def main():
    {code}
    dataset = ImageDataset([Image.new("RGB", (64, 64))] * 8, build_pixel_transform(Preprocessing(32)))
    list(read_batches(dataset, [[0, 1], [2, 3], [4, 5], [6, 7]], 2))

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2
    # PyTorch's own clean-up of an iterator that could not be built prints more, which cannot be prevented.
    assert re.fullmatch(f"error: .*{says}.*use fewer --workers.*", ended.stderr.splitlines()[0])


def test_a_fault_of_the_caller_ends_the_program_though_its_traceback_holds_the_workers(tmp_path: Path):
    image_paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in image_paths:
        draw_noise(0).save(path)
    code = """
import sys
from captioning.images import ImageDataset, build_transform, read_batches

def caption():
    batches = read_batches(ImageDataset(sys.argv[1:], build_transform(False)), [[i % 2] for i in range(40)], workers=2)
    for _ in batches:
        raise ValueError("a fault of the caller")

caption()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *image_paths], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: a fault of the caller")
