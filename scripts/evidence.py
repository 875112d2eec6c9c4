"""Writes the tables and pictures of `docs/evidence.md` from the files in `benchmarks/results`.

    python scripts/evidence.py                       # after a comparison
    python scripts/evidence.py --check               # exit status 1 if a page or a picture differs from the files
    python scripts/evidence.py --show compare_countdown    # all tables of a file, with every paired difference
    python scripts/evidence.py --show stability      # how much the runs of a method differ, in all comparisons

A generated table begins with `<!-- NAME -->` and ends with `<!-- end -->`, on a page of `docs` or in README. Its source
is `benchmarks/results/NAME.json` (`scans` has two files; README's `results` is made from several). The curves of a
`compare_*` file are in `docs/images/NAME.png`. Such a file is a copy of the `comparison_results.json` that `estune
compare` writes:

    cp benchmarks/results/compare_countdown/comparison_results.json benchmarks/results/compare_countdown.json
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import evidence_tables as tables
from matplotlib.figure import Figure
from PIL import Image

from estune.compare.report import curves

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
GENERATED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DRAWN_FROM = "Drawn from"  # PNG text field: the hash of the result file that the picture shows


def pages() -> list[Path]:
    """Return the pages that may hold generated tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def page(text: str) -> str:
    """Return a page with its tables replaced by new ones."""

    def replacement(match: re.Match[str]) -> str:
        text = results() if match[2] == "results" else tables.section(match[2])
        # Without an empty line after a table, Markdown would read the end mark as a row.
        end = "\n" * text.rstrip().endswith("|")
        return f"{match[1]}\n{text}{end}{match[3]}"

    return GENERATED.sub(replacement, text)


def conciseness_curves(name: str) -> Figure:
    """Return a plot of the mean distance on the test prompts, in characters, after each evaluated step."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    panel = figure.subplots()
    for run in tables.read(name)["runs"]:
        steps, distances = zip(*((point["step"], point["distance"]) for point in run["curve"]), strict=True)
        panel.plot(steps, distances, marker="o", markersize=3.5, label=f"seed {run['seed']}")
    panel.set(xlabel="steps", ylabel="characters too many", ylim=(0, None))
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    return figure


def predicted_and_measured(name: str) -> Figure:
    """Return a plot of the gains that a probe predicted against those that runs then had."""
    found = [row for row in tables.predictions(name) if row["case"] not in tables.IN_CHARACTERS]
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    panel = figure.subplots()
    ends = [min(0.0, *(row["predicted"] for row in found)), max(row["predicted"] for row in found)]
    panel.plot(ends, ends, color="0.7", linewidth=1, label="as predicted")
    looks = {"countdown": ("tab:blue", "o"), "liked_length": ("tab:orange", "s"), "mini_sudoku": ("tab:green", "^")}
    for case, (colour, marker) in looks.items():
        for sure in (True, False):
            rows = [r for r in found if r["case"] == case and (r["probe"]["outlook"]["p_value"] <= 0.05) == sure]
            if not rows:
                continue
            label = f"{tables.TASKS_OF_PROBE[case]}, {'agreement found' if sure else 'none found'}"
            panel.scatter([r["predicted"] for r in rows], [r["gain"] for r in rows], s=34, marker=marker,
                          edgecolors=colour, facecolors=colour if sure else "none", label=label)  # fmt: skip
    panel.set(xlabel="predicted gain of ten steps", ylabel="measured gain, held out")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    return figure


def has_picture(name: str) -> bool:
    """Return whether a result file has a picture."""
    return name.startswith("compare_") or name in DRAWINGS


def drawing(name: str) -> Figure:
    """Return the picture of a result file."""
    if name in DRAWINGS:
        return DRAWINGS[name](name)
    return curves(tables.read_summary(tables.RESULTS / f"{name}.json"))


DRAWINGS = {"conciseness": conciseness_curves, "probe": predicted_and_measured}  # beside those of comparisons


def drawn_from(name: str) -> str:
    """Return the hash of a result file, which its picture stores."""
    return blake2b((tables.RESULTS / f"{name}.json").read_bytes(), digest_size=16).hexdigest()


def is_drawn(name: str) -> bool:
    """Return whether the picture in `docs/images` was drawn from the present result file."""
    picture = IMAGES / f"{name}.png"
    if not picture.exists():
        return False
    with Image.open(picture) as image:
        return image.info.get(DRAWN_FROM) == drawn_from(name)


def draw(name: str, figure: Figure) -> None:
    """Write a picture, with the hash of its result file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130, metadata={DRAWN_FROM: drawn_from(name)})
    (IMAGES / f"{name}.png").write_bytes(image.getvalue())


# --- the table of results in README: one row a comparison -------------------------------------------------------------


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


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> int:
    """Write pages and pictures, or print which of them are out of date; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--show", metavar="NAME", help="print all tables of a result file")
    options = parser.parse_args()
    if options.show:
        print(tables.everything(options.show))
        return 0
    outdated = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (expected := page(text)) != text:
            outdated.append(path)
            if not options.check:
                path.write_text(expected, encoding="utf-8")
        for _, name, _ in GENERATED.findall(text):
            if has_picture(name) and not is_drawn(name):
                outdated.append(IMAGES / f"{name}.png")
                if not options.check:
                    draw(name, drawing(name))
    for path in outdated if options.check else ():
        print(f"{path.relative_to(ROOT)} differs from the results: python scripts/evidence.py", file=sys.stderr)
    evidence = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    missing = [phrase for phrase in tables.phrases() if phrase not in evidence]
    for phrase in missing:
        print(f"docs/evidence.md must contain {phrase!r}, which follows from the results", file=sys.stderr)
    return int(bool(missing or (outdated and options.check)))


if __name__ == "__main__":
    sys.exit(main())
