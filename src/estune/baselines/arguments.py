"""From a configuration to the arguments of a rival's trainer; what was resolved is kept in the run's `method.json`.

`method_kwargs` may hold any argument that TRL's configuration of the trainer has, apart from those that a field of
`ESConfig` already decides, and:

    min_reward                    sft_rejection: reward from which a sample is right, for data without an accuracy
    generation                    grpo, dr_grpo, rloo: `estune` (default), by ES's engine, or `trl`, by the trainer
    max_samples                   sft_rejection: samples that are drawn at most, in rounds of one for each prompt
    per_device_train_batch_size   completions in one backward pass; default: all of a step, of a large model the most
                                  up to 16 that a step has whole batches of

Of `ppo` it may hold what its trainer reads (`PPO_READ`). An argument that would have no effect is refused: those
of TRL's own generation under ``generation: estune``, for one.
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
from estune.errors import UserError, nearest

# What `method_kwargs` may hold.
PPO_FREE = frozenset(
    "num_ppo_epochs num_mini_batches kl_coef kl_estimator cliprange cliprange_value vf_coef gamma lam whiten_rewards "
    "missing_eos_penalty optim optim_args adam_beta1 adam_beta2 adam_epsilon lr_scheduler_kwargs".split()
)
# What `method.json` keeps: also those that the run's configuration, or estune, decides.
PPO_READ = PPO_FREE | frozenset(
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


def refuse_unread_by_ppo(name: str) -> None:
    """Raise UserError for an argument that the trainer has and does not read."""
    if name not in PPO_FREE:
        raise UserError(f"the trainer of method ppo has no use for {name}: {WHY_NOT.get(name, 'it never reads it')}")


def check_ppo(given: Mapping[str, Any], batch: int | None = None) -> None:
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
    "sft_rejection": {"min_reward": None, "max_samples": None},
}
# Decided by the configuration, or by how estune drives a trainer.
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
# What GRPO's arguments can be; TRL says it in mid-run.
CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
}
# Arguments without effect unless one of some others has another value than these: name, TRL's default, idle values.
# With one pass over each batch of samples the ratio that is clipped is exactly 1.
AGAIN = (("num_iterations", 1, (1,)), ("steps_per_generation", None, (None, 1)))
NEEDS: dict[str, tuple[tuple[str, Any, tuple[Any, ...]], ...]] = {
    **dict.fromkeys(("epsilon", "epsilon_high", "delta"), AGAIN),
    "use_bias_correction_kl": (("beta", 0.0, (0.0, 0, None)),),
    **dict.fromkeys(
        ("entropy_target", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
        (("use_adaptive_entropy", False, (False, None)),),
    ),
}
# Of TRL's own generation.
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
        raise UserError(f"method {method} needs the package trl: python -m pip install 'estune[baselines]'") from None
    return {"rloo": trl.RLOOConfig, "sft_rejection": trl.SFTConfig}.get(method, trl.GRPOConfig)


def own_arguments(args: ESConfig) -> dict[str, Any]:
    """Return `method_kwargs`, with estune's own arguments of a method (`OWN`) filled in.

    Raises:
        UserError: an unknown name, one that a field decides, or one without effect.
    """
    known = OWN[args.method]
    if args.method == "dr_grpo" and (fixed := sorted(OF_METHOD["dr_grpo"].keys() & args.method_kwargs.keys())):
        raise UserError(f"{fixed[0]} is what makes dr_grpo: with another one it is method grpo")
    types = {spec.name: spec.type for spec in dataclasses.fields(config_class(args.method))}
    fields = types.keys() | known.keys()
    free = PPO_FREE if args.method == "ppo" else {name for name in fields if not is_decided(name)}
    ppo = args.method == "ppo"  # whose trainer says of itself what it reads
    for name, value in args.method_kwargs.items():
        if name in DECIDED or (is_decided(name) and name in fields and not ppo):
            raise UserError(f"method_kwargs cannot hold {name}: the configuration, or estune itself, decides it")
        if name not in fields:
            raise UserError(f"method {args.method} has no argument {name!r}{nearest(name, free)}")
        if ppo:
            refuse_unread_by_ppo(name)
        elif not _fits(value, types.get(name)):
            wanted = getattr(types[name], "__name__", types[name])
            raise UserError(f"{name} of method {args.method} cannot be {value!r}: TRL wants {wanted}")
    if ppo:
        check_ppo(args.method_kwargs)
    given = {**known, **args.method_kwargs}
    generation = given.get("generation")
    if generation not in (None, "estune", "trl"):
        raise UserError(f"generation is estune or trl, not {generation!r}")
    if generation == "estune":
        for name in sorted(OF_GENERATION & given.keys()):
            raise UserError(f"method_kwargs holds {name}, which has no effect without generation trl")
    elif generation == "trl" and args.stop_strings:
        raise UserError("stop_strings have no effect with generation trl: leave generation at estune")
    for name, needed in NEEDS.items() if args.method in ("grpo", "dr_grpo", "rloo") else ():
        if name in args.method_kwargs and not any(
            given.get(other, default) not in idle for other, default, idle in needed
        ):
            raise UserError(f"{name} has no effect without {' or '.join(other for other, _, _ in needed)}")
    if args.stop_strings and given.get("mask_truncated_completions"):
        raise UserError("mask_truncated_completions would mask what ends with a stop string, too: give one of the two")
    least = given.get("min_reward")
    if least is not None and (isinstance(least, bool) or not isinstance(least, (int, float))):
        raise UserError(f"min_reward must be a number, not {least!r}")
    most = given.get("max_samples")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise UserError(f"max_samples must be a whole number from 1, or null for no limit, not {most!r}")
    return given


def _fits(value: Any, kind: Any) -> bool:
    """Say whether a value is of a plain type, or of one of several; of others TRL knows more."""
    kinds = set(typing.get_args(kind) or (kind,))
    if not kinds <= {bool, int, float, str, type(None)}:
        return True
    return type(value) in kinds or (type(value) is int and float in kinds)


def is_decided(name: str) -> bool:
    """Say whether an argument of TRL's is not for `method_kwargs`."""
    return name in DECIDED or name.startswith(DECIDED_PREFIXES)


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
    micro = given.pop("per_device_train_batch_size", batch if whole else micro_batch(batch))
    if not isinstance(micro, int) or micro < 1 or batch % micro:
        raise UserError(f"per_device_train_batch_size {micro} does not divide the {batch} rows of a step")
    if args.method == "ppo":
        check_ppo(given, batch)
    # transformers' `constant` knows no warmup, estune's does
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
        "logging_nan_inf_filter": False,  # a loss that is no number is to be seen
        "save_strategy": "no",  # estune says when
        "report_to": [],
        "disable_tqdm": True,
        **more,
        **OF_METHOD[args.method],
        **given,
    }
    try:
        config = config_class(args.method)(**values)
    except (TypeError, ValueError) as error:
        raise refused(args.method, error) from error
    for name, choices in CHOICES.items() if args.method in ("grpo", "dr_grpo") else ():
        value = getattr(config, name)
        if value not in choices:
            raise UserError(f"{name} is {value!r}; it can be {', '.join(choices)}{nearest(str(value), choices)}")
    return config, own


def micro_batch(batch: int) -> int:
    """Return the rows of a step that a large model takes in one backward pass: the largest divisor up to 16."""
    return max(size for size in range(1, MICRO_BATCH + 1) if batch % size == 0)


def sampling_arguments(args: ESConfig) -> dict[str, Any]:
    """Return what only the methods have that sample in every step."""
    names = ("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "trust_remote_code")
    return {name: getattr(args, name) for name in names}


def refused(method: str, error: Exception) -> UserError:
    """Return the error for arguments that TRL does not take."""
    return UserError(f"TRL refuses the arguments of method {method}: {' '.join(str(error).split())}")


def record_of(method: str, trainer: str, config: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Return what `method.json` keeps: the trainer, its version, and every argument as it was resolved.

    Of PPO's trainer every one that it reads: a `max_grad_norm` that is not applied would be a false record.
    """
    arguments = {
        name: value
        for name, value in sorted(config.to_dict().items())
        if name not in PATHS and (method != "ppo" or name in PPO_READ)
    }
    return {"method": method, "trainer": trainer, "trl": version("trl"), "estune": own, "arguments": arguments}
