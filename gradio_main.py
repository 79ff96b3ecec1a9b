"""Serve the web page, which captions one photo, or many into a table.

    python gradio_main.py --model models/scenes --port 7860

It also serves an API, `/caption`.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from secrets import token_urlsafe
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, which take seconds, without a traceback

import gradio as gr
import tyro
import uvicorn
from fastapi import FastAPI
from gradio import routes
from gradio.networking import setup_tunnel
from gradio.processing_utils import save_file_to_cache
from gradio.themes import Soft
from gradio.utils import get_upload_folder
from PIL import Image
from PIL.ExifTags import Base

from captioning.backbones import TITLES
from captioning.captioner import Captioner
from captioning.checkpoint import SAMPLE, Description, default_model
from captioning.errors import InputError, describe_network_error, run_command, warn_once
from captioning.files import require_local
from captioning.image_files import open_image
from captioning.interruption import ending_signals
from captioning.listing import find_images
from captioning.page import (
    FILE_ROUTE,
    INVALID,
    PER_WORD,
    Files,
    Handlers,
    ImageInput,
    Page,
    answer_full,
    answer_invalid,
    answer_missing,
)
from captioning.scenes.dataset import draw_scene
from captioning.web import (
    MAX_IMAGES,
    MAX_UPLOADED,
    STOP_SECONDS,
    CaptionServer,
    Gate,
    HttpProtocol,
    StoppableServer,
    Upload,
    own_names,
)

UPLOAD_LIFETIME = (600, 3600)  # interval between deletions of uploads, and minimum age of those deleted, in seconds
MAX_WAITING = 128  # queued requests; further ones are refused
HANDLED_AT_ONCE = 32  # requests that are handled concurrently; most of them wait for their batch
IMAGES = Path(__file__).with_name("images")
SOURCES: list[Literal["upload", "webcam", "clipboard"]] = ["upload", "webcam", "clipboard"]
METHODS = [("Beam search", "beam"), ("Greedy", "greedy"), ("Sampling", "sampling")]
DECODER_NAMES = {"lstm": "an LSTM", "attention": "an LSTM with attention", "transformer": "a transformer"}
OTHER_MODELS = """`python gradio_main.py --model FOLDER` serves another model.
Give `--model` several times to choose among models on this page. `make demo` trains `models/scenes`."""
Option = gr.Radio | gr.Slider | gr.Dropdown
CSS = """
#caption textarea {font-size: 1.6rem; line-height: 1.3; font-weight: 600}
@supports (field-sizing: content) {#caption textarea {field-sizing: content; height: auto !important}}
#caption textarea::placeholder {font-size: 1rem; font-weight: 400}
#maps .grid-container {grid-template-columns: repeat(auto-fill, minmax(96px, 1fr))}
#examples .grid-container {grid-template-columns: repeat(auto-fill, minmax(70px, 1fr))}
#examples .caption-label {display: none}
#maps .caption-label {padding: 1px 4px; font-size: 0.75rem; max-width: 96%; right: 2%; bottom: 2%}
"""
# CSS does not reach the footer: on a phone, Gradio hides its first link, but not the dot after it.
HEAD = "<style>@media (max-width: 639px) {footer .divider {display: none !important}}</style>"


# Layout


def example_images(captioners: dict[str, Captioner], folder: Path) -> list[tuple[Path, str]]:
    """List example images of the kinds that the models were trained on, with their descriptions.

    They are the images in a model's folder `examples/`, if there is one; else the photos in images/ or, for a model of
    the sample data set, held-out scenes, which are drawn into `folder`.
    """
    examples: dict[Path, str] = {}
    for captioner in captioners.values():
        images = _own_examples(captioner)
        if not images and captioner.description.data.get("folder") != SAMPLE:
            images = sorted(IMAGES.glob("*.jpg"))
        elif not images:
            images = [folder / f"scene-{i}.jpg" for i in range(1, 7)]
            for path in images:
                image, _, (text, *_) = draw_scene(random.Random(f"page/{path.stem}"))
                exif = Image.Exif()
                exif[Base.ImageDescription] = text
                image.convert("RGB").save(path, quality=90, exif=exif)
        for path in images:
            try:
                str(path).encode()  # Gradio needs names that are text
                with open_image(path) as image:
                    examples[path] = str(image.getexif().get(Base.ImageDescription, path.stem))
            except Exception:  # a broken file makes Pillow raise nearly anything
                warn_once(f"{path} is not shown as an example: its name or its content cannot be read.")
    return list(examples.items())


def _own_examples(captioner: Captioner) -> list[Path]:
    """List the images in a model's folder `examples/`, if there are any."""
    if captioner.folder is None or not (captioner.folder / "examples").is_dir():
        return []
    try:
        return [path for path in find_images([captioner.folder / "examples"]) if isinstance(path, Path)]
    except InputError as error:
        warn_once(f"other examples are shown: {error}")
        return []


def describe_model(name: str, description: Description) -> str:
    """Describe a model and its training data, as Markdown."""
    architecture, data = description.architecture, description.data
    backbone = TITLES.get(architecture.backbone, architecture.backbone)
    decoder = DECODER_NAMES.get(architecture.decoder, architecture.decoder)
    text = f"**Model `{name}`**: {backbone} and {decoder}, {len(description.vocabulary):,} words"
    images, captions = data.get("train_photos"), data.get("train_captions")
    if isinstance(images, int) and isinstance(captions, int):
        text += f", trained on {captions:,} captions of {images:,} photos (data set `{data.get('folder')}`)"
    return f"{text}."


def build_page(
    server: CaptionServer, examples: list[tuple[Path, str]], folder: Path, flag_folder: Path | None = None
) -> tuple[Page, ImageInput]:
    """Build the page; returns it and its image input."""
    handlers = Handlers(server, folder)
    uploaded = [(save_file_to_cache(path, get_upload_folder()), text) for path, text in examples]
    names = list(server.captioners)
    with Page(title="Photo captions", analytics_enabled=False, delete_cache=UPLOAD_LIFETIME) as page:
        gr.Markdown("# Photo captions\nThe model says in a sentence what it sees in a photo.")
        model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
        options = [*_lay_out_options(), model]
        with gr.Tab("One photo"):
            image = _lay_out_image(handlers, options, uploaded, flag_folder)
        with gr.Tab("Several photos"):
            _lay_out_images(handlers, options)
        with gr.Accordion("How words are chosen", open=False):
            for option in options[:-1]:
                option.render()
        about = "\n\n".join(describe_model(name, server.captioners[name].description) for name in names)
        gr.Markdown(f"{about}\n\n{OTHER_MODELS}")
    if uploaded:
        image.sample, _ = uploaded[0]
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page, image


def _lay_out_options() -> list[Option]:
    """Create the inputs for method, beam size and temperature, to be placed later."""
    method = gr.Radio(METHODS, value="beam", label="Method", render=False)
    beam_size = gr.Slider(1, 10, 3, step=1, label="Beam size", info="Partial captions kept at each word.", render=False)
    temperature = gr.Slider(
        0.1, 2, 0.7, step=0.1, label="Temperature", info="Higher is more surprising.", visible=False, render=False
    )
    method.change(
        lambda chosen: (gr.update(visible=chosen == "beam"), gr.update(visible=chosen == "sampling")),
        method,
        [beam_size, temperature],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return [method, beam_size, temperature]


def _lay_out_image(
    handlers: Handlers,
    options: list[Option],
    examples: list[tuple[str, str]],
    flag_folder: Path | None,
) -> ImageInput:
    """Lay out a photo and its caption side by side; on a phone one under the other."""
    with gr.Row():
        with gr.Column(min_width=320):
            image = ImageInput(label="Photo", height=360, image_mode=None, buttons=[], sources=SOURCES)
            gr.Markdown("**Examples**")
            gallery = gr.Gallery(
                examples,
                show_label=False,
                elem_id="examples",
                height="fit-content",
                allow_preview=False,
                interactive=False,
                buttons=[],
            )
        with gr.Column(min_width=320):
            caption = gr.Textbox(
                label="Caption",
                elem_id="caption",
                placeholder="Drop, paste or take a photo, or choose an example.",
                interactive=False,
                lines=2,
                max_lines=10,
                buttons=["copy"],
            )
            with gr.Column(visible=False) as result:
                score = gr.Markdown()
                if flag_folder is not None:
                    _lay_out_flag(image, caption, options, flag_folder)
            table = _lay_out_table("Alternatives", ["caption", PER_WORD], ["70%", "30%"])
            with gr.Column(visible=False) as looks:
                gr.Markdown("**Where the model looked, word by word**")
                maps = gr.Gallery(
                    show_label=False,
                    elem_id="maps",
                    height="fit-content",
                    format="jpeg",
                    interactive=False,
                    buttons=[],
                )

    def choose(event: gr.EventData) -> str:  # a `gr.SelectData` fails on values that no page sends
        index = event._data.get("index") if isinstance(event._data, dict) else None
        if not isinstance(index, int) or index not in range(len(examples)):
            raise gr.Error("Choose one of the examples.", print_exception=False)
        return examples[index][0]

    gallery.select(choose, None, image, show_progress="hidden", api_visibility="private")
    image.change(None, None, caption, js="() => ''", api_visibility="private")  # the caption of the photo before
    outputs = [caption, result, score, table, looks, maps]
    captioned = gr.on(
        [image.change, *(option.change for option in options)],
        handlers.show,
        [image, *options],
        outputs,
        api_visibility="private",
        concurrency_limit=HANDLED_AT_ONCE,
        concurrency_id="photo",
        trigger_mode="always_last",
    )
    captioned.failure(  # such as a full disk
        lambda: handlers.show(None, ""), None, outputs, queue=False, show_progress="hidden", api_visibility="private"
    )
    gr.on(
        [],
        handlers.caption,
        [image, *options],
        [caption, table, maps, gr.Number(label=PER_WORD, visible=False)],
        api_name="caption",
        concurrency_limit=HANDLED_AT_ONCE,
        concurrency_id="photo",
    )
    return image


def _lay_out_table(label: str, headers: list[str], widths: list[str]) -> gr.Dataframe:
    """Lay out a table of text with a number in its last column; it is hidden until it has rows."""
    return gr.Dataframe(
        label=label,
        headers=headers,
        datatype=[*["str"] * (len(headers) - 1), "number"],  # pyright: ignore[reportArgumentType]
        column_widths=widths,  # pyright: ignore[reportArgumentType]
        type="array",
        interactive=False,
        wrap=True,
        visible=False,
        max_height=20_000,  # pixels: all rows, as the page scrolls
        buttons=[],
    )


def _lay_out_flag(image: ImageInput, caption: gr.Textbox, options: list[Option], folder: Path) -> None:
    """Lay out a button that saves a photo, its caption and the options to a folder."""
    logger = gr.CSVLogger(verbose=False)
    logger.setup([image, caption, *options], folder)

    def save(upload: Upload | None, text: str, *values: Any) -> None:
        if upload is None or not text:
            raise gr.Error("There is no caption to save yet.", print_exception=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.path.exists(getattr(logger, "dataset_filepath", "")):
                logger.first_time = True  # it was moved away; a new one needs a header
            logger.flag([{"path": str(upload.path)}, text, *values])
        except OSError as error:
            raise gr.Error(f"It cannot be saved ({error.strerror or error}).", print_exception=False) from None
        gr.Info("Saved. Thank you.")

    button = gr.Button("Save this photo and caption")
    button.click(save, [image, caption, *options], api_visibility="private")


def _lay_out_images(handlers: Handlers, options: list[Option]) -> None:
    """Lay out several photos and a table of their captions to download."""
    gr.Markdown(f"Up to {MAX_IMAGES} photos at once, {MAX_UPLOADED >> 20} MB in total, or a zip file of them.")
    files = Files(
        label="Photos",
        file_count="multiple",
        file_types=["image", ".zip"],
        height=200,
    )
    start = gr.Button("Caption these photos", variant="primary", interactive=False)
    progress = gr.Markdown()
    with gr.Row():
        downloads = [gr.DownloadButton(f"Download as {kind}", visible=False) for kind in ("CSV", "JSON Lines")]
    table = _lay_out_table("Captions", ["photo", "caption", PER_WORD], ["30%", "50%", "20%"])
    files.change(
        lambda chosen: gr.update(interactive=bool(chosen)), files, start, queue=False, api_visibility="private"
    )
    start.click(
        handlers.show_all,
        [files, *options],
        [progress, table, *downloads],
        api_visibility="private",
        concurrency_limit=2,
        show_progress="minimal",
    )


# The command


def load_models(folders: tuple[Path, ...]) -> dict[str, Captioner]:
    """Load models; returns them by the names of their folders, or by their paths if two folders have the same name."""
    captioners: dict[str, Captioner] = {}
    for folder in folders:
        names = folder.resolve().name, str(folder), str(folder.resolve())
        captioners[next((name for name in names if name not in captioners), names[-1])] = Captioner.load(folder)
    return captioners


def serve(page: Page, image: ImageInput, server: CaptionServer, listener: socket.socket, share: bool) -> None:
    """Serve the page on a socket until SIGTERM or Ctrl-C; if `share`, through a public tunnel as well."""
    address, port = listener.getsockname()[:2]
    host = str({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address))
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        "/",
        show_error=False,
        max_file_size=MAX_UPLOADED,
        enable_monitoring=False,
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=["api", "settings"],
        theme=Soft(font=["system-ui", "sans-serif"], font_mono=["system-ui", "sans-serif"]),
        css=CSS,
        head=HEAD,
    )
    page.has_launched = True  # until then, Gradio accepts any path as an upload
    inner: Any = app.routes[-1].app  # pyright: ignore[reportAttributeAccessIssue]  Gradio's
    for invalid in INVALID:
        inner.add_exception_handler(invalid, answer_invalid)
    inner.add_exception_handler(OSError, answer_full)
    gate = Gate(app, None if share else own_names(address), partial(answer_missing, page))
    public = _open_tunnel(host, port) if share else None
    if public is not None:
        gate.origins = {urlsplit(public).netloc}
    image.sample = f"{public or url}{FILE_ROUTE}{image.sample}"
    print(f"The page is at {url}" + (f" and {public}" if public else "; --share adds a public address"), flush=True)
    config = uvicorn.Config(
        gate, http=HttpProtocol, ws="none", log_level="warning", timeout_graceful_shutdown=STOP_SECONDS
    )
    # Open tabs keep connections, which `stop_event` ends.
    StoppableServer(config, inner.stop_event.set, server.close).run(sockets=[listener])


def _open_tunnel(host: str, port: int) -> str:
    """Open Gradio's tunnel to the page and return its public address."""
    try:
        return setup_tunnel(host, port, token_urlsafe(32), None, None)
    except Exception as error:  # Gradio raises many types
        raise InputError(
            f"no public link can be created ({describe_network_error(error)}); check the network, or leave out --share."
        ) from None


def main(
    model: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    flag_folder: Path | None = None,
) -> None:
    """Serve the web page and its API.

    Args:
        model: folder, or user/name on the Hub; default: the newest trained on photos. Repeat to offer several models.
        host: address to listen on; 0.0.0.0 means all network interfaces.
        port: port to listen on.
        share: also create a public link, through Gradio's tunnel.
        flag_folder: show a button that saves the image and its caption to this folder.
    """
    captioners = load_models(model or (default_model(),))
    if flag_folder is not None:
        require_local(flag_folder)
        try:
            flag_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{flag_folder} cannot be created ({error.strerror}); choose another --flag-folder."
            ) from None
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, TypeError) as error:  # OverflowError for a port above 65535, TypeError for a host
        raise InputError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port.") from None
    for number in ending_signals():
        signal.signal(number, signal.default_int_handler)
    with listener, tempfile.TemporaryDirectory(prefix="captions-") as folder, suppress(KeyboardInterrupt):
        # Gradio serves every file in this folder; its default is a folder that other programs write to as well.
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "uploads")
        # It creates a folder in its default one, which it chooses when it is imported.
        routes.DEFAULT_TEMP_DIR = folder  # pyright: ignore[reportPrivateImportUsage]
        server = CaptionServer(captioners)
        page, image = build_page(
            server, example_images(captioners, Path(folder)), Path(folder) / "uploads", flag_folder
        )
        serve(page, image, server, listener, share)
    gc.freeze()  # otherwise, the garbage collection at exit takes seconds


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, config=(tyro.conf.DisallowNone,)))
