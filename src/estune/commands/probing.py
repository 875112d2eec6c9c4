"""Lets theta and one population of pairs at each of several sigmas answer the rows of a run's first step.

`estune probe` concludes from the result (`estune.commands.probe`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from estune.config import ESConfig, ResolvedConfig
from estune.console import note
from estune.data.batches import Batches
from estune.errors import UserError
from estune.es.fitness import fill_failures, population_fitness, share_of_tied_prompts, weigh
from estune.es.forecast import Outlook, Split, outlook_of, p_values, split_pairs
from estune.es.types import Completion, GroupJob, Interrupted, Perturbation, Prompt
from estune.train import setup
from estune.train.groups import Rollouts, stack
from estune.train.rollouts import Completions, Evaluator, scored
from estune.train.signals import StopRequest
from estune.train.soundness import are_finite, broken_model, warn_of_inputs
from estune.train.step import plan_step, sampling_of

SIGMAS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOST_HARM = 1.0  # standard deviations of the members' fitness: how far their mean may lie below theta's fitness
MORE_BROKEN = 0.05  # share of completions: how many more than theta's may be broken
LARGEST_RATE = 1.0  # sigmas: the largest learning rate of a proposal, as theta should stay where the probe has looked


@dataclass(frozen=True)
class Answers:
    """Statistics of the answers of theta (M = 1) or of M members."""

    fitness: list[float]  # (M,)
    tied_prompts: float  # share of prompts on which all members tie
    changed: float  # share of completions that differ from theta's
    broken: dict[str, float]  # shares of completions: empty, clipped, non-finite
    failures: int  # rewards that failed

    @property
    def broken_share(self) -> float:
        """Share of completions with any fault (a completion has at most one)."""
        return math.fsum(self.broken.values())

    @property
    def mean(self) -> float:
        """Mean fitness of the members that a reward applied to."""
        known = [value for value in self.fitness if value == value]
        return math.fsum(known) / len(known) if known else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation of the fitness."""
        known = [value for value in self.fitness if value == value]
        return float(np.std(known)) if known else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "fitness_mean": self.mean, "fitness_std": self.spread, "fitness_best": max(self.fitness, default=math.nan),
            "fitness": self.fitness, "tied_prompts": self.tied_prompts, "changed": self.changed, "broken": self.broken,
            "reward_failures": self.failures,
        }  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One sigma: what its members answered, and what that predicts."""

    answers: Answers
    outlook: Outlook


@dataclass(frozen=True)
class Probe:
    """The result of a probe."""

    args: ResolvedConfig  # population_size and antithetic are those of the members that answered
    learning_rate: float | None  # as configured; None: to be proposed
    n_rows: int  # training rows
    d: int  # trainable parameters
    theta: Answers
    trials: dict[float, Trial]  # by sigma, ascending
    highest: float  # highest reward of a completion, theta's or a member's

    @property
    def n_members(self) -> int:
        """N."""
        return self.args.population_size

    @property
    def n_prompts(self) -> int:
        """B."""
        return self.args.batch_size

    def is_harmless(self, sigma: float) -> bool:
        """Return whether members break few more answers than theta, and are not far worse than theta."""
        answers, theta = self.trials[sigma].answers, self.theta
        lowest = theta.mean - MOST_HARM * answers.spread - 1e-9 * abs(theta.mean)
        return answers.broken_share <= theta.broken_share + MORE_BROKEN and not answers.mean < lowest

    def rate(self, sigma: float) -> float:
        """Return the configured learning rate, or else that of `allowed_rate`, at most `LARGEST_RATE` sigmas."""
        if self.learning_rate is not None:
            return self.learning_rate
        return min(LARGEST_RATE * sigma, self.trials[sigma].outlook.allowed_rate(self.n_members, self.n_prompts))

    def capped(self, gain: float) -> float:
        """Return a gain of theta, at most up to the highest reward that was seen."""
        headroom = self.highest - self.theta.mean
        return gain if math.isnan(headroom) else min(gain, headroom)

    def gain(self, sigma: float, steps: int, correlation: float | None = None) -> float:
        """Return the net gain of steps with the probe's N and B, at most up to the highest reward that was seen."""
        outlook, rate = self.trials[sigma].outlook, self.rate(sigma)
        return self.capped(outlook.net(rate, self.n_members, self.n_prompts, steps, correlation))


def fault(completion: Completion, text: str) -> str | None:
    """Return the fault of a completion (`non_finite`, `empty`, `clipped`), or None."""
    if not completion.finite:
        return "non_finite"
    if not text.strip():
        return "empty"
    return None if completion.finished else "clipped"


@dataclass
class Population:
    """Members' rollouts and completions; theta alone is a population of one."""

    rollouts: Rollouts  # (M, B, G, F)
    completions: list[Completions]  # (M, B, G)
    weights: Sequence[float]  # (F,)
    rows: np.ndarray = field(init=False)  # (M, B, G), weighted rewards

    def __post_init__(self) -> None:
        filled = fill_failures(self.rollouts.rewards, self.rollouts.failed, self.weights)
        self.rows = weigh(filled, self.weights)

    @property
    def highest(self) -> float:
        """Highest reward; NaN without rewards."""
        return float(np.fmax.reduce(self.rows, axis=None))

    def rewards_of(self, theta: Population) -> np.ndarray:
        """Return theta's weighted rewards (B, G); failures are filled as if theta were one more member."""
        rewards = np.concatenate([self.rollouts.rewards, theta.rollouts.rewards])
        failed = np.concatenate([self.rollouts.failed, theta.rollouts.failed])
        own: np.ndarray = weigh(fill_failures(rewards, failed, self.weights), self.weights)[-1]
        return own


def summarise(evaluator: Evaluator, members: Population, theta: Completions, prompts: Sequence[Any]) -> Answers:
    """Return the statistics of M members' answers, compared with theta's completions (B, G)."""
    theta_ids = [completion.token_ids for row in theta for completion in row]  # (B * G,)
    flat = [[completion for row in member for completion in row] for member in members.completions]  # (M, B * G)
    changed = [done.token_ids != before for member in flat for done, before in zip(member, theta_ids, strict=True)]
    repeated = [prompt for prompt, row in zip(prompts, theta, strict=True) for _ in row]
    faults = [
        fault(done, evaluator.text(prompt, done.token_ids))
        for member in flat
        for prompt, done in zip(repeated, member, strict=True)
    ]
    return Answers(
        fitness=population_fitness(members.rows).tolist(),
        tied_prompts=share_of_tied_prompts(members.rows),
        changed=sum(changed) / len(changed),
        broken={name: faults.count(name) / len(faults) for name in ("empty", "clipped", "non_finite")},
        failures=int(members.rollouts.failed.sum()),
    )


def outlooks(splits: dict[float, Split], antithetic: bool) -> dict[float, Outlook]:
    """Return the outlook of each sigma; the test of agreement counts all sigmas."""
    tables = []
    for split in splits.values():
        table = np.zeros((len(split.odd), len(split.known)))
        table[:, split.known] = split.odd
        tables.append(table)
    probabilities = p_values(tables)
    return {
        sigma: outlook_of(split, sigma, antithetic, p_value)
        for (sigma, split), p_value in zip(splits.items(), probabilities, strict=True)
    }


@dataclass
class _Asker:
    """Lets theta or members answer the rows of a probe."""

    args: ResolvedConfig
    evaluator: Evaluator
    rows: list[dict[str, Any]]  # (B,)
    prompts: Sequence[Prompt]  # (B,)
    weights: Sequence[float]  # (F,)

    def answer(self, perturbations: Sequence[Perturbation | None]) -> Population:
        """Return the scored answers of members, in order; None is theta.

        Raises:
            Interrupted: the probe was asked to stop.
        """
        sampling, size, state = sampling_of(self.args, 0), self.args.group_size, {"global_step": 0, "max_steps": 0}
        checksum, evaluator = self.evaluator.engine.theta_checksum, self.evaluator
        groups = [tuple(range(m, min(m + size, len(perturbations)))) for m in range(0, len(perturbations), size)]
        jobs = [
            GroupJob(group, tuple(perturbations[m] for m in group), checksum, tuple(self.prompts), sampling)
            for group in groups
        ]
        answers = evaluator.submit(jobs, lambda _: (self.rows, state), False)
        started = sorted(answers, key=lambda answer: answer[0])
        done = [
            evaluator.complete(group, scored(future, evaluator.should_stop), sampling.num_generations)
            for _, group, _, future in started
        ]
        return Population(stack(done), [completions for _, _, completions, _ in started], self.weights)


def probe(args: ESConfig, sigmas: Sequence[float] = SIGMAS, members: int | None = None) -> Probe:
    """Let theta and a population at each sigma answer the first step's rows, and return what that shows.

    Args:
        args: the run's configuration.
        sigmas: ascending.
        members: N, default the configuration's; an odd number becomes the next even one.

    Raises:
        UserError: the configuration cannot work, or the probe was stopped.
    """
    task = setup.task_of(args)
    rewards = setup.resolve_rewards(args, None, task)
    rows = setup.resolve_rows(args, None, task, "train", rewards)
    n_members = members or args.population_size
    pairs = dataclasses.replace(args, population_size=n_members + n_members % 2, antithetic=True)
    sized = setup.resolve_config(pairs, len(rows))
    batches = Batches(len(rows), sized.batch_size, sized.seed)
    with ExitStack() as stack_:
        stop = stack_.enter_context(StopRequest())
        pool = stack_.enter_context(setup.reward_pool(sized, rewards.funcs, rewards.names))
        if pool.wants_opponents:
            raise UserError("estune probe scores single completions: it has no use for a reward that compares them")
        engine = setup.load_engine(sized)
        setup.warn_of_changed_engine(sized, engine)
        chosen = [rows[row] for row in batches.rows_for_step(0)]
        prompts = setup.build_prompts(sized, engine, chosen, task is not None)
        resolved = setup.resolve_with_engine(sized, engine, prompts)
        warn_of_inputs(resolved, engine, prompts)
        evaluator = Evaluator(engine, pool, resolved.response_prefix, stop.requested)
        total = (1 + len(sigmas) * resolved.population_size) * len(chosen) * resolved.num_generations
        note(f"{resolved.population_size} members at each sigma and theta: {total:,} completions")
        asker = _Asker(resolved, evaluator, chosen, prompts, rewards.weights)
        try:
            own = asker.answer([None])
            if not are_finite(own.completions[0]):
                raise UserError(broken_model(args.model, engine.facts.dtype))
            theta = summarise(evaluator, own, own.completions[0], prompts)
            found, splits, highest = {}, {}, own.highest
            for sigma in sigmas:
                step = plan_step(dataclasses.replace(resolved, sigma=sigma), batches, 0)
                population = asker.answer(step.perturbations)
                found[sigma] = summarise(evaluator, population, own.completions[0], prompts)
                splits[sigma] = split_pairs(population.rows, population.rewards_of(own))
                highest = float(np.fmax(highest, population.highest))
                note(f"sigma {sigma:g} tried")
        except Interrupted:
            raise UserError("the probe was stopped") from None
        d = sum(math.prod(spec.shape) for spec in engine.specs if spec.perturbed)
        predicted = outlooks(splits, args.antithetic)
    trials = {sigma: Trial(found[sigma], predicted[sigma]) for sigma in sigmas}
    return Probe(resolved, args.learning_rate, len(rows), d, theta, trials, highest)
