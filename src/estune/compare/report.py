"""The report of a comparison: `report.html`, a self-contained page, `summary.json`, and `curves.png`."""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from estune.compare.plan import BUDGETS, CHOSEN, LIMITS, TIME
from estune.compare.results import DONE, Changes
from estune.compare.tables import (
    Linked,
    MethodRow,
    ModelSummary,
    PairedTest,
    Summary,
    SummaryRow,
    TunedSummary,
    UntrainedRow,
    summarise,
)
from estune.files import replace_file

COLOURS = ("#1f5fa8", "#c2571a", "#2f8f5b", "#8a4fa3", "#b8860b", "#4c6a78", "#b03060", "#5f7a1f", "#777777", "#20a0a0")
# Of each budget: the index of its value in a point of a curve, and the label of the axis.
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
    """Write a comparison's page, its summary and its curves; return the page's path.

    Raises:
        UserError: there are no results yet.
    """
    summary = summarise(directory)
    numbers = json.dumps(_finite(_without_marks(summary)), indent=1, ensure_ascii=False).encode("utf-8")
    replace_file(directory / "summary.json", lambda file: file.write(numbers))
    figure = curves(summary)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    replace_file(directory / "curves.png", lambda file: file.write(image.getvalue()))
    page = render(summary, _svg(figure, "curves")).encode("utf-8")
    replace_file(directory / "report.html", lambda file: file.write(page))
    return directory / "report.html"


def render(summary: Summary, figure: str) -> str:
    """Return the page as HTML.

    Args:
        summary: of `estune.compare.tables.summarise`.
        figure: the curves as SVG.
    """
    parts = [*_introduction(summary), f"<figure>{figure}</figure>"]
    parts.append(
        "<p class=note>Accuracy on validation problems during the runs, to each budget: mean over seeds, with a band "
        "from the lowest to the highest seed. A cross marks a run that ended long before the others. Dotted: the base "
        "on the test problems.</p>"
    )
    for name, model in summary["models"].items():
        parts += _model_part(name, model, summary)
    parts.append(_changes_part(summary))
    body = "\n".join(parts)
    title = f"estune: {_text(summary['comparison']['task'])} compared"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n'
    )


def _introduction(summary: Summary) -> list[str]:
    """Return the heading, what is compared, warnings, notes, and how to read the figures."""
    comparison = summary["comparison"]
    problems = len(next(iter(summary["models"].values()))["base"]["correct"])
    parts = [
        f"<h1>{_text(comparison['task'])}: methods compared</h1>",
        f"<p class=note>{_count('model', comparison['models'])}, {_count('seed', comparison['seeds'])}, "
        f"{_budget_text(comparison['budget'])}. "
        f"Held-out pass@1 is greedy, on {problems:,} test problems. "
        f"Machine: {_text(_machine(summary['environment']))}.{_cost_text(summary['cost'])}</p>",
    ]
    for kind, versions in summary["mixed"].items():
        listed = _text("; ".join(versions))
        parts.append(f'<p class="bad">Results of more than one {kind} are mixed here: {listed}.</p>')
    if comparison.get("notes"):
        parts.append(f"<p>{_text(comparison['notes'])}</p>")
    parts.append(
        "<p class=note>Intervals are 95 %, over problems and seeds. Tuning used the validation split alone. A "
        "baseline counts as established only if it gains "
        f"{comparison['established_points']:g} points or more on at least one base, and is above the best constant "
        "answer there; nothing is claimed about a baseline that is not established. A failed run counts as its base; a "
        "run whose model could not be measured is left out. Each figure of a seed links to its result, and the arrow "
        "behind it to its run. The other figures of a row are over these seeds.</p>"
    )
    parts.append(
        "<p class=note>pass@1 is of greedy answers. Won: problems that the base answers wrong and the method right; "
        "lost: the reverse; p is that of the paired difference. mean@k is the share of right samples. Answer entropy "
        "is that of a problem's sampled answers, in nats; older results lack it.</p>"
    )
    return parts


def _model_part(name: str, model: ModelSummary, summary: Summary) -> list[str]:
    """Return the heading and the tables of a model."""
    comparison = summary["comparison"]
    samples = _text(comparison["measuring"]["discovery_samples"])
    parts = [
        f"<h2>{_text(name)}</h2>",
        f"<p class=note><code>{_text(model['path'])}</code>, fingerprint "
        f"<code>{_text(model['fingerprint'])}</code>; {model['never_solved']} of {model['sought']} test "
        f"problems the base solves neither greedily nor in {samples} samples.</p>",
    ]
    for budget in BUDGETS:
        if model["rows"][budget]:
            parts.append(f"<h3>{BUDGET_NAMES[budget]}</h3>")
            parts.append(_main_table(model, budget, summary["established"]))
            parts.append(details_table(model, budget, retention_labels(comparison, model["base"]["retention_rows"])))
            parts.append(_tests_table(model["tests"][budget]))
    parts.append(tuning_table(model["tuning"]))
    return parts


def _count(name: str, listed: Sized) -> str:
    return f"{len(listed)} {name}{'' if len(listed) == 1 else 's'}"


def _budget_text(budget: dict[str, Any]) -> str:
    parts = [
        f"{budget['evaluations']:,} scored completions" if budget["evaluations"] else "",
        f"{budget['time_s']:g} s of training" if budget["time_s"] else "",
    ]
    return f"{'budgets' if all(parts) else 'budget'} {' and '.join(filter(None, parts))}"


def _cost_text(cost: dict[str, float] | None) -> str:
    if cost is None:
        return ""
    return f" Cost: {cost['cpu_h']:.2f} hours of processor time, {cost['wall_h']:.2f} of waiting."


# --- tables -----------------------------------------------------------------------------------------------------------


def _main_table(model: ModelSummary, budget: str, established: dict[str, bool]) -> str:
    """Return the table of a model at a budget: the untrained rows, then a row a method."""
    highest_k, samples = max(model["base"]["pass_at_k"], key=int), model["base"]["samples"]
    head = [
        "method",
        "pass@1, %",
        "gain, points",
        "won / lost",
        "p (gain)",
        "seeds",
        "spread (sd)",
        f"mean@{samples}, %",
        f"gain in mean@{samples}, points",
        f"pass@{highest_k}, %",
        "answer entropy",
        "KL to base",
        "length",
        "evaluations",
        "seconds",
    ]
    untrained = filter(None, (model["base"], model.get("prefix"), model.get("constant")))
    body = [_untrained_cells(row) for row in untrained]
    body += [_method_cells(row, established) for row in model["rows"][budget]]
    return _table(head, body)


def _untrained_cells(row: UntrainedRow) -> list[str]:
    """Return the cells of the base or of a constant answer in the main table."""
    return [
        f'<a href="{_text(row["file"])}">{_text(row["name"])}</a>',
        _interval(row["accuracy"]),
        *[""] * 5,
        _interval(row["mean_at_k"]) if "mean_at_k" in row else "",
        "",
        _highest_pass_at_k(row),
        _number(row.get("answer_entropy"), 2),
        "",
        _number(row["length"], 1),
        "",
        "",
    ]


def _method_cells(row: MethodRow, established: dict[str, bool]) -> list[str]:
    """Return the cells of a method in the main table."""
    name = _method_name(row, established)
    seeds = f"<td class=seeds>{' '.join(_seed_link(seed) for seed in row['seeds'])}</td>"
    if "accuracy" not in row:
        return [name, *[""] * 4, seeds, *[""] * 9]
    deviation = row["spread"]["standard_deviation"]
    return [
        name,
        _interval(row["accuracy"]),
        _interval(row["gain"], "difference", signed=True),
        f"{row['moved']['progressions']:.1f} / {row['moved']['regressions']:.1f}",
        _p(row["gain"]["p_value"]),
        seeds,
        "" if deviation is None else _number(100 * deviation, 1),
        _interval(row["mean_at_k"]) if "mean_at_k" in row else "",
        _interval(row["mean_at_k_gain"], "difference", signed=True) if "mean_at_k_gain" in row else "",
        _highest_pass_at_k(row),
        _number(row.get("answer_entropy"), 2),
        _number(row["kl"], 3),
        _number(row["length"], 1),
        f"{row['evaluations']:,.0f}",
        _number(row["train_time_s"], 0),
    ]


def _method_name(row: MethodRow, established: dict[str, bool]) -> str:
    """Return a method's name with its warnings and, of a vote, what it costs at inference."""
    seeds = len(row["seeds"])
    warnings = [
        "not established: no claim" if established.get(row["name"]) is False else "",
        f"{row['failed']} of {seeds} failed" if row["failed"] else "",
        f"{row['unmeasured']} of {seeds} could not be measured" if row["unmeasured"] else "",
        f"{row['hacked']} hacked" if row["hacked"] else "",
        "not above a constant answer" if row.get("beside_constant") else "",
    ]
    return (
        _text(row["name"])
        + _vote_text(row)
        + "".join(f' <small class="bad">{warning}</small>' for warning in warnings if warning)
    )


def _vote_text(row: MethodRow) -> str:
    """Return how many members answer each problem, and the accuracy of the best one alone; empty for other methods."""
    if "vote" not in row:
        return ""
    vote = row["vote"]
    return (
        f" <small>{vote['members']} answers to each problem; the best member alone {100 * vote['best_accuracy']:.1f}, "
        f"{100 * vote['agreement']:.0f} % agree with the vote</small>"
    )


def _highest_pass_at_k(row: SummaryRow) -> str:
    """Return pass@k for the highest k; empty if the row was not sampled."""
    values = row.get("pass_at_k", {})
    return _interval(values[max(values, key=int)]) if values else ""


def retention_labels(comparison: dict[str, Any], rows: dict[str, int]) -> dict[str, str]:
    """Return the labels of the retained tasks, with their numbers of problems ``rows``.

    The trained task under another prompt is labelled as a prompt variant.
    """
    variants = {name: retained["task"] == comparison["task"] for name, retained in comparison["retention"].items()}
    return {
        name: f"kept{' (prompt variant)' if variant else ''}: {name}, n {rows[name]}"
        for name, variant in variants.items()
    }


def details_table(model: ModelSummary, budget: str, labels: dict[str, str]) -> str:
    """Return the table of pass@k, discovery, retention and parameter changes.

    The base's row shows how many of its never solved problems it solves in further samples.
    """
    ks = list(model["base"].get("pass_at_k", {}))
    retained = list(model["base"]["retention"])
    head = [
        "method",
        *(f"pass@{k}" for k in ks),
        "discovered greedily",
        "discovered in samples",
        *(_text(labels[name]) for name in retained),
        "no word, %",
        "update norm",
        "update norm / theta",
        "update norm / random walk",
        "moved, %",
        "excess kurtosis",
    ]
    body = []
    for row in [model["base"], *(row for row in model["rows"][budget] if "accuracy" in row)]:
        discovery, greedily = row.get("discovery"), ""
        if discovery:
            greedily = "0 by definition" if row is model["base"] else _interval(discovery["greedy"])
        body.append(
            [
                _text(row["name"]),
                *(_number(100 * row["pass_at_k"][k]["mean"], 1) if row["pass_at_k"] else "" for k in ks),
                greedily,
                _interval(discovery["sampled"]) if discovery and "sampled" in discovery else "",
                *(_number(100 * row["retention"][name], 1) for name in retained),
                _number(100 * row["wordless"], 1),
                *_changes_cells(row.get("changes")),
            ]
        )
    return f"<details><summary>pass@k, discovery, retention, parameters</summary>{_table(head, body)}</details>"


def _changes_cells(changes: Changes | None) -> list[str]:
    """Return the cells about parameter changes; empty for the base and for a method without a finished seed."""
    if not changes:
        return [""] * 5
    return [
        f"{changes['norm']:.3g}",
        _ratio(changes["relative_norm"]),
        _number(changes.get("walk_ratio"), 2),
        _number(100 * changes["moved_share"], 1),
        _number(changes.get("excess_kurtosis"), 2),
    ]


def _tests_table(tests: Sequence[PairedTest]) -> str:
    if not tests:
        return "<p class=note>No established baseline to test against.</p>"
    body = [
        [
            f"{_text(test['es'])} - {_text(test['other'])}{_members_text(test)}",
            _interval(test, "difference", signed=True),
            _p(test["p_value"]),
            _p(test["p_holm"]),
            _text(test["test"]),
        ]
        for test in tests
    ]
    head = ["difference, points", "mean and interval", "p", "p, corrected for all of these (Holm)", "test"]
    return f"<details open><summary>paired tests</summary>{_table(head, body)}</details>"


def _members_text(test: PairedTest) -> str:
    """Return how many answers the other row takes for each problem; empty for one."""
    return f" <small>({test['members']} answers to each problem)</small>" if "members" in test else ""


def tuning_table(tuning: dict[str, TunedSummary]) -> str:
    """Return the table of every method's trials, the chosen ones in bold, and of their cost."""
    body = []
    for method, tuned in tuning.items():
        trials = sorted(tuned["trials"], key=lambda trial: BUDGETS.index(trial["budget"]))
        body.append(
            [
                _text(method),
                f"<td class=seeds>{'<br>'.join(_trial_link(trial, tuned) for trial in trials)}</td>",
                f"{tuned['cost']['evaluations']:,.0f}",
                _number(tuned["cost"]["train_time_s"], 0),
            ]
        )
    head = ["method", "trials: accuracy on validation, %", "evaluations spent", "seconds spent"]
    return f"<details><summary>tuning and what it cost</summary>{_table(head, body)}</details>" if body else ""


def _trial_link(trial: Linked, tuned: Mapping[str, Any]) -> str:
    """Return a trial's settings and accuracy, linked to its result; in bold if it was chosen."""
    settings = ", ".join(f"{name} {value}" for name, value in trial["trial"].items()) or "defaults"
    if CHOSEN[TIME] in tuned:
        settings += f" ({BUDGET_NAMES[trial['budget']].lower()})"
    done = trial["status"] == DONE
    outcome = f"{100 * trial['accuracy']:.1f}" if done else f"{trial['status']}: {trial['error']}"
    tag = "b" if trial["trial"] == tuned[CHOSEN[trial["budget"]]] else "span"
    return f'<{tag}><a href="{_text(trial["file"])}">{_text(settings)}: {_text(outcome)}</a></{tag}>'


def _changes_part(summary: Summary) -> str:
    """Return the histograms of parameter changes, with the curve of a normal distribution."""
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
        "Dashed: a normal distribution of that size. A random walk of evolution strategies' steps tends to it; steps "
        "that Adam rescales parameter by parameter need not. "
        "The tables show how far a run went in units of a random walk with the same step norms: such a walk has 1, "
        "n equal steps straight ahead have the root of n. The cell is empty for methods that do not record their "
        "steps' norms.</p>"
    )
    return f"<h2>How parameters moved</h2>{note}{''.join(figures)}"


def _seed_link(seed: dict[str, Any]) -> str:
    """Return a seed's accuracy, or its failure, linked to its result and to the run's page."""
    if seed["status"] != DONE:
        return (
            f'<a class="bad" href="{_text(seed["file"])}" title="{_text(seed.get("error", ""))}">'
            f"{_text(seed['seed'])}: {_text(seed['status'])}</a>"
        )
    title = (
        f"seed {_text(seed['seed'])}, {_text(seed['run'])}: {seed['progressions']} won, {seed['regressions']} lost, "
        f"p {_p(seed['mcnemar_p'])} (McNemar)"
    )
    link = f'<a href="{_text(seed["file"])}" title="{title}">{100 * seed["accuracy"]:.1f}</a>'
    return link + (f'<a class="run" href="{_text(seed["page"])}" title="its run">\u2197</a>' if "page" in seed else "")


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for row in body:
        lines.append("<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _interval(estimate: Mapping[str, Any], name: str = "mean", signed: bool = False) -> str:
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


def _machine(environment: dict[str, Any]) -> str:
    cores = environment.get("cores")
    parts = [environment.get("processor"), cores and f"{cores} cores", *environment.get("gpus", [])]
    return ", ".join(filter(None, parts)) or "see comparison.json"


# --- figures ----------------------------------------------------------------------------------------------------------


def curves(summary: Mapping[str, Any]) -> Figure:
    """Return the figure of validation accuracy against evaluations and against time, a row of panels per model."""
    models = summary["models"]
    figure = _figure(11, 3.4 * len(models))
    panels = figure.subplots(len(models), len(AXES), squeeze=False)
    methods = list(summary["comparison"]["methods"])
    for line, (name, model) in zip(panels, models.items(), strict=True):
        for panel, (budget, (axis, label)) in zip(line, AXES.items(), strict=True):
            left_out = not summary["comparison"]["budget"][LIMITS[budget]]
            runs = model["curves"][BUDGETS[1 - BUDGETS.index(budget)] if left_out else budget]
            for colour, method in zip(_colours(len(methods)), methods, strict=True):
                _band(panel, runs.get(method, []), axis, colour, method)
            panel.axhline(100 * model["base"]["accuracy"]["mean"], color="#999999", linewidth=0.8, linestyle=":")
            panel.set(title=name, xlabel=label, ylabel="validation accuracy, %")
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        if line[1].get_legend_handles_labels()[0]:
            line[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches; no backend is chosen for the process."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself to the figure
    return figure


def _band(axes: Any, runs: Sequence[Sequence[Sequence[Any]]], axis: int, colour: str, label: str) -> None:
    """Draw the mean of a method's runs, and the range from the lowest to the highest.

    The curve ends where the shortest run ends, apart from runs shorter than 0.9 of the median: a cross marks their end.

    Args:
        axes: the panel.
        runs: points (evaluations, seconds, accuracy) of each run.
        axis: the index of a point's x value.
        colour: of the method.
        label: of the method.
    """
    known = [[(point[axis], 100 * accuracy) for point in run if (accuracy := point[2]) is not None] for run in runs]
    known = [run for run in known if len(run) > 1]
    if not known:
        return
    ends = [run[-1][0] for run in known]
    median = float(np.median(ends))
    end = min(point for point in ends if point >= 0.9 * median)
    x = np.linspace(0, end, 60)
    values = np.array(
        [np.interp(x, [a for a, _ in run], [b for _, b in run], right=math.nan) for run in known]
    )  # (S, X); NaN after a run's end
    with np.errstate(invalid="ignore"):
        axes.plot(x, np.nanmean(values, 0), color=colour, linewidth=1.8, label=label)
    if len(known) > 1:
        axes.fill_between(x, np.nanmin(values, 0), np.nanmax(values, 0), color=colour, alpha=0.13, linewidth=0)
    for run in known:
        if run[-1][0] < 0.9 * median:
            axes.plot(run[-1][0], run[-1][1], "x", color=colour, markersize=6)


def _histograms(rows: Sequence[MethodRow]) -> Figure:
    """Return the figure of each method's histogram of parameter changes, with a normal distribution's density."""
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = _figure(2.9 * columns, 2.2 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    for panel, row in zip(panels, rows, strict=False):
        histogram = row["changes"]["histogram"]
        assert histogram is not None
        edges = np.array(histogram["edges"])
        panel.stairs(histogram["density"], edges, fill=True, color=COLOURS[0], alpha=0.6)
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
    """Return a figure as SVG; its identifiers are made from ``name``, so equal figures give equal text."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


def _without_marks(value: Any) -> Any:
    """Return the summary without ``correct``, the mark of every problem, which the results hold."""
    if isinstance(value, dict):
        return {name: _without_marks(item) for name, item in value.items() if name != "correct"}
    return [_without_marks(item) for item in value] if isinstance(value, list) else value


def _finite(value: Any) -> Any:
    """Return JSON with None in the place of NaN and infinities."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
