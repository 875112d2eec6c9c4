"""Measuring a model on held-out rows: everything that a comparison says of it, in one dictionary.

Greedy pass@1 on the test rows, the right ones among some samples of each (pass@k), KL to the base on the model's own
samples, length, other tasks. The same functions as in `estune evaluate` make the completions and score them.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from estune.compare.changes import parameter_changes, walk_ratio
from estune.compare.config import Comparison, Retained, bounds_of
from estune.compare.hacking import Judged, asks_for_words, judge, summary_of
from estune.compare.plan import rows_of
from estune.compare.tables import base_digest
from estune.config import EVALUATE_FIELDS, ESConfig
from estune.console import warn
from estune.data.columns import reward_inputs
from estune.engines.base import LocalEngine
from estune.environment import code_digest
from estune.errors import UserError
from estune.es.types import Prompt
from estune.files import write_json
from estune.rewards.pool import RewardBatch, RewardPool
from estune.run.records import is_right, read_metrics
from estune.tasks import get_task
from estune.train import setup
from estune.train.evaluation import Evaluation, evaluate, kl_k3
from estune.train.rollouts import Evaluator
from estune.train.setup import Rewards
from estune.train.soundness import broken_model
from estune.train.step import sampling_of

Rows = list[dict[str, Any]]
SAMPLE_SEED = 77  # of the samples for pass@k: the same for all models and methods; the base's further ones count on
DISCOVERY_SEED = 7_000_077  # of the samples of what the base never solves: random numbers with which it did not fail
CONSTANTS, CONSTANT_ROWS = 10, 500  # answers that are tried as a constant, on as many training rows


@dataclass
class Base:
    """What measurements of tuned models refer to: the base's engine, and what was found when it was measured."""

    engine: LocalEngine
    judged: Judged
    never_solved: list[int]


def measure_base(comparison: Comparison, model: str, file: Path) -> None:
    """Measure a base, also with its skill forced by a prefix, and write what was found.

    Args:
        comparison: what to measure.
        model: the base.
        file: what to write; beside it `base-prefix.json`.
    """
    args = evaluation_config(comparison, model)
    engine, rows = setup.load_engine(args), test_rows(comparison)
    file.parent.mkdir(parents=True, exist_ok=True)
    with Judges() as judges:
        if comparison.skill_prefix:
            forced = evaluation_config(comparison, model, response_prefix=comparison.skill_prefix)
            greedy, _ = judges.answer(forced, engine, rows)
            own = {**of_greedy(greedy), "response_prefix": comparison.skill_prefix}
            write_json(file.with_name("base-prefix.json"), own)
        result = measure(comparison, model, engine, None, judges)
        unsolved = never_solved(comparison, args, engine, rows, result, judges)
        result["never_solved"] = unsolved
        result["discovery_control"] = discovery(comparison, args, engine, unsolved, judges)
    write_json(file, {**result, "model": model, "fingerprint": engine.fingerprint(), "code": code_digest()})


def check_base(comparison: Comparison, model: str, fingerprint: str) -> None:
    """See that a base is still the one that was measured.

    Raises:
        UserError: it has another fingerprint.
    """
    found = setup.load_engine(evaluation_config(comparison, model)).theta.fingerprint()
    if found != fingerprint:
        raise UserError(f"model {model} has fingerprint {found}, and the results are of {fingerprint}")


def measure_trial(comparison: Comparison, model: str, file: Path, facts: dict[str, Any]) -> None:
    """Evaluate a trial's model on the validation rows that decide, and write the outcome with the run's ``facts``."""
    rows = rows_of(comparison, "validation")[: comparison.tuning.rows or None]
    args = evaluation_config(comparison, model)
    with Judges() as judges:
        greedy, _ = judges.answer(args, setup.load_engine(args), rows)
    summary = greedy.summary()
    kept = {name: summary[name] for name in ("accuracy", "accuracy_ci95", "reward")}
    write_json(file, {**facts, "status": "done", **kept, "code": code_digest()})


def measure_run(comparison: Comparison, base_file: Path, model: str, file: Path, facts: dict[str, Any]) -> None:
    """Measure a run's model and write the outcome with the run's ``facts``."""
    known = json.loads(base_file.read_text(encoding="utf-8"))
    engine, base_engine = (setup.load_engine(evaluation_config(comparison, each)) for each in (model, known["model"]))
    base = Base(base_engine, Judged(**known["judged"]), known["never_solved"])
    with Judges() as judges:
        found = measure(comparison, model, engine, base, judges)
    found["changes"] = changes(base_engine, engine, comparison.directory / facts["run"], facts["steps"])
    state = json.loads((Path(model) / "es_state.json").read_text(encoding="utf-8"))
    write_json(
        file,
        {
            **facts,
            "status": "done",
            **found,
            "fingerprint": state["fingerprint"],
            "base": base_digest(known),
            "code": code_digest(),
        },
    )


def evaluation_config(comparison: Comparison, model: str, **changes: Any) -> ESConfig:
    """Return how a model is evaluated: the comparison's options that decide a completion, greedily."""
    kept = {name: value for name, value in comparison.settings.items() if name in EVALUATE_FIELDS}
    for name in ("temperature", "top_p", "top_k", "num_generations", "seed"):
        kept.pop(name, None)
    given = {**kept, "model": model, "task": comparison.task, "seed": SAMPLE_SEED, **changes}
    args = ESConfig.from_mapping(given)
    return setup.resolve_config(args, 1_000_000)


def test_rows(comparison: Comparison) -> Rows:
    """Return the held-out rows that are reported."""
    return rows_of(comparison, "test")[: comparison.measuring.rows or None]


def measure_constant(comparison: Comparison, model: str, file: Path) -> None:
    """Measure what a model that says the same whatever it is asked would have, at best, and write it.

    Of the right answers that are most common among the *training* rows, the one that is right on most of those, as the
    task's accuracy has it. Nothing is written where a task has no answer that fits two rows.
    """
    args, rows, train = evaluation_config(comparison, model), test_rows(comparison), rows_of(comparison, "train")
    texts = right_answers(comparison, train)
    common = [text for text, count in collections.Counter(texts).most_common(CONSTANTS) if count > 1]
    if not common:
        return
    train = train[:CONSTANT_ROWS]
    with Judges() as judges:
        tried = {text: judges.right(args, train, text) for text in common}
        says = max(common, key=lambda text: sum(tried[text]))
        right = judges.right(args, rows, says)
    tokenizer = setup.load_engine(args).assets.tokenizer
    found = {
        "says": says,
        "n": len(rows),
        "accuracy": sum(right) / len(rows),
        "correct": "".join("1" if each else "0" for each in right),
        "length": len(tokenizer.encode(says, add_special_tokens=False)),
        "train_accuracy": sum(tried[says]) / len(train),
        "code": code_digest(),
    }
    write_json(file, found)


def right_answers(comparison: Comparison, rows: Rows) -> list[str]:
    """Return a right completion of each row that has one which other rows can have, too."""
    task = get_task(comparison.task, bool(comparison.settings.get("allow_unsandboxed_code")))
    found = [] if task.right_answer is None else map(task.right_answer, rows)
    return [text for text in found if text is not None]


class Judges:
    """The reward workers that score answers, started once for each task; a context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._known: dict[str, tuple[Rewards, RewardPool, RewardPool]] = {}
        self._broken: set[str] = set()  # models of which some completions were said to be broken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def of(self, args: ESConfig) -> tuple[Rewards, RewardPool, RewardPool]:
        """Return a task's rewards and the workers for reward and accuracy."""
        key = f"{args.task} {args.reward_funcs} {args.reward_weights}"
        if key not in self._known:
            rewards = setup.resolve_rewards(args, None, setup.task_of(args))
            if rewards.accuracy is None:
                raise UserError(f"a comparison needs a task with an accuracy, and {args.task} has none")
            pools = [
                self._stack.enter_context(setup.reward_pool(args, funcs, names))
                for funcs, names in ((rewards.funcs, rewards.names), ([rewards.accuracy], ["accuracy"]))
            ]
            self._known[key] = (rewards, pools[0], pools[1])
        return self._known[key]

    def right(self, args: ESConfig, rows: Rows, text: str) -> list[bool]:
        """Say of each row whether this text is a right completion of it."""
        _, _, grader = self.of(args)
        prompts, completions, columns = reward_inputs(rows, [text] * len(rows), "")
        scores = grader.submit(RewardBatch(prompts, completions, [[]] * len(rows), columns)).result().rewards[:, 0]
        return [is_right(score) for score in scores]

    def answer(self, args: ESConfig, engine: LocalEngine, rows: Rows) -> tuple[Evaluation, list[Prompt]]:
        """Answer rows with a model and score the answers, as `estune evaluate` does.

        Raises:
            UserError: no completion comes from finite logits, so that there is nothing to measure.
        """
        rewards, pool, grader = self.of(args)
        prompts = setup.build_prompts(args, engine, rows, args.task is not None)
        evaluation = evaluate(
            Evaluator(engine, pool, args.response_prefix),
            rows,
            prompts,
            sampling_of(args, 0),
            rewards.weights,
            grader,
            batch=int(args.prompts_per_batch),
            trainer_state={"global_step": 0, "max_steps": 0},
        )
        broken = evaluation.summary().get("non_finite_ratio", 0.0)
        if broken == 1.0:
            raise UserError(broken_model(args.model, engine.facts.dtype))
        if broken and args.model not in self._broken:
            self._broken.add(args.model)
            warn(f"{args.model}: {evaluation.warning(engine.facts.dtype)}")
        return evaluation, prompts


def measure(
    comparison: Comparison, model: str, engine: LocalEngine, base: Base | None, judges: Judges
) -> dict[str, Any]:
    """Return what is reported of a model.

    Args:
        comparison: what to measure.
        model: a directory, hub id, or ``tiny``.
        engine: holds it.
        base: what it was tuned from; None where it is the base, which is sampled on `discovery_rows`, too: what it
            never solves is to be found.
        judges: who score the answers.
    """
    args, rows, measuring = evaluation_config(comparison, model), test_rows(comparison), comparison.measuring
    greedy, prompts = judges.answer(args, engine, rows)
    judged = summary_of(greedy.rows, *bounds_of(comparison))
    first = rows[: measuring.sample_rows or None]
    if base is None and len(sought := rows[: measuring.discovery_rows or None]) > len(first):
        first = sought
    sampled = sample(args, engine, first, measuring.samples, measuring.temperature, judges)
    result = {
        **of_greedy(greedy),
        "right_of": sampled.right(),  # of the first rows
        "samples": measuring.samples,
        "sampled_length": sampled.summary()["mean_length_tokens"],
        "retention": {
            name: retained(comparison, model, engine, kept, judges) for name, kept in comparison.retention.items()
        },
    }
    if base is None:
        return result | {"judged": dataclasses.asdict(judged)}
    asked = rows[: measuring.kl_rows or None]
    if measuring.temperature == 1.0 and len(asked) <= len(first):  # the first sample of each is one
        own = sampled
    else:  # the estimator is of tokens that the model draws as they come
        own = sample(args, engine, asked, 1, 1.0, judges)
    result["kl"] = divergence(engine, base.engine, prompts[: len(asked)], own)
    result["discovery"] = discovery(comparison, args, engine, base.never_solved, judges)
    task = get_task(comparison.task, bool(comparison.settings.get("allow_unsandboxed_code")))
    words_wanted = task.answers_hold_words and asks_for_words(right_answers(comparison, rows))
    result["hacking"] = dataclasses.asdict(judge(base.judged, judged, words_wanted))
    return result


def changes(base: LocalEngine, tuned: LocalEngine, run: Path, steps: int) -> dict[str, Any]:
    """Return how far the parameters moved: norms (L2), share, straightness, and the distribution of single changes.

    The run may have gone on since: its first ``steps`` steps are what made the model.
    """
    found = parameter_changes(base.theta.arrays, tuned.theta.arrays)
    return {
        "norm": found.norm,
        "relative_norm": found.ratio,
        "walk_ratio": walk_ratio(found.norm, [record for record in read_metrics(run) if record["step"] <= steps]),
        "moved_share": found.moved_share,
        "excess_kurtosis": found.kurtosis,
        "histogram": {"edges": found.edges, "density": found.density} if found.density else None,
    }


def of_greedy(evaluation: Evaluation) -> dict[str, Any]:
    """Return pass@1 and what goes with it; ``correct`` has one character per row."""
    summary = evaluation.summary()
    correct = "".join("1" if is_right((row.accuracy or [0.0])[0]) else "0" for row in evaluation.rows)
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
    args: ESConfig,
    engine: LocalEngine,
    rows: Rows,
    count: int,
    temperature: float,
    judges: Judges,
    seed: int = SAMPLE_SEED,
) -> Evaluation:
    """Return ``count`` samples of each row."""
    sampling = dataclasses.replace(args, temperature=temperature, num_generations=count, seed=seed)
    return judges.answer(sampling, engine, rows)[0]


def never_solved(
    comparison: Comparison, args: ESConfig, engine: LocalEngine, rows: Rows, found: dict[str, Any], judges: Judges
) -> list[int]:
    """Return which of `discovery_rows` the base solves neither greedily nor in any of `discovery_samples` samples.

    Args:
        comparison: says how many.
        args: how the base is evaluated.
        engine: the base.
        rows: the test rows, in which the result counts.
        found: the base's measurement: `correct`, and `right_of` of its first samples of these rows at least.
        judges: who score the answers.
    """
    measuring = comparison.measuring
    sought = found["right_of"][: measuring.discovery_rows or None]
    left = [i for i, right in enumerate(sought) if not right and found["correct"][i] == "0"]
    drawn, size = measuring.samples, max(measuring.samples, 16)
    while left and drawn < measuring.discovery_samples:
        count, asked = min(size, measuring.discovery_samples - drawn), [rows[i] for i in left]
        more = sample(args, engine, asked, count, measuring.temperature, judges, SAMPLE_SEED + drawn)
        left = [index for index, right in zip(left, more.right(), strict=True) if not right]
        drawn += count
    return left


def discovery(
    comparison: Comparison, args: ESConfig, engine: LocalEngine, unsolved: Sequence[int], judges: Judges
) -> list[int]:
    """Return how many of `samples` samples of each row in ``unsolved`` are right, (unsolved,).

    The same random numbers for every model, the base among them: what it solves now was luck, and so is as much of what
    others solve.
    """
    if not unsolved:
        return []
    rows, measuring = test_rows(comparison), comparison.measuring
    asked = [rows[i] for i in unsolved]
    return sample(args, engine, asked, measuring.samples, measuring.temperature, judges, DISCOVERY_SEED).right()


def retained(comparison: Comparison, model: str, engine: LocalEngine, kept: Retained, judges: Judges) -> dict[str, Any]:
    """Return the greedy accuracy on another task, or under another prompt, scored by that task's own reward."""
    args = retained_config(comparison, model, kept)
    rows = get_task(kept.task, args.allow_unsandboxed_code).load(kept.split)[: kept.rows or None]
    return of_greedy(judges.answer(args, engine, rows)[0])


def retained_config(comparison: Comparison, model: str, kept: Retained) -> ESConfig:
    """Return how a model is evaluated on another task: by that task's own reward; leave to run code only where it does.

    Raises:
        UserError: the options cannot work together.
    """
    own: dict[str, Any] = {"task": kept.task, "reward_funcs": None, "reward_weights": None}
    allowed = bool({**comparison.settings, **kept.settings}.get("allow_unsandboxed_code"))
    if not get_task(kept.task, allowed).runs_code:
        own["allow_unsandboxed_code"] = bool(kept.settings.get("allow_unsandboxed_code"))
    return evaluation_config(comparison, model, **{**kept.settings, **own})


def divergence(engine: LocalEngine, base: LocalEngine, prompts: Sequence[Prompt], sampled: Evaluation) -> float:
    """Return KL(model || base) per token, by the k3 estimator on the first sample of each of ``prompts``.

    ``sampled`` are samples of the model at temperature 1, of these prompts and perhaps further ones.

    Raises:
        UserError: a log-probability is not finite.
    """
    token_ids = [row.token_ids[0] for row in sampled.rows[: len(prompts)]]
    found = kl_k3(engine.token_logprobs(prompts, token_ids), base.token_logprobs(prompts, token_ids))
    if not math.isfinite(found):
        raise UserError("a log-probability of the model, or of the base, is not finite, so there is no KL")
    return found
