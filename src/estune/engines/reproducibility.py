"""A trial before a run begins: members answer a batch twice, the second time under load, and the tokens are compared.

Libraries choose their kernels by shape, so the trial keeps the number of rows of a real batch, up to a limit above
which the kernels are the same. It shortens prompts and completions instead, because decoding under load is slow.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from estune.es.types import Completion, Perturbation, Prompt, Sampling

MORE_ROWS = 16  # rows above the engine's limit for small batches; larger batches use the same kernels
PROMPT_TOKENS, NEW_TOKENS = 1024, 3  # tokens of all prompts together, and of one completion


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
        engine: the engine under trial.
        perturbations: members, (M,).
        prompts: (B,).
        sampling: the run's decoding options.
        small_rows: largest number of rows for which the engine's layers use their own kernel.
    """
    short = replace(sampling, max_completion_length=min(NEW_TOKENS, sampling.max_completion_length))
    batch = list(prompts[: engine.prompts_per_batch])
    n_members = -(-(small_rows + MORE_ROWS) // (len(batch) * (sampling.num_generations if sampling.temperature else 1)))
    members = list(perturbations[:n_members])
    longest = max(2, PROMPT_TOKENS // (len(batch) * len(members)))
    batch = [replace(prompt, token_ids=prompt.token_ids[-longest:]) for prompt in batch]
    alone = engine.generate_population(members, batch, short)
    stop = threading.Event()
    load = threading.Thread(target=_keep_busy, args=(stop,), daemon=True)
    load.start()
    try:
        engine.forget()  # the second answers also need the weights written again
        loaded = engine.generate_population(members, batch, short)
    finally:
        stop.set()
        load.join()
    return alone == loaded


def _keep_busy(stop: threading.Event) -> None:
    values = np.ones((256, 256))
    while not stop.is_set():
        values = np.tanh(values @ values * 1e-3)
