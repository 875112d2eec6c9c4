"""Opening a training run: everything that the user gave is tried before anything is written.

The directory is locked, trackers and reward workers start, the engine loads, and theta is brought to the journal's last
step. What comes out is an open `estune.train.session.Session`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from estune.config import ESConfig
from estune.console import is_terminal, note, say, warn
from estune.data.batches import Batches
from estune.data.columns import shared_prompts
from estune.errors import UserError
from estune.models.hub import open_repository, repository_of
from estune.models.names import local_directory, public_name
from estune.monitor.monitors import ConsoleMonitor, JsonlMonitor, Monitor, Monitors, PlotMonitor, ReportMonitor
from estune.monitor.panel import PanelMonitor
from estune.monitor.trackers import keep_trackers, known_trackers, start_logger
from estune.rewards.pool import INLINE_WARNING, RewardPool
from estune.run.checkpoint import BASE_DIRECTORY
from estune.run.directory import Run, open_run
from estune.train import setup
from estune.train.rollouts import Evaluator
from estune.train.session import Session, plan_step, run_so_far
from estune.train.signals import StopRequest
from estune.train.soundness import refuse_broken_theta

if TYPE_CHECKING:
    from estune.train.trainer import ESTrainer


@contextmanager
def open_session(trainer: ESTrainer) -> Iterator[Session]:
    """Open the directory, start the reward workers, load the engine, and bring theta to the journal's last step.

    The reward workers come before the engine, so that they load while it does.

    Raises:
        UserError: something that the user gave cannot work; a run that is to be overwritten is still there then.
    """
    with ExitStack() as stack:
        run = open_run(trainer.args, trainer.given)
        stack.callback(run.close)
        args = trainer.args = run.args
        repository = hub_repository(args) if args.push_to_hub else None
        stop = stack.enter_context(StopRequest())
        pool, accuracy_pool = start_workers(stack, trainer, args, grades=bool(trainer.eval_rows))
        say(f"estune: loading {args.model if not trainer.has_module else 'the model'}")
        engine = trainer.engine
        train_prompts = trainer.prepare()
        args = trainer.args = run.args = setup.resolve_with_engine(args, engine, train_prompts)
        eval_prompts = setup.build_prompts(args, engine, trainer.eval_rows, trainer.task is not None)
        if run.is_new:
            engine.assets.check()
            refuse_broken_theta(args, engine, train_prompts, 0)
        facts = setup.facts_of(
            trainer.rewards, engine, trainer.train_rows, train_prompts, trainer.eval_rows, eval_prompts
        )
        found = run.files() if run.is_new else {}
        trackers = {} if run.is_new else known_trackers(run.path)
        monitors, panel, started = start_monitors(args, run, trackers, run.steps_done)
        stack.push(lambda kind, *_: monitors.close(failed=kind is not None))
        if run.is_new:
            run.clear(found)  # only now, when all that the user gave has been found to work
        _keep_base(trainer, run)
        sampling = setup.sampling(args, 0)
        batches = Batches(len(trainer.train_rows), int(args.batch_size), args.seed)
        reproducible = None
        if run.is_new:
            first = plan_step(args, batches, 0)
            members = [first.perturbation(member) for member in first.members[: int(args.members_per_batch)]]
            prompts = [train_prompts[row] for row in first.rows]
            say("estune: checking that the same prompts give the same answers twice")
            reproducible = engine.check_reproducible(members, prompts, sampling)
        run.begin(engine, engine.facts.header, reproducible, facts)
        keep_trackers(run.path, {**trackers, **started})
        replayed, last_move = run.recover(engine)
        if run.steps_done:
            refuse_broken_theta(args, engine, train_prompts, run.steps_done)

        def between_tokens() -> bool:
            if panel is not None:
                panel.tick()
            return stop.requested()

        session = Session(
            args=args,
            run=run,
            engine=engine,
            evaluator=Evaluator(
                engine, pool, args.response_prefix, between_tokens, panel.members_done if panel else lambda done: None
            ),
            panel=panel,
            repository=repository,
            accuracy_pool=accuracy_pool,
            rewards=trainer.rewards,
            train_rows=trainer.train_rows,
            train_prompts=train_prompts,
            eval_rows=trainer.eval_rows,
            eval_prompts=eval_prompts,
            batches=batches,
            monitors=monitors,
            checksum=engine.checksum(),
            tokens=run.tokens_before(),
            train_time_s=run.train_time_s(),
            **run_so_far(args, run),
            asks_theta_first=trainer.asks_theta_first,
        )
        session.announce(replayed)
        unlogged = run.unlogged_step()
        if unlogged is not None and last_move is not None:
            session.log_again(unlogged, last_move)
        yield session


def hub_repository(args: ESConfig) -> str:
    """Make or find the hub repository of a run; return its full name.

    Raises:
        UserError: the hub does not answer, or refuses.
    """
    return open_repository(repository_of(args.hub_model_id, args.output_dir), args.hub_private_repo)


def start_workers(
    stack: ExitStack, trainer: ESTrainer, args: ESConfig, *, grades: bool
) -> tuple[RewardPool, RewardPool | None]:
    """Start the workers of rewards, and with ``grades`` those of accuracy; warn of what a run should not have.

    Args:
        stack: closes them.
        trainer: whose rewards and rows they are.
        args: of the run.
        grades: whether accuracy will be asked for.
    """
    pool = stack.enter_context(setup.reward_pool(args, trainer.rewards.funcs, trainer.rewards.names))
    accuracy_pool = None
    if trainer.rewards.accuracy is not None and grades:
        accuracy_pool = stack.enter_context(setup.reward_pool(args, [trainer.rewards.accuracy], ["accuracy"], 1))
    if args.reward_isolation == "inline":
        note(INLINE_WARNING)
    if trainer.eval_rows and (shared := shared_prompts(trainer.train_rows, trainer.eval_rows)):
        warn(f"{shared} of {len(trainer.eval_rows)} held-out rows have a prompt that is trained on")
    return pool, accuracy_pool


def _keep_base(trainer: ESTrainer, run: Run) -> None:
    """Keep theta_0 in the run where it has no files of its own, and open it for anchored decay.

    A module that was given may have moved since the run began, so a resume reads theta_0 from the run.
    """
    engine, own = trainer.engine, run.path / BASE_DIRECTORY
    if trainer.has_module and not run.is_new:
        engine.load_weights(own)
    anchored = run.args.weight_decay_anchor == "base"
    source = None if trainer.has_module else local_directory(run.args.model)
    is_open = anchored and source is not None and engine.open_anchor([source])
    if trainer.has_module or (anchored and not is_open):
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
