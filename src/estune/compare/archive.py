"""A whole comparison in one JSON file: `comparison_results.json`, from which its page and curves can be drawn again.

The file holds everything that `report.html` is made of: the comparison's options and what they stand on, the machine,
the cost of each sitting, and a row for each measurement. `pack` makes it from a comparison's directory, `unpack` writes
`comparison.json` and `results/` again: `estune compare` goes on from there like from the directory itself.

Options that most runs share stand once, in ``common_settings``; a row holds its own where they differ. The file carries
a digest of its content, so that a damaged or edited file is refused.
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from estune.compare.job import DONE, FAILED, UNMEASURED
from estune.compare.plan import BUDGETS, EVALUATIONS, TIME
from estune.compare.tables import summarise
from estune.errors import UserError
from estune.files import parse_json, replace_file

ARCHIVE_FILE = "comparison_results.json"
FORMAT, SCHEMA = "estune comparison results", 1
PLAN, RESULTS, COST = "comparison.json", "results", "cost.json"
OUTCOMES = ("samples_drawn", "samples_kept")  # of rejection sampling: in the run's own directory, not in its result
# Places of results below `results/`; groups are fields of a row.
PLACES = {
    "base": r"(?P<model>[^/]+)/base\.json",
    "prefix": r"(?P<model>[^/]+)/base-prefix\.json",
    "constant": r"(?P<model>[^/]+)/constant\.json",
    "tuning": r"(?P<model>[^/]+)/(?P<method>[^/]+)/tuning\.json",
    "trial": r"(?P<model>[^/]+)/(?P<method>[^/]+)/trial-(?P<index>\d+)(?P<budget>-time|)\.json",
    "run": rf"(?P<model>[^/]+)/(?P<method>[^/]+)/seed-(?P<seed>\d+)-(?P<budget>{'|'.join(BUDGETS)})\.json",
}
IDENTITY = ("kind", "model", "method", "index", "seed", "budget")


class Sitting(TypedDict, total=False):
    """What one call of `estune compare` cost, on which machine, by which code."""

    cpu_s: float
    wall_s: float
    code: str  # digest of the package
    machine: str
    packages: dict[str, str]


class Answers(TypedDict, total=False):
    """Greedy answers to the rows of one task."""

    n: int
    accuracy: float
    accuracy_ci95: list[float]
    correct: str  # one character a row: 1 is right
    reward: float
    length: float  # mean, tokens
    clipped_ratio: float
    reward_failures: int


class Row(Answers, total=False):
    """One measurement. ``kind`` says which fields there are; names are those of the files below `results/`.

    base, prefix, constant: a model that nothing trained, the base with its skill forced, the best constant answer.
    trial: a trial on validation rows. tuning: which trial was chosen, and what all of them cost.
    run: a seed's model at a budget.
    """

    kind: str
    model: str  # its name in the comparison
    method: str
    index: int  # of a trial
    seed: int
    budget: str
    # what was run, by what
    path: str  # base: where its weights are
    code: str  # digest of the package that measured
    trained_by: list[str]  # digests of the packages that trained
    fingerprint: str  # of the weights
    base: str  # digest of the base's measurement that this one refers to
    run: str  # directories below the comparison's
    measured: str
    settings: dict[str, Any] | None  # where they differ from the common ones; None: none are known
    settings_lacking: list[str]  # common options that this run did not have
    trial: dict[str, Any]  # a trial's own settings
    status: str
    error: str
    # what it cost
    evaluations: int
    train_time_s: float
    steps: int
    samples_drawn: int
    samples_kept: int
    # what was measured
    right_of: list[int]  # right ones among `samples` samples of each row
    samples: int
    sampled_length: float
    retention: dict[str, Answers]
    kl: float
    curve: list[list[float | None]]  # evaluations, seconds, validation accuracy
    hacking: dict[str, Any]
    judged: dict[str, Any]  # base: what hacking is judged beside
    changes: dict[str, Any]
    discovery: list[int]
    never_solved: list[int]
    discovery_control: list[int]
    response_prefix: str
    says: str
    train_accuracy: float
    # of tuning
    chosen: dict[str, Any]
    chosen_time: dict[str, Any]
    rows: int
    cost: dict[str, float]


class Archive(TypedDict):
    """A packed comparison, as it is on disk."""

    format: str
    schema: int
    digest: str  # 32 hexadecimal digits over everything else
    comparison: dict[str, Any]
    environment: dict[str, Any]
    pinned: dict[str, Any]  # fingerprints of rows and rewards
    cost: list[Sitting]
    common_settings: dict[str, Any]
    histogram_edges: list[float]  # of every row's histogram of changes that has none of its own
    rows: list[Row]


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(directory: Path) -> Archive:
    """Return everything that a comparison's directory has measured so far.

    Raises:
        UserError: the directory holds no comparison.
    """
    files = _read(directory)
    if PLAN not in files:
        raise UserError(f"{directory} holds no comparison")
    plan, cost = files.pop(PLAN), files.pop(f"{RESULTS}/{COST}", [])
    rows = [_row(place, result, directory) for place, result in files.items()]
    common = _common([own for row in rows if (own := row.get("settings"))])
    edges = next((found for row in rows if (found := _edges(row))), [])
    for row in rows:
        if "settings" in row:
            _set_apart(row, common)
        if edges and _edges(row) == edges:
            row["changes"]["histogram"] = {
                name: value for name, value in row["changes"]["histogram"].items() if name != "edges"
            }
    content = {
        "format": FORMAT,
        "schema": SCHEMA,
        "comparison": plan["comparison"],
        "environment": plan["environment"],
        "pinned": {name: value for name, value in plan.items() if name not in ("comparison", "environment")},
        "cost": cost,
        "common_settings": common,
        "histogram_edges": edges,
        "rows": rows,
    }
    return cast(Archive, {"format": FORMAT, "schema": SCHEMA, "digest": _digest(content), **content})


def _read(directory: Path) -> dict[str, Any]:
    """Return the content of the files that a report is made of, by their places, in a fixed order."""
    found = {PLAN: parse_json((directory / PLAN).read_bytes())} if (directory / PLAN).exists() else {}
    results = directory / RESULTS
    places = {path.relative_to(results).as_posix(): path for path in sorted(results.rglob("*.json"))}
    for place, path in places.items():
        if place == COST or _identity(place):
            found[f"{RESULTS}/{place}"] = parse_json(path.read_bytes())
    return found


def _identity(place: str) -> Row | None:
    """Return the fields of a row that say what was measured; None for a file that is no result."""
    for kind, pattern in PLACES.items():
        if match := re.fullmatch(pattern, place):
            found: dict[str, Any] = {"kind": kind, **match.groupdict()}
            for name in {"index", "seed"} & found.keys():
                found[name] = int(found[name])
            if kind == "trial":
                found["budget"] = TIME if found["budget"] else EVALUATIONS
            return cast(Row, {name: found[name] for name in IDENTITY if name in found})
    return None


def _row(place: str, result: Mapping[str, Any], directory: Path) -> Row:
    identity = _identity(place.removeprefix(f"{RESULTS}/"))
    assert identity is not None
    values = dict(result)
    if identity["kind"] == "base" and "model" in values:
        values["path"] = values.pop("model")
    row = {**identity, **{name: value for name, value in values.items() if name not in identity}}
    told = directory / str(result.get("run", "")) / "method.json"
    if identity["kind"] == "run" and "run" in result and told.exists():
        row |= {name: value for name, value in parse_json(told.read_bytes()).items() if name in OUTCOMES}
    if "changes" in row:
        row["changes"] = dict(row["changes"])
    return cast(Row, row)


def _common(settings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each option's most frequent value; of several the first."""
    values: dict[str, dict[str, Any]] = {}
    counts: dict[str, collections.Counter[str]] = {}
    for own in settings:
        for name, value in own.items():
            text = json.dumps(value, sort_keys=True)
            values.setdefault(name, {}).setdefault(text, value)
            counts.setdefault(name, collections.Counter())[text] += 1
    return {name: values[name][counted.most_common(1)[0][0]] for name, counted in counts.items()}


def _set_apart(row: Row, common: Mapping[str, Any]) -> None:
    """Reduce a row's settings to those that differ from the common ones."""
    own = row["settings"]
    if not own:
        row["settings"] = None
        return
    row["settings"] = {name: value for name, value in own.items() if not _same(common[name], value)}
    if lacking := [name for name in common if name not in own]:
        row["settings_lacking"] = lacking


def _same(a: Any, b: Any) -> bool:
    """Return whether two values have the same JSON: 1, 1.0 and true are three."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _edges(row: Row) -> list[float]:
    return list(((row.get("changes") or {}).get("histogram") or {}).get("edges") or [])


def _digest(content: Mapping[str, Any]) -> str:
    told = json.dumps({name: value for name, value in content.items() if name != "digest"}, sort_keys=True)
    return hashlib.blake2b(told.encode("ascii"), digest_size=16).hexdigest()


def write_archive(archive: Archive, file: Path) -> None:
    """Write a packed comparison: one line a row, so that a change of one measurement is a change of one line."""
    lines = []
    for name, value in archive.items():
        told = _compact(value)
        if name == "rows":
            told = "[\n" + ",\n".join(_compact(row) for row in archive["rows"]) + "\n]"
        lines.append(f"{json.dumps(name)}: {told}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    replace_file(file, lambda opened: opened.write(text.encode("utf-8")))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# --- reading ----------------------------------------------------------------------------------------------------------

CONTENT = {
    "comparison": dict,
    "environment": dict,
    "pinned": dict,
    "cost": list,
    "common_settings": dict,
    "histogram_edges": list,
    "rows": list,
}


def read_archive(file: Path) -> Archive:
    """Return a packed comparison.

    Raises:
        UserError: the file cannot be read, holds something else, is damaged, or is of another schema.
    """
    try:
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{file} is damaged, or no comparison's results: it is not JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file} holds no comparison's results, as `estune compare` writes them to {ARCHIVE_FILE}")
    if content.get("schema") != SCHEMA:
        raise UserError(f"{file} has schema {content.get('schema')!r}; this estune reads schema {SCHEMA}")
    if content.get("digest") != _digest(content):
        raise UserError(f"{file} is damaged or was edited: its digest is not that of its content")
    whole = all(isinstance(content.get(name), kind) for name, kind in CONTENT.items())
    if not whole or not all(isinstance(row, dict) and _is_row(row) for row in content["rows"]):
        raise UserError(f"{file} holds no comparison's results: something is missing in it")
    return cast(Archive, content)


def _is_row(row: Mapping[str, Any]) -> bool:
    """Return whether a row says what was measured, and its names lead to a place below `results/` and nowhere else."""
    if row.get("status", DONE) not in (DONE, FAILED, UNMEASURED):
        return False
    names = [row[name] for name in ("model", "method") if name in row]
    if not all(isinstance(name, str) and name not in (".", "..") for name in names):
        return False
    try:
        found = _identity(_place(cast(Row, row)))
    except (KeyError, TypeError):
        return False
    return found == {name: row[name] for name in IDENTITY if name in row}


def _place(row: Row) -> str:
    """Return where a row's result lies below `results/`."""
    match row["kind"]:
        case "base":
            return f"{row['model']}/base.json"
        case "prefix":
            return f"{row['model']}/base-prefix.json"
        case "constant":
            return f"{row['model']}/constant.json"
        case "tuning":
            return f"{row['model']}/{row['method']}/tuning.json"
        case "trial":
            return f"{row['model']}/{row['method']}/trial-{row['index']}{'-time' * (row['budget'] == TIME)}.json"
        case "run":
            return f"{row['model']}/{row['method']}/seed-{row['seed']}-{row['budget']}.json"
    raise KeyError(row["kind"])


# --- unpacking --------------------------------------------------------------------------------------------------------


def unpack(archive: Archive, directory: Path) -> None:
    """Write `comparison.json` and `results/` of a packed comparison; what is there and the same stays.

    Raises:
        UserError: the directory holds anything else.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir {directory} is no directory")
    files, before = _files(archive), _read(directory)
    if not before and directory.exists() and any(directory.iterdir()):
        raise UserError(f"output_dir {directory} is not empty and holds no comparison")
    if any(place not in files or not _same(files[place], value) for place, value in before.items()):
        raise UserError(f"output_dir {directory} holds other results than the file: give another output_dir")
    for place, value in files.items():
        if place not in before:
            path = directory / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _files(archive: Archive) -> dict[str, Any]:
    """Return the content of a comparison's files by their places."""
    found: dict[str, Any] = {
        PLAN: {"comparison": archive["comparison"], "environment": archive["environment"], **archive["pinned"]}
    }
    if archive["cost"]:
        found[f"{RESULTS}/{COST}"] = archive["cost"]
    for row in archive["rows"]:
        found[f"{RESULTS}/{_place(row)}"] = _result(row, archive)
    return found


def _result(row: Row, archive: Archive) -> dict[str, Any]:
    """Return a result as a comparison's directory holds it."""
    identity = ("kind", "index", "budget") if row["kind"] == "run" else IDENTITY
    left_out = {*identity, "settings_lacking", "path"}
    found: dict[str, Any] = {name: value for name, value in row.items() if name not in left_out}
    if "path" in row:
        found["model"] = row["path"]
    if "settings" in row:
        lacking, own = row.get("settings_lacking", ()), row["settings"]
        whole = {name: value for name, value in archive["common_settings"].items() if name not in lacking}
        found["settings"] = {} if own is None else whole | own
    if row.get("changes", {}).get("histogram"):
        edges = {"edges": archive["histogram_edges"]}
        found["changes"] = {**row["changes"], "histogram": {**edges, **row["changes"]["histogram"]}}
    return found


def summary_of(file: Path) -> dict[str, Any]:
    """Return everything that the report of a packed comparison says; see `estune.compare.tables.summarise`.

    Raises:
        UserError: see `read_archive`; or there is nothing to report yet.
    """
    with tempfile.TemporaryDirectory() as name:
        unpack(read_archive(file), Path(name))
        return summarise(Path(name))
