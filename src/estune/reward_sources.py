"""The identity of reward functions: a hash of their source text, by which a resume knows that they are the same.

A function of a module or of a file stands for the whole file, and for every other file of the user's that it imports,
at the top or inside a function. A function that was written in a script or a notebook stands for its own text, for the
functions, classes and plain values of that script that it uses, and for what its closure and its defaults hold.
Comments and blank lines do not count. Python's own modules, installed packages and estune are left out: their versions
are in the journal's header.

What is not seen: files that a reward reads, and objects that are no plain values (a loaded model, a client).
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import io
import linecache
import sys
import sysconfig
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from estune.identity import NoIdentityError, digest, encode
from estune.reward_loading import loaded_source

PACKAGE = Path(__file__).parent
PLAIN_MODULES = frozenset("builtins collections datetime decimal enum fractions pathlib re types uuid".split())


def sources_digest(function: Callable[..., Any]) -> str:
    """Return a hash (32 hexadecimal digits) of all the user's code that a reward function is made of."""
    sources = _Sources()
    sources.add(function, "reward")
    return digest(sources.parts)


class _Sources:
    """Collects texts and values by a name that does not depend on where the files lie."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def add(self, thing: Any, name: str) -> None:
        """Add a function, a class, a callable object or a module; what was added already is not added again."""
        module = getattr(thing, "__module__", None) or type(thing).__module__
        if module.partition(".")[0] == "estune":
            self.parts.setdefault(name, "estune")
        elif isinstance(thing, functools.partial):
            self.add(thing.func, name)
            self.add_value(f"{name} arguments", [list(thing.args), thing.keywords])
        elif isinstance(thing, types.MethodType):
            self.add(thing.__self__ if not isinstance(thing.__self__, types.ModuleType) else thing.__func__, name)
            self.parts.setdefault(f"{name} method", thing.__name__)
        elif isinstance(thing, (types.FunctionType, type)):
            self._add_definition(thing, name)
        elif isinstance(thing, types.BuiltinFunctionType):
            self.parts.setdefault(name, f"{thing.__module__}.{thing.__qualname__}")
        elif name not in self.parts:  # an object with __call__
            self.parts[name] = f"a {type(thing).__qualname__}"
            self.add(type(thing), f"{name} class")
            self.add_value(f"{name} state", getattr(thing, "__dict__", {}))

    def add_value(self, name: str, value: Any) -> None:
        """Add a plain value; of other objects, their type alone, and of functions their source."""
        if name in self.parts:
            return
        if isinstance(value, dict):
            self.parts[name] = sorted(map(str, value))
            for key, item in value.items():
                self.add_value(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple)):
            self.parts[name] = len(value)
            for index, item in enumerate(value):
                self.add_value(f"{name}.{index}", item)
        elif isinstance(value, (types.FunctionType, types.MethodType, functools.partial, type)):
            self.add(value, name)
        elif isinstance(value, types.ModuleType):
            self._add_module(value.__name__)
        elif _is_plain(value):
            with suppress(NoIdentityError):
                self.parts[name] = encode(value)
        else:
            self.parts[name] = f"a {type(value).__module__}.{type(value).__qualname__}"

    def _add_definition(self, thing: Any, name: str) -> None:
        """Add a function or a class: by its whole module where that is a file, by its own text where it is a script."""
        module = thing.__module__ or ""
        path, text = loaded_source(module)
        if path:
            self._add_text("reward file", text, Path(path).parent)
            self.parts.setdefault(name, thing.__qualname__)
        elif _is_importable(module):
            self._add_module(module)
            self.parts.setdefault(name, f"{module}.{thing.__qualname__}")
        elif name not in self.parts:
            self.parts[name] = without_comments(source_of(inspect.unwrap(thing)))
            if isinstance(thing, types.FunctionType):  # a decorator's closure holds what it wraps
                self._add_surroundings(thing, name)
            else:
                for part, member in vars(thing).items():
                    function = getattr(member, "__func__", member)
                    if isinstance(function, types.FunctionType):
                        self._add_surroundings(function, f"{name}.{part}")

    def _add_surroundings(self, function: types.FunctionType, name: str) -> None:
        """Add what a function of a script uses: closure, defaults, and the script's own names."""
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # a cell that is still empty
                self.add_value(f"{name} closure {free}", cell.cell_contents)
        self.add_value(f"{name} defaults", [function.__defaults__, function.__kwdefaults__])
        for used in sorted(_names(function.__code__)):
            if used in function.__globals__:
                self.add_value(f"{function.__module__}.{used}", function.__globals__[used])

    def _add_module(self, name: str) -> None:
        """Add the user's module of that name."""
        spec = _find(name)
        if spec is not None and spec.origin is not None and _is_the_users(spec.origin):
            with suppress(OSError, UnicodeDecodeError):
                package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
                self._add_text(f"module {name}", Path(spec.origin).read_text("utf-8"), package)

    def _add_text(self, name: str, text: str, place: Path | str) -> None:
        """Add a file's text and the user's files that it imports; ``place``: its directory, or its package's name."""
        if name in self.parts:
            return
        self.parts[name] = without_comments(text)
        for module in _imports(text, place if isinstance(place, str) else ""):
            self._add_module(module)


def without_comments(text: str) -> str:
    """Return Python source without comments, blank lines and spaces at the ends of lines."""
    lines = text.splitlines()
    with suppress(tokenize.TokenError, SyntaxError, IndexError):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def source_of(thing: Any) -> str:
    """Return the text of a function or a class; of a lambda the lambda alone; else its bytecode.

    A class of a notebook has no file that `inspect` could find: it is the text of its methods.
    """
    code = getattr(thing, "__code__", None)
    if getattr(thing, "__name__", "") == "<lambda>" and code is not None:
        text = "".join(linecache.getlines(code.co_filename))
        with suppress(SyntaxError):
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Lambda)]
            found = [ast.get_source_segment(text, node) or "" for node in nodes if node.lineno == code.co_firstlineno]
            if found:
                return "\n".join(found)
    with suppress(OSError, TypeError):
        return textwrap.dedent(inspect.getsource(thing))
    if code is not None:
        return f"{code.co_code.hex()} {code.co_consts!r}"
    members = (getattr(member, "__func__", member) for member in vars(thing).values())
    return "\n".join(source_of(member) for member in members if isinstance(member, types.FunctionType))


def _is_plain(value: Any) -> bool:
    """Return whether a value is made of Python's own types all through."""
    if type(value).__module__.partition(".")[0] not in PLAIN_MODULES:
        return False
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return not isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType))


def _names(code: types.CodeType) -> set[str]:
    """Return the global names and attributes that a function uses, those of its inner functions included."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _imports(text: str, package: str) -> Iterator[str]:
    """Yield the names of all modules that a text may import, wherever the statement stands."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                try:
                    base = importlib.util.resolve_name("." * node.level + base, package)
                except ImportError:
                    continue
            yield from _with_parents(base)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[: count + 1]) for count in range(len(parts)))


def _find(name: str) -> ModuleSpec | None:
    """Return where a module lies, without importing anything."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    so_far = ""
    for part in name.split("."):
        so_far = f"{so_far}.{part}" if so_far else part
        try:
            spec = PathFinder.find_spec(so_far, path)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _is_importable(module: str) -> bool:
    return module != "__main__" and bool(module) and _find(module) is not None


def _is_the_users(origin: str) -> bool:
    """Return whether a file is neither Python's, nor an installed package's, nor estune's own."""
    path = Path(origin).resolve()
    if path.suffix != ".py" or {"site-packages", "dist-packages"} & set(path.parts) or path.is_relative_to(PACKAGE):
        return False
    standard = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")} | {str(Path(sys.base_prefix) / "lib")}
    return not any(path.is_relative_to(Path(place).resolve()) for place in standard)
