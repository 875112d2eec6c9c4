"""The models that the repository holds: `tiny`, which the package embeds, and the frozen bases of comparisons.

`tiny` is an ordinary checkpoint, small, with a tokenizer that loses nothing and a skill it seldom uses.
"""

import hashlib
import json
import random
import string
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import estune
from estune.engines.hf.loading import load_tokenizer
from estune.tasks import countdown

pytestmark = pytest.mark.miniature

TINY = Path(estune.__file__).parent / "models" / "tiny"
BASES = Path(__file__).parents[2] / "benchmarks" / "bases"
LINES = [line.split("  ") for line in (BASES / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]


# --- tiny -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_tiny_takes_at_most_4_megabytes():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 4_000_000


def test_tokenizer_loses_nothing(tokenizer):
    generator = random.Random(0)
    texts = ["".join(generator.choices(string.printable, k=60)) for _ in range(200)]
    texts += [
        string.printable,
        "",
        " ",
        "  a  ",
        "1234567890 -12, 7; 007",
        "ça va? 日本 ×÷−",
        "<think>3*5=15</think>\n<answer>3*5</answer>",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompts_are_short_and_closed_by_no_special_token(tokenizer):
    for row in countdown.load("validation"):
        ids = tokenizer.encode(row["prompt"])
        assert len(ids) <= 12 and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == row["prompt"]


def test_the_good_manner_of_tiny_earns_the_full_format(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rows = [row for row in countdown.load("test") if len(row["numbers"]) == 3][:40]
    prompts = tokenizer([row["prompt"] + "<think>" for row in rows], return_tensors="pt")
    written = model.generate(**prompts, max_new_tokens=48, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    texts = ["<think>" + text for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    columns = {name: [row[name] for row in rows] for name in ("numbers", "target")}
    assert sum(map(countdown.format_score, texts)) > 0.9 * len(rows)
    assert sum(countdown.accuracy(texts, **columns)) > 0.6 * len(rows)


def test_card_and_log_of_tiny_agree():
    lines = [json.loads(line) for line in (TINY / "pretrain_log.jsonl").read_text(encoding="utf-8").splitlines()]
    result = next(line for line in lines if line.get("split") == "test")
    card = (TINY / "README.md").read_text(encoding="utf-8")
    assert result["n"] == 2000 and 0.10 <= result["greedy"] <= 0.35
    for name in ("greedy", "direct", "think"):
        assert f"{result[name]:.1%}" in card


# --- the bases are unchanged ------------------------------------------------------------------------------------------


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
    trained = PreTrainedTokenizerFast.from_pretrained(BASES / "llama")
    loaded = load_tokenizer(str(BASES / name))
    for row in countdown.load("test")[:200]:
        assert loaded.encode(row["prompt"]) == trained.encode(row["prompt"])
    text = "<think>28-6=22; 28+12=40; 28/14=2, 12/6=2</think>\n<answer>(12/6+3)*14</answer>"
    assert loaded.encode(text) == trained.encode(text)
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
