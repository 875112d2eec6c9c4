"""Training runs in processes of their own: one that crashes, diverges or runs out of memory is a row, not the end.

The processes are forked from a server that has loaded torch, transformers and TRL once.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import multiprocessing
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PRELOADED = ("estune.compare.preload",)
LEAVING_S = 60.0  # in which a process that has told its last word has to be gone
HINDERED = 74  # exit status of what could not go on and is not to blame
STOPPED = 75  # exit status of what was asked to stop, and did


@dataclass(frozen=True)
class Outcome:
    """How a run's process ended: its exit status, the error's sentence where it failed, and what it cost.

    ``code`` is what the process told at the end of its work, whatever came over it afterwards; where it could tell
    nothing, it was cut. ``cpu_s`` are the seconds of processor time of the process and of those that it started; 0
    where it was cut off.
    """

    code: int
    error: str = ""
    cpu_s: float = 0.0

    @property
    def failed(self) -> bool:
        """Say whether the run did not come to its end."""
        return self.code != 0

    @property
    def cut(self) -> bool:
        """Say whether it was killed or asked to stop, and so says nothing of the run itself."""
        return self.code < 0 or self.code == STOPPED


def context() -> ForkServerContext:
    """Return the way processes are started, with its server's modules named."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(list(PRELOADED))
    return made


def call(function: Callable[..., None], arguments: tuple[Any, ...], log: Path, made: ForkServerContext) -> Outcome:
    """Call a function in a process of its own; what it prints is added to ``log``, what it found it writes itself."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = log.stat().st_size if log.exists() else 0
    told, tell = made.Pipe(duplex=False)
    process = made.Process(target=_child, args=(function, arguments, str(log), tell))
    process.start()
    tell.close()
    wait([told, process.sentinel])
    word = _last_word(told)
    told.close()
    if word is not None:
        process.join(LEAVING_S)
        if process.exitcode is None:  # somebody's thread holds it at its exit
            process.kill()
    process.join()
    assert process.exitcode is not None
    ended, cpu_s = word if word is not None else (process.exitcode, 0.0)
    code = STOPPED if word is None and ended >= 0 else ended
    if code == 0:
        return Outcome(0, cpu_s=cpu_s)
    with log.open("rb") if log.exists() else io.BytesIO() as file:
        file.seek(start)
        said = file.read().decode("utf-8", errors="replace")
    return Outcome(code, reason(said, ended), cpu_s)


def _last_word(told: Connection) -> tuple[int, float] | None:
    """Return the exit status and the cost that a process told; None where it was cut off before, wherever it was."""
    try:
        return told.recv() if told.poll() else None
    except (EOFError, OSError):
        return None


def train(values: dict[str, Any]) -> None:
    """Run or resume a training run to its end.

    Raises:
        Interrupted: it was asked to stop, and has saved what it has.
    """
    from estune.config import ESConfig
    from estune.es.types import Interrupted
    from estune.train.request import BaseTrainer
    from estune.train.trainer import ESTrainer

    args = ESConfig(**values)
    trainer: BaseTrainer
    if args.method == "es":
        trainer = ESTrainer(args=args)
        trainer.asks_theta_first = False  # budgets are counted in completions, and the base is measured anyway
    else:
        from estune.baselines import BaselineTrainer

        trainer = BaselineTrainer(args=args)
    trainer.train()
    if trainer.stopped:
        raise Interrupted


def reason(said: str, code: int) -> str:
    """Return the sentence that tells why a run failed, from what it printed."""
    errors = re.findall(r"^estune: error: (.*)$", said, re.MULTILINE)
    if errors:
        return str(errors[-1])
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code == STOPPED:
        return "asked to stop"
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {code}"


def _child(function: Callable[..., None], arguments: tuple[Any, ...], log: str, tell: Connection) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from estune.console import note, take_over_process
    from estune.errors import ExternalError, UserError
    from estune.es.types import Interrupted
    from estune.files import is_full_disk

    take_over_process()
    faulthandler.enable()
    if sys.platform == "linux":  # a comparison that is killed leaves nobody behind: the run saves and stops
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    code = 0
    try:
        function(*arguments)
    except UserError as error:
        note(f"error: {error}")
        code = HINDERED if isinstance(error, ExternalError) else 2
    except (Interrupted, KeyboardInterrupt):
        code = STOPPED
    except BaseException as error:  # whatever it is: a run that fails is a row of the comparison
        traceback.print_exc()
        code = HINDERED if isinstance(error, OSError) and is_full_disk(error) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    tell.send((code, _cpu_s()))  # from here on a signal changes nothing
    if code:
        os._exit(code)


def _cpu_s() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
