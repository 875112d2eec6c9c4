"""The numbers of a comparison's report, computed from its result files alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from estune.compare.plan import BUDGETS, EVALUATIONS, TIME
from estune.compare.results import (
    COST_FILE,
    DONE,
    FAILED,
    PLAN_FILE,
    UNMEASURED,
    Changes,
    Plan,
    Result,
    Sitting,
    Tuned,
    VoteFacts,
    base_digest,
    read_json,
    read_result,
)
from estune.compare.statistics import Transitions, holm, over_seeds, paired_difference, transitions, two_level
from estune.errors import UserError
from estune.train.evaluation import pass_at_ks


class Linked(Result, total=False):
    """A result with the paths that the report links to, below the comparison's directory."""

    file: str
    page: str  # of the run
    budget: str  # of a trial


class Interval(TypedDict):
    """The fields of `estune.compare.statistics.Estimate`."""

    mean: float
    low: float
    high: float


class Gain(TypedDict):
    """The fields of `estune.compare.statistics.Difference`."""

    difference: float
    low: float
    high: float
    p_value: float
    test: str


class PairedTest(Gain):
    """A difference between an ES row and another row."""

    es: str
    other: str
    p_holm: NotRequired[float]
    members: NotRequired[int]  # that vote in the other row: its answers take this many times the inference


class Spread(TypedDict):
    """The fields of `estune.compare.statistics.OverSeeds`."""

    n: int
    mean: float
    interval: tuple[float, float] | None
    standard_deviation: float | None
    range: float


class Discovery(TypedDict):
    """The share of never solved problems that are solved, greedily and in samples."""

    greedy: NotRequired[Interval]
    sampled: NotRequired[Interval]
    samples: NotRequired[int]


class Moved(TypedDict):
    """Test problems by the greedy answers of the base and of the tuned model, means over seeds."""

    both_right: float
    both_wrong: float
    progressions: float  # wrong in the base, right in the tuned model
    regressions: float


class SummaryRow(TypedDict, total=False):
    """The fields that rows of all kinds may have."""

    name: str
    accuracy: Interval
    pass_at_k: dict[str, Interval]
    samples: int  # of each problem, for pass@k and mean@k
    mean_at_k: Interval  # accuracy of the samples
    answer_entropy: float  # nats; absent in results of older versions
    length: float
    retention: dict[str, float]
    wordless: float  # share of completions without a dictionary word
    discovery: Discovery
    changes: Changes


class UntrainedRow(SummaryRow, total=False):
    """The row of the base, of the base with its skill forced, or of the best constant answer."""

    retention_rows: dict[str, int]
    file: str
    correct: str


class MethodRow(SummaryRow, total=False):
    """The row of a method at a budget. If no model was measured, it lacks every measure."""

    seeds: list[dict[str, Any]]  # chosen fields of each seed's `Linked`
    failed: int
    unmeasured: int
    hacked: int
    settings: dict[str, Any]
    spread: Spread
    gain: Gain  # its p-value is of the paired test against the base
    moved: Moved
    mean_at_k_gain: Gain
    kl: float
    evaluations: float
    train_time_s: float
    steps: float
    correct: list[str]
    beside_constant: bool  # whether the row is not above the best constant answer
    vote: VoteFacts  # of random_vote: the means over seeds; such a row has no measure that only a single model has


class TunedSummary(Tuned, total=False):
    """A method's tuning and its trials."""

    trials: list[Linked]


class ModelSummary(TypedDict):
    """The part of a summary about one model."""

    path: str
    fingerprint: str
    base: UntrainedRow
    never_solved: int
    sought: int  # number of first test rows that were searched for never solved rows
    rows: dict[str, list[MethodRow]]  # of each budget
    tests: dict[str, list[PairedTest]]  # of each budget
    tuning: dict[str, TunedSummary]  # of each method
    curves: dict[str, dict[str, list[list[list[float | None]]]]]  # of each budget, method and seed
    prefix: NotRequired[UntrainedRow]
    constant: NotRequired[UntrainedRow]


class Summary(TypedDict):
    """The content of a report; `summary.json` is this without ``correct``."""

    comparison: dict[str, Any]  # the fields of `estune.compare.config.Comparison`
    environment: dict[str, Any]
    models: dict[str, ModelSummary]
    established: dict[str, bool]  # of each baseline
    cost: dict[str, float] | None
    mixed: dict[str, list[str]]


def summarise(directory: Path) -> Summary:
    """Return the content of a comparison's report.

    Raises:
        UserError: there are no results yet, or a result refers to another measurement of its base.
    """
    plan: Plan = read_json(directory / PLAN_FILE)
    comparison = plan["comparison"]
    models = {}
    for model in comparison["models"]:
        folder = directory / "results" / model
        if (folder / "base.json").exists():
            models[model] = _model_summary(directory, folder, comparison)
    if not models:
        raise UserError(f"{directory} holds no results yet")
    for model in models.values():
        _compare_with_constant(model)
    established = _established(models, comparison)
    for model in models.values():
        model["tests"] = _tests(model["rows"], comparison, established)
    return {
        "comparison": comparison,
        "environment": plan["environment"],
        "models": models,
        "established": established,
        "cost": _cost(directory / "results" / "cost.json"),
        "mixed": _mixed(directory / "results"),
    }


def _cost(file: Path) -> dict[str, float] | None:
    """Return the hours of processor and wall time of all sittings; None if there is no such file."""
    if not file.exists():
        return None
    sittings: list[Sitting] = read_json(file)
    cpu_s = sum(sitting["cpu_s"] for sitting in sittings)
    wall_s = sum(sitting["wall_s"] for sitting in sittings)
    return {"sittings": len(sittings), "cpu_h": cpu_s / 3600, "wall_h": wall_s / 3600}


def _mixed(results: Path) -> dict[str, list[str]]:
    """Return the versions of code, machines and packages that made the results; only kinds with several versions."""
    read = [read_result(file) for file in results.rglob("*.json") if file.name != COST_FILE]
    codes = sorted({code for result in read for code in (result.get("code"), *result.get("trained_by", [])) if code})
    cost = results / COST_FILE
    sittings: list[Sitting] = read_json(cost) if cost.exists() else []
    machines = sorted({sitting["machine"] for sitting in sittings})
    packages: list[set[tuple[str, str]]] = [
        set(sitting["packages"].items()) for sitting in sittings if "packages" in sitting
    ]
    changed = sorted(packages[0].union(*packages) - packages[0].intersection(*packages)) if packages else []
    versions = {"code": codes, "machine": machines, "package version": [" ".join(each) for each in changed]}
    return {kind: listed for kind, listed in versions.items() if len(listed) > 1}


def _model_summary(directory: Path, folder: Path, comparison: dict[str, Any]) -> ModelSummary:
    """Return a model's part of the summary.

    Args:
        directory: the comparison's.
        folder: the model's results.
        comparison: the options.
    """
    base = read_result(folder / "base.json")
    sample_rows = min(comparison["measuring"]["sample_rows"] or len(base["correct"]), len(base["correct"]))
    rows: dict[str, list[MethodRow]] = {budget: [] for budget in BUDGETS}
    tuning: dict[str, TunedSummary] = {}
    curves: dict[str, dict[str, list[list[list[float | None]]]]] = {budget: {} for budget in BUDGETS}
    methods = sorted(path.name for path in folder.iterdir() if path.is_dir())
    order = [*comparison["methods"], *(name for name in methods if name not in comparison["methods"])]
    for method in order:
        if not (folder / method).is_dir():
            continue
        if (folder / method / "tuning.json").exists():
            tuning[method] = _tuning(folder / method, directory)
        for budget in BUDGETS:
            files = sorted((folder / method).glob(f"seed-*-{budget}.json"), key=_number_in_name)
            results = [_read_linked(file, directory) for file in files]
            if results:
                rows[budget].append(method_row(method, results, base, sample_rows))
                curves[budget][method] = [result.get("curve", []) for result in results]
    model: ModelSummary = {
        "path": comparison["models"][folder.name],
        "fingerprint": base["fingerprint"],
        "base": untrained_row("base", base, _relative(folder / "base.json", directory), sample_rows),
        "never_solved": len(base["never_solved"]),  # of the first `sought` rows of the test split
        "sought": min(comparison["measuring"].get("discovery_rows") or len(base["correct"]), len(base["correct"])),
        "rows": rows,
        "tests": {},
        "tuning": tuning,
        "curves": curves,
    }
    if (folder / "base-prefix.json").exists():
        prefixed = read_result(folder / "base-prefix.json")
        name = f"base, made to begin with {prefixed['response_prefix']}"
        model["prefix"] = untrained_row(name, prefixed, _relative(folder / "base-prefix.json", directory), sample_rows)
    if (folder / "constant.json").exists():
        constant = read_result(folder / "constant.json")
        name = f"always {constant['says']}"
        model["constant"] = untrained_row(name, constant, _relative(folder / "constant.json", directory), sample_rows)
    return model


def _tuning(folder: Path, directory: Path) -> TunedSummary:
    """Return what was chosen for a method, what its tuning cost, and all of its trials."""
    trials = sorted(folder.glob("trial-*.json"), key=_number_in_name)
    tuned: TunedSummary = read_json(folder / "tuning.json")
    tuned["trials"] = [_read_trial(file, directory) for file in trials]
    return tuned


def _read_trial(file: Path, directory: Path) -> Linked:
    """Return a trial's result without its curve and settings, with its budget and its own path."""
    trial: Linked = read_json(file)
    trial.pop("curve", None)
    trial.pop("settings", None)
    trial["budget"] = TIME if file.stem.endswith("-time") else EVALUATIONS
    trial["file"] = _relative(file, directory)
    return trial


def _read_linked(file: Path, directory: Path) -> Linked:
    """Return a run's result with its own path and, if the run has one, the path of the run's page."""
    content: Linked = read_json(file)
    result: Linked = {**content, "file": _relative(file, directory)}
    page = directory / result["run"] / "report.html"
    return {**result, "page": _relative(page, directory)} if page.exists() else result


def _relative(file: Path, directory: Path) -> str:
    return file.relative_to(directory).as_posix()


def _number_in_name(file: Path) -> int:
    """Return the number of a trial or a seed, from its file's name."""
    return int(file.stem.split("-")[1])


def untrained_row(name: str, result: Result, file: str, sample_rows: int) -> UntrainedRow:
    """Return the row of the base or of a constant answer, which have no seeds."""
    correct = _marks(result["correct"])[None]
    row: UntrainedRow = {
        "name": name,
        "accuracy": _interval(correct),
        "length": result["length"],
        "retention": {name: retained["accuracy"] for name, retained in result.get("retention", {}).items()},
        "retention_rows": {name: retained["n"] for name, retained in result.get("retention", {}).items()},
        "file": file,
        "correct": result["correct"],
    }
    if "right_of" in result:
        row["pass_at_k"] = _pass_at_k([result], sample_rows)
        row["mean_at_k"] = _interval(_mean_at_k([result], sample_rows))
        row["samples"] = result["samples"]
        row["wordless"] = result["judged"]["literal_share_without_words"]
    if "answer_entropy" in result:
        row["answer_entropy"] = result["answer_entropy"]
    if result.get("discovery_control"):  # further samples of the base, with the random numbers of tuned models
        solved = np.array(result["discovery_control"])[None] > 0  # (1, U)
        row["discovery"] = {"sampled": _interval(solved), "samples": result["samples"]}
    return row


def method_row(method: str, results: Sequence[Linked], base: Result, sample_rows: int) -> MethodRow:
    """Return the row of a method at a budget, over all its seeds.

    A failed seed counts as the base: with the base's greedy and sampled answers. A seed whose model could not be
    measured is left out. Measures that the base does not have, such as KL, are of the finished seeds alone.

    Raises:
        UserError: a seed was measured against another measurement of the base.
    """
    done = [result for result in results if result["status"] == DONE]
    unmeasured = sum(result["status"] == UNMEASURED for result in results)
    row: MethodRow = {
        "name": method,
        "seeds": [_seed_summary(result, base) for result in results],
        "failed": len(results) - len(done) - unmeasured,
        "unmeasured": unmeasured,
        "hacked": sum(bool(result["hacking"]["hacked"]) for result in done),
        "settings": results[0].get("settings", {}),
    }
    _check_base(done, base)
    counted = [_counted(result, base) for result in results if result["status"] != UNMEASURED]
    if not counted:
        return row
    correct = np.stack([_marks(result["correct"]) for result in counted])  # (S, P)
    votes = [result["vote"] for result in done if "vote" in result]
    single = [] if votes else counted  # measures that only a single model has
    measures: MethodRow = {
        "accuracy": _interval(correct),
        "spread": cast(Spread, dataclasses.asdict(over_seeds(correct.mean(1).tolist()))),
        "gain": cast(Gain, dataclasses.asdict(paired_difference(correct, _marks(base["correct"])[None]))),
        "moved": _moved(counted, base),
        "pass_at_k": _pass_at_k(single, sample_rows) if single else {},
        "kl": _mean(result["kl"] for result in done if "kl" in result),
        "length": _mean(result["length"] for result in counted),
        "retention": {
            name: _mean(result["retention"][name]["accuracy"] for result in single) for name in base["retention"]
        },
        "evaluations": _mean(result.get("evaluations") for result in done or results),
        "train_time_s": _mean(result.get("train_time_s") for result in done or results),
        "steps": _mean(result.get("steps") for result in done or results),
        "changes": _mean_changes([result for result in done if "changes" in result]),
        "wordless": _mean(_share_without_words(result, base) for result in results if result["status"] != UNMEASURED),
        "correct": ["".join(str(int(mark)) for mark in seed) for seed in correct],
    }
    row |= measures
    if votes:
        row["vote"] = {
            "members": votes[0]["members"],
            "best_accuracy": _mean(vote["best_accuracy"] for vote in votes),
            "agreement": _mean(vote["agreement"] for vote in votes),
        }
    if single:
        sampled = _mean_at_k(single, sample_rows)
        row["samples"] = base["samples"]
        row["mean_at_k"] = _interval(sampled)
        row["mean_at_k_gain"] = cast(
            Gain, dataclasses.asdict(paired_difference(sampled, _mean_at_k([base], sample_rows)))
        )
    entropies = [result["answer_entropy"] for result in single if "answer_entropy" in result]
    if single and len(entropies) == len(single):
        row["answer_entropy"] = _mean(entropies)
    if base["never_solved"]:
        greedy = correct[:, np.array(base["never_solved"])]  # (S, U)
        row["discovery"] = {"greedy": _interval(greedy)}
        if single:
            samples = np.array([result["discovery"] for result in single])  # (S, U)
            row["discovery"] |= {"sampled": _interval((samples > 0).astype(float)), "samples": base["samples"]}
    return row


def _counted(result: Linked, base: Result) -> Result:
    """Return the measurements that count for a seed: the seed's own or, if its run failed, the base's."""
    if result["status"] == FAILED:
        return {**base, "discovery": base.get("discovery_control", [])}
    return result


def _share_without_words(result: Linked, base: Result) -> float:
    """Return the share of a seed's completions without a dictionary word; if its run failed, the base's share."""
    measures = base["judged"] if result["status"] == FAILED else result["hacking"]
    return float(measures["literal_share_without_words"])


def _check_base(results: Sequence[Linked], base: Result) -> None:
    """Raise UserError if a seed was measured against another measurement of the base."""
    digest = base_digest(base)
    for result in results:
        if result.get("base", digest) != digest:
            raise UserError(
                f"{result['file']} was measured against another measurement of its base: delete it, and it "
                "is measured again"
            )


def _moved(results: Sequence[Result], base: Result) -> Moved:
    """Return the mean over seeds of the numbers of problems that were won, lost and neither."""
    seeds = [dataclasses.asdict(_transitions(result, base)) for result in results]
    return cast(Moved, {name: _mean(seed[name] for seed in seeds) for name in Moved.__annotations__})


def _transitions(result: Mapping[str, Any], base: Result) -> Transitions:
    """Return how the greedy answers of one seed's model differ from the base's."""
    before, after = ([mark == "1" for mark in answers["correct"]] for answers in (base, result))
    return transitions(before, after)


def _mean_at_k(results: Sequence[Result], sample_rows: int) -> np.ndarray:
    """Return the share of right samples of each problem, (S, P)."""
    return np.array([result["right_of"][:sample_rows] for result in results]) / results[0]["samples"]


def _seed_summary(result: Mapping[str, Any], base: Result) -> dict[str, Any]:
    """Return the fields of a seed's result that the report shows, and the problems that it won and lost."""
    names = (
        "seed",
        "status",
        "error",
        "accuracy",
        "evaluations",
        "train_time_s",
        "steps",
        "kl",
        "run",
        "file",
        "page",
        "fingerprint",
        "answer_entropy",
    )
    summary = {name: result[name] for name in names if name in result}
    if result["status"] == DONE:
        moved = _transitions(result, base)
        summary |= {"progressions": moved.progressions, "regressions": moved.regressions, "mcnemar_p": moved.p_value}
    return summary


def _pass_at_k(results: Sequence[Result], sample_rows: int) -> dict[str, Interval]:
    """Return the unbiased pass@k for each k, over all seeds: mean, and the interval over problems and seeds."""
    of_seeds = [pass_at_ks(result["right_of"][:sample_rows], result["samples"]) for result in results]
    return {str(k): _interval([values[k] for values in of_seeds]) for k in of_seeds[0]}


def _mean_changes(results: Sequence[Result]) -> Changes:
    """Return the mean change of the parameters over seeds, and the first seed's histogram."""
    changes: list[dict[str, Any]] = [dict(result["changes"]) for result in results]
    first = changes[0] if changes else {}
    numbers = {
        name: _mean(each[name] for each in changes) for name, value in first.items() if isinstance(value, (int, float))
    }
    others = {name: value for name, value in first.items() if not isinstance(value, (int, float))}
    return cast(Changes, {**others, **numbers})


def _compare_with_constant(model: ModelSummary) -> None:
    """Mark the rows that are not above the best constant answer, by the interval of a paired difference."""
    if "constant" not in model:
        return
    constant = _marks(model["constant"]["correct"])[None]
    for row in (row for rows in model["rows"].values() for row in rows if "correct" in row):
        correct = np.stack([_marks(seed) for seed in row["correct"]])
        row["beside_constant"] = bool(paired_difference(correct, constant).low <= 0)


def _established(models: dict[str, ModelSummary], comparison: dict[str, Any]) -> dict[str, bool]:
    """Return for every baseline whether it is established.

    It is if on some base, at some budget, it gains `established_points` and is above the best constant answer.
    """
    established: dict[str, bool] = {}
    for name, entry in comparison["methods"].items():
        if entry["method"] in ("es", "random_search"):
            continue
        rows = [row for model in models.values() for budget in BUDGETS for row in model["rows"][budget]]
        rows = [row for row in rows if row["name"] == name and not row.get("beside_constant")]
        gains = [row["gain"]["difference"] for row in rows if "gain" in row]
        established[name] = bool(gains) and 100 * max(gains) >= comparison["established_points"]
    return established


def _tests(
    rows: dict[str, list[MethodRow]], comparison: dict[str, Any], established: dict[str, bool]
) -> dict[str, list[PairedTest]]:
    """Return the paired tests of every ES row against every established baseline and random search, at each budget.

    The p-values of all tests on one base, of both budgets together, are corrected (Holm).
    """
    kinds = {name: entry["method"] for name, entry in comparison["methods"].items()}
    tests: dict[str, list[PairedTest]] = {budget: [] for budget in BUDGETS}
    for budget in BUDGETS:
        done = {row["name"]: row for row in rows[budget] if "correct" in row}
        others = [name for name in done if established.get(name) or kinds[name] == "random_search"]
        for es in (name for name in done if kinds[name] == "es"):
            for other in others:
                difference = paired_difference(
                    *(np.stack([_marks(seed) for seed in done[name]["correct"]]) for name in (es, other))
                )
                paired = {"es": es, "other": other, **dataclasses.asdict(difference)}
                if "vote" in done[other]:
                    paired["members"] = done[other]["vote"]["members"]
                tests[budget].append(cast(PairedTest, paired))
    listed = [test for budget in BUDGETS for test in tests[budget]]
    for test, corrected in zip(listed, holm([test["p_value"] for test in listed]), strict=True):
        test["p_holm"] = corrected
    return tests


def _interval(correct: Any) -> Interval:
    """Return the mean of ``correct`` (S, P) and its interval over seeds and problems."""
    return cast(Interval, dataclasses.asdict(two_level(correct)))


def _marks(correct: str) -> np.ndarray:
    """Return the 0 and 1 of a result's ``correct`` as float64, (P,)."""
    return np.frombuffer(correct.encode(), dtype=np.uint8).astype(np.float64) - ord("0")


def _mean(values: Iterable[float | None]) -> float:
    """Return the mean of the values that are not None; NaN if there are none."""
    listed = [value for value in values if value is not None]
    return float(np.mean(listed)) if listed else float("nan")
