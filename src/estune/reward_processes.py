"""The trainer's side of the reward workers: one `Worker` per thread of a pool, and the fork server they come from."""

from __future__ import annotations

import json
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

from estune import reward_worker
from estune.errors import UserError
from estune.reward_loading import INLINE_HINT

LOAD_LIMIT_S = 120.0  # for a worker to import what the reward functions need, and to receive a batch
SERVER_LIMIT_S = 30.0  # the fork server answers in milliseconds; past this it counts as dead


class CallError(Exception):
    """The worker gave no answer: too late, or dead."""


class Worker:
    """One worker process at a time, for one thread; started again when it was killed or died."""

    def __init__(self, server: ForkServer, setup: bytes, timeout_s: float) -> None:
        self.batch = b""  # the pickled batch being scored
        self._server, self._setup, self._timeout_s = server, setup, timeout_s
        self._pid = 0
        self._channel: socket.socket | None = None
        self._has_batch: bytes = b""
        self._was_loaded = False

    def ensure_loaded(self) -> None:
        """Start a worker where there is none.

        Raises:
            UserError: the functions do not load, and never did (later on, it is the call that fails).
        """
        if self._channel is not None:
            return
        self._pid, self._channel = self._server.start_worker()
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
        """Call one function on some rows of `batch`; the reply has ``error`` where that failed."""
        try:
            self.ensure_loaded()
            if self._has_batch is not self.batch:
                reply = self._request(self.batch, LOAD_LIMIT_S)
                if "error" in reply:
                    return reply
                self._has_batch = self.batch
            return self._request(pickle.dumps(("call", function, rows)), self._timeout_s)
        except CallError as failure:
            if self._server.closed:
                raise CancelledError("the reward pool was closed") from None
            return {"error": str(failure)}

    def _request(self, message: bytes, limit_s: float) -> dict[str, Any]:
        channel = self._channel
        assert channel is not None
        try:
            channel.settimeout(limit_s)
            deadline = time.monotonic() + limit_s
            reward_worker.send(channel, message)
            reply: dict[str, Any] = json.loads(reward_worker.receive(channel, deadline))
            return reply
        except TimeoutError:
            self._drop(b"k")
            raise CallError(f"took longer than {limit_s:g} s and was killed") from None
        except (EOFError, OSError, ValueError):
            raise CallError(f"worker process died{_cause(self._drop(b'd'))}") from None

    def close(self) -> None:
        """Hang up; an idle worker then ends."""
        self.interrupt()
        if self._channel is not None:
            self._channel.close()
        self._channel = None

    def interrupt(self) -> None:
        """Wake the thread that waits for an answer; for other threads. Death wakes it too, but not where a process
        that the trainer forked meanwhile still holds the worker's end."""
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
    """The trainer's side of the fork server: one at a time, started again should it ever die."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.closed = False
        self._launch()

    def _launch(self) -> None:
        self._line, theirs = socket.socketpair()
        self._line.settimeout(SERVER_LIMIT_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", reward_worker.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                # Rewards that walk over a set of strings then give the same bits in every run and every worker.
                env={"PYTHONHASHSEED": "0", **os.environ},
            )

    def start_worker(self) -> tuple[int, socket.socket]:
        """Fork a worker; its pid and our end of its line. CancelledError once closed."""
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
                if self._process is server:  # else another thread was here before us
                    self._stop()
                    self._launch()
            return self._ask(b"f", 0, theirs)[0], ours

    def stop_worker(self, pid: int, how: bytes) -> int:
        """Kill a worker and all it started; its wait status where it had died by itself, else -1."""
        with suppress(OSError, EOFError):
            return self._ask(how, pid, None)[1]
        return -1

    def _ask(self, what: bytes, pid: int, descriptor: socket.socket | None) -> tuple[int, int]:
        with self._lock:
            if self.closed:
                raise EOFError
            command = reward_worker.COMMAND.pack(what, pid)
            socket.send_fds(self._line, [command], [descriptor.fileno()] if descriptor else [])
            reply = self._line.recv(reward_worker.REPLY.size)
        if len(reply) < reward_worker.REPLY.size:
            raise EOFError
        first, second = reward_worker.REPLY.unpack(reply)
        return first, second

    def close(self) -> None:
        """Hang up: the server kills every worker with all it started, and exits."""
        with self._lock:
            self.closed = True
            self._stop()

    def _stop(self) -> None:
        with suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)  # also where a forked copy of the trainer still holds the line
        self._line.close()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
