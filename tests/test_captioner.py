from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath

import numpy as np
import pytest
import torch
import tyro
from conftest import EIGHT, draw_noise
from PIL import Image, ImageSequence

import caption as caption_command
import evaluate as evaluate_command
from captioning import bulk
from captioning import captioner as captioner_module
from captioning.captioner import DEFAULT_DECODING, Caption, Captioner, Decoding, Ensemble
from captioning.checkpoint import load_model
from captioning.errors import InputError
from captioning.features import BATCH
from captioning.packing import PackedLinear
from vocabulary import END


@pytest.fixture(scope="module")
def model(trained: Path) -> Captioner:
    return Captioner.load(trained)


@pytest.fixture
def image_paths(eight: Path) -> list[Path]:
    return [eight / "images" / "val" / name for name in EIGHT]


# Options


NO_EFFECT = [
    ({"block_trigrams": True}, "--block-trigrams has no effect without a beam"),
    ({"groups": 2}, "--groups has no effect without a beam"),
    ({"diversity": 3.0}, "--diversity has no effect without a beam"),
    ({"length_penalty": 0.0}, "--length-penalty has no effect without a beam"),
    ({"length_penalty": 1.0}, "--length-penalty has no effect without a beam"),
    ({"beam_size": 3, "diversity": 3.0}, "--diversity has no effect without --groups"),
    ({"top_k": 3}, "--top-k has no effect without --temperature"),
    ({"top_p": 0.5}, "--top-p has no effect without --temperature"),
    ({"seed": 3}, "--seed has no effect without --temperature"),
    ({"seed": 0}, "--seed has no effect without --temperature"),
    ({"beam_size": 3, "top_k": 3}, "--top-k has no effect without --temperature"),
    ({"beam_size": 3, "temperature": 0.7}, "--beam-size has no effect with --temperature"),
    ({"beam_size": 1, "temperature": 0.7}, "--beam-size has no effect with --temperature"),
    ({"block_trigrams": True, "temperature": 0.7}, "--block-trigrams has no effect with --temperature"),
    ({"groups": 2, "temperature": 0.7}, "--groups has no effect with --temperature"),
    ({"length_penalty": 0.5, "temperature": 0.7}, "--length-penalty has no effect with --temperature"),
]
OUT_OF_RANGE = [
    ({"alternatives": 3}, "3 alternatives need a beam of 4 or more: add --beam-size 4, or --temperature"),
    ({"beam_size": 3, "alternatives": 3}, "3 alternatives need a beam of 4 or more"),
    ({"alternatives": -1}, "alternatives is -1"),
    ({"alternatives": -1, "temperature": 1.0}, "alternatives is -1"),
    ({"alternatives": 101, "temperature": 1.0}, "alternatives is 101, but it has to be at most 100"),
    ({"beam_size": 0}, "beam_size is 0"),
    ({"beam_size": 5000}, "beam_size is 5000, but it has to be at most 100"),
    ({"beam_size": 4, "groups": 3}, "groups is 3"),
    ({"max_length": 0}, "max_length is 0"),
    ({"max_length": 10**12}, "max_length is 1000000000000, but it has to be at most 1000"),
    ({"min_length": 30}, "min_length is 30"),
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
    ({"temperature": 1.0, "seed": 99999999999999999999}, "seed is out of range: it has to be from 0 to 2"),
]


@pytest.mark.parametrize(("options", "sentence"), NO_EFFECT + OUT_OF_RANGE, ids=str)
def test_an_option_that_is_wrong_or_without_effect_is_refused(options: dict, sentence: str):
    with pytest.raises(InputError, match=rf"^{re.escape(sentence)}.*\.$"):
        Decoding(**options).check()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam_size": 1},
        {"block_trigrams": False},
        {"beam_size": 4, "groups": 2, "diversity": 3.0, "length_penalty": 0.0, "block_trigrams": True},
        {"beam_size": 4, "alternatives": 3},
        {"temperature": 1.0, "alternatives": 3, "top_k": 0, "top_p": 1.0, "seed": 2**64 - 1},
        {"temperature": 1.0, "block_trigrams": False},
        {"min_length": 20},
    ],
    ids=str,
)
def test_an_option_with_effect_is_accepted(options: dict):
    Decoding(**options).check()


def test_none_is_an_option_that_was_not_given():
    plain = Decoding(max_length=None, min_length=None, alternatives=None)  # pyright: ignore[reportArgumentType]
    assert plain == Decoding()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"beam_size": 3, "block_trigrams": True}),
        ({"beam_size": 5}, {"beam_size": 5, "block_trigrams": True}),
        ({"block_trigrams": False}, {"beam_size": 3, "block_trigrams": False}),
        ({"length_penalty": 0.0, "max_length": 9}, {"beam_size": 3, "block_trigrams": True, "length_penalty": 0.0}),
        ({"beam_size": 1}, {"beam_size": 1}),
        ({"temperature": 0.7, "seed": 1}, {"temperature": 0.7, "seed": 1}),
        ({"beam_size": 1, "block_trigrams": True}, {"beam_size": 1, "block_trigrams": True}),
        ({"beam_size": 3, "temperature": 0.7}, {"beam_size": 3, "temperature": 0.7}),
    ],
    ids=str,
)
def test_a_beam_of_three_without_repetition_is_the_default_for_images(given: dict, expected: dict):
    assert Decoding(**given).with_defaults() == Decoding(**{**given, **expected})


def arguments_of(options: dict) -> list[str]:
    flags = {name: f"--{name.replace('_', '-')}" for name in options}
    return [x for name, value in options.items() for x in [flags[name]] + ([] if value is True else [str(value)])]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(options, sentence) for options, sentence in NO_EFFECT if "temperature" in options or "top" in sentence],
    ids=str,
)
def test_the_command_line_says_so_before_any_work(options: dict, sentence: str):
    for command in (caption_command.main, evaluate_command.main):
        image_path = ["no.jpg"] if command is caption_command.main else ["--data", "no"]
        with pytest.raises(InputError, match=re.escape(sentence)):
            tyro.cli(command, args=[*image_path, "--model", "none", *arguments_of(options)])


def test_the_command_line_tells_given_options_from_defaults():
    for arguments, sentence in (
        (["--beam-size", "1", "--block-trigrams"], "--block-trigrams has no effect without a beam"),
        (["--alternatives", "3"], "3 alternatives need a beam of 4"),
        (["--beam-size", "1"], "none does not exist"),
        (["--no-block-trigrams"], "none does not exist"),
        (["--temperature", "0.7"], "none does not exist"),
    ):
        with pytest.raises(InputError, match=re.escape(sentence)):
            tyro.cli(caption_command.main, args=["no.jpg", "--model", "none", *arguments])
    with pytest.raises(InputError, match="--block-trigrams has no effect without a beam"):
        tyro.cli(evaluate_command.main, args=["--block-trigrams"])
    with pytest.raises(InputError, match="--alternatives has no effect on an evaluation"):
        tyro.cli(evaluate_command.main, args=["--alternatives", "2"])


# Captioner


def test_a_captioner_chooses_words_as_the_command_does(
    model: Captioner, trained: Path, image_paths: list[Path], capsys
):
    texts = [caption.text for caption in model(image_paths)]
    assert texts == [caption.text for caption in model(image_paths, DEFAULT_DECODING)]
    assert texts == [caption.text for caption in model(image_paths, beam_size=3)]
    caption_command.main(tuple(image_paths), Decoding(), (trained,), json_=True, workers=0)
    assert [row["caption"] for row in json.loads(capsys.readouterr().out)] == texts
    assert model(image_paths, Decoding())[0].text == model(image_paths, beam_size=1)[0].text
    with pytest.raises(InputError, match="--top-k has no effect"):
        model(image_paths, top_k=3)
    with pytest.raises(InputError, match="beam_size has no effect if a Decoding is given"):
        model(image_paths, Decoding(), beam_size=3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_a_captioner_on_a_cpu_computes_with_packed_weights(model: Captioner):
    for module in (model.fast_embed, model.fast_decoder):
        layers = list(module.modules())
        assert any(isinstance(layer, PackedLinear) for layer in layers)
        assert not any(isinstance(layer, torch.nn.Linear | torch.nn.LSTM) for layer in layers)


def test_a_captioner_neither_changes_a_model_nor_changes_with_it(trained: Path, image_paths: list[Path]):
    encoder, decoder, vocab, description = load_model(trained)
    decoder.train()
    captioner = Captioner(encoder, decoder, vocab, description)
    assert decoder.training
    before = captioner(image_paths, Decoding())
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            parameter.fill_(0.1)
    assert captioner(image_paths, Decoding()) == before


def test_a_decoder_that_keeps_a_computed_tensor_is_refused(trained: Path):
    encoder, decoder, vocab, description = load_model(trained)
    decoder.last = decoder.embed.weight * 2
    with pytest.raises(InputError, match="an attribute that holds a computed tensor; detach it"):
        Captioner(encoder, decoder, vocab, description)


def test_a_caption_has_the_score_that_it_was_ranked_by(model: Captioner, image_paths: list[Path]):
    for options, penalty in (({}, 1), ({"length_penalty": 0.5}, 0.5), ({"beam_size": 1}, 1), ({"temperature": 1.0}, 1)):
        for caption in model(image_paths, max_length=50, **options):
            # A caption of fewer than max_length tokens has ended with <end>.
            length = len(caption.tokens) + (len(caption.tokens) < 50)
            assert caption.score == pytest.approx(caption.log_probability / length**penalty)
    best, *others = (lambda c: [c, *c.alternatives])(model(image_paths[0], beam_size=4, alternatives=3)[0])
    scores = [caption.score for caption in (best, *others)]
    assert scores == sorted(scores, reverse=True)


def test_a_sample_depends_on_the_seed_and_the_index_alone(
    model: Captioner, image_paths: list[Path], monkeypatch: pytest.MonkeyPatch
):
    how = Decoding(temperature=1.5, seed=3, max_length=8)
    copies = image_paths[:1] * 40
    texts = [caption.text for caption in model(copies, how)]
    assert len(set(texts)) > 30  # and none of another batch's
    monkeypatch.setattr(captioner_module, "BATCH", 7)
    assert [caption.text for caption in model(copies, how)] == texts
    later = [caption.text for _, caption in model.stream(copies[:9], how, positions=range(31, 40))]
    assert later == texts[31:]


def test_samples_written_to_a_file_are_those_of_one_pass(
    model: Captioner, image_paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    how = Decoding(temperature=1.5, seed=3)
    copies = [tmp_path / f"{i:02}.png" for i in range(20)]
    for path in copies:
        shutil.copy(image_paths[0], path)
    texts = [caption.text for caption in model(copies, how)]
    monkeypatch.setattr(bulk, "CHUNK", 6)
    output = tmp_path / "captions.jsonl"
    bulk.write_captions(model, copies, how, output)
    written = output.read_bytes()
    assert [json.loads(line)["caption"] for line in written.splitlines()] == texts
    output.write_bytes(b"".join(written.splitlines(keepends=True)[:17]))
    bulk.write_captions(model, copies, how, output)
    assert output.read_bytes() == written


def test_rows_with_other_alternatives_or_another_model_s_probabilities_are_not_continued(
    model: Captioner, image_paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bulk, "other_captions", lambda caption: caption.alternatives)  # also those that read the same
    output = tmp_path / "captions.jsonl"
    bulk.write_captions(model, image_paths[:2], Decoding(beam_size=5, alternatives=2), output)
    written = output.read_bytes()
    for how in (Decoding(beam_size=5, alternatives=4), Decoding(beam_size=5)):
        with pytest.raises(InputError, match="holds other captions than this model gives"):
            bulk.write_captions(model, image_paths[:3], how, output)
    row, *_ = rows = [json.loads(line) for line in written.splitlines()]
    row["log_probability"] -= 1
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="holds other captions than this model gives"):
        bulk.write_captions(model, image_paths[:3], Decoding(beam_size=5, alternatives=2), output)


def test_the_last_captions_are_compared_behind_a_batch_of_errors(
    model: Captioner, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bulk, "BATCH", 2)
    monkeypatch.setattr(bulk, "CHUNK", 2)
    copies = [tmp_path / f"{i}.png" for i in range(9)]
    for i, path in enumerate(copies):
        path.write_bytes(b"" if 3 <= i < 7 else image_path.read_bytes())
    output, at_once = tmp_path / "captions.jsonl", tmp_path / "at-once.jsonl"
    bulk.write_captions(model, copies[:7], Decoding(), output)
    with pytest.raises(InputError, match="holds other captions than this model gives"):
        bulk.write_captions(model, copies, Decoding(max_length=2), output)
    assert bulk.write_captions(model, copies, Decoding(), output) == (9, 4)
    bulk.write_captions(model, copies, Decoding(), at_once)
    assert output.read_bytes() == at_once.read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_rows_are_written_batch_by_batch(
    model: Captioner, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    copies = [tmp_path / f"{i:03}.png" for i in range(3 * BATCH)]
    for i, path in enumerate(copies):
        path.write_bytes(b"" if i in (1, BATCH - 1) and error is KeyboardInterrupt else image_path.read_bytes())
    whole, output, stream = tmp_path / "whole.jsonl", tmp_path / "captions.jsonl", model.stream
    bulk.write_captions(model, copies, Decoding(), whole)

    def stop(*arguments: object, **options: object) -> Iterator[tuple[int, Caption]]:
        for i, caption in stream(*arguments, **options):  # pyright: ignore[reportArgumentType]
            if i == 2 * BATCH:
                raise error("the third batch cannot be read")
            yield i, caption

    monkeypatch.setattr(model, "stream", stop)
    with pytest.raises(error):
        bulk.write_captions(model, copies, Decoding(), output, strict=error is InputError)
    written = BATCH if error is KeyboardInterrupt else 2 * BATCH
    assert output.read_bytes().splitlines() == whole.read_bytes().splitlines()[:written]
    monkeypatch.setattr(model, "stream", stream)
    bulk.write_captions(model, copies, Decoding(), output)
    assert output.read_bytes() == whole.read_bytes()


def test_images_that_went_missing_at_the_end_are_captioned_once_and_saved_as_the_run_goes(
    model: Captioner, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(bulk, "BATCH", 2)
    monkeypatch.setattr(bulk, "CHUNK", 2)
    monkeypatch.setattr(bulk, "RETRIED", 1)
    copies = [tmp_path / f"{i}.png" for i in range(9)]
    for i, path in enumerate(copies):
        path.write_bytes(b"" if i in (0, 1) or i >= 3 else image_path.read_bytes())
    output, at_once = tmp_path / "captions.jsonl", tmp_path / "at-once.jsonl"
    assert bulk.write_captions(model, copies, Decoding(), output) == (9, 8)
    with pytest.raises(InputError, match="holds other captions"):
        bulk.write_captions(model, copies, Decoding(max_length=2), output)
    assert len(output.read_text().splitlines()) == 9  # a refused run leaves the file as it is
    date = output.stat().st_mtime_ns
    lines: list[str] = []
    assert bulk.write_captions(model, copies, Decoding(), output, log=lines.append) == (9, 8)
    assert lines == [f"{output}: 0 rows written, 9 were there"]
    assert output.stat().st_mtime_ns == date  # by which images that are newer are known
    for path in copies:
        path.write_bytes(image_path.read_bytes())
    seen: list[Path] = []
    stream = model.stream
    monkeypatch.setattr(
        model, "stream", lambda sources, *rest, **options: seen.extend(sources) or stream(sources, *rest, **options)
    )
    lines.clear()
    assert bulk.write_captions(model, copies, Decoding(), output, log=lines.append) == (9, 0)
    assert lines[1:] == [f"{output}: 5 rows written, 4 were there, 3 of them without a caption until now"]
    assert seen == [*copies[2:], *copies[:2], copies[3]]  # those of the last batch with a caption twice
    bulk.write_captions(model, copies, Decoding(), at_once)
    assert output.read_bytes() == at_once.read_bytes()


# Precision


@pytest.mark.parametrize("bfloat16", [False, True])
def test_auto_is_bfloat16_where_the_processor_has_it_and_never_integers(
    trained: Path, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(captioner_module, "fast_dtype", lambda _: torch.bfloat16 if bfloat16 else torch.float32)
    for precision in ("auto", "fp32", "bf16"):
        captioner = Captioner.load(trained, precision=precision)
        expected = ("bf16" if bfloat16 else "fp32") if precision == "auto" else precision
        assert captioner.precision == expected
        dtypes = {parameter.dtype for parameter in captioner.encoder.resnet.parameters()}
        assert dtypes == {{"fp32": torch.float32, "bf16": torch.bfloat16}[expected]}


def test_a_precision_that_there_is_not_is_a_sentence(trained: Path):
    with pytest.raises(InputError, match="precision is 'fp16', but it has to be one of auto, fp32, bf16"):
        Captioner.load(trained, precision="fp16")


def test_evaluation_says_in_which_precision(trained: Path, drawn: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")  # without Java, which takes seconds to start
    options = ["--model", str(trained), "--data", str(drawn), "--limit", "2", "--workers", "0"]
    tyro.cli(evaluate_command.main, args=[*options, "--precision", "bf16", "--json"])
    assert json.loads(capsys.readouterr().out)["precision"] == "bf16"
    tyro.cli(evaluate_command.main, args=[*options, "--precision", "fp32"])
    assert "with a backbone in fp32" in capsys.readouterr().out


# Ensembles


def test_a_model_twice_captions_as_once(model: Captioner, trained: Path, image_paths: list[Path]):
    assert type(Captioner.load([trained])) is Captioner
    twice = Captioner.load([trained, str(trained)])
    assert isinstance(twice, Ensemble)
    for how in (Decoding(), DEFAULT_DECODING, Decoding(temperature=1.0, seed=2)):
        for one, other in zip(model(image_paths, how), twice(image_paths, how), strict=True):
            assert one.text == other.text
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)
            assert other.attention is None


def test_opened_images_are_read_by_one_process(trained: Path, image_paths: list[Path]):
    """The processes would share the position in each opened file, also those of several models."""
    twice = Captioner.load([trained, trained])
    expected = [caption.text for caption in twice(image_paths)]
    opened = [Image.open(path) for path in image_paths]
    captions = dict(twice.stream(opened, DEFAULT_DECODING, workers=2))
    assert [captions[i].text for i in range(len(opened))] == expected


@pytest.mark.slow
def test_models_of_different_decoders_average_their_probabilities(
    model: Captioner, trained: Path, attending: Path, image_paths: list[Path]
):
    ensemble, other = Captioner.load([trained, attending], precision="fp32"), Captioner.load(attending)
    first = ensemble(image_paths[0], Decoding(max_length=1))[0]
    together = first.log_probability
    word = ensemble.vocab[first.tokens[0]] if first.tokens else END

    def probability(one: Captioner) -> float:
        _, features = next(one._embed(image_paths[:1], [[0]], 0, None))
        logits, _ = one.decoder.step(torch.tensor([0], device=one.device), one.decoder.init_state(features))
        return logits.softmax(1)[0, word].item()

    assert math.exp(together) == pytest.approx((probability(model) + probability(other)) / 2, rel=0.05)
    for how in (Decoding(), DEFAULT_DECODING, Decoding(temperature=1.0, seed=2)):
        for caption in ensemble(image_paths, how):
            assert caption.attention.shape == (len(caption.tokens), 4)
            torch.testing.assert_close(caption.attention.sum(1), torch.ones(len(caption.tokens)), rtol=0.02, atol=0.02)
    assert ensemble.description.architecture.decoder == "attention"


def test_an_image_that_cannot_be_read_is_reported_once(
    trained: Path, attending: Path, image_paths: list[Path], tmp_path
):
    (tmp_path / "bad.jpg").write_text("no photo")
    sources, reported = [image_paths[0], tmp_path / "bad.jpg", image_paths[1]], []
    captions = Captioner.load([trained, attending]).stream(sources, Decoding(), 0, lambda i, _: reported.append(i))
    assert [i for i, _ in captions] == [0, 2]
    assert reported == [1]


def test_the_members_of_an_ensemble_share_the_workers(trained: Path, image_paths: list[Path], monkeypatch):
    used = []
    monkeypatch.setattr(captioner_module, "encode", lambda *arguments: used.append(arguments[3]) or iter(()))
    for workers in (0, 2, 5):
        list(Captioner.load([trained, trained, trained]).stream(image_paths, Decoding(), workers))
    assert used == [*[0] * 3, *[1] * 3, *[2] * 3]


def test_each_frame_of_an_animation_has_its_caption(model: Captioner, tmp_path: Path):
    frames = [draw_noise(i) for i in range(3)]
    frames[0].save(tmp_path / "animation.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "animation.gif") as animation:
        separate = [frame.copy() for frame in ImageSequence.Iterator(animation)]
        expected = [caption.log_probability for caption in model(separate)]
        assert len({round(each, 3) for each in expected}) == 3
        for iterator in (ImageSequence.Iterator(animation), (frame for frame in ImageSequence.Iterator(animation))):
            assert [caption.log_probability for caption in model(iterator)] == pytest.approx(expected, abs=1e-3)
        with pytest.raises(InputError, match=r"holds an image of several frames twice; put a copy\(\) of each frame"):
            model(list(ImageSequence.Iterator(animation)))


def test_opened_files_of_several_pages_are_the_same_from_an_iterator(model: Captioner, tmp_path: Path):
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    page = Image.fromarray(levels)
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page], tiffinfo={262: 0})
    listed, iterated = (model(make([Image.open(tmp_path / "pages.tif")]))[0] for make in (list, iter))
    assert iterated.log_probability == pytest.approx(listed.log_probability, abs=1e-4)


def test_several_models_on_the_command_line(trained: Path, attending: Path, image_paths: list[Path], capsys):
    expected = Captioner.load([trained, attending])(image_paths[0])[0].text
    arguments = [str(image_paths[0]), "--model", str(trained), "--model", str(attending)]
    tyro.cli(caption_command.main, args=arguments)
    assert capsys.readouterr().out == f"{expected}\n"
    with pytest.raises(InputError, match="--export takes one --model"):
        tyro.cli(caption_command.main, args=[*arguments[1:], "--export", "x.onnx"])


@pytest.mark.slow
def test_models_that_cannot_be_averaged_are_a_sentence(trained: Path, tmp_path: Path):
    folder = shutil.copytree(trained, tmp_path / "other")
    description = json.loads((folder / "captioner.json").read_text())
    words = description["vocabulary"]
    words[3], words[4] = words[4], words[3]
    (folder / "captioner.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=rf"^{trained} and {folder} have different vocabularies, .*\.$"):
        Captioner.load([trained, folder])
    with pytest.raises(InputError, match="at least one model"):
        Captioner.load([])
    with pytest.raises(InputError, match="only a single model"):
        Captioner.load([trained, trained]).push_to_hub("user/name", "mit")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), "not a ndarray; use Image.fromarray"),
        ([torch.zeros(3, 8, 8)], "not a Tensor; use Image.fromarray"),
        (b"\xff\xd8", "not a bytes; use Image.open"),
        (io.BytesIO(b"\xff\xd8"), "not a BytesIO; use Image.open"),
        ([io.BytesIO(b"\xff\xd8")], "not a BytesIO; use Image.open"),
        (None, r"not a NoneType\.$"),
        ([None], r"not a NoneType\.$"),
        (3, r"not a int\.$"),
        ([["a.jpg"]], r"not a list\.$"),
        ("", "a path is empty; name a file"),
        (Image.new("RGB", (0, 40)), "it has no pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_is_one_short_sentence(images: object, message: str, trained: Path):
    with pytest.raises(InputError, match=message) as caught:
        Captioner.load(trained)(images)  # pyright: ignore[reportArgumentType]
    assert len(str(caught.value)) < 120


def test_every_kind_of_path_and_of_list_is_captioned(model: Captioner, image_path: Path):
    (entry,) = (entry for entry in os.scandir(image_path.parent) if entry.name == image_path.name)
    expected = [model(image_path)[0].text]
    for images in (
        entry,
        [entry],
        PurePath(image_path),
        str(image_path),
        (path for path in [image_path]),
        {image_path},
    ):
        assert [caption.text for caption in model(images)] == expected
    for sources in (image_path, (path for path in [image_path])):
        assert [caption.text for _, caption in model.stream(sources, DEFAULT_DECODING)] == expected


@pytest.mark.parametrize("folder", [None, 3, b"models/photos", [None], [3]], ids=str)
def test_what_names_no_model_is_a_sentence(folder: object):
    with pytest.raises(InputError, match=r"^a model is the path of a folder or user/name, not a \w+\.$"):
        Captioner.load(folder)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 3.0}, r"beam_size is 3\.0, but it has to be a whole number"),
        ({"beam_size": 3, "block_trigrams": "no"}, "block_trigrams is 'no', but it has to be True or False"),
        ({"temperature": "1"}, "temperature is '1', but it has to be a number"),
        ({"temperature": np.ones(2)}, r"temperature is array\(\[1\., 1\.\]\), but it has to be a number"),
        ({"temperature": 1.0, "top_p": "1"}, "top_p is '1', but it has to be a number"),
        ({"beam_size": 3, "length_penalty": "a"}, "length_penalty is 'a', but it has to be a number"),
        ({"beam_size": 3, "groups": 3, "diversity": [1]}, r"diversity is \[1\], but it has to be a number"),
        ({"decode": 3}, "decode has to be a Decoding, not a int"),
        ({"decode": {}}, "decode has to be a Decoding, not a dict"),
        ({"num_beams": 3}, "there is no option num_beams; the options are beam_size, temperature, "),
    ],
)
def test_an_option_of_another_type_is_refused(trained: Path, image_path: Path, options: dict, message: str):
    with pytest.raises(InputError, match=message):
        Captioner.load(trained)(image_path, **options)
    assert Captioner.load(trained)(image_path, beam_size=np.int64(3))[0].text  # pyright: ignore[reportArgumentType]
