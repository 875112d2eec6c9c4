"""PNG curves of one or several runs, drawn from `metrics.jsonl`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from estune.run.records import read_metrics
from estune.run.saved_config import read_config

PLOT_FILE = Path("plots") / "curves.png"
REWARD, SPREAD, HELD_OUT = "#1f5fa8", "#9dbfe3", "#c2571a"


def plot_run(run_dir: Path, output_dir: Path | None = None) -> Path:
    """Draw the training and held-out curves of a run; return the PNG's path.

    The panels show the population's mean fitness with one standard deviation and the best member, theta's held-out
    reward, and, if the task has accuracy, theta's held-out accuracy with a 95 % interval.
    """
    records = read_metrics(run_dir)
    steps = [record for record in records if record.get("reward") is not None]
    evaluations = [record for record in records if "eval_reward" in record]
    accurate = any(record.get("eval_accuracy") is not None for record in evaluations)
    figure, axes = _panels(2 + accurate)
    _reward_curve(axes[0], steps)
    _held_out_reward(axes[1], evaluations)
    if accurate:
        _held_out_accuracy(axes[2], evaluations)
    return _save(figure, output_dir or run_dir)


def plot_runs(run_dirs: Sequence[Path], output_dir: Path) -> Path:
    """Draw the training and held-out curves of several runs; return the PNG's path.

    Runs of one method are drawn with their mean and range, at the steps for which every run has a value. Runs of
    several methods are drawn with their names and without a mean.
    """
    methods = [read_config(run_dir).get("method", "es") for run_dir in run_dirs]
    names = [f"{run_dir.name} ({method})" for run_dir, method in zip(run_dirs, methods, strict=True)]
    if len(set(methods)) == 1:
        names = []
    records = [read_metrics(run_dir) for run_dir in run_dirs]
    steps = [[(r["step"], r["reward"]) for r in run if r.get("reward") is not None] for run in records]
    held_out = [[r for r in run if "eval_reward" in r] for run in records]
    accurate = any(r.get("eval_accuracy") is not None for run in held_out for r in run)
    figure, axes = _panels(2 + accurate)
    _band_over_runs(axes[0], steps, REWARD, names)
    axes[0].set(
        title="Training reward", xlabel="step", ylabel="population's mean" if set(methods) == {"es"} else "reward"
    )
    shown = [("eval_reward", 1.0, "Held-out reward", "reward"), ("eval_accuracy", 100.0, "Held-out accuracy", "%")]
    for panel, (name, factor, title, unit) in zip(axes[1:], shown, strict=False):
        points = [[(r["step"], factor * r[name]) for r in run if r.get(name) is not None] for run in held_out]
        _band_over_runs(panel, points, HELD_OUT, names)
        panel.set(title=title, xlabel="step", ylabel=unit)
    return _save(figure, output_dir)


def _panels(count: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(5 * count, 3.8), layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself to the figure; no backend is chosen for the process
    return figure, list(figure.subplots(1, count))


def _band_over_runs(
    axes: Any, runs: Sequence[Sequence[tuple[int, float]]], colour: str, names: Sequence[str] = ()
) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    if names:
        for name, run in zip(names, runs, strict=True):
            axes.plot([x for x, _ in run], [y for _, y in run], linewidth=1.2, label=name)
        _finish(axes, any(runs))
        return
    for run in runs:
        axes.plot([x for x, _ in run], [y for _, y in run], color=colour, linewidth=0.7, alpha=0.6)
    common = sorted(set.intersection(*({x for x, _ in run} for run in runs)))
    values = [[dict(run)[x] for run in runs] for x in common]
    if common:
        axes.fill_between(
            common,
            [min(v) for v in values],
            [max(v) for v in values],
            color=colour,
            alpha=0.15,
            linewidth=0,
            label="range over runs",
        )
        axes.plot(common, [sum(v) / len(v) for v in values], color=colour, linewidth=2, label=f"mean of {len(runs)}")
    _finish(axes, any(runs), bool(common))


def _save(figure: Figure, directory: Path) -> Path:
    path = directory / PLOT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    os.replace(partial, path)
    return path


def _reward_curve(axes: Any, steps: list[dict[str, Any]]) -> None:
    is_es = all("es/fitness_mean" in record for record in steps)
    names = ("es/fitness_mean", "es/fitness_std") if is_es else ("reward", "reward_std")
    steps = [record for record in steps if all(record.get(name) is not None for name in names)]
    x = [record["step"] for record in steps]
    mean, spread = ([record[name] for record in steps] for name in names)
    axes.fill_between(
        x,
        [m - s for m, s in zip(mean, spread, strict=True)],
        [m + s for m, s in zip(mean, spread, strict=True)],
        color=SPREAD,
        alpha=0.6,
        linewidth=0,
        label="± 1 standard deviation",
    )
    axes.plot(x, mean, color=REWARD, label="population mean" if is_es else "mean")
    if is_es:
        axes.plot(
            x,
            [record["es/fitness_best"] for record in steps],
            color=REWARD,
            linewidth=0.8,
            linestyle=":",
            label="best member",
        )
    axes.set(title="Training reward", xlabel="step", ylabel="fitness" if is_es else "reward")
    _finish(axes, bool(x))


def _held_out_reward(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    known = [record for record in evaluations if record["eval_reward"] is not None]
    x, y = [record["step"] for record in known], [record["eval_reward"] for record in known]
    axes.plot(x, y, color=HELD_OUT, marker="o", markersize=4, label="theta")
    rows = f" ({known[-1]['eval_rows']} rows)" if known else ""
    axes.set(title=f"Held-out reward{rows}", xlabel="step", ylabel="reward")
    _finish(axes, bool(x), otherwise="no evaluation (--eval_steps)")


def _held_out_accuracy(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    x = [record["step"] for record in evaluations]
    y = [100 * record["eval_accuracy"] for record in evaluations]
    bounds = [record["eval_accuracy_ci95"] for record in evaluations]
    axes.fill_between(
        x,
        [100 * low for low, _ in bounds],
        [100 * high for _, high in bounds],
        color=HELD_OUT,
        alpha=0.2,
        linewidth=0,
        label="95 % interval",
    )
    axes.plot(x, y, color=HELD_OUT, marker="o", markersize=4, label="theta")
    axes.set(title=f"Held-out accuracy ({evaluations[-1]['eval_rows']} rows)", xlabel="step", ylabel="%")
    axes.set_ylim(bottom=0)
    _finish(axes, bool(x))


def _finish(axes: Any, has_data: bool, has_legend: bool = True, otherwise: str = "no data") -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if has_data and has_legend:
        axes.legend(frameon=False, fontsize=9)
    elif not has_data:
        axes.text(0.5, 0.5, otherwise, ha="center", va="center", transform=axes.transAxes, color="gray")
