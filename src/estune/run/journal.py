"""The write-ahead journal: base model + journal = any step's weights, bit for bit.

`journal.jsonl` holds a header, then step and checkpoint lines only, in order, without times or worker ids. Each line
has a hash chained to the line before, so a damaged line is found and named. A step line is on disk (fsync) before theta
moves. A crash leaves at most a torn last line, which `Journal.open` removes. Finished groups of the running step are
kept in `pending.jsonl`, tied to the journal's last hash, until the step line is written.

Floats that decide bits (`s`, `a`, `decay`, and with low-rank noise `s_lowrank`, `a_lowrank`) are hexadecimal. Fitness
is decimal, with enough digits to be read back exactly.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from estune.errors import UserError
from estune.es.types import Member
from estune.es.update import Factors, Update
from estune.files import append_line, is_count, is_number, parse_json
from estune.run.resume import StoredFacts

JOURNAL_FILE = "journal.jsonl"
PENDING_FILE = "pending.jsonl"
FORMAT_VERSION = 1
_GENESIS = "0" * 32


class Base(TypedDict):
    """The base model of a run."""

    model: str  # its name
    fingerprint: str


class HeaderFacts(StoredFacts):
    """The facts in the first line of a journal."""

    noise_version: int
    base: Base
    config: dict[str, Any]  # the options of `ESConfig` that define the trajectory
    engine: dict[str, Any]  # the engine's facts, whose names are the engine's
    rollouts: str  # "reproducible" or "not reproducible"
    parameters: list[tuple[str, list[int], str | bool]]  # name, shape, kind of noise; True (older versions): full
    versions: dict[str, str]  # by package


class Header(HeaderFacts):
    """The first line of a journal."""

    kind: str  # "header"
    format: int


class Coefficients(TypedDict):
    """The coefficients of an update, as a step line and a patch store them; floats are hexadecimal."""

    q: list[int]  # (N,)
    e: int
    a: str
    decay: str
    a_lowrank: NotRequired[str]


class UpdateRecord(Coefficients):
    """An update of theta: coefficients and seeds."""

    seeds: list[str]  # (N,), 16 hexadecimal digits each


class StepRecord(UpdateRecord):
    """A step line of a journal; `step_record` describes the values."""

    kind: NotRequired[str]  # "step"
    step: int
    rows: list[int]
    fitness: list[float | None]
    failures: int
    tokens: int
    s: str
    checksum: str
    s_lowrank: NotRequired[str]
    signal: NotRequired[dict[str, Any]]  # with step control: the means after the step
    schedules: NotRequired[dict[str, float]]  # the schedules' factors, if the step's index alone does not give them


def canonical_json(value: Any) -> str:
    """Return the canonical JSON of a value: sorted keys, no spaces, no NaN. Parsing and dumping reproduces it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def _chained(previous: str, body: bytes) -> str:
    return blake2b(previous.encode("ascii") + body, digest_size=16).hexdigest()


def _sealed(body: bytes, head: str) -> bytes:
    """Return a line: the JSON object ``body`` with its hash as the last key."""
    return body[:-1] + f',"hash":"{head}"}}'.encode("ascii")


_NO_HEADER = cast("Header", {})  # of a journal whose header is not read yet


@dataclass
class Journal:
    """The journal of one run, open for appending."""

    path: Path
    header: Header
    steps: list[StepRecord] = field(default_factory=list)
    checkpoints: dict[int, str] = field(default_factory=dict)  # steps done -> fingerprint
    head: str = _GENESIS  # hash of the last line
    head_before_step: str = _GENESIS  # hash of the line before the last step line

    @classmethod
    def create(cls, path: Path, header: HeaderFacts) -> Journal:
        """Write a new journal that holds only ``header``."""
        record: Header = {"kind": "header", "format": FORMAT_VERSION, **header}
        journal = cls(path, record)
        journal._append(record)
        return journal

    @classmethod
    def open(cls, path: Path, repair: bool = True) -> Journal | None:
        """Read and verify a journal; return None if there is none, or only a torn header.

        A torn last line is removed from the file; with ``repair=False`` the line is only ignored.

        Raises:
            UserError: a line before the last is damaged, or any line was changed; the message names the step.
        """
        if not path.exists():
            return None
        journal = cls(path, _NO_HEADER)
        raw = path.read_bytes()
        lines = raw.split(b"\n")
        good = 0  # bytes that hold verified lines
        for index, line in enumerate(lines):
            is_last = good + len(line) + 1 >= len(raw)
            if not line and index == len(lines) - 1:
                break
            torn = index == len(lines) - 1  # no newline at its end
            record = None if torn else _parse(line)
            if record is None:
                if is_last:
                    break
                raise UserError(f"{path} is damaged at line {index + 1} ({journal._where()}); it cannot be resumed")
            journal._accept(line, record, index)
            good += len(line) + 1
        if good < len(raw) and repair:
            os.truncate(path, good)
        return journal if journal.header else None

    def append_step(self, record: StepRecord) -> None:
        """Write a step line; it is on disk when this returns."""
        line: StepRecord = {"kind": "step", **record}
        self._append(line)
        self.steps.append(line)

    def append_checkpoint(self, steps_done: int, fingerprint: str) -> None:
        """Write a checkpoint line: theta after ``steps_done`` steps has this fingerprint."""
        self._append({"kind": "checkpoint", "step": steps_done, "fingerprint": fingerprint})
        self.checkpoints[steps_done] = fingerprint

    def _append(self, record: Mapping[str, object]) -> None:
        body = canonical_json(record).encode("ascii")
        head = _chained(self.head, body)
        append_line(self.path, _sealed(body, head).decode("ascii"))
        if record["kind"] == "step":
            self.head_before_step = self.head
        self.head = head

    def _accept(self, line: bytes, record: dict[str, Any], index: int) -> None:
        """Verify every byte of one line against the chain, and store the line's record."""
        body = line[: -len(_sealed(b"}", _GENESIS))] + b"}"
        expected = _chained(self.head, body)
        if line != _sealed(body, expected):
            raise UserError(f"{self.path} is damaged at line {index + 1} ({self._where()}): its hash does not match")
        if record["kind"] == "step":
            self.head_before_step = self.head
        self.head = record.pop("hash")
        if record["kind"] == "header":
            if record["format"] != FORMAT_VERSION:
                raise UserError(f"{self.path} has format {record['format']}, this estune reads {FORMAT_VERSION}")
            self.header = cast("Header", record)
        elif record["kind"] == "step":
            self.steps.append(cast("StepRecord", record))
        else:
            self.checkpoints[record["step"]] = record["fingerprint"]

    def _where(self) -> str:
        return f"step {len(self.steps)}" if self.header else "the header"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def step_record(
    step: int,
    rows: Sequence[int],
    fitness: Sequence[float],
    scale: float,
    update: Update,
    checksum: str,
    *,
    failures: int,
    tokens: int,
    lowrank_scale: float = 0.0,
    signal: dict[str, Any] | None = None,
    schedules: Factors | None = None,
) -> StepRecord:
    """Return the step line: the rows and members evaluated, their fitness, and the exact update to be applied.

    Args:
        step: 0-based.
        rows: (B,) row ids.
        fitness: (N,), NaN if no reward applied.
        scale: the rounded perturbation scale ``s``.
        update: seeds (N,), integer utilities (N,), e, a, decay.
        checksum: of theta before the update.
        failures: failed rewards of the step.
        tokens: prompt and completion tokens of the step.
        lowrank_scale: the rounded scale of low-rank noise, if the update has a rank.
        signal: with step control, the fields of `estune.es.step_control.Signal` after the step.
        schedules: the schedules' factors, if the step's index alone does not give them.
    """
    record: StepRecord = {
        "step": step,
        "rows": list(rows),
        "seeds": [f"{member.seed:016x}" for member in update.members],
        "fitness": [None if math.isnan(value) else float(value) for value in fitness],
        "failures": failures,
        "tokens": tokens,
        "q": list(update.q),
        "e": update.e,
        "s": scale.hex(),
        "a": update.a.hex(),
        "decay": update.decay.hex(),
        "checksum": checksum,
    }
    if update.rank:
        record |= {"s_lowrank": lowrank_scale.hex(), "a_lowrank": update.a_lowrank.hex()}
    if signal is not None:
        record["signal"] = signal
    if schedules is not None:
        record["schedules"] = asdict(schedules)
    return record


def recorded_update(record: UpdateRecord, config: Mapping[str, Any]) -> Update:
    """Return the update that a step line or a patch records; ``config`` is the header's."""
    signs = (+1, -1) if config["antithetic"] else (+1, +1)
    rank = config["rank"] if config["noise"] == "lowrank" else 0
    members = tuple(Member(int(seed, 16), signs[index % 2]) for index, seed in enumerate(record["seeds"]))
    return Update(
        members=members,
        q=tuple(record["q"]),
        e=record["e"],
        a=float.fromhex(record["a"]),
        decay=float.fromhex(record["decay"]),
        anchored=config["weight_decay_anchor"] == "base",
        distribution=config["noise_distribution"],
        rank=rank,
        a_lowrank=float.fromhex(record["a_lowrank"]) if rank else 0.0,
    )


def _is_note(metrics: Any) -> bool:
    """Return whether a value is a step's metrics, with the times that a resume needs."""
    needed = ("es/perturb_s", "es/generate_s", "es/score_s")
    return (
        isinstance(metrics, dict)
        and all(value is None or is_number(value) for value in metrics.values())
        and all(is_number(metrics.get(name)) for name in needed)
    )


def _is_as_written(line: bytes, record: Mapping[str, Any], head: str) -> bool:
    """Return whether a line of `pending.jsonl` matches its hash; an older estune's line without a hash also counts."""
    if "hash" not in record:
        return record.keys() in ({"after", "group", "result"}, {"after", "metrics"})
    body = line[: -len(_sealed(b"}", _GENESIS))] + b"}"
    return line == _sealed(body, _chained(head, body))


class Pending:
    """Finished groups of the running step, so that a resume does not evaluate them again.

    If schedules depend on time or change sigma, the first line of a step holds their factors, with which its members
    are made.
    Each line holds the journal's head and a hash of itself. Lines of another step, damaged lines and a torn last line
    are ignored. Lines of an older estune have no hash.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, head: str) -> dict[int, dict[str, Any]]:
        """Return the finished groups of the step that follows ``head``, by group index."""
        return {
            record["group"]: record["result"]
            for record in self._records(head)
            if is_count(record.get("group")) and isinstance(record.get("result"), dict)
        }

    def read_note(self, head: str) -> dict[str, Any] | None:
        """Return the metrics of the step that follows ``head``; None if the step did not reach its update."""
        notes = [record["metrics"] for record in self._records(head) if _is_note(record.get("metrics"))]
        return notes[-1] if notes else None

    def read_factors(self, head: str) -> tuple[Factors, float] | None:
        """Return what `store_factors` wrote for the step that follows ``head``; None if it wrote nothing."""
        for record in self._records(head):
            values = record.get("schedules")
            if isinstance(values, dict) and values.keys() == {"learning_rate", "sigma"}:
                return Factors(**values), float(record["train_time_s"])
        return None

    def _records(self, head: str) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        if not self.path.exists():
            return records
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(self.path, len(whole))
        for line in whole.splitlines():
            try:
                record = parse_json(line)
            except ValueError:
                continue  # the group of a damaged line is evaluated again
            if isinstance(record, dict) and record.get("after") == head and _is_as_written(line, record, head):
                records.append(record)
        return records

    def append(self, head: str, group: int, result: Mapping[str, Any]) -> None:
        """Write a finished group to disk."""
        self._append(head, {"group": group, "result": result})

    def note(self, head: str, metrics: Mapping[str, Any]) -> None:
        """Write the step's metrics to disk, for a resume after a crash during the update."""
        self._append(head, {"metrics": metrics})

    def store_factors(self, head: str, factors: Factors, train_time_s: float) -> None:
        """Write the schedules' factors of the step to disk, so that all its members have one sigma.

        ``train_time_s`` is the time of all steps before, in seconds, which metrics lack if they are logged rarely.
        """
        self._append(head, {"schedules": asdict(factors), "train_time_s": train_time_s})

    def _append(self, head: str, content: Mapping[str, Any]) -> None:
        body = json.dumps({"after": head, **content}, separators=(",", ":")).encode("ascii")
        append_line(self.path, _sealed(body, _chained(head, body)).decode("ascii"))

    def clear(self) -> None:
        """Delete the groups, once their step line is on disk."""
        self.path.unlink(missing_ok=True)
