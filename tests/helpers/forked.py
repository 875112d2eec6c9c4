"""Makes a forked command behave like a new interpreter: its own standard streams, and an interpreter's end."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress


def make_streams() -> None:
    """Open `sys.stdin`, `sys.stdout` and `sys.stderr` as an interpreter does at its start."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = None
        with suppress(OSError):
            os.fstat(descriptor)
            errors = "backslashreplace" if name == "stderr" else "strict"
            stream = open(descriptor, "w" if descriptor else "r", encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
            if name == "stderr" or stream.isatty():
                stream.reconfigure(line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def ended(command: Callable[[], int]) -> int:
    """Run a command, then end like the interpreter (except for freeing memory); return the exit status."""
    try:
        code = command()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str) and sys.stderr is not None:
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except Exception:
            code = 120  # as in `Py_FinalizeEx`
            if stream is sys.stdout and sys.stderr is not None:
                print("Exception ignored while flushing sys.stdout", file=sys.stderr)
    return code
