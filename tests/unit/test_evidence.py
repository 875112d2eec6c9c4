"""The generated tables and sentences of the page of evidence."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from script_loading import ROOT, loaded


def estimate(mean: float, spread: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def row(name: str, accuracy: float, seeds: int = 3) -> dict[str, Any]:
    return {"name": name, "accuracy": estimate(accuracy), "evaluations": 1000 * accuracy, "train_time_s": 10 * accuracy,
            "seeds": [{"seed": seed} for seed in range(seeds)]}  # fmt: skip


def difference(other: str, points: float, p: float) -> dict[str, Any]:
    return {"es": "es", "other": other, "difference": points, "low": 0.0, "high": 0.0, "p_holm": p}


def summary(seeds: int = 3) -> dict[str, Any]:
    """Return a summary of two bases at equal time; the second lacks the rows of grpo, ppo and random search."""
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
    with loaded("scripts/evidence_tables.py") as tables:
        lines = tables.overview(summary(), ["time"]).splitlines()
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
def test_half_way_is_interpolated_and_counts_runs_that_never_reached_it(curves: Any, told: str) -> None:
    its = {"base": {"accuracy": estimate(0.2)}, "prefix": {"accuracy": estimate(0.8)},
           "curves": {"time": {"es": curves}}}  # fmt: skip
    with loaded("scripts/evidence_tables.py") as tables:
        assert tables.half_way({"models": {"a": its}}, "time", "es") == told


def test_differences_are_counted_in_both_directions_but_not_for_one_or_two_seeds() -> None:
    with loaded("scripts/evidence_tables.py") as tables:
        told = tables.differences(summary(), "time")
        assert tables.differences(summary(seeds=2), "time") == ""
    assert "on each base: 4 pairs. ES is better in 2 (" in told and "1 against random_search" in told
    assert "and worse in 1, with p < 0.05" in told


def test_steadiness_is_pooled_over_bases_and_counts_runs_below_their_peak() -> None:
    with loaded("scripts/evidence_tables.py") as tables:
        found = {(each.budget, each.method): each for each in tables.steadiness("compare_countdown")}
        summary = tables.read_summary(tables.RESULTS / "compare_countdown.json")
        told = tables.stability("")
    lowrank, grpo = (found["time", method] for method in ("es-lowrank", "grpo"))
    rows = [next(r for r in m["rows"]["time"] if r["name"] == "grpo") for m in summary["models"].values()]
    variances = [statistics.variance(seed["accuracy"] for seed in row["seeds"]) for row in rows]
    assert grpo.spread[0] == pytest.approx(100 * math.sqrt(statistics.mean(variances)))
    assert grpo.spread[1] < grpo.spread[0] < grpo.spread[2] and grpo.runs == lowrank.runs == 15
    curves = [curve for m in summary["models"].values() for curve in m["curves"]["time"]["es-lowrank"]]
    ends = [[accuracy for *_, accuracy in curve if accuracy is not None] for curve in curves]
    assert lowrank.fallen == sum(max(values) - values[-1] > 0.05 + 1e-9 for values in ends) > grpo.fallen
    assert f"| {lowrank.fallen} of 15 [" in told


def test_a_skill_that_cannot_be_forced_has_no_half_way_and_the_best_constant_has_a_line() -> None:
    found = summary()
    for its in found["models"].values():
        its["prefix"]["accuracy"] = its["base"]["accuracy"]
        its["constant"] = {"name": "always <answer>1</answer>", "accuracy": estimate(0.1)}
    with loaded("scripts/evidence_tables.py") as tables:
        lines = tables.overview(found, ["time"]).splitlines()
    assert lines[0] == "| pass@1, % | a | b | evaluations | seconds |"
    assert lines[4] == "| always &lt;answer>1&lt;/answer> | 10.0 [0.0, 20.0] | 10.0 [0.0, 20.0] |  |  |"


def test_missing_seeds_get_a_note() -> None:
    with loaded("scripts/evidence_tables.py") as tables:
        rows = [row("es", 0.5, 5), row("grpo", 0.5, 1)]
        assert tables.seeds_note(rows, 5).startswith(" (1 to 5 of 5 seeds so far; an interval of one seed is over")
        assert tables.seeds_note(rows[:1], 5) == ""


def test_a_line_names_failures_and_is_empty_without_results() -> None:
    lost = {"name": "grpo", "failed": 2, "hacked": 0, "seeds": [{}, {}]}
    done = {
        "name": "es", "failed": 1, "hacked": 1, "accuracy": estimate(0.5), "kl": None, "retention": {"x": 0.25},
        "gain": {"difference": 0.25, "low": 0.125, "high": 0.375},
        "pass_at_k": {"1": estimate(0.5), "8": estimate(0.75)},
        "seeds": [{"accuracy": 0.75}, {}, {"accuracy": 0.25}], "evaluations": 1000.0, "train_time_s": 9.6,
        "wordless": 0.0625, "unmeasured": 0,
    }  # fmt: skip
    with loaded("scripts/evidence_tables.py") as tables:
        assert tables.line(lost, {"grpo": False}, 4, True) == [
            "grpo (not established: no claim; 2 of 2 failed)",
            "",
            "",
            "",
        ]
        for wordless in (False, True):
            assert tables.line(done, {}, 10, wordless) == [
            "es (1 of 3 failed; 1 hacked)", "50.0 [40.0, 60.0]", "+25.0 [+12.5, +37.5]", "25.0 to 75.0",
            "50.0 [40.0, 60.0]", "75.0 [65.0, 85.0]", "", "25.0", *["6"] * wordless, "1,000", "10",
        ]  # fmt: skip


def test_a_vote_says_what_it_costs_and_has_no_cells_of_a_single_model() -> None:
    row = {"name": "vote", "seeds": [{"accuracy": 0.5}], "accuracy": estimate(0.5), "pass_at_k": {}, "kl": float("nan"),
           "gain": {"difference": 0.1, "low": 0.0, "high": 0.2}, "retention": {"short": float("nan")}, "wordless": 0.0,
           "evaluations": 64.0, "train_time_s": 2.0, "vote": {"members": 8}}  # fmt: skip
    run = {"kind": "run", "method": "vote", "seed": 0, "budget": "time", "status": "done", "correct": "1000",
           "accuracy": 0.25, "hacking": {"normalised_reward_change": 0.1}, "vote": {"members": 8}}  # fmt: skip
    with loaded("scripts/evidence_tables.py") as tables:
        cells = tables.line(row, {}, 10, False)
        [line] = tables.seeds_of([run], {"never_solved": [0, 1]}, "time").splitlines()[2:]
        assert tables.opponent({"other": "vote", "members": 8}) == "vote (8 answers to each problem)"
    assert cells[0] == "vote (8 answers to each problem)" and cells[4:8] == ["", "", "", ""]
    assert cells[8:] == ["64", "2"]
    assert line == "| vote | 0 | 0 |  |  | 25.0 | +0.100 |  |  | 1 |  |  |  |"


def test_two_budgets_share_a_table() -> None:
    found = summary()
    for its in found["models"].values():
        its["rows"]["evaluations"] = its["rows"]["time"][:1]
        its["curves"]["evaluations"] = its["curves"]["time"]
    with loaded("scripts/evidence_tables.py") as tables:
        lines = tables.overview(found, ["evaluations", "time"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:8]] == [
        "| **equal evaluations**",
        "| es",
        "| **equal time**",
        "| es",
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_scans_paths_and_conciseness_have_a_table_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = {"n": 4, "accuracy": 0.25, "holds_answer": 0.75, "answer_in_prompt": 0.5, "constant": 0.125, "length": 12.4}
    its = {**plain, "right_samples": 3, "samples": 128}
    scanned = {"rows": 32, "ranked": ["b", "c", "a", "e"], "chosen": ["b"],
               "tasks": {"a": its, "b": its, "c": plain, "e": plain, "d": {"left_out": "slow"}}}  # fmt: skip
    step = {"reward": 0.5, "shorter": 0.25, "es/update_norm": 1.5, "completions/clipped_ratio": 0.25}
    steps = [step, {**step, "reward": 0.0, "shorter": 0.5, "completions/clipped_ratio": 0.75}]
    tried = {"tasks": {"sudoku": {"steps": steps, "replay": "estune: 2 steps verified, in sudoku-replayed"}}}
    known = {"distance": 8.25, "knowledge_distance": 4.0, "correct": 0.5}
    run = {**known, "seed": 1, "seconds": 60.4, "curve": [{"step": 0, "distance": 8.25}, {"step": 2, "distance": 2.0}],
           "against_base": {"went": 1, "came": 2, "points": 0.5, "points_ci95": [-1.0, 2.0]}}  # fmt: skip
    brief = {"base": known, "runs": [run]}
    for name, value in (
        ("scan_reasoning", {"default": scanned, "easy": {**scanned, "chosen": []}}),
        ("paths", tried),
        ("conciseness", brief),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    with loaded("scripts/evidence_tables.py") as tables:
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        told = tables.scans(2).splitlines()
        first = "4 | 25 | 75 | 12 | 50"
        assert told[2:6] == [
            "| **4 tasks at their default level, 1 chosen** |  |  |  |  |  |  |  |",
            f"| **b** | {first} | 3 of 128 | 12 |",
            f"| c | {first} | not sampled | 12 |",
            f"| a | {first} | 3 of 128 | 12 |",
        ]
        assert told[6].startswith("| **4 tasks at their lowest level, none chosen**") and len(told) == 10
        line = tables.section("paths").splitlines()[2]
        assert line == "| `sudoku` | 0.500, 0.000 | 0.25 to 0.50 | 1.50, 1.50 | 50 | 2 steps verified |"
        told = tables.section("conciseness").splitlines()
        assert told[2:] == [
            "| base | 8.2 | 4.0 | 50.0 |  |  |",
            "| seed 1 | 8.2 | 4.0 | 50.0 | 1, 2, +0.5 [-1.0, +2.0] | 60 |",
        ]


@pytest.mark.parametrize("name", ["compare_smollm2_basic_arithmetic", "compare_smollm2_gcd_cut_off"])
def test_all_tables_of_a_file_can_be_shown(name: str) -> None:
    """All seeds, failed ones too, all trials and all paired differences; also of a comparison that was cut off."""
    with loaded("scripts/evidence_tables.py") as tables:
        packed = tables.read_archive(tables.RESULTS / f"{name}.json")["rows"]
        lines = tables.everything(name).splitlines()
    runs = [row for row in packed if row["kind"] == "run"]
    for row in runs:
        told = f"| {row['method']} | {row['seed']} | {row['evaluations']:,} |"
        assert any(line.startswith(told) for line in lines), told
    assert sum("failed: none of" in line for line in lines) == sum(row["status"] == "failed" for row in runs)
    trials = [line for line in lines if re.match(r"\| \S+ \| equal (time|evaluations) \|", line)]
    assert len(trials) == sum(row["kind"] == "trial" for row in packed)
    assert any(line.startswith("| es - random_search |") for line in lines)
    if name == "compare_smollm2_basic_arithmetic":
        assert sum("| 2 of 1728 |" in line for line in lines) == 1


# --- pages and pictures -----------------------------------------------------------------------------------------------


def test_the_page_and_its_pictures_agree_with_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A changed figure, phrase or picture is found; figures and pictures are repaired."""
    monkeypatch.setattr("sys.argv", ["evidence.py", "--check"])
    with loaded("scripts/evidence.py") as evidence:
        assert evidence.main() == 0, capsys.readouterr().err
        page, images = tmp_path / "docs" / "evidence.md", tmp_path / "docs" / "images"
        text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
        shutil.copytree(evidence.IMAGES, images)
        (tmp_path / "README.md").write_text("", encoding="utf-8")
        monkeypatch.setattr(evidence, "ROOT", tmp_path)
        monkeypatch.setattr(evidence, "IMAGES", images)
        page.write_text(text, encoding="utf-8")
        assert evidence.main() == 0
        picture = images / "conciseness.png"
        shutil.copy(images / "compare_mini_sudoku.png", picture)
        changed = re.sub(r"(\| base \| )(\d)", lambda found: f"{found[1]}{(int(found[2]) + 1) % 10}", text, count=1)
        page.write_text(changed.replace("49 to 92 %", "50 to 92 %"), encoding="utf-8")
        assert changed != text and evidence.main() == 1
        told = capsys.readouterr().err
        assert "docs/evidence.md differs from the results: python scripts/evidence.py" in told
        assert "docs/images/conciseness.png differs" in told and "must contain 'three seeds: 49 to 92 %'" in told
        monkeypatch.setattr("sys.argv", ["evidence.py"])
        assert evidence.main() == 1  # a phrase is for its author to mend
        assert evidence.is_drawn("conciseness") and picture.stat().st_size > 10_000
        page.write_text(page.read_text(encoding="utf-8").replace("50 to 92 %", "49 to 92 %"), encoding="utf-8")
        assert evidence.main() == 0 and page.read_text(encoding="utf-8") == text


def test_the_page_is_short() -> None:
    assert len((ROOT / "docs" / "evidence.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_figures_computed_from_recorded_answers_equal_the_summary() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "conciseness.json").read_text(encoding="utf-8"))
    answers, before = found.pop("answers"), copy.deepcopy(found)
    with loaded("benchmarks/conciseness.py") as conciseness:
        conciseness.count(found, answers)
    assert found.pop("metrics") == before.pop("metrics") and found == before
    for entry, name in [(found["base"], "base"), *((run, f"seed-{run['seed']}") for run in found["runs"])]:
        tests = [row["reward"] for row in answers if row["of"] == name and row["split"] == "test"]
        assert len(tests) == 8 and entry["distance"] == pytest.approx(-sum(tests) / 8)
