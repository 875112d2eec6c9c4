"""Every command and program in the README runs as written, in one directory, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SOURCE = Path(__file__).parents[2] / "src" / "estune"


def blocks() -> list[tuple[str, str]]:
    """Return the README's bash and Python blocks but the one with the two make commands, which CI runs itself."""
    found = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)
    return [(language, text) for language, text in found if "make demo" not in text]


def test_every_block_of_the_readme_runs(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = []
    for language, text in blocks():
        if text.startswith("# rewards.py"):
            (tmp_path / "rewards.py").write_text(text, encoding="utf-8")
            continue
        command = ["bash", "-eu", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ran.append(text)
    assert len(ran) >= 3
    for path in ("runs/mine/model.safetensors", "runs/python/model.safetensors", "rebuilt/model.safetensors"):
        assert (tmp_path / path).is_file(), path


def test_the_annotated_tree_names_every_module_and_no_other() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    named = set(re.findall(r"(\w+\.py)\b", tree))
    there = {path.name for path in SOURCE.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert there <= named, f"not in the README's tree: {sorted(there - named)}"
    outside = {path.name for folder in ("scripts", "benchmarks") for path in (SOURCE.parents[1] / folder).glob("*.py")}
    assert named - there == outside
