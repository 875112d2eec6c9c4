"""The report as one self-contained HTML page: it embeds its data and needs neither a network nor a library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estune.files import replace_file
from estune.monitor.report.data import read_runs

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "/*DATA*/"  # replaced by the data in the template


def page(data: dict[str, Any], *, live: bool = False) -> str:
    """Return the page for the result of `read_runs`; with ``live`` the page keeps polling ``data.json``."""
    text = json.dumps({**data, "live": live}, ensure_ascii=False, allow_nan=False)
    # Only these characters could end the script element or its string; JSON decodes the escapes.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)


def write_page(directories: Sequence[Path], path: Path) -> None:
    """Write the page of some runs, and replace an old page atomically.

    Raises:
        UserError: a directory holds no run.
    """
    html = page(read_runs(directories)).encode("utf-8", errors="replace")
    replace_file(path, lambda file: file.write(html))
