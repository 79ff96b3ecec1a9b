"""Which requests are let in, and how photos are captioned together."""

from __future__ import annotations

import asyncio
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.server import ServerState

from captioning import web
from captioning.backbones import Preprocessing
from captioning.captioner import Caption, Decoding
from captioning.errors import InputError
from captioning.web import LOOPBACK, MAX_BODY, MAX_UPLOADED, CaptionServer, Gate, HttpProtocol, Upload, own_names

# Requests


async def _measure(request: Request) -> PlainTextResponse:
    size = 0
    async for part in request.stream():
        size += len(part)
    return PlainTextResponse(str(size), headers={"access-control-allow-credentials": "true"})


def ask(method: str, path: str, gate: Gate | None = None, **options: object) -> httpx.Response:
    app = Starlette(routes=[Route("/{path:path}", _measure, methods=["GET", "POST", "OPTIONS"])])
    gate = gate or Gate(app, LOOPBACK)
    gate.app = app

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(gate)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


PATHS = ("/", "/gradio_api/upload", "/gradio_api/call/caption", "/gradio_api/queue/join")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "captions.example"},
        {"Host": "localhost.example:7860"},
        {"Host": "127.0.0.1.example"},
        {"Host": "127.0.0.1@example.org"},
        {"Host": ""},
        {"Host": "["},
        {"Origin": "https://example.org"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "http://localhost:7860"},  # another host than the request's own
        {"Origin": "http://127.0.0.1:7860.example.org"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://["},
        {"Host": "evil.example:7860", "Origin": "http://evil.example:7860"},  # by a name that leads here
    ],
)
def test_another_websites_requests_are_refused_without_credentials(path: str, headers: dict[str, str]):
    preflight = {**headers, "Access-Control-Request-Method": "POST"}
    for method, sent in (("GET", headers), ("POST", headers), ("OPTIONS", preflight)):
        reply = ask(method, path, headers=sent)
        assert reply.status_code == 403
        assert reply.text.count(".") >= 1
        assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://127.0.0.1:7860"},
        {"Host": "localhost:7860", "Origin": "http://localhost:7860"},
        {"Host": "LOCALHOST"},
        {"Host": "[::1]:7860", "Origin": "http://[::1]:7860"},
        {"Host": "localhost:8000", "Origin": "http://localhost:8000"},  # through a forwarded port
        {"Origin": "https://captions.example", "X-Forwarded-Host": "captions.example"},  # through a proxy
        {"Origin": "https://captions.example", "X-Forwarded-Host": "captions.example, inner"},  # through two
    ],
)
def test_the_pages_own_requests_and_programs_are_answered(headers: dict[str, str]):
    assert ask("POST", "/gradio_api/call/caption", headers=headers, content=b"abc").text == "3"


def test_a_server_of_many_names_refuses_only_foreign_origins():
    headers = {"Host": "captions.example", "Origin": "https://captions.example"}
    assert ask("POST", "/", Gate(None), headers=headers).status_code == 200
    assert ask("POST", "/", Gate(None), headers={**headers, "Origin": "https://example.org"}).status_code == 403
    program = {"Host": "captions.example:443", "Origin": "https://captions.example:443"}
    assert ask("POST", "/", Gate(None), headers=program).status_code == 200
    for name in ("Host", "X-Forwarded-Host"):  # some proxies add the port that browsers leave out
        with_port = {**headers, name: "captions.example:443"}
        assert ask("POST", "/", Gate(None), headers=with_port).status_code == 200
        other_port = {**headers, "Host": "inner", name: "captions.example:8443"}
        assert ask("POST", "/", Gate(None), headers=other_port).status_code == 403
    tunnel = Gate(None)
    tunnel.origins = {"abc.tunnel.example"}
    assert ask("POST", "/", tunnel, headers={"Origin": "https://abc.tunnel.example"}).status_code == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "127.0.0.2", "127.255.1.9"])
def test_a_server_of_this_computer_alone_answers_to_its_own_names(address: str):
    gate = Gate(None, own_names(address))
    host = f"[{address}]" if ":" in address else address
    for name in (host, "localhost"):
        assert (
            ask("POST", "/gradio_api/call/caption", gate, headers={"Host": f"{name}:7860"}, content=b"abc").text == "3"
        )
    foreign = {"Host": "example.org", "Origin": "http://example.org"}
    assert ask("POST", "/gradio_api/call/caption", gate, headers=foreign, content=b"abc").status_code == 403


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.0.7"])
def test_a_server_of_others_answers_to_any_name(address: str):
    assert own_names(address) is None


def test_nothing_is_fetched_for_a_caller():
    answer = ask("GET", "/gradio_api/file=https://example.org/a.jpg")
    assert (answer.status_code, answer.text) == (403, "This server fetches nothing from other hosts.")


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/gradio_api/call/caption", MAX_BODY),
        ("/gradio_api/upload", MAX_UPLOADED),
        ("/gradio_api/queue/join", MAX_BODY),
    ],
)
def test_a_body_is_read_up_to_its_limit(path: str, limit: int):
    sent = 0

    async def body(size: int) -> object:
        nonlocal sent
        for _ in range(size >> 16):
            sent += 1 << 16
            yield bytes(1 << 16)

    assert ask("POST", path, content=body(limit)).text == str(limit)
    sent = 0
    reply = ask("POST", path, content=body(limit + (9 << 16)))  # chunked: without a length
    assert reply.status_code == 413
    assert f"more than {limit >> 20} MB" in reply.text


# Captions


class SlowCaptioner:
    """Captions with how many photos it was given at once, when it is let."""

    description = SimpleNamespace(preprocessing=Preprocessing(32))

    def __init__(self):
        self.sizes: list[int] = []
        self.called, self.go = threading.Event(), threading.Event()

    def __call__(self, images: list, how: Decoding) -> list[Caption]:
        self.called.set()
        self.go.wait(120)
        self.sizes.append(len(images))
        if images[0].getpixel((0, 0)) == (0, 255, 0):
            raise RuntimeError("broken")
        return [Caption(f"caption {how.beam_size}", ["a"], 0.0)] * len(images)


@pytest.fixture
def slow() -> SlowCaptioner:
    return SlowCaptioner()


@pytest.fixture
def server(slow: SlowCaptioner, monkeypatch: pytest.MonkeyPatch) -> Iterator[CaptionServer]:
    monkeypatch.setattr(web, "Reader", FakeReader)
    server = CaptionServer({"slow": slow, "other": slow})
    yield server
    slow.go.set()
    server.close()


class FakeReader:
    """Reads in this process."""

    def __call__(self, function: object, arguments: tuple, seconds: float) -> object:
        return function(*arguments)

    def close(self) -> None:
        pass


BEAM = [Decoding(beam_size=size) for size in range(5)]


def test_requests_that_wait_together_are_captioned_together(
    server: CaptionServer, slow: SlowCaptioner, image_path: Path
):
    upload = Upload(image_path, "photo.png")
    with ThreadPoolExecutor(9) as pool:
        pool.submit(server.caption, upload, "slow", BEAM[3])
        slow.called.wait()
        models = ["slow", "slow", "other", "other"]
        rest = [pool.submit(server.caption, upload, models[i % 4], BEAM[2 + i % 2]) for i in range(8)]
        while server.waiting.qsize() < 8:
            time.sleep(0.01)
        slow.go.set()
        assert [answer.result()[0].text for answer in rest] == ["caption 2", "caption 3"] * 4
    assert slow.sizes == [1, 2, 2, 2, 2]


def test_a_failure_belongs_to_its_requests_alone(
    server: CaptionServer, slow: SlowCaptioner, image_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture
):
    slow.go.set()
    Image.new("RGB", (40, 40), (0, 255, 0)).save(tmp_path / "bad.png")
    with pytest.raises(InputError, match="The model failed on this photo"):
        server.caption(Upload(tmp_path / "bad.png", "bad.png"), "slow", BEAM[3])
    assert "RuntimeError: broken" in capfd.readouterr().err
    assert server.caption(Upload(image_path, "good.png"), "slow", BEAM[3])[0].text == "caption 3"


@pytest.mark.slow
def test_closing_ends_requests_that_wait_for_a_caption(server: CaptionServer, slow: SlowCaptioner, image_path: Path):
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(server.caption, Upload(image_path, "a.png"), "slow", BEAM[1]) for _ in range(3)]
        slow.called.wait()
        start = time.monotonic()
        server.close()
        for answer in waiting:
            with pytest.raises(InputError, match="being stopped"):
                answer.result()
    assert time.monotonic() - start < 60  # which is half of what they would wait for


def test_several_images_and_zip_files_are_captioned_in_order(
    server: CaptionServer, slow: SlowCaptioner, image_path: Path, tmp_path: Path
):
    slow.go.set()
    (tmp_path / "broken.jpg").write_text("no photo")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(image_path, "sub/b.png")
        archive.writestr("notes.txt", "")
        archive.write(image_path, "sub/c.png")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "more.zip").read_bytes()[:100])
    folder = tmp_path / "uploads"
    folder.mkdir()
    uploads = [
        Upload(image_path, "a.png"),
        Upload(tmp_path / "broken.jpg", "broken.jpg"),
        Upload(tmp_path / "cut.zip", "cut.zip"),
        Upload(tmp_path / "more.zip", "More.ZIP"),
    ]
    sizes = []
    for progress in server.caption_all(uploads, "slow", BEAM[3], folder):
        sizes.append(len(progress.rows))
    assert sizes == [1, 2, 3, 4, 5]
    assert progress.total == 5
    assert progress.left_out == 1
    assert [name for name, _ in progress.rows] == ["a.png", "broken.jpg", "cut.zip", "sub/b.png", "sub/c.png"]
    texts = [getattr(caption, "text", None) for _, caption in progress.rows]
    assert texts == ["caption 3", None, None, "caption 3", "caption 3"]
    assert str(progress.rows[1][1]).startswith("broken.jpg cannot be read")
    assert list(folder.iterdir()) == []


def test_none_and_too_many_images_are_sentences(server: CaptionServer, image_path: Path, tmp_path: Path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("notes.txt", "")
    for uploads in ([], [Upload(tmp_path / "none.zip", "none.zip")]):
        with pytest.raises(InputError, match="None of these files is a photo"):
            next(server.caption_all(uploads, "slow", BEAM[3], tmp_path))
    for name in ("a.zip", "b.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(image_path, "a.png")
    monkeypatch.setattr(web, "MAX_UNPACKED", image_path.stat().st_size + 10)
    with pytest.raises(InputError, match=r"photos in b\.zip are more than 0 MB"):
        next(server.caption_all([Upload(tmp_path / n, n) for n in ("a.zip", "b.zip")], "slow", BEAM[3], tmp_path))
    monkeypatch.setattr(web, "MAX_IMAGES", 2)
    with pytest.raises(InputError, match="These are 3 photos; send at most 2 at once"):
        next(server.caption_all([Upload(image_path, "a.png")] * 3, "slow", BEAM[3], tmp_path))


def test_a_visitor_who_leaves_ends_the_captioning(
    server: CaptionServer, slow: SlowCaptioner, image_path: Path, tmp_path: Path
):
    slow.go.set()
    rows = server.caption_all([Upload(image_path, "a.png")] * 100, "slow", BEAM[3], tmp_path)
    next(rows)
    rows.close()
    assert sum(slow.sizes) < 100
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_follows_a_refused_request_is_ignored():
    class Transport(asyncio.Transport):
        written, closing = b"", False

        def write(self, data: bytes) -> None:
            self.written += data

        def close(self) -> None:
            self.closing = True

        def is_closing(self) -> bool:
            return self.closing

    async def refuse() -> bytes:
        config = uvicorn.Config(lambda: None, log_config=None)
        config.load()
        protocol, transport = HttpProtocol(config, ServerState(), {}), Transport()
        protocol.connection_made(transport)
        for _ in range(2):
            protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n")
        return transport.written

    assert asyncio.run(refuse()).count(b"400 Bad Request") == 1


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/process_recording", "/gradio_api/component_server", "/gradio_api/component_server/"),
        *("/gradio_api/file/https://example.org/big.iso", "/gradio_api/proxy=http://10.0.0.1/", "/proxy=http://a/"),
        *("/gradio_api/custom_component/%1b%5d0;x%07/client/a/b", "/gradio_api/deep_link?session_hash=a"),
        *("/monitoring", "/gradio_api/stream/a", "/x/gradio_api/upload", "/elsewhere"),
        f"/gradio_api/upload_progress?upload_id={'a' * 2000}",
    ],
)
def test_routes_of_gradio_that_the_page_does_not_need_are_closed(path: str):
    answer = ask("POST", path, content=b"abc")
    assert (answer.status_code, answer.text) == (404, "This server does not offer that.")


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/config", "/theme.css", "/assets/index.js", "/gradio_api/info", "/gradio_api/heartbeat/abc"),
        *("/gradio_api/queue/data?session_hash=abc", "/gradio_api/upload_progress?upload_id=abc"),
        *("/gradio_api/call/caption/abc", "/gradio_api/file=/tmp/a.jpg"),
    ],
)
def test_routes_of_the_page_and_of_programs_are_open(path: str):
    assert ask("GET", path).status_code == 200
