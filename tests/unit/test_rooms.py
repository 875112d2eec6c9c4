"""Which room may import which (docs/architecture.md); imports inside functions and for type checking count."""

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import estune

SRC = Path(__file__).resolve().parents[2] / "src" / "estune"
BASE = "errors console files environment identity"
CORE = f"{BASE} config es gpu rewards sandbox tasks data models engines run"
MAY_IMPORT = {
    "errors": "", "environment": "", "console": "errors", "files": "errors", "identity": "errors", "noise": "es",
    "es": "errors", "gpu": "es", "config": "errors es engines", "rewards": BASE, "sandbox": "errors console files",
    "tasks": "errors sandbox rewards", "data": "errors identity es rewards", "models": "errors console files",
    "engines": f"{BASE} es gpu models", "run": f"{BASE} es config models", "monitor": f"{BASE} config models run",
    "train": f"{CORE} monitor", "baselines": f"{CORE} monitor train", "compare": f"{CORE} monitor train baselines",
    "commands": f"{CORE} monitor train baselines compare", "cli": f"{BASE} es config tasks models data rewards run "
    "train baselines commands monitor compare", "__main__": "cli", "estune": "config environment errors train",
}  # fmt: skip
LIGHT = ("es", "run", "rewards", "sandbox", "tasks")  # rooms that load neither torch nor transformers
FILES = {".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__"): path
         for path in SRC.rglob("*.py")}  # fmt: skip


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


def test_rooms_import_what_they_may_and_no_circle() -> None:
    graph = {module: imported(ast.parse(path.read_text())) & FILES.keys() for module, path in FILES.items()}
    wrong = {(module, other) for module, others in graph.items() for other in others
             if room(other) not in (room(module), *MAY_IMPORT[room(module)].split())}  # fmt: skip
    assert not wrong
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(error.args[1]) from None


def private_names(tree: ast.AST) -> set[str]:
    """Return the names with an underscore that a file takes from others: ``from estune.x import _y``, and ``x._y``."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {(alias.name, f"{node.module}.{alias.name}") for node in imports for alias in node.names
            if str(node.module).partition(".")[0] == "estune"}  # fmt: skip
    modules = {name for name, path in ours if path in FILES}
    found = {name for name, _ in ours} | {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    }  # fmt: skip
    return {name for name in found if name.startswith("_") and not name.endswith("__")}


def test_no_file_takes_a_private_name_from_another() -> None:
    assert private_names(ast.parse("from estune.es import _theta, theta\ntheta._a")) == {"_theta", "_a"}
    for module, path in FILES.items():
        assert not private_names(ast.parse(path.read_text())), module


def test_one_version() -> None:
    project = tomllib.loads((SRC.parents[1] / "pyproject.toml").read_text())["project"]
    assert estune.__version__ == project["version"]


def test_light_rooms_load_no_torch() -> None:
    for module, path in FILES.items():
        if room(module) in LIGHT:
            top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
            names = {name.partition(".")[0] for node in top for name in imported(node)}
            assert not names & {"torch", "transformers"}, module


def test_at_most_ten_modules_lie_at_the_root_and_every_room_says_what_it_is() -> None:
    assert len(list(SRC.glob("*.py"))) <= 10
    for path in SRC.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
