"""Write the tables of `docs/evidence.md` from what comparisons wrote, and copy their curves beside it.

    python scripts/evidence.py            # after a comparison
    python scripts/evidence.py --check    # exit status 1 where the page says something else than the results

A table stands between `<!-- compare_NAME -->` and `<!-- end -->`; it is made from
`benchmarks/results/compare_NAME/summary.json`, whose curves become `docs/images/compare_NAME.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS, IMAGES = ROOT / "docs" / "evidence.md", ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
PLACE = re.compile(r"(<!-- (compare_\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
BUDGETS = {"evaluations": "equal evaluations", "time": "equal time"}
HEAD = ["method", "pass@1, %", "gain, points", "seeds, %", "pass@16, %", "KL", "kept, %", "evaluations", "seconds"]


def share(estimate: dict[str, Any], name: str = "mean", sign: str = "") -> str:
    """Return an estimate and its interval in per cent."""
    mean, low, high = (100 * estimate[key] for key in (name, "low", "high"))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def kept(values: dict[str, float]) -> str:
    """Return the accuracies on other tasks, or under other prompts, in per cent."""
    return ", ".join(f"{100 * value:.1f}" for value in values.values())


def line(row: dict[str, Any], established: dict[str, bool]) -> list[str]:
    """Return one method's cells."""
    notes = []
    if established.get(row["name"]) is False:
        notes.append("not established: no claim")
    if row["failed"]:
        notes.append(f"{row['failed']} of {len(row['seeds'])} failed")
    if row["hacked"]:
        notes.append(f"{row['hacked']} hacked")
    name = row["name"] + (f" ({'; '.join(notes)})" if notes else "")
    if "accuracy" not in row:
        return [name] + [""] * (len(HEAD) - 1)
    seeds = sorted(100 * seed["accuracy"] for seed in row["seeds"] if "accuracy" in seed)
    last = row["pass_at_k"][max(row["pass_at_k"], key=int)]
    return [
        name, share(row["accuracy"]), share(row["gain"], "difference", "+"), f"{seeds[0]:.1f} to {seeds[-1]:.1f}",
        share(last), f"{row['kl']:.2f}", kept(row["retention"]), f"{row['evaluations']:,.0f}",
        f"{row['train_time_s']:.0f}",
    ]  # fmt: skip


def fixed(row: dict[str, Any]) -> list[str]:
    """Return the cells of a model that nothing trained."""
    samples = row.get("pass_at_k", {})
    name = row["name"].replace("<", "&lt;")
    return [name, share(row["accuracy"]), "", "", share(samples[max(samples, key=int)]) if samples else "", "",
            kept(row["retention"]), "", ""]  # fmt: skip


def table(rows: list[list[str]], head: list[str]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def tests(found: list[dict[str, Any]]) -> str:
    """Return the paired differences, one line each."""
    rows = [
        [f"{test['es']} - {test['other']}", share(test, "difference", "+"), f"{test['p_holm']:.2g}"] for test in found
    ]
    return table(rows, ["difference, points", "mean [95 %]", "p (Holm)"]) if rows else ""


def half_way(summary: dict[str, Any], method: str) -> str:
    """Return the seconds of training, median over bases and seeds, to half of what the forced skill is worth.

    Of the evaluations while runs went on, on validation rows; empty where no skill was forced.
    """
    found = []
    for its in summary["models"].values():
        if "prefix" not in its:
            return ""
        wanted = (its["base"]["accuracy"]["mean"] + its["prefix"]["accuracy"]["mean"]) / 2
        for curve in its["curves"].get(method, []):
            found.append(next((seconds for _, seconds, accuracy in curve if (accuracy or 0) >= wanted), math.inf))
    median = statistics.median(found) if found else math.inf
    return f"{median:.0f}" if math.isfinite(median) else "never"


def overview(summary: dict[str, Any], budget: str) -> str:
    """Return pass@1 of every method on every base, and what the runs used on average over the bases."""
    models, methods = summary["models"], list(summary["comparison"]["methods"])
    found = {
        method: {
            model: row
            for model, its in models.items()
            for row in its["rows"][budget]
            if row["name"] == method and "accuracy" in row
        }
        for method in methods
    }
    body = []
    for label in ("base", "prefix"):
        fixed_rows = [its.get(label) for its in models.values()]
        if all(fixed_rows):
            name = fixed_rows[0]["name"].replace("<", "&lt;")
            body.append([name, *(share(row["accuracy"]) for row in fixed_rows), "", "", ""])
    for method, rows in found.items():
        if rows:
            used = [sum(row[name] for row in rows.values()) / len(rows) for name in ("evaluations", "train_time_s")]
            name = method + ("" if summary["established"].get(method, True) else " (not established: no claim)")
            cells = [share(rows[model]["accuracy"]) if model in rows else "" for model in models]
            body.append([name, *cells, f"{used[0]:,.0f}", f"{used[1]:.0f}", half_way(summary, method)])
    return table(body, ["pass@1, %", *models, "evaluations", "seconds", "half way, s"])


def differences(summary: dict[str, Any], budget: str) -> str:
    """Return in a sentence how many paired differences of evolution strategies to others are more than chance."""
    found = [test for its in summary["models"].values() for test in its["tests"][budget]]
    sure = [test for test in found if test["p_holm"] < 0.05]
    better = [test for test in sure if test["difference"] > 0]
    luckiest = sum(test["other"] == "random_search" for test in better)
    return (
        f"Of {len(found)} paired differences between evolution strategies and another method, one for each base and "
        f"kind of members, {len(better)} are in favour of evolution strategies with p < 0.05 (Holm), {luckiest} of "
        f"them against random search, and {len(sure) - len(better)} against them.\n"
        if found
        else ""
    )


def section(name: str) -> str:
    """Return everything that the page says by itself of a comparison."""
    summary = json.loads((RESULTS / name / "summary.json").read_text(encoding="utf-8"))
    comparison = summary["comparison"]
    parts = [f"![Accuracy while the runs went on](images/{name}.png)\n"]
    for budget, told in BUDGETS.items():
        if any(its["rows"][budget] for its in summary["models"].values()):
            seeds = max(len(row["seeds"]) for its in summary["models"].values() for row in its["rows"][budget])
            of = "" if seeds == len(comparison["seeds"]) else f" ({seeds} of {len(comparison['seeds'])} seeds so far)"
            parts += [f"**{told.capitalize()}**{of}\n", overview(summary, budget), differences(summary, budget)]
    parts.append('<details markdown="1"><summary>All that was measured, and every paired difference</summary>\n')
    for model, found in summary["models"].items():
        for budget, told in BUDGETS.items():
            rows = found["rows"][budget]
            if not rows:
                continue
            seeds = max(len(row["seeds"]) for row in rows)
            parts.append(f"**{model}, {told}** ({seeds} of {len(comparison['seeds'])} seeds)\n")
            body = [fixed(row) for row in (found["base"], found.get("prefix")) if row]
            parts.append(table([*body, *(line(row, summary["established"]) for row in rows)], HEAD))
            parts.append(tests(found["tests"][budget]))
    parts.append("</details>\n")
    if summary["cost"]:
        cost = summary["cost"]
        parts.append(f"Cost: {cost['cpu_h']:.1f} hours of processor time, {cost['wall_h']:.1f} of waiting.\n")
    return "\n".join(part for part in parts if part)


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
    for _, name, _ in PLACE.findall(text):
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
