"""Compares the throughput of transformers, vLLM, and two Ray workers of each, with low-rank members.

    estune fetch smollm2-135m
    .venv-vllm/bin/python benchmarks/engines.py          # about 10 minutes on 2 cores

All engines stay open. In every round each of them answers the same groups of members once, in turn; the first round
only warms up. Figures are medians over rounds of tokens a second, and ratios to transformers in one process. The result
is written to `benchmarks/results/engines.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from record import write_result

from estune.engines.base import EngineOptions
from estune.es.population import members_for_step, noise_of
from estune.es.types import GroupJob, Perturbation, Prompt, Sampling

GROUPS, MEMBERS, PROMPTS, TOKENS = 4, 6, 8, 32


def openers(model: str, cores: int) -> dict[str, Callable[[], Any]]:
    """Return a function for each setting that opens its engine."""
    from estune.engines.hf.engine import HFEngine
    from estune.engines.ray.cluster import Limits
    from estune.engines.ray.engine import RayEngine
    from estune.engines.vllm.engine import VLLMEngine

    options = EngineOptions(model=model, dtype="float32", noise="lowrank", num_threads=cores)
    single = dataclasses.replace(options, num_threads=max(1, cores // 2))
    limits = Limits(2, {"CPU": 0.5}, 600.0)
    return {
        "hf": lambda: HFEngine.open(options),
        "vllm": lambda: VLLMEngine.open(options),
        "hf, 2 workers": lambda: RayEngine(HFEngine, single, limits),
        "vllm, 2 workers": lambda: RayEngine(VLLMEngine, single, limits),
    }


def jobs(checksum: str) -> list[GroupJob]:
    """Return the groups; the tokens of their prompts are random."""
    rng = np.random.default_rng(0)
    prompts = tuple(Prompt(i, "", tuple(rng.integers(100, 40_000, 40).tolist())) for i in range(PROMPTS))
    noise = noise_of(0.01, "normal", 1)
    members = [Perturbation(member, noise) for member in members_for_step(0, 0, GROUPS * MEMBERS, False)]
    sampling = Sampling(seed=0, step=0, max_completion_length=TOKENS)
    indices = [tuple(range(g * MEMBERS, (g + 1) * MEMBERS)) for g in range(GROUPS)]
    return [GroupJob(i, tuple(members[m] for m in i), checksum, prompts, sampling) for i in indices]


def one_round(engine: Any) -> dict[str, float]:
    """Return tokens a second of one answer to all groups, and the workers' idle share if there are workers."""
    started = time.perf_counter()
    answers = list(engine.answers(jobs(engine.theta_checksum)))
    seconds = time.perf_counter() - started
    tokens = sum(len(each.token_ids) for answer in answers for member in answer.completions for row in member
                 for each in row)  # fmt: skip
    return {"tokens_per_s": tokens / seconds, "idle_share": engine.take_metrics().get("es/idle_share", 0.0)}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    engines = {name: make() for name, make in openers(options.model, options.cores).items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for number in range(options.rounds + 1):
        for name, engine in engines.items():
            found = one_round(engine)
            if number:
                rounds[name].append(found)
            print(f"{number} {name}: {found['tokens_per_s']:.0f} tokens/s", flush=True)
    figures = {}
    for name, found_rounds in rounds.items():
        ratios = [
            own["tokens_per_s"] / base["tokens_per_s"] for own, base in zip(found_rounds, rounds["hf"], strict=True)
        ]
        figures[name] = {
            "tokens_per_s": statistics.median(each["tokens_per_s"] for each in found_rounds),
            "ratio_to_hf": statistics.median(ratios),
            "ratios": ratios,
            "idle_share": statistics.median(each["idle_share"] for each in found_rounds),
        }
    for engine in engines.values():
        engine.stop()
    setting = {"model": Path(options.model).name, "groups": GROUPS, "members": MEMBERS, "prompts": PROMPTS,
               "tokens": TOKENS, "cores": options.cores, "dtype": "float32", "rank": 1}  # fmt: skip
    write_result("engines", {"setting": setting, "engines": figures})


if __name__ == "__main__":
    main()
