"""Makes the table of results in README: one row a comparison, from the same files as `docs/evidence.md`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import evidence_tables as tables


@dataclass(frozen=True)
class ResultRow:
    """A row of the table: a comparison, a budget, the methods shown, and a verdict.

    A verdict may contain ``{constant}``, the accuracy of the best constant answer in per cent, and ``{NAME}``, the
    seconds of training until the method with that shown name has half of the gain that forcing the skill brings
    (`evidence_tables.half_way`).
    """

    title: str
    file: str  # name in `benchmarks/results`, without .json
    budget: str  # evaluations or time
    es: Mapping[str, str]  # shown name -> method
    others: Mapping[str, str]
    verdict: str


ROWS = (
    ResultRow(
        "Countdown, three tiny models, equal evaluations",
        "compare_countdown",
        "evaluations",
        {"full": "es-full", "low-rank": "es-lowrank"},
        {"GRPO": "grpo"},
        "Most methods end level. Beyond chance ES is ahead of no established baseline.",
    ),
    ResultRow(
        "the same, equal time",
        "compare_countdown",
        "time",
        {"full": "es-full", "low-rank": "es-lowrank"},
        {"GRPO": "grpo"},
        "Low-rank ES has half of the gain that forced thinking brings after {low-rank} s, GRPO after {GRPO} s. Later "
        "low-rank ES loses much of its gain on two of three models.",
    ),
    ResultRow(
        "4x4 Sudoku, equal time",
        "compare_mini_sudoku",
        "time",
        {"": "es"},
        {"GRPO": "grpo"},
        "Greedily no method is better than the base beyond chance. In samples GRPO learned, ES did not.",
    ),
    ResultRow(
        "SmolLM2-135M, sums of two digits, 9 minutes",
        "compare_smollm2_chain_sum",
        "time",
        {"": "es"},
        {"rejection sampling": "sft_rejection", "GRPO": "grpo"},
        "Only rejection sampling learned. The best constant answer scores {constant}.",
    ),
    ResultRow(
        "SmolLM2-135M, one-digit arithmetic, 9 minutes",
        "compare_smollm2_basic_arithmetic",
        "time",
        {"": "es"},
        {"rejection sampling": "sft_rejection", "GRPO": "grpo"},
        "No method learned. The best constant answer scores {constant}.",
    ),
)


def over_models(values: list[float]) -> str:
    """Return accuracies in per cent: the only one, or the range over several models."""
    low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
    return low if len(values) == 1 else f"{low} to {high}"


def accuracies(summary: dict[str, Any], budget: str, methods: Mapping[str, str]) -> str:
    """Return the mean accuracy of each method, as a range over all models."""
    cells = []
    for label, method in methods.items():
        rows = [row for model in summary["models"].values() for row in model["rows"][budget] if row["name"] == method]
        cells.append(f"{label} {over_models([row['accuracy']['mean'] for row in rows])}".strip())
    return ", ".join(cells)


def results() -> str:
    """Return the table as Markdown."""
    body = []
    for row in ROWS:
        summary = tables.read_summary(tables.RESULTS / f"{row.file}.json")
        values: dict[str, str] = {}
        for model in summary["models"].values():
            if "constant" in model:
                values["constant"] = over_models([model["constant"]["accuracy"]["mean"]])
        for label, method in {**row.es, **row.others}.items():
            if f"{{{label}}}" in row.verdict:
                values[label] = tables.half_way(summary, row.budget, method)
        base = over_models([model["base"]["accuracy"]["mean"] for model in summary["models"].values()])
        body.append(
            [
                row.title,
                base,
                accuracies(summary, row.budget, row.es),
                accuracies(summary, row.budget, row.others),
                row.verdict.format_map(values),
            ]
        )
    return tables.table(body, ["comparison", "base", "ES", "others", "verdict"])
