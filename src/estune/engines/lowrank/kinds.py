"""The stored tensors that take low-rank noise: the model uses them in matrix products or row lookups.

These are linear layers, Conv1D, embeddings, output heads, and stacked experts with one matrix each.
The module that owns a parameter usually tells its use. For a bare parameter (a router, an expert) the operations of one
short forward pass are recorded instead.
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
    names: set[str] = set()
    unclear: list[Binding] = []
    for binding in bound:
        if len(binding.shape) not in (2, 3):
            continue
        if len(binding.shape) == 2 and all(id(piece.parameter) in owners for piece in binding.pieces):
            names.add(binding.name)
        else:
            unclear.append(binding)
    if unclear:
        products = _Products()
        with torch.inference_mode(), products:
            model(input_ids=torch.tensor([[1, 2, 3]], device=model.device), use_cache=False)
        names.update(b.name for b in unclear if all(products.include(piece.parameter) for piece in b.pieces))
    return frozenset(names)


class _Products(TorchFunctionMode):
    """Records the addresses of all tensors that are operands of a product or a lookup."""

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

    def include(self, parameter: torch.Tensor) -> bool:
        """Return whether the parameter, or a slice of it, was an operand."""
        first = parameter.data_ptr()
        last = first + parameter.numel() * parameter.element_size()
        return any(first <= address < last for address in self.addresses)
