"""Which stored tensors take low-rank noise: those that the model multiplies with, or looks rows up in.

DESIGN section 2: linear layers, Conv1D, embeddings, output heads, and stacked experts (one matrix each). What a
parameter is follows from the module that owns it; where that says nothing (a router or an expert that is a bare
parameter) one short forward pass is watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from estune.engines.hf.parameters import Binding

MATRIX_MODULES = (nn.Linear, nn.Embedding, Conv1D)
PRODUCTS = frozenset("linear matmul __matmul__ mm bmm addmm baddbmm einsum embedding _grouped_mm grouped_mm".split())


def lowrank_names(model: Any, bound: Sequence[Binding]) -> frozenset[str]:
    """Return the stored names of the tensors that take low-rank noise; the others keep full noise."""
    owners = {
        id(value): module
        for module in model.modules()
        for attribute, value in module._parameters.items()
        if value is not None and attribute == "weight" and isinstance(module, MATRIX_MODULES)
    }
    found: set[str] = set()
    unclear: list[Binding] = []
    for binding in bound:
        if len(binding.shape) not in (2, 3):
            continue
        if len(binding.shape) == 2 and all(id(piece.parameter) in owners for piece in binding.pieces):
            found.add(binding.name)
        else:
            unclear.append(binding)
    if unclear:
        watched = _Products()
        with torch.inference_mode(), watched:
            model(input_ids=torch.tensor([[1, 2, 3]], device=model.device), use_cache=False)
        found.update(b.name for b in unclear if all(watched.saw(piece.parameter) for piece in b.pieces))
    return frozenset(found)


class _Products(TorchFunctionMode):
    """Notes the addresses of all tensors that take part in a product or a lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            for value in [*args, *(kwargs or {}).values()]:
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(tensor, torch.Tensor):
                        self.addresses.add(tensor.data_ptr())
        return func(*args, **(kwargs or {}))

    def saw(self, parameter: torch.Tensor) -> bool:
        """Say whether the parameter, or a slice of it, took part."""
        first = parameter.data_ptr()
        last = first + parameter.numel() * parameter.element_size()
        return any(first <= address < last for address in self.addresses)
