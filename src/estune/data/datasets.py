"""Reads datasets from files, directories, the hub or memory, and checks their rows and columns.

A row is a dict with a ``prompt``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from estune.data.memory import one_sentence, rows_in_memory, rows_of_frame
from estune.errors import UserError
from estune.identity import NoIdentityError, encode
from estune.rewards.contract import OUR_KEYWORDS, TRL_KEYWORDS, column_names, required_keywords

Row = dict[str, Any]


def load_rows(source: Any, config: str | None = None, split: str = "train") -> list[Row]:
    """Return the rows of a dataset as a list of dicts.

    Args:
        source: one of

            * a JSONL, JSON, CSV, TSV or parquet file;
            * a directory: saved by ``datasets``, with files named after splits, or readable by ``load_dataset``;
            * a dataset id on the hub;
            * rows in memory, see `rows_in_memory`.
        config: the dataset's configuration.
        split: the split; ignored if the source has no splits (`has_splits`), so the caller checks the name.

    Returns:
        Rows that all have the same columns; a row's missing columns are None.

    Raises:
        UserError: the source does not exist, cannot be read, has no rows, or has no configurations.
    """
    if not isinstance(source, (str, Path)):
        rows = rows_in_memory(source)
        source = "the dataset"
    else:
        path = Path(source).expanduser()
        if path.is_file():
            _refuse_config(path, config, "is one file")
            rows = _read_file(path)
        elif path.is_dir():
            rows = _read_directory(path, config, split)
        elif path.suffix in READERS or str(source).startswith((".", "/", "~")):
            raise UserError(f"there is no dataset file or directory {source}")
        else:
            rows = _from_hub(str(source), config, split)
    if not rows:
        raise UserError(f"{source} has no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{source} has a column named {name!r}: the name of a column must be a string")
    return [row if len(row) == len(names) else {name: row.get(name) for name in names} for row in rows]


def has_splits(source: Any) -> bool:
    """Return whether ``source`` can hold splits; rows in memory, a file and a ``Dataset.save_to_disk`` cannot."""
    if not isinstance(source, (str, Path)):
        return False
    path = Path(source).expanduser()
    return not path.is_file() and not _is_one_saved(path)


def _is_one_saved(path: Path) -> bool:
    return (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file()


def _read_file(path: Path) -> list[Row]:
    if path.suffix not in READERS:
        raise UserError(f"{path} is not a dataset file: its name should end in {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_lines(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except _RepeatedName as error:
                raise UserError(f"{path} line {number} gives {error} twice") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number} is a JSON {type(row).__name__}, not an object")
            rows.append(row)
    return rows


class _RepeatedName(ValueError):
    """A JSON object has the same name twice; `json.loads` would drop the first value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedName(repr(next(name for name in names if names.count(name) > 1)))
    return values


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("{"):  # JSON lines in a file named .json
        return _read_lines(path)
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except _RepeatedName as error:
        raise UserError(f"{path} has a row that gives {error} twice") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} should hold a list of objects, one per row")
    return rows


def _read_csv(path: Path, separator: str = ",") -> list[Row]:
    """Return the rows of a CSV file with the types that ``datasets.load_dataset("csv")`` gives them.

    Numbers are int or float, and empty cells and words such as `NA` are None.
    """
    import pandas
    import pyarrow

    try:
        names = pandas.read_csv(path, sep=separator, header=None, nrows=1, dtype=str, keep_default_na=False)
        given = names.iloc[0].tolist()
        for name in given:
            if name and given.count(name) > 1:
                raise UserError(f"{path} has two columns named {name!r}")
        frame = pandas.read_csv(path, sep=separator, low_memory=False)
        if not isinstance(frame.index, pandas.RangeIndex):
            raise UserError(f"{path} has rows with more cells than its first line, which names the columns")
        return rows_of_frame(frame)
    except pandas.errors.EmptyDataError:
        raise UserError(f"{path} has no rows") from None
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"{path} is not a readable table: {' '.join(str(error).split())[:300]}") from error


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{path} has two columns named {name!r}")
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable parquet file: {' '.join(str(error).split())[:300]}") from error
    return rows


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
}
SPLIT_FILES = (".jsonl", ".json", ".parquet")  # files named after a split; `datasets` reads directories of other files


def _read_directory(path: Path, config: str | None, split: str) -> list[Row]:
    for suffix in SPLIT_FILES:
        if config is None and (path / f"{split}{suffix}").is_file():
            return _read_file(path / f"{split}{suffix}")
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        return _from_hub(str(path), config, split)
    _refuse_config(path, config, "was saved by save_to_disk")
    import datasets

    with one_sentence(f"dataset {path} cannot be loaded"):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise UserError(f"{path} has no split {split!r} (it has {', '.join(saved)})")
            saved = saved[split]
        rows: list[Row] = saved.to_list()
    return rows


def _refuse_config(path: Path, config: str | None, why: str) -> None:
    if config is not None:
        raise UserError(f"dataset {path} {why}: it has no configurations, so dataset_config {config} cannot apply")


def _from_hub(name: str, config: str | None, split: str) -> list[Row]:
    import datasets

    with one_sentence(f"dataset {name} (split {split}) cannot be loaded"):
        rows: list[Row] = datasets.load_dataset(name, config, split=split).to_list()
    return rows


def shared_prompts(trained: Sequence[Row], held_out: Sequence[Row]) -> int:
    """Return how many held-out rows have exactly the same prompt as a training row."""

    def key(row: Row) -> bytes:
        try:
            return encode(row["prompt"])
        except NoIdentityError:  # such a prompt equals no other prompt
            return b""

    trained_keys = {key(row) for row in trained} - {b""}
    return sum(key(row) in trained_keys for row in held_out)


def check_columns(rows: Sequence[Row], reward_funcs: Sequence[Callable[..., Any]], names: Sequence[str]) -> None:
    """Check that the dataset has every column that a reward function requires (a parameter without a default).

    Raises:
        UserError: columns are missing; the message names the columns and the function.
    """
    columns = column_names(rows)
    for function, name in zip(reward_funcs, names, strict=True):
        if "completion" in required_keywords(function) and any("completion" in row for row in rows):
            raise UserError(
                f"reward {name} needs the column completion, which rewards never get, as in TRL: give the column "
                "another name with column_mapping"
            )
        missing = [word for word in required_keywords(function) if word not in (*TRL_KEYWORDS, *OUR_KEYWORDS, *columns)]
        if missing:
            raise UserError(
                f"the dataset lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} that reward {name} "
                f"needs (it has {', '.join(columns) or 'only prompts'}); column_mapping can name another column: "
                f"{{{missing[0]!r}: 'its name'}}"
            )
