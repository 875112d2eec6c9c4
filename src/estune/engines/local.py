"""The base class of engines in this process: theta, its files, and a loop over groups."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from estune.engines.base import EngineFacts, EngineOptions, ModelAssets
from estune.errors import UserError
from estune.es.theta import AnchorReader, Moved, Theta, digest, pieces
from estune.es.types import Completion, GroupAnswer, GroupJob, ParameterSpec, Perturbation, Prompt, Sampling
from estune.es.update import Update
from estune.files import writing
from estune.models.tensor_files import WEIGHTS_FILE, TensorFile, open_model_files, write_tensors

N_BYTES = 256  # token ids of an engine whose tokens are bytes
REPEATED_MEMBERS = 2  # members that answer twice, to find out whether answers are reproducible
REPEATED_PROMPTS = 4  # prompts of these members


class LocalBase:
    """The base class of engines in this process; see `estune.engines.base.LocalEngine`.

    A subclass sets ``theta`` and ``assets`` and implements `generate`, which leaves theta as it is. It overrides
    `forget` if it caches anything derived from theta, and other methods for speed.
    """

    name = "local"
    theta: Theta
    assets: ModelAssets
    compute_dtype = "float32"  # or bfloat16, float16
    prompts_per_batch = 1  # prompts in one forward pass
    max_context: int | None = None  # tokens of prompt and completion together; None: unlimited
    perturb_s = 0.0  # seconds spent on writing members' weights so far; 0 if the engine does not measure them
    _anchor: AnchorReader | None = None
    _checksum: tuple[int, str] | None = None  # theta's version and checksum

    @classmethod
    def open(cls, options: EngineOptions) -> Self:
        """Return ``cls()`` with theta_0, or with the weights in the directory ``options.model``.

        The base class reads ``model`` alone. A subclass whose constructor takes arguments overrides this method.

        Raises:
            UserError: the model cannot be used, or another option would have no effect.
        """
        try:
            inspect.signature(cls).bind()
        except TypeError:
            raise UserError(
                f"engine {cls.__name__} cannot be made without arguments: let its __init__ take none, or override open"
            ) from None
        engine = cls()
        engine.take(options)
        return engine

    def take(self, options: EngineOptions) -> None:
        """Read the weights in the directory ``options.model``, unless it is the engine's name.

        Raises:
            UserError: there are no such weights, or an option has no effect on this engine.
        """
        facts = self.facts
        accepted: dict[str, tuple[Any, ...]] = {
            "dtype": ("auto", facts.dtype),
            "device": ("auto", facts.device),
            "trainable_parameters": (None,),
            "revision": (None,),
            "trust_remote_code": (False,),
        }
        for name, values in accepted.items():
            if getattr(options, name) not in values:
                raise UserError(f"the {facts.name} engine has no use for {name}")
        if options.module is not None or options.tokenizer is not None:
            raise UserError(f"the {facts.name} engine takes no model or tokenizer in memory")
        if options.model == facts.name:
            return
        directory = Path(options.model).expanduser()
        if not (directory / WEIGHTS_FILE).is_file():
            raise UserError(
                f"the {facts.name} engine knows no model {options.model!r}: give a directory with {WEIGHTS_FILE}, or "
                f"leave --model out"
            )
        self.load_weights(directory)

    @property
    def facts(self) -> EngineFacts:
        """Properties of the engine that training reads."""
        header = {"engine": self.name, "model_type": self.name, "device": "cpu", "dtype": self.compute_dtype}
        vocab_size = N_BYTES if isinstance(getattr(self, "assets", None), ByteAssets) else None
        return EngineFacts(self.name, "cpu", self.compute_dtype, None, vocab_size, shared_forward=False, header=header)

    @property
    def stored_dtypes(self) -> dict[str, str]:
        """The dtype of each stored tensor; some models keep a few tensors in float32."""
        return dict.fromkeys(self.theta.arrays, self.compute_dtype)

    def generate(
        self,
        perturbation: Perturbation | None,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Completion]]:
        """Return the completions (B, G) of one member, or of theta (None), for prompts (B)."""
        raise NotImplementedError

    def generate_population(
        self,
        perturbations: Sequence[Perturbation],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[list[Completion]]]:
        """Return the completions (M, B, G) of M members for prompts (B), one member after another."""
        return [self.generate(perturbation, prompts, sampling, should_stop) for perturbation in perturbations]

    def answer(self, job: GroupJob, should_stop: Callable[[], bool]) -> GroupAnswer:
        """Answer one group; a group of members alone may share forward passes, see `generate_population`."""
        started, perturbed = time.perf_counter(), self.perturb_s
        members = [each for each in job.perturbations if each is not None]
        if len(members) == len(job.perturbations):
            completions = self.generate_population(members, job.prompts, job.sampling, should_stop)
        else:
            completions = [self.generate(each, job.prompts, job.sampling, should_stop) for each in job.perturbations]
        perturb_s = self.perturb_s - perturbed
        return GroupAnswer(job.indices, completions, time.perf_counter() - started - perturb_s, perturb_s)

    def answers(
        self, jobs: Iterable[GroupJob], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[GroupAnswer]:
        """Answer groups one after another; see `Generator.answers`."""
        for job in self.checked(jobs):
            yield self.answer(job, should_stop)

    def members_that_fit(self, members: int, rows: int, length: int, rank: int, sampled: bool = False) -> int:
        """Return 1, because members do not share a forward pass; see `Generator.members_that_fit`."""
        return 1

    def perturb_cosine(self, perturbation: Perturbation) -> dict[str, float]:
        """Return a cosine of 1, because float32 holds the perturbation to rounding."""
        return {"matrix": 1.0}

    def check_reproducible(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
    ) -> bool:
        """Return whether a few members answer a few prompts with the same tokens again, after `forget`."""
        members, asked = perturbations[:REPEATED_MEMBERS], prompts[:REPEATED_PROMPTS]
        first = [self.generate(member, asked, sampling) for member in members]
        self.forget()
        return first == [self.generate(member, asked, sampling) for member in members]

    def load_theta(self) -> None:
        """Do nothing, because there is no working model."""

    def token_logprobs(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Raise UserError, because the engine has no token probabilities."""
        raise UserError(f"the {self.name} engine has no token probabilities, so no KL")

    @property
    def specs(self) -> Sequence[ParameterSpec]:
        """Theta's parameters, in name order."""
        return self.theta.specs

    def forget(self) -> None:
        """Drop everything cached that was derived from theta; called when theta has changed."""

    def open_anchor(self, directories: Sequence[Path]) -> bool:
        """Take theta_0 from the first directory that holds the current theta; see `Replica.open_anchor`."""
        for directory in directories:
            self._anchor = anchor_reader(directory, self.theta)
            if self._anchor is not None:
                return True
        return False

    def load_anchor(self) -> None:
        """Overwrite theta with theta_0, part by part; see `Replica.load_anchor`."""
        anchor = self._anchor
        if anchor is None:
            raise ValueError("no anchor is open")

        def read_into(name: str, flat: np.ndarray) -> None:
            for start, count, _ in pieces(flat.size):
                flat[start : start + count] = anchor(name, start, count)

        self.theta.load(read_into)
        self.forget()

    def apply(self, update: Update) -> Moved:
        """Move theta by one step; see `Replica.apply`."""
        moved = self.theta.apply(update, self._anchor)
        self.forget()
        self._checksum = self.theta.version, moved.checksum
        return moved

    def sums(self) -> dict[str, int]:
        """Return the checksum sum of every parameter."""
        return self.theta.sums()

    @property
    def theta_checksum(self) -> str:
        """The checksum of theta since its last change; see `Replica.theta_checksum`."""
        cached = self._checksum
        return cached[1] if cached is not None and cached[0] == self.theta.version else self.checksum()

    def checksum(self) -> str:
        """Return the checksum of theta, recomputed from theta's memory."""
        checksum = digest(self.theta.specs, self.theta.sums())
        self._checksum = self.theta.version, checksum
        return checksum

    def fingerprint(self) -> str:
        """Return the fingerprint of theta."""
        return self.theta.fingerprint()

    def load_weights(self, directory: Path) -> None:
        """Read float32 weights; see `Replica.load_weights`."""
        file = TensorFile(directory / WEIGHTS_FILE)
        for spec in self.specs:
            if spec.name not in file.entries or file.shape(spec.name) != tuple(spec.shape):
                raise UserError(f"{directory} holds no tensor {spec.name!r} of shape {tuple(spec.shape)}")
        self.theta.load(file.read_into)
        self.forget()

    def assign(self, read: Callable[[str], Any]) -> None:
        """Overwrite theta from tensors; see `LocalEngine.assign`."""
        self.theta.assign(read)
        self.forget()

    def assign_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Overwrite theta from arrays; see `LocalEngine.assign_arrays`."""

        def read_into(name: str, flat: np.ndarray) -> None:
            flat[...] = arrays[name].reshape(-1)

        self.theta.load(read_into)
        self.forget()

    def save(self, directory: Path, *, float32: bool) -> None:
        """Write the model as Hugging Face files; see `Replica.save`."""
        directory.mkdir(parents=True, exist_ok=True)
        with writing(directory):
            self.assets.save(directory, "float32" if float32 else self.compute_dtype)
        arrays = self.theta.arrays
        dtypes = dict.fromkeys(arrays, "float32") if float32 else self.stored_dtypes
        write_tensors(directory / WEIGHTS_FILE, arrays, self.theta.buffers, dtypes)

    def saved(self, directory: Path) -> None:
        """Do nothing, because a local engine has one replica."""

    def take_metrics(self) -> dict[str, float]:
        """Return no metrics; see `Generator.take_metrics`."""
        return {}

    def checked(self, jobs: Iterable[GroupJob]) -> Iterator[GroupJob]:
        """Yield the jobs, each after a check that it is meant for the current theta.

        Raises:
            ValueError: a job is meant for another theta.
        """
        for job in jobs:
            if job.theta_checksum != self.theta_checksum:
                raise ValueError(
                    f"a job for theta {job.theta_checksum} reached a replica that holds {self.theta_checksum}"
                )
            yield job

    def check_lengths(self, prompts: Sequence[Prompt], new_tokens: Sequence[int]) -> None:
        """Raise UserError for an empty prompt, or one that leaves no room for its ``new_tokens`` in the context."""
        for prompt, new in zip(prompts, new_tokens, strict=True):
            length = len(prompt.token_ids)
            if not length:
                raise UserError(f"the prompt of row {prompt.row_id} has no tokens")
            if self.max_context is not None and length + new > self.max_context:
                raise UserError(
                    f"the prompt of row {prompt.row_id} has {length} tokens, which with {new} for the completion "
                    f"exceeds the model's context of {self.max_context}"
                )

    def stop(self) -> None:
        """Do nothing, because a local engine holds only memory."""


class TextAssets:
    """The assets that turn token ids into text; unlike a model's, they can be sent to another process."""

    def __init__(self, tokenizer: Any, end_tokens: frozenset[int]) -> None:
        self.tokenizer, self.end_tokens = tokenizer, end_tokens

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion's tokens, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


class ByteAssets:
    """Assets of a model whose tokens are bytes; see `estune.engines.base.ModelAssets`."""

    tokenizer = None

    def __init__(self, model_type: str, end_tokens: Iterable[int] = ()) -> None:
        self.model_type, self.end_tokens = model_type, frozenset(end_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of UTF-8 bytes."""
        return bytes(token_ids).decode("utf-8", errors="replace")

    def save(self, directory: Path, dtype: str) -> None:
        """Write a config.json that names the model."""
        text = json.dumps({"model_type": self.model_type, "dtype": "float32"}, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")

    def check(self) -> None:
        """Do nothing, because a config.json of two fields can always be written."""

    def identity(self) -> dict[str, Any]:
        """Return an empty identity, because the weights alone determine the answers."""
        return {}


def anchor_reader(directory: Path, theta: Theta) -> AnchorReader | None:
    """Return a memory-mapped reader of theta_0 from a model directory's files.

    Returns:
        The reader, or ``None`` if the files do not hold exactly the current values of ``theta`` under the stored names.
    """
    files = open_model_files(directory) if directory.is_dir() else {}

    def read(name: str, start: int, count: int) -> np.ndarray:
        return files[name].read(name, start, count)

    arrays = theta.arrays
    for spec in theta.specs:
        if spec.name not in files or files[spec.name].shape(spec.name) != tuple(spec.shape):
            return None
        if not files[spec.name].is_readable(spec.name):
            return None
        flat = arrays[spec.name].reshape(-1)
        for start, count, _ in pieces(flat.size):
            if not np.array_equal(read(spec.name, start, count), flat[start : start + count]):
                return None
    return read
