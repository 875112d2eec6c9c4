"""Members that share one forward pass: they share the weights and differ by their low-rank factors.

`SharedForward` replaces a model's parameters by stand-ins (`stand_ins`). `Members` holds the factors of a group of
members, (d0 + d1) * r numbers per matrix and member, and lays the batch's rows out in groups. Weights are never copied
for a member. `plan_rows` computes a new layout when rows have finished.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from estune.engines.hf.callers import Caller
from estune.engines.hf.parameters import Binding
from estune.engines.lowrank.stand_ins import Layout, MatrixStandIn, StandIn, VectorStandIn
from estune.es.noise import cpu_lowrank, factor_names, noise_keys
from estune.es.theta import Theta
from estune.es.types import Perturbation

MEMORY_SHARE = 0.5  # share of the free memory for the rows of one forward pass
MOST_ROWS = 1024  # rows of one forward pass; more are not more efficient and delay scoring
SAMPLING_BYTES = 64  # bytes per row and token of the vocabulary; `decoding.choose` computes in float64
GROUP_COST = 0.5  # rows; a group's factors cost as much in a forward pass
SHRINK_BELOW = 0.75  # ratio of costs; a new layout is used if it costs at most this share of the present one


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter's place in the model: an attribute of a module."""

    module: torch.nn.Module
    attribute: str


class SharedForward:
    """A model whose trained parameters can be replaced by stand-ins during a batch."""

    def __init__(self, model: Any, bound: Sequence[Binding], theta: Theta) -> None:
        """Find the places of all trained parameters; ``uncovered`` maps those without a stand-in to the reason."""
        self.model = model
        self.theta = theta
        self.lowrank = {spec.name for spec in theta.specs if spec.perturbed and spec.lowrank}
        self.parameters: dict[str, torch.Tensor] = {}
        self.uncovered: dict[str, str] = {}
        trained = {spec.name for spec in theta.specs if spec.perturbed}
        for binding in bound:
            if binding.name not in trained:
                continue
            parameter = binding.pieces[0].parameter
            if binding.direct is None or parameter.shape != binding.shape:
                self.uncovered[binding.name] = "the model's layout of it differs from the stored layout"
            self.parameters[binding.name] = parameter
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.places: dict[str, list[Place]] = {name: [] for name in self.parameters}
        for module in model.modules():
            for attribute, value in module._parameters.items():
                if id(value) in names:
                    self.places[names[id(value)]].append(Place(module, attribute))

    def bytes_per_member(self, rank: int) -> int:
        """Return the bytes of a member's factors and vectors, counted twice because `regroup` copies them."""
        shapes = {spec.name: spec.shape for spec in self.theta.specs}
        numbers = sum(rank * sum(shapes[n]) if n in self.lowrank else math.prod(shapes[n]) for n in self.parameters)
        return 2 * 4 * numbers

    @contextmanager
    def installed(self, stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
        """Replace parameters by stand-ins; the modules keep the parameters themselves."""
        places = [(place, stand_in) for name, stand_in in stand_ins.items() for place in self.places[name]]
        try:
            for place, stand_in in places:  # Python looks up instance attributes before `Module.__getattr__`
                place.module.__dict__[place.attribute] = stand_in
            yield
        finally:
            for place, _ in places:
                place.module.__dict__.pop(place.attribute, None)


class Members:
    """The factors of M members, and the layout of a batch's rows.

    The first layout has one group of one row per member. `regroup` changes the layout; a member may then have several
    groups, or none.
    """

    def __init__(self, shared: SharedForward, perturbations: Sequence[Perturbation]) -> None:
        self.count = len(perturbations)  # M
        self.layout = Layout(self.count, 1)
        self.groups = list(range(self.count))  # the member of each group, (V,)
        self.stand_ins: dict[str, StandIn] = {}
        self._tensors: dict[str, tuple[torch.Tensor, ...]] = {}  # each (M, ...)
        for name, parameter in shared.parameters.items():
            if name in shared.lowrank:
                left, right = factors_of(name, parameter.shape, perturbations, parameter.device, parameter.dtype)
                self._tensors[name] = (left, right)
                self.stand_ins[name] = MatrixStandIn(name, parameter.detach(), self.layout, left, right)
            else:
                values = np.empty((len(perturbations), *parameter.shape), dtype=np.float32)  # (M, *shape)
                for index, perturbation in enumerate(perturbations):
                    shared.theta.perturb(name, perturbation, out=values[index, ...])
                vector = torch.from_numpy(values).to(parameter.device, parameter.dtype)
                self._tensors[name] = (vector,)
                self.stand_ins[name] = VectorStandIn(name, parameter.detach(), self.layout, vector)

    def spoil(self, member: int) -> None:
        """Set all noise of one member to NaN, for a trial; the change takes effect at the next `regroup`."""
        for tensors in self._tensors.values():
            for tensor in tensors:
                tensor[member] = torch.nan

    def regroup(self, groups: Sequence[int], width: int) -> None:
        """Set a new layout: ``groups`` (V,) is the member of each group, ``width`` the rows of each group."""
        self.groups = list(groups)
        self.layout.groups, self.layout.width = len(groups), width
        is_first_layout = self.groups == list(range(self.count))
        for name, stand_in in self.stand_ins.items():
            tensors = self._tensors[name]
            if not is_first_layout:
                index = torch.tensor(self.groups, device=tensors[0].device)
                tensors = tuple(tensor.index_select(0, index) for tensor in tensors)
            if isinstance(stand_in, MatrixStandIn):
                stand_in.left, stand_in.right = tensors
            elif isinstance(stand_in, VectorStandIn):
                stand_in.values = tensors[0]
                stand_in.relaid()


def bytes_per_row(model: Any, length: int, sampled: bool) -> int:
    """Return an estimate of one row's bytes: cache and prefill activations of ``length`` tokens, and logits."""
    config = model.config.get_text_config(decoder=True)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    cache = 2 * 2 * layers * heads * head * length  # keys and values, twice because a new layout copies them
    sampling = SAMPLING_BYTES * config.vocab_size if sampled else 0
    return sampling + int(model.dtype.itemsize * (cache + 3 * config.vocab_size + length * (8 * hidden + 4 * inner)))


def factors_of(
    name: str,
    shape: Sequence[int],
    perturbations: Sequence[Perturbation],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the members' factors: left (M, r, d0), times scale and sign, and right (M, r, d1)."""
    rank = perturbations[0].noise.rank
    rademacher = perturbations[0].noise.distribution == "rademacher"
    seeds = [p.member.seed for p in perturbations]
    ones = np.ones(len(perturbations), dtype=np.float32)
    # Scales have 16 significant bits, so float32 holds them exactly.
    scales = np.array([p.noise.lowrank_scale * p.member.sign for p in perturbations], dtype=np.float32)
    factors = []
    for factor, size, scale in zip(factor_names(name), shape, (scales, ones), strict=True):
        values = np.empty((len(perturbations), rank, size), dtype=np.float32)
        cpu_lowrank.factors_into(values, noise_keys(seeds, factor), scale, rademacher)
        factors.append(torch.from_numpy(values).to(device, dtype))
    return factors[0], factors[1]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """A new layout of a batch."""

    lines: list[int]  # (V * K,), the line of the old batch that each new line continues
    live: list[bool]  # (V * K,), false for padding lines, which repeat another line
    groups: list[int]  # (V,), the member of each group
    width: int  # K, rows of each group


def plan_rows(alive: Sequence[int], groups: Sequence[int], width: int) -> RowPlan | None:
    """Return a layout of the unfinished lines if it is much cheaper than the present layout; else None.

    All groups have the same width, and a group holds rows of one member. If a member's rows do not fill its last group,
    one row is repeated as padding. Wide groups share factors; narrow groups need less padding.

    Args:
        alive: unfinished lines of the batch, ascending.
        groups: the member of each present group, (V,).
        width: rows of each present group.
    """
    of_member: dict[int, list[int]] = {}
    for line in alive:
        of_member.setdefault(groups[line // width], []).append(line)

    def cost(new_width: int) -> float:
        n_groups = sum(-(-len(lines) // new_width) for lines in of_member.values())
        return n_groups * (new_width + GROUP_COST)

    best = min(range(1, max(map(len, of_member.values())) + 1), key=cost)
    if cost(best) > SHRINK_BELOW * len(groups) * (width + GROUP_COST):
        return None
    plan = RowPlan([], [], [], best)
    for member, lines in of_member.items():
        for start in range(0, len(lines), best):
            part = lines[start : start + best]
            padding = best - len(part)
            plan.lines.extend(part + [part[-1]] * padding)
            plan.live.extend([True] * len(part) + [False] * padding)
            plan.groups.append(member)
    return plan


class MembersCaller:
    """A caller (see `estune.engines.hf.callers.Caller`) whose rows belong to members."""

    def __init__(self, caller: Caller, members: Members) -> None:
        self.caller = caller
        self.members = members
        self.alive = -1  # number of unfinished rows at the last call of `drop_finished`

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, max_new: int) -> torch.Tensor:
        """See `Caller`."""
        return self.caller.prefill(ids, mask, max_new)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Caller`."""
        return self.caller.step(tokens)

    def select_rows(self, rows: torch.Tensor) -> bool:
        """Return false: only `drop_finished` removes rows, because it knows their members."""
        return False

    def drop_finished(self, alive: Sequence[int], lines: int) -> tuple[list[int], list[bool]] | None:
        """See `Caller`."""
        if len(alive) == self.alive:  # no row has finished since the last call
            return None
        self.alive = len(alive)
        plan = plan_rows(alive, self.members.groups, self.members.layout.width)
        if plan is None:
            return None
        device = next(iter(self.members.stand_ins.values())).device
        if not self.caller.select_rows(torch.tensor(plan.lines, device=device)):
            return None
        self.members.regroup(plan.groups, plan.width)
        return plan.lines, plan.live
