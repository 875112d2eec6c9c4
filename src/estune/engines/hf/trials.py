"""Trials: a few tokens show what a model's signature does not tell, and whether its answers repeat under load."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from transformers import GenerationMixin

from estune.engines.hf import attention
from estune.engines.hf.callers import LEAST_SHARED, AttentionCaller, Caller, Model, left_pad
from estune.es.types import Completion, Perturbation, Prompt, Sampling

MORE_ROWS = 16  # rows above the engine's limit for small batches; larger batches use the same kernels
PROMPT_TOKENS, NEW_TOKENS = 1024, 3  # tokens of all prompts together, and of one completion


def uses_attention_caller(model: Model) -> bool:
    """Return whether `AttentionCaller` fits: generation needs only tokens, mask, positions and a key/value cache."""
    accepted = set(inspect.signature(model.forward).parameters)
    plain = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    is_custom = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    return plain <= accepted and not is_custom and not model._is_stateful and model._supports_default_dynamic_cache()


@torch.inference_mode()
def takes_wide_mask(model: Model) -> bool:
    """Return whether a 4-D mask gives exactly the logits of the 2-D mask, in a trial with a padded batch.

    `AttentionCaller` reads a common prefix of all rows once and puts the padding after it. So the trial also requires
    that the logits then agree to rounding.
    """
    config = model.config.get_text_config(decoder=True)
    one_kind = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    known = model.config._attn_implementation in ("sdpa", attention.NAME)
    if not known or getattr(config, "sliding_window", None) or not one_kind:
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    prefix = list(range(1, 1 + LEAST_SHARED))
    for prompts, is_exact in (([[1, 2, 3, 4], [5, 6]], True), ([[*prefix, 9, 3], [*prefix, 4]], False)):
        ids, mask = left_pad([[t % config.vocab_size for t in prompt] for prompt in prompts], 0, model.device)
        logits = []
        for wide in (False, True):
            caller = AttentionCaller(model, wide, groups=1)
            try:
                logits.append(torch.stack([caller.prefill(ids, mask, 1), caller.step(ids[:, 0])]).float())
            except (RuntimeError, ValueError, TypeError, IndexError):
                return False  # the model takes another form of mask
        of_2d, of_4d = logits
        bound = tolerance * (of_2d.abs().max() + 1e-6)
        agrees = torch.equal(of_2d, of_4d) if is_exact else bool((of_2d - of_4d).abs().max() <= bound)
        if not agrees:
            return False
    return True


@torch.inference_mode()
def safe_batching(model: Model, caller: Callable[[], Caller]) -> str:
    """Return which rows may share a batch and get the same logits as alone, by a trial.

    Returns:
        ``padded``: rows of any length. ``equal``: rows of equal length, because some models ignore the mask.
        ``single``: one row, because a few models mix the states of a batch.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    short, other, long = ([t % vocabulary for t in row] for row in ([8, 9, 10], [5, 3, 7], [1, 2, 3, 4, 5, 6, 7]))
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2

    def last_row(batch: list[list[int]]) -> torch.Tensor:
        ids, mask = left_pad(batch, 0, model.device)
        batch_caller = caller()
        first = batch_caller.prefill(ids, mask, 2)[-1]
        return torch.stack([first, batch_caller.step(ids[:, -1])[-1]]).float()  # (2, V)

    alone = last_row([short])
    bound = tolerance * (alone.abs().max() + 1e-6)
    if (last_row([long, short]) - alone).abs().max() <= bound:
        return "padded"
    return "equal" if (last_row([other, short]) - alone).abs().max() <= bound else "single"


class _Engine(Protocol):
    prompts_per_batch: int

    def generate_population(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[list[list[Completion]]]: ...

    def forget(self) -> None: ...


def answers_repeat(
    engine: _Engine,
    perturbations: Sequence[Perturbation],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    small_rows: int,
) -> bool:
    """Return whether members give the same tokens alone and beside a busy thread.

    Libraries choose their kernels by shape, so the trial keeps the number of rows of a real batch, up to a limit above
    which the kernels are the same. It shortens prompts and completions instead, because decoding under load is slow.

    Args:
        engine: the engine under trial.
        perturbations: members, (M,).
        prompts: (B,).
        sampling: the run's decoding options.
        small_rows: largest number of rows for which the engine's layers use their own kernel.
    """
    short = replace(sampling, max_completion_length=min(NEW_TOKENS, sampling.max_completion_length))
    batch = list(prompts[: engine.prompts_per_batch])
    n_members = -(-(small_rows + MORE_ROWS) // (len(batch) * (sampling.num_generations if sampling.temperature else 1)))
    members = list(perturbations[:n_members])
    longest = max(2, PROMPT_TOKENS // (len(batch) * len(members)))
    batch = [replace(prompt, token_ids=prompt.token_ids[-longest:]) for prompt in batch]
    alone = engine.generate_population(members, batch, short)
    stop = threading.Event()
    load = threading.Thread(target=_keep_busy, args=(stop,), daemon=True)
    load.start()
    try:
        engine.forget()  # the second answers also need the weights written again
        loaded = engine.generate_population(members, batch, short)
    finally:
        stop.set()
        load.join()
    return alone == loaded


def _keep_busy(stop: threading.Event) -> None:
    values = np.ones((256, 256))
    while not stop.is_set():
        values = np.tanh(values @ values * 1e-3)
