"""What every rival has in common with ES while it runs: rewards, evaluations, metrics, checkpoints, the end.

A method trains ``module``, in float32, however it likes. `score` is the only way to a reward; `step_done` is called
after every step and does what is due: metrics, a held-out evaluation, a checkpoint. The engine is ES's: a copy of the
module's weights that samples completions in training (unless TRL's own generation is asked for), answers evaluations
greedily, and is saved.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from estune.console import warn
from estune.engines.base import LocalEngine
from estune.engines.hf.parameters import Binding
from estune.errors import UserError
from estune.es.fitness import fill_failures, mean, weigh
from estune.es.types import Completion, Prompt
from estune.files import file_digest, is_count, is_number, read_json_object, write_json
from estune.run import records
from estune.run.card import write_card
from estune.run.checkpoint import checkpoint_path, prune, save_checkpoint, save_final
from estune.run.directory import METHOD_FILE
from estune.train import metrics
from estune.train.rollouts import scored
from estune.train.session import OpenRun
from estune.train.step import evaluation_sampling, sampling_of

PROGRESS_FILE = "progress.json"  # in a directory a run can go on from; written last, so it says that all is there


class Diverged(UserError):
    """The loss, its gradient or a weight is no finite number."""

    def __init__(self, method: str, step: int, what: str) -> None:
        super().__init__(
            f"{method} diverged in step {step} ({what}): lower learning_rate; earlier checkpoints are whole"
        )


@dataclass(frozen=True)
class Progress:
    """How far a run has come, as it is kept for a resume."""

    steps_done: int = 0
    evaluations: int = 0  # completions scored in training
    train_time_s: float = 0.0  # of steps, evaluations and saving not counted
    batches: int = 0  # sampled in training
    epochs: float = 0.0  # of the trainer's data
    tokens: float = 0.0  # that the trainer has seen

    @property
    def is_sound(self) -> bool:
        """Whether counts are whole numbers and amounts finite ones, none of them negative."""
        counts, amounts = (
            (self.steps_done, self.evaluations, self.batches),
            (self.train_time_s, self.epochs, self.tokens),
        )
        return all(map(is_count, counts)) and all(is_number(value) and 0 <= value < math.inf for value in amounts)

    def keep(self, directory: Path) -> None:
        """Write it into a directory whose files change no more, with their hashes."""
        files = {
            path.name: file_digest(path)
            for path in sorted(directory.iterdir())
            if path.name != PROGRESS_FILE and path.is_file()
        }
        write_json(directory / PROGRESS_FILE, {**dataclasses.asdict(self), "files": files})

    def keep_beside(self, directory: Path) -> None:
        """Write it into a directory whose files are written again at every step."""
        write_json(directory / PROGRESS_FILE, dataclasses.asdict(self))

    @classmethod
    def read(cls, directory: Path) -> Progress | None:
        """Return what a directory holds; None where it was not written to the end.

        Raises:
            UserError: a file in it is not what it was when it was written.
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
    """The parts of an open run of a rival; made by `estune.baselines.trainer`."""

    engine: LocalEngine
    module: Any  # PreTrainedModel, float32: what is trained; None where there is no gradient
    bindings: Sequence[Binding]  # of the module
    facts: dict[str, Any]  # base, data, rewards: what a resume cannot change
    should_stop: Callable[[], bool]
    steps_done: int = 0
    evaluations: int = 0  # completions scored in training
    batches: int = 0  # sampled in training
    progress: Progress = field(default_factory=Progress)  # at the end of the last step
    clock: float = field(default_factory=time.perf_counter)  # when the step in hand began
    measured: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # size, metrics; since the last step
    copied: bool = True  # the engine's weights are the module's

    @property
    def trainer_directory(self) -> Path:
        """Where a trainer keeps what it needs to go on: optimizer, schedule, random states."""
        return self.run.path / "trainer"

    @property
    def ended(self) -> bool:
        """Say whether the run has all its steps, or has used up its time."""
        return self.has_ended(self.steps_done)

    def step_started(self) -> None:
        """Start the clock of a step."""
        self.clock = time.perf_counter()

    def keep_method(self, record: dict[str, Any]) -> None:
        """Write `method.json`: what the method's trainer was told, and the run's facts."""
        write_json(self.run.path / METHOD_FILE, record | self.facts)

    def moved(self) -> None:
        """Note that the module's weights have changed."""
        self.copied = self.module is None

    def copy_weights(self) -> None:
        """Let the engine have the module's weights.

        Raises:
            Diverged: a weight is no finite number.
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
        """Sample completions (B, G) of the module as it is, by ES's engine.

        Args:
            prompts: (B,).
            count: completions of each, G.
            index: of the batch within the run: other numbers give other samples.

        Raises:
            Diverged: the model gives no finite logits.
        """
        self.copy_weights()
        sampling = dataclasses.replace(sampling_of(self.args, index), num_generations=count)
        return self._finite(self.engine.generate(None, prompts, sampling, self.should_stop))

    def _finite(self, answers: list[list[Completion]]) -> list[list[Completion]]:
        """Return completions if the model still computes with numbers."""
        if not all(completion.finite for row in answers for completion in row):
            raise Diverged(self.args.method, self.steps_done, "its logits are not finite")
        return answers

    def score(self, row_ids: Sequence[int], completions: Sequence[Sequence[Completion]]) -> np.ndarray:
        """Return the weighed rewards (B, G) of completions (B, G) of training rows; NaN where none applies.

        They come from the reward workers. A failure gets the lowest reward of the row's other completions.
        """
        rows = [self.train_rows[row] for row in row_ids]
        prompts = [self.train_prompts[row] for row in row_ids]
        future = self.evaluator.score(rows, prompts, [list(answers) for answers in completions], self.state())
        result = scored(future, self.should_stop)
        for error in result.errors:
            name = error.partition(":")[0]
            if name not in self.evaluator.warned:
                self.evaluator.warned.add(name)
                error = " ".join(error.split())
                warn(f"reward {error} (shown once; all are counted)")
        shape = (len(rows), -1, result.rewards.shape[1])
        # A prompt's completions stand where ES has members: (G, B, 1, F).
        rewards, failed = (a.reshape(shape).swapaxes(0, 1)[:, :, None] for a in (result.rewards, result.failed))
        filled = fill_failures(rewards, failed, self.rewards.weights)
        weighed = weigh(filled, self.rewards.weights)[:, :, 0].T  # (B, G)
        lengths = np.array([[len(completion.token_ids) for completion in answers] for answers in completions])
        clipped = float(np.mean([not completion.finished for answers in completions for completion in answers]))
        self.note(weighed, filled, lengths, clipped, result.failed.sum(axis=0))
        return weighed

    def note(
        self, weighed: np.ndarray, rewards: np.ndarray, lengths: np.ndarray, clipped_ratio: float, failures: np.ndarray
    ) -> None:
        """Count scored completions and measure them; ``rewards`` (..., F), the others one number a completion.

        The last axis of ``weighed`` holds the completions that are compared with one another; ``failures`` (F,) counts
        the failed rewards of each function.
        """
        self.evaluations += weighed.size
        known = np.isfinite(weighed).all(axis=-1) & (weighed.shape[-1] > 1)  # one completion has nothing to differ from
        spread = np.ptp(weighed[known], axis=-1) if known.any() else np.zeros(0)
        self.measured.append(
            (
                weighed.size,
                {
                    "reward": mean(weighed),
                    "reward_std": float(np.nanstd(weighed)) if np.isfinite(weighed).any() else math.nan,
                    **{f"rewards/{name}/mean": mean(rewards[..., f]) for f, name in enumerate(self.rewards.names)},
                    "frac_reward_zero_std": float((spread <= 1e-9).mean()) if spread.size else math.nan,
                    "completions/mean_length": float(lengths.mean()),
                    "completions/clipped_ratio": clipped_ratio,
                    "reward_errors": float(failures.sum()),
                    **{f"rewards/{name}/errors": float(failures[f]) for f, name in enumerate(self.rewards.names)},
                },
            )
        )

    def use(self, theta: Mapping[str, np.ndarray]) -> None:
        """Let the engine have other weights, by stored name: for methods that train no module."""
        self.engine.assign_arrays(theta)

    def state(self) -> dict[str, Any]:
        """Return what reward functions are told now."""
        return self.trainer_state(self.steps_done)

    def step_done(self, step: int, record: dict[str, Any], epochs: float = 0.0) -> None:
        """Take note of a finished step and do what is due; the module has moved.

        Args:
            step: steps done now.
            record: the method's own metrics.
            epochs: of the trainer's data, done now.

        Raises:
            Diverged: the loss or its gradient is no finite number.
        """
        now = time.perf_counter()
        step_time = now - self.clock
        self.train_time_s += step_time
        self.steps_done = step
        self.moved()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record.get(name, 0.0)):
                raise Diverged(self.args.method, step, f"its {name} is {record[name]}")
        measured, self.measured = together(self.measured), []
        if step % self.args.logging_steps == 0 or self.ended:
            own = {"num_evaluations": self.evaluations, "step_time": step_time, "train_time_s": self.train_time_s}
            self.monitors.log({"step": step, **record, **measured, **own})
        tokens = record.get("num_tokens", 0.0)
        self.progress = Progress(step, self.evaluations, self.train_time_s, self.batches, epochs, tokens)
        self.after_step()
        self.clock = time.perf_counter()

    def after_step(self) -> None:
        """Evaluate theta on held-out rows and save a checkpoint, where it is time and was not done yet."""
        args, done = self.args, self.steps_done
        if self.is_evaluation_due(done):
            self.copy_weights()
            evaluation = self.answer_held_out(done)
            own = {"num_evaluations": self.evaluations, "train_time_s": self.train_time_s}
            self.monitors.log({"step": done, **metrics.evaluation_record(evaluation), **own})
            records.write_lines(records.evaluation_path(self.run.path, done), evaluation.records())
        if (
            args.save_steps
            and done
            and done % args.save_steps == 0
            and not checkpoint_path(self.run.path, done).exists()
        ):
            self.save(final=False)
            saved = range(0, done + 1, args.save_steps)
            prune(self.run.path, args.save_total_limit, saved)

    def save(self, final: bool) -> None:
        """Write ``checkpoint-<step>``, or the finished model at the run's root.

        Raises:
            Diverged: a weight is no finite number, or the finished model gives no finite logits.
        """
        self.copy_weights()
        if final and self.steps_done:
            one = dataclasses.replace(evaluation_sampling(self.args), max_completion_length=1)
            self._finite(self.engine.generate(None, self.train_prompts[:1], one))
        engine = self.engine
        state = {"step": self.steps_done, "fingerprint": engine.fingerprint(), "checksum": engine.checksum()}
        trainer_state = {"global_step": self.steps_done, "max_steps": self.args.max_steps, "log_history": []}
        if final:
            self.engine.load_theta()
            save_final(self.run.path, self.engine, state, trainer_state)
            write_card(self.run.path)
        else:
            save_checkpoint(self.run.path, self.steps_done, self.engine, state, trainer_state)


def together(batches: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the metrics of some batches as one: means by the batches' sizes; errors are counted."""
    if len(batches) == 1:
        return batches[0][1]
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for _, batch in batches for name in batch):
        known = [(size, batch[name]) for size, batch in batches if not math.isnan(batch.get(name, math.nan))]
        counted = name == "reward_errors" or (name.startswith("rewards/") and name.endswith("/errors"))
        total = math.fsum(value if counted else size * value for size, value in known)
        sizes = 1 if counted else sum(size for size, _ in known)
        found[name] = total / sizes if known else math.nan
    return found
