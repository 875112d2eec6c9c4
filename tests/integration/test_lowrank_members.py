"""Low-rank members that share a forward pass answer as models whose weights were really replaced, family by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_hf_generate import GREEDY, SAMPLED, prompts
from tiers import few, full
from tiny_models import FAMILIES, save_tiny, tiny_model, tiny_tokenizer
from torch import nn

from estune.engines.hf import small_linear
from estune.engines.hf.callers import left_pad
from estune.engines.hf.engine import HFEngine
from estune.engines.hf.parameters import bindings
from estune.engines.lowrank.members import Members, plan_rows
from estune.es.noise import lowrank_ints, lowrank_scale, noise_ints, perturbation_scale
from estune.es.types import Completion, Member, Noise, Perturbation, Prompt

pytestmark = pytest.mark.miniature

SHARED = ["gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma3", "opt", "gpt_neox"]
SIGMA = 2e-2


def members(rank: int, count: int = 3) -> list[Perturbation]:
    scales = perturbation_scale(SIGMA), lowrank_scale(SIGMA, rank)
    return [
        Perturbation(Member(7 + i // 2, (1, -1)[i % 2]), Noise(scales[0], "normal", rank, scales[1]))
        for i in range(count)
    ]


def engine_of(family: str, edit: Callable[[Any], None] | None = None, **options: Any) -> HFEngine:
    model = tiny_model(family)
    if edit is not None:
        edit(model)
    return HFEngine.from_model(model, tiny_tokenizer(), noise="lowrank", **options)


def exact_weights(engine: HFEngine, perturbation: Perturbation) -> dict[str, np.ndarray]:
    """Return the member's weights by the definition in docs/reproducibility.md, in float64."""
    weights = {}
    sign = perturbation.member.sign
    for spec in engine.theta.specs:
        theta = engine.theta.arrays[spec.name].astype(np.float64)
        if spec.lowrank:
            n = lowrank_ints(perturbation.member.seed, spec.name, spec.shape, perturbation.noise.rank)
            weights[spec.name] = theta + perturbation.noise.lowrank_scale * sign * n
        elif spec.perturbed:
            n = noise_ints(perturbation.member.seed, spec.name, 0, theta.size).reshape(spec.shape)
            weights[spec.name] = theta + perturbation.noise.scale * sign * n
        else:
            weights[spec.name] = theta
    return weights


def replaced(
    engine: HFEngine, family: str, perturbation: Perturbation, edit: Callable[[Any], None] | None = None
) -> nn.Module:
    """Return a model of the family whose weights were replaced by the member's."""
    model = tiny_model(family)
    if edit is not None:
        edit(model)
    weights = exact_weights(engine, perturbation)
    with torch.no_grad():
        for binding in bindings(model)[0]:
            binding.write(torch.from_numpy(weights[binding.name]))
    return model


@pytest.fixture
def small_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the kernel for few rows take all linear layers, as in models of real size; return its calls' rows."""
    calls: list[int] = []
    if request.param:
        real = small_linear.linear_of_members
        for name, value in (("MIN_WIDTH", 1), ("MIN_WEIGHTS", 1), ("MAX_ROWS", 1 << 20)):
            monkeypatch.setattr(small_linear, name, value)
        monkeypatch.setattr(small_linear, "linear_of_members", lambda x, *rest: calls.append(len(x)) or real(x, *rest))
    return calls


@pytest.mark.parametrize("small_kernel", [False, True], indirect=True, ids=["torch", "small_linear"])
@pytest.mark.parametrize("rank", [full(1), 3])
@pytest.mark.parametrize("family", few(SHARED, ("gpt2", "llama", "gemma3")))
def test_logits_equal_those_of_replaced_weights(
    family: str, rank: int, small_kernel: list[int], request: pytest.FixtureRequest
) -> None:
    engine = engine_of(family)
    small_kernel.clear()
    before = engine.theta.fingerprint()
    assert engine.facts.header["shared_forward"]
    rows = prompts(4)
    perturbations = members(rank)
    some = Members(engine._shared, perturbations)  # type: ignore[arg-type]
    some.regroup(range(3), len(rows))
    ids, mask = left_pad([row.token_ids for row in rows], 0, engine.device)
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)
    with torch.inference_mode(), engine._shared.installed(some.stand_ins):  # type: ignore[union-attr]
        found = engine.model(
            input_ids=ids.repeat(3, 1), attention_mask=mask.repeat(3, 1), position_ids=positions.repeat(3, 1)
        ).logits  # (3 * 4, T, V)
    if "small_linear" in request.node.name and family != "gpt2":  # its layers are stored transposed
        assert small_kernel
    for index, perturbation in enumerate(perturbations):
        model = replaced(engine, family, perturbation)
        with torch.inference_mode():
            expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        seen = mask.bool()
        difference = (found[index * 4 : index * 4 + 4][seen] - expected[seen]).abs().max()
        assert difference < 2e-5 * max(1.0, expected[seen].abs().max())
    theta = tiny_model(family)
    with torch.inference_mode():
        unperturbed = theta(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert (found[:4][seen] - unperturbed[seen]).abs().max() > 1e-2
    assert engine.theta.fingerprint() == before


@pytest.mark.parametrize("small_kernel", [False, True], indirect=True, ids=["torch", "small_linear"])
def test_a_bias_may_move_alone(small_kernel: list[int]) -> None:
    engine = engine_of("qwen2", trainable_parameters=["bias"])
    assert engine.facts.header["shared_forward"]
    perturbations, rows = members(1), prompts(4)
    answers = engine.generate_population(perturbations, rows, GREEDY)
    for perturbation, answer in zip(perturbations, answers, strict=True):
        plain = HFEngine.from_model(replaced(engine, "qwen2", perturbation), tiny_tokenizer())
        assert plain.generate(None, rows, GREEDY) == answer


@pytest.mark.parametrize("family", few(FAMILIES, ("llama", "gemma3", "mamba")))
def test_answers_equal_those_of_replaced_weights(family: str) -> None:
    """Also where members cannot share a forward pass and are written into the model one after another."""
    engine = engine_of(family, prompts_per_batch=3)
    assert engine.facts.header["shared_forward"] == (family in SHARED)
    before = engine.theta.fingerprint()
    perturbations, rows = members(2), prompts(5)
    answers = engine.generate_population(perturbations, rows, GREEDY)
    assert len({str(answer) for answer in answers}) == 3
    for perturbation, answer in zip(perturbations, answers, strict=True):
        assert engine.generate(perturbation, rows, GREEDY) == answer
        plain = HFEngine.from_model(replaced(engine, family, perturbation), tiny_tokenizer(), prompts_per_batch=3)
        assert plain.generate(None, rows, GREEDY) == answer
    assert engine.theta.fingerprint() == before
    assert engine.generate(None, rows, GREEDY) == engine_of(family, prompts_per_batch=3).generate(None, rows, GREEDY)


@pytest.mark.parametrize("family", few(FAMILIES, ("llama", "mamba")))
def test_theta_answers_as_a_member_of_sign_0(family: str) -> None:
    engine, rows = engine_of(family), prompts(5)
    noise = members(1)[0].noise
    of_members = engine.generate_population(members(1), rows, GREEDY)
    [*others, theta] = engine.generate_population([*members(1), Perturbation(Member(0, 0), noise)], rows, GREEDY)
    assert theta == engine.generate(None, rows, GREEDY) and others == of_members


def ends_often(model: Any) -> None:
    model.generation_config.eos_token_id = list(range(0, 300, 5))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", few(["llama", "gemma3", "qwen3"], ("llama",)))
def test_rows_that_finish_leave_and_change_no_answer(family: str, sampling: Any) -> None:
    engine = engine_of(family, ends_often)
    relaid: list[tuple[int, int]] = []
    regroup = Members.regroup

    def noted(self: Members, groups: Any, width: int) -> None:
        regroup(self, groups, width)
        relaid.append((self.layout.groups, self.layout.width))

    perturbations, rows = members(1, count=6), prompts(7, seed=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Members, "regroup", noted)
        answers = engine.generate_population(perturbations, rows, sampling)
    assert len(relaid) > 2 and relaid[0][0] == 6  # the rows were laid out anew more than once
    assert len({len(c.token_ids) for member in answers for row in member for c in row}) > 3
    for perturbation, answer in zip(perturbations, answers, strict=True):
        for row, completions in zip(rows, answer, strict=True):
            assert engine.generate(perturbation, [row], sampling) == [completions]


def test_an_update_moves_what_the_engine_answers() -> None:
    """Theta is the working model's own memory: nothing is copied, and theta is what answers."""
    from estune.es.update import make_update

    engine = engine_of("llama")
    rows = prompts(4)
    live = dict(engine.model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert np.shares_memory(engine.theta.arrays["model.layers.0.mlp.up_proj.weight"], live.detach().numpy())
    before = engine.generate(None, rows, GREEDY)
    perturbations = members(1)
    of_members = engine.generate_population(perturbations, rows, GREEDY)
    update = make_update([p.member for p in perturbations], [1.0, -2.0, 1.0], 0.3, rank=1)
    engine.theta.apply(update)
    engine.forget()
    assert engine.generate(None, rows, GREEDY) != before
    assert engine.generate_population(perturbations, rows, GREEDY) != of_members


class OddMLP(nn.Module):
    """A gate that multiplies by its matrix elementwise: nothing a stand-in has a rule for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.table = nn.Parameter(torch.randn(4, 32) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (1 + self.table.mean(0))  # type: ignore[no-any-return]


class HidingMLP(nn.Module):
    """Keeps another reference to its weight, so that no stand-in is ever asked for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(32))
        self.kept = [self.scale]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.kept[0]  # type: ignore[no-any-return]


class MixingMLP(nn.Module):
    """Reorders the rows of the batch around a linear layer: each would meet another member's noise."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flip(0)).flip(0)  # type: ignore[no-any-return]


class DoubleMLP(HidingMLP):
    """Uses its weight where a stand-in is found, and once more under another name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scale) * self.kept[0]  # type: ignore[no-any-return]


class CachingMLP(nn.Module):
    """Multiplies with a view of its matrix that was made once, when it reads a single token."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.matrix = nn.Linear(32, 32, bias=False)
        self.transposed = self.matrix.weight.detach().T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + (x @ self.transposed if x.shape[1] == 1 else self.matrix(x))  # type: ignore[no-any-return]


class JoiningMLP(nn.Module):
    """Hands its matrices to torch in a list."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.a, self.b = (nn.Parameter(torch.randn(16, 32) * 0.1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + torch.nn.functional.linear(x, torch.cat([self.a, self.b]))  # type: ignore[no-any-return]


class UnpaddingMLP(nn.Module):
    """Leaves the padding out, so that rows are no longer of one length."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] == 1:
            return self.inner(x)  # type: ignore[no-any-return]
        seen = torch.ones(x.shape[:2], dtype=torch.bool)
        seen[::2, : x.shape[1] - 3] = False
        found = torch.zeros_like(x)
        found[seen] = self.inner(x[seen])
        return found


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (OddMLP, "table (mean)"),
        (HidingMLP, "scale"),
        (MixingMLP, "influence each other"),
        (DoubleMLP, "scale (the forward pass also uses it in another way)"),
        (CachingMLP, "matrix.weight (the forward pass also uses it in another way)"),
        (JoiningMLP, "cat"),
        (UnpaddingMLP, "for 4 rows"),
    ],
)
def test_a_parameter_without_a_rule_is_named_and_still_perturbed(
    module: Any, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(model: Any) -> None:
        torch.manual_seed(3)
        model.model.layers[1].mlp = module(model.model.layers[1].mlp)

    engine = engine_of("llama", edit)
    assert not engine.facts.header["shared_forward"]
    message = capsys.readouterr().err
    assert "one after another" in message and named in message
    rows, perturbations = prompts(4), members(2)
    answers = engine.generate_population(perturbations, rows, GREEDY)
    for perturbation, answer in zip(perturbations, answers, strict=True):
        plain = HFEngine.from_model(replaced(engine, "llama", perturbation, edit), tiny_tokenizer())
        assert plain.generate(None, rows, GREEDY) == answer


def test_a_model_that_is_called_in_a_way_of_its_own_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_of("mamba")
    assert not engine.facts.header["shared_forward"]
    message = capsys.readouterr().err
    assert "one after another" in message and "the model's inputs" in message


def test_rows_are_planned_by_member() -> None:
    # 3 members x 4 rows; member 0 has one row left, member 1 none, member 2 three
    plan = plan_rows([2, 8, 9, 11], [0, 1, 2], 4)
    assert plan is not None
    assert [line for line, live in zip(plan.lines, plan.live, strict=True) if live] == [2, 8, 9, 11]
    assert len(plan.lines) == len(plan.groups) * plan.width
    for index, member in enumerate(plan.groups):
        for line in plan.lines[index * plan.width : (index + 1) * plan.width]:
            assert [0, 1, 2][line // 4] == member
    assert plan_rows(list(range(11)), [0, 1, 2], 4) is None  # nearly all go on
    whole = plan_rows([4, 5, 6, 7], [0, 1, 2], 4)
    assert whole is not None and (whole.groups, whole.width, whole.lines) == ([1], 4, [4, 5, 6, 7])


def test_as_many_members_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    from estune import environment

    engine = engine_of("llama")
    monkeypatch.setattr(environment, "free_memory_bytes", lambda: 1 << 40)
    assert engine.members_that_fit(30, 4, 100, 1) == 30
    assert engine.members_that_fit(3000, 4, 100, 1) < 3000
    monkeypatch.setattr(environment, "free_memory_bytes", lambda: 0)
    assert engine.members_that_fit(30, 4, 100, 1) == 1
    fits = []
    for free in (20e6, 40e6):
        monkeypatch.setattr(environment, "free_memory_bytes", lambda free=free: int(free))
        fits.append(engine.members_that_fit(10**6, 1, 100, 1))
    assert 1 < fits[0] < fits[1]


def finished(answers: list[list[list[Completion]]]) -> int:
    return sum(c.finished for member in answers for row in member for c in row)


def test_stop_strings_end_rows_of_members() -> None:
    from dataclasses import replace

    engine = engine_of("llama")
    rows, perturbations = prompts(6), members(1)
    plain = engine.generate_population(perturbations, rows, GREEDY)
    letters = {engine.assets.decode([token]) for token in plain[0][0][0].token_ids}
    stopping = replace(GREEDY, stop_strings=tuple(sorted(letters))[:2])
    assert finished(engine.generate_population(perturbations, rows, stopping)) > finished(plain)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", few(["llama", "qwen3", "opt", "gemma3"], ("llama",)))
def test_what_prompts_have_in_common_is_read_once_a_member(family: str, sampling: Any) -> None:
    engine = engine_of(family)
    plain = prompts(4, seed=6)
    first = tuple(range(20, 32))  # twelve tokens that all prompts share, and a prompt that comes twice
    rows = [Prompt(i, "", first + plain[i % 3].token_ids) for i in range(4)]
    perturbations = members(1)
    answers = engine.generate_population(perturbations, rows, sampling)
    for perturbation, answer in zip(perturbations, answers, strict=True):
        for row, completions in zip(rows, answer, strict=True):
            assert engine.generate(perturbation, [row], sampling) == [completions]
    greedy = sampling.temperature == 0
    assert all((answer[0] == answer[3]) == greedy for answer in answers)  # equal prompts, uniforms of their own


def test_parameters_that_are_not_trained_stay_as_they_are() -> None:
    options: dict[str, Any] = {"trainable_parameters": [r"mlp\.", r"layers\.0\.input_layernorm"]}
    engine = engine_of("llama", **options)
    kinds = {spec.name: spec.kind for spec in engine.theta.specs}
    assert kinds["model.layers.1.mlp.up_proj.weight"] == "lowrank"
    assert kinds["model.layers.0.input_layernorm.weight"] == "full"
    assert kinds["model.embed_tokens.weight"] is False and kinds["model.layers.0.self_attn.q_proj.weight"] is False
    rows, perturbations = prompts(4), members(1)
    answers = engine.generate_population(perturbations, rows, GREEDY)
    assert engine.facts.header["shared_forward"]
    for perturbation, answer in zip(perturbations, answers, strict=True):
        model = replaced(engine, "llama", perturbation)
        assert HFEngine.from_model(model, tiny_tokenizer()).generate(None, rows, GREEDY) == answer


def test_members_of_a_model_in_bfloat16_share_it_too(tmp_path: Any) -> None:
    save_tiny("llama", tmp_path)
    engine = HFEngine.load(str(tmp_path), dtype="bfloat16", noise="lowrank")
    assert engine.facts.header["shared_forward"] and not engine.working.is_theta
    rows, perturbations = prompts(4), members(2)
    ids, mask = left_pad([row.token_ids for row in rows], 0, engine.device)
    some = Members(engine._shared, perturbations)  # type: ignore[arg-type]
    some.regroup(range(3), len(rows))
    with torch.inference_mode(), engine._shared.installed(some.stand_ins):  # type: ignore[union-attr]
        found = engine.model(input_ids=ids.repeat(3, 1), attention_mask=mask.repeat(3, 1)).logits.float()
    assert found.isfinite().all()
    for index, perturbation in enumerate(perturbations):
        model = replaced(engine, "llama", perturbation)
        with torch.inference_mode():
            expected = model(input_ids=ids, attention_mask=mask).logits
            theta = engine.model(input_ids=ids, attention_mask=mask).logits.float()
        seen = mask.bool()
        error = (found[index * 4 : index * 4 + 4][seen] - expected[seen]).norm()
        assert error < 0.25 * (theta[seen] - expected[seen]).norm()  # far nearer to the member than theta is
    assert engine.generate_population(perturbations, rows, GREEDY) != [engine.generate(None, rows, GREEDY)] * 3


def test_a_mixture_of_rows_is_found_in_bfloat16_too() -> None:
    def edit(model: Any) -> None:
        model.model.layers[1].self_attn.q_proj = MixingMLP(model.model.layers[1].self_attn.q_proj)
        model.to(torch.bfloat16)

    assert not engine_of("llama", edit).facts.shared_forward


def test_vectors_alone_share_a_forward_pass() -> None:
    engine = engine_of("llama", trainable_parameters=["norm"])  # type: ignore[arg-type]
    rows, perturbations = prompts(4), members(1)
    answers = engine.generate_population(perturbations, rows, GREEDY)
    assert engine.generate(perturbations[0], rows, GREEDY) == answers[0]
    for perturbation, answer in zip(perturbations, answers, strict=True):
        model = replaced(engine, "llama", perturbation)
        assert HFEngine.from_model(model, tiny_tokenizer()).generate(None, rows, GREEDY) == answer
