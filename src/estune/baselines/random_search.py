"""Random search: members like ES's, the best of all is the result, and nothing is ever updated.

What ES's gain is worth shows against this: it costs the same evaluations and takes the luckiest member. All members of
all steps answer the same prompts, those of the first step, so that their fitness can be compared.
"""

from __future__ import annotations

import json
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
    fitness: float | None = None


def random_search(ground: Ground) -> None:
    """Draw members until the run has ended; leave theta at the best one.

    `best.json` follows a step's metrics, evaluation and checkpoint: a run that is killed begins a step again.

    Raises:
        Interrupted: it was asked to stop.
    """
    args, master = ground.args, ground.engine.master
    batches = Batches(len(ground.train_rows), int(args.batch_size), args.seed)
    base = {name: array.copy() for name, array in master.arrays.items()}
    best = _read(ground)
    ground.keep_method({"method": args.method, "trainer": "estune.random_search", "arguments": {}})
    ground.step_started()
    if ground.ended and ground.steps_done:  # killed before the finished model was written
        ground.use(_theta(ground, batches, best))
    while not ground.ended:
        if ground.should_stop():
            raise Interrupted
        step = plan_step(args, batches, ground.steps_done)
        step = Step(**{**vars(step), "rows": plan_step(args, batches, 0).rows})
        fitness = _fitness(ground, step)  # (N,)
        luckiest = Best() if np.isnan(fitness).all() else Best(step.index, int(np.nanargmax(fitness)))
        if luckiest.member >= 0:
            luckiest.fitness = float(fitness[luckiest.member])
            if best.fitness is None or luckiest.fitness > best.fitness:
                best = luckiest
        ground.use(_theta(ground, batches, best))
        ground.step_done(step.index + 1, {"es/fitness_best": best.fitness})
        ground.trainer_directory.mkdir(exist_ok=True)
        write_json(ground.trainer_directory / STATE_FILE, vars(best))
        ground.progress.keep(ground.trainer_directory)
        if not ground.ended:
            ground.use(base)


def _theta(ground: Ground, batches: Batches, best: Best) -> dict[str, np.ndarray]:
    """Return the weights of a member, by stored name; the engine holds the base."""
    master = ground.engine.master
    if best.step < 0:
        return {name: array.copy() for name, array in master.arrays.items()}
    chosen = plan_step(ground.args, batches, best.step)
    perturbation = chosen.perturbation(chosen.members[best.member])
    return {name: master.perturb(name, perturbation) for name in master.arrays}


def _fitness(ground: Ground, step: Step) -> np.ndarray:
    """Let every member answer the step's rows: fitness (N,)."""
    rows = [ground.train_rows[row] for row in step.rows]
    prompts = [ground.train_prompts[row] for row in step.rows]
    rollouts = _rollouts(ground, [step.perturbation(member) for member in step.members], rows, prompts)
    weights = ground.rewards.weights
    weighed = weigh(fill_failures(rollouts.rewards, rollouts.failed, weights), weights)  # (N, B, G)
    by_prompt = np.moveaxis(weighed, 0, -1)  # (B, G, N): members are what is compared
    ground.note(by_prompt, rollouts.rewards, rollouts.lengths, rollouts.clipped_ratio, int(rollouts.failed.sum()))
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
    return Best(**json.loads(path.read_text(encoding="utf-8")))
