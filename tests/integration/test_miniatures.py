"""A step of every task that comparisons are made on, through the command line, and the run rebuilt from its journal.

The model is random and its answers are noise: what is shown is that prompts fit, that answers are scored, and that
nothing breaks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import journal
from tiers import few

pytestmark = pytest.mark.miniature
TASKS = (
    "arc_1d arc_agi:1500 arc_agi:python:1500 gsm_symbolic math chain:4 mini_sudoku sudoku rg:gcd rg:chain_sum".split()
)


@pytest.fixture(scope="module")
def long_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama with room for ARC's prompts."""
    place = tmp_path_factory.mktemp("long") / "llama"
    shutil.copytree(tiny_llama, place)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}), encoding="utf-8")
    return place


@pytest.mark.parametrize("task", few(TASKS, ("arc_1d", "math", "chain:4", "mini_sudoku", "rg:gcd")))
def test_a_step_of_every_task(task: str, long_llama: Path, place: Path, run_model: Any) -> None:
    done = run_model(
        "train", "--model", long_llama, "--task", task, "--noise", "lowrank", "--population_size", 4, "--batch_size", 2,
        "--sigma", 0.05, "--max_steps", 1, "--eval_steps", 1, "--eval_rows", 2, "--max_completion_length", 12,
        "--reward_workers", 1, "--report_to", "none", "--output_dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    [step] = [line for line in journal(place / "run") if line["kind"] == "step"]
    assert step["failures"] == 0 and len(step["fitness"]) == 4
    evaluated = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["eval_accuracy"] == 0.0 for line in evaluated if "eval_reward" in line)  # noise is not right
    assert run_model("replay", "--run", "run", "--output_dir", "again").code == 0


@pytest.mark.e2e
def test_mini_sudoku_by_es_and_grpo(place: Path, run_model: Any) -> None:
    """Two steps of either on the base that solves a few per cent: both are paid for right cells."""
    base = Path(__file__).parents[2] / "benchmarks" / "bases" / "sudoku"
    common = ("train", "--model", base, "--task", "mini_sudoku", "--max_steps", 2, "--max_completion_length", 40,
              "--eval_steps", 2, "--eval_rows", 20, "--num_threads", 1, "--report_to", "none")  # fmt: skip
    es = ("--noise", "lowrank", "--population_size", 6, "--batch_size", 8, "--sigma", 0.02, "--output_dir", "es")
    grpo = ("--method", "grpo", "--batch_size", 4, "--learning_rate", 1e-4, "--output_dir", "grpo")
    for own in (es, grpo):
        done = run_model(*common, *own)
        assert done.code == 0, done.err
        lines = [json.loads(line) for line in (place / own[-1] / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "reward" in line]
        assert len(steps) == 2 and all(0 < line["reward"] < 1 for line in steps)
