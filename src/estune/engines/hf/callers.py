"""Callers: two ways to call a Hugging Face model token by token.

`AttentionCaller` is for models that take a mask, positions and a key/value cache, which are nearly all models. It
builds masks and positions once and writes the cache in place. `GenericCaller` uses the hooks of ``generate``, for
models with other states or their own input code. `estune.engines.hf.trials` finds out which caller fits a model.

A caller serves one batch and owns its cache, so a cache is never used with other weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAST_SHARED = 8  # tokens; a shorter common prefix of the prompts is not worth a separate forward pass
Model = Any  # a causal language model of transformers, whose annotations are too loose for a type checker


class Caller(Protocol):
    """Calls the model for one batch and holds the batch's cache; a second batch needs a new caller."""

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, max_new: int) -> torch.Tensor:
        """Read the prompts, ``ids`` and ``mask`` (R, P); return the logits of the first new token (R, V)."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one token per row (R,); return the logits of the next one (R, V)."""

    def select_rows(self, rows: torch.Tensor) -> bool:
        """Replace the batch by these of its rows; return false, without a change, if the cache cannot do that."""

    def drop_finished(self, alive: Sequence[int], lines: int) -> tuple[list[int], list[bool]] | None:
        """Remove finished rows from a batch of ``lines`` if that saves enough time.

        Args:
            alive: the unfinished lines, ascending.
            lines: number of lines in the batch.

        Returns:
            The old line that each new line continues, and whether the new line is live (false for padding); or ``None``
            if the batch is unchanged.
        """


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A key/value layer that is written in place; concatenation would copy the whole cache for every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity  # tokens
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states (R, heads, T, d); return views of all states so far."""
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
    """Calls a model that takes ``attention_mask``, ``position_ids`` and ``past_key_values``.

    Equal prompts (several completions of one prompt) are read once, and so is the common prefix of all prompts. Rows
    may form ``groups`` with the same prompts and different weights (members). Then groups share nothing with each
    other, and ``regroup(K)`` is called before a forward pass with K rows per group, if K has changed.
    """

    def __init__(
        self, model: Model, wide_mask: bool, groups: int = 0, regroup: Callable[[int], None] | None = None
    ) -> None:
        """Configure the caller for a model and its rows.

        Args:
            model: the model.
            wide_mask: whether the model takes a mask (R, 1, 1, S), which saves building one for every token.
            groups: number of row groups with the same prompts; 0: every row may have different weights, so rows share
                nothing.
            regroup: called with the number of rows per group before a forward pass that changes it.
        """
        self.model = model
        self.wide_mask = wide_mask
        self.shares = groups > 0
        self.groups = max(groups, 1)
        self.regroup = regroup or (lambda width: None)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, max_new: int) -> torch.Tensor:
        """See `Caller`."""
        rows, length = ids.shape
        width = rows // self.groups  # K, rows of a group
        self.length = length
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        for i, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[i] = PreallocatedLayer(length + max_new)
        self.padded = not bool(mask.all())
        lines, places, shared = self._in_common(ids[:width], mask[:width])
        if len(lines) < width:
            chosen = self._in_groups(lines, width)
            ids, mask = ids[chosen], mask[chosen]
        if shared:
            mask = self._read_shared(ids, mask, len(lines), shared)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)  # (R, P)
        self.mask = mask.new_ones((len(mask), length + max_new))
        self.mask[:, :length] = mask
        if self.wide_mask:
            self.mask = self.mask.bool()[:, None, None, :]  # (R, 1, 1, P + T)
        self.positions = positions[:, -1:].clone()  # (R, 1), the position of the last token
        if len(lines) < width or shared:
            self.regroup(len(lines))
        logits = self._call(ids[:, shared:], mask if self.padded else None, positions[:, shared:])
        if len(lines) < width:
            repeated = self._in_groups(places, len(lines))
            self.select_rows(repeated)
            self.regroup(width)
            logits = logits[repeated]
        return logits

    def _in_common(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[list[int], list[int], int]:
        """Return what the rows (K) of a group have in common.

        Returns:
            The rows with distinct prompts, the index of every row's prompt among these, and the number of tokens in the
            common prefix of all prompts.
        """
        all_rows = list(range(len(ids)))
        if not self.shares or not self._can_select():
            return all_rows, all_rows, 0
        prompts = [tuple(row[-n:]) for row, n in zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)]
        distinct: dict[tuple[int, ...], int] = {}  # prompt -> index
        places = [distinct.setdefault(prompt, len(distinct)) for prompt in prompts]
        lines = [places.index(place) for place in range(len(distinct))]
        shared = 0
        if self.wide_mask and len(distinct) > 1:
            for tokens in zip(*distinct, strict=False):
                if len(set(tokens)) > 1:
                    break
                shared += 1
            shared = min(shared, min(map(len, distinct)) - 1)  # at least one token of every row remains
        return lines, places, shared if shared >= LEAST_SHARED else 0

    def _read_shared(self, ids: torch.Tensor, mask: torch.Tensor, width: int, shared: int) -> torch.Tensor:
        """Read the first ``shared`` tokens once per group; return the mask (R, P) with the padding after them.

        The shared tokens come first, then the padding. A row's remaining tokens stay at the end of ``ids``.
        """
        start = ids.shape[1] - int(mask[0].sum())
        first = ids[:1, start : start + shared].expand(self.groups, -1)  # (V, shared)
        positions = torch.arange(shared, device=ids.device).expand(self.groups, -1)
        self.regroup(1)
        self._call(first, None, positions)
        self.cache.batch_select_indices(torch.arange(self.groups, device=ids.device).repeat_interleave(width))
        places = torch.arange(ids.shape[1], device=ids.device)
        is_remaining = places >= ids.shape[1] - mask.sum(-1, keepdim=True) + shared  # (R, P)
        return (is_remaining | (places < shared)).to(mask.dtype)

    def _in_groups(self, lines: Sequence[int], width: int) -> torch.Tensor:
        """Return the lines of all groups from the lines of one group and the groups' width."""
        group = torch.tensor(lines, device=self.model.device)
        return (torch.arange(self.groups, device=group.device)[:, None] * width + group).flatten()

    def _can_select(self) -> bool:
        return all(type(layer) in (PreallocatedLayer, DynamicSlidingWindowLayer) for layer in self.cache.layers)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Caller`."""
        self.length += 1
        self.positions += 1
        return self._call(tokens[:, None], self.mask[..., : self.length] if self.padded else None, self.positions)

    def select_rows(self, rows: torch.Tensor) -> bool:
        """See `Caller`."""
        if not self._can_select():
            return False
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        return True

    def drop_finished(self, alive: Sequence[int], lines: int) -> tuple[list[int], list[bool]] | None:
        """Keep only the unfinished rows if they are at most three quarters of the batch; see `Caller`."""
        if 4 * len(alive) > 3 * lines or not self.select_rows(torch.tensor(alive, device=self.mask.device)):
            return None
        return list(alive), [True] * len(alive)

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
    """Calls a model by the hooks of ``generate``: for state-space models and models that prepare their own inputs."""

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

    def select_rows(self, rows: torch.Tensor) -> bool:
        """See `Caller`."""
        return False

    def drop_finished(self, alive: Sequence[int], lines: int) -> tuple[list[int], list[bool]] | None:
        """See `Caller`."""
        return None

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
