"""Measurements with made-up answers: which rows each model answers, with which seeds and temperatures.

Also the best constant answer: chosen on training rows, by the task's accuracy.
"""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from estune import ESConfig
from estune.baselines import random_search
from estune.compare import measure
from estune.compare.config import Comparison, from_mapping
from estune.compare.tables import untrained_row
from estune.errors import UserError
from estune.tasks import TASKS, get_task, reasoning
from estune.train import setup
from estune.train.evaluation import EvaluatedRow, Evaluation

ROWS, SAMPLES = 12, 2
GREEDY, SAMPLED, LATE = {0, 1}, {2, 3}, {4}  # what the base solves greedily, in its first samples, in later ones


def comparison(**changes: Any) -> Comparison:
    measuring = {"rows": ROWS, "samples": SAMPLES, "sample_rows": 5, "discovery_samples": 6, "kl_rows": 3}
    return from_mapping({
        "task": "countdown", "models": {"tiny": "tiny"}, "methods": {"es": {"method": "es"}},
        **changes, "measuring": measuring | changes.get("measuring", {}),
    })  # fmt: skip


class Engine:
    """Stands in for an engine; it records the tokens whose log-probabilities were asked for."""

    def __init__(self, name: str) -> None:
        self.theta = SimpleNamespace(fingerprint=self.fingerprint, arrays={})
        self.name = name
        self.asked: list[int] = []

    def fingerprint(self) -> str:
        return f"print of {self.name}"

    def token_logprobs(self, prompts: Any, token_ids: Any) -> list[list[float]]:
        self.asked = [tokens[0] for tokens in token_ids]
        assert len(prompts) == len(token_ids)
        return [[-1.0] for _ in token_ids]


class Answers:
    """Stands in for `measure.Scorers`: makes up answers and records the calls."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def answer(self, args: Any, engine: Engine, rows: list[dict[str, Any]]) -> tuple[Evaluation, list[Any]]:
        every = [row["prompt"] for row in measure.get_task(args.task).load("test")]
        places = [every.index(row["prompt"]) for row in rows]
        self.calls.append(SimpleNamespace(args=args, engine=engine.name, places=places))
        sampled = SAMPLED if args.seed == measure.SAMPLE_SEED else LATE
        solved = sampled if args.temperature else GREEDY
        count = args.num_generations
        evaluated = [
            EvaluatedRow(i, "p", ["yes"] * count, [0.5] * count, [float(place in solved)] + [0.0] * (count - 1),
                         [1] * count, [True] * count, [[place]] * count)
            for i, place in enumerate(places)
        ]  # fmt: skip
        return Evaluation(evaluated), list(places)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    made = Answers()
    monkeypatch.setattr(measure, "Scorers", lambda: made)
    monkeypatch.setattr(setup, "load_engine", lambda args: Engine(Path(args.model).name))
    return made


def base(answers: Answers, of: Comparison, directory: Path) -> dict[str, Any]:
    measure.measure_base(of, "tiny", directory / "base.json")
    found: dict[str, Any] = json.loads((directory / "base.json").read_text(encoding="utf-8"))
    return found


def run(answers: Answers, of: Comparison, directory: Path) -> dict[str, Any]:
    """Measure a tuned model in a run of two steps."""
    base(answers, of, directory)
    answers.calls.clear()
    made = directory / "tuned"
    made.mkdir()
    (made / "es_state.json").write_text('{"fingerprint": "f"}', encoding="utf-8")
    facts = {"run": str(made.resolve()), "steps": 3}
    measure.measure_run(of, directory / "base.json", str(made), directory / "result.json", facts)
    found: dict[str, Any] = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    return found


def test_never_solved_excludes_what_the_base_solves_greedily(answers: Answers, tmp_path: Path) -> None:
    found = base(answers, comparison(), tmp_path)
    assert found["never_solved"] == sorted(set(range(ROWS)) - GREEDY - SAMPLED - LATE)
    assert found["answer_entropy"] == 0.0  # no sample of these models has an answer
    assert found["judged"]["rows"] == ROWS and found["judged"]["correctness"] == pytest.approx(len(GREEDY) / ROWS)


@pytest.mark.parametrize(("sought", "sampled"), [(8, 8), (3, 5), (0, ROWS), (100, ROWS)])
def test_never_solved_rows_are_among_the_first_rows(
    answers: Answers, tmp_path: Path, sought: int, sampled: int
) -> None:
    found = base(answers, comparison(measuring={"discovery_rows": sought}), tmp_path)
    assert found["never_solved"] == sorted(set(range(sought or ROWS)) & set(range(ROWS)) - GREEDY - SAMPLED - LATE)
    assert len(found["right_of"]) == sampled and len(found["correct"]) == ROWS


def test_the_base_is_sampled_once_more_with_the_random_numbers_of_tuned_models(
    answers: Answers, tmp_path: Path
) -> None:
    of = comparison()
    found = base(answers, of, tmp_path)
    control = answers.calls[-1]
    assert control.places == found["never_solved"] and control.args.num_generations == SAMPLES
    before = {call.args.seed for call in answers.calls[:-1]}
    assert control.args.seed not in before and before >= {measure.SAMPLE_SEED, measure.SAMPLE_SEED + SAMPLES}
    assert found["discovery_control"] == [0] * len(found["never_solved"])
    (tmp_path / "again").mkdir()
    tuned = run(answers, of, tmp_path / "again")
    [own] = [call for call in answers.calls if call.args.seed == control.args.seed]
    assert own.places == control.places and tuned["discovery"] == found["discovery_control"]
    [sampled] = [call for call in answers.calls if call.args.num_generations > 1 and call is not own]
    assert sampled.places == list(range(5)) and sampled.args.seed == measure.SAMPLE_SEED
    assert tuned["right_of"] == [0, 0, 1, 1, 0]


def test_answer_entropy_is_of_the_rows_that_every_model_is_sampled_on(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base answers samples of all rows, because that finds the unsolved ones. Its entropy counts the first five."""
    told = {"yes": 0}

    def final_answer(row: dict[str, Any], completion: str) -> str:
        told[completion] += 1
        return str(told[completion]) if told[completion] <= 4 else "same"  # two rows of two different answers

    monkeypatch.setitem(TASKS, "countdown", dataclasses.replace(TASKS["countdown"], final_answer=final_answer))
    found = base(answers, comparison(), tmp_path)
    assert len(found["right_of"]) == ROWS and found["answer_entropy"] == pytest.approx(2 * math.log(2) / 5)
    (tmp_path / "one").mkdir()
    assert "answer_entropy" not in base(answers, comparison(measuring={"samples": 1}), tmp_path / "one")


def test_a_measurement_asks_the_base_nothing_again(answers: Answers, tmp_path: Path) -> None:
    found = run(answers, comparison(), tmp_path)
    assert {call.engine for call in answers.calls} == {"tuned"}
    assert not found["hacking"]["hacked"] and found["hacking"]["correctness_change"] == 0.0
    assert found["changes"]["walk_ratio"] is None  # the run recorded no step


# --- the vote of a random search --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "winners"),
    [
        (["a", "b", "b"], [1, 2]),
        (["a", "b", "c"], [0]),  # a tie of three: the best member's
        ([None, "b", "c", "c", "b"], [1, 4]),  # a tie of two, neither of which is the best member's
        ([None, None, "c"], [2]),
        ([None, None], []),
        ([], []),
    ],
)
def test_the_most_frequent_answer_wins(answers: list[str | None], winners: list[int]) -> None:
    assert random_search.majority(answers) == winners


def test_answers_count_as_equal_as_the_task_judges() -> None:
    maths = get_task("math")
    boxes = ["7", "\\frac{1}{2}", "0.5", "3+4", "1/2", "7.0", "9" * 60, "9" * 60]
    answers = [maths.final_answer({}, f"It is \\boxed{{{box}}}") for box in boxes]  # type: ignore[misc]
    assert maths.equal_answers is not None
    assert random_search.majority(answers, partial(maths.equal_answers, {})) == [1, 2, 4]
    assert not maths.equal_answers({}, "3+4", "7") and not maths.equal_answers({}, "7", "3+4")  # one is unfinished


@pytest.mark.parametrize(
    ("task", "columns", "answer", "found"),
    [
        ("countdown", {}, " 3 * (8\u2212 1)", "3*(8-1)"),
        ("countdown", {}, "(8-1)*3", "(8-1)*3"),  # the same value, another answer
        ("countdown", {}, "3*8=24", None),
        ("countdown", {}, "3**", None),
        ("gsm_symbolic", {}, "1,200.50", "2401/2"),
        ("gsm_symbolic", {}, "$3", None),
        ("chain", {}, " 7\n", "7"),
        ("chain:2", {}, "17", None),
        ("mini_sudoku", {"puzzle": [0] * 16}, "1234\n3 4 1 2\n2143\n4321", "1234341221434321"),
        ("mini_sudoku", {"puzzle": [0] * 16}, "1234", None),
        ("arc_agi", {}, "12\n3 4", "1 2\n3 4"),
        ("arc_1d", {}, "1 2", "1 2"),
        ("arc_1d", {}, "12\n34", None),
        ("rg:chain_sum", {}, " 1  2 ", "1 2"),
        ("rg:chain_sum", {}, "", None),
        ("countdown=1,chain=1", {"task": "chain"}, "4", "4"),
    ],
)
def test_the_final_answer_of_a_completion(task: str, columns: dict[str, Any], answer: str, found: str | None) -> None:
    final_answer = get_task(task).final_answer
    assert final_answer is not None
    assert final_answer(columns, f"So <answer>{answer}</answer>") == found


@pytest.mark.parametrize("task", ["conciseness", "quadratic", "arc_agi:python", "conciseness=1,chain=1"])
def test_tasks_without_an_answer_to_count(task: str) -> None:
    assert get_task(task).final_answer is None
    with pytest.raises(UserError, match=f"task {task} has no final answer to count"):
        random_search.check_vote(ESConfig(method="random_vote", task=task, model="tiny"))


def test_a_search_that_ended_early_cannot_vote(tmp_path: Path) -> None:
    """Its time was used up in a step that drew fewer members than are to vote."""
    args = ESConfig(method="random_vote", task="countdown", method_kwargs={"vote_members": 3})
    (tmp_path / "es_config.json").write_text(json.dumps(dataclasses.asdict(args)), encoding="utf-8")
    record: dict[str, Any] = {
        "method": "random_vote", "trainer": "x", "arguments": {}, "base": {"model": "tiny", "fingerprint": "f"},
        "data": {"rows": 1, "fingerprint": "g"}, "vote": {"members": [{}, {}]},
    }  # fmt: skip
    for drawn, told in ((record, "3 members are to vote, and the search has 2"),
                        ({**record, "vote": {"members": []}}, "the search has 0")):  # fmt: skip
        (tmp_path / "method.json").write_text(json.dumps(drawn), encoding="utf-8")
        with pytest.raises(UserError, match=told):
            measure.read_voters(tmp_path)
    (tmp_path / "method.json").write_text(json.dumps({**record, "vote": {"members": [{}] * 3}}), encoding="utf-8")
    voters = measure.read_voters(tmp_path)
    assert voters is not None and voters.base == "f" and voters.run.method == "random_vote"
    assert measure.read_voters(tmp_path / "elsewhere") is None


def test_a_base_is_checked_without_being_measured(answers: Answers) -> None:
    measure.check_base(comparison(), "tiny", "print of tiny")
    with pytest.raises(UserError, match="has fingerprint print of tiny, and the results are of another"):
        measure.check_base(comparison(), "tiny", "another")
    assert not answers.calls


@pytest.mark.parametrize(("temperature", "kl_rows", "drawn"), [(1.0, 3, False), (0.5, 3, True), (1.0, 8, True)])
def test_divergence_is_of_samples_at_temperature_1(
    answers: Answers, tmp_path: Path, temperature: float, kl_rows: int, drawn: bool
) -> None:
    """The samples for pass@k are used if they have temperature 1 and cover the rows."""
    of = comparison(measuring={"temperature": temperature, "kl_rows": kl_rows})
    assert run(answers, of, tmp_path)["kl"] == 0.0
    own = [call for call in answers.calls if call.args.temperature == 1.0 and call.args.num_generations == 1]
    assert [call.places for call in own] == ([list(range(kl_rows))] if drawn else [])


def test_a_retained_task_is_scored_by_its_own_reward(answers: Answers, tmp_path: Path) -> None:
    of = comparison(
        settings={"reward_funcs": ["rewards.py:mine"], "reward_weights": [2.0]},
        measuring={"reward_bounds": [0, 2]},
        retention={"steps": {"task": "chain:1", "settings": {"response-prefix": "<answer>"}, "rows": 4}},
    )
    base(answers, of, tmp_path)
    [kept] = [call for call in answers.calls if call.args.task == "chain:1"]
    assert kept.args.reward_funcs is None and kept.args.reward_weights is None
    assert kept.args.response_prefix == "<answer>" and kept.places == [0, 1, 2, 3]
    assert answers.calls[0].args.reward_funcs == ["rewards.py:mine"]


def test_rewards_of_unknown_bounds_are_not_judged_silently(answers: Answers, tmp_path: Path) -> None:
    for unknown in ({"settings": {"reward_funcs": ["rewards.py:mine"]}}, {"settings": {"reward_weights": [2.0]}},
                    {"task": "countdown,conciseness"}):  # fmt: skip
        with pytest.raises(UserError, match="reward_bounds"):
            comparison(**unknown)
        comparison(**unknown, measuring={"reward_bounds": [-100, 0]})
    for wrong in ([1], [1, 0], [0, 0], ["a", 1], [True, 2], [0, float("inf")]):
        with pytest.raises(UserError, match="lowest, highest"):
            comparison(measuring={"reward_bounds": wrong})
    bounded = comparison(settings={"reward_weights": [2.0]}, measuring={"reward_bounds": [0, 2]})
    assert base(answers, bounded, tmp_path)["judged"]["normalised_reward"] == 0.25  # every answer has 0.5


@pytest.mark.parametrize("option", ["sigma", "temperature", "dataset_name", "reward_funcs", "max_steps", "dtype"])
def test_options_without_effect_on_a_retained_task_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"retention other cannot hold {option}"):
        comparison(retention={"other": {"task": "chain:1", "settings": {option: 1}}})


# --- the best constant answer -----------------------------------------------------------------------------------------


def compared(task: str) -> Any:
    return from_mapping({"task": task, "models": {"tiny": "tiny"}, "methods": {"es": {"method": "es"}}})


@pytest.mark.parametrize("name", ["chain", "chain:16", "gsm_symbolic", "math", "rg:gcd", "rg:gcd:exact"])
def test_the_right_answer_of_a_row_is_right(name: str) -> None:
    task, rows = get_task(name), get_task(name).load("train")[:20]
    assert task.right_answer is not None
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert task.accuracy(completions=[task.right_answer(row) for row in rows], **columns) == [1.0] * len(rows)


def test_the_best_constant_is_chosen_on_training_rows_and_reported_on_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rows(digits: str) -> list[dict[str, Any]]:
        return [{"prompt": digit, "results": [int(digit)], "steps": 1} for digit in digits]

    def load(split: str) -> list[dict[str, Any]]:
        return rows({"train": "7331", "test": "7773"}[split])

    monkeypatch.setitem(TASKS, "chain", dataclasses.replace(TASKS["chain"], load=load))
    measure.measure_constant(compared("chain"), "tiny", tmp_path / "constant.json")
    found = json.loads((tmp_path / "constant.json").read_text(encoding="utf-8"))
    assert (found["says"], found["correct"], found["accuracy"]) == ("<answer>3</answer>", "0001", 0.25)
    assert found["train_accuracy"] == 0.5 and found["n"] == 4 and found["length"] > 0
    row = untrained_row("always", found, "constant.json", 4)
    assert row["accuracy"]["mean"] == 0.25 and row["retention"] == {} and "pass_at_k" not in row


@pytest.mark.parametrize("digits", ["", "1234"])
def test_where_no_two_rows_have_the_same_answer_there_is_no_constant(
    digits: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    task = "chain" if digits else "countdown"
    if digits:
        own = [{"prompt": digit, "results": [int(digit)], "steps": 1} for digit in digits]
        monkeypatch.setitem(TASKS, "chain", dataclasses.replace(TASKS["chain"], load=lambda _: own))
    measure.measure_constant(compared(task), "tiny", tmp_path / "constant.json")
    assert not (tmp_path / "constant.json").exists()


def test_a_mixture_has_the_answers_of_its_parts_and_some_generators_have_none() -> None:
    task = get_task("chain:1=1,countdown=1")
    assert task.right_answer is not None
    found = {row["task"]: task.right_answer(row) for row in task.load("train")[:10]}
    assert found["countdown"] is None and str(found["chain:1"]).startswith("<answer>")
    assert reasoning.right_answer({"rg_entry": json.dumps({"answer": None})}) is None
