"""The plan of one training step: rows, members and noise, a pure function of configuration, index and schedules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from estune.config import ESConfig, SizedConfig
from estune.data.batches import Batches
from estune.es.population import members_for_step, noise_of
from estune.es.step_control import UNKNOWN, Evidence, Forecast
from estune.es.types import Member, Noise, Perturbation, Sampling
from estune.es.update import Factors, Update, make_update, scheduled


@dataclass(frozen=True)
class Step:
    """A step before it is evaluated: its rows, its members, and the learning rate of its update."""

    index: int  # 0 for the first step
    rows: list[int]  # (B,), indices of training rows
    members: list[Member]  # (N,)
    sigma: float
    noise: Noise
    learning_rate: float  # after the schedule, before step control
    weight_decay: float = 0.0
    anchored: bool = False  # True: weight decay pulls towards theta_0; False: towards 0
    factor: float = 1.0  # of the learning rate, by step control
    factors: Factors | None = None  # of the schedules, if not of the index alone; the journal stores them
    evidence: Evidence = UNKNOWN  # what the step's rewards say about the ranking of its members
    expected: Forecast = Forecast(math.nan, math.nan)  # by this step's evidence alone

    @property
    def perturbations(self) -> list[Perturbation]:
        """The members with their noise, in the form that an engine takes, (N,)."""
        return [Perturbation(member, self.noise) for member in self.members]

    def update(self, utilities: Sequence[float]) -> Update:
        """Return the step's update from the members' utilities (N,); with the factor 0, theta stays as it is."""
        return make_update(
            self.members,
            utilities if self.factor else [0.0] * len(utilities),
            self.learning_rate * self.factor,
            weight_decay=self.weight_decay,
            anchored=self.anchored,
            distribution=self.noise.distribution,
            rank=self.noise.rank,
        )


def follows_time(args: ESConfig) -> bool:
    """Return whether the run's schedules depend on time: they fall, and ``max_time_s`` may end the run."""
    return bool(args.max_time_s) and args.has_falling_schedule


def schedule_factors(args: ESConfig, index: int, train_time_s: float = 0.0) -> Factors:
    """Return the factors of the schedules for a step.

    With ``max_time_s`` the schedules are read at the larger share of the run: of ``max_steps`` or of ``max_time_s``.

    Args:
        args: the configuration.
        index: of the step.
        train_time_s: seconds that the steps before it took.
    """
    at: float = index
    if follows_time(args):
        at = max(index, args.max_steps * train_time_s / args.max_time_s)
    return Factors(
        learning_rate=scheduled(args.lr_scheduler_type, at, args.max_steps, args.warmup_steps),
        sigma=scheduled(args.sigma_scheduler_type, at, args.max_steps),
    )


def plan_step(args: SizedConfig, batches: Batches, index: int, factors: Factors | None = None) -> Step:
    """Return the step with this index; the schedules scale sigma and the learning rate.

    ``factors`` are those of the schedules; by default they depend on the index alone.
    """
    by_steps = schedule_factors(args, index)
    factors = by_steps if factors is None else factors
    sigma = args.sigma * factors.sigma
    return Step(
        index=index,
        rows=batches.rows_for_step(index),
        members=members_for_step(args.seed, index, args.population_size, args.antithetic),
        sigma=sigma,
        noise=noise_of(sigma, args.noise_distribution, args.rank if args.noise == "lowrank" else 0),
        learning_rate=args.step_rate * factors.learning_rate,
        weight_decay=args.weight_decay,
        anchored=args.weight_decay_anchor == "base",
        factors=factors if follows_time(args) or factors != by_steps else None,
    )


def sampling_of(args: ESConfig, step: int) -> Sampling:
    """Return the decoding settings of a training step."""
    return Sampling(
        seed=args.seed,
        step=step,
        max_completion_length=args.max_completion_length,
        num_generations=args.num_generations,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        stop_strings=tuple(args.stop_strings),
    )


def progress_of(args: SizedConfig, steps_done: int, n_rows: int) -> dict[str, Any]:
    """Return the ``trainer_state`` that reward functions receive after ``steps_done`` steps on ``n_rows`` rows."""
    epoch = steps_done * args.batch_size / n_rows
    return {"global_step": steps_done, "max_steps": args.max_steps, "epoch": epoch}


def evaluation_sampling(args: ESConfig) -> Sampling:
    """Return the decoding settings of a run's evaluations: greedy, or with ``eval_greedy`` off those of training."""
    if args.method == "es" and not args.eval_greedy:
        return sampling_of(args, 0)
    return dataclasses.replace(sampling_of(args, 0), num_generations=1, temperature=0.0, top_p=1.0, top_k=0)
