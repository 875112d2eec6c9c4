"""What vLLM's workers share with the process that trains: theta in anonymous memory, and the form of members.

Theta is one float32 copy a machine. Its memory belongs to a file descriptor (``memfd_create``) of the process that
trains. Workers open it through ``/proc``. The kernel frees it when the last process ends, however it ends.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from estune.errors import UserError
from estune.es.theta import HostTheta
from estune.es.types import Member, Noise, ParameterSpec, Perturbation

# Keys of a request's extra_args.
MEMBER = "estune_member"  # index of the member that answers; M stands for theta
ROW = "estune_row"  # index of the request among those of one call

PerturbationMessage = Sequence[Any]  # seed, sign, distribution, rank, scale, lowrank_scale

ALIGNMENT = 64  # bytes; the start of every array


@dataclass(frozen=True, slots=True)
class Address:
    """Where a worker finds theta: plain values, so that any transport carries them."""

    process: int
    descriptor: int
    size: int  # bytes
    specs: tuple[tuple[str, tuple[int, ...], bool, bool], ...]  # name, shape, perturbed, lowrank

    def message(self) -> dict[str, Any]:
        """Return the address as lists and numbers."""
        specs = [[name, list(shape), perturbed, lowrank] for name, shape, perturbed, lowrank in self.specs]
        return {"process": self.process, "descriptor": self.descriptor, "size": self.size, "specs": specs}

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Address:
        """Return the address of a `message`."""
        specs = tuple((name, tuple(shape), perturbed, lowrank) for name, shape, perturbed, lowrank in message["specs"])
        return cls(message["process"], message["descriptor"], message["size"], specs)


class SharedArrays:
    """Float32 arrays in one block of anonymous memory."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Allocate the memory, filled with zeros.

        Raises:
            UserError: this system has no anonymous files (it is not Linux).
        """
        if not hasattr(os, "memfd_create"):
            raise UserError(f"the vLLM engine needs Linux, and this is {sys.platform}")
        self.shapes = {name: tuple(shape) for name, shape in sorted(shapes.items())}
        self.size = max(_offsets(self.shapes)[1], 1)
        self.descriptor = os.memfd_create("estune-theta", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, self.size)
        self._map = mmap.mmap(self.descriptor, self.size)
        self.arrays = _arrays(self._map, self.shapes)

    def address(self, specs: Sequence[ParameterSpec]) -> Address:
        """Return where other processes of this machine find the arrays."""
        parts = tuple((s.name, tuple(s.shape), s.perturbed, s.lowrank) for s in specs)
        return Address(os.getpid(), self.descriptor, self.size, parts)

    def close(self) -> None:
        """Close the descriptor; the memory lives as long as arrays use it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def attach(address: Address, num_threads: int) -> HostTheta:
    """Return theta of another process, or of this one, in the same memory; only its owner writes it."""
    descriptor = os.open(f"/proc/{address.process}/fd/{address.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(descriptor, address.size)
    finally:
        os.close(descriptor)
    specs = [ParameterSpec(name, shape, perturbed, lowrank) for name, shape, perturbed, lowrank in address.specs]
    return HostTheta(specs, _arrays(memory, {s.name: tuple(s.shape) for s in specs}), num_threads=num_threads)


def _offsets(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """Return the first byte of every array, and the number of bytes of all."""
    starts, end = {}, 0
    for name, shape in sorted(shapes.items()):
        starts[name] = end
        end += -(-4 * math.prod(shape) // ALIGNMENT) * ALIGNMENT
    return starts, end


def _arrays(memory: mmap.mmap, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    starts, _ = _offsets(shapes)
    return {
        name: np.frombuffer(memory, np.float32, math.prod(shape), starts[name]).reshape(shape)
        for name, shape in sorted(shapes.items())
    }


def message_of(perturbation: Perturbation) -> list[Any]:
    """Return a perturbation as a list of numbers and strings."""
    member, noise = perturbation.member, perturbation.noise
    return [member.seed, member.sign, noise.distribution, noise.rank, noise.scale, noise.lowrank_scale]


def perturbation_of(message: PerturbationMessage | None) -> Perturbation | None:
    """Return the perturbation of a message; None stays None."""
    if message is None:
        return None
    seed, sign, distribution, rank, scale, lowrank_scale = message
    noise = Noise(distribution=distribution, rank=rank, scale=scale, lowrank_scale=lowrank_scale)
    return Perturbation(Member(seed, sign), noise)
