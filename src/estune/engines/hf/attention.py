"""Grouped-query attention with a mask, without copies of the keys and values.

If query heads share key/value heads and rows are padded, transformers repeats keys and values for every query head
before it calls torch. So each layer copies several times its whole cache for every token. Torch's CPU kernel accepts
grouped heads together with a mask; this attention function passes them directly and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 (its usual name)
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "estune_sdpa"
_TRIAL = ([1, 2, 3, 4, 5], [1, 1, 1, 6, 7])  # token ids; the first three of the second row are padding


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the same attention as transformers' ``sdpa``: (R, T, H, d).

    The query is (R, H, T, d); key and value are (R, H / g, S, d). Only masked calls with grouped heads on a CPU are
    computed here. Others go to transformers.
    """
    if (
        attention_mask is None
        or not key.is_cpu
        or key.shape[1] == query.shape[1]
        or query.shape[-1] != value.shape[-1]
        or kwargs.get("position_bias") is not None
        or kwargs.get("cache") is not None
    ):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return output, None
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )  # (R, H, T, d)
    return output.transpose(1, 2).contiguous(), None


@dataclass(frozen=True, slots=True)
class Choice:
    """A configuration within a model, and the names of two attention implementations."""

    config: Any
    own: str | None  # the model's own implementation
    faster: str | None  # the implementation for the model's use by an engine


@torch.inference_mode()
def find(model: Any) -> list[Choice]:
    """Return the configurations in ``model`` that can name `grouped_attention`; the model does not change.

    The list is empty if a trial's logits with `grouped_attention` are not equal to rounding.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    if (
        model.device.type != "cpu"
        or model.config._attn_implementation != "sdpa"
        or getattr(config, "num_key_value_heads", heads) == heads
    ):
        return []
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    ids = torch.tensor(_TRIAL) % config.vocab_size
    mask = torch.tensor([[1] * 5, [0] * 3 + [1] * 2])
    before = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].float()
    own = [(part, part._attn_implementation, dict(vars(part))) for part in _configurations(model)]
    try:
        model.set_attn_implementation(NAME)
        after = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].float()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return []
    finally:
        choices = [Choice(part, name, part._attn_implementation) for part, name, _ in own]
        for part, _, values in own:
            vars(part).clear()
            vars(part).update(values)
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    if (after - before).abs().max() > tolerance * (before.abs().max() + 1e-6):
        return []
    return [choice for choice in choices if choice.faster != choice.own]


@contextmanager
def selected(choices: Sequence[Choice]) -> Iterator[None]:
    """Let configurations name the faster implementation within the block, unless their own has changed since `find`."""
    changed = [choice for choice in choices if choice.config._attn_implementation == choice.own]
    try:
        for choice in changed:  # the public attribute would also set the configurations nested in this one
            choice.config._attn_implementation_internal = choice.faster
        yield
    finally:
        for choice in changed:
            choice.config._attn_implementation_internal = choice.own


def _configurations(model: Any) -> list[Any]:
    """Return every configuration that ``model.set_attn_implementation`` may change, once."""
    parts: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    parts += [getattr(model.config, name, None) for name in model.config.sub_configs]
    return list({id(part): part for part in parts if part is not None}.values())
