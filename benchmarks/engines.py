"""Compares the engines of transformers and vLLM: their throughput, also in Ray workers, and their runs and answers.

    estune fetch smollm2-135m
    .venv-vllm/bin/python benchmarks/engines.py throughput    # about 10 minutes on 2 cores
    .venv-vllm/bin/python benchmarks/engines.py agreement     # about 20 minutes on 2 cores

`throughput`: transformers, vLLM, and two Ray workers of each, with low-rank members. All engines stay open. In every
round each of them answers the same groups of members once, in turn; the first round only warms up. Figures are medians
over rounds of tokens a second, and ratios to transformers in one process. The result is written to
`benchmarks/results/engines.json`.

`agreement`: both engines run `configs/conciseness_smollm2.yaml` on SmolLM2 with one seed. They round differently, so
tokens whose logits nearly tie may differ between engines. Where no reward depends on such a token, both runs end in the
same theta. Then both engines answer the 8 test prompts and the 200 questions of the task with the base, and with the
theta that the run through transformers ended in. An answer agrees if its text is the same. The result is written to
`benchmarks/results/agreement.json`, with the pairs that differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
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
ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "conciseness_smollm2.yaml"
ESTUNE = [sys.executable, "-m", "estune"]
ENGINES = ("hf", "vllm")
SPLITS = ("test", "knowledge")
ANSWER_TOKENS = 40  # most tokens of an answer, as in the configuration


# --- throughput -------------------------------------------------------------------------------------------------------


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


def throughput(model: str, n_rounds: int, cores: int) -> None:
    """Measure all engines, print and write the result."""
    engines = {name: make() for name, make in openers(model, cores).items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for number in range(n_rounds + 1):
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
    setting = {"model": Path(model).name, "groups": GROUPS, "members": MEMBERS, "prompts": PROMPTS,
               "tokens": TOKENS, "cores": cores, "dtype": "float32", "rank": 1}  # fmt: skip
    write_result("engines", {"setting": setting, "engines": figures})


# --- agreement --------------------------------------------------------------------------------------------------------


def lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def train(model: str, engine: str, seed: int, run: Path) -> dict[str, Any]:
    """Train through an engine; return held-out distances, theta's fingerprint, and the members' fitness."""
    command = [*ESTUNE, "train", "--config", str(CONFIG), "--model", model, "--engine", engine, "--dtype", "float32",
               "--seed", str(seed), "--output_dir", str(run), "--report_to", "none"]  # fmt: skip
    subprocess.run(command, check=True)
    steps = [record for record in lines(run / "journal.jsonl") if record["kind"] == "step"]
    return {
        "distances": [-row["eval_reward"] for row in lines(run / "metrics.jsonl") if "eval_reward" in row],
        "fingerprint": json.loads((run / "es_state.json").read_text(encoding="utf-8"))["fingerprint"],
        "fitness": [step["fitness"] for step in steps],
    }


def answer(model: str, engine: str, split: str, place: Path) -> tuple[dict[str, float], list[str]]:
    """Return a model's distance and accuracy on a split, and its greedy answers."""
    rows = place / "rows.jsonl"
    command = [*ESTUNE, "evaluate", "--model", model, "--task", "conciseness", "--split", split, "--engine", engine,
               "--dtype", "float32", "--max_completion_length", str(ANSWER_TOKENS), "--rows", str(rows),
               "--json"]  # fmt: skip
    done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {"distance": -done["reward"], "accuracy": done["accuracy"]}, [r["completions"][0] for r in lines(rows)]


def compare(model: str, split: str, place: Path) -> dict[str, Any]:
    """Return both engines' scores on a split, the share of equal answers, and the pairs that differ."""
    scores, texts = {}, {}
    for engine in ENGINES:
        scores[engine], texts[engine] = answer(model, engine, split, place)
    pairs = list(zip(*(texts[engine] for engine in ENGINES), strict=True))
    different = [dict(zip(ENGINES, pair, strict=True)) for pair in pairs if pair[0] != pair[1]]
    return {"scores": scores, "rows": len(pairs), "equal": len(pairs) - len(different), "different": different}


def agreement(model: str, seed: int) -> None:
    """Train and answer through both engines, print and write the result."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        runs = {engine: train(model, engine, seed, place / engine) for engine in ENGINES}
        greedy = {
            of: {split: compare(path, split, place) for split in SPLITS}
            for of, path in (("base", model), ("tuned", str(place / "hf")))
        }
    fitness = {engine: run.pop("fitness") for engine, run in runs.items()}
    same = [own == other for own, other in zip(*fitness.values(), strict=True)]
    result = {
        "model": Path(model).name,
        "config": CONFIG.name,
        "seed": seed,
        "runs": runs,
        "steps": len(same),
        "steps_with_equal_fitness": sum(same),
        "same_theta": len({run["fingerprint"] for run in runs.values()}) == 1,
        "greedy": greedy,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "greedy"}, indent=1))
    for of, splits in greedy.items():
        for split, found in splits.items():
            print(f"{of}, {split}: {found['equal']} of {found['rows']} greedy answers equal")
    print(write_result("agreement", result))


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure one of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "agreement"))
    parser.add_argument("--model", default="models/smollm2-135m", help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=5, help="of throughput")
    parser.add_argument("--cores", type=int, default=2, help="for throughput")
    parser.add_argument("--seed", type=int, default=0, help="of the runs of agreement")
    options = parser.parse_args()
    if options.what == "throughput":
        throughput(options.model, options.rounds, options.cores)
    else:
        agreement(str(Path(options.model).resolve()), options.seed)


if __name__ == "__main__":
    main()
