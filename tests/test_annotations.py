"""Annotation files of every kind, read by the one reader of them."""

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import run_code, write_split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captioning import annotations, json_stream
from captioning.annotations import parse_image_id, read_annotations, read_captions, read_images
from captioning.errors import InputError, warn_once
from captioning.scenes.world import plan
from data_loader import CaptionDataset, find_split
from vocabulary import Vocabulary, tokenize

CAPTIONS = {"a.png": ["A dog.", "Zwei Hunde, 狗 🐕"], "b.png": ["a cat"]}
REFERENCES = {1: ["A dog.", "Zwei Hunde, 狗 🐕"], 2: ["a cat"]}


def without(key: str) -> Callable[[dict], None]:
    """Remove a key from each annotation."""

    def act(content: dict) -> None:
        for entry in content["annotations"]:
            entry.pop(key)

    return act


def each(name: str, key: str, convert: Callable) -> Callable[[dict], None]:
    """Convert a value in each entry of a list."""

    def act(content: dict) -> None:
        for entry in content[name]:
            entry[key] = convert(entry[key])

    return act


def several(*changes: Callable[[dict], None]) -> Callable[[dict], None]:
    return lambda content: [change(content) for change in changes]


VARIANTS = {
    "as it is": lambda content: None,
    "without categories": lambda content: content.update(categories=[]),
    "with categories": lambda content: content.update(categories=[{"id": 1, "name": "thing"}]),
    "annotations first": lambda content: content.update(images=content.pop("images")),
    "more keys": lambda content: content.update(type="captions", info={"annotations": [1], "images": [[]]}),
    "numbers of any size": lambda content: content.update(info=[10**30, 1e308, -1e-320]),
    "no annotation ids": without("id"),
    "equal annotation ids": each("annotations", "id", lambda i: 0),
    "annotation ids as text": each("annotations", "id", "c{}".format),
    "image ids as text": each("images", "id", str),
    "image ids as text in annotations": each("annotations", "image_id", str),
    "image ids with zeros": each("annotations", "image_id", "{:012}".format),
    "image ids as floats": several(each("images", "id", float), each("annotations", "image_id", float)),
    "captions as lists": each("annotations", "caption", lambda text: [text]),
    "captions of an image as a list": lambda content: content.update(
        annotations=[{"image_id": 1, "caption": CAPTIONS["a.png"]}, {"image_id": 2, "caption": CAPTIONS["b.png"]}]
    ),
}


def write(folder: Path, change: Callable[[dict], object] = VARIANTS["as it is"], **how: object) -> Path:
    """A data set of two images and three captions, whose annotation file is changed and written in another way."""
    path = write_split(folder, "train", CAPTIONS)
    for name in CAPTIONS:
        (folder / "images" / "train" / name).touch()
    content = json.loads(path.read_text())
    change(content)
    encoding = how.pop("encoding", "utf-8")
    path.write_bytes(json.dumps(content, **{"ensure_ascii": False, **how}).encode(encoding))
    return path


def check(folder: Path) -> None:
    """Each way to read the data set of `write` gives the same."""
    data = CaptionDataset(folder, vocab_threshold=1, cache=folder / "cache")
    assert data.references() == REFERENCES
    assert data.image_ids.tolist() == [1, 2]
    assert data.image_rows.tolist() == [0, 0, 1]
    assert data.vocab.decode(data.caption(1)[1:].tolist()) == "zwei hunde, 狗 🐕"
    assert {i: [a["caption"] for a in data.coco.imgToAnns[i]] for i in data.coco.imgs} == REFERENCES
    assert [entry["file_name"] for _, entry in read_images(data.annotation_file)] == list(CAPTIONS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_captioning_does_not_need_may_be_anything(tmp_path: Path, variant: str, capsys: pytest.CaptureFixture):
    write(tmp_path, VARIANTS[variant])
    check(tmp_path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("how", [{"ensure_ascii": True}, {"indent": 1}, {"separators": (",", ":")}], ids=str)
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_every_encoding_that_json_may_have(tmp_path: Path, encoding: str, how: dict):
    write(tmp_path, encoding=encoding, **how)
    check(tmp_path)


@pytest.mark.slow
def test_the_locale_s_encoding_does_not_matter(tmp_path: Path):
    write(tmp_path)
    code = (
        "import locale, sys; from data_loader import CaptionDataset\n"
        "from pathlib import Path\n"
        "data = CaptionDataset(sys.argv[1], vocab_threshold=1, cache=Path(sys.argv[2]))\n"
        "print(locale.getpreferredencoding(False), ascii(data.references()), len(data.coco.anns))"
    )
    done = run_code(code, tmp_path, tmp_path / "cache", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.stdout.strip() == f"ANSI_X3.4-1968 {REFERENCES!a} 3"


def test_scenes_are_what_the_images_say(tmp_path: Path):
    scene = {**plan(random.Random(0)), "objects": [{"size": 0.5, "count": 2}]}

    def change(content: dict) -> None:
        content["images"][1]["scene"] = scene

    write(tmp_path, change)
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    assert data.scenes() == {2: scene}
    assert type(data.scenes()[2]["objects"][0]["size"]) is float
    data.drop([1])
    assert data.scenes() == {}


def test_references_of_a_file_that_has_changed(tmp_path: Path):
    path = write(tmp_path)
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    write_split(tmp_path, "train", {"a.png": ["a cat"]})
    with pytest.raises(InputError, match=rf"{path} has changed since"):
        data.references()


def test_references_where_there_are_no_captions(tmp_path: Path):
    path = write_split(tmp_path, "test", {"a.png": []})
    path.rename(path.with_name("image_info_test.json"))
    (tmp_path / "images" / "test" / "a.png").touch()
    data = CaptionDataset(tmp_path, "test", vocab=Vocabulary.build(["a dog"], 1), cache=tmp_path / "cache")
    assert data.references() == {1: []}
    assert list(data.coco.imgs) == [1]


# What is skipped


def test_empty_captions_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
    def change(content: dict) -> None:
        for text in (" \n", ["", "\u2028"], [], None, [None, "..."], "nan", "None", "NULL", "#N/A"):
            content["annotations"].insert(1, {"image_id": 1, "caption": text})

    path = write(tmp_path, change)
    for _ in range(2):  # the second time from the cache
        warn_once.cache_clear()
        check(tmp_path)
        expected = f"warning: {path}: left out 11 empty captions, the first is annotations[1].\n"
        assert capsys.readouterr().err == expected


def test_nan_which_is_not_json_is_refused_with_advice(tmp_path: Path):
    path = write(tmp_path, each("annotations", "caption", lambda text: float("nan")))
    with pytest.raises(InputError, match=r"captions_train\.json is not JSON .*NaN.*; write null for NaN\)\.$"):
        read_annotations(path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("captions", "warned"),
    [
        (["两只狗在街上走。", "一只猫在沙发上睡觉。"], True),
        (["สุนัขสองตัววิ่งบนชายหาด", "แมวนอนบนโซฟา"], True),
        (["二匹の犬が通りを走っています。"], True),
        (["两只 狗 在 街上 走 。", "一只 猫 在 沙发 上 睡觉 。"], False),
        (["สุนัข สอง ตัว วิ่ง บน ชายหาด", "นักศึกษา ใน มหาวิทยาลัย"], False),
        (["a sign that reads 欢迎光临欢迎光临 in front of a shop"] * 2, False),
        (["a straightforwardly antidisestablishmentarian dog"], False),
    ],
    ids=lambda value: value[0][:9] if isinstance(value, list) else "",
)
def test_captions_without_spaces_between_words_are_a_warning(
    captions: list[str], warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture
):
    paths = [write_split(tmp_path, split, {"a.png": captions}) for split in ("train", "val")]
    warn_once.cache_clear()
    for path in [*paths, *paths]:  # the second time from the cache
        read_annotations(path, tmp_path / "cache")
    errors = capsys.readouterr().err
    assert ("learned as one word; split them into words first" in errors) == warned
    assert errors.count("\n") == warned
    assert str(paths[0]) in errors or not warned


def test_images_without_captions_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
    def change(content: dict) -> None:
        content["images"] += [{"id": i, "file_name": f"{i}.png"} for i in (7, 8)]

    path = write(tmp_path, change)
    assert list(read_annotations(path, tmp_path / "cache").file_names) == ["a.png", "b.png"]
    assert capsys.readouterr().err.endswith(": left out 2 images without captions, the first is '7.png'.\n")


def test_without_a_cache_everything_works_with_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = write(tmp_path)
    (tmp_path / "cache").touch()
    for _ in range(2):
        check(tmp_path)
    assert read_annotations(path, tmp_path / "cache").words == read_annotations(path, tmp_path / "other").words
    errors = capsys.readouterr().err
    assert errors == f"warning: {errors.removeprefix('warning: ')}"
    assert errors.count("\n") == 1
    assert f"the cache folder {tmp_path / 'cache'} cannot be written" in errors


def test_the_same_bytes_under_another_name_are_another_file(tmp_path: Path):
    """A captions file leaves out images that an image_info file of the same content has."""
    path = write(tmp_path, lambda content: content["images"].append({"id": 7, "file_name": "c.png"}))
    other = path.with_name("image_info_test.json")
    other.write_bytes(path.read_bytes())
    assert len(read_annotations(path, tmp_path / "cache").image_ids) == 2
    assert len(read_annotations(other, tmp_path / "cache").image_ids) == 3


# Flat arrays, and the cache of them


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        (-7, -7),
        (7.0, 7),
        ("7", 7),
        ("000000391895", 391895),
        (" 7\n", 7),
        ((1 << 63) - 1, (1 << 63) - 1),
        (True, None),
        (None, None),
        (7.5, None),
        (2.0**53, None),  # might be 2**53 + 1
        (float("inf"), None),
        (float("nan"), None),
        (1 << 63, None),
        ("9" * 19, None),
        ("9" * 9999, None),
        ("7.0", None),
        ("7_0", None),
        ("٧", None),
        ("a7", None),
        ("", None),
        ([7], None),
    ],
    ids=lambda value: f"{value!r:.30}",
)
def test_an_image_id_is_read_where_its_meaning_is_plain(value: object, expected: int | None):
    if expected is not None:
        assert parse_image_id(value) == expected
        assert type(parse_image_id(value)) is int
    else:
        with pytest.raises(InputError, match="has an image id"):
            parse_image_id(value)


def test_an_annotation_file_becomes_flat_arrays(tmp_path: Path):
    path = write_split(tmp_path, "train", {"a.png": ["A dog.", "The dog\n runs"], "b.png": [], "c.png": ["a cat"]})
    arrays = read_annotations(path, tmp_path / "cache")
    assert list(arrays.file_names) == ["a.png", "c.png"]  # without captions there is nothing to learn
    assert arrays.image_ids.tolist() == [1, 3]
    captions = [
        [arrays.words[i] for i in arrays.tokens[a:b]] for a, b in zip(arrays.offsets, arrays.offsets[1:], strict=False)
    ]
    assert captions == [["a", "dog", "."], ["the", "dog", "runs"], ["a", "cat"]]
    assert arrays.image_rows.tolist() == [0, 0, 1]


def assert_same(one: annotations.Annotations, other: annotations.Annotations) -> None:
    assert (list(one.file_names), one.words) == (list(other.file_names), other.words)
    for name in ("image_ids", "tokens", "offsets", "image_rows"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_cached_arrays_equal_the_parsed_ones(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = find_split(drawn, "train")[0]
    first = read_annotations(path, tmp_path)
    monkeypatch.setattr(annotations, "tokenize", None)  # nothing is tokenized again
    assert_same(read_annotations(path, tmp_path), first)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.9, -1])
def test_a_torn_cache_file_is_made_anew(drawn: Path, tmp_path: Path, keep: float):
    path = find_split(drawn, "train")[0]
    first = read_annotations(path, tmp_path)
    cached = next(tmp_path.rglob("*.npz"))
    whole = cached.read_bytes()
    cached.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    assert_same(read_annotations(path, tmp_path), first)
    assert cached.read_bytes() == whole


def test_another_file_never_gets_the_cache_of_the_first(tmp_path: Path):
    path = write_split(tmp_path, "train", {"a.png": ["a dog"]})
    assert read_annotations(path, tmp_path / "cache").words == ["a", "dog"]
    write_split(tmp_path, "train", {"a.png": ["a cat"]})
    assert read_annotations(path, tmp_path / "cache").words == ["a", "cat"]


def test_the_real_captions_are_read_whole(shared: Path, tmp_path: Path):
    path = shared / "captions_val2017.json"
    arrays = read_annotations(path, tmp_path)
    assert len(arrays.image_rows) == 25014
    assert len(arrays.image_ids) == 5000
    for i in (0, 10_000, 25_013):
        text = json.loads(path.read_text())["annotations"][i]["caption"]
        words = [arrays.words[j] for j in arrays.tokens[arrays.offsets[i] : arrays.offsets[i + 1]]]
        assert words == tokenize(text)


# The stream of entries

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]) | st.text(), VALUES, max_size=5),
    st.sampled_from([None, 2]),
    st.booleans(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_the_entries_are_those_of_the_whole_file(
    tmp_path: Path, content: dict, indent: int | None, escape: bool, encoding: str
):
    content |= {name: [] for name in "ab" if not isinstance(content.get(name), list)}
    path = tmp_path / "file.json"
    path.write_bytes(json.dumps(content, indent=indent, ensure_ascii=escape).encode(encoding))
    entries: dict[str, list] = {"a": [], "b": []}
    for name, number, entry in json_stream.stream_lists(path, ("a", "b")):
        assert number == len(entries[name])
        entries[name].append(entry)
    assert entries == {name: content[name] for name in "ab"}


@pytest.mark.parametrize("place", [*range(65_500, 65_540), 131_000])
def test_a_character_of_two_halves_across_two_reads(tmp_path: Path, place: int):
    """ijson reads 65,536 bytes at once; half a character is an error wherever it is, and a whole one nowhere."""
    start, middle = '{"images": [], "padding": "', '", "annotations": [{"image_id": 1, "caption": "'
    padding = "x" * (place - len(start + middle))
    for text in ("\\ud83d\\ude00a", "\\\\ud83d", "\\\\\\ud83d\\ude00a"):
        (tmp_path / "f.json").write_text(start + padding + middle + text + '"}]}')
        ((_, caption),) = read_captions(tmp_path / "f.json")
        assert caption == json.loads(f'"{text}"')
    for text in ("\\ud83d", "\\ud83dx", "\\ude00", "\\ud83d\\n", "\\ud83d\\ud83d\\ude00", "\\\\\\ud83d"):
        (tmp_path / "f.json").write_text(start + padding + middle + text + '"}]}')
        with pytest.raises(InputError, match="not valid Unicode"):
            list(read_captions(tmp_path / "f.json"))


@pytest.mark.slow
def test_a_long_list_takes_the_memory_of_its_entries(tmp_path: Path):
    path = tmp_path / "file.json"
    with open(path, "w") as file:
        file.write('{"info": {}, "annotations": [')
        file.writelines(json.dumps({"image_id": i, "caption": "a dog runs"}) + "," for i in range(100_000))
        file.write('{"image_id": 0, "caption": "a"}]}')
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_captions(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 100_001
    assert peak < 3e6 < path.stat().st_size


def test_a_deep_nest_takes_no_memory(tmp_path: Path):
    (tmp_path / "f.json").write_text('{"images": ' + "[" * 3_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="nested more than 100 deep"):
            list(read_images(tmp_path / "f.json"))
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("captions", "warned"),
    [
        (["天空很蓝，草地很绿，一个人在跑步。", "小女孩在画画，画板上有彩虹。", "一只狗在草地上，旁边有人。"], True),
        (["天空 很 蓝 ， 草地 很 绿 ， 一个 人 在 跑步 。", "小女孩 在 画画 。"], False),
        (["สุนัข สีแดง วิ่ง บน ชายหาด", "ผู้หญิง กำลัง ขี่ จักรยาน"], False),
        (["สุนัขสีแดงวิ่งบนชายหาด", "ผู้หญิงกำลังขี่จักรยาน"], True),
    ],
)
def test_captions_that_are_not_split_into_words_are_warned_of(tmp_path: Path, captions: list[str], warned: bool):
    path = tmp_path / "captions_train.json"
    document = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(captions))],
        "annotations": [{"id": i, "image_id": i, "caption": caption} for i, caption in enumerate(captions)],
    }
    path.write_text(json.dumps(document))
    warnings = read_annotations(path, cache=tmp_path / "cache").warnings
    assert any("no spaces between words" in warning for warning in warnings) == warned
