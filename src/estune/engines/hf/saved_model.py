"""Writes the files beside the weights of a saved model, and checks that they describe these weights.

A configuration may contradict the model in memory: it says that weights are tied and they are not, a script has removed
layers, or a script has enlarged the embedding. `saved_config` corrects the fields whose value is certain. For other
contradictions `check_agreement` raises an error before a run writes anything.
"""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, initialization
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from estune.engines.hf import end_ids
from estune.engines.hf.model_files import CONFIG_FILE, GENERATION_FILE
from estune.errors import UserError

TIED_OTHERWISE = (
    "tie_word_embeddings of its configuration contradicts its weights; the weights stay as they are, and a saved "
    "config.json will describe them"
)
# Fields of JSON files that hold paths or depend on how the model was loaded; they are not saved.
PRIVATE_KEYS = (
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
    "cache_dir",
    "local_files_only",
    "is_local",
)


def save_assets(
    model: Any,
    tokenizer: Any,
    dtype: str,
    directory: Path,
    *,
    ends: frozenset[int],
    pad: int,
    vocab_size: int | None,
) -> None:
    """Write config.json, generation_config.json, the tokenizer, and the code that comes with the model.

    No path or time is written, so the same model gives the same bytes wherever it was loaded from.

    Args:
        model: the model in memory; it is not changed.
        tokenizer: the tokenizer, or None.
        dtype: dtype of the saved weights.
        directory: the directory of the files; it is created if missing.
        ends: token ids that end a completion.
        pad: the padding id.
        vocab_size: rows of the input embedding; None: unknown.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = saved_config(model, dtype)
    if model.is_remote_code():
        custom_object_save(model, directory, config=config)
    config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        # GenerationConfig.save_pretrained raises for some configurations of models on the hub.
        settings = copy.deepcopy(model.generation_config)
        for name, value in end_ids.settings_of(model, ends, pad, vocab_size).items():
            setattr(settings, name, value)
        (directory / GENERATION_FILE).write_text(settings.to_json_string(use_diff=True), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    for name in (CONFIG_FILE, GENERATION_FILE, "tokenizer_config.json"):
        _strip_private(directory / name)


def check_assets(model: Any, save: Callable[[Path], None]) -> None:
    """Write the files beside the weights into a temporary directory, so that errors appear before a run, not after it.

    Args:
        model: the model in memory.
        save: a function that writes the files into a directory.

    Raises:
        UserError: the files cannot be written, or they describe another model than the one in memory.
    """
    with TemporaryDirectory(prefix="estune-") as directory:
        try:
            save(Path(directory))
        except UserError:
            raise
        except Exception as error:  # configurations, tokenizers and remote code are third-party
            raise _cannot_save(error) from error
        try:
            config = type(model.config).from_pretrained(directory)
        except Exception as error:  # the model's own code
            raise _builds_no_model(type(model).__name__, error) from error
        check_agreement(model, config)


def saved_config(model: Any, dtype: str) -> Any:
    """Return a copy of a model's configuration whose dtype, class and tied weights are those of the saved model.

    Raises:
        UserError: the configuration cannot be copied.
    """
    try:
        config = copy.deepcopy(model.config)
    except Exception as error:  # a configuration may hold any object
        raise _cannot_save(error) from error
    for part in _parts(config):
        if part is config or getattr(part, "dtype", None) is not None:
            part.dtype = dtype
    config.architectures = [type(model).__name__]
    set_tied(config, tied_truth(model))
    return config


def tied_truth(model: Any) -> bool | None:
    """Return whether the weights that the model's class can tie are tied; ``None`` if only some are, or none can be."""
    pairs = _tied_pairs(model)
    memory = _memory(model)
    is_tied = {_key(memory[a]) == _key(memory[b]) for a, b in pairs.items() if a in memory and b in memory}
    return is_tied.pop() if len(is_tied) == 1 else None


def contradicts(config: Any, tied: bool | None) -> bool:
    """Return whether a configuration contradicts ``tied``, the result of `tied_truth`; false if that is ``None``."""
    return bool(_wrong(config, tied))


def set_tied(config: Any, tied: bool | None) -> bool:
    """Set ``tie_word_embeddings`` to ``tied``, the result of `tied_truth`; return whether a value has changed."""
    wrong = _wrong(config, tied)
    for part in wrong:
        part.tie_word_embeddings = tied
    return bool(wrong)


def _wrong(config: Any, tied: bool | None) -> list[Any]:
    if tied is None:
        return []
    parts = [config] if (text := config.get_text_config(decoder=True)) is config else [config, text]
    return [part for part in parts if bool(getattr(part, "tie_word_embeddings", tied)) != tied]


def is_cast_in_part(model: Any) -> bool:
    """Return whether loading a model in its own dtype would round some of its weights.

    Some classes keep a few parameters in float32 for every dtype; loading does not round these.
    """
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    if len(set(dtypes.values())) < 2:
        return False
    try:
        config = copy.deepcopy(model.config)
        config.dtype = model.dtype
        built = {name: parameter.dtype for name, parameter in skeleton(config, type(model)).named_parameters()}
    except Exception:  # the model's own code; `check_agreement` raises an error with the reason
        return True
    plan = model._get_dtype_plan(model.dtype)
    in_float32 = re.compile("|".join(re.escape(pattern).replace(r"\*", ".*") for pattern in plan) or r"(?!)")
    return any(
        dtype != built.get(name, model.dtype) and not (dtype == torch.float32 and in_float32.search(name))
        for name, dtype in dtypes.items()
    )


def check_agreement(model: Any, config: Any) -> None:
    """Check that a configuration describes the tensors of a model.

    Args:
        model: the model in memory.
        config: the configuration that is saved with the model; it is not changed.

    Raises:
        UserError: a model built from the configuration has other tensors; the message names one.
    """
    name = type(model).__name__
    try:
        built = skeleton(config, type(model))
    except Exception as error:  # the model's own code
        raise _builds_no_model(name, error) from error
    held, described = _layout(model), _layout(built)
    for tensor in sorted(held.keys() | described.keys()):
        in_model, in_config = held.get(tensor), described.get(tensor)
        if in_model is None or in_config is None or in_model[0] != in_config[0]:
            raise UserError(
                f"{name} and its configuration contradict each other, so the saved run would be another model: the "
                f"module holds {_of_shape(tensor, in_model)}, and its configuration describes "
                f"{_of_shape(tensor, in_config)}; change model.config to match the module"
            )
    for tensor in sorted(held):
        if held[tensor][1] != described[tensor][1]:
            shared = sorted(held[tensor][1] ^ described[tensor][1] | {tensor})
            where = "the module" if len(held[tensor][1]) > len(described[tensor][1]) else "its configuration"
            raise UserError(
                f"{name} and its configuration contradict each other, so the saved run would be another model: only "
                f"{where} lets {' and '.join(shared[:2])} be one tensor"
            )


def skeleton(config: Any, model_class: Any = None, *, trust_remote_code: bool = False) -> Any:
    """Return the model that a configuration describes, on the meta device: names and shapes without memory.

    Args:
        config: the configuration; it is not changed.
        model_class: the class to build if transformers knows no causal language model for the configuration.
        trust_remote_code: run code that comes with the model.
    """
    config = copy.deepcopy(config)
    auto: Any = AutoModelForCausalLM
    is_known = model_class is None or type(config) in auto._model_mapping
    with ExitStack() as stack:
        for context in (
            torch.device("meta"),
            initialization.no_init_weights(),
            initialization.meta_device_safe_creation_ops(),
        ):
            stack.enter_context(context)
        if is_known:
            built = auto.from_config(config, trust_remote_code=trust_remote_code)
        else:
            built = model_class._from_config(config)
        built.tie_weights()
        return built


def stored_shapes(built: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a `skeleton`'s tensors in the stored layout, by stored name; tied tensors once."""
    memory, seen = {}, set()
    for name, tensor in _memory(built).items():
        if _key(tensor) not in seen:
            seen.add(_key(tensor))
            memory[name] = torch.empty(tensor.shape, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(built, memory).items()}


def _cannot_save(error: Exception) -> UserError:
    return UserError(f"the files beside the weights could not be saved at the end of a run: {reason_of(error)}")


def _builds_no_model(name: str, error: Exception) -> UserError:
    return UserError(
        f"the configuration that would be saved with {name} builds no model, so the run could not be loaded: "
        f"{reason_of(error)}"
    )


def reason_of(error: Exception) -> str:
    """Return the message of a third-party error, on one line of at most 300 characters."""
    reason = " ".join(str(error).split())
    says_enough = isinstance(error, (OSError, ValueError, RuntimeError)) or "Validation" in type(error).__name__
    if not reason or not says_enough:
        reason = f"{type(error).__name__}{': ' if reason else ''}{reason}"
    return reason if len(reason) <= 300 else f"{reason[:300]}..."


def _of_shape(tensor: str, layout: tuple[tuple[int, ...], frozenset[str]] | None) -> str:
    return f"no {tensor}" if layout is None else f"{tensor} of shape {layout[0]}"


def _layout(model: Any) -> dict[str, tuple[tuple[int, ...], frozenset[str]]]:
    """Return the shape, and all names, of every saved tensor, by in-memory name."""
    memory = _memory(model)
    names: dict[Any, set[str]] = defaultdict(set)
    for name, tensor in memory.items():
        names[_key(tensor)].add(name)
    return {name: (tuple(tensor.shape), frozenset(names[_key(tensor)])) for name, tensor in memory.items()}


def _memory(model: Any) -> dict[str, torch.Tensor]:
    """Return the saved parameters and buffers, by in-memory name; tied ones under every name."""
    tensors: dict[str, torch.Tensor] = dict(model.named_buffers(remove_duplicate=False))
    tensors.update(model.named_parameters(remove_duplicate=False))
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {name: tensors[name] for name in model.state_dict() if name in tensors and name not in ignored}


def _key(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    return int(tensor.untyped_storage()._cdata), int(tensor.storage_offset()), tuple(tensor.shape)


def _tied_pairs(model: Any) -> dict[str, str]:
    """Return the pairs of names that the model's class ties if ``tie_word_embeddings`` is true."""
    shallow_copy = copy.copy(model)  # shares the module's dictionaries; only its configuration is another object
    shallow_copy.config = copy.copy(model.config)
    shallow_copy.config.tie_word_embeddings = True
    try:
        pairs: dict[str, str] = shallow_copy.get_expanded_tied_weights_keys(all_submodels=False)
    except (AttributeError, ValueError):  # transformers cannot read the class's names of tied weights
        return {}
    return pairs


def _parts(config: Any) -> list[Any]:
    """Return a configuration and all configurations nested in it."""
    parts = [config]
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if part is not None:
            parts += _parts(part)
    return parts


def _strip_private(path: Path) -> None:
    if not path.is_file():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in PRIVATE_KEYS:
        values.pop(key, None)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
