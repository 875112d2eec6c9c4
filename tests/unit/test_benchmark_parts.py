"""Parts of the benchmarks on which figures depend."""

from __future__ import annotations

import pytest
import torch
from script_loading import loaded
from transformers import AutoModelForCausalLM

from estune.models.names import local_directory


@pytest.fixture
def loop():
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(local_directory("tiny"), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    with loaded("benchmarks/paper_loop.py") as module:
        yield module.PaperLoop(model, ids, torch.ones_like(ids), 4)


def test_the_papers_loop_perturbs_restores_and_moves(loop) -> None:
    before = [parameter.detach().clone() for parameter in loop.parameters]
    loop.add_noise(7, 0.01)
    moved = [(a - b) / 0.01 for a, b in zip(loop.parameters, before, strict=True)]
    everything = torch.cat([noise.flatten() for noise in moved])
    assert abs(everything.std() - 1) < 0.01
    assert abs(everything.mean()) < 0.01
    shaped = [noise for noise in moved if noise.shape == moved[1].shape]
    assert len(shaped) > 1
    assert not torch.allclose(shaped[0], shaped[1])  # equal shapes have noise of their own
    loop.add_noise(7, -0.01)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(loop.parameters, before, strict=True))
    times = loop.time_member(7, 0.01, 0.5)
    assert times["member"] == pytest.approx(sum(times[part] for part in ("perturb", "generate", "restore", "update")))
    assert all(
        torch.allclose(a - b, 0.5 * noise, atol=1e-3)
        for a, b, noise in zip(loop.parameters, before, moved, strict=True)
    )


def test_the_papers_loop_refuses_completions_of_another_length(loop) -> None:
    loop.new_tokens = 5
    generate = loop.model.generate
    loop.model.generate = lambda **kwargs: generate(**kwargs | {"max_new_tokens": 3})
    with pytest.raises(RuntimeError, match=r"\(2, 3\) tokens, not \(2, 5\)"):
        loop.time_member(0, 0.01, 0.0)


@pytest.mark.parametrize(
    ("text", "held"),
    [("The answer is 6.", True), ("6", True), ("x = 6, so", True), ("16", False), ("6.5", False), ("-6", False),
     ("6th", False), ("1.6", False), ("", False)],
)  # fmt: skip
def test_the_scan_looks_for_the_answer_as_a_separate_word(text: str, held: bool) -> None:
    with loaded("benchmarks/scan_reasoning.py") as scan:
        assert scan.holds(text, "6") is held


def test_a_short_answer_is_rewarded_as_a_step_of_the_paths() -> None:
    with loaded("benchmarks/paths.py") as paths:
        assert paths.shorter(completions=["", "x" * 100]) == [1.0, 0.5]
        assert paths.shorter(completions=[[{"role": "assistant", "content": "x" * 300}]]) == [0.25]
