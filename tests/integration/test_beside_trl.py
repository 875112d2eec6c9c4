"""Beside TRL: one dataset, one reward, other class names; and TRL's own reward functions, unmodified."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import PATIENCE_S
from datasets import Dataset
from tiny_models import save_tiny, tiny_tokenizer

from estune import ESConfig, ESTrainer
from estune.rewards.pool import RewardBatch, RewardPool, load_reward

pytestmark = pytest.mark.e2e

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
