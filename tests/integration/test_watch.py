"""The page in a real browser: the file without a network, and the live one; no errors in its console."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import TOY

from estune.errors import UserError
from estune.monitor.report.data import read_runs
from estune.monitor.report.page import page
from estune.monitor.report.watch import serve

pytestmark = pytest.mark.miniature

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
RUN = (*TOY, "--max_steps", 3, "--population_size", 4, "--sigma", 0.1, "--num_threads", 1, "--eval_steps", 1,
       "--reward_isolation", "inline")  # fmt: skip


def look(address: str, place: Path) -> tuple[str, str]:
    """Return a page as the browser has it after its scripts ran, and what went to its console."""
    done = subprocess.run(
        [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={place / 'browser'}",
         "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", address],
        capture_output=True, text=True, env={**os.environ, "HOME": str(place)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture
def finished(run, place) -> Path:
    assert run(*RUN).code == 0
    return place / "run"


@pytest.fixture
def address(finished: Path) -> Iterator[str]:
    with serve([finished], "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.real
@needs_browser
def test_the_file_opens_without_network_and_without_errors(finished: Path, run, place: Path) -> None:
    assert run("report", "run", "--output_dir", "page").code == 0
    html, console = look((place / "page" / "report.html").as_uri(), place)
    assert console == ""
    assert 'data-ready="true"' in html
    for heading in ("Training reward", "Held-out", "Fitness of the members", "Time by part of a step",
                    "Before and after", "Configuration", "Fingerprint"):  # fmt: skip
        assert f"<h2>{heading}" in html, heading
    assert html.count("<svg") >= 4
    assert re.search(r"[0-9a-f]{32}", html)


@pytest.mark.real
@needs_browser
def test_the_live_page_is_the_same_and_says_so(address: str, place: Path) -> None:
    html, console = look(address, place)
    assert console == ""
    assert 'data-ready="true"' in html
    assert ">live</span>" in html


DRIVE = """<script>
const before = [...document.querySelectorAll("section")], details = document.querySelector("details");
details.open = !details.open;
const wanted = details.open;
data = {...data, runs: data.runs.map(run => ({...run, config: {...run.config, seed: 5}}))};
render();
const after = [...document.querySelectorAll("section")];
const changed = after.filter((one, i) => one !== before[i]);
document.body.dataset.changed = changed.map(one => one.querySelector("h2").textContent);
document.body.dataset.order = after.map(one => one.querySelector("h2").textContent) + "" ===
  before.map(one => one.querySelector("h2").textContent) + "";
document.body.dataset.stays = document.querySelector("details").open === wanted;
</script></body>"""


@pytest.mark.real
@needs_browser
def test_what_did_not_change_is_not_drawn_again_and_what_was_opened_stays_open(finished: Path, place: Path) -> None:
    driven = place / "driven.html"
    driven.write_text(page(read_runs([finished])).replace("</body>", DRIVE), encoding="utf-8")
    html, console = look(driven.as_uri(), place)
    assert console == ""
    assert 'data-changed="Configuration"' in html
    assert 'data-stays="true"' in html
    assert 'data-order="true"' in html


def test_what_the_server_answers(address: str) -> None:
    with urllib.request.urlopen(f"{address}data.json") as answer:
        data = json.loads(answer.read())
    assert data["runs"][0]["steps_done"] == 3
    assert len(data["runs"][0]["fitness"]) == 3
    assert [e["step"] for e in data["runs"][0]["evaluations"]] == [0, 1, 2, 3]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}../journal.jsonl")


def test_no_run_and_no_port(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        serve([tmp_path], "127.0.0.1", 0)
    with serve([finished], "127.0.0.1", 0) as server, pytest.raises(UserError, match="another --port"):
        serve([finished], "127.0.0.1", server.server_port)


def test_other_names_and_a_run_that_is_gone(address: str, finished: Path) -> None:
    strange = urllib.request.Request(f"{address}data.json", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(strange)
    (finished / "es_config.json").rename(finished / "elsewhere.json")
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(address)
    (finished / "elsewhere.json").rename(finished / "es_config.json")
    with pytest.raises(UserError, match="port must be between"):
        serve([finished], "127.0.0.1", 99999)
