"""The one error that a user's mistake raises, and how a command ends on it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something that the user gave cannot be used; the message is one sentence that says what and what to do."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main`; a user's mistake becomes one sentence on stderr and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a photo's name may hold what the terminal cannot show
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
