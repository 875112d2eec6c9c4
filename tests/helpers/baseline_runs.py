"""Helpers that run the baselines; the fixtures are in `conftest.py`."""

import json
from pathlib import Path

import pytest
from command_line import weights
from safetensors.numpy import load_file

from estune import ESConfig
from estune.config import SEARCHES
from estune.tasks import get_task

trl = pytest.importorskip("trl", reason="the baselines' trainers")

from estune.baselines import BaselineTrainer  # noqa: E402

SMALL = {
    "model": "tiny",
    "task": "countdown",
    "max_steps": 3,
    "batch_size": 2,
    "num_generations": 4,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "num_threads": 1,
    "report_to": ["none"],
    "reward_isolation": "inline",
    "output_dir": "run",
}
TRL = {"generation": "trl"}


def train(method, train_dataset=None, reward_funcs=None, **changes):
    """Train in this process; return the run directory."""
    args = ESConfig(**{**SMALL, "method": method, **changes})
    return BaselineTrainer(args=args, train_dataset=train_dataset, reward_funcs=reward_funcs).train()


def weights_of_base():
    model = BaselineTrainer(args=ESConfig(**{**SMALL, "method": "grpo", "max_steps": 0, "output_dir": "base"})).train()
    return weights(model)


def easy_rows(count=4):
    return get_task("countdown").load("train")[:count]


def letters(completions, **_):
    return [sum(map(ord, text)) / 1e4 for text in completions]


def always_right(completions, **_):
    return [1.0] * len(completions)


def tensors(directory):
    return load_file(Path(directory) / "model.safetensors")


NO_GRADIENT = {"learning_rate": None, "num_generations": None, "population_size": 4, "sigma": 0.02}
FEW = {"task": "countdown", "dataset_name": "rows.jsonl", "max_steps": 4}  # two steps an epoch


def words_of(method, **changes):
    values = {**SMALL, **FEW, "save_steps": 1, "save_total_limit": 1, "method": method, **changes}
    if method in SEARCHES:
        values |= NO_GRADIENT
    words = ["train"]
    for name, value in values.items():
        if value is not None:
            value = json.dumps(value) if isinstance(value, dict) else value
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return words


def write_few(place, count=4):
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in easy_rows(count)))
