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
    assert_refused(zygote.run((*words, "--reference", "toy"), toy_run), "KL")
    for name in ("--limit", "--n_samples"):
        assert_refused(zygote.run((*words, name, -1), toy_run), name[2:])


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


def test_sampled_evaluation_and_divergence(torch_zygote, tiny_run):
    tiny_run, _ = tiny_run
    words = ("evaluate", "--model", "run", "--task", "countdown", "--limit", 4, "--temperature", 1, "--json", *LENGTH)
    result = one_object(torch_zygote.run((*words, "--n_samples", 4, "--reference", "tiny"), tiny_run))
    assert list(result["pass_at_k"]) == ["1", "2", "4"]
    assert result["pass_at_k"]["1"] <= result["pass_at_k"]["2"] <= result["pass_at_k"]["4"]
    assert result["pass_at_k"]["1"] == pytest.approx(result["accuracy"])
    assert result["kl"] > 0
    again = one_object(torch_zygote.run((*words, "--n_samples", 4, "--prompts_per_batch", 1), tiny_run))
    assert again["accuracy"] == result["accuracy"]
    assert one_object(torch_zygote.run((*words, "--reference", "run"), tiny_run))["kl"] == 0


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
