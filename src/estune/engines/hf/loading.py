"""Loads a model by name: checks its files, and returns a working model with theta in float32."""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as _logging

from estune.console import warn
from estune.engines.hf.model_files import (
    CONFIG_FILE,
    FLOATS,
    StoredTensor,
    check_model_files,
    check_tokenizer_files,
)
from estune.engines.hf.parameters import Binding, bindings
from estune.engines.hf.saved_model import TIED_OTHERWISE, reason_of, set_tied, skeleton, stored_shapes, tied_truth
from estune.engines.lowrank.kinds import lowrank_names
from estune.errors import UserError, nearest
from estune.es.theta import HostTheta
from estune.es.types import ParameterSpec
from estune.models.names import EMBEDDED_MODELS, local_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Ratio of the elements that a configuration describes to those in the files: above 1 for weights that layers share.
MOST_MORE = 2
Allocator = Callable[[Mapping[str, tuple[int, ...]]], dict[str, np.ndarray]]  # shapes -> arrays, by stored name
_SLACK = 1 << 20  # elements; allowed in addition to this ratio


def resolve_model(model: str) -> str:
    """Return the name that transformers loads for ``model``: a local or embedded directory, or the hub id.

    Raises:
        UserError: ``model`` looks like a path, but is not a directory.
    """
    directory = local_directory(model)
    if directory is not None:
        if os.path.isfile(directory / "comparison.json"):
            raise UserError(f"{model!r} holds a comparison; its measured models are in its folder models")
        return str(directory)
    if os.path.exists(os.path.expanduser(model)):
        raise UserError(f"model {model!r} is a file, not a directory")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model or not model:
        raise UserError(f"model directory {model!r} does not exist{near_models(model) if model else ''}")
    return model


def near_models(model: str) -> str:
    """Return ``; did you mean ...?`` with a similar name among neighbouring directories or embedded models."""
    place = Path(model).parent
    with suppress(OSError):
        beside = [path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]
        if suggestion := nearest(Path(model).name, beside):
            return suggestion
    return nearest(model, [path.name for path in EMBEDDED_MODELS.iterdir() if (path / CONFIG_FILE).is_file()])


def hub_options(model: str, path: str, revision: str | None) -> dict[str, Any]:
    """Return the options of ``from_pretrained``: use only the cache if the hub cannot be reached.

    One short request finds out whether the hub answers; transformers would retry for a minute per file.

    Raises:
        UserError: the model is no directory, and the hub does not have it, or cannot be reached and the cache does not
            hold it.
    """
    if os.path.isdir(path):
        return {}
    try:
        HfApi().model_info(path, revision=revision, timeout=10)
    except HFValidationError as error:
        raise UserError(
            f"model {model!r} is neither a directory nor the name of a model on the hub{near_models(model)}"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"model {model!r} is not a directory, and the hub has no such model{at}" + near_models(model)
        ) from error
    except Exception as error:  # versions of the hub client use different transports with different errors
        if isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
            return {"local_files_only": True}
        raise UserError(
            f"model {model!r} is not a directory, and the hub cannot be reached to look for it{near_models(model)}"
        ) from error
    return {}


def check_model(model: str, revision: str | None = None) -> None:
    """Check that a model exists and that its files can be read, without loading it.

    Raises:
        UserError: the model is neither a directory nor on the hub, or its directory holds no complete model.
    """
    path = resolve_model(model)
    hub_options(model, path, revision)
    if os.path.isdir(path):
        check_model_files(model, Path(path))


def files_of(model: str, revision: str | None) -> Path:
    """Return the directory that a model was loaded from: its own, or the hub cache's snapshot of the revision.

    Raises:
        UserError: ``model`` looks like a path but is not a directory, or the cache does not hold it.
    """
    path = resolve_model(model)
    if os.path.isdir(path):
        return Path(path)
    config = try_to_load_from_cache(path, "config.json", revision=revision)
    if not isinstance(config, str):
        raise UserError(f"the files of model {model!r} are no longer in the hub's cache")
    return Path(config).parent


def resolve_device(device: str) -> torch.device:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``mps``; UserError if the machine does not have it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.partition(":")[0]
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in available:
        raise UserError(f"unknown device {device!r}; known: auto, cpu, cuda, mps")
    if not available[kind]:
        raise UserError(f"device {device!r} is not available: torch {torch.__version__} finds none on this machine")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device, checkpoint: torch.dtype | None) -> torch.dtype:
    """Return the compute dtype; ``auto`` is bfloat16 for a 16-bit checkpoint on CUDA, and float32 otherwise."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cuda" and checkpoint in (torch.bfloat16, torch.float16):
        return torch.bfloat16
    return torch.float32


def load_tokenizer(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the model's tokenizer; UserError if it is missing or damaged."""
    path = resolve_model(model)
    options = hub_options(model, path, revision)
    if os.path.isdir(path):
        check_tokenizer_files(model, Path(path))
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                path, revision=revision, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:  # transformers, and code that comes with the model
        # A damaged configuration also fails here; its own error is clearer.
        load_config(model, path, revision=revision, trust_remote_code=trust_remote_code, **options)
        raise _cannot_load(model, error, "tokenizer") from error


def load_config(model: str, path: str, **options: Any) -> Any:
    """Return the configuration of ``model``, whose files are at ``path``; UserError if it is damaged."""
    try:
        with quiet():
            return AutoConfig.from_pretrained(path, **options)
    except Exception as error:  # transformers, and code that comes with the model
        raise _cannot_load(model, error, "configuration") from error


def _in_float32(model: str, path: str, config: Any, stored: dict[str, Any], options: dict[str, Any]) -> Any:
    """Return the module of ``model`` in float32; ``stored`` holds the tensors of its files if it is a directory.

    Raises:
        UserError: the files are damaged or do not fit the configuration.
    """
    described: dict[str, tuple[int, ...]] = {}
    if os.path.isdir(path):
        described = _described(config, options["trust_remote_code"])
        _refuse_absurd_sizes(model, Path(path), described, stored)
    auto_model: Any = AutoModelForCausalLM
    try:
        with quiet():
            working, report = auto_model.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:  # transformers, and code that comes with the model
        raise _mismatch(model, described, stored) or _cannot_load(model, error, "model") from error
    _check_report(model, report, type(working).__name__)
    return working


def load_model(
    model: str,
    *,
    dtype: str,
    device: torch.device,
    revision: str | None,
    trust_remote_code: bool,
    num_threads: int,
    trainable_parameters: Sequence[str] | None,
    noise: str = "full",
    allocate: Allocator | None = None,
) -> tuple[Any, list[Binding], HostTheta]:
    """Return the working model, its bindings, and theta (see `make_theta`).

    Theta is always read in float32. If the compute dtype differs, the model is loaded a second time in that dtype, so
    that transformers decides what stays in float32 (some parameters, rope frequencies).

    Raises:
        UserError: the model cannot be used; the message names the model and the reason.
    """
    path = resolve_model(model)
    stored = check_model_files(model, Path(path)) if os.path.isdir(path) else {}
    auto_model: Any = AutoModelForCausalLM
    options = hub_options(model, path, revision)
    options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(model, path, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model {model!r} is quantized; estune moves full weights, so dequantize it first")
    working = _in_float32(model, path, config, stored, options)
    bound, buffers = bindings(working)
    _refuse_other_types(model, bound, stored, working.base_model_prefix)
    is_corrected = set_tied(working.config, tied_truth(working))
    if is_corrected:
        warn(f"model {model!r}: {TIED_OTHERWISE}")
    compute = resolve_dtype(dtype, device, _dtype_of(config))
    lowrank = lowrank_names(working, bound) if noise == "lowrank" else frozenset()
    share = noise == "lowrank" and compute == torch.float32 and device.type == "cpu"
    theta = make_theta(
        bound,
        buffers,
        trainable_parameters,
        num_threads,
        model,
        lowrank=lowrank,
        share=share and allocate is None,
        allocate=allocate,
    )
    if compute != torch.float32:
        if is_corrected:  # the original configuration would tie weights that are equal after the cast
            options["config"] = working.config
        del bound, buffers, working
        gc.collect()
        with quiet():
            working = auto_model.from_pretrained(path, dtype=compute, **options)
    if compute != torch.float32 or device.type != "cpu":
        working = working.to(device)
        bound, _ = bindings(working)
    return working, bound, theta


def make_theta(
    bound: Sequence[Binding],
    buffers: Mapping[str, torch.Tensor],
    trainable_parameters: Sequence[str] | None,
    num_threads: int,
    model: str,
    *,
    lowrank: Collection[str] = (),
    share: bool = False,
    allocate: Allocator | None = None,
) -> HostTheta:
    """Return theta: the stored parameters in float32.

    Args:
        bound: the model's parameters.
        buffers: the model's stored buffers.
        trainable_parameters: regexes; only matching parameters are perturbed.
        num_threads: threads of the noise kernels.
        model: the model's name, for error messages.
        lowrank: names of the parameters with low-rank noise.
        share: let theta's arrays be the working model's memory, if all parameters have the stored layout and are
            float32. Then no member may be written into the model.
        allocate: returns float32 arrays of these shapes, by name, for theta; None: new memory.

    Raises:
        UserError: a weight is NaN or infinite, or a regex of ``trainable_parameters`` is invalid or matches nothing.
    """
    chosen = _select([binding.name for binding in bound if binding.requires_grad], trainable_parameters)
    arrays: dict[str, np.ndarray] = {}
    allocated = {} if allocate is None else allocate({binding.name: binding.shape for binding in bound})
    share = share and all(b.direct is not None and b.dtype == torch.float32 for b in bound)  # all or nothing
    for binding in bound:
        if share and binding.direct is not None:
            array = binding.direct.numpy()
        else:
            new = allocated.get(binding.name)
            array = np.empty(binding.shape, dtype=np.float32) if new is None else new
            torch.from_numpy(array).copy_(binding.direct if binding.direct is not None else binding.read())
        # Minimum and maximum show NaN and infinities without a temporary array of the tensor's size.
        if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
            raise UserError(f"model {model!r} has NaN or infinite values in {binding.name}")
        arrays[binding.name] = array
    specs = [
        ParameterSpec(b.name, b.shape, b.name in chosen, lowrank=b.name in chosen and b.name in lowrank) for b in bound
    ]
    return HostTheta(specs, arrays, {name: _as_numpy(buffer) for name, buffer in buffers.items()}, num_threads)


def _select(names: Sequence[str], patterns: Sequence[str] | None) -> set[str]:
    """Return the names that match any regex; all names if ``patterns`` is None."""
    if patterns is None:
        return set(names)
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            matches = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"trainable_parameters: {pattern!r} is not a regular expression: {error}") from error
        if not matches:
            raise UserError(f"trainable_parameters: {pattern!r} matches no parameter, for example not {names[0]}")
        chosen |= matches
    return chosen


def _described(config: Any, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a configuration describes; an empty dict if it builds no model.

    In this case transformers raises an error with the reason when it loads the model.
    """
    try:
        with quiet():
            return stored_shapes(skeleton(config, trust_remote_code=trust_remote_code))
    except Exception:  # the model's own code
        return {}


def _refuse_absurd_sizes(
    model: str, path: Path, described: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]
) -> None:
    """Raise UserError, before any allocation, if a configuration describes a far larger model than the files hold."""
    wanted = sum(math.prod(shape) for shape in described.values())
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if not stored:  # files of pickled weights, at two bytes or more per element
        held = sum(file.stat().st_size for file in path.glob("*.bin") if file.is_file()) // 2
    if wanted > MOST_MORE * held + _SLACK:
        raise _mismatch(model, described, stored) or UserError(
            f"model {model!r}: its config.json describes a model of {wanted:,} parameters, and its files hold {held:,}"
        )


def _mismatch(
    model: str, described: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]
) -> UserError | None:
    """Return the error for the first tensor whose shape contradicts the configuration; None if all shapes agree."""
    for name in sorted(described.keys() & stored.keys()):
        if tuple(described[name]) != stored[name].shape:
            return _other_shape(model, name, stored[name].shape, described[name])
    return None


def _other_shape(model: str, name: str, held: Sequence[int], described: Sequence[int]) -> UserError:
    return UserError(
        f"model {model!r}: {name} has the shape {tuple(held)} in its files, and its config.json describes "
        f"{tuple(described)}"
    )


def _check_report(model: str, report: Mapping[str, Any], architecture: str) -> None:
    """Raise UserError if the files lack weights or hold other shapes; warn about tensors without a use."""
    for name, held, described in sorted(report["mismatched_keys"]):
        raise _other_shape(model, name, held, described)
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"model {model!r} lacks the weights {missing[0]}{more}; its files do not hold the whole model")
    unused = sorted(report["unexpected_keys"])
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        warn(
            f"model {model!r} is loaded as {architecture}, which does not use {unused[0]}{more} of its files; the "
            "saved model will not hold them"
        )


def _refuse_other_types(model: str, bound: Sequence[Binding], stored: Mapping[str, StoredTensor], prefix: str) -> None:
    """Raise UserError for weights stored as integers or in 8 bits, which need the scales of a quantized model."""
    names = {binding.name for binding in bound}
    for name, tensor in sorted(stored.items()):
        if tensor.dtype not in FLOATS and (name in names or f"{prefix}.{name}" in names):
            raise UserError(
                f"model {model!r}: {name} is stored as {tensor.dtype} in {tensor.file}, and estune moves full "
                f"floating-point weights ({', '.join(FLOATS)})"
            )


def _cannot_load(model: str, error: Exception, what: str) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"model {model!r} comes with its own Python code: read it, then allow it with trust_remote_code"
        )
    return UserError(f"cannot load the {what} of {model!r}: {reason_of(error)}")


def _dtype_of(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _as_numpy(buffer: torch.Tensor) -> np.ndarray:
    value = buffer.detach().cpu()
    if value.dtype == torch.bfloat16:
        value = value.float()  # numpy has no bfloat16
    return value.numpy().copy()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and reports; the caller turns problems into UserErrors."""
    logging: Any = _logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
