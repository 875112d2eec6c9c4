"""Runs blocks of documentation and whole programs unchanged, without the time of their imports.

`Shell.run` passes a block to bash. The first `estune` and `python` on its PATH are shims. They pass their words,
directory, environment and standard streams to a server that has imported estune, torch and TRL. The server forks the
command and returns its exit status. Variables that are read at an import (``OMP_NUM_THREADS``, ``HF_ENDPOINT``) have
the values with which the server was started.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

HELPERS = str(Path(__file__).resolve().parent)
SOCKET = "socket"
SHIM = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(request)
code = int(connection.recv(16) or b"99")
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class Shell:
    """The client: starts the server and runs blocks."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._server.stdout is not None
        programs = self._server.stdout.readline().rstrip("\n")
        assert programs, "the server did not start"
        self.environment = {**environment, "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(self, block: str, cwd: Path, language: str = "bash") -> subprocess.CompletedProcess[str]:
        """Run a block to its end.

        Args:
            block: its text.
            cwd: its directory.
            language: ``bash``, or ``python`` for a program.
        """
        command = ["bash", "-euc", block] if language == "bash" else ["bash", "-euc", 'python -c "$1"', "bash", block]
        return subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True)

    def check(self, block: str, cwd: Path, language: str = "bash") -> str:
        """Run a block, check that it succeeds, and return its standard output."""
        done = self.run(block, cwd, language)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout


# --- the server -------------------------------------------------------------------------------------------------------


def _main() -> None:
    """Import, open the socket, print the directory of the shims, and fork a command a request until stdin is closed."""
    import transformers
    from command_line import load_kernels

    import estune.baselines.policy_gradient
    import estune.baselines.rejection
    import estune.commands.evaluate
    import estune.commands.plan
    import estune.commands.replay
    import estune.commands.score
    import estune.engines.hf.engine
    import estune.train.trainer

    for name in ("LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    load_kernels()
    estune.commands.plan.CALIBRATION_S = 1.0  # seconds; enough to show that a page's command works
    sys.path[:] = [path for path in sys.path if path != HELPERS]
    directory = tempfile.mkdtemp(prefix="estune-shell-")
    address = os.path.join(directory, SOCKET)
    programs = [os.path.join(directory, name) for name in ("estune", "python")]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        for path in programs:
            Path(path).write_text(SHIM.format(python=sys.executable, address=address, name=os.path.basename(path)))
            os.chmod(path, 0o700)
        print(directory, flush=True)
        server = os.getpid()
        try:
            _serve(listener)
        finally:
            if os.getpid() == server:
                for path in (*programs, address):
                    os.unlink(path)
                os.rmdir(directory)


def _serve(listener: socket.socket) -> None:
    while True:
        ready, _, _ = select.select([listener, 0], [], [], 1.0)
        _reap()
        if 0 in ready:
            return
        if listener in ready:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _answer(connection: socket.socket) -> None:
    """Fork the command, wait for it, and send its exit status; does not return."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    n_bytes, request = int.from_bytes(size, "big"), b""
    while len(request) < n_bytes:
        request += connection.recv(n_bytes - len(request))
    pid = os.fork()
    if pid == 0:
        connection.close()
        os._exit(ended(lambda: _command(*json.loads(request), streams)))
    for stream in streams:
        os.close(stream)
    connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def _command(program: str, words: list[str], cwd: str, environment: dict[str, str], streams: list[int]) -> int:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    make_streams()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if program == "estune":
        from estune.cli import main

        sys.argv = ["estune", *words]
        return main()
    if words[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *words[2:]], [""]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), module.__dict__)
    else:
        sys.argv, sys.path[:0] = words, [os.path.dirname(os.path.abspath(words[0]))]
        runpy.run_path(words[0], run_name="__main__")
    return 0


# --- a forked command behaves like a new interpreter: its own standard streams, and an interpreter's end --------------


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


if __name__ == "__main__":
    _main()
