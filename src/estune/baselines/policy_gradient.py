"""GRPO, Dr.GRPO and RLOO: TRL's trainers, given ES's prompts, samples and rewards.

Nothing of a method is changed. A prompt reaches the trainer as the tokens that ES's engine would get; completions come
from that engine (or, with ``generation: trl``, from the trainer's own `generate`); rewards come from the reward workers
through an ordinary reward function. Two methods of the trainer are replaced for that, `_tokenize_prompts` and
`_generate_single_turn`, which is why TRL's version is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import trl
from transformers import TrainerCallback

from estune.baselines.arguments import record_of, trl_config
from estune.baselines.ground import Ground
from estune.engines.base import Completion, Interrupted

# TRL's numbers that estune measures itself, the same for all methods.
MEASURED = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "completions/",
    "rewards/",
    "step_time",
    "train_",
    "total_flos",
)


class Driver(TrainerCallback):
    """Tells the ground of every step, and the trainer when to stop and to save."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Take a step's metrics."""
        if not logs or "loss" not in logs:  # the summary at the end
            return
        ground = self.ground
        record = {name: value for name, value in logs.items() if not name.startswith(MEASURED) and name != "epoch"}
        ground.step_done(state.global_step, record)
        done, every = ground.steps_done, ground.args.save_steps
        stopped = ground.should_stop()
        if ground.ended or stopped:
            control.should_training_stop = True
        if ground.ended or stopped or (every and done % every == 0):
            control.should_save = True


def policy_gradient(ground: Ground) -> None:
    """Train by GRPO, Dr.GRPO or RLOO until the run has ended.

    Raises:
        Interrupted: it was asked to stop; the trainer's state is saved.
    """
    args = ground.args
    batch = int(args.batch_size) * args.num_generations
    config, own = trl_config(
        args,
        str(ground.trainer_directory),
        batch,
        ground.module.num_parameters(),
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
    )
    base = trl.RLOOTrainer if args.method == "rloo" else trl.GRPOTrainer
    ground.keep_method(record_of(args.method, f"trl.{base.__name__}", config, own))
    trainer = _trainer_class(base, ground, own["generation"] == "estune")(
        model=ground.module,
        reward_funcs=reward_function(ground),
        args=config,
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": prompt.text, "row": row} for row, prompt in enumerate(ground.train_prompts)]
        ),
        processing_class=ground.engine.tokenizer,
        callbacks=[Driver(ground)],
    )
    drive(trainer, ground)


def drive(trainer: Any, ground: Ground, restart_clock: bool = True) -> None:
    """Run a trainer of transformers from where the run stands to its end.

    ``restart_clock``: what went before is no part of the first step.

    Raises:
        Interrupted: it was asked to stop.
    """
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    start = ground.trainer_directory / f"checkpoint-{ground.steps_done}" if ground.steps_done else None
    if restart_clock:
        ground.step_started()
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    if not ground.ended:
        raise Interrupted


def reward_function(ground: Ground) -> Any:
    """Return the reward function that TRL calls with a batch's completions, each prompt's G in a row."""

    def score(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float | None]:
        count = ground.args.num_generations
        ends = ground.ends()
        answers = [Completion(tuple(ids), bool(ids) and ids[-1] in ends) for ids in completion_ids]
        grouped = [answers[i : i + count] for i in range(0, len(answers), count)]
        rewards = ground.score(row[::count], grouped)
        return [None if np.isnan(value) else float(value) for value in rewards.reshape(-1)]

    return score


def _trainer_class(base: type[Any], ground: Ground, engine_generates: bool) -> type[Any]:
    """Return TRL's trainer class with ES's tokens, and ES's engine for sampling."""
    known = {prompt.text: prompt for prompt in ground.train_prompts}
    by_tokens = {prompt.token_ids: prompt for prompt in ground.train_prompts}

    class Trainer(base):  # type: ignore[misc]
        batches = ground.evaluations // (int(ground.args.batch_size) * ground.args.num_generations)

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [list(known[text].token_ids) for text in prompts], None, {}

        def _generate_single_turn(self, prompt_ids: Sequence[Sequence[int]], *rest: Any, **named: Any) -> Any:
            if not engine_generates:
                return super()._generate_single_turn(prompt_ids, *rest, **named)
            count = ground.args.num_generations
            prompts = [by_tokens[tuple(ids)] for ids in prompt_ids[::count]]
            ground.moved()  # the optimizer may have moved the weights since the last step was noted
            answers = ground.sample(prompts, count, self.batches)
            self.batches += 1
            ids = [list(completion.token_ids) for row in answers for completion in row]
            return ids if base is trl.RLOOTrainer else (ids, None)

    Trainer.__name__ = base.__name__
    return Trainer
