"""GRPO, Dr.GRPO and RLOO: TRL's trainers, given ES's prompts, samples and rewards.

Nothing of a method is changed. A prompt reaches the trainer as the tokens that ES's engine would get; completions come
from that engine (or, with ``generation: trl``, from the trainer's own `generate`); rewards come from the reward workers
through an ordinary reward function. Two methods of the trainer are replaced for that, `_tokenize_prompts` and
`_generate_single_turn`, which is why TRL's version is pinned.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
import trl
from transformers import TrainerCallback

from estune.baselines.arguments import record_of, refused, sampling_arguments, trl_config
from estune.baselines.session import BaselineSession, Diverged
from estune.es.types import Completion, Interrupted
from estune.files import remove_path, sync_tree

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
    """Tells the session of every step, and the trainer when to stop and to save."""

    def __init__(self, session: BaselineSession) -> None:
        self.session = session
        self.trainer: Any = None
        self.at_step_end: tuple[Any, ...] | None = None  # random states and tokens seen
        self.saved = session.steps_done  # the step whose state is on disk

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock, where what went before is no part of the first step."""
        if self.session.steps_done or not self.session.measured:
            self.session.step_started()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Take a step's metrics."""
        if not logs or "loss" not in logs:  # the summary at the end
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
        """Say in the trainer's checkpoint how far the run is, which makes it one to go on from; drop those before."""
        session = self.session
        directory = session.trainer_directory / f"checkpoint-{session.steps_done}"
        sync_tree(directory)
        session.progress.keep(directory)
        for other in session.trainer_directory.glob("checkpoint-*"):
            if other != directory:
                remove_path(other)
        self.saved = session.steps_done
        session.step_started()  # saving is no part of the next step

    def save_where_interrupted(self) -> None:
        """Save the state at the end of the last step: the one that was interrupted has moved random states alone."""
        if self.at_step_end is None or self.saved == self.session.steps_done:
            return
        *states, tokens = self.at_step_end
        set_random_states(*states)
        self.trainer.state.num_input_tokens_seen = tokens
        self.trainer._save_checkpoint(self.trainer.model, None)
        self.on_save()


def random_states() -> tuple[Any, ...]:
    """Return the states of the generators that a trainer draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(python: Any, numpy: Any, cpu: torch.Tensor, cuda: list[torch.Tensor]) -> None:
    """Set what `random_states` returned."""
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def policy_gradient(session: BaselineSession) -> None:
    """Train by GRPO, Dr.GRPO or RLOO until the run has ended.

    Raises:
        Interrupted: it was asked to stop; the trainer's state is saved.
    """
    args = session.args
    batch = int(args.batch_size) * args.num_generations
    config, own = trl_config(
        args,
        str(session.trainer_directory),
        batch,
        session.module.num_parameters(),
        **sampling_arguments(args),
    )
    base = trl.RLOOTrainer if args.method == "rloo" else trl.GRPOTrainer
    session.keep_method(record_of(args.method, f"trl.{base.__name__}", config, own))
    if session.ended:
        return
    finished: dict[tuple[int, ...], bool] = {}
    # Two rows may have the same text: TRL sees a prompt as the number of its row.
    rows = [{"prompt": str(row), "row": row} for row in range(len(session.train_prompts))]
    drive(
        session,
        lambda driver: _trainer_class(base, session, own["generation"] == "estune", finished)(
            model=session.module,
            reward_funcs=reward_function(session, finished),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=copy.deepcopy(session.engine.assets.tokenizer),  # TRL gives it a padding token
            callbacks=[driver],
        ),
    )


def drive(session: BaselineSession, make: Callable[[Driver], Any]) -> None:
    """Run a trainer of transformers from where the run stands to its end.

    Raises:
        Interrupted: it was asked to stop; its state at the end of the last step is saved.
        UserError: TRL does not take the arguments.
    """
    driver = Driver(session)
    try:
        trainer = driver.trainer = make(driver)
    except ValueError as error:
        raise refused(session.args.method, error) from error
    if hasattr(trainer, "_total_train_tokens"):  # TRL counts the tokens of fine-tuning from the last start
        trainer._total_train_tokens = int(session.progress.tokens)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    start = session.trainer_directory / f"checkpoint-{session.steps_done}" if session.steps_done else None
    try:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    except Interrupted:
        driver.save_where_interrupted()
        raise
    if not session.ended:
        raise Interrupted


def count_positions_from_the_mask(model: Any) -> None:
    """Let a model place tokens where the engine that sampled them did: at 0 behind the padding on the left.

    TRL gives no positions, and a model whose positions are absolute (GPT-2's, say) counts the padding then: what is
    trained is another model than the one that answered. TRL's own generation has that, too, and is left as it is.
    """
    if model is None or "position_ids" not in inspect.signature(model.forward).parameters:
        return

    def add(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = given.get("attention_mask")
        if mask is not None and mask.ndim == 2 and given.get("position_ids") is None:
            given = {**given, "position_ids": (mask.long().cumsum(-1) - 1).clamp_(min=0)}
        return args, given

    model.register_forward_pre_hook(add, with_kwargs=True)


def reward_function(session: BaselineSession, finished: dict[tuple[int, ...], bool]) -> Any:
    """Return the reward function that TRL calls with a batch's completions, each prompt's G in a row.

    ``finished`` tells of completions that ES's engine sampled whether they ended by themselves.
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
    """Return TRL's trainer class with ES's tokens, and ES's engine for sampling; see `reward_function`."""

    class Trainer(base):  # type: ignore[misc]
        drawn: Sequence[int] = ()  # rows of the batch in hand, each prompt's G in a row

        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            if engine_generates:
                for model in (self.model, getattr(self, "ref_model", None)):
                    count_positions_from_the_mask(model)

        def _get_train_sampler(self, *given: Any) -> Any:
            sampler = super()._get_train_sampler(*given)
            generator = getattr(sampler, "generator", None)  # it has none where it does not shuffle
            for _ in range(math.floor(session.progress.epochs + 1e-9) if generator is not None else 0):
                torch.randperm(len(session.train_rows), generator=generator)  # each epoch's order goes on from the last
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
                        session.args.method, session.steps_done, "its probabilities are no numbers"
                    ) from error
            count = session.args.num_generations
            prompts = [session.train_prompts[row] for row in self.drawn[::count]]
            session.moved()  # the optimizer may have moved the weights since the last step was noted
            answers = session.sample(prompts, count, session.batches)
            session.batches += 1
            finished.clear()
            finished.update((completion.token_ids, completion.finished) for row in answers for completion in row)
            ids = [list(completion.token_ids) for row in answers for completion in row]
            return ids if base is trl.RLOOTrainer else (ids, None)

    Trainer.__name__ = base.__name__
    return Trainer
