"""The loop of arXiv 2509.24372 as the paper describes it, member after member: what estune is measured against.

Written from the paper's description alone. A member is its seed: torch draws the noise of one parameter after another
from a generator that starts at the seed, adds sigma times it to the weights in place, and draws it again to take it off
and once more for the member's share of the update. Answers come from ``generate`` of transformers, greedy, the step's
prompts as one left-padded batch. (Its reference code seeds the generator anew for every parameter, which gives
equal-shaped parameters equal noise; drawing on from one generator costs the same.)
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch


def now() -> float:
    """Return a clock's seconds, when a GPU that is in use has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


PARTS = ("perturb", "generate", "restore", "update")


class PaperLoop:
    """One model, perturbed and restored in place."""

    def __init__(self, model: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> None:
        """Take a model and a batch of prompts, ``ids`` and ``mask`` (B, P); it must not stop before ``new_tokens``."""
        self.model = model
        self.ids, self.mask, self.new_tokens = ids, mask, new_tokens
        self.parameters = list(model.parameters())  # tied ones once

    @torch.inference_mode()
    def add_noise(self, seed: int, factor: float) -> None:
        """Add ``factor * eps(seed)`` to every parameter, the noise of one parameter at a time in memory."""
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
            RuntimeError: a sequence ended early, so that the times would be of other work.
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
    """Return the median of each part over some samples."""
    return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}


def time_members(loop: PaperLoop, members: int = 5, sigma: float = 1e-3) -> dict[str, float]:
    """Return the median seconds per member and part over ``members`` members, after one that is not counted."""
    samples = [loop.time_member(seed, sigma, 1e-9) for seed in range(members + 1)]
    return medians(samples[1:])
