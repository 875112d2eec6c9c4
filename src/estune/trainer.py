"""ESTrainer: the loop. `train` reads as the pseudo-code of the method (arXiv 2509.24372):

    theta += learning_rate / N * sum_m utilities_m * sign_m * eps(seed_m)

Everything it calls is a plain function or a small object named after what it does; what a run leaves on disk is
`estune.run`, who answers prompts is `estune.engines`, who scores them `estune.rewards`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from estune import inputs, metrics
from estune.checkpoint import BASE_DIRECTORY, anchor_reader, checkpoint_path, prune, write_model
from estune.config import ESConfig
from estune.data import Batches
from estune.engines.base import Engine, Interrupted, Perturbation, Prompt, Sampling
from estune.errors import UserError
from estune.evaluation import Evaluation, evaluate
from estune.fitness import fill_failures, shape_fitness, weigh
from estune.journal import step_record
from estune.master import Moved
from estune.monitors import ConsoleMonitor, JsonlMonitor, Monitor, Monitors, PlotMonitor
from estune.noise import perturbation_scale
from estune.optimizer import make_update, scheduled
from estune.population import Member, members_for_step
from estune.rewards import INLINE_WARNING, RewardPool
from estune.rollouts import Evaluator, Rollouts
from estune.run import Run, is_finished, open_run
from estune.signals import StopRequest


class ESTrainer:
    """Fine-tunes all parameters of a language model with evolution strategies.

    All arguments are keywords, as in TRL; what is not given comes from ``args``.

    Args:
        model: a directory, a hub id, ``tiny``, or an ``AutoModelForCausalLM`` in memory.
        reward_funcs: one TRL reward function or a list; strings name ``package.module:function``.
        args: the configuration.
        train_dataset: rows with a ``prompt`` column: a list of dicts or a ``datasets.Dataset``.
        eval_dataset: held-out rows for ``eval_steps``.
        processing_class: the tokenizer, where ``model`` is a module.

    Raises:
        UserError: the input cannot work; one sentence says why.
    """

    def __init__(
        self,
        *,
        model: Any = None,
        reward_funcs: Any = None,
        args: ESConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
    ) -> None:
        args = args if args is not None else ESConfig()
        self._module = None if model is None or isinstance(model, (str, Path)) else model
        if isinstance(model, (str, Path)):
            args = dataclasses.replace(args, model=str(model))
        if args.task is None and args.dataset_name is None and train_dataset is None:
            args = dataclasses.replace(args, task="countdown")
        self._processing_class = processing_class
        self.task = inputs.task_of(args)
        self.rewards = inputs.resolve_rewards(args, reward_funcs, self.task)
        self.train_rows = inputs.resolve_rows(args, train_dataset, self.task, "train", self.rewards)
        self.eval_rows: list[dict[str, Any]] = []
        if args.eval_steps:
            if train_dataset is not None and eval_dataset is None:
                raise UserError("eval_steps needs an eval_dataset beside train_dataset")
            rows = inputs.resolve_rows(args, eval_dataset, self.task, "validation", self.rewards)
            self.eval_rows = rows[: args.eval_rows or None]
        self._given = args if self._module is None else dataclasses.replace(args, model="auto")  # named by its run
        self.args = inputs.resolve_config(args, len(self.train_rows))
        self.batches = Batches(len(self.train_rows), int(self.args.batch_size), self.args.seed)
        self._engine: Engine | None = None
        self._perturb_cos: dict[str, float] = {}

    # The loop -------------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Run (or resume) to ``max_steps``; return the run directory, which then holds the model.

        A run that is asked to stop (SIGINT, SIGTERM) saves a checkpoint and returns too.
        """
        args = self._with_output_dir(self.args)
        if self._module is not None:
            args = dataclasses.replace(args, model=str(Path(args.output_dir or "") / BASE_DIRECTORY))
        self.args = args
        if args.resume and is_finished(Path(args.output_dir or ""), args, self._given):
            print(f"estune: {args.output_dir} is finished ({args.max_steps} steps); nothing to do")
            return Path(args.output_dir or "")
        with ExitStack() as stack:
            run = self._open(stack)
            args = self.args
            try:
                self._after_step(run)
                for step in range(run.steps_done, args.max_steps):
                    started = time.perf_counter()
                    rows = self.batches.rows_for_step(step)  # (B,)
                    members = members_for_step(args.seed, step, args.population_size, args.antithetic)  # (N,)
                    sigma, learning_rate = self._schedule(step)
                    scale = perturbation_scale(sigma, args.noise_distribution)
                    rollouts = self._evaluate_population(run, step, rows, members, scale)
                    rewards = fill_failures(rollouts.rewards, rollouts.failed, self.rewards.weights)  # (N, B, G, F)
                    weighed = weigh(rewards, self.rewards.weights)  # (N, B, G)
                    fitness, utilities = shape_fitness(weighed, args.fitness_shaping)  # (N,), (N,)
                    update = make_update(
                        members, utilities, learning_rate,
                        weight_decay=args.weight_decay, anchored=args.weight_decay_anchor == "base",
                        distribution=args.noise_distribution,
                    )  # fmt: skip
                    theta_rank = self._theta_rank(step, rows, fitness)
                    record = step_record(
                        step, rows, fitness.tolist(), scale, update, self._checksum,
                        failures=int(rollouts.failed.sum()), tokens=rollouts.tokens,
                    )  # fmt: skip
                    measured = metrics.step_metrics(rewards, self.rewards, fitness, rollouts)
                    measured |= {"learning_rate": learning_rate, "es/sigma": sigma} | theta_rank
                    self._note_step(run, step, measured, rollouts)
                    run.journal.append_step(record)  # on disk before theta moves
                    update_started = time.perf_counter()
                    moved = self._move(run, update)
                    timing = metrics.Timing(started, update_started, time.perf_counter())
                    self._log_step(run, measured, moved, timing)
                    run.pending.clear()
                    self._after_step(run)
                self._finish(run)
            except Interrupted:
                self._save_interrupted(run)
        return run.path

    # What the loop is made of -----------------------------------------------------------------------------------------

    def _evaluate_population(
        self, run: Run, step: int, rows: list[int], members: list[Member], scale: float
    ) -> Rollouts:
        """Let every member answer the step's rows and score the answers: (N, B, G) rollouts."""
        if not self._perturb_cos:
            perturbation = Perturbation(members[0], scale, self.args.noise_distribution)
            self._perturb_cos = self.engine.perturb_cosine(perturbation)
            metrics.warn_of_coarse_weights(self._perturb_cos)
        return self._evaluator.population(
            members,
            scale,
            self.args.noise_distribution,
            [self.train_rows[row] for row in rows],
            [self._prompts[row] for row in rows],
            self._sampling(step),
            self._trainer_state(step),
            pending=run.pending,
            head=run.journal.head,
            keep_text=self.args.log_completions and (step + 1) % self.args.logging_steps == 0,
        )

    def _theta_rank(self, step: int, rows: list[int], fitness: Any) -> dict[str, float]:
        """At evaluation steps, evaluate theta itself on the step's rows: its rank among N + 1, 1 for the best."""
        if not self.args.eval_steps or (step + 1) % self.args.eval_steps:
            return {}
        own = self._evaluator.theta(
            [self.train_rows[row] for row in rows],
            [self._prompts[row] for row in rows],
            self._sampling(step),
            self._trainer_state(step),
        )
        value = metrics.mean_reward(own, self.rewards.weights)
        return {"es/theta_fitness": value, "es/theta_rank": 1 + int((fitness > value).sum())}

    def _move(self, run: Run, update: Any) -> Moved:
        """Apply the journalled update to theta."""
        moved = self.engine.master.update(update, run.anchor)
        self.engine.master_changed()
        self._checksum = moved.checksum
        return moved

    def _after_step(self, run: Run) -> None:
        """Do what is due after ``run.steps_done`` steps and was not done yet: held-out evaluation, checkpoint."""
        args, done = self.args, run.steps_done
        if args.eval_steps and (done % args.eval_steps == 0 or done == args.max_steps):
            path = run.path / "eval" / f"step_{done:05d}.jsonl"
            if not path.exists():
                evaluation = self._evaluate_held_out(done)
                self._monitors.log({"step": done, **metrics.evaluation_record(evaluation)})
                metrics.write_rows(path, evaluation)
        if args.save_steps and done and done % args.save_steps == 0:
            if not run.has_checkpoint():
                run.save(self.engine, final=False)
                run.record_checkpoint(self.engine)
            prune(run.path, args.save_total_limit)

    def _evaluate_held_out(self, done: int) -> Evaluation:
        prompts = self._eval_prompts
        return evaluate(
            self._evaluator, self.eval_rows, prompts, self._sampling(0), self.rewards.weights, self._accuracy_pool,
            batch=int(self.args.prompts_per_batch), trainer_state=self._trainer_state(done),
        )  # fmt: skip

    def _finish(self, run: Run) -> None:
        """Write the finished model to the run directory's root."""
        self.engine.load_theta()
        run.save(self.engine, final=True)
        run.record_checkpoint(self.engine)
        run.pending.clear()
        print(f"estune: done; the model is in {run.path}", flush=True)

    def _save_interrupted(self, run: Run) -> None:
        if run.steps_done and not checkpoint_path(run.path, run.steps_done).exists():
            run.save(self.engine, final=False)
        print(f"estune: stopped after {run.steps_done} steps; go on with --resume --output_dir {run.path}", flush=True)

    def _note_step(self, run: Run, step: int, measured: dict[str, Any], rollouts: Rollouts) -> None:
        """Keep what a kill right behind the step line would lose: its metrics, and its completions."""
        self._tokens += rollouts.tokens
        measured["num_tokens"] = self._tokens
        if step == 0:
            measured |= {f"es/perturb_cos/{kind}": value for kind, value in self._perturb_cos.items()}
        run.pending.note(run.journal.head, measured)
        if self.args.log_completions and (step + 1) % self.args.logging_steps == 0:
            rows = [self._prompts[row] for row in self.batches.rows_for_step(step)]
            metrics.write_completions(run.path / "completions" / f"step_{step + 1:05d}.jsonl", rollouts, rows)

    def _log_step(self, run: Run, measured: dict[str, Any], moved: Moved, timing: metrics.Timing | None) -> None:
        done = run.steps_done
        if done % self.args.logging_steps == 0 or done == self.args.max_steps:
            self._monitors.log({"step": done} | measured | metrics.update_metrics(measured, moved, timing))

    def _schedule(self, step: int) -> tuple[float, float]:
        """Return sigma and the learning rate of a step."""
        args = self.args
        sigma = args.sigma * scheduled(args.sigma_scheduler_type, step, args.max_steps)
        factor = scheduled(args.lr_scheduler_type, step, args.max_steps, args.warmup_steps)
        return sigma, args.effective_learning_rate * factor

    def _sampling(self, step: int) -> Sampling:
        return inputs.sampling(self.args, step)

    def _trainer_state(self, step: int) -> dict[str, Any]:
        epoch = step * len(self.batches.rows_for_step(0)) / len(self.train_rows)
        return {"global_step": step, "max_steps": self.args.max_steps, "epoch": epoch}

    # Opening ----------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine, loaded on first use."""
        if self._engine is None:
            self._engine = inputs.load_engine(self.args, self._module, self._processing_class)
        return self._engine

    def save_model(self, output_dir: str | Path) -> None:
        """Write theta as a Hugging Face model, cast once to the compute dtype."""
        write_model(Path(output_dir), self.engine, float32=False)

    def prepare(self) -> list[Prompt]:
        """Load the engine and tokenise the training rows: everything that can fail before a run is written."""
        return inputs.build_prompts(self.args, self.engine, self.train_rows, self.task is not None)

    def _with_output_dir(self, args: ESConfig) -> ESConfig:
        if args.output_dir is not None:
            return args
        if args.run_name is not None:
            return dataclasses.replace(args, output_dir=str(Path("runs") / args.run_name))
        source = args.task or Path(args.dataset_name or "data").stem
        model = args.model if self._module is None else type(self._module).__name__
        name = f"{source}-{Path(model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for number in itertools.count(1):
            path = Path("runs") / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):  # a run that started in the same second
                path.mkdir(parents=True)
                break
        return dataclasses.replace(args, output_dir=str(path), run_name=path.name)

    def _open(self, stack: ExitStack) -> Run:
        """Open the directory, the reward workers, and then the engine."""
        run = open_run(self.args, self._given)
        stack.callback(run.close)
        self.args = args = run.args
        self.batches = Batches(len(self.train_rows), int(args.batch_size), args.seed)
        stop = stack.enter_context(StopRequest())
        pool = self._pool(self.rewards.funcs, self.rewards.names, int(args.reward_workers))
        stack.callback(pool.close)
        self._accuracy_pool = None
        if self.rewards.accuracy is not None and self.eval_rows:
            self._accuracy_pool = self._pool([self.rewards.accuracy], ["accuracy"], 1)
            stack.callback(self._accuracy_pool.close)
        if args.reward_isolation == "inline":
            print(f"estune: {INLINE_WARNING}", file=sys.stderr, flush=True)
        self._prompts = self.prepare()
        self._eval_prompts = inputs.build_prompts(args, self.engine, self.eval_rows, self.task is not None)
        self._evaluator = Evaluator(self.engine, pool, args.response_prefix, stop.requested)
        if run.is_new:
            run.clear()  # only now, when all that the user gave has been found to work
        self._prepare_base(run)
        reproducible = None
        if run.is_new:
            reproducible = self.engine.check_reproducible(self._prompts[:2], self._sampling(0))
        names = {"reward_funcs": self.rewards.names, "reward_weights": self.rewards.weights}
        run.begin(self.engine, reproducible, names)
        replayed, last_move = run.recover(self.engine)
        self._checksum = self.engine.master.checksum()
        self._tokens = run.tokens_before()
        self._monitors = self._make_monitors(run)
        stack.callback(self._monitors.close)
        metrics.announce(self, run, replayed)
        unlogged = run.unlogged_step()
        if unlogged is not None and last_move is not None:
            self._log_step(run, unlogged, last_move, None)
        return run

    def _pool(self, funcs: list[Any], names: list[str], workers: int) -> RewardPool:
        return RewardPool(
            funcs, names, timeout_s=self.args.reward_timeout_s, workers=workers, isolation=self.args.reward_isolation
        )

    def _prepare_base(self, run: Run) -> None:
        """Keep theta_0 in the run where it has no files of its own, and open it for anchored decay."""
        anchored = self.args.weight_decay_anchor == "base"
        source = inputs.local_directory(self.args.model) if self._module is None else None
        anchor = anchor_reader(source, self.engine.master.specs) if source and anchored else None
        if self._module is not None or (anchored and anchor is None):
            own = run.path / BASE_DIRECTORY
            if run.is_new:
                write_model(own, self.engine, float32=True)
            anchor = anchor_reader(own, self.engine.master.specs)
        run.anchor = anchor if anchored else None

    def _make_monitors(self, run: Run) -> Monitors:
        optional: list[Monitor] = [ConsoleMonitor(self.args.max_steps, run.steps_done)]
        if "plot" in self.args.report_to:
            optional.append(PlotMonitor(run.path))
        return Monitors([JsonlMonitor(run.path / "metrics.jsonl")], optional)
