"""Result files: what was measured, on which machine, versions and commit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from estune.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
CODE = ("../src", "../scripts", "*.py", "data", "../constraints.txt")  # what can change a figure


def commit() -> str:
    """Return the commit that is checked out, with ``+`` behind it where the code differs from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", *CODE], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def write_result(name: str, values: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json`` with the machine and the commit; return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"commit": commit(), "machine": environment(), **values}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
