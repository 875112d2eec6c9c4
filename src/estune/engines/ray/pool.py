"""The workers of a run: the pool starts, watches and replaces them.

A worker is an actor with one engine. It is *ready* once its theta equals that of the others. A worker that dies, or
shows no progress for `Limits.silence_s` seconds, is replaced by a new one, which loads the base model or a checkpoint
and applies the missing updates; the other workers continue. Ray itself restarts and retries nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import ray
from ray.exceptions import RayError, RayTaskError

from estune.console import counted, warn
from estune.engines.base import EngineClass, EngineOptions
from estune.engines.ray.cluster import Limits
from estune.engines.ray.worker import CONTROL, Opened, Reply, Worker
from estune.errors import UserError
from estune.es.types import Interrupted

WAIT_S = 0.1  # seconds between two looks at the clock while calls run
PULSE_S = 2.0  # seconds between two questions whether a worker lives
BACK_OFF_S = 60.0  # seconds after which the pool tries again to replace workers that failed to start
GRACE_S = 10.0  # seconds in which workers end their engines
START_S = 300.0  # seconds in which workers must have got their resources
NOTE_S = 15.0  # seconds without resources after which the user is told
MOST_MISMATCHES = 2  # the run ends if so many successive new workers have another theta
MOST_FAILURES = 3  # starts or calls that fail one after another, before the pool gives up

Joining = Generator[Any, Reply, None]  # yields calls, receives their replies


@dataclass
class History:
    """The updates since a start, theta's checksum after each, and directories that hold theta after some of them."""

    updates: list[bytes] = field(default_factory=list)
    checksums: list[str | None] = field(default_factory=list)  # theta's after 0, 1, ... updates; None: not known yet
    saved: dict[int, Path] = field(default_factory=dict)  # number of updates -> a directory with this theta
    is_based: bool = True  # whether the base model is theta after 0 updates
    anchors: tuple[Path, ...] | None = None  # argument of `open_anchor`; None: it was not called

    def start(self) -> tuple[int, Path | None]:
        """Return the latest number of updates at which a replica can start, and the directory; None: the base model.

        Raises:
            UserError: the run began with a checkpoint that is gone, and there is no later one.
        """
        number = max((number for number, path in self.saved.items() if path.is_dir()), default=None)
        if number is not None:
            return number, self.saved[number]
        if not self.is_based:
            raise UserError("the checkpoint with which this process began is gone, and a new worker cannot start")
        return 0, None


@dataclass(eq=False)
class Handle:
    """A worker, as the process that trains sees it."""

    number: int
    actor: Any
    joining: Joining
    joining_call: Any = None  # the call that `joining` waits for
    opened: Opened | None = None
    is_ready: bool = False
    is_alive: bool = False  # whether the actor has answered once; before that, it may wait for resources
    pulse: Any = None  # the call that asks whether the worker lives
    pulse_at: float = field(default_factory=time.monotonic)  # clock reading of the last question
    prompts: set[int] = field(default_factory=set)  # numbers of the prompts that the worker has received

    def __str__(self) -> str:
        return f"worker {self.number}" + (f" ({self.opened.node})" if self.opened is not None else "")


class Pool:
    """Starts the workers, and keeps as many as can run."""

    def __init__(self, engine: EngineClass, options: EngineOptions, limits: Limits) -> None:
        """Start all workers and wait until each is ready.

        Raises:
            UserError: the engine cannot be opened, workers differ, or workers die while they start.
        """
        self._engine, self._options, self._limits = _by_value(engine), options, limits
        self.history = History()
        self.handles: list[Handle] = []
        self._failures = 0  # starts that failed since a worker became ready, or since a ready one was lost
        self._n_started = 0
        self._first: Opened | None = None
        self._failed_at = 0.0  # clock reading of the last of them
        self._mismatches = 0  # new workers, one after another, whose theta is not that of the others
        self._starved_since: float | None = None  # clock reading since which workers lack resources
        self._shown: set[str] = set()  # warnings of workers
        self.prompts_per_batch = options.prompts_per_batch
        self._is_complete = False  # whether all workers were ready once; then errors of one are no longer the run's
        for _ in range(limits.workers):
            self._start()
        self.wait_for_all()

    def wait_for_all(self) -> None:
        """Wait until all workers are ready.

        Raises:
            UserError: a worker cannot start, or its theta is not that of the others.
        """
        self._is_complete = False
        while not (self.handles and all(handle.is_ready for handle in self.handles)):
            self.tend(WAIT_S)
        self._is_complete = True

    @property
    def first(self) -> Opened:
        """What the first worker reported; that of all others is equal."""
        assert self._first is not None, "no worker has opened its engine"
        return self._first

    @property
    def ready(self) -> list[Handle]:
        """The workers whose theta is the present one."""
        return [handle for handle in self.handles if handle.is_ready]

    def tend(self, seconds: float, *, joins: bool = True) -> None:
        """Wait at most ``seconds`` for replies of workers that join or are asked for a pulse, and handle all replies.

        Args:
            seconds: at most.
            joins: whether a worker may become ready.

        Raises:
            UserError: a worker cannot start, before all were ready once, or no worker is left.
        """
        calls = [call for handle in self.handles for call in (handle.pulse, handle.joining_call) if call is not None]
        done = set(ray.wait(calls, num_returns=len(calls), timeout=0)[0]) if calls else set()
        if not done and seconds:
            if calls:
                done = set(ray.wait(calls, num_returns=1, timeout=seconds)[0])
            else:
                time.sleep(seconds)
        for handle in list(self.handles):
            try:
                problem = self._check_pulse(handle, done)
                if problem is None and joins and handle.joining_call in done:
                    self._advance(handle, ray.get(handle.joining_call))
            except RayError as error:
                problem = reason_of(error)
            except UserError as error:
                if not self._is_complete or self._mismatches >= MOST_MISMATCHES:
                    raise
                problem = str(error)
            if problem is not None:
                self.lose(handle, problem)
        is_short = self._is_complete and 0 < len(self.handles) < self._limits.workers
        if is_short and time.monotonic() - self._failed_at > BACK_OFF_S:
            self._start()
        self._refuse_starvation()

    def lose(self, handle: Handle, reason: str) -> None:
        """Drop a worker with a warning, and start another, unless several starts have failed one after another.

        Raises:
            UserError: starts fail one after another, and no worker is left.
        """
        if handle not in self.handles:
            return
        self.handles.remove(handle)
        ray.kill(handle.actor)
        self._failures = 0 if handle.is_ready else self._failures + 1
        self._failed_at = time.monotonic()
        gives_up = self._failures >= MOST_FAILURES
        if gives_up and not self.handles:
            raise UserError(f"{handle} failed, the last of {self._failures} that failed one after another: {reason}")
        then = f"{counted(len(self.handles), 'worker')} left" if gives_up else "another one starts"
        warn(f"{handle} is lost: {reason}; {then}")
        if not gives_up:
            self._start()

    def wait_for_one(self, should_stop: Callable[[], bool] = lambda: False) -> Handle:
        """Return a ready worker; wait for one to become ready.

        Raises:
            Interrupted: ``should_stop`` returned true.
            UserError: no worker is left.
        """
        while not self.ready:
            if should_stop():
                raise Interrupted
            self.tend(WAIT_S)
        return self.ready[0]

    def on_each(
        self, calls: Mapping[Handle, tuple[Any, ...]], method: str, *, joins: bool = True
    ) -> dict[Handle, Reply]:
        """Call a method of some workers, each with its arguments; return the replies of those that live.

        ``joins``: whether other workers may become ready meanwhile.
        """
        running = {handle: getattr(handle.actor, method).remote(*arguments) for handle, arguments in calls.items()}
        replies: dict[Handle, Reply] = {}
        while running:
            done = set(ray.wait(list(running.values()), num_returns=1, timeout=WAIT_S)[0])
            for handle, call in list(running.items()):
                if handle not in self.handles:  # `tend` has dropped it
                    del running[handle]
                elif call in done:
                    del running[handle]
                    try:
                        replies[handle] = self.shown(ray.get(call))
                    except RayTaskError as error:  # the worker lives, and the call would fail elsewhere, too
                        raise UserError(f"{handle} failed: {reason_of(error)}") from error
                    except RayError as error:
                        self.lose(handle, reason_of(error))
            self.tend(0, joins=joins)
        return replies

    def on_all(self, method: str, *arguments: Any) -> dict[Handle, Any]:
        """Call a method of every ready worker; return the values of those that live, of one at least.

        No worker joins meanwhile.

        Raises:
            UserError: a worker raised one, or workers die in this call one after another.
        """
        for _ in range(MOST_FAILURES):
            self.wait_for_one()
            replies = self.on_each(dict.fromkeys(self.ready, arguments), method, joins=False)
            if replies:
                return {handle: value_of(reply) for handle, reply in replies.items()}
        raise UserError(f"all workers died {MOST_FAILURES} times in the call of {method}")

    def on_one(self, method: str, *arguments: Any) -> Any:
        """Call a method of one worker, and of another if that one is lost; return the reply's value.

        Raises:
            UserError: the worker raised one, or workers die in this call one after another.
        """
        for _ in range(MOST_FAILURES):
            handle = self.wait_for_one()
            replies = self.on_each({handle: arguments}, method)
            if handle in replies:
                return value_of(replies[handle])
        raise UserError(f"{counted(MOST_FAILURES, 'worker')} died one after another in the call of {method}")

    def shown(self, reply: Reply) -> Reply:
        """Give each warning of a worker once, and return the reply."""
        for text in reply.warnings:
            if text not in self._shown:
                self._shown.add(text)
                warn(text)
        return reply

    def stop(self) -> None:
        """End all workers; those that answer within `GRACE_S` seconds end their engines' processes first."""
        if not ray.is_initialized():  # a call would start another cluster
            return
        with suppress(RayError):
            calls = [handle.actor.close.remote() for handle in self.handles]
            ray.wait(calls, num_returns=len(calls), timeout=GRACE_S if calls else 0)
        for handle in self.handles:
            ray.kill(handle.actor)
        self.handles = []

    def _start(self) -> None:
        """Start an actor, and let it join.

        Raises:
            UserError: Ray does not take an amount of a resource.
        """
        resources = dict(self._limits.resources)
        options: dict[str, Any] = dict(
            num_cpus=resources.pop("CPU", 0),
            num_gpus=resources.pop("GPU", 0),
            memory=resources.pop("memory", None),
            resources=resources,
            max_restarts=0,
            max_task_retries=0,
        )
        make: Any = ray.remote(concurrency_groups={CONTROL: 1})  # type: ignore[call-overload]
        try:
            actor: Any = make(Worker).options(**options).remote()
        except ValueError as error:
            raise UserError(f"Ray does not take worker_resources {dict(self._limits.resources)}: {error}") from error
        handle = Handle(self._n_started, actor, iter(()))  # type: ignore[arg-type]
        handle.joining = self._join(handle)
        handle.joining_call = next(handle.joining)
        handle.pulse = actor.pulse.remote()
        self._n_started += 1
        self.handles.append(handle)

    def _join(self, handle: Handle) -> Joining:
        """Let a worker load its engine and apply the run's updates; yield each call and receive its reply.

        Raises:
            UserError: the engine does not open, or the worker's model or theta is not that of the others.
        """
        actor, history = handle.actor, self.history
        reply = yield actor.open.remote(self._engine, self._options)
        self._compare(handle, value_of(reply))
        if self.prompts_per_batch != self._options.prompts_per_batch:
            yield actor.set_prompts_per_batch.remote(self.prompts_per_batch)
        if history.anchors is not None:
            reply = yield actor.do.remote("open_anchor", [list(history.anchors)])
            if not value_of(reply):
                raise UserError("it does not find theta_0, which weight decay or load_best_model_at_end needs")
        at, directory = history.start()
        done = 0 if directory is None else -1
        while done < len(history.updates):
            wanted, updates = history.checksums[at], history.updates[at:]
            start = None if directory is None else str(directory)
            reply = yield actor.catch_up.remote(start, wanted, updates)
            if reply.error is not None and directory is not None and (at or history.is_based):
                history.saved.pop(at, None)  # the next worker starts elsewhere
            checksum = value_of(reply)
            at = done = at + len(updates)
            directory = None
            if history.checksums[at] is None:
                history.checksums[at] = checksum
            if checksum != history.checksums[at]:
                self._mismatches += 1
                raise UserError(
                    f"{handle}: theta has checksum {checksum} after the updates of the journal, and "
                    f"{history.checksums[at]} in the other workers; the journal is right, so resume the run"
                )
        if history is not self.history:
            raise UserError("theta was replaced while it started")
        handle.is_ready = True
        self._failures = self._mismatches = 0

    def _advance(self, handle: Handle, reply: Reply) -> None:
        """Pass the reply of its call to a joining worker, and keep the next call."""
        handle.is_alive, handle.joining_call = True, None
        try:
            handle.joining_call = handle.joining.send(self.shown(reply))
        except StopIteration:
            return

    def _compare(self, handle: Handle, opened: Opened) -> None:
        """Keep what a worker reported, and compare it with what the first one did.

        Raises:
            UserError: it differs.
        """
        handle.opened = opened
        if self._first is None:
            self._first = opened
            self.history.checksums = [opened.checksum]
        first = self._first
        pairs = {name: (getattr(opened, name), getattr(first, name)) for name in ("specs", "checksum", "identity")}
        pairs |= {name: (value, first.facts.header.get(name)) for name, value in opened.facts.header.items()}
        for name, (here, there) in pairs.items():
            if here != there:
                values = f": {here!r} and {there!r}" if isinstance(here, (str, int, float, type(None))) else ""
                raise UserError(f"{handle} differs from worker 0 ({first.node}) in its model's {name}{values}")

    def _check_pulse(self, handle: Handle, done: set[Any]) -> str | None:
        """Ask a worker for its pulse every `PULSE_S` seconds; return why it must be taken for dead, or None."""
        now = time.monotonic()
        if handle.pulse is not None and handle.pulse in done:
            silent = ray.get(handle.pulse)
            handle.pulse, handle.is_alive = None, True
        elif handle.pulse is not None:
            silent = now - handle.pulse_at if handle.is_alive else 0.0
        else:
            silent = 0.0
            if now - handle.pulse_at > PULSE_S:
                handle.pulse, handle.pulse_at = handle.actor.pulse.remote(), now
        return f"no progress for {silent:.0f} s" if silent > self._limits.silence_s else None

    def _refuse_starvation(self) -> None:
        """Tell the user if workers wait for resources: at the start any of them, later if no worker is alive.

        Raises:
            UserError: they have waited for `START_S` seconds.
        """
        waiting = sum(not handle.is_alive for handle in self.handles)
        if not waiting or (self._is_complete and waiting < len(self.handles)):
            self._starved_since = None
            return
        now = time.monotonic()
        if self._starved_since is None:
            self._starved_since = now
        waited = now - self._starved_since
        if waited < NOTE_S:
            return
        text = (
            f"{counted(waiting, 'worker')} cannot start for want of resources: each needs "
            f"{dict(self._limits.resources)}, and the cluster has {free_resources()} free"
        )
        if waited > START_S:
            raise UserError(text)
        self.shown(Reply(warnings=(f"waiting: {text}",)))


def _by_value(engine: EngineClass) -> bytes:
    """Return a class for another process: one outside estune with its module's code, which a worker may lack."""
    module = sys.modules.get(getattr(engine, "__module__", ""))
    is_foreign = module is not None and not module.__name__.startswith("estune.")
    if is_foreign:
        cloudpickle.register_pickle_by_value(module)
    try:
        packed: bytes = cloudpickle.dumps(engine)
    finally:
        if is_foreign:
            cloudpickle.unregister_pickle_by_value(module)
    return packed


def free_resources() -> dict[str, float]:
    """Return the cluster's resources that nobody uses, without those that name single nodes."""
    return {
        name: value
        for name, value in ray.available_resources().items()  # type: ignore[no-untyped-call]
        if ":" not in name
    }


def reason_of(error: RayError) -> str:
    """Return an error of Ray in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1 if isinstance(error, RayTaskError) else 0]  # the last line of a traceback names the error
    return f"{type(error).__name__}: {line[:300]}"


def value_of(reply: Reply) -> Any:
    """Return the value of a reply.

    Raises:
        UserError: the worker raised one.
        Interrupted: the call was interrupted.
    """
    if reply.error is not None:
        raise UserError(reply.error)
    if reply.is_interrupted:
        raise Interrupted
    return reply.value
