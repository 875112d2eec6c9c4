"""Linear layers for few rows at memory speed: y = x W^T reads W once, on torch's threads.

During decoding a linear layer has as many rows as the batch. Matrix libraries are optimised for many more rows. For 2
rows MKL reads the weights at a fifth of the memory's speed, because it packs W before it multiplies. This kernel reads
W row by row, computes dot products with up to four rows of x, and prefetches the next rows of W. Further rows of x use
the rows of W in the cache. The shapes fix the order of every sum, so results depend neither on threads nor on load.

The rows may belong to members with low-rank noise (see `lowrank.stand_ins`). The noise's part is added to each piece of
y while the piece is in the cache.

The kernel runs in torch's own OpenMP pool (`GOMP_parallel` of the libgomp in torch's package), because a second pool
would compete for the cores. Without this library the kernel is used for one thread only; with more threads
`torch.nn.functional.linear` is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

MAX_ROWS = 64  # rows of x; with more rows the library is as fast, because packing W pays
MIN_WIDTH = 512  # columns of W (K); with fewer columns summing the vector lanes costs as much as the products
MIN_WEIGHTS = 1 << 16  # elements of W; with fewer elements the call costs more than the product
_BLOCK = 16  # rows of W that stay in the first-level cache for all rows of x; a multiple of 4
_AHEAD = 4  # rows of W between the row in use and the row that is prefetched
_CHUNK = 128  # outputs; then members' noise is added, while the outputs are in the second-level cache
_PIECES = 4  # pieces of work per thread; threads take the next piece when free, so a delayed thread matters little


@intrinsic
def _fetch_add(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    """Add ``value`` to ``array[index]`` atomically; return the old value."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "monotonic")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def _floats(typingctx, address):  # type: ignore[no-untyped-def]
    """Return an address as a pointer to float32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), codegen  # type: ignore[no-untyped-call]


@intrinsic
def _prefetch(typingctx, address):  # type: ignore[no-untyped-def]
    """Prefetch the cache line at ``address`` into the second-level cache; invalid addresses are ignored."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        line, number = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [line], kind)
        builder.call(function, [builder.inttoptr(args[0], line), number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# Sums may be reordered for the vector lanes. NaN and infinities must stay, because the trials when a model is loaded
# use NaN.
_options: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "nogil": True,
    "boundscheck": False,
    "cache": True,
}


@njit(**_options)
def _dots_1_1(w, x, y, o, r):  # type: ignore[no-untyped-def]
    w0, x0 = w[o], x[r]
    a0 = np.float32(0)
    for k in range(w.shape[1]):
        a0 += w0[k] * x0[k]
    y[r, o] = a0


@njit(**_options)
def _dots_1_2(w, x, y, o, r):  # type: ignore[no-untyped-def]
    w0, x0, x1 = w[o], x[r], x[r + 1]
    a0 = a1 = np.float32(0)
    for k in range(w.shape[1]):
        a0 += w0[k] * x0[k]
        a1 += w0[k] * x1[k]
    y[r, o], y[r + 1, o] = a0, a1


@njit(**_options)
def _dots_1_4(w, x, y, o, r):  # type: ignore[no-untyped-def]
    w0, x0, x1, x2, x3 = w[o], x[r], x[r + 1], x[r + 2], x[r + 3]
    a0 = a1 = a2 = a3 = np.float32(0)
    for k in range(w.shape[1]):
        a0 += w0[k] * x0[k]
        a1 += w0[k] * x1[k]
        a2 += w0[k] * x2[k]
        a3 += w0[k] * x3[k]
    y[r, o], y[r + 1, o], y[r + 2, o], y[r + 3, o] = a0, a1, a2, a3


@njit(**_options)
def _dots_4_4(w, x, y, o, r):  # type: ignore[no-untyped-def]
    w0, w1, w2, w3 = w[o], w[o + 1], w[o + 2], w[o + 3]
    x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
    a0 = b0 = c0 = d0 = a1 = b1 = c1 = d1 = a2 = b2 = c2 = d2 = a3 = b3 = c3 = d3 = np.float32(0)
    for k in range(w.shape[1]):
        a0 += w0[k] * x0[k]
        b0 += w1[k] * x0[k]
        c0 += w2[k] * x0[k]
        d0 += w3[k] * x0[k]
        a1 += w0[k] * x1[k]
        b1 += w1[k] * x1[k]
        c1 += w2[k] * x1[k]
        d1 += w3[k] * x1[k]
        a2 += w0[k] * x2[k]
        b2 += w1[k] * x2[k]
        c2 += w2[k] * x2[k]
        d2 += w3[k] * x2[k]
        a3 += w0[k] * x3[k]
        b3 += w1[k] * x3[k]
        c3 += w2[k] * x3[k]
        d3 += w3[k] * x3[k]
    y[r, o], y[r, o + 1], y[r, o + 2], y[r, o + 3] = a0, b0, c0, d0
    y[r + 1, o], y[r + 1, o + 1], y[r + 1, o + 2], y[r + 1, o + 3] = a1, b1, c1, d1
    y[r + 2, o], y[r + 2, o + 1], y[r + 2, o + 2], y[r + 2, o + 3] = a2, b2, c2, d2
    y[r + 3, o], y[r + 3, o + 1], y[r + 3, o + 2], y[r + 3, o + 3] = a3, b3, c3, d3


@njit(**_options)
def _outputs(w, x, y, start, end, address):  # type: ignore[no-untyped-def]
    """Compute the outputs ``start`` to ``end`` of all rows of x."""
    rows, width = x.shape
    row_bytes = 4 * width
    # The first pass reads these rows of W from memory, one after another, which is the fastest order.
    for o in range(start, end):
        ahead = address + (o + _AHEAD) * row_bytes
        for line in range(ahead, ahead + row_bytes, 64):
            _prefetch(line)  # type: ignore[call-arg]
        if rows >= 4:
            _dots_1_4(w, x, y, o, 0)
        elif rows >= 2:
            _dots_1_2(w, x, y, o, 0)
        else:
            _dots_1_1(w, x, y, o, 0)
    # The other passes read the rows of W from the cache. Their speed depends on how often a loaded number is used.
    done = 4 if rows >= 4 else 2 if rows >= 2 else 1
    fours = start + (end - start) // 4 * 4
    while done + 4 <= rows:
        for o in range(start, fours, 4):
            _dots_4_4(w, x, y, o, done)
        for o in range(fours, end):
            _dots_1_4(w, x, y, o, done)
        done += 4
    if done + 2 <= rows:
        for o in range(start, end):
            _dots_1_2(w, x, y, o, done)
        done += 2
    if done < rows:
        for o in range(start, end):
            _dots_1_1(w, x, y, o, done)


@njit(**_options)
def _fetch_left(address, n, columns, start):  # type: ignore[no-untyped-def]
    """Prefetch the elements of left (V, r, N) that `_add_noise` reads for a block of outputs; ``columns`` is V * r."""
    for column in range(columns):
        _prefetch(address + 4 * (column * n + start))  # type: ignore[call-arg]


@njit(**_options)
def _inner_products(x, right, inner):  # type: ignore[no-untyped-def]
    """Write every row's products with its group's factor to ``inner``: x (R, K), right (V, r, K), inner (R, r)."""
    width = x.shape[0] // right.shape[0]
    for group in range(right.shape[0]):
        for j in range(right.shape[1]):
            column = right[group, j]
            for row in range(group * width, (group + 1) * width):
                xs = x[row]
                total = np.float32(0)
                for k in range(x.shape[1]):
                    total += xs[k] * column[k]
                inner[row, j] = total


@njit(**_options)
def _add_noise(y, left, inner, start, end):  # type: ignore[no-untyped-def]
    """Add every row's noise to its outputs ``start`` to ``end``: y (R, N), left (V, r, N), inner (R, r)."""
    width = y.shape[0] // left.shape[0]
    for group in range(left.shape[0]):
        for row in range(group * width, (group + 1) * width):
            ys = y[row, start:end]
            for j in range(left.shape[1]):
                column = left[group, j, start:end]
                factor = inner[row, j]
                for o in range(end - start):
                    ys[o] += factor * column[o]


def _work(job):  # type: ignore[no-untyped-def]
    """Work on pieces of a job until none is left.

    The job's fields are: the addresses of W (N, K), x (R, K) and y (R, N); N; K; R; outputs of a piece; the next
    output; r, or 0 without members; V; the addresses of right (V, r, K), left (V, r, N) and scratch memory (threads, R,
    r); the index of the next thread.
    """
    fields = carray(job, (14,))
    n, k, rows, size, rank, groups = fields[3], fields[4], fields[5], fields[6], fields[8], fields[9]
    w = carray(_floats(fields[0]), (n, k))  # type: ignore[call-arg]
    x = carray(_floats(fields[1]), (rows, k))
    y = carray(_floats(fields[2]), (rows, n))
    right = carray(_floats(fields[10]), (groups, rank, k))
    left = carray(_floats(fields[11]), (groups, rank, n))
    thread = _fetch_add(fields, 13, 1)
    inner = carray(_floats(fields[12] + 4 * thread * rows * rank), (rows, rank))
    columns = groups * rank
    ready = False  # whether inner is computed
    while True:
        first = _fetch_add(fields, 7, size)
        if first >= n:
            return
        last = min(first + size, n)
        for top in range(first, last, _CHUNK):
            bottom = min(top + _CHUNK, last)
            fetched = fields[10]
            share = (4 * columns * k * _BLOCK // (bottom - top) + 63) // 64 * 64  # bytes of right to prefetch per block
            for start in range(top, bottom, _BLOCK):
                if rank:  # prefetch the factors while the processor multiplies
                    _fetch_left(fields[11], n, columns, start)
                    if not ready:
                        for line in range(fetched, fetched + share, 64):
                            _prefetch(line)
                        fetched += share
                _outputs(w, x, y, start, min(start + _BLOCK, bottom), fields[0])
            if rank:
                if not ready:  # every thread computes its own copy, which is cheaper than waiting for another thread
                    _inner_products(x, right, inner)
                    ready = True
                _add_noise(y, left, inner, top, bottom)


_Job = ctypes.c_int64 * 14


@cache
def kernel_address() -> tuple[int, Callable[[int], None]]:
    """Compile `_work`, cached on disk; return its address, and a Python function that calls it."""
    signature = types.void(types.CPointer(types.int64))  # type: ignore[no-untyped-call]
    address: Any = cfunc(signature, cache=True, nogil=True)(_work).address
    return address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@cache
def _find_pool() -> Callable[[int, int, int, int], None] | None:
    """Return ``GOMP_parallel(function, data, threads, flags)`` of torch's OpenMP library; None if there is none."""
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not library.exists():
        return None
    parallel = ctypes.CDLL(str(library)).GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the kernel computes ``x weight^T``; this depends on shapes, types and the number of threads."""
    width = x.shape[-1]
    return (
        width >= MIN_WIDTH
        and 0 < x.numel() // width <= MAX_ROWS
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.dim() == 2
        and weight.shape[1] == width
        and weight.numel() >= MIN_WEIGHTS
        and x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and not (x.requires_grad or torch.is_grad_enabled())
        and (torch.get_num_threads() == 1 or _find_pool() is not None)
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x weight^T + bias``: x (..., K), weight (N, K), bias (N,); equal to torch's ``linear`` to rounding.

    The kernel computes dense float32 on the CPU with 1 to 64 rows and without gradients. Other calls go to torch.
    """
    if not takes(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    y = _multiply(x, weight)
    return y if bias is None else y.add_(bias)


def linear_of_members(
    x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x (weight + left^T right)^T + bias``, where every group of rows has its own factors.

    The caller has checked `takes`.

    Args:
        x: (R, ..., K), V groups of equal size, in order.
        weight: (N, K).
        left: (V, r, N).
        right: (V, r, K).
        bias: (N,).
    """
    y = _multiply(x, weight, left.contiguous(), right.contiguous())
    return y if bias is None else y.add_(bias)


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor | None = None, right: torch.Tensor | None = None
) -> torch.Tensor:
    x = x.contiguous()
    n, width = weight.shape
    rows = x.numel() // width
    threads = torch.get_num_threads()
    y = x.new_empty((*x.shape[:-1], n))
    size = max(_BLOCK, n // (_PIECES * threads) // _BLOCK * _BLOCK)
    job = [weight.data_ptr(), x.data_ptr(), y.data_ptr(), n, width, rows, size, 0]
    if left is not None and right is not None:
        groups, rank = left.shape[:2]
        scratch = x.new_empty(threads * rows * rank)
        job += [rank, groups, right.data_ptr(), left.data_ptr(), scratch.data_ptr()]
    fields = _Job(*job)
    address, alone = kernel_address()
    pool = _find_pool()
    if threads == 1 or pool is None:
        alone(ctypes.addressof(fields))
    else:
        pool(address, ctypes.addressof(fields), threads, 0)
    return y


def _forward(layer: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """See `linear`; a stand-in for the weight is called directly, without torch's dispatch."""
    weight: Any = layer.weight
    if isinstance(weight, torch.Tensor) and (layer.bias is None or isinstance(layer.bias, torch.Tensor)):
        return linear(input, weight, layer.bias)
    if isinstance(weight, torch.Tensor):  # a trained bias beside a frozen weight
        return torch.nn.functional.linear(input, weight, layer.bias)
    output: torch.Tensor = weight.linear(input, layer.bias)
    return output


def plain_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that `installed` can change: of class `torch.nn.Linear`, without a forward of their own."""
    return [each for each in model.modules() if type(each) is torch.nn.Linear and "forward" not in vars(each)]


@contextmanager
def installed(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let `plain_layers` compute by `linear` within the block; classes, parameters and names do not change."""
    try:
        for layer in layers:  # Python looks up a method among the instance's attributes before the class's
            vars(layer)["forward"] = MethodType(_forward, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
