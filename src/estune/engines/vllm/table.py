"""The table from stored tensors to vLLM's parameters, found by probing `load_weights` and verified by value.

vLLM fuses, splits, pads and transposes tensors when it loads them, in a way of its own for every architecture. The
probe needs no list of architectures. It loads tensors whose elements hold their own addresses, and reads from every
parameter which stored element lies where. The result is a list of bindings (`estune.engines.hf.parameters`), through
which members are written into vLLM's memory.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from estune.engines.hf.parameters import Binding, Piece, view_at
from estune.errors import UserError

UNTOUCHED = -1  # what a parameter's element holds if nothing is loaded into it
COPY_BYTES = 1 << 12  # bytes; a larger tensor outside parameters and buffers may be a copy of weights


@dataclass(frozen=True, slots=True)
class Stored:
    """What the table needs to know of one stored tensor."""

    shape: tuple[int, ...]
    kind: str  # embedding, matrix, norm or bias
    requires_grad: bool = True


def bind(model: nn.Module, stored: Mapping[str, Stored], architecture: str) -> list[Binding]:
    """Bind stored tensors to the memory of a vLLM model, or of one rank's shard of it.

    Args:
        model: vLLM's module, after loading.
        stored: the stored tensors by name.
        architecture: the model's name, for messages.

    Returns:
        One binding per stored tensor that has elements in this model, in name order.

    Raises:
        UserError: a parameter is not filled from stored tensors, or cannot be written in place.
    """
    parameters = dict(model.named_parameters())
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for names, targets in _layers(stored, parameters):
        addresses = _probe(model, {name: stored[name].shape for name in names}, targets, architecture)
        starts = _starts([stored[name].shape for name in names])
        for target, held in addresses.items():
            for name, piece in _pieces(
                held.reshape(-1), names, starts, stored, parameters[target], target, architecture
            ):
                pieces[name].append(piece)
    return [
        Binding(name, stored[name].shape, tuple(pieces[name]), stored[name].requires_grad, stored[name].kind)
        for name in sorted(pieces)
    ]


def _layers(
    stored: Mapping[str, Stored], parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield stored names and parameters layer by layer, so that the probe needs memory for one layer at a time."""

    def layer(name: str) -> str:
        match = re.search(r"\.(\d+)\.", name)
        return match.group(1) if match else ""

    by_layer: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name in stored:
        by_layer[layer(name)][0].append(name)
    for name in parameters:
        by_layer[layer(name)][1].append(name)
    yield from by_layer.values()


def _starts(shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the first address of every tensor, and the end of the last: int64 (T + 1,). Address 0 is for padding."""
    return np.concatenate([[0], np.cumsum([math.prod(shape) for shape in shapes])]).astype(np.int64) + 1


def _probe(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], targets: Sequence[str], architecture: str
) -> dict[str, np.ndarray]:
    """Load tensors of addresses into the parameters ``targets``; return what each of them then holds, int64.

    All other parameters are empty meanwhile, so that a tensor that vLLM loads elsewhere is an error.
    """
    parameters = dict(model.named_parameters())
    memory = {name: parameter.data for name, parameter in parameters.items()}
    starts = _starts(list(shapes.values()))
    try:
        for name, parameter in parameters.items():
            if name in targets:
                parameter.data = torch.full(parameter.shape, UNTOUCHED, dtype=torch.float64)
            else:
                parameter.data = torch.empty(0, dtype=torch.float64)
        load: Any = model.load_weights
        load(
            (name, torch.arange(int(start), int(start) + math.prod(shape), dtype=torch.float64).view(shape))
            for (name, shape), start in zip(shapes.items(), starts, strict=False)
        )
        return {name: parameters[name].data.long().numpy() for name in targets}
    except Exception as error:
        raise UserError(
            f"the layout of {architecture} in vLLM could not be found: {type(error).__name__}: {error}; use --engine hf"
        ) from error
    finally:
        for name, parameter in parameters.items():
            parameter.data = memory[name]


def _pieces(
    addresses: np.ndarray,
    names: Sequence[str],
    starts: np.ndarray,
    stored: Mapping[str, Stored],
    parameter: nn.Parameter,
    target: str,
    architecture: str,
) -> Iterator[tuple[str, Piece]]:
    """Yield (stored name, piece) for one parameter, whose elements hold ``addresses`` (d,)."""
    if (addresses == UNTOUCHED).any():
        raise UserError(
            f"the parameter {target} of {architecture} in vLLM is not filled from the model's tensors; use --engine hf"
        )
    places = np.flatnonzero(addresses)  # without padding
    held = addresses[places]
    if held.size and (np.diff(held) < 0).any():
        order = np.argsort(held, kind="stable")
        places, held = places[order], held[order]
    cuts = np.searchsorted(held, starts)
    for index, name in enumerate(names):
        low, high = cuts[index], cuts[index + 1]
        if low < high:
            yield name, _piece(name, stored[name].shape, places[low:high], held[low:high] - starts[index], parameter)


def _piece(
    name: str, shape: tuple[int, ...], places: np.ndarray, elements: np.ndarray, parameter: nn.Parameter
) -> Piece:
    """Return the piece of a stored tensor whose ``elements`` (n,), in order, lie at ``places`` (n,) of a parameter."""
    total = math.prod(shape)
    if elements.size == total:
        return Piece(parameter, view_at(name, places, 0, parameter), 0, 0, shape[0] if shape else 1)
    for dim, size in enumerate(shape):  # a shard: a range of one dimension
        inner = math.prod(shape[dim + 1 :])
        index = elements // inner % size
        start, length = int(index.min()), int(index.max()) - int(index.min()) + 1
        if elements.size == total // size * length and length < size:
            return Piece(parameter, view_at(name, places, 0, parameter), dim, start, length)
    raise UserError(f"vLLM holds a part of {name!r} that is no range of one dimension; use --engine hf")


def verify(
    model: nn.Module,
    bound: Sequence[Binding],
    read: Callable[[str], torch.Tensor],
    caches: Sequence[torch.Tensor],
    architecture: str,
) -> None:
    """Compare every binding with the memory of a loaded model, bit by bit.

    Args:
        model: vLLM's module, with the base weights loaded.
        bound: the bindings.
        read: returns a stored tensor by name, in float32.
        caches: the model's key-value caches, which are no weights.
        architecture: the model's name, for messages.

    Raises:
        UserError: memory differs from the stored tensor, or the model holds copies of weights elsewhere.
    """
    for binding in bound:
        stored = read(binding.name).view(binding.shape)
        for piece in binding.pieces:
            part = stored.narrow(piece.dim, piece.start, piece.length) if binding.shape else stored
            expected = part.to(piece.view.dtype).reshape(piece.view.shape)
            if not torch.equal(_bits(piece.view.cpu()), _bits(expected)):
                raise UserError(
                    f"vLLM's memory of {binding.name} in {architecture} differs from the model's weights after the "
                    "layout was found, so members cannot be written; use --engine hf"
                )
    copies = list(_other_tensors(model, caches))
    if copies:
        raise UserError(
            f"vLLM keeps {copies[0]} of {architecture} outside the model's parameters, so a member would not change "
            "it; use --engine hf"
        )


Range = tuple[int, int, int]  # dimension, start and length: a part of a stored tensor


def ranges_of(bound: Sequence[Binding]) -> dict[str, list[Range]]:
    """Return the parts of every stored tensor that these bindings hold."""
    return {b.name: sorted({(piece.dim, piece.start, piece.length) for piece in b.pieces}) for b in bound}


def refuse_uncovered(
    shapes: Mapping[str, tuple[int, ...]], ranks: Sequence[Mapping[str, Sequence[Range]]], architecture: str
) -> None:
    """Raise UserError unless the ranks together hold every element of every stored tensor."""
    for name, shape in shapes.items():
        parts = sorted({part for rank in ranks for part in map(tuple, rank.get(name, ()))})
        end = 0
        for _, start, length in parts:
            end = max(end, start + length) if start <= end else end
        dims = {dim for dim, _, _ in parts}
        if len(dims) != 1 or end != (shape[dims.pop()] if shape else 1):
            raise UserError(
                f"vLLM does not hold the whole tensor {name!r} of {architecture} in its parameters; use --engine hf"
            )


def _other_tensors(model: nn.Module, caches: Sequence[torch.Tensor]) -> Iterator[str]:
    """Yield floating-point tensors that modules hold beside parameters and buffers, and that share no memory with them.

    Such a tensor may be derived from weights when they are loaded, and would keep theta's value.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), *caches]}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
                continue
            is_large = value.is_floating_point() and value.nbytes >= COPY_BYTES
            if is_large and value.untyped_storage().data_ptr() not in known:
                yield f"{name}.{attribute}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
