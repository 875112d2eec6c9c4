"""Rejection sampling: the base answers every training prompt some times, and is fine-tuned on what was right.

All samples are drawn before the first step (their time and number count), `num_generations` of each prompt; a sample is
right where the task's accuracy says so, or, for data without one, where its reward is at least ``min_reward``. Equal
samples of a prompt count once. Then TRL's `SFTTrainer` takes ``max_steps`` steps of ``batch_size`` samples each; the
loss counts the completion's tokens only.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import datasets
import numpy as np
import trl

from estune.baselines.arguments import own_arguments, record_of, trl_config
from estune.baselines.ground import Ground
from estune.baselines.policy_gradient import drive
from estune.errors import UserError
from estune.files import replace_file
from estune.rollouts import Evaluator, scored

SAMPLES_FILE = "samples.jsonl"
Sample = tuple[int, tuple[int, ...]]  # row, token ids


def rejection(ground: Ground) -> None:
    """Sample, keep what is right, fine-tune.

    Raises:
        UserError: no sample was right.
        Interrupted: it was asked to stop.
    """
    args = ground.args
    ground.step_started()
    own = own_arguments(args)
    kept = _read(ground) if ground.steps_done else [] if ground.ended else _draw(ground, own["min_reward"])
    batch = int(args.batch_size)
    config, own = trl_config(
        args,
        str(ground.trainer_directory),
        batch,
        ground.module.num_parameters(),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    ground.keep_method({**record_of(args.method, "trl.SFTTrainer", config, own), "samples_kept": len(kept)})
    if ground.ended:
        return
    rows = []
    for row, tokens in kept:
        prompt = list(ground.train_prompts[row].token_ids)
        rows.append({"input_ids": [*prompt, *tokens], "labels": [-100] * len(prompt) + list(tokens)})
    drive(
        ground,
        lambda driver: trl.SFTTrainer(
            model=ground.module,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=copy.deepcopy(ground.engine.tokenizer),  # TRL gives it a padding token
            callbacks=[driver],
        ),
    )


def _draw(ground: Ground, min_reward: float | None) -> list[Sample]:
    """Sample the base, keep what is right, and write it down for a resume."""
    args, size = ground.args, int(ground.args.prompts_per_batch)
    kept: dict[Sample, None] = {}
    for start in range(0, len(ground.train_prompts), size):
        prompts = ground.train_prompts[start : start + size]
        ids = [prompt.row_id for prompt in prompts]
        answers = ground.sample(prompts, args.num_generations, start)
        values = ground.score(ids, answers)  # (B, G)
        right = values >= (min_reward if min_reward is not None else np.inf)
        if min_reward is None and ground.accuracy_pool is not None:
            grader = Evaluator(ground.engine, ground.accuracy_pool, args.response_prefix)
            rows = [ground.train_rows[row] for row in ids]
            result = scored(grader.score(rows, prompts, answers, ground.trainer_state()), ground.should_stop)
            right = result.rewards.reshape(values.shape) == 1.0
        for b, g in zip(*np.nonzero(right), strict=True):
            if answers[b][g].finished:
                kept[ids[b], answers[b][g].token_ids] = None
    if not kept:
        raise UserError(f"none of {ground.evaluations} samples of the base was right: there is nothing to learn from")
    lines = [json.dumps({"row": row, "completion_ids": tokens}) for row, tokens in kept]
    data = ("\n".join(lines) + "\n").encode()
    ground.trainer_directory.mkdir(exist_ok=True)
    replace_file(ground.trainer_directory / SAMPLES_FILE, lambda file: file.write(data))
    return list(kept)


def _read(ground: Ground) -> list[Sample]:
    text = (ground.trainer_directory / SAMPLES_FILE).read_text(encoding="utf-8")
    found: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    return [(line["row"], tuple(line["completion_ids"])) for line in found]
