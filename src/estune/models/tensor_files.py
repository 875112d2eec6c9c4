"""Writes safetensors files tensor by tensor, and reads them by memory map.

The library's own writer converts all tensors to bytes before it writes the first, which doubles the memory of a save.
The format is a length, a JSON header and raw little-endian data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from estune.errors import UserError
from estune.files import replace_file

CHUNK = 1 << 20  # elements cast at a time
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
_STORED = {np.dtype(code): name for name, code in _NUMPY.items() if name != "BF16"}
_TARGET = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return float32 values rounded to bfloat16, half to even, as uint16 bit patterns; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def write_tensors(
    path: Path, parameters: Mapping[str, np.ndarray], buffers: Mapping[str, np.ndarray], dtypes: Mapping[str, str]
) -> None:
    """Write a safetensors file: float32 ``parameters``, cast once to their ``dtypes``, and ``buffers`` unchanged.

    The file appears whole or not at all. It holds no times, so equal tensors give equal bytes.

    Raises:
        UserError: the disk is full.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    tensors = {**parameters, **buffers}
    offset = 0
    for name in sorted(tensors):
        array = tensors[name]
        stored = _TARGET[dtypes[name]] if name in parameters else _STORED[array.dtype]
        size = array.size * np.dtype(_NUMPY[stored]).itemsize
        header[name] = {"dtype": stored, "shape": list(array.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)

    def write(file) -> None:  # type: ignore[no-untyped-def]
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            flat = np.ascontiguousarray(tensors[name]).reshape(-1)
            for start in range(0, flat.size, CHUNK):
                chunk = flat[start : start + CHUNK]
                dtype = dtypes[name] if name in parameters else "float32"
                if dtype != "float32":
                    with np.errstate(over="ignore"):  # values beyond float16's range become inf, as in torch
                        chunk = to_bfloat16(chunk) if dtype == "bfloat16" else chunk.astype(np.float16)
                file.write(chunk.data)

    replace_file(path, write)


class TensorFile:
    """A memory-mapped safetensors file; reads any range of elements of a tensor as float32.

    Raises:
        UserError: the file is missing, truncated or not safetensors. The read methods raise it for an unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
            length = struct.unpack("<Q", self._bytes[:8].tobytes())[0]
            header = json.loads(self._bytes[8 : 8 + length].tobytes())
            header.pop("__metadata__", None)
            self._start = 8 + length
            end = max((_end_of(entry) for entry in header.values()), default=0)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except (ValueError, struct.error, KeyError, TypeError, AttributeError, OSError, RecursionError):
            raise UserError(f"{path} is not a safetensors file") from None
        if self._start + end > self._bytes.size:
            raise UserError(f"{path} is truncated: {self._bytes.size} bytes of {self._start + end}")
        self.entries: dict[str, dict] = header  # type: ignore[type-arg]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self.entries[name]["shape"])

    def is_readable(self, name: str) -> bool:
        """Return whether `read` knows a tensor's dtype."""
        return self.entries[name]["dtype"] in _NUMPY

    def _dtype(self, name: str) -> np.dtype[Any]:
        stored = self.entries[name]["dtype"]
        if stored not in _NUMPY:
            raise UserError(f"{self.path} stores tensor {name!r} as {stored!r}, a dtype that estune does not read")
        return np.dtype(_NUMPY[stored])

    def raw(self, name: str, start: int = 0, count: int | None = None) -> np.ndarray:
        """Return ``count`` stored elements from ``start`` (flat) on: a view of the map; bfloat16 as uint16."""
        entry, dtype = self.entries[name], self._dtype(name)
        low, high = entry["data_offsets"]
        first = low + start * dtype.itemsize
        last = high if count is None else first + count * dtype.itemsize
        return self._bytes[self._start + first : self._start + last].view(dtype)

    def read(self, name: str, start: int = 0, count: int | None = None) -> np.ndarray:
        """Return ``count`` elements from ``start`` (flat) on as float32: a view if they are stored as float32."""
        values = self.raw(name, start, count)
        if self.entries[name]["dtype"] == "BF16":
            return from_bfloat16(np.asarray(values))
        return np.asarray(values, dtype=np.float32)

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Fill a flat float32 array with a tensor; plain reads leave no page of the map in this process's memory."""
        entry, dtype = self.entries[name], self._dtype(name)
        with self.path.open("rb") as file:
            file.seek(self._start + entry["data_offsets"][0])
            for start in range(0, out.size, CHUNK):
                piece = out[start : start + CHUNK]
                values = np.fromfile(file, dtype=dtype, count=piece.size)
                piece[:] = from_bfloat16(values) if entry["dtype"] == "BF16" else values


def _end_of(entry: dict[str, Any]) -> int:
    """Return the end of a tensor's data in bytes; ValueError if dtype, shape and offsets contradict each other."""
    first, last = entry["data_offsets"]
    if not all(isinstance(number, int) for number in (first, last, *entry["shape"])):
        raise ValueError("sizes and offsets are whole numbers")
    code = _NUMPY.get(entry["dtype"])  # None: an unknown dtype
    size = last - first if code is None else math.prod(entry["shape"]) * np.dtype(code).itemsize
    if not 0 <= first <= last or last - first != size or any(dimension < 0 for dimension in entry["shape"]):
        raise ValueError("dtype, shape and offsets contradict each other")
    return int(last)


def open_model_files(directory: Path) -> dict[str, TensorFile]:
    """Return the file of every stored tensor of a model directory, sharded or not; empty without weight files."""
    if (directory / INDEX_FILE).exists():
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        files = {shard: TensorFile(directory / shard) for shard in set(index.values())}
        return {name: files[shard] for name, shard in index.items()}
    if (directory / WEIGHTS_FILE).exists():
        file = TensorFile(directory / WEIGHTS_FILE)
        return dict.fromkeys(file.entries, file)
    return {}
