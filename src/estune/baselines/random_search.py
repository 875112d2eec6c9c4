"""Random search: members like ES's, the best of all is the result, and nothing is ever updated.

What ES's gain is worth shows against this: it costs the same evaluations and takes the luckiest member. All members of
all steps answer the same prompts, those of the first step, so that their fitness can be compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from estune import inputs
from estune.baselines.ground import Ground
from estune.data import Batches
from estune.engines.base import Interrupted, Perturbation, Prompt
from estune.files import write_json
from estune.fitness import fill_failures, population_fitness, weigh
from estune.rollouts import Rollouts, scored, stack
from estune.session import Step, plan_step

STATE_FILE = "best.json"


@dataclass
class Best:
    """The best member so far: the step and the place that it was drawn at."""

    step: int = -1
    member: int = -1
    fitness: float = -math.inf


def random_search(ground: Ground) -> None:
    """Draw members until the run has ended; leave theta at the best one.

    Raises:
        Interrupted: it was asked to stop.
    """
    args, master = ground.args, ground.engine.master
    batches = Batches(len(ground.train_rows), int(args.batch_size), args.seed)
    base = {name: array.copy() for name, array in master.arrays.items()}
    best = _read(ground)
    ground.keep_method({"method": args.method, "trainer": "estune.random_search", "arguments": {}})
    ground.step_started()
    while not ground.ended:
        if ground.should_stop():
            raise Interrupted
        step = plan_step(args, batches, ground.steps_done)
        step = Step(**{**vars(step), "rows": plan_step(args, batches, 0).rows})
        fitness = _fitness(ground, step)  # (N,)
        if not np.isnan(fitness).all() and float(np.nanmax(fitness)) > best.fitness:
            best = Best(step.index, int(np.nanargmax(fitness)), float(np.nanmax(fitness)))
        ground.trainer_directory.mkdir(exist_ok=True)
        write_json(ground.trainer_directory / STATE_FILE, {**vars(best), "steps_done": step.index + 1})
        theta = dict(base)
        if best.step >= 0:
            chosen = plan_step(args, batches, best.step)
            perturbation = chosen.perturbation(chosen.members[best.member])
            theta = {name: master.perturb(name, perturbation) for name in base}
        ground.use(theta)
        try:
            ground.step_done(step.index + 1, {"es/fitness_best": best.fitness, "loss": 0.0})
        finally:
            if not ground.ended:
                ground.use(base)


def _fitness(ground: Ground, step: Step) -> np.ndarray:
    """Let every member answer the step's rows: fitness (N,)."""
    rows = [ground.train_rows[row] for row in step.rows]
    prompts = [ground.train_prompts[row] for row in step.rows]
    rollouts = _rollouts(ground, [step.perturbation(member) for member in step.members], rows, prompts)
    weights = ground.rewards.weights
    weighed = weigh(fill_failures(rollouts.rewards, rollouts.failed, weights), weights)  # (N, B, G)
    among_members = np.moveaxis(weighed, 0, -1)  # (B, G, N)
    ground.note(among_members, rollouts.rewards, rollouts.lengths, rollouts.clipped_ratio, int(rollouts.failed.sum()))
    return population_fitness(weighed)


def _rollouts(
    ground: Ground, perturbations: Sequence[Perturbation], rows: Sequence[dict[str, object]], prompts: Sequence[Prompt]
) -> Rollouts:
    sampling = inputs.sampling(ground.args, 0)  # the same random numbers for all members of all steps
    size = int(ground.args.members_per_batch)
    groups = []
    for start in range(0, len(perturbations), size):
        part = perturbations[start : start + size]
        begun = ground.evaluator.start(part, rows, prompts, sampling, ground.trainer_state(), False)
        for group, _, future in begun:
            groups.append(ground.evaluator.finish(group, scored(future, ground.should_stop), sampling.num_generations))
    return stack(groups)


def _read(ground: Ground) -> Best:
    path = ground.trainer_directory / STATE_FILE
    if not ground.steps_done:
        return Best()
    state = json.loads(path.read_text(encoding="utf-8"))
    state.pop("steps_done")
    return Best(**state)
