"""Held-out evaluation: accuracy with a 95 % interval, reward, length, pass@k and KL to a reference.

The same function serves the evaluations inside a run and `estune evaluate`, so the two agree row by row. Sampled
evaluations draw their uniforms from (seed, row, completion, position) alone, whatever the step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from estune.engines.base import LocalEngine
from estune.es.fitness import mean, weigh
from estune.es.population import EVAL_PERSON
from estune.es.types import GroupJob, Prompt, Sampling
from estune.rewards.pool import RewardPool, RewardResult
from estune.run.records import is_right
from estune.train.rollouts import Completions, Evaluator, Group, scored

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
RESAMPLES = 2000
LARGEST_EXPONENT = 700.0  # of a float64's exponential


@dataclass
class EvaluatedRow:
    """One held-out row: its completions, their rewards and whether they were right."""

    row_id: int
    prompt: str
    completions: list[str]  # (G,)
    rewards: list[float | None]  # (G,), weighed; None: failed or not applicable
    accuracy: list[float] | None  # (G,)
    lengths: list[int]  # (G,), tokens
    finished: list[bool]  # (G,)
    token_ids: list[list[int]]  # (G, T)
    failures: int = 0  # completions whose reward failed
    non_finite: int = 0  # completions whose logits were not finite: their rewards failed, and they are wrong
    question: str = ""  # what the row asks, without template and system message


@dataclass
class Evaluation:
    """The rows of an evaluation and their summary."""

    rows: list[EvaluatedRow]

    def summary(self) -> dict[str, Any]:
        """Return n, accuracy with its interval, reward, mean length and the share of clipped completions.

        A failed reward counts as the lowest of the evaluation, and is counted. ``non_finite_ratio``, the share of
        completions whose logits were not finite, is there where it is not 0.
        """
        given = [reward for row in self.rows for reward in row.rewards if reward is not None]
        lengths = [length for row in self.rows for length in row.lengths]
        finished = [done for row in self.rows for done in row.finished]
        result: dict[str, Any] = {"n": len(self.rows)}
        if self.rows and self.rows[0].accuracy is not None:
            means = [math.fsum(row.accuracy or []) / len(row.accuracy or [1]) for row in self.rows]
            result["accuracy"] = math.fsum(means) / len(means)
            result["accuracy_ci95"] = list(interval(means))
        worst = min(given, default=0.0)
        rewards = given + [worst] * sum(row.failures for row in self.rows)  # so that failing does not pay here either
        result["reward"] = mean(np.array(rewards)) if given else None
        result["reward_failures"] = sum(row.failures for row in self.rows)
        result["mean_length_tokens"] = sum(lengths) / len(lengths)
        result["clipped_ratio"] = 1 - sum(finished) / len(finished)
        if broken := sum(row.non_finite for row in self.rows):
            result["non_finite_ratio"] = broken / len(lengths)
        return result

    def warning(self, dtype: str) -> str | None:
        """Return what a user has to know before believing the summary, in one sentence; None where it is sound.

        Args:
            dtype: in which the model computed.
        """
        summary = self.summary()
        broken = summary.get("non_finite_ratio", 0.0)
        if broken:
            return (
                f"the logits behind {broken:.1%} of the completions are not finite in {dtype}: they count as "
                "wrong, and their rewards as failed"
            )
        if summary["clipped_ratio"] == 1.0:
            return "every completion was cut off at max_completion_length: raise it, or give --stop_strings"
        return None

    def pass_at_k(self) -> dict[str, float]:
        """Return the unbiased pass@k for k = 1, 2, 4, ... up to the samples per row (Chen et al. 2021)."""
        found = pass_at_ks(self.right(), len(self.rows[0].lengths))
        return {str(k): math.fsum(values) / len(values) for k, values in found.items()}

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as JSON lines hold them: without token ids."""
        rows = map(dataclasses.asdict, self.rows)
        return [{name: value for name, value in row.items() if name != "token_ids"} for row in rows]

    def right(self) -> list[int]:
        """Return how many of each row's completions are right, (rows,)."""
        return [sum(map(is_right, row.accuracy or [])) for row in self.rows]


def pass_at_ks(right: Sequence[int], n: int) -> dict[int, list[float]]:
    """Return each row's pass@k, (rows,), for k = 1, 2, 4, ... up to n; ``right`` (rows,) of n samples each are."""
    ks = [1 << power for power in range(n.bit_length())]
    return {k: [pass_at_k(n, c, k) for c in right] for k in ks}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of per-row accuracies in [0, 1].

    Wilson's score interval where every value is 0 or 1; otherwise (several samples a row) a percentile bootstrap over
    rows with a fixed seed.
    """
    n = len(values)
    center = math.fsum(values) / n
    if all(value in (0.0, 1.0) for value in values):
        spread = Z_95 * math.sqrt(center * (1 - center) / n + Z_95**2 / (4 * n * n))
        middle = center + Z_95**2 / (2 * n)
        denominator = 1 + Z_95**2 / n
        return max(0.0, (middle - spread) / denominator), min(1.0, (middle + spread) / denominator)
    rng = np.random.default_rng(0)
    array = np.asarray(values)
    means = [array[rng.integers(0, n, n)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def evaluate(
    evaluator: Evaluator,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    weights: Sequence[float],
    accuracy_pool: RewardPool | None,
    *,
    batch: int,
    trainer_state: dict[str, Any],
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Evaluate theta on ``rows``; scores are computed while the next ``batch`` of prompts is generated.

    Raises:
        Interrupted: the run was asked to stop.
    """
    sampling, checksum = of_evaluations(sampling), evaluator.engine.checksum()
    grader = Evaluator(evaluator.engine, accuracy_pool, evaluator.response_prefix) if accuracy_pool else None
    jobs = (
        GroupJob((start,), (None,), checksum, tuple(prompts[start : start + batch]), sampling)
        for start in range(0, len(rows), batch)
    )

    def rows_of(job: GroupJob) -> Sequence[dict[str, Any]]:
        return rows[job.indices[0] : job.indices[0] + len(job.prompts)]

    running: dict[int, tuple[Completions, Group, Future[RewardResult], Future[RewardResult] | None]] = {}
    done = 0
    for start, group, completions, future in evaluator.submit(jobs, rows_of, trainer_state, True):
        part = slice(start, start + batch)
        graded = grader.score(rows[part], prompts[part], completions, trainer_state) if grader else None
        running[start] = completions, group, future, graded
        done += len(completions)
        progress(done)
    evaluated: list[EvaluatedRow] = []
    for start, (completions, group, future, graded) in sorted(running.items(), key=lambda item: item[0]):
        part_prompts = prompts[start : start + batch]
        evaluator.complete(group, scored(future, evaluator.should_stop), sampling.num_generations)
        accuracy = None
        if graded is not None:
            result = scored(graded, evaluator.should_stop)
            accuracy = np.where(result.failed | np.isnan(result.rewards), 0.0, result.rewards)
            accuracy = accuracy.reshape(len(part_prompts), sampling.num_generations)  # (b, G)
            accuracy = np.where(np.array(group.finite), accuracy, 0.0)
        evaluated += _rows(part_prompts, completions, group, weights, accuracy)
    return Evaluation(evaluated)


def of_evaluations(sampling: Sampling) -> Sampling:
    """Return how evaluations decode: with uniforms of their own, the same whatever the step."""
    return dataclasses.replace(sampling, step=0, person=EVAL_PERSON)


def check_batches(
    engine: LocalEngine, prompts: Sequence[Prompt], sampling: Sampling, evaluation: Evaluation
) -> dict[str, Any] | None:
    """Answer evaluated rows once more, in batches of another size, and count the rows with other tokens.

    Float rounding depends on the shapes of matrix products, and so on how many rows share a forward pass; in a dtype of
    16 bits that can change a token, and all that follow it.

    Args:
        engine: the one that answered; its ``prompts_per_batch`` is as before afterwards.
        prompts: (rows,).
        sampling: how the evaluation decoded.
        evaluation: what is compared; not changed.

    Returns:
        ``rows``, ``changed`` and ``prompts_per_batch`` (of the evaluation, of the second answers): about half of a
        batch, 2 where that is 1; None for a single row, which shares its batch with nobody.
    """
    size = min(engine.prompts_per_batch, len(prompts))
    other = size // 2 if size > 1 else 2
    if len(prompts) < 2:
        return None
    kept, engine.prompts_per_batch = engine.prompts_per_batch, other
    try:
        answers = [
            row
            for start in range(0, len(prompts), other)
            for row in engine.generate(None, prompts[start : start + other], of_evaluations(sampling))
        ]
    finally:
        engine.prompts_per_batch = kept
    changed = sum(
        [list(completion.token_ids) for completion in again] != row.token_ids
        for again, row in zip(answers, evaluation.rows, strict=True)
    )
    return {"rows": len(prompts), "changed": changed, "prompts_per_batch": [size, other]}


def _rows(
    prompts: Sequence[Prompt],
    completions: Completions,
    group: Group,
    weights: Sequence[float],
    accuracy: np.ndarray | None,
) -> list[EvaluatedRow]:
    weighed = weigh(np.array(group.rewards, dtype=np.float64), weights)  # (b, G)
    for b, g, _ in group.failed:
        weighed[b, g] = np.nan
    assert group.completions is not None
    return [
        EvaluatedRow(
            row_id=prompt.row_id,
            prompt=prompt.text,
            question=prompt.question,
            completions=group.completions[b],
            rewards=[None if math.isnan(value) else value for value in weighed[b].tolist()],
            accuracy=accuracy[b].tolist() if accuracy is not None else None,
            lengths=group.lengths[b],
            finished=group.finished[b],
            failures=len({g for row, g, _ in group.failed if row == b}),
            non_finite=group.finite[b].count(False),
            token_ids=[list(completion.token_ids) for completion in completions[b]],
        )
        for b, prompt in enumerate(prompts)
    ]


def kl_k3(tuned: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> float:
    """Return the mean per token of KL(tuned || reference) by the k3 estimator r - log r - 1, r = p_ref / p_tuned.

    Both are log-probabilities (natural) of the tuned model's own tokens, completion by completion. The result is NaN or
    infinite where one of them is not finite.
    """
    terms = [
        math.expm1(ref - own) - (ref - own) if ref - own < LARGEST_EXPONENT else math.inf
        for own_row, ref_row in zip(tuned, reference, strict=True)
        for own, ref in zip(own_row, ref_row, strict=True)
    ]
    return math.fsum(terms) / len(terms) if terms else 0.0
