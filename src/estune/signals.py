"""SIGINT and SIGTERM ask a run to stop at the next safe point; a second one ends the process at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM makes ``requested()`` true and restores the default handling."""

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """Say whether the run was asked to stop."""
        return self._requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        print("\nestune: stopping after the current token and saving; once more to quit at once",
              file=sys.stderr, flush=True)  # fmt: skip
