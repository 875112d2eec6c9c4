"""A run of a comparison: stopped at every point, measured once at each budget, never on the wrong model.

The processes are simulated: a run is a directory whose metrics grow by a step of 10 evaluations and 2 seconds.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from estune.compare.job import FACTS_FILE, Job, read_usage
from estune.compare.processes import Stopped
from estune.compare.worker import Outcome
from estune.config import ESConfig

TEMPLATE = "{{ messages[0].content }}"


def measure(model: str, file: Path, facts: dict[str, Any]) -> None:
    """Write a result with the model's weights and chat template."""
    weights = (Path(model) / "model.safetensors").read_text()
    asked = (Path(model) / "chat_template.jinja").read_text()
    file.write_text(json.dumps({**facts, "status": "done", "weights": weights, "asked": asked}))


class FakeProcesses:
    """Stands in for `Processes`; the comparison is stopped at call number ``cut``, counted from 0."""

    def __init__(self, cut: int = -1, broken: str = "", unmeasured: bool = False) -> None:
        self.calls: list[str] = []
        self.cut, self.broken, self.unmeasured = cut, broken, unmeasured

    def _called(self, what: str) -> None:
        self.calls.append(what)
        if len(self.calls) - 1 == self.cut:
            raise Stopped

    def train(self, args: ESConfig) -> Outcome:
        run = Path(str(args.output_dir))
        (run / "trainer" / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        (run / "trainer" / "samples.jsonl").touch()
        metrics = run / "metrics.jsonl"
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        while done < args.max_steps and not (args.max_time_s and 2.0 * done >= args.max_time_s):
            done += 1
            record = {"step": done, "num_evaluations": 10 * done, "train_time_s": 2.0 * done}
            with metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if done == 2:
                self._called("step 2")  # a stop in the midst of training: what was done is kept
        if self.broken:
            self._called("train")
            return Outcome(1, self.broken)
        for name, text in (("model.safetensors", f"after {done}"), ("es_config.json", '{"seed": 3, "max_steps": 9}'),
                           ("chat_template.jinja", TEMPLATE), ("modeling_own.py", "code")):  # fmt: skip
            new = run / f".{name}.partial"
            new.write_text(text)
            new.rename(run / name)
        (run / "additional_chat_templates").mkdir(exist_ok=True)
        (run / "additional_chat_templates" / "tool.jinja").touch()
        self._called("train")
        return Outcome(0)

    def wait_for_orphan(self, directory: Path) -> None:
        """Return at once: there is no orphaned run."""

    def call(self, function: Any, arguments: tuple[Any, ...], log: str) -> Outcome:
        self._called("measure")
        if self.unmeasured:
            return Outcome(1, "no memory")
        function(*arguments)
        return Outcome(0)


def job(
    directory: Path, steps: int = 5, time_s: float = 6.0, budgets: Any = ("evaluations", "time"), **more: Any
) -> Job:
    args = ESConfig(task="countdown", output_dir=str(directory / "run"), max_steps=steps)
    files = {budget: directory / "results" / f"{budget}.json" for budget in budgets}
    made = Job("m/es/seed-0", directory, args, time_s, files, directory / "models" / "seed-0", {"seed": 0}, measure,
               "c")  # fmt: skip
    return dataclasses.replace(made, **more)


def results(made: Job) -> dict[str, Any]:
    return {budget: json.loads(file.read_text()) for budget, file in made.files.items() if file.exists()}


WEIGHTS = {(5, 6.0): ("after 5", "after 3"), (3, 10.0): ("after 3", "after 5"), (4, 8.0): ("after 4", "after 4")}


@pytest.mark.parametrize(("steps", "time_s"), WEIGHTS, ids=["time first", "evaluations first", "both at once"])
def test_each_budget_is_measured_on_its_own_snapshot(tmp_path: Path, steps: int, time_s: float) -> None:
    processes, made = FakeProcesses(), job(tmp_path, steps, time_s)
    made.run(processes)
    found = results(made)
    assert (found["evaluations"]["weights"], found["time"]["weights"]) == WEIGHTS[steps, time_s]
    assert found["evaluations"]["evaluations"] == 10 * steps and found["time"]["train_time_s"] == time_s
    assert processes.calls.count("measure") == (1 if steps == 4 else 2)  # one model that meets both is measured once
    for budget in found:
        kept = tmp_path / found[budget]["measured"]
        assert kept.name == f"seed-0-{budget}" and (kept / "model.safetensors").read_text() == found[budget]["weights"]
        assert found[budget]["settings"] == {"seed": 3} and found[budget]["trained_by"] == ["c"]
    before = list(processes.calls)
    made.run(processes)
    assert processes.calls == before


def test_a_snapshot_is_complete(tmp_path: Path) -> None:
    """A snapshot has chat templates and code: without them prompts would differ from those of training."""
    made = job(tmp_path)
    made.run(FakeProcesses())
    assert results(made)["time"]["asked"] == TEMPLATE
    kept = {str(path.relative_to(tmp_path / "models" / "seed-0-time"))
            for path in (tmp_path / "models" / "seed-0-time").rglob("*")}  # fmt: skip
    assert kept == {"model.safetensors", "es_config.json", "chat_template.jinja", "modeling_own.py",
                    "additional_chat_templates", "additional_chat_templates/tool.jinja", FACTS_FILE}  # fmt: skip


@pytest.mark.parametrize("keeps_snapshots", [True, False])
@pytest.mark.parametrize(("steps", "time_s"), WEIGHTS, ids=["time first", "evaluations first", "both at once"])
def test_stopped_anywhere_it_ends_in_the_same_results(
    tmp_path: Path, steps: int, time_s: float, keeps_snapshots: bool
) -> None:
    whole = job(tmp_path / "whole", steps, time_s, keeps_snapshots=keeps_snapshots)
    processes = FakeProcesses()
    whole.run(processes)
    for cut in range(len(processes.calls)):
        made = job(tmp_path / str(cut), steps, time_s, keeps_snapshots=keeps_snapshots)
        with pytest.raises(Stopped):
            made.run(FakeProcesses(cut))
        assert all(result["status"] == "done" for result in results(made).values())
        made.run(FakeProcesses())
        assert results(made) == results(whole)
        assert len(list((tmp_path / str(cut) / "models").iterdir())) == (2 if keeps_snapshots else 0)


@pytest.mark.parametrize("budget", ["evaluations", "time"])
def test_a_result_that_was_deleted_is_measured_again_or_trained_anew(tmp_path: Path, budget: str) -> None:
    """From the snapshot if it exists, else from a new run, because the old run is past that budget."""
    for keeps_snapshots in (True, False):
        made = job(tmp_path / str(keeps_snapshots), keeps_snapshots=keeps_snapshots)
        made.run(FakeProcesses())
        before = results(made)
        made.files[budget].unlink()
        again = FakeProcesses()
        made.run(again)
        assert results(made) == before
        assert ("train" in again.calls) != keeps_snapshots


def test_a_run_that_failed_is_a_row_at_both_budgets_and_not_tried_again(tmp_path: Path) -> None:
    made = job(tmp_path)
    made.run(FakeProcesses(broken="it diverged"))
    found = results(made)
    assert {(found[budget]["status"], found[budget]["error"]) for budget in found} == {("failed", "it diverged")}
    assert not list((tmp_path / "run" / "trainer").glob("checkpoint-*"))  # nothing that only a resume would need
    again = FakeProcesses()
    made.run(again)
    assert not again.calls and len(found) == 2


def test_a_model_that_could_not_be_measured_stays(tmp_path: Path) -> None:
    for keeps_snapshots in (True, False):
        made = job(tmp_path / str(keeps_snapshots), keeps_snapshots=keeps_snapshots)
        made.run(FakeProcesses(unmeasured=True))
        made.run(FakeProcesses(unmeasured=True))  # what is written down is not tried again
        assert all(
            (result["status"], result["error"]) == ("unmeasured", "no memory") for result in results(made).values()
        )
        for file in made.files.values():
            file.unlink()
        again = FakeProcesses()
        made.run(again)
        assert "train" not in again.calls and results(made)["time"]["weights"] == "after 3"


def test_a_result_names_every_code_that_trained_the_run(tmp_path: Path) -> None:
    """A stopped run is resumed with the present code; a new run was trained by the present code alone."""
    with pytest.raises(Stopped):
        job(tmp_path).run(FakeProcesses(0))
    for code in ("d", "c", "d"):
        made = job(tmp_path, code=code)
        with pytest.raises(Stopped):
            made.run(FakeProcesses(0))
    made.run(FakeProcesses())
    assert {tuple(found["trained_by"]) for found in results(made).values()} == {("c", "d")}
    shutil.rmtree(tmp_path / "run")
    for place in ("models", "results"):
        shutil.rmtree(tmp_path / place)
    made.run(FakeProcesses())
    assert {tuple(found["trained_by"]) for found in results(made).values()} == {("d",)}


def test_samples_of_a_run_without_a_step_count(tmp_path: Path) -> None:
    (tmp_path / "method.json").write_text(json.dumps({"samples_drawn": 784, "drawing_s": 90.0}))
    for record in ({}, {"step": 0, "eval_reward": 0.5, "eval_accuracy": 0.25}):
        (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(record)}\n" if record else "")
        used = read_usage(tmp_path)
        assert (used["evaluations"], used["train_time_s"], used["steps"]) == (784, 90.0, 0)


def test_a_record_without_a_time_is_read(tmp_path: Path) -> None:
    """A run that was killed and resumed may have records without a time."""
    made = job(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "num_evaluations": 10}) + "\n")
    made.run(FakeProcesses())
    assert results(made)["time"]["weights"] == "after 3"


def test_a_run_that_ends_before_its_budget_says_so(tmp_path: Path) -> None:
    made = job(tmp_path, steps=5, budgets=("evaluations",))

    class Lazy(FakeProcesses):
        def train(self, args: ESConfig) -> Outcome:
            return super().train(dataclasses.replace(args, max_steps=2))

    made.run(Lazy())
    assert "ended after 2 steps, before any of its budgets" in results(made)["evaluations"]["error"]


def test_training_samples_stay_and_optimizer_states_are_deleted(tmp_path: Path) -> None:
    for budgets in (("evaluations",), ("time",)):
        made = job(tmp_path / budgets[0], budgets=budgets)
        made.run(FakeProcesses())
        assert [path.name for path in (tmp_path / budgets[0] / "run" / "trainer").iterdir()] == ["samples.jsonl"]
        assert results(made)[budgets[0]]["status"] == "done"
