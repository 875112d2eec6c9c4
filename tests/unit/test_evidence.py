"""What the page of evidence says by itself: tables and sentences made from a comparison's summary."""

from __future__ import annotations

import json
from typing import Any

import pytest
from script_loading import ROOT, loaded


def estimate(mean: float, spread: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def row(name: str, accuracy: float) -> dict[str, Any]:
    return {"name": name, "accuracy": estimate(accuracy), "evaluations": 1000 * accuracy, "train_time_s": 10 * accuracy}


def difference(other: str, points: float, p: float) -> dict[str, Any]:
    return {"es": "es", "other": other, "difference": points, "low": 0.0, "high": 0.0, "p_holm": p}


SUMMARY = {
    "comparison": {"methods": {"es": {}, "grpo": {}, "random_search": {}, "ppo": {}}},
    "established": {"grpo": True, "ppo": False},
    "models": {
        "a": {
            "base": {"name": "base", "accuracy": estimate(0.2)},
            "prefix": {"name": "base, <forced>", "accuracy": estimate(0.8)},
            "curves": {
                "es": [[[8, 1.0, 0.2], [16, 3.0, 0.5]], [[8, 2.0, 0.1], [16, 5.0, None], [24, 7.0, 0.6]]],
                "grpo": [[[8, 1.0, 0.4]]],
            },
            "rows": {"time": [row("es", 0.6), row("grpo", 0.7), row("ppo", 0.2), {"name": "random_search"}]},
            "tests": {"time": [difference("grpo", -0.1, 0.01), difference("random_search", 0.1, 0.04)]},
        },
        "b": {
            "base": {"name": "base", "accuracy": estimate(0.3)},
            "prefix": {"name": "base, <forced>", "accuracy": estimate(0.5)},
            "curves": {"es": [[[8, 4.0, 0.4]]]},
            "rows": {"time": [row("es", 0.8)]},
            "tests": {"time": [difference("grpo", 0.3, 0.001), difference("random_search", 0.1, 0.05)]},
        },
    },
}


def test_an_overview_has_a_line_for_each_method_and_a_column_for_each_base() -> None:
    with loaded("scripts/evidence.py") as evidence:
        lines = evidence.overview(SUMMARY, "time").splitlines()
    assert lines[0] == "| pass@1, % | a | b | evaluations | seconds | half way, s |"
    assert lines[2:] == [
        "| base | 20.0 [10.0, 30.0] | 30.0 [20.0, 40.0] |  |  |  |",
        "| base, &lt;forced> | 80.0 [70.0, 90.0] | 50.0 [40.0, 60.0] |  |  |  |",
        "| es | 60.0 [50.0, 70.0] | 80.0 [70.0, 90.0] | 700 | 7 | 4 |",
        "| grpo | 70.0 [60.0, 80.0] |  | 700 | 7 | never |",
        "| ppo (not established: no claim) | 20.0 [10.0, 30.0] |  | 200 | 2 | never |",
    ]


def test_differences_are_counted_in_both_directions() -> None:
    with loaded("scripts/evidence.py") as evidence:
        told = evidence.differences(SUMMARY, "time")
    assert "Of 4 paired" in told and "2 are in favour" in told and "1 of them against random search" in told
    assert told.endswith("and 1 against them.\n")


def test_a_page_that_says_something_else_than_the_results_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page as it is says what the results say; with a figure changed it does not."""
    with loaded("scripts/evidence.py") as evidence:
        monkeypatch.setattr("sys.argv", ["evidence.py", "--check"])
        assert evidence.main() == 0, capsys.readouterr().err
        names = [name for _, name, _ in evidence.PLACE.findall(evidence.PAGE.read_text(encoding="utf-8"))]
        assert names
        for name in names:
            summary = json.loads((ROOT / "benchmarks" / "results" / name / "summary.json").read_text(encoding="utf-8"))
            first = next(iter(summary["models"].values()))["base"]["accuracy"]
            assert f"| base | {evidence.share(first)} |" in evidence.section(name)
            first["mean"] = 0.98765
            monkeypatch.setattr(evidence.json, "loads", lambda text, summary=summary: summary)
            assert evidence.main() == 1 and "python scripts/evidence.py" in capsys.readouterr().err
            monkeypatch.undo()
            monkeypatch.setattr("sys.argv", ["evidence.py", "--check"])
