"""The error of a user's mistake, warnings, and how a command ends."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta

# ASCII's and Latin-1's controls, line and paragraph separators, changes of direction, bytes that are no text
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """A user's mistake; the message is one sentence that names the problem and the remedy."""


@functools.cache
def warn_once(message: str) -> None:
    """Print a warning on stderr; the same message is printed once."""
    print(printable(f"warning: {message}"), file=sys.stderr, flush=True)


def summarize_errors(errors: Iterable[InputError], at_most: int = 10) -> str:
    """Join the first errors into one sentence and count the others."""
    errors = list(errors)
    more = f"; and {len(errors) - at_most} more" if len(errors) > at_most else ""
    return "; ".join(map(str, errors[:at_most])) + more


def printable(text: str) -> str:
    """Escape control characters, so that file names and captions cannot control the terminal."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main`; a user's mistake becomes one sentence on stderr and exit code 2.

    Of several processes that were launched together the first to fail says why, and the others end with it.
    """
    if sys.stdout is not None:  # a photo's name may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
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
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python's own flush at exit does not fail as well
        if error.errno == errno.EPIPE:  # the reader, such as `head`, has seen enough
            sys.exit(1)
        _end(f"error: standard output cannot be written ({error.strerror}).", 2)
    except RuntimeError:  # raised while waiting for a process that has exited
        if not _ended(0):
            raise
        sys.exit(2)


def _end(message: str, code: int) -> None:
    if _ended(1) <= 1:
        print(printable(message), file=sys.stderr, flush=True)
    sys.exit(code)


def _ended(more: int) -> int:
    """Add `more` to the number of launched processes that ended early, and return it; 0 for a single process.

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
