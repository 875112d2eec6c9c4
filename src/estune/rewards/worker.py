"""A worker process: its messages, and the loop that loads the reward functions and answers calls.

Requests are pickles from the trainer. Replies are JSON: a worker may have run code that a model wrote, and unpickling
a reply would run that code in the trainer.

The file imports only the standard library, because the fork server loads it (`estune.rewards.fork_server`).
"""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from estune.rewards.contract import AnswerError, call_function, describe, to_json

LENGTH = struct.Struct("<Q")  # bytes of the message that follows
MAX_REPLY_BYTES = 1 << 26  # bytes of JSON; as Python objects in the trainer they can take thirty times that


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
    for function in loaded:
        if hasattr(function, "prepare"):
            function.prepare()
    return loaded


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
