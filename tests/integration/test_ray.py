"""Ray's workers: the journal is that of one process whatever happens to them; messages are small, without weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Done
from script_loading import loaded

from estune import ESConfig, ESTrainer
from estune.compare.config import from_mapping
from estune.compare.measure import measure_trial
from estune.compare.plan import configuration
from estune.engines.base import EngineOptions
from estune.engines.toy import ToyEngine
from estune.errors import UserError
from estune.es.population import members_for_step, noise_of
from estune.es.types import Completion, GroupAnswer, GroupJob, Interrupted, Perturbation, Prompt, Sampling
from estune.es.update import Update, make_update
from estune.train import setup

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore"),  # Ray leaves sockets and processes to the interpreter's end
]

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = Sampling(seed=0, step=0, max_completion_length=40)
PROMPTS = tuple(Prompt(index, f"x[{index}]", (index, 7)) for index in range(4))
SHARE = {"CPU": 0.5}
TOY = dict(
    engine="toy", task="quadratic", population_size=8, sigma=0.05, max_steps=6, save_steps=2, eval_steps=2,
    report_to=["none"],
)  # fmt: skip
TINY = dict(
    model="tiny", task="countdown", population_size=6, batch_size=8, max_completion_length=24, max_steps=2,
    eval_steps=2, eval_rows=16, report_to=["none"], num_threads=1,
)  # fmt: skip


class SlowToy(ToyEngine):
    """Takes a while for each answer, and is stuck at the prompt ``x[9]`` until it is asked to stop."""

    def generate(self, perturbation: Any, prompts: Any, sampling: Any, should_stop: Any = lambda: False) -> Any:
        time.sleep(0.1)
        while any(prompt.text == "x[9]" for prompt in prompts):
            if should_stop():
                raise Interrupted
            time.sleep(0.01)
        return super().generate(perturbation, prompts, sampling, should_stop)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of this process, with room for all workers; yields its address."""
    from estune.engines.ray import cluster as ours
    from estune.engines.ray.cluster import Limits

    connection = ours.connect(Limits(1, {"CPU": 0.1}, 60.0))
    import ray

    yield ray.get_runtime_context().gcs_address
    connection.close()


@pytest.fixture
def workers(cluster: str) -> Iterator[Any]:
    """Return a function that opens an engine with workers, which end with the test."""
    from estune.engines.ray.cluster import Limits
    from estune.engines.ray.engine import RayEngine

    opened = []

    def open_engine(engine: Any = ToyEngine, count: int = 2, **options: Any) -> Any:
        given = EngineOptions(**{"model": engine.name, **options})
        opened.append(RayEngine(engine, given, Limits(count, {"CPU": 0.1}, 30.0)))
        return opened[-1]

    yield open_engine
    for engine in opened:
        engine.stop()


def jobs(engine: Any, prompts: tuple[Prompt, ...] = PROMPTS, count: int = 12) -> list[GroupJob]:
    members = [Perturbation(member, noise_of(0.1)) for member in members_for_step(0, 0, count, False)]
    return [GroupJob((i,), (member,), engine.theta_checksum, prompts, SAMPLING) for i, member in enumerate(members)]


def update(step: int, **options: Any) -> Update:
    return make_update(members_for_step(0, step, 4, False), [1.0, -1.0, 0.5, 0.25], 0.1, **options)


def answered(engine: Any, asked: list[GroupJob]) -> dict[tuple[int, ...], Any]:
    return {answer.indices: answer.completions for answer in engine.answers(asked)}


def process_of(handle: Any) -> int:
    return int(handle.opened.node.rpartition(" ")[2])


# --- whole runs -------------------------------------------------------------------------------------------------------


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def files_of(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("journal.jsonl", "model.safetensors")}


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (TOY, (1, 2, 3)),
        ({**TINY, "noise": "lowrank", "members_per_batch": 2}, (3,)),
        ({**TINY, "temperature": 1.0, "num_generations": 2, "antithetic": True, "weight_decay": 0.1,
          "weight_decay_anchor": "base"}, (2,)),
    ],
    ids=["toy", "low rank", "full rank, sampled, anchored"],
)  # fmt: skip
def test_the_number_of_workers_changes_no_bit(
    cluster: str, tmp_path: Path, options: dict[str, Any], counts: tuple[int, ...]
) -> None:
    ESTrainer(args=ESConfig(**options, output_dir=str(tmp_path / "0"))).train()
    wanted = files_of(tmp_path / "0")
    for count in counts:
        args = ESConfig(**options, output_dir=str(tmp_path / str(count)), num_workers=count, worker_resources=SHARE)
        trainer = ESTrainer(args=args)
        assert files_of(trainer.train()) == wanted
        trainer.engine.stop()
    records, alone = (metrics_of(tmp_path / str(count)) for count in (counts[-1], 0))
    assert [record for record in records if "eval_reward" in record] == [r for r in alone if "eval_reward" in r]
    assert [(record["step"], "reward" in record) for record in records] == [(r["step"], "reward" in r) for r in alone]
    steps = [record for record in records if "reward" in record]
    assert all(record["es/workers"] == counts[-1] and record["es/bytes_received"] > 0 for record in steps)
    assert all(0 <= record["es/idle_share"] <= 1 for record in steps)
    if options is TOY:  # a step in which the workers know all prompts
        assert min(record["es/bytes_sent"] for record in steps[2:]) < 500 * TOY["population_size"]


def test_rewards_in_workers_are_the_same(cluster: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"x[{i}]", "wanted": 0.0} for i in range(6)]
    options = dict(engine="toy", task="quadratic", population_size=4, batch_size=6, max_steps=2, report_to=["none"])
    done = {}
    for name, more in (
        ("here", {}),
        ("there", dict(num_workers=2, worker_resources=SHARE, reward_placement="workers")),
    ):
        args = ESConfig(**options, output_dir=str(tmp_path / name), **more)
        done[name] = ESTrainer("toy", _near_one, args, rows).train()
    assert files_of(done["here"]) == files_of(done["there"])


def _near_one(completions: list[str], **_: Any) -> list[float]:
    return [-abs(float(text) - 1.0) for text in completions]


def test_an_actor_of_rewards_that_dies_is_replaced(cluster: str) -> None:
    from estune.engines.ray import cluster as ours
    from estune.rewards.pool import RewardBatch
    from estune.rewards.remote import RemotePool

    connection = ours.connect(ours.Limits(1, {"CPU": 0.1}, 60.0))
    batch = RewardBatch(["p"] * 3, ["1", "2", "x"], [[1]] * 3)
    with RemotePool([_near_one], ["near"], timeout_s=30, workers=1, actors=2, connection=connection) as pool:
        first = pool.submit(batch).result()
        assert first.rewards[:2, 0].tolist() == [0.0, -1.0] and first.failed[:, 0].tolist() == [False, False, True]
        import ray

        for actor in pool._actors:
            ray.kill(actor)
        again = [pool.submit(batch).result() for _ in range(3)]
        assert all(np.array_equal(each.failed, first.failed) for each in again)


def test_a_resume_may_change_the_number_of_workers(cluster: str, tmp_path: Path) -> None:
    ESTrainer(args=ESConfig(**TOY, output_dir=str(tmp_path / "whole"))).train()
    for steps, count in ((2, 2), (3, 0), (5, 1), (6, 2)):
        more = dict(num_workers=count, worker_resources=SHARE) if count else {}
        args = ESConfig(**TOY | dict(max_steps=steps), output_dir=str(tmp_path / "parts"), resume=steps > 2, **more)
        ESTrainer(args=args).train()
    assert files_of(tmp_path / "parts")["model.safetensors"] == files_of(tmp_path / "whole")["model.safetensors"]


@pytest.mark.parametrize(
    ("command", "workers"),
    [
        (
            (
                "evaluate",
                "--model",
                "tiny",
                "--task",
                "countdown",
                "--limit",
                24,
                "--batch_check",
                "always",
                "--n_samples",
                2,
                "--reference",
                "tiny",
            ),
            2,
        ),
        (("probe", "--model", "tiny", "--task", "countdown", "--batch_size", 4, "--sigmas", 0.01), 1),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_evaluate_and_probe_use_workers(
    cluster: str, call: Callable[..., Done], command: tuple[Any, ...], workers: int
) -> None:
    found = []
    for more in ((), ("--num_workers", workers, "--worker_resources", '{"CPU": 0.1}')):
        done = call(*command, "--json", "--num_threads", 1, *more)
        assert done.code == 0, done.err
        found.append(json.loads(done.out))
    assert found[0] == found[1]


def test_a_comparison_measures_with_workers(cluster: str, tmp_path: Path) -> None:
    """Other methods train in their own process, and what workers measure is what one process measures."""
    tuning = {"evaluations": 32, "rows": 8}
    given = {"output_dir": str(tmp_path), "task": "countdown", "models": {"tiny": "tiny"}, "seeds": [0],
             "budget": {"evaluations": 64, "time_s": 0}, "tuning": tuning,
             "methods": {name: {"method": name} for name in ("es", "grpo")}}  # fmt: skip
    settings = {"max_completion_length": 16, "num_threads": 1}
    measured = {}
    for count in (0, 1):
        more = {"num_workers": count, "worker_resources": SHARE} if count else {}
        comparison = from_mapping({**given, "settings": {**settings, **more}})
        assert [configuration(comparison, "tiny", name, {}, 0).num_workers for name in ("es", "grpo")] == [count, 0]
        measure_trial(comparison, "tiny", tmp_path / f"{count}.json", {})
        measured[count] = json.loads((tmp_path / f"{count}.json").read_text())
    assert measured[0] == measured[1]


@pytest.fixture
def chaos() -> Iterator[Any]:
    """`benchmarks/chaos.py`, with shorter times, and a directory with a short path for clusters of the runs' own."""
    temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with loaded("benchmarks/chaos.py") as program:
        program.SILENCE_S, program.PAUSE_S, program.temporary = 20.0, (2.0, 4.0), temporary
        yield program
    shutil.rmtree(temporary)


def test_killed_and_stopped_workers_change_no_bit_and_leave_nothing(chaos: Any, tmp_path: Path) -> None:
    chaos.KILLS_BEFORE_STOP, chaos.MOST = 1, 2  # a job that three workers die of ends the run, on a slow machine too
    chaos.OPTIONS.update(population_size=8, batch_size=16, max_completion_length=32, save_steps=2)
    subprocess.run(chaos.command(tmp_path / "quiet", 6, 0), check=True, capture_output=True)
    row = chaos.disturbed(tmp_path / "run", 6, chaos.temporary)
    row |= chaos.judge(tmp_path / "run", tmp_path / "quiet", chaos.temporary)
    assert row["same_bytes"] and not row["left_behind"], row


def test_a_killed_run_leaves_nothing_and_is_resumed_with_other_workers(chaos: Any, tmp_path: Path) -> None:
    chaos.OPTIONS.clear()
    chaos.OPTIONS.update(TOY, save_steps=40, eval_steps=0, report_to="none", console="lines")
    subprocess.run(chaos.command(tmp_path / "quiet", 200, 0), check=True, capture_output=True)
    row = chaos.driver_killed(tmp_path / "run", 200, chaos.temporary, counts=(2, 1))
    row |= chaos.judge(tmp_path / "run", tmp_path / "quiet", chaos.temporary)
    assert row["same_bytes"] and not row["left_behind"], row


def command(place: Path, *options: str) -> list[str]:
    flags = [part for name, value in TOY.items() if name != "report_to" for part in (f"--{name}", str(value))]
    return [
        sys.executable,
        "-m",
        "estune",
        "train",
        *flags,
        "--report_to",
        "none",
        "--output_dir",
        str(place),
        *options,
    ]


def test_a_signal_saves_and_the_run_resumes_without_workers(cluster: str, tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    there = ("--num_workers", "2", "--worker_resources", '{"CPU": 0.1}', "--worker_timeout_s", "99")
    slow = ("--max_steps", "2000", "--eval_steps", "0", "--save_steps", "0")
    run = tmp_path / "run"
    with subprocess.Popen(command(run, *there, *slow), env=environment, stdout=subprocess.PIPE, text=True) as process:
        while not (run / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
    assert "stopped after" in output and list(run.glob("checkpoint-*")), output
    steps = len((run / "metrics.jsonl").read_text().splitlines()) + 2
    again = subprocess.run(
        [sys.executable, "-m", "estune", "train", "--resume", "--output_dir", str(run), "--num_workers", "0",
         "--max_steps", str(steps)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0 and "done; the model is in" in again.stdout, again.stderr


# --- workers that fail ------------------------------------------------------------------------------------------------


def test_a_worker_killed_while_it_answers_costs_no_answer(workers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine = workers(SlowToy)
    asked = jobs(engine)
    found = {}
    for number, answer in enumerate(engine.answers(asked)):
        found[answer.indices] = answer.completions
        if number == 1:
            os.kill(process_of(engine._pool.ready[0]), signal.SIGKILL)
    assert found == answered(ToyEngine(), asked)
    assert "is lost: ActorDiedError" in capsys.readouterr().err


def test_a_worker_that_joins_late_catches_up(workers: Any, tmp_path: Path) -> None:
    engine, alone = workers(), ToyEngine()
    for step in range(3):
        assert engine.apply(update(step)).checksum == alone.apply(update(step)).checksum
    alone.save(tmp_path / "saved", float32=True)
    engine.saved(tmp_path / "saved")
    engine.apply(update(3))
    alone.apply(update(3))
    for handle in list(engine._pool.ready):
        os.kill(process_of(handle), signal.SIGKILL)
    moved, wanted = engine.apply(update(4)), alone.apply(update(4))
    assert (moved.checksum, moved.norm, moved.ratio) == (wanted.checksum, wanted.norm, wanted.ratio)
    assert engine.fingerprint() == alone.fingerprint() and engine.checksum() == alone.checksum()
    while len(engine._pool.ready) < 2:
        engine._pool.tend(0.1)
    assert engine._pool.history.start() == (3, tmp_path / "saved")


def test_a_worker_whose_theta_differs_is_replaced(workers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    engine, alone = workers(count=3), ToyEngine()
    ray.get(engine._pool.ready[0].actor.do.remote("apply", [update(9)]))
    engine.apply(update(0))
    assert engine.fingerprint() == (alone.apply(update(0)), alone.fingerprint())[1]
    assert "its theta differs from that of other workers after the update" in capsys.readouterr().err
    ray.get(engine._pool.ready[0].actor.do.remote("apply", [update(9)]))
    assert engine.checksum() == alone.checksum()
    assert "its theta has changed in memory" in capsys.readouterr().err


def test_two_workers_that_differ_both_start_again(workers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    engine, alone = workers(count=2), ToyEngine()
    ray.get(engine._pool.ready[0].actor.do.remote("apply", [update(9)]))
    assert engine.apply(update(0)).checksum == alone.apply(update(0)).checksum
    assert capsys.readouterr().err.count("its theta differs") == 2 and len(engine._pool.ready) == 2


def test_a_start_that_is_gone_is_told(workers: Any, tmp_path: Path) -> None:
    engine, alone = workers(count=1), ToyEngine()
    alone.apply(update(0))
    alone.save(tmp_path / "saved", float32=True)
    engine.load_weights(tmp_path / "saved")
    assert engine.checksum() == alone.checksum()
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    os.kill(process_of(engine._pool.ready[0]), signal.SIGKILL)
    with pytest.raises(UserError, match="the checkpoint with which this process began is gone"):
        engine.apply(update(1))


def test_workers_return_to_theta_0(workers: Any, tmp_path: Path) -> None:
    """A worker that starts afterwards begins with theta_0, too."""
    engine, alone, base = workers(count=2), ToyEngine(), ToyEngine()
    alone.save(tmp_path / "base", float32=True)
    assert not engine.open_anchor([tmp_path / "nothing"])
    assert engine.open_anchor([tmp_path / "nothing", tmp_path / "base"])
    engine.apply(update(0))
    engine.load_anchor()
    assert engine.checksum() == alone.checksum() and engine.fingerprint() == base.fingerprint()
    os.kill(process_of(engine._pool.ready[0]), signal.SIGKILL)
    assert engine.apply(update(1)).checksum == alone.apply(update(1)).checksum
    engine._pool.wait_for_all()
    assert len(engine._pool.ready) == 2 and engine.checksum() == alone.checksum()


def test_the_best_step_of_a_run_with_workers(cluster: str, tmp_path: Path) -> None:
    """Workers change neither the best step nor the step at which the run stops early."""
    options = {**TOY, "sigma": 0.1, "learning_rate": 0.2, "batch_size": 4, "population_size": 4, "eval_steps": 1,
               "save_steps": 0, "max_steps": 9, "load_best_model_at_end": True}  # fmt: skip
    for patience in (0, 2):
        for count in (0, 2):
            run = tmp_path / f"{patience}-{count}"
            more = dict(num_workers=count, worker_resources=SHARE) if count else {}
            args = ESConfig(**options, output_dir=str(run), early_stopping_patience=patience, **more)
            trainer = ESTrainer(args=args)
            trainer.train()
            trainer.engine.stop()
        alone, together = tmp_path / f"{patience}-0", tmp_path / f"{patience}-2"
        names = ("journal.jsonl", "model.safetensors", "es_state.json", "trainer_state.json")
        assert [(together / name).read_bytes() for name in names] == [(alone / name).read_bytes() for name in names]
        state = json.loads((alone / "es_state.json").read_text())
        assert state["step"] == state["best"]["step"] < state["best"]["global_step"]
        assert (state["best"]["global_step"] < 9) == bool(patience)


def test_an_error_of_the_engine_is_shown(workers: Any) -> None:
    engine = workers(FaultyToy)
    with pytest.raises(UserError, match=r"worker \d .* failed: .*ZeroDivisionError"):
        list(engine.answers(jobs(engine, count=2)))


class FaultyToy(ToyEngine):
    """Has a programming error."""

    def generate(self, *arguments: Any, **options: Any) -> Any:
        return 1 // 0


def test_a_long_job_is_repeated_elsewhere_and_the_first_answer_counts(workers: Any) -> None:
    engine = workers(SlowToy, 3)
    asked = jobs(engine)
    stopped = process_of(engine._pool.ready[0])
    found = {}
    for answer in engine.answers(asked):
        if not found:
            os.kill(stopped, signal.SIGSTOP)
        assert answer.indices not in found
        found[answer.indices] = answer.completions
    os.kill(stopped, signal.SIGCONT)
    assert found == answered(ToyEngine(), asked)


def test_a_request_to_stop_ends_the_answers(workers: Any) -> None:
    engine = workers(SlowToy)
    asked = jobs(engine, (Prompt(9, "x[9]", (1,)),))
    until = time.monotonic() + 1
    with pytest.raises(Interrupted):
        list(engine.answers(asked, lambda: time.monotonic() > until))
    assert len(engine.generate(None, PROMPTS, SAMPLING)) == 4  # the workers are free again


def test_an_error_of_the_user_in_a_worker_is_the_runs(workers: Any) -> None:
    engine = workers(count=1)
    with pytest.raises(UserError, match="the toy engine has no token probabilities"):
        engine.token_logprobs(PROMPTS, [[1]] * 4)
    with pytest.raises(UserError, match="the toy engine knows no model 'nowhere'"):
        workers(model="nowhere")
    with pytest.raises(ValueError, match="a job for theta 00"):
        next(iter(engine.answers([dataclasses.replace(jobs(engine)[0], theta_checksum="00" * 16)])))


def test_a_job_that_kills_its_workers_ends_the_run(workers: Any) -> None:
    engine = workers(DeadlyToy)
    with pytest.raises(UserError, match="3 workers died one after another while answering members 0"):
        list(engine.answers(jobs(engine, count=1)))


class DeadlyToy(ToyEngine):
    """Ends its process instead of an answer."""

    def generate(self, *arguments: Any, **options: Any) -> Any:
        os._exit(9)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(args: ESConfig) -> str:
    with pytest.raises(UserError) as error:
        setup.load_engine(setup.resolve_config(args, 8))
    return str(error.value)


def test_more_workers_than_resources_are_refused(cluster: str) -> None:
    text = refused(ESConfig(**TOY, num_workers=1000, worker_resources={"CPU": 1, "GPU": 2}))
    assert "1000 workers need 1 CPU, 2 GPU each" in text and "it would need 1000 CPU for" in text


def test_this_process_keeps_its_print(cluster: str) -> None:
    from ray.experimental import tqdm_ray

    tqdm_ray.instance()
    assert type(print).__name__ == "builtin_function_or_method"


def test_a_cluster_that_cannot_be_reached_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "estune", "train", "--engine", "toy", "--task", "quadratic", "--num_workers", "1"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")],
        capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Ray's cluster at 127.0.0.1:1 cannot be reached" in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_ray_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = refused(ESConfig(**TOY, num_workers=1))
    assert "num_workers needs the package ray: python -m pip install" in text and "[ray]" in text


def test_a_model_in_memory_needs_this_process(cluster: str) -> None:
    from estune.engines.ray.cluster import Limits
    from estune.engines.ray.engine import RayEngine

    with pytest.raises(UserError, match="a module in memory needs num_workers 0"):
        RayEngine(ToyEngine, EngineOptions(model="toy", module=object()), Limits(1, SHARE, 30.0))


# --- messages ---------------------------------------------------------------------------------------------------------


def test_messages_say_the_same_in_few_bytes() -> None:
    from estune.engines.ray import messages

    members = [*(Perturbation(m, noise_of(0.1, "normal", 2)) for m in members_for_step(0, 0, 30, False)), None]
    prompts = tuple(Prompt(i, f"text {i}", tuple(range(40))) for i in range(8))
    numbers = {prompt: n for n, prompt in enumerate(prompts)}
    sampling = dataclasses.replace(SAMPLING, seed=2**64 - 1, temperature=0.7, top_k=3, stop_strings=("a", "b"))
    job = GroupJob(tuple(range(31)), tuple(members), "0f" * 16, prompts, sampling)
    sent = messages.unpack_prompts(messages.pack_prompts({n: prompt for prompt, n in numbers.items()}, has_text=True))
    assert messages.unpack_job(messages.pack_job(job, numbers), sent) == job
    assert len(messages.pack_job(job, numbers)) < 150 + 31 * 20 + 8 * 4

    rng = np.random.default_rng(0)
    completions = [[[Completion(tuple(rng.integers(0, 9, length).tolist()), bool(length), bool(m))] * 2
                    for length in range(8)] for m in range(31)]  # fmt: skip
    answer = GroupAnswer(job.indices, completions, 1.5, 0.25)
    assert messages.unpack_answer(messages.pack_answer(answer)) == answer

    change = update(0, anchored=True, weight_decay=0.5, rank=3, distribution="rademacher")
    assert messages.unpack_update(messages.pack_update(change)) == change
    moved = ToyEngine().apply(update(0))
    again = messages.unpack_moved(messages.pack_moved(moved), moved.specs)
    assert (again.checksum, again.norm, again.ratio) == (moved.checksum, moved.norm, moved.ratio)
