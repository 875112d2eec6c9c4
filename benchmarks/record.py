"""Result files: what was measured, on which machine, versions and commit.

The commit is read when this module is imported, which is when the code to be measured is loaded: import it before the
first measurement.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from estune.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
CODE = ("../src", "../scripts", "../configs", "*.py", "peers", "../constraints.txt")  # what can change a figure


def _checkout() -> tuple[str, str] | None:
    """Return the commit that is checked out, and how the code differs from it; ``None`` where git cannot say."""
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
    """Return the commit of the start; ``+`` behind it: the code differed from it, or something changed meanwhile."""
    if AT_START is None:
        return "unknown"
    head, changed = AT_START
    return head + ("+" if changed or _checkout() != AT_START else "")


def stamp() -> dict[str, Any]:
    """Return what every result has beside its figures: the commit and the machine."""
    return {"commit": commit(), "machine": environment()}


def write_result(name: str, values: dict[str, Any], *, stamped: bool = True) -> Path:
    """Write ``benchmarks/results/<name>.json`` and return its path.

    ``stamped``: with the commit and the machine; a result that was not measured in one go has them in its parts.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {**(stamp() if stamped else {}), **values}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
