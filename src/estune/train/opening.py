"""Open a training run: check all of the user's input, and only then write.

`open_session` locks the directory, starts trackers and reward workers, loads the engine, and brings theta to the
journal's last step. It yields a `Session`, on which the training loop works.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from estune.config import ESConfig, ResolvedConfig
from estune.console import is_terminal, note, say, warn
from estune.data.batches import Batches
from estune.data.datasets import shared_prompts
from estune.engines.base import Engine
from estune.errors import UserError
from estune.es.types import Prompt
from estune.models.hub import open_repository, repository_of
from estune.models.names import local_directory, public_name
from estune.monitor.monitors import (
    ConsoleMonitor,
    JsonlMonitor,
    MemberLines,
    Monitor,
    Monitors,
    PlotMonitor,
    ReportMonitor,
)
from estune.monitor.panel import PanelMonitor
from estune.monitor.trackers import check_packages, read_trackers, start_logger, write_trackers
from estune.rewards.pool import INLINE_WARNING, RewardPool
from estune.run.checkpoint import BASE_DIRECTORY
from estune.run.directory import Run, open_run
from estune.train import setup
from estune.train.request import TrainingRequest
from estune.train.rollouts import Evaluator, Opponents
from estune.train.session import Session, restored_fields
from estune.train.setup import Loaded
from estune.train.signals import StopRequest
from estune.train.soundness import refuse_broken_theta, refuse_fixed_theta, refuse_moved_theta
from estune.train.step import plan_step, sampling_of


@contextmanager
def open_session(request: TrainingRequest, *, theta_joins_first_step: bool = True) -> Iterator[Session]:
    """Open the directory, start the reward workers, load the engine, and bring theta to the journal's last step.

    The reward workers start first, so that they load their modules while the engine loads.

    Args:
        request: the run's inputs; ``request.args`` becomes the resolved configuration.
        theta_joins_first_step: whether theta also answers the first step's rows, so that warnings can compare.

    Raises:
        UserError: an input is invalid; a run that was to be overwritten is still intact.
    """
    with ExitStack() as stack:
        run = open_run(request.args, request.given_args)
        stack.callback(run.close)
        request.args = run.args
        repository = hub_repository(run.args) if run.args.push_to_hub else None
        stop = stack.enter_context(StopRequest())
        pool, accuracy_pool = start_workers(stack, request, grades=bool(request.eval_rows))
        loaded = load_inputs(request, run, checks_model=run.is_new)
        request.args = run.args = loaded.args
        args, engine = loaded.args, loaded.engine
        if request.module is not None:
            stack.callback(engine.load_theta)  # the user's model then holds theta, even after an error in a member
        batches = setup.batches_of(args, len(request.train_rows))
        monitors, panel = _begin(stack, request, run, loaded, batches)
        replayed, last_move = run.recover(engine)
        if run.steps_done:
            checksum = engine.theta_checksum
            refuse_broken_theta(args, engine, loaded.train_prompts, run.steps_done)
            refuse_moved_theta(args, engine, checksum)
        lines = MemberLines(args.max_steps, args.population_size, run)
        session = Session(
            **vars(loaded),
            run=run,
            evaluator=Evaluator(
                engine,
                pool,
                args.response_prefix,
                stop.requested,
                panel or lines,
                opponents=Opponents(args.opponents) if pool.wants_opponents else None,
            ),
            panel=panel,
            repository=repository,
            accuracy_pool=accuracy_pool,
            batches=batches,
            monitors=monitors,
            callbacks=request.callbacks,
            checksum=engine.checksum(),
            tokens=run.tokens_before(),
            train_time_s=run.train_time_s(),
            **restored_fields(args, run),
            theta_joins_first_step=theta_joins_first_step,
        )
        session.announce(replayed)
        unlogged = run.unlogged_step()
        if unlogged is not None and last_move is not None:
            session.log_recovered_step(unlogged, last_move)
        request.is_opened = True
        yield session


def load_inputs(request: TrainingRequest, run: Run, *, checks_model: bool) -> Loaded:
    """Load the engine, tokenise the rows, and resolve the configuration.

    Args:
        request: the run's inputs.
        run: the open run; ``run.args`` has the values that a resume keeps.
        checks_model: whether to check that the model's logits are finite and its assets can be saved.

    Raises:
        UserError: the model does not load, or a row or the model fails a check.
    """
    check_packages(run.args.report_to)
    say(f"estune: loading {run.args.model if request.module is None else 'the model'}")
    engine = request.engine
    train_prompts = request.prompts(request.train_rows)
    args = setup.resolve_with_engine(run.args, engine, train_prompts)
    eval_prompts = request.prompts(request.eval_rows)
    if checks_model:
        engine.assets.check()
        loaded_checksum = engine.theta_checksum
        refuse_broken_theta(args, engine, train_prompts, 0)
        refuse_moved_theta(args, engine, loaded_checksum)
    return Loaded(args, engine, request.rewards, request.train_rows, train_prompts, request.eval_rows, eval_prompts)


def _begin(
    stack: ExitStack, request: TrainingRequest, run: Run, loaded: Loaded, batches: Batches
) -> tuple[Monitors, PanelMonitor | None]:
    """Start the monitors, then write a new run's first files or compare an old run's files with the inputs."""
    args, engine = loaded.args, loaded.engine
    facts = setup.facts_of(loaded)
    old_files = run.files() if run.is_new else {}
    trackers = {} if run.is_new else read_trackers(run.path)
    monitors, panel, started = start_monitors(args, run, trackers, run.steps_done)
    stack.push(lambda kind, *_: monitors.close(failed=kind is not None))
    refuse_fixed_theta(args, engine)
    if run.is_new:
        run.clear(old_files)  # all inputs have been checked by now
    _keep_base(request, run)
    reproducible = None
    if run.is_new:
        checksum = engine.theta_checksum
        reproducible = check_reproducible(args, engine, batches, loaded.train_prompts)
        refuse_moved_theta(args, engine, checksum)
    run.begin(engine, engine.facts.header, reproducible, facts)
    _open_base(request, run)
    write_trackers(run.path, {**trackers, **started})
    return monitors, panel


def check_reproducible(args: ResolvedConfig, engine: Engine, batches: Batches, prompts: Sequence[Prompt]) -> bool:
    """Return whether the first step's members generate the same tokens when they answer again."""
    first = plan_step(args, batches, 0)
    say("estune: checking that the same prompts give the same answers twice")
    members = first.perturbations[: args.group_size]
    return engine.check_reproducible(members, [prompts[row] for row in first.rows], sampling_of(args, 0))


def hub_repository(args: ESConfig) -> str:
    """Create the hub repository of a run unless it exists; return its full name.

    Raises:
        UserError: the hub does not answer, or refuses.
    """
    return open_repository(repository_of(args.hub_model_id, args.output_dir), args.hub_private_repo)


def start_workers(stack: ExitStack, request: TrainingRequest, *, grades: bool) -> tuple[RewardPool, RewardPool | None]:
    """Start the reward workers, and with ``grades`` the accuracy workers.

    Warn if held-out prompts are also trained on. Tell the user if rewards run inside this process.

    Args:
        stack: closes the workers.
        request: the run's rewards and rows.
        grades: whether accuracy will be measured.
    """
    args, rewards = request.args, request.rewards
    pool = stack.enter_context(setup.reward_pool(args, rewards.funcs, rewards.names))
    accuracy_pool = None
    if rewards.accuracy is not None and grades:
        accuracy_pool = stack.enter_context(setup.reward_pool(args, [rewards.accuracy], ["accuracy"], 1))
    if args.reward_isolation == "inline":
        note(INLINE_WARNING)
    if request.eval_rows and (shared := shared_prompts(request.train_rows, request.eval_rows)):
        warn(f"{shared} of {len(request.eval_rows)} held-out rows have a prompt that is also a training prompt")
    return pool, accuracy_pool


def _keep_base(request: TrainingRequest, run: Run) -> None:
    """Save theta_0 of a model in memory, and open theta_0 for anchored weight decay.

    The weights of a model in memory may have changed since the run began, so a resume loads theta_0 from the run.
    """
    engine, base = request.engine, run.path / BASE_DIRECTORY
    if request.module is not None and not run.is_new:
        engine.load_weights(base)
    anchored = run.args.weight_decay_anchor == "base"
    source = None if request.module is not None else local_directory(run.args.model)
    is_open = anchored and source is not None and engine.open_anchor([source])
    if request.module is not None or (anchored and not is_open):
        if run.is_new:
            engine.save(base, float32=True)
        if anchored:
            engine.open_anchor([base])


def _open_base(request: TrainingRequest, run: Run) -> None:
    """Open theta_0 for `Run.rebuild`: the files of the base model, or else a copy of theta_0 in the run's directory.

    Theta is still theta_0, which has been compared with the journal's base.

    Raises:
        UserError: the engine does not find theta_0 in its own files.
    """
    engine, args, base = request.engine, run.args, run.path / BASE_DIRECTORY
    if not args.load_best_model_at_end:
        return
    sources = [base] if request.module is not None else [*_files_of(args), base]
    if not engine.open_anchor(sources):
        engine.save(base, float32=True)
        if not engine.open_anchor([base]):
            raise UserError(f"engine {engine.facts.name} does not find its theta in {base}: load_best_model_at_end "
                            "cannot return to an earlier step")  # fmt: skip


def _files_of(args: ESConfig) -> list[Path]:
    """Return the directory of the base model's files, a local one or the hub cache's; none for other models."""
    directory = local_directory(args.model)
    if directory is None and args.engine in ("hf", "vllm"):
        from estune.engines.hf.loading import files_of

        with suppress(UserError):
            directory = files_of(args.model, args.revision)
    return [] if directory is None else [directory]


def start_monitors(
    args: ESConfig, run: Run, known: Mapping[str, str], steps_done: int
) -> tuple[Monitors, PanelMonitor | None, dict[str, str]]:
    """Start all monitors of a run.

    Args:
        args: the run's configuration.
        run: the open run.
        known: on a resume, the name by which each tracker knows the run.
        steps_done: number of steps at which the progress display begins.

    Returns:
        The monitors, the terminal panel if there is one, and the name by which each tracker knows the run.

    Raises:
        UserError: a tracker cannot start, or cannot continue the run that ``known`` names.
    """
    started: list[Monitor] = []
    trackers: list[Monitor] = []
    names: dict[str, str] = {}
    panel = None
    try:
        for name in args.report_to:
            if name == "plot":
                started.append(PlotMonitor(run.path))
            elif name == "report":
                started.append(ReportMonitor(run.path))
            elif name != "none":
                tracker = start_logger(
                    name, run.path, args.run_name or run.path.name, args.trajectory(), known.get(name)
                )
                trackers.append(tracker)
                if tracker.identity is not None:
                    names[name] = tracker.identity
    except UserError:
        Monitors([], trackers).close(failed=True)  # a tracker left open would also record the next run
        raise
    if args.console == "panel" or (args.console == "auto" and args.method == "es" and is_terminal(sys.stdout)):
        title = f"estune: {args.task or args.dataset_name or 'your dataset'} on {public_name(args.model)}"
        panel = PanelMonitor(title, args.max_steps, args.population_size, steps_done)
    console: Monitor = panel or ConsoleMonitor(args.max_steps, steps_done)
    return Monitors([JsonlMonitor(run.path / "metrics.jsonl")], [console, *started, *trackers]), panel, names
