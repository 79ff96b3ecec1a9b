"""What many tests share: a small drawn data set and a small model trained on it, both made once."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image
from torchvision.models.resnet import Bottleneck, ResNet

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before anything imports onnxruntime

from captioning.checkpoint import Description, save_epoch
from captioning.errors import run_command
from captioning.scenes import dataset
from captioning.training import TrainingConfig, train
from model import DECODERS, EncoderCNN

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

# Source of peak(), a process's own peak memory in bytes, for the scripts that tests run in another process. Linux's
# getrusage will not do: what it reports begins at the peak of the process that started this one.
PEAK = """
import resource, sys

def peak():
    if sys.platform == "linux":
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

"""


# A test with one of these trains, serves, exports or runs Java.
SLOW_FIXTURES = {"config", "memorized", "official_and_ours", "served", "stopped"}
MISSING = {
    "java": None if shutil.which("java") else "Java is not installed",
    "gpu": None if torch.cuda.is_available() else "there is no CUDA GPU",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their fixtures, and skip those whose Java runtime or GPU is missing."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "browser" in fixtures:
            item.add_marker("browser")
        if "official_and_ours" in fixtures:
            item.add_marker("java")
        if fixtures & SLOW_FIXTURES or item.get_closest_marker("java"):
            item.add_marker("slow")
        for marker, reason in MISSING.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """Two threads, shared among pytest's processes: more threads than cores make a small test ten times slower."""
    threads = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the commands that tests run


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, so that a data set is tokenized and seen once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set of 24, 8 and 8 pictures."""
    return dataset.draw_dataset(tmp_path_factory.mktemp("data") / "scenes", 24, 8, 8)


@pytest.fixture(scope="session")
def small_to_keep(drawn: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainingConfig]:
    """As `small`, for fixtures that many tests share: the folders stay until all tests have run."""

    def make(**fields: object) -> TrainingConfig:
        settings: dict[str, object] = {
            "data": drawn,
            "name": "small",
            "weights": "random",
            "fine_tune": 0,
            "image_size": 64,
            "embed_size": 16,
            "hidden_size": 32,
            "vocab_threshold": 2,
            "batch_size": 16,
            "num_epochs": 1,
            "warmup_steps": 2,
            "workers": 0,
            "precision": "fp32",
            "cache": cache,
        }
        if "models" not in fields:
            settings["models"] = tmp_path_factory.mktemp("models")
        return TrainingConfig(**{**settings, **fields})

    return make


@pytest.fixture
def small(small_to_keep: Callable[..., TrainingConfig]) -> Iterator[Callable[..., TrainingConfig]]:
    """Makes the configuration of a training that takes a second, in a new folder; any field can be given."""
    folders = []

    def make(**fields: object) -> TrainingConfig:
        config = small_to_keep(**fields)
        if "models" not in fields:
            folders.append(config.models)
        return config

    yield make
    for folder in folders:  # a ResNet-50 and two copies to resume from are 270 MB
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def trained(small_to_keep: Callable[..., TrainingConfig]) -> Path:
    """The folder of a model trained for two epochs; tests must not write into it."""
    return train(small_to_keep(num_epochs=2))


@pytest.fixture(scope="session")
def attending(small_to_keep: Callable[..., TrainingConfig]) -> Path:
    """As `trained`, with the attention decoder."""
    return train(small_to_keep(decoder="attention"))


def build_tiny(**_: object) -> ResNet:
    """In the place of ResNet-50 one with a block a stage, which is built and run 20 times as fast."""
    return ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4)


def build_seeded_tiny(**_: object) -> ResNet:
    """As `build_tiny`, with the same weights in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_tiny()


@pytest.fixture
def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ResNet]:
    """Puts `build_tiny` in the place of ResNet-50."""
    monkeypatch.setattr(torchvision.models, "resnet50", build_tiny)
    return build_tiny


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    """A photo of 80 x 60: red on the left, blue on the right."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, :40, 0] = pixels[:, 40:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real data beside the repository; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


Output = tuple[int, str, str]  # exit code, standard output and standard error


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Output]:
    """Runs a command in this process: `run_here("caption.py", main, *arguments)`."""

    def run(name: str, main: Callable[[], None], *arguments: object) -> Output:
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        code = 0
        try:
            run_command(main)
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return run


def run_script(name: str, *arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command of the project in another process."""
    return _run_python([ROOT / name, *arguments], cwd, environment)


def run_code(code: str, *arguments: object, cwd: Path = ROOT, **environment: str | None) -> subprocess.CompletedProcess:
    """Run Python code in another process, which must succeed; a variable that is None is removed."""
    done = _run_python(["-c", code, *arguments], cwd, environment)
    assert done.returncode == 0, done.stderr
    return done


def _run_python(
    arguments: list[object], cwd: Path, environment: Mapping[str, str | None]
) -> subprocess.CompletedProcess:
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )


class HTTPServer(ThreadingHTTPServer):
    """A server on a free port of 127.0.0.1, with a thread for each request; `stop` ends it."""

    request_queue_size = 64

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        handler.log_message = lambda *_: None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


KINDS = {f"{name}{', tied' * tied}": (name, tied) for name in DECODERS for tied in (False, True)}


def build_kind(kind: str, words: int, size: int = 16) -> tuple[EncoderCNN, nn.Module]:
    """Random networks of one of `KINDS`: each decoder, its weights tied and not; all sizes are `size`."""
    name, tied = KINDS[kind]
    decoder = DECODERS[name](size, size, words, num_layers=2)
    if tied:
        decoder.linear.weight = decoder.embed.weight
    return EncoderCNN(size, weights="random", grid=decoder.attends).eval(), decoder.eval()


def write_kind(folder: Path, kind: str, encoder: EncoderCNN, decoder: nn.Module, words: list[str]) -> Path:
    """Write the networks of `build_kind` as the model of a first epoch, for images of 64 x 64, in format 1."""
    size = encoder.embed.out_features
    sizes = {"embed_size": size, "hidden_size": size, "num_layers": 2, "dropout": 0}
    description = {
        "format": 1,
        "architecture": {"decoder": KINDS[kind][0], "backbone": "stored", **sizes},
        "preprocessing": {"image_size": 64},
        "vocabulary": words,
    }
    save_epoch(folder, 1, encoder, decoder, Description.model_validate(description))
    (folder / "captioner.json").write_text(json.dumps(description))
    return folder


def write_split(folder: Path, split: str, captions: dict[str, list[str]]) -> Path:
    """Write annotations in COCO's layout for photos by their file names; returns the annotation file."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    pairs = [(row, text) for row, texts in enumerate(captions.values()) for text in texts]
    content = {
        "images": [{"id": row + 1, "file_name": name} for row, name in enumerate(captions)],
        "annotations": [{"id": i, "image_id": row + 1, "caption": text} for i, (row, text) in enumerate(pairs)],
    }
    path = folder / "annotations" / f"captions_{split}.json"
    path.write_text(json.dumps(content))
    return path


def draw_noise(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """A picture of coloured squares that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


EIGHT = {
    "0.png": "a red dog runs on the beach.",
    "1.png": "two cats sleep on a sofa, side by side.",
    "2.png": "a man's boat floats in the harbor.",
    "3.png": "a plane flies.",
    "4.png": "people at a table with plates of food and a cake",
    "5.png": "a red dog sleeps on a sofa.",
    "6.png": "the woman is holding a yellow umbrella in the rain.",
    "7.png": "two kites fly over the beach.",
}


@pytest.fixture(scope="session")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures, each with one caption, which the training split repeats to make an epoch long."""
    folder = tmp_path_factory.mktemp("data") / "eight"
    for split, times in (("train", 100), ("val", 1)):
        write_split(folder, split, {name: [text] * times for name, text in EIGHT.items()})
        for seed, name in enumerate(EIGHT):
            draw_noise(seed).save(folder / "images" / split / name)
    return folder


@pytest.fixture(scope="session")
def memorize(
    eight: Path, small_to_keep: Callable[..., TrainingConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Trains a decoder to know the eight captions by heart, once for all tests of all of pytest's processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    @functools.cache
    def train_decoder(name: str) -> Path:
        config = small_to_keep(
            models=folder / "memorized",
            name=name,
            data=eight,
            decoder=name,
            vocab_threshold=1,
            embed_size=32,
            hidden_size=128,
            batch_size=8,
            num_epochs=6 if name == "transformer" else 3,
            learning_rate=3e-3,
            attention_penalty=0.0,
        )
        with filelock.FileLock(folder / f"memorized-{name}.lock"):
            trained = folder / "memorized" / name / "trained"
            if not trained.exists():
                train(config)
                trained.touch()
        return trained.parent

    return train_decoder


@pytest.fixture(scope="session", params=DECODERS)
def memorized(request: pytest.FixtureRequest, memorize: Callable[[str], Path]) -> Path:
    """The folder of a model of each decoder that knows the eight captions by heart; tests must not write into it."""
    return memorize(request.param)
