"""The identity of data: one byte string per value, of any type, equal if and only if the values are equal.

A resume must train on the rows that the run began with, so every value of every column is hashed. `encode` writes a
value's type and content, each part with its length, so that no two values share an encoding: 1 is not True, a tuple is
not a list, the key 1 is not the key "1". Types without a rule of their own are reduced as `pickle` reduces them. A
value that cannot be reduced (a function, a generator, an open file) is refused: a hash that ignored the value would
accept any other in its place.
"""

from __future__ import annotations

import copyreg
import functools
import struct
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from estune.errors import UserError

MOST_LEVELS = 100  # nested containers within a value
DIGEST_BYTES = 16

_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    types.GeneratorType,
    types.CoroutineType,
    types.CodeType,
)


class NoIdentityError(Exception):
    """A value has no identity; the message describes the value."""


def encode(value: Any) -> bytes:
    """Return the bytes that stand for a value: equal values give equal bytes, in every process and on every machine.

    A container is encoded as a hash of its parts, so a value that occurs in many places is read once. The order of
    dictionaries and sets does not count. All NaN floats are equal; 0.0 and -0.0 differ.

    Raises:
        NoIdentityError: the value, or a part of it, is a function or another object that cannot be reduced, refers to
            itself, or is nested more than 100 levels deep.
    """
    return _Encoder().encode(value, 0)


def digest(value: Any) -> str:
    """Return a hash (32 hexadecimal digits) of a value's bytes, see `encode`."""
    return blake2b(encode(value), digest_size=DIGEST_BYTES).hexdigest()


def rows_digest(rows: Sequence[Mapping[str, Any]], token_ids: Iterable[Sequence[int]] | None = None) -> str:
    """Return a hash of rows, in order, and of their prompts' tokens if ``token_ids`` (rows, P) are given.

    Raises:
        UserError: a value has no identity; the message names row, column and type.
    """
    running = blake2b(digest_size=DIGEST_BYTES)
    tokens = iter(token_ids) if token_ids is not None else None
    for index, row in enumerate(rows):
        if tokens is not None:
            running.update(encode(list(next(tokens))))
        running.update(_encoded_row(row, index))
    return running.hexdigest()


def _encoded_row(row: Mapping[str, Any], index: int) -> bytes:
    out = bytearray()
    for name in sorted(row):
        out += _part(b"k", name.encode("utf-8", "surrogatepass"))
        try:
            out += encode(row[name])
        except NoIdentityError as error:
            raise UserError(
                f"row {index}: column {name!r} holds {error}, which a resume cannot compare; convert the column to "
                "plain values"
            ) from None
    return _part(b"r", bytes(out))


def _part(tag: bytes, content: bytes) -> bytes:
    return tag + struct.pack("<Q", len(content)) + content


class _Encoder:
    """Encodes one value. It keeps references to the containers seen, so that their ids stay unique."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, bytes]] = {}

    def encode(self, value: Any, level: int) -> bytes:
        """Return a value's bytes; for a container, a hash of its parts."""
        kind = type(value)
        if value is None or value is True or value is False:
            return {None: b"N", True: b"T", False: b"F"}[value]
        if kind is int:
            return _part(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
        if kind is float:
            return b"f" + struct.pack("<d", value if value == value else float("nan"))
        if kind is str:
            return _part(b"s", value.encode("utf-8", "surrogatepass"))
        if kind in (bytes, bytearray):
            return _part(b"b", bytes(value))
        known = self._known.get(id(value))
        if known is None:
            if level > MOST_LEVELS:
                raise NoIdentityError("a value that is nested too deeply, or refers to itself")
            parts = b"".join(_part(b"", part) for part in self._parts(value, level + 1))
            known = self._known[id(value)] = value, b"#" + blake2b(parts, digest_size=DIGEST_BYTES).digest()
        return known[1]

    def _parts(self, value: Any, level: int) -> list[bytes]:
        """Return the bytes of each part of a value that is neither a number nor text."""
        kind = type(value)
        name = _qualified(kind).encode()
        if kind in (list, tuple):
            return [name, *(self.encode(item, level) for item in value)]
        if kind is dict:
            return [name, *sorted(self.encode(key, level) + self.encode(item, level) for key, item in value.items())]
        if isinstance(value, (set, frozenset)):
            state = self.encode(getattr(value, "__dict__", None) or None, level)
            return [name, state, *sorted(self.encode(item, level) for item in value)]
        if isinstance(value, type):
            return [b"class", _qualified(value).encode()]
        if kind.__module__ == "numpy" and hasattr(value, "dtype"):
            content = self.encode(value.tolist(), level) if value.dtype.hasobject else value.tobytes()
            return [name, str(value.dtype.descr).encode(), self.encode(list(value.shape), level), content]
        if kind.__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
            return [name, str(value.dtype).encode(), self.encode(list(value.shape), level), _bytes_of_tensor(value)]
        return [name, *self._parts_of_object(value, level)]

    def _parts_of_object(self, value: Any, level: int) -> list[bytes]:
        """Return the parts that `pickle` stores of any other object: its constructor, the arguments, and its state."""
        kind = type(value)
        if isinstance(value, _FUNCTIONS):
            raise NoIdentityError(f"a {kind.__name__}")
        try:
            reduce = copyreg.dispatch_table.get(kind)
            reduced: Any = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        except Exception as error:  # the user's own class: its methods can raise anything
            raise NoIdentityError(f"a {kind.__name__} ({error})") from None
        if isinstance(reduced, str):
            return [b"global", reduced.encode()]
        maker, arguments, *rest = reduced
        parts = [self._maker(maker, level), self.encode(tuple(arguments), level)]
        for place, part in enumerate(rest[:3]):  # state, list items, dict items
            if place == 2 and part is not None and not isinstance(value, OrderedDict):
                part = dict(part)
            parts.append(self.encode(list(part) if hasattr(part, "__next__") else part, level))
        return parts

    def _maker(self, maker: Any, level: int) -> bytes:
        """Return the bytes of an object's constructor: a class or function by name, a partial with its arguments."""
        if isinstance(maker, functools.partial):
            return self._maker(maker.func, level) + self.encode([list(maker.args), maker.keywords], level)
        if not hasattr(maker, "__qualname__"):  # neither a class nor a function, compiled ones included
            raise NoIdentityError(f"an object whose constructor is a {type(maker).__name__}")
        return _part(b"m", _qualified(maker).encode())


def _bytes_of_tensor(value: Any) -> bytes:
    """Return the elements of a torch tensor in row-major order."""
    try:
        flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
        content: bytes = flat.view(sys.modules["torch"].uint8).numpy().tobytes()
    except (RuntimeError, TypeError) as error:
        raise NoIdentityError(f"a tensor that cannot be read ({error})") from None
    return content


def _qualified(thing: Any) -> str:
    """Return the module and the name of a class or of a function."""
    module = getattr(thing, "__module__", None) or type(getattr(thing, "__self__", None)).__module__
    return f"{module}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
