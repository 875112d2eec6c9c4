"""Measures the time of `estune --help`, compared with a bare interpreter.

    python benchmarks/help_time.py

Each command is started in a new interpreter, in turns with ``python -c "import argparse, numpy"``, because `--help`
needs numpy. The ratio is that of the two medians: a slower machine changes the seconds, but hardly the ratio.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

BARE = [sys.executable, "-c", "import argparse, numpy"]
COMMANDS = {"estune --help": ["--help"], "estune train --help": ["train", "--help"]}


def seconds(command: list[str]) -> float:
    """Return the seconds from a command's start to its end.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(repetitions: int = 15) -> dict[str, Any]:
    """Time every command and the bare interpreter in turns; the first turn warms the disk cache and is left out.

    Returns:
        By command, ``help_s`` and ``bare_s`` (seconds of each turn), ``medians_s``, and ``bare_of_help`` (bare / help).
        ``slowest_s`` and ``bare_of_help`` over all commands.
    """
    result: dict[str, Any] = {}
    for name, words in COMMANDS.items():
        turns = [(seconds(BARE), seconds([sys.executable, "-m", "estune", *words])) for _ in range(repetitions + 1)]
        bare, helped = (list(column) for column in zip(*turns[1:], strict=True))
        medians = {"bare": statistics.median(bare), "help": statistics.median(helped)}
        result[name] = {
            "bare_s": bare,
            "help_s": helped,
            "medians_s": medians,
            "bare_of_help": medians["bare"] / medians["help"],
        }
    result["slowest_s"] = max(result[name]["medians_s"]["help"] for name in COMMANDS)
    result["bare_of_help"] = min(result[name]["bare_of_help"] for name in COMMANDS)
    return result


def table(result: dict[str, Any]) -> str:
    """Return the medians as text, one line a command."""
    lines = []
    for name in COMMANDS:
        medians = result[name]["medians_s"]
        lines.append(
            f"{name:22s} {medians['help']:.3f} s, bare interpreter {medians['bare']:.3f} s, bare / help "
            f"{result[name]['bare_of_help']:.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure()))
