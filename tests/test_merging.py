import json
import math
import os
import shutil
from pathlib import Path

import pytest
from test_importers import captions, make_image, text

import importers
from captioning.captions import MAX_CAPTION
from captioning.errors import InputError
from captioning.scenes.dataset import draw_dataset
from data_loader import CaptionDataset

LONG = "a" * (MAX_CAPTION + 1)


def data_set(folder: Path, year: str = "", splits: dict[str, list[int]] | None = None, width: int = 8) -> Path:
    """A data set in COCO's layout: images of these ids, called 0.jpg, 1.jpg and so on in each split."""
    for split, ids in (splits or {"train": [1, 2], "val": [3], "test": [4]}).items():
        images, annotations = [], []
        for number, image_id in enumerate(ids):
            name = f"{number}.jpg"
            make_image(folder / "images" / f"{split}{year}" / name, (width + image_id, 6))
            images.append({"id": image_id, "file_name": name, "width": width + image_id, "height": 6})
            caption = f"A  {folder.name} {split},\n{image_id}."
            annotations.append({"id": number, "image_id": image_id, "caption": caption})
        document = json.dumps({"images": images, "annotations": annotations})
        text(folder / "annotations" / f"captions_{split}{year}.json", document)
    return folder


def ids(destination: Path) -> list[int]:
    documents = [json.loads(path.read_text()) for path in sorted((destination / "annotations").glob("captions_*.json"))]
    return [image["id"] for document in documents for image in document["images"]]


def test_two_data_sets_become_one(tmp_path, capsys):
    a = data_set(tmp_path / "a", "2014")
    b = data_set(tmp_path / "b", splits={"train": [2, 7], "val": [3]}, width=20)
    importers.merge((a, b), tmp_path / "out")
    assert captions(tmp_path / "out", "train") == {
        "a/0.jpg": ["A  a train,\n1."],
        "a/1.jpg": ["A  a train,\n2."],
        "b/0.jpg": ["A  b train,\n2."],
        "b/1.jpg": ["A  b train,\n7."],
    }
    assert captions(tmp_path / "out", "val") == {"a/0.jpg": ["A  a val,\n3."], "b/0.jpg": ["A  b val,\n3."]}
    assert captions(tmp_path / "out", "test") == {"a/0.jpg": ["A  a test,\n4."]}
    assert len(set(ids(tmp_path / "out"))) == 7
    assert {1, 2, 3, 4, 7} < set(ids(tmp_path / "out"))
    assert os.path.samefile(tmp_path / "out/images/train/b/1.jpg", b / "images/train/1.jpg")
    assert os.path.samefile(tmp_path / "out/images/val/a/0.jpg", a / "images/val2014/0.jpg")
    output = capsys.readouterr()
    assert "4 train, 2 val, 1 test images, 7 captions" in output.out
    assert output.err == ""
    assert len(CaptionDataset(tmp_path / "out", "train", vocab_threshold=1, cache=tmp_path / "cache")) == 4


def test_images_whose_files_are_named_in_another_unicode_form_are_found(tmp_path):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", width=20)
    document = json.loads((a / "annotations" / "captions_train.json").read_text())
    document["images"][1]["file_name"] = "caf\xe9.jpg"
    text(a / "annotations" / "captions_train.json", json.dumps(document))
    with pytest.raises(InputError, match=r"a/images/train/caf\xe9\.jpg is missing"):
        importers.merge((a, b), tmp_path / "out")
    (a / "images" / "train" / "1.jpg").rename(a / "images" / "train" / "cafe\u0301.jpg")
    importers.merge((a, b), tmp_path / "out")
    assert captions(tmp_path / "out", "train")["a/caf\xe9.jpg"] == ["A  a train,\n2."]


def test_data_sets_of_one_name_stay_apart(tmp_path):
    sources = tuple(
        data_set(tmp_path / folder / "set", width=width) for folder, width in (("x", 8), ("y", 30), ("z", 60))
    )
    importers.merge(sources, tmp_path / "out")
    assert set(captions(tmp_path / "out", "val")) == {"set/0.jpg", "set-2/0.jpg", "set-3/0.jpg"}


def test_test_images_without_public_captions_stay(tmp_path):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", "2017", width=20)
    secret = b / "annotations" / "captions_test2017.json"
    document = json.loads(secret.read_text())
    secret.unlink()
    text(secret.with_name("image_info_test2017.json"), json.dumps({"images": document["images"]}))
    importers.merge((a, b), tmp_path / "out")
    assert set(captions(tmp_path / "out", "test")) == {"a/0.jpg"}
    info = json.loads((tmp_path / "out/annotations/image_info_test.json").read_text())
    assert [image["file_name"] for image in info["images"]] == ["a/0.jpg", "b/0.jpg"]
    assert (tmp_path / "out/images/test/b/0.jpg").is_file()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_annotations_in_other_encodings_and_with_ids_as_text(tmp_path, encoding):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", width=20)
    path = b / "annotations" / "captions_train.json"
    document = json.loads(path.read_text())
    document["images"][0]["id"], document["images"][1]["id"] = "1", 2.0
    path.write_text(json.dumps(document), encoding=encoding)
    importers.merge((a, b), tmp_path / "out")
    assert captions(tmp_path / "out", "train")["b/1.jpg"] == ["A  b train,\n2."]


def test_images_that_one_set_trains_on_and_another_tests_on_are_counted(tmp_path, capsys):
    a = data_set(tmp_path / "a", splits={"train": [1, 2]})
    b = data_set(tmp_path / "b", splits={"val": [1]})
    importers.merge((a, b), tmp_path / "out")
    error = capsys.readouterr().err
    assert error == f"found 1 image of val or test that another source seems to train on: {b}/images/val/0.jpg\n"


def test_an_image_of_coco_2014_is_known_again_in_2017(tmp_path, capsys):
    a = data_set(tmp_path / "a", "2014", splits={"val": [4]})
    b = data_set(tmp_path / "b", "2017", splits={"train": [4]})
    for folder, name in ((a, "COCO_val2014_000000000004.jpg"), (b, "000000000004.jpg")):
        (annotations,) = (folder / "annotations").iterdir()
        (image,) = (folder / "images").rglob("*.jpg")
        change(annotations, images=[{"id": 4, "file_name": name}])
        image.rename(image.with_name(name))
    importers.merge((a, b), tmp_path / "out")
    assert "found 1 image of val or test that another source seems to train on: " in capsys.readouterr().err


def test_a_leak_is_found_among_images_of_one_name(tmp_path, capsys):
    a, b = (data_set(tmp_path / name, splits={"train": [1]}, width=width) for name, width in (("a", 8), ("b", 20)))
    c = data_set(tmp_path / "c", splits={"val": [1]})
    importers.merge((a, b, c), tmp_path / "out")
    assert "found 1 image of val or test that another source seems to train on: " in capsys.readouterr().err


def test_a_leak_is_found_without_sizes_too(tmp_path, capsys):
    a = data_set(tmp_path / "a", splits={"train": [1, 2]})
    b = data_set(tmp_path / "b", splits={"val": [1]})
    change(b / "annotations" / "captions_val.json", images=[{"id": 1, "file_name": "0.jpg"}])
    importers.merge((a, b), tmp_path / "out")
    assert "found 1 image of val or test that another source seems to train on" in capsys.readouterr().err


def test_captions_that_vizwiz_rejects_are_left_out(tmp_path, capsys):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", width=20)
    path = a / "annotations" / "captions_train.json"
    first, second = json.loads(path.read_text())["annotations"]
    spam = {**first, "id": 9, "caption": "x", "is_rejected": True}
    ready = {**first, "id": 10, "caption": "Quality issues are too severe.", "is_precanned": True}
    change(path, annotations=[first, second, spam, ready])
    assert sum(map(len, CaptionDataset(a, "train", vocab_threshold=1, cache=tmp_path / "x").references().values())) == 2
    assert "left out 2 rejected captions" in capsys.readouterr().err
    importers.merge((a, b), tmp_path / "out")
    assert captions(tmp_path / "out", "train")["a/0.jpg"] == [first["caption"]]
    assert "left out 2 rejected captions" in capsys.readouterr().err


def test_marks_in_captions_are_reported(tmp_path, capsys):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", width=20)
    path = a / "annotations" / "captions_train.json"
    first, second = json.loads(path.read_text())["annotations"]
    marked = ["startseq a dog endseq", "a cafÃ© and a dog"]
    change(path, annotations=[{**first, "caption": marked[0]}, {**second, "caption": marked[1]}])
    with_marks = "read 1 caption with marks such as <start>, which are learned as words: "
    misread = "read 1 caption with letters of a wrong encoding; save their file as UTF-8 anew: "
    CaptionDataset(a, "train", vocab_threshold=1, cache=tmp_path / "x")
    error = capsys.readouterr().err
    assert f"{with_marks}annotations[0]" in error
    assert f"{misread}annotations[1]" in error
    importers.merge((a, b), tmp_path / "out")
    error = capsys.readouterr().err
    assert f"{with_marks}{path}, annotations[0]" in error
    assert f"{misread}{path}, annotations[1]" in error


def test_data_sets_without_captions_are_not_merged(tmp_path):
    sources = [data_set(tmp_path / name, splits={"train": [1]}) for name in ("a", "b")]
    for source in sources:
        path = source / "annotations" / "captions_train.json"
        (entry,) = json.loads(path.read_text())["annotations"]
        change(path, annotations=[{**entry, "is_rejected": True}])
    with pytest.raises(
        InputError, match=r"hold no images with captions; left out 2 rejected captions, .*; nothing was"
    ):
        importers.merge(tuple(sources), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_other_names_of_splits_are_read(tmp_path):
    a, b = data_set(tmp_path / "a", "2017"), data_set(tmp_path / "b", width=20)
    for name in ("annotations/captions_val{}2017.json", "images/val{}2017"):
        (a / name.format("")).rename(a / name.format("id"))
    importers.merge((a, b), tmp_path / "out")
    assert captions(tmp_path / "out", "val") == {"a/0.jpg": ["A  a val,\n3."], "b/0.jpg": ["A  b val,\n3."]}
    assert len(CaptionDataset(a, "val", vocab_threshold=1, cache=tmp_path / "cache")) == 1


@pytest.mark.parametrize("name", ["captions_minival2014.json", "captions_val2014 (1).json", "Captions_val.json"])
def test_an_annotation_file_of_another_name_is_reported(tmp_path, capsys, name):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", width=20)
    (a / "annotations" / "captions_val.json").rename(a / "annotations" / name)
    text(a / "annotations" / "instances_val.json", "{}")
    importers.merge((a, b), tmp_path / "out")
    assert set(captions(tmp_path / "out", "val")) == {"b/0.jpg"}
    expected = "left out 1 annotation file not named captions_{train,val,test}<year>.json: "
    assert capsys.readouterr().err == f"{expected}{a}/annotations/{name}\n"


@pytest.mark.parametrize("missing", [None, "", " ", "nan", "None", [], [None]], ids=str)
def test_missing_captions_are_left_out_and_counted(tmp_path, capsys, missing):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", width=20)
    path = a / "annotations" / "captions_train.json"
    entries = json.loads(path.read_text())["annotations"]
    change(path, annotations=[*entries, {**entries[0], "caption": missing}])
    importers.merge((a, b), tmp_path / "out")
    assert captions(tmp_path / "out", "train")["a/0.jpg"] == [entries[0]["caption"]]
    assert capsys.readouterr().err == f"left out 1 empty caption: {path}, annotations[2]\n"


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def link_to_itself(path: Path) -> Path:
    path.symlink_to(path)
    return path


MISTAKES = {
    "no such folder": (lambda a, b: [a, b / "none"], r"none does not exist; check the path"),
    "a file": (lambda a, b: [a, a / "annotations/captions_train.json"], "is a file; name the folder of a data set"),
    "a link to itself": (lambda a, b: [a, link_to_itself(b / "loop")], "loop does not exist"),
    "one alone": (lambda a, b: [a], "at least two data sets"),
    "none": (lambda a, b: [], "at least two data sets"),
    "one twice": (lambda a, b: [a, b, a / ".." / "a"], r"/a is named 2 times"),
    "several years": (
        lambda a, b: [a, data_set(data_set(b, "2014"), "2017")],
        r"several years: captions_train\.json, captions_train2014\.json",
    ),
    "two names of a split": (
        lambda a, b: text(b / "annotations" / "captions_valid.json", "{}") and None,
        r"several files of the val split: captions_val\.json, captions_valid\.json; keep",
    ),
    "no caption": (
        lambda a, b: change(b / "annotations/captions_val.json", annotations=[{"image_id": 3}]),
        r"annotations\[0\] lacks \"caption\"",
    ),
    "a missing image": (
        lambda a, b: (b / "images/val/0.jpg").unlink(),
        r"val/0\.jpg is missing, but .*captions_val\.json",
    ),
    "an image outside": (
        lambda a, b: change(b / "annotations/captions_val.json", images=[{"id": 3, "file_name": "../train/0.jpg"}]),
        r"images\[0\] has a \"file_name\" outside the image folder",
    ),
    "an id twice": (
        lambda a, b: change(b / "annotations/captions_val.json", images=[{"id": 3, "file_name": "0.jpg"}] * 2),
        r"captions_val\.json, images\[1\] has the id 3, which an image before it has",
    ),
    "a name twice": (
        lambda a, b: change(
            b / "annotations/captions_val.json", images=[{"id": i, "file_name": f"{'./' * i}0.jpg"} for i in range(2)]
        ),
        r"captions_val\.json, images\[1\] lists 0\.jpg again, with another id; give all captions of an image one id",
    ),
    "no id": (
        lambda a, b: change(b / "annotations/captions_val.json", images=[{"file_name": "0.jpg"}]),
        r'images\[0\] lacks "id"',
    ),
    "no name": (lambda a, b: change(b / "annotations/captions_val.json", images=[{"id": 3}]), 'lacks "file_name"'),
    "no images": (lambda a, b: change(b / "annotations/captions_val.json", images={}), 'no list of "images"'),
    "another image": (
        lambda a, b: change(b / "annotations/captions_val.json", annotations=[{"image_id": 9, "caption": "a"}]),
        r"annotations\[0\] is a caption of image 9",
    ),
    "NaN": (
        lambda a, b: change(b / "annotations/captions_val.json", annotations=[{"image_id": 3, "caption": math.nan}]),
        "write null for NaN",
    ),
    "half a character": (
        lambda a, b: change(b / "annotations/captions_val.json", annotations=[{"image_id": 3, "caption": "a \ud83d"}]),
        r"half of a surrogate pair, near .*\"image_id\": 3, \"caption\": \"a .*ud83d",
    ),
    "a caption that training refuses": (
        lambda a, b: change(b / "annotations/captions_val.json", annotations=[{"image_id": 3, "caption": LONG}]),
        r"annotations\[0\] has a caption of more than 5,000 characters",
    ),
    "not JSON": (
        lambda a, b: text(b / "annotations/captions_val.json", "{"),
        r"captions_val\.json is not JSON",
    ),
    "a destination with files": (
        lambda a, b: text(b.with_name("out") / "mine.txt", "precious") and None,
        "is not empty",
    ),
}


def test_what_was_merged_can_be_merged_again(tmp_path):
    a, b, c = (data_set(tmp_path / name, width=8 + 20 * i) for i, name in enumerate("abc"))
    (b / "annotations/captions_test.json").rename(b / "annotations/image_info_test.json")
    change(a / "annotations/captions_test.json", annotations=[{"image_id": 4, "caption": ["a cat", "a dog"]}])
    importers.merge((a, b), tmp_path / "ab")
    importers.merge((tmp_path / "ab", c), tmp_path / "abc")
    assert captions(tmp_path / "abc", "test") == {"ab/a/0.jpg": ["a cat", "a dog"], "c/0.jpg": ["A  c test,\n4."]}
    images = json.loads((tmp_path / "abc/annotations/image_info_test.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["ab/a/0.jpg", "ab/b/0.jpg", "c/0.jpg"]


def test_what_drawn_images_show_is_kept(tmp_path):
    a, b = (draw_dataset(tmp_path / name, 2, 1, 1, seed) for seed, name in enumerate("ab"))
    importers.merge((a, b), tmp_path / "out")
    merged, *own = (
        list(CaptionDataset(x, "val", vocab_threshold=1).scenes().values()) for x in (tmp_path / "out", a, b)
    )
    assert merged == [scene for scenes in own for scene in scenes]
    assert len(merged) == 2


def test_an_image_without_a_caption_is_not_left_out_where_the_list_of_test_images_has_it(tmp_path, capsys):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", width=20)
    shutil.copy(a / "annotations/captions_test.json", a / "annotations/image_info_test.json")
    change(a / "annotations/captions_test.json", annotations=[])
    importers.merge((a, b), tmp_path / "out")
    assert "without a caption" not in capsys.readouterr().err
    images = json.loads((tmp_path / "out/annotations/image_info_test.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a/0.jpg", "b/0.jpg"]


@pytest.mark.parametrize(("act", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, act, message):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", width=20)
    sources = act(a, b)
    with pytest.raises(InputError, match=message) as caught:
        importers.merge(tuple(sources if isinstance(sources, list) else [a, b]), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.glob("out*/*")] in ([], ["mine.txt"])


def test_the_command(tmp_path, monkeypatch, capsys):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", width=20)
    monkeypatch.setattr("sys.argv", ["importers.py", "merge", str(a), str(b), str(tmp_path / "out")])
    importers.main()
    assert "4 train, 2 val, 2 test images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/hostname", "outside the image folder"),
        ("../../0.jpg", "outside the image folder"),
        ("a\0b", "with a line break or a zero byte"),
    ],
)
def test_an_image_outside_its_data_set_is_refused(name: str, reason: str, tmp_path: Path):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b")
    path = b / "annotations" / "captions_train.json"
    document = json.loads(path.read_text())
    document["images"][0]["file_name"] = name
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=rf'images\[0\] has a "file_name" {reason}'):
        importers.merge((a, b), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_is_reported(tmp_path, capsys):
    a, b = data_set(tmp_path / "a"), data_set(tmp_path / "b", splits={"train": [7]}, width=20)
    (a / "val-000.tar").touch()
    text(b / "annotations" / "val_captions.json", "{}")
    importers.merge((a, b), tmp_path / "out")
    errors = capsys.readouterr().err
    assert f"left out 1 tar file, as only folders of images are merged: {a}/val-000.tar" in errors
    assert (
        f"annotation file not named captions_{{train,val,test}}<year>.json: {b}/annotations/val_captions.json" in errors
    )
