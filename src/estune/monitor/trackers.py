"""Experiment trackers as monitors: tensorboard, trackio, wandb and mlflow, each through its own package.

A tracker that cannot start is an error before the run begins. A tracker that fails or stops answering later causes a
warning and is switched off (`Monitors`). Each tracker has its own thread, so a run never waits for a server. A resumed
run continues the tracker's run: `trackers.json` in the run directory holds its name.

The environment variables that transformers reads name the project: ``WANDB_PROJECT``, ``TRACKIO_PROJECT``,
``MLFLOW_EXPERIMENT_NAME``. The default project is ``estune``.

Numbers have the names under which transformers' trainers send them: ``train/reward`` and ``eval/reward``, or
``reward`` and ``eval_reward`` to mlflow. So runs of TRL and of estune share their charts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from estune.errors import UserError, install_command
from estune.files import write_json
from estune.monitor.monitors import Monitor

PROJECT = "estune"
STEP = "train/global_step"  # transformers' name of the number of steps done
TRACKERS_FILE = "trackers.json"
START_S, BEHIND_S, CLOSE_S = 120.0, 60.0, 60.0  # seconds that a tracker may take to start, to take a record, to finish


class Tracker(Monitor, Protocol):
    """A monitor of an external package."""

    identity: str | None  # the tracker's name for the run, by which a resume continues it


TRL_NAMES = {  # of evaluations: estune's names and TRL's
    "eval_mean_length_tokens": "eval_completions/mean_length",
    "eval_clipped_ratio": "eval_completions/clipped_ratio",
}
KINDS = {  # how messages of failed calls that name no exception begin, and their kind
    "took longer than": "timeout",
    "worker process": "worker",
    "could not be restarted": "worker",
    "returned": "value",
    "the completion's logits": "logits",
}
EXCEPTION = re.compile(r"(\w{1,60})(?=: | \(|$)")  # begins the message of a call that raised


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by TRL's names, without the step; trackers draw only numbers.

    The failed calls of a reward function, which a record counts by message, are counted by `kind`.
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            for message, count in value.items():
                part = f"{name}/{kind(message)}"
                found[part] = found.get(part, 0.0) + float(count)
        elif name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[TRL_NAMES.get(name, name)] = float(value)
    return found


def kind(message: str) -> str:
    """Return the kind of a failed call's message: the type of its exception, a value of `KINDS`, or ``other``."""
    for beginning, name in KINDS.items():
        if message.startswith(beginning):
            return name
    exception = EXCEPTION.match(message)
    return exception[1] if exception else "other"


def charts(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by the names that transformers gives its charts: ``train/...``, ``eval/...``."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in numbers(record).items()
    }


class TensorboardMonitor:
    """Event files in ``<run>/tensorboard``."""

    identity: str | None = None  # a resume finds the files in the run directory

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], known: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, record: dict[str, Any]) -> None:
        """Write a record's numbers."""
        for name, value in charts(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        """Close the file."""
        self._writer.close()


class TrackioMonitor:
    """A trackio run, stored in trackio's own directory."""

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], known: str | None) -> None:
        import trackio

        self._trackio: Any = trackio
        # trackio resumes the latest run of a name, so every run needs a unique name.
        self.identity: str | None = known or f"{name}-{secrets.token_hex(3)}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        trackio.init(project=project, name=self.identity, config=config, resume="allow" if known else "never")

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        self._trackio.log(charts(record) | {STEP: record["step"]}, step=record["step"])

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
        # wandb's step counter accepts no step twice, but an evaluation repeats its step: so the step is a metric.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        self._run.log(charts(record) | {STEP: record["step"]})

    def close(self, failed: bool = False) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


class MlflowMonitor:
    """An mlflow run, stored at ``MLFLOW_TRACKING_URI``."""

    LONGEST = 500  # characters of a parameter's value that mlflow accepts

    def __init__(self, run_dir: Path, name: str, config: dict[str, Any], known: str | None) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        started = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=name)
        self.identity: str | None = started.info.run_id
        if not known:  # mlflow rejects a changed parameter
            mlflow.log_params({name: str(value)[: self.LONGEST] for name, value in config.items()})

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        accepted = {re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII): value for name, value in numbers(record).items()}
        self._mlflow.log_metrics(accepted, step=record["step"])

    def close(self, failed: bool = False) -> None:
        """Finish the run."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class Apart:
    """A tracker on its own thread; the caller waits at most for the time limits above.

    All calls run in order on that one thread, because some trackers keep state by thread. If a call raises, a later
    call of `log` or `close` raises the error. SystemExit counts as an error too.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._running: deque[Future[Any]] = deque()  # submitted records, oldest first
        self._moved = 0.0  # seconds, clock reading when the tracker last finished a record or had none
        Thread(target=self._serve, name=f"estune-{name}", daemon=True).start()
        self._tracker: Tracker = self._wait(self._call(make), START_S)

    @property
    def identity(self) -> str | None:
        """The tracker's name for the run."""
        return self._tracker.identity

    def log(self, record: dict[str, Any]) -> None:
        """Submit a record.

        Raises:
            Exception: an earlier record failed, or the tracker has stopped answering.
        """
        try:
            self._check()
        except Exception:
            self._call(lambda: self._tracker.close(True))  # the last call: the tracker may still finish its run
            raise
        self._running.append(self._call(lambda: self._tracker.log(record)))

    def close(self, failed: bool = False) -> None:
        """Finish the run after all its records; wait for a slow tracker as long as it still finishes records."""
        closed = self._call(lambda: self._tracker.close(failed))
        while self._running:
            self._wait(self._running.popleft(), BEHIND_S)
        self._wait(closed, CLOSE_S)

    def _check(self) -> None:
        """Raise the error of an earlier record, or TimeoutError if the tracker has stopped taking records."""
        now = time.monotonic()
        while self._running and self._running[0].done():
            self._running.popleft().result()
            self._moved = now
        if not self._running:
            self._moved = now
        if now - self._moved > BEHIND_S:
            raise TimeoutError(f"the tracker has taken no record for {BEHIND_S:g} s")

    def _call(self, action: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((future, action))
        return future

    def _wait(self, future: Future[Any], limit_s: float) -> Any:
        try:
            return future.result(limit_s)
        except TimeoutError:
            if future.done():  # the tracker raised this TimeoutError
                raise
            raise TimeoutError(f"no answer for {limit_s:g} s") from None

    def _serve(self) -> None:
        while True:
            future, action = self._calls.get()
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # a tracker must not end the program
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


LOGGERS: dict[str, tuple[str, Callable[[Path, str, dict[str, Any], str | None], Tracker]]] = {  # package, class
    "tensorboard": ("tensorboard", TensorboardMonitor),
    "trackio": ("trackio", TrackioMonitor),
    "wandb": ("wandb", WandbMonitor),
    "mlflow": ("mlflow", MlflowMonitor),
}


def check_packages(names: Iterable[str]) -> None:
    """Raise UserError if the package of a tracker in ``names`` is missing; other names are ignored."""
    for name in names:
        package = LOGGERS[name][0] if name in LOGGERS else None
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"report_to {name} needs the package {package}: {install_command(package=package)}")


def start_logger(tracker: str, run_dir: Path, name: str, config: dict[str, Any], known: str | None = None) -> Apart:
    """Start a tracker for a run named ``name``, or continue the tracker's run named ``known``.

    Raises:
        UserError: the tracker's package is missing, or the tracker cannot start.
    """
    check_packages([tracker])
    make = LOGGERS[tracker][1]
    try:
        return Apart(tracker, lambda: make(run_dir, name, config, known))
    except Exception as error:  # third-party code, at the border of a run that has not begun
        reason = " ".join(str(error).split())[:300]
        again = f"; it should continue {known}: delete {run_dir / TRACKERS_FILE} to begin a new run" if known else ""
        raise UserError(f"report_to {tracker} cannot start: {type(error).__name__}: {reason}{again}") from error


def read_trackers(run_dir: Path) -> dict[str, str]:
    """Return the trackers' names for a run, by tracker.

    Raises:
        UserError: `trackers.json` is damaged.
    """
    path = run_dir / TRACKERS_FILE
    if not path.is_file():
        return {}
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        names = None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{path} is damaged: delete it, and the trackers begin new runs")
    return names


def write_trackers(run_dir: Path, names: dict[str, str]) -> None:
    """Write the trackers' names for a run, for a resume."""
    if names and names != read_trackers(run_dir):
        write_json(run_dir / TRACKERS_FILE, names)
