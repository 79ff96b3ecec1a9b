"""The sample data set: what is drawn, what is said of it, and how it lies on disk."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_script
from PIL import Image, ImageChops
from pycocotools.coco import COCO

import scenes
from captioning.errors import InputError
from captioning.scenes import checking, composition, dataset, drawing, sentences, things, world

ROOT = Path(scenes.__file__).parent


def described(count: int, split: str = "train") -> list[tuple[dict, list[str]]]:
    pairs = []
    for index in range(count):
        rng = random.Random(f"0/{split}/{index}")
        scene = world.plan(rng)
        pairs.append((scene, sentences.describe(rng, scene)))
    return pairs


@pytest.fixture(scope="module")
def pairs() -> list[tuple[dict, list[str]]]:
    return described(2000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset.draw_dataset(tmp_path_factory.mktemp("data") / "scenes", train=24, val=6, test=5, seed=3)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def words(caption: str) -> list[str]:
    return caption.lower().replace(",", "").rstrip(".").split()


# --- scenes -----------------------------------------------------------------------------------------------


def test_scenes_are_varied(pairs):
    plans = [scene for scene, _ in pairs]
    assert {scene["kind"] for scene in plans} == set(world.MAIN_KINDS)
    assert len(world.MAIN_KINDS) >= 12
    assert {scene["setting"] for scene in plans} == set(world.SETTINGS)
    assert {scene["colour"] for scene in plans} == {*world.COLOURS, None}
    assert len(world.COLOURS) >= 6
    assert {scene["count"] for scene in plans} == {1, 2, 3}
    assert {scene["light"] for scene in plans} == {"day", "cloudy", "dusk", "night"}
    assert {other["relation"] for scene in plans for other in scene["others"]} == set(world.RELATIONS)
    assert 0.02 < sum(scene["greyscale"] for scene in plans) / len(plans) < 0.12
    kinds = Counter(scene["kind"] for scene in plans)
    assert min(kinds.values()) > 0.6 * len(plans) / len(kinds)


def test_every_kind_is_drawn_within_its_extent():
    for name, kind in world.KINDS.items():
        actions = {action for doing in kind.settings.values() for action in doing} or {"standing"}
        for action in actions:
            image = Image.new("RGB", (400, 400), (1, 2, 3))
            pen = drawing.Pen(image, 200, 300, 100)
            pen.outline = drawing.INK  # the outline goes round the thing, not round its wake
            things.THINGS[name](pen, drawing.Paint(world.COLOURS["red"]), action)
            left, top, right, bottom = ImageChops.difference(image, Image.new("RGB", (400, 400), (1, 2, 3))).getbbox()
            width, height = kind.extent
            tolerance = 10
            assert 200 - 50 * width - tolerance <= left, (name, action)
            assert right <= 200 + 50 * width + tolerance, (name, action)
            assert 300 - 100 * height - tolerance <= top, (name, action)
            assert bottom <= 300 + tolerance, (name, action)
            assert right - left > 0.6 * 100 * width, (name, action)


def test_the_main_things_are_large_and_within_the_centre_crop():
    for index in range(600):
        rng = random.Random(index)
        scene = world.plan(rng)
        aloft = scene["action"] in world.SKY_ACTIONS
        horizon = rng.uniform(-0.14, -0.06) if aloft else rng.uniform(0, 0.1)
        placed = composition.arrange(rng, scene, horizon)
        mains = [thing for thing in placed if thing.kind == scene["kind"]]
        assert len(mains) == scene["count"]
        assert len(placed) == len(mains) + len(scene["others"])
        for thing in mains:
            width, height = (thing.scale * side for side in world.KINDS[thing.kind].extent)
            assert abs(thing.x) + width / 2 <= 0.4376, scene
            assert thing.y >= -0.4376, scene
            assert thing.y + height <= 0.4376, scene
            assert max(width, height) >= (0.4 if scene["count"] == 1 else 0.2), scene
        for thing in placed[: len(scene["others"])]:
            assert thing.scale * max(world.KINDS[thing.kind].extent) < max(width, height), scene


def test_each_colour_of_a_thing_differs_in_the_picture():
    averages = []
    for colour in world.COLOURS:
        rng = random.Random(4)
        scene = world.plan(rng) | {"kind": "car", "colour": colour, "count": 1, "action": "parked"}
        scene |= {"setting": "street", "others": [], "light": "day", "greyscale": False}
        averages.append(composition.paint_scene(random.Random(5), scene))
    for i, one in enumerate(averages):
        for other in averages[:i]:
            assert ImageChops.difference(one, other).getbbox() is not None


def test_no_thing_has_the_colour_of_its_surroundings():
    drawn: dict[str, set[str]] = {setting: set() for setting in world.SETTINGS}
    for seed in range(2000):
        scene = world.plan(random.Random(seed))
        drawn[scene["setting"]] |= {scene["colour"], *(other["colour"] for other in scene["others"])} - {None}
    absent = {setting: set(world.COLOURS) - colours for setting, colours in drawn.items()}
    assert absent == {
        "beach": set(),
        "street": set(),
        "snow": {"white"},
        "meadow": {"green"},
        "city": {"black", "white"},
        "sea": {"blue"},
    }


def test_greyscale_pictures_are_in_mode_l(pairs):
    index = next(i for i, (scene, _) in enumerate(pairs) if scene["greyscale"])
    image, scene, captions = dataset.draw_scene(random.Random(f"0/train/{index}"))
    assert image.mode == "L"
    assert scene["colour"] is None
    assert all(other["colour"] is None for other in scene["others"])
    assert all("black and white photo" in caption.lower() for caption in captions)


# --- captions ---------------------------------------------------------------------------------------------


def test_five_different_captions_of_six_to_eighteen_words(pairs):
    for _, captions in pairs:
        assert len(captions) == len(set(captions)) == 5
        assert all(6 <= len(words(caption)) <= 18 for caption in captions), captions
        assert all(caption[0].isupper() and caption.endswith(".") for caption in captions)


def test_captions_have_many_words_and_openings(pairs):
    counts = Counter(word for _, captions in pairs for caption in captions for word in words(caption))
    assert len([word for word, count in counts.items() if count >= 4]) >= 120
    openings = Counter(" ".join(words(caption)[:1]) for _, captions in pairs for caption in captions)
    assert len([opening for opening, count in openings.items() if count >= 20]) >= 10


def test_greyscale_captions_name_no_colour(pairs):
    for scene, captions in pairs:
        if scene["greyscale"]:
            for caption in captions:
                rest = caption.lower().replace("black and white photo", "")
                assert not set(words(rest)) & set(world.COLOURS), caption


def test_nearly_every_caption_names_colour_and_setting(pairs):
    checks = [checking.check(caption, scene) for scene, captions in pairs for caption in captions]
    colours = [right["colour"] for right in checks if "colour" in right]
    assert sum(colours) / len(colours) > 0.9
    assert sum(right["setting"] for right in checks) / len(checks) > 0.9


def test_the_scenes_of_a_split_allow_many_different_captions(pairs):
    kinds = {json.dumps([scene[key] for key in ("kind", "colour", "count", "setting")]) for scene, _ in pairs[:500]}
    assert len(kinds) > 300


# --- check ------------------------------------------------------------------------------------------------


def test_check_agrees_with_the_drawn_captions(pairs):
    for scene, captions in pairs:
        checks = [checking.check(caption, scene) for caption in captions]
        assert all(right["thing"] and right["count"] and right["company"] for right in checks), (scene, captions)
        assert sum(right["setting"] for right in checks) >= 4, (scene, captions)
        assert ("colour" in checks[0]) == (not scene["greyscale"])
        assert ("relation" in checks[0]) == bool(scene["others"])
        if not scene["greyscale"]:
            assert sum(right["colour"] for right in checks) >= 4, (scene, captions)
        for right, caption in zip(checks, captions, strict=True):
            if scene["others"] and world.KINDS[scene["others"][0]["kind"]].coloured:
                named = any(noun in words(caption) for noun in world.KINDS[scene["others"][0]["kind"]].nouns)
                assert right["relation"] == named, (scene, caption)


def test_check_refuses_captions_of_other_scenes(pairs):
    for (scene, _), (other, captions) in zip(pairs, pairs[7:] + pairs[:7], strict=True):
        kinds = {scene["kind"], *(company["kind"] for company in scene["others"])}
        for caption in captions:
            right = checking.check(caption, scene)
            if other["setting"] != scene["setting"]:
                assert not right["setting"], (scene, caption)
            if other["count"] != scene["count"]:
                assert not right["count"], (scene, caption)
            assert right["thing"] == (other["kind"] == scene["kind"]), (scene, caption)
            if other["kind"] not in kinds:
                assert not right["company"], (scene, caption)
            if other["kind"] == scene["kind"] and other["colour"] != scene["colour"]:
                assert not right.get("colour"), (scene, caption)


CAR = {
    "kind": "car",
    "colour": "red",
    "count": 1,
    "action": "parked",
    "setting": "street",
    "others": [{"kind": "dog", "colour": "blue", "relation": "next to", "side": "left"}],
    "greyscale": False,
}


@pytest.mark.parametrize(
    ("caption", "subject"),
    [
        ("Two red cars next to a blue dog on the street.", ("car", "red")),
        ("on the street, a blue dog runs next to a red car", ("dog", "blue")),
        ("a photo of women wearing white gowns next to a tree", ("woman", "white")),
        ("a black and white photo of a double decker bus", ("bus", None)),
        ("a man next to a red car", ("man", None)),
        ("a red scar", (None, None)),
        ("", (None, None)),
    ],
)
def test_the_subject_is_what_is_named_first(caption, subject):
    assert checking.subject(caption) == subject


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("A red car next to a blue dog on the street.", set()),
        ("a red car parked beside a dog on the road", set()),
        ("a red automobile to the right of a blue puppy on the street .", set()),
        ("there is a red car on the street with a blue dog beside it.", set()),
        ("a red car to the left of a blue dog on the street", {"relation"}),
        ("a blue car next to a red dog on the street", {"colour"}),
        ("a car next to a blue dog on the street", {"colour"}),
        ("a red car on the street", {"relation"}),
        ("a red car under a blue dog on the street", {"relation"}),
        ("a red car next to a blue dog", {"setting"}),
        ("a red car next to a blue dog on the street in the snow", {"setting"}),
        ("a red car next to a blue cat on the street", {"company", "relation"}),
        ("a red bus next to a blue dog on the street", {"thing", "company", "relation", "count"}),
        ("a blue dog next to a red car on the street", {"thing", "colour", "relation"}),
        ("two red cars next to a blue dog on the street", {"count"}),
        ("red cars next to a blue dog on the street", {"count"}),
        (
            "a red scar next to a blue dogma on the streets",
            {"thing", "colour", "relation", "setting", "count"},
        ),
        ("", {"thing", "colour", "relation", "setting", "count"}),
    ],
)
def test_check_by_hand(caption, wrong):
    assert {key for key, right in checking.check(caption, CAR).items() if not right} == wrong


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("three women in white dresses waving in the city at night.", set()),
        ("a group of three ladies wearing white gowns downtown at night.", set()),
        ("two women in white dresses waving in the city at night.", {"count"}),
        ("three men in white coats waving in the city at night.", {"thing", "company", "count"}),
        ("three women in red dresses waving in the city at night.", {"colour"}),
        ("three women waving in the city at night.", {"colour"}),
        ("three women in white dresses waving on the beach at sunset.", {"setting"}),
    ],
)
def test_check_by_hand_of_people(caption, wrong):
    scene = {"kind": "woman", "colour": "white", "count": 3, "setting": "city", "others": []}
    assert {key for key, right in checking.check(caption, scene).items() if not right} == wrong


# --- the data set -----------------------------------------------------------------------------------------


def test_layout_is_coco(folder, capsys):
    ids = []
    for split, count in (("train", 24), ("val", 6), ("test", 5)):
        coco = COCO(folder / "annotations" / f"captions_{split}.json")
        assert len(coco.imgs) == count
        assert coco.dataset["info"]
        assert coco.dataset["licenses"]
        for image_id, image in coco.imgs.items():
            assert len(coco.getAnnIds(imgIds=[image_id])) == 5
            with Image.open(folder / "images" / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert picture.format == "JPEG"
                assert picture.mode == ("L" if image["scene"]["greyscale"] else "RGB")
                wide = picture.width > picture.height
                assert image["scene"]["orientation"] == ("landscape" if wide else "portrait")
        assert len(list((folder / "images" / split).iterdir())) == count
        ids += coco.imgs
    assert len(set(ids)) == len(ids) == 35
    test_images = json.loads((folder / "annotations" / "image_info_test.json").read_text())
    assert len(test_images["images"]) == 5
    assert "annotations" not in test_images
    assert {path.name for path in folder.iterdir()} == {"annotations", "images"}


def test_a_picture_depends_on_seed_split_and_index_alone(folder, tmp_path):
    other = dataset.draw_dataset(tmp_path / "other", train=3, val=8, test=0, seed=3)
    mine, theirs = digest(folder), digest(other)
    common = [name for name in theirs if name in mine and name.endswith(".jpg")]
    assert len(common) == 3 + 6
    assert all(mine[name] == theirs[name] for name in common)
    assert digest(dataset.draw_dataset(tmp_path / "seed", train=3, val=8, test=0, seed=4)) != theirs


@pytest.mark.slow
def test_same_bytes_in_another_process_and_with_another_hash_seed(folder, tmp_path):
    options = ("--train", 24, "--val", 6, "--test", 5, "--seed", 3)
    done = run_script("scenes.py", tmp_path / "again", *options, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "again") in done.stdout
    assert digest(tmp_path / "again") == digest(folder)


def test_same_bytes_from_several_processes(tmp_path, monkeypatch):
    alone = dataset.draw_dataset(tmp_path / "alone", train=60, val=0, test=0)
    monkeypatch.setattr(dataset, "MAX_SERIAL", 10)
    together = dataset.draw_dataset(tmp_path / "together", train=60, val=0, test=0)
    assert digest(alone) == digest(together)


def test_the_same_data_set_is_not_drawn_twice(folder, monkeypatch):
    monkeypatch.setattr(dataset, "draw_scene", None)
    assert dataset.draw_dataset(folder, train=24, val=6, test=5, seed=3) == folder


def test_scenes_whose_pictures_are_gone_are_drawn_again(tmp_path):
    folder = dataset.draw_dataset(tmp_path / "data", train=3, val=1, test=1)
    shutil.rmtree(folder / "images" / "train")
    dataset.draw_dataset(folder, train=3, val=1, test=1)
    assert len(list((folder / "images" / "train").iterdir())) == 3


def test_other_scenes_are_replaced_with_a_word(tmp_path, capsys):
    for _ in range(2):
        dataset.draw_dataset(tmp_path / "data", train=3, val=1, test=1)
    assert "replacing" not in capsys.readouterr().err
    folder = dataset.draw_dataset(tmp_path / "data", train=2, val=1, test=1, seed=1)
    assert f"replacing the scenes in {folder}, which were drawn with other options" in capsys.readouterr().err
    assert len(list((folder / "images" / "train").iterdir())) == 2


def test_a_file_of_the_user_is_not_deleted_with_the_scenes(tmp_path, monkeypatch):
    folder = dataset.draw_dataset(tmp_path / "data", train=2, val=1, test=1)
    for name in (".DS_Store", "mine.jpg"):
        (folder / "images" / "test" / name).write_bytes(b"precious")
    with monkeypatch.context() as context:
        context.setattr(dataset, "draw_scene", None)
        dataset.draw_dataset(folder, train=2, val=1, test=1)
    with pytest.raises(InputError, match=r"test/mine\.jpg is not a drawn scene and would be deleted; move it"):
        dataset.draw_dataset(folder, train=3, val=1, test=1)
    (folder / "images" / "test" / "mine.jpg").rename(folder / "annotations" / "captions_mine.json")
    with pytest.raises(InputError, match=r"captions_mine\.json is not a drawn scene"):
        dataset.draw_dataset(folder, train=3, val=1, test=1)
    (folder / "annotations" / "captions_mine.json").unlink()
    dataset.draw_dataset(folder, train=3, val=1, test=1)
    assert len(list((folder / "images" / "train").iterdir())) == 3


def test_an_interrupted_drawing_holds_no_data_set_and_is_made_up_for(tmp_path, monkeypatch):
    calls = []

    def interrupted(rng):
        calls.append(rng)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return draw(rng)

    draw = dataset.draw_scene
    monkeypatch.setattr(dataset, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset.draw_dataset(tmp_path / "data", train=4, val=1, test=1)
    monkeypatch.setattr(dataset, "draw_scene", draw)
    assert not (tmp_path / "data" / "annotations").exists()
    folder = dataset.draw_dataset(tmp_path / "data", train=4, val=1, test=1)
    assert digest(folder) == digest(dataset.draw_dataset(tmp_path / "whole", train=4, val=1, test=1))


def test_a_data_set_with_a_missing_annotation_file_is_redrawn(tmp_path):
    folder = dataset.draw_dataset(tmp_path / "data", train=2, val=1, test=1)
    (folder / "annotations" / "captions_val.json").unlink()
    dataset.draw_dataset(folder, train=2, val=1, test=1)
    assert (folder / "annotations" / "captions_val.json").exists()


def test_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"something other than drawn scenes.*\.$"):
        dataset.draw_dataset(tmp_path, train=1, val=1, test=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_real_coco_folder_is_not_overwritten(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train.json").write_text('{"info": {"year": 2017}, "images": []}')
    with pytest.raises(InputError):
        dataset.draw_dataset(tmp_path, train=1, val=1, test=1)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        dataset.draw_dataset(tmp_path / "file", train=1)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/scenes cannot be written: Not a directory\."):
        dataset.draw_dataset(tmp_path / "file" / "scenes", 1, 1, 1)


@pytest.mark.parametrize("counts", [{"train": -1}, {"val": -5}, {"test": 10**9}])
def test_impossible_counts(tmp_path, counts):
    with pytest.raises(InputError, match="choose a number"):
        dataset.draw_dataset(tmp_path / "data", **counts)
    assert not (tmp_path / "data").exists()


def test_command_reports_a_mistake_in_one_sentence(tmp_path):
    done = run_script("scenes.py", tmp_path / "data", "--train", -1)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_replacement_that_is_interrupted_is_made_up_for(tmp_path, monkeypatch):
    folder = dataset.draw_dataset(tmp_path / "data", train=2, val=1, test=1)
    with monkeypatch.context() as patch:

        def interrupted(path: Path, **options: object) -> None:
            shutil.rmtree(path, **options)
            if path.name == "images":
                raise KeyboardInterrupt

        patch.setattr(dataset, "shutil", SimpleNamespace(rmtree=interrupted))
        with pytest.raises(KeyboardInterrupt):
            dataset.draw_dataset(folder, train=3, val=1, test=1)
    dataset.draw_dataset(folder, train=3, val=1, test=1)
    assert digest(folder) == digest(dataset.draw_dataset(tmp_path / "whole", train=3, val=1, test=1))
