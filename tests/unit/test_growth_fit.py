"""The fits and verdicts of `benchmarks/growth.py`."""

import sys

import pytest
from script_loading import loaded

N_VALUES = [2.0**power for power in range(1, 10)]  # 2 to 512


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
