import builtins
import contextlib
import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

import caption
import evaluate
import importers
from captioning import checkpoint
from captioning.captioner import Captioner, Decoding
from captioning.errors import InputError
from captioning.images import build_transform, read_photo
from captioning.training import train
from data_loader import CaptionDataset
from model import DecoderRNN
from vocabulary import Vocabulary

DATA = Path(__file__).parents[2] / "shared" / "data"


def photo(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (len(path.name) % 256, 0, 0)).save(path, "JPEG")
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def captions(destination: Path, split: str) -> dict[str, list[str]]:
    document = json.loads((destination / "annotations" / f"captions_{split}.json").read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    assert len(names) == len(document["images"])
    result: dict[str, list[str]] = {name: [] for name in names.values()}
    for annotation in document["annotations"]:
        result[names[annotation["image_id"]]].append(annotation["caption"])
    return result


@pytest.fixture
def flickr8k(tmp_path: Path) -> Path:
    """Flickr8k as its two archives unpack: photos and texts apart, with what macOS adds, and its oddity."""
    source = tmp_path / "Flickr8k"
    names = ["1_a.jpg", "2_b.jpg", "3_c.jpg", "4_d.jpg", "5_e.jpg"]
    for name in names:
        photo(source / "Flicker8k_Dataset" / name)
    lines = [f"{name}#{i}\tA dog number {i} runs ." for name in names for i in range(5)]
    lines += [f"2258277193_586949ec62.jpg.1#{i}\tPeople wait ." for i in range(5)]
    folder = source / "Flickr8k_text"
    text(folder / "Flickr8k.token.txt", "\n".join(lines) + "\n")
    text(folder / "Flickr8k.lemma.token.txt", "not\tthis one")
    text(source / "__MACOSX" / "._Flickr8k.token.txt", "nor this")
    text(folder / "Flickr_8k.trainImages.txt", "1_a.jpg\n2_b.jpg\n")
    text(folder / "Flickr_8k.devImages.txt", "3_c.jpg\n")
    text(folder / "Flickr_8k.testImages.txt", "4_d.jpg\n")
    return source


def test_flickr8k_in_its_own_files(flickr8k, tmp_path):
    destination = tmp_path / "data" / "flickr8k"
    importers.import_flickr(flickr8k, destination)
    assert set(captions(destination, "train")) == {"1_a.jpg", "2_b.jpg"}
    assert captions(destination, "val") == {"3_c.jpg": [f"A dog number {i} runs ." for i in range(5)]}
    assert set(captions(destination, "test")) == {"4_d.jpg"}
    info = json.loads((destination / "annotations" / "image_info_test.json").read_text())
    assert "annotations" not in info
    assert info["images"] == [{"id": 4, "file_name": "4_d.jpg", "width": 8, "height": 6}]
    assert [p.name for p in (destination / "images" / "val").iterdir()] == ["3_c.jpg"]
    assert not (destination / "images" / "val" / "5_e.jpg").exists()


def test_photos_are_linked_not_copied_where_that_is_possible(flickr8k, tmp_path):
    importers.import_flickr(flickr8k, tmp_path / "out")
    linked = tmp_path / "out" / "images" / "train" / "1_a.jpg"
    assert os.path.samefile(linked, flickr8k / "Flicker8k_Dataset" / "1_a.jpg")


def test_photos_are_copied_where_links_are_not_possible(flickr8k, tmp_path, monkeypatch):
    def no_links(*_args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(importers.os, "link", no_links)
    importers.import_flickr(flickr8k, tmp_path / "out")
    copied, original = tmp_path / "out/images/train/1_a.jpg", flickr8k / "Flicker8k_Dataset/1_a.jpg"
    assert copied.read_bytes() == original.read_bytes()
    assert not os.path.samefile(copied, original)


def test_without_split_files_the_oddity_of_flickr8k_is_left_out(flickr8k, tmp_path, capsys):
    for path in (flickr8k / "Flickr8k_text").glob("*Images.txt"):
        path.unlink()
    importers.import_flickr(flickr8k, tmp_path / "out")
    parts = [captions(tmp_path / "out", split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [3, 1, 1]
    assert set().union(*parts) == {"1_a.jpg", "2_b.jpg", "3_c.jpg", "4_d.jpg", "5_e.jpg"}
    assert "2258277193_586949ec62.jpg.1" in capsys.readouterr().err


def test_captions_txt_with_quoted_commas(tmp_path):
    source = tmp_path / "kaggle"
    for i in range(4):
        photo(source / "Images" / f"{i}.jpg")
    rows = ["image,caption"] + [f'{i}.jpg,"A man , a dog and ""{i}"" balls ."' for i in range(4)]
    text(source / "captions.txt", "\n".join(rows))
    text(source / "train.txt", "0.jpg\n1.jpg\n2.jpg\n")
    text(source / "val.txt", "3.jpg\n")
    importers.import_flickr(source, tmp_path / "out")
    assert captions(tmp_path / "out", "val") == {"3.jpg": ['A man , a dog and "3" balls .']}
    assert not (tmp_path / "out" / "annotations" / "captions_test.json").exists()


def test_flickr30k_token_file_with_bare_numbers_in_the_splits(tmp_path):
    source = tmp_path / "flickr30k"
    for i in (1000092795, 10002456):
        photo(source / "flickr30k-images" / f"{i}.jpg")
    text(source / "results_20130124.token", "1000092795.jpg#0\tTwo men .\n10002456.jpg#0\tA crane .\n")
    text(source / "train.txt", "1000092795\n")
    text(source / "val.txt", "10002456\n")
    importers.import_flickr(source, tmp_path / "out")
    assert captions(tmp_path / "out", "train") == {"1000092795.jpg": ["Two men ."]}
    assert captions(tmp_path / "out", "val") == {"10002456.jpg": ["A crane ."]}


def test_flickr30k_csv_with_its_broken_row(tmp_path):
    source = tmp_path / "flickr30k"
    rows = ["image_name| comment_number| comment"]
    for name in ("1.jpg", "2.jpg", "2199200615.jpg"):
        photo(source / "flickr30k_images" / name)
        rows.append(f'{name}| 0| A dog "runs" , across the grass .')
    text(source / "results.csv", "\n".join([*rows, "2199200615.jpg| 4   A dog runs across the grass ."]))
    importers.import_flickr(source, tmp_path / "out")
    found = {k: v for split in ("train", "val", "test") for k, v in captions(tmp_path / "out", split).items()}
    assert found["1.jpg"] == ['A dog "runs" , across the grass .']
    assert found["2199200615.jpg"][1] == "A dog runs across the grass ."


def karpathy(source: Path) -> Path:
    splits = ["train", "restval", "val", "test"]
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{i}.jpg",
            "imgid": i,
            "cocoid": 100 + i,
            "split": split,
            "sentids": [2 * i, 2 * i + 1],
            "sentences": [{"raw": f"A {split} photo.\n", "tokens": [], "imgid": i, "sentid": 2 * i}] * 2,
        }
        for i, split in enumerate(splits)
    ]
    for image in images:
        photo(source / image["filepath"] / image["filename"])
    return text(source / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))


def test_karpathy_splits_keep_coco_ids_and_train_on_restval(tmp_path):
    karpathy(tmp_path / "source")
    importers.import_karpathy(tmp_path / "source", tmp_path / "out")
    train = json.loads((tmp_path / "out/annotations/captions_train.json").read_text())
    assert [image["id"] for image in train["images"]] == [100, 101]
    assert captions(tmp_path / "out", "val") == {"COCO_val2014_2.jpg": ["A val photo.", "A val photo."]}
    assert set(captions(tmp_path / "out", "test")) == {"COCO_val2014_3.jpg"}


def test_karpathy_file_with_the_photos_elsewhere(tmp_path):
    path = karpathy(tmp_path / "coco")
    moved = text(tmp_path / "elsewhere" / "dataset_coco.json", path.read_text())
    with pytest.raises(InputError, match="holds no photos"):
        importers.import_karpathy(moved, tmp_path / "out")
    importers.import_karpathy(moved, tmp_path / "out", photos=tmp_path / "coco")
    assert len(captions(tmp_path / "out", "train")) == 2


def test_karpathy_names_the_entry_whose_photo_is_missing(tmp_path):
    karpathy(tmp_path / "source")
    (tmp_path / "source" / "val2014" / "COCO_val2014_2.jpg").unlink()
    with pytest.raises(InputError, match=r"dataset_coco.json, images\[2\]: COCO_val2014_2.jpg is not under"):
        importers.import_karpathy(tmp_path / "source", tmp_path / "out")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def only_sentences(act: Callable[[], object], destination: Path) -> None:
    """Import and read what came of it: that succeeds or raises `InputError`, and nothing else."""
    with contextlib.suppress(InputError):
        act()
        CaptionDataset(destination, vocab=Vocabulary(WORDS), cache=destination.parent / "cache")
    shutil.rmtree(destination, ignore_errors=True)


@quick
@given(
    ANY
    | st.fixed_dictionaries({"images": ANY})
    | st.fixed_dictionaries(
        {
            "images": st.lists(
                st.fixed_dictionaries(
                    {
                        "filename": st.just("a.jpg") | ANY,
                        "split": st.sampled_from(["train", "val"]) | ANY,
                        "sentences": st.lists(st.fixed_dictionaries({"raw": st.just("A dog.") | ANY})) | ANY,
                    },
                    optional={"cocoid": ANY},
                ),
                max_size=2,
            )
        }
    )
)
def test_any_karpathy_file(tmp_path, content):
    photo(tmp_path / "source" / "a.jpg")
    text(tmp_path / "source" / "dataset_any.json", json.dumps(content))
    only_sentences(lambda: importers.import_karpathy(tmp_path / "source", tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"images": 1' + "0" * 5000 + "}"], ids=["deep", "long"])
def test_json_that_python_cannot_hold_is_one_sentence(tmp_path, content):
    photo(tmp_path / "source" / "a.jpg")
    text(tmp_path / "source" / "dataset_any.json", content)
    with pytest.raises(InputError, match=r"dataset_any\.json is not a Karpathy split"):
        importers.import_karpathy(tmp_path / "source", tmp_path / "out")
    text(tmp_path / "captions.jsonl", content)
    with pytest.raises(InputError, match=r"captions\.jsonl, line 1, is not JSON"):
        importers.import_folder(tmp_path / "captions.jsonl", tmp_path / "out")


@quick
@given(
    st.lists(
        ANY
        | st.fixed_dictionaries(
            {"photo": st.just("a.jpg") | st.just("a" * 999) | ANY, "caption": st.just("A dog.") | ANY},
            optional={"split": st.sampled_from(["train", "val"]) | ANY},
        ),
        max_size=3,
    )
)
def test_any_json_lines(tmp_path, rows):
    photo(tmp_path / "source" / "a.jpg")
    text(tmp_path / "source" / "captions.jsonl", "\n".join(json.dumps(row) for row in rows))
    only_sentences(lambda: importers.import_folder(tmp_path / "source", tmp_path / "out"), tmp_path / "out")


def own_photos(source: Path, table: str, name: str = "captions.csv") -> Path:
    for i in range(5):
        photo(source / "holiday" / f"{i}.jpg")
    text(source / name, table)
    return source


def test_folder_with_csv_keeps_splits_and_subfolders(tmp_path):
    table = "split,photo,caption\ntrain,holiday/0.jpg,Sand.\ntrain,holiday/0.jpg,Sea.\nval,holiday/1.jpg,Sun.\n"
    importers.import_folder(own_photos(tmp_path / "mine", table), tmp_path / "out")
    assert captions(tmp_path / "out", "train") == {"holiday/0.jpg": ["Sand.", "Sea."]}
    assert (tmp_path / "out" / "images" / "val" / "holiday" / "1.jpg").is_file()


@pytest.mark.parametrize("separator", [";", "\t"])
def test_folder_with_a_spreadsheets_csv(tmp_path, separator):
    rows = [("\ufeffImage", "Caption")] + [(f"holiday/{i}.jpg", "Sand, sea.") for i in range(5)]
    table = "\r\n".join(separator.join(row) for row in rows)
    importers.import_folder(own_photos(tmp_path / "mine", table), tmp_path / "out")
    assert list(captions(tmp_path / "out", "val").values()) == [["Sand, sea."]]


def test_folder_with_json_lines_splits_the_same_way_every_time(tmp_path):
    rows = [json.dumps({"file_name": f"holiday/{i}.jpg", "caption": f"Nummer {i}, schön."}) for i in range(5)]
    source = own_photos(tmp_path / "mine", "\n".join(rows), "captions.jsonl")
    importers.import_folder(source, tmp_path / "one")
    (source / "captions.jsonl").write_text("\n\n".join(reversed(rows)), encoding="utf-8")
    importers.import_folder(source / "captions.jsonl", tmp_path / "two")
    for split in ("train", "val", "test"):
        assert captions(tmp_path / "one", split) == captions(tmp_path / "two", split)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("photo,caption\nholiday/9.jpg,Sand.\n", r"captions.csv, line 2: holiday/9.jpg is not in"),
        ("photo,caption\n../../etc/passwd,Sand.\n", r"captions.csv, line 2: .* is outside of"),
        ("photo,caption\nholiday/0.jpg,Sand, sea.\n", r"captions.csv, line 2, has more columns .* quotes"),
        ("photo,caption\nholiday/0.jpg,\n", r"captions.csv, line 2, has no caption"),
        ("picture,caption\nholiday/0.jpg,Sand.\n", r"line 2, has no photo \(a column called photo or image"),
        ("photo,caption,split\nholiday/0.jpg,Sand.,dog\n", r"line 2: the split 'dog' is none of"),
        (
            "photo,caption,split\nholiday/0.jpg,A.,train\nholiday/1.jpg,B.,\n",
            r"a split and others",
        ),
        ("photo,caption,split\nholiday/0.jpg,A.,train\nholiday/0.jpg,B.,val\n", r"line 3: .* another split"),
        ("photo,caption\nholiday/0.jpg,Sand.\n", r"captions for 1 photos"),
        ('photo,caption\nholiday/0.jpg,"Sand.\n', r"is not CSV"),
    ],
)
def test_folder_mistakes_are_named_with_file_and_line(tmp_path, table, message):
    with pytest.raises(InputError, match=message) as caught:
        importers.import_folder(own_photos(tmp_path / "mine", table), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["{not json", "[1]", '{"photo": 3, "caption": "x"}'])
def test_json_lines_mistakes_are_named_with_file_and_line(tmp_path, line):
    rows = '{"photo": "holiday/0.jpg", "caption": "x"}\n' + line
    with pytest.raises(InputError, match=r"captions.jsonl, line 2"):
        importers.import_folder(own_photos(tmp_path / "mine", rows, "captions.jsonl"), tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "Flickr8k.token.txt",
            "1_a.jpg#0\tA dog .\n1_a.jpg A dog .\n",
            r"Flickr8k.token.txt, line 2, is not",
        ),
        ("Flickr_8k.trainImages.txt", "1_a.jpg\n9.jpg\n", r"trainImages.txt, line 2: 9.jpg has no caption"),
        ("Flickr_8k.trainImages.txt", "3_c.jpg\n", r"line 1: 3_c.jpg is in the val split already"),
        (
            "Flickr_8k.trainImages.txt",
            "2258277193_586949ec62.jpg.1\n",
            r"line 1: 2258277193_586949ec62.jpg.1 is not under",
        ),
    ],
)
def test_flickr_mistakes_are_named_with_file_and_line(flickr8k, tmp_path, file, content, message):
    text(flickr8k / "Flickr8k_text" / file, content)
    with pytest.raises(InputError, match=message):
        importers.import_flickr(flickr8k, tmp_path / "out")


def test_text_that_is_not_utf8_is_one_sentence(flickr8k, tmp_path):
    (flickr8k / "Flickr8k_text" / "Flickr8k.token.txt").write_bytes(b"1_a.jpg#0\tA caf\xe9 .\n")
    with pytest.raises(InputError, match=r"Flickr8k.token.txt is not UTF-8 text \(byte 15\)"):
        importers.import_flickr(flickr8k, tmp_path / "out")


def test_a_folder_without_captions_is_one_sentence(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    with pytest.raises(InputError, match="has no captions"):
        importers.import_flickr(tmp_path / "photos", tmp_path / "out")
    with pytest.raises(InputError, match="does not exist"):
        importers.import_flickr(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("bomb", [False, True])
def test_a_broken_photo_is_named_and_nothing_is_left(flickr8k, tmp_path, bomb):
    broken = flickr8k / "Flicker8k_Dataset" / "3_c.jpg"
    broken.write_bytes(b"P6 60000 60000 255 " if bomb else b"<html>not found</html>")
    with pytest.raises(InputError, match=r"3_c.jpg cannot be read as an image"):
        importers.import_flickr(flickr8k, tmp_path / "data" / "out")
    assert list((tmp_path / "data").iterdir()) == []


def test_an_interrupted_import_leaves_nothing_and_runs_again(flickr8k, tmp_path, monkeypatch):
    def interrupted(*_args, **_keywords):
        raise KeyboardInterrupt

    (tmp_path / "data").mkdir()
    text(tmp_path / "data" / "out.partial" / "annotations" / "captions_train.json", "left by a killed import")
    monkeypatch.setattr(importers.json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        importers.import_flickr(flickr8k, tmp_path / "data" / "out")
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.undo()
    importers.import_flickr(flickr8k, tmp_path / "data" / "out")
    assert len(captions(tmp_path / "data" / "out", "train")) == 2


def test_a_full_disk_is_one_sentence(flickr8k, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importers.os, "link", full)
    monkeypatch.setattr(importers.shutil, "copyfile", full)
    with pytest.raises(InputError, match=r"out cannot be written: No space left on device"):
        importers.import_flickr(flickr8k, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_data_set_is_not_touched(flickr8k, tmp_path):
    text(tmp_path / "out" / "mine.txt", "precious")
    with pytest.raises(InputError, match="is not empty"):
        importers.import_flickr(flickr8k, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_command_line(flickr8k, tmp_path):
    def run(*arguments):
        script = Path(importers.__file__)
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)

    done = run("flickr8k", flickr8k, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 train, 1 val, 1 test photos, 20 captions" in done.stdout
    refused = run("flickr8k", flickr8k, tmp_path / "out")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("error: ")


def test_the_real_flickr8k_imports_and_trains(tmp_path, small, tiny_backbone):
    if not (DATA / "flickr8k").exists():
        pytest.skip("../shared/data/flickr8k is not here")
    out = tmp_path / "out"
    importers.import_flickr(DATA / "flickr8k", out)
    found = captions(out, "train"), captions(out, "val")
    assert [len(split) for split in found] == [6000, 1091]
    assert {len(texts) for split in found for texts in split.values()} == {5}

    for split, count in (("train", 300), ("val", 40)):  # a part is enough to see it learn
        path = out / "annotations" / f"captions_{split}.json"
        document = json.loads(path.read_text())
        document["images"] = document["images"][:count]
        kept = {image["id"] for image in document["images"]}
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
        path.write_text(json.dumps(document))
    description = checkpoint.read_description(train(small(data=out, batch_size=32, learning_rate=5e-3)))
    assert (description.data["train_photos"], description.data["train_captions"]) == (300, 1500)
    assert description.epochs[0]["val_loss"] < 0.8 * math.log(len(description.vocabulary))


class Hostile:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def vocabulary_pickle(path: Path, attributes: dict) -> Path:
    """A pickle of `vocabulary.Vocabulary` with these attributes, as the original writes it."""
    state = pickle.dumps(attributes, protocol=3)[2:-1]  # without PROTO and STOP
    path.write_bytes(b"\x80\x03cvocabulary\nVocabulary\n)\x81" + state + b"b.")
    return path


def test_vocab_pickle_gives_the_words_in_index_order(tmp_path):
    indices = {"dog": 3, "<end>": 1, "<start>": 0, "<unk>": 2}
    path = vocabulary_pickle(tmp_path / "vocab.pkl", {"word2idx": indices, "idx": 4})
    assert importers.read_vocab_pickle(path) == ["<start>", "<end>", "<unk>", "dog"]


def test_the_published_vocab_pickle():
    if not (DATA / "published_vocab.pkl").exists():
        pytest.skip("../shared/data/published_vocab.pkl is not here")
    words = importers.read_vocab_pickle(DATA / "published_vocab.pkl")
    assert len(words) == len(set(words)) == 9955
    assert words[:5] == ["<start>", "<end>", "<unk>", "a", "very"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_vocab_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
    planted = tmp_path / "planted"
    path = tmp_path / "vocab.pkl"
    path.write_bytes(pickle.dumps({"word2idx": Hostile(f"touch {planted}")}, protocol=protocol))
    with pytest.raises(InputError, match=r"vocab.pkl is not a vocabulary .* it asks for \w+\.system"):
        importers.read_vocab_pickle(path)
    assert not planted.exists()


@pytest.mark.parametrize("what", [builtins.eval, getattr, pickle.loads])
def test_no_other_name_is_admitted(tmp_path, what):
    (tmp_path / "vocab.pkl").write_bytes(pickle.dumps(what))
    with pytest.raises(InputError, match="it asks for"):
        importers.read_vocab_pickle(tmp_path / "vocab.pkl")


def test_a_pickle_that_would_fill_the_memory_is_refused(tmp_path):
    (tmp_path / "vocab.pkl").write_bytes(b"\x80\x03}r\xff\xff\xff\x7f.")
    with pytest.raises(InputError, match="absurd"):
        importers.read_vocab_pickle(tmp_path / "vocab.pkl")


def test_a_huge_vocab_pickle_is_not_even_read(tmp_path):
    with (tmp_path / "vocab.pkl").open("wb") as file:
        file.truncate(importers.MAX_PICKLE_BYTES + 1)
    with pytest.raises(InputError, match="larger than a vocabulary can be"):
        importers.read_vocab_pickle(tmp_path / "vocab.pkl")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"<start>": 0, "<end>": 1, "<unk>": 2, "dog": 4}, "indices are not 0 to 3"),
        ({"<start>": 0, "<end>": 1, "<unk>": 2, "dog": "3"}, "indices are not 0 to 3"),
        ({"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3}, "begins with"),
        ("not a dict", "holds no vocabulary"),
    ],
)
def test_an_incomplete_vocabulary_is_one_sentence(tmp_path, indices, message):
    path = vocabulary_pickle(tmp_path / "vocab.pkl", {"word2idx": indices})
    with pytest.raises(InputError, match=message):
        importers.read_vocab_pickle(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x03", b"not a pickle", pickle.dumps([1, 2])])
def test_a_damaged_vocabulary_is_one_sentence(tmp_path, content):
    (tmp_path / "vocab.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"vocab.pkl"):
        importers.read_vocab_pickle(tmp_path / "vocab.pkl")


# ---------------------------------------------------------------- the original's weights


class OriginalEncoder(torch.nn.Module):
    """The published encoder, restated from its description and the names of its weights."""

    def __init__(self, embed_size: int):
        super().__init__()
        resnet = torchvision.models.resnet50(weights=None)
        self.resnet = torch.nn.Sequential(*list(resnet.children())[:-1])
        self.embed = torch.nn.Linear(2048, embed_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embed(self.resnet(images).flatten(1))


class OriginalDecoder(torch.nn.Module):
    """The published decoder, restated likewise: greedy, one photo at a time."""

    def __init__(self, embed_size: int, hidden_size: int, words: int, num_layers: int):
        super().__init__()
        self.embed = torch.nn.Embedding(words, embed_size)
        self.lstm = torch.nn.LSTM(embed_size, hidden_size, num_layers, batch_first=True)
        self.linear = torch.nn.Linear(hidden_size, words)

    def sample(self, feature: torch.Tensor) -> list[int]:
        inputs, state, tokens = feature.view(1, 1, -1), None, []
        while len(tokens) < 20 and 1 not in tokens:
            output, state = self.lstm(inputs, state)
            token = self.linear(output[0, 0]).argmax()
            tokens.append(int(token))
            inputs = self.embed(token).view(1, 1, -1)
        return tokens


WORDS = ["<start>", "<end>", "<unk>", *(f"w{i}" for i in range(57))]


@pytest.fixture(scope="module")
def original() -> tuple[OriginalEncoder, OriginalDecoder]:
    """Random weights, wide enough apart that photos get captions of their own."""
    torch.manual_seed(0)
    encoder, decoder = OriginalEncoder(32).eval(), OriginalDecoder(32, 48, len(WORDS), 2).eval()
    with torch.no_grad():
        encoder.embed.weight.mul_(40)
        for weight in decoder.parameters():
            weight.mul_(4)
    return encoder, decoder


@pytest.fixture
def triple(original, tmp_path) -> tuple[Path, Path, Path]:
    paths = tmp_path / "encoder-3.pkl", tmp_path / "decoder-3.pkl", tmp_path / "vocab.pkl"
    for module, path in zip(original, paths, strict=False):
        torch.save(module.state_dict(), path)
    vocabulary_pickle(paths[2], {"word2idx": {word: index for index, word in enumerate(WORDS)}})
    return paths


@pytest.fixture
def photos() -> list[Path]:
    """Ten photos of COCO."""
    found = sorted((DATA / "coco-mini" / "images" / "val2017").glob("*.jpg"))[:10]
    if not found:
        pytest.skip("../shared/data/coco-mini is not here")
    return found


RECIPE = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def test_imported_weights_give_the_originals_token_sequences(original, triple, photos, tmp_path):
    importers.import_weights(*triple, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "captioner.json",
        "decoder-3.pkl",
        "encoder-3.pkl",
    ]
    encoder, decoder, vocabulary, description = checkpoint.load_model(tmp_path / "model")
    assert vocabulary.words == WORDS

    with torch.no_grad():
        images = [RECIPE(Image.open(path).convert("RGB")) for path in photos]
        expected = [original[1].sample(original[0](image[None])) for image in images]
        ours = build_transform(image_size=description.preprocessing.image_size)
        found = decoder.sample(encoder(torch.stack([ours(read_photo(path)) for path in photos])))
    assert len({tuple(tokens) for tokens in expected}) > 3
    assert found == expected


def test_a_trained_model_says_what_the_original_code_says_word_for_word(photos, tmp_path):
    document = json.loads((DATA / "coco-mini" / "annotations" / "captions_val2017.json").read_text())
    ids = {image["file_name"]: image["id"] for image in document["images"]}
    said = {a["image_id"]: a["caption"] for a in document["annotations"]}
    sentences = [said[ids[path.name]] for path in photos]
    vocabulary = Vocabulary.build(sentences, 1)
    torch.manual_seed(0)
    encoder, decoder = OriginalEncoder(32).eval(), DecoderRNN(32, 64, len(vocabulary))
    with torch.no_grad():
        seen = encoder.resnet(torch.stack([RECIPE(Image.open(path).convert("RGB")) for path in photos])).flatten(1)
        embedded = encoder.embed(seen)
        encoder.embed.weight /= embedded.std(0)[:, None]
        encoder.embed.bias.copy_((encoder.embed.bias - embedded.mean(0)) / embedded.std(0))
        features = encoder.embed(seen)
    captions = [torch.tensor(vocabulary.encode(sentence)) for sentence in sentences]
    captions = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    for _ in range(150):
        logits = decoder(features, captions.clamp(min=0))
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    restated = OriginalDecoder(32, 64, len(vocabulary), 1)
    restated.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        expected = [restated.sample(feature) for feature in features]
    assert all(tokens[0] == 0 and tokens[-1] == 1 for tokens in expected)
    assert len({tuple(tokens) for tokens in expected}) == len(photos)

    files = tmp_path / "encoder-3.pkl", tmp_path / "decoder-3.pkl", tmp_path / "vocab.pkl"
    torch.save(encoder.state_dict(), files[0])
    torch.save(restated.state_dict(), files[1])
    vocabulary_pickle(files[2], {"word2idx": vocabulary.index})
    importers.import_weights(*files, tmp_path / "model")
    found = Captioner.load(tmp_path / "model")(photos)
    assert [c.tokens for c in found] == [[vocabulary.words[i] for i in tokens[1:-1]] for tokens in expected]


def test_a_triple_as_large_as_the_published_one_is_used_like_any_model(photos, tmp_path, monkeypatch, capsys):
    if not (DATA / "published_vocab.pkl").exists():
        pytest.skip("../shared/data/published_vocab.pkl is not here")
    sizes = json.loads((DATA / "published_checkpoint_keys.json").read_text())
    torch.manual_seed(0)
    modules = OriginalEncoder(256), OriginalDecoder(256, 512, 9955, 1)
    files = tmp_path / "encoder-3.pkl", tmp_path / "decoder-3.pkl"
    for module, path in zip(modules, files, strict=True):
        state = module.state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == sizes[path.name]
        torch.save(state, path)
    importers.import_weights(*files, DATA / "published_vocab.pkl", tmp_path / "published")

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    caption.main(tuple(photos[:2]), Decoding(beam_size=2), model=(Path("published"),), json_=True, workers=0)
    [first, second] = json.loads(capsys.readouterr().out)
    assert first["caption"]
    assert second["log_probability"] < 0
    evaluate.main(
        Decoding(), (Path("published"),), data=DATA / "coco-mini", split="val", limit=2, json_=True, workers=0
    )
    assert json.loads(capsys.readouterr().out)["photos"] == 2


def test_weights_of_another_vocabulary_are_refused_with_both_sizes(triple, tmp_path):
    indices = {word: index for index, word in enumerate(WORDS[:-7])}
    vocabulary_pickle(triple[2], {"word2idx": indices})
    with pytest.raises(InputError, match=r"decoder-3.pkl was trained with 60 words and .*vocab.pkl has 53"):
        importers.import_weights(*triple, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_of_two_trainings_are_refused_with_both_sizes(triple, tmp_path):
    torch.save({"embed.weight": torch.zeros(8, 2048)}, triple[0])
    with pytest.raises(InputError, match=r"encoder-3.pkl gives 8 numbers a photo and .* takes 32"):
        importers.import_weights(*triple, tmp_path / "model")


def test_weights_that_lack_a_part_are_refused(original, triple, tmp_path):
    state = copy.copy(original[1].state_dict())
    del state["lstm.weight_hh_l1"]
    torch.save(state, triple[1])
    with pytest.raises(InputError, match=r"decoder-3.pkl lacks the weight lstm.weight_hh_l1"):
        importers.import_weights(*triple, tmp_path / "model")
    torch.save({}, triple[1])
    with pytest.raises(InputError, match=r"decoder-3.pkl is not of the original recipe: .* embed.weight"):
        importers.import_weights(*triple, tmp_path / "model")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_weights_are_refused_and_run_nothing(triple, tmp_path):
    planted = tmp_path / "planted"
    triple[1].write_bytes(pickle.dumps(Hostile(f"touch {planted}")))
    with pytest.raises(InputError, match=r"decoder-3.pkl"):
        importers.import_weights(*triple, tmp_path / "model")
    assert not planted.exists()


def test_an_interrupted_import_of_weights_leaves_nothing(triple, tmp_path, monkeypatch):
    def full(*_args):
        raise InputError("the disk is full.")

    monkeypatch.setattr(checkpoint, "write_description", full)
    with pytest.raises(InputError, match="full"):
        importers.import_weights(*triple, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_existing_model_is_not_touched(triple, tmp_path):
    text(tmp_path / "model" / "mine.txt", "precious")
    with pytest.raises(InputError, match="is not empty"):
        importers.import_weights(*triple, tmp_path / "model")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["mine.txt"]
