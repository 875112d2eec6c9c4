"""Which arguments the trainer of PPO reads: of the many that its configuration has, most do nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from estune.errors import UserError

# What `method_kwargs` may hold.
FREE = frozenset(
    "num_ppo_epochs num_mini_batches kl_coef kl_estimator cliprange cliprange_value vf_coef gamma lam whiten_rewards "
    "missing_eos_penalty optim optim_args adam_beta1 adam_beta2 adam_epsilon lr_scheduler_kwargs".split()
)
# What `method.json` keeps: also those that the run's configuration, or estune, decides.
READ = FREE | frozenset(
    "learning_rate lr_scheduler_type warmup_steps weight_decay seed use_cpu temperature response_length stop_token_id "
    "total_episodes num_total_batches batch_size mini_batch_size per_device_train_batch_size world_size "
    "gradient_accumulation_steps local_rollout_forward_batch_size num_sample_generations".split()
)
_ONE_PASS = "a mini-batch is one backward pass; more num_mini_batches make it smaller"
_ENDS = "a completion ends where it does with every method"
# Why others have no effect, or no place in `method_kwargs`.
WHY_NOT = {
    "max_grad_norm": "it never clips gradients",
    "gradient_checkpointing": "it never turns that on",
    "per_device_train_batch_size": _ONE_PASS,
    "gradient_accumulation_steps": _ONE_PASS,
    "stop_token": _ENDS,
    "stop_token_id": _ENDS,
    "response_length": "that is max_completion_length",
    "total_episodes": "that is max_steps times batch_size",
    "batch_size": "that is the run's own batch_size",
    "local_rollout_forward_batch_size": "that is prompts_per_batch",
}
_COUNTS = ("num_ppo_epochs", "num_mini_batches")
_NUMBERS = ("kl_coef", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam", "missing_eos_penalty")


def refuse_unread(name: str) -> None:
    """Raise UserError for an argument that the trainer has and does not read."""
    if name not in FREE:
        raise UserError(f"the trainer of method ppo has no use for {name}: {WHY_NOT.get(name, 'it never reads it')}")


def check(given: Mapping[str, Any], batch: int | None = None) -> None:
    """Raise UserError for values that the trainer would stumble over, or quietly do nothing with.

    ``batch`` is the number of rows of a step, where it is known.
    """
    for name, value in given.items():
        if name in _COUNTS and (type(value) is not int or value < 1):
            raise UserError(f"{name} must be an integer of 1 or more, not {value!r}")
        if name in _NUMBERS and not (type(value) in (int, float) and math.isfinite(value) and value >= 0):
            raise UserError(f"{name} must be a number of 0 or more, not {value!r}")
        if name == "whiten_rewards" and not isinstance(value, bool):
            raise UserError(f"whiten_rewards must be true or false, not {value!r}")
        if name == "kl_estimator" and value not in ("k1", "k3"):
            raise UserError(f"kl_estimator can be k1 or k3, not {value!r}")
    parts = given.get("num_mini_batches", 1)
    if batch is not None and batch % parts:
        raise UserError(f"num_mini_batches {parts} does not divide the {batch} rows of a step")
    if batch is not None and given.get("whiten_rewards") and batch < 8 * parts:
        raise UserError("whiten_rewards needs mini-batches of 8 rows or more")
