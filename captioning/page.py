"""The Gradio components of the web page: inputs that accept uploads only, and their event handlers."""

from __future__ import annotations

import asyncio
import csv
import errno
import json
import math
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import gradio as gr
import gradio.component_meta
import gradio.route_utils
import gradio.routes
from fastapi.exceptions import RequestValidationError
from gradio.components import Component
from gradio.data_classes import FileData
from gradio.route_utils import FnIndexInferError, GradioMultiPartParser
from gradio.utils import LRUCache, sanitize_value_for_csv
from gradio_client import handle_file
from PIL import Image
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Scope

from captioning.bulk import as_json
from captioning.captioner import DEFAULT_DECODING, Caption, Decoding, other_captions
from captioning.errors import InputError
from captioning.figures import overlay_attention
from captioning.web import UPLOAD_ROUTE, CaptionServer, Upload

PER_WORD = "% per word"  # heading of the column of probabilities
FILE_ROUTE = "/gradio_api/file="  # followed by its path, this is the address of an uploaded file
QUEUE_ROUTE = "/gradio_api/queue/data"  # the answers to a session's requests
CALL = re.compile(r"/gradio_api/(?:call/v2|call)/([^/]+)/?([^/]*)/?")  # an API's name and the id of a call
VALUES_ROUTES = ("/gradio_api/queue/join", "/gradio_api/call/", "/gradio_api/run/", "/gradio_api/api/")
# What Gradio and FastAPI raise for values and forms that no page sends.
INVALID = (
    *(KeyError, TypeError, AttributeError, UnicodeError),
    *(FnIndexInferError, FormParserError, RequestValidationError),
)
MAX_NAME = 255  # length limit of the names of files and sessions, in characters
MAX_SESSIONS = 64  # sessions whose values Gradio keeps; the page needs none of them
MAX_TRACKED = 1000  # uploads whose progress Gradio keeps
FULL = "The server's disk is full; try again later."

gradio.component_meta.create_or_modify_pyi = lambda *_: None  # it would write a page.pyi next to this file


# Inputs


def locate(component: Component, file: FileData) -> Upload:
    """Return an upload's path and original name; refuses any path outside the upload folder, and folders."""
    path = Path(file.path or "").resolve()
    if not path.is_relative_to(Path(component.GRADIO_CACHE).resolve()) or os.path.isdir(path):
        raise gr.Error("Upload the photo first.")
    name = Path(file.orig_name or path.name).name[-MAX_NAME:]
    return Upload(path, name.encode(errors="replace").decode())  # JSON may hold halves of characters


def to_path(component: Component, url_or_path: str | Path | None) -> str | Path | None:
    """Convert the address of an upload on this server to its path; other addresses are refused, not fetched."""
    if not str(url_or_path).startswith(("http://", "https://")):
        return url_or_path
    _, is_here, path = str(url_or_path).partition(FILE_ROUTE)
    if not is_here:
        raise gr.Error("Upload the photo itself, not its address.")
    return locate(component, FileData(path=path if os.path.exists(path) else unquote(path))).path


class ImageInput(gr.Image):
    """Gradio's image input, without decoding."""

    is_template = True  # Gradio shows it as its base class
    sample: str | Path = ""  # address of a photo for the code samples of "Use via API"

    def preprocess(self, payload: FileData | None) -> Upload | None:
        """Return the uploaded file."""
        return None if payload is None else locate(self, payload)

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Copy a file to the component's cache as Gradio does, but only if it is an upload."""
        return await super().async_move_resource_to_block_cache(to_path(self, url_or_file_path))

    def example_payload(self) -> dict[str, Any]:
        """Return the photo that the code samples of "Use via API" send."""
        return handle_file(self.sample)


class Files(gr.File):
    """Gradio's input of several files, without reading them."""

    is_template = True

    def preprocess(self, payload: Any) -> list[Upload]:
        """Return the uploaded files."""
        return [locate(self, file) for file in (payload.root if payload else [])]

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Copy a file to the component's cache as Gradio does, but only if it is an upload."""
        return await super().async_move_resource_to_block_cache(to_path(self, url_or_file_path))


class Page(gr.Blocks):
    """Gradio's page; a request with invalid values, or on a full disk, is answered with one sentence."""

    def queue(self, *arguments: Any, **options: Any) -> Page:
        """Create the queue of requests, which refuses long names of sessions and forgets sessions that have ended."""
        super().queue(*arguments, **options)
        self.state_session_capacity = MAX_SESSIONS
        push, sessions = self._queue.push, self._queue.pending_event_ids_session

        async def push_bounded(body: Any, *arguments: Any, **options: Any) -> tuple:
            if len(body.session_hash or "") > MAX_NAME:
                return False, "This session's name is too long.", "error"
            for ended in sessions.keys() - self._queue.pending_messages_per_session.keys():
                del sessions[ended]
            return await push(body, *arguments, **options)

        self._queue.push = push_bounded
        return self

    async def process_api(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Handle an event: convert its values, call its function, save what that returns."""
        try:
            return await super().process_api(*arguments, **options)
        except Exception as error:
            if is_full(error):
                raise gr.Error(FULL, print_exception=False) from None
            raise

    async def preprocess_data(self, block_fn: Any, inputs: list, *arguments: Any, **options: Any) -> list:
        """Check and convert a request's values; missing ones are the page's initial values."""
        inputs = [*inputs, *(block.value for block in block_fn.inputs[len(inputs) :])]
        try:
            if len(inputs) > len(block_fn.inputs):
                names = ", ".join(str(block.label) for block in block_fn.inputs)
                raise gr.Error(f"Send at most {len(block_fn.inputs)} values ({names}), not {len(inputs)}.")
            for block, value in zip(block_fn.inputs, inputs, strict=False):
                if sentence := explain_unusable(block, value):
                    raise gr.Error(sentence)
            return await super().preprocess_data(block_fn, inputs, *arguments, **options)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:  # Gradio raises many types for values that no page sends
            if is_full(error):
                raise
            raise gr.Error(
                "Upload the photo first, and send what the upload returned.", print_exception=False
            ) from None


def is_full(error: Exception) -> bool:
    """Return whether an error, or the cause of Gradio's, is a full disk or that of a user who may not write more."""
    reason = error.__cause__ or error
    return isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT)


def explain_unusable(block: Component, value: object) -> str | None:
    """Explain in a sentence why a value is invalid for an input; None if it is valid."""
    if isinstance(block, gr.Slider):
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not block.minimum <= number <= block.maximum or (block.step == 1 and number != int(number)):
            kind = "a whole number" if block.step == 1 else "a number"
            return (
                f"{block.label} must be {kind} from {block.minimum} to {block.maximum}, not {json.dumps(value)[:40]}."
            )
    if isinstance(block, gr.Radio | gr.Dropdown):
        names = [name for _, name in block.choices]
        if value not in names:
            return f"{block.label} must be one of {', '.join(map(str, names))}, not {json.dumps(value)[:40]}."
    if isinstance(block, gr.Textbox) and not isinstance(value, str | None):  # Gradio would fetch it as a file
        return f"{block.label} must be text."
    if isinstance(block, ImageInput | Files) and value is not None:
        for file in value if isinstance(block, Files) and isinstance(value, list) else [value]:
            if not isinstance(file, dict) or not isinstance(file.get("path"), str):
                return 'The photo must be an uploaded file, {"path": what the upload returned}; upload the photo first.'
            locate(block, FileData(path=str(to_path(block, file["path"]))))  # Gradio checks it only for some requests
    return None


# Requests


class UploadParser(GradioMultiPartParser):
    """Gradio's parser of uploads, which also refuses a form without files, and deletes the files of one that fails."""

    async def parse(self) -> FormData:
        """Return the form; raises one of `INVALID` unless its field "files" holds files only."""
        try:
            form = await super().parse()
            files = form.getlist("files")
            for file in files:
                if isinstance(file, str):
                    raise TypeError("this field holds text")
                name = Path(file.filename or "").name
                file.filename = name.lstrip(".") or "photo"  # Gradio may refuse hidden files later
            if not files:
                raise TypeError("this form holds no files")
        except BaseException:
            for file in self._files_to_close_on_error:
                with suppress(OSError):  # of a full disk, or of a file that Gradio has deleted
                    file.close()
                Path(file.name).unlink(missing_ok=True)
            raise
        return form


class Signals(LRUCache):
    """The events that wait for the progress of an upload; Gradio creates one for every name that it is asked for."""

    def __missing__(self, name: str) -> asyncio.Event:
        """Create the event of an upload."""
        self[name] = event = asyncio.Event()
        return event


gradio.route_utils.GradioMultiPartParser = UploadParser
gradio.routes.file_upload_statuses._statuses = LRUCache(MAX_TRACKED)
gradio.routes.file_upload_statuses._signals = Signals(MAX_TRACKED)  # pyright: ignore[reportAttributeAccessIssue]


def answer_missing(page: gr.Blocks, scope: Scope) -> Response | None:
    """Answer a request for a page, an API, a call or a session that does not exist; returns None for any other request.

    Gradio ends some of these requests with a traceback, and never ends others.
    """
    queue, query = page._queue, parse_qs(scope["query_string"].decode("latin-1"))
    if scope["path"] == "/" and "page" in query:
        return PlainTextResponse("There is one page only.", 404)
    session = query.get("session_hash", [""])[0]
    if scope["path"] == QUEUE_ROUTE and session not in queue.pending_messages_per_session:
        return PlainTextResponse("There is no such session; load the page again.", 404)
    if (call := CALL.fullmatch(scope["path"])) is None:
        return None
    name, event = call.groups()
    if name not in {function.api_name for function in page.fns.values()}:
        return PlainTextResponse(f"There is no API {name}; the only one is caption (docs/web.md).", 404)
    sessions = [session for session, events in queue.pending_event_ids_session.items() if event in events]
    if event and not any(session in queue.pending_messages_per_session for session in sessions):
        return PlainTextResponse("There is no such call, or its result was fetched before; send the photo again.", 404)
    return None


def answer_invalid(request: Request, error: Exception) -> Response:
    """Answer a request whose values are not those of an API, for which one of `INVALID` is raised."""
    if request.url.path == UPLOAD_ROUTE:
        return PlainTextResponse("Send each photo as a file, as `curl -F files=@photo.jpg` does.", 422)
    if not isinstance(error, RequestValidationError) and not request.url.path.startswith(VALUES_ROUTES):
        raise error
    return PlainTextResponse("These values are not the ones of this API; see Use via API on the page.", 422)


def answer_full(_: Request, error: Exception) -> Response:
    """Answer a request, such as an upload, for which the disk is full."""
    if not is_full(error):
        raise error
    return PlainTextResponse(FULL, 507)


# Handlers


class Handlers:
    """The event handlers of the page and its API."""

    def __init__(self, server: CaptionServer, folder: Path):
        self.server, self.folder = server, folder

    def caption(
        self, photo: Upload | None, method: str, beam_size: float, temperature: float, model: str
    ) -> tuple[str, list[list[str | float]], list[tuple[Image.Image, str]], float]:
        """Caption a photo.

        photo: the uploaded file. method: "beam", "greedy" or "sampling". beam_size: hypotheses that the beam
        keeps. temperature: of the sampling; near 0 the best words win, above 1 unlikely ones appear. model: name of a
        model that the page serves.
        Returns the caption; its alternatives, each with its probability per word in percent; for every word an image
        of where the model looked (none if the model does not attend); and the caption's own probability per word.
        """
        if photo is None:
            raise gr.Error("Upload a photo first.", print_exception=False)
        try:
            caption, view = self.server.caption(photo, model, decoding_of(method, int(beam_size), temperature))
        except InputError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None
        alternatives = [[other.text, per_word(other)] for other in other_captions(caption)]
        return caption.text, alternatives, attention_maps(view, caption), per_word(caption)

    def show(self, photo: Upload | None, method: str, *options: Any) -> tuple:
        """Caption a photo for the page, which hides empty tables and galleries; see `caption`.

        An error is shown as a message: after one that is raised, Gradio forgets the photo that was chosen meanwhile.
        """
        hidden = gr.update(visible=False)
        empty = "", hidden, "", hidden, hidden, None
        if photo is None:
            return empty
        try:
            text, alternatives, maps, percent = self.caption(photo, method, *options)
        except gr.Error as error:
            gr.Warning(error.message, duration=None)
            return empty
        return (
            text,
            gr.update(visible=True),
            f"Probability per word: **{percent}%**",
            gr.update(
                value=as_table(["caption", PER_WORD], alternatives),
                visible=bool(alternatives),
                label="Other samples" if method == "sampling" else "Alternatives",  # samples are not ranked
            ),
            gr.update(visible=bool(maps)),
            maps,
        )

    def show_all(
        self, files: list[Upload], method: str, beam_size: float, temperature: float, model: str
    ) -> Iterator[tuple]:
        """Caption images, also those in zip files; yields the progress, a table and, at the end, two files of it."""
        decode = decoding_of(method, int(beam_size), temperature)
        decode.alternatives = 0
        table: list[list[object]] = []
        try:
            for progress in self.server.caption_all(files, model, decode, self.folder):
                name, caption = progress.rows[-1]
                failed = isinstance(caption, InputError)
                table.append([name, str(caption), None] if failed else [name, caption.text, per_word(caption)])
                counted = f"{len(table)} of {progress.total} photos"
                table_update = gr.update(value=as_table(["photo", "caption", PER_WORD], table), visible=True)
                yield counted, table_update, *[gr.update(visible=False)] * 2
        except InputError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None
        failures = sum(isinstance(caption, InputError) for _, caption in progress.rows)
        summary = f"Captioned {len(table) - failures} of {len(table)} photos."
        if progress.left_out:
            summary += f" Files in zip files that are not photos, and were left out: {progress.left_out}."
        tables = write_tables([as_json(name, caption) for name, caption in progress.rows], self.folder)
        yield summary, table_update, *[gr.update(value=str(file), visible=True) for file in tables]


def decoding_of(method: str, beam_size: int, temperature: float) -> Decoding:
    """Convert the page's controls to decoding options."""
    if method == "greedy" or (method == "beam" and beam_size == 1):
        return Decoding()
    if method == "sampling":
        return Decoding(temperature=temperature, alternatives=4)
    return replace(DEFAULT_DECODING, beam_size=beam_size, alternatives=min(beam_size, 5) - 1)


def per_word(caption: Caption) -> float:
    """Return the geometric mean of the probabilities of a caption's words, in percent, by which a beam ranks."""
    return round(100 * math.exp(caption.score), 1)


def as_table(headers: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    """Build the value of a `gr.Dataframe`, which shows numbers with one decimal."""
    cells = [[f"{cell:.1f}" if isinstance(cell, float) else cell or "" for cell in row] for row in rows]
    return {"headers": headers, "data": rows, "metadata": {"display_value": cells}}


def attention_maps(view: Image.Image, caption: Caption) -> list[tuple[Image.Image, str]]:
    """Draw the attention of every word over the model's view of the image; the list is empty without attention.

    Each call's maps hold a comment of their own. Without it, Gradio would write the maps of two requests with the same
    photo to the same files, overwriting the first request's while they are being downloaded.
    """
    if caption.attention is None:
        return []
    maps = [overlay_attention(view, weights) for weights in caption.attention]
    comment = secrets.token_bytes(16)
    for each in maps:
        each.info["comment"] = comment
    return list(zip(maps, caption.tokens, strict=True))


def write_tables(rows: list[dict[str, Any]], folder: Path) -> tuple[Path, Path]:
    """Write captions as CSV and as JSON Lines into a new folder in `folder`; returns the two files."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["photo", "caption", "log_probability", "error"])
        writer.writeheader()
        writer.writerows({key: sanitize_value_for_csv(value) for key, value in row.items()} for row in rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(lines, encoding="utf-8")
    return folder / "captions.csv", folder / "captions.jsonl"
