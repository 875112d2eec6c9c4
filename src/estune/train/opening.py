"""Opening a training run: everything that the user gave is tried before anything is written.

The directory is locked, trackers and reward workers start, the engine loads, and theta is brought to the journal's last
step. What comes out is an open `estune.train.session.Session`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from estune.config import ESConfig, ResolvedConfig
from estune.console import is_terminal, note, say, warn
from estune.data.batches import Batches
from estune.data.columns import shared_prompts
from estune.engines.base import Engine
from estune.errors import UserError
from estune.es.types import Prompt
from estune.models.hub import open_repository, repository_of
from estune.models.names import local_directory, public_name
from estune.monitor.monitors import ConsoleMonitor, JsonlMonitor, Monitor, Monitors, PlotMonitor, ReportMonitor
from estune.monitor.panel import PanelMonitor
from estune.monitor.trackers import keep_trackers, known_trackers, start_logger
from estune.rewards.pool import INLINE_WARNING, RewardPool
from estune.run.checkpoint import BASE_DIRECTORY
from estune.run.directory import Run, open_run
from estune.train import setup
from estune.train.request import TrainingRequest
from estune.train.rollouts import Evaluator
from estune.train.session import Session, run_so_far
from estune.train.signals import StopRequest
from estune.train.soundness import refuse_broken_theta
from estune.train.step import plan_step


@contextmanager
def open_session(request: TrainingRequest, *, asks_theta_first: bool = True) -> Iterator[Session]:
    """Open the directory, start the reward workers, load the engine, and bring theta to the journal's last step.

    The reward workers come before the engine, so that they load while it does.

    Args:
        request: what the run is asked to do; its ``args`` are the resolved configuration afterwards.
        asks_theta_first: let theta answer the first step's rows, too: a baseline for warnings.

    Raises:
        UserError: something that the user gave cannot work; a run that is to be overwritten is still there then.
    """
    with ExitStack() as stack:
        run = open_run(request.args, request.given)
        stack.callback(run.close)
        request.args = run.args
        repository = hub_repository(run.args) if run.args.push_to_hub else None
        stop = stack.enter_context(StopRequest())
        pool, accuracy_pool = start_workers(stack, request, grades=bool(request.eval_rows))
        say(f"estune: loading {run.args.model if request.module is None else 'the model'}")
        engine = request.engine
        train_prompts = request.prompts(request.train_rows)
        args = setup.resolve_with_engine(run.args, engine, train_prompts)
        request.args = run.args = args
        eval_prompts = request.prompts(request.eval_rows)
        if run.is_new:
            engine.assets.check()
            refuse_broken_theta(args, engine, train_prompts, 0)
        facts = setup.facts_of(
            request.rewards, engine.assets, request.train_rows, train_prompts, request.eval_rows, eval_prompts
        )
        found = run.files() if run.is_new else {}
        trackers = {} if run.is_new else known_trackers(run.path)
        monitors, panel, started = start_monitors(args, run, trackers, run.steps_done)
        stack.push(lambda kind, *_: monitors.close(failed=kind is not None))
        if run.is_new:
            run.clear(found)  # only now, when all that the user gave has been found to work
        _keep_base(request, run)
        batches = setup.batches_of(args, len(request.train_rows))
        reproducible = check_reproducible(args, engine, batches, train_prompts) if run.is_new else None
        run.begin(engine, engine.facts.header, reproducible, facts)
        keep_trackers(run.path, {**trackers, **started})
        replayed, last_move = run.recover(engine)
        if run.steps_done:
            refuse_broken_theta(args, engine, train_prompts, run.steps_done)

        def between_tokens() -> bool:
            if panel is not None:
                panel.tick()
            return stop.requested()

        evaluator = Evaluator(
            engine, pool, args.response_prefix, between_tokens, panel.members_done if panel else lambda done: None
        )
        session = Session(
            args=args,
            run=run,
            engine=engine,
            evaluator=evaluator,
            panel=panel,
            repository=repository,
            accuracy_pool=accuracy_pool,
            rewards=request.rewards,
            train_rows=request.train_rows,
            train_prompts=train_prompts,
            eval_rows=request.eval_rows,
            eval_prompts=eval_prompts,
            batches=batches,
            monitors=monitors,
            checksum=engine.checksum(),
            tokens=run.tokens_before(),
            train_time_s=run.train_time_s(),
            **run_so_far(args, run),
            asks_theta_first=asks_theta_first,
        )
        session.announce(replayed)
        unlogged = run.unlogged_step()
        if unlogged is not None and last_move is not None:
            session.log_again(unlogged, last_move)
        yield session


def check_reproducible(args: ResolvedConfig, engine: Engine, batches: Batches, prompts: Sequence[Prompt]) -> bool:
    """Return whether members of the first step give the same answers twice."""
    first = plan_step(args, batches, 0)
    say("estune: checking that the same prompts give the same answers twice")
    members = first.perturbations[: args.members_per_batch]
    return engine.check_reproducible(members, [prompts[row] for row in first.rows], setup.sampling(args, 0))


def hub_repository(args: ESConfig) -> str:
    """Make or find the hub repository of a run; return its full name.

    Raises:
        UserError: the hub does not answer, or refuses.
    """
    return open_repository(repository_of(args.hub_model_id, args.output_dir), args.hub_private_repo)


def start_workers(stack: ExitStack, request: TrainingRequest, *, grades: bool) -> tuple[RewardPool, RewardPool | None]:
    """Start the workers of rewards, and with ``grades`` those of accuracy; warn of what a run should not have.

    Args:
        stack: closes them.
        request: whose rewards and rows they are.
        grades: whether accuracy will be asked for.
    """
    args, rewards = request.args, request.rewards
    pool = stack.enter_context(setup.reward_pool(args, rewards.funcs, rewards.names))
    accuracy_pool = None
    if rewards.accuracy is not None and grades:
        accuracy_pool = stack.enter_context(setup.reward_pool(args, [rewards.accuracy], ["accuracy"], 1))
    if args.reward_isolation == "inline":
        note(INLINE_WARNING)
    if request.eval_rows and (shared := shared_prompts(request.train_rows, request.eval_rows)):
        warn(f"{shared} of {len(request.eval_rows)} held-out rows have a prompt that is trained on")
    return pool, accuracy_pool


def _keep_base(request: TrainingRequest, run: Run) -> None:
    """Keep theta_0 in the run where it has no files of its own, and open it for anchored decay.

    A module that was given may have moved since the run began, so a resume reads theta_0 from the run.
    """
    engine, own = request.engine, run.path / BASE_DIRECTORY
    if request.module is not None and not run.is_new:
        engine.load_weights(own)
    anchored = run.args.weight_decay_anchor == "base"
    source = None if request.module is not None else local_directory(run.args.model)
    is_open = anchored and source is not None and engine.open_anchor([source])
    if request.module is not None or (anchored and not is_open):
        if run.is_new:
            engine.save(own, float32=True)
        if anchored:
            engine.open_anchor([own])


def start_monitors(
    args: ESConfig, run: Run, known: Mapping[str, str], steps_done: int
) -> tuple[Monitors, PanelMonitor | None, dict[str, str]]:
    """Start what shows and records the run; return it, its panel, and what trackers call the run.

    Raises:
        UserError: a tracker cannot start, or cannot go on with the run that it is known by.
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
        Monitors([], trackers).close(failed=True)  # a tracker left open would take the next run's numbers, too
        raise
    if args.console == "panel" or (args.console == "auto" and args.method == "es" and is_terminal(sys.stdout)):
        title = f"estune: {args.task or args.dataset_name or 'your dataset'} on {public_name(args.model)}"
        panel = PanelMonitor(title, args.max_steps, args.population_size, steps_done)
    console: Monitor = panel or ConsoleMonitor(args.max_steps, steps_done)
    return Monitors([JsonlMonitor(run.path / "metrics.jsonl")], [console, *started, *trackers]), panel, names
