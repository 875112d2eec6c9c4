"""A comparison's processes: run to their end, started again if something else killed them, and their cost counted."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from estune.compare import worker
from estune.compare.results import Sitting, read_json
from estune.config import ESConfig
from estune.console import say
from estune.errors import UserError
from estune.files import try_lock, write_json

ATTEMPTS = 3  # starts of a process that is killed, by the system or by a crash in a library
ORPHAN_WAIT_S = 180.0  # seconds to wait for a run whose comparison was killed, until it has saved
RETRY_DELAY_S = 1.0  # seconds between the end of an interrupted process and the next attempt


class Cost:
    """Processor and wall seconds of a comparison; the file is a list of sittings, the current one last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._sittings: list[Sitting] = []
        self._started = 0.0

    def open(self, file: Path, facts: Sitting) -> None:
        """Begin a sitting; ``facts`` has its code, machine and packages."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._started = file, time.perf_counter()
        earlier: list[Sitting] = read_json(file) if file.exists() else []
        self._sittings = [*earlier, {"cpu_s": 0.0, "wall_s": 0.0, **facts}]

    def add(self, cpu_s: float) -> None:
        """Add the processor seconds of a process that has ended."""
        assert self._file is not None
        with self._lock:
            sitting = self._sittings[-1]
            sitting["cpu_s"] = round(sitting["cpu_s"] + cpu_s, 1)
            sitting["wall_s"] = round(time.perf_counter() - self._started, 1)
            write_json(self._file, self._sittings)


class Stopped(Exception):
    """The comparison is being stopped. An interrupted run writes no result; the next start resumes it."""


class Processes:
    """Starts a comparison's training runs and measurements, each in a process of its own. Threads may share it.

    Args:
        directory: the comparison's.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.context = worker.forkserver_context()
        self.cost = Cost()
        self.stopping = threading.Event()

    def train(self, args: ESConfig) -> worker.Outcome:
        """Run or resume a training run to its end; its output goes to a log beside its directory.

        Raises:
            Stopped: the comparison is being stopped.
        """
        directory = Path(str(args.output_dir))
        values = {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(args)}

        def start() -> worker.Outcome:
            options = {**values, "resume": directory.exists(), "console": "lines"}
            return worker.call(worker.train, (options,), directory.with_name(f"{directory.name}.log"), self.context)

        return self.run_to_end(start, str(directory))

    def call(self, function: Callable[..., None], arguments: tuple[Any, ...], log: str) -> worker.Outcome:
        """Call a function in a process; its output goes to ``log``, a path below the comparison's directory.

        Raises:
            Stopped: the comparison is being stopped.
        """
        return self.run_to_end(lambda: worker.call(function, arguments, self.directory / log, self.context), log)

    def run_to_end(self, start: Callable[[], worker.Outcome], name: str) -> worker.Outcome:
        """Start a process; start it again, at most `ATTEMPTS` times in all, if something else killed or stopped it.

        Raises:
            Stopped: the comparison is being stopped.
            UserError: something outside the run blocks it (lock held, disk full).
        """
        for attempt in range(ATTEMPTS):
            if self.stopping.is_set():
                raise Stopped
            outcome = start()
            self.cost.add(outcome.cpu_s)
            if not outcome.interrupted:
                break
            self.stopping.wait(RETRY_DELAY_S)  # Ctrl-C reaches the process a little before this one
            if self.stopping.is_set():
                raise Stopped
            if attempt + 1 < ATTEMPTS:
                say(f"estune: {name}: {outcome.error}; starting it again")
        if outcome.code == worker.BLOCKED:
            raise UserError(f"{name}: {outcome.error}")
        return outcome

    def wait_for_orphan(self, directory: Path) -> None:
        """Wait until no process holds a run's lock: a run whose comparison was killed saves and ends by itself.

        Raises:
            Stopped: the comparison is being stopped.
            UserError: a process still holds the lock after `ORPHAN_WAIT_S`.
        """
        until = time.monotonic() + ORPHAN_WAIT_S
        while directory.exists():
            lock = try_lock(directory)
            if lock is not None:
                os.close(lock)
                return
            if time.monotonic() > until:
                raise UserError(f"another process is running {directory}")
            if self.stopping.wait(RETRY_DELAY_S / 4):
                raise Stopped
