"""One run on disk: its directory, journal, checkpoints and metrics, opened for a new run or for a resume.

The order of writes makes a kill at any instant harmless. A step writes: its step line (fsync), theta in memory, its
metrics; then it deletes `pending.jsonl`. Evaluation, checkpoint and checkpoint line follow, each only if it is missing.
`Run.recover` rebuilds theta from the newest checkpoint and the journal; the training loop then writes what is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from estune.config import FIELDS, RESUMABLE, ESConfig, coerce, default_of
from estune.console import open_missing_descriptors, warn
from estune.environment import environment, processor, versions
from estune.errors import ExternalError, UserError
from estune.es.noise import NOISE_VERSION
from estune.es.replica import Replica
from estune.es.theta import Moved
from estune.es.types import ParameterSpec
from estune.files import read_json_object, try_lock, write_json
from estune.models.names import local_directory
from estune.run import checkpoint
from estune.run.checkpoint import BASE_DIRECTORY
from estune.run.journal import Journal, Pending, recorded_update
from estune.run.records import METRICS_FILE, cut_back, read_metrics
from estune.run.resume import (
    ORIGIN_FILE,
    Facts,
    check_facts,
    keep_origin,
    located,
    may_lead_to_the_same,
    same_names,
    warn_of_held_out,
    warn_of_processor,
    warn_of_versions,
)

CONFIG_FILE = "es_config.json"
JOURNAL_FILE = "journal.jsonl"
PENDING_FILE = "pending.jsonl"
CLEARING_FILE = ".clearing"  # exists while an old run is being deleted
ENVIRONMENT_FILE = "env.json"
METHOD_FILE = "method.json"  # of a baseline's run, which has no journal
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
    args: ESConfig
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
            header = {
                "noise_version": NOISE_VERSION,
                "base": {"model": self.args.model, "fingerprint": fingerprint},
                "config": self.args.trajectory(),
                "engine": dict(engine),
                "rollouts": "reproducible" if reproducible else "not reproducible",
                "parameters": [[spec.name, list(spec.shape), spec.kind] for spec in replica.specs],
                "versions": versions(),
                **facts.as_dict(),
            }
            self.found = Journal.create(self.path / JOURNAL_FILE, header)
        else:
            check_base(self.found, fingerprint, self.args.model)
            check_parameters(self.found, replica.specs)
            check_facts(self.found.header, facts)
            warn_of_other_engine(self.found.header["engine"], engine)
            warn_of_versions(self.found.header["versions"], versions())
            warn_of_processor(_processor_of(self.path), processor())
            if self.found.header.get("identity", {}).get("held_out") is None:
                warn_of_held_out(self.path, facts)
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
            refuse_diverged(moved, self.steps_done)
        return self.steps_done - start, moved

    def _newest_whole(self, replica: Replica) -> tuple[int, list[tuple[int, str]]]:
        """Load the newest undamaged checkpoint, if there is one. Damaged checkpoints leave theta untouched.

        Returns:
            The loaded checkpoint's steps (0: none was loaded), and newer damaged checkpoints as (steps, reason).
        """
        damaged: list[tuple[int, str]] = []
        for steps_done, directory in reversed(checkpoint.directories(self.path)):
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

    def _belongs(self, state: Mapping[str, Any], steps_done: int) -> bool:
        """Return whether a checkpoint's checksum is the one that the journal's next step records."""
        if steps_done == len(self.journal.steps):
            return True
        return bool(self.journal.steps[steps_done]["checksum"] == state.get("checksum"))

    def save(self, replica: Replica, final: bool, steps_done: int | None = None) -> None:
        """Write the checkpoint after ``steps_done`` steps (default: all steps), or the finished model to the root."""
        steps_done = self.steps_done if steps_done is None else steps_done
        state = {"step": steps_done, "fingerprint": replica.fingerprint(), "checksum": replica.checksum()}
        trainer_state = {"global_step": steps_done, "max_steps": self.args.max_steps, "log_history": []}
        if final:
            checkpoint.save_final(self.path, replica, state, trainer_state)
        else:
            checkpoint.save_checkpoint(self.path, steps_done, replica, state, trainer_state)

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


def train_time_s(path: Path) -> float:
    """Return the seconds of training in a run's metrics: steps, without evaluations and saving."""
    return max((record.get("train_time_s") or 0.0 for record in read_metrics(path)), default=0.0)


def open_run(args: ESConfig, given: ESConfig) -> Run:
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
            raise ExternalError(f"{path} already has {len(journal.steps)} steps, more than max_steps {args.max_steps}")
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
    given = [("model", args.model), ("dataset_name", args.dataset_name)]
    given += [("reward_funcs", func.rpartition(":")[0]) for func in args.reward_funcs or []]
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
    """Return whether a run directory holds a finished run of ``args.max_steps`` steps. Nothing is written.

    Raises:
        UserError: the run is finished, but its configuration is not ``args``.
    """
    max_steps = args.max_steps
    state = checkpoint.read_state(path)
    if state is None or checkpoint.leftovers(path):
        return False
    if args.max_time_s and train_time_s(path) >= args.max_time_s:
        max_steps = state["step"]
    journal = Journal.open(path / JOURNAL_FILE, repair=False)
    if journal is None or not state["step"] == len(journal.steps) == max_steps:
        return False
    if max_steps not in journal.checkpoints:
        return False
    if state["fingerprint"] != journal.checkpoints[max_steps]:
        warn(f"{checkpoint.ES_STATE} in {path} is damaged: the finished model is written again")
        return False
    adopt(args, journal.header["config"], given, has_sources(journal.header))
    if not has_sound_config(path, journal.header) or not same_names(located(journal.header["config"], path), args):
        return False  # opening the run rewrites the file and compares the content behind changed names
    if not checkpoint.is_whole_model(path, state, journal.header["parameters"]):
        warn(f"the finished model in {path} is damaged or lacks a file; the model is written again")
        return False
    return True


def lock_directory(path: Path) -> int:
    """Take the directory's lock, held until the descriptor closes or the process dies."""
    descriptor = try_lock(path)
    if descriptor is None:
        raise ExternalError(f"another process is running {path}")
    return descriptor


def refuse_rows_from_python(args: ESConfig) -> None:
    """Refuse to resume a run whose rows came from Python, if no rows are given now.

    Raises:
        ExternalError: the message says how to continue such a run.
    """
    path = Path(args.output_dir or "")
    if args.resume and (path / CONFIG_FILE).exists():
        stored = read_config(path)
        if stored.get("task") is None and stored.get("dataset_name") is None:
            raise ExternalError(
                f"the rows of {path} were given from Python: run that script again, with "
                f"ESConfig(resume=True, output_dir={str(path)!r})"
            )


def has_sources(header: Mapping[str, Any]) -> bool:
    """Return whether a journal's header, or a `method.json`, holds hashes of the reward functions' source."""
    return "reward_sources" in header.get("identity", {})


def adopt(args: ESConfig, stored: Mapping[str, Any], given: ESConfig, has_sources: bool = True) -> ESConfig:
    """Return ``args`` with the options that a resume must keep taken from the journal's header.

    A model, a dataset or a reward may have another name: its content is compared after loading.

    Raises:
        ExternalError: a given value differs from the run's.
    """
    taken: dict[str, Any] = {}
    for name, value in stored.items():
        now = getattr(args, name)
        if now == value:
            continue
        if name == "model" and given.model == "auto":  # a module from Python: the run directory holds its base
            continue
        if getattr(given, name) not in (None, "auto"):
            if may_lead_to_the_same(name, value, now, has_sources):
                continue
            free = ", ".join(sorted(RESUMABLE - {"output_dir", "run_name", "resume", "overwrite", "dry_run"}))
            raise ExternalError(f"a resume cannot change {name} from {value!r} to {now!r}; it can change {free}")
        taken[name] = value
    return dataclasses.replace(args, **taken)


def stored_config(args: ESConfig) -> ESConfig:
    """Return the configuration for `es_config.json`, without the options resume, overwrite and dry_run."""
    return dataclasses.replace(args, resume=False, overwrite=False, dry_run=False)


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's `es_config.json`, with missing, unknown and wrong options repaired from its journal's header.

    The header decides the options that define the trajectory; a model, a dataset and rewards may have another name in
    the file. A warning names the repaired options.

    Raises:
        UserError: neither file can be read; or there is no journal, and an option is missing, unknown or wrong.
    """
    file = path / CONFIG_FILE
    values = _stored(file)
    try:
        journal = Journal.open(path / JOURNAL_FILE, repair=False)
    except UserError:
        if values is None:
            raise
        journal = None  # opening the run will report the damage
    if journal is None:
        if values is None:
            if not file.exists():
                raise UserError(f"{path} holds no run to resume (no {CONFIG_FILE})")
            raise UserError(f"{file} is not a JSON object, and there is no journal with the run's options")
        _refuse_garbled(file, values)
        return values
    if values is None:
        warn(
            f"{file} is missing or damaged: the options are the journal's, and those that a resume may change have "
            "their defaults"
        )
        return dict(journal.header["config"])
    mended, wrong = _mended(values, journal.header)
    if wrong:
        warn(
            f"{file} is damaged ({', '.join(wrong)}): options in the journal have the journal's values, other damaged "
            "options have their defaults"
        )
    return mended


def _stored(file: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(file)
    except (OSError, ValueError):
        return None


def _refuse_garbled(file: Path, values: Mapping[str, Any]) -> None:
    """Raise UserError if an option of a configuration is missing, unknown or wrong; for runs without a journal."""
    unknown = [name for name in values if name not in FIELDS]
    lost = [name for name in FIELDS if name not in values]
    if unknown or lost:
        what = f"has an unknown option {unknown[0]!r}" if unknown else f"lacks the option {lost[0]!r}"
        raise UserError(f"{file} is damaged: it {what}")
    try:
        ESConfig.from_mapping(values)
    except UserError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def _mended(values: Mapping[str, Any], header: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a run's repaired options, and the options missing, unknown or wrong in `es_config.json`."""
    truth = header["config"]
    kept: dict[str, Any] = dict(truth)
    wrong = [name for name in values if name not in FIELDS]
    for name in FIELDS:
        value = values.get(name)
        if name not in values or not _fits(name, value):
            wrong.append(name)
        elif name not in truth or value == truth[name] or may_lead_to_the_same(
            name, truth[name], value, has_sources(header)
        ):  # fmt: skip
            kept[name] = coerce(name, value)
        else:
            wrong.append(name)
    try:
        ESConfig(**kept)
    except UserError:  # options that a resume may change are out of range, or contradict each other
        free = [name for name in kept if name in RESUMABLE and kept[name] != default_of(name)]
        kept = {name: value for name, value in kept.items() if name not in free}
        wrong += free
    return kept, wrong


def _fits(name: str, value: Any) -> bool:
    """Return whether an option's value has the option's type and is one of its choices."""
    try:
        converted = coerce(name, value)
    except UserError:
        return False
    choices = FIELDS[name].metadata["choices"]
    return not choices or converted in choices


def has_sound_config(path: Path, header: Mapping[str, Any]) -> bool:
    """Return whether a run's `es_config.json` needs no repair by `read_config`."""
    values = _stored(path / CONFIG_FILE)
    return values is not None and not _mended(values, header)[1]


def refuse_diverged(moved: Moved, steps_done: int) -> None:
    """Raise UserError if an update made theta infinite or NaN."""
    if not math.isfinite(moved.norm):
        raise UserError(f"theta diverged in step {steps_done}: lower learning_rate; earlier checkpoints are whole")


def _processor_of(path: Path) -> str | None:
    """Return the processor that a run began on; None if it is unknown."""
    try:
        name = json.loads((path / ENVIRONMENT_FILE).read_text(encoding="utf-8"))["processor"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name)


# Options that `estune evaluate` inherits from the run of its model: those that decide completions and their scores.
_INHERITED = (
    "apply_chat_template chat_template_kwargs system_prompt response_prefix stop_strings max_completion_length "
)
_INHERITED += "prompts_per_batch num_threads"
_SAMPLING = "temperature top_p top_k num_generations seed"


def run_of(model: str) -> Path | None:
    """Return the run directory that a model or a checkpoint belongs to; None if it belongs to no run."""
    return next((path for path in (Path(model), Path(model).parent) if (path / CONFIG_FILE).is_file()), None)


def inherited_settings(directory: Path, given: Collection[str]) -> dict[str, Any]:
    """Return the options that an evaluation inherits from the run of its model, without the options in ``given``.

    Task, data and rewards are inherited together: the run's rewards score other rows too, but another task has its own
    rewards.
    """
    stored = located(read_config(directory), directory)
    names = _INHERITED.split()
    es = stored.get("method", "es") == "es"  # other methods sample in training, and are evaluated greedily
    if es and not set(_SAMPLING.split()) & set(given):
        names += _SAMPLING.split()
    if not {"task", "dataset_name", "reward_funcs"} & set(given):
        names.append("task")
    if not {"task", "reward_funcs"} & set(given):
        names += ["reward_funcs", "reward_weights"]
    if not {"task", "dataset_name"} & set(given):
        names += ["dataset_name", "dataset_config", "dataset_test_split"]
    return {name: stored[name] for name in names if name in stored and name not in given}


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
    max_steps = (_stored(directory / CONFIG_FILE) or {}).get("max_steps", "its")
    kept = checkpoint.checkpoints(directory)
    instead = (
        f"evaluate {Path(model) / kept[-1][1].name}" if kept
        else f"rebuild its weights with estune replay --run {model} --output_dir OUT"
    )  # fmt: skip
    raise UserError(
        f"{model} is a run that stopped after {len(journal.steps)} of {max_steps} steps and has no finished model: "
        f"finish it with --resume, or {instead}"
    )


def check_base(journal: Journal, fingerprint: str, model: str) -> None:
    """Raise UserError if the base model is not the journal's."""
    wanted = journal.header["base"]["fingerprint"]
    if fingerprint != wanted:
        raise UserError(f"model {model} has fingerprint {fingerprint}, the journal was written on {wanted}")


def check_parameters(journal: Journal, specs: Sequence[ParameterSpec]) -> None:
    """Raise UserError if the engine would perturb other parameters than the journal's, or with another noise."""
    words = {False: "none", "full": "full", "lowrank": "lowrank"}
    # Journals of older versions store `true` for full noise.
    stored = {name: "full" if kind is True else kind for name, _, kind in journal.header["parameters"]}
    present = {spec.name: spec.kind for spec in specs}
    for name in sorted(stored.keys() | present.keys()):
        then, now = stored.get(name, False), present.get(name, False)
        if then != now:
            raise UserError(
                f"the noise of {name} was {words[then]} when the journal was written, and is {words[now]} now"
            )


def warn_of_other_engine(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn if device, dtype, architecture or shared forward passes changed. Journalled steps still replay exactly."""
    for name in ("device", "dtype", "architecture", "shared_forward"):
        if name in then and then[name] != now.get(name):
            warn(
                f"the run began with {name} {then[name]} and continues with {now.get(name)}: new rollouts may round "
                "differently"
            )


def replay_steps(journal: Journal, replica: Replica, start: int, stop: int) -> Moved | None:
    """Apply the journal's steps ``start`` to ``stop`` - 1 to theta; verify theta's checksum before each step.

    Returns:
        The last update's `Moved`, or None if there is no step.

    Raises:
        UserError: theta does not have the journal's checksum or fingerprint; the message names the step.
    """
    checksum = replica.checksum()
    moved = None
    for record in journal.steps[start:stop]:
        if checksum != record["checksum"]:
            raise UserError(f"theta before step {record['step']} is not what the journal says it was")
        moved = replica.apply(recorded_update(record, journal.header["config"]))
        checksum = moved.checksum
        if record["step"] + 1 < len(journal.steps) and checksum != journal.steps[record["step"] + 1]["checksum"]:
            raise UserError(f"theta after step {record['step']} is not what the journal says it was")
    if stop in journal.checkpoints and replica.fingerprint() != journal.checkpoints[stop]:
        raise UserError(f"theta after {stop} steps does not have the journal's fingerprint {journal.checkpoints[stop]}")
    return moved
