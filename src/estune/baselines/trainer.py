"""BaselineTrainer: trains a model with a baseline of ES and writes the same kind of run directory.

A baseline has no journal, because its weights come from gradients and cannot be rebuilt from seeds. `method.json` holds
the resolved arguments of the trainer, and `trainer/` holds its state for a resume.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from estune.baselines.arguments import method_arguments, sampling_arguments, trl_config
from estune.baselines.random_search import check_vote, random_search
from estune.baselines.session import PROGRESS_FILE, BaselineSession, Progress, random_states_kept
from estune.config import RESUMABLE, SEARCHES, ESConfig, ResolvedConfig
from estune.console import counted, say, warn
from estune.engines.hf.loading import files_of, load_model, quiet, resolve_device
from estune.engines.hf.parameters import Binding, bindings
from estune.engines.hf.working_model import torch_threads
from estune.environment import environment
from estune.errors import ExternalError, UserError
from estune.es.types import Interrupted, num_parameters
from estune.files import read_json_object, remove_path, write_json
from estune.models.hub import push
from estune.monitor.monitors import Monitors
from estune.monitor.trackers import read_trackers, write_trackers
from estune.run.card import CARD_FILE
from estune.run.checkpoint import ES_STATE, checkpoints, is_whole_model, leftovers, read_state, remove_partial
from estune.run.directory import Run, open_run
from estune.run.origin import keep_origin, located, same_names
from estune.run.records import cut_back, read_metrics, train_time_s
from estune.run.resume import Facts, adopt, are_facts, check_facts
from estune.run.saved_config import CONFIG_FILE, METHOD_FILE, BaselineFacts, Method, read_config, stored_config
from estune.train import setup
from estune.train.base_trainer import BaseTrainer
from estune.train.opening import hub_repository, load_inputs, start_monitors, start_workers
from estune.train.output import TrainOutput
from estune.train.request import TrainingRequest
from estune.train.rollouts import Evaluator
from estune.train.setup import Loaded
from estune.train.signals import StopRequest
from estune.train.trainer import complete_finished_run


def _policy_gradient(session: BaselineSession) -> None:
    from estune.baselines.policy_gradient import policy_gradient

    policy_gradient(session)


def _ppo(session: BaselineSession) -> None:
    from estune.baselines.ppo import ppo

    ppo(session)


def _rejection(session: BaselineSession) -> None:
    from estune.baselines.rejection import rejection

    rejection(session)


METHODS: dict[str, Callable[[BaselineSession], None]] = {
    "grpo": _policy_gradient,
    "dr_grpo": _policy_gradient,
    "rloo": _policy_gradient,
    "ppo": _ppo,
    "sft_rejection": _rejection,
    **dict.fromkeys(SEARCHES, random_search),
}
RESTARTED = ("ppo",)  # methods whose trainers store no state: a resume starts again from step 0


class BaselineTrainer(BaseTrainer):
    """Trains a model with a baseline of ES; takes the arguments of `ESTrainer` and writes the same results."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.request.module is not None:
            raise UserError(f"method {self.args.method} needs the model's name or directory, not a model in memory")
        check_method(self.args, self.request.rewards.accuracy is not None)

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
        **unknown: Any,
    ) -> TrainOutput:
        """Train (or resume) until ``max_steps``, write the model, and return the run; see `ESTrainer.train`."""
        request = self.begin(resume_from_checkpoint, unknown)
        run_dir = request.make_run_directory()
        if self.args.resume and is_finished(run_dir, self.args, request.given_args):
            complete_finished_run(run_dir, self.args)
            return self.found_finished(run_dir)
        self._refuse_to_restart(run_dir)
        repository = hub_repository(self.args) if self.args.push_to_hub else None
        with open_baseline(request) as session:
            try:
                session.begin()
                with quiet(), random_states_kept():
                    METHODS[self.args.method](session)
                session.save(final=True)
                session.callbacks.saved()
                rewards = [record["reward"] for record in read_metrics(run_dir) if "reward" in record]
                if rewards and all(reward is None for reward in rewards):
                    warn("every reward was None or failed, so the model learned nothing")
                say(f"estune: done; the model is in {run_dir}")
                session.callbacks.call("on_train_end")
                if repository is not None:
                    say(f"estune: {push(run_dir, repository)}")
            except Interrupted:
                self.stopped = True
                action = "start again" if self.args.method in RESTARTED else "continue"
                say(
                    f"estune: stopped after {counted(session.steps_done, 'step')}; "
                    f"{action} with: estune train --resume --output_dir {run_dir}"
                )
                session.tell_callbacks("on_train_end")
            self._steps_done = session.steps_done
        return self.output()

    def _refuse_to_restart(self, run_dir: Path) -> None:
        """Raise UserError if a resume would restart a finished run because its length has changed."""
        if not self.args.resume or self.args.method not in RESTARTED or not (run_dir / CONFIG_FILE).exists():
            return
        stored = read_config(run_dir)
        then = {name: stored[name] for name in ("max_steps", "max_time_s")}
        if is_finished(run_dir, dataclasses.replace(self.args, **then), self.request.given_args):
            raise UserError(
                f"{run_dir} is finished, and method {self.args.method} cannot continue a finished run: "
                "train in another --output_dir"
            )


def check_method(args: ESConfig, has_accuracy: bool = True) -> None:
    """Check a method's arguments and packages before anything is written.

    Args:
        args: the configuration; it may hold `auto` values.
        has_accuracy: whether the task has an accuracy function.

    Raises:
        UserError: an argument is invalid, or a package is missing.
    """
    if args.method not in METHODS:
        raise UserError(f"method {args.method} needs ESTrainer")
    if args.method in SEARCHES:
        if args.method == "random_vote":
            check_vote(args)
        return
    if args.method == "sft_rejection" and not has_accuracy and method_arguments(args)["min_reward"] is None:
        raise UserError("sft_rejection needs a task with an accuracy, or min_reward in method_kwargs")
    method_arguments(args)
    if isinstance(args.batch_size, int) and args.method != "ppo":  # PPO's arguments also depend on the model
        sampled = args.method != "sft_rejection"
        batch = args.batch_size * (args.num_generations if sampled else 1)
        trl_config(args, "trainer", batch, 0, **(sampling_arguments(args) if sampled else {}))


def is_finished(path: Path, args: ESConfig, given_args: ESConfig) -> bool:
    """Return whether a directory holds this run and the run has reached ``max_steps`` or ``max_time_s``.

    Args:
        path: the run directory, which is only read.
        args: the configuration.
        given_args: the configuration with its `auto` values.

    Raises:
        UserError: the options differ from the run's, or the model is damaged and cannot be written again.
    """
    state = read_state(path)
    if not (path / CONFIG_FILE).exists():
        return False
    if state is None and (path / ES_STATE).exists():
        _report_damage(path, args.method, ES_STATE)
        return False
    if state is None or leftovers(path):
        return False
    fixed = fixed_options(path)
    adopt(args, fixed, given_args)
    if not same_names(located(fixed, path), args):
        return False
    used_up = bool(args.max_time_s and train_time_s(path) >= args.max_time_s)
    if state["step"] != last_step(path) or not (used_up or state["step"] == args.max_steps):
        return False
    if not is_whole_model(path, state):
        _report_damage(path, args.method, "the finished model")
        return False
    return (path / CARD_FILE).exists() or read_method(path) is not None  # a missing card is written from `method.json`


def _report_damage(path: Path, method: str, what: str) -> None:
    """Warn that a resume writes the model again; raise UserError if it could only start again from step 0."""
    damage = f"{what} in {path} is damaged or lacks a file"
    if method not in RESTARTED and resume_point(path).steps_done:
        warn(f"{damage}: it is written again")
        return
    saved = checkpoints(path)
    other = f"start another run from its weights with --model {saved[-1][1]}, or " if saved else ""
    raise UserError(
        f"{damage}, and the trainer has no intact state to continue from: {other}begin again with --overwrite"
    )


def read_method(path: Path) -> Method | None:
    """Return a run's `method.json`; None if it is missing or damaged."""
    try:
        record = read_json_object(path / METHOD_FILE)
    except (OSError, ValueError):
        return None
    base = record.get("base")
    names = (record.get("method"), record.get("trainer"), isinstance(base, dict) and base.get("fingerprint"))
    is_sound = all(isinstance(name, str) for name in names) and isinstance(record.get("arguments"), dict)
    return cast("Method", record) if is_sound and are_facts(record) else None


def fixed_options(path: Path) -> dict[str, Any]:
    """Return the options of a run that a resume cannot change."""
    return {name: value for name, value in read_config(path).items() if name not in RESUMABLE}


def last_step(path: Path) -> int:
    """Return the last step in the metrics."""
    return max((record["step"] for record in read_metrics(path)), default=0)


def resume_point(path: Path) -> Progress:
    """Return the progress of the newest intact state of the method's trainer; warn about damaged states."""
    newest, damaged = Progress(), []
    for directory in (path / "trainer", *sorted((path / "trainer").glob("checkpoint-*"))):
        try:
            progress = Progress.read(directory)
        except UserError as error:
            damaged.append(str(error))
            continue
        if progress is not None and directory.name not in ("trainer", f"checkpoint-{progress.steps_done}"):
            damaged.append(f"{directory / PROGRESS_FILE} is damaged")
            continue
        if progress is not None and progress.steps_done > newest.steps_done:
            newest = progress
    if damaged:
        warn(f"{'; '.join(damaged)}: continuing from step {newest.steps_done}, the newest intact state")
    return newest


def forget_later(path: Path, steps_done: int) -> None:
    """Delete the metrics and checkpoints that a killed run wrote after ``steps_done``."""
    cut_back(path, steps_done)
    for step, directory in checkpoints(path):
        if step > steps_done:
            remove_path(directory)


def check_run(path: Path, fingerprint: str, facts: Facts) -> None:
    """Check that base model, data and rewards are those that the run began with (`estune.run.resume`).

    Raises:
        UserError: something differs; the message names it.
    """
    then = read_method(path)
    if then is None:
        raise UserError(
            f"{path / METHOD_FILE} is missing or damaged; without it a resume cannot check the run's base, data and "
            "rewards"
        )
    base = then["base"]["fingerprint"]
    if base != fingerprint:
        raise ExternalError(
            f"a resume cannot change the base model's weights: they have fingerprint {fingerprint}, the run began "
            f"with {base}"
        )
    check_facts(then, facts)


@contextmanager
def open_baseline(request: TrainingRequest) -> Iterator[BaselineSession]:
    """Open the directory, start the reward workers, and load the engine and the module.

    Args:
        request: the run's inputs; ``request.args`` becomes the resolved configuration.

    Raises:
        UserError: an input is invalid; a run that was to be overwritten is still intact.
    """
    with ExitStack() as stack:
        run = open_run(request.args, request.given_args)
        stack.callback(run.close)
        args = run.args
        resumes = args.resume and (run.path / CONFIG_FILE).exists()
        if resumes:
            args = adopt(args, fixed_options(run.path), request.given_args)
        restarts = resumes and args.method in RESTARTED
        if restarts:
            say(f"estune: {args.method} stores no state to continue from: starting again from step 0")
            resumes = False
        stop = stack.enter_context(StopRequest())
        request.args = run.args = args
        grades = bool(request.eval_rows) or args.method == "sft_rejection"
        pool, accuracy_pool = start_workers(stack, request, grades=grades)
        loaded = load_inputs(request, run, checks_model=not resumes)
        request.args = run.args = loaded.args
        facts, progress = _check_resume(run, loaded, resumes)
        old_files = {} if resumes else run.files()
        if restarts:  # the old configuration stays until it is replaced, so that a kill leaves a resumable run
            del old_files[run.path / CONFIG_FILE]
        monitors, trackers = _start_monitors(stack, run, loaded.args, progress.steps_done, resumes)
        if not resumes:
            run.clear(old_files)
        stack.enter_context(torch_threads(loaded.args.num_threads))
        module, bound = load_module(loaded.args, run, progress.steps_done)
        _write_inputs(run, loaded.args, trackers, progress.steps_done)
        session = BaselineSession(
            **vars(loaded),
            run=run,
            module=module,
            bindings=bound,
            evaluator=Evaluator(loaded.engine, pool, args.response_prefix, stop.requested),
            accuracy_pool=accuracy_pool,
            monitors=monitors,
            callbacks=request.callbacks,
            facts=facts,
            should_stop=stop.requested,
            steps_done=progress.steps_done,
            evaluations=progress.evaluations,
            train_time_s=progress.train_time_s,
            batches=progress.batches,
            progress=progress,
            copied=module is None or not progress.steps_done,
        )
        _announce(session)
        request.is_opened = True
        yield session


def _check_resume(run: Run, loaded: Loaded, resumes: bool) -> tuple[BaselineFacts, Progress]:
    """Return the run's facts and the progress from which it continues; check both if the run resumes."""
    fingerprint = loaded.engine.fingerprint()
    facts = setup.facts_of(loaded)
    progress = resume_point(run.path) if resumes else Progress()
    done, max_steps = progress.steps_done, loaded.args.max_steps
    if done:
        check_run(run.path, fingerprint, facts)
    if done > max_steps:
        raise ExternalError(f"{run.path} already has {counted(done, 'step')}, more than max_steps {max_steps}")
    return {"base": {"model": loaded.args.model, "fingerprint": fingerprint}, **facts.stored()}, progress


def _start_monitors(
    stack: ExitStack, run: Run, args: ResolvedConfig, steps_done: int, resumes: bool
) -> tuple[Monitors, dict[str, str]]:
    """Start the monitors; ``stack`` closes them. Return them and the trackers' names for the run."""
    trackers = read_trackers(run.path) if resumes else {}
    monitors, _, started = start_monitors(args, run, trackers, steps_done)
    stack.push(lambda kind, *_: monitors.close(failed=kind is not None and not issubclass(kind, Interrupted)))
    return monitors, {**trackers, **started}


def _write_inputs(run: Run, args: ResolvedConfig, trackers: dict[str, str], steps_done: int) -> None:
    """Write configuration, environment and trackers; delete what a killed run wrote after ``steps_done``."""
    values = dataclasses.asdict(stored_config(args))
    keep_origin(run.path, values)
    write_json(run.path / CONFIG_FILE, values)
    write_json(run.path / "env.json", environment())
    write_trackers(run.path, trackers)
    remove_partial(run.path)
    forget_later(run.path, steps_done)


def _announce(session: BaselineSession) -> None:
    """Print the run's model, data and options."""
    args, specs = session.args, session.engine.specs
    data = args.task or args.dataset_name or "your dataset"
    say(
        f"estune: {args.method} on {args.model}, {num_parameters(specs):,} parameters; {data}: "
        f"{len(session.train_rows)} training rows, {len(session.eval_rows)} held out"
    )
    completions = f"{args.num_generations} {'completion' if args.num_generations == 1 else 'completions'}"
    if session.module is None:
        size = f"N {args.population_size}, sigma {args.sigma:g}"
    else:
        size = f"{completions} of each, learning_rate {args.learning_rate:g}"
    say(
        f"estune: {args.batch_size} prompts a step, {size}, seed {args.seed}, max_steps {args.max_steps}; "
        f"run directory {session.run.path}"
    )
    if session.steps_done:
        say(f"estune: resuming after step {session.steps_done}")


def load_module(args: ResolvedConfig, run: Run, steps_done: int) -> tuple[Any, Sequence[Binding]]:
    """Return the model to train in float32, and the bindings of its stored tensors.

    The result is (None, ()) for a method without gradients.

    Raises:
        UserError: ``trainable_parameters`` matches no parameter.
    """
    if args.method in SEARCHES:
        return None, ()
    source = str(run.path / "trainer" / f"checkpoint-{steps_done}") if steps_done else args.model
    module, _, _ = load_model(
        source,
        dtype="float32",
        device=resolve_device(args.device),
        revision=None if steps_done else args.revision,
        trust_remote_code=args.trust_remote_code,
        num_threads=1,
        trainable_parameters=None,
    )
    # TRL loads the reference model of a KL term from this path, without a revision.
    commit = getattr(module.config, "_commit_hash", None) or args.revision
    module.config._name_or_path = str(files_of(args.model, commit))
    bound, _ = bindings(module)
    if args.trainable_parameters is not None:
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        for binding in bound:
            if any(re.search(pattern, binding.name) for pattern in args.trainable_parameters):
                for piece in binding.pieces:
                    piece.parameter.requires_grad_(True)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise UserError("trainable_parameters matches no parameter")
    return module, bound
