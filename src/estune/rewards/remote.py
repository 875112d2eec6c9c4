"""Reward pools in actors of Ray, spread over the cluster: batches of completions travel to them as text.

Each actor holds a `RewardPool` with worker processes of its own. An actor that dies is replaced, and its batch is
scored again elsewhere.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from estune.errors import UserError
from estune.rewards.contract import wants_opponents
from estune.rewards.loading import load_request
from estune.rewards.pool import RewardBatch, RewardPool, RewardResult

START_S = 120.0  # seconds in which an actor and its workers have started
MOST_DEATHS = 3  # actors that may die of one batch


class Scorer:
    """The actor: scores batches with the workers of its own pool."""

    def __init__(self, request: bytes, names: Sequence[str], timeout_s: float, workers: int) -> None:
        functions = [_elsewhere] * len(names)
        self._pool = RewardPool(functions, names, timeout_s=timeout_s, workers=workers, request=request)

    def score(self, batch: RewardBatch) -> RewardResult | str:
        """Return the rewards of a batch, or the text of a `UserError`."""
        try:
            return self._pool.submit(batch).result()
        except UserError as error:
            return str(error)

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


class RemotePool(RewardPool):
    """Scores batches in actors; a `RewardPool` without workers of its own."""

    def __init__(
        self,
        reward_funcs: Sequence[Callable[..., Any]],
        names: Sequence[str],
        *,
        timeout_s: float,
        workers: int,
        actors: int,
        connection: Any,
    ) -> None:
        """Start the actors.

        Args:
            reward_funcs: (F,).
            names: (F,).
            timeout_s: limit of one call of one function.
            workers: processes of each actor.
            actors: their number.
            connection: closed with the pool.

        Raises:
            UserError: a function cannot be sent to another process.
        """
        self.n_functions = len(reward_funcs)
        self.wants_opponents = any(map(wants_opponents, reward_funcs))
        self._connection = connection
        self._arguments = (load_request(reward_funcs, names), list(names), timeout_s, workers)
        self._n_processes = workers
        self._lock = threading.Lock()
        self._is_closed = False
        self._timeout_s = timeout_s
        self._actors = [self._start() for _ in range(actors)]
        self._turns = itertools.count()
        self._executor = ThreadPoolExecutor(actors * workers, thread_name_prefix="remote-reward")

    def submit(self, batch: RewardBatch) -> Future[RewardResult]:
        """Submit one member's completions for scoring; thread-safe."""
        if self.wants_opponents:
            batch.columns.setdefault("opponents", [None] * len(batch.completions))
        return self._executor.submit(self._score, batch)

    def close(self) -> None:
        """End the actors with their processes, and cancel the futures of unscored batches."""
        with self._lock:
            self._is_closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        if ray.is_initialized():
            calls = [actor.close.remote() for actor in self._actors]
            ray.wait(calls, num_returns=len(calls), timeout=5.0)
            for actor in self._actors:
                ray.kill(actor)
        self._connection.close()

    def _start(self) -> Any:
        options: dict[str, Any] = dict(num_cpus=0, max_concurrency=self._n_processes + 1, scheduling_strategy="SPREAD")
        make: Any = ray.remote(**options)
        return make(Scorer).remote(*self._arguments)

    def _score(self, batch: RewardBatch) -> RewardResult:
        """Return the rewards of a batch from the next actor; replace an actor that has died.

        An actor that does not answer within the time that its own limits allow counts as dead.

        Raises:
            UserError: several actors died of the batch, or a column cannot be sent to a reward worker.
            CancelledError: the pool was closed.
        """
        # A call that times out is repeated row by row.
        limit_s = self._timeout_s * self.n_functions * (1 + len(batch.completions)) + START_S
        for _ in range(MOST_DEATHS):
            place = next(self._turns) % len(self._actors)
            with self._lock:
                if self._is_closed:
                    raise CancelledError
                actor = self._actors[place]
                call = actor.score.remote(batch)
            try:
                found: RewardResult | str = ray.get(call, timeout=limit_s)
            except RayTaskError as error:
                raise UserError(f"rewards could not be scored in a Ray worker: {error}") from error
            except (RayError, GetTimeoutError):
                with self._lock:
                    if self._is_closed:
                        raise CancelledError from None
                    if self._actors[place] is actor:
                        ray.kill(actor)
                        self._actors[place] = self._start()
                continue
            if isinstance(found, str):
                raise UserError(found)
            return found
        raise UserError(f"{MOST_DEATHS} actors that score rewards died one after another")


def _elsewhere(*_: Any, **__: Any) -> Any:
    """Stand in for a function that only the worker processes load."""
    raise AssertionError("the function runs in a worker process")
