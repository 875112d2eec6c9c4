"""BaselineTrainer: opens a run for a rival of ES, lets it train, and writes what an ES run would have written.

There is no journal: the weights of a rival come from gradients and cannot be rebuilt from seeds. The run's
`method.json` holds the trainer's arguments as they were resolved; `trainer/` holds what it needs to go on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from estune.baselines.arguments import own_arguments, sampling_arguments, trl_config
from estune.baselines.random_search import random_search
from estune.baselines.session import PROGRESS_FILE, BaselineSession, Progress
from estune.config import RESUMABLE, ESConfig
from estune.console import say, warn
from estune.engines.hf.loading import files_of, load_model, quiet, resolve_device
from estune.engines.hf.parameters import bindings
from estune.environment import environment
from estune.errors import ExternalError, UserError
from estune.es.types import Interrupted, num_parameters
from estune.files import read_json_object, remove_path, write_json
from estune.models.hub import push
from estune.monitor.trackers import keep_trackers, known_trackers
from estune.run.card import CARD_FILE
from estune.run.checkpoint import ES_STATE, checkpoints, is_whole_model, leftovers, read_state, remove_partial
from estune.run.directory import (
    CONFIG_FILE,
    METHOD_FILE,
    Run,
    adopt,
    open_run,
    read_config,
    stored_config,
    train_time_s,
)
from estune.run.records import cut_back, read_metrics
from estune.run.resume import Facts, are_facts, check_facts, keep_origin, located, same_names
from estune.train import setup
from estune.train.opening import hub_repository, start_monitors, start_workers
from estune.train.request import BaseTrainer, TrainingRequest
from estune.train.rollouts import Evaluator
from estune.train.signals import StopRequest
from estune.train.soundness import refuse_broken_theta
from estune.train.trainer import finish_again


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
    "random_search": random_search,
}
RESTARTED = ("ppo",)  # by a resume: their trainers keep nothing to go on from


class BaselineTrainer(BaseTrainer):
    """Trains a model by one of ES's rivals; arguments and results are those of `ESTrainer`."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if self.request.module is not None:
            raise UserError(f"method {self.args.method} takes the model by name")
        check_method(self.args, self.request.rewards.accuracy is not None)  # before anything is written

    def train(self) -> Path:
        """Run (or resume) to ``max_steps``; return the run directory, which then holds the model."""
        request, self.stopped = self.request, False
        run_dir = request.make_run_directory()
        if self.args.resume and is_finished(run_dir, self.args, request.unresolved):
            return finish_again(run_dir, self.args)
        self._refuse_to_restart(run_dir)
        repository = hub_repository(self.args) if self.args.push_to_hub else None
        with open_baseline(request) as session:
            try:
                if session.module is not None or not session.steps_done:  # random search has done all before it kept it
                    session.after_step()
                with quiet():
                    METHODS[self.args.method](session)
                session.save(final=True)
                rewards = [record["reward"] for record in read_metrics(run_dir) if "reward" in record]
                if rewards and all(reward is None for reward in rewards):
                    warn("every reward failed, or applied to nothing, so there was nothing to learn from")
                say(f"estune: done; the model is in {run_dir}")
                if repository is not None:
                    say(f"estune: {push(run_dir, repository)}")
            except Interrupted:
                self.stopped = True
                again = "start it again" if self.args.method in RESTARTED else "continue"
                say(
                    f"estune: stopped after {session.steps_done} steps; "
                    f"{again} with: estune train --resume --output_dir {run_dir}"
                )
        return run_dir

    def _refuse_to_restart(self, run_dir: Path) -> None:
        """Raise UserError where a finished run would have to start again to be longer or shorter."""
        if not self.args.resume or self.args.method not in RESTARTED or not (run_dir / CONFIG_FILE).exists():
            return
        stored = read_config(run_dir)
        then = {name: stored[name] for name in ("max_steps", "max_time_s")}
        if is_finished(run_dir, dataclasses.replace(self.args, **then), self.request.unresolved):
            raise UserError(
                f"{run_dir} is finished, and a run of method {self.args.method} cannot go on from its end: "
                "train in another --output_dir"
            )


def check_method(args: ESConfig, has_accuracy: bool = True) -> None:
    """Refuse what a method's trainer would: an unknown argument, a package that is missing.

    Args:
        args: resolved, or before.
        has_accuracy: of the task, which says what is right.

    Raises:
        UserError: with what is wrong.
    """
    if args.method not in METHODS:
        raise UserError(f"method {args.method} is ESTrainer's")
    if args.method == "random_search":
        return
    if args.method == "sft_rejection" and not has_accuracy and own_arguments(args)["min_reward"] is None:
        raise UserError("sft_rejection needs a task, whose accuracy says what is right, or min_reward in method_kwargs")
    own_arguments(args)
    if args.batch_size != "auto" and args.method != "ppo":  # resolved; PPO's arguments depend on its model, too
        sampled = args.method != "sft_rejection"
        batch = int(args.batch_size) * (args.num_generations if sampled else 1)
        trl_config(args, "trainer", batch, 0, **(sampling_arguments(args) if sampled else {}))


def is_finished(path: Path, args: ESConfig, given: ESConfig) -> bool:
    """Say whether a directory holds this run, with all its steps or all its time; reads only.

    Raises:
        UserError: it does, and ``args`` would have made another; or its model is damaged, and nothing is left to write
            it again from.
    """
    state = read_state(path)
    if not (path / CONFIG_FILE).exists():
        return False
    if state is None and (path / ES_STATE).exists():
        _say_damaged(path, args.method, ES_STATE)
        return False
    if state is None or leftovers(path):
        return False
    kept = kept_by_a_resume(path)
    adopt(args, kept, given)
    if not same_names(located(kept, path), args):
        return False
    used_up = bool(args.max_time_s and train_time_s(path) >= args.max_time_s)
    if state["step"] != last_step(path) or not (used_up or state["step"] == args.max_steps):
        return False
    if not is_whole_model(path, state):
        _say_damaged(path, args.method, "the finished model")
        return False
    return (path / CARD_FILE).exists() or read_method(path) is not None  # the card is written from it


def _say_damaged(path: Path, method: str, what: str) -> None:
    """Warn that a run writes its model again; UserError where it could only begin again from step 0."""
    found = f"{what} in {path} is damaged or lacks a file"
    if method not in RESTARTED and resume_point(path).steps_done:
        warn(f"{found}: it is written again")
        return
    kept = checkpoints(path)
    other = f"start another run from its weights with --model {kept[-1][1]}, or " if kept else ""
    raise UserError(
        f"{found}, and nothing whole is left for its trainer to go on from: {other}begin again with --overwrite"
    )


def read_method(path: Path) -> dict[str, Any] | None:
    """Return a run's `method.json`; None where it is missing or damaged."""
    try:
        found = read_json_object(path / METHOD_FILE)
    except (OSError, ValueError):
        return None
    base = found.get("base")
    names = (found.get("method"), found.get("trainer"), isinstance(base, dict) and base.get("fingerprint"))
    is_sound = all(isinstance(name, str) for name in names) and isinstance(found.get("arguments"), dict)
    return found if is_sound and are_facts(found) else None


def kept_by_a_resume(path: Path) -> dict[str, Any]:
    """Return what a run's configuration says and a resume cannot change."""
    return {name: value for name, value in read_config(path).items() if name not in RESUMABLE}


def last_step(path: Path) -> int:
    """Return the last step that the metrics tell of."""
    return max((record["step"] for record in read_metrics(path)), default=0)


def resume_point(path: Path) -> Progress:
    """Return how far a run has come that can be continued: to the newest state of its method that is whole.

    Warns of states that are damaged.
    """
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
        warn(f"{'; '.join(damaged)}: continuing from step {newest.steps_done}, the newest state that is whole")
    return newest


def forget_later(path: Path, steps_done: int) -> None:
    """Drop what a killed run wrote of steps that are to be done again."""
    cut_back(path, steps_done)
    for step, directory in checkpoints(path):
        if step > steps_done:
            remove_path(directory)


def check_run(path: Path, fingerprint: str, facts: Facts) -> None:
    """Refuse to continue with another base, other data or rewards than a run was begun with (`estune.run.resume`).

    Raises:
        UserError: names what differs.
    """
    then = read_method(path)
    if then is None:
        raise UserError(
            f"{path / METHOD_FILE} is missing or damaged; without it a resume cannot know what the run was begun with"
        )
    base = then["base"]["fingerprint"]
    if base != fingerprint:
        raise ExternalError(
            f"a resume cannot change the base model's weights: they have fingerprint {fingerprint}, the run was begun "
            f"on {base}"
        )
    check_facts(then, facts)


@contextmanager
def open_baseline(request: TrainingRequest) -> Iterator[BaselineSession]:
    """Open the directory, start the reward workers, load engine and module; everything the user gave is tried first."""
    with ExitStack() as stack:
        run = open_run(request.args, request.unresolved)
        stack.callback(run.close)
        args = run.args
        resumes = args.resume and (run.path / CONFIG_FILE).exists()
        if resumes:
            args = adopt(args, kept_by_a_resume(run.path), request.unresolved)
        restarts = resumes and args.method in RESTARTED
        if restarts:
            say(f"estune: {args.method} keeps nothing to go on from: starting again from step 0")
            resumes = False
        stop = stack.enter_context(StopRequest())
        request.args = args
        grades = bool(request.eval_rows) or args.method == "sft_rejection"
        pool, accuracy_pool = start_workers(stack, request, grades=grades)
        say(f"estune: loading {args.model}")
        engine = request.engine
        train_prompts = request.prompts(request.train_rows)
        resolved = setup.resolve_with_engine(args, engine, train_prompts)
        args = request.args = run.args = resolved
        eval_prompts = request.prompts(request.eval_rows)
        if not resumes:
            engine.assets.check()
            refuse_broken_theta(args, engine, train_prompts, 0)
        fingerprint = engine.fingerprint()
        facts = setup.facts_of(
            request.rewards, engine.assets, request.train_rows, train_prompts, request.eval_rows, eval_prompts
        )
        progress = resume_point(run.path) if resumes else Progress()
        steps_done = progress.steps_done
        if steps_done:
            check_run(run.path, fingerprint, facts)
        if steps_done > args.max_steps:
            raise ExternalError(f"{run.path} already has {steps_done} steps, more than max_steps {args.max_steps}")
        found = {} if resumes else run.files()
        if restarts:  # until it is written again, the configuration says what the next resume starts
            del found[run.path / CONFIG_FILE]
        trackers = known_trackers(run.path) if resumes else {}
        monitors, _, started = start_monitors(args, run, trackers, steps_done)
        stack.push(lambda kind, *_: monitors.close(failed=kind is not None and not issubclass(kind, Interrupted)))
        if not resumes:
            run.clear(found)
        module, bound = load_module(args, run, steps_done)
        values = dataclasses.asdict(stored_config(args))
        keep_origin(run.path, values)
        write_json(run.path / CONFIG_FILE, values)
        write_json(run.path / "env.json", environment())
        keep_trackers(run.path, {**trackers, **started})
        remove_partial(run.path)
        forget_later(run.path, steps_done)
        session = BaselineSession(
            args=resolved,
            run=run,
            engine=engine,
            module=module,
            bindings=bound,
            evaluator=Evaluator(engine, pool, args.response_prefix, stop.requested),
            accuracy_pool=accuracy_pool,
            rewards=request.rewards,
            train_rows=request.train_rows,
            train_prompts=train_prompts,
            eval_rows=request.eval_rows,
            eval_prompts=eval_prompts,
            monitors=monitors,
            facts={"base": {"model": args.model, "fingerprint": fingerprint}, **facts.as_dict()},
            should_stop=stop.requested,
            steps_done=steps_done,
            evaluations=progress.evaluations,
            train_time_s=progress.train_time_s,
            batches=progress.batches,
            progress=progress,
            copied=module is None or not steps_done,
        )
        data = args.task or args.dataset_name or "your dataset"
        say(
            f"estune: {args.method} on {args.model}, {num_parameters(engine.specs):,} parameters; {data}: "
            f"{len(session.train_rows)} training rows, {len(session.eval_rows)} held out"
        )
        size = (
            f"N {args.population_size}, sigma {args.sigma:g}"
            if module is None
            else (
                f"{args.num_generations} {'completion' if args.num_generations == 1 else 'completions'} of each, "
                f"learning_rate {args.learning_rate:g}"
            )
        )
        say(
            f"estune: {args.batch_size} prompts a step, {size}, seed {args.seed}, {args.max_steps} steps into "
            f"{run.path}"
        )
        if steps_done:
            say(f"estune: resuming after step {steps_done}")
        yield session


def load_module(args: ESConfig, run: Run, steps_done: int) -> tuple[Any, Any]:
    """Return the model to train, float32, and where its stored tensors lie in it; nothing for a method without one."""
    if args.method == "random_search":
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
    # where TRL, which knows no revision of it, finds the reference of a KL term
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
    torch.set_num_threads(int(args.num_threads))
    return module, bound
