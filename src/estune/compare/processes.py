"""A comparison's processes: brought to their end, started again where somebody else killed them, and paid for."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from estune.compare import worker
from estune.config import ESConfig
from estune.console import say
from estune.errors import UserError
from estune.files import try_lock, write_json


class Cost:
    """Processor and wall seconds of a comparison's sittings; the file is a list of them, the present one last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._sittings: list[dict[str, Any]] = []
        self._started = 0.0

    def open(self, file: Path, facts: dict[str, Any]) -> None:
        """Begin a sitting; ``facts`` say what code runs it, on which machine."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._started = file, time.perf_counter()
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        self._sittings = [*before, {"cpu_s": 0.0, "wall_s": 0.0, **facts}]

    def add(self, cpu_s: float) -> None:
        """Count a process that has ended."""
        assert self._file is not None
        with self._lock:
            sitting = self._sittings[-1]
            sitting["cpu_s"] = round(sitting["cpu_s"] + cpu_s, 1)
            sitting["wall_s"] = round(time.perf_counter() - self._started, 1)
            write_json(self._file, self._sittings)


ATTEMPTS = 3  # of a process that was killed, by the system or by a crash in somebody's library
LEFT_BEHIND_S = 180.0  # that a run may still take which a killed comparison left behind
GRACE_S = 1.0  # between a process that was cut off and another one in its place


class Stopped(Exception):
    """The comparison is being stopped: what was cut off is not written down, and goes on with the next start."""


class Processes:
    """Starts what a comparison has done in processes of their own; usable from several threads.

    Args:
        directory: the comparison's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.context = worker.context()
        self.cost = Cost()
        self.stopping = threading.Event()

    def train(self, args: ESConfig) -> worker.Outcome:
        """Run or resume a training run to its end; what it prints is in a log beside its directory.

        Raises:
            Stopped: the comparison is being stopped.
        """
        directory = Path(str(args.output_dir))
        values = {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(args)}

        def once() -> worker.Outcome:
            given = {**values, "resume": directory.exists(), "console": "lines"}
            return worker.call(worker.train, (given,), directory.with_name(f"{directory.name}.log"), self.context)

        return self.to_its_end(once, str(directory))

    def call(self, function: Callable[..., None], arguments: tuple[Any, ...], log: str) -> worker.Outcome:
        """Call a function, to its end; what it prints is in ``log``, a path below the comparison's directory.

        Raises:
            Stopped: the comparison is being stopped.
        """
        return self.to_its_end(lambda: worker.call(function, arguments, self.directory / log, self.context), log)

    def to_its_end(self, once: Callable[[], worker.Outcome], name: str) -> worker.Outcome:
        """Start a process, and again where it was killed or asked to stop by somebody else.

        Raises:
            Stopped: the comparison is being stopped.
            UserError: something keeps it from going on that is none of its doing.
        """
        for attempt in range(ATTEMPTS):
            if self.stopping.is_set():
                raise Stopped
            outcome = once()
            self.cost.add(outcome.cpu_s)
            if not outcome.cut:
                break
            self.stopping.wait(GRACE_S)  # Ctrl-C reaches the process and, a little later, this one
            if self.stopping.is_set():
                raise Stopped
            if attempt + 1 < ATTEMPTS:
                say(f"estune: {name}: {outcome.error}; it goes on from where it was")
        if outcome.code == worker.HINDERED:
            raise UserError(f"{name}: {outcome.error}")
        return outcome

    def wait_for(self, directory: Path) -> None:
        """Wait for a run that a killed comparison left behind: it saves what it has, and goes.

        Raises:
            Stopped: the comparison is being stopped.
            UserError: somebody still holds the run.
        """
        until = time.monotonic() + LEFT_BEHIND_S
        while directory.exists():
            lock = try_lock(directory)
            if lock is not None:
                os.close(lock)
                return
            if time.monotonic() > until:
                raise UserError(f"another process is running {directory}")
            if self.stopping.wait(GRACE_S / 4):
                raise Stopped
