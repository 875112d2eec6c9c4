"""One step's rollouts: every member answers the step's prompts, and the reward pool scores the completions.

`members_per_batch` members (1 with full-rank noise) answer all B prompts of the step together. The engine may split the
prompts into several forward passes. The reward pool scores one member per call, while the engine generates for the next
members. Each member's result (a `Group`) is appended to `pending.jsonl` at once. A resume reuses these results, but
only for batches of members that are complete: a batch is always generated as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any

import numpy as np

from estune.console import warn
from estune.data.columns import reward_inputs
from estune.engines.base import Engine
from estune.es.types import Completion, GroupAnswer, GroupJob, Interrupted, Perturbation, Prompt, Sampling
from estune.files import is_count, is_number
from estune.rewards.pool import RewardBatch, RewardPool, RewardResult
from estune.run.journal import Pending

Completions = list[list[Completion]]  # (B, G)

STOP_GRACE_S = 2.0  # seconds that a run waits for a score after it was asked to stop


@dataclass
class Group:
    """The result of one member's rollouts; JSON stores it without loss."""

    rewards: list[list[list[float | None]]]  # (B, G, F); None: not applicable, or failed
    failed: list[list[int]]  # (b, g, f) of every failure
    lengths: list[list[int]]  # (B, G), generated tokens
    finished: list[list[bool]]  # (B, G); False: clipped
    finite: list[list[bool]]  # (B, G); False: the logits were not finite, so every reward of the completion failed
    digests: list[list[str]]  # (B, G), hashes of token ids
    prompt_tokens: int
    generate_s: float  # without perturb_s
    perturb_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    completions: list[list[str]] | None = None  # (B, G); None unless the text is needed
    extra: dict[str, list[Any]] | None = None  # log_extra columns, (B * G,) each


@dataclass
class Rollouts:
    """The groups of a step, stacked."""

    groups: list[Group]  # (N,)
    rewards: np.ndarray  # (N, B, G, F), NaN: not applicable or failed
    failed: np.ndarray  # (N, B, G, F), bool
    score_wait_s: float  # seconds that the engine waited for scores
    earlier_s: float = 0.0  # seconds spent on groups restored from pending.jsonl
    started: float = 0.0  # seconds, clock reading at the step's start, moved back by ``earlier_s``

    def completion_records(self, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
        """Yield one record a completion: member, row, prompt, completion, rewards, and the log_extra columns."""
        for member, group in enumerate(self.groups):
            if group.completions is None:
                continue
            for b, (prompt, answers) in enumerate(zip(prompts, group.completions, strict=True)):
                for g, text in enumerate(answers):
                    extra = {name: values[b * len(answers) + g] for name, values in (group.extra or {}).items()}
                    yield extra | {
                        "member": member,
                        "row": prompt.row_id,
                        "prompt": prompt.text,
                        "completion": text,
                        "rewards": group.rewards[b][g],
                    }

    @property
    def lengths(self) -> np.ndarray:
        """Generated tokens per completion, (N, B, G)."""
        return np.array([group.lengths for group in self.groups])

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens of the step."""
        return sum(group.prompt_tokens for group in self.groups) + int(self.lengths.sum())

    @property
    def modal_ratio(self) -> float:
        """Share of completions that equal the most frequent completion of their prompt among all members.

        A share near 1 means that the perturbations did not change the completions.
        """
        digests = np.array([group.digests for group in self.groups])  # (N, B, G)
        most = [np.unique(digests[:, b, g], return_counts=True)[1].max() for b, g in np.ndindex(digests.shape[1:])]
        return float(np.sum(most)) / digests.size

    @property
    def clipped_ratio(self) -> float:
        """Share of completions that the length limit cut off."""
        return 1.0 - float(np.mean([group.finished for group in self.groups]))

    @property
    def non_finite_ratio(self) -> float:
        """Share of completions whose logits were not finite."""
        return 1.0 - float(np.mean([group.finite for group in self.groups]))


@dataclass
class Evaluator:
    """Generates and scores completions of members or theta, for training steps and held-out evaluations."""

    engine: Engine
    pool: RewardPool
    response_prefix: str
    should_stop: Callable[[], bool] = lambda: False  # called after every token
    members_done: Callable[[int], None] = lambda done: None  # called with the number of members that have answered
    warned: set[str] = field(default_factory=set)  # reward functions whose first failure was shown

    def submit(
        self,
        jobs: Iterable[GroupJob],
        rows_of: Callable[[GroupJob], Sequence[dict[str, Any]]],
        trainer_state: dict[str, Any],
        keep_text: bool,
    ) -> Iterator[tuple[int, Group, Completions, Future[RewardResult]]]:
        """Generate the completions of jobs, and submit the completions of each member to the reward pool.

        Args:
            jobs: jobs with distinct first indices.
            rows_of: returns the dataset rows (B,) of a job's prompts.
            trainer_state: for reward functions.
            keep_text: whether to keep completions as text.

        Yields:
            The member's index, its `Group` without rewards, its completions (B, G), and the future of its rewards.
            `complete` puts the rewards into the group. A job's times are divided evenly among its members.
        """
        for job, answer in self._answers(jobs):
            rows, n_members = rows_of(job), len(answer.indices)
            for index, completions in zip(answer.indices, answer.completions, strict=True):
                group = Group(
                    rewards=[],
                    failed=[],
                    lengths=[[len(c.token_ids) for c in row] for row in completions],
                    finished=[[c.finished for c in row] for row in completions],
                    finite=[[c.finite for c in row] for row in completions],
                    digests=[[digest(c.token_ids) for c in row] for row in completions],
                    prompt_tokens=sum(len(prompt.token_ids) for prompt in job.prompts) * job.sampling.num_generations,
                    generate_s=answer.generate_s / n_members,
                    perturb_s=answer.perturb_s / n_members,
                )
                if keep_text:
                    group.completions = [
                        [self.response_prefix + self.text(prompt, c.token_ids) for c in row]
                        for prompt, row in zip(job.prompts, completions, strict=True)
                    ]
                yield index, group, completions, self.score(rows, job.prompts, completions, trainer_state)

    def _answers(self, jobs: Iterable[GroupJob]) -> Iterator[tuple[GroupJob, GroupAnswer]]:
        """Yield each answer with its job."""
        submitted: dict[tuple[int, ...], GroupJob] = {}

        def recorded_jobs() -> Iterator[GroupJob]:
            for job in jobs:
                submitted[job.indices] = job
                yield job

        for answer in self.engine.answers(recorded_jobs(), self.should_stop):
            yield submitted[answer.indices], answer

    def complete(self, group: Group, result: RewardResult, num_generations: int) -> Group:
        """Put the rewards into a group and return it; all rewards fail for a completion with non-finite logits."""
        shape = (-1, num_generations, result.rewards.shape[1])
        rewards, failed = result.rewards.reshape(shape), result.failed.reshape(shape)  # (B, G, F)
        failed = failed | ~np.array(group.finite, dtype=bool)[..., None]
        values = rewards.astype(object)
        values[np.isnan(rewards) | failed] = None
        group.rewards = values.tolist()
        group.failed = np.argwhere(failed).tolist()
        group.metrics, group.errors = result.metrics, result.errors
        self.warn_of_failures(result.errors)
        if group.completions is not None:
            group.extra = result.extra or None
        return group

    def warn_of_failures(self, errors: Sequence[str]) -> None:
        """Show the first failure of each reward function; each error begins with the function's name and a colon."""
        for error in errors:
            name = error.partition(":")[0]
            if name not in self.warned:
                self.warned.add(name)
                error = " ".join(error.split())
                warn(f"reward {error} (only the first failure is shown; all are counted)")

    def text(self, prompt: Prompt, token_ids: Sequence[int]) -> str:
        """Return a completion's text without the response prefix.

        After a response prefix, the text is decoded together with the prompt's last token, because a tokenizer may drop
        the space before the first word that it decodes.
        """
        if self.response_prefix:
            last = self.engine.assets.decode(prompt.token_ids[-1:])
            whole = self.engine.assets.decode([*prompt.token_ids[-1:], *token_ids])
            if whole.startswith(last):
                return whole[len(last) :]
        return self.engine.assets.decode(token_ids)

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        prompts: Sequence[Prompt],
        completions: Completions,
        trainer_state: dict[str, Any],
    ) -> Future[RewardResult]:
        """Submit completions (B, G) to the reward pool, in row order; return the future of their rewards."""
        flat_rows = [row for row, answers in zip(rows, completions, strict=True) for _ in answers]  # (B * G,)
        token_ids = [list(c.token_ids) for answers in completions for c in answers]  # (B * G,)
        texts = [self.text(p, c.token_ids) for p, answers in zip(prompts, completions, strict=True) for c in answers]
        reward_prompts, answers, columns = reward_inputs(flat_rows, texts, self.response_prefix)
        return self.pool.submit(RewardBatch(reward_prompts, answers, token_ids, columns, trainer_state))

    def evaluate_theta(
        self,
        rows: Sequence[dict[str, Any]],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        trainer_state: dict[str, Any],
    ) -> Rollouts:
        """Generate and score theta's completions of a step's prompts: (1, B, G) rollouts.

        Raises:
            Interrupted: the run was asked to stop.
        """
        job = GroupJob((0,), (None,), self.engine.theta_checksum, tuple(prompts), sampling)
        [(_, group, _, future)] = self.submit([job], lambda _: rows, trainer_state, False)
        return stack([self.complete(group, scored(future, self.should_stop), sampling.num_generations)])

    def evaluate_population(
        self,
        perturbations: Sequence[Perturbation],
        rows: Sequence[dict[str, Any]],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        trainer_state: dict[str, Any],
        *,
        theta_checksum: str,
        members_per_batch: int,
        pending: Pending,
        head: str,
        keep_text: bool = False,
    ) -> Rollouts:
        """Generate and score the completions of all members of a step: (N, B, G) rollouts.

        Args:
            perturbations: (N,), the members.
            rows: (B,) of the step.
            prompts: (B,).
            sampling: how completions are decoded.
            trainer_state: for reward functions.
            theta_checksum: checksum of the theta that the members perturb.
            members_per_batch: number of members that answer together.
            pending: stores the finished members.
            head: the journal's head; it identifies the step in ``pending``.
            keep_text: whether to keep completions as text.

        Raises:
            Interrupted: the run was asked to stop; ``pending`` holds the finished members.
        """
        n_members = len(perturbations)
        shape = (len(prompts), sampling.num_generations, self.pool.n_functions)
        known = known_groups(pending.read(head), n_members, shape, keep_text)
        groups: dict[int, Group] = dict(known)
        answered = set(known)
        scoring: list[tuple[int, Group, Future[RewardResult]]] = []
        jobs = missing_jobs(known, perturbations, theta_checksum, prompts, sampling, members_per_batch)

        def collect(wait: bool) -> None:
            """Take finished scores in the order of submission; with ``wait``, wait for all of them."""
            while scoring and (wait or scoring[0][2].done()):
                index, group, future = scoring[0]
                groups[index] = self.complete(group, scored(future, self.should_stop), sampling.num_generations)
                scoring.pop(0)
                pending.append(head, index, vars(groups[index]))

        try:
            for index, group, _, future in self.submit(jobs, lambda _: rows, trainer_state, keep_text):
                answered.add(index)
                scoring.append((index, group, future))
                self.members_done(len(answered))
                collect(wait=False)
        except Interrupted:
            with suppress(Interrupted):
                collect(wait=True)
            raise
        waiting_since = time.perf_counter()
        collect(wait=True)
        rollouts = stack([groups[index] for index in range(n_members)], time.perf_counter() - waiting_since)
        rollouts.earlier_s = sum(known[i].generate_s + known[i].perturb_s for i in known if groups[i] is known[i])
        return rollouts


def missing_jobs(
    known: Collection[int],
    perturbations: Sequence[Perturbation],
    theta_checksum: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    members_per_batch: int,
) -> Iterator[GroupJob]:
    """Yield one job for each batch of members that are not all in ``known``, a set of member indices."""
    n_members = len(perturbations)
    for first in range(0, n_members, members_per_batch):
        batch = tuple(range(first, min(first + members_per_batch, n_members)))
        if not set(known) >= set(batch):
            members = tuple(perturbations[m] for m in batch)
            yield GroupJob(batch, members, theta_checksum, tuple(prompts), sampling)


def answers_of_theta(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, should_stop: Callable[[], bool] = lambda: False
) -> Completions:
    """Return theta's completions (B, G) of prompts (B,), without scoring them.

    Raises:
        Interrupted: ``should_stop`` returned true after a token.
    """
    job = GroupJob((0,), (None,), engine.theta_checksum, tuple(prompts), sampling)
    [answer] = engine.answers([job], should_stop)
    return answer.completions[0]


def digest(token_ids: Sequence[int]) -> str:
    """Return a short hash of a completion's tokens."""
    return blake2b(np.asarray(token_ids, dtype="<i8").tobytes(), digest_size=8).hexdigest()


def known_groups(
    results: Mapping[int, dict[str, Any]], n_members: int, shape: tuple[int, int, int], keep_text: bool
) -> dict[int, Group]:
    """Return the stored groups that can be reused: whole ones, with text if text is needed.

    Args:
        results: values read from JSON, by member.
        n_members: of the step.
        shape: (B, G, F) of the step.
        keep_text: whether the completions are needed as text.
    """
    return {
        index: Group(**result)
        for index, result in results.items()
        if index < n_members and _is_group(result, shape) and not (keep_text and result["completions"] is None)
    }


def _is_group(result: Mapping[str, Any], shape: tuple[int, int, int]) -> bool:
    """Return whether a value read from JSON holds all fields of a `Group` of shape (B, G, F)."""
    if set(result) != {item.name for item in fields(Group)}:
        return False
    texts, extra, metrics, errors = (result[name] for name in ("completions", "extra", "metrics", "errors"))
    return (
        _is_array(result["rewards"], shape, lambda value: value is None or is_number(value))
        and all(_is_array(result[name], shape[:2], is_it) for name, is_it in _PER_COMPLETION.items())
        and is_count(result["prompt_tokens"])
        and all(is_number(result[name]) for name in ("generate_s", "perturb_s"))
        and isinstance(result["failed"], list)
        and all(_is_place(place, shape) for place in result["failed"])
        and isinstance(metrics, dict)
        and all(is_number(value) for value in metrics.values())
        and isinstance(errors, list)
        and all(isinstance(error, str) for error in errors)
        and (texts is None or _is_array(texts, shape[:2], lambda value: isinstance(value, str)))
        and (extra is None or (isinstance(extra, dict) and all(_is_column(column, shape) for column in extra.values())))
    )


_PER_COMPLETION: dict[str, Callable[[Any], bool]] = {
    "lengths": is_count,
    "finished": lambda value: isinstance(value, bool),
    "finite": lambda value: isinstance(value, bool),
    "digests": lambda value: isinstance(value, str),
}


def _is_array(value: Any, shape: Sequence[int], is_item: Callable[[Any], bool]) -> bool:
    """Return whether ``value`` is nested lists of this shape whose items satisfy ``is_item``."""
    if not shape:
        return is_item(value)
    return isinstance(value, list) and len(value) == shape[0] and all(_is_array(v, shape[1:], is_item) for v in value)


def _is_place(value: Any, shape: tuple[int, int, int]) -> bool:
    return _is_array(value, (3,), is_count) and all(i < size for i, size in zip(value, shape, strict=True))


def _is_column(value: Any, shape: tuple[int, int, int]) -> bool:
    return isinstance(value, list) and len(value) == shape[0] * shape[1]


def scored(future: Future[RewardResult], should_stop: Callable[[], bool]) -> RewardResult:
    """Wait for a member's rewards and return them.

    Raises:
        Interrupted: the run was asked to stop, and the rewards did not arrive within `STOP_GRACE_S`.
    """
    stop_at = math.inf
    while not future.done() and time.monotonic() < stop_at:
        with suppress(TimeoutError):
            future.exception(timeout=0.1)
        if should_stop():
            stop_at = min(stop_at, time.monotonic() + STOP_GRACE_S)
    if not future.done():
        raise Interrupted
    return future.result()


def stack(groups: list[Group], score_wait_s: float = 0.0) -> Rollouts:
    """Stack groups into arrays: rewards and failures (N, B, G, F)."""
    rewards = np.array([group.rewards for group in groups], dtype=np.float64)  # None becomes NaN
    failed = np.zeros(rewards.shape, dtype=bool)
    for index, group in enumerate(groups):
        for b, g, f in group.failed:
            failed[index, b, g, f] = True
    return Rollouts(groups, rewards, failed, score_wait_s)
