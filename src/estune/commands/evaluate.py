"""`estune evaluate`: the accuracy and the rewards of a model on held-out rows."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from estune.commands.results import print_values
from estune.config import ESConfig
from estune.console import show_progress, warn
from estune.data.datasets import has_splits
from estune.engines.base import LocalEngine
from estune.errors import UserError, nearest
from estune.es.types import Prompt
from estune.run.records import write_lines
from estune.train import setup
from estune.train.evaluation import Evaluation, check_batches, evaluate, kl_k3
from estune.train.rollouts import Evaluator
from estune.train.soundness import warn_of_inputs

NARROW = ("bfloat16", "float16")  # whose rounding can change a token with the size of a batch


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
        args: the model, the rows and how completions are decoded.
        split: of a built-in task; None for ``test``.
        n_samples: samples of each row for pass@k; 0 for none.
        limit: of the rows; 0 for all.
        reference: a model to measure the KL divergence to.
        rows: a file to write the rows to.
        json: print one JSON object instead of lines.
        batch_check: ``always``, ``never``, or ``auto``: answer the rows again in batches of another size where the
            compute dtype has 16 bits.

    Raises:
        UserError: the options or the model cannot be used.
    """
    if limit < 0 or n_samples < 0:
        raise UserError(f"limit and n_samples must not be negative, not {min(limit, n_samples)}")
    if n_samples:
        if args.num_generations > 1:
            raise UserError("give n_samples (for pass@k) or num_generations (for the mean), not both")
        if n_samples > 1 and args.temperature == 0:
            raise UserError("n_samples needs temperature above 0: greedy completions would all be equal")
        args = dataclasses.replace(args, num_generations=n_samples)
    if rows:  # before the work, not after it
        if Path(rows).is_dir():
            raise UserError(f"rows {rows} is a directory, not a file to write")
        Path(rows).parent.mkdir(parents=True, exist_ok=True)
    if args.engine == "hf":  # before rows and rewards are read
        for model in (args.model, reference):
            if model is not None:
                setup.check_model(model, args.revision)
    task = setup.task_of(args)
    rewards = setup.resolve_rewards(args, None, task)
    if split is not None and args.dataset_name is not None:
        raise UserError("split names a part of a built-in task; of a dataset, dataset_test_split does")
    split = split or "test"
    if task is not None and args.dataset_name is None and split not in task.splits:
        raise UserError(f"task {task.name} has no split {split!r}{nearest(split, task.splits)}; it has "
                        f"{', '.join(task.splits)}")  # fmt: skip
    if n_samples and rewards.accuracy is None:
        raise UserError("pass@k needs a task with an accuracy; your own rewards have none")
    data = setup.resolve_rows(args, None, task, split, rewards, for_training=False)[: limit or None]
    args = setup.resolve_config(args, len(data))
    with ExitStack() as stack:
        pool = stack.enter_context(setup.reward_pool(args, rewards.funcs, rewards.names))
        grader = (
            stack.enter_context(setup.reward_pool(args, [rewards.accuracy], ["accuracy"])) if rewards.accuracy else None
        )
        engine = setup.load_engine(args)
        prompts = setup.build_prompts(args, engine, data, task is not None)
        warn_of_inputs(args, engine, prompts)
        evaluator = Evaluator(engine, pool, args.response_prefix)

        def progress(done: int) -> None:
            if not json:
                show_progress(f"estune: {done}/{len(data)} rows")

        evaluation = evaluate(
            evaluator, data, prompts, setup.sampling(args, 0), rewards.weights, grader,
            batch=int(args.prompts_per_batch), trainer_state={"global_step": 0, "max_steps": 0}, progress=progress,
        )  # fmt: skip
        result: dict[str, Any] = {"task": args.task or args.dataset_name, "model": args.model}
        if args.dataset_name is None:
            result["split"] = split
        elif has_splits(args.dataset_name):
            result["split"] = args.dataset_test_split
        result |= evaluation.summary()
        if warning := evaluation.warning(engine.facts.dtype):
            warn(warning)
        if n_samples:
            result["pass_at_k"] = evaluation.pass_at_k()
        if batch_check == "always" or (batch_check == "auto" and engine.facts.dtype in NARROW):
            checked = check_batches(engine, prompts, setup.sampling(args, 0), evaluation)
            if checked is not None:
                result["batch_check"] = checked
            elif batch_check == "always":
                warn("batch_check needs two rows or more: a single one shares its batch with nobody")
        if reference is not None:
            result["kl"] = _divergence(engine, args, reference, prompts, evaluation)
        if rows:
            write_lines(Path(rows), evaluation.records())
    print_values(result, json)
    return 0


def _divergence(
    engine: LocalEngine, args: ESConfig, reference: str, prompts: list[Prompt], evaluation: Evaluation
) -> float | None:
    """Return KL(model || reference) per token, by the k3 estimator on the model's own completions.

    None, with a warning, where a log-probability of the model or of the reference is not finite.
    """
    repeated = [prompt for prompt, row in zip(prompts, evaluation.rows, strict=True) for _ in row.token_ids]
    token_ids = [ids for row in evaluation.rows for ids in row.token_ids]
    own = engine.token_logprobs(repeated, token_ids)
    other_engine = setup.load_engine(dataclasses.replace(args, model=reference))
    largest = max((token for ids in token_ids for token in ids), default=0)
    vocab_size = other_engine.facts.vocab_size
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"reference {reference} has an embedding of {vocab_size} rows, and the model answered with "
            f"token {largest}: a KL divergence needs two models of one vocabulary"
        )
    other = other_engine.token_logprobs(repeated, token_ids)
    for name, its_engine, found in ((args.model, engine, own), (reference, other_engine, other)):
        broken = sum(not math.isfinite(value) for row in found for value in row)
        if broken:
            warn(f"{broken} of {sum(map(len, found))} log-probabilities of {name} are not finite in "
                 f"{its_engine.facts.dtype}, so kl is unknown")  # fmt: skip
            return None
    return kl_k3(own, other)
