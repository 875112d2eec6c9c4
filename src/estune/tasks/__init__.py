"""The built-in tasks: one file each, and the dict `TASKS` of all of them."""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from estune.errors import UserError
from estune.tasks import arc_agi, chain, maths, mixture, reasoning, sudoku
from estune.tasks.other_names import hint

__all__ = ["TASKS", "Task", "get_task"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task: its rows, and the functions that score completions (both follow TRL's contract)."""

    name: str
    description: str
    load: Callable[[str], list[Row]]
    """Split name -> rows; each row has "prompt" and the columns below."""
    prepare_row: Callable[[Row], Row]
    """A row of the user's file -> a row of this task; UserError names missing columns."""
    reward: Callable[..., list[float]]
    """The value that training maximises, per completion."""
    accuracy: Callable[..., list[float]]
    """The value that evaluations report: 1.0 or 0.0 per completion."""
    columns: tuple[str, ...]
    """The columns that reward and accuracy need."""
    splits: tuple[str, ...] = ("train", "validation", "test")
    """For training, for evaluations within a run, and for the final evaluation; further splits are for evaluation."""
    runs_code: bool = False
    """Whether scoring runs code that the model wrote, which needs the sandbox or the user's consent."""
    problem_columns: tuple[str, ...] = ()
    """Columns of the user's file; the first one present makes the prompt of a row without a prompt."""
    right_answer: Callable[[Row], str | None] | None = None
    """A right completion of a row that can be right for other rows too; None if there is no such completion."""
    answers_hold_words: bool = True
    """Whether right completions hold words, if `right_answer` gives none; expressions and grids hold none."""
    final_answer: Callable[[Row, str], str | None] | None = None
    """The answer in a completion of a row as text, without differences of layout; None if scoring cannot read one.

    None instead of a function: the task has no answers that can be counted. The entropy of answers counts texts, and
    then whole completions.
    """
    equal_answers: Callable[[Row, str, str], bool] | None = None
    """Whether two final answers to a row are equal; needed only if equal answers can have different texts."""


def _built_in(name: str, description: str, *columns: str) -> Task:
    """Return the task of the module ``estune.tasks.<name>``."""
    module: Any = importlib.import_module(f"estune.tasks.{name}")
    return Task(
        name=name,
        description=description,
        load=module.load,
        prepare_row=module.prepare_row,
        reward=module.reward,
        accuracy=module.accuracy,
        columns=columns,
        splits=getattr(module, "SPLITS", Task.splits),
        problem_columns=getattr(module, "PROBLEM_COLUMNS", ()),
        right_answer=getattr(module, "right_answer", None),
        answers_hold_words=getattr(module, "ANSWERS_HOLD_WORDS", Task.answers_hold_words),
        final_answer=getattr(module, "final_answer", None),
        equal_answers=getattr(module, "equal_answers", None),
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _built_in("arc_1d", "find the rule from three rows of digits and apply it to a fourth", "puzzle", "solution"),
        _built_in("arc_agi", "ARC-AGI-1: find the rule from a few grids and apply it to another, or write it as a "
                  "program (arc_agi:python)", "inputs", "outputs"),
        _built_in("chain", "carry out k = 1, 2, 4, 8 or 16 steps on one digit, each on the result of the one before "
                  "(chain:K, chain:K:steps)", "results"),
        _built_in("conciseness", "answer short questions in as few characters as the shortest right answer has",
                  "answer", "answers"),
        _built_in("countdown", "reach a target from 3 or 4 numbers, each used exactly once, with + - * / and "
                  "parentheses", "numbers", "target"),
        _built_in("gsm_symbolic", "solve a problem told as a short story; the answer is one number", "answer"),
        Task("math", "solve a problem and put the answer in \\boxed{}; with --dataset_name, problems of your own",
             maths.load, maths.prepare_row, maths.reward, maths.accuracy, ("answer",), maths.SPLITS,
             problem_columns=maths.PROBLEM_COLUMNS, right_answer=maths.right_answer,
             final_answer=maths.final_answer, equal_answers=maths.equal_answers),
        Task("mini_sudoku", "complete a 4x4 grid", sudoku.load_mini, sudoku.prepare_row, sudoku.reward,
             sudoku.accuracy, ("puzzle", "solution"), answers_hold_words=sudoku.ANSWERS_HOLD_WORDS,
             final_answer=sudoku.final_answer),
        _built_in("quadratic", "the toy engine's: move every coordinate of a vector to a wanted value", "wanted"),
        _built_in("sudoku", "complete a 9x9 grid", "puzzle", "solution"),
    )
}  # fmt: skip


def get_task(name: str, allow_unsandboxed_code: bool = False) -> Task:
    """Return the task of a name: a built-in one, ``rg:<name>`` of reasoning-gym, or a mixture ``a=2,b=1``.

    ``allow_unsandboxed_code`` is passed to the rewards of tasks that run code; the sandbox is not tried here.

    Raises:
        UserError: there is no such task; the message names the nearest one.
    """
    if name in TASKS:
        return TASKS[name]
    if "," in name or "=" in name:
        return _mixture(name, allow_unsandboxed_code)
    if name.startswith("arc_agi:"):
        return _arc_agi(name, allow_unsandboxed_code)
    if name.startswith("chain:"):
        return _chain(name)
    if name.startswith(reasoning.PREFIX):
        return _reasoning(name, allow_unsandboxed_code)
    raise UserError(f"there is no task {name!r}{hint(name, TASKS)}; tasks: {', '.join(TASKS)}, rg:NAME of "
                    "reasoning-gym, or a mixture like countdown=2,rg:NAME=1")  # fmt: skip


def _chain(name: str) -> Task:
    lengths, reward = chain.variant(name)
    return dataclasses.replace(TASKS["chain"], name=name, load=lambda split: chain.load(split, lengths), reward=reward)


def _arc_agi(name: str, allow_unsandboxed_code: bool) -> Task:
    python, load = arc_agi.variant(name)
    plain = dataclasses.replace(TASKS["arc_agi"], name=name, load=load)
    if not python:
        return plain
    return dataclasses.replace(
        plain,
        prepare_row=lambda row: arc_agi.prepare_row(row, python=True),
        reward=arc_agi.Programs(allow_unsandboxed_code, "reward"),
        accuracy=arc_agi.Programs(allow_unsandboxed_code, "accuracy"),
        columns=("examples", "inputs", "outputs"),
        runs_code=True,
        answers_hold_words=True,  # a program's
        final_answer=None,  # programs that do the same have many texts
    )


def _reasoning(name: str, allow_unsandboxed_code: bool) -> Task:
    generator, exact = reasoning.generator_of(name.removeprefix(reasoning.PREFIX))
    runs_answers = reasoning.runs_answers(generator)
    if runs_answers and not allow_unsandboxed_code:
        raise UserError(
            f"reasoning-gym's scorer of {generator} runs the model's answer as Python, without a sandbox; to allow it, "
            "on a machine where it can do no harm: --allow_unsandboxed_code"
        )
    return Task(
        name=name,
        description=f"reasoning-gym's {generator}",
        load=lambda split: reasoning.rows_of(generator)[split],
        prepare_row=lambda row: reasoning.prepare_row(row, generator),
        reward=reasoning.accuracy if exact else reasoning.reward,
        accuracy=reasoning.accuracy,
        columns=("rg_task", "rg_entry"),
        runs_code=runs_answers,
        right_answer=reasoning.right_answer,
        final_answer=reasoning.final_answer,
    )


def _mixture(text: str, allow_unsandboxed_code: bool) -> Task:
    parts = mixture.parse(text)
    names, weights = [name for name, _ in parts], [weight for _, weight in parts]
    tasks = {name: get_task(name, allow_unsandboxed_code) for name in names}
    if "quadratic" in tasks:
        raise UserError("task quadratic has no language: it cannot be part of a mixture")

    def prepare_row(row: Row) -> Row:
        if row.get("task") not in tasks:
            raise UserError(f"a row of the mixture {text} needs the column task, one of {', '.join(names)}")
        return tasks[row["task"]].prepare_row(row)

    def right_answer(row: Row) -> str | None:
        of_task = tasks[row["task"]].right_answer
        return None if of_task is None else of_task(row)

    def final_answer(row: Row, completion: str) -> str | None:
        of_task = tasks[row["task"]].final_answer
        return None if of_task is None else of_task(row, completion)

    def equal_answers(row: Row, first: str, second: str) -> bool:
        of_task = tasks[row["task"]].equal_answers
        return first == second if of_task is None else of_task(row, first, second)

    return Task(
        name=text,
        description=f"a mixture of {', '.join(names)}",
        load=lambda split: mixture.blend(
            [tasks[n].load(split) for n in names], weights, names, repeat=split == "train"
        ),
        prepare_row=prepare_row,
        reward=mixture.Dispatch({name: task.reward for name, task in tasks.items()}, "reward"),
        accuracy=mixture.Dispatch({name: task.accuracy for name, task in tasks.items()}, "accuracy"),
        right_answer=right_answer,
        answers_hold_words=2 * sum(weight for name, weight in parts if tasks[name].answers_hold_words) >= sum(weights),
        columns=("task",),
        final_answer=None if any(task.final_answer is None for task in tasks.values()) else final_answer,
        equal_answers=equal_answers,
        runs_code=any(task.runs_code for task in tasks.values()),
    )
