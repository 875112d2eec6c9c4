"""Do rollouts repeat? A batch of a step is answered twice, the second time under load, before a run begins.

Libraries choose their code by shape, so the batch keeps its rows, cut only where more would choose the same; what is
cut first is their length, because under load two threads are many times slower.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from estune.es.types import Completion, Perturbation, Prompt, Sampling

MORE_ROWS = 16  # rows beyond the engine's limit for small batches: with more, layers take the same code
PROMPT_TOKENS, NEW_TOKENS = 1024, 3  # of all rows together, and of a completion


class _Engine(Protocol):
    prompts_per_batch: int

    def generate_population(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[list[list[Completion]]]: ...

    def forget(self) -> None: ...


def answers_repeat(
    engine: _Engine,
    perturbations: Sequence[Perturbation],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    small_rows: int,
) -> bool:
    """Return whether members give the same tokens alone and beside a busy thread.

    Args:
        engine: that answers.
        perturbations: (M,).
        prompts: (B,).
        sampling: how completions are decoded.
        small_rows: rows of a batch up to which the engine's layers take code of their own.
    """
    short = replace(sampling, max_completion_length=min(NEW_TOKENS, sampling.max_completion_length))
    few = list(prompts[: engine.prompts_per_batch])
    enough = -(-(small_rows + MORE_ROWS) // (len(few) * (sampling.num_generations if sampling.temperature else 1)))
    tried = list(perturbations[:enough])
    longest = max(2, PROMPT_TOKENS // (len(few) * len(tried)))
    few = [replace(prompt, token_ids=prompt.token_ids[-longest:]) for prompt in few]
    alone = engine.generate_population(tried, few, short)
    stop = threading.Event()
    load = threading.Thread(target=_keep_busy, args=(stop,), daemon=True)
    load.start()
    try:
        engine.forget()  # write the weights again, too
        loaded = engine.generate_population(tried, few, short)
    finally:
        stop.set()
        load.join()
    return alone == loaded


def _keep_busy(stop: threading.Event) -> None:
    values = np.ones((256, 256))
    while not stop.is_set():
        values = np.tanh(values @ values * 1e-3)
