"""Measurements of a model on held-out rows: greedy pass@1, pass@k, answer entropy, KL, length, discovery, retention.

Completions are made and scored by the functions that `estune evaluate` uses.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import operator
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

from estune.compare.changes import parameter_changes, walk_ratio
from estune.compare.config import RANDOM_VOTE, Comparison, Retained, bounds_of
from estune.compare.hacking import AnswerSummary, asks_for_words, judge, summarise_answers
from estune.compare.plan import rows_of
from estune.compare.results import DONE, Answers, Changes, Result, VoteFacts, base_digest, read_json, read_result
from estune.config import EVALUATE_FIELDS, OF_WORKERS, ESConfig, SizedConfig, default_of
from estune.console import warn
from estune.engines.base import Engine, LocalEngine
from estune.environment import code_digest
from estune.errors import UserError
from estune.es.types import Perturbation, Prompt
from estune.files import write_json
from estune.rewards.contract import reward_inputs
from estune.rewards.pool import RewardBatch, RewardPool
from estune.run.records import is_right, read_metrics
from estune.run.saved_config import Vote, read_config
from estune.tasks import get_task
from estune.train import setup
from estune.train.evaluation import Evaluation, HeldOut, answer_entropy, evaluate, kl_k3
from estune.train.rollouts import Evaluator
from estune.train.setup import Rewards
from estune.train.soundness import broken_model
from estune.train.step import sampling_of

Rows = list[dict[str, Any]]
SAMPLE_SEED = 77  # seed of the samples for pass@k of every model; further samples of the base have higher seeds
DISCOVERY_SEED = 7_000_077  # seed of the samples of never solved rows; differs from the seeds that made them unsolved
CONSTANTS, CONSTANT_ROWS = 10, 500  # candidates for the best constant answer, and training rows that each is scored on


@dataclass
class Base:
    """The base that a tuned model is measured against: its engine, and the parts of its measurement that are needed."""

    engine: Engine
    judged: AnswerSummary
    never_solved: list[int]  # rows of the test split


@dataclass(frozen=True)
class Voters:
    """The members of a random search that vote, and what their weights are made of."""

    run: ESConfig  # names the base and the noise
    base: str  # fingerprint of the base
    vote: Vote


def measure_base(comparison: Comparison, model: str, file: Path) -> None:
    """Measure a base and write the result, and if there is a `skill_prefix`, measure the base with that prefix, too.

    Args:
        comparison: what to measure.
        model: the base.
        file: the result file; the result with the prefix is written beside it, to `base-prefix.json`.
    """
    args = evaluation_config(comparison, model)
    engine, rows = setup.load_engine(args), held_out_rows(comparison)
    file.parent.mkdir(parents=True, exist_ok=True)
    with Scorers() as scorers:
        if comparison.skill_prefix:
            forced = evaluation_config(comparison, model, response_prefix=comparison.skill_prefix)
            greedy, _ = scorers.answer(forced, engine, rows)
            prefixed = {**greedy_result(greedy), "response_prefix": comparison.skill_prefix}
            write_json(file.with_name("base-prefix.json"), prefixed)
        result = measure(comparison, model, engine, None, scorers)
        unsolved = never_solved(comparison, args, engine, rows, result, scorers)
        result["never_solved"] = unsolved
        result["discovery_control"] = discovery(comparison, args, engine, unsolved, scorers)
    write_json(file, {**result, "model": model, "fingerprint": engine.fingerprint(), "code": code_digest()})


def check_base(comparison: Comparison, model: str, fingerprint: str) -> None:
    """Check that a base has the fingerprint that its measurement has.

    Raises:
        UserError: it has another fingerprint.
    """
    actual = setup.load_engine(evaluation_config(comparison, model)).fingerprint()
    if actual != fingerprint:
        raise UserError(f"model {model} has fingerprint {actual}, and the results are of {fingerprint}")


def measure_trial(comparison: Comparison, model: str, file: Path, facts: Result) -> None:
    """Evaluate a trial's model on the validation rows, and write the result with the run's ``facts``."""
    rows = rows_of(comparison, "validation")[: comparison.tuning.rows or None]
    args = evaluation_config(comparison, model)
    voters = read_voters(Path(model))
    with Scorers() as scorers:
        if voters is None:
            greedy, voted = scorers.answer(args, setup.load_engine(args), rows)[0], Result()
        else:
            greedy, voted = answer_by_vote(comparison, voters, rows, scorers)
    summary = greedy.summary()
    result: Result = {
        **facts,
        **voted,
        "status": DONE,
        "accuracy": summary["accuracy"],
        "accuracy_ci95": summary["accuracy_ci95"],
        "reward": summary["reward"],
        "code": code_digest(),
    }
    write_json(file, result)


def measure_run(comparison: Comparison, base_file: Path, model: str, file: Path, facts: Result) -> None:
    """Measure a run's model, or the vote of its members, and write the result with the run's ``facts``."""
    of_base = read_result(base_file)
    origin: Result = {"base": base_digest(of_base), "code": code_digest()}
    if (voters := read_voters(Path(model))) is not None:
        with Scorers() as scorers:
            greedy, voted = answer_by_vote(comparison, voters, held_out_rows(comparison), scorers)
        voted["hacking"] = _verdict(comparison, AnswerSummary(**of_base["judged"]), greedy)
        voted["fingerprint"] = voters.vote["fingerprint"]
        write_json(file, {**facts, "status": DONE, **greedy_result(greedy), **voted, **origin})
        return
    engine = setup.load_engine(evaluation_config(comparison, model))
    base_engine = local_engine(comparison, of_base["model"])  # the workers hold the tuned model
    base = Base(base_engine, AnswerSummary(**of_base["judged"]), of_base["never_solved"])
    with Scorers() as scorers:
        measured = measure(comparison, model, engine, base, scorers)
    measured["changes"] = measure_changes(
        base_engine,
        local_engine(comparison, model) if comparison.settings.get("num_workers") else cast("LocalEngine", engine),
        comparison.directory / facts["run"],
        facts["steps"],
    )
    state = read_json(Path(model) / "es_state.json")
    write_json(file, {**facts, "status": DONE, **measured, "fingerprint": state["fingerprint"], **origin})


def read_voters(model: Path) -> Voters | None:
    """Return the members that vote, from the records beside a run's model; None if the model answers alone.

    Raises:
        UserError: the search drew fewer members than are to vote.
    """
    from estune.baselines.random_search import vote_members
    from estune.baselines.trainer import read_method

    record = read_method(model)
    if record is None or record["method"] != RANDOM_VOTE:
        return None
    run = ESConfig.from_mapping(read_config(model))
    drawn = len(record["vote"]["members"]) if "vote" in record else 0
    if drawn < (wanted := vote_members(run)):
        raise UserError(f"{wanted} members are to vote, and the search has {drawn} with a fitness")
    return Voters(run, record["base"]["fingerprint"], record["vote"])


def answer_by_vote(comparison: Comparison, voters: Voters, rows: Rows, scorers: Scorers) -> tuple[Evaluation, Result]:
    """Answer rows greedily with each voting member.

    One engine holds the base and perturbs it to one member after another.

    Returns:
        The elected answers, and the fields ``length``, which is the mean over the answers of all members, and ``vote``.

    Raises:
        UserError: the base has changed.
    """
    from estune.baselines.random_search import majority, voting_members

    changes: dict[str, Any] = {name: getattr(voters.run, name) for name in ("noise", "rank", "trainable_parameters")}
    changes |= {name: default_of(name) for name in OF_WORKERS}
    args = evaluation_config(comparison, voters.run.model, **changes)
    engine = setup.load_engine(args)
    if (actual := engine.fingerprint()) != voters.base:
        raise UserError(f"model {args.model} has fingerprint {actual}, and the members perturb {voters.base}")
    of_members = [scorers.answer(args, engine, rows, member)[0] for member in voting_members(voters.vote)]
    task = get_task(comparison.task, bool(comparison.settings.get("allow_unsandboxed_code")))
    assert task.final_answer is not None  # `check_vote` refuses other tasks before a run
    elected, agreeing = [], []
    for row, *given in zip(rows, *(each.rows for each in of_members), strict=True):
        answers = [None if each.non_finite else task.final_answer(row, each.completions[0]) for each in given]
        equal = operator.eq if task.equal_answers is None else partial(task.equal_answers, row)
        winners = majority(answers, equal)
        elected.append(given[winners[0] if winners else 0])  # without any answer, a completion that is wrong
        agreeing.append(len(winners) / len(answers))
    lengths = [each.summary()["mean_length_tokens"] for each in of_members]
    vote: VoteFacts = {
        "members": len(of_members),
        "best_accuracy": of_members[0].summary()["accuracy"],
        "agreement": math.fsum(agreeing) / len(agreeing),
    }
    return Evaluation(elected), {"length": math.fsum(lengths) / len(lengths), "vote": vote}


def evaluation_config(comparison: Comparison, model: str, **changes: Any) -> SizedConfig:
    """Return the configuration of a greedy evaluation: the common settings that affect one, and ``changes``."""
    settings = {name: value for name, value in comparison.settings.items() if name in EVALUATE_FIELDS}
    for name in ("temperature", "top_p", "top_k", "num_generations", "seed"):
        settings.pop(name, None)
    args = ESConfig.from_mapping({**settings, "model": model, "task": comparison.task, "seed": SAMPLE_SEED, **changes})
    return setup.resolve_config(args, 1_000_000)


def local_engine(comparison: Comparison, model: str) -> LocalEngine:
    """Load a model into this process, also if the comparison has workers."""
    here: dict[str, Any] = {name: default_of(name) for name in OF_WORKERS}
    return cast("LocalEngine", setup.load_engine(evaluation_config(comparison, model, **here)))


def held_out_rows(comparison: Comparison) -> Rows:
    """Return the rows of the test split on which models are measured."""
    return rows_of(comparison, "test")[: comparison.measuring.rows or None]


def measure_constant(comparison: Comparison, model: str, file: Path) -> None:
    """Write the result of the best constant answer: of a model that answers every prompt with the same text.

    The candidates are the most common right answers of *training* rows; the best is right on most training rows. No
    file is written if no answer is right for two rows.

    Args:
        comparison: what to measure.
        model: the base; its tokenizer measures the answer's length.
        file: the result file.
    """
    args, rows, train = evaluation_config(comparison, model), held_out_rows(comparison), rows_of(comparison, "train")
    texts = right_answers(comparison, train)
    common = [text for text, count in collections.Counter(texts).most_common(CONSTANTS) if count > 1]
    if not common:
        return
    train = train[:CONSTANT_ROWS]
    with Scorers() as scorers:
        grades = {text: scorers.grade(args, train, text) for text in common}
        best = max(common, key=lambda text: sum(grades[text]))
        right = scorers.grade(args, rows, best)
    tokenizer = setup.load_engine(args).assets.tokenizer
    result: Result = {
        "says": best,
        "n": len(rows),
        "accuracy": sum(right) / len(rows),
        "correct": "".join("1" if each else "0" for each in right),
        "length": len(tokenizer.encode(best, add_special_tokens=False)),
        "train_accuracy": sum(grades[best]) / len(train),
        "code": code_digest(),
    }
    write_json(file, result)


def right_answers(comparison: Comparison, rows: Rows) -> list[str]:
    """Return one right completion of each row, except of rows whose right completions fit no other row."""
    task = get_task(comparison.task, bool(comparison.settings.get("allow_unsandboxed_code")))
    answers = [] if task.right_answer is None else map(task.right_answer, rows)
    return [text for text in answers if text is not None]


class Scorers:
    """The reward workers that score completions, started once for each task; a context manager."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._pools: dict[str, tuple[Rewards, RewardPool, RewardPool]] = {}
        self._warned: set[str] = set()  # models with a warning about logits that are not finite

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def pools_of(self, args: SizedConfig) -> tuple[Rewards, RewardPool, RewardPool]:
        """Return a task's reward functions, and the worker pools for the rewards and for the accuracy.

        Raises:
            UserError: the task has no accuracy.
        """
        key = f"{args.task} {args.reward_funcs} {args.reward_weights}"
        if key not in self._pools:
            rewards = setup.resolve_rewards(args, None, setup.task_of(args))
            if rewards.accuracy is None:
                raise UserError(f"a comparison needs a task with an accuracy, and {args.task} has none")
            pools = [
                self._stack.enter_context(setup.reward_pool(args, funcs, names))
                for funcs, names in ((rewards.funcs, rewards.names), ([rewards.accuracy], ["accuracy"]))
            ]
            self._pools[key] = (rewards, pools[0], pools[1])
        return self._pools[key]

    def grade(self, args: SizedConfig, rows: Rows, text: str) -> list[bool]:
        """Return for each row whether ``text`` is a right completion of it, (rows,)."""
        _, _, accuracy_pool = self.pools_of(args)
        prompts, completions, columns = reward_inputs(rows, [text] * len(rows), "")
        scores = (
            accuracy_pool.submit(RewardBatch(prompts, completions, [[]] * len(rows), columns)).result().rewards[:, 0]
        )
        return [is_right(score) for score in scores]

    def answer(
        self, args: SizedConfig, engine: Engine, rows: Rows, member: Perturbation | None = None
    ) -> tuple[Evaluation, list[Prompt]]:
        """Answer rows with a model and score the completions, as `estune evaluate` does; return the prompts, too.

        With ``member`` the model is that member of the engine's theta.

        Raises:
            UserError: no completion comes from finite logits, so there is nothing to measure.
        """
        rewards, pool, accuracy_pool = self.pools_of(args)
        prompts = setup.build_prompts(args, engine, rows, args.task is not None)
        held_out = HeldOut(
            Evaluator(engine, pool, args.response_prefix),
            rows,
            prompts,
            sampling_of(args, 0),
            rewards.weights,
            accuracy_pool,
            batch=args.prompts_per_batch,
            trainer_state={"global_step": 0, "max_steps": 0},
            member=member,
        )
        evaluation = evaluate(held_out)
        broken = evaluation.summary().get("non_finite_ratio", 0.0)
        if broken == 1.0 and member is None:  # a broken member gives no answer to a vote
            raise UserError(broken_model(args.model, engine.facts.dtype))
        if broken and args.model not in self._warned:
            self._warned.add(args.model)
            warn(f"{args.model}: {evaluation.warning(engine.facts.dtype)}")
        return evaluation, prompts


def measure(comparison: Comparison, model: str, engine: Engine, base: Base | None, scorers: Scorers) -> Result:
    """Return the measurements of a model.

    Args:
        comparison: what to measure.
        model: a directory, hub id, or ``tiny``.
        engine: holds the model.
        base: the base that the model was tuned from; None if the model is the base. The base is sampled on
            `discovery_rows`, too, to find the rows that it never solves.
        scorers: score the completions.
    """
    args, rows, measuring = evaluation_config(comparison, model), held_out_rows(comparison), comparison.measuring
    greedy, prompts = scorers.answer(args, engine, rows)
    first = rows[: measuring.sample_rows or None]
    if base is None and len(searched := rows[: measuring.discovery_rows or None]) > len(first):
        first = searched
    sampled = sample(args, engine, first, measuring.samples, measuring.temperature, scorers)
    task = get_task(comparison.task, bool(comparison.settings.get("allow_unsandboxed_code")))
    result: Result = {
        **greedy_result(greedy),
        "right_of": sampled.right(),  # (len(first),)
        "samples": measuring.samples,
        "sampled_length": sampled.summary()["mean_length_tokens"],
        "retention": {
            name: measure_retained(comparison, model, engine, retained, scorers)
            for name, retained in comparison.retention.items()
        },
    }
    if measuring.samples > 1:
        answers = sampled.answers(first, task.final_answer)[: measuring.sample_rows or None]
        result["answer_entropy"] = math.fsum(map(answer_entropy, answers)) / len(answers)
    if base is None:
        result["judged"] = dataclasses.asdict(summarise_answers(greedy.rows, *bounds_of(comparison)))
        return result
    kl_rows = rows[: measuring.kl_rows or None]
    if measuring.temperature == 1.0 and len(kl_rows) <= len(first):
        for_kl = sampled  # the first sample of each row is used
    else:  # the estimator needs samples at temperature 1
        for_kl = sample(args, engine, kl_rows, 1, 1.0, scorers)
    result["kl"] = divergence(engine, base.engine, prompts[: len(kl_rows)], for_kl)
    result["discovery"] = discovery(comparison, args, engine, base.never_solved, scorers)
    result["hacking"] = _verdict(comparison, base.judged, greedy)
    return result


def _verdict(comparison: Comparison, base: AnswerSummary, greedy: Evaluation) -> dict[str, Any]:
    """Return whether greedy answers to the test rows are those of a run that has hacked its reward."""
    task = get_task(comparison.task, bool(comparison.settings.get("allow_unsandboxed_code")))
    words_wanted = task.answers_hold_words and asks_for_words(right_answers(comparison, held_out_rows(comparison)))
    tuned = summarise_answers(greedy.rows, *bounds_of(comparison))
    return dataclasses.asdict(judge(base, tuned, words_wanted))


def measure_changes(base: LocalEngine, tuned: LocalEngine, run: Path, steps: int) -> Changes:
    """Return how far the parameters moved from the base's; see `estune.compare.changes`.

    Args:
        base: the base.
        tuned: the tuned model.
        run: the run's directory, which has the metrics of its steps.
        steps: the number of steps that made the model; the run may have continued since.
    """
    moved = parameter_changes(base.theta.arrays, tuned.theta.arrays)
    return {
        "norm": moved.norm,
        "relative_norm": moved.ratio,
        "walk_ratio": walk_ratio(moved.norm, [record for record in read_metrics(run) if record["step"] <= steps]),
        "moved_share": moved.moved_share,
        "excess_kurtosis": moved.kurtosis,
        "histogram": {"edges": moved.edges, "density": moved.density} if moved.density else None,
    }


def greedy_result(evaluation: Evaluation) -> Result:
    """Return pass@1, reward and length of a greedy evaluation; ``correct`` has one character per row."""
    summary = evaluation.summary()
    correct = "".join("1" if is_right((row.accuracy or [0.0])[0]) else "0" for row in evaluation.rows)
    return {
        "n": summary["n"],
        "accuracy": summary["accuracy"],
        "accuracy_ci95": summary["accuracy_ci95"],
        "correct": correct,
        "reward": summary["reward"],
        "length": summary["mean_length_tokens"],
        "clipped_ratio": summary["clipped_ratio"],
        "reward_failures": summary["reward_failures"],
    }


def sample(
    args: SizedConfig,
    engine: Engine,
    rows: Rows,
    count: int,
    temperature: float,
    scorers: Scorers,
    seed: int = SAMPLE_SEED,
) -> Evaluation:
    """Return ``count`` samples of each row."""
    sampling = dataclasses.replace(args, temperature=temperature, num_generations=count, seed=seed)
    return scorers.answer(sampling, engine, rows)[0]


def never_solved(
    comparison: Comparison, args: SizedConfig, engine: Engine, rows: Rows, result: Result, scorers: Scorers
) -> list[int]:
    """Return which of `discovery_rows` the base solves neither greedily nor in any of `discovery_samples` samples.

    Args:
        comparison: has the numbers of rows and samples.
        args: the base's evaluation.
        engine: the base.
        rows: of the test split; the returned numbers are indices of these.
        result: the base's measurement: `correct`, and `right_of` for at least these rows.
        scorers: score the completions.
    """
    measuring = comparison.measuring
    right_of = result["right_of"][: measuring.discovery_rows or None]
    unsolved = [i for i, right in enumerate(right_of) if not right and result["correct"][i] == "0"]
    drawn, size = measuring.samples, max(measuring.samples, 16)
    while unsolved and drawn < measuring.discovery_samples:
        count, asked = min(size, measuring.discovery_samples - drawn), [rows[i] for i in unsolved]
        more = sample(args, engine, asked, count, measuring.temperature, scorers, SAMPLE_SEED + drawn)
        unsolved = [index for index, right in zip(unsolved, more.right(), strict=True) if not right]
        drawn += count
    return unsolved


def discovery(
    comparison: Comparison, args: SizedConfig, engine: Engine, unsolved: Sequence[int], scorers: Scorers
) -> list[int]:
    """Return how many of `samples` samples of each row in ``unsolved`` are right, (unsolved,).

    Every model, the base included, samples with the same random numbers. Rows that the base solves here show how many
    rows a model solves by chance.
    """
    if not unsolved:
        return []
    rows, measuring = held_out_rows(comparison), comparison.measuring
    asked = [rows[i] for i in unsolved]
    return sample(args, engine, asked, measuring.samples, measuring.temperature, scorers, DISCOVERY_SEED).right()


def measure_retained(
    comparison: Comparison, model: str, engine: Engine, retained: Retained, scorers: Scorers
) -> Answers:
    """Return the greedy accuracy on another task, or under another prompt, scored by that task's own reward."""
    args = retained_config(comparison, model, retained)
    rows = get_task(retained.task, args.allow_unsandboxed_code).load(retained.split)[: retained.rows or None]
    return greedy_result(scorers.answer(args, engine, rows)[0])


def retained_config(comparison: Comparison, model: str, retained: Retained) -> SizedConfig:
    """Return the configuration of an evaluation on a retained task, with that task's own reward.

    The common setting ``allow_unsandboxed_code`` is passed on only to a task that runs code.

    Raises:
        UserError: the options cannot work together.
    """
    changes: dict[str, Any] = {"task": retained.task, "reward_funcs": None, "reward_weights": None}
    allowed = bool({**comparison.settings, **retained.settings}.get("allow_unsandboxed_code"))
    if not get_task(retained.task, allowed).runs_code:
        changes["allow_unsandboxed_code"] = bool(retained.settings.get("allow_unsandboxed_code"))
    return evaluation_config(comparison, model, **{**retained.settings, **changes})


def divergence(engine: Engine, base: Engine, prompts: Sequence[Prompt], sampled: Evaluation) -> float:
    """Return KL(model || base) in nats per token, by the k3 estimator on the first sample of each of ``prompts``.

    Args:
        engine: the model.
        base: the base.
        prompts: the prompts of the first rows of ``sampled``.
        sampled: samples of the model at temperature 1.

    Raises:
        UserError: a log-probability is not finite.
    """
    token_ids = [row.token_ids[0] for row in sampled.rows[: len(prompts)]]
    kl = kl_k3(engine.token_logprobs(prompts, token_ids), base.token_logprobs(prompts, token_ids))
    if not math.isfinite(kl):
        raise UserError("a log-probability of the model, or of the base, is not finite, so there is no KL")
    return kl
