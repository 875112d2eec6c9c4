"""The pictures of the documentation: the panel in a terminal, and the page in a browser.

    python scripts/pictures.py --model models/smollm2-135m --run runs/concise

Needs tmux and Chromium. The panel is that of a fresh run of `configs/conciseness_smollm2.yaml`, captured after a few of
its steps and then ended; the page is the report of ``--run``. Pictures go to `docs/images/`.
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
COLUMNS, LINES = 110, 22
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def photograph(address: str, path: Path, width: int, height: int) -> None:
    """Write a browser's view of an address as PNG.

    Raises:
        SystemExit: there is no Chromium, or it does not do it.
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
    """Return a terminal's contents, with their colours, once ``shown`` stands in it; the command is interrupted then.

    Raises:
        SystemExit: it did not appear in time.
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
    """Photograph the panel of a run after its fifth step."""
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
    """Take what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of SmolLM2-135M-Instruct: takes the panel")
    parser.add_argument("--run", type=Path, nargs="+", help="finished runs: takes the page")
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
