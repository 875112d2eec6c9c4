"""`estune probe`: measure the effect of several sigmas on a model and a task, before a run.

Theta and eight members at each of six sigmas answer the rows of a run's first step. If sigma is too small, no answer
changes: all members tie, and there is nothing to learn from. If sigma is too large, the model breaks: answers are empty
or never end, or the fitness of the whole population falls. Between the two, members differ in their answers. `propose`
chooses the sigma at which members differ most without harm. This is a rule of thumb: eight members are few, so check
the proposal in a short run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from estune.config import ESConfig, ResolvedConfig
from estune.console import note, print_json, print_result, rounded
from estune.data.batches import Batches
from estune.errors import UserError
from estune.es.fitness import fill_failures, is_tie, population_fitness, weigh
from estune.es.types import Completion, GroupJob, Interrupted, Perturbation
from estune.train import setup
from estune.train.groups import Group, stack
from estune.train.rollouts import Completions, Evaluator, scored
from estune.train.signals import StopRequest
from estune.train.soundness import are_finite, broken_model, warn_of_inputs
from estune.train.step import plan_step, sampling_of

MEMBERS = 8
SIGMAS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MOST_HARM = 1.0  # standard deviations of the members' fitness: how far their mean may lie below theta's fitness
MORE_BROKEN = 0.05  # share of completions: how many more than theta's may be broken
LEAST_CHANGED = 0.1  # share of completions: how many must differ from theta's
FEW_DISTINCT = 0.5  # share of members: if more of them have equal fitness, a larger population is proposed
USUAL_N, LARGER_N = 30, 60


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
            "fitness_mean": _plain(self.mean), "fitness_std": _plain(self.spread),
            "fitness_best": _plain(max(self.fitness, default=math.nan)), "fitness": [_plain(v) for v in self.fitness],
            "tied_prompts": self.tied_prompts, "changed": self.changed, "broken": self.broken,
            "reward_failures": self.failures,
        }  # fmt: skip


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def fault(completion: Completion, text: str) -> str | None:
    """Return the fault of a completion (`non_finite`, `empty`, `clipped`), or None."""
    if not completion.finite:
        return "non_finite"
    if not text.strip():
        return "empty"
    return None if completion.finished else "clipped"


def summarise(
    evaluator: Evaluator, groups: Sequence[Group], answers: Sequence[Completions], theta: Completions,
    prompts: Sequence[Any], weights: Sequence[float],
) -> Answers:  # fmt: skip
    """Return the statistics of M members' scored groups and completions (M, B, G), compared with theta's (B, G)."""
    rollouts = stack(list(groups))
    rewards = weigh(fill_failures(rollouts.rewards, rollouts.failed, weights), weights)  # (M, B, G)
    per_prompt = [column[~np.isnan(column)].tolist() for column in rewards.swapaxes(0, 1)]  # B of (M * G,)
    tied = [is_tie(values) for values in per_prompt if values]
    theta_ids = [completion.token_ids for row in theta for completion in row]  # (B * G,)
    flat = [[completion for row in member for completion in row] for member in answers]  # (M, B * G)
    changed = [done.token_ids != before for member in flat for done, before in zip(member, theta_ids, strict=True)]
    repeated = [prompt for prompt, row in zip(prompts, theta, strict=True) for _ in row]
    faults = [
        fault(done, evaluator.text(prompt, done.token_ids))
        for member in flat
        for prompt, done in zip(repeated, member, strict=True)
    ]
    return Answers(
        fitness=population_fitness(rewards).tolist(),
        tied_prompts=sum(tied) / len(tied) if tied else 1.0,
        changed=sum(changed) / len(changed),
        broken={name: faults.count(name) / len(faults) for name in ("empty", "clipped", "non_finite")},
        failures=int(rollouts.failed.sum()),
    )


def probe(
    args: ESConfig, sigmas: Sequence[float] = SIGMAS, members: int = MEMBERS
) -> tuple[ResolvedConfig, Answers, dict[float, Answers]]:
    """Return the resolved configuration, theta's answers, and the answers of ``members`` members by sigma.

    Raises:
        UserError: the configuration cannot work, or the probe was stopped.
    """
    task = setup.task_of(args)
    rewards = setup.resolve_rewards(args, None, task)
    rows = setup.resolve_rows(args, None, task, "train", rewards)
    args = setup.resolve_config(dataclasses.replace(args, population_size=members, antithetic=False), len(rows))
    batches = Batches(len(rows), args.batch_size, args.seed)
    with ExitStack() as stack_:
        stop = stack_.enter_context(StopRequest())
        pool = stack_.enter_context(setup.reward_pool(args, rewards.funcs, rewards.names))
        engine = setup.load_engine(args)
        setup.warn_of_changed_engine(args, engine)
        chosen = batches.rows_for_step(0)
        rows = [rows[row] for row in chosen]
        prompts = setup.build_prompts(args, engine, rows, task is not None)
        args = setup.resolve_with_engine(args, engine, prompts)
        warn_of_inputs(args, engine, prompts)
        evaluator = Evaluator(engine, pool, args.response_prefix, stop.requested)
        sampling = sampling_of(args, 0)
        state = {"global_step": 0, "max_steps": 0}

        def answer(perturbations: Sequence[Perturbation | None]) -> tuple[list[Group], list[Completions]]:
            job = GroupJob(
                tuple(range(len(perturbations))), tuple(perturbations), engine.theta_checksum, tuple(prompts), sampling
            )
            started = list(evaluator.submit([job], lambda _: rows, state, False))
            done = [
                evaluator.complete(group, scored(future, stop.requested), sampling.num_generations)
                for _, group, _, future in started
            ]
            return done, [completions for _, _, completions, _ in started]

        try:
            groups, [own] = answer([None])
            if not are_finite(own):
                raise UserError(broken_model(args.model, engine.facts.dtype))
            theta = summarise(evaluator, groups, [own], own, prompts, rewards.weights)
            found: dict[float, Answers] = {}
            for sigma in sigmas:
                step = plan_step(dataclasses.replace(args, sigma=sigma), batches, 0)
                groups, answers = [], []
                for first in range(0, members, args.group_size):
                    part = step.members[first : first + args.group_size]
                    scored_groups, completions = answer([Perturbation(member, step.noise) for member in part])
                    groups += scored_groups
                    answers += completions
                found[sigma] = summarise(evaluator, groups, answers, own, prompts, rewards.weights)
                note(f"sigma {sigma:g} tried")
        except Interrupted:
            raise UserError("the probe was stopped") from None
    return args, theta, found


def propose(theta: Answers, found: dict[float, Answers]) -> dict[str, Any]:
    """Return a sigma, a learning rate (sigma / 2, the paper's rule) and N, with the reason in a sentence.

    A sigma is harmless if at most 5 percentage points more completions are broken than theta's, and the members' mean
    fitness lies at most one of their standard deviations below theta's. It has an effect if at least a tenth of the
    completions changed and not all members tie. Of the sigmas with both properties, the one with the largest spread of
    fitness is proposed.
    """
    harmless = [
        sigma
        for sigma, members in found.items()
        if members.broken_share <= theta.broken_share + MORE_BROKEN
        and members.mean >= theta.mean - MOST_HARM * members.spread - 1e-9 * abs(theta.mean)
    ]
    effective = [s for s, members in found.items() if members.changed >= LEAST_CHANGED and not _all_tie(members)]
    both = [sigma for sigma in harmless if sigma in effective]
    if both:
        sigma = max(both, key=lambda s: found[s].spread)
        reason = "members differ most there without harm"
        if len(both) > 1 and is_tie([found[s].spread for s in both]):
            reason = f"the smallest of {len(both)} sigmas at which members differ equally, without harm"
    elif effective:
        sigma = min(effective)
        reason = "the smallest that changes answers; it harms most members, so watch the first steps"
    else:
        sigma = max(harmless, default=min(found))
        reason = "no sigma made members differ: easier prompts, more of them, or a finer reward would help more"
        if not harmless:
            reason = "every sigma tried breaks the members: try smaller ones with --sigmas"
    values = found[sigma].fitness
    most_common = max(sum(is_tie([value, other]) for other in values) for value in values)
    n = LARGER_N if most_common / len(values) > FEW_DISTINCT else USUAL_N
    return {"sigma": sigma, "learning_rate": sigma / 2, "population_size": n, "reason": reason}


def _all_tie(members: Answers) -> bool:
    known = [value for value in members.fitness if value == value]
    return not known or is_tie(known)


def table(theta: Answers, found: dict[float, Answers], proposal: dict[str, Any]) -> str:
    """Return the result as text, one line a sigma."""
    head = (
        f"{'sigma':>8} {'fitness':>10} {'± spread':>9} {'best':>10} {'ties':>6} {'changed':>8} {'empty':>6} "
        f"{'clipped':>8} {'not finite':>10}"
    )
    lines = [head]
    for name, answers in [("theta", theta), *((f"{sigma:g}", answers) for sigma, answers in found.items())]:
        most = max(answers.fitness, default=math.nan)
        broken = answers.broken
        of_members = [f"{answers.spread:.3g}", f"{most:.4g}", f"{answers.tied_prompts:.0%}", f"{answers.changed:.0%}"]
        spread, best, ties, changed = of_members if answers is not theta else ["-"] * 4  # theta is no population
        lines.append(
            f"{name:>8} {answers.mean:>10.4g} {spread:>9} {best:>10} {ties:>6} {changed:>8} {broken['empty']:>6.0%} "
            f"{broken['clipped']:>8.0%} {broken['non_finite']:>10.0%}"
        )
    lines.append(
        f"proposed: --sigma {proposal['sigma']:g} --learning_rate {proposal['learning_rate']:g} "
        f"--population_size {proposal['population_size']} ({proposal['reason']})"
    )
    return "\n".join(lines)


def probe_command(args: ESConfig, sigmas: Sequence[float], as_json: bool) -> int:
    """Probe, and print the answers' statistics and the proposal."""
    if not sigmas or not all(math.isfinite(sigma) and sigma > 0 for sigma in sigmas):
        raise UserError("sigmas must be positive numbers")
    args, theta, found = probe(args, sorted(set(sigmas)))
    proposal = propose(theta, found)
    if as_json:
        points = [{"sigma": sigma, **answers.as_dict()} for sigma, answers in found.items()]
        print_json(rounded({"model": args.model, "task": args.task or args.dataset_name, "members": MEMBERS,
                    "rows": args.batch_size, "theta": theta.as_dict(), "sigmas": points,
                    "proposal": proposal}))  # fmt: skip
    else:
        print_result(table(theta, found, proposal))
    return 0
