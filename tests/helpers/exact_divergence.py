"""KL from full distributions, with which tests compare the estimate from samples."""

from __future__ import annotations

from typing import Any

import numpy as np


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
