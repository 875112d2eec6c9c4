"""One run on disk: its directory, journal, checkpoints and metrics, opened fresh or where a killed run left off.

The order of writes is what makes a kill at any instant harmless. A step: step line (fsync), theta in memory, metrics,
pending removed. Afterwards, each only if it is not there yet: evaluation, checkpoint, checkpoint line. `Run.recover`
rebuilds theta from the newest checkpoint and the journal, then takes the same path.
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

from estune import checkpoint
from estune.checkpoint import BASE_DIRECTORY
from estune.config import RESUMABLE, ESConfig
from estune.console import open_missing_descriptors, warn
from estune.engines.base import Engine, ParameterSpec
from estune.environment import environment, versions
from estune.errors import Hindered, UserError
from estune.files import try_lock, write_json
from estune.journal import Journal, Pending, recorded_update
from estune.master import AnchorReader, Moved
from estune.noise import NOISE_VERSION
from estune.records import METRICS_FILE, cut_back, read_metrics

CONFIG_FILE = "es_config.json"
JOURNAL_FILE = "journal.jsonl"
PENDING_FILE = "pending.jsonl"
METHOD_FILE = "method.json"  # of a run that is not ES's: it has no journal
# What a run directory can hold of ours, and of the model's own files; `--overwrite` deletes nothing else.
OF_RUN = (
    ".*", CONFIG_FILE, JOURNAL_FILE, PENDING_FILE, METRICS_FILE, "env.json", "eval", "completions", "plots", "base",
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
    anchor: AnchorReader | None = None
    pending: Pending = field(init=False)

    def __post_init__(self) -> None:
        self.pending = Pending(self.path / PENDING_FILE)

    @property
    def is_new(self) -> bool:
        """Say whether no journal was begun yet."""
        return self.found is None

    @property
    def journal(self) -> Journal:
        """The journal; `begin` must have run."""
        assert self.found is not None, "the journal is not begun"
        return self.found

    @property
    def steps_done(self) -> int:
        """Steps whose line is in the journal."""
        return len(self.found.steps) if self.found else 0

    def files(self) -> dict[Path, int]:
        """Return what lies in the directory, at any depth, by inode; links are not followed."""
        return {path: path.lstat().st_ino for path in self.path.rglob("*")}

    def clear(self, old: Mapping[Path, int]) -> None:
        """Remove what a new run found in its directory: a run to overwrite, or what a killed start left.

        What came since (trackers start first) stays. The journal goes first and the configuration last, so that a kill
        in between leaves a directory to start in.
        """
        order = {self.path / JOURNAL_FILE: 0, self.path / CONFIG_FILE: 2}
        for path in sorted(old, key=lambda path: (order.get(path, 1), -len(path.parts))):  # what is inside comes first
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # something new is in it
                    path.rmdir()
            elif (path.is_symlink() or path.exists()) and path.lstat().st_ino == old[path]:
                path.unlink()

    def begin(self, engine: Engine, reproducible: bool | None, extra: Mapping[str, Any]) -> None:
        """Write a new run's configuration, environment and journal header; check an old one's base model.

        Raises:
            UserError: the base model is not the one of the journal.
        """
        fingerprint = engine.master.fingerprint()
        if self.found is None:
            write_json(self.path / CONFIG_FILE, dataclasses.asdict(stored_config(self.args)))
            write_json(self.path / "env.json", environment())
            header = {
                "noise_version": NOISE_VERSION,
                "base": {"model": self.args.model, "fingerprint": fingerprint},
                "config": self.args.trajectory(),
                "engine": engine.info(),
                "rollouts": "reproducible" if reproducible else "not reproducible",
                "parameters": [[spec.name, list(spec.shape), spec.kind] for spec in engine.master.specs],
                "versions": versions(),
                **extra,
            }
            self.found = Journal.create(self.path / JOURNAL_FILE, header)
        else:
            check_base(self.found, fingerprint, self.args.model)
            check_parameters(self.found, engine.master.specs)
            for name, value in extra.items():
                if self.found.header[name] != value:
                    raise Hindered(f"a resume cannot change {name} from {self.found.header[name]} to {value}")
            warn_of_other_engine(self.found.header["engine"], engine.info())
            write_json(self.path / CONFIG_FILE, dataclasses.asdict(stored_config(self.args)))

    def recover(self, engine: Engine) -> tuple[int, Moved | None]:
        """Bring theta to the journal's last step; return how many journalled steps were replayed, and the last move.

        The newest checkpoint that passes its fingerprint is the start, else the base model that the engine holds.
        """
        checkpoint.remove_partial(self.path)
        cut_back(self.path, self.steps_done)
        start = 0
        for steps_done, directory in reversed(checkpoint.checkpoints(self.path)):
            state = checkpoint.read_state(directory)
            if state is None or steps_done > self.steps_done or not self._belongs(state, steps_done):
                continue
            checkpoint.load_master(directory, engine.master)
            if engine.master.fingerprint() != state["fingerprint"]:
                raise UserError(f"{directory} does not hold the weights its es_state.json says; delete it to go on")
            start = steps_done
            break
        moved = replay_steps(self.journal, engine, start, self.steps_done, self.anchor)
        if moved is not None:
            refuse_diverged(moved, self.steps_done)
        return self.steps_done - start, moved

    def unlogged_step(self) -> dict[str, Any] | None:
        """Return the last step's metrics where the run was killed between its step line and their line."""
        note = self.pending.read_note(self.journal.head_before_step) if self.steps_done else None
        logged = {record["step"] for record in read_metrics(self.path) if "eval_reward" not in record}
        return None if self.steps_done in logged else note

    def _belongs(self, state: Mapping[str, Any], steps_done: int) -> bool:
        """Say whether a checkpoint's weights are those before the journal's next step."""
        if steps_done == len(self.journal.steps):
            return True
        return bool(self.journal.steps[steps_done]["checksum"] == state["checksum"])

    def save(self, engine: Engine, final: bool) -> None:
        """Write the checkpoint of ``steps_done`` (or the finished model to the root)."""
        state = {"step": self.steps_done, "fingerprint": engine.master.fingerprint(),
                 "checksum": engine.master.checksum()}  # fmt: skip
        trainer_state = {"global_step": self.steps_done, "max_steps": self.args.max_steps, "log_history": []}
        if final:
            checkpoint.save_final(self.path, engine, state, trainer_state)
        else:
            checkpoint.save_checkpoint(self.path, self.steps_done, engine, state, trainer_state)

    def record_checkpoint(self, engine: Engine) -> None:
        """Write the checkpoint line of ``steps_done``, once."""
        if self.steps_done not in self.journal.checkpoints:
            self.journal.append_checkpoint(self.steps_done, engine.master.fingerprint())

    def has_checkpoint(self) -> bool:
        """Say whether the checkpoint of ``steps_done`` is written and journalled."""
        return (
            self.steps_done in self.journal.checkpoints
            and checkpoint.checkpoint_path(self.path, self.steps_done).exists()
        )

    def tokens_before(self) -> int:
        """Tokens that the journalled steps have processed."""
        return sum(record["tokens"] for record in self.journal.steps)

    def train_time_s(self) -> float:
        """Seconds of training that the metrics tell of."""
        return train_time_s(self.path)

    def close(self) -> None:
        """Give up the directory's lock; a directory in which nothing was written goes."""
        if not any(self.path.iterdir()):
            self.path.rmdir()
        os.close(self.lock)


def train_time_s(path: Path) -> float:
    """Return the seconds of training that a run's metrics tell of: steps, without evaluations and saving."""
    return max((record.get("train_time_s") or 0.0 for record in read_metrics(path)), default=0.0)


def open_run(args: ESConfig, given: ESConfig) -> Run:
    """Open ``args.output_dir`` for a new run, or for the one that it holds with ``resume``.

    ``given`` is the configuration before its `auto` values were resolved: a resume keeps the run's.

    Raises:
        UserError: it holds another run and neither resume nor overwrite was given, another process runs it, the
            journal is damaged, or the configuration differs in what a resume must not change.
    """
    open_missing_descriptors()  # else the journal could become stdout
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
            return Run(path, args, lock)
        args = adopt(args, journal.header["config"], given)
        if len(journal.steps) > args.max_steps:
            raise Hindered(f"{path} already has {len(journal.steps)} steps, more than max_steps {args.max_steps}")
        return Run(path, args, lock, journal)
    except BaseException:
        os.close(lock)
        raise


def _refuse_other_method(path: Path, args: ESConfig) -> None:
    """Raise UserError where a run of another method would be gone on with; only ES has a journal to tell."""
    if args.resume and (path / CONFIG_FILE).exists():
        method = read_config(path).get("method", "es")
        if method != args.method:
            raise Hindered(f"a resume cannot change method from {method!r} to {args.method!r}")


def refuse_overwrite(path: Path, args: ESConfig) -> None:
    """Raise UserError where overwriting a run would delete what the new one reads, or what estune did not write."""
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
    """Say whether a directory holds a run, or nothing but what a start leaves that was killed early."""
    names = {child.name for child in path.iterdir() if not child.name.startswith(".")}
    early = {BASE_DIRECTORY, "tensorboard", "wandb"}  # trackers start before the configuration is written
    return names <= early or bool(names & {CONFIG_FILE, JOURNAL_FILE})


def is_finished(path: Path, args: ESConfig, given: ESConfig) -> bool:
    """Say whether a run directory holds a finished run of ``args.max_steps`` steps; reads only.

    Raises:
        UserError: it does, and ``args`` would have made another.
    """
    max_steps = args.max_steps
    state = checkpoint.read_state(path)
    if state is None or checkpoint.leftovers(path):
        return False
    if args.max_time_s and train_time_s(path) >= args.max_time_s:
        max_steps = int(state.get("step", 0))
    journal = Journal.open(path / JOURNAL_FILE, repair=False)
    if journal is None or not state.get("step") == len(journal.steps) == max_steps:
        return False
    if max_steps not in journal.checkpoints:
        return False
    adopt(args, journal.header["config"], given)
    return True


def lock_directory(path: Path) -> int:
    """Take the directory's lock, held until the descriptor closes or the process dies."""
    descriptor = try_lock(path)
    if descriptor is None:
        raise Hindered(f"another process is running {path}")
    return descriptor


def adopt(args: ESConfig, stored: Mapping[str, Any], given: ESConfig) -> ESConfig:
    """Return ``args`` with what a resume must keep taken from the journal's header.

    Raises:
        UserError: a value was given that differs from the run's.
    """
    taken: dict[str, Any] = {}
    for name, value in stored.items():
        now = getattr(args, name)
        if now == value:
            continue
        if getattr(given, name) not in (None, "auto"):
            free = ", ".join(sorted(RESUMABLE - {"output_dir", "run_name", "resume", "overwrite", "dry_run"}))
            raise Hindered(f"a resume cannot change {name} from {value!r} to {now!r}; it can change {free}")
        taken[name] = value
    return dataclasses.replace(args, **taken)


def stored_config(args: ESConfig) -> ESConfig:
    """Return the configuration as `es_config.json` keeps it: the run, not how it was started."""
    return dataclasses.replace(args, resume=False, overwrite=False, dry_run=False)


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's `es_config.json`; UserError where there is none."""
    try:
        values = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} holds no run to resume (no {CONFIG_FILE})") from None
    except ValueError:
        raise UserError(f"{path / CONFIG_FILE} is not JSON") from None
    return dict(values)


def refuse_diverged(moved: Moved, steps_done: int) -> None:
    """Raise UserError where an update made theta infinite or not a number."""
    if not math.isfinite(moved.norm):
        raise UserError(f"theta diverged in step {steps_done}: lower learning_rate; earlier checkpoints are whole")


# What `estune evaluate` takes from the run whose model it gets: all that decides a completion.
_INHERITED = (
    "apply_chat_template chat_template_kwargs system_prompt response_prefix stop_strings max_completion_length "
)
_INHERITED += "prompts_per_batch num_threads"
_SAMPLING = "temperature top_p top_k num_generations seed"


def inherited_settings(model: str, given: Collection[str]) -> dict[str, Any]:
    """Return how a run made completions, for an evaluation of its model; empty where ``model`` is no run's.

    ``model`` is a run directory or a checkpoint in one; what is ``given`` is left out.
    """
    for directory in (Path(model), Path(model).parent):
        if (directory / CONFIG_FILE).is_file():
            stored = read_config(directory)
            names = _INHERITED.split()
            es = stored.get("method", "es") == "es"  # other methods sample in training, and are evaluated greedily
            if es and not set(_SAMPLING.split()) & set(given):
                names += _SAMPLING.split()
            if not {"task", "dataset_name", "reward_funcs"} & set(given):
                names.append("task")
            return {name: stored[name] for name in names if name in stored and name not in given}
    return {}


def check_base(journal: Journal, fingerprint: str, model: str) -> None:
    """Raise UserError where the base model is not the one the journal was written on."""
    wanted = journal.header["base"]["fingerprint"]
    if fingerprint != wanted:
        raise UserError(f"model {model} has fingerprint {fingerprint}, the journal was written on {wanted}")


def check_parameters(journal: Journal, specs: Sequence[ParameterSpec]) -> None:
    """Raise UserError where the engine would perturb other parameters than the journal's, or with another noise."""
    told = {False: "none", "full": "full", "lowrank": "lowrank"}
    # A journal from before there was low-rank noise says `true` for full noise.
    written = {name: "full" if kind is True else kind for name, _, kind in journal.header["parameters"]}
    found = {spec.name: spec.kind for spec in specs}
    for name in sorted(written.keys() | found.keys()):
        then, now = written.get(name, False), found.get(name, False)
        if then != now:
            raise UserError(
                f"the noise of {name} was {told[then]} when the journal was written, and is {told[now]} now"
            )


def warn_of_other_engine(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say where a resumed run's rollouts come from something else than those before; steps replay exactly anyway."""
    for name in ("device", "dtype", "architecture", "shared_forward"):
        if name in then and then[name] != now.get(name):
            warn(
                f"the run began with {name} {then[name]} and continues with {now.get(name)}: from here on its "
                "rollouts may round differently than they would have"
            )


def replay_steps(journal: Journal, engine: Engine, start: int, stop: int, anchor: AnchorReader | None) -> Moved | None:
    """Apply the journal's steps ``start .. stop`` to theta, verifying its checksum before each; return the last move.

    Raises:
        UserError: theta is not what the journal says; the step is named.
    """
    master = engine.master
    checksum = master.checksum()
    moved = None
    for record in journal.steps[start:stop]:
        if checksum != record["checksum"]:
            raise UserError(f"theta before step {record['step']} is not what the journal says it was")
        moved = master.update(recorded_update(record, journal.header["config"]), anchor)
        checksum = moved.checksum
        if record["step"] + 1 < len(journal.steps) and checksum != journal.steps[record["step"] + 1]["checksum"]:
            raise UserError(f"theta after step {record['step']} is not what the journal says it was")
    if stop in journal.checkpoints and master.fingerprint() != journal.checkpoints[stop]:
        raise UserError(f"theta after {stop} steps does not have the journal's fingerprint {journal.checkpoints[stop]}")
    engine.master_changed()
    return moved
