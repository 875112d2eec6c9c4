"""Bindings: the place of every stored tensor of a Hugging Face model in its in-memory parameters.

estune names and indexes parameters as ``save_pretrained`` writes them. The layout of the model in memory may
differ in transformers 5: experts are stacked and fused, projections split or permuted, keys renamed, weights tied.
`bindings` runs the reverse conversion of ``save_pretrained`` twice. On meta tensors it finds names, shapes, and all
tensors that are only renamed or sliced; this needs no memory. On integer tags it traces the tensors that the conversion
copies: every element holds its own address, so the result shows the source of every stored element. A stored tensor
is then one strided view of a parameter, or several views side by side, and is read and written in place.
"""

from __future__ import annotations

import math
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

    The slice is ``stored.narrow(dim, start, length)``. Its elements, in row-major order, are those of ``view``.
    """

    parameter: torch.Tensor
    view: torch.Tensor
    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Binding:
    """One tensor of the stored state dict and the memory that holds it."""

    name: str  # as ``save_pretrained`` writes it
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    requires_grad: bool
    kind: str  # embedding, matrix, norm or bias

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype in the model; some models keep a few tensors in float32."""
        return self.pieces[0].view.dtype

    @property
    def direct(self) -> torch.Tensor | None:
        """The parameter's memory as a view of the stored shape, if it holds the whole tensor so; else ``None``."""
        view = self.pieces[0].view
        if len(self.pieces) == 1 and view.is_contiguous() and view.numel() == math.prod(self.shape):
            return view.view(self.shape)
        return None

    def read(self) -> torch.Tensor:
        """Return a copy in the stored layout, with the model's dtype and device."""
        stored = torch.empty(self.shape, dtype=self.dtype, device=self.pieces[0].view.device)
        for piece in self.pieces:
            part = stored.narrow(piece.dim, piece.start, piece.length) if self.shape else stored
            part.copy_(piece.view.reshape(part.shape))
        return stored

    def write(self, stored: torch.Tensor) -> None:
        """Copy a tensor in the stored layout, of any dtype and device, into the parameters, with one cast."""
        for piece in self.pieces:
            part = stored.narrow(piece.dim, piece.start, piece.length) if self.shape else stored
            piece.view.copy_(part.reshape(piece.view.shape))


def bindings(model: PreTrainedModel) -> tuple[list[Binding], dict[str, torch.Tensor]]:
    """Bind every tensor that ``save_pretrained`` would write to the memory that holds it.

    Parameters that are not contiguous are made contiguous.

    Returns:
        The parameters' bindings in name order, tied parameters once; and the persistent buffers by stored name (copies
        if the stored layout differs).

    Raises:
        UserError: the model is quantized, has parameters that are not floating-point numbers, or a stored tensor cannot
            be addressed in the parameters.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            "the model is quantized, and estune moves full weights: dequantize it and drop its quantization_config"
        )
    memory = _saved_tensors(model)
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

    # A tensor that is only renamed or sliced shares the storage of its meta tensor.
    views = {name: source for name, tensor in stored.items() if (source := source_of.get(_storage(tensor)))}
    covered: dict[str, int] = defaultdict(int)  # in-memory name -> elements found in views
    for name, source in views.items():
        covered[source] += stored[name].numel()
    copied = {name: value for name, value in memory.items() if covered[name] != value.numel()}

    pieces: dict[str, tuple[Piece, ...]] = {}  # by stored name
    stored_buffers: dict[str, torch.Tensor] = {}
    for name, source in views.items():
        if source in copied:
            continue
        tensor = stored[name]
        view = _strided(memory[source], tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        if source in parameters:
            pieces[name] = (Piece(parameters[source], view, 0, 0, tensor.shape[0] if tensor.dim() else 1),)
        else:
            stored_buffers[name] = view
    pieces.update(_bind_by_tags(model, {name: parameters[name] for name in copied if name in parameters}, stored))
    copied_buffers = {name: buffers[name] for name in copied if name in buffers}
    if copied_buffers:
        stored_buffers.update(revert_weight_conversion(model, copied_buffers))
    untraced = stored.keys() ^ (pieces.keys() | stored_buffers.keys())
    if untraced:
        raise UserError(f"cannot trace the stored tensor {min(untraced)!r} to the parameters of {type(model).__name__}")
    _check_complete(pieces, parameters, model)
    bound = [_binding(name, tuple(stored[name].shape), parts, embeddings) for name, parts in sorted(pieces.items())]
    return bound, dict(sorted(stored_buffers.items()))


def _saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that ``save_pretrained`` writes, by in-memory name; tied ones once."""
    state = model.state_dict()
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    names = remove_tied_weights_from_state_dict(state, model)
    tensors: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
    tensors.update(model.named_parameters(remove_duplicate=False))
    return {name: tensors[name] for name in names}


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
    """Bind the tensors that the conversion copies: convert tensors of addresses, layer by layer to limit memory."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in parameters:
        match = re.match(r".*?\.\d+\.", name)
        groups[match.group() if match else ""].append(name)
    pieces = {}
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
            pieces[name] = pieces_of(name, addresses.numpy(), spans)
    return pieces


def pieces_of(name: str, addresses: np.ndarray, spans: Iterable[tuple[int, int, torch.Tensor]]) -> tuple[Piece, ...]:
    """Return the pieces of a stored tensor with these addresses: one per parameter along one dimension."""
    for first, last, parameter in spans:
        if first <= addresses.flat[0] < last and addresses.min() >= first and addresses.max() < last:
            view = view_at(name, addresses, first, parameter)
            return (Piece(parameter, view, 0, 0, addresses.shape[0] if addresses.ndim else 1),)
    # The tensor holds several parameters side by side: find the dimension along which they follow each other.
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
            view = view_at(name, np.ascontiguousarray(part), first, by_start[first])
            pieces.append(Piece(by_start[first], view, dim, start, end - start))
        return tuple(pieces)
    raise UserError(f"the stored tensor {name!r} mixes several parameters in a way that no view expresses")


def view_at(name: str, addresses: np.ndarray, first: int, parameter: torch.Tensor) -> torch.Tensor:
    """Return the view of ``parameter`` whose elements, row-major, lie at ``addresses - first``.

    The function finds runs of a constant step, from the innermost dimension outwards. So the view may have more
    dimensions than the stored tensor, which also expresses permutations.

    Raises:
        UserError: no strided view has these addresses.
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
    bound: Mapping[str, tuple[Piece, ...]], parameters: Mapping[str, torch.Tensor], model: PreTrainedModel
) -> None:
    """Raise UserError unless every element of every parameter is bound exactly once."""
    elements: dict[int, int] = defaultdict(int)  # bound elements by id of the parameter
    for pieces in bound.values():
        for piece in pieces:
            elements[id(piece.parameter)] += piece.view.numel()
    for name, parameter in parameters.items():
        if elements[id(parameter)] != parameter.numel():
            raise UserError(f"parameter {name!r} of {type(model).__name__} is not stored in full by save_pretrained")
