"""Experiment trackers as monitors: tensorboard, trackio, wandb and mlflow, each by its own package.

One that is configured and cannot start is an error before the run begins; one that breaks later, or stops answering, is
warned about and switched off (`estune.monitors.Monitors`). Each lives on a thread of its own, so that a run never waits
for a server. A resumed run goes on in the tracker's run that it began: `trackers.json` in the run directory names it.

Projects are named by the variables that transformers reads, too: ``WANDB_PROJECT``, ``TRACKIO_PROJECT``,
``MLFLOW_EXPERIMENT_NAME``; without them the project is ``estune``.
"""

from __future__ import annotations

import importlib.util
import json
import os
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
from estune.monitors import Monitor

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

    def __init__(self, run_dir: Path, config: dict[str, Any], known: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, record: dict[str, Any]) -> None:
        """Write a record's numbers."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class TrackioMonitor:
    """A trackio run; its data lie where trackio keeps them."""

    def __init__(self, run_dir: Path, config: dict[str, Any], known: str | None) -> None:
        import trackio

        self._trackio: Any = trackio
        self.identity: str | None = known or run_dir.name
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        trackio.init(project=project, name=self.identity, config=config, resume="allow" if known else "never")

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        self._trackio.log(numbers(record), step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._trackio.finish()


class WandbMonitor:
    """A wandb run; ``WANDB_MODE=offline`` keeps it in ``<run>/wandb``."""

    def __init__(self, run_dir: Path, config: dict[str, Any], known: str | None) -> None:
        import wandb

        again: dict[str, Any] = {"id": known, "resume": "allow", "allow_val_change": True} if known else {}
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run: Any = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=config, **again)
        self.identity: str | None = self._run.id
        # Evaluations come after their step's own line; wandb's counter takes no step twice, so ours is a metric.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        self._run.log(numbers(record) | {"step": record["step"]})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowMonitor:
    """An mlflow run, where ``MLFLOW_TRACKING_URI`` says."""

    LONGEST = 500  # characters of a parameter that mlflow takes

    def __init__(self, run_dir: Path, config: dict[str, Any], known: str | None) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        started = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=run_dir.name)
        self.identity: str | None = started.info.run_id
        if not known:  # mlflow lets no parameter change
            mlflow.log_params({name: str(value)[: self.LONGEST] for name, value in config.items()})

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        self._mlflow.log_metrics(numbers(record), step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._mlflow.end_run()


class Apart:
    """A tracker on a thread of its own: whatever it does, it keeps nobody waiting for longer than the limits above.

    Its calls run one after another on that thread, some trackers keep state by thread. What a call raises, a later call
    of `log` or `close` raises; an exit is an error like any other.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._running: deque[tuple[float, Future[Any]]] = deque()  # records handed over, and when; oldest first
        Thread(target=self._serve, name=f"estune-{name}", daemon=True).start()
        self._tracker: Tracker = self._wait(self._call(make), START_S)

    @property
    def identity(self) -> str | None:
        """What the tracker calls its run."""
        return self._tracker.identity

    def log(self, record: dict[str, Any]) -> None:
        """Hand a record over."""
        self._look()
        self._running.append((time.monotonic(), self._call(lambda: self._tracker.log(record))))

    def close(self) -> None:
        """Finish the run, after all its records."""
        closed = self._call(self._tracker.close)
        self._wait(closed, CLOSE_S)
        self._look()

    def _look(self) -> None:
        """Raise what a record raised, or that one is not taken at all."""
        while self._running and self._running[0][1].done():
            self._running.popleft()[1].result()
        if self._running and time.monotonic() - self._running[0][0] > BEHIND_S:
            raise TimeoutError(f"it is {BEHIND_S:g} s behind")

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


LOGGERS: dict[str, tuple[str, Callable[[Path, dict[str, Any], str | None], Tracker]]] = {  # the package, the tracker
    "tensorboard": ("tensorboard", TensorboardMonitor),
    "trackio": ("trackio", TrackioMonitor),
    "wandb": ("wandb", WandbMonitor),
    "mlflow": ("mlflow", MlflowMonitor),
}


def start_logger(name: str, run_dir: Path, config: dict[str, Any]) -> Monitor:
    """Start a tracker for a run, or go on with the one that the run directory names.

    Raises:
        UserError: its package is missing, or it cannot start.
    """
    package, make = LOGGERS[name]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"report_to {name} needs the package {package}: python -m pip install {package}")
    known = _known(run_dir)
    try:
        tracker = Apart(name, lambda: make(run_dir, config, known.get(name)))
    except Exception as error:  # third-party code, at the border of a run that has not begun
        reason = " ".join(str(error).split())[:300]
        again = f" (it was to go on with the run that {run_dir / TRACKERS_FILE} names)" if name in known else ""
        raise UserError(f"report_to {name} cannot start: {type(error).__name__}: {reason}{again}") from error
    if tracker.identity is not None and known.get(name) != tracker.identity:
        write_json(run_dir / TRACKERS_FILE, {**known, name: tracker.identity})
    return tracker


def _known(run_dir: Path) -> dict[str, str]:
    """Return what trackers call this run, by tracker."""
    path = run_dir / TRACKERS_FILE
    if not path.is_file():
        return {}
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found
