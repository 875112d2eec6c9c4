"""The vLLM engine: vLLM generates, and theta lies beside it in float32.

Theta is in memory that this process shares with vLLM's workers (`shared_memory`). Workers write members into vLLM's
own tensors (`extension`), through a table that is found by probing and verified by value (`table`). Low-rank members
share vLLM's batches (`members`). A worker receives seeds and scalars, never weights.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from estune.console import warn
from estune.engines.base import EngineFacts, EngineOptions
from estune.engines.hf import identity, trials
from estune.engines.hf.assets import HFAssets
from estune.engines.hf.decoding import StopStrings
from estune.engines.hf.loading import (
    files_of,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_model,
)
from estune.engines.hf.saved_model import tied_truth
from estune.engines.hf.working_model import torch_threads
from estune.engines.local import LocalBase
from estune.engines.vllm import launch, table
from estune.engines.vllm.shared_memory import MEMBER, ROW, SharedArrays, message_of
from estune.errors import UserError
from estune.es.population import derive_seed
from estune.es.types import Completion, Interrupted, Perturbation, Prompt, Sampling

MOST_ROWS = 256  # requests that vLLM runs at a time


class VLLMEngine(LocalBase):
    """Answers prompts with theta or a member of it; see `estune.engines.base.LocalEngine`."""

    name = "vllm"
    assets: HFAssets

    @classmethod
    def open(cls, options: EngineOptions) -> VLLMEngine:
        """Load a model into vLLM and its weights into theta.

        Raises:
            UserError: vLLM is not installed, or it cannot run the model, or members cannot be written into it.
        """
        if options.module is not None:
            raise UserError("the engine vllm loads a model by name; it cannot take a module in memory")
        with torch_threads(options.num_threads):
            return cls(options)

    def __init__(self, options: EngineOptions) -> None:
        """Load a model; see `open`."""
        version = launch.installed_version()
        place = resolve_device(options.device)
        is_given = options.tokenizer is not None
        tokenizer = options.tokenizer
        if not is_given:
            tokenizer = load_tokenizer(
                options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
            )
        module, bound, theta = load_model(
            options.model,
            dtype="float32",
            device=torch.device("cpu"),
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            num_threads=options.num_threads,
            trainable_parameters=options.trainable_parameters,
            noise=options.noise,
            allocate=self._allocate,
        )
        config = module.config
        self.compute_dtype = str(resolve_dtype(options.dtype, place, getattr(config, "dtype", None))).removeprefix(
            "torch."
        )
        commit = getattr(config, "_commit_hash", None) or options.revision
        digests = identity.directory_identity(
            files_of(options.model, commit), tokenizer=not is_given, code=options.trust_remote_code
        )
        self.assets = HFAssets(module, tokenizer, self.compute_dtype, digests=digests)
        self.theta = theta
        kinds = {binding.name: binding.kind for binding in bound}
        del bound
        is_tied = tied_truth(module)
        module.to("meta")  # the assets need its configuration and code only
        if is_tied:
            module.tie_weights()  # the move has made two tensors of one
        gc.collect()
        self.device = place
        self._num_threads = options.num_threads
        self._tensor_parallel_size = options.tensor_parallel_size
        self.model_type, self.architecture = config.model_type, type(module).__name__
        self.prompts_per_batch = options.prompts_per_batch
        self._version = version
        self._requests = 0
        self._stop = StopStrings(tokenizer, ())
        self._llm: Any = None
        try:
            self._llm = launch.start(
                resolve_model(options.model),
                dtype=self.compute_dtype,
                tensor_parallel_size=options.tensor_parallel_size,
                revision=options.revision,
                trust_remote_code=options.trust_remote_code,
            )
            self._open_workers(kinds, options.num_threads)
        except BaseException:
            self.stop()
            raise
        self.max_context: int = self._llm.llm_engine.model_config.max_model_len

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        self._shared = SharedArrays(shapes)
        return self._shared.arrays

    def _open_workers(self, kinds: dict[str, str], num_threads: int) -> None:
        """Let the workers map theta and find their tables; find out whether members can share a batch."""
        address = self._shared.address(self.theta.specs).message()
        opened = self._call("estune_open", address, kinds, num_threads, self.architecture)
        for each in opened:
            if each["error"] is not None:
                raise UserError(each["error"])
        for path in {path for rank in self._call("estune_shared_files") for path in rank}:
            Path(path).unlink(missing_ok=True)  # the ranks have it open; nothing is left if they are killed
        shapes = {spec.name: tuple(spec.shape) for spec in self.theta.specs}
        table.refuse_uncovered(shapes, [each["ranges"] for each in opened], self.architecture)
        self._stored_dtypes: dict[str, str] = {k: v for each in opened for k, v in each["dtypes"].items()}
        self._is_lowrank = any(spec.lowrank for spec in self.theta.specs)
        uncovered = self._call("estune_uncovered")[0]
        self._shares = self._is_lowrank and not uncovered
        if self._is_lowrank and uncovered:
            warn(f"low-rank members run one after another in vLLM, because there is no rule for {uncovered[0]}")

    @property
    def stored_dtypes(self) -> dict[str, str]:
        """The dtype of each stored tensor in vLLM."""
        return self._stored_dtypes

    @property
    def facts(self) -> EngineFacts:
        """Properties of the engine that training reads."""
        header = {
            "engine": "vllm",
            "engine_version": self._version,
            "device": self.device.type,
            "dtype": self.compute_dtype,
            "model_type": self.model_type,
            "architecture": self.architecture,
            "num_parameters": self.theta.num_parameters,
            "max_context": self.max_context,
            "prompts_per_batch": self.prompts_per_batch,
            "shared_forward": self._shares,
            "tensor_parallel_size": self._tensor_parallel_size,
        }
        return EngineFacts(
            name="vllm",
            device=self.device.type,
            dtype=self.compute_dtype,
            max_context=self.max_context,
            vocab_size=self.assets.vocab_size,
            shared_forward=self._shares,
            header=header,
        )

    def generate(
        self,
        perturbation: Perturbation | None,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Completion]]:
        """Return the completions (B, G) of one member, or of theta, for prompts (B); see `LocalEngine.generate`."""
        if perturbation is not None and self._shares:
            return self.generate_population([perturbation], prompts, sampling, should_stop)[0]
        self.check_lengths(prompts, [sampling.max_completion_length] * len(prompts))
        message = None if perturbation is None else message_of(perturbation)
        with torch_threads(self._num_threads):
            self.perturb_s += max(self._call("estune_hold", message))
            return self._answer(1, prompts, sampling, should_stop, are_members=False)[0]

    def generate_population(
        self,
        perturbations: Sequence[Perturbation],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[list[Completion]]]:
        """Return the completions (M, B, G) of M members for prompts (B)."""
        if not self._shares:
            return [self.generate(perturbation, prompts, sampling, should_stop) for perturbation in perturbations]
        self.check_lengths(prompts, [sampling.max_completion_length] * len(prompts))
        with torch_threads(self._num_threads):
            self.perturb_s += max(self._call("estune_hold", None))
            started = time.perf_counter()
            self._call("estune_members", [message_of(perturbation) for perturbation in perturbations])
            self.perturb_s += time.perf_counter() - started
            return self._answer(len(perturbations), prompts, sampling, should_stop, are_members=True)

    def members_that_fit(self, members: int, rows: int, length: int, rank: int, sampled: bool = False) -> int:
        """Return how many members fill vLLM's batch; see `Generator.members_that_fit`."""
        return max(1, min(members, MOST_ROWS // max(rows, 1))) if self._shares else 1

    def perturb_cosine(self, perturbation: Perturbation) -> dict[str, float]:
        """Return the cosine of the cast perturbation with the exact one; see `Generator.perturb_cosine`."""
        return dict(self._call("estune_cosine", message_of(perturbation))[0])

    def check_reproducible(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
    ) -> bool:
        """Return whether members give the same tokens twice; see `estune.engines.hf.trials`."""
        return trials.answers_repeat(self, perturbations, prompts, sampling, MOST_ROWS)

    def forget(self) -> None:
        """Let the workers write theta again, because it has changed."""
        self._call("estune_moved")

    def load_theta(self) -> None:
        """Write theta into vLLM's weights."""
        self._call("estune_hold", None)

    def stop(self) -> None:
        """End vLLM and free theta's memory."""
        if self._llm is not None:
            launch.end(self._llm)
            self._llm = None
        self._shared.close()

    def _answer(
        self,
        n_members: int,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        are_members: bool,
    ) -> list[list[list[Completion]]]:
        """Return completions (M, B, G), `prompts_per_batch` prompts at a time."""
        answers: list[list[list[Completion]]] = [[] for _ in range(n_members)]
        for start in range(0, len(prompts), self.prompts_per_batch):
            batch = prompts[start : start + self.prompts_per_batch]
            answered = self._answer_batch(n_members, batch, sampling, should_stop, are_members=are_members)
            for member, completions in zip(answers, answered, strict=True):
                member.extend(completions)
        return answers

    def _answer_batch(
        self,
        n_members: int,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool],
        *,
        are_members: bool,
    ) -> list[list[list[Completion]]]:
        """Return completions (M, B, G); all requests enter vLLM before its first step."""
        if self._stop.strings != sampling.stop_strings:
            self._stop = StopStrings(self.assets.tokenizer, sampling.stop_strings)
        copies = 1 if sampling.temperature == 0.0 else sampling.num_generations  # greedy completions are equal
        rows = [(m, b, g) for m in range(n_members) for b in range(len(prompts)) for g in range(copies)]
        engine, names = self._llm.llm_engine, {}
        for index, (m, b, g) in enumerate(rows):
            names[self._next_name()] = index
            extra = {ROW: index, **({MEMBER: m} if are_members else {})}
            parameters = self._parameters(sampling, prompts[b], g, extra)
            engine.add_request(next(reversed(names)), {"prompt_token_ids": list(prompts[b].token_ids)}, parameters)
        tokens: list[list[int]] = [[] for _ in rows]
        finished = [False] * len(rows)
        try:
            while engine.has_unfinished_requests():
                if should_stop():
                    raise Interrupted
                self._step(engine, names, tokens, finished)
        except BaseException:
            engine.abort_request(list(names))
            raise
        unsound = {row for rank in self._call("estune_unsound") for row in rank}
        made = [Completion(tuple(tokens[i]), finished[i], i not in unsound) for i in range(len(rows))]
        grid = np.arange(len(rows)).reshape(n_members, len(prompts), copies)
        repeats = sampling.num_generations // copies
        return [[[made[i] for i in cell] * repeats for cell in member] for member in grid.tolist()]

    def _step(self, engine: Any, names: dict[str, int], tokens: list[list[int]], finished: list[bool]) -> None:
        """Let vLLM compute one token of every running request; end requests whose text holds a stop string."""
        stopped = []
        for output in engine.step():
            row = names[output.request_id]
            part = output.outputs[0]
            for token in part.token_ids:
                if finished[row]:
                    break
                tokens[row].append(int(token))
                if self._stop.hit(tokens[row]):
                    finished[row] = True
                    if not output.finished:
                        stopped.append(output.request_id)
            if part.finish_reason == "stop":
                finished[row] = True
        if stopped:
            engine.abort_request(stopped)

    def _parameters(self, sampling: Sampling, prompt: Prompt, completion: int, extra: dict[str, int]) -> Any:
        """Return vLLM's sampling parameters; the seed is derived from the run's seed, step, row and completion."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        greedy = sampling.temperature == 0.0
        seed = derive_seed(sampling.seed, sampling.step, prompt.row_id, completion, person=sampling.person)
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0 if greedy else sampling.top_k,
            seed=None if greedy else seed >> 1,  # vLLM takes a signed 64-bit integer
            max_tokens=sampling.max_completion_length,
            stop_token_ids=sorted(self.assets.end_tokens),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra,
        )

    def _next_name(self) -> str:
        self._requests += 1
        return str(self._requests)

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `extension.WorkerExtension` in all workers; return their results."""
        return list(self._llm.collective_rpc(method, args=arguments))
