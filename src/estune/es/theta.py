"""theta, the float32 master: every member's weights are built from it, and only an update writes it.

The arrays are plain NumPy in the layout in which ``save_pretrained`` writes them, so the same code serves a language
model, the toy engine and a replay that loads no model at all. Tensors are cut into pieces of `PIECE` elements that a
few threads work through; results do not depend on how many (the update is exact in integers, section 2 of DESIGN).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol

import numpy as np

from estune.es.noise import block_name, cpu, cpu_lowrank, factor_names, factor_shapes, noise_keys
from estune.es.noise.reference import BLOCK_SIZE
from estune.es.types import ParameterSpec, Perturbation
from estune.es.update import Update

if TYPE_CHECKING:
    import torch  # nothing here needs it, but for tensors that a caller has

STREAMED_BYTES = 128 << 20  # of weights; from here on they are written past the caches
PIECE = 1 << 18  # elements per unit of work: 1 MiB of float32
LEAST_ROWS = 64  # of a matrix of low-rank noise: B is drawn again for every piece
MASK_64 = (1 << 64) - 1
_NO_ANCHOR = np.empty(0, dtype=np.float32)

AnchorReader = Callable[[str, int, int], np.ndarray]  # (name, start, count) -> float32 (count,) of theta_0
Part = tuple[str, int, float, float]  # of an update: name, checksum, sum of squares of the change, and of theta
Job = Callable[[], Part]


@dataclass(frozen=True, slots=True)
class Moved:
    """What an update did to theta, or to the part of theta that one shard or worker holds; parts add up with ``+``.

    ``sums`` holds the checksum's sum of every parameter afterwards, modulo 2^64. ``moved`` and ``size`` hold squares of
    the change and of theta over the perturbed parameters, one pair for each piece of theta; their order has no meaning.
    """

    specs: tuple[ParameterSpec, ...]
    sums: Mapping[str, int]
    moved: tuple[float, ...] = ()
    size: tuple[float, ...] = ()

    def __add__(self, other: Moved) -> Moved:
        sums = {name: (total + other.sums[name]) & MASK_64 for name, total in self.sums.items()}
        return Moved(self.specs, sums, self.moved + other.moved, self.size + other.size)

    @property
    def checksum(self) -> str:
        """Theta's checksum after the update."""
        return digest(self.specs, self.sums)

    @property
    def norm(self) -> float:
        """L2 norm of the change."""
        return math.sqrt(math.fsum(self.moved))

    @property
    def ratio(self) -> float:
        """Norm of the change over theta's norm; 0 where theta is 0."""
        size = math.sqrt(math.fsum(self.size))
        return self.norm / size if size else 0.0


class Theta(Protocol):
    """The float32 master in this process, on the host (`HostTheta`) or on a GPU (`estune.gpu.theta.DeviceTheta`)."""

    specs: list[ParameterSpec]
    buffers: dict[str, np.ndarray]

    @property
    def version(self) -> int:
        """Count of the writes of theta."""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters on the host, by stored name."""

    @property
    def num_parameters(self) -> int:
        """Number of scalars in theta."""

    def perturb(self, name: str, perturbation: Perturbation | None, out: np.ndarray | None = None) -> np.ndarray:
        """Return a member's weights for one parameter; see `HostTheta.perturb`."""

    def perturb_all(self, perturbation: Perturbation | None, outs: Mapping[str, np.ndarray]) -> None:
        """Write a member's weights for several parameters; see `HostTheta.perturb_all`."""

    def apply(self, update: Update, anchor: AnchorReader | None = None) -> Moved:
        """Move theta by one step; see `HostTheta.apply`."""

    def sums(self) -> dict[str, int]:
        """Return the checksum's sum of every parameter; `digest` makes the checksum of them."""

    def checksum(self) -> str:
        """Return the checksum of theta."""

    def fingerprint(self) -> str:
        """Return the fingerprint of theta."""

    def load(self, read_into: Callable[[str, np.ndarray], None]) -> None:
        """Overwrite theta from flat arrays; see `HostTheta.load`."""

    def assign(self, read: Callable[[str], torch.Tensor]) -> None:
        """Overwrite theta from tensors; see `HostTheta.assign`."""

    def head(self, name: str, count: int) -> np.ndarray:
        """Return the first ``count`` elements of a parameter; flat."""

    def unshare(self) -> None:
        """Move theta into memory of its own."""


def pieces(size: int) -> Iterator[tuple[int, int, int]]:
    """Cut ``size`` elements into (start, count, block); no piece crosses a block of 2^32 elements."""
    for block_start in range(0, size, BLOCK_SIZE):
        block_end = min(size, block_start + BLOCK_SIZE)
        for start in range(block_start, block_end, PIECE):
            yield start, min(PIECE, block_end - start), block_start // BLOCK_SIZE


def row_pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Cut a matrix (d0, d1), or a stack (E, d0, d1), into (row, rows, column): whole rows of one matrix each.

    ``row`` counts the rows of the whole stack, and ``column`` says how many columns the matrices before have.
    A piece has `PIECE` elements, and `LEAST_ROWS` rows where rows are so long that drawing B would count.
    """
    *experts, d0, d1 = shape
    if not d1:
        return
    step = max(PIECE // d1, LEAST_ROWS)
    for expert in range(math.prod(experts)):
        for row in range(0, d0, step):
            yield expert * d0 + row, min(step, d0 - row), expert * d1


def _rows_of(spec: ParameterSpec, flat: np.ndarray) -> np.ndarray:
    """Return the rows of a matrix, or of a whole stack, as a view (rows, d1) of its flat array."""
    return flat.reshape(math.prod(spec.shape[:-1]), spec.shape[-1])


def _factor_keys(seeds: Sequence[int], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the members' key words for the factors A and B of a matrix: uint32 (M, 2) each."""
    a, b = (noise_keys(seeds, factor) for factor in factor_names(name))
    return a, b


@dataclass
class HostTheta:
    """Float32 parameters under their stored names, in name order.

    ``arrays[name]`` is C-contiguous float32 of the spec's shape. ``buffers`` are the stored tensors that are not
    parameters: saved with the model, never perturbed, never updated.
    """

    specs: list[ParameterSpec]
    arrays: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray] = field(default_factory=dict)
    num_threads: int = 1

    def __post_init__(self) -> None:
        self.specs = sorted(self.specs, key=lambda spec: spec.name)
        for spec in self.specs:
            array = self.arrays[spec.name]
            if array.dtype != np.float32 or not array.flags.c_contiguous or array.shape != tuple(spec.shape):
                raise ValueError(f"master array {spec.name!r} is not C-contiguous float32 of shape {spec.shape}")
            if spec.lowrank:
                factor_shapes(spec.shape, 1)  # refuses what is no matrix and no stack of them
        self.flat = {spec.name: self.arrays[spec.name].reshape(-1) for spec in self.specs}
        self._pool = ThreadPoolExecutor(self.num_threads) if self.num_threads > 1 else None
        self._spec = {spec.name: spec for spec in self.specs}
        self.version = 0  # counts the writes of theta

    @property
    def num_parameters(self) -> int:
        """Number of scalars in theta."""
        return sum(flat.size for flat in self.flat.values())

    def perturb(self, name: str, perturbation: Perturbation | None, out: np.ndarray | None = None) -> np.ndarray:
        """Return a member's weights for one parameter, float32 of the parameter's shape.

        Args:
            name: the parameter.
            perturbation: the member; ``None`` or a parameter that is not perturbed gives a copy of theta.
            out: where to write, C-contiguous float32 of the same size; a new array without it.

        Raises:
            ValueError: ``out`` does not fit, or the member has no rank for parameters of low-rank noise.
        """
        if out is None:
            out = np.empty(self.arrays[name].shape, dtype=np.float32)
        self._run(_call, list(self._perturb_jobs(name, perturbation, out, out.nbytes >= STREAMED_BYTES)))
        return out

    def perturb_all(self, perturbation: Perturbation | None, outs: Mapping[str, np.ndarray]) -> None:
        """Write a member's weights for several parameters, as `perturb` does for one.

        All pieces go to the threads at once, so that none waits at the end of a small parameter.
        """
        streamed = sum(out.nbytes for out in outs.values()) >= STREAMED_BYTES
        self._run(
            _call, (job for name, out in outs.items() for job in self._perturb_jobs(name, perturbation, out, streamed))
        )

    def _perturb_jobs(
        self, name: str, perturbation: Perturbation | None, out: np.ndarray, streamed: bool
    ) -> Iterator[Callable[[], None]]:
        """Cut the writing of a member's weights into calls that may run in any order.

        ``streamed``: what is written passes the caches, because all of it together would not fit them.
        """
        spec, theta = self._spec[name], self.flat[name]
        if out.dtype != np.float32 or not out.flags.c_contiguous or out.size != theta.size:
            raise ValueError(f"output for {name!r} must be C-contiguous float32 of {theta.size} elements")
        flat_out = out.reshape(-1)  # (d,)
        if perturbation is not None:
            self.check_rank(perturbation.noise.rank)
        if perturbation is None or not spec.perturbed:
            for start, count, _ in pieces(theta.size):
                yield partial(np.copyto, flat_out[start : start + count], theta[start : start + count])
            return
        member, rademacher = perturbation.member, perturbation.noise.distribution == "rademacher"
        if spec.lowrank:
            factor_shapes(spec.shape, perturbation.noise.rank)  # refuses factors that are too large
            keys_a, keys_b = _factor_keys([member.seed], name)
            factor = perturbation.noise.lowrank_scale * member.sign
            rows_out, rows_theta = _rows_of(spec, flat_out), _rows_of(spec, theta)
            for row, count, column in row_pieces(spec.shape):
                rows = slice(row, row + count)
                yield partial(
                    cpu_lowrank.perturb_lowrank_into, rows_out[rows], rows_theta[rows], row, column, keys_a, keys_b,
                    perturbation.noise.rank, factor, rademacher,
                )  # fmt: skip
            return
        scale = np.float32(perturbation.noise.scale * member.sign)
        blocks = range(-(-theta.size // BLOCK_SIZE))
        keys = [noise_keys([member.seed], block_name(name, block))[0] for block in blocks]  # uint32 (2,) each
        for start, count, block in pieces(theta.size):
            part = slice(start, start + count)
            k0, k1 = keys[block]
            offset = start % BLOCK_SIZE
            yield partial(cpu.perturb_into, flat_out[part], theta[part], offset, k0, k1, scale, rademacher, streamed)

    def apply(self, update: Update, anchor: AnchorReader | None = None) -> Moved:
        """Move theta by one step, in place, in one pass that also sums its checksum and norms.

        Raises:
            ValueError: the update decays towards theta_0 but no ``anchor`` is given, or it has no rank, or too large a
                one, for parameters of low-rank noise; theta has not moved then.
        """
        self.check_update(update, anchor)
        if update.is_zero:
            return Moved(tuple(self.specs), self.sums())
        if not (update.decay and update.anchored):
            anchor = None
        jobs = (job for spec in self.specs for job in self._update_jobs(spec, update, anchor))
        parts = self._run(lambda job: job(), jobs)
        self.version += 1
        names, sums, moved, sizes = zip(*parts, strict=True) if parts else ((), (), (), ())
        return Moved(tuple(self.specs), total_sums(self.specs, zip(names, sums, strict=True)), moved, sizes)

    def _update_jobs(self, spec: ParameterSpec, update: Update, anchor: AnchorReader | None) -> Iterator[Job]:
        """Cut one parameter's update into calls that return (name, checksum, moved, size)."""
        name, flat = spec.name, self.flat[spec.name]
        seeds = [member.seed for member, q in zip(update.members, update.q, strict=True) if q]
        weights = [member.sign * q for member, q in zip(update.members, update.q, strict=True) if q]
        q = np.array(weights, dtype=np.int32)  # (M,)
        decay = np.float32(update.decay)
        rademacher = update.distribution == "rademacher"

        def theta_0(start: int, count: int) -> np.ndarray:
            return _NO_ANCHOR if anchor is None else anchor(name, start, count)

        def still(start: int, count: int) -> Part:
            return name, int(cpu.checksum_of(flat[start : start + count], start % BLOCK_SIZE)), 0.0, 0.0

        def full(start: int, count: int, keys: np.ndarray) -> Part:
            theta, base = flat[start : start + count], theta_0(start, count)
            done = cpu.update_into(theta, start % BLOCK_SIZE, keys, q, update.a, rademacher, decay, base)
            return name, int(done[0]), done[1], done[2]

        def lowrank(row: int, count: int, column: int, keys_a: np.ndarray, keys_b: np.ndarray) -> Part:
            cols = spec.shape[-1]
            theta, base = _rows_of(spec, flat)[row : row + count], theta_0(row * cols, count * cols)
            done = cpu_lowrank.update_lowrank_into(
                theta, row, column, keys_a, keys_b, q, update.rank, update.a_lowrank, rademacher, decay, base
            )
            return name, int(done[0]), done[1], done[2]

        if spec.lowrank:
            pairs = _factor_keys(seeds, name)
            for row, count, column in row_pieces(spec.shape):
                yield partial(lowrank, row, count, column, *pairs)
            return
        keys: dict[int, np.ndarray] = {}  # per block, (M, 2)
        for start, count, block in pieces(flat.size):
            if not spec.perturbed:
                yield partial(still, start, count)
                continue
            if block not in keys:
                keys[block] = noise_keys(seeds, block_name(name, block))
            yield partial(full, start, count, keys[block])

    def check_rank(self, rank: int) -> None:
        """Raise ValueError where parameters of low-rank noise meet a member or an update without a rank."""
        if rank < 1 and any(spec.lowrank for spec in self.specs):
            raise ValueError("parameters of low-rank noise need a rank of at least 1")

    def check_update(self, update: Update, anchor: AnchorReader | None) -> None:
        """Raise ValueError for what cannot be done, before any piece of theta moves; see `apply`."""
        self.check_rank(update.rank)
        for spec in self.specs:
            if spec.lowrank:
                factor_shapes(spec.shape, update.rank)  # refuses factors that are too large
        if update.decay and update.anchored and anchor is None and not update.is_zero:
            raise ValueError("an anchored update needs a reader of theta_0")

    def sums(self) -> dict[str, int]:
        """Return the checksum's sum of every parameter, modulo 2^64: shards and workers can add theirs up."""

        def work(job: tuple[str, int, int]) -> tuple[str, int]:
            name, start, count = job
            return name, int(cpu.checksum_of(self.flat[name][start : start + count], start % BLOCK_SIZE))

        jobs = [(s.name, start, count) for s in self.specs for start, count, _ in pieces(self.flat[s.name].size)]
        return total_sums(self.specs, self._run(work, jobs))

    def checksum(self) -> str:
        """Return the checksum of theta (DESIGN section 5): blake2b-128 in hex over names, shapes and `sums`."""
        return digest(self.specs, self.sums())

    def fingerprint(self) -> str:
        """Return the fingerprint of theta (DESIGN section 5): blake2b-128 in hex over names, shapes and raw bytes."""
        return fingerprint(self.specs, self.arrays)

    def load(self, read_into: Callable[[str, np.ndarray], None]) -> None:
        """Overwrite theta in place: ``read_into(name, flat)`` fills each parameter's flat float32 array (d,)."""
        self.version += 1  # also where it raises half way: what is there is not what was
        for spec in self.specs:
            read_into(spec.name, self.flat[spec.name])

    def assign(self, read: Callable[[str], torch.Tensor]) -> None:
        """Overwrite theta: ``read(name)`` is each parameter's new value, of any floating dtype and device."""
        import torch

        def read_into(name: str, flat: np.ndarray) -> None:
            torch.from_numpy(flat).copy_(read(name).detach().reshape(-1))

        self.load(read_into)

    def head(self, name: str, count: int) -> np.ndarray:
        """Return the first ``count`` elements of a parameter, or all if it has fewer; flat."""
        return self.flat[name][:count]

    def unshare(self) -> None:
        """Move theta into memory of its own, where the arrays given were another's (a model's own parameters)."""
        for spec in self.specs:
            self.arrays[spec.name] = self.arrays[spec.name].copy()
            self.flat[spec.name] = self.arrays[spec.name].reshape(-1)

    def _run(self, work: Callable, jobs: Iterable) -> list:  # type: ignore[type-arg]
        """Run ``work`` over ``jobs`` on the pool, results in order; a single job stays on this thread.

        The pool works on the first ones while an iterator still makes the others.
        """
        if self._pool is None or (isinstance(jobs, list) and len(jobs) < 2):
            return [work(job) for job in jobs]
        return list(self._pool.map(work, jobs))


def _call(job: Callable[[], None]) -> None:
    job()


def total_sums(specs: Sequence[ParameterSpec], parts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the checksum's sum of every parameter from the sums of its pieces, (name, sum) each."""
    totals = {spec.name: 0 for spec in specs}
    for name, part in parts:
        totals[name] = (totals[name] + part) & MASK_64
    return totals


def digest(specs: Sequence[ParameterSpec], sums: Mapping[str, int]) -> str:
    """Return the checksum of theta from the sums of its parameters: blake2b-128 in hex, in the specs' order."""
    hashed = blake2b(digest_size=16)
    for spec in specs:
        hashed.update(_label(spec))
        hashed.update(sums[spec.name].to_bytes(8, "little"))
    return hashed.hexdigest()


def _label(spec: ParameterSpec) -> bytes:
    """Return a parameter's name and shape as unambiguous bytes."""
    name = spec.name.encode("utf-8")
    return struct.pack("<QQ", len(name), len(spec.shape)) + name + struct.pack(f"<{len(spec.shape)}Q", *spec.shape)


def fingerprint(specs: Sequence[ParameterSpec], arrays: Mapping[str, np.ndarray]) -> str:
    """Return blake2b-128 over, in name order, each parameter's name, shape and raw float32 bytes."""
    hashed = blake2b(digest_size=16)
    for spec in sorted(specs, key=lambda spec: spec.name):
        hashed.update(_label(spec))
        hashed.update(np.ascontiguousarray(arrays[spec.name], dtype="<f4").reshape(-1).data)
    return hashed.hexdigest()
