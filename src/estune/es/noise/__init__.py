"""Noise version 1: integers that are a pure function of (member seed, parameter name, element index).

`reference` defines the noise in NumPy. `cpu` computes the same bits with compiled kernels, about as fast as memory can
be written. `cpu_lowrank` does the same for low-rank members.
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
