"""The exported ONNX file against PyTorch, run by onnxruntime."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import caption
from captioning import checkpoint
from captioning.captioner import Decoding
from captioning.checkpoint import Architecture, Description, Preprocessing, load_model
from captioning.decoding import greedy
from captioning.errors import InputError
from captioning.export import export_onnx
from captioning.images import build_transform, read_photo
from model import DECODERS, EncoderCNN
from vocabulary import END, SPECIAL_WORDS, START, UNK

SIZE, LENGTH = 64, 9
WORDS = [*SPECIAL_WORDS, *(f"w{i}" for i in range(37))]


@pytest.fixture(scope="module", params=["lstm", "attention"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, of weights wide apart and with an `<end>` such that noise gets captions of many lengths."""
    torch.manual_seed(1)
    decoder = DECODERS[request.param](16, 24, len(WORDS), num_layers=2)
    encoder = EncoderCNN(16, "random", grid=decoder.attends)
    encoder.eval()
    with torch.no_grad():
        seen = encoder.features(noise(13))
        encoder.standardise(seen)
        for weight in decoder.parameters():
            weight.mul_(4)
        decoder.linear.bias[[START, UNK]] += 40  # what greedy decoding never says
        lengths: set[int] = set()
        while len(lengths) < 3 and decoder.linear.bias[END] < 40:
            decoder.linear.bias[END] += 0.5
            lengths = {len(found.tokens) for found in greedy(decoder, encoder.embed(seen), max_length=LENGTH)}
    assert len(lengths) > 2
    folder = tmp_path_factory.mktemp(request.param)
    description = Description(
        architecture=Architecture(
            decoder=request.param, embed_size=16, hidden_size=24, num_layers=2, dropout=0, backbone="stored"
        ),
        preprocessing=Preprocessing(image_size=SIZE),
        vocabulary=WORDS,
    )
    checkpoint.save_epoch(folder, 1, encoder, decoder, description)
    checkpoint.write_description(folder, description)
    return folder


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    """The model's ONNX file, written by the command."""
    caption.main((), Decoding(max_length=LENGTH), model=(model,), export=model / "model.onnx")
    return model / "model.onnx"


def noise(photos: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(photos)
    coarse = torch.randint(0, 256, (photos, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)


@pytest.mark.parametrize("photos", [1, 2, 13])
def test_captions_are_pytorchs_for_any_batch_size(model, exported, photos, capfd):
    session = onnxruntime.InferenceSession(exported)
    assert capfd.readouterr().err == "", "onnxruntime warns of something"
    tokens, log_probability = session.run(None, {"photos": noise(photos).numpy()})
    encoder, decoder, _, _ = load_model(model)
    with torch.no_grad():
        expected = greedy(decoder, encoder(noise(photos)), max_length=LENGTH)
    assert tokens.shape == (photos, LENGTH)
    assert tokens.dtype == np.int64
    for row, total, hypothesis in zip(tokens.tolist(), log_probability, expected, strict=True):
        assert row == hypothesis.tokens + [END] * (LENGTH - len(hypothesis.tokens))
        assert total == pytest.approx(hypothesis.log_probability, abs=1e-3)


def test_the_file_is_complete_in_itself(model, exported):
    session = onnxruntime.InferenceSession(exported.read_bytes())
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["vocabulary"]) == WORDS
    assert (about["image_size"], about["shorter_side"]) == ("64", "73")
    [photos] = session.get_inputs()
    assert (photos.name, photos.type, photos.shape[1:]) == ("photos", "tensor(uint8)", [3, SIZE, SIZE])
    assert isinstance(photos.shape[0], str)
    assert [path.name for path in model.glob("model.onnx*")] == ["model.onnx"]


def test_the_documented_use_gives_the_captions_words(model, exported, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[1] / "models" / "README.md").read_text()
    [code] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "onnxruntime" in block]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((180, 100)).save(tmp_path / "photo.jpg")
    (tmp_path / "model.onnx").write_bytes(exported.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    encoder, decoder, vocabulary, _ = load_model(model)
    seen = build_transform(False, SIZE, normalise=False)(read_photo("photo.jpg"))
    with torch.no_grad():
        [expected] = greedy(decoder, encoder(seen[None]), max_length=LENGTH)
    assert capsys.readouterr().out.split() == vocabulary.tokens(expected.tokens)


def test_what_does_not_go_with_an_export_is_one_sentence(model, tmp_path, photo, monkeypatch):
    path = tmp_path / "model.onnx"
    for photos, how in (((photo,), Decoding()), ((), Decoding(beam_size=3))):
        with pytest.raises(InputError, match="--export takes no photos"):
            caption.main(photos, how, model=(model,), export=path)
    with pytest.raises(InputError, match="max_length is 0"):
        export_onnx(model, path, max_length=0)
    with pytest.raises(InputError, match=r"none/model.onnx cannot be written: there is no folder"):
        export_onnx(model, tmp_path / "none" / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"an export needs onnxscript, which is missing: pip install"):
        export_onnx(model, path)
    assert not path.exists()
