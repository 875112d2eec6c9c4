"""The report of failed rewards, and the metrics of a step from those of several batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
from rich.console import Console

from estune.baselines.session import combine
from estune.monitor.monitors import ConsoleMonitor, failures
from estune.monitor.panel import PanelMonitor


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({}, None),
        ({"es/reward_errors": 0, "rewards/a/errors": 0}, None),
        ({"es/reward_errors": 4}, (4, "")),  # of a run that an older version began
        ({"es/reward_errors": 4, "rewards/a/errors": 4}, (4, "")),
        ({"reward_errors": 4.0, "rewards/a/errors": 4.0, "rewards/b/errors": 0.0}, (4, " (a 4)")),
        ({"es/reward_errors": 3, "rewards/accuracy/errors": 2, "rewards/format/errors": 1, "rewards/format/mean": 1},
         (3, " (accuracy 2, format 1)")),
        ({"es/reward_errors": 1, "rewards/a/b/errors": 1, "rewards/c/errors": 0, "user/errors": 9}, (1, " (a/b 1)")),
    ],
)  # fmt: skip
def test_failures_are_reported_by_function(record: dict[str, Any], told: tuple[int, str] | None) -> None:
    assert failures(record) == told


STEP = {
    "step": 1, "step_time": 1.0, "reward": 0.5, "es/fitness_std": 0.1, "es/fitness_best": 0.6, "es/update_ratio": 1e-3,
    "es/tokens_per_s": 9.0, "es/reward_errors": 3, "rewards/accuracy/errors": 2, "rewards/format/errors": 1,
}  # fmt: skip


def test_the_line_and_the_panel_name_the_functions(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleMonitor(2, 0).log(STEP)
    assert "  failed 3 (accuracy 2, format 1)  left" in capsys.readouterr().out
    panel = PanelMonitor("title", max_steps=2, population_size=4, console=Console(width=160))
    panel.log(STEP)
    panel.close()
    assert "3 rewards failed (accuracy 2, format 1)" in " ".join(capsys.readouterr().out.split())


def test_batches_of_a_step_add_up_their_failures_and_average_the_rest() -> None:
    batches = [
        (4, {"reward": 1.0, "reward_errors": 3.0, "rewards/a/errors": 2.0, "rewards/b/errors": 1.0, "errors": 1.0}),
        (12, {"reward": 2.0, "reward_errors": 1.0, "rewards/a/errors": 1.0, "rewards/b/errors": 0.0, "errors": 2.0}),
        (1, {"reward": math.nan, "reward_errors": 1.0, "rewards/a/errors": 0.0, "rewards/b/errors": 1.0}),
    ]
    found = combine(batches)
    assert (found["reward_errors"], found["rewards/a/errors"], found["rewards/b/errors"]) == (5, 3, 2)
    assert found["reward"] == 1.75 and found["errors"] == 1.75  # a mean by the batches' sizes
    assert combine(batches[:1]) == batches[0][1]
