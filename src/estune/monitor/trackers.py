"""Experiment trackers as monitors: tensorboard, trackio, wandb and mlflow, each by its own package.

One that is configured and cannot start is an error before the run begins; one that breaks later, or stops answering, is
warned about and switched off (`Monitors`). Each lives on a thread of its own, so that a run never waits
for a server. A resumed run goes on in the tracker's run that it began: `trackers.json` in the run directory names it.

Projects are named by the variables that transformers reads, too: ``WANDB_PROJECT``, ``TRACKIO_PROJECT``,
``MLFLOW_EXPERIMENT_NAME``; without them the project is ``estune``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from estune.errors import UserError
from estune.files import write_json
from estune.monitor.monitors import Monitor

PROJECT = "estune"
TRACKERS_FILE = "trackers.json"
START_S, BEHIND_S, CLOSE_S = 120.0, 60.0, 60.0  # that a tracker may take to start, to take a record, to finish


class Tracker(Monitor, Protocol):
    """A monitor whose run has a name that it can be found by again."""

    identity: str | None


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return what of a record a tracker can draw: its numbers, without the step."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class TensorboardMonitor:
    """Event files in ``<run>/tensorboard``."""

    identity: str | None = None  # the run directory is enough

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], known: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, record: dict[str, Any]) -> None:
        """Write a record's numbers."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        """Close the file."""
        self._writer.close()


class TrackioMonitor:
    """A trackio run; its data lie where trackio keeps them."""

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], known: str | None) -> None:
        import trackio

        self._trackio: Any = trackio
        # A resume finds a run by its name, of which the latest is taken: so every run has a name of its own.
        self.identity: str | None = known or f"{name}-{secrets.token_hex(3)}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        trackio.init(project=project, name=self.identity, config=config, resume="allow" if known else "never")

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        self._trackio.log(numbers(record), step=record["step"])

    def close(self, failed: bool = False) -> None:
        """Finish the run."""
        self._trackio.finish()


class WandbMonitor:
    """A wandb run; ``WANDB_MODE=offline`` keeps it in ``<run>/wandb``."""

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], known: str | None) -> None:
        import wandb

        again: dict[str, Any] = {"id": known, "resume": "allow", "allow_val_change": True} if known else {}
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run: Any = wandb.init(project=project, name=name, dir=str(run_dir), config=config, **again)
        self.identity: str | None = self._run.id
        # Evaluations come after their step's own line; wandb's counter takes no step twice, so ours is a metric.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        self._run.log(numbers(record) | {"step": record["step"]})

    def close(self, failed: bool = False) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


class MlflowMonitor:
    """An mlflow run, where ``MLFLOW_TRACKING_URI`` says."""

    LONGEST = 500  # characters of a parameter that mlflow takes

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], known: str | None) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        started = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=name)
        self.identity: str | None = started.info.run_id
        if not known:  # mlflow lets no parameter change
            mlflow.log_params({name: str(value)[: self.LONGEST] for name, value in config.items()})

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        self._mlflow.log_metrics(numbers(record), step=record["step"])

    def close(self, failed: bool = False) -> None:
        """Finish the run."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class Apart:
    """A tracker on a thread of its own: whatever it does, it keeps nobody waiting for longer than the limits above.

    Its calls run one after another on that thread, some trackers keep state by thread. What a call raises, a later call
    of `log` or `close` raises; an exit is an error like any other.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._running: deque[Future[Any]] = deque()  # records handed over, oldest first
        self._moved = 0.0  # when the tracker last took one, or had none to take
        Thread(target=self._serve, name=f"estune-{name}", daemon=True).start()
        self._tracker: Tracker = self._wait(self._call(make), START_S)

    @property
    def identity(self) -> str | None:
        """What the tracker calls its run."""
        return self._tracker.identity

    def log(self, record: dict[str, Any]) -> None:
        """Hand a record over."""
        try:
            self._look()
        except Exception:
            self._call(lambda: self._tracker.close(True))  # it is not asked again; perhaps it can still finish
            raise
        self._running.append(self._call(lambda: self._tracker.log(record)))

    def close(self, failed: bool = False) -> None:
        """Finish the run, after all its records; a slow tracker is waited for as long as it takes them."""
        closed = self._call(lambda: self._tracker.close(failed))
        while self._running:
            self._wait(self._running.popleft(), BEHIND_S)
        self._wait(closed, CLOSE_S)

    def _look(self) -> None:
        """Raise what a record raised, or that the tracker takes none any more."""
        now = time.monotonic()
        while self._running and self._running[0].done():
            self._running.popleft().result()
            self._moved = now
        if not self._running:
            self._moved = now
        if now - self._moved > BEHIND_S:
            raise TimeoutError(f"it has taken no record for {BEHIND_S:g} s")

    def _call(self, action: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((future, action))
        return future

    def _wait(self, future: Future[Any], limit_s: float) -> Any:
        try:
            return future.result(limit_s)
        except TimeoutError:
            if future.done():  # its own
                raise
            raise TimeoutError(f"no answer for {limit_s:g} s") from None

    def _serve(self) -> None:
        while True:
            future, action = self._calls.get()
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # the program is not the tracker's to end
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


LOGGERS: dict[str, tuple[str, Callable[[Path, str, dict[str, Any], str | None], Tracker]]] = {  # package, tracker
    "tensorboard": ("tensorboard", TensorboardMonitor),
    "trackio": ("trackio", TrackioMonitor),
    "wandb": ("wandb", WandbMonitor),
    "mlflow": ("mlflow", MlflowMonitor),
}


def start_logger(tracker: str, run_dir: Path, name: str, config: dict[str, Any], known: str | None = None) -> Apart:
    """Start a tracker for a run of that name, or go on with the run that it is ``known`` by.

    Raises:
        UserError: its package is missing, or it cannot start.
    """
    package, make = LOGGERS[tracker]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"report_to {tracker} needs the package {package}: python -m pip install {package}")
    try:
        return Apart(tracker, lambda: make(run_dir, name, config, known))
    except Exception as error:  # third-party code, at the border of a run that has not begun
        reason = " ".join(str(error).split())[:300]
        again = f"; it was to go on with {known}, without {run_dir / TRACKERS_FILE} it begins anew" if known else ""
        raise UserError(f"report_to {tracker} cannot start: {type(error).__name__}: {reason}{again}") from error


def known_trackers(run_dir: Path) -> dict[str, str]:
    """Return what trackers call a run, by tracker.

    Raises:
        UserError: the file that says so is damaged.
    """
    path = run_dir / TRACKERS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{path} is damaged; without it trackers begin new runs")
    return found


def keep_trackers(run_dir: Path, names: dict[str, str]) -> None:
    """Write what trackers call a run, for a resume."""
    if names and names != known_trackers(run_dir):
        write_json(run_dir / TRACKERS_FILE, names)
