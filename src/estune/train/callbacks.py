"""Callbacks of a run: objects with the events of `transformers.TrainerCallback`.

A callback reads the configuration, the progress and the model. Through its `TrainerControl` it asks for a record, an
evaluation, a checkpoint, or the end of the run. It changes no step: members, rewards and updates do not depend on it. A
run ends with an error if a callback has changed theta or moved the weights to other memory.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from estune.config import ESConfig
from estune.console import warn
from estune.engines.base import Engine
from estune.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

EVENTS = ("on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_save",
          "on_train_end")  # fmt: skip
WITH_MODEL = ("on_train_begin", "on_step_end", "on_evaluate", "on_save", "on_train_end")
Record = dict[str, Any]


def early_stopping_of(callbacks: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the callbacks without transformers' `EarlyStoppingCallback`, and the options that replace it.

    Early stopping is an option of a run, so that a resume continues it.
    """
    from transformers import EarlyStoppingCallback

    others: list[Any] = []
    options: dict[str, Any] = {}
    for given in callbacks:
        callback = given() if given is EarlyStoppingCallback else given
        if type(callback) is EarlyStoppingCallback:  # a subclass has rules of its own
            options = {
                "early_stopping_patience": callback.early_stopping_patience,
                "early_stopping_threshold": float(callback.early_stopping_threshold or 0.0),
            }
        else:
            others.append(callback)
    return others, options


class Callbacks:
    """The callbacks of a trainer, in the order in which they are called, and the progress that they see.

    Args:
        callbacks: instances or classes of `transformers.TrainerCallback`.

    Raises:
        UserError: an object is not a callback.
    """

    def __init__(self, callbacks: Sequence[Any] = ()) -> None:
        self._callbacks: list[Any] = []
        self._control: TrainerControl | None = None
        self._state: TrainerState | None = None
        self._args: ESConfig | None = None
        self._engine: Engine | None = None
        self._refused_evaluation = False
        for callback in callbacks:
            self.add(callback)

    def __len__(self) -> int:
        return len(self._callbacks)

    def add(self, callback: Any) -> None:
        """Add a callback, an instance or a class.

        Raises:
            UserError: the object is not a callback.
        """
        from transformers import EarlyStoppingCallback, TrainerCallback

        one = callback() if isinstance(callback, type) else callback
        if type(one) is EarlyStoppingCallback:
            raise UserError(
                "early stopping is an option of the run: set early_stopping_patience in ESConfig, or give "
                "EarlyStoppingCallback to the trainer's constructor"
            )
        if not isinstance(one, TrainerCallback):
            raise UserError(f"a callback must be a transformers.TrainerCallback, not {type(one).__name__}")
        inherited = (name for name in vars(TrainerCallback) if name.startswith("on_") and name not in EVENTS)
        if silent := [name for name in inherited if _overrides(one, name)]:
            warn(
                f"{type(one).__name__}: {', '.join(silent)} will not be called; a run has the events "
                f"{', '.join(EVENTS)}"
            )
        self._callbacks.append(one)

    def pop(self, callback: Any) -> Any:
        """Remove a callback, or the first of a class, and return it; None if there is none."""
        for one in self._callbacks:
            if (isinstance(callback, type) and isinstance(one, callback)) or one is callback:
                self._callbacks.remove(one)
                return one
        return None

    def reset(self) -> None:
        """Forget the progress and the wishes of an earlier run."""
        self._control = self._state = None

    def begin(self, args: ESConfig, engine: Engine, records: Sequence[Record]) -> None:
        """Prepare for the events of a run.

        Args:
            args: the run's configuration, which callbacks receive.
            engine: holds theta.
            records: the lines of `metrics.jsonl` so far.
        """
        if not self._callbacks:
            return
        from transformers import TrainerControl

        self._args, self._engine = copy.deepcopy(args), engine  # the lists in it are theirs, not the run's
        self._control, self._state = TrainerControl(), state_of(args, records)

    @property
    def stops(self) -> bool:
        """Whether a callback has asked for the end of the run."""
        return self._control is not None and bool(self._control.should_training_stop)

    def wants(self, what: str) -> bool:
        """Return whether a callback has asked for a ``log``, an ``evaluate`` or a ``save`` since the step began."""
        return self._control is not None and bool(getattr(self._control, f"should_{what}"))

    def refuse_evaluation(self) -> None:
        """Warn once that an evaluation a callback asked for cannot be made."""
        if not self._refused_evaluation:
            self._refused_evaluation = True
            warn("a callback asks for an evaluation, and the run has no held-out rows: set eval_steps")

    def at(self, steps_done: int, epoch: float) -> None:
        """Record how many steps and epochs are done."""
        if self._state is not None:
            self._state.global_step, self._state.epoch = steps_done, epoch

    def chosen(self, step: int, value: float) -> None:
        """Record the best step and the value of its metric."""
        if self._state is not None:
            self._state.best_global_step, self._state.best_metric = step, value

    def call(self, event: str, **values: Any) -> None:
        """Call an event of all callbacks; an error of a callback propagates.

        Raises:
            UserError: a callback has changed theta.
        """
        if self._control is None:
            return
        assert self._engine is not None
        if event == "on_step_begin":
            self._control.should_log = self._control.should_evaluate = self._control.should_save = False
        called = [callback for callback in self._callbacks if _overrides(callback, event)]
        given = {**values, "model": None, "processing_class": self._engine.assets.tokenizer}
        if called and event in WITH_MODEL:
            checksum = self._engine.theta_checksum
            given["model"] = model_of(self._engine)
        memory = _memory_of(given["model"])
        for callback in called:
            answer = getattr(callback, event)(self._args, self._state, self._control, **given)
            if answer is not None:
                self._control = answer
        if called and hasattr(self._engine, "forget"):
            self._engine.forget()  # a callback may have written into the model's memory
        if given["model"] is not None and (self._engine.checksum() != checksum or _memory_of(given["model"]) != memory):
            raise UserError(
                f"a callback changed the model's weights in {event}: theta moves by journalled updates alone. "
                "Resume the run without that callback"
            )

    def logged(self, record: Record) -> None:
        """Call `on_log` with a record of `metrics.jsonl`, and `on_evaluate` if it is that of an evaluation."""
        if self._state is None:
            return
        assert self._control is not None
        record = {**record, "epoch": self._state.epoch}
        self._state.log_history.append(record)
        self._control.should_log = False
        values = {name: value for name, value in record.items() if name != "step"}
        self.call("on_log", logs=values)
        if "eval_reward" in record:
            self._control.should_evaluate = False
            self.call("on_evaluate", metrics=dict(values))

    def saved(self) -> None:
        """Call `on_save`."""
        if self._control is not None:
            self._control.should_save = False
        self.call("on_save")


def model_of(engine: Engine) -> Any:
    """Return the engine's model with theta in it; None if no model of transformers is in this process."""
    if not hasattr(engine, "forget") or not hasattr(engine, "model"):
        return None
    engine.load_theta()
    return engine.model


def state_of(args: ESConfig, records: Sequence[Record]) -> TrainerState:
    """Return the `TrainerState` of a run.

    Args:
        args: the run's configuration.
        records: the lines of its `metrics.jsonl`; they become ``log_history``.
    """
    from transformers import TrainerState

    return TrainerState(
        global_step=records[-1]["step"] if records else 0,
        max_steps=args.max_steps,
        logging_steps=args.logging_steps,
        eval_steps=args.eval_steps,
        save_steps=args.save_steps,
        train_batch_size=args.batch_size if isinstance(args.batch_size, int) else None,
        log_history=[dict(record) for record in records],
    )


def _memory_of(model: Any) -> list[tuple[Any, ...]]:
    """Return where the parameters and buffers of a model lie, and their types; other memory is not theta's."""
    if model is None:
        return []
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, one.data_ptr(), one.dtype, one.device, one.shape) for name, one in tensors]


def _overrides(callback: Any, event: str) -> bool:
    from transformers import TrainerCallback

    return getattr(type(callback), event, None) is not getattr(TrainerCallback, event, None)
