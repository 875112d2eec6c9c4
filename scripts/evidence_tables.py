"""Tables and sentences in Markdown, from the files in `benchmarks/results`; `evidence.py` puts them into pages."""

from __future__ import annotations

import collections
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from estune.compare.archive import Row, read_archive, summary_of

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
BUDGETS = {"evaluations": "equal evaluations", "time": "equal time"}
SHOWN = 3  # tasks of a scan
SCANS = {"scan_reasoning": "tasks at their default level", "scan_reasoning_easy": "tasks at their lowest level"}
REPEATED = {"compare_smollm2_basic_arithmetic": "repeated_problems"}  # what was counted again, of a comparison
FEWEST_SEEDS = 3  # from which differences are counted


def share(estimate: dict[str, Any], name: str = "mean", sign: str = "") -> str:
    """Return an estimate and its interval in per cent."""
    mean, low, high = (100 * estimate[key] for key in (name, "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def number(value: float | None, digits: int) -> str:
    """Return a number, nothing where there is none."""
    return "" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def table(rows: list[list[str]], head: list[str]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def labelled(row: dict[str, Any], established: dict[str, bool]) -> str:
    """Return a method's name, and what has to be said with it."""
    notes = []
    if established.get(row["name"]) is False:
        notes.append("not established: no claim")
    if row.get("failed"):
        notes.append(f"{row['failed']} of {len(row['seeds'])} failed")
    if row.get("unmeasured"):
        notes.append(f"{row['unmeasured']} of {len(row['seeds'])} not measured")
    if row.get("hacked"):
        notes.append(f"{row['hacked']} hacked")
    if row.get("beside_constant"):
        notes.append("not above a constant")
    name = " ".join(str(row["name"]).split()).replace("<", "&lt;").replace("|", "&#124;")
    return f"{name} ({'; '.join(notes)})" if notes else name


def seeds_told(rows: Sequence[dict[str, Any]], wanted: int) -> str:
    """Return how many seeds these rows have, where it is not all of them."""
    counts = [len(row["seeds"]) for row in rows]
    few, many = min(counts), max(counts)
    if few == wanted:
        return ""
    alone = "; an interval of one seed is over problems alone" if few == 1 else ""
    return f" ({few if few == many else f'{few} to {many}'} of {wanted} seeds so far{alone})"


# --- all bases --------------------------------------------------------------------------------------------------------


def half_way(summary: dict[str, Any], budget: str, method: str) -> str:
    """Return the seconds of training, median over bases and seeds, to half of what the forced skill is worth.

    Read off the evaluations on validation rows while runs went on, straight lines between them; a run that never got
    there, or failed before it was evaluated, counts as never.
    """
    found = []
    for its in summary["models"].values():
        wanted = (its["base"]["accuracy"]["mean"] + its["prefix"]["accuracy"]["mean"]) / 2
        for curve in its["curves"][budget].get(method, []):
            points = [(seconds, accuracy) for _, seconds, accuracy in curve if accuracy is not None]
            crossings = (
                t + (u - t) * (wanted - a) / (b - a) for (t, a), (u, b) in itertools.pairwise(points) if a < wanted <= b
            )
            found.append(next(crossings, math.inf))
    median = statistics.median(found) if found else math.nan
    return "never" if median == math.inf else number(median, 0)


def overview(summary: dict[str, Any], budgets: Sequence[str]) -> str:
    """Return pass@1 of every method on every base, and what runs used on average; nothing where a base lacks them."""
    models = summary["models"]
    # Where no skill was forced, or forcing it brings nothing, there is no half way.
    halves = all(
        "prefix" in its and its["prefix"]["accuracy"]["mean"] > its["base"]["accuracy"]["mean"]
        for its in models.values()
    )
    body = []
    for label in ("base", "prefix", "constant"):
        rows = [its.get(label) for its in models.values()]
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
        found = [next((row for row in its["rows"][budget] if row["name"] == method), None) for its in models]
        known = [row for row in found if row is not None]
        if not known:
            continue
        cells = [share(row["accuracy"]) if row and "accuracy" in row else "" for row in found]
        used = ["", ""]
        if all(cells):
            used = [number(statistics.mean(row[name] for row in known), 0) for name in ("evaluations", "train_time_s")]
        beside = all(row.get("beside_constant") for row in known)
        notes = labelled({"name": method, "beside_constant": beside}, summary["established"])
        body.append([notes, *cells, *used, *([half_way(summary, budget, method)] if halves else [])])
    return body


def differences(summary: dict[str, Any], budget: str) -> str:
    """Return in a sentence how many paired differences of evolution strategies to others are more than chance."""
    found = [test for its in summary["models"].values() for test in its["tests"][budget]]
    rows = [row for its in summary["models"].values() for row in its["rows"][budget]]
    if not found or min(len(row["seeds"]) for row in rows) < FEWEST_SEEDS:
        return ""
    sure = [test for test in found if test["p_holm"] < 0.05]
    better = [test for test in sure if test["difference"] > 0]
    over = collections.Counter(test["other"] for test in better).most_common()
    whom = f" ({', '.join(f'{count} over {name}' for name, count in over)})" if over else ""
    if len(found) == 1:
        told = "more than chance" if sure else "within chance"
        return (
            f"The one paired difference, of {found[0]['es']} and {found[0]['other']}, is {told} "
            f"({100 * found[0]['difference']:+.1f} points, p {found[0]['p_holm']:.2g}, Holm)."
        )
    return (
        f"Of {len(found)} paired differences between evolution strategies and another method, one for each base and "
        f"kind of members, {len(better)} are in favour of evolution strategies{whom} and {len(sure) - len(better)} "
        "against them, with p < 0.05 (Holm, within a base)."
    )


# --- one base ---------------------------------------------------------------------------------------------------------


def line(row: dict[str, Any], established: dict[str, bool], columns: int, wordless: bool) -> list[str]:
    """Return one method's cells, with ``wordless`` the share of completions without a word among them."""
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
    """Return the cells of a model that nothing trained; ``wordless``: see `line`."""
    others = [number(100 * row["retention"][name], 1) if name in row["retention"] else "" for name in kept]
    share_without = [number(100 * row["wordless"], 0) if "wordless" in row else ""] if wordless else []
    return [labelled(row, {}), share(row["accuracy"]), "", "", *sampled(row), "", *others, *share_without, "", ""]


def sampled(row: dict[str, Any]) -> tuple[str, str]:
    """Return a sample's accuracy at temperature 1, and pass@k of the most samples."""
    found = row.get("pass_at_k", {})
    return (share(found["1"]), share(found[max(found, key=int)])) if found else ("", "")


def one_base(summary: dict[str, Any], model: str, budgets: Sequence[str]) -> str:
    """Return the table of everything that was measured on a base."""
    found = summary["models"][model]
    kept, k = list(found["base"]["retention"]), max(found["base"]["pass_at_k"], key=int)
    problems = found["base"]["retention_rows"]
    wordless = round(100 * found["base"]["wordless"]) < 100  # else it is the task that has no words
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
    body = [fixed(row, kept, wordless) for row in (found["base"], found.get("prefix"), found.get("constant")) if row]
    for budget in budgets:
        body += [[f"**{BUDGETS[budget]}**", *[""] * (len(head) - 1)]] if len(budgets) > 1 else []
        body += [line(row, summary["established"], len(head), wordless) for row in found["rows"][budget]]
    return table(body, head)


def paired(summary: dict[str, Any], model: str, budget: str) -> str:
    """Return every paired difference on a base at a budget; nothing where there is none."""
    tests = [
        [f"{test['es']} - {test['other']}", share(test, "difference", "+"), f"{test['p_holm']:.2g}"]
        for test in summary["models"][model]["tests"][budget]
    ]
    return table(tests, ["difference, points", "mean [95 %]", "p (Holm)"]) if tests else ""


def seeds_of(rows: Sequence[Row], base: Row, budget: str) -> str:
    """Return what each seed's run gave at a budget; discovered are problems that the base never solves."""
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
                number(row["kl"], 2),
                number(row["changes"].get("walk_ratio"), 3),
                str(greedily),
                str(sum(count > 0 for count in row["discovery"])),
                ", ".join(number(100 * kept["accuracy"], 1) for kept in row["retention"].values()),
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
    """Return what each trial gave on validation problems."""
    body = []
    for row in (row for row in rows if row["kind"] == "trial"):
        told = ", ".join(f"{name} {value}" for name, value in row["trial"].items()) or "defaults"
        used = [f"{row.get('evaluations', 0):,}", number(row.get("train_time_s"), 0)]
        right = number(100 * row["accuracy"], 1) if "accuracy" in row else row.get("error", row["status"])
        reward = number(row.get("reward"), 3)
        body.append([row["method"], BUDGETS[row["budget"]], told, *used, reward, right])
    return table(body, ["method", "tuned for", "trial", "evaluations", "seconds", "reward", "validation, %"])


# --- the page ---------------------------------------------------------------------------------------------------------


def read(name: str) -> Any:
    """Return a result that a script of `benchmarks` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def scans(shown: int = SHOWN) -> str:
    """Return the tasks that each scan ranked first, those that were sampled among them; the chosen ones are in bold."""
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
    for name, label in SCANS.items():
        found = read(name)
        told = f"{len(found['ranked'])} {label}, {len(found['chosen']) or 'none'} chosen"
        body.append([f"**{told}**", *[""] * (len(head) - 1)])
        for place, task in enumerate(found["ranked"]):
            its = found["tasks"][task]
            if place >= shown and "right_samples" not in its:
                continue
            right = f"{its['right_samples']} of {its['samples']}" if "right_samples" in its else "not sampled"
            shares = ("accuracy", "holds_answer", "constant", "answer_in_prompt")
            percent = [number(100 * its[name], 0) for name in shares]
            bold = "**" * (task in found["chosen"])
            body.append([f"{bold}{task}{bold}", str(its["n"]), *percent, right, number(its["length"], 0)])
    return table(body, head)


def repeated(name: str) -> str:
    """Return in two sentences what is left of a comparison's accuracies without the problems that were asked before."""
    found = read(name)
    left = ", ".join(f"{method} {share(its['left'])}" for method, its in found["methods"].items())
    return (
        f"Of {found['test']:,} test problems {found['trained_on']} were trained on with other brackets, "
        f"{found['chosen_by']} chosen by, {found['asked_before']} asked twice (`python benchmarks/{name}.py`). "
        f"Of the {found['left']} that are left these per cent are right: {left}."
    )


def paths(name: str) -> str:
    """Return what a few steps of each of the harder tasks gave."""
    body = []
    for task, its in read(name)["tasks"].items():
        rewards = ", ".join(number(step["reward"], 3) for step in its["steps"])
        short = " to ".join(number(step["shorter"], 2) for step in (its["steps"][0], its["steps"][-1]))
        moved = ", ".join(number(step["es/update_norm"], 2) for step in its["steps"])
        cut = statistics.mean(step["completions/clipped_ratio"] for step in its["steps"])
        replayed = re.sub(r"^estune: |, in \S+$", "", its["replay"])
        body.append([f"`{task}`", rewards, short, moved, number(100 * cut, 0), replayed])
    head = ["task", "the task's reward, each step", "that for brevity", "update, L2", "cut off, %", "replay"]
    return table(body, head)


def conciseness(name: str) -> str:
    """Return how far a brief model is from the shortest right answer, and what it still knows."""
    found = read(name)
    base = found["base"]
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
    for run in found["runs"]:
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
def summary(file: Path) -> dict[str, Any]:
    """Return everything that a packed comparison says."""
    return summary_of(file)


def comparison_of(name: str) -> str:
    """Return what the page says by itself of a comparison: one table, and in a few sentences how sure it is."""
    found = summary(RESULTS / f"{name}.json")
    models, wanted = found["models"], len(found["comparison"]["seeds"])
    budgets = [budget for budget in BUDGETS if any(its["rows"][budget] for its in models.values())]
    told = []
    for budget in budgets:
        few = seeds_told([row for its in models.values() for row in its["rows"][budget]], wanted)
        how = differences(found, budget)
        told += [f"{BUDGETS[budget].capitalize()}{few}: {how[0].lower()}{how[1:]}"] if how else []
        told += [f"{BUDGETS[budget].capitalize()}{few}."] if few and not how else []
    told += [repeated(REPEATED[name])] if name in REPEATED else []
    shown = overview(found, budgets) if len(models) > 1 else one_base(found, next(iter(models)), budgets)
    return f"{shown}\n{' '.join([*told, machine(found)])}\n"


def machine(found: dict[str, Any]) -> str:
    """Return where a comparison ran, by which versions, and what it cost."""
    environment = found["environment"]
    versions = ", ".join(
        f"{name} {environment['versions'][name]}"
        for name in ("torch", "transformers", "trl")
        if name in environment.get("versions", {})
    )
    kept = ", ".join([environment["processor"], f"{environment['cores']} cores", *environment.get("gpus", [])])
    parts = [f"Machine: {kept}{'; ' if versions else ''}{versions}."]
    for what, values in found["mixed"].items():
        parts.append(f"Results of more than one {what} are mixed here: {'; '.join(values)}.")
    if cost := found["cost"]:
        parts.append(f"Cost: {cost['cpu_h']:.1f} hours of processor time, {cost['wall_h']:.1f} of waiting.")
    return " ".join(parts)


def everything(name: str) -> str:
    """Return everything that a file says: of a comparison every table and every paired difference."""
    if name == "scans":
        return scans(10**6)
    if not name.startswith("compare_"):
        return section(name)
    found, packed = summary(RESULTS / f"{name}.json"), read_archive(RESULTS / f"{name}.json")["rows"]
    parts = [comparison_of(name)]
    for model, its in found["models"].items():
        rows = [row for row in packed if row["model"] == model]
        base = next(row for row in rows if row["kind"] == "base")
        for budget in (budget for budget in BUDGETS if its["rows"][budget]):
            parts += [f"**{model}, {BUDGETS[budget]}**\n", one_base(found, model, [budget])]
            parts += [seeds_of(rows, base, budget), paired(found, model, budget)]
        parts += [f"**{model}, trials**\n", trials_of(rows)]
    return "\n".join(part for part in parts if part)


OWN: dict[str, Callable[[str], str]] = {"paths": paths, "conciseness": conciseness}


def section(name: str) -> str:
    """Return what stands in a place of a page."""
    if name == "scans":
        return scans()
    return OWN.get(name, comparison_of)(name)


def phrases() -> list[str]:
    """Return what running text of the page of evidence must hold, made from results."""
    coverage = read("interval_coverage_few")
    two_kinds = [case["coverage"] for case in coverage["groups"] if case["seeds"] == 3]
    far_apart = [case["two_level"] for case in coverage["rare"] if case["case"][1] == 1 and case["problems"] > 24]
    kept = read("conciseness")["targets"]["share_left"]["value"]
    return [
        f"three seeds: {min(two_kinds):.0f} to {max(two_kinds):.0f} %",
        f"seeds far apart ({min(far_apart):.0f} to {max(far_apart):.0f} %)",
        f"less than {'a third' if kept < 1 / 3 else 'half' if kept < 1 / 2 else 'all'} of the characters too many",
    ]
