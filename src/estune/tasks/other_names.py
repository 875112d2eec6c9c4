"""Other names of tasks: names of datasets, other spellings, reasoning-gym's names without ``rg:``."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection

from estune.errors import nearest

GSM8K = ("gsm_symbolic", "problems from templates of GSM8K; with --dataset_name, GSM8K's own rows work, too")
MATH = ("math", "problems of its own; with --dataset_name, the rows of that set work, too")
ARC_AGI = ("arc_agi", "")
MINI_SUDOKU = ("mini_sudoku", "")
COUNTDOWN = ("countdown", "")
# A name in lower case, only letters and digits -> the task, and a remark for the suggestion.
OTHER_NAMES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("gsm", "gsm8k", "gsm8ksymbolic", "gradeschoolmath"), GSM8K),
    **dict.fromkeys(("math500", "math12k", "hendrycksmath", "competitionmath", "mathlighteval", "minervamath", "amc",
                     "amc23", "aime", "aime24", "aime25", "aime2024", "aime2025", "olympiadbench"), MATH),
    **dict.fromkeys(("arc", "arcagi1", "arcprize"), ARC_AGI),
    **dict.fromkeys(("1darc", "arc1"), ("arc_1d", "")),
    **dict.fromkeys(("sudoku4", "sudoku4x4", "4x4sudoku", "sudokumini", "smallsudoku"), MINI_SUDOKU),
    **dict.fromkeys(("sudoku9", "sudoku9x9", "9x9sudoku"), ("sudoku", "")),
    **dict.fromkeys(("countdowntask", "countdowntasks", "countdowntasks3to4", "countdowngame", "tinyzero"),
                    COUNTDOWN),
    **dict.fromkeys(("concise", "brevity"), ("conciseness", "")),
}  # fmt: skip
WITH_VARIANTS = ("arc_agi", "chain")  # tasks with variants after a colon
GENERATORS = re.compile(r"(?:rg|reasoning[_-]?gym)(?:[:/._-]+|$)", re.IGNORECASE)


def hint(name: str, tasks: Collection[str]) -> str:
    """Return ``; did you mean ...?`` for the name of no task, or an empty string.

    ``tasks`` are the built-in ones. An owner before a slash (``openai/gsm8k``), case, dashes and underscores do not
    count.
    """
    owner = GENERATORS.match(name)
    if owner:
        return _of_generators(name[owner.end() :]) or "; write rg:NAME for a task of reasoning-gym"
    head, colon, variant = name.rpartition("/")[2].partition(":")
    bare = _bare(head)
    for task in tasks:
        if bare == _bare(task):
            return _suggestion(f"{task}{colon}{variant}" if task in WITH_VARIANTS else task)
    if bare in OTHER_NAMES:
        task, remark = OTHER_NAMES[bare]
        return _suggestion(f"{task}{colon}{variant}" if task in WITH_VARIANTS else task, remark)
    return nearest(head, tasks) or _of_generators(name)


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _suggestion(task: str, remark: str = "") -> str:
    return f"; did you mean {task!r}?" + (f" ({remark})" if remark else "")


def _of_generators(name: str) -> str:
    """Return a suggestion for the name of a reasoning-gym generator, or one near it; empty without that package."""
    head, colon, levels = name.partition(":")
    if not _bare(head) or importlib.util.find_spec("reasoning_gym") is None:
        return ""
    from estune.tasks import reasoning

    known = reasoning.names()
    matches = [generator for generator in known if _bare(generator) == _bare(head)]
    if matches:
        return _suggestion(f"rg:{matches[0]}{colon}{levels}")
    return nearest(head, known).replace("'", "'rg:", 1)
