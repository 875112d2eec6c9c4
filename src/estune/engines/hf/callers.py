"""Two ways of calling a Hugging Face model token by token.

`AttentionCaller` is for models that take a mask, positions and a key/value cache (nearly all): masks and positions are
laid out once, the cache is written in place. `GenericCaller` goes through the hooks that ``generate`` itself uses, for
models with a state or input code of their own. Which one a model bears is found out in `estune.engines.hf.trials`.

A caller serves one batch and holds its cache, so no cache ever meets other weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAST_SHARED = 8  # first tokens that all prompts share; fewer are not worth a forward pass of their own
Model = Any  # a causal language model of transformers, whose own annotations are too loose to check against


class Caller(Protocol):
    """One batch's way through the model; holds the cache, and is never used for a second batch."""

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, max_new: int) -> torch.Tensor:
        """Read the prompts, ``ids`` and ``mask`` (R, P); return the logits of the next token (R, V)."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one token per row (R,); return the logits of the next one (R, V)."""

    def select_rows(self, rows: torch.Tensor) -> bool:
        """Make the batch of these of its rows; false where the model's cache cannot do that (nothing changes)."""

    def drop_finished(self, alive: Sequence[int], lines: int) -> tuple[list[int], list[bool]] | None:
        """Let finished rows leave a batch of ``lines``, if that is worth it.

        Returns:
            The old line that each new line goes on with, and whether it is more than filling; or ``None``.
        """


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
    """Calls a model that takes ``attention_mask``, ``position_ids`` and ``past_key_values``.

    What prompts have in common is read once: prompts that are equal (the completions of one prompt), and the first
    tokens that all prompts share. Rows may form ``groups`` of equal prompts, each with weights of its own (members);
    then nothing is shared between groups, and ``regroup(K)`` is called before a call with other rows per group.
    """

    def __init__(
        self, model: Model, wide_mask: bool, groups: int = 0, regroup: Callable[[int], None] | None = None
    ) -> None:
        """Take a model and what is known of it and of its rows.

        Args:
            model: the model.
            wide_mask: it takes a ready (R, 1, 1, S) mask per token, which saves building one in it.
            groups: of rows, each with the same prompts; 0: any row may have weights of its own, so nothing is shared.
            regroup: called with the rows per group before a call that has others than the one before.
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
        lines, back, shared = self._in_common(ids[:width], mask[:width])
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
        self.positions = positions[:, -1:].clone()  # (R, 1): of the last token read
        if len(lines) < width or shared:
            self.regroup(len(lines))
        logits = self._call(ids[:, shared:], mask if self.padded else None, positions[:, shared:])
        if len(lines) < width:
            repeated = self._in_groups(back, len(lines))
            self.select_rows(repeated)
            self.regroup(width)
            logits = logits[repeated]
        return logits

    def _in_common(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[list[int], list[int], int]:
        """Return which rows (K) differ, the place among those of each row, and how many first tokens all share."""
        everyone = list(range(len(ids)))
        if not self.shares or not self._can_select():
            return everyone, everyone, 0
        prompts = [tuple(row[-n:]) for row, n in zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)]
        places: dict[tuple[int, ...], int] = {}
        back = [places.setdefault(prompt, len(places)) for prompt in prompts]
        lines = [back.index(place) for place in range(len(places))]
        shared = 0
        if self.wide_mask and len(places) > 1:
            for tokens in zip(*places, strict=False):
                if len(set(tokens)) > 1:
                    break
                shared += 1
            shared = min(shared, min(map(len, places)) - 1)  # every row has a token left to read
        return lines, back, shared if shared >= LEAST_SHARED else 0

    def _read_shared(self, ids: torch.Tensor, mask: torch.Tensor, width: int, shared: int) -> torch.Tensor:
        """Read the first ``shared`` tokens once a group; return the mask (R, P) with the padding behind them.

        A row's own tokens stay where they are, at the end of ``ids``: only what stands before them moves.
        """
        start = ids.shape[1] - int(mask[0].sum())
        first = ids[:1, start : start + shared].expand(self.groups, -1)  # (V, shared)
        positions = torch.arange(shared, device=ids.device).expand(self.groups, -1)
        self.regroup(1)
        self._call(first, None, positions)
        self.cache.batch_select_indices(torch.arange(self.groups, device=ids.device).repeat_interleave(width))
        places = torch.arange(ids.shape[1], device=ids.device)
        own = places >= ids.shape[1] - mask.sum(-1, keepdim=True) + shared  # (R, P)
        return (own | (places < shared)).to(mask.dtype)

    def _in_groups(self, lines: Sequence[int], width: int) -> torch.Tensor:
        """Return the lines of all groups, given those of one group and its width."""
        one = torch.tensor(lines, device=self.model.device)
        return (torch.arange(self.groups, device=one.device)[:, None] * width + one).flatten()

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
        """Keep the unfinished rows alone once they are three quarters of the batch or fewer; see `Caller`."""
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
