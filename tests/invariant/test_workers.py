"""However many workers and threads: one config, one trajectory (invariants 3 and 4). Seeds tell runs apart."""

import json
import random

import numpy as np
import pytest
from command_line import (
    MARK,
    PATIENCE_S,
    TOY,
    assert_no_process,
    estune,
    journal,
    metrics,
    steps,
    tree,
    weights,
    write_rewards,
)
from tiers import few

from estune.engines.toy import ToyEngine
from estune.es.population import members_for_step
from estune.es.types import Member
from estune.es.update import make_update
from estune.monitor.trackers import numbers
from estune.tasks.quadratic import wanted

OPTIONS = (
    *TOY,
    "--max_steps",
    3,
    "--population_size",
    6,
    "--sigma",
    0.1,
    "--eval_steps",
    2,
    "--reward_funcs",
    "rewards.py:logged",
)


def without(line, *names):
    """Return a journal line without its hash and some fields of the configuration."""
    line = {name: value for name, value in line.items() if name != "hash"}
    if "config" in line:
        line["config"] = {name: value for name, value in line["config"].items() if name not in names}
    return line


WAYS = [
    ("--reward_workers", 2),
    ("--reward_workers", 4),
    ("--reward_isolation", "inline", "--reward_workers", "auto"),
    ("--num_threads", 2),
    ("--num_threads", 8),
    ("--num_threads", 3, "--reward_workers", 3),
    ("--prompts_per_batch", 3),
]


@pytest.fixture(scope="module")
def one_worker(zygote, tmp_path_factory):
    place = tmp_path_factory.mktemp("one")
    write_rewards(place)
    assert zygote.run((*OPTIONS, "--reward_workers", 1, "--num_threads", 1), place).code == 0
    return place / "run"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way)))
def test_workers_threads_and_batches_change_no_bit(run, place, one_worker, way):
    done = run(*OPTIONS, "--reward_workers", 1, "--num_threads", 1, *way)
    assert done.code == 0, done
    ours = ("reward_workers", "reward_isolation", "num_threads", "prompts_per_batch")
    assert [without(line, *ours) for line in journal(place / "run")] == [
        without(line, *ours) for line in journal(one_worker)
    ]
    apart = ("journal.jsonl", "es_config.json", "README.md")  # they name these options
    found, wanted = tree(place / "run", apart), tree(one_worker, apart)
    assert found == wanted


def test_threads_and_batches_of_low_rank_members_change_no_bit(run, place, zygote, tmp_path_factory):
    lowrank = ("--noise", "lowrank", "--rank", 2, "--reward_workers", 1)
    one = tmp_path_factory.mktemp("lowrank")
    write_rewards(one)
    assert zygote.run((*OPTIONS, *lowrank, "--num_threads", 1, "--members_per_batch", 1), one).code == 0
    assert run(*OPTIONS, *lowrank, "--num_threads", 3, "--members_per_batch", 4).code == 0
    assert weights(place / "run") == weights(one / "run")
    assert [step["q"] for step in steps(place / "run")] == [step["q"] for step in steps(one / "run")]
    header = journal(place / "run")[0]
    assert {name: kind for name, _, kind in header["parameters"]} == {
        "body.bias": "full", "body.weight": "lowrank", "frozen.weight": False, "head.weight": "lowrank"
    }  # fmt: skip


def test_a_rerun_writes_the_same_bytes(zygote, run, place, one_worker):
    """Also in an interpreter of its own, with another hash seed and another current directory's name."""
    assert run(*OPTIONS, "--reward_workers", 1, "--num_threads", 1).code == 0
    assert tree(place / "run") == tree(one_worker)
    (place / "run").rename(place / "first")
    done = estune(*OPTIONS, "--reward_workers", 1, "--num_threads", 1, cwd=place, env={"PYTHONHASHSEED": "77"})
    assert done.code == 0, done
    assert tree(place / "run") == tree(place / "first")


def test_seeds(run, place, one_worker):
    """Seed 0 is a seed like any other, and the default; another seed gives other noise and another order of rows."""
    options = (*OPTIONS, "--reward_workers", 1, "--num_threads", 1, "--batch_size", 5)
    found = {}
    for name, seed in {"default": (), "0": ("--seed", 0), "1": ("--seed", 1), "2^64-1": ("--seed", 2**64 - 1)}.items():
        assert run(*options, *seed, "--overwrite").code == 0
        found[name] = tree(place / "run")
        seeds = [line["seeds"] for line in steps(place / "run")]
        rows = [line["rows"] for line in steps(place / "run")]
        assert len({seed for step in seeds for seed in step}) == 18  # none twice
        found[name, "noise"], found[name, "rows"] = seeds, rows
    assert found["default"] == found["0"]
    for kind in ("noise", "rows"):
        assert found["0", kind] != found["1", kind] != found["2^64-1", kind] != found["0", kind]
    assert found["0", "noise"][0][0] == f"{3223307810061058218:016x}"  # see tests/unit/test_noise.py
    assert len(set(map(str, found["0", "rows"]))) == 3


def test_the_order_of_members_in_an_update_changes_no_bit():
    chance = random.Random(3)
    for antithetic in (False, True):
        members = members_for_step(5, 0, 30, antithetic)
        utilities = [chance.gauss(0, 1) for _ in members]
        expected = None
        for _ in range(6):
            order = chance.sample(range(30), 30)
            toy = ToyEngine(num_threads=chance.choice([1, 2, 4]))
            for name, array in toy.theta.arrays.items():
                array[...] = np.arange(array.size, dtype=np.float32).reshape(array.shape) / 7 + len(name)
            update = make_update([members[i] for i in order], [utilities[i] for i in order], 0.1, weight_decay=0.01)
            toy.theta.apply(update)
            found = {name: array.tobytes() for name, array in toy.theta.arrays.items()}
            expected = expected or found
            assert found == expected


def test_a_tie_moves_nothing():
    """Thirty times 0.1 has a standard deviation of 2.8e-17, not 0."""
    from estune.es.fitness import shape_fitness

    toy = ToyEngine()
    for shaping in ("z_score", "centered_rank", "per_prompt_z", "none"):
        _, utilities = shape_fitness(np.full((30, 3, 1), 0.1), shaping)
        toy.theta.apply(make_update([Member(i, 1) for i in range(30)], utilities, 1.0, weight_decay=0.5))
    assert not any(array.any() for array in toy.theta.arrays.values())


def test_the_journal_says_nothing_of_times_and_workers(one_worker):
    text = (one_worker / "journal.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["kind"] for line in lines] == ["header", "step", "step", "step", "checkpoint"]
    assert {name for line in lines[1:4] for name in line} == {
        "kind",
        "step",
        "rows",
        "seeds",
        "fitness",
        "failures",
        "tokens",
        "q",
        "e",
        "s",
        "a",
        "decay",
        "checksum",
        "hash",
    }
    assert weights(one_worker)


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_journal_stays_small(run, place, antithetic):
    """At most 2 MB for 500 steps of 30 members."""
    assert (
        run(*TOY, "--max_steps", 10, "--reward_isolation", "inline", "--antithetic", str(antithetic).lower()).code == 0
    )
    lines = (place / "run" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines[0]) + 500 * max(map(len, lines[1:])) <= 2_000_000


# --- rewards that misbehave never end a run, and never pay ------------------------------------------------------------

# reward -> what the user is told of it
MISBEHAVIOUR = {  # reward -> a part of its message, and the kind of its failure for trackers
    "raising": ("this row is too much for me", "ValueError"),
    "hanging": ("took longer than", "timeout"),
    "dying": ("worker process died", "worker"),
    "nan": ("nan", "value"),
    "infinite": ("inf", "value"),
}


@pytest.mark.parametrize("reward", few(MISBEHAVIOUR, ("raising", "dying", "nan", "infinite")))
def test_a_misbehaving_reward_is_counted_and_does_not_pay(run, place, one_worker, reward):
    mark = f"{reward}-{place.name}"
    words = (
        *TOY,
        "--max_steps",
        1,
        "--population_size",
        3,
        "--sigma",
        0.1,
        "--batch_size",
        8,
        "--reward_timeout_s",
        3 if reward == "hanging" else PATIENCE_S,  # the other rows' calls have all this time, on a busy machine too
        "--reward_workers",
        6 if reward == "hanging" else "auto",  # calls that hang, hang at the same time
    )
    assert run(*words, "--reward_funcs", "rewards.py:logged").code == 0
    fitness = steps(place / "run")[0]["fitness"]
    rows = steps(place / "run")[0]["rows"]
    n_guilty = sum(wanted(row) == -0.5 for row in rows)
    assert 0 < n_guilty < 8
    done = run(*words, "--reward_funcs", f"rewards.py:{reward}", "--overwrite", env={MARK: mark})
    assert done.code == 0, done
    (line,), (record,) = steps(place / "run"), metrics(place / "run")
    assert line["failures"] == record["es/reward_errors"] == 3 * n_guilty
    assert f"failed {3 * n_guilty}" in done.out
    part, name = MISBEHAVIOUR[reward]
    assert part in done.out + done.err
    [(message, members)] = record[f"rewards/{reward}/failed_calls"].items()
    assert part in message and members == 3
    assert numbers(record)[f"rewards/{reward}/failed_calls/{name}"] == 3.0
    # nobody got a reward for those rows, so they are left out for all members
    assert line["fitness"] != fitness and any(line["q"])
    assert_no_process(mark)


def test_failures_are_counted_for_each_function(run, place):
    """In the metrics and on the step's line; a function that never fails has a 0, and is not named there."""
    words = (*TOY, "--max_steps", 2, "--population_size", 3, "--batch_size", 8, "--sigma", 0.1)
    funcs = ("rewards.py:raising", "rewards.py:second", "rewards.py:always_raising")
    done = run(*words, "--reward_funcs", *funcs, "--console", "lines")
    assert done.code == 0, done
    for line, record in zip(steps(place / "run"), metrics(place / "run"), strict=True):
        n_guilty = sum(wanted(row) == -0.5 for row in line["rows"])
        failed = {"raising": 3 * n_guilty, "second": 0, "always_raising": 24}
        assert {name: record[f"rewards/{name}/errors"] for name in failed} == failed
        assert line["failures"] == record["es/reward_errors"] == sum(failed.values())
        told = ", ".join(f"{name} {count}" for name, count in failed.items() if count)
        assert f"failed {sum(failed.values())} ({told})" in done.out
        assert {name: sum(record.get(f"rewards/{name}/failed_calls", {}).values()) for name in failed} == {
            name: 3 if count else 0 for name, count in failed.items()
        }
    done = run(*words, "--reward_funcs", "rewards.py:always_raising", "--console", "lines", "--overwrite")
    assert metrics(place / "run")[0]["rewards/always_raising/errors"] == 24
    assert "failed 24  " in done.out  # there is one function alone


def test_a_reward_that_does_not_apply_is_no_failure(run, place):
    words = (*TOY, "--max_steps", 1, "--population_size", 3, "--sigma", 0.1)
    assert run(*words, "--reward_funcs", "rewards.py:inapplicable").code == 0
    [line], [record] = steps(place / "run"), metrics(place / "run")
    assert line["failures"] == 0 and any(line["q"])
    n_skipped = sum(wanted(row) == -0.5 for row in line["rows"])
    assert record["rewards/inapplicable/none"] == 3 * n_skipped > 0 == record["rewards/inapplicable/errors"]
    assert record["rewards/inapplicable/std"] == record["reward_std"] > 0


def test_a_reward_that_always_fails_moves_nothing(run, place):
    words = (*TOY, "--max_steps", 2, "--population_size", 3, "--batch_size", 2, "--eval_steps", 1, "--eval_rows", 2)
    done = run(*words, "--reward_funcs", "rewards.py:always_raising", "--model", "toy")
    assert done.code == 0, done
    for line in steps(place / "run"):
        assert line["failures"] == 6 and line["fitness"] == [None] * 3 and line["q"] == [0] * 3
    assert "RuntimeError: never" in done.out + done.err
    assert run("train", "--resume", "--output_dir", "run", "--max_steps", 3).code == 0
    assert run("replay", "--run", "run", "--output_dir", "out").code == 0
    evaluated = [record for record in metrics(place / "run") if "eval_reward" in record]
    assert evaluated and all(
        record["eval_reward"] is None and record["eval_reward_failures"] == 2 for record in evaluated
    )


def test_what_a_reward_logs_is_kept(run, place):
    words = (*TOY, "--max_steps", 1, "--population_size", 2, "--batch_size", 3, "--log_completions")
    assert run(*words, "--reward_funcs", "rewards.py:extra").code == 0
    assert metrics(place / "run")[0]["mine"] == 0.25
    lines = [json.loads(line) for line in (place / "run" / "completions" / "step_00001.jsonl").read_text().splitlines()]
    assert [line["member"] for line in lines] == [0, 0, 0, 1, 1, 1, None, None, None]  # theta answers the first step
    assert all(line["twice"] == 2 * wanted(line["row"]) for line in lines)


def test_nothing_runs_what_a_model_wrote(run, place):
    """A completion that is a program: scored as text by the embedded task, nothing happens."""
    program = "<answer>__import__('os').system('touch {0}')</answer> <answer>open('{0}', 'w')</answer>"
    rows = [
        program.format(place / "proof"),
        f"<answer>().__class__ and exec(\"open('{place}/proof','w')\")</answer>",
        "<answer>9**9**9**9</answer>",
        "<answer>" + "(" * 5000 + "1" + ")" * 5000 + "</answer>",
    ]
    with (place / "c.jsonl").open("w") as file:
        for text in rows:
            file.write(json.dumps({"completion": text, "numbers": [1, 2, 3], "target": 6}) + "\n")
    done = run("score", "--task", "countdown", "--completions", "c.jsonl", "--json", "--reward_timeout_s", PATIENCE_S)
    assert done.code == 0, done
    assert json.loads(done.out)["accuracy"] == 0.0
    assert not (place / "proof").exists()


def test_members_that_blow_up_only_fail(run, place):
    """Perturbed weights overflow the reward: those rewards fail, nothing else does, and every file can be read."""
    words = (
        *TOY,
        "--max_steps",
        3,
        "--population_size",
        4,
        "--sigma",
        1e30,
        "--learning_rate",
        1e-3,
        "--save_steps",
        1,
    )
    assert run(*words, "--reward_funcs", "rewards.py:cubed").code == 0
    assert [record["step"] for record in metrics(place / "run")] == [1, 2, 3]  # read as strict JSON
    assert metrics(place / "run")[-1]["es/reward_errors"] > 0
    assert run("replay", "--run", "run", "--output_dir", "out").code == 0
    assert weights(place / "out") == weights(place / "run") == weights(place / "run" / "checkpoint-3")
