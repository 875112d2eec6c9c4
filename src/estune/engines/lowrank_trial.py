"""At load: can this model's low-rank members share a forward pass? A trial says so, and names what stands against it.

Two members with two prompts of different length each go through the model in one batch, and one member at a time; the
logits must agree to rounding, so a model that mixes up rows is found. An operation without a rule, or a parameter that
the forward pass never asked for (it may be kept elsewhere under another name), is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from estune.engines.base import Perturbation
from estune.engines.hf_callers import Caller, left_pad
from estune.engines.hf_parameters import Binding
from estune.engines.lowrank import Members, SharedForward
from estune.engines.stand_ins import Uncovered
from estune.master import Master
from estune.noise import lowrank_scale, perturbation_scale
from estune.population import Member

TRIAL_SIGMA = 1e-2
TRIAL_RANK = 2
TRIAL_PROMPTS = ([8, 9, 10], [1, 2, 3, 4, 5, 6, 7])


@torch.inference_mode()
def shared_forward(
    model: Any, bound: Sequence[Binding], master: Master, caller: Callable[[], Caller]
) -> tuple[SharedForward | None, str]:
    """Return the shared forward pass, or ``None`` and why members have to run one after another.

    The working model must hold theta.
    """
    shared = SharedForward(model, bound, master)
    if shared.uncovered:
        name, reason = next(iter(shared.uncovered.items()))
        return None, _and_others([f"{name} ({reason})", *list(shared.uncovered)[1:]])
    scales = perturbation_scale(TRIAL_SIGMA), lowrank_scale(TRIAL_SIGMA, TRIAL_RANK)
    perturbations = [
        Perturbation(Member(seed, sign), scales[0], rank=TRIAL_RANK, lowrank_scale=scales[1])
        for seed, sign in ((1, 1), (2, -1))
    ]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompts = [[token % vocabulary for token in prompt] for prompt in TRIAL_PROMPTS]

    def logits(chosen: Sequence[Perturbation]) -> tuple[torch.Tensor, Members]:
        members = Members(shared, chosen)
        members.relay(range(len(chosen)), len(prompts))
        ids, mask = left_pad(prompts * len(chosen), 0, model.device)
        with shared.installed(members.stand_ins):
            one = caller()
            first = one.prefill(ids, mask, 2)
            return torch.cat([first, one.step(ids[:, -1])]).float(), members  # (2 R, V)

    try:
        together, members = logits(perturbations)
        alone = [logits([perturbation])[0] for perturbation in perturbations]
    except Uncovered as error:
        return None, str(error)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return None, f"its own code ({' '.join(str(error).split())})"
    unused = [name for name, stand_in in members.stand_ins.items() if not stand_in.used]
    if unused:
        return None, _and_others([f"{unused[0]} (the forward pass did not ask for it)", *unused[1:]])
    n_prompts = len(prompts)
    expected = torch.cat([rows[half * n_prompts : (half + 1) * n_prompts] for half in (0, 1) for rows in alone])
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not (together - expected).abs().max() <= tolerance * (expected.abs().max() + 1e-6):  # NaN fails, too
        return None, "the rows of a batch (they influence each other)"
    return shared, ""


def _and_others(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more parameters"
