"""Check that theta's logits are finite, before a run writes anything and before it writes its model.

A weight that fits float32 may overflow in the compute dtype. The logits are then NaN or infinite and the completions
are meaningless, but no reward function reports it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from estune.config import ESConfig, SizedConfig
from estune.console import note, warn
from estune.engines import ENGINES
from estune.engines.base import Engine
from estune.errors import UserError
from estune.es.types import Completion, Prompt
from estune.train import setup
from estune.train.rollouts import answers_of_theta
from estune.train.step import sampling_of

FEW_TOKENS = 4  # tokens of a completion that tests whether the logits are finite
WIDER = {"float16": "--dtype bfloat16 or float32", "bfloat16": "--dtype float32"}


def are_finite(answers: Sequence[Sequence[Completion]]) -> bool:
    """Return whether the logits of all completions (B, G) were finite."""
    return all(completion.finite for row in answers for completion in row)


def theta_is_finite(args: SizedConfig, engine: Engine, prompts: Sequence[Prompt]) -> bool:
    """Return whether theta's logits are finite on the first step's prompts.

    Args:
        args: the run's resolved configuration.
        engine: holds theta.
        prompts: all training prompts.
    """
    rows = setup.batches_of(args, len(prompts)).rows_for_step(0)
    greedy = dataclasses.replace(
        sampling_of(args, 0),
        temperature=0.0,
        num_generations=1,
        max_completion_length=min(FEW_TOKENS, args.max_completion_length),
    )
    return are_finite(answers_of_theta(engine, [prompts[row] for row in rows], greedy))


def refuse_broken_theta(args: SizedConfig, engine: Engine, prompts: Sequence[Prompt], steps_done: int) -> None:
    """Raise UserError if theta's logits are not finite on the first step's prompts.

    Args:
        args: the run's resolved configuration.
        engine: holds theta after ``steps_done`` steps.
        prompts: all training prompts.
        steps_done: 0 for the base model.

    Raises:
        UserError: a logit is not finite; the message names the dtype and a remedy.
    """
    if theta_is_finite(args, engine, prompts):
        return
    if steps_done:
        dtype = engine.facts.dtype
        raise UserError(
            f"theta diverged in step {steps_done}: its logits are not finite in {dtype}; lower "
            f"learning_rate{_or_wider(dtype)}; earlier checkpoints are intact"
        )
    raise UserError(broken_model(args.model, engine.facts.dtype))


def refuse_moved_theta(args: ESConfig, engine: Engine, checksum: str) -> None:
    """Raise UserError if an engine outside estune has changed theta by itself; engines of estune are not checked.

    Args:
        args: the run's configuration.
        engine: holds theta.
        checksum: theta's checksum after its last update, or when it was loaded.

    Raises:
        UserError: theta has another checksum; the journal could not rebuild it.
    """
    if args.engine in ENGINES or (found := engine.checksum()) == checksum:
        return
    raise UserError(
        f"engine {engine.facts.name} changed theta outside apply: its checksum was {checksum}, now it is {found}; a "
        "journal cannot rebuild such a theta (see Replica in estune.es.replica)"
    )


def refuse_fixed_theta(args: ESConfig, engine: Engine) -> None:
    """Raise UserError if the best step is to be saved and the engine cannot return to an earlier theta."""
    kind = getattr(engine, "engine_class", type(engine))  # of an engine in workers
    if args.load_best_model_at_end and not hasattr(kind, "load_anchor"):
        raise UserError(
            f"engine {engine.facts.name} has no method load_anchor, so it cannot return to the best step: leave "
            "load_best_model_at_end out (see Replica in estune.es.replica)"
        )


def broken_model(model: str, dtype: str) -> str:
    """Return the error message for a model whose logits are not finite in its compute dtype."""
    advice = f"try {WIDER[dtype]}" if dtype in WIDER else "a weight is too large or the files are damaged"
    return f"model {model} gives logits that are not finite in {dtype}: {advice}"


def broken_population(engine: Engine, step: int, sigma: float, theta_is_broken: bool) -> str:
    """Return the error message for a step (1-based) in which no member had finite logits."""
    dtype = engine.facts.dtype
    cause = "theta itself is broken, lower learning_rate" if theta_is_broken else f"lower sigma ({sigma:g})"
    return (
        f"step {step}: the logits of all members are not finite in {dtype}: "
        f"{cause}{_or_wider(dtype)}; the journal holds the {step - 1} earlier steps"
    )


def _or_wider(dtype: str) -> str:
    return f" or try {WIDER[dtype]}" if dtype in WIDER else ""


def warn_of_inputs(args: ESConfig, engine: Engine, prompts: Sequence[Prompt]) -> None:
    """Warn if nothing can end a completion, or if all prompts are equal; say if a chat model gets plain text.

    Args:
        args: the decoding options.
        engine: its end tokens are checked; the toy engine needs none.
        prompts: all prompts that will be used.
    """
    if engine.assets.tokenizer is not None and not engine.assets.end_tokens and not args.stop_strings:
        warn(
            "no token ends a completion (neither the model's generation_config nor its tokenizer names one): every "
            "completion will have max_completion_length tokens; set --stop_strings"
        )
    if len(prompts) > 1 and len({prompt.token_ids for prompt in prompts}) == 1:
        warn(
            f"all {len(prompts)} prompts have the same tokens: check that the column `prompt` and the chat template "
            "include each row's question"
        )
    if prompts and has_plain_questions(args, engine, prompts[0]):
        note(
            "the model has a chat template, and the prompts are plain text, as with TRL: --apply_chat_template true "
            "makes each a user message"
        )


def has_plain_questions(args: ESConfig, engine: Engine, prompt: Prompt) -> bool:
    """Return whether a model with a chat template gets the user's rows as plain text because no option says otherwise.

    Args:
        args: the run's configuration.
        engine: its tokenizer may have a chat template.
        prompt: one of the prompts.
    """
    if args.task is not None or args.apply_chat_template != "auto":
        return False
    before = f"{args.system_prompt}\n\n" if args.system_prompt else ""
    is_plain = prompt.text == f"{before}{prompt.question}{args.response_prefix}"
    return is_plain and bool(getattr(engine.assets.tokenizer, "chat_template", None))
