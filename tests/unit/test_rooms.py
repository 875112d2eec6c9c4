"""Rules for the files: which room may import which, which files a step executes, and the tier of every test.

docs/architecture.md holds the imports and the files of a step.

Imports inside functions and for type checking count.
"""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from tiers import few, full, group_of

import estune
from estune import errors
from estune.errors import install_command
from estune.rewards.loading import EXTRA_OF

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "estune"
LIGHT = ("es", "run", "rewards", "sandbox", "tasks")  # rooms that load neither torch nor transformers
TIERS = ("miniature", "e2e", "real", "vllm")
FILES = {".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__"): path
         for path in SRC.rglob("*.py")}  # fmt: skip


def allowed_imports() -> dict[str, set[str]]:
    """Return the rules of docs/architecture.md: room or root module -> the names that it may import."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = page.split("## Allowed imports", 1)[1].split("```")[1]
    groups: dict[str, set[str]] = {"nothing": set()}
    rules = {}
    for line in filter(None, block.splitlines()):
        left, sign, right = re.split(r" *(=|->) *", line)
        names = {name for word in right.split(", ") for name in groups.get(word, {word})}
        (groups if sign == "=" else rules).update(dict.fromkeys(left.split(", "), names))
    return rules


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def may_import(module: str, other: str, rules: dict[str, set[str]]) -> bool:
    """Return whether the rules allow an import; ``x.__init__`` stands for the package ``x`` without its modules."""
    path = f"{other.partition('.')[2] or other}."
    if FILES[other].name == "__init__.py":
        path += "__init__."
    return room(other) == room(module) or any(path.startswith(f"{name}.") for name in rules[room(module)])


def test_rooms_import_what_they_may_and_no_circle() -> None:
    graph = {module: imported(ast.parse(path.read_text())) & FILES.keys() for module, path in FILES.items()}
    rules = allowed_imports()
    assert may_import("estune.run.card", "estune.models.names", rules)
    assert not may_import("estune.config.options", "estune.engines.base", rules)
    assert not may_import("estune.tasks.maths", "estune.rewards.pool", rules)
    assert rules.keys() == {room(module) for module in FILES}
    wrong = {(module, other) for module in graph for other in graph[module] if not may_import(module, other, rules)}
    assert not wrong
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(error.args[1]) from None


def private_names(tree: ast.AST) -> set[str]:
    """Return the names with an underscore that a file takes from others.

    ``from estune.x import _y``, ``x._y``, and ``setattr(x, "_y", ...)``.
    """
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {(alias.name, f"{node.module}.{alias.name}") for node in imports for alias in node.names
            if str(node.module).partition(".")[0] == "estune"}  # fmt: skip
    modules = {name for name, path in ours if path in FILES}
    found = {name for name, _ in ours} | {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    }  # fmt: skip
    found |= {
        str(node.args[1].value) for node in ast.walk(tree)
        if isinstance(node, ast.Call) and len(node.args) == 3 and getattr(node.args[0], "id", "") in modules
        and isinstance(node.args[1], ast.Constant)
    }  # fmt: skip
    return {name for name in found if name.startswith("_") and not name.endswith("__")}


def test_no_file_takes_a_private_name_from_another() -> None:
    assert private_names(ast.parse("from estune.es import _theta, theta\ntheta._a\nset(theta, '_b', 1)")) == {
        "_theta",
        "_a",
        "_b",
    }
    for folder in ("src", "tests", "scripts", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not private_names(ast.parse(path.read_text(encoding="utf-8"))), path


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert estune.__version__ == project["version"]


def test_extras_named_in_messages_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    calls = [node for path in FILES.values() for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "install_command"]  # fmt: skip
    values = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "extra"]
    named = {value.value for value in values if isinstance(value, ast.Constant)} | set(EXTRA_OF.values())
    assert {"tasks", "baselines", "compare", "trackers"} <= named <= project["optional-dependencies"].keys()
    assert not [path for path in FILES.values() if "pip install 'estune[" in path.read_text()]


def test_an_extra_is_installed_as_estune_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = f"-c {ROOT}/constraints.txt"
    assert install_command(extra="tasks") == f"python -m pip install {checkout} -e '{ROOT}[tasks]'"
    assert install_command(package="gguf") == f"python -m pip install {checkout} gguf"
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "estune" / "errors.py"))
    version = estune.__version__
    assert install_command(extra="tasks") == f"python -m pip install 'estune[tasks]=={version}'"
    assert install_command(package="gguf") == "python -m pip install gguf"


def test_light_rooms_load_no_torch() -> None:
    for module, path in FILES.items():
        if room(module) in LIGHT:
            names = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
            assert not names & {"torch", "transformers"}, module
            assert room(module) not in ("es", "run") or not names & {"vllm", "ray"}, module


def test_light_rooms_load_neither_torch_nor_transformers_through_others() -> None:
    light = [module for module in FILES if room(module) in LIGHT and not module.startswith("estune.sandbox.child")]
    program = f"import sys, {', '.join(light)}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_fork_server_needs_the_standard_library_alone() -> None:
    ours = {"estune.rewards.contract", "estune.rewards.worker", "estune.rewards.fork_server"}
    for module in ("estune", "estune.rewards", *ours):
        for node in ast.parse(FILES[module].read_text()).body:
            names = imported(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
            assert all(name in ours or name.partition(".")[0] in sys.stdlib_module_names for name in names), module


@pytest.mark.e2e
@pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="the tracer also sees other threads; the table is of Python 3.11"
)
def test_the_table_of_a_steps_files_is_what_the_tracer_finds(run_model: Any) -> None:
    done = run_model("--step", script=ROOT / "scripts" / "architecture.py")
    assert done.code == 0, done
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("### The files that one step executes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\S+)` \|", section, re.MULTILINE)
    assert sorted(rows) == done.out.split() and f"finds {len(rows)} files" in section


def test_at_most_ten_modules_lie_at_the_root_and_every_room_says_what_it_is() -> None:
    assert len(list(SRC.glob("*.py"))) <= 10
    for path in SRC.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "integration").glob("test_*.py")), ids=lambda path: path.stem)
def test_an_integration_file_names_its_tier(path: Path) -> None:
    """By `pytestmark`; a single test of a miniature file may be marked as one of another tier."""
    marks = path.read_text(encoding="utf-8").split("\npytestmark = ")[1].split("\n\n")[0]
    assert len(re.findall(rf"pytest\.mark\.({'|'.join(TIERS)})\b", marks)) == 1


def test_the_default_selection_is_what_make_test_runs() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert "-m 'not e2e and not real and not vllm'" in options["addopts"]
    assert {mark.partition(":")[0] for mark in options["markers"]} == {*TIERS, "xdist_group(name)"}


def test_ci_runs_every_tier() -> None:
    assert "make test-all" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    rule = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ntest-all: ")[1].splitlines()[1]
    assert rule.strip() == '$(PYTEST) -m "not vllm"'


def test_files_share_a_worker_where_they_name_a_group() -> None:
    assert group_of(ROOT / "tests" / "unit" / "test_sandbox.py") == "processes"
    assert group_of(ROOT / "tests" / "integration" / "test_compare.py") == "compared"
    assert group_of(ROOT / "tests" / "unit" / "test_noise.py") is None


def test_what_is_not_kept_belongs_to_the_other_tier() -> None:
    kept, left = few(["a", "b"], ("a",))
    assert kept == "a" and left == full("b") and [mark.name for mark in left.marks] == ["e2e"]
    with pytest.raises(AssertionError):
        few(["a"], ("c",))
