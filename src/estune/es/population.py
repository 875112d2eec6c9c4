"""The members of a step's population: a member is a seed and a sign.

estune keeps no random generator. A member's seed is a hash of the run seed, the step and an index
(docs/reproducibility.md), so any worker can compute any member of any step.
"""

from __future__ import annotations

from hashlib import blake2b

from estune.es.noise import lowrank_scale, perturbation_scale
from estune.es.types import Member, Noise

# Values of `derive_seed`'s ``person``: one for each purpose, so that equal integers give unrelated seeds.
MEMBER_PERSON = b"estune-seed-v1"  # member seeds of a step
ROW_PERSON = b"estune-rows-v1"  # order of the training rows
EVAL_PERSON = b"estune-eval-v1"  # random numbers that choose the sampled tokens of an evaluation


def derive_seed(*integers: int, person: bytes) -> int:
    """Hash integers in [0, 2^64) into one unsigned 64-bit integer.

    The message is the integers as little-endian uint64; the digest is 8 bytes of blake2b, read as little-endian.
    ``person`` names the purpose of the seed in at most 16 bytes; blake2b calls it personalisation.
    """
    message = b"".join(value.to_bytes(8, "little") for value in integers)
    return int.from_bytes(blake2b(message, digest_size=8, person=person).digest(), "little")


def noise_of(sigma: float, distribution: str = "normal", rank: int = 0) -> Noise:
    """Return the noise of a step's members.

    Args:
        sigma: standard deviation of the perturbations.
        distribution: ``normal`` or ``rademacher``.
        rank: rank of the low-rank noise; 0: full noise.
    """
    low = lowrank_scale(sigma, rank, distribution) if rank else 0.0
    return Noise(perturbation_scale(sigma, distribution), distribution, rank, low)


def members_for_step(run_seed: int, step: int, population_size: int, antithetic: bool) -> list[Member]:
    """Return the ``population_size`` members of a step, in order.

    An antithetic population consists of pairs (+, -) that share a seed. The seed is hashed from the pair's index, not
    from the member's.
    """
    if not antithetic:
        return [
            Member(derive_seed(run_seed, step, index, person=MEMBER_PERSON), +1) for index in range(population_size)
        ]
    seeds = [derive_seed(run_seed, step, pair, person=MEMBER_PERSON) for pair in range(population_size // 2)]
    return [Member(seed, sign) for seed in seeds for sign in (+1, -1)]
