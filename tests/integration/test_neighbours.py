"""Beside TRL: one dataset, one reward, other class names; its reward functions unmodified. lm_eval reads a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import PATIENCE_S
from datasets import Dataset
from tiny_models import save_tiny, tiny_tokenizer

from estune import ESConfig, ESTrainer
from estune.rewards.pool import RewardBatch, RewardPool, load_reward

pytestmark = pytest.mark.real

trl = pytest.importorskip("trl", reason="an optional neighbour")

ROWS = Dataset.from_list([{"prompt": f"count to {i}: ", "bonus": i / 10} for i in range(8)])
COMMON = {"max_steps": 2, "max_completion_length": 8, "seed": 0, "logging_steps": 1, "report_to": ["none"]}


def vowels(completions, bonus, **kwargs):
    return [sum(text.count(v) for v in "aeiou") + own for text, own in zip(completions, bonus, strict=True)]


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "own"),
    [
        (ESTrainer, ESConfig, {"population_size": 4, "sigma": 0.05, "reward_workers": 1}),
        (trl.GRPOTrainer, trl.GRPOConfig,
         {"num_generations": 4, "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True}),
    ],
    ids=["estune", "trl"],
)  # fmt: skip
def test_the_same_program_with_other_class_names(trainer_class, config_class, own, tmp_path: Path) -> None:
    import transformers

    save_tiny("llama", tmp_path / "model")
    args = config_class(output_dir=str(tmp_path / "run"), **COMMON, **own)
    trainer = trainer_class(
        model=str(tmp_path / "model"),
        reward_funcs=vowels,
        args=args,
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


CHAT = [
    [{"role": "assistant", "content": text}] for text in ("<think>\nso\n</think>\n42", "42", r"\boxed{\frac{1}{2}}")
]


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("trl.rewards:think_format_reward", {}, [1.0, 0.0, 0.0]),
        ("trl.rewards:accuracy_reward", {"solution": [r"$42$", r"$42$", r"$\frac{1}{2}$"]}, None),
    ],
)
def test_trls_own_rewards_run_unmodified(name: str, columns: dict, expected: list | None) -> None:
    """In a worker of estune's they give what they give when called as TRL calls them."""
    if name.endswith("accuracy_reward"):
        pytest.importorskip("math_verify", reason="what that reward needs")
    function = load_reward(name)
    prompts = [[{"role": "user", "content": "?"}]] * 3
    own = function(prompts=prompts, completions=CHAT, completion_ids=[[1]] * 3, **columns)
    batch = RewardBatch(prompts, CHAT, [[1]] * 3, columns, {"global_step": 0, "max_steps": 1})
    with RewardPool([function], ["reward"], timeout_s=PATIENCE_S, workers=1, isolation="process") as pool:
        found = pool.submit(batch).result()
    assert not found.failed.any()
    assert found.rewards[:, 0].tolist() == [float("nan") if value is None else value for value in own]
    if expected is not None:
        assert own == expected


# --- lm_eval, with a small local task ---------------------------------------------------------------------------------


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
