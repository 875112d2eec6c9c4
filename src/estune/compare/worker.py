"""Training runs and measurements in processes of their own: a run that crashes does not end the comparison.

The processes are forked from a server that has imported torch, transformers and TRL once.
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
# Modules that the server imports once, with everything heavy that a run imports. The server ignores an ImportError:
# a comparison of ES alone needs no TRL.
PRELOADED = (
    "estune.train.trainer",
    "estune.engines.hf.engine",
    "estune.baselines.trainer",
    "estune.monitor.report.plots",
    "estune.baselines.policy_gradient",
    "estune.baselines.rejection",
)
EXIT_WAIT_S = 60.0  # seconds that a process has to exit after it sent its status
BLOCKED = 74  # exit status: blocked by something outside the run (lock held, disk full)
STOPPED = 75  # exit status: asked to stop, and stopped


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit status, the error's sentence if it failed, and its processor seconds.

    ``code`` is the status that the process sent at the end of its work, whatever happened to it afterwards. A process
    that sent none was interrupted: its ``code`` is negative (killed by that signal) or `STOPPED`. ``cpu_s`` counts the
    process and its children; it is 0 for a process that sent no status.
    """

    code: int
    error: str = ""
    cpu_s: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the process did not finish its work."""
        return self.code != 0

    @property
    def interrupted(self) -> bool:
        """Whether the process was killed or asked to stop, which is no failure of its work."""
        return self.code < 0 or self.code == STOPPED


def forkserver_context() -> ForkServerContext:
    """Return a multiprocessing context whose fork server imports `PRELOADED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def call(function: Callable[..., None], arguments: tuple[Any, ...], log: Path, context: ForkServerContext) -> Outcome:
    """Call a function in a process of its own and append its output to ``log``. The function writes its own results."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = log.stat().st_size if log.exists() else 0
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, arguments, str(log), sender))
    process.start()
    sender.close()
    wait([receiver, process.sentinel])
    sent = _receive_status(receiver)
    receiver.close()
    if sent is not None:
        process.join(EXIT_WAIT_S)
        if process.exitcode is None:  # a library's thread keeps the process from exiting
            process.kill()
    process.join()
    assert process.exitcode is not None
    status, cpu_s = sent if sent is not None else (process.exitcode, 0.0)
    code = STOPPED if sent is None and status >= 0 else status
    if code == 0:
        return Outcome(0, cpu_s=cpu_s)
    with log.open("rb") if log.exists() else io.BytesIO() as file:
        file.seek(start)
        output = file.read().decode("utf-8", errors="replace")
    return Outcome(code, failure_reason(output, status), cpu_s)


def _receive_status(receiver: Connection) -> tuple[int, float] | None:
    """Return the exit status and the processor seconds that a process sent; None if it ended before it sent them."""
    try:
        return receiver.recv() if receiver.poll() else None
    except (EOFError, OSError):
        return None


def train(values: dict[str, Any]) -> None:
    """Run or resume a training run to its end.

    Raises:
        Interrupted: the run was asked to stop, and has saved a checkpoint.
    """
    from estune.config import ESConfig
    from estune.es.types import Interrupted
    from estune.train.base_trainer import BaseTrainer
    from estune.train.trainer import ESTrainer

    args = ESConfig(**values)
    trainer: BaseTrainer
    if args.method == "es":
        trainer = es = ESTrainer(args=args)
        es.train(theta_joins_first_step=False)  # scoring theta would use up the budget; the base is measured anyway
    else:
        from estune.baselines import BaselineTrainer

        trainer = BaselineTrainer(args=args)
        trainer.train()
    if trainer.stopped:
        raise Interrupted


def failure_reason(output: str, code: int) -> str:
    """Return the sentence that says why a process failed, from its output and its exit status."""
    errors = re.findall(r"^estune: error: (.*)$", output, re.MULTILINE)
    if errors:
        return str(errors[-1])
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code == STOPPED:
        return "asked to stop"
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {code}"


def _child(function: Callable[..., None], arguments: tuple[Any, ...], log: str, sender: Connection) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from estune.console import note, take_over_process
    from estune.errors import ExternalError, UserError
    from estune.es.types import Interrupted
    from estune.files import is_full_disk

    take_over_process()
    faulthandler.enable()
    if sys.platform == "linux":  # if the comparison is killed, the run gets SIGTERM, saves and stops
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    code = 0
    try:
        function(*arguments)
    except UserError as error:
        note(f"error: {error}")
        code = BLOCKED if isinstance(error, ExternalError) else 2
    except (Interrupted, KeyboardInterrupt):
        code = STOPPED
    except BaseException as error:  # every failure becomes a row of the comparison
        traceback.print_exc()
        code = BLOCKED if isinstance(error, OSError) and is_full_disk(error) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send((code, _cpu_s()))  # a later signal does not change the outcome
    if code:
        os._exit(code)


def _cpu_s() -> float:
    """Return the processor seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
