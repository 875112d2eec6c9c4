"""theta, the float32 weights: members are perturbations of theta, and updates move theta.

The arrays are NumPy arrays in the layout of ``save_pretrained``. So the same code serves language models, the toy
engine, and a replay without a model. Threads work on pieces of `PIECE` elements. The result does not depend on the
number of threads, because the update sums integers (docs/reproducibility.md).

Three values identify theta:

* The *sums* are one 64-bit integer per parameter. The pass that moves theta computes them piece by piece.
* The *checksum* is a hash of the sums (`digest`). Every line of the journal holds it.
* The *fingerprint* is a hash of theta's bytes. It needs a pass of its own, and identifies weights in files.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np

from estune.errors import UserError
from estune.es.noise import block_name, cpu, cpu_lowrank, factor_names, factor_shapes, noise_keys
from estune.es.noise.reference import BLOCK_SIZE
from estune.es.types import ParameterSpec, Perturbation
from estune.es.update import Update

STREAMED_BYTES = 128 << 20  # bytes of a member's weights; larger outputs bypass the CPU caches
PIECE = 1 << 18  # elements of one unit of work: 1 MiB of float32
LEAST_ROWS = 64  # rows of one unit of work in a low-rank matrix at least, because each unit draws B again
MASK_64 = (1 << 64) - 1  # modulo 2^64
_NO_ANCHOR = np.empty(0, dtype=np.float32)

AnchorReader = Callable[[str, int, int], np.ndarray]  # (name, start, count) -> float32 (count,) of theta_0
Part = tuple[str, int, float, float]  # of one piece: name, checksum sum, sums of squares of the change and of theta
Job = Callable[[], Part]


@dataclass(frozen=True, slots=True)
class Moved:
    """The result of an update of theta: theta's new checksum, and the norms of the change and of theta.

    ``sums`` holds one checksum sum per parameter after the update, modulo 2^64. ``change_squares`` and
    ``theta_squares`` hold one sum of squares per piece, in any order: of the change, and of theta after the update.

    An engine may split theta into parts (shards) that different processes update; ``+`` combines their results.
    """

    specs: tuple[ParameterSpec, ...]
    sums: Mapping[str, int]
    change_squares: tuple[float, ...] = ()
    theta_squares: tuple[float, ...] = ()

    def __add__(self, other: Moved) -> Moved:
        sums = {name: (total + other.sums[name]) & MASK_64 for name, total in self.sums.items()}
        change_squares = self.change_squares + other.change_squares
        return Moved(self.specs, sums, change_squares, self.theta_squares + other.theta_squares)

    @property
    def checksum(self) -> str:
        """Theta's checksum after the update."""
        return digest(self.specs, self.sums)

    @property
    def norm(self) -> float:
        """L2 norm of theta's change."""
        return math.sqrt(math.fsum(self.change_squares))

    @property
    def ratio(self) -> float:
        """Norm of theta's change divided by theta's norm; 0 if theta is 0."""
        theta_norm = math.sqrt(math.fsum(self.theta_squares))
        return self.norm / theta_norm if theta_norm else 0.0


def checked_moved(moved: object, replica: object) -> Moved:
    """Return what a replica's ``apply`` returned.

    Raises:
        UserError: it is no `Moved`; the message names the engine.
    """
    if not isinstance(moved, Moved):
        name = getattr(replica, "name", type(replica).__name__)
        raise UserError(
            f"engine {name} breaks its contract: apply returned {type(moved).__name__}, not Moved (see "
            "estune.es.replica)"
        )
    return moved


class Theta(Protocol):
    """The parameters that an engine of this process holds: in host memory (`HostTheta`) or on a GPU (`DeviceTheta`).

    `estune.gpu.theta` defines `DeviceTheta`. A `Theta` knows no files; `estune.es.replica.Replica` is theta with files.
    """

    specs: list[ParameterSpec]
    buffers: dict[str, np.ndarray]

    @property
    def version(self) -> int:
        """Number of times that theta was written."""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters in host memory, by stored name."""

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
        """Return one checksum sum per parameter; `digest` hashes the sums into the checksum."""

    def checksum(self) -> str:
        """Return the checksum of theta."""

    def fingerprint(self) -> str:
        """Return the fingerprint of theta."""

    def load(self, read_into: Callable[[str, np.ndarray], None]) -> None:
        """Overwrite theta from flat arrays; see `HostTheta.load`."""

    def assign(self, read: Callable[[str], Any]) -> None:
        """Overwrite theta from tensors; see `HostTheta.assign`."""

    def head(self, name: str, count: int) -> np.ndarray:
        """Return the first elements of a parameter, (count,) or all of them if there are fewer."""

    def unshare(self) -> None:
        """Copy theta into new memory; see `HostTheta.unshare`."""


def pieces(size: int) -> Iterator[tuple[int, int, int]]:
    """Yield pieces (start, count, block) of ``size`` elements; each piece lies within one block of 2^32 elements."""
    for block_start in range(0, size, BLOCK_SIZE):
        block_end = min(size, block_start + BLOCK_SIZE)
        for start in range(block_start, block_end, PIECE):
            yield start, min(PIECE, block_end - start), block_start // BLOCK_SIZE


def row_pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield pieces (row, rows, column) of a matrix (d0, d1) or a stack (E, d0, d1): whole rows of one matrix.

    ``row`` is the first row's index in the whole stack. ``column`` is the row of B that belongs to the matrix's first
    column. A piece has about `PIECE` elements, but at least `LEAST_ROWS` rows.
    """
    *experts, d0, d1 = shape
    if not d1:
        return
    step = max(PIECE // d1, LEAST_ROWS)
    for expert in range(math.prod(experts)):
        for row in range(0, d0, step):
            yield expert * d0 + row, min(step, d0 - row), expert * d1


def _rows_of(spec: ParameterSpec, flat: np.ndarray) -> np.ndarray:
    """Return a matrix or a stack as a view (rows, d1) of its flat array."""
    return flat.reshape(math.prod(spec.shape[:-1]), spec.shape[-1])


def _factor_keys(seeds: Sequence[int], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the members' key words for a matrix's factors A and B: two arrays uint32 (M, 2)."""
    a, b = (noise_keys(seeds, factor) for factor in factor_names(name))
    return a, b


@dataclass
class HostTheta:
    """The `Theta` in host memory: float32 NumPy arrays under their stored names, in name order.

    ``arrays[name]`` is C-contiguous float32 of the spec's shape. ``buffers`` holds the stored tensors that are not
    parameters: they are saved with the model, and never perturbed or updated.
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
                raise ValueError(f"theta's array {spec.name!r} is not C-contiguous float32 of shape {spec.shape}")
            if spec.lowrank:
                factor_shapes(spec.shape, 1)  # raises for shapes that are neither a matrix nor a stack
        self.flat = {spec.name: self.arrays[spec.name].reshape(-1) for spec in self.specs}
        self._pool = ThreadPoolExecutor(self.num_threads) if self.num_threads > 1 else None
        self._spec = {spec.name: spec for spec in self.specs}
        self.version = 0  # number of times that theta was written

    @property
    def num_parameters(self) -> int:
        """Number of scalars in theta."""
        return sum(flat.size for flat in self.flat.values())

    def perturb(self, name: str, perturbation: Perturbation | None, out: np.ndarray | None = None) -> np.ndarray:
        """Return a member's weights for one parameter, float32 of the parameter's shape.

        Args:
            name: the parameter.
            perturbation: the member; with ``None``, or for a parameter that is not perturbed, the result is a copy.
            out: C-contiguous float32 output of the same size; ``None`` allocates a new array.

        Raises:
            ValueError: ``out`` has the wrong dtype, layout or size, or the member's rank is 0 or too large for a
                parameter of low-rank noise.
        """
        if out is None:
            out = np.empty(self.arrays[name].shape, dtype=np.float32)
        self._run(_call, list(self._perturb_jobs(name, perturbation, out, out.nbytes >= STREAMED_BYTES)))
        return out

    def perturb_all(self, perturbation: Perturbation | None, outs: Mapping[str, np.ndarray]) -> None:
        """Write a member's weights for several parameters; `perturb` writes one.

        The threads take the pieces of all parameters from one queue, so no thread idles at the end of a parameter.
        """
        streamed = sum(out.nbytes for out in outs.values()) >= STREAMED_BYTES
        self._run(
            _call, (job for name, out in outs.items() for job in self._perturb_jobs(name, perturbation, out, streamed))
        )

    def _perturb_jobs(
        self, name: str, perturbation: Perturbation | None, out: np.ndarray, streamed: bool
    ) -> Iterator[Callable[[], None]]:
        """Yield calls that write a member's weights piece by piece; they may run in any order.

        ``streamed`` makes the writes bypass the CPU caches, because the whole output does not fit them.
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
            rank, lowrank_scale = perturbation.noise.rank, perturbation.noise.lowrank_scale * member.sign
            factor_shapes(spec.shape, rank)  # raises for factors that are too large
            keys = _factor_keys([member.seed], name)
            perturb = cpu_lowrank.perturb_lowrank_into
            rows_out, rows_theta = _rows_of(spec, flat_out), _rows_of(spec, theta)
            for row, count, column in row_pieces(spec.shape):
                target, source = rows_out[row : row + count], rows_theta[row : row + count]
                yield partial(perturb, target, source, row, column, *keys, rank, lowrank_scale, rademacher)
            return
        scale = np.float32(perturbation.noise.scale * member.sign)
        blocks = range(-(-theta.size // BLOCK_SIZE))
        block_keys = [noise_keys([member.seed], block_name(name, block))[0] for block in blocks]  # uint32 (2,) each
        for start, count, block in pieces(theta.size):
            part = slice(start, start + count)
            k0, k1 = block_keys[block]
            offset = start % BLOCK_SIZE
            yield partial(cpu.perturb_into, flat_out[part], theta[part], offset, k0, k1, scale, rademacher, streamed)

    def apply(self, update: Update, anchor: AnchorReader | None = None) -> Moved:
        """Move theta by one step, in place; the same pass computes theta's checksum and norms.

        Raises:
            ValueError: the update decays towards theta_0 but ``anchor`` is None, or theta has parameters of low-rank
                noise and the update's rank is 0 or too large. Theta is unchanged.
        """
        self.check_update(update, anchor)
        if update.is_zero:
            return Moved(tuple(self.specs), self.sums())
        if not (update.decay and update.anchored):
            anchor = None
        jobs = (job for spec in self.specs for job in self._update_jobs(spec, update, anchor))
        parts = self._run(lambda job: job(), jobs)
        self.version += 1
        names, sums, change_squares, theta_squares = zip(*parts, strict=True) if parts else ((), (), (), ())
        totals = total_sums(self.specs, zip(names, sums, strict=True))
        return Moved(tuple(self.specs), totals, change_squares, theta_squares)

    def _update_jobs(self, spec: ParameterSpec, update: Update, anchor: AnchorReader | None) -> Iterator[Job]:
        """Yield calls that update one parameter piece by piece; each returns a `Part`."""
        name, flat = spec.name, self.flat[spec.name]
        seeds = [member.seed for member, q in zip(update.members, update.q, strict=True) if q]
        signed = [member.sign * q for member, q in zip(update.members, update.q, strict=True) if q]
        q = np.array(signed, dtype=np.int32)  # (M,)
        decay = np.float32(update.decay)
        rademacher = update.distribution == "rademacher"

        def theta_0(start: int, count: int) -> np.ndarray:
            return _NO_ANCHOR if anchor is None else anchor(name, start, count)

        def unperturbed(start: int, count: int) -> Part:
            return name, int(cpu.checksum_of(flat[start : start + count], start % BLOCK_SIZE)), 0.0, 0.0

        def full(start: int, count: int, keys: np.ndarray) -> Part:
            theta, towards = flat[start : start + count], theta_0(start, count)
            done = cpu.update_into(theta, start % BLOCK_SIZE, keys, q, update.a, rademacher, decay, towards)
            return name, int(done[0]), done[1], done[2]

        def lowrank(row: int, count: int, column: int, keys_a: np.ndarray, keys_b: np.ndarray) -> Part:
            cols = spec.shape[-1]
            theta, towards = _rows_of(spec, flat)[row : row + count], theta_0(row * cols, count * cols)
            done = cpu_lowrank.update_lowrank_into(
                theta, row, column, keys_a, keys_b, q, update.rank, update.a_lowrank, rademacher, decay, towards
            )
            return name, int(done[0]), done[1], done[2]

        if spec.lowrank:
            keys_of_a_and_b = _factor_keys(seeds, name)
            for row, count, column in row_pieces(spec.shape):
                yield partial(lowrank, row, count, column, *keys_of_a_and_b)
            return
        keys: dict[int, np.ndarray] = {}  # per block, (M, 2)
        for start, count, block in pieces(flat.size):
            if not spec.perturbed:
                yield partial(unperturbed, start, count)
                continue
            if block not in keys:
                keys[block] = noise_keys(seeds, block_name(name, block))
            yield partial(full, start, count, keys[block])

    def check_rank(self, rank: int) -> None:
        """Raise ValueError if theta has parameters of low-rank noise and ``rank`` is less than 1."""
        if rank < 1 and any(spec.lowrank for spec in self.specs):
            raise ValueError("parameters of low-rank noise need a rank of at least 1")

    def check_update(self, update: Update, anchor: AnchorReader | None) -> None:
        """Raise ValueError if `apply` cannot apply the update; nothing is written."""
        self.check_rank(update.rank)
        for spec in self.specs:
            if spec.lowrank:
                factor_shapes(spec.shape, update.rank)  # raises for factors that are too large
        if update.decay and update.anchored and anchor is None and not update.is_zero:
            raise ValueError("an anchored update needs a reader of theta_0")

    def sums(self) -> dict[str, int]:
        """Return one checksum sum per parameter, modulo 2^64."""

        def work(job: tuple[str, int, int]) -> tuple[str, int]:
            name, start, count = job
            return name, int(cpu.checksum_of(self.flat[name][start : start + count], start % BLOCK_SIZE))

        jobs = [(s.name, start, count) for s in self.specs for start, count, _ in pieces(self.flat[s.name].size)]
        return total_sums(self.specs, self._run(work, jobs))

    def checksum(self) -> str:
        """Return the checksum of theta: blake2b-128, in hex, over names, shapes and `sums`."""
        return digest(self.specs, self.sums())

    def fingerprint(self) -> str:
        """Return the fingerprint of theta: blake2b-128, in hex, over names, shapes and float32 bytes."""
        return fingerprint(self.specs, self.arrays)

    def load(self, read_into: Callable[[str, np.ndarray], None]) -> None:
        """Overwrite theta in place: ``read_into(name, flat)`` fills each parameter's flat float32 array (d,)."""
        self.version += 1  # before the reads: a read that raises leaves theta half written
        for spec in self.specs:
            read_into(spec.name, self.flat[spec.name])

    def assign(self, read: Callable[[str], Any]) -> None:
        """Overwrite theta: ``read(name)`` returns a parameter's new value, a torch tensor of any dtype and device."""

        def read_into(name: str, flat: np.ndarray) -> None:
            flat[...] = read(name).detach().reshape(-1).float().cpu().numpy()

        self.load(read_into)

    def head(self, name: str, count: int) -> np.ndarray:
        """Return the first elements of a parameter, (count,) or all of them if there are fewer."""
        return self.flat[name][:count]

    def unshare(self) -> None:
        """Copy theta into new memory; until then its arrays may be a model's own parameters."""
        for spec in self.specs:
            self.arrays[spec.name] = self.arrays[spec.name].copy()
            self.flat[spec.name] = self.arrays[spec.name].reshape(-1)

    def _run(self, work: Callable, jobs: Iterable) -> list:  # type: ignore[type-arg]
        """Return the results of ``work`` for all jobs, in order; a single job runs on this thread.

        If ``jobs`` is an iterator, threads run the first jobs while it still makes the others.
        """
        if self._pool is None or (isinstance(jobs, list) and len(jobs) < 2):
            return [work(job) for job in jobs]
        return list(self._pool.map(work, jobs))


def _call(job: Callable[[], None]) -> None:
    job()


def total_sums(specs: Sequence[ParameterSpec], parts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return one checksum sum per parameter from the pieces' (name, sum)."""
    totals = {spec.name: 0 for spec in specs}
    for name, part in parts:
        totals[name] = (totals[name] + part) & MASK_64
    return totals


def digest(specs: Sequence[ParameterSpec], sums: Mapping[str, int]) -> str:
    """Return theta's checksum: blake2b-128, in hex, of the parameters' labels and sums in the specs' order."""
    hashed = blake2b(digest_size=16)
    for spec in specs:
        hashed.update(_label(spec))
        hashed.update(sums[spec.name].to_bytes(8, "little"))
    return hashed.hexdigest()


def _label(spec: ParameterSpec) -> bytes:
    """Return a parameter's name and shape as bytes, preceded by their lengths: no two parameters have equal bytes."""
    name = spec.name.encode("utf-8")
    return struct.pack("<QQ", len(name), len(spec.shape)) + name + struct.pack(f"<{len(spec.shape)}Q", *spec.shape)


def fingerprint(specs: Sequence[ParameterSpec], arrays: Mapping[str, np.ndarray]) -> str:
    """Return theta's fingerprint: blake2b-128, in hex, of each parameter's label and float32 bytes, in name order."""
    hashed = blake2b(digest_size=16)
    for spec in sorted(specs, key=lambda spec: spec.name):
        hashed.update(_label(spec))
        hashed.update(np.ascontiguousarray(arrays[spec.name], dtype="<f4").reshape(-1).data)
    return hashed.hexdigest()
