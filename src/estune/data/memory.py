"""Rows that a Python program passes: lists, datasets, data frames, streams, and dicts of them by split."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from estune.errors import UserError

Row = dict[str, Any]

STREAM_ROWS = 100_000  # most rows of a stream: a run shuffles all its rows, so a stream is read to its end


def rows_in_memory(source: Any) -> list[Row]:
    """Return the rows of a Python object: a list of dicts, a dataset, a data frame, a stream, or another iterable.

    Missing values of a pandas data frame are None, as `datasets` reads them.

    Raises:
        UserError: the object holds several datasets, is a stream of more than `STREAM_ROWS` rows, or yields no dicts.
    """
    if isinstance(source, Mapping):
        raise UserError(
            f"a {type(source).__name__} holds several datasets ({', '.join(map(str, source))}): pass one of them"
        )
    with one_sentence("the dataset cannot be read"):
        if is_stream(source):
            return _rows_of_stream(source)
        if _is_data_frame(source):
            return rows_of_frame(source)
        rows = _rows_of_sequence(source)
    if not all(isinstance(row, dict) for row in rows):
        raise UserError("a dataset must be a sequence of dicts, one per row")
    return rows


def is_stream(source: Any) -> bool:
    """Return whether an object is no dict and has no length: it may never end, and may be read only once."""
    try:
        len(source)
    except TypeError:
        return not isinstance(source, Mapping)
    return False


def _rows_of_stream(source: Any) -> list[Row]:
    """Return the rows of a stream that ends."""
    kind = type(source).__name__
    if not hasattr(source, "__iter__"):
        raise UserError(f"a dataset of type {kind} holds no rows: pass a list of dicts or a datasets.Dataset")
    rows = []
    for row in itertools.islice(source, STREAM_ROWS + 1):
        if not isinstance(row, Mapping):
            raise UserError(f"a dataset must yield dicts, one per row, and a {kind} yielded a {type(row).__name__}")
        rows.append(dict(row))
    if len(rows) > STREAM_ROWS:
        first = f".take({STREAM_ROWS})" if hasattr(source, "take") else f"itertools.islice(stream, {STREAM_ROWS})"
        raise UserError(
            f"a dataset of type {kind} has no length and more than {STREAM_ROWS:,} rows: a run shuffles all its rows, "
            f"so pass the first ones alone, with {first}"
        )
    return rows


def _rows_of_sequence(source: Any) -> list[Row]:
    """Return the rows of an object with a length: its own list of rows, or its elements."""
    for method in ("to_list", "to_dicts", "to_pylist"):  # of datasets, of polars, of pyarrow
        if hasattr(source, method):
            return list(getattr(source, method)())
    # A sequence such as torch's map-style dataset may accept any index, so iterating over it may never end.
    return list(itertools.islice(source, len(source)))


def _is_data_frame(source: Any) -> bool:
    """Return whether an object is pandas' data frame, without importing pandas."""
    kinds = type(source).__mro__
    return any(kind.__name__ == "DataFrame" and kind.__module__.split(".")[0] == "pandas" for kind in kinds)


def rows_of_frame(frame: Any) -> list[Row]:
    """Return the rows of a pandas data frame with the types and missing values that `datasets` gives them.

    An index with a name is a column; another index is left out.

    Raises:
        UserError: the name of a column is not a string.
    """
    import pyarrow

    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    for name in frame.columns:
        if not isinstance(name, str):
            raise UserError(f"the dataset has a column named {name!r}: the name of a column must be a string")
    rows: list[Row] = pyarrow.Table.from_pandas(frame, preserve_index=False).to_pylist()
    return rows


def split_of(source: Mapping[str, Any], names: Sequence[str], option: str) -> tuple[str, Any]:
    """Return the first of several splits that a dict of datasets has: its name and its rows.

    Args:
        source: split -> dataset.
        names: the splits, the preferred one first.
        option: the option that names another split, for the message.

    Raises:
        UserError: the dict has none of the splits.
    """
    found = next((name for name in names if name in source), None)
    if found is None:
        raise UserError(
            f"the {type(source).__name__} has no split {' or '.join(map(repr, names))} (it has "
            f"{', '.join(map(str, source)) or 'none'}): set {option}, or pass the rows of one split"
        )
    return found, source[found]


@contextlib.contextmanager
def one_sentence(sentence: str) -> Iterator[None]:
    """Turn any error of code that reads data into a UserError of one sentence.

    The code is that of `datasets`, of another library or of the user. Errors of `datasets` have no common class: a bad
    card raises TypeError or AttributeError, a damaged state KeyError, and other causes OSError, ValueError,
    RuntimeError, YAMLError, ArrowException, or DatasetsError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{sentence}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
