"""PPO with a trained value model: the trainer of TRL 1.12 with ES's prompts and rewards.

Policy, frozen reference and value model start from the same base; the value model's head starts at zero. One step is
one update: it samples one completion for each of `batch_size` prompts and then takes `num_ppo_epochs` times
`num_mini_batches` steps of the optimizer. The trainer samples with its own `generate`, without top-p or top-k. The
trainer stores no state, so a resume starts again from step 0.
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
from estune.baselines.arguments import method_record, trl_config
from estune.baselines.session import BaselineSession
from estune.engines.hf.loading import quiet
from estune.errors import UserError
from estune.es.types import Completion, Interrupted

PAD = -1  # token id of padding in the argument of `score`


class RewardModel(nn.Module):
    """A reward model for TRL that returns the rewards of `BaselineSession.score`."""

    base_model_prefix = "backbone"

    def __init__(self, session: BaselineSession, pad: int) -> None:
        super().__init__()
        self.session, self.pad = session, pad
        self.backbone = _Tokens()
        self.unscored: deque[tuple[int, int]] = deque()  # (row, tokens of its padded prompt) of prompts not scored yet
        self.lowest = 0.0  # lowest reward of the run so far, at most 0

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the prompts of rows, padded on the left: (B, T)."""
        prompts = [self.session.train_prompts[row].token_ids for row in rows]
        width = max(len(prompt) for prompt in prompts)
        self.unscored.extend((row, width) for row in rows)
        return {"input_ids": torch.tensor([[self.pad] * (width - len(prompt)) + [*prompt] for prompt in prompts])}

    def score(self, tokens: Tensor) -> Tensor:
        """Return the rewards (B, T, 1) of prompts with completions (B, T); all tokens of a completion have its reward.

        A completion without a reward (None or failed) gets the lowest reward of the run so far, at most 0.
        """
        rows, answers, ends = [], [], self.session.engine.assets.end_tokens
        for sequence in tokens.tolist():
            row, width = self.unscored.popleft()
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
        scores = torch.tensor(rewards, dtype=torch.float32, device=tokens.device)  # (B,)
        return scores[:, None, None].expand(-1, tokens.shape[1], 1)


class _Tokens(nn.Module):
    """The backbone of `RewardModel`: its hidden states are the token ids, so that `score` receives the tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=(torch.where(attention_mask.bool(), input_ids, PAD),))


class _Ended(Exception):
    """Raised by a callback to end TRL's trainer, which has no other way to stop."""


class _Driver(TrainerCallback):
    """Reports every step to the session, and ends the training."""

    def __init__(self, session: BaselineSession, vf_coef: float) -> None:
        self.session, self.vf_coef = session, vf_coef

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Report a step's metrics to the session; the trainer logs once an update."""
        record = {name: value for name, value in (logs or {}).items() if "/" in name}
        record["loss"] = record["loss/policy_avg"] + self.vf_coef * record["loss/value_avg"]
        record["learning_rate"] = (logs or {})["lr"]
        self.session.step_done(state.global_step, record)
        if self.session.ended or self.session.should_stop():
            raise _Ended


def ppo(session: BaselineSession) -> None:
    """Train by PPO until the run has ended.

    Raises:
        UserError: transformers has no value model for this architecture, or an argument is invalid.
        Interrupted: the run was asked to stop.
    """
    with trl_ppo.in_place(), quiet(), _cheap_collections(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"var\(\)")  # TRL takes the variance of one number per update
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
    """Exclude all existing objects from garbage collection, because the trainer collects twice in every update.

    Nothing happens if the program has frozen objects itself, because `gc.unfreeze` would also release these.
    """
    is_ours = not gc.get_freeze_count()
    if is_ours:
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()


def make_trainer(session: BaselineSession) -> Any:
    """Return TRL's trainer, ready to train, and write `method.json`.

    Raises:
        UserError: an argument is invalid, or the model lacks a value model or a free token for padding.
    """
    args, module, batch = session.args, session.module, session.args.batch_size
    if batch < 2:
        raise UserError("method ppo normalizes advantages over a step: it needs a batch_size of 2 or more")
    ends = sorted(session.engine.assets.end_tokens)
    used = {*ends, *(token for prompt in session.train_prompts for token in prompt.token_ids)}
    pad = pad_token(session.engine.assets.tokenizer, module, used)
    config, of_estune = trl_config(
        args,
        str(session.trainer_directory),
        batch,
        module.num_parameters(),
        total_episodes=args.max_steps * batch,
        local_rollout_forward_batch_size=min(batch, args.prompts_per_batch),
        response_length=args.max_completion_length,
        temperature=args.temperature,
        stop_token_id=ends[0] if ends else None,
        num_sample_generations=0,  # such samples would be scored but not trained on
    )
    if config.missing_eos_penalty is not None and len(ends) != 1:
        raise UserError(
            f"missing_eos_penalty needs a model with exactly one end token, but {args.model} has {len(ends)}"
        )
    set_seed(args.seed % (1 << 32))  # NumPy's generator, which orders mini-batches, accepts 32 bits
    reference = copy.deepcopy(module).requires_grad_(False).eval()
    value = value_model(module, args.trust_remote_code)
    for model in (module, reference, value):
        no_dropout(model)
    settings: Any = GenerationConfig
    module.generation_config = settings(pad_token_id=pad)  # drops the settings of the model's own configuration
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
    module.generation_config.eos_token_id = ends or None  # all end tokens; the sampler pads after any of them
    trainer.accelerator.print = lambda *_, **__: None
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    session.write_method(method_record(args.method, "trl.experimental.ppo.PPOTrainer", config, of_estune))
    return trainer


def value_model(module: Any, trust_remote_code: bool = False) -> Any:
    """Return a copy of the module's transformer with a linear head of one output, initialised to zero.

    Raises:
        UserError: transformers has no sequence classifier of this architecture.
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
            f"method ppo needs a value model, but transformers has none for {config.model_type}: "
            f"{reason if len(reason) <= 200 else reason[:200] + '...'}"
        ) from error
    return value.to(module.device)


def pad_token(tokenizer: Any, module: Any, taken: Collection[int]) -> int:
    """Return a padding token that is not in ``taken``, because the trainer treats every occurrence as padding.

    The candidates are the tokenizer's padding token, ids without a token, special tokens, and then all others.

    Raises:
        UserError: all tokens are in ``taken``.
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
    raise UserError("method ppo needs a padding token that occurs in no prompt, and this model has none")


def no_dropout(model: nn.Module) -> None:
    """Zero every dropout probability stored as a float attribute; TRL disables `nn.Dropout` modules only."""
    for part in model.modules():
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
