"""The pure functions of evaluation: intervals, pass@k, KL and summaries, against published and hand-made figures."""

from __future__ import annotations

import math
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import VOCAB_SIZE, tiny_model

from estune.commands.evaluate import reward_differences
from estune.commands.results import print_evaluation
from estune.config import ESConfig
from estune.errors import UserError
from estune.run import best
from estune.run.records import is_right
from estune.tasks import TASKS, get_task
from estune.train import metrics
from estune.train.evaluation import (
    EvaluatedRow,
    Evaluation,
    answer_entropy,
    interval,
    kl_k3,
    pass_at_k,
    pass_at_ks,
    token_entropy,
)


# Newcombe (1998), Statistics in Medicine 17, table I, method 3 (Wilson's score interval)
@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(right: int, n: int, low: float, high: float) -> None:
    values = [1.0] * right + [0.0] * (n - right)
    assert interval(values) == pytest.approx((low, high), abs=5e-5)
    mirrored = interval([1.0 - value for value in values])
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 30, 2000])
def test_wilson_bounds_solve_the_score_equation_and_stay_in_the_unit_interval(n: int) -> None:
    for right in {0, 1, n // 2, n}:
        low, high = interval([1.0] * right + [0.0] * (n - right))
        share = right / n
        assert 0.0 <= low <= share + 1e-15 and share - 1e-15 <= high <= 1.0
        for bound in (low, high):
            if 0 < bound < 1:
                assert (share - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / n, abs=1e-9)


def test_bootstrap_interval_of_graded_rows() -> None:
    """Rows of several samples: the percentile bootstrap is close to the normal interval, and always the same."""
    values = np.random.default_rng(0).integers(0, 5, 400) / 4
    low, high = interval(values.tolist())
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.2 * half)
    assert interval(values.tolist()) == (low, high)
    assert interval([0.5] * 10) == (0.5, 0.5)
    assert interval([0.5]) == (0.0, 1.0)  # one row says nothing about others


def test_pass_at_k_equals_brute_force_over_subsets() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(combinations(samples, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_at_sizes_where_factorials_are_huge() -> None:
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    assert pass_at_k(2000, 0, 100) == 0.0 and pass_at_k(2000, 1901, 100) == 1.0


def test_kl_k3_by_hand() -> None:
    """p_tuned = 0.5 against p_reference = 0.25 and 1.0: r = 0.5 and 2, r - log r - 1 = 0.1931 and 0.3069."""
    tuned = [[math.log(0.5), math.log(0.5)]]
    reference = [[math.log(0.25), math.log(1.0)]]
    assert kl_k3(tuned, reference) == pytest.approx((0.1931471806 + 0.3068528194) / 2, abs=1e-9)
    assert kl_k3(tuned, tuned) == 0.0
    assert kl_k3([], []) == 0.0 and kl_k3([[]], [[]]) == 0.0
    ragged = kl_k3([[math.log(0.5)], [], [math.log(0.5)] * 2], [[math.log(0.25)], [], [0.0, math.log(0.5)]])
    assert ragged == pytest.approx((0.1931471806 + 0.3068528194 + 0.0) / 3, abs=1e-9)  # per token, not per completion


def test_kl_k3_averages_to_the_divergence() -> None:
    """Over tokens in proportion to the tuned model's probabilities the estimator's mean is KL exactly."""
    tuned, reference = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    tokens = [0, 0, 1, 2]  # 4 * tuned
    own = [[math.log(tuned[t]) for t in tokens]]
    other = [[math.log(reference[t]) for t in tokens]]
    exact = sum(p * math.log(p / r) for p, r in zip(tuned, reference, strict=True))
    assert kl_k3(own, other) == pytest.approx(exact)


@pytest.mark.parametrize("ragged", [([[0.0]], []), ([[0.0]], [[0.0, 0.0]])])
def test_kl_k3_refuses_unequal_lengths(ragged: tuple[list[list[float]], list[list[float]]]) -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        kl_k3(*ragged)


def row(row_id: int, accuracy: list[float] | None, rewards: list[float | None], lengths: list[int]) -> EvaluatedRow:
    count = len(lengths)
    finished = [length < 8 for length in lengths]
    failures = rewards.count(None)
    tokens = [[0] * n for n in lengths]
    return EvaluatedRow(row_id, "p", ["x"] * count, rewards, accuracy, lengths, finished, tokens, failures)


def test_summary_of_greedy_rows() -> None:
    rows = [row(0, [1.0], [1.1], [3]), row(1, [0.0], [0.1], [8]), row(2, [0.0], [None], [5]), row(3, [1.0], [1.0], [4])]
    summary = Evaluation(rows).summary()
    assert summary["n"] == 4 and summary["accuracy"] == 0.5
    assert summary["accuracy_ci95"] == pytest.approx(interval([1.0, 0.0, 0.0, 1.0]))
    assert summary["reward"] == pytest.approx((1.1 + 0.1 + 1.0 + 0.1) / 4) and summary["reward_failures"] == 1
    assert summary["mean_length_tokens"] == 5.0 and summary["clipped_ratio"] == 0.25


def test_summary_without_accuracy_or_rewards() -> None:
    summary = Evaluation([row(0, None, [None], [3])]).summary()
    assert "accuracy" not in summary and summary["reward"] is None


def test_pass_at_k_of_an_evaluation() -> None:
    rows = [row(0, [1.0, 0.0, 0.0, 0.0], [0.0] * 4, [1] * 4), row(1, [0.0] * 4, [0.0] * 4, [1] * 4)]
    found = Evaluation(rows).pass_at_k()
    assert found == {"1": pytest.approx(0.125), "2": pytest.approx(0.25), "4": pytest.approx(0.5)}
    assert list(Evaluation([row(0, [1.0] * 6, [0.0] * 6, [1] * 6)]).pass_at_k()) == ["1", "2", "4"]
    assert Evaluation(rows).right() == [1, 0]


def test_pass_at_ks_has_a_value_for_each_row() -> None:
    found = pass_at_ks([0, 1, 6], 6)
    assert found == {k: [pass_at_k(6, c, k) for c in (0, 1, 6)] for k in (1, 2, 4)}


def test_only_a_whole_accuracy_is_right() -> None:
    """An accuracy is 1 or 0; a share that strays into it counts everywhere as what it is: not right."""
    assert [is_right(value) for value in (0.0, 0.6, 1.0)] == [False, False, True]
    assert Evaluation([row(0, [0.6, 1.0], [0.0] * 2, [1] * 2)]).right() == [1]


# --- answer entropy and token entropy ---------------------------------------------------------------------------------


def test_answer_entropy_by_hand_and_by_scipy() -> None:
    assert answer_entropy(["a"] * 8) == 0.0 and math.copysign(1, answer_entropy(["a"])) == 1.0
    assert answer_entropy(["a", "b", "c", "d"]) == pytest.approx(math.log(4))
    assert answer_entropy(["a", "a", "b", None]) == pytest.approx(1.5 * math.log(2))  # None is an answer of its own
    for counts in product(range(4), repeat=3):
        if sum(counts):
            answers = [name for name, count in zip("abc", counts, strict=True) for _ in range(count)]
            assert answer_entropy(answers) == pytest.approx(stats.entropy(counts))


def test_answer_entropy_is_biased_as_documented() -> None:
    """Over all samples of K = 8 from three answers the mean is below the entropy, and close to Miller's correction."""
    chances = {"a": 0.5, "b": 0.3, "c": 0.2}
    mean = math.fsum(
        math.prod(chances[name] for name in sample) * answer_entropy(sample) for sample in product(chances, repeat=8)
    )
    entropy = stats.entropy(list(chances.values()))
    assert mean < entropy and mean == pytest.approx(entropy - (3 - 1) / (2 * 8), abs=0.02)


def test_token_entropy_is_the_mean_surprise_per_token() -> None:
    assert token_entropy([[math.log(0.5)], [], [math.log(0.25), 0.0]]) == pytest.approx((1 + 2 + 0) / 3 * math.log(2))
    assert token_entropy([]) == 0.0 and math.isinf(token_entropy([[-math.inf, -1.0]]))
    chances = np.array([0.5, 0.25, 0.125, 0.125])
    tokens = [0] * 4 + [1] * 2 + [2, 3]  # 8 * chances
    assert token_entropy([np.log(chances[tokens]).tolist()]) == pytest.approx(stats.entropy(chances))


def test_answers_of_completions() -> None:
    evaluated = row(0, None, [0.0] * 4, [1] * 4)
    evaluated.completions = ["<answer> 3 +\n 4</answer>", "so <answer>3 + 4</answer>", "3 + 4", "<answer>7"]
    rows = [{"numbers": [3, 4], "target": 7}]
    countdown = TASKS["countdown"].final_answer
    assert Evaluation([evaluated]).answers(rows, countdown) == [["3+4", "3+4", None, None]]
    whole = [["<answer> 3 + 4</answer>", "so <answer>3 + 4</answer>", "3 + 4", "<answer>7"]]
    assert Evaluation([evaluated]).answers(rows, None) == whole


@pytest.mark.parametrize("name", ["chain:1", "gsm_symbolic", "math", "rg:gcd", "chain:1=1,math=1"])
def test_a_tasks_final_answer_is_what_it_scores(name: str) -> None:
    task = get_task(name)
    assert task.right_answer is not None and task.final_answer is not None
    for problem in task.load("test")[:20]:
        right = task.right_answer(problem)
        assert right is not None
        answer = task.final_answer(problem, f"<answer>no</answer> \\boxed{{no}} then {right}")
        assert answer is not None and answer == task.final_answer(problem, right)
        assert task.final_answer(problem, "<answer>-1</answer> \\boxed{-1}") != answer


def test_tasks_that_score_the_whole_completion_have_no_final_answer() -> None:
    assert {name for name, task in TASKS.items() if task.final_answer is None} == {"conciseness", "quadratic"}
    assert get_task("countdown=1,conciseness=1").final_answer is None
    mixed = get_task("countdown=1,chain:1=1").final_answer
    assert mixed is not None and mixed({"task": "countdown"}, "<answer>1 + 2</answer>") == "1+2"


# --- paired rewards ---------------------------------------------------------------------------------------------------


def test_paired_rewards_count_failures_as_the_lowest_and_leave_out_rows_without_a_reward() -> None:
    here = Evaluation([row(0, None, [0.5], [1]), row(1, None, [None], [1]), row(2, None, [2.0], [1])])
    there = Evaluation([row(0, None, [-1.0], [1]), row(1, None, [0.0], [1]), row(2, None, [None], [1])])
    there.rows[2].failures = 0  # no reward applies
    assert reward_differences(here, there) == [1.5, -1.0]
    assert reward_differences(Evaluation([row(0, None, [None], [1])]), Evaluation([row(0, None, [None], [1])])) == []
    several = Evaluation([row(0, None, [1.0, 0.0, None, 1.0], [1] * 4)])
    assert several.mean_rewards(-2.0) == [0.0] and several.lowest_reward() == 0.0


def test_a_result_is_printed_with_its_reference(capsys: pytest.CaptureFixture[str]) -> None:
    """Made-up figures; a measure that one model lacks has no line in the table."""
    of_model = {"accuracy": 0.5, "accuracy_ci95": [0.25, 0.75], "reward": None, "mean_length_tokens": 3.0}
    against = {
        "accuracy": {"both_right": 1, "both_wrong": 2, "progressions": 4, "regressions": 3, "p_value": 1.0,
                     "difference": 0.1, "difference_ci95": [-0.2, 0.4]},
        "reward": {"n": 1, "wins": 1, "losses": 0, "ties": 0, "p_value": 1.0, "difference": 0.5,
                   "difference_ci95": None},
    }  # fmt: skip
    found = {"n": 10, **of_model, "token_entropy": 0.5, "kl": None,
             "reference": {"model": "base", **of_model, "accuracy": 0.4}, "against_reference": against}  # fmt: skip
    print_evaluation(found, False)
    text = capsys.readouterr().out
    assert "kl                   None\n" in text and "against base, on the same rows" in text
    assert "50.0%       40.0%  +10.0 points (-20.0 to +40.0)\n" in text
    assert "none        none  +0.5\n" in text and text.count("token_entropy") == 1
    assert "4 won (wrong to right), 3 lost (right to wrong), 1 right in both, 2 wrong in both; p = 1" in text


# --- KL by the k3 estimator, on sampled tokens, against KL from full distributions ------------------------------------

SAMPLES = 4000


def exact_kl(p_logits: Any, q_logits: Any) -> np.ndarray:
    """Return KL(p || q) in nats per token, (...,), from full logits (..., V) in float64."""
    log_p, log_q = _log_softmax(p_logits), _log_softmax(q_logits)
    p = np.exp(log_p)
    terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return np.asarray(terms.sum(-1))


def _log_softmax(logits: Any) -> np.ndarray:
    values = np.asarray(logits, dtype=np.float64)
    values = values - values.max(-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(-1, keepdims=True)))


def test_exact_kl_by_hand_and_at_extremes() -> None:
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    wanted = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert exact_kl(p + 7, q - 3) == pytest.approx([wanted])  # logits are known up to a constant
    assert exact_kl(p, p) == pytest.approx([0.0], abs=1e-15)
    assert exact_kl([0.0, -1e4], [0.0, 0.0]) == pytest.approx(math.log(2))  # a token that p never says
    assert exact_kl(np.zeros((2, 3, 5)), np.zeros((2, 3, 5))).shape == (2, 3)


def test_k3_on_samples_agrees_with_the_exact_divergence() -> None:
    rng = np.random.default_rng(8)
    p, q = rng.normal(0, 1, 40), rng.normal(0, 1, 40)
    log_p, log_q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
    tokens = rng.choice(40, 20_000, p=np.exp(log_p) / np.exp(log_p).sum())
    gaps = log_q[tokens] - log_p[tokens]
    error = np.std(np.expm1(gaps) - gaps) / math.sqrt(tokens.size)
    assert abs(kl_k3([log_p[tokens].tolist()], [log_q[tokens].tolist()]) - exact_kl(p, q)) < 4 * error


@pytest.mark.parametrize("moved", [0.01, 0.05])
def test_k3_agrees_with_the_exact_divergence_within_its_error(moved: float) -> None:
    base, tuned = tiny_model("llama"), tiny_model("llama")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB_SIZE, (1, 24), generator=generator)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * moved)
        own, other = (model(ids).logits[0].double() for model in (tuned, base))  # (T, V)
    exact = exact_kl(own.numpy(), other.numpy())
    known = torch.nn.functional.kl_div(other.log_softmax(-1), own.log_softmax(-1), log_target=True, reduction="none")
    assert exact == pytest.approx(known.sum(-1).numpy())
    tokens = torch.multinomial(own.softmax(-1), SAMPLES, replacement=True, generator=generator)  # (T, samples)
    logprobs = [logits.log_softmax(-1).gather(-1, tokens).tolist() for logits in (own, other)]
    gaps = np.subtract(logprobs[1], logprobs[0])
    terms = np.expm1(gaps) - gaps
    error = math.sqrt(terms.var(1).mean() / terms.size)  # tokens are drawn at each position apart
    assert abs(kl_k3(*logprobs) - exact.mean()) < 4 * error
    assert error < 0.05 * exact.mean()  # so the agreement means something


# --- the best step ----------------------------------------------------------------------------------------------------


def records(values: list[float | None], name: str = "eval_accuracy", every: int = 1) -> list[dict[str, Any]]:
    return [{"step": index * every, "eval_rows": 8, name: value} for index, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "greater", "threshold", "step", "waited"),
    [
        ([0.1, 0.3, 0.2], True, 0.0, 1, 1),
        ([0.1, 0.3, 0.3, 0.3], True, 0.0, 1, 2),  # ties keep the earlier step
        ([0.5, 0.4, 0.4, 0.2], True, 0.0, 0, 3),  # no step is better than the base model
        ([0.5, 0.4, 0.45], False, 0.0, 1, 1),
        ([0.1, 0.15, 0.2], True, 0.1, 2, 2),  # better, but by no more than the threshold
        ([0.1, 0.3, 0.35], True, 0.1, 2, 1),
        ([None, None, 0.1, None], True, 0.0, 2, 1),
        ([None, None], True, 0.0, None, 1),
        ([0.2], True, 0.0, 0, 0),
    ],
)
def test_the_best_step_of_a_sequence(
    values: list[float | None], greater: bool, threshold: float, step: int | None, waited: int
) -> None:
    found = best.rank(records(values), "eval_accuracy", greater, threshold)
    assert (found.step, found.waited) == (step, waited)
    assert step is None or found.value == values[step]


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.11])
def test_the_best_step_and_patience_are_those_of_transformers(greater: bool, threshold: float) -> None:
    """Its own callback counts; its trainer keeps the best value, before which the callback is called."""
    from transformers import EarlyStoppingCallback, Trainer, TrainerState
    from transformers.trainer_utils import SaveStrategy

    rng = np.random.default_rng(5)
    for _ in range(20):
        values = rng.choice([0.0, 0.1, 0.2, 0.3, 0.5, math.nan], 9).tolist()
        callback = EarlyStoppingCallback(3, threshold)
        trainer: Any = object.__new__(Trainer)
        trainer.state = TrainerState()
        trainer.args = type("Args", (), {"metric_for_best_model": "accuracy", "greater_is_better": greater,
                                         "save_strategy": SaveStrategy.STEPS})()  # fmt: skip
        for index, value in enumerate(values):
            trainer.state.global_step = index
            callback.check_metric_value(trainer.args, trainer.state, None, value)
            trainer._determine_best_metric({"eval_accuracy": value}, None)
            given = [None if math.isnan(each) else each for each in values[: index + 1]]
            found = best.rank(records(given), "eval_accuracy", greater, threshold)
            assert found.step == trainer.state.best_global_step, (values, index)
            assert found.value == trainer.state.best_metric
            assert found.waited == callback.early_stopping_patience_counter, (values, index)


def test_defaults_of_the_metric_are_those_of_transformers() -> None:
    from transformers import TrainingArguments

    for name in ("eval_accuracy", "reward", "eval_loss", "clipped_ratio", "loss"):
        theirs = TrainingArguments(output_dir="x", metric_for_best_model=name, report_to=[])
        args = ESConfig(load_best_model_at_end=True, eval_steps=1, metric_for_best_model=name)
        assert best.is_greater_better(args, best.metric_of(args, [])) == theirs.greater_is_better
        assert best.metric_of(args, []) == f"eval_{name.removeprefix('eval_')}"
    args = ESConfig(load_best_model_at_end=True, eval_steps=1)
    assert best.metric_of(args, records([0.1])) == "eval_accuracy"
    assert best.metric_of(args, records([0.1], "eval_reward")) == "eval_reward"


@pytest.mark.parametrize("accuracy", [[1.0], None])
def test_every_number_of_an_evaluation_can_be_named(accuracy: list[float] | None) -> None:
    broken = row(0, accuracy, [1.0], [3])
    broken.non_finite = 1
    record = metrics.evaluation_record(Evaluation([broken]))
    numbers = {name for name, value in record.items() if isinstance(value, (int, float))} - {"eval_rows"}
    for name in numbers:
        args = ESConfig(load_best_model_at_end=True, eval_steps=1, metric_for_best_model=name)
        best.check_metric(args, accuracy is not None)
    wrong = ESConfig(load_best_model_at_end=True, eval_steps=1, metric_for_best_model="eval_acuracy")
    with pytest.raises(UserError) as refused:
        best.check_metric(wrong, accuracy is not None)
    assert all(name in str(refused.value) for name in numbers)
    assert ("did you mean" in str(refused.value)) == (accuracy is not None)


def test_an_evaluation_of_other_rows_is_left_out() -> None:
    args = ESConfig(load_best_model_at_end=True, eval_steps=1)
    made = [{**each, "eval_rows": 4} for each in records([0.9, 0.8])] + records([0.0, 0.0, 0.3, 0.2])[2:]
    found = best.choose(args, made, 3)
    assert found is not None and (found["step"], found["value"], found["global_step"]) == (2, 0.3, 3)
    assert best.choose(args, [], 3) is None and best.choose(ESConfig(), made, 3) is None


def test_early_stopping_happens_at_an_evaluation() -> None:
    args = ESConfig(early_stopping_patience=2, eval_steps=2)
    made = records([0.3, 0.2, 0.1], every=2)
    assert [best.stops_early(args, made[: count + 1], 2 * count) for count in range(3)] == [False, False, True]
    assert not best.stops_early(args, made, 5)  # between two evaluations
    assert not best.stops_early(ESConfig(early_stopping_patience=3, eval_steps=2), made, 4)
    assert not best.stops_early(args, [], 0)


@pytest.mark.parametrize("split", ["test", "Test", "test[:50%]", "test_hard", "tests"])
def test_test_rows_do_not_choose(split: str) -> None:
    with pytest.raises(UserError, match="final measurement"):
        best.refuse_test_rows(split)


@pytest.mark.parametrize("split", [None, "validation", "val", "dev", "testimony", "latest"])
def test_other_rows_may_choose(split: str | None) -> None:
    best.refuse_test_rows(split)
