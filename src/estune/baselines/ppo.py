"""PPO with a trained value model: the trainer of TRL 1.12, given ES's prompts and rewards.

Policy, frozen reference and value model start as the same base; the value model's head starts at zero. A step is one
update: `batch_size` prompts, a completion of each, then `num_ppo_epochs` times `num_mini_batches` steps of the
optimizer. The trainer samples by itself, from the whole distribution. It keeps nothing from which it could go on, so a
run that was stopped starts again.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, GenerationConfig, TrainerCallback, set_seed

from estune.baselines import trl_ppo
from estune.baselines.arguments import record_of, trl_config
from estune.baselines.session import BaselineSession
from estune.engines.hf.loading import quiet
from estune.errors import UserError
from estune.es.types import Completion, Interrupted

PAD = -1  # in what `score` gets


class RewardModel(nn.Module):
    """Gives every completion what `BaselineSession.score` says."""

    base_model_prefix = "backbone"

    def __init__(self, session: BaselineSession, pad: int) -> None:
        super().__init__()
        self.session, self.pad = session, pad
        self.backbone = _Tokens()
        self.handed_out: deque[tuple[int, int]] = deque()  # row, tokens of its padded prompt; of those not scored yet
        self.lowest = 0.0  # reward of the run so far, and 0 at most

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the prompts of some rows, padded on the left: (B, T)."""
        prompts = [self.session.train_prompts[row].token_ids for row in rows]
        width = max(len(prompt) for prompt in prompts)
        self.handed_out.extend((row, width) for row in rows)
        return {"input_ids": torch.tensor([[self.pad] * (width - len(prompt)) + [*prompt] for prompt in prompts])}

    def score(self, tokens: Tensor) -> Tensor:
        """Return the rewards (B, T, 1) of prompts with their completions (B, T), the same number at every token.

        A completion without a reward (it failed, or none applies) gets the lowest of the run so far, 0 at most.
        """
        rows, answers, ends = [], [], self.session.engine.assets.end_tokens
        for sequence in tokens.tolist():
            row, width = self.handed_out.popleft()
            prompt = self.session.train_prompts[row].token_ids
            assert tuple(sequence[width - len(prompt) : width]) == prompt, "a completion of another prompt"
            answer = sequence[width:]
            if PAD in answer:
                answer = answer[: answer.index(PAD)]
            rows.append(row)
            answers.append([Completion(tuple(answer), bool(answer) and answer[-1] in ends)])
        rewards = self.session.score(rows, answers)[:, 0]  # (B,)
        known = np.isfinite(rewards)
        if known.any():
            self.lowest = min(self.lowest, float(rewards[known].min()))
        rewards = np.where(known, rewards, self.lowest)
        given = torch.tensor(rewards, dtype=torch.float32, device=tokens.device)
        return given[:, None, None].expand(-1, tokens.shape[1], 1)


class _Tokens(nn.Module):
    """Stands where a reward model's transformer stands: its "hidden states" are the tokens themselves."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=(torch.where(attention_mask.bool(), input_ids, PAD),))


class _Ended(Exception):
    """Leaves the trainer, which has no other way out."""


class _Driver(TrainerCallback):
    """Tells the session of every step, and ends the training."""

    def __init__(self, session: BaselineSession, vf_coef: float) -> None:
        self.session, self.vf_coef = session, vf_coef

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Take a step's metrics, once an update."""
        record = {name: value for name, value in (logs or {}).items() if "/" in name}
        record["loss"] = record["loss/policy_avg"] + self.vf_coef * record["loss/value_avg"]
        record["learning_rate"] = (logs or {})["lr"]
        self.session.step_done(state.global_step, record)
        if self.session.ended or self.session.should_stop():
            raise _Ended


def ppo(session: BaselineSession) -> None:
    """Train by PPO until the run has ended.

    Raises:
        UserError: the model has no value head.
        Interrupted: it was asked to stop.
    """
    with trl_ppo.in_place(), quiet(), _cheap_collections(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"var\(\)")  # of one number, the ratio of a single optimizer step
        trainer = make_trainer(session)
        if session.ended:  # max_steps 0
            return
        session.step_started()
        try:
            trainer.train()
        except _Ended:
            if not session.ended:
                raise Interrupted from None


@contextmanager
def _cheap_collections() -> Iterator[None]:
    """Let garbage collections pass over what is alive now: the trainer has two in every update, of all of torch."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def make_trainer(session: BaselineSession) -> Any:
    """Return TRL's trainer, ready to train; write `method.json`."""
    args, module, batch = session.args, session.module, int(session.args.batch_size)
    if batch < 2:
        raise UserError("method ppo compares tokens over a step: it needs a batch_size of 2 or more")
    ends = sorted(session.engine.assets.end_tokens)
    used = {*ends, *(token for prompt in session.train_prompts for token in prompt.token_ids)}
    pad = pad_token(session.engine.assets.tokenizer, module, used)
    config, own = trl_config(
        args,
        str(session.trainer_directory),
        batch,
        module.num_parameters(),
        total_episodes=args.max_steps * batch,
        local_rollout_forward_batch_size=min(batch, int(args.prompts_per_batch)),
        response_length=args.max_completion_length,
        temperature=args.temperature,
        stop_token_id=ends[0] if ends else None,
        num_sample_generations=0,  # it would score samples that nobody learns from
    )
    if config.missing_eos_penalty is not None and len(ends) != 1:
        raise UserError(f"missing_eos_penalty knows one token that ends a completion, and {args.model} has {len(ends)}")
    set_seed(args.seed % (1 << 32))  # NumPy's, which orders mini-batches, takes no more
    reference = copy.deepcopy(module).requires_grad_(False).eval()
    value = value_model(module, args.trust_remote_code)
    for model in (module, reference, value):
        no_dropout(model)
    settings: Any = GenerationConfig
    module.generation_config = settings(pad_token_id=pad)  # and nothing that the model's own would add
    rewards = RewardModel(session, pad)
    trainer = trl_ppo.load()[1](
        args=config,
        processing_class=SimpleNamespace(pad_token_id=pad, eos_token_id=ends[0] if ends else -1),
        model=module,
        ref_model=reference,
        reward_model=rewards,
        value_model=value,
        train_dataset=range(len(session.train_prompts)),
        data_collator=rewards.collate,
        callbacks=[_Driver(session, config.vf_coef)],
    )
    module.generation_config.eos_token_id = ends or None  # all of them; after an end the sampler pads
    trainer.accelerator.print = lambda *_, **__: None
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    session.keep_method(record_of(args.method, "trl.experimental.ppo.PPOTrainer", config, own))
    return trainer


def value_model(module: Any, trust_remote_code: bool = False) -> Any:
    """Return the module's transformer, copied, under a linear head of one number, which is zero at first.

    Raises:
        UserError: transformers has no such model of this architecture.
    """
    config = copy.deepcopy(module.config)
    config.num_labels = 1
    try:
        auto: Any = AutoModelForSequenceClassification
        value = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        getattr(value, value.base_model_prefix).load_state_dict(module.base_model.state_dict())
        for parameter in value.score.parameters():
            nn.init.zeros_(parameter)
    except (AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"method ppo needs a value model, which transformers lacks for {config.model_type}: "
            f"{reason if len(reason) <= 200 else reason[:200] + '...'}"
        ) from error
    return value.to(module.device)


def pad_token(tokenizer: Any, module: Any, taken: Collection[int]) -> int:
    """Return a token that is neither in a prompt nor an end: the trainer takes every occurrence for padding.

    The tokenizer's own where it is free, else one that no text has: without a token, special, or the last.
    """
    size = module.get_input_embeddings().num_embeddings
    candidates = [
        tokenizer.pad_token_id,
        *range(len(tokenizer), size),
        *tokenizer.all_special_ids,
        *reversed(range(size)),
    ]
    for token in candidates:
        if token is not None and 0 <= token < size and token not in taken:
            return int(token)
    raise UserError("method ppo needs a token that is in no prompt, to pad with; this model has none")


def no_dropout(model: nn.Module) -> None:
    """Turn off what dropout is not a layer: the trainer turns off the layers, and samples in training mode."""
    for part in model.modules():
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
