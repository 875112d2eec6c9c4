"""SIGINT, SIGTERM and SIGHUP ask a run to stop at the next safe point; a second SIGINT or SIGTERM ends it at once.

A second SIGHUP does nothing, for one closed terminal sends several: its shell passes its own on, and the system sends
another one as the shell ends. A signal that the process was started to ignore stays ignored: `nohup` ignores SIGHUP,
and a shell without job control ignores SIGINT in what it starts in the background.
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
    """While entered, the first of `SIGNALS` makes ``requested()`` true; after it, one of `QUITTING` ends the process.

    What handled the signals before does so again afterwards. Outside the main thread nothing is changed, as Python
    handles signals there alone; nor is a handler that was not installed from Python, which could not be restored.
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
        note("stopping and saving; once more to quit without saving")
