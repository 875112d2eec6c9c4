"""What a trainer's `train` returns: the run directory, with the run's results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from estune.config import SizedConfig
from estune.run.records import read_metrics
from estune.train.step import progress_of

Record = dict[str, Any]


class TrainOutput(type(Path())):  # type: ignore[misc]
    """The run directory, a `pathlib.Path`, with the fields of transformers' `TrainOutput`.

    Attributes:
        global_step: number of steps done.
        training_loss: the last step's loss; NaN for methods that have none, such as es.
        metrics: numbers of the whole run, see `run_metrics`.
    """

    global_step: int = 0
    training_loss: float = math.nan
    metrics: Mapping[str, Any] = MappingProxyType({})

    def __iter__(self) -> Iterator[Any]:
        """Yield the three fields, as transformers' named tuple does."""
        return iter((self.global_step, self.training_loss, self.metrics))


def train_output(run_dir: Path, args: SizedConfig, n_rows: int, steps_done: int | None = None) -> TrainOutput:
    """Return the result of a run from the records in its directory.

    Args:
        run_dir: the run directory.
        args: the run's configuration.
        n_rows: number of training rows.
        steps_done: number of steps done; None: that of the last record.
    """
    records = read_metrics(run_dir)
    output = TrainOutput(run_dir)
    last = records[-1]["step"] if records else 0
    output.global_step = last if steps_done is None else steps_done
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    output.training_loss = losses[-1] if losses else math.nan
    output.metrics = run_metrics(records, progress_of(args, output.global_step, n_rows)["epoch"])
    return output


def run_metrics(records: list[Record], epoch: float) -> Record:
    """Return the metrics of a run.

    Args:
        records: the lines of `metrics.jsonl`.
        epoch: passes over the training rows.

    Returns:
        ``train_runtime``, seconds of training without evaluations and saving; ``train_samples_per_second``, scored
        completions a second; ``train_steps_per_second``; ``epoch``; the last step's numbers by their own names, and the
        last evaluation's with the prefix ``eval_``.
    """
    steps = [record for record in records if "step_time" in record]
    evaluations = [record for record in records if "eval_reward" in record]
    metrics: Record = {"epoch": epoch}
    if steps:
        last = steps[-1]
        seconds = last.get("train_time_s") or 0.0
        metrics |= {
            "train_runtime": seconds,
            "train_samples_per_second": last.get("num_evaluations", 0) / seconds if seconds else math.nan,
            "train_steps_per_second": last["step"] / seconds if seconds else math.nan,
            **{name: value for name, value in last.items() if name not in ("step", "train_time_s")},
        }
    if evaluations:
        metrics |= {name: value for name, value in evaluations[-1].items() if name.startswith("eval_")}
    return metrics
