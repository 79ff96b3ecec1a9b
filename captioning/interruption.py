"""The signals that end a program, and their deferral until a run can be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


def ending_signals() -> list[int]:
    """List SIGINT, SIGTERM and, where the system has it and `nohup` has not set it to be ignored, SIGHUP."""
    signals: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)  # of a closed terminal or a lost connection
    return signals


class Interruption:
    """A context that records one of the `ending_signals` rather than ending the process.

    `signal` is its number, 0 if none came. Only the main thread receives signals; in another one nothing is recorded.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.deferred = True

    def __enter__(self) -> Interruption:
        try:
            self.previous_handlers = {s: signal.signal(s, self._record) for s in ending_signals()}
        except ValueError:  # not in the main thread
            self.previous_handlers = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: object) -> None:
        self.signal = number
        if not self.deferred:
            raise KeyboardInterrupt

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Enter a context in which a signal raises KeyboardInterrupt at once."""
        self.deferred = False
        try:
            if self.signal:
                raise KeyboardInterrupt
            yield
        finally:
            self.deferred = True
