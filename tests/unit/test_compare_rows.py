"""A comparison's plan and summary, without a run: budgets, data, failed seeds, corrected p-values, processes."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from estune.compare import report, worker
from estune.compare.config import Comparison, from_mapping
from estune.compare.measure import retained_config
from estune.compare.plan import Cell, cells, configuration, entries, rows_of, with_budget, with_time
from estune.compare.processes import Stopped
from estune.compare.report import details_table, retention_labels, tuning_table
from estune.compare.results import base_digest
from estune.compare.runner import Runner
from estune.compare.statistics import two_level
from estune.compare.tables import method_row, summarise, untrained_row
from estune.errors import ExternalError, UserError
from estune.files import try_lock
from estune.train.evaluation import interval, pass_at_k

ES = {"method": "es", "settings": {"population_size": 4, "batch_size": 8}}


def comparison(**changes: Any) -> Comparison:
    return from_mapping({"task": "countdown", "models": {"tiny": "tiny"}, "methods": {"es": ES}, **changes})


def planned(made: Comparison, method: str) -> Any:
    return configuration(made, "tiny", method, entries(made)[method].trials[0], 0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"num_workers": 2}, "leave time out of the budget"), ({"engine": "vllm"}, "settings cannot hold engine")],
)
def test_what_the_other_methods_cannot_have_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        comparison(settings=settings, budget={"evaluations": 64, "time_s": 1.0})


def test_trials_that_are_equal_for_random_search_get_another_sigma() -> None:
    trials = [{"sigma": 0.02, "learning_rate": 0.01}, {"sigma": 0.02, "learning_rate": 0.02}, {"sigma": 0.04}]
    made = entries(comparison(methods={"es": {**ES, "trials": trials}}))["random_search"]
    assert [trial["sigma"] for trial in made.trials] == [0.02, 0.04, 0.01]


def test_a_budget_pays_for_whole_steps_and_at_least_one() -> None:
    made = comparison(methods={"grpo": {"method": "grpo", "settings": {
        "batch_size": 2, "num_generations": 8, "method_kwargs": {"num_iterations": 4}}}})  # fmt: skip
    args = planned(made, "grpo")
    assert with_budget(args, 100, 200).max_steps == 24  # six generations of 16, each learnt from four times
    with pytest.raises(UserError, match="does not pay for one step of method grpo, which scores 16"):
        with_budget(args, 15, 200)
    with pytest.raises(UserError, match="one step of method es, which scores 32"):
        with_budget(planned(comparison(), "es"), 31, 200)


def test_rejection_sampling_draws_what_its_budget_says() -> None:
    args = planned(comparison(methods={"sft": {"method": "sft_rejection"}}), "sft")
    draws = with_budget(args, 250, 200)
    assert draws.method_kwargs["max_samples"] == 250 and draws.num_generations == 2
    timed = with_time(draws, 5.0)
    assert "max_samples" not in timed.method_kwargs and timed.max_time_s == 5.0 and timed.max_steps > 10**6


def test_cells_are_shuffled_within_a_seed_in_the_same_way_each_time() -> None:
    methods = {f"es{i}": ES for i in range(6)}
    made = comparison(methods=methods, seeds=[0, 1])
    listed = list(cells(made))
    assert listed == list(cells(made)) and [cell.seed for cell in listed] == [0] * 7 + [1] * 7
    names = [[cell.method for cell in listed if cell.seed == seed] for seed in (0, 1)]
    assert sorted(names[0]) == sorted(names[1]) == sorted([*methods, "random_search"]) and names[0] != names[1]


def test_each_split_of_a_data_set_has_its_use(tmp_path: Path) -> None:
    for split, target in (("train", 24), ("validation", 25), ("test", 26)):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"numbers": [1, 2, 3, 4], "target": target}) + "\n")
    made = comparison(settings={"dataset_name": str(tmp_path)}, methods={"es": {"method": "es"}})
    assert [rows_of(made, split)[0]["target"] for split in ("train", "validation", "test")] == [24, 25, 26]
    args = planned(made, "es")
    assert args.batch_size == 1 and args.dataset_test_split == "validation"
    with pytest.raises(UserError, match="must be three"):
        comparison(settings={"dataset_name": str(tmp_path)}, tuning={"split": "test"})
    assert rows_of(comparison(), "validation") != rows_of(comparison(), "test")
    with pytest.raises(UserError, match="dataset_name"):
        comparison(tuning={"split": "dev"})


# --- results ----------------------------------------------------------------------------------------------------------

MEASURED = {
    "status": "done", "n": 4, "samples": 1, "right_of": [1, 0, 0, 0], "length": 5.0, "discovery": [],
    "retention": {}, "kl": 0.1, "evaluations": 64, "train_time_s": 1.0, "steps": 2, "run": "runs/x", "code": "a",
    "hacking": {"hacked": False, "literal_share_without_words": 0.0},
    "judged": {"literal_share_without_words": 0.0}, "reward": 0.5,
    "changes": {"norm": 1.0, "relative_norm": 0.1, "moved_share": 1.0},
}  # fmt: skip


def write(path: Path, **values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**MEASURED, **values}), encoding="utf-8")


def results(directory: Path, marks: dict[str, list[str | None]]) -> dict[str, Any]:
    """Write a comparison of ES and GRPO whose seeds gave these marks (None: failed), at both budgets; summarise it."""
    made = comparison(methods={"es": ES, "grpo": {"method": "grpo"}}, seeds=[0, 1, 2], output_dir=str(directory))
    runner = Runner(made)
    directory.mkdir(exist_ok=True)
    runner.write_plan()
    folder = directory / "results" / "tiny"
    write(folder / "base.json", correct="1000", never_solved=[], fingerprint="f", model="tiny")
    for method, seeds in marks.items():
        for seed, correct in enumerate(seeds):
            for budget in ("evaluations", "time"):
                values = {"correct": correct} if correct else {"status": "failed", "error": "it diverged"}
                write(folder / method / f"seed-{seed}-{budget}.json", seed=seed, accuracy=0.0, **values)
    return summarise(directory)


def test_a_failed_seed_counts_as_its_base(tmp_path: Path) -> None:
    summary = results(tmp_path, {"es": ["1100"] * 3, "grpo": ["1111", None, None], "random_search": ["1000"] * 3})
    rows = {row["name"]: row for row in summary["models"]["tiny"]["rows"]["time"]}
    assert rows["grpo"]["failed"] == 2
    assert rows["grpo"]["accuracy"]["mean"] == pytest.approx((1.0 + 0.25 + 0.25) / 3)
    assert rows["grpo"]["gain"]["difference"] == pytest.approx(0.25)
    tests = {test["other"]: test for test in summary["models"]["tiny"]["tests"]["time"]}
    assert tests["grpo"]["difference"] == pytest.approx(0.0) and tests["random_search"]["difference"] == 0.25


def test_a_method_without_a_finished_seed_counts_as_the_base(tmp_path: Path) -> None:
    """It stays in the paired tests, so that a method that always fails makes no other p-value smaller."""
    summary = results(tmp_path, {"es": [None] * 3, "grpo": ["1111"] * 3, "random_search": ["1000"] * 3})
    row = next(row for row in summary["models"]["tiny"]["rows"]["time"] if row["name"] == "es")
    assert (row["accuracy"]["mean"], row["gain"]["difference"], row["failed"]) == (0.25, 0.0, 3)
    tests = {test["other"]: test["difference"] for test in summary["models"]["tiny"]["tests"]["time"]}
    assert tests == {"grpo": -0.75, "random_search": 0.0}
    assert "3 of 3 failed" in report.render(summary, "")


def test_a_failed_seed_counts_as_the_base_in_every_column_that_the_base_has(tmp_path: Path) -> None:
    marks = {"es": ["1100"] * 3, "grpo": ["1111", None, None], "random_search": ["1000"] * 3}
    results(tmp_path, marks)
    folder = tmp_path / "results" / "tiny"
    kept = {"short": {"accuracy": 0.5, "n": 4}}
    base = {"correct": "1000", "never_solved": [1, 2], "discovery_control": [0, 1], "retention": kept, "length": 8.0,
            "fingerprint": "f", "model": "tiny"}  # fmt: skip
    write(folder / "base.json", **base)
    digest = base_digest(json.loads((folder / "base.json").read_text(encoding="utf-8")))
    lost = {"short": {"accuracy": 0.2, "n": 4}}
    for budget in ("evaluations", "time"):
        for method in marks:
            for seed in range(3):
                file = folder / method / f"seed-{seed}-{budget}.json"
                found = json.loads(file.read_text(encoding="utf-8"))
                if found["status"] != "failed":
                    write(file, **{**found, "discovery": [1, 1], "retention": lost, "right_of": [1] * 4,
                                   "base": digest, "length": 2.0})  # fmt: skip
    row = next(row for row in summarise(tmp_path)["models"]["tiny"]["rows"]["time"] if row["name"] == "grpo")
    assert row["length"] == pytest.approx((2.0 + 8.0 + 8.0) / 3)
    assert row["retention"]["short"] == pytest.approx((0.2 + 0.5 + 0.5) / 3)
    assert row["pass_at_k"]["1"]["mean"] == pytest.approx((1.0 + 0.25 + 0.25) / 3)
    assert row["discovery"]["greedy"]["mean"] == pytest.approx(1 / 3)
    assert row["discovery"]["sampled"]["mean"] == pytest.approx((1.0 + 0.5 + 0.5) / 3)
    write(folder / "base.json", **{**base, "never_solved": [1, 3]})  # measured again, and found something else
    with pytest.raises(UserError, match="against another measurement of its base"):
        summarise(tmp_path)


def test_a_seed_whose_model_could_not_be_measured_counts_as_nothing(tmp_path: Path) -> None:
    results(tmp_path, {"es": ["1100"] * 3, "grpo": ["1111"] * 3})
    for seed in (1, 2):
        write(
            tmp_path / "results" / "tiny" / "grpo" / f"seed-{seed}-time.json", seed=seed, status="unmeasured", error="x"
        )
    row = next(row for row in summarise(tmp_path)["models"]["tiny"]["rows"]["time"] if row["name"] == "grpo")
    assert (row["failed"], row["unmeasured"], len(row["seeds"])) == (0, 2, 3)
    assert row["accuracy"]["mean"] == 1.0 and len(row["correct"]) == 1


def test_random_search_is_a_row_without_es(tmp_path: Path) -> None:
    methods = {"grpo": {"method": "grpo", "trials": [{"learning_rate": 1e-5}, {"learning_rate": 1e-4}]}}
    entry = entries(comparison(methods=methods))["random_search"]
    sigmas = [trial.get("sigma") for trial in entry.trials]
    assert entry.method == "random_search" and len(set(sigmas)) == 2
    for evaluations in (32, 100, 6000):
        made = comparison(methods=methods, budget={"evaluations": evaluations}, tuning={"evaluations": evaluations},
                          output_dir=str(tmp_path))  # fmt: skip
        args = planned(made, "random_search")
        assert with_budget(args, evaluations, 800).max_steps >= 4 and args.population_size <= 30


def test_a_vote_has_no_measure_of_a_single_model(tmp_path: Path) -> None:
    """Its cells are empty, its tests say what it costs, and a failed seed counts as the base."""
    made = comparison(methods={"es": ES, "vote": {"method": "random_vote"}}, seeds=[0, 1, 2], established_points=-100,
                      budget={"evaluations": 64, "time_s": 0}, output_dir=str(tmp_path),
                      retention={"short": {"task": "chain:1", "rows": 4}})  # fmt: skip
    Runner(made).write_plan()
    folder = tmp_path / "results" / "tiny"
    kept = {"short": {"accuracy": 0.5, "n": 4}}
    write(folder / "base.json", correct="1000", never_solved=[1, 2], discovery_control=[0, 0], fingerprint="f",
          model="tiny", retention=kept)  # fmt: skip
    single = ("samples", "right_of", "discovery", "retention", "kl", "changes")
    voted = {name: value for name, value in MEASURED.items() if name not in single}
    for seed, (correct, best, agreement) in enumerate((("1110", 0.5, 0.25), ("1100", 0.25, 0.75))):
        vote = {"members": 8, "best_accuracy": best, "agreement": agreement}
        result = {**voted, "correct": correct, "seed": seed, "accuracy": 0.5, "vote": vote}
        file = folder / "vote" / f"seed-{seed}-evaluations.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result), encoding="utf-8")
    write(folder / "vote" / "seed-2-evaluations.json", seed=2, status="failed", error="it diverged")
    for seed in range(3):
        write(folder / "es" / f"seed-{seed}-evaluations.json", seed=seed, correct="1000", accuracy=0.25,
              discovery=[0, 1], retention=kept)  # fmt: skip
    summary = summarise(tmp_path)
    row = next(row for row in summary["models"]["tiny"]["rows"]["evaluations"] if row["name"] == "vote")
    assert row["accuracy"]["mean"] == pytest.approx((0.75 + 0.5 + 0.25) / 3) and row["failed"] == 1
    assert row["vote"] == {"members": 8, "best_accuracy": 0.375, "agreement": 0.5}
    assert row["discovery"].keys() == {"greedy"} and row["discovery"]["greedy"]["mean"] == pytest.approx(0.5)
    assert row["pass_at_k"] == {} and row["changes"] == {}
    assert math.isnan(row["kl"]) and math.isnan(row["retention"]["short"])
    [test] = summary["models"]["tiny"]["tests"]["evaluations"]
    assert (test["other"], test["members"]) == ("vote", 8)
    page = report.render(summary, "")
    assert "8 answers to each problem; the best member alone 37.5, 50 % agree with the vote" in page
    assert "es - vote <small>(8 answers to each problem)</small>" in page and "nan" not in page
    labels = retention_labels(summary["comparison"], {"short": 4})
    [head, *lines] = re.findall(r"<tr>.*?</tr>", details_table(summary["models"]["tiny"], "evaluations", labels))
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", next(text for text in lines if ">vote<" in text))
    names = re.findall(r"<th>(.*?)</th>", head)
    shown = dict(zip(names, cells, strict=True))
    assert shown["pass@1"] == shown["discovered in samples"] == shown["kept: short, n 4"] == shown["moved, %"] == ""
    assert shown["discovered greedily"].startswith("50.0")


def test_more_voters_than_a_budget_draws_are_refused_before_anything_runs(tmp_path: Path) -> None:
    entry = {"method": "random_vote", "settings": {"population_size": 4, "batch_size": 8,
             "method_kwargs": {"vote_members": 5}}}  # fmt: skip
    for budget, tuning in ((64, 640), (640, 64)):  # each step draws two members and costs 32
        made = comparison(methods={"vote": entry}, budget={"evaluations": budget, "time_s": 0},
                          tuning={"evaluations": tuning}, output_dir=str(tmp_path))  # fmt: skip
        with pytest.raises(UserError, match="vote_members is 5, and the search draws 4 members"):
            Runner(made).check()
    assert {entry.method for entry in entries(made).values()} == {"random_vote", "random_search"}
    args = with_budget(planned(made, "vote"), 640, 200, points=4)
    assert (args.max_steps, args.eval_steps) == (20, 0)  # its curve would be that of a single model


def test_a_baseline_that_only_found_a_constant_is_not_established(tmp_path: Path) -> None:
    write(tmp_path / "results" / "tiny" / "constant.json", says="<answer>1</answer>", correct="1110")
    summary = results(tmp_path, {"es": ["1110"] * 3, "grpo": ["1110"] * 3, "random_search": ["1000"] * 3})
    rows = {row["name"]: row for row in summary["models"]["tiny"]["rows"]["time"]}
    assert rows["grpo"]["gain"]["difference"] == 0.5 and summary["established"] == {"grpo": False}
    assert rows["es"]["beside_constant"] and rows["grpo"]["beside_constant"]
    (tmp_path / "results" / "tiny" / "constant.json").unlink()
    summary = summarise(tmp_path)
    assert summary["established"] == {"grpo": True} and "constant" not in summary["models"]["tiny"]


def test_a_retained_split_must_be_there_and_held_out(tmp_path: Path) -> None:
    for split in ("nonsense", "train"):
        kept = {"facts": {"task": "conciseness", "split": split}}
        with pytest.raises(UserError, match=f"split '{split}' of conciseness; it has .*knowledge"):
            Runner(comparison(retention=kept, output_dir=str(tmp_path))).check()


def test_p_values_of_both_budgets_are_corrected_together(tmp_path: Path) -> None:
    summary = results(tmp_path, {"es": ["1100"] * 3, "grpo": ["1111"] * 3, "random_search": ["1000"] * 3})
    tests = [test for budget in ("evaluations", "time") for test in summary["models"]["tiny"]["tests"][budget]]
    assert len(tests) == 4
    smallest = min(tests, key=lambda test: test["p_value"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 4 * smallest["p_value"]))


def test_a_model_without_results_can_be_changed(tmp_path: Path) -> None:
    """For example a mistyped model."""
    tmp_path.joinpath("results").mkdir()
    Runner(comparison(output_dir=str(tmp_path), models={"mine": "tinny"})).write_plan()
    Runner(comparison(output_dir=str(tmp_path), models={"mine": "tiny"})).write_plan()
    (tmp_path / "results" / "mine").mkdir()
    with pytest.raises(UserError, match="results of another mine"):
        Runner(comparison(output_dir=str(tmp_path), models={"mine": "tinny"})).write_plan()


def test_trials_get_a_quarter_of_the_budget_unless_it_is_given() -> None:
    for budget, tuning, wanted in (({"evaluations": 960}, {}, 240), ({}, {}, 6000), ({}, {"evaluations": 7}, 7),
                                   ({"evaluations": 0}, {"time_s": 5}, 0), ({"evaluations": 0}, {}, 6000)):  # fmt: skip
        assert comparison(budget=budget, tuning=tuning).tuning.evaluations == wanted


def test_the_summary_lists_mixed_versions(tmp_path: Path) -> None:
    marks: dict[str, list[str | None]] = {"es": ["1100"] * 3, "grpo": ["1111"] * 3, "random_search": ["1000"] * 3}
    assert results(tmp_path, marks)["mixed"] == {}
    write(tmp_path / "results" / "tiny" / "es" / "seed-1-time.json", seed=1, correct="1100", code="b", accuracy=0.5)
    machines = [{"cpu_s": 1.0, "wall_s": 1.0, "code": "a", "machine": name} for name in ("slow", "fast")]
    (tmp_path / "results" / "cost.json").write_text(json.dumps(machines))
    assert summarise(tmp_path)["mixed"] == {"code": ["a", "b"], "machine": ["fast", "slow"]}
    write(tmp_path / "results" / "tiny" / "es" / "seed-1-time.json", seed=1, correct="1100", accuracy=0.5,
          trained_by=["c", "a"])  # fmt: skip
    for sitting, torch in zip(machines, ("2.13", "2.14"), strict=True):
        sitting |= {"machine": "fast", "packages": {"torch": torch, "trl": "1.16"}}
    (tmp_path / "results" / "cost.json").write_text(json.dumps(machines))
    assert summarise(tmp_path)["mixed"] == {"code": ["a", "c"], "package version": ["torch 2.13", "torch 2.14"]}


def test_other_rows_or_rewards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of other rows or other rewards must not be paired with new results."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"say {i}", "numbers": [i, 2], "target": i + 2}) for i in range(4)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    reward = tmp_path / "own_reward.py"
    reward.write_text("def paid(completions, **_):\n    return [1.0] * len(completions)\n", encoding="utf-8")
    made = comparison(output_dir=str(tmp_path / "out"), measuring={"reward_bounds": [0, 1]},
                      settings={"dataset_name": str(tmp_path), "reward_funcs": ["own_reward.py:paid"]})  # fmt: skip
    (tmp_path / "out").mkdir()
    Runner(made).write_plan()
    Runner(made).write_plan()
    for file, name in ((reward, "rewards"), (tmp_path / "test.jsonl", "rows")):
        before = file.read_text(encoding="utf-8")
        file.write_text(before.replace("1.0", "2.0").replace("say 1", "say one"), encoding="utf-8")
        with pytest.raises(UserError, match=f"the {name} of .*have changed since it was begun"):
            Runner(made).write_plan()
        file.write_text(before, encoding="utf-8")
        Runner(made).write_plan()


def test_repeated_trials_do_not_change_the_settings_of_seeds_with_results(tmp_path: Path) -> None:
    trials = [{"sigma": 0.01}, {"sigma": 0.02}]
    made = comparison(methods={"es": {**ES, "trials": trials}}, output_dir=str(tmp_path))
    runner, folder = Runner(made), tmp_path / "results" / "tiny" / "es"
    write(folder / "trial-0.json", trial=trials[0], accuracy=0.5)
    write(folder / "trial-1.json", trial=trials[1], accuracy=0.4, status="failed")
    runner._choose_trial("tiny", "es")
    write(folder / "seed-0-time.json")
    runner._choose_trial("tiny", "es")
    write(folder / "trial-1.json", trial=trials[1], accuracy=0.6)
    with pytest.raises(UserError, match=r"seed-0-time.json was run with sigma 0.01, and .* now is sigma 0.02"):
        runner._choose_trial("tiny", "es")
    (folder / "seed-0-time.json").unlink()
    (tmp_path / "runs" / "tiny" / "es" / "seed-1").mkdir(parents=True)  # half done, by what was chosen then
    with pytest.raises(UserError, match=r"seed-1 was run with sigma 0.01"):
        runner._choose_trial("tiny", "es")


def test_each_budget_gets_the_trial_that_was_best_at_it(tmp_path: Path) -> None:
    """A run to both budgets costs what its last result says; two runs cost the sum."""
    trials = [{"sigma": 0.01}, {"sigma": 0.02}]
    made = comparison(methods={"es": {**ES, "trials": trials}}, output_dir=str(tmp_path), tuning={"time_s": 3.0})
    runner, folder = Runner(made), tmp_path / "results" / "tiny" / "es"
    for index, marks in enumerate([(0.5, 0.3), (0.4, 0.6)]):
        for accuracy, suffix, evaluations in zip(marks, ("", "-time"), (64, 90), strict=True):
            write(folder / f"trial-{index}{suffix}.json", trial=trials[index], accuracy=accuracy, train_time_s=2.0,
                  evaluations=evaluations, run="trial-0" if index == 0 else f"trial-1{suffix}")  # fmt: skip
    runner._choose_trial("tiny", "es")
    tuned = json.loads((folder / "tuning.json").read_text(encoding="utf-8"))
    assert (tuned["chosen"], tuned["chosen_time"]) == (trials[0], trials[1])
    assert tuned["cost"] == {"evaluations": 90 + (64 + 90), "train_time_s": 2.0 + (2.0 + 2.0)}
    jobs = runner._cell_jobs(Cell("tiny", "es", 0))
    assert [(job.args.sigma, list(job.files), job.directory.name) for job in jobs] == [
        (0.01, ["evaluations"], "seed-0-evaluations"), (0.02, ["time"], "seed-0-time")]  # fmt: skip
    for same in ({"chosen": trials[1], "chosen_time": trials[1]}, {"chosen": trials[1]}):
        (folder / "tuning.json").write_text(json.dumps(same))
        [job] = runner._cell_jobs(Cell("tiny", "es", 0))
        assert (job.args.sigma, list(job.files), job.directory.name) == (0.02, ["evaluations", "time"], "seed-0")


@pytest.mark.parametrize("method", ["es", "sft_rejection"])
def test_at_equal_time_alone_there_is_one_run_with_the_pace_of_the_trial(tmp_path: Path, method: str) -> None:
    entry = {**ES, "trials": [{}]} if method == "es" else {"method": method}
    given = {"methods": {"m": entry}, "output_dir": str(tmp_path), "measuring": {"curve_points": 4}}
    made = comparison(**given, budget={"evaluations": 0, "time_s": 60.0}, tuning={"time_s": 10.0})
    assert made.tuning.evaluations == 0
    assert from_mapping(json.loads(json.dumps(dataclasses.asdict(made)))) == made  # as it is kept
    runner, folder = Runner(made), tmp_path / "results" / "tiny" / "m"
    [job] = runner._trial_jobs("tiny", "m", 0)
    assert (list(job.files), job.directory.name, job.time_s) == (["time"], "trial-0", 10.0)
    write(
        folder / "trial-0-time.json", trial={}, accuracy=0.5, steps=8, train_time_s=11.0, evaluations=64, run="trial-0"
    )
    runner._choose_trial("tiny", "m")
    tuned = json.loads((folder / "tuning.json").read_text(encoding="utf-8"))
    assert tuned["chosen_time"] == {} and "chosen" not in tuned
    [job] = runner._cell_jobs(Cell("tiny", "m", 0))
    every = int(8 / 11 * 60 / 4)
    assert (list(job.files), job.directory.name, job.args.eval_steps) == (["time"], "seed-0", every)
    write(folder / "trial-0-time.json", trial={}, status="failed", error="none right", steps=0, train_time_s=0.0)
    [job] = runner._cell_jobs(Cell("tiny", "m", 0))
    assert job.args.eval_steps == 0


def test_at_equal_evaluations_alone_no_time_is_measured(tmp_path: Path) -> None:
    made = comparison(methods={"es": ES}, output_dir=str(tmp_path), budget={"evaluations": 4096, "time_s": 0})
    write(tmp_path / "results" / "tiny" / "es" / "tuning.json", chosen={})
    [job] = Runner(made)._cell_jobs(Cell("tiny", "es", 0))
    assert list(job.files) == ["evaluations"]


def test_a_method_that_cannot_resume_has_a_run_for_each_budget(tmp_path: Path) -> None:
    methods = {"sft": {"method": "sft_rejection"}}
    runner = Runner(comparison(methods=methods, output_dir=str(tmp_path), tuning={"time_s": 3.0}))
    write(tmp_path / "results" / "tiny" / "sft" / "tuning.json", chosen={}, chosen_time={})
    for jobs, name in (
        (runner._cell_jobs(Cell("tiny", "sft", 0)), "seed-0"),
        (runner._trial_jobs("tiny", "sft", 0), "trial-0"),
    ):
        assert [(list(job.files), job.directory.name) for job in jobs] == [
            (["evaluations"], f"{name}-evaluations"), (["time"], f"{name}-time")]  # fmt: skip
    [job] = Runner(comparison(methods=methods, output_dir=str(tmp_path)))._trial_jobs("tiny", "sft", 0)
    assert (list(job.files), job.directory.name) == (["evaluations"], "trial-0")


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_killed_process_is_started_again_and_a_failed_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(comparison(output_dir=str(tmp_path)))
    runner.processes.cost.open(tmp_path / "results" / "cost.json", {})
    monkeypatch.setattr("estune.compare.processes.RETRY_DELAY_S", 0.0)
    for codes, calls, last in (([-9, -11, 0], 3, 0), ([-9, -9, -9, 0], 3, -9), ([1, 0], 1, 1), ([75, 0], 2, 0)):
        left = list(codes)
        outcome = runner.processes.run_to_end(lambda left=left: worker.Outcome(left.pop(0), cpu_s=1.0), "a run")
        assert (len(codes) - len(left), outcome.code) == (calls, last)
    assert json.loads((tmp_path / "results" / "cost.json").read_text())[0]["cpu_s"] == 9.0
    runner.processes.stopping.set()
    with pytest.raises(Stopped):
        runner.processes.run_to_end(lambda: worker.Outcome(0), "a run")


def test_a_blocked_run_ends_the_comparison_and_writes_no_result(tmp_path: Path) -> None:
    """Another process, a full disk or other options on a resume are no failure of the method."""
    runner = Runner(comparison(output_dir=str(tmp_path)))
    runner.processes.cost.open(tmp_path / "results" / "cost.json", {})
    with pytest.raises(UserError, match="a run: no space"):
        runner.processes.run_to_end(lambda: worker.Outcome(worker.BLOCKED, "no space"), "a run")


@pytest.mark.parametrize("kind", ["held", "full", "own"])
def test_blocked_and_failed_processes_have_different_statuses(kind: str, tmp_path: Path) -> None:
    outcome = worker.call(_blocked, (kind,), tmp_path / "log", multiprocessing.get_context("forkserver"))
    assert outcome.code == (2 if kind == "own" else worker.BLOCKED) and kind in outcome.error


def _blocked(kind: str) -> None:
    if kind == "full":
        raise OSError(errno.ENOSPC, "full")
    raise ExternalError("held") if kind == "held" else UserError("own")


def test_a_comparison_waits_for_an_orphaned_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estune.compare.processes.RETRY_DELAY_S", 0.02)
    processes = Runner(comparison(output_dir=str(tmp_path))).processes
    processes.wait_for_orphan(tmp_path / "nothing there")
    lock = try_lock(tmp_path)
    assert lock is not None
    threading.Timer(0.3, os.close, (lock,)).start()
    processes.wait_for_orphan(tmp_path)
    held = try_lock(tmp_path)
    assert held is not None  # it was given back
    monkeypatch.setattr("estune.compare.processes.ORPHAN_WAIT_S", 0.1)
    with pytest.raises(UserError, match="another process is running"):
        processes.wait_for_orphan(tmp_path)
    os.close(held)


def test_a_model_can_be_trained_with_another_reward(tmp_path: Path) -> None:
    models = {"clean": "tiny", "noisy": "tiny"}
    noise = {"reward_wrappers": ["noisy(flip=0.2)"]}
    made = comparison(models=models, model_settings={"noisy": noise}, output_dir=str(tmp_path))
    wrappers = {model: configuration(made, model, "es", {}, 0).reward_wrappers for model in models}
    assert wrappers == {"clean": [], "noisy": noise["reward_wrappers"]}
    assert from_mapping(json.loads(json.dumps(dataclasses.asdict(made)))) == made  # as it is kept
    wrong = {
        "model_settings of gone: there is no such model; there are clean, noisy": {"gone": noise},
        "cannot hold temperature: they can hold reward_wrappers": {"noisy": {"temperature": 1}},
        "model_settings of noisy must be a mapping": {"noisy": [1]},
    }
    for told, settings in wrong.items():
        with pytest.raises(UserError, match=told):
            comparison(models=models, model_settings=settings)
    Runner(made).write_plan()
    more = dict(models=models | {"worse": "tiny"}, output_dir=str(tmp_path))
    both = {"noisy": noise, "worse": {"reward_wrappers": ["noisy(flip=0.4)"]}}
    Runner(comparison(**more, model_settings=both)).check_plan()
    write(tmp_path / "results" / "noisy" / "base.json", fingerprint="0")
    with pytest.raises(UserError, match="holds results of another noisy"):
        Runner(comparison(**more, model_settings={"worse": noise})).check_plan()


def test_options_that_depend_on_the_machine_stay_auto() -> None:
    """Otherwise a resume on another machine would have other options."""
    args = planned(comparison(), "es")
    assert (args.num_threads, args.reward_workers) == ("auto", "auto")
    assert planned(comparison(settings={"num_threads": 1, "reward_workers": 2}), "es").reward_workers == 2


def test_allow_unsandboxed_code_reaches_only_tasks_that_run_code() -> None:
    """A comparison whose retained task cannot be measured is refused before anything runs."""
    made = comparison(task="arc_agi:python", settings={"allow_unsandboxed_code": True},
                      retention={"facts": {"task": "conciseness", "split": "knowledge"}})  # fmt: skip
    [kept] = made.retention.values()
    assert not retained_config(made, "tiny", kept).allow_unsandboxed_code
    assert retained_config(made, "tiny", dataclasses.replace(kept, task="arc_agi:python")).allow_unsandboxed_code
    Runner(made).check()


def _done_then(moment: str, file: Path) -> None:
    """Write ``file`` as a measurement does; then the process is interrupted at ``moment``."""
    file.write_text("done", encoding="utf-8")
    if moment == "at the exit":
        multiprocessing.util.Finalize(None, signal.raise_signal, args=(signal.SIGINT,), exitpriority=1)
    elif moment == "before it tells":
        sys.stdout.flush = lambda: signal.raise_signal(signal.SIGINT)  # type: ignore[method-assign]
    elif moment == "within":
        signal.raise_signal(signal.SIGINT)
    elif moment == "by a library":
        os._exit(3)
    elif moment == "by an error":
        raise ValueError("no good")


class _InterruptedAtTheStart:
    """An argument that interrupts the process when it is unpickled, before the function is called."""

    def __reduce__(self) -> tuple[Any, ...]:
        return signal.raise_signal, (signal.SIGINT,)


@pytest.mark.parametrize(
    ("moment", "code", "error"),
    [
        ("never", 0, ""),
        ("at the exit", 0, ""),  # what it did is done
        ("before it tells", worker.STOPPED, ".*"),
        ("within", worker.STOPPED, "asked to stop"),
        ("by a library", worker.STOPPED, "exit status 3"),
        ("by an error", 1, "ValueError: no good"),
        pytest.param(_InterruptedAtTheStart(), worker.STOPPED, ".*", id="at the start"),
    ],
)
def test_a_signal_at_any_moment_is_no_failure(moment: Any, code: int, error: str, tmp_path: Path) -> None:
    """Ctrl-C reaches all processes at once, also one that has just written its result."""
    file = tmp_path / "file"
    outcome = worker.call(_done_then, (moment, file), tmp_path / "log", multiprocessing.get_context("forkserver"))
    assert outcome.code == code and outcome.interrupted == (code == worker.STOPPED)
    assert re.fullmatch(error, outcome.error)
    assert file.exists() or isinstance(moment, _InterruptedAtTheStart)


def test_a_comparison_that_is_older_than_an_option_is_continued(tmp_path: Path) -> None:
    """An option that its plan lacks had the default; with another value the comparison is refused."""
    made = comparison(output_dir=str(tmp_path))
    Runner(made).write_plan()
    file = tmp_path / "comparison.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    del kept["comparison"]["measuring"]["discovery_rows"]
    file.write_text(json.dumps(kept), encoding="utf-8")
    Runner(made).write_plan()
    file.write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(UserError, match="another output_dir"):
        Runner(comparison(output_dir=str(tmp_path), measuring={"discovery_rows": 3})).write_plan()


# --- the report's tables of details and of tuning ---------------------------------------------------------------------

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


def test_won_and_lost_problems_and_samples_are_against_the_base() -> None:
    """The second seed failed and counts as its base; entropy is absent unless every counted seed has it."""
    failed = {"status": "failed", "seed": 1, "run": "runs/es", "file": "f", "error": "diverged"}
    base = BASE | {"correct": "1100"}
    row = method_row("es", [tuned(0) | {"correct": "1011"}, failed], base, 3)
    assert row["moved"] == {"both_right": 1.5, "both_wrong": 1.0, "progressions": 1.0, "regressions": 0.5}
    won = {name: row["seeds"][0][name] for name in ("progressions", "regressions", "mcnemar_p")}
    assert won == {"progressions": 2, "regressions": 1, "mcnemar_p": 1.0} and "progressions" not in row["seeds"][1]
    assert row["mean_at_k"]["mean"] == row["pass_at_k"]["1"]["mean"] == pytest.approx(0.5)
    more = tuned(0) | {"right_of": [2, 2, 2]}
    gain = method_row("es", [more], BASE, 3)["mean_at_k_gain"]
    assert gain["difference"] == pytest.approx(0.5) and gain["low"] <= 0.5 <= gain["high"]
    assert "answer_entropy" not in row
    measured = [tuned(0) | {"answer_entropy": 0.25}, tuned(1) | {"answer_entropy": 0.75}]
    assert method_row("es", measured, BASE, 3)["answer_entropy"] == 0.5
    assert "answer_entropy" not in method_row("es", [*measured, failed], BASE, 3)
    row = method_row("es", [*measured, failed], BASE | {"answer_entropy": 0.8}, 3)
    assert row["answer_entropy"] == pytest.approx(0.6)
    assert untrained_row("base", BASE | {"answer_entropy": 0.8}, "f", 3)["answer_entropy"] == 0.8


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
