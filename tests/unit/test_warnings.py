"""The two warnings of `train` that name `estune probe`."""

from __future__ import annotations

import math

import pytest
from command_line import estune

from estune.metrics import Watch


def never() -> float:
    raise AssertionError("theta need not answer")


def record(unchanged: float = 0.0, fitness: float | None = 1.0) -> dict[str, float | None]:
    return {"es/frac_modal": unchanged, "es/fitness_mean": fitness, "es/fitness_std": 0.1}


def test_theta_is_asked_where_members_agree_and_the_warning_comes_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch()
    watch.step(record(0.9), never)
    watch.step(record(0.95), lambda: 0.2)  # the members agree on something that theta does not say
    assert capsys.readouterr().err == ""
    watch.step(record(0.95), lambda: 0.93)
    watch.step(record(1.0), never)
    told = capsys.readouterr().err
    assert told.count("warning") == 1
    assert "93% of the completions equal the unperturbed model's" in told and "estune probe" in told


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
    watch = Watch()
    for fitness in course:
        watch.step(record(fitness=fitness), never)
    told = capsys.readouterr().err
    assert told.count("mean fitness has halved") == int(warned)
    assert ("estune probe" in told) == warned


@pytest.mark.parametrize(("sigma", "warned"), [(1e-9, True), (0.05, False)])
@pytest.mark.parametrize("noise", ["full", "lowrank"])
def test_a_run_whose_members_say_what_theta_says(sigma: float, warned: bool, noise: str, place) -> None:
    done = estune("train", "--model", "tiny", "--task", "countdown", "--sigma", sigma, "--noise", noise,
                  "--population_size", 4, "--batch_size", 4, "--max_steps", 2, "--max_completion_length", 24,
                  "--num_threads", 1, "--output_dir", "run", "--report_to", "none", cwd=place)  # fmt: skip
    assert done.code == 0, done
    assert done.err.count("equal the unperturbed model's") == int(warned), done.err


def test_a_resumed_run_remembers_its_best_step(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch.of_steps([[1.0, 3.0], [0.4, 0.6], [None, None]])
    assert watch.best_mean == 2.0
    watch.step(record(fitness=0.9), never)
    assert "has halved since its best step" in capsys.readouterr().err
    assert Watch.of_steps([]).best_mean == -math.inf
