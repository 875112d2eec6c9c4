"""Linear layers of a few rows at memory speed: y = x W^T read straight from W, once, with whatever threads torch has.

While a model answers token by token its linear layers have as many rows as the batch. Matrix libraries are made for
many more: for 2 rows MKL reads the weights at a fifth of the memory's speed, because it packs W before it multiplies.
Here W is read row by row in plain dot products with up to four rows of x, while the next rows are fetched; further rows
of x meet what is in the cache by then. The order of every sum is fixed by the shapes, so results depend on neither
threads nor load.

The rows may belong to members with low-rank noise (see `lowrank.stand_ins`): their part is added to each piece
of y while that is in the cache.

Threads: the kernel runs in the OpenMP pool that torch itself uses (`GOMP_parallel` of the libgomp that comes with
torch). A second pool would fight with torch's for the cores. Where that library is not found the kernel is used with
one thread only, and `torch.nn.functional.linear` otherwise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

MAX_ROWS = 64  # of x; from here on packing W pays, and the library is as fast
MIN_WIDTH = 512  # K; below, adding up what the vector lanes hold costs as much as the products
MIN_WEIGHTS = 1 << 16  # elements of W; below, the call costs more than the product
_BLOCK = 16  # rows of W that stay in the first-level cache while all rows of x pass; a multiple of 4
_AHEAD = 4  # rows of W between the one that is read and the one that is fetched
_CHUNK = 128  # outputs after which members' noise is added, while they are in the second-level cache
_PIECES = 4  # pieces per thread, taken in turn: a thread that is held up does not hold up the others for long


@intrinsic
def _fetch_add(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    """Atomically add ``value`` to ``array[index]`` and return what was there."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "monotonic")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def _floats(typingctx, address):  # type: ignore[no-untyped-def]
    """Turn an address into a pointer to float32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), codegen  # type: ignore[no-untyped-call]


@intrinsic
def _prefetch(typingctx, address):  # type: ignore[no-untyped-def]
    """Fetch the cache line at ``address`` into the second-level cache; no address is a wrong one."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        line, number = ir.PointerType(ir.IntType(8)), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [line, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [line], kind)
        builder.call(function, [builder.inttoptr(args[0], line), number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# Sums may be reordered for the vector lanes, but NaN and infinities come through: trials at load rest on NaN.
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
    # The first pass takes these rows of W from memory: one after another, as the hardware likes to read.
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
    # The others find them in the cache, and what counts is how often a number is used once it is in a register.
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
    """Fetch what `_add_noise` reads of left (V, r, N) for a block of outputs; ``columns`` is V * r."""
    for column in range(columns):
        _prefetch(address + 4 * (column * n + start))  # type: ignore[call-arg]


@njit(**_options)
def _inner_products(x, right, inner):  # type: ignore[no-untyped-def]
    """Compute every row's products with its group's columns of B: x (R, K), right (V, r, K), inner (R, r)."""
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
    """Add every row's own noise to its outputs ``start`` to ``end``: y (R, N), left (V, r, N), inner (R, r)."""
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
    """Do pieces of a job until none is left.

    The job's fields: addresses of W (N, K), x (R, K) and y (R, N); N, K, R; outputs in a piece; the next output; then,
    for members, r (else 0), V, the addresses of right (V, r, K), left (V, r, N) and scratch (threads, R, r), and the
    next thread.
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
    ready = False  # inner
    while True:
        first = _fetch_add(fields, 7, size)
        if first >= n:
            return
        last = min(first + size, n)
        for top in range(first, last, _CHUNK):
            bottom = min(top + _CHUNK, last)
            fetched = fields[10]
            share = (4 * columns * k * _BLOCK // (bottom - top) + 63) // 64 * 64  # of right, for each block
            for start in range(top, bottom, _BLOCK):
                if rank:  # the factors come from memory while the processor multiplies
                    _fetch_left(fields[11], n, columns, start)
                    if not ready:
                        for line in range(fetched, fetched + share, 64):
                            _prefetch(line)
                        fetched += share
                _outputs(w, x, y, start, min(start + _BLOCK, bottom), fields[0])
            if rank:
                if not ready:  # by every thread for itself: cheaper than waiting for each other
                    _inner_products(x, right, inner)
                    ready = True
                _add_noise(y, left, inner, top, bottom)


_Job = ctypes.c_int64 * 14


@cache
def _kernel() -> tuple[int, Callable[[int], None]]:
    """Compile `_work` (once per machine: the result is kept on disk); return its address, and it as a function."""
    signature = types.void(types.CPointer(types.int64))  # type: ignore[no-untyped-call]
    address: Any = cfunc(signature, cache=True, nogil=True)(_work).address
    return address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@cache
def _find_pool() -> Callable[[int, int, int, int], None] | None:
    """Return ``GOMP_parallel(function, data, threads, flags)`` of torch's own OpenMP library, or None."""
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not library.exists():
        return None
    parallel = ctypes.CDLL(str(library)).GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Say whether the kernel computes ``x weight^T``: a function of shapes, types and the number of threads alone."""
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
    """Return ``x weight^T + bias``: x (..., K), weight (N, K), bias (N,); as `torch.nn.functional.linear` to rounding.

    The kernel takes dense float32 on the CPU, 1 to 64 rows, without gradients; all else goes to torch.
    """
    if not takes(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    y = _multiply(x, weight)
    return y if bias is None else y.add_(bias)


def linear_of_members(
    x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x (weight + left^T right)^T + bias``, every group of rows with its own factors; for what `takes` allows.

    Args:
        x: (R, ..., K), V groups of equal size in order.
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
    address, alone = _kernel()
    pool = _find_pool()
    if threads == 1 or pool is None:
        alone(ctypes.addressof(fields))
    else:
        pool(address, ctypes.addressof(fields), threads, 0)
    return y


class SmallLinear(torch.nn.Linear):
    """A linear layer that takes few rows quickly; made of a `torch.nn.Linear` by `install`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `linear`; a stand-in in the weight's place is asked at once, without torch's detour."""
        weight: Any = self.weight
        if isinstance(weight, torch.Tensor) and (self.bias is None or isinstance(self.bias, torch.Tensor)):
            return linear(input, weight, self.bias)
        if isinstance(weight, torch.Tensor):  # a trained bias beside a frozen weight
            return torch.nn.functional.linear(input, weight, self.bias)
        found: torch.Tensor = weight.linear(input, self.bias)
        return found


def install(model: torch.nn.Module) -> None:
    """Let every plain linear layer of ``model`` take few rows quickly; parameters and names stay as they are."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = SmallLinear
