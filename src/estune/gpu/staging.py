"""A ring of device buffers that streams parts of host memory through a device; copies overlap with kernels.

The events that `Lane.run` takes and returns order the streams. The tests run the ring on simulated streams with random
delays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

SLOTS = 3  # staging buffers: one is filled, one is worked on, one is written back
PINNED_BYTES = 1 << 20  # bytes; smaller tensors are not pinned


class Lane:
    """A queue of work on a device: a CUDA stream. On the CPU (in tests) the work runs at once."""

    def __init__(self, device: torch.device, *, side: bool) -> None:
        """``side``: open a new stream instead of using the current one."""
        self._device = device
        self._stream = None
        if side and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], object], after: Any = None) -> Any:
        """Queue ``work`` after the lane's earlier work and the event ``after``; return the event of its completion."""
        if self._device.type != "cuda":
            work()
            return None
        stream = self._stream or torch.cuda.current_stream(self._device)
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            work()
        return stream.record_event()

    def wait(self) -> None:
        """Wait until the lane is empty."""
        if self._stream is not None:
            self._stream.synchronize()


class Staging:
    """A ring of device buffers: copy a part of a host array up, work on it, copy it down."""

    def __init__(self, device: torch.device, elements: int, lanes: Sequence[Any] | None = None) -> None:
        """Allocate `SLOTS` buffers of ``elements``; ``lanes`` are those of copies up, of work, and of copies down."""
        if lanes is None:
            lanes = [Lane(device, side=True), Lane(device, side=False), Lane(device, side=True)]
        self._up, self._work, self._down = lanes
        self._slots = [torch.empty(elements, dtype=torch.float32, device=device) for _ in range(SLOTS)]
        self._free = [self._work.run(lambda: None)] * SLOTS  # events; earlier work may still use the buffers' memory
        self._next = 0

    def run(self, host: torch.Tensor, work: Callable[[torch.Tensor], object], *, write_back: bool) -> None:
        """Queue ``work`` on a device copy of ``host`` (float32, flat); ``write_back`` copies the result to ``host``."""
        slot = self._next
        self._next = (slot + 1) % SLOTS
        stage = self._slots[slot][: host.numel()]
        loaded = self._up.run(lambda: stage.copy_(host, non_blocking=True), self._free[slot])
        done = self._work.run(lambda: work(stage), loaded)
        if write_back:
            done = self._down.run(lambda: host.copy_(stage, non_blocking=True), done)
        self._free[slot] = done

    def wait(self) -> None:
        """Wait until no copy reads or writes host memory."""
        self._up.wait()
        self._down.wait()


def pin(tensors: Sequence[torch.Tensor], owner: object) -> bool:
    """Pin host memory in place until ``owner`` is garbage-collected, so that copies to a GPU are direct.

    Small tensors are not pinned: they share memory pages with others, and their copies are cheap. If pinning fails,
    copies are slower and still correct.

    Returns:
        Whether every tensor that is not small was pinned.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    pinned, is_whole = [], True
    for tensor in tensors:
        if tensor.nbytes < PINNED_BYTES:
            continue
        if int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) != 0:
            is_whole = False
            with suppress(RuntimeError):  # clears the call's error, which the next kernel would report as its own
                torch.zeros(1, device="cuda")
            break
        pinned.append(tensor)
    weakref.finalize(owner, _unpin, pinned)
    return is_whole


def _unpin(tensors: Sequence[torch.Tensor]) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for tensor in tensors:
        runtime.cudaHostUnregister(tensor.data_ptr())
