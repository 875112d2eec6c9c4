"""The warnings of `train` during a run, each printed once and none without a cause; the monitors' lines and page."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from estune.baselines.session import combine
from estune.monitor.monitors import ConsoleMonitor, MemberLines, failures
from estune.monitor.panel import BLOCKS, PanelMonitor, by_function, ranking, sparkline, spread
from estune.monitor.report.data import mark
from estune.monitor.report.page import page
from estune.train.sigma_watch import SigmaWatch, ThetaAnswers

NOBODY = ThetaAnswers()


def record(fitness: float | None = 1.0, **others: Any) -> dict[str, Any]:
    plain = {"step": 2, "es/fitness_mean": fitness, "es/fitness_std": 0.1, "es/fitness_best": fitness, "es/sigma": 0.05,
             "completions/non_finite_ratio": 0.0, "completions/clipped_ratio": 0.5,
             "completions/mean_length": 9.0}  # fmt: skip
    return plain | others


def test_theta_is_asked_where_members_agree_and_the_warning_comes_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = SigmaWatch()
    assert watch.needs_theta(0.95) and not watch.needs_theta(0.9)
    watch.step(record(), ThetaAnswers(equal=0.2))  # the members agree on something that theta does not say
    watch.step(record(), NOBODY)
    assert capsys.readouterr().err == ""
    watch.step(record(), ThetaAnswers(equal=0.93))
    assert not watch.needs_theta(1.0)
    watch.step(record(), ThetaAnswers(equal=1.0))
    told = capsys.readouterr().err
    assert told.count("warning") == 1
    assert "93% of the completions equal those of the unperturbed model" in told and "estune probe" in told


@pytest.mark.parametrize(
    ("course", "warned"),
    [
        ([1.0, 0.6], False),
        ([1.0, 0.49], True),
        ([0.1, 1.0, None, 0.4, 0.3], True),
        ([-10.0, -14.0], False),
        ([-10.0, -15.1], True),
        ([0.0, 0.0], False),
        ([0.2, 0.4, 0.21], False),
        ([0.1, 0.04], False),  # within the spread of the members
        ([0.0, -0.001], False),
    ],
)
def test_a_population_that_lost_half_of_its_fitness(
    course: list[float | None], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = SigmaWatch()
    for fitness in course:
        watch.step(record(fitness), NOBODY)
    told = capsys.readouterr().err
    assert told.count("mean fitness has halved") == int(warned)
    assert ("estune probe" in told) == warned


@pytest.mark.parametrize(("sigma", "warned"), [(1e-9, True), (0.05, False)])
@pytest.mark.parametrize("noise", ["full", "lowrank"])
def test_a_run_whose_members_say_what_theta_says(sigma: float, warned: bool, noise: str, run_model) -> None:
    done = run_model("train", "--model", "tiny", "--task", "countdown", "--sigma", sigma, "--noise", noise,
                  "--population_size", 4, "--batch_size", 4, "--max_steps", 2, "--max_completion_length", 24,
                  "--num_threads", 1, "--output_dir", "run", "--report_to", "none")  # fmt: skip
    assert done.code == 0, done
    assert done.err.count("equal those of the unperturbed model") == int(warned), done.err


def test_a_resumed_run_remembers_its_best_step(capsys: pytest.CaptureFixture[str]) -> None:
    watch = SigmaWatch.of_run(30, 16, [[1.0, 3.0], [1.4, 1.6], [None, None]])
    watch.step(record(0.9), NOBODY)
    assert "has halved since its best step" in capsys.readouterr().err


def test_a_resumed_run_repeats_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    before = [record(0.05, **{"step": 1, "es/theta_fitness": 0.6, "completions/clipped_ratio": 1.0}),
              record(0.04, **{"step": 2, "completions/non_finite_ratio": 0.5}),
              {"step": 0, "eval_reward": 1.0, "eval_rows": 80},
              {"step": 2, "eval_reward": 0.1, "eval_rows": 80}]  # fmt: skip
    watch = SigmaWatch.of_run(30, 16, [[1.0, 3.0], [0.04, 0.06]], before)
    watch.step(record(0.04, **{"completions/clipped_ratio": 1.0, "completions/non_finite_ratio": 0.5}), NOBODY)
    watch.evaluation({"eval_reward": 0.05, "eval_rows": 80})
    assert capsys.readouterr().err == ""


HARM = "sigma 0.05 is too large: the members' mean fitness is"


@pytest.mark.parametrize(
    ("theta", "mean", "std", "best", "size", "warned"),
    [
        (0.56, 0.04, 0.03, 0.11, (30, 16), True),
        (0.56, 0.04, 0.03, 0.70, (30, 16), True),  # one lucky member, many prompts
        (1.0, 0.0, 0.0, 0.0, (30, 1), True),
        (-10.0, -40.0, 5.0, -30.0, (8, 8), True),
        (0.56, 0.20, 0.10, 0.50, (8, 8), True),
        (0.56, 0.50, 0.05, 0.53, (30, 16), False),
        (0.56, 0.20, 0.10, 0.60, (30, 16), False),  # a member is better than theta
        (1.0, 0.4, 0.5, 1.0, (30, 1), False),  # theta's one answer was lucky
        (1.0, 0.0, 0.0, 0.0, (4, 1), False),  # four answers say nothing
        (-188.5, -132.4, 38.0, -57.0, (60, 2), False),
        (-10.0, -14.0, 1.0, -12.0, (30, 16), False),
        (0.0, 0.0, 0.0, 0.0, (30, 16), False),
        (0.0, -0.1, 0.2, 0.0, (30, 16), False),
        (1e300, -1e300, 1e300, 1e300, (30, 16), True),
    ],
)
def test_members_are_compared_with_theta_on_the_same_rows(
    theta: float, mean: float, std: float, best: float, size: tuple[int, int], warned: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    watch, own = SigmaWatch(*size), ThetaAnswers(fitness=theta, is_scored=True)
    step = record(mean, **{"step": 1, "es/fitness_std": std, "es/fitness_best": best, **own.record()})
    watch.step(step, own)
    watch.step(step, own)
    told = capsys.readouterr().err
    assert told.count(HARM) == told.count("warning") == int(warned), told
    assert (f"{mean:.3g}, theta's is {theta:.3g}; `estune probe`" in told) == warned


def test_later_steps_are_compared_with_theta_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    """No single step lost half of the best reward, but theta has lost most of it."""
    watch, own = SigmaWatch(), ThetaAnswers(fitness=0.56, is_scored=True)
    watch.step(record(0.33, **{"step": 1, **own.record()}), own)
    watch.step(record(0.3), NOBODY)
    assert capsys.readouterr().err == ""
    for fitness in (0.2, 0.18):
        watch.step(record(fitness), NOBODY)
    told = capsys.readouterr().err
    assert told.count("warning") == 1
    assert "mean fitness is 0.2, theta's was 0.56 before the first step: learning_rate or sigma is too large" in told


@pytest.mark.parametrize("prompts", [1, 4, 16])
@pytest.mark.parametrize("solved", [0.3, 0.5])
def test_easy_and_hard_prompts_are_no_trend(prompts: int, solved: float, capsys: pytest.CaptureFixture[str]) -> None:
    """300 steps of members of one quality, on prompts that are mostly solved by all of them, or by none."""
    rng, watch = np.random.default_rng(0), SigmaWatch(30, prompts)
    for index in range(300):
        easy = rng.beta(0.7 * solved, 0.7 * (1 - solved), prompts)
        rewards = rng.random((30, prompts)) < easy
        fitness = rewards.mean(1)
        error = rewards.mean(0).std(ddof=1) / math.sqrt(prompts) if prompts > 1 else None
        numbers = {"es/fitness_std": float(fitness.std()), "es/fitness_error": error, "step": index + 1}
        watch.step(record(float(fitness.mean()), **numbers), NOBODY)
    assert capsys.readouterr().err == ""
    for _ in range(200):
        watch.step(record(0.0, **{"es/fitness_std": 0.0, "es/fitness_error": 0.0 if prompts > 1 else None}), NOBODY)
    assert capsys.readouterr().err.count("has halved since its best step") == 1


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"completions/non_finite_ratio": 0.25}, "logits of 25.0% of the members' completions are not finite"),
        ({"completions/clipped_ratio": 1.0}, "was cut off at max_completion_length"),
        ({"completions/clipped_ratio": 0.0, "completions/mean_length": 1.0}, "ended with its first token"),
        ({"es/fitness_mean": None}, "every reward was None in this step"),
        ({"es/fitness_mean": None, "es/reward_errors": 3}, "every reward failed or was None in this step"),
    ],
)
def test_a_warning_about_completions_is_printed_once(
    others: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = SigmaWatch()
    for _ in range(3):
        watch.step(record(**others), NOBODY)
    found = capsys.readouterr().err
    assert found.count(told) == found.count("warning") == 1


def test_a_reward_that_never_applies_is_reported_after_enough_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    watch = SigmaWatch(30, 4)
    for unpaid in (["brief", "polite"], ["polite"], ["brief", "polite"]):
        watch.step(record(), NOBODY, unpaid)
    assert capsys.readouterr().err == ""
    for _ in range(9):
        watch.step(record(), NOBODY, ["brief", "polite"])
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "reward polite has returned None for every completion so far" in told


@pytest.mark.parametrize(
    ("rewards", "rows", "told"),
    [([1.0, 0.4], 200, True), ([1.0, 0.6], 200, False), ([-1.0, -1.4], 200, False), ([-1.0, -1.6], 200, True),
     ([1.0, 0.4], 20, False), ([0.0, -0.1], 200, False), ([None, 0.5, 0.2], 200, True), ([0.2, 0.9, 0.3], 200, False)],
)  # fmt: skip
def test_held_out_rewards_are_compared_with_the_first(
    rewards: list[float | None], rows: int, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = SigmaWatch()
    for reward in rewards:
        watch.evaluation({"eval_reward": reward, "eval_rows": rows})
    assert capsys.readouterr().err.count("the held-out reward was") == int(told)


# --- monitors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({}, None),
        ({"es/reward_errors": 0, "rewards/a/errors": 0}, None),
        ({"es/reward_errors": 4}, (4, "")),  # of a run that an older version began
        ({"es/reward_errors": 4, "rewards/a/errors": 4}, (4, "")),
        ({"reward_errors": 4.0, "rewards/a/errors": 4.0, "rewards/b/errors": 0.0}, (4, " (a 4)")),
        ({"es/reward_errors": 3, "rewards/accuracy/errors": 2, "rewards/format/errors": 1, "rewards/format/mean": 1},
         (3, " (accuracy 2, format 1)")),
        ({"es/reward_errors": 1, "rewards/a/b/errors": 1, "rewards/c/errors": 0, "user/errors": 9}, (1, " (a/b 1)")),
    ],
)  # fmt: skip
def test_failures_are_reported_by_function(record: dict[str, Any], told: tuple[int, str] | None) -> None:
    assert failures(record) == told


STEP = {
    "step": 1, "step_time": 1.0, "reward": 0.5, "es/fitness_std": 0.1, "es/fitness_best": 0.6, "es/update_ratio": 1e-3,
    "es/tokens_per_s": 9.0, "es/reward_errors": 3, "rewards/accuracy/errors": 2, "rewards/format/errors": 1,
}  # fmt: skip


def test_the_line_and_the_panel_name_the_functions(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleMonitor(2, 0).log(STEP)
    assert "  failed 3 (accuracy 2, format 1)  left" in capsys.readouterr().out
    panel = PanelMonitor("title", max_steps=2, population_size=4, console=Console(width=160))
    panel.log(STEP)
    panel.close()
    assert "3 rewards failed (accuracy 2, format 1)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("reliable", "gains", "losses", "told"),
    [
        ([], [], [], ""),
        ([None, None], [None, None], [0.1, None], ""),  # one prompt a step
        ([0.3, None], [0.02, None], [None, None], "30% reliable in the last 1 step; a step should gain 0.02"),
        ([0.1] * 4, [], [], "10% reliable in the last 4 steps"),  # too few to tell
        ([0.1] * 5, [], [], "10% reliable in the last 5 steps: mostly noise, raise N or the batch"),
        ([0.0] * 5, [0.0] * 5, [0.03] + [0.01] * 4,
         "0% reliable in the last 5 steps: mostly noise, raise N or the batch; a step should gain 0 and lose 0.014"),
        ([0.8] * 6, [0.5] * 6, [-0.2] * 6, "80% reliable in the last 6 steps; a step should gain 0.5"),
    ],
)  # fmt: skip
def test_the_panel_says_what_the_ranking_is_worth(
    reliable: list[float | None], gains: list[float | None], losses: list[float | None], told: str
) -> None:
    columns = {"es/reliability": reliable, "es/expected_gain": gains, "es/expected_loss": losses}
    records = [{name: values[k] for name, values in columns.items() if values} for k in range(len(reliable))]
    assert ranking(records) == told


def test_the_panel_names_several_functions() -> None:
    several = {"rewards/a/b/mean": 0.5, "rewards/a/b/std": 0.25, "rewards/c/mean": None, "rewards/c/errors": 4}
    assert by_function(several) == "a/b 0.500 ± 0.250, c n/a"
    assert by_function({"rewards/a/mean": 0.5}) == ""


def test_batches_of_a_step_add_up_their_failures_and_average_the_rest() -> None:
    batches = [
        (4, {"reward": 1.0, "reward_errors": 3.0, "rewards/a/errors": 2.0, "rewards/b/errors": 1.0, "errors": 1.0}),
        (12, {"reward": 2.0, "reward_errors": 1.0, "rewards/a/errors": 1.0, "rewards/b/errors": 0.0, "errors": 2.0}),
        (1, {"reward": math.nan, "reward_errors": 1.0, "rewards/a/errors": 0.0, "rewards/b/errors": 1.0}),
    ]
    found = combine(batches)
    assert (found["reward_errors"], found["rewards/a/errors"], found["rewards/b/errors"]) == (5, 3, 2)
    assert found["reward"] == 1.75 and found["errors"] == 1.75  # a mean by the batches' sizes
    assert combine(batches[:1]) == batches[0][1]


def joined(parts: list[tuple[str, bool]]) -> str:
    return "".join(piece for piece, _ in parts)


def test_marks_what_the_other_side_lacks() -> None:
    before, after = mark("The capital is Paris, I think.", "The answer is Paris.")
    assert joined(before) == "The capital is Paris, I think."
    assert joined(after) == "The answer is Paris."
    assert [piece for piece, differs in after if differs] == ["answer"]
    assert "capital" in [piece for piece, differs in before if differs]
    assert mark("same", "same") == ([("same", False)], [("same", False)])
    assert mark("", "new") == ([], [("new", True)])


def test_nothing_a_model_says_becomes_markup() -> None:
    text = '</script><script>alert(1)</script><!-- \u2028 "quoted"'
    html = page({"runs": [{"name": text}]})
    assert html.count("</script>") == 2  # the data's and the code's own ends
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["runs"][0]["name"] == text


def test_the_page_asks_nobody() -> None:
    html = page({"runs": []})
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
    assert "default-src 'none'" in html


def test_sparklines() -> None:
    assert sparkline([]) == sparkline([None]) == ""
    assert sparkline([1.0, 1.0]) == BLOCKS[0] * 2
    assert sparkline([0.0, None, 1.0]) == BLOCKS[0] + " " + BLOCKS[-1]
    assert len(sparkline(list(map(float, range(100))), width=20)) == 20
    assert spread([1.0] * 5) == BLOCKS[-1]
    drawn = spread([0.0] * 8 + [1.0], bins=3)
    assert drawn == BLOCKS[-1] + " " + BLOCKS[0]


def test_a_long_step_prints_at_most_one_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    times, run = iter([0.0, 30.0, 61.0, 62.0, 200.0, 230.0, 259.0, 261.0]), SimpleNamespace(steps_done=0)
    lines = MemberLines(2, 4, run, lambda: next(times))
    for done in (1, 2, 3, 4):
        lines.members_done(done)
    run.steps_done = 1
    for done in (1, 2, 3):
        lines.members_done(done)
    assert capsys.readouterr().out == "step 1/2  2/4 members\nstep 2/2  3/4 members\n"
