"""Monitors: failed rewards by function, metrics of several batches, sparklines, and the page of a report."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from estune.baselines.session import combine
from estune.monitor.monitors import ConsoleMonitor, MemberLines, failures
from estune.monitor.panel import BLOCKS, PanelMonitor, sparkline, spread
from estune.monitor.report.data import mark
from estune.monitor.report.page import page


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


def joined(parts: list[tuple[str, bool]]) -> str:
    return "".join(piece for piece, _ in parts)


def test_marks_what_the_other_side_lacks() -> None:
    before, after = mark("The capital is Paris, I think.", "The answer is Paris.")
    assert joined(before) == "The capital is Paris, I think."
    assert joined(after) == "The answer is Paris."
    assert [piece for piece, differs in after if differs] == ["answer"]
    assert "capital" in [piece for piece, differs in before if differs]
    assert mark("same", "same") == ([("same", False)], [("same", False)])
    assert mark("", "new") == ([], [("new", True)])


def test_nothing_a_model_says_becomes_markup() -> None:
    text = '</script><script>alert(1)</script><!-- \u2028 "quoted"'
    html = page({"runs": [{"name": text}]})
    assert html.count("</script>") == 2  # the data's and the code's own ends
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["runs"][0]["name"] == text


def test_the_page_asks_nobody() -> None:
    html = page({"runs": []})
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
    assert "default-src 'none'" in html


def test_sparklines() -> None:
    assert sparkline([]) == sparkline([None]) == ""
    assert sparkline([1.0, 1.0]) == BLOCKS[0] * 2
    assert sparkline([0.0, None, 1.0]) == BLOCKS[0] + " " + BLOCKS[-1]
    assert len(sparkline(list(map(float, range(100))), width=20)) == 20
    assert spread([1.0] * 5) == BLOCKS[-1]
    drawn = spread([0.0] * 8 + [1.0], bins=3)
    assert drawn == BLOCKS[-1] + " " + BLOCKS[0]


def test_a_long_step_prints_at_most_one_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    times, run = iter([0.0, 30.0, 61.0, 62.0, 200.0, 230.0, 259.0, 261.0]), SimpleNamespace(steps_done=0)
    lines = MemberLines(2, 4, run, lambda: next(times))
    for done in (1, 2, 3, 4):
        lines.members_done(done)
    run.steps_done = 1
    for done in (1, 2, 3):
        lines.members_done(done)
    assert capsys.readouterr().out == "step 1/2  2/4 members\nstep 2/2  3/4 members\n"
