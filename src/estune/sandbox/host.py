"""Run a Python function that a model wrote in a sandbox, where it sees only its arguments.

`run_function` starts a fresh interpreter (`child.py`), which restricts itself and then calls the function on every
argument. On Linux (x86_64, aarch64) these restrictions apply before the model's code runs:

* Files: the function can read the standard library. It can write to an empty directory (its home) if the kernel allows
  a file system in memory. It cannot open anything else, not even an installed package (Landlock).
* It has no sockets, processes, threads or signals, and inherits no descriptor (seccomp; namespaces if allowed).
* CPU time, memory, file size, wall time and the size of the result are limited.

Only the arguments go in and only JSON comes out. The function can forge nothing but its own answer; the caller knows
the right answer and grades. Hashes of strings are the same in every run, and `random` is seeded. A program that asks
the system for randomness or the time can answer differently each time. The function can see names, sizes and times of
all files, but not their contents.
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
GRACE_S = 5.0  # seconds beyond the function's wall time, for the interpreter's start on a busy machine
MAX_STATUS_BYTES = 1 << 12


@dataclass(frozen=True)
class Limits:
    """Limits of one call of `run_function`, for all arguments together."""

    cpu_s: int = 2
    wall_s: float = 10.0
    memory_bytes: int = 512 << 20  # address space
    file_bytes: int = 1 << 20  # per file
    result_bytes: int = 256 << 10  # all results as JSON


@dataclass(frozen=True)
class Outcome:
    """The results of a function, one per argument, or None and the problem if there are none."""

    results: list[Any] | None  # an item is None if that call raised, or returned None or a value that is not JSON
    problem: str = ""  # the reason why there are no results


def run_function(
    source: str,
    name: str,
    arguments: Sequence[Any],
    limits: Limits = Limits(),
    *,
    allow_unsandboxed: bool = False,
) -> Outcome:
    """Call the function ``name`` of a source on each argument (a JSON value), all in one child process.

    With ``allow_unsandboxed`` the code also runs if the system lacks a restriction; limits and timeouts stay.

    Raises:
        UserError: the system lacks a restriction, and ``allow_unsandboxed`` is off.
    """
    missing, outcome = _run(source, name, arguments, limits, allow_unsandboxed)
    if missing and not allow_unsandboxed:
        raise UserError(refusal(missing))
    return outcome


@functools.cache
def missing_guarantees() -> tuple[str, ...]:
    """Return the restrictions that this system lacks, as text, after one trial; empty if code can run safely."""
    missing, outcome = _run("def probe(x):\n    return x", "probe", [1], Limits(), False)
    if not missing and outcome.results != [1]:
        return (f"a Python that starts in the sandbox ({outcome.problem or 'no result'})",)
    return tuple(missing)


def require(allow_unsandboxed: bool) -> str:
    """Return a warning about missing restrictions, or an empty string; call it before the first function runs.

    Raises:
        UserError: a restriction is missing, and ``allow_unsandboxed`` is off.
    """
    missing = missing_guarantees()
    if missing and not allow_unsandboxed:
        raise UserError(refusal(missing))
    return f"code that the model writes runs without {'; and without '.join(missing)}" if missing else ""


def refusal(missing: Sequence[str]) -> str:
    """Return the error message for a system that lacks a restriction."""
    return (
        f"code that a model writes is not run here, because this system lacks {'; and '.join(missing)}; "
        "to run it all the same, on a machine where it can do no harm: --allow_unsandboxed_code"
    )


def _run(
    source: str, name: str, arguments: Sequence[Any], limits: Limits, allow_unsandboxed: bool
) -> tuple[list[str], Outcome]:
    """Return the restrictions that the system lacks, and the outcome."""
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
        tempfile.TemporaryFile() as request_file,
    ):
        request_file.write(json.dumps(request).encode())
        request_file.seek(0)
        status, status_end = os.pipe()
        result, result_end = os.pipe()
        try:
            try:
                child = _start(request_file.fileno(), status_end, result_end, directory)
            finally:
                os.close(status_end)
                os.close(result_end)
            try:
                report = _read(status, MAX_STATUS_BYTES, deadline)
                answer = _read(result, limits.result_bytes, deadline)  # the pipe closes when guard and child have ended
                if answer is None:
                    child.terminate()
                    _drain(result, time.monotonic() + GRACE_S)
            finally:
                with suppress(ProcessLookupError, PermissionError):  # macOS raises for a group of zombies
                    os.killpg(child.pid, signal.SIGKILL)  # before `wait`, so the pid is still the child's
                child.wait()
        finally:
            os.close(status)
            os.close(result)
    try:
        missing = [str(part) for part in json.loads(report or b"")]
    except ValueError:
        return [], Outcome(None, "it did not start in time, or the memory limit is too small for an interpreter")
    return missing, _outcome(answer, len(arguments))


def _start(request: int, status: int, result: int, directory: str) -> subprocess.Popen[bytes]:
    # Not -I: it would ignore PYTHONHASHSEED, and the environment is clean anyway. Some interpreters need the library
    # path to start; the child deletes it before the function runs.
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-s", "-S", "-P", "-B", str(CHILD), str(status), str(result), directory],
        stdin=request,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[status, result],
        cwd=directory,
        env={**environment, "PYTHONHASHSEED": "0", "HOME": directory},
        start_new_session=True,
    )


def _read(pipe: int, most: int, deadline: float) -> bytes | None:
    """Return all bytes of a pipe until it closes; None for more than ``most`` bytes, or after the deadline."""
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
        return Outcome(None, "it took too long, or its results are too large")
    if not answer:
        return Outcome(None, "it does not define the function, or ended, or went over a limit")
    try:
        results = json.loads(answer)
    except (ValueError, RecursionError):
        return Outcome(None, "what came back is not JSON")
    if not isinstance(results, list) or len(results) != wanted:
        return Outcome(None, f"what came back is not {wanted} results")
    return Outcome(results)
