"""SIGINT, SIGTERM and SIGHUP ask a run to stop at the next safe point; a second SIGINT or SIGTERM ends it at once.

A second SIGHUP has no effect, because closing a terminal sends several: the shell forwards its own, and the system
sends another when the shell exits. Signals that were ignored when the process started stay ignored: `nohup` ignores
SIGHUP, and a shell without job control ignores SIGINT in background processes.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from estune.console import note

QUITTING = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (*QUITTING, *(getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name)))


class StopRequest:
    """A context manager in which the first of `SIGNALS` sets ``requested()``, and a later `QUITTING` ends the process.

    On exit it restores the previous handlers. It changes nothing outside the main thread, because Python handles
    signals only there. It leaves handlers that were not installed from Python, because it could not restore them.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """Return whether the run was asked to stop."""
        return self._requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                previous = signal.getsignal(number)
                if previous is not None and previous != signal.SIG_IGN:
                    self._previous[number] = previous
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            return
        self._requested = True
        for each in self._previous.keys() & QUITTING:
            signal.signal(each, signal.SIG_DFL)
        note("stopping and saving; send the signal again to quit without saving")
