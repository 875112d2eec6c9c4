"""The journal: a torn last line is repaired, every other change is found, and what was written comes back."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from estune.errors import UserError
from estune.es.noise import lowrank_scale, perturbation_scale
from estune.es.population import members_for_step
from estune.es.types import ParameterSpec
from estune.es.update import Factors, make_update
from estune.run.journal import Journal, Pending, canonical_json, recorded_update, step_record
from estune.run.replay import check_parameters

CONFIG = {
    "antithetic": True, "weight_decay_anchor": "base", "noise": "full", "rank": 1, "noise_distribution": "rademacher",
}  # fmt: skip
HEADER = {"noise_version": 1, "config": CONFIG, "parameters": [["w", [3, 4], "full"]], "base": "ab" * 16}


def record_of(step: int, n: int = 6, rows: int = 5, **options: Any) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    members = members_for_step(0, step, n, antithetic=True)
    update = make_update(
        members, rng.standard_normal(n).tolist(), 5e-4, weight_decay=10.0, anchored=True, distribution="rademacher"
    )
    return step_record(
        step, rng.integers(0, 200, rows).tolist(), rng.random(n).tolist(), perturbation_scale(1e-3), update,
        blake2b(bytes([step % 256]), digest_size=16).hexdigest(), failures=step % 3, tokens=12345, **options,
    )  # fmt: skip


def write_journal(path: Path, steps: int = 3) -> Journal:
    journal = Journal.create(path, HEADER)
    for step in range(steps):
        journal.append_step(record_of(step))
        if step == 1:
            journal.append_checkpoint(2, "cd" * 16)
    return journal


def assert_same(left: Journal | None, right: Journal) -> None:
    assert left is not None
    assert (left.header, left.steps, left.checkpoints, left.head) == (
        right.header, right.steps, right.checkpoints, right.head,
    )  # fmt: skip


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "journal.jsonl")
    opened = Journal.open(tmp_path / "journal.jsonl")
    assert_same(opened, journal)
    assert journal.header["kind"] == "header" and journal.header["base"] == "ab" * 16
    assert [step["step"] for step in journal.steps] == [0, 1, 2] and journal.checkpoints == {2: "cd" * 16}


def test_an_opened_journal_continues_where_it_ended(tmp_path: Path) -> None:
    write_journal(tmp_path / "a", 3)
    opened = Journal.open(write_journal(tmp_path / "b", 2).path)
    assert opened is not None
    opened.append_step(record_of(2))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_lines_are_canonical_and_chained(tmp_path: Path) -> None:
    """Each line is one JSON object that ends in a hash over the hash before and the rest of the line."""
    write_journal(tmp_path / "j")
    head = "0" * 32
    for line in (tmp_path / "j").read_text(encoding="ascii").splitlines():
        record = json.loads(line)
        claimed = record.pop("hash")
        body = json.dumps(record, sort_keys=True, separators=(",", ":"))
        assert line == f'{body[:-1]},"hash":"{claimed}"}}'
        head = blake2b((head + body).encode(), digest_size=16).hexdigest()
        assert claimed == head
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "j").read_text().splitlines()]
    assert kinds == ["header", "step", "step", "checkpoint", "step"]
    assert not {"time", "date", "host", "worker"} & set(json.loads((tmp_path / "j").read_text().splitlines()[1]))


def test_canonical_json() -> None:
    value = {"b": [1, 2.5, -0.0, 1e-300, None, True], "a": {"ä": "\u2028"}}
    text = canonical_json(value)
    assert text == '{"a":{"\\u00e4":"\\u2028"},"b":[1,2.5,-0.0,1e-300,null,true]}'
    assert canonical_json(json.loads(text)) == text
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            canonical_json({"x": bad})


def test_a_torn_last_line_is_repaired_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write_journal(path, 3)
    raw = path.read_bytes()
    keep = raw[:-1].rfind(b"\n") + 1
    path.write_bytes(raw[:keep])
    before = Journal.open(path)
    assert before is not None and len(before.steps) == 2
    for end in range(keep, len(raw)):  # the whole line without its newline is torn as well
        path.write_bytes(raw[:end])
        assert_same(Journal.open(path, repair=False), before)
        assert path.read_bytes() == raw[:end]
        assert_same(Journal.open(path), before)
        assert path.read_bytes() == raw[:keep]
    journal = Journal.open(path)
    assert journal is not None
    journal.append_step(record_of(2))
    assert path.read_bytes() == raw


def test_tails_that_a_crash_may_leave(tmp_path: Path) -> None:
    """File systems may leave a hole of zeros, or garbage, where the last append was."""
    path = tmp_path / "j"
    journal = write_journal(path, 2)
    raw = path.read_bytes()
    for tail in (b"\0" * 300, b"\0" * 300 + b"\n", b"\xff\xfe{", b"\n", b"{}\n", b"[1]\n"):
        path.write_bytes(raw + tail)
        assert_same(Journal.open(path), journal)
        assert path.read_bytes() == raw


def test_a_journal_without_a_whole_header_is_none(tmp_path: Path) -> None:
    path = tmp_path / "j"
    assert Journal.open(path) is None
    Journal.create(path, HEADER)
    raw = path.read_bytes()
    for end in range(len(raw)):
        path.write_bytes(raw[:end])
        assert Journal.open(path) is None
    path.write_bytes(raw[:50])
    assert Journal.open(path) is None
    Journal.create(path, HEADER)  # a torn header is gone, so a new journal can begin in its place
    assert path.read_bytes() == raw


def damaged_lines(raw: bytes) -> list[bytes]:
    return raw.split(b"\n")


@pytest.mark.parametrize(("line", "where"), [(0, "header"), (1, "step 0"), (2, "step 1"), (3, "step 2"), (4, "step 2")])
@pytest.mark.parametrize("damage", ["cut", "garbage", "gone", "doubled", "swapped"])
def test_damage_in_the_middle_is_refused_and_named(tmp_path: Path, line: int, where: str, damage: str) -> None:
    path = tmp_path / "j"
    write_journal(path, 4)  # header, 0, 1, checkpoint 2, 2, 3
    lines = path.read_bytes().split(b"\n")
    original = lines[line]
    if damage == "cut":
        lines[line] = original[: len(original) // 2]
    elif damage == "garbage":
        lines[line] = b"\0" * len(original)
    elif damage == "gone":
        del lines[line]
    elif damage == "doubled":
        lines.insert(line, original)
        where = where if line else "step 0"
        where = {1: "step 1", 2: "step 2", 3: "step 2", 4: "step 3"}.get(line, where)
    else:
        lines[line], lines[line + 1] = lines[line + 1], lines[line]
    raw = b"\n".join(lines)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=rf"damaged at line \d+ \(.*{where}\)"):
        Journal.open(path)
    assert path.read_bytes() == raw  # nothing is thrown away


def test_every_flipped_bit_in_the_middle_is_found(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write_journal(path, 3)
    raw = path.read_bytes()
    first = raw.index(b"\n") + 1
    last = raw[:-1].rfind(b"\n")
    for position in range(first, last, 3):  # also where the number read would be the same, or the text not ASCII
        changed = bytearray(raw)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        with pytest.raises(UserError, match="damaged"):
            Journal.open(path)


@pytest.mark.parametrize("line", [1, 4])  # in the middle, and the very last one
@pytest.mark.parametrize(
    "key", ["fitness", "q", "e", "a", "s", "decay", "seeds", "rows", "checksum", "step", "failures"]
)
def test_an_edited_value_is_refused(tmp_path: Path, key: str, line: int) -> None:
    path = tmp_path / "j"
    write_journal(path, 3)
    lines = path.read_text().split("\n")
    record = json.loads(lines[line])
    value = record[key]
    record[key] = (
        value + 1 if isinstance(value, int)
        else [*value[1:], value[0]] if isinstance(value, list)
        else value[:-1] + ("0" if value[-1] != "0" else "1")
    )  # fmt: skip
    assert record[key] != value
    lines[line] = json.dumps(record, separators=(",", ":"))
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"step {0 if line == 1 else 2}\): its hash does not match"):
        Journal.open(path)


def test_values_json_should_not_hold_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write_journal(path, 3)
    lines = path.read_text().split("\n")
    for value in ("NaN", "Infinity", " 7", "7.0", '"\u00e9"', '"é"'):
        changed = [*lines]
        changed[1] = lines[1].replace('"tokens":12345', f'"tokens":{value}')
        assert changed[1] != lines[1]
        path.write_text("\n".join(changed), encoding="utf-8")
        with pytest.raises(UserError, match=r"step 0\): its hash does not match"):
            Journal.open(path)


def test_a_journal_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    body = canonical_json({"kind": "header", "format": 99})
    digest = blake2b(("0" * 32 + body).encode(), digest_size=16).hexdigest()
    path.write_text(f'{body[:-1]},"hash":"{digest}"}}\n')
    with pytest.raises(UserError, match="format 99"):
        Journal.open(path)


@pytest.mark.parametrize("anchor", ["base", "zero"])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_an_update_comes_back_exactly(tmp_path: Path, rank: int, antithetic: bool, anchor: str) -> None:
    noise = {"noise": "lowrank" if rank else "full", "rank": rank or 1, "noise_distribution": "normal"}
    config = {"antithetic": antithetic, "weight_decay_anchor": anchor, **noise}
    journal = Journal.create(tmp_path / "j", {"config": config})
    updates = []
    for step, learning_rate in enumerate((5e-4, 1e-30, 1 / 3, 123.456)):
        utilities = np.random.default_rng(step).standard_normal(8).tolist()
        members = members_for_step(2**64 - 1, step, 8, antithetic)
        update = make_update(members, utilities, learning_rate, weight_decay=0.3, anchored=anchor == "base", rank=rank)
        updates.append(update)
        scale = perturbation_scale(1e-3 / (step + 1))
        thin = lowrank_scale(1e-3 / (step + 1), rank) if rank else 0.0
        fitness = [0.1 + 0.2, math.nan, 5e-324, -0.0, 1e300, 1 / 3, 2.0, 0.0]
        record = step_record(step, [1], fitness, scale, update, "00" * 16, failures=0, tokens=0, lowrank_scale=thin)
        journal.append_step(record)
        read = Journal.open(tmp_path / "j")
        assert read is not None
        assert recorded_update(read.steps[-1], read.header["config"]) == update
        assert float.fromhex(read.steps[-1]["s"]) == scale
        lowrank = {"s_lowrank": thin.hex(), "a_lowrank": update.a_lowrank.hex()} if rank else {}
        assert {name: value for name, value in read.steps[-1].items() if "lowrank" in name} == lowrank
        back = [math.nan if value is None else value for value in read.steps[-1]["fitness"]]
        assert np.array_equal(np.array(back), np.array(fitness), equal_nan=True)
        assert math.copysign(1, back[3]) == -1
    assert len({update.a for update in updates}) == 4


def test_numpy_numbers_are_recorded_as_numbers(tmp_path: Path) -> None:
    update = make_update(members_for_step(0, 0, 2, False), np.array([1.0, -1.0]), 5e-4)
    record = step_record(0, [3], np.array([0.5, np.nan]), perturbation_scale(1e-3), update, "", failures=0, tokens=1)
    assert json.loads(canonical_json(record)) == record and record["fitness"] == [0.5, None]


def test_500_steps_of_30_members_and_200_rows_stay_under_2_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "j"
    header = {
        "config": CONFIG,
        "parameters": [[f"model.layers.{i}.mlp.down_proj.weight", [896, 4864], "lowrank"] for i in range(300)],
    }
    journal = Journal.create(path, header)
    header_size = path.stat().st_size
    rng = np.random.default_rng(0)
    sizes = []
    for step in range(0, 500, 100):  # five of the 500: lines hardly differ in length
        members = members_for_step(0, step, 30, False)
        update = make_update(members, rng.standard_normal(30).tolist(), 5e-4, rank=1)
        fitness = (rng.random(30) / 3).tolist()
        rows = rng.integers(100_000, 1_000_000, 200).tolist()  # ids of a large data set
        journal.append_step(
            step_record(
                step,
                rows,
                fitness,
                perturbation_scale(1e-3),
                update,
                "ab" * 16,
                failures=12,
                tokens=5 * 10**6,
                lowrank_scale=lowrank_scale(1e-3, 1),
            )
        )
        sizes.append(path.stat().st_size - header_size - sum(sizes))
    assert header_size + 500 * max(sizes) <= 2_000_000


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    """With a limit on the file's size, the line that no longer fits is taken back whole, and the sentence says so."""
    path = tmp_path / "j"
    write_journal(path, 2)
    before = path.read_bytes()
    script = (
        "import json, resource, sys\nfrom pathlib import Path\n"
        "from estune.errors import UserError\nfrom estune.run.journal import Journal\n"
        "journal = Journal.open(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try:\n    journal.append_step(json.loads(sys.argv[3]))\n"
        "except UserError as error:\n    print(error)\n"
    )
    argv = [sys.executable, "-c", script, str(path), str(len(before) + 100), json.dumps(record_of(2))]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "no space left" in done.stdout and "j" in done.stdout
    assert path.read_bytes() == before
    opened = Journal.open(path)
    assert opened is not None and len(opened.steps) == 2


# What an engine perturbs


def header_of(tmp_path: Path, kinds: dict[str, Any]) -> Journal:
    parameters = [[name, [3, 4], kind] for name, kind in kinds.items()]
    return Journal.create(tmp_path / "j", {"parameters": parameters})


def specs_of(kinds: dict[str, Any]) -> list[ParameterSpec]:
    return [ParameterSpec(name, (3, 4), bool(kind), kind == "lowrank") for name, kind in kinds.items()]


KINDS = {"a": "full", "b": "lowrank", "c": False}


def test_an_engine_that_perturbs_what_the_journal_says_is_accepted(tmp_path: Path) -> None:
    assert [spec.kind for spec in specs_of(KINDS)] == list(KINDS.values())
    check_parameters(header_of(tmp_path, KINDS), specs_of(KINDS)[::-1])
    (tmp_path / "j").unlink()
    check_parameters(header_of(tmp_path, {"a": True, "c": False}), specs_of({"a": "full", "c": False}))  # until 0.1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a": "lowrank"}, "noise of a was full when the journal was written, and is lowrank now"),
        ({"b": "full"}, "noise of b was lowrank .* is full now"),
        ({"b": False}, "noise of b was lowrank .* is none now"),
        ({"c": "full"}, "noise of c was none .* is full now"),
        ({"d": "lowrank"}, "noise of d was none .* is lowrank now"),
    ],
)
def test_an_engine_that_perturbs_otherwise_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_parameters(header_of(tmp_path, KINDS), specs_of(KINDS | change))
    assert "\n" not in str(caught.value)
    (tmp_path / "j").unlink()
    with pytest.raises(UserError, match="noise of b was lowrank"):
        check_parameters(header_of(tmp_path, KINDS), specs_of({"a": "full"}))


# Finished groups of the running step


def test_pending_groups_belong_to_one_head(tmp_path: Path) -> None:
    pending = Pending(tmp_path / "pending.jsonl")
    assert pending.read("aa") == {}
    result = {"rewards": [[[0.1 + 0.2, None, -0.0]]], "failed": [[0, 0, 1]], "text": "ä\u2028\r\n\x85"}
    pending.append("aa", 0, result)
    pending.append("aa", 7, {"rewards": []})
    pending.append("bb", 1, {"rewards": [1]})
    assert pending.read("aa") == {0: result, 7: {"rewards": []}}
    assert pending.read("bb") == {1: {"rewards": [1]}}
    assert pending.read("cc") == {}
    pending.clear()
    assert not pending.path.exists() and pending.read("aa") == {}
    pending.clear()


def test_a_torn_pending_line_costs_that_group_alone(tmp_path: Path) -> None:
    pending = Pending(tmp_path / "pending.jsonl")
    pending.append("aa", 0, {"x": 1})
    keep = pending.path.stat().st_size
    pending.append("aa", 1, {"x": 2})
    raw = pending.path.read_bytes()
    for end in range(keep, len(raw)):
        pending.path.write_bytes(raw[:end])
        assert pending.read("aa") == {0: {"x": 1}}
        pending.append("aa", 1, {"x": 2})  # the next append starts on a line of its own
        assert pending.read("aa") == {0: {"x": 1}, 1: {"x": 2}}


def test_a_damaged_pending_line_costs_that_group_alone(tmp_path: Path) -> None:
    pending = Pending(tmp_path / "pending.jsonl")
    for group in range(3):
        pending.append("aa", group, {"x": group})
    lines = pending.path.read_bytes().split(b"\n")
    for bad in (b"\0" * 20, b"{}", b"[]", b"3", b'{"after":"aa"}', b"\xff"):
        pending.path.write_bytes(b"\n".join([lines[0], bad, lines[2], b""]))
        assert pending.read("aa") == {0: {"x": 0}, 2: {"x": 2}}


def test_the_factors_of_a_step_that_was_cut_off(tmp_path: Path) -> None:
    pending = Pending(tmp_path / "pending.jsonl")
    factors = Factors(learning_rate=0.1, sigma=1 / 3)
    pending.store_factors("aa", factors, 2.5)
    pending.append("aa", 0, {"x": 1})
    assert pending.read_factors("aa") == (factors, 2.5) and pending.read_factors("bb") is None
    assert pending.read("aa") == {0: {"x": 1}}
    lines = pending.path.read_bytes().split(b"\n")
    pending.path.write_bytes(b"\n".join([lines[0].replace(b"0.1", b"0.2"), *lines[1:]]))
    assert pending.read_factors("aa") is None and pending.read("aa") == {0: {"x": 1}}


def test_the_journal_holds_the_schedules_factors_if_they_depend_on_time(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, HEADER)
    journal.append_step(record_of(0))
    journal.append_step(record_of(1, schedules=Factors(learning_rate=0.1, sigma=1 / 3)))
    opened = Journal.open(path)
    assert opened is not None and "schedules" not in opened.steps[0]
    assert opened.steps[1]["schedules"] == {"learning_rate": 0.1, "sigma": 1 / 3}
