"""The messages between the process that trains and its workers, as bytes, so that their size can be counted.

A message is a list of numbers, strings and packed arrays in MessagePack. It never holds a weight. A worker receives
each prompt once; jobs then name prompts by number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from estune.es.theta import Moved
from estune.es.types import (
    Completion,
    GroupAnswer,
    GroupJob,
    Member,
    Noise,
    ParameterSpec,
    Perturbation,
    Prompt,
    Sampling,
)
from estune.es.update import Update

PromptNumbers = Mapping[Prompt, int]


def pack_prompts(prompts: Mapping[int, Prompt], *, has_text: bool) -> bytes:
    """Return the message of prompts by number: 4 bytes a token, and the texts if ``has_text``.

    The engines `hf` and `vllm` read tokens alone.
    """
    texts = {n: (p.text, p.question) if has_text else ("", "") for n, p in prompts.items()}
    rows = [[n, p.row_id, *texts[n], _ints(p.token_ids)] for n, p in prompts.items()]
    return _pack(rows)


def unpack_prompts(message: bytes) -> dict[int, Prompt]:
    """Return the prompts of a message by number."""
    return {n: Prompt(row, text, _tuple(tokens), question) for n, row, text, question, tokens in _unpack(message)}


def pack_job(job: GroupJob, numbers: PromptNumbers) -> bytes:
    """Return the message of a job: about 150 bytes, 15 more a member, and 4 a prompt.

    Args:
        job: its perturbations share one noise, as those of a step do.
        numbers: the number of each prompt.
    """
    noises = {each.noise for each in job.perturbations if each is not None}
    if len(noises) > 1:
        raise ValueError("the members of a job must share one noise")
    noise = next(iter(noises), None)
    s = job.sampling
    return _pack([
        _ints(job.indices),
        [each and [each.member.seed, each.member.sign] for each in job.perturbations],
        noise and [noise.scale, noise.distribution, noise.rank, noise.lowrank_scale],
        bytes.fromhex(job.theta_checksum),
        _ints([numbers[prompt] for prompt in job.prompts]),
        [s.seed, s.step, s.max_completion_length, s.num_generations, s.temperature, s.top_p, s.top_k,
         list(s.stop_strings), s.person],
    ])  # fmt: skip


def unpack_job(message: bytes, prompts: Mapping[int, Prompt]) -> GroupJob:
    """Return the job of a message."""
    indices, members, noise, checksum, numbers, sampling = _unpack(message)
    shared = noise and Noise(noise[0], noise[1], noise[2], noise[3])
    return GroupJob(
        _tuple(indices),
        tuple(each and Perturbation(Member(*each), shared) for each in members),
        checksum.hex(),
        tuple(prompts[number] for number in _tuple(numbers)),
        _sampling(*sampling),
    )


def _sampling(seed: int, step: int, length: int, copies: int, *rest: Any) -> Sampling:
    temperature, top_p, top_k, stop_strings, person = rest
    return Sampling(seed, step, length, copies, temperature, top_p, top_k, tuple(stop_strings), person)


def pack_answer(answer: GroupAnswer) -> bytes:
    """Return the message of an answer: 4 bytes a token, and 5 bytes a completion."""
    flat = [each for member in answer.completions for row in member for each in row]
    tokens = [token for each in flat for token in each.token_ids]
    flags = bytes(each.finished | each.finite << 1 for each in flat)
    shape = [len(answer.completions), len(answer.completions[0]), len(answer.completions[0][0])]
    lengths = _ints([len(each.token_ids) for each in flat])
    return _pack([_ints(answer.indices), shape, lengths, flags, _ints(tokens), answer.generate_s, answer.perturb_s])


def unpack_answer(message: bytes) -> GroupAnswer:
    """Return the answer of a message."""
    indices, shape, lengths, flags, tokens, generate_s, perturb_s = _unpack(message)
    ends = np.cumsum(np.frombuffer(lengths, "<i4")).tolist()
    ids = _tuple(tokens)
    flat = [
        Completion(ids[start:end], bool(flag & 1), bool(flag & 2))
        for start, end, flag in zip([0, *ends], ends, flags, strict=False)
    ]
    members, rows, copies = shape
    cells = [flat[i : i + copies] for i in range(0, len(flat), copies)]
    completions = [cells[m * rows : (m + 1) * rows] for m in range(members)]
    return GroupAnswer(_tuple(indices), completions, generate_s, perturb_s)


def pack_update(update: Update) -> bytes:
    """Return the message of an update: 11 bytes a member, and about 60."""
    u = update
    seeds = np.array([member.seed for member in u.members], "<u8").tobytes()
    signs = np.array([member.sign for member in u.members], "<i1").tobytes()
    q = np.array(u.q, "<i2").tobytes()
    return _pack([seeds, signs, q, u.e, u.a, u.decay, u.anchored, u.distribution, u.rank, u.a_lowrank])


def unpack_update(message: bytes) -> Update:
    """Return the update of a message."""
    seeds, signs, q, *scalars = _unpack(message)
    pairs = zip(np.frombuffer(seeds, "<u8").tolist(), np.frombuffer(signs, "<i1").tolist(), strict=True)
    members = tuple(Member(seed, sign) for seed, sign in pairs)
    return Update(members, tuple(np.frombuffer(q, "<i2").tolist()), *scalars)


def pack_moved(moved: Moved) -> bytes:
    """Return the message of an update's result: 8 bytes a parameter, and the two sums of squares."""
    sums = np.array([moved.sums[spec.name] for spec in moved.specs], "<u8").tobytes()
    return _pack([sums, math.fsum(moved.change_squares), math.fsum(moved.theta_squares)])


def unpack_moved(message: bytes, specs: Sequence[ParameterSpec]) -> Moved:
    """Return the result of a message; its norms equal those of the original."""
    sums, change, theta = _unpack(message)
    by_name = dict(zip((s.name for s in specs), np.frombuffer(sums, "<u8").tolist(), strict=True))
    return Moved(tuple(specs), by_name, (change,), (theta,))


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _unpack(message: bytes) -> list[Any]:
    value: list[Any] = msgpack.unpackb(message)
    return value


def _ints(values: Sequence[int]) -> bytes:
    return np.array(values, "<i4").tobytes()


def _tuple(packed: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(packed, "<i4").tolist())
