"""The fork server, and the worker processes that it forks to run reward functions for `estune.rewards.pool`.

The fork server is a fresh interpreter that runs this file as a script (``python -P worker.py FD``). It has one thread
and runs no user code, so it always answers. It forks workers and kills a worker with all processes that the worker
started. When the trainer ends, by whatever cause, the server kills all workers. The fork server of `multiprocessing`
does not fit: its workers hold the server's pipe open, so a worker that hangs in C survives a killed trainer, and it
imports the user's ``__main__``.

Simplification on purpose: this file imports only the standard library, so a worker forks in a millisecond and owns no
threads. Loading the reward functions imports the packages that they need.

Requests are pickles from the trainer. Replies are JSON: a worker may have run code that a model wrote, and unpickling
a reply would run that code in the trainer.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import itertools
import json
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

TRL_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")

LENGTH = struct.Struct("<Q")
COMMAND = struct.Struct("<cq")  # "f" fork, "k" kill, or "d" the worker died; pid
REPLY = struct.Struct("<qq")  # pid, wait status or -1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MAX_REPLY_BYTES = 1 << 26  # bytes of JSON; as Python objects in the trainer they can take thirty times that

# Ctrl-C, a closing terminal and a scheduler's SIGTERM signal every process of a job. A member in progress still needs
# its rewards, so workers ignore these signals and the trainer decides when they end.
IGNORED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class AnswerError(Exception):
    """A reward function did not return one number or None per completion."""


# --- calling one reward function; also used inside the trainer if isolation is off ----------------------------------


def accepted_keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the keywords that a function accepts; None means any (``**kwargs``, or no signature)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def required_keywords(function: Callable[..., Any]) -> list[str]:
    """Return the parameters of a function that have no default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def call_function(
    function: Callable[..., Any],
    columns: dict[str, list[Any]],
    trainer_state: dict[str, Any],
    rows: Sequence[int],
    run: Callable[[Coroutine[Any, Any, Any]], Any],
) -> dict[str, Any]:
    """Call a reward function as TRL does, on some rows of a batch.

    Args:
        function: the reward function.
        columns: ``prompts``, ``completions``, ``completion_ids`` and every dataset column, one value per row.
        trainer_state: attributes of the ``trainer_state`` object.
        rows: indices of the rows.
        run: runs the coroutine of an ``async def``; always on one event loop, as clients that it caches expect.

    Returns:
        ``rewards`` (a float or None per row), ``metrics`` (name -> values logged) and ``extra`` (column -> values).

    Raises:
        AnswerError: the function did not return one number or None per row.
        BaseException: whatever the function raises.
    """
    metrics: dict[str, list[float]] = {}
    extra: dict[str, list[Any]] = {}

    def log_metric(name: str, value: float) -> None:
        if isinstance(name, str):
            metrics.setdefault(name, []).append(float(value))

    def log_extra(column: str, values: list[Any]) -> None:
        logged = extra.setdefault(str(column), [])
        # One value more than there are rows is kept: the trainer then sees that the number is wrong.
        logged.extend(itertools.islice(values, max(0, len(rows) + 1 - len(logged))))

    keywords: dict[str, Any] = {name: [values[row] for row in rows] for name, values in columns.items()}
    keywords |= {
        "trainer_state": types.SimpleNamespace(**trainer_state),
        "log_extra": log_extra,
        "log_metric": log_metric,
    }
    accepted = accepted_keywords(function)
    if accepted is not None:
        keywords = {name: value for name, value in keywords.items() if name in accepted}
    answer = function(**keywords)
    if inspect.isawaitable(answer):
        answer = run(_await(answer))
    return {"rewards": _numbers(answer, len(rows)), "metrics": metrics, "extra": extra}


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _numbers(answer: Any, n_rows: int) -> list[float | None]:
    if answer is None or isinstance(answer, (str, bytes, dict)) or not hasattr(answer, "__iter__"):
        raise AnswerError(f"returned {type(answer).__name__} instead of a list of numbers")
    values = list(itertools.islice(answer, n_rows + 1))  # a generator may never end
    if len(values) != n_rows:
        count = len(answer) if hasattr(answer, "__len__") else "more" if len(values) > n_rows else len(values)
        raise AnswerError(f"returned {count} rewards for {n_rows} completions")
    return [None if value is None else _number(value) for value in values]


def _number(value: Any) -> float:
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise AnswerError(f"returned {str(value)[:40]!r} ({type(value).__name__}), which is not a number")


def to_json(reply: dict[str, Any]) -> str:
    """Return a reply as JSON: scalars of other libraries become numbers, other objects become text."""

    def plain(value: Any) -> Any:
        try:
            return value.item()
        except Exception:
            return str(value)

    return json.dumps(reply, default=plain)


def describe(error: BaseException, function: Callable[..., Any]) -> str:
    """Return ``Type: message (file.py:line)`` of an error, with the last line in the function's own file."""
    try:
        message = " ".join(str(error).split())[:300]
    except Exception:  # the __str__ of a user's exception class can raise
        message = ""
    if isinstance(error, AnswerError):
        return message
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    where, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and (not where or code is None or file == code.co_filename):
            where = f" ({os.path.basename(file)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}{': ' if message else ''}{message}{where}"


def module_from_source(name: str, path: str, source: str) -> types.ModuleType:
    """Make a module of a file's text and register it, so that every process gets the same functions from one text."""
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# --- messages: a length, then that many bytes ------------------------------------------------------------------------


def send(channel: socket.socket, payload: bytes) -> None:
    """Send one message, within the socket's own timeout."""
    if len(payload) < 1 << 16:
        channel.sendall(LENGTH.pack(len(payload)) + payload)
    else:
        channel.sendall(LENGTH.pack(len(payload)))
        channel.sendall(payload)


def receive(channel: socket.socket, deadline: float | None = None) -> bytearray:
    """Receive one message until ``deadline``, a `time.monotonic` instant.

    Bytes that have arrived are read even after the deadline, so a suspended trainer (ctrl-Z) still gets its replies.

    Raises:
        TimeoutError: the message did not arrive in time.
        EOFError: the other side closed the connection, or sent more than `MAX_REPLY_BYTES`.
    """
    (length,) = LENGTH.unpack(_receive_exactly(channel, LENGTH.size, deadline))
    if deadline is not None and length > MAX_REPLY_BYTES:
        raise EOFError("not a reply")
    return _receive_exactly(channel, length, deadline)


def _receive_exactly(channel: socket.socket, length: int, deadline: float | None) -> bytearray:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        try:
            if deadline is not None:
                channel.settimeout(max(deadline - time.monotonic(), 0.0))
            count = channel.recv_into(view)
        except BlockingIOError:
            raise TimeoutError from None
        except ConnectionError:
            raise EOFError from None
        if not count:
            raise EOFError
        view = view[count:]
    return buffer


# --- a worker process ------------------------------------------------------------------------------------------------


def run_worker(channel: socket.socket) -> None:
    """Load the reward functions, then answer calls until the trainer closes the connection."""
    functions: list[Callable[..., Any]] = []
    columns: dict[str, list[Any]] = {}
    state: dict[str, Any] = {}
    runner = asyncio.Runner()
    while True:
        try:
            request = receive(channel)
        except EOFError:
            return
        reply: dict[str, Any] = {}
        function: Any = None
        number: int | None = None  # the call's number, which the reply repeats
        try:
            kind, *values = pickle.loads(request)
            if kind == "load":
                functions = _load(*values)
            elif kind == "batch":
                columns, state = values
            else:
                index, rows, number = values
                function = functions[index]
                reply = call_function(function, columns, state, rows, runner.run)
            message = to_json({**reply, "call": number})  # ASCII
            if len(message) > MAX_REPLY_BYTES:
                raise AnswerError(f"logged {len(message)} bytes, over the limit of {MAX_REPLY_BYTES}")
        except BaseException as error:  # SystemExit too: a reward that calls sys.exit has only failed
            message = json.dumps({"error": describe(error, function), "call": number})
        send(channel, message.encode())


def _load(path: list[str], files: dict[str, tuple[str, str]], functions: bytes) -> list[Callable[..., Any]]:
    """Unpickle the functions, with the trainer's ``sys.path`` and its reward files."""
    sys.path[:] = path
    for name, (file, source) in files.items():
        module_from_source(name, file, source)
    loaded: list[Callable[..., Any]] = pickle.loads(functions)
    return loaded


# --- the fork server -------------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> None:
    """Fork and kill workers on command; when the trainer is gone, kill them all and return.

    The trainer is gone if it closed the connection or is no longer the parent process (a process that it forked may
    hold the connection open). If a worker ended, the processes that it started are killed before the reply is sent.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux":
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of a dead worker become children of this process
    trainer = os.getppid()
    alive: set[int] = set()
    ended: dict[int, int] = {}  # pid -> wait status that the trainer has not asked for yet
    while os.getppid() == trainer:
        readable, _, _ = select.select([control], [], [], 1.0)
        n_alive = len(alive)
        _reap(alive, ended)
        if len(alive) < n_alive:
            _kill_orphans(alive, ended)
        if not readable:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, COMMAND.size, 1)
        if len(message) < COMMAND.size:
            break
        kind, pid = COMMAND.unpack(message)
        status = -1
        if kind == b"f":
            pid = _fork_worker(descriptors[0], control, libc)
            alive.add(pid)
        else:
            for _ in range(50 if kind == b"d" else 0):  # "d": its wait status is about to arrive
                if not _reap(alive, ended) or pid not in alive:
                    break
                time.sleep(0.001)
            status = ended.pop(pid, -1)
            if pid in alive:
                _kill_group(pid)
            _kill_orphans(alive, ended, pid)
            ended.pop(pid, None)
        control.sendall(REPLY.pack(pid, status))
    _kill_everything(alive, ended)


def _fork_worker(descriptor: int, control: socket.socket, libc: ctypes.CDLL) -> int:
    """Fork a worker in its own session; return its pid once it leads its process group."""
    server = os.getpid()
    started, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write_end)
        os.close(descriptor)
        os.read(started, 1)
        os.close(started)
        return pid
    try:
        control.close()
        os.close(started)
        os.setsid()
        if sys.platform == "linux":
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
                file.write("500")  # out of memory, the kernel should kill a worker before the trainer
        if os.getppid() == server:
            os.write(write_end, b"1")
            os.close(write_end)
            os.set_inheritable(descriptor, False)
            channel = socket.socket(fileno=descriptor)
            os.register_at_fork(
                before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED),
                after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED),
                after_in_child=lambda: _become_ordinary(channel),
            )
            sys.modules["__main__"] = types.ModuleType("__main__")
            run_worker(channel)
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(0)


def _become_ordinary(channel: socket.socket) -> None:
    """In a process that a reward forks: close the trainer's connection and restore signals, pending ones included."""
    channel.close()
    for number in IGNORED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)


def _reap(alive: set[int], ended: dict[int, int]) -> bool:
    """Collect ended children, and kill the process group of each dead worker; return whether children are left."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return True
            if pid in alive:
                alive.discard(pid)
                _kill_group(pid)
                ended[pid] = status
    return False


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _kill_orphans(alive: set[int], ended: dict[int, int], dying: int = 0, patience_s: float = 1.0) -> None:
    """Kill the orphans of dead workers, and wait until the worker ``dying``, which was just killed, has ended.

    On Linux every child that is not a worker is an orphan, because a process becomes our child when its parent dies.
    The worker that started it is unknown, so a daemon of a living worker is killed too.
    """
    deadline = time.monotonic() + patience_s
    while _reap(alive, ended) and time.monotonic() < deadline:
        orphans = _children() - alive
        if not orphans and dying not in alive:
            return
        for pid in orphans:  # these pids cannot have been reused: only `_reap` frees them
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _kill_everything(alive: set[int], ended: dict[int, int]) -> None:
    """Kill every worker and its process group, and on Linux also processes that left the group."""
    for pid in alive:
        _kill_group(pid)
    deadline = time.monotonic() + 2.0
    while alive and time.monotonic() < deadline and _reap(alive, ended):
        time.sleep(0.001)
    alive.clear()  # the remaining ones cannot be ended by a signal
    _kill_orphans(alive, ended)


def _children() -> set[int]:
    """Return the pids of this process's children, zombies included; empty without a Linux /proc."""
    with suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        return {int(pid) for pid in file.read().split()}
    return set()


def main() -> None:
    """Run the fork server on the socket whose descriptor is the first argument."""
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False, errors="backslashreplace")
    for number in IGNORED:  # a handler, not SIG_IGN: programs that a reward starts then get the default action
        if signal.getsignal(number) != signal.SIG_IGN:  # if the trainer ignores a signal, its workers do too
            signal.signal(number, lambda *_: None)
    with suppress(ImportError):
        import cloudpickle  # noqa: F401  (loaded once, for all workers)
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)


if __name__ == "__main__":
    main()
