"""Rejection sampling: sample the base model on every training prompt, and fine-tune it on the right completions.

All samples are drawn before the first step; their time and number count towards the budgets. There are
``num_generations`` rounds of one sample for each prompt, and each round has the order of one epoch. A forward pass may
hold samples of several rounds. Sampling ends after ``max_samples`` samples, or after half of ``max_time_s``. A sample
is right if the task's accuracy is 1, or, for data without accuracy, if its reward is at least ``min_reward``. Equal
samples of a prompt count once. TRL's `SFTTrainer` then takes ``max_steps`` steps of ``batch_size`` samples each, with a
loss over the completions' tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import trl

from estune.baselines.arguments import method_arguments, method_record, trl_config
from estune.baselines.policy_gradient import drive
from estune.baselines.session import BaselineSession
from estune.data.batches import Batches
from estune.errors import UserError
from estune.es.types import Completion, Prompt
from estune.files import replace_file, write_json
from estune.train.rollouts import Evaluator, scored

SAMPLES_FILE = "samples.jsonl"  # the right samples
DRAWING_FILE = "drawing.json"  # the cost of sampling; written last, so it marks the samples as complete
Sample = tuple[int, tuple[int, ...]]  # row, token ids


def rejection(session: BaselineSession) -> None:
    """Sample the base, keep the right samples, and fine-tune on them.

    Raises:
        UserError: no sample was right.
        Interrupted: the run was asked to stop.
    """
    args = session.args
    session.step_started()
    options = method_arguments(args)
    kept: list[Sample] = []
    if session.steps_done or _has_drawn(session):
        kept = _read(session)
    elif not session.ended:
        kept = _draw(session, options["min_reward"], options["max_samples"])
    drawing_s = time.perf_counter() - session.clock
    config, estune_arguments = trl_config(
        args,
        str(session.trainer_directory),
        args.batch_size,
        session.module.num_parameters(),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    record = method_record(args.method, "trl.SFTTrainer", config, estune_arguments)
    record |= {"samples_drawn": session.evaluations, "samples_kept": len(kept)}
    if not kept:
        record["drawing_s"] = drawing_s  # no step will record this time
    session.write_method(record)
    if session.ended:
        return
    if not kept:
        raise UserError(f"none of {session.evaluations} samples of the base was right: fine-tuning has no data")
    rows = []
    for row, tokens in kept:
        prompt = list(session.train_prompts[row].token_ids)
        rows.append({"input_ids": [*prompt, *tokens], "labels": [-100] * len(prompt) + list(tokens)})
    drive(
        session,
        lambda driver: trl.SFTTrainer(
            model=session.module,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=copy.deepcopy(session.engine.assets.tokenizer),  # TRL adds a padding token to it
            callbacks=[driver],
        ),
    )


def _draw(session: BaselineSession, min_reward: float | None, max_samples: int | None) -> list[Sample]:
    """Sample the base, return the right samples, and store them for a resume."""
    args = session.args
    kept: dict[Sample, None] = {}
    for drawn in _batches(session, max_samples):
        ids = [row for _, row in drawn]
        answers = session.sample(_prompts(session, drawn), 1, 0)  # (B, 1)
        for row, [completion], right in zip(ids, answers, _right(session, ids, answers, min_reward), strict=True):
            if right and completion.finished:
                kept[row, completion.token_ids] = None
        if args.max_time_s and 2 * (time.perf_counter() - session.clock) >= args.max_time_s:
            break
    if not kept:
        return []
    lines = [json.dumps({"row": row, "completion_ids": tokens}) for row, tokens in kept]
    data = ("\n".join(lines) + "\n").encode()
    session.trainer_directory.mkdir(exist_ok=True)
    replace_file(session.trainer_directory / SAMPLES_FILE, lambda file: file.write(data))
    cost = {"seconds": time.perf_counter() - session.clock, "evaluations": session.evaluations}
    known = {"measured": session.measured, "facts": session.facts, "samples": hashlib.sha256(data).hexdigest()}
    write_json(session.trainer_directory / DRAWING_FILE, cost | known)
    return list(kept)


def _batches(session: BaselineSession, max_samples: int | None) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of (round, row), one pair a sample, with at most ``max_samples`` pairs in total.

    A batch may hold pairs of several rounds.
    """
    args, n_rows = session.args, len(session.train_prompts)
    epochs = Batches(n_rows, n_rows, args.seed)
    order = ((draw, row) for draw in range(args.num_generations) for row in epochs.rows_for_step(draw))
    left = itertools.islice(order, max_samples)
    while drawn := list(itertools.islice(left, args.prompts_per_batch)):
        yield drawn


def _prompts(session: BaselineSession, drawn: list[tuple[int, int]]) -> list[Prompt]:
    """Return the prompts of (round, row) pairs, with a distinct ``row_id`` for every pair.

    The seed and the ``row_id`` alone determine a sample's random numbers.
    """
    prompts = session.train_prompts
    return [dataclasses.replace(prompts[row], row_id=draw * len(prompts) + row) for draw, row in drawn]


def _right(
    session: BaselineSession, ids: list[int], answers: list[list[Completion]], min_reward: float | None
) -> Iterator[bool]:
    """Score one completion of each row, answers (B, 1), and return whether each is right, (B,)."""
    values = session.score(ids, answers)[:, 0]  # (B,)
    right = values >= (min_reward if min_reward is not None else np.inf)
    if min_reward is None and session.accuracy_pool is not None:
        grader = Evaluator(session.engine, session.accuracy_pool, session.args.response_prefix)
        rows, prompts = [session.train_rows[row] for row in ids], [session.train_prompts[row] for row in ids]
        result = scored(grader.score(rows, prompts, answers, session.state()), session.should_stop)
        right = result.rewards.reshape(values.shape) == 1.0
    return map(bool, right)


def _has_drawn(session: BaselineSession) -> bool:
    """Return whether an earlier process has stored all samples; if so, add their cost to the session.

    The result is False if the samples are damaged or belong to other data or another base.
    """
    try:
        drawing = json.loads((session.trainer_directory / DRAWING_FILE).read_text(encoding="utf-8"))
        samples = (session.trainer_directory / SAMPLES_FILE).read_bytes()
        if drawing["facts"] != session.facts or drawing["samples"] != hashlib.sha256(samples).hexdigest():
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    session.clock -= drawing["seconds"]
    session.evaluations = drawing["evaluations"]
    session.measured = [(size, values) for size, values in drawing["measured"]]
    return True


def _read(session: BaselineSession) -> list[Sample]:
    path = session.trainer_directory / SAMPLES_FILE
    try:
        samples: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(sample["row"], tuple(sample["completion_ids"])) for sample in samples]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is missing or damaged; delete {path.parent} to begin again from step 0") from None
