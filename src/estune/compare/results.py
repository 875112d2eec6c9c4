"""The formats of a comparison's result files, which the report and the packed file are made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

PLAN_FILE, RESULTS, COST_FILE = "comparison.json", "results", "cost.json"
DONE, FAILED = "done", "failed"
UNMEASURED = "unmeasured"  # the run ended, but measuring its model failed; the method is not to blame

Plan = TypedDict(
    "Plan",
    {
        "comparison": dict[str, Any],  # the fields of `estune.compare.config.Comparison`
        "environment": dict[str, Any],  # machine and package versions at the first start
        "rows": dict[str, str],  # fingerprint of each split's rows
        "rewards": dict[str, Any],  # digest of each reward function's file
        "reward sources": dict[str, Any],  # hashes of the source of each reward function
    },
)
Plan.__doc__ = "The file `comparison.json`: what is compared, and the inputs that every start must have."


class Sitting(TypedDict, total=False):
    """What one call of `estune compare` cost, on which machine, with which code; `cost.json` is a list of these."""

    cpu_s: float
    wall_s: float
    code: str  # digest of the package
    machine: str
    packages: dict[str, str]


class Answers(TypedDict, total=False):
    """Greedy answers to the rows of one task."""

    n: int
    accuracy: float
    accuracy_ci95: list[float]
    correct: str  # one character a row: 1 is right
    reward: float | None
    length: float  # mean, tokens
    clipped_ratio: float
    reward_failures: int


class Histogram(TypedDict, total=False):
    """The distribution of the parameters' changes, in units of their root mean square."""

    edges: list[float]  # (bins + 1,)
    density: list[float]  # (bins,)


class Changes(TypedDict, total=False):
    """How far training moved the parameters; see `estune.compare.changes`."""

    norm: float
    relative_norm: float | None
    walk_ratio: float | None
    moved_share: float
    excess_kurtosis: float | None
    histogram: Histogram | None


class VoteFacts(TypedDict):
    """How a vote went; see `estune.baselines.random_search`."""

    members: int  # that answer each problem: the vote takes this many times the inference of one model
    best_accuracy: float  # of the best member alone
    agreement: float  # mean share of the members that gave the elected answer; 0 where no member gave an answer


class Measurement(Answers, total=False):
    """The fields of a file below `results/`, except ``settings``. No file has all of them."""

    model: str  # in a base's file: where its weights are; elsewhere the model's name in the comparison
    method: str
    seed: int
    trial: dict[str, Any]  # the settings of a trial
    status: str  # DONE, FAILED or UNMEASURED
    error: str
    # origin
    code: str  # digest of the package that measured
    trained_by: list[str]  # digests of the packages that trained
    fingerprint: str  # of the weights
    base: str  # digest of the base's measurement, `base_digest`
    run: str  # the run's directory, below the comparison's
    measured: str  # the measured snapshot's directory, below the comparison's
    # cost
    evaluations: int
    train_time_s: float
    steps: int
    # measurements
    right_of: list[int]  # how many of `samples` samples of each row are right
    samples: int
    sampled_length: float  # mean, tokens
    answer_entropy: float  # nats, of a row's sampled answers, mean over the rows that every model is sampled on
    retention: dict[str, Answers]
    kl: float
    curve: list[list[float | None]]  # evaluations, seconds, validation accuracy
    vote: VoteFacts  # of random_vote; then the fields that only a single model has are absent
    hacking: dict[str, Any]  # the fields of `estune.compare.hacking.Verdict`
    judged: dict[str, Any]  # of a base: the fields of `estune.compare.hacking.AnswerSummary`
    changes: Changes
    discovery: list[int]
    never_solved: list[int]  # rows of the test split
    discovery_control: list[int]
    response_prefix: str
    says: str  # the best constant answer
    train_accuracy: float


class Result(Measurement, total=False):
    """A file below `results/`, other than `tuning.json`. While a run is not measured yet, the fields known so far."""

    settings: dict[str, Any]  # the run's resolved options


class Tuned(TypedDict, total=False):
    """The file `tuning.json`: a method's chosen trials, and what all of its trials cost."""

    chosen: dict[str, Any]  # best at the budget of evaluations; also used at equal time if `chosen_time` is absent
    chosen_time: dict[str, Any]  # best at the budget of time
    rows: int  # of the validation split
    cost: dict[str, float]


def read_json(file: Path) -> Any:
    """Return a JSON file's value."""
    return json.loads(file.read_text(encoding="utf-8"))


def read_result(file: Path) -> Result:
    """Return a result file's content."""
    result: Result = read_json(file)
    return result


def base_digest(base: Result) -> str:
    """Return the identity of a base's measurement: 16 hexadecimal digits over its right answers and unsolved rows.

    A tuned model is measured on the rows that its base never solved, and is judged against the base's answers.
    """
    content = json.dumps([base["correct"], base["never_solved"]])
    return hashlib.blake2b(content.encode("ascii"), digest_size=8).hexdigest()
