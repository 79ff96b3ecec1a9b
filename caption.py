"""Caption photos with a trained model.

python caption.py photo.jpg holiday/ --model models/scenes --beam-size 3
torchrun --nproc_per_node 2 caption.py photos/ shard-000000.tar --output captions.jsonl

captioner = Captioner.load("models/scenes")  # or user/name on the Hugging Face Hub
captioner(["photo.jpg"])[0].text
"""

from __future__ import annotations

import heapq
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import filelock
import matplotlib.figure
import torch
import tyro
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import decoding
from checkpoint import Description, default_model, load_model
from data_loader import Photos, build_transform, read_photo
from errors import InputError, run_command
from features import BATCH, encode
from hub import find_model, push
from model import EncoderCNN, fast_dtype
from processes import this_process
from shards import SUFFIX, Member, is_shard, photo_suffixes, read_photos
from vocabulary import UNK, UNK_WORD, Vocabulary

Source = str | Path | Member | Image.Image
NAMES = 1 << 18  # of a folder's files that are held at once, some 30 MB
CHUNK = 32 * BATCH  # photos that a process captions between two writes of --output


@dataclass
class Decoding:
    """How words are chosen: greedy by default, a beam with `beam_size`, drawn with `temperature`."""

    beam_size: int = 1  # hypotheses kept at every step; 1 is greedy
    temperature: float | None = None  # draw words at random at this temperature rather than choose the best
    top_k: int = 0  # draw from the k most probable words only; 0 is all
    top_p: float = 1.0  # draw from the most probable words that hold this share of the probability
    seed: int | None = None  # of the draw
    alternatives: int = 0  # further captions of each photo, after the first
    max_length: int = 20  # tokens at most
    min_length: int = 0  # words at least
    length_penalty: float = 1.0  # a beam ranks by log p / length ** this; 0 prefers short captions
    block_trigrams: bool = False  # a beam never repeats three words
    groups: int = 1  # of the beam, kept different from one another
    diversity: float = 0.5  # how different

    def __call__(self, decoder: torch.nn.Module, features: Tensor) -> list[list[decoding.Hypothesis]]:
        """Decode embedded features: for each photo its hypotheses, best first, 1 + `alternatives` at most."""
        lengths = {"max_length": self.max_length, "min_length": self.min_length}
        wanted = 1 + self.alternatives
        if self.temperature is not None:
            drawn = decoding.sample(
                decoder, features, self.temperature, self.top_k, self.top_p, self.seed, n=wanted, **lengths
            )
            return [drawn[i : i + wanted] for i in range(0, len(drawn), wanted)]
        if self.beam_size == 1 and wanted == 1:
            return [[hypothesis] for hypothesis in decoding.greedy(decoder, features, **lengths)]
        return decoding.beam_search(
            decoder,
            features,
            self.beam_size,
            length_penalty=self.length_penalty,
            n_best=wanted,
            block_trigrams=self.block_trigrams,
            groups=self.groups,
            diversity=self.diversity,
            **lengths,
        )


@dataclass
class Caption:
    """A photo's caption.

    text: the sentence. tokens: its words, `<end>` left out.
    log_probability: the natural logarithm of the sentence's probability under the model, `<end>` included.
    attention: (len(tokens), cells) where the decoder looked for each token, or None where it does not attend.
    alternatives: further captions of the photo, the next ones in rank where they come from a beam.
    """

    text: str
    tokens: list[str]
    log_probability: float
    attention: Tensor | None = None
    alternatives: list[Caption] = field(default_factory=list)


class Captioner:
    """A trained model that captions photos: `Captioner.load(folder)(images)`."""

    def __init__(self, encoder: EncoderCNN, decoder: torch.nn.Module, vocab: Vocabulary, description: Description):
        self.device = this_process().device
        dtype = fast_dtype(self.device)
        if self.device.type == "cpu" and dtype == torch.float32 and encoder.ranges is not None:
            dtype = torch.int8
        self.encoder = encoder.for_inference(dtype).to(self.device)
        self.decoder = decoder.to(self.device).eval()
        self.vocab, self.description = vocab, description
        self.transform = build_transform(False, description.preprocessing.image_size, normalise=False)
        self.folder: Path | None = None  # and its epoch, where it comes from one
        self.epoch: int | None = None

    @classmethod
    def load(cls, folder: str | Path, epoch: int | None = None) -> Captioner:
        """The model in a folder as `train.py` writes it, its best epoch unless `epoch` is given.

        `folder` may be a model's name on the Hugging Face Hub instead, user/name: it is downloaded once.
        Raises `InputError` where the folder is incomplete, its files do not go together, or the Hub has no
        such model.
        """
        folder = find_model(folder)
        captioner = cls(*load_model(folder, epoch))
        captioner.folder, captioner.epoch = folder, epoch
        return captioner

    def push_to_hub(self, name: str, licence: str, private: bool = False) -> str:
        """Share the epoch that was loaded as user/name on the Hugging Face Hub; returns its address.

        With it goes a model card, README.md, that gives the licence, the data, the metrics and how to use it.
        `licence` is one of the Hub's identifiers, like mit or cc-by-4.0, that the training data allows. Sharing
        again replaces what was there. Raises `InputError` where you are not logged in, may not write there, or the
        Hub knows no such licence.
        """
        if self.folder is None:
            raise InputError("only a model that was loaded from a folder can be shared; use Captioner.load.")
        return push(self.folder, name, licence, private, self.epoch)

    def __call__(self, images: Source | Iterable[Source], how: Decoding | None = None, **options: Any) -> list[Caption]:
        """One `Caption` an image, in their order; images are PIL images or paths, one or many.

        `how`, or its fields by name, choose the decoding: `captioner(image, beam_size=3)`. Raises `InputError`
        naming the first image that cannot be read.
        """
        sources = [images] if isinstance(images, Source) else list(images)
        return [caption for _, caption in self.stream(sources, how or Decoding(**options))]

    def stream(
        self,
        sources: Sequence[Source],
        how: Decoding,
        workers: int = 0,
        unreadable: Callable[[int, InputError], object] | None = None,
        shared: bool = False,
    ) -> Iterator[tuple[int, Caption]]:
        """Caption photos batch by batch: yields each one's index in `sources` and its caption, in order.

        `workers` processes read ahead. A photo that cannot be read is passed to `unreadable` and left out;
        without that, its `InputError` is raised. If `shared`, each of several processes captions its share of the
        batches, which are the same for any number of processes, and so are the captions.
        """
        batches = [range(i, min(i + BATCH, len(sources))) for i in range(0, len(sources), BATCH)]
        if shared:
            batches = batches[this_process().process_index :: this_process().num_processes]
        for indices, seen in encode(self.encoder, Photos(sources, self.transform), batches, workers, unreadable):
            found = how(self.decoder, self.encoder.embed(seen))
            for index, hypotheses in zip(indices, found, strict=True):
                first, *others = [self._caption(hypothesis) for hypothesis in hypotheses]
                first.alternatives = others
                yield index, first

    def _caption(self, hypothesis: decoding.Hypothesis) -> Caption:
        words = [i for i in hypothesis.tokens if i > UNK or i == UNK]
        tokens = [UNK_WORD if i == UNK else self.vocab.words[i] for i in words]
        attention = None if hypothesis.attention is None else hypothesis.attention[: len(tokens)]
        return Caption(self.vocab.decode(hypothesis.tokens), tokens, hypothesis.log_probability, attention)


def draw_sheet(sources: Sequence[Source], captions: list[str], columns: int = 4) -> matplotlib.figure.Figure:
    """A contact sheet: the photos in rows, each above its caption."""
    rows = -(-len(sources) // columns)
    figure = matplotlib.figure.Figure(figsize=(3.2 * columns, 3.1 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, source, text in zip(figure.axes, sources, captions, strict=False):
        axes.imshow(read_photo(source))
        axes.set_title(textwrap.fill(text, 40), fontsize=10, y=-0.04, va="top")
    return figure


def draw_attention(source: Source, caption: Caption, image_size: int) -> matplotlib.figure.Figure:
    """Where the decoder looked for each word: its map over the part of the photo that the encoder saw."""
    if caption.attention is None:
        raise InputError("this model's decoder does not attend; train one with --decoder attention.")
    cells = round(caption.attention.shape[1] ** 0.5)
    crop = build_transform(False, image_size, normalise=False)(read_photo(source)).permute(1, 2, 0)
    columns = min(5, len(caption.tokens) + 1)
    rows = -(-(len(caption.tokens) + 1) // columns)
    figure = matplotlib.figure.Figure(figsize=(2.2 * columns, 2.45 * rows), layout="constrained")
    figure.suptitle(caption.text, wrap=True)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    panels[0].imshow(crop)
    panels[0].set_title("photo")
    for axes, word, weights in zip(panels[1:], caption.tokens, caption.attention, strict=False):
        axes.imshow(crop)
        axes.imshow(
            weights.float().reshape(cells, cells),
            extent=(0, image_size, image_size, 0),
            cmap="magma",
            alpha=0.6,
            interpolation="bicubic",
        )
        axes.set_title(word)
    return figure


def find_photos(paths: Iterable[Path]) -> list[Path | Member]:
    """The photos at the paths, as `stream_photos` finds them."""
    return list(stream_photos(paths))


def stream_photos(paths: Iterable[Path]) -> Iterator[Path | Member]:
    """The photos at the paths, in the order given: of a folder the files that look like photos, in name order.

    A tar file's come in its order, where its name comes if it lies in a folder. A folder of any size is never held
    in memory whole. Raises `InputError` at once for a folder or a tar file that holds no photos or cannot be read.
    """
    paths = list(paths)
    for path in paths:
        if next(_photos_at(path), None) is None:
            raise InputError(f"{path} holds no photos; name a photo or a folder of them.")
    return chain.from_iterable(map(_photos_at, paths))


def _photos_at(path: Path) -> Iterator[Path | Member]:
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that no folder can have, too
        for name in _names(path):
            yield from _photos_at(path / name)
    elif is_shard(path):
        yield from read_photos(path)
    else:
        yield path


def _names(folder: Path) -> Iterator[str]:
    """The names of a folder's photos and tar files, in order; the folder is read once for each `NAMES` of them."""
    suffixes, after = photo_suffixes() | {SUFFIX}, ""
    while True:
        try:
            with os.scandir(folder) as entries:
                later = (entry for entry in entries if entry.name > after)
                meant = (entry for entry in later if os.path.splitext(entry.name)[1].lower() in suffixes)
                names = heapq.nsmallest(NAMES, (entry.name for entry in meant if entry.is_file()))
        except OSError as error:
            raise InputError(f"{folder} cannot be read ({error.strerror}).") from None
        yield from names
        if len(names) < NAMES:
            return
        after = names[-1]


def write_captions(
    captioner: Captioner, paths: Iterable[Path], how: Decoding, output: Path, workers: int = 0, strict: bool = False
) -> tuple[int, int]:
    """Caption the photos at the paths into a file of JSON Lines, one a photo, in order, by all processes together.

    Rows that a run wrote which was stopped stay, and it goes on after them. A photo that cannot be read has an
    "error" in its row. Returns how many photos there are, and how many cannot be read. Raises `InputError` where the
    rows are of other photos, or give them other captions than this model does with these options.
    """
    process = this_process()
    main = process.is_main_process
    done = failed = 0
    with ExitStack() as stack:
        if main:  # which alone looks for the photos and reads and writes the file
            photos = stream_photos(paths)
            stack.enter_context(_alone(output))
            file = stack.enter_context(open(output, "a+b"))
            done, failed, again = _read_rows(file, photos)
            photos = chain([photo for photo, _ in again], photos)  # in whole batches, as if never stopped
        progress = stack.enter_context(
            tqdm(desc="captions", initial=done, unit="photo", delay=2, disable=None if main else True)
        )
        while True:
            few = list(islice(photos, CHUNK * process.num_processes)) if main else []
            (few,) = broadcast_object_list([few])
            if not few:
                break
            rows = gather_object(_caption_share(captioner, few, how, workers, strict))
            if not main:
                continue
            rows = [row for _, row in sorted(rows, key=itemgetter(0))]
            for (_, old), new in zip(again, rows, strict=False):
                readable = "caption" in old and "caption" in new
                if readable and (old["caption"] != new["caption"] or old.keys() != new.keys()):
                    raise InputError(
                        f"{output} holds other captions than this model gives with these options, of "
                        f"{old['photo']} for one; finish it as it was begun, or name another file."
                    )
            rows, again = rows[len(again) :], []
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
            for row in rows:
                if "error" in row:
                    tqdm.write(f"error: {row['error']}", file=sys.stderr)
                    failed += 1
            done += len(rows)
            progress.update(len(rows))
    return broadcast_object_list([(done, failed)])[0]


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Nobody else writes into the same file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(output.with_name(f"{output.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"{output} is being written by another process; wait for it or name another file.") from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            os.unlink(lock.lock_file)


def _read_rows(file: BinaryIO, photos: Iterator[Path | Member]) -> tuple[int, int, list[tuple[Path | Member, dict]]]:
    """How many rows are there, how many of them are errors, and those of the last batch, with their photos.

    `photos` is moved on past them; a row that a kill has torn is cut off.
    """
    done = failed = end = 0
    batch: list[tuple[Path | Member, dict]] = []
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n") and line[:10] == b'{"photo": '[: len(line)]:
            break
        photo = next(photos, None)
        try:
            row = json.loads(line)
            if row["photo"] != str(photo):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"{file.name}, line {done + 1} is not of {photo or 'any photo'}; caption the photos that it was "
                "begun with, or name another file."
            ) from None
        if done % BATCH == 0:
            batch = []
        batch.append((photo, row))
        done, failed, end = done + 1, failed + ("error" in row), end + len(line)
    file.truncate(end)
    return done, failed, batch


def _caption_share(
    captioner: Captioner, photos: list[Path | Member], how: Decoding, workers: int, strict: bool
) -> list[tuple[int, dict[str, Any]]]:
    """This process's share of the photos as rows, with their indices, in any order."""
    rows: list[tuple[int, dict[str, Any]]] = []
    unreadable = None if strict else lambda i, error: rows.append((i, as_json(photos[i], error)))
    if len(photos) <= 2 * BATCH * this_process().num_processes:
        workers = 0
    for i, caption in captioner.stream(photos, how, workers, unreadable, shared=True):
        rows.append((i, as_json(photos[i], caption)))
    return rows


def main(
    photos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO_OR_FOLDER")],
    decoding: Annotated[Decoding, tyro.conf.arg(name="")],
    model: Path | None = None,
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
        decoding: how words are chosen.
        model: the model's folder, or user/name on the Hugging Face Hub; by default the newest in models/ that was
            trained on photos.
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
        if photos or decoding != Decoding(max_length=decoding.max_length):
            raise InputError("--export takes no photos, and of the options of decoding only --max-length.")
        from export import export_onnx  # what it needs is not in requirements.txt

        export_onnx(model or default_model(), export, decoding.max_length)
        return
    if not photos:
        raise InputError("no photo was named; name photos or folders of photos.")
    if output is not None:
        if json_ or sheet is not None or attention is not None:
            raise InputError("--output goes with none of --json, --sheet and --attention.")
        if decoding.temperature is not None and decoding.seed is None:
            raise InputError("--output with --temperature needs a --seed, so that what is written can be gone on with.")
        with this_process().local_main_process_first():  # what it downloads the others find
            captioner = Captioner.load(model or default_model())
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
    captioner = Captioner.load(model or default_model())
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


def as_json(source: Source, caption: Caption | InputError) -> dict[str, Any]:
    """A caption, or why there is none, as the JSON that `--json` prints and `--output` writes.

    Log-probabilities to four digits: those after them depend on how many threads computed them.
    """
    if isinstance(caption, InputError):
        return {"photo": str(source), "error": str(caption)}
    first, *others = (
        {"caption": found.text, "log_probability": round(found.log_probability, 4)}
        for found in (caption, *caption.alternatives)
    )
    return {"photo": str(source), **first, **({"alternatives": others} if others else {})}


def save_figure(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Write a figure as a PNG and say where it is, on stderr."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=100)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}).") from None
    print(f"drew {path}", file=sys.stderr)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
