"""What `estune evaluate`, `score`, `replay` and `env` do, behind the parser."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from estune.config import ESConfig
from estune.console import note, print_json, print_result, say, show_progress, warn
from estune.data.datasets import check_columns, has_splits, load_rows, reward_inputs
from estune.engines.base import Engine
from estune.environment import environment
from estune.errors import UserError, nearest
from estune.es.fitness import mean, weigh
from estune.es.types import Prompt
from estune.models.names import local_directory
from estune.rewards.pool import RewardBatch
from estune.run.checkpoint import BASE_DIRECTORY, anchor_reader, write_model
from estune.run.directory import JOURNAL_FILE, check_base, check_parameters, replay_steps
from estune.run.journal import Journal
from estune.run.records import write_lines
from estune.run.resume import located, refuse_lost
from estune.train import setup
from estune.train.evaluation import Evaluation, check_batches, evaluate, interval, kl_k3
from estune.train.rollouts import Evaluator
from estune.train.setup import Rewards
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
        if warning := evaluation.warning(engine.compute_dtype):
            warn(warning)
        if n_samples:
            result["pass_at_k"] = evaluation.pass_at_k()
        if batch_check == "always" or (batch_check == "auto" and engine.compute_dtype in NARROW):
            checked = check_batches(engine, prompts, setup.sampling(args, 0), evaluation)
            if checked is not None:
                result["batch_check"] = checked
            elif batch_check == "always":
                warn("batch_check needs two rows or more: a single one shares its batch with nobody")
        if reference is not None:
            result["kl"] = _divergence(engine, args, reference, prompts, evaluation)
        if rows:
            write_lines(Path(rows), evaluation.records())
    _print_result(result, json)
    return 0


def _divergence(
    engine: Engine, args: ESConfig, reference: str, prompts: list[Prompt], evaluation: Evaluation
) -> float | None:
    """Return KL(model || reference) per token, by the k3 estimator on the model's own completions.

    None, with a warning, where a log-probability of the model or of the reference is not finite.
    """
    repeated = [prompt for prompt, row in zip(prompts, evaluation.rows, strict=True) for _ in row.token_ids]
    token_ids = [ids for row in evaluation.rows for ids in row.token_ids]
    own = engine.token_logprobs(repeated, token_ids)
    other_engine = setup.load_engine(dataclasses.replace(args, model=reference))
    largest = max((token for ids in token_ids for token in ids), default=0)
    if other_engine.vocab_size is not None and largest >= other_engine.vocab_size:
        raise UserError(
            f"reference {reference} has an embedding of {other_engine.vocab_size} rows, and the model answered with "
            f"token {largest}: a KL divergence needs two models of one vocabulary"
        )
    other = other_engine.token_logprobs(repeated, token_ids)
    for name, its_engine, found in ((args.model, engine, own), (reference, other_engine, other)):
        broken = sum(not math.isfinite(value) for row in found for value in row)
        if broken:
            warn(f"{broken} of {sum(map(len, found))} log-probabilities of {name} are not finite in "
                 f"{its_engine.compute_dtype}, so kl is unknown")  # fmt: skip
            return None
    return kl_k3(own, other)


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        if name == "accuracy":
            low, high = result["accuracy_ci95"]
            print_result(f"{name:20} {value:.1%}  (95 % interval {low:.1%} to {high:.1%})")
        elif name == "batch_check":
            size, other = value["prompts_per_batch"]
            print_result(f"{name:20} in batches of {other} instead of {size} prompts, {value['changed']} of "
                         f"{value['rows']} rows have other tokens")  # fmt: skip
        elif name != "accuracy_ci95":
            print_result(f"{name:20} {value:.4g}" if isinstance(value, float) else f"{name:20} {value}")


def score_command(args: ESConfig, completions: Path, as_json: bool) -> int:
    """Score given completions with a task's reward and accuracy (or with rewards of one's own)."""
    task = setup.task_of(args)
    rewards = setup.resolve_rewards(args, None, task)
    rows = load_rows(str(completions))
    for index, row in enumerate(rows):
        if "completion" not in row:
            raise UserError(f"row {index} of {completions} has no column 'completion'")
    texts = [str(row["completion"]) for row in rows]
    columns = [{name: value for name, value in row.items() if name != "completion"} for row in rows]
    if task is not None:
        columns = [task.prepare_row(row) for row in columns]
    columns = [{"prompt": "", **row} for row in columns]
    check_columns(columns, rewards.funcs, rewards.names)
    result, accuracy = _scored(args, rewards, columns, texts)
    values = weigh(np.where(result.failed, np.nan, result.rewards), rewards.weights)  # (rows,)
    output: dict[str, Any] = {"n": len(rows), "reward": _or_none(mean(values))}
    if accuracy is not None:
        output["accuracy"] = mean(accuracy)
        output["accuracy_ci95"] = list(interval(accuracy.tolist()))
    output["rewards"] = [_or_none(value) for value in values.tolist()]
    output["errors"] = int(result.failed.any(axis=1).sum())
    if as_json:
        print_json(output)
    else:
        _print_result({name: value for name, value in output.items() if name != "rewards"}, False)
        for message in result.errors:
            note(message)
    return 0


def _scored(args: ESConfig, rewards: Rewards, columns: list[dict[str, Any]], texts: list[str]) -> Any:
    """Return the reward result and the accuracy (rows,) or None, both from killable workers."""
    prompts, answers, named = reward_inputs(columns, texts, "")
    batch = RewardBatch(prompts, answers, [[] for _ in texts], named, {"global_step": 0, "max_steps": 0})
    with setup.reward_pool(args, rewards.funcs, rewards.names) as pool:
        result = pool.submit(batch).result()
    if rewards.accuracy is None:
        return result, None
    with setup.reward_pool(args, [rewards.accuracy], ["accuracy"]) as pool:
        graded = pool.submit(batch).result()
    return result, np.where(graded.failed, 0.0, np.nan_to_num(graded.rewards))[:, 0]


def _or_none(value: float) -> float | None:
    return None if value != value else value


def replay_command(run: Path, step: int | None, output_dir: Path, model: str | None) -> int:
    """Rebuild the weights after ``step`` steps from base model and journal, verify them, save them."""
    journal = Journal.open(run / JOURNAL_FILE, repair=False)
    if journal is None:
        raise UserError(f"{run} holds no journal to replay")
    step = len(journal.steps) if step is None else step
    if not 0 <= step <= len(journal.steps):
        raise UserError(f"step must lie between 0 and {len(journal.steps)}, the steps of the journal, not {step}")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"output_dir {output_dir} is not an empty directory")
    config = located({**journal.header["config"], "device": "auto"}, run)  # the bits are the same on every device
    refuse_lost({"model": config["model"]}, run, () if model is None else ("model",))
    if model is not None:
        config["model"] = model
    args = ESConfig.from_mapping(config, f"the journal of {run}")
    engine = setup.load_engine(args)
    check_base(journal, engine.master.fingerprint(), args.model)
    check_parameters(journal, engine.master.specs)
    anchor = None
    if args.weight_decay_anchor == "base":
        own = run / BASE_DIRECTORY
        source = own if own.exists() else local_directory(args.model)
        anchor = anchor_reader(source, engine.master) if source else None
    replay_steps(journal, engine, 0, step, anchor)
    write_model(output_dir, engine, float32=False)
    proven = step < len(journal.steps) or step in journal.checkpoints
    unproven = f"replayed (step {step} is not verified: the run stopped before it saved a fingerprint of it)"
    how = "replayed and verified" if proven else unproven
    say(f"estune: {step} steps {how}, fingerprint {engine.master.fingerprint()}, in {output_dir}")
    return 0


def env_command(as_json: bool) -> int:
    """Print versions and machine."""
    facts = environment()
    if as_json:
        print_json(facts)
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            for package, version in value.items():
                print_result(f"{package:20} {version}")
        else:
            print_result(f"{name:20} {value}")
    return 0
