"""The checked inputs of a run, of evolution strategies or of a baseline; no model is loaded yet."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from estune.config import FIELDS, ESConfig, SizedConfig
from estune.config.hints import foreign_args
from estune.console import note, warn
from estune.data.memory import split_of
from estune.engines.base import Engine
from estune.errors import UserError
from estune.es.types import Prompt
from estune.run.best import check_metric, chooses, refuse_test_rows
from estune.run.checkpoint import BASE_DIRECTORY
from estune.run.saved_config import CONFIG_FILE, refuse_rows_from_python
from estune.tasks import Task
from estune.train import setup
from estune.train.callbacks import Callbacks, early_stopping_of
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
    callbacks: Callbacks = field(default_factory=Callbacks)
    eval_dataset: Any = None  # as the user gave it, for `BaseTrainer.evaluate`
    is_opened: bool = False  # whether `args.output_dir` holds this request's run
    finished: Path | None = None  # the run, if it was finished before: its model replaces the base
    _engine: Engine | None = field(default=None, repr=False)
    _asked: tuple[bool, bool] | None = None  # resume and overwrite, as the configuration has them

    @classmethod
    def of(
        cls,
        args: ESConfig | None,
        model: Any = None,
        reward_funcs: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Sequence[Any] | None = None,
    ) -> TrainingRequest:
        """Check a trainer's arguments (`estune.train.trainer.ESTrainer`) and return them as a request.

        Raises:
            UserError: the input is invalid; the message gives the reason in one sentence.
        """
        args = args if args is not None else ESConfig()
        if not isinstance(args, ESConfig):
            raise foreign_args(args, FIELDS)
        if callbacks is not None and not isinstance(callbacks, Sequence):
            callbacks = [callbacks]
        if callbacks:
            callbacks, stopping = early_stopping_of(callbacks)
            args = dataclasses.replace(args, **stopping)
        module = _module_of(model)
        if isinstance(model, (str, Path)):
            args = dataclasses.replace(args, model=str(model))
        if args.task is None and args.dataset_name is None and train_dataset is None:
            refuse_rows_from_python(args)
            if reward_funcs is not None or args.reward_funcs is not None:
                raise UserError("a reward without rows: give train_dataset, or dataset_name or task in ESConfig")
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
        if args.eval_steps and train_dataset is not None and eval_dataset is None:
            raise UserError("eval_steps needs an eval_dataset beside train_dataset")
        if eval_dataset is not None and not args.eval_steps:
            warn("eval_steps is 0, so the run does not use eval_dataset; trainer.evaluate() does")
        eval_rows: Rows = []
        if args.eval_steps:
            eval_rows = setup.resolve_rows(args, eval_dataset, task, "validation", rewards)[: args.eval_rows or None]
        # A model in memory has no name yet: `make_run_directory` chooses it.
        given_args = args if module is None else dataclasses.replace(args, model="auto")
        resolved = setup.resolve_config(args, len(train_rows), module)
        setup.batches_of(resolved, len(train_rows))  # raises UserError if the batch is larger than the number of rows
        return cls(
            given_args,
            resolved,
            task,
            rewards,
            train_rows,
            eval_rows,
            module,
            processing_class,
            Callbacks(callbacks or ()),
            eval_dataset,
        )

    @property
    def engine(self) -> Engine:
        """The engine; it is loaded on first use."""
        if self._engine is None and self.finished is not None:
            tuned = dataclasses.replace(self.args, model=str(self.finished), revision=None)
            self._engine = setup.load_engine(tuned, None, self.tokenizer)
        elif self._engine is None:
            self._engine = setup.load_engine(self.args, self.module, self.tokenizer)
        return self._engine

    def forget_engine(self) -> None:
        """Release the engine, so that it is loaded again; a model in memory stays, because it is the user's."""
        if self._engine is not None and self.module is None:
            self._engine.stop()
            self._engine = None

    def prompts(self, rows: Rows) -> list[Prompt]:
        """Return the prompts of rows, (rows,); this loads the engine."""
        return setup.build_prompts(self.args, self.engine, rows, self.task is not None)

    def resume(self, checkpoint: str | Path | bool | None) -> None:
        """Make the run continue the one in ``output_dir``, as transformers' ``resume_from_checkpoint`` does.

        Args:
            checkpoint: True, ``output_dir``, or a checkpoint in it; the run continues from the last step of its
                journal. None or False: the configuration decides.

        Raises:
            UserError: there is no such run, or the checkpoint is elsewhere.
        """
        if self._asked is None:
            self._asked = self.args.resume, self.args.overwrite
        if checkpoint is None or checkpoint is False:
            self._set_start(*self._asked)
            return
        if self.args.output_dir is None:
            raise UserError("resume_from_checkpoint needs output_dir in ESConfig: the directory of the run to continue")
        run_dir = Path(self.args.output_dir)
        place = run_dir if checkpoint is True else Path(checkpoint)
        if run_dir.resolve() not in (place.resolve(), *place.resolve().parents):
            raise UserError(
                f"resume_from_checkpoint {checkpoint} is not in output_dir {run_dir}: a run continues in its directory"
            )
        if not (run_dir / CONFIG_FILE).exists():
            raise UserError(f"resume_from_checkpoint: {run_dir} holds no run to continue")
        self._set_start(resume=True, overwrite=False)

    def _set_start(self, resume: bool, overwrite: bool) -> None:
        """Set how the next `train` begins: it continues the run in ``output_dir``, or deletes it first."""
        if (self.args.resume, self.args.overwrite) != (resume, overwrite):
            self.args = dataclasses.replace(self.args, resume=resume, overwrite=overwrite)
            self.given_args = dataclasses.replace(self.given_args, resume=resume, overwrite=overwrite)

    def held_out(self, eval_dataset: Any = None) -> Rows:
        """Return rows for an evaluation: ``eval_dataset``, or the trainer's, or those that the configuration names.

        Raises:
            UserError: there are no such rows, or they are invalid.
        """
        args = self.args
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if given is None and self.eval_rows:
            return self.eval_rows
        if given is None and args.task is None and args.dataset_name is None:
            raise UserError("evaluate needs an eval_dataset: rows that are not trained on")
        if isinstance(given, Mapping):
            _, given = split_of(given, _held_out_names(args), "dataset_test_split")
        rows = setup.resolve_rows(args, given, self.task, "validation", self.rewards)
        return rows[: args.eval_rows or None] if eval_dataset is None else rows

    def make_run_directory(self) -> Path:
        """Return the run directory; choose and create one if ``output_dir`` is None.

        For a model in memory, ``args.model`` becomes the directory in the run that will hold theta_0.
        """
        if self.args.output_dir is None:
            path = Path("runs") / self.args.run_name if self.args.run_name is not None else self._new_directory()
            self.args = dataclasses.replace(self.args, output_dir=str(path), run_name=path.name)
            self.given_args = dataclasses.replace(self.given_args, output_dir=str(path), run_name=path.name)
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


def _module_of(model: Any) -> Any:
    """Return a model in memory; None for a name or a directory.

    Raises:
        UserError: the model is something else.
    """
    if model is None or isinstance(model, (str, Path)):
        return None
    if not callable(getattr(model, "named_parameters", None)):
        raise UserError(
            f"model must be a name, a directory or a model in memory, not {type(model).__name__}; give options as "
            "args=ESConfig(...)"
        )
    return model


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
    names = _held_out_names(args)
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


def _held_out_names(args: ESConfig) -> list[str]:
    """Return the names by which the held-out split of a dict of datasets is looked for, the first one first."""
    is_default = args.dataset_test_split == setup.SPLIT_OPTIONS["dataset_test_split"]
    return [args.dataset_test_split, *(["validation"] if is_default else [])]


def _held_out_split(args: ESConfig, eval_dataset: Any) -> str | None:
    """Return the name of the split of a run's held-out rows; None if they have none, as rows of a task's validation."""
    if eval_dataset is not None:
        split = getattr(eval_dataset, "split", None)  # of a `datasets.Dataset`
        return None if split is None else str(split)
    return args.dataset_test_split if args.dataset_name is not None else None
