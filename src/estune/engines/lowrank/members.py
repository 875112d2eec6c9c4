"""Whole populations in one forward pass: members that share the weights and differ by low-rank factors.

`SharedForward` knows which parameters a model has and how to put stand-ins (`stand_ins`) in their
places. `Members` holds the factors of some members and lays the batch's rows out in groups; no copy of a weight is
made for a member, only factors of (d0 + d1) * r numbers a matrix. `plan_rows` says which rows stay beside each other
when others have finished.
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

MEMORY_SHARE = 0.5  # of the free memory, for the rows of one forward pass
MOST_ROWS = 1024  # beyond this a forward pass is no more efficient, and scoring would wait longer
SAMPLING_BYTES = 64  # per row and word of the vocabulary: `decoding.choose` works in float64
GROUP_COST = 0.5  # what a group's factors cost in a forward pass, in rows
SHRINK_BELOW = 0.75  # a batch is laid out anew when that makes it this much cheaper


@dataclass(frozen=True, slots=True)
class Place:
    """Where the model's code finds a parameter: an attribute of a module."""

    module: torch.nn.Module
    attribute: str


class SharedForward:
    """A model whose trained parameters can be replaced by stand-ins for the time of a batch."""

    def __init__(self, model: Any, bound: Sequence[Binding], theta: Theta) -> None:
        """``uncovered`` then names parameters that cannot have a stand-in, with the reason."""
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
                self.uncovered[binding.name] = "the model holds it in another layout than it is stored"
            self.parameters[binding.name] = parameter
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.places: dict[str, list[Place]] = {name: [] for name in self.parameters}
        for module in model.modules():
            for attribute, value in module._parameters.items():
                if id(value) in names:
                    self.places[names[id(value)]].append(Place(module, attribute))

    def bytes_per_member(self, rank: int) -> int:
        """Return how much memory a member's factors and vectors take, twice: rows may be laid out anew."""
        shapes = {spec.name: spec.shape for spec in self.theta.specs}
        numbers = sum(rank * sum(shapes[n]) if n in self.lowrank else math.prod(shapes[n]) for n in self.parameters)
        return 2 * 4 * numbers

    @contextmanager
    def installed(self, stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
        """Put stand-ins in the places of parameters; the parameters themselves stay where they are."""
        places = [(place, stand_in) for name, stand_in in stand_ins.items() for place in self.places[name]]
        try:
            for place, stand_in in places:  # an instance attribute is found before the module's parameters are
                place.module.__dict__[place.attribute] = stand_in
            yield
        finally:
            for place, _ in places:
                place.module.__dict__.pop(place.attribute, None)


class Members:
    """The factors of some members (M) and how the rows of a batch belong to them.

    At first each member has one group of one row. `regroup` lays the rows out anew: a member may have several groups,
    or none.
    """

    def __init__(self, shared: SharedForward, perturbations: Sequence[Perturbation]) -> None:
        self.count = len(perturbations)  # M
        self.layout = Layout(self.count, 1)
        self.groups = list(range(self.count))  # the member of each group, (V,)
        self.stand_ins: dict[str, StandIn] = {}
        self._tensors: dict[str, tuple[torch.Tensor, ...]] = {}  # each (M, ...)
        for name, parameter in shared.parameters.items():
            if name in shared.lowrank:
                left, right = _factors(name, parameter, perturbations)
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
        """Make all noise of one member NaN, for a trial; `regroup` puts it in place."""
        for tensors in self._tensors.values():
            for tensor in tensors:
                tensor[member] = torch.nan

    def regroup(self, groups: Sequence[int], width: int) -> None:
        """Let the rows form these groups: the member of each (V,), and rows in each."""
        self.groups = list(groups)
        self.layout.groups, self.layout.width = len(groups), width
        everyone = self.groups == list(range(self.count))
        for name, stand_in in self.stand_ins.items():
            picked = self._tensors[name]
            if not everyone:
                index = torch.tensor(self.groups, device=picked[0].device)
                picked = tuple(tensor.index_select(0, index) for tensor in picked)
            if isinstance(stand_in, MatrixStandIn):
                stand_in.left, stand_in.right = picked
            elif isinstance(stand_in, VectorStandIn):
                stand_in.values = picked[0]
                stand_in.relaid()


def bytes_per_row(model: Any, length: int, sampled: bool) -> int:
    """Estimate the memory of one row of ``length`` tokens: its cache, logits, and the activations of its prefill."""
    config = model.config.get_text_config(decoder=True)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    cache = 2 * 2 * layers * heads * head * length  # laid out anew it exists twice for a moment
    choosing = SAMPLING_BYTES * config.vocab_size if sampled else 0
    return choosing + int(model.dtype.itemsize * (cache + 3 * config.vocab_size + length * (8 * hidden + 4 * inner)))


def _factors(
    name: str, parameter: torch.Tensor, perturbations: Sequence[Perturbation]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the members' factors: left (M, r, d0), times scale and sign, and right (M, r, d1)."""
    rank = perturbations[0].noise.rank
    rademacher = perturbations[0].noise.distribution == "rademacher"
    seeds = [p.member.seed for p in perturbations]
    ones = np.ones(len(perturbations), dtype=np.float32)
    scales = np.array(
        [p.noise.lowrank_scale * p.member.sign for p in perturbations], dtype=np.float32
    )  # exact: 16 bits
    factors = []
    for factor, size, scale in zip(factor_names(name), parameter.shape, (scales, ones), strict=True):
        values = np.empty((len(perturbations), rank, size), dtype=np.float32)
        cpu_lowrank.factors_into(values, noise_keys(seeds, factor), scale, rademacher)
        factors.append(torch.from_numpy(values).to(parameter.device, parameter.dtype))
    return factors[0], factors[1]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """A new layout: which line of the old batch each new line continues, and whether it is more than filling."""

    lines: list[int]  # (V * K,)
    live: list[bool]  # (V * K,)
    groups: list[int]  # (V,), the member of each
    width: int  # K


def plan_rows(alive: Sequence[int], groups: Sequence[int], width: int) -> RowPlan | None:
    """Return a layout for the lines that go on, if one is much cheaper than the present layout.

    Rows of a member stay side by side in groups of one width for the whole batch; where a member's rows do not fill
    its last group, one of them is repeated. Wide groups share factors, narrow ones need less filling.

    Args:
        alive: lines of the batch that go on, ascending.
        groups: the member of each present group, (V,).
        width: rows in each present group.
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
            filling = best - len(part)
            plan.lines.extend(part + [part[-1]] * filling)
            plan.live.extend([True] * len(part) + [False] * filling)
            plan.groups.append(member)
    return plan


class MembersCaller:
    """A caller (see `hf_callers.Caller`) whose rows belong to members."""

    def __init__(self, caller: Caller, members: Members) -> None:
        self.caller = caller
        self.members = members
        self.alive = -1  # rows that went on at the last look

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, max_new: int) -> torch.Tensor:
        """See `Caller`."""
        return self.caller.prefill(ids, mask, max_new)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Caller`."""
        return self.caller.step(tokens)

    def select_rows(self, rows: torch.Tensor) -> bool:
        """Rows leave by `drop_finished` alone, which knows whose they are."""
        return False

    def drop_finished(self, alive: Sequence[int], lines: int) -> tuple[list[int], list[bool]] | None:
        """See `Caller`."""
        if len(alive) == self.alive:  # nothing has finished since the last look
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
