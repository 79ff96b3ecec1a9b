"""Several processes train, caption and evaluate as one does, and end together; here they compute on the CPU."""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore
from torchvision.models.resnet import Bottleneck, ResNet

import errors
import model
from checkpoint import read_description
from features import BATCH
from model import read_state_dict
from train import TrainingConfig, read_log, share, train

ROOT = Path(__file__).parents[1]
Make = Callable[..., TrainingConfig]


def build_tiny(**_: object) -> ResNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4)


def run_process(rank: int, processes: int, port: int, output: Path, run: Callable, arguments: tuple) -> None:
    """What a launched process runs: `run`, as a command does, with what it prints in files."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    model.resnet50 = build_tiny
    errors.run_command(lambda: run(*arguments))


class Launch:
    """Processes that were started together as `torchrun` starts them, but within milliseconds."""

    def __init__(self, output: Path, processes: int, run: Callable, *arguments: object):
        output.mkdir(exist_ok=True)
        self.output = output
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the launcher's
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train", "caption", "evaluate"])
        self.processes: list[BaseProcess] = [
            context.Process(target=run_process, args=(i, processes, self.store.port, output, run, arguments))
            for i in range(processes)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """The exit codes, once all have ended."""
        for process in self.processes:
            process.join(120)
            assert process.exitcode is not None, "it hangs"
        return [process.exitcode for process in self.processes]

    def said(self, name: str) -> str:
        """What all of them printed, the main one first."""
        return "".join((self.output / f"{i}.{name}").read_text() for i in range(len(self.processes)))


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Launch]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return lambda *arguments: Launch(tmp_path / "output", *arguments)


@pytest.fixture
def config(small: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    monkeypatch.setattr(model, "resnet50", build_tiny)

    def make(**fields: object) -> TrainingConfig:
        return small(**{"weights": "pretrained", "image_size": 32, "cache": tmp_path / "cache", **fields})

    return make


def on_one_thread(config: TrainingConfig) -> Path:
    """Train here, as a launched process computes."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return train(config)
    finally:
        torch.set_num_threads(threads)


def weights(folder: Path, epoch: int) -> dict[str, torch.Tensor]:
    return {**read_state_dict(folder / f"encoder-{epoch}.pkl"), **read_state_dict(folder / f"decoder-{epoch}.pkl")}


def assert_alike(one: Path, other: Path, epoch: int) -> None:
    """The same loss at every step, the same weights after an epoch, the same captions."""
    a, b = (read_log(folder / "training_log.txt") for folder in (one, other))
    assert a[:, :2].tolist() == b[:, :2].tolist()
    assert np.abs(a[:, 2] - b[:, 2]).max() <= 1.01e-4  # as written, with four digits
    a, b = weights(one, epoch), weights(other, epoch)
    assert max((a[key] - b[key]).abs().max() for key in a if a[key].is_floating_point()) < 1e-3
    a, b = read_description(one).epochs[epoch - 1], read_description(other).epochs[epoch - 1]
    assert a["captions"] == b["captions"]
    assert a == {name: value if isinstance(value, dict | int) else pytest.approx(value) for name, value in b.items()}


# Which process learns what


@pytest.mark.parametrize("whole_photos", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_each_caption_is_one_process_s(processes: int, whole_photos: bool):
    rng = np.random.default_rng(0)
    photo = rng.integers(20, size=100)
    batch = rng.permutation(100)[:33]
    shares = [share(batch, photo, rank, processes, whole_photos) for rank in range(processes)]
    assert sorted(np.concatenate(shares)) == sorted(batch)
    if whole_photos:
        owners = [set(photo[mine]) for mine in shares]
        assert sum(map(len, owners)) == len(set(photo[batch]))
    else:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# The same training


@pytest.mark.parametrize(
    ("processes", "fields"),
    [
        (2, {"num_epochs": 2}),
        (3, {"decoder": "attention", "views": 2, "batch_size": 10}),
        (2, {"fine_tune": 2}),
    ],
    ids=str,
)
def test_several_processes_train_as_one(config: Make, launch: Callable, processes: int, fields: dict, tmp_path: Path):
    one = on_one_thread(config(**fields, name="one", cache=tmp_path / "other"))
    settings = config(**fields, name="several")
    several = launch(processes, train, settings)
    assert several.wait() == [0] * processes, several.said("err")
    assert_alike(one, settings.models / "several", settings.num_epochs)
    lines = several.said("out").splitlines()
    assert len(lines) == 1 + 2 * settings.num_epochs  # not once a process
    assert f"{processes} process(es)" in lines[0]
    stores = [sorted((tmp_path / cache / "features").glob("*/features.npy")) for cache in ("other", "cache")]
    assert [path.parent.name for path in stores[0]] == [path.parent.name for path in stores[1]]
    for a, b in zip(*stores, strict=True):
        assert a.read_bytes() == b.read_bytes()
        found = [np.fromfile(path, "<i8").tolist() for path in sorted(b.parent.glob("done-*"))]
        assert len(found) == processes
        assert sorted(start for done in found for start in done) == [*range(0, len(np.load(b)), BATCH)]


def test_a_notebook_launches_several_processes(config: Make, tmp_path: Path):
    one = on_one_thread(config(name="one", cache=tmp_path / "other"))
    settings = config(name="several")
    (tmp_path / "config").write_bytes(pickle.dumps(settings))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    cells = f"""
import pickle, model, test_distributed
from accelerate import notebook_launcher
from train import train
model.resnet50 = test_distributed.build_tiny
config = pickle.load(open("config", "rb"))
notebook_launcher(train, (config,), num_processes=2, use_port="{port}")
print("and goes on")
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    notebook = subprocess.run(
        [sys.executable, "-c", cells], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert notebook.returncode == 0, notebook.stderr
    assert "2 process(es)" in notebook.stdout
    assert notebook.stdout.splitlines()[-1] == "and goes on"
    assert_alike(one, settings.models / "several", settings.num_epochs)
