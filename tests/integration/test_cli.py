"""The command line: help imports little, `--json` prints one object, evaluations agree, and every task trains."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from command_line import TOY, assert_refused, estune, journal, metrics, write_rewards
from tiers import few

from estune.config import read_config_file
from estune.console import rounded
from estune.tasks import TASKS

pytestmark = pytest.mark.miniature

COMMANDS = tuple("train evaluate score probe plan replay export apply report watch fetch env".split())


def one_object(done):
    """Return the only thing on stdout, one JSON object on one line."""
    assert done.code == 0, done
    assert done.out.count("\n") == 1 and done.out.endswith("}\n"), done.out
    return json.loads(done.out)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_no_package_but_the_few_that_describe_options(place, command):
    """This keeps it fast; `benchmarks/bench.py` measures the time."""
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom estune.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print('LOADED', *sorted(tops - sys.stdlib_module_names))\n"
    )
    words = [*([command] if command else []), "--help"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done
    *text, last = done.stdout.splitlines()
    assert text[0].startswith("usage: estune")
    assert set(last.split()) <= {"LOADED", "estune", "numpy"}, last


@pytest.mark.parametrize("command", ["train", "evaluate", "score"])
def test_help_names_each_task(run, command):
    text = run(command, "--help").out
    assert all(name in text for name in TASKS)


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("replay", "RUN --output_dir DIR"),
        ("export", "RUN --patch FILE"),
        ("apply", "PATCH --model MODEL"),
        ("score", "--completions FILE"),
    ],
)
def test_help_marks_required_options(run, command, usage):
    text = run(command, "--help").out
    assert f"usage: estune {command} {usage} [options]" in text and "[required]" in " ".join(text.split())


def test_help_names_every_command(place):
    done = estune("--help", cwd=place)
    assert done.code == 0 and all(command in done.out for command in COMMANDS)
    assert estune(cwd=place).out == done.out  # no command: the same


def test_the_installed_command_is_the_module(place):
    version = subprocess.run(["estune", "--version"], capture_output=True, text=True, cwd=place, env=_with_scripts())
    assert version.stdout == estune("--version", cwd=place).out == f"estune {metadata.version('estune')}\n"


def _with_scripts():
    import os
    from pathlib import Path

    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_a_reader_that_leaves_does_not_end_the_run(place):
    words = [sys.executable, "-m", "estune", *map(str, (*TOY, "--max_steps", 5, "--population_size", 4))]
    process = subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    with process.stderr as errors:
        assert "Traceback" not in errors.read()
    process.wait()
    assert len(metrics(place / "run")) == 5 and (place / "run" / "model.safetensors").exists()


# --- env --------------------------------------------------------------------------------------------------------------


def test_env(run):
    facts = one_object(run("env", "--json"))
    assert facts["versions"]["estune"] == metadata.version("estune")
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert facts["cores"] >= 1 and facts["memory_gib"] > 0
    assert facts["versions"]["numba"] in run("env").out


# --- score ------------------------------------------------------------------------------------------------------------

THINK = "<think>hm</think>\n"
SCORED = [  # completion, numbers, target, reward, right
    (THINK + "<answer>(1 + 2) * 3</answer>", [1, 2, 3], 9, 1.1, True),
    (THINK + "<answer>(1 + 2) * 3</answer>", [1, 2, 3], "9", 1.1, True),
    (THINK + "<answer>(1 + 2) * 3</answer>", [1, 2, 3], 9.0, 1.1, True),
    (THINK + "<answer>55 / 2</answer>", [55, 2], "27.5", 1.1, True),
    (THINK + "<answer>3 + 3 + 3</answer>", [1, 2, 3], 9, 0.1, False),
    ("<answer>(1 + 2) * 3</answer>", [1, 2, 3], 9, 1.05, True),
    ("(1 + 2) * 3", [1, 2, 3], 9, 0.0, False),
    ("", [1, 2, 3], 9, 0.0, False),
]


def test_score(run, place):
    with (place / "c.jsonl").open("w") as file:
        for completion, numbers, target, *_ in SCORED:
            file.write(json.dumps({"completion": completion, "numbers": numbers, "target": target}) + "\n")
    result = one_object(run("score", "--task", "countdown", "--completions", "c.jsonl", "--json"))
    assert set(result) >= {"n", "reward", "accuracy", "rewards", "errors"}
    assert result["n"] == len(SCORED) and result["errors"] == 0
    assert result["rewards"] == pytest.approx([reward for *_, reward, _ in SCORED])
    assert result["reward"] == pytest.approx(math.fsum(result["rewards"]) / len(SCORED))
    assert result["accuracy"] == pytest.approx(sum(right for *_, right in SCORED) / len(SCORED))
    assert f"{result['accuracy']:.1%}" in run("score", "--task", "countdown", "--completions", "c.jsonl").out


def test_score_with_a_users_rewards(run, place):
    rows = [
        {"completion": text, "wanted": wanted} for text, wanted in (("0.5", 0.5), ("1", -0.5), ("0", 0.25), ("x", 0.1))
    ]
    (place / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        "score",
        "--completions",
        "c.jsonl",
        "--json",
        "--reward_funcs",
        "rewards.py:raising",
        "rewards.py:inapplicable",
        "--reward_weights",
        1,
        2,
    )
    result = one_object(run(*words))
    assert result["n"] == 4 and "accuracy" not in result
    # row 1: raising fails, inapplicable says None; row 3: both raise
    assert result["rewards"][0] == 0 and result["rewards"][2] == pytest.approx(3 * -0.0625)
    assert result["rewards"][1] is None and result["rewards"][3] is None
    assert result["errors"] == 2
    assert result["reward"] == pytest.approx((0 + 3 * -0.0625) / 2)


def test_score_with_other_names_of_columns(run, place):
    write_rewards(place)
    (place / "c.tsv").write_text("response\taim\n0.5\t0.5\n1.5\t0.5\n")
    words = ("score", "--completions", "c.tsv", "--reward_funcs", "rewards.py:logged", "--json")
    mapping = ("--column_mapping", '{"completion": "response", "wanted": "aim"}')
    assert_refused(run(*words, *mapping), "its completion is 0.5, not a string")
    (place / "c.tsv").write_text("response\taim\n0.5\t0.5\n0.5x\t0.5\n")
    found = one_object(run(*words, *mapping))
    assert found["rewards"] == [0.0, None] and found["errors"] == 1
    assert_refused(run(*words), "no column 'completion'")


def test_score_needs_to_know_what(run, place):
    (place / "c.jsonl").write_text('{"completion": "1"}\n')
    assert_refused(run("score", "--completions", "c.jsonl"), "reward_funcs")


# --- evaluate ---------------------------------------------------------------------------------------------------------


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def toy_run(zygote, tmp_path_factory):
    """A run with an evaluation for every checkpoint."""
    place = tmp_path_factory.mktemp("toy")
    words = (
        *TOY,
        "--max_steps",
        4,
        "--population_size",
        8,
        "--sigma",
        0.1,
        "--learning_rate",
        0.2,
        "--eval_steps",
        2,
        "--save_steps",
        2,
    )
    assert zygote.run(words, place).code == 0
    return place


@pytest.mark.parametrize("step", [0, 2, 4])
def test_an_evaluation_in_a_run_is_that_of_its_checkpoint(zygote, toy_run, step):
    model = f"run/checkpoint-{step}" if step else "toy"
    words = ("evaluate", "--engine", "toy", "--task", "quadratic", "--model", model, "--split", "validation", "--json")
    result = one_object(zygote.run((*words, "--rows", "rows.jsonl", "--prompts_per_batch", 7), toy_run))
    assert rows_of(toy_run / "rows.jsonl") == rows_of(toy_run / "run" / "eval" / f"step_{step:05d}.jsonl")
    (logged,) = [record for record in metrics(toy_run / "run") if "eval_reward" in record and record["step"] == step]
    now = [result[name] for name in ("n", "reward", "accuracy")]
    assert now == rounded([logged[name] for name in ("eval_rows", "eval_reward", "eval_accuracy")])
    assert set(result) >= {"task", "n", "accuracy", "accuracy_ci95", "reward", "mean_length_tokens"}
    low, high = result["accuracy_ci95"]
    assert 0 <= low <= result["accuracy"] <= high <= 1


def test_evaluate_takes_what_a_run_says_of_its_model(zygote, toy_run):
    config = json.loads((toy_run / "run" / "es_config.json").read_text())
    words = ("evaluate", "--engine", config["engine"], "--task", config["task"], "--json")
    base = one_object(zygote.run((*words, "--model", config["model"]), toy_run))
    tuned = one_object(zygote.run((*words, "--model", "run"), toy_run))
    assert tuned["reward"] > base["reward"]


def test_evaluate_options(zygote, toy_run):
    words = ("evaluate", "--engine", "toy", "--task", "quadratic", "--model", "run", "--json")
    whole = {
        split: one_object(zygote.run((*words, "--split", split), toy_run)) for split in ("train", "validation", "test")
    }
    assert len({result["reward"] for result in whole.values()}) == 3
    assert one_object(zygote.run(words, toy_run)) == whole["test"]
    assert one_object(zygote.run((*words, "--limit", 3), toy_run))["n"] == 3
    one_object(zygote.run((*words, "--rows", "new/deep/rows.jsonl", "--limit", 2), toy_run))
    assert len(rows_of(toy_run / "new" / "deep" / "rows.jsonl")) == 2
    text = zygote.run(words[:-1], toy_run)
    assert text.code == 0 and "accuracy" in text.out and "95 %" in text.out
    for name in ("--limit", "--n_samples"):
        assert_refused(zygote.run((*words, name, -1), toy_run), name[2:])


def test_evaluate_against_a_reference_without_token_probabilities(zygote, toy_run):
    words = ("evaluate", "--engine", "toy", "--task", "quadratic", "--model", "run", "--json")
    alone = one_object(zygote.run(words, toy_run))
    base = one_object(zygote.run((*words, "--model", "toy"), toy_run))
    done = zygote.run((*words, "--reference", "toy", "--rows", "rows.jsonl"), toy_run)
    found = one_object(done)
    assert found["kl"] is None and "kl is unknown: the toy engine has no token probabilities" in done.err
    assert {name: found[name] for name in alone} == alone
    assert {name: value for name, value in base.items() if name not in ("task", "split")} == (
        found["reference"] | {"model": base["model"]}
    )
    rows = rows_of(toy_run / "rows.jsonl")
    pairs = [(row["reference"]["accuracy"][0], row["accuracy"][0]) for row in rows]
    moved = found["against_reference"]["accuracy"]
    counts = [pairs.count(pair) for pair in ((1.0, 1.0), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0))]
    assert [moved[name] for name in ("both_right", "both_wrong", "progressions", "regressions")] == counts
    assert moved["difference"] == pytest.approx(alone["accuracy"] - base["accuracy"])
    gains = [row["rewards"][0] - row["reference"]["rewards"][0] for row in rows]
    reward = found["against_reference"]["reward"]
    assert [reward["wins"], reward["losses"]] == [sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)]
    assert reward["wins"] > reward["losses"] and reward["n"] == len(rows)
    low, high = reward["difference_ci95"]
    assert low < reward["difference"] < high
    text = zygote.run((*words[:-1], "--reference", "toy"), toy_run)
    assert text.code == 0 and f"{counts[2]} won (wrong to right), {counts[3]} lost" in text.out
    assert_refused(zygote.run((*words, "--reference", "nowhere", "--rows", "new.jsonl"), toy_run), "nowhere")
    assert not (toy_run / "new.jsonl").exists()


def test_a_reward_without_accuracy_that_fails_is_compared_with_the_reference(zygote, toy_run):
    (toy_run / "half.py").write_text(
        "def half(completions, wanted, **_):\n    return [None if w < 0 else 1 / (w - 0.5) for w in wanted]\n"
    )
    (toy_run / "own.jsonl").write_text(
        "".join(json.dumps({"prompt": f"x[{i}]", "wanted": [0.5, -1.0, 1.0][i]}) + "\n" for i in range(3))
    )
    words = ("evaluate", "--engine", "toy", "--task", "quadratic", "--model", "run", "--dataset_name", "own.jsonl",
             "--reward_funcs", "half.py:half", "--json", "--prompts_per_batch", 1, "--reference", "toy")  # fmt: skip
    done = zygote.run(words, toy_run)
    found = one_object(done)
    assert found["reward_failures"] == found["reference"]["reward_failures"] == 1
    assert done.err.count("ZeroDivisionError") == 1  # the same failure of both models is shown once
    reward = found["against_reference"]["reward"]
    assert (reward["n"], reward["ties"], reward["p_value"]) == (2, 2, 1.0)
    one = one_object(zygote.run((*words, "--limit", 1), toy_run))
    assert "reward" not in one["against_reference"] and one["reward"] is None


def test_evaluate_with_a_users_data_and_rewards(zygote, toy_run):
    write_rewards(toy_run)
    (toy_run / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"x[{i}]", "wanted": 0.5}) + "\n" for i in range(5))
    )
    words = (
        "evaluate",
        "--engine",
        "toy",
        "--task",
        "quadratic",
        "--model",
        "toy",
        "--dataset_name",
        "rows.jsonl",
        "--json",
    )
    assert one_object(zygote.run(words, toy_run))["reward"] == -0.25
    second = one_object(zygote.run((*words, "--reward_funcs", "rewards.py:second"), toy_run))
    assert (second["n"], second["reward"]) == (5, 0.0)


# --- a language model -------------------------------------------------------------------------------------------------

LENGTH = ("--max_completion_length", 24, "--num_threads", 1)


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def tiny_run(request, torch_zygote, tmp_path_factory):
    """A short run on the embedded model; (its directory, its options for `estune evaluate`)."""
    place = tmp_path_factory.mktemp("tiny")
    sampled = ("--temperature", 0.8, "--num_generations", 2, "--seed", 5) if request.param == "sampled" else ()
    options = (*LENGTH, *sampled)
    words = (
        "train",
        "--task",
        "countdown",
        "--output_dir",
        "run",
        "--max_steps",
        2,
        "--population_size",
        2,
        "--batch_size",
        4,
        "--sigma",
        0.02,
        "--eval_steps",
        2,
        "--eval_rows",
        12,
        "--save_steps",
        2,
        "--report_to",
        "none",
        *options,
    )
    done = torch_zygote.run(words, place)
    assert done.code == 0, done
    return place, options


def test_an_evaluation_of_a_language_model_in_a_run_is_that_of_its_checkpoint(torch_zygote, tiny_run):
    tiny_run, options = tiny_run
    config = json.loads((tiny_run / "run" / "es_config.json").read_text())
    assert config["model"] == "tiny"
    assert journal(tiny_run / "run")[0]["base"]["model"] == "tiny"
    found = {}
    for step, model in ((0, config["model"]), (2, "run/checkpoint-2"), (2, "run")):
        words = (
            "evaluate",
            "--model",
            model,
            "--task",
            "countdown",
            "--split",
            "validation",
            "--limit",
            12,
            "--json",
            *options,
        )
        found[model] = one_object(torch_zygote.run((*words, "--rows", "rows.jsonl"), tiny_run))
        assert rows_of(tiny_run / "rows.jsonl") == rows_of(tiny_run / "run" / "eval" / f"step_{step:05d}.jsonl")
    assert found["run"] | {"model": ""} == found["run/checkpoint-2"] | {"model": ""}


def test_greedy_answers_samples_and_a_reference(torch_zygote, tiny_run):
    tiny_run, options = tiny_run
    words = ("evaluate", "--model", "run", "--task", "countdown", "--limit", 6, "--json", *LENGTH)
    greedy = one_object(torch_zygote.run((*words, "--temperature", 0), tiny_run))
    done = torch_zygote.run((*words, "--n_samples", 4, "--reference", "tiny", "--rows", "rows.jsonl"), tiny_run)
    found = one_object(done)
    for name in ("n", "accuracy", "accuracy_ci95", "reward", "mean_length_tokens", "clipped_ratio"):
        assert found[name] == greedy[name], name
    sampled = "--temperature" in options  # the run's own temperature, or 1
    assert (found["n_samples"], found["sample_temperature"]) == (4, 0.8 if sampled else 1.0)
    assert list(found["pass_at_k"]) == ["1", "2", "4"]
    assert found["pass_at_k"]["1"] <= found["pass_at_k"]["2"] <= found["pass_at_k"]["4"]
    assert found["pass_at_k"]["1"] == pytest.approx(found["mean_at_k"])
    low, high = found["mean_at_k_ci95"]
    assert low <= found["mean_at_k"] <= high and 0 < found["answer_entropy"] <= math.log(4) + 1e-9
    assert found["kl"] > 0 and ("token_entropy" in found) == (not sampled)  # a surprise is an entropy at temperature 1
    rows = rows_of(tiny_run / "rows.jsonl")
    assert all(len(row["completions"]) == 1 and len(row["samples"]["completions"]) == 4 for row in rows)
    means = [sum(row["samples"]["accuracy"]) / 4 for row in rows]
    before = [sum(row["reference"]["samples"]["accuracy"]) / 4 for row in rows]
    assert found["mean_at_k"] == pytest.approx(sum(means) / 6)
    moved = found["against_reference"]
    assert moved["mean_at_k"]["difference"] == pytest.approx(sum(means) / 6 - sum(before) / 6)
    assert moved["answer_entropy"]["difference"] == pytest.approx(
        found["answer_entropy"] - found["reference"]["answer_entropy"]
    )
    assert sum(moved["accuracy"][name] for name in TRANSITIONS) == 6
    again = ("--prompts_per_batch", 1, "--n_samples", 4)
    assert one_object(torch_zygote.run((*words, *again), tiny_run))["mean_at_k"] == found["mean_at_k"]


TRANSITIONS = ("both_right", "both_wrong", "progressions", "regressions")


def test_a_model_differs_in_nothing_from_itself(torch_zygote, tiny_run):
    tiny_run, _ = tiny_run
    words = ("evaluate", "--model", "run", "--task", "countdown", "--json", *LENGTH, "--temperature", 1)
    for more in (("--limit", 3, "--n_samples", 2), ("--limit", 1, "--n_samples", 1), ("--limit", 2)):
        found = one_object(torch_zygote.run((*words, *more, "--reference", "run"), tiny_run))
        assert found["kl"] == 0
        assert found["against_reference"]["accuracy"]["p_value"] == 1.0
        assert all(each["difference"] == 0 for each in found["against_reference"].values())
        assert all(found[name] == value for name, value in found["reference"].items())
        assert ("answer_entropy" in found) == ("2" in map(str, more[3:]))


def test_a_reference_with_another_vocabulary_has_no_kl(torch_zygote, tiny_run, tmp_path):
    """Every token that is no special one has the id of another."""
    tiny_run, _ = tiny_run
    other = tmp_path / "other"
    shutil.copytree(tiny_run / "run", other, ignore=shutil.ignore_patterns("checkpoint-*", "*.jsonl", "es_*"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    ids = sorted(vocab.values())
    tokenizer["model"]["vocab"] = {name: i if i < 2 else ids[2 + (i - 1) % (len(ids) - 2)] for name, i in vocab.items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ("evaluate", "--model", "run", "--task", "countdown", "--limit", 3, "--json", *LENGTH, "--temperature", 0)
    done = torch_zygote.run((*words, "--reference", other), tiny_run)
    found = one_object(done)
    assert found["kl"] is None and "has another vocabulary than run, so kl is unknown" in done.err
    assert sum(found["against_reference"]["accuracy"][name] for name in TRANSITIONS) == 3


def test_a_reference_that_cannot_answer_ends_the_command_after_the_models_result(torch_zygote, tiny_run, tmp_path):
    tiny_run, _ = tiny_run
    small = tmp_path / "small"
    shutil.copytree(tiny_run / "run", small, ignore=shutil.ignore_patterns("checkpoint-*", "*.jsonl", "es_*"))
    config = json.loads((small / "config.json").read_text()) | {"max_position_embeddings": 20}
    (small / "config.json").write_text(json.dumps(config))
    words = ("evaluate", "--model", "run", "--task", "countdown", "--limit", 2, "--json", *LENGTH, "--temperature", 0)
    done = torch_zygote.run((*words, "--reference", small, "--rows", "kept.jsonl"), tiny_run)
    assert done.code == 2 and "20" in done.err and "Traceback" not in done.err
    alone = one_object(torch_zygote.run(words, tiny_run))
    assert json.loads(done.out) == alone and len(rows_of(tiny_run / "kept.jsonl")) == 2


def test_evaluate_without_a_reward(torch_zygote, tiny_run):
    tiny_run, _ = tiny_run
    (tiny_run / "own.csv").write_text("question,answer\n" + "".join(f"{i} + 1?,{i + 1}\n" for i in range(7)))
    words = ("evaluate", "--model", "run", "--dataset_name", "own.csv", *LENGTH)
    more = ("--reference", "tiny", "--rows", "rows.jsonl")
    done = torch_zygote.run((*words, "--json", *more), tiny_run)
    found = one_object(done)
    assert done.err.count("there is no reward") == 1 and "the prompt is question" in done.err
    assert found["accuracy"] is None and found["reward"] is None and found["n"] == 7
    rows = rows_of(tiny_run / "rows.jsonl")
    lengths = sorted(length for row in rows for length in row["lengths"])
    assert (found["mean_length_tokens"], found["max_length_tokens"]) == (
        pytest.approx(sum(lengths) / len(lengths)), lengths[-1]
    )  # fmt: skip
    assert found["clipped_ratio"] + found["finished_ratio"] == 1 and found["empty_ratio"] == 0
    assert [(row["row_id"], row["completion"]) for row in found["completions"]] == (
        [(i, rows[i]["completions"][0]) for i in (0, 3, 6)]
    )
    changed = sum(row["completions"] != row["reference"]["completions"] for row in rows)
    assert found["against_reference"] == {"answers": {"n": 7, "changed": changed}} and changed
    assert found["kl"] > 0 and found["reference"]["reward"] is None
    text = torch_zygote.run((*words, *more), tiny_run)
    assert text.code == 0 and f"{changed} of 7 rows have other completions" in text.out and "reward" not in text.out
    assert 'row 3: "3 + 1?"' in text.out and text.out.count("\n  reference  ") == 3
    few = ("--limit", 1, "--n_samples", 2, "--json")
    assert one_object(torch_zygote.run((*words, *few), tiny_run))["sample_reward"] is None
    done = torch_zygote.run((*words, "--reward_timeout_s", 5), tiny_run)
    assert done.code == 2 and "reward_timeout_s has no effect without a reward" in done.err, done


# --- train without arguments ------------------------------------------------------------------------------------------


def test_the_demo_preset_is_for_evolution_strategies(call):
    assert_refused(call("train", "--method", "rloo"), "preset demo is for es", "--task", "method rloo")


def test_a_refused_run_names_no_preset(call):
    for words, says in ((("--resume",), "resume needs output_dir"), (("--sigma", -1), "sigma must be greater than 0")):
        done = call("train", *words)
        assert_refused(done, says)
        assert done.out == ""


def test_train_without_arguments_is_the_demo_preset(run_model):
    """A dry run shows the preset's values and the embedded model."""
    done = run_model("train", "--dry_run")
    assert done.code == 0, done
    assert done.out.startswith("estune: preset demo")
    resolved = json.loads(done.out[done.out.index("{") : done.out.rindex("}") + 1])
    preset = read_config_file("demo")
    assert preset["model"] == "tiny" and preset["task"] == "countdown"
    assert {name: resolved[name] for name in preset} == preset


# --- a step of every task ---------------------------------------------------------------------------------------------
# Of every task that comparisons are made on; then the run is rebuilt from its journal. The model is random and its
# answers are noise: what is shown is that prompts fit, that answers are scored, and that nothing breaks.


COMPARED = (
    "arc_1d arc_agi:1500 arc_agi:python:1500 gsm_symbolic math chain:4 mini_sudoku sudoku rg:gcd rg:chain_sum".split()
)


@pytest.fixture(scope="module")
def long_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama with room for ARC's prompts."""
    place = tmp_path_factory.mktemp("long") / "llama"
    shutil.copytree(tiny_llama, place)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}), encoding="utf-8")
    return place


@pytest.mark.parametrize("task", few(COMPARED, ("arc_1d", "math", "chain:4", "mini_sudoku", "rg:gcd")))
def test_a_step_of_every_task(task: str, long_llama: Path, place: Path, run_model: Any) -> None:
    done = run_model(
        "train", "--model", long_llama, "--task", task, "--noise", "lowrank", "--population_size", 4, "--batch_size", 2,
        "--sigma", 0.05, "--max_steps", 1, "--eval_steps", 1, "--eval_rows", 2, "--max_completion_length", 12,
        "--reward_workers", 1, "--report_to", "none", "--output_dir", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    [step] = [line for line in journal(place / "run") if line["kind"] == "step"]
    assert step["failures"] == 0 and len(step["fitness"]) == 4
    evaluated = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["eval_accuracy"] == 0.0 for line in evaluated if "eval_reward" in line)  # noise is not right
    assert run_model("replay", "--run", "run", "--output_dir", "again").code == 0


@pytest.mark.e2e
def test_mini_sudoku_by_es_and_grpo(place: Path, run_model: Any) -> None:
    """Two steps of either on the base that solves a few per cent: both are paid for right cells."""
    base = Path(__file__).parents[2] / "benchmarks" / "bases" / "sudoku"
    common = ("train", "--model", base, "--task", "mini_sudoku", "--max_steps", 2, "--max_completion_length", 40,
              "--eval_steps", 2, "--eval_rows", 20, "--num_threads", 1, "--report_to", "none")  # fmt: skip
    es = ("--noise", "lowrank", "--population_size", 6, "--batch_size", 8, "--sigma", 0.02, "--output_dir", "es")
    grpo = ("--method", "grpo", "--batch_size", 4, "--learning_rate", 1e-4, "--output_dir", "grpo")
    for own in (es, grpo):
        done = run_model(*common, *own)
        assert done.code == 0, done.err
        lines = [json.loads(line) for line in (place / own[-1] / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "reward" in line]
        assert len(steps) == 2 and all(0 < line["reward"] < 1 for line in steps)
