"""The bases of comparisons are unchanged."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

BASES = Path(__file__).parents[2] / "benchmarks" / "bases"
LINES = [line.split("  ") for line in (BASES / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]


def test_the_hashes_are_those_that_were_frozen() -> None:
    """A changed file needs a new hash here too, because earlier comparisons used another base."""
    frozen = "c9c20f8a3253d1efbddd040214ba293c3928cc20760b8f12e61d57234c1d8397"
    assert hashlib.sha256((BASES / "SHA256SUMS").read_bytes()).hexdigest() == frozen


def test_all_files_have_a_hash() -> None:
    found = {
        path.relative_to(BASES).as_posix() for path in BASES.glob("*/*") if path.suffix in (".safetensors", ".json")
    }
    assert found == {name for _, name in LINES}
    assert {name.split("/")[0] for name in found} == {"llama", "qwen2", "gpt2", "sudoku"}


@pytest.mark.parametrize(("digest", "name"), LINES)
def test_every_file_is_the_frozen_one(digest: str, name: str) -> None:
    assert hashlib.sha256((BASES / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_prompts_have_the_tokens_that_the_base_was_trained_on(name: str) -> None:
    """Also if transformers overrides the tokenizer class of the model's files."""
    from transformers import PreTrainedTokenizerFast

    from estune.engines.hf.loading import load_tokenizer
    from estune.tasks import countdown

    trained = PreTrainedTokenizerFast.from_pretrained(BASES / "llama")
    loaded = load_tokenizer(str(BASES / name))
    for row in countdown.load("test")[:200]:
        assert loaded.encode(row["prompt"]) == trained.encode(row["prompt"])
    text = "<think>28-6=22; 28+12=40; 28/14=2, 12/6=2</think>\n<answer>(12/6+3)*14</answer>"
    assert loaded.encode(text) == trained.encode(text)
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
