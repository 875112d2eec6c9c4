"""Decoding, loading and saving of the Hugging Face engine, over every family of tiny random models."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiers import few
from tiny_models import EOS, FAMILIES, PAD, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from estune.engines.hf import attention, callers, decoding, small_linear, trials
from estune.engines.hf.end_ids import end_ids
from estune.engines.hf.engine import HFEngine
from estune.engines.toy import ToyEngine
from estune.errors import UserError
from estune.es.noise import perturbation_scale
from estune.es.population import EVAL_PERSON, derive_seed
from estune.es.types import Completion, Interrupted, Member, Noise, Perturbation, Prompt, Sampling

pytestmark = pytest.mark.miniature

NEAR = ("gpt2", "llama", "gemma3", "mamba")  # families that have little in common
GREEDY = Sampling(seed=0, step=0, max_completion_length=16)
SAMPLED = replace(GREEDY, temperature=0.8, num_generations=2)
MEMBER = Perturbation(Member(5, 1), Noise(perturbation_scale(1e-2)))


def prompts(count: int, longest: int = 20, seed: int = 1) -> list[Prompt]:
    draw = random.Random(seed)
    lengths = [draw.randrange(1, longest) for _ in range(count)]
    return [Prompt(i, "", tuple(draw.randrange(250) for _ in range(n))) for i, n in enumerate(lengths)]


def engine_of(family: str = "llama", prompts_per_batch: int = 8, edit: Callable[[Any], None] | None = None) -> HFEngine:
    model = tiny_model(family)
    if edit is not None:
        edit(model)
    return HFEngine.from_model(model, tiny_tokenizer(), prompts_per_batch=prompts_per_batch)


@pytest.mark.parametrize("family", few(FAMILIES, NEAR))
def test_a_batch_equals_single_rows_and_generate(family: str) -> None:
    engine = engine_of(family)
    rows = prompts(8)
    batch = [answers[0] for answers in engine.generate(None, rows, GREEDY)]
    assert len({completion.token_ids for completion in batch}) > 1
    for row, completion in zip(rows, batch, strict=True):
        assert engine.generate(None, [row], GREEDY) == [[completion]]
        ids = torch.tensor([row.token_ids])
        with torch.inference_mode():
            expected = engine.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=GREEDY.max_completion_length
            )[0, ids.shape[1] :].tolist()
        assert list(completion.token_ids) == expected
        assert completion.finished == (expected[-1] == EOS)


@pytest.mark.parametrize("family", few(["llama", "gemma3", "mixtral", "mamba"], ("llama", "mamba")))
def test_the_batch_shrinks_as_rows_finish(family: str) -> None:
    def all_even_tokens_end(model: Any) -> None:
        model.generation_config.eos_token_id = list(range(0, 300, 3))

    engine = engine_of(family, edit=all_even_tokens_end)
    rows = prompts(8, seed=3)
    answers = engine.generate(None, rows, GREEDY)
    assert len({len(answer[0].token_ids) for answer in answers}) > 1
    for row, (completion,) in zip(rows, answers, strict=True):
        assert engine.generate(None, [row], GREEDY) == [[completion]]
        ends = [token % 3 == 0 for token in completion.token_ids]
        assert not any(ends[:-1])
        assert completion.finished == ends[-1]


def last_logits(model: Any, rows: list[list[int]], caller: callers.Caller) -> list[torch.Tensor]:
    """Logits after the prompts, and after one and two more tokens; each (R, V)."""
    ids, mask = callers.left_pad(rows, PAD, torch.device("cpu"))
    with torch.inference_mode():
        found = [caller.prefill(ids, mask, 4)]
        found += [caller.step(ids[:, 0] * 0 + token) for token in (5, 6)]
    return found


@pytest.mark.parametrize("family", few(FAMILIES, NEAR))
def test_fast_layers_and_attention_give_the_logits_of_transformers(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    if not trials.uses_attention_caller(model):
        pytest.skip("has no attention, or inputs of its own")
    rows = [[*range(30)], [7] * 9, [7] * 9, [8]]
    expected = last_logits(model, rows, callers.AttentionCaller(model, wide_mask=False))
    grouped = family in ("llama", "qwen2", "qwen3", "gemma", "gemma3", "mixtral", "qwen2_moe", "hrm_text")
    choices = attention.find(model)
    assert bool(choices) == grouped
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(small_linear, "MIN_WIDTH", 1)
    monkeypatch.setattr(small_linear, "MIN_WEIGHTS", 1)
    with small_linear.installed(small_linear.plain_layers(model)), attention.selected(choices):
        assert (model.config._attn_implementation == attention.NAME) == grouped
        wide = trials.takes_wide_mask(model)
        assert wide == (family != "gemma3")  # gemma3 has layers of two kinds
        logits = last_logits(model, rows, callers.AttentionCaller(model, wide))
    assert model.config._attn_implementation == "sdpa"
    for found, wanted in zip(logits, expected, strict=True):
        assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))


def test_attention_is_left_alone_where_it_would_change_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    real = attention.grouped_attention

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return real(*args, **kwargs)[0] * 1.01, None

    monkeypatch.setattr(attention, "grouped_attention", wrong)
    assert not attention.find(model)
    assert model.config._attn_implementation == "sdpa"
    assert not attention.find(tiny_model("gpt2"))  # every head has its own keys


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_rows_may_be_repeated_and_reordered(family: str) -> None:
    model = tiny_model(family)
    rows = [[*range(30)], [7] * 9, [8]]
    lines = torch.tensor([2, 0, 2, 2, 1])
    ids, mask = callers.left_pad(rows, PAD, torch.device("cpu"))
    wide = trials.takes_wide_mask(model)
    with torch.inference_mode():
        plain, moved = callers.AttentionCaller(model, wide), callers.AttentionCaller(model, wide)
        assert torch.equal(plain.prefill(ids, mask, 4), moved.prefill(ids, mask, 4))
        assert moved.select_rows(lines)
        for token in (5, 6):
            tokens = torch.tensor([token, token + 1, token + 2])
            assert torch.allclose(plain.step(tokens)[lines], moved.step(tokens[lines]), atol=1e-5)


class CountingModel:
    """Passes calls on to a model and notes the shapes of its inputs."""

    def __init__(self, model: Any) -> None:
        self.model, self.shapes = model, []

    def __call__(self, **inputs: Any) -> Any:
        self.shapes.append(tuple(inputs["input_ids"].shape))
        return self.model(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@pytest.mark.parametrize("family", few([f for f in FAMILIES if f != "mamba"], ("llama", "gemma3")))
@pytest.mark.parametrize("groups", [1, 2])
def test_what_prompts_have_in_common_is_read_once(family: str, groups: int) -> None:
    model = tiny_model(family)
    head = list(range(40, 52))
    rows = [[*head, 1, 2, 3], [*head, 4], [*head, 1, 2, 3], [*head, 9, 9, 9, 9, 9]]
    counting, widths = CountingModel(model), []
    wide = trials.takes_wide_mask(model)
    sharing = callers.AttentionCaller(counting, wide, groups, widths.append)
    found = last_logits(model, rows * groups, sharing)
    if wide:
        assert counting.shapes[:2] == [(groups, 12), (3 * groups, 5)]
        assert widths == [1, 3, 4]
    else:
        assert counting.shapes[0] == (3 * groups, 17)
        assert widths == [3, 4]
    assert counting.shapes[-2:] == [(4 * groups, 1)] * 2
    apart = CountingModel(model)  # rows may all have weights of their own: nothing is shared
    last_logits(apart, rows, callers.AttentionCaller(apart, wide))
    assert apart.shapes[0] == (4, 17)
    for line, row in enumerate(rows * groups):
        alone = last_logits(model, [row], callers.AttentionCaller(model, wide_mask=False))
        for one, many in zip(alone, found, strict=True):
            assert torch.allclose(many[line], one[0], atol=2e-5 * float(one.abs().max()))


def test_rows_of_like_lengths_share_a_batch() -> None:
    rows = [decoding.Row((1,) * n, i, 0) for i, n in enumerate([3, 9, 3, 5, 9, 1])]
    assert decoding.cut(rows, 4) == [[1, 4, 3, 0], [2, 5]]
    assert decoding.cut([], 4) == []


def test_other_weights_give_other_answers_and_caches_do_not_linger() -> None:
    engine = engine_of()
    rows = prompts(8)
    theta = engine.generate(None, rows, GREEDY)
    member = engine.generate(replace(MEMBER, noise=Noise(perturbation_scale(0.1))), rows, GREEDY)
    assert member != theta
    assert engine.generate(None, rows, GREEDY) == theta


def test_rows_are_cut_into_batches_in_order() -> None:
    rows = prompts(7)
    expected = engine_of(prompts_per_batch=7).generate(MEMBER, rows, SAMPLED)
    assert [len(group) for group in expected] == [2] * 7
    for size in (1, 3):
        assert engine_of(prompts_per_batch=size).generate(MEMBER, rows, SAMPLED) == expected


def test_greedy_completions_of_a_prompt_are_copies() -> None:
    answers = engine_of().generate(None, prompts(3), replace(GREEDY, num_generations=3))
    assert all(len(group) == 3 and group[0] == group[1] == group[2] for group in answers)


def test_sampling_depends_on_seed_step_row_completion_and_person_alone() -> None:
    engine = engine_of()
    rows = prompts(4)
    first = engine.generate(None, rows, SAMPLED)
    assert engine.generate(None, rows, SAMPLED) == first
    assert engine.generate(None, rows[::-1], SAMPLED) == first[::-1]
    assert all(group[0] != group[1] for group in first)
    for other in (replace(SAMPLED, seed=1), replace(SAMPLED, step=1), replace(SAMPLED, person=EVAL_PERSON)):
        assert engine.generate(None, rows, other) != first
    moved = [replace(row, row_id=row.row_id + 100) for row in rows]
    assert engine.generate(None, moved, SAMPLED) != first


def test_the_uniform_is_the_53_high_bits_of_the_derived_seed() -> None:
    sampling = replace(SAMPLED, seed=11, step=3)
    expected = (derive_seed(11, 3, 42, 1, 6, person=sampling.person) >> 11) / 2**53
    assert decoding.uniform(sampling, decoding.Row((1,), 42, 1), 6) == expected


def chosen(logits: torch.Tensor, sampling: Sampling, grid: int = 2000) -> torch.Tensor:
    """Frequencies of the tokens chosen from one row of logits over an even grid of uniforms."""
    uniforms = [(i + 0.5) / grid for i in range(grid)]
    tokens = decoding.choose(logits.expand(grid, -1), sampling, uniforms)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / grid


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (8, 0.5), (1, 1.0), (0, 1e-6)])
def test_sampling_follows_the_distribution_of_transformers(top_k: int, top_p: float) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    sampling = replace(SAMPLED, temperature=0.7, top_k=top_k, top_p=top_p)
    scores = logits / 0.7
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    found = chosen(logits, sampling)
    assert (found[expected == 0] == 0).all()
    assert (found[expected > 1e-3] > 0).all()
    assert (found - expected).abs().max() < 1e-3


def test_ties_and_extremes_of_choice() -> None:
    tied = torch.zeros(1, 6)
    assert decoding.choose(tied, GREEDY, []).tolist() == [0]
    assert chosen(tied, replace(SAMPLED, top_p=0.5)).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert chosen(tied, replace(SAMPLED, top_k=2)).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    peaked = torch.tensor([[0.0, 100.0, 0.0]])
    for u in (0.0, 1 - 2.0**-53):
        assert decoding.choose(peaked, replace(SAMPLED, temperature=0.01), [u]).tolist() == [1]
    broken = torch.tensor([[torch.nan, 1.0, torch.inf], [torch.nan] * 3, [-torch.inf] * 3])
    assert decoding.choose(broken, SAMPLED, [0.5] * 3).tolist() == [2, 0, 0]


def test_only_end_and_padding_ids_are_taken_from_the_generation_config() -> None:
    def odd_settings(model: Any) -> None:
        settings = model.generation_config
        settings.repetition_penalty, settings.do_sample, settings.temperature = 5.0, True, 3.0
        settings.no_repeat_ngram_size, settings.max_new_tokens, settings.num_beams = 1, 2, 4

    rows = prompts(6)
    expected = engine_of().generate(None, rows, GREEDY)
    assert any(len(set(c.token_ids)) < len(c.token_ids) for (c,) in expected)  # a penalty would have changed these
    assert engine_of(edit=odd_settings).generate(None, rows, GREEDY) == expected


def test_end_ids_come_as_a_number_a_list_or_from_the_tokenizer() -> None:
    def no_settings(model: Any) -> None:
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None

    def several(model: Any) -> None:
        model.generation_config.eos_token_id = [7, 9]

    assert (engine_of().assets.end_tokens, engine_of().assets.pad) == ({EOS}, PAD)
    assert (engine_of(edit=no_settings).assets.end_tokens, engine_of(edit=no_settings).assets.pad) == ({EOS}, PAD)
    assert engine_of(edit=several).assets.end_tokens == {7, 9}
    assert ToyEngine().assets.end_tokens == frozenset()  # bytes, none of which ends an answer
    no_pad = SimpleNamespace(eos_token_id=5, pad_token_id=None)
    model = tiny_model("llama")
    no_settings(model)
    assert end_ids(model, no_pad, 300) == (frozenset({5}), 5)


class ScriptedCaller:
    """A model that answers each row with given tokens."""

    def __init__(self, script: list[list[int]]) -> None:
        self.script, self.position, self.rows = script, -1, list(range(len(script)))

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor, max_new: int) -> torch.Tensor:
        return self._logits()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        assert len(tokens) == len(self.rows)
        return self._logits()

    def select_rows(self, rows: torch.Tensor) -> bool:
        self.rows = [self.rows[i] for i in rows.tolist()]
        return True

    def drop_finished(self, alive: Sequence[int], lines: int) -> tuple[list[int], list[bool]] | None:
        if 2 * len(alive) > lines:
            return None
        self.select_rows(torch.tensor(alive))
        return list(alive), [True] * len(alive)

    def _logits(self) -> torch.Tensor:
        self.position += 1
        logits = torch.zeros(len(self.rows), 300)
        for line, row in enumerate(self.rows):
            logits[line, (self.script[row] + [0] * 99)[self.position]] = 1.0
        return logits


def say(texts: list[str], stop: tuple[str, ...], limit: int = 40) -> list[tuple[str, Completion]]:
    tokenizer = tiny_tokenizer()
    script = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    rows = [decoding.Row((1,) * (i + 1), i, 0) for i in range(len(texts))]
    done = decoding.complete(
        ScriptedCaller(script),
        rows,
        replace(GREEDY, max_completion_length=limit),
        frozenset({EOS}),
        PAD,
        decoding.StopStrings(tokenizer, stop),
        lambda: False,
        torch.device("cpu"),
    )
    return [(tokenizer.decode(list(c.token_ids), skip_special_tokens=True), c) for c in done]


def test_stop_strings_span_tokens_and_stay_in_the_text() -> None:
    texts = ["so <answer>12</answer> more", "12 = 3 then", "nothing here <eos>", "ends é now", "x"]
    found = say(texts, ("</answer>", " = 3", "é", ""))
    assert [text for text, _ in found[:4]] == ["so <answer>12</answer>", "12 = 3", "nothing here ", "ends é"]
    assert [completion.finished for _, completion in found] == [True, True, True, True, False]
    assert found[2][1].token_ids[-1] == EOS
    assert len(found[4][1].token_ids) == 40


def test_a_stop_string_of_special_tokens_and_a_trailing_space_are_found() -> None:
    found = say(["ab<pad>cd", "no end. Then"], ("<pad>", ". "))
    assert [text for text, _ in found] == ["ab", "no end. "]


def test_the_limit_cuts_rows_off() -> None:
    (text, completion), (other, ended) = say(["abcdef", "ab<eos>"], (), limit=3)
    assert (text, completion.finished) == ("abc", False)
    assert (other, ended.finished) == ("ab", True)


def test_interruption_between_tokens() -> None:
    calls = iter([False, False, True])
    with pytest.raises(Interrupted):
        engine_of().generate(MEMBER, prompts(2), GREEDY, lambda: next(calls))


def test_prompts_that_do_not_fit_are_refused() -> None:
    engine = engine_of("gpt2")
    assert engine.facts.max_context == 128
    assert engine_of("mamba").facts.max_context is None
    full = Prompt(4, "", (1,) * 112)
    assert len(engine.generate(None, [full], GREEDY)[0][0].token_ids) <= 16
    with pytest.raises(UserError, match="row 4 has 113 tokens"):
        engine.generate(None, [replace(full, token_ids=(1,) * 113)], GREEDY)
    with pytest.raises(UserError, match="row 4 has no tokens"):
        engine.generate(None, [replace(full, token_ids=())], GREEDY)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_token_logprobs(family: str) -> None:
    engine = engine_of(family, prompts_per_batch=2)
    rows = prompts(5)
    completions = [list(range(10, 10 + 3 * i)) for i in range(5)]  # the first is empty
    engine.generate(MEMBER, rows[:1], GREEDY)
    found = engine.token_logprobs(rows, completions)
    engine._load(None)
    for row, completion, values in zip(rows, completions, found, strict=True):
        ids = torch.tensor([[*row.token_ids, *completion]])
        with torch.inference_mode():
            scores = engine.model(ids).logits[0].log_softmax(-1)
        expected = [scores[len(row.token_ids) - 1 + i, token].item() for i, token in enumerate(completion)]
        assert values == pytest.approx(expected, abs=1e-5)


def test_perturb_cosine_sees_what_a_dtype_swallows(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    small = Perturbation(Member(5, 1), Noise(perturbation_scale(1e-3)))
    exact = HFEngine.load(str(tmp_path)).perturb_cosine(small)
    assert exact.keys() == {"bias", "embedding", "matrix", "norm"}
    assert all(value > 0.999 for value in exact.values())
    coarse = HFEngine.load(str(tmp_path), dtype="bfloat16").perturb_cosine(small)
    assert 0.3 < coarse["norm"] < 0.95
    assert coarse["norm"] < coarse["matrix"] < 1.0


def test_check_reproducible_and_info() -> None:
    engine = engine_of()
    assert engine.check_reproducible([MEMBER], prompts(4), SAMPLED)
    info = engine.facts.header
    assert info["model_type"] == "llama"
    assert info["dtype"] == "float32"
    assert info["device"] == "cpu"
    assert info["num_parameters"] == sum(p.numel() for p in engine.model.parameters())
    json.dumps(info)


def test_assets_make_a_loadable_model_without_paths(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "base")
    engine = HFEngine.load(str(tmp_path / "base"))
    engine.assets.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    for name in ("one", "two"):
        engine.assets.save(tmp_path / name, engine.compute_dtype)
    written = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= set(written)
    for name in written:
        data = (tmp_path / "one" / name).read_bytes()
        assert data == (tmp_path / "two" / name).read_bytes()
        assert str(tmp_path).encode() not in data
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    save_file(engine.theta.arrays, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    again = HFEngine.load(str(tmp_path / "one"))
    assert again.theta.fingerprint() == engine.theta.fingerprint()
    assert again.generate(None, prompts(3), GREEDY) == engine.generate(None, prompts(3), GREEDY)
    assert AutoTokenizer.from_pretrained(tmp_path / "one").chat_template == engine.assets.tokenizer.chat_template
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "one").dtype == torch.float32
    HFEngine.load(str(tmp_path / "base"), dtype="bfloat16").assets.save(tmp_path / "half", "bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def refused(directory: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        HFEngine.load(str(directory))
    assert str(directory) in str(caught.value)


def test_unusable_models_are_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "absent", "does not exist")
    save_tiny("llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    good = weights.read_bytes()
    tensors = load_file(weights)

    weights.write_bytes(good[: len(good) // 2])
    refused(tmp_path, "model.safetensors is truncated or damaged")
    for value in (np.nan, np.inf, -np.inf):
        spoilt = {**tensors, "model.norm.weight": tensors["model.norm.weight"].copy()}
        spoilt["model.norm.weight"][3] = value
        save_file(spoilt, weights, metadata={"format": "pt"})
        refused(tmp_path, "NaN or infinite values in model.norm.weight")
    lacking = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    save_file(lacking, weights, metadata={"format": "pt"})
    refused(tmp_path, "lacks the weights lm_head.weight")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "lacks the weight file model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    weights.unlink()
    refused(tmp_path, "holds no weights")
    weights.write_bytes(good)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing' is not a directory, and the hub cannot be reached"):
        HFEngine.load("nobody/nothing")
    save_tiny("llama", tmp_path)
    with pytest.raises(UserError, match="unknown dtype 'int3'"):
        HFEngine.load(str(tmp_path), dtype="int3")
    with pytest.raises(UserError, match="unknown device 'tpu'"):
        HFEngine.load(str(tmp_path), device="tpu")
