"""Theta for a working model on a GPU: in float32 on the device, or in pinned host memory and streamed to the device.

`DeviceTheta` computes members and updates with the kernels of `estune.gpu.launch`, to the same bits as
`estune.es.theta.HostTheta`. `on_device` first compares the device with the CPU kernels, and returns the `HostTheta` if
a bit differs. If theta does not fit beside the working model, it stays in pinned host memory and passes through the
ring of `estune.gpu.staging` part by part. This module needs triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from estune.es.noise import block_name, factor_names, factor_shapes, noise_key
from estune.es.noise.reference import BLOCK_SIZE
from estune.es.theta import AnchorReader, HostTheta, Moved, Theta, digest, fingerprint, total_sums
from estune.es.types import ParameterSpec, Perturbation
from estune.es.update import Update
from estune.gpu import check, launch
from estune.gpu.staging import Staging, pin

STAGE = 1 << 24  # elements of a staging buffer: 64 MiB
RESIDENT_SHARE = 0.5  # share of the device's free memory that theta may take; caches and activations take the rest


def on_device(
    host: HostTheta, device: torch.device, report: Callable[[str], None], *, resident: bool | None = None
) -> Theta:
    """Return theta on ``device``, or ``host`` itself if the device cannot compute the same bits.

    Args:
        host: theta; the result uses its arrays.
        device: the working model's device; the model is already loaded there.
        report: is called with one sentence if the device cannot be used, or if copies to it are slow.
        resident: whether theta is stored on the device; None: if it takes at most half of the free device memory.
    """
    if device.type != "cuda":
        return host
    try:
        wrong = check.check(device)
        fault = f"computes other bits than the CPU for {wrong[0]}" if wrong else ""
    except Exception as error:
        # Without a C compiler, or on an unknown GPU, Triton raises errors of many types (KeyError, CalledProcessError,
        # errors of LLVM). None of them may end the run, because the CPU computes the same bits; `report` gets them all.
        fault = f"cannot run the noise kernels ({type(error).__name__}: {error})"
    if fault:
        name = torch.cuda.get_device_name(device)
        report(f"{name} {fault}: the CPU computes members and updates instead, which is slower and exact")
        return host
    if resident is None:
        resident = 4 * host.num_parameters <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    theta = DeviceTheta(host, device, resident=resident)
    if not theta.is_pinned:
        report("theta's host memory could not be pinned: copies to the GPU are slower")
    return theta


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous part of one parameter that one launch works on; ``rows`` is set for a low-rank matrix."""

    spec: ParameterSpec
    start: int
    count: int
    rows: launch.Rows | None = None

    @property
    def span(self) -> slice:
        """The slice of the flat parameter."""
        return slice(self.start, self.start + self.count)

    @property
    def key_name(self) -> str:
        """The name under which the part's keys are stored: the key block's name, or the low-rank matrix's name."""
        return self.spec.name if self.rows is not None else block_name(self.spec.name, self.start // BLOCK_SIZE)


def parts(spec: ParameterSpec, most: int | None = None) -> Iterator[Part]:
    """Yield parts of a parameter: at most ``most`` elements (a power of 2), or one row of a low-rank matrix."""
    size = math.prod(spec.shape)
    if size == 0:
        return
    if spec.perturbed and spec.lowrank:
        *experts, d0, d1 = spec.shape
        n_matrices = math.prod(experts)
        matrices, rows = n_matrices, d0
        if most is not None:
            matrices, rows = max(1, most // (d0 * d1)), min(d0, max(1, most // d1))
        for matrix in range(0, n_matrices, matrices):
            for row in range(0, d0, rows):
                part = launch.Rows(d0, d1, matrix, min(matrices, n_matrices - matrix), row, min(rows, d0 - row))
                yield Part(spec, part.start, part.count, part)
        return
    step = BLOCK_SIZE if most is None else min(most, BLOCK_SIZE)
    for start in range(0, size, step):
        yield Part(spec, start, min(step, size - start))


class DeviceTheta:
    """Theta whose members and updates are computed on a device, to the same bits as `estune.es.theta.HostTheta`.

    ``host`` holds the copy in host memory. If theta is stored on the device, an update makes this copy stale.
    ``arrays`` downloads all stale parameters; other methods download only the parameters that they read.
    """

    def __init__(self, host: HostTheta, device: torch.device, *, resident: bool, stage: int = STAGE) -> None:
        """Take ownership of ``host``; ``stage`` is the number of elements of a staging buffer, a power of 2."""
        self.host = host
        self.specs, self.buffers = host.specs, host.buffers
        self.device = device = torch.empty(0, device=device).device  # adds the device's index
        self.resident = resident
        self._stale: set[str] = set()  # names of parameters that changed on the device since their last download
        self._by_name = {spec.name: spec for spec in self.specs}
        self._host = {name: torch.from_numpy(flat) for name, flat in host.flat.items()}
        self._stage = stage
        self._staging: Staging | None = None
        self.is_pinned = True  # whether all of theta that is streamed to a GPU lies in pinned memory
        if resident:
            self._theta = {name: flat.to(device, copy=True) for name, flat in self._host.items()}
        else:
            longest = max((spec.shape[-1] for spec in self.specs if spec.lowrank), default=0)
            self._staging = Staging(device, max(stage, longest))
            if device.type == "cuda":
                self.is_pinned = pin(list(self._host.values()), self)

    @property
    def version(self) -> int:
        """Number of times that theta was written."""
        return self.host.version

    @property
    def num_parameters(self) -> int:
        """Number of scalars in theta."""
        return self.host.num_parameters

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The host's copy of theta, by name; stale parameters are downloaded first."""
        self._download(self._stale)
        return self.host.arrays

    def head(self, name: str, count: int) -> np.ndarray:
        """Return a parameter's first elements, float32 (count,) or fewer; only these are downloaded."""
        return (self._theta if self.resident else self._host)[name][:count].cpu().numpy()

    def perturb(self, name: str, perturbation: Perturbation | None, out: np.ndarray | None = None) -> np.ndarray:
        """Return a member's weights in host memory; see `HostTheta.perturb`."""
        self._download([name])
        return self.host.perturb(name, perturbation, out)

    def perturb_all(self, perturbation: Perturbation | None, outs: Mapping[str, np.ndarray]) -> None:
        """Write a member's weights for several parameters to host memory; see `HostTheta.perturb_all`."""
        self._download(outs)
        self.host.perturb_all(perturbation, outs)

    def perturb_into(self, name: str, perturbation: Perturbation | None, out: torch.Tensor) -> None:
        """Write a member's weights for one parameter, cast once, to device memory.

        Args:
            name: the parameter.
            perturbation: the member; ``None`` writes theta, as does a parameter that is not perturbed.
            out: contiguous float32, bfloat16 or float16 tensor of the parameter's size, on theta's device.

        Raises:
            ValueError: ``out`` has the wrong dtype, layout, size or device, or the member lacks the rank of low-rank
                noise.
        """
        spec = self._by_name[name]
        if out.device != self.device or not out.is_contiguous() or out.numel() != self._host[name].numel():
            raise ValueError(
                f"output for {name!r} must be contiguous on {self.device}, of {self._host[name].numel()} elements"
            )
        if out.dtype not in check.DTYPES:
            raise ValueError(f"output for {name!r} must be float32, bfloat16 or float16, not {out.dtype}")
        flat = out.view(-1)  # (d,)
        if perturbation is not None:
            self.host.check_rank(perturbation.noise.rank)
        for part in self._parts(spec):
            self._apply(part, _member_writer(part, perturbation, flat[part.span]), write_back=False)

    def apply(self, update: Update, anchor: AnchorReader | None = None) -> Moved:
        """Move theta by one step; see `HostTheta.apply`. The anchor is copied to the device part by part."""
        self.host.check_update(update, anchor)
        if update.is_zero:
            return Moved(tuple(self.specs), self.sums())
        if not (update.decay and update.anchored):
            anchor = None
        moving = [(member, q) for member, q in zip(update.members, update.q, strict=True) if q]
        q = torch.tensor([member.sign * q for member, q in moving], dtype=torch.int32, device=self.device)  # (M,)
        rademacher = update.distribution == "rademacher"
        jobs = [part for spec in self.specs for part in self._parts(spec, whole=anchor is None)]
        keys = self._keys(jobs, [member.seed for member, _ in moving])
        done: list[tuple[Part, launch.Sums]] = []

        def move(part: Part, theta: torch.Tensor) -> None:
            """Queue one part's kernel."""
            if not part.spec.perturbed:
                nothing = torch.zeros((), dtype=torch.float64, device=self.device)
                done.append((part, launch.Sums(launch.checksum_of(theta, part.start % BLOCK_SIZE), nothing, nothing)))
                return
            base, words = None, keys[part.key_name]
            if anchor is not None:  # the copy blocks: a memory map is not pinned, and may be read-only
                values = np.require(anchor(part.spec.name, part.start, part.count), requirements="W")
                base = torch.from_numpy(values).to(self.device)
            if part.rows is not None:
                sums = launch.update_lowrank_into(
                    theta, part.rows, update.rank, words, q, update.a_lowrank, rademacher, update.decay, base
                )
            else:
                sums = launch.update_into(
                    theta, part.start % BLOCK_SIZE, words, q, update.a, rademacher, update.decay, base
                )
            done.append((part, sums))

        for part in jobs:
            self._apply(part, partial(move, part), write_back=part.spec.perturbed)
        self.host.version += 1
        if self.resident:
            self._stale.update(spec.name for spec in self.specs if spec.perturbed)
        checksums = _to_list([sums.checksum for _, sums in done])
        change_squares = tuple(_to_list([sums.change_squares for _, sums in done]))
        theta_squares = tuple(_to_list([sums.theta_squares for _, sums in done]))
        self._wait()
        names = [part.spec.name for part, _ in done]
        return Moved(
            tuple(self.specs), total_sums(self.specs, zip(names, checksums, strict=True)), change_squares, theta_squares
        )

    def checksum(self) -> str:
        """Return the checksum of theta."""
        return digest(self.specs, self.sums())

    def fingerprint(self) -> str:
        """Return the fingerprint of theta."""
        return fingerprint(self.specs, self.arrays)

    def sums(self) -> dict[str, int]:
        """Return the checksum sum of every parameter, computed on the device."""
        done: list[tuple[str, torch.Tensor]] = []

        def add(part: Part, theta: torch.Tensor) -> None:
            done.append((part.spec.name, launch.checksum_of(theta, part.start % BLOCK_SIZE)))

        for spec in self.specs:
            for part in self._parts(spec):
                self._apply(part, partial(add, part), write_back=False)
        sums = _to_list([value for _, value in done])
        return total_sums(self.specs, ((name, value) for (name, _), value in zip(done, sums, strict=True)))

    def load(self, read_into: Callable[[str, np.ndarray], None]) -> None:
        """Overwrite theta; see `HostTheta.load`."""
        self._wait()
        self.host.load(read_into)
        self._stale.clear()
        if self.resident:
            for name, flat in self._host.items():
                self._theta[name].copy_(flat)

    def assign(self, read: Callable[[str], torch.Tensor]) -> None:
        """Overwrite theta; see `HostTheta.assign`. Tensors on the device are copied without the host."""
        if not self.resident:
            self.host.assign(read)
            return
        self.host.version += 1
        for spec in self.specs:
            self._stale.add(spec.name)
            self._theta[spec.name].copy_(read(spec.name).detach().reshape(-1))

    def unshare(self) -> None:
        """Copy the host's arrays into new memory; see `HostTheta.unshare`."""
        self.host.unshare()
        self._host = {name: torch.from_numpy(flat) for name, flat in self.host.flat.items()}

    def _download(self, names: Iterable[str]) -> None:
        """Download the stale parameters among ``names``."""
        for name in self._stale.intersection(names):
            self._host[name].copy_(self._theta[name])
            self._stale.discard(name)

    def _parts(self, spec: ParameterSpec, whole: bool = True) -> Iterator[Part]:
        """Return a parameter's parts: of a staging buffer's size, or as large as possible if theta is on the device."""
        return parts(spec, None if self.resident and whole else self._stage)

    def _apply(self, part: Part, work: Callable[[torch.Tensor], object], *, write_back: bool) -> None:
        """Queue ``work`` on a part of theta; ``write_back``: the work writes this part."""
        if self._staging is None:
            work(self._theta[part.spec.name][part.span])
        else:
            self._staging.run(self._host[part.spec.name][part.span], work, write_back=write_back)

    def _wait(self) -> None:
        if self._staging is not None:
            self._staging.wait()

    def _keys(self, jobs: Sequence[Part], seeds: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the members' key words by key name, each a flattened uint32 (M, 2 or 4); one upload for all parts."""
        words: dict[str, np.ndarray] = {}
        for part in jobs:
            if part.spec.perturbed and part.key_name not in words:
                names = factor_names(part.spec.name) if part.rows is not None else (part.key_name,)
                words[part.key_name] = np.array(
                    [[word for name in names for word in noise_key(seed, name)] for seed in seeds], dtype=np.uint32
                )
        if not words:
            return {}
        flat = launch.words(np.concatenate([table.reshape(-1) for table in words.values()]), self.device)
        tables = torch.split(flat, [table.size for table in words.values()])
        return dict(zip(words, tables, strict=True))


def _member_writer(
    part: Part, perturbation: Perturbation | None, out: torch.Tensor
) -> Callable[[torch.Tensor], object]:
    """Return the function that writes a member's weights for one part of theta to ``out``."""
    if perturbation is None or not part.spec.perturbed:
        return out.copy_
    member, rademacher = perturbation.member, perturbation.noise.distribution == "rademacher"
    if part.rows is not None:
        factor_shapes(part.spec.shape, perturbation.noise.rank)  # raises for factors that are too large
        words = [word for name in factor_names(part.spec.name) for word in noise_key(member.seed, name)]
        rows, rank, scale = part.rows, perturbation.noise.rank, perturbation.noise.lowrank_scale
        return lambda theta: launch.perturb_lowrank_into(out, theta, rows, rank, words, member.sign, scale, rademacher)
    key = noise_key(member.seed, part.key_name)
    scale = perturbation.noise.scale * member.sign
    return lambda theta: launch.perturb_into(out, theta, part.start % BLOCK_SIZE, key, scale, rademacher)


def _to_list(values: list[torch.Tensor]) -> list[Any]:
    """Return the values of 0-d tensors, downloaded together."""
    return torch.stack(values).tolist() if values else []
