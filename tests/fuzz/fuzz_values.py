"""Values of every type that a dataset's column can have, as Python expressions, so that a case is one line of JSON.

The values of a kind differ from each other in every format of a dataset. ``None`` is allowed with every kind.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np


class Colour(enum.Enum):
    """An enumeration."""

    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    """An enumeration whose members are numbers."""

    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Point:
    """A user's class."""

    x: int


NAMES = {"np": np, "Decimal": Decimal, "Fraction": Fraction, "UUID": UUID, "ZoneInfo": ZoneInfo, "date": date,
         "datetime": datetime, "time": time, "timedelta": timedelta, "timezone": timezone, "Colour": Colour,
         "Level": Level, "Point": Point, "PurePosixPath": PurePosixPath, "nan": float("nan"),
         "inf": float("inf")}  # fmt: skip

# kind -> values that JSON, and so every source, can hold
JSON: dict[str, list[str]] = {
    "null": ["None"],
    "bool": ["True", "False"],
    "int": ["0", "1", "-1", "2**31", "2**53 + 1", "2**63", "-2**63 - 1", "2**64", "2**70"],
    "float": ["0.0", "-0.0", "1.0", "0.1", "1e300", "5e-324", "nan", "inf", "-inf"],
    "text": ["''", "' '", "'a'", "'\\x00'", "'caf\\xe9'", "'cafe\\u0301'", "'\\ufeff'", "'\\u202eabc'", "'\\U0001f600'",
             "'\\U0010fffd'", "'\\ud800'", "'\\r\\n\\u2028'", "'x' * 70000", "'1'", "'None'", "'nan'"],
    "list": ["[]", "[None]", "[0]", "[1, 2]", "[2, 1]", "['a']", "[[]]", "[[1], [2, None]]", "[True]", "[1.5]"],
    "struct": ["{}", "{'a': 1}", "{'a': None}", "{'a': 1.0}", "{'b': 1}", "{'': 1}", "{'a': {'b': [1]}}",
               "{'a': 1, 'b': 2}"],
    "structs": ["[{}]", "[{'a': 1}]", "[{'a': 2}]", "[{'a': 1}, {'a': 2}]", "[{'a': 2}, {'a': 1}]", "[{'b': [{}]}]"],
    "mixed": ["0", "0.0", "False", "''", "'0'", "[]", "{}", "[0]", "'False'"],
}  # fmt: skip
# kind -> further values that rows in Python can hold
PYTHON: dict[str, list[str]] = {
    "decimal": ["Decimal('1')", "Decimal('1.5')", "Decimal('-0')", "Decimal('NaN')", "Decimal('1e400')"],
    "time": ["date(2024, 2, 29)", "datetime(2024, 2, 29)", "datetime(2024, 2, 29, 1, 2, 3, 4)",
             "datetime(2024, 2, 29, tzinfo=timezone.utc)", "datetime(2024, 2, 29, tzinfo=ZoneInfo('Asia/Tokyo'))",
             "datetime(2024, 11, 3, 1, tzinfo=ZoneInfo('America/New_York'))",
             "datetime(2024, 11, 3, 1, fold=1, tzinfo=ZoneInfo('America/New_York'))",
             "time(1, 2)", "timedelta(days=1)", "timedelta(microseconds=1)"],
    "bytes": ["b''", "b'a'", "b'\\x00'", "b'\\xff'", "bytearray(b'a')"],
    "set": ["set()", "{1, 2}", "{'a', 'b', 'c'}", "frozenset({1})", "{1, 'a', None}", "{(1, 2)}"],
    "tuple": ["()", "(1,)", "((1, 2), None)", "range(3)", "range(4)"],
    "keys": ["{1: 'a'}", "{'1': 'a'}", "{1: 'a', 'b': 2}", "{None: 1}", "{(1, 2): 3}", "{1.5: 1, True: 2}", "{nan: 1}",
             "{b'a': 1}", "{date(2024, 1, 1): 1}"],
    "enum": ["Colour.RED", "Colour.BLUE", "Level.LOW", "Level.HIGH", "[Colour.RED]", "{'a': Colour.RED}",
             "{Colour.RED: 1}", "{Level.HIGH: 1}"],
    "numpy": ["np.array([1, 2])", "np.array([1, 3])", "np.array([1.0, nan])", "np.array([], dtype='f4')", "np.array(5)",
              "np.array([[1, 2]])", "np.array(['a', None], dtype=object)", "np.array(['2024-01-01'], dtype='M8[D]')",
              "np.arange(3000)", "np.arange(3000)[::-1]", "np.array([1, 2], dtype='>i4')",
              "np.ma.array([1, 2], mask=[0, 1])", "np.zeros(3, dtype=[('a', 'i4')])"],
    "scalar": ["np.int64(7)", "np.uint64(2**64 - 1)", "np.float32(0.1)", "np.float64('nan')", "np.bool_(True)",
               "np.str_('a')", "np.datetime64('2024-01-01')", "np.complex64(1j)", "np.float16(1)"],
    "object": ["Fraction(1, 3)", "UUID(int=1)", "PurePosixPath('/a')", "1j", "Point(1)", "Point(2)", "Ellipsis", "int",
               "len", "[Point(1)]"],
}  # fmt: skip
# kind -> Arrow's type, and values that differ in it
ARROW: dict[str, tuple[str, list[str]]] = {
    "null": ("pa.null()", ["None"]),
    "bool": ("pa.bool_()", ["True", "False"]),
    "int8": ("pa.int8()", ["-128", "0", "127"]),
    "uint64": ("pa.uint64()", ["0", "1", "2**63", "2**64 - 1"]),
    "int64": ("pa.int64()", ["0", "1", "-2**63", "2**63 - 1", "2**53 + 1"]),
    "float16": ("pa.float16()", ["0.0", "-0.0", "1.5", "nan", "inf"]),
    "float32": ("pa.float32()", ["0.0", "-0.0", "0.1", "nan", "inf", "-inf", "1e-40"]),
    "float64": ("pa.float64()", ["0.0", "-0.0", "0.1", "nan", "inf", "-inf", "5e-324"]),
    "decimal": ("pa.decimal128(38, 10)", ["Decimal('1')", "Decimal('1.5')", "Decimal('-1e20')", "Decimal('1e-10')"]),
    "decimal256": ("pa.decimal256(60, 2)", ["Decimal('1')", "Decimal('1e50')"]),
    "date32": ("pa.date32()", ["date(1970, 1, 1)", "date(2024, 2, 29)", "date(1, 1, 1)"]),
    "date64": ("pa.date64()", ["date(1970, 1, 1)", "date(2024, 2, 29)"]),
    "timestamp": ("pa.timestamp('us')", ["datetime(2024, 2, 29)", "datetime(2024, 2, 29, 1)", "datetime(1, 1, 1)"]),
    "zoned": ("pa.timestamp('us', tz='Asia/Tokyo')", ["datetime(2024, 2, 29, tzinfo=timezone.utc)",
              "datetime(2024, 3, 1, tzinfo=timezone.utc)", "datetime(1969, 1, 1, tzinfo=timezone.utc)"]),
    "offset": ("pa.timestamp('s', tz='+05:30')", ["datetime(2024, 2, 29, tzinfo=timezone.utc)",
               "datetime(2024, 3, 1, tzinfo=timezone.utc)"]),
    "nanoseconds": ("pa.timestamp('ns')", ["1", "2", "1000"]),
    "far seconds": ("pa.timestamp('s')", ["0", "2**50"]),
    "time": ("pa.time64('us')", ["time(0)", "time(23, 59, 59, 999999)"]),
    "time ns": ("pa.time64('ns')", ["1", "1001"]),
    "duration": ("pa.duration('us')", ["timedelta(0)", "timedelta(days=-1)", "timedelta(microseconds=1)"]),
    "duration ns": ("pa.duration('ns')", ["1", "2"]),
    "interval": ("pa.month_day_nano_interval()", ["(1, 2, 3)", "(1, 2, 4)"]),
    "binary": ("pa.binary()", ["b''", "b'a'", "b'\\x00'", "b'\\xff\\xfe'"]),
    "fixed": ("pa.binary(2)", ["b'ab'", "b'\\x00\\x00'"]),
    "string": ("pa.string()", ["''", "' '", "'a'", "'\\x00'", "'\\ufeff'", "'\\U0010fffd'", "'x' * 70000"]),
    "large string": ("pa.large_string()", ["''", "'a'", "'caf\\xe9'"]),
    "dictionary": ("pa.dictionary(pa.int8(), pa.string())", ["'a'", "'b'", "''"]),
    "list": ("pa.list_(pa.int64())", ["[]", "[None]", "[1]", "[1, 2]", "[2, 1]"]),
    "fixed list": ("pa.list_(pa.float32(), 2)", ["[1.0, 2.0]", "[2.0, 1.0]", "[nan, 0.0]"]),
    "lists": ("pa.list_(pa.list_(pa.string()))", ["[]", "[[]]", "[['a'], None]", "[['a', None]]"]),
    "struct": ("pa.struct([('a', pa.int64()), ('b', pa.string())])", ["{'a': 1, 'b': 'x'}", "{'a': None, 'b': 'x'}",
               "{'a': 1, 'b': None}", "{'a': 2, 'b': 'x'}"]),
    "no fields": ("pa.struct([])", ["{}"]),
    "structs": ("pa.list_(pa.struct([('a', pa.date32()), ('b', pa.binary())]))", ["[]", "[{'a': None, 'b': b'x'}]",
                "[{'a': date(2024, 1, 1), 'b': b'x'}]", "[{'a': date(2024, 1, 2), 'b': b'x'}]"]),
    "map": ("pa.map_(pa.string(), pa.int64())", ["[]", "[('a', 1)]", "[('a', 2)]", "[('b', 1)]", "[('a', 1), ('a', 2)]",
            "[('a', None)]"]),
    "int map": ("pa.map_(pa.int64(), pa.list_(pa.float64()))", ["[(1, [0.5])]", "[(2, [0.5])]", "[(1, [nan])]"]),
    "map of maps": ("pa.map_(pa.string(), pa.map_(pa.int8(), pa.binary()))", ["[]", "[('a', [(1, b'x')])]",
                    "[('a', [(1, b'y')])]"]),
}  # fmt: skip


def value(expression: str) -> Any:
    """Return the value of an expression of these tables."""
    return eval(expression, {"__builtins__": __builtins__, **NAMES})


def arrow_type(kind: str) -> Any:
    """Return the Arrow type of a kind."""
    import pyarrow as pa

    return eval(ARROW[kind][0], {"pa": pa})


def arrow_array(kind: str, expressions: Sequence[str]) -> Any:
    """Return a column as an Arrow array."""
    import pyarrow as pa

    return pa.array([value(expression) for expression in expressions], arrow_type(kind))


def rows_of(columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return columns (name, values as expressions) as rows; the last of several columns with one name counts."""
    n_rows = len(columns[0]["values"])
    return [{column["name"]: value(column["values"][row]) for column in columns} for row in range(n_rows)]
