"""The README: short, its commands and programs run as written, its figures and folders are true."""

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
PAGES = ROOT / "docs"


def section(title: str) -> str:
    """Return the text of a section of the README."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks() -> list[tuple[str, str]]:
    """Return the README's bash and Python blocks but the one with the two make commands, which CI runs itself."""
    found = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)
    return [(language, text) for language, text in found if "make demo" not in text]


def test_every_block_of_the_readme_runs(tmp_path: Path, shell: Shell) -> None:
    """In one directory, in order; a block that begins with a file's name is that file."""
    ran = []
    for language, text in blocks():
        if name := re.match(r"# (\w+\.py)\n", text):
            (tmp_path / name[1]).write_text(text, encoding="utf-8")
            continue
        shell.check(text, tmp_path, language)
        ran.append(text)
    assert len(ran) >= 3
    for path in ("runs/mine", "runs/python", "runs/lowrank", "rebuilt"):
        assert (tmp_path / path / "model.safetensors").is_file(), path


def test_commands_that_need_a_download_are_those_of_the_quickstart() -> None:
    """`test_fetch_registry` runs them."""
    quickstart = (PAGES / "index.md").read_text(encoding="utf-8")
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL):
        assert f"```console\n{block}```" in quickstart


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 200
    assert len(README) <= 12_000


def test_every_room_has_its_line() -> None:
    named = re.findall(r"^  (\w+)/ ", section("Folders"), flags=re.MULTILINE)
    folders = [path for path in (ROOT / "src" / "estune").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert sorted(named) == sorted(path.name for path in folders)


def test_figures_stand_on_the_pages_that_scripts_check() -> None:
    """Results stand on the page of evidence, all other figures with a decimal point on that of speed and memory."""
    evidence, speed = ((PAGES / f"{name}.md").read_text(encoding="utf-8") for name in ("evidence", "benchmarks"))
    text = re.sub(r"```.*?```|\]\(.*?\)|\d\.\d+ or later|Apache-2\.0", "", README, flags=re.DOTALL)
    results = section("Results")
    for figure in re.findall(r"\d+\.\d+", text):
        assert figure in (evidence if figure in results else speed), figure


def test_links_lead_to_files_and_headings() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)", README):
        name, _, anchor = link.partition("#")
        assert (ROOT / name).is_file(), link
        headings = re.findall(
            r"^#+ (.*)$", (ROOT / name).read_text(encoding="utf-8") if anchor else "", flags=re.MULTILINE
        )
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings], (
            link
        )


def test_programs_shadow_no_package() -> None:
    """A program's directory comes first on its path, so a file named like a package would be imported in its place."""
    places = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")]
    names = {path.stem for directory in ("benchmarks", "scripts") for path in (ROOT / directory).glob("*.py")}
    assert not {name for name in names if PathFinder.find_spec(name, places)} and not names & sys.stdlib_module_names


# --- blocks that run in forks of one process behave as in a shell with the real programs ------------------------------


def test_a_command_has_its_own_words_directory_environment_and_streams(shell: Shell, tmp_path: Path) -> None:
    code = 'import os, sys; print(sys.argv, os.getcwd(), os.environ["MINE"], input())'
    found = shell.check(f"export MINE=1; echo typed | python -c '{code}' 'two words' x 2>/dev/null", tmp_path)
    assert found == f"['-c', 'two words', 'x'] {tmp_path} 1 typed\n"


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("raise SystemExit(3)", 3, ""),
        ('raise SystemExit("so")', 1, "so"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 15)", 128 + 15, ""),
    ],
)
def test_a_command_ends_as_it_would_without_a_fork(
    code: str, status: int, told: str, shell: Shell, tmp_path: Path
) -> None:
    done = shell.run(f"python -c '{code}' || exit $?\necho never", tmp_path)
    assert done.returncode == status and told in done.stderr and not done.stdout


def test_a_block_ends_at_its_first_failure(shell: Shell, tmp_path: Path) -> None:
    done = shell.run("estune trian\necho never", tmp_path)
    assert done.returncode == 2 and not done.stdout and "did you mean 'train'?" in done.stderr


def test_the_server_removes_its_own_directory_and_nothing_else() -> None:
    with Shell() as own:
        programs = Path(own.environment["PATH"].partition(":")[0])
        assert {path.name for path in programs.iterdir()} == {"estune", "python", "socket"}
    assert not programs.exists() and programs.parent.is_dir()
