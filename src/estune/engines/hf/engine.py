"""The Hugging Face engine: any causal language model of transformers, on CPU, CUDA or MPS, in plain torch.

The engine holds theta in float32 and one working model in the compute dtype (`working_model`). Members are written into
the working model one after another. Low-rank members share its forward passes instead (`estune.engines.lowrank`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from estune import console, environment
from estune.console import warn
from estune.engines.base import EngineFacts, EngineOptions
from estune.engines.hf import allocator, callers, decoding, identity, small_linear, trials
from estune.engines.hf.assets import HFAssets
from estune.engines.hf.loading import files_of, load_model, load_tokenizer, make_theta, resolve_device
from estune.engines.hf.parameters import Binding, bindings
from estune.engines.hf.saved_model import (
    TIED_OTHERWISE,
    check_agreement,
    contradicts,
    is_cast_in_part,
    reason_of,
    saved_config,
    tied_truth,
)
from estune.engines.hf.working_model import WorkingModel, evaluation_mode, torch_threads
from estune.engines.local import LocalBase
from estune.engines.lowrank.kinds import lowrank_names
from estune.engines.lowrank.members import MEMORY_SHARE, MOST_ROWS, Members, MembersCaller, SharedForward, bytes_per_row
from estune.engines.lowrank.stand_ins import Uncovered
from estune.engines.lowrank.trial import shared_forward
from estune.errors import UserError
from estune.es.theta import HostTheta
from estune.es.types import Completion, Perturbation, Prompt, Sampling
from estune.models.names import local_directory


class HFEngine(LocalBase):
    """Answers prompts with theta or a member of it; see `estune.engines.base.LocalEngine`."""

    name = "hf"
    assets: HFAssets

    def __init__(
        self,
        model: callers.Model,
        tokenizer: Any,
        bound: Sequence[Binding],
        theta: HostTheta,
        *,
        prompts_per_batch: int,
        digests: dict[str, str] | None = None,
        is_mixed: bool = False,
    ) -> None:
        """Combine a model, its tokenizer, its bindings and its theta; callers use `load` or `from_model`.

        ``digests`` and ``is_mixed`` are arguments of `HFAssets`.
        """
        self.model = model
        self.prompts_per_batch = prompts_per_batch
        self.device = model.device
        self.compute_dtype = _name(model.dtype)
        self._stored_dtypes = {binding.name: _name(binding.dtype) for binding in bound}
        self.working = WorkingModel(model, bound, theta)
        self.theta = self.working.theta
        text_config = model.config.get_text_config(decoder=True)
        limits = [
            getattr(text_config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")
        ]
        self.max_context: int | None = next((n for n in limits if isinstance(n, int) and n > 0), None)
        self.assets = HFAssets(model, tokenizer, self.compute_dtype, digests=digests, is_mixed=is_mixed)
        self._stop = decoding.StopStrings(tokenizer, ())
        self._attention = trials.uses_attention_caller(model)
        self._shared: SharedForward | None = None
        self._is_lowrank = any(spec.lowrank for spec in theta.specs)
        with self.working.in_use():
            self._wide_mask = self._attention and trials.takes_wide_mask(model)
            self._batching = "padded" if self._attention else trials.safe_batching(model, self._caller)
            if self._is_lowrank or self.working.is_theta:  # members of vectors alone share a forward pass, too
                self._share_forward()
        if self.device.type == "cpu" and console.owns_process():  # after loading, whose memory should be released
            allocator.keep_freed_memory()

    @classmethod
    def open(cls, options: EngineOptions) -> HFEngine:
        """Return an engine of a named model, or of a module in memory.

        Raises:
            UserError: the model cannot be used, or an option would have no effect.
        """
        common: dict[str, Any] = dict(
            num_threads=options.num_threads,
            prompts_per_batch=options.prompts_per_batch,
            trainable_parameters=options.trainable_parameters,
            noise=options.noise,
        )
        module = options.module
        if module is not None:
            dtype, device = _name(module.dtype), module.device.type
            if options.dtype not in ("auto", dtype) or options.device not in ("auto", device):
                raise UserError(
                    f"a model given as a module keeps its dtype and device ({dtype} on {device}): leave both at auto"
                )
            if options.tokenizer is None:
                raise UserError("a model given as a module needs its tokenizer as processing_class")
            return cls.from_model(module, options.tokenizer, **common)
        if options.revision is not None and local_directory(options.model) is not None:
            raise UserError(f"revision names a version on the hub, and model {options.model} is a directory")
        return cls.load(
            options.model,
            tokenizer=options.tokenizer,
            dtype=options.dtype,
            device=options.device,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            **common,
        )

    @classmethod
    def load(
        cls,
        model: str,
        *,
        tokenizer: Any = None,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        num_threads: int = 1,
        prompts_per_batch: int = 8,
        trainable_parameters: Sequence[str] | None = None,
        noise: str = "full",
    ) -> HFEngine:
        """Load a directory, a hub id or the embedded model ``tiny``.

        Args:
            model: directory, hub id or ``tiny``.
            tokenizer: replaces the model's own tokenizer.
            dtype: compute dtype; ``auto`` is bfloat16 for a 16-bit checkpoint on CUDA, and float32 otherwise.
            device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
            revision: the hub revision.
            trust_remote_code: run code that comes with the model.
            num_threads: threads that torch and the noise kernels use.
            prompts_per_batch: prompts in one forward pass, each with all its completions.
            trainable_parameters: regexes searched in stored names; only matching parameters are perturbed.
            noise: noise of matrices, ``full`` or ``lowrank``.

        Raises:
            UserError: the model cannot be used; the message gives the reason.
        """
        place = resolve_device(device)
        uses_own_tokenizer = tokenizer is None
        if uses_own_tokenizer:
            tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
        with torch_threads(num_threads):
            working, bound, theta = load_model(
                model,
                dtype=dtype,
                device=place,
                revision=revision,
                trust_remote_code=trust_remote_code,
                num_threads=num_threads,
                trainable_parameters=trainable_parameters,
                noise=noise,
            )
        commit = getattr(working.config, "_commit_hash", None) or revision
        digests = identity.directory_identity(
            files_of(model, commit), tokenizer=uses_own_tokenizer, code=trust_remote_code
        )
        try:
            return cls(working, tokenizer, bound, theta, prompts_per_batch=prompts_per_batch, digests=digests)
        except UserError:
            raise
        except Exception as error:  # the model's own code runs here for the first time and may raise anything
            raise UserError(f"model {model!r} cannot be run: {reason_of(error)}") from error

    @classmethod
    def from_model(
        cls,
        model: callers.Model,
        tokenizer: Any,
        *,
        num_threads: int = 1,
        prompts_per_batch: int = 8,
        trainable_parameters: Sequence[str] | None = None,
        noise: str = "full",
    ) -> HFEngine:
        """Return an engine of a model in memory, with its dtype and device; its weights become theta.

        Every member overwrites the model's weights; `load_theta` writes theta. Nothing else of the model changes: the
        engine restores its layers, modes and configuration after every call.

        Raises:
            UserError: the model cannot be used. `HFAssets.check` finds out whether it can be saved.
        """
        name = type(model).__name__
        if contradicts(model.config, tied_truth(model)):
            warn(f"the module {name}: {TIED_OTHERWISE}")
        is_mixed = is_cast_in_part(model)
        if is_mixed:
            warn(
                f"the module {name} holds weights of several dtypes; its saved config.json says float32, which rounds "
                "none of them"
            )
        try:
            with torch_threads(num_threads), evaluation_mode(model, model.modules()):
                bound, buffers = bindings(model)
                theta = make_theta(
                    bound,
                    buffers,
                    trainable_parameters,
                    num_threads,
                    name,
                    lowrank=lowrank_names(model, bound) if noise == "lowrank" else (),
                    share=noise == "lowrank" and model.device.type == "cpu",
                )
            return cls(model, tokenizer, bound, theta, prompts_per_batch=prompts_per_batch, is_mixed=is_mixed)
        except UserError:
            raise
        except Exception:  # the module's own code; often the configuration describes another module
            check_agreement(model, saved_config(model, "float32"))
            raise

    @property
    def stored_dtypes(self) -> dict[str, str]:
        """The dtype of each stored tensor in the working model."""
        return self._stored_dtypes

    @property
    def facts(self) -> EngineFacts:
        """Properties of the engine that training reads."""
        header = {
            "engine": "hf",
            "device": self.device.type,
            "dtype": self.compute_dtype,
            "model_type": self.model.config.model_type,
            "architecture": type(self.model).__name__,
            "num_parameters": self.theta.num_parameters,
            "max_context": self.max_context,
            "prompts_per_batch": self.prompts_per_batch,
            "shared_forward": self._shared is not None,
        }
        return EngineFacts(
            name="hf",
            device=self.device.type,
            dtype=self.compute_dtype,
            max_context=self.max_context,
            vocab_size=self.assets.vocab_size,
            shared_forward=self._shared is not None,
            header=header,
        )

    def generate(
        self,
        perturbation: Perturbation | None,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Completion]]:
        """Return the completions (B, G) of one member, or of theta, for prompts (B); see `LocalEngine.generate`.

        Raises:
            Interrupted: ``should_stop()`` returned true between two tokens.
            UserError: a prompt is empty, or leaves no room for a completion in the model's context.
        """
        if perturbation is not None and self._shared is not None:
            return self.generate_population([perturbation], prompts, sampling, should_stop)[0]
        self.check_lengths(prompts, [sampling.max_completion_length] * len(prompts))
        with self.working.in_use():
            self._load(perturbation)
            return self._answer(None, prompts, sampling, should_stop)[0]

    def generate_population(
        self,
        perturbations: Sequence[Perturbation],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[list[Completion]]]:
        """Return the completions (M, B, G) of M members for prompts (B).

        Low-rank members share every forward pass if the model allows it; others run one after another.

        Raises:
            Interrupted: ``should_stop()`` returned true between two tokens.
            UserError: a prompt is empty or too long, or the members cannot share a forward pass with these prompts.
        """
        if self._shared is None:
            return [self.generate(perturbation, prompts, sampling, should_stop) for perturbation in perturbations]
        self.check_lengths(prompts, [sampling.max_completion_length] * len(prompts))
        try:
            with self.working.in_use():
                self._load(None)
                started = time.perf_counter()
                members = Members(self._shared, perturbations)
                self.perturb_s += time.perf_counter() - started
                with self._shared.installed(members.stand_ins):
                    return self._answer(members, prompts, sampling, should_stop)
        except Uncovered as error:  # fail rather than fall back to sequential members during a run
            raise UserError(
                f"low-rank members cannot share a forward pass with these prompts, because of {error}; use noise full"
            ) from error

    def _answer(
        self,
        members: Members | None,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        should_stop: Callable[[], bool],
    ) -> list[list[list[Completion]]]:
        """Return completions (M, B, G) of ``members``, or of the weights in the working model (M = 1)."""
        if self._stop.strings != sampling.stop_strings:
            self._stop = decoding.StopStrings(self.assets.tokenizer, sampling.stop_strings)
        copies = 1 if sampling.temperature == 0.0 else sampling.num_generations  # greedy completions are equal
        rows = [decoding.Row(p.token_ids, p.row_id, g) for p in prompts for g in range(copies)]
        n_members = 1 if members is None else members.count
        size = self.prompts_per_batch * copies
        answers: list[list[Completion | None]] = [[None] * len(rows) for _ in range(n_members)]
        for cut in decoding.cut(rows, size):
            for batch in self._batches(cut, rows):
                if members is not None:
                    members.regroup(range(n_members), len(batch))
                done = decoding.complete(
                    self._caller(members),
                    [rows[i] for _ in range(n_members) for i in batch],
                    sampling,
                    self.assets.end_tokens,
                    self.assets.pad,
                    self._stop,
                    should_stop,
                    self.device,
                )
                for place, completion in enumerate(done):
                    answers[place // len(batch)][batch[place % len(batch)]] = completion
        repeats = sampling.num_generations // copies
        return [
            [[c for c in member[i : i + copies] if c is not None] * repeats for i in range(0, len(rows), copies)]
            for member in answers
        ]

    def members_that_fit(self, members: int, rows: int, length: int, rank: int, sampled: bool = False) -> int:
        """Return how many of ``members`` should share a forward pass; see `Generator.members_that_fit`."""
        if self._shared is None:
            return 1
        free = environment.free_memory_bytes()
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        size = self._shared.bytes_per_member(rank) + rows * bytes_per_row(self.model, length, sampled)
        return max(1, min(members, int(free * MEMORY_SHARE / size), MOST_ROWS // rows))

    def load_theta(self) -> None:
        """Write theta into the working model."""
        self._load(None)

    def forget(self) -> None:
        """Mark the working model's weights as stale, because theta has changed; the next use rewrites them."""
        self.working.forget()

    @torch.inference_mode()
    def token_logprobs(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return theta's natural log-probability of every completion token, at temperature 1.

        Args:
            prompts: (B,).
            completions: token ids, one completion per prompt.

        Returns:
            One list per prompt, with one value per completion token: float32 log-softmax, as Python floats.

        Raises:
            UserError: a prompt is empty, or a prompt with its completion is longer than the model's context.
        """
        self.check_lengths(prompts, [len(completion) for completion in completions])
        result: list[list[float]] = []
        size = 1 if self._batching == "single" else self.prompts_per_batch
        with self.working.in_use():
            self._load(None)
            for start in range(0, len(prompts), size):
                end = start + size
                result += self._batch_logprobs([p.token_ids for p in prompts[start:end]], completions[start:end])
        return result

    def perturb_cosine(self, perturbation: Perturbation) -> dict[str, float]:
        """Return how much of a perturbation survives the cast, by kind of parameter; see `WorkingModel.perturb_cosine`.

        Matrices with low-rank noise are left out if members share a forward pass, because their weights are never cast.
        """
        return self.working.perturb_cosine(perturbation, self._shared.lowrank if self._shared else ())

    def check_reproducible(
        self, perturbations: Sequence[Perturbation], prompts: Sequence[Prompt], sampling: Sampling
    ) -> bool:
        """Return whether two answers to a batch are equal, the second under load; see `answers_repeat`."""
        return trials.answers_repeat(self, perturbations, prompts, sampling, small_linear.MAX_ROWS)

    def _share_forward(self) -> None:
        """Find out whether low-rank members can share a forward pass; if not, warn and copy theta out of the model."""
        reason = "the model's inputs (others than tokens, an attention mask and positions)"
        if self._attention:
            caller = partial(callers.AttentionCaller, self.model, self._wide_mask)  # rows share nothing
            self._shared, reason = shared_forward(
                self.model, self.working.bindings, self.theta, caller, self.max_context
            )
        if self._shared is None:
            warn(f"low-rank members run one after another on this model, because of {reason}")
            self.working.stand_apart()

    def _caller(self, members: Members | None = None) -> callers.Caller:
        """Return a new caller for one batch; a caller's cache is valid for one set of weights only."""
        if not self._attention:
            return callers.GenericCaller(self.model)
        if members is None:
            return callers.AttentionCaller(self.model, self._wide_mask, groups=1)
        caller = callers.AttentionCaller(
            self.model, self._wide_mask, members.count, lambda width: members.regroup(range(members.count), width)
        )
        return MembersCaller(caller, members)

    def _batches(self, indices: Sequence[int], rows: Sequence[decoding.Row]) -> list[list[int]]:
        """Return one batch of rows, or several if the model cannot take padding or batches; see `safe_batching`."""
        if self._batching == "padded":
            return [list(indices)]
        if self._batching == "single":
            return [[i] for i in indices]
        lengths = sorted({len(rows[i].token_ids) for i in indices})
        return [[i for i in indices if len(rows[i].token_ids) == length] for length in lengths]

    def _load(self, perturbation: Perturbation | None) -> None:
        """Write a member, or theta, into the working model, if the model does not hold it yet."""
        self.perturb_s += self.working.hold(perturbation)

    def _batch_logprobs(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        length = max(len(row) for row in rows)
        # Rows are padded on the right: a causal model does not read the padding after a row's tokens.
        ids = torch.tensor([row + [self.assets.pad] * (length - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self.device)
        skipped = min(len(prompt) for prompt in prompts) - 1 if self._attention else 0  # positions of prompts only
        keep = {"logits_to_keep": length - skipped} if self._attention else {}
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits  # (R, T - skipped, V)
        result = []
        for row, prompt, completion in zip(logits, prompts, completions, strict=True):
            first = len(prompt) - 1 - skipped
            scores = row[first : first + len(completion)].float().log_softmax(-1)  # (C, V)
            tokens = torch.tensor(list(completion), dtype=torch.int64, device=self.device)
            result.append(scores.gather(-1, tokens[:, None])[:, 0].double().tolist())
        return result


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
