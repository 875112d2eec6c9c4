"""Stand-ins answer as the perturbed parameters would, kind by kind, and refuse what they have no rule for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from estune.engines.lowrank.stand_ins import Layout, MatrixStandIn, StandIn, Uncovered, VectorStandIn

V, K, T, D = 3, 2, 4, 5  # groups, rows in each, tokens, width


def stand_in_of(parameter: torch.Tensor, layout: Layout, rank: int = 2) -> StandIn:
    """Give a matrix random factors, and a vector random values, in each group."""
    base = parameter.detach()
    if base.dim() == 2:
        left, right = (torch.randn(V, rank, size) * 0.3 for size in base.shape)
        return MatrixStandIn("w", base, layout, left, right)
    return VectorStandIn("v", base, layout, base + torch.randn(V, *base.shape) * 0.3)


def perturbed(stand_in: StandIn, group: int) -> torch.Tensor:
    """Return the weights that a stand-in stands for."""
    if isinstance(stand_in, MatrixStandIn):
        return stand_in.base + stand_in.left[group].T @ stand_in.right[group]
    assert isinstance(stand_in, VectorStandIn)
    return stand_in.values[group]


def rms_norm_module() -> nn.Module:
    return nn.RMSNorm(D, eps=1e-6)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, 7),
    "linear without bias": lambda: nn.Linear(D, 7, bias=False),
    "Conv1D": lambda: Conv1D(7, D),
    "LayerNorm": lambda: nn.LayerNorm(D),
    "LayerNorm without bias": lambda: nn.LayerNorm(D, bias=False),
    "RMSNorm of torch": rms_norm_module,
    "RMSNorm of Llama": lambda: LlamaRMSNorm(D),
    "RMSNorm of Gemma": lambda: GemmaRMSNorm(D),
}


def answer(module: nn.Module, stand_ins: dict[str, StandIn], x: torch.Tensor) -> torch.Tensor:
    for name, stand_in in stand_ins.items():
        module.__dict__[name] = stand_in
    try:
        return module(x)  # type: ignore[no-any-return]
    finally:
        for name in stand_ins:
            del module.__dict__[name]


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("shape", [(V * K, T, D), (V * K, 1, D), (V * K * T, D), (V * K, D), (V * K, T, 3, D)])
def test_every_row_meets_its_own_member(kind: str, shape: tuple[int, ...], rank: int) -> None:
    torch.manual_seed(1)
    module = MODULES[kind]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        layout = Layout(V, K)
        stand_ins = {name: stand_in_of(p, layout, rank) for name, p in module.named_parameters()}
        x = torch.randn(shape)
        found = answer(module, stand_ins, x)
        own = {name: p.detach().clone() for name, p in module.named_parameters()}
        rows_each = shape[0] // V
        for group in range(V):
            for name, parameter in module.named_parameters():
                parameter.copy_(perturbed(stand_ins[name], group))
            rows = slice(group * rows_each, (group + 1) * rows_each)
            assert torch.allclose(found[rows], module(x[rows]), atol=1e-5)
            for name, parameter in module.named_parameters():
                parameter.copy_(own[name])
        assert not torch.allclose(found, module(x), atol=1e-2)
    assert all(stand_in.used for stand_in in stand_ins.values())


def test_vectors_broadcast_behind_a_transposition_too() -> None:
    layout = Layout(V, K)
    vector = stand_in_of(torch.randn(D), layout)
    x = torch.randn(V * K, 3, T, D).transpose(1, 2)  # queries: (R, T, heads, d)
    for group in range(V):
        rows = slice(group * K, (group + 1) * K)
        assert torch.equal((vector * x)[rows], perturbed(vector, group) * x[rows])  # type: ignore[operator]
        assert torch.equal((x - vector)[rows], x[rows] - perturbed(vector, group))  # type: ignore[operator]
        assert torch.equal((1.0 + vector).values[group], 1.0 + perturbed(vector, group))  # type: ignore[operator]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shared_ids", [False, True])
def test_an_embedding_and_the_head_tied_to_it(shared_ids: bool, rank: int) -> None:
    torch.manual_seed(2)
    layout = Layout(V, K)
    table = stand_in_of(torch.randn(11, D), layout, rank)
    ids = torch.randint(0, 11, (1 if shared_ids else V * K, T))
    found = F.embedding(ids, table)  # type: ignore[arg-type]
    logits = F.linear(found, table)  # type: ignore[arg-type]
    all_ids = ids.expand(V * K, -1)
    for row in range(V * K):
        weights = perturbed(table, row // K)
        assert torch.allclose(found[row], weights[all_ids[row]], atol=1e-5)
        assert torch.allclose(logits[row], found[row] @ weights.T, atol=1e-4)


def test_a_bias_alone_may_be_perturbed_and_a_matrix_alone_too() -> None:
    layout = Layout(V, K)
    x, weight, bias = torch.randn(V * K, T, D), torch.randn(7, D), torch.randn(7)
    vector, matrix = stand_in_of(bias, layout), stand_in_of(weight, layout)
    of_bias = F.linear(x, weight, vector)  # type: ignore[arg-type]
    of_conv = torch.addmm(vector, x.view(-1, D), weight.T)  # type: ignore[call-overload]
    of_matrix = F.linear(x, matrix, bias)  # type: ignore[arg-type]
    product = x @ matrix.T
    for row in range(V * K):
        b, w = perturbed(vector, row // K), perturbed(matrix, row // K)
        assert torch.allclose(of_bias[row], F.linear(x[row], weight, b), atol=1e-5)
        assert torch.allclose(of_conv.view(V * K, T, 7)[row], F.linear(x[row], weight, b), atol=1e-5)
        assert torch.allclose(of_matrix[row], F.linear(x[row], w, bias), atol=1e-4)
        assert torch.allclose(product[row], x[row] @ w.T, atol=1e-4)


def test_casts_are_carried_out_on_noise_and_weights_alike() -> None:
    layout = Layout(V, K)
    vector = stand_in_of(torch.randn(D), layout)
    matrix = stand_in_of(torch.randn(7, D), layout)
    assert vector.to(torch.bfloat16).values.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert matrix.to("cpu", dtype=torch.float64).left.dtype == torch.float64  # type: ignore[attr-defined]
    assert vector.float() is vector and matrix.type_as(torch.zeros(1)) is matrix
    assert matrix.shape == (7, D) and vector.dtype == torch.float32 and matrix.device.type == "cpu"


@pytest.mark.parametrize(
    "use",
    [
        lambda matrix, vector: torch.exp(matrix),
        lambda matrix, vector: matrix * 2.0,
        lambda matrix, vector: torch.randn(V * K, T, 1) * matrix,
        lambda matrix, vector: matrix[0],
        lambda matrix, vector: matrix.view(-1),
        lambda matrix, vector: F.conv1d(torch.randn(V * K, D, T), matrix),
        lambda matrix, vector: F.linear(torch.randn(V * K + 1, D), matrix),  # not whole rows
        lambda matrix, vector: F.linear(torch.randn(D), matrix),
        lambda matrix, vector: F.linear(torch.randn(V * K, D), torch.randn(7, D), matrix),
        lambda matrix, vector: F.linear(torch.randn(V * K, 2), vector),
        lambda matrix, vector: F.embedding(torch.zeros(V * K + 1, 2, dtype=torch.int64), matrix),
        lambda matrix, vector: F.embedding(torch.zeros(V * K, dtype=torch.int64), matrix),
        lambda matrix, vector: torch.softmax(vector, -1),
        lambda matrix, vector: vector + torch.randn(D),
        lambda matrix, vector: vector * torch.randn(V * K + 1, D),
        lambda matrix, vector: vector * matrix,
        lambda matrix, vector: hasattr(vector, "weight_loader"),
        lambda matrix, vector: torch.addmm(torch.randn(7), torch.randn(V * K, D), matrix.T, beta=0.5),
    ],
)
def test_what_has_no_rule_is_refused_by_name(use: Callable[[Any, Any], Any]) -> None:
    layout = Layout(V, K)
    with pytest.raises(Uncovered) as refusal:
        use(stand_in_of(torch.randn(7, D), layout), stand_in_of(torch.randn(D), layout))
    assert refusal.value.name in ("w", "v")
