"""Caption images with a trained model.

    python caption.py photo.jpg holiday/ --model models/scenes --beam-size 3
    torchrun --nproc_per_node 2 caption.py photos/ shard-000000.tar --output captions.jsonl

From Python:

    captioner = Captioner.load("models/scenes")  # or user/name on the Hugging Face Hub
    captioner(["photo.jpg"])[0].text
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, which take seconds, without a traceback

import tyro
from tqdm.auto import tqdm

from captioning.bulk import as_json, write_captions
from captioning.captioner import Caption, Captioner, Decoding, Precision, Source, choose_workers, other_captions
from captioning.checkpoint import default_model
from captioning.distributed import this_process
from captioning.errors import InputError, log, printable, run_command
from captioning.figures import MAX_SHEET, check_figure, draw_attention, draw_sheet, save_figure
from captioning.files import check_output
from captioning.images import WORKERS, check_workers
from captioning.listing import find_images
from captioning.shards import Member


def main(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE_OR_FOLDER")],
    decoding: Annotated[Decoding, tyro.conf.arg(name=""), tyro.conf.DisallowNone],
    model: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    precision: Precision = "auto",
    recursive: bool = False,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    output: Path | None = None,
    strict: bool = False,
    sheet: Path | None = None,
    attention: Path | None = None,
    export: Path | None = None,
    workers: int = WORKERS,
) -> None:
    """Caption images and folders of images with a trained model.

    One image:  python caption.py photo.jpg

    A folder, into a file:  python caption.py holiday/ --output captions.jsonl

    Args:
        images: images, folders of images, and tar files of images in WebDataset's format.
        decoding: how words are chosen; by default with a beam of 3 without repeated trigrams.
        model: folder, or user/name on the Hub; default: the newest trained on photos. Several make an ensemble.
        precision: of the backbone; auto: bf16 if native to the device, else fp32; int8: approximate, on CPUs only.
        recursive: also caption the images in subfolders.
        json_: print a JSON list of objects with the keys photo, caption, log_probability, precision (and alternatives).
        output: write these objects to this JSON Lines file (key error for an unreadable image); run again to resume.
        strict: stop at the first image that cannot be read.
        sheet: also draw a contact sheet of the images and captions to this PNG file.
        attention: also draw the first image's attention maps, one per word, to this PNG file.
        export: instead of captioning, export the model with greedy decoding to this ONNX file.
        workers: processes that read images.
    """
    check_workers(workers)
    if export is not None:
        others = (images, recursive, json_, output, strict, sheet, attention, precision != "auto", workers != WORKERS)
        if any(others) or decoding != Decoding(max_length=decoding.max_length) or len(model) > 1:
            raise InputError("--export takes one --model and --max-length, but no images and no other option.")
        export_model(model, export, decoding.max_length)
        return
    decoding = decoding.with_defaults()
    decoding.check()
    if not images:
        raise InputError("no images were given; name images or folders of images.")
    options = Options(images, recursive, model, precision, decoding, workers, strict)
    if output is None:
        caption_to_terminal(options, json_, sheet, attention)
        return
    if json_ or sheet is not None or attention is not None:
        raise InputError("--output cannot be combined with --json, --sheet or --attention.")
    caption_to_file(options, output)


@dataclass
class Options:
    """What to caption, and how; the arguments of `main` by these names."""

    images: tuple[Path, ...]
    recursive: bool
    model: tuple[Path, ...]
    precision: Precision
    decoding: Decoding
    workers: int
    strict: bool

    def load_captioner(self) -> Captioner:
        """Load the model, and name it and the precision of its backbone on stderr."""
        models = self.model or (default_model(),)
        captioner = Captioner.load(models, precision=self.precision)
        if this_process().is_main_process:
            log(f"{' + '.join(map(str, models))}, backbone in {captioner.precision}")
        return captioner


def export_model(model: tuple[Path, ...], path: Path, max_length: int) -> None:
    """Export the model with greedy decoding to ONNX; raises `InputError` if `path` is a file of another kind."""
    if os.path.isfile(path) and path.suffix.lower() != ".onnx":
        raise InputError(f"{path} exists and its name does not end in .onnx; name another file for the export.")
    from captioning.export import export_onnx

    export_onnx(model[0] if model else default_model(), path, max_length)


def caption_to_terminal(options: Options, json_: bool, sheet: Path | None, attention: Path | None) -> None:
    """Print captions, and draw the figures; raises `InputError` if images could not be read."""
    if sys.stdout is None:
        raise InputError("standard output is closed, so captions cannot be printed; add --output captions.jsonl.")
    if this_process().num_processes > 1:
        raise InputError("several processes need a file for the captions; add --output captions.jsonl.")
    sources = find_sources(options, [path for path in (sheet, attention) if path is not None])
    captioner = options.load_captioner()
    if attention is not None and not captioner.decoder.attends:
        raise InputError("--attention needs a model whose decoder attends; train one with --decoder attention.")
    captions, failed = print_captions(captioner, sources, options, json_)
    for error in failed:
        log(f"error: {error}")
    if captions:
        draw_figures(captioner, sources, captions, sheet, attention)
    if failed:
        raise InputError(f"{len(failed)} of {len(sources)} images could not be read; {len(captions)} are captioned.")


def find_sources(options: Options, figures: list[Path]) -> list[Path | Member]:
    """List the images to caption, without the figures of an earlier run; raises `InputError` for unusable figures."""
    for path in figures:
        check_figure(path)
    real_paths = {os.path.realpath(path) for path in figures}
    if len(real_paths) < len(figures):
        raise InputError(f"--sheet and --attention both name {figures[0]}; name two files.")
    sources = find_images(options.images, options.recursive, log)
    if figures:
        sources = [path for path in sources if not isinstance(path, Path) or os.path.realpath(path) not in real_paths]
        if not sources:
            raise InputError("the only images named are --sheet or --attention of an earlier run; name other images.")
    return sources


def caption_to_file(options: Options, output: Path) -> None:
    """Write captions to a JSON Lines file; raises `InputError` if images could not be read."""
    if options.decoding.temperature is not None and options.decoding.seed is None:
        raise InputError("--output with --temperature needs a --seed, so that an interrupted run can resume.")
    process = this_process()
    if process.is_main_process:
        check_output(output)
        check_output(Path(os.path.realpath(output)))  # where a link leads, since the file is opened and not replaced
        if output.suffix.lower() not in (".jsonl", ".ndjson", ""):
            raise InputError(f"{output} would hold JSON Lines, not {output.suffix}; name a file that ends in .jsonl.")
        if output.exists() and not os.access(output, os.W_OK):
            raise InputError(f"{output} may not be written; change its permissions, or name another file.")
    with process.local_main_process_first():  # it downloads the model for the others
        captioner = options.load_captioner()
    images, workers = options.images, options.workers
    try:
        rows, unreadable = write_captions(
            captioner, images, options.decoding, output, workers, options.strict, options.recursive, log
        )
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror or error}); its rows are kept, and the same command resumes."
        ) from error
    if unreadable:
        raise InputError(f"{unreadable} of {rows} images could not be read; their rows in {output} say why.")


def draw_figures(
    captioner: Captioner, sources: Sequence[Source], captions: dict[int, Caption], sheet: Path | None, maps: Path | None
) -> None:
    """Draw the contact sheet and the first image's attention maps if their files are named."""
    if sheet is not None:
        drawn = list(captions)[:MAX_SHEET]
        if len(drawn) < len(captions):
            log(f"{sheet} shows the first {MAX_SHEET:,} of {len(captions):,} images")
        save_figure(draw_sheet([sources[i] for i in drawn], [captions[i].text for i in drawn]), sheet)
    if maps is not None:
        first, caption = next(iter(captions.items()))
        save_figure(draw_attention(sources[first], caption, captioner.description.preprocessing), maps)


def print_captions(
    captioner: Captioner, sources: Sequence[Source], options: Options, as_document: bool
) -> tuple[dict[int, Caption], list[InputError]]:
    """Caption images and print the captions, each as soon as it is known or all as one JSON document.

    Returns the captions by image index, and the errors of images that could not be read.
    """
    failed: list[InputError] = []
    unreadable = None if options.strict else lambda _, error: failed.append(error)
    captions: dict[int, Caption] = {}
    workers = choose_workers(options.workers, len(sources))
    stream = captioner.stream(sources, options.decoding, workers, unreadable)
    try:
        for index, caption in tqdm(stream, total=len(sources), unit="image", delay=2, disable=None):
            captions[index] = caption.without_attention() if captions else caption  # the first image's may be drawn
            if not as_document:
                text = f"{sources[index]}: {caption.text}" if len(sources) > 1 else caption.text
                tqdm.write(printable(text))
                for other in other_captions(caption):
                    tqdm.write(printable(f"    {other.text}"))
    finally:  # also if --strict stops at an image that cannot be read
        if as_document:
            rows = [as_json(sources[i], caption, captioner.precision) for i, caption in captions.items()]
            print(json.dumps(rows, indent=1))
    return captions, failed


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, config=(tyro.conf.DisallowNone,)))
