"""How commands end: at pipes, at a standard output that fails, at paths that are too long."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from conftest import ROOT, run_script

from captioning.annotations import read_annotations
from captioning.checkpoint import read_description
from captioning.config import read_recipe
from captioning.errors import InputError, describe_network_error, quoted, warn_once
from captioning.metrics import read_references, score_results
from captioning.reports import Report
from captioning.shards import read_samples
from vocabulary import Vocabulary


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "read",
    [
        Vocabulary.load,
        read_recipe,
        lambda path: read_description(path.parent),
        lambda path: score_results(path.parent / "references.json", path),
        lambda path: read_annotations(path, path.parent / "cache"),
        read_references,
        lambda path: list(read_samples(path, Report())),
    ],
    ids=["vocabulary", "recipe", "description", "results", "annotations", "references", "tar"],
)
def test_a_pipe_is_refused_and_not_waited_for(read: Callable[[Path], object], tmp_path: Path):
    references = {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}
    (tmp_path / "references.json").write_text(json.dumps(references))
    os.mkfifo(tmp_path / "captioner.json")
    with pytest.raises(InputError, match=r"captioner\.json is not a regular file"):
        read(tmp_path / "captioner.json")


# The end of a command


PRINTS = "from captioning.errors import run_command\nrun_command(lambda: print('a caption\\n' * 100_000))"


@pytest.mark.parametrize(
    ("redirection", "code", "sentence"),
    [
        ("| head -c 1 >/dev/null; exit ${PIPESTATUS[0]}", 1, ""),
        ("> /dev/full", 2, "error: standard output cannot be written (No space left on device).\n"),
        (">&-", 0, ""),
        ("> out", 2, "error: standard output cannot be written (File too large).\n"),
    ],
    ids=["a reader that has seen enough", "a full disk", "no standard output", "a limit on file sizes"],
)
def test_standard_output_that_fails_ends_no_command_in_a_traceback(
    redirection: str, code: int, sentence: str, tmp_path: Path
):
    limit = f'cd "{tmp_path}"; ulimit -f 100;' if redirection == "> out" else ""
    command = f'{limit} PYTHONPATH="{ROOT}" "{sys.executable}" -c "$0" {redirection}'
    done = subprocess.run(["bash", "-c", command, PRINTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, sentence)


def test_messages_to_a_closed_standard_error_do_not_reach_another_file(tmp_path: Path):
    script = """from captioning.errors import log, run_command, warn_once
def main():
    file = open("out", "w")
    log("a line")
    warn_once("a warning")
    print("a caption")
run_command(main)"""
    command = f'"{sys.executable}" -c "$0" 2>&-'
    done = subprocess.run(
        ["bash", "-c", command, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "a caption\n")
    assert (tmp_path / "out").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["train.py --name", "scenes.py", "download.py coco --root", "download.py weights --to"]
)
def test_a_path_longer_than_the_systems_is_a_sentence(name: str, tmp_path: Path):
    (tmp_path / "models").mkdir()
    command, *options = name.split()
    done = run_script(command, *options, "n" * 300, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "n" * 300 in re.sub(r"\s", "", done.stderr)


@pytest.mark.parametrize(
    ("error", "cause", "text"),
    [
        (RuntimeError("no link"), socket.gaierror(-2, "Name or service not known"), "no network"),
        (URLError(socket.gaierror(-3, "Temporary failure in name resolution")), None, "no network"),
        (OSError("[Errno -2] Name or service not known"), None, "no network"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), None, "no network"),
        (URLError("no route to host"), None, "no route to host"),
        (RuntimeError("the server is busy.\nTry later."), ValueError("busy"), "the server is busy"),
        (TimeoutError(), None, "TimeoutError"),
    ],
)
def test_a_network_error_is_a_few_words(error: Exception, cause: Exception | None, text: str):
    error.__cause__ = cause
    assert describe_network_error(error) == text


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_gpu_without_memory_is_a_sentence(run_here: Callable, error: Exception):
    def fail() -> None:
        raise error

    code, _, errors = run_here("caption.py", fail)
    assert (code, errors.startswith("error: the GPU has too little free memory; ")) == (2, True)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("~/a", "/home/a"), ("--x=~/a", "/home/a"), ("~", "/home"), ("a~/b", "a~/b"), ("~a", "~a"), ("--x=~a", "--x=~a")],
)
def test_a_tilde_is_expanded_where_shells_leave_it(monkeypatch, run_here: Callable, argument: str, expected: str):
    monkeypatch.setenv("HOME", "/home")
    seen: list[str] = []
    run_here("caption.py", lambda: seen.append(sys.argv[1]), argument)
    assert seen[0].removeprefix("--x=" if expected.startswith("/") else "") == expected


@pytest.mark.parametrize("arguments", [[""], ["a", ""], ["--model", ""], ["--model="], ["a", "--max-length=", "3"]])
def test_an_empty_argument_is_no_path_of_the_current_folder(run_here: Callable, arguments: list[str]):
    code, _, errors = run_here("caption.py", lambda: pytest.fail("the command ran"), *arguments)
    assert (code, errors) == (2, "error: an argument is empty; give it a value, or leave it out.\n")
    assert run_here("caption.py", lambda: None, "a", "--x=y", "--", "-")[0] == 0


def test_a_command_to_paste_has_its_path_quoted(monkeypatch):
    assert quoted(Path("models/mine")) == "models/mine"
    assert quoted(Path("models/my photos")) == "'models/my photos'"
    monkeypatch.setattr(os, "name", "nt")
    assert quoted("models\\my photos") == '"models\\my photos"'


def test_a_warning_cannot_control_the_terminal(capsys: pytest.CaptureFixture):
    warn_once("evil\x1b[2J\x07.png cannot be read")
    assert capsys.readouterr().err == "warning: evil\\x1b[2J\\x07.png cannot be read\n"


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (MemoryError(), "error: there is too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: there is too little memory"),
        (PermissionError(13, "Permission denied", "a/x"), "error: a/x may not be accessed (Permission denied)"),
        (UnicodeEncodeError("latin-1", "写.jpg", 0, 1, ""), "error: this system's locale cannot write the path"),
    ],
    ids=repr,
)
def test_what_the_machine_refuses_is_a_sentence(
    raised: Exception, sentence: str, run_here: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")

    def fail() -> None:
        raise raised

    code, _, errors = run_here("train.py", fail)
    assert (code, errors.startswith(sentence), errors.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("command", ["caption", "download", "evaluate", "gradio_main", "importers", "scenes", "train"])
@pytest.mark.parametrize("ignored", [False, True], ids=["", "ignored"])
def test_ctrl_c_while_a_command_is_imported_prints_no_traceback(tmp_path: Path, command: str, ignored: bool):
    (tmp_path / "tyro.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError('ended')"
    )
    start = "import runpy, signal; " + "signal.signal(signal.SIGINT, signal.SIG_IGN); " * ignored
    start += f"runpy.run_path({f'{ROOT}/{command}.py'!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run([sys.executable, "-c", start], env=environment, capture_output=True, text=True)
    assert ("ended" in ended.stderr) == ignored
    assert ended.returncode == (1 if ignored else -signal.SIGINT)
    assert ignored or not ended.stderr
