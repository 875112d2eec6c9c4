"""Do rollouts repeat? A batch of a step is answered twice, the second time under load, before a run begins.

Libraries choose their code by shape, so the batch keeps its rows, cut only where more would choose the same; what is
cut first is their length, because under load two threads are many times slower.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from estune.engines.hf.small_linear import MAX_ROWS
from estune.es.types import Perturbation, Prompt, Sampling

if TYPE_CHECKING:
    from estune.engines.hf.engine import HFEngine

ROWS = MAX_ROWS + 16  # with more, layers take the same code
PROMPT_TOKENS, NEW_TOKENS = 1024, 3  # of all rows together, and of a completion


def answers_repeat(
    engine: HFEngine, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
) -> bool:
    """Say whether members (M) give the same tokens for prompts (B) alone and beside a busy thread."""
    short = replace(sampling, max_completion_length=min(NEW_TOKENS, sampling.max_completion_length))
    few = list(prompts[: engine.prompts_per_batch])
    enough = -(-ROWS // (len(few) * (sampling.num_generations if sampling.temperature else 1)))
    tried = list(perturbations[:enough])
    longest = max(2, PROMPT_TOKENS // (len(few) * len(tried)))
    few = [replace(prompt, token_ids=prompt.token_ids[-longest:]) for prompt in few]
    alone = engine.generate_population(tried, few, short)
    stop = threading.Event()
    load = threading.Thread(target=_keep_busy, args=(stop,), daemon=True)
    load.start()
    try:
        engine.master_changed()  # write the weights again, too
        loaded = engine.generate_population(tried, few, short)
    finally:
        stop.set()
        load.join()
    return alone == loaded


def _keep_busy(stop: threading.Event) -> None:
    values = np.ones((256, 256))
    while not stop.is_set():
        values = np.tanh(values @ values * 1e-3)
