"""Makes Markdown tables and sentences from the files in `benchmarks/results`; `evidence.py` puts them into pages."""

from __future__ import annotations

import collections
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from estune.compare.archive import Row, read_archive, summary_of
from estune.es.forecast import LEVEL, Agreement, Outlook, Parts
from estune.train.evaluation import interval

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
BUDGETS = {"evaluations": "equal evaluations", "time": "equal time"}
SHOWN = 3  # tasks shown of a scan
SCANS = {"default": "tasks at their default level", "easy": "tasks at their lowest level"}
# comparison -> result file with its accuracies on the problems that were asked only once
REPEATED = {"compare_smollm2_basic_arithmetic": "repeated_problems"}
PROBED_STEPS, PROBED_PROMPTS = 10, 8  # steps and B of the runs in the file `probe`
FALL = 0.05  # of accuracy: how far below its peak a run must end to count as fallen
FEWEST_SEEDS = 3  # seeds a method; with fewer, no differences are counted


def share(estimate: dict[str, Any], name: str = "mean", sign: str = "") -> str:
    """Return an estimate and its 95 % interval in per cent; ``name`` is the key of the estimate."""
    mean, low, high = (100 * estimate[key] for key in (name, "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def number(value: float | None, digits: int) -> str:
    """Return a number as text; an empty text for None and for values that are not finite."""
    return "" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def table(rows: list[list[str]], head: list[str]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def labelled(row: dict[str, Any], established: dict[str, bool]) -> str:
    """Return a method's name with notes: not established, failed or hacked runs, no better than a constant."""
    notes = []
    if established.get(row["name"]) is False:
        notes.append("not established: no claim")
    if row.get("failed"):
        notes.append(f"{row['failed']} of {len(row['seeds'])} failed")
    if row.get("unmeasured"):
        notes.append(f"{row['unmeasured']} of {len(row['seeds'])} not measured")
    if row.get("hacked"):
        notes.append(f"{row['hacked']} hacked")
    if vote := row.get("vote"):
        notes.append(f"{vote['members']} answers to each problem")
    if row.get("beside_constant"):
        notes.append("not above a constant")
    name = " ".join(str(row["name"]).split()).replace("<", "&lt;").replace("|", "&#124;")
    return f"{name} ({'; '.join(notes)})" if notes else name


def opponent(test: dict[str, Any]) -> str:
    """Return the name of the row that an ES row is tested against; for a vote, with its answers to each problem."""
    return f"{test['other']} ({test['members']} answers to each problem)" if "members" in test else str(test["other"])


def seeds_note(rows: Sequence[dict[str, Any]], wanted: int) -> str:
    """Return a note with the number of seeds of these rows; an empty text if no seed is missing."""
    counts = [len(row["seeds"]) for row in rows]
    few, many = min(counts), max(counts)
    if few == wanted:
        return ""
    alone = "; an interval of one seed is over problems alone" if few == 1 else ""
    return f" ({few if few == many else f'{few} to {many}'} of {wanted} seeds so far{alone})"


# --- all bases --------------------------------------------------------------------------------------------------------


def crossings(model: dict[str, Any], budget: str, method: str) -> list[float]:
    """Return the seconds of training until half of the gain that forcing the skill brings, of each run of a model.

    The validation accuracies measured during a run are interpolated linearly. A run that never reached half of the
    gain, or that failed before its first evaluation, counts as infinite. Empty if no skill was forced.
    """
    if "prefix" not in model:
        return []
    crossed = []
    wanted = (model["base"]["accuracy"]["mean"] + model["prefix"]["accuracy"]["mean"]) / 2
    for curve in model["curves"][budget].get(method, []):
        points = [(seconds, accuracy) for _, seconds, accuracy in curve if accuracy is not None]
        found = (
            t + (u - t) * (wanted - a) / (b - a) for (t, a), (u, b) in itertools.pairwise(points) if a < wanted <= b
        )
        crossed.append(next(found, math.inf))
    return crossed


def half_way(summary: dict[str, Any], budget: str, method: str) -> str:
    """Return the median of `crossings` over all runs as text; an infinite median is shown as "never"."""
    crossed = [seconds for model in summary["models"].values() for seconds in crossings(model, budget, method)]
    median = statistics.median(crossed) if crossed else math.nan
    return "never" if median == math.inf else number(median, 0)


def overview(summary: dict[str, Any], budgets: Sequence[str]) -> str:
    """Return the table of pass@1 of every method on every base, with mean evaluations and seconds a run.

    A method that lacks a result on some base has no mean evaluations and seconds.
    """
    models = summary["models"]
    # "half way" is undefined if no skill was forced, or if forcing it does not raise the accuracy.
    halves = all(
        "prefix" in model and model["prefix"]["accuracy"]["mean"] > model["base"]["accuracy"]["mean"]
        for model in models.values()
    )
    body = []
    for label in ("base", "prefix", "constant"):
        rows = [model.get(label) for model in models.values()]
        if all(rows):
            body.append([labelled(rows[0], {}), *(share(row["accuracy"]) for row in rows), "", "", *[""] * halves])
    for budget in budgets:
        body += [[f"**{BUDGETS[budget]}**", *[""] * (len(models) + 2 + halves)]] if len(budgets) > 1 else []
        body += _overview_rows(summary, budget, halves)
    return table(body, ["pass@1, %", *models, "evaluations", "seconds", *["half way, s"] * halves])


def _overview_rows(summary: dict[str, Any], budget: str, halves: bool) -> list[list[str]]:
    body = []
    for method in summary["comparison"]["methods"]:
        models = summary["models"].values()
        rows = [next((row for row in model["rows"][budget] if row["name"] == method), None) for model in models]
        existing = [row for row in rows if row is not None]
        if not existing:
            continue
        cells = [share(row["accuracy"]) if row and "accuracy" in row else "" for row in rows]
        used = ["", ""]
        if all(cells):
            used = [
                number(statistics.mean(row[name] for row in existing), 0) for name in ("evaluations", "train_time_s")
            ]
        beside = all(row.get("beside_constant") for row in existing)
        vote = {"vote": existing[0]["vote"]} if "vote" in existing[0] else {}
        label = labelled({"name": method, "beside_constant": beside, **vote}, summary["established"])
        body.append([label, *cells, *used, *([half_way(summary, budget, method)] if halves else [])])
    return body


def differences(summary: dict[str, Any], budget: str) -> str:
    """Return a sentence: how many paired differences between ES and other methods are significant (p < 0.05).

    An empty text if there are no differences, or if a method has fewer than `FEWEST_SEEDS` seeds.
    """
    tests = [test for model in summary["models"].values() for test in model["tests"][budget]]
    rows = [row for model in summary["models"].values() for row in model["rows"][budget]]
    if not tests or min(len(row["seeds"]) for row in rows) < FEWEST_SEEDS:
        return ""
    significant = [test for test in tests if test["p_holm"] < 0.05]
    better = [test for test in significant if test["difference"] > 0]
    others = collections.Counter(opponent(test) for test in better).most_common()
    beaten = f" ({', '.join(f'{count} against {name}' for name, count in others)})" if others else ""
    if len(tests) == 1:
        size = "more than chance" if significant else "within chance"
        return (
            f"One pair is tested: the difference of {tests[0]['es']} and {opponent(tests[0])} is {size} "
            f"({100 * tests[0]['difference']:+.1f} points, p {tests[0]['p_holm']:.2g}, Holm)."
        )
    return (
        f"Each ES method is paired with each other method on each base: {len(tests)} pairs. ES is better in "
        f"{len(better)}{beaten} and worse in {len(significant) - len(better)}, with p < 0.05 (Holm, within a base)."
    )


# --- one base ---------------------------------------------------------------------------------------------------------


def line(row: dict[str, Any], established: dict[str, bool], columns: int, wordless: bool) -> list[str]:
    """Return one method's cells; ``wordless``: with the share of completions that contain no word."""
    name = labelled(row, established)
    if "accuracy" not in row:
        return [name] + [""] * (columns - 1)
    seeds = sorted(100 * seed["accuracy"] for seed in row["seeds"] if "accuracy" in seed)
    kept = [number(100 * value, 1) for value in row["retention"].values()]
    return [
        name,
        share(row["accuracy"]),
        share(row["gain"], "difference", "+"),
        f"{seeds[0]:.1f} to {seeds[-1]:.1f}",
        *sampled(row),
        number(row["kl"], 2),
        *kept,
        *([number(100 * row["wordless"], 0)] if wordless else []),
        number(row["evaluations"], 0),
        number(row["train_time_s"], 0),
    ]


def fixed(row: dict[str, Any], kept: Sequence[str], wordless: bool) -> list[str]:
    """Return the cells of a model that was not trained, or of a constant answer; ``wordless``: see `line`."""
    others = [number(100 * row["retention"][name], 1) if name in row["retention"] else "" for name in kept]
    share_without = [number(100 * row["wordless"], 0) if "wordless" in row else ""] if wordless else []
    return [labelled(row, {}), share(row["accuracy"]), "", "", *sampled(row), "", *others, *share_without, "", ""]


def sampled(row: dict[str, Any]) -> tuple[str, str]:
    """Return the accuracy of one sample at temperature 1, and pass@k for the largest k; empty texts if not measured."""
    pass_at_k = row.get("pass_at_k", {})
    return (share(pass_at_k["1"]), share(pass_at_k[max(pass_at_k, key=int)])) if pass_at_k else ("", "")


def one_base(summary: dict[str, Any], model: str, budgets: Sequence[str]) -> str:
    """Return the table of all measurements on one base."""
    results = summary["models"][model]
    kept, k = list(results["base"]["retention"]), max(results["base"]["pass_at_k"], key=int)
    problems = results["base"]["retention_rows"]
    wordless = round(100 * results["base"]["wordless"]) < 100  # at 100 %, the task's answers contain no words
    head = [
        "method",
        "pass@1, %",
        "gain, points",
        "seeds, %",
        "a sample, %",
        f"pass@{k}, %",
        "KL",
        *(f"kept: {name} ({problems[name]}), %" for name in kept),
        *["no word, %"] * wordless,
        "evaluations",
        "seconds",
    ]
    body = [
        fixed(row, kept, wordless) for row in (results["base"], results.get("prefix"), results.get("constant")) if row
    ]
    for budget in budgets:
        body += [[f"**{BUDGETS[budget]}**", *[""] * (len(head) - 1)]] if len(budgets) > 1 else []
        body += [line(row, summary["established"], len(head), wordless) for row in results["rows"][budget]]
    return table(body, head)


def paired(summary: dict[str, Any], model: str, budget: str) -> str:
    """Return the table of all paired differences on a base at a budget; an empty text if there are none."""
    tests = [
        [f"{test['es']} - {opponent(test)}", share(test, "difference", "+"), f"{test['p_holm']:.2g}"]
        for test in summary["models"][model]["tests"][budget]
    ]
    return table(tests, ["difference, points", "mean [95 %]", "p (Holm)"]) if tests else ""


def seeds_of(rows: Sequence[Row], base: Row, budget: str) -> str:
    """Return the table of all runs at a budget. "Discovered" counts solved problems that the base never solves."""
    body = []
    for row in (row for row in rows if row["kind"] == "run" and row["budget"] == budget):
        drawn = f"{row['samples_kept']} of {row['samples_drawn']}" if "samples_drawn" in row else ""
        used = [f"{row.get('evaluations', 0):,}", number(row.get("train_time_s"), 0), drawn]
        cells = [row["method"], str(row["seed"]), *used]
        if row["status"] == "done":
            greedily = sum(row["correct"][problem] == "1" for problem in base["never_solved"])
            cells += [
                number(100 * row["accuracy"], 1),
                f"{row['hacking']['normalised_reward_change']:+.3f}",
                number(row.get("kl"), 2),
                number(row.get("changes", {}).get("walk_ratio"), 3),
                str(greedily),
                str(sum(count > 0 for count in row["discovery"])) if "discovery" in row else "",
                ", ".join(number(100 * kept["accuracy"], 1) for kept in row.get("retention", {}).values()),
                "",
            ]
        else:
            cells += [*[""] * 7, f"{row['status']}: {row['error']}"]
        body.append(cells)
    head = [
        "method",
        "seed",
        "evaluations",
        "seconds",
        "right samples drawn",
        "pass@1, %",
        "reward, change",
        "KL",
        "of a random walk",
        "discovered greedily",
        "in samples",
        "kept, %",
        "error",
    ]
    return table(body, head)


def trials_of(rows: Sequence[Row]) -> str:
    """Return the table of all trials, with their results on validation problems."""
    body = []
    for row in (row for row in rows if row["kind"] == "trial"):
        options = ", ".join(f"{name} {value}" for name, value in row["trial"].items()) or "defaults"
        used = [f"{row.get('evaluations', 0):,}", number(row.get("train_time_s"), 0)]
        right = number(100 * row["accuracy"], 1) if "accuracy" in row else row.get("error", row["status"])
        reward = number(row.get("reward"), 3)
        body.append([row["method"], BUDGETS[row["budget"]], options, *used, reward, right])
    return table(body, ["method", "tuned for", "trial", "evaluations", "seconds", "reward", "validation, %"])


# --- the page ---------------------------------------------------------------------------------------------------------


def read(name: str) -> Any:
    """Return the content of a JSON file in `benchmarks/results`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def scans(shown: int = SHOWN) -> str:
    """Return the table of each scan's ``shown`` first tasks and all tasks that were sampled; chosen tasks are bold."""
    head = [
        "task",
        "problems",
        "right, %",
        "holds the answer, %",
        "a constant, %",
        "answer in the prompt, %",
        "right samples",
        "tokens",
    ]
    body = []
    for part, label in SCANS.items():
        scan = read("scan_reasoning")[part]
        title = f"{len(scan['ranked'])} {label}, {len(scan['chosen']) or 'none'} chosen"
        body.append([f"**{title}**", *[""] * (len(head) - 1)])
        for rank, task in enumerate(scan["ranked"]):
            result = scan["tasks"][task]
            if rank >= shown and "right_samples" not in result:
                continue
            right = f"{result['right_samples']} of {result['samples']}" if "right_samples" in result else "not sampled"
            shares = ("accuracy", "holds_answer", "constant", "answer_in_prompt")
            percent = [number(100 * result[name], 0) for name in shares]
            bold = "**" * (task in scan["chosen"])
            body.append([f"{bold}{task}{bold}", str(result["n"]), *percent, right, number(result["length"], 0)])
    return table(body, head)


def repeated(name: str) -> str:
    """Return two sentences: how many test problems were also asked elsewhere, and the accuracies on all others."""
    counts = read(name)
    left = ", ".join(f"{method} {share(result['left'])}" for method, result in counts["methods"].items())
    return (
        f"Of {counts['test']:,} test problems, {counts['trained_on']} are also training problems with other brackets, "
        f"{counts['chosen_by']} also validation problems, and {counts['asked_before']} occur twice among the test "
        f"problems (`python benchmarks/{name}.py`). Accuracy in per cent on the other {counts['left']}: {left}."
    )


def paths(name: str) -> str:
    """Return the table of a few training steps on each of the harder tasks."""
    body = []
    for task, run in read(name)["tasks"].items():
        rewards = ", ".join(number(step["reward"], 3) for step in run["steps"])
        short = " to ".join(number(step["shorter"], 2) for step in (run["steps"][0], run["steps"][-1]))
        moved = ", ".join(number(step["es/update_norm"], 2) for step in run["steps"])
        cut = statistics.mean(step["completions/clipped_ratio"] for step in run["steps"])
        replayed = re.sub(r"^estune: |, in \S+$", "", run["replay"])
        body.append([f"`{task}`", rewards, short, moved, number(100 * cut, 0), replayed])
    head = ["task", "the task's reward, each step", "that for brevity", "update, L2", "cut off, %", "replay"]
    return table(body, head)


def conciseness(name: str) -> str:
    """Return the table of a model trained to be brief: characters beyond the shortest right answer, and accuracy."""
    result = read(name)
    base = result["base"]
    body = [
        [
            "base",
            number(base["distance"], 1),
            number(base["knowledge_distance"], 1),
            number(100 * base["correct"], 1),
            "",
            "",
        ]
    ]
    for run in result["runs"]:
        change = run["against_base"]
        low, high = change["points_ci95"]
        body.append(
            [
                f"seed {run['seed']}",
                number(run["distance"], 1),
                number(run["knowledge_distance"], 1),
                number(100 * run["correct"], 1),
                f"{change['went']}, {change['came']}, {change['points']:+.1f} [{low:+.1f}, {high:+.1f}]",
                number(run["seconds"], 0),
            ]
        )
    head = [
        "",
        "characters too many: 8 test prompts",
        "200 questions",
        "right answers to the 200, %",
        "gone, new, points [95 %, paired]",
        "seconds",
    ]
    return table(body, head)


@cache
def read_summary(file: Path) -> dict[str, Any]:
    """Return the summary (`summary_of`) of a comparison in one JSON file."""
    return summary_of(file)


def comparison_of(name: str) -> str:
    """Return the section of a comparison: one table, then sentences about significance, machine and cost."""
    summary = read_summary(RESULTS / f"{name}.json")
    models, wanted = summary["models"], len(summary["comparison"]["seeds"])
    budgets = [budget for budget in BUDGETS if any(model["rows"][budget] for model in models.values())]
    sentences = []
    for budget in budgets:
        seeds = seeds_note([row for model in models.values() for row in model["rows"][budget]], wanted)
        counts = differences(summary, budget)
        sentences += [f"{BUDGETS[budget].capitalize()}{seeds}: {counts[0].lower()}{counts[1:]}"] if counts else []
        sentences += [f"{BUDGETS[budget].capitalize()}{seeds}."] if seeds and not counts else []
    sentences += [repeated(REPEATED[name])] if name in REPEATED else []
    shown = overview(summary, budgets) if len(models) > 1 else one_base(summary, next(iter(models)), budgets)
    return f"{shown}\n{' '.join([*sentences, machine(summary)])}\n"


def machine(summary: dict[str, Any]) -> str:
    """Return sentences about a comparison's machine, versions and cost."""
    environment = summary["environment"]
    versions = ", ".join(
        f"{name} {environment['versions'][name]}"
        for name in ("torch", "transformers", "trl")
        if name in environment.get("versions", {})
    )
    hardware = ", ".join([environment["processor"], f"{environment['cores']} cores", *environment.get("gpus", [])])
    parts = [f"Machine: {hardware}{'; ' if versions else ''}{versions}."]
    for kind, values in summary["mixed"].items():
        parts.append(f"Results of more than one {kind} are mixed here: {'; '.join(values)}.")
    if cost := summary["cost"]:
        parts.append(f"Cost: {cost['cpu_h']:.1f} hours of processor time, {cost['wall_h']:.1f} of waiting.")
    return " ".join(parts)


def everything(name: str) -> str:
    """Return all tables of a result file; for a comparison, also every seed, trial and paired difference."""
    if name == "scans":
        return scans(10**6)
    if not name.startswith("compare_"):
        return section(name)
    summary, packed = read_summary(RESULTS / f"{name}.json"), read_archive(RESULTS / f"{name}.json")["rows"]
    parts = [comparison_of(name)]
    for model, results in summary["models"].items():
        rows = [row for row in packed if row["model"] == model]
        base = next(row for row in rows if row["kind"] == "base")
        for budget in (budget for budget in BUDGETS if results["rows"][budget]):
            parts += [f"**{model}, {BUDGETS[budget]}**\n", one_base(summary, model, [budget])]
            parts += [seeds_of(rows, base, budget), paired(summary, model, budget)]
        parts += [f"**{model}, trials**\n", trials_of(rows)]
    return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Steadiness:
    """How much the runs of one method differ, and how many of them end below their own peak, in one comparison."""

    comparison: str
    budget: str
    method: str
    spread: tuple[float, float, float]  # points of accuracy: standard deviation over seeds, and its 95 % interval
    crossings: list[float] | None  # seconds until half way, of the runs that came there; None: there is no such mark
    runs: int
    fallen: int  # runs whose last validation accuracy lies more than `FALL` below their highest one


def steadiness(name: str) -> list[Steadiness]:
    """Return the steadiness of every method of a comparison with several seeds, over all of its bases.

    The standard deviation is pooled over bases; its interval is that of normal values. A run that failed is left out.
    """
    from scipy.stats import chi2

    summary, found = read_summary(RESULTS / f"{name}.json"), []
    for budget, method in itertools.product(BUDGETS, summary["comparison"]["methods"]):
        squares, freedom, last_and_peak, times = 0.0, 0, [], []
        for model in summary["models"].values():
            row = next((row for row in model["rows"][budget] if row["name"] == method), None)
            scores = [seed["accuracy"] for seed in row["seeds"] if seed["status"] == "done"] if row else []
            if len(scores) > 1:
                squares += statistics.variance(scores) * (len(scores) - 1)
                freedom += len(scores) - 1
            for curve in model["curves"][budget].get(method, []):
                known = [accuracy for *_, accuracy in curve if accuracy is not None]
                last_and_peak += [(known[-1], max(known))] if known else []
            times += crossings(model, budget, method)
        if freedom:
            low, high = (squares / float(chi2.ppf(share, freedom)) for share in (0.975, 0.025))
            spread = tuple(100 * math.sqrt(value) for value in (squares / freedom, low, high))
            fallen = sum(peak - last > FALL + 1e-9 for last, peak in last_and_peak)
            reached = [seconds for seconds in times if math.isfinite(seconds)] if times else None
            found.append(Steadiness(name, budget, method, spread, reached, len(last_and_peak), fallen))  # type: ignore[arg-type]
    return found


def comparisons() -> list[str]:
    """Return the names of the comparisons with a section on a page, which are complete."""
    return ["compare_countdown", "compare_mini_sudoku", "compare_smollm2_chain_sum", "compare_smollm2_basic_arithmetic"]


def stability(_: str) -> str:
    """Return the table of the steadiness of every method in every comparison."""
    body = []
    for each in (each for name in comparisons() for each in steadiness(name)):
        mean, low, high = each.spread
        half = "" if each.crossings is None else "never"
        if each.crossings:
            spread = statistics.stdev(each.crossings) if len(each.crossings) > 1 else math.nan
            half = f"{statistics.fmean(each.crossings):.0f} ± {spread:.0f} ({len(each.crossings)} of {each.runs})"
        fallen = ""
        if each.runs:
            ends = [100 * end for end in interval([1.0] * each.fallen + [0.0] * (each.runs - each.fallen))]
            fallen = f"{each.fallen} of {each.runs} [{ends[0]:.0f}, {ends[1]:.0f}]"
        task = each.comparison.removeprefix("compare_").replace("_", " ")
        body.append([task, BUDGETS[each.budget], each.method, f"{mean:.1f} [{low:.1f}, {high:.1f}]", half, fallen])
    fell = f"end {100 * FALL:.0f} points below their peak"
    return table(body, ["comparison", "", "method", "spread, points", "half way, s", fell])


TASKS_OF_PROBE = {
    "countdown": "Countdown",
    "liked_length": "liked length",
    "mini_sudoku": "4x4 Sudoku",
    "brief": "brief answers",
}
IN_CHARACTERS = ("brief",)  # tasks of the probe whose reward is in characters; the others' rewards go from 0 to 1


def predictions(name: str) -> list[dict[str, Any]]:
    """Return the rows of runs, each with ``gain``, ``predicted``, and the ``probe`` of its model and sigma.

    The prediction is for the run's N, B, steps and learning rate, and goes up to the highest reward that was seen.
    """
    rows = read(name)["rows"]
    probes = {(row["case"], row["model"], row["sigma"]): row for row in rows if row["kind"] == "probe"}
    found = []
    for run in (row for row in rows if row["kind"] == "run"):
        probe = probes[run["case"], run["model"], run["sigma"]]
        values = probe["outlook"]
        parts: dict[str, Any] = {part: Parts(**values[part]) for part in ("odd", "even")}
        outlook = Outlook(**{**values, **parts, "agreement": Agreement(**values["agreement"])})
        gain = outlook.net(run["sigma"], probe["members"], PROBED_PROMPTS, PROBED_STEPS)
        predicted = min(gain, probe["highest"] - probe["theta"])
        found.append({**run, "probe": probe, "predicted": predicted, "gain": run["after"] - run["before"]})
    return found


def signed(value: float) -> str:
    """Return a number with its sign and two digits; 0.00 has no sign."""
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"


def rank_correlation(found: Sequence[dict[str, Any]]) -> float:
    """Return Spearman's rank correlation of predicted and measured gains."""
    from scipy import stats

    alike = [row for row in found if row["case"] not in IN_CHARACTERS]
    return float(stats.spearmanr([row["predicted"] for row in alike], [row["gain"] for row in alike]).statistic)


def probed(name: str) -> str:
    """Return a table of a probe's verdicts and of what the runs then did, one line for a task and model."""
    found = predictions(name)
    lines = []
    for case, model in dict.fromkeys((row["case"], row["model"]) for row in found):
        runs = [row for row in found if (row["case"], row["model"]) == (case, model)]
        best = min(runs, key=lambda row: row["probe"]["outlook"]["p_value"])
        values = best["probe"]["outlook"]
        agreement = values["agreement"]
        gains = ", ".join(signed(row["gain"]) for row in runs)
        lines.append([
            TASKS_OF_PROBE[case], model, best["probe"]["verdict"], f"{best['sigma']:g}",
            f"{max(0, agreement['correlation']):.2f} [{agreement['low']:.2f}, {agreement['high']:.2f}]",
            f"{values['p_value']:.2g}", signed(best["predicted"]), signed(best["gain"]), gains,
        ])  # fmt: skip
    head = ["task", "base", "verdict", "sigma", "correlation", "p", "predicted", "measured", "measured, each sigma"]
    sigmas = ", ".join(f"{sigma:g}" for sigma in sorted({row["sigma"] for row in found}))
    alike = [row for row in found if row["case"] not in IN_CHARACTERS]
    sure = [row["gain"] for row in alike if row["probe"]["outlook"]["p_value"] <= LEVEL]
    rest = [row["gain"] for row in alike if row["probe"]["outlook"]["p_value"] > LEVEL]
    told = (
        f"{len(found)} runs of {PROBED_STEPS} steps, at sigma {sigmas}. In the {len(sure)} settings where the probe "
        f"found agreement, theta gained {min(sure):.2f} to {max(sure):.2f}; in the {len(rest)} others "
        f"{min(rest):.2f} to {max(rest):.2f}. Spearman's rank correlation of predicted and measured gain: "
        f"{rank_correlation(found):.2f}."
    )
    if len(alike) < len(found):
        told += " These figures leave out brief answers, whose reward is in characters."
    return f"{table(lines, head)}\n{told}\n"


# name -> function, for sections that are neither scans nor comparisons
SECTIONS: dict[str, Callable[[str], str]] = {"paths": paths, "conciseness": conciseness, "probe": probed,
                                             "stability": stability}  # fmt: skip


def section(name: str) -> str:
    """Return the generated section ``name`` of a page."""
    if name == "scans":
        return scans()
    return SECTIONS.get(name, comparison_of)(name)


def phrases() -> list[str]:
    """Return the phrases that the hand-written text of `docs/evidence.md` must contain; their figures are results."""
    coverage = read("interval_coverage")["few"]
    two_kinds = [case["coverage"] for case in coverage["groups"] if case["seeds"] == 3]
    far_apart = [case["two_level"] for case in coverage["rare"] if case["case"][1] == 1 and case["problems"] > 24]
    left = read("conciseness")["targets"]["share_left"]["value"]
    return [
        f"three seeds: {min(two_kinds):.0f} to {max(two_kinds):.0f} %",
        f"seeds far apart ({min(far_apart):.0f} to {max(far_apart):.0f} %)",
        f"less than {'a third' if left < 1 / 3 else 'half' if left < 1 / 2 else 'all'} of the characters too many",
    ]
