"""The README's table of results: one row a comparison, from the same files as `docs/evidence.md`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import evidence_tables as tables


@dataclass(frozen=True)
class Shown:
    """A row: which comparison, at which budget, which methods under which names, and the verdict on them.

    A verdict may hold ``{constant}``, the accuracy of the best constant answer, and ``{NAME}``, the seconds after which
    the method of that name is half way.
    """

    title: str
    file: str
    budget: str  # evaluations or time
    es: Mapping[str, str]  # shown name -> method
    others: Mapping[str, str]
    verdict: str


ROWS = (
    Shown(
        "Countdown, three tiny models, equal evaluations",
        "compare_countdown",
        "evaluations",
        {"full": "es-full", "low-rank": "es-lowrank"},
        {"GRPO": "grpo"},
        "Most methods end level. Beyond chance ES is ahead of no established baseline.",
    ),
    Shown(
        "the same, equal time",
        "compare_countdown",
        "time",
        {"full": "es-full", "low-rank": "es-lowrank"},
        {"GRPO": "grpo"},
        "Low-rank ES is half way after {low-rank} s, GRPO after {GRPO} s. Then it loses much of its gain on two of "
        "three models.",
    ),
    Shown(
        "4x4 Sudoku, equal time",
        "compare_mini_sudoku",
        "time",
        {"": "es"},
        {"GRPO": "grpo"},
        "Greedily no method is better than the base beyond chance. In samples GRPO learned, ES did not.",
    ),
    Shown(
        "SmolLM2-135M, sums of two digits, 9 minutes",
        "compare_smollm2_chain_sum",
        "time",
        {"": "es"},
        {"rejection sampling": "sft_rejection", "GRPO": "grpo"},
        "Only rejection sampling learned; a constant answer has {constant}.",
    ),
    Shown(
        "SmolLM2-135M, one-digit arithmetic, 9 minutes",
        "compare_smollm2_basic_arithmetic",
        "time",
        {"": "es"},
        {"rejection sampling": "sft_rejection", "GRPO": "grpo"},
        "No method learned; a constant answer has {constant}.",
    ),
)


def over_models(values: list[float]) -> str:
    """Return accuracies in per cent: one, or from the lowest to the highest of several models."""
    low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
    return low if len(values) == 1 else f"{low} to {high}"


def accuracies(found: dict[str, Any], budget: str, methods: Mapping[str, str]) -> str:
    """Return the mean accuracy of methods, each over all models."""
    cells = []
    for label, method in methods.items():
        rows = [row for its in found["models"].values() for row in its["rows"][budget] if row["name"] == method]
        cells.append(f"{label} {over_models([row['accuracy']['mean'] for row in rows])}".strip())
    return ", ".join(cells)


def results() -> str:
    """Return the table."""
    body = []
    for row in ROWS:
        found = tables.summary(tables.RESULTS / f"{row.file}.json")
        known: dict[str, str] = {}
        for its in found["models"].values():
            if "constant" in its:
                known["constant"] = over_models([its["constant"]["accuracy"]["mean"]])
        for label, method in {**row.es, **row.others}.items():
            if f"{{{label}}}" in row.verdict:
                known[label] = tables.half_way(found, row.budget, method)
        base = over_models([its["base"]["accuracy"]["mean"] for its in found["models"].values()])
        body.append(
            [
                row.title,
                base,
                accuracies(found, row.budget, row.es),
                accuracies(found, row.budget, row.others),
                row.verdict.format_map(known),
            ]
        )
    return tables.table(body, ["comparison", "base", "ES", "others", "verdict"])
