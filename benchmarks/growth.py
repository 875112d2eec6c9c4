"""Measures how the cost of a step grows with members, parameters, rank, tokens, threads, workers and steps.

    python benchmarks/growth.py                       # about 12 minutes, 9 GiB of memory and no download
    python benchmarks/growth.py --parts population    # members, rank and tokens on the embedded model

* perturb: write the weights of the members with full noise, one member after the other (`HostTheta.perturb`).
* update: update theta by all members, with full and with low-rank noise.
* step: let a population of low-rank members answer (`generate_population`, ``members_per_batch`` auto), then update.

The models are the embedded one and random ones, each in its own process, on one thread. The gain from a second thread
is measured separately. Completions never end early. Times are medians.

`growth_fit.py` fits each series, and judges it from 16 members or 3 M parameters on. The exit status is 1 if a series
grows more than linearly, or if a long run has more memory or files than a short one, apart from journal and metrics.

The result is written to `benchmarks/results/growth.json`.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from growth_fit import fit

from estune.environment import cores, free_memory_bytes

LLAMA = dict(model_type="llama", vocab_size=1358, tie_word_embeddings=True)
MODELS: dict[str, dict[str, Any]] = {  # configurations of random models
    "0.6M": dict(LLAMA, hidden_size=96, num_hidden_layers=4, intermediate_size=256, num_attention_heads=3),
    "4M": dict(LLAMA, hidden_size=256, num_hidden_layers=4, intermediate_size=704, num_attention_heads=4),
    "20M": dict(LLAMA, hidden_size=512, num_hidden_layers=6, intermediate_size=1408, num_attention_heads=8),
    "140M": dict(
        LLAMA, vocab_size=32000, hidden_size=768, num_hidden_layers=12, intermediate_size=3072, num_attention_heads=12
    ),
    "0.5B": dict(
        LLAMA,
        vocab_size=32000,
        tie_word_embeddings=False,
        hidden_size=1280,
        num_hidden_layers=20,
        intermediate_size=3456,
        num_attention_heads=20,
    ),
    "1.5B": dict(
        model_type="qwen2",
        vocab_size=151936,
        tie_word_embeddings=True,
        hidden_size=1536,
        num_hidden_layers=28,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
    ),
}
LARGEST, LARGEST_NEEDS_BYTES = "1.5B", 12 << 30
THREADS_MODEL = "20M"
PARTS = ("population", "models", "workers", "steps")
RANKS, TOKENS = (1, 2, 4, 8, 16), (8, 16, 32, 64, 128)
MEMBERS, PROMPTS = 30, 2  # of the measurements that vary something else
LONG_S, SHORT_S, MOST_RUNS = 15.0, 0.2, 30  # seconds, seconds, calls; see `timed`
SIGMA, LEARNING_RATE = 1e-3, 1e-12  # so small a learning rate leaves theta's values, which are still written
# smallest x over which the exponent is judged; below it, fixed costs of a forward pass dominate
JUDGED_FROM = {"members": 16.0, "parameters": 3e6}
SAME = 1.05  # largest ratio of peak memory that counts as equal
# key in the result -> title
SERIES = {
    "perturb": "perturb (full noise)",
    "update_full": "update (full noise)",
    "update_lowrank": "update (low-rank)",
    "step": "step (low-rank)",
}


def timed(function: Callable[[], Any], repetitions: int) -> dict[str, Any]:
    """Return the median and all seconds of some calls, after a warm-up call.

    A first call that takes more than `LONG_S` is counted and repeated at most once, because the warm-up is a small part
    of it. Short calls are repeated until they take `SHORT_S` together, at most `MOST_RUNS` times.
    """
    runs: list[float] = []
    for repetition in range(1 + MOST_RUNS):
        if len(runs) >= repetitions and sum(runs) >= SHORT_S:
            break
        started = time.perf_counter()
        function()
        seconds = time.perf_counter() - started
        if repetition or seconds > LONG_S:
            runs.append(seconds)
        if len(runs) == min(2, repetitions) and runs[0] > LONG_S:
            break
    return {"median_s": statistics.median(runs), "runs_s": runs}


class Subject:
    """A model with an engine for low-rank noise (``engine``), and the same theta for full noise (``full``)."""

    def __init__(self, model: str, num_threads: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from estune.engines.hf.allocator import keep_freed_memory
        from estune.engines.hf.engine import HFEngine
        from estune.engines.hf.loading import load_tokenizer
        from estune.es.theta import HostTheta
        from estune.models.names import local_directory

        torch.manual_seed(0)
        auto_config: Any = AutoConfig
        auto_model: Any = AutoModelForCausalLM
        if model == "tiny":
            module = auto_model.from_pretrained(local_directory("tiny"), dtype=torch.float32)
        else:
            module = auto_model.from_config(auto_config.for_model(**MODELS[model]), dtype=torch.float32)
        tokenizer = load_tokenizer("tiny")
        module.generation_config.eos_token_id, tokenizer.eos_token = [], None  # no completion ends early
        module.generation_config.pad_token_id = 0
        self.engine = HFEngine.from_model(
            module, tokenizer, num_threads=num_threads, prompts_per_batch=64, noise="lowrank"
        )
        keep_freed_memory()  # as in a process of the command line
        if not self.engine.facts.header["shared_forward"]:
            raise RuntimeError(
                "low-rank members do not share a forward pass with this model; the fallback is not measured"
            )
        self.theta = self.engine.theta
        specs = [dataclasses.replace(spec, lowrank=False) for spec in self.theta.specs]
        self.num_threads = num_threads
        self.full = HostTheta(specs, self.theta.arrays, num_threads=num_threads)
        largest = max(array.size for array in self.theta.arrays.values())
        self.out = np.zeros(max(largest, min(self.theta.num_parameters, 1 << 26)), dtype=np.float32)

    def perturb(self, n_members: int) -> None:
        """Write the weights of members with full noise, cyclically into a buffer larger than the caches."""
        at = 0
        for perturbation in perturbations(n_members, 0):
            for name, array in self.full.arrays.items():
                at = 0 if at + array.size > self.out.size else at
                self.full.perturb(name, perturbation, self.out[at : at + array.size])
                at += array.size

    def update(self, n_members: int, rank: int) -> None:
        """Update theta by all members; rank 0 is full noise."""
        from estune.es.update import make_update

        ramp = [(2 * index - n_members + 0.5) / n_members for index in range(n_members)]
        theta = self.theta if rank else self.full
        members = [perturbation.member for perturbation in perturbations(n_members, rank)]
        theta.apply(make_update(members, ramp, LEARNING_RATE, rank=rank))
        self.engine.forget()

    def members_per_batch(self, n_members: int, rank: int, length: int, tokens: int) -> int:
        """Return the value to which a run with such steps resolves ``members_per_batch`` auto."""
        from estune import ESConfig
        from estune.train import setup

        args = ESConfig(
            task="countdown",
            noise="lowrank",
            rank=rank,
            population_size=n_members,
            step_control="none",
            batch_size=PROMPTS,
            prompts_per_batch=self.engine.prompts_per_batch,
            max_completion_length=tokens,
            num_threads=self.num_threads,
            reward_workers=1,
        )
        return int(setup.resolve_with_engine(args, self.engine, prompts_of(length)).members_per_batch)

    def step(self, n_members: int, rank: int, length: int, tokens: int, together: int) -> None:
        """Let all members answer `PROMPTS` prompts of ``length`` tokens, then update."""
        from estune.es.types import Sampling

        prompts = prompts_of(length)
        sampling = Sampling(seed=0, step=0, max_completion_length=tokens)
        members = perturbations(n_members, rank)
        for first in range(0, n_members, together):
            answers = self.engine.generate_population(members[first : first + together], prompts, sampling)
            if any(len(c.token_ids) != tokens for member in answers for row in member for c in row):
                raise RuntimeError("a completion ended early")
        self.update(n_members, rank)

    def point(self, x: float, n: int, rank: int, length: int, tokens: int, what: str, repetitions: int) -> dict:  # type: ignore[type-arg]
        """Time the calls named in ``what`` (keys of `SERIES`, separated by spaces) for one point ``x`` of a series."""
        together = self.members_per_batch(n, rank, length, tokens)
        work: dict[str, Callable[[], None]] = {
            "perturb": lambda: self.perturb(n),
            "update_full": lambda: self.update(n, 0),
            "update_lowrank": lambda: self.update(n, rank),
            "step": lambda: self.step(n, rank, length, tokens, together),
        }
        times = {name: timed(work[name], repetitions) for name in what.split()}
        return {"x": x, "members": n, "rank": rank, "tokens": tokens, "members_per_batch": together, "times": times}


def prompts_of(length: int) -> list[Any]:
    """Return `PROMPTS` prompts of ``length`` random tokens."""
    from estune.es.types import Prompt

    ids = np.random.default_rng(0).integers(5, 1358, (PROMPTS, length)).tolist()
    return [Prompt(row, "", tuple(row_ids)) for row, row_ids in enumerate(ids)]


def perturbations(n_members: int, rank: int) -> list[Any]:
    """Return the members of a step; rank 0 is full noise."""
    from estune.es.noise import lowrank_scale, perturbation_scale
    from estune.es.population import members_for_step
    from estune.es.types import Noise, Perturbation

    low = lowrank_scale(SIGMA, rank) if rank else 0.0
    return [
        Perturbation(member, Noise(perturbation_scale(SIGMA), "normal", rank, low))
        for member in members_for_step(0, 0, n_members, False)
    ]


def population_child(repetitions: int, most_members: int) -> dict[str, Any]:
    """Vary members, rank and tokens on the embedded model, on one thread."""
    subject = Subject("tiny", 1)
    n_values = [2**power for power in range(1, most_members.bit_length()) if 2**power <= most_members]
    everything = "perturb update_full update_lowrank step"
    members = min(MEMBERS, most_members)
    return {
        "parameters": subject.theta.num_parameters,
        "members": [subject.point(n, n, 1, 32, 16, everything, repetitions) for n in n_values],
        "rank": [subject.point(r, members, r, 32, 16, "update_lowrank step", repetitions) for r in RANKS],
        "tokens": [subject.point(t, members, 1, 32, t, "step", repetitions) for t in TOKENS],
    }


def model_child(model: str, num_threads: int, repetitions: int) -> dict[str, Any]:
    """Time one model: a perturbed member, and updates and steps of 8 members (2 prompts of 16 tokens, 8 new tokens)."""
    started = time.perf_counter()
    subject = Subject(model, num_threads)
    built = time.perf_counter() - started
    size = subject.theta.num_parameters
    work = "update_full update_lowrank step"
    point = subject.point(size, 8, 1, 16, 8, work, repetitions)
    point["times"]["perturb"] = timed(lambda: subject.perturb(1), repetitions)
    shared = bool(subject.engine.working.is_theta)
    return point | {"model": model, "num_threads": num_threads, "shares_memory": shared, "build_s": built}


def train_child(values: dict[str, Any]) -> dict[str, Any]:
    """Train the embedded model; return the steps' metrics, the peak memory in bytes and the files' sizes."""
    from estune import ESConfig, ESTrainer

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "rewards.py").write_text(REWARD, encoding="utf-8")
        args = ESConfig(
            model="tiny",
            task="countdown",
            noise="lowrank",
            sigma=0.01,
            step_control="none",
            report_to=["none"],
            reward_funcs=[f"{place / 'rewards.py'}:{values.pop('reward')}"],
            output_dir=str(place / "run"),
            **values,
        )
        ESTrainer(args=args).train()
        run = place / "run"
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        sizes = {str(path.relative_to(run)): path.stat().st_size for path in sorted(run.rglob("*")) if path.is_file()}
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(row.split()[1]) * 1024 for row in status if row.startswith("VmHWM"))
    keys = ("step_time", "es/generate_s", "es/score_s", "es/update_s")
    return {"steps": [{key: record[key] for key in keys} for record in metrics], "peak_bytes": peak, "bytes": sizes}


REWARD = """import time


def lengths(completions, **_):
    return [sum(map(ord, text)) % 97 for text in completions]


def slow(completions, **_):
    time.sleep(0.002 * len(completions))  # 2 ms a completion, as a service would take
    return lengths(completions)
"""


def in_child(name: str, *arguments: Any) -> dict[str, Any]:
    """Call a function of `main`'s ``children`` in a child process, whose memory ends with it."""
    command = [sys.executable, __file__, "--child", json.dumps([name, *arguments])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def series(points: Sequence[dict[str, Any]], what: str) -> tuple[list[float], list[float]]:
    """Return x and median seconds of one timed call (a key of `SERIES`)."""
    return [point["x"] for point in points], [point["times"][what]["median_s"] for point in points]


def fits(points: Sequence[dict[str, Any]], judged_from: float = 0.0) -> dict[str, Any]:
    """Return the fits of all timed calls at points in ascending order of x; an empty dict below three points."""
    if len(points) < 3:
        return {}
    result = {}
    for what in points[0]["times"]:
        fitted = fit(*series(points, what), judged_from)
        result[what] = dataclasses.asdict(fitted) | {"verdict": fitted.verdict}
    return result


def measure_models(models: Sequence[str], repetitions: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Time the random models that fit into memory; return the points in ascending order of size, and notes."""
    points, notes = [], []
    for model in models:
        free = free_memory_bytes()
        if model == LARGEST and free < LARGEST_NEEDS_BYTES:
            notes.append(
                f"{model} skipped: {free / 2**30:.1f} GiB of memory are free, {LARGEST_NEEDS_BYTES / 2**30:.0f} needed"
            )
            continue
        points.append(in_child("model", model, 1, repetitions))
        print(f"growth: {model} measured", flush=True)
    return sorted(points, key=lambda point: point["x"]), notes


def measure_workers(max_steps: int) -> list[dict[str, Any]]:
    """Time whole training steps with a reward of 2 ms a completion, for one and two workers and threads."""
    rows = []
    for workers in (1, 2):
        for threads in (1, 2):
            values = {
                "population_size": MEMBERS,
                "batch_size": 16,
                "max_completion_length": 32,
                "reward": "slow",
                "max_steps": max_steps,
                "reward_workers": workers,
                "num_threads": threads,
            }
            steps = in_child("train", values)["steps"][1:]
            medians = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
            rows.append({"reward_workers": workers, "num_threads": threads, **medians})
    return rows


def measure_steps(long: int) -> dict[str, Any]:
    """Compare runs of 2 and of ``long`` steps: peak memory, and bytes on disk without journal and metrics."""
    runs: dict[str, Any] = {}
    for steps in (2, long):
        values = {
            "population_size": 4,
            "batch_size": 2,
            "max_completion_length": 8,
            "reward": "lengths",
            "max_steps": steps,
            "num_threads": 1,
        }
        result = in_child("train", values)
        growing = {name: result["bytes"].pop(name) for name in ("journal.jsonl", "metrics.jsonl")}
        others = sum(result["bytes"].values())
        runs[str(steps)] = {"peak_bytes": result["peak_bytes"], "other_bytes": others, **growing}
    short, other = runs["2"], runs[str(long)]
    return {
        "runs": runs,
        "peak_ratio": other["peak_bytes"] / short["peak_bytes"],
        "other_bytes_ratio": other["other_bytes"] / short["other_bytes"],
        "journal_bytes_per_step": (other["journal.jsonl"] - short["journal.jsonl"]) / (long - 2),
        "metrics_bytes_per_step": (other["metrics.jsonl"] - short["metrics.jsonl"]) / (long - 2),
        "nothing_else_grows": other["peak_bytes"] <= SAME * short["peak_bytes"]
        and other["other_bytes"] <= short["other_bytes"] + 64,  # numbers in configuration and state have more digits
    }


def measure(
    parts: Sequence[str] = PARTS,
    models: Sequence[str] = tuple(MODELS),
    repetitions: int = 3,
    most_members: int = 512,
    long_run: int = 40,
) -> dict[str, Any]:
    """Measure some parts; return their points, fits, verdicts and notes."""
    result: dict[str, Any] = {"repetitions": repetitions, "cores": cores()}
    if "population" in parts:
        sweeps = in_child("population", repetitions, most_members)
        names = ("members", "rank", "tokens")
        sweeps["fits"] = {name: fits(sweeps[name], JUDGED_FROM.get(name, 0.0)) for name in names}
        result["population"] = sweeps
    if "models" in parts:
        points, notes = measure_models(models, repetitions)
        result["models"] = {"points": points, "fits": fits(points, JUDGED_FROM["parameters"]), "notes": notes}
    if "workers" in parts:
        result["workers"] = {
            "steps": measure_workers(1 + repetitions),
            "threads": [in_child("model", THREADS_MODEL, threads, repetitions) for threads in (1, 2)],
        }
    if "steps" in parts:
        result["steps"] = measure_steps(long_run)
    return result | {"verdicts": verdicts(result)}


def verdicts(result: dict[str, Any]) -> dict[str, int]:
    """Return 1 or 0 for each measured part: members and parameters (cost at most linear), steps (nothing else grows).

    A sweep with too few points has no verdict.
    """
    values = {}
    sweeps = {
        "members": result.get("population", {}).get("fits", {}).get("members"),
        "parameters": result.get("models", {}).get("fits"),
    }
    for name, fitted in sweeps.items():
        if fitted:
            values[name] = int(all(row["verdict"] != "MORE than linear" for row in fitted.values()))
    if "steps" in result:
        values["steps"] = int(result["steps"]["nothing_else_grows"])
    return values


def rows_of(points: Sequence[dict[str, Any]], fitted: dict[str, Any], unit: str, judged: bool) -> Iterator[str]:
    """Yield the lines of one sweep: its times, and its fits; ``judged``: with their verdicts."""
    for what in points[0]["times"]:
        xs, seconds = series(points, what)
        yield f"  {SERIES[what]:22s} " + "  ".join(f"{x:g}: {s:.3g} s" for x, s in zip(xs, seconds, strict=True))
        if what in fitted:
            f = fitted[what]
            yield (
                f"  {'':22s} ~ {unit}^{f['exponent']:.2f} (R2 {f['r2']:.3f}), from {f['judged_from']:.3g} on {unit}^"
                f"{f['judged_exponent']:.2f} (R2 {f['judged_r2']:.3f}), last three {unit}^{f['last_exponent']:.2f}; "
                f"{f['a_s']:.3g} s + {f['b_s']:.3g} s {unit} (R2 {f['line_r2']:.3f}, off by up to "
                f"{f['line_residual']:.0%}){': ' + f['verdict'] if judged else ''}"
            )


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = []
    if "population" in result:
        sweeps = result["population"]
        titles = {
            "members": ("N members (2 prompts, 16 tokens)", "N"),
            "rank": ("rank r", "r"),
            "tokens": ("T new tokens a completion (prompts of 32)", "T"),
        }
        for name, (title, unit) in titles.items():
            lines.append(f"against {title}: embedded model, {sweeps['parameters']:,} parameters, 1 thread")
            lines.extend(rows_of(sweeps[name], sweeps["fits"][name], unit, judged=name == "members"))
    if "models" in result:
        models = result["models"]
        lines.append("against P parameters: update and step of 8 members, one perturbed, 1 thread")
        if models["points"]:
            lines.extend(rows_of(models["points"], models["fits"], "P", judged=True))
        lines.extend(f"  note: {note}" for note in models["notes"])
    if "workers" in result:
        lines.append("against workers and threads: whole steps of the embedded model, reward of 2 ms a completion")
        for row in result["workers"]["steps"]:
            lines.append(
                f"  reward_workers {row['reward_workers']}, num_threads {row['num_threads']}: "
                f"{row['step_time']:.2f} s a step, {row['es/generate_s']:.2f} s generation, "
                f"{row['es/score_s']:.2f} s waiting for scores"
            )
        one, two = (point["times"] for point in result["workers"]["threads"])
        speedups = (f"{SERIES[what]} {one[what]['median_s'] / two[what]['median_s']:.2f}" for what in one)
        lines.append(f"  {THREADS_MODEL} parameters, two threads against one, times as fast: {', '.join(speedups)}")
    if "steps" in result:
        growth = result["steps"]
        short, long = growth["runs"]
        verdict = "only journal and metrics grow" if growth["nothing_else_grows"] else "SOMETHING ELSE GROWS"
        per_step = [growth[f"{name}_bytes_per_step"] for name in ("journal", "metrics")]
        lines.append(
            f"against steps, {short} and {long}: peak memory times {growth['peak_ratio']:.3f}, files without "
            f"journal and metrics times {growth['other_bytes_ratio']:.6f}: {verdict}; a step adds "
            f"{per_step[0]:.0f} bytes of journal, {per_step[1]:.0f} of metrics"
        )
    return "\n".join(lines)


def long_run_steps(text: str) -> int:
    """Return the steps of the long run from the command line.

    Raises:
        argparse.ArgumentTypeError: the short run is not shorter.
    """
    steps = int(text)
    if steps <= 2:
        raise argparse.ArgumentTypeError(f"{steps} is not more than the 2 steps it is compared with")
    return steps


def main() -> int:
    """Measure, print and write the result; return 1 if a verdict is 0, else 0."""
    children = {"population": population_child, "model": model_child, "train": train_child}
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        name, *arguments = json.loads(sys.argv[2])
        print(json.dumps(children[name](*arguments)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--most_members", type=int, default=512)
    parser.add_argument("--long_run", type=long_run_steps, default=40, help="steps, more than 2")
    parser.add_argument("--no_record", action="store_true", help="print only")
    options = parser.parse_args()
    from record import write_result  # reads the commit when imported: before the first measurement, but not for --help

    result = measure(options.parts, options.models, options.repetitions, options.most_members, options.long_run)
    print(table(result))
    if not options.no_record:
        print(f"written to {write_result('growth', result)}")
    return int(not all(result["verdicts"].values()))


if __name__ == "__main__":
    sys.exit(main())
