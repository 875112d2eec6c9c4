"""`estune plan`: the time, memory and price of a run, from a calibration of half a minute on this machine.

The calibration does what a run does: members of the first steps answer the rows of these steps, rewards are computed,
theta answers held-out rows, and theta moves. A step then costs its N members' answers, the wait for the last rewards,
and one update. Completions may become longer or shorter during a run. The plan assumes the lengths of its start, and
also gives the time if every completion had the largest length.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from estune.commands.results import print_values
from estune.config import ESConfig, ResolvedConfig
from estune.console import note
from estune.data.batches import Batches
from estune.engines.base import Engine
from estune.errors import UserError
from estune.es.types import GroupJob, Interrupted, Prompt, num_parameters
from estune.train import setup
from estune.train.evaluation import of_evaluations
from estune.train.rollouts import Evaluator, answers_of_theta, missing_jobs, scored
from estune.train.signals import StopRequest
from estune.train.step import evaluation_sampling, plan_step, sampling_of

CALIBRATION_S = 20.0  # seconds in which members answer
GIB = 1 << 30


@dataclass(frozen=True)
class Calibration:
    """What was measured."""

    load_s: float  # to load the engine, or to start the workers
    group_s: float  # wall time of one group of members, with all workers at work
    groups: int  # groups measured
    score_wait_s: float  # after the last group's answers, until its rewards are there
    update_s: float
    row_s: float  # wall time of one held-out row that theta answers; 0 without evaluations
    mean_length: float  # tokens of a completion
    longest_share: float  # share of completions that max_completion_length cut off
    n_held_out: int  # rows of one evaluation
    engine_bytes: int  # largest memory of this process so far


def plan(args: ESConfig) -> tuple[ResolvedConfig, Calibration, Engine]:
    """Load the engine, calibrate, and return the resolved configuration, the measurements and the engine.

    Raises:
        UserError: the configuration cannot work, or the calibration was stopped.
    """
    task = setup.task_of(args)
    rewards = setup.resolve_rewards(args, None, task)
    rows = setup.resolve_rows(args, None, task, "train", rewards)
    held_out = setup.resolve_rows(args, None, task, "validation", rewards) if args.eval_steps else []
    sized = setup.resolve_config(args, len(rows))
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        pool = stack.enter_context(setup.reward_pool(sized, rewards.funcs, rewards.names))
        started = time.perf_counter()
        engine = setup.load_engine(sized)
        load_s = time.perf_counter() - started
        prompts = setup.build_prompts(sized, engine, rows, task is not None)
        eval_prompts = setup.build_prompts(sized, engine, held_out[: args.eval_rows or None], task is not None)
        resolved = setup.resolve_with_engine(sized, engine, prompts)
        evaluator = Evaluator(engine, pool, resolved.response_prefix, stop.requested)
        note(f"calibrating for about {CALIBRATION_S:.0f} s")
        try:
            measured = _calibrate(resolved, evaluator, rows, prompts, eval_prompts)
        except Interrupted:
            raise UserError("the calibration was stopped") from None
    return resolved, dataclasses.replace(measured, load_s=load_s), engine


def _jobs(args: ResolvedConfig, engine: Engine, prompts: Sequence[Prompt]) -> Iterator[tuple[list[int], GroupJob]]:
    """Yield the groups of the first step, then of the second, ..., each with its rows; theta stays as it is."""
    batches = Batches(len(prompts), args.batch_size, args.seed)
    for index in itertools.count():
        step = plan_step(args, batches, index)
        asked = [prompts[row] for row in step.rows]
        sampling = sampling_of(args, index)
        size, theta_joins = args.group_size, args.step_control == "drift"
        for job in missing_jobs((), step.perturbations, engine.theta_checksum, asked, sampling, size, theta_joins):
            yield step.rows, job


def _groups_per_step(args: ResolvedConfig) -> int:
    """Return the number of groups that answer in a step; theta is one of its own if members answer one by one."""
    return math.ceil(args.population_size / args.group_size) + (args.step_control == "drift" and args.group_size == 1)


@dataclass
class _Answers:
    """The times and lengths of groups that members have answered."""

    group_s: list[float] = field(default_factory=list)  # seconds a group
    wait_s: list[float] = field(default_factory=list)  # seconds from the last answer to its rewards
    lengths: list[int] = field(default_factory=list)  # tokens
    finished: list[bool] = field(default_factory=list)


def _answer(
    args: ResolvedConfig,
    evaluator: Evaluator,
    rows: list[dict[str, Any]],
    asked: Sequence[tuple[list[int], GroupJob]],
    into: _Answers,
) -> None:
    """Let members answer groups, as `_jobs` yields them, and score them; add times and lengths to ``into``."""
    jobs, rows_of = [], {}
    for number, (chosen, job) in enumerate(asked):
        first = number * args.population_size  # groups of several steps have members of the same index
        indices = tuple(range(first, first + len(job.indices)))
        jobs.append(dataclasses.replace(job, indices=indices))
        rows_of[indices] = [rows[row] for row in chosen]
    state = {"global_step": 0, "max_steps": args.max_steps}
    started = time.perf_counter()
    submitted = list(evaluator.submit(jobs, lambda job: (rows_of[job.indices], state), False))
    answered = time.perf_counter()
    for _, group, _, future in submitted:
        evaluator.complete(group, scored(future, evaluator.should_stop), args.num_generations)
        into.lengths.extend(length for row in group.lengths for length in row)
        into.finished.extend(done for row in group.finished for done in row)
    into.group_s.append((answered - started) / len(asked))
    into.wait_s.append(time.perf_counter() - answered)


def _calibrate(
    args: ResolvedConfig,
    evaluator: Evaluator,
    rows: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
) -> Calibration:
    """Measure members' answers, a held-out answer and an update; ``load_s`` is left at 0."""
    engine = evaluator.engine
    upcoming = _jobs(args, engine, prompts)
    wave = max(1, args.num_workers)  # groups that are answered at once
    per_step = _groups_per_step(args)
    first, answers = _Answers(), _Answers()
    began = time.perf_counter()
    _answer(args, evaluator, rows, list(itertools.islice(upcoming, wave)), first)  # compiles kernels and fills caches
    left_s = CALIBRATION_S
    while left_s > 0 and (answers.group_s or time.perf_counter() - began < CALIBRATION_S):
        expected_s = (answers.group_s or first.group_s)[-1]
        count = max(wave, min(per_step, int(left_s / max(expected_s, 1e-3)) // wave * wave))
        _answer(args, evaluator, rows, list(itertools.islice(upcoming, count)), answers)
        left_s = CALIBRATION_S - (time.perf_counter() - began)
    answers = answers if answers.group_s else first
    unit = 1 if sys.platform == "darwin" else 1024
    return Calibration(
        load_s=0.0,
        group_s=statistics.median(answers.group_s),
        groups=len(answers.group_s),
        score_wait_s=statistics.median(answers.wait_s),
        update_s=_update_s(args, engine, len(prompts)),
        row_s=_row_s(args, evaluator, eval_prompts),
        mean_length=statistics.fmean(answers.lengths),
        longest_share=1 - statistics.fmean(answers.finished),
        n_held_out=len(eval_prompts),
        engine_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    )


def _row_s(args: ResolvedConfig, evaluator: Evaluator, prompts: Sequence[Prompt]) -> float:
    """Return the seconds that theta takes for a held-out row; 0 without rows."""
    few = list(prompts[: args.prompts_per_batch])
    if not few:
        return 0.0
    started = time.perf_counter()
    answers_of_theta(evaluator.engine, few, of_evaluations(evaluation_sampling(args)), evaluator.should_stop)
    return (time.perf_counter() - started) / len(few) / max(1, args.num_workers)


def _update_s(args: ResolvedConfig, engine: Engine, n_rows: int) -> float:
    """Return the seconds of an update; theta moves, and nothing saves it."""
    step = plan_step(args, Batches(n_rows, args.batch_size, args.seed), 0)
    update = step.update([1.0 if n % 2 else -1.0 for n in range(len(step.members))])
    engine.apply(update)  # compiles kernels
    started = time.perf_counter()
    engine.apply(update)
    return time.perf_counter() - started


def estimate(args: ResolvedConfig, measured: Calibration) -> dict[str, float]:
    """Return seconds per step, of all evaluations, of the run, and of a run with the longest completions.

    Saving is not counted.

    At its start a run answers one group twice, and theta answers the rows of the first step and of evaluation steps.

    Args:
        args: the run's configuration.
        measured: the calibration.
    """
    groups = _groups_per_step(args)
    answer_s = groups * measured.group_s
    step_s = answer_s + measured.score_wait_s + measured.update_s
    longer = args.max_completion_length / max(measured.mean_length, 1.0)
    evaluations = 1 + math.ceil(args.max_steps / args.eval_steps) if args.eval_steps else 0
    evaluation_s = evaluations * (measured.n_held_out + args.batch_size) * measured.row_s
    return {
        "step_s": step_s,
        "evaluation_s": evaluation_s,
        "run_s": (run_s := measured.load_s + 2 * measured.group_s + args.max_steps * step_s + evaluation_s),
        "longest_run_s": run_s + max(0.0, longer - 1) * (args.max_steps * answer_s + evaluation_s),
    }


def halving(args: ResolvedConfig, measured: Calibration, times: dict[str, float]) -> list[str]:
    """Return what would make the run about half as long, as sentences, the largest part of a step first."""
    answer_s = times["step_s"] - measured.update_s - measured.score_wait_s
    found = []
    if measured.update_s > 0.5 * times["step_s"]:
        found.append(f"the update takes most of a step: N {args.population_size // 2} or more num_threads")
    if measured.score_wait_s > 0.25 * times["step_s"]:
        found.append("rewards take longer than the answers: more reward_workers")
    if answer_s > 0.5 * times["step_s"]:
        workers = max(1, args.num_workers)
        found.append(f"num_workers {2 * workers} on machines of their own: answers in half of the time")
        if args.noise == "full":
            found.append("noise lowrank: members share forward passes")
        found.append(f"batch_size {max(1, args.batch_size // 2)} or population_size {args.population_size // 2}")
        if measured.longest_share > 0.5:
            found.append(
                f"{measured.longest_share:.0%} of the completions end at max_completion_length: a lower limit, or "
                "stop_strings"
            )
    return found


def memory(args: ResolvedConfig, engine: Engine, measured: Calibration) -> dict[str, float]:
    """Return GiB for each worker: theta and the model's weights; and, without workers, the peak of this process."""
    n = num_parameters(engine.specs)
    bytes_each = 4 if args.dtype == "float32" else 2
    shared = args.noise == "lowrank" and args.dtype == "float32" and args.engine == "hf" and args.device == "cpu"
    parts = {"theta_gib": 4 * n / GIB, "weights_gib": 0.0 if shared else bytes_each * n / GIB}
    if not args.num_workers:
        parts["peak_gib"] = measured.engine_bytes / GIB
    return parts


def plan_command(args: ESConfig, price: float | None, as_json: bool) -> int:
    """Calibrate and print the plan; ``price`` is that of an hour of all workers.

    Raises:
        UserError: the price is no amount, or the configuration cannot work.
    """
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"price must be a number from 0, not {price}")
    resolved, measured, engine = plan(args)
    times = estimate(resolved, measured)
    result: dict[str, Any] = {
        "parameters": num_parameters(engine.specs),
        "members_per_batch": resolved.group_size,
        **memory(resolved, engine, measured),
        "tokens_per_completion": measured.mean_length,
        "group_s": measured.group_s,
        "update_s": measured.update_s,
        **times,
        "hours": times["run_s"] / 3600,
    }
    if price is not None:
        result["price"] = price * result["hours"]
    for number, sentence in enumerate(halving(resolved, measured, times), 1):
        result[f"faster_{number}"] = sentence
    print_values(result, as_json)
    return 0
