"""Random search: draw members as ES does and return the best of them, without any update.

Random search is the control for ES: one step costs as many evaluations as a step of ES. One half of the evaluations
goes to new members, which answer the step's prompts. The best of many members on few prompts is mostly lucky, so the
other half compares two candidates on new prompts: the step's best member and the best member so far (theta at first)
answer the next prompts in the run's order. The new member replaces the best so far if its fitness there is higher.

The method `random_vote` is the same search. It also ranks the members that it drew, and `method.json` holds the seeds
of the best ones. They vote on each answer (the idea of arXiv 2603.12228) when a comparison measures the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from estune.baselines.session import BaselineSession
from estune.config import ESConfig, SizedConfig
from estune.data.batches import Batches
from estune.errors import UserError, nearest
from estune.es.fitness import fill_failures, population_fitness, weigh
from estune.es.types import GroupJob, Interrupted, Member, Noise, Perturbation
from estune.files import is_number, read_json_object, write_json
from estune.run.saved_config import Trainer, Vote, Voter
from estune.tasks import get_task
from estune.train.groups import Group, stack
from estune.train.rollouts import scored
from estune.train.step import plan_step, sampling_of

STATE_FILE = "best.json"  # the best member so far, in the trainer's directory
VOTE_MEMBERS = 8  # members that vote, by default


@dataclass
class Best:
    """The best member so far: its step and its index in the step; both are -1 for theta."""

    step: int = -1
    member: int = -1
    fitness: float | None = None  # in its latest comparison


@dataclass(frozen=True)
class Ranked:
    """A member's place among those that may vote; a member with a second look is before all others."""

    step: int
    member: int
    looks: int  # 2: ``fitness`` is of the second look; 1: of the first, minus the mean of the step's members
    fitness: float


def majority(answers: Sequence[str | None], equal: Callable[[str, str], bool] = operator.eq) -> list[int]:
    """Return the indices of the members with the most frequent answer, best first; an empty list without any answer.

    Of equally frequent answers, the one that the best of these members gave wins.

    Args:
        answers: (K,), of the members, best first; None: the member gives no answer and does not vote.
        equal: whether two answers are equal.
    """
    groups: list[tuple[str, list[int]]] = []  # an answer, and the members that gave it
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        members = next((members for first, members in groups if equal(first, answer)), None)
        if members is None:
            groups.append((answer, [index]))
        else:
            members.append(index)
    return max((members for _, members in groups), key=len, default=[])  # of the longest, the first


def vote_members(args: ESConfig) -> int:
    """Return how many members vote; 0 for random search.

    Raises:
        UserError: `method_kwargs` holds something else.
    """
    if args.method != "random_vote":
        return 0
    for name in args.method_kwargs:
        if name != "vote_members":
            raise UserError(f"method random_vote has no argument {name!r}{nearest(name, ['vote_members'])}")
    members = args.method_kwargs.get("vote_members", VOTE_MEMBERS)
    if type(members) is not int or members < 2:
        raise UserError(f"vote_members must be an integer of 2 or more, not {members!r}")
    return members


def check_vote(args: ESConfig) -> None:
    """Check that the members of a search can vote.

    Raises:
        UserError: too few members are drawn, or the task has no final answer that can be counted.
    """
    members, drawn = vote_members(args), args.population_size // 2 * args.max_steps
    if members > drawn:
        raise UserError(f"vote_members is {members}, and the search draws {drawn} members")
    task = None if args.task is None else get_task(args.task, args.allow_unsandboxed_code)
    if task is None or task.final_answer is None:
        what = "rewards without a task have" if task is None else f"task {task.name} has"
        raise UserError(f"method random_vote counts equal answers, and {what} no final answer to count")


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
    best, ranked = _read(session)
    voting = vote_members(args)
    method: Trainer = {"method": args.method, "trainer": "estune.random_search", "arguments": {}}
    if voting:
        method["estune"] = {"vote_members": voting}
    session.write_method(method)
    session.step_started()
    if session.ended and session.steps_done:  # the process was killed before it wrote the finished model
        session.use(_theta(session, batches, best))
    while not session.ended:
        if session.should_stop():
            raise Interrupted
        index = session.steps_done
        best, drawn = _step(session, batches, index, best)
        ranked = rank(ranked, drawn, voting)
        session.use(_theta(session, batches, best))
        session.step_done(index + 1, {"es/fitness_best": best.fitness})
        session.trainer_directory.mkdir(exist_ok=True)
        state = {**vars(best), "ranked": [asdict(each) for each in ranked]} if voting else vars(best)
        write_json(session.trainer_directory / STATE_FILE, state)
        session.progress.write_unhashed(session.trainer_directory)
        if not session.ended:
            session.use(base)
    if voting:
        session.write_method({**method, "vote": _vote(session, batches, voters(best, ranked, voting))})


def _step(session: BaselineSession, batches: Batches, index: int, best: Best) -> tuple[Best, list[Ranked]]:
    """Draw a step's members, and compare the best one with ``best``; the engine holds the base.

    Returns:
        The better of the two, and the step's members that have a fitness.
    """
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
    leads = fitness - np.nanmean(fitness) if not np.isnan(fitness).all() else fitness
    ranked = [Ranked(index, member, 1, lead) for member, lead in enumerate(leads.tolist()) if not np.isnan(lead)]
    if not np.isnan(new):
        ranked.append(Ranked(index, candidate, 2, new))
    if new > old or (np.isnan(old) and not np.isnan(new)):
        return Best(index, candidate, new), ranked
    return Best(best.step, best.member, None if np.isnan(old) else old), ranked


def rank(known: Iterable[Ranked], drawn: Iterable[Ranked], most: int) -> list[Ranked]:
    """Return the best members of a search, best first.

    Args:
        known: members of earlier steps.
        drawn: members of a step; of several entries of a member the last one counts.
        most: the number of members to keep.
    """
    members = {(each.step, each.member): each for each in (*known, *drawn)}
    return sorted(members.values(), key=lambda each: (-each.looks, -each.fitness, each.step, each.member))[:most]


def voters(best: Best, ranked: Sequence[Ranked], most: int) -> list[tuple[int, int]]:
    """Return the step and the index of each voting member: first the best one, unless it is theta."""
    first = [(best.step, best.member)] if best.step >= 0 else []
    return [*first, *(place for each in ranked if (place := (each.step, each.member)) not in first)][:most]


def _vote(session: BaselineSession, batches: Batches, places: Sequence[tuple[int, int]]) -> Vote:
    """Return the record of the voting members, each given by its step and its index."""
    members: list[Voter] = []
    for index, place in places:
        drawn = plan_step(session.args, batches, index).perturbations[place]
        members.append(
            {
                "step": index,
                "member": place,
                "seed": f"{drawn.member.seed:016x}",
                "sign": drawn.member.sign,
                "scale": drawn.noise.scale,
                "lowrank_scale": drawn.noise.lowrank_scale,
            }
        )
    args = session.args
    vote: Vote = {
        "fingerprint": "",
        "distribution": args.noise_distribution,
        "rank": args.rank if args.noise == "lowrank" else 0,
        "members": members,
    }
    content = json.dumps([session.facts["base"]["fingerprint"], vote], sort_keys=True)
    return {**vote, "fingerprint": hashlib.blake2b(content.encode("ascii"), digest_size=16).hexdigest()}


def voting_members(vote: Vote) -> list[Perturbation]:
    """Return the perturbations of the base that vote, (K,), best first."""
    return [
        Perturbation(
            Member(int(each["seed"], 16), each["sign"]),
            Noise(each["scale"], vote["distribution"], vote["rank"], each["lowrank_scale"]),
        )
        for each in vote["members"]
    ]


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
    for member, group, _, future in evaluator.submit(jobs, lambda _: (rows, session.state()), False):
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


def _read(session: BaselineSession) -> tuple[Best, list[Ranked]]:
    """Return the best member so far, and the members that may vote, from the trainer's directory."""
    path = session.trainer_directory / STATE_FILE
    if not session.steps_done:
        return Best(), []
    try:
        state = read_json_object(path)
        ranked = [Ranked(**each) for each in state.pop("ranked")] if vote_members(session.args) else []
        best = Best(**state)
    except (OSError, ValueError, TypeError, KeyError):
        best, ranked = None, []
    limits = session.steps_done, sizes(session.args)[0]
    if best is None or not _is_drawn(best, *limits) or not all(_is_ranked(each, *limits) for each in ranked):
        raise UserError(f"{path} is missing or damaged; delete {path.parent} to begin again from step 0")
    return best, ranked


def _is_ranked(each: Ranked, steps_done: int, members: int) -> bool:
    """Return whether a stored member has a fitness, and is a member of the first ``steps_done`` + 1 steps."""
    if each.looks not in (1, 2) or each.step == -1 or not is_number(each.fitness):
        return False
    return _is_drawn(Best(each.step, each.member, each.fitness), steps_done, members)


def _is_drawn(best: Best, steps_done: int, members: int) -> bool:
    """Return whether a stored best member is theta or a member of the first ``steps_done`` + 1 steps.

    A killed run may have stored a member of the step that the resume repeats.
    """
    if not all(type(place) is int for place in (best.step, best.member)):
        return False
    if best.fitness is not None and not (is_number(best.fitness) and math.isfinite(best.fitness)):
        return False
    return (best.step, best.member) == (-1, -1) or (0 <= best.step <= steps_done and 0 <= best.member < members)
