"""Compares what `estune probe` predicts with what runs of ten steps then do.

    python benchmarks/probe.py                   # about 1 minute a run; finished parts are not repeated

Two tasks have equal prompts. `countdown` has its own reward. `liked_length` has a reward that prompts do not share: a
hash of the prompt decides whether long or short completions are liked. `mini_sudoku` has another base, and `brief` is
the task `conciseness` on 60 questions, with SmolLM2-135M in `models/smollm2-135m`. A probe of N 30 and B 32 predicts,
for each base and sigma, the gain of ten steps with N 30, B 8 and a learning rate of sigma. A run then takes these
steps. Its gain is the difference of theta's mean reward on held-out problems: 200 of the validation split, 40 for
`brief`. `brief` costs about 40 minutes.

Results are kept in `benchmarks/results/probe.json`; `scripts/evidence.py` draws them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS = 10
LONGEST = 100  # characters
COUNTDOWN: dict[str, Any] = dict(task="countdown", noise="lowrank", max_completion_length=64)
SIGMAS = (0.005, 0.01, 0.02, 0.04)
BASES = ("llama", "qwen2", "gpt2")
CASES: dict[str, dict[str, Any]] = {
    "countdown": COUNTDOWN,
    "liked_length": {**COUNTDOWN, "reward_funcs": [f"{HERE / 'probe.py'}:liked_length"]},
    "mini_sudoku": {**COUNTDOWN, "task": "mini_sudoku", "max_completion_length": 40},
    "brief": {
        "task": "conciseness",
        "noise": "lowrank",
        "max_completion_length": 40,
        "dataset_test_split": "validation",
    },
}
MODELS: dict[str, tuple[str, ...]] = {"mini_sudoku": ("sudoku",), "brief": ("smollm2-135m",)}  # other cases: BASES
TRAINED_QUESTIONS = 60  # of the 100 questions of `brief`; the others are held out
MEMBERS, PROMPTS, PROBED_PROMPTS = 30, 8, 32  # N, B of the runs, B of the probes


def liked_length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Return a reward from 0 to 1 for each completion.

    A hash of the prompt decides whether the reward is the completion's length, in hundreds of characters, or 1 minus
    that.
    """
    lengths = [min(LONGEST, len(text)) / LONGEST for text in completions]
    longer = [hashlib.sha256(prompt.encode()).digest()[0] % 2 == 0 for prompt in prompts]
    return [length if liked else 1 - length for length, liked in zip(lengths, longer, strict=True)]


def options_of(case: str, model: str, place: str) -> dict[str, Any]:
    """Return the options of a probe and a run; the rows of `brief` are written to the directory ``place``."""
    from estune.tasks import get_task

    options = {"model": str(HERE / "bases" / model), "num_threads": 1, **CASES[case], "population_size": MEMBERS}
    if case == "brief":
        options |= {"model": "models/smollm2-135m", "num_threads": "auto", "dataset_name": f"{place}/rows"}
        Path(place, "rows").mkdir()
        rows = get_task("conciseness").load("knowledge_validation")
        for split, part in (("train", rows[:TRAINED_QUESTIONS]), ("validation", rows[TRAINED_QUESTIONS:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            Path(place, "rows", f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return options


def predict(case: str, model: str) -> list[dict[str, Any]]:
    """Probe a model at all sigmas of a case; return one row a sigma."""
    from estune.commands.probe import judge, propose
    from estune.commands.probing import probe
    from estune.config import ESConfig

    with tempfile.TemporaryDirectory() as place:
        found = probe(ESConfig(**options_of(case, model, place), batch_size=PROBED_PROMPTS), SIGMAS)
    proposal = propose(found)
    return [
        {
            "kind": "probe", "case": case, "model": model, "sigma": sigma, "theta": found.theta.mean,
            "highest": found.highest, "members": found.n_members, "harmless": found.is_harmless(sigma),
            "spread": trial.answers.spread, "changed": trial.answers.changed,
            "outlook": dataclasses.asdict(trial.outlook), "verdict": judge(found, proposal).answer,
            "proposal": dataclasses.asdict(proposal),
        }
        for sigma, trial in found.trials.items()
    ]  # fmt: skip


def train(case: str, model: str, sigma: float) -> dict[str, Any]:
    """Run ten steps and return theta's reward on the held-out rows before and after them."""
    from estune import ESConfig, ESTrainer

    with tempfile.TemporaryDirectory() as place:
        args = ESConfig(
            **options_of(case, model, place), sigma=sigma, learning_rate=sigma, step_control="none",
            batch_size=PROMPTS, max_steps=STEPS, eval_steps=STEPS, report_to=["none"], output_dir=f"{place}/run",
        )  # fmt: skip
        ESTrainer(args=args).train()
        lines = Path(place, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    before, after = (record["eval_reward"] for record in records if "eval_reward" in record)
    curve = [round(record["es/fitness_mean"], 4) for record in records if "es/fitness_mean" in record]
    return {"kind": "run", "case": case, "model": model, "sigma": sigma, "before": before, "after": after,
            "fitness": curve}  # fmt: skip


def main() -> None:
    """Measure what is missing."""
    from record import RESULTS, stamp, write_result

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    chosen = parser.parse_args().cases
    file = RESULTS / "probe.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []

    def add(new: list[dict[str, Any]]) -> None:
        rows.extend(row | {"stamp": stamp()["commit"]} for row in new)
        rows.sort(key=lambda row: (list(CASES).index(row["case"]), row["model"], row["kind"], row["sigma"]))
        write_result("probe", {}, listed={"rows": rows})
        for row in new:
            print(
                {key: row[key] for key in ("kind", "case", "model", "sigma", "before", "after") if key in row},
                flush=True,
            )

    done = {(row["kind"], row["case"], row["model"], row["sigma"]) for row in rows}
    for case in chosen:
        for model in MODELS.get(case, BASES):
            if ("probe", case, model, SIGMAS[0]) not in done:
                add(predict(case, model))
            for sigma in SIGMAS:
                if ("run", case, model, sigma) not in done:
                    add([train(case, model, sigma)])


if __name__ == "__main__":
    main()
