"""`estune evaluate`: the accuracy and the rewards of a model on held-out rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from estune.commands.results import print_values
from estune.config import OF_WORKERS, ESConfig, SizedConfig, default_of
from estune.console import show_progress, warn
from estune.data.datasets import has_splits
from estune.engines.base import Engine
from estune.errors import UserError, nearest
from estune.es.types import Prompt
from estune.rewards.pool import RewardPool
from estune.run.best import described
from estune.run.checkpoint import read_state
from estune.run.records import write_lines
from estune.run.saved_config import CONFIG_FILE, read_stored, run_of
from estune.tasks import Task
from estune.train import setup
from estune.train.evaluation import Evaluation, HeldOut, check_batches, evaluate, kl_k3
from estune.train.rollouts import Evaluator
from estune.train.soundness import warn_of_inputs
from estune.train.step import sampling_of

NARROW = ("bfloat16", "float16")  # dtypes: a token can change with the size of the batch, by rounding


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
        n_samples: samples of each row for pass@k; 0: none.
        limit: number of rows; 0: all.
        reference: reference model of the KL divergence.
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
    rewards = setup.resolve_rewards(args, None, task)
    split = _split_of(args, task, split)
    if n_samples and rewards.accuracy is None:
        raise UserError("pass@k needs a task with an accuracy; your own rewards have none")
    data = setup.resolve_rows(args, None, task, split, rewards, for_training=False)[: limit or None]
    args = setup.resolve_config(args, len(data))
    with ExitStack() as stack:
        pool = stack.enter_context(setup.reward_pool(args, rewards.funcs, rewards.names))
        grader = None
        if rewards.accuracy:
            grader = stack.enter_context(setup.reward_pool(args, [rewards.accuracy], ["accuracy"]))
        engine = setup.load_engine(args)
        setup.warn_of_changed_engine(args, engine)
        prompts = setup.build_prompts(args, engine, data, task is not None)
        warn_of_inputs(args, engine, prompts)
        evaluator = Evaluator(engine, pool, args.response_prefix)
        evaluation = _answer_rows(args, evaluator, data, prompts, rewards.weights, grader, shows_progress=not json)
        result = {**_heading(args, split), **evaluation.summary()}
        if warning := evaluation.warning(engine.facts.dtype):
            warn(warning)
        if n_samples:
            result["pass_at_k"] = evaluation.pass_at_k()
        result |= _batch_check(batch_check, engine, args, prompts, evaluation)
        if reference is not None:
            result["kl"] = _divergence(engine, args, reference, prompts, evaluation)
        if rows:
            write_lines(Path(rows), evaluation.records())
    print_values(result, json)
    return 0


def _answer_rows(
    args: SizedConfig,
    evaluator: Evaluator,
    data: list[dict[str, Any]],
    prompts: list[Prompt],
    weights: Sequence[float],
    grader: RewardPool | None,
    *,
    shows_progress: bool,
) -> Evaluation:
    """Answer the rows and score the completions."""

    def progress(done: int) -> None:
        if shows_progress:
            show_progress(f"estune: {done}/{len(data)} rows")

    held_out = HeldOut(
        evaluator,
        data,
        prompts,
        sampling_of(args, 0),
        weights,
        grader,
        batch=args.prompts_per_batch,
        trainer_state={"global_step": 0, "max_steps": 0},
    )
    return evaluate(held_out, progress)


def _with_samples(args: ESConfig, n_samples: int) -> ESConfig:
    """Return the configuration with ``n_samples`` completions per prompt, if any; raise UserError if it cannot work."""
    if n_samples < 0:
        raise UserError(f"n_samples must not be negative, not {n_samples}")
    if not n_samples:
        return args
    if args.num_generations > 1:
        raise UserError("give n_samples (for pass@k) or num_generations (for the mean), not both")
    if n_samples > 1 and args.temperature == 0:
        raise UserError("n_samples needs temperature above 0: greedy completions would all be equal")
    return dataclasses.replace(args, num_generations=n_samples)


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
        is_same = args.dataset_name is not None and args.dataset_test_split == stored.get("dataset_test_split")
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


def _batch_check(
    when: str, engine: Engine, args: ESConfig, prompts: list[Prompt], evaluation: Evaluation
) -> dict[str, Any]:
    """Return ``{"batch_check": ...}`` if the rows are answered again in batches of another size, else ``{}``."""
    if when == "never" or (when == "auto" and engine.facts.dtype not in NARROW):
        return {}
    checked = check_batches(engine, prompts, sampling_of(args, 0), evaluation)
    if checked is not None:
        return {"batch_check": checked}
    if when == "always":
        warn("batch_check needs two rows or more: a single row has no batch to share")
    return {}


def _divergence(
    engine: Engine, args: SizedConfig, reference: str, prompts: list[Prompt], evaluation: Evaluation
) -> float | None:
    """Return KL(model || reference) per token, by the k3 estimator on the model's own completions.

    If a log-probability of either model is not finite, warn and return None.

    Raises:
        UserError: the model's tokens are outside the reference's vocabulary.
    """
    repeated = [prompt for prompt, row in zip(prompts, evaluation.rows, strict=True) for _ in row.token_ids]
    token_ids = [ids for row in evaluation.rows for ids in row.token_ids]
    logprobs = engine.token_logprobs(repeated, token_ids)
    here: dict[str, Any] = {name: default_of(name) for name in OF_WORKERS}  # the workers hold the other model
    reference_engine = setup.load_engine(dataclasses.replace(args, model=reference, **here))
    largest = max((token for ids in token_ids for token in ids), default=0)
    vocab_size = reference_engine.facts.vocab_size
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"reference {reference} has an embedding of {vocab_size} rows, and the model answered with "
            f"token {largest}: a KL divergence needs two models with one vocabulary"
        )
    reference_logprobs = reference_engine.token_logprobs(repeated, token_ids)
    models = ((args.model, engine.facts, logprobs), (reference, reference_engine.facts, reference_logprobs))
    for name, facts, values in models:
        broken = sum(not math.isfinite(value) for row in values for value in row)
        if broken:
            warn(
                f"{broken} of {sum(map(len, values))} log-probabilities of {name} are not finite in {facts.dtype}, so "
                "kl is unknown"
            )
            return None
    return kl_k3(logprobs, reference_logprobs)
