"""One step's rollouts: every member answers the step's prompts, and the answers are scored meanwhile.

A few members (`members_per_batch`; one with full-rank noise) answer all B prompts of the step together; the engine may
cut the prompts into several forward passes. Scoring runs in the reward pool, one call for each member, while the engine
generates for the next ones. What each member's rollouts came to (a `Group`) goes to `pending.jsonl` at once; members
found there are not evaluated again, unless others of their batch are missing: a batch is run as a whole or not at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

STOP_GRACE_S = 2.0  # how long a run that was asked to stop still waits for a score


@dataclass
class Group:
    """What one member's rollouts came to; JSON in and out without loss."""

    rewards: list[list[list[float | None]]]  # (B, G, F); None: not applicable, or failed
    failed: list[list[int]]  # (b, g, f) of every failure
    lengths: list[list[int]]  # (B, G), generated tokens
    finished: list[list[bool]]  # (B, G); False: clipped
    finite: list[list[bool]]  # (B, G); False: the member's logits were not finite, and every reward of it failed
    digests: list[list[str]]  # (B, G), of token ids: equal completions have equal ones
    prompt_tokens: int
    generate_s: float  # without perturb_s
    perturb_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    completions: list[list[str]] | None = None  # (B, G), kept only where completions are logged
    extra: dict[str, list[Any]] | None = None  # log_extra columns, (B * G,) each


@dataclass
class Rollouts:
    """The groups of a step, stacked."""

    groups: list[Group]  # (N,)
    rewards: np.ndarray  # (N, B, G, F), NaN: not applicable or failed
    failed: np.ndarray  # (N, B, G, F), bool
    score_wait_s: float  # seconds that the engine waited for scores
    earlier_s: float = 0.0  # seconds spent on groups restored from pending.jsonl
    started: float = 0.0  # clock reading at which the step began, in seconds, were it done in one go

    def completion_records(self, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
        """Yield what a file of completions holds: member, row, prompt, completion, rewards, log_extra columns."""
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
        """Share of completions that equal the most frequent one of all members, prompt by prompt.

        Where nearly all do, that one is theta's: no perturbation was felt.
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
        """Share of completions whose logits were not finite: a broken member's."""
        return 1.0 - float(np.mean([group.finite for group in self.groups]))


@dataclass
class Evaluator:
    """Evaluates members (or theta) on prompts; shared by training steps and held-out evaluations."""

    engine: Engine
    pool: RewardPool
    response_prefix: str
    should_stop: Callable[[], bool] = lambda: False
    members_done: Callable[[int], None] = lambda done: None  # told how many of a step's members have answered
    complained: set[str] = field(default_factory=set)  # reward functions whose first failure was shown

    def submit(
        self,
        jobs: Iterable[GroupJob],
        rows_of: Callable[[GroupJob], Sequence[dict[str, Any]]],
        trainer_state: dict[str, Any],
        keep_text: bool,
    ) -> Iterator[tuple[int, Group, Completions, Future[RewardResult]]]:
        """Let the engine answer groups, and hand the completions of each member to the reward pool.

        Args:
            jobs: whose first indices differ.
            rows_of: returns the rows (B,) that a job's prompts were made of.
            trainer_state: for reward functions.
            keep_text: keep completions as text.

        Yields:
            The member's index, its `Group` without rewards, its completions (B, G), and the rewards to come; `complete`
            puts the rewards into the group. Times are shared out evenly over the members of a job.
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
                        [self.text(prompt, c.token_ids) for c in row]
                        for prompt, row in zip(job.prompts, completions, strict=True)
                    ]
                yield index, group, completions, self.score(rows, job.prompts, completions, trainer_state)

    def _answers(self, jobs: Iterable[GroupJob]) -> Iterator[tuple[GroupJob, GroupAnswer]]:
        """Yield each answer with its job."""
        asked: dict[tuple[int, ...], GroupJob] = {}

        def remembered() -> Iterator[GroupJob]:
            for job in jobs:
                asked[job.indices] = job
                yield job

        for answer in self.engine.answers(remembered(), self.should_stop):
            yield asked[answer.indices], answer

    def complete(self, group: Group, result: RewardResult, num_generations: int) -> Group:
        """Put a group's scores into it; a completion that is not finite failed for every reward function."""
        shape = (-1, num_generations, result.rewards.shape[1])
        rewards, failed = result.rewards.reshape(shape), result.failed.reshape(shape)  # (B, G, F)
        failed = failed | ~np.array(group.finite, dtype=bool)[..., None]
        values = rewards.astype(object)
        values[np.isnan(rewards) | failed] = None
        group.rewards = values.tolist()
        group.failed = np.argwhere(failed).tolist()
        group.metrics, group.errors = result.metrics, result.errors
        for error in result.errors:
            name = error.partition(":")[0]
            if name not in self.complained:
                self.complained.add(name)
                error = " ".join(error.split())
                warn(f"reward {error} (shown once; all are counted)")
        if group.completions is not None:
            group.extra = result.extra or None
        return group

    def text(self, prompt: Prompt, token_ids: Sequence[int]) -> str:
        """Return a completion's text; the response prefix is not part of it.

        Behind a response prefix it is decoded together with the prompt's last token, since a tokenizer may drop the
        space in front of the first word of what it decodes.
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
        """Hand completions (B, G) to the reward pool, row by row in order."""
        flat_rows = [row for row, answers in zip(rows, completions, strict=True) for _ in answers]  # (B * G,)
        token_ids = [list(c.token_ids) for answers in completions for c in answers]  # (B * G,)
        texts = [self.text(p, c.token_ids) for p, answers in zip(prompts, completions, strict=True) for c in answers]
        given, answers, columns = reward_inputs(flat_rows, texts, self.response_prefix)
        return self.pool.submit(RewardBatch(given, answers, token_ids, columns, trainer_state))

    def evaluate_theta(
        self,
        rows: Sequence[dict[str, Any]],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        trainer_state: dict[str, Any],
    ) -> Rollouts:
        """Evaluate theta itself on a step's prompts: (1, B, G) rollouts."""
        job = GroupJob((0,), (None,), self.engine.checksum(), tuple(prompts), sampling)
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
        """Evaluate all members of a step: (N, B, G) rollouts.

        Args:
            perturbations: (N,), the members.
            rows: (B,) of the step.
            prompts: (B,).
            sampling: how completions are decoded.
            trainer_state: for reward functions.
            theta_checksum: of the theta that the members are perturbations of.
            members_per_batch: members that answer together.
            pending: where finished members are put.
            head: the journal's head, which ties them to this step.
            keep_text: keep completions as text.

        Raises:
            Interrupted: the run was asked to stop; groups that were finished are in ``pending``.
        """
        n_members = len(perturbations)
        shape = (len(prompts), sampling.num_generations, self.pool.n_functions)
        known = known_groups(pending.read(head), n_members, shape, keep_text)
        groups: dict[int, Group] = dict(known)
        answered = set(known)
        scoring: list[tuple[int, Group, Future[RewardResult]]] = []

        starts = range(0, n_members, members_per_batch)
        batches = [tuple(range(first, min(first + members_per_batch, n_members))) for first in starts]
        jobs = (
            GroupJob(batch, tuple(perturbations[m] for m in batch), theta_checksum, tuple(prompts), sampling)
            for batch in batches
            if not known.keys() >= set(batch)
        )

        def collect(wait: bool) -> None:
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


def answers_of_theta(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, should_stop: Callable[[], bool] = lambda: False
) -> Completions:
    """Return theta's own completions (B, G) of some prompts.

    Raises:
        Interrupted: ``should_stop`` turned true between two tokens.
    """
    job = GroupJob((0,), (None,), engine.checksum(), tuple(prompts), sampling)
    [answer] = engine.answers([job], should_stop)
    return answer.completions[0]


def digest(token_ids: Sequence[int]) -> str:
    """Return a short hash of a completion's tokens."""
    return blake2b(np.asarray(token_ids, dtype="<i8").tobytes(), digest_size=8).hexdigest()


def known_groups(
    found: Mapping[int, dict[str, Any]], n_members: int, shape: tuple[int, int, int], keep_text: bool
) -> dict[int, Group]:
    """Return the groups that need no second evaluation; those that lack a field, are damaged, or lack wanted text, do.

    Args:
        found: results by member, as they were read.
        n_members: of the step.
        shape: (B, G, F) of the step.
        keep_text: completions are wanted as text.
    """
    return {
        index: Group(**result)
        for index, result in found.items()
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
    """Return whether nested lists have a shape and items of a kind."""
    if not shape:
        return is_item(value)
    return isinstance(value, list) and len(value) == shape[0] and all(_is_array(v, shape[1:], is_item) for v in value)


def _is_place(value: Any, shape: tuple[int, int, int]) -> bool:
    return _is_array(value, (3,), is_count) and all(i < size for i, size in zip(value, shape, strict=True))


def _is_column(value: Any, shape: tuple[int, int, int]) -> bool:
    return isinstance(value, list) and len(value) == shape[0] * shape[1]


def scored(future: Future[RewardResult], should_stop: Callable[[], bool]) -> RewardResult:
    """Wait for a score.

    Raises:
        Interrupted: the run was asked to stop, and the score took too long even so.
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
