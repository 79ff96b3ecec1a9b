"""The exported ONNX file against PyTorch, run by onnxruntime."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from conftest import KINDS, build_kind, build_tiny, draw_noise, run_code, write_kind
from PIL import Image

import caption
from captioning.captioner import Captioner, Decoding
from captioning.checkpoint import load_model
from captioning.decoding import greedy
from captioning.errors import InputError
from captioning.export import export_onnx
from captioning.images import build_transform, read_image
from vocabulary import END, SPECIAL_WORDS, START, UNK

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SIZE, LENGTH = 64, 9
WORDS = [*SPECIAL_WORDS, *(f"w{i}" for i in range(37))]


@pytest.fixture(scope="module", autouse=True)
def _small_backbone() -> Iterator[None]:
    """An export takes as long as the backbone is large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet50", build_tiny)
        yield


@pytest.fixture(scope="module", autouse=True)
def sockets() -> Iterator[Callable[[], set[str]]]:
    """A function that returns the sockets of a process that imports onnxruntime, in its first 30 seconds.

    With telemetry, it opens the first of them after 9 to 23 seconds; so it is watched while the other tests run.
    """
    code = "import time; from captioning.quantization import import_onnxruntime as x; x(); time.sleep(30)"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    found: set[str] = set()

    def watch() -> None:
        while process.poll() is None:
            with contextlib.suppress(OSError):  # what it has just closed
                found.update(os.readlink(file) for file in os.scandir(f"/proc/{process.pid}/fd"))
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()

    def wait() -> set[str]:
        thread.join()
        assert process.returncode == 0
        return {name for name in found if name.startswith("socket:")}

    yield wait
    process.kill()


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, of weights wide apart and with an `<end>` such that noise gets captions of many lengths."""
    torch.manual_seed(1)
    encoder, decoder = build_kind(request.param, len(WORDS))
    with torch.no_grad():
        features = encoder.features(noise(13))
        encoder.standardize(features)
        for weight in decoder.parameters():
            weight.mul_(4)
        decoder.linear.bias[[START, UNK]] += 40  # what greedy decoding never says
        lengths: set[int] = set()
        while len(lengths) < 3 and decoder.linear.bias[END] < 40:
            decoder.linear.bias[END] += 0.5
            lengths = {len(h.tokens) for h in greedy(decoder, encoder.embed(features), max_length=LENGTH)}
    assert len(lengths) > 2
    return write_kind(tmp_path_factory.mktemp("model"), request.param, encoder, decoder, WORDS)


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    """The model's ONNX file, written by the command."""
    caption.main((), Decoding(max_length=LENGTH), model=(model,), export=model / "model.onnx")
    return model / "model.onnx"


def noise(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    coarse = torch.randint(0, 256, (batch, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)


@pytest.mark.parametrize("batch", [1, 2, 13])
def test_captions_are_pytorchs_for_any_batch_size(model, exported, batch, capfd):
    session = onnxruntime.InferenceSession(exported)
    assert capfd.readouterr().err == "", "onnxruntime warns of something"
    tokens, log_probability = session.run(None, {"images": noise(batch).numpy()})
    encoder, decoder, _, _ = load_model(model)
    with torch.no_grad():
        expected = greedy(decoder, encoder(noise(batch)), max_length=LENGTH)
    assert tokens.shape == (batch, LENGTH)
    assert tokens.dtype == np.int64
    for row, total, hypothesis in zip(tokens.tolist(), log_probability, expected, strict=True):
        assert row == hypothesis.tokens + [END] * (LENGTH - len(hypothesis.tokens))
        assert total == pytest.approx(hypothesis.log_probability, abs=1e-3)


def test_the_model_of_photos_is_exported_too(tmp_path):
    """It has a backbone of timm and averages its cells to a grid."""
    folder, photos = ROOT / "models" / "photos", sorted((ROOT / "images").glob("*.jpg"))
    export_onnx(folder, tmp_path / "photos.onnx")
    captioner = Captioner.load(folder, precision="fp32")
    images = torch.stack([captioner.transform(read_image(photo)) for photo in photos])
    tokens, _ = onnxruntime.InferenceSession(tmp_path / "photos.onnx").run(None, {"images": images.numpy()})
    expected = captioner(photos, beam_size=1)
    assert [captioner.vocab.decode(row) for row in tokens.tolist()] == [caption.text for caption in expected]


def test_the_file_is_complete_in_itself(model, exported):
    session = onnxruntime.InferenceSession(exported.read_bytes())
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["vocabulary"]) == WORDS
    assert (about["image_size"], about["resize"], about["interpolation"]) == ("64", "73", "bilinear")
    [images] = session.get_inputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [3, SIZE, SIZE])
    assert isinstance(images.shape[0], str)
    assert [path.name for path in model.glob("model.onnx*")] == ["model.onnx"]


def documented_use() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "models" / "README.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if "onnxruntime" in block]
    return code


def test_the_documented_use_gives_the_captions_words(model, exported, tmp_path, monkeypatch, capsys):
    code = documented_use()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((180, 100)).save(tmp_path / "photo.jpg")
    (tmp_path / "model.onnx").write_bytes(exported.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.split() == words_of_photo(model)


def words_of_photo(model: Path, reduce_to: int | None = None) -> list[str]:
    encoder, decoder, vocabulary, _ = load_model(model)
    transform = build_transform(False, SIZE, normalize=False, reduce_to=reduce_to)
    with torch.no_grad():
        [caption] = greedy(decoder, encoder(transform(read_image("photo.jpg"))[None]), max_length=LENGTH)
    return vocabulary.tokens(caption.tokens)


def test_the_documented_use_reduces_images_as_the_model_does(model, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    onnx_model = onnx.load(exported)
    [entry] = [entry for entry in onnx_model.metadata_props if entry.key == "reduce_to"]
    assert entry.value == "null"
    entry.value = "16"
    onnx.save(onnx_model, "model.onnx")
    for seed in range(100):
        draw_noise(seed, (180, 100)).save("photo.jpg", quality=100)
        if words_of_photo(model, 16) != words_of_photo(model):
            break
    exec(documented_use(), {})
    assert capsys.readouterr().out.split() == words_of_photo(model, 16)
    assert words_of_photo(model, 16) != words_of_photo(model)


def test_what_does_not_go_with_an_export_is_one_sentence(model, tmp_path, image_path, monkeypatch):
    path = tmp_path / "model.onnx"
    for images, how in (((image_path,), Decoding()), ((), Decoding(beam_size=3))):
        with pytest.raises(InputError, match="--export takes one --model"):
            caption.main(images, how, model=(model,), export=path)
    for option in ({"json_": True}, {"recursive": True}, {"strict": True}, {"sheet": path}, {"output": path}):
        with pytest.raises(InputError, match="no other option"):
            caption.main((), Decoding(), model=(model,), export=path, **option)
    for max_length in (0, 10**9):
        with pytest.raises(InputError, match=f"max_length is {max_length}"):
            export_onnx(model, path, max_length=max_length)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/model.onnx cannot be written"):
        export_onnx(model, tmp_path / "file" / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"--export needs onnxscript, which is missing: pip install"):
        export_onnx(model, path)
    assert not path.exists()


def test_a_backbone_that_cannot_be_exported_is_one_sentence(model, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    sentence = (
        r"with the backbone \S+ and the decoder \w+, cannot be exported to ONNX \(RuntimeError\); "
        r"train a model with another --backbone or --decoder"
    )
    with pytest.raises(InputError, match=sentence):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# Nothing leaves the machine: from 1.32 on, onnxruntime writes an id and contacts a server as it is imported


def test_whatever_imports_onnxruntime_has_switched_its_telemetry_off():
    sources = [path for path in ROOT.rglob("*") if path.suffix in (".py", ".ipynb", ".md")]
    texts = {path: path.read_text() for path in sources if not {".venv", "cache", "data"} & set(path.parts)}
    importing = [
        path for path, text in texts.items() if re.search(r"^ *\W*(import|from) onnxruntime", text, re.MULTILINE)
    ]
    assert ROOT / "models" / "README.md" in importing
    for path in importing:
        if path != Path(__file__):  # conftest.py, which comes first, has done it
            assert "ORT_DISABLE_TELEMETRY" in re.split("(?:import|from) onnxruntime", texts[path])[0], path


def test_the_library_imports_no_onnxruntime_and_the_documented_import_of_it_leaves_no_trace(tmp_path: Path):
    documented = documented_use()
    end = documented.index("import onnxruntime") + len("import onnxruntime")
    code = "\n".join(
        [
            "import sys, model, caption, captioning.export",
            "assert 'onnxruntime' not in sys.modules",
            documented[:end],
            "assert 'onnxruntime' in sys.modules",
        ]
    )
    run_code(code, ORT_DISABLE_TELEMETRY=None, TMPDIR=str(tmp_path))
    assert not list(tmp_path.rglob(".ses"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_imports_onnxruntime_opens_no_socket(sockets: Callable[[], set[str]]):
    assert sockets() == set()
