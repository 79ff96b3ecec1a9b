import json
import multiprocessing
import os
import re
import shutil
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_noise, write_split
from PIL import Image
from torchvision import transforms as T

from captioning.errors import InputError, warn_once
from captioning.images import ImageDataset, build_transform, read_batches
from data_loader import CaptionDataset, ImageBatches, LengthBatches, find_split, get_loader
from vocabulary import END, START, Vocabulary, tokenize

# Photos


def test_the_recipe_s_transforms():
    image = draw_noise(0, (640, 480))
    used = build_transform()(image)
    assert used.shape == (3, 224, 224)
    resized = T.CenterCrop(224)(T.Resize(256)(image))
    expected = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(T.ToTensor()(resized))
    torch.testing.assert_close(used, expected)
    trained = build_transform(train=True)
    assert [type(step) for step in trained.transforms] == [
        *(T.Resize, T.RandomCrop, T.RandomHorizontalFlip, T.ToTensor, T.Normalize)
    ]
    assert trained(image).shape == (3, 224, 224)


def test_a_random_transform_draws_from_the_seed_and_the_index_alone():
    pictures = [draw_noise(0)] * 2
    dataset = ImageDataset(pictures, build_transform(train=True, image_size=32, normalize=False))
    drawn = {(i, seed): dataset[i, seed] for i in range(2) for seed in range(8)}
    torch.rand(5)
    assert all(torch.equal(dataset[key], value) for key, value in drawn.items())
    assert len({value.numpy().tobytes() for value in drawn.values()}) > 8


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_images_come_in_order_from_any_number_of_workers(workers: int):
    dataset = ImageDataset([draw_noise(i) for i in range(10)], build_transform(True, 32, normalize=False))
    batches = [[(0, 1), (1, 1)], [(9, 1)], [(3, 2), (2, 2), (3, 3)]]
    results = list(read_batches(dataset, batches, workers))
    assert [keys for keys, _ in results] == batches
    for keys, images in results:
        assert torch.equal(images, torch.stack([dataset[key] for key in keys]))


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path: Path):
    draw_noise(1, (1600, 1200)).save(tmp_path / "large.jpg", quality=95)
    whole = build_transform(normalize=False)(Image.open(tmp_path / "large.jpg").convert("RGB"))
    fast = ImageDataset([tmp_path / "large.jpg"], build_transform(normalize=False))[0]
    assert fast.shape == whole.shape
    assert (fast.float() - whole.float()).abs().mean() < 2


def test_an_image_that_was_given_is_left_as_it_is(tmp_path: Path):
    draw_noise(1, (1600, 1200)).save(tmp_path / "large.jpg")
    image = Image.open(tmp_path / "large.jpg")
    ImageDataset([image], build_transform(image_size=64))[0]
    assert image.size == (1600, 1200)


# Data sets


def test_an_item_is_an_image_and_its_caption_s_indices(drawn: Path, cache: Path):
    data = CaptionDataset(drawn, "val", vocab_threshold=1, cache=cache)
    references = data.references()
    assert len(data) == 5 * len(references) == 40
    for i in (0, 17, 39):
        image, caption = data[i]
        assert image.shape == (3, 224, 224)
        assert caption.dtype == torch.int64
        assert (caption[0], caption[-1]) == (START, END)
        words = [data.vocab.words[j] for j in caption[1:-1]]
        assert words in [tokenize(text) for text in references[int(data.image_ids[data.image_rows[i]])]]


def test_captions_of_several_lengths_are_padded_on_the_right(drawn: Path, cache: Path):
    data = CaptionDataset(drawn, "train", vocab_threshold=2, cache=cache)
    indices = np.array([5, 60, 3, 119])
    batch, lengths = data.captions(indices)
    assert batch.shape == (4, int(lengths.max()))
    for row, length, i in zip(batch, lengths, indices, strict=True):
        assert torch.equal(row[:length], data.caption(i))
        assert (row[length:] == END).all()


def test_negative_indices_count_from_the_end(drawn: Path, cache: Path):
    data = CaptionDataset(drawn, "train", vocab_threshold=1, cache=cache)
    n = len(data)
    for index in (-1, -n):
        image, caption = data[index]
        torch.testing.assert_close(image.shape, data[index + n][0].shape)
        assert caption.tolist() == data.caption(index + n).tolist() != []
    batch, lengths = data.captions(np.array([-1, 0]))
    assert batch[0, : lengths[0]].tolist() == data.caption(n - 1).tolist()
    for index in (n, -n - 1):
        with pytest.raises(IndexError):
            data.caption(index)


def test_a_year_may_be_in_the_names(tmp_path: Path):
    path = write_split(tmp_path, "val2017", {"a.png": ["a dog"]})
    assert find_split(tmp_path, "val") == (path, tmp_path / "images" / "val2017")


def test_test_images_without_public_captions(tmp_path: Path, cache: Path):
    path = write_split(tmp_path, "test2014", {"a.png": [], "b.png": []})
    path.rename(path.with_name("image_info_test2014.json"))
    for name in "ab":
        draw_noise(0).save(tmp_path / "images" / "test2014" / f"{name}.png")
    data = CaptionDataset(tmp_path, "test", vocab=Vocabulary.build(["a dog"], 1), cache=cache)
    assert [data[i][0] for i in range(len(data))] == [1, 2]
    assert data[0][1].shape == (3, 224, 224)
    with pytest.raises(InputError, match=r"test2014\.json has no captions; give the training split's vocabulary"):
        CaptionDataset(tmp_path, "test", cache=cache)


# Batches


def test_every_caption_comes_once_an_epoch_and_a_batch_has_one_length():
    lengths = np.random.default_rng(0).integers(6, 20, 1000)
    batches = list(LengthBatches(lengths, 32))
    assert len(batches) == len(LengthBatches(lengths, 32))
    assert all(len(set(lengths[batch])) == 1 and len(batch) <= 32 for batch in batches)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert sum(len(batch) == 32 for batch in batches) >= 1000 // 32 - 14


def test_an_image_s_captions_come_together_and_each_once_an_epoch():
    image_rows = np.random.default_rng(0).integers(0, 100, 500)
    image_rows[:100] = range(100)
    batches = list(ImageBatches(image_rows, 32))
    assert len(batches) == len(ImageBatches(image_rows, 32))
    assert sorted(np.concatenate(batches)) == list(range(500))
    batch_counts = Counter(row for batch in batches for row in set(image_rows[batch].tolist()))
    assert set(batch_counts.values()) == {1}


@pytest.mark.parametrize("sampler", [LengthBatches, ImageBatches])
def test_the_order_depends_on_the_seed_and_the_epoch_alone(sampler: type):
    numbers = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 5))

    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = sampler(numbers, 8, seed)
        batches.set_epoch(epoch)
        return [batch.tolist() for batch in batches]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


@pytest.mark.parametrize("sampler", [LengthBatches, ImageBatches])
def test_without_set_epoch_each_pass_has_an_order_of_its_own(sampler: type):
    batches = sampler(np.repeat(np.arange(20), 5), 8)
    first, second = ([batch.tolist() for batch in batches] for _ in range(2))
    assert first != second


# The recipe's loader


@pytest.fixture
def vocab_file(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # the cache is in the working directory
    path = tmp_path / "vocab.json"
    get_loader(mode="train", vocab_threshold=2, vocab_file=path, vocab_from_file=False, cocoapi_loc=drawn)
    return path


@pytest.mark.parametrize("mode", ["train", "val"])
def test_training_and_validation_batches(drawn: Path, vocab_file: Path, mode: str):
    loader = get_loader(mode=mode, batch_size=16, vocab_file=vocab_file, cocoapi_loc=drawn)
    assert loader.dataset.vocab.words == Vocabulary.load(vocab_file).words
    captions = 0
    for images, indices in loader:
        assert images.shape == (len(indices), 3, 224, 224)
        assert images.dtype == torch.float32
        assert (indices[:, 0] == START).all()
        assert (indices[:, -1] == END).all()
        captions += len(indices)
    assert captions == {"train": 120, "val": 40}[mode]


def test_test_batches_are_image_ids_and_images_in_the_file_s_order(drawn: Path, vocab_file: Path):
    loader = get_loader(mode="test", batch_size=3, vocab_file=vocab_file, cocoapi_loc=drawn)
    ids = []
    for batch_ids, images in loader:
        assert images.shape == (len(batch_ids), 3, 224, 224)
        ids += batch_ids.tolist()
    content = json.loads(find_split(drawn, "test")[0].read_text())
    assert ids == [image["id"] for image in content["images"]]


def test_workers_persist_and_each_pass_crops_anew(drawn: Path, vocab_file: Path):
    transform = build_transform(train=True, image_size=32)
    loader = get_loader(transform, batch_size=16, vocab_file=vocab_file, num_workers=2, cocoapi_loc=drawn)
    passes, workers = [], []
    for _ in range(2):
        loader.batch_sampler.set_epoch(3)
        passes.append(torch.cat([images for images, _ in loader]))
        workers.append([worker.pid for worker in loader._iterator._workers])
    assert workers[0] == workers[1]
    assert not torch.equal(*passes)


def test_real_images_and_captions(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    loader = get_loader(batch_size=8, vocab_threshold=4, vocab_from_file=False, cocoapi_loc=shared / "coco-mini")
    assert (tmp_path / "vocab.json").exists()
    images, captions = next(iter(loader))
    assert images.shape[1:] == (3, 224, 224)
    assert len(images) == len(captions)
    assert images.std() / images.mean().abs().clamp(0.01, 0.5) > 2


# Mistakes


def test_a_vocabulary_is_built_from_training_captions_only(drawn: Path):
    with pytest.raises(InputError, match="vocab_from_file"):
        get_loader(mode="val", vocab_from_file=False, cocoapi_loc=drawn)


def test_a_folder_without_annotations(tmp_path: Path):
    with pytest.raises(InputError, match=r"annotations/captions_train<year>\.json"):
        CaptionDataset(tmp_path, "train", cache=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such", r"/no-such does not exist; .*python scenes\.py"),
        ("coco/annotations/captions_train.json", r"captions_train\.json is a file of .*; name its folder, .*/coco\.$"),
        ("coco/annotations", r"annotations holds no .*; name the data set's folder, .*/coco\.$"),
        ("coco/images", r"images holds no .*; name the data set's folder, .*/coco\.$"),
        ("set.zip", r"set\.zip is a file, and a data set is a folder; unpack an archive"),
        ("train-0.tar", r"train-0\.tar is a file of a data set; name its folder, /.*\d\.$"),
        ("https:/example.org/set.zip", "^https://example.org/set.zip is a web address, and nothing is fetched"),
    ],
)
def test_a_path_that_is_not_a_data_set_s_folder(tmp_path: Path, name: str, message: str):
    write_split(tmp_path / "coco", "train", {"a.png": ["a dog"]})
    for file in ("set.zip", "train-0.tar"):
        (tmp_path / file).touch()
    with pytest.raises(InputError, match=message):
        CaptionDataset(Path(name) if ":" in name else tmp_path / name, cache=tmp_path)


def test_two_years_in_one_folder(tmp_path: Path):
    for year in (2014, 2017):
        write_split(tmp_path, f"train{year}", {"a.png": ["a dog"]})
    with pytest.raises(InputError, match=r"captions_train2014\.json, captions_train2017\.json"):
        CaptionDataset(tmp_path, "train", cache=tmp_path)


def test_an_image_that_is_missing(tmp_path: Path):
    write_split(tmp_path, "train", {"a.png": ["a dog"], "b.png": ["a cat"]})
    draw_noise(0).save(tmp_path / "images" / "train" / "a.png")
    with pytest.raises(InputError, match=r"1 of 2 images .*captions_train\.json .*b\.png"):
        CaptionDataset(tmp_path, "train", vocab_threshold=1, cache=tmp_path)


@pytest.mark.parametrize(("written", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form_are_found(tmp_path: Path, written: str, on_disk: str):
    names = [f"caf\xe9/{name}.png" for name in ("ma\xf1ana", "b", "\xe4")]
    write_split(tmp_path, "train", {unicodedata.normalize(written, name): ["a dog"] for name in names})
    path = tmp_path / "images" / "train"
    (path / unicodedata.normalize(on_disk, "caf\xe9")).mkdir(parents=True)
    for name in names:
        draw_noise(0).save(path / unicodedata.normalize(on_disk, name))
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path)
    assert [image[0].shape for image in data] == [(3, 224, 224)] * 3
    (path / unicodedata.normalize(on_disk, names[1])).unlink()
    with pytest.raises(InputError, match=r"1 of 3 images .*/b\.png; put"):
        CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path)
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path, must_exist=False)
    assert [path.exists() for path in data.paths] == [True, False, True]


def test_a_path_with_more_slashes_than_it_needs(tmp_path: Path):
    write_split(tmp_path, "train", {".//b//a.png": ["a dog"]})
    (tmp_path / "images" / "train" / "b").mkdir(parents=True)
    draw_noise(0).save(tmp_path / "images" / "train" / "b" / "a.png")
    assert len(CaptionDataset(tmp_path, "train", vocab_threshold=1, cache=tmp_path)) == 1


def test_a_threshold_that_leaves_no_word(drawn: Path, cache: Path):
    with pytest.raises(InputError, match="--vocab-threshold"):
        CaptionDataset(drawn, "train", vocab_threshold=10_000, cache=cache)


# Memory


def memory(folder: Path, captions: int) -> tuple[int, int, int]:
    """In bytes, of a data set with so many captions: its arrays, what it holds beyond them, and at most meanwhile."""
    content = {f"{i:07}.jpg": ["a red dog runs on the beach."] * 5 for i in range(captions // 5)}
    write_split(folder, "train", content)
    for name in content:
        (folder / "images" / "train" / name).touch()
    del content
    tracemalloc.start()
    try:
        data = CaptionDataset(folder, vocab_threshold=1, cache=folder / "cache")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    names = data.paths.names
    arrays = [data.image_ids, data.image_rows, data.lengths, data.offsets, data.tokens]
    size = sum(array.nbytes for array in [*arrays, names.block, names.starts, names.ends])
    return size, held - size, peak


@pytest.mark.slow
def test_memory_grows_by_the_arrays_alone(tmp_path: Path):
    """A path takes 150 bytes or more, and what JSON makes of a caption and its share of a photo 500 or more."""
    sizes = {"first": 1000, "small": 1000, "large": 20_000}  # the first with what is imported and kept once
    with multiprocessing.get_context("spawn").Pool(1) as alone:  # other tests have left much to collect here
        _, small, large = alone.starmap(memory, [(tmp_path / name, size) for name, size in sizes.items()])
    assert large[0] - small[0] > 1e6
    assert large[1] - small[1] < 50_000
    assert large[2] - small[2] < 5 * (large[0] - small[0])


@pytest.mark.parametrize(
    "captions", [["两只狗在街上。", "一只猫在街上。"] + ["狗。"] * 5, ["a dog runs ."] * 7], ids=["no spaces", "spaces"]
)
def test_words_that_are_mostly_unknown_are_a_warning(
    captions: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_split(tmp_path, "train", {f"{i}.png": [caption] for i, caption in enumerate(captions)})
    warn_once.cache_clear()
    CaptionDataset(tmp_path, cache=tmp_path / "cache", must_exist=False)
    expected = "are not in the vocabulary, and are not learned; lower --vocab-threshold.\n"
    assert (expected in capsys.readouterr().err) == (captions[0] != "a dog runs .")


def test_a_vocabulary_of_another_data_set_is_a_warning(drawn: Path, cache: Path, capsys: pytest.CaptureFixture):
    warn_once.cache_clear()
    other = Vocabulary.build(["a casa"], threshold=1)
    CaptionDataset(drawn, vocab=other, cache=cache)
    assert re.search(
        r"\d\d% of the words in .*; train a new model with a vocabulary of these captions\.\n", capsys.readouterr().err
    )
    CaptionDataset(drawn, "test", vocab=other, cache=cache)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"none of the words in .* is in the vocabulary; train a new model"):
        CaptionDataset(drawn, vocab=Vocabulary.build(["una casa"], threshold=1), cache=cache)


def test_a_batch_without_captions_is_refused(drawn: Path):
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0"):
        get_loader(batch_size=0, cocoapi_loc=drawn)


def test_captions_longer_than_what_is_generated_are_warned_of(eight: Path, tmp_path: Path, capsys):
    warn_once.cache_clear()
    write_split(tmp_path, "train", {"0.png": [" ".join(["a red ball"] * 7)], "1.png": ["a cat"]})
    shutil.copytree(eight / "images" / "train", tmp_path / "images" / "train", dirs_exist_ok=True)
    CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    assert "50% of the captions" in (warning := capsys.readouterr().err)
    assert "have more than 19 tokens" in warning
    warn_once.cache_clear()


def test_an_image_of_several_ids_is_warned_of(eight: Path, tmp_path: Path, capsys):
    warn_once.cache_clear()
    write_split(tmp_path, "train", {"0.png": ["a red ball"], "./0.png": ["a cat"], "1.png": ["a cat"]})
    shutil.copytree(eight / "images" / "train", tmp_path / "images" / "train", dirs_exist_ok=True)
    CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    assert "lists 1 image more than once, under several ids" in capsys.readouterr().err
    warn_once.cache_clear()


def test_captions_that_change_while_they_are_in_use_are_refused(drawn: Path, tmp_path: Path):
    shutil.copytree(drawn, tmp_path / "data")
    data = CaptionDataset(
        tmp_path / "data", "val", vocab_threshold=1, vocab=Vocabulary.build(["a ball"], 1), cache=tmp_path / "cache"
    )
    assert data.references()
    document = json.loads(data.annotation_file.read_text())
    first, last = document["annotations"][0], document["annotations"][-1]
    first["caption"], last["caption"] = last["caption"], first["caption"]
    data.annotation_file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="has changed since it was first read; start again"):
        data.references()


def test_an_annotation_file_that_is_a_broken_link_is_a_sentence(tmp_path: Path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train.json").symlink_to("nowhere.json")
    with pytest.raises(InputError, match=r"captions_train\.json"):
        CaptionDataset(tmp_path, cache=tmp_path / "cache")


def test_a_link_to_itself_leaves_the_other_images_of_its_folder(tmp_path: Path):
    names = [f"{i}.png" for i in range(20)]
    write_split(tmp_path, "train", {name: ["a dog"] for name in names})
    folder = tmp_path / "images" / "train"
    for name in names:
        draw_noise(0).save(folder / name)
    for i in range(20):  # in any order of the folder, a link comes before an image
        (folder / f"{i}-link.png").symlink_to(f"{i}-link.png")
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    assert len(data.paths) == len(names)


def test_images_in_a_folder_that_may_not_be_entered_are_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_split(tmp_path, "train", {"a.png": ["a dog"]})
    (tmp_path / "images" / "train" / "a.png").symlink_to("a.png")  # as every link looks in such a folder
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "train")
    with pytest.raises(InputError, match="train cannot be entered"):
        CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
