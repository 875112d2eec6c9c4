"""What the page of evidence says by itself: tables and sentences made from a comparison's summary."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from script_loading import loaded


def estimate(mean: float, spread: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def row(name: str, accuracy: float, seeds: int = 3) -> dict[str, Any]:
    return {"name": name, "accuracy": estimate(accuracy), "evaluations": 1000 * accuracy, "train_time_s": 10 * accuracy,
            "seeds": [{"seed": seed} for seed in range(seeds)]}  # fmt: skip


def difference(other: str, points: float, p: float) -> dict[str, Any]:
    return {"es": "es", "other": other, "difference": points, "low": 0.0, "high": 0.0, "p_holm": p}


def summary(seeds: int = 3) -> dict[str, Any]:
    """Two bases at equal time; the second has no row of grpo's kin."""
    return {
        "comparison": {"methods": {"es": {}, "grpo": {}, "random_search": {}, "ppo": {}}},
        "established": {"grpo": True, "ppo": False},
        "models": {
            "a": {
                "base": {"name": "base", "accuracy": estimate(0.2)},
                "prefix": {"name": "base, <forced>", "accuracy": estimate(0.8)},
                "curves": {"time": {
                    "es": [[[0, 0.0, 0.2], [16, 3.0, 0.5]], [[0, 0.0, 0.1], [8, 5.0, None], [16, 8.0, 0.5]]],
                    "grpo": [[[0, 1.0, 0.4]], []],
                }},
                "rows": {"time": [row("es", 0.6), row("grpo", 0.7, seeds), row("ppo", 0.2),
                                  {"name": "random_search", "seeds": [{}] * 3, "failed": 3}]},
                "tests": {"time": [difference("grpo", -0.1, 0.01), difference("random_search", 0.1, 0.04)]},
            },
            "b": {
                "base": {"name": "base", "accuracy": estimate(0.3)},
                "prefix": {"name": "base, <forced>", "accuracy": estimate(0.5)},
                "curves": {"time": {"es": [[[0, 0.0, 0.3], [8, 4.0, 0.5], [16, 5.0, 0.3], [24, 9.0, 0.5]]]}},
                "rows": {"time": [row("es", 0.8)]},
                "tests": {"time": [difference("grpo", 0.3, 0.001), difference("random_search", 0.1, 0.05)]},
            },
        },
    }  # fmt: skip


def test_an_overview_has_a_line_for_each_method_and_a_column_for_each_base() -> None:
    with loaded("scripts/evidence.py") as evidence:
        lines = evidence.overview(summary(), "time").splitlines()
    assert lines[0] == "| pass@1, % | a | b | evaluations | seconds | half way, s |"
    assert lines[2:] == [
        "| base | 20.0 [10.0, 30.0] | 30.0 [20.0, 40.0] |  |  |  |",
        "| base, &lt;forced> | 80.0 [70.0, 90.0] | 50.0 [40.0, 60.0] |  |  |  |",
        "| es | 60.0 [50.0, 70.0] | 80.0 [70.0, 90.0] | 700 | 7 | 3 |",
        "| grpo | 70.0 [60.0, 80.0] |  |  |  | never |",
        "| random_search |  |  |  |  |  |",
        "| ppo (not established: no claim) | 20.0 [10.0, 30.0] |  |  |  |  |",
    ]


@pytest.mark.parametrize(
    ("curves", "told"),
    [
        ([[[0, 0.0, 0.2], [8, 10.0, 0.4], [16, 20.0, 0.6]]], "15"),  # half of what is between two evaluations
        ([[[0, 0.0, 0.2], [8, 10.0, 0.8]], [[0, 0.0, 0.2]], []], "never"),  # one never came, one failed at once
        ([[[0, 0.0, 0.2], [8, 10.0, 0.5], [16, 11.0, 0.2], [24, 12.0, 0.9]]], "10"),  # the first time counts
    ],
)
def test_half_way_is_read_off_between_evaluations_and_counts_runs_that_never_came(curves: Any, told: str) -> None:
    its = {"base": {"accuracy": estimate(0.2)}, "prefix": {"accuracy": estimate(0.8)},
           "curves": {"time": {"es": curves}}}  # fmt: skip
    with loaded("scripts/evidence.py") as evidence:
        assert evidence.half_way({"models": {"a": its}}, "time", "es") == told


def test_differences_are_counted_in_both_directions_and_not_of_a_seed_or_two() -> None:
    with loaded("scripts/evidence.py") as evidence:
        told = evidence.differences(summary(), "time")
        assert evidence.differences(summary(seeds=2), "time") == ""
    assert (
        "Of 4 paired" in told and "2 are in favour of evolution strategies (" in told and "1 over random_search" in told
    )
    assert "and 1 against them, with p < 0.05" in told


def test_a_skill_that_forcing_does_not_bring_has_no_half_way_and_the_best_constant_has_a_line() -> None:
    found = summary()
    for its in found["models"].values():
        its["prefix"]["accuracy"] = its["base"]["accuracy"]
        its["constant"] = {"name": "always <answer>1</answer>", "accuracy": estimate(0.1)}
    with loaded("scripts/evidence.py") as evidence:
        lines = evidence.overview(found, "time").splitlines()
    assert lines[0] == "| pass@1, % | a | b | evaluations | seconds |"
    assert lines[4] == "| always &lt;answer>1&lt;/answer> | 10.0 [0.0, 20.0] | 10.0 [0.0, 20.0] |  |  |"


def test_seeds_that_are_missing_are_told() -> None:
    with loaded("scripts/evidence.py") as evidence:
        rows = [row("es", 0.5, 5), row("grpo", 0.5, 1)]
        assert evidence.seeds_told(rows, 5).startswith(" (1 to 5 of 5 seeds so far; an interval of one seed is over")
        assert evidence.seeds_told(rows[:1], 5) == ""


def test_a_line_names_what_failed_and_is_empty_where_nothing_is_known() -> None:
    lost = {"name": "grpo", "failed": 2, "hacked": 0, "seeds": [{}, {}]}
    done = {
        "name": "es", "failed": 1, "hacked": 1, "accuracy": estimate(0.5), "kl": None, "retention": {"x": 0.25},
        "gain": {"difference": 0.25, "low": 0.125, "high": 0.375},
        "pass_at_k": {"1": estimate(0.5), "8": estimate(0.75)},
        "seeds": [{"accuracy": 0.75}, {}, {"accuracy": 0.25}], "evaluations": 1000.0, "train_time_s": 9.6,
        "wordless": 0.0625, "unmeasured": 0,
    }  # fmt: skip
    with loaded("scripts/evidence.py") as evidence:
        assert evidence.line(lost, {"grpo": False}, 4, True) == [
            "grpo (not established: no claim; 2 of 2 failed)",
            "",
            "",
            "",
        ]
        for wordless in (False, True):
            assert evidence.line(done, {}, 10, wordless) == [
            "es (1 of 3 failed; 1 hacked)", "50.0 [40.0, 60.0]", "+25.0 [+12.5, +37.5]", "25.0 to 75.0",
            "50.0 [40.0, 60.0]", "75.0 [65.0, 85.0]", "", "25.0", *["6"] * wordless, "1,000", "10",
        ]  # fmt: skip


def test_the_scan_and_the_paths_have_a_table_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = {"n": 4, "accuracy": 0.25, "holds_answer": 0.75, "answer_in_prompt": 0.5, "constant": 0.125, "length": 12.4}
    its = {**plain, "right_samples": 3, "samples": 128}
    scanned = {"rows": 32, "ranked": ["b", "c", "a", "e"], "chosen": ["b"],
               "tasks": {"a": its, "b": its, "c": plain, "e": plain, "d": {"left_out": "slow"}}}  # fmt: skip
    step = {"reward": 0.5, "shorter": 0.25, "es/update_norm": 1.5, "completions/clipped_ratio": 0.25}
    steps = [step, {**step, "reward": 0.0, "shorter": 0.5, "completions/clipped_ratio": 0.75}]
    tried = {"tasks": {"sudoku": {"steps": steps, "replay": "the same"}}}
    for name, value in (("scan_reasoning", scanned), ("paths", tried)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    with loaded("scripts/evidence.py") as evidence:
        monkeypatch.setattr(evidence, "RESULTS", tmp_path)
        monkeypatch.setattr(evidence, "SHOWN", 2)
        told = evidence.section("scan_reasoning").splitlines()
        assert told[0].startswith("4 tasks, the first 32 validation problems or fewer; those") and len(told) == 7
        first = "4 | 25 | 75 | 12 | 50"
        assert told[4:] == [
            f"| **b** | {first} | 3 of 128 | 12 |",
            f"| c | {first} | not sampled | 12 |",
            f"| a | {first} | 3 of 128 | 12 |",
        ]
        line = evidence.section("paths").splitlines()[2]
        assert line == "| `sudoku` | 0.500, 0.000 | 0.25 to 0.50 | 1.50, 1.50 | 50 | the same |"


def test_the_page_says_what_the_results_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And with one figure changed it is found."""
    monkeypatch.setattr("sys.argv", ["evidence.py", "--check"])
    with loaded("scripts/evidence.py") as evidence:
        assert evidence.main() == 0, capsys.readouterr().err
        text = evidence.PAGE.read_text(encoding="utf-8")
        changed = re.sub(r"(\| base \| )(\d)", lambda found: f"{found[1]}{(int(found[2]) + 1) % 10}", text, count=1)
        assert changed != text
        monkeypatch.setattr(evidence, "ROOT", tmp_path)
        monkeypatch.setattr(evidence, "PAGE", tmp_path / "evidence.md")
        evidence.PAGE.write_text(changed, encoding="utf-8")
        assert evidence.main() == 1 and "python scripts/evidence.py" in capsys.readouterr().err
        monkeypatch.setattr("sys.argv", ["evidence.py"])
        assert evidence.main() == 0 and evidence.PAGE.read_text(encoding="utf-8") == text
