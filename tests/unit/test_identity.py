"""Equal values have equal bytes and other values have others, whatever their type; what has none is refused by name."""

import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import re
import subprocess
import sys
import threading
import uuid
import zoneinfo

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from estune.errors import UserError
from estune.identity import NoIdentityError, digest, encode, rows_digest
from estune.train.setup import rows_fingerprint

Pair = collections.namedtuple("Pair", "left right")


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Size(enum.IntEnum):
    SMALL = 1


@dataclasses.dataclass
class Point:
    x: int
    y: object = None


@dataclasses.dataclass(slots=True)
class Slotted:
    x: int


class Text(str):
    """A string with a class of its own."""


UTC = datetime.UTC
DIFFERENT = [
    None, True, False, 0, 1, -1, 128, -128, 2**70, -(2**63), 10**5000, 0.0, -0.0, 1.0, 0.1, float("nan"), float("inf"),
    "", "1", "a", "\ud800", "\x00", Text("a"), b"", b"a", bytearray(b"b"), [], [1], (1,), [[1], 2], [[1, 2]], {},
    {"a": 1}, {1: "a"}, {"1": "a"}, {(1, 2): 3}, {"a": None}, set(), {1}, frozenset({1}), {"a", "b"},
    decimal.Decimal("1"), decimal.Decimal("1.0"), decimal.Decimal("NaN"), fractions.Fraction(1, 3), complex(1, 2),
    datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 1, tzinfo=UTC),
    datetime.datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), datetime.datetime(2020, 1, 1, 0, 0, 0, 1),
    datetime.time(1), datetime.timedelta(1), uuid.UUID(int=1), uuid.UUID(int=2), Colour.RED, Colour.BLUE, Size.SMALL,
    Pair(1, 2), Pair(1, 3), Point(1), Point(2), Point(1, Point(2)), Slotted(1), Slotted(2),
    np.int64(1), np.int32(1), np.float32(1), np.bool_(True), np.str_("a"), np.array([1, 2]), np.array([[1, 2]]),
    np.array([1, 2], dtype="i2"), np.array(["a"], object), np.array([(1, 2.0)], dtype="i4,f4"), np.ma.array([1]),
    np.datetime64("2020-01-01"), np.datetime64("2020-01-02"), pandas.Timestamp("2020-01-01"),
    np.array(1), np.array([[1]]), pandas.Timestamp("2020-01-01 00:00:00.000000001"),
    pandas.Series([1]), pandas.Series([2]),
    torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([[1.0]]),
    re.compile("a"), re.compile("a", re.IGNORECASE), pathlib.PurePosixPath("a"), range(3), range(4), slice(1),
    collections.OrderedDict(a=1), collections.deque([1]), collections.Counter("aa"), collections.Counter("a"), int, str,
]  # fmt: skip


def test_different_values_have_different_bytes():
    found = {}
    for value in DIFFERENT:
        code = encode(value)
        assert code not in found, (value, found.get(code))
        found[code] = value


@pytest.mark.parametrize("index", range(len(DIFFERENT)))
def test_a_copy_has_the_same_bytes(index):
    value = DIFFERENT[index]
    assert encode(copy.deepcopy(value)) == encode(value)
    assert encode([value, {"k": (value,)}]) == encode([copy.deepcopy(value), {"k": (value,)}])


def subclass(**attributes):
    value = Labelled(a=1)
    value.__dict__.update(attributes)
    return value


class Labelled(dict):
    """A dict with attributes."""


class Partly:
    """An object that is made by a partial."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        return functools.partial(Partly, self.number), ()


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        (subclass(label=1), subclass(label=2), False),
        (subclass(label=1), subclass(label=1), True),
        (collections.defaultdict(int, a=1), collections.defaultdict(list, a=1), False),
        (collections.defaultdict(int, a=1, b=2), collections.defaultdict(int, b=2, a=1), True),
        (collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1), False),
        (Partly(1), Partly(2), False),
        (Partly(1), Partly(1), True),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j]), True),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]), False),
    ],
)
def test_subclasses_count_by_all_that_they_hold(one, other, are_equal):
    assert (encode(one) == encode(other)) == are_equal


def test_a_value_that_is_held_in_many_places_is_looked_at_once():
    value = [1]
    for _ in range(60):  # 2^60 paths lead to it
        value = [value, value]
    assert len(encode(value)) < 100


def test_order_counts_in_lists_and_not_in_dicts_and_sets():
    assert encode({"a": 1, "b": 2}) == encode({"b": 2, "a": 1})
    assert encode(set("abcdef")) == encode(set("fedcba"))
    assert encode([1, 2]) != encode([2, 1])


def test_nan_is_itself_whatever_its_bits():
    other = np.array([0x7FF8000000000001], dtype=np.uint64).view(np.float64)[0].item()
    assert encode(other) == encode(float("nan")) != encode(float("inf"))


def test_hashes_do_not_depend_on_the_process():
    code = "from estune.identity import digest; print(digest([{'a', 'b', 'c'}, {'x': {1.5, 'y'}}]))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert found == {digest([{"a", "b", "c"}, {"x": {1.5, "y"}}]) + "\n"}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    ).flatmap(lambda value: st.tuples(st.just(value), st.just(value) | st.lists(st.integers(), max_size=2)))
)
def test_bytes_are_equal_where_values_are(pair):
    one, other = pair
    if type(one) is type(other) and one == other and repr(one) == repr(other):
        assert encode(one) == encode(other)
    else:
        assert encode(one) != encode(other)


def closed_file():
    with open(__file__) as file:
        return file


def endless():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: len, "builtin_function_or_method"),
        (lambda: endless, "function"),
        (lambda: (number for number in []), "generator"),
        (threading.Lock, "lock"),
        (endless, "refers to itself"),
        (lambda: [endless()], "refers to itself"),
        (lambda: {"f": [print]}, "builtin_function_or_method"),
        (lambda: re, "module"),
        (closed_file, "TextIOWrapper"),
        (lambda: torch.tensor([1.0]).to("meta"), "tensor"),
    ],
)
def test_what_has_no_identity_is_refused_with_row_and_column(make, named):
    value = make()
    with pytest.raises(NoIdentityError):
        encode(value)
    rows = [{"prompt": "p", "fine": 1}, {"prompt": "p", "odd one": value}]
    with pytest.raises(UserError, match=r"row 1: column 'odd one' holds") as refused:
        rows_digest(rows)
    assert named in str(refused.value)


def test_every_value_tokens_and_the_order_of_rows_count():
    rows = [{"prompt": "a", "v": decimal.Decimal(1)}, {"prompt": "b", "v": None}]
    tokens = [(1, 2), (3,)]
    wanted = rows_digest(rows, tokens)
    assert rows_digest(copy.deepcopy(rows), [[1, 2], [3]]) == wanted
    others = [
        rows_digest(rows[::-1], tokens[::-1]),
        rows_digest(rows, [(1,), (2, 3)]),
        rows_digest(rows, [(1, 2), (4,)]),
        rows_digest([{**rows[0], "v": decimal.Decimal(2)}, rows[1]], tokens),
        rows_digest([{**rows[0], "w": 0}, rows[1]], tokens),
        rows_digest(rows[:1], tokens[:1]),
    ]
    assert len({wanted, *others}) == len(others) + 1


def test_rows_of_a_comparison_count_by_every_value():
    plain = [{"prompt": "a", "v": 1}]
    assert rows_fingerprint(plain) == "e52a4f794247c33cb7d3ccdf94cd3896"  # as comparisons that are stored have it
    odd = [[{"prompt": "a", "v": decimal.Decimal(number)}] for number in (1, 2)]
    assert len({rows_fingerprint(rows) for rows in (plain, *odd)}) == 3
