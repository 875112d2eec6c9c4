"""Where every stored tensor of a Hugging Face model lives inside its in-memory parameters.

estune names and indexes parameters as ``save_pretrained`` writes them (DESIGN section 2). In memory transformers 5 may
hold them otherwise: experts stacked and fused, projections split or permuted, keys renamed, weights tied. `bindings`
runs the same reverse conversion that ``save_pretrained`` runs, first on meta tensors (which tells names, shapes and
everything that is only renamed or sliced, at no cost in memory), then, for what the conversion copied, on integer
tags: each element carries its own address, so the result says where every stored element came from. Each stored
tensor is thus one strided view of a parameter, or a few side by side, and is read and written in place.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from estune.errors import UserError


@dataclass(frozen=True, slots=True)
class Piece:
    """One slice of a stored tensor and the view of a parameter that holds it.

    The slice is ``stored.narrow(dim, start, length)``; in row-major order its elements are those of ``view``.
    """

    parameter: torch.Tensor
    view: torch.Tensor
    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Binding:
    """One tensor of the stored state dict and the memory behind it."""

    name: str  # as ``save_pretrained`` writes it
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    requires_grad: bool
    kind: str  # embedding, matrix, norm or bias

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model holds this tensor (some models keep a few of them in float32)."""
        return self.pieces[0].view.dtype

    @property
    def direct(self) -> torch.Tensor | None:
        """The live memory itself, where it already has the stored layout without gaps; else ``None``."""
        if len(self.pieces) == 1 and self.pieces[0].view.is_contiguous():
            return self.pieces[0].view.view(self.shape)
        return None

    def read(self) -> torch.Tensor:
        """Return a copy in the stored layout, in the model's dtype and on its device."""
        stored = torch.empty(self.shape, dtype=self.dtype, device=self.pieces[0].view.device)
        for piece in self.pieces:
            part = stored.narrow(piece.dim, piece.start, piece.length) if self.shape else stored
            part.copy_(piece.view.reshape(part.shape))
        return stored

    def write(self, stored: torch.Tensor) -> None:
        """Copy a tensor in the stored layout into the live parameters: one cast, from any dtype and device."""
        for piece in self.pieces:
            part = stored.narrow(piece.dim, piece.start, piece.length) if self.shape else stored
            piece.view.copy_(part.reshape(piece.view.shape))


def bindings(model: PreTrainedModel) -> tuple[list[Binding], dict[str, torch.Tensor]]:
    """Bind every tensor that ``save_pretrained`` would write to the memory that holds it.

    Returns:
        Parameters in name order, tied ones once, and the persistent buffers by stored name (copies where the stored
        layout differs). Parameters that are not contiguous are made so.

    Raises:
        UserError: the model is quantized, or a stored tensor cannot be addressed inside the parameters.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            "the model is quantized, and estune moves full weights: dequantize it and drop its quantization_config"
        )
    memory = _kept_in_memory(model)
    parameters = {name: value for name, value in memory.items() if isinstance(value, nn.Parameter)}
    buffers = {name: value for name, value in memory.items() if name not in parameters}
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise UserError(f"parameter {name!r} is {parameter.dtype}, and estune moves floating-point weights only")
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()

    skeleton = {name: torch.empty(value.shape, device="meta") for name, value in memory.items()}
    source_of = {_storage(tensor): name for name, tensor in skeleton.items()}
    stored = revert_weight_conversion(model, dict(skeleton))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    # what was only renamed or sliced shares the storage of its meta tensor
    views = {name: source for name, tensor in stored.items() if (source := source_of.get(_storage(tensor)))}
    covered: dict[str, int] = defaultdict(int)  # in-memory name -> elements found in views
    for name, source in views.items():
        covered[source] += stored[name].numel()
    copied = {name: value for name, value in memory.items() if covered[name] != value.numel()}

    found: dict[str, tuple[Piece, ...]] = {}
    stored_buffers: dict[str, torch.Tensor] = {}
    for name, source in views.items():
        if source in copied:
            continue
        tensor = stored[name]
        view = _strided(memory[source], tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        if source in parameters:
            found[name] = (Piece(parameters[source], view, 0, 0, tensor.shape[0] if tensor.dim() else 1),)
        else:
            stored_buffers[name] = view
    found.update(_bind_by_tags(model, {name: parameters[name] for name in copied if name in parameters}, stored))
    copied_buffers = {name: buffers[name] for name in copied if name in buffers}
    if copied_buffers:
        stored_buffers.update(revert_weight_conversion(model, copied_buffers))
    lost = stored.keys() ^ (found.keys() | stored_buffers.keys())
    if lost:
        raise UserError(f"cannot trace the stored tensor {min(lost)!r} to the parameters of {type(model).__name__}")
    _check_complete(found, parameters, model)
    result = [_binding(name, tuple(stored[name].shape), pieces, embeddings) for name, pieces in sorted(found.items())]
    return result, dict(sorted(stored_buffers.items()))


def _kept_in_memory(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that ``save_pretrained`` keeps, by in-memory name, tied ones once."""
    state = model.state_dict()
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    kept = remove_tied_weights_from_state_dict(state, model)
    live: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
    live.update(model.named_parameters(remove_duplicate=False))
    return {name: live[name] for name in kept}


def _binding(name: str, shape: tuple[int, ...], pieces: tuple[Piece, ...], embeddings: set[int]) -> Binding:
    trained = {piece.parameter.requires_grad for piece in pieces}
    if len(trained) > 1:
        raise UserError(f"the stored tensor {name!r} is made of parameters of which only some require a gradient")
    if any(id(piece.parameter) in embeddings for piece in pieces):
        kind = "embedding"
    elif len(shape) >= 2:
        kind = "matrix"
    else:
        kind = "bias" if "bias" in name.rpartition(".")[2] else "norm"
    return Binding(name, shape, pieces, trained.pop(), kind)


def _bind_by_tags(
    model: PreTrainedModel, parameters: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
) -> dict[str, tuple[Piece, ...]]:
    """Bind what the conversion copies, by converting tensors of addresses; one layer at a time, to bound memory."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in parameters:
        match = re.match(r".*?\.\d+\.", name)
        groups[match.group() if match else ""].append(name)
    found = {}
    for names in groups.values():
        total = sum(parameters[name].numel() for name in names)
        dtype = torch.int32 if total < 2**31 else torch.int64
        tags, first = {}, 0
        spans = []  # (first address, one past the last, parameter)
        for name in names:
            parameter = parameters[name]
            tags[name] = torch.arange(first, first + parameter.numel(), dtype=dtype).view(parameter.shape)
            spans.append((first, first + parameter.numel(), parameter))
            first += parameter.numel()
        converted = revert_weight_conversion(model, tags)
        del tags
        for name in list(converted):
            addresses = converted.pop(name)
            if name not in stored or addresses.shape != stored[name].shape:
                raise UserError(f"the parameters behind the stored tensor {name!r} are spread over several layers")
            found[name] = _pieces_of(name, addresses.numpy(), spans)
    return found


def _pieces_of(name: str, addresses: np.ndarray, spans: Iterable[tuple[int, int, torch.Tensor]]) -> tuple[Piece, ...]:
    """Turn the addresses of a stored tensor into pieces, one per run of a parameter along one dimension."""
    for first, last, parameter in spans:
        if first <= addresses.flat[0] < last and addresses.min() >= first and addresses.max() < last:
            view = _view_at(name, addresses, first, parameter)
            return (Piece(parameter, view, 0, 0, addresses.shape[0] if addresses.ndim else 1),)
    # several parameters side by side: find the dimension along which they change
    starts = np.array([first for first, _, _ in spans])
    by_start = {first: parameter for first, _, parameter in spans}
    for dim in range(addresses.ndim):
        line = addresses[tuple(slice(None) if d == dim else 0 for d in range(addresses.ndim))]
        owner = starts[np.searchsorted(starts, line, side="right") - 1]  # (length of dim,)
        cuts = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]
        if len(cuts) == 2:
            continue
        pieces = []
        for start, end in pairwise(cuts):
            part = addresses[tuple(slice(start, end) if d == dim else slice(None) for d in range(addresses.ndim))]
            first = int(owner[start])
            view = _view_at(name, np.ascontiguousarray(part), first, by_start[first])
            pieces.append(Piece(by_start[first], view, dim, start, end - start))
        return tuple(pieces)
    raise UserError(f"the stored tensor {name!r} mixes several parameters in a way that no view expresses")


def _view_at(name: str, addresses: np.ndarray, first: int, parameter: torch.Tensor) -> torch.Tensor:
    """Return the view of ``parameter`` whose elements, row-major, lie at ``addresses - first``.

    Nested runs of a constant step are peeled off from the innermost outwards, which also expresses permutations
    that no view of the stored rank could.
    """
    line = addresses.reshape(-1)
    offset = int(line[0]) - first
    shape: list[int] = []
    strides: list[int] = []
    while line.size > 1:
        step = int(line[1]) - int(line[0])
        breaks = np.flatnonzero(np.diff(line) != step)
        run = int(breaks[0]) + 1 if breaks.size else line.size
        if line.size % run or step < 0:
            raise _not_a_view(name)
        rows = line.reshape(-1, run)
        if (np.diff(rows, axis=1) != step).any():
            raise _not_a_view(name)
        shape.insert(0, run)
        strides.insert(0, step)
        line = np.ascontiguousarray(rows[:, 0])
    if offset < 0 or offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= parameter.numel():
        raise _not_a_view(name)
    return _strided(parameter, tuple(shape), tuple(strides), offset)


def _not_a_view(name: str) -> UserError:
    return UserError(f"the stored tensor {name!r} is not a strided view of the model's parameters: cannot perturb it")


def _strided(parameter: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
    data = parameter.detach()
    return data.as_strided(shape, strides, data.storage_offset() + offset)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _check_complete(
    found: Mapping[str, tuple[Piece, ...]], parameters: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> None:
    """Every element of every kept parameter must be bound exactly once."""
    bound: dict[int, int] = defaultdict(int)
    for pieces in found.values():
        for piece in pieces:
            bound[id(piece.parameter)] += piece.view.numel()
    for name, parameter in parameters.items():
        if bound[id(parameter)] != parameter.numel():
            raise UserError(f"parameter {name!r} of {type(model).__name__} is not stored in full by save_pretrained")
