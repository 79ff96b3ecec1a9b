import contextlib
import json
import math
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import importers
from captioning import captions as caption_texts
from captioning import checkpoint, folder_captions
from captioning.errors import InputError
from captioning.files import read_text
from captioning.image_index import ImageIndex
from captioning.training import train
from data_loader import CaptionDataset, find_split
from vocabulary import Vocabulary

DATA = Path(__file__).parents[2] / "shared" / "data"


def make_image(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
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
        make_image(source / "Flicker8k_Dataset" / name)
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


def test_images_are_linked_not_copied_where_that_is_possible(flickr8k, tmp_path):
    importers.import_flickr(flickr8k, tmp_path / "out")
    linked = tmp_path / "out" / "images" / "train" / "1_a.jpg"
    assert os.path.samefile(linked, flickr8k / "Flicker8k_Dataset" / "1_a.jpg")


def test_images_are_copied_where_links_are_not_possible(flickr8k, tmp_path, monkeypatch):
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
    make_image(flickr8k / "Flicker8k_Dataset" / "6_f.jpg")
    importers.import_flickr(flickr8k, tmp_path / "more")
    assert f"left out 1 image without a caption: {flickr8k}/Flicker8k_Dataset/6_f.jpg" in capsys.readouterr().err


def test_flickr8k_in_folders_named_after_splits(tmp_path):
    for folder, name in zip(("train", "train", "val", "test"), "0123", strict=True):
        make_image(tmp_path / "in" / "images" / folder / f"{name}.jpg")
    text(tmp_path / "in" / "captions.txt", "".join(csv_rows("image,caption").splitlines(True)[:5]))
    importers.import_flickr(tmp_path / "in", tmp_path / "out")
    assert set(captions(tmp_path / "out", "val")) == {"2.jpg"}
    assert set(captions(tmp_path / "out", "test")) == {"3.jpg"}


def test_a_tables_splits_are_those_of_flickr30k_too(tmp_path):
    splits = ["train", "train", "train", "val", "test", "test"]
    rows = "".join(f"{i}.jpg,a ball,{split}\n" for i, split in enumerate(splits))
    source = six(tmp_path / "in", results__csv="filename,raw,split\n" + rows)
    importers.import_flickr(source, tmp_path / "out")
    assert set(captions(tmp_path / "out", "test")) == {"4.jpg", "5.jpg"}
    text(source / "testImages.txt", "0.jpg\n")
    with pytest.raises(InputError, match=r"testImages\.txt, line 1: 0\.jpg is in the train split already"):
        importers.import_flickr(source, tmp_path / "again")


def test_folders_beside_the_destination_are_not_touched(tmp_path):
    source = six(tmp_path / "mine.partial", c__csv=csv_rows("image,caption"))
    importers.import_folder(source, tmp_path / "mine")
    assert set(all_captions(tmp_path / "mine")) == {path.name for path in source.glob("*.jpg")}
    assert len(list(source.iterdir())) == 7


def test_a_destination_that_is_a_link(tmp_path):
    source, real, link = six(tmp_path / "in", c__csv=csv_rows("image,caption")), tmp_path / "disk", tmp_path / "out"
    link.symlink_to(real)
    with pytest.raises(InputError, match="out is a broken link"):
        importers.import_folder(source, link)
    real.mkdir()
    importers.import_folder(source, link)
    assert link.is_symlink()
    assert len(all_captions(real)) == 6


def test_an_image_that_the_index_leaves_out_is_named_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("captioning.image_index.image_suffixes", lambda: {".jpg"})
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption") + "phone.heic,a ball\n")
    text(source / "phone.heic", "")
    with pytest.raises(InputError, match=r"line 8: .*phone\.heic is readable after `pip install pillow-heif`"):
        importers.import_folder(source, tmp_path / "out")
    (source / "photos").mkdir()
    for path in [*source.glob("*.jpg"), source / "phone.heic"]:
        path.rename(source / "photos" / path.name)
    with pytest.raises(InputError, match=r"line 8: .*photos/phone\.heic is readable after `pip install pillow-heif`"):
        importers.import_folder(source, tmp_path / "out")
    for path in (source / "photos").iterdir():
        path.rename(source / (".hidden.jpg" if path.suffix == ".heic" else path.name))
    text(source / "c.csv", csv_rows("image,caption") + ".hidden.jpg,a ball\n")
    with pytest.raises(InputError, match=r"line 8: .*\.hidden\.jpg is not recognized as an image .* hidden"):
        importers.import_folder(source, tmp_path / "out")
    (source / ".thumbs").mkdir()
    make_image(source / ".thumbs" / "9.jpg")
    text(source / "c.csv", csv_rows("image,caption") + ".thumbs/9.jpg,a ball\n")
    with pytest.raises(
        InputError, match=r"line 8: .*9\.jpg is not recognized as an image .* it or its folder is hidden"
    ):
        importers.import_folder(source, tmp_path / "out")
    text(source / "logo.svg", "<svg/>")
    text(source / "c.csv", csv_rows("image,caption") + "logo.svg,a ball\n")
    with pytest.raises(InputError, match=r"\.svg is not the suffix of one that can be read; .* JPEG or PNG"):
        importers.import_folder(source, tmp_path / "out")


def test_a_file_system_that_ignores_case(tmp_path, monkeypatch):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption", "{}.JPG,a ball"))
    isfile = os.path.isfile
    with pytest.raises(InputError, match=r"0\.JPG is not under .* \(there is 0\.jpg\)"):
        importers.import_folder(source, tmp_path / "out")
    monkeypatch.setattr(os.path, "isfile", lambda path: isfile(str(path).replace(".JPG", ".jpg")))
    importers.import_folder(source, tmp_path / "out")
    assert len(all_captions(tmp_path / "out")) == 6


def test_an_image_in_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    source, stat = six(tmp_path / "in", c__csv=csv_rows("image,caption")), os.stat

    def refuse(path, *args, **keywords):
        if str(path).endswith("3.jpg"):
            raise PermissionError(13, "Permission denied")
        return stat(path, *args, **keywords)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(InputError, match=r"3\.jpg may not be accessed"):
        importers.import_folder(source, tmp_path / "other")


def test_what_is_no_image_and_what_is_no_table_are_told_in_words(tmp_path):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"))
    text(source / "3.jpg", "<html>")
    with pytest.raises(InputError, match=r"3\.jpg cannot be read as an image \(its content is not in an image format"):
        importers.import_folder(source, tmp_path / "out")
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "mine.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"mine\.zip is a zip archive"):
        importers.import_folder(tmp_path / "zip" / "mine.zip", tmp_path / "out")


def test_images_behind_a_link_are_found_by_either_path(tmp_path):
    source = six(tmp_path / "in", c__csv="image,caption\n" + "".join(f"train/{i}.jpg,a red ball\n" for i in range(6)))
    (source / "photos").mkdir()
    for path in source.glob("*.jpg"):
        path.rename(source / "photos" / path.name)
    (source / "train").symlink_to("photos")
    importers.import_folder(source, tmp_path / "out")
    assert len(all_captions(tmp_path / "out")) == 6


def test_captions_txt_with_quoted_commas(tmp_path):
    source = tmp_path / "kaggle"
    for i in range(4):
        make_image(source / "Images" / f"{i}.jpg")
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
        make_image(source / "flickr30k-images" / f"{i}.jpg")
    text(source / "results_20130124.token", "1000092795.jpg#0\tTwo men .\n10002456.jpg#0\tA crane .\n")
    text(source / "train.txt", "1000092795\n")
    text(source / "val.txt", "10002456\n")
    importers.import_flickr(source, tmp_path / "out")
    assert captions(tmp_path / "out", "train") == {"1000092795.jpg": ["Two men ."]}
    assert captions(tmp_path / "out", "val") == {"10002456.jpg": ["A crane ."]}


def test_a_table_of_splits_that_is_not_read_is_told(flickr8k, tmp_path, capsys):
    for path in [*flickr8k.rglob("*Images.txt")]:
        path.unlink()
    text(flickr8k / "splits.csv", "image,split\n1_a.jpg,test\n")
    importers.import_flickr(flickr8k, tmp_path / "out")
    told = f"left out 1 list of a split; write the names in train.txt, val.txt and test.txt: {flickr8k}/splits.csv"
    assert told in capsys.readouterr().err


def test_a_token_file_of_any_name(flickr8k, tmp_path):
    tokens = next(flickr8k.rglob("Flickr8k.token.txt"))
    arabic = tokens.rename(tokens.with_name("arabic.tsv"))
    importers.import_flickr(arabic, tmp_path / "out", images=flickr8k)
    assert all_captions(tmp_path / "out")


def test_flickr30k_csv_with_its_broken_row(tmp_path):
    source = tmp_path / "flickr30k"
    rows = ["image_name| comment_number| comment"]
    for name in ("1.jpg", "2.jpg", "2199200615.jpg"):
        make_image(source / "flickr30k_images" / name)
        rows.append(f'{name}| 0| A dog "runs" , across the grass .')
    text(source / "results.csv", "\n".join([*rows, "2199200615.jpg| 4   A dog runs across the grass ."]))
    importers.import_flickr(source, tmp_path / "out")
    imported = {k: v for split in ("train", "val", "test") for k, v in captions(tmp_path / "out", split).items()}
    assert imported["1.jpg"] == ['A dog "runs" , across the grass .']
    assert imported["2199200615.jpg"][1] == "A dog runs across the grass ."


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
        make_image(source / image["filepath"] / image["filename"])
    return text(source / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))


def test_karpathy_splits_keep_coco_ids_and_train_on_restval(tmp_path):
    karpathy(tmp_path / "source")
    importers.import_karpathy(tmp_path / "source", tmp_path / "out")
    train = json.loads((tmp_path / "out/annotations/captions_train.json").read_text())
    assert [image["id"] for image in train["images"]] == [100, 101]
    assert captions(tmp_path / "out", "val") == {"COCO_val2014_2.jpg": ["A val photo.", "A val photo."]}
    assert set(captions(tmp_path / "out", "test")) == {"COCO_val2014_3.jpg"}


def test_a_karpathy_file_with_a_test_split_only(tmp_path, capsys):
    path = karpathy(tmp_path / "source")
    document = json.loads(path.read_text())
    document["images"] = [image for image in document["images"] if image["split"] == "test"]
    path.write_text(json.dumps(document))
    importers.import_karpathy(tmp_path / "source", tmp_path / "out")
    assert set(captions(tmp_path / "out", "test")) == {"COCO_val2014_3.jpg"}
    assert not (tmp_path / "out/annotations/captions_train.json").exists()
    assert "there is none to train on" in capsys.readouterr().err


def test_karpathy_file_with_the_images_elsewhere(tmp_path):
    path = karpathy(tmp_path / "coco")
    moved = text(tmp_path / "elsewhere" / "dataset_coco.json", path.read_text())
    with pytest.raises(InputError, match="holds no images"):
        importers.import_karpathy(moved, tmp_path / "out")
    importers.import_karpathy(moved, tmp_path / "out", images=tmp_path / "coco")
    assert len(captions(tmp_path / "out", "train")) == 2


def test_karpathy_names_the_entry_whose_image_is_missing(tmp_path):
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
    make_image(tmp_path / "source" / "a.jpg")
    text(tmp_path / "source" / "dataset_any.json", json.dumps(content))
    only_sentences(lambda: importers.import_karpathy(tmp_path / "source", tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"images": 1' + "0" * 5000 + "}"], ids=["deep", "long"])
def test_json_that_python_cannot_hold_is_one_sentence(tmp_path, content):
    make_image(tmp_path / "source" / "a.jpg")
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
    make_image(tmp_path / "source" / "a.jpg")
    text(tmp_path / "source" / "captions.jsonl", "\n".join(json.dumps(row) for row in rows))
    only_sentences(lambda: importers.import_folder(tmp_path / "source", tmp_path / "out"), tmp_path / "out")


def own_images(source: Path, table: str, name: str = "captions.csv") -> Path:
    for i in range(5):
        make_image(source / "holiday" / f"{i}.jpg")
    text(source / name, table)
    return source


def test_folder_with_csv_keeps_splits_and_subfolders(tmp_path):
    table = "split,photo,caption\ntrain,holiday/0.jpg,Sand.\ntrain,holiday/0.jpg,Sea.\nval,holiday/1.jpg,Sun.\n"
    importers.import_folder(own_images(tmp_path / "mine", table), tmp_path / "out")
    assert captions(tmp_path / "out", "train") == {"holiday/0.jpg": ["Sand.", "Sea."]}
    assert (tmp_path / "out" / "images" / "val" / "holiday" / "1.jpg").is_file()


def test_lists_of_splits_beside_a_table_are_reported(tmp_path, capsys):
    source = own_images(tmp_path / "mine", "photo,caption\n" + "".join(f"holiday/{i}.jpg,Sand.\n" for i in range(5)))
    (source / "train.txt").write_text("0.jpg\n1.jpg\n")
    (source / "test.txt").write_text("2.jpg\n")
    importers.import_folder(source, tmp_path / "out")
    message = "left out 2 lists of a split; a table gives splits in a column called split, the first is"
    assert f"{message} {source / 'test.txt'}" in capsys.readouterr().err


def test_a_split_that_another_table_gives_is_named(tmp_path):
    source = own_images(tmp_path / "mine", "photo,caption\nholiday/0.jpg,Sand.\n", "test.csv")
    (source / "train.csv").write_text("photo,caption\nholiday/0.jpg,Sea.\n")
    sentence = r"mine/train\.csv, line 2: holiday/0\.jpg has another split in \S+mine/test\.csv, line 2\."
    with pytest.raises(InputError, match=sentence):
        importers.import_folder(source, tmp_path / "out")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_folder_with_a_spreadsheets_csv(tmp_path, separator):
    rows = [("\ufeffImage", "Caption")] + [(f"holiday/{i}.jpg", "Sand, sea.") for i in range(5)]
    table = "\r\n".join(separator.join(row) for row in rows)
    importers.import_folder(own_images(tmp_path / "mine", table), tmp_path / "out")
    assert list(captions(tmp_path / "out", "val").values()) == [["Sand, sea."]]


def test_folder_with_json_lines_splits_the_same_way_every_time(tmp_path):
    rows = [json.dumps({"file_name": f"holiday/{i}.jpg", "caption": f"Nummer {i}, schön."}) for i in range(5)]
    source = own_images(tmp_path / "mine", "\n".join(rows), "captions.jsonl")
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
        (
            "photo,caption\nholiday/0.jpg,\n",
            r"no image with a caption \(left out 1 empty caption: .*captions\.csv, line 2; ",
        ),
        ("photo,caption\nholiday/0.jpg\n", r"captions.csv, line 2, has 1 of the header's 2 columns"),
        (
            "picture,caption\nholiday/0.jpg,Sand.\n",
            r"line 1, should name .* but reads 'picture,caption'",
        ),
        ("photo,caption,split\nholiday/0.jpg,Sand.,dog\n", r"line 2: the split 'dog' is not one of"),
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
        importers.import_folder(own_images(tmp_path / "mine", table), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["{not json", "[1]", '{"photo": 3, "caption": "x"}'])
def test_json_lines_mistakes_are_named_with_file_and_line(tmp_path, line):
    rows = '{"photo": "holiday/0.jpg", "caption": "x"}\n' + line
    with pytest.raises(InputError, match=r"captions.jsonl, line 2"):
        importers.import_folder(own_images(tmp_path / "mine", rows, "captions.jsonl"), tmp_path / "out")


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
    make_image(tmp_path / "photos" / "a.jpg")
    with pytest.raises(InputError, match="has no captions"):
        importers.import_flickr(tmp_path / "photos", tmp_path / "out")
    with pytest.raises(InputError, match="does not exist"):
        importers.import_flickr(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("bomb", [False, True])
def test_a_broken_image_is_named_and_nothing_is_left(flickr8k, tmp_path, bomb):
    broken = flickr8k / "Flicker8k_Dataset" / "3_c.jpg"
    broken.write_bytes(b"P6 60000 60000 255 " if bomb else b"<html>not found</html>")
    with pytest.raises(InputError, match=r"3_c.jpg cannot be read as an image"):
        importers.import_flickr(flickr8k, tmp_path / "data" / "out")
    assert list((tmp_path / "data").iterdir()) == []


def test_an_interrupted_import_leaves_nothing_and_can_be_repeated(flickr8k, tmp_path, monkeypatch):
    def interrupted(*_args, **_keywords):
        raise KeyboardInterrupt

    (tmp_path / "data").mkdir()
    text(tmp_path / "data" / ".out.importing" / "annotations" / "captions_train.json", "left by a killed import")
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
    done = run_script("importers.py", "flickr8k", flickr8k, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "left out 2 images in no split file, the first is 5_e.jpg\n")
    assert "2 train, 1 val, 1 test images, 20 captions" in done.stdout
    refused = run_script("importers.py", "flickr8k", flickr8k, tmp_path / "out")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("error: ")


@pytest.mark.slow
def test_the_real_flickr8k_imports_and_trains(tmp_path, small, tiny_backbone):
    if not (DATA / "flickr8k").exists():
        pytest.skip("../shared/data/flickr8k is not here")
    out = tmp_path / "out"
    importers.import_flickr(DATA / "flickr8k", out)
    splits = captions(out, "train"), captions(out, "val")
    assert [len(split) for split in splits] == [6000, 1091]
    assert {len(texts) for split in splits for texts in split.values()} == {5}

    for split, count in (("train", 300), ("val", 40)):  # a part is enough to see it learn
        path = out / "annotations" / f"captions_{split}.json"
        document = json.loads(path.read_text())
        document["images"] = document["images"][:count]
        ids = {image["id"] for image in document["images"]}
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] in ids]
        path.write_text(json.dumps(document))
    description = checkpoint.read_description(train(small(data=out, batch_size=32, learning_rate=5e-3)))
    assert (description.data["train_photos"], description.data["train_captions"]) == (300, 1500)
    assert description.epochs[0]["val_loss"] < 0.8 * math.log(len(description.vocabulary))


def test_images_of_one_name_in_two_folders_keep_both(tmp_path):
    names = [f"{folder}/{i}.jpg" for folder in "ab" for i in range(3)]
    for i, name in enumerate(names):
        make_image(tmp_path / "in" / name, (8 + i, 6))
    text(tmp_path / "in" / "captions.csv", "image,caption\n" + "".join(f"{name},a {name[0]}\n" for name in names))
    importers.import_flickr(tmp_path / "in", tmp_path / "out")
    assert all_captions(tmp_path / "out") == {name: [f"a {name[0]}"] for name in names}


def test_braces_in_a_folder_s_name(tmp_path, capsys):
    source = six(tmp_path / "in{0}", captions__csv=csv_rows("image,caption") + "9.jpg,a lost one\n")
    importers.import_flickr(source, tmp_path / "out")
    assert f"left out 1 captioned image not under {source}: 9.jpg" in capsys.readouterr().err


# Six images, and their captions in many forms


def six(folder: Path, **tables: str | bytes) -> Path:
    for i in range(6):
        make_image(folder / f"{i}.jpg", (8 + i, 6))
    for name, content in tables.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def all_captions(destination: Path) -> dict[str, list[str]]:
    splits = [path.stem.split("_")[1] for path in (destination / "annotations").glob("captions_*.json")]
    return {name: texts for split in splits for name, texts in captions(destination, split).items()}


def csv_rows(header: str, row: str = "{}.jpg,a red ball", end: str = "\n") -> str:
    return header + end + "".join(row.format(i) + end for i in range(6))


def json_rows(**fields) -> list[dict]:
    return [
        {key: value.format(i) if isinstance(value, str) else value for key, value in fields.items()} for i in range(6)
    ]


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("missing", ["", "nan", "...", "None"])
def test_a_missing_caption_of_a_token_file_is_left_out_and_counted(flickr8k, tmp_path, capsys, missing):
    tokens = flickr8k / "Flickr8k_text" / "Flickr8k.token.txt"
    tokens.write_text(tokens.read_text().replace("3_c.jpg#2\tA dog number 2 runs .", f"3_c.jpg#2\t{missing}"))
    importers.import_flickr(flickr8k, tmp_path / "out")
    assert len(captions(tmp_path / "out", "val")["3_c.jpg"]) == 4
    assert f"left out 1 empty caption: {tokens}, line 13\n" in capsys.readouterr().err


def test_if_no_image_is_found_the_first_is_named_with_one_like_it(flickr8k, tmp_path):
    for path in (flickr8k / "Flickr8k_text").glob("*Images.txt"):
        path.unlink()
    for path in (flickr8k / "Flicker8k_Dataset").glob("*.jpg"):
        path.rename(path.with_suffix(".JPG"))
    with pytest.raises(InputError, match=r"token\.txt: 1_a\.jpg is not under .* \(there is .*/1_a\.JPG\)"):
        importers.import_flickr(flickr8k, tmp_path / "out")


def test_images_that_no_row_names_are_counted(tmp_path: Path, capsys):
    source = six(tmp_path / "in", captions__csv="image,caption,split\n0.jpg,a red ball,train\n1.jpg,a ball,val\n")
    importers.import_folder(source, tmp_path / "out")
    assert set(all_captions(tmp_path / "out")) == {"0.jpg", "1.jpg"}
    error = capsys.readouterr().err
    assert f"left out 4 images without a row, the first is {source}/2.jpg\n" in error


# .txt files beside images, and folders that are splits


def test_captions_in_txt_files_next_to_the_images(tmp_path, capsys):
    source = six(tmp_path / "in")
    for i in range(5):
        text(source / f"{i}.txt", f"\ufeffa red ball\u2028{i}\r\n\r\none ball\r\n")
    text(source / "9.txt", "a lost caption")
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": [f"a red ball {i}", "one ball"] for i in range(5)}
    error = capsys.readouterr().err
    assert f"left out 1 image without a caption in a .txt, .caption or .json file: {source}/5.jpg\n" in error
    assert f"left out 1 .txt file without an image: {source}/9.txt\n" in error


def test_a_text_of_several_lines_that_the_json_beside_it_holds_is_one_caption(tmp_path):
    """As img2dataset writes its folders."""
    source = six(tmp_path / "in" / "00000").parent
    for i in range(6):
        text(source / "00000" / f"{i}.txt", "a lamp\r\nby Philips")
        beside = {"caption": "a lamp\r\nby Philips", "url": "x"} if i < 3 else {"caption": "another"} if i < 4 else [1]
        text(source / "00000" / f"{i}.json", json.dumps(beside) if i < 5 else "broken")
    importers.import_folder(source, tmp_path / "out")
    expected = [["a lamp by Philips"]] * 3 + [["a lamp", "by Philips"]] * 3
    assert all_captions(tmp_path / "out") == {f"00000/{i}.jpg": texts for i, texts in enumerate(expected)}


def test_txt_files_may_have_the_whole_name_of_the_image(tmp_path):
    source = six(tmp_path / "in", **{f"{i}__jpg__txt": f"ball {i}" for i in range(6)})
    Image.new("RGB", (8, 6)).save(source / "0.png")
    text(source / "0.png.txt", "a black picture")
    importers.import_folder(source, tmp_path / "out")
    expected = {f"{i}.jpg": [f"ball {i}"] for i in range(6)} | {"0.png": ["a black picture"]}
    assert all_captions(tmp_path / "out") == expected
    text(source / "1.txt", "a kite")
    with pytest.raises(InputError, match=r"/1\.txt and .*/1\.jpg\.txt are for one image; keep one of the two"):
        importers.import_folder(source, tmp_path / "out2")


def test_two_json_files_of_an_image_are_refused_if_both_hold_captions(tmp_path):
    source = six(tmp_path / "in", **{f"{i}__json": json.dumps({"caption": f"ball {i}"}) for i in range(6)})
    (source / "1.json").rename(source / "1.jpg.json")
    for other in ("0.jpg.json", "1.json", "2.jpg.json"):
        text(source / other, "broken" if other == "2.jpg.json" else '{"shapes": []}')
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": [f"ball {i}"] for i in range(6)}
    text(source / "0.jpg.json", '{"captions": ["a kite"]}')
    with pytest.raises(InputError, match=r"/0\.json and .*/0\.jpg\.json are for one image; keep one of the two"):
        importers.import_folder(source, tmp_path / "out2")


def test_captions_in_other_files_next_to_the_images(tmp_path, capsys):
    source = six(tmp_path / "in", **{f"{i}__json": json.dumps({"captions": ["a ball", "3"]}) for i in range(3)})
    text(source / "3.json", '{"captions": null, "caption": "a kite"}')
    text(source / "4.jpg.caption", "a dog\n")
    text(source / "4.json", '{"imageData": "", "shapes": []}')
    text(source / "5.json", '{"shapes": []}')
    text(source / "9.caption", "a lost caption")
    importers.import_folder(source, tmp_path / "out")
    expected = {f"{i}.jpg": ["a ball"] for i in range(3)} | {"3.jpg": ["a kite"], "4.jpg": ["a dog"]}
    assert all_captions(tmp_path / "out") == expected
    error = capsys.readouterr().err
    assert f"left out 3 empty captions, the first is {source}/0.json, caption 2\n" in error
    assert f"left out 1 .caption file without an image: {source}/9.caption\n" in error
    assert f"left out 1 image without a caption in a .txt, .caption or .json file: {source}/5.jpg\n" in error
    text(source / "5.json", '{"caption": "a", "caption": "b"}')
    with pytest.raises(InputError, match=r"5\.json is not JSON \('caption' occurs twice in an object\)"):
        importers.import_folder(source, tmp_path / "out2")


def test_files_of_labels_are_no_captions(tmp_path, capsys):
    source = six(tmp_path / "in", **{f"{i}__txt": "0 0.5 0.5 0.2 0.1\n" for i in range(6)}, classes__txt="ball\n")
    with pytest.raises(InputError, match=r"no image with a caption \(.*6 empty captions, the first is .*0\.txt"):
        importers.import_folder(source, tmp_path / "out")
    for i in range(6):
        text(source / f"{i}.json", '{"shapes": []}')
    text(source / "c.json", json.dumps({f"{i}.jpg": "a red ball" for i in range(6)}))
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["a red ball"] for i in range(6)}


def test_a_second_file_of_captions_of_an_image_is_reported(tmp_path, capsys):
    tags = {f"{i}__txt": "one, solo, red" for i in range(6)} | {f"{i}__caption": "a red ball" for i in range(6)}
    same = {f"{i}__json": '{"caption": "one,  solo, red"}' for i in range(6)}
    importers.import_folder(six(tmp_path / "in", **tags, **same), tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["one, solo, red"] for i in range(6)}
    error = capsys.readouterr().err
    assert "left out 6 files of captions, since another file of the same image is used, the first is" in error
    assert error.count("\n") == 1
    assert ".caption" in error


@pytest.mark.parametrize(
    ("first", "second", "third", "reported"),
    [
        ("[]", "a red ball", None, 0),
        ("a red ball", None, {"captions": ["a red ball"], "caption": "a kite"}, 0),
        ("a red ball", "['a', 'b']", {"caption": "a kite"}, 6),
        ("a red ball", None, {"caption": ["a kite"]}, 6),
    ],
)
def test_which_file_of_captions_of_an_image_is_used(tmp_path, capsys, first, second, third, reported):
    texts = {"txt": first, "caption": second, "json": third and json.dumps(third)}
    files = {f"{i}__{suffix}": text for i in range(6) for suffix, text in texts.items() if text}
    importers.import_folder(six(tmp_path / "in", **files), tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["a red ball"] for i in range(6)}
    assert (f"left out {reported} files of captions" in capsys.readouterr().err) == bool(reported)


def test_captions_next_to_images_of_another_unicode_form(tmp_path):
    for i in range(3):
        make_image(tmp_path / "in" / f"cafe\u0301{i}.jpg")
        text(tmp_path / "in" / f"caf\u00e9{i}.txt", "a café")
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    assert len(all_captions(tmp_path / "out")) == 3


def test_captions_next_to_images_that_a_table_replaces_are_counted(tmp_path, capsys):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"), **{f"{i}__txt": f"ball {i}" for i in range(6)})
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["a red ball"] for i in range(6)}
    left_out = "left out 6 .txt files next to an image, as a table holds the captions, the first is"
    assert f"{left_out} {source}/0.txt\n" in capsys.readouterr().err


def test_a_table_next_to_a_metadata_file_is_reported(tmp_path, capsys):
    source = six(tmp_path / "in", metadata__csv=csv_rows("file_name,text"), c__csv=csv_rows("image,caption"))
    importers.import_folder(source, tmp_path / "out")
    line = f"left out 1 table next to a metadata file, which holds the captions: {source}/c.csv\n"
    assert line in capsys.readouterr().err


def test_a_json_table_counts_beside_others(tmp_path, capsys):
    rows = json.dumps([{"image": f"{i}.jpg", "caption": "a dog"} for i in (4, 5)])
    first = "image,caption\n" + "".join(f"{i}.jpg,a ball\n" for i in range(4))
    source = six(tmp_path / "splits", train__csv=first, test__json=rows)
    importers.import_folder(source, tmp_path / "out")
    assert captions(tmp_path / "out", "test") == {"4.jpg": ["a dog"], "5.jpg": ["a dog"]}
    source = six(tmp_path / "two", c__csv=csv_rows("image,caption"), more__json=rows)
    with pytest.raises(InputError, match=r"c\.csv and \S+more\.json may both hold the captions"):
        importers.import_folder(source, tmp_path / "out2")
    source = six(tmp_path / "texts", more__json=rows, **{f"{i}__txt": "a ball" for i in range(6)})
    importers.import_folder(source, tmp_path / "out2")
    assert set(map(tuple, all_captions(tmp_path / "out2").values())) == {("a ball",)}
    assert f"left out 1 table of few images, as files next to the images hold captions: {source}/more.json" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["quality_test__csv", "test__json", "metadata__csv"])
def test_a_table_of_a_split_with_few_images_does_not_replace_files_next_to_more(tmp_path, capsys, name):
    remark = {"file_name": "0.jpg", "caption": "this photo is too dark"}
    table = json.dumps([remark]) if "json" in name else "file_name,caption\n0.jpg,this photo is too dark\n"
    source = six(tmp_path / "in", **{name: table}, **{f"{i}__txt": "a red ball" for i in range(6)})
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["a red ball"] for i in range(6)}
    assert "left out 1 table of few images, as files next to the images hold captions" in capsys.readouterr().err


def test_names_that_recur_in_many_folders_are_found_by_their_ends():
    index = ImageIndex.__new__(ImageIndex)
    keys = [f"in/v{i}/frames/{k:04}.jpg" for i in range(500) for k in range(10)]
    index.folder, index.paths, index.by_tail = Path("in"), {key: [Path(key)] for key in keys}, {}
    calls = []
    real = index._with_tail
    index._with_tail = lambda tail: calls.append(real(tail)) or calls[-1]
    assert all(index._matches(key.removeprefix("in/"), anywhere=True) == [key] for key in keys)
    assert all(index._matches(key.removesuffix(".jpg"), anywhere=False) == [key] for key in keys)
    assert max(map(len, calls)) == 1, "every row goes through the images of its name"
    assert len(index._matches("0003.jpg", anywhere=True)) == 500
    assert index._matches("0003.jpg", anywhere=False) == index._matches("v1/frames/0003.png", anywhere=True) == []


@pytest.mark.parametrize("address", ["https://x.org/data.csv", "s3://bucket/data"])
def test_a_web_address_is_named_as_it_was_written(address, tmp_path):
    for command in (importers.import_folder, importers.import_karpathy, importers.import_flickr):
        with pytest.raises(InputError, match=f"^{address} is a web address, and nothing is fetched"):
            command(Path(address), tmp_path / "out")
    with pytest.raises(InputError, match=f"^{address} is a web address; name a place"):
        importers.import_folder(six(tmp_path / "in"), Path(address))
    with pytest.raises(InputError, match=f"^{address} is a web address"):
        importers.merge((tmp_path / "in", Path(address)), tmp_path / "out")
    with pytest.raises(InputError, match=f"^{address} is a web address"):
        read_text(Path(address))


def test_a_folder_without_permission_is_not_called_missing(tmp_path, monkeypatch):
    source, scandir = six(tmp_path / "in", c__csv=csv_rows("image,caption")), os.scandir

    def refuse(path="."):
        if str(path) == str(source):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for command in (
        lambda: importers.import_folder(source, tmp_path / "out"),
        lambda: importers.merge((source, tmp_path), tmp_path / "out"),
        lambda: find_split(source, "train"),
    ):
        with pytest.raises(InputError, match=r"in cannot be read \(Permission denied\); change its permissions"):
            command()


def test_a_byte_order_mark_counts_more_than_a_given_encoding(tmp_path):
    files = {"0__txt": "a café".encode("cp1252"), "1__txt": "a café".encode("utf-8-sig")}
    files["2__txt"] = "a café".encode("utf-16")
    importers.import_folder(six(tmp_path / "in", **files), tmp_path / "out", encoding="cp1252")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["a café"] for i in range(3)}


def test_a_json_file_without_captions_is_told_what_it_lacks(tmp_path):
    source = six(tmp_path / "in", **{f"{i}__json": '{"text": "a ball"}' for i in range(6)})
    with pytest.raises(InputError, match=r'nor a \.json file with "caption" or "captions"'):
        importers.import_folder(source, tmp_path / "out")


def test_an_image_that_exists_in_another_folder_is_told_apart(tmp_path):
    for name in (str(tmp_path / "photos" / "0.jpg"), "../photos/0.jpg"):
        six(tmp_path / "photos")
        source = six(tmp_path / "in", c__csv=csv_rows("image,caption") + f"{name},a ball\n")
        with pytest.raises(InputError, match=r"line 8: .*/photos/0\.jpg is not in .*/in; name the folder .* --images"):
            importers.import_folder(source, tmp_path / "out")


def test_missing_captions_of_txt_files_are_counted(tmp_path, capsys):
    source = six(tmp_path / "in", **{f"{i}__txt": "\na ball\n\nnan\n" for i in range(5)}, **{"5__txt": " \n\n"})
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["a ball"] for i in range(5)}
    error = capsys.readouterr().err
    assert f"left out 6 empty captions, the first is {source}/0.txt, line 4\n" in error
    assert f"left out 1 image without a caption: {source}/5.jpg\n" in error


def test_two_images_of_one_txt_file_are_refused(tmp_path):
    source = six(tmp_path / "in", **{f"{i}__txt": "a red ball" for i in range(6)})
    Image.new("RGB", (8, 6)).save(source / "0.png")
    with pytest.raises(InputError, match=r"0\.txt may be of .*/0\.jpg or of .*/0\.png"):
        importers.import_folder(source, tmp_path / "out")


@pytest.mark.parametrize("form", ["metadata.jsonl", "metadata.csv", "sidecars"])
def test_folders_called_like_splits_are_splits(tmp_path, form):
    for folder in ("train", "validation", "test"):
        source = six(
            tmp_path / "in" / folder, **{f"{i}__txt": f"a red {folder}" for i in range(6 * (form == "sidecars"))}
        )
        if form == "metadata.jsonl":
            text(source / form, lines(json_rows(file_name="{}.jpg", text=f"a red {folder}")))
        if form == "metadata.csv":
            text(source / form, csv_rows("file_name,text", "{}.jpg,a red " + folder))
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    for split, folder in (("train", "train"), ("val", "validation"), ("test", "test")):
        expected = {f"{folder}/{i}.jpg": [f"a red {folder}"] for i in range(6)}
        assert captions(tmp_path / "out", split) == expected


def test_several_tables_are_refused_with_their_names(tmp_path):
    source = six(tmp_path / "in", a__csv=csv_rows("image,caption"), b__csv=csv_rows("image,caption"))
    with pytest.raises(InputError, match=r"a\.csv and .*/b\.csv may both hold the captions"):
        importers.import_folder(source, tmp_path / "out")
    importers.import_folder(source / "b.csv", tmp_path / "out")
    source = six(
        tmp_path / "hf",
        metadata__csv=csv_rows("file_name,text"),
        metadata__jsonl=lines(json_rows(file_name="{}.jpg", text="a red ball")),
    )
    with pytest.raises(InputError, match="may both hold"):
        importers.import_folder(source, tmp_path / "out2")
    tokens = "".join(f"{i}.jpg#0\ta red ball\n" for i in range(6))
    source = six(tmp_path / "flickr", x__token=tokens, captions__txt=csv_rows("image,caption"))
    with pytest.raises(InputError, match=r"captions in .*x\.token and in .*captions\.txt; name the file"):
        importers.import_flickr(source, tmp_path / "out3")
    importers.import_flickr(source / "x.token", tmp_path / "out3")


# Splits


@pytest.mark.parametrize(
    "names",
    [
        ("training", "Train", "TEST", "valid", "Evaluation", "validate"),
        ("trn", "restval", "tst", "dev", "val2014", "eval"),
    ],
)
def test_names_of_splits(tmp_path, names):
    table = "image,caption,split\n" + "".join(f"{i}.jpg,a red ball,{name}\n" for i, name in enumerate(names))
    importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "out")
    assert set(captions(tmp_path / "out", "train")) == {"0.jpg", "1.jpg"}
    assert set(captions(tmp_path / "out", "test")) == {"2.jpg"}
    assert set(captions(tmp_path / "out", "val")) == {"3.jpg", "4.jpg", "5.jpg"}


def test_an_image_keeps_its_split_when_others_are_added(tmp_path):
    splits = []
    for count in (120, 180):
        folder = tmp_path / str(count)
        for i in range(count):
            make_image(folder / f"{i}.jpg")
        text(folder / "c.csv", "image,caption\n" + "".join(f"{i}.jpg,a red ball\n" for i in range(count)))
        importers.import_folder(folder, tmp_path / f"out{count}")
        splits.append({split: set(captions(tmp_path / f"out{count}", split)) for split in ("train", "val", "test")})
    before, after = splits
    assert all(len(before[split]) > 1 for split in before)
    assert all(before[split] < after[split] for split in before)


def test_a_validation_split_is_made_from_the_training_split_and_reported(tmp_path, capsys):
    for i in range(45):
        make_image(tmp_path / "in" / f"{i}.jpg")
    table = "image,caption,split\n" + "".join(
        f"{i}.jpg,a red ball,{'test' if i > 40 else 'train'}\n" for i in range(45)
    )
    text(tmp_path / "in" / "c.csv", table)
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    assert [len(captions(tmp_path / "out", split)) for split in ("train", "val", "test")] == [40, 1, 4]
    assert "moved 1 image of train to val, since there was no validation split" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["trainImages", "devImages", "testImages"])
def test_flickr8k_with_one_split_file_only(flickr8k, tmp_path, capsys, split):
    for path in (flickr8k / "Flickr8k_text").glob("*Images.txt"):
        if split not in path.name:
            path.unlink()
    importers.import_flickr(flickr8k, tmp_path / "out")
    assert len(all_captions(tmp_path / "out")) == {"trainImages": 2, "devImages": 1, "testImages": 1}[split]
    assert ("moved 1 image of train to val" in capsys.readouterr().err) == (split == "trainImages")


@pytest.mark.parametrize(
    "names",
    [
        ("training.txt", "validation.txt", "testing.txt"),
        ("train_imgs.txt", "valid.txt", "test-images.txt"),
        ("train.csv", "dev.csv", "Test.csv"),
        ("trainset.txt", "val2017.txt", "test_photos.txt"),
        ("train_list.txt", "val_ids.txt", "test_names.csv"),
        ("train.csv", "val_file.csv", "test_files.txt"),
    ],
)
def test_split_files_of_other_names(tmp_path, names):
    tables = {name: f"{2 * i}.jpg\n{2 * i + 1}.jpg\n" for i, name in enumerate(names)}
    if names[0].endswith(".csv"):
        tables[names[0]] = 'image,id\n"0.jpg",0\n1.jpg,1\n'
    if names[1].endswith(".csv"):  # as pandas writes it
        tables[names[1]] = ",Image\n0,2.jpg\n1,3.jpg\n"
    source = six(tmp_path / "in", captions__txt=csv_rows("image,caption"), **tables)
    importers.import_flickr(source, tmp_path / "out")
    assert set(captions(tmp_path / "out", "val")) == {"2.jpg", "3.jpg"}
    assert set(captions(tmp_path / "out", "test")) == {"4.jpg", "5.jpg"}


def test_the_encoding_of_the_captions_need_not_be_that_of_split_files(tmp_path):
    source = six(tmp_path / "in", captions__txt=csv_rows("image,caption", "{}.jpg,a café").encode("utf-16-le"))
    six(source, train__txt="0.jpg\n1.jpg\n", test__txt="5.jpg\n".encode("utf-16-le"))
    importers.import_flickr(source, tmp_path / "out", encoding="utf-16-le")
    assert captions(tmp_path / "out", "test") == {"5.jpg": ["a café"]}


def test_a_file_of_captions_is_not_its_own_split_file(tmp_path):
    source = six(tmp_path / "in", captions_train__txt=csv_rows("image,caption"))
    importers.import_flickr(source / "captions_train.txt", tmp_path / "out")
    assert len(all_captions(tmp_path / "out")) == 6


def test_names_in_split_files_may_have_another_unicode_form(tmp_path):
    names = [f"cafe\u0301{i}.jpg" for i in range(3)]
    for name in names:
        make_image(tmp_path / "in" / name)
    text(tmp_path / "in" / "x.token", "".join(f"{name}#0\ta café\n" for name in names))
    for name, split in zip(names, ("train", "val", "test"), strict=True):
        text(tmp_path / "in" / f"{split}.txt", unicodedata.normalize("NFC", name))
    importers.import_flickr(tmp_path / "in", tmp_path / "out")
    assert set(captions(tmp_path / "out", "val")) == {"caf\u00e91.jpg"}


@pytest.mark.parametrize(
    "form",
    [
        *("{}2017", "{}_images", "{}Images", "{}2014/more", "{}_2017", "{}set", "{}2017_imgs", "{} Data", "{}_dataset"),
        *("{}_resized", "{}_256", "{}-224x224", "{}_small", "{}2014_resized", "images_{}", "img-{}"),
    ],
)
def test_folders_named_after_splits(tmp_path, form):
    for split in ("train", "val", "test"):
        six(tmp_path / "in" / form.format(split), **{f"{i}__txt": f"a {split}" for i in range(6)})
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    assert set(map(str, captions(tmp_path / "out", "val").values())) == {"['a val']"}
    assert len(captions(tmp_path / "out", "test")) == 6


@pytest.mark.parametrize("outer", ["train", "dev", "train/test"])
def test_folders_of_splits_in_a_folder_named_after_one(tmp_path, outer):
    for split in ("train", "val", "test"):
        six(tmp_path / "in" / outer / split, **{f"{i}__txt": f"a {split}" for i in range(6)})
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    for split in ("train", "val", "test"):
        assert set(map(str, captions(tmp_path / "out", split).values())) == {f"['a {split}']"}


def test_all_images_in_the_folder_of_one_split(tmp_path):
    six(tmp_path / "in" / "test", **{f"{i}__txt": "a ball" for i in range(6)})
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    assert len(captions(tmp_path / "out", "test")) == 6


def test_a_table_named_after_an_image_is_pointed_to(tmp_path):
    rows = [{"image": f"{i}.jpg", "caption": "a ball"} for i in range(6)]
    source = six(tmp_path / "in", **{"0__json": json.dumps(rows)})
    with pytest.raises(InputError, match=r"holds no table of captions .*; name .*0\.json itself if it holds"):
        importers.import_folder(source, tmp_path / "out")
    importers.import_folder(source / "0.json", tmp_path / "out")


@pytest.mark.parametrize("name", ["flickr_", "flickr30k"])
def test_folders_whose_names_say_more_than_a_split(tmp_path, capsys, name):
    for folder in (f"{name}train", f"{name}test"):
        six(tmp_path / "in" / folder, **{f"{i}__txt": "a ball" for i in range(6)})
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    line = f"took no split from 12 images, whose folder's name is not just train, val or test, the first is {name}"
    assert line in capsys.readouterr().err


def test_folders_named_after_splits_that_do_not_hold_all_images(tmp_path, capsys):
    for folder in ("train", "val", "extra"):
        six(tmp_path / "in" / folder, **{f"{i}__txt": "a ball" for i in range(6)})
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    line = "ignored the split in the folder of 12 images, since other images are in no such folder, the first is train/"
    assert line in capsys.readouterr().err


# Images of one name


def test_karpathys_filepath_tells_images_of_one_name_apart(tmp_path):
    entries = []
    for width, (folder, split) in enumerate(
        [("cats", "train"), ("dogs", "train"), ("cats", "val"), ("birds", "val")], 10
    ):
        name = f"{split}.jpg"
        make_image(tmp_path / "in" / folder / name, (width, 6))
        make_image(tmp_path / "in" / "a_small" / folder / name, (2, 2))
        sentences = [{"raw": f"{folder} {width}"}]
        entries.append({"filepath": folder, "filename": name, "split": split, "sentences": sentences})
    text(tmp_path / "in" / "dataset_x.json", json.dumps({"images": entries}))
    before = {path: path.read_bytes() for path in (tmp_path / "in").rglob("*.jpg")}
    importers.import_karpathy(tmp_path / "in", tmp_path / "out")
    for split in ("train", "val"):
        for name, [caption] in captions(tmp_path / "out", split).items():
            with Image.open(tmp_path / "out" / "images" / split / name) as image:
                assert caption.split()[1] == str(image.width)
                assert caption.split()[0] in ("cats", "dogs", "birds")
    assert set(captions(tmp_path / "out", "train")) == {"cats/train.jpg", "dogs/train.jpg"}
    assert {path: path.read_bytes() for path in (tmp_path / "in").rglob("*.jpg")} == before


@pytest.mark.parametrize("where", [".", "extra/train2014", "images"])
def test_karpathys_images_in_other_folders_than_filepath_says(tmp_path, capsys, where):
    for i in range(3):
        make_image(tmp_path / "in" / where / f"{i}.jpg")
    sentences = [{"tokens": ["a", "cat"]}]
    entries = [
        {"filepath": "train2014", "filename": f"{i}.jpg", "split": "train", "sentences": sentences} for i in range(3)
    ]
    text(tmp_path / "in" / "dataset_x.json", json.dumps({"images": entries}))
    if where == "images":
        with pytest.raises(InputError, match=r"images\[0\]: train2014/0\.jpg is not under .*--images"):
            importers.import_karpathy(tmp_path / "in", tmp_path / "out")
    importers.import_karpathy(tmp_path / "in", tmp_path / "out", images=tmp_path / "in" / where.split("/")[0])
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["a cat"] for i in range(3)}
    told = "took 3 images outside the folder that filepath names, the first is train2014/0" in capsys.readouterr().err
    assert told == (where != "extra/train2014")


def test_karpathys_tokens_are_a_list(tmp_path):
    entry = {"filename": "0.jpg", "split": "train", "sentences": [{"tokens": "a red ball"}]}
    source = six(tmp_path / "in", dataset_x__json=json.dumps({"images": [entry]}))
    with pytest.raises(InputError, match=r"images\[0\] is not an entry"):
        importers.import_karpathy(source, tmp_path / "out")


@pytest.mark.parametrize("missing", [None, math.nan, "", " ", "nan", "..."], ids=str)
def test_karpathys_missing_captions_are_left_out_and_counted(tmp_path, capsys, missing):
    sentences = [{"raw": "a red ball"}, {"raw": missing}]
    entries = [{"filename": f"{i}.jpg", "split": "train", "sentences": sentences} for i in range(6)]
    source = six(tmp_path / "in", dataset_x__json=json.dumps({"images": entries}))
    importers.import_karpathy(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["a red ball"] for i in range(6)}
    assert f"left out 6 empty captions, the first is {source}/dataset_x.json, images[0]\n" in capsys.readouterr().err


def test_karpathys_entries_that_share_an_image_or_an_id_are_refused(tmp_path):
    make_image(tmp_path / "in" / "0.jpg")
    make_image(tmp_path / "in" / "1.jpg")
    rows = [
        {"filename": name, "split": "train", "cocoid": 7, "sentences": [{"raw": "a"}]} for name in ("0.jpg", "1.jpg")
    ]
    text(tmp_path / "in" / "dataset_x.json", json.dumps({"images": rows}))
    with pytest.raises(InputError, match=r"[01]\.jpg and .*[01]\.jpg both have the image id 7"):
        importers.import_karpathy(tmp_path / "in", tmp_path / "out")
    text(tmp_path / "in" / "dataset_x.json", json.dumps({"images": [rows[0], rows[0]]}))
    with pytest.raises(InputError, match=r"images\[1\]: .*0\.jpg is the image of .*images\[0\] already"):
        importers.import_karpathy(tmp_path / "in", tmp_path / "out")


def test_karpathys_ids_are_whole_numbers_in_any_form(tmp_path):
    def write(*ids: object) -> None:
        rows = [
            {"filename": f"{i}.jpg", "split": "train", "cocoid": image_id, "sentences": [{"raw": "a"}]}
            for i, image_id in enumerate(ids)
        ]
        text(tmp_path / "in" / "dataset_x.json", json.dumps({"images": rows}))

    for i in range(3):
        make_image(tmp_path / "in" / f"{i}.jpg")
    write("007", 9.0, 8)
    importers.import_karpathy(tmp_path / "in", tmp_path / "out")
    annotations = json.loads(next((tmp_path / "out" / "annotations").glob("captions_train*.json")).read_text())
    val = json.loads(next((tmp_path / "out" / "annotations").glob("captions_val*.json")).read_text())
    ids = [image["id"] for part in (annotations, val) for image in part["images"]]
    assert sorted(ids) == [7, 8, 9]
    assert {type(i) for i in ids} == {int}
    write("7", 7.0, 8)
    with pytest.raises(InputError, match=r"both have the image id 7"):
        importers.import_karpathy(tmp_path / "in", tmp_path / "out2")
    write("a7", 9, 8)
    with pytest.raises(
        InputError, match=r"images\[0\] has an image id that is not a whole number: 'a7' \(its cocoid\)"
    ):
        importers.import_karpathy(tmp_path / "in", tmp_path / "out2")


def test_flickrs_images_of_one_name_in_several_folders_are_refused(flickr8k, tmp_path):
    make_image(flickr8k / "resized" / "1_a.jpg")
    with pytest.raises(
        InputError, match=r"1_a\.jpg may be .*/Flicker8k_Dataset/1_a\.jpg or .*/resized/1_a\.jpg; .*--images"
    ):
        importers.import_flickr(flickr8k, tmp_path / "out")
    importers.import_flickr(flickr8k, tmp_path / "out", images=flickr8k / "Flicker8k_Dataset")
    make_image(flickr8k / "Flicker8k_Dataset" / "resized" / "2_b.jpg")
    importers.import_flickr(flickr8k, tmp_path / "out2", images=flickr8k / "Flicker8k_Dataset")
    linked = tmp_path / "out2" / "images" / "train" / "2_b.jpg"
    assert os.path.samefile(linked, flickr8k / "Flicker8k_Dataset" / "2_b.jpg")


def test_a_tables_images_in_a_subfolder(tmp_path):
    source = six(tmp_path / "in" / "images").parent
    text(source / "c.csv", csv_rows("image,caption"))
    importers.import_folder(source, tmp_path / "out")
    assert set(all_captions(tmp_path / "out")) == {f"images/{i}.jpg" for i in range(6)}
    six(source / "thumbs")
    with pytest.raises(InputError, match=r"line 2: 0\.jpg may be .*/images/0\.jpg or .*/thumbs/0\.jpg"):
        importers.import_folder(source, tmp_path / "out2")
    text(source / "c.csv", csv_rows("image,caption", "thumbs/{}.jpg,a red ball"))
    importers.import_folder(source, tmp_path / "out2")
    assert set(all_captions(tmp_path / "out2")) == {f"thumbs/{i}.jpg" for i in range(6)}


def test_a_missing_image_is_not_taken_from_a_subfolder(tmp_path):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"))
    six(source / "thumbs")
    (source / "3.jpg").unlink()
    with pytest.raises(InputError, match=r"line 5: 3\.jpg is not under"):
        importers.import_folder(source, tmp_path / "out")


def test_composed_and_decomposed_names_are_one(tmp_path):
    make_image(tmp_path / "in" / "cafe\u0301.jpg")
    text(tmp_path / "in" / "c.csv", "image,caption,split\ncaf\u00e9.jpg,a café,train\n")
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    assert all_captions(tmp_path / "out") == {"caf\u00e9.jpg": ["a café"]}


# Links, pipes, names


def test_links_to_folders_are_followed_and_loops_are_not(flickr8k, tmp_path):
    (flickr8k / "Flicker8k_Dataset").rename(tmp_path / "disk")
    (flickr8k / "Images").symlink_to(tmp_path / "disk")
    (flickr8k / "loop").symlink_to(flickr8k)
    (tmp_path / "disk" / "self.jpg").symlink_to(tmp_path / "disk" / "self.jpg")
    importers.import_flickr(flickr8k, tmp_path / "out")
    assert len(all_captions(tmp_path / "out")) == 4


@pytest.mark.parametrize("kind", ["dangling", "pipe", "folder"])
def test_an_image_that_is_no_file_is_named(flickr8k, tmp_path, kind):
    path = flickr8k / "Flicker8k_Dataset" / "3_c.jpg"
    path.unlink()
    {"dangling": lambda: path.symlink_to("nowhere.jpg"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(InputError, match=r"devImages\.txt, line 1: .*3_c\.jpg is (a broken link|not under)"):
        importers.import_flickr(flickr8k, tmp_path / "out")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path)], ids=["pipe", "loop"])
def test_captions_that_are_no_file_are_one_sentence(tmp_path, make):
    make(tmp_path / "captions.csv")
    make(tmp_path / "dataset_x.json")
    make(tmp_path / "x.token.txt")
    make_image(tmp_path / "a.jpg")
    for act in (importers.import_folder, importers.import_karpathy, importers.import_flickr):
        with pytest.raises(
            InputError, match=r"(captions\.csv|dataset_x\.json|x\.token\.txt) (is not a|cannot be read)"
        ):
            act(tmp_path, tmp_path / "out")


def test_names_with_control_characters_do_not_reach_the_terminal(tmp_path):
    source = tmp_path / "in\x1b[31m"
    six(source, **{f"{i}__txt": "a red ball" for i in range(6)})
    make_image(source / "new\nline.jpg")
    text(source / "new\nline.txt", "a red ball")
    command = ("importers.py", "folder", source, tmp_path / "out\x1b[2J")
    refused = run_script(*command)
    assert refused.returncode == 2
    assert r"new\nline.jpg" in refused.stderr
    (source / "new\nline.jpg").unlink()
    done = run_script(*command)
    assert done.returncode == 0
    for output in (refused.stderr, done.stdout, done.stderr):
        assert output.replace("\n", "").isprintable()
        assert output.count("\n") == 1


def test_a_name_that_is_not_text_is_one_sentence(tmp_path):
    make_image(tmp_path / "in" / os.fsdecode(b"caf\xe9.jpg"))
    text(tmp_path / "in" / os.fsdecode(b"caf\xe9.txt"), "a red ball")
    with pytest.raises(InputError, match="which a data set cannot hold; rename it"):
        importers.import_folder(six(tmp_path / "in", **{f"{i}__txt": "a" for i in range(6)}), tmp_path / "out")


@pytest.mark.parametrize(
    "command", [("importers.py", "folder", "."), ("scenes.py",), ("download.py", "coco", "--root")]
)
def test_a_destination_that_is_an_address_is_refused(command):
    done = run_script(*command, "s3://bucket/out")
    assert done.returncode == 2
    assert "is a web address; name a place on this computer." in done.stderr


@pytest.mark.parametrize("destination", ["a" * 300, "file.txt/out", ".", "", "/proc/none/out"])
def test_destinations_that_cannot_be_written_are_one_sentence(tmp_path, monkeypatch, destination):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"))
    text(tmp_path / "work" / "file.txt", "precious")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(InputError, match=r"cannot be (written|read)|is not empty"):
        importers.import_folder(source, Path(destination))
    with pytest.raises(InputError, match="does not exist"):
        importers.import_folder(Path("b" * 300), tmp_path / "out")
    assert (tmp_path / "work" / "file.txt").read_text() == "precious"


def test_a_read_only_destination_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_args, **_keywords):
        raise PermissionError(13, "Permission denied")

    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="out cannot be written: Permission denied"):
        importers.import_folder(source, tmp_path / "out")


def test_a_table_that_cannot_be_decoded_is_not_left_out(tmp_path):
    six(tmp_path / "in", **{f"{i}__txt": "label 1" for i in range(6)})
    (tmp_path / "in" / "captions.csv").write_bytes("image,caption\n0.jpg,a café\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"captions\.csv, line 2, is not UTF-8 text.*--encoding"):
        importers.import_folder(tmp_path / "in", tmp_path / "out")


def test_a_data_set_without_training_images_is_reported(tmp_path, capsys):
    six(tmp_path / "in", test__csv="image,caption\n" + "".join(f"{i}.jpg,a ball\n" for i in range(6)))
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    assert "there is none to train on" in capsys.readouterr().err


def test_json_labels_of_a_few_images_are_no_table(tmp_path):
    six(
        tmp_path / "in",
        **{f"{i}__txt": "a big dog" for i in range(6)},
        examples__json='{"1.jpg": "dog", "2.jpg": "dog"}',
    )
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    assert {tuple(x) for x in captions(tmp_path / "out", "train").values()} == {("a big dog",)}


@pytest.mark.parametrize("row", ["0.jpg,a dog, brown,", "0.jpg,a dog, brown,a cat"])
def test_a_caption_with_the_separator_in_a_table_of_several_caption_columns(tmp_path, row):
    table = f"image,caption_1,caption_2\n{row}\n" + "".join(f"{i}.jpg,a red ball,\n" for i in range(1, 6))
    with pytest.raises(InputError, match=r"line 2, has more columns than the header's 3; put a caption that contains"):
        importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "out")


def test_lines_that_end_in_a_separator_where_there_are_several_caption_columns(tmp_path):
    table = "image,caption_1,caption_2\n" + "".join(f"{i}.jpg,a red ball,a ball,\n" for i in range(6))
    importers.import_folder(six(tmp_path / "in", c__csv=table), tmp_path / "out")
    assert set(map(tuple, all_captions(tmp_path / "out").values())) == {("a red ball", "a ball")}


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "review.csv",
            "image,comment\n1.jpg,too dark\n",
            "left out 1 table of few images, as files next to the images",
        ),
        ("captions.xlsx", "PK", "left out 1 spreadsheet; save as CSV what holds captions"),
        (
            "captions.txt",
            "image,caption\n0.jpg,a dog runs on grass\n",
            "left out 1 table beside other captions",
        ),
        (
            "train.json",
            '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a long human caption"}]}',
            "left out 1 COCO annotation file beside other captions",
        ),
        (
            "captions.json",
            '{"images": [], "annotations": [{"image_id": 1, "caption": "a long human caption"}]}',
            "left out 1 COCO annotation file beside other captions",
        ),
    ],
)
def test_other_tables_do_not_take_the_place_of_captions_next_to_the_images(tmp_path, capsys, name, content, line):
    source = six(tmp_path / "in", **{f"{i}__txt": "a big dog" for i in range(6)})
    text(source / name, content)
    importers.import_folder(source, tmp_path / "out")
    assert set(map(tuple, all_captions(tmp_path / "out").values())) == {("a big dog",)}
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("name", ["{}", "{}.jpg"])
@pytest.mark.parametrize("sidecar", ["0 0.5 0.5 0.2 0.1", "dog", "Car 0.00 0 1.5"])
def test_a_table_of_half_of_the_images_counts_more_than_labels_next_to_them(tmp_path, name, sidecar):
    table = "image,caption\n" + "".join(f"{name.format(i)},ball\n" for i in range(4))
    source = six(tmp_path / "in", c__csv=table, **{f"{i}__txt": sidecar for i in range(6)})
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["ball"] for i in range(4)}


def test_a_table_of_few_images_counts_more_than_one_word_labels(tmp_path):
    table = "image,caption\n" + "".join(f"{i}.jpg,a red ball\n" for i in range(3))
    source = six(tmp_path / "in", c__csv=table, **{f"{i}__txt": "dog" for i in range(6)})
    for i in range(6, 9):
        text(make_image(source / f"{i}.jpg", (30 + i, 6)).with_suffix(".txt"), "dog")
    importers.import_folder(source, tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["a red ball"] for i in range(3)}


def test_a_table_of_two_images_counts_more_than_a_note_next_to_one(tmp_path):
    source = six(tmp_path / "in", c__csv="image,caption\n1.jpg,ball\n2.jpg,ball\n", **{"0__txt": "a note here"})
    with pytest.raises(InputError, match=r"too few captioned images to split \(2\)"):
        importers.import_folder(source, tmp_path / "out")


def test_a_table_that_cannot_be_read_is_not_replaced_by_a_note_next_to_an_image(tmp_path):
    table = csv_rows("image,caption").replace("1.jpg,a red ball", "1.jpg,a red, ball")
    with pytest.raises(InputError, match=r"c\.csv, line 3, has more columns than the header's 2"):
        importers.import_folder(six(tmp_path / "in", c__csv=table, **{"0__txt": "a note here"}), tmp_path / "out")


def test_one_word_captions_in_one_of_two_json_files(tmp_path):
    captions_of = json.dumps({f"{i}.jpg": "cat" for i in range(6)})
    importers.import_folder(six(tmp_path / "in", c__json=captions_of, config__json='{"a": 1}'), tmp_path / "out")
    assert all_captions(tmp_path / "out") == {f"{i}.jpg": ["cat"] for i in range(6)}


def test_annotation_files_of_coco_beside_a_table_are_reported(tmp_path, capsys):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"))
    text(source / "annotations" / "captions_train.json", '{"annotations": [{"image_id": 1, "caption": "a dog runs"}]}')
    importers.import_folder(source, tmp_path / "out")
    assert "left out 1 COCO annotation file beside other captions" in capsys.readouterr().err


def test_a_json_file_too_large_to_look_into_is_reported_beside_a_table(tmp_path, capsys, monkeypatch):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption"), instances__json='{"annotations": [1, 2, 3]}')
    monkeypatch.setattr(folder_captions, "MAX_LIST", 10)
    importers.import_folder(source, tmp_path / "out")
    line = f"left out 1 file too large to look into beside other captions: {source}/instances.json"
    assert line in capsys.readouterr().err


def test_a_folder_of_images_named_twice_is_told_apart(tmp_path):
    source = six(tmp_path / "data" / "images", **{f"{i}__txt": "a big dog" for i in range(6)})
    with pytest.raises(InputError, match=rf"; name {source} without --images if its files hold the captions\.$"):
        importers.import_folder(source.parent, tmp_path / "out", images=source)


def test_a_file_that_is_no_list_of_a_split_is_one_sentence(flickr8k, tmp_path):
    text(flickr8k / "titanic" / "train.csv", "PassengerId,Survived\n1,0\n")
    with pytest.raises(
        InputError, match=r"PassengerId has no caption in .*; .* or move train\.csv away if it is no list"
    ):
        importers.import_flickr(flickr8k, tmp_path / "out")


def test_a_csv_file_whose_name_holds_token(tmp_path):
    source = six(tmp_path / "in", **{"captions__tokenized__csv": csv_rows("image,caption")})
    importers.import_flickr(source / "captions.tokenized.csv", tmp_path / "out", images=source)
    assert set(map(tuple, all_captions(tmp_path / "out").values())) == {("a red ball",)}


@pytest.mark.parametrize(
    "caption",
    [
        *("un cafÃ© Ã\xa0 la plage", "StraÃŸe am Meer", "собака на траве".encode().decode("latin-1")),
        *("a red ball\\na blue ball", "it&apos;s a <b>dog</b>", "caf\\u00e9", "a ball|a red ball|a toy"),
    ],
)
def test_misread_letters_and_escaped_line_breaks_are_reported(tmp_path, capsys, caption):
    importers.import_folder(
        six(tmp_path / "in", c__csv=csv_rows("image,caption", f"{{}}.jpg,{caption}")), tmp_path / "out"
    )
    assert "6 captions with " in capsys.readouterr().err


@pytest.mark.parametrize(
    "caption",
    [
        *("ein Café am Straßenrand", "Ein Hund hat Spaß…", "PELÉ’S GOAL", "a cup of NESCAFÉ™", "ROSÉ” wine", "MANHÃ…"),
        "собака на траве",
        "草地上的狗",
        "AT&T; C:/new, 3 < 4",
    ],
)
def test_captions_in_any_language_are_not_called_misread(tmp_path, capsys, caption):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption", f'{{}}.jpg,"{caption}"'))
    importers.import_folder(source, tmp_path / "out")
    assert "captions with " not in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["/content/drive/MyDrive/x/", "../input/images/", "C:\\Users\\me\\"])
def test_paths_of_another_computer_are_named(tmp_path, prefix):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption", f"{prefix}{{}}.jpg,a red ball"))
    with pytest.raises(InputError, match=r"\(there is 0\.jpg\); write paths relative to .*in, such as 0\.jpg"):
        importers.import_folder(source, tmp_path / "out")


def test_a_space_after_a_closing_quotation_mark_is_named(tmp_path):
    with pytest.raises(InputError, match=r"is not CSV: .*, and no space after a closing one"):
        importers.import_folder(
            six(tmp_path / "in", c__csv=csv_rows("image,caption", '{}.jpg,"a dog, brown" ')), tmp_path / "out"
        )


def test_the_metadata_files_of_all_folders_count_together(tmp_path, capsys):
    for folder in ("d0", "d1"):
        for i in range(4):
            make_image(tmp_path / "in" / folder / f"{i}.jpg", (8 + i, 6))
            if i < 3 and folder == "d0":
                (tmp_path / "in" / folder / f"{i}.txt").write_text("a note about this one")
        table = "file_name,text\n" + "".join(f"{i}.jpg,a red ball\n" for i in range(2))
        (tmp_path / "in" / folder / "metadata.csv").write_text(table)
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    assert len(all_captions(tmp_path / "out")) == 4
    assert "left out 3 .txt files next to an image, as a table holds the captions" in capsys.readouterr().err


def test_json_tables_of_splits_count_more_than_one_note(tmp_path):
    rows = [{"image": f"{i}.jpg", "caption": "a red ball"} for i in range(2)]
    source = six(tmp_path / "in", train__json=json.dumps(rows), val__json="[]", **{"5__txt": "a note about this photo"})
    importers.import_folder(source, tmp_path / "out")
    assert set(all_captions(tmp_path / "out")) == {"0.jpg", "1.jpg"}


@pytest.mark.parametrize(
    ("column", "values"), [("category", "action,appearance"), ("class", "dog,couch"), ("folder", "in,in/")]
)
def test_a_column_that_gives_no_folder_tells_no_images_apart(tmp_path, column, values):
    rows = "".join(f"{i}.jpg,a {value} {i},{value}\n" for i in range(6) for value in values.split(","))
    source = six(tmp_path / "in", c__csv=f"image,caption,{column}\n{rows}")
    importers.import_folder(source, tmp_path / "out")
    assert {len(texts) for texts in all_captions(tmp_path / "out").values()} == {2}


@pytest.mark.parametrize("names", ["{split}/{i}.jpg", "{i}.jpg"])
def test_a_category_called_like_a_split_is_no_folder(tmp_path, names):
    for split in ("train", "val"):
        for i in range(3):
            make_image(tmp_path / "in" / split / f"{i}.jpg", (8 + i, 6))
    tables = (
        {"c.csv": ("train", "val")}
        if "/" in names
        else {f"{split}/metadata.csv": (split,) for split in ("train", "val")}
    )
    for path, splits in tables.items():
        rows = [
            f"{names.format(split=split, i=i)},a {word} {i},{word}\n"
            for split in splits
            for i in range(3)
            for word in ("person", "train")
        ]
        (tmp_path / "in" / path).write_text("file_name,text,category\n" + "".join(rows))
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    assert [len(captions(tmp_path / "out", split)) for split in ("train", "val")] == [3, 3]


def test_a_column_of_folders_tells_images_apart_in_any_table(tmp_path):
    table = csv_rows("folder,image,caption", "a,{}.jpg,a red ball") + "b,0.jpg,a blue cat\n"
    six(tmp_path / "flickr" / "a").joinpath("captions.txt").write_text(table)
    six(tmp_path / "in" / "train", metadata__csv=table)
    classes = csv_rows("class,image,caption", "pets/a,{}.jpg,a red ball") + "pets/b,0.jpg,a blue cat\n"
    six(tmp_path / "classes" / "pets" / "a")
    (tmp_path / "classes" / "c.csv").write_text(classes)
    for source in ("flickr", "in", "classes"):
        command = importers.import_flickr if source == "flickr" else importers.import_folder
        with pytest.raises(InputError, match=r"0\.jpg has the (folder|class) \S*a and the (folder|class) \S*b; write"):
            command(tmp_path / source, tmp_path / f"{source}-out")


@pytest.mark.parametrize(
    ("name", "told"), [("captions_test_v2.csv", "captions_test_v2.csv"), ("test/captions.csv", "test")]
)
def test_a_split_in_the_name_of_a_table_that_is_not_taken_is_told(tmp_path, capsys, name, told):
    folder = six((tmp_path / "in" / name).parent)
    (tmp_path / "in" / name).write_text(csv_rows("image,caption"))
    importers.import_folder(tmp_path / "in" / name, tmp_path / "out", images=folder)
    sentence = f"took no split from 1 name, as nothing else gives splits; its images are divided: {tmp_path}/in/{told}"
    assert f"{sentence}\n" in capsys.readouterr().err


def test_tables_may_begin_with_the_name_of_their_split(tmp_path):
    rows = csv_rows("image,caption").splitlines(keepends=True)
    tables = {"train_captions__csv": "".join(rows[:5]), "test-annotations__csv": rows[0] + "".join(rows[5:])}
    importers.import_folder(six(tmp_path / "in", **tables), tmp_path / "out")
    assert set(captions(tmp_path / "out", "test")) == {"4.jpg", "5.jpg"}


def test_a_table_in_the_folder_of_each_split_is_to_be_called_metadata(tmp_path):
    for split in ("train", "val"):
        six(tmp_path / "in" / split, captions__csv=csv_rows("image,caption"))
    with pytest.raises(
        InputError, match=r"call \S+/in/\w+/captions\.csv and the tables of the other splits metadata\.csv"
    ):
        importers.import_folder(tmp_path / "in", tmp_path / "out")
    for split in ("train", "val"):
        (tmp_path / "in" / split / "captions.csv").rename(tmp_path / "in" / split / "metadata.csv")
    importers.import_folder(tmp_path / "in", tmp_path / "out")
    assert len(captions(tmp_path / "out", "val")) == 6


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("A wide shot of a city with a\nriver in front of it and\nmany boats.\n", True),
        ("a dog runs\na brown dog\n", False),
        ("A dog runs.\nA brown dog.\n", False),
        ("A dog runs\nA brown dog\na dog in the grass\n", False),
    ],
)
def test_a_caption_that_continues_in_the_next_line_is_told(tmp_path, capsys, text, told):
    source = six(tmp_path / "in", **{f"{i}__txt": text for i in range(6)})
    importers.import_folder(source, tmp_path / "out")
    assert ("read 6 files whose captions may continue in the next line" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    "caption", ['a \\"stop\\" sign', "a **red** ball", "1. a red ball", "- a ball", "a <a href='x'>ball"]
)
def test_escapes_and_markup_in_captions_are_reported(tmp_path, capsys, caption):
    source = six(tmp_path / "in", c__tsv=csv_rows("image\tcaption", f"{{}}.jpg\t{caption}"))
    importers.import_folder(source, tmp_path / "out")
    assert "read 6 captions with marks such as <start>, which are learned as words" in capsys.readouterr().err


def test_marks_are_sought_in_all_captions_that_may_have_some():
    assert not caption_texts.MAY_BE_MARKED.search("a man is skiing, kites in the sky; it's 5 o'clock")
    for number in range(0x3000):
        for text in (f"a {chr(number)} b", f"{chr(number)} b", f"a {chr(number)}{chr(number)} b"):
            if caption_texts.MARKS.search(text) or caption_texts._is_misread(text):
                assert caption_texts.MAY_BE_MARKED.search(text), text


def test_a_caption_of_bytes_is_no_text(tmp_path):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption", "{}.jpg,b'a dog runs'"))
    with pytest.raises(InputError, match=r"line 2, has a caption that is not text: b'a dog runs'"):
        importers.import_folder(source, tmp_path / "out")


def test_a_column_of_languages_holds_no_captions(tmp_path, capsys):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption,caption_language", "{}.jpg,一只 狗,中文"))
    importers.import_folder(source, tmp_path / "out")
    assert "caption_language" not in capsys.readouterr().err


def test_a_folder_of_tar_files_is_for_training_as_it_is(tmp_path):
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "train" / "00000.tar").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"tar files; unpack them or, if they hold captions, call them train-000000\.tar"
    ):
        importers.import_folder(tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match=r"rename train/00000\.tar to train-000000\.tar if it holds images"):
        find_split(tmp_path / "in", "train")
    with pytest.raises(InputError, match=r"no val\*\.tar; a data set is in the layout"):
        find_split(tmp_path / "in", "val")


def test_the_name_of_an_image_in_another_edition_of_coco_is_given(tmp_path):
    source = six(tmp_path / "in", c__csv=csv_rows("image,caption", "COCO_train2014_{}.jpg,a red ball"))
    with pytest.raises(InputError, match=r"COCO_train2014_0\.jpg is not under .* \(there is 0\.jpg\)"):
        importers.import_folder(source, tmp_path / "out")


def test_annotations_of_coco_under_another_name_are_named(tmp_path):
    make_image(tmp_path / "in" / "train" / "1.jpg", (8, 6))
    (tmp_path / "in" / "annotations").mkdir()
    document = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
    (tmp_path / "in" / "annotations" / "train.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"call \S+/annotations/train\.json annotations/captions_\{train,val,test\}"):
        importers.import_folder(tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match=r"rename annotations/train\.json to annotations/captions_train\.json"):
        find_split(tmp_path / "in", "train")
    with pytest.raises(InputError, match=r"captions_val<year>\.json and no val\*\.tar; a data set is in the layout"):
        find_split(tmp_path / "in", "val")
    with pytest.raises(
        InputError, match=r"in holds no annotations/\S+, nor one of val or test \(there is train\.json\)"
    ):
        importers.merge([tmp_path / "in", tmp_path / "in" / "annotations"], tmp_path / "out")


def test_captions_in_several_folders_are_to_be_put_next_to_the_images(tmp_path):
    for i in range(4):
        make_image(tmp_path / "in" / "jpg" / f"{i}.jpg", (8, 6))
        text = tmp_path / "in" / "text" / f"class_{i % 2}" / f"{i}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("a red ball")
    with pytest.raises(
        InputError, match=r"; put files of captions such as \S+/text/class_\d/\d\.txt next to their images"
    ):
        importers.import_folder(tmp_path / "in", tmp_path / "out")
