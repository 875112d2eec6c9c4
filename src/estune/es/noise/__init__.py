"""Noise version 1: integers that are a pure function of (member seed, parameter name, element index).

`reference` says what the noise is, in a page of NumPy; `cpu` produces the same bits at memory speed, and `cpu_lowrank`
those of low-rank members.
"""

from estune.es.noise.reference import (
    NOISE_VERSION,
    block_name,
    factor_names,
    factor_shapes,
    lowrank_deviation,
    lowrank_factors,
    lowrank_ints,
    lowrank_scale,
    noise_deviation,
    noise_ints,
    noise_key,
    noise_keys,
    perturbation_scale,
)

__all__ = [
    "NOISE_VERSION",
    "block_name",
    "factor_names",
    "factor_shapes",
    "lowrank_deviation",
    "lowrank_factors",
    "lowrank_ints",
    "lowrank_scale",
    "noise_deviation",
    "noise_ints",
    "noise_key",
    "noise_keys",
    "perturbation_scale",
]
