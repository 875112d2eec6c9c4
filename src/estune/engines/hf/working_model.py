"""The working model answers prompts; this module writes theta, or a member, into its memory.

A member's weights are computed from theta and overwrite the working model's memory. They are never added to or
subtracted from the weights in it, so theta cannot drift. If members share a forward pass (`lowrank.members`), no member
is written, and the working model's memory may be theta itself.

The model may be the user's. `WorkingModel.in_use` changes it for the time of one call, and then restores it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from estune.console import warn
from estune.engines.hf import attention, small_linear
from estune.engines.hf.parameters import Binding
from estune.es.noise import lowrank_factors, noise_ints
from estune.es.theta import HostTheta
from estune.es.types import Perturbation

if TYPE_CHECKING:
    from estune.gpu.theta import DeviceTheta

COSINE_ELEMENTS = 1 << 16  # elements of each parameter that `perturb_cosine` reads


class ModelWeights:
    """The weights of a model in memory: theta, a record of what the memory holds, and the way to write members.

    ``is_theta``: theta's arrays are the model's memory, so no member may be written into it.
    """

    def __init__(
        self, bound: Sequence[Binding], host: HostTheta, device: torch.device, *, stays_on_host: bool = False
    ) -> None:
        """Write theta through ``bound``.

        On CUDA theta may move to the device, unless ``stays_on_host``: use the attribute ``theta`` afterwards.
        """
        self.bindings = list(bound)
        self.device = device
        self._trained = {spec.name for spec in host.specs if spec.perturbed}
        self._live = {b.name: live for b in bound if (live := _live_memory(b)) is not None}
        self.is_theta = any(np.shares_memory(host.arrays[name], live) for name, live in self._live.items())
        self._on_device = None if stays_on_host else _on_device(host, device)
        self.theta = host if self._on_device is None else self._on_device
        staged = [] if self._on_device is not None else [b for b in bound if b.name not in self._live]
        largest = max((max(b.pieces[0].parameter.numel(), math.prod(b.shape)) for b in staged), default=0)
        self._staging = torch.empty(largest, dtype=torch.float32, pin_memory=device.type == "cuda")
        self._held: tuple[Perturbation | None, int] | None = None  # the member in memory, and theta's version
        self._fixed_version = -1  # theta's version when the untrained parameters were written
        self.hold(None)

    @torch.inference_mode()
    def hold(self, perturbation: Perturbation | None) -> float:
        """Write a member, or theta (``None``), if the model does not hold it; return the seconds that this took."""
        wanted = (perturbation, self.theta.version)
        if self._held == wanted:
            return 0.0
        started = time.perf_counter()
        if self.is_theta:
            if perturbation is not None:
                raise RuntimeError("a member would be written over theta")
        else:
            self._held = None
            self._write(perturbation)
            self._fixed_version = self.theta.version
        self._held = wanted
        return time.perf_counter() - started

    def forget(self) -> None:
        """Mark all weights as stale, because theta has changed; the next `hold` writes them again."""
        self._held = None
        self._fixed_version = -1

    def stand_apart(self) -> None:
        """Copy theta into new memory, so that members can be written into the model."""
        if self.is_theta:
            self.theta.unshare()
            self.is_theta = False

    def perturb_cosine(self, perturbation: Perturbation, but: Collection[str] = ()) -> dict[str, float]:
        """Return the cosine of ``cast(W) - cast(theta)`` with the exact perturbation, by kind of parameter.

        The cosine measures how much of the perturbation survives the cast to the compute dtype. It is computed in
        float64 from the first `COSINE_ELEMENTS` elements of every perturbed parameter, except for those named in
        ``but``.
        """
        sums: dict[str, np.ndarray] = {}
        lowrank = {spec.name for spec in self.theta.specs if spec.lowrank}
        for binding in self.bindings:
            if binding.name not in self._trained or binding.name in but:
                continue
            theta = self.theta.head(binding.name, COSINE_ELEMENTS)  # (d,)
            part = _lowrank_part if binding.name in lowrank else _full_part
            perturbed = part(binding, perturbation, theta.size)
            cast_member, cast_theta = (
                torch.from_numpy(values).to(binding.dtype).double().numpy() for values in (theta + perturbed, theta)
            )
            change, exact = cast_member - cast_theta, perturbed.astype(np.float64)
            parts = np.array([change @ exact, change @ change, exact @ exact])
            sums[binding.kind] = sums.get(binding.kind, 0.0) + parts
        with np.errstate(invalid="ignore", over="ignore"):  # a member beyond the dtype's range has no cosine: NaN
            return {
                kind: float(dot / np.sqrt(a * b)) if a > 0 and b > 0 else 0.0
                for kind, (dot, a, b) in sorted(sums.items())
            }

    def _write(self, perturbation: Perturbation | None) -> None:
        live: dict[str, np.ndarray] = {}
        for binding in self.bindings:
            name = binding.name
            if name not in self._trained and self._fixed_version == self.theta.version:
                continue
            if self._on_device is not None:
                direct = binding.direct
                out = torch.empty(binding.shape, dtype=binding.dtype, device=self.device)
                self._on_device.perturb_into(name, perturbation, out if direct is None else direct)
                if direct is None:
                    binding.write(out)
            elif name in self._live:
                live[name] = self._live[name]
            elif perturbation is None or name not in self._trained:
                binding.write(torch.from_numpy(self.theta.arrays[name]))
            else:
                size = self.theta.arrays[name].size
                self.theta.perturb(name, perturbation, out=self._staging[:size].numpy())
                binding.write(self._staging[:size].view(binding.shape))
        self.theta.perturb_all(perturbation, live)
        if self._on_device is not None:
            torch.cuda.current_stream(self.device).synchronize()  # kernels run asynchronously


class WorkingModel(ModelWeights):
    """A transformers model with its weights, and what makes it fast while it computes."""

    def __init__(self, model: Any, bound: Sequence[Binding], host: HostTheta) -> None:
        """Write theta into ``model``; see `ModelWeights`."""
        self.model = model
        self._threads = host.num_threads
        self._modules = list(model.modules())
        self._linear = small_linear.plain_layers(model)
        self._attention: list[attention.Choice] = []
        super().__init__(bound, host, model.device)
        with self.in_use():
            self._attention = attention.find(model)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Make the model fast within the block: engine's threads, evaluation mode, own linear layers and attention."""
        with (
            torch_threads(self._threads),
            evaluation_mode(self.model, self._modules),
            small_linear.installed(self._linear),
            attention.selected(self._attention),
        ):
            yield


def _live_memory(binding: Binding) -> np.ndarray | None:
    """Return the parameter's memory if a member can be written directly into it: float32, dense, on the CPU."""
    live = binding.direct
    return live.numpy() if live is not None and live.device.type == "cpu" and live.dtype == torch.float32 else None


def _on_device(host: HostTheta, device: torch.device) -> DeviceTheta | None:
    """Return theta on a CUDA device, or None if the host computes members and updates."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from estune.gpu.theta import DeviceTheta, on_device

    theta = on_device(host, device, warn)
    return theta if isinstance(theta, DeviceTheta) else None


def _full_part(binding: Binding, perturbation: Perturbation, count: int) -> np.ndarray:
    """Return the first elements of a parameter's exact perturbation: float32 (count,)."""
    member = perturbation.member
    n = noise_ints(member.seed, binding.name, 0, count, perturbation.noise.distribution)
    exact: np.ndarray = np.float32(perturbation.noise.scale * member.sign) * n.astype(np.float32)
    return exact


def _lowrank_part(binding: Binding, perturbation: Perturbation, count: int) -> np.ndarray:
    """Return the first elements of a matrix's exact low-rank perturbation: float64 (count,)."""
    member = perturbation.member
    left, right = lowrank_factors(
        member.seed, binding.name, binding.shape, perturbation.noise.rank, perturbation.noise.distribution
    )
    if left.ndim == 3:  # stacked experts: use the first expert
        left, right = left[0], right[0]
    rows = -(-count // len(right))
    product: np.ndarray = (left[:rows].astype(np.float64) @ right.T.astype(np.float64)).reshape(-1)[:count]
    return perturbation.noise.lowrank_scale * member.sign * product


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads within the block, and the process's own number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluation_mode(model: torch.nn.Module, modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Set a model to evaluation mode within the block, and each of its modules to the module's own mode afterwards."""
    training = [module for module in modules if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
