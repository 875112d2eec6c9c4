"""A trial when a model is loaded: it finds out whether low-rank members can share a forward pass, and if not, why.

Two members with two prompts of different lengths run through the model in one batch. The trial passes if

* there is a rule for every operation on a parameter, and the forward pass uses every stand-in;
* each member gets the same logits as alone, to rounding;
* members do not influence each other: if one member's noise is NaN, the other's logits are still finite (this finds the
  smallest mixture of rows, in any dtype);
* the model uses parameters only through stand-ins: if the parameters' own memory is NaN, one part of the model at a
  time, all logits are still finite (this finds a second use under another name, or a cached view).
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
TRIAL_LENGTHS = (3, 40)  # tokens; their sum 43 is prime, so a model that drops padding breaks the division into rows
PART = 8  # parts of the model; the parameters of one part at a time are copied and set to NaN


@torch.inference_mode()
def shared_forward(
    model: Any, bound: Sequence[Binding], theta: Theta, caller: Callable[[], Caller], max_context: int | None
) -> tuple[SharedForward | None, str]:
    """Return ``(shared forward pass, "")``, or ``(None, reason)`` if members must run one after another.

    The working model must hold theta, and holds theta again afterwards.
    """
    shared = SharedForward(model, bound, theta)
    if shared.uncovered:
        name, reason = next(iter(shared.uncovered.items()))
        return None, _and_others([f"{name} ({reason})", *list(shared.uncovered)[1:]])
    try:
        fault = _Trial(shared, caller, max_context).find_fault()
    except Uncovered as error:
        fault = str(error)
    except Exception as error:  # a model's own code may fail in any way on stand-ins
        fault = f"its own code ({type(error).__name__}: {' '.join(str(error).split())})"
    return (None, fault) if fault else (shared, "")


class _Trial:
    """Runs two members through a model and compares logits."""

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
        """Return the reason why members cannot share a forward pass, or an empty string."""
        both = Members(self.shared, self.perturbations)
        together = self.logits(both)  # (2, M * K, V)
        unused = [name for name, stand_in in both.stand_ins.items() if not stand_in.used]
        if unused:
            return _and_others([f"{unused[0]} (the forward pass does not use it)", *unused[1:]])
        alone = torch.cat([self.logits(Members(self.shared, [member])) for member in self.perturbations], dim=1)
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        is_equal = bool((together - alone).abs().max() <= tolerance * (alone.abs().max() + 1e-6))  # false for NaN
        both.spoil(1)
        finite = self.logits(both).isfinite()
        unspoiled, spoiled = finite[:, : len(self.prompts)], finite[:, len(self.prompts) :]
        if not is_equal or not unspoiled.all() or spoiled.any():
            return "the rows of a batch (they influence each other)"
        names = self._used_otherwise()
        if not names:
            return ""
        return _and_others([f"{names[0]} (the forward pass also uses it in another way)", *names[1:]])

    def logits(self, members: Members) -> torch.Tensor:
        """Return the logits of the prefill and of one step, float32 (2, M * K, vocabulary)."""
        members.regroup(range(members.count), len(self.prompts))
        ids, mask = left_pad(self.prompts * members.count, 0, self.model.device)
        with self.shared.installed(members.stand_ins):
            caller = self.caller()
            return torch.stack([caller.prefill(ids, mask, 2), caller.step(ids[:, -1])]).float()

    def _used_otherwise(self) -> list[str]:
        """Return the names of parameters that the model also uses without their stand-ins."""
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
        suspects = [part for part in parts if not self._is_finite_without(members, part)]
        return [name for part in suspects for name in part if not self._is_finite_without(members, [name])]

    def _is_finite_without(self, members: Members, names: Sequence[str]) -> bool:
        """Return whether all logits are finite while the memory of the named parameters is NaN."""
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
