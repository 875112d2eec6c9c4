"""The checked inputs of a run, of evolution strategies or of a baseline; no model is loaded yet."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estune.config import ESConfig, SizedConfig
from estune.console import note, warn
from estune.data.memory import split_of
from estune.engines.base import Engine
from estune.errors import UserError
from estune.es.types import Prompt
from estune.run.best import check_metric, chooses, refuse_test_rows
from estune.run.checkpoint import BASE_DIRECTORY
from estune.run.saved_config import refuse_rows_from_python
from estune.tasks import Task
from estune.train import setup
from estune.train.setup import Rewards

Rows = list[dict[str, Any]]


@dataclass
class TrainingRequest:
    """What a trainer was asked to do: a configuration, rewards and rows. The engine is loaded on first use."""

    given_args: ESConfig  # as the user gave it; a resume takes the stored run's value for every `auto` in it
    args: SizedConfig  # a `ResolvedConfig` once the run is open
    task: Task | None
    rewards: Rewards
    train_rows: Rows
    eval_rows: Rows
    module: Any = None  # a model in memory; None if ``args.model`` names the model
    tokenizer: Any = None  # replaces the model's own tokenizer
    _engine: Engine | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        args: ESConfig | None,
        model: Any = None,
        reward_funcs: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
    ) -> TrainingRequest:
        """Check a trainer's arguments (`estune.train.trainer.ESTrainer`) and return them as a request.

        Raises:
            UserError: the input is invalid; the message gives the reason in one sentence.
        """
        args = args if args is not None else ESConfig()
        if not isinstance(args, ESConfig):
            raise UserError(
                f"args must be an ESConfig, not {type(args).__name__}; most options have the same names in ESConfig"
            )
        module = None if model is None or isinstance(model, (str, Path)) else model
        if isinstance(model, (str, Path)):
            args = dataclasses.replace(args, model=str(model))
        if args.task is None and args.dataset_name is None and train_dataset is None:
            refuse_rows_from_python(args)
            args = dataclasses.replace(args, task="countdown")
        args.validate_training()
        task = setup.task_of(args)
        rewards = setup.resolve_rewards(args, reward_funcs, task)
        train_dataset, eval_dataset, held_out_split = _chosen_splits(args, train_dataset, eval_dataset)
        train_rows = setup.resolve_rows(args, train_dataset, task, "train", rewards)
        if chooses(args):
            check_metric(args, rewards.accuracy is not None)
            refuse_test_rows(held_out_split)
            if not args.load_best_model_at_end:
                warn("early stopping without load_best_model_at_end: the run's model will be that of its last step")
        eval_rows: Rows = []
        if eval_dataset is not None and not args.eval_steps:
            warn("eval_dataset has no effect, because eval_steps is 0: set eval_steps to evaluate")
        if args.eval_steps:
            if train_dataset is not None and eval_dataset is None:
                raise UserError("eval_steps needs an eval_dataset beside train_dataset")
            held_out = setup.resolve_rows(args, eval_dataset, task, "validation", rewards)
            eval_rows = held_out[: args.eval_rows or None]
        # A model in memory has no name yet: `make_run_directory` chooses it.
        given_args = args if module is None else dataclasses.replace(args, model="auto")
        resolved = setup.resolve_config(args, len(train_rows), module)
        setup.batches_of(resolved, len(train_rows))  # raises UserError if the batch is larger than the number of rows
        return cls(given_args, resolved, task, rewards, train_rows, eval_rows, module, processing_class)

    @property
    def engine(self) -> Engine:
        """The engine; it is loaded on first use."""
        if self._engine is None:
            self._engine = setup.load_engine(self.args, self.module, self.tokenizer)
        return self._engine

    def prompts(self, rows: Rows) -> list[Prompt]:
        """Return the prompts of rows, (rows,); this loads the engine."""
        return setup.build_prompts(self.args, self.engine, rows, self.task is not None)

    def make_run_directory(self) -> Path:
        """Return the run directory; choose and create one if ``output_dir`` is None.

        For a model in memory, ``args.model`` becomes the directory in the run that will hold theta_0.
        """
        if self.args.output_dir is None:
            path = Path("runs") / self.args.run_name if self.args.run_name is not None else self._new_directory()
            self.args = dataclasses.replace(self.args, output_dir=str(path), run_name=path.name)
        if self.module is not None:
            self.args = dataclasses.replace(self.args, model=str(Path(str(self.args.output_dir)) / BASE_DIRECTORY))
        return Path(str(self.args.output_dir))

    def _new_directory(self) -> Path:
        """Create a new directory below `runs`, named task-model-method-date-time; the name omits the method `es`."""
        args = self.args
        source = args.task or Path(args.dataset_name or "data").stem
        model = Path(args.model).name if self.module is None else type(self.module).__name__
        method = "" if args.method == "es" else f"-{args.method}"
        name = f"{source}-{model}{method}-{time.strftime('%Y%m%d-%H%M%S')}"
        for number in itertools.count(1):
            path = Path("runs") / (name if number == 1 else f"{name}-{number}")
            with contextlib.suppress(FileExistsError):  # a run that started in the same second has this name
                path.mkdir(parents=True)
                return path
        raise AssertionError("counting does not end")


def _chosen_splits(args: ESConfig, train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any, str | None]:
    """Return a run's two datasets from Python, and the name of the held-out split or None.

    Of a dict of datasets these are the split ``dataset_train_split``, and ``dataset_test_split`` or else
    ``validation``. If the run evaluates and has no ``eval_dataset``, a dict of training splits gives both.

    Raises:
        UserError: a dict lacks the split, one split would be both trained on and held out, or an option has no effect.
    """
    has_splits = isinstance(train_dataset, Mapping)
    for option, dataset in (("dataset_train_split", train_dataset), ("dataset_test_split", eval_dataset)):
        is_idle = args.dataset_name is None and not isinstance(dataset, Mapping) and not has_splits and not args.resume
        if dataset is not None and is_idle and getattr(args, option) != setup.SPLIT_OPTIONS[option]:
            raise UserError(f"{option} needs dataset_name, or a dict of datasets")
    is_default = args.dataset_test_split == setup.SPLIT_OPTIONS["dataset_test_split"]
    names = [args.dataset_test_split, *(["validation"] if is_default else [])]
    if has_splits:
        if args.eval_steps and eval_dataset is None:
            if args.dataset_test_split == args.dataset_train_split:
                raise UserError(f"the split {args.dataset_train_split} would be both trained on and held out")
            eval_dataset, names = train_dataset, [name for name in names if name != args.dataset_train_split]
        _, train_dataset = split_of(train_dataset, [args.dataset_train_split], "dataset_train_split")
    if not isinstance(eval_dataset, Mapping) or not args.eval_steps:
        return train_dataset, eval_dataset, _held_out_split(args, eval_dataset)
    name, eval_dataset = split_of(eval_dataset, names, "dataset_test_split")
    note(f"the held-out rows are the split {name}")
    return train_dataset, eval_dataset, name


def _held_out_split(args: ESConfig, eval_dataset: Any) -> str | None:
    """Return the name of the split of a run's held-out rows; None if they have none, as rows of a task's validation."""
    if eval_dataset is not None:
        split = getattr(eval_dataset, "split", None)  # of a `datasets.Dataset`
        return None if split is None else str(split)
    return args.dataset_test_split if args.dataset_name is not None else None


class BaseTrainer:
    """The constructor and properties that the trainers of all methods share; see `estune.train.trainer.ESTrainer`."""

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: ESConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
    ) -> None:
        self.request = TrainingRequest.of(args, model, reward_funcs, train_dataset, eval_dataset, processing_class)
        self.stopped = False  # whether a signal stopped the last `train` early

    def train(self) -> Path:
        """Train (or resume) until ``max_steps``, write the model, and return the run directory."""
        raise NotImplementedError

    @property
    def args(self) -> SizedConfig:
        """The configuration; a `ResolvedConfig` once a run has been opened."""
        return self.request.args

    @property
    def engine(self) -> Engine:
        """The engine; it is loaded on first use."""
        return self.request.engine

    @property
    def train_rows(self) -> list[dict[str, Any]]:
        """The training rows."""
        return self.request.train_rows

    @property
    def eval_rows(self) -> list[dict[str, Any]]:
        """The held-out rows; empty without ``eval_steps``."""
        return self.request.eval_rows

    def save_model(self, output_dir: str | Path) -> None:
        """Write theta to a directory as a Hugging Face model in the compute dtype."""
        self.engine.save(Path(output_dir), float32=False)

    def prepare(self) -> list[Prompt]:
        """Load the engine and return the training rows' prompts, without writing a run.

        Raises:
            UserError: the model does not load, or a prompt does not fit its context.
        """
        return self.request.prompts(self.request.train_rows)
