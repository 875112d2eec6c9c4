"""Held-out evaluation: accuracy with a 95 % interval, reward, length, pass@k, answer entropy and KL to a reference.

Training runs and `estune evaluate` call the same function, so their results agree row by row. The random numbers of a
sampled evaluation are a function of (seed, row, completion, position), so they are the same after every step.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from estune.engines.base import Engine
from estune.es.fitness import mean, weigh
from estune.es.population import EVAL_PERSON
from estune.es.types import GroupJob, Perturbation, Prompt, Sampling
from estune.rewards.pool import RewardPool, RewardResult
from estune.run.records import is_right
from estune.train.groups import Group
from estune.train.rollouts import Completions, Evaluator, RewardInputs, scored

Z_95 = 1.959963984540054  # standard deviations: the normal distribution's 97.5 % quantile
RESAMPLES = 2000  # resamples of the bootstrap
Row = dict[str, Any]  # a row of the dataset
LARGEST_EXPONENT = 700.0  # nats: exp of a larger float64 overflows


FinalAnswer = Callable[[Row, str], str | None]  # a row and a completion -> the completion's answer, see `Task`


@dataclass
class EvaluatedRow:
    """One held-out row: its G completions of T tokens, their rewards and their accuracy."""

    row_id: int
    prompt: str
    completions: list[str]  # (G,)
    rewards: list[float | None]  # (G,), weighted; None: failed or not applicable
    accuracy: list[float] | None  # (G,)
    lengths: list[int]  # (G,), tokens
    finished: list[bool]  # (G,)
    token_ids: list[list[int]]  # (G, T)
    failures: int = 0  # completions for which a reward function failed
    non_finite: int = 0  # completions whose logits were not finite: their rewards fail, their accuracy is 0
    question: str = ""  # the row's question, without chat template and system message
    by_function: dict[str, list[float | None]] = field(default_factory=dict)  # name -> rewards (G,), if F > 1


class Accuracy(TypedDict, total=False):
    """The accuracy of an evaluation; empty if nothing measures it."""

    accuracy: float
    accuracy_ci95: list[float]  # low, high


class Broken(TypedDict, total=False):
    """The share of completions whose logits were not finite; empty if it is 0."""

    non_finite_ratio: float


class ByFunction(TypedDict, total=False):
    """The mean reward of each reward function; empty if there is only one."""

    rewards: dict[str, float | None]  # None: the function never applied


class Summary(Accuracy, Broken, ByFunction):
    """The summary of an evaluation."""

    n: int  # rows
    reward: float | None  # mean; None: no reward applied
    reward_failures: int
    mean_length_tokens: float
    clipped_ratio: float  # share of completions that the length limit cut off


@dataclass
class Evaluation:
    """The rows of an evaluation and their summary."""

    rows: list[EvaluatedRow]

    def summary(self) -> Summary:
        """Return n, accuracy with its 95 % interval, reward, mean length and the share of clipped completions.

        A failed reward counts as the lowest reward of the evaluation. ``non_finite_ratio``, the share of completions
        whose logits were not finite, is present unless it is 0. ``rewards`` is present with several reward functions.
        """
        known = [reward for row in self.rows for reward in row.rewards if reward is not None]
        lengths = [length for row in self.rows for length in row.lengths]
        finished = [done for row in self.rows for done in row.finished]
        failures = sum(row.failures for row in self.rows)
        rewards = known + [min(known, default=0.0)] * failures  # a failure must not raise the mean
        n_broken = sum(row.non_finite for row in self.rows)
        broken: Broken = {"non_finite_ratio": n_broken / len(lengths)} if n_broken else {}
        return {
            "n": len(self.rows),
            **self._accuracy(),
            "reward": mean(np.array(rewards)) if known else None,
            "reward_failures": failures,
            "mean_length_tokens": sum(lengths) / len(lengths),
            "clipped_ratio": 1 - sum(finished) / len(finished),
            **broken,
            **self._by_function(),
        }

    def _by_function(self) -> ByFunction:
        """Return the mean reward of each of several functions over the completions to which it gave a number."""
        names = self.rows[0].by_function if self.rows else {}
        known = {n: [value for row in self.rows for value in row.by_function[n] if value is not None] for n in names}
        return (
            {"rewards": {n: mean(np.array(values)) if values else None for n, values in known.items()}} if known else {}
        )

    def _accuracy(self) -> Accuracy:
        means = self.accuracies()
        if not means:
            return {}
        return {"accuracy": math.fsum(means) / len(means), "accuracy_ci95": list(interval(means))}

    def accuracies(self) -> list[float] | None:
        """Return the mean accuracy of each row's completions, (rows,); None if nothing measures accuracy."""
        if not self.rows or self.rows[0].accuracy is None:
            return None
        return [math.fsum(row.accuracy or []) / len(row.accuracy or [1]) for row in self.rows]

    def lowest_reward(self) -> float:
        """Return the lowest reward of all completions, which failed rewards count as; infinity if there is none."""
        return min((reward for row in self.rows for reward in row.rewards if reward is not None), default=math.inf)

    def mean_rewards(self, of_failed: float) -> list[float | None]:
        """Return the mean reward of each row's completions, (rows,); None if no reward applies to a row.

        Args:
            of_failed: the reward that counts for a completion whose reward failed.
        """
        means: list[float | None] = []
        for row in self.rows:
            values = [reward for reward in row.rewards if reward is not None] + [of_failed] * row.failures
            means.append(math.fsum(values) / len(values) if values else None)
        return means

    def answers(self, rows: Sequence[Row], final_answer: FinalAnswer | None) -> list[list[str | None]]:
        """Return the answer in each completion, (rows, G), with every run of white space as one space.

        Args:
            rows: (rows,), of the dataset.
            final_answer: the task's; None: the whole completion is the answer.

        Returns:
            Answers; None for a completion without an answer.
        """
        found = [
            [final_answer(row, text) if final_answer else text for text in evaluated.completions]
            for row, evaluated in zip(rows, self.rows, strict=True)
        ]
        return [[None if text is None else " ".join(text.split()) for text in texts] for texts in found]

    def warning(self, dtype: str) -> str | None:
        """Return a warning about the summary in one sentence, or None.

        Args:
            dtype: the model's compute dtype.
        """
        summary = self.summary()
        broken = summary.get("non_finite_ratio", 0.0)
        if broken:
            return (
                f"the logits of {broken:.1%} of the completions are not finite in {dtype}: these completions count as "
                "wrong, and their rewards as failed"
            )
        if summary["clipped_ratio"] == 1.0:
            return "every completion was cut off at max_completion_length: raise it, or set --stop_strings"
        return None

    def pass_at_k(self) -> dict[str, float]:
        """Return the unbiased pass@k for k = 1, 2, 4, ... up to the samples per row (Chen et al. 2021)."""
        per_row = pass_at_ks(self.right(), len(self.rows[0].lengths))
        return {str(k): math.fsum(values) / len(values) for k, values in per_row.items()}

    def records(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries for JSON lines, without token ids."""
        rows = map(dataclasses.asdict, self.rows)
        kept = ("token_ids",) if self.rows and self.rows[0].by_function else ("token_ids", "by_function")
        return [{name: value for name, value in row.items() if name not in kept} for row in rows]

    def right(self) -> list[int]:
        """Return the number of right completions of each row, (rows,)."""
        return [sum(map(is_right, row.accuracy or [])) for row in self.rows]


def pass_at_ks(right: Sequence[int], n: int) -> dict[int, list[float]]:
    """Return each row's pass@k, (rows,), for k = 1, 2, 4, ... up to n; ``right`` (rows,) counts right samples of n."""
    ks = [1 << power for power in range(n.bit_length())]
    return {k: [pass_at_k(n, c, k) for c in right] for k in ks}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n samples include one of the c right samples: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of per-row accuracies in [0, 1].

    This is Wilson's score interval if every value is 0 or 1. Otherwise (several samples a row) it is a percentile
    bootstrap over rows with a fixed seed; a single row says nothing about other rows, and the interval is [0, 1].
    """
    n = len(values)
    center = math.fsum(values) / n
    if all(value in (0.0, 1.0) for value in values):
        spread = Z_95 * math.sqrt(center * (1 - center) / n + Z_95**2 / (4 * n * n))
        middle = center + Z_95**2 / (2 * n)
        denominator = 1 + Z_95**2 / n
        return max(0.0, (middle - spread) / denominator), min(1.0, (middle + spread) / denominator)
    return bootstrap(values) if n > 1 else (0.0, 1.0)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean, a percentile bootstrap over ``values`` (rows,) with a fixed seed."""
    rng = np.random.default_rng(0)
    array, n = np.asarray(values), len(values)
    means = [array[rng.integers(0, n, n)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def answer_entropy(answers: Sequence[Hashable]) -> float:
    """Return the entropy of the distribution of a row's K answers, in nats.

    This is the plug-in estimate: - sum of c/K ln(c/K) over the counts c of equal answers. It is at most ln K, and lower
    than the entropy of the model's own distribution, on average by about (m - 1) / (2 K) for m possible answers (Miller
    1955). So it compares models with the same K only.

    Args:
        answers: (K,), K > 0. None, a completion without an answer, counts as an answer of its own.
    """
    counts = collections.Counter(answers).values()
    return max(0.0, -math.fsum(count / len(answers) * math.log(count / len(answers)) for count in counts))


class HeldOut:
    """The answers of theta, or of one member, to held-out rows, collected batch by batch in any order."""

    def __init__(
        self,
        evaluator: Evaluator,
        rows: Sequence[dict[str, Any]],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        weights: Sequence[float],
        accuracy_pool: RewardPool | None,
        *,
        batch: int,
        trainer_state: dict[str, Any],
        names: Sequence[str] = (),
        member: Perturbation | None = None,
    ) -> None:
        """Keep the parts of an evaluation.

        Args:
            evaluator: holds the engine and the reward pool.
            rows: (rows,).
            prompts: (rows,).
            sampling: how completions are decoded.
            weights: (F,), of the reward functions.
            accuracy_pool: computes accuracy; None: no accuracy.
            batch: prompts per batch.
            trainer_state: for reward functions.
            names: (F,), of the reward functions, for the mean reward of each.
            member: answers; None: theta.
        """
        self.member, self.names = member, names
        self.evaluator, self.rows, self.prompts = evaluator, rows, prompts
        self.sampling, self.weights, self.batch = of_evaluations(sampling), weights, batch
        self.trainer_state = {**trainer_state, "is_evaluation": True}
        pool = accuracy_pool
        self._grader = Evaluator(evaluator.engine, pool, evaluator.response_prefix) if pool is not None else None
        self._running: dict[int, tuple[Completions, Group, Future[RewardResult], Future[RewardResult] | None]] = {}
        self.done = 0  # rows answered

    def jobs(self, offset: int = 0) -> Iterator[GroupJob]:
        """Yield the jobs; the index of a job is ``offset`` plus the number of its first row."""
        checksum = self.evaluator.engine.theta_checksum
        for start in range(0, len(self.rows), self.batch):
            prompts = tuple(self.prompts[start : start + self.batch])
            yield GroupJob((offset + start,), (self.member,), checksum, prompts, self.sampling)

    def rows_of(self, start: int) -> Sequence[dict[str, Any]]:
        """Return the rows of the job whose first row is ``start``."""
        return self.rows[start : start + self.batch]

    def take(self, start: int, group: Group, completions: Completions, future: Future[RewardResult]) -> None:
        """Keep the answers of the job whose first row is ``start``, and submit them for their accuracy."""
        part = slice(start, start + self.batch)
        grader, state = self._grader, self.trainer_state
        graded = grader.score(self.rows[part], self.prompts[part], completions, state) if grader else None
        self._running[start] = completions, group, future, graded
        self.done += len(completions)

    def finish(self) -> Evaluation:
        """Wait for all rewards, and return the evaluation.

        Raises:
            Interrupted: the run was asked to stop.
        """
        evaluated: list[EvaluatedRow] = []
        evaluator = self.evaluator
        for start, (completions, group, future, graded) in sorted(self._running.items(), key=lambda item: item[0]):
            part_prompts = self.prompts[start : start + self.batch]
            evaluator.complete(group, scored(future, evaluator.should_stop), self.sampling.num_generations)
            accuracy = None
            if graded is not None:
                result = scored(graded, evaluator.should_stop)
                accuracy = np.where(result.failed | np.isnan(result.rewards), 0.0, result.rewards)
                accuracy = accuracy.reshape(len(part_prompts), self.sampling.num_generations)  # (b, G)
                accuracy = np.where(np.array(group.finite), accuracy, 0.0)
            evaluated += _rows(part_prompts, completions, group, self.weights, accuracy, self.names)
        return Evaluation(evaluated)


def evaluate(held_out: HeldOut, progress: Callable[[int], None] = lambda done: None) -> Evaluation:
    """Evaluate theta on held-out rows; rewards are computed while the engine answers the next batch of prompts.

    Args:
        held_out: what to evaluate.
        progress: called with the number of rows answered.

    Raises:
        Interrupted: the run was asked to stop.
    """

    def inputs_of(job: GroupJob) -> RewardInputs:
        return held_out.rows_of(job.indices[0]), held_out.trainer_state

    submitted = held_out.evaluator.submit(held_out.jobs(), inputs_of, True)
    for start, group, completions, future in submitted:
        held_out.take(start, group, completions, future)
        progress(held_out.done)
    return held_out.finish()


def of_evaluations(sampling: Sampling) -> Sampling:
    """Return the settings with the seed of evaluations, which is the same at every step."""
    return dataclasses.replace(sampling, step=0, person=EVAL_PERSON)


@contextmanager
def _batches_of(engine: Engine, size: int) -> Iterator[None]:
    """Let an engine's forward passes hold at most ``size`` prompts within the context."""
    kept = engine.prompts_per_batch
    engine.prompts_per_batch = size
    try:
        yield
    finally:
        engine.prompts_per_batch = kept


def check_batches(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, evaluation: Evaluation
) -> dict[str, Any] | None:
    """Answer evaluated rows again in batches of another size, and count the rows whose tokens change.

    Float rounding depends on the shapes of matrix products, and thus on how many rows share a forward pass. In a 16-bit
    dtype that can change a token, and every later token of the completion.

    Args:
        engine: the engine of the evaluation; its ``prompts_per_batch`` is restored.
        prompts: (rows,).
        sampling: the settings of the evaluation.
        evaluation: the first answers.

    Returns:
        ``rows``, ``changed`` and ``prompts_per_batch`` (first, second). The second batch size is half of the first, or
        2 if the first is 1. None for a single row, which has no other batch size.
    """
    size = min(engine.prompts_per_batch, len(prompts))
    other = size // 2 if size > 1 else 2
    if len(prompts) < 2:
        return None
    with _batches_of(engine, other):
        answers = [
            row
            for start in range(0, len(prompts), other)
            for row in engine.generate(None, prompts[start : start + other], of_evaluations(sampling))
        ]
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
    names: Sequence[str],
) -> list[EvaluatedRow]:
    """Return the evaluated rows of one batch of b prompts; ``accuracy`` (b, G)."""
    rewards = np.array(group.rewards, dtype=np.float64)  # (b, G, F)
    weighed = weigh(rewards, weights)  # (b, G)
    failed = {(b, g) for b, g, f in group.failed if weights[f]}  # a function of weight 0 is logged and moves nothing
    for b, g in failed:
        weighed[b, g] = np.nan
    assert group.completions is not None
    return [
        EvaluatedRow(
            row_id=prompt.row_id,
            prompt=prompt.text,
            question=prompt.question,
            completions=group.completions[b],
            rewards=_known(weighed[b]),
            accuracy=accuracy[b].tolist() if accuracy is not None else None,
            lengths=group.lengths[b],
            finished=group.finished[b],
            failures=sum(row == b for row, _ in failed),
            non_finite=group.finite[b].count(False),
            token_ids=[list(completion.token_ids) for completion in completions[b]],
            by_function={name: _known(rewards[b, :, f]) for f, name in enumerate(names)} if len(names) > 1 else {},
        )
        for b, prompt in enumerate(prompts)
    ]


def _known(values: np.ndarray) -> list[float | None]:
    """Return the numbers of an array (G,), with None for NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def token_entropy(logprobs: Sequence[Sequence[float]]) -> float:
    """Return the mean surprise of the tokens, in nats: minus the log-probability that the model gave to its own token.

    It estimates the entropy of the model's next-token distribution without bias if the model sampled the completions
    from its whole distribution at temperature 1.

    Args:
        logprobs: log-probabilities in nats of sampled completions, under the model that sampled them.

    Returns:
        A number; NaN or infinite if a log-probability is not finite.
    """
    surprises = [-value for row in logprobs for value in row]
    return math.fsum(surprises) / len(surprises) if surprises else 0.0


def kl_k3(tuned: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> float:
    """Return the mean per token of KL(tuned || reference) in nats.

    The estimator is k3 of J. Schulman, "Approximating KL divergence" (2020): r - log r - 1 with r = p_ref / p_tuned.

    Args:
        tuned: log-probabilities in nats, under the tuned model, of completions that it sampled, one list a completion.
        reference: log-probabilities of the same tokens under the reference.

    Returns:
        A number; NaN or infinite if a log-probability is not finite.
    """
    terms = [
        math.expm1(ref - new) - (ref - new) if ref - new < LARGEST_EXPONENT else math.inf
        for new_row, ref_row in zip(tuned, reference, strict=True)
        for new, ref in zip(new_row, ref_row, strict=True)
    ]
    return math.fsum(terms) / len(terms) if terms else 0.0
