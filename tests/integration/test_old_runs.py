"""Runs that an older estune wrote (commit 8b3ba3f) resume, replay, evaluate and apply: no run is lost by an upgrade."""

import base64
import json
from pathlib import Path

import pytest
from command_line import Done, assert_refused, journal
from tiers import full

pytestmark = pytest.mark.miniature

STORED = json.loads((Path(__file__).parents[1] / "data" / "old_runs.json").read_text(encoding="utf-8"))
JOURNALLED = [name for name, files in STORED["runs"].items() if "journal.jsonl" in files]


@pytest.fixture
def old(place):
    """``old(name)`` lays an old run into ``place``, with the files that it was started with; returns its end."""
    for name, text in STORED["files"].items():
        (place / name).write_text(text, encoding="utf-8")
    for name, content in STORED["base64"].items():
        (place / name).write_bytes(base64.b64decode(content))

    def lay(name):
        for file, text in STORED["runs"][name].items():
            path = place / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return STORED["ends"][name]

    return lay


def state(run_dir):
    return json.loads((run_dir / "es_state.json").read_text())


@pytest.mark.parametrize("name", JOURNALLED)
def test_an_old_run_replays_to_the_same_bits(run_model, place, old, name):
    end = old(name)
    done = run_model("replay", "--run", name, "--output_dir", "rebuilt")
    assert done.code == 0 and end["fingerprint"] in done.out, done


@pytest.mark.parametrize("name", ["toy_full", "toy_lowrank"])
def test_an_old_run_resumes_to_the_bits_of_a_longer_one(run, place, old, name):
    end = old(name)
    before = (place / name / "journal.jsonl").read_text()
    done = run("train", "--resume", "--output_dir", name, "--max_steps", end["longer_steps"])
    assert done.code == 0 and "Traceback" not in done.err, done
    assert state(place / name)["fingerprint"] == end["longer_fingerprint"]
    assert (place / name / "journal.jsonl").read_text().startswith(before)


@pytest.mark.parametrize("name", [full("own_full"), "own_lowrank", full("decimals"), "countdown"])
def test_an_old_run_of_a_language_model_resumes(run_model, place, old, name):
    """Its journalled steps are exact; those that follow depend on how this processor rounds."""
    end = old(name)
    done = run_model("train", "--resume", "--output_dir", name)  # its weights are gone, its steps are all there
    assert done.code == 0, done
    assert state(place / name)["fingerprint"] == end["fingerprint"]
    done = run_model("train", "--resume", "--output_dir", name, "--max_steps", end["steps"] + 1)
    assert done.code == 0, done
    kinds = [line["kind"] for line in journal(place / name)]
    assert kinds.count("step") == end["steps"] + 1
    told = "recorded no values of bonus" in done.err
    assert told == (name == "decimals"), done.err


def test_an_old_run_evaluates(run_model, place, old):
    old("own_full")
    assert run_model("train", "--resume", "--output_dir", "own_full").code == 0
    done = run_model("evaluate", "--model", "own_full", "--json")
    assert done.code == 0 and json.loads(done.out)["n"] == 6, done


def test_an_old_run_is_not_resumed_on_other_data(run_model, place, old):
    old("own_full")
    rows = (place / "rows.jsonl").read_text()
    (place / "rows.jsonl").write_text(rows.replace("3.5", "4.5"))
    done = run_model("train", "--resume", "--output_dir", "own_full", "--max_steps", 3)
    assert_refused(Done(done.code, "", done.err), "training data")


@pytest.mark.parametrize("name", ["own_full", "own_lowrank"])
def test_an_old_patch_applies(run_model, place, old, name):
    end = old(name)
    done = run_model("apply", f"{name}.estp", "--model", "tiny", "--output_dir", "applied")
    assert done.code == 0 and end["fingerprint"] in done.out, done


def test_an_old_random_search_resumes(run_model, place, old):
    end = old("random_search")
    done = run_model("train", "--resume", "--output_dir", "random_search", "--max_steps", end["steps"] + 1)
    assert done.code == 0 and "Traceback" not in done.err, done
    assert state(place / "random_search")["step"] == end["steps"] + 1
