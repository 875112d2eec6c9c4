"""Runs `estune` commands of the fuzz run as forks of one process that has imported estune, torch and transformers.

A fork behaves like a new interpreter: the case chooses its standard streams, `estune.cli.main` reads `sys.argv` and
uses the streams, and they are flushed at its end. (`Zygote` in `command_line.py`, which most tests use, passes the
words to `main` and always uses files as streams.)
"""

from __future__ import annotations

import gc
import json
import os
import pty
import re
import resource
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Protocol, Self

HELPERS = str(Path(__file__).resolve().parents[1] / "helpers")
if HELPERS not in sys.path:
    sys.path.insert(0, HELPERS)

from command_line import count_writes, load_kernels, tree  # noqa: E402
from shells import ended, make_streams  # noqa: E402

LIMIT_S = 300.0  # a command that takes longer hangs; a case takes about a second
# Address space of a command beyond the server's, so that absurd sizes fail without using the machine's memory.
MEMORY_BYTES = 6 << 30
NEVER = 1 << 30  # number of a write that no command reaches
STREAMS = ("file", "closed", "broken", "full", "pty")


@dataclass(frozen=True)
class Done:
    """The result of a command: exit status (negative: the signal that ended it), stdout, stderr, number of writes."""

    code: int
    out: str
    err: str
    writes: int
    hung: bool


class Forks:
    """The client of the server; it runs one command at a time."""

    def __enter__(self) -> Self:
        self._connection, theirs = Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false",
                       "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment
        )
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.wait()

    def run(
        self,
        words: Sequence[Any],
        cwd: Path,
        *,
        streams: Mapping[str, str] | None = None,
        signal_at: tuple[int, int] = (NEVER, signal.SIGKILL),
        script: Path | None = None,
    ) -> Done:
        """Run a command to its end.

        Args:
            words: of the command line, without ``estune``.
            cwd: its directory.
            streams: ``stdin``, ``stdout`` and ``stderr`` -> one of `STREAMS`; by default files.
            signal_at: (k, number): the command sends itself this signal before its k-th write; see `count_writes`.
            script: a Python file to run instead of `estune`.
        """
        with Terminals(streams or {}) as terminals:
            request = dict(words=[str(word) for word in words], cwd=str(cwd), streams=terminals.streams,
                           signal_at=signal_at, script=script and str(script))  # fmt: skip
            self._connection.send_bytes(json.dumps(request).encode())
            pid = int(self._connection.recv_bytes())
            hung = not self._connection.poll(LIMIT_S)
            if hung:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            code = int(self._connection.recv_bytes())
        out, err = (_text(cwd / name) + terminals.text(name[1:]) for name in (".stdout", ".stderr"))
        counted = cwd / ".writes"
        writes = int(counted.read_text()) if counted.exists() else 0
        return Done(code, out, err, writes, hung)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace") if path.exists() else ""


class Terminals:
    """Pseudo terminals for streams of kind ``pty``; threads read them so that no writer waits."""

    def __init__(self, streams: Mapping[str, str]) -> None:
        self.streams = {name: streams.get(name, "file") for name in ("stdin", "stdout", "stderr")}
        self._threads: list[threading.Thread] = []
        self._read: dict[str, list[bytes]] = {}
        self._slaves: list[int] = []
        self._masters: list[int] = []

    def __enter__(self) -> Self:
        for name, kind in self.streams.items():
            if kind == "pty":
                master, slave = pty.openpty()
                self._masters.append(master)
                self._slaves.append(slave)
                self.streams[name] = os.ttyname(slave)
                self._read[name] = []
                self._threads.append(threading.Thread(target=_drain, args=(master, self._read[name])))
                self._threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        for slave in self._slaves:
            os.close(slave)
        for thread in self._threads:
            thread.join()
        for master in self._masters:
            os.close(master)

    def text(self, name: str) -> str:
        """Return what was written to a stream's terminal."""
        return b"".join(self._read.get(name, [])).decode("utf-8", "replace")


def _drain(master: int, read: list[bytes]) -> None:
    with suppress(OSError):  # EIO: no process has the terminal open any more
        while data := os.read(master, 65536):
            read.append(data)


# --- the server -------------------------------------------------------------------------------------------------------


def _serve(connection: Connection) -> None:
    """Fork a command for every request, until the connection is closed."""
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            connection.close()
            os._exit(ended(partial(_command, request)))
        connection.send_bytes(str(pid).encode())
        connection.send_bytes(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def _command(request: dict[str, Any]) -> int:
    from estune.cli import main

    os.setpgid(0, 0)
    os.chdir(request["cwd"])
    with suppress(FileNotFoundError):
        os.unlink(".writes")
    for descriptor, (name, kind) in enumerate(request["streams"].items()):
        _redirect(descriptor, name, kind)
    make_streams()
    _, limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY_BYTES, limit))
    sys.argv = [request["script"] or "estune", *request["words"]]
    calls = count_writes(*request["signal_at"])
    try:
        if request["script"]:
            runpy.run_path(request["script"], run_name="__main__")
            return 0
        return main()
    finally:
        with open(".writes", "w") as file:
            file.write(str(calls()))


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _redirect(descriptor: int, name: str, kind: str) -> None:
    """Redirect a standard descriptor; ``kind`` is one of `STREAMS`, or the path of a terminal."""
    os.close(descriptor)
    if kind == "closed":
        return
    if kind == "broken":
        ends = os.pipe()
        used, left = (ends[0], ends[1]) if descriptor == 0 else (ends[1], ends[0])
        os.close(left)
    elif kind == "file":
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        used = os.open(f".{name}", flags, 0o600)
    else:
        used = os.open("/dev/full" if kind == "full" else kind, os.O_RDWR | os.O_NOCTTY)
    if used != descriptor:
        os.dup2(used, descriptor)
        os.close(used)
    os.set_inheritable(descriptor, True)


def _main() -> None:
    import datasets
    import pyarrow.parquet
    import transformers

    import estune.commands.evaluate
    import estune.commands.replay
    import estune.commands.score
    import estune.engines.hf.engine
    import estune.train.trainer  # noqa: F401

    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM", "Gemma3ForCausalLM",
                 "PreTrainedTokenizerFast"):  # fmt: skip
        getattr(transformers, name)
    assert datasets and pyarrow.parquet
    load_kernels()
    gc.freeze()  # so that garbage collections in forks do not copy the pages of imported objects
    _serve(Connection(int(sys.argv[1])))
    sys.stderr.flush()
    os._exit(0)  # a normal exit would report the frozen objects as leaks


if __name__ == "__main__":
    _main()


# --- how a command of a case ends: in success or in one clear sentence; anything else is a `Fault` --------------------

Case = dict[str, Any]  # JSON, so that one line prints a case and repeats it
Check = Callable[[Case, Path, Forks], str]  # returns the outcome in a few words; raises Fault
ERROR = "estune: error: "
NOT_CLEAN = ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error", "core dumped")


class Domain(Protocol):
    """A module of cases: ``cases`` is a hypothesis strategy for `Case`, ``check`` a `Check`."""

    cases: Any
    check: Check


class Fault(AssertionError):
    """A case ended neither in success nor in one clear sentence."""


def refusal(done: Done, what: str) -> str | None:
    """Return the sentence with which a command was refused; None if it succeeded.

    Raises:
        Fault: the command hung, died, or did not print exactly one sentence.
    """
    if done.hung:
        raise Fault(f"{what} hangs: {tail(done)}")
    if any(words in done.err for words in NOT_CLEAN):
        raise Fault(f"{what} ends in a traceback: {tail(done)}")
    sentences = [line for line in done.err.splitlines() if line.startswith(ERROR)]
    if done.code == 0:
        if sentences:
            raise Fault(f"{what} prints an error and exits with 0: {tail(done)}")
        return None
    if done.code != 2:
        raise Fault(f"{what} exits with {done.code}: {tail(done)}")
    if len(sentences) != 1 or done.err.splitlines()[-1] != sentences[0]:
        raise Fault(f"{what} is not refused in one sentence: {tail(done)}")
    return sentences[0].removeprefix(ERROR)


def tail(done: Done) -> str:
    """Return the exit status and the end of the stderr of a command, for a report."""
    return f"exit {done.code}, stderr: ...{done.err.strip()[-1500:]}"


def label(sentence: str) -> str:
    """Return a sentence without names and numbers, so that sentences of one kind are counted together."""
    return re.sub(r"'[^']*'|\d+|[0-9a-f]{32}", "_", sentence)[:110]


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Return the names of files that differ between two results of `contents`, or exist in one only."""
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def contents(run_dir: Path) -> dict[str, Any]:
    """Return a run's files as `tree` does, but damaged metrics as bytes."""
    try:
        return tree(run_dir)
    except ValueError:
        files = {str(path.relative_to(run_dir)): path for path in run_dir.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if path.name != "origin.json"}
