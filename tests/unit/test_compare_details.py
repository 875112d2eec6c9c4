"""The report's tables of details and of tuning."""

from __future__ import annotations

import re
from typing import Any

import pytest

from estune.compare.report import details_table, retention_labels, tuning_table
from estune.compare.statistics import two_level
from estune.compare.tables import method_row, untrained_row
from estune.train.evaluation import interval, pass_at_k

BASE: dict[str, Any] = {
    "correct": "1000", "length": 3.0, "right_of": [2, 1, 0, 0], "samples": 2, "never_solved": [2, 3],
    "discovery_control": [0, 1], "retention": {"other": {"accuracy": 0.5, "n": 4}, "short": {"accuracy": 0.25, "n": 8}},
    "judged": {"literal_share_without_words": 0.75},
}  # fmt: skip


def tuned(seed: int, **changes: Any) -> dict[str, Any]:
    return {
        **BASE, "status": "done", "seed": seed, "accuracy": 0.5, "correct": "1010", "right_of": [2, 1, 0],
        "discovery": [2, 0], "kl": 0.1, "evaluations": 8, "train_time_s": 1.0, "steps": 2, "run": "runs/es",
        "file": "results/es.json", "hacking": {"hacked": False, "literal_share_without_words": 0.5},
        "changes": {"norm": 6.5, "relative_norm": 0.067, "walk_ratio": 1.25, "moved_share": 0.9,
                    "excess_kurtosis": 0.1, "histogram": None, **changes},
    }  # fmt: skip


def table(method: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the table's lines, without marks."""
    comparison = {"task": "countdown", "retention": {"other": {"task": "chain:1"}, "short": {"task": "countdown"}}}
    model = {
        "base": untrained_row("base", BASE, "results/base.json", 3),
        "rows": {"time": [method_row("es", method, BASE, 3)]},
    }
    page = details_table(model, "time", retention_labels(comparison, model["base"]["retention_rows"]))
    lines = re.findall(r"<tr>(.*?)</tr>", page)
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)] for line in lines]


def test_the_base_has_a_row_in_discovery_and_prompt_variants_are_labelled() -> None:
    head, base, es = table([tuned(0), tuned(1)])
    first = dict(zip(head, base, strict=True))
    assert first["discovered greedily"] == "0 by definition" and first["discovered in samples"].startswith("50.0 ")
    assert first["kept: other, n 4"] == "50.0" and first["kept (prompt variant): short, n 8"] == "25.0"
    assert first["no word, %"] == "75.0" and first["update norm"] == ""
    row = dict(zip(head, es, strict=True))
    assert row["discovered greedily"].startswith("50.0 ") and row["discovered in samples"].startswith("50.0 ")
    assert (row["update norm"], row["update norm / theta"], row["update norm / random walk"]) == (
        "6.5", "6.70e-02", "1.25")  # fmt: skip
    assert (row["moved, %"], row["no word, %"]) == ("90.0", "50.0")


def test_unknown_changes_leave_empty_cells() -> None:
    head, _, es = table([tuned(0, walk_ratio=None, excess_kurtosis=None, relative_norm=None)])
    row = dict(zip(head, es, strict=True))
    assert (row["update norm / random walk"], row["excess kurtosis"], row["update norm / theta"]) == ("", "", "")


def test_pass_at_k_is_of_the_first_rows_with_the_interval_of_one_model_or_of_seeds() -> None:
    values = [pass_at_k(2, right, 2) for right in (2, 1, 0)]
    one = untrained_row("base", BASE, "f", 3)["pass_at_k"]
    assert list(one) == ["1", "2"] and one["2"]["mean"] == pytest.approx(2 / 3)
    assert (one["2"]["low"], one["2"]["high"]) == interval(values)
    other = tuned(1) | {"right_of": [0, 0, 1]}
    both = method_row("es", [tuned(0), other], BASE, 3)["pass_at_k"]["1"]
    assert both["mean"] == pytest.approx((0.5 + 1 / 6) / 2)
    assert (both["low"], both["high"]) == pytest.approx(
        (two_level([[1, 0.5, 0], [0, 0, 0.5]]).low, two_level([[1, 0.5, 0], [0, 0, 0.5]]).high)
    )


def test_the_tuning_table_marks_what_each_budget_chose() -> None:
    trials = [
        {
            "trial": {"sigma": sigma},
            "status": "done",
            "accuracy": right,
            "budget": budget,
            "file": f"{budget}-{sigma}",
        }
        for sigma, budget, right in ((0.1, "evaluations", 0.5), (0.1, "time", 0.25), (0.2, "time", 0.75))
    ]
    cost = {"evaluations": 1234, "train_time_s": 5.4}
    both = {"es": {"chosen": {"sigma": 0.1}, "chosen_time": {"sigma": 0.2}, "trials": trials, "cost": cost}}
    page = tuning_table(both)
    assert re.findall(r"<b>(.*?)</b>", page) == [
        '<a href="evaluations-0.1">sigma 0.1 (equal evaluations): 50.0</a>',
        '<a href="time-0.2">sigma 0.2 (equal time): 75.0</a>',
    ]
    assert re.findall(r"<span>(.*?)</span>", page) == ['<a href="time-0.1">sigma 0.1 (equal time): 25.0</a>']
    assert "<td>1,234</td><td>5</td>" in page
    one = {"es": {"chosen": {"sigma": 0.1}, "trials": trials[:1], "cost": cost}}
    assert re.findall(r"<b>(.*?)</b>", tuning_table(one)) == ['<a href="evaluations-0.1">sigma 0.1: 50.0</a>']
