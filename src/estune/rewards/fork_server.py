"""The fork server: a fresh interpreter that forks reward workers, kills them, and ends with its trainer.

It has one thread and runs no user code, so it always answers. It forks workers and kills a worker with all processes
that the worker started. When the trainer ends, by whatever cause, the server kills all workers. The fork server of
`multiprocessing` does not fit: its workers hold the server's pipe open, so a worker that hangs in C survives a killed
trainer, and it imports the user's ``__main__``.

Simplification on purpose: this file and the files that it imports need only the standard library, so a worker forks in
a millisecond and owns no threads. Loading the reward functions imports the packages that they need.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

from estune.rewards.worker import run_worker

# The program of the fork server, for ``python -P -c START PACKAGE FD``. It loads estune from PACKAGE, the package's
# `__init__.py`. `sys.path` stays untouched, so a module beside the package never hides one of the standard library.
PACKAGE = Path(__file__).parents[1] / "__init__.py"
START = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("estune", sys.argv[1])
sys.modules["estune"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from estune.rewards.fork_server import main
main(int(sys.argv[2]))
"""

COMMAND = struct.Struct("<cq")  # "f" fork, "k" kill, or "d" the worker died; pid
REPLY = struct.Struct("<qq")  # pid, wait status or -1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

# Ctrl-C, a closing terminal and a scheduler's SIGTERM signal every process of a job. A member in progress still needs
# its rewards, so workers ignore these signals and the trainer decides when they end.
IGNORED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


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


def main(descriptor: int) -> None:
    """Run the fork server on the socket with this descriptor."""
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False, errors="backslashreplace")
    for number in IGNORED:  # a handler, not SIG_IGN: programs that a reward starts then get the default action
        if signal.getsignal(number) != signal.SIG_IGN:  # if the trainer ignores a signal, its workers do too
            signal.signal(number, lambda *_: None)
    with suppress(ImportError):
        import cloudpickle  # noqa: F401  (loaded once, for all workers)
    serve(socket.socket(fileno=descriptor))
    os._exit(0)
