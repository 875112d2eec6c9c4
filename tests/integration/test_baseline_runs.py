"""A baseline's run: its directory has the layout of an ES run, and a resumed run ends in the same bits."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import transformers
from baseline_runs import (
    FEW,
    NO_GRADIENT,
    SMALL,
    TRL,
    always_right,
    easy_rows,
    tensors,
    train,
    trl,
    words_of,
    write_few,
)
from command_line import Zygote, assert_same_tree, metrics, steps, tree, weights
from safetensors.numpy import load_file
from tiers import few, full
from tiny_models import process_state

from estune import ESConfig, ESTrainer
from estune.baselines import BaselineTrainer
from estune.baselines.session import BaselineSession
from estune.cli import main
from estune.errors import UserError
from estune.es.types import Interrupted
from estune.models.names import local_directory
from estune.monitor.report.data import read_runs

pytestmark = [pytest.mark.miniature, pytest.mark.usefixtures("in_place")]


# --- what a run leaves ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of every kind of file."""
    run = tmp_path_factory.mktemp("whole") / "run"
    changes = {"save_steps": 1, "save_total_limit": 2, "eval_steps": 2, "eval_rows": 3, "report_to": ["plot", "report"]}
    return train("grpo", **changes, output_dir=str(run), response_prefix="<think>")


def test_the_run_directory_is_like_that_of_es(whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        "es_config.json",
        "env.json",
        "method.json",
        "metrics.jsonl",
        "eval",
        "plots",
        "report.html",
        "README.md",
        "es_state.json",
        "trainer_state.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "checkpoint-2",
        "checkpoint-3",
        "trainer",
    }
    assert "checkpoint-1" not in names and "journal.jsonl" not in names
    assert sorted(path.name for path in (whole / "eval").iterdir()) == [f"step_0000{i}.jsonl" for i in (0, 2, 3)]
    model = transformers.AutoModelForCausalLM.from_pretrained(whole)
    stored = tensors(whole / "checkpoint-3")
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), stored[name])
    assert any((stored[name] != value).any() for name, value in tensors(whole / "checkpoint-2").items())
    assert [path.name for path in (whole / "trainer").glob("checkpoint-*")] == ["checkpoint-3"]
    records = metrics(whole, times=True)
    steps = [record for record in records if "eval_reward" not in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert [record["num_evaluations"] for record in steps] == [8, 16, 24]
    for record in steps:
        for name in (
            "loss",
            "grad_norm",
            "learning_rate",
            "num_tokens",
            "entropy",
            "reward",
            "reward_std",
            "step_time",
            "rewards/reward/mean",
            "frac_reward_zero_std",
            "completions/mean_length",
            "completions/clipped_ratio",
        ):
            assert isinstance(record[name], (int, float)), name  # fmt: skip
    assert [record["step"] for record in records if "eval_reward" in record] == [0, 2, 3]
    assert steps[-1]["train_time_s"] == pytest.approx(sum(record["step_time"] for record in steps))


def test_the_card_and_the_page_say_what_it_was(whole):
    card = (whole / "README.md").read_text()
    assert "tags: [estune, grpo, generated_from_trainer]" in card
    assert f"trl.GRPOTrainer of TRL {trl.__version__}" in card
    assert "--method grpo" in card and "estune replay" not in card and "| after | 3 |" in card
    assert '"name": "run"' in (whole / "report.html").read_text(encoding="utf-8")
    [shown] = read_runs([whole])["runs"]  # what `estune watch` serves
    assert (shown["steps_done"], shown["config"]["method"], shown["base"]["model"]) == (3, "grpo", "tiny")
    assert shown["fingerprint"] == json.loads((whole / "es_state.json").read_text())["fingerprint"]
    assert len(shown["steps"]) == len(shown["evaluations"]) == 3
    assert not {"population_size", "sigma", "weight_decay_anchor"} & shown["config"].keys()  # of no use to it
    assert shown["config"]["learning_rate"] and shown["trainer"]["arguments"]["loss_type"] == "grpo"


def test_commands_on_such_a_run(whole, capsys, place):
    assert main(["evaluate", "--model", str(whole), "--limit", "3", "--json", "--rows", "rows.jsonl"]) == 0
    found = json.loads(capsys.readouterr().out)
    held_out = [record for record in metrics(whole) if "eval_reward" in record]
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    assert found["task"] == "countdown" and len(rows) == found["n"] == 3
    assert all(len(row["completions"]) == 1 and row["completions"][0].startswith("<think>") for row in rows)
    assert found["mean_length_tokens"] <= SMALL["max_completion_length"] and held_out
    assert main(["report", str(whole), "--output_dir", "page"]) == 0 and (place / "page" / "report.html").exists()
    for words in (["export", str(whole), "--patch", "p.estp"], ["replay", "--run", str(whole), "--output_dir", "out"]):
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "holds no journal" in said
    assert not (place / "p.estp").exists() and not (place / "out").exists()


def test_a_run_is_quiet(whole, capfd):
    train("grpo", save_steps=1, max_steps=1)
    train("grpo", save_steps=1, max_steps=2, resume=True, method_kwargs={})
    train("sft_rejection", max_steps=1, output_dir="sft", train_dataset=easy_rows(), reward_funcs=always_right,
          method_kwargs={"min_reward": 1.0})  # fmt: skip
    out, err = capfd.readouterr()
    assert all(line.startswith(("estune: ", "step ")) for line in [*out.splitlines(), *err.splitlines()])


def test_the_process_stays_as_it_was():
    train("grpo", max_steps=0, output_dir="imports")  # imports of packages may change warnings and the environment
    before, threads = process_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        train("grpo", max_steps=1)
        now = process_state()
    finally:
        torch.set_num_threads(threads)
    assert {name: value for name, value in now.items() if value != before[name]} == {"threads": 3}


def test_a_run_whose_rewards_all_failed_says_so(capsys):
    train("grpo", max_steps=1, train_dataset=easy_rows(), reward_funcs=never_paid)
    assert "warning: every reward was None or failed" in capsys.readouterr().err


def never_paid(completions, **_):
    raise ValueError("no")


class Stopping(transformers.TrainerCallback):
    """Notes the events of a run; asks for an evaluation and a checkpoint at step 1, and for the end at step 2."""

    def __init__(self):
        self.events = []

    def on_step_begin(self, args, state, control, **_):
        self.events.append(("begin", state.global_step))

    def on_step_end(self, args, state, control, **_):
        self.events.append(("end", state.global_step))
        control.should_evaluate = control.should_save = state.global_step == 1
        control.should_training_stop = state.global_step == 2

    def on_evaluate(self, args, state, control, metrics, **_):
        self.events.append(("evaluate", metrics["eval_rows"]))

    def on_save(self, args, state, control, **_):
        self.events.append(("save", state.global_step))


@pytest.mark.parametrize("method", ["grpo", "random_search"])
def test_callbacks_of_a_baseline(method):
    search = dict.fromkeys(("learning_rate", "num_generations")) if method == "random_search" else {}
    settings = {name: value for name, value in {**SMALL, "method": method}.items() if name not in search}
    args = ESConfig(**settings, eval_steps=3, eval_rows=2)
    callback = Stopping()
    output = BaselineTrainer(args=args, callbacks=[callback]).train()
    assert callback.events == [
        ("evaluate", 2), ("begin", 0), ("end", 1), ("evaluate", 2), ("save", 1), ("begin", 1), ("end", 2),
        ("evaluate", 2), ("save", 2),
    ]  # fmt: skip
    assert output.global_step == 2
    assert (output / "checkpoint-1" / "model.safetensors").exists()
    whole = BaselineTrainer(args=ESConfig(**settings, eval_steps=3, eval_rows=2, resume=True)).train()
    assert whole.global_step == 3


def test_a_run_of_no_steps_is_the_base():
    base = tensors(local_directory("tiny"))
    for method in ("grpo", "sft_rejection", "random_search"):
        run = train(method, max_steps=0, output_dir=method, **NO_GRADIENT if method == "random_search" else {})
        assert tensors(run).keys() == base.keys()
        assert all(np.array_equal(value, base[name]) for name, value in tensors(run).items())
        assert (run / "README.md").exists()


def test_only_trainable_parameters_move():
    run = train("grpo", trainable_parameters=[r"layers\.1\.", "norm"], method_kwargs={"loss_type": "dapo"})
    before, after = tensors(local_directory("tiny")), tensors(run)
    moved = {name for name in after if (before[name] != after[name]).any()}
    assert moved == {name for name in after if re.search(r"layers\.1\.|norm", name)} != set(after)
    with pytest.raises(UserError, match="matches no parameter"):
        train("grpo", trainable_parameters=["nothing"], output_dir="other")


def test_weights_that_diverge_are_never_the_result(capsys, place):
    """With TRL's own sampling and with ES's; the checkpoints before are whole, and nothing lies at the root."""
    for generation in ("estune", "trl"):
        changes = {
            "learning_rate": 1e38,  # so that no rounding of a processor decides whether a number overflows
            "max_steps": 3,
            "dataset_name": None,
            "method_kwargs": {"generation": generation},
        }
        words = map(str, [*words_of("grpo", **changes), "--overwrite"])
        assert main([*words]) == 2
        said = capsys.readouterr().err.splitlines()
        assert "estune: error: grpo diverged in step" in said[-1] and "lower learning_rate" in said[-1], said
        run = place / "run"
        assert not (run / "model.safetensors").exists() and not (run / "es_state.json").exists()
        for path in run.rglob("*.safetensors"):
            assert all(np.isfinite(value).all() for value in load_file(path).values()), path


# --- a run that ends early, and goes on -------------------------------------------------------------------------------

KILLER = """
import os, signal, sys
from estune.baselines import policy_gradient, random_search, trainer
from estune.baselines import session
from estune.cli import main

where, step, *words = sys.argv[1:]
owner, name = {
    "metrics": (session.BaselineSession, "after_step"),  # the step's metrics are written
    "saving": (policy_gradient.Driver, "on_save"),  # the trainer's state is there, but nothing says that it is whole
    "kept": (session.Progress, "write"),  # it is whole, and nothing says so
    "kept beside": (session.Progress, "write_unhashed"),  # the same of a method whose files are written at every step
    "final": (session.BaselineSession, "save"),
    "scoring": (session.BaselineSession, "score"),  # of what was sampled
    "method": (session.BaselineSession, "write_method"),  # what rejection sampling drew is kept, and no step was taken
}[where]
plain = getattr(owner, name)


def doomed(self, *given, **named):
    done = self.steps_done if hasattr(self, "steps_done") else self.session.steps_done
    if done == int(step) and (where != "final" or named.get("final")):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *given, **named)


setattr(owner, name, doomed)
sys.exit(main(words))
"""


@pytest.fixture(scope="module")
def baseline_zygote():
    """A forking process that has imported the trainers of the baselines."""
    with Zygote(baselines=True) as process:
        yield process


def assert_same_run(found, wanted):
    assert weights(found) == weights(wanted)
    assert metrics(found) == metrics(wanted)
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (found, wanted)]
    assert names[0] == names[1]


SFT = {"method_kwargs": {"min_reward": 0.0}}
KILLED = [
    full("grpo", {}, [("metrics", 2), ("saving", 3), ("kept", 4), ("final", 4)]),
    full("grpo", {"method_kwargs": TRL, "logging_steps": 3}, [("metrics", 1), ("saving", 3)]),
    full("sft_rejection", SFT, [("scoring", 0), ("method", 0), ("saving", 2), ("metrics", 4)]),
    ("random_search", {"logging_steps": 2}, [("metrics", 2), ("kept beside", 3), ("final", 4)]),
    full("random_vote", {}, [("metrics", 1), ("kept beside", 3), ("final", 4)]),
]
KILLED_IDS = ["grpo", "trl", "sft_rejection", "random_search", "random_vote"]


@pytest.mark.parametrize(("method", "changes", "kills"), KILLED, ids=KILLED_IDS)
def test_a_killed_run_ends_in_the_same_bits(method, changes, kills, baseline_zygote, place):
    """Killed again and again, in one run; SIGKILL, as the out-of-memory killer does it."""
    write_few(place)
    (place / "killer.py").write_text(KILLER)
    words = words_of(method, **changes)
    assert baseline_zygote.run([*words, "--output_dir", "whole"], place).code == 0
    for where, step in kills:
        done = baseline_zygote.run([where, step, *words, "--resume"], place, script=place / "killer.py")
        assert done.code == -signal.SIGKILL, done
    done = baseline_zygote.run([*words, "--resume"], place)
    assert done.code == 0, done
    assert_same_run(place / "run", place / "whole")
    assert (place / "run" / "method.json").read_bytes() == (place / "whole" / "method.json").read_bytes()
    before = tree(place / "run")
    done = baseline_zygote.run(["train", "--resume", "--output_dir", "run"], place)
    assert done.code == 0 and "is finished" in done.out, done
    assert_same_tree(tree(place / "run"), before)


@pytest.mark.parametrize(
    ("when", "generation"),
    [("sampling", "trl"), ("scoring", "estune"), full("sampling", "estune"), full("scoring", "trl")],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(generation, when, place, monkeypatch):
    """In the midst of a step, which is then begun again; no checkpoints were asked for."""
    write_few(place)
    changes = {**FEW, "method_kwargs": {"generation": generation}}
    whole = train("grpo", **changes, output_dir="whole")
    owner, name = (
        (BaselineSession, "sample") if when == "sampling" and generation == "estune" else (BaselineSession, "score")
    )
    plain = getattr(owner, name)

    def stopped(self, *given):
        if self.steps_done == 2:
            signal.raise_signal(signal.SIGINT)
            if when == "scoring":  # as where the score does not come
                raise Interrupted
        return plain(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        run = train("grpo", **changes)
    assert not (run / "model.safetensors").exists()
    [kept] = (run / "trainer").glob("checkpoint-*")
    assert kept.name == ("checkpoint-3" if when == "sampling" and generation == "trl" else "checkpoint-2")
    train("grpo", **changes, resume=True)
    assert weights(run) == weights(whole) and metrics(run) == metrics(whole)


def test_a_run_goes_on_to_more_steps_and_to_nothing_else(place, capsys):
    write_few(place)
    whole = train("rloo", **FEW, output_dir="whole")
    run = train("rloo", **{**FEW, "max_steps": 2})
    for changes, words in (
        ({"learning_rate": 0.1}, "cannot change learning_rate"),
        ({"method_kwargs": {"beta": 0.5}}, "cannot change method_kwargs"),
        ({"seed": 3}, "cannot change seed"),
        ({"max_steps": 1}, "already has 2 steps"),
    ):
        with pytest.raises(UserError, match=words):
            train("rloo", **{**FEW, "resume": True, **changes})
    with pytest.raises(UserError, match="--resume"):
        train("rloo", **FEW)
    train("rloo", **FEW, resume=True)
    assert weights(run) == weights(whole) and metrics(run) == metrics(whole)
    rows = (place / "rows.jsonl").read_text().splitlines()
    (place / "rows.jsonl").write_text("\n".join(rows[::-1]))
    with pytest.raises(UserError, match="cannot change the training data"):
        train("rloo", **{**FEW, "max_steps": 5}, resume=True)
    train("rloo", **{**FEW, "max_steps": 1}, overwrite=True)
    assert len(metrics(run)) == 1


def test_methods_do_not_go_on_with_each_others_runs(place, capsys):
    es = ("--population_size", "2", "--sigma", "0.01")
    small = [f"--{name}={value}" for name, value in SMALL.items() if name not in ("report_to", "num_generations")]
    assert main(["train", *small, *es, "--max_steps=1", "--output_dir=es"]) == 0
    train("grpo", max_steps=1)
    capsys.readouterr()
    for directory, method, begun in (("es", "grpo", "es"), ("run", "es", "grpo"), ("run", "rloo", "grpo")):
        before = tree(place / directory)
        assert main(["train", "--resume", "--output_dir", directory, "--method", method]) == 2
        assert f"cannot change method from '{begun}' to '{method}'" in capsys.readouterr().err
        assert_same_tree(tree(place / directory), before)
    with pytest.raises(UserError, match="cannot change method"):
        train("grpo", output_dir="es", resume=True)
    with pytest.raises(UserError, match="cannot change method"):
        ESTrainer(args=ESConfig(task="countdown", output_dir="run", resume=True)).train()


@pytest.mark.parametrize("method", few(["es", "grpo", "sft_rejection", "random_search"], ("es", "grpo")))
def test_a_run_ends_when_its_time_is_up(method, place):
    """It is whole then; with more time it goes on, to the bits of a run that had all of it."""
    write_few(place)
    changes = {**FEW, "max_steps": 3, **(NO_GRADIENT if method in ("es", "random_search") else {})}
    if method == "sft_rejection":  # as many samples as a run of any time draws at once
        changes["method_kwargs"] = {"min_reward": 0.0, "max_samples": 4}

    def run(**more):
        if method == "es":
            args = ESConfig(**{**SMALL, **changes, "temperature": 0.0, "num_generations": 1, **more})
            return ESTrainer(args=args).train()
        return train(method, **{**changes, **more})

    whole = run(output_dir="whole")
    path = run(max_time_s=1e-6)
    assert [record["step"] for record in metrics(path)] == [1]
    transformers.AutoModelForCausalLM.from_pretrained(path)
    assert json.loads((path / "es_state.json").read_text())["step"] == 1
    before = tree(path)
    run(max_time_s=1e-6, resume=True)  # is finished
    assert_same_tree(tree(path), before)
    run(max_time_s=1e-5, resume=True)  # still less than the first step took
    assert_same_tree(tree(path), before)
    run(max_time_s=3600, resume=True)
    assert weights(path) == weights(whole) and metrics(path) == metrics(whole)
    if method == "es":
        assert steps(path) == steps(whole)


# --- a run whose files were damaged -----------------------------------------------------------------------------------


GONE = object()


def edited(**changes):
    """Return what gives keys of a file of JSON other values; those that are `GONE` are dropped."""

    def edit(path):
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not GONE}))

    return edit


def content(text):
    return lambda path: path.write_text(text)


def flipped(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DEEP = "[" * 200_000


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished run of random search, of two steps; its checkpoints too; and one of three steps."""
    place = tmp_path_factory.mktemp("searched")
    for name, max_steps in (("run", 2), ("long", 3)):
        train("random_search", **NO_GRADIENT, save_steps=1, max_steps=max_steps, output_dir=str(place / name))
    return place


@pytest.fixture
def search(searched, place, capsys):
    """``search(*words)``: a resume of a copy of it; the exit status and what was said."""
    shutil.copytree(searched / "run", place / "run")

    def resume(*words):
        capsys.readouterr()
        code = main(["train", "--resume", "--output_dir", "run", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return resume


def assert_one_sentence(found, *words):
    code, _, err = found
    errors = [line for line in err.splitlines() if "error: " in line]
    assert code == 2 and len(errors) == 1 and err.splitlines()[-1] == errors[0], found
    assert all(word in errors[0] for word in words), found


MODEL = {
    "flipped": ("model.safetensors", flipped),
    "no such type": ("model.safetensors", lambda p: p.write_bytes(p.read_bytes().replace(b'"F32"', b'"XX" ', 1))),
    "gone": ("model.safetensors", lambda path: path.unlink()),
    "tokenizer": ("tokenizer.json", flipped),
    "configuration": ("config.json", content("{}")),
    "state": ("es_state.json", content("{}")),
    "step": ("es_state.json", edited(step="2")),
    "deep": ("es_state.json", content(DEEP)),
}


@pytest.mark.parametrize("damage", few(MODEL, ("flipped", "gone")))
def test_a_finished_model_that_is_damaged_is_written_again(search, place, damage):
    own = ("es_config.json",)  # it names the directory
    before = tree(place / "run", without=own)
    name, edit = MODEL[damage]
    edit(place / "run" / name)
    code, out, err = search()
    assert code == 0 and "is written again" in err and "nothing to do" not in out, (out, err)
    assert_same_tree(tree(place / "run", without=own), before)
    code, out, _ = search()
    assert code == 0 and "nothing to do" in out


@pytest.mark.parametrize("damage", few(MODEL, ("flipped", "state")))
def test_a_damaged_model_with_no_whole_trainer_is_left_as_it_is(search, place, damage):
    name, edit = MODEL[damage]
    edit(place / "run" / name)
    (place / "run" / "trainer" / "progress.json").write_text("{}}")
    before = tree(place / "run")
    assert_one_sentence(search(), "run", "is damaged", "--model run/checkpoint-2", "--overwrite")
    assert_same_tree(tree(place / "run"), before)


METHOD_FILES = [{"data": GONE}, {"data": []}, {"data": {"rows": 3}}, {"data": {"fingerprint": "a"}}, {"identity": 3},
                {"identity": {"reward_sources": ["a"]}}, {"base": []}, {"base": {"fingerprint": None}},
                {"method": GONE}, {"arguments": 3}]  # fmt: skip


@pytest.mark.parametrize("changes", few(METHOD_FILES, METHOD_FILES[:3]))
def test_a_damaged_method_json_is_one_sentence(search, place, changes):
    edited(**changes)(place / "run" / "method.json")
    assert_one_sentence(search("--max_steps", 3), "method.json", "damaged")
    (place / "run" / "README.md").unlink()  # which is written from it
    assert_one_sentence(search(), "method.json", "damaged")


@pytest.mark.parametrize("text", ["", "[]", "{", DEEP, "3"])
def test_a_method_json_that_is_no_object_is_one_sentence(search, place, text):
    (place / "run" / "method.json").write_text(text)
    assert_one_sentence(search("--max_steps", 3), "method.json", "damaged")


BESTS = [
    '{"step":1,"member":999}',
    '{"step":"a"}',
    '{"step":9,"member":0}',
    '{"step":-5}',
    '{"step":0,"member":-1}',
    '{"step":-1,"member":0}',
    '{"step":1,"member":1.0}',
    '{"step":true,"member":true}',
    '{"step":1,"member":0,"fitness":"x"}',
    '{"step":1,"member":0,"fitness":NaN}',
    '{"other":1}',
    "[]",
    DEEP,
]


@pytest.mark.parametrize("text", few(BESTS, BESTS[:2]))
def test_a_damaged_best_json_is_one_sentence(search, place, searched, text):
    (place / "run" / "trainer" / "best.json").write_text(text)
    assert_one_sentence(search("--max_steps", 3), "best.json", "damaged", "delete run/trainer")
    shutil.rmtree(place / "run" / "trainer")  # as it says
    assert search("--max_steps", 3)[0] == 0
    assert weights(place / "run") == weights(searched / "long")


PROGRESS = [
    {"steps_done": "2"},
    {"steps_done": None},
    {"steps_done": -1},
    {"batches": 1.5},
    {"evaluations": [1]},
    {"train_time_s": "x"},
    {"tokens": True},
    {"epochs": -1},
    {"train_time_s": float("inf")},
    {"files": [1]},
    {"more": 1},
]


@pytest.mark.parametrize("changes", few(PROGRESS, PROGRESS[:2]))
def test_damaged_progress_is_no_state_to_go_on_from(search, place, searched, changes):
    edited(**changes)(place / "run" / "trainer" / "progress.json")
    code, _, err = search("--max_steps", 3)
    assert code == 0 and "progress.json is damaged: continuing from step 0" in err, err
    assert weights(place / "run") == weights(searched / "long")
    assert metrics(place / "run") == metrics(searched / "long")


CONFIGS = {
    "unknown": (edited(sigmb=1), "sigmb"),
    "a wrong type": (edited(logging_steps="x"), "logging_steps"),
    "out of range": (edited(sigma=-1), "sigma"),
    "no method": (edited(method=GONE), "method"),
    "empty": (content("{}"), "lacks the option"),
    "a list": (content("[]"), "not a JSON object"),
    "deep": (content(DEEP), "not a JSON object"),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_damaged_configuration_without_a_journal_is_one_sentence(search, place, damage):
    edit, word = CONFIGS[damage]
    edit(place / "run" / "es_config.json")
    before = tree(place / "run")
    assert_one_sentence(search(), "es_config.json", word)
    assert_one_sentence(search("--max_steps", 3), "es_config.json", word)
    assert_same_tree(tree(place / "run"), before)


def test_a_run_of_a_version_without_an_option_has_its_default(search, place, searched):
    edited(response_prefix=GONE)(place / "run" / "es_config.json")
    before = tree(place / "run")
    assert search()[0] == 0
    assert_same_tree(tree(place / "run"), before)
    code, _, err = search("--response_prefix", "x")
    assert code == 2 and "cannot change response_prefix from '' to 'x'" in err, err
    assert search("--max_steps", 3)[0] == 0
    assert weights(place / "run") == weights(searched / "long")


def test_checkpoints_that_are_links_are_unlinked(search, place):
    """Those of steps that are done again."""
    (place / "run" / "checkpoint-2").rename(place / "moved")
    (place / "run" / "checkpoint-2").symlink_to(place / "moved")
    (place / "run" / "trainer" / "progress.json").unlink()
    before = tree(place / "moved")
    assert search("--max_steps", 3)[0] == 0
    assert_same_tree(tree(place / "moved"), before)
    assert not (place / "run" / "checkpoint-2").is_symlink()
