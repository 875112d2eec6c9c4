"""Seed patches: a run in kilobytes, applied to its base and to nothing else."""

from __future__ import annotations

import json
import zlib
from hashlib import blake2b

import pytest
from command_line import TOY, assert_refused, weights

from estune.commands.patches import CONTENT, DIGEST_BYTES, MAGIC

pytestmark = pytest.mark.miniature

RUN = (*TOY, "--max_steps", 3, "--population_size", 6, "--sigma", 0.1, "--learning_rate", 0.1, "--num_threads", 1,
       "--reward_isolation", "inline")  # fmt: skip
KINDS = [(), ("--antithetic",), ("--noise", "lowrank", "--rank", 2), ("--weight_decay", 0.1),
         ("--noise", "lowrank", "--antithetic", "--weight_decay", 0.1, "--noise_distribution", "rademacher"),
         ("--noise_distribution", "rademacher")]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_patch_rebuilds_the_run(run, place, kind):
    assert run(*RUN, *kind).code == 0
    done = run("export", "run", "--patch", "run.estp")
    assert done.code == 0, done
    assert (place / "run.estp").stat().st_size < 2000
    assert run("export", "run", "--patch", "again.estp").code == 0
    assert (place / "again.estp").read_bytes() == (place / "run.estp").read_bytes()
    done = run("apply", "run.estp", "--model", "toy", "--output_dir", "rebuilt")
    assert done.code == 0, done
    assert weights(place / "rebuilt") == weights(place / "run")


def test_another_base_is_refused(run, place):
    assert run(*RUN).code == 0
    assert run("export", "run", "--patch", "run.estp").code == 0
    done = run("apply", "run.estp", "--model", "run", "--output_dir", "rebuilt")
    assert_refused(done, "belongs to another base", "nothing was written")
    assert not (place / "rebuilt").exists()


def test_damage_is_named(run, place):
    assert run(*RUN).code == 0
    assert run("export", "run", "--patch", "run.estp").code == 0
    good = (place / "run.estp").read_bytes()
    for data, said in (
        (good[:-1], "damaged"), (good[:40] + bytes([good[40] ^ 1]) + good[41:], "damaged"), (b"{}", "not an estune"),
        (b"estune patch 9\n" + good[15:], "another format"), (b"", "not an estune"),
    ):  # fmt: skip
        (place / "bad.estp").write_bytes(data)
        assert_refused(run("apply", "bad.estp", "--model", "toy", "--output_dir", "rebuilt"), said)
    assert_refused(run("apply", "absent.estp", "--model", "toy", "--output_dir", "rebuilt"), "absent.estp")
    (place / "full").mkdir()
    (place / "full" / "mine.txt").write_text("mine")
    assert_refused(run("apply", "run.estp", "--model", "toy", "--output_dir", "full"), "not an empty directory")


def test_what_has_no_proof_is_not_exported(run, place):
    assert_refused(run("export", ".", "--patch", "run.estp"), "holds no journal")
    assert run(*RUN).code == 0
    lines = (place / "run" / "journal.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["kind"] == "checkpoint"
    (place / "run" / "journal.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert_refused(run("export", "run", "--patch", "run.estp"), "run was interrupted after", "--resume to its end")
    done = run("replay", "--run", "run", "--output_dir", "rebuilt")
    assert done.code == 0
    assert "is not verified: the run stopped before it saved a fingerprint of it)" in done.out


def test_the_result_lies_beside_the_patch_by_its_name(run, place):
    assert run(*RUN).code == 0
    assert run("export", "run", "--patch", "tuned.estp").code == 0
    assert run("apply", "tuned.estp", "--model", "toy").code == 0
    assert weights(place / "tuned") == weights(place / "run")
    assert_refused(run("apply", "tuned.estp", "--model", "toy"), "not an empty directory")
    assert run("export", "run", "--patch", "bare").code == 0
    assert_refused(run("apply", "bare", "--model", "toy"), "not an empty directory")  # that is the patch itself


def test_decay_towards_the_base(run_model, place):
    words = ("--model", "tiny", "--task", "countdown", "--max_steps", 2, "--population_size", 4, "--batch_size", 2,
             "--sigma", 0.02, "--max_completion_length", 8, "--num_threads", 1, "--report_to", "none",
             "--noise", "lowrank", "--antithetic", "--weight_decay", 0.1, "--weight_decay_anchor", "base",
             "--output_dir", "run")  # fmt: skip
    assert run_model("train", *words).code == 0
    assert run_model("export", "run", "--patch", "run.estp").code == 0
    done = run_model("apply", "run.estp", "--model", "tiny", "--output_dir", "rebuilt")
    assert done.code == 0, done
    assert weights(place / "rebuilt") == weights(place / "run")


@pytest.mark.parametrize("content", [
    b"[1]", b"{}", b"not json", b"[" * 100_000,
    json.dumps({name: kind() for name, kind in CONTENT.items()}).encode(),
], ids=["list", "empty", "text", "deep", "hollow"])  # fmt: skip
def test_what_somebody_made_up_is_refused(run, place, content):
    packed = zlib.compress(content)
    (place / "bad.estp").write_bytes(MAGIC + blake2b(packed, digest_size=DIGEST_BYTES).digest() + packed)
    assert_refused(run("apply", "bad.estp", "--model", "toy", "--output_dir", "rebuilt"), "not an estune patch")
