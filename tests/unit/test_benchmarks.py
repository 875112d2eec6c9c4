"""The programs in `benchmarks/`: regressions, fits of growth, and parts on which figures depend."""

import importlib
import json
import sys

import pytest
import torch
from script_loading import ROOT, loaded
from transformers import AutoModelForCausalLM

from estune.models.names import local_directory

N_VALUES = [2.0**power for power in range(1, 10)]  # 2 to 512


# --- bench.py: when a figure counts as a regression, and the origin that result files record --------------------------


@pytest.fixture(scope="module")
def bench():
    with loaded("benchmarks/bench.py") as module:
        yield module


@pytest.fixture
def scripts(monkeypatch):
    """Make benchmarks importable; the imported ones are removed afterwards."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module
    for name in ("record", "memory"):
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


def test_the_time_of_help_is_a_target_of_a_whole_run(bench):
    """The test measures one turn and does not judge the time."""
    result = bench.time_help(1)
    values = bench.figures({"help": result})
    assert set(values) == {"help/bare_of_help", "help/slowest_s"} and all(value > 0 for value in values.values())
    names = [target.name for target in bench.targets_of(["help"], quick=False)]
    assert sorted(names) == sorted(values) and bench.targets_of(["help"], quick=True) == []
    # Of seconds, less is better.
    assert bench.met(bench.TARGETS[-1], 0.7, "") and not bench.met(bench.TARGETS[-1], 1.3, "")
    assert bench.help_table(result).count("bare / help") == len(bench.HELP_COMMANDS)


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


# --- growth.py: fits and verdicts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def growth():
    with loaded("benchmarks/growth.py") as module:
        yield module


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        (lambda n: 0.01 * n, "linear"),
        (lambda n: 1.0 + 0.01 * n, "linear"),  # fixed costs of a forward pass
        (lambda n: 9.0 if n == 2 else 0.01 * n, "linear"),  # the smallest is not judged
        (lambda n: 0.01 * n**1.05, "linear"),
        (lambda n: 0.01 * n * (2.0 if n < 16 else 1.0), "linear"),  # by its exponent
        (lambda n: 0.01 * n**0.7, "less than linear"),
        (lambda n: 0.01 * n**1.2, "MORE than linear"),
        (lambda n: 0.01 * n**2, "MORE than linear"),
        (lambda n: 0.3 + 0.01 * n + 0.01 * n**2 / 512, "MORE than linear"),  # at the end alone
    ],
)
def test_verdicts(growth, seconds, verdict):
    assert growth.fit(N_VALUES, [seconds(n) for n in N_VALUES], growth.JUDGED_FROM["members"]).verdict == verdict


def test_a_line_has_no_negative_fixed_cost_and_is_exact_on_a_line(growth):
    fitted = growth.fit(N_VALUES, [1.0 + 0.01 * n for n in N_VALUES])
    assert (fitted.a_s, fitted.b_s, fitted.line_r2) == pytest.approx((1.0, 0.01, 1.0))
    assert fitted.line_residual < 1e-9
    assert growth.fit(N_VALUES, [0.01 * n - 0.01 for n in N_VALUES]).a_s == 0.0


def test_the_exponent_is_judged_from_a_size_on_over_at_least_two_points(growth):
    sizes, seconds = [0.6e6, 3.5e6, 20e6, 140e6], [5.0, 3.5, 20.0, 140.0]
    fitted = growth.fit(sizes, seconds, growth.JUDGED_FROM["parameters"])
    assert fitted.judged_from == 3.5e6
    assert fitted.judged_exponent == pytest.approx(1.0)
    assert growth.fit(sizes, seconds, 1e9).judged_from == 20e6


def test_verdicts_exist_only_for_measured_parts(growth):
    fits = {"update": {"verdict": "linear"}, "step": {"verdict": "less than linear"}}
    bad = fits | {"step": {"verdict": "MORE than linear"}}
    assert growth.verdicts({}) == {}
    assert growth.verdicts({"models": {"fits": {}}}) == {}  # too few points
    assert growth.verdicts({"population": {"fits": {"members": fits, "rank": bad}}}) == {"members": 1}
    result = {"models": {"fits": bad}, "steps": {"nothing_else_grows": False}}
    assert growth.verdicts(result) == {"parameters": 0, "steps": 0}


@pytest.mark.parametrize("steps", ["0", "2"])
def test_a_long_run_is_longer_than_the_short_one(growth, steps, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["growth.py", "--long_run", steps])
    with pytest.raises(SystemExit) as refused:
        growth.main()
    assert refused.value.code == 2
    assert "not more than the 2 steps" in capsys.readouterr().err


# --- paper_loop.py, scan_reasoning.py, paths.py -----------------------------------------------------------------------


@pytest.fixture
def loop():
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(local_directory("tiny"), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    with loaded("benchmarks/paper_loop.py") as module:
        yield module.PaperLoop(model, ids, torch.ones_like(ids), 4)


def test_the_papers_loop_perturbs_restores_and_moves(loop) -> None:
    before = [parameter.detach().clone() for parameter in loop.parameters]
    loop.add_noise(7, 0.01)
    moved = [(a - b) / 0.01 for a, b in zip(loop.parameters, before, strict=True)]
    everything = torch.cat([noise.flatten() for noise in moved])
    assert abs(everything.std() - 1) < 0.01
    assert abs(everything.mean()) < 0.01
    shaped = [noise for noise in moved if noise.shape == moved[1].shape]
    assert len(shaped) > 1
    assert not torch.allclose(shaped[0], shaped[1])  # equal shapes have noise of their own
    loop.add_noise(7, -0.01)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(loop.parameters, before, strict=True))
    times = loop.time_member(7, 0.01, 0.5)
    assert times["member"] == pytest.approx(sum(times[part] for part in ("perturb", "generate", "restore", "update")))
    assert all(
        torch.allclose(a - b, 0.5 * noise, atol=1e-3)
        for a, b, noise in zip(loop.parameters, before, moved, strict=True)
    )


def test_the_papers_loop_refuses_completions_of_another_length(loop) -> None:
    loop.new_tokens = 5
    generate = loop.model.generate
    loop.model.generate = lambda **kwargs: generate(**kwargs | {"max_new_tokens": 3})
    with pytest.raises(RuntimeError, match=r"\(2, 3\) tokens, not \(2, 5\)"):
        loop.time_member(0, 0.01, 0.0)


@pytest.mark.parametrize(
    ("text", "held"),
    [("The answer is 6.", True), ("6", True), ("x = 6, so", True), ("16", False), ("6.5", False), ("-6", False),
     ("6th", False), ("1.6", False), ("", False)],
)  # fmt: skip
def test_the_scan_looks_for_the_answer_as_a_separate_word(text: str, held: bool) -> None:
    with loaded("benchmarks/scan_reasoning.py") as scan:
        assert scan.holds(text, "6") is held


def test_a_short_answer_is_rewarded_as_a_step_of_the_paths() -> None:
    with loaded("benchmarks/paths.py") as paths:
        assert paths.shorter(completions=["", "x" * 100]) == [1.0, 0.5]
        assert paths.shorter(completions=[[{"role": "assistant", "content": "x" * 300}]]) == [0.25]


# --- record.py --------------------------------------------------------------------------------------------------------


def test_counts_of_a_junit_report(tmp_path):
    cases = '<testcase classname="a" name="x"/><testcase classname="a" name="y"><failure/></testcase>'
    cases += (
        '<testcase classname="b" name="z"><skipped/></testcase><testcase classname="b" name="w"><error/></testcase>'
    )
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    with loaded("benchmarks/record.py") as record:
        found = record.counts_of(tmp_path / "report.xml")
    assert found == {"passed": 1, "skipped": 1, "failed": ["a::y", "b::w"]}
