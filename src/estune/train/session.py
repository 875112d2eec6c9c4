"""An open training run: its directory, engine, reward workers, prompts and monitors.

`ESTrainer.train` is the training loop. Each line of the loop that touches the run is a method of `Session`.
`estune.run.directory` documents the order in which a step writes its files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from estune.config import ResolvedConfig
from estune.console import counted, say, warn
from estune.data.batches import Batches
from estune.engines import ENGINES
from estune.errors import UserError
from estune.es.fitness import fill_failures, population_fitness, weigh
from estune.es.step_control import Signal, drop_of, evidence_of, rate_factor, unit_step
from estune.es.theta import Moved, checked_moved
from estune.es.types import Prompt, num_parameters
from estune.es.update import Update
from estune.models.hub import push
from estune.monitor.monitors import Monitors
from estune.monitor.panel import Excerpt, PanelMonitor
from estune.rewards.pool import RewardPool
from estune.run import records
from estune.run.best import choose, described, evaluations_of, metric_of, ranking_of, stops_early
from estune.run.card import write_card
from estune.run.checkpoint import Best, checkpoint_path, prune
from estune.run.directory import Run
from estune.run.journal import StepRecord, step_record
from estune.train import metrics
from estune.train.callbacks import Callbacks
from estune.train.evaluation import Evaluation, HeldOut, evaluate
from estune.train.groups import Rollouts, stack, tokens_digest
from estune.train.rollouts import Evaluator, answers_of_theta
from estune.train.setup import Loaded
from estune.train.sigma_watch import SigmaWatch, ThetaAnswers
from estune.train.soundness import (
    broken_population,
    refuse_broken_theta,
    refuse_moved_theta,
    theta_is_finite,
    warn_of_inputs,
)
from estune.train.step import (
    Step,
    evaluation_sampling,
    follows_time,
    plan_step,
    progress_of,
    sampling_of,
    schedule_factors,
)

Rows = list[dict[str, Any]]
SHORT_RATE = 50.0  # a learning rate this many times below the default is worth a warning


@dataclass
class OpenRun(Loaded):
    """The parts of an open run that evolution strategies and baselines share.

    A subclass counts the steps; methods take the number of steps done as ``steps_done``.
    """

    run: Run
    evaluator: Evaluator
    accuracy_pool: RewardPool | None
    monitors: Monitors
    callbacks: Callbacks
    train_time_s: float  # seconds spent in the steps done; evaluations and saving are not counted

    def ends_after(self, steps_done: int) -> bool:
        """Return whether the run ends after ``steps_done`` steps: at a limit, or because a callback asks for it."""
        args = self.args
        is_over_time = bool(args.max_time_s and self.train_time_s >= args.max_time_s)
        return steps_done >= args.max_steps or is_over_time or self.callbacks.stops

    def is_evaluation_due(self, steps_done: int) -> bool:
        """Return whether an evaluation is due after ``steps_done`` steps and its file does not exist."""
        every = self.args.eval_steps
        due = bool(every) and (steps_done % every == 0 or self.ends_after(steps_done))
        return due and not records.evaluation_path(self.run.path, steps_done).exists()

    def is_evaluation_wanted(self, steps_done: int) -> bool:
        """Return whether a callback has asked for an evaluation after ``steps_done`` steps that does not exist."""
        if not self.callbacks.wants("evaluate"):
            return False
        if not self.eval_rows:
            self.callbacks.refuse_evaluation()
            return False
        return not records.evaluation_path(self.run.path, steps_done).exists()

    def log_record(self, record: dict[str, Any]) -> None:
        """Pass a record of `metrics.jsonl` to the monitors, and then to the callbacks."""
        self.monitors.log(record)
        self.callbacks.logged(record)

    def begin_callbacks(self, steps_done: int) -> None:
        """Tell the callbacks that training begins, after ``steps_done`` steps."""
        self.callbacks.begin(self.args, self.engine, records.read_metrics(self.run.path))
        self.callbacks.at(steps_done, self.trainer_state(steps_done)["epoch"])
        self.callbacks.call("on_train_begin")

    def answer_held_out(self, steps_done: int) -> Evaluation:
        """Evaluate theta on the held-out rows."""
        return evaluate(self.held_out(steps_done))

    def held_out(self, steps_done: int) -> HeldOut:
        """Return an evaluation of theta after ``steps_done`` steps that has not begun."""
        return HeldOut(
            self.evaluator,
            self.eval_rows,
            self.eval_prompts,
            evaluation_sampling(self.args),
            self.rewards.weights,
            self.accuracy_pool,
            batch=self.args.prompts_per_batch,
            trainer_state=self.trainer_state(steps_done),
            names=self.rewards.names,
        )

    def trainer_state(self, steps_done: int) -> dict[str, Any]:
        """Return the ``trainer_state`` that reward functions receive after ``steps_done`` steps."""
        return progress_of(self.args, steps_done, len(self.train_rows))


@dataclass(frozen=True)
class Applied:
    """The result of `Session.apply`: how far theta moved, and the clock readings before and after, in seconds."""

    moved: Moved
    started: float
    ended: float


@dataclass(frozen=True)
class Measured:
    """The result of `Session.measure`: the step's metrics that are known before theta moves."""

    metrics: dict[str, Any]
    started: float  # `Rollouts.started`


def restored_fields(args: ResolvedConfig, run: Run) -> dict[str, Any]:
    """Return the fields of a `Session` that its earlier steps determine.

    For a new run there are no earlier steps. A resume reads them from the journal and from `metrics.jsonl`.
    """
    logged = records.read_metrics(run.path)
    steps = run.journal.steps
    fitness = (record["fitness"] for record in steps)
    return {
        "signal": _restored_signal(args, steps),
        "watch": SigmaWatch.of_run(args.population_size, args.batch_size, fitness, logged),
        "first_step_scored_theta": any(record["step"] == 1 and "es/theta_fitness" in record for record in logged),
        "evaluations": evaluations_of(run.path),
    }


def _restored_signal(args: ResolvedConfig, steps: Sequence[StepRecord]) -> Signal:
    """Return the means after the journal's last step.

    Raises:
        UserError: the run began with an earlier rule of ``step_control drift``, which had no trend.
    """
    stored = steps[-1].get("signal") if steps else None
    if stored is not None and args.step_control == "drift" and "latest" not in stored:
        raise UserError("this run began with an earlier rule of step_control drift, which this estune does not have")
    return Signal(**stored) if stored is not None else Signal()


@dataclass
class Session(OpenRun):
    """The parts of an open run of evolution strategies; `estune.train.opening.open_session` makes one."""

    batches: Batches
    checksum: str  # theta's current checksum
    tokens: int  # prompt and completion tokens of the steps done
    perturb_cos: dict[str, float] = field(default_factory=dict)  # latest result of the engine's `perturb_cosine`
    perturb_cos_scale: float = math.inf  # noise scale at that measurement
    watch: SigmaWatch = field(default_factory=SigmaWatch)
    theta_joins_first_step: bool = True  # option: theta also answers the first step's rows
    signal: Signal = field(default_factory=Signal)  # of the steps done
    panel: PanelMonitor | None = None
    repository: str | None = None  # hub repository to which the finished model is uploaded
    first_step_scored_theta: bool = False  # whether theta answered the first step's rows and was scored
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # records of the run's held-out evaluations

    @property
    def ended(self) -> bool:
        """Whether the run has reached its end: a limit, early stopping, or a callback's wish."""
        return self.ends_after(self.run.steps_done)

    def ends_after(self, steps_done: int) -> bool:
        """Return whether the run ends after ``steps_done`` steps: at a limit, by a callback, or by early stopping."""
        if super().ends_after(steps_done):
            return True
        return self.args.early_stopping_patience > 0 and stops_early(self.args, self.evaluations, steps_done)

    def plan(self) -> Step:
        """Return the next step.

        If schedules depend on time or change sigma, their factors are written to `pending.jsonl` before the step's
        members are made. So all members of a step have one sigma, even if a resume has another ``max_steps``.
        """
        index, head, pending = self.run.steps_done, self.run.journal.head, self.run.pending
        self.callbacks.call("on_step_begin")
        factors = None
        if stored := pending.read_factors(head):  # of a step that was cut off
            factors, seconds = stored
            self.train_time_s = max(self.train_time_s, seconds)
        elif follows_time(self.args) or self.args.sigma_scheduler_type != "constant":
            if self.args.sigma_scheduler_type != "constant":
                pending.clear()  # members of an unknown sigma, if there are any
            factors = schedule_factors(self.args, index, self.train_time_s)
            pending.store_factors(head, factors, self.train_time_s)
        return plan_step(self.args, self.batches, index, factors)

    def announce(self, replayed: int) -> None:
        """Print the run's model, data and options; ``replayed`` is the number of steps replayed from the journal."""
        args, run, size = self.args, self.run, num_parameters(self.engine.specs)
        trained = num_parameters(spec for spec in self.engine.specs if spec.perturbed)
        share = "all" if trained == size else f"{trained / size:.1%} of"
        data = args.task or args.dataset_name or "your dataset"
        say(
            f"estune: {args.model}, {share} {size:,} parameters; {data}: {len(self.train_rows)} "
            f"training rows, {len(self.eval_rows)} held out"
        )
        control = "" if args.step_control == "none" else f"step_control {args.step_control}, "
        say(
            f"estune: N {args.population_size}, sigma {args.sigma:g}, learning_rate {args.learning_rate:g}, {control}"
            f"batch_size {args.batch_size}, seed {args.seed}, max_steps {args.max_steps}; run directory {run.path}"
        )
        if 0 < args.step_rate < args.sigma / 2 / SHORT_RATE:
            warn(
                f"learning_rate {args.step_rate:g} is 1/{args.sigma / 2 / args.step_rate:.0f} of sigma / 2, which is "
                "es's default: rates of optimizers such as AdamW do not carry over"
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
        """Generate and score every member's completions of the step's prompts: (N, B, G) rollouts.

        With several workers it also answers the held-out rows that are due, and writes their evaluation.

        Raises:
            Interrupted: the run was asked to stop; `pending.jsonl` holds the finished members.
            UserError: the logits of all members are NaN or infinite.
        """
        started = time.perf_counter()
        self._measure_rounding(step)
        rows, prompts = self._inputs(step)
        beside = self.held_out(step.index) if self.is_evaluation_due(step.index) else None
        rollouts = self.evaluator.evaluate_population(
            step.perturbations,
            rows,
            prompts,
            sampling_of(self.args, step.index),
            self.trainer_state(step.index),
            theta_checksum=self.checksum,
            members_per_batch=self.args.group_size,
            pending=self.run.pending,
            head=self.run.journal.head,
            keep_text=self._keeps_completions(step) or self.panel is not None,
            theta_joins=self.args.step_control == "drift",
            beside=beside,
        )
        # The start moves back by the seconds that a killed process spent on this step, and forward by the seconds in
        # which only the evaluation was answered.
        rollouts.started = started - rollouts.earlier_s + rollouts.beside_s
        if beside is not None:
            before = time.perf_counter()
            self._write_evaluation(beside.finish())
            rollouts.started += time.perf_counter() - before
        if rollouts.non_finite_ratio == 1.0:
            is_broken = not theta_is_finite(self.args, self.engine, self.train_prompts)
            raise UserError(broken_population(self.engine, step.index + 1, step.sigma, is_broken))
        return rollouts

    def evaluate_theta(self, step: Step, rollouts: Rollouts) -> ThetaAnswers:
        """Let theta answer the step's prompts too, in some steps: in step 1, before an evaluation, or if members agree.

        In step 1 and before an evaluation, theta's completions are also scored. With ``step_control drift`` theta has
        answered with the members in every step (`Rollouts.theta`). Theta's failed rewards are filled as if theta were
        one more member. Only ``step_control drift`` lets the update depend on theta's completions.

        Raises:
            Interrupted: the run was asked to stop.
        """
        rows, prompts = self._inputs(step)
        sampling = sampling_of(self.args, step.index)
        digests = np.array([group.digests for group in rollouts.groups])  # (N, B, G)
        is_evaluation_step = bool(self.args.eval_steps) and (step.index + 1) % self.args.eval_steps == 0
        joins = rollouts.theta is not None or (step.index == 0 and self.theta_joins_first_step)
        if not is_evaluation_step and not joins:
            if not self.watch.needs_theta(rollouts.modal_ratio):
                return ThetaAnswers()
            answers = answers_of_theta(self.engine, prompts, sampling, self.evaluator.should_stop)
            theta_digests = np.array([[tokens_digest(completion.token_ids) for completion in row] for row in answers])
            return ThetaAnswers(equal=float(np.mean(digests == theta_digests)))  # (N, B, G) == (B, G)
        if rollouts.theta is not None:
            theta = stack([rollouts.theta])
        else:
            state, keep_text = self.trainer_state(step.index), self._keeps_completions(step)
            theta = self.evaluator.evaluate_theta(rows, prompts, sampling, state, keep_text)
            rollouts.theta = theta.groups[0]
        rewards = np.concatenate([rollouts.rewards, theta.rewards])  # (N + 1, B, G, F)
        failed = np.concatenate([rollouts.failed, theta.failed])
        weights = self.rewards.weights
        weighed = weigh(fill_failures(rewards, failed, weights), weights)  # (N + 1, B, G)
        fitness = population_fitness(weighed)  # (N + 1,)
        return ThetaAnswers(
            equal=float(np.mean(digests == np.array(theta.groups[0].digests))),
            fitness=float(fitness[-1]),
            rewards=weighed[-1],
            rank=1 + int((fitness[:-1] > fitness[-1]).sum()) if is_evaluation_step else None,
            is_scored=True,
        )

    def control(
        self, step: Step, weighed: np.ndarray, fitness: np.ndarray, utilities: Sequence[float], theta: ThetaAnswers
    ) -> Step:
        """Return the step with the factor of its learning rate that its evidence allows (`estune.es.step_control`).

        Args:
            step: the step.
            weighed: weighted rewards (N, B, G).
            fitness: (N,).
            utilities: (N,).
            theta: the result of `evaluate_theta`.
        """
        args = self.args
        drop = math.nan if theta.rewards is None else drop_of(weighed, theta.rewards)
        evidence = evidence_of(weighed, args.antithetic, drop)
        self.signal = self.signal.after(evidence)
        unit = unit_step(fitness.tolist(), utilities, antithetic=args.antithetic, sigma=step.sigma)
        factor = rate_factor(args.step_control, self.signal, unit, step.learning_rate)
        expected = unit.forecast(evidence.reliability, evidence.drop)
        return replace(step, factor=factor, evidence=evidence, expected=expected)

    def measure(
        self, step: Step, rewards: np.ndarray, fitness: np.ndarray, rollouts: Rollouts, theta: ThetaAnswers
    ) -> Measured:
        """Compute the step's metrics that are known before the update, and print the warnings that follow from them.

        Args:
            step: the step.
            rewards: (N, B, G, F), failures filled.
            fitness: (N,).
            rollouts: of the members.
            theta: the result of `evaluate_theta`.
        """
        self.tokens += rollouts.tokens
        if step.index == 0:
            self.first_step_scored_theta = theta.is_scored
        record = metrics.step_metrics(rewards, self.rewards, fitness, rollouts)
        rate = step.learning_rate * step.factor
        record |= {
            "learning_rate": rate,
            "es/sigma": step.sigma,
            "num_tokens": self.tokens,
            "es/reliability": metrics.number(step.evidence.reliability),
            "es/expected_gain": metrics.number(rate * step.expected.gain),
            "es/expected_loss": metrics.number(rate * (rate * step.expected.drift)),
        }
        if self.args.antithetic:
            record["es/reliability_even"] = metrics.number(step.evidence.even)
        if self.args.step_control != "none":
            record["es/signal"] = metrics.number(self.signal.reliability)
        record |= theta.record() | self.engine.take_metrics()
        record["num_evaluations"] = self._completions_scored(step)
        self.watch.step({"step": step.index + 1, **record}, theta, self._rewards_without_value(rollouts))
        if step.index == 0:
            record |= {f"es/perturb_cos/{kind}": value for kind, value in self.perturb_cos.items()}
        if self.panel is not None:
            self.panel.members(fitness.tolist(), excerpts(self._inputs(step)[1], rollouts, fitness))
        return Measured(record, rollouts.started)

    def journal(self, step: Step, fitness: np.ndarray, rollouts: Rollouts, update: Update, measured: Measured) -> None:
        """Write the step to the journal, and wait until it is on disk; only then may theta move.

        Args:
            step: the step.
            fitness: (N,).
            rollouts: of the members.
            update: the update of theta that follows.
            measured: stored in `pending.jsonl`; if the process is killed before it logs the step, a resume logs it.

        Raises:
            UserError: an engine outside estune has changed theta by itself.
        """
        if self.args.engine not in ENGINES:
            self._refuse_moved_theta()
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
            signal=asdict(self.signal) if self.args.step_control != "none" else None,
            schedules=step.factors,
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
        moved = checked_moved(self.engine.apply(update), self.engine)
        self.checksum = moved.checksum
        self.run.refuse_diverged(moved)
        return Applied(moved, started, time.perf_counter())

    def log(self, measured: Measured, applied: Applied) -> None:
        """Pass the step's metrics to the monitors; then write the evaluation and the checkpoint that are due."""
        timing = metrics.Timing(measured.started, applied.started, applied.ended)
        self.train_time_s += timing.ended - timing.started
        self.callbacks.at(self.run.steps_done, self.trainer_state(self.run.steps_done)["epoch"])
        self.callbacks.call("on_step_end")
        moves = metrics.update_metrics(measured.metrics, applied.moved, timing)
        self._log_step(measured.metrics | moves | {"train_time_s": self.train_time_s})
        self.run.pending.clear()
        self.evaluate_and_save()

    def log_recovered_step(self, measured: dict[str, Any], moved: Moved) -> None:
        """Log the last step of the journal, which a killed process did not log.

        Args:
            measured: the metrics that `journal` stored; the sum of the times in them counts as the step's time.
            moved: the result of the step's update, which the resume has applied again.
        """
        moves = metrics.update_metrics(measured, moved, None)
        self.train_time_s += moves["step_time"]
        if self.run.steps_done == 1:
            self.first_step_scored_theta = "es/theta_fitness" in measured
            self.watch.store_theta_fitness({"step": 1, **measured})
        self._log_step(measured | moves | {"train_time_s": self.train_time_s})

    def _log_step(self, record: dict[str, Any]) -> None:
        """Log the last step's metrics every ``logging_steps`` steps, and when a callback asks for them.

        The last step of a run is always logged, and the first if its metrics hold theta_0's fitness. What follows a
        step may end the run, by early stopping or by a callback, so such a step is logged, too.
        """
        args, done = self.args, self.run.steps_done
        is_evaluated = bool(args.eval_steps) and done % args.eval_steps == 0
        is_saved = bool(args.save_steps) and done % args.save_steps == 0
        may_be_last = self.ended or bool(args.early_stopping_patience and is_evaluated)
        may_be_last = may_be_last or (len(self.callbacks) > 0 and (is_evaluated or is_saved))
        is_due = done % args.logging_steps == 0 or any(map(self.callbacks.wants, ("log", "evaluate", "save")))
        if is_due or may_be_last or (done == 1 and self.first_step_scored_theta):
            self.log_record({"step": done} | record)

    def evaluate_and_save(self) -> None:
        """Evaluate theta and save a checkpoint if they are due after the steps done and do not exist.

        A callback may also ask for them. With several workers the evaluation is left to the next step, in which workers
        that have no member's job answer the held-out rows (`evaluate_population`), unless it can end the run.
        """
        args, done = self.args, self.run.steps_done
        is_left = args.num_workers > 1 and not args.early_stopping_patience and not len(self.callbacks)
        is_due = self.is_evaluation_due(done) and not (is_left and not self.ended)
        if is_due or self.is_evaluation_wanted(done):
            self._write_evaluation(self.answer_held_out(done))
        is_scheduled = bool(args.save_steps and done) and done % args.save_steps == 0
        if (is_scheduled or (done and self.callbacks.wants("save"))) and not self.run.has_checkpoint():
            self.run.save(self.engine, final=False, asked=not is_scheduled)
            if is_scheduled:
                self.run.record_checkpoint(self.engine)
            self.callbacks.saved()
        if is_scheduled:
            prune(self.run.path, args.save_total_limit, self.run.journal.checkpoints)

    def _write_evaluation(self, evaluation: Evaluation) -> None:
        """Pass an evaluation of the present theta to the monitors, write its rows, and tell the callbacks."""
        done, record = self.run.steps_done, metrics.evaluation_record(evaluation)
        self.watch.evaluation(record)
        self.monitors.log({"step": done, **record})
        records.write_lines(records.evaluation_path(self.run.path, done), evaluation.records())
        self.evaluations.append({"step": done, **record})
        self.callbacks.logged({"step": done, **record})

    def finish(self) -> None:
        """Write the finished model to the run directory, with its card; upload it if asked to.

        With ``load_best_model_at_end`` theta first returns to the best step.

        Raises:
            UserError: theta's logits are NaN or infinite, or an engine outside estune has changed theta by itself;
                nothing is written.
        """
        refuse_broken_theta(self.args, self.engine, self.train_prompts, self.run.steps_done)
        refuse_moved_theta(self.args, self.engine, self.checksum)
        self.run.record_checkpoint(self.engine)
        best = choose(self.args, self.evaluations, self.run.steps_done)
        if best is not None and best["step"] < self.run.steps_done:
            self.run.rebuild(self.engine, best["step"])
            refuse_broken_theta(self.args, self.engine, self.train_prompts, best["step"])
        self.engine.load_theta()  # a model that the user passed in then holds theta instead of a member
        self.run.save(self.engine, final=True, best=best)
        write_card(self.run.path)  # `complete_finished_run` writes the card if the process is killed before this line
        self.run.pending.clear()
        prune(self.run.path, self.args.save_total_limit, self.run.journal.checkpoints)
        if self.run.steps_done and self.checksum == self.run.journal.steps[0]["checksum"]:
            warn(f"theta never moved: {self._why_theta_stayed()}")
        if self.panel is not None:
            self.panel.close()  # the lines below then stand under the panel
        self._say_end(best)
        say(f"estune: done; the model is in {self.run.path}")
        if best is not None:
            self.callbacks.chosen(best["step"], best["value"])
        self.callbacks.saved()
        self.callbacks.call("on_train_end")
        if self.repository is not None:
            say(f"estune: {push(self.run.path, self.repository)}")

    def _why_theta_stayed(self) -> str:
        """Return why no step of the run moved theta."""
        known = [{value for value in step["fitness"] if value is not None} for step in self.run.journal.steps]
        if not any(len(values) > 1 for values in known):
            return "in every step all members tied, or every reward failed"
        if self.args.step_control == "none":
            return "its steps were too short to change a float32"
        return (
            f"step_control {self.args.step_control} found no order of the members that prompts agree on; raise "
            "batch_size, population_size or sigma, or ask estune probe"
        )

    def _say_end(self, best: Best | None) -> None:
        """Print why the run ended early, if it did, and which step its model is; warn if no step gained anything."""
        args, done = self.args, self.run.steps_done
        if self.callbacks.stops and done < args.max_steps:
            say(f"estune: a callback ended the run after {counted(done, 'step')}")
        elif not super().ends_after(done) and stops_early(args, self.evaluations, done):
            waited = counted(ranking_of(args, self.evaluations).waited, "evaluation")
            metric = metric_of(args, self.evaluations)
            say(f"estune: stopped early after {counted(done, 'step')}: {waited} without a better {metric}")
        if best is None:
            if args.load_best_model_at_end:
                warn(f"no evaluation has {metric_of(args, self.evaluations)}: the model is that of the last step")
            return
        say(f"estune: {described(best, self.evaluations)}")
        if best["step"] == 0 and done:
            warn(f"no step is better than the base model by {best['metric']}: the model saved is the base model")

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
        self.callbacks.call("on_train_end")

    def _kept(self) -> str:
        """Return how many members of the step in hand are stored, as text; an empty string if none is."""
        stored = self.run.pending.read(self.run.journal.head)
        kept = sum(index < self.args.population_size for index in stored)
        if not kept:
            return ""
        return f", {kept} of {self.args.population_size} members of step {self.run.steps_done + 1} kept"

    def _refuse_moved_theta(self) -> None:
        """Raise UserError if an engine outside estune has changed theta; its members' answers are then deleted."""
        try:
            refuse_moved_theta(self.args, self.engine, self.checksum)
        except UserError:
            self.run.pending.clear()
            raise

    def _measure_rounding(self, step: Step) -> None:
        """Measure how much of a perturbation the compute dtype rounds away.

        It is measured in the first step of a process, and again after sigma has halved.
        """
        if step.noise.scale < self.perturb_cos_scale / 2:
            self.perturb_cos_scale = step.noise.scale
            self.perturb_cos = self.engine.perturb_cosine(step.perturbations[0])
            metrics.warn_of_coarse_weights(self.perturb_cos)

    def _inputs(self, step: Step) -> tuple[Rows, list[Prompt]]:
        """Return the rows and prompts of a step, (B,) each."""
        return [self.train_rows[row] for row in step.rows], [self.train_prompts[row] for row in step.rows]

    def _completions_scored(self, step: Step) -> int:
        """Return how many training completions have been scored up to this step, including theta's."""
        done, args = step.index + 1, self.args
        theta_steps = done // args.eval_steps if args.eval_steps else 0  # steps in which theta was scored
        theta_steps += self.first_step_scored_theta and args.eval_steps != 1
        if args.step_control == "drift":
            theta_steps = done
        return (done * args.population_size + theta_steps) * len(step.rows) * args.num_generations

    def _rewards_without_value(self, rollouts: Rollouts) -> list[str]:
        """Return the names of the reward functions that returned None for every completion of a step."""
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
    order = [int(m) for m in np.argsort(-fitness, kind="stable") if not np.isnan(fitness[m])]  # best member first
    chosen = [("best", 0), ("median", len(order) // 2), ("worst", len(order) - 1)] if order else []
    shown = []
    for place, index in chosen:
        member = order[index]
        texts = rollouts.groups[member].completions
        if texts is not None:
            shown.append(Excerpt(place, float(fitness[member]), prompts[0].question, texts[0][0]))
    return shown
