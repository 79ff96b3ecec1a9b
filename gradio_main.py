"""The web page: a photo in the browser, a caption under it.

    python gradio_main.py --model models/scenes --port 7860

The same is an API, the endpoint `/caption`.
"""

from __future__ import annotations

import math
import os
import queue
import random
import shutil
import signal
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path

import gradio as gr
import gradio.component_meta
import matplotlib
import tyro
from gradio.media import get_image
from matplotlib.cbook import get_sample_data
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from torchvision import transforms as T

from captioning.bulk import find_photos
from captioning.captioner import Caption, Captioner, Decoding
from captioning.checkpoint import SAMPLE, Description, default_model
from captioning.errors import InputError, run_command
from captioning.features import BATCH
from captioning.images import build_transform, read_photo
from scenes import draw_scene

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # Pillow starts other programs for some others
MOST_PIXELS = 100_000_000
MOST_BYTES = 32 << 20  # of an upload
AGE = 3600  # seconds after which uploads are deleted
MOST_WAITING = 128  # requests; the next one is told to come back later
HANDLED_AT_ONCE = 32  # requests, most of them waiting for the batch that they are in
VIEW_SIZE = 224  # pixels of an attention map
SCORES = {"CIDEr": "CIDEr", "Bleu_4": "BLEU-4", "METEOR": "METEOR"}
SOURCES = ["upload", "webcam", "clipboard"]
METHODS = [("Beam search", "beam"), ("Greedy", "greedy"), ("Sampling", "sampling")]
CSS = """
#caption textarea {font-size: 1.7rem; line-height: 1.3; font-weight: 600; text-align: center}
#maps .grid-container {grid-template-columns: repeat(auto-fill, minmax(90px, 1fr))}
"""

gradio.component_meta.create_or_modify_pyi = lambda *_: None  # it would write a gradio_main.pyi beside this file


class Photo(gr.Image):
    """Gradio's image input, which passes on the uploaded file unread: only `Server.read` decodes uploads."""

    is_template = True  # Gradio shows it as its base class

    def preprocess(self, payload: gr.components.image.ImageData | None) -> str | None:
        """The path of the uploaded file.

        Gradio itself checks that a path is an upload's only where the request says that it is a file.
        """
        if payload is None:
            return None
        path = Path(payload.path or "").resolve()
        if not path.is_relative_to(Path(self.GRADIO_CACHE).resolve()):
            raise gr.Error("Upload the photo first.", print_exception=False)
        return str(path)

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """As Gradio's, except that the server fetches nothing from other hosts."""
        if str(url_or_file_path).startswith(("http://", "https://")):
            raise gr.Error("Upload the photo itself, not its address.", print_exception=False)
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class NoOtherHosts:
    """Refuses requests to fetch an address on the caller's behalf, which Gradio answers by default."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403."""
        refused = any(part in scope.get("path", "") for part in ("/file=http", "/proxy="))
        await (PlainTextResponse("Not allowed.", 403) if refused else self.app)(scope, receive, send)


class Server:
    """Captions what requests bring, those that arrive together in one batch.

    Every request reads its own photo in its own thread, and one thread captions. (Gradio's `batch=True`
    would fail all requests of a batch when it refuses the file of one.)
    """

    def __init__(self, captioner: Captioner):
        self.captioner = captioner
        self.resize = captioner.transform.transforms[0]
        self.view = T.Compose(build_transform(False, VIEW_SIZE, normalise=False).transforms[:2])
        self.reading = threading.Semaphore(2)  # photos held whole in memory
        self.waiting: queue.SimpleQueue[tuple[Image.Image, Decoding, Future[Caption]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def read(self, path: str) -> tuple[Image.Image, Image.Image]:
        """An upload as the captioner and as the attention maps need it, or a friendly `gr.Error`."""
        sentence = "This file is not a photo that can be read; try a JPEG, PNG or WebP."
        with self.reading:
            try:
                with Image.open(path, formats=FORMATS) as image:
                    if image.width * image.height > MOST_PIXELS:
                        raise Image.DecompressionBombError
                    sentence = "This photo is damaged and cannot be read; try another copy of it."
                    photo = read_photo(image, max(self.resize.size, VIEW_SIZE))
            except Image.DecompressionBombError:
                sentence = f"This photo has more than {MOST_PIXELS // 10**6} million pixels; make it smaller."
                raise gr.Error(sentence, duration=None, print_exception=False) from None
            except Exception:  # a foreign file makes Pillow raise nearly anything
                raise gr.Error(sentence, duration=None, print_exception=False) from None
            width, height = photo.size  # only the centre is looked at, so a long strip is not enlarged whole
            photo = T.CenterCrop((min(height, 2 * width), min(width, 2 * height)))(photo)
            return self.resize(photo), self.view(photo)

    def caption(
        self, photo: str | None, method: str = "beam", beam_size: float = 3, temperature: float = 0.7
    ) -> tuple[str, list[list[str | float]], list[tuple[Image.Image, str]]]:
        """Caption a photo.

        photo: the uploaded file. method: "beam", "greedy" or "sampling". beam_size: hypotheses that the beam
        keeps. temperature: of the sampling; near 0 the best words win, above 1 unlikely ones appear.
        Returns the caption, it and its alternatives with their probabilities under the model, and for every
        word a picture of where the model looked (none where the model does not attend).
        """
        if photo is None:
            return "", [], []
        small, view = self.read(photo)
        how = decoding_of(method, int(beam_size), temperature)
        answer: Future[Caption] = Future()
        self.waiting.put((small, how, answer))
        caption = answer.result()
        found = {c.text: math.exp(c.log_probability) for c in (caption, *caption.alternatives)}
        table = [[text, float(f"{probability:.2g}")] for text, probability in found.items()]
        return caption.text, table, attention_maps(view, caption)

    def _work(self) -> None:
        while True:
            jobs = [self.waiting.get()]
            while len(jobs) < BATCH and not self.waiting.empty():
                jobs.append(self.waiting.get())
            alike: dict[str, list] = {}
            for job in jobs:
                alike.setdefault(str(job[1]), []).append(job)
            for group in alike.values():
                photos, (how, *_), answers = zip(*group, strict=True)
                try:
                    for answer, caption in zip(answers, self.captioner(photos, how), strict=True):
                        answer.set_result(caption)
                except Exception as error:  # it belongs to these requests; the next ones go on
                    for answer in answers:
                        answer.set_exception(error)


def decoding_of(method: str, beam_size: int, temperature: float) -> Decoding:
    """The decoding that the page's controls choose."""
    if method == "greedy":
        return Decoding()
    if method == "sampling":
        return Decoding(temperature=temperature, alternatives=4)
    return Decoding(beam_size=beam_size, alternatives=min(beam_size, 5) - 1).for_photos()


def attention_maps(view: Image.Image, caption: Caption) -> list[tuple[Image.Image, str]]:
    """For every word where the model looked, over the part of the photo that it saw; or nothing."""
    if caption.attention is None:
        return []
    cells = math.isqrt(caption.attention.shape[1])
    maps = []
    for word, weights in zip(caption.tokens, caption.attention.float().numpy(), strict=True):
        colours = matplotlib.colormaps["magma"](weights.reshape(cells, cells) / weights.max(), bytes=True)
        heat = Image.fromarray(colours[..., :3]).resize(view.size, Image.Resampling.BICUBIC)
        maps.append((Image.blend(view, heat, 0.6), word))
    return maps


def example_photos(model: Path, description: Description, folder: Path) -> list[Path]:
    """The photos in the model's own `examples/`; else, in `folder`, pictures of the kind that it was trained on.

    Those are held-out scenes, drawn now, or the few photos that come with Gradio and Matplotlib.
    """
    if (model / "examples").is_dir():
        return find_photos([model / "examples"])
    if description.data.get("folder") != SAMPLE:
        photos = [get_image(f"{name}.jpg") for name in ("cheetah1", "lion", "tower")]
        photos.append(get_sample_data("grace_hopper.jpg", asfileobj=False))
        return [Path(shutil.copy(photo, folder)) for photo in photos]
    paths = [folder / f"scene-{i}.jpg" for i in range(1, 7)]
    for path in paths:
        draw_scene(random.Random(f"page/{path.stem}"))[0].convert("RGB").save(path, quality=90)
    return paths


def about(name: str, description: Description) -> str:
    """Which model it is, on what it was trained and how good it is, as Markdown."""
    data, epochs, best = description.data, description.epochs, description.best_epoch
    attends = description.architecture.decoder == "attention"
    looks = "looks at a part of the photo for every word" if attends else "has seen the photo once"
    words = len(description.vocabulary)
    lines = [f"**Model `{name}`**: a ResNet-50 and an LSTM that {looks} and knows {words:,} words."]
    if "train_photos" in data:
        photos, captions = data["train_photos"], data["train_captions"]
        lines.append(f"**Trained** on {captions:,} captions of {photos:,} photos (`{data['folder']}`).")
    if best and len(epochs) >= best:
        scores = [f"{name} {epochs[best - 1][key]:.2f}" for key, name in SCORES.items() if key in epochs[best - 1]]
        lines.append(f"**How good**, on {data.get('val_photos', 0):,} photos it had not seen: {', '.join(scores)}.")
    return "\n\n".join(lines)


def build_page(server: Server, name: str, examples: list[Path], flag_folder: Path | None = None) -> gr.Blocks:
    """The page, ready to launch."""
    description = server.captioner.description
    with gr.Blocks(title="Photo captions", analytics_enabled=False, delete_cache=(AGE // 6, AGE)) as page:
        gr.Markdown("# Photo captions\nDrop a photo, paste one, or take one: the model says what it sees.")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                photo = Photo(label="Photo", height=400, image_mode=None, buttons=[], sources=SOURCES)
                caption = gr.Textbox(
                    label="Caption",
                    elem_id="caption",
                    placeholder="…",
                    interactive=False,
                    lines=1,
                    max_lines=10,
                )
                table = gr.Dataframe(
                    label="Alternatives",
                    headers=["caption", "probability"],
                    datatype=["str", "number"],
                    column_widths=["65%", "35%"],
                    type="array",
                    interactive=False,
                    wrap=True,
                    buttons=[],
                )
                with gr.Column(visible=server.captioner.decoder.attends):
                    gr.Markdown("**Where the model looked, word by word**")
                    maps = gr.Gallery(
                        show_label=False,
                        elem_id="maps",
                        height="fit-content",
                        format="jpeg",
                        interactive=False,
                        buttons=[],
                    )
            with gr.Column(scale=2, min_width=320):
                gr.Examples([[str(path)] for path in examples], photo, label="Examples", cache_examples=False)
                method = gr.Radio(METHODS, value="beam", label="How words are chosen")
                beam_size = gr.Slider(1, 10, 3, step=1, label="Beam width", info="Captions followed at once.")
                temperature = gr.Slider(
                    0.1,
                    2,
                    0.7,
                    step=0.1,
                    label="Temperature",
                    info="Higher is more surprising.",
                    visible=False,
                )
                if flag_folder is not None:
                    flag = gr.Button("Keep this photo and caption")
                gr.Markdown(about(name, description))

        method.change(
            lambda chosen: (gr.update(visible=chosen == "beam"), gr.update(visible=chosen == "sampling")),
            method,
            [beam_size, temperature],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        photo.change(None, None, caption, js="() => ''", api_visibility="private")  # it belongs to another photo
        asked = gr.on(
            [photo.change, method.change, beam_size.change, temperature.change],
            server.caption,
            [photo, method, beam_size, temperature],
            [caption, table, maps],
            api_name="caption",
            concurrency_limit=HANDLED_AT_ONCE,
            trigger_mode="always_last",
        )
        asked.failure(lambda: None, None, photo, show_progress="hidden", api_visibility="private")
        if flag_folder is not None:
            logger = gr.CSVLogger(verbose=False)
            logger.setup([photo, caption], flag_folder)

            def keep(path: str | None, text: str) -> None:
                if not path or not text:
                    raise gr.Error("There is no caption to keep yet.", print_exception=False)
                logger.flag([{"path": path}, text])
                gr.Info("Kept; thank you.")

            flag.click(keep, [photo, caption], api_visibility="private")
    return page.queue(max_size=MOST_WAITING, api_open=False)


def main(
    model: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    flag_folder: Path | None = None,
) -> None:
    """Serve the web page and its API.

    Args:
        model: the model's folder, or user/name on the Hugging Face Hub; by default the newest in models/ that was
            trained on photos.
        host: the address to listen on; 0.0.0.0 is every network that this computer is in.
        port: the port to listen on.
        share: also open a public address, through a tunnel that Gradio's makers run.
        flag_folder: show a button that keeps a photo and its caption in this folder.
    """
    model = model or default_model()
    captioner = Captioner.load(model)
    if flag_folder is not None:
        try:
            flag_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{flag_folder} cannot be made ({error.strerror}); choose another --flag-folder."
            ) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="captions-") as folder:
        # Gradio serves all that is in this folder, by default one that other programs write to as well.
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "uploads")
        examples = example_photos(model, captioner.description, Path(folder))
        page = build_page(Server(captioner), model.resolve().name, examples, flag_folder)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=share,
                allowed_paths=[],
                max_file_size=MOST_BYTES,
                state_session_capacity=256,
                enable_monitoring=False,
                run_history=False,
                mcp_server=False,
                ssr_mode=False,
                pwa=False,
                footer_links=["api", "settings"],
                theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["system-ui", "sans-serif"]),
                css=CSS,
                app_kwargs={"middleware": [Middleware(NoOtherHosts)]},
            )
        except (OSError, OverflowError) as error:  # the latter of a port above 65535
            raise InputError(
                f"{host}:{port} cannot be listened on ({error}); choose another --host or --port."
            ) from None


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
