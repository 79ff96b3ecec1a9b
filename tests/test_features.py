import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from captioning import features
from captioning.backbones import Preprocessing
from captioning.errors import InputError
from captioning.features import BATCH, encode, stored_features
from captioning.images import ImageDataset, Views, build_transform, read_image
from captioning.losses import Batch, CaptioningModel
from data_loader import CaptionDataset
from model import DECODERS, EncoderCNN

SIZE = Preprocessing(64)


@pytest.fixture(scope="module")
def paths(drawn: Path) -> list[Path]:
    """More photos than a batch holds."""
    return sorted((drawn / "images" / "train").iterdir())[: BATCH + 8]


@pytest.fixture
def encoder(tiny_backbone: Callable) -> EncoderCNN:
    torch.manual_seed(0)
    return EncoderCNN(8, weights="random").eval()


def record_computed(monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None) -> list[int]:
    """Record the indices of the images that the backbone processes; it fails after `fail_after` batches."""
    computed: list[int] = []

    def counting(*arguments: object) -> object:
        for number, (indices, batch) in enumerate(encode(*arguments)):
            if number == fail_after:
                raise RuntimeError("interrupted")
            computed.extend(indices)
            yield indices, batch

    monkeypatch.setattr(features, "encode", counting)
    return computed


def test_what_is_stored_is_what_the_backbone_sees(encoder: EncoderCNN, paths: list[Path], tmp_path: Path):
    stored = stored_features(encoder, paths, SIZE, cache=tmp_path)
    assert stored.shape == (len(paths), 1, 2048)
    images = torch.stack([build_transform(image_size=64)(read_image(path)) for path in paths])
    with torch.no_grad():
        expected = encoder.features(images)
    assert (stored[:, 0].float() - expected).norm() < 0.03 * expected.norm()


def test_features_are_computed_and_stored_in_the_precision_asked_for(
    encoder: EncoderCNN, paths: list[Path], tmp_path: Path
):
    images = torch.stack([build_transform(image_size=64)(read_image(path)) for path in paths])
    with torch.no_grad():
        exact = encoder.features(images)
    stored = {p: stored_features(encoder, paths, SIZE, cache=tmp_path, precision=p)[:, 0] for p in ("fp32", "bf16")}
    errors = {p: (features.float() - exact).norm() / exact.norm() for p, features in stored.items()}
    assert errors["fp32"] < 1e-3 < errors["bf16"]


def test_the_grid_is_stored_where_the_decoder_attends(encoder: EncoderCNN, paths: list[Path], tmp_path: Path):
    pooled = stored_features(encoder, paths, SIZE, cache=tmp_path)
    encoder.grid = True
    stored = stored_features(encoder, paths, SIZE, cache=tmp_path)
    assert stored.shape == (len(paths), 1, 4, 2048)
    torch.testing.assert_close(stored.float().mean(2), pooled.float(), rtol=0.03, atol=0.01)


def test_several_views_are_the_centre_and_then_random_crops(encoder: EncoderCNN, paths: list[Path], tmp_path: Path):
    centre = stored_features(encoder, paths, SIZE, cache=tmp_path)
    stored = stored_features(encoder, paths, SIZE, views=3, cache=tmp_path)
    assert stored.shape == (len(paths), 3, 2048)
    torch.testing.assert_close(stored[:, 0], centre[:, 0], rtol=0.02, atol=0.02)
    assert not torch.equal(stored[:, 1], stored[:, 0])
    assert not torch.equal(stored[:, 1], stored[:, 2])
    dataset = ImageDataset(paths, Views(SIZE, 3))
    assert torch.equal(dataset[0], dataset[0])


def test_a_second_pass_computes_nothing(
    encoder: EncoderCNN, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = stored_features(encoder, paths, SIZE, cache=tmp_path)
    computed = record_computed(monkeypatch)
    assert torch.equal(stored_features(encoder, paths, SIZE, cache=tmp_path), first)
    assert computed == []


def test_a_file_in_place_of_the_cache_folder(encoder: EncoderCNN, paths: list[Path], tmp_path: Path):
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(InputError, match=r"cache.* cannot be written \(.*\); name another folder with --cache"):
        stored_features(encoder, paths, SIZE, cache=tmp_path / "cache")


def test_an_interrupted_pass_goes_on_after_its_last_whole_batch(
    encoder: EncoderCNN, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        record_computed(patch, fail_after=1)
        with pytest.raises(RuntimeError, match="interrupted"):
            stored_features(encoder, paths, SIZE, cache=tmp_path)
    assert [path.suffix for path in (tmp_path / "features").iterdir() if path.is_dir()] == [".partial"]
    computed = record_computed(monkeypatch)
    resumed = stored_features(encoder, paths, SIZE, cache=tmp_path)
    assert computed == list(range(BATCH, len(paths)))
    assert torch.equal(resumed, stored_features(encoder, paths, SIZE, cache=tmp_path / "other"))
    assert [path.suffix for path in (tmp_path / "features").iterdir() if path.is_dir()] == [""]


def test_a_torn_entry_of_a_killed_pass_counts_for_nothing(
    encoder: EncoderCNN, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        record_computed(patch, fail_after=1)
        with pytest.raises(RuntimeError, match="interrupted"):
            stored_features(encoder, paths, SIZE, cache=tmp_path)
    log = next(tmp_path.rglob("done-*"))
    log.write_bytes(log.read_bytes() + b"\0\0\0")
    resumed = stored_features(encoder, paths, SIZE, cache=tmp_path)
    assert torch.equal(resumed, stored_features(encoder, paths, SIZE, cache=tmp_path / "other"))


def test_other_weights_sizes_views_or_images_never_find_a_store(
    encoder: EncoderCNN, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    some = paths[:2]
    stored_features(encoder, some, SIZE, cache=tmp_path)
    computed = record_computed(monkeypatch)

    def count_computed(*arguments: object, **options: object) -> int:
        computed.clear()
        stored_features(*arguments, **options, cache=tmp_path)
        return len(computed)

    assert count_computed(encoder, some, SIZE) == 0
    assert count_computed(encoder, some, Preprocessing(32)) == 2
    assert count_computed(encoder, some, Preprocessing(64, crop="squash")) == 2
    assert count_computed(encoder, some, SIZE, views=2) == 2
    assert count_computed(encoder, some[::-1], SIZE) == 2
    os.utime(some[0], ns=(0, 0))
    assert count_computed(encoder, some, SIZE) == 2
    encoder.resnet[1].running_mean[0] += 1e-3
    assert count_computed(encoder, some, SIZE) == 2


def test_the_first_unreadable_image_ends_the_pass_and_all_are_listed(
    encoder: EncoderCNN, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(paths[0].read_bytes()[:200])
    some = [tmp_path / "a.png", *paths * (1 + BATCH // 24), tmp_path / "b.png"]
    computed = record_computed(monkeypatch)
    with pytest.raises(
        InputError, match=r"2 of \d+ images cannot be read \(--skip-unreadable .*\): .*a\.png.*; .*b\.png"
    ):
        stored_features(encoder, some, SIZE, cache=tmp_path)
    assert computed == list(range(1, BATCH))
    assert not list((tmp_path / "features").glob("*.partial"))


def test_an_unreadable_image_of_another_process_ends_the_pass(
    encoder: EncoderCNN, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def after_which_another_stops(*arguments: object) -> object:
        for indices, batch in encode(*arguments):
            yield indices, batch
            next((tmp_path / "features").glob("*.partial")).joinpath("stop").touch()

    monkeypatch.setattr(features, "encode", after_which_another_stops)
    monkeypatch.setattr(features, "gather_object", lambda _: [(3, InputError("3.jpg is broken"))])
    for batches in (1, 2):  # what has stopped one pass does not stop the next before its first batch
        with pytest.raises(InputError, match=r"3\.jpg is broken"):
            stored_features(encoder, paths, SIZE, cache=tmp_path)
        (log,) = (tmp_path / "features").glob("*.partial/done-*")
        assert log.stat().st_size == 8 * batches


def test_features_are_kept_where_a_file_cannot_be_read_at_present(
    encoder: EncoderCNN, paths: list[Path], tmp_path: Path
):
    (tmp_path / "b.heic").write_bytes(b"")
    some = [*paths * (1 + BATCH // 24), tmp_path / "b.heic"]
    with pytest.raises(InputError, match=r"1 of \d+ images cannot be read"):
        stored_features(encoder, some, SIZE, cache=tmp_path)
    (log,) = (tmp_path / "features").glob("*.partial/done-*")
    assert log.stat().st_size == 8 * (len(some) // BATCH)


def test_of_many_unreadable_images_it_says_how_many_more(encoder: EncoderCNN, tmp_path: Path):
    some = [tmp_path / f"{i}.png" for i in range(12)]
    for path in some:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"12 of 12 images cannot be read \(.*\): .*9\.png.*; and 2 more$"):
        stored_features(encoder, some, SIZE, cache=tmp_path)


def test_a_damaged_store_says_what_to_delete(encoder: EncoderCNN, paths: list[Path], tmp_path: Path):
    stored_features(encoder, paths, SIZE, cache=tmp_path)
    (path,) = (tmp_path / "features").glob("*/features.npy")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=rf"{path.parent} is damaged .*; delete it"):
        stored_features(encoder, paths, SIZE, cache=tmp_path)


def test_a_disk_too_small_is_refused_before_anything_is_computed(
    encoder: EncoderCNN, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: Free)
    with pytest.raises(InputError, match="the disk has less"):
        stored_features(encoder, paths, SIZE, cache=tmp_path)


class Free:
    free = 1000


@pytest.mark.parametrize("name", DECODERS)
def test_stored_features_and_pixels_give_the_same_loss(
    encoder: EncoderCNN, drawn: Path, cache: Path, tmp_path: Path, name: str
):
    data = CaptionDataset(drawn, "val", vocab_threshold=1, cache=cache)
    encoder.grid = DECODERS[name].attends
    model = CaptioningModel(encoder, DECODERS[name](8, 16, len(data.vocab))).eval()
    stored = stored_features(encoder, data.paths, SIZE, cache=tmp_path)[:, 0]
    dataset = ImageDataset(data.paths, build_transform(image_size=64, normalize=False))
    pixels = torch.stack([dataset[i] for i in range(len(dataset))])
    captions, lengths = data.captions(np.arange(len(data)))
    image_of_caption = torch.from_numpy(data.image_rows).long()
    with torch.no_grad():
        batches = (Batch(images, image_of_caption, captions, lengths) for images in (stored, pixels))
        from_store, from_pixels = (model(batch)[0].item() for batch in batches)
    assert from_store == pytest.approx(from_pixels, rel=1e-2)
