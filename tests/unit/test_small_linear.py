"""Linear layers of few rows: equal to torch's to rounding, for any shape, layout and number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 (its usual name)

from estune.engines.hf import small_linear

SHAPES = [(128, 512), (131, 515), (1358, 513), (70, 2000)]  # (N, K): with and without remainders


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def operands(rows: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    n, k = shape
    return tuple(torch.randn(size, generator=draw) for size in ((rows, k), (n, k), (n,)))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_equal_to_torch_to_rounding_and_to_itself_to_the_bit(shape: tuple[int, int], threads: int) -> None:
    before = torch.get_num_threads()
    try:
        for rows in (*range(1, 10), 31, 64, 65):
            x, weight, bias = operands(rows, shape)
            torch.set_num_threads(threads)
            found = small_linear.linear(x, weight, bias)
            again = small_linear.linear(x, weight, bias)
            torch.set_num_threads(1)
            alone = small_linear.linear(x, weight, bias)
            exact = F.linear(x.double(), weight.double(), bias.double())
            assert (found - exact).abs().max() < 1e-3
            assert torch.equal(found, again)
            if rows <= small_linear.MAX_ROWS:
                assert torch.equal(found, alone)  # the order of a sum does not depend on threads
    finally:
        torch.set_num_threads(before)


def test_the_kernel_is_used_where_it_can_be_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    address, alone = small_linear.kernel_address()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(small_linear, "kernel_address", lambda: (address, lambda job: (calls.append(job), alone(job))))
    x, weight, bias = operands(3, (200, 600))
    for rows in (x, x[:, None], x[None].expand(2, 3, 600), x.repeat(1, 2)[:, 100:700]):
        assert torch.allclose(small_linear.linear(rows, weight, bias), F.linear(rows, weight, bias), atol=1e-4)
    assert len(calls) == 4
    with torch.inference_mode(False), torch.enable_grad():
        layer = torch.nn.Linear(600, 200)
        assert small_linear.linear(torch.ones(2, 600), layer.weight, layer.bias).requires_grad
    for other in (
        (x.double(), weight.double(), bias.double()),
        (x, weight.repeat(1, 2)[:, :600], bias),
        (x[:, :100].contiguous(), weight[:, :100].contiguous(), bias),
        (x[:0], weight, bias),
        (x.repeat(30, 1), weight, bias),
        (x.bfloat16(), weight.bfloat16(), None),
    ):
        assert torch.equal(small_linear.linear(*other), F.linear(*other))
    assert len(calls) == 4
    with pytest.raises(RuntimeError, match="shapes"):
        small_linear.linear(x[:, :599], weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("groups", "width", "rank"), [(1, 1, 1), (3, 1, 1), (5, 2, 3), (2, 17, 2), (30, 2, 1), (64, 1, 4)]
)
def test_members_meet_their_own_factors(shape: tuple[int, int], groups: int, width: int, rank: int) -> None:
    """Equal to weights that were really replaced, in float64; and no bit depends on threads."""
    (x, weight, bias), (n, k) = operands(groups * width, shape), shape
    draw = torch.Generator().manual_seed(7)
    left, right = torch.randn(groups, rank, n, generator=draw), torch.randn(groups, rank, k, generator=draw)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert small_linear.takes(x, weight)
            found.append(small_linear.linear_of_members(x, weight, left, right, bias))
    finally:
        torch.set_num_threads(before)
    replaced = weight.double() + left.double().transpose(1, 2) @ right.double()  # (V, N, K)
    exact = torch.bmm(x.view(groups, width, k).double(), replaced.transpose(1, 2)) + bias.double()  # (V, K, N)
    assert (found[0].view(groups, width, n) - exact).abs().max() < 2e-6 * exact.abs().max() * k**0.5
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    apart = small_linear.linear_of_members(x[:, None], weight, left, right)  # (R, 1, K), as a model has it
    assert torch.equal(apart[:, 0] + bias, found[0])


def test_what_is_no_number_comes_through() -> None:
    """Trials at load spoil weights with NaN and look where it turns up."""
    x, weight, _ = operands(6, (200, 600))
    left, right = torch.zeros(3, 1, 200), torch.zeros(3, 1, 600)
    right[1, 0, 599] = torch.nan
    assert (
        small_linear.linear_of_members(x, weight, left, right).isnan().all(1).tolist()
        == [False] * 2 + [True] * 2 + [False] * 2
    )
    weight[17, 3] = torch.nan
    for rows in range(1, 7):
        assert small_linear.linear(x[:rows], weight).isnan().all(0).nonzero().tolist() == [[17]]
    x[2] = torch.inf
    assert not small_linear.linear(x[:4], weight)[2].isfinite().any()


def test_several_python_threads_may_call_it_at_once() -> None:
    x, weight, bias = operands(4, (1358, 513))
    expected = small_linear.linear(x, weight, bias)
    found: list[bool] = []

    def work() -> None:
        with torch.inference_mode():
            found.extend(torch.equal(small_linear.linear(x, weight, bias), expected) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


def test_plain_linear_layers_alone_change_within_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(torch.nn.Linear):
        pass

    hooked = torch.nn.Linear(3, 3)
    hooked.forward = lambda x: 2 * x  # type: ignore[method-assign]  # as accelerate's hooks do
    model = torch.nn.Sequential(torch.nn.Linear(600, 200), Other(200, 100), torch.nn.Linear(100, 3, bias=False), hooked)
    before = [dict(vars(layer)) for layer in model]
    x = torch.randn(2, 600)
    expected = model(x)
    calls: list[int] = []
    monkeypatch.setattr(small_linear, "linear", lambda x, *rest: calls.append(len(x)) or F.linear(x, *rest))
    with small_linear.installed(small_linear.plain_layers(model)):
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert torch.equal(model(x), expected)
    assert calls == [2, 2]
    assert [vars(layer) for layer in model] == before
