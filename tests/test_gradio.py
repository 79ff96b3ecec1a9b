"""The web page: in a browser, as an API, under load, and with what people should not send."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio_client
import httpx
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import gradio_main
from captioning.captioner import Caption, Captioner, Decoding
from captioning.checkpoint import read_description
from captioning.errors import InputError
from scenes import draw_scene

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


# Serving and asking


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Page:
    """A page that is served by `python gradio_main.py`, and the API as plain HTTP."""

    def __init__(self, model: Path, folder: Path, *options: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.api = f"{self.url}/gradio_api"
        self.client = httpx.Client(timeout=60)  # as `httpx.get`, without setting TLS up every time
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "gradio_main.py", "--model", model, "--port", str(self.port), *options],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url).status_code == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError("the page did not start")

    def upload(self, data: bytes, name: str = "photo.jpg") -> str:
        reply = self.client.post(f"{self.api}/upload", files={"files": (name, data)})
        reply.raise_for_status()
        return reply.json()[0]

    def call(self, photo: dict | None, method: str = "beam", beam_size: float = 3, temperature: float = 1) -> tuple:
        """The event that ended the call, "complete" or "error", and its data."""
        body = {"data": [photo, method, beam_size, temperature]}
        reply = self.client.post(f"{self.api}/call/caption", json=body)
        reply.raise_for_status()
        events = self.client.get(f"{self.api}/call/caption/{reply.json()['event_id']}").text
        event, data = events.strip().split("\n")[-2:]
        return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def caption(self, data: bytes, name: str = "photo.jpg", *options: object) -> tuple:
        return self.call({"path": self.upload(data, name), "meta": {"_type": "gradio.FileData"}}, *options)


@pytest.fixture(scope="module")
def page(attending: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(attending, tmp_path_factory.mktemp("page"), "--flag-folder", "flagged")
    yield page
    with page.client.stream("GET", f"{page.api}/heartbeat/open-tab"):  # which a browser keeps open
        page.process.send_signal(signal.SIGTERM)
        assert page.process.wait(20) == 0
    assert [path for path in page.temporary.rglob("*") if path.is_file()] == []  # uploads do not outlive the server
    assert {path.name for path in page.temporary.parent.iterdir()} <= {"tmp", "flagged"}
    assert not (ROOT / "gradio_main.pyi").exists()


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    """A scene that no data set holds."""
    return draw_scene(random.Random("held out"))[0].convert("RGB")


def bomb(side: int = 30_000) -> bytes:
    """A whole PNG of side x side black pixels, in little more than 100 kB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    packer, row = zlib.compressobj(1), bytes(1 + side // 8)
    pixels = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def turned(upright: Image.Image) -> bytes:
    """A photo as a phone held sideways stores it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95)


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        assert not os.environ.get("CI"), "chromium is needed where CI is set"
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


def test_a_visit_from_upload_to_broken_file(page: Page, browser, scene: Image.Image, tmp_path: Path):
    (tmp_path / "scene.jpg").write_bytes(encoded(scene))
    (tmp_path / "broken.jpg").write_text("not a photo at all")
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(60_000)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.url)
    box = tab.get_by_label("Caption", exact=True)

    tab.locator("input[type=file]").first.set_input_files(tmp_path / "scene.jpg")
    tab.wait_for_function("document.querySelector('#caption textarea').value")
    _, (greedy, *_) = page.caption(encoded(scene), "scene.jpg", "greedy")
    _, (beam, table, maps) = page.caption(encoded(scene), "scene.jpg", "beam", 3)
    assert box.input_value() == beam  # the default
    tab.get_by_role("gridcell", name=table["data"][-1][0]).first.wait_for()
    tab.locator(".thumbnail-item img").nth(len(maps) - 1).wait_for()

    tab.get_by_label("Greedy").check()
    tab.wait_for_function("text => document.querySelector('#caption textarea').value == text", arg=greedy)
    tab.get_by_label("Sampling").check()
    tab.get_by_text("Temperature").wait_for()
    tab.get_by_label("Beam search").check()
    tab.get_by_label("number input for Beam width").fill("5")
    tab.get_by_role("row").nth(5).wait_for()  # five captions and a header

    tab.locator("button.gallery-item").first.click()
    example = tab.locator(".image-frame img[src*='scene-1']").get_attribute("src")
    _, (expected, *_) = page.caption(httpx.get(example).content, "scene.jpg", "beam", 5)
    tab.wait_for_function("text => document.querySelector('#caption textarea').value == text", arg=expected)

    tab.get_by_role("button", name="Keep this photo").click()
    tab.get_by_text("Kept; thank you.").wait_for()
    folder = page.temporary.parent / "flagged"
    assert len(list(folder.glob("Photo/*/*.jpg"))) == 1
    assert expected in (folder / "dataset1.csv").read_text()

    picture = tmp_path / "page.png"
    tab.screenshot(path=picture)
    assert picture.stat().st_size > 20_000

    tab.get_by_label("Remove Image").click()
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "broken.jpg")
    tab.get_by_text("This file is not a photo that can be read").first.wait_for()
    tab.wait_for_function("!document.querySelector('#caption textarea').value")
    assert [url for url in asked if not url.startswith((page.url, "data:", "blob:"))] == []
    tab.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_page_is_as_wide_as_the_screen_and_shows_photos_upright(
    page: Page, browser, scene: Image.Image, tmp_path: Path, width: int
):
    upright = scene.resize((300, 400))
    (tmp_path / "turned.jpg").write_bytes(turned(upright))
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme="dark")
    tab.goto(page.url)
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "turned.jpg")
    tab.wait_for_function("document.querySelector('#caption textarea').value")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.locator(".thumbnail-item").first.wait_for()
    maps = [tile.bounding_box() for tile in tab.locator(".thumbnail-item").all()]
    assert max(tile["x"] + tile["width"] for tile in maps) < width - 20  # a box beside another would be cut off
    size = tab.locator(".image-frame img").evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert size == [300, 400]
    tab.close()


# As an API


def test_gradio_client_captions_as_the_command_line_does(
    page: Page, attending: Path, scene: Image.Image, tmp_path: Path
):
    path = tmp_path / "scene.png"
    scene.save(path)
    client = gradio_client.Client(page.url, verbose=False)
    caption, table, maps = client.predict(
        photo=gradio_client.handle_file(path), method="beam", beam_size=4, temperature=1, api_name="/caption"
    )
    expected = Captioner.load(attending)(path, beam_size=4, alternatives=3)[0]
    assert caption == expected.text
    assert [row[0] for row in table["data"]] == [expected.text, *(c.text for c in expected.alternatives)]
    assert table["data"][0][1] == pytest.approx(np.exp(expected.log_probability), rel=0.06)
    assert [tile["caption"] for tile in maps] == expected.tokens
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/caption"]


def test_the_readmes_examples_do_what_they_say(page: Page, scene: Image.Image, tmp_path: Path, monkeypatch, capfd):
    scene.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    _, (expected, table, _) = page.caption((tmp_path / "photo.jpg").read_bytes(), "photo.jpg", "beam", 3)
    readme = (ROOT / "README.md").read_text().replace("http://127.0.0.1:7860", page.url)
    [code] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "gradio_client" in block]
    exec(code, {})
    assert f"{expected} {table['data']}\n" in capfd.readouterr().out
    if shutil.which("curl"):
        [commands] = [block for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) if "curl" in block]
        subprocess.run(["bash", "-ec", commands], check=True)
        event, data = capfd.readouterr().out.strip().split("\n")
        assert event == "event: complete"
        assert json.loads(data.removeprefix("data: "))[:2] == [expected, table]


def test_sampling_and_greedy_over_http(page: Page, scene: Image.Image):
    data = encoded(scene)
    assert page.caption(data, "a.jpg", "greedy")[0] == "complete"
    event, (_, table, _) = page.caption(data, "a.jpg", "sampling", 3, 2.0)
    assert event == "complete"
    assert len(table["data"]) > 1


def good_photos() -> dict[str, bytes]:
    scene = draw_scene(random.Random(5))[0].convert("RGB")
    noise = np.random.default_rng(0).integers(0, 256, (2560, 2560, 3), np.uint8)
    grey = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    palette = Image.new("P", (60, 40))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    frames = [scene.resize((80, 60)), scene.resize((80, 60)).rotate(90)]
    return {
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cmyk.jpg": encoded(scene.convert("CMYK")),
        "16-bit.png": encoded(grey, "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=0),
        "turned.jpg": turned(scene),
        "1x1.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "strip.png": encoded(Image.new("RGB", (1_000_000, 1)), "PNG"),
        "noise of 20 MB.png": encoded(Image.fromarray(noise), "PNG", compress_level=0),
        "a'b\"<b>&ü.jpg": encoded(scene),
    }


@pytest.fixture(scope="module")
def good() -> dict[str, bytes]:
    return good_photos()


PHOTOS = ["animated.gif", "cmyk.jpg", "16-bit.png", "palette.png", "turned.jpg", "1x1.png", "strip.png"]


@pytest.mark.parametrize("name", [*PHOTOS, "noise of 20 MB.png", "a'b\"<b>&ü.jpg"])
def test_every_photo_gets_a_caption(page: Page, good: dict[str, bytes], name: str):
    event, data = page.caption(good[name], name)
    assert event == "complete"
    assert data[0]


BROKEN = {
    "text.jpg": (b"just some text", "This file is not a photo that can be read"),
    "empty.png": (b"\0", "This file is not a photo that can be read"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "This file is not a photo"),
    "bomb.png": (b"", "This photo has more than 100 million pixels"),
    "large.png": (b"", "This photo has more than 100 million pixels"),
    "truncated.jpg": (b"", "This photo is damaged and cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_other_file_gets_one_friendly_sentence(page: Page, scene: Image.Image, name: str):
    data, sentence = BROKEN[name]
    if name == "bomb.png":
        data = bomb()
    elif name == "large.png":  # below what Pillow itself refuses
        data = bomb(11_000)
    elif name == "truncated.jpg":
        data = encoded(scene)
        data = data[: len(data) // 2]
    event, answer = page.caption(data, name)
    assert event == "error"
    assert answer["error"].startswith(sentence)
    assert "/" not in answer["error"]  # no path of the server
    assert answer["error"].count(".") == 1
    assert page.caption(encoded(scene))[0] == "complete"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("beam", 1000), "greater than maximum value 10"),
        (("beam", 0), "less than"),
        (("best",), "not in the list"),
    ],
)
def test_values_that_the_page_does_not_offer_are_refused(page: Page, scene: Image.Image, options, sentence: str):
    event, answer = page.caption(encoded(scene), "a.jpg", *options)
    assert event == "error"
    assert sentence in answer["error"]


def test_upload_over_the_limit_is_refused(page: Page):
    reply = httpx.post(f"{page.api}/upload", files={"files": ("a.jpg", bytes(gradio_main.MOST_BYTES + 1))}, timeout=60)
    assert reply.status_code == 413


# Nothing but uploads


@pytest.mark.parametrize(
    "meta",
    [{}, {"meta": {"_type": "gradio.FileData"}}, {"meta": {"_type": "gradio.FileData"}, "is_stream": True}],
)
def test_a_path_of_the_server_is_no_photo(page: Page, tmp_path: Path, scene: Image.Image, meta: dict):
    scene.save(tmp_path / "private.jpg")
    (page.temporary / "private.jpg").write_bytes((tmp_path / "private.jpg").read_bytes())
    upload = page.upload(encoded(scene))
    paths = [
        tmp_path / "private.jpg",
        page.temporary / "private.jpg",
        ROOT / "images" / "page.png",
        "/etc/passwd",
    ]
    paths.append(f"{Path(upload).parent}/../../../private.jpg")
    for path in paths:
        event, answer = page.call({"path": str(path), **meta})
        assert event == "error"
        assert answer["error"] in (None, "Upload the photo first.")
    (page.temporary / "private.jpg").unlink()


@pytest.mark.parametrize(
    "photo",
    [
        {"path": "http://127.0.0.1:1/a.jpg", "meta": {"_type": "gradio.FileData"}},
        {"path": "https://example.org/a.jpg", "meta": {"_type": "gradio.FileData"}},
        {"path": "https://example.org/a.jpg"},
        {"url": "data:image/png;base64,iVBORw0KGgo="},
    ],
)
def test_the_server_fetches_nothing(page: Page, photo: dict):
    event, answer = page.call(photo)
    assert event == "error"
    assert answer["error"].startswith("Upload the photo")


def test_no_file_but_uploads_is_served(page: Page, scene: Image.Image):
    upload = page.upload(encoded(scene))
    assert httpx.get(f"{page.api}/file={upload}").content == encoded(scene)
    paths = ["/etc/passwd", "../../../../etc/passwd", f"{upload}/../../../../../../../../etc/passwd"]
    paths += [
        "//etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2fetc%2fpasswd",
        "http://127.0.0.1:1/",
        "https://example.org/",
    ]
    paths += [
        str(ROOT / "gradio_main.py"),
        "gradio_main.py",
        str(page.temporary),
        str(page.temporary.parent / "flagged"),
    ]
    for path in paths:
        with socket.create_connection(("127.0.0.1", page.port)) as connection:  # a client library tidies the path
            connection.sendall(f"GET /gradio_api/file={path} HTTP/1.0\r\n\r\n".encode())
            answer = connection.makefile("rb").read()
        assert answer.split()[1] in (b"403", b"404"), path
        assert b"root:" not in answer
    assert httpx.get(f"{page.api}/proxy=http://127.0.0.1:1/").status_code == 403
    for static in (
        "/static/../../../../etc/passwd",
        "/assets/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/routes.py",
    ):
        with socket.create_connection(("127.0.0.1", page.port)) as connection:
            connection.sendall(f"GET {static} HTTP/1.0\r\n\r\n".encode())
            assert connection.makefile("rb").read().split()[1] in (b"403", b"404")


# Under load


def test_two_hundred_requests_from_sixteen_clients(page: Page, scene: Image.Image, capsys):
    photos = [encoded(scene.rotate(5 * i)) for i in range(16)]
    process = psutil.Process(page.process.pid)
    seconds: list[float] = []
    memory: list[int] = []
    lock = threading.Lock()

    def ask(i: int) -> None:
        start = time.perf_counter()
        event, answer = page.caption(photos[i % 16], f"{i}.jpg", ("beam", "greedy", "sampling")[i % 3])
        assert event == "complete", answer
        with lock:
            seconds.append(time.perf_counter() - start)
            memory.append(process.memory_info().rss)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(200)))
    p95 = float(np.percentile(seconds, 95))
    with capsys.disabled():
        print(
            f"\n200 requests from 16 clients: p50 {np.median(seconds):.2f} s, p95 {p95:.2f} s, "
            f"memory {memory[49] / 1e6:.0f} MB after 50, {max(memory[50:]) / 1e6:.0f} MB at most after"
        )
    assert max(memory[50:]) <= 1.1 * memory[49]


class SlowCaptioner:
    """Captions with how many photos it was given at once, when it is let."""

    def __init__(self, captioner: Captioner):
        self.transform, self.decoder, self.description = (
            captioner.transform,
            captioner.decoder,
            captioner.description,
        )
        self.sizes: list[int] = []
        self.go = threading.Event()

    def __call__(self, photos: list, how: Decoding) -> list[Caption]:
        self.go.wait(30)
        self.sizes.append(len(photos))
        if photos[0].size == (1, 1):
            raise RuntimeError("broken")
        return [Caption(f"caption {how.beam_size}", ["a"], 0.0)] * len(photos)


@pytest.fixture
def slow(attending: Path) -> SlowCaptioner:
    return SlowCaptioner(Captioner.load(attending))


def test_requests_that_wait_together_are_captioned_together(slow: SlowCaptioner, photo: Path):
    server = gradio_main.Server(slow)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(server.caption, str(photo))
        while not server.waiting.empty() or first.running() is False:
            time.sleep(0.01)
        time.sleep(0.2)
        rest = [pool.submit(server.caption, str(photo), "beam", 2 + i % 2) for i in range(8)]
        while server.waiting.qsize() < 8:
            time.sleep(0.01)
        slow.go.set()
        assert [answer.result()[0] for answer in rest] == ["caption 2", "caption 3"] * 4
    assert slow.sizes == [1, 4, 4]


def test_a_failure_belongs_to_its_requests_alone(slow: SlowCaptioner, photo: Path, tmp_path: Path):
    slow.go.set()
    server = gradio_main.Server(slow)
    server.resize = SimpleNamespace(size=64)
    server.read = lambda path: (Image.new("RGB", (1, 1) if path == "bad" else (9, 9)), None)
    with pytest.raises(RuntimeError):
        server.caption("bad")
    assert server.caption("good")[0] == "caption 3"


@contextlib.contextmanager
def served(slow: SlowCaptioner, examples: list[Path]) -> Iterator[str]:
    blocks = gradio_main.build_page(gradio_main.Server(slow), "slow", examples)
    _, url, _ = blocks.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, share=False)
    try:
        yield f"{url}gradio_api"
    finally:
        slow.go.set()
        blocks.close(verbose=False)


def test_a_full_queue_says_so(slow: SlowCaptioner, scene: Image.Image, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(gradio_main, "MOST_WAITING", 1)
    monkeypatch.setattr(gradio_main, "HANDLED_AT_ONCE", 1)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with served(slow, []) as api:
        path = httpx.post(f"{api}/upload", files={"files": ("a.jpg", encoded(scene))}).json()[0]
        body = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "beam", 3, 1]}
        replies = []
        for _ in range(4):
            replies.append(httpx.post(f"{api}/call/caption", json=body))
            time.sleep(0.5)
        assert [reply.status_code for reply in replies] == [200, 200, 503, 503]
        assert "Queue is full" in replies[-1].text
        assert httpx.get(api.removesuffix("gradio_api"), timeout=5).status_code == 200  # it answers meanwhile


def test_uploads_are_deleted_and_examples_stay(slow: SlowCaptioner, photo: Path, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(gradio_main, "AGE", 6)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    with served(slow, [photo]) as api:
        path = httpx.post(f"{api}/upload", files={"files": ("a.jpg", b"a")}).json()[0]
        (example,) = (tmp_path / "uploads").glob("*/photo.png")
        end = time.monotonic() + 30
        while httpx.get(f"{api}/file={path}").status_code == 200 and time.monotonic() < end:
            time.sleep(0.5)
        assert not Path(path).exists()
        assert httpx.get(f"{api}/file={example}").content == photo.read_bytes()


# The parts


def test_a_photo_is_read_upright(attending: Path, photo: Path, tmp_path: Path):
    server = gradio_main.Server(Captioner.load(attending))
    upright = Image.open(photo)
    (tmp_path / "turned.jpg").write_bytes(turned(upright))
    small, view = server.read(str(tmp_path / "turned.jpg"))
    expected, _ = server.read(str(photo))
    assert np.abs(np.asarray(small, int) - np.asarray(expected, int)).mean() < 5
    assert view.size == (224, 224)


def test_attention_maps_shine_where_the_model_looks():
    weights = torch.zeros(2, 49)
    weights[0, 0] = weights[1, 48] = 1  # upper left, lower right
    caption = Caption("a dog", ["a", "dog"], 0.0, weights)
    (first, word), (second, _) = gradio_main.attention_maps(Image.new("RGB", (224, 224)), caption)
    assert word == "a"
    assert sum(first.getpixel((10, 10))) > 300 > sum(first.getpixel((213, 213)))
    assert sum(second.getpixel((213, 213))) > 300 > sum(second.getpixel((10, 10)))
    assert gradio_main.attention_maps(Image.new("RGB", (9, 9)), Caption("a", ["a"], 0.0)) == []


def test_it_says_which_model_it_is_and_how_good(attending: Path):
    description = read_description(attending)
    text = gradio_main.about("small", description)
    assert "`small`" in text
    assert "120 captions of 24 photos (`scenes`)" in text
    assert "on 8 photos it had not seen: CIDEr" in text
    bare = description.model_copy(update={"data": {}, "epochs": [], "best_epoch": None})
    assert "Trained" not in gradio_main.about("published", bare)


def test_examples_are_the_models_own_or_of_its_kind(tmp_path: Path, photo: Path, trained: Path):
    description = read_description(trained)
    model, page = tmp_path / "model", tmp_path / "page"
    model.mkdir()
    page.mkdir()
    assert {path.stem[:6] for path in gradio_main.example_photos(model, description, page)} == {"scene-"}
    description.data["folder"] = "coco"
    photos = gradio_main.example_photos(model, description, page)
    assert {path.parent for path in photos} == {page}
    assert "lion.jpg" in {path.name for path in photos}
    (model / "examples").mkdir()
    shutil.copy(photo, model / "examples")
    assert gradio_main.example_photos(model, description, page) == [model / "examples" / "photo.png"]


def test_keeping_is_off_by_default(slow: SlowCaptioner, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    server = gradio_main.Server(slow)
    assert "Keep this photo and caption" not in str(gradio_main.build_page(server, "m", []).config)
    assert "Keep this photo and caption" in str(gradio_main.build_page(server, "m", [], tmp_path / "kept").config)


def test_without_a_model_it_says_how_to_get_one(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"make demo.*download.py weights"):
        gradio_main.main()


def test_without_a_choice_it_serves_the_newest_model(tmp_path: Path, monkeypatch):
    for name, date in (("a", 1), ("b", 3), ("c", 2)):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "captioner.json").write_text("{}")
        os.utime(tmp_path / "models" / name / "captioner.json", (date, date))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"models/b/captioner\.json does not describe a model"):
        gradio_main.main()


def test_a_port_that_cannot_be_had_is_a_sentence(attending: Path, page: Page, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for port in (page.port, 99_999):
        with pytest.raises(InputError, match=r"choose another --host or --port"):
            gradio_main.main(attending, port=port)
