"""Launches of the Triton kernels (`estune.gpu.kernels`); each function mirrors one of `estune.es.noise.cpu`.

Tensors are flat, contiguous, on one device, and within one key block. They are float32; outputs may also be bfloat16 or
float16. The functions do not wait for the device, and return sums as tensors on the device. With
``TRITON_INTERPRET=1``, set before Triton is imported, they take tensors on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from estune.gpu import kernels as kernels

BLOCK = 1024  # elements per program
TILE = (32, 64)  # rows and columns per program of the low-rank kernels
# No fused multiply-add: it rounds once where the definition of the decay rounds twice.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sums:
    """The sums of an update, as 0-d tensors on the device."""

    checksum: torch.Tensor  # int64, checksum sum of the new theta, modulo 2^64
    change_squares: torch.Tensor  # float64, sum of squares of the change
    theta_squares: torch.Tensor  # float64, sum of squares of the new theta


@dataclass(frozen=True, slots=True)
class Rows:
    """A contiguous part of a stack of matrices (E, d0, d1): whole matrices, or rows of one matrix."""

    d0: int
    d1: int
    matrix0: int  # first matrix
    matrices: int  # number of matrices
    row0: int  # first row; 0 for several matrices
    rows: int  # number of rows of each matrix; d0 for several matrices

    @property
    def start(self) -> int:
        """Flat index of the part's first element in the full tensor."""
        return (self.matrix0 * self.d0 + self.row0) * self.d1

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.matrices * self.rows * self.d1

    @property
    def grid(self) -> tuple[int, int, int]:
        """Numbers of programs: tiles of rows, tiles of columns, matrices."""
        return -(-self.rows // TILE[0]), -(-self.d1 // TILE[1]), self.matrices


def perturb_into(out: torch.Tensor, theta: torch.Tensor, start: int, key: Key, scale: float, rademacher: bool) -> None:
    """Write ``theta + scale * n``, cast once, to ``out``; ``scale`` includes the sign. See `cpu.perturb_into`."""
    if theta.numel():
        with _on(theta):
            kernels.perturb_kernel[(-(-theta.numel() // BLOCK),)](
                out, theta, theta.numel(), start, *key, scale, RADEMACHER=rademacher, BLOCK=BLOCK, **OPTIONS
            )


def update_into(
    theta: torch.Tensor,
    start: int,
    keys: torch.Tensor,
    q: torch.Tensor,
    a: float,
    rademacher: bool,
    decay: float,
    anchor: torch.Tensor | None,
) -> Sums:
    """Move theta in place by one step; see `cpu.update_into`.

    ``keys`` is uint32 (M, 2) and ``q`` is int32 (M,), times the members' signs; both are on the device. ``decay`` is a
    float32 value. Theta decays towards ``anchor`` (of theta's shape and dtype), or towards 0 if it is None.
    """
    programs = -(-theta.numel() // BLOCK)
    parts = _parts(theta, programs)
    if programs:
        with _on(theta):
            kernels.update_kernel[(programs,)](
                theta, _pointer(anchor, theta), keys, q, *parts, theta.numel(), start, q.numel(), a, decay,
                RADEMACHER=rademacher, DECAY=_decay_kind(decay, anchor), BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return Sums(*(part.sum() for part in parts))


def checksum_of(theta: torch.Tensor, start: int) -> torch.Tensor:
    """Return the checksum sum of theta: a 0-d int64 tensor, modulo 2^64; see `cpu.checksum_of`."""
    programs = -(-theta.numel() // BLOCK)
    sums = torch.empty(programs, dtype=torch.int64, device=theta.device)  # (programs,)
    if programs:
        with _on(theta):
            kernels.checksum_kernel[(programs,)](theta, sums, theta.numel(), start, BLOCK=BLOCK, **OPTIONS)
    return sums.sum()


def perturb_lowrank_into(
    out: torch.Tensor,
    theta: torch.Tensor,
    rows: Rows,
    rank: int,
    keys: Sequence[int],
    sign: int,
    scale: float,
    rademacher: bool,
) -> None:
    """Write ``float32(theta + scale * (sign * (A B^T)))``, cast once, to ``out``; product and sum are float64.

    ``keys`` holds the two words of A's key, then of B's. ``theta`` and ``out`` hold the elements of ``rows``.
    """
    if rows.count:
        with _on(theta):
            kernels.perturb_lowrank_kernel[rows.grid](
                out, theta, rows.d0, rows.d1, rows.matrix0, rows.row0, rows.rows, rank, *keys, sign, scale,
                RADEMACHER=rademacher, TILE_0=TILE[0], TILE_1=TILE[1], **OPTIONS,
            )  # fmt: skip


def update_lowrank_into(
    theta: torch.Tensor,
    rows: Rows,
    rank: int,
    keys: torch.Tensor,
    q: torch.Tensor,
    a: float,
    rademacher: bool,
    decay: float,
    anchor: torch.Tensor | None,
) -> Sums:
    """Move the elements of ``rows`` by one step of low-rank members; ``keys`` is uint32 (M, 4), see `update_into`."""
    parts = _parts(theta, math.prod(rows.grid))
    if rows.count:
        with _on(theta):
            kernels.update_lowrank_kernel[rows.grid](
                theta, _pointer(anchor, theta), keys, q, *parts, rows.d0, rows.d1, rows.matrix0, rows.row0, rows.rows,
                rank, q.numel(), a, decay,
                RADEMACHER=rademacher, DECAY=_decay_kind(decay, anchor), TILE_0=TILE[0], TILE_1=TILE[1], **OPTIONS,
            )  # fmt: skip
    return Sums(*(part.sum() for part in parts))


def words(keys: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return uint32 words on a device; the copy uses int32, which every device supports."""
    return torch.from_numpy(np.ascontiguousarray(keys).view(np.int32)).to(device).view(torch.uint32)


def _parts(theta: torch.Tensor, programs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return uninitialised tensors for every program's checksum sum (int64) and two sums of squares (float64)."""
    if not theta.numel():
        programs = 0
    return (
        torch.empty(programs, dtype=torch.int64, device=theta.device),
        torch.empty(programs, dtype=torch.float64, device=theta.device),
        torch.empty(programs, dtype=torch.float64, device=theta.device),
    )


def _decay_kind(decay: float, anchor: torch.Tensor | None) -> int:
    return 0 if decay == 0.0 else 1 if anchor is None else 2


def _pointer(anchor: torch.Tensor | None, theta: torch.Tensor) -> torch.Tensor:
    """Return the anchor; without an anchor return theta, because the kernel needs a pointer but does not read it."""
    return theta if anchor is None else anchor


def _on(tensor: torch.Tensor) -> Any:
    """Return the context that makes a tensor's GPU the current device, on which Triton launches kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
