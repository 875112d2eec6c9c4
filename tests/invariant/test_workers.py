"""However many workers and threads: one config, one trajectory (invariants 3 and 4). Seeds tell runs apart."""

import json
import random

import numpy as np
import pytest
from command_line import TOY, estune, journal, steps, tree, weights

from estune.engines.toy import ToyEngine
from estune.optimizer import make_update
from estune.population import Member, members_for_step

OPTIONS = (*TOY, "--max_steps", 3, "--population_size", 6, "--sigma", 0.1, "--eval_steps", 2, "--reward_funcs", "rewards.py:logged")


def without(line, *names):
    """Return a journal line without its hash and some fields of the configuration."""
    line = {name: value for name, value in line.items() if name != "hash"}
    if "config" in line:
        line["config"] = {name: value for name, value in line["config"].items() if name not in names}
    return line


WAYS = [
    ("--reward_workers", 2), ("--reward_workers", 4), ("--reward_isolation", "inline"), ("--num_threads", 2),
    ("--num_threads", 3, "--reward_workers", 3), ("--prompts_per_batch", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def one_worker(zygote, tmp_path_factory):
    from command_line import write_rewards

    place = tmp_path_factory.mktemp("one")
    write_rewards(place)
    assert zygote.run((*OPTIONS, "--reward_workers", 1, "--num_threads", 1), place).code == 0
    return place / "run"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way)))
def test_workers_threads_and_batches_change_no_bit(run, place, one_worker, way):
    done = run(*OPTIONS, "--reward_workers", 1, "--num_threads", 1, *way)
    assert done.code == 0, done
    ours = ("reward_workers", "reward_isolation", "num_threads", "prompts_per_batch")
    assert [without(line, *ours) for line in journal(place / "run")] == [without(line, *ours) for line in journal(one_worker)]
    apart = ("journal.jsonl", "es_config.json")
    found, wanted = tree(place / "run", apart), tree(one_worker, apart)
    assert found == wanted


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
    assert found["0", "noise"][0][0] == f"{3223307810061058218:016x}"  # DESIGN section 2
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
            for name, array in toy.master.arrays.items():
                array[...] = np.arange(array.size, dtype=np.float32).reshape(array.shape) / 7 + len(name)
            update = make_update([members[i] for i in order], [utilities[i] for i in order], 0.1, weight_decay=0.01)
            toy.master.update(update)
            found = {name: array.tobytes() for name, array in toy.master.arrays.items()}
            expected = expected or found
            assert found == expected


def test_a_tie_moves_nothing():
    """Thirty times 0.1 has a standard deviation of 2.8e-17, not 0."""
    from estune.fitness import shape_fitness

    toy = ToyEngine()
    for shaping in ("z_score", "centered_rank", "per_prompt_z", "none"):
        _, utilities = shape_fitness(np.full((30, 3, 1), 0.1), shaping)
        toy.master.update(make_update([Member(i, 1) for i in range(30)], utilities, 1.0, weight_decay=0.5))
    assert not any(array.any() for array in toy.master.arrays.values())


def test_the_journal_says_nothing_of_times_and_workers(one_worker):
    text = (one_worker / "journal.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["kind"] for line in lines] == ["header", "step", "step", "step", "checkpoint"]
    assert {name for line in lines[1:4] for name in line} == {
        "kind", "step", "rows", "seeds", "fitness", "failures", "tokens", "q", "e", "s", "a", "decay", "checksum", "hash"
    }  # fmt: skip
    assert weights(one_worker)


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_journal_stays_small(run, place, antithetic):
    """At most 2 MB for 500 steps of 30 members."""
    assert run(*TOY, "--max_steps", 10, "--reward_isolation", "inline", "--antithetic", str(antithetic).lower()).code == 0
    lines = (place / "run" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines[0]) + 500 * max(map(len, lines[1:])) <= 2_000_000
