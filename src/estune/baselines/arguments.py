"""From a configuration to the arguments of a rival's trainer; what was resolved is kept in the run's `method.json`.

`method_kwargs` may hold any argument that TRL's configuration of the trainer has, apart from those that a field of
`ESConfig` already decides, and:

    min_reward                    sft_rejection: reward from which a sample is right, for data without an accuracy
    generation                    grpo, dr_grpo, rloo: `estune` (default), by ES's engine, or `trl`, by the trainer
    per_device_train_batch_size   completions in one backward pass; default: all of a step, 16 for a large model

Of `ppo` it may hold what its trainer reads (`ppo_arguments`).
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

from estune.baselines import ppo_arguments, trl_ppo
from estune.config import ESConfig
from estune.errors import UserError
from estune.words import nearest

SMALL = 10_000_000  # parameters; up to here a whole step's completions go through one backward pass
MICRO_BATCH = 16
# What makes a method; everything else is the field's or TRL's default.
OF_METHOD: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
    "rloo": {},
    "ppo": {},
    "sft_rejection": {},
}
# estune's own arguments of a method, and their defaults.
OWN: dict[str, dict[str, Any]] = {
    **{method: {"generation": "estune"} for method in ("grpo", "dr_grpo", "rloo")},
    "ppo": {},
    "sft_rejection": {"min_reward": None},
}
# Decided by the configuration, or by how estune drives a trainer.
DECIDED = frozenset(
    "output_dir max_steps learning_rate lr_scheduler_type warmup_steps warmup_ratio weight_decay seed data_seed "
    "num_generations max_completion_length temperature top_p top_k bf16 fp16 use_cpu report_to logging_steps "
    "logging_strategy save_strategy save_steps save_total_limit eval_strategy eval_steps disable_tqdm push_to_hub "
    "hub_model_id run_name reward_weights chat_template_kwargs log_completions num_train_epochs generation_batch_size "
    "use_vllm remove_unused_columns resume_from_checkpoint overwrite_output_dir do_train do_eval do_predict".split()
)
PATHS = ("output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token", "hub_model_id", "local_rank")


def config_class(method: str) -> Any:
    """Return TRL's configuration class of a method.

    Raises:
        UserError: TRL is not installed.
    """
    if method == "ppo":
        return trl_ppo.load()[0]
    try:
        import trl
    except ImportError:
        raise UserError(f"method {method} needs the package trl: python -m pip install 'estune[baselines]'") from None
    return {"rloo": trl.RLOOConfig, "sft_rejection": trl.SFTConfig}.get(method, trl.GRPOConfig)


def own_arguments(args: ESConfig) -> dict[str, Any]:
    """Return `method_kwargs`, with estune's own arguments of a method (`OWN`) filled in.

    Raises:
        UserError: an unknown name, one that a field decides, or one without effect.
    """
    known = OWN[args.method]
    fields = {spec.name for spec in dataclasses.fields(config_class(args.method))} | set(known)
    free = ppo_arguments.FREE if args.method == "ppo" else fields - DECIDED
    for name in args.method_kwargs:
        if name in DECIDED:
            raise UserError(f"method_kwargs cannot hold {name}: the configuration, or estune itself, decides it")
        if name not in fields:
            raise UserError(f"method {args.method} has no argument {name!r}{nearest(name, free)}")
        if args.method == "ppo":
            ppo_arguments.refuse_unread(name)
    if args.method == "ppo":
        ppo_arguments.check(args.method_kwargs)
    given = {**known, **args.method_kwargs}
    if given.get("generation", "trl") not in ("estune", "trl"):
        raise UserError(f"generation is estune or trl, not {given['generation']!r}")
    return given


def trl_config(
    args: ESConfig, directory: str, batch: int, num_parameters: int, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """Return TRL's configuration and estune's own arguments of the method.

    Args:
        args: resolved.
        directory: for the trainer's own checkpoints.
        batch: rows of a step: completions, or texts in `sft_rejection`.
        num_parameters: of the model.
        more: arguments that only some methods have.

    Raises:
        UserError: TRL refuses them.
    """
    given = own_arguments(args)
    own = {name: given.pop(name) for name in OWN[args.method]}
    whole = num_parameters <= SMALL or args.method == "ppo"
    micro = given.pop("per_device_train_batch_size", batch if whole else min(batch, MICRO_BATCH))
    if not isinstance(micro, int) or micro < 1 or batch % micro:
        raise UserError(f"per_device_train_batch_size {micro} does not divide the {batch} rows of a step")
    if args.method == "ppo":
        ppo_arguments.check(given, batch)
    warms_up = args.warmup_steps and args.lr_scheduler_type == "constant"  # transformers' `constant` would not
    values = {
        "output_dir": directory,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if warms_up else args.lr_scheduler_type,
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "bf16": False,  # TRL's default is True, also on a CPU
        "gradient_checkpointing": False,
        "use_cpu": args.device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",  # estune says when
        "save_total_limit": 1,
        "report_to": [],
        "disable_tqdm": True,
        **more,
        **OF_METHOD[args.method],
        **given,
    }
    try:
        return config_class(args.method)(**values), own
    except (TypeError, ValueError) as error:
        raise UserError(f"TRL refuses the arguments of method {args.method}: {' '.join(str(error).split())}") from error


def record_of(method: str, trainer: str, config: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Return what `method.json` keeps: the trainer, its version, and every argument as it was resolved.

    Of PPO's trainer every one that it reads: a `max_grad_norm` that is not applied would be a false record.
    """
    arguments = {
        name: value
        for name, value in sorted(config.to_dict().items())
        if name not in PATHS and (method != "ppo" or name in ppo_arguments.READ)
    }
    return {"method": method, "trainer": trainer, "trl": version("trl"), "estune": own, "arguments": arguments}
