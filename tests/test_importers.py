import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import importers
from captioning import checkpoint
from captioning.errors import InputError
from captioning.training import train
from data_loader import CaptionDataset
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

    monkeypatch.setattr(os, "link", no_links)
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
    with pytest.raises(InputError, match="holds no images"):
        importers.import_karpathy(moved, tmp_path / "out")
    importers.import_karpathy(moved, tmp_path / "out", images=tmp_path / "coco")
    assert len(captions(tmp_path / "out", "train")) == 2


def test_karpathy_names_the_entry_whose_photo_is_missing(tmp_path):
    karpathy(tmp_path / "source")
    (tmp_path / "source" / "val2014" / "COCO_val2014_2.jpg").unlink()
    with pytest.raises(InputError, match=r"dataset_coco.json, images\[2\]: val2014/COCO_val2014_2.jpg is not under"):
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
        CaptionDataset(
            destination, vocab=Vocabulary(["<start>", "<end>", "<unk>", "a"]), cache=destination.parent / "cache"
        )
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
    with pytest.raises(InputError, match=r"dataset_any\.json is not JSON that can be read"):
        importers.import_karpathy(tmp_path / "source", tmp_path / "out")
    text(tmp_path / "captions.jsonl", content)
    with pytest.raises(InputError, match=r"captions\.jsonl(, line 1,)? is not JSON"):
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
        ("photo,caption\nholiday/9.jpg,Sand.\n", r"captions.csv, line 2: holiday/9.jpg is not under"),
        ("photo,caption\n../../etc/passwd,Sand.\n", r"captions.csv, line 2: ../../etc/passwd is not under"),
        ("photo,caption\nholiday/0.jpg,Sand, sea.\n", r"captions.csv, line 2, has more columns .* quotes"),
        ("photo,caption\nholiday/0.jpg,\n", r"no image with a caption"),
        ("photo,caption\nholiday/0.jpg\n", r"captions.csv, line 2, has 1 of the header's 2 columns"),
        (
            "picture,caption\nholiday/0.jpg,Sand.\n",
            r"line 1, should name .* but reads 'picture,caption'",
        ),
        ("photo,caption,split\nholiday/0.jpg,Sand.,dog\n", r"line 2: the split 'dog' is none of"),
        (
            "photo,caption,split\nholiday/0.jpg,A.,train\nholiday/1.jpg,B.,\n",
            r"a split and others",
        ),
        ("photo,caption,split\nholiday/0.jpg,A.,train\nholiday/0.jpg,B.,val\n", r"line 3: .* another split"),
        ("photo,caption\nholiday/0.jpg,Sand.\n", r"too few captioned images to split \(1\)"),
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
    with pytest.raises(InputError, match=r"Flickr8k.token.txt, line 1, is not UTF-8 text \(byte 15\)"):
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
    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        importers.import_flickr(flickr8k, tmp_path / "data" / "out")
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.undo()
    importers.import_flickr(flickr8k, tmp_path / "data" / "out")
    assert len(captions(tmp_path / "data" / "out", "train")) == 2


def test_a_full_disk_is_one_sentence(flickr8k, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
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
    assert (done.returncode, done.stderr) == (0, "left out 2 images in no split file, the first is 5_e.jpg\n")
    assert "2 train, 1 val, 1 test images, 20 captions" in done.stdout
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
