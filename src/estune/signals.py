"""SIGINT, SIGTERM and SIGHUP ask a run to stop at the next safe point; a second one ends the process at once.

A signal that the process was started to ignore stays ignored: `nohup` ignores SIGHUP, and a shell without job control
ignores SIGINT in what it starts in the background.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from estune.console import note

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """While entered, the first of `SIGNALS` makes ``requested()`` true and restores the default handling."""

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """Say whether the run was asked to stop."""
        return self._requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            watched = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in watched}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        note("stopping after the current token and saving; once more to quit at once")
