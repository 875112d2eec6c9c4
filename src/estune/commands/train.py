"""`estune train`: the configuration from flags, file, stored run or preset, and the trainer of its method.

The configuration is checked before torch is imported, so that a wrong option is refused at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from estune.config import OF_WORKERS, ESConfig, coerce, read_config_file
from estune.console import print_result, say
from estune.errors import UserError

DEMO_PRESET = "demo"


def train_command(values: dict[str, Any]) -> int:
    """Train, or with ``dry_run`` print the resolved configuration; ``values`` holds the given options.

    Raises:
        UserError: an option, an input or the run directory is invalid.
    """
    args = train_config(values)
    from estune.es.types import num_parameters
    from estune.train import setup
    from estune.train.base_trainer import BaseTrainer
    from estune.train.trainer import ESTrainer

    trainer: BaseTrainer
    if args.method == "es":
        trainer = ESTrainer(args=args)
    else:
        from estune.baselines import BaselineTrainer

        trainer = BaselineTrainer(args=args)
    if args.dry_run:
        prompts = trainer.prepare()
        print_result(setup.resolve_with_engine(trainer.args, trainer.engine, prompts).to_json().rstrip("\n"))
        print_result(
            f"estune: {num_parameters(trainer.engine.specs):,} parameters, {len(trainer.train_rows)} training rows, "
            f"{len(trainer.eval_rows)} held out; nothing was written"
        )
        return 0
    trainer.train()
    return 0


def train_config(values: dict[str, Any]) -> ESConfig:
    """Return the configuration of `estune train`: flags over the run's own (resume), the file, or the preset."""
    flags = dict(values)
    file = flags.pop("config", None)
    from_file = read_config_file(file) if file else {}
    options = _merged(from_file, flags)
    base: dict[str, Any] = {}
    preset = None
    resuming = coerce("resume", options.get("resume", False)) and options.get("output_dir")
    run_files = [Path(str(options.get("output_dir"))) / name for name in ("es_config.json", "journal.jsonl")]
    if resuming and any(file.exists() for file in run_files):
        from estune.rewards.loading import look_for_modules_in
        from estune.run.origin import located, module_directories, refuse_lost
        from estune.run.saved_config import read_config

        run_dir = Path(str(options["output_dir"]))
        base = located(read_config(run_dir), run_dir)
        refuse_lost(base, run_dir, options)
        base["output_dir"] = str(run_dir)
        look_for_modules_in(module_directories(run_dir))
        if "engine" not in options:
            _check_engine(str(base.get("engine", "")), run_dir)
        stored_method, method = base.get("method", "es"), options.get("method", base.get("method", "es"))
        if method != stored_method:  # checked first, else options of one method are compared with those of another
            raise UserError(f"a resume cannot change method from {stored_method!r} to {method!r}")
    elif file is None and not options.keys() & {"model", "task", "dataset_name", "engine"}:
        if resuming:
            raise UserError(
                f"{options['output_dir']} holds no run to resume; to start a run there, give --task or a dataset"
            )
        if options.get("method", "es") != "es":
            raise UserError(
                f"the preset {DEMO_PRESET} is for es: give --task or --dataset_name for a run of method "
                f"{options['method']}"
            )
        preset, base = DEMO_PRESET, read_config_file(DEMO_PRESET)
    if "num_workers" in options and not coerce("num_workers", options["num_workers"]):
        base = {name: value for name, value in base.items() if name not in OF_WORKERS}  # they need workers
    base = _without_idle(base, options)
    args = ESConfig.from_mapping({**base, **options})
    args.validate_training()
    if preset is not None:
        say(f"estune: preset {preset} (give --task or --dataset_name for a run of your own)")
    return args


def _without_idle(base: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the run's own options without those that the given ``options`` have left without effect."""
    merged = {**base, **options}
    idle: tuple[str, ...] = ()
    if not coerce("early_stopping_patience", merged.get("early_stopping_patience", 0)):
        idle = ("early_stopping_threshold",)
        if not coerce("load_best_model_at_end", merged.get("load_best_model_at_end", False)):
            idle += ("metric_for_best_model", "greater_is_better")
    return {name: value for name, value in base.items() if name not in idle}


def _check_engine(engine: str, run_dir: Path) -> None:
    """Refuse a run's engine outside estune unless its files are those that the run began with; nothing is imported.

    Raises:
        UserError: a file differs from the journal's, or the journal has no hash of it.
    """
    from estune.rewards.sources import source_files
    from estune.run.journal import JOURNAL_FILE, Journal
    from estune.run.origin import is_foreign_engine, refuse_foreign_engine
    from estune.run.resume import check_engine_files

    if not is_foreign_engine(engine):
        return
    journal = Journal.open(run_dir / JOURNAL_FILE, repair=False)
    identity = journal.header.get("identity", {}) if journal is not None else {}
    if not check_engine_files(identity, re.split("[:.]", engine)[-1], source_files(engine)):
        refuse_foreign_engine(engine, run_dir)


def _merged(from_file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Return the file's values with the flags over them.

    If the file's output_dir is ``runs/<run_name>``, another --output_dir also drops the file's run_name.
    """
    directory, name = (coerce(field, from_file.get(field)) for field in ("output_dir", "run_name"))
    is_named_after_run = directory is not None and name is not None and Path(directory) == Path("runs") / name
    if is_named_after_run and "output_dir" in flags and "run_name" not in flags:
        return {**from_file, **flags, "run_name": None}
    return {**from_file, **flags}
