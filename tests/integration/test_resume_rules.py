"""Every line of the table of resume rules (docs/resuming.md), runs in other directories, and runs of old versions."""

import base64
import dataclasses
import json
import os
import shutil
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from command_line import Done, assert_refused, journal, steps
from safetensors.numpy import load_file, save_file
from tiers import full

from estune.config import FIELD_TYPES, FIELDS, IN_HEADER_IF_SET, RESUMABLE, ESConfig
from estune.errors import ExternalError
from estune.models.names import EMBEDDED_MODELS
from estune.run.origin import IN_ROWS, LOCATED
from estune.run.resume import RULES, Facts, adopt, check_facts

pytestmark = pytest.mark.miniature

REWARD = """import helper


def f(completions, value, **_):
    return [helper.score(text) + v for text, v in zip(completions, value)]


def other(completions, **_):
    return [0.0 for _ in completions]
"""
OPTIONS = (
    "--model", "base", "--dataset_name", "data", "--reward_funcs", "score.py:f", "--population_size", 2, "--sigma", 0.1,
    "--batch_size", 2, "--max_completion_length", 3, "--report_to", "none", "--num_threads", 1,
    "--reward_isolation", "inline", "--eval_steps", 1,
)  # fmt: skip


def lay_out(place):
    """Write a model, data, and a reward that imports a neighbour."""
    shutil.copytree(EMBEDDED_MODELS / "tiny", place / "base")
    (place / "data").mkdir()
    rows = [{"prompt": f"Count {i}: ", "value": i} for i in range(4)]
    (place / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "data" / "test.jsonl").write_text(json.dumps({"prompt": "Say: ", "value": 0}) + "\n")
    (place / "score.py").write_text(REWARD)
    (place / "helper.py").write_text("def score(text):\n    return len(text)\n")


@pytest.fixture(scope="module")
def project(torch_zygote, tmp_path_factory):
    """A directory with a run of one step and all its inputs."""
    place = tmp_path_factory.mktemp("project")
    lay_out(place)
    done = torch_zygote.run(("train", *OPTIONS, "--max_steps", 1, "--output_dir", "run"), place)
    assert done.code == 0, done
    return place


@pytest.fixture
def copy(project, tmp_path):
    """A copy of the project; its `origin.json` still names the first one, which is there, too: so it is taken out."""
    shutil.copytree(project, tmp_path / "copy")
    (tmp_path / "copy" / "run" / "origin.json").unlink()
    return tmp_path / "copy"


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def seal(run_dir, change):
    """Change a journal's header and chain all lines anew, as if the run had begun so."""
    head, lines = "0" * 32, []
    for number, line in enumerate(journal(run_dir)):
        record = {name: value for name, value in line.items() if name != "hash"}
        if not number:
            change(record)
        body = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        head = blake2b(head.encode() + body, digest_size=16).hexdigest()
        lines.append(body[:-1].decode() + f',"hash":"{head}"}}\n')
    (run_dir / "journal.jsonl").write_text("".join(lines))


def other_weights(place):
    tensors = load_file(place / "base" / "model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name] + np.float32(1)
    save_file(tensors, place / "base" / "model.safetensors", metadata={"format": "pt"})


def other_noise(place):
    def change(header):
        header["parameters"][0][2] = "lowrank"

    seal(place / "run", change)


def other_tokenizer(place):
    path = place / "base" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append(
        {**values["added_tokens"][-1], "id": values["added_tokens"][-1]["id"] + 1, "content": "<zz>"}
    )
    path.write_text(json.dumps(values))


def other_row(place, file="train", **values):
    path = place / "data" / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1] |= values
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def other_header(**changes):
    def change(header):
        for name, values in changes.items():
            header[name] |= values

    return lambda place: seal(place / "run", change)


# One or several ways to change each fact, and further words of the command that resumes.
CHANGES = {
    "base": [(other_weights, ())],
    "parameters": [(other_noise, ())],
    "config": [(lambda place: edit(place / "base" / "config.json", rms_norm_eps=0.5), ()),
               (lambda place: edit(place / "base" / "config.json", hidden_act="gelu"), ())],
    "tokenizer": [(other_tokenizer, ())],
    "end_tokens": [(lambda place: edit(place / "base" / "generation_config.json", eos_token_id=7), ()),
                   (lambda place: edit(place / "base" / "generation_config.json", eos_token_id=[1, 2]), ())],
    "data": [(lambda place: other_row(place, value=9), ()), (lambda place: other_row(place, value=3.0), ()),
             (lambda place: other_row(place, value=None), ()), (lambda place: other_row(place, prompt="Else: "), ()),
             (lambda place: other_row(place, more=1), ()),
             (lambda place: (place / "data" / "train.jsonl").write_text('{"prompt": "a", "value": 1}\n' * 2), ())],
    "reward_funcs": [(lambda place: None, ("--reward_funcs", "score.py:other"))],
    "reward_weights": [(lambda place: None, ("--reward_weights", 2))],
    "reward_sources": [(lambda place: (place / "helper.py").write_text("def score(text):\n    return 1\n"), ()),
                       (lambda place: (place / "score.py").write_text(REWARD.replace("+ v", "- v")), ())],
    "held_out": [(lambda place: other_row(place, "test", value=1), ()),
                 (lambda place: other_row(place, "test", prompt="a"), ())],
    "engine": [(other_header(engine={"architecture": "Other"}), ()), (other_header(engine={"device": "cuda"}), ())],
    "versions": [(other_header(versions={"torch": "1.0"}), ()), (other_header(versions={"python": "3.0"}), ())],
    "processor": [(lambda place: edit(place / "run" / "env.json", processor="An abacus"), ())],
}  # fmt: skip
WORDS = {"base": "fingerprint", "parameters": "noise of", "engine": "the run began with",
         "versions": "since the run began", "processor": "an abacus", "reward_funcs": "reward_funcs",
         "reward_weights": "reward_weights"}  # fmt: skip
CASES = [
    full(name, number) if number else (name, number)
    for name, changes in CHANGES.items()
    for number in range(len(changes))
]


def test_every_line_of_the_table_has_a_case():
    # code: below, with a model that has code; engine_source: in test_seam
    assert set(CHANGES) | {"code", "engine_source"} == set(RULES)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_changed_fact_is_refused_or_warned_of(run_model, copy, name, number):
    rule = RULES[name]
    change, words = CHANGES[name][number]
    change(copy)
    before = {path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()}
    done = run_model("train", "--resume", "--output_dir", "run", "--max_steps", 2, *words, cwd=copy)
    said = WORDS.get(name, rule.what)
    if rule.outcome == "refused":
        assert_refused(Done(done.code, "", errors(done)), said)
        after = {path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()}
        assert after == before
    else:
        assert done.code == 0, done
        assert said.lower() in done.err.lower() and done.err.count(said) <= 1, done.err
        assert len(steps(copy / "run")) == 2


def errors(done):
    """Return stderr without the warnings of the run itself."""
    return "".join(f"{line}\n" for line in done.err.splitlines() if "warning" not in line and "error" in line)


def test_there_is_no_warning_if_nothing_changed(run_model, copy):
    done = run_model("train", "--resume", "--output_dir", "run", "--max_steps", 2, cwd=copy)
    assert done.code == 0, done
    for rule in RULES.values():
        assert WORDS.get(rule.name, rule.what) not in done.err, rule


def test_a_comment_and_a_copy_change_nothing(run_model, copy):
    (copy / "score.py").write_text("# the same\n" + REWARD.replace("def f", "\n# said otherwise\ndef f"))
    shutil.copytree(copy / "data", copy / "elsewhere")
    (copy / "base").rename(copy / "renamed")
    words = ("--model", "renamed", "--dataset_name", copy / "elsewhere", "--reward_funcs", "./score.py:f")
    done = run_model("train", "--resume", "--output_dir", "run", "--max_steps", 2, *words, cwd=copy)
    assert done.code == 0 and len(steps(copy / "run")) == 2, done


def facts(**identity):
    return Facts({"rows": 1, "fingerprint": "f", "version": 2}, ["f"], [1.0], identity, lambda: ("f", []))


def test_other_code_of_the_model_is_refused():
    then = facts(code={"modeling_x.py": "a"}).stored()
    check_facts(then, facts(code={"modeling_x.py": "a"}))
    with pytest.raises(ExternalError, match=RULES["code"].what):
        check_facts(then, facts(code={"modeling_x.py": "b"}))


# --- options ----------------------------------------------------------------------------------------------------------

SPECIAL = {
    "task": "countdown", "dataset_name": "else.jsonl", "reward_funcs": ["m:g"], "reward_weights": [2.0],
    "trainable_parameters": ["x"], "chat_template_kwargs": {"a": 1}, "stop_strings": ["x"],
    "method": "grpo", "method_kwargs": {"beta": 1},
    "report_to": ["none"], "revision": "main", "population_size": 8, "learning_rate": 0.5, "num_generations": 3,
    "greater_is_better": False, "temperature": 0.5,
    "column_mapping": {"prompt": "b"}, "top_p": 0.5, "reward_timeout_s": 1.0, "seed": 3, "worker_resources": {"CPU": 1},
}  # fmt: skip


def another(name, value):
    """Return another value of an option."""
    if name in SPECIAL:
        return SPECIAL[name]
    choices = [choice for choice in FIELDS[name].metadata["choices"] if choice not in (value, "auto")]
    if choices:
        return choices[0]
    kind = FIELD_TYPES[name]
    return not value if kind is bool else 5 if "int" in str(kind) else 0.25 if "float" in str(kind) else "other"


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_is_free_or_refused_as_the_table_says(name, monkeypatch):
    monkeypatch.setattr(ESConfig, "validate", lambda self: None)  # options that do not go together are not the matter
    mapping = {"prompt": "a"}
    began = ESConfig(
        model="a", dataset_name="d.jsonl", reward_funcs=["m:f"], noise="lowrank", column_mapping=mapping,
        reward_wrappers=["drop(share=1)"], opponents=2,
    )  # fmt: skip
    stored = began.trajectory()
    assert (name in stored) == (name not in RESUMABLE)
    now = dataclasses.replace(began, **{name: another(name, getattr(began, name))})
    assert getattr(now, name) != getattr(began, name)
    if name in RESUMABLE:
        assert getattr(adopt(now, stored, now), name) == getattr(now, name)
    elif name in (*LOCATED, *IN_ROWS) and name not in ("reward_funcs", "engine"):
        assert getattr(adopt(now, stored, now), name) == getattr(now, name)  # compared when it is loaded
    else:
        with pytest.raises(ExternalError, match=f"a resume cannot change {name}"):
            adopt(now, stored, now)
        if name in IN_HEADER_IF_SET:  # a run without the option
            with pytest.raises(ExternalError, match=f"a resume cannot change {name}"):
                adopt(now, {key: value for key, value in stored.items() if key != name}, now)


def test_a_mapping_of_columns_is_compared_by_its_rows(run_model, tmp_path):
    """It is in the header, so that it survives the loss of `es_config.json`, and an evaluation inherits it."""
    lay_out(tmp_path)
    for file in (tmp_path / "data").iterdir():
        file.write_text(file.read_text().replace('"prompt"', '"text"').replace('"value"', '"bonus"'))
    mapping = ("--column_mapping", '{"prompt": "text", "value": "bonus"}')
    done = run_model("train", *OPTIONS, *mapping, "--max_steps", 1, "--output_dir", "run", cwd=tmp_path)
    assert done.code == 0, done
    assert journal(tmp_path / "run")[0]["config"]["column_mapping"] == {"prompt": "text", "value": "bonus"}
    found = json.loads(run_model("evaluate", "--model", "run", "--json", cwd=tmp_path).out)
    assert found["n"] == 1 and found["reward"] is not None
    for other in ("{}", '{"prompt": "text"}'):
        done = run_model("evaluate", "--model", "run", "--column_mapping", other, cwd=tmp_path)
        assert done.code == 2 and ("no column 'prompt'" in done.err or "lacks the column value" in done.err), done
    words = ("train", "--resume", "--output_dir", "run")
    (tmp_path / "run" / "es_config.json").unlink()
    other = '{"prompt": "text", "value": "bonus", "more": "text"}'
    for steps_done, more, said in (
        (2, mapping, None),
        (2, ("--column_mapping", other), "the column 'text' two names"),
        (2, ("--column_mapping", other.replace('"more": "text"', '"question": "question"')), "no such column"),
        (3, (), None),
    ):
        done = run_model(*words, "--max_steps", steps_done, *more, "--report_to", "none", cwd=tmp_path)
        assert (done.code == 0) == (said is None) and (said or "") in done.err, done
    for file in (tmp_path / "data").iterdir():
        file.write_text(file.read_text().replace('"bonus"', '"value"'))
    done = run_model(*words, "--max_steps", 3, "--column_mapping", '{"prompt": "text"}', cwd=tmp_path)
    assert_refused(Done(done.code, "", errors(done)), "training data")  # a finished run is compared, too


# --- runs that are resumed from elsewhere ----------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [full(False), True])
@pytest.mark.parametrize("how", ["resume", "replay", "evaluate"])
def test_a_run_is_found_from_another_directory(run_model, tmp_path, project, how, moved):
    place = tmp_path / "project"
    shutil.copytree(project, place)
    origin = json.loads((place / "run" / "origin.json").read_text())
    if moved:  # the place where it began is gone
        moved_from = str(tmp_path / "gone")
        origin = json.loads(json.dumps(origin).replace(str(project), moved_from))
        (place / "run" / "origin.json").write_text(json.dumps(origin))
    (tmp_path / "else").mkdir()
    words = {
        "resume": ("train", "--resume", "--output_dir", place / "run", "--max_steps", 2),
        "replay": ("replay", "--run", place / "run", "--output_dir", "rebuilt"),
        "evaluate": ("evaluate", "--model", place / "run", "--json"),
    }[how]
    done = run_model(*words, cwd=tmp_path / "else")
    assert done.code == 0, done
    if how == "evaluate":
        assert json.loads(done.out)["n"] == 1
    if how == "resume":
        done = run_model(
            "train",
            "--resume",
            "--output_dir",
            os.path.relpath(place / "run", tmp_path),
            "--max_steps",
            3,
            cwd=tmp_path,
        )
        assert done.code == 0 and len(steps(place / "run")) == 3, done


def test_a_reward_module_is_found_from_another_directory(run_model, tmp_path):
    place = tmp_path / "project"
    place.mkdir()
    lay_out(place)
    options = [word if word != "score.py:f" else "score:f" for word in OPTIONS]
    assert run_model("train", *options, "--max_steps", 1, "--output_dir", "run", cwd=place).code == 0
    (tmp_path / "else").mkdir()
    done = run_model("train", "--resume", "--output_dir", "../project/run", "--max_steps", 2, cwd=tmp_path / "else")
    assert done.code == 0, done
    done = run_model("evaluate", "--model", "../project/run", "--json", cwd=tmp_path / "else")
    assert done.code == 0 and json.loads(done.out)["n"] == 1, done


def test_another_file_of_the_same_name_is_not_taken_for_the_runs(run_model, tmp_path, project):
    """The run's first directory holds its model; the present directory holds another model with that name."""
    place = tmp_path / "project"
    shutil.copytree(project, place)
    other = tmp_path / "else"
    other.mkdir()
    lay_out(other)
    other_weights(other)
    other_row(other, value=77)
    done = run_model("train", "--resume", "--output_dir", place / "run", "--max_steps", 2, cwd=other)
    assert done.code == 0, done
    words = ("--model", "base")  # now it is asked for
    done = run_model("train", "--resume", "--output_dir", place / "run", "--max_steps", 3, *words, cwd=other)
    assert_refused(Done(done.code, "", errors(done)), "fingerprint")


def test_a_run_on_rows_that_are_all_trained_on_says_so_when_it_is_evaluated(run_model, tmp_path):
    lay_out(tmp_path)
    shutil.move(tmp_path / "data" / "train.jsonl", tmp_path / "rows.jsonl")
    options = [word if word != "data" else "rows.jsonl" for word in OPTIONS[:-2]]
    done = run_model("train", *options, "--max_steps", 1, "--output_dir", "run", cwd=tmp_path)
    assert done.code == 0, done
    done = run_model("evaluate", "--model", "run", "--json", cwd=tmp_path)
    assert done.code == 0 and "trained on all its rows" in done.err and json.loads(done.out)["n"] == 4, done
    done = run_model(
        "evaluate", "--model", "run", "--dataset_name", Path("data") / "test.jsonl", "--json", cwd=tmp_path
    )
    assert done.code == 0 and "trained" not in done.err and json.loads(done.out)["n"] == 1, done


@pytest.mark.parametrize(
    ("lost", "option"), [full("base", "model"), full("data", "dataset_name"), ("score.py", "reward_funcs")]
)
def test_what_is_gone_is_named_and_may_lie_elsewhere(run_model, tmp_path, lost, option):
    """After a resume with the model's new location, a replay does not need it again."""
    lay_out(tmp_path)
    assert run_model("train", *OPTIONS, "--max_steps", 1, "--output_dir", "run", cwd=tmp_path).code == 0
    (tmp_path / "kept").mkdir()
    shutil.move(tmp_path / lost, tmp_path / "kept" / lost)
    if lost == "score.py":
        shutil.copy(tmp_path / "helper.py", tmp_path / "kept")
    words = ("train", "--resume", "--output_dir", "run", "--max_steps", 2)
    done = run_model(*words, cwd=tmp_path)
    assert_refused(done, tmp_path / lost, "which is gone", f"--{option}")
    new = f"kept/{lost}" + ":f" * (lost == "score.py")
    done = run_model(*words, f"--{option}", new, cwd=tmp_path)
    assert done.code == 0, done
    done = run_model("train", "--resume", "--output_dir", "run", "--max_steps", 3, cwd=tmp_path)
    assert done.code == 0, done
    done = run_model("replay", "--run", "run", "--output_dir", "rebuilt", cwd=tmp_path)
    assert done.code == 0 and "3 steps replayed and verified" in done.out, done


SCRIPT = """
import sys
from estune import ESConfig, ESTrainer

def reward(completions, **_):
    return [len(text) for text in completions]

held_out = [{"prompt": "Held out: ", "value": int(sys.argv[3])}]
args = ESConfig(model="tiny", max_steps=int(sys.argv[1]), eval_steps=int(sys.argv[2]), resume=True, output_dir="run",
                population_size=2, batch_size=2, max_completion_length=3, report_to=["none"], num_threads=1)
ESTrainer(reward_funcs=reward, args=args, train_dataset=[{"prompt": f"Count {i}: "} for i in range(3)],
          eval_dataset=held_out).train()
"""


def test_a_run_from_python(torch_zygote, run_model, tmp_path):
    """It is continued by its script alone; held-out rows are compared from the first evaluation on."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    said = []
    for max_steps, eval_steps, value in ((1, 0, 1), (2, 1, 1), (3, 1, 1), (4, 1, 2)):
        done = torch_zygote.run([max_steps, eval_steps, value], tmp_path, script=script)
        assert done.code == 0, done
        said.append(RULES["held_out"].what in done.err)
        assert ("eval_steps is 0, so the run does not use eval_dataset" in done.err) == (not eval_steps)
    assert said == [False, False, False, True]
    done = run_model("train", "--resume", "--output_dir", "run", "--max_steps", 5, cwd=tmp_path)
    assert_refused(done, "given from Python", "ESConfig(resume=True")
    script.write_text(SCRIPT.replace("len(text)", "-len(text)"))
    done = torch_zygote.run([5, 1, 2], tmp_path, script=script)
    assert done.code != 0 and "since the run began, reward of reward changed" in done.err, done


# --- runs of an older version -----------------------------------------------------------------------------------------
# Commit 8b3ba3f wrote them. They resume, replay, evaluate and apply: no run is lost by an upgrade.


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
