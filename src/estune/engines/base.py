"""The protocols between training and a generation backend.

A `Generator` answers groups of members, in any order. A `Replica` (`estune.es.replica`) owns theta. An `Engine` is
both. A `LocalEngine` also gives access to theta in this process. Training and engine exchange
seeds, scalars and token ids only, so a remote engine differs from a local one in transport alone.
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
    """Properties of an engine that training reads."""

    name: str  # as in ``--engine``
    device: str  # cpu, cuda or mps
    dtype: str  # compute dtype: float32, bfloat16 or float16
    max_context: int | None  # tokens; None: unlimited
    vocab_size: int | None  # rows of the input embedding, an upper bound of token ids; None: unlimited
    shared_forward: bool  # whether low-rank members share one forward pass
    header: Mapping[str, Any]  # the engine's fields in the journal's header


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of `LocalEngine.open`."""

    model: str  # a directory, a hub id, or a name that the engine knows
    module: Any = None  # a model in memory, used instead of ``model``
    tokenizer: Any = None  # replaces the model's own
    dtype: str = "auto"  # compute dtype
    device: str = "auto"
    revision: str | None = None  # revision on the hub
    trust_remote_code: bool = False
    num_threads: int = 1
    prompts_per_batch: int = 64  # prompts in one forward pass, each with all its completions
    trainable_parameters: Sequence[str] | None = None  # regexes searched in stored names; None: train all parameters
    noise: str = "full"  # full or lowrank
    tensor_parallel_size: int = 1  # processes that share one model, for engines that support it


class ModelAssets(Protocol):
    """The parts of a model that are not weights: tokenizer, configuration, code. They are local to the trainer."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None if prompts are bytes."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end a completion and are its last token; may be empty."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion's tokens, without special tokens."""

    def save(self, directory: Path, dtype: str) -> None:
        """Write the files of a checkpoint of ``dtype``, except for the weights; the files hold no times or paths."""

    def check(self) -> None:
        """Call `save` with a temporary directory and compare the files with the model in memory.

        Raises:
            UserError: the files cannot be written, or they describe another model than the one in memory.
        """

    def identity(self) -> dict[str, Any]:
        """Return values that determine the answers beside the weights; a resume compares them.

        ``end_tokens`` is a sorted list. ``config``, ``tokenizer`` and ``code`` are digests; ``code`` covers the Python
        files that come with the model, and is empty if they are not run. Chat templates are not included. The toy
        engine's identity is empty.
        """


class Generator(Protocol):
    """Answers prompts with theta or with members of theta."""

    @property
    def facts(self) -> EngineFacts:
        """Properties of the engine that training reads."""

    def answers(
        self, jobs: Iterable[GroupJob], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[GroupAnswer]:
        """Yield one answer for each job when it is complete, in any order; `estune.train.rollouts` checks each answer.

        A completion has at most ``max_completion_length`` tokens, which are smaller than `EngineFacts.vocab_size`.

        Raises:
            Interrupted: ``should_stop`` returned true between two tokens.
            ValueError: a job is meant for another theta.
        """

    def members_that_fit(self, members: int, rows: int, length: int, rank: int, sampled: bool = False) -> int:
        """Return how many low-rank members should share a forward pass: as many as fit in memory and are efficient.

        Args:
            members: number of members; the result lies in 1 .. ``members``.
            rows: completions per member in one forward pass.
            length: tokens of the longest row, prompt and completion together.
            rank: rank of the low-rank noise.
            sampled: whether tokens are sampled, which needs additional memory.
        """

    def perturb_cosine(self, perturbation: Perturbation) -> dict[str, float]:
        """Return the cosine of the cast perturbation with the exact perturbation, by kind of parameter."""

    def check_reproducible(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
    ) -> bool:
        """Return whether members (M) answer prompts (B) with the same tokens twice; hf answers again under load."""

    def take_metrics(self) -> dict[str, float]:
        """Return the engine's own metrics of the time since the last call; they join those of the step."""

    def stop(self) -> None:
        """Release threads, processes and connections."""


class Engine(Generator, Replica, Protocol):
    """A backend that a run trains with, and that evaluations use: in this process, or in workers."""

    prompts_per_batch: int  # prompts in one forward pass, each with all its completions; may change between calls

    @property
    def assets(self) -> ModelAssets:
        """The parts of the model that are not weights."""

    def load_theta(self) -> None:
        """Write theta, cast to the compute dtype, into the model in this process, if there is one."""

    def generate(
        self,
        perturbation: Perturbation | None,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Completion]]:
        """Return the completions (B, G) of one member, or of theta (``None``), for prompts (B).

        Raises:
            Interrupted: ``should_stop`` returned true between two tokens.
        """

    def token_logprobs(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return theta's natural log-probability of every token; ``completions`` holds one completion per prompt."""


class LocalEngine(Engine, Protocol):
    """An engine in this process, with access to theta, which baselines need.

    Its class method ``open(options: EngineOptions)`` returns an engine.
    """

    theta: Theta

    def assign(self, read: Callable[[str], Any]) -> None:
        """Overwrite theta: ``read(name)`` returns a parameter's new value, of any floating dtype and device."""

    def assign_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Overwrite theta with float32 arrays, by stored name."""


class EngineClass(Protocol):
    """The class of a local engine, which `--engine` names. ``name`` is the model where ``--model`` is left out."""

    def open(self, options: EngineOptions) -> LocalEngine:
        """Return an engine with its model loaded.

        Raises:
            UserError: the model is missing or damaged, or an option cannot be used.
        """
