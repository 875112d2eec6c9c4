"""The identity of reward functions: hashes of their source, which a resume compares.

The hashes of a function cover its file and every file of the user's that this file imports, at the top or inside a
function. For a function of a script or a notebook they cover its own text and the parts of the script that it uses:
functions, classes, objects of those classes, plain values. They always cover the values that a function holds: closure,
defaults, wrapped function, attributes of a callable object. Comments and blank lines do not count.

Values that the user's code changes while it runs (a counter, a cache) do not count, nor does the directory of a path.
Python's own modules do not count. An installed package counts by its version and the reward's file, and estune by its
name only: its version is in the journal's header.

Not covered: files that a reward reads, and objects that are not plain values (a loaded model, a client).
"""

from __future__ import annotations

import ast
import dis
import functools
import importlib.util
import inspect
import io
import linecache
import os
import sys
import sysconfig
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path, PurePath
from typing import Any

from estune.identity import NoIdentityError, digest
from estune.rewards.loading import loaded_source, look_for_modules_in

PACKAGE = Path(__file__).parents[1]
MOST_FILES = 300  # files of the user's that are followed from one reward
PLAIN_MODULES = frozenset(
    "argparse builtins collections datetime decimal enum fractions numpy re string types uuid".split()
)
STARTING = ("__init__", "__new__", "__post_init__", "__setstate__")  # methods that initialise an object

# Hashes of mutable values when first seen, by id: a list that a reward appends to keeps its first hash.
_first_hashes: dict[int, tuple[Any, str]] = {}


def source_parts(function: Callable[..., Any], kind: str = "reward") -> dict[str, str]:
    """Return a short hash of each part of a reward function, or of an engine's class, by the part's name.

    Args:
        function: a reward function or a class.
        kind: the first word of names of parts that have no file, ``reward`` or ``engine``.
    """
    sources = _Sources()
    sources.add(function, kind)
    return dict(sorted(sources.parts.items()))


def source_files(spec: str) -> dict[str, str]:
    """Return the hashes of the files behind ``package.module:name`` or ``file.py:name``, without importing them.

    They are those parts of `source_parts` that are files, or versions of installed packages. Files are searched as
    `estune.rewards.loading.load_object` searches them.
    """
    where = spec.rpartition(":")[0]
    sources = _Sources()
    is_file = where.endswith(".py") or os.sep in where
    path = Path(where).expanduser().resolve()
    look_for_modules_in([path.parent if is_file else Path.cwd()])
    if not is_file:
        sources._add_module(where)
        return sources.parts
    with suppress(OSError, UnicodeDecodeError):
        sources._add_text(path.stem, path.read_text("utf-8"), "")
    return sources.parts


class _Sources:
    """Collects the parts of one reward. The names of parts do not depend on directories."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self._seen: dict[int, Any] = {}  # by id; the references keep the ids unique

    def add(self, thing: Any, name: str) -> None:
        """Add a function, a class, a module, or a callable object, once."""
        named = (
            types.ModuleType,
            types.MethodType,
            types.FunctionType,
            types.BuiltinFunctionType,
            type,
            functools.partial,
        )
        if hasattr(thing, "identity_parts") and not isinstance(thing, type):
            for part, value in thing.identity_parts().items():
                self._keep(f"{name} {part}", value)
            return
        if not isinstance(thing, named) and not hasattr(thing, "__wrapped__"):
            self.add_value(thing, name)
            return
        if id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, types.ModuleType):
            self._add_module(thing.__name__)
        elif isinstance(thing, functools.partial):
            self.add(thing.func, name)
            self.add_value([list(thing.args), thing.keywords], f"{name} arguments")
        elif isinstance(thing, types.MethodType):
            self._keep(f"{name} method", thing.__name__)
            self.add(thing.__func__, f"{name} function")
            self.add_value(thing.__self__, f"{name} object")
        elif isinstance(thing, types.FunctionType):
            self._add_function(thing, name)
        elif isinstance(thing, type):
            self._add_class(thing, name)
        elif isinstance(thing, types.BuiltinFunctionType):
            self._keep(name, f"{thing.__module__}.{thing.__qualname__}")
        else:  # a wrapper such as functools.lru_cache
            self.add(thing.__wrapped__, name)

    def add_value(self, value: Any, name: str) -> None:
        """Add a value that a function holds or uses."""
        if isinstance(value, (types.FunctionType, types.MethodType, types.ModuleType, functools.partial, type)):
            self.add(value, name)
        elif isinstance(value, PurePath) or (isinstance(value, str) and os.path.isabs(value) and os.path.exists(value)):
            self._keep(name, "an absolute path" if os.path.isabs(value) else str(value))
        elif isinstance(value, (dict, list, tuple)) and type(value) in (dict, list, tuple) and not _is_plain(value):
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                    self.add_value(item, f"{name}[{key!r}]")
        elif _is_plain(value):
            self._keep_plain(name, value)
        elif hasattr(value, "__wrapped__"):
            self.add(value, name)
        elif self._is_the_users_class(type(value)):
            self._add_object(value, name)
        else:
            self._keep(name, f"a {type(value).__module__}.{type(value).__qualname__}")

    def _add_function(self, function: types.FunctionType, name: str) -> None:
        """Add a function's file or text, and the values that it holds."""
        self._add_definition(function, function.__code__, name)
        code, changing = function.__code__, _stored(function.__code__)
        if _owner(function.__module__ or "") == "estune":
            return
        self.add_value([function.__defaults__, function.__kwdefaults__], f"{name} defaults")
        for free, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if free not in changing:
                with suppress(ValueError):  # an empty cell
                    self.add_value(cell.cell_contents, f"{name} closure {free}")
        if hasattr(function, "__wrapped__"):
            self.add(function.__wrapped__, f"{name} wrapped")

    def _add_class(self, kind: type, name: str) -> None:
        """Add the file or text of a class and of its base classes."""
        for base in kind.__mro__:
            if base is kind or self._is_the_users_class(base):
                self._add_definition(base, base, name if base is kind else f"{name} base {base.__qualname__}")

    def _add_object(self, value: Any, name: str) -> None:
        """Add an object of a user's class: the class, and the attributes that no method changes."""
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        kind = type(value)
        self.add(kind, f"{name} class")
        changing = frozenset[str]().union(*(_stored(function.__code__) for function in _methods(kind)))
        slots = {slot for base in kind.__mro__ for slot in _slots_of(base)}
        state = {slot: getattr(value, slot) for slot in slots if hasattr(value, slot)} | getattr(value, "__dict__", {})
        for attribute in sorted(state.keys() - changing):
            self.add_value(state[attribute], f"{name}.{attribute}")

    def _add_definition(self, thing: Any, code: Any, name: str) -> None:
        """Add the file of a function or a class; only its own text if the file is a script."""
        module = thing.__module__ or ""
        path, text = loaded_source(module)
        owner = _owner(module)
        if path:
            self._add_text(Path(path).stem, text, "")
            self._keep(name, thing.__qualname__)
        elif owner == "estune":
            self._keep(name, "estune")
        elif owner:
            self._keep(name, f"{module}.{thing.__qualname__}")
            self._keep(owner, version_of(owner))
            self._add_file_of(module, follows=False)
        elif module != "__main__" and _file_of(module) is not None:
            self._add_module(module)
            self._keep(name, thing.__qualname__)
        else:
            text = source_of(code)
            self._keep(name, without_comments(text))
            for found in _imports(text, ""):
                self._add_module(found)
            for function in [thing] if isinstance(thing, types.FunctionType) else _own_functions(thing):
                self._add_used(function)

    def _add_used(self, function: types.FunctionType) -> None:
        """Add the global names of a script that one of its functions uses."""
        names, script = _globals_of(function.__code__), function.__globals__
        for used in sorted(names - {"__file__", "__builtins__"}):
            if used not in script or used in _stored_globals(script):
                continue
            value = script[used]
            self.add_value(value, f"{function.__module__}.{used}")
            if isinstance(value, types.ModuleType):  # `pkg.sub.f()` also uses pkg.sub
                for attribute in _all_names(function.__code__):
                    if isinstance(vars(value).get(attribute), types.ModuleType):
                        self.add(vars(value)[attribute], attribute)

    def _add_module(self, name: str) -> None:
        """Add a user's module with the files that it imports, or the version of an installed module."""
        owner = _owner(name)
        if owner and owner != "estune":
            self._keep(owner, version_of(owner))
        elif not owner:
            self._add_file_of(name, follows=True)

    def _add_file_of(self, module: str, follows: bool) -> None:
        file = _file_of(module)
        if file is None:
            return
        with suppress(OSError, UnicodeDecodeError):
            package = module if file.name == "__init__.py" else module.rpartition(".")[0]
            self._add_text(module, file.read_text("utf-8"), package, follows)

    def _add_text(self, module: str, text: str, package: str, follows: bool = True) -> None:
        """Add a file's text and, with ``follows``, the user's files that it imports."""
        if f"file {module}" in self.parts or len(self.parts) > MOST_FILES:
            return
        self._keep(f"file {module}", without_comments(text))
        for found in _imports(text, package) if follows else ():
            self._add_module(found)

    def _is_the_users_class(self, kind: type) -> bool:
        module = kind.__module__
        return bool(loaded_source(module)[0]) or (
            module != "builtins" and not _owner(module) and not _is_python(module)
        )

    def _keep(self, name: str, content: str) -> None:
        self.parts.setdefault(name, digest(content)[:16])

    def _keep_plain(self, name: str, value: Any) -> None:
        known = _first_hashes.get(id(value))
        if known is not None and known[0] is value:
            self.parts.setdefault(name, known[1])
            return
        try:
            found = digest(value)[:16]
        except NoIdentityError:
            found = digest(f"a {type(value).__qualname__}")[:16]
        self.parts.setdefault(name, found)
        if isinstance(value, (list, dict, set, bytearray)) or hasattr(value, "dtype"):
            _first_hashes[id(value)] = value, found


# --- texts ------------------------------------------------------------------------------------------------------------


def without_comments(text: str) -> str:
    """Return Python source without comments, blank lines and spaces at the ends of lines."""
    lines = text.splitlines()
    with suppress(tokenize.TokenError, SyntaxError, IndexError):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def source_of(thing: types.CodeType | type) -> str:
    """Return the text of a function's code or of a class: for a lambda only the lambda, without source the bytecode.

    `inspect` finds no file for a class of a notebook; its text is that of its methods.
    """
    if isinstance(thing, types.CodeType) and thing.co_name == "<lambda>":
        text = "".join(linecache.getlines(thing.co_filename))
        with suppress(SyntaxError):
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Lambda)]
            found = [ast.get_source_segment(text, node) or "" for node in nodes if node.lineno == thing.co_firstlineno]
            if found:
                return "\n".join(found)
    with suppress(OSError, TypeError, IndexError):
        return textwrap.dedent(inspect.getsource(thing))
    if isinstance(thing, types.CodeType):
        return digest(_bytecode(thing))
    return "\n".join(source_of(function.__code__) for function in _own_functions(thing))


def _bytecode(code: types.CodeType) -> list[Any]:
    """Return the instructions, names and constants of a code object as plain values."""
    constants = [_bytecode(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code, list(code.co_names), list(code.co_varnames), list(code.co_freevars), constants]


def _imports(text: str, package: str) -> Iterator[str]:
    """Yield the names of all modules that a text may import, at any place in it."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
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
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield from _with_parents(node.args[0].value)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[: count + 1]) for count in range(len(parts)))


# --- the owner of a module --------------------------------------------------------------------------------------------


def _file_of(module: str) -> Path | None:
    """Return a module's source file, without importing the module; None if there is none."""
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded is not None:
        return Path(str(loaded)) if str(loaded).endswith(".py") else None
    path: list[str] | None = None
    spec = None
    so_far = ""
    for part in module.split("."):
        so_far = f"{so_far}.{part}" if so_far else part
        try:
            spec = PathFinder.find_spec(so_far, path) if part else None
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return Path(str(spec.origin)) if spec is not None and str(spec.origin).endswith(".py") else None


def _owner(module: str) -> str:
    """Return a module's distribution, ``python`` or ``estune``; an empty string for the user's own modules.

    A package installed from a working copy (``pip install -e``) is the user's.
    """
    top = module.partition(".")[0]
    if top in ("", "__main__"):
        return ""
    if top == "estune":
        return "estune"
    if _is_python(module):
        return "python"
    file = _file_of(top)
    if file is None or not {"site-packages", "dist-packages"} & set(file.resolve().parts):
        return "" if file is None or not version_of(top) or _is_editable(top) else top
    return top


@cache
def _is_editable(top: str) -> bool:
    """Return whether a distribution is installed from a working copy."""
    with suppress(metadata.PackageNotFoundError, OSError, ValueError):
        return "editable" in (metadata.distribution(top).read_text("direct_url.json") or "")
    return False


@cache
def version_of(distribution: str) -> str:
    """Return the version of an installed distribution; an empty string if there is none."""
    with suppress(metadata.PackageNotFoundError, ValueError):
        return metadata.version(distribution)
    return ""


@cache
def _is_python(module: str) -> bool:
    """Return whether a module is part of Python's standard library."""
    if module.partition(".")[0] in sys.stdlib_module_names:
        return True
    file = _file_of(module)
    places = [Path(place).resolve() for name in ("stdlib", "platstdlib") if (place := sysconfig.get_path(name))]
    inside = file is not None and any(file.resolve().is_relative_to(place) for place in places)
    return inside and not {"site-packages", "dist-packages"} & set(file.resolve().parts if file else ())


# --- what code uses and changes ---------------------------------------------------------------------------------------


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _named(code: types.CodeType, *operations: str) -> frozenset[str]:
    """Return the names in the instructions of some kinds, in a code object and those inside it."""
    return frozenset(
        str(instruction.argval)
        for inner in _codes(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname in operations
    )


def _globals_of(code: types.CodeType) -> frozenset[str]:
    return _named(code, "LOAD_GLOBAL", "LOAD_NAME")


def _all_names(code: types.CodeType) -> frozenset[str]:
    return frozenset(name for inner in _codes(code) for name in inner.co_names)


def _stored(code: types.CodeType) -> frozenset[str]:
    """Return the attributes, and the variables of enclosing functions, that code assigns."""
    return _named(code, "STORE_ATTR", "DELETE_ATTR") | (_named(code, "STORE_DEREF") & set(code.co_freevars))


def _stored_globals(script: dict[str, Any]) -> frozenset[str]:
    """Return the global names of a script that any of its functions assigns."""
    functions = [value for value in script.values() if isinstance(value, types.FunctionType)]
    own = [function for function in functions if function.__globals__ is script]
    return frozenset[str]().union(*(_named(f.__code__, "STORE_GLOBAL", "DELETE_GLOBAL") for f in own))


def _own_functions(kind: type) -> list[types.FunctionType]:
    """Return the functions that a class itself defines, static, class and property functions included."""
    functions = []
    for member in vars(kind).values():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if isinstance(function, types.FunctionType):
            functions.append(function)
    return functions


def _methods(kind: type) -> list[types.FunctionType]:
    """Return the methods of a class and its bases, without the methods that initialise an object."""
    return [f for base in kind.__mro__ for f in _own_functions(base) if f.__name__ not in STARTING]


def _slots_of(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else list(slots)


def _is_plain(value: Any, level: int = 0) -> bool:
    """Return whether a value and all its parts are of plain types."""
    if type(value).__module__.partition(".")[0] not in PLAIN_MODULES or level > 20:
        return False
    if isinstance(value, dict):
        return all(_is_plain(key, level + 1) and _is_plain(item, level + 1) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(item, level + 1) for item in value)
    if isinstance(value, types.SimpleNamespace) or type(value).__module__ == "argparse":
        return all(_is_plain(item, level + 1) for item in vars(value).values())
    functions = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type)
    return not isinstance(value, functions) and not hasattr(value, "__next__")
