"""What decides a model's answers beside its weights, as short digests: a resumed run must find them unchanged.

Of a directory the digests are of its files, so they are the same wherever the directory lies and whatever version of
transformers reads it.
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

# Fields of a configuration that do not change the function that the weights compute.
NO_FUNCTION = {*PRIVATE_KEYS, "transformers_version", "dtype", "torch_dtype", "architectures"}
# Files beside tokenizer_config.json that say which text a token is.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json",
                "special_tokens_map.json", "*.model", "*.tiktoken", "*.spm")  # fmt: skip
# Fields of tokenizer_config.json that do not change the text of a token, or which tokens are left out of it.
NO_TEXT = {*NO_FUNCTION, "chat_template", "model_max_length", "padding_side", "truncation_side", "processor_class",
           "add_bos_token", "add_eos_token", "backend"}  # fmt: skip


def directory_identity(path: Path, *, tokenizer: bool, code: bool) -> dict[str, str]:
    """Return digests of a model directory's files.

    Args:
        path: the directory.
        tokenizer: whether its tokenizer is used.
        code: whether its Python files are run.
    """
    config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    found = {"config": _digest(_without(config, NO_FUNCTION)), "code": ""}
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
        found["tokenizer"] = _digest(files)
    sources = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in sorted(path.glob("*.py"))}
    if code and sources:
        found["code"] = _digest(sources)
    return found


def module_identity(model: Any) -> dict[str, str]:
    """Return digests of a module's configuration, as a run saves it, and of the code that came with the module."""
    values = saved_config(model, "float32").to_diff_dict()
    found = {"config": _digest(_without(values, NO_FUNCTION)), "code": ""}
    if model.is_remote_code():
        found["code"] = _digest([Path(inspect.getfile(type(part))).read_text(encoding="utf-8", errors="replace")
                                 for part in (model, model.config)])  # fmt: skip
    return found


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a digest of what a tokenizer object makes of token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: Any = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else type(tokenizer).__name__
    else:
        vocabulary = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # set anew by every call that pads
            vocabulary.pop(name, None)
    special = sorted(int(token) for token in getattr(tokenizer, "all_special_ids", ()))
    return _digest([vocabulary, special, bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))])


def _without(value: Any, names: set[str]) -> Any:
    """Return JSON without the fields of these names and without private ones, at any depth."""
    if isinstance(value, Mapping):
        return {k: _without(v, names) for k, v in value.items() if k not in names and not str(k).startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_without(item, names) for item in value]
    return value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=lambda item: type(item).__name__)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
