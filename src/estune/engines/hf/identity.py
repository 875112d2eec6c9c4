"""Digests of everything that determines a model's answers beside its weights; a resumed run must find them unchanged.

The digests of a directory depend on its files alone: not on its path, and not on the version of transformers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from estune.engines.hf.model_files import CONFIG_FILE
from estune.engines.hf.saved_model import PRIVATE_KEYS, saved_config

# Fields of a configuration that do not change the model's function.
NO_FUNCTION = {*PRIVATE_KEYS, "transformers_version", "dtype", "torch_dtype", "architectures"}
# Files beside tokenizer_config.json that determine the text of a token.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json",
                "special_tokens_map.json", "*.model", "*.tiktoken", "*.spm")  # fmt: skip
# Fields of tokenizer_config.json that change neither the text of a token nor the set of special tokens.
NO_TEXT = {*NO_FUNCTION, "chat_template", "model_max_length", "padding_side", "truncation_side", "processor_class",
           "add_bos_token", "add_eos_token", "backend"}  # fmt: skip


def directory_identity(path: Path, *, tokenizer: bool, code: bool) -> dict[str, str]:
    """Return digests of a model directory's files.

    Args:
        path: the directory.
        tokenizer: whether the directory's tokenizer is used.
        code: whether the directory's Python files are run.
    """
    config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    digests = {"config": _digest(_without(config, NO_FUNCTION)), "code": ""}
    if tokenizer:
        files: dict[str, Any] = {
            file.name: blake2b(file.read_bytes(), digest_size=16).hexdigest()
            for pattern in VOCABULARIES
            for file in path.glob(pattern)
            if file.is_file()
        }
        settings = path / "tokenizer_config.json"
        if settings.is_file():
            files[settings.name] = _without(json.loads(settings.read_text(encoding="utf-8")), NO_TEXT)
        digests["tokenizer"] = _digest(files)
    sources = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in sorted(path.glob("*.py"))}
    if code and sources:
        digests["code"] = _digest(sources)
    return digests


def module_identity(model: Any) -> dict[str, str]:
    """Return digests of a module's configuration, as a run saves it, and of the remote code that defines the module."""
    values = saved_config(model, "float32").to_diff_dict()
    digests = {"config": _digest(_without(values, NO_FUNCTION)), "code": ""}
    if model.is_remote_code():
        files = [Path(inspect.getfile(type(part))) for part in (model, model.config)]
        digests["code"] = _digest([file.read_text(encoding="utf-8", errors="replace") for file in files])
    return digests


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a digest of the mapping from token ids to text that a tokenizer object computes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: Any = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else type(tokenizer).__name__
    else:
        vocabulary = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # every call that pads overwrites these fields
            vocabulary.pop(name, None)
    special = sorted(int(token) for token in getattr(tokenizer, "all_special_ids", ()))
    return _digest([vocabulary, special, bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))])


def _without(value: Any, names: set[str]) -> Any:
    """Return a JSON value without the named fields and without private fields, at any depth."""
    if isinstance(value, Mapping):
        return {k: _without(v, names) for k, v in value.items() if k not in names and not str(k).startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_without(item, names) for item in value]
    return value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=lambda item: type(item).__name__)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
