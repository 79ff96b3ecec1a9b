"""The web page: in a browser, as an API, under load, and with what people should not send."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import errno
import io
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import gradio as gr
import gradio.routes
import gradio_client
import httpx
import numpy as np
import psutil
import pytest
import torch
from conftest import draw_noise
from gradio.data_classes import PredictBodyInternal
from PIL import Image
from starlette.testclient import TestClient
from test_images import progressive_bomb

import gradio_main
from captioning import checkpoint
from captioning.captioner import Caption, Captioner, Decoding, other_captions
from captioning.checkpoint import read_description
from captioning.errors import InputError
from captioning.figures import overlay_attention
from captioning.page import Handlers, as_table, attention_maps, explain_unusable, per_word, write_tables
from captioning.page import Page as Blocks
from captioning.scenes.dataset import draw_scene
from captioning.web import MAX_BODY, MAX_UPLOADED, CaptionServer, Gate, Upload

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
WAIT = 120  # seconds until something that does not happen is a failure; a machine under load is slow
get, post = partial(httpx.get, timeout=WAIT), partial(httpx.post, timeout=WAIT)
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

    def __init__(self, folder: Path, *options: object):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.api = f"{self.url}/gradio_api"
        self.client = httpx.Client(timeout=WAIT)  # as `httpx.get`, without setting TLS up every time
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "gradio_main.py", "--port", str(self.port), *options],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            stdout=subprocess.DEVNULL,
            stderr=open(folder / "log", "wb"),
        )
        end = time.monotonic() + WAIT
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if get(self.url).status_code == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError("the page did not start")

    def upload(self, data: bytes, name: str = "photo.jpg") -> str:
        reply = self.client.post(f"{self.api}/upload", files={"files": (name, data)})
        reply.raise_for_status()
        return reply.json()[0]

    def call(self, image: object, *options: object) -> tuple:
        """The event that ended the call, "complete" or "error", and its data."""
        body = {"data": [image, *options]}
        reply = self.client.post(f"{self.api}/call/caption", json=body)
        reply.raise_for_status()
        events = self.client.get(f"{self.api}/call/caption/{reply.json()['event_id']}").text
        event, data = events.strip().split("\n")[-2:]
        return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def caption(self, data: bytes, name: str = "photo.jpg", *options: object) -> tuple:
        return self.call({"path": self.upload(data, name), "meta": {"_type": "gradio.FileData"}}, *options)


@pytest.fixture(scope="module")
def page(attending: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(trained, folder / "plain")
    page = Page(folder, "--model", attending, "--model", "plain", "--flag-folder", "flagged")
    yield page
    slow = {"path": page.upload(progressive_bomb(20_000, 8)), "meta": {"_type": "gradio.FileData"}}
    for _ in range(8):  # seconds each, so that some are read and others wait when the signal comes
        page.client.post(f"{page.api}/call/caption", json={"data": [slow]}).raise_for_status()
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999\r\n"
    head += 'Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Disposition: form-data; name="files"; '
    with (
        page.client.stream("GET", f"{page.api}/heartbeat/open-tab"),  # which a browser keeps open
        socket.create_connection(("127.0.0.1", page.port)) as slow_upload,
    ):
        slow_upload.sendall(f'{head}filename="a.jpg"\r\n\r\nthe first bytes'.encode())
        time.sleep(0.2)
        page.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        page.process.send_signal(signal.SIGINT)  # of one who cannot wait
        assert page.process.wait(10) == 0
    assert "Traceback" not in (folder / "log").read_text()
    assert list(page.temporary.iterdir()) == []  # uploads do not outlive the server
    assert {path.name for path in page.temporary.parent.iterdir()} <= {"tmp", "flagged", "plain", "log"}
    assert not list((ROOT / "captioning").glob("*.pyi"))


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


CAPTION = "document.querySelector('#caption textarea')?.value"


def test_a_visit_from_upload_to_broken_file(page: Page, browser, scene: Image.Image, tmp_path: Path):
    (tmp_path / "scene.jpg").write_bytes(encoded(scene))
    (tmp_path / "broken.jpg").write_text("not a photo at all")
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(1000 * WAIT)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.url)
    tab.get_by_text("Examples", exact=True).wait_for()
    assert [tab.get_by_text(text).count() for text in ("Alternatives", "Where the model looked")] == [0, 0]

    tab.locator("input[type=file]").first.set_input_files(tmp_path / "scene.jpg")
    tab.wait_for_function(CAPTION)
    _, (greedy, *_) = page.caption(encoded(scene), "scene.jpg", "greedy")
    _, (beam, table, maps, percent) = page.caption(encoded(scene), "scene.jpg", "beam", 3)
    assert tab.evaluate(CAPTION) == beam  # the default
    tab.get_by_text(f"Probability per word: {percent}%").wait_for()
    tab.get_by_role("gridcell", name=table["data"][-1][0]).first.wait_for()
    tab.locator("#maps .thumbnail-item img").nth(len(maps) - 1).wait_for()

    tab.get_by_role("button", name="How words are chosen").click()
    tab.get_by_label("Greedy").check()
    tab.wait_for_function("text => document.querySelector('#caption textarea')?.value == text", arg=greedy)
    tab.get_by_text("Alternatives").wait_for(state="detached")
    tab.get_by_label("Sampling").check()
    tab.get_by_text("Temperature").wait_for()
    tab.get_by_label("Beam search").check()
    tab.get_by_label("number input for Beam size").fill("5")
    _, (_, table, *_) = page.caption(encoded(scene), "scene.jpg", "beam", 5)
    tab.get_by_role("gridcell", name=table["data"][-1][0]).first.wait_for()

    tab.locator("#examples button").first.click()
    example = tab.locator(".image-frame img[src*='scene-1']").get_attribute("src")
    _, (expected, *_) = page.caption(get(example).content, "scene.jpg", "beam", 5)
    tab.wait_for_function("text => document.querySelector('#caption textarea')?.value == text", arg=expected)

    tab.get_by_role("button", name="Save this photo").click()
    tab.get_by_text("Saved. Thank you.").wait_for()
    folder = page.temporary.parent / "flagged"
    assert len(list(folder.glob("Photo/*/*.jpg"))) == 1
    [row] = csv.DictReader((folder / "dataset1.csv").open())
    assert (row["Caption"], row["Method"], row["Beam size"], row["Model"]) == (expected, "beam", "5", "small")
    (folder / "dataset1.csv").rename(folder / "collected.csv")
    tab.get_by_text("Saved. Thank you.").wait_for(state="detached")
    tab.get_by_role("button", name="Save this photo").click()
    tab.get_by_text("Saved. Thank you.").wait_for()
    assert [row["Caption"] for row in csv.DictReader((folder / "dataset1.csv").open())] == [expected]

    tab.get_by_role("combobox", name="Model").click()
    tab.get_by_role("option", name="plain").click()
    _, (other, *_) = page.caption(get(example).content, "scene.jpg", "beam", 5, 1, "plain")
    tab.wait_for_function("text => document.querySelector('#caption textarea')?.value == text", arg=other)
    tab.get_by_text("Where the model looked").wait_for(state="detached")  # it does not attend

    tab.get_by_label("Remove Image").click()
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "broken.jpg")
    tab.get_by_text("broken.jpg cannot be read as an image").first.wait_for()
    tab.wait_for_function(f"!{CAPTION}")
    assert [url for url in asked if not url.startswith((page.url, "data:", "blob:"))] == []
    tab.close()


def test_a_photo_that_fails_late_leaves_the_one_chosen_meanwhile(
    page: Page, browser, scene: Image.Image, tmp_path: Path
):
    (tmp_path / "slow.jpg").write_bytes(progressive_bomb(20_000, 3)[:-2])
    (tmp_path / "scene.jpg").write_bytes(encoded(scene))
    tab = browser.new_page()
    tab.set_default_timeout(1000 * WAIT)
    tab.goto(page.url)
    chooser = tab.locator("input[type=file]").first
    with tab.expect_response("**/queue/join*"):
        chooser.set_input_files(tmp_path / "slow.jpg")
    assert tab.get_by_text("slow.jpg cannot be read").count() == 0
    tab.get_by_label("Remove Image").click()
    chooser.set_input_files(tmp_path / "scene.jpg")
    tab.get_by_text("slow.jpg cannot be read").first.wait_for()
    _, (expected, *_) = page.caption(encoded(scene), "scene.jpg", "beam", 3)
    tab.wait_for_function("text => document.querySelector('#caption textarea')?.value == text", arg=expected)
    tab.locator(".image-frame img[src*='scene']").wait_for()
    tab.close()


def test_several_images_become_a_table_to_download(page: Page, browser, scene: Image.Image, tmp_path: Path):
    (tmp_path / "one.jpg").write_bytes(encoded(scene))
    (tmp_path / "broken.jpg").write_text("not a photo at all")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("<img src=x onerror=alert(1)>.jpg", encoded(scene.rotate(90)))
        archive.writestr("notes.txt", "")
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(1000 * WAIT)
    tab.on("dialog", lambda dialog: pytest.fail("a file's name was run"))
    tab.goto(page.url)
    tab.get_by_role("tab", name="Several photos").click()
    files = [tmp_path / name for name in ("one.jpg", "broken.jpg", "more.zip")]
    tab.locator("input[type=file]").last.set_input_files(files)
    tab.get_by_role("button", name="Caption these photos").click()
    tab.get_by_text("Captioned 2 of 3 photos. Files in zip files that are not photos").wait_for()
    tab.get_by_role("gridcell", name="<img src=x onerror=alert(1)>.jpg").first.wait_for()
    tables = []
    for kind in ("CSV", "JSON Lines"):
        with tab.expect_download() as download:
            tab.get_by_role("button", name=f"Download as {kind}").click()
        tables.append(Path(download.value.path()).read_text())
    tab.close()
    rows = [json.loads(line) for line in tables[1].splitlines()]
    assert [row["photo"] for row in rows] == ["one.jpg", "broken.jpg", "<img src=x onerror=alert(1)>.jpg"]
    assert rows[0]["caption"] == page.caption(encoded(scene))[1][0]
    assert rows[1]["error"].startswith("broken.jpg cannot be read as an image")
    assert [row["photo"] for row in csv.DictReader(io.StringIO(tables[0]))] == [row["photo"] for row in rows]


def test_the_keyboard_alone_does_all(page: Page, browser, scene: Image.Image, tmp_path: Path):
    (tmp_path / "scene.jpg").write_bytes(encoded(scene))
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(1000 * WAIT)
    tab.goto(page.url)
    tab.locator("#examples button img").first.wait_for()

    def reach(name: str) -> None:
        """Press Tab until what has the focus is called so."""
        names = []
        for _ in range(60):
            tab.keyboard.press("Tab")
            focused = tab.evaluate(
                "(e => e == document.body ? '' : [e.ariaLabel, e.value, e.innerText].join(' '))(document.activeElement)"
            )
            if name in focused:
                return
            names.append(focused)
        pytest.fail(f"{name} cannot be reached among {names}")

    def choose(name: str, files: list[Path]) -> None:
        with tab.expect_file_chooser() as chooser:
            reach(name)
            tab.keyboard.press("Enter")
        chooser.value.set_files(files)

    reach("Thumbnail 2 of")
    tab.keyboard.press("Enter")
    tab.get_by_text("Probability per word").wait_for()
    reach("Copy")
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.keyboard.press("Enter")
    tab.wait_for_function(f"async () => await navigator.clipboard.readText() == {CAPTION}")
    reach("Save this photo")
    reach("How words are chosen")
    tab.keyboard.press("Enter")
    reach("greedy")
    tab.keyboard.press("Space")
    example = tab.locator(".image-frame img").get_attribute("src")
    _, (greedy, _, _, percent) = page.caption(get(example).content, "scene.jpg", "greedy")
    tab.wait_for_function(f"{CAPTION} == {json.dumps(greedy)}")
    tab.get_by_text(f"Probability per word: {percent}%").wait_for()
    reach("Remove Image")
    tab.keyboard.press("Enter")
    tab.get_by_text("Probability per word").wait_for(state="detached")
    choose("Drop an image file here to upload", [tmp_path / "scene.jpg"])
    tab.get_by_text("Probability per word").wait_for()
    reach("Several photos")
    tab.keyboard.press("Enter")
    choose("Click to upload or drop files", [tmp_path / "scene.jpg"] * 2)
    tab.get_by_role("button", name="Caption these photos", disabled=False).wait_for()
    reach("Caption these photos")
    tab.keyboard.press("Enter")
    tab.get_by_text("Captioned 2 of 2 photos.").wait_for()
    reach("Download as CSV")
    reach("Download as JSON Lines")
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_screenshots_of_every_state(page: Page, browser, scene: Image.Image, tmp_path: Path, width: int, scheme: str):
    """To look at them: `--basetemp FOLDER -o tmp_path_retention_policy=all`. Nothing may be cut, crowded or empty."""
    upright = scene.resize((300, 400))
    (tmp_path / "turned.jpg").write_bytes(turned(upright))
    (tmp_path / "broken.jpg").write_text("not a photo at all")
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab.set_default_timeout(1000 * WAIT)

    def shoot(state: str) -> None:
        tab.wait_for_timeout(500)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.screenshot(path=tmp_path / f"{state}.png", full_page=True)
        assert (tmp_path / f"{state}.png").stat().st_size > 10_000

    tab.goto(page.url)
    tab.locator("#examples button img").last.wait_for()
    alternative_texts = [image.get_attribute("alt") for image in tab.locator("#examples img").all()]
    assert all(len(text.split()) > 2 for text in alternative_texts)
    shoot("empty")
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "turned.jpg")
    tab.locator("#maps .thumbnail-item img").first.wait_for()
    tab.get_by_text("Alternatives").first.wait_for()
    shoot("captioned")
    assert tab.locator(".image-frame img").evaluate("i => [i.naturalWidth, i.naturalHeight]") == [300, 400]
    maps = [tile.bounding_box() for tile in tab.locator("#maps .thumbnail-item").all()]
    assert max(tile["x"] + tile["width"] for tile in maps) < width - 20  # a box next to another would be cut off
    tops = [tab.locator(f"#{name}").bounding_box()["y"] for name in ("examples", "caption")]
    assert (tops[0] < tops[1]) == (width < 600)
    tab.get_by_role("button", name="How words are chosen").click()
    tab.get_by_label("Greedy").wait_for()
    shoot("options")
    tab.get_by_role("button", name="How words are chosen").click()
    tab.get_by_role("tab", name="Several photos").click()
    files = [tmp_path / "turned.jpg", tmp_path / "broken.jpg"]
    tab.locator("input[type=file]").last.set_input_files(files)
    tab.get_by_role("button", name="Caption these photos").click()
    tab.get_by_text("Captioned 1 of 2 photos.").wait_for()
    shoot("several")
    tab.get_by_role("tab", name="One photo").click()
    tab.get_by_label("Remove Image").click()
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "broken.jpg")
    tab.get_by_text("cannot be read as an image").filter(visible=True).first.wait_for()
    shoot("error")
    tab.close()


# As an API


def test_gradio_client_captions_as_the_command_line_does(
    page: Page, attending: Path, scene: Image.Image, tmp_path: Path
):
    path = tmp_path / "scene.png"
    scene.save(path)
    client = gradio_client.Client(page.url, verbose=False, httpx_kwargs={"timeout": WAIT})
    caption, table, maps, percent = client.predict(
        photo=gradio_client.handle_file(path), method="beam", beam_size=4, temperature=1, api_name="/caption"
    )
    expected = Captioner.load(attending)(path, beam_size=4, alternatives=3, block_trigrams=True)[0]
    assert caption == expected.text
    assert percent == per_word(expected)
    assert table["data"] == [[other.text, per_word(other)] for other in other_captions(expected)]
    assert percent >= table["data"][0][1]
    assert [tile["caption"] for tile in maps] == expected.tokens
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/caption"]


def test_the_examples_of_docs_web_md_do_what_they_say(
    page: Page, scene: Image.Image, tmp_path: Path, monkeypatch, capfd
):
    scene.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    _, (expected, table, *_) = page.caption((tmp_path / "photo.jpg").read_bytes(), "photo.jpg", "beam", 3)
    readme = (ROOT / "docs" / "web.md").read_text().replace("http://127.0.0.1:7860", page.url)
    client = partial(gradio_client.Client, httpx_kwargs={"timeout": WAIT})
    monkeypatch.setattr(gradio_client, "Client", client)
    [code] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "gradio_client" in block]
    exec(code, {})
    assert f"{expected} {table['data']}\n" in capfd.readouterr().out
    if shutil.which("curl"):
        [commands] = [block for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) if "curl" in block]
        subprocess.run(["bash", "-ec", commands], check=True)
        event, data = capfd.readouterr().out.strip().split("\n")
        assert event == "event: complete"
        assert json.loads(data.removeprefix("data: "))[:2] == [expected, table]


@pytest.mark.parametrize("name", [".photo.jpg", ".jpg", "...", "album/.photo.jpg"])
def test_a_photo_whose_name_begins_with_a_dot_is_captioned(page: Page, scene: Image.Image, name: str):
    data = encoded(scene)
    outcome, (caption, *_) = page.caption(data, name)
    assert (outcome, caption) == ("complete", page.caption(data)[1][0])


def test_sampling_and_greedy_over_http(page: Page, scene: Image.Image):
    data = encoded(scene)
    assert page.caption(data, "a.jpg", "greedy")[0] == "complete"
    event, (_, table, *_) = page.caption(data, "a.jpg", "sampling", 3, 2.0)
    assert event == "complete"
    assert len(table["data"]) > 1


def test_no_answer_writes_over_the_maps_of_another(page: Page, scene: Image.Image):
    answers = [page.caption(encoded(scene), "a.jpg", "greedy")[1] for _ in range(2)]
    first, second = ({tile["image"]["path"] for tile in answer[2]} for answer in answers)
    assert first
    assert not first & second


def test_the_sample_of_use_via_api_works(page: Page, monkeypatch, capfd):
    endpoint = get(f"{page.api}/info").json()["named_endpoints"]["/caption"]
    exec(endpoint["code_snippets"]["python"], {})
    assert "'headers': ['caption', '% per word']" in capfd.readouterr().out
    image, *_ = endpoint["parameters"]
    assert image["example_input"]["url"] in endpoint["code_snippets"]["javascript"]
    assert get(image["example_input"]["url"]).headers["content-type"] == "image/jpeg"


def good_images() -> dict[str, bytes]:
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
        "new.avif": encoded(scene.resize((80, 60)), "AVIF"),
        "new.jp2": encoded(scene.resize((80, 60)), "JPEG2000"),
    }


@pytest.fixture(scope="module")
def good() -> dict[str, bytes]:
    return good_images()


IMAGES = [
    "animated.gif",
    "cmyk.jpg",
    "16-bit.png",
    "palette.png",
    "turned.jpg",
    "1x1.png",
    "strip.png",
    "new.avif",
    "new.jp2",
]


@pytest.mark.parametrize("name", [*IMAGES, "noise of 20 MB.png", "a'b\"<b>&ü.jpg"])
def test_every_image_gets_a_caption(page: Page, good: dict[str, bytes], name: str):
    event, data = page.caption(good[name], name)
    assert event == "complete"
    assert data[0]


BROKEN = ["text.jpg", "empty.png", "script.eps", "bomb.png", "truncated.jpg"]


@pytest.mark.parametrize("name", BROKEN)
def test_every_other_file_gets_one_friendly_sentence(page: Page, scene: Image.Image, name: str):
    whole = encoded(scene)
    data = {
        "text.jpg": b"just some text",
        "empty.png": b"\0",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "bomb.png": bomb() if name == "bomb.png" else b"",
        "truncated.jpg": whole[: len(whole) // 2],
    }[name]
    event, answer = page.caption(data, name)
    assert event == "error"
    assert answer["error"].startswith(f"{name} cannot be read as an image (")
    assert str(page.temporary) not in answer["error"]  # no path of the server
    assert page.caption(whole)[0] == "complete"


UPLOADED = {"path": "the upload", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([UPLOADED, "beam", 1000], "Beam size must be a whole number from 1 to 10, not 1000."),
        ([UPLOADED, "beam", 0], "Beam size must be a whole number from 1 to 10, not 0."),
        ([UPLOADED, "beam", 2.5], "Beam size must be a whole number from 1 to 10, not 2.5."),
        ([UPLOADED, "beam", "3"], 'Beam size must be a whole number from 1 to 10, not "3".'),
        ([UPLOADED, "beam", None], "Beam size must be a whole number from 1 to 10, not null."),
        ([UPLOADED, "beam", True], "Beam size must be a whole number from 1 to 10, not true."),
        ([UPLOADED, "beam", [3]], "Beam size must be a whole number from 1 to 10, not [3]."),
        ([UPLOADED, "sampling", 3, "hot"], 'Temperature must be a number from 0.1 to 2, not "hot".'),
        ([UPLOADED, "sampling", 3, None], "Temperature must be a number from 0.1 to 2, not null."),
        ([UPLOADED, "best"], 'Method must be one of beam, greedy, sampling, not "best".'),
        ([UPLOADED, None], "Method must be one of beam, greedy, sampling, not null."),
        ([UPLOADED, {"a": 1}], 'Method must be one of beam, greedy, sampling, not {"a": 1}.'),
        ([UPLOADED, "beam", 3, 1, "large"], 'Model must be one of small, plain, not "large".'),
        (
            [UPLOADED, "beam", 3, 1, "small", 7],
            "Send at most 5 values (Photo, Method, Beam size, Temperature, Model), not 6.",
        ),
        ([None, "beam", 3, 1], "Upload a photo first."),
        ([], "Upload a photo first."),
        (["data:image/png;base64,iVBORw0KGgo=", "beam", 3, 1], "The photo must be an uploaded file"),
        (["iVBORw0KGgo=", "beam", 3, 1], "The photo must be an uploaded file"),
        (["/etc/passwd", "beam", 3, 1], "The photo must be an uploaded file"),
        ([7, "beam", 3, 1], "The photo must be an uploaded file"),
        ([[UPLOADED], "beam", 3, 1], "The photo must be an uploaded file"),
        ([{}, "beam", 3, 1], "The photo must be an uploaded file"),
        ([{"path": 5, "meta": {"_type": "gradio.FileData"}}, "beam", 3, 1], "The photo must be an uploaded file"),
        ([{"path": "a" * 5000, "meta": {"_type": "gradio.FileData"}}, "beam", 3, 1], "Upload the photo first"),
        ([{"path": "a" * 5000}, "beam", 3, 1], "Upload the photo first"),
        ([{"path": "a\0b"}, "beam", 3, 1], "Upload the photo first"),
        ([{"path": "a.jpg", "url": 5, "size": "large"}, "beam", 3, 1], "Upload the photo first"),
    ],
)
def test_values_that_the_page_does_not_send_get_a_sentence(page: Page, scene: Image.Image, values, sentence: str):
    if values and values[0] is UPLOADED:
        values = [{**UPLOADED, "path": page.upload(encoded(scene))}, *values[1:]]
    event, answer = page.call(*values) if values else page.call(None)
    assert event == "error"
    assert answer["error"].startswith(sentence)


def test_the_folder_of_an_upload_is_refused(page: Page, scene: Image.Image):
    """Gradio would delete it as a file, fail, and delete nothing more."""
    folder = str(Path(page.upload(encoded(scene))).parent)
    event, answer = page.call({"path": folder, "meta": {"_type": "gradio.FileData"}})
    assert event == "error"
    assert answer["error"].startswith("Upload the photo first")


def test_what_is_larger_than_allowed_is_refused_and_takes_no_memory(page: Page):
    reply = post(f"{page.api}/upload", files={"files": ("a.jpg", bytes(MAX_UPLOADED + 1))})
    assert reply.status_code == 413
    before = psutil.Process(page.process.pid).memory_info().rss
    for path in ("call/caption", "queue/join", "run/caption", "reset"):
        with contextlib.suppress(httpx.TransportError):  # it may close the connection before all is sent
            reply = post(f"{page.api}/{path}", content=(bytes(1 << 16) for _ in range(5 * MAX_BODY >> 16)))
            assert reply.status_code in (404, 413)
    assert psutil.Process(page.process.pid).memory_info().rss < before + (64 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_an_image_of_12_megapixels_takes_little_memory(page: Page):
    assert page.caption(encoded(draw_noise(0, (4000, 3000))))[0] == "complete"
    server = psutil.Process(page.process.pid)
    for process in (server, *server.children(recursive=True)):
        peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        assert peak
        assert int(peak[1]) << 10 < 1.5e9


def test_an_upload_that_is_cut_off_leaves_no_file(page: Page):
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\nContent-Length: 50000000\r\n"
    part = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    uploads = next(page.temporary.glob("captions-*/uploads"))
    before = set(uploads.rglob("*"))
    with socket.create_connection(("127.0.0.1", page.port)) as connection:
        head += f"Content-Type: multipart/form-data; boundary=x\r\n\r\n{part}"
        connection.sendall(head.encode() + bytes(3 << 20))
        end = time.monotonic() + WAIT
        while set(uploads.rglob("*")) == before and time.monotonic() < end:
            time.sleep(0.05)
        assert set(uploads.rglob("*")) > before
    while set(uploads.rglob("*")) != before and time.monotonic() < end:
        time.sleep(0.05)
    assert set(uploads.rglob("*")) == before


def test_requests_that_gradio_fails_on_are_answered(page: Page, scene: Image.Image):
    reply = get(f"{page.api}/queue/data", params={"session_hash": "unknown"})
    assert (reply.status_code, reply.text) == (404, "There is no such session; load the page again.")
    address = f"{page.api}/file={page.upload(encoded(scene))}"
    for value in ("bytes=0-1", "bytes=-5"):
        assert get(address, headers={"Range": value}).status_code == 206
    for value in ("bytes=0-1,3-4", "bytes=--1", "x", f"bytes=0-{'9' * 5000}"):
        assert get(address, headers={"Range": value}).status_code == 200
    for name, value in (("X-Forwarded-Host", "a:b"), ("X-Forwarded-Host", "[::"), ("X-Gradio-Server", "http://a:b")):
        assert get(page.url, headers={name: value}).status_code == 200
    assert "http://captions.example" in get(page.url, headers={"X-Forwarded-Host": "captions.example , b:c"}).text
    assert get(page.url, params={"page": "2"}).status_code == 404
    form = {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"}
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\nabc\r\n--x--\r\n'
    assert post(f"{page.api}/upload", headers=form, content=part).status_code == 422


def join(page: Page, event: str, data: list[object], **values: object) -> tuple[httpx.Response, dict[str, Any]]:
    """Ask for the first event of a kind, or an API, as the page does; returns the reply and the message of its end."""
    functions = page.client.get(f"{page.url}/config").json()["dependencies"]
    number = next(x["id"] for x in functions if event in (x["api_name"], *(target[1] for target in x["targets"])))
    session = values.pop("session_hash", secrets.token_hex(8))
    body = {"fn_index": number, "session_hash": session, "data": data, **values}
    content = json.dumps(body).encode()  # with escapes, also of halves of characters
    reply = page.client.post(f"{page.api}/queue/join", content=content, headers={"Content-Type": "application/json"})
    if reply.status_code != 200:
        return reply, {}
    events = page.client.get(f"{page.api}/queue/data", params={"session_hash": session}).text
    messages = [json.loads(line.removeprefix("data: ")) for line in events.split("\n") if line.startswith("data: ")]
    return reply, next(message for message in messages if message["msg"] == "process_completed")


def test_sessions_have_short_names(page: Page):
    reply, _ = join(page, "caption", [None], session_hash="x" * 300)
    assert (reply.status_code, reply.json()["detail"]) == (400, "This session's name is too long.")


@pytest.mark.parametrize("name", ["A" * 100_000, "\ud800.jpg"])
def test_names_of_uploads_of_any_length_and_letters_are_answered(page: Page, name: str):
    image = {"path": page.upload(b"no photo"), "orig_name": name, "meta": {"_type": "gradio.FileData"}}
    _, message = join(page, "caption", [image])
    assert not message["success"]
    assert "cannot be read as an image" in message["output"]["error"]
    assert len(message["output"]["error"]) < 1000


@pytest.mark.parametrize("event_data", [None, {}, {"index": 1.0, "value": 0}, {"index": 99, "value": 0}, "x"])
def test_an_example_that_there_is_not_is_a_sentence(page: Page, event_data: object):
    _, message = join(page, "select", [], event_data=event_data)
    assert message["output"]["error"] == "Choose one of the examples."


def test_a_text_is_not_fetched_as_a_file():
    box = gr.Textbox(label="Caption")
    value = {"path": "https://example.org/big", "meta": {"_type": "gradio.FileData"}}
    assert explain_unusable(box, value) == "Caption must be text."
    assert explain_unusable(box, "a cat") is None


def test_the_memory_of_sessions_and_uploads_is_bounded():
    with Blocks(analytics_enabled=False) as blocks:
        gr.Button("x").click(lambda: None, api_name="x")
    blocks.queue()
    assert blocks.state_session_capacity <= 256
    sessions = blocks._queue.pending_event_ids_session
    for number in range(5):
        sessions[f"ended-{number}"] = set()
    body = PredictBodyInternal(session_hash="new", fn_index=0, data=[], request=None)
    with ThreadPoolExecutor(1) as pool:  # as the browser's tests run a loop in this thread
        pool.submit(asyncio.run, blocks._queue.push(body, None, None)).result()
    assert list(sessions) == ["new"]
    uploads = gradio.routes.file_upload_statuses
    for number in range(3000):
        uploads.track(f"upload-{number}")
        _ = uploads._signals[f"asked-{number}"]
    assert max(len(uploads._statuses), len(uploads._signals)) <= 1000


def test_the_address_of_an_upload_may_be_percent_encoded(page: Page, scene: Image.Image):
    path = page.upload(encoded(scene), "my photo ü.jpg")
    for form in (path, quote(path)):
        image = {"path": f"{page.api}/file={form}", "meta": {"_type": "gradio.FileData"}}
        event, answer = page.call(image, "beam", 3, 1)
        assert event == "complete", answer


def test_another_website_may_neither_ask_nor_upload(page: Page, scene: Image.Image):
    for path in ("upload", "call/caption", "info"):
        for headers in ({"Origin": "https://example.org"}, {"Host": "example.org"}):
            files = {"files": ("a.jpg", encoded(scene))}
            reply = post(f"{page.api}/{path}", headers=headers, files=files)
            assert reply.status_code == 403
            assert "access-control-allow-credentials" not in reply.headers


VALUES = {"data": [], "session_hash": "x", "fn_index": 999}


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "sentence"),
    [
        ("GET", "call/caption/0123", None, 404, "There is no such call"),
        ("GET", "call/v2/caption/0123", None, 404, "There is no such call"),
        ("GET", "call/nope/0123", None, 404, "There is no API nope"),
        ("POST", "call/nope", {"data": []}, 404, "There is no API nope"),
        ("POST", "call/v2/nope", {"data": []}, 404, "There is no API nope"),
        ("POST", "run/nope", {"data": []}, 422, "These values are not the ones of this API"),
        ("POST", "run/predict", VALUES, 422, "These values are not the ones of this API"),
        ("POST", "call/v2/caption", {"nope": 3}, 422, "These values are not the ones of this API"),
        ("POST", "queue/join", VALUES, 422, "These values are not the ones of this API"),
        ("POST", "reset", {"event_id": math.nan}, 422, "These values are not the ones of this API"),
        ("POST", "cancel", {"event_id": math.nan}, 422, "These values are not the ones of this API"),
        ("POST", "call/caption", {"data": math.inf}, 422, "These values are not the ones of this API"),
    ],
)
def test_what_the_api_has_not_is_a_sentence(page: Page, method: str, path: str, body, code: int, sentence: str):
    log = page.temporary.parent / "log"
    before = log.read_text()
    content = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    reply = page.client.request(method, f"{page.api}/{path}", content=content, headers=headers)
    assert (reply.status_code, sentence in reply.text) == (code, True)
    assert log.read_text() == before


PART = '--{0}\r\nContent-Disposition: form-data; name="{1}"{2}\r\n\r\nphoto.jpg\r\n'
FILE = '; filename="a.jpg"'


@pytest.mark.parametrize(
    ("query", "boundary", "parts"),
    [
        ("", "x", [("files", "")]),  # the @ is forgotten
        ("", "x", [("files", FILE), ("files", "")]),
        ("", "x", [("file", FILE)]),
        ("", "x", []),
        ("?upload_id=1", "x", [("files", FILE), ("note", "")]),
        ("", "x" * 300, [("files", FILE)]),
    ],
)
def test_a_form_without_photos_says_how_to_send_them_and_leaves_no_file(page: Page, query: str, boundary: str, parts):
    uploads, log = next(page.temporary.glob("captions-*/uploads")), page.temporary.parent / "log"
    before = set(uploads.rglob("*")), log.read_text()
    body = "".join(PART.format(boundary, *part) for part in parts) + f"--{boundary}--\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    reply = page.client.post(f"{page.api}/upload{query}", content=body.encode(), headers=headers)
    assert (reply.status_code, "`curl -F files=@photo.jpg`" in reply.text) == (422, True)
    assert (set(uploads.rglob("*")), log.read_text()) == before


def test_a_result_can_be_fetched_once(page: Page, scene: Image.Image):
    image = {**UPLOADED, "path": page.upload(encoded(scene))}
    event = page.client.post(f"{page.api}/call/caption", json={"data": [image]}).json()["event_id"]
    first, second = (page.client.get(f"{page.api}/call/caption/{event}") for _ in range(2))
    assert first.text.startswith("event: complete")
    assert (second.status_code, second.text.split(",")[0]) == (404, "There is no such call")


# Nothing but uploads


@pytest.mark.parametrize(
    "meta",
    [{}, {"meta": {"_type": "gradio.FileData"}}, {"meta": {"_type": "gradio.FileData"}, "is_stream": True}],
)
def test_a_path_of_the_server_is_no_image(page: Page, tmp_path: Path, scene: Image.Image, meta: dict):
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
        assert answer["error"].startswith("Upload the photo first")
    (page.temporary / "private.jpg").unlink()


@pytest.mark.parametrize(
    "image",
    [
        {"path": "http://127.0.0.1:1/a.jpg", "meta": {"_type": "gradio.FileData"}},
        {"path": "https://example.org/a.jpg", "meta": {"_type": "gradio.FileData"}},
        {"path": "https://example.org/a.jpg"},
        {"url": "data:image/png;base64,iVBORw0KGgo="},
    ],
)
def test_the_server_fetches_nothing(page: Page, image: dict):
    event, answer = page.call(image)
    assert event == "error"
    assert answer["error"].startswith(("Upload the photo", "The photo must be an uploaded file"))


def test_no_file_but_uploads_is_served(page: Page, scene: Image.Image):
    upload = page.upload(encoded(scene))
    assert get(f"{page.api}/file={upload}").content == encoded(scene)
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
            connection.sendall(f"GET /gradio_api/file={path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            answer = connection.makefile("rb").read()
        assert answer.split()[1] in (b"403", b"404"), path
        assert b"root:" not in answer
    assert get(f"{page.api}/proxy=http://127.0.0.1:1/").status_code == 404
    for static in (
        "/static/../../../../etc/passwd",
        "/assets/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/routes.py",
    ):
        with socket.create_connection(("127.0.0.1", page.port)) as connection:
            connection.sendall(f"GET {static} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            assert connection.makefile("rb").read().split()[1] in (b"403", b"404")


# Under load


def test_two_hundred_requests_from_sixteen_clients(page: Page, scene: Image.Image, capsys):
    images = [encoded(scene.rotate(5 * i)) for i in range(16)]
    process = psutil.Process(page.process.pid)
    seconds: list[float] = []
    memory: list[int] = []
    lock = threading.Lock()

    def ask(i: int) -> None:
        start = time.perf_counter()
        event, answer = page.caption(images[i % 16], f"{i}.jpg", ("beam", "greedy", "sampling")[i % 3])
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
    """Captions when it is let."""

    def __init__(self, captioner: Captioner):
        self.transform, self.description, self.folder = captioner.transform, captioner.description, captioner.folder
        self.go = threading.Event()

    def __call__(self, images: list, how: Decoding) -> list[Caption]:
        self.go.wait(WAIT)
        return [Caption(f"caption {how.beam_size}", ["a"], 0.0)] * len(images)


@pytest.fixture
def slow(attending: Path) -> SlowCaptioner:
    return SlowCaptioner(Captioner.load(attending))


@contextlib.contextmanager
def served(slow: SlowCaptioner, examples: list[tuple[Path, str]], folder: Path) -> Iterator[str]:
    server = CaptionServer({"slow": slow})
    page, _ = gradio_main.build_page(server, examples, folder)
    with patch("gradio.networking.url_ok", return_value=True):  # it would wait for an answer for three seconds only
        _, url, _ = page.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, share=False)
    try:
        yield f"{url}gradio_api"
    finally:
        slow.go.set()
        server.close()
        page.close(verbose=False)


def test_a_full_queue_says_so(slow: SlowCaptioner, scene: Image.Image, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(gradio_main, "MAX_WAITING", 1)
    monkeypatch.setattr(gradio_main, "HANDLED_AT_ONCE", 1)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with served(slow, [], tmp_path) as api:
        path = post(f"{api}/upload", files={"files": ("a.jpg", encoded(scene))}).json()[0]
        body = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "beam", 3, 1]}
        replies: list[httpx.Response] = []
        for _ in range(60):  # one is captioned, one waits, and the next is refused
            replies.append(post(f"{api}/call/caption", json=body))
            if sum(reply.status_code == 200 for reply in replies) == 2 and replies[-1].status_code == 503:
                break
            time.sleep(0.5)
        assert {reply.status_code for reply in replies} == {200, 503}
        assert "Queue is full" in replies[-1].text
        assert get(api.removesuffix("gradio_api")).status_code == 200  # it answers meanwhile


def fail_on_a_full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_a_sentence(slow: SlowCaptioner, image_path: Path, monkeypatch, tmp_path: Path, capfd):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    slow.go.set()
    with served(slow, [], tmp_path) as api:
        path = post(f"{api}/upload", files={"files": ("a.png", image_path.read_bytes())}).json()[0]
        body = {"data": [{**UPLOADED, "path": path}]}
        for function in (
            "gradio.processing_utils.async_move_files_to_cache",
            "captioning.page.attention_maps",
            "gradio.Gallery.postprocess",
        ):
            with patch(function, fail_on_a_full_disk):
                event = post(f"{api}/call/caption", json=body).json()["event_id"]
                answer = get(f"{api}/call/caption/{event}").text
            assert "The server's disk is full; try again later." in answer
    assert "Traceback" not in capfd.readouterr().err


def test_an_upload_onto_a_full_disk_leaves_no_file(slow: SlowCaptioner, monkeypatch, tmp_path: Path, capfd):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    gates: list[Gate] = []
    monkeypatch.setattr(gradio_main.StoppableServer, "run", lambda self, **_: gates.append(self.config.app))
    server = CaptionServer({"slow": slow})
    page, image = gradio_main.build_page(server, [], tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gradio_main.serve(page, image, server, listener, share=False)
    server.close()
    monkeypatch.setattr("gradio.route_utils.GradioUploadFile.write", fail_on_a_full_disk)
    client = TestClient(gates[0], "http://127.0.0.1")
    reply = client.post("/gradio_api/upload", files={"files": ("a.jpg", bytes(100))})
    assert (reply.status_code, reply.text) == (507, "The server's disk is full; try again later.")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert "Traceback" not in capfd.readouterr().err


def test_uploads_are_deleted_and_examples_stay(slow: SlowCaptioner, image_path: Path, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(gradio_main, "UPLOAD_LIFETIME", (1, 6))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    with served(slow, [(image_path, "red and blue")], tmp_path) as api:
        path = post(f"{api}/upload", files={"files": ("a.jpg", b"a")}).json()[0]
        (example,) = (tmp_path / "uploads").glob("*/photo.png")
        end = time.monotonic() + WAIT
        while get(f"{api}/file={path}").status_code == 200 and time.monotonic() < end:
            time.sleep(0.5)
        assert not Path(path).exists()
        assert get(f"{api}/file={example}").content == image_path.read_bytes()


# The parts


def test_attention_maps_are_clear_where_the_model_looks():
    weights = torch.zeros(2, 49)
    weights[0, 0] = weights[1, 48] = 1  # upper left, lower right
    caption = Caption("a dog", ["a", "dog"], 0.0, weights)
    (first, word), (second, _) = attention_maps(Image.new("RGB", (224, 224), "white"), caption)
    assert word == "a"
    assert list(first.getdata()) == list(overlay_attention(Image.new("RGB", (224, 224), "white"), weights[0]).getdata())
    assert sum(first.getpixel((10, 10))) > 600 > sum(first.getpixel((213, 213)))
    assert sum(second.getpixel((213, 213))) > 600 > sum(second.getpixel((10, 10)))
    assert attention_maps(Image.new("RGB", (9, 9)), Caption("a", ["a"], 0.0)) == []


def test_an_alternative_differs_in_more_than_case_and_full_stop():
    texts = ["a dog.", "a dog", "a cat.", "a cat", "A dog ."]
    caption = Caption("a dog.", [], 0.0, alternatives=[Caption(text, [], 0.0) for text in texts])
    assert [other.text for other in other_captions(caption)] == ["a cat."]
    assert other_captions(Caption("a dog.", [], 0.0)) == []


@pytest.mark.parametrize(("method", "label"), [("beam", "Alternatives"), ("sampling", "Other samples")])
def test_samples_are_not_called_alternatives(method: str, label: str, image_path: Path, tmp_path: Path):
    caption = Caption("a dog.", [], -1.0, score=-2.0, alternatives=[Caption("a cat.", [], -1.0, score=-1.0)])
    server = SimpleNamespace(caption=lambda *_: (caption, None))
    table = Handlers(server, tmp_path).show(Upload(image_path, "photo.png"), method, 3, 1.0, "small")[3]
    assert (table["label"], table["value"]["data"]) == (label, [["a cat.", per_word(caption.alternatives[0])]])


def test_a_table_shows_one_decimal_of_its_numbers():
    table = as_table(["photo", "percent"], [["a.jpg", 44.0], ["b.jpg", None]])
    assert table["data"] == [["a.jpg", 44.0], ["b.jpg", None]]
    assert table["metadata"]["display_value"] == [["a.jpg", "44.0"], ["b.jpg", ""]]


def test_tables_hold_what_is_captioned_and_why_the_others_are_not(tmp_path: Path):
    rows = [
        {"photo": 'a, "b".jpg', "caption": "a dog.", "log_probability": -1.5},
        {"photo": "=cmd().jpg", "error": "=cmd().jpg cannot be read."},
        {"photo": "ü\u2028.jpg", "caption": "a cat.", "log_probability": -2.0},
    ]
    table, lines = write_tables(rows, tmp_path)
    assert [json.loads(line) for line in lines.read_text(encoding="utf-8").split("\n")[:-1]] == rows
    with table.open(encoding="utf-8", newline="") as file:
        first, second, third = csv.DictReader(file)
    assert first == {"photo": 'a, "b".jpg', "caption": "a dog.", "log_probability": "-1.5", "error": ""}
    assert second["photo"] == "'=cmd().jpg"  # which a spreadsheet would run
    assert third["photo"] == "ü\u2028.jpg"


def test_it_says_which_model_it_is(attending: Path):
    description = read_description(attending)
    text = gradio_main.describe_model("small", description)
    assert "`small`" in text
    assert "120 captions of 24 photos (data set `scenes`)" in text
    for data in ({}, {"train_photos": "many", "train_captions": [1]}, {"train_photos": None, "folder": {}}):
        strange = description.model_copy(update={"data": data, "epochs": [{"CIDEr": "good"}], "best_epoch": 1})
        assert "trained" not in gradio_main.describe_model("small", strange)


def test_examples_are_the_models_own_or_of_its_kind(tmp_path: Path, image_path: Path, trained: Path):
    drawn = Captioner.load(trained)
    assert {path.stem[:6] for path, _ in gradio_main.example_images({"a": drawn}, tmp_path)} == {"scene-"}
    real = Captioner.load(trained)
    real.description.data["folder"] = "coco"
    real.folder = tmp_path
    images = dict(gradio_main.example_images({"a": real}, tmp_path))
    assert {path.parent for path in images} == {ROOT / "images"}
    assert len(gradio_main.example_images({"a": real, "b": drawn}, tmp_path)) == len(images) + 6
    (tmp_path / "examples").mkdir()
    shutil.copy(image_path, tmp_path / "examples")
    shutil.copy(image_path, tmp_path / "examples" / os.fsdecode(b"caf\xe9.png"))
    assert gradio_main.example_images({"a": real}, tmp_path) == [(tmp_path / "examples" / "photo.png", "photo")]
    for path in (tmp_path / "examples").iterdir():
        path.unlink()
    assert len(gradio_main.example_images({"a": real}, tmp_path)) == len(images)


def test_every_image_is_credited_and_they_are_small():
    rows = re.findall(r"\| `(.*?)` \| (.*?) \| (.*?) \| (.*?) \| .* \|", (ROOT / "images" / "README.md").read_text())
    paths = sorted((ROOT / "images").glob("*.jpg"))
    assert [name for name, *_ in rows] == [path.name for path in paths]
    for path, (_, text, author, licence) in zip(paths, rows, strict=True):
        with Image.open(path) as image:
            exif = image.getexif()
            assert max(image.size) <= 512
        assert [exif[tag] for tag in (0x010E, 0x013B, 0x8298)] == [text, author, licence]
        assert licence in ("CC0", "public domain")
    assert sum(path.stat().st_size for path in paths) < 300_000


def test_models_of_one_name_are_told_apart(trained: Path, attending: Path):
    models = gradio_main.load_models((trained, attending))
    assert list(models) == ["small", str(attending)]
    assert models["small"].folder == trained


def test_a_name_that_is_another_models_path_is_told_apart(trained: Path, tmp_path: Path, monkeypatch):
    for folder in ("other/coco", "coco"):
        shutil.copytree(trained, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    models = gradio_main.load_models((Path("other/coco"), Path("coco")))
    assert {name: model.folder for name, model in models.items()} == {
        "coco": Path("other/coco"),
        str(tmp_path / "coco"): Path("coco"),
    }


def test_keeping_and_the_menu_of_models_are_there_where_asked_for(slow: SlowCaptioner, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    for captioners, flag_folder in (({"a": slow}, None), ({"a": slow, "b": slow}, tmp_path / "kept")):
        server = CaptionServer(captioners)
        page, _ = gradio_main.build_page(server, [], tmp_path, flag_folder)
        server.close()
        assert ("Save this photo and caption" in str(page.config)) == (flag_folder is not None)
        [menu] = [part["props"] for part in page.config["components"] if part["props"].get("label") == "Model"]
        assert menu["visible"] == (len(captioners) > 1)


def test_without_a_model_it_says_how_to_get_one(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MODELS", tmp_path)  # neither here nor in the project's own folder
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


def test_a_port_that_cannot_be_had_is_a_sentence(attending: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 99_999):
            with pytest.raises(InputError, match=r"choose another --host or --port"):
                gradio_main.main((attending,), port=port)


def test_the_sample_of_use_via_api_is_public_where_the_page_is(
    slow: SlowCaptioner, image_path: Path, monkeypatch, tmp_path: Path
):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(gradio_main, "setup_tunnel", lambda *_: "https://abc.tunnel.example")
    monkeypatch.setattr(gradio_main.StoppableServer, "run", lambda *_, **__: None)
    server = CaptionServer({"slow": slow})
    page, image = gradio_main.build_page(server, [(image_path, "red and blue")], tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gradio_main.serve(page, image, server, listener, share=True)
    server.close()
    assert image.sample.startswith("https://abc.tunnel.example/gradio_api/file=")


def test_where_no_public_address_can_be_had_it_says_to_leave_out_share(
    slow: SlowCaptioner, monkeypatch, tmp_path: Path
):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(gradio_main, "setup_tunnel", lambda *_: 1 / 0)
    server = CaptionServer({"slow": slow})
    page, image = gradio_main.build_page(server, [], tmp_path)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(InputError, match="leave out --share"),
    ):
        gradio_main.serve(page, image, server, listener, share=True)
    server.close()
