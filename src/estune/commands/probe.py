"""`estune probe`: predict, before a run is paid for, whether evolution strategies will learn, and at which sigma.

Theta and one population of pairs at each of several sigmas answer the rows of a run's first step. The pairs' rewards
show three things (`estune.es.forecast`, docs/choosing.md): whether the effects of a perturbation agree between prompts,
what a step gains by that, and what it loses by its random part. From them follow a proposal of sigma, learning rate, N
and B, and a verdict: yes, unlikely, or cannot tell.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from estune.commands.probing import LARGEST_RATE, Probe, probe
from estune.config import ESConfig
from estune.console import counted, print_json, print_result, rounded
from estune.errors import UserError
from estune.es.forecast import LEVEL, LOSS_SHARE, spearman_brown

STEPS = 10  # steps whose gain is predicted
WALK_STEPS = 100  # steps whose random movement is predicted
LEAST_CHANGED = 0.1  # share of completions: if fewer differ from theta's, a larger sigma is the advice
LOW_CORRELATION = 0.05  # correlation between prompts: a task that is surely below has no signal worth its price
FEWEST_MEMBERS, FEWEST_PROMPTS = 16, 4  # least N and B of a proposal
LEAST_GAIN = 0.5  # standard deviations of the members' fitness: what ten steps gain at least for a yes
CERTAIN = 3.5  # standard errors between a correlation and the bound that a second probe should tell it from


@dataclass(frozen=True)
class Proposal:
    """Settings of a run; they are None if no sigma predicts a gain."""

    reason: str
    sigma: float | None = None
    learning_rate: float | None = None
    population_size: int | None = None
    batch_size: int | None = None
    gain: float | None = None  # of the first `STEPS` steps with these settings
    gain_ci95: tuple[float, float] | None = None
    completions: int | None = None  # that these steps cost


def propose(found: Probe) -> Proposal:
    """Return the settings with the largest predicted gain.

    Sigmas with significant agreement come first. Other sigmas must not harm the members. Significant ones may: the
    drift that harm causes is part of the prediction.
    """
    every = [_settings(found, s) for s, trial in found.trials.items() if trial.outlook.gain(found.n_prompts) > 0]
    sure = [given for given in every if found.trials[given.sigma or 0.0].outlook.p_value <= LEVEL]
    others = [given for given in every if found.is_harmless(given.sigma or 0.0)]
    best = max(sure or others, key=lambda given: given.gain or 0.0, default=None)
    if best is None:
        if all(trial.outlook.is_flat for trial in found.trials.values()):
            return Proposal("no member changed any reward")
        return Proposal("no sigma predicts a gain without harm")
    notes = ["the largest gain", *["not significant"] * (not sure)]
    notes += ["members are broken or far worse there: watch the first steps"] * (
        not found.is_harmless(best.sigma or 0.0)
    )
    return dataclasses.replace(best, reason="; ".join(notes))


def _settings(found: Probe, sigma: float) -> Proposal:
    """Return the settings for a sigma that predicts a gain; docs/choosing.md derives them.

    B is the number of prompts at which the ranking reaches a reliability of one half. N is what the largest sensible
    learning rate needs if the drop is two errors larger than measured, and at most the probe's. The learning rate is
    what the drift then allows.
    """
    outlook = found.trials[sigma].outlook
    batch = min(found.n_rows, max(FEWEST_PROMPTS, math.ceil(outlook.agreement.prompts_needed)))
    wanted = LARGEST_RATE * sigma if found.learning_rate is None else found.learning_rate
    error = 0.0 if math.isnan(outlook.drop_error) else outlook.drop_error
    cautious = dataclasses.replace(outlook, drop=outlook.drop + 2 * error)
    needed = math.ceil(min(cautious.members_needed(wanted, batch), found.n_members))
    members = max(needed + needed % 2, min(FEWEST_MEMBERS, found.n_members))
    rate = min(wanted, outlook.allowed_rate(members, batch))
    middle, low, high = (
        found.capped(outlook.net(rate, members, batch, STEPS, correlation))
        for correlation in (None, outlook.agreement.low, outlook.agreement.high)
    )
    completions = STEPS * members * batch * found.args.num_generations
    return Proposal("", sigma, rate, members, batch, middle, (low, high), completions)


@dataclass(frozen=True)
class Verdict:
    """Whether evolution strategies will learn, why, and what to do."""

    answer: str  # yes, unlikely, cannot tell
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (f"verdict: {self.answer}.", self.reason, self.advice)))


def judge(found: Probe, proposal: Proposal) -> Verdict:
    """Return the verdict.

    ``yes`` needs agreement between prompts that chance explains with probability `LEVEL` at most, and a predicted gain
    of `LEAST_GAIN`. ``unlikely`` needs, at every sigma, rewards that no member changed, or a correlation whose
    one-sided bound lies below `LOW_CORRELATION`.
    """
    trials = found.trials
    if all(value != value for trial in trials.values() for value in trial.answers.fitness):
        return Verdict(
            "cannot tell", "No reward applied to any answer of a member.", "Check the reward and its columns."
        )
    if all(trial.outlook.is_flat for trial in trials.values()):
        return Verdict(
            "unlikely", "No member changed any reward, so no step would move theta.", _advice_for_ties(found)
        )
    if all(trial.outlook.n_prompts < 2 for trial in trials.values()):
        return Verdict("cannot tell", "Agreement between prompts needs two or more prompts with rewards.",
                       f"Probe again with --batch_size {_prompts_to_tell(found)}.")  # fmt: skip
    sure = [s for s, trial in trials.items() if trial.outlook.p_value <= LEVEL]
    if sure and proposal.sigma is not None:
        if (proposal.gain or 0.0) >= LEAST_GAIN * trials[proposal.sigma].answers.spread:
            return _yes(found, proposal)
        return _too_little(found, proposal, sure)
    bounds = [0.0 if trial.outlook.is_flat else trial.outlook.agreement.upper for trial in trials.values()]
    if max(bounds) < LOW_CORRELATION:
        return Verdict(
            "unlikely",
            f"At every sigma the effects on two prompts correlate by at most {max(bounds):.2g}: what helps on "
            "one prompt says nothing about others.",
            "Use a reward or prompts that share a direction.",
        )
    prompts = _prompts_to_tell(found)
    advice = f"Probe again with --batch_size {prompts}."
    if prompts > found.n_rows:
        members = math.ceil(found.n_members * (prompts / found.n_rows) ** 2 / 2) * 2
        advice = (
            f"Probe again with more than the {found.n_rows} rows ({prompts}), or with --batch_size {found.n_rows} "
            f"--population_size {members}."
        )
    return Verdict("cannot tell", f"The effects on two prompts may correlate by up to {max(bounds):.2g}, and no sigma "
                   "shows agreement that chance does not explain.", advice)  # fmt: skip


def _too_little(found: Probe, proposal: Proposal, sure: Sequence[float]) -> Verdict:
    """Return the verdict of significant sigmas that promise little gain, with the reason."""
    agreed = f"Members agree between prompts at sigma {_listed(sure)}, but"
    gained = f"a gain of {proposal.gain or 0.0:.2g} in {STEPS} steps"
    if (proposal.gain or 0.0) >= 0.9 * (found.highest - found.theta.mean):
        reason = f"theta is so near the highest reward seen that this leaves {gained}."
        return Verdict("cannot tell", f"{agreed} {reason}", "Use harder prompts or a finer reward.")
    if found.learning_rate is not None:
        reason = f"the learning rate {found.learning_rate:g} promises {gained}."
        return Verdict("cannot tell", f"{agreed} {reason}", "Probe again without --learning_rate.")
    reason = f"they lie so far below theta that drift leaves {gained}."
    return Verdict("cannot tell", f"{agreed} {reason}", f"Probe again with --sigmas below {min(sure):g}.")


def _yes(found: Probe, proposal: Proposal) -> Verdict:
    """Return the verdict of a significant sigma, with the price of the first steps."""
    sigma, (low, high) = proposal.sigma or math.nan, proposal.gain_ci95 or (math.nan, math.nan)
    outlook = found.trials[sigma].outlook
    agreement, tried = outlook.agreement, counted(len(found.trials), "sigma")
    return Verdict(
        "yes",
        f"At sigma {sigma:g} the effects on two prompts correlate by {agreement.correlation:.2g} "
        f"[{agreement.low:.2g}, {agreement.high:.2g}] (p {outlook.p_value:.2g} among {tried}).",
        f"{STEPS} steps as proposed cost {proposal.completions:,} completions and should gain {proposal.gain:.2g} "
        f"[{low:.2g}, {high:.2g}] of reward.",
    )


def _advice_for_ties(found: Probe) -> str:
    """Return what to try where no member changed a reward."""
    trials = found.trials.values()
    if max(trial.answers.changed for trial in trials) < LEAST_CHANGED:
        return f"Nearly all completions equal theta's: try --sigmas above {max(found.trials):g}."
    if not any(map(found.is_harmless, found.trials)):
        return f"All members are broken: try --sigmas below {min(found.trials):g}."
    return "Completions change, and their rewards do not: use a finer reward, easier prompts, or more of them."


def _prompts_to_tell(found: Probe) -> int:
    """Return the number of prompts with which a second probe should tell signal from none.

    The standard error of a correlation falls as 1 / B, and is at least that of independent effects. It should be small
    beside the correlation, or beside what is left to `LOW_CORRELATION`.
    """
    needed = [2.0 * FEWEST_PROMPTS, found.n_prompts + 1.0]
    least = math.sqrt(2 / (found.n_members // 2))  # times 1 / B
    for trial in found.trials.values():
        agreement = trial.outlook.agreement
        if not math.isnan(agreement.correlation):
            gap = max(agreement.correlation, min(LOW_CORRELATION, LOW_CORRELATION - agreement.correlation))
            error = 0.0 if math.isnan(agreement.error) else trial.outlook.n_prompts * agreement.error
            needed.append(CERTAIN * max(error, least) / gap)
    return math.ceil(max(needed))


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:g}" for sigma in sigmas)


def answers_table(found: Probe) -> str:
    """Return what theta and the members answered, as text, one line a sigma."""
    lines = [
        f"{'sigma':>8} {'fitness':>10} {'± spread':>9} {'best':>10} {'ties':>6} {'changed':>8} {'empty':>6} "
        f"{'clipped':>8} {'not finite':>10}"
    ]
    named = [("theta", found.theta), *((f"{sigma:g}", trial.answers) for sigma, trial in found.trials.items())]
    for name, answers in named:
        most = max(answers.fitness, default=math.nan)
        broken = answers.broken
        of_members = [f"{answers.spread:.3g}", f"{most:.4g}", f"{answers.tied_prompts:.0%}", f"{answers.changed:.0%}"]
        spread, best, ties, changed = of_members if answers is not found.theta else ["-"] * 4  # theta is no population
        lines.append(
            f"{name:>8} {answers.mean:>10.4g} {spread:>9} {best:>10} {ties:>6} {changed:>8} {broken['empty']:>6.0%} "
            f"{broken['clipped']:>8.0%} {broken['non_finite']:>10.0%}"
        )
    return "\n".join(lines)


def outlook_table(found: Probe) -> str:
    """Return what the populations predict, as text, one line a sigma."""
    lines = [
        f"{'sigma':>8} {'correlation':>19} {'p':>7} {'reliable':>8} {'drop ± error':>17} {'rate':>8} "
        f"{f'gain of {STEPS} steps':>29} {'N':>6} {'B':>6}"
    ]
    for sigma, trial in found.trials.items():
        outlook, agreement = trial.outlook, trial.outlook.agreement
        if outlook.is_flat or math.isnan(agreement.correlation):
            lines.append(f"{sigma:>8g}   {'no member changed a reward' if outlook.is_flat else 'too few prompts'}")
            continue
        interval = f"[{agreement.low:.2f}, {agreement.high:.2f}]"
        low, middle, high = (found.gain(sigma, STEPS, value) for value in (agreement.low, None, agreement.high))
        rate = found.rate(sigma)
        needed = _count(outlook.members_needed(rate, found.n_prompts)) if outlook.drop > 0 else "any"
        lines.append(
            f"{sigma:>8g} {f'{max(0, agreement.correlation):.2f} {interval}':>19} {outlook.p_value:>7.2g} "
            f"{agreement.reliability(found.n_prompts):>8.2f} {f'{outlook.drop:.2g} ± {outlook.drop_error:.1g}':>17} "
            f"{rate:>8.2g} {f'{middle:.2g} [{low:.2g}, {high:.2g}]':>29} "
            f"{needed:>6} {_count(agreement.prompts_needed):>6}"
        )
    return "\n".join(lines)


def _count(value: float) -> str:
    """Return a number of members or prompts as text, rounded up."""
    return f"{max(1, math.ceil(value)):,}" if value < 1e5 else "many"


def report(found: Probe, proposal: Proposal, verdict: Verdict) -> str:
    """Return the whole result as text."""
    given = "as configured"
    if found.learning_rate is None:
        given = f"that at which drift loses {LOSS_SHARE:.0%} of the gain, at most {LARGEST_RATE:g} sigma"
    lines = [
        f"{found.n_members} members ({found.n_members // 2} pairs) answered {found.n_prompts} prompts at each sigma.",
        "",
        answers_table(found),
        "",
        outlook_table(found),
        "",
        "correlation: of members' effects on two prompts, with its 95 % interval. p: that prompts which share nothing",
        f"agree as much at any of {counted(len(found.trials), 'sigma')}. reliable: share of the ranking beyond chance.",
        f"drop: how far members lie below theta. rate: {given}.",
        "gain: of theta's reward, for this rate, N, B, and the correlation's interval; up to the highest reward seen.",
        f"N: members with which drift loses {LOSS_SHARE:.0%} of the gain. B: prompts for a reliability of one half.",
        "",
    ]
    told = [f"proposed: nothing ({proposal.reason})", str(verdict)]
    if proposal.sigma is not None:
        told[0] = (
            f"proposed: --sigma {proposal.sigma:g} --learning_rate {proposal.learning_rate:.2g} "
            f"--population_size {proposal.population_size} --batch_size {proposal.batch_size} ({proposal.reason})"
        )
    for text in told:
        lines += textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def outlook_values(found: Probe, sigma: float) -> dict[str, Any]:
    """Return a sigma's predictions as plain values, for JSON."""
    outlook, n, b = found.trials[sigma].outlook, found.n_members, found.n_prompts
    agreement, rate = outlook.agreement, found.rate(sigma)
    interval = [agreement.low, agreement.high]
    return {
        "correlation": max(0.0, agreement.correlation), "correlation_estimate": agreement.correlation,
        "correlation_error": agreement.error, "correlation_ci95": interval, "correlation_bound": agreement.upper,
        "p_value": outlook.p_value,
        "prompts": outlook.n_prompts, "reliability": agreement.reliability(b),
        "reliability_ci95": [spearman_brown(value, b) for value in interval],
        "reliability_even": outlook.even_reliability, "effect_variance": outlook.odd.shared,
        "prompt_noise": outlook.odd.noise, "drop": outlook.drop, "drop_error": outlook.drop_error,
        "drop_is_significant": abs(outlook.drop) > 2 * outlook.drop_error,
        "learning_rate": rate, "allowed_learning_rate": outlook.allowed_rate(n, b),
        "gain_per_rate": outlook.gain(b), "loss_per_squared_rate": outlook.drift(n, b),
        "gain_of_1_step": found.gain(sigma, 1), f"gain_of_{STEPS}_steps": found.gain(sigma, STEPS),
        f"gain_of_{STEPS}_steps_ci95": [found.gain(sigma, STEPS, value) for value in interval],
        "members_needed": outlook.members_needed(rate, b), "prompts_needed": agreement.prompts_needed,
        f"random_norm_of_{WALK_STEPS}_steps": outlook.walk(rate, n, b, WALK_STEPS) * sigma * math.sqrt(found.d),
        f"random_perturbations_of_{WALK_STEPS}_steps": outlook.walk(rate, n, b, WALK_STEPS),
        "is_harmless": found.is_harmless(sigma),
    }  # fmt: skip


def probe_command(args: ESConfig, sigmas: Sequence[float], as_json: bool) -> int:
    """Probe, and print the answers' statistics, the predictions, the proposal and the verdict."""
    if not sigmas or not all(math.isfinite(sigma) and sigma > 0 for sigma in sigmas):
        raise UserError("sigmas must be positive numbers")
    found = probe(args, sorted(set(sigmas)))
    proposal = propose(found)
    verdict = judge(found, proposal)
    if as_json:
        args = found.args
        points = [{"sigma": sigma, **trial.answers.as_dict(), **outlook_values(found, sigma)}
                  for sigma, trial in found.trials.items()]  # fmt: skip
        print_json(rounded({"model": args.model, "task": args.task or args.dataset_name, "members": found.n_members,
                    "rows": args.batch_size, "parameters": found.d, "highest_reward": found.highest,
                    "theta": found.theta.as_dict(), "sigmas": points, "proposal": dataclasses.asdict(proposal),
                    "verdict": dataclasses.asdict(verdict)}))  # fmt: skip
    else:
        print_result(report(found, proposal, verdict))
    return 0
