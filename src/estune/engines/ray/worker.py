"""The Ray actor: a process that holds one engine and its replica of theta.

A call returns a `Reply`, because an exception that crosses processes loses its class. A second thread answers `pulse`
and `interrupt` while the engine works.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import ray

from estune.console import LOGGER
from estune.engines.base import EngineClass, EngineFacts, EngineOptions, LocalEngine, ModelAssets
from estune.engines.local import TextAssets
from estune.engines.ray import messages
from estune.errors import UserError
from estune.es.theta import Moved
from estune.es.types import Interrupted, ParameterSpec

LONG_CALL = 10.0  # how much longer calls may take that show no progress: loading, updates, saving
CONTROL = "control"  # concurrency group of the second thread


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of a call, or the user's error; and the warnings that the call gave."""

    value: Any = None
    error: str | None = None  # text of a UserError
    is_interrupted: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Opened:
    """What a worker tells of itself when its engine is loaded."""

    facts: EngineFacts
    specs: tuple[ParameterSpec, ...]
    checksum: str  # of theta_0
    assets: ModelAssets | TextAssets  # what turns token ids into text
    identity: dict[str, Any]  # of the assets
    node: str  # host name and process, for messages


class _Warnings(logging.Handler):
    """Collects the warnings of this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        taken, self.texts = tuple(self.texts), []
        return taken


class Worker:
    """Holds an engine and answers the calls of the process that trains."""

    def __init__(self) -> None:
        self._warnings = _Warnings()
        LOGGER.handlers = [self._warnings]
        self._prompts: dict[int, Any] = {}
        self._engine: LocalEngine | None = None
        self._beat = time.monotonic()  # when the engine last showed progress
        self._patience = math.inf  # by which `pulse` divides the seconds since the last progress
        self._interrupted: set[int] = set()  # numbers of the jobs to interrupt
        self._moved: Moved | None = None  # of the last update

    @property
    def engine(self) -> LocalEngine:
        """The engine; `open` has loaded it."""
        assert self._engine is not None, "open comes first"
        return self._engine

    def open(self, packed: bytes, options: EngineOptions) -> Reply:
        """Load the engine; return `Opened`. ``packed`` is the engine's class in cloudpickle's format."""

        def load() -> Opened:
            engine: EngineClass = cloudpickle.loads(packed)
            self._engine = engine.open(options)
            assets = self.engine.assets
            text = TextAssets(assets.tokenizer, assets.end_tokens) if isinstance(assets, TextAssets) else assets
            where = f"{socket.gethostname()}, process {os.getpid()}"
            specs = tuple(self.engine.specs)
            return Opened(self.engine.facts, specs, self.engine.checksum(), text, assets.identity(), where)

        return self._reply(load)

    def answer(self, number: int, message: bytes, prompts: bytes | None) -> Reply:
        """Answer a job; return the answer's message.

        Args:
            number: the job's number, by which `interrupt` names it; 0: a job whose ``prompts`` are not kept.
            message: the job.
            prompts: those that this worker has not received yet; None: none.
        """

        def should_stop() -> bool:
            self._beat = time.monotonic()
            return number in self._interrupted

        def work() -> bytes:
            new = messages.unpack_prompts(prompts) if prompts is not None else {}
            if number:
                self._prompts |= new
            job = messages.unpack_job(message, self._prompts if number else new)
            [answer] = list(self.engine.answers([job], should_stop))
            return messages.pack_answer(answer)

        return self._reply(work, patience=1.0)

    def apply(self, message: bytes, before: str) -> Reply:
        """Move theta by an update if it has the checksum ``before``; return theta's checksum, which the caller checks.

        A second call with the same update finds theta moved, and changes nothing.
        """

        def work() -> str:
            if self.engine.theta_checksum == before:
                self._moved = self.engine.apply(messages.unpack_update(message))
            return self.engine.theta_checksum

        return self._reply(work)

    def moved(self) -> Reply:
        """Return the message of the last update's `Moved`."""
        return self._reply(lambda: messages.pack_moved(self._moved) if self._moved is not None else None)

    def catch_up(self, start: str | None, wanted: str | None, updates: Sequence[bytes]) -> Reply:
        """Bring theta from a start to the run's present theta; return its checksum.

        Args:
            start: a directory with weights to load, or None: from theta as it is.
            wanted: checksum of theta at the start; None: unknown.
            updates: messages of the updates that follow.
        """

        def work() -> str:
            if start is not None:
                self.engine.load_weights(Path(start))
            if wanted not in (None, found := self.engine.checksum()):
                raise UserError(f"theta at the start has checksum {found} here, and {wanted} elsewhere")
            for update in updates:
                self._beat = time.monotonic()
                self._moved = self.engine.apply(messages.unpack_update(update))
            return self.engine.theta_checksum

        return self._reply(work)

    def do(self, method: str, arguments: Sequence[Any]) -> Reply:
        """Call a method of the engine by its name, or of its assets (``assets.check``); return its result."""

        def work() -> Any:
            owner, _, name = method.rpartition(".")
            return getattr(self.engine.assets if owner else self.engine, name)(*arguments)

        return self._reply(work)

    def save(self, directory: str, float32: bool) -> Reply:
        """Write the model as Hugging Face files."""
        return self._reply(lambda: self.engine.save(Path(directory), float32=float32))

    def close(self) -> None:
        """End the engine and its processes."""
        if self._engine is not None:
            self._engine.stop()

    def set_prompts_per_batch(self, size: int) -> Reply:
        """Let forward passes hold at most ``size`` prompts."""
        self.engine.prompts_per_batch = size
        return Reply()

    @ray.method(concurrency_group=CONTROL)
    def pulse(self) -> float:
        """Return the seconds since the last progress; a tenth of them in calls that show none, and 0 without work."""
        return (time.monotonic() - self._beat) / self._patience

    @ray.method(concurrency_group=CONTROL)
    def interrupt(self, number: int) -> None:
        """End the answer to a job before its next token."""
        self._interrupted.add(number)

    def _reply(self, work: Callable[[], Any], patience: float = LONG_CALL) -> Reply:
        self._beat, self._patience = time.monotonic(), patience
        try:
            value = work()
        except UserError as error:
            return Reply(error=str(error), warnings=self._warnings.take())
        except Interrupted:
            return Reply(is_interrupted=True)
        finally:
            self._patience = math.inf
        return Reply(value, warnings=self._warnings.take())
