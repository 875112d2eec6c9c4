"""At load: can this model's low-rank members share a forward pass? A trial says so, and names what stands against it.

Two members with two prompts of different length each go through the model in one batch. It must find a rule for every
operation on a parameter, ask for every parameter, and then

* give each member the logits that it gets alone, to rounding;
* keep members apart: with one member's noise NaN, every logit of the other is still a number (this finds a mixture of
  rows however small, in any dtype);
* use parameters through their stand-ins alone: with the parameters' own memory NaN, a part of the model at a time,
  every logit is still a number (a second use under another name, or a view kept elsewhere, is found).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from estune.engines.hf.callers import Caller, left_pad
from estune.engines.hf.parameters import Binding
from estune.engines.lowrank.members import Members, SharedForward
from estune.engines.lowrank.stand_ins import Uncovered
from estune.es.noise import lowrank_scale, perturbation_scale
from estune.es.theta import Theta
from estune.es.types import Member, Noise, Perturbation

TRIAL_SIGMA = 1e-2
TRIAL_RANK = 2
TRIAL_LENGTHS = (3, 40)  # tokens; a model that drops padding has 43 a member, which no number of rows divides
PART = 8  # the share of the model, one in so many, that is spoiled at a time: it exists twice meanwhile


@torch.inference_mode()
def shared_forward(
    model: Any, bound: Sequence[Binding], theta: Theta, caller: Callable[[], Caller], max_context: int | None
) -> tuple[SharedForward | None, str]:
    """Return the shared forward pass, or ``None`` and why members have to run one after another.

    The working model must hold theta, and holds it again afterwards.
    """
    shared = SharedForward(model, bound, theta)
    if shared.uncovered:
        name, reason = next(iter(shared.uncovered.items()))
        return None, _and_others([f"{name} ({reason})", *list(shared.uncovered)[1:]])
    try:
        fault = _Trial(shared, caller, max_context).find_fault()
    except Uncovered as error:
        fault = str(error)
    except Exception as error:  # a model's own code meets tensors that it was not written for
        fault = f"its own code ({type(error).__name__}: {' '.join(str(error).split())})"
    return (None, fault) if fault else (shared, "")


class _Trial:
    """Runs two members through a model and looks at the logits."""

    def __init__(self, shared: SharedForward, caller: Callable[[], Caller], max_context: int | None) -> None:
        self.shared = shared
        self.caller = caller
        self.model = shared.model
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        longest = TRIAL_LENGTHS[-1] if max_context is None else max_context - 2
        self.prompts = [[(3 * i + n) % vocabulary for i in range(min(n, longest))] for n in TRIAL_LENGTHS]
        scales = perturbation_scale(TRIAL_SIGMA), lowrank_scale(TRIAL_SIGMA, TRIAL_RANK)
        self.perturbations = [
            Perturbation(Member(seed, sign), Noise(scales[0], rank=TRIAL_RANK, lowrank_scale=scales[1]))
            for seed, sign in ((1, 1), (2, -1))
        ]

    def find_fault(self) -> str:
        """Return what stands against sharing, or nothing."""
        both = Members(self.shared, self.perturbations)
        together = self.logits(both)  # (2, M * K, V)
        unused = [name for name, stand_in in both.stand_ins.items() if not stand_in.used]
        if unused:
            return _and_others([f"{unused[0]} (the forward pass did not ask for it)", *unused[1:]])
        alone = torch.cat([self.logits(Members(self.shared, [one])) for one in self.perturbations], dim=1)
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        apart = bool((together - alone).abs().max() <= tolerance * (alone.abs().max() + 1e-6))  # False where NaN
        both.spoil(1)
        finite = self.logits(both).isfinite()
        own, spoiled = finite[:, : len(self.prompts)], finite[:, len(self.prompts) :]
        if not apart or not own.all() or spoiled.any():
            return "the rows of a batch (they influence each other)"
        hidden = self._used_otherwise()
        return (
            _and_others([f"{hidden[0]} (the forward pass also uses it in another way)", *hidden[1:]]) if hidden else ""
        )

    def logits(self, members: Members) -> torch.Tensor:
        """Return the logits of prefill and one step, float32 (2, M * K, V)."""
        members.regroup(range(members.count), len(self.prompts))
        ids, mask = left_pad(self.prompts * members.count, 0, self.model.device)
        with self.shared.installed(members.stand_ins):
            one = self.caller()
            return torch.stack([one.prefill(ids, mask, 2), one.step(ids[:, -1])]).float()

    def _used_otherwise(self) -> list[str]:
        """Return parameters whose own memory matters although stand-ins are in their places."""
        members = Members(self.shared, self.perturbations[:1])
        parameters = self.shared.parameters
        total = sum(parameter.numel() for parameter in parameters.values())
        parts: list[list[str]] = [[]]
        size = 0
        for name, parameter in parameters.items():
            if parts[-1] and size + parameter.numel() > total // PART:
                parts.append([])
                size = 0
            parts[-1].append(name)
            size += parameter.numel()
        found = [part for part in parts if not self._bears_spoiling(members, part)]
        return [name for part in found for name in part if not self._bears_spoiling(members, [name])]

    def _bears_spoiling(self, members: Members, names: Sequence[str]) -> bool:
        """Say whether all logits are numbers while the memory of some parameters is NaN."""
        parameters = self.shared.parameters
        copies = {name: parameters[name].detach().clone() for name in names}
        try:
            for name, copy in copies.items():
                members.stand_ins[name].base = copy
                parameters[name].detach().fill_(torch.nan)
            return bool(self.logits(members).isfinite().all())
        finally:
            for name, copy in copies.items():
                members.stand_ins[name].base = parameters[name].detach()
                parameters[name].detach().copy_(copy)


def _and_others(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more parameters"
