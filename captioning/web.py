"""The server behind the web page: it filters requests and captions their images."""

from __future__ import annotations

import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from queue import SimpleQueue
from traceback import print_exception
from types import FrameType
from urllib.parse import urlsplit

import httpx
import uvicorn
from PIL import Image
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from captioning.captioner import Caption, Captioner, Decoding
from captioning.errors import InputError
from captioning.features import BATCH
from captioning.reader import Reader, prepare_image, unpack_images

MAX_UPLOADED = 100 << 20  # size limit of an upload, in bytes
MAX_BODY = 1 << 20  # size limit of any other request, in bytes
MAX_IMAGES = 200  # photos in a request
MAX_UNPACKED = 400 << 20  # size limit of the photos in the zip files of a request, in bytes
IMAGE_SECONDS = 10  # time limit for reading a photo, in seconds
ZIP_SECONDS = 30  # time limit for unpacking a zip file, in seconds
STOP_SECONDS = 2  # time limit for the last batch when the server stops, in seconds
VIEW_SIZE = 224  # side of the model's view of a photo, which is drawn under attention maps, in pixels
UPLOAD_ROUTE = "/gradio_api/upload"
OFFERED = re.compile(  # the routes of Gradio that its page and its client use; others fetch, keep or print things
    r"/(?:(?:assets|static|svelte)/.+|config/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json)?"
    r"|/gradio_api/(?:(?:info|app_id|login_check|reset|cancel|startup-events)/?|heartbeat/[^/]+|queue/(?:join|data|status)"
    r"|upload|upload_progress|(?:call|run|api)/.+|file=.+)"
)
MAX_QUERY = 1000  # length limit of an address's query, in bytes
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
RANGE = re.compile(r"bytes=(\d{1,15}-\d{0,15}|-\d{1,15})")
ADDRESSES = {b"x-forwarded-host": "http://", b"x-gradio-server": ""}  # headers, and what Gradio puts before them
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


# Requests


def own_names(address: str) -> set[str] | None:
    """Return the host names of a server that listens on `address`, if only this computer can reach it; else None."""
    return {*LOOPBACK, address} if ip_address(address).is_loopback else None


class Gate:
    """Refuses requests that the page never sends, before Gradio reads them.

    It refuses requests from another website's script in a visitor's browser, requests for another host name if only
    this computer is served, requests to fetch an address for the caller, routes that are not in `OFFERED`, and queries
    and bodies that are too large.

    `hosts` are the host names that the server answers to, None for any. `origins` are further hosts whose pages may
    call it, such as that of a tunnel. `answer` answers requests itself, or returns None to have Gradio answer them.
    """

    def __init__(
        self, app: ASGIApp, hosts: set[str] | None = None, answer: Callable[[Scope], Response | None] = lambda _: None
    ):
        self.app, self.hosts, self.answer = app, hosts, answer
        self.origins: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it, with 403, 404 or 413 where it is refused."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = {**scope, "headers": [header for header in scope["headers"] if _is_valid(*header)]}
        if sentence := self._refusal(scope["path"], Headers(scope=scope)):
            app: ASGIApp = PlainTextResponse(sentence, 403)
        elif not OFFERED.fullmatch(scope["path"]) or len(scope["query_string"]) > MAX_QUERY:
            app = PlainTextResponse("This server does not offer that.", 404)
        else:
            app = self.answer(scope) or self.app
        await app(scope, _counted(receive, scope["path"] == UPLOAD_ROUTE), send)

    def _refusal(self, path: str, headers: Headers) -> str | None:
        if "/file=http" in path:
            return "This server fetches nothing from other hosts."
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name, site = urlsplit(f"//{host}").hostname, urlsplit(origin or "")
        except ValueError:
            return "This request's Host or Origin is not a valid address."
        if self.hosts is not None and name not in self.hosts:
            return f"This server answers to {', '.join(sorted(self.hosts))} only; start it with --host to serve others."
        forwarded = {each.strip() for each in headers.get("x-forwarded-host", "").split(",")} - {""}  # of each proxy
        port = DEFAULT_PORTS.get(site.scheme, "")  # which browsers leave out, and some proxies add
        own = {each.removesuffix(port) for each in (host, *forwarded, *self.origins)}
        if origin is not None and site.netloc.removesuffix(port) not in own:
            return (
                "This server answers to its own pages and to programs, not to other websites. A proxy before it has to "
                "pass the Host header on."
            )
        return None


def _is_valid(name: bytes, value: bytes) -> bool:
    """Return whether Gradio can use a header; other ranges and invalid addresses make it fail."""
    text = value.decode("latin-1")
    if name in ADDRESSES:
        try:
            httpx.URL(ADDRESSES[name] + text.split(",")[0].strip())
        except httpx.InvalidURL:
            return False
    return name != b"range" or RANGE.fullmatch(text) is not None


class UploadError(HTTPException, MultiPartException):
    """An upload that is too large or cut off; Gradio deletes what there is of it when it gets this error."""

    def __init__(self, status: int, message: str):
        HTTPException.__init__(self, status, message)
        self.message = message


def _counted(receive: Receive, is_upload: bool) -> Receive:
    """Limit the size of a request's body."""
    limit, total, is_complete = MAX_UPLOADED if is_upload else MAX_BODY, 0, False

    async def receive_counted() -> Message:
        nonlocal total, is_complete
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            sentence = f"This request has more than {limit >> 20} MB, which is the maximum allowed size."
            raise (UploadError if is_upload else HTTPException)(413, sentence)
        if is_upload and not is_complete and message["type"] == "http.disconnect":
            raise UploadError(400, "This upload was cut off.")
        is_complete = is_complete or not message.get("more_body", False)
        return message

    return receive_counted


class HttpProtocol(H11Protocol):
    """Uvicorn's protocol, but without tracebacks for data after a rejected request, and for one cut off by a stop."""

    def data_received(self, data: bytes) -> None:
        """Pass data from a client on, unless the connection is closing."""
        if not self.transport.is_closing():
            super().data_received(data)

    def shutdown(self) -> None:
        """Stop serving this connection; a request that is still arriving is cut off."""
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete:
            self.transport.close()


class StoppableServer(uvicorn.Server):
    """Uvicorn's server with callbacks that run before it waits for pending requests to end."""

    def __init__(self, config: uvicorn.Config, *on_stop: Callable[[], None]):
        super().__init__(config)
        self.on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal and ignore further ones, which would end the shutdown with a traceback."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Call the callbacks, then shut down."""
        for function in self.on_stop:
            function()
        await super().shutdown(sockets)


# Captions


@dataclass
class Upload:
    """An uploaded file: its path and its original name."""

    path: Path
    name: str


@dataclass
class CaptioningProgress:
    """The progress of captioning several images."""

    total: int
    left_out: int  # number of files in zip files that are not photos
    rows: list[tuple[str, Caption | InputError]]  # each photo's name, and its caption or error


def _require_at_most(images: int) -> None:
    """Raise `InputError` for more than `MAX_IMAGES`."""
    if images > MAX_IMAGES:
        raise InputError(f"These are {images:,} photos; send at most {MAX_IMAGES} at once.")


class CaptionServer:
    """Captions the images of requests; those that arrive together form a batch.

    A request's image is read in another process while the request waits in its own thread; one thread captions.
    (With Gradio's `batch=True`, one file that is refused would fail the whole batch.)
    """

    def __init__(self, captioners: dict[str, Captioner]):
        self.captioners = captioners
        self.reader = Reader()
        self.closed = False
        self.waiting: SimpleQueue[_Job | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def caption(self, image: Upload, model: str, decode: Decoding) -> tuple[Caption, Image.Image]:
        """Caption an image; returns the caption and the model's view, a square of `VIEW_SIZE` pixels.

        Raises `InputError` for a file that is not a photo or takes more than `IMAGE_SECONDS` to read.
        """
        preprocessing = self.captioners[model].description.preprocessing
        small, view = self.reader(prepare_image, (image.path, image.name, preprocessing, VIEW_SIZE), IMAGE_SECONDS)
        answer: Future[Caption] = Future()
        self.waiting.put(_Job(small, model, decode, answer))
        while not self.closed:
            with suppress(TimeoutError):
                return answer.result(timeout=1), view
        raise InputError("The server is being stopped; try again later.")

    def caption_all(
        self, uploads: list[Upload], model: str, decode: Decoding, folder: Path
    ) -> Iterator[CaptioningProgress]:
        """Caption images, also those in zip files, in order; one that cannot be read gets its error instead.

        Yields the progress after each image. Zip files are unpacked into a temporary folder in `folder`. Raises
        `InputError` for no photos or too many.
        """
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:
            images, left_out = self._unpack(uploads, Path(unpacked))
            if not images:
                raise InputError("None of these files is a photo; send photos or a zip file of photos.")
            progress = CaptioningProgress(len(images), left_out, [])
            pool = ThreadPoolExecutor(8)  # some wait for captions while others are read
            try:
                for row in pool.map(lambda image: self._caption_one(image, model, decode), images):
                    progress.rows.append(row)
                    yield progress
            finally:
                pool.shutdown(cancel_futures=True)

    def _unpack(self, uploads: list[Upload], folder: Path) -> tuple[list[Upload | tuple[str, InputError]], int]:
        images: list[Upload | tuple[str, InputError]] = []
        others, free_bytes = 0, MAX_UNPACKED
        _require_at_most(len(uploads))
        for i, upload in enumerate(uploads):
            if not upload.name.lower().endswith(".zip"):
                images.append(upload)
                continue
            inside = folder / str(i)
            inside.mkdir()
            limits = (MAX_IMAGES, free_bytes)
            members, left_out = self.reader(unpack_images, (upload.path, inside, *limits), ZIP_SECONDS)
            others += left_out
            free_bytes -= sum(at.stat().st_size for _, at in members if isinstance(at, Path))
            images += [(name, at) if isinstance(at, InputError) else Upload(at, name) for name, at in members]
            _require_at_most(len(images))
        return images, others

    def _caption_one(
        self, image: Upload | tuple[str, InputError], model: str, decode: Decoding
    ) -> tuple[str, Caption | InputError]:
        if isinstance(image, tuple):
            return image
        try:
            return image.name, self.caption(image, model, decode)[0]
        except InputError as error:
            return image.name, error

    def _work(self) -> None:
        while True:
            jobs = [self.waiting.get()]
            while len(jobs) < BATCH and not self.waiting.empty():
                jobs.append(self.waiting.get())
            groups: dict[str, list[_Job]] = {}
            for job in jobs:
                if job is None:
                    return
                groups.setdefault(f"{job.model} {job.decode}", []).append(job)
            for group in groups.values():
                self._caption_group(group)

    def _caption_group(self, jobs: list[_Job]) -> None:
        captioner, decode = self.captioners[jobs[0].model], jobs[0].decode
        try:
            for job, caption in zip(jobs, captioner([job.image for job in jobs], decode), strict=True):
                job.answer.set_result(caption)
        except Exception as error:  # it fails these requests only
            print_exception(error)
            for job in jobs:
                job.answer.set_exception(InputError("The model failed on this photo; the server's log says why."))

    def close(self) -> None:
        """End the reading processes, and wait up to `STOP_SECONDS` for the current batch."""
        self.closed = True
        self.reader.close()
        self.waiting.put(None)
        self.thread.join(STOP_SECONDS)


@dataclass
class _Job:
    image: Image.Image
    model: str
    decode: Decoding
    answer: Future[Caption]
