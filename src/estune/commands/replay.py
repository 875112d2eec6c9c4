"""`estune replay`: rebuild the weights of any step from base model and journal, and verify them."""

from __future__ import annotations

from pathlib import Path

from estune.config import SizedConfig, with_absent_options
from estune.console import counted, say
from estune.errors import UserError
from estune.models.names import local_directory
from estune.rewards.loading import look_for_modules_in
from estune.run.best import chosen_state
from estune.run.checkpoint import BASE_DIRECTORY
from estune.run.journal import JOURNAL_FILE, Journal
from estune.run.origin import is_foreign_engine, located, module_directories, refuse_foreign_engine, refuse_lost
from estune.run.replay import check_base, check_parameters, replay_steps
from estune.run.resume import warn_of_engine_source
from estune.train import setup


def replay_command(
    run: Path, step: int | None, output_dir: Path, model: str | None, engine_name: str | None = None
) -> int:
    """Rebuild the weights after ``step`` steps from base model and journal, verify them, save them.

    Args:
        run: the run's directory.
        step: number of steps; None: that of the run's model, else all.
        output_dir: a new or empty directory.
        model: the base model; None: where the run found it.
        engine_name: the engine; needed if the run's engine is outside estune.

    Raises:
        UserError: there is no journal, the base is another one, the weights differ from the journal's, or the run's
            engine is outside estune and ``engine_name`` is None.
    """
    journal = Journal.open(run / JOURNAL_FILE, repair=False)
    if journal is None:
        raise UserError(f"{run} holds no journal to replay")
    if step is None:
        chosen = chosen_state(run, journal)
        step = chosen["step"] if chosen else len(journal.steps)
    if not 0 <= step <= len(journal.steps):
        raise UserError(f"step must lie between 0 and {len(journal.steps)}, the steps of the journal, not {step}")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"output_dir {output_dir} is not an empty directory")
    config = located({**with_absent_options(journal.header["config"]), "device": "auto"}, run)  # same bits on each
    given = {"model": model, "engine": _engine_of(run, config["engine"], engine_name)}
    given = {name: value for name, value in given.items() if value is not None}
    refuse_lost({name: config[name] for name in ("model", "engine")}, run, given)
    config |= given
    look_for_modules_in(module_directories(run))
    args = SizedConfig.from_mapping(config, f"the journal of {run}")
    engine = setup.load_engine(args)
    warn_of_engine_source(journal.header.get("identity", {}), setup.engine_source(args, engine))
    check_base(journal, engine.fingerprint(), args.model)
    check_parameters(journal, engine.specs)
    if args.weight_decay_anchor == "base":
        kept = run / BASE_DIRECTORY
        source = kept if kept.exists() else local_directory(args.model)
        if source is not None:
            engine.open_anchor([source])
    replay_steps(journal, engine, 0, step)
    engine.save(output_dir, float32=False)
    proven = step < len(journal.steps) or step in journal.checkpoints
    unproven = f"replayed (step {step} is not verified: the run stopped before it saved a fingerprint of it)"
    how = "replayed and verified" if proven else unproven
    say(f"estune: {counted(step, 'step')} {how}, fingerprint {engine.fingerprint()}, in {output_dir}")
    return 0


def _engine_of(run: Path, recorded: str, given: str | None) -> str | None:
    """Return ``given``; raise UserError if the user must name the engine, or named one without effect."""
    if given is None:
        refuse_foreign_engine(recorded, run)
    elif not is_foreign_engine(recorded) and given != recorded:
        raise UserError(f"engine {given} has no effect: {run} was made with engine {recorded}")
    return given
