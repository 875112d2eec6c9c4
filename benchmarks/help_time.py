"""How long `estune --help` takes, beside an interpreter that only imports what help cannot do without.

    python benchmarks/help_time.py

Each command line is started as a user starts it, in a fresh interpreter, by turns with ``python -c "import argparse,
numpy"``: numpy is the one package that the options' descriptions need. The ratio is that of the two medians, so a
slower machine changes the seconds and not the ratio.
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
        subprocess.CalledProcessError: it failed.
    """
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(repetitions: int = 15) -> dict[str, Any]:
    """Time every command and the bare interpreter by turns; the first turn, which fills the disk's cache, is left out.

    Returns:
        Per command ``help_s`` and ``bare_s`` (seconds of each turn), their medians, and ``bare_of_help``: bare / help.
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
    # Of the slower command: what no help is above.
    result["slowest_s"] = max(result[name]["medians_s"]["help"] for name in COMMANDS)
    result["bare_of_help"] = min(result[name]["bare_of_help"] for name in COMMANDS)
    return result


def table(result: dict[str, Any]) -> str:
    """Return the medians as text, a line per command."""
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
