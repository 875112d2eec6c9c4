"""An open training run: its directory, engine, reward workers, prompts and monitors.

`ESTrainer.train` is the loop. `Session` has one method for each line of the loop. `estune.run.directory` documents the
order in which a step writes its files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from estune.config import ResolvedConfig
from estune.console import counted, say, warn
from estune.data.batches import Batches
from estune.errors import UserError
from estune.es.fitness import fill_failures, population_fitness, weigh
from estune.es.theta import Moved
from estune.es.types import Prompt, num_parameters
from estune.es.update import Update
from estune.models.hub import push
from estune.monitor.monitors import Monitors
from estune.monitor.panel import Excerpt, PanelMonitor
from estune.rewards.pool import RewardPool
from estune.run import records
from estune.run.card import write_card
from estune.run.checkpoint import checkpoint_path, prune
from estune.run.directory import Run
from estune.run.journal import step_record
from estune.run.replay import refuse_diverged
from estune.train import metrics
from estune.train.evaluation import Evaluation, evaluate
from estune.train.groups import Rollouts, digest
from estune.train.rollouts import Evaluator, answers_of_theta
from estune.train.setup import Loaded
from estune.train.sigma_watch import SigmaWatch, ThetaAnswers
from estune.train.soundness import broken_population, refuse_broken_theta, theta_is_finite, warn_of_inputs
from estune.train.step import Step, evaluation_sampling, plan_step, sampling_of

Rows = list[dict[str, Any]]


@dataclass
class OpenRun(Loaded):
    """The parts of an open run that all methods share. The caller passes the number of steps done (``steps_done``)."""

    run: Run
    evaluator: Evaluator
    accuracy_pool: RewardPool | None
    monitors: Monitors
    train_time_s: float  # spent in the steps done; evaluations and saving are not counted

    def has_ended(self, steps_done: int) -> bool:
        """Return whether the run has reached ``max_steps`` or ``max_time_s`` after ``steps_done`` steps."""
        args = self.args
        return steps_done >= args.max_steps or bool(args.max_time_s and self.train_time_s >= args.max_time_s)

    def is_evaluation_due(self, steps_done: int) -> bool:
        """Return whether an evaluation is due after ``steps_done`` steps and its file does not exist yet."""
        every = self.args.eval_steps
        due = bool(every) and (steps_done % every == 0 or self.has_ended(steps_done))
        return due and not records.evaluation_path(self.run.path, steps_done).exists()

    def answer_held_out(self, steps_done: int) -> Evaluation:
        """Answer the held-out rows with theta, and score the completions."""
        return evaluate(
            self.evaluator,
            self.eval_rows,
            self.eval_prompts,
            evaluation_sampling(self.args),
            self.rewards.weights,
            self.accuracy_pool,
            batch=self.args.prompts_per_batch,
            trainer_state=self.trainer_state(steps_done),
        )

    def trainer_state(self, steps_done: int) -> dict[str, Any]:
        """Return the ``trainer_state`` that reward functions receive after ``steps_done`` steps."""
        epoch = steps_done * self.args.batch_size / len(self.train_rows)
        return {"global_step": steps_done, "max_steps": self.args.max_steps, "epoch": epoch}


@dataclass(frozen=True)
class Applied:
    """How far an update moved theta, and the clock readings before and after it, in seconds."""

    moved: Moved
    started: float
    ended: float


@dataclass(frozen=True)
class Measured:
    """The metrics of a step before theta moves."""

    metrics: dict[str, Any]
    started: float  # clock reading at which the step began, in seconds


def run_so_far(args: ResolvedConfig, run: Run) -> dict[str, Any]:
    """Return the fields of a `Session` that depend on the steps done: ``watch`` and ``theta_answered_first``."""
    logged = records.read_metrics(run.path)
    fitness = (record["fitness"] for record in run.journal.steps)
    return {
        "watch": SigmaWatch.of_run(args.population_size, args.batch_size, fitness, logged),
        "theta_answered_first": any(record["step"] == 1 and "es/theta_fitness" in record for record in logged),
    }


@dataclass
class Session(OpenRun):
    """The parts of an open run of evolution strategies; `estune.train.opening.open_session` makes one."""

    batches: Batches
    checksum: str  # of theta
    tokens: int  # processed by the journalled steps
    perturb_cos: dict[str, float] = field(default_factory=dict)  # cosine per kind of parameter, latest measurement
    perturb_cos_scale: float = math.inf  # noise scale of that measurement
    watch: SigmaWatch = field(default_factory=SigmaWatch)
    asks_theta_first: bool = True  # whether theta also answers the first step's rows
    panel: PanelMonitor | None = None
    repository: str | None = None  # hub repository to which the finished model is uploaded
    theta_answered_first: bool = False  # whether theta's completions of the first step's rows were scored

    @property
    def ended(self) -> bool:
        """Return whether the run has reached ``max_steps`` or ``max_time_s``."""
        return self.has_ended(self.run.steps_done)

    def plan(self) -> Step:
        """Return the next step."""
        return plan_step(self.args, self.batches, self.run.steps_done)

    def announce(self, replayed: int) -> None:
        """Print the run's model, data and options; ``replayed`` is the number of steps replayed from the journal."""
        args, run, size = self.args, self.run, num_parameters(self.engine.specs)
        moving = num_parameters(spec for spec in self.engine.specs if spec.perturbed)
        share = "all" if moving == size else f"{moving / size:.1%} of"
        data = args.task or args.dataset_name or "your dataset"
        say(
            f"estune: {args.model}, {share} {size:,} parameters; {data}: {len(self.train_rows)} "
            f"training rows, {len(self.eval_rows)} held out"
        )
        say(
            f"estune: N {args.population_size}, sigma {args.sigma:g}, learning_rate {args.learning_rate:g}, "
            f"batch_size {args.batch_size}, seed {args.seed}, {counted(args.max_steps, 'step')} into {run.path}"
        )
        if args.noise == "lowrank" and not any(spec.kind == "lowrank" for spec in self.engine.specs):
            warn(f"engine {self.engine.facts.name} has no parameter with low-rank noise: all noise is full")
        elif args.noise == "lowrank":
            shared = self.engine.facts.shared_forward
            together = f"{args.members_per_batch} in a forward pass" if shared else "one after another"
            say(f"estune: low-rank noise, rank {args.rank}; members {together}")
        warn_of_inputs(args, self.engine, self.train_prompts)
        if run.journal.header.get("rollouts") == "not reproducible":
            warn(
                "rollouts are not reproducible here: the same member generated different tokens under load. Another "
                "run with this configuration may differ; only the journal reproduces this run"
            )
        if run.steps_done:
            say(f"estune: resuming after step {run.steps_done} ({replayed} replayed from the journal)")

    def evaluate_population(self, step: Step) -> Rollouts:
        """Generate and score the completions of every member on the step's rows: (N, B, G) rollouts.

        Raises:
            Interrupted: the run was asked to stop; `pending.jsonl` holds the finished members.
            UserError: the logits of all members are NaN or infinite.
        """
        started = time.perf_counter()
        self._measure_rounding(step)
        rows, prompts = self._inputs(step)
        rollouts = self.evaluator.evaluate_population(
            step.perturbations,
            rows,
            prompts,
            sampling_of(self.args, step.index),
            self.trainer_state(step.index),
            theta_checksum=self.checksum,
            members_per_batch=self.args.members_per_batch,
            pending=self.run.pending,
            head=self.run.journal.head,
            keep_text=self._keeps_completions(step) or self.panel is not None,
        )
        rollouts.started = started - rollouts.earlier_s  # step time includes members that an earlier process evaluated
        if rollouts.non_finite_ratio == 1.0:
            is_broken = not theta_is_finite(self.args, self.engine, self.train_prompts)
            raise UserError(broken_population(self.engine, step.index + 1, step.sigma, is_broken))
        return rollouts

    def evaluate_theta(self, step: Step, rollouts: Rollouts) -> ThetaAnswers:
        """Answer the step's rows with theta if that is due: in step 1, at evaluations, or when members agree.

        Failed rewards of theta are filled like a member's. The update does not depend on theta's completions.

        Raises:
            Interrupted: the run was asked to stop.
        """
        rows, prompts = self._inputs(step)
        sampling = sampling_of(self.args, step.index)
        digests = np.array([group.digests for group in rollouts.groups])  # (N, B, G)
        is_ranked = bool(self.args.eval_steps) and (step.index + 1) % self.args.eval_steps == 0
        if not is_ranked and not (step.index == 0 and self.asks_theta_first):
            if not self.watch.wants_theta(rollouts.modal_ratio):
                return ThetaAnswers()
            answers = answers_of_theta(self.engine, prompts, sampling, self.evaluator.should_stop)
            of_theta = np.array([[digest(completion.token_ids) for completion in row] for row in answers])  # (B, G)
            return ThetaAnswers(equal=float(np.mean(digests == of_theta)))
        theta = self.evaluator.evaluate_theta(rows, prompts, sampling, self.trainer_state(step.index))
        rewards = np.concatenate([rollouts.rewards, theta.rewards])  # (N + 1, B, G, F)
        failed = np.concatenate([rollouts.failed, theta.failed])
        weights = self.rewards.weights
        fitness = population_fitness(weigh(fill_failures(rewards, failed, weights), weights))  # (N + 1,)
        return ThetaAnswers(
            equal=float(np.mean(digests == np.array(theta.groups[0].digests))),
            fitness=float(fitness[-1]),
            rank=1 + int((fitness[:-1] > fitness[-1]).sum()) if is_ranked else None,
            is_scored=True,
        )

    def measure(
        self, step: Step, rewards: np.ndarray, fitness: np.ndarray, rollouts: Rollouts, theta: ThetaAnswers
    ) -> Measured:
        """Compute the step's metrics before the update, and print the warnings that follow from them.

        Args:
            step: the step.
            rewards: (N, B, G, F), failures filled.
            fitness: (N,).
            rollouts: of the members.
            theta: the result of `evaluate_theta`.
        """
        self.tokens += rollouts.tokens
        if step.index == 0:
            self.theta_answered_first = theta.is_scored
        record = metrics.step_metrics(rewards, self.rewards, fitness, rollouts)
        record |= {"learning_rate": step.learning_rate, "es/sigma": step.sigma, "num_tokens": self.tokens}
        record |= theta.record()
        record["num_evaluations"] = self._evaluations(step)
        self.watch.step({"step": step.index + 1, **record}, theta, self._unpaid(rollouts))
        if step.index == 0:
            record |= {f"es/perturb_cos/{kind}": value for kind, value in self.perturb_cos.items()}
        if self.panel is not None:
            self.panel.members(fitness.tolist(), excerpts(self._inputs(step)[1], rollouts, fitness))
        return Measured(record, rollouts.started)

    def journal(self, step: Step, fitness: np.ndarray, rollouts: Rollouts, update: Update, measured: Measured) -> None:
        """Write the step to disk and call fsync; theta may move when this method returns.

        Args:
            step: the step.
            fitness: (N,).
            rollouts: of the members.
            update: how theta will move.
            measured: written to `pending.jsonl`, so that a resume can log the step after a kill.
        """
        record = step_record(
            step.index,
            step.rows,
            fitness.tolist(),
            step.noise.scale,
            update,
            self.checksum,
            failures=int(rollouts.failed.sum()),
            tokens=rollouts.tokens,
            lowrank_scale=step.noise.lowrank_scale,
        )
        self.run.pending.note(self.run.journal.head, measured.metrics)
        if self._keeps_completions(step):
            path = records.completions_path(self.run.path, step.index + 1)
            records.write_lines(path, rollouts.completion_records(self._inputs(step)[1]))
        self.run.journal.append_step(record)

    def apply(self, update: Update) -> Applied:
        """Move theta by the journalled update.

        Raises:
            UserError: theta contains NaN or infinity after the update.
        """
        started = time.perf_counter()
        moved = self.engine.apply(update)
        self.checksum = moved.checksum
        refuse_diverged(moved, self.run.steps_done)
        return Applied(moved, started, time.perf_counter())

    def log(self, measured: Measured, applied: Applied) -> None:
        """Pass the step's metrics to the monitors, then evaluate and save a checkpoint if they are due."""
        timing = metrics.Timing(measured.started, applied.started, applied.ended)
        self.train_time_s += timing.ended - timing.started
        moves = metrics.update_metrics(measured.metrics, applied.moved, timing)
        self._log_step(measured.metrics | moves | {"train_time_s": self.train_time_s})
        self.run.pending.clear()
        self.catch_up()

    def log_again(self, measured: dict[str, Any], moved: Moved) -> None:
        """Log a journalled step whose process was killed before it logged the step.

        Args:
            measured: the metrics that `journal` wrote; the step's time is the sum of the times in them.
            moved: how far the step's update moved theta.
        """
        moves = metrics.update_metrics(measured, moved, None)
        self.train_time_s += moves["step_time"]
        if self.run.steps_done == 1:
            self.theta_answered_first = "es/theta_fitness" in measured
            self.watch.know_theta({"step": 1, **measured})
        self._log_step(measured | moves | {"train_time_s": self.train_time_s})

    def _log_step(self, record: dict[str, Any]) -> None:
        """Pass the last step's metrics to the monitors every ``logging_steps``, and if they hold theta_0's fitness."""
        done = self.run.steps_done
        if done % self.args.logging_steps == 0 or self.ended or (done == 1 and self.theta_answered_first):
            self.monitors.log({"step": done} | record)

    def catch_up(self) -> None:
        """Write the held-out evaluation and the checkpoint that are due after the steps done, unless they exist."""
        args, done = self.args, self.run.steps_done
        if self.is_evaluation_due(done):
            evaluation = self.answer_held_out(done)
            record = metrics.evaluation_record(evaluation)
            self.watch.evaluation(record)
            self.monitors.log({"step": done, **record})
            records.write_lines(records.evaluation_path(self.run.path, done), evaluation.records())
        if args.save_steps and done and done % args.save_steps == 0:
            if not self.run.has_checkpoint():
                self.run.save(self.engine, final=False)
                self.run.record_checkpoint(self.engine)
            prune(self.run.path, args.save_total_limit, self.run.journal.checkpoints)

    def finish(self) -> None:
        """Write the finished model to the run directory's root. The working model then holds theta.

        Raises:
            UserError: theta's logits are NaN or infinite; nothing is written.
        """
        refuse_broken_theta(self.args, self.engine, self.train_prompts, self.run.steps_done)
        self.engine.load_theta()
        self.run.save(self.engine, final=True)
        self.run.record_checkpoint(self.engine)
        write_card(self.run.path)  # `finish_again` writes the card if the process is killed before this line
        self.run.pending.clear()
        prune(self.run.path, self.args.save_total_limit, self.run.journal.checkpoints)
        if self.run.steps_done and self.checksum == self.run.journal.steps[0]["checksum"]:
            warn("theta never moved: in every step all members tied, or every reward failed")
        if self.panel is not None:
            self.panel.close()  # the lines below then stand under the panel
        say(f"estune: done; the model is in {self.run.path}")
        if self.repository is not None:
            say(f"estune: {push(self.run.path, self.repository)}")

    def save_interrupted(self) -> None:
        """Save a checkpoint of a run that was asked to stop, and print how to continue it."""
        run = self.run
        self.engine.load_theta()
        if run.steps_done and not checkpoint_path(run.path, run.steps_done).exists():
            run.save(self.engine, final=False)
        say(
            f"estune: stopped after {counted(run.steps_done, 'step')}{self._kept()}; "
            f"continue with: estune train --resume --output_dir {run.path}"
        )

    def _kept(self) -> str:
        """Return how many members of the step in hand are stored, as text; an empty string if none is."""
        kept = len(self.run.pending.read(self.run.journal.head))
        if not kept:
            return ""
        return f", {kept} of {self.args.population_size} members of step {self.run.steps_done + 1} kept"

    def _measure_rounding(self, step: Step) -> None:
        """Measure how much of a perturbation survives the compute dtype: in step 1, and whenever sigma has halved."""
        if step.noise.scale < self.perturb_cos_scale / 2:
            self.perturb_cos_scale = step.noise.scale
            self.perturb_cos = self.engine.perturb_cosine(step.perturbations[0])
            metrics.warn_of_coarse_weights(self.perturb_cos)

    def _inputs(self, step: Step) -> tuple[Rows, list[Prompt]]:
        """Return the rows and prompts of a step, (B,) each."""
        return [self.train_rows[row] for row in step.rows], [self.train_prompts[row] for row in step.rows]

    def _evaluations(self, step: Step) -> int:
        """Return how many training completions have been scored up to this step, including theta's."""
        done, args = step.index + 1, self.args
        of_theta = done // args.eval_steps if args.eval_steps else 0
        of_theta += self.theta_answered_first and args.eval_steps != 1
        return (done * args.population_size + of_theta) * len(step.rows) * args.num_generations

    def _unpaid(self, rollouts: Rollouts) -> list[str]:
        """Return the reward functions that returned None for every completion of a step."""
        none = np.isnan(rollouts.rewards) & ~rollouts.failed  # (N, B, G, F)
        return [name for f, name in enumerate(self.rewards.names) if none[..., f].all()]

    def _keeps_completions(self, step: Step) -> bool:
        return self.args.log_completions and (step.index + 1) % self.args.logging_steps == 0


def excerpts(prompts: Sequence[Prompt], rollouts: Rollouts, fitness: np.ndarray) -> list[Excerpt]:
    """Return the completions of the best, the median and the worst member for the step's first prompt.

    Args:
        prompts: of the step, (B,).
        rollouts: of the step.
        fitness: (N,); members without fitness (NaN) are left out.
    """
    order = [int(m) for m in np.argsort(-fitness, kind="stable") if not np.isnan(fitness[m])]  # NaN comes last
    chosen = [("best", 0), ("median", len(order) // 2), ("worst", len(order) - 1)] if order else []
    shown = []
    for place, index in chosen:
        member = order[index]
        texts = rollouts.groups[member].completions
        if texts is not None:
            shown.append(Excerpt(place, float(fitness[member]), prompts[0].question, texts[0][0]))
    return shown
