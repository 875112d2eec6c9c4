"""Noise version 1: integers that are a pure function of (member seed, parameter name, element index).

`reference` says what the noise is, in a page of NumPy; `cpu` produces the same bits at memory speed.
"""

from estune.noise.reference import NOISE_VERSION, block_name, noise_deviation, noise_ints, noise_key, perturbation_scale

__all__ = ["NOISE_VERSION", "block_name", "noise_deviation", "noise_ints", "noise_key", "perturbation_scale"]
