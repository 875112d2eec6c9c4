"""`make bench-check`: when a figure counts as a regression. The script is loaded from its file: it is no package."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "bench.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("estune_bench", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


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


def test_a_check_compares_its_sections_alone_and_names_another_machine(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "RATIOS", tmp_path / "ratios.json")
    assert bench.check({"kernels/a": 1.0}, ["kernels"]) == 1  # nothing recorded
    ratios = {"kernels/a": 1.0, "step/b": 2.0}
    bench.RATIOS.write_text(json.dumps({"processor": bench.processor(), "ratios": ratios}))
    capsys.readouterr()
    assert bench.check({"kernels/a": 0.9}, ["kernels"]) == 0
    said = capsys.readouterr().out
    assert "kernels/a" in said
    assert "step/b" not in said
    assert "another machine" not in said
    assert bench.check({"kernels/a": 0.9}, ["kernels", "step"]) == 1
    assert bench.check({"kernels/a": 0.7, "step/b": 2.0}, ["kernels", "step"]) == 1
    bench.RATIOS.write_text(json.dumps({"processor": "abacus, 1 cores", "ratios": ratios}))
    assert bench.check({"kernels/a": 1.0, "step/b": 2.0}, ["kernels", "step"]) == 0
    assert "another machine (abacus" in capsys.readouterr().out


def test_figures_are_found_where_the_sections_put_them(bench):
    kernels = {"ratios": {"loop_speedup": 12.0, "update_speedup": 25.0, "perturb_of_roof": 0.8, "member_s": 0.1}}
    step = {"conciseness": {"ratios": {"pure / lowrank": {"median": 0.95}, "paper / lowrank": {"median": 15.0},
                                       "paper / full": {"median": 1.5}}}}  # fmt: skip
    values = bench.figures({"kernels": kernels, "step": step})
    assert set(values) == {target.name for target in bench.targets_of(["kernels", "step"], quick=True)}
    missed = [
        t.name for t in bench.targets_of(["kernels", "step"], quick=False) if not bench.met(t, values.get(t.name))
    ]
    assert missed == ["step/pure_of_lowrank_countdown", "step/paper_of_full"]
    assert "not measured" in bench.table(bench.TARGETS, values)
