"""Stored names, layouts and values: the engine's parameters are those that save_pretrained writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiers import few
from tiny_models import FAMILIES, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from estune.engines.hf.engine import HFEngine
from estune.engines.hf.parameters import bindings, pieces_of, view_at
from estune.errors import UserError
from estune.es.noise import noise_ints, perturbation_scale
from estune.es.types import Member, Noise, Perturbation, Prompt, Sampling

pytestmark = pytest.mark.miniature

SCALE = perturbation_scale(1e-2)
PROMPTS = [Prompt(0, "", (5, 6, 7)), Prompt(1, "", (80, 81, 82, 83, 84))]


def stored_state(model: PreTrainedModel, directory: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def member(seed: int, sign: int = 1, distribution: str = "normal") -> Perturbation:
    return Perturbation(Member(seed, sign), Noise(SCALE, distribution))


@pytest.mark.parametrize("family", few(FAMILIES, ("gpt2", "llama", "mamba")))
def test_bindings_are_what_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    bound, buffers = bindings(model)
    stored = stored_state(model, tmp_path)
    assert {b.name for b in bound} | buffers.keys() == stored.keys()
    assert [b.name for b in bound] == sorted(b.name for b in bound)
    for binding in bound:
        assert binding.shape == tuple(stored[binding.name].shape)
        assert torch.equal(binding.read(), stored[binding.name]), binding.name
    for name, buffer in buffers.items():
        assert torch.equal(buffer, stored[name]), name
    assert sum(np.prod(b.shape) for b in bound) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", few(FAMILIES, ("gpt2", "llama", "mamba")))
def test_a_member_is_theta_plus_scaled_noise_under_the_stored_names(family: str, tmp_path: Path) -> None:
    engine = HFEngine.from_model(tiny_model(family), tiny_tokenizer(), prompts_per_batch=2)
    theta = {name: array.copy() for name, array in engine.theta.arrays.items()}
    engine._load(member(7, sign=-1))
    stored = stored_state(engine.model, tmp_path)
    for spec in engine.theta.specs:
        n = noise_ints(7, spec.name, 0, theta[spec.name].size).reshape(spec.shape)
        expected = theta[spec.name] + np.float32(SCALE) * (-n).astype(np.float32)
        if not spec.perturbed:
            expected = theta[spec.name]
        elif n.any():
            assert not np.array_equal(expected, theta[spec.name])
        assert np.array_equal(stored[spec.name].numpy(), expected), spec.name


@pytest.mark.parametrize("family", few(FAMILIES, ("gpt2", "llama", "mamba")))
def test_theta_survives_twenty_evaluations_bit_for_bit(family: str, tmp_path: Path) -> None:
    engine = HFEngine.from_model(tiny_model(family), tiny_tokenizer(), prompts_per_batch=2)
    before = engine.theta.fingerprint()
    start = stored_state(engine.model, tmp_path)
    for seed in range(20):
        engine.generate(member(seed, 1 if seed % 2 else -1), PROMPTS[:1], Sampling(0, 0, 2))
    engine.generate(None, PROMPTS[:1], Sampling(0, 0, 2))
    after = stored_state(engine.model, tmp_path)
    assert engine.theta.fingerprint() == before
    assert all(torch.equal(start[name], after[name]) for name in start)


def test_bfloat16_weights_are_cast_once_from_float32(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "base")
    engine = HFEngine.load(str(tmp_path / "base"), dtype="bfloat16")
    assert engine.compute_dtype == "bfloat16"
    engine._load(member(3))
    stored = stored_state(engine.model, tmp_path / "member")
    for spec in engine.theta.specs:
        weights = torch.from_numpy(engine.theta.perturb(spec.name, member(3)))
        assert torch.equal(stored[spec.name], weights.to(torch.bfloat16)), spec.name
    engine._load(None)
    stored = stored_state(engine.model, tmp_path / "theta")
    for name, array in engine.theta.arrays.items():
        assert torch.equal(stored[name], torch.from_numpy(array).to(torch.bfloat16)), name


@pytest.mark.parametrize("family", few(["gpt2", "mixtral", "mamba", "deepseek_v3", "hrm_text"], ("gpt2", "mixtral")))
def test_a_saved_model_is_loaded_to_the_bit(family: str, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    engine = HFEngine.load(str(tmp_path))
    host_theta = engine.theta
    assert {spec.name for spec in host_theta.specs} | host_theta.buffers.keys() == stored.keys()
    for name, value in stored.items():
        kept = host_theta.arrays[name] if name in host_theta.arrays else host_theta.buffers[name]
        assert np.array_equal(kept, value.numpy()), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, engine.model(ids).logits)
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_tied_weights_appear_once_under_the_written_name() -> None:
    for family in ("gpt2", "qwen2", "gemma"):
        names = [binding.name for binding in bindings(tiny_model(family))[0]]
        assert "lm_head.weight" not in names
    assert "lm_head.weight" in [binding.name for binding in bindings(tiny_model("llama"))[0]]


def test_kinds() -> None:
    kinds = {binding.name: binding.kind for binding in bindings(tiny_model("gpt2"))[0]}
    assert kinds["transformer.wte.weight"] == kinds["transformer.wpe.weight"] == "embedding"
    assert kinds["transformer.h.0.attn.c_attn.weight"] == "matrix"
    assert kinds["transformer.h.0.attn.c_attn.bias"] == "bias"
    assert kinds["transformer.ln_f.weight"] == "norm"


def test_frozen_and_unselected_parameters_and_buffers_stay() -> None:
    model = tiny_model("deepseek_v3")
    model.model.norm.weight.requires_grad_(False)
    engine = HFEngine.from_model(
        model, tiny_tokenizer(), trainable_parameters=[r"self_attn", r"norm\.weight$"], prompts_per_batch=2
    )
    perturbed = {spec.name for spec in engine.theta.specs if spec.perturbed}
    assert "model.norm.weight" not in perturbed
    assert perturbed
    assert all("self_attn" in name or name.endswith("norm.weight") for name in perturbed)
    assert list(engine.theta.buffers) == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    before = {b.name: b.read() for b in engine.working.bindings}
    engine._load(member(1))
    for binding in engine.working.bindings:
        assert torch.equal(binding.read(), before[binding.name]) == (binding.name not in perturbed)


@pytest.mark.parametrize("pattern", ["no_such_layer", "("])
def test_a_regex_that_selects_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(UserError, match="trainable_parameters"):
        HFEngine.from_model(tiny_model("llama"), tiny_tokenizer(), trainable_parameters=[pattern])


def test_a_written_theta_reaches_the_model() -> None:
    engine = HFEngine.from_model(tiny_model("mixtral"), tiny_tokenizer(), trainable_parameters=["experts"])
    engine.theta.load(lambda _, flat: np.add(flat, np.float32(1), out=flat))
    engine.generate(None, PROMPTS, Sampling(0, 0, 1))
    for binding in engine.working.bindings:
        assert np.array_equal(binding.read().numpy(), engine.theta.arrays[binding.name])


def test_views_express_permutations_and_refuse_what_is_none() -> None:
    parameter = torch.arange(48.0).reshape(8, 6)
    tags = np.arange(48, dtype=np.int32).reshape(8, 6)
    rope = tags.reshape(2, 2, 2, 6).swapaxes(1, 2).reshape(8, 6)  # heads, halves, pairs: no 2-D view has this order
    for addresses in (tags, tags.T, tags[2:5], tags[:, 1:4], rope, tags[::2], tags[0], tags[3, 3]):
        addresses = np.ascontiguousarray(addresses)
        view = view_at("w", addresses, 0, parameter)
        assert np.array_equal(view.reshape(addresses.shape).numpy(), addresses)
        assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    shuffled = np.random.default_rng(0).permutation(48).astype(np.int32)
    with pytest.raises(UserError, match="'w'"):
        view_at("w", shuffled, 0, parameter)


def test_a_stored_tensor_may_span_parameters() -> None:
    parts = [torch.arange(12.0).reshape(3, 4), torch.arange(12.0, 20.0).reshape(2, 4)]
    spans = [(0, 12, parts[0]), (12, 20, parts[1])]
    rows = np.arange(20, dtype=np.int32).reshape(5, 4)
    pieces = pieces_of("w", rows, spans)
    assert [(p.dim, p.start, p.length) for p in pieces] == [(0, 0, 3), (0, 3, 2)]
    assert [(p.dim, p.start, p.length) for p in pieces_of("w", rows.T.copy(), spans)] == [(1, 0, 3), (1, 3, 2)]
    with pytest.raises(UserError, match="'w'"):
        pieces_of("w", rows.reshape(4, 5), spans)
