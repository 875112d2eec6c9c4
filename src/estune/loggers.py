"""Experiment trackers as monitors: tensorboard, trackio, wandb and mlflow, each by its own package.

One that is configured and cannot start is an error before the run begins; one that breaks later is warned about and
switched off (`estune.monitors.Monitors`). Projects are named by the variables that transformers reads, too:
``WANDB_PROJECT``, ``TRACKIO_PROJECT``, ``MLFLOW_EXPERIMENT_NAME``; without them the project is ``estune``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from estune.errors import UserError
from estune.monitors import Monitor

PROJECT = "estune"


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return what of a record a tracker can draw: its numbers, without the step."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class TensorboardMonitor:
    """Event files in ``<run>/tensorboard``."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
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

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=run_dir.name, config=config)

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        self._trackio.log(numbers(record), step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._trackio.finish()


class WandbMonitor:
    """A wandb run; ``WANDB_MODE=offline`` keeps it in ``<run>/wandb``."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run: Any = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=config)
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

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        mlflow.start_run(run_name=run_dir.name)
        mlflow.log_params({name: str(value)[: self.LONGEST] for name, value in config.items()})

    def log(self, record: dict[str, Any]) -> None:
        """Log a record's numbers."""
        self._mlflow.log_metrics(numbers(record), step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._mlflow.end_run()


LOGGERS: dict[str, tuple[str, Callable[[Path, dict[str, Any]], Monitor]]] = {  # the package, and the monitor
    "tensorboard": ("tensorboard", TensorboardMonitor),
    "trackio": ("trackio", TrackioMonitor),
    "wandb": ("wandb", WandbMonitor),
    "mlflow": ("mlflow", MlflowMonitor),
}


def start_logger(name: str, run_dir: Path, config: dict[str, Any]) -> Monitor:
    """Start a tracker for a run.

    Raises:
        UserError: its package is missing, or it cannot start.
    """
    package, monitor = LOGGERS[name]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"report_to {name} needs the package {package}: python -m pip install {package}")
    try:
        return monitor(run_dir, config)
    except Exception as error:  # third-party code, at the border of a run that has not begun
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"report_to {name} cannot start: {type(error).__name__}: {reason}") from error
