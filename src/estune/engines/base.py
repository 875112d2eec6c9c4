"""What the trainer needs of a generation backend, and the plain values that cross that line.

An engine owns a replica of theta (`master`) and answers prompts with theta or with a perturbed member of it. It takes
and returns token ids; prompts are built once, in `estune.data`. What crosses the line is small on purpose (seeds,
scalars, token ids), so that a remote engine differs from a local one in transport only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from estune.es.types import Completion, Perturbation, Prompt, Sampling

if TYPE_CHECKING:
    from estune.es.theta import HostTheta


class Engine(Protocol):
    """A replica of theta that answers prompts."""

    master: HostTheta
    max_context: int | None  # tokens; None: unlimited
    vocab_size: int | None  # rows of the input embedding: token ids lie below it; None: unlimited
    tokenizer: Any  # None where prompts are bytes (the toy engine)
    compute_dtype: str  # float32, bfloat16 or float16
    stored_dtypes: dict[str, str]  # per stored name: some models keep a few tensors in float32 whatever the rest is
    perturb_s: float  # seconds spent so far in writing members' weights
    prompts_per_batch: int  # prompts in one forward pass, each with all its completions; may be changed between calls

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end a completion, the last of its tokens; empty where none does (the toy engine)."""

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

    def generate_population(
        self,
        perturbations: Sequence[Perturbation],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[list[Completion]]]:
        """Answer ``prompts`` (B) with several members (M), as `generate` does with one: (M, B, G) completions.

        Raises:
            Interrupted: ``should_stop`` turned true between two tokens.
        """

    def members_that_fit(self, members: int, rows: int, length: int, rank: int, sampled: bool = False) -> int:
        """Say how many of ``members`` low-rank members should answer together: what fits in memory and is worth it.

        Args:
            members: all there are; the answer lies in 1 .. ``members``.
            rows: completions that each of them makes at a time.
            length: tokens of the longest row, prompt and completion.
            rank: of their noise.
            sampled: whether tokens are sampled, which takes memory of its own.
        """

    def load_theta(self) -> None:
        """Put theta itself into the working model, cast to the compute dtype."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion's tokens, special tokens left out."""

    def token_logprobs(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the natural log-probability under theta of every token of one completion per prompt."""

    def master_changed(self) -> None:
        """Theta was written: forget everything derived from it."""

    def save_assets(self, directory: Path, dtype: str) -> None:
        """Write what a checkpoint of ``dtype`` holds beside its weights; no times, no paths."""

    def check_assets(self) -> None:
        """Write what `save_assets` writes into a directory that is removed, and compare it with the weights.

        Raises:
            UserError: it cannot be written, or describes another model than the one in memory.
        """

    def identity(self) -> dict[str, Any]:
        """Return what decides answers beside the weights, so that a resumed run can compare it.

        ``end_tokens`` is a sorted list; ``config``, ``tokenizer`` and ``code`` are digests, the last of the Python
        files that come with the model (empty where none is run). Chat templates are no part of it. Empty where nothing
        but the weights decides (the toy engine).
        """

    def perturb_cosine(self, perturbation: Perturbation) -> dict[str, float]:
        """Return, per kind of parameter, the cosine of the cast perturbation with the exact one."""

    def check_reproducible(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
    ) -> bool:
        """Answer prompts (B) with members (M) twice, the second time under load; say whether the tokens were equal."""

    def info(self) -> dict[str, Any]:
        """Return what a journal's header should say of the engine: device, model type and the like."""
