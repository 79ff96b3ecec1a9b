"""Downloads from a server that sends what it should not."""

import asyncio
import hashlib
import socket
import threading
import time
import tracemalloc

import pytest

import download
from captioning import fetching
from captioning.errors import InputError


@pytest.fixture
def answer(monkeypatch):
    """Starts a server that answers every request with these pieces of bytes, a pause before each; returns its URL."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(fetching, "TIMEOUT_SECONDS", 1.0)
    listeners = []

    def start(pieces, pause=0.0):
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        listeners.append(listener)

        def serve(connection):
            with connection:
                try:
                    while b"\r\n\r\n" not in connection.recv(1 << 16):
                        pass
                    for piece in pieces() if callable(pieces) else pieces:
                        time.sleep(pause)
                        connection.sendall(piece)
                except OSError:
                    pass

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/a.jpg"

    yield start
    for listener in listeners:
        listener.close()


def read(url, at_most=download.MAX_IMAGE_BYTES):
    async def request():
        async with fetching.connect() as client:
            return await fetching.read(client, url, at_most)

    return asyncio.run(request())


def fetch(url, path, size):
    async def request():
        async with fetching.connect() as client:
            tasks = fetching.ConcurrentTasks(size, "B", desc=path.name)
            await fetching.fetch(client, url, path, size, "0" * 64, tasks)

    asyncio.run(request())


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nLocation: "

ANSWERS = {
    "length in words": OK + b"Content-Length: many\r\n\r\n",
    "negative length": OK + b"Content-Length: -5\r\n\r\nabc",
    "length of 5000 digits": OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nabc",
    "two lengths": OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "too short": OK + b"Content-Length: 300\r\n\r\nabc",
    "negative chunk": CHUNKED + b"-5\r\nabc\r\n0\r\n\r\n",
    "chunk in words": CHUNKED + b"many\r\nabc\r\n0\r\n\r\n",
    "endless chunk size": CHUNKED + b"f" * 5000 + b"\r\nabc",
    "unfinished chunks": CHUNKED + b"3\r\nabc\r\n",
    "no answer": b"",
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "header without a colon": OK + b"Content-Length\r\n\r\n",
    "zero byte in a header": OK + b"X: \0\r\n\r\n",
    "header of 200 kB": OK + b"X: " + b"x" * 200_000 + b"\r\n\r\n",
    "redirect without an address": b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
    "redirect to nothing": MOVED + b"\r\n\r\n",
    "redirect to a broken port": MOVED + b"http://127.0.0.1:many/\r\n\r\n",
    "redirect to a large port": MOVED + b"http://127.0.0.1:99999999/\r\n\r\n",
    "redirect to a broken address": MOVED + b"http://[::1/\r\n\r\n",
    "redirect to a long name": MOVED + b"http://" + b"a" * 300 + b"/\r\n\r\n",
    "redirect to an odd name": MOVED + b"http://a..b/\r\n\r\n",
    "redirect to itself": MOVED + b"/a.jpg\r\nContent-Length: 0\r\n\r\n",
    "redirect to ftp": MOVED + b"ftp://127.0.0.1/a.jpg\r\n\r\n",
    "redirect to a file": MOVED + b"file:///etc/passwd\r\n\r\n",
    "redirect to data": MOVED + b"data:,hello\r\n\r\n",
    "redirect in Latin-1": MOVED + b"http://\xe9\xff/\r\n\r\n",
    "status 204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "status 500": b"HTTP/1.1 500 \x1b[31m\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_none_is_one_sentence(name, answer, tmp_path):
    url = answer([ANSWERS[name]])
    with pytest.raises((InputError, fetching.NetworkError)) as error:
        read(url)
    assert str(error.value).isprintable()
    with pytest.raises(InputError, match=r"http://127.0.0.1:\d+/a.jpg .*\.$") as error:
        fetch(url, tmp_path / "a.jpg", 3_000)
    assert str(error.value).isprintable()
    assert not (tmp_path / "a.jpg").exists()


@pytest.mark.parametrize("name", ["redirect to ftp", "redirect to a file"])
def test_only_http_is_redirected_to(name, answer):
    with pytest.raises(fetching.NetworkError, match="an address that is not http or https"):
        read(answer([ANSWERS[name]]))


def endless(head):
    def pieces():
        yield head
        while True:
            yield b"10000\r\n" + b"x" * 0x10000 + b"\r\n"

    return pieces


@pytest.mark.parametrize("head", [CHUNKED, OK + b"\r\n", OK + b"Content-Length: 2500000000\r\n\r\n"])
def test_a_body_is_not_read_beyond_what_is_due(head, answer, tmp_path):
    url = answer(endless(head))
    tracemalloc.start()
    with pytest.raises(fetching.NetworkError, match="the server sends more than 1,000,000 bytes"):
        read(url, 1_000_000)
    with pytest.raises(InputError, match=r"sends more than 300,000 bytes|is not the published file"):
        fetch(url, tmp_path / "a.zip", 300_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 300_000


def test_the_body_of_a_redirect_is_not_read(answer):
    target = answer([OK + b"Content-Length: 3\r\n\r\nabc"])
    url = answer(endless(MOVED + target.encode() + b"\r\nTransfer-Encoding: chunked\r\n\r\n"))
    assert read(url) == b"abc"


@pytest.mark.slow
@pytest.mark.parametrize(
    "pieces",
    [
        [OK + b"Content-Length: 9000\r\n\r\n", *[b"x"] * 9000],
        [bytes([byte]) for byte in OK + b"X: y\r\n" * 9000],
        [CHUNKED, *[b"1\r\nx\r\n"] * 9000],
    ],
    ids=["body", "headers", "chunks"],
)
def test_a_server_that_sends_byte_by_byte_is_given_up(pieces, answer, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(fetching, "ATTEMPTS", 2)
    url = answer(pieces, pause=0.02)
    start = time.monotonic()
    with pytest.raises(InputError, match="the server is too slow; run the same command again"):
        read(url)
    with pytest.raises(InputError, match="the server is too slow; run the same command again"):
        fetch(url, tmp_path / "a.zip", 9000)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("page", [CHUNKED + b"5\r\n<html\r\n0\r\n\r\n", OK + b"\r\n<html>"])
def test_a_page_in_place_of_the_file_leaves_nothing_of_it(answer, tmp_path, page):
    with pytest.raises(InputError, match="the server sent something other than the file"):
        fetch(answer([page]), tmp_path / "a.zip", 9000)
    assert (tmp_path / "a.zip.part").stat().st_size == 0
    (tmp_path / "a.zip.part").write_bytes(b"x" * 10)
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 10-19/20\r\n\r\n"
    with pytest.raises(InputError, match="the server sent something other than the file"):
        fetch(answer([head + b"y" * 5]), tmp_path / "a.zip", 20)
    assert (tmp_path / "a.zip.part").read_bytes() == b"x" * 10


def test_a_server_that_breaks_off_at_the_same_byte_is_not_asked_for_ever(answer, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "CHUNK_BYTES", 1000)
    with pytest.raises(InputError, match="run the same command again to resume"):
        fetch(answer([OK + b"Content-Length: 9000\r\n\r\n" + b"x" * 5000]), tmp_path / "a.zip", 9000)


def test_a_part_longer_than_the_file_is_replaced(answer, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(b"y" * 30)
    with pytest.raises(InputError, match=f"has the SHA-256 {hashlib.sha256(b'x' * 20).hexdigest()} instead of 0000"):
        fetch(answer([OK + b"Content-Length: 20\r\n\r\n" + b"x" * 20]), tmp_path / "a.zip", 20)


def test_another_part_than_was_asked_for_is_refused(answer, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(b"x" * 10)
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 5-19/20\r\nContent-Length: 10\r\n\r\n"
    with pytest.raises(InputError, match="a different part of the file than requested"):
        fetch(answer([head + b"x" * 10]), tmp_path / "a.zip", 20)


def test_without_a_network_it_says_so(monkeypatch):
    def fail(*_args, **_keywords):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(InputError, match="cannot be downloaded: no network, or no server of this name;"):
        read("http://images.cocodataset.org/a.jpg")


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:1080", "http://[::1"])
def test_a_proxy_that_cannot_be_used_is_a_sentence(proxy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("all_proxy", proxy)
    with pytest.raises(InputError, match=r"^the proxy settings \(HTTPS_PROXY.*\) cannot be used \(.*\); name a"):
        fetching.connect()
