"""From a configuration to the arguments of a baseline's trainer; the run's `method.json` stores the resolved arguments.

`method_kwargs` may hold any argument of TRL's configuration that no field of `ESConfig` decides, and:

    min_reward                    sft_rejection: least reward of a right sample, for data without an accuracy
    generation                    grpo, dr_grpo, rloo: `estune` (default, ES's engine) or `trl` (the trainer)
    max_samples                   sft_rejection: largest number of samples drawn, in rounds of one for each prompt
    per_device_train_batch_size   completions in one backward pass; default: all of a step; for a large model the
                                  largest divisor of a step's completions up to 16

For `ppo` it may hold the arguments in `PPO_FREE`. Arguments without effect are rejected, for example those of TRL's own
generation together with ``generation: estune``.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from estune.baselines import trl_ppo
from estune.config import ESConfig
from estune.errors import UserError, install_command, nearest
from estune.run.saved_config import Trainer

# Arguments of PPO that `method_kwargs` may hold.
PPO_FREE = frozenset(
    "num_ppo_epochs num_mini_batches kl_coef kl_estimator cliprange cliprange_value vf_coef gamma lam whiten_rewards "
    "missing_eos_penalty optim optim_args adam_beta1 adam_beta2 adam_epsilon lr_scheduler_kwargs".split()
)
# Arguments of PPO that `method.json` stores: also those that the run's configuration or estune decides.
PPO_READ = PPO_FREE | frozenset(
    "learning_rate lr_scheduler_type warmup_steps weight_decay seed use_cpu temperature response_length stop_token_id "
    "total_episodes num_total_batches batch_size mini_batch_size per_device_train_batch_size world_size "
    "gradient_accumulation_steps local_rollout_forward_batch_size num_sample_generations".split()
)
_ONE_PASS = "a mini-batch is one backward pass; a larger num_mini_batches makes it smaller"
_ENDS = "completions end as with every other method"
# Reasons why other arguments of PPO are rejected.
WHY_NOT = {
    "max_grad_norm": "it does not clip gradients",
    "gradient_checkpointing": "it does not support gradient checkpointing",
    "per_device_train_batch_size": _ONE_PASS,
    "gradient_accumulation_steps": _ONE_PASS,
    "stop_token": _ENDS,
    "stop_token_id": _ENDS,
    "response_length": "set max_completion_length",
    "total_episodes": "it is max_steps times batch_size",
    "batch_size": "set the run's batch_size",
    "local_rollout_forward_batch_size": "set prompts_per_batch",
}
_COUNTS = ("num_ppo_epochs", "num_mini_batches")
_NUMBERS = ("kl_coef", "cliprange", "cliprange_value", "vf_coef", "gamma", "lam", "missing_eos_penalty")


def refuse_unread_by_ppo(name: str) -> None:
    """Raise UserError for an argument that PPO's trainer accepts but does not use."""
    if name not in PPO_FREE:
        reason = WHY_NOT.get(name, "it does not read the argument")
        raise UserError(f"the trainer of method ppo does not use {name}: {reason}")


def check_ppo(arguments: Mapping[str, Any], batch: int | None = None) -> None:
    """Raise UserError for values on which PPO's trainer would fail or which it would ignore.

    ``batch`` is the number of rows of a step, or None if it is not known yet.
    """
    for name, value in arguments.items():
        if name in _COUNTS and (type(value) is not int or value < 1):
            raise UserError(f"{name} must be an integer of 1 or more, not {value!r}")
        if name in _NUMBERS and not (type(value) in (int, float) and math.isfinite(value) and value >= 0):
            raise UserError(f"{name} must be a number of 0 or more, not {value!r}")
        if name == "whiten_rewards" and not isinstance(value, bool):
            raise UserError(f"whiten_rewards must be true or false, not {value!r}")
        if name == "kl_estimator" and value not in ("k1", "k3"):
            raise UserError(f"kl_estimator can be k1 or k3, not {value!r}")
    parts = arguments.get("num_mini_batches", 1)
    if batch is not None and batch % parts:
        raise UserError(f"num_mini_batches {parts} does not divide the {batch} rows of a step")
    if batch is not None and arguments.get("whiten_rewards") and batch < 8 * parts:
        raise UserError("whiten_rewards needs mini-batches of 8 rows or more")


SMALL = 10_000_000  # parameters up to which one backward pass takes all completions of a step
MICRO_BATCH = 16  # completions in one backward pass of a larger model, at most
# The arguments that define a method; all others have the field's or TRL's default.
OF_METHOD: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
    "rloo": {},
    "ppo": {},
    "sft_rejection": {},
}
# estune's own arguments of a method, and their defaults.
OF_ESTUNE: dict[str, dict[str, Any]] = {
    **{method: {"generation": "estune"} for method in ("grpo", "dr_grpo", "rloo")},
    "ppo": {},
    "sft_rejection": {"min_reward": None, "max_samples": None},
}
# Arguments that the configuration or estune decides.
DECIDED = frozenset(
    "output_dir max_steps learning_rate lr_scheduler_type warmup_steps weight_decay seed data_seed num_generations "
    "max_completion_length temperature top_p top_k bf16 fp16 use_cpu report_to run_name reward_weights disable_tqdm "
    "chat_template_kwargs num_train_epochs generation_batch_size gradient_accumulation_steps auto_find_batch_size "
    "use_vllm remove_unused_columns resume_from_checkpoint do_train do_eval do_predict trust_remote_code project "
    "model_init_kwargs chat_template_path ignore_data_skip load_best_model_at_end metric_for_best_model "
    "greater_is_better per_device_eval_batch_size num_generations_eval num_completions_to_print full_determinism "
    "sync_ref_model ref_model_sync_steps ref_model_mixup_alpha label_smoothing_factor "
    "max_length dataset_kwargs dataset_text_field dataset_num_proc packing packing_strategy padding_free eos_token "
    "pad_token assistant_only_loss completion_only_loss truncation_mode max_tool_calling_iterations "
    "multi_objective_aggregation".split()
)
DECIDED_PREFIXES = ("eval_", "hub_", "log_", "logging_", "push_", "save_", "trackio_", "vllm_", "bf16_", "fp16_")
# Valid values of GRPO's arguments, which TRL checks only during training.
CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
}
# Arguments that have an effect only if another argument differs from its idle values: name, TRL's default, idle values.
# With one pass over each batch of samples, the clipped ratio is exactly 1.
AGAIN = (("num_iterations", 1, (1,)), ("steps_per_generation", None, (None, 1)))
NEEDS: dict[str, tuple[tuple[str, Any, tuple[Any, ...]], ...]] = {
    **dict.fromkeys(("epsilon", "epsilon_high", "delta"), AGAIN),
    "use_bias_correction_kl": (("beta", 0.0, (0.0, 0, None)),),
    **dict.fromkeys(
        ("entropy_target", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
        (("use_adaptive_entropy", False, (False, None)),),
    ),
}
# Arguments of TRL's own generation.
OF_GENERATION = frozenset(
    "generation_kwargs min_p repetition_penalty cache_implementation use_transformers_continuous_batching "
    "use_transformers_paged transformers_continuous_batching_config ds3_gather_for_generation".split()
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
        raise UserError(f"method {method} needs the package trl: {install_command(extra='baselines')}") from None
    return {"rloo": trl.RLOOConfig, "sft_rejection": trl.SFTConfig}.get(method, trl.GRPOConfig)


def method_arguments(args: ESConfig) -> dict[str, Any]:
    """Return `method_kwargs`, completed with the defaults of estune's own arguments (`OF_ESTUNE`).

    Raises:
        UserError: a name is unknown, a field of the configuration decides it, or it has no effect.
    """
    known = OF_ESTUNE[args.method]
    if args.method == "dr_grpo" and (fixed := sorted(OF_METHOD["dr_grpo"].keys() & args.method_kwargs.keys())):
        raise UserError(f"{fixed[0]} defines dr_grpo: use method grpo to change it")
    types = {spec.name: spec.type for spec in dataclasses.fields(config_class(args.method))}
    fields = types.keys() | known.keys()
    free = PPO_FREE if args.method == "ppo" else {name for name in fields if not is_decided(name)}
    ppo = args.method == "ppo"
    for name, value in args.method_kwargs.items():
        if name in DECIDED or (is_decided(name) and name in fields and not ppo):
            raise UserError(f"method_kwargs cannot hold {name}: the configuration or estune decides it")
        if name not in fields:
            raise UserError(f"method {args.method} has no argument {name!r}{nearest(name, free)}")
        if ppo:
            refuse_unread_by_ppo(name)
        elif not _fits(value, types.get(name)):
            wanted = getattr(types[name], "__name__", types[name])
            raise UserError(f"{name} of method {args.method} cannot be {value!r}: TRL expects {wanted}")
    if ppo:
        check_ppo(args.method_kwargs)
    arguments = {**known, **args.method_kwargs}
    generation = arguments.get("generation")
    if generation not in (None, "estune", "trl"):
        raise UserError(f"generation is estune or trl, not {generation!r}")
    if generation == "estune":
        for name in sorted(OF_GENERATION & arguments.keys()):
            raise UserError(f"method_kwargs holds {name}, which has no effect without generation trl")
    elif generation == "trl" and args.stop_strings:
        raise UserError("stop_strings have no effect with generation trl: leave generation at estune")
    for name, needed in NEEDS.items() if args.method in ("grpo", "dr_grpo", "rloo") else ():
        if name in args.method_kwargs and not any(
            arguments.get(other, default) not in idle for other, default, idle in needed
        ):
            raise UserError(f"{name} has no effect without {' or '.join(other for other, _, _ in needed)}")
    if args.stop_strings and arguments.get("mask_truncated_completions"):
        raise UserError(
            "mask_truncated_completions would also mask completions that end with a stop string: use only one of them"
        )
    least = arguments.get("min_reward")
    if least is not None and (isinstance(least, bool) or not isinstance(least, (int, float))):
        raise UserError(f"min_reward must be a number, not {least!r}")
    most = arguments.get("max_samples")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise UserError(f"max_samples must be an integer of 1 or more, or null for no limit, not {most!r}")
    return arguments


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value has the type ``kind``; True if ``kind`` is not a plain type or a union of plain types."""
    kinds = set(typing.get_args(kind) or (kind,))
    if not kinds <= {bool, int, float, str, type(None)}:
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


def is_decided(name: str) -> bool:
    """Return whether the configuration or estune decides an argument of TRL."""
    return name in DECIDED or name.startswith(DECIDED_PREFIXES)


def trl_config(
    args: ESConfig, directory: str, batch: int, num_parameters: int, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """Return TRL's configuration and the values of estune's own arguments of the method.

    Args:
        args: the configuration, with a resolved batch size.
        directory: for the trainer's checkpoints.
        batch: rows of a step: completions, or samples in `sft_rejection`.
        num_parameters: of the model.
        more: arguments that only some methods have.

    Raises:
        UserError: estune or TRL rejects an argument.
    """
    arguments = method_arguments(args)
    of_estune = {name: arguments.pop(name) for name in OF_ESTUNE[args.method]}
    whole = num_parameters <= SMALL or args.method == "ppo"
    micro = arguments.pop("per_device_train_batch_size", batch if whole else micro_batch(batch))
    if not isinstance(micro, int) or micro < 1 or batch % micro:
        raise UserError(f"per_device_train_batch_size {micro} does not divide the {batch} rows of a step")
    if args.method == "ppo":
        check_ppo(arguments, batch)
    # estune's `constant` schedule has a warm-up, that of transformers does not
    warm = args.lr_scheduler_type == "constant" and args.warmup_steps
    schedule = "constant_with_warmup" if warm else args.lr_scheduler_type
    values = {
        "output_dir": directory,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "bf16": False,  # TRL's default is True, also on a CPU
        "gradient_checkpointing": False,
        "use_cpu": args.device == "cpu",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # so that `step_done` sees a NaN loss
        "save_strategy": "no",  # estune decides when to save
        "report_to": [],
        "disable_tqdm": True,
        **more,
        **OF_METHOD[args.method],
        **arguments,
    }
    try:
        config = config_class(args.method)(**values)
    except (TypeError, ValueError) as error:
        raise refused(args.method, error) from error
    for name, choices in CHOICES.items() if args.method in ("grpo", "dr_grpo") else ():
        value = getattr(config, name)
        if value not in choices:
            raise UserError(f"{name} is {value!r}; it can be {', '.join(choices)}{nearest(str(value), choices)}")
    return config, of_estune


def micro_batch(batch: int) -> int:
    """Return the rows in one backward pass of a large model: the largest divisor of ``batch`` up to `MICRO_BATCH`."""
    return max(size for size in range(1, MICRO_BATCH + 1) if batch % size == 0)


def sampling_arguments(args: ESConfig) -> dict[str, Any]:
    """Return the arguments of the methods that sample in every step."""
    names = ("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "trust_remote_code")
    return {name: getattr(args, name) for name in names}


def refused(method: str, error: Exception) -> UserError:
    """Return the error for arguments that TRL rejects."""
    return UserError(f"TRL rejects the arguments of method {method}: {' '.join(str(error).split())}")


def method_record(method: str, trainer: str, config: Any, of_estune: dict[str, Any]) -> Trainer:
    """Return the content of `method.json`: the trainer, its version, and every resolved argument.

    For PPO only the arguments in `PPO_READ` are included, because the trainer ignores others such as `max_grad_norm`.
    """
    arguments = {
        name: value
        for name, value in sorted(config.to_dict().items())
        if name not in PATHS and (method != "ppo" or name in PPO_READ)
    }
    return {"method": method, "trainer": trainer, "trl": version("trl"), "estune": of_estune, "arguments": arguments}
