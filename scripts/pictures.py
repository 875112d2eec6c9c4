"""Makes the pictures of the documentation: the panel in a terminal and the report in a browser.

    python scripts/pictures.py --model models/smollm2-135m --run runs/concise

Needs tmux and Chromium. For the panel, a new run of `configs/conciseness_smollm2.yaml` is started, captured at its
fifth step, and ended. The report is that of ``--run``. The pictures are written to `docs/images/`.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS, LINES = 110, 22  # characters: the size of the terminal
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def photograph(address: str, path: Path, width: int, height: int) -> None:
    """Write a browser's view of an address as PNG of ``width`` times ``height`` pixels.

    Raises:
        SystemExit: Chromium is missing or fails.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("pictures: no Chromium on this machine")
    with tempfile.TemporaryDirectory() as home:
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={home}",
            "--virtual-time-budget=5000",
            f"--window-size={width},{height}",
            f"--screenshot={path}",
            address,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": home})
    if done.returncode or not path.is_file():
        raise SystemExit(f"pictures: {done.stderr[-500:]}")
    print(path)


def terminal(command: str, shown: str, seconds: float) -> str:
    """Run a command in a terminal until ``shown`` appears; end it and return the terminal's contents with colours.

    Raises:
        SystemExit: ``shown`` did not appear within ``seconds``.
    """
    tmux = ["tmux", "-L", "estune-pictures"]
    subprocess.run([*tmux, "new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), command], check=True)
    try:
        for _ in range(int(seconds)):
            time.sleep(1)
            done = subprocess.run([*tmux, "capture-pane", "-e", "-p"], check=True, capture_output=True, text=True)
            if shown in done.stdout:
                return done.stdout
    finally:
        subprocess.run([*tmux, "kill-server"], check=False, capture_output=True)
    raise SystemExit(f"pictures: {shown!r} did not appear in the terminal")


def panel(model: Path, path: Path) -> None:
    """Write the picture of a run's panel at its fifth step."""
    with tempfile.TemporaryDirectory() as name:
        command = (
            f"{sys.executable} -m estune train --config {ROOT / 'configs' / 'conciseness_smollm2.yaml'} "
            f"--model {model} --output_dir {name}/concise"
        )
        text = terminal(command, "step 5/", 600)
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
        lines = text.rstrip().splitlines()
        first = next(index for index, line in enumerate(lines) if "╭" in line)
        console.print(Text.from_ansi("\n".join(lines[first:])))
        drawing = Path(name) / "panel.svg"
        console.save_svg(str(drawing), title="estune train --config configs/conciseness_smollm2.yaml")
        height = 96 + 25 * (len(lines) - first)
        photograph(drawing.as_uri(), path, 12 * COLUMNS + 40, height)


def main() -> None:
    """Make the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of SmolLM2-135M-Instruct, for the picture of the panel")
    parser.add_argument("--run", type=Path, nargs="+", help="finished runs, for the picture of the report")
    options = parser.parse_args()
    if options.model:
        panel(options.model.resolve(), IMAGES / "panel.png")
    if options.run:
        with tempfile.TemporaryDirectory() as name:
            command = [sys.executable, "-m", "estune", "report", *map(str, options.run), "--output_dir", name]
            subprocess.run(command, check=True)
            photograph((Path(name) / "report.html").as_uri(), IMAGES / "report.png", 1280, 1700)


if __name__ == "__main__":
    main()
