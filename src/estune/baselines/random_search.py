"""Random search: members like ES's, the best of all is the result, and nothing is ever updated.

What ES's gain is worth shows against this: a step costs the same evaluations and takes the luckiest member. Half of
them go to new members, who answer the step's prompts. On few prompts the best of many owes much to luck, and soon
several have all of them right; so the other half goes to a second look. The step's best member and the best so far
(theta at first) answer the prompts that come next in the run's order, and the member takes the place if its fitness
there is higher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from estune.baselines.session import BaselineSession
from estune.config import ESConfig
from estune.data.batches import Batches
from estune.errors import UserError
from estune.es.fitness import fill_failures, population_fitness, weigh
from estune.es.types import GroupJob, Interrupted, Perturbation
from estune.files import is_number, read_json_object, write_json
from estune.train.rollouts import Group, scored, stack
from estune.train.step import plan_step, sampling_of

STATE_FILE = "best.json"


@dataclass
class Best:
    """The best so far: the step and the place that it was drawn at, negative for theta itself."""

    step: int = -1
    member: int = -1
    fitness: float | None = None  # in its last second look


def sizes(args: ESConfig) -> tuple[int, int]:
    """Return how many members a step draws, and on how many prompts two of them get a second look.

    Together they make at most the N * B * G evaluations of a step of ES, and fewer by one prompt's where those cannot
    be halved; a second look has one prompt at least.
    """
    members = args.population_size // 2
    return members, max(1, (args.population_size - members) * int(args.batch_size) // 2)


def evaluations_per_step(args: ESConfig) -> int:
    """Return the completions that a step of a resolved configuration has scored."""
    members, second = sizes(args)
    return (members * int(args.batch_size) + 2 * second) * args.num_generations


def random_search(session: BaselineSession) -> None:
    """Draw members until the run has ended; leave theta at the best one.

    `best.json` follows a step's metrics, evaluation and checkpoint: a run that is killed begins a step again.

    Raises:
        Interrupted: it was asked to stop.
    """
    args, master = session.args, session.engine.theta
    batches = Batches(len(session.train_rows), int(args.batch_size), args.seed)
    base = {name: array.copy() for name, array in master.arrays.items()}
    best = _read(session)
    session.keep_method({"method": args.method, "trainer": "estune.random_search", "arguments": {}})
    session.step_started()
    if session.ended and session.steps_done:  # killed before the finished model was written
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
        session.progress.keep_beside(session.trainer_directory)
        if not session.ended:
            session.use(base)


def _step(session: BaselineSession, batches: Batches, index: int, best: Best) -> Best:
    """Draw a step's members and return the best so far; the engine holds the base."""
    args = session.args
    members, second = sizes(args)
    step = plan_step(args, batches, index)
    order = Batches(len(session.train_rows), 1, args.seed)
    first = index * (batches.batch_size + second)
    rows = [order.rows_for_step(first + place)[0] for place in range(batches.batch_size + second)]
    drawn = step.perturbations[:members]
    fitness = _fitness(session, drawn, rows[: batches.batch_size], 2 * index)  # (members,)
    # where no reward applied to anybody, the first one is as good as any
    luckiest = 0 if np.isnan(fitness).all() else int(np.nanargmax(fitness))
    contestants = [_perturbation(session, batches, best), drawn[luckiest]]
    then, now = _fitness(session, contestants, rows[batches.batch_size :], 2 * index + 1).tolist()
    if now > then or (np.isnan(then) and not np.isnan(now)):
        return Best(index, luckiest, now)
    return Best(best.step, best.member, None if np.isnan(then) else then)


def _perturbation(session: BaselineSession, batches: Batches, best: Best) -> Perturbation | None:
    """Return what the best so far is to an engine that holds the base; None for the base itself."""
    if best.step < 0:
        return None
    step = plan_step(session.args, batches, best.step)
    return step.perturbations[best.member]


def _theta(session: BaselineSession, batches: Batches, best: Best) -> dict[str, np.ndarray]:
    """Return the weights of the best so far, by stored name; the engine holds the base."""
    master = session.engine.theta
    perturbation = _perturbation(session, batches, best)
    if perturbation is None:
        return {name: array.copy() for name, array in master.arrays.items()}
    return {name: master.perturb(name, perturbation) for name in master.arrays}


def _fitness(
    session: BaselineSession, contestants: Sequence[Perturbation | None], row_ids: Sequence[int], index: int
) -> np.ndarray:
    """Let members (N,), or theta (None), answer rows (B,): fitness (N,), NaN where no reward applied.

    Args:
        session: of the run.
        contestants: all are sampled with the same random numbers.
        row_ids: of the training rows.
        index: of the batch within the run: other numbers give other samples.
    """
    rows = [session.train_rows[row] for row in row_ids]
    prompts = [session.train_prompts[row] for row in row_ids]
    sampling, evaluator = sampling_of(session.args, index), session.evaluator
    size, checksum = int(session.args.members_per_batch), session.engine.checksum()
    jobs = (
        GroupJob(tuple(places), tuple(contestants[place] for place in places), checksum, tuple(prompts), sampling)
        for places in _parts(contestants, size)
    )
    found: dict[int, Group] = {}
    for place, group, _, future in evaluator.submit(jobs, lambda _: rows, session.state(), False):
        found[place] = evaluator.complete(group, scored(future, session.should_stop), sampling.num_generations)
    groups = [found[place] for place in range(len(contestants))]
    rollouts, weights = stack(groups), session.rewards.weights
    weighed = weigh(fill_failures(rollouts.rewards, rollouts.failed, weights), weights)  # (N, B, G)
    by_prompt = np.moveaxis(weighed, 0, -1)  # (B, G, N): members are what is compared
    failures = rollouts.failed.sum(axis=(0, 1, 2))  # (F,)
    session.note(by_prompt, rollouts.rewards, rollouts.lengths, rollouts.clipped_ratio, failures)
    return population_fitness(weighed)


def _parts(contestants: Sequence[Perturbation | None], size: int) -> Iterator[range]:
    """Yield the places of members that answer together, at most ``size``, in order.

    Theta answers alone. So do members of different steps, whose scales may differ.
    """
    scales = {None if one is None else one.noise for one in contestants}
    step = 1 if None in scales or len(scales) > 1 else size
    for start in range(0, len(contestants), step):
        yield range(start, min(start + step, len(contestants)))


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
    """Return whether the best so far, as it was read, is theta or a member that was drawn.

    A run that was killed may have kept a member of the step that it begins again.
    """
    if not all(type(place) is int for place in (best.step, best.member)):
        return False
    if best.fitness is not None and not (is_number(best.fitness) and math.isfinite(best.fitness)):
        return False
    return (best.step, best.member) == (-1, -1) or (0 <= best.step <= steps_done and 0 <= best.member < members)
