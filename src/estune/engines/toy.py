"""The toy engine: theta is a vector instead of a language model, so the whole training loop runs without torch.

The vector is split over a few named parameters. A prompt asks for one coordinate, or for a sum of several. The answer
is the number's decimal text, as bytes. `estune.tasks.quadratic` rewards answers close to a target value, so a run
descends a quadratic, and all numbers of trainer, journal and update can be checked by hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait

import numpy as np

from estune.engines.base import EngineFacts, EngineOptions
from estune.engines.local import ByteAssets, LocalBase
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
JOBS_PER_THREAD = 2  # jobs that run or wait


class ToyEngine(LocalBase):
    """Answers the prompt ``x[i]``, or ``x[i]+x[j]``, with the text of this coordinate, or sum, of theta or a member."""

    name = "toy"

    def __init__(self, num_threads: int = 1, noise: str = "full") -> None:
        self.assets = ByteAssets(MODEL_TYPE)  # without end tokens: an answer ends with its text
        self._num_threads = num_threads
        specs = []
        for name, shape in SHAPES.items():
            perturbed = not name.startswith("frozen")
            specs.append(ParameterSpec(name, shape, perturbed, perturbed and noise == "lowrank" and len(shape) == 2))
        arrays = {name: np.zeros(shape, dtype=np.float32) for name, shape in SHAPES.items()}
        self.theta = HostTheta(specs, arrays, num_threads=num_threads)

    @classmethod
    def open(cls, options: EngineOptions) -> ToyEngine:
        """Return an engine whose theta is 0, or the weights of an earlier toy run.

        Raises:
            UserError: an option would have no effect, or the weights cannot be read.
        """
        engine = cls(options.num_threads, noise=options.noise)
        engine.take(options)
        return engine

    @property
    def facts(self) -> EngineFacts:
        """Properties of the engine that training reads."""
        header = {"engine": "toy", "model_type": MODEL_TYPE, "device": "cpu", "dtype": self.compute_dtype}
        return EngineFacts("toy", "cpu", self.compute_dtype, None, None, shared_forward=False, header=header)

    @property
    def coordinates(self) -> int:
        """Number of coordinates: the scalars of the perturbed parameters."""
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
        """Answer groups on ``num_threads`` threads and yield each when it is complete; see `Generator.answers`.

        At most `JOBS_PER_THREAD` jobs per thread are taken ahead.
        """
        if self._num_threads == 1:
            yield from super().answers(jobs, should_stop)
            return
        with ThreadPoolExecutor(self._num_threads) as pool:
            running: set[Future[GroupAnswer]] = set()
            for job in self.checked(jobs):
                running.add(pool.submit(self.answer, job, should_stop))
                if len(running) == JOBS_PER_THREAD * self._num_threads:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (each.result() for each in done)
            yield from (each.result() for each in as_completed(running))
