"""Killed at any instant, a resumed run ends in the same bytes as an uninterrupted one (invariant 5)."""

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress

import pytest
from command_line import (
    MARK,
    TOY,
    assert_no_process,
    assert_same_tree,
    journal,
    metrics,
    tree,
    write_rewards,
)

NEVER = 1 << 30
HELD = ("--reward_funcs", "rewards.py:slow", "--reward_timeout_s", 3600)  # held as long as a test likes


def assert_whole(run_dir, max_steps):
    """Nothing half-written, nothing missing, nothing twice."""
    assert [r["step"] for r in metrics(run_dir) if "reward" in r] == list(range(1, max_steps + 1))
    times = [r["train_time_s"] for r in metrics(run_dir, times=True) if "reward" in r]  # what a comparison counts
    assert times == sorted(times) and times[0] > 0
    evaluated = [r["step"] for r in metrics(run_dir) if "eval_reward" in r]
    assert evaluated == sorted(set(evaluated))
    assert not (run_dir / "pending.jsonl").exists()
    assert not [path for path in run_dir.rglob("*") if "partial" in path.name]


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.e2e)])
def test_dying_at_every_write_to_the_file_system(zygote, place, every):
    """A run of 3 steps is killed before ``every``-th of its writes, and in the middle of appends; then resumed."""
    options = (
        *TOY,
        "--max_steps",
        3,
        "--population_size",
        2,
        "--batch_size",
        2,
        "--num_threads",
        1,
        "--sigma",
        0.1,
        "--reward_isolation",
        "inline",
        "--eval_steps",
        2,
        "--eval_rows",
        2,
        "--log_completions",
        "--save_steps",
        1,
        "--save_total_limit",
        2,
    )
    whole = place / "whole"
    whole.mkdir()
    done = zygote.run(options, whole, kill_at=NEVER)
    assert done.code == 0, done
    n_writes = int(re.search(r"writes (\d+)", done.out)[1])
    assert n_writes > 60
    wanted = tree(whole / "run")
    assert_whole(whole / "run", 3)
    for kill_at in range(1, n_writes + 1, every):
        at = place / f"at_{kill_at}"
        at.mkdir()
        assert zygote.run(options, at, kill_at=kill_at).code == -signal.SIGKILL, kill_at
        done = zygote.run([*options, "--resume"], at)
        assert done.code == 0, (kill_at, done)
        assert_whole(at / "run", 3)
        assert_same_tree(tree(at / "run"), wanted)


BEST = (*TOY, "--max_steps", 4, "--population_size", 4, "--batch_size", 4, "--sigma", 0.1, "--learning_rate", 0.2,
        "--num_threads", 1, "--reward_isolation", "inline", "--eval_steps", 1,
        "--load_best_model_at_end")  # fmt: skip


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.e2e)])
@pytest.mark.parametrize(("more", "steps"), [((), 4), (("--save_steps", 1, "--early_stopping_patience", 2), 3)])
def test_dying_at_every_write_of_a_run_that_returns_to_its_best_step(zygote, place, every, more, steps):
    """From a copy of theta_0 in the run, and from a checkpoint; the run of the second case stops early."""
    options, whole = (*BEST, *more), place / "whole"
    whole.mkdir()
    done = zygote.run(options, whole, kill_at=NEVER)
    assert done.code == 0 and f"step 1 of {steps}" in done.out, done
    n_writes = int(re.search(r"writes (\d+)", done.out)[1])
    wanted = tree(whole / "run")
    assert json.loads(wanted["es_state.json"])["step"] == 1
    for kill_at in sorted({*range(1, n_writes + 1, every), *range(n_writes - 16, n_writes + 1, 2 if every > 1 else 1)}):
        at = place / f"at_{kill_at}"
        at.mkdir()
        assert zygote.run(options, at, kill_at=kill_at).code == -signal.SIGKILL, kill_at
        done = zygote.run([*options, "--resume"], at)
        assert done.code == 0, (kill_at, done)
        assert_whole(at / "run", steps)
        assert_same_tree(tree(at / "run"), wanted)


@pytest.mark.parametrize("every", [10, pytest.param(2, marks=pytest.mark.e2e)])
@pytest.mark.parametrize("again", ["--overwrite", "--resume"])
def test_dying_while_another_run_is_overwritten(zygote, place, again, every):
    options = (
        *TOY,
        "--max_steps",
        1,
        "--population_size",
        2,
        "--num_threads",
        1,
        "--reward_isolation",
        "inline",
        "--eval_steps",
        1,
        "--eval_rows",
        2,
        "--sigma",
        0.1,
        "--learning_rate",
        0.1,
        "--save_steps",
        0,
        "--no_log_completions",
    )
    old, whole = place / "old", place / "whole"
    for at, extra in ((old, ("--sigma", 0.7, "--log_completions", "--save_steps", 1)), (whole, ())):
        at.mkdir()
        assert zygote.run((*options, *extra), at).code == 0
    wanted = tree(whole / "run")
    for kill_at in range(1, 60, every):
        at = place / f"at_{kill_at}"
        shutil.copytree(old, at)
        if zygote.run((*options, "--overwrite"), at, kill_at=kill_at).code != -signal.SIGKILL:
            break
        done = zygote.run((*options, again), at)
        if again == "--resume" and "sigma from 0.7" in done.err:  # nothing was deleted yet: the old run is whole
            assert_same_tree(tree(at / "run"), tree(old / "run"))
            continue
        assert done.code == 0, (kill_at, done)
        assert_same_tree(tree(at / "run"), wanted)
    assert kill_at > 20, "the run ended before it was killed"


@pytest.mark.parametrize("n_kills", [4, pytest.param(20, marks=pytest.mark.e2e)])
def test_kills_at_random_instants(zygote, place, n_kills):
    """Slow rewards in worker processes, checkpoints and evaluations; killed over as many runs as it takes."""
    options = (
        *TOY,
        "--max_steps",
        6,
        "--population_size",
        6,
        "--batch_size",
        3,
        "--sigma",
        0.1,
        "--reward_workers",
        2,
        "--reward_funcs",
        "rewards.py:slow",
        "--save_steps",
        2,
        "--eval_steps",
        3,
        "--eval_rows",
        4,
    )
    whole = place / "whole"
    whole.mkdir()
    write_rewards(whole)
    assert zygote.run(options, whole, env={"CALLS": str(place / "calls")}).code == 0
    wanted, n_calls = tree(whole / "run"), lines_of(place / "calls")
    chance = random.Random(20)
    mark = f"crash-{os.getpid()}"
    kills = finished = 0
    while kills < n_kills or (place / f"run_{finished}").exists():
        at = place / f"run_{finished}"
        if not at.exists():
            at.mkdir()
            write_rewards(at)
        calls = place / f"calls_{kills}_{finished}"
        pid = zygote.start([*options, "--resume"], at, env={MARK: mark, "CALLS": str(calls)})
        if kills < n_kills:  # at a point that its calls of the reward show, and a random moment later
            after = chance.randrange(n_calls * 6 // 10)
            while lines_of(calls) < after and os.path.exists(f"/proc/{pid}"):
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.05))
            with suppress(ProcessLookupError):  # it has just finished
                os.killpg(pid, signal.SIGKILL)
        done = zygote.wait()
        assert done.code in (0, -signal.SIGKILL), done
        kills += done.code != 0
        if done.code == 0:
            assert_whole(at / "run", 6)
            assert_same_tree(tree(at / "run"), wanted)
            finished += 1
    assert finished >= min(2, n_kills // 4)
    assert_no_process(mark)


def test_finished_members_of_an_unfinished_step_are_not_evaluated_again(zygote, place):
    write_rewards(place)
    options = (*TOY, *HELD, "--max_steps", 2, "--population_size", 8, "--batch_size", 3)
    first, second = place / "first", place / "second"
    pid = zygote.start(options, place, env={"CALLS": str(first), "HOLD_AFTER": "3"})
    pending = place / "run" / "pending.jsonl"
    while lines_of(pending) < 3:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert zygote.wait().code == -signal.SIGKILL
    finished = pending.read_bytes().count(b"\n")
    lines = [json.loads(line) for line in pending.read_text().splitlines()]
    for line in lines:
        line["result"]["generate_s"] = 1e6
        del line["hash"]
    pending.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"after":"0123')  # the one being written
    assert zygote.run([*options, "--resume"], place, env={"CALLS": str(second), "REWARD_S": "0"}).code == 0
    assert finished == 3
    assert len(second.read_text().splitlines()) == (8 - finished) + 1 + 8  # theta beside the first step's members
    times = [record["train_time_s"] for record in metrics(place / "run", times=True)]
    assert all(3e6 <= seconds < 4e6 for seconds in times)  # they are not free
    assert len(first.read_text().splitlines()) >= finished


def cut_off(zygote, place, options, lines):
    """Kill a step when as many groups are on disk as the rewards may score; return the stored groups."""
    pid = zygote.start(options, place, env={"CALLS": str(place / "first"), "HOLD_AFTER": str(lines)})
    pending = place / "run" / "pending.jsonl"
    while lines_of(pending) < lines:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert zygote.wait().code == -signal.SIGKILL
    assert lines_of(pending) == lines
    return {json.loads(line)["group"] for line in pending.read_text().splitlines()}


def calls_of_a_resume(zygote, place, options):
    """Resume a run; return the number of groups that its rewards score."""
    environment = {"CALLS": str(place / "second"), "REWARD_S": "0"}
    assert zygote.run([*options, "--resume"], place, env=environment).code == 0
    return len((place / "second").read_text().splitlines())


BATCHED = (*TOY, *HELD, "--max_steps", 1, "--population_size", 8, "--batch_size", 3, "--noise", "lowrank")


def test_a_batch_of_members_is_evaluated_as_a_whole(zygote, place):
    """A row's answer may depend on its neighbours by rounding, so members that share a forward pass stay together."""
    write_rewards(place)
    options = (*BATCHED, "--members_per_batch", 4)
    cut_off(zygote, place, options, 6)
    assert calls_of_a_resume(zygote, place, options) == 4 + 1  # theta beside the members
    assert len(journal(place / "run")[1]["fitness"]) == 8


@pytest.mark.parametrize(
    ("batch", "batches"), [(1, [{each} for each in range(9)]), (4, [{0, 1, 2, 3}, {4, 5, 6, 7, 8}])]
)
def test_theta_that_answers_with_the_members_is_stored_with_them(zygote, place, batch, batches):
    """With batches of 4 of 8 members, theta (8) belongs to the second batch; otherwise it is a batch of its own."""
    write_rewards(place)
    options = (*BATCHED, "--members_per_batch", batch, "--step_control", "drift")
    stored = cut_off(zygote, place, options, 5)
    again = calls_of_a_resume(zygote, place, options)
    assert again == sum(len(each) for each in batches if not each <= stored)
    [record] = metrics(place / "run")
    assert record["es/theta_fitness"] is not None and record["num_evaluations"] == 3 * 9


def test_a_torn_line_of_metrics_costs_nothing(zygote, place):
    options = (*TOY, "--max_steps", 3, "--population_size", 4)
    assert zygote.run(options, place).code == 0
    wanted = metrics(place / "run")
    path = place / "run" / "metrics.jsonl"
    longer = [*options, "--max_steps", "4", "--resume"]
    path.write_bytes(path.read_bytes() + b'{"reward": 0.2')
    assert zygote.run(longer, place).code == 0
    assert metrics(place / "run")[:3] == wanted
    assert_whole(place / "run", 4)


def test_a_checkpoint_of_a_step_that_the_journal_lost_is_not_believed(zygote, place):
    """The journal's last lines are cut off (a disk that lied about fsync): the run goes on from what is proven."""
    options = (*TOY, "--max_steps", 4, "--population_size", 4, "--save_steps", 1)
    assert zygote.run(options, place).code == 0
    wanted = tree(place / "run")
    path = place / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert [line["kind"] for line in journal(place / "run")] == ["header"] + ["step", "checkpoint"] * 4
    path.write_bytes(b"".join(lines[:4]))
    assert zygote.run([*options, "--resume"], place).code == 0
    assert_same_tree(tree(place / "run"), wanted)


LOWRANK = ("--noise", "lowrank", "--rank", 2, "--members_per_batch", 3)
CONTROLLED = (*LOWRANK, "--step_control", "drift")  # theta answers in the last batch of members


@pytest.mark.parametrize("noise", [pytest.param((), marks=pytest.mark.e2e), LOWRANK, CONTROLLED], ids=str)
@pytest.mark.parametrize("model", ["tiny"])
def test_three_kills_of_a_language_model(torch_zygote, place, request, model, noise):
    if model == "tiny":
        task = ("--task", "countdown", "--eval_steps", 4, "--eval_rows", 3)
    else:
        write_rewards(place)
        (place / "rows.jsonl").write_text("".join(f'{{"prompt": "count to {i}: "}}\n' for i in range(6)))
        task = ("--dataset_name", "rows.jsonl", "--reward_funcs", "rewards.py:vowels")
        model = request.getfixturevalue("tiny_llama")
    options = (
        "train",
        "--model",
        model,
        *task,
        *noise,
        "--max_steps",
        6,
        "--population_size",
        4,
        "--batch_size",
        3,
        "--sigma",
        0.05,
        "--max_completion_length",
        12,
        "--save_steps",
        2,
        "--report_to",
        "none",
        "--num_threads",
        1,
        "--output_dir",
        "run",
        "--resume",
    )
    whole, killed = place / "whole", place / "killed"
    for at in (whole, killed):
        at.mkdir()
        for file in place.glob("r*.*"):
            (at / file.name).write_bytes(file.read_bytes())
    done = torch_zygote.run(options, whole, kill_at=NEVER)
    assert done.code == 0, done
    n_writes = int(re.search(r"writes (\d+)", done.out)[1])
    mark = f"model-{os.getpid()}"
    chance = random.Random(3)
    for _ in range(3):  # at a random write of the first third of what is left to do, at least
        kill_at = chance.randint(n_writes // 6, n_writes // 3)
        assert torch_zygote.run(options, killed, env={MARK: mark}, kill_at=kill_at).code == -signal.SIGKILL
    assert torch_zygote.run(options, killed).code == 0
    assert_whole(killed / "run", 6)
    assert_same_tree(tree(killed / "run"), tree(whole / "run"))
    assert_no_process(mark)
