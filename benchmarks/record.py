"""Result files: what was measured, on which machine, versions and commit.

The commit is read when this module is imported, which is when the code to be measured is loaded: import it before the
first measurement.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
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


def write_result(
    name: str, values: Mapping[str, Any], *, stamped: bool = True, listed: Mapping[str, Sequence[Any]] | None = None
) -> Path:
    """Write ``benchmarks/results/<name>.json`` and return its path.

    ``stamped``: with the commit and the machine; a result that was not measured in one go has them in its parts.
    ``listed``: further names, of lists that are written one element a line.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    parts = [json.dumps({**(stamp() if stamped else {}), **values}, indent=1).removesuffix("\n}")]
    for own, elements in (listed or {}).items():
        lines = ",\n".join(f"  {json.dumps(element, ensure_ascii=False)}" for element in elements)
        parts.append(f" {json.dumps(own)}: [\n{lines}\n ]")
    path.write_text(",\n".join(parts) + "\n}\n", encoding="utf-8")
    return path
