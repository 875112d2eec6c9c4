"""The engine whose members answer in Ray's workers; this process holds no weights.

Each worker has an engine with a whole replica of theta. A worker that becomes free takes the next job. Seeds, scalars,
token ids and checksums travel (`messages`), weights never. After every update the workers' checksums are compared.
"""

from __future__ import annotations

import atexit
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from estune.console import counted
from estune.engines.base import EngineClass, EngineFacts, EngineOptions, ModelAssets
from estune.engines.local import TextAssets
from estune.engines.ray import cluster, messages
from estune.engines.ray.cluster import Limits
from estune.engines.ray.pool import WAIT_S, Handle, History, Pool, reason_of, value_of
from estune.errors import UserError
from estune.es.theta import Moved
from estune.es.types import (
    Completion,
    GroupAnswer,
    GroupJob,
    Interrupted,
    ParameterSpec,
    Perturbation,
    Prompt,
    Sampling,
)
from estune.es.update import Update
from estune.models.tensor_files import WEIGHTS_FILE

MOST_DEATHS = 3  # workers that may die of one job before the run ends
PATIENCE = 2.0  # a job that takes this multiple of the median is given to an idle worker, too
LEAST_PATIENCE_S = 1.0


class RemoteAssets:
    """The assets of the workers' model: text is made here, files are written by a worker; see `ModelAssets`."""

    def __init__(self, text: ModelAssets | TextAssets, pool: Pool) -> None:
        self._text, self._pool = text, pool
        self.tokenizer: Any = text.tokenizer
        self.end_tokens = text.end_tokens

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion's tokens, without special tokens."""
        return self._text.decode(token_ids)

    def save(self, directory: Path, dtype: str) -> None:
        """Let a worker write the files; see `ModelAssets.save`."""
        self._pool.on_one("do", "assets.save", [Path(directory).absolute(), dtype])

    def check(self) -> None:
        """Let a worker check its files; see `ModelAssets.check`."""
        self._pool.on_one("do", "assets.check", [])

    def identity(self) -> dict[str, Any]:
        """Return values that determine the answers beside the weights; they are the same in all workers."""
        return dict(self._pool.first.identity)


@dataclass(eq=False)
class _Issue:
    """A job that workers answer."""

    number: int
    job: GroupJob
    calls: dict[Any, Handle] = field(default_factory=dict)  # call -> the worker that it is for
    started: float = 0.0  # clock reading of the first call
    deaths: int = 0  # workers that died while they answered


class RayEngine:
    """An engine in Ray's workers, with the methods of `estune.engines.base.LocalEngine` that need no theta here."""

    def __init__(self, engine: EngineClass, options: EngineOptions, limits: Limits) -> None:
        """Connect to the cluster, or start one on this machine, and let workers load their engines.

        Raises:
            UserError: Ray or its cluster cannot be used, resources are missing, or the engine cannot be opened.
        """
        if options.module is not None:
            raise UserError("workers load a model by name: a module in memory needs num_workers 0")
        self.engine_class = engine
        connection = cluster.connect(limits)
        try:
            self._pool = Pool(engine, options, limits)
        except BaseException:
            connection.close()
            raise
        self._end = weakref.finalize(self, _end, self._pool, connection)
        self._end.atexit = False
        atexit.register(self._end)  # runs before Ray's own exit handler, which was registered earlier
        self.assets = RemoteAssets(self._pool.first.assets, self._pool)
        is_foreign = not engine.__module__.startswith("estune.")
        self._has_text = is_foreign or not isinstance(self._pool.first.assets, TextAssets)  # whether it may read text
        self._prompts_per_batch = options.prompts_per_batch
        self._checksum = self._pool.first.checksum
        self._numbers: dict[Prompt, int] = {}  # of every prompt that was sent to a worker
        self._n_jobs = 0
        self._traffic = {"es/bytes_sent": 0, "es/bytes_received": 0}
        self._idle_s = self._worker_s = 0.0

    @property
    def facts(self) -> EngineFacts:
        """Properties of the workers' engines that training reads."""
        return self._pool.first.facts

    @property
    def specs(self) -> Sequence[ParameterSpec]:
        """Theta's parameters, in name order."""
        return self._pool.first.specs

    @property
    def prompts_per_batch(self) -> int:
        """Prompts in one forward pass of a worker."""
        return self._prompts_per_batch

    @prompts_per_batch.setter
    def prompts_per_batch(self, size: int) -> None:
        self._prompts_per_batch = self._pool.prompts_per_batch = size
        self._pool.on_all("set_prompts_per_batch", size)

    def answers(
        self, jobs: Iterable[GroupJob], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[GroupAnswer]:
        """Yield the answers in the order in which workers complete them; see `Generator.answers`.

        Members come before theta, and the longest jobs first. A worker without work repeats a job that takes long
        elsewhere; the first answer counts. A job whose worker is lost goes to another.

        Raises:
            Interrupted: ``should_stop`` returned true.
            UserError: a worker raised one, or several workers died of one job.
        """
        waiting = [self._issue(job) for job in jobs]
        waiting.sort(key=lambda issue: _order(issue.job))  # stable: equal jobs stay in order
        running: list[_Issue] = []
        durations: list[float] = []
        began, busy_s, n_workers = time.monotonic(), 0.0, len(self._pool.ready)
        try:
            while waiting or running:
                self._hand_out(waiting, running, durations)
                calls = [call for issue in running for call in issue.calls]
                done = ray.wait(calls, num_returns=1, timeout=WAIT_S)[0] if calls else []
                if should_stop():
                    raise Interrupted
                self._pool.tend(0 if calls else WAIT_S)
                for call in done:
                    issue = next((each for each in running if call in each.calls), None)
                    if issue is None:
                        continue
                    answer = self._collect(issue, call)
                    if answer is not None:
                        running.remove(issue)
                        del issue.calls[call]
                        self._interrupt(issue)
                        durations.append(time.monotonic() - issue.started)
                        busy_s += answer.generate_s + answer.perturb_s
                        yield answer
                self._drop_dead(waiting, running)
        finally:
            for issue in running:
                self._interrupt(issue)
            self._worker_s += n_workers * (time.monotonic() - began)
            self._idle_s += max(0.0, n_workers * (time.monotonic() - began) - busy_s)

    def take_metrics(self) -> dict[str, float]:
        """Return what travelled since the last call, the workers that are ready, and the share of their time unused."""
        idle = self._idle_s / self._worker_s if self._worker_s else 0.0
        taken = {**self._traffic, "es/workers": len(self._pool.ready), "es/idle_share": idle}
        self._traffic = dict.fromkeys(self._traffic, 0)
        self._idle_s = self._worker_s = 0.0
        return taken

    def generate(
        self,
        perturbation: Perturbation | None,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Completion]]:
        """Return the completions (B, G) of one member, or of theta; see `LocalEngine.generate`."""
        job = GroupJob((0,), (perturbation,), self.theta_checksum, tuple(prompts), sampling)
        [answer] = self.answers([job], should_stop)
        return answer.completions[0]

    def members_that_fit(self, members: int, rows: int, length: int, rank: int, sampled: bool = False) -> int:
        """Return how many members should share a forward pass, so that every worker has some.

        A worker says how many fit; see `Generator.members_that_fit`.
        """
        share = -(-members // len(self._pool.handles))
        return int(self._pool.on_one("do", "members_that_fit", [share, rows, length, rank, sampled]))

    def perturb_cosine(self, perturbation: Perturbation) -> dict[str, float]:
        """Return the cosine of the cast perturbation with the exact one; see `Generator.perturb_cosine`."""
        return dict(self._pool.on_one("do", "perturb_cosine", [perturbation]))

    def check_reproducible(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
    ) -> bool:
        """Return whether members answer with the same tokens twice in every worker, and alike in all workers."""
        repeats = self._pool.on_all("do", "check_reproducible", [list(perturbations), list(prompts), sampling])
        job = GroupJob(tuple(range(len(perturbations))), tuple(perturbations), self._checksum, tuple(prompts), sampling)
        numbers = {prompt: number for number, prompt in enumerate(prompts)}
        sent = messages.pack_prompts({number: p for p, number in numbers.items()}, has_text=self._has_text)
        packed = self._pool.on_all("answer", 0, messages.pack_job(job, numbers), sent)
        answers = [messages.unpack_answer(each).completions for each in packed.values()]
        return all(repeats.values()) and all(each == answers[0] for each in answers)

    def token_logprobs(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return theta's log-probability of every token; see `LocalEngine.token_logprobs`."""
        return list(self._pool.on_one("do", "token_logprobs", [list(prompts), [list(c) for c in completions]]))

    def load_theta(self) -> None:
        """Do nothing, because there is no model in this process."""

    def open_anchor(self, directories: Sequence[Path]) -> bool:
        """Let every worker find theta_0; see `Replica.open_anchor`."""
        paths = tuple(path.absolute() for path in directories)
        is_open = all(self._pool.on_all("do", "open_anchor", [list(paths)]).values())
        if is_open:
            self._pool.history.anchors = paths
        return is_open

    def load_anchor(self) -> None:
        """Let every worker return to theta_0; see `Replica.load_anchor`.

        Raises:
            UserError: workers have read different weights.
        """
        self._read_in_all("load_anchor", None)

    def apply(self, update: Update) -> Moved:
        """Move theta in every worker, and compare their checksums; see `Replica.apply`.

        A worker whose checksum differs from that of most is replaced. If there is no majority, all workers start again
        from the latest checkpoint or the base model and must then agree.

        Raises:
            UserError: no worker is left, or they still do not agree.
        """
        message, history = messages.pack_update(update), self._pool.history
        self._pool.wait_for_one()
        calls: dict[Handle, tuple[Any, ...]] = dict.fromkeys(self._pool.ready, (message, self._checksum))
        self._traffic["es/bytes_sent"] += len(message) * len(calls)
        found = {h: value_of(r) for h, r in self._pool.on_each(calls, "apply", joins=False).items()}
        votes = Counter(found.values()).most_common(1)
        agreed = votes[0][0] if votes and 2 * votes[0][1] > len(found) else None
        history.updates.append(message)
        history.checksums.append(agreed)
        for handle in calls:
            if found.get(handle) != agreed or agreed is None:
                self._pool.lose(handle, "its theta differs from that of other workers after the update")
        if agreed is None:
            self._pool.wait_for_all()
            agreed = history.checksums[-1]  # the first new worker set it, and the others have it, too
            assert agreed is not None
        self._pool.wait_for_one()
        self._checksum = agreed
        packed = self._pool.on_one("moved")
        self._traffic["es/bytes_received"] += len(packed) + 32 * len(found)
        return messages.unpack_moved(packed, self.specs)

    def sums(self) -> dict[str, int]:
        """Return the checksum sum of every parameter."""
        return dict(self._pool.on_one("do", "sums", []))

    @property
    def theta_checksum(self) -> str:
        """The checksum of theta since its last change."""
        return self._checksum

    def checksum(self) -> str:
        """Return the checksum of theta, recomputed by every worker from its memory; a worker that differs is replaced.

        Raises:
            UserError: no worker is left.
        """
        for handle, found in self._pool.on_all("do", "checksum", []).items():
            if found != self._checksum:
                self._pool.lose(handle, "its theta has changed in memory")
        self._pool.wait_for_one()
        return self._checksum

    def fingerprint(self) -> str:
        """Return the fingerprint of theta."""
        return str(self._pool.on_one("do", "fingerprint", []))

    def load_weights(self, directory: Path) -> None:
        """Let every worker read float32 weights; see `Replica.load_weights`."""
        self._read_in_all("load_weights", directory.absolute())

    def _read_in_all(self, method: str, directory: Path | None) -> None:
        """Let every worker read another theta, at which new workers start, too.

        Args:
            method: of the workers' engines; it reads that theta.
            directory: holds that theta; None: that theta is the base model.

        Raises:
            UserError: workers have read different weights.
        """
        saved = {} if directory is None else {0: directory}
        history = History(checksums=[None], saved=saved, is_based=directory is None, anchors=self._pool.history.anchors)
        self._pool.history = history  # a worker that is starting meanwhile begins again
        self._pool.on_all("do", method, [] if directory is None else [directory])
        found = set(self._pool.on_all("do", "checksum", []).values())
        if len(found) > 1:
            raise UserError(f"workers have read different weights from {directory or 'the base model'}")
        self._checksum = str(found.pop())
        history.checksums = [self._checksum]

    def saved(self, directory: Path) -> None:
        """Take note of a directory that holds theta, from which a new worker can start; see `Replica.saved`."""
        history = self._pool.history
        history.saved[len(history.updates)] = directory.absolute()

    def save(self, directory: Path, *, float32: bool) -> None:
        """Let a worker write the model as Hugging Face files; see `Replica.save`.

        Raises:
            UserError: the disk is full, or the worker does not see this process's files.
        """
        self._pool.on_one("save", str(directory.absolute()), float32)
        if not (directory / WEIGHTS_FILE).exists():
            raise UserError(
                f"a worker has written {directory}, and it is not here: with workers on several machines output_dir "
                "must be a directory that all of them share"
            )

    def stop(self) -> None:
        """End the workers, and the cluster if this process started it."""
        self._end()
        atexit.unregister(self._end)

    def _issue(self, job: GroupJob) -> _Issue:
        if job.theta_checksum != self._checksum:
            raise ValueError(f"a job for theta {job.theta_checksum} reached workers that hold {self._checksum}")
        for prompt in job.prompts:
            self._numbers.setdefault(prompt, len(self._numbers))
        self._n_jobs += 1
        return _Issue(self._n_jobs, job)

    def _hand_out(self, waiting: list[_Issue], running: list[_Issue], durations: Sequence[float]) -> None:
        """Give each worker without work a job: one that waits, else one that takes long elsewhere."""
        busy = {handle for issue in running for handle in issue.calls.values()}
        for handle in self._pool.ready:
            if handle in busy:
                continue
            if waiting:
                issue = waiting.pop(0)
                running.append(issue)
                self._send(issue, handle)
            elif issue_ := self._straggler(running, durations):
                self._send(issue_, handle)

    def _straggler(self, running: Sequence[_Issue], durations: Sequence[float]) -> _Issue | None:
        """Return the job that has been running for the longest time with one worker, if that is unusually long."""
        if not durations:
            return None
        limit = max(LEAST_PATIENCE_S, PATIENCE * statistics.median(durations))
        now = time.monotonic()
        slow = [issue for issue in running if len(issue.calls) == 1 and now - issue.started > limit]
        return min(slow, key=lambda issue: issue.started, default=None)

    def _send(self, issue: _Issue, handle: Handle) -> None:
        new = {self._numbers[p]: p for p in issue.job.prompts if self._numbers[p] not in handle.prompts}
        handle.prompts |= set(new)
        prompts = messages.pack_prompts(new, has_text=self._has_text) if new else None
        message = messages.pack_job(issue.job, self._numbers)
        self._traffic["es/bytes_sent"] += len(message) + len(prompts or b"")
        if not issue.calls:
            issue.started = time.monotonic()
        issue.calls[handle.actor.answer.remote(issue.number, message, prompts)] = handle

    def _collect(self, issue: _Issue, call: Any) -> GroupAnswer | None:
        """Return the answer of a call; None if its worker died, which `_drop_dead` then handles.

        Raises:
            UserError: the worker raised one.
        """
        handle = issue.calls[call]
        try:
            reply = ray.get(call)
        except RayTaskError as error:  # the worker lives, and the job would fail elsewhere, too
            raise UserError(f"{handle} failed: {reason_of(error)}") from error
        except RayError as error:
            self._pool.lose(handle, reason_of(error))
            return None
        packed = value_of(self._pool.shown(reply))
        self._traffic["es/bytes_received"] += len(packed)
        return messages.unpack_answer(packed)

    def _drop_dead(self, waiting: list[_Issue], running: list[_Issue]) -> None:
        """Let jobs wait again whose workers are all lost.

        Raises:
            UserError: several workers died of one job.
        """
        for issue in list(running):
            for call, handle in list(issue.calls.items()):
                if handle not in self._pool.handles:
                    del issue.calls[call]
                    issue.deaths += 1
            if issue.deaths >= MOST_DEATHS:
                members = ", ".join(map(str, issue.job.indices[:3]))
                raise UserError(
                    f"{counted(issue.deaths, 'worker')} died one after another while answering members {members}...: "
                    "if memory is short, lower members_per_batch or prompts_per_batch"
                )
            if not issue.calls:
                running.remove(issue)
                waiting.insert(0, issue)

    def _interrupt(self, issue: _Issue) -> None:
        """Let the workers that still answer a job stop."""
        for handle in issue.calls.values():
            if handle in self._pool.handles:
                handle.actor.interrupt.remote(issue.number)
        issue.calls.clear()


def _end(pool: Pool, connection: cluster.Cluster) -> None:
    pool.stop()
    connection.close()


def _order(job: GroupJob) -> tuple[bool, int]:
    """Return what jobs are sorted by: members before theta, then the tokens that a job reads and may write."""
    longest = job.sampling.max_completion_length * job.sampling.num_generations
    tokens = len(job.indices) * sum(len(prompt.token_ids) + longest for prompt in job.prompts)
    return job.perturbations[0] is None, -tokens
