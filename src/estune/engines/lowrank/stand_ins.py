"""Stand-ins: objects that replace a model's parameters while many members share one forward pass.

The weights ``W + s * A B^T`` of a low-rank member are never computed. `MatrixStandIn` computes a product ``x W^T`` as
``x W^T + (x B) (s A)^T``, and every row of the batch uses its own member's factors (arXiv 2511.16652). A vector (norm
scale, bias) has full noise; `VectorStandIn` gives every row its own member's values.

The model's code does not change. It reads ``module.weight`` and gets a stand-in, and torch passes every operation on a
stand-in to ``__torch_function__``. An operation without a rule in `RULES` raises `Uncovered` with the parameter's name,
so no operation uses the unperturbed weight by accident.

The first dimension of every tensor is the batch's rows: R = V * K, that is V groups of K rows, and all rows of a group
belong to one member. A model may flatten (R, T, d) to (R * T, d).
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 (its usual name)

from estune.engines.hf import small_linear

METADATA = frozenset("device dtype shape ndim dim size numel is_cuda layout requires_grad is_meta".split())
SAME_VALUES = frozenset("contiguous detach".split())


class Uncovered(RuntimeError):
    """The model applies an operation to a parameter for which there is no rule."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{name} ({what})")
        self.name = name  # the parameter's stored name
        self.what = what  # the operation


@dataclass(slots=True)
class Layout:
    """The layout of the batch's rows, shared by all stand-ins: ``groups`` (V) of ``width`` (K) rows."""

    groups: int
    width: int

    @property
    def rows(self) -> int:
        """Rows of the batch, R."""
        return self.groups * self.width


class StandIn(ABC):
    """The base class of stand-ins: the parameter's metadata, and the dispatch of torch functions to `RULES`."""

    def __init__(self, name: str, base: torch.Tensor, layout: Layout) -> None:
        self.name = name
        self.base = base
        self.layout_of_rows = layout
        self.used = False  # whether any operation used the stand-in

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(func.__name__)
        if rule is None:
            values = [*args, *(kwargs or {}).values()]
            values += [item for value in values if isinstance(value, (list, tuple)) for item in value]
            names = [value.name for value in values if isinstance(value, StandIn)]
            raise Uncovered(names[0] if names else "a parameter", func.__name__)
        return rule(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in METADATA:
            return getattr(self.base, name)
        if name in SAME_VALUES:
            return lambda: self
        raise Uncovered(self.name, name)

    @abstractmethod
    def cast(self, dtype: torch.dtype) -> StandIn:
        """Return the stand-in in another dtype."""

    def linear(self, x: torch.Tensor, bias: Any) -> torch.Tensor:
        """Return ``x W^T + bias``, as `torch.nn.functional.linear`."""
        return _linear(x, self, bias)

    def float(self) -> StandIn:
        """Return the stand-in in float32."""
        return self.cast(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> StandIn:
        """Return the stand-in in the requested dtype; a requested device is ignored."""
        for wanted in [*args, *kwargs.values()]:
            if isinstance(wanted, torch.dtype):
                return self.cast(wanted)
            if isinstance(wanted, (torch.Tensor, StandIn)):
                return self.cast(wanted.dtype)
        return self

    def type_as(self, other: Any) -> StandIn:
        """Return the stand-in in another tensor's dtype."""
        return self.cast(other.dtype)


class MatrixStandIn(StandIn):
    """A matrix (d0, d1) with low-rank noise: ``base + left^T right`` for each group.

    ``left`` is (V, r, d0), times ``scale * sign``; ``right`` is (V, r, d1). With this layout the products run along
    contiguous memory, which is four times faster than with (V, d, r).
    """

    def __init__(self, name: str, base: torch.Tensor, layout: Layout, left: torch.Tensor, right: torch.Tensor) -> None:
        super().__init__(name, base, layout)
        self.left = left
        self.right = right

    def cast(self, dtype: torch.dtype) -> MatrixStandIn:
        """See `StandIn.cast`."""
        if dtype == self.base.dtype:
            return self
        return self._like(self.base.to(dtype), self.left.to(dtype), self.right.to(dtype))

    def t(self) -> MatrixStandIn:
        """Return the transpose."""
        return self._like(self.base.t(), self.right, self.left)

    T = property(t)
    mT = property(t)  # noqa: N815 (torch's name)

    def transpose(self, first: int, second: int) -> MatrixStandIn:
        """Return the transpose, or the matrix itself if both arguments name the same dimension."""
        return self.t() if first % 2 != second % 2 else self

    def _like(self, base: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> MatrixStandIn:
        self.used = True
        return MatrixStandIn(self.name, base, self.layout_of_rows, left, right)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return ``x W^T + bias`` with every row's own W: x (R, ..., d1) -> (R, ..., d0)."""
        self.used = True
        layout = self.layout_of_rows
        groups = layout.groups
        if x.dim() < 2 or x.shape[0] % (groups * layout.width):
            raise Uncovered(self.name, f"a product with {tuple(x.shape)} for {layout.rows} rows")
        if small_linear.takes(x, self.base):
            return small_linear.linear_of_members(x, self.base, self.left, self.right, bias)
        product = F.linear(x, self.base, bias)
        grouped = x.reshape(groups, -1, x.shape[-1])  # (V, K * T, d1)
        if self.right.shape[1] == 1:  # several times faster than a matrix product with a dimension of 1
            inner = (grouped * self.right).sum(-1, keepdim=True)  # (V, K * T, 1)
        else:
            inner = torch.bmm(grouped, self.right.transpose(1, 2))  # (V, K * T, r)
        self._add(inner, self.left, product.view(groups, -1, product.shape[-1]))
        return product

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows of every row's own matrix: ids (R, T), or (1, T) for all rows -> (R, T, d1)."""
        self.used = True
        layout = self.layout_of_rows
        if ids.dim() != 2 or ids.shape[0] not in (1, layout.rows):
            raise Uncovered(self.name, f"a lookup of {tuple(ids.shape)} for {layout.rows} rows")
        ids = ids.expand(layout.rows, -1)
        embedded = F.embedding(ids, self.base)  # (R, T, d1)
        index = ids.reshape(layout.groups, 1, -1).expand(-1, self.left.shape[1], -1)  # (V, r, K * T)
        inner = self.left.gather(2, index).transpose(1, 2)  # (V, K * T, r)
        self._add(inner, self.right, embedded.view(layout.groups, -1, embedded.shape[-1]))
        return embedded

    @staticmethod
    def _add(inner: torch.Tensor, outer: torch.Tensor, to: torch.Tensor) -> None:
        """Add ``inner`` (V, n, r) times ``outer`` (V, r, d) to ``to`` (V, n, d), in place."""
        if outer.shape[1] == 1:
            to.addcmul_(inner, outer)
        else:
            to.baddbmm_(inner, outer)


class VectorStandIn(StandIn):
    """A parameter with full noise: ``values`` (V, *shape) holds every group's values."""

    def __init__(self, name: str, base: torch.Tensor, layout: Layout, values: torch.Tensor) -> None:
        super().__init__(name, base, layout)
        self.values = values
        self._rows: torch.Tensor | None = None

    def cast(self, dtype: torch.dtype) -> VectorStandIn:
        """See `StandIn.cast`."""
        return self if dtype == self.base.dtype else self.map(lambda values: values.to(dtype))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> VectorStandIn:
        """Return the stand-in of an elementwise function of the parameter."""
        self.used = True
        return VectorStandIn(self.name, function(self.base), self.layout_of_rows, function(self.values))

    def beside(self, x: torch.Tensor) -> torch.Tensor:
        """Return every row's values in a shape that broadcasts against ``x`` (R, ..., *shape)."""
        self.used = True
        shape = self.base.shape
        if self._rows is None:
            self._rows = self.values.repeat_interleave(self.layout_of_rows.width, 0)  # (R, *shape)
        rows = self._rows
        if x.dim() <= len(shape) or x.shape[0] % len(rows):
            raise Uncovered(self.name, f"a sum or product with {tuple(x.shape)} for {len(rows)} rows")
        if x.shape[0] != len(rows):  # (R * T, ...)
            rows = rows.repeat_interleave(x.shape[0] // len(rows), 0)
        return rows.view(x.shape[0], *[1] * (x.dim() - 1 - len(shape)), *shape)

    def relaid(self) -> None:
        """Drop the cached rows, because the layout has changed."""
        self._rows = None

    def __mul__(self, other: Any) -> Any:
        return _elementwise(self, other, operator.mul)

    def __rmul__(self, other: Any) -> Any:
        return _elementwise(other, self, operator.mul)

    def __add__(self, other: Any) -> Any:
        return _elementwise(self, other, operator.add)

    def __radd__(self, other: Any) -> Any:
        return _elementwise(other, self, operator.add)

    def __sub__(self, other: Any) -> Any:
        return _elementwise(self, other, operator.sub)

    def __rsub__(self, other: Any) -> Any:
        return _elementwise(other, self, operator.sub)

    def __neg__(self) -> Any:
        return self.map(operator.neg)


def _refusal(operator_name: str) -> Callable[..., Any]:
    def refuse(self: StandIn, *_: Any) -> Any:
        raise Uncovered(self.name, operator_name)

    return refuse


# Python looks up operators on the class and skips `__getattr__`, so operators without a rule need a method that raises.
for _name in (
    "getitem mul rmul add radd sub rsub neg matmul rmatmul truediv rtruediv pow rpow len iter bool float array".split()
):
    if not hasattr(StandIn, f"__{_name}__"):
        setattr(StandIn, f"__{_name}__", _refusal(_name))


def _elementwise(a: Any, b: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Return ``function(a, b)`` of vector stand-ins, numbers, and activations of any shape (R, ..., d)."""
    for operand in (a, b):
        if isinstance(operand, MatrixStandIn):
            raise Uncovered(operand.name, function.__name__)
    if isinstance(a, VectorStandIn) and isinstance(b, VectorStandIn):
        if a.base.shape != b.base.shape:
            raise Uncovered(a.name, f"{function.__name__} with {b.name}")
        b.used = True
        values = b.values
        base = b.base
        a.used = True
        return VectorStandIn(a.name, function(a.base, base), a.layout_of_rows, function(a.values, values))
    if isinstance(a, VectorStandIn):
        return function(a.beside(b), b) if _is_activation(b) else a.map(lambda values: function(values, b))
    return function(a, b.beside(a)) if _is_activation(a) else b.map(lambda values: function(a, values))


def _is_activation(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _plain(value: Any, *names: Any) -> None:
    """Raise `Uncovered` for a stand-in that a rule does not expect."""
    if isinstance(value, StandIn):
        raise Uncovered(value.name, *names)


def _linear(x: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
    _plain(x, "linear")
    is_perturbed_bias = isinstance(bias, StandIn)
    if isinstance(weight, MatrixStandIn):
        product = weight.multiply(x, None if is_perturbed_bias else bias)
    else:
        _plain(weight, "linear")
        product = small_linear.linear(x, weight, None if is_perturbed_bias else bias)
    return product.add_(_vector(bias, "linear").beside(product)) if is_perturbed_bias else product


def _vector(value: Any, what: str) -> VectorStandIn:
    if not isinstance(value, VectorStandIn):
        raise Uncovered(value.name, what)
    return value


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    _plain(x, "addmm")
    if (beta, alpha) != (1, 1):
        stand_in = bias if isinstance(bias, StandIn) else weight
        raise Uncovered(stand_in.name, "addmm with factors")
    return _linear(x, weight.t(), bias)


def _matmul(x: Any, weight: Any) -> torch.Tensor:
    _plain(x, "matmul")
    return _linear(x, weight.t())


def _embedding(
    ids: torch.Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    if not isinstance(weight, MatrixStandIn) or max_norm is not None:
        raise Uncovered(weight.name, "embedding")
    return weight.look_up(ids)


def _layer_norm(
    x: torch.Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> torch.Tensor:
    normed = F.layer_norm(x, list(shape), None, None, eps)
    if weight is not None:
        normed = normed * weight
    return normed if bias is None else normed + bias


def _rms_norm(x: torch.Tensor, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> torch.Tensor:
    normed = F.rms_norm(x, list(shape), None, eps)
    return normed if weight is None else normed * weight


def _rule(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda a, b: _elementwise(a, b, function)


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda a, b: _elementwise(b, a, function)


RULES: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "mul": _rule(operator.mul),
    "__mul__": _rule(operator.mul),
    "__rmul__": _reflected(operator.mul),
    "add": _rule(operator.add),
    "__add__": _rule(operator.add),
    "__radd__": _reflected(operator.add),
    "sub": _rule(operator.sub),
    "__sub__": _rule(operator.sub),
    "__rsub__": _reflected(operator.sub),
}
