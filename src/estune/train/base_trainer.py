"""The part of the trainers that all methods share: the constructor of TRL's trainers, and transformers' methods."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estune.config import FIELDS, ESConfig, SizedConfig
from estune.config.hints import no_attribute, unknown_arguments
from estune.console import note
from estune.engines.base import Engine
from estune.errors import UserError
from estune.es.types import Prompt
from estune.models.hub import open_repository, push, repository_of
from estune.run.checkpoint import read_state
from estune.run.records import read_metrics
from estune.train import setup
from estune.train.callbacks import model_of, state_of
from estune.train.evaluation import HeldOut, evaluate
from estune.train.metrics import evaluation_record
from estune.train.output import TrainOutput, train_output
from estune.train.request import TrainingRequest
from estune.train.rollouts import Evaluator
from estune.train.step import evaluation_sampling, progress_of

if TYPE_CHECKING:
    from transformers import TrainerState


class BaseTrainer:
    """The constructor and methods that the trainers of all methods share; see `estune.train.trainer.ESTrainer`."""

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: ESConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        callbacks: Sequence[Any] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = signature(BaseTrainer).parameters.keys() - {"unknown"}
            raise unknown_arguments(type(self).__name__, unknown, known, FIELDS)
        self.request = TrainingRequest.of(
            args, model, reward_funcs, train_dataset, eval_dataset, processing_class, callbacks
        )
        self.stopped = False  # whether a signal stopped the last `train` early
        self._evaluations: list[dict[str, Any]] = []  # records of `evaluate` since the last `train`
        self._steps_done: int | None = None  # of the run that this trainer opened
        self._gave_model = False  # whether `model` was read: a program may have changed it

    def begin(self, resume_from_checkpoint: str | Path | bool | None, unknown: Collection[str]) -> TrainingRequest:
        """Prepare for `train`: return the request, which continues a run if it was asked to.

        Raises:
            UserError: ``train`` was given arguments that it does not have.
        """
        self._refuse_unknown("train", unknown)
        request = self.request
        if request.is_opened or self._gave_model:  # theta may have moved, so a model with a name is loaded again
            request.forget_engine()
        self.stopped, self._evaluations, self._gave_model, self._steps_done = False, [], False, None
        request.is_opened, request.finished = False, None
        request.callbacks.reset()
        request.resume(resume_from_checkpoint)
        return request

    def _refuse_unknown(self, method: str, unknown: Collection[str]) -> None:
        if unknown:
            known = signature(getattr(type(self), method)).parameters.keys() - {"self", "unknown"}
            raise unknown_arguments(f"{type(self).__name__}.{method}", unknown, known, FIELDS)

    def found_finished(self, run_dir: Path) -> TrainOutput:
        """Return the finished run, to which `train` has nothing to add; the trainer's model is then the run's."""
        self.request.forget_engine()
        self.request.is_opened, self.request.finished = True, run_dir
        return self.output()

    def output(self) -> TrainOutput:
        """Return the run directory with the run's metrics."""
        return train_output(Path(str(self.args.output_dir)), self.args, len(self.train_rows), self._steps_done)

    @property
    def args(self) -> SizedConfig:
        """The configuration; a `ResolvedConfig` once a run has been opened."""
        return self.request.args

    @property
    def engine(self) -> Engine:
        """The engine; it is loaded on first use."""
        return self.request.engine

    if not TYPE_CHECKING:  # a type checker then still finds misspelt attributes

        def __getattr__(self, name: str) -> Any:
            """Raise AttributeError; for a name of TRL or transformers the message says what to use instead."""
            if hasattr(type(self), name):  # a property raised AttributeError: raise that error again
                return object.__getattribute__(self, name)
            raise no_attribute(type(self).__name__, name, dir(type(self)), FIELDS)

    @property
    def model(self) -> Any:
        """The model of transformers, with theta in it; it is loaded on first use.

        Raises:
            UserError: no such model is in this process, as with engine vllm and with workers.
        """
        model = model_of(self.engine)
        self._gave_model = True
        if model is None:
            raise UserError(
                f"engine {self.engine.facts.name} holds no model of transformers in this process: save_model(path) "
                "writes one"
            )
        return model

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self.engine.assets.tokenizer

    @property
    def state(self) -> TrainerState:
        """Progress as transformers' `TrainerState`; ``log_history`` holds `metrics.jsonl` and the `evaluate` calls."""
        run_dir = Path(str(self.args.output_dir)) if self.request.is_opened else None
        records = read_metrics(run_dir) if run_dir is not None else []
        state = state_of(self.args, records)
        state.global_step = state.global_step if self._steps_done is None else self._steps_done
        state.epoch = self._progress(state.global_step)["epoch"]
        saved = read_state(run_dir) if run_dir is not None else None
        if saved is not None and "best" in saved:
            state.best_global_step, state.best_metric = saved["best"]["step"], saved["best"]["value"]
        state.log_history += self._evaluations
        return state

    def _progress(self, steps_done: int) -> dict[str, Any]:
        return progress_of(self.args, steps_done, len(self.train_rows))

    @property
    def train_rows(self) -> list[dict[str, Any]]:
        """The training rows."""
        return self.request.train_rows

    @property
    def eval_rows(self) -> list[dict[str, Any]]:
        """The held-out rows; empty without ``eval_steps``."""
        return self.request.eval_rows

    def add_callback(self, callback: Any) -> None:
        """Add a `transformers.TrainerCallback`, an instance or a class."""
        self.request.callbacks.add(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, or the first of a class, and return it; None if there is none."""
        return self.request.callbacks.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, or the first of a class."""
        self.request.callbacks.pop(callback)

    def is_world_process_zero(self) -> bool:
        """Return True: one process trains."""
        return True

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **unknown: Any
    ) -> dict[str, Any]:
        """Evaluate theta on held-out rows as the run's own evaluations do; nothing is written.

        Args:
            eval_dataset: rows; None: the trainer's ``eval_dataset``, or those that the configuration names.
            ignore_keys: has no effect; transformers has it.
            metric_key_prefix: prefix of the names, before an underscore.

        Returns:
            The numbers of `metrics.jsonl`'s evaluations, such as ``eval_reward``, ``eval_accuracy`` and ``eval_rows``.

        Raises:
            UserError: there are no held-out rows, or they are invalid.
        """
        self._refuse_unknown("evaluate", unknown)
        request, args = self.request, self.args
        rows = request.held_out(eval_dataset)
        prompts = request.prompts(rows)
        with ExitStack() as stack:
            pool = stack.enter_context(setup.reward_pool(args, request.rewards.funcs, request.rewards.names))
            grader = None
            if request.rewards.accuracy is not None:
                grader = stack.enter_context(setup.reward_pool(args, [request.rewards.accuracy], ["accuracy"]))
            state = self.state
            evaluation = evaluate(
                HeldOut(
                    Evaluator(self.engine, pool, args.response_prefix),
                    rows,
                    prompts,
                    evaluation_sampling(args),
                    request.rewards.weights,
                    grader,
                    batch=args.prompts_per_batch,
                    trainer_state=self._progress(state.global_step),
                    names=request.rewards.names,
                )
            )
        self.engine.load_theta()
        record = {"step": state.global_step, "epoch": state.epoch, **evaluation_record(evaluation)}
        self._evaluations.append(record)
        return {
            name.replace("eval_", f"{metric_key_prefix}_", 1): value for name, value in record.items() if name != "step"
        }

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False, **unknown: Any) -> None:
        """Write theta to a directory as a Hugging Face model in the compute dtype.

        Args:
            output_dir: the directory; None or the run directory: `train` has already written the model there.
            _internal_call: has no effect; transformers has it.

        Raises:
            UserError: there is no directory, because nothing has been trained.
        """
        self._refuse_unknown("save_model", unknown)
        run_dir = self.args.output_dir
        if output_dir is None or (run_dir is not None and Path(output_dir).resolve() == Path(run_dir).resolve()):
            self._finished_run("save_model")
            return
        self.engine.save(Path(output_dir), float32=False)

    def push_to_hub(self, commit_message: str = "Model tuned by estune", **unused: Any) -> str:
        """Upload the finished run's model, card and journal to ``hub_model_id``; return the URL of the commit.

        The repository's name is the run directory's without ``hub_model_id``. The card states what the run knows, so
        transformers' arguments for the card, and other ones, are named in one line and have no effect.

        Raises:
            UserError: the run is not finished, or the hub refuses.
        """
        run_dir = self._finished_run("push_to_hub")
        if unused:
            note(f"push_to_hub uses no {', '.join(unused)}")
        args = self.args
        repository = open_repository(repository_of(args.hub_model_id, run_dir), args.hub_private_repo)
        return push(run_dir, repository, commit_message)

    def _finished_run(self, method: str) -> Path:
        """Return the run directory, if it holds a finished model.

        Raises:
            UserError: it does not.
        """
        run_dir = self.args.output_dir
        if run_dir is None or not self.request.is_opened or read_state(Path(run_dir)) is None:
            place = "output_dir" if run_dir is None else str(run_dir)
            instead = "; save_model(path) writes the present model elsewhere" if method == "save_model" else ""
            raise UserError(f"{method} needs a finished run in {place}: call train() first{instead}")
        return Path(run_dir)

    def prepare(self) -> list[Prompt]:
        """Load the engine and return the training rows' prompts, without writing a run.

        Raises:
            UserError: the model does not load, or a prompt does not fit its context.
        """
        return self.request.prompts(self.request.train_rows)
