"""Writes result files: figures with the machine, versions and commit of their measurement.

The commit is read when this module is imported. Import the module before the first measurement, when the measured code
is loaded.

    python benchmarks/record.py NAME ARGUMENTS    # runs pytest and records its counts, as `make nightly` does
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from estune.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
CODE = (
    "../src",
    "../scripts",
    "../configs",
    "*.py",
    "peers",
    "../tests",
    "../constraints.txt",
    "../requirements-vllm.txt",
)  # files that can change a figure


def _checkout() -> tuple[str, str] | None:
    """Return the checked-out commit and the list of changed files as git prints it; None if git fails."""
    git = ["git", "-C", str(RESULTS.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", *CODE], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip(), changed.stdout.strip()


AT_START = _checkout()


def commit() -> str:
    """Return the commit at the start, followed by ``+`` if the code differed from it or has changed since then."""
    if AT_START is None:
        return "unknown"
    head, changed = AT_START
    return head + ("+" if changed or _checkout() != AT_START else "")


def stamp() -> dict[str, Any]:
    """Return the fields of every result beside its figures: commit and machine."""
    return {"commit": commit(), "machine": environment()}


def write_part(name: str, part: str, values: Mapping[str, Any]) -> Path:
    """Write one part of ``benchmarks/results/<name>.json``, keep its other parts, and return the file's path.

    Each part has the commit and the machine of its own measurement.
    """
    path = RESULTS / f"{name}.json"
    parts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return write_result(name, {**parts, part: {**stamp(), **values}}, stamped=False)


def write_result(
    name: str, values: Mapping[str, Any], *, stamped: bool = True, listed: Mapping[str, Sequence[Any]] | None = None
) -> Path:
    """Write ``benchmarks/results/<name>.json`` and return its path.

    Args:
        name: of the file.
        values: of the result.
        stamped: whether to add commit and machine. A result of several measurements holds them in its parts instead.
        listed: further values by name: lists that are written with one element a line.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    parts = [json.dumps({**(stamp() if stamped else {}), **values}, indent=1).removesuffix("\n}")]
    for key, elements in (listed or {}).items():
        lines = ",\n".join(f"  {json.dumps(element, ensure_ascii=False)}" for element in elements)
        parts.append(f" {json.dumps(key)}: [\n{lines}\n ]")
    path.write_text(",\n".join(parts) + "\n}\n", encoding="utf-8")
    return path


def counts_of(report: Path) -> dict[str, Any]:
    """Return how many tests of a JUnit report passed, failed and were skipped, and the names of those that failed."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [
        f"{c.get('classname')}::{c.get('name')}"
        for c in cases
        if c.find("failure") is not None or c.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def main() -> int:
    """Run pytest and record its counts; return 1 if a test failed or none ran, else 0."""
    name, arguments = sys.argv[1], sys.argv[2:]
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", *arguments, "--junitxml", str(report)])
        found = counts_of(report)
    print(write_part("nightly", name, {"date": datetime.date.today().isoformat(), **found}), found)
    return int(bool(found["failed"]) or not found["passed"])


if __name__ == "__main__":
    sys.exit(main())
