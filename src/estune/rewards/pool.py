"""Reward functions with TRL's contract, run in worker processes that can be timed and killed.

A `RewardPool` has one thread per worker process, so scoring overlaps generation. A fork server forks the workers; it
starts with the pool (`processes.py` is the trainer's side, `fork_server.py` and `worker.py` are the server's). Build
the pool early, so that its workers load while the model loads. Functions are sent by cloudpickle (`loading.py`), so
lambdas, closures, notebooks and scripts without a main guard work.

A call fails if it raises, times out, ends its worker, or does not return one finite number or None per completion. A
failed call is repeated row by row, so that only the rows at fault fail. None is not a failure: the function does not
apply to that row.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from estune.console import Unfailing, release_abandoned_descriptors
from estune.errors import UserError
from estune.rewards.contract import call_function, describe, read_reply, to_json, wants_opponents
from estune.rewards.loading import INLINE_HINT, load_request, load_reward
from estune.rewards.processes import ForkServer, Worker

__all__ = ["INLINE_WARNING", "RewardBatch", "RewardPool", "RewardResult", "load_reward", "score_batch"]

INLINE_WARNING = (
    "reward functions run inside the trainer (--reward_isolation inline): no time limit, and a reward that hangs or "
    "crashes ends the run"
)


@dataclass
class RewardBatch:
    """One member's completions, one entry per completion in every list."""

    prompts: list[Any]  # as in the dataset: str, or a list of messages
    completions: list[Any]  # response_prefix + completion: str, or a list with one assistant message
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)  # every other dataset column
    trainer_state: dict[str, Any] = field(default_factory=dict)  # becomes an object with these attributes


@dataclass
class RewardResult:
    """The results of F reward functions for a batch; all numbers are finite or NaN."""

    rewards: NDArray[np.float64]  # float64 (rows, F); NaN: not applicable (None), or failed
    failed: NDArray[np.bool_]  # bool (rows, F)
    metrics: dict[str, float] = field(default_factory=dict)  # means of the values given to log_metric
    extra: dict[str, list[Any]] = field(default_factory=dict)  # columns given to log_extra: a value or None per row
    errors: list[str] = field(default_factory=list)  # the first message per function


# (function index, rows) -> the reply, as `contract.read_reply` returns it
_Call = Callable[[int, list[int]], dict[str, Any]]


class RewardPool:
    """Scores batches with several reward functions, in worker processes or (``inline``) in the calling thread.

    ``timeout_s`` limits one call of one function. A worker that exceeds it is killed, with all processes that it
    started, and replaced. Use the pool as a context manager, or `close` it. No worker outlives the trainer in any case.

    Raises:
        UserError: a function cannot be sent to a worker process.
    """

    def __init__(
        self,
        reward_funcs: Sequence[Callable[..., Any]],
        names: Sequence[str],
        *,
        timeout_s: float,
        workers: int,
        isolation: str = "process",
        request: bytes | None = None,
    ) -> None:
        """Start the workers.

        ``request``, if given, is what `load_request` made of the functions in another process.
        """
        if len(reward_funcs) != len(names):
            raise ValueError(f"{len(reward_funcs)} reward functions, {len(names)} names")
        self._functions, self._names = list(reward_funcs), list(names)
        self.n_functions = len(self._functions)
        self.wants_opponents = any(map(wants_opponents, self._functions))
        self._owner = os.getpid()
        self._closed = False
        self._queue: queue.SimpleQueue[tuple[RewardBatch, Future[RewardResult]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._workers: list[Worker] = []
        # Of each worker: done when it has loaded the functions; holds a UserError if it cannot.
        self.loaded: list[Future[None]] = []
        self._server: ForkServer | None = None
        self._runner = asyncio.Runner()
        if isolation == "inline":
            return
        if isolation != "process":
            raise UserError(f"reward_isolation is 'process' or 'inline', not {isolation!r}")
        if not hasattr(os, "fork"):
            raise UserError("this system cannot fork reward workers: use --reward_isolation inline")
        if not timeout_s > 0 or workers < 1:
            raise UserError(f"rewards need a time limit over 0 s and a worker, not {timeout_s} s and {workers} workers")
        setup = load_request(reward_funcs, names) if request is None else request
        self._server = ForkServer()
        for index in range(workers):
            worker, loaded = Worker(self._server, setup, timeout_s), Future[None]()
            thread = threading.Thread(target=self._work, args=(worker, loaded), name=f"reward-{index}", daemon=True)
            self._threads.append(thread)
            self._workers.append(worker)
            self.loaded.append(loaded)
            thread.start()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, batch: RewardBatch) -> Future[RewardResult]:
        """Submit one member's completions for scoring; thread-safe. Inline, the future is done on return."""
        n_rows = len(batch.completions)
        if self.wants_opponents:
            batch.columns.setdefault("opponents", [None] * n_rows)
        for name, values in _keyword_columns(batch).items():
            if len(values) != n_rows:
                raise ValueError(f"column {name!r} has {len(values)} values for {n_rows} completions")
        if self._closed:
            raise RuntimeError("the reward pool is closed")
        future: Future[RewardResult] = Future()
        if self._server is not None:
            self._queue.put((batch, future))
            return future
        columns = _keyword_columns(batch)

        def call(function: int, rows: list[int]) -> dict[str, Any]:
            func = self._functions[function]
            output = Unfailing(sys.stderr)  # stdout is reserved for the command's output
            release_abandoned_descriptors()
            try:
                with redirect_stdout(output), redirect_stderr(output):
                    reply = call_function(func, columns, batch.trainer_state, rows, self._run_coroutine)
                    text = to_json(reply)
                return read_reply(text, n_rows=len(rows))  # gives the same values as a worker
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit too: a reward that calls sys.exit has only failed
                return read_reply(to_json({"error": describe(error, func)}))

        future.set_result(score_batch(n_rows, self._names, call))
        return future

    def _run_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return _off_loop(lambda: self._runner.run(coroutine))

    def _work(self, worker: Worker, loaded: Future[None]) -> None:
        """Load a worker, then score batches with it until the pool closes; the body of one thread."""
        try:
            worker.ensure_loaded()
            loaded.set_result(None)
        except BaseException as error:  # any error: otherwise a thread that waits for this future never wakes
            loaded.set_exception(error)
        while (item := self._queue.get()) is not None:
            batch, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                loaded.result()
                worker.batch = _pickle_batch(batch)
                future.set_result(score_batch(len(batch.completions), self._names, worker.call))
            except BaseException as error:  # any error, for the same reason
                future.set_exception(error)
        worker.close()

    def close(self) -> None:
        """Kill the workers with all processes that they started, and cancel the futures of unscored batches."""
        if self._closed or os.getpid() != self._owner:  # a forked copy of the trainer owns no workers
            return
        self._closed = True
        atexit.unregister(self.close)
        if self._server is not None:
            self._cancel_waiting()
            for _ in self._threads:
                self._queue.put(None)
            self._server.close()
            for worker in self._workers:
                worker.interrupt()
            for thread in self._threads:
                thread.join(timeout=5.0)
            self._cancel_waiting()  # batches that another thread submitted meanwhile
        _off_loop(self._runner.close)

    def _cancel_waiting(self) -> None:
        with suppress(queue.Empty):
            while True:
                if item := self._queue.get_nowait():
                    item[1].cancel()


def score_batch(n_rows: int, names: Sequence[str], call: _Call) -> RewardResult:
    """Call every function on a batch; repeat a failed call row by row."""
    rewards = np.full((n_rows, len(names)), np.nan)
    failed = np.zeros((n_rows, len(names)), bool)
    result = RewardResult(rewards, failed)
    metrics: dict[str, list[float]] = {}
    for column, name in enumerate(names if n_rows else ()):
        everything = list(range(n_rows))
        replies = [(everything, call(column, everything))]
        problems: list[str] = []
        if "error" in replies[0][1] and n_rows > 1:
            problems.append(replies[0][1]["error"])
            replies = [([row], call(column, [row])) for row in range(n_rows)]
        for rows, reply in replies:
            if "error" in reply:
                failed[rows, column] = True
                problems.append(reply["error"])
                continue
            for row, value in zip(rows, reply["rewards"], strict=True):
                if value is not None and not math.isfinite(value):
                    failed[row, column] = True
                    problems.append(f"returned {value}")
                elif value is not None:
                    rewards[row, column] = value
            for metric, values in reply["metrics"].items():
                metrics.setdefault(metric, []).extend(values)
            for key, values in reply["extra"].items():
                if len(values) != len(rows):  # the rows of the values are unknown
                    problems.append(f"log_extra of {key!r} dropped: {len(values)} values for {len(rows)} completions")
                    continue
                known = result.extra.setdefault(key, [None] * n_rows)
                for row, value in zip(rows, values, strict=True):
                    known[row] = value
        if problems:
            result.errors.append(f"{name}: {problems[0]}")
    result.metrics = {metric: math.fsum(values) / len(values) for metric, values in metrics.items()}
    return result


def _off_loop(function: Callable[[], Any]) -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    with ThreadPoolExecutor(1) as thread:  # in a notebook the loop of this thread is running the cell
        return thread.submit(function).result()


def _keyword_columns(batch: RewardBatch) -> dict[str, list[Any]]:
    texts = {"prompts": batch.prompts, "completions": batch.completions, "completion_ids": batch.completion_ids}
    return {**batch.columns, **texts}


def _pickle_batch(batch: RewardBatch) -> bytes:
    try:
        request: bytes = cloudpickle.dumps(("batch", _keyword_columns(batch), batch.trainer_state))
        return request
    except Exception as error:
        raise UserError(f"a dataset column cannot be sent to a reward worker ({error}); {INLINE_HINT}") from error
