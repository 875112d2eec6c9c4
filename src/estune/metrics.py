"""The records of `metrics.jsonl` and the row files of a run: TRL's metric names where TRL has one, else `es/`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from estune.engines.base import Prompt
from estune.evaluation import Evaluation
from estune.files import replace_file
from estune.fitness import fill_failures, mean, share_of_tied_prompts, weigh
from estune.master import Moved
from estune.rollouts import Rollouts

if TYPE_CHECKING:
    from estune.inputs import Rewards
    from estune.run import Run
    from estune.trainer import ESTrainer

COARSE_COSINE = 0.9


@dataclass(frozen=True)
class Timing:
    """Clock readings of a step, in seconds."""

    started: float
    update_started: float
    ended: float


def step_metrics(rewards: np.ndarray, spec: Rewards, fitness: np.ndarray, rollouts: Rollouts) -> dict[str, Any]:
    """Return a training step's metrics before its update, from filled rewards (N, B, G, F) and fitness (N,)."""
    weighed = weigh(rewards, spec.weights)  # (N, B, G)
    lengths = rollouts.lengths  # (N, B, G)
    generate_s = sum(group.generate_s for group in rollouts.groups)
    perturb_s = sum(group.perturb_s for group in rollouts.groups)
    known = fitness[~np.isnan(fitness)]
    record: dict[str, Any] = {
        "reward": _number(mean(weighed)),
        "reward_std": _number(float(np.nanstd(weighed)) if np.isfinite(weighed).any() else np.nan),
        **{f"rewards/{name}/mean": _number(mean(rewards[..., f])) for f, name in enumerate(spec.names)},
        "frac_reward_zero_std": share_of_tied_prompts(weighed),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": rollouts.clipped_ratio,
        "es/fitness_best": _number(float(known.max()) if known.size else np.nan),
        "es/fitness_mean": _number(mean(fitness)),
        "es/fitness_std": _number(float(known.std()) if known.size else np.nan),
        "es/reward_errors": int(rollouts.failed.sum()),
        "es/perturb_s": perturb_s,
        "es/generate_s": generate_s,
        "es/score_s": rollouts.score_wait_s,
        "es/tokens_per_s": float(lengths.sum()) / max(generate_s + perturb_s, 1e-9),
    }
    for name in sorted({name for group in rollouts.groups for name in group.metrics}):
        values = [group.metrics[name] for group in rollouts.groups if name in group.metrics]
        record[name] = sum(values) / len(values)
    return record


def update_metrics(measured: dict[str, Any], moved: Moved, timing: Timing | None) -> dict[str, Any]:
    """Return what is known once theta has moved; without ``timing`` (a killed run) the time of its parts."""
    parts_s = measured["es/perturb_s"] + measured["es/generate_s"] + measured["es/score_s"]
    return {
        "es/update_norm": moved.norm,
        "es/update_ratio": moved.ratio,
        "es/update_s": timing.ended - timing.update_started if timing else None,
        "step_time": timing.ended - timing.started if timing else parts_s,
    }


def mean_reward(rollouts: Rollouts, weights: Sequence[float]) -> float:
    """Return the mean weighed reward of rollouts, failures filled within them."""
    return mean(weigh(fill_failures(rollouts.rewards, rollouts.failed, weights), weights))


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation's metrics under their ``eval_`` names."""
    summary = evaluation.summary()
    record = {"eval_rows": summary.pop("n"), "eval_reward": summary.pop("reward")}
    return record | {f"eval_{name}": value for name, value in summary.items()}


def write_rows(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation's rows as JSON lines; the file appears whole."""
    path.parent.mkdir(exist_ok=True)
    rows = [dataclasses.asdict(row) for row in evaluation.rows]
    lines = [json.dumps({k: v for k, v in row.items() if k != "token_ids"}, ensure_ascii=False) for row in rows]
    _write_lines(path, lines)


def write_completions(path: Path, rollouts: Rollouts, prompts: Sequence[Prompt]) -> None:
    """Write the population's completions as JSON lines: member, row, prompt, completion, rewards, log_extra columns."""
    path.parent.mkdir(exist_ok=True)
    lines = []
    for member, group in enumerate(rollouts.groups):
        if group.completions is None:
            continue
        for b, (prompt, answers) in enumerate(zip(prompts, group.completions, strict=True)):
            for g, text in enumerate(answers):
                line = {"member": member, "row": prompt.row_id, "prompt": prompt.text, "completion": text,
                        "rewards": group.rewards[b][g]}  # fmt: skip
                extra = {name: values[b * len(answers) + g] for name, values in (group.extra or {}).items()}
                lines.append(json.dumps(line | extra, ensure_ascii=False, default=str))
    _write_lines(path, lines)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    replace_file(path, lambda file: file.write(data))


def warn_of_coarse_weights(cosines: dict[str, float]) -> None:
    """Warn where the compute dtype rounds the perturbation away."""
    for kind, cosine in sorted(cosines.items()):
        if cosine < COARSE_COSINE:
            print(f"estune: warning: the perturbation of {kind} parameters has cosine {cosine:.2f} with the exact one: "
                  "the compute dtype is too coarse for this sigma; raise sigma or use --dtype float32",
                  file=sys.stderr)  # fmt: skip


def announce(trainer: ESTrainer, run: Run, replayed: int) -> None:
    """Say in a few lines what is about to run."""
    args, master = trainer.args, trainer.engine.master
    moving = sum(int(np.prod(spec.shape)) for spec in master.specs if spec.perturbed)
    share = "all" if moving == master.num_parameters else f"{moving / master.num_parameters:.1%} of"
    print(f"estune: {args.model}, {share} {master.num_parameters:,} parameters, {args.task or args.dataset_name}: "
          f"{len(trainer.train_rows)} training rows, {len(trainer.eval_rows)} held out")  # fmt: skip
    print(f"estune: N {args.population_size}, sigma {args.sigma:g}, learning_rate {args.learning_rate:g}, "
          f"batch_size {args.batch_size}, seed {args.seed}, {args.max_steps} steps into {run.path}")  # fmt: skip
    if run.steps_done:
        print(f"estune: resuming after step {run.steps_done} ({replayed} replayed from the journal)")
    sys.stdout.flush()


def _number(value: float) -> float | None:
    """Return a JSON number, or None for NaN."""
    return None if value != value else value
