"""Checks how a command of a fuzz case ends: in success or in one clear sentence; anything else is a `Fault`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from command_line import tree
from fuzz_forks import Done, Forks

Case = dict[str, Any]  # JSON, so that one line prints a case and repeats it
Check = Callable[[Case, Path, Forks], str]  # returns the outcome in a few words; raises Fault
ERROR = "estune: error: "
NOT_CLEAN = ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error", "core dumped")


class Domain(Protocol):
    """A module of cases: ``cases`` is a hypothesis strategy for `Case`, ``check`` a `Check`."""

    cases: Any
    check: Check


class Fault(AssertionError):
    """A case ended neither in success nor in one clear sentence."""


def refusal(done: Done, what: str) -> str | None:
    """Return the sentence with which a command was refused; None if it succeeded.

    Raises:
        Fault: the command hung, died, or did not print exactly one sentence.
    """
    if done.hung:
        raise Fault(f"{what} hangs: {tail(done)}")
    if any(words in done.err for words in NOT_CLEAN):
        raise Fault(f"{what} ends in a traceback: {tail(done)}")
    sentences = [line for line in done.err.splitlines() if line.startswith(ERROR)]
    if done.code == 0:
        if sentences:
            raise Fault(f"{what} prints an error and exits with 0: {tail(done)}")
        return None
    if done.code != 2:
        raise Fault(f"{what} exits with {done.code}: {tail(done)}")
    if len(sentences) != 1 or done.err.splitlines()[-1] != sentences[0]:
        raise Fault(f"{what} is not refused in one sentence: {tail(done)}")
    return sentences[0].removeprefix(ERROR)


def tail(done: Done) -> str:
    """Return the exit status and the end of the stderr of a command, for a report."""
    return f"exit {done.code}, stderr: ...{done.err.strip()[-1500:]}"


def label(sentence: str) -> str:
    """Return a sentence without names and numbers, so that sentences of one kind are counted together."""
    return re.sub(r"'[^']*'|\d+|[0-9a-f]{32}", "_", sentence)[:110]


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Return the names of files that differ between two results of `contents`, or exist in one only."""
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def contents(run_dir: Path) -> dict[str, Any]:
    """Return a run's files as `tree` does, but damaged metrics as bytes."""
    try:
        return tree(run_dir)
    except ValueError:
        files = {str(path.relative_to(run_dir)): path for path in run_dir.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if path.name != "origin.json"}
