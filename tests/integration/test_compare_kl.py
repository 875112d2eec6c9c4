"""KL by the k3 estimator, on sampled tokens, against KL from full distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model

from estune.train.evaluation import kl_k3

SAMPLES = 4000
pytestmark = pytest.mark.miniature


def exact_kl(p_logits: Any, q_logits: Any) -> np.ndarray:
    """Return KL(p || q) in nats per token, (...,), from full logits (..., V) in float64."""
    log_p, log_q = _log_softmax(p_logits), _log_softmax(q_logits)
    p = np.exp(log_p)
    terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return np.asarray(terms.sum(-1))


def _log_softmax(logits: Any) -> np.ndarray:
    values = np.asarray(logits, dtype=np.float64)
    values = values - values.max(-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(-1, keepdims=True)))


def test_exact_kl_by_hand_and_at_extremes() -> None:
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    wanted = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert exact_kl(p + 7, q - 3) == pytest.approx([wanted])  # logits are known up to a constant
    assert exact_kl(p, p) == pytest.approx([0.0], abs=1e-15)
    assert exact_kl([0.0, -1e4], [0.0, 0.0]) == pytest.approx(math.log(2))  # a token that p never says
    assert exact_kl(np.zeros((2, 3, 5)), np.zeros((2, 3, 5))).shape == (2, 3)


def test_k3_on_samples_agrees_with_the_exact_divergence() -> None:
    rng = np.random.default_rng(8)
    p, q = rng.normal(0, 1, 40), rng.normal(0, 1, 40)
    log_p, log_q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
    tokens = rng.choice(40, 20_000, p=np.exp(log_p) / np.exp(log_p).sum())
    gaps = log_q[tokens] - log_p[tokens]
    error = np.std(np.expm1(gaps) - gaps) / math.sqrt(tokens.size)
    assert abs(kl_k3([log_p[tokens].tolist()], [log_q[tokens].tolist()]) - exact_kl(p, q)) < 4 * error


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
