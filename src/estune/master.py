"""theta, the float32 master: every member's weights are built from it, and only an update writes it.

The arrays are plain NumPy in the layout in which ``save_pretrained`` writes them, so the same code serves a language
model, the toy engine and a replay that loads no model at all. Tensors are cut into pieces of `PIECE` elements that a
few threads work through; results do not depend on how many (the update is exact in integers, section 2 of DESIGN).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from estune.engines.base import ParameterSpec, Perturbation
from estune.noise import block_name, cpu, noise_key
from estune.noise.reference import BLOCK_SIZE
from estune.optimizer import Update

PIECE = 1 << 18  # elements per unit of work: 1 MiB of float32
MASK_64 = (1 << 64) - 1
_NO_ANCHOR = np.empty(0, dtype=np.float32)

AnchorReader = Callable[[str, int, int], np.ndarray]  # (name, start, count) -> float32 (count,) of theta_0


@dataclass(frozen=True, slots=True)
class Moved:
    """What an update did: theta's checksum afterwards, the L2 norm of the change, and its ratio to theta's norm.

    Both norms are over the perturbed parameters.
    """

    checksum: str
    norm: float
    ratio: float


def pieces(size: int) -> Iterator[tuple[int, int, int]]:
    """Cut ``size`` elements into (start, count, block); no piece crosses a block of 2^32 elements."""
    for block_start in range(0, size, BLOCK_SIZE):
        block_end = min(size, block_start + BLOCK_SIZE)
        for start in range(block_start, block_end, PIECE):
            yield start, min(PIECE, block_end - start), block_start // BLOCK_SIZE


@dataclass
class Master:
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
        self._flat = {spec.name: self.arrays[spec.name].reshape(-1) for spec in self.specs}
        self._pool = ThreadPoolExecutor(self.num_threads) if self.num_threads > 1 else None
        self._perturbed = {spec.name: spec.perturbed for spec in self.specs}
        self.version = 0  # counts the writes of theta

    @property
    def num_parameters(self) -> int:
        """Number of scalars in theta."""
        return sum(flat.size for flat in self._flat.values())

    def perturb(self, name: str, perturbation: Perturbation | None, out: np.ndarray | None = None) -> np.ndarray:
        """Return a member's weights for one parameter, float32 of the parameter's shape.

        Args:
            name: the parameter.
            perturbation: the member; ``None`` or a parameter that is not perturbed gives a copy of theta.
            out: where to write, C-contiguous float32 of the same size; a new array without it.
        """
        theta = self._flat[name]
        if out is None:
            out = np.empty(self.arrays[name].shape, dtype=np.float32)
        if out.dtype != np.float32 or not out.flags.c_contiguous or out.size != theta.size:
            raise ValueError(f"output for {name!r} must be C-contiguous float32 of {theta.size} elements")
        flat_out = out.reshape(-1)  # (d,)
        if perturbation is None or not self._perturbed[name]:
            np.copyto(flat_out, theta)
            return out
        scale = np.float32(perturbation.scale * perturbation.member.sign)
        rademacher = perturbation.distribution == "rademacher"
        keys: dict[int, tuple[np.uint32, np.uint32]] = {}  # per block

        def work(piece: tuple[int, int, int]) -> None:
            start, count, block = piece
            k0, k1 = keys[block]
            end = start + count
            cpu.perturb_into(flat_out[start:end], theta[start:end], start % BLOCK_SIZE, k0, k1, scale, rademacher)

        for block in range(-(-theta.size // BLOCK_SIZE)):
            k0, k1 = noise_key(perturbation.member.seed, block_name(name, block))
            keys[block] = (np.uint32(k0), np.uint32(k1))
        self._run(work, list(pieces(theta.size)))
        return out

    def update(self, update: Update, anchor: AnchorReader | None = None) -> Moved:
        """Move theta by one step, in place, in one pass that also sums its checksum and norms.

        Raises:
            ValueError: the update decays towards theta_0 but no ``anchor`` is given.
        """
        if update.is_zero:
            return Moved(self.checksum(), 0.0, 0.0)
        if update.decay and update.anchored and anchor is None:
            raise ValueError("an anchored update needs a reader of theta_0")
        moving = [(m, q) for m, q in zip(update.members, update.q, strict=True) if q]
        q = np.array([m.sign * q for m, q in moving], dtype=np.int32)  # (M,)
        decay = np.float32(update.decay)
        rademacher = update.distribution == "rademacher"
        keys: dict[tuple[str, int], np.ndarray] = {}
        jobs: list[tuple[str, int, int, int]] = []
        for spec in self.specs:
            for start, count, block in pieces(self._flat[spec.name].size):
                jobs.append((spec.name, start, count, block))
                if spec.perturbed and (spec.name, block) not in keys:
                    stored = block_name(spec.name, block)
                    pairs = [noise_key(member.seed, stored) for member, _ in moving]
                    keys[spec.name, block] = np.array(pairs, dtype=np.uint32).reshape(-1, 2)  # (M, 2)

        def work(job: tuple[str, int, int, int]) -> tuple[str, int, float, float]:
            name, start, count, block = job
            theta = self._flat[name][start : start + count]
            offset = start % BLOCK_SIZE
            if not self._perturbed[name]:
                return name, int(cpu.checksum_of(theta, offset)), 0.0, 0.0
            theta_0 = _NO_ANCHOR
            if decay and update.anchored and anchor is not None:
                theta_0 = anchor(name, start, count)
            part, moved, size = cpu.update_into(
                theta, offset, keys[name, block], q, update.a, rademacher, decay, theta_0
            )
            return name, int(part), moved, size

        parts = self._run(work, jobs)
        self.version += 1
        norm = math.sqrt(math.fsum(moved for _, _, moved, _ in parts))
        size = math.sqrt(math.fsum(size for _, _, _, size in parts))
        return Moved(self._digest([part[:2] for part in parts]), norm, norm / size if size else 0.0)

    def checksum(self) -> str:
        """Return the checksum of theta (DESIGN section 5): blake2b-128 in hex, a sum that shards can add up."""

        def work(job: tuple[str, int, int]) -> tuple[str, int]:
            name, start, count = job
            return name, int(cpu.checksum_of(self._flat[name][start : start + count], start % BLOCK_SIZE))

        jobs = [(s.name, start, count) for s in self.specs for start, count, _ in pieces(self._flat[s.name].size)]
        return self._digest(self._run(work, jobs))

    def fingerprint(self) -> str:
        """Return the fingerprint of theta (DESIGN section 5): blake2b-128 in hex over names, shapes and raw bytes."""
        return fingerprint(self.specs, self.arrays)

    def load(self, read_into: Callable[[str, np.ndarray], None]) -> None:
        """Overwrite theta in place: ``read_into(name, flat)`` fills each parameter's flat float32 array (d,)."""
        for spec in self.specs:
            read_into(spec.name, self._flat[spec.name])
        self.version += 1

    def _digest(self, sums: Sequence[tuple[str, int]]) -> str:
        totals = {spec.name: 0 for spec in self.specs}
        for name, part in sums:
            totals[name] = (totals[name] + part) & MASK_64
        digest = blake2b(digest_size=16)
        for spec in self.specs:
            digest.update(_label(spec))
            digest.update(totals[spec.name].to_bytes(8, "little"))
        return digest.hexdigest()

    def _run(self, work: Callable, jobs: Sequence) -> list:  # type: ignore[type-arg]
        """Run ``work`` over ``jobs`` on the pool, results in order; small lists stay on this thread."""
        if self._pool is None or len(jobs) < 2:
            return [work(job) for job in jobs]
        return list(self._pool.map(work, jobs))


def _label(spec: ParameterSpec) -> bytes:
    """Return a parameter's name and shape as unambiguous bytes."""
    name = spec.name.encode("utf-8")
    return struct.pack("<QQ", len(name), len(spec.shape)) + name + struct.pack(f"<{len(spec.shape)}Q", *spec.shape)


def fingerprint(specs: Sequence[ParameterSpec], arrays: Mapping[str, np.ndarray]) -> str:
    """Return blake2b-128 over, in name order, each parameter's name, shape and raw float32 bytes."""
    digest = blake2b(digest_size=16)
    for spec in sorted(specs, key=lambda spec: spec.name):
        digest.update(_label(spec))
        digest.update(np.ascontiguousarray(arrays[spec.name], dtype="<f4").reshape(-1).data)
    return digest.hexdigest()
