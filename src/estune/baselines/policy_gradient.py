"""GRPO, Dr.GRPO and RLOO: TRL's trainers with ES's prompts, samples and rewards.

The algorithms are TRL's, unchanged. The trainer gets the same prompt tokens as ES's engine. Completions come from that
engine, or with ``generation: trl`` from the trainer's own `generate`. Rewards come from the reward workers through a
TRL reward function. estune overrides two private methods of the trainer, `_tokenize_prompts` and
`_generate_single_turn`, so TRL's version is pinned.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
import trl
from transformers import TrainerCallback

from estune.baselines.arguments import method_record, refused, sampling_arguments, trl_config
from estune.baselines.session import BaselineSession, Diverged, random_states, set_random_states
from estune.es.types import Completion, Interrupted
from estune.files import remove_path, sync_tree

# Prefixes of TRL's metrics that estune replaces with its own measurements, which are the same for all methods.
MEASURED = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "rewards/",
    "step_time",
    "train_",
    "total_flos",
)


class Driver(TrainerCallback):
    """Reports every step to the session, and tells the trainer when to stop and when to save."""

    def __init__(self, session: BaselineSession) -> None:
        self.session = session
        self.trainer: Any = None
        self.at_step_end: tuple[Any, ...] | None = None  # random states and tokens processed, after the last step
        self.saved = session.steps_done  # step whose state is on disk

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock of the first step, unless the step includes the drawing of samples."""
        if self.session.steps_done or not self.session.measured:
            self.session.step_started()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Report a step's metrics to the session, then decide whether to save and to stop."""
        if not logs or "loss" not in logs:  # TRL's summary after the last step
            return
        session = self.session
        record = {name: value for name, value in logs.items() if not name.startswith(MEASURED) and name != "epoch"}
        self.at_step_end = (*random_states(), state.num_input_tokens_seen)
        session.step_done(state.global_step, record, float(state.epoch or 0.0))
        done, every = session.steps_done, session.args.save_steps
        stopped = session.should_stop()
        if session.ended or stopped:
            control.should_training_stop = True
        if session.ended or stopped or (every and done % every == 0):
            control.should_save = True

    def on_save(self, *_: Any, **__: Any) -> None:
        """Write the run's progress into the trainer's checkpoint, which completes it; delete older checkpoints."""
        session = self.session
        directory = session.trainer_directory / f"checkpoint-{session.steps_done}"
        sync_tree(directory)
        session.progress.write(directory)
        for other in session.trainer_directory.glob("checkpoint-*"):
            if other != directory:
                remove_path(other)
        self.saved = session.steps_done
        session.step_started()  # the next step's time does not include saving

    def save_last_step(self) -> None:
        """Save the state at the end of the last step; the interrupted step has changed only the random states."""
        if self.at_step_end is None or self.saved == self.session.steps_done:
            return
        *states, tokens = self.at_step_end
        set_random_states(*states)
        self.trainer.state.num_input_tokens_seen = tokens
        self.trainer._save_checkpoint(self.trainer.model, None)
        self.on_save()


def policy_gradient(session: BaselineSession) -> None:
    """Train by GRPO, Dr.GRPO or RLOO until the run has ended.

    Raises:
        Interrupted: the run was asked to stop; the trainer's state is saved.
    """
    args = session.args
    batch = args.batch_size * args.num_generations
    config, estune_arguments = trl_config(
        args,
        str(session.trainer_directory),
        batch,
        session.module.num_parameters(),
        **sampling_arguments(args),
    )
    base = trl.RLOOTrainer if args.method == "rloo" else trl.GRPOTrainer
    session.write_method(method_record(args.method, f"trl.{base.__name__}", config, estune_arguments))
    if session.ended:
        return
    finished: dict[tuple[int, ...], bool] = {}
    # TRL's "prompt" is the row's number, because two rows may have the same text.
    rows = [{"prompt": str(row), "row": row} for row in range(len(session.train_prompts))]
    drive(
        session,
        lambda driver: _trainer_class(base, session, estune_arguments["generation"] == "estune", finished)(
            model=session.module,
            reward_funcs=reward_function(session, finished),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=copy.deepcopy(session.engine.assets.tokenizer),  # TRL adds a padding token to it
            callbacks=[driver],
        ),
    )


def drive(session: BaselineSession, make: Callable[[Driver], Any]) -> None:
    """Run a trainer of transformers from the session's last step to the end of the run.

    Args:
        session: of the run.
        make: returns the trainer; it receives the callback that the trainer must have.

    Raises:
        Interrupted: the run was asked to stop; the state at the end of the last step is saved.
        UserError: TRL rejects the arguments.
    """
    driver = Driver(session)
    try:
        trainer = driver.trainer = make(driver)
    except ValueError as error:
        raise refused(session.args.method, error) from error
    if hasattr(trainer, "_total_train_tokens"):  # TRL counts fine-tuning's tokens from 0 after a resume
        trainer._total_train_tokens = int(session.progress.tokens)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    start = session.trainer_directory / f"checkpoint-{session.steps_done}" if session.steps_done else None
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    except Interrupted:
        driver.save_last_step()
        raise
    if not session.ended:
        raise Interrupted


def count_positions_from_the_mask(model: Any) -> None:
    """Make a model number positions from 0 after the left padding, as the engine does that sampled the completions.

    TRL passes no positions, so a model with absolute positions (such as GPT-2) counts the padding, and its logits
    differ from those of the engine. TRL's own generation counts the padding too; it is not changed.
    """
    if model is None or "position_ids" not in inspect.signature(model.forward).parameters:
        return

    def add_positions(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and kwargs.get("position_ids") is None:
            kwargs = {**kwargs, "position_ids": (mask.long().cumsum(-1) - 1).clamp_(min=0)}
        return args, kwargs

    model.register_forward_pre_hook(add_positions, with_kwargs=True)


def reward_function(session: BaselineSession, finished: dict[tuple[int, ...], bool]) -> Any:
    """Return the reward function that TRL calls with a batch's completions, (B * G,), grouped by prompt.

    ``finished`` maps the token ids of a completion that ES's engine sampled to whether it ended before the limit.
    """

    def score(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float | None]:
        count = session.args.num_generations
        ends = session.engine.assets.end_tokens
        listed = [tuple(ids) for ids in completion_ids]
        answers = [Completion(ids, finished.get(ids, bool(ids) and ids[-1] in ends)) for ids in listed]
        grouped = [answers[i : i + count] for i in range(0, len(answers), count)]
        rewards = session.score(row[::count], grouped)
        return [None if np.isnan(value) else float(value) for value in rewards.reshape(-1)]

    return score


def _trainer_class(
    base: type[Any], session: BaselineSession, engine_generates: bool, finished: dict[tuple[int, ...], bool]
) -> type[Any]:
    """Return a subclass of TRL's trainer with ES's prompt tokens and, if ``engine_generates``, ES's engine.

    The engine's completions are recorded in ``finished``; see `reward_function`.
    """

    class Trainer(base):  # type: ignore[misc]
        drawn: Sequence[int] = ()  # (B * G,), row of each completion of the current batch, grouped by prompt

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            if engine_generates:
                for model in (self.model, getattr(self, "ref_model", None)):
                    count_positions_from_the_mask(model)

        def _get_train_sampler(self, *args: Any) -> Any:
            sampler = super()._get_train_sampler(*args)
            generator = getattr(sampler, "generator", None)  # None if the sampler does not shuffle
            for _ in range(math.floor(session.progress.epochs + 1e-9) if generator is not None else 0):
                torch.randperm(len(session.train_rows), generator=generator)  # skip the finished epochs' random numbers
            return sampler

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            self.drawn = [int(row) for row in prompts]
            return [list(session.train_prompts[row].token_ids) for row in self.drawn], None, {}

        def _generate_single_turn(self, prompt_ids: Sequence[Sequence[int]], *rest: Any, **named: Any) -> Any:
            if not engine_generates:
                try:
                    return super()._generate_single_turn(prompt_ids, *rest, **named)
                except RuntimeError as error:
                    if "probability tensor" not in str(error):
                        raise
                    raise Diverged(
                        session.args.method, session.steps_done, "its probabilities are not finite"
                    ) from error
            count = session.args.num_generations
            prompts = [session.train_prompts[row] for row in self.drawn[::count]]
            session.mark_moved()  # the optimizer may have moved the weights since the last step was logged
            answers = session.sample(prompts, count, session.batches)
            session.batches += 1
            finished.clear()
            finished.update((completion.token_ids, completion.finished) for row in answers for completion in row)
            ids = [list(completion.token_ids) for row in answers for completion in row]
            return ids if base is trl.RLOOTrainer else (ids, None)

    Trainer.__name__ = base.__name__
    return Trainer
