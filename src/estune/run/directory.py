"""One run on disk: its directory, journal, checkpoints and metrics, opened for a new run or for a resume.

The order of writes makes a kill at any instant harmless. A step writes its metrics to `pending.jsonl`, its completions,
and its step line (fsync). Then theta moves in memory, the metrics are logged, and `pending.jsonl` is deleted.
Evaluation, checkpoint and checkpoint line follow, each only if it is missing. With several workers the evaluation
follows within the next step.
`Run.recover` rebuilds theta from the newest checkpoint and the journal; the training loop then writes what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from estune.config import ESConfig, SizedConfig
from estune.console import counted, open_missing_descriptors, warn
from estune.environment import environment, processor, versions
from estune.errors import ExternalError, UserError
from estune.es.noise import NOISE_VERSION
from estune.es.replica import Replica
from estune.es.theta import Moved
from estune.files import try_lock, write_json
from estune.models.names import local_directory
from estune.run import checkpoint
from estune.run.best import choose, chooses, evaluations_of, stops_early
from estune.run.checkpoint import BASE_DIRECTORY, State
from estune.run.journal import JOURNAL_FILE, PENDING_FILE, HeaderFacts, Journal, Pending
from estune.run.origin import ORIGIN_FILE, is_engine_name, keep_origin, located, same_names
from estune.run.records import METRICS_FILE, cut_back, evaluation_path, read_metrics, train_time_s
from estune.run.replay import check_base, check_parameters, replay_steps
from estune.run.resume import (
    Facts,
    adopt,
    check_facts,
    has_sources,
    warn_of_held_out,
    warn_of_other_engine,
    warn_of_processor,
    warn_of_versions,
)
from estune.run.saved_config import (
    CONFIG_FILE,
    METHOD_FILE,
    has_sound_config,
    read_config,
    read_stored,
    stored_config,
)

CLEARING_FILE = ".clearing"  # exists while an old run is being deleted
ENVIRONMENT_FILE = "env.json"
# File names that estune writes into a run directory (OF_RUN), and the model's files (WRITTEN). `--overwrite` deletes
# nothing else.
OF_RUN = (
    ".*", CONFIG_FILE, JOURNAL_FILE, PENDING_FILE, METRICS_FILE, ENVIRONMENT_FILE, ORIGIN_FILE, "eval",
    "completions", "plots", "base",
    "checkpoint-*", "README.md", "report.html", "trackers.json", "tensorboard", "wandb", METHOD_FILE, "trainer",
)  # fmt: skip
WRITTEN = (
    *OF_RUN, "es_state.json", "trainer_state.json", "config.json", "generation_config.json", "*.safetensors",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates",
    "vocab.*", "merges.txt", "*.model", "*.spm", "configuration_*.py", "modeling_*.py", "tokenization_*.py",
)  # fmt: skip


@dataclass
class Run:
    """An open run directory; ``steps_done`` steps are in its journal."""

    path: Path
    args: SizedConfig
    lock: int  # descriptor that holds the directory's lock
    found: Journal | None = None  # the journal as opened; None for a new run, until `begin` writes its header
    pending: Pending = field(init=False)

    def __post_init__(self) -> None:
        self.pending = Pending(self.path / PENDING_FILE)

    @property
    def is_new(self) -> bool:
        """Whether the run has no journal yet."""
        return self.found is None

    @property
    def journal(self) -> Journal:
        """The journal; call `begin` first."""
        assert self.found is not None, "the journal is not begun"
        return self.found

    @property
    def steps_done(self) -> int:
        """Steps whose line is in the journal."""
        return len(self.found.steps) if self.found else 0

    def files(self) -> dict[Path, int]:
        """Return the inode of each path in the directory, at any depth; links are not followed."""
        return {path: path.lstat().st_ino for path in self.path.rglob("*")}

    def clear(self, old: Mapping[Path, int]) -> None:
        """Delete the ``old`` files of the directory: a run to overwrite, or the files of a killed start.

        Newer files stay, because trackers have already started. The journal is deleted first and the configuration
        last. A marker file exists meanwhile, so that a new run can start after a kill in between.
        """
        mark = self.path / CLEARING_FILE
        mark.touch()
        old = {path: inode for path, inode in old.items() if path != mark}
        order = {self.path / JOURNAL_FILE: 0, self.path / CONFIG_FILE: 2}
        for path in sorted(old, key=lambda path: (order.get(path, 1), -len(path.parts))):  # contents first
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # it holds newer files
                    path.rmdir()
            elif (path.is_symlink() or path.exists()) and path.lstat().st_ino == old[path]:
                path.unlink()
        mark.unlink()

    def begin(self, replica: Replica, engine: Mapping[str, Any], reproducible: bool | None, facts: Facts) -> None:
        """Write a new run's configuration, environment and journal header; on a resume, compare them with the old ones.

        Args:
            replica: holds the base model's weights.
            engine: the engine's facts, for the header.
            reproducible: whether a member gave the same tokens twice; None on a resume.
            facts: the facts of the run beside its options.

        Raises:
            UserError: the base model is not the journal's.
            ExternalError: another fact differs that a resume cannot change (`estune.run.resume`).
        """
        fingerprint = replica.fingerprint()
        values = dataclasses.asdict(stored_config(self.args))
        if self.found is None:
            keep_origin(self.path, values, held_out=facts.identity["held_out"])
            write_json(self.path / CONFIG_FILE, values)
            write_json(self.path / ENVIRONMENT_FILE, environment())
            header: HeaderFacts = {
                "noise_version": NOISE_VERSION,
                "base": {"model": self.args.model, "fingerprint": fingerprint},
                "config": self.args.trajectory(),
                "engine": dict(engine),
                "rollouts": "reproducible" if reproducible else "not reproducible",
                "parameters": [(spec.name, list(spec.shape), spec.kind) for spec in replica.specs],
                "versions": versions(),
                **facts.stored(),
            }
            self.found = Journal.create(self.path / JOURNAL_FILE, header)
        else:
            check_base(self.found, fingerprint, self.args.model)
            check_parameters(self.found, replica.specs)
            rows_choose = chooses(self.args)
            check_facts(self.found.header, facts, rows_choose=rows_choose)
            warn_of_other_engine(self.found.header["engine"], engine)
            warn_of_versions(self.found.header["versions"], versions())
            warn_of_processor(_processor_of(self.path), processor())
            if self.found.header.get("identity", {}).get("held_out") is None:
                warn_of_held_out(self.path, facts, rows_choose=rows_choose)
            keep_origin(self.path, values, self.found.header["config"], facts.identity["held_out"])
            write_json(self.path / CONFIG_FILE, values)

    def recover(self, replica: Replica) -> tuple[int, Moved | None]:
        """Bring theta to the journal's last step; return the number of steps replayed, and the last update's `Moved`.

        The replay starts from the newest checkpoint with the right fingerprint, else from the base model in the engine.
        Newer damaged checkpoints are written again from the journal, with one warning.
        """
        checkpoint.remove_partial(self.path)
        cut_back(self.path, self.steps_done)
        start, damaged = self._newest_whole(replica)
        if damaged:
            listed = "; ".join(f"{checkpoint.checkpoint_path(self.path, step).name}: {why}" for step, why in damaged)
            source = f"checkpoint-{start}" if start else "the base model"
            warn(f"damaged, and written again from {source} and the journal: {listed}")
        moved, at = None, start
        for step, _ in reversed(damaged):
            moved, at = replay_steps(self.journal, replica, at, step) or moved, step
            if step in self.journal.checkpoints:
                self.save(replica, final=False, steps_done=step)
            else:
                checkpoint.remove(self.path, step)
        moved = replay_steps(self.journal, replica, at, self.steps_done) or moved
        if moved is not None:
            self.refuse_diverged(moved)
        return self.steps_done - start, moved

    def refuse_diverged(self, moved: Moved) -> None:
        """Raise UserError if the last step's update made theta infinite or NaN."""
        if not math.isfinite(moved.norm):
            raise UserError(
                f"theta diverged in step {self.steps_done}: lower learning_rate; earlier checkpoints are whole"
            )

    def _newest_whole(self, replica: Replica, last: int | None = None) -> tuple[int, list[tuple[int, str]]]:
        """Load the newest undamaged checkpoint, if there is one. Damaged checkpoints leave theta untouched.

        Args:
            replica: holds theta.
            last: checkpoints of later steps are left out.

        Returns:
            The loaded checkpoint's steps (0: none was loaded), and newer damaged checkpoints as (steps, reason).
        """
        damaged: list[tuple[int, str]] = []
        for steps_done, directory in reversed(checkpoint.directories(self.path)):
            if last is not None and steps_done > last:
                continue
            if steps_done > self.steps_done:
                warn(
                    f"{directory.name} is later than step {self.steps_done}, the journal's last: the journal lost "
                    "lines, and their steps are done again"
                )
                continue
            state = checkpoint.read_state(directory)
            if state is None:
                damaged.append((steps_done, f"{checkpoint.ES_STATE} cannot be read"))
                continue
            reason = checkpoint.damage(directory, replica.specs, state)
            wanted = self.journal.checkpoints.get(steps_done, state["fingerprint"])
            if reason is None and state["fingerprint"] != wanted:
                reason = f"{checkpoint.ES_STATE} does not have the journal's fingerprint"
            if reason is None and not self._belongs(state, steps_done):
                reason = "it belongs to another run"
            if reason is None:
                replica.load_weights(directory)
                return steps_done, damaged
            damaged.append((steps_done, reason))
        return 0, damaged

    def unlogged_step(self) -> dict[str, Any] | None:
        """Return the last step's metrics if the run was killed after its step line and before its metrics line."""
        note = self.pending.read_note(self.journal.head_before_step) if self.steps_done else None
        logged = {record["step"] for record in read_metrics(self.path) if "eval_reward" not in record}
        return None if self.steps_done in logged else note

    def _belongs(self, state: State, steps_done: int) -> bool:
        """Return whether a checkpoint's checksum is the one that the journal's next step records."""
        if steps_done == len(self.journal.steps):
            return True
        return bool(self.journal.steps[steps_done]["checksum"] == state.get("checksum"))

    def save(
        self,
        replica: Replica,
        final: bool,
        steps_done: int | None = None,
        best: checkpoint.Best | None = None,
        *,
        asked: bool = False,
    ) -> None:
        """Write the checkpoint after ``steps_done`` steps (default: all steps), or the finished model to the root.

        ``best`` is the choice of the finished model, if it was chosen; theta is then that of its step. ``asked`` says
        that a callback has asked for the checkpoint.
        """
        steps_done = self.steps_done if steps_done is None else steps_done
        if final:
            step = steps_done if best is None else best["step"]
            checkpoint.save_final(self.path, replica, step, self.args.max_steps, best)
            return
        checkpoint.save_checkpoint(self.path, replica, steps_done, self.args.max_steps, asked=asked)
        replica.saved(checkpoint.checkpoint_path(self.path, steps_done))

    def rebuild(self, replica: Replica, step: int) -> None:
        """Move theta back to an earlier step: from the nearest checkpoint or theta_0, by a replay of the journal.

        Args:
            replica: holds theta; its anchor is open (`Replica.open_anchor`).
            step: number of steps, fewer than the journal has.

        Raises:
            UserError: theta does not have the journal's checksum.
        """
        start, _ = self._newest_whole(replica, step)
        if not start:
            replica.load_anchor()
        replay_steps(self.journal, replica, start, step)
        if replica.checksum() != self.journal.steps[step]["checksum"]:
            raise UserError(f"theta after {counted(step, 'step')} is not what the journal says it was")

    def record_checkpoint(self, replica: Replica) -> None:
        """Write the checkpoint line of ``steps_done``, once."""
        if self.steps_done not in self.journal.checkpoints:
            self.journal.append_checkpoint(self.steps_done, replica.fingerprint())

    def has_checkpoint(self) -> bool:
        """Return whether the checkpoint of ``steps_done`` is written and journalled."""
        return (
            self.steps_done in self.journal.checkpoints
            and checkpoint.checkpoint_path(self.path, self.steps_done).is_dir()
        )

    def tokens_before(self) -> int:
        """Tokens that the journalled steps have processed."""
        return sum(record["tokens"] for record in self.journal.steps)

    def train_time_s(self) -> float:
        """Return the seconds of training in the metrics."""
        return train_time_s(self.path)

    def close(self) -> None:
        """Release the directory's lock; delete the directory if it is empty."""
        if not any(self.path.iterdir()):
            self.path.rmdir()
        os.close(self.lock)


def open_run(args: SizedConfig, given: ESConfig) -> Run:
    """Open ``args.output_dir`` for a new run, or with ``resume`` for the run in it.

    ``given`` is the configuration before its `auto` values were resolved; a resume keeps the run's resolved values.

    Raises:
        UserError: the directory holds another run and neither resume nor overwrite was given, another process holds its
            lock, the journal is damaged, or the configuration differs in an option that a resume must not change.
    """
    open_missing_descriptors()  # else the journal could get the number of stdout
    assert args.output_dir is not None
    path = Path(args.output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file")
    if args.overwrite and path.exists():
        refuse_overwrite(path, args)
    occupied = path.exists() and any(path.iterdir())
    if occupied and not (args.resume or args.overwrite):
        if not is_ours(path):
            raise UserError(f"output_dir {path} holds other files: give another --output_dir")
        raise UserError(f"output_dir {path} holds another run: give --resume, --overwrite or another --output_dir")
    path.mkdir(parents=True, exist_ok=True)
    lock = lock_directory(path)
    try:
        journal = None if args.overwrite else Journal.open(path / JOURNAL_FILE)
        if journal is None:
            if not is_ours(path):
                raise UserError(f"output_dir {path} holds other files and no estune run: give another --output_dir")
            _refuse_other_method(path, args)
            if args.method == "es" and args.resume:
                _refuse_lost_journal(path)
            return Run(path, args, lock)
        args = adopt(args, journal.header["config"], given, has_sources(journal.header))
        if len(journal.steps) > args.max_steps:
            raise ExternalError(
                f"{path} already has {counted(len(journal.steps), 'step')}, more than max_steps {args.max_steps}"
            )
        _refuse_other_decoding(path, args)
        return Run(path, args, lock, journal)
    except BaseException:
        os.close(lock)
        raise


def _refuse_other_method(path: Path, args: ESConfig) -> None:
    """Raise ExternalError if the run in the directory is of another method; a baseline's run has no journal."""
    if args.resume and (path / CONFIG_FILE).exists():
        method = read_config(path).get("method", "es")
        if method != args.method:
            raise ExternalError(f"a resume cannot change method from {method!r} to {args.method!r}")


def _refuse_other_decoding(path: Path, args: ESConfig) -> None:
    """Raise ExternalError if evaluations choose a step and would no longer be decoded as those already made."""
    then = (read_stored(path / CONFIG_FILE) or {}).get("eval_greedy", args.eval_greedy)
    if chooses(args) and then != args.eval_greedy and evaluations_of(path):
        raise ExternalError(
            f"a resume cannot change eval_greedy from {then} to {args.eval_greedy}, because evaluations choose a step"
        )


def _refuse_lost_journal(path: Path) -> None:
    """Raise UserError if the run did steps but its journal is gone: a new run would delete the remaining files."""
    if (path / CLEARING_FILE).exists():
        return
    kept = [directory.name for _, directory in checkpoint.directories(path)]
    if kept or (path / checkpoint.ES_STATE).exists() or read_metrics(path):
        source = path / kept[-1] if kept else path
        raise UserError(
            f"{path} holds a run whose {JOURNAL_FILE} is missing or empty: start another run from its weights with "
            f"--model {source}, or begin again with --overwrite"
        )


def refuse_overwrite(path: Path, args: ESConfig) -> None:
    """Raise UserError if --overwrite would delete an input of the new run, or files that estune did not write."""
    if any(path.iterdir()) and not is_ours(path):
        raise UserError(f"output_dir {path} holds other files: give another --output_dir")
    model = None if is_engine_name(args.engine, args.model) else args.model
    code = [("engine", args.engine), *(("reward_funcs", func) for func in args.reward_funcs or [])]
    given = [("model", model), ("dataset_name", args.dataset_name)]
    given += [(option, name.rpartition(":")[0] or name) for option, name in code if ".py:" in name or "/" in name]
    for option, value in given:
        if value and Path(value).exists() and Path(value).resolve().is_relative_to(path.resolve()):
            raise UserError(f"--overwrite would delete {value}, which {option} names")
    for child in path.iterdir():
        if not any(fnmatch(child.name, pattern) for pattern in WRITTEN):
            raise UserError(f"--overwrite will not delete {child}, which estune did not write")


def is_ours(path: Path) -> bool:
    """Return whether a directory holds a run, or only the files of a start that was killed early."""
    names = {child.name for child in path.iterdir() if not child.name.startswith(".")}
    early = {BASE_DIRECTORY, "tensorboard", "wandb", ORIGIN_FILE}  # written before the configuration
    return names <= early or bool(names & {CONFIG_FILE, JOURNAL_FILE})


def is_finished(path: Path, args: ESConfig, given: ESConfig) -> bool:
    """Return whether a run directory holds a finished run and the model that ``args`` want of it. Nothing is written.

    A run is finished after ``max_steps`` or ``max_time_s``, or when ``early_stopping_patience`` is used up.

    Raises:
        UserError: the run is finished, but its configuration is not ``args``.
    """
    state = checkpoint.read_state(path)
    if state is None or checkpoint.leftovers(path):
        return False
    journal = Journal.open(path / JOURNAL_FILE, repair=False)
    if journal is None or not _is_at_its_end(path, args, len(journal.steps)):
        return False
    steps_done = len(journal.steps)
    if steps_done not in journal.checkpoints:
        return False
    best = choose(args, evaluations_of(path), steps_done)
    if best != state.get("best") or state["step"] != (steps_done if best is None else best["step"]):
        return False
    if state["step"] == steps_done:
        is_of_journal = state["fingerprint"] == journal.checkpoints[steps_done]
    else:
        is_of_journal = state["checksum"] == journal.steps[state["step"]]["checksum"]
    if not is_of_journal:
        warn(f"{checkpoint.ES_STATE} in {path} is damaged: the finished model is written again")
        return False
    adopt(args, journal.header["config"], given, has_sources(journal.header))
    if not has_sound_config(path, journal.header) or not same_names(located(journal.header["config"], path), args):
        return False  # opening the run rewrites the file and compares the content behind changed names
    if not checkpoint.is_whole_model(path, state, journal.header["parameters"]):
        warn(f"the finished model in {path} is damaged or lacks a file; the model is written again")
        return False
    return True


def _is_at_its_end(path: Path, args: ESConfig, steps_done: int) -> bool:
    """Return whether a run of ``steps_done`` steps takes no further step, and has the evaluation of its end."""
    if args.load_best_model_at_end and not evaluation_path(path, steps_done).exists():
        return False
    used_up = bool(args.max_time_s and train_time_s(path) >= args.max_time_s)
    if steps_done == args.max_steps or used_up:
        return True
    return steps_done < args.max_steps and stops_early(args, evaluations_of(path), steps_done)


def lock_directory(path: Path) -> int:
    """Take the directory's lock, held until the descriptor closes or the process dies."""
    descriptor = try_lock(path)
    if descriptor is None:
        raise ExternalError(f"another process is running {path}")
    return descriptor


def _processor_of(path: Path) -> str | None:
    """Return the processor that a run began on; None if it is unknown."""
    try:
        name = json.loads((path / ENVIRONMENT_FILE).read_text(encoding="utf-8"))["processor"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name)


def refuse_unfinished(model: str) -> None:
    """Refuse to load a run that stopped before it wrote its finished model.

    Raises:
        UserError: ``model`` is such a run's directory; the message names its newest checkpoint.
    """
    directory = local_directory(model)
    if directory is None or (directory / "config.json").exists() or not (directory / JOURNAL_FILE).exists():
        return
    journal = Journal.open(directory / JOURNAL_FILE, repair=False)
    if journal is None:
        return
    max_steps = (read_stored(directory / CONFIG_FILE) or {}).get("max_steps", "its")
    kept = checkpoint.checkpoints(directory)
    instead = (
        f"evaluate {Path(model) / kept[-1][1].name}" if kept
        else f"rebuild its weights with estune replay --run {model} --output_dir OUT"
    )  # fmt: skip
    raise UserError(
        f"{model} is a run that stopped after {len(journal.steps)} of {max_steps} steps and has no finished model: "
        f"finish it with --resume, or {instead}"
    )
