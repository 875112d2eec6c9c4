"""Every command and program in the README runs as written, in one directory, in order."""

from __future__ import annotations

import re
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from shells import Shell

pytestmark = pytest.mark.miniature

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list[tuple[str, str]]:
    """Return the README's bash and Python blocks but the one with the two make commands, which CI runs itself."""
    found = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)
    return [(language, text) for language, text in found if "make demo" not in text]


def test_every_block_of_the_readme_runs(tmp_path: Path, shell: Shell) -> None:
    ran = []
    for language, text in blocks():
        if text.startswith("# rewards.py"):
            (tmp_path / "rewards.py").write_text(text, encoding="utf-8")
            continue
        shell.check(text, tmp_path, language)
        ran.append(text)
    assert len(ran) >= 3
    for path in ("runs/mine", "runs/python", "runs/lowrank", "rebuilt"):
        assert (tmp_path / path / "model.safetensors").is_file(), path


def test_the_annotated_tree_names_every_module_and_no_other() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    parts = re.split(r"^(src/estune|scripts|benchmarks)/$", tree, flags=re.MULTILINE)
    assert len(parts) == 7
    for folder, text in zip(parts[1::2], parts[2::2], strict=True):
        root, named = ROOT / folder, set(re.findall(r"(?<!\S)([\w/]+\.py)\b", text))
        files = root.rglob("*.py") if folder == "src/estune" else root.glob("*.py")
        there = {path.relative_to(root).as_posix() for path in files if not path.name.startswith("__")}
        assert there == named, f"{folder}: not in the tree {sorted(there - named)}, not there {sorted(named - there)}"
    for path in (ROOT / "benchmarks").iterdir():
        assert not path.is_dir() or path.name == "__pycache__" or f"{path.name}/" in parts[6], path.name


def test_programs_shadow_no_package() -> None:
    """A program's directory comes first on its path, so a file named like a package would be imported in its place."""
    places = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")]
    names = {path.stem for directory in ("benchmarks", "scripts") for path in (ROOT / directory).glob("*.py")}
    assert not {name for name in names if PathFinder.find_spec(name, places)} and not names & sys.stdlib_module_names
