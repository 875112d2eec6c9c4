"""The values that training and engines exchange: seeds, scalars and token ids, never weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

SAMPLE_PERSON = b"estune-samp-v1"  # purpose of the random numbers that choose sampled tokens in training


@dataclass(frozen=True, slots=True)
class Member:
    """A seed and a sign: they identify the perturbed model ``theta + sigma * sign * eps(seed)`` of a step."""

    seed: int  # unsigned 64-bit
    sign: int  # +1 or -1; 0: theta itself, which answers in the same batch as members


class Interrupted(Exception):
    """The run was asked to stop; the answers of incomplete members are discarded."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter as ``save_pretrained`` writes it, and the kind of its noise.

    A ``lowrank`` parameter is a matrix (d0, d1), or a stack (E, d0, d1) of one matrix per expert. Its noise is a
    product ``A B^T``; full noise is one number per element.
    """

    name: str
    shape: tuple[int, ...]
    perturbed: bool  # False: members and updates leave the parameter as it is
    lowrank: bool = False

    @property
    def kind(self) -> Literal["full", "lowrank", False]:
        """The kind of noise as the journal's header stores it; False: the parameter is not perturbed."""
        return ("lowrank" if self.lowrank else "full") if self.perturbed else False


def num_parameters(specs: Iterable[ParameterSpec]) -> int:
    """Return the number of scalars in the parameters."""
    return sum(math.prod(spec.shape) for spec in specs)


@dataclass(frozen=True, slots=True)
class Noise:
    """What all members of a step share: the scales of their noise, its distribution, and its rank.

    A scale is sigma divided by the standard deviation of the noise's integers, rounded to 16 significant bits
    (docs/reproducibility.md).
    """

    scale: float  # of parameters with full noise
    distribution: str = "normal"
    rank: int = 0  # columns of A and B; 0: every parameter has full noise
    lowrank_scale: float = 0.0  # of parameters with low-rank noise


@dataclass(frozen=True, slots=True)
class Perturbation:
    """A member with its step's noise: all that an engine needs to compute the member's weights from theta.

    The weights are ``theta + scale * sign * n``, or ``theta + lowrank_scale * sign * (A B^T)`` for low-rank noise.
    """

    member: Member
    noise: Noise


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one dataset row, as text and as tokens."""

    row_id: int  # the row's index in its split
    text: str  # the model's whole input: template, system message, prompt, response prefix
    token_ids: tuple[int, ...]  # (P,), the tokens of ``text``
    question: str = ""  # the prompt in the dataset, or the content of its last user message


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
    person: bytes = SAMPLE_PERSON  # purpose of the random numbers; see `estune.es.population.derive_seed`


@dataclass(frozen=True, slots=True)
class GroupJob:
    """A request to an engine: some members, and the prompts that all of them answer. It is answered as a whole.

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
    generate_s: float  # seconds spent on generation, without ``perturb_s``
    perturb_s: float  # seconds spent on writing the members' weights


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated answer: its tokens, including the end-of-sequence token.

    ``finished`` is false if the length limit cut the answer off. ``finite`` is false if the model's computation
    overflowed: the logits of a step held NaN, or the chosen token's logit was infinite.
    """

    token_ids: tuple[int, ...]  # (T,)
    finished: bool
    finite: bool = True
