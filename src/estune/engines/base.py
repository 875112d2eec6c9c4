"""The seam between training and a generation backend: what an engine answers, and what it is asked.

A `Generator` answers groups of members, in any order. A `Replica` (`estune.es.replica`) owns theta. An `Engine` is
both. A `LocalEngine` also gives access to theta and to single prompts in this process. What crosses the seam is small
(seeds, scalars, token ids), so that a remote engine differs from a local one in transport only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from estune.es.replica import Replica
from estune.es.theta import Theta
from estune.es.types import Completion, GroupAnswer, GroupJob, Perturbation, Prompt, Sampling


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What training needs to know of an engine."""

    name: str  # as in ``--engine``
    device: str  # cpu, cuda or mps
    dtype: str  # that the engine computes in: float32, bfloat16 or float16
    max_context: int | None  # tokens; None: unlimited
    vocab_size: int | None  # rows of the input embedding: token ids lie below it; None: unlimited
    shared_forward: bool  # whether low-rank members answer together in one forward pass
    header: Mapping[str, Any]  # what a journal's header says of the engine


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is opened with."""

    model: str  # a directory, a hub id, or a name that the engine knows
    module: Any = None  # a model in memory, used instead of ``model``
    tokenizer: Any = None  # used instead of the model's own
    dtype: str = "auto"  # compute dtype
    device: str = "auto"
    revision: str | None = None  # on the hub
    trust_remote_code: bool = False
    num_threads: int = 1
    prompts_per_batch: int = 64  # prompts in one forward pass, each with all its completions
    trainable_parameters: Sequence[str] | None = None  # regexes searched in stored names; None: all are trained
    noise: str = "full"  # or lowrank


class ModelAssets(Protocol):
    """What belongs to a model beside its weights; local to the trainer, whichever engine answers."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None where prompts are bytes."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end a completion, the last of its tokens; empty where none does."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion's tokens, special tokens left out."""

    def save(self, directory: Path, dtype: str) -> None:
        """Write what a checkpoint of ``dtype`` holds beside its weights; no times, no paths."""

    def check(self) -> None:
        """Write what `save` writes into a directory that is removed, and compare it with the weights.

        Raises:
            UserError: it cannot be written, or describes another model than the one in memory.
        """

    def identity(self) -> dict[str, Any]:
        """Return what decides answers beside the weights, so that a resumed run can compare it.

        ``end_tokens`` is a sorted list; ``config``, ``tokenizer`` and ``code`` are digests, the last of the Python
        files that come with the model (empty where none is run). Chat templates are no part of it. Empty where nothing
        but the weights decides (the toy engine).
        """


class Generator(Protocol):
    """Answers prompts with theta or with perturbed members of it."""

    @property
    def facts(self) -> EngineFacts:
        """What training needs to know of the engine."""

    def answers(
        self, jobs: Iterable[GroupJob], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[GroupAnswer]:
        """Yield the answers of groups as they are completed, in any order.

        Raises:
            Interrupted: ``should_stop`` turned true between two tokens.
            ValueError: a job names another theta than the one held.
        """

    def members_that_fit(self, members: int, rows: int, length: int, rank: int, sampled: bool = False) -> int:
        """Return how many of ``members`` low-rank members should answer together: what fits in memory and is worth it.

        Args:
            members: all there are; the answer lies in 1 .. ``members``.
            rows: completions that each of them makes at a time.
            length: tokens of the longest row, prompt and completion.
            rank: of their noise.
            sampled: whether tokens are sampled, which takes memory of its own.
        """

    def perturb_cosine(self, perturbation: Perturbation) -> dict[str, float]:
        """Return, per kind of parameter, the cosine of the cast perturbation with the exact one."""

    def check_reproducible(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
    ) -> bool:
        """Return whether members (M) give equal tokens for prompts (B) twice, the second time under load."""

    def stop(self) -> None:
        """Free what the engine holds beside memory: threads, processes, connections."""


class Engine(Generator, Replica, Protocol):
    """A backend that a run trains with."""

    @property
    def assets(self) -> ModelAssets:
        """What belongs to the model beside its weights."""

    def load_theta(self) -> None:
        """Put theta itself, cast to the compute dtype, where the user of the model finds it: into a local module."""


class LocalEngine(Engine, Protocol):
    """An engine in this process, which baselines, evaluations and comparisons need more of.

    Its class also has ``open(options: EngineOptions)``, which returns one.
    """

    theta: Theta
    prompts_per_batch: int  # prompts in one forward pass, each with all its completions; may be changed between calls

    def generate(
        self,
        perturbation: Perturbation | None,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Completion]]:
        """Answer ``prompts`` (B) with one member, or with theta itself (``None``): (B, G) completions.

        Raises:
            Interrupted: ``should_stop`` turned true between two tokens.
        """

    def assign(self, read: Callable[[str], Any]) -> None:
        """Overwrite theta: ``read(name)`` is each parameter's new value, a tensor of any floating dtype and device."""

    def assign_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Overwrite theta by float32 arrays, by stored name."""

    def token_logprobs(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the natural log-probability under theta of every token of one completion per prompt."""
