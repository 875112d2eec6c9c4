"""The far side of `estune.rewards.pool`: a fork server, and the worker processes in which reward functions run.

The fork server is a fresh interpreter that runs this file as a script (``python -P reward_worker.py FD``). It has one
thread, never runs a line of the user's, and so always answers: it forks workers, kills them with everything they
started, and kills them all when the trainer goes away, however it goes. Why not multiprocessing's: its workers hold
its own life line open, so one that hangs in C outlives a killed trainer, and it imports the user's ``__main__``.

Simplification made on purpose: only the standard library is imported here (a worker forks in a millisecond and owns no
threads); the functions themselves bring in what they need.

Requests are pickles made by the trainer. Replies are JSON: a worker may have run text that a model wrote, and
unpickling its answer would let that text run in the trainer.
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
COMMAND = struct.Struct("<cq")  # "f" fork, "k" kill or "d" it died; pid
REPLY = struct.Struct("<qq")  # pid, wait status or -1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MAX_REPLY_BYTES = 1 << 26  # as Python objects in the trainer it can be thirty times that

# A terminal's ctrl-C, its closing, and a scheduler's SIGTERM reach every process of a job, but a member that is being
# finished still needs its rewards: the trainer decides when its workers end.
IGNORED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class AnswerError(Exception):
    """A reward function returned something that is not one number or None per completion."""


# --- calling one reward function; also used inside the trainer where isolation is off -------------------------------


def accepted_keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the keywords a function can be called with; None means any (it has ``**kwargs``, or no signature)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def required_keywords(function: Callable[..., Any]) -> list[str]:
    """Return the parameters that a function must be given: those without a default."""
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

    ``columns`` holds ``prompts``, ``completions``, ``completion_ids`` and every dataset column, one value per row;
    ``run`` finishes the coroutine of an ``async def``, always on one event loop, as clients cached by it expect.
    Returns ``rewards`` (a float or None per row), ``metrics`` (name -> values logged) and ``extra`` (column -> values).
    Raises whatever the function raises, and `AnswerError`.
    """
    metrics: dict[str, list[float]] = {}
    extra: dict[str, list[Any]] = {}

    def log_metric(name: str, value: float) -> None:
        if isinstance(name, str):
            metrics.setdefault(name, []).append(float(value))

    def log_extra(column: str, values: list[Any]) -> None:
        logged = extra.setdefault(str(column), [])
        logged.extend(
            itertools.islice(values, max(0, len(rows) + 1 - len(logged)))
        )  # one too many shows that it is wrong

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
    """Return a reply as JSON: numbers of other libraries become numbers, what JSON does not know becomes text."""

    def plain(value: Any) -> Any:
        try:
            return value.item()
        except Exception:
            return str(value)

    return json.dumps(reply, default=plain)


def describe(error: BaseException, function: Callable[..., Any]) -> str:
    """Return ``Type: message (file.py:line)`` of an error, the line being the last one in the function's own file."""
    try:
        message = " ".join(str(error).split())[:300]
    except Exception:  # an exception class of the user's whose __str__ raises
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
    """Make a module of a file's text and register it; the same text then gives the same functions in every process."""
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
    """Receive one message; ``deadline`` is a `time.monotonic` instant.

    What has already arrived is read even past the deadline: a trainer that was suspended (ctrl-Z) finds its answers.

    Raises:
        TimeoutError: the message was not there in time.
        EOFError: the other side is gone.
    """
    (length,) = LENGTH.unpack(_receive_exactly(channel, LENGTH.size, deadline))
    if deadline is not None and length > MAX_REPLY_BYTES:
        raise EOFError("no reply of ours")
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
    """Load the reward functions, then answer calls until the trainer hangs up."""
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
        number: int | None = None  # of a call; its answer carries it
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
        except BaseException as error:  # also SystemExit: a reward that calls sys.exit has failed, no more
            message = json.dumps({"error": describe(error, function), "call": number})
        send(channel, message.encode())


def _load(path: list[str], files: dict[str, tuple[str, str]], functions: bytes) -> list[Callable[..., Any]]:
    """Unpickle the functions in a process that can import what the trainer can import."""
    sys.path[:] = path
    for name, (file, source) in files.items():
        module_from_source(name, file, source)
    loaded: list[Callable[..., Any]] = pickle.loads(functions)
    return loaded


# --- the fork server -------------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> None:
    """Fork and kill workers as told; when the trainer is gone, kill them all and return.

    The trainer is gone when it hangs up or is no longer the parent (a process it forked may hold the line open).
    Where a worker ended, what it had started ends before the trainer gets its reply.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux":
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # whatever a dead worker leaves behind becomes a child of this process
    trainer = os.getppid()
    alive: set[int] = set()
    ended: dict[int, int] = {}  # wait status of workers nobody asked about yet
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
            for _ in range(50 if kind == b"d" else 0):  # "d": it hung up, and its wait status is about to come
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
    """Fork a worker in a session of its own and return its pid once it leads its process group."""
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
                file.write("500")  # short of memory, the kernel should take a reward before it takes the trainer
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
    """In a process that a reward forks: let go of the trainer's line, and let signals end it, one on its way too."""
    channel.close()
    for number in IGNORED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)


def _reap(alive: set[int], ended: dict[int, int]) -> bool:
    """Collect the children that ended; False once there are none left. A dead worker's group is killed with it."""
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
    """Kill what dead workers left behind, first waiting for the worker ``dying`` that was just killed.

    On Linux that is every child of ours that is no worker: a process whose parent died becomes one. Whose it was can no
    longer be told, so a daemon (a child whose parent ended on purpose) of a living worker goes too.
    """
    deadline = time.monotonic() + patience_s
    while _reap(alive, ended) and time.monotonic() < deadline:
        orphans = _children() - alive
        if not orphans and dying not in alive:
            return
        for pid in orphans:  # none of these pids can be another process by now: only `_reap` frees them
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _kill_everything(alive: set[int], ended: dict[int, int]) -> None:
    """Kill every worker, its group, and on Linux also what left its group."""
    for pid in alive:
        _kill_group(pid)
    deadline = time.monotonic() + 2.0
    while alive and time.monotonic() < deadline and _reap(alive, ended):
        time.sleep(0.001)
    alive.clear()  # by now there are none that a signal could end
    _kill_orphans(alive, ended)


def _children() -> set[int]:
    """Return the pids of our children, zombies included; empty where there is no Linux /proc."""
    with suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        return {int(pid) for pid in file.read().split()}
    return set()


def main() -> None:
    """Run the fork server on the socket whose descriptor is the argument."""
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False, errors="backslashreplace")
    for number in IGNORED:  # by a handler, not SIG_IGN: programs that a reward starts get the default back
        if signal.getsignal(number) != signal.SIG_IGN:  # else the trainer was started to ignore it, and so are they
            signal.signal(number, lambda *_: None)
    with suppress(ImportError):
        import cloudpickle  # noqa: F401  (so that workers find it loaded)
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)


if __name__ == "__main__":
    main()
