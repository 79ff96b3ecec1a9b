"""The benchmark in small: that it measures and reports everything, never how fast."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import drawn, material, peer, quality, recipe, report, scale, speed, training_speed
from captioning.errors import InputError
from model import DECODERS, DecoderRNN, EncoderCNN
from vocabulary import Vocabulary

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(tmp_path: Path) -> material.Settings:
    return material.Settings(
        count=18,
        image_size=32,
        lite_image_size=32,
        recipe_steps=1,
        recipe_images=2,
        decoder_steps=2,
        decoder_images=20,
        repeats=1,
        start_up_images=20,
        start_up_captions=2000,
        workers=0,
        results=tmp_path / "results",
        figure=tmp_path / "speed.png",
    )


def numbers(value: object) -> list[float]:
    if isinstance(value, dict | list):
        return [n for inner in (value.values() if isinstance(value, dict) else value) for n in numbers(inner)]
    return [float(value)] if isinstance(value, int | float) else []


def test_a_small_run_reports_every_measurement(
    settings: material.Settings,
    tiny_backbone: Callable,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (material, recipe):
        monkeypatch.setattr(module, "resnet50", tiny_backbone)
    monkeypatch.setattr(drawn, "CAPTIONS", 3000)
    monkeypatch.setattr(training_speed, "LENGTH_STEPS", 2)
    monkeypatch.setattr(speed, "measure_peer", lambda *_: None)  # below, by itself
    path = speed.run(settings)
    results = json.loads(path.read_text())
    assert results["training"]["captions_seen"] == 3 * 5 * settings.count
    assert results["start_up"]["captions"] == 2000
    assert results["profile"]["training_epoch"]["cpu"]
    assert results["profile"]["captioning"]["cpu"]
    self_critical = {f"{name}, self-critical" for name in DECODERS}
    large_grids = {"attention, 64 cells", "transformer, 64 cells"}
    assert set(results["decoders"]) == DECODERS.keys() | self_critical | large_grids
    assert results["decoders"]["lstm"]["share_of_lstm"] == 1
    assert set(results["captioning"]["backbones"]) == {"resnet50", "tf_efficientnet_lite2"}
    parts = [results[part] for part in ("training", "decoders", "captioning", "first_caption", "start_up")]
    assert all(np.isfinite(n) and n > 0 for n in numbers(parts))
    assert Image.open(settings.figure).width > 500
    printed = capsys.readouterr().out
    assert printed.count("|\n") == (2 + 11) + (2 + 2) + (2 + 8)
    assert results["device"] in printed
    results["peer"] = dict.fromkeys(
        ("captions_per_second", "training_ratio", "photos_per_second", "captioning_ratio"), 2.0
    )
    assert report.format_table(results).count("|\n") == printed.count("|\n") + 4


def test_the_peer_is_measured_where_it_is_installed(
    settings: material.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(drawn, "CAPTIONS", 3000)
    ready = material.prepare(settings, tmp_path)
    result = peer.measure_peer(ready, 10.0, 20.0)
    if find_spec("transformers") is None:
        assert result is None
        assert "transformers is not installed" in capsys.readouterr().err
        return
    assert result["training_ratio"] == pytest.approx(10 / result["captions_per_second"])
    assert result["captioning_ratio"] == pytest.approx(20 / result["photos_per_second"])
    captions = peer.caption_with_peer(peer.build_peer(len(ready.vocab), 32).eval(), ready, ready.paths)
    assert len(captions) == settings.count


def test_a_folder_with_too_few_images_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match="holds 1 images"):
        material.choose_images(material.Settings(images=tmp_path), tmp_path)


def test_drawn_captions_have_the_statistics_of_real_ones() -> None:
    captions = drawn.draw_captions(25_000)
    vocab = Vocabulary.build(captions, 1)
    lengths = [len(text.split()) for text in captions]
    assert 9.5 < np.mean(lengths) < 11
    assert 6_000 < len(vocab) < 12_000  # COCO val2017's 25,014 captions: 7,300 words
    assert captions == drawn.draw_captions(25_000)


def test_the_recipe_is_the_same_network(tmp_path: Path) -> None:
    encoder, decoder = EncoderCNN(8, weights="random").eval(), DecoderRNN(8, 12, 20)
    plain_encoder, plain_decoder = recipe.Encoder(8).eval(), recipe.Decoder(8, 12, 20)
    plain_encoder.load_state_dict(encoder.state_dict())
    plain_decoder.load_state_dict(decoder.state_dict())
    images, captions = torch.randn(2, 3, 64, 64), torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])
    features = plain_encoder(images)
    torch.testing.assert_close(features, encoder(images), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(plain_decoder(features, captions), decoder(features, captions))
    assert plain_decoder.sample(features[:1, None]) == decoder.sample(features[:1])[0]


def test_the_recipe_draws_captions_of_one_length_with_their_images(tmp_path: Path) -> None:
    names = [path.name for path in drawn.draw_images(tmp_path / "photos", 3)]
    captions = drawn.draw_captions(40)
    drawn.write_annotations(tmp_path / "captions_train.json", names, captions)
    data = recipe.Captions(tmp_path / "captions_train.json", tmp_path / "photos", threshold=2, image_size=32)
    items = [data[i] for i in data.draw(6)]
    assert {image.shape for image, _ in items} == {(3, 32, 32)}
    assert len({len(caption) for _, caption in items}) == 1
    assert data.lengths[0] == len(recipe.words_of(captions[0]))


def test_results_that_cannot_be_written_are_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scale, "make", lambda *_: pytest.fail("it measured first"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        scale.run(scale.Settings(results=tmp_path / "file"))


def test_the_scale_of_a_small_data_set_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("learning_rate_factor", "stored_features"):
        monkeypatch.setattr(scale.training, name, getattr(scale.training, name))  # and put back
    scale.make(tmp_path / "data", 300)
    (row,) = scale.measure(tmp_path / "data", 4)
    assert (row["photos"], row["captions"]) == (300, 1500)
    assert row["megabytes_of_arrays"] == pytest.approx(0.13, abs=0.04)
    assert all(row[name] > 0 for name in scale.ROWS if name not in ("megabytes_beyond_arrays", "megabytes_cold"))
    rows = [
        {**row, "processes": 1},
        {**row, "processes": 1, "captions": 2001500, "seconds_cold": row["seconds_cold"] + 8},
    ]
    assert scale.slopes(rows)["1 processes"]["seconds_cold"] == pytest.approx(4)
    table = scale.format_table(rows).splitlines()
    assert len(table) == 2 + len(scale.ROWS)
    assert "| 1,500 | 2,001,500 |" in table[2]


def test_the_quality_after_as_many_epochs_is_compared(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)  # where its cache is made
    (tmp_path / "tiny.toml").write_text(
        f'data = "{drawn}"\nbackbone = "tf_efficientnet_lite2"\nimage_size = 32\nvocab_threshold = 2\nworkers = 0\n'
        "hidden_size = 256\ntie_weights = true\n"
    )
    settings = quality.Settings(tmp_path / "tiny.toml", epochs=1, results=tmp_path / "results")
    results = json.loads(quality.run(settings).read_text())
    assert (results["epochs"], results["backbone"], results["image_size"]) == (1, "tf_efficientnet_lite2", 32)
    for row in results["rows"].values():
        assert {"CIDEr", "Bleu_4", "thing", "colour"} <= set(row)
        assert all(0 <= value <= 10 for value in row.values())
    assert list(results["rows"]) == ["plain recipe", "train.py", "train.py --config tiny.toml"]
    assert capsys.readouterr().out.count("\n| train.py") == 2


def test_images_of_one_name_in_several_folders_are_used(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) / "a.png" for i in range(material.VAL_IMAGES + 1)]
    for path in paths:
        path.parent.mkdir()
        Image.new("RGB", (40, 40)).save(path)
    data, _ = material.make_data_set(tmp_path, paths)
    assert len(list((data / "images" / "train").iterdir())) == len(paths)
