"""What the engine and vLLM's workers tell each other: plain values that any transport carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from estune.es.types import Member, Noise, Perturbation

# Keys of a request's extra_args.
MEMBER = "estune_member"  # index of the member that answers; M stands for theta
ROW = "estune_row"  # index of the request among those of one call

PerturbationMessage = Sequence[Any]  # seed, sign, distribution, rank, scale, lowrank_scale


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
