"""ESTrainer: the loop. `train` reads as the pseudo-code of the method (arXiv 2509.24372):

    theta += learning_rate / N * sum_m utilities_m * sign_m * eps(seed_m)

Everything it calls is a plain function or a small object named after what it does: what is open during a run is
`estune.train.session`, what it leaves on disk `estune.run`, who answers prompts `estune.engines`, who scores them
`estune.rewards`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

from estune.config import ESConfig
from estune.console import say, warn
from estune.data.batches import Batches
from estune.engines.base import LocalEngine
from estune.errors import UserError
from estune.es.fitness import fill_failures, shape_fitness, weigh
from estune.es.types import Interrupted, Prompt
from estune.es.update import make_update
from estune.models.hub import push
from estune.run.card import CARD_FILE, write_card
from estune.run.checkpoint import BASE_DIRECTORY
from estune.run.directory import is_finished, refuse_rows_from_python
from estune.train import setup
from estune.train.opening import hub_repository, open_session
from estune.train.session import plan_step


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
        if not isinstance(args, ESConfig):
            raise UserError(
                f"args must be an ESConfig, not {type(args).__name__}; most options have the same names there"
            )
        self._module = None if model is None or isinstance(model, (str, Path)) else model
        if isinstance(model, (str, Path)):
            args = dataclasses.replace(args, model=str(model))
        if args.task is None and args.dataset_name is None and train_dataset is None:
            refuse_rows_from_python(args)
            args = dataclasses.replace(args, task="countdown")
        args.validate_training()
        self._processing_class = processing_class
        self.task = setup.task_of(args)
        self.rewards = setup.resolve_rewards(args, reward_funcs, self.task)
        self.train_rows = setup.resolve_rows(args, train_dataset, self.task, "train", self.rewards)
        self.eval_rows: list[dict[str, Any]] = []
        if eval_dataset is not None and not args.eval_steps:
            warn("eval_dataset is given, but eval_steps is 0: no evaluation is made of it")
        if args.eval_steps:
            if train_dataset is not None and eval_dataset is None:
                raise UserError("eval_steps needs an eval_dataset beside train_dataset")
            rows = setup.resolve_rows(args, eval_dataset, self.task, "validation", self.rewards)
            self.eval_rows = rows[: args.eval_rows or None]
        # What was given, before `auto` values are resolved; a module is named by its run.
        self.given = dataclasses.replace(args, model="auto") if self.has_module else args
        self.args = setup.resolve_config(args, len(self.train_rows), self._module)
        Batches(len(self.train_rows), int(self.args.batch_size), self.args.seed)  # refuses a batch above the rows
        self._engine: LocalEngine | None = None
        self.stopped = False  # whether the last `train` was asked to stop before its end
        self.asks_theta_first = True  # let theta answer the first step's rows, too: a baseline for warnings

    def train(self) -> Path:
        """Run (or resume) to ``max_steps``; return the run directory, which then holds the model.

        A run that is asked to stop (SIGINT, SIGTERM, SIGHUP) saves a checkpoint and returns too.
        """
        self.args = self._placed(self.args)
        run_dir = Path(self.args.output_dir or "")
        self.stopped = False
        if self.args.resume and is_finished(run_dir, self.args, self.given):
            say(f"estune: {run_dir} is finished ({self.args.max_steps} steps); nothing to do")
            if not (run_dir / CARD_FILE).exists():  # killed between the last checkpoint and the card
                write_card(run_dir)
            if self.args.push_to_hub:
                say(f"estune: {push(run_dir, hub_repository(self.args))}")
            return run_dir
        with open_session(self) as session:
            args, weights = session.args, self.rewards.weights
            try:
                session.after_step()  # what a killed run had not come to
                while not session.ended:
                    step = plan_step(args, session.batches, session.run.steps_done)  # rows (B,), members (N,)
                    rollouts = session.evaluate_population(step)  # rewards (N, B, G, F)
                    theta = session.ask_theta(step, rollouts)  # where it is due; the update does not depend on it
                    rewards = fill_failures(rollouts.rewards, rollouts.failed, weights)  # (N, B, G, F)
                    fitness, utilities = shape_fitness(weigh(rewards, weights), args.fitness_shaping)  # (N,), (N,)
                    update = make_update(
                        step.members,
                        utilities,
                        step.learning_rate,
                        weight_decay=args.weight_decay,
                        anchored=args.weight_decay_anchor == "base",
                        distribution=args.noise_distribution,
                        rank=step.rank,
                    )
                    session.journal_step(step, rewards, fitness, rollouts, update, theta)  # on disk before theta moves
                    session.move(update)
                    session.after_step()
                session.finish()
            except Interrupted:
                self.stopped = True
                session.save_interrupted()
        return run_dir

    @property
    def has_module(self) -> bool:
        """Say whether the model was given as a module rather than by name."""
        return self._module is not None

    @property
    def engine(self) -> LocalEngine:
        """The engine, loaded on first use."""
        if self._engine is None:
            self._engine = setup.load_engine(self.args, self._module, self._processing_class)
        return self._engine

    def save_model(self, output_dir: str | Path) -> None:
        """Write theta as a Hugging Face model, cast once to the compute dtype."""
        self.engine.save(Path(output_dir), float32=False)

    def prepare(self) -> list[Prompt]:
        """Load the engine and tokenise the training rows: everything that can fail before a run is written."""
        return setup.build_prompts(self.args, self.engine, self.train_rows, self.task is not None)

    def _placed(self, args: ESConfig) -> ESConfig:
        """Return the configuration with its run directory, where a module's weights at the start are kept, too."""
        if args.output_dir is None:
            path = Path("runs") / args.run_name if args.run_name is not None else self._new_directory(args)
            args = dataclasses.replace(args, output_dir=str(path), run_name=path.name)
        if self.has_module:
            args = dataclasses.replace(args, model=str(Path(str(args.output_dir)) / BASE_DIRECTORY))
        return args

    def _new_directory(self, args: ESConfig) -> Path:
        """Make a directory named task-model-date-time that no other run has, with the method's name if it is not es."""
        source = args.task or Path(args.dataset_name or "data").stem
        model = type(self._module).__name__ if self.has_module else Path(args.model).name
        method = "" if args.method == "es" else f"-{args.method}"
        name = f"{source}-{model}{method}-{time.strftime('%Y%m%d-%H%M%S')}"
        for number in itertools.count(1):
            path = Path("runs") / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):  # a run that started in the same second
                path.mkdir(parents=True)
                return path
        raise AssertionError("counting does not end")
