"""Members in one batch of vLLM: every token's row uses its own member's low-rank factors.

A request names its member in ``SamplingParams.extra_args``. `MemberBatch` reads from the model runner which rows belong
to which request. Layers keep their weights and products; a method object in front of a layer adds
``(x B) (s A)^T`` of each row's member (arXiv 2511.16652), and biases and norms use each row's own values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from estune.engines.hf.parameters import Binding, Piece
from estune.engines.lowrank.members import factors_of
from estune.engines.vllm.shared_memory import MEMBER, ROW
from estune.es.theta import HostTheta
from estune.es.types import Perturbation

LAYER_NORMS = (nn.LayerNorm, LayerNorm)


class MemberBatch:
    """The members that share vLLM's batches, and the member of every row of the batch in progress.

    ``rows``: of every row of the current forward pass the index of its member; `count` stands for theta.
    """

    def __init__(self, runner: Any, bound: Sequence[Binding], theta: HostTheta) -> None:
        """Find the layers of low-rank members; ``uncovered`` names the parameters without a rule."""
        self.theta = theta
        self.uncovered: list[str] = []
        self.count = 0  # members, M
        self.idle = True  # no row of the batch belongs to a member
        self.rows = torch.empty(0, dtype=torch.int64)
        self._requests: list[int] = []  # rows of the requests in the forward pass in progress
        self._names: list[str] = []  # vLLM's names of these requests
        self._unsound: set[int] = set()
        self._spoilt: dict[str, Any] = {}  # request with NaN in the key-value cache -> lists of its blocks
        self._runner = runner
        self._layers: list[_Layer | _Norm] = []
        if any(spec.lowrank for spec in theta.specs):
            self._find_layers(runner.get_model(), bound)
        self._watch()

    def set_members(self, perturbations: Sequence[Perturbation]) -> None:
        """Compute the factors of M members, for the requests that follow; an empty list frees the memory."""
        self.count = len(perturbations)
        for layer in self._layers:
            layer.set_members(perturbations)

    def take_unsound(self) -> list[int]:
        """Return the rows whose logits held NaN or infinity since the last call.

        Then the key-value cache becomes 0: attention reads unused places of a block with weight 0, and 0 * NaN is NaN.
        """
        unsound, self._unsound = sorted(self._unsound), set()
        self._spoilt = {}
        if unsound:
            for cache in self._runner.kv_caches:
                cache.zero_()
        return unsound

    def _clear_blocks(self, running: Collection[str]) -> None:
        """Write 0 into the cache blocks of unsound requests that no longer run, before other requests get them."""
        if not self._spoilt:
            return
        for name in self._spoilt.keys() - set(running):
            blocks = sorted({block for group in self._spoilt.pop(name) for block in group})
            index = torch.tensor(blocks, dtype=torch.int64)
            for cache in self._runner.kv_caches:
                dim = list(cache.shape).index(self._runner.kv_cache_config.num_blocks)
                cache.index_fill_(dim, index.to(cache.device), 0)

    def _find_layers(self, model: nn.Module, bound: Sequence[Binding]) -> None:
        by_parameter: dict[int, list[tuple[Binding, Piece]]] = {}
        trained = {spec.name for spec in self.theta.specs if spec.perturbed}
        for binding in bound:
            if binding.name in trained:
                for piece in binding.pieces:
                    by_parameter.setdefault(id(piece.parameter), []).append((binding, piece))
        found: set[int] = set()
        for name, module in model.named_modules():
            own = {a: by_parameter[id(p)] for a, p in module._parameters.items() if id(p) in by_parameter}
            if not own:
                continue
            rule = _rule(module)
            if rule is None or any(attribute not in ("weight", "bias") for attribute in own):
                self.uncovered.append(f"{name} ({type(module).__name__})")
                continue
            found |= {id(module._parameters[attribute]) for attribute in own}
            self._layers.append(rule(self, module, own))
        missing = [pieces[0][0].name for key, pieces in by_parameter.items() if key not in found]
        self.uncovered.extend(missing[:1] if not self.uncovered else [])

    def _watch(self) -> None:
        """Read the member of every row before each forward pass, and look at the logits after it."""
        runner = self._runner
        forward, model = runner._model_forward, runner.get_model()
        compute_logits = model.compute_logits

        def model_forward(*args: Any, **kwargs: Any) -> Any:
            self._names = requests = list(runner.input_batch.req_ids)
            self._clear_blocks(requests)
            extra = [runner.requests[r].sampling_params.extra_args or {} for r in requests]
            members = [each.get(MEMBER, self.count) for each in extra]
            self._requests = [each.get(ROW, -1) for each in extra]
            self.idle = all(member == self.count for member in members)
            of_request = torch.tensor(members, dtype=torch.int64)
            if not self.idle:
                starts = runner.query_start_loc.np[: len(members) + 1]
                self.rows = torch.repeat_interleave(of_request, torch.from_numpy(np.diff(starts)).long())
            result = forward(*args, **kwargs)
            self.rows = of_request  # the logits that follow have one row per request
            return result

        def logits_of(*args: Any, **kwargs: Any) -> Any:
            logits = compute_logits(*args, **kwargs)
            if logits is not None and len(logits) == len(self._requests):
                sound = logits.amax(-1).isfinite()
                if not bool(sound.all()):
                    broken = [index for index, ok in enumerate(sound.tolist()) if not ok]
                    self._unsound |= {self._requests[index] for index in broken}
                    self._spoilt |= {(name := self._names[i]): runner.requests[name].block_ids for i in broken}
            return logits

        runner._model_forward = model_forward
        model.compute_logits = logits_of


def _rule(module: nn.Module) -> Callable[..., _Layer | _Norm] | None:
    if isinstance(module, nn.Embedding):
        return _Table
    if isinstance(module, (LinearBase, VocabParallelEmbedding)):
        return _Layer
    if isinstance(module, (RMSNorm, GemmaRMSNorm, *LAYER_NORMS)):
        return _Norm
    return None


class _Part:
    """The factors of one stored matrix in a layer: outputs ``start`` to ``start + size`` of the layer.

    vLLM stores a weight as (outputs, inputs). The stored matrix (d0, d1) may be its transpose, as in GPT-2.
    """

    def __init__(self, binding: Binding, piece: Piece) -> None:
        self.binding, self.piece = binding, piece
        weight = piece.parameter
        self.start, self.column = divmod(
            int(piece.view.storage_offset()) - int(weight.data.storage_offset()), weight.shape[-1]
        )
        self.output_dim = 1 if piece.view.stride()[-1] != 1 else 0  # dimension of the stored matrix
        self.size = piece.length if piece.dim == self.output_dim else binding.shape[self.output_dim]
        self.outer = self.inner = torch.empty(0)

    def set_members(self, perturbations: Sequence[Perturbation]) -> None:
        """Compute the factors along outputs and inputs, each (M + 1, r, d); theta's, the last, are 0."""
        like, piece = self.piece.parameter, self.piece
        factors = list(factors_of(self.binding.name, self.binding.shape, perturbations, like.device, like.dtype))
        factors[piece.dim] = factors[piece.dim].narrow(2, piece.start, piece.length)
        padded = [torch.cat([each, torch.zeros_like(each[:1])]) for each in factors]
        self.outer, self.inner = padded[self.output_dim], padded[1 - self.output_dim]


class _Layer:
    """Stands in the place of a layer's ``quant_method``: its product, and the noise of every row's member."""

    def __init__(self, batch: MemberBatch, module: Any, own: dict[str, list[tuple[Binding, Piece]]]) -> None:
        self.batch, self.base = batch, module.quant_method
        self.parts = [_Part(binding, piece) for binding, piece in own.get("weight", [])]
        self.bias = _Values(own["bias"], module.bias, batch.theta) if "bias" in own else None
        self.biased = module
        module.quant_method = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def set_members(self, perturbations: Sequence[Perturbation]) -> None:
        """Compute the factors and the biases of M members."""
        for part in self.parts:
            part.set_members(perturbations)
        if self.bias is not None:
            self.bias.set_members(perturbations)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's product of ``x`` (T, d1), every row with its own member's weight and bias."""
        if self.batch.idle:
            return self.base.apply(layer, x, bias)  # type: ignore[no-any-return]
        own_bias = bias is not None and self.bias is not None
        y: torch.Tensor = self.base.apply(layer, x, None if own_bias else bias)
        rows = self.batch.rows
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for part in self.parts:
            inner = torch.einsum("td,trd->tr", flat, part.inner[rows])
            out[:, part.start : part.start + part.size] += torch.einsum("tr,trd->td", inner, part.outer[rows])
        if own_bias and self.bias is not None:
            out += self.bias.values[rows]
        return y

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows ``ids`` (T,) of the embedding, each of its own member's matrix."""
        y: torch.Tensor = self.base.embedding(layer, ids)
        return y if self.batch.idle else self.add_rows(y, ids)

    def add_rows(self, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return ``y`` (T, d), the rows ``ids`` (T,) of the weight, plus the rows of each member's noise."""
        rows = self.batch.rows
        for part in self.parts:
            inside = (ids >= part.start) & (ids < part.start + part.size)
            index = (ids - part.start).clamp(0, part.size - 1)
            inner = part.outer[rows, :, index] * inside[:, None]  # (T, r)
            y = y + torch.einsum("tr,trd->td", inner, part.inner[rows])
        return y


class _Table(_Layer):
    """Stands in the place of the ``forward`` of torch's own embedding, which has no ``quant_method``."""

    def __init__(self, batch: MemberBatch, module: Any, own: dict[str, list[tuple[Binding, Piece]]]) -> None:
        self.batch, self.base, self.bias = batch, self, None
        self.parts = [_Part(binding, piece) for binding, piece in own["weight"]]
        self.plain = module.forward
        module.forward = self.forward

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows ``ids`` (T,), each of its own member's matrix."""
        y: torch.Tensor = self.plain(ids)
        return y if self.batch.idle else self.add_rows(y, ids)


class _Values:
    """A vector's values: (M + 1, d), theta's last."""

    def __init__(self, own: Sequence[tuple[Binding, Piece]], parameter: torch.Tensor, theta: HostTheta) -> None:
        self.own, self.parameter, self.theta = own, parameter, theta
        self.values = torch.empty(0)

    def set_members(self, perturbations: Sequence[Perturbation]) -> None:
        """Compute the values of M members."""
        values = self.parameter.detach().expand(len(perturbations) + 1, *self.parameter.shape).clone()
        origin = self.parameter.data.storage_offset()
        for binding, piece in self.own:
            for index, perturbation in enumerate(perturbations):
                stored = torch.from_numpy(self.theta.perturb(binding.name, perturbation))
                part = stored.narrow(piece.dim, piece.start, piece.length)
                offset = piece.view.storage_offset() - origin
                target = values[index].as_strided(
                    piece.view.shape, piece.view.stride(), values[index].storage_offset() + offset
                )
                target.copy_(part.reshape(piece.view.shape))
        self.values = values


class _Norm:
    """Stands in the place of a norm's ``forward``: it normalises, then applies every row's own scale and shift."""

    def __init__(self, batch: MemberBatch, module: Any, own: dict[str, list[tuple[Binding, Piece]]]) -> None:
        self.batch, self.module = batch, module
        self.values = {name: _Values(pieces, module._parameters[name], batch.theta) for name, pieces in own.items()}
        self.plain = module.forward
        module.forward = self.forward

    def set_members(self, perturbations: Sequence[Perturbation]) -> None:
        """Compute the values of M members."""
        for each in self.values.values():
            each.set_members(perturbations)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Normalise ``x`` (T, ..., d)."""
        if self.batch.idle:
            return self.plain(x) if residual is None else self.plain(x, residual)
        module = self.module
        if residual is not None:
            x = x + residual
            residual = x
        if isinstance(module, LAYER_NORMS):
            y = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        else:
            wide = x.float()
            y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        scale = self._rows("weight", x)
        if isinstance(module, GemmaRMSNorm):
            y = y * (1.0 + scale.float())
        elif scale is not None:
            y = y.to(x.dtype) * scale
        if "bias" in self.values or getattr(module, "bias", None) is not None:
            y = y + self._rows("bias", x)
        y = y.to(x.dtype)
        return y if residual is None else (y, residual)

    def _rows(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return every row's own values in a shape that broadcasts against ``x`` (T, ..., d)."""
        if name not in self.values:
            return self.module._parameters[name]  # type: ignore[no-any-return]
        values = self.values[name].values[self.batch.rows]  # (T, d)
        repeats = x.numel() // x.shape[-1] // len(values)  # heads, if they are a dimension of x
        return values.repeat_interleave(repeats, 0).view(x.shape)
