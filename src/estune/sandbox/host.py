"""Runs a Python function that a model wrote, where it can do no harm and learn nothing but its arguments.

`run_function` starts a fresh interpreter (`child.py`), which locks itself in and calls the function on every
argument. What holds it, on Linux (x86_64, aarch64), all of it put on before a line of the model's runs:

* files: the standard library can be read, an empty directory (its home) written where the kernel grants a file system
  in memory; nothing else can be opened, no installed package either (Landlock);
* no sockets, processes, threads, signals; no descriptor is inherited (seccomp, and namespaces where granted);
* CPU, memory, file size, wall time are limited, and so is what is read of its answer.

Only the arguments go in and only JSON comes out. Whatever the function does to its own process, all it can forge is its
own answer: who knows the right one, and grades, is the caller. Strings hash alike in every run and `random` is seeded;
a program that asks the system for randomness or the time may answer otherwise each time. Names, sizes and times of
files can be seen anywhere, their contents cannot.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from estune.console import open_missing_descriptors
from estune.errors import UserError

CHILD = Path(__file__).with_name("child.py")
GRACE_S = 5.0  # beyond the function's own wall time: an interpreter's start on a busy machine
MAX_STATUS_BYTES = 1 << 12


@dataclass(frozen=True)
class Limits:
    """What a call of `run_function` may use in all. It may start no process and no thread."""

    cpu_s: int = 2
    wall_s: float = 10.0
    memory_bytes: int = 512 << 20  # of address space
    file_bytes: int = 1 << 20  # of one file
    result_bytes: int = 256 << 10  # of all results as JSON


@dataclass(frozen=True)
class Outcome:
    """What became of a function: its results, one per argument, or None for all where there are none to be had."""

    results: list[Any] | None  # None within: that call raised, or returned what is not JSON (or None)
    problem: str = ""  # why there are no results


def run_function(
    source: str,
    name: str,
    arguments: Sequence[Any],
    limits: Limits = Limits(),
    *,
    allow_unsandboxed: bool = False,
) -> Outcome:
    """Call the function ``name`` of a source on each argument (anything JSON can hold), all in one child process.

    With ``allow_unsandboxed``, what the system cannot give is done without; limits and time-outs stay.

    Raises:
        UserError: this system cannot hold the code, and ``allow_unsandboxed`` is off.
    """
    missing, outcome = _run(source, name, arguments, limits, allow_unsandboxed)
    if missing and not allow_unsandboxed:
        raise UserError(refusal(missing))
    return outcome


@functools.cache
def missing_guarantees() -> tuple[str, ...]:
    """Return what this system cannot give, in words, by trying it once; empty where code can be run safely."""
    missing, outcome = _run("def probe(x):\n    return x", "probe", [1], Limits(), False)
    if not missing and outcome.results != [1]:
        return (f"a Python that starts in the sandbox ({outcome.problem or 'no result'})",)
    return tuple(missing)


def require(allow_unsandboxed: bool) -> str:
    """Return a warning, or nothing, before the first function is run.

    Raises:
        UserError: something is missing, and ``allow_unsandboxed`` is off.
    """
    missing = missing_guarantees()
    if missing and not allow_unsandboxed:
        raise UserError(refusal(missing))
    return f"code that the model writes runs without {'; and without '.join(missing)}" if missing else ""


def refusal(missing: Sequence[str]) -> str:
    """Return the sentence that refuses to run code."""
    return (f"code that a model writes is not run here, for this system lacks {'; and '.join(missing)}; "
            "to run it all the same, on a machine where it can do no harm: --allow_unsandboxed_code")  # fmt: skip


def _run(
    source: str, name: str, arguments: Sequence[Any], limits: Limits, allow_unsandboxed: bool
) -> tuple[list[str], Outcome]:
    """Return what the system lacks, and the outcome."""
    if os.name != "posix":
        return ["a POSIX system"], Outcome(None, "not run")
    request = {
        "source": source,
        "name": name,
        "arguments": [json.dumps(argument) for argument in arguments],
        "limits": asdict(limits),
        "allow_unsandboxed": allow_unsandboxed,
    }
    open_missing_descriptors()  # else a pipe could get the number of a standard stream
    deadline = time.monotonic() + limits.wall_s + GRACE_S
    with (
        tempfile.TemporaryDirectory(prefix="estune-", ignore_cleanup_errors=True) as directory,
        tempfile.TemporaryFile() as given,
    ):
        given.write(json.dumps(request).encode())
        given.seek(0)
        status, status_end = os.pipe()
        result, result_end = os.pipe()
        try:
            try:
                child = _start(given.fileno(), status_end, result_end, directory)
            finally:
                os.close(status_end)
                os.close(result_end)
            try:
                told = _read(status, MAX_STATUS_BYTES, deadline)
                answer = _read(result, limits.result_bytes, deadline)  # its end: the guard ends, all else is dead
                if answer is None:
                    child.terminate()
                    _drain(result, time.monotonic() + GRACE_S)
            finally:
                with suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies
                    os.killpg(child.pid, signal.SIGKILL)  # not yet waited for: the group is still the child's
                child.wait()
        finally:
            os.close(status)
            os.close(result)
    try:
        missing = [str(part) for part in json.loads(told or b"")]
    except ValueError:
        return [], Outcome(None, "it did not start in time, or its memory is too little for an interpreter")
    return missing, _outcome(answer, len(arguments))


def _start(given: int, status: int, result: int, directory: str) -> subprocess.Popen[bytes]:
    # The environment is ours alone, so -I would only add that PYTHONHASHSEED is ignored. Some interpreters need the
    # library path to start; it is gone before the function runs.
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-s", "-S", "-P", "-B", str(CHILD), str(status), str(result), directory],
        stdin=given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[status, result],
        cwd=directory,
        env={**environment, "PYTHONHASHSEED": "0", "HOME": directory},
        start_new_session=True,
    )


def _read(pipe: int, most: int, deadline: float) -> bytes | None:
    """Return all that comes through a pipe until its end; None for more than ``most`` bytes, or past the deadline."""
    data = bytearray()
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if not ready.poll(left * 1000):
            break
        piece = os.read(pipe, 1 << 16)
        data += piece
        if len(data) > most:
            break
        if not piece:
            return bytes(data)
    return None


def _drain(pipe: int, deadline: float) -> None:
    while _read(pipe, 1 << 16, deadline) is None and time.monotonic() < deadline:
        pass


def _outcome(answer: bytes | None, wanted: int) -> Outcome:
    if answer is None:
        return Outcome(None, "it took too long or said too much")
    if not answer:
        return Outcome(None, "it does not define the function, or ended, or went over a limit")
    try:
        results = json.loads(answer)
    except (ValueError, RecursionError):
        return Outcome(None, "what came back is not JSON")
    if not isinstance(results, list) or len(results) != wanted:
        return Outcome(None, f"what came back is not {wanted} results")
    return Outcome(results)
