"""Photos and captions in tar files, for captioning and for training."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import EIGHT, draw_noise, write_split

from captioning.bulk import find_photos
from captioning.captioner import Captioner
from captioning.errors import InputError
from captioning.images import find_unreadable, read_photo
from captioning.shards import Member, captions_of, read_photos, read_samples
from captioning.training import TrainingConfig, train
from data_loader import CaptionDataset


def encoded(seed: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    draw_noise(seed).save(file, form)
    return file.getvalue()


def write_shard(path: Path, samples: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    samples = [{"__key__": f"some/{i:03}", "png": encoded(i), "txt": f"picture {i}"} for i in range(5)]
    samples.insert(2, {"__key__": "about", "json": {"no": "photo"}})
    samples.append({"__key__": "last", "JPG": encoded(9, "JPEG"), "cls": 3, "mask.png": encoded(8)})
    return write_shard(tmp_path / "a.tar", samples)


def test_samples_are_webdataset_s_own(shard: Path):
    expected = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    found = list(read_samples(shard))
    assert len(found) == len(expected) == 7
    for sample, whole in zip(found, expected, strict=True):
        assert sample["__key__"] == whole["__key__"]
        files = {name: file.read() for name, file in sample.items() if isinstance(file, Member)}
        assert files == {name: data for name, data in whole.items() if not name.startswith("__")}


def test_a_shard_s_photos_are_read_where_they_lie(shard: Path):
    photos = list(read_photos(shard))
    assert [photo.name for photo in photos] == [*(f"some/{i:03}.png" for i in range(5)), "last.JPG"]
    for i in range(5):
        assert np.array_equal(read_photo(photos[i]), draw_noise(i))
    assert str(photos[0]) == f"{shard}/some/000.png"
    shard.write_bytes(shard.read_bytes().replace(encoded(1), bytes(len(encoded(1)))))
    with pytest.raises(InputError, match=r"a\.tar/some/001\.png cannot be read as a photo"):
        read_photo(photos[1])


def test_captions_are_lines_of_text_or_what_json_calls_so(tmp_path: Path):
    samples = [{"__key__": "0", "txt": "a dog\n\n two  cats \n"}, {"__key__": "1", "json": {"caption": "a cat"}}]
    samples += [{"__key__": "2", "json": {"captions": ["a", "b", 3]}}, {"__key__": "3", "json": []}]
    found = [captions_of(sample) for sample in read_samples(write_shard(tmp_path / "a.tar", samples))]
    assert found == [["a dog", "two cats"], ["a cat"], ["a", "b"], []]
    (sample,) = read_samples(write_shard(tmp_path / "b.tar", [{"__key__": "4", "json": b"{"}]))
    with pytest.raises(InputError, match=r"b\.tar/4\.json is not JSON"):
        captions_of(sample)


def test_shards_are_captioned_like_their_photos(trained: Path, shard: Path, tmp_path: Path):
    loose = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(loose):
        draw_noise(i).save(path)
    captioner = Captioner.load(trained)
    assert [c.text for c in captioner(find_photos([shard]))][:5] == [c.text for c in captioner(loose)]
    assert find_photos([tmp_path]) == [*loose, *read_photos(shard)]  # 0.png ... 4.png, a.tar


@pytest.mark.parametrize("harm", ["text", "torn", "gone", "compressed", "twice", "empty"])
def test_what_is_no_shard_is_named(shard: Path, harm: str):
    data = shard.read_bytes()
    if harm == "text":
        shard.write_text("no tar")
    elif harm == "torn":
        shard.write_bytes(data[:1700])
    elif harm == "gone":
        shard.unlink()
    elif harm == "compressed":
        with tarfile.open(shard, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
    else:
        with tarfile.open(shard, "w") as tar:
            for _ in range(2 if harm == "twice" else 0):
                tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(InputError, match=r"a\.tar (cannot be read as a tar file \(.+\)|holds no photos; .+)\.$"):
        find_photos([shard])


def test_without_the_library_one_sentence_says_what_to_install(shard: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    with pytest.raises(InputError, match=r"pip install webdataset"):
        find_photos([shard])


# Training


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Eight pictures with a caption each, in two tar files, and three to validate on; beside them what is neither."""
    texts = list(EIGHT.values())
    samples = [{"__key__": f"{i}", "png": encoded(i), "txt": f"{texts[i]}\n{texts[i]}"} for i in range(8)]
    samples.insert(3, {"__key__": "without", "png": encoded(20)})
    samples.insert(5, {"__key__": "about", "json": {"caption": "no photo"}})
    write_shard(tmp_path / "packed" / "train-000000.tar", samples[:4])
    write_shard(tmp_path / "packed" / "train-000001.tar", samples[4:])
    held_out = [{"__key__": f"{i}", "png": encoded(i), "json": {"captions": texts[i : i + 2]}} for i in range(3)]
    write_shard(tmp_path / "packed" / "val-000000.tar", held_out)
    return tmp_path / "packed"


@pytest.fixture
def loose(packed: Path, tmp_path: Path) -> Path:
    """The same as `packed`, laid out as COCO is."""
    folder = tmp_path / "loose"
    texts = list(EIGHT.values())
    write_split(folder, "train", {f"{i}.png": [texts[i]] * 2 for i in range(8)})
    write_split(folder, "val", {f"{i}.png": texts[i : i + 2] for i in range(3)})
    for split, count in (("train", 8), ("val", 3)):
        for i in range(count):
            draw_noise(i).save(folder / "images" / split / f"{i}.png")
    return folder


def test_a_data_set_in_shards_is_the_same_data_set(packed: Path, loose: Path, tmp_path: Path):
    for mode in ("train", "val"):
        a, b = (CaptionDataset(folder, mode, vocab_threshold=1, cache=tmp_path / "cache") for folder in (loose, packed))
        assert [Path(path.name).name for path in b.paths] == [path.name for path in a.paths]
        for one, other in zip(a.paths, b.paths, strict=True):
            assert np.array_equal(read_photo(one), read_photo(other))
        assert a.vocab.words == b.vocab.words
        assert (a.tokens.tolist(), a.photo.tolist()) == (b.tokens.tolist(), b.photo.tolist())
        assert list(a.references().values()) == list(b.references().values())
    a.drop([1])
    b.drop([1])
    assert [path.name for path in b.paths] == [path.name for path in a.paths] == ["0.png", "2.png"]
    assert b.paths[-1].read() == encoded(2)


def test_shards_are_indexed_once(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = CaptionDataset(packed, vocab_threshold=1, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        again = CaptionDataset(packed, vocab_threshold=1, cache=tmp_path / "cache")
    assert list(again.paths) == list(first.paths)
    write_shard(packed / "train-000001.tar", [{"__key__": "new", "png": encoded(0), "txt": "a kite"}])
    assert [path.name for path in CaptionDataset(packed, vocab_threshold=1, cache=tmp_path / "cache").paths][3:] == [
        "new.png"
    ]


def test_a_photo_in_a_shard_that_cannot_be_read_is_named(packed: Path, tmp_path: Path):
    write_shard(packed / "val-000000.tar", [{"__key__": "bad", "png": b"no photo", "txt": "a dog"}])
    data = CaptionDataset(packed, "val", vocab_threshold=1, cache=tmp_path / "cache")
    for _ in range(2):  # the second time from what was kept
        assert "val-000000.tar/bad.png" in str(find_unreadable(data.paths, cache=tmp_path / "cache")[0])


@pytest.mark.parametrize("fine_tune", [0, 5])
def test_training_on_shards_is_training_on_the_photos(
    small: Callable[..., TrainingConfig],
    packed: Path,
    loose: Path,
    tmp_path: Path,
    tiny_backbone: Callable,
    fine_tune: int,
):
    fields = {
        "vocab_threshold": 1,
        "batch_size": 4,
        "image_size": 32,
        "fine_tune": fine_tune,
        "cache": tmp_path / "cache",
    }
    logs = [train(small(data=data, **fields)) / "training_log.txt" for data in (loose, packed)]
    assert len(logs[0].read_text().splitlines()) >= 4
    assert logs[0].read_bytes() == logs[1].read_bytes()


def test_shards_without_captions_are_refused(tmp_path: Path):
    write_shard(tmp_path / "in" / "train-0.tar", [{"__key__": "a", "png": encoded(0)}])
    with pytest.raises(InputError, match=r"train\*\.tar hold no photos with captions"):
        CaptionDataset(tmp_path / "in", cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    with pytest.raises(InputError, match=r"and no val-\*\.tar"):
        CaptionDataset(tmp_path / "in", "val", cache=tmp_path / "cache")


def test_what_a_folder_names_is_what_its_index_says(packed: Path, tmp_path: Path):
    data = CaptionDataset(packed, vocab_threshold=1, cache=tmp_path / "cache")
    content = json.loads(data.annotation_file.read_text())
    assert [image["file_name"] for image in content["images"]][2:4] == [
        "train-000000.tar/2.png",
        "train-000001.tar/3.png",
    ]
    assert content["annotations"][1] == {"id": 2, "image_id": 1, "caption": EIGHT["0.png"]}
