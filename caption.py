"""Caption photos with a trained model.

python caption.py photo.jpg holiday/ --model models/scenes --beam-size 3
torchrun --nproc_per_node 2 caption.py photos/ shard-000000.tar --output captions.jsonl

captioner = Captioner.load("models/scenes")  # or user/name on the Hugging Face Hub
captioner(["photo.jpg"])[0].text
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tqdm.auto import tqdm

from captioning.bulk import as_json, find_photos, write_captions
from captioning.captioner import Caption, Captioner, Decoding, Precision
from captioning.checkpoint import default_model
from captioning.distributed import this_process
from captioning.errors import InputError, run_command
from captioning.features import BATCH
from captioning.figures import draw_attention, draw_sheet, save_figure


def main(
    photos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO_OR_FOLDER")],
    decoding: Annotated[Decoding, tyro.conf.arg(name=""), tyro.conf.DisallowNone],
    model: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    precision: Precision = "auto",
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    output: Path | None = None,
    strict: bool = False,
    sheet: Path | None = None,
    attention: Path | None = None,
    export: Path | None = None,
    workers: int = min(4, os.cpu_count() or 1),
) -> None:
    """Caption photos and folders of photos with a trained model.

    Args:
        photos: photos, folders of photos, and tar files of photos as WebDataset has them.
        decoding: how words are chosen; by default with a beam of 3 that never repeats three words.
        model: the model's folder, or user/name on the Hugging Face Hub; by default the newest in models/ that was
            trained on photos. Given several times, the models' probabilities are averaged.
        precision: of the backbone; auto is bf16 where the processor or GPU has it, else fp32.
        json_: print one JSON list of objects with photo, caption and log_probability.
        output: instead write such objects here, one a line, however many and with several processes if so launched;
            run again, it goes on where it was stopped.
        strict: stop at the first photo that cannot be read.
        sheet: also draw the photos with their captions into this PNG.
        attention: also draw where the decoder looked for each word of the first photo into this PNG.
        export: instead write the model into this ONNX file, which captions greedily wherever ONNX runs.
        workers: processes that read photos.
    """
    if export is not None:
        if photos or decoding != Decoding(max_length=decoding.max_length) or precision != "auto" or len(model) > 1:
            raise InputError("--export takes no photos, one --model, and of the options of decoding only --max-length.")
        from captioning.export import export_onnx

        export_onnx(model[0] if model else default_model(), export, decoding.max_length)
        return
    decoding = decoding.for_photos()
    decoding.check()
    if not photos:
        raise InputError("no photo was named; name photos or folders of photos.")
    if output is not None:
        if json_ or sheet is not None or attention is not None:
            raise InputError("--output goes with none of --json, --sheet and --attention.")
        if decoding.temperature is not None and decoding.seed is None:
            raise InputError("--output with --temperature needs a --seed, so that what is written can be gone on with.")
        with this_process().local_main_process_first():  # what it downloads the others find
            captioner = Captioner.load(model or default_model(), precision=precision)
        try:
            found, unread = write_captions(captioner, photos, decoding, output, workers, strict)
        except OSError as error:
            raise InputError(
                f"{output} cannot be written ({error.strerror or error}); what it holds stays, run it again to go on."
            ) from error
        if unread:
            raise InputError(f"{unread} of {found} photos could not be read; their rows in {output} say why.")
        return
    if this_process().num_processes > 1:
        raise InputError("several processes caption into one file; add --output captions.jsonl.")
    sources = find_photos(photos)
    captioner = Captioner.load(model or default_model(), precision=precision)
    failed: list[InputError] = []
    unreadable = None if strict else lambda _, error: failed.append(error)
    captions: dict[int, Caption] = {}
    found = captioner.stream(sources, decoding, workers if len(sources) > 2 * BATCH else 0, unreadable)
    for index, caption in tqdm(found, total=len(sources), unit="photo", delay=2, disable=None):
        captions[index] = caption
        if not json_:
            tqdm.write(f"{sources[index]}: {caption.text}" if len(sources) > 1 else caption.text)
            for other in caption.alternatives:
                tqdm.write(f"    {other.text}")
    if json_:
        print(json.dumps([as_json(sources[i], caption) for i, caption in captions.items()], indent=1))
    if sheet is not None and captions:
        figure = draw_sheet([sources[i] for i in captions], [caption.text for caption in captions.values()])
        save_figure(figure, sheet)
    if attention is not None and captions:
        first, caption = next(iter(captions.items()))
        size = captioner.description.preprocessing.image_size
        save_figure(draw_attention(sources[first], caption, size), attention)
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    if failed:
        raise InputError(f"{len(failed)} of {len(sources)} photos could not be read; {len(captions)} are captioned.")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
