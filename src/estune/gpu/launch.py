"""The noise at memory speed on GPUs: launches of `triton_kernels` with the meaning of `cpu`'s functions.

`gpu_check.check` compares a device with the CPU kernels before anything relies on it. Tensors are flat float32
(outputs: float32, bfloat16 or float16), contiguous, on one device, and lie within one key block. Nothing here
waits for the device: sums come back as tensors on it. Under ``TRITON_INTERPRET=1``, set before Triton is imported, the
same functions take tensors on the CPU.
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
# No contraction: a fused multiply-add rounds once where the decay is defined to round twice.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sums:
    """What an update kernel returns, as 0-d tensors on the device: checksum (int64, modulo 2^64) and squares."""

    checksum: torch.Tensor
    moved: torch.Tensor  # float64, sum of squares of the change
    size: torch.Tensor  # float64, sum of squares of theta afterwards


@dataclass(frozen=True, slots=True)
class Rows:
    """Part of a stack of matrices (E, d0, d1): ``rows`` rows from ``row0`` on of ``matrices`` matrices.

    Either whole matrices (row0 = 0, rows = d0) or rows of one matrix, so that the part is contiguous.
    """

    d0: int
    d1: int
    matrix0: int
    matrices: int
    row0: int
    rows: int

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
        """Programs: tiles of rows, tiles of columns, matrices."""
        return -(-self.rows // TILE[0]), -(-self.d1 // TILE[1]), self.matrices


def perturb_into(out: torch.Tensor, theta: torch.Tensor, start: int, key: Key, scale: float, rademacher: bool) -> None:
    """Write ``theta + scale * n``, cast once, to ``out``; ``scale`` carries the sign. See `cpu.perturb_into`."""
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

    ``keys`` is uint32 (M, 2), ``q`` int32 (M,) with signs multiplied in, both on the device; ``decay`` is a float32
    value, towards ``anchor`` (like theta) or towards 0.
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
    """Return the checksum's sum over theta: a 0-d int64 tensor, modulo 2^64; see `cpu.checksum_of`."""
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

    ``keys`` are the two words of A's key, then B's; theta and out hold the elements of ``rows``.
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
    """Return uint32 words on a device; they travel as int32, which every copy supports."""
    return torch.from_numpy(np.ascontiguousarray(keys).view(np.int32)).to(device).view(torch.uint32)


def _parts(theta: torch.Tensor, programs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return room for every program's checksum and squares."""
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
    """Return the anchor, or any pointer where the kernel will not follow it."""
    return theta if anchor is None else anchor


def _on(tensor: torch.Tensor) -> Any:
    """Return the context that makes a tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
