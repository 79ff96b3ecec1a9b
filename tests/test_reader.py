"""Files of strangers, read in processes that can be stopped."""

from __future__ import annotations

import io
import os
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioning import reader as reader_module
from captioning.backbones import Preprocessing
from captioning.errors import InputError
from captioning.images import build_pixel_transform, build_transform
from captioning.reader import MAX_MEMORY, Reader, prepare_image, unpack_images

pytestmark = pytest.mark.slow

EXIF_ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    reader(abs, (-1,), 60)  # both have started
    yield reader
    reader.close()


def test_it_returns_what_the_function_returns_or_raises(reader: Reader):
    assert reader(pow, (2, 10), 60) == 1024
    with pytest.raises(InputError, match="no longer on the server"):
        reader(prepare_image, (Path("none.jpg"), "none.jpg", Preprocessing(), 224), 60)
    with pytest.raises(InputError, match="no longer on the server"):
        reader(prepare_image, (Path("x" * 5000), "none.jpg", Preprocessing(), 224), 60)
    with pytest.raises(InputError, match=r"cannot be read \(ZeroDivisionError\)"):
        reader(divmod, (1, 0), 60)


def test_two_that_take_too_long_are_stopped_and_do_not_stop_the_next(reader: Reader):
    start = time.monotonic()
    with ThreadPoolExecutor() as pool:
        slow = [pool.submit(reader, time.sleep, (600,), 1) for _ in range(2)]
        time.sleep(0.1)
        quick = pool.submit(reader, abs, (-7,), 60)
        for call in slow:
            with pytest.raises(InputError, match="takes too much time or memory"):
                call.result()
        assert quick.result() == 7
    assert time.monotonic() - start < 100


def test_memory_is_bounded_and_the_process_goes_on(reader: Reader):
    with pytest.raises(InputError, match="memory"):
        reader(bytes, (MAX_MEMORY,), 60)
    assert reader(len, ("abc",), 60) == 3


def test_a_process_that_dies_is_replaced(reader: Reader):
    with pytest.raises(InputError):
        reader(os._exit, (3,), 60)
    assert [reader(abs, (-i,), 60) for i in range(3)] == [0, 1, 2]


def test_closing_ends_a_call_at_once():
    reader = Reader(1)
    reader(abs, (1,), 60)
    call: list[InputError] = []

    def wait() -> None:
        with pytest.raises(InputError) as caught:
            reader(time.sleep, (600,), 600)
        call.append(caught.value)

    thread = threading.Thread(target=wait)
    thread.start()
    while not reader.idle.empty():
        time.sleep(0.01)
    reader.close()
    thread.join(60)
    assert call
    with pytest.raises(InputError, match="being stopped"):
        reader(abs, (1,), 60)


def test_a_call_that_begins_while_it_is_closed_starts_no_process():
    reader = Reader(1)
    process = reader.idle.get()  # as a call has it when `close` comes
    reader.close()
    with pytest.raises(InputError, match="being stopped"):
        process.call(abs, (1,), 60)
    assert process.popen.poll() is not None


def test_an_image_is_read_upright_and_as_its_owner_calls_it(image_path: Path, tmp_path: Path):
    preprocessing = Preprocessing(64)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    turned = Image.open(image_path).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    small, view = prepare_image(tmp_path / "turned.jpg", "mine.jpg", preprocessing, 224)
    expected, _ = prepare_image(image_path, "mine.png", preprocessing, 224)
    assert np.abs(np.asarray(small, int) - np.asarray(expected, int)).mean() < 5
    assert min(small.size) == round(64 * 256 / 224)
    assert view.size == (224, 224)
    (tmp_path / "broken.jpg").write_text("no photo")
    with pytest.raises(InputError, match=r"^mine\.jpg cannot be read as an image") as caught:
        prepare_image(tmp_path / "broken.jpg", "mine.jpg", preprocessing, 224)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("crop", ["center", "squash"])
def test_a_model_sees_an_image_of_the_page_as_that_of_a_file(crop: str, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    preprocessing = Preprocessing(64, crop=crop, interpolation="bicubic")
    transform = build_pixel_transform(preprocessing)
    small, _ = prepare_image(tmp_path / "a.png", "a.png", preprocessing, 64)
    assert torch.equal(transform(small), transform(Image.fromarray(noise)))


def test_the_view_is_what_the_model_sees(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    Image.fromarray(pixels).resize((900, 600), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    transform = build_transform(image_size=64, normalize=False)
    small, view = prepare_image(tmp_path / "a.png", "a.png", Preprocessing(64), 224)
    expected = Image.fromarray(transform(small).permute(1, 2, 0).numpy()).resize((224, 224))
    assert np.abs(np.asarray(expected, int) - np.asarray(view, int)).mean() < 10


def test_a_large_jpeg_is_decoded_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (1600, 1200)).save(tmp_path / "a.jpg")
    sizes = []
    read = reader_module.read_image
    note = lambda *a, **k: sizes.append((image := read(*a, **k)).size) or image  # noqa: E731
    monkeypatch.setattr(reader_module, "read_image", note)
    for preprocessing in (Preprocessing(64), Preprocessing(64, reduce_to=300)):
        prepare_image(tmp_path / "a.jpg", "a.jpg", preprocessing, 64)
    assert sizes == [(200, 150), (400, 300)]


# Zip files


def encoded(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, kind)
    return file.getvalue()


@pytest.fixture
def pack(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    def pack(members: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return tmp_path / "photos.zip"

    return pack


def unpack(path: Path, max_images: int = 10, max_bytes: int = 1 << 20) -> tuple[list, int]:
    folder = path.parent / "unpacked"
    folder.mkdir(exist_ok=True)
    return unpack_images(path, folder, max_images, max_bytes)


def test_images_of_any_folder_are_unpacked_into_one_and_others_are_counted(pack, tmp_path: Path):
    data = encoded()
    names = ["a.png", "sub/a.PNG", "../../escape.png", "/etc/absolute.png", "ü\x1b[31m.png", ".hidden.png"]
    others = {"notes.txt": b"x", "sub/more.pdf": b"x", "__MACOSX/._a.png": b"x", "._b.png": b"x", "folder/": b""}
    others |= {".DS_Store": b"x"}
    unpacked, left_out = unpack(pack({**dict.fromkeys(names, data), **others}))
    assert [name for name, _ in unpacked] == names
    assert left_out == 2
    assert {path.parent for _, path in unpacked} == {tmp_path / "unpacked"}
    assert all(path.read_bytes() == data for _, path in unpacked)
    assert not (tmp_path.parent / "escape.png").exists()


def test_one_damaged_image_costs_itself_alone(pack):
    path = pack({"a.png": bytes(range(256)) * 9, "b.png": encoded()})
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    (_, damaged), (_, whole) = unpack(path)[0]
    assert isinstance(damaged, InputError)
    assert str(damaged).startswith("a.png cannot be unpacked (")
    assert whole.read_bytes() == encoded()


def test_an_encrypted_image_says_so(pack):
    path = pack({"a.png": encoded()})
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    [(_, error)], _ = unpack(path)
    assert "encrypted" in str(error)


@pytest.mark.parametrize(
    ("members", "limits", "sentence"),
    [
        ({f"{i}.png": b"x" for i in range(11)}, (10, 1 << 20), r"photos\.zip holds 11 photos; send at most 10"),
        ({"a.png": bytes(1 << 20), "b.png": b"x"}, (10, 1 << 20), r"photos in photos\.zip are more than 1 MB"),
    ],
)
def test_too_many_and_too_large_are_refused_before_they_are_unpacked(pack, members, limits, sentence):
    with pytest.raises(InputError, match=sentence):
        unpack(pack(members), *limits)


def test_names_that_are_utf_8_without_saying_so(pack, tmp_path: Path):
    path = pack({"München/Grüße.png": encoded(), "日本.png": encoded()})
    data = bytearray(path.read_bytes())
    for start, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # clears the flag in both headers
        for match in re.finditer(re.escape(start), bytes(data)):
            data[match.start() + at + 1] &= 0xF7
    path.write_bytes(data)
    assert [name for name, _ in unpack(path)[0]] == ["München/Grüße.png", "日本.png"]


def test_heic_images_in_a_zip_file_are_photos_and_one_that_is_gone_is_not_broken(pack, tmp_path: Path):
    unpacked, left_out = unpack(pack({"IMG_1.HEIC": b"x", "notes.txt": b"x"}))
    assert ([name for name, _ in unpacked], left_out) == (["IMG_1.HEIC"], 1)
    with pytest.raises(InputError, match=r"^gone\.zip is no longer on the server; upload it again\.$"):
        unpack(tmp_path / "gone.zip")


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip file at all", b"PK\x05\x06" + bytes(17)])
def test_what_is_no_zip_file_costs_itself_alone(tmp_path: Path, content: bytes):
    (tmp_path / "a.zip").write_bytes(content)
    [(name, error)], left_out = unpack(tmp_path / "a.zip")
    assert (name, str(error), left_out) == (
        "a.zip",
        "a.zip is not a zip file that can be read; create it again.",
        0,
    )


def test_a_squashing_model_sees_the_whole_image(tmp_path: Path):
    Image.new("RGB", (300, 100), "red").save(tmp_path / "wide.png")
    small, view = prepare_image(tmp_path / "wide.png", "wide.png", Preprocessing(64, "squash"), 96)
    assert (small.size, view.size) == ((64, 64), (96, 96))
