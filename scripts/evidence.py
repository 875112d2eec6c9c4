"""Write the tables of `docs/evidence.md` from what comparisons measured, and copy their curves beside it.

    python scripts/evidence.py            # after a comparison
    python scripts/evidence.py --check    # exit status 1 where the page says something else than the results

A table stands between `<!-- NAME -->` and `<!-- end -->`. That of a `compare_*` is made from `benchmarks/results/NAME`,
whose curves become `docs/images/NAME.png`; those of the scans and of `paths` from `benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estune.compare.tables import summarise

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS, IMAGES = ROOT / "docs" / "evidence.md", ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
PLACE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
BUDGETS = {"evaluations": "equal evaluations", "time": "equal time"}
SHOWN = 8  # tasks of a scan
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


def overview(summary: dict[str, Any], budget: str) -> str:
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
    for method in summary["comparison"]["methods"]:
        found = [next((row for row in its["rows"][budget] if row["name"] == method), None) for its in models.values()]
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
    return table(body, ["pass@1, %", *models, "evaluations", "seconds", *["half way, s"] * halves])


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
            f"({100 * found[0]['difference']:+.1f} points, p {found[0]['p_holm']:.2g}, Holm).\n"
        )
    return (
        f"Of {len(found)} paired differences between evolution strategies and another method, one for each base and "
        f"kind of members, {len(better)} are in favour of evolution strategies{whom} and {len(sure) - len(better)} "
        "against them, with p < 0.05 (Holm, within a base).\n"
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
        name, share(row["accuracy"]), share(row["gain"], "difference", "+"), f"{seeds[0]:.1f} to {seeds[-1]:.1f}",
        *sampled(row), number(row["kl"], 2), *kept,
        *([number(100 * row["wordless"], 0)] if wordless else []),
        number(row["evaluations"], 0), number(row["train_time_s"], 0),
    ]  # fmt: skip


def fixed(row: dict[str, Any], kept: Sequence[str], wordless: bool) -> list[str]:
    """Return the cells of a model that nothing trained; ``wordless``: see `line`."""
    others = [number(100 * row["retention"][name], 1) if name in row["retention"] else "" for name in kept]
    share_without = [number(100 * row["wordless"], 0) if "wordless" in row else ""] if wordless else []
    return [labelled(row, {}), share(row["accuracy"]), "", "", *sampled(row), "", *others, *share_without, "", ""]


def sampled(row: dict[str, Any]) -> tuple[str, str]:
    """Return a sample's accuracy at temperature 1, and pass@k of the most samples."""
    found = row.get("pass_at_k", {})
    return (share(found["1"]), share(found[max(found, key=int)])) if found else ("", "")


def one_base(summary: dict[str, Any], model: str, budget: str) -> str:
    """Return everything that was measured on a base at a budget."""
    found, comparison = summary["models"][model], summary["comparison"]
    rows, kept = found["rows"][budget], list(found["base"]["retention"])
    k = max(found["base"]["pass_at_k"], key=int)
    problems = found["base"]["retention_rows"]
    wordless = round(100 * found["base"]["wordless"]) < 100  # else it is the task that has no words
    head = ["method", "pass@1, %", "gain, points", "seeds, %", "a sample, %", f"pass@{k}, %", "KL",
            *(f"kept: {name} ({problems[name]}), %" for name in kept),
            *["no word, %"] * wordless, "evaluations", "seconds"]  # fmt: skip
    body = [fixed(row, kept, wordless) for row in (found["base"], found.get("prefix"), found.get("constant")) if row]
    body += [line(row, summary["established"], len(head), wordless) for row in rows]
    tests = [
        [f"{test['es']} - {test['other']}", share(test, "difference", "+"), f"{test['p_holm']:.2g}"]
        for test in found["tests"][budget]
    ]
    title = f"**{model}, {BUDGETS[budget]}**{seeds_told(rows, len(comparison['seeds']))}\n"
    shown = table(tests, ["difference, points", "mean [95 %]", "p (Holm)"]) if tests else ""
    return "\n".join(part for part in (title, table(body, head), shown) if part)


# --- the page ---------------------------------------------------------------------------------------------------------


def scan(name: str) -> str:
    """Return the tasks that a scan ranked first, those that were sampled among them."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    body = []
    for place, task in enumerate(found["ranked"]):
        its = found["tasks"][task]
        if place >= SHOWN and "right_samples" not in its:
            continue
        label = f"**{task}**" if task in found["chosen"] else task
        right = f"{its['right_samples']} of {its['samples']}" if "right_samples" in its else "not sampled"
        shares = ("accuracy", "holds_answer", "constant", "answer_in_prompt")
        percent = [number(100 * its[name], 0) for name in shares]
        body.append([label, str(its["n"]), *percent, right, number(its["length"], 0)])
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
    bold = "those in bold were chosen" if found["chosen"] else "none was chosen"
    more = ""
    if "leading" in found:
        more = f", all of them for those of the first {found['leading']} that hold more than a constant"
    told = f"{len(found['ranked'])} tasks, the first {found['rows']} validation problems or fewer{more}; {bold}.\n"
    return f"{told}\n{table(body, head)}"


def repeated(name: str) -> str:
    """Return what is left of a comparison's accuracies without the problems that were asked before."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    body = [
        [method, share(its["all"]), share(its["left"]), f"{its['right_on_trained']} of {its['right']}"]
        for method, its in found["methods"].items()
    ]
    told = (
        f"Of {found['test']:,} test problems {found['trained_on']} were trained on in other brackets, "
        f"{found['chosen_by']} chosen by, {found['asked_before']} asked twice; {found['left']} are left.\n"
    )
    head = ["pass@1, %", "of all", "of those that are left", "right on what was trained on, of all that was right"]
    return f"{told}\n{table(body, head)}"


def paths(name: str) -> str:
    """Return what a few steps of each of the harder tasks gave."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    body = []
    for task, its in found["tasks"].items():
        rewards = ", ".join(number(step["reward"], 3) for step in its["steps"])
        short = " to ".join(number(step["shorter"], 2) for step in (its["steps"][0], its["steps"][-1]))
        moved = ", ".join(number(step["es/update_norm"], 2) for step in its["steps"])
        cut = statistics.mean(step["completions/clipped_ratio"] for step in its["steps"])
        body.append([f"`{task}`", rewards, short, moved, number(100 * cut, 0), its["replay"]])
    head = ["task", "the task's reward, each step", "that for brevity", "update, L2", "cut off, %", "replay"]
    return table(body, head)


def comparison_of(name: str) -> str:
    """Return everything that the page says by itself of a comparison."""
    summary = summarise(RESULTS / name)
    models, wanted = summary["models"], len(summary["comparison"]["seeds"])
    parts = [f"![Accuracy while the runs went on](images/{name}.png)\n"]
    budgets = [budget for budget in BUDGETS if any(its["rows"][budget] for its in models.values())]
    for budget in budgets:
        rows = [row for its in models.values() for row in its["rows"][budget]]
        title = f"**{BUDGETS[budget].capitalize()}**{seeds_told(rows, wanted)}\n"
        parts += [title, overview(summary, budget), differences(summary, budget)]
    parts.append('<details markdown="1"><summary>All that was measured, and every paired difference</summary>\n')
    parts += [one_base(summary, model, budget) for model, its in models.items() for budget in budgets
              if its["rows"][budget]]  # fmt: skip
    parts.append("</details>\n")
    found = summary["environment"]
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "trl")
                         if name in found.get("versions", {}))  # fmt: skip
    machine = ", ".join([found["processor"], f"{found['cores']} cores", *found.get("gpus", [])])
    parts.append(f"Machine: {machine}{'; ' if versions else ''}{versions}.")
    for what, values in summary["mixed"].items():
        parts.append(f"Results of more than one {what} are mixed here: {'; '.join(values)}.")
    if cost := summary["cost"]:
        parts.append(f"Cost: {cost['cpu_h']:.1f} hours of processor time, {cost['wall_h']:.1f} of waiting.")
    return "\n".join(part for part in parts if part) + "\n"


def section(name: str) -> str:
    """Return what stands in a place of the page."""
    own = {"scan_reasoning": scan, "scan_reasoning_easy": scan, "paths": paths, "repeated_problems": repeated}
    return own.get(name, comparison_of)(name)


def page(text: str) -> str:
    """Return the page with its tables made anew."""
    return PLACE.sub(lambda place: f"{place[1]}\n{section(place[2])}\n{place[3]}", text)


def main() -> int:
    """Write the page and the pictures, or say what is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    wrong = [] if made == text else [PAGE]
    for name in (name for _, name, _ in PLACE.findall(text) if name.startswith("compare_")):
        picture, copy = RESULTS / name / "curves.png", IMAGES / f"{name}.png"
        if not copy.exists() or picture.read_bytes() != copy.read_bytes():
            wrong.append(copy)
            if not options.check:
                copy.write_bytes(picture.read_bytes())
    if options.check:
        for path in wrong:
            print(f"{path.relative_to(ROOT)} is not what the results say: python scripts/evidence.py", file=sys.stderr)
        return int(bool(wrong))
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
