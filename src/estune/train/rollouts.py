"""One step's rollouts: every member answers the step's prompts, and the reward pool scores the completions.

`members_per_batch` members (1 with full-rank noise) answer all B prompts of the step together. The engine may split the
prompts into several forward passes. The reward pool scores one member per call, while the engine generates for the next
members. Each member's result (a `Group`) is appended to `pending.jsonl` at once. A resume reuses these results, but
only for batches of members that are complete: a batch is always generated as a whole. Theta can answer as the last
member: in the last batch, at the price of one member more, or in a job of its own if members answer one by one.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from estune.console import warn
from estune.engines.base import Engine
from estune.errors import UserError
from estune.es.types import Completion, GroupAnswer, GroupJob, Interrupted, Member, Perturbation, Prompt, Sampling
from estune.monitor.monitors import MemberLines
from estune.monitor.panel import PanelMonitor
from estune.rewards.contract import opposed, reward_inputs
from estune.rewards.pool import RewardBatch, RewardPool, RewardResult
from estune.run.journal import Pending
from estune.train.groups import Group, Rollouts, known_groups, stack, tokens_digest

Completions = list[list[Completion]]  # (B, G)
Opposed = Sequence[list[list[str]]] | None  # each opponent's completions (B, G) as text; None: no opponents
RewardInputs = tuple[Sequence[dict[str, Any]], dict[str, Any]]  # dataset rows (B,), and the trainer's state

MAX_TOKEN = 2**31  # token ids of an engine without a vocabulary size are smaller
STOP_GRACE_S = 2.0  # seconds that a run waits for rewards after it was asked to stop


class Beside(Protocol):
    """An evaluation of theta that shares the workers with a step's members; `estune.train.evaluation.HeldOut`."""

    trainer_state: dict[str, Any]  # for reward functions

    def jobs(self, offset: int) -> Iterator[GroupJob]:
        """Yield the jobs; the index of a job is ``offset`` plus the number of its first row."""

    def rows_of(self, start: int) -> Sequence[dict[str, Any]]:
        """Return the rows of the job whose first row is ``start``."""

    def take(self, start: int, group: Group, completions: Completions, future: Future[RewardResult]) -> None:
        """Keep the answers of the job whose first row is ``start``."""


@dataclass(frozen=True)
class Opponents:
    """Whose completions of the same prompt a reward function receives as ``opponents``."""

    of: int | Literal["theta"]  # theta's, or those of K other members

    def of_member(self, index: int, n_models: int) -> list[int]:
        """Return the indices of a member's opponents among the models of a step, (K,)."""
        return [(index + 1 + k) % n_models for k in range(int(self.of))]


@dataclass
class Evaluator:
    """Generates completions with an engine and scores them with a reward pool, for training and for evaluations."""

    engine: Engine
    pool: RewardPool
    response_prefix: str
    stop_requested: Callable[[], bool] = lambda: False  # whether the run was asked to stop
    panel: PanelMonitor | MemberLines | None = None  # shows the progress within a step
    warned: set[str] = field(default_factory=set)  # reward functions whose first failure was shown
    opponents: Opponents | None = None  # with whose completions a member's are compared, if a reward asks for them

    def should_stop(self) -> bool:
        """Update the panel, and return whether the run was asked to stop; engines call this after every token."""
        if self.panel is not None:
            self.panel.tick()
        return self.stop_requested()

    def submit(
        self,
        jobs: Iterable[GroupJob],
        inputs_of: Callable[[GroupJob], RewardInputs],
        keep_text: bool,
        opponents_of: Callable[[GroupJob], Opposed] = lambda job: None,
    ) -> Iterator[tuple[int, Group, Completions, Future[RewardResult]]]:
        """Generate the completions of jobs, and submit the completions of each member to the reward pool.

        Args:
            jobs: any two jobs have different ``indices``.
            inputs_of: returns the dataset rows (B,) of a job's prompts, and the ``trainer_state`` for reward functions.
                They also see the member's index as ``member``; None: theta.
            keep_text: whether to keep completions as text.
            opponents_of: returns the opponents' completions of a job's prompts.

        Yields:
            The member's index, its `Group` without rewards, its completions (B, G), and the future of its rewards.
            `complete` puts the rewards into the group. A job's times are divided evenly among its members.
        """
        for index, group, completions, job in self.generate(jobs, keep_text):
            future = self._score_member(index, completions, job, inputs_of(job), opponents_of(job))
            yield index, group, completions, future

    def generate(self, jobs: Iterable[GroupJob], keep_text: bool) -> Iterator[tuple[int, Group, Completions, GroupJob]]:
        """Generate the completions of jobs; yield what `submit` yields, with the member's job instead of a future."""
        for job, answer in checked_answers(self.engine, jobs, self.should_stop):
            n_members = len(answer.indices)
            for index, completions in zip(answer.indices, answer.completions, strict=True):
                group = Group(
                    rewards=[],
                    failed=[],
                    lengths=[[len(c.token_ids) for c in row] for row in completions],
                    finished=[[c.finished for c in row] for row in completions],
                    finite=[[c.finite for c in row] for row in completions],
                    digests=[[tokens_digest(c.token_ids) for c in row] for row in completions],
                    prompt_tokens=sum(len(prompt.token_ids) for prompt in job.prompts) * job.sampling.num_generations,
                    generate_s=answer.generate_s / n_members,
                    perturb_s=answer.perturb_s / n_members,
                )
                if keep_text:
                    group.completions = self.texts(job.prompts, completions)
                yield index, group, completions, job

    def _score_member(
        self, index: int, completions: Completions, job: GroupJob, inputs: RewardInputs, opponents: Opposed = None
    ) -> Future[RewardResult]:
        """Submit one member's completions of a job to the reward pool; see `submit`."""
        perturbation = job.perturbations[job.indices.index(index)]
        is_theta = perturbation is None or not perturbation.member.sign
        rows, state = inputs
        return self.score(rows, job.prompts, completions, {"member": None if is_theta else index, **state}, opponents)

    def complete(self, group: Group, result: RewardResult, num_generations: int) -> Group:
        """Put the rewards into a group and return it; every reward of a completion with non-finite logits fails."""
        shape = (len(group.lengths), num_generations, result.rewards.shape[1])
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
        """Warn of the first failure of each reward function; an error begins with the function's name and a colon."""
        for error in errors:
            name = error.partition(":")[0]
            if name not in self.warned:
                self.warned.add(name)
                error = " ".join(error.split())
                if "'list' object has no attribute" in error:
                    error += "; completions of conversational rows are lists of messages, see docs/rewards.md"
                warn(f"reward {error} (only the first failure is shown; all are counted)")

    def texts(self, prompts: Sequence[Prompt], completions: Completions) -> list[list[str]]:
        """Return completions (B, G) as text with the response prefix."""
        return [
            [self.response_prefix + self.text(prompt, c.token_ids) for c in row]
            for prompt, row in zip(prompts, completions, strict=True)
        ]

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
        opponents: Opposed = None,
    ) -> Future[RewardResult]:
        """Submit completions (B, G) to the reward pool, in row order; return the future of their rewards.

        ``opponents``: each opponent's completions (B, G) of the same prompts, as text; None: there are none.
        """
        flat_rows = [row for row, answers in zip(rows, completions, strict=True) for _ in answers]  # (B * G,)
        token_ids = [list(c.token_ids) for answers in completions for c in answers]  # (B * G,)
        texts = [self.text(p, c.token_ids) for p, answers in zip(prompts, completions, strict=True) for c in answers]
        reward_prompts, answers, columns = reward_inputs(flat_rows, texts, self.response_prefix)
        if opponents is not None and self.pool.wants_opponents and "opponents" not in columns:
            columns["opponents"] = opposed(reward_prompts, opponents)
        return self.pool.submit(RewardBatch(reward_prompts, answers, token_ids, columns, trainer_state))

    def evaluate_theta(
        self,
        rows: Sequence[dict[str, Any]],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        trainer_state: dict[str, Any],
        keep_text: bool = False,
    ) -> Rollouts:
        """Generate and score theta's completions of a step's prompts: (1, B, G) rollouts.

        ``keep_text``: whether to keep completions as text.

        Raises:
            Interrupted: the run was asked to stop.
        """
        job = GroupJob((0,), (None,), self.engine.theta_checksum, tuple(prompts), sampling)
        [(index, group, completions, _)] = self.generate([job], keep_text)
        opponents = [self.texts(prompts, completions)] if self.opponents == Opponents("theta") else None
        future = self._score_member(index, completions, job, (rows, trainer_state), opponents)
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
        theta_joins: bool = False,
        beside: Beside | None = None,
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
            theta_joins: whether theta answers the prompts too; `Rollouts.theta` holds its completions.
            beside: an evaluation of theta, whose jobs workers take when no member's job is left.

        Raises:
            Interrupted: the run was asked to stop; ``pending`` holds the finished members.
        """
        n_members = len(perturbations)
        n_models = n_members + theta_joins
        shape = (len(prompts), sampling.num_generations, self.pool.n_functions)
        among_members = self.opponents is not None and self.opponents.of != "theta"
        keep_text = keep_text or among_members  # a resume compares with the texts of finished members
        known = known_groups(pending.read(head), n_models, shape, keep_text)
        scores = _Scores(
            self, sampling.num_generations, pending, head, n_members, n_models, keep_text, beside, dict(known)
        )
        jobs = missing_jobs(known, perturbations, theta_checksum, prompts, sampling, members_per_batch, theta_joins)

        def inputs_of(job: GroupJob) -> RewardInputs:
            first = job.indices[0]
            if beside is None or first < n_models:
                return rows, trainer_state
            return beside.rows_of(first - n_models), beside.trainer_state

        every = jobs if beside is None else itertools.chain(jobs, beside.jobs(n_models))
        try:
            if among_members:
                self._score_among_members(scores, every, inputs_of)
            else:
                opponents = [self._texts_of_theta(prompts, sampling)] if self.opponents is not None else None
                keeps = keep_text or beside is not None
                for answer in self.submit(every, inputs_of, keeps, lambda _: opponents):
                    scores.take(*answer)
        except Interrupted:
            with suppress(Interrupted):
                scores.collect(wait=True)
            raise
        waiting_since = time.perf_counter()
        scores.collect(wait=True)
        groups = scores.groups
        rollouts = stack([groups[index] for index in range(n_members)], time.perf_counter() - waiting_since)
        rollouts.beside_s = waiting_since - scores.members_done if beside is not None else 0.0
        rollouts.theta = groups.get(n_members)
        rollouts.earlier_s = sum(known[i].generate_s + known[i].perturb_s for i in known if groups[i] is known[i])
        return rollouts

    def _texts_of_theta(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[str]]:
        """Return theta's completions (B, G) of a step's prompts as text."""
        return self.texts(prompts, answers_of_theta(self.engine, prompts, sampling, self.should_stop))

    def _score_among_members(
        self,
        scores: _Scores,
        jobs: Iterable[GroupJob],
        inputs_of: Callable[[GroupJob], RewardInputs],
    ) -> None:
        """Generate the completions of all members, and then score each member's beside those of its opponents."""
        assert self.opponents is not None
        made = {}
        for index, group, completions, job in self.generate(jobs, True):
            if index < scores.n_models:
                made[index] = group, completions, job
            else:  # of the evaluation beside
                future = self._score_member(index, completions, job, inputs_of(job))
                scores.take(index, group, completions, future)
        texts = {index: group.completions for index, group in scores.groups.items()}
        texts |= {index: group.completions for index, (group, *_) in made.items()}
        for index, (group, completions, job) in sorted(made.items(), key=lambda item: item[0]):
            others = [texts[other] or [] for other in self.opponents.of_member(index, scores.n_models)]
            future = self._score_member(index, completions, job, inputs_of(job), others)
            scores.take(index, group, completions, future)


@dataclass
class _Scores:
    """The finished groups of a step, and the members whose rewards have not arrived yet."""

    evaluator: Evaluator
    num_generations: int
    pending: Pending  # stores each finished group
    head: str  # the journal's head
    n_members: int  # N
    n_models: int  # N, and 1 more if theta answers too
    keep_text: bool  # whether groups keep completions as text
    beside: Beside | None  # takes the answers with indices from ``n_models`` on
    groups: dict[int, Group]  # finished, by member
    waiting: list[tuple[int, Group, Future[RewardResult]]] = field(default_factory=list)  # in the order of submission
    members_done: float = field(default_factory=time.perf_counter)  # clock reading of the last member's answer, seconds

    def take(self, index: int, group: Group, completions: Completions, future: Future[RewardResult]) -> None:
        """Keep a member's answers, or pass on those of the evaluation; `Evaluator.submit` yields the arguments.

        Raises:
            Interrupted: the run was asked to stop.
        """
        if self.beside is not None and index >= self.n_models:
            self.beside.take(index - self.n_models, group, completions, future)
            return
        if not self.keep_text:
            group.completions = None
        self.members_done = time.perf_counter()
        self.waiting.append((index, group, future))
        if self.evaluator.panel is not None:
            done = self.groups.keys() | {waiting[0] for waiting in self.waiting}
            self.evaluator.panel.members_done(len(done - {self.n_members}))
        self.collect(wait=False)

    def collect(self, wait: bool) -> None:
        """Complete the groups whose rewards have arrived, in the order of submission; with ``wait``, all groups.

        Raises:
            Interrupted: the run was asked to stop.
        """
        while self.waiting and (wait or self.waiting[0][2].done()):
            index, group, future = self.waiting[0]
            result = scored(future, self.evaluator.should_stop)
            self.groups[index] = self.evaluator.complete(group, result, self.num_generations)
            self.waiting.pop(0)
            self.pending.append(self.head, index, vars(self.groups[index]))


def missing_jobs(
    known: Collection[int],
    perturbations: Sequence[Perturbation],
    theta_checksum: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    members_per_batch: int,
    theta_joins: bool = False,
) -> Iterator[GroupJob]:
    """Yield one job for each batch of members, unless ``known`` (member indices) contains the whole batch.

    With ``theta_joins``, theta has the index N. It is one more member of the last batch, or the last job if a batch is
    one member.
    """
    n_members = len(perturbations)
    models: list[Perturbation | None] = list(perturbations)
    batches = [
        tuple(range(first, min(first + members_per_batch, n_members)))
        for first in range(0, n_members, members_per_batch)
    ]
    if theta_joins and members_per_batch == 1:
        models.append(None)
        batches.append((n_members,))
    elif theta_joins:
        models.append(Perturbation(Member(seed=0, sign=0), perturbations[0].noise))
        batches[-1] += (n_members,)
    for batch in batches:
        if not set(known) >= set(batch):
            yield GroupJob(batch, tuple(models[m] for m in batch), theta_checksum, tuple(prompts), sampling)


def answers_of_theta(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, should_stop: Callable[[], bool] = lambda: False
) -> Completions:
    """Return theta's completions (B, G) of prompts (B,), without scoring them.

    Raises:
        Interrupted: ``should_stop`` returned true after a token.
    """
    job = GroupJob((0,), (None,), engine.theta_checksum, tuple(prompts), sampling)
    [(_, answer)] = checked_answers(engine, [job], should_stop)
    return answer.completions[0]


def checked_answers(
    engine: Engine, jobs: Iterable[GroupJob], should_stop: Callable[[], bool]
) -> Iterator[tuple[GroupJob, GroupAnswer]]:
    """Yield an engine's answers, each with its job, after a check that they keep the contract of `Generator.answers`.

    Args:
        engine: the engine.
        jobs: any two jobs have different ``indices``.
        should_stop: for the engine.

    Raises:
        UserError: a job has no answer or two, or an answer has not the shape and the types of its job.
        Interrupted: ``should_stop`` returned true.
    """
    open_jobs: dict[tuple[int, ...], GroupJob] = {}

    def recorded_jobs() -> Iterator[GroupJob]:
        for job in jobs:
            open_jobs[job.indices] = job
            yield job

    recorded = recorded_jobs()
    answers = engine.answers(recorded, should_stop)
    if not isinstance(answers, Iterable):
        raise _breach(engine, f"answers returned {type(answers).__name__}, not an iterator")
    for answer in answers:
        if not isinstance(answer, GroupAnswer):
            raise _breach(engine, f"an answer is {type(answer).__name__}, not GroupAnswer")
        if not isinstance(answer.indices, tuple):
            raise _breach(engine, f"indices is {type(answer.indices).__name__}, not a tuple")
        job = open_jobs.pop(answer.indices, None)
        if job is None:
            raise _breach(engine, f"the answer with indices {answer.indices} belongs to no job, or is a second answer")
        if problem := _problem_of(answer, job, engine.facts.vocab_size):
            raise _breach(engine, problem)
        yield job, answer
    if open_jobs or next(recorded, None) is not None:
        raise _breach(engine, f"the job with indices {next(iter(open_jobs))} has no answer")


def _breach(engine: Engine, problem: str) -> UserError:
    """Return the error for an engine that breaks its contract."""
    return UserError(
        f"engine {engine.facts.name} breaks its contract: {problem} (see estune.engines.base, and Completion in "
        "estune.es.types)"
    )


def _problem_of(answer: GroupAnswer, job: GroupJob, vocab_size: int | None) -> str:
    """Return what is wrong with an answer; an empty string if nothing is."""
    for name in ("generate_s", "perturb_s"):
        seconds = getattr(answer, name)
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            return f"{name} is {seconds!r}, not a number of seconds"
    names = ("members", "prompts", "completions of a prompt")
    level: list[Any] = [answer.completions]
    for name, size in zip(names, (len(job.indices), len(job.prompts), job.sampling.num_generations), strict=True):
        for item in level:
            if not isinstance(item, (list, tuple)):
                return f"{type(item).__name__} instead of a list of {size} {name}"
            if len(item) != size:
                return f"{len(item)} instead of {size} {name}"
        level = [part for item in level for part in item]
    length, bound = job.sampling.max_completion_length, MAX_TOKEN if vocab_size is None else vocab_size
    return next(filter(None, (_problem_of_completion(each, length, bound) for each in level)), "")


def _problem_of_completion(completion: Any, length: int, bound: int) -> str:
    """Return what is wrong with a completion; an empty string if nothing is.

    Args:
        completion: of any type.
        length: largest number of tokens.
        bound: token ids are smaller.
    """
    if not isinstance(completion, Completion):
        return f"{type(completion).__name__} instead of Completion"
    token_ids = completion.token_ids
    if not isinstance(token_ids, (list, tuple)):
        return f"token_ids is {type(token_ids).__name__}, not a tuple"
    if wrong := set(map(type, token_ids)) - {int}:
        return f"a token id is {wrong.pop().__name__}, not int"
    if len(token_ids) > length:
        return f"a completion has {len(token_ids)} tokens, more than max_completion_length {length}"
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < bound:
        return f"a token id is {min(token_ids) if min(token_ids) < 0 else max(token_ids)}, not in 0 .. {bound - 1}"
    if type(completion.finished) is not bool or type(completion.finite) is not bool:
        return "finished and finite must be bool"
    return ""


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
