"""Trials at load: what cannot be read off a model's signature is tried out on a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from transformers import GenerationMixin

from estune.engines.hf import attention
from estune.engines.hf.callers import LEAST_SHARED, AttentionCaller, Caller, Model, left_pad


def uses_attention_caller(model: Model) -> bool:
    """Say whether the model's inputs during generation are the plain ones (mask, positions, key/value cache)."""
    accepted = set(inspect.signature(model.forward).parameters)
    plain = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    own_inputs = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    return plain <= accepted and not own_inputs and not model._is_stateful and model._supports_default_dynamic_cache()


@torch.inference_mode()
def takes_wide_mask(model: Model) -> bool:
    """Try whether a ready 4-D mask gives the very logits that the 2-D mask gives, over a padded batch.

    Such a model may also read tokens that all rows share once, with padding behind them: its layers see positions and
    masks alone, not places. That is tried too, and must agree to rounding.
    """
    config = model.config.get_text_config(decoder=True)
    one_kind = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    known = model.config._attn_implementation in ("sdpa", attention.NAME)
    if not known or getattr(config, "sliding_window", None) or not one_kind:
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    same = list(range(1, 1 + LEAST_SHARED))
    for prompts, exact in (([[1, 2, 3, 4], [5, 6]], True), ([[*same, 9, 3], [*same, 4]], False)):
        ids, mask = left_pad([[t % config.vocab_size for t in prompt] for prompt in prompts], 0, model.device)
        found = []
        for wide in (False, True):
            caller = AttentionCaller(model, wide, groups=1)
            try:
                found.append(torch.stack([caller.prefill(ids, mask, 1), caller.step(ids[:, 0])]).float())
            except (RuntimeError, ValueError, TypeError, IndexError):
                return False  # the model wants its mask in another form
        if not (
            torch.equal(*found)
            if exact
            else bool((found[0] - found[1]).abs().max() <= tolerance * (found[0].abs().max() + 1e-6))
        ):
            return False
    return True


@torch.inference_mode()
def safe_batching(model: Model, caller: Callable[[], Caller]) -> str:
    """Try how rows may share a batch and still get the logits that each gets alone.

    Returns:
        ``padded``: rows of any length; ``equal``: rows of one length (some models ignore the mask);
        ``single``: one row (a few models mix up the states of a batch).
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    short, other, long = ([t % vocabulary for t in row] for row in ([8, 9, 10], [5, 3, 7], [1, 2, 3, 4, 5, 6, 7]))
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2

    def last_row(batch: list[list[int]]) -> torch.Tensor:
        ids, mask = left_pad(batch, 0, model.device)
        one = caller()
        first = one.prefill(ids, mask, 2)[-1]
        return torch.stack([first, one.step(ids[:, -1])[-1]]).float()  # (2, V)

    alone = last_row([short])
    bound = tolerance * (alone.abs().max() + 1e-6)
    if (last_row([long, short]) - alone).abs().max() <= bound:
        return "padded"
    return "equal" if (last_row([other, short]) - alone).abs().max() <= bound else "single"
