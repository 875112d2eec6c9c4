"""Every command in `docs/` and every example runs as written; generated pages, listings and figures are true."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shells import Shell

from estune import cli, config, tasks
from estune.config import ESConfig
from estune.errors import UserError

pytestmark = pytest.mark.miniature

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem not in ("decisions", "log", "cli"))
WRITTEN_BY_RUNS = ("README.md", "report.html", "trackers.json")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path, tmp_path: Path, shell: Shell) -> None:
    """Blocks of one page share a directory, and a block that begins with a file's name is that file.

    Blocks marked ``console`` need a download; `test_fetch_registry` runs those of the quickstart.
    """
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for language, text in re.findall(r"```(bash|python)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        if name := re.match(r"# (\w+\.py)\n", text):
            (tmp_path / name[1]).write_text(text, encoding="utf-8")
        else:
            shell.check(text, tmp_path, language)
    if page.stem == "extending":  # its engine learns, as the page says
        lines = (tmp_path / "runs/bigram/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        first, last = (json.loads(line)["reward"] for line in (lines[0], lines[-1]))
        assert last > 10 * first


@pytest.mark.parametrize("name", ["quickstart", "custom_reward", "custom_dataset"])
def test_every_example_runs(name: str, tmp_path: Path, shell: Shell) -> None:
    shell.check(f"python '{ROOT / 'examples' / name}.py'", tmp_path)
    assert (tmp_path / "runs" / name / "model.safetensors").is_file()


def test_a_reward_takes_less_than_twenty_lines() -> None:
    assert len((ROOT / "examples" / "custom_reward.py").read_text(encoding="utf-8").splitlines()) < 20


@pytest.mark.e2e
def test_the_notebook_runs(tmp_path: Path) -> None:
    """The notebook runs as in Jupyter: in a kernel, cell after cell."""
    nbclient = pytest.importorskip("nbclient", reason="runs notebooks")
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.e2e
def test_both_columns_of_the_page_for_trl_run(tmp_path: Path, shell: Shell) -> None:
    """Both scripts run unchanged but for the model, the number of steps, and the options of a machine without a GPU."""
    pytest.importorskip("trl", reason="one of the scripts is TRL's")
    rows = [{"prompt": f"What is {n} + {n}? ", "answer": str(2 * n)} for n in range(40)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    blocks = re.findall(r"```py title=.*?\n(.*?)```", (ROOT / "docs" / "trl.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    here = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': "MODEL",
        "max_steps=100": "max_steps=2",
        "_steps=20": "_steps=1",
        "max_completion_length=64": "max_completion_length=8",
        "GRPOConfig(\n": "GRPOConfig(\n    bf16=False, use_cpu=True, report_to=[], per_device_eval_batch_size=8,\n",
    }
    for text in blocks:
        for old, new in here.items():
            text = text.replace(old, new)
        text = f"from estune.models.names import local_directory\nMODEL = str(local_directory('tiny'))\n{text}"
        shell.check(text, tmp_path, "python")
        assert (tmp_path / "tuned" / "model.safetensors").is_file()


@pytest.mark.e2e
def test_every_name_of_other_programs_gets_an_answer(tmp_path: Path, shell: Shell) -> None:
    shell.check(f"python '{ROOT / 'scripts' / 'answers.py'}' --check", tmp_path)


@pytest.mark.parametrize("page", ["cli", "resuming", "trl"])
def test_a_generated_page_equals_the_programs_output(page: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "reference.py"), page]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") == done.stdout


def test_the_architecture_page_equals_the_programs_output() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "architecture.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["docs/architecture", "docs/decisions", "docs/benchmarks", "CONTRIBUTING", "README"])
def test_named_files_exist(page: str) -> None:
    """Paths in running text are those of the repository, of the package, or of the results."""
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8").split("\n## Every file\n")[0]
    if page == "docs/decisions":
        text = "".join(re.findall(r"\*\*Where:\*\*.*\n", text))
    roots = (ROOT, ROOT / "src" / "estune", ROOT / "benchmarks" / "results")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for name in re.findall(r"`((?:[\w.-]+/)*[\w.-]+(?:\.py|\.md|\.yaml|\.json|/))`", text):
        if name not in WRITTEN_BY_RUNS:
            assert any((root / name).exists() for root in roots), f"{page}: {name}"


def test_pages_import_public_names() -> None:
    """Every name that an example or a page imports from estune has an entry on the page of the Python API."""
    sources = [*PAGES, ROOT / "README.md", *(ROOT / "examples").iterdir()]
    texts = [path.read_text(encoding="utf-8") for path in sources if path.is_file()]
    imports = {
        found for text in texts for found in re.findall(r"^ *\"?from (estune[\w.]*) import ([\w, ]+)", text, re.M)
    }
    names = {f"{module}.{name.strip()}" for module, listed in imports for name in listed.split(",")}
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = set()
    for block in page.split("\n::: ")[1:]:
        module = block.split()[0]
        members = re.search(r"^      members: \[(.*)\]", block, re.M)
        entries |= {module, *(f"{module}.{name}" for name in (members[1].split(", ") if members else ()))}
    assert len(names) > 12
    assert names - entries - {"estune.tasks.countdown"} == {"estune.errors.UserError"}  # the home of estune.UserError


def test_a_task_takes_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The task of `docs/extending.md` works like a built-in task."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    module = re.findall(r"```python\n(# letters\.py\n.*?)```", text, flags=re.DOTALL)[0]
    (tmp_path / "letters.py").write_text(module, encoding="utf-8")
    line = re.findall(r"^(_built_in\(.*\)),$", text, flags=re.MULTILINE)[0]
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])  # as if the file were in the package
    task = eval(line, vars(tasks))
    del tasks.letters, sys.modules["estune.tasks.letters"]
    splits = [task.load(split) for split in task.splits]
    assert list(map(len, splits)) == [200, 200, 1000]
    assert len({row["prompt"] for rows in splits for row in rows}) == 1400
    for bad in ({"word": "abc"}, {"word": 5, "letter": "a"}):
        with pytest.raises(UserError, match="columns word and letter, both text"):
            task.prepare_row(bad)
    row = splits[0][0]
    answers = [task.right_answer(row), "<answer>9</answer>", "1"]
    columns = {name: [row[name]] * len(answers) for name in task.columns}
    assert task.reward(answers, **columns) == [1.0, 0.1, 0.0]
    assert task.accuracy(answers, **columns) == [1.0, 0.0, 0.0]


def test_decisions_are_few_and_have_four_fields() -> None:
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    _, *entries = text.split("\n### ")
    assert len(entries) <= 60
    for entry in entries:
        fields = re.findall(r"^\* \*\*(\w+):\*\*", entry, flags=re.MULTILINE)
        assert fields == ["Decision", "Alternatives", "Why", "Where"], entry.splitlines()[0]


def test_the_log_is_dated_and_newest_first() -> None:
    text = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    dates = [heading.split(": ")[0] for heading in headings]
    assert all(re.fullmatch(r"\d{4}-\d{2}-\d{2}", date) for date in dates)
    assert dates == sorted(dates, reverse=True)


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_figures_of_speed_and_memory_are_those_of_the_results() -> None:
    page = " ".join((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split())
    bench, memory, gain, ninety = (result(name) for name in ("bench", "memory", "demo_gain", "demo_time"))
    kernels, step = bench["kernels"]["ratios"], bench["step"]
    small, large = (step[case]["ratios"] for case in ("conciseness", "countdown"))
    peers = [
        bench["peers"][name]["peer / estune low-rank"] for name in ("torcheggroll", "eggroll-es", "mezo", "evotorch")
    ]
    gpu = result("step_gpu")["cases"]["conciseness"]
    alike, brief = result("equivalence"), result("conciseness")
    expected = [
        f"{kernels['loop_speedup']:.0f} times as fast",
        f"{kernels['update_speedup']:.0f} times as fast",
        f"{kernels['perturb_of_roof']:.0%}".replace("%", " % of its speed"),
        *(f"{ratios['pure / lowrank']['median']:.0%}".replace("%", " % of its speed") for ratios in (small, large)),
        f"{min(small['pure / lowrank']['each']):.0%} to {max(small['pure / lowrank']['each']):.0%}".replace("%", "", 1)
        .replace("%", " %"),
        *(f"{ratios['paper / lowrank']['median']:.1f} times the time of a low-rank step, "
          f"{ratios['paper / full']['median']:.1f} times that of a full-rank step" for ratios in (small, large)),
        "{:.0f}, {:.0f}, {:.0f} and {:.0f} times".format(*peers),
        f"{small['pure_shared / lowrank']['median']:.0%} of a low-rank step's time".replace("%", " %"),
        f"({bench['growth']['steps']['journal_bytes_per_step']:.0f} bytes",
        *(f"| {memory['models'][model]['noise']['full']['train']['ratio']:.2f} | "
          f"{memory['models'][model]['noise']['lowrank']['train']['ratio']:.2f} |" for model in ("0.5B", "1.5B")),
        f"takes {gpu['variants']['lowrank']['step_seconds']:.2f} s",
        f"{gpu['ratios']['pure / lowrank']['median']:.2f} of the speed",
        f"{gpu['ratios']['paper / lowrank']['median']:.1f} times as long",
        f"greedy | {100 * gain['base']['accuracy']:.2f} %",
        f"`<think>` | {100 * gain['base_forced']['accuracy']:.2f} %",
        *(f"seed {its['seed']}, {its['seconds']:.0f} s | {100 * its['tuned']['accuracy']:.2f} %"
          for its in gain["runs"]),
        f"gain is {gain['mean_gain_points']:.1f} points",
        *(f"{ninety['mean_gain_points'][noise]:.1f} points" for noise in ("full", "lowrank")),
        *(f"| {alike[what]['10']['points']:+.1f} (" for what in ("lowrank", "randn")),
        *(f"| {alike[what]['25']['points']:+.2f} (" for what in ("lowrank", "randn")),
        *(f"| seed {its['seed']} | {its['distance']:.1f} | {its['knowledge_distance']:.1f} | "
          f"{100 * its['correct']:.1f} % |" for its in brief["runs"]),
    ]  # fmt: skip
    assert [text for text in expected if text not in page] == []


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
    known = {flag.lstrip("-") for parser in cli.build_parsers()[1].values() for flag in parser._option_string_actions}
    known |= {"source", "wheel", "completions", "run", "easy"}  # of scripts and of other programs
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        text = re.sub(
            r"<!-- answers -->.*<!-- end of answers -->", "", text, flags=re.DOTALL
        )  # typed wrongly on purpose
        for script, options in re.findall(r"`python ((?:benchmarks|scripts)/\w+\.py)([^`]*)`", text):
            source = (ROOT / script).read_text(encoding="utf-8")
            for name in re.findall(r"--(\w+)", options):
                assert f'"--{name}"' in source, f"{page.name}: {script} --{name}"
        text = re.sub(r"`(?:python (?:benchmarks|scripts)/\w+\.py|ray )[^`]*`", "", text)
        for name in re.findall(r"--(\w+)", text):
            assert name in known, f"{page.name}: --{name}"
