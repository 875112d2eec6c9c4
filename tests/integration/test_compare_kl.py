"""KL by the k3 estimator, on tokens that a real model sampled, against KL from its full logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact_divergence import exact_kl
from tiny_models import VOCAB_SIZE, tiny_model

from estune.train.evaluation import kl_k3

SAMPLES = 4000
pytestmark = pytest.mark.miniature


@pytest.mark.parametrize("moved", [0.01, 0.05])
def test_k3_agrees_with_the_exact_divergence_within_its_error(moved: float) -> None:
    base, tuned = tiny_model("llama"), tiny_model("llama")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB_SIZE, (1, 24), generator=generator)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * moved)
        own, other = (model(ids).logits[0].double() for model in (tuned, base))  # (T, V)
    exact = exact_kl(own.numpy(), other.numpy())
    known = torch.nn.functional.kl_div(other.log_softmax(-1), own.log_softmax(-1), log_target=True, reduction="none")
    assert exact == pytest.approx(known.sum(-1).numpy())
    tokens = torch.multinomial(own.softmax(-1), SAMPLES, replacement=True, generator=generator)  # (T, samples)
    logprobs = [logits.log_softmax(-1).gather(-1, tokens).tolist() for logits in (own, other)]
    gaps = np.subtract(logprobs[1], logprobs[0])
    terms = np.expm1(gaps) - gaps
    error = math.sqrt(terms.var(1).mean() / terms.size)  # tokens are drawn at each position apart
    assert abs(kl_k3(*logprobs) - exact.mean()) < 4 * error
    assert error < 0.05 * exact.mean()  # so the agreement means something
