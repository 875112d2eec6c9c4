"""Blocks that run in forks of one process behave as in a shell with the real programs."""

from __future__ import annotations

from pathlib import Path

import pytest
from shells import Shell

pytestmark = pytest.mark.miniature


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
