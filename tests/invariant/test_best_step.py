"""The best step of a run, early stopping, and schedules over time: kept through kills and resumes."""

import json
import shutil
import signal

import pytest
from command_line import (
    TOY,
    assert_refused,
    assert_same_tree,
    journal,
    metrics,
    stamps,
    steps,
    tree,
    weights,
    write_rewards,
)
from tiers import full

from estune.monitor.report.data import read_run

WORKERS = (*TOY, "--population_size", 4, "--sigma", 0.1, "--save_steps", 2)
SMALL = (*WORKERS, "--reward_isolation", "inline")


# --- the best step ----------------------------------------------------------------------------------------------------

# Held-out accuracies: 4, 5, 4, 1, 5, 2, 7, 7, 1 of 46 rows; the best step is 6.
UNEVEN = (*TOY, "--population_size", 4, "--batch_size", 4, "--sigma", 0.1, "--learning_rate", 0.2, "--num_threads", 1,
          "--reward_isolation", "inline", "--eval_steps", 1, "--max_steps", 8)  # fmt: skip
BEST = (*UNEVEN, "--load_best_model_at_end")


def state(directory, name="es_state.json"):
    return json.loads((directory / name).read_text())


def evaluated(run_dir):
    return {record["step"]: record for record in metrics(run_dir) if "eval_reward" in record}


@pytest.fixture(scope="module")
def best_run(zygote, tmp_path_factory):
    """A finished run whose model is its best step, 6 of 8."""
    place = tmp_path_factory.mktemp("best")
    done = zygote.run(BEST, place)
    assert done.code == 0 and "the model is step 6 of 8, the best by eval_accuracy" in done.out, done
    return place / "run"


@pytest.fixture(scope="module")
def last_run(zygote, tmp_path_factory):
    """The same run with its last step as its model."""
    place = tmp_path_factory.mktemp("last")
    assert zygote.run(UNEVEN, place).code == 0
    return place / "run"


def test_the_best_step_is_the_model_for_every_command(run, place, best_run, last_run):
    shutil.copytree(best_run, place / "run")
    assert (best_run / "journal.jsonl").read_bytes() == (last_run / "journal.jsonl").read_bytes()
    assert metrics(best_run) == metrics(last_run)
    accuracies = {step: record["eval_accuracy"] for step, record in evaluated(best_run).items()}
    assert max(accuracies.values()) == accuracies[6] == accuracies[7] > accuracies[8]
    best = {"step": 6, "metric": "eval_accuracy", "value": accuracies[6], "greater_is_better": True, "global_step": 8}
    assert state(best_run)["best"] == best and state(best_run)["step"] == 6
    trainer_state = state(best_run, "trainer_state.json")
    assert (trainer_state["best_global_step"], trainer_state["best_metric"]) == (6, accuracies[6])
    assert trainer_state["global_step"] == 8
    before = stamps(place / "run")
    done = run(*BEST, "--resume")
    assert done.code == 0 and "is finished (8 steps); the model is step 6 of 8" in done.out, done
    for words, directory in (((), "default"), (("--step", 6), "six"), (("--step", 8), "eight")):
        done = run("replay", "--run", "run", *words, "--output_dir", directory)
        assert done.code == 0 and "verified" in done.out, done
    assert weights(place / "default") == weights(place / "six") == weights(best_run) != weights(place / "eight")
    assert weights(place / "eight") == weights(last_run)
    assert run("export", "--run", "run", "--patch", "run.estp").code == 0
    done = run("apply", "run.estp", "--model", "toy", "--engine", "toy", "--output_dir", "applied")
    assert done.code == 0 and state(best_run)["fingerprint"] in done.out, done
    assert weights(place / "applied") == weights(best_run)
    done = run("evaluate", "--model", "run", "--split", "validation", "--json")
    assert json.loads(done.out)["accuracy"] == pytest.approx(accuracies[6]), done
    assert "was chosen on these rows" in done.err, done
    done = run("evaluate", "--model", "run", "--json")
    assert done.code == 0 and "was chosen" not in done.err, done
    card = (best_run / "README.md").read_text()
    for text in ("6 steps of 4 members", "--step 6", state(best_run)["fingerprint"], "| after | 6 |",
                 "--max_steps 8", "--load_best_model_at_end true"):  # fmt: skip
        assert text in card, text
    page = read_run(best_run)
    assert page["fingerprint"] == state(best_run)["fingerprint"] and page["steps_done"] == 8
    assert (page["completions"]["first_step"], page["completions"]["last_step"]) == (0, 6)
    assert stamps(place / "run") == before
    done = run(*TOY[:-2], "--model", "run", "--max_steps", 0, "--output_dir", "next")
    assert done.code == 0, done
    assert journal(place / "next")[0]["base"]["fingerprint"] == state(best_run)["fingerprint"]


def test_the_card_is_written_after_a_kill_before_it(run, place, best_run):
    shutil.copytree(best_run, place / "run")
    (place / "run" / "README.md").unlink()
    assert run(*BEST, "--resume").code == 0
    assert_same_tree(tree(place / "run"), tree(best_run))


@pytest.mark.parametrize("every", [1, 4, full(6)])
def test_the_best_step_is_rebuilt_from_the_nearest_checkpoint(run, place, best_run, every):
    done = run(*BEST, "--save_steps", every)
    assert done.code == 0, done
    assert weights(place / "run") == weights(best_run)
    assert state(place / "run") == state(best_run)


def test_a_resume_of_a_finished_run_may_choose_another_model(run, place, best_run, last_run):
    """The last step, the best one, that of another metric, and the last one again; each model once."""
    shutil.copytree(last_run, place / "run")
    done = run("train", "--resume", "--output_dir", "run", "--load_best_model_at_end")
    assert done.code == 0 and "step 6 of 8" in done.out, done
    assert_same_tree(tree(place / "run"), tree(best_run))
    done = run("train", "--resume", "--output_dir", "run", "--metric_for_best_model", "reward")
    assert done.code == 0 and "the best by eval_reward" in done.out, done
    rewards = {step: record["eval_reward"] for step, record in evaluated(place / "run").items()}
    assert rewards[state(place / "run")["step"]] == max(rewards.values())
    assert run("train", "--resume", "--output_dir", "run", "--load_best_model_at_end", "false").code == 0
    assert_same_tree(tree(place / "run", without=("base/",)), tree(last_run))


def test_a_longer_run_chooses_again(run, place, best_run):
    """The first choice is replaced by that of all steps."""
    assert run(*BEST, "--max_steps", 3).code == 0
    assert state(place / "run")["step"] == 1
    done = run("train", "--resume", "--output_dir", "run", "--max_steps", 8)
    assert done.code == 0, done
    assert state(place / "run") == state(best_run) and weights(place / "run") == weights(best_run)


def test_a_damaged_model_of_the_best_step_is_written_again(run, place, best_run):
    for damage in ("model.safetensors", "es_state.json"):
        shutil.rmtree(place / "run", ignore_errors=True)
        shutil.copytree(best_run, place / "run")
        path = place / "run" / damage
        path.write_bytes(path.read_bytes().replace(b'"step": 6', b'"step": 5')[:-9])
        assert run(*BEST, "--resume").code == 0
        assert_same_tree(tree(place / "run"), tree(best_run))


def test_the_base_model_is_the_best_step_if_no_step_is_better(run, place):
    words = ("--metric_for_best_model", "eval_reward", "--learning_rate", 0.4, "--max_steps", 3)
    done = run(*BEST, *words)
    assert done.code == 0 and "no step is better than the base model by eval_reward" in done.err, done
    assert state(place / "run")["step"] == 0
    assert state(place / "run")["fingerprint"] == journal(place / "run")[0]["base"]["fingerprint"]
    before = stamps(place / "run")
    assert run(*BEST, *words, "--resume").code == 0 and stamps(place / "run") == before


def test_early_stopping(run, place, best_run):
    """The run ends as if max_steps were reached, and more patience continues it."""
    done = run(*BEST, "--early_stopping_patience", 2)
    assert done.code == 0 and "stopped early after 3 steps: 2 evaluations without a better eval_accuracy" in done.out
    assert len(steps(place / "run")) == 3 and state(place / "run")["step"] == 1
    before = stamps(place / "run")
    done = run("train", "--resume", "--output_dir", "run")
    assert done.code == 0 and "is finished (3 steps, stopped early" in done.out, done
    assert stamps(place / "run") == before
    done = run("train", "--resume", "--output_dir", "run", "--early_stopping_patience", 5)
    assert done.code == 0 and "stopped early" not in done.out, done
    assert weights(place / "run") == weights(best_run) and steps(place / "run") == steps(best_run)


def test_early_stopping_without_the_best_step(run, place):
    done = run(*UNEVEN, "--early_stopping_patience", 1, "--early_stopping_threshold", 0.5)
    assert done.code == 0 and "stopped early after 1 step:" in done.out, done
    assert "the run's model will be that of its last step" in done.err
    assert state(place / "run")["step"] == len(steps(place / "run")) == 1 and "best" not in state(place / "run")


def test_the_last_step_of_a_run_that_stops_early_is_logged(run, place):
    assert run(*UNEVEN, "--early_stopping_patience", 2, "--logging_steps", 100).code == 0
    assert [record["step"] for record in metrics(place / "run") if "reward" in record][-1] == 3


def test_what_cannot_choose_is_refused_before_anything_is_written(call, place):
    rows = "".join(json.dumps({"prompt": f"x[{i}]", "wanted": i / 10}) + "\n" for i in range(4))
    (place / "data").mkdir()
    for split in ("train", "test", "validation"):
        (place / "data" / f"{split}.jsonl").write_text(rows)
    refused = call(*BEST, "--metric_for_best_model", "eval_acuracy")
    assert_refused(refused, "eval_acuracy", "eval_accuracy, eval_reward", "eval_clipped_ratio", "did you mean")
    for words in (("--load_best_model_at_end",), ("--early_stopping_patience", 2)):
        assert_refused(call(*UNEVEN, *words, "--dataset_name", "data"), "'test'", "final measurement", "validation")
    assert not (place / "run").exists()
    done = call(*BEST, "--max_steps", 1, "--dataset_name", "data", "--dataset_test_split", "validation")
    assert done.code == 0, done


def test_a_resume_cannot_change_the_rows_that_choose(run, place, best_run):
    shutil.copytree(best_run, place / "run")
    before = stamps(place / "run")
    done = run("train", "--resume", "--output_dir", "run", "--max_steps", 9, "--eval_rows", 5)
    assert_refused(done, "held-out rows", "load_best_model_at_end")
    assert stamps(place / "run") == before


def test_an_engine_that_cannot_return_to_the_best_step_is_refused(run, place):
    (place / "fixed.py").write_text(
        "from estune.engines.toy import ToyEngine\n\n\n"
        "class Fixed:\n"
        "    name = 'fixed'\n\n"
        "    def __init__(self):\n"
        "        self.engine = ToyEngine()\n\n"
        "    @classmethod\n"
        "    def open(cls, options):\n"
        "        return cls()\n\n"
        "    def __getattr__(self, name):\n"
        "        if name == 'load_anchor':\n"
        "            raise AttributeError(name)\n"
        "        return getattr(self.engine, name)\n"
    )
    (place / "data").mkdir()
    for number, split in enumerate(("train", "validation")):
        (place / "data" / f"{split}.jsonl").write_text(f'{{"prompt": "x[{number}]", "wanted": 0.5}}\n' * 4)
    done = run("train", "--engine", "fixed.py:Fixed", "--dataset_name", "data", "--dataset_test_split", "validation",
               "--reward_funcs", "rewards.py:logged", *BEST[5:])  # fmt: skip
    assert_refused(done, "load_anchor", "best step")
    assert not (place / "run" / "journal.jsonl").exists()


# --- schedules over time ----------------------------------------------------------------------------------------------

# Runs `estune` with a false clock: each update takes three seconds, and everything else no time.
CLOCKED = """
import sys
from types import SimpleNamespace

from estune.cli import main
from estune.train import session

now, plain = [0.0], session.Session.apply


def apply(self, update):
    now[0] += 3.0
    return plain(self, update)


session.Session.apply = apply
session.time = SimpleNamespace(perf_counter=lambda: now[0])
sys.exit(main(sys.argv[1:]))
"""
TIMED = (*SMALL, "--num_threads", 1, "--lr_scheduler_type", "linear", "--sigma_scheduler_type", "linear",
         "--max_steps", 100, "--max_time_s", 15)  # fmt: skip


@pytest.fixture
def timed(zygote, place):
    """``timed(*words, **options)``: run a command with the false clock."""
    script = place / "clocked.py"
    script.write_text(CLOCKED)

    def start(*words, **options):
        return zygote.run(words, place, script=script, **options)

    return start


def test_schedules_over_time(run, timed, place):
    """Five steps of three seconds, of which each takes a fifth of the time."""
    done = timed(*TIMED)
    assert done.code == 0, done
    lines = steps(place / "run")
    assert len(lines) == 5
    for index, line in enumerate(lines):
        assert line["schedules"] == pytest.approx({"learning_rate": 1 - index / 5, "sigma": 1 - index / 5})
        assert float.fromhex(line["s"]) == pytest.approx(0.1 * (1 - index / 5) / 8**0.5, rel=2e-5)
    assert [record["es/sigma"] for record in metrics(place / "run")] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    rates = [record["learning_rate"] for record in metrics(place / "run")]
    assert rates == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01])
    assert run("replay", "--run", "run", "--output_dir", "out").code == 0
    assert weights(place / "out") == weights(place / "run")
    card = (place / "run" / "README.md").read_text()
    assert "--max_time_s 15" in card and "--max_steps 100" in card


def test_a_limit_of_time_that_is_far_away_changes_no_bit(run, timed, place):
    words = ("--max_steps", 4, "--warmup_steps", 2)
    assert timed(*TIMED, *words, "--max_time_s", 1e6).code == 0
    (place / "run").rename(place / "timed")
    assert run(*TIMED, *words, "--max_time_s", 0).code == 0
    assert "schedules" not in steps(place / "run")[0]
    assert steps(place / "timed", without=("hash", "schedules")) == steps(place / "run")
    assert weights(place / "timed") == weights(place / "run")


def cut_off(zygote, place, options, members, **environment):
    """Kill a run of the false clock in its third step, when ``members`` members of that step are on disk."""
    (place / "clocked.py").write_text(CLOCKED)
    for kill_at in range(30, 200):
        shutil.rmtree(place / "run", ignore_errors=True)
        done = zygote.run(options, place, script=place / "clocked.py", kill_at=kill_at, **environment)
        assert done.code == -signal.SIGKILL, done
        text = (place / "run" / "journal.jsonl").read_text()
        pending = place / "run" / "pending.jsonl"
        lines = pending.read_text().splitlines() if pending.exists() else []
        if text.count('"kind":"step"') == 2 and sum('"group"' in line for line in lines) == members:
            return
    raise AssertionError("no kill left a part of the third step")


@pytest.fixture(scope="module")
def cut_off_run(zygote, tmp_path_factory):
    """A run of the false clock that was killed after two members of its third step, and its whole journal."""
    place = tmp_path_factory.mktemp("timed")
    (place / "clocked.py").write_text(CLOCKED)
    assert zygote.run(TIMED, place, script=place / "clocked.py").code == 0
    whole = journal(place / "run")
    cut_off(zygote, place, TIMED, 2)
    return place / "run", whole


def test_a_step_that_was_cut_off_keeps_its_sigma_if_the_run_gets_longer(zygote, run, place):
    """Sigma falls over the steps. Three members of the second step were made for four steps; the resume has eight."""
    write_rewards(place)
    options = (*SMALL, "--num_threads", 1, "--sigma_scheduler_type", "linear", "--max_steps", 4)
    assert run(*options).code == 0
    whole = journal(place / "run")
    shutil.rmtree(place / "run")
    for kill_at in range(10, 200):
        shutil.rmtree(place / "run", ignore_errors=True)
        assert zygote.run(options, place, kill_at=kill_at).code == -signal.SIGKILL
        pending = place / "run" / "pending.jsonl"
        groups = pending.read_text().count('"group"') if pending.exists() else 0
        if (place / "run" / "journal.jsonl").read_text().count('"kind":"step"') == 1 and groups == 3:
            break
    else:
        raise AssertionError("no kill left three members of the second step")
    assert run("train", "--resume", "--output_dir", "run", "--max_steps", 8).code == 0
    first, second, third = steps(place / "run")[:3]
    assert second["s"] == [line for line in whole if line["kind"] == "step"][1]["s"]
    assert second["schedules"]["sigma"] == 0.75 and "schedules" not in first and "schedules" not in third
    assert float.fromhex(third["s"]) == pytest.approx(0.75 * float.fromhex(first["s"]), rel=2e-5)
    assert run("replay", "--run", "run", "--output_dir", "out").code == 0
    assert weights(place / "out") == weights(place / "run")


@pytest.mark.parametrize("words", [(), ("--max_time_s", 1000), ("--max_time_s", 0), ("--max_steps", 7)], ids=str)
def test_a_step_that_was_cut_off_keeps_its_factors(run, timed, place, cut_off_run, words):
    """Although the resume believes that more time has passed, or has another limit."""
    killed, whole = cut_off_run
    shutil.copytree(killed, place / "run")
    path = place / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**record, "train_time_s": 8.0}) + "\n" for record in records))
    done = timed("train", "--resume", "--output_dir", "run", "--max_steps", 4 if words else 100, *words)
    assert done.code == 0, done
    found = journal(place / "run")
    assert [line["kind"] for line in found[:5]] == ["header", "step", "step", "checkpoint", "step"]
    assert found[:5] == whole[:5]
    if not words:  # the next step follows the time that the resume knows
        assert found[5]["schedules"]["sigma"] == pytest.approx(1 - 11 / 15, abs=1e-2)
    assert run("replay", "--run", "run", "--output_dir", "out").code == 0
    assert weights(place / "out") == weights(place / "run")


def test_a_resume_knows_the_time_that_metrics_lack(zygote, timed, place):
    """With rare logging a step that was cut off holds the time of those before."""
    words = (*TIMED, "--logging_steps", 100)
    cut_off(zygote, place, words, 2)
    assert timed("train", "--resume", "--output_dir", "run").code == 0
    sigmas = [line["schedules"]["sigma"] for line in steps(place / "run")]
    assert sigmas == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], abs=1e-2)


def test_members_whose_sigma_is_not_known_are_evaluated_again(zygote, timed, place):
    """An older estune made them, before the run had a limit of time, and did not store the factor of sigma."""
    write_rewards(place)
    words = (*TIMED, "--max_steps", 4, "--reward_funcs", "rewards.py:logged", "--max_time_s", 0)
    cut_off(zygote, place, words, 3)
    pending = place / "run" / "pending.jsonl"
    lines = pending.read_text().splitlines(keepends=True)
    assert ["schedules" in line for line in lines] == [True, False, False, False]
    pending.write_text("".join(lines[1:]))
    done = timed("train", "--resume", "--output_dir", "run", "--max_time_s", 8, env={"CALLS": "second"})
    assert done.code == 0 and len(steps(place / "run")) == 3, done
    line = steps(place / "run")[2]
    assert line["schedules"]["sigma"] == pytest.approx(1 - 6 / 8, abs=1e-2)
    assert len((place / "second").read_text().splitlines()) == 4  # all members of the third step
