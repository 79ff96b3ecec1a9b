"""User errors, warnings and command exit codes."""

from __future__ import annotations

import codecs
import errno
import functools
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta

# Control characters of ASCII and Latin-1, line and paragraph separators, bidirectional controls, and surrogates, which
# stand for bytes that cannot be decoded.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

EMPTY = re.compile(r"(--[\w-]+=)?")  # arguments without a value, which would name the current folder
HOME = re.compile(r"^(--[\w-]+=|)~(?=/|\\|$)")  # which shells expand only where it begins a word

# How Linux, macOS and Windows describe a host name that cannot be resolved, and a missing route.
OFFLINE = re.compile(
    r"Errno -[23]\b|Name or service not known|name resolution|nodename nor servname|getaddrinfo failed"
    r"|Network is unreachable"
)

# Why standard output cannot be written.
OUTPUT_ERRORS = {errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT}
CLOSED_PIPE = {errno.EPIPE, *([errno.EINVAL] if os.name == "nt" else [])}

# How PyTorch and CUDA's libraries describe a GPU without free memory, where they do not raise an OutOfMemoryError.
GPU_MEMORY_ERRORS = re.compile("CUDA error: out of memory|ALLOC_FAILED")


class InputError(ValueError):
    """A user's mistake; the message is one sentence that names the problem and the remedy."""


@functools.cache
def warn_once(message: str) -> None:
    """Print a warning on stderr; the same message is printed once."""
    print(printable(f"warning: {message}"), file=sys.stderr, flush=True)


def log(message: str) -> None:
    """Print a line on stderr, above the progress bar if there is one."""
    from tqdm.auto import tqdm  # here, as most modules import this one and need no progress bar

    tqdm.write(printable(message), file=sys.stderr)


def is_offline(error: BaseException) -> bool:
    """Return whether a request failed because its host name was not resolved or no network is reachable."""
    cause: BaseException | None = error
    while cause is not None:
        unreachable = isinstance(cause, OSError) and cause.errno == errno.ENETUNREACH
        if unreachable or isinstance(cause, socket.gaierror) or OFFLINE.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def describe_network_error(error: BaseException) -> str:
    """Describe in a few words why a request failed: "no network", or the first line of the error's text."""
    if is_offline(error):
        return "no network"
    return (str(getattr(error, "reason", error)).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def summarize_errors(errors: Iterable[InputError]) -> str:
    """Join the first ten errors into one sentence and count the others."""
    errors = list(errors)
    more = f"; and {len(errors) - 10} more" if len(errors) > 10 else ""
    return "; ".join(map(str, errors[:10])) + more


def quoted(path: object) -> str:
    """Quote a path so that a command which contains it can be pasted into a shell."""
    return shlex.quote(str(path)) if os.name != "nt" else f'"{path}"' if " " in str(path) else str(path)


def printable(text: str) -> str:
    """Escape control characters, so that file names and captions cannot control the terminal."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def run_command(main: Callable[[], object]) -> None:
    """Run a command line's `main`; a user's mistake becomes one sentence on stderr and exit code 2.

    Of several processes that were launched together, the first one to fail prints its error, and the others exit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # the commands' own, for the time of their imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stderr is None:  # it is closed, and libraries write to it
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is not None:  # a file name may contain characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv[1:] = [HOME.sub(lambda match: match[1] + os.path.expanduser("~"), each) for each in sys.argv[1:]]
    try:
        if any(map(EMPTY.fullmatch, sys.argv[1:])):
            raise InputError("an argument is empty; give it a value, or leave it out.")
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as error:
        _end(f"error: {error}", 2)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _end(f"error: {error.filename} is longer than a path may be; choose a shorter one.", 2)
        if isinstance(error, PermissionError) and error.filename is not None:
            _end(f"error: {error.filename} may not be accessed ({error.strerror}); change its permissions.", 2)
        if error.filename is not None or error.errno not in OUTPUT_ERRORS | CLOSED_PIPE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's own flush at exit does not fail as well
        if error.errno in CLOSED_PIPE:  # the reader, such as `head`, has closed the pipe
            sys.exit(1)
        _end(f"error: standard output cannot be written ({error.strerror}).", 2)
    except UnicodeEncodeError as error:
        encoding = codecs.lookup(error.encoding)
        if encoding != codecs.lookup(sys.getfilesystemencoding()) or encoding.name == "utf-8":
            raise
        _end(f"error: this system's locale cannot write the path {error.object!r:.200}; set PYTHONUTF8=1.", 2)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # numpy's or torch's
            _end("error: there is too little memory; end what else uses it, or use smaller batches or images.", 2)
        # torch's, which is not imported here, or CUDA's own
        if type(error).__name__ == "OutOfMemoryError" or re.search(GPU_MEMORY_ERRORS, str(error)):
            _end("error: the GPU has too little free memory; end what else uses it, or set CUDA_VISIBLE_DEVICES=-1.", 2)
        if not _count_ended(0):  # else it was raised while waiting for a process that has exited
            raise
        sys.exit(2)


def _end(message: str, code: int) -> None:
    """Exit with a code; the first process to end prints the message."""
    if _count_ended(1) <= 1:
        print(printable(message), file=sys.stderr, flush=True)
    sys.exit(code)


def _count_ended(more: int) -> int:
    """Add `more` to the number of launched processes that ended early, and return the sum; 0 for a single process.

    The number is kept in the rendezvous store, which belongs to the launcher.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", more)
    except (KeyError, RuntimeError):
        return 0
