"""What Ctrl-C and SIGTERM do to a command: it ends in one message that says whether, and how, it goes on later."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Raised where a command stands when a signal comes; no error, and nobody's to catch on the way."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.kept = ""
        """Where what is done so far lies, if the same command goes on from there."""

    @property
    def status(self) -> int:
        """With which shells expect a command to end."""
        return 128 + self.number

    def words(self) -> str:
        """One message."""
        stopped = f"stopped by {signal.Signals(self.number).name}."
        if not self.kept:
            return stopped
        again = "give the same command again to go on, or with --fresh to begin anew"
        return f"{stopped} What is done so far is kept in {self.kept}: {again}."


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped at the first signal while the context lasts; the second ends the process as ever."""
    if threading.current_thread() is not threading.main_thread():
        # Only that one may say what signals do.
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        for own in SIGNALS:
            signal.signal(own, signal.SIG_DFL)
        raise Stopped(number)

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def kept_in(place: object) -> Iterator[None]:
    """Say so where the body is stopped."""
    try:
        yield
    except Stopped as stopped:
        stopped.kept = str(place)
        raise
