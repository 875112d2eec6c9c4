"""Two ways of calling a Hugging Face model token by token, and trials of what a model bears.

`AttentionCaller` is for models that take a mask, positions and a key/value cache (nearly all): masks and positions are
laid out once, the cache is written in place. `GenericCaller` goes through the hooks that ``generate`` itself uses, for
models with a state or input code of their own. What cannot be read off a model's signature is tried out at load.

A caller serves one batch and holds its cache, so no cache ever meets other weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Model = Any  # a causal language model of transformers, whose own annotations are too loose to check against


class Caller(Protocol):
    """One batch's way through the model; holds the cache, and is never used for a second batch."""

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, max_new: int) -> torch.Tensor:
        """Read the prompts, ``ids`` and ``mask`` (R, P); return the logits of the next token (R, V)."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one token per row (R,); return the logits of the next one (R, V)."""

    def keep(self, rows: torch.Tensor) -> bool:
        """Drop all other rows of the batch; false where the model's cache cannot do that (nothing is dropped)."""


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A key/value layer written in place: concatenating would copy the whole cache at every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity  # tokens
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (R, heads, T, d) states; return all states so far as views."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self._keys, self._values = (
                state.new_empty((*state.shape[:2], self.capacity, state.shape[3]))
                for state in (key_states, value_states)
            )
            self.is_initialized = True
        end = self.length + key_states.shape[2]
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.length

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        self._keys, self._values = self._keys[indices], self._values[indices]
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]


class AttentionCaller:
    """Calls a model that takes ``attention_mask``, ``position_ids`` and ``past_key_values``."""

    def __init__(self, model: Model, wide_mask: bool) -> None:
        """``wide_mask``: the model takes a ready (R, 1, 1, S) mask per token, which saves building one in it."""
        self.model = model
        self.wide_mask = wide_mask

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, max_new: int) -> torch.Tensor:
        """See `Caller`."""
        rows, length = ids.shape
        self.length = length
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        for i, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[i] = PreallocatedLayer(length + max_new)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)  # (R, P)
        self.padded = not bool(mask.all())
        self.mask = mask.new_ones((rows, length + max_new))
        self.mask[:, :length] = mask
        if self.wide_mask:
            self.mask = self.mask.bool()[:, None, None, :]  # (R, 1, 1, P + T)
        self.positions = positions[:, -1:].clone()  # (R, 1): of the last token read
        return self._call(ids, mask if self.padded else None, positions)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Caller`."""
        self.length += 1
        self.positions += 1
        return self._call(tokens[:, None], self.mask[..., : self.length] if self.padded else None, self.positions)

    def keep(self, rows: torch.Tensor) -> bool:
        """See `Caller`."""
        if any(type(layer) not in (PreallocatedLayer, DynamicSlidingWindowLayer) for layer in self.cache.layers):
            return False
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        return True

    def _call(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


class GenericCaller:
    """Calls a model through the hooks of ``generate``: state-space models, and models that prepare their inputs."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.accepted = set(inspect.signature(model.forward).parameters)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, max_new: int) -> torch.Tensor:
        """See `Caller`."""
        self.ids = ids
        self.arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
        if "position_ids" in self.accepted:
            self.arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)
        if "logits_to_keep" in self.accepted:
            self.arguments["logits_to_keep"] = 1
        if self.model._supports_default_dynamic_cache():
            name = "past_key_values" if "past_key_values" in self.accepted else "cache_params"
            self.arguments[name] = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **self.arguments)
        return self._call(inputs)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Caller`."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        inputs = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=1, **self.arguments)
        return self._call(inputs)

    def keep(self, rows: torch.Tensor) -> bool:
        """See `Caller`."""
        return False

    def _call(self, inputs: dict[str, Any]) -> torch.Tensor:
        output = self.model(**inputs, return_dict=True)
        self.arguments = self.model._update_model_kwargs_for_generation(output, self.arguments)
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask (R, P), int64, padded on the left."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def uses_attention_caller(model: Model) -> bool:
    """Say whether the model's inputs during generation are the plain ones (mask, positions, key/value cache)."""
    accepted = set(inspect.signature(model.forward).parameters)
    plain = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
    own_inputs = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    return plain <= accepted and not own_inputs and not model._is_stateful and model._supports_default_dynamic_cache()


@torch.inference_mode()
def takes_wide_mask(model: Model) -> bool:
    """Try whether a ready 4-D mask gives the very logits that the 2-D mask gives, over a padded batch."""
    config = model.config.get_text_config(decoder=True)
    one_kind = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if model.config._attn_implementation != "sdpa" or getattr(config, "sliding_window", None) or not one_kind:
        return False
    ids = torch.tensor([[1, 2, 3, 4], [1, 1, 5, 6]], device=model.device) % config.vocab_size
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=model.device)
    found = []
    for wide in (False, True):
        caller = AttentionCaller(model, wide)
        caller.prefill(ids, mask, 1)
        try:
            found.append(caller.step(ids[:, 0]))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # the model wants its mask in another form
    return bool(torch.equal(found[0], found[1]))


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
