"""Compares rules for the size of a step at equal evaluations: Countdown on three bases, conciseness on SmolLM2.

    python benchmarks/estimators.py --cases llama qwen2 gpt2     # about 1 minute a run, two runs at a time
    python benchmarks/estimators.py --cases smollm2              # about 6 minutes a run
    python benchmarks/estimators.py --cases demo mini_sudoku     # the settings of the demo and of 4x4 Sudoku

Each run is `estune train` with the settings of its case and the options of its rule; all runs of a case score the same
number of completions in training, theta's included. Countdown: accuracy on 500 test problems after the last step, and
on 100 validation problems on the way. Conciseness: distance in characters on the task's 8 held-out prompts (lower is
better) on the way, and on the test split and correctness on 200 questions after the last step.

Some rules are variants of the method that estune does not have: other bounds of drift, a bound that also holds while
the fitness rises, steps by kind of parameter, and members that perturb a random half of the tensors. `patch` makes
them, for the run's process alone.

Finished runs are kept in `benchmarks/results/estimators.json`, one line each, and are not repeated. Means and Student's
intervals over seeds are printed, and the difference of ``drift`` from every other rule, paired over models and seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

from record import RESULTS, stamp, write_result

from estune.cli import main as estune_main
from estune.compare.statistics import over_seeds
from estune.engines.lowrank import members as lowrank_members
from estune.es import step_control
from estune.es.noise.reference import round_to_bits
from estune.es.theta import AnchorReader, HostTheta
from estune.es.types import ParameterSpec, Perturbation
from estune.es.update import SCALE_BITS, Update

ESTUNE = [sys.executable, "-m", "estune"]
BASES = Path(__file__).resolve().parent / "bases"
COUNTDOWN: dict[str, Any] = dict(
    task="countdown", population_size=30, batch_size=8, noise="lowrank", sigma=0.02, learning_rate=0.02, max_steps=56,
    max_completion_length=64, eval_steps=14, eval_rows=100,
)  # fmt: skip
CONCISENESS: dict[str, Any] = dict(
    task="conciseness", population_size=60, batch_size=2, noise="lowrank", sigma=0.01, learning_rate=0.01, max_steps=16,
    max_completion_length=40, eval_steps=4,
)  # fmt: skip
DEMO: dict[str, Any] = dict(
    task="countdown", population_size=30, batch_size=16, sigma=0.01, learning_rate=0.005, max_steps=25,
    max_completion_length=48, eval_steps=5, eval_rows=100,
)  # fmt: skip
MINI_SUDOKU: dict[str, Any] = dict(
    task="mini_sudoku", population_size=30, batch_size=16, noise="lowrank", sigma=0.02, learning_rate=0.01,
    max_steps=40, max_completion_length=40, eval_steps=10, eval_rows=100,
)  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (str(BASES / name), COUNTDOWN) for name in ("llama", "qwen2", "gpt2")},
    "smollm2": ("models/smollm2-135m", CONCISENESS),
    "demo": ("tiny", DEMO),
    "mini_sudoku": (str(BASES / "sudoku"), MINI_SUDOKU),
}
PAIRS = {"antithetic": "true"}
DRIFT = {"step_control": "drift"}
ALWAYS_5 = {**DRIFT, "variant": "always-0.05"}
# rule -> options
RULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant, pairs": PAIRS,
    "cosine": {"lr_scheduler_type": "cosine"},
    "cosine, pairs": {"lr_scheduler_type": "cosine", **PAIRS},
    "reliability": {"step_control": "reliability"},
    "reliability, pairs": {"step_control": "reliability", **PAIRS},
    "drift": DRIFT,
    "drift, pairs": {**DRIFT, **PAIRS},
    "drift, seven steps free": {**DRIFT, "variant": "free"},
    "drift, 5 %": {**DRIFT, "variant": "share-0.05"},
    "drift, 5 %, pairs": {**DRIFT, "variant": "share-0.05", **PAIRS},
    "drift, always": {**DRIFT, "variant": "always-0.02"},
    "drift, always, pairs": {**DRIFT, "variant": "always-0.02", **PAIRS},
    "drift, always 5 %": ALWAYS_5,
    "drift, always 5 %, pairs": {**ALWAYS_5, **PAIRS},
    "drift, always 1 %": {**DRIFT, "variant": "always-0.01"},
    "drift, always 5 %, twice the rate": {**ALWAYS_5, "learning_rate": 2},  # times the case's, as all numbers below
    "drift, always 5 %, four times the rate": {**ALWAYS_5, "learning_rate": 4},
    "drift, always 5 %, cosine": {**ALWAYS_5, "lr_scheduler_type": "cosine"},
    "anchored decay": {"weight_decay": 1.0, "weight_decay_anchor": "base"},
    "half the rate": {"learning_rate": 0.5},
    "twice N, half the steps": {"population_size": 2, "max_steps": 0.5},
    "drift, per-prompt z": {**DRIFT, "fitness_shaping": "per_prompt_z"},
    "drift, vectors 3 times": {**DRIFT, "variant": "vectors"},
    "drift, matrices by size": {**DRIFT, "variant": "matrices"},
    "drift, embeddings a third": {**DRIFT, "variant": "embeddings"},
    "drift, half the tensors": {**DRIFT, "variant": "subspace", "sigma": 2**0.5, "learning_rate": 2**0.5},
}
SCALED = ("sigma", "learning_rate", "population_size", "max_steps")


def options_of(case: str, rule: str) -> dict[str, Any]:
    """Return the options of a run; the number of steps pays for theta's completions with ``step_control drift``."""
    _, settings = CASES[case]
    options = {**settings, "step_control": "none"}
    for name, value in RULES[rule].items():
        scaled = settings.get(name, 0) * value if name in SCALED else value
        options[name] = type(settings[name])(scaled) if name in SCALED else value
    if options.get("step_control") == "drift":
        n = options["population_size"]
        options["max_steps"] = settings["max_steps"] * n // (n + 1)
    return options


def step_scale(variant: str, name: str, shape: Sequence[int]) -> float:
    """Return the factor of a parameter's step in a variant whose kinds of parameters move by different amounts."""
    is_embedding = any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
    if variant == "vectors":
        return 3.0 if len(shape) < 2 else 1.0
    if variant == "embeddings":
        return 1 / 3 if is_embedding else 1.0
    if variant == "matrices":  # an element's initial size is 1 / sqrt(inputs): relative to the smallest width, 64
        return 1.0 if len(shape) < 2 or is_embedding else math.sqrt(64 / shape[-1])
    raise ValueError(f"unknown variant {variant!r}")


def perturbs(seed: int, name: str) -> bool:
    """Return whether a member perturbs a tensor in the variant ``subspace``: half of the tensors, chosen by a hash."""
    return bool(blake2b(f"{seed} {name}".encode(), digest_size=1).digest()[0] & 1)


def patch(variant: str) -> None:
    """Change estune in this process into a variant, for `estune train` on CPUs."""
    kind, _, share = variant.partition("-")
    if variant == "free":
        step_control.FIRST_FACTOR = 1.0
        return
    if share:  # of a step's gain that drift may lose
        step_control.DRIFT_SHARE = float(share)
        if kind == "always":
            step_control.Signal.rises = property(lambda _: False)  # type: ignore[assignment, method-assign]
        return
    update_jobs = HostTheta._update_jobs

    def scaled_jobs(self: HostTheta, spec: ParameterSpec, update: Update, anchor: AnchorReader | None) -> Any:
        factor = step_scale(variant, spec.name, spec.shape)
        a, a_lowrank = (round_to_bits(scale * factor, SCALE_BITS) for scale in (update.a, update.a_lowrank))
        return update_jobs(self, spec, replace(update, a=a, a_lowrank=a_lowrank), anchor)

    def masked_jobs(self: HostTheta, spec: ParameterSpec, update: Update, anchor: AnchorReader | None) -> Any:
        used = zip(update.members, update.q, strict=True)
        q = tuple(q * perturbs(member.seed, spec.name) for member, q in used)
        return update_jobs(self, spec, replace(update, q=q), anchor)

    def masked(name: str, perturbation: Perturbation) -> Perturbation:
        member = perturbation.member
        return replace(perturbation, member=replace(member, sign=member.sign * perturbs(member.seed, name)))

    if variant != "subspace":
        HostTheta._update_jobs = scaled_jobs  # type: ignore[method-assign]
        return
    factors_of, perturb = lowrank_members.factors_of, HostTheta.perturb
    lowrank_members.factors_of = lambda name, shape, perturbations, *rest: factors_of(
        name, shape, [masked(name, perturbation) for perturbation in perturbations], *rest
    )
    HostTheta.perturb = lambda self, name, perturbation, out=None: perturb(  # type: ignore[method-assign]
        self, name, perturbation and masked(name, perturbation), out
    )
    HostTheta._update_jobs = masked_jobs  # type: ignore[method-assign]


def run(case: str, rule: str, seed: int, threads: int) -> dict[str, Any]:
    """Train and evaluate; return the run's row."""
    model, options = CASES[case][0], options_of(case, rule)
    variant = options.pop("variant", None)
    program = ESTUNE if variant is None else [sys.executable, __file__, "variant", variant]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "run"
        flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        train = [*program, "train", "--model", model, "--seed", str(seed), "--num_threads", str(threads), "--report_to",
                 "none", "--output_dir", str(place), *flags]  # fmt: skip
        subprocess.run(train, check=True, capture_output=True, env=environment)
        records = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        row: dict[str, Any] = {"case": case, "rule": rule, "seed": seed, "steps": options["max_steps"]}
        which = "eval_accuracy" if options["task"] != "conciseness" else "eval_reward"
        row["curve"] = {str(record["step"]): record[which] for record in records if which in record}
        steps = [record for record in records if "reward" in record]
        row["evaluations"] = steps[-1]["num_evaluations"]
        row["rate"] = [round(record["learning_rate"] / options["learning_rate"], 3) for record in steps]
        row["reliability"] = [round(record["es/reliability"], 3) for record in steps]
        for split, limit in (("test", 500),) if which == "eval_accuracy" else (("test", 0), ("knowledge", 0)):
            evaluate = [*ESTUNE, "evaluate", "--model", str(place), "--split", split, "--limit", str(limit), "--json",
                        "--task", options["task"], "--num_threads", str(threads),
                        "--max_completion_length", str(options["max_completion_length"])]  # fmt: skip
            done = subprocess.run(evaluate, check=True, capture_output=True, text=True, env=environment)
            result = json.loads(done.stdout)
            row[split] = {"accuracy": result["accuracy"], "reward": result["reward"]}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return means over seeds as text: accuracy in per cent, or the distance in characters."""
    lines = []
    for case in CASES:
        for rule in RULES:
            mine = [row for row in rows if (row["case"], row["rule"]) == (case, rule)]
            if not mine:
                continue
            has_accuracy = CASES[case][1]["task"] != "conciseness"
            values = [100 * row["test"]["accuracy"] if has_accuracy else -row["test"]["reward"] for row in mine]
            found = over_seeds(values)
            interval = "" if found.interval is None else "[{:.1f}, {:.1f}]".format(*found.interval)  # None: one seed
            curve = {step: [row["curve"].get(step) for row in mine] for step in mine[0]["curve"]}
            middle = "  ".join(f"{step}: {sum(v) / len(v):.3g}" for step, v in curve.items() if None not in v)
            lines.append(f"{case:8} {rule:24} {found.mean:6.1f} {interval:12} n {len(mine)}   {middle}")
    return "\n".join(lines)


def score(row: dict[str, Any]) -> float:
    """Return the result of a run: accuracy in per cent, or the distance on the 200 questions in characters."""
    return -row["knowledge"]["reward"] if "knowledge" in row else 100 * row["test"]["accuracy"]


def differences(rows: list[dict[str, Any]]) -> str:
    """Return the mean difference of the rule ``drift`` from each other rule and its standard error, as text."""
    found = {(row["case"], row["rule"], row["seed"]): score(row) for row in rows}
    groups = {"Countdown": ("llama", "qwen2", "gpt2"), **{case: (case,) for case in ("smollm2", "demo", "mini_sudoku")}}
    lines = []
    for group, members in groups.items():
        for rule in (rule for rule in RULES if rule != "drift"):
            pairs = [
                (found[case, "drift", seed], found[case, rule, seed])
                for case, other, seed in found
                if other == rule and case in members and (case, "drift", seed) in found
            ]
            if len(pairs) > 1:
                values = [drift - other for drift, other in pairs]
                drift, other = (statistics.fmean(side) for side in zip(*pairs, strict=True))
                error = statistics.stdev(values) / math.sqrt(len(values))
                lines.append(
                    f"{group:12} drift {drift:5.1f}, {rule:40} {other:5.1f}: {drift - other:+5.1f} ({error:.1f})  "
                    f"n {len(values)}"
                )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table and the differences."""
    if sys.argv[1:2] == ["variant"]:  # `run` starts this program instead of `estune`
        patch(sys.argv[2])
        sys.exit(estune_main(sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, with one thread each")
    options = parser.parse_args()
    file = RESULTS / "estimators.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    done = {(row["case"], row["rule"], row["seed"]) for row in rows}
    wanted = [(c, r, s) for s in options.seeds for c in options.cases for r in options.rules if (c, r, s) not in done]
    lock = Lock()

    def one(cell: tuple[str, str, int]) -> None:
        row = run(*cell, threads=1) | {"stamp": stamp()["commit"]}
        with lock:
            rows.append(row)
            rows.sort(key=lambda r: (list(CASES).index(r["case"]), list(RULES).index(r["rule"]), r["seed"]))
            write_result("estimators", {}, listed={"rows": rows})
            print(json.dumps({k: row[k] for k in ("case", "rule", "seed", "test")}), flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(one, wanted))
    print(table(rows))
    print(differences(rows))


if __name__ == "__main__":
    main()
