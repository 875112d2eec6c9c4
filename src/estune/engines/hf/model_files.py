"""Checks of a model directory's files, before transformers reads them.

transformers ignores some damaged files, and its messages often name no file. For example, it silently ignores a damaged
generation_config.json, and completions would then end at other tokens. Of weight files only the headers are read.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from estune.errors import UserError
from estune.models.tensor_files import INDEX_FILE, WEIGHTS_FILE, TensorFile

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes in a safetensors header that estune can train
MOST_LAYERS = 1000  # layers; a larger number must not exceed the number of tensors in the files
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "n_embd", "n_layer")
_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor's entry in the header of a weight file; ``dtype`` is the format's name (``F32``)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def check_model_files(model: str, path: Path) -> dict[str, StoredTensor]:
    """Check the files of a model directory, except for the tokenizer's; return the tensors in its headers.

    The mapping is empty if the weights are not in safetensors files.

    Raises:
        UserError: a file is missing or damaged, or contradicts another file; the message names the model and the file.
    """
    _check_readable(model, path)
    if (path / "adapter_config.json").is_file():
        raise UserError(f"model directory {model!r} holds a PEFT adapter; merge it into its base model first")
    config = read_object(model, path / CONFIG_FILE)
    if config is None:
        raise UserError(f"model directory {model!r} has no config.json")
    _check_generation_config(model, read_object(model, path / GENERATION_FILE) or {})
    tensors = _read_headers(model, path)
    for values in (config, config.get("text_config")):
        if isinstance(values, dict):
            _check_counts(model, values, len(tensors))
    return tensors


def check_tokenizer_files(model: str, path: Path) -> None:
    """Check that each of the tokenizer's JSON files is missing or holds an object.

    Raises:
        UserError: a file is damaged; the message names the model and the file.
    """
    _check_readable(model, path)
    for name in (CONFIG_FILE, *TOKENIZER_FILES):
        read_object(model, path / name)


def _check_readable(model: str, path: Path) -> None:
    try:
        for name in os.listdir(path):
            os.lstat(path / name)
    except OSError as error:
        raise UserError(f"model directory {model!r} cannot be read ({error.strerror})") from error


def read_object(model: str, path: Path) -> dict[str, Any] | None:
    """Return the JSON object of one file of a model; ``None`` if the file does not exist.

    Raises:
        UserError: the file cannot be read, or does not hold a JSON object.
    """
    start = f"model directory {model!r}: {path.name}"
    if not path.exists():
        if path.is_symlink():
            raise UserError(f"{start} is a symbolic link to nothing")
        return None
    if path.is_dir():
        raise UserError(f"{start} is a directory, not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{start} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{start} is not JSON: it is not UTF-8 text") from error
    if not text.strip():
        raise UserError(f"{start} is empty")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{start} is truncated or not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{start} holds {_TYPES.get(type(value), 'null')} where a JSON object is expected")
    return value


def token_ids(value: Any) -> list[int]:
    """Return the distinct token ids of a setting, in order; the setting is None, an integer, or a list of integers.

    Raises:
        ValueError: the setting has another type.
    """
    values = [] if value is None else list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    ids: dict[int, None] = {}
    for item in values:
        if isinstance(item, bool):
            raise ValueError(f"{item!r} is not a token id")
        try:
            ids[operator.index(item)] = None
        except TypeError:
            raise ValueError(f"{item!r} is not a token id") from None
    return list(ids)


def _check_generation_config(model: str, values: Mapping[str, Any]) -> None:
    for name in ("eos_token_id", "pad_token_id"):
        value = values.get(name)
        try:
            token_ids(value)
        except ValueError as error:
            raise UserError(f"model directory {model!r}: {name} in {GENERATION_FILE} is invalid: {error}") from error
        if name == "pad_token_id" and isinstance(value, list):
            raise UserError(f"model directory {model!r}: {name} in {GENERATION_FILE} is a list, not one token id")


def _check_counts(model: str, values: Mapping[str, Any], tensors: int) -> None:
    """Raise UserError for impossible sizes, before any allocation."""
    for name in _COUNTS:
        value = values.get(name)
        if isinstance(value, (bool, str)) or (isinstance(value, (int, float)) and not value >= 1):
            raise UserError(f"model directory {model!r}: {name} in {CONFIG_FILE} is {value!r}, not a positive number")
        is_layers = name in ("num_hidden_layers", "n_layer")
        if is_layers and isinstance(value, (int, float)) and tensors and value > max(MOST_LAYERS, tensors):
            raise UserError(
                f"model directory {model!r}: {name} in {CONFIG_FILE} is {value}, and its files hold {tensors} tensors"
            )


def _read_headers(model: str, path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the safetensors files that transformers loads; all such files are opened and checked."""
    index = read_object(model, path / INDEX_FILE)
    listed = {} if index is None else _listed(model, index, path)
    files = sorted({*path.glob("*.safetensors"), *(path / shard for shard in listed.values())})
    if not files and not any(path.glob("*.bin")):
        raise UserError(f"model directory {model!r} holds no weights (no *.safetensors file)")
    headers = {file.name: _header(model, file) for file in files}
    if WEIGHTS_FILE in headers:  # transformers prefers this file to an index
        return headers[WEIGHTS_FILE]
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(listed.values())):
        for tensor, stored in headers[shard].items():
            if tensor in tensors and not _hold_the_same(path, tensor, (tensors[tensor].file, shard)):
                raise UserError(
                    f"model directory {model!r}: {tensors[tensor].file} and {shard} hold different tensors {tensor}"
                )
            tensors[tensor] = stored
    for tensor, shard in listed.items():
        if tensor not in headers[shard]:
            raise UserError(f"model directory {model!r}: {shard} lacks the tensor {tensor}, which {INDEX_FILE} lists")
    return tensors


def _listed(model: str, index: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Return the shard of every tensor in the index; UserError if the index is damaged or a shard is missing."""
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(
            f"model directory {model!r} has a damaged {INDEX_FILE}: its weight_map does not name a file for each tensor"
        )
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not (path / shard).is_file():
            raise UserError(f"model directory {model!r} lacks the weight file {shard}")
    return shards


def _header(model: str, file: Path) -> dict[str, StoredTensor]:
    if file.is_symlink() and not file.exists():
        raise UserError(f"model directory {model!r}: {file.name} is a symbolic link to nothing")
    if file.is_dir():
        raise UserError(f"model directory {model!r}: {file.name} is a directory, not a file")
    try:
        file.open("rb").close()  # the library's own error claims that an unreadable file does not exist
    except OSError as error:
        raise UserError(f"model directory {model!r}: {file.name} cannot be read ({error.strerror})") from error
    try:
        with safe_open(file, framework="np") as opened:
            tensors = {}
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                part = opened.get_slice(name)
                tensors[name] = StoredTensor(file.name, tuple(part.get_shape()), part.get_dtype())
            return tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"model directory {model!r}: {file.name} is truncated or damaged ({error})") from error


def _hold_the_same(path: Path, tensor: str, files: Iterable[str]) -> bool:
    first, second = (TensorFile(path / file) for file in files)
    if first.entries[tensor]["dtype"] != second.entries[tensor]["dtype"] or first.shape(tensor) != second.shape(tensor):
        return False
    return first.entries[tensor]["dtype"] in FLOATS and np.array_equal(first.raw(tensor), second.raw(tensor))
