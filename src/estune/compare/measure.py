"""Measuring a model on held-out rows: everything that a comparison says of it, in one dictionary.

Greedy pass@1 on the test rows, the right ones among some samples of each (pass@k), KL to the base on the model's own
samples, length, other tasks. The same functions as in `estune evaluate` make the completions and score them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from estune import inputs
from estune.cli import EVALUATE_FIELDS
from estune.compare.changes import parameter_changes
from estune.compare.config import Comparison, Retained
from estune.compare.hacking import BOUNDS, WORDLESS_SHARE, judge
from estune.config import ESConfig
from estune.engines.base import Engine, Prompt
from estune.environment import code_digest
from estune.errors import UserError
from estune.evaluation import EvaluatedRow, Evaluation, evaluate, kl_k3
from estune.files import write_json
from estune.inputs import Rewards
from estune.rewards import RewardPool
from estune.rollouts import Evaluator
from estune.tasks import get_task

Rows = list[dict[str, Any]]
SAMPLE_SEED = 77  # of the samples for pass@k: the same for all models and methods


@dataclass
class Base:
    """What measurements of tuned models refer to: the base's engine, and its greedy rows on the test problems."""

    engine: Engine
    rows: list[EvaluatedRow]
    never_solved: list[int]


def measure_base(comparison: Comparison, model: str, file: Path, fingerprint: str | None) -> None:
    """Measure a base, also with its skill forced by a prefix, and write what was found; or see that it is the same.

    Args:
        comparison: what to measure.
        model: the base.
        file: what to write; beside it `base-prefix.json`.
        fingerprint: of the base that was measured before; None where none was.

    Raises:
        UserError: it is another one.
    """
    args = evaluation_config(comparison, model)
    engine, rows = inputs.load_engine(args), test_rows(comparison)
    found = engine.master.fingerprint()
    if fingerprint is not None:
        if found != fingerprint:
            raise UserError(f"model {model} has fingerprint {found}, and the results are of {fingerprint}")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with Judges() as judges:
        if comparison.skill_prefix:
            forced = evaluation_config(comparison, model, response_prefix=comparison.skill_prefix)
            greedy, _ = judges.answer(forced, engine, rows)
            own = {**of_greedy(greedy), "response_prefix": comparison.skill_prefix}
            write_json(file.with_name("base-prefix.json"), own)
        result = measure(comparison, model, None, judges)
        result["never_solved"] = never_solved(comparison, args, engine, rows, result["right_of"], judges)
    write_json(file, {**result, "model": model, "fingerprint": found, "code": code_digest()})


def measure_trial(comparison: Comparison, run: str, file: Path, facts: dict[str, Any]) -> None:
    """Evaluate a trial on the validation rows that decide, and write the outcome with the run's ``facts``."""
    rows = get_task(comparison.task).load("validation")[: comparison.tuning.rows or None]
    args = evaluation_config(comparison, run)
    with Judges() as judges:
        greedy, _ = judges.answer(args, inputs.load_engine(args), rows)
    summary = greedy.summary()
    kept = {name: summary[name] for name in ("accuracy", "accuracy_ci95", "reward")}
    write_json(file, {**facts, "status": "done", **kept})


def measure_run(
    comparison: Comparison, run: str, base_file: Path, files: Sequence[Path], facts: dict[str, Any]
) -> None:
    """Measure a run's model and write the outcome with its ``facts``, to each of ``files``."""
    known = json.loads(base_file.read_text(encoding="utf-8"))
    args = evaluation_config(comparison, known["model"])
    engine = inputs.load_engine(args)
    with Judges() as judges:
        greedy, _ = judges.answer(args, engine, test_rows(comparison))
        found = measure(comparison, run, Base(engine, greedy.rows, known["never_solved"]), judges)
    state = json.loads((Path(run) / "es_state.json").read_text(encoding="utf-8"))
    result = {**facts, "status": "done", **found, "fingerprint": state["fingerprint"]}
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)


def evaluation_config(comparison: Comparison, model: str, **changes: Any) -> ESConfig:
    """Return how a model is evaluated: the comparison's options that decide a completion, greedily."""
    kept = {name: value for name, value in comparison.settings.items() if name in EVALUATE_FIELDS}
    for name in ("temperature", "top_p", "top_k", "num_generations", "seed"):
        kept.pop(name, None)
    given = {**kept, "model": model, "task": comparison.task, "seed": SAMPLE_SEED, **changes}
    args = ESConfig.from_mapping(given)
    return inputs.resolve_config(args, 1_000_000)


def test_rows(comparison: Comparison) -> Rows:
    """Return the held-out rows that are reported."""
    return get_task(comparison.task).load("test")[: comparison.measuring.rows or None]


class Judges:
    """The reward workers that score answers, started once for each task; a context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._known: dict[str, tuple[Rewards, RewardPool, RewardPool]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def of(self, args: ESConfig) -> tuple[Rewards, RewardPool, RewardPool]:
        """Return a task's rewards and the workers for reward and accuracy."""
        key = str(args.task)
        if key not in self._known:
            rewards = inputs.resolve_rewards(args, None, inputs.task_of(args))
            if rewards.accuracy is None:
                raise UserError(f"a comparison needs a task with an accuracy, and {args.task} has none")
            pools = [
                self._stack.enter_context(inputs.reward_pool(args, funcs, names))
                for funcs, names in ((rewards.funcs, rewards.names), ([rewards.accuracy], ["accuracy"]))
            ]
            self._known[key] = (rewards, pools[0], pools[1])
        return self._known[key]

    def answer(self, args: ESConfig, engine: Engine, rows: Rows) -> tuple[Evaluation, list[Prompt]]:
        """Answer rows with a model and score the answers, as `estune evaluate` does."""
        rewards, pool, grader = self.of(args)
        prompts = inputs.build_prompts(args, engine, rows, args.task is not None)
        evaluation = evaluate(
            Evaluator(engine, pool, args.response_prefix), rows, prompts, inputs.sampling(args, 0), rewards.weights,
            grader, batch=int(args.prompts_per_batch), trainer_state={"global_step": 0, "max_steps": 0},
        )  # fmt: skip
        return evaluation, prompts


def measure(comparison: Comparison, model: str, base: Base | None, judges: Judges) -> dict[str, Any]:
    """Return what is reported of a model.

    Args:
        comparison: what to measure.
        model: a directory, hub id, or ``tiny``.
        base: what it was tuned from; None where it is the base.
        judges: who score the answers.
    """
    args = evaluation_config(comparison, model)
    engine = inputs.load_engine(args)
    rows = test_rows(comparison)
    greedy, prompts = judges.answer(args, engine, rows)
    chosen = list(range(len(rows)))
    if base is not None:  # the base itself is sampled on all rows, to see what it never solves
        first = comparison.measuring.sample_rows or len(rows)
        chosen = sorted({*chosen[:first], *base.never_solved})
    sampled = sample(comparison, args, engine, [rows[i] for i in chosen], comparison.measuring.samples, judges)
    result = {
        **of_greedy(greedy),
        "sampled_rows": chosen,
        "right_of": right_of(sampled),
        "samples": comparison.measuring.samples,
        "sampled_length": sampled.summary()["mean_length_tokens"],
        "retention": {
            name: retained(comparison, model, engine, kept, judges) for name, kept in comparison.retention.items()
        },
    }
    if base is not None:
        asked = [prompts[i] for i in chosen]
        result["kl"] = divergence(engine, base.engine, asked, sampled, comparison.measuring.kl_rows)
        result["changes"] = changes(base.engine, engine)
        result["hacking"] = hacking(comparison.task, base.rows, greedy.rows)
    return result


def changes(base: Engine, tuned: Engine) -> dict[str, Any]:
    """Return how far the parameters moved: norms, share, and the distribution beside a random walk's."""
    found = parameter_changes(base.master.arrays, tuned.master.arrays)
    return {
        "norm": found.total.change_norm,
        "relative_norm": found.total.ratio,
        "moved_share": found.total.moved_share,
        "excess_kurtosis": found.kurtosis,
        "distance_to_normal": found.distance,
        "histogram": {"edges": found.edges, "density": found.density} if found.density else None,
    }


def hacking(task: str, base: Sequence[EvaluatedRow], tuned: Sequence[EvaluatedRow]) -> dict[str, Any]:
    """Return the detector's verdict; its rule about words counts only where the base's completions hold words."""
    rows = [[vars(row) for row in own] for own in (base, tuned)]
    low, high = BOUNDS.get(task, (0.0, 1.0))
    verdict = judge(*rows, low=low, high=high)
    if verdict.base_share_without_words >= WORDLESS_SHARE:
        verdict = judge(*rows, low=low, high=high, words_expected=False)
    return dataclasses.asdict(verdict)


def of_greedy(evaluation: Evaluation) -> dict[str, Any]:
    """Return pass@1 and what goes with it; ``correct`` has one character per row."""
    summary = evaluation.summary()
    correct = "".join("1" if (row.accuracy or [0.0])[0] == 1.0 else "0" for row in evaluation.rows)
    return {
        "n": summary["n"],
        "accuracy": summary["accuracy"],
        "accuracy_ci95": summary["accuracy_ci95"],
        "correct": correct,
        "reward": summary["reward"],
        "length": summary["mean_length_tokens"],
        "clipped_ratio": summary["clipped_ratio"],
        "reward_failures": summary["reward_failures"],
    }


def sample(
    comparison: Comparison, args: ESConfig, engine: Engine, rows: Rows, count: int, judges: Judges, seed: int = 0
) -> Evaluation:
    """Return samples of rows; ``seed`` 0 gives the samples of the first kind, others further ones."""
    sampling = dataclasses.replace(
        args, temperature=comparison.measuring.temperature, num_generations=count, seed=SAMPLE_SEED + seed
    )
    return judges.answer(sampling, engine, rows)[0]


def right_of(evaluation: Evaluation) -> list[int]:
    """Return how many of each row's completions are right."""
    return [sum(value == 1.0 for value in row.accuracy or []) for row in evaluation.rows]


def never_solved(
    comparison: Comparison, args: ESConfig, engine: Engine, rows: Rows, right: Sequence[int], judges: Judges
) -> list[int]:
    """Return the rows of which no sample of the base is right, in as many as `discovery_samples`.

    Args:
        comparison: says how many.
        args: how the base is evaluated.
        engine: the base.
        rows: the test rows.
        right: (rows,), right ones among the samples that there are already.
        judges: who score the answers.
    """
    left = [index for index, count in enumerate(right) if not count]
    drawn, size = comparison.measuring.samples, max(comparison.measuring.samples, 16)
    while left and drawn < comparison.measuring.discovery_samples:
        count = min(size, comparison.measuring.discovery_samples - drawn)
        found = right_of(sample(comparison, args, engine, [rows[i] for i in left], count, judges, seed=drawn))
        left = [index for index, solved in zip(left, found, strict=True) if not solved]
        drawn += count
    return left


def retained(comparison: Comparison, model: str, engine: Engine, kept: Retained, judges: Judges) -> dict[str, Any]:
    """Return the greedy accuracy on a task that was not trained on."""
    args = evaluation_config(comparison, model, **{**kept.settings, "task": kept.task})
    rows = get_task(kept.task).load("test")[: kept.rows or None]
    return of_greedy(judges.answer(args, engine, rows)[0])


def divergence(engine: Engine, base: Engine, prompts: Sequence[Prompt], sampled: Evaluation, rows: int) -> float:
    """Return KL(model || base) per token at temperature 1, by the k3 estimator on one sample of each of some rows."""
    chosen = list(zip(prompts, sampled.rows, strict=True))[: rows or None]
    asked = [prompt for prompt, _ in chosen]
    token_ids = [row.token_ids[0] for _, row in chosen]
    return kl_k3(engine.token_logprobs(asked, token_ids), base.token_logprobs(asked, token_ids))
