"""A miniature comparison through the command line: bases, tuning, runs, both budgets, report, resume."""

from __future__ import annotations

import json
import math
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command_line import assert_refused, estune

from estune import ESConfig
from estune.baselines.random_search import voting_members
from estune.compare.config import read_comparison
from estune.compare.measure import SAMPLE_SEED
from estune.compare.runner import Runner
from estune.environment import code_digest
from estune.errors import UserError
from estune.tasks import get_task
from estune.tasks.countdown import accuracy, final_answer
from estune.train import setup
from estune.train.step import sampling_of

pytestmark = [pytest.mark.miniature, pytest.mark.xdist_group("compared")]  # one comparison, which most tests read

MINIATURE = {
    "output_dir": "out",
    "task": "countdown",
    "models": {"tiny": "tiny"},
    "seeds": [0, 1],
    "workers": 2,
    "budget": {"evaluations": 72, "time_s": 1},
    "tuning": {"evaluations": 32, "time_s": 0.5, "rows": 8},
    "settings": {"max_completion_length": 24, "num_threads": 1},
    "measuring": {"rows": 24, "samples": 2, "sample_rows": 12, "discovery_samples": 4, "kl_rows": 4, "curve_rows": 8,
                  "curve_points": 1},
    "skill_prefix": "<think>",
    "established_points": 99,
    "retention": {"at once": {"task": "countdown", "settings": {"response_prefix": "<answer>"}, "rows": 8}},
    "methods": {
        "es": {"method": "es", "settings": {"population_size": 4, "batch_size": 8, "noise": "lowrank"},
               "trials": [{"sigma": 0.02}]},
        "grpo": {"method": "grpo", "settings": {"batch_size": 2}, "trials": [{"learning_rate": 1e-4}]},
        "broken": {"method": "sft_rejection", "settings": {"temperature": 1000.0, "max_steps": 1}},
    },
}  # fmt: skip


# Small measurements, for comparisons in which another part is looked at.
BRIEF = {"rows": 8, "samples": 2, "sample_rows": 4, "discovery_samples": 4, "kl_rows": 2, "curve_rows": 8,
         "curve_points": 1}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Stop a fork server that other tests have started in this process: it may not have imported torch and TRL.

    Comparisons that run in this process (`call`) then share one that has. `compared` is a command in an interpreter of
    its own.
    """
    multiprocessing.forkserver._forkserver._stop()


def write(directory: Path, **changes: object) -> Path:
    file = directory / "comparison.yaml"
    file.write_text(yaml.safe_dump({**MINIATURE, **changes}), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compare")
    done = estune("compare", write(directory), cwd=directory)
    assert done.code == 0, done.err + done.out
    return directory


def result(directory: Path, name: str) -> dict:
    return json.loads((directory / "out" / "results" / "tiny" / name).read_text(encoding="utf-8"))


@pytest.mark.e2e
def test_every_row_is_there(compared: Path) -> None:
    summary = json.loads((compared / "out" / "summary.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in summary["models"]["tiny"]["rows"]["evaluations"]}
    assert set(rows) == {"es", "grpo", "broken", "random_search"}
    assert {"base", "prefix"} <= summary["models"]["tiny"].keys()
    for name in ("es", "grpo", "random_search"):
        assert rows[name]["failed"] == 0 and len(rows[name]["seeds"]) == 2
        assert rows[name]["evaluations"] == {"es": 72}.get(name, 64)  # ES evaluates theta, too, and pays for it
        assert rows[name]["accuracy"]["low"] <= rows[name]["accuracy"]["mean"] <= rows[name]["accuracy"]["high"]
    base = summary["models"]["tiny"]["base"]
    assert rows["broken"]["failed"] == 2 and rows["broken"]["gain"]["difference"] == 0.0
    assert rows["broken"]["moved"]["progressions"] == rows["broken"]["moved"]["regressions"] == 0
    assert rows["broken"]["answer_entropy"] == base["answer_entropy"]
    for row in rows.values():
        assert row["mean_at_k"]["mean"] == pytest.approx(row["pass_at_k"]["1"]["mean"])
        assert sum(row["moved"].values()) == 24
        won = row["moved"]["progressions"] - row["moved"]["regressions"]
        assert row["gain"]["difference"] == pytest.approx(won / 24)
    assert rows["broken"]["accuracy"]["mean"] == base["accuracy"]["mean"] and not rows["broken"]["changes"]
    assert "samples of the base was right" in rows["broken"]["seeds"][0]["error"]
    assert summary["established"] == {"grpo": False, "broken": False}
    assert summary["cost"]["sittings"] == 1 and summary["cost"]["cpu_h"] > 0 and summary["cost"]["wall_h"] > 0


@pytest.mark.e2e
def test_results_name_their_runs_and_hold_the_measurements(call, compared: Path) -> None:
    for method, seed in (("es", 0), ("grpo", 1)):
        found = result(compared, f"{method}/seed-{seed}-evaluations.json")
        run, measured = compared / "out" / found["run"], compared / "out" / found["measured"]
        state = json.loads((measured / "es_state.json").read_text(encoding="utf-8"))
        assert state["fingerprint"] == found["fingerprint"]
        assert json.loads((run / "es_config.json").read_text(encoding="utf-8"))["seed"] == seed == found["seed"]
        assert len(found["correct"]) == 24 and found["samples"] == 2
        assert len(found["right_of"]) == 12 and 0 <= found["answer_entropy"] <= math.log(2) + 1e-9
        base = result(compared, "base.json")
        assert len(found["discovery"]) == len(base["never_solved"]) == len(base["discovery_control"])
        assert all(base["correct"][row] == "0" and not base["right_of"][row] for row in base["never_solved"])
        assert found["code"] == code_digest()
        assert found["kl"] >= 0 and found["changes"]["relative_norm"] > 0
        walk = found["changes"]["walk_ratio"]  # two steps of low-rank noise are close to a random walk
        assert walk == (pytest.approx(1.0, abs=0.1) if method == "es" else None)
        assert found["retention"]["at once"]["n"] == 8
    # The model that is kept is the one that was measured.
    done = call("evaluate", "--model", measured, "--task", "countdown", "--limit", 24, "--json", cwd=compared)
    assert json.loads(done.out)["accuracy"] == pytest.approx(found["accuracy"])


@pytest.mark.e2e
def test_tuning_is_equal_and_chooses_on_validation(compared: Path) -> None:
    for method in ("es", "grpo", "random_search"):
        tuned = result(compared, f"{method}/tuning.json")
        trial = result(compared, f"{method}/trial-0.json")
        timed = result(compared, f"{method}/trial-0-time.json")
        assert trial["evaluations"] == 32 and timed["train_time_s"] >= 0.5 and timed["run"] == trial["run"]
        assert tuned["cost"]["evaluations"] == max(32, timed["evaluations"])  # one run to both budgets
        assert tuned["chosen"] == tuned["chosen_time"] == trial["trial"] and tuned["rows"] == 8
        config = compared / "out" / trial["run"] / "es_config.json"
        assert json.loads(config.read_text(encoding="utf-8"))["seed"] == 1000


@pytest.mark.e2e
def test_the_report_is_self_contained(compared: Path) -> None:
    page = (compared / "out" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "not established: no claim" in page and "2 of 2 failed" in page
    assert "won / lost" in page and "answer entropy" in page and "lost, p " in page
    assert "kept (prompt variant): at once" in page and "update norm / random walk" in page
    links = re.findall(r'href="((?:results|runs)/[^"]+)"', page)
    assert {link.split("/")[0] for link in links} == {"results", "runs"}
    for link in links:
        assert (compared / "out" / link).is_file(), link
    assert (compared / "out" / "curves.png").stat().st_size > 10_000


@pytest.mark.e2e
def test_the_packed_file_alone_gives_the_page_and_is_continued(call, compared: Path, tmp_path: Path) -> None:
    """All but the links to the pages of runs; and no measurement is repeated."""
    shutil.copy(compared / "out" / "comparison_results.json", tmp_path / "kept.json")
    done = call("compare", "--report_only", "kept.json", cwd=tmp_path)
    assert done.code == 0, done.err
    pages = [(place / "report.html").read_text(encoding="utf-8") for place in (compared / "out", tmp_path / "kept")]
    assert 'class="run"' in pages[0] and re.sub(r'<a class="run"[^>]*>.</a>', "", pages[0]) == pages[1]
    kept = [(place / "curves.png").read_bytes() for place in (compared / "out", tmp_path / "kept")]
    assert kept[0] == kept[1]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept" / "results" / "tiny").rglob("*.json")}
    assert len(before) > 20
    done = call("compare", write(tmp_path), "--output_dir", "kept", cwd=tmp_path)
    assert done.code == 0, done.err
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept" / "results" / "tiny").rglob("*.json")}
    assert not (tmp_path / "kept" / "runs").exists()
    assert {path for path in after if after[path] != before.get(path)} <= set((tmp_path / "kept").rglob("tuning.json"))
    packed = [json.loads((place / "comparison_results.json").read_text(encoding="utf-8"))
              for place in (compared / "out", tmp_path / "kept")]  # fmt: skip
    assert packed[0]["rows"] == packed[1]["rows"] and len(packed[1]["cost"]) == 2


@pytest.mark.e2e
def test_existing_results_are_not_made_again(call, compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "copy")
    directory = tmp_path / "copy"
    before = {path: path.stat().st_mtime_ns for path in (directory / "out" / "results").rglob("seed-*.json")}
    results = directory / "out" / "results" / "tiny"
    gone, cut = results / "es" / "seed-1-evaluations.json", results / "grpo" / "seed-0-time.json"
    gone.unlink()
    cut.unlink()  # as if it had been killed on its way to the second budget
    done = call("compare", write(directory), cwd=directory)
    assert done.code == 0, done.err
    assert all(json.loads(path.read_text(encoding="utf-8"))["status"] == "done" for path in (gone, cut))
    assert json.loads(gone.read_text(encoding="utf-8"))["evaluations"] == 72
    again = {path: path.stat().st_mtime_ns for path in before if path not in (gone, cut)}
    assert again == {path: before[path] for path in again}
    sittings = json.loads((directory / "out" / "results" / "cost.json").read_text(encoding="utf-8"))
    assert len(sittings) == 2 and all(sitting["cpu_s"] > 0 for sitting in sittings)
    less = {name: entry for name, entry in MINIATURE["methods"].items() if name != "grpo"}
    for changes, message in (
        ({"budget": {"evaluations": 128, "time_s": 1}}, "budget .* another output_dir"),
        ({"methods": less}, "grpo.*leave out"),
        ({"seeds": [0]}, "seed 1.*leave out"),
    ):
        with pytest.raises(UserError, match=message):
            Runner(read_comparison(write(directory, **changes), directory / "out")).write_plan()


# The task's reward; once the first budget's result is there, it waits until the test opens the gate.
HELD = """
import os, time
from estune.tasks.countdown import reward

def held(**given):
    while os.path.exists({first!r}) and not os.path.exists({gate!r}):
        time.sleep(0.01)
    return reward(**given)
"""


@pytest.mark.e2e
def test_ctrl_c_on_the_way_to_the_second_budget_leaves_no_result(call, compared: Path, tmp_path: Path) -> None:
    """The budget of time is reached first; the resumed run ends in the same model as an uninterrupted one."""
    methods = {"grpo": MINIATURE["methods"]["grpo"]}
    first = tmp_path / "out" / "results" / "tiny" / "grpo" / "seed-0-time.json"
    second = first.with_name("seed-0-evaluations.json")
    (tmp_path / "held.py").write_text(HELD.format(first=str(first), gate=str(tmp_path / "gate")), encoding="utf-8")
    settings = {**MINIATURE["settings"], "reward_funcs": [f"{tmp_path / 'held.py'}:held"], "reward_timeout_s": 3600}
    file = write(tmp_path, methods=methods, seeds=[0], budget={"evaluations": 72, "time_s": 0.001}, retention={},
                 tuning={"evaluations": 16, "rows": 4}, skill_prefix="", settings=settings,
                 measuring={**BRIEF, "reward_bounds": [0.0, 1.1]})  # fmt: skip
    command = [sys.executable, "-m", "estune", "compare", str(file)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        while not first.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        (tmp_path / "gate").touch()
        assert process.wait() == 130
    assert "stopped; the same command continues" in (tmp_path / "log").read_text()
    assert not second.exists()
    done = call("compare", file, cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads(second.read_text(encoding="utf-8"))
    whole = result(compared, "grpo/seed-0-evaluations.json")
    assert found["status"] == "done" and found["steps"] == whole["steps"]
    assert found["fingerprint"] == whole["fingerprint"]  # of the uninterrupted comparison
    early = json.loads(first.read_text(encoding="utf-8"))
    assert early["steps"] < found["steps"] and early["fingerprint"] != found["fingerprint"]


@pytest.mark.e2e
def test_at_equal_time_alone(call, tmp_path: Path) -> None:
    """One run a seed, one table, curves over both budgets, and no repeated work."""
    methods = {"es": {"method": "es", "settings": {"population_size": 4, "batch_size": 4, "noise": "lowrank"},
                      "trials": [{"sigma": 0.02, "learning_rate": 0.01}]}}  # fmt: skip
    file = write(tmp_path, seeds=[0], methods=methods, budget={"evaluations": 0, "time_s": 2.0}, retention={},
                 tuning={"time_s": 1.0, "rows": 8},
                 measuring={**BRIEF, "curve_points": 6})  # fmt: skip
    assert "2 runs of 2 s, after 2 trials of 1 s;" in call("compare", file, "--dry_run", cwd=tmp_path).out
    done = call("compare", file, cwd=tmp_path)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    [model] = summary["models"].values()
    assert not model["rows"]["evaluations"] and {row["name"] for row in model["rows"]["time"]} == {
        "es",
        "random_search",
    }
    assert all(row["train_time_s"] >= 2.0 for row in model["rows"]["time"])
    [results] = [path for path in (out / "results").iterdir() if path.is_dir()]
    found = json.loads((results / "es" / "seed-0-time.json").read_text(encoding="utf-8"))
    every = json.loads((out / found["run"] / "es_config.json").read_text(encoding="utf-8"))["eval_steps"]
    evaluations = 1 + math.ceil(found["steps"] / every)  # before the first step, every few steps, after the last
    assert found["status"] == "done" and every >= 1 and len(found["curve"]) == evaluations
    assert sorted(path.name for path in (results / "es").iterdir()) == [
        "seed-0-time.json",
        "trial-0-time.json",
        "tuning.json",
    ]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "budget 2 s of training" in page and "Equal evaluations" not in page and "How parameters moved" in page
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*-time.json")}
    assert call("compare", file, cwd=tmp_path).code == 0
    assert before == {path: path.stat().st_mtime_ns for path in results.rglob("*-time.json")}


@pytest.mark.e2e
def test_a_vote_of_the_members_of_a_search_is_a_row(tmp_path: Path) -> None:
    """The search is that of random search; the vote is made again without searching again."""
    settings = {"population_size": 8, "batch_size": 4, "noise": "lowrank", "sigma": 0.005}
    vote = {"method": "random_vote", "settings": {**settings, "method_kwargs": {"vote_members": 5}}}
    methods = {"random_search": {"method": "random_search", "settings": settings}, "vote": vote}
    file = write(tmp_path, seeds=[0], methods=methods, budget={"evaluations": 128, "time_s": 0}, skill_prefix="",
                 retention={}, tuning={"evaluations": 64, "rows": 8})  # fmt: skip
    done = estune("compare", file, cwd=tmp_path)
    assert done.code == 0, done.err
    alone, voted = (result(tmp_path, f"{name}/seed-0-evaluations.json") for name in methods)
    assert voted["evaluations"] == alone["evaluations"] == 128 and len(voted["correct"]) == 24
    assert not {"kl", "right_of", "retention", "changes", "discovery"} & voted.keys() and voted["curve"] == []
    assert voted["vote"]["members"] == 5 and 0.2 <= voted["vote"]["agreement"] <= 1
    run = tmp_path / "out" / voted["run"]
    record = json.loads((run / "method.json").read_text(encoding="utf-8"))
    assert record["vote"]["fingerprint"] == voted["fingerprint"] != alone["fingerprint"]
    models = [tmp_path / "out" / each["measured"] / "model.safetensors" for each in (alone, voted)]
    assert models[0].read_bytes() == models[1].read_bytes()
    # the vote by hand, from the record alone
    engine = setup.load_engine(setup.resolve_config(ESConfig(noise="lowrank", num_threads=1), 1))
    rows = get_task("countdown").load("test")[:24]
    args = ESConfig(task="countdown", max_completion_length=24, seed=SAMPLE_SEED)
    prompts = setup.build_prompts(args, engine, rows, True)
    texts = [
        [engine.assets.decode(each.token_ids) for [each] in engine.generate(member, prompts, sampling_of(args, 0))]
        for member in voting_members(record["vote"])
    ]
    right = ""
    for index, row in enumerate(rows):
        said = [final_answer(row, member[index]) for member in texts]
        counts = [said.count(answer) if answer else 0 for answer in said]
        right += f"{accuracy([texts[counts.index(max(counts))][index]], [row['numbers']], [row['target']])[0]:.0f}"
    assert right == voted["correct"]
    trial = result(tmp_path, "vote/trial-0.json")
    assert trial["vote"]["members"] == 5 and "correct" not in trial
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "5 answers to each problem; the best member alone" in page
    journal = run / "metrics.jsonl"
    before = journal.stat().st_mtime_ns
    (tmp_path / "out" / "results" / "tiny" / "vote" / "seed-0-evaluations.json").unlink()
    assert estune("compare", file, cwd=tmp_path).code == 0
    assert result(tmp_path, "vote/seed-0-evaluations.json") == voted and journal.stat().st_mtime_ns == before


@pytest.mark.e2e
def test_the_best_constant_is_a_row(call, tmp_path: Path) -> None:
    """For a task whose answers repeat. An older comparison without this row gets it."""
    methods = {"es": {"method": "es", "settings": {"population_size": 4, "batch_size": 4, "noise": "lowrank"}}}
    retention = {"two steps": {"task": "chain:2", "split": "validation", "rows": 3}}
    file = write(tmp_path, seeds=[0], task="chain:1", methods=methods, budget={"evaluations": 20, "time_s": 0},
                 retention=retention, tuning={"evaluations": 16, "rows": 4}, skill_prefix="",
                 measuring={**BRIEF, "rows": 24})  # fmt: skip
    done = call("compare", file, cwd=tmp_path)
    assert done.code == 0, done.err
    [model] = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["models"].values()
    constant = result(tmp_path, "constant.json")
    assert constant["says"].startswith("<answer>") and constant["n"] == 24 and 0 < constant["accuracy"] < 0.5
    assert all(row["beside_constant"] for row in model["rows"]["evaluations"])  # `tiny` does not know this task
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"always &lt;answer&gt;{constant['says'][8]}" in page and "kept: two steps, n 3" in page
    (tmp_path / "out" / "results" / "tiny" / "constant.json").unlink()
    assert call("compare", file, cwd=tmp_path).code == 0
    assert result(tmp_path, "constant.json") == constant


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"taks": "countdown"}, ("'taks'", "task")),
        ({"models": {}}, ("models",)),
        ({"seeds": [0, 0]}, ("seeds",)),
        ({"seeds": [1000]}, ("tuning", "seed")),
        ({"settings": {"seed": 3}}, ("seed", "comparison sets")),
        ({"settings": {"load_best_model_at_end": True}}, ("load_best_model_at_end", "comparison sets")),
        ({"methods": {"a": {"method": "es", "trials": [{"early_stopping_patience": 2}]}}}, ("early_stopping",)),
        ({"settings": {"max_completion_lenght": 3}}, ("max_completion_length",)),
        ({"methods": {"a": {"method": "es"}, "b": {"method": "grpo", "trials": [{}, {}]}}}, ("a 1, b 2",)),
        ({"methods": {"a": {"method": "gpro"}}}, ("gpro", "grpo")),
        ({"methods": {"a": {"method": "grpo", "settings": {"system_prompt": "x"}}}}, ("system_prompt", "settings")),
        ({"methods": {"a": {"method": "grpo", "settings": {"sigma": 0.1}}}}, ("method a", "sigma")),
        ({"methods": {"a": {"method": "es", "settings": {"lr_scheduler_type": "cosine"}}}}, ("constant",)),
        ({"budget": {"evaluations": 0, "time_s": 0}}, ("of budget", "not 0 both")),
        ({"budget": {"evaluations": -1}}, ("of budget", "from 0")),
        ({"budget": {"time_s": float("inf")}}, ("of budget", "from 0")),
        ({"tuning": {"time_s": float("nan")}}, ("of tuning", "from 0")),
        ({"tuning": {"evaluations": 0}}, ("of tuning", "not 0 both")),
        ({"budget": {"time_s": 0}, "tuning": {"time_s": 1}}, ("time_s of tuning", "time_s of budget is 0")),
        ({"budget": {"evaluations": 0}, "tuning": {"evaluations": 32, "time_s": 1}}, ("no effect", "time_s")),
        ({"budget": {"evaluations": "many"}}, ("evaluations", "whole number")),
        ({"budget": {"evalations": 3}}, ("evaluations",)),
        ({"seeds": 3}, ("seeds", "list")),
        ({"seeds": [0.5]}, ("seeds", "whole")),
        ({"methods": ["es"]}, ("methods", "mapping")),
        ({"methods": {"a": {"trials": [{}]}}}, ("method a", "needs method")),
        ({"methods": {"a": {"method": "es", "trials": [3]}}}, ("trial", "mapping")),
        ({"methods": {"a": "es"}}, ("method a", "mapping")),
        ({"models": {"a": 3}}, ("model a",)),
        ({"models": "tiny"}, ("models",)),
        ({"models": {"a": "no/such/model"}}, ("no/such/model", "does not exist")),
        ({"workers": "two"}, ("workers",)),
        ({"retention": {"a": {"task": "no-such"}}}, ("no-such",)),
        ({"retention": {"a": {"task": "chain:1", "settings": {"sigma": 3}}}}, ("retention a", "sigma")),
        ({"settings": {"reward_weights": [2]}}, ("reward_bounds",)),
        ({"measuring": {"discovery_samples": 1, "samples": 2}}, ("discovery_samples",)),
        ({"measuring": {"discovery_rows": -5}}, ("discovery_rows", "negative")),
        ({"task": "countdwon"}, ("countdown",)),
        ({"methods": {"a b": {"method": "es"}}}, ("file name",)),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_runs(call, tmp_path: Path, changes: dict, parts: tuple[str, ...]) -> None:
    assert_refused(call("compare", write(tmp_path, **changes), cwd=tmp_path), *parts)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_cost(call, tmp_path: Path) -> None:
    done = call("compare", write(tmp_path), "--dry_run", cwd=tmp_path)
    assert done.code == 0 and "8 runs" in done.out and "4 trials of 32 evaluations and 0.5 s" in done.out
    assert not (tmp_path / "out").exists()
    assert_refused(call("compare", write(tmp_path), "--report_only", cwd=tmp_path), "no results")


@pytest.mark.e2e
def test_a_comparisons_directory_is_no_model_and_no_run(call, compared: Path) -> None:
    done = call("evaluate", "--model", "out", "--task", "countdown", cwd=compared)
    assert_refused(done, "holds a comparison", "in its folder models")
    assert_refused(call("report", "out", cwd=compared), "holds a comparison", "report.html")


@pytest.mark.e2e
def test_a_dry_run_compares_with_existing_results(call, compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared / "out", tmp_path / "out")
    file = write(tmp_path, measuring={**MINIATURE["measuring"], "samples": 3})
    assert_refused(call("compare", file, "--dry_run", cwd=tmp_path), "measuring", "another output_dir")
    assert call("compare", write(tmp_path), "--dry_run", cwd=tmp_path).code == 0
