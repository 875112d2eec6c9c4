"""Random search: draw members as ES does and return the best of them, without any update.

Random search is the control for ES: one step costs as many evaluations as a step of ES. One half of the evaluations
goes to new members, which answer the step's prompts. The best of many members on few prompts is mostly lucky, so the
other half compares two candidates on new prompts: the step's best member and the best member so far (theta at first)
answer the next prompts in the run's order. The new member replaces the best so far if its fitness there is higher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from estune.baselines.session import BaselineSession
from estune.config import SizedConfig
from estune.data.batches import Batches
from estune.errors import UserError
from estune.es.fitness import fill_failures, population_fitness, weigh
from estune.es.types import GroupJob, Interrupted, Perturbation
from estune.files import is_number, read_json_object, write_json
from estune.train.groups import Group, stack
from estune.train.rollouts import scored
from estune.train.step import plan_step, sampling_of

STATE_FILE = "best.json"  # the best member so far, in the trainer's directory


@dataclass
class Best:
    """The best member so far: its step and its index in the step; both are -1 for theta."""

    step: int = -1
    member: int = -1
    fitness: float | None = None  # in its latest comparison


def sizes(args: SizedConfig) -> tuple[int, int]:
    """Return the number of members that a step draws, and the number of prompts of its comparison.

    Both together cost at most the N * B * G evaluations of a step of ES; an odd number of prompts is rounded down. A
    comparison has at least one prompt.
    """
    members = args.population_size // 2
    return members, max(1, (args.population_size - members) * args.batch_size // 2)


def evaluations_per_step(args: SizedConfig) -> int:
    """Return the number of completions that a step scores."""
    members, compared = sizes(args)
    return (members * args.batch_size + 2 * compared) * args.num_generations


def random_search(session: BaselineSession) -> None:
    """Draw members until the run has ended; the engine then holds the best member's weights.

    A step writes `best.json` after its metrics, evaluation and checkpoint, so a resume repeats an interrupted step.

    Raises:
        Interrupted: the run was asked to stop.
    """
    args, theta = session.args, session.engine.theta
    batches = Batches(len(session.train_rows), args.batch_size, args.seed)
    base = {name: array.copy() for name, array in theta.arrays.items()}
    best = _read(session)
    session.write_method({"method": args.method, "trainer": "estune.random_search", "arguments": {}})
    session.step_started()
    if session.ended and session.steps_done:  # the process was killed before it wrote the finished model
        session.use(_theta(session, batches, best))
    while not session.ended:
        if session.should_stop():
            raise Interrupted
        index = session.steps_done
        best = _step(session, batches, index, best)
        session.use(_theta(session, batches, best))
        session.step_done(index + 1, {"es/fitness_best": best.fitness})
        session.trainer_directory.mkdir(exist_ok=True)
        write_json(session.trainer_directory / STATE_FILE, vars(best))
        session.progress.write_unhashed(session.trainer_directory)
        if not session.ended:
            session.use(base)


def _step(session: BaselineSession, batches: Batches, index: int, best: Best) -> Best:
    """Draw a step's members, compare the best one with ``best``, and return the better; the engine holds the base."""
    args = session.args
    members, compared = sizes(args)
    step = plan_step(args, batches, index)
    order = Batches(len(session.train_rows), 1, args.seed)
    first = index * (batches.batch_size + compared)
    rows = [order.rows_for_step(first + place)[0] for place in range(batches.batch_size + compared)]
    drawn = step.perturbations[:members]
    fitness = members_fitness(session, drawn, rows[: batches.batch_size], 2 * index)  # (members,)
    # without any reward the first member is the candidate
    candidate = 0 if np.isnan(fitness).all() else int(np.nanargmax(fitness))
    pair = [_perturbation(session, batches, best), drawn[candidate]]
    old, new = members_fitness(session, pair, rows[batches.batch_size :], 2 * index + 1).tolist()
    if new > old or (np.isnan(old) and not np.isnan(new)):
        return Best(index, candidate, new)
    return Best(best.step, best.member, None if np.isnan(old) else old)


def _perturbation(session: BaselineSession, batches: Batches, best: Best) -> Perturbation | None:
    """Return the perturbation of the base that gives the best member; None for the base itself."""
    if best.step < 0:
        return None
    step = plan_step(session.args, batches, best.step)
    return step.perturbations[best.member]


def _theta(session: BaselineSession, batches: Batches, best: Best) -> dict[str, np.ndarray]:
    """Return the weights of the best member, by stored name; the engine holds the base."""
    theta = session.engine.theta
    perturbation = _perturbation(session, batches, best)
    if perturbation is None:
        return {name: array.copy() for name, array in theta.arrays.items()}
    return {name: theta.perturb(name, perturbation) for name in theta.arrays}


def members_fitness(
    session: BaselineSession, members: Sequence[Perturbation | None], row_ids: Sequence[int], index: int
) -> np.ndarray:
    """Return the fitness (N,) of members on training rows; NaN where no reward applies.

    Args:
        session: of the run.
        members: (N,); None stands for theta. All use the same random numbers.
        row_ids: (B,), indices of training rows.
        index: number of the batch within the run; it selects the random numbers.
    """
    rows = [session.train_rows[row] for row in row_ids]
    prompts = [session.train_prompts[row] for row in row_ids]
    sampling, evaluator = sampling_of(session.args, index), session.evaluator
    checksum = session.engine.theta_checksum
    jobs = (
        GroupJob(tuple(batch), tuple(members[index] for index in batch), checksum, tuple(prompts), sampling)
        for batch in _batches(members, session.args.group_size)
    )
    groups: dict[int, Group] = {}
    for member, group, _, future in evaluator.submit(jobs, lambda _: rows, session.state(), False):
        groups[member] = evaluator.complete(group, scored(future, session.should_stop), sampling.num_generations)
    rollouts, weights = stack([groups[member] for member in range(len(members))]), session.rewards.weights
    weighed = weigh(fill_failures(rollouts.rewards, rollouts.failed, weights), weights)  # (N, B, G)
    by_prompt = np.moveaxis(weighed, 0, -1)  # (B, G, N): members compete with one another
    failures = rollouts.failed.sum(axis=(0, 1, 2))  # (F,)
    session.measure(by_prompt, rollouts.rewards, rollouts.lengths, rollouts.clipped_ratio, failures)
    return population_fitness(weighed)


def _batches(members: Sequence[Perturbation | None], size: int) -> Iterator[range]:
    """Yield the indices of members that answer together, at most ``size``, in order.

    Theta answers alone, and so do members with different noise, because a batch has one noise scale.
    """
    noises = {None if member is None else member.noise for member in members}
    step = 1 if None in noises or len(noises) > 1 else size
    for start in range(0, len(members), step):
        yield range(start, min(start + step, len(members)))


def _read(session: BaselineSession) -> Best:
    path = session.trainer_directory / STATE_FILE
    if not session.steps_done:
        return Best()
    try:
        best = Best(**read_json_object(path))
    except (OSError, ValueError, TypeError):
        best = None
    if best is None or not _is_drawn(best, session.steps_done, sizes(session.args)[0]):
        raise UserError(f"{path} is missing or damaged; delete {path.parent} to begin again from step 0")
    return best


def _is_drawn(best: Best, steps_done: int, members: int) -> bool:
    """Return whether a stored best member is theta or a member of the first ``steps_done`` + 1 steps.

    A killed run may have stored a member of the step that the resume repeats.
    """
    if not all(type(place) is int for place in (best.step, best.member)):
        return False
    if best.fitness is not None and not (is_number(best.fitness) and math.isfinite(best.fitness)):
        return False
    return (best.step, best.member) == (-1, -1) or (0 <= best.step <= steps_done and 0 <= best.member < members)
