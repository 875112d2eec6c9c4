"""Rejection sampling: the base answers every training prompt some times, and is fine-tuned on what was right.

All samples are drawn before the first step (their time and number count), in `num_generations` rounds of one for every
prompt, each round in the order of one of the run's epochs; rounds follow each other without a gap, so that few prompts
fill a forward pass, too. ``max_samples`` ends it after exactly that many; a run of limited time draws for half of it,
and its steps have the rest. A sample is right where the task's accuracy says so, or, for data without one, where
its reward is at least ``min_reward``. Equal samples of a prompt count once. Then TRL's `SFTTrainer` takes ``max_steps``
steps of ``batch_size`` samples each; the loss counts the completion's tokens only.
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

from estune.baselines.arguments import own_arguments, record_of, trl_config
from estune.baselines.policy_gradient import drive
from estune.baselines.session import BaselineSession
from estune.data.batches import Batches
from estune.errors import UserError
from estune.es.types import Completion, Prompt
from estune.files import replace_file, write_json
from estune.train.rollouts import Evaluator, scored

SAMPLES_FILE = "samples.jsonl"  # what was right
DRAWING_FILE = "drawing.json"  # what it cost; written last, so it says that the drawing was done
Sample = tuple[int, tuple[int, ...]]  # row, token ids


def rejection(session: BaselineSession) -> None:
    """Sample, keep what is right, fine-tune.

    Raises:
        UserError: no sample was right.
        Interrupted: it was asked to stop.
    """
    args = session.args
    session.step_started()
    own = own_arguments(args)
    kept: list[Sample] = []
    if session.steps_done or _has_drawn(session):
        kept = _read(session)
    elif not session.ended:
        kept = _draw(session, own["min_reward"], own["max_samples"])
    drawing_s = time.perf_counter() - session.clock
    batch = int(args.batch_size)
    config, own = trl_config(
        args,
        str(session.trainer_directory),
        batch,
        session.module.num_parameters(),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    record = record_of(args.method, "trl.SFTTrainer", config, own)
    record |= {"samples_drawn": session.evaluations, "samples_kept": len(kept)}
    if not kept:
        record["drawing_s"] = drawing_s  # what was spent, since no step will say it
    session.keep_method(record)
    if session.ended:
        return
    if not kept:
        raise UserError(f"none of {session.evaluations} samples of the base was right: there is nothing to learn from")
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
            processing_class=copy.deepcopy(session.engine.assets.tokenizer),  # TRL gives it a padding token
            callbacks=[driver],
        ),
    )


def _draw(session: BaselineSession, min_reward: float | None, max_samples: int | None) -> list[Sample]:
    """Sample the base, keep what is right, and write it down for a resume, if there is any."""
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
    """Yield the (round, row) of every sample that is drawn, B at a time, at most ``max_samples`` in all.

    Rounds follow each other without a gap: where prompts are few, several of them share a forward pass.
    """
    args, n_rows = session.args, len(session.train_prompts)
    epochs = Batches(n_rows, n_rows, args.seed)
    order = ((draw, row) for draw in range(args.num_generations) for row in epochs.rows_for_step(draw))
    left = itertools.islice(order, max_samples)
    while drawn := list(itertools.islice(left, int(args.prompts_per_batch))):
        yield drawn


def _prompts(session: BaselineSession, drawn: list[tuple[int, int]]) -> list[Prompt]:
    """Return the prompts of (round, row), each round's rows numbered on after the last one's.

    A sample's random numbers follow from that number and the seed, whatever is drawn beside it.
    """
    prompts = session.train_prompts
    return [dataclasses.replace(prompts[row], row_id=draw * len(prompts) + row) for draw, row in drawn]


def _right(
    session: BaselineSession, ids: list[int], answers: list[list[Completion]], min_reward: float | None
) -> Iterator[bool]:
    """Score one completion of each row, answers (B, 1), and say which are right."""
    values = session.score(ids, answers)[:, 0]  # (B,)
    right = values >= (min_reward if min_reward is not None else np.inf)
    if min_reward is None and session.accuracy_pool is not None:
        grader = Evaluator(session.engine, session.accuracy_pool, session.args.response_prefix)
        rows, prompts = [session.train_rows[row] for row in ids], [session.train_prompts[row] for row in ids]
        result = scored(grader.score(rows, prompts, answers, session.state()), session.should_stop)
        right = result.rewards.reshape(values.shape) == 1.0
    return map(bool, right)


def _has_drawn(session: BaselineSession) -> bool:
    """Return whether a run that was killed before its first state was kept had drawn, and count what that cost.

    Samples that are damaged, or of other data or another base, are drawn again.
    """
    try:
        found = json.loads((session.trainer_directory / DRAWING_FILE).read_text(encoding="utf-8"))
        samples = (session.trainer_directory / SAMPLES_FILE).read_bytes()
        if found["facts"] != session.facts or found["samples"] != hashlib.sha256(samples).hexdigest():
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    session.clock -= found["seconds"]
    session.evaluations = found["evaluations"]
    session.measured = [(size, values) for size, values in found["measured"]]
    return True


def _read(session: BaselineSession) -> list[Sample]:
    path = session.trainer_directory / SAMPLES_FILE
    try:
        found: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [(line["row"], tuple(line["completion_ids"])) for line in found]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is missing or damaged; delete {path.parent} to begin again from step 0") from None
