"""The embedded model: an ordinary checkpoint, small, with a tokenizer that loses nothing and a skill it seldom uses."""

import json
import random
import string
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import estune
from estune.tasks import countdown

pytestmark = pytest.mark.miniature

TINY = Path(estune.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_it_takes_at_most_4_megabytes():
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


def test_its_good_manner_earns_the_full_format(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rows = [row for row in countdown.load("test") if len(row["numbers"]) == 3][:40]
    prompts = tokenizer([row["prompt"] + "<think>" for row in rows], return_tensors="pt")
    written = model.generate(**prompts, max_new_tokens=48, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    texts = ["<think>" + text for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    columns = {name: [row[name] for row in rows] for name in ("numbers", "target")}
    assert sum(map(countdown.format_score, texts)) > 0.9 * len(rows)
    assert sum(countdown.accuracy(texts, **columns)) > 0.6 * len(rows)


def test_its_card_and_its_log_agree():
    lines = [json.loads(line) for line in (TINY / "pretrain_log.jsonl").read_text(encoding="utf-8").splitlines()]
    result = next(line for line in lines if line.get("split") == "test")
    card = (TINY / "README.md").read_text(encoding="utf-8")
    assert result["n"] == 2000 and 0.10 <= result["greedy"] <= 0.35
    for name in ("greedy", "direct", "think"):
        assert f"{result[name]:.1%}" in card
