"""Trains conciseness on SmolLM2 through vLLM and through transformers, and compares runs and greedy answers.

    estune fetch smollm2-135m
    .venv-vllm/bin/python benchmarks/agreement.py          # about 20 minutes on 2 cores

Both engines run `configs/conciseness_smollm2.yaml` with one seed. They round differently, so tokens whose logits nearly
tie may differ between engines. Where no reward depends on such a token, both runs end in the same theta.

Then both engines answer the 8 test prompts and the 200 questions of the task with the base, and with the theta that the
run through transformers ended in. An answer agrees if its text is the same. The result is written to
`benchmarks/results/agreement.json`, with the pairs that differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import write_result

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "conciseness_smollm2.yaml"
ESTUNE = [sys.executable, "-m", "estune"]
ENGINES = ("hf", "vllm")
SPLITS = ("test", "knowledge")
TOKENS = 40  # most tokens of an answer, as in the configuration


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
               "--dtype", "float32", "--max_completion_length", str(TOKENS), "--rows", str(rows), "--json"]  # fmt: skip
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


def main() -> None:
    """Run all and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = str(Path(options.model).resolve())
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        runs = {engine: train(model, engine, options.seed, place / engine) for engine in ENGINES}
        greedy = {
            of: {split: compare(path, split, place) for split in SPLITS}
            for of, path in (("base", model), ("tuned", str(place / "hf")))
        }
    fitness = {engine: run.pop("fitness") for engine, run in runs.items()}
    same = [own == other for own, other in zip(*fitness.values(), strict=True)]
    result = {
        "model": Path(model).name,
        "config": CONFIG.name,
        "seed": options.seed,
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


if __name__ == "__main__":
    main()
