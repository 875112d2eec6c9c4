"""The open run of a baseline: rewards, evaluations, metrics and checkpoints, as in a run of ES.

A baseline trains ``module`` in float32. It gets all rewards from `score`. It calls `step_done` after every step, which
logs metrics and makes the evaluation and the checkpoint that are due. ES's engine holds a copy of the module's weights.
The engine samples completions (unless ``generation`` is `trl`), answers evaluations greedily, and saves models.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from estune.engines.base import LocalEngine
from estune.engines.hf.parameters import Binding
from estune.errors import UserError
from estune.es.fitness import fill_failures, mean, weigh
from estune.es.types import Completion, Prompt
from estune.files import file_digest, is_count, is_number, read_json_object, write_json
from estune.run import records
from estune.run.card import write_card
from estune.run.checkpoint import checkpoint_path, prune, save_checkpoint, save_final
from estune.run.saved_config import METHOD_FILE, BaselineFacts, Method, Trainer
from estune.train import metrics
from estune.train.rollouts import scored
from estune.train.session import OpenRun
from estune.train.step import evaluation_sampling, sampling_of

PROGRESS_FILE = "progress.json"  # written last into a directory that a run can resume from, so it marks it as complete


class Diverged(UserError):
    """The loss, its gradient, a weight or a logit is NaN or infinite."""

    def __init__(self, method: str, step: int, cause: str) -> None:
        super().__init__(
            f"{method} diverged in step {step} ({cause}): lower learning_rate; earlier checkpoints are intact"
        )


@dataclass(frozen=True)
class Progress:
    """The progress of a run, stored for a resume."""

    steps_done: int = 0
    evaluations: int = 0  # completions scored in training
    train_time_s: float = 0.0  # spent in steps; evaluations and saving are not counted
    batches: int = 0  # batches sampled in training
    epochs: float = 0.0  # epochs of the trainer's data
    tokens: float = 0.0  # tokens that the trainer has processed

    @property
    def is_sound(self) -> bool:
        """Whether all counts are integers and all amounts are finite, and none is negative."""
        counts, amounts = (
            (self.steps_done, self.evaluations, self.batches),
            (self.train_time_s, self.epochs, self.tokens),
        )
        return all(map(is_count, counts)) and all(is_number(value) and 0 <= value < math.inf for value in amounts)

    def write(self, directory: Path) -> None:
        """Write the progress into a directory whose other files are final, with their hashes."""
        files = {
            path.name: file_digest(path)
            for path in sorted(directory.iterdir())
            if path.name != PROGRESS_FILE and path.is_file()
        }
        write_json(directory / PROGRESS_FILE, {**dataclasses.asdict(self), "files": files})

    def write_unhashed(self, directory: Path) -> None:
        """Write the progress into a directory whose other files change at every step."""
        write_json(directory / PROGRESS_FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, directory: Path) -> Progress | None:
        """Return the progress stored in a directory; None if the directory is incomplete.

        Raises:
            UserError: a file of the directory is missing or damaged.
        """
        path = directory / PROGRESS_FILE
        if not path.exists():
            return None
        try:
            values = read_json_object(path)
            files = values.pop("files", {})
            progress = cls(**values)
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path} is damaged") from None
        if not progress.is_sound or not isinstance(files, dict):
            raise UserError(f"{path} is damaged")
        for name, digest in files.items():
            if not (directory / name).is_file() or file_digest(directory / name) != digest:
                raise UserError(f"{directory / name} is missing or damaged")
        return progress


@dataclass
class BaselineSession(OpenRun):
    """The parts of an open run of a baseline; `estune.baselines.trainer.open_baseline` makes one."""

    engine: LocalEngine
    module: Any  # PreTrainedModel in float32 that is trained; None for a method without gradients
    bindings: Sequence[Binding]  # of the module
    facts: BaselineFacts  # base model, data and rewards, which a resume cannot change
    should_stop: Callable[[], bool]
    steps_done: int = 0
    evaluations: int = 0  # completions scored in training
    batches: int = 0  # batches sampled in training
    progress: Progress = field(default_factory=Progress)  # at the end of the last step
    clock: float = field(default_factory=time.perf_counter)  # seconds, clock reading at the start of the current step
    measured: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # size, metrics; since the last step
    copied: bool = True  # whether the engine's weights equal the module's

    @property
    def trainer_directory(self) -> Path:
        """Directory of the trainer's state for a resume: optimizer, schedule, random states."""
        return self.run.path / "trainer"

    @property
    def ended(self) -> bool:
        """Return whether the run has reached ``max_steps`` or ``max_time_s``."""
        return self.ends_after(self.steps_done)

    def begin(self) -> None:
        """Tell the callbacks that training begins; make the evaluation that is due."""
        if len(self.callbacks):
            self.copy_weights()
        self.begin_callbacks(self.steps_done)
        # Random search stores its state only after the evaluation and the checkpoint of a step.
        if self.module is not None or not self.steps_done:
            self.after_step()
        if not self.ended:
            self.callbacks.call("on_step_begin")

    def tell_callbacks(self, event: str) -> None:
        """Call an event of the callbacks, whose ``model`` then has the module's present weights."""
        if len(self.callbacks):
            self.copy_weights()
        self.callbacks.call(event)

    def step_started(self) -> None:
        """Start the clock of a step."""
        self.clock = time.perf_counter()

    def write_method(self, trainer: Trainer) -> None:
        """Write `method.json`: the resolved arguments of the method's trainer, and the run's facts."""
        record: Method = {**trainer, **self.facts}
        write_json(self.run.path / METHOD_FILE, record)

    def mark_moved(self) -> None:
        """Record that the module's weights have changed."""
        self.copied = self.module is None

    def copy_weights(self) -> None:
        """Copy the module's weights to the engine if they have changed.

        Raises:
            Diverged: a weight is NaN or infinite.
        """
        if self.copied:
            return
        stored = {binding.name: binding for binding in self.bindings}

        def read(name: str) -> torch.Tensor:
            weights = stored[name].read()
            if not torch.isfinite(weights).all():
                raise Diverged(self.args.method, self.steps_done, f"{name} is not finite")
            return weights

        with torch.no_grad():
            self.engine.assign(read)
        self.copied = True

    def sample(self, prompts: Sequence[Prompt], count: int, index: int) -> list[list[Completion]]:
        """Sample completions (B, G) with the module's current weights and ES's engine.

        Args:
            prompts: (B,).
            count: completions of each prompt, G.
            index: number of the batch within the run; it selects the random numbers.

        Raises:
            Diverged: the logits are NaN or infinite.
        """
        self.copy_weights()
        sampling = dataclasses.replace(sampling_of(self.args, index), num_generations=count)
        return self._finite(self.engine.generate(None, prompts, sampling, self.should_stop))

    def _finite(self, answers: list[list[Completion]]) -> list[list[Completion]]:
        """Return the completions (B, G); raise Diverged if their logits are not finite."""
        if not all(completion.finite for row in answers for completion in row):
            raise Diverged(self.args.method, self.steps_done, "its logits are not finite")
        return answers

    def score(self, row_ids: Sequence[int], completions: Sequence[Sequence[Completion]]) -> np.ndarray:
        """Return the weighted rewards (B, G) of completions (B, G) of training rows; NaN where no reward applies.

        The reward workers compute them. A failed reward becomes the lowest reward of the row's other completions.
        """
        rows = [self.train_rows[row] for row in row_ids]
        prompts = [self.train_prompts[row] for row in row_ids]
        answered = [list(answers) for answers in completions]
        others = None
        if self.evaluator.pool.wants_opponents:  # the other completions of the same prompt
            texts = self.evaluator.texts(prompts, answered)
            others = [[row[k:] + row[:k] for row in texts] for k in range(1, len(texts[0]))]
        future = self.evaluator.score(rows, prompts, answered, self.state(), others)
        result = scored(future, self.should_stop)
        self.evaluator.warn_of_failures(result.errors)
        shape = (len(rows), -1, result.rewards.shape[1])
        # `fill_failures` compares along the members' axis: (G, B, 1, F) puts a prompt's completions there.
        rewards, failed = (a.reshape(shape).swapaxes(0, 1)[:, :, None] for a in (result.rewards, result.failed))
        filled = fill_failures(rewards, failed, self.rewards.weights)
        weighed = weigh(filled, self.rewards.weights)[:, :, 0].T  # (B, G)
        lengths = np.array([[len(completion.token_ids) for completion in answers] for answers in completions])
        clipped = float(np.mean([not completion.finished for answers in completions for completion in answers]))
        self.measure(weighed, filled, lengths, clipped, result.failed.sum(axis=0))
        return weighed

    def measure(
        self, weighed: np.ndarray, rewards: np.ndarray, lengths: np.ndarray, clipped_ratio: float, failures: np.ndarray
    ) -> None:
        """Count scored completions and add their metrics to ``self.measured``.

        Args:
            weighed: (..., G), weighted rewards; the G completions of the last axis compete with one another.
            rewards: (..., F), of each function.
            lengths: tokens of each completion, of any shape.
            clipped_ratio: share of completions that the length limit cut off.
            failures: (F,), number of failed rewards of each function.
        """
        self.evaluations += weighed.size
        known = np.isfinite(weighed).all(axis=-1) & (weighed.shape[-1] > 1)  # a single completion has no spread
        spread = np.ptp(weighed[known], axis=-1) if known.any() else np.zeros(0)
        self.measured.append(
            (
                weighed.size,
                {
                    "reward": mean(weighed),
                    "reward_std": metrics.spread(weighed),
                    **metrics.of_functions(self.rewards.names, rewards),
                    "frac_reward_zero_std": float((spread <= 1e-9).mean()) if spread.size else math.nan,
                    "completions/mean_length": float(lengths.mean()),
                    "completions/clipped_ratio": clipped_ratio,
                    "reward_errors": float(failures.sum()),
                    **{f"rewards/{name}/errors": float(failures[f]) for f, name in enumerate(self.rewards.names)},
                },
            )
        )

    def use(self, theta: Mapping[str, np.ndarray]) -> None:
        """Give the engine the weights ``theta``, by stored name; for methods without a module."""
        self.engine.assign_arrays(theta)

    def state(self) -> dict[str, Any]:
        """Return the ``trainer_state`` that reward functions receive now."""
        return self.trainer_state(self.steps_done)

    def step_done(self, step: int, record: dict[str, Any], epochs: float = 0.0) -> None:
        """Log a finished step, then evaluate and save a checkpoint if they are due.

        Args:
            step: number of steps done.
            record: the method's own metrics.
            epochs: epochs of the trainer's data that are done.

        Raises:
            Diverged: the loss or its gradient is NaN or infinite.
        """
        now = time.perf_counter()
        step_time = now - self.clock
        self.train_time_s += step_time
        self.steps_done = step
        self.mark_moved()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record.get(name, 0.0)):
                raise Diverged(self.args.method, step, f"its {name} is {record[name]}")
        self.callbacks.at(step, self.trainer_state(step)["epoch"])
        self.tell_callbacks("on_step_end")
        measured, self.measured = combine(self.measured), []
        wanted = any(map(self.callbacks.wants, ("log", "evaluate", "save")))
        may_be_last = len(self.callbacks) > 0 and self.is_evaluation_due(step)
        if step % self.args.logging_steps == 0 or self.ended or wanted or may_be_last:
            cost = {"num_evaluations": self.evaluations, "step_time": step_time, "train_time_s": self.train_time_s}
            self.log_record({"step": step, **record, **measured, **cost})
        tokens = record.get("num_tokens", 0.0)
        self.progress = Progress(step, self.evaluations, self.train_time_s, self.batches, epochs, tokens)
        self.after_step()
        if not self.ended:
            self.callbacks.call("on_step_begin")
        self.clock = time.perf_counter()

    def after_step(self) -> None:
        """Evaluate theta on held-out rows and save a checkpoint if they are due and not written yet."""
        args, done = self.args, self.steps_done
        if self.is_evaluation_due(done) or self.is_evaluation_wanted(done):
            self.copy_weights()
            evaluation = self.answer_held_out(done)
            cost = {"num_evaluations": self.evaluations, "train_time_s": self.train_time_s}
            record = {"step": done, **metrics.evaluation_record(evaluation), **cost}
            self.monitors.log(record)
            records.write_lines(records.evaluation_path(self.run.path, done), evaluation.records())
            self.callbacks.logged(record)
        is_scheduled = bool(args.save_steps and done) and done % args.save_steps == 0
        is_wanted = done > 0 and self.callbacks.wants("save")
        if (is_scheduled or is_wanted) and not checkpoint_path(self.run.path, done).exists():
            self.save(final=False, asked=not is_scheduled)
            scheduled = range(0, done + 1, args.save_steps) if args.save_steps else ()
            prune(self.run.path, args.save_total_limit, scheduled)
            self.callbacks.saved()

    def save(self, final: bool, *, asked: bool = False) -> None:
        """Write ``checkpoint-<step>``, or with ``final`` the finished model at the run's root.

        ``asked``: whether a callback has asked for the checkpoint.

        Raises:
            Diverged: a weight or, for the finished model, a logit is NaN or infinite.
        """
        self.copy_weights()
        if final and self.steps_done:
            one = dataclasses.replace(evaluation_sampling(self.args), max_completion_length=1)
            self._finite(self.engine.generate(None, self.train_prompts[:1], one))
        if final:
            self.engine.load_theta()
            save_final(self.run.path, self.engine, self.steps_done, self.args.max_steps)
            write_card(self.run.path)
        else:
            save_checkpoint(self.run.path, self.engine, self.steps_done, self.args.max_steps, asked=asked)


def combine(batches: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the metrics of batches (size, metrics) as one: means weighted by size, and sums of error counts."""
    if len(batches) == 1:
        return batches[0][1]
    combined: dict[str, float] = {}
    for name in dict.fromkeys(name for _, batch in batches for name in batch):
        known = [(size, batch[name]) for size, batch in batches if not math.isnan(batch.get(name, math.nan))]
        counted = name == "reward_errors" or (name.startswith("rewards/") and name.endswith("/errors"))
        total = math.fsum(value if counted else size * value for size, value in known)
        sizes = 1 if counted else sum(size for size, _ in known)
        combined[name] = total / sizes if known else math.nan
    return combined


def random_states() -> tuple[Any, ...]:
    """Return the states of the random generators that a trainer uses: Python, NumPy, torch CPU, torch CUDA."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(python: Any, numpy: Any, cpu: torch.Tensor, cuda: list[torch.Tensor]) -> None:
    """Restore the states that `random_states` returned."""
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random generators of the process after the block; trainers of transformers seed all of them."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(*states)
