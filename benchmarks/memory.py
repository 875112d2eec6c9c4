"""Peak memory of a full-parameter step on a random Llama of 0.5 B parameters, as a multiple of its float32 weights.

    python benchmarks/memory.py                 # about 2 minutes, needs about 6 GiB of memory and 4 GB of disk

The peak is the process's high-water mark of resident memory minus what it held after its imports; it covers loading,
one step of two members, the update, and saving the finished model. A small reference model runs beside it so that
what does not grow with the model can be told apart. The result goes to `benchmarks/results/memory.json`.
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
import estune.engines.hf, estune.report.plots
from estune import ESConfig, ESTrainer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

imported = status("VmRSS")
args = ESConfig(model=sys.argv[1], task="countdown", output_dir=sys.argv[2], max_steps=1, population_size=2,
                batch_size=2, max_completion_length=4, report_to=["none"])
trainer = ESTrainer(args=args)
trainer.train()
print(json.dumps({"imported": imported, "peak": status("VmHWM"), "weights": 4 * trainer.engine.master.num_parameters}))
"""


def measure(shape: dict[str, Any], directory: Path) -> dict[str, float]:
    """Build a random Llama of ``shape`` with the embedded tokenizer, train one step in a child, return bytes."""
    build = (  # runs in a child, so that building leaves nothing in memory here
        "import json, sys, torch; from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM;"
        "torch.manual_seed(0); shape = json.loads(sys.argv[1]);"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[3]);"
        "config = LlamaConfig(**shape, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False);"
        "LlamaForCausalLM(config).save_pretrained(sys.argv[2]); tokenizer.save_pretrained(sys.argv[2])"
    )
    tiny = Path(__file__).resolve().parents[1] / "src" / "estune" / "models" / "tiny"
    model = directory / "model"
    subprocess.run([sys.executable, "-c", build, json.dumps(shape), str(model), str(tiny)], check=True)
    command = [sys.executable, "-c", CHILD, str(model), str(directory / "run")]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    result["ratio"] = (result["peak"] - result["imported"]) / result["weights"]
    return result


def main() -> int:
    """Measure, print, record; exit status 1 where the limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tmp", help="directory for the model (4 GB)")
    options = parser.parse_args()
    results = {}
    for name, shape in MODELS.items():
        with tempfile.TemporaryDirectory(dir=options.tmp) as directory:
            results[name] = measure(shape, Path(directory))
        row = results[name]
        peak = (row["peak"] - row["imported"]) / 2**30
        print(f"{name}: weights {row['weights'] / 2**30:.2f} GiB, peak {peak:.2f} GiB, ratio {row['ratio']:.2f}")
    write_result("memory", {"limit": LIMIT, "models": results})
    return int(any(row["ratio"] > LIMIT for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
