"""The loop of arXiv 2509.24372 as the paper describes it, the baseline of the step's benchmark.

It is written from the paper's description alone. Members are evaluated one after another. A member is a seed: torch
draws the noise of one parameter after another from a generator that starts at the seed, and adds sigma times the noise
to the weights in place. It draws the noise again to subtract it, and once more for the member's share of the update.
``generate`` of transformers answers greedily, with the step's prompts as one left-padded batch. (The paper's reference
code restarts the generator for every parameter, so that parameters of equal shape have equal noise. One generator costs
the same.)
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch


def now() -> float:
    """Return a clock's reading in seconds; if a GPU is in use, wait for its work first."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


PARTS = ("perturb", "generate", "restore", "update")


class PaperLoop:
    """One model, perturbed and restored in place."""

    def __init__(self, model: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> None:
        """Take a model and a batch of prompts, ``ids`` and ``mask`` (B, P).

        The model must not end a completion before ``new_tokens``.
        """
        self.model = model
        self.ids, self.mask, self.new_tokens = ids, mask, new_tokens
        self.parameters = list(model.parameters())  # tied parameters occur once

    @torch.inference_mode()
    def add_noise(self, seed: int, factor: float) -> None:
        """Add ``factor * eps(seed)`` to every parameter; memory holds the noise of one parameter at a time."""
        for parameter, noise in self._noise(seed):
            parameter.add_(noise, alpha=factor)

    @torch.inference_mode()
    def generate(self) -> torch.Tensor:
        """Return the new tokens (B, T)."""
        output = self.model.generate(
            input_ids=self.ids, attention_mask=self.mask, do_sample=False, max_new_tokens=self.new_tokens
        )
        new: torch.Tensor = output[:, self.ids.shape[1] :]
        return new

    def time_member(self, seed: int, sigma: float, share: float) -> dict[str, float]:
        """Return the seconds of each part for one member; ``share`` is learning_rate / N * its utility.

        Raises:
            RuntimeError: a completion ended early, so that the times would be too short.
        """
        readings = [now()]
        self.add_noise(seed, sigma)
        readings.append(now())
        tokens = self.generate()
        readings.append(now())
        self.add_noise(seed, -sigma)
        readings.append(now())
        self.add_noise(seed, share)
        readings.append(now())
        if tokens.shape != (len(self.ids), self.new_tokens):
            raise RuntimeError(f"{tuple(tokens.shape)} tokens, not {(len(self.ids), self.new_tokens)}")
        parts = dict(zip(PARTS, (b - a for a, b in itertools.pairwise(readings)), strict=True))
        return parts | {"member": readings[-1] - readings[0]}

    def _noise(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator(self.ids.device).manual_seed(seed)
        for parameter in self.parameters:
            yield (
                parameter,
                torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype, device=self.ids.device),
            )


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each part over all samples."""
    return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}


def time_members(loop: PaperLoop, members: int = 5, sigma: float = 1e-3) -> dict[str, float]:
    """Return the median seconds of each part over ``members`` members, after a warm-up member."""
    samples = [loop.time_member(seed, sigma, 1e-9) for seed in range(members + 1)]
    return medians(samples[1:])
