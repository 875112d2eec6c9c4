"""The vLLM plugin that every process of vLLM loads before it builds a model.

It acts only in processes that estune starts: `launch` sets the environment variable `STARTED_BY`.
"""

from __future__ import annotations

import os
from typing import Any

STARTED_BY = "ESTUNE_STARTS_VLLM"  # environment variable


def register() -> None:
    """Make vLLM start beside numba, and keep linear weights live on a CPU."""
    if STARTED_BY not in os.environ:
        return
    from vllm.model_executor.layers import utils
    from vllm.triton_utils import dispatcher

    # vLLM reads the attributes of all objects of all modules, and llvmlite's library object answers any name.
    dispatcher.vars = attributes_of
    utils.dispatch_cpu_unquantized_gemm = keep_weight


def attributes_of(value: Any) -> dict[str, Any]:
    """Return an object's attributes as `vars` does; an empty dict if its ``__dict__`` is no dictionary."""
    attributes: Any = getattr(value, "__dict__", None)
    return dict(attributes) if hasattr(attributes, "items") else {}


def keep_weight(layer: Any, remove_weight: bool) -> None:
    """Let a linear layer on a CPU read its parameter, instead of a packed copy that vLLM makes when it loads."""
    from torch.nn.functional import linear

    layer.cpu_linear = linear
