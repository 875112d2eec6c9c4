"""Peak memory of a full-parameter step on a random Llama of 0.5 B parameters, as a multiple of its float32 weights.

    python benchmarks/memory.py                 # about 3 minutes, needs about 6 GiB of memory and 12 GB of disk

The peak is the process's high-water mark of resident memory minus what it held after its imports. Three processes are
measured: one that loads, takes a step of two members, updates and saves; one that resumes from the checkpoint for
another step; and one that replays both steps from base model and journal. The result goes to
`benchmarks/results/memory.json`.
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

MODELS = {
    "0.5B": dict(hidden_size=1280, num_hidden_layers=20, intermediate_size=3456, num_attention_heads=20,
                 num_key_value_heads=20, vocab_size=32000),
}  # fmt: skip
LIMIT = 2.3

CHILD = """
import json, sys
from pathlib import Path
import torch, transformers, numba
import estune.engines.hf, estune.report.plots, estune.commands
from estune import ESConfig, ESTrainer

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

imported = status("VmRSS")
what, model, run = sys.argv[1:]
if what == "replay":
    estune.commands.replay_command(Path(run), None, Path(run + "-replayed"), None)
else:
    args = ESConfig(model=model, task="countdown", output_dir=run, max_steps=2 if what == "resume" else 1,
                    resume=what == "resume", population_size=2, batch_size=2, max_completion_length=4,
                    fitness_shaping="none", save_steps=1, report_to=["none"],
                    reward_funcs=[str(Path(run).parent / "rewards.py") + ":lengths"])
    ESTrainer(args=args).train()
print(json.dumps({"imported": imported, "peak": status("VmHWM")}))
"""

# The random model's answers are all wrong; a reward that tells members apart makes theta move.
REWARD = "def lengths(completions, **_):\n    return [sum(map(ord, text)) % 97 for text in completions]\n"


def measure(shape: dict[str, Any], directory: Path) -> dict[str, dict[str, float]]:
    """Build a random Llama of ``shape`` with the embedded tokenizer; train, resume and replay it, each in a child."""
    build = (  # runs in a child, so that building leaves nothing in memory here
        "import json, sys, torch; from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM;"
        "torch.manual_seed(0); shape = json.loads(sys.argv[1]);"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[3]);"
        "config = LlamaConfig(**shape, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False);"
        "model = LlamaForCausalLM(config); print(4 * sum(p.numel() for p in model.parameters()));"
        "model.save_pretrained(sys.argv[2]); tokenizer.save_pretrained(sys.argv[2])"
    )
    tiny = Path(__file__).resolve().parents[1] / "src" / "estune" / "models" / "tiny"
    model = directory / "model"
    command = [sys.executable, "-c", build, json.dumps(shape), str(model), str(tiny)]
    weights = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[0])
    (directory / "rewards.py").write_text(REWARD, encoding="utf-8")
    results = {}
    for what in ("train", "resume", "replay"):
        command = [sys.executable, "-c", CHILD, what, str(model), str(directory / "run")]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result: dict[str, float] = json.loads(output.splitlines()[-1])
        results[what] = result | {"weights": weights, "ratio": (result["peak"] - result["imported"]) / weights}
    return results


def main() -> int:
    """Measure, print, record; exit status 1 where the limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tmp", help="directory for model and run (12 GB)")
    options = parser.parse_args()
    results = {}
    for name, shape in MODELS.items():
        with tempfile.TemporaryDirectory(dir=options.tmp) as directory:
            results[name] = measure(shape, Path(directory))
        for what, row in results[name].items():
            peak = (row["peak"] - row["imported"]) / 2**30
            size = row["weights"] / 2**30
            print(f"{name} {what}: weights {size:.2f} GiB, peak {peak:.2f} GiB, ratio {row['ratio']:.2f}")
    write_result("memory", {"limit": LIMIT, "models": results})
    return int(any(row["ratio"] > LIMIT for rows in results.values() for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
