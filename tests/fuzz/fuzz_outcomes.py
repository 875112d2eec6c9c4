"""What a command of a fuzz case may end in: success, or one clear sentence; anything else is a `Fault`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from command_line import tree
from fuzz_forks import Done, Forks

Case = dict[str, Any]  # JSON: a case is printed, and run again, as one line
Check = Callable[[Case, Path, Forks], str]  # returns the outcome in a few words; raises Fault
ERROR = "estune: error: "
NOT_CLEAN = ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error", "core dumped")


class Domain(Protocol):
    """A module of cases: ``cases`` is a hypothesis strategy for `Case`, ``check`` a `Check`."""

    cases: Any
    check: Check


class Fault(AssertionError):
    """A case ended in something that no user should see."""


def refusal(done: Done, what: str) -> str | None:
    """Return the sentence that a command was refused with; None where it succeeded.

    Raises:
        Fault: it hung, died, or told more or less than one sentence.
    """
    if done.hung:
        raise Fault(f"{what} hangs: {tail(done)}")
    if any(words in done.err for words in NOT_CLEAN):
        raise Fault(f"{what} ends in a traceback: {tail(done)}")
    sentences = [line for line in done.err.splitlines() if line.startswith(ERROR)]
    if done.code == 0:
        if sentences:
            raise Fault(f"{what} tells an error and exits with 0: {tail(done)}")
        return None
    if done.code != 2:
        raise Fault(f"{what} exits with {done.code}: {tail(done)}")
    if len(sentences) != 1 or done.err.splitlines()[-1] != sentences[0]:
        raise Fault(f"{what} is not refused in one sentence: {tail(done)}")
    return sentences[0].removeprefix(ERROR)


def tail(done: Done) -> str:
    """Return the end of what a command told, for a report."""
    return f"exit {done.code}, stderr: ...{done.err.strip()[-1500:]}"


def label(sentence: str) -> str:
    """Return a sentence without what differs from case to case, to count its kind by."""
    return re.sub(r"'[^']*'|\d+|[0-9a-f]{32}", "_", sentence)[:110]


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return the names of files that differ between two trees of `contents`, or are in one only."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def contents(run_dir: Path) -> dict[str, Any]:
    """Return a run's files as `tree` does; metrics as bytes where they are not whole."""
    try:
        return tree(run_dir)
    except ValueError:
        files = {str(path.relative_to(run_dir)): path for path in run_dir.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if path.name != "origin.json"}
