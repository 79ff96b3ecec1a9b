"""Convert other data sets to COCO's layout, and the original recipe's weights to a model folder.

    python importers.py flickr8k SOURCE data/flickr8k      (flickr30k, karpathy and folder likewise)
    python importers.py merge data/coco data/flickr8k data/both
    python importers.py average models/coco models/average --epochs 8 11

An import is built in a temporary folder next to its destination and renamed at the end, so that an interrupted one
leaves no incomplete data set. Images are hard links where the file system allows it, which take no space but must not
be edited in place, and copies elsewhere.
"""

from __future__ import annotations

import os
import re
import signal
import unicodedata
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, which take seconds, without a traceback

import tyro

from captioning.annotations import parse_image_id
from captioning.captions import clean_caption, find_marks
from captioning.coco_layout import COCO_PREFIX, SourceImage, write_dataset
from captioning.errors import InputError, log, run_command
from captioning.files import hash_file, read_text, require_access, require_new_folder
from captioning.folder_captions import read_captions_of_folder, read_tables, require_one_folder
from captioning.image_formats import image_suffixes
from captioning.image_index import ImageIndex, walk_files
from captioning.reports import Report
from captioning.splits import (
    assign_splits,
    read_split_files,
    report_split_lists,
    report_split_name,
    set_split,
    splits_by_folder,
)
from captioning.tables import SPLIT_FILE, Row, parse_split, read_json, read_table, read_token_file, starts_as_token_file

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Sources = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE SOURCE ...")]
Models = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL [MODEL ...] OUT")]
Destination = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]


def _source_folder(source: Path) -> Path:
    require_access(source)
    if not os.path.exists(source):  # unlike Path.exists, also False for a name that no file can have
        raise InputError(f"{source} does not exist; name the folder that the data set was unpacked into.")
    return source if source.is_dir() else source.parent


def _image_folder(images: Path | None, folder: Path) -> Path:
    """Return the folder that --images names, else `folder`."""
    if images is None:
        return folder
    if os.path.isfile(images):
        raise InputError(f"{images} is a file; unpack it if it is an archive, and name the folder with --images.")
    return _source_folder(images)


def _write(images: list[SourceImage], source: Path, destination: Path, report: Report) -> None:
    """Write the images that have captions, and report what is left out."""
    captioned = [image for image in images if image.captions]
    for image in images:
        if not image.captions:
            report.add("image{s} without a caption", str(image.path))
    if not captioned:
        about = "; ".join(report.lines())
        raise InputError(f"{source} has no image with a caption{f' ({about})' * bool(about)}; nothing was written.")
    assign_splits(captioned, source, report)
    if not any(image.split == "train" for image in captioned):
        log(f"all images of {source} are of other splits; there is none to train on")
    write_dataset(captioned, destination)
    report.print()


def _captions(row: Row, report: Report) -> list[str]:
    for caption in row.captions:
        if not caption:
            report.add("empty caption{s}", row.where)
        elif marks := find_marks(caption):
            report.add(marks, row.where, "read")
        elif " " not in caption and Path(caption).suffix.lower() in image_suffixes():
            report.add("caption{s} that are names of images", row.where, "read")
    return [caption for caption in row.captions if caption]


def _find_images(rows: list[Row], index: ImageIndex, anywhere: bool = False) -> list[str | None]:
    """Find the images of rows: their keys in the index, None where there is none.

    If the index holds none of the names, they may repeat the end of its folder's path, as images/0.jpg in images/ does.
    If that does not help either, or with `anywhere`, images are found in subfolders, too.
    """
    folder = Path(os.path.abspath(index.folder)).parts
    names = [row.image for row in rows]
    for paths in (names, [_without_overlap(folder, name) for name in names]):
        if index.holds_any(paths):
            return [index.find(path, row.where, anywhere) for path, row in zip(paths, rows, strict=True)]
    return [index.find(row.image, row.where, anywhere=True) for row in rows]


def _without_overlap(folder: tuple[str, ...], name: str) -> str:
    """Return the name without its first folders if the path of `folder` ends in them."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    overlap = next((count for count in range(len(parts) - 1, 0, -1) if folder[-count:] == parts[:count]), 0)
    return "/".join(parts[overlap:]) if overlap else name


def _missing_image(row: Row, index: ImageIndex) -> InputError:
    """Return the error for a row whose image is missing; it gives an image of a similar name, if there is one."""
    wanted = row.image.replace("\\", "/").casefold()
    stem = _stem(row.image.replace("\\", "/"))
    near = [key for key in index.paths if _stem(key) == stem]
    near.sort(key=lambda key: key.casefold() != wanted)  # names that differ in case only come first
    there = f" (there is {near[0]})" if near else ""
    advice = "correct its name, remove the row, or name the folder that holds it with --images"
    if near and re.match(r"/|\.\./|[a-z]:/", wanted):  # as of another computer
        advice = f"write paths relative to {index.folder}, such as {near[0]}, in every row"
    return InputError(f"{row.where}: {row.image:.200} is not under {index.folder}{there}; {advice}.")


def _stem(name: str) -> str:
    """Return what the names of an image in several editions of COCO share."""
    return COCO_PREFIX.sub("", PurePosixPath(name).stem).casefold()


# Flickr8k and Flickr30k


def import_flickr(
    source: Source, destination: Destination, images: Path | None = None, encoding: str | None = None
) -> None:
    """Convert Flickr8k or Flickr30k, in their own files or with a captions.txt or results.csv, to COCO's layout.

    Split files (*trainImages.txt, *devImages.txt, *testImages.txt, or train.txt, val_list.txt, test_ids.csv), if any,
    list the images of each split; other images are left out. Without them, splits come from a column of the captions or
    from folders called train, val and test that hold all images; otherwise images are divided about 90 : 5 : 5 by a
    hash of their names. If only the validation split is missing, it takes 5% of the training images.

    Args:
        source: The folder that the data set was unpacked into, subfolders included, or its file of captions.
        destination: The data set to write; it must not exist yet, or be empty.
        images: Folder with the images, when they are not under source.
        encoding: Encoding of the captions, such as cp1252, when it is neither UTF-8 nor marked as UTF-16.
    """
    require_new_folder(destination)
    folder, report = _source_folder(source), Report()
    files = [path for path in walk_files(folder) if path.suffix.lower() in (".txt", ".csv", ".token")]
    table = _flickr_captions(folder, files) if source.is_dir() else source
    captions: dict[str, list[str]] = {}  # by the name of the image in Unicode's composed form
    splits: dict[str, tuple[str, str]] = {}  # image name -> (line that gives its split, split)
    is_named_token = ".token" in table.name.lower() and table.suffix.lower() != ".csv"
    is_token_file = is_named_token or starts_as_token_file(table, encoding)
    table_rows = list(read_token_file(table, encoding) if is_token_file else read_table(table, encoding, report))
    for row in table_rows:
        row.image = unicodedata.normalize("NFC", row.image)
        captions.setdefault(row.image, []).extend(_captions(row, report))
        if row.split:
            set_split(splits, row.image, row.where, row.split)
    index = ImageIndex(_image_folder(images, folder))
    require_one_folder(table_rows, index)
    split_files = [path for path in files if path != table and SPLIT_FILE.search(path.stem)]
    read_split_files(split_files, captions, table, encoding, splits)
    rows: list[Row] = []
    for name, texts in captions.items():
        if split_files and name not in splits:
            report.add("image{s} in no split file", name)
        else:
            where, split = splits.get(name, (str(table), ""))
            rows.append(Row(where, name, texts, split))
    keys: dict[str, Row] = {}
    for row, key in zip(rows, _find_images(rows, index, anywhere=images is None), strict=True):
        if key is None and row.split:
            raise _missing_image(row, index)
        if key is None:  # Flickr8k has captions of an image that is not part of it (2258277193_586949ec62.jpg.1)
            report.add(f"captioned image{{s}} not under {index.folder}", row.image)
        elif key in keys:
            both = f"{row.image} and {keys[key].image} are both {index.paths[key][0]}"
            raise InputError(f"{row.where}: {both}; name it once.")
        else:
            keys[key] = row
    if rows and not keys:
        raise _missing_image(rows[0], index)
    if not split_files:
        for key in sorted(index.paths.keys() - keys.keys()):
            report.add("image{s} without a caption", str(index.paths[key][0]))
        if not splits:
            unread = (path for path in walk_files(folder) if path != table)
            report_split_lists(unread, folder, index, report, "write the names in train.txt, val.txt and test.txt")
            for key, split in splits_by_folder(keys, report).items():
                keys[key].split = split
    _write(_name_images(keys, index), table, destination, report)


def _name_images(rows: dict[str, Row], index: ImageIndex) -> list[SourceImage]:
    """Build the images of rows by their keys in the index; file names are kept if they are unique in their split."""
    names = Counter((row.split, key.rpartition("/")[2]) for key, row in rows.items())
    images = []
    for key, row in rows.items():
        name = key.rpartition("/")[2]
        name = name if names[row.split, name] == 1 else key
        images.append(SourceImage(index.paths[key][0], name, row.split, row.captions))
    return images


def _flickr_captions(folder: Path, files: list[Path]) -> Path:
    tables = [path for path in files if ".token" in path.name.lower() and ".lemma" not in path.name.lower()]
    tables += [path for path in files if path.name.lower() in ("captions.txt", "captions.csv", "results.csv")]
    tables = list({hash_file(path): path for path in reversed(tables)}.values())
    if not tables:
        raise InputError(f"{folder} has no captions: no *.token.txt, captions.txt or results.csv in it.")
    if len(tables) > 1:
        raise InputError(f"{folder} has captions in {tables[1]} and in {tables[0]}; name the file to import.")
    return tables[0]


# Karpathy's splits


def import_karpathy(source: Source, destination: Destination, images: Path | None = None) -> None:
    """Convert Karpathy's splits of COCO, Flickr8k or Flickr30k (dataset_*.json) to COCO's layout.

    The "restval" images go to the training split, as in the papers that use these splits (arXiv 1412.2306).
    COCO's image ids are kept. Images are found by their filepath and filename. If there is no validation
    split, it takes 5% of the training images.

    Args:
        source: The dataset_*.json file, or the folder that holds it.
        destination: The data set to write; it must not exist yet, or be empty.
        images: Folder with the images, when they are not under source.
    """
    require_new_folder(destination)
    folder, report = _source_folder(source), Report()
    paths = [path for path in walk_files(folder) if path.match("dataset_*.json")] if source.is_dir() else [source]
    if len(paths) != 1:
        raise InputError(f"{folder} holds {len(paths)} dataset_*.json files; name the one to import.")
    content = read_json(paths[0], read_text(paths[0]))
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{paths[0]} is not a Karpathy split: it should be JSON with a list `images`.")
    rows = [_karpathy_row(entry, f"{paths[0]}, images[{number}]") for number, entry in enumerate(entries)]

    index = ImageIndex(_image_folder(images, folder))
    direct = index.holds_any(row.image for row in rows)
    keys_of_rows = [index.find(row.image, row.where, anywhere=not direct) for row in rows]
    if not any(keys_of_rows):  # all images in one folder, whatever their filepath
        keys_of_rows = [index.find(row.image.rpartition("/")[2], row.where) for row in rows]
        for row in rows:
            report.add("image{s} outside the folder that filepath names", row.image, "took")
    keys: dict[str, Row] = {}
    for row, key in zip(rows, keys_of_rows, strict=True):
        if key is None:
            raise _missing_image(row, index)
        if key in keys:
            raise InputError(f"{row.where}: {index.paths[key][0]} is the image of {keys[key].where} already.")
        keys[key] = row
    result = _name_images(keys, index)
    for image, row, entry in zip(result, rows, entries, strict=True):
        image.captions, image.id = _captions(row, report), _karpathy_id(entry, row.where)
    _write(result, paths[0], destination, report)


def _karpathy_row(entry: Any, where: str) -> Row:
    try:
        folder, name, split, sentences = (
            entry.get("filepath") or "",
            entry["filename"],
            entry["split"],
            entry["sentences"],
        )
        captions = [clean_caption(_karpathy_caption(sentence), where) for sentence in sentences]
        image = f"{folder.rstrip('/')}/{name}" if folder else name
    except KeyError as error:
        raise InputError(f"{where}: {error} is missing.") from None
    except (TypeError, AttributeError):
        raise InputError(f"{where} is not an entry with filename, split and sentences as Karpathy has them.") from None
    known_split = parse_split(split) if isinstance(split, str) else None
    if known_split is None or not isinstance(name, str):
        raise InputError(f"{where}: the split {split!r:.80} is unknown, or the filename {name!r:.80} is not text.")
    return Row(where, image, captions, known_split)


def _karpathy_id(entry: dict[str, Any], where: str) -> int | None:
    try:
        return None if entry.get("cocoid") is None else parse_image_id(entry["cocoid"])
    except InputError as error:
        raise InputError(f"{where} {error} (its cocoid).") from None


def _karpathy_caption(sentence: dict[str, Any]) -> str:
    if "raw" in sentence:
        return sentence["raw"]
    if not isinstance(sentence["tokens"], list):
        raise TypeError
    return " ".join(sentence["tokens"])


# Folders of images with captions


def import_folder(
    source: Source, destination: Destination, images: Path | None = None, encoding: str | None = None
) -> None:
    """Convert your own images, with a table of captions or a file per image, to COCO's layout.

    A table is CSV, TSV, JSON Lines or JSON with one list, such as Hugging Face's metadata.csv or metadata.jsonl. Its
    columns are photo (or image, file_name, filename), the image's path relative to the folder of images; caption (or
    text, or caption_1, caption_2 and so on); and optionally split: train, val or test. Instead of a table, each image
    may have a file of its own: for 0.jpg, 0.txt, 0.caption or 0.jpg.txt with one caption per line, or 0.json with
    "caption" or "captions".

    Splits come from the column split (or set, subset or the only other that names a split in every row), from the
    name of a JSON file's only list of rows, from the name of a table (train.csv), or from folders called train, val and
    test (also val2017 or test_images) that hold all images; otherwise images are divided about 90 : 5 : 5 by a hash of
    their names. If only the validation split is missing, it takes 5% of the training images.

    Args:
        source: The table, or a folder with one table, one per split, metadata files or a file per image.
        destination: The data set to write; it must not exist yet, or be empty.
        images: Folder with the images, when it is not the one that holds the captions.
        encoding: Encoding of the captions, such as cp1252, when it is neither UTF-8 nor marked as UTF-16.
    """
    require_new_folder(destination)
    folder, report = _source_folder(source), Report()
    rows, kind = ([], "") if source.is_dir() else (read_tables([source], folder, encoding, report), "row")
    index = ImageIndex(_image_folder(images, folder))
    if source.is_dir():
        rows, kind = read_captions_of_folder(folder, index, encoding, report)
    else:
        texts = (path for path in folder.iterdir() if path.is_file() and path.stem not in index.by_stem)
        report_split_lists(sorted(path for path in texts if path != source), folder, index, report)
    result: dict[str, SourceImage] = {}
    first: dict[str, str] = {}  # where each image's first row is
    require_one_folder(rows, index)
    for row, key in zip(rows, _find_images(rows, index), strict=True):
        if key is None:
            raise _missing_image(row, index)
        image = result.setdefault(key, SourceImage(index.paths[key][0], key, row.split))
        first.setdefault(key, row.where)
        if image.split != row.split:
            raise InputError(f"{row.where}: {key} has another split in {first[key]}.")
        captions = _captions(row, report)
        if not set(captions).isdisjoint(image.captions):
            report.add("row{s} with a caption that its image has already", row.where, "read")
        image.captions += captions
    for key in sorted(index.paths.keys() - result.keys()):
        report.add(f"image{{s}} without a {kind}", str(index.paths[key][0]))
    for path in index.unreadable:
        report.add("HEIC image{s} that `pip install pillow-heif` makes readable", str(path))
    if not any(image.split for image in result.values()):
        by_folder = splits_by_folder(result, report)
        for key, split in by_folder.items():
            result[key].split = split
        if not by_folder:
            report_split_name(source, report)
    _write(list(result.values()), source, destination, report)


# Merging, and the original recipe's weights


def merge(sources: Sources, destination: Destination) -> None:
    """Merge data sets in COCO's layout into one, split by split.

    The name of its data set's folder is prepended to an image's name. Image ids that occur twice are changed; captions
    are not.

    Args:
        sources: Two or more data sets, with or without a year in the names of their files.
        destination: The data set to write; it must not exist yet, or be empty.
    """
    from captioning.merging import merge_datasets  # imports NLTK, which takes half a second

    merge_datasets(list(sources), destination)


def import_weights(
    encoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")],
    decoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DECODER")],
    vocab: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VOCAB")],
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
) -> None:
    """Convert weights and vocabulary trained with the original recipe's code to a model folder.

    Args:
        encoder: The encoder-<i>.pkl.
        decoder: The decoder-<i>.pkl of the same run.
        vocab: The vocab.pkl of the same run.
        folder: The model to write; it must not exist yet, or be empty.
    """
    from captioning.original_weights import convert_weights  # imports torch, which takes seconds

    convert_weights(encoder, decoder, vocab, folder)


def average(models: Models, epochs: tuple[int, ...] = ()) -> None:
    """Average the weights of several epochs of a model, or of the best epochs of several models, into one model.

    Args:
        models: The trained model, or models that differ in their weights only, and then the model to write, which must
            not exist yet, or be empty.
        epochs: Two or more epochs of one model that were saved, such as the best by cross-entropy and by CIDEr-D.
    """
    from captioning.averaging import average_weights  # imports torch, which takes seconds

    if len(models) < 2:
        raise InputError("name the model, or several, and then the folder to write: importers.py average MODEL OUT.")
    *sources, folder = models  # two positional arguments would take the epochs on a command line
    average_weights(sources, epochs, folder)


def main() -> None:
    """Run the command line, which has a subcommand for each importer."""
    tyro.extras.subcommand_cli_from_dict(
        {
            "flickr8k": import_flickr,
            "flickr30k": import_flickr,
            "karpathy": import_karpathy,
            "folder": import_folder,
            "merge": merge,
            "weights": import_weights,
            "average": average,
        },
        description="Convert other data sets and weights to this project's layouts, or average weights.",
        config=(tyro.conf.DisallowNone,),
    )


if __name__ == "__main__":
    run_command(main)
