"""Virtual environments of other packages in benchmarks: made at first use and kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def make_environment(place: Path, installs: Sequence[Sequence[str]]) -> Path:
    """Return the Python of the environment in ``place``; create it if it is missing.

    Args:
        place: directory of the environment.
        installs: the arguments of one `pip install` each.

    Raises:
        subprocess.CalledProcessError: pip failed; ``stderr`` holds its message.
    """
    python = place / "bin" / "python"
    if (place / "ready").is_file():
        return python
    print(f"making {place}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True, capture_output=True, text=True)
    for arguments in installs:
        install(python, arguments)
    (place / "ready").touch()
    return python


def install(python: Path, arguments: Sequence[str]) -> None:
    """Install packages into an environment without output.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
