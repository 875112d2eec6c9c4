"""A packed comparison: one JSON file, `comparison_results.json`, from which the page and the curves can be drawn again.

The file holds everything that `report.html` is made of: the comparison's options, the fingerprints of its rows and
reward functions, the machine, the cost of each sitting, and a row for each measurement. `pack` makes it from a
comparison's directory. `unpack` writes `comparison.json` and `results/` again, and `estune compare` can continue the
comparison there.

``common_settings`` holds the most frequent value of each option; a row holds the values that differ. The file has a
digest of its content, so that a damaged or edited file is refused.
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

from estune.compare.plan import BUDGETS, EVALUATIONS, TIME
from estune.compare.results import (
    COST_FILE,
    DONE,
    FAILED,
    PLAN_FILE,
    RESULTS,
    UNMEASURED,
    Histogram,
    Measurement,
    Result,
    Sitting,
    Tuned,
)
from estune.compare.tables import summarise
from estune.errors import UserError
from estune.files import parse_json, replace_file
from estune.run.saved_config import METHOD_FILE

ARCHIVE_FILE = "comparison_results.json"
FORMAT, SCHEMA = "estune comparison results", 1
# Fields of a rejection sampling run that are in the run's `method.json` and not in its result.
METHOD_FIELDS = ("samples_drawn", "samples_kept")
# Paths of results below `results/`; the groups are fields of a row.
PATTERNS = {
    "base": r"(?P<model>[^/]+)/base\.json",
    "prefix": r"(?P<model>[^/]+)/base-prefix\.json",
    "constant": r"(?P<model>[^/]+)/constant\.json",
    "tuning": r"(?P<model>[^/]+)/(?P<method>[^/]+)/tuning\.json",
    "trial": r"(?P<model>[^/]+)/(?P<method>[^/]+)/trial-(?P<index>\d+)(?P<budget>-time|)\.json",
    "run": rf"(?P<model>[^/]+)/(?P<method>[^/]+)/seed-(?P<seed>\d+)-(?P<budget>{'|'.join(BUDGETS)})\.json",
}
IDENTITY = ("kind", "model", "method", "index", "seed", "budget")


class Row(Measurement, Tuned, total=False):
    """One measurement. ``kind`` says which fields a row has; their names are those of the files below `results/`.

    base, prefix, constant: the base, the base with its skill forced, the best constant answer.
    trial: a trial on validation rows. tuning: the chosen trial, and the cost of all trials.
    run: a seed's model at a budget.
    """

    kind: str
    index: int  # of a trial
    budget: str
    path: str  # of a base: where its weights are; `model` is its name in the comparison
    settings: dict[str, Any] | None  # those that differ from the common ones; None: the result has no settings
    settings_lacking: list[str]  # common options that this run did not have
    samples_drawn: int
    samples_kept: int


class Archive(TypedDict):
    """The content of a packed comparison's file."""

    format: str
    schema: int
    digest: str  # 32 hexadecimal digits, a hash of everything else
    comparison: dict[str, Any]
    environment: dict[str, Any]
    pinned: dict[str, Any]  # fingerprints of rows and reward functions
    cost: list[Sitting]
    common_settings: dict[str, Any]
    histogram_edges: list[float]  # (bins + 1,); of each row whose histogram has no edges of its own
    rows: list[Row]


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(directory: Path) -> Archive:
    """Return the packed form of the results that a comparison's directory has so far.

    Raises:
        UserError: the directory holds no comparison.
    """
    files = _read(directory)
    if PLAN_FILE not in files:
        raise UserError(f"{directory} holds no comparison")
    plan, cost = files.pop(PLAN_FILE), files.pop(f"{RESULTS}/{COST_FILE}", [])
    rows = [_row(path, result, directory) for path, result in files.items()]
    common = _common_settings([settings for row in rows if (settings := row.get("settings"))])
    edges = next((row_edges for row in rows if (row_edges := _edges(row))), [])
    for row in rows:
        if "settings" in row:
            _drop_common_settings(row, common)
        if edges and _edges(row) == edges and (histogram := row["changes"]["histogram"]):
            row["changes"]["histogram"] = _without_edges(histogram)
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
    return cast(Archive, {"format": FORMAT, "schema": SCHEMA, "digest": content_digest(content), **content})


def _read(directory: Path) -> dict[str, Any]:
    """Return the content of the files that a report is made of, by their paths in the directory, in a fixed order."""
    plan = directory / PLAN_FILE
    contents = {PLAN_FILE: parse_json(plan.read_bytes())} if plan.exists() else {}
    results = directory / RESULTS
    files = {file.relative_to(results).as_posix(): file for file in sorted(results.rglob("*.json"))}
    for path, file in files.items():
        if path == COST_FILE or _identity(path):
            contents[f"{RESULTS}/{path}"] = parse_json(file.read_bytes())
    return contents


def _identity(path: str) -> Row | None:
    """Return the fields of a row that identify a measurement, from its path below `results/`; None for other files."""
    for kind, pattern in PATTERNS.items():
        if match := re.fullmatch(pattern, path):
            fields: dict[str, Any] = {"kind": kind, **match.groupdict()}
            for name in {"index", "seed"} & fields.keys():
                fields[name] = int(fields[name])
            if kind == "trial":
                fields["budget"] = TIME if fields["budget"] else EVALUATIONS
            return cast(Row, {name: fields[name] for name in IDENTITY if name in fields})
    return None


def _row(path: str, result: Mapping[str, Any], directory: Path) -> Row:
    """Return the row of a result, with all of its settings.

    Args:
        path: of the result's file, in the comparison's directory.
        result: the file's content.
        directory: the comparison's.
    """
    identity = _identity(path.removeprefix(f"{RESULTS}/"))
    assert identity is not None
    values = dict(result)
    if identity["kind"] == "base" and "model" in values:
        values["path"] = values.pop("model")
    row = {**identity, **{name: value for name, value in values.items() if name not in identity}}
    method = directory / str(result.get("run", "")) / METHOD_FILE
    if identity["kind"] == "run" and "run" in result and method.exists():
        row |= {name: value for name, value in parse_json(method.read_bytes()).items() if name in METHOD_FIELDS}
    if "changes" in row:
        row["changes"] = dict(row["changes"])
    return cast(Row, row)


def _common_settings(settings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each option's most frequent value; of equally frequent values the first."""
    values: dict[str, dict[str, Any]] = {}
    counts: dict[str, collections.Counter[str]] = {}
    for each in settings:
        for name, value in each.items():
            text = json.dumps(value, sort_keys=True)
            values.setdefault(name, {}).setdefault(text, value)
            counts.setdefault(name, collections.Counter())[text] += 1
    return {name: values[name][counted.most_common(1)[0][0]] for name, counted in counts.items()}


def _drop_common_settings(row: Row, common: Mapping[str, Any]) -> None:
    """Reduce a row's settings to those that differ from the common ones."""
    settings = row["settings"]
    if not settings:
        row["settings"] = None
        return
    row["settings"] = {name: value for name, value in settings.items() if not _equal_json(common[name], value)}
    if lacking := [name for name in common if name not in settings]:
        row["settings_lacking"] = lacking


def _equal_json(a: Any, b: Any) -> bool:
    """Return whether two values have the same JSON; 1, 1.0 and true differ."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _edges(row: Row) -> list[float]:
    """Return the edges of a row's histogram; an empty list if it has none."""
    histogram = row["changes"].get("histogram") if row.get("changes") else None
    return list(histogram.get("edges") or []) if histogram else []


def _without_edges(histogram: Histogram) -> Histogram:
    return cast(Histogram, {name: value for name, value in histogram.items() if name != "edges"})


def content_digest(content: Mapping[str, Any]) -> str:
    """Return the digest of a packed comparison's content, without the field ``digest``."""
    text = json.dumps({name: value for name, value in content.items() if name != "digest"}, sort_keys=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def write_archive(archive: Archive, file: Path) -> None:
    """Write a packed comparison with one line a row, so that another measurement changes one line of the file."""
    lines = []
    for name, value in archive.items():
        text = _compact(value)
        if name == "rows":
            text = "[\n" + ",\n".join(_compact(row) for row in archive["rows"]) + "\n]"
        lines.append(f"{json.dumps(name)}: {text}")
    content = "{\n" + ",\n".join(lines) + "\n}\n"
    replace_file(file, lambda opened: opened.write(content.encode("utf-8")))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# --- reading ----------------------------------------------------------------------------------------------------------

# The type of each field of a packed comparison whose type is checked.
FIELD_TYPES = {
    "comparison": dict,
    "environment": dict,
    "pinned": dict,
    "cost": list,
    "common_settings": dict,
    "histogram_edges": list,
    "rows": list,
}


def read_archive(file: Path) -> Archive:
    """Return the content of a packed comparison's file.

    Raises:
        UserError: the file cannot be read, is not a packed comparison, is damaged, or has another schema.
    """
    try:
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{file} is damaged, or is no comparison's results: it is not JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{file} holds no comparison's results, as `estune compare` writes them to {ARCHIVE_FILE}")
    if content.get("schema") != SCHEMA:
        raise UserError(f"{file} has schema {content.get('schema')!r}; this estune reads schema {SCHEMA}")
    if content.get("digest") != content_digest(content):
        raise UserError(f"{file} is damaged or was edited: its digest is not that of its content")
    complete = all(isinstance(content.get(name), kind) for name, kind in FIELD_TYPES.items())
    if not complete or not all(isinstance(row, dict) and _is_row(row) for row in content["rows"]):
        raise UserError(f"{file} holds no comparison's results: a part of it is missing or malformed")
    return cast(Archive, content)


def _is_row(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a valid status and identity, and its file would be below `results/`."""
    if row.get("status", DONE) not in (DONE, FAILED, UNMEASURED):
        return False
    names = [row[name] for name in ("model", "method") if name in row]
    if not all(isinstance(name, str) and name not in (".", "..") for name in names):
        return False
    try:
        identity = _identity(_path(cast(Row, row)))
    except (KeyError, TypeError):
        return False
    return identity == {name: row[name] for name in IDENTITY if name in row}


def _path(row: Row) -> str:
    """Return the path of a row's file below `results/`.

    Raises:
        KeyError: the kind is unknown, or a field of the path is missing.
    """
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
    """Write `comparison.json` and `results/` of a packed comparison; files with the same content are left alone.

    Raises:
        UserError: the directory is a file, or holds other files or other results.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir {directory} is not a directory")
    files, existing = _files(archive), _read(directory)
    if not existing and directory.exists() and any(directory.iterdir()):
        raise UserError(f"output_dir {directory} is not empty and holds no comparison")
    if any(path not in files or not _equal_json(files[path], value) for path, value in existing.items()):
        raise UserError(f"output_dir {directory} holds other results than the file: give another output_dir")
    for path, value in files.items():
        if path not in existing:
            file = directory / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _files(archive: Archive) -> dict[str, Any]:
    """Return the content of a comparison's files by their paths in its directory."""
    contents: dict[str, Any] = {
        PLAN_FILE: {"comparison": archive["comparison"], "environment": archive["environment"], **archive["pinned"]}
    }
    if archive["cost"]:
        contents[f"{RESULTS}/{COST_FILE}"] = archive["cost"]
    for row in archive["rows"]:
        contents[f"{RESULTS}/{_path(row)}"] = _result(row, archive)
    return contents


def _result(row: Row, archive: Archive) -> Result:
    """Return the content of a row's file."""
    identity = ("kind", "index", "budget") if row["kind"] == "run" else IDENTITY
    left_out = {*identity, "settings_lacking", "path"}
    result = cast(Result, {name: value for name, value in row.items() if name not in left_out})
    if "path" in row:
        result["model"] = row["path"]
    if "settings" in row:
        lacking, differing = row.get("settings_lacking", ()), row["settings"]
        common = {name: value for name, value in archive["common_settings"].items() if name not in lacking}
        result["settings"] = {} if differing is None else common | differing
    if "changes" in row and (histogram := row["changes"].get("histogram")):
        with_edges: Histogram = {"edges": archive["histogram_edges"], **histogram}
        result["changes"] = {**row["changes"], "histogram": with_edges}
    return result


def summary_of(file: Path) -> dict[str, Any]:
    """Return the content of a packed comparison's report; see `estune.compare.tables.summarise`.

    Raises:
        UserError: see `read_archive`; or there are no results yet.
    """
    with tempfile.TemporaryDirectory() as name:
        unpack(read_archive(file), Path(name))
        return dict(summarise(Path(name)))
