"""A finished run is an ordinary Hugging Face model: `lm_eval` runs on it with a small local task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny

pytestmark = pytest.mark.real

TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def test_lm_eval_runs_on_a_run_directory(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    run = tmp_path / "run"
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+1="}\n', encoding="utf-8")
    (tmp_path / "rewards.py").write_text(
        "def vowels(completions, **_):\n    return [sum(map(text.count, 'aeiou')) for text in completions]\n",
        encoding="utf-8",
    )
    train = [sys.executable, "-m", "estune", "train", "--model", str(tmp_path / "model"),
             "--dataset_name", str(tmp_path / "train.jsonl"), "--reward_funcs", f"{tmp_path / 'rewards.py'}:vowels",
             "--output_dir", str(run), "--max_steps", "1", "--population_size", "4", "--sigma", "0.1",
             "--max_completion_length", "8", "--report_to", "none"]  # fmt: skip
    subprocess.run(train, check=True, capture_output=True, text=True)
    rows = tmp_path / "sums.jsonl"
    questions = [{"question": f"{i}+1=", "choices": [str(i + 1), str(i + 2)], "label": 0} for i in range(6)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    (tmp_path / "sums.yaml").write_text(TASK.format(rows=rows), encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={run},dtype=float32",
               "--include_path", str(tmp_path), "--tasks", "sums", "--device", "cpu", "--batch_size", "6",
               "--output_path", str(tmp_path / "out")]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text(encoding="utf-8"))
    assert 0.0 <= results["results"]["sums"]["acc,none"] <= 1.0
    assert results["n-samples"]["sums"]["effective"] == 6
