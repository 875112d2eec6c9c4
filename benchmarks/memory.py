"""Measures the peak memory of a step on random models of 0.5 and 1.5 B parameters, as a multiple of their weights.

    python benchmarks/memory.py                 # about 15 minutes, needs 16 GiB of memory and 20 GB of disk
    python benchmarks/memory.py --model 0.5B    # about 5 minutes, 6 GiB, 12 GB
    python benchmarks/memory.py --model 1.5B --save models/random-1.5b     # only write the random model

The peak is the process's largest resident memory minus its resident memory after the imports. The unit is the size of
the model's float32 weights. A measured process loads the model, takes a step of two members, updates and saves. For the
small model, a second process resumes from the checkpoint for another step, and a third replays both steps from base
model and journal. All processes run with full-rank and with low-rank noise. The result is written to
`benchmarks/results/memory.json`, with commit and machine for each model. ``--model`` keeps the other model's entry.

The random models have real shapes and the embedded tokenizer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import RESULTS, stamp, write_result

MODELS: dict[str, dict[str, Any]] = {
    "0.5B": dict(
        model_type="llama",
        hidden_size=1280,
        num_hidden_layers=20,
        intermediate_size=3456,
        num_attention_heads=20,
        num_key_value_heads=20,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
    "1.5B": dict(
        model_type="qwen2",
        hidden_size=1536,
        num_hidden_layers=28,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
}
TINY = Path(__file__).resolve().parents[1] / "src" / "estune" / "models" / "tiny"
PROCESSES = {"0.5B": ("train", "resume", "replay"), "1.5B": ("train",)}
LIMITS = {"full": 2.3, "lowrank": 1.3}  # noise -> peak memory / weights

CHILD = """
import json, sys
from pathlib import Path
import torch, transformers, numba
import estune.engines.hf.engine, estune.monitor.report.plots, estune.commands.evaluate
from estune import ESConfig, ESTrainer

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

imported = status("VmRSS")
what, noise, model, run = sys.argv[1:]
if what == "replay":
    estune.commands.replay.replay_command(Path(run), None, Path(run + "-replayed"), None)
else:
    args = ESConfig(model=model, task="countdown", output_dir=run, max_steps=2 if what == "resume" else 1,
                    resume=what == "resume", population_size=2, batch_size=2, max_completion_length=4,
                    fitness_shaping="none", save_steps=1, report_to=["none"], noise=noise,
                    reward_funcs=[str(Path(model).parent / "rewards.py") + ":numbers"])
    ESTrainer(args=args).train()
    steps = [json.loads(line) for line in (Path(run) / "journal.jsonl").read_text().splitlines()]
    assert all(any(step["q"]) for step in steps if step["kind"] == "step"), "members tied: theta was not updated"
print(json.dumps({"imported": imported, "peak": status("VmHWM")}))
"""

# All answers of a random model are wrong, and its tokens need not exist in the tokenizer. A reward computed from token
# ids differs between members, so that theta moves.
REWARD = "def numbers(completions, completion_ids, **_):\n    return [sum(ids) % 97 for ids in completion_ids]\n"


def save(name: str, directory: Path) -> int:
    """Write a model of ``MODELS`` with random float32 weights; return the number of its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer
    tokenizer = tokenizer.from_pretrained(TINY)
    auto_config: Any = AutoConfig
    auto_model: Any = AutoModelForCausalLM
    config = auto_config.for_model(**MODELS[name], eos_token_id=tokenizer.eos_token_id)
    model = auto_model.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def save_in_child(name: str, directory: Path) -> int:
    """Call `save` in a child process, whose memory ends with it."""
    command = [sys.executable, __file__, "--save", str(directory), "--model", name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def measure(name: str, directory: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Build a random model; train, resume and replay it in child processes; return results by noise and process."""
    model = directory / "model"
    weights = 4 * save_in_child(name, model)  # in a child process, whose memory ends with it
    (directory / "rewards.py").write_text(REWARD, encoding="utf-8")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for noise in LIMITS:
        results[noise] = {}
        with tempfile.TemporaryDirectory(dir=directory) as runs:
            for what in PROCESSES[name]:
                started = time.perf_counter()
                command = [sys.executable, "-c", CHILD, what, noise, str(model), str(Path(runs) / "run")]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                result: dict[str, float] = json.loads(output.splitlines()[-1])
                results[noise][what] = result | {
                    "weights": weights,
                    "ratio": (result["peak"] - result["imported"]) / weights,
                    "process_s": time.perf_counter() - started,
                }
    return results


def recorded(path: Path) -> dict[str, Any]:
    """Return the models' entries of a result file, except those that this script would not write."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8")).get("models", {})
    return {name: entry for name, entry in entries.items() if name in MODELS and is_entry(name, entry)}


def is_entry(name: str, entry: dict[str, Any]) -> bool:
    """Return whether a recorded entry has a commit, a machine, and every process of its model."""
    shape = {noise: set(processes) for noise, processes in entry.get("noise", {}).items()}
    return {"commit", "machine"} <= set(entry) and shape == {noise: set(PROCESSES[name]) for noise in LIMITS}


def main() -> int:
    """Measure, print and write the result; return 1 if a limit is exceeded, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=MODELS, action="append", help="measure only this model; the other entries are kept"
    )
    parser.add_argument("--tmp", help="directory for models and runs (20 GB)")
    parser.add_argument("--no_record", action="store_true", help="print only")
    parser.add_argument("--save", type=Path, metavar="DIRECTORY", help="only write the random model of --model")
    options = parser.parse_args()
    if options.save:
        if len(options.model or ()) != 1:
            parser.error("--save needs one --model")
        print(save(options.model[0], options.save))
        return 0
    results = {}
    entries = recorded(RESULTS / "memory.json") if options.model else {}
    for name in options.model or MODELS:
        with tempfile.TemporaryDirectory(dir=options.tmp) as directory:
            results[name] = measure(name, Path(directory))
        entries[name] = {**stamp(), "noise": results[name]}
        for noise, processes in results[name].items():
            for what, row in processes.items():
                peak, size = (row["peak"] - row["imported"]) / 2**30, row["weights"] / 2**30
                print(f"{name} {noise} {what}: weights {size:.2f} GiB, peak {peak:.2f} GiB, ratio {row['ratio']:.2f}")
    if not options.no_record:
        write_result("memory", {"limits": LIMITS, "models": entries}, stamped=False)
    return int(
        any(
            row["ratio"] > LIMITS[noise]
            for model in results.values()
            for noise, processes in model.items()
            for row in processes.values()
        )
    )


if __name__ == "__main__":
    sys.exit(main())
