"""`estune evaluate`: the accuracy and the rewards of a model on held-out rows, alone or against a reference.

Without a task and without reward functions, the result is about lengths and completions.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.commands.results import print_evaluation
from estune.compare.statistics import mean_difference, signs, tango, transitions
from estune.config import OF_WORKERS, ESConfig, SizedConfig, default_of
from estune.console import note, show_progress, warn
from estune.data.datasets import has_splits
from estune.engines.base import Engine
from estune.errors import UserError, nearest
from estune.es.types import Prompt, Sampling
from estune.rewards.pool import RewardPool
from estune.run.best import described
from estune.run.checkpoint import read_state
from estune.run.origin import located
from estune.run.records import is_right, write_lines
from estune.run.saved_config import CONFIG_FILE, read_stored, run_of
from estune.tasks import Task
from estune.train import setup
from estune.train.evaluation import (
    EvaluatedRow,
    Evaluation,
    FinalAnswer,
    HeldOut,
    answer_entropy,
    check_batches,
    evaluate,
    kl_k3,
    token_entropy,
)
from estune.train.rollouts import Evaluator
from estune.train.setup import Rewards
from estune.train.soundness import warn_of_inputs
from estune.train.step import sampling_of

NARROW = ("bfloat16", "float16")  # dtypes: a token can change with the size of the batch, by rounding
SAMPLE_TEMPERATURE = 1.0  # temperature of `n_samples` samples if the configured temperature is 0
N_SHOWN = 3  # completions in the result of an evaluation without rewards
PAIRED_FIELDS = "completions rewards accuracy lengths finished failures non_finite".split()  # of a second evaluation


@dataclass(frozen=True)
class _Questions:
    """What a model is asked, and what scores its completions; the same for the model and its reference."""

    args: SizedConfig
    data: list[dict[str, Any]]
    task: Task | None
    weights: Sequence[float]  # (F,), of the reward functions
    names: Sequence[str]  # (F,)
    pool: RewardPool
    grader: RewardPool | None  # computes accuracy
    first: Sampling  # of the accuracy: greedy if there are samples, else as configured
    samples: Sampling | None  # of mean@k and pass@k
    warned: set[str]  # reward functions whose first failure was shown
    shows_progress: bool

    @property
    def final_answer(self) -> FinalAnswer | None:
        """The function that finds the answer in a completion; None if the whole completion is the answer."""
        return None if self.task is None else self.task.final_answer


@dataclass
class _Answers:
    """A model's completions of the rows."""

    model: str
    prompts: list[Prompt]
    first: Evaluation
    samples: Evaluation | None
    dtype: str
    entropies: list[float] | None  # (rows,), nats, of each row's sampled answers; None: fewer than two samples a row
    pieces: dict[int, str | None] | None = None  # of the tokens of prompts and completions; None: no tokenizer
    logprobs: list[list[float]] | None = None  # of `own_tokens` under the model; None: not asked for, or unknown

    @property
    def own_tokens(self) -> tuple[list[Prompt], list[list[int]]]:
        """The completions that the KL divergence is estimated on, (n, T), and the prompt of each, (n,)."""
        rows = (self.samples or self.first).rows
        repeated = [prompt for prompt, row in zip(self.prompts, rows, strict=True) for _ in row.token_ids]
        return repeated, [ids for row in rows for ids in row.token_ids]

    @property
    def tokens(self) -> set[int]:
        """The tokens of the prompts and of the completions that the KL divergence is estimated on."""
        _, completions = self.own_tokens
        return {token for ids in (*(prompt.token_ids for prompt in self.prompts), *completions) for token in ids}


def evaluate_command(
    args: ESConfig,
    *,
    split: str | None,
    n_samples: int,
    limit: int,
    reference: str | None,
    rows: str | None,
    json: bool,
    batch_check: str = "auto",
) -> int:
    """Evaluate a model on held-out rows and print the result.

    Args:
        args: model, rows and decoding.
        split: split of a built-in task; None: ``test``.
        n_samples: samples of each row for mean@k, pass@k and the answer entropy, beside a greedy answer; 0: none.
        limit: number of rows; 0: all.
        reference: model that answers the same rows, for won and lost problems and for the KL divergence.
        rows: file to write the evaluated rows to.
        json: whether to print one JSON object instead of lines.
        batch_check: ``always``, ``never``, or ``auto``: answer the rows again in batches of another size if the compute
            dtype has 16 bits.

    Raises:
        UserError: the options or the model cannot be used.
    """
    args = _with_samples(args, n_samples)
    if limit < 0:
        raise UserError(f"limit must not be negative, not {limit}")
    _check_before_work(args, reference, rows)
    task = setup.task_of(args)
    rewards = _rewards_of(args, task)
    split = _split_of(args, task, split)
    data = setup.resolve_rows(args, None, task, split, rewards, for_training=False)[: limit or None]
    sized = setup.resolve_config(args, len(data))
    if reference is not None and args.engine not in ("hf", "vllm"):
        _open_once(sized, reference)
    with ExitStack() as stack:
        asked = _questions(stack, sized, data, task, rewards, n_samples, shows_progress=not json)
        model, checked = _ask_model(asked, batch_check, with_logprobs=reference is not None)
        result = {**_heading(sized, split), **_values(asked, model), **checked}
        other = failure = None
        if reference is not None:
            try:
                other, kl = _ask_reference(asked, reference, model)
                result |= {"kl": kl, "reference": {"model": reference, **_values(asked, other)}}
                result["against_reference"] = _against(model, other, scored=bool(asked.weights))
            except UserError as error:  # raised below: the model's own result is complete
                failure = error
        if rows:
            write_lines(Path(rows), _records(model, other))
    print_evaluation(result, json)
    if failure is not None:
        raise failure
    return 0


def _rewards_of(args: ESConfig, task: Task | None) -> Rewards:
    """Return the rewards of an evaluation; none, with a note, for rows of the user's own without a reward."""
    if task is not None or args.reward_funcs is not None or args.dataset_name is None:
        return setup.resolve_rewards(args, None, task)
    note("there is no reward, so the result is about lengths and completions; --task or --reward_funcs scores them")
    return setup.no_rewards(args)


def _with_samples(args: ESConfig, n_samples: int) -> ESConfig:
    """Return the configuration with a temperature for ``n_samples`` samples, if any.

    Raises:
        UserError: the options cannot work together.
    """
    if n_samples < 0:
        raise UserError(f"n_samples must not be negative, not {n_samples}")
    if not n_samples:
        return args
    if args.num_generations > 1:
        raise UserError("give n_samples (for mean@k and pass@k) or num_generations (for the mean), not both")
    return dataclasses.replace(args, temperature=args.temperature or SAMPLE_TEMPERATURE)


def _questions(
    stack: ExitStack,
    args: SizedConfig,
    data: list[dict[str, Any]],
    task: Task | None,
    rewards: Rewards,
    n_samples: int,
    *,
    shows_progress: bool,
) -> _Questions:
    """Start the reward workers, which end with ``stack``, and return what every model is asked."""
    pool = stack.enter_context(setup.reward_pool(args, rewards.funcs, rewards.names))
    grader = None
    if rewards.accuracy:
        grader = stack.enter_context(setup.reward_pool(args, [rewards.accuracy], ["accuracy"]))
    elif n_samples and rewards.funcs:
        note("no task measures accuracy here, so there is no mean@k and no pass@k: the samples have rewards alone")
    first, samples = sampling_of(args, 0), None
    if n_samples:
        samples = dataclasses.replace(first, num_generations=n_samples)
        first = dataclasses.replace(first, num_generations=1, temperature=0.0, top_p=1.0, top_k=0)
    return _Questions(
        args, data, task, rewards.weights, rewards.names, pool, grader, first, samples, set(), shows_progress
    )


# --- answers ----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(args: SizedConfig) -> Iterator[Engine]:
    """Load an engine, and release what it holds at the end of the context."""
    engine = setup.load_engine(args)
    try:
        yield engine
    finally:
        engine.stop()


def _open_once(args: SizedConfig, reference: str) -> None:
    """Load a reference and release it: only the engine itself can check such a model.

    Raises:
        UserError: the reference cannot be loaded.
    """
    here: dict[str, Any] = {name: default_of(name) for name in OF_WORKERS}
    with _opened(dataclasses.replace(args, model=reference, **here)):
        pass
    gc.collect()


def _ask_model(asked: _Questions, batch_check: str, *, with_logprobs: bool) -> tuple[_Answers, dict[str, Any]]:
    """Return the model's answers, and ``{"batch_check": ...}`` if the rows are answered again in other batches."""
    args = asked.args
    with _opened(args) as engine:
        setup.warn_of_changed_engine(args, engine)
        answers = _answers_of(asked, engine)
        checked = _batch_check(batch_check, engine, asked.first, answers)
        if with_logprobs:
            answers.pieces = _pieces(engine, answers)
            answers.logprobs = _logprobs(engine, answers)
    return answers, checked


def _ask_reference(asked: _Questions, reference: str, model: _Answers) -> tuple[_Answers, float | None]:
    """Return the reference's answers, and KL(model || reference) or None.

    The model's engine must have been released, so that one model at a time is in memory.
    """
    gc.collect()
    asked = dataclasses.replace(asked, args=dataclasses.replace(asked.args, model=reference))
    with _opened(asked.args) as engine:
        answers = _answers_of(asked, engine, f"reference {reference}: ")
        kl = None
        if model.logprobs is not None:
            kl = _divergence(engine, reference, model)
            if asked.samples is not None:
                answers.logprobs = _logprobs(engine, answers)
    return answers, kl


def _answers_of(asked: _Questions, engine: Engine, label: str = "") -> _Answers:
    """Return a model's answers to the rows, scored; a warning about them begins with ``label``."""
    args = asked.args
    prompts = setup.build_prompts(args, engine, asked.data, asked.task is not None)
    warn_of_inputs(args, engine, prompts)
    evaluator = Evaluator(engine, asked.pool, args.response_prefix, warned=asked.warned)
    first = _evaluate(asked, evaluator, prompts, asked.first, "rows")
    samples = entropies = None
    if asked.samples is not None:
        samples = _evaluate(asked, evaluator, prompts, asked.samples, "rows sampled")
        if asked.samples.num_generations > 1:
            entropies = [answer_entropy(texts) for texts in samples.answers(asked.data, asked.final_answer)]
    if warning := Evaluation(first.rows + (samples.rows if samples else [])).warning(engine.facts.dtype):
        warn(f"{label}{warning}")
    return _Answers(args.model, prompts, first, samples, engine.facts.dtype, entropies)


def _evaluate(
    asked: _Questions, evaluator: Evaluator, prompts: list[Prompt], sampling: Sampling, noun: str
) -> Evaluation:
    """Answer the rows and score the completions; ``noun`` names the rows on a terminal."""

    def progress(done: int) -> None:
        if asked.shows_progress:
            show_progress(f"estune: {done}/{len(asked.data)} {noun}")

    held_out = HeldOut(
        evaluator,
        asked.data,
        prompts,
        sampling,
        asked.weights,
        asked.grader,
        batch=asked.args.prompts_per_batch,
        trainer_state={"global_step": 0, "max_steps": 0},
        names=asked.names,
    )
    return evaluate(held_out, progress)


# --- log-probabilities ------------------------------------------------------------------------------------------------


def _logprobs(engine: Engine, answers: _Answers) -> list[list[float]] | None:
    """Return the log-probabilities of a model's own completions; warn and return None if the engine has none."""
    try:
        return engine.token_logprobs(*answers.own_tokens)
    except UserError as error:
        warn(f"kl is unknown: {error}")
        return None


def _pieces(engine: Engine, answers: _Answers) -> dict[int, str | None] | None:
    """Return the tokenizer's text of each token in prompts and completions; None if the tokenizer gives no text."""
    convert = getattr(engine.assets.tokenizer, "convert_ids_to_tokens", None)
    if convert is None:
        return None
    used = sorted(answers.tokens)
    return dict(zip(used, convert(used), strict=True))


def _has_other_vocabulary(engine: Engine, model: _Answers) -> bool:
    """Return whether a token in the model's prompts and completions is missing in the engine's model or differs."""
    size = engine.facts.vocab_size
    if size is not None and max(model.tokens, default=0) >= size:
        return True
    return model.pieces is not None and _pieces(engine, model) not in (None, model.pieces)


def _divergence(engine: Engine, reference: str, model: _Answers) -> float | None:
    """Return KL(model || reference) per token, by the k3 estimator on the model's own completions.

    If the reference has another vocabulary, or a log-probability of either model is not finite, warn and return None.
    """
    assert model.logprobs is not None
    if _has_other_vocabulary(engine, model):
        warn(f"reference {reference} has another vocabulary than {model.model}, so kl is unknown")
        return None
    try:
        logprobs = engine.token_logprobs(*model.own_tokens)
    except UserError as error:
        warn(f"kl is unknown: reference {reference}: {error}")
        return None
    models = ((model.model, model.dtype, model.logprobs), (reference, engine.facts.dtype, logprobs))
    for name, dtype, values in models:
        broken = sum(not math.isfinite(value) for row in values for value in row)
        if broken:
            warn(
                f"{broken} of {sum(map(len, values))} log-probabilities of {name} are not finite in {dtype}, so "
                "kl is unknown"
            )
            return None
    return kl_k3(model.logprobs, logprobs)


# --- results ----------------------------------------------------------------------------------------------------------


def _values(asked: _Questions, answers: _Answers) -> dict[str, Any]:
    """Return a model's part of the result."""
    values: dict[str, Any] = {**answers.first.summary()}
    if not asked.weights:
        values = _unscored(answers)
    if answers.samples is None or asked.samples is None:
        return values
    sampled: dict[str, Any] = {**answers.samples.summary()}
    del sampled["n"]
    values |= {"n_samples": asked.samples.num_generations, "sample_temperature": asked.samples.temperature}
    if "accuracy" in sampled:
        values |= {
            "mean_at_k": sampled.pop("accuracy"),
            "mean_at_k_ci95": sampled.pop("accuracy_ci95"),
            "pass_at_k": answers.samples.pass_at_k(),
        }
    values |= {f"sample_{name}": value for name, value in sampled.items()}
    if answers.entropies is not None:
        values["answer_entropy"] = math.fsum(answers.entropies) / len(answers.entropies)
        values["answer_entropy_of"] = "final answers" if asked.final_answer else "whole completions"
    whole = asked.samples.temperature == 1.0 and asked.samples.top_p == 1.0 and not asked.samples.top_k
    if answers.logprobs is not None and whole:
        values["token_entropy"] = token_entropy(answers.logprobs)
    return values


def _unscored(answers: _Answers) -> dict[str, Any]:
    """Return the part of the result that needs no reward, with a few completions; reward and accuracy are None."""
    rows, summary = answers.first.rows, answers.first.summary()
    lengths = [length for row in rows for length in row.lengths]
    broken = {"non_finite_ratio": summary["non_finite_ratio"]} if "non_finite_ratio" in summary else {}
    shown = sorted({round(i * (len(rows) - 1) / (N_SHOWN - 1)) for i in range(N_SHOWN)})
    return {
        "n": summary["n"],
        "accuracy": None,
        "reward": None,
        "mean_length_tokens": summary["mean_length_tokens"],
        "median_length_tokens": float(statistics.median(lengths)),
        "max_length_tokens": max(lengths),
        "empty_ratio": lengths.count(0) / len(lengths),
        "finished_ratio": 1 - summary["clipped_ratio"],
        "clipped_ratio": summary["clipped_ratio"],
        **broken,
        "completions": [_shown(rows[i]) for i in shown],
    }


def _shown(row: EvaluatedRow) -> dict[str, Any]:
    """Return a row's question and its first completion."""
    completion = {"completion": row.completions[0], "length_tokens": row.lengths[0], "finished": row.finished[0]}
    return {"row_id": row.row_id, "question": row.question, **completion}


def _against(model: _Answers, other: _Answers, *, scored: bool) -> dict[str, Any]:
    """Return the paired differences of the model and the reference, model minus reference, for each measure.

    If the completions are not ``scored``, it is the number of rows whose completions differ.
    """
    found: dict[str, Any] = {}
    if not scored:
        both = zip(model.first.rows, other.first.rows, strict=True)
        found["answers"] = {"n": len(model.prompts), "changed": sum(a.completions != b.completions for a, b in both)}
    pairs = [("accuracy", "reward", model.first, other.first)]
    if model.samples is not None and other.samples is not None:
        pairs.append(("mean_at_k", "sample_reward", model.samples, other.samples))
    for accuracy, reward, here, there in pairs:
        if (after := here.accuracies()) is not None and (before := there.accuracies()) is not None:
            is_greedy = accuracy == "accuracy" and len(here.rows[0].lengths) == 1
            found[accuracy] = _transitions(before, after) if is_greedy else _differences(before, after)
        if values := reward_differences(here, there):
            found[reward] = {"n": len(values), **dataclasses.asdict(signs(values)), **mean_difference(values)}
    if model.entropies is not None and other.entropies is not None:
        found["answer_entropy"] = _differences(other.entropies, model.entropies)
    return found


def _transitions(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Return won and lost rows of one answer each, McNemar's exact test, and the difference with Tango's interval."""
    moved = transitions([is_right(value) for value in before], [is_right(value) for value in after])
    won, lost, n = moved.progressions, moved.regressions, len(before)
    ci95 = list(tango(won, lost, n))
    return {**dataclasses.asdict(moved), "difference": (won - lost) / n, "difference_ci95": ci95}


def _differences(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    return mean_difference([b - a for a, b in zip(before, after, strict=True)])


def reward_differences(here: Evaluation, there: Evaluation) -> list[float]:
    """Return the differences of the mean rewards of the rows to which a reward applies in both evaluations.

    A failed reward counts as the lowest reward of the two evaluations.
    """
    lowest = min(here.lowest_reward(), there.lowest_reward())
    if math.isinf(lowest):  # no reward was given
        return []
    both = zip(here.mean_rewards(lowest), there.mean_rewards(lowest), strict=True)
    return [after - before for after, before in both if after is not None and before is not None]


def _records(model: _Answers, other: _Answers | None) -> list[dict[str, Any]]:
    """Return the rows for JSON lines: the model's answers, and its samples and the reference's answers if any."""
    records = model.first.records()
    for i, record in enumerate(records):
        if model.samples is not None:
            record["samples"] = _fields(model.samples.rows[i])
        if other is not None:
            record["reference"] = _fields(other.first.rows[i])
            if other.samples is not None:
                record["reference"]["samples"] = _fields(other.samples.rows[i])
    return records


def _fields(row: EvaluatedRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in PAIRED_FIELDS}


def _check_before_work(args: ESConfig, reference: str | None, rows: str | None) -> None:
    """Raise UserError if the file of rows cannot be written or a model cannot be loaded, before any work is done."""
    if rows:
        if Path(rows).is_dir():
            raise UserError(f"rows {rows} is a directory, not a file to write")
        Path(rows).parent.mkdir(parents=True, exist_ok=True)
    if args.engine in ("hf", "vllm"):
        for model in (args.model, reference):
            if model is not None:
                setup.check_model(model, args.revision)


def _split_of(args: ESConfig, task: Task | None, split: str | None) -> str:
    """Return the split to evaluate, ``test`` by default; warn if its rows chose the model.

    Raises:
        UserError: the task does not have the split.
    """
    if split is not None and args.dataset_name is not None:
        raise UserError("split is for built-in tasks; for a dataset give dataset_test_split")
    split = split or "test"
    if task is not None and args.dataset_name is None and split not in task.splits:
        raise UserError(
            f"task {task.name} has no split {split!r}{nearest(split, task.splits)}; it has {', '.join(task.splits)}"
        )
    _warn_of_chosen_rows(args, split)
    return split


def _warn_of_chosen_rows(args: ESConfig, split: str) -> None:
    """Warn if the model is a run whose step was chosen on the rows that are evaluated now."""
    state, run_dir = read_state(Path(args.model)), run_of(args.model)
    if state is None or "best" not in state or run_dir is None:
        return
    stored = read_stored(run_dir / CONFIG_FILE) or {}
    if stored.get("dataset_name") is not None:
        names = (stored["dataset_name"], located(stored, run_dir)["dataset_name"])
        others = ("dataset_config", "dataset_test_split")
        is_same = args.dataset_name in names and all(getattr(args, name) == stored.get(name) for name in others)
    else:
        is_same = args.dataset_name is None and args.task == stored.get("task") and split == "validation"
    if is_same:
        warn(
            f"{args.model} was chosen on these rows ({described(state['best'])}), so the result is too high: evaluate "
            "another split"
        )


def _heading(args: ESConfig, split: str) -> dict[str, Any]:
    """Return the first lines of the result: task or dataset, model, and split if there are splits."""
    heading: dict[str, Any] = {"task": args.task or args.dataset_name, "model": args.model}
    if args.dataset_name is None:
        heading["split"] = split
    elif has_splits(args.dataset_name):
        heading["split"] = args.dataset_test_split
    return heading


def _batch_check(when: str, engine: Engine, sampling: Sampling, answers: _Answers) -> dict[str, Any]:
    """Return ``{"batch_check": ...}`` if the rows are answered again in batches of another size, else ``{}``."""
    if when == "never" or (when == "auto" and engine.facts.dtype not in NARROW):
        return {}
    checked = check_batches(engine, answers.prompts, sampling, answers.first)
    if checked is not None:
        return {"batch_check": checked}
    if when == "always":
        warn("batch_check needs two rows or more: a single row has no batch to share")
    return {}
