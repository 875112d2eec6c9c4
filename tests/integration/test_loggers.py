"""Trackers get a run's numbers, and one that cannot start stops the run's start; the page in a real browser."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import PATIENCE_S, TOY, estune

from estune.errors import UserError
from estune.monitor import trackers
from estune.monitor.monitors import Monitors
from estune.monitor.report import page as report_page
from estune.monitor.report.answers import MOST_MEMBERS, PAGE_BYTES, STEP_BYTES, spread
from estune.monitor.report.data import MOST_CHARACTERS, MOST_ROWS, read_answers, read_run
from estune.monitor.report.page import serve
from estune.monitor.trackers import LOGGERS, TRL_NAMES, Apart, charts, kind, numbers, start_logger
from estune.train.metrics import NOT_FINITE, OTHER_MESSAGES

pytestmark = pytest.mark.miniature

RUN = (*TOY, "--max_steps", 2, "--population_size", 4, "--sigma", 0.1, "--num_threads", 1, "--eval_steps", 1,
       "--reward_isolation", "inline")  # fmt: skip


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def started(place, name, **environment):
    done = estune(*RUN, "--report_to", name, cwd=place, env=environment)
    assert done.code == 0, done
    assert "failed and is off" not in done.err, done.err


def resumed(place, name, **environment):
    """Continue the run for a third step."""
    done = estune("train", "--output_dir", "run", "--resume", "--max_steps", 3, cwd=place, env=environment)
    assert done.code == 0, done
    assert "failed and is off" not in done.err, done.err


@pytest.mark.real
@needs("tensorboard")
def test_tensorboard(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    started(place, "tensorboard")
    events = EventAccumulator(str(place / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2]
    assert [event.step for event in events.Scalars("eval/reward")] == [0, 1, 2]


@pytest.mark.real
@needs("wandb")
def test_wandb_offline(place):
    started(place, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    resumed(place, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    files = list((place / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2  # offline, every process writes a file of its own ...
    assert len({file.name for file in files}) == 1  # ... of the same run


@pytest.mark.real
@needs("mlflow")
def test_mlflow(place):
    started(place, "mlflow", MLFLOW_TRACKING_URI=f"sqlite:///{place / 'mlflow.db'}")
    resumed(place, "mlflow", MLFLOW_TRACKING_URI=f"sqlite:///{place / 'mlflow.db'}")
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("estune").experiment_id])
    assert run.data.params["population_size"] == "4"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "reward")] == [1, 2, 3]


@pytest.mark.real
@needs("trackio")
def test_trackio(place):
    started(place, "trackio", TRACKIO_DIR=str(place / "trackio"), TRACKIO_PROJECT="mine")
    other = tuple("other" if word == "run" else word for word in RUN)  # of the same name, and later
    names = {"TRACKIO_DIR": str(place / "trackio"), "TRACKIO_PROJECT": "mine"}
    assert estune(*other, "--run_name", "run", "--report_to", "trackio", cwd=place, env=names).code == 0
    resumed(place, "trackio", TRACKIO_DIR=str(place / "trackio"), TRACKIO_PROJECT="mine")
    [database] = (place / "trackio").glob("mine*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT DISTINCT run_name, step FROM metrics ORDER BY step").fetchall()
    mine = json.loads((place / "run" / "trackers.json").read_text(encoding="utf-8"))["trackio"]
    rows = [row for row in rows if row[0] == mine]
    assert len({name for name, _ in rows}) == 1
    assert [step for _, step in rows] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", LOGGERS)
def test_a_tracker_that_is_not_there_stops_the_run(place, name):
    """The package is hidden from a fresh interpreter."""
    package = LOGGERS[name][0]
    code = (f"import importlib.util as u, sys; real = u.find_spec\n"
            f"u.find_spec = lambda n, *a: None if n == {package!r} else real(n, *a)\n"
            "from estune.cli import main; sys.exit(main(sys.argv[1:]))")  # fmt: skip
    words = [str(word) for word in (*RUN, "--report_to", name)]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=place, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"report_to {name} needs the package {package}" in done.stderr
    assert not (place / "run" / "metrics.jsonl").exists()


def test_a_tracker_that_cannot_start_stops_the_run(place, monkeypatch):
    def broken(run_dir, name, config, known):
        raise RuntimeError("no\n  disk")

    monkeypatch.setitem(LOGGERS, "tensorboard", ("json", broken))
    with pytest.raises(UserError, match="report_to tensorboard cannot start: RuntimeError: no disk"):
        start_logger("tensorboard", place, "run", {})


def test_a_tracker_that_breaks_later_is_switched_off(capsys):
    class Breaking:
        def log(self, record):
            raise OSError("the server went away")

        def close(self, failed=False):
            raise AssertionError("it was switched off")

    monitors = Monitors([], [Breaking()])
    monitors.log({"step": 1})
    monitors.log({"step": 2})
    monitors.close()
    assert capsys.readouterr().err.count("Breaking failed and is off") == 1


class Odd:
    """A tracker with a prescribed action for each call."""

    identity = None

    def __init__(self, on_log=lambda: None, on_close=lambda: None):
        self.logged, self.on_log, self.on_close = [], on_log, on_close

    def log(self, record):
        self.on_log()
        self.logged.append(record)

    def close(self, failed=False):
        self.on_close()


def leave():
    sys.exit(3)


def test_a_tracker_gets_every_record_in_order():
    odd = Odd()
    apart = Apart("odd", lambda: odd)
    for step in range(100):
        apart.log({"step": step})
    apart.close()
    assert [record["step"] for record in odd.logged] == list(range(100))


def test_a_tracker_that_exits_does_not_end_the_run(capsys):
    monitors = Monitors([], [Apart("odd", lambda: Odd(on_log=leave)), Apart("even", lambda: Odd(on_close=leave))])
    monitors.log({"step": 1})
    monitors.close()
    warned = capsys.readouterr().err
    assert "odd failed and is off for the rest of the run: SystemExit: 3" in warned
    assert "even failed and is off for the rest of the run: SystemExit: 3" in warned


def test_a_tracker_that_hangs_holds_nothing_up(monkeypatch, capsys):
    monkeypatch.setattr("estune.monitor.trackers.BEHIND_S", 0.05)
    monkeypatch.setattr("estune.monitor.trackers.CLOSE_S", 0.05)
    let_go = threading.Event()
    monitors = Monitors([], [Apart("odd", lambda: Odd(on_log=let_go.wait))])
    monitors.log({"step": 1})
    let_go.wait(0.1)
    monitors.log({"step": 2})
    assert (
        "odd failed and is off for the rest of the run: the tracker has taken no record for 0.05 s"
        in capsys.readouterr().err
    )
    monitors = Monitors([], [Apart("odd", lambda: Odd(on_close=let_go.wait))])
    monitors.close()
    assert "no answer for 0.05 s" in capsys.readouterr().err
    let_go.set()


def test_a_slow_tracker_loses_nothing(monkeypatch, capsys):
    """All records together take longer than the limit, but no single record does: 0.9 of it on a false clock.

    The tracker takes half of the records during the run. It takes the others in `close`, one for each wait.
    """
    now, gate = [0.0], threading.Semaphore(0)

    def take() -> None:
        gate.acquire()
        now[0] += 0.9 * trackers.BEHIND_S

    odd = Odd(on_log=take)
    apart = Apart("odd", lambda: odd)
    wait = Apart._wait
    waits = []

    def release_and_wait(self, future, limit_s):
        waits.append(limit_s)
        gate.release()
        return wait(self, future, PATIENCE_S)

    monkeypatch.setattr(trackers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Apart, "_wait", release_and_wait)
    monitors = Monitors([], [apart])
    for step in range(20):
        monitors.log({"step": step})
        if step < 10:
            gate.release()
    monitors.close()
    assert len(odd.logged) == 20
    assert len(waits) > 10 and set(waits[:-1]) == {trackers.BEHIND_S} and waits[-1] == trackers.CLOSE_S
    assert capsys.readouterr().err == ""


@pytest.mark.real
@needs("mlflow")
def test_a_tracker_that_cannot_start_costs_no_run_that_was_to_be_overwritten(place):
    started(place, "tensorboard")
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    done = estune(*RUN, "--overwrite", "--report_to", "tensorboard", "mlflow", cwd=place,
                  env={"MLFLOW_TRACKING_URI": "nothing://here"})  # fmt: skip
    assert done.code == 2
    assert "report_to mlflow cannot start" in done.err
    assert before.items() <= {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}.items()
    assert estune(*RUN, "--overwrite", "--report_to", "tensorboard", cwd=place).code == 0
    assert not before.keys() & set((place / "run" / "tensorboard").iterdir())


@pytest.mark.real
@needs("mlflow")
def test_a_run_that_fails_is_not_finished_for_its_tracker(place):
    uri = f"sqlite:///{place / 'mlflow.db'}"
    done = estune(*RUN, "--learning_rate", 1e39, "--report_to", "mlflow", cwd=place, env={"MLFLOW_TRACKING_URI": uri})
    assert done.code == 2, done
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("estune").experiment_id])
    assert run.info.status == "FAILED"


def test_a_tracker_that_never_starts_stops_the_run(place, monkeypatch):
    let_go = threading.Event()
    monkeypatch.setitem(LOGGERS, "tensorboard", ("json", lambda *_: let_go.wait() and Odd()))
    with monkeypatch.context() as patch:
        patch.setattr("estune.monitor.trackers.START_S", 0.05)
        with pytest.raises(UserError, match=r"report_to tensorboard cannot start: TimeoutError: no answer for 0\.05 s"):
            start_logger("tensorboard", place, "run", {})
    monkeypatch.setitem(LOGGERS, "tensorboard", ("json", lambda *_: leave()))
    with pytest.raises(UserError, match="cannot start: RuntimeError: SystemExit: 3"):
        start_logger("tensorboard", place, "run", {})
    let_go.set()


def test_numbers_alone_are_drawn() -> None:
    record = {"step": 3, "reward": 1, "text": "x", "none": None, "flag": True, "pair": [1, 2], "x": 0.5}
    assert numbers(record) == {"reward": 1.0, "x": 0.5}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("ValueError: no number (rewards.py:3)", "ValueError"),
        ("KeyError (rewards.py:3)", "KeyError"),
        ("Bare", "Bare"),
        ("took longer than 5 s and was killed", "timeout"),
        ("worker process died (signal 9)", "worker"),
        ("returned 3 rewards for 4 completions", "value"),
        (NOT_FINITE, "logits"),
        (OTHER_MESSAGES, "other"),
    ],
)
def test_failed_calls_are_sent_by_kind(message: str, told: str) -> None:
    assert kind(message) == told
    calls = {message: 2, f"{message} again" if told not in ("Bare", "other") else message: 3}
    assert numbers({"rewards/f/failed_calls": calls}) == {f"rewards/f/failed_calls/{told}": float(sum(calls.values()))}


# --- the names --------------------------------------------------------------------------------------------------------
# The table of docs/monitoring.md, the records of a run, and the source of the installed TRL and transformers agree.


DOCS = Path(__file__).parents[2] / "docs" / "monitoring.md"
FUNCTIONS = ("rewards.py:raising", "rewards.py:inapplicable")


def source_of(module: str) -> str:
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    path = Path(next(iter(spec.submodule_search_locations)), *rest.split("."))
    return path.with_suffix(".py").read_text(encoding="utf-8")


def names_that_trl_logs() -> set[str]:
    """Return the keys that GRPOTrainer writes to its metrics and transformers' trainer to its logs."""
    names = set(re.findall(r'\blogs\["(\w+)"\]', source_of("transformers.trainer")))
    for node in ast.walk(ast.parse(source_of("trl.trainer.grpo_trainer"))):
        if not isinstance(node, ast.Subscript) or not ast.unparse(node.value).startswith("self._metrics["):
            continue
        if isinstance(node.slice, ast.Constant):
            names.add(str(node.slice.value))
        elif isinstance(node.slice, ast.JoinedStr):
            names.add("".join(p.value if isinstance(p, ast.Constant) else "<function>" for p in node.slice.values))
    return names


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading of docs/monitoring.md, without its first two lines."""
    text = DOCS.read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    rows = re.search(r"(?m)^\|.*\n\|[-|]+\n((?:\|.*\n)+)", text)
    assert rows is not None, heading
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows[1].splitlines()]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@needs("trl")
def test_the_table_of_names_is_that_of_a_run_and_of_trl(run, place) -> None:
    words = (*WATCHED, "--antithetic", "--step_control", "drift", "--log_completions")
    assert run(*words, "--reward_funcs", *FUNCTIONS).code == 0
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = {re.sub(r"^(eval_)?rewards/\w+/", r"\1rewards/<function>/", name) for line in lines for name in line}
    kept = {re.sub(r"^es/perturb_cos/\w+", "es/perturb_cos/<kind>", name) for name in kept}
    ours = {name: row[2] for row in table("Names") for name in names(row[0])}
    assert kept - set(ours) == set()
    of_workers = {"es/workers", "es/idle_share", "es/bytes_sent", "es/bytes_received"}
    assert set(ours) - kept == {"eval_non_finite_ratio"} | of_workers
    trl = names_that_trl_logs() | {"step"}
    for name, shared in ours.items():
        renamed = TRL_NAMES.get(name, name)
        assert (renamed.removeprefix("eval_") in trl) == (shared == "yes"), name
    absent = {name for row in table("Names of TRL that estune has no value for") for name in names(row[0])}
    patterns = [re.escape(name).replace(r"\*", ".*") for name in absent]
    others = {name for name in trl - set(ours) if not any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert others == set()


@needs("transformers")
def test_charts_have_the_names_of_transformers() -> None:
    from transformers.integrations.integration_utils import rewrite_logs

    record = {"step": 3, "reward": 1.0, "rewards/f/mean": 0.5, "eval_reward": 2.0, "eval_mean_length_tokens": 7.0}
    assert charts(record) == rewrite_logs(numbers(record))
    assert charts(record)["eval/completions/mean_length"] == 7.0


# --- the page in a browser --------------------------------------------------------------------------------------------
# The file without a network, and the live page: no errors in the browser's console.


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
WATCHED = (*TOY, "--max_steps", 3, "--population_size", 4, "--sigma", 0.1, "--num_threads", 1, "--eval_steps", 1,
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
    assert run(*WATCHED, "--log_completions", "--reward_funcs", *FUNCTIONS).code == 0
    return place / "run"


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """Serve the page of a run, and yield its address."""
    with serve([directory], "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def address(finished: Path) -> Iterator[str]:
    with served(finished) as found:
        yield found


@pytest.mark.real
@needs_browser
def test_the_file_opens_without_network_and_without_errors(finished: Path, run, place: Path) -> None:
    assert run("report", "run", "--output_dir", "page").code == 0
    html, console = look((place / "page" / "report.html").as_uri(), place)
    assert console == ""
    assert 'data-ready="true"' in html
    for heading in ("Training reward", "Held-out", "Reward functions", "Fitness of the members",
                    "Time by part of a step", "Answers of the members", "Before and after", "Configuration",
                    "Fingerprint"):  # fmt: skip
        assert f"<h2>{heading}" in html, heading
    assert html.count("<svg") >= 4
    assert "ValueError: this row is too much for me" in html and html.count('class="member"') == 4
    assert re.search(r"[0-9a-f]{32}", html)


@pytest.mark.real
@needs_browser
def test_the_live_page_is_the_same_and_says_so(address: str, place: Path) -> None:
    html, console = look(address, place)
    assert console == ""
    assert 'data-ready="true"' in html
    assert ">live</span>" in html


DRIVE = """<script>
const part = title => document.querySelector(`[data-key="${title}"]`);
const [answers, fitness, options] = ["Answers of the members", "Fitness of the members", "Configuration"];
function choose(title, kind, value) {
  const control = part(title).querySelector(kind);
  control.value = value;
  control.dispatchEvent(new Event(kind === "select" ? "change" : "input"));
}
const step = () => part(answers).querySelector(".controls span").textContent;
const state = () => [part(fitness).querySelector("input").value, step(), part(answers).querySelector("select").value,
  document.querySelector("[data-key=all]").open, part(options).querySelector("details").open,
  document.activeElement.closest("section").dataset.key, getSelection().toString(),
  scrollY > 0 && Math.round(part(answers).getBoundingClientRect().top / 4)].join("; ");
async function until(condition) { while (!condition()) await new Promise(done => setTimeout(done, 20)); }
(async () => {
  await until(() => document.querySelector("[data-key=all]"));
  choose(answers, "input", 0);
  choose(answers, "select", 1);
  choose(fitness, "input", 1);
  await until(() => step() === "step 1");
  document.querySelector("[data-key=all]").open = true;
  part(options).querySelector("details").open = false;
  part(fitness).querySelector("input").focus();
  getSelection().selectAllChildren(part(answers).querySelector(".card h3"));
  scrollTo(0, part(answers).getBoundingClientRect().top + scrollY - 100);
  const before = state(), kept = [...document.querySelectorAll("section, details, input, select, option, .card")];
  const steps = data.runs[0].steps_done, chart = part("Training reward").querySelector("svg");
  await until(() => data.runs[0].steps_done > steps);
  document.body.dataset.before = before;
  document.body.dataset.same = state() === before;
  document.body.dataset.gone = kept.filter(element => !element.isConnected).length;
  document.body.dataset.redrawn = part("Training reward").querySelector("svg") !== chart;
  choose(answers, "input", 99);
  await until(() => step() === `step ${data.runs[0].steps_done}`);
  document.body.dataset.open = document.querySelector("[data-key=all]").open;
})();
</script></body>"""


@pytest.mark.real
@needs_browser
def test_an_update_of_the_live_page_keeps_what_a_reader_opened(finished: Path, place: Path, monkeypatch) -> None:
    """The run has two steps until the page has asked for its data a second time, and then a third one."""
    for name, last in (("metrics.jsonl", 2), ("journal.jsonl", 1)):  # the journal counts from 0
        whole = (finished / name).read_text(encoding="utf-8")
        (finished / f"whole-{name}").write_text(whole, encoding="utf-8")
        kept = [line for line in whole.splitlines(keepends=True) if json.loads(line).get("step", 0) <= last]
        (finished / name).write_text("".join(kept), encoding="utf-8")
    template = report_page.TEMPLATE.read_text(encoding="utf-8")
    (place / "driven.html").write_text(template.replace("</body>", DRIVE), encoding="utf-8")
    read, asked = report_page.read_runs, []

    def growing(directories, answers_bytes=0):
        asked.append(None)
        if len(asked) == 4:  # after `serve`, the page itself, and its first request for data
            for name in ("metrics.jsonl", "journal.jsonl"):
                (finished / f"whole-{name}").rename(finished / name)
        return read(directories, answers_bytes)

    monkeypatch.setattr(report_page, "TEMPLATE", place / "driven.html")
    monkeypatch.setattr(report_page, "read_runs", growing)
    with served(finished) as address:
        html, console = look(address, place)
    assert console == ""
    assert 'data-before="1; step 1; 1; true; false; Fitness of the members; best' in html
    for name, value in {"same": "true", "gone": "0", "redrawn": "true", "open": "true"}.items():
        assert f'data-{name}="{value}"' in html, name


def test_what_the_server_answers(address: str) -> None:
    with urllib.request.urlopen(f"{address}data.json") as answer:
        data = json.loads(answer.read())
    assert data["runs"][0]["steps_done"] == 3
    assert len(data["runs"][0]["fitness"]) == 3
    assert [e["step"] for e in data["runs"][0]["evaluations"]] == [0, 1, 2, 3]
    assert data["runs"][0]["answers"] == {"steps": [1, 2, 3], "shown": []}
    with urllib.request.urlopen(f"{address}answers.json?run=0&step=2") as answer:
        assert json.loads(answer.read())["step"] == 2
    for query in ("", "?run=1&step=2", "?run=0&step=4", "?run=0&step=0", "?run=0&step=-1", "?run=x&step=2", "?step=2"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}answers.json{query}")
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


# --- the members' answers ---------------------------------------------------------------------------------------------


def completions(run_dir: Path, step: int) -> list[dict[str, Any]]:
    text = (run_dir / "completions" / f"step_{step:05d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_answers_of_a_step_are_ranked_by_fitness(finished: Path) -> None:
    found = read_answers(finished, 1)
    assert found is not None
    line = json.loads((finished / "journal.jsonl").read_text().splitlines()[1])
    records = completions(finished, 1)
    assert found["n_prompts"] == len(line["rows"]) > len(found["prompts"]) > 1
    best = sorted(range(4), key=lambda member: (-line["fitness"][member], member))
    for b, prompt in enumerate(found["prompts"]):
        models = prompt["models"]
        assert [model["member"] for model in models] == [*best, None] and prompt["n_members"] == 4
        assert [model["place"] for model in models] == ["best", None, "median", "worst", "theta"]
        for model in models:
            [record] = [r for r in records if r["member"] == model["member"]][b : b + 1]
            [[text, rewards, failed]] = model["answers"]
            beginning, length, said = prompt["texts"][text]
            assert (beginning, length) == (record["completion"], len(record["completion"]))
            givers = {r["member"] for r in records if (r["row"], r["completion"]) == (record["row"], beginning)}
            assert said == len(givers - {None})
            assert rewards == [None if r is None else pytest.approx(r, rel=1e-5) for r in record["rewards"]]
            assert failed == record.get("failed", [])
            assert ([0] if rewards[0] is None else []) == failed  # `raising` failed, `inapplicable` returned None


def test_the_answers_in_a_page_are_bounded(finished: Path) -> None:
    """Long texts are cut, then prompts and steps left out; a damaged file is passed over."""
    for step in (1, 2, 3):
        long = [{**r, "completion": f"<{i} é{r['completion']}>" * 9999, "prompt": "?" * 9999}
                for i, r in enumerate(completions(finished, step))]  # fmt: skip
        path = finished / "completions" / f"step_{step:05d}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in long), encoding="utf-8")

    def shown(limit: int) -> dict[int, int]:
        answers = read_run(finished, limit)["answers"]
        size = len(json.dumps(answers["shown"], ensure_ascii=False).replace("<", "\\u003c").encode())
        assert answers["steps"] == [1, 2, 3] and size <= limit
        texts = [text for a in answers["shown"] for prompt in a["prompts"] for text in prompt["texts"]]
        assert all(len(beginning) <= 2000 < length for beginning, length, _ in texts)
        return {a["step"]: len(a["prompts"]) for a in answers["shown"]}

    assert shown(PAGE_BYTES) == {1: 8, 2: 8, 3: 8}
    few = shown(60_000)
    assert list(few) == [3] and 1 <= few[3] < 8  # the last step comes first
    assert 1 <= shown(4_000)[3] < 8 and shown(500) == {}
    for damage in (b"{", b'{"member": 0}\n', b"\xff\n" * 12):
        (finished / "completions" / "step_00003.jsonl").write_bytes(damage)
        assert list(shown(PAGE_BYTES)) == [1, 2]


def test_the_page_of_a_long_run_stays_under_three_megabytes(finished: Path) -> None:
    """With 500 steps of 30 members, held-out texts and answers as long as the page allows."""
    data = read_run(finished)
    data |= {"steps": data["steps"][-1:] * 500, "fitness": [[-0.123456] * 30] * 500}
    sides = {name: [["<word> " * (MOST_CHARACTERS // 7), True]] for name in ("before", "after")}
    data["completions"]["rows"] = [
        {**data["completions"]["rows"][0], **sides, "prompt": "?" * MOST_CHARACTERS}
    ] * MOST_ROWS
    assert len(report_page.page({"runs": [data]}).encode()) + PAGE_BYTES < 3_000_000


def test_a_large_population_is_thinned_and_steps_are_spread(run, place: Path) -> None:
    words = [200 if word == 4 else word for word in WATCHED]
    assert run(*words, "--log_completions", "--max_steps", 1).code == 0
    found = read_answers(place / "run", 1)
    assert found is not None and len(json.dumps(found)) < STEP_BYTES
    for prompt in found["prompts"]:
        ranks = [model["rank"] for model in prompt["models"]]
        assert len(ranks) == MOST_MEMBERS + 2 and ranks == sorted(ranks)  # the median and theta beside them
        places = {model["place"]: model["rank"] for model in prompt["models"] if model["place"]}
        assert places == {"best": 1, "median": 101, "worst": 200, "theta": 201}
    assert spread(range(1, 10)) == [9, 1, 5, 3, 7, 2, 4, 6, 8] and spread([4]) == [4] and spread([]) == []
