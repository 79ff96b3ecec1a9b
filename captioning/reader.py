"""Read untrusted files in separate processes.

A malicious file may take minutes or gigabytes to decode, and a thread that decodes it cannot be stopped.
A process can: it is killed after a time limit, its memory is limited, and it ends with the server.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from captioning.backbones import Preprocessing
from captioning.errors import InputError
from captioning.image_formats import HEIF_SUFFIXES, image_suffixes
from captioning.images import build_pixel_transform, read_image, resized_sides

MAX_MEMORY = 2 << 30  # memory limit of a process's data, in bytes
START_SECONDS = 120  # time limit for starting a process


class Reader:
    """A pool of processes: `reader(function, arguments, seconds)` returns the function's result.

    The function must be at module level, its arguments and result picklable. Raises `InputError` where the
    function does, or where it takes more than `seconds` or `MAX_MEMORY`.
    """

    def __init__(self, processes: int = 2):
        self.processes = [_Process() for _ in range(processes)]
        self.idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self.processes:
            self.idle.put(process)

    def __call__(self, function: Callable, arguments: tuple, seconds: float) -> Any:
        """Call a function in the first process that is idle."""
        process = self.idle.get()
        try:
            return process.call(function, arguments, seconds)
        finally:
            self.idle.put(process)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self.processes:
            process.close()


class _Process:
    def __init__(self):
        self.lock, self.closed = threading.Lock(), False
        self._start()

    def _start(self) -> None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from captioning.reader import serve; serve()"
        self.popen = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, function: Callable, arguments: tuple, seconds: float) -> Any:
        with self.lock:  # a call during `close` must not restart the process
            if self.closed:
                raise InputError("The server is being stopped; try again later.")
            if self.popen.poll() is not None:
                self._start()
        assert self.popen.stdin is not None
        try:
            pickle.dump((function, arguments), self.popen.stdin)
            self.popen.stdin.flush()
            self._receive(START_SECONDS)
            result = self._receive(seconds)
        except (EOFError, OSError, pickle.UnpicklingError):  # the process was killed
            self.stop()
            raise InputError("This file takes too much time or memory to read; make it smaller.") from None
        if isinstance(result, InputError):
            raise result
        return result

    def _receive(self, seconds: float) -> Any:
        assert self.popen.stdout is not None
        timer = threading.Timer(seconds, self.popen.kill)
        timer.start()
        try:
            return pickle.load(self.popen.stdout)
        finally:
            timer.cancel()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.stop()

    def stop(self) -> None:
        self.popen.kill()
        self.popen.wait()


def serve() -> None:
    """Answer a `Reader` through standard input and output until it closes them.

    There are two answers to a call: None when it begins, then its result.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides what an interruption means
    with suppress(ImportError, OSError, ValueError):  # the system does not have this limit
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(None, answers)
        answers.flush()
        try:
            result = function(*arguments)
        except InputError as error:
            result = error
        except MemoryError:
            result = InputError("This file takes too much memory to read; make it smaller.")
        except Exception as error:  # the process goes on
            result = InputError(f"This file cannot be read ({type(error).__name__}).")
        pickle.dump(result, answers)
        answers.flush()


def prepare_image(
    path: Path, name: str, preprocessing: Preprocessing, view_size: int
) -> tuple[Image.Image, Image.Image]:
    """Read an image; returns it resized for a model, and what the model sees of it, a square of `view_size` pixels.

    Raises `InputError`, in which the file is called `name`, where it cannot be read.
    """
    transform = build_pixel_transform(preprocessing)
    if not os.path.exists(path):  # unlike Path.exists, also False for a path of any length
        raise InputError(f"{name} is no longer on the server; upload it again.")
    try:
        image = read_image(path, **resized_sides(transform))
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from None
    resize = transform.transforms[0]
    return resize(image), preprocessing.view(image, view_size)


def unpack_images(
    path: Path, folder: Path, max_images: int, max_bytes: int
) -> tuple[list[tuple[str, Path | InputError]], int]:
    """Unpack the images of a zip file into a folder; returns the name of each with its path or error.

    A zip file that cannot be read is returned like an image that cannot be read. Also returns the number of other
    files, without hidden ones, which are left out. Raises `InputError` where the zip file is missing, has more than
    `max_images` images, or more than `max_bytes` in all of them.
    """
    images: list[tuple[str, Path | InputError]] = []
    suffixes = image_suffixes() | HEIF_SUFFIXES
    if not os.path.exists(path):
        raise InputError(f"{path.name} is no longer on the server; upload it again.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [PurePosixPath(_name_in_zip(info)) for info in archive.infolist()]
            files = [
                (name, info)
                for name, info in zip(names, archive.infolist(), strict=True)
                if not info.is_dir() and not name.name.startswith("._") and "__MACOSX" not in name.parts
            ]
            members = [(name, info) for name, info in files if name.suffix.lower() in suffixes]
            if len(members) > max_images:
                raise InputError(f"{path.name} holds {len(members):,} photos; send at most {max_images} at once.")
            if sum(info.file_size for _, info in members) > max_bytes:  # no member is read beyond its size
                raise InputError(f"The photos in {path.name} are more than {max_bytes >> 20} MB; send fewer at once.")
            for i, (name, info) in enumerate(members):
                target = folder / f"{i:04}{name.suffix.lower()}"
                try:
                    if info.flag_bits & 1:
                        raise ValueError("it is encrypted; send a zip file without a password")
                    target.write_bytes(archive.read(info))
                    images.append((str(name), target))
                except Exception as error:  # a broken archive makes its decoders raise nearly anything
                    images.append((str(name), InputError(f"{name} cannot be unpacked ({error}).")))
    except InputError:
        raise
    except Exception:
        return [(path.name, InputError(f"{path.name} is not a zip file that can be read; create it again."))], 0
    others = [name for name, _ in files if name.suffix.lower() not in suffixes and not name.name.startswith(".")]
    return images, len(others)


def _name_in_zip(info: zipfile.ZipInfo) -> str:
    """Return a member's name, which some archivers write as UTF-8 without saying so."""
    if info.flag_bits & 0x800:  # it is marked as UTF-8
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename
