"""Nothing that a reward says or an option names ends a run in a traceback, or loses anything."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import TOY, assert_refused, journal, metrics, steps, weights

SMALL = (*TOY, "--max_steps", 3, "--population_size", 4, "--batch_size", 4, "--sigma", 0.1)

HOSTILE = {
    "huge_metric": "log_metric('big', 1e308); log_metric('big', 1e308)",
    "infinite_metric": "log_metric('odd', float('inf')); log_metric('odd', float('-inf'))",
    "short_extra": "log_extra('note', ['one'])",
    "surrogate_extra": "log_extra('note', ['\\ud800'] * len(completions))",
    "deep_extra": "log_extra('note', [functools.reduce(lambda x, _: [x], range(980), 0)] * len(completions))",
    "stolen_names": "log_metric('step', 0.5); log_metric('reward', 99); log_metric('eval_reward', 1)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_reward_logs_cannot_end_a_run(run, place, name):
    (place / "hostile.py").write_text(
        "import functools\n"
        "def reward(completions, wanted, log_metric, log_extra, **_):\n"
        f"    {HOSTILE[name]}\n"
        "    return [-(float(text) - value) ** 2 for text, value in zip(completions, wanted)]\n"
    )
    done = run(*SMALL, "--reward_funcs", "hostile.py:reward", "--log_completions", "--eval_steps", 1)
    assert done.code == 0, done
    trained = [record for record in metrics(place / "run") if "eval_rows" not in record]
    assert [record["step"] for record in trained] == [1, 2, 3]
    assert all(record["reward"] < 0 for record in trained)
    if name == "stolen_names":
        assert (
            trained[0]["user/reward"] == 99 and trained[0]["user/step"] == 0.5 and trained[0]["user/eval_reward"] == 1
        )


@pytest.mark.parametrize("way", [("--reward_weights", 5), ("--fitness_shaping", "none")], ids=lambda way: way[0])
def test_rewards_near_the_largest_allowed_move_theta(run, place, way):
    (place / "huge.py").write_text(
        "def reward(completions, **_):\n    return [1e299 * float(t) for t in completions]\n"
    )
    done = run(*SMALL, "--reward_funcs", "huge.py:reward", *way, "--learning_rate", 1e-300)
    assert done.code == 0, done
    assert all(any(line["q"]) for line in steps(place / "run"))


def test_a_reward_that_only_watches_stops_nothing(run, place):
    """A function of weight 0 that always fails drops no row."""
    words = (*SMALL, "--reward_funcs", "rewards.py:logged", "rewards.py:always_raising", "--reward_weights", 1, 0)
    assert run(*words).code == 0
    assert all(any(line["q"]) for line in steps(place / "run"))


def test_a_run_whose_rewards_always_fail_says_that_nothing_was_learned(run):
    done = run(*SMALL, "--reward_funcs", "rewards.py:always_raising")
    assert done.code == 0
    assert "theta never moved" in done.err


def test_a_run_that_diverges_stops_and_says_so(run, place):
    done = run(*SMALL, "--learning_rate", 1e39)
    for result in (done, run("train", "--resume", "--output_dir", "run")):
        assert result.code == 2
        assert "estune: error: theta diverged in step 1" in result.err
        assert "Traceback" not in result.err
    assert not (place / "run" / "model.safetensors").exists()


def test_overwriting_deletes_neither_the_base_nor_other_files(run, place):
    assert run(*SMALL).code == 0
    before = weights(place / "run")
    assert_refused(run(*SMALL, "--model", "run", "--overwrite"), "would delete run", "model")
    (place / "run" / "notes.md").write_text("mine")
    assert_refused(run(*SMALL, "--overwrite"), "notes.md")
    assert weights(place / "run") == before


def test_training_on_a_mistyped_run_is_refused(run, place):
    assert_refused(run("train", "--resume", "--output_dir", "nowhere"), "nowhere", "no run to resume")
    assert not (place / "nowhere").exists()


def test_an_interrupt_costs_no_scheduled_checkpoint(run, place):
    """A checkpoint saved out of turn is neither kept for good nor kept instead of one in turn."""
    words = (*SMALL, "--max_steps", 12, "--save_steps", 5, "--save_total_limit", 1, "--reward_funcs", "rewards.py:slow",
             "--reward_timeout_s", 3600)  # fmt: skip
    command = [sys.executable, "-m", "estune", *map(str, words)]
    env = {**os.environ, "CALLS": "calls", "HOLD_AFTER": str(7 * 4 + 1)}  # from the eighth step on; one call is theta's
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    path = place / "run" / "journal.jsonl"
    while not path.exists() or path.read_text().count('"kind":"step"') < 7:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    (place / "gate").touch()
    process.communicate()
    assert process.returncode == 0
    out_of_turn = {p.name for p in (place / "run").glob("checkpoint-*")} - {"checkpoint-5", "checkpoint-10"}
    assert len(out_of_turn) == 1
    assert run("train", "--resume", "--output_dir", "run").code == 0
    assert {p.name for p in (place / "run").glob("checkpoint-*")} == {"checkpoint-10"}


def test_a_pending_line_that_lacks_a_field_costs_one_evaluation(run, place):
    assert run(*SMALL, "--max_steps", 1).code == 0
    whole = weights(place / "run")
    header = (place / "run" / "journal.jsonl").read_bytes().splitlines(keepends=True)[0]
    for path in (place / "run").iterdir():
        if path.name not in ("es_config.json", "journal.jsonl", "env.json"):
            path.unlink()
    (place / "run" / "journal.jsonl").write_bytes(header)
    line = {"after": json.loads(header)["hash"], "group": 0, "result": {"rewards": []}}
    (place / "run" / "pending.jsonl").write_text(json.dumps(line) + "\n")
    assert run("train", "--resume", "--output_dir", "run").code == 0
    assert weights(place / "run") == whole


def test_a_resume_on_changed_data_is_refused(run, place):
    rows = [{"prompt": f"x[{i}]", "wanted": 0.1} for i in range(4)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (*SMALL, "--dataset_name", "rows.jsonl")
    assert run(*words).code == 0
    assert journal(place / "run")[0]["data"]["rows"] == 4
    rows[0]["wanted"] = 0.2
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_refused(run("train", "--resume", "--output_dir", "run", "--max_steps", 4), "data")


def test_evaluate_names_the_split_it_read_and_decodes_as_the_run_did(run, place):
    (place / "data").mkdir()
    for split, wanted in (("train", 0.0), ("test", 0.5)):
        lines = [json.dumps({"prompt": f"x[{i}]", "wanted": wanted}) + "\n" for i in range(4)]
        (place / "data" / f"{split}.jsonl").write_text("".join(lines))
    assert run(*SMALL, "--dataset_name", "data", "--max_completion_length", 9, "--eval_steps", 3).code == 0
    words = ("evaluate", "--engine", "toy", "--model", "run", "--dataset_name", "data", "--task", "quadratic", "--json")
    assert json.loads(run(*words).out)["split"] == "test"
    trained_on = json.loads(run(*words, "--dataset_test_split", "train").out)
    assert trained_on["split"] == "train"
    assert trained_on["mean_length_tokens"] <= 9  # the run's limit, not the default
    assert_refused(run(*words, "--split", "train"), "dataset_test_split")
