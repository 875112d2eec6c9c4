"""`make bench-check`: when a figure counts as a regression, and the origin that result files record."""

import importlib
import json
import sys

import pytest
from script_loading import ROOT, loaded


@pytest.fixture(scope="module")
def bench():
    with loaded("benchmarks/bench.py") as module:
        yield module


@pytest.fixture
def scripts(monkeypatch):
    """Make benchmarks importable; the imported ones are removed afterwards."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module
    for name in ("record", "memory", "help_time"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "recorded", "measured", "good"),
    [
        ("step/paper_of_lowrank", 15.0, 15.0, True),
        ("step/paper_of_lowrank", 100.0, 81.0, True),
        ("step/paper_of_lowrank", 100.0, 80.0, True),
        ("step/paper_of_lowrank", 100.0, 79.0, False),
        ("step/paper_of_lowrank", 100.0, 300.0, True),
        ("step/paper_of_lowrank", 100.0, float("nan"), False),
        ("kernels/member_s", 0.1, 0.1, True),
        ("kernels/member_s", 0.1, 0.01, True),
        ("kernels/member_s", 0.081, 0.1, True),  # 81 % of the speed
        ("kernels/member_s", 0.079, 0.1, False),
    ],
)
def test_a_figure_may_fall_by_a_fifth(bench, name, recorded, measured, good):
    [comparison] = bench.compare({name: recorded}, {name: measured})
    assert comparison.good is good
    assert ("FAILED" in str(comparison)) is not good
    assert "\n" not in str(comparison)


def test_a_missing_figure_fails_on_either_side(bench):
    comparisons = bench.compare({"kernels/a": 1.0, "kernels/b": 2.0}, {"kernels/b": 2.0, "kernels/c": 3.0})
    assert [(c.name, c.good) for c in comparisons] == [("kernels/a", False), ("kernels/b", True), ("kernels/c", False)]
    assert "not measured" in str(comparisons[0])
    assert "not in the recorded ratios" in str(comparisons[2])


def test_a_check_compares_only_its_sections_and_this_processor(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "RATIOS", tmp_path / "ratios.json")
    assert bench.check({"kernels/a": 1.0}, ["kernels"]) == 1  # nothing recorded
    ratios = {"kernels/a": 1.0, "step/b": 2.0}
    bench.RATIOS.write_text(json.dumps({bench.processor(): {"ratios": ratios}}))
    capsys.readouterr()
    assert bench.check({"kernels/a": 0.9}, ["kernels"]) == 0
    said = capsys.readouterr().out
    assert "kernels/a" in said
    assert "step/b" not in said
    assert bench.check({"kernels/a": 0.9}, ["kernels", "step"]) == 1
    assert bench.check({"kernels/a": 0.7, "step/b": 2.0}, ["kernels", "step"]) == 1


def test_on_an_unknown_processor_only_limits_of_the_same_machine_count(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "RATIOS", tmp_path / "ratios.json")
    monkeypatch.setattr(bench, "processor", lambda: "abacus, 1 cores")
    bench.RATIOS.write_text(json.dumps({"AMD EPYC, 2 cores": {"ratios": {"kernels/loop_speedup": 32.0}}}))
    slow = {"kernels/loop_speedup": 3.0, "kernels/update_speedup": 4.0, "kernels/member_s": 9.0}
    assert bench.check({**slow, "kernels/perturb_of_roof": 0.8}, ["kernels"]) == 0
    said = capsys.readouterr().out
    assert "kernels/loop_speedup: not judged" in said and "kernels/perturb_of_roof: met" in said
    assert bench.check({**slow, "kernels/perturb_of_roof": 0.5}, ["kernels"]) == 1
    table = bench.table(bench.targets_of(["kernels"], quick=True), slow, "abacus, 1 cores")
    assert table.count("no target for this processor") == 3 and table.count("not measured") == 1


def test_targets_are_named_by_processor(bench):
    loop = next(target for target in bench.TARGETS if target.name == "step/paper_of_lowrank")
    assert bench.met(loop, 10.4, "Intel(R) Xeon(R) Processor, 2 cores")
    assert bench.met(loop, 10.4, "AMD EPYC, 2 cores") is False and bench.met(loop, 10.4, "abacus") is None


def test_figures_are_read_from_the_sections_results(bench):
    kernels = {"ratios": {"loop_speedup": 12.0, "update_speedup": 25.0, "perturb_of_roof": 0.8, "member_s": 0.1}}
    step = {"conciseness": {"ratios": {"pure / lowrank": {"median": 0.95}, "paper / lowrank": {"median": 15.0},
                                       "paper / full": {"median": 1.5}}}}  # fmt: skip
    values = bench.figures({"kernels": kernels, "step": step})
    assert set(values) == {target.name for target in bench.targets_of(["kernels", "step"], quick=True)}
    missed = [
        t.name
        for t in bench.targets_of(["kernels", "step"], quick=False)
        if not bench.met(t, values.get(t.name), "AMD EPYC")
    ]
    assert missed == ["step/pure_of_lowrank_countdown", "step/paper_of_full"]
    assert "not measured" in bench.table(bench.TARGETS, values, "AMD EPYC")


@pytest.mark.parametrize("value", [0.0, None])
def test_growth_is_a_target_of_a_whole_run_only(bench, value):
    names = {"growth/members", "growth/parameters", "growth/steps"}
    assert {target.name for target in bench.targets_of(["growth"], quick=False)} == names
    assert bench.targets_of(["growth"], quick=True) == []
    verdicts = {"members": 1, "parameters": 1} | ({} if value is None else {"steps": value})
    values = bench.figures({"growth": {"verdicts": verdicts}})
    missed = [
        target.name
        for target in bench.TARGETS
        if target.name in names and not bench.met(target, values.get(target.name), "AMD EPYC")
    ]
    assert missed == ["growth/steps"]


def test_the_time_of_help_is_a_target_of_a_whole_run(bench, scripts):
    """The test measures one turn and does not judge the time."""
    result = scripts("help_time").measure(1)
    values = bench.figures({"help": result})
    assert set(values) == {"help/bare_of_help", "help/slowest_s"} and all(value > 0 for value in values.values())
    names = [target.name for target in bench.targets_of(["help"], quick=False)]
    assert sorted(names) == sorted(values) and bench.targets_of(["help"], quick=True) == []
    assert bench.met(bench.TARGETS[-1], 0.7, "") and not bench.met(
        bench.TARGETS[-1], 1.3, ""
    )  # seconds: less is better
    assert scripts("help_time").table(result).count("bare / help") == len(scripts("help_time").COMMANDS)


def test_one_model_for_all_rows_is_shown_without_a_target(bench):
    results = {"step": {"conciseness": {"ratios": {"pure_shared / lowrank": {"median": 0.625}}}}}
    shared = bench.figure(results, "step", bench.SHARED)
    last = bench.table(bench.TARGETS, {}, "AMD EPYC", shared).splitlines()[-1]
    assert "0.625        -  members with different weights cannot do that" in last
    assert bench.figure({}, "step", bench.SHARED) is None
    assert "cannot do that" not in bench.table(bench.TARGETS, {}, "AMD EPYC")


def test_a_check_without_its_model_fails_before_it_measures(bench, scripts, monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_model", lambda given: None)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--check"])
    assert bench.main() == 1
    assert "without SmolLM2" in capsys.readouterr().out
    monkeypatch.setattr(bench, "measure", lambda sections, *_: {name: {"ratios": {}} for name in sections})
    monkeypatch.setattr(bench, "check", lambda values, sections: len(sections) - 1)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--check", "--sections", "kernels"])
    assert bench.main() == 0


@pytest.mark.parametrize(
    ("start", "now", "said"),
    [
        (("abc", ""), ("abc", ""), "abc"),
        (("abc", "M x.py"), ("abc", "M x.py"), "abc+"),
        (("abc", ""), ("abc", "M x.py"), "abc+"),
        (("abc", "M x.py"), ("def", ""), "abc+"),
        (("abc", ""), ("def", ""), "abc+"),
        (("abc", ""), None, "abc+"),
        (None, ("abc", ""), "unknown"),
    ],
)
def test_a_result_names_the_commit_of_its_start(scripts, monkeypatch, start, now, said):
    record = scripts("record")
    monkeypatch.setattr(record, "AT_START", start)
    monkeypatch.setattr(record, "_checkout", lambda: now)
    assert record.commit() == said
    assert record.stamp()["commit"] == said


def test_memory_keeps_entries_as_they_were_recorded(scripts, tmp_path):
    memory = scripts("memory")
    assert memory.recorded(tmp_path / "none.json") == {}
    noise = {name: {"train": {"ratio": 1.0}} for name in memory.LIMITS}
    whole = {"commit": "abc", "machine": {}, "noise": noise}
    models = {"1.5B": whole, "0.5B": {"commit": "abc", "machine": {}, "noise": noise}, "9B": whole}
    path = tmp_path / "memory.json"
    path.write_text(json.dumps({"commit": "def", "models": models}))
    assert memory.recorded(path) == {"1.5B": whole}  # the others lack processes or are unknown
    for old in (noise, {"train": {"ratio": 2.0}}, {"noise": noise}):  # without a commit of their own
        path.write_text(json.dumps({"commit": "def", "models": {"1.5B": old}}))
        assert memory.recorded(path) == {}
