"""Other data sets, and the original recipe's weights, turned into the two layouts that this project knows.

    python importers.py flickr8k SOURCE data/flickr8k      (flickr30k, karpathy and folder likewise)

An import is built in a folder beside its destination and renamed at the end, so one that was interrupted
never looks whole. Photos are hard links where the file system allows it (no second copy on the disk; do
not edit them in place) and copies elsewhere.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from tqdm import tqdm

from captioning.errors import InputError, run_command

SPLITS = {
    "train": "train",
    "restval": "train",
    "val": "val",
    "dev": "val",
    "validation": "val",
    "test": "test",
}
PHOTO_COLUMNS = ("photo", "image", "file_name", "image_name")
CAPTION_COLUMNS = ("caption", "comment")
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MAX_PICKLE_BYTES = 64 << 20  # the published vocabulary has 273,174

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Destination = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]


@dataclass
class Photo:
    """A photo of a data set to be: where it is now, the name it gets, its split and its captions."""

    path: Path
    name: str
    split: str
    captions: list[str] = field(default_factory=list)
    id: int | None = None


# ---------------------------------------------------------------- reading what is there


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _walk(folder: Path) -> Iterator[Path]:
    """Every file under `folder`, shallow ones first, in name order, without what macOS adds to archives."""
    for here, folders, files in sorted(os.walk(folder), key=lambda step: (step[0].count(os.sep), step[0])):
        folders.sort()
        if "__MACOSX" not in Path(here).parts:
            yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))


def _source_folder(source: Path) -> Path:
    if not source.exists():
        raise InputError(f"{source} does not exist; name the folder that the data set was unpacked into.")
    return source if source.is_dir() else source.parent


def _index_photos(folder: Path) -> dict[str, Path]:
    """File name -> path of every photo under `folder`."""
    photos: dict[str, Path] = {}
    for path in _walk(_source_folder(folder)):
        if path.suffix.lower() in PHOTO_SUFFIXES:
            photos.setdefault(path.name, path)
    if not photos:
        raise InputError(f"{folder} holds no photos; name the folder with the photos with --photos.")
    return photos


def _read_token_file(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, photo name, caption) of Flickr's own format: `name.jpg#0<tab>caption`."""
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, hash_sign, _ = key.rpartition("#")
        if not tab or not hash_sign or not caption.strip():
            raise InputError(f"{path}, line {number}, is not of the form NAME.jpg#0<tab>CAPTION.")
        yield number, name.strip(), caption.strip()


def _column(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise InputError(f"{where}, has no {names[0]} (a column called {' or '.join(names)}).")


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a CSV file with a header, or of a JSON Lines file."""
    text = _read_text(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}, is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}, is not a JSON object.")
            yield number, row
        return
    header = text.split("\n", 1)[0]
    delimiter = next((mark for mark in "|;\t" if mark in header and "," not in header), ",")
    # Flickr30k as people pass it on is separated by "| " with the space, and not quoted at all.
    quoting = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        for cells in reader:
            if len(cells) > len(columns):
                raise InputError(
                    f"{path}, line {reader.line_num}, has more columns than the header's {len(columns)}; "
                    "put a caption that contains the separator in double quotes."
                )
            if cells:
                yield reader.line_num, dict(zip(columns, (cell.strip() for cell in cells), strict=False))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}, is not CSV: {error}.") from error


def _read_captions(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, photo name, caption) of a Flickr data set's captions, in any of the forms it is passed on in."""
    if ".token" in path.name:
        yield from _read_token_file(path)
        return
    for number, row in _read_table(path):
        where = f"{path}, line {number}"
        # One row of the Flickr30k CSV in circulation lacks the separator between its last two columns.
        glued = re.fullmatch(r"\d+\s+(.+)", row.get("comment_number", ""))
        caption = glued[1] if glued and not row.get("comment") else _column(row, CAPTION_COLUMNS, where)
        yield number, _column(row, PHOTO_COLUMNS, where), caption


def _assign_splits(names: list[str], source: Path) -> dict[str, str]:
    """90% train, 5% val, 5% test (at least one each), by a hash of the name: the same on every machine."""
    if len(names) < 3:
        raise InputError(f"{source} has captions for {len(names)} photos; three are the least to split.")
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = max(1, len(order) // 20)
    return {
        name: "val" if rank < held_out else "test" if rank < 2 * held_out else "train"
        for rank, name in enumerate(order)
    }


# ---------------------------------------------------------------- writing our layout


def write_dataset(photos: list[Photo], destination: Path) -> None:
    """Write `photos` in COCO's layout: `images/{split}/` and `annotations/captions_{split}.json`, no year.

    A test split gets an `image_info_test.json` too, as COCO has one.

    Raises:
        InputError: `destination` holds something already, or a photo cannot be read as an image.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination} exists and is not empty; delete it or name another folder.")
    order = ("train", "val", "test")
    photos = sorted((p for p in photos if p.captions), key=lambda photo: order.index(photo.split))
    if not any(photo.split == "train" for photo in photos):
        raise InputError(f"nothing to write to {destination}: no photo of a training split has a caption.")

    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_into(partial, photos, destination.name)
        if destination.exists():
            destination.rmdir()
        os.replace(partial, destination)
    except OSError as error:
        raise InputError(f"{destination} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

    counts = [f"{sum(p.split == s for p in photos):,} {s}" for s in order]
    captions = sum(len(photo.captions) for photo in photos)
    print(f"{destination}: {', '.join(counts)} photos, {captions:,} captions")


def _write_into(folder: Path, photos: list[Photo], description: str) -> None:
    documents: dict[str, dict[str, Any]] = {}
    caption_id = 0
    (folder / "annotations").mkdir(parents=True)
    for number, photo in enumerate(tqdm(photos, desc="photos", unit="photo", disable=None), 1):
        try:
            with Image.open(photo.path) as image:
                width, height = image.size
        except Exception as error:  # a broken file makes Pillow raise nearly anything
            raise InputError(f"{photo.path} cannot be read as an image; replace or remove it.") from error
        target = folder / "images" / photo.split / photo.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(photo.path.resolve(), target)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(photo.path, target)
        image_id = number if photo.id is None else photo.id
        document = documents.setdefault(photo.split, {"images": [], "annotations": []})
        document["images"].append({"id": image_id, "file_name": photo.name, "width": width, "height": height})
        for caption in photo.captions:
            caption_id += 1
            document["annotations"].append({"id": caption_id, "image_id": image_id, "caption": caption})
    for split, document in documents.items():
        document = {"info": {"description": description}, "licenses": [], **document}
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(document))
        if split == "test":
            del document["annotations"]
            (folder / "annotations" / "image_info_test.json").write_text(json.dumps(document))


# ---------------------------------------------------------------- the original's weights


class _OriginalVocabulary:
    """Holds the attributes of the original's pickled `vocabulary.Vocabulary`; it has no code to run."""


class _VocabularyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("vocabulary", "Vocabulary"):
            return _OriginalVocabulary
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_vocab_pickle(path: Path) -> list[str]:
    """The words of the original's `vocab.pkl`, in the order of their indices.

    Nothing that the pickle asks for is imported or called: it may build one plain object, of words and
    numbers, and is refused otherwise.

    Returns:
        Every word, `<start>`, `<end>` and `<unk>` first: the word at position i has index i.

    Raises:
        InputError: The file cannot be read, asks for more than a vocabulary, or is not a whole vocabulary.
    """
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise InputError(f"{path} is larger than a vocabulary can be ({MAX_PICKLE_BYTES:,} bytes).")
        data = path.read_bytes()
        # Unpickling reserves memory for the largest memo number, which a hostile file makes enormous.
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name.endswith("PUT") and argument > len(data):
                raise pickle.UnpicklingError("its numbering is absurd")
        vocabulary = _VocabularyUnpickler(io.BytesIO(data)).load()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"{path} is not a vocabulary of the original recipe: {error}.") from error

    indices = getattr(vocabulary, "word2idx", None)
    if not isinstance(vocabulary, _OriginalVocabulary) or not isinstance(indices, dict):
        raise InputError(f"{path} holds no vocabulary of the original recipe.")
    words = {index: word for word, index in indices.items() if type(word) is str and type(index) is int}
    if sorted(words) != list(range(len(indices))):
        raise InputError(f"{path} is not a whole vocabulary: its indices are not 0 to {len(indices) - 1}.")
    ordered = [words[index] for index in range(len(words))]
    if ordered[:3] != ["<start>", "<end>", "<unk>"]:
        raise InputError(f"{path} begins with {ordered[:3]} where <start>, <end>, <unk> should be.")
    return ordered


def import_weights(
    encoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")],
    decoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DECODER")],
    vocab: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VOCAB")],
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
) -> None:
    """Weights and vocabulary that the original recipe's code trained, as a model's folder of this project.

    Args:
        encoder: Its encoder-<i>.pkl.
        decoder: Its decoder-<i>.pkl.
        vocab: The vocab.pkl of the same training.
        folder: The model to write; it must not exist yet, or be empty.
    """
    import torch  # takes seconds, and the other importers do without

    from captioning import checkpoint
    from captioning.weights import load_weights, read_state_dict
    from model import DecoderRNN, EncoderCNN

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; delete it or name another folder.")
    words = read_vocab_pickle(vocab)
    states = {path: read_state_dict(path) for path in (encoder, decoder)}

    def size(path: Path, key: str, dimension: int) -> int:
        tensor = states[path].get(key)
        if tensor is None or tensor.ndim != 2:
            raise InputError(f"{path} is not of the original recipe: it has no matrix {key}.")
        return tensor.shape[dimension]

    vocabulary_size, embed_size = size(decoder, "embed.weight", 0), size(decoder, "embed.weight", 1)
    if vocabulary_size != len(words):
        raise InputError(
            f"{decoder} was trained with {vocabulary_size:,} words and {vocab} has {len(words):,}; "
            "take the vocab.pkl of the same training."
        )
    if size(encoder, "embed.weight", 0) != embed_size:
        raise InputError(
            f"{encoder} gives {size(encoder, 'embed.weight', 0)} numbers a photo and {decoder} takes "
            f"{embed_size}; take two files of the same training."
        )
    parts = checkpoint.Architecture(
        decoder="lstm",
        embed_size=embed_size,
        hidden_size=size(decoder, "linear.weight", 1),
        num_layers=max(1, sum(key.startswith("lstm.weight_ih_l") for key in states[decoder])),
        dropout=0.0,
        backbone="resnet50",
        backbone_weights="epoch",
    )
    with torch.device("meta"):
        modules = (
            EncoderCNN(embed_size, weights="random"),
            DecoderRNN(embed_size, parts.hidden_size, vocabulary_size, parts.num_layers),
        )
    for module, path in zip(modules, (encoder, decoder), strict=True):
        load_weights(module, states[path], path)

    number = re.search(r"-(\d+)$", encoder.stem)
    epoch = max(1, int(number[1])) if number else 1
    description = checkpoint.Description(
        architecture=parts,
        preprocessing=checkpoint.Preprocessing(image_size=224),
        vocabulary=words,
        environment=checkpoint.environment(),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_epoch(folder, epoch, *modules, description)
        checkpoint.write_description(folder, description)  # last: it makes the folder a model's
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}.") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    print(f"{folder}: {len(words):,} words, {embed_size} to {parts.hidden_size}, epoch {epoch}")


# ---------------------------------------------------------------- the importers


def import_flickr(
    source: Source,
    destination: Destination,
    photos: Path | None = None,
) -> None:
    """Flickr8k or Flickr30k, in their own files or as a captions.txt / results.csv, into COCO's layout.

    The split files that are there (*trainImages.txt, *devImages.txt, *testImages.txt, or train.txt,
    val.txt, test.txt) say which photo belongs where; captions of other photos are left out. Without
    split files the photos are divided 90 : 5 : 5 by a hash of their names.

    Args:
        source: The folder that the data set was unpacked into; files are looked for in its subfolders too.
        destination: The data set to write; it must not exist yet, or be empty.
        photos: Folder with the photos, when they are not under source.
    """
    folder = _source_folder(source)
    files = [path for path in _walk(folder) if path.suffix.lower() in (".txt", ".csv", ".token")]
    tables = [p for p in files if ".token" in p.name and ".lemma" not in p.name]
    tables += [p for p in files if p.name.lower() in ("captions.txt", "captions.csv", "results.csv")]
    if not tables:
        raise InputError(f"{folder} has no captions: no *.token.txt, captions.txt or results.csv in it.")
    available = _index_photos(photos or folder)

    captions: dict[str, list[str]] = {}
    for _, name, caption in _read_captions(tables[0]):
        captions.setdefault(name, []).append(caption)

    wanted: dict[str, Photo] = {}
    for path in files:
        match = re.search(r"(?:^|[_.\-])(train|dev|val|test)(?:images)?$", path.stem, re.IGNORECASE)
        if not match or path.suffix.lower() != ".txt":
            continue
        split = SPLITS[match[1].lower()]
        for number, line in enumerate(_read_text(path).splitlines(), 1):
            name = line.strip()
            if not name:
                continue
            if not Path(name).suffix:  # Flickr30k's split files give the number alone
                name += ".jpg"
            if name in wanted and wanted[name].split != split:
                raise InputError(f"{path}, line {number}: {name} is in the {wanted[name].split} split already.")
            if name not in captions:
                raise InputError(f"{path}, line {number}: {name} has no caption in {tables[0]}.")
            if name not in available:
                raise InputError(f"{path}, line {number}: {name} is not under {photos or folder}.")
            wanted[name] = Photo(available[name], name, split, captions[name])
    if not wanted:
        # Flickr8k's captions name one photo that was never part of it (2258277193_586949ec62.jpg.1).
        absent = [name for name in captions if name not in available]
        if absent:
            print(f"left out {len(absent):,} photos that are not there, {absent[0]} first", file=sys.stderr)
        splits = _assign_splits([name for name in captions if name in available], tables[0])
        wanted = {name: Photo(available[name], name, splits[name], captions[name]) for name in splits}
    write_dataset(list(wanted.values()), destination)


def import_karpathy(
    source: Source,
    destination: Destination,
    photos: Path | None = None,
) -> None:
    """Karpathy's splits (dataset_coco.json, or that of Flickr8k or Flickr30k) into COCO's layout.

    His "restval" photos go to the training split, as in the papers that report on these splits
    (arXiv 1412.2306). COCO's image ids are kept.

    Args:
        source: The dataset_*.json file, or the folder that holds it.
        destination: The data set to write; it must not exist yet, or be empty.
        photos: Folder with the photos, when they are not under source.
    """
    folder = _source_folder(source)
    found = [source] if source.is_file() else [p for p in _walk(folder) if p.match("dataset_*.json")]
    if len(found) != 1:
        raise InputError(f"{folder} holds {len(found)} dataset_*.json files; name the one to import.")
    path = found[0]
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{path} is not a Karpathy split: it should be JSON with a list `images`.")
    available = _index_photos(photos or folder)

    result = []
    for number, entry in enumerate(entries):
        try:
            name, split = entry["filename"], SPLITS[entry["split"]]
            captions = [" ".join(sentence["raw"].split()) for sentence in entry["sentences"]]
            image_id = entry.get("cocoid")
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, images[{number}]: {error} is missing or unknown.") from error
        if not isinstance(name, str) or name not in available:
            raise InputError(f"{path}, images[{number}]: {name} is not under {photos or folder}.")
        if image_id is not None and type(image_id) is not int:
            raise InputError(f"{path}, images[{number}]: the cocoid {image_id} is not a whole number.")
        captions = [caption for caption in captions if caption]
        result.append(Photo(available[name], name, split, captions, image_id))
    write_dataset(result, destination)


def import_folder(
    source: Source,
    destination: Destination,
    photos: Path | None = None,
) -> None:
    """Your own photos with a CSV or JSON Lines file of captions into COCO's layout.

    One row a caption: a column photo (or image, or file_name) with the photo's path below the photos'
    folder, a column caption, and, if you like, a column split (train, val or test). Without it, the
    photos are divided 90 : 5 : 5 by a hash of their names.

    Args:
        source: The .csv or .jsonl file, or a folder with exactly one of them.
        destination: The data set to write; it must not exist yet, or be empty.
        photos: Folder with the photos, when it is not the one that holds the captions.
    """
    folder = _source_folder(source)
    tables = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in (".csv", ".jsonl", ".ndjson")]
    if source.is_file():
        tables = [source]
    if len(tables) != 1:
        raise InputError(f"{folder} holds {len(tables)} .csv or .jsonl files; name the one with the captions.")
    path, root = tables[0], _source_folder(photos or folder).resolve()

    result: dict[str, Photo] = {}
    for number, row in _read_table(path):
        where = f"{path}, line {number}"
        name, caption = _column(row, PHOTO_COLUMNS, where), _column(row, CAPTION_COLUMNS, where)
        if not isinstance(name, str) or not isinstance(caption, str):
            raise InputError(f"{where}: photo and caption must be text.")
        target = Path(os.path.normpath(root / name))
        if not target.is_relative_to(root):
            raise InputError(f"{where}: {name} is outside of {root}; move it there or use --photos.")
        name = target.relative_to(root).as_posix()
        if name not in result and not os.path.isfile(target):  # False for a name that no file can have, too
            raise InputError(f"{where}: {name} is not in {root}.")
        split = str(row.get("split") or "").strip().lower()
        if split and split not in SPLITS:
            raise InputError(f"{where}: the split {split!r} is none of train, val and test.")
        photo = result.setdefault(name, Photo(target, name, SPLITS.get(split, "")))
        if photo.split != SPLITS.get(split, ""):
            raise InputError(f"{where}: {name} has another split in an earlier line.")
        photo.captions.append(caption.strip())

    given = {bool(photo.split) for photo in result.values()}
    if given == {True, False}:
        raise InputError(f"{path} gives some photos a split and others none; give all or none of them one.")
    if given != {True}:
        splits = _assign_splits(list(result), path)
        for name, photo in result.items():
            photo.split = splits[name]
    write_dataset(list(result.values()), destination)


def main() -> None:
    """The command line: one subcommand an importer."""
    tyro.extras.subcommand_cli_from_dict(
        {
            "flickr8k": import_flickr,
            "flickr30k": import_flickr,
            "karpathy": import_karpathy,
            "folder": import_folder,
            "weights": import_weights,
        },
        description="Turn other data sets, and the original recipe's weights, into this project's layouts.",
    )


if __name__ == "__main__":
    run_command(main)
