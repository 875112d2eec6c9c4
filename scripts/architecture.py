"""Writes the generated parts of `docs/architecture.md` from all modules, and lists the files that a step executes.

    python scripts/architecture.py            # after a module, its docstring or its imports changed
    python scripts/architecture.py --check    # exit status 1 if the page differs from the code
    python scripts/architecture.py --step     # the files that one step with low-rank members executes

A generated part begins with `<!-- generated NAME -->` and ends with `<!-- end of generated NAME -->`. `rooms` is a
table of the package's folders with their purposes and imports. `files` is a list with one line a file. The rest of the
page is written by hand. It gives the reason for each file that ``--step`` prints (`tests/unit/test_rooms.py`).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, PACKAGE = ROOT / "docs" / "architecture.md", ROOT / "src" / "estune"
GENERATED = re.compile(r"(<!-- generated (\w+) -->\n).*?(<!-- end of generated \w+ -->)", re.DOTALL)
STEP_RUN = dict(
    model="tiny", task="countdown", max_steps=3, population_size=4, batch_size=2, noise="lowrank", sigma=0.01,
    max_completion_length=8, num_threads=1, report_to=["none"], console="lines", reward_isolation="inline",
)  # fmt: skip
PROGRAMS = {"scripts": "Programs for the repository itself.", "benchmarks": "Programs that measure, and their inputs."}


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring; if that is a question, the next sentence too.

    Raises:
        SystemExit: the module has no docstring.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise SystemExit(f"architecture: {path.relative_to(ROOT)} has no docstring")
    paragraph = " ".join(text.split("\n\n")[0].split())
    first, *more = re.split(r"(?<=[.?!])\s", paragraph)
    return f"{first} {more[0]}" if first.endswith("?") and more else first


def rooms() -> list[Path]:
    """Return the package's folders that hold modules, sorted by name."""
    return sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def imports_of(path: Path) -> Iterator[str]:
    """Yield the rooms and root modules of estune that a module imports, also lazily or for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from estune import x` imports the module x, or a name of the package itself.
            names = [f"estune.{alias.name}" for alias in node.names] if node.module == "estune" else [node.module or ""]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("estune.") and "__" not in name)


def room_table() -> str:
    """Return a table with one row a room: its name, its purpose, and the parts of estune that it imports."""
    rows = ["| room | purpose | imports |", "|---|---|---|"]
    for room in rooms():
        imported = {name for path in room.rglob("*.py") for name in imports_of(path)} - {room.name}
        purpose = summary(room / "__init__.py").replace("|", "\\|")
        rows.append(f"| `{room.name}/` | {purpose} | {', '.join(sorted(imported)) or '-'} |")
    return "\n".join(rows)


def file_list() -> str:
    """Return one line for each file and each inner folder: the root, the rooms, then the programs."""
    parts = ["### The package's root\n"]
    parts += [line(path, PACKAGE) for path in sorted(PACKAGE.glob("*.py"))]
    for room in rooms():
        parts += [f"\n### `{room.name}/`\n"]
        parts += [line(path, PACKAGE) for path in sorted(room.rglob("*.py")) if path != room / "__init__.py"]
    for folder, purpose in PROGRAMS.items():
        parts += [f"\n### `{folder}/`\n", f"{purpose}\n"]
        parts += [line(path, ROOT) for path in sorted((ROOT / folder).rglob("*.py"))]
    return "\n".join(parts)


def line(path: Path, root: Path) -> str:
    """Return a list item with a file's path and its summary; an ``__init__.py`` is listed as its folder."""
    name = path.relative_to(root).as_posix()
    return f"* `{name.removesuffix('__init__.py') or name}`: {summary(path)}"


def page(text: str) -> str:
    """Return a page with its generated parts replaced by new ones."""
    parts = {"rooms": room_table, "files": file_list}
    return GENERATED.sub(lambda match: f"{match[1]}\n{parts[match[2]]()}\n\n{match[3]}", text)


def step_files() -> list[str]:
    """Return the files that the second step of a run of three steps executes, relative to the package.

    All threads are traced from Python 3.12 on, and the main thread before. The first step is left out, because it also
    executes code that runs once, such as the compilation of the noise kernels.
    """
    from estune.config import ESConfig
    from estune.train.session import Session
    from estune.train.trainer import ESTrainer

    entered: set[Path] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            entered.add(path.relative_to(PACKAGE))

    plan = Session.plan

    def traced(self: Session) -> Any:
        tracing = trace if self.run.steps_done == 1 else None
        threading.setprofile_all_threads(tracing) if hasattr(threading, "setprofile_all_threads") else None
        sys.setprofile(tracing)
        return plan(self)

    Session.plan = traced  # type: ignore[method-assign]
    with (
        tempfile.TemporaryDirectory() as place,
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stdout(devnull),
        contextlib.redirect_stderr(devnull),
    ):
        ESTrainer(args=ESConfig(output_dir=f"{place}/run", **STEP_RUN)).train()  # type: ignore[arg-type]
    return sorted(path.as_posix() for path in entered)


def main() -> int:
    """Write the page, compare it with the code, or print the files of a step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--step", action="store_true", help="run a small model and print the files of its second step")
    options = parser.parse_args()
    if options.step:
        print("\n".join(step_files()))
        return 0
    text = PAGE.read_text(encoding="utf-8")
    expected = page(text)
    if options.check and expected != text:
        print(f"{PAGE.relative_to(ROOT)} differs from the code: python scripts/architecture.py", file=sys.stderr)
        return 1
    if not options.check:
        PAGE.write_text(expected, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
