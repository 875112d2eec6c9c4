"""The values that training and engines exchange: seeds, scalars and token ids, never weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SAMPLE_PERSON = b"estune-samp-v1"  # blake2b's personalisation for the uniforms of sampled decoding in training


@dataclass(frozen=True, slots=True)
class Member:
    """One perturbed model: ``theta + sigma * sign * eps(seed)``."""

    seed: int  # unsigned 64-bit
    sign: int  # +1 or -1


class Interrupted(Exception):
    """The run was asked to stop; the current member's answers are discarded."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter as ``save_pretrained`` writes it; ``perturbed`` parameters are perturbed and updated.

    A ``lowrank`` parameter is a matrix (d0, d1), or a stack (E, d0, d1) of one matrix per expert. Its noise is a
    product ``A B^T``; full noise is one number per element.
    """

    name: str
    shape: tuple[int, ...]
    perturbed: bool
    lowrank: bool = False

    @property
    def kind(self) -> str | bool:
        """The parameter's entry in the journal's header: ``full`` or ``lowrank`` noise, or False for no noise."""
        return ("lowrank" if self.lowrank else "full") if self.perturbed else False


def num_parameters(specs: Iterable[ParameterSpec]) -> int:
    """Return the number of scalars in the parameters."""
    return sum(math.prod(spec.shape) for spec in specs)


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of a step's members: scales, distribution, and rank of low-rank noise.

    A scale is sigma divided by the standard deviation of the noise's integers, rounded as in DESIGN section 2.
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
    """One row, tokenised."""

    row_id: int  # the row's index in its split
    text: str  # the model's whole input: template, system message, prompt, response prefix
    token_ids: tuple[int, ...]  # (P,), the tokens of ``text``
    question: str = ""  # the row's own prompt, or the content of its last user message


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
    """Members that answer the same prompts together: the unit of dispatch, journaling and resume.

    ``indices`` are the members' indices in the population. A perturbation of None means theta itself.
    ``theta_checksum`` names the theta that the members perturb; a replica that holds another theta raises ValueError.
    """

    indices: tuple[int, ...]  # (M,)
    perturbations: tuple[Perturbation | None, ...]  # (M,)
    theta_checksum: str
    prompts: tuple[Prompt, ...]  # (B,)
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class GroupAnswer:
    """The completions of a `GroupJob` and the time that they took."""

    indices: tuple[int, ...]  # (M,)
    completions: list[list[list[Completion]]]  # (M, B, G)
    generate_s: float  # seconds, without perturb_s
    perturb_s: float  # seconds spent on writing the members' weights


@dataclass(frozen=True, slots=True)
class Completion:
    """Generated tokens, with the end-of-sequence token; ``finished`` is false if the length limit cut them off.

    ``finite`` is false if a token's logits held NaN or its own logit was infinite: its computation overflowed.
    """

    token_ids: tuple[int, ...]  # (T,)
    finished: bool
    finite: bool = True
