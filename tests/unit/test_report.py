"""The data and marks of the report, and the content that it keeps out of its page."""

from __future__ import annotations

import json
import re

from estune.monitor.panel import BLOCKS, sparkline, spread
from estune.monitor.report.data import mark
from estune.monitor.report.page import page


def joined(parts: list[tuple[str, bool]]) -> str:
    return "".join(piece for piece, _ in parts)


def test_marks_what_the_other_side_lacks() -> None:
    before, after = mark("The capital is Paris, I think.", "The answer is Paris.")
    assert joined(before) == "The capital is Paris, I think."
    assert joined(after) == "The answer is Paris."
    assert [piece for piece, differs in after if differs] == ["answer"]
    assert "capital" in [piece for piece, differs in before if differs]
    assert mark("same", "same") == ([("same", False)], [("same", False)])
    assert mark("", "new") == ([], [("new", True)])


def test_nothing_a_model_says_becomes_markup() -> None:
    text = '</script><script>alert(1)</script><!-- \u2028 "quoted"'
    html = page({"runs": [{"name": text}]})
    assert html.count("</script>") == 2  # the data's and the code's own ends
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["runs"][0]["name"] == text


def test_the_page_asks_nobody() -> None:
    html = page({"runs": []})
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
    assert "default-src 'none'" in html


def test_sparklines() -> None:
    assert sparkline([]) == sparkline([None]) == ""
    assert sparkline([1.0, 1.0]) == BLOCKS[0] * 2
    assert sparkline([0.0, None, 1.0]) == BLOCKS[0] + " " + BLOCKS[-1]
    assert len(sparkline(list(map(float, range(100))), width=20)) == 20
    assert spread([1.0] * 5) == BLOCKS[-1]
    drawn = spread([0.0] * 8 + [1.0], bins=3)
    assert drawn == BLOCKS[-1] + " " + BLOCKS[0]
