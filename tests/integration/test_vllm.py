"""The vLLM engine: its members are the reference's, its greedy answers are those of the transformers engine."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_for_vllm

from estune.engines.base import EngineOptions
from estune.engines.hf.engine import HFEngine
from estune.errors import UserError
from estune.es.population import members_for_step, noise_of
from estune.es.types import GroupJob, Interrupted, Member, Perturbation, Prompt, Sampling
from estune.es.update import make_update

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM and its libraries warn

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2")
GREEDY = Sampling(
    seed=1, step=0, max_completion_length=12, num_generations=1, temperature=0.0, top_p=1.0, top_k=0, stop_strings=()
)
PROMPTS = [Prompt(i, "", tuple(int(t) for t in np.random.default_rng(i).integers(1, 250, 4 + 3 * i))) for i in range(4)]


def perturbations(rank: int, count: int = 3, sigma: float = 0.02) -> list[Perturbation]:
    noise = noise_of(sigma, "normal", rank)
    return [Perturbation(member, noise) for member in members_for_step(0, 0, count, False)]


def opened(directory: Path, **options: Any) -> Any:
    from estune.engines.vllm.engine import VLLMEngine

    return VLLMEngine.open(EngineOptions(model=str(directory), num_threads=2, **options))


def tokens(answers: list[Any]) -> list[Any]:
    return [[completion.token_ids for completion in row] for row in answers]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp(request.param)
    save_tiny_for_vllm(request.param, directory)
    return directory


def memory_equals_reference(worker: Any, names: list[str], message: Any) -> bool:
    """Runs in the worker: write a member in place, then load the reference's weights as vLLM loads files; compare."""
    from estune.engines.vllm.shared_memory import perturbation_of

    worker.estune_hold(message)
    model = worker.model_runner.get_model()
    written = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    theta, perturbation = worker.estune_theta, perturbation_of(message)
    model.load_weights((name, torch.from_numpy(theta.perturb(name, perturbation))) for name in names)
    return all(torch.equal(written[name], parameter.data) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_members_weights_in_vllm_are_the_references(family: Path, dtype: str) -> None:
    from estune.engines.vllm.shared_memory import message_of

    engine = opened(family, dtype=dtype)
    try:
        names = [spec.name for spec in engine.specs]
        for perturbation in (None, *perturbations(0, 2)):
            message = None if perturbation is None else message_of(perturbation)
            equal = engine._llm.collective_rpc(memory_equals_reference, args=(names, message))
            engine.forget()
            assert equal == [True]
    finally:
        engine.stop()


@pytest.mark.parametrize("noise", ["full", "lowrank"])
def test_answers_and_updates_are_those_of_transformers(family: Path, noise: str) -> None:
    rank = 2 if noise == "lowrank" else 0
    reference = HFEngine.open(EngineOptions(model=str(family), num_threads=2, noise=noise))
    engine = opened(family, noise=noise)
    try:
        members = perturbations(rank)
        assert engine.facts.shared_forward == (noise == "lowrank")
        assert engine.fingerprint() == reference.fingerprint()
        for _ in range(2):  # the second time with the updated theta: no cached prefix may survive
            of_theta = tokens(reference.generate(None, PROMPTS, GREEDY))
            assert tokens(engine.generate(None, PROMPTS, GREEDY)) == of_theta
            theta = Perturbation(Member(0, sign=0), members[0].noise)
            *answered, beside = engine.generate_population([*members, theta], PROMPTS, GREEDY)
            assert tokens(beside) == of_theta
            expected = reference.generate_population(members, PROMPTS, GREEDY)
            assert list(map(tokens, answered)) == list(map(tokens, expected))
            update = make_update([p.member for p in members], [1.0, -0.5, -0.5], 0.01, rank=rank)
            assert engine.apply(update).checksum == reference.apply(update).checksum
        assert engine.fingerprint() == reference.fingerprint()
    finally:
        engine.stop()


@pytest.mark.parametrize("float32", [True, False])
def test_a_saved_model_is_the_one_that_transformers_saves(family: Path, tmp_path: Path, float32: bool) -> None:
    """Of tied and untied families: the files load, and hold theta."""
    engine = opened(family, dtype="bfloat16")
    try:
        engine.assets.check()
        engine.save(tmp_path / "saved", float32=float32)
        reference = HFEngine.load(str(family), dtype="bfloat16")
        reference.save(tmp_path / "reference", float32=float32)
        names = sorted(path.name for path in (tmp_path / "reference").iterdir())
        assert names == sorted(path.name for path in (tmp_path / "saved").iterdir())
        for name in names:
            assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes(), name
        assert HFEngine.load(str(tmp_path / "saved"), dtype="float32").specs == reference.specs
    finally:
        engine.stop()


def test_non_finite_rows_spoil_no_row_that_gets_their_cache_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has room for a few rows, so that rows of one call get the blocks of rows that have ended."""
    from estune.engines.vllm import launch

    save_tiny_for_vllm("llama", tmp_path)
    monkeypatch.setattr(launch, "CPU_CACHE_BYTES", 1 << 20)
    engine = opened(tmp_path, noise="lowrank", prompts_per_batch=64)
    try:
        prompts = [dataclasses.replace(PROMPTS[i % 4], row_id=i) for i in range(60)]
        sampling = dataclasses.replace(GREEDY, max_completion_length=40)
        sound, [_, broken] = perturbations(1, 2), perturbations(1, 2, sigma=1e30)
        wanted = engine.generate_population(sound, prompts, sampling)
        assert all(each.finite for member in wanted for row in member for each in row)
        first, *found = engine.generate_population([broken, *sound], prompts, sampling)
        assert found == wanted and not any(each.finite for row in first for each in row)
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    directory: Path = tmp_path_factory.mktemp("llama-one")
    save_tiny_for_vllm("llama", directory)
    engine = opened(directory, noise="lowrank")
    yield directory, engine
    engine.stop()


def test_a_stop_string_ends_a_completion(llama: tuple[Path, Any]) -> None:
    directory, engine = llama
    reference = HFEngine.open(EngineOptions(model=str(directory), num_threads=2, noise="lowrank"))
    whole = engine.generate(None, PROMPTS[:1], GREEDY)[0][0]
    text = engine.assets.tokenizer.decode(whole.token_ids[3])
    sampling = dataclasses.replace(GREEDY, stop_strings=(text[-1],))
    ended = engine.generate(None, PROMPTS, sampling)
    assert ended == reference.generate(None, PROMPTS, sampling)
    assert ended[0][0].finished and len(ended[0][0].token_ids) <= 4


def test_an_end_token_is_the_last_token_of_a_completion(llama: tuple[Path, Any]) -> None:
    _, engine = llama
    whole = engine.generate(None, PROMPTS[:1], GREEDY)[0][0]
    before = engine.assets.end_tokens
    try:
        engine.assets.end_tokens = frozenset({whole.token_ids[2]})
        ended = engine.generate(None, PROMPTS[:1], GREEDY)[0][0]
    finally:
        engine.assets.end_tokens = before
    first = whole.token_ids.index(whole.token_ids[2])
    assert ended.token_ids == whole.token_ids[: first + 1] and ended.finished


def test_sampled_tokens_repeat_and_differ_between_completions(llama: tuple[Path, Any]) -> None:
    _, engine = llama
    sampling = dataclasses.replace(GREEDY, temperature=1.0, num_generations=3)
    members = perturbations(1)
    first = engine.generate_population(members, PROMPTS, sampling)
    assert first == engine.generate_population(members, PROMPTS, sampling)
    assert any(len({completion.token_ids for completion in row}) > 1 for member in first for row in member)
    other = dataclasses.replace(sampling, step=1)
    assert first != engine.generate_population(members, PROMPTS, other)


def test_a_prompt_beyond_the_context_is_refused(llama: tuple[Path, Any]) -> None:
    _, engine = llama
    long = Prompt(7, "", tuple([5] * engine.max_context))
    with pytest.raises(UserError, match="the prompt of row 7 has"):
        engine.generate(None, [long], GREEDY)


def test_a_stop_request_ends_the_call_and_leaves_no_request(llama: tuple[Path, Any]) -> None:
    _, engine = llama
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        engine.generate(None, PROMPTS, GREEDY, lambda: next(asked))
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert len(engine.generate(None, PROMPTS, GREEDY)) == len(PROMPTS)


def test_non_finite_logits_are_reported_and_spoil_no_later_answer(llama: tuple[Path, Any]) -> None:
    _, engine = llama
    before = engine.generate(None, PROMPTS, GREEDY)
    members = [*perturbations(1, 1), *perturbations(1, sigma=1e30)[1:]]
    answered = engine.generate_population(members, PROMPTS[:1], GREEDY)
    assert [member[0][0].finite for member in answered] == [True, False, False]
    assert engine.generate(None, PROMPTS, GREEDY) == before


def test_prompts_per_batch_bounds_the_requests_at_a_time(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = llama
    whole = engine.generate(None, PROMPTS, GREEDY)
    waiting: list[int] = []
    step = engine._step

    def counted(vllm: Any, names: dict[str, int], *rest: Any) -> None:
        waiting.append(len(names))
        step(vllm, names, *rest)

    monkeypatch.setattr(engine, "_step", counted)
    monkeypatch.setattr(engine, "prompts_per_batch", 3)
    assert tokens(engine.generate(None, PROMPTS, GREEDY)) == tokens(whole) and set(waiting) == {3, 1}


def test_a_job_for_another_theta_is_refused(llama: tuple[Path, Any]) -> None:
    _, engine = llama
    job = GroupJob((0,), tuple(perturbations(1, 1)), "0" * 32, tuple(PROMPTS), GREEDY)
    with pytest.raises(ValueError, match="a job for theta 0000"):
        next(iter(engine.answers([job])))


REFUSED = """
import sys
from estune.engines.base import EngineOptions
from estune.engines.vllm.engine import VLLMEngine
from estune.errors import UserError

if __name__ == "__main__":
    try:
        VLLMEngine.open(EngineOptions(model=sys.argv[1]))
    except UserError as error:
        print("refused:", error)
"""


def test_a_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    save_tiny_for_vllm("qwen3_moe", tmp_path)
    (tmp_path / "refused.py").write_text(REFUSED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "refused.py"), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    reason = done.stdout.partition("refused: ")[2]
    assert "Qwen3Moe" in reason and "experts" in reason and "use --engine hf" in reason


def test_two_ranks_give_the_same_fingerprint_and_leave_nothing(tmp_path: Path) -> None:
    save_tiny_for_vllm("qwen2", tmp_path)
    reference = HFEngine.open(EngineOptions(model=str(tmp_path), num_threads=2, noise="lowrank"))
    before = set(os.listdir("/dev/shm"))
    engine = opened(tmp_path, noise="lowrank", tensor_parallel_size=2)
    try:
        members = perturbations(1)
        answered = engine.generate_population(members, PROMPTS, GREEDY)
        assert list(map(tokens, answered)) == list(map(tokens, reference.generate_population(members, PROMPTS, GREEDY)))
        update = make_update([p.member for p in members], [1.0, -0.5, -0.5], 0.01, rank=1)
        assert engine.apply(update).checksum == reference.apply(update).checksum
        assert tokens(engine.generate(None, PROMPTS, GREEDY)) == tokens(reference.generate(None, PROMPTS, GREEDY))
        assert engine.fingerprint() == reference.fingerprint()
    finally:
        engine.stop()
    assert {name for name in set(os.listdir("/dev/shm")) - before if "vllm" in name} == set()


KILLED = """
import sys, time
from estune.engines.base import EngineOptions
from estune.engines.vllm.engine import VLLMEngine

if __name__ == "__main__":
    engine = VLLMEngine.open(EngineOptions(model=sys.argv[1], num_threads=1, tensor_parallel_size=2))
    print("ready", flush=True)
    time.sleep(3600)
"""


def test_a_killed_process_leaves_no_workers_and_no_memory(tmp_path: Path) -> None:
    save_tiny_for_vllm("llama", tmp_path)
    (tmp_path / "killed.py").write_text(KILLED)
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "killed.py"), str(tmp_path)], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    while "ready" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    while group_lives(process.pid):  # pytest's own limit ends a wait for workers that stay
        time.sleep(0.2)
    assert {name for name in set(os.listdir("/dev/shm")) - before if "vllm" in name} == set()


def group_lives(session: int) -> bool:
    """Return whether a process of a session runs."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


def test_a_run_has_the_steps_of_the_transformers_engine(tmp_path: Path) -> None:
    """Same configuration, seeds and rewards: every step's record is equal but for the hash that chains it."""
    steps = {}
    for engine in ("hf", "vllm"):
        run = tmp_path / engine
        command = [
            sys.executable, "-m", "estune", "train", "--engine", engine, "--model", "tiny", "--task", "countdown",
            "--max_steps", "2", "--population_size", "6", "--batch_size", "4", "--sigma", "0.01", "--noise", "lowrank",
            "--learning_rate", "0.005", "--max_completion_length", "16", "--num_threads", "2", "--report_to", "none",
            "--output_dir", str(run),
        ]  # fmt: skip
        subprocess.run(command, check=True, cwd=tmp_path)
        lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        steps[engine] = [{k: v for k, v in line.items() if k != "hash"} for line in lines[1:]]
    assert steps["hf"] == steps["vllm"] and len(steps["hf"]) >= 2
