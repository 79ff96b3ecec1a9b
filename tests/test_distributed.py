"""Several processes train, caption and evaluate as one does, and end together; here they compute on the CPU."""

import json
import multiprocessing
import os
import pickle
import platform
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
import torchvision
import tyro
from conftest import build_seeded_tiny, draw_noise, run_code
from torch.distributed import TCPStore
from torch.nn.modules.batchnorm import _BatchNorm

import caption
import evaluate
import model
from captioning import bulk, distributed, errors, metrics
from captioning.backbones import count_stages
from captioning.batches import share
from captioning.checkpoint import read_description
from captioning.errors import InputError
from captioning.features import BATCH
from captioning.preparation import synchronize_batch_norms
from captioning.training import TrainingConfig, read_log, train
from captioning.weights import read_state_dict

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
Make = Callable[..., TrainingConfig]


def run_process(rank: int, processes: int, port: int, output: Path, run: Callable, arguments: tuple) -> None:
    """What a launched process runs: `run`, as a command does, with what it prints in files."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    torchvision.models.resnet50 = build_seeded_tiny
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

    def printed(self, name: str) -> str:
        """What all of them printed, the main one first."""
        return "".join((self.output / f"{i}.{name}").read_text() for i in range(len(self.processes)))


@pytest.fixture(scope="module")
def launch_in() -> Iterator[Callable[..., Launch]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield Launch


@pytest.fixture
def launch(tmp_path: Path, launch_in: Callable[..., Launch]) -> Callable[..., Launch]:
    return lambda *arguments: launch_in(tmp_path / "output", *arguments)


@pytest.fixture
def config(small: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    monkeypatch.setattr(torchvision.models, "resnet50", build_seeded_tiny)

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told so")
def test_freed_memory_serves_the_next_tensors():
    """The page faults of a tensor of 48,829 pages of 4 kB, after others of its size."""
    code = """if True:
        import resource, torch
        from captioning.distributed import this_process
        this_process()
        for _ in range(3):
            torch.ones(50_000_000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(50_000_000)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    assert int(run_code(code).stdout) < 1000


@pytest.mark.parametrize("whole_images", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_each_caption_is_one_process_s(processes: int, whole_images: bool):
    rng = np.random.default_rng(0)
    image_rows = rng.integers(20, size=100)
    batch = rng.permutation(100)[:33]
    shares = [share(batch, image_rows, rank, processes, whole_images) for rank in range(processes)]
    assert sorted(np.concatenate(shares)) == sorted(batch)
    if whole_images:
        owners = [set(image_rows[mine]) for mine in shares]
        assert sum(map(len, owners)) == len(set(image_rows[batch]))
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
    assert several.wait() == [0] * processes, several.printed("err")
    assert_alike(one, settings.models / "several", settings.num_epochs)
    lines = several.printed("out").splitlines()
    assert len(lines) == 1 + 2 * settings.num_epochs  # not once a process
    assert f"{processes} process(es)" in lines[0]
    stores = [sorted((tmp_path / cache / "features").glob("*/features.npy")) for cache in ("other", "cache")]
    assert [path.parent.name for path in stores[0]] == [path.parent.name for path in stores[1]]
    for a, b in zip(*stores, strict=True):
        assert a.read_bytes() == b.read_bytes()
        done_starts = [np.fromfile(path, "<i8").tolist() for path in sorted(b.parent.glob("done-*"))]
        assert len(done_starts) == processes
        assert sorted(start for done in done_starts for start in done) == [*range(0, len(np.load(b)), BATCH)]


def test_batch_norms_that_several_cpus_would_train_apart_are_refused(config: Make, launch: Callable):
    settings = config(fine_tune=5)
    refused = launch(2, train, settings)
    assert refused.wait() == [2, 2]
    assert re.fullmatch(
        r"error: --fine-tune 5 trains batch norms, .* on GPUs only; use one process or a smaller --fine-tune\.\n",
        refused.printed("err"),
    )
    assert not (settings.models / settings.name).exists()


@pytest.mark.parametrize(("name", "count"), [("resnet50", 17), ("tf_efficientnet_lite0", 49), ("resnet18", 20)])
def test_on_gpus_batch_norms_share_their_statistics(config: Make, name: str, count: int):
    encoder = model.EncoderCNN(8, name, weights="random", fine_tune=count_stages(name))
    images = torch.randn(2, 3, 64, 64)
    expected = encoder.eval()(images)
    names = list(encoder.state_dict())
    gpus = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
    synchronize_batch_norms(encoder, gpus)
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == count
    assert all(isinstance(module, torch.nn.SyncBatchNorm) for module in norms)
    assert list(encoder.state_dict()) == names
    torch.testing.assert_close(encoder.eval()(images), expected)  # their activations are still there
    frozen = model.EncoderCNN(8, name, weights="random", fine_tune=2)
    synchronize_batch_norms(frozen, gpus)
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in frozen.modules())


def test_a_notebook_launches_several_processes(config: Make, tmp_path: Path):
    one = on_one_thread(config(name="one", cache=tmp_path / "other"))
    settings = config(name="several")
    (tmp_path / "config").write_bytes(pickle.dumps(settings))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    cells = f"""
import conftest, pickle, test_distributed, torchvision
from accelerate import notebook_launcher
from train import train
torchvision.models.resnet50 = conftest.build_seeded_tiny
config = pickle.load(open("config", "rb"))
notebook_launcher(train, (config,), num_processes=2, use_port="{port}")
print("and goes on")
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    notebook = run_code(cells, cwd=tmp_path, PYTHONPATH=paths, OMP_NUM_THREADS="1")
    assert "2 process(es)" in notebook.stdout
    assert notebook.stdout.splitlines()[-1] == "and goes on"
    assert_alike(one, settings.models / "several", settings.num_epochs)


# The same captions


def run_main(command: str, *arguments: object) -> None:
    """What a process of a launched command runs."""
    metrics._JAVA = ("no-java",)  # starting it takes seconds
    bulk.CHUNK = 2 * BATCH  # so that few photos are many
    sys.argv = [command, *map(str, arguments), "--workers", "0"]
    tyro.cli({"caption.py": caption.main, "evaluate.py": evaluate.main}[command])


def caption_and_kill(chunks: int, process: int, *arguments: object) -> None:
    """Caption; once so many chunks are written, a process is killed."""
    share, done = bulk._caption_share, []

    def counting(*given: object) -> list:
        done.append(given)
        if len(done) > chunks and os.environ["RANK"] == str(process):
            os.kill(os.getpid(), signal.SIGKILL)
        return share(*given)

    bulk._caption_share = counting
    run_main("caption.py", *arguments)


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures for five batches and a half; a whole batch of them, and another one, cannot be read."""
    folder = tmp_path_factory.mktemp("album")
    for i in range(5 * BATCH + BATCH // 2):
        draw_noise(i).save(folder / f"{i:04}.png")
    for i in (3, *range(BATCH, 2 * BATCH)):
        (folder / f"{i:04}.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def tiny(small_to_keep: Make) -> Iterator[Path]:
    """A trained model with the small backbone that the launched processes have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet50", build_seeded_tiny)
        yield train(small_to_keep(num_epochs=2, image_size=32))


@pytest.fixture(scope="module")
def captioned(album: Path, tiny: Path, launch_in: Callable, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The captions of the album as one process writes them, without stopping."""
    folder = tmp_path_factory.mktemp("captions")
    output = folder / "new" / "captions.jsonl"
    launched = launch_in(folder / "said", 1, run_main, "caption.py", album, "--model", tiny, "--output", output)
    assert launched.wait() == [2], launched.printed("err")
    assert os.listdir(output.parent) == ["captions.jsonl"]
    return output.read_bytes()


def test_every_image_has_its_row_in_order(album: Path, captioned: bytes):
    rows = [json.loads(line) for line in captioned.splitlines()]
    assert [row["photo"] for row in rows] == [*map(str, sorted(album.iterdir()))]
    assert [i for i, row in enumerate(rows) if "error" in row] == [3, *range(BATCH, 2 * BATCH)]
    assert all(set(row) == {"photo", "caption", "log_probability", "precision"} for row in rows if "error" not in row)
    assert "0003.png cannot be read as an image" in rows[3]["error"]


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_same_file(
    album: Path, tiny: Path, captioned: bytes, launch: Callable, tmp_path: Path, processes: int
):
    output = tmp_path / "captions.jsonl"
    launched = launch(processes, run_main, "caption.py", album, "--model", tiny, "--output", output)
    assert launched.wait() == [2] * processes
    assert output.read_bytes() == captioned
    lines = launched.printed("err").splitlines()
    assert sum("cannot be read as an image" in line for line in lines) == BATCH + 1
    message = (
        f"error: {BATCH + 1} of {5 * BATCH + BATCH // 2} images could not be read; their rows in {output} say why."
    )
    assert message in lines
    assert f"{output}: {len(captioned.splitlines())} rows written, 0 were there" in lines
    assert f"{tiny}, backbone in {caption.Captioner.load(tiny).precision}" in lines
    assert len(lines) == BATCH + 4


def test_several_processes_draw_the_samples_of_one(album: Path, tiny: Path, launch: Callable, tmp_path: Path):
    files = [tmp_path / f"{processes}.jsonl" for processes in (1, 2)]
    for processes, output in enumerate(files, 1):
        options = ("--model", tiny, "--output", output, "--temperature", 1, "--seed", 3)
        assert launch(processes, run_main, "caption.py", album, *options).wait() == [2] * processes
    assert files[0].read_bytes() == files[1].read_bytes()
    captions = [json.loads(line).get("caption") for line in files[0].read_text().splitlines()]
    assert len(set(captions)) > len(captions) / 2


@pytest.mark.parametrize("process", [0, 1])
def test_captioning_that_was_killed_goes_on_with_another_number_of_processes(
    album: Path, tiny: Path, captioned: bytes, launch: Callable, tmp_path: Path, process: int
):
    output = tmp_path / "captions.jsonl"
    arguments = (album, "--model", tiny, "--output", output)
    killed = launch(2, caption_and_kill, 1, process, *arguments)
    assert killed.wait()[process] == -signal.SIGKILL
    rows = output.read_bytes()
    assert len(rows.splitlines()) == 4 * BATCH
    assert captioned.startswith(rows)
    torn = rows[: rows.index(b"\n", len(rows) // 2) + 30]  # as a kill in the middle of writing leaves it
    output.write_bytes(torn)
    file = output.stat().st_ino
    resumed = launch(1, run_main, "caption.py", *arguments)
    assert resumed.wait() == [2], resumed.printed("err")
    assert output.read_bytes() == captioned
    assert output.stat().st_ino == file  # continued, not replaced


def test_what_is_not_these_captions_is_left_as_it_is(album: Path, tiny: Path, captioned: bytes, tmp_path: Path):
    captioner, how = caption.Captioner.load(tiny), caption.Decoding().with_defaults()
    output = tmp_path / "captions.jsonl"
    lines = captioned.splitlines(keepends=True)
    other = {**json.loads(lines[-1]), "caption": "of another model"}
    for content, sentence in (
        (b"a text of mine", r"captions\.jsonl, line 1 does not belong to .*0000\.png; "),
        (b"".join([*lines[:5], *lines[6:9]]), r"line 6 does not belong to .*0005\.png; "),
        (captioned + lines[0], r"does not belong to any of the images; "),
        (captioned + b"\n", r"line \d+ is empty; delete this line to resume"),
        (b"".join([*lines[:-1], json.dumps(other).encode() + b"\n"]), r"holds other captions .* example of .*\.png; "),
    ):
        output.write_bytes(content)
        with pytest.raises(errors.InputError, match=sentence):
            caption.write_captions(captioner, [album], how, output)
        assert output.read_bytes() == content
    assert os.listdir(tmp_path) == ["captions.jsonl"]
    output.write_bytes(captioned)  # complete: nothing is left to do
    assert caption.write_captions(captioner, [album], how, output) == (len(lines), BATCH + 1)
    assert output.read_bytes() == captioned


def test_captions_are_written_by_one_run_at_a_time(album: Path, tiny: Path, tmp_path: Path):
    output = tmp_path / "captions.jsonl"
    with (
        filelock.FileLock(tmp_path / ".captions.jsonl.lock"),
        pytest.raises(errors.InputError, match=r"is being written by another process"),
    ):
        caption.write_captions(caption.Captioner.load(tiny), [album], caption.Decoding(), output)


def test_the_lock_of_a_file_is_deleted_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found: list[bool] = []
    release = filelock.FileLock.release

    def note(lock: filelock.FileLock, force: bool = False) -> None:
        found.append(os.path.exists(lock.lock_file))
        release(lock, force)

    monkeypatch.setattr(filelock.FileLock, "release", note)
    with bulk.lock_output(tmp_path / "captions.jsonl"):
        assert os.listdir(tmp_path) == [".captions.jsonl.lock"]
    assert found[0] is False


def test_several_processes_need_a_file_and_a_drawing_its_seed(album: Path, tiny: Path, launch: Callable):
    for arguments, sentence in (
        ((), "add --output"),
        (("--output", "x.jsonl", "--json"), "--output cannot be combined with --json"),
        (("--output", "x.jsonl", "--temperature", 1), "needs a --seed"),
    ):
        launched = launch(2, run_main, "caption.py", album, "--model", tiny, *arguments)
        assert launched.wait() == [2, 2]
        assert re.fullmatch(rf"error: .*{sentence}.*\n", launched.printed("err"))


def test_several_processes_evaluate_as_one(tiny: Path, drawn: Path, launch: Callable, tmp_path: Path):
    documents, results = [], []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.json"
        arguments = ("--model", tiny, "--data", drawn, "--split", "train", "--results", path, "--json")
        launched = launch(processes, run_main, "evaluate.py", *arguments)
        assert launched.wait() == [0] * processes, launched.printed("err")
        documents.append(json.loads(launched.printed("out")))
        results.append(path.read_bytes())
    assert results[0] == results[1]
    assert len(json.loads(results[0])) == 24
    for document in documents:
        assert document.pop("photos_per_second") > 0
    assert documents[0] == documents[1]
    assert documents[0]["CIDEr"] > 0


def test_more_processes_than_gpus_are_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"2 processes were launched on a machine with 1 GPU\(s\); launch one per GPU"):
        distributed.this_process()


def test_settings_of_accelerate_for_other_ways_of_training_are_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="settings of accelerate choose FSDP, which is not supported; launch with"):
        distributed.require_data_parallel()
