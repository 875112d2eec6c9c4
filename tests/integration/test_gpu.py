"""Runs on a GPU, end to end: the CPU rebuilds their weights from the journal, bit for bit. Needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.miniature, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "benchmarks" / "bases" / "llama"
RUN = (
    "train", "--model", str(LLAMA), "--task", "countdown", "--population_size", "6", "--batch_size", "4",
    "--max_completion_length", "32", "--max_steps", "3", "--save_steps", "2", "--eval_steps", "2", "--sigma", "0.02",
    "--learning_rate", "0.02", "--report_to", "none",
)  # fmt: skip


def estune(*words: str, cwd: Path, device: str | None = None) -> str:
    """Run a command; without ``device`` the GPU is hidden from it."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
    if device is None:
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:
        words = (*words, "--device", device)
    done = subprocess.run([sys.executable, "-m", "estune", *words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "slower and exact" not in done.stderr, done.stderr  # the GPU's bits were wrong
    return done.stdout + done.stderr


def journal(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


VARIANTS = {
    "full": (),
    "rademacher": ("--noise_distribution", "rademacher"),
    "decay": ("--weight_decay", "0.01"),
    "anchored": ("--weight_decay", "0.01", "--weight_decay_anchor", "base"),
    "lowrank": ("--noise", "lowrank", "--rank", "2"),
    "antithetic": ("--noise", "lowrank", "--antithetic"),
    "sampled": ("--temperature", "1.0", "--num_generations", "2"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_rebuilt_on_the_cpu(variant: str, dtype: str, tmp_path: Path) -> None:
    if dtype == "float16" and variant not in ("full", "lowrank"):
        pytest.skip("one dtype of 16 bits is enough")
    estune(*RUN, *VARIANTS[variant], "--dtype", dtype, "--output_dir", "run", cwd=tmp_path, device="cuda")
    lines = journal(tmp_path / "run")
    assert lines[0]["engine"]["device"].startswith("cuda")
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 3 and any(any(step["q"]) for step in steps)
    estune("replay", "--run", "run", "--output_dir", "replayed", cwd=tmp_path)  # compares every checksum of the journal


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    estune(*RUN, "--output_dir", "whole", cwd=tmp_path, device="cuda")
    part = [*RUN]
    part[part.index("--max_steps") + 1] = "2"
    estune(*part, "--output_dir", "parts", cwd=tmp_path, device="cuda")
    estune(*RUN, "--output_dir", "parts", "--resume", cwd=tmp_path, device="cuda")
    whole, parts = ([x for x in journal(tmp_path / name) if x["kind"] == "step"] for name in ("whole", "parts"))
    assert [x["checksum"] for x in whole] == [x["checksum"] for x in parts]


@pytest.mark.parametrize("method", ["grpo", "sft_rejection"])
def test_a_baseline_trains_on_the_gpu(method: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    words = [*RUN]
    for option in ("--population_size", "--sigma"):
        at = words.index(option)
        del words[at : at + 2]
    out = estune(*words, "--method", method, "--output_dir", "run", cwd=tmp_path, device="cuda")
    assert (tmp_path / "run" / "model.safetensors").is_file(), out
