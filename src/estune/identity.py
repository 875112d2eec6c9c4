"""The identity of data: one byte string for every value, whatever its type, equal if and only if the values are equal.

A resume must train on the rows that the run was begun with, so every value of every column is hashed. `encode` writes a
value's type and content, each part with its length, so that no two values share a text: 1 is not True, a tuple is not
a list, the key 1 is not the key "1". Types without a rule of their own are taken apart as `pickle` would take them
apart. A value that cannot be (a function, a generator, an open file) is refused: a hash that ignored it would accept
any other in its place.
"""

from __future__ import annotations

import copyreg
import struct
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from estune.errors import UserError

MOST_LEVELS = 100  # of containers within a value
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
    """A value has no identity; the message says what it is."""


def encode(value: Any) -> bytes:
    """Return the bytes that stand for a value: equal values give equal bytes, in every process and on every machine.

    Dictionaries and sets are equal whatever their order. All NaN floats are equal; 0.0 and -0.0 are not.

    Raises:
        NoIdentityError: the value, or something in it, is a function or another object that cannot be taken apart,
            refers to itself, or is nested more than 100 levels deep.
    """
    out = bytearray()
    _encode(value, out, 0)
    return bytes(out)


def digest(value: Any) -> str:
    """Return a hash (32 hexadecimal digits) of a value's bytes, see `encode`."""
    return blake2b(encode(value), digest_size=DIGEST_BYTES).hexdigest()


def rows_digest(rows: Sequence[Mapping[str, Any]], token_ids: Iterable[Sequence[int]] | None = None) -> str:
    """Return a hash of rows, in order, and of the tokens of their prompts where ``token_ids`` (rows, P) are given.

    Raises:
        UserError: a value has no identity; the sentence names row, column and type.
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
        _part(out, b"k", name.encode("utf-8", "surrogatepass"))
        try:
            out += encode(row[name])
        except NoIdentityError as error:
            raise UserError(
                f"row {index}: column {name!r} holds {error}, by which a resume could not know the data again; convert "
                "the column to plain values"
            ) from None
    return b"r" + struct.pack("<Q", len(out)) + bytes(out)


def _part(out: bytearray, tag: bytes, content: bytes) -> None:
    out += tag + struct.pack("<Q", len(content)) + content


def _encode(value: Any, out: bytearray, level: int) -> None:
    kind = type(value)
    if value is None or value is True or value is False:
        out += {None: b"N", True: b"T", False: b"F"}[value]
    elif kind is int:
        _part(out, b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    elif kind is float:
        out += b"f" + struct.pack("<d", value if value == value else float("nan"))
    elif kind is str:
        _part(out, b"s", value.encode("utf-8", "surrogatepass"))
    elif kind in (bytes, bytearray):
        _part(out, b"b", bytes(value))
    elif level > MOST_LEVELS:
        raise NoIdentityError("a value that is nested too deeply, or refers to itself")
    elif kind in (list, tuple):
        out += (b"l" if kind is list else b"t") + struct.pack("<Q", len(value))
        for item in value:
            _encode(item, out, level + 1)
    elif isinstance(value, (dict, set, frozenset)):
        _encode_unordered(value, out, level)
    elif isinstance(value, type):
        _part(out, b"c", _qualified(value).encode())
    elif kind.__module__ == "numpy" and hasattr(value, "dtype"):
        _encode_array(value, out, level)
    elif kind.__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        _encode_tensor(value, out, level)
    else:
        _encode_object(value, out, level)


def _encode_unordered(value: dict[Any, Any] | set[Any] | frozenset[Any], out: bytearray, level: int) -> None:
    """Write a dict or a set, or an object of a class derived from them, by its items in the order of their bytes."""
    items: list[bytes] = []
    for item in value.items() if isinstance(value, dict) else value:
        part = bytearray()
        _encode(item, part, level + 1)
        items.append(bytes(part))
    _part(out, b"u", _qualified(type(value)).encode())
    out += struct.pack("<Q", len(items)) + b"".join(sorted(items))


def _encode_array(value: Any, out: bytearray, level: int) -> None:
    """Write a NumPy array or scalar: dtype, shape, elements in row-major order."""
    _part(out, b"a", str(value.dtype.descr).encode())
    _encode(list(value.shape), out, level + 1)
    if value.dtype.hasobject:
        _encode(value.tolist(), out, level + 1)
    else:
        _part(out, b"b", value.tobytes())


def _encode_tensor(value: Any, out: bytearray, level: int) -> None:
    """Write a torch tensor: dtype, shape, elements in row-major order."""
    try:
        flat = value.detach().cpu().contiguous().flatten()
        content = flat.view(sys.modules["torch"].uint8).numpy().tobytes()
    except (RuntimeError, TypeError) as error:
        raise NoIdentityError(f"a tensor that cannot be read ({error})") from None
    _part(out, b"a", str(value.dtype).encode())
    _encode(list(value.shape), out, level + 1)
    _part(out, b"b", content)


def _encode_object(value: Any, out: bytearray, level: int) -> None:
    """Write any other object as `pickle` sees it: what makes it, with which arguments, and what state it then gets."""
    kind = type(value)
    if isinstance(value, _FUNCTIONS):
        raise NoIdentityError(f"a {kind.__name__}")
    try:
        reduce = copyreg.dispatch_table.get(kind)
        reduced: Any = reduce(value) if reduce is not None else value.__reduce_ex__(4)
    except Exception as error:  # an object of the user's: whatever its methods raise
        raise NoIdentityError(f"a {kind.__name__} ({error})") from None
    if isinstance(reduced, str):
        _part(out, b"g", f"{_qualified(kind)} {reduced}".encode())
        return
    maker, arguments, *rest = reduced
    _part(out, b"o", _qualified(kind).encode())
    _part(out, b"m", _qualified(maker).encode())
    _encode(tuple(arguments), out, level + 1)
    for part in rest[:3]:  # state, list items, dict items
        is_plain = part is None or isinstance(part, (dict, tuple, list, str, bytes))
        _encode(part if is_plain or not hasattr(part, "__next__") else list(part), out, level + 1)


def _qualified(thing: Any) -> str:
    """Return the module and the name of a class or of a function."""
    module = getattr(thing, "__module__", None) or type(getattr(thing, "__self__", None)).__module__
    return f"{module}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
