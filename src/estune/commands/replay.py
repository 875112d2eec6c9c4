"""`estune replay`: rebuild the weights of any step from base model and journal, and verify them."""

from __future__ import annotations

from pathlib import Path

from estune.config import SizedConfig
from estune.console import counted, say
from estune.errors import UserError
from estune.models.names import local_directory
from estune.rewards.loading import look_for_modules_in
from estune.run.checkpoint import BASE_DIRECTORY
from estune.run.journal import JOURNAL_FILE, Journal
from estune.run.origin import located, module_directories, refuse_lost
from estune.run.replay import check_base, check_parameters, replay_steps
from estune.train import setup


def replay_command(run: Path, step: int | None, output_dir: Path, model: str | None) -> int:
    """Rebuild the weights after ``step`` steps (None: all) from base model and journal, verify them, save them.

    Raises:
        UserError: there is no journal, the base is another one, or the weights differ from the journal's.
    """
    journal = Journal.open(run / JOURNAL_FILE, repair=False)
    if journal is None:
        raise UserError(f"{run} holds no journal to replay")
    step = len(journal.steps) if step is None else step
    if not 0 <= step <= len(journal.steps):
        raise UserError(f"step must lie between 0 and {len(journal.steps)}, the steps of the journal, not {step}")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"output_dir {output_dir} is not an empty directory")
    config = located({**journal.header["config"], "device": "auto"}, run)  # the bits are the same on every device
    refuse_lost({name: config[name] for name in ("model", "engine")}, run, () if model is None else ("model",))
    if model is not None:
        config["model"] = model
    look_for_modules_in(module_directories(run))
    args = SizedConfig.from_mapping(config, f"the journal of {run}")
    engine = setup.load_engine(args)
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
