"""Resume, stop, full disks and replay: what is on disk is always enough."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from command_line import (
    MARK,
    TOY,
    Done,
    assert_no_process,
    assert_refused,
    assert_same_tree,
    journal,
    metrics,
    stamps,
    steps,
    tree,
    weights,
)
from tiers import few, full

WORKERS = (*TOY, "--population_size", 4, "--sigma", 0.1, "--save_steps", 2)
SMALL = (*WORKERS, "--reward_isolation", "inline")
HELD = ("--reward_funcs", "rewards.py:slow", "--reward_timeout_s", 3600)  # a test holds the calls as long as it likes


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", ["absent", "empty"])
def test_resume_where_nothing_was_written_starts_the_run(run, place, directory):
    assert run(*SMALL, "--max_steps", 2).code == 0
    wanted = tree(place / "run")
    shutil.rmtree(place / "run")
    if directory == "empty":
        (place / "run").mkdir()
    assert run(*SMALL, "--max_steps", 2, "--resume").code == 0
    assert_same_tree(tree(place / "run"), wanted)


def test_resume_of_a_finished_run_changes_no_byte(run, place):
    assert run(*SMALL, "--max_steps", 3).code == 0
    before = stamps(place / "run")
    for words in ((*SMALL, "--max_steps", 3, "--resume"), ("train", "--output_dir", "run", "--resume")):
        done = run(*words)
        assert done.code == 0 and "finished" in done.out, done
        assert stamps(place / "run") == before


def test_more_steps_end_where_a_longer_run_ends(run, place):
    assert run(*SMALL, "--max_steps", 7).code == 0
    (place / "run").rename(place / "long")
    assert run(*SMALL, "--max_steps", 3).code == 0
    assert run("train", "--resume", "--output_dir", "run", "--max_steps", 7).code == 0
    assert weights(place / "run") == weights(place / "long")
    assert steps(place / "run") == steps(place / "long")
    assert metrics(place / "run") == metrics(place / "long")
    for step in (2, 4, 6):
        assert tree(place / "run" / f"checkpoint-{step}")["model.safetensors"] == weights(
            place / "long" / f"checkpoint-{step}"
        )
    assert_refused(run("train", "--resume", "--output_dir", "run", "--max_steps", 5), "7 steps", "max_steps 5")


@pytest.mark.parametrize(
    "change",
    [
        ("sigma", 0.2),
        ("learning_rate", 0.3),
        ("population_size", 6),
        ("batch_size", 2),
        ("seed", 1),
        ("antithetic", "true"),
        ("fitness_shaping", "centered_rank"),
        ("noise_distribution", "rademacher"),
        ("weight_decay", 0.1),
        ("max_completion_length", 9),
        ("response_prefix", "0"),
        ("reward_funcs", "rewards.py:logged"),
        ("lr_scheduler_type", "cosine"),
        ("num_threads", 3),
        ("prompts_per_batch", 3),
    ],
)
def test_a_resume_cannot_change_the_trajectory(run, place, base_run, change):
    shutil.copytree(base_run, place / "run")
    before = stamps(place / "run")
    name, value = change
    for max_steps in (3, 4):  # it is finished, or not
        done = run("train", "--resume", "--output_dir", "run", "--max_steps", max_steps, f"--{name}", value)
        assert_refused(done, name)
        assert stamps(place / "run") == before


@pytest.fixture(scope="module")
def base_run(zygote, tmp_path_factory):
    """A finished run of three steps."""
    place = tmp_path_factory.mktemp("base")
    assert zygote.run((*SMALL, "--max_steps", 3), place).code == 0
    return place / "run"


@pytest.mark.parametrize(
    "kept",
    [
        "max_steps",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "eval_rows",
        "logging_steps",
        "report_to",
        "log_completions",
    ],
)
def test_a_resume_may_change_what_moves_no_weight(run, place, base_run, kept):
    shutil.copytree(base_run, place / "run")
    value = {"report_to": "plot", "log_completions": "true"}.get(kept, 5 if kept == "max_steps" else 1)
    more = () if kept == "max_steps" else ("--max_steps", 5)
    more += ("--eval_steps", 1) if kept == "eval_rows" else ()
    done = run("train", "--resume", "--output_dir", "run", f"--{kept}", value, *more)
    assert done.code == 0, done
    assert len(steps(place / "run")) == 5


def test_automatic_values_are_resolved_once(zygote, place):
    """A machine with fewer cores resumes with the threads and workers of the first start, from Python too."""
    script = place / "script.py"
    script.write_text(
        "import sys\nfrom estune import ESConfig, ESTrainer\n"
        "args = ESConfig(engine='toy', task='quadratic', max_steps=int(sys.argv[1]), output_dir='run', resume=True,\n"
        "                population_size=4, report_to=['none'])\n"
        "ESTrainer(args=args).train()\n"
    )
    cores = sorted(os.sched_getaffinity(0))
    done = zygote.run([2], place, script=script)
    assert done.code == 0, done
    config = journal(place / "run")[0]["config"]
    assert config["num_threads"] == len(cores)
    done = zygote.run([4], place, script=script, cores=cores[:1])
    assert done.code == 0, done
    assert journal(place / "run")[0]["config"] == config
    assert len(steps(place / "run")) == 4


def test_two_processes_cannot_run_one_directory(zygote, run, place):
    options = (*WORKERS, *HELD, "--max_steps", 2, "--resume")
    first = subprocess.Popen(
        [sys.executable, "-m", "estune", *map(str, options)],
        cwd=place,
        env={**os.environ, "CALLS": "calls", "HOLD_AFTER": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (place / "run" / "pending.jsonl").exists():
        time.sleep(0.01)
    assert_refused(run(*options), "another process", "run")
    assert_refused(run(*options[:-1], "--overwrite"), "another process", "run")
    (place / "gate").touch()
    assert first.wait() == 0
    assert len(steps(place / "run")) == 2


# --- signals ----------------------------------------------------------------------------------------------------------


def start_and_wait_for(zygote, place, options, lines, **environment):
    """Start a run of 4 members; return its pid once its journal has so many step lines and one member more is finished.

    Every later call of its reward waits for the file `gate`.
    """
    theta = int(lines > 0)  # it answers beside the members of the first step
    environment |= {"CALLS": "calls", "HOLD_AFTER": str(4 * lines + theta + 1)}
    pid = zygote.start(options, place, env=environment)
    path, pending = place / "run" / "journal.jsonl", place / "run" / "pending.jsonl"
    while not (path.exists() and path.read_bytes().count(b'"kind":"step"') >= lines and pending.exists()):
        time.sleep(0.002)
    return pid


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_0(zygote, run, place, number):
    options = (*WORKERS, *HELD, "--max_steps", 5, "--save_steps", 0, "--num_threads", 1)
    assert run(*options, env={"REWARD_S": "0"}).code == 0
    wanted = tree(place / "run")
    shutil.rmtree(place / "run")
    pid = start_and_wait_for(zygote, place, options, 2, **{MARK: f"signal-{os.getpid()}"})
    os.killpg(pid, number)  # as a terminal or a scheduler does: reward workers get it too
    (place / "gate").touch()
    done = zygote.wait()
    assert done.code == 0, done
    done_steps = len(steps(place / "run"))
    assert 2 <= done_steps < 5
    assert "estune: checking that the same prompts give the same answers twice\n" in done.out
    assert f"estune: stopped after {done_steps} steps" in done.out
    assert "; continue with: estune train --resume --output_dir run\n" in done.out
    assert (place / "run" / f"checkpoint-{done_steps}" / "model.safetensors").exists()
    assert_no_process(f"signal-{os.getpid()}")
    assert run(*options, "--resume", env={"REWARD_S": "0"}).code == 0
    assert_same_tree(tree(place / "run", without=("checkpoint-",)), wanted)


def test_a_signal_does_not_wait_for_a_slow_reward(zygote, run, place):
    """For one that would take an hour."""
    options = (*WORKERS, *HELD, "--max_steps", 5, "--population_size", 8)
    pid = zygote.start(options, place, env={"CALLS": "calls", "HOLD_AFTER": "0"})
    while not (place / "calls").exists():
        time.sleep(0.002)
    os.kill(pid, signal.SIGINT)
    done = zygote.wait()
    assert done.code == 0, done
    assert "stopped after 0 steps" in done.out


def test_a_second_signal_quits_at_once(zygote, run, place):
    """Where the first would wait for a score for an hour."""
    options = (*WORKERS, *HELD, "--max_steps", 5)
    mark = f"twice-{os.getpid()}"
    script = place / "script.py"
    script.write_text(
        "import sys\nfrom estune import cli\nfrom estune.train import rollouts\n"
        "assert rollouts.STOP_GRACE_S\nrollouts.STOP_GRACE_S = 3600.0\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    pid = zygote.start(options, place, script=script, env={MARK: mark, "CALLS": "calls", "HOLD_AFTER": "1"})
    while not (place / "run" / "pending.jsonl").exists():
        time.sleep(0.002)
    os.kill(pid, signal.SIGINT)
    while "send the signal again" not in (place / ".err").read_text():
        time.sleep(0.002)
    os.kill(pid, signal.SIGINT)
    assert zygote.wait().code == -signal.SIGINT
    assert_no_process(mark)
    assert run(*options, "--resume", env={"REWARD_S": "0"}).code == 0


# --- full disk --------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(directory, size_bytes):
    """A file system of that size at ``directory``, where this process may mount one; says whether it is there."""
    directory.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(directory)]
    mounted = os.geteuid() == 0 and subprocess.run(options, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)


def assert_disk_full(done, run_dir, wanted):
    """The run ended with one sentence, and all that it leaves is a beginning of the whole run."""
    assert_refused(Done(done.code, "", done.err), "no space left", "--resume")
    left = tree(run_dir, without=("metrics.jsonl",))  # its last line may be torn, which a resume mends
    for name, data in left.items():
        if name.startswith("checkpoint-"):
            assert data == wanted[name], name
    if "journal.jsonl" in left:
        assert wanted["journal.jsonl"].startswith(left["journal.jsonl"])
    numbers = {name.split("/")[0] for name in left if name.startswith("checkpoint-")}
    assert all(f"{number}/es_state.json" in left for number in numbers)
    assert not [name for name in left if "partial" in name]


def test_a_full_disk_ends_in_one_sentence_and_harms_nothing(zygote, run, place):
    """Pages run out at every possible moment of a run, checkpoints and journal included."""
    options = (
        *SMALL,
        "--max_steps",
        4,
        "--save_steps",
        1,
        "--eval_steps",
        2,
        "--num_threads",
        1,
        "--eval_rows",
        2,
        "--batch_size",
        4,
    )
    assert run(*options).code == 0
    wanted = tree(place / "run")
    outcomes = set()
    with small_disk(place / "disk", 200 * 1024) as mounted:
        at = place / "disk"
        for free_pages in range(2, 30, 3) if mounted else ():
            filler = at / "filler"
            for name in (".out", ".err"):
                (at / name).unlink(missing_ok=True)
                (at / name).symlink_to(place / name)
            with filler.open("wb") as file:
                room = os.statvfs(at).f_bavail - free_pages
                file.write(bytes(room * os.statvfs(at).f_bsize))
            done = zygote.run(options, at)
            filler.unlink()
            journal = at / "run" / "journal.jsonl"  # its last line may be torn
            outcomes.add(journal.read_bytes().count(b"\n") if journal.exists() else None)
            if done.code:
                assert_disk_full(done, at / "run", wanted)
            done = zygote.run((*options, "--resume"), at)
            assert done.code == 0, (free_pages, done)
            assert_same_tree(tree(at / "run"), wanted)
            shutil.rmtree(at / "run")
        if mounted:
            assert len(outcomes) >= 4, outcomes  # it failed in several places
    limits = [400, 1500, 2500, 3000, 3500, 4000] if mounted else range(200, 6000, 300)
    outcomes = set()
    for limit in limits:  # bytes per file
        shutil.rmtree(place / "run")
        done = run(*options, file_limit=limit)
        outcomes.add(len(steps(place / "run")) if (place / "run" / "journal.jsonl").exists() else None)
        if done.code:
            assert_disk_full(done, place / "run", wanted)
        assert run(*options, "--resume").code == 0
        assert_same_tree(tree(place / "run"), wanted)
    assert len(outcomes) >= 3, outcomes


# --- replay and damage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        (),
        (
            "--antithetic",
            "--noise_distribution",
            "rademacher",
            "--weight_decay",
            0.1,
            "--weight_decay_anchor",
            "base",
            "--lr_scheduler_type",
            "linear",
        ),
        ("--noise", "lowrank", "--rank", 3, "--antithetic", "--weight_decay", 0.1),
    ],
)
def test_replay_rebuilds_every_step(run, place, extra):
    assert run(*SMALL, "--save_steps", 1, "--max_steps", 3, *extra).code == 0
    before = stamps(place / "run")
    for step in (1, 2, 3):
        done = run("replay", "--run", "run", "--step", step, "--output_dir", f"out_{step}")
        assert done.code == 0 and "verified" in done.out, done
        assert weights(place / f"out_{step}") == weights(place / "run" / f"checkpoint-{step}")
    assert run("replay", "--run", "run", "--output_dir", "out").code == 0
    assert weights(place / "out") == weights(place / "run")
    assert run("replay", "--run", "run", "--step", 0, "--output_dir", "out_0").code == 0
    assert weights(place / "out_0") not in {weights(place / f"out_{step}") for step in (1, 2, 3)}
    assert stamps(place / "run") == before


def test_replay_refuses_what_is_not_the_run(run, place, base_run):
    shutil.copytree(base_run, place / "run")
    assert_refused(run("replay", "--run", "run", "--model", "run/checkpoint-2", "--output_dir", "out"), "fingerprint")
    assert_refused(run("replay", "--run", "run", "--step", 4, "--output_dir", "out"), "between 0 and 3")
    assert_refused(run("replay", "--run", "elsewhere", "--output_dir", "out"), "elsewhere", "journal")
    assert_refused(run("replay", "--run", "run", "--output_dir", "run"), "run", "not an empty")
    assert not (place / "out").exists()


@pytest.mark.parametrize("command", ["resume", "replay"])
@pytest.mark.parametrize("damage", ["flipped", "cut out", "garbage"])
def test_a_damaged_middle_is_refused_and_the_step_named(run, place, base_run, command, damage):
    shutil.copytree(base_run, place / "run")
    path = place / "run" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)  # header, 3 steps, checkpoint lines after steps 2 and 3
    assert [line["kind"] for line in journal(place / "run")] == [
        "header",
        "step",
        "step",
        "checkpoint",
        "step",
        "checkpoint",
    ]
    lines[2] = {
        "flipped": lines[2].replace(b'"fitness":[-', b'"fitness":[', 1),
        "cut out": b"",
        "garbage": b"\x00" * 40 + b"\n",
    }[damage]
    path.write_bytes(b"".join(lines))
    before = stamps(place / "run")
    words = (
        ("train", "--resume", "--output_dir", "run", "--max_steps", 5)
        if command == "resume"
        else ("replay", "--run", "run", "--output_dir", "out")
    )
    assert_refused(run(*words), "journal.jsonl", "damaged", "step 1")
    assert stamps(place / "run") == before


def test_a_torn_last_line_is_repaired(run, place, base_run):
    shutil.copytree(base_run, place / "run")
    assert run("train", "--resume", "--output_dir", "run", "--max_steps", 5).code == 0
    wanted = tree(place / "run")
    for torn in (b'{"kind":"st', b'{"kind":"step"}', b"\x00\x00\x00"):
        shutil.rmtree(place / "run")
        shutil.copytree(base_run, place / "run")
        path = place / "run" / "journal.jsonl"
        path.write_bytes(path.read_bytes() + torn)
        assert run("train", "--resume", "--output_dir", "run", "--max_steps", 5).code == 0
        assert_same_tree(tree(place / "run"), wanted)


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "header cut": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "no tensor file": lambda path: path.write_bytes(b"x" * 999),
    "gone": lambda path: path.unlink(),
}


def with_dtype(path, dtype="XX"):
    """Let the header of a safetensors file name another type for a tensor."""
    data = path.read_bytes()
    assert b'"F32"' in data
    path.write_bytes(data.replace(b'"F32"', f'"{dtype}"'.ljust(5)[:5].encode(), 1))


def with_value(name, value):
    """Return what gives a key of a file of JSON another value."""

    def damage(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return damage


DEEP = "[" * 200_000
STATES = {
    "no step": with_value("step", None),
    "a step of text": with_value("step", "3"),
    "a step that is a fraction": with_value("step", 3.5),
    "a step that is true": with_value("step", True),
    "a negative step": with_value("step", -3),
    "a list for the fingerprint": with_value("fingerprint", [1]),
    "another fingerprint": with_value("fingerprint", "0" * 32),
    "no checksum": with_value("checksum", None),
    "a list of files": with_value("files", ["model.safetensors"]),
    "a number for a hash": with_value("files", {"model.safetensors": 3}),
    "deep": lambda path: path.write_text(DEEP),
    "not UTF-8": lambda path: path.write_bytes(b'{"step": "\xff"}'),
    "a list": lambda path: path.write_text("[]"),
}


@pytest.fixture(scope="module")
def many_checkpoints(zygote, tmp_path_factory):
    """A run of five steps with a checkpoint after each; and one of seven."""
    place = tmp_path_factory.mktemp("many")
    options = (*SMALL, "--save_steps", 1, "--max_steps")
    assert zygote.run((*options, 7), place).code == 0
    (place / "run").rename(place / "long")
    assert zygote.run((*options, 5), place).code == 0
    return place


FILES = [
    ("checkpoint-5/model.safetensors",),
    ("checkpoint-5/es_state.json", "checkpoint-3/model.safetensors", "checkpoint-4/es_state.json"),
    ("checkpoint-5/es_state.json",),
    ("checkpoint-5/model.safetensors", "checkpoint-4/model.safetensors"),
    tuple(f"checkpoint-{step}/model.safetensors" for step in range(1, 6)),
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "files",
    few(FILES, FILES[:2]),
    ids=lambda files: "+".join(sorted({file.partition("/")[2] for file in files})) + f"-{len(files)}",
)
def test_damaged_checkpoints_are_written_again_with_one_warning(run, place, many_checkpoints, files, damage):
    """The newest state that is whole, be it the base model, and the journal give back what was damaged."""
    shutil.copytree(many_checkpoints / "run", place / "run")
    for file in files:
        DAMAGE[damage](place / "run" / file)
    done = run("train", "--resume", "--output_dir", "run", "--max_steps", 7)
    assert done.code == 0, done
    warnings = [line for line in done.err.splitlines() if "damaged" in line]
    assert len(warnings) == 1 and all(file.partition("/")[0] in warnings[0] for file in files), done.err
    kept, wanted = tree(place / "run"), tree(many_checkpoints / "long")
    assert sorted(kept) == sorted(wanted)
    for name, data in wanted.items():  # what a checkpoint says of its run's length is that of the time it was written
        if name.endswith("es_state.json"):
            assert state_of(kept[name]) == state_of(data), name
        else:
            assert kept[name] == data or name.endswith("trainer_state.json"), name


def state_of(data):
    """Return an `es_state.json` without the hash of the file that tells of the run's length."""
    state = json.loads(data)
    del state["files"]["trainer_state.json"]
    return state


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "flipped"])
def test_a_finished_model_that_is_damaged_is_written_again(run, place, base_run, file, damage):
    shutil.copytree(base_run, place / "run")
    wanted = tree(place / "run")
    DAMAGE[damage](place / "run" / file)
    done = run("train", "--resume", "--output_dir", "run")
    assert done.code == 0, done
    assert "is written again" in done.err and "finished (" not in done.out, done
    assert_same_tree(tree(place / "run"), wanted)


@pytest.mark.parametrize("dtype", ["XX", "F8", "F99", "BF3"])
def test_a_type_that_no_tensor_has_is_damage(run, place, many_checkpoints, dtype):
    """Of checkpoints and of the finished model."""
    shutil.copytree(many_checkpoints / "run", place / "run")
    wanted = tree(place / "run")
    for directory in (place / "run", place / "run" / "checkpoint-5", place / "run" / "checkpoint-3"):
        with_dtype(directory / "model.safetensors", dtype)
    done = run("train", "--resume", "--output_dir", "run")
    assert done.code == 0 and "is written again" in done.err and "checkpoint-5" in done.err, done
    kept = tree(place / "run")
    assert {name for name in wanted if kept[name] != wanted[name]} == {"checkpoint-3/model.safetensors"}
    done = run("evaluate", "--model", "run/checkpoint-3", "--engine", "toy", "--task", "quadratic")
    assert_refused(Done(done.code, "", done.err.splitlines()[-1] + "\n"), "checkpoint-3", "body.bias", dtype)


@pytest.mark.parametrize("damage", STATES)
@pytest.mark.parametrize("words", [(), full(("--max_time_s", 1e-6))], ids=["all steps", "time is up"])
def test_a_state_that_is_no_state_is_written_again(run, place, many_checkpoints, damage, words):
    """Of the finished model, and of the newest checkpoint."""
    shutil.copytree(many_checkpoints / "run", place / "run")
    wanted = tree(place / "run")
    for directory in (place / "run", place / "run" / "checkpoint-5"):
        STATES[damage](directory / "es_state.json")
    done = run("train", "--resume", "--output_dir", "run", *words)
    assert done.code == 0 and "finished (" not in done.out and "checkpoint-5" in done.err, done
    kept = tree(place / "run")
    own = ("es_config.json", "README.md")  # they tell of max_time_s
    assert {name for name in wanted if kept.get(name) != wanted[name]} <= {*(own if words else ())}
    assert sorted(kept) == sorted(wanted)


@pytest.mark.parametrize("how", ["damaged", "whole", "dangling", "to a file", "half of a save"])
def test_a_link_goes_and_what_it_leads_to_stays(run, place, many_checkpoints, how):
    """A checkpoint that was moved to another disk."""
    shutil.copytree(many_checkpoints / "run", place / "run")
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "file").write_text("mine")
    for step in (4, 5):
        link, target = place / "run" / f"checkpoint-{step}", place / "elsewhere" / f"moved-{step}"
        link.rename(target)
        if how == "damaged":
            (target / "es_state.json").write_text("{}")
        if how == "dangling":
            shutil.rmtree(target)
        link.symlink_to(place / "elsewhere" / "file" if how == "to a file" else target)
    if how == "half of a save":
        for name in ("final", "checkpoint-6", "checkpoint-7"):
            (place / "run" / f".partial-{name}").symlink_to(place / "elsewhere")
    before = stamps(place / "elsewhere")
    done = run("train", "--resume", "--output_dir", "run", "--max_steps", 7, "--save_total_limit", 3)
    assert done.code == 0, done
    assert stamps(place / "elsewhere") == before
    names = sorted(path.name for path in (place / "run").iterdir() if path.name.startswith((".", "checkpoint-")))
    assert names[-3:] == ["checkpoint-5", "checkpoint-6", "checkpoint-7"] and ".partial" not in "".join(names)
    assert weights(place / "run") == weights(many_checkpoints / "long")
    assert weights(place / "run" / "checkpoint-5") == weights(many_checkpoints / "long" / "checkpoint-5")


def test_damaged_checkpoints_that_are_links_are_written_again(run, place, many_checkpoints):
    shutil.copytree(many_checkpoints / "run", place / "run")
    (place / "run" / "checkpoint-5").rename(place / "moved")
    (place / "moved" / "es_state.json").write_text(DEEP)
    (place / "run" / "checkpoint-5").symlink_to(place / "moved")
    before = stamps(place / "moved")
    done = run("train", "--resume", "--output_dir", "run", "--max_steps", 7)
    assert done.code == 0 and "checkpoint-5" in done.err, done
    assert stamps(place / "moved") == before and not (place / "run" / "checkpoint-5").is_symlink()
    assert weights(place / "run" / "checkpoint-5") == weights(many_checkpoints / "long" / "checkpoint-5")


@pytest.mark.parametrize("line", [DEEP, "[]", "3", '{"step":"2"}', '{"step":2,"train_time_s":"x"}', "\udcff"])
def test_damaged_metrics_are_left_out(run, place, base_run, line):
    shutil.copytree(base_run, place / "run")
    path = place / "run" / "metrics.jsonl"
    path.write_bytes(line.encode(errors="surrogateescape") + b"\n" + path.read_bytes())
    done = run("train", "--resume", "--output_dir", "run", "--max_steps", 4, "--max_time_s", 3600)
    assert done.code == 0, done
    assert [record["step"] for record in metrics(place / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("tail", [DEEP, '{"kind":' + "[" * 99_999])
def test_a_last_line_that_nests_too_deep_is_torn(run, place, base_run, tail):
    shutil.copytree(base_run, place / "run")
    path = place / "run" / "journal.jsonl"
    for max_steps, end in ((4, ""), (5, "\n")):
        path.write_bytes(path.read_bytes() + tail.encode() + end.encode())
        done = run("train", "--resume", "--output_dir", "run", "--max_steps", max_steps)
        assert done.code == 0, done
        assert len(steps(place / "run")) == max_steps


CONFIGS = {
    "empty": lambda values: {},
    "a key is lost": lambda values: {name: value for name, value in values.items() if name != "population_size"},
    "max_steps is lost": lambda values: {name: value for name, value in values.items() if name != "max_steps"},
    "unknown": lambda values: values | {"sigmb": 0.1},
    "another seed": lambda values: values | {"seed": 4},
    "another method": lambda values: values | {"method": "grpo"},
    "text for a number": lambda values: values | {"logging_steps": "x"},
    "a list for text": lambda values: values | {"console": [3]},
    "no such choice": lambda values: values | {"console": "pane"},
    "out of range": lambda values: values | {"logging_steps": -1},
    "a model of a wrong type": lambda values: values | {"model": 7},
    "no task": lambda values: values | {"task": None},
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_the_journal_mends_a_damaged_configuration(run, place, base_run, damage):
    shutil.copytree(base_run, place / "run")
    file = place / "run" / "es_config.json"
    wanted = json.loads(file.read_text())
    file.write_text(json.dumps(CONFIGS[damage](wanted)))
    done = run("train", "--resume", "--output_dir", "run", "--max_steps", 3)
    assert done.code == 0 and done.err.count("es_config.json is damaged (") == 1, done
    assert "finished (" not in done.out
    found = json.loads(file.read_text())
    header = journal(place / "run")[0]["config"]
    assert {name: found[name] for name in header} == header and found.keys() == wanted.keys()
    kept = "save_steps" if damage not in ("empty", "out of range") else "seed"
    assert found[kept] == wanted[kept]
    done = run("train", "--resume", "--output_dir", "run", "--max_steps", 3)
    assert done.code == 0 and "damaged" not in done.err and "finished (" in done.out, done


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "a list"])
def test_the_journal_stands_in_for_a_damaged_configuration(run, place, base_run, damage):
    shutil.copytree(base_run, place / "run")
    file = place / "run" / "es_config.json"
    {**DAMAGE, "a list": lambda path: path.write_text("[]")}[damage](file)
    done = run("train", "--resume", "--output_dir", "run", "--max_steps", 4)
    assert done.code == 0 and "es_config.json is missing or damaged" in done.err, done
    assert len(steps(place / "run")) == 4 and json.loads(file.read_text())["sigma"] == 0.1


def test_another_base_model_is_refused(run, place, base_run):
    """The same path holds other weights now."""
    shutil.copytree(base_run / "checkpoint-2", place / "base")
    assert run(*SMALL, "--model", "base", "--max_steps", 2).code == 0
    before = stamps(place / "run")
    for file in (base_run / "model.safetensors",):
        shutil.copy(file, place / "base" / file.name)
    for words in (
        ("train", "--resume", "--output_dir", "run", "--max_steps", 3),
        ("replay", "--run", "run", "--output_dir", "o"),
    ):
        assert_refused(run(*words), "fingerprint", "base")
        assert stamps(place / "run") == before


def test_a_run_in_which_no_reward_applied_goes_on(run, place):
    """Its fitness is null in the journal."""
    (place / "never.py").write_text("def applies(completions, **_):\n    return [None] * len(completions)\n")
    words = (*SMALL, "--reward_funcs", "never.py:applies")
    assert run(*words, "--max_steps", 2).code == 0
    assert all(value is None for step in steps(place / "run") for value in step["fitness"])
    assert run("train", "--output_dir", "run", "--resume", "--max_steps", 3).code == 0
    assert len(steps(place / "run")) == 3
