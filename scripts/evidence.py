"""Write the tables and pictures of `docs/evidence.md` from the files in `benchmarks/results`.

    python scripts/evidence.py                       # after a comparison
    python scripts/evidence.py --check               # exit status 1 where a page or a picture is not what the files say
    python scripts/evidence.py --show compare_countdown    # everything that a file says, every paired difference

A table stands between `<!-- NAME -->` and `<!-- end -->`, on any page of `docs` or in README; it is made from
`benchmarks/results/NAME.json` (`scans` from two, `results` in README by `evidence_rows.py`). The curves of a
`compare_*` are in `docs/images/NAME.png`. Its file is what `estune compare` leaves as `comparison_results.json`:

    cp benchmarks/results/compare_countdown/comparison_results.json benchmarks/results/compare_countdown.json
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from hashlib import blake2b
from pathlib import Path

import evidence_rows
import evidence_tables as tables
from matplotlib.figure import Figure
from PIL import Image

from estune.compare.report import curves

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
PLACE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DRAWN_FROM = "Drawn from"  # a picture's note: the hash of the file of results behind it


def pages() -> list[Path]:
    """Return the pages that may hold places."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def page(text: str) -> str:
    """Return a page with its tables made anew."""

    def made(place: re.Match[str]) -> str:
        text = evidence_rows.results() if place[2] == "results" else tables.section(place[2])
        end = "\n" * text.rstrip().endswith("|")  # a table ends with an empty line, or the mark would be a row of it
        return f"{place[1]}\n{text}{end}{place[3]}"

    return PLACE.sub(made, text)


def conciseness_curves(name: str) -> Figure:
    """Return the distance on the test prompts after each evaluated step."""
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


def has_picture(name: str) -> bool:
    """Return whether a picture belongs to a file of results."""
    return name.startswith("compare_") or name == "conciseness"


def drawing(name: str) -> Figure:
    """Return the picture of a file of results."""
    if name == "conciseness":
        return conciseness_curves(name)
    return curves(tables.summary(tables.RESULTS / f"{name}.json"))


def drawn_from(name: str) -> str:
    """Return the hash of a file of results, which a picture keeps."""
    return blake2b((tables.RESULTS / f"{name}.json").read_bytes(), digest_size=16).hexdigest()


def is_drawn(name: str) -> bool:
    """Return whether the picture in `docs/images` was drawn from the file of results as it is now."""
    picture = IMAGES / f"{name}.png"
    if not picture.exists():
        return False
    with Image.open(picture) as image:
        return image.info.get(DRAWN_FROM) == drawn_from(name)


def draw(name: str, figure: Figure) -> None:
    """Write a picture, with the hash of what it was drawn from."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130, metadata={DRAWN_FROM: drawn_from(name)})
    (IMAGES / f"{name}.png").write_bytes(image.getvalue())


def main() -> int:
    """Write pages and pictures, or say what is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--show", metavar="NAME", help="print everything that a file says")
    options = parser.parse_args()
    if options.show:
        print(tables.everything(options.show))
        return 0
    wrong = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (made := page(text)) != text:
            wrong.append(path)
            if not options.check:
                path.write_text(made, encoding="utf-8")
        for _, name, _ in PLACE.findall(text):
            if has_picture(name) and not is_drawn(name):
                wrong.append(IMAGES / f"{name}.png")
                if not options.check:
                    draw(name, drawing(name))
    for path in wrong if options.check else ():
        print(f"{path.relative_to(ROOT)} is not what the results say: python scripts/evidence.py", file=sys.stderr)
    told = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    lacking = [phrase for phrase in tables.phrases() if phrase not in told]
    for phrase in lacking:
        print(f"docs/evidence.md must say {phrase!r}, which follows from the results", file=sys.stderr)
    return int(bool(lacking or (wrong and options.check)))


if __name__ == "__main__":
    sys.exit(main())
