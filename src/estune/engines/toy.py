"""The toy engine: a function of a vector instead of a language model, for the whole loop without torch.

theta is a vector split over a few named parameters. A row asks for a coordinate, or for a sum of several; the answer
is its decimal text, as bytes. `estune.tasks.quadratic` rewards answers close to the row's wanted value, so the run
descends a quadratic, and every number of the trainer, the journal and the update can be checked by hand.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from estune.engines.base import EngineFacts
from estune.engines.replica import LocalReplica
from estune.errors import UserError
from estune.es.theta import HostTheta
from estune.es.types import (
    Completion,
    GroupAnswer,
    GroupJob,
    Interrupted,
    ParameterSpec,
    Perturbation,
    Prompt,
    Sampling,
)

SHAPES = {"body.weight": (4, 8), "body.bias": (8,), "head.weight": (2, 3), "frozen.weight": (3,)}
MODEL_TYPE = "estune-toy"


class ToyAssets:
    """Prompts and completions are bytes, and a config.json names the toy; see `estune.engines.base.ModelAssets`."""

    tokenizer = None
    end_tokens = frozenset[int]()  # an answer ends where its text does

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of bytes."""
        return bytes(token_ids).decode()

    def save(self, directory: Path, dtype: str) -> None:
        """Write a config.json that names the toy."""
        text = json.dumps({"model_type": MODEL_TYPE, "dtype": "float32"}, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")

    def check(self) -> None:
        """Do nothing: a config.json of two words can always be written."""

    def identity(self) -> dict[str, Any]:
        """Return nothing: the weights alone decide."""
        return {}


class ToyEngine(LocalReplica):
    """Answers prompt ``x[i]``, or ``x[i]+x[j]``, with the text of that coordinate, or sum, of theta or of a member."""

    compute_dtype = "float32"
    prompts_per_batch = 1  # prompts share no work here

    def __init__(self, num_threads: int = 1, noise: str = "full") -> None:
        self.assets = ToyAssets()
        self._num_threads = num_threads
        specs = []
        for name, shape in SHAPES.items():
            perturbed = not name.startswith("frozen")
            specs.append(ParameterSpec(name, shape, perturbed, perturbed and noise == "lowrank" and len(shape) == 2))
        arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in SHAPES.items()}
        self.theta = HostTheta(specs, arrays, num_threads=num_threads)
        self.stored_dtypes = {spec.name: "float32" for spec in specs}

    @property
    def facts(self) -> EngineFacts:
        """What training needs to know of the engine."""
        header = {"engine": "toy", "model_type": MODEL_TYPE, "device": "cpu", "dtype": self.compute_dtype}
        return EngineFacts("toy", "cpu", self.compute_dtype, None, None, shared_forward=False, header=header)

    @property
    def coordinates(self) -> int:
        """Number of coordinates that can be asked for."""
        return sum(int(np.prod(spec.shape)) for spec in self.theta.specs if spec.perturbed)

    def vector(self, perturbation: Perturbation | None) -> np.ndarray:
        """Return the perturbed parameters of a member as one vector, in name order: float32 (d,)."""
        parts = [self.theta.perturb(s.name, perturbation).reshape(-1) for s in self.theta.specs if s.perturbed]
        return np.concatenate(parts)

    def generate(
        self,
        perturbation: Perturbation | None,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Completion]]:
        """Answer prompts of the form ``x[i]`` or ``x[i]+x[j]``."""
        vector = self.vector(perturbation)
        answers = []
        for prompt in prompts:
            if should_stop():
                raise Interrupted
            values = [float(vector[int(index)]) for index in re.findall(r"x\[(\d+)\]", prompt.text)]
            value = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
            tokens = tuple(repr(value).encode()[: sampling.max_completion_length])
            finished = len(tokens) < sampling.max_completion_length
            answers.append([Completion(tokens, finished, math.isfinite(value))] * sampling.num_generations)
        return answers

    def answers(
        self, jobs: Iterable[GroupJob], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[GroupAnswer]:
        """Answer groups on ``num_threads`` threads, each as it is completed; see `Generator.answers`."""

        def answer(job: GroupJob) -> GroupAnswer:
            started = time.perf_counter()
            completions = [self.generate(each, job.prompts, job.sampling, should_stop) for each in job.perturbations]
            return GroupAnswer(job.indices, completions, time.perf_counter() - started, 0.0)

        if self._num_threads == 1:
            yield from map(answer, self.checked(jobs))
            return
        with ThreadPoolExecutor(self._num_threads) as pool:
            for done in as_completed([pool.submit(answer, job) for job in self.checked(jobs)]):
                yield done.result()

    def members_that_fit(self, members: int, rows: int, length: int, rank: int, sampled: bool = False) -> int:
        """Return 1: members share no work here."""
        return 1

    def load_theta(self) -> None:
        """Do nothing: there is no working model beside theta."""

    def token_logprobs(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """A function of a vector has no token probabilities: UserError."""
        raise UserError("the toy engine has no token probabilities, so no KL")

    def perturb_cosine(self, perturbation: Perturbation) -> dict[str, float]:
        """Return 1 per kind: float32 holds the perturbation to rounding."""
        return {"matrix": 1.0}

    def check_reproducible(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
    ) -> bool:
        """A function of a vector is reproducible."""
        return True
