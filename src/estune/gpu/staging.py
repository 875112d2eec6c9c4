"""Parts of host memory on their way through a device: a ring of buffers, copies beside the work.

What orders the streams are the events that `Lane.run` takes and returns; the tests run the ring on simulated streams
that delay their work at random.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

SLOTS = 3  # staging buffers: one filled, one worked on, one written back
PINNED_BYTES = 1 << 20


class Lane:
    """A queue of work on a device: a CUDA stream; on the CPU, where the tests run it, work is done at once."""

    def __init__(self, device: torch.device, *, side: bool) -> None:
        """``side``: a stream of its own, instead of whichever is current."""
        self._device = device
        self._stream = None
        if side and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], object], after: Any = None) -> Any:
        """Queue ``work`` behind the lane's own and the event ``after``; return the event of its end."""
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
        """Return when the lane is empty."""
        if self._stream is not None:
            self._stream.synchronize()


class Staging:
    """A ring of device buffers through which parts of host arrays pass: up, worked on, and back down."""

    def __init__(self, device: torch.device, elements: int, lanes: Sequence[Any] | None = None) -> None:
        """``lanes``: of copies up, of work and of copies down."""
        if lanes is None:
            lanes = [Lane(device, side=True), Lane(device, side=False), Lane(device, side=True)]
        self._up, self._work, self._down = lanes
        self._slots = [torch.empty(elements, dtype=torch.float32, device=device) for _ in range(SLOTS)]
        self._free = [self._work.run(lambda: None)] * SLOTS  # events; the memory may have had another use before
        self._next = 0

    def run(self, host: torch.Tensor, work: Callable[[torch.Tensor], object], *, write_back: bool) -> None:
        """Queue ``work`` on a copy of ``host`` (float32, flat), and with ``write_back`` the copy's way home."""
        slot = self._next
        self._next = (slot + 1) % SLOTS
        stage = self._slots[slot][: host.numel()]
        loaded = self._up.run(lambda: stage.copy_(host, non_blocking=True), self._free[slot])
        done = self._work.run(lambda: work(stage), loaded)
        if write_back:
            done = self._down.run(lambda: host.copy_(stage, non_blocking=True), done)
        self._free[slot] = done

    def wait(self) -> None:
        """Return when nothing reads or writes host memory any more."""
        self._up.wait()
        self._down.wait()


def pin(tensors: Sequence[torch.Tensor], owner: object) -> None:
    """Lock host memory where it lies, until ``owner`` is gone, so that copies to a GPU need no detour.

    Small tensors are left out: they share pages with others, and their copies cost nothing. Where the system does not
    allow it a warning says so: copies are slower then, and right.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    pinned = []
    for tensor in tensors:
        if tensor.nbytes < PINNED_BYTES:
            continue
        if int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) != 0:
            warnings.warn("the master's memory could not be pinned: copies to the GPU are slower", stacklevel=3)
            with suppress(RuntimeError):  # the failed call's error must not be taken for that of the next kernel
                torch.zeros(1, device="cuda")
            break
        pinned.append(tensor)
    weakref.finalize(owner, _unpin, pinned)


def _unpin(tensors: Sequence[torch.Tensor]) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for tensor in tensors:
        runtime.cudaHostUnregister(tensor.data_ptr())
