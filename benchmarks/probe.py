"""Compares what `estune probe` predicts with what runs of ten steps then do.

    python benchmarks/probe.py                   # about 1 minute a run; finished parts are not repeated

Two tasks have equal prompts. `countdown` has its own reward. `liked_length` has a reward that prompts do not share: a
hash of the prompt decides whether long or short completions are liked. A probe of N 30 and B 32 predicts, for each base
and sigma, the gain of ten steps with N 30, B 8 and a learning rate of sigma. A run then takes these steps. Its gain is
the difference of theta's mean reward on the 200 problems of the validation split.

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
}
MEMBERS, PROMPTS, PROBED_PROMPTS = 30, 8, 32  # N, B of the runs, B of the probes


def liked_length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Return 0 to 1 per completion: its length in hundreds of characters, or 1 minus that by the prompt's hash."""
    lengths = [min(LONGEST, len(text)) / LONGEST for text in completions]
    longer = [hashlib.sha256(prompt.encode()).digest()[0] % 2 == 0 for prompt in prompts]
    return [length if liked else 1 - length for length, liked in zip(lengths, longer, strict=True)]


def predict(case: str, model: str) -> list[dict[str, Any]]:
    """Probe a model at all sigmas of a case; return one row a sigma."""
    from estune.commands.probe import judge, probe, propose
    from estune.config import ESConfig

    args = ESConfig(
        model=str(HERE / "bases" / model),
        **CASES[case],
        population_size=MEMBERS,
        batch_size=PROBED_PROMPTS,
        num_threads=1,
    )
    found = probe(args, SIGMAS)
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
            model=str(HERE / "bases" / model), **CASES[case], sigma=sigma, learning_rate=sigma, population_size=MEMBERS,
            batch_size=PROMPTS, max_steps=STEPS, eval_steps=STEPS, num_threads=1, report_to=["none"],
            output_dir=f"{place}/run",
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
    for model in BASES:  # cases take turns, so that a part of the measurement shows both
        for case in chosen:
            if ("probe", case, model, SIGMAS[0]) not in done:
                add(predict(case, model))
            for sigma in SIGMAS:
                if ("run", case, model, sigma) not in done:
                    add([train(case, model, sigma)])


if __name__ == "__main__":
    main()
