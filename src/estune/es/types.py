"""The plain values that cross the line to an engine: seeds, scalars and token ids, never weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SAMPLE_PERSON = b"estune-samp-v1"  # blake2b person of the uniforms of sampled decoding in training


@dataclass(frozen=True, slots=True)
class Member:
    """One perturbed model: ``theta + sigma * sign * eps(seed)``."""

    seed: int  # unsigned 64-bit
    sign: int  # +1 or -1


class Interrupted(Exception):
    """The run was asked to stop: the member being evaluated was dropped."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter as ``save_pretrained`` writes it; ``perturbed`` parameters are perturbed and updated.

    The noise of a ``lowrank`` one is a product ``A B^T`` instead of a number for every element: it is a matrix
    (d0, d1), or a stack (E, d0, d1) of one matrix per expert.
    """

    name: str
    shape: tuple[int, ...]
    perturbed: bool
    lowrank: bool = False

    @property
    def kind(self) -> str | bool:
        """What the journal's header says of the parameter: ``full`` or ``lowrank`` noise, or False for none."""
        return ("lowrank" if self.lowrank else "full") if self.perturbed else False


def num_parameters(specs: Iterable[ParameterSpec]) -> int:
    """Return the number of scalars in some parameters."""
    return sum(math.prod(spec.shape) for spec in specs)


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of a step's members: its size, its distribution, and the rank of low-rank noise.

    Scales are sigma over the deviation of the noise's integers, rounded as in DESIGN section 2.
    """

    scale: float  # of parameters with full noise
    distribution: str = "normal"
    rank: int = 0  # columns of A and B; 0: every parameter has full noise
    lowrank_scale: float = 0.0  # of parameters with low-rank noise


@dataclass(frozen=True, slots=True)
class Perturbation:
    """One member of theta: ``theta + scale * sign * n``, and ``lowrank_scale * sign * (A B^T)`` for low-rank noise."""

    member: Member
    noise: Noise


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row, tokenised; the response prefix is part of ``token_ids``."""

    row_id: int  # the row's index in its split
    text: str  # all that the model reads: templates, system message, response prefix
    token_ids: tuple[int, ...]  # (P,)
    question: str = ""  # what the row itself asks: its prompt, or the last user message's content


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are decoded; ``temperature`` 0 is greedy.

    Sampled tokens are a pure function of (seed, step, row, completion, token position), the same for every member.
    """

    seed: int
    step: int
    max_completion_length: int  # tokens
    num_generations: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop_strings: tuple[str, ...] = ()
    person: bytes = SAMPLE_PERSON


@dataclass(frozen=True, slots=True)
class GroupJob:
    """Members that answer the same prompts together: the unit of dispatch, of journaling and of resume.

    ``indices`` are the members' places in the population. A perturbation of None stands for theta itself.
    ``theta_checksum`` names the theta that the members are perturbations of; a replica that holds another one refuses.
    """

    indices: tuple[int, ...]  # (M,)
    perturbations: tuple[Perturbation | None, ...]  # (M,)
    theta_checksum: str
    prompts: tuple[Prompt, ...]  # (B,)
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class GroupAnswer:
    """The completions of a `GroupJob` and the seconds that they took."""

    indices: tuple[int, ...]  # (M,)
    completions: list[list[list[Completion]]]  # (M, B, G)
    generate_s: float  # without perturb_s
    perturb_s: float  # writing the members' weights


@dataclass(frozen=True, slots=True)
class Completion:
    """Generated tokens, the end-of-sequence token included; ``finished`` is false where the limit cut them off.

    ``finite`` is false where the logits behind a token held NaN, or the chosen one was infinite: the model computes
    with numbers that its dtype cannot hold.
    """

    token_ids: tuple[int, ...]  # (T,)
    finished: bool
    finite: bool = True
