"""The report of a comparison: `report.html`, one page that needs nothing else, `summary.json`, and `curves.png`."""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.figure import Figure

from estune.compare.plan import BUDGETS, CHOSEN, LIMITS
from estune.compare.tables import summarise
from estune.files import replace_file

COLOURS = ("#1f5fa8", "#c2571a", "#2f8f5b", "#8a4fa3", "#b8860b", "#4c6a78", "#b03060", "#5f7a1f", "#777777", "#20a0a0")
AXES = {"evaluations": (0, "completions scored in training"), "time": (1, "seconds of training")}
BUDGET_NAMES = {"evaluations": "Equal evaluations", "time": "Equal time"}
STYLE = """
:root { --ground: #fbfaf7; --ink: #1d2330; --quiet: #667085; --line: #dedbd3; --accent: #1f5fa8; --bad: #a33b1f;
  color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1720px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 6px; } h2 { font-size: 20px; margin: 34px 0 6px; }
h3 { font-size: 16px; margin: 22px 0 4px; }
p.note, li.note { color: var(--quiet); font-size: 13.5px; margin: 2px 0 10px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; margin: 6px 0 10px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 4px 10px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; vertical-align: bottom; }
td.seeds { font-size: 12.5px; white-space: normal; min-width: 190px; text-align: left; }
td small { color: var(--quiet); } .bad { color: var(--bad); } a { color: var(--accent); }
a.run { text-decoration: none; margin: 0 3px 0 1px; font-size: 11px; }
small.bad + small.bad::before { content: "· "; }
figure { margin: 8px 0; } figure svg { max-width: 100%; height: auto; }
details { margin: 6px 0; } summary { cursor: pointer; }
code { font-size: 12.5px; }
"""


def write_report(directory: Path) -> Path:
    """Write a comparison's page, its numbers and its curves; return the page's path.

    Raises:
        UserError: there is nothing to report yet.
    """
    summary = summarise(directory)
    kept = json.dumps(_finite(_without_marks(summary)), indent=1, ensure_ascii=False).encode("utf-8")
    replace_file(directory / "summary.json", lambda file: file.write(kept))
    figure = curves(summary)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    replace_file(directory / "curves.png", lambda file: file.write(image.getvalue()))
    page = render(summary, _svg(figure, "curves")).encode("utf-8")
    replace_file(directory / "report.html", lambda file: file.write(page))
    return directory / "report.html"


def render(summary: dict[str, Any], figure: str) -> str:
    """Return the page."""
    comparison, environment = summary["comparison"], summary["environment"]
    parts = [
        f"<h1>{_text(comparison['task'])}: methods compared</h1>",
        f"<p class=note>{_count('model', comparison['models'])}, {_count('seed', comparison['seeds'])}, "
        f"{_told_budget(comparison['budget'])}. "
        f"Held-out pass@1 is greedy, on {_rows_of(summary):,} test problems. Machine: {_text(_machine(environment))}."
        f"{_told_cost(summary['cost'])}</p>",
    ]
    for what, found in summary["mixed"].items():
        parts.append(f'<p class="bad">Results of more than one {what} are mixed here: {_text("; ".join(found))}.</p>')
    if comparison.get("notes"):
        parts.append(f"<p>{_text(comparison['notes'])}</p>")
    parts += [
        "<p class=note>Intervals are 95 %, over problems and seeds. Tuning used the validation split alone. A "
        "baseline counts as established only if it gains "
        f"{comparison['established_points']:g} points or more on at least one base, and is above the best constant "
        "answer there; of one that does not, nothing is claimed. A run that failed counts as "
        "the base that it left; one whose model could not be measured counts as nothing. Every figure of a seed links "
        "to the result that holds it, the arrow behind it to its run; rows are of those seeds.</p>",
        f"<figure>{figure}</figure>",
        "<p class=note>Accuracy on validation problems while runs went on to each budget: mean over seeds, band from "
        "the lowest to the highest seed; a cross where a run ended long before the others. Dotted: the base on the "
        "test problems.</p>",
    ]
    for name, model in summary["models"].items():
        parts.append(f"<h2>{_text(name)}</h2>")
        samples = _text(comparison["measuring"]["discovery_samples"])
        parts.append(
            f"<p class=note><code>{_text(model['path'])}</code>, fingerprint "
            f"<code>{_text(model['fingerprint'])}</code>; {model['never_solved']} of {model['sought']} test "
            f"problems the base solves neither greedily nor in {samples} samples.</p>"
        )
        for budget in BUDGETS:
            if model["rows"][budget]:
                parts.append(f"<h3>{BUDGET_NAMES[budget]}</h3>")
                parts.append(_main_table(model, budget, summary["established"]))
                parts.append(_more_table(model, budget, _labels(comparison, model["base"]["retention_rows"])))
                parts.append(_tests_table(model["tests"][budget]))
        parts.append(_tuning_table(model["tuning"]))
    parts.append(_changes_part(summary))
    body = "\n".join(parts)
    title = f"estune: {_text(comparison['task'])} compared"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n'
    )


def _count(name: str, listed: Sized) -> str:
    return f"{len(listed)} {name}{'' if len(listed) == 1 else 's'}"


def _told_budget(budget: dict[str, Any]) -> str:
    parts = [
        f"{budget['evaluations']:,} scored completions" if budget["evaluations"] else "",
        f"{budget['time_s']:g} s of training" if budget["time_s"] else "",
    ]
    told = " and ".join(filter(None, parts))
    return f"{'budgets' if all(parts) else 'budget'} {told}"


def _told_cost(cost: dict[str, float] | None) -> str:
    if cost is None:
        return ""
    return f" Cost: {cost['cpu_h']:.2f} hours of processor time, {cost['wall_h']:.2f} of waiting."


# --- tables -----------------------------------------------------------------------------------------------------------


def _main_table(model: dict[str, Any], budget: str, established: dict[str, bool]) -> str:
    most = max(model["base"]["pass_at_k"], key=int)
    head = [
        "method",
        "pass@1, %",
        "gain, points",
        "seeds",
        "spread (sd)",
        f"pass@{most}, %",
        "KL to base",
        "length",
        "evaluations",
        "seconds",
    ]
    body = []
    for fixed in filter(None, (model["base"], model.get("prefix"), model.get("constant"))):
        last = fixed.get("pass_at_k", {})
        body.append(
            [
                f'<a href="{_text(fixed["file"])}">{_text(fixed["name"])}</a>',
                _interval(fixed["accuracy"]),
                "",
                "",
                "",
                _interval(last[max(last, key=int)]) if last else "",
                "",
                _number(fixed["length"], 1),
                "",
                "",
            ]
        )
    for row in model["rows"][budget]:
        name = _text(row["name"])
        if established.get(row["name"]) is False:
            name += ' <small class="bad">not established: no claim</small>'
        if row["failed"]:
            name += f' <small class="bad">{row["failed"]} of {len(row["seeds"])} failed</small>'
        if row["unmeasured"]:
            name += f' <small class="bad">{row["unmeasured"]} of {len(row["seeds"])} could not be measured</small>'
        if row["hacked"]:
            name += f' <small class="bad">{row["hacked"]} hacked</small>'
        if row.get("beside_constant"):
            name += ' <small class="bad">not above a constant answer</small>'
        seeds = " ".join(_seed_link(seed) for seed in row["seeds"])
        if "accuracy" not in row:
            body.append([name, "", "", f"<td class=seeds>{seeds}</td>", *[""] * 6])
            continue
        last = row["pass_at_k"]
        spread = row["spread"]["standard_deviation"]
        body.append(
            [
                name,
                _interval(row["accuracy"]),
                _interval(row["gain"], "difference", signed=True),
                f"<td class=seeds>{seeds}</td>",
                "" if spread is None else _number(100 * spread, 1),
                _interval(last[max(last, key=int)]),
                _number(row["kl"], 3),
                _number(row["length"], 1),
                f"{row['evaluations']:,.0f}",
                _number(row["train_time_s"], 0),
            ]
        )
    return _table(head, body)


def _labels(comparison: dict[str, Any], rows: dict[str, int]) -> dict[str, str]:
    """Return what the retained tasks are called, with their problems: the trained one, asked otherwise, is no other."""
    variants = {name: kept["task"] == comparison["task"] for name, kept in comparison["retention"].items()}
    return {
        name: f"kept{' (prompt variant)' if variant else ''}: {name}, n {rows[name]}"
        for name, variant in variants.items()
    }


def _more_table(model: dict[str, Any], budget: str, labels: dict[str, str]) -> str:
    """Return pass@k, discovery, retention and what moved; the base's row has its own second try at discovery."""
    rows = [row for row in model["rows"][budget] if "accuracy" in row]
    ks = list(model["base"].get("pass_at_k", {}))
    kept = list(model["base"]["retention"])
    head = [
        "method",
        *(f"pass@{k}" for k in ks),
        "discovered greedily",
        "discovered in samples",
        *(_text(labels[name]) for name in kept),
        "no word, %",
        "update norm",
        "update norm / theta",
        "update norm / random walk",
        "moved, %",
        "excess kurtosis",
    ]
    again = model["base"].get("discovery")
    body = [
        [
            "base",
            *(_number(100 * model["base"]["pass_at_k"][k]["mean"], 1) for k in ks),
            "0 by definition" if again else "",
            _interval(again["sampled"]) if again else "",
            *(_number(100 * model["base"]["retention"][name], 1) for name in kept),
            _number(100 * model["base"]["wordless"], 1),
            *[""] * 5,
        ]
    ]
    for row in rows:
        found, moved = row.get("discovery"), row["changes"]
        moves = [""] * 5
        if moved:
            moves = [
                f"{moved['norm']:.3g}",
                _ratio(moved["relative_norm"]),
                _number(moved.get("walk_ratio"), 2),
                _number(100 * moved["moved_share"], 1),
                _number(moved.get("excess_kurtosis"), 2),
            ]
        body.append(
            [
                _text(row["name"]),
                *(_number(100 * row["pass_at_k"][k]["mean"], 1) for k in ks),
                _interval(found["greedy"]) if found else "",
                _interval(found["sampled"]) if found else "",
                *(_number(100 * row["retention"][name], 1) for name in kept),
                _number(100 * row["wordless"], 1),
                *moves,
            ]
        )
    return f"<details><summary>pass@k, discovery, retention, parameters</summary>{_table(head, body)}</details>"


def _tests_table(tests: Sequence[dict[str, Any]]) -> str:
    if not tests:
        return "<p class=note>No established baseline to test against.</p>"
    body = [
        [
            f"{_text(test['es'])} - {_text(test['other'])}",
            _interval(test, "difference", signed=True),
            _p(test["p_value"]),
            _p(test["p_holm"]),
            _text(test["test"]),
        ]
        for test in tests
    ]
    head = ["difference, points", "mean and interval", "p", "p, corrected for all of these (Holm)", "test"]
    return f"<details open><summary>paired tests</summary>{_table(head, body)}</details>"


def _tuning_table(tuning: dict[str, Any]) -> str:
    body = []
    for method, found in tuning.items():
        trials = []
        for trial in sorted(found["trials"], key=lambda trial: BUDGETS.index(trial["budget"])):
            told = ", ".join(f"{name} {value}" for name, value in trial["trial"].items()) or "defaults"
            if CHOSEN["time"] in found:
                told += f" ({BUDGET_NAMES[trial['budget']].lower()})"
            right = (
                f"{100 * trial['accuracy']:.1f}"
                if trial["status"] == "done"
                else f"{trial['status']}: {trial['error']}"
            )
            mark = "<b>" if trial["trial"] == found[CHOSEN[trial["budget"]]] else "<span>"
            trials.append(
                f'{mark}<a href="{_text(trial["file"])}">{_text(told)}: {_text(right)}</a>{mark.replace("<", "</")}'
            )
        body.append(
            [
                _text(method),
                f"<td class=seeds>{'<br>'.join(trials)}</td>",
                f"{found['cost']['evaluations']:,.0f}",
                _number(found["cost"]["train_time_s"], 0),
            ]
        )
    head = ["method", "trials: accuracy on validation, %", "evaluations spent", "seconds spent"]
    return f"<details><summary>tuning and what it cost</summary>{_table(head, body)}</details>" if body else ""


def _changes_part(summary: dict[str, Any]) -> str:
    """Return the histograms of parameter changes beside a normal distribution."""
    figures = []
    budget = next(budget for budget in BUDGETS if summary["comparison"]["budget"][LIMITS[budget]])
    for name, model in summary["models"].items():
        rows = [row for row in model["rows"][budget] if row.get("changes", {}).get("histogram")]
        if rows:
            image = _svg(_histograms(rows), f"changes of {name}")
            figures.append(f"<h3>{_text(name)}</h3><figure>{image}</figure>")
    if not figures:
        return ""
    note = (
        "<p class=note>Changes of all parameters in units of their root mean square (first seed, "
        f"{BUDGET_NAMES[budget].lower()}). "
        "Dashed: a normal distribution of that size, which a random walk of evolution strategies' steps tends to; "
        "steps that Adam rescales parameter by parameter need not: for them it is but a shape to compare with. "
        "How far a run went, in units of a random walk of the same step norms, stands in the tables: 1 is such a walk, "
        "n equal steps straight ahead are the root of n. It is empty where a method does not record its steps' "
        "norms.</p>"
    )
    return f"<h2>How parameters moved</h2>{note}{''.join(figures)}"


def _seed_link(seed: dict[str, Any]) -> str:
    if seed["status"] != "done":
        return (
            f'<a class="bad" href="{_text(seed["file"])}" title="{_text(seed.get("error", ""))}">'
            f"{_text(seed['seed'])}: {_text(seed['status'])}</a>"
        )
    title = f"seed {_text(seed['seed'])}, {_text(seed['run'])}"
    told = f'<a href="{_text(seed["file"])}" title="{title}">{100 * seed["accuracy"]:.1f}</a>'
    return told + (f'<a class="run" href="{_text(seed["page"])}" title="its run">\u2197</a>' if "page" in seed else "")


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for row in body:
        lines.append("<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _interval(estimate: dict[str, Any], name: str = "mean", signed: bool = False) -> str:
    sign = "+" if signed else ""
    low, high = 100 * estimate["low"], 100 * estimate["high"]
    return f"{100 * estimate[name]:{sign}.1f} <small>[{low:{sign}.1f}, {high:{sign}.1f}]</small>"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _p(value: float) -> str:
    return "&lt; 0.0001" if value < 1e-4 else f"{value:.4f}"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _rows_of(summary: dict[str, Any]) -> int:
    first = next(iter(summary["models"].values()))
    return len(first["base"]["correct"])


def _machine(environment: dict[str, Any]) -> str:
    cores = environment.get("cores")
    kept = [environment.get("processor"), cores and f"{cores} cores", *environment.get("gpus", [])]
    return ", ".join(filter(None, kept)) or "see comparison.json"


# --- figures ----------------------------------------------------------------------------------------------------------


def curves(summary: dict[str, Any]) -> Figure:
    """Return validation accuracy against evaluations and against time, a row of panels per model."""
    models = summary["models"]
    figure = Figure(figsize=(11, 3.4 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(AXES), squeeze=False)
    methods = list(summary["comparison"]["methods"])
    for line, (name, model) in zip(panels, models.items(), strict=True):
        for panel, (budget, (place, label)) in zip(line, AXES.items(), strict=True):
            left_out = not summary["comparison"]["budget"][LIMITS[budget]]
            runs = model["curves"][BUDGETS[1 - BUDGETS.index(budget)] if left_out else budget]
            for colour, method in zip(_colours(len(methods)), methods, strict=True):
                _band(panel, runs.get(method, []), place, colour, method)
            panel.axhline(100 * model["base"]["accuracy"]["mean"], color="#999999", linewidth=0.8, linestyle=":")
            panel.set(title=name, xlabel=label, ylabel="validation accuracy, %")
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        if line[1].get_legend_handles_labels()[0]:
            line[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _band(axes: Any, runs: Sequence[Sequence[Sequence[float]]], place: int, colour: str, label: str) -> None:
    known = [[(point[place], 100 * point[2]) for point in run if point[2] is not None] for run in runs]
    known = [run for run in known if len(run) > 1]
    if not known:
        return
    ends = [run[-1][0] for run in known]
    middle = float(np.median(ends))  # one that ended early, by failing say, is no measure
    end = min(point for point in ends if point >= 0.9 * middle)  # all the others have come as far
    x = np.linspace(0, end, 60)
    values = np.array(
        [np.interp(x, [a for a, _ in run], [b for _, b in run], right=math.nan) for run in known]
    )  # (S, X); nan behind a run's end
    with np.errstate(invalid="ignore"):
        axes.plot(x, np.nanmean(values, 0), color=colour, linewidth=1.8, label=label)
    if len(known) > 1:
        axes.fill_between(x, np.nanmin(values, 0), np.nanmax(values, 0), color=colour, alpha=0.13, linewidth=0)
    for run in known:
        if run[-1][0] < 0.9 * middle:
            axes.plot(run[-1][0], run[-1][1], "x", color=colour, markersize=6)


def _histograms(rows: Sequence[dict[str, Any]]) -> Figure:
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    for panel, row in zip(panels, rows, strict=False):
        found = row["changes"]["histogram"]
        edges = np.array(found["edges"])
        panel.stairs(found["density"], edges, fill=True, color=COLOURS[0], alpha=0.6)
        x = np.linspace(edges[0], edges[-1], 200)
        panel.plot(x, np.exp(-x * x / 2) / math.sqrt(2 * math.pi), color="#444444", linewidth=0.9, linestyle="--")
        panel.set_title(row["name"], fontsize=9)
        panel.set_yscale("log")
        panel.set_ylim(1e-6, 3)
        panel.tick_params(labelsize=7)
    return figure


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG: the same text for the same figure and name, which its identifiers are made from."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


def _without_marks(value: Any) -> Any:
    """Return the summary without every problem's mark: those are in the results."""
    if isinstance(value, dict):
        return {name: _without_marks(own) for name, own in value.items() if name != "correct"}
    return [_without_marks(own) for own in value] if isinstance(value, list) else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
