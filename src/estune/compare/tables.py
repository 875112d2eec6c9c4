"""From the files of a comparison's results to the numbers of its report: nothing is computed that they do not hold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from estune.compare.plan import BUDGETS
from estune.compare.statistics import holm, over_seeds, paired_difference, two_level
from estune.errors import UserError
from estune.train.evaluation import pass_at_ks


def read_json(file: Path) -> Any:
    """Return a JSON file's value."""
    return json.loads(file.read_text(encoding="utf-8"))


def summarise(directory: Path) -> dict[str, Any]:
    """Return everything that the report of a comparison says.

    Raises:
        UserError: there is nothing to report yet.
    """
    plan = read_json(directory / "comparison.json")
    comparison = plan["comparison"]
    models = {}
    for model in comparison["models"]:
        folder = directory / "results" / model
        if (folder / "base.json").exists():
            models[model] = _model(directory, folder, comparison)
    if not models:
        raise UserError(f"{directory} holds no results yet")
    for model in models.values():
        _beside_constant(model)
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
    """Return the hours of processor and wall time of all sittings; None where they were not counted."""
    if not file.exists():
        return None
    sittings = read_json(file)
    cpu_h, wall_h = (sum(sitting[name] for sitting in sittings) / 3600 for name in ("cpu_s", "wall_s"))
    return {"sittings": len(sittings), "cpu_h": cpu_h, "wall_h": wall_h}


def _mixed(results: Path) -> dict[str, list[str]]:
    """Return the versions of the code and the machines that made the results, where there are several."""
    read = [read_json(file) for file in results.rglob("*.json") if file.name != "cost.json"]
    codes = sorted({code for result in read for code in (result.get("code"), *result.get("trained_by", [])) if code})
    cost = results / "cost.json"
    sittings = read_json(cost) if cost.exists() else []
    machines = sorted({sitting["machine"] for sitting in sittings})
    packages = [set(sitting["packages"].items()) for sitting in sittings if "packages" in sitting]
    changed = sorted(set.union(*packages) - set.intersection(*packages)) if packages else []
    told = {"code": codes, "machine": machines, "package version": [" ".join(each) for each in changed]}
    return {name: found for name, found in told.items() if len(found) > 1}


def _model(directory: Path, folder: Path, comparison: dict[str, Any]) -> dict[str, Any]:
    base = read_json(folder / "base.json")
    sample_rows = min(comparison["measuring"]["sample_rows"] or len(base["correct"]), len(base["correct"]))
    rows: dict[str, list[dict[str, Any]]] = {budget: [] for budget in BUDGETS}
    tuning: dict[str, Any] = {}
    curves: dict[str, dict[str, list[Any]]] = {budget: {} for budget in BUDGETS}
    methods = sorted(path.name for path in folder.iterdir() if path.is_dir())
    order = [*comparison["methods"], *(name for name in methods if name not in comparison["methods"])]
    for method in order:
        if not (folder / method).is_dir():
            continue
        if (folder / method / "tuning.json").exists():
            tuning[method] = read_json(folder / method / "tuning.json")
            trials = sorted((folder / method).glob("trial-*.json"), key=lambda path: int(path.stem.split("-")[1]))
            tuning[method]["trials"] = [
                {
                    **{k: v for k, v in read_json(file).items() if k not in ("curve", "settings")},
                    "budget": "time" if file.stem.endswith("-time") else "evaluations",
                    "file": _relative(file, directory),
                }
                for file in trials
            ]
        for budget in BUDGETS:
            files = sorted((folder / method).glob(f"seed-*-{budget}.json"), key=_seed_of)
            results = [_linked(file, directory) for file in files]
            if results:
                rows[budget].append(_row(method, results, base, sample_rows))
                curves[budget][method] = [result.get("curve", []) for result in results]
    found: dict[str, Any] = {
        "path": comparison["models"][folder.name],
        "fingerprint": base["fingerprint"],
        "base": _fixed("base", base, _relative(folder / "base.json", directory), sample_rows),
        "never_solved": len(base["never_solved"]),  # of the first `sought` rows
        "sought": min(comparison["measuring"].get("discovery_rows") or len(base["correct"]), len(base["correct"])),
        "rows": rows,
        "tests": {},
        "tuning": tuning,
        "curves": curves,
    }
    if (folder / "base-prefix.json").exists():
        prefixed = read_json(folder / "base-prefix.json")
        name = f"base, made to begin with {prefixed['response_prefix']}"
        found["prefix"] = _fixed(name, prefixed, _relative(folder / "base-prefix.json", directory), sample_rows)
    if (folder / "constant.json").exists():
        constant = read_json(folder / "constant.json")
        name = f"always {constant['says']}"
        found["constant"] = _fixed(name, constant, _relative(folder / "constant.json", directory), sample_rows)
    return found


def _linked(file: Path, directory: Path) -> dict[str, Any]:
    """Return a run's result, with where it stands and, if it is there, its run's own page."""
    result: dict[str, Any] = {**read_json(file), "file": _relative(file, directory)}
    page = directory / result["run"] / "report.html"
    return {**result, "page": _relative(page, directory)} if page.exists() else result


def _relative(file: Path, directory: Path) -> str:
    return file.relative_to(directory).as_posix()


def _seed_of(file: Path) -> int:
    return int(file.stem.split("-")[1])


def _fixed(name: str, result: dict[str, Any], file: str, sample_rows: int) -> dict[str, Any]:
    """Return the row of a model that has no seeds."""
    correct = _marks(result["correct"])[None]
    row = {
        "name": name,
        "accuracy": dataclasses.asdict(two_level(correct)),
        "length": result["length"],
        "retention": {name: kept["accuracy"] for name, kept in result.get("retention", {}).items()},
        "retention_rows": {name: kept["n"] for name, kept in result.get("retention", {}).items()},
        "file": file,
        "correct": result["correct"],
    }
    if "right_of" in result:
        row["pass_at_k"] = _pass_at_k([result], sample_rows)
        row["wordless"] = result["judged"]["literal_share_without_words"]
    if result.get("discovery_control"):  # the base once more, by the random numbers that tuned models get
        solved = np.array(result["discovery_control"])[None] > 0  # (1, U)
        row["discovery"] = {"sampled": dataclasses.asdict(two_level(solved)), "samples": result["samples"]}
    return row


def _row(method: str, results: Sequence[dict[str, Any]], base: dict[str, Any], sample_rows: int) -> dict[str, Any]:
    """Return the row of a method at a budget: all its seeds, failed ones among them.

    Who starts a run and gets nothing has the base: a failed seed counts as the base's answers, greedy and sampled. One
    whose model could not be measured counts as nothing. What the base lacks, KL say, is of those that are done.

    Raises:
        UserError: a seed was measured beside another measurement of the base.
    """
    done = [result for result in results if result["status"] == "done"]
    unmeasured = sum(result["status"] == "unmeasured" for result in results)
    row: dict[str, Any] = {
        "name": method,
        "seeds": [_seed(result) for result in results],
        "failed": len(results) - len(done) - unmeasured,
        "unmeasured": unmeasured,
        "hacked": sum(bool(result["hacking"]["hacked"]) for result in done),
        "settings": results[0].get("settings", {}),
    }
    digest = base_digest(base)
    for result in done:
        if result.get("base", digest) != digest:
            raise UserError(
                f"{result['file']} was measured beside another measurement of its base: delete it, and it "
                "is measured again"
            )
    delivered = [_delivered(result, base) for result in results if result["status"] != "unmeasured"]
    if not delivered:
        return row
    correct = np.stack([_marks(result["correct"]) for result in delivered])  # (S, P)
    row |= {
        "accuracy": dataclasses.asdict(two_level(correct)),
        "spread": dataclasses.asdict(over_seeds(correct.mean(1).tolist())),
        "gain": dataclasses.asdict(paired_difference(correct, _marks(base["correct"])[None])),
        "pass_at_k": _pass_at_k(delivered, sample_rows),
        "kl": _mean(result["kl"] for result in done),
        "length": _mean(result["length"] for result in delivered),
        "retention": {
            name: _mean(result["retention"][name]["accuracy"] for result in delivered) for name in base["retention"]
        },
        "evaluations": _mean(result.get("evaluations") for result in done or results),
        "train_time_s": _mean(result.get("train_time_s") for result in done or results),
        "steps": _mean(result.get("steps") for result in done or results),
        "changes": _changes(done),
        "wordless": _mean(result["wordless"] for result in delivered),
        "correct": ["".join(str(int(mark)) for mark in seed) for seed in correct],
    }
    if base["never_solved"]:
        greedy = correct[:, np.array(base["never_solved"])]  # (S, U)
        samples = np.array([result["discovery"] for result in delivered])  # (S, U)
        row["discovery"] = {
            "greedy": dataclasses.asdict(two_level(greedy)),
            "sampled": dataclasses.asdict(two_level((samples > 0).astype(float))),
            "samples": base["samples"],
        }
    return row


def _delivered(result: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return what a run delivered: what was measured of it or, where it failed, of the base that it left."""
    if result["status"] == "failed":
        judged, control = base["judged"], base.get("discovery_control", [])
        return {**base, "discovery": control, "wordless": judged["literal_share_without_words"]}
    return {**result, "wordless": result["hacking"]["literal_share_without_words"]}


def base_digest(base: dict[str, Any]) -> str:
    """Return what tells one measurement of a base from another: 16 hex digits over its marks and what it never solves.

    A tuned model is measured on what its base never solved, and judged beside the base's answers.
    """
    told = json.dumps([base["correct"], base["never_solved"]])
    return hashlib.blake2b(told.encode("ascii"), digest_size=8).hexdigest()


def _seed(result: dict[str, Any]) -> dict[str, Any]:
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
    )
    return {name: result[name] for name in names if name in result}


def _pass_at_k(results: Sequence[dict[str, Any]], sample_rows: int) -> dict[str, Any]:
    """Return the unbiased pass@k for each k, over all seeds: mean, and the interval over problems and seeds."""
    own = [pass_at_ks(result["right_of"][:sample_rows], result["samples"]) for result in results]
    return {str(k): dataclasses.asdict(two_level([seed[k] for seed in own])) for k in own[0]}


def _changes(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean change of the parameters over seeds, and the first seed's histogram."""
    first = results[0]["changes"] if results else {}
    numbers = {
        name: _mean(result["changes"][name] for result in results)
        for name, value in first.items()
        if isinstance(value, (int, float))
    }
    return {**{name: value for name, value in first.items() if not isinstance(value, (int, float))}, **numbers}


def _beside_constant(model: dict[str, Any]) -> None:
    """Mark the rows that are, by a paired difference, not above who always gives the same answer."""
    if "constant" not in model:
        return
    constant = _marks(model["constant"]["correct"])[None]
    for row in (row for rows in model["rows"].values() for row in rows if "correct" in row):
        own = np.stack([_marks(seed) for seed in row["correct"]])
        row["beside_constant"] = bool(paired_difference(own, constant).low <= 0)


def _established(models: dict[str, Any], comparison: dict[str, Any]) -> dict[str, bool]:
    """Say of every baseline whether it gains enough on some base, at some budget, to count: more than a constant."""
    found: dict[str, bool] = {}
    for name, entry in comparison["methods"].items():
        if entry["method"] in ("es", "random_search"):
            continue
        rows = [row for model in models.values() for budget in BUDGETS for row in model["rows"][budget]]
        rows = [row for row in rows if row["name"] == name and not row.get("beside_constant")]
        gains = [row["gain"]["difference"] for row in rows if "gain" in row]
        found[name] = bool(gains) and 100 * max(gains) >= comparison["established_points"]
    return found


def _tests(
    rows: dict[str, list[dict[str, Any]]], comparison: dict[str, Any], established: dict[str, bool]
) -> dict[str, list[dict[str, Any]]]:
    """Compare every ES row with every established baseline, and random search, on one base, at each budget.

    P-values of all of them, both budgets together, are corrected (Holm).
    """
    kinds = {name: entry["method"] for name, entry in comparison["methods"].items()}
    found: dict[str, list[dict[str, Any]]] = {budget: [] for budget in BUDGETS}
    for budget in BUDGETS:
        done = {row["name"]: row for row in rows[budget] if "correct" in row}
        others = [name for name in done if established.get(name) or kinds[name] == "random_search"]
        for es in (name for name in done if kinds[name] == "es"):
            for other in others:
                difference = paired_difference(
                    *(np.stack([_marks(seed) for seed in done[name]["correct"]]) for name in (es, other))
                )
                found[budget].append({"es": es, "other": other, **dataclasses.asdict(difference)})
    listed = [test for budget in BUDGETS for test in found[budget]]
    for test, corrected in zip(listed, holm([test["p_value"] for test in listed]), strict=True):
        test["p_holm"] = corrected
    return found


def _marks(correct: str) -> np.ndarray:
    """Return a result's ``correct`` as numbers (P,)."""
    return np.frombuffer(correct.encode(), dtype=np.uint8).astype(np.float64) - ord("0")


def _mean(values: Any) -> float:
    listed = [value for value in values if value is not None]
    return float(np.mean(listed)) if listed else float("nan")
