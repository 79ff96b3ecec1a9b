"""Backbones in 8-bit integers: `--precision int8`."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
import tyro
from conftest import ROOT, build_seeded_tiny, run_script
from torch.nn.functional import cosine_similarity

import caption
from captioning import quantization
from captioning.backbones import preprocessing_of
from captioning.captioner import Captioner, _choose_precision
from captioning.errors import InputError
from captioning.images import ImageDataset, build_transform
from captioning.quantization import QuantizedBackbone, quantize
from model import EncoderCNN

pytestmark = pytest.mark.slow

LITE = "tf_efficientnet_lite2"
SIZE = 128


@pytest.fixture(scope="module")
def images(drawn: Path) -> torch.Tensor:
    """Forty drawn images, on which no range was measured, as uint8."""
    transform = build_transform(image_size=SIZE, normalize=False)
    data = ImageDataset(sorted((drawn / "images").glob("*/*.jpg")), transform)
    return torch.stack([data[i] for i in range(len(data))])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the tests of one backbone."""
    return tmp_path_factory.mktemp("cache")


def lite(**fields: object) -> EncoderCNN:
    return EncoderCNN(8, LITE, **fields).eval().for_inference(torch.float32)


@pytest.mark.parametrize("grid", [False, True])
def test_the_features_are_nearly_those_of_float32(images: torch.Tensor, store: Path, grid: bool):
    plain, preprocessing = lite(grid=grid), preprocessing_of(LITE, SIZE)
    quantized = quantize(lite(grid=grid), preprocessing, store)
    with torch.inference_mode():
        expected, features = plain.features(images), quantized.features(images)
    assert features.shape == expected.shape
    assert not torch.equal(features, expected)
    assert cosine_similarity(features, expected, dim=-1).mean() > (0.9 if quantization.sums_overflow() else 0.95)
    centred = cosine_similarity(features - expected.mean(0), expected - expected.mean(0), dim=-1)
    assert centred.mean() > 0.85, "what differs from image to image is lost"


def test_waiting_threads_leave_the_processor_to_the_decoder(store: Path):
    session = quantize(lite(), preprocessing_of(LITE, SIZE), store).network.session
    assert session.get_session_options().get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_an_image_has_the_same_features_in_any_batch(images: torch.Tensor, store: Path):
    quantized = quantize(lite(), preprocessing_of(LITE, SIZE), store)
    together = quantized.features(images)
    torch.testing.assert_close(torch.cat([quantized.features(image[None]) for image in images]), together)


@pytest.mark.parametrize("backbone", ["resnet50", "test_vit"])
def test_other_families_are_quantized_too(backbone: str, tiny_backbone: Callable, tmp_path: Path):
    torch.manual_seed(0)
    encoder = EncoderCNN(8, backbone, weights="random", grid=True).eval().for_inference(torch.float32)
    preprocessing = preprocessing_of(backbone)
    noise = torch.randint(0, 256, (2, 3, preprocessing.image_size, preprocessing.image_size), dtype=torch.uint8)
    expected = encoder.features(noise)
    features = quantize(encoder, preprocessing, tmp_path).features(noise)
    assert features.shape == expected.shape
    assert cosine_similarity(features, expected, dim=-1).mean() > 0.95


def test_the_quantized_backbone_is_cached_and_a_damaged_one_is_made_again(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torchvision.models, "resnet50", build_seeded_tiny)

    def quantized_features() -> torch.Tensor:
        encoder = EncoderCNN(8, weights="random").eval().for_inference(torch.float32)
        return quantize(encoder, preprocessing_of("resnet50", SIZE), tmp_path).features(images)

    features = quantized_features()
    (file,) = tmp_path.rglob("*.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "_quantize", lambda *_: pytest.fail("it was not taken from the cache"))
        torch.testing.assert_close(quantized_features(), features)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    torch.testing.assert_close(quantized_features(), features)
    assert file.read_bytes() == whole


def test_another_backbone_input_size_or_processor_is_quantized_again(monkeypatch: pytest.MonkeyPatch):
    encoder = lite()
    keys = {quantization._key(encoder, preprocessing_of(LITE, size), "1") for size in (96, SIZE)}
    encoder.network.conv_stem.weight.data += 1
    keys.add(quantization._key(encoder, preprocessing_of(LITE, SIZE), "1"))
    keys.add(quantization._key(encoder, preprocessing_of(LITE, SIZE, reduce_to=100), "1"))
    for can in ({"avx2": True}, {"avx2": True, "avx_vnni": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda can=can: can)
        keys.add(quantization._key(encoder, preprocessing_of(LITE, SIZE), "1"))
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("can", "overflow"),
    [
        ({"avx2": True}, True),
        ({"avx2": True, "avx512_vnni": True}, False),
        ({"avx2": True, "avx_vnni": True}, False),
        ({"neon": True}, False),
    ],
)
def test_weights_have_7_bits_where_sums_would_overflow(can: dict, overflow: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert quantization.sums_overflow() == overflow


def test_without_the_images_that_the_ranges_are_measured_on_it_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(quantization, "IMAGES", tmp_path)
    with pytest.raises(InputError, match="--precision int8 needs the photos of"):
        quantize(lite(), preprocessing_of(LITE, SIZE), tmp_path)


def test_a_command_captions_with_it_says_so_and_tells_nobody(tmp_path: Path):
    options = ("--model", "models/photos", "--precision", "int8", "--json")
    done = run_script("caption.py", "images/cat.jpg", *options, ORT_DISABLE_TELEMETRY="", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "cat" in json.loads(done.stdout)[0]["caption"]
    assert not list(tmp_path.rglob(".ses")), "onnxruntime's telemetry was on"
    captioner = Captioner.load(ROOT / "models" / "photos", precision="int8")
    assert captioner.precision == "int8"
    assert isinstance(captioner.encoder.network, QuantizedBackbone)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_what_is_missing_is_a_sentence(missing: str, monkeypatch: pytest.MonkeyPatch, run_here: Callable):
    real = builtins.__import__

    def without(name: str, *rest: object, **others: object) -> object:
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **others)  # pyright: ignore

    monkeypatch.setattr(builtins, "__import__", without)
    main = lambda: tyro.cli(caption.main)  # noqa: E731
    code, _, err = run_here("caption.py", main, "images/cat.jpg", "--model", "models/photos", "--precision", "int8")
    assert code == 2
    assert f"--precision int8 needs {missing}, which is missing: pip install" in err


def test_a_backbone_that_cannot_be_exported_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no such operator")))
    with pytest.raises(InputError, match=f"{LITE} cannot be exported to ONNX, which --precision int8 needs"):
        quantize(lite(), preprocessing_of(LITE, SIZE), tmp_path)
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize("kind", ["OSError", "DecodeError"])
def test_a_full_temporary_folder_is_a_sentence(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    message = pytest.importorskip("google.protobuf.message")
    error = message.DecodeError("corrupt") if kind == "DecodeError" else OSError(28, "No space left on device")

    def fail(*_: object, **_options: object) -> None:
        raise error

    where = "torch.onnx.export" if isinstance(error, OSError) else "captioning.quantization._export"
    monkeypatch.setattr(where, fail)
    encoder = EncoderCNN(8, LITE, weights="random").eval().for_inference(torch.float32)
    with pytest.raises(InputError, match=r"^the temporary folder .* set TMPDIR to one with 500 MB"):
        quantize(encoder, preprocessing_of(LITE), tmp_path)


def test_a_gpu_does_not_compute_in_8_bit_integers():
    with pytest.raises(InputError, match="int8 is computed on CPUs only"):
        _choose_precision("int8", torch.device("cuda"))


def test_auto_is_never_int8():
    assert _choose_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
