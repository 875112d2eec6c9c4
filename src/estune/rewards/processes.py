"""The trainer's side of the reward workers: one `Worker` per thread of a pool, and the `ForkServer` that forks them."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

from estune.console import open_missing_descriptors, pass_on
from estune.errors import UserError
from estune.rewards.contract import read_reply
from estune.rewards.fork_server import COMMAND, PACKAGE, REPLY, START
from estune.rewards.loading import INLINE_HINT
from estune.rewards.worker import receive, send

LOAD_LIMIT_S = 120.0  # seconds for a worker to load the reward functions, and to receive a batch
SERVER_LIMIT_S = 30.0  # seconds; the fork server answers in milliseconds, and after this limit it counts as dead


class CallError(Exception):
    """A worker gave no valid reply: it timed out, died, or sent other bytes."""


class Worker:
    """One worker process for one thread. A worker that was killed or died is replaced at the next call."""

    def __init__(self, server: ForkServer, setup: bytes, timeout_s: float) -> None:
        self.batch = b""  # the pickled batch being scored
        self._server, self._setup, self._timeout_s = server, setup, timeout_s
        self._pid = 0
        self._channel: socket.socket | None = None
        self._has_batch: bytes = b""
        self._was_loaded = False
        self._n_calls = 0

    def ensure_loaded(self) -> None:
        """Start a worker if none is running.

        Raises:
            UserError: the functions do not load, and never loaded before.
            CallError: the functions do not load, but loaded before.
        """
        if self._channel is not None:
            return
        try:
            self._pid, self._channel = self._server.start_worker()
        except (OSError, EOFError) as failure:  # a reward may have used up the user's limit of processes
            if self._server.closed or not self._was_loaded:
                raise
            raise CallError(f"could not be restarted: {failure}") from None
        self._has_batch = b""
        try:
            error = self._request(self._setup, LOAD_LIMIT_S).get("error")
        except CallError as failure:
            error = f"it {failure}"
        if error is None:
            self._was_loaded = True
            return
        self._drop(b"k")
        if self._server.closed:
            raise CancelledError("the reward pool was closed")
        if self._was_loaded:
            raise CallError(f"could not be restarted: {error}")
        raise UserError(f"the reward functions do not load in a worker process ({error}); {INLINE_HINT}")

    def call(self, function: int, rows: list[int]) -> dict[str, Any]:
        """Call one function on some rows of `batch`; return the reply, which has ``error`` if the call failed."""
        try:
            self.ensure_loaded()
            if self._has_batch is not self.batch:
                reply = self._request(self.batch, LOAD_LIMIT_S)
                if "error" in reply:
                    return reply
                self._has_batch = self.batch
            self._n_calls += 1
            request = pickle.dumps(("call", function, rows, self._n_calls))
            return self._request(request, self._timeout_s, self._n_calls, len(rows))
        except CallError as failure:
            if self._server.closed:
                raise CancelledError("the reward pool was closed") from None
            return {"error": str(failure)}

    def _request(
        self, message: bytes, limit_s: float, call: int | None = None, n_rows: int | None = None
    ) -> dict[str, Any]:
        channel = self._channel
        assert channel is not None
        try:
            channel.settimeout(limit_s)
            deadline = time.monotonic() + limit_s
            send(channel, message)
            reply = receive(channel, deadline)
        except TimeoutError:
            self._drop(b"k")
            raise CallError(f"took longer than {limit_s:g} s and was killed") from None
        except (EOFError, OSError):
            raise CallError(f"worker process died{_cause(self._drop(b'd'))}") from None
        try:
            return read_reply(reply, call, n_rows)
        except ValueError as error:  # includes bytes that are not JSON or not UTF-8
            self._drop(b"k")
            raise CallError(f"worker process sent an invalid reply ({error}) and was killed") from None

    def close(self) -> None:
        """Close the connection; an idle worker then ends."""
        self.interrupt()
        if self._channel is not None:
            self._channel.close()
        self._channel = None

    def interrupt(self) -> None:
        """Wake the thread that waits for a reply; other threads call this.

        The worker's death would wake it too, but not if a process that the trainer forked holds the worker's end.
        """
        if (channel := self._channel) is not None:
            with suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)

    def _drop(self, how: bytes) -> int:
        self.close()
        return self._server.stop_worker(self._pid, how)


def _cause(status: int) -> str:
    if status == -1:
        return ""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f" (exit status {code})"
    names = {number.value: number.name for number in signal.Signals}
    return f" ({names.get(-code, f'signal {-code}')})"


class ForkServer:
    """The trainer's connection to its fork server, which is started again if it dies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.closed = False
        self._launch()

    def _launch(self) -> None:
        open_missing_descriptors()  # else a socket could get the number of a standard stream
        self._line, theirs = socket.socketpair()
        self._line.settimeout(SERVER_LIMIT_S)
        printed, theirs_to_print = os.pipe()
        self._relay = threading.Thread(target=_relay, args=(printed,), name="reward-output", daemon=True)
        self._relay.start()
        with theirs, open(theirs_to_print, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(PACKAGE), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                # With one hash seed, rewards that iterate over a set of strings give the same bits in every process.
                env={"PYTHONHASHSEED": "0", **os.environ},
            )

    def start_worker(self) -> tuple[int, socket.socket]:
        """Fork a worker; return its pid and the trainer's end of its connection.

        Raises:
            CancelledError: the pool is closed.
        """
        server = self._process
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                return self._ask(b"f", 0, theirs)[0], ours
            except (OSError, EOFError):
                pass
            with self._lock:
                if self.closed:
                    ours.close()
                    raise CancelledError("the reward pool was closed")
                if self._process is server:  # else another thread has restarted it
                    self._stop()
                    self._launch()
            return self._ask(b"f", 0, theirs)[0], ours

    def stop_worker(self, pid: int, how: bytes) -> int:
        """Kill a worker and all processes that it started; return its wait status if it died by itself, else -1."""
        with suppress(OSError, EOFError):
            return self._ask(how, pid, None)[1]
        return -1

    def _ask(self, what: bytes, pid: int, descriptor: socket.socket | None) -> tuple[int, int]:
        with self._lock:
            if self.closed:
                raise EOFError
            command = COMMAND.pack(what, pid)
            socket.send_fds(self._line, [command], [descriptor.fileno()] if descriptor else [])
            reply = self._line.recv(REPLY.size)
        if len(reply) < REPLY.size:
            raise EOFError
        first, second = REPLY.unpack(reply)
        return first, second

    def close(self) -> None:
        """Close the connection: the server kills all workers with the processes that they started, and exits."""
        with self._lock:
            self.closed = True
            self._stop()

    def _stop(self) -> None:
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)  # works even if a forked process holds the socket
        self._line.close()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._relay.join(timeout=1.0)  # the last output; an escaped process may hold the pipe


def _relay(pipe: int) -> None:
    """Copy the output of rewards to stderr, or drop it.

    Rewards write into a pipe that is always read. So a closed stderr or a full disk cannot make a reward fail.
    """
    with open(pipe, "rb", buffering=0) as file:
        while data := file.read(1 << 16):
            pass_on(data)
