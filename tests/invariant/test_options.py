"""An option that is accepted has an effect (invariant 9), and configurations that mean the same give one trajectory.

Every field of `ESConfig` has an entry in `EFFECTS`: options for a run, the change, and what must differ. A new field
without an entry fails `test_every_field_has_an_entry`.
"""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
from command_line import PATIENCE_S, TOY, assert_refused, estune, journal, metrics, steps, tree, weights, write_rewards

from estune.config import FIELDS, OF_WORKERS, ESConfig
from estune.errors import UserError
from estune.run.journal import Journal
from estune.train import request
from estune.train.trainer import ESTrainer

RUN = (
    *TOY,
    "--max_steps",
    2,
    "--population_size",
    4,
    "--sigma",
    0.1,
    "--learning_rate",
    0.1,
    "--num_threads",
    1,
    "--reward_isolation",
    "inline",
)


# --- what differs; each takes a finished run's place (the directory that holds `run`) ---------------------------------


def theta(place):
    return weights(place / "run")


def of_steps(*names):
    return lambda place: [[line.get(name) for name in names] for line in steps(place / "run")]


def header(*names):
    return lambda place: [journal(place / "run")[0][name] for name in names]


def names(prefix=""):
    return lambda place: [name for name in tree(place / "run") if name.startswith(prefix)]


def contents(prefix):
    return lambda place: {name: data for name, data in tree(place / "run").items() if name.startswith(prefix)}


def logged(*names):
    return lambda place: [[record.get(name) for name in names] for record in metrics(place / "run")]


def calls(column):
    """Distinct values that the reward `logged` saw: 0 step, 1 completions, 2 pid, 3 threads, 4 in the trainer."""
    return lambda place: sorted({line.split()[column] for line in (place / "calls").read_text().splitlines()})


def n_calls(place):
    return len((place / "calls").read_text().splitlines())


def in_trainer(place):
    """Whether rewards were computed in the trainer's own process, which has the trainer imported."""
    return calls(4)(place) == ["True"]


def n_workers(place):
    return len(calls(2)(place))


LOGGED = ("--reward_funcs", "rewards.py:logged")
SLOW = ("--reward_funcs", "rewards.py:slow", "--reward_isolation", "process")
DATA = ("--dataset_name", "data")
BEST = ("--eval_steps", 1, "--max_steps", 4, "--batch_size", 4, "--learning_rate", 0.2)
# field: (options of both runs, options of the changed run, what differs)
TOY_EFFECTS = {
    "model": ((), ("--model", "base"), header("base")),
    "dataset_name": ((), DATA, of_steps("fitness")),
    "dataset_train_split": (DATA, ("--dataset_train_split", "other"), of_steps("fitness")),
    "dataset_test_split": ((*DATA, "--eval_steps", 1), ("--dataset_test_split", "other"), contents("eval/")),
    "dataset_config": (("--dataset_name", "configs"), ("--dataset_config", "two"), of_steps("fitness")),
    "reward_funcs": ((), ("--reward_funcs", "rewards.py:second"), of_steps("fitness", "q")),
    "reward_weights": (
        ("--reward_funcs", "rewards.py:logged", "rewards.py:second"),
        ("--reward_weights", 1, 0.5),
        of_steps("q"),
    ),
    "reward_wrappers": ((), ("--reward_wrappers", "noisy(std=0.5)"), of_steps("fitness", "q")),
    "opponents": (("--reward_wrappers", "preference()"), ("--opponents", 2), of_steps("fitness")),
    "reward_timeout_s": ((*SLOW, "--batch_size", 2), ("--reward_timeout_s", 0.005), of_steps("failures")),
    "reward_workers": (
        (*SLOW, "--reward_workers", 1),
        ("--reward_workers", 3, "--reward_funcs", "rewards.py:meeting", "--reward_timeout_s", PATIENCE_S),
        n_workers,
    ),
    "reward_isolation": (LOGGED, ("--reward_isolation", "process"), in_trainer),
    "system_prompt": (("--log_completions",), ("--system_prompt", "Be brief."), contents("completions/")),
    "response_prefix": ((), ("--response_prefix", "1"), of_steps("fitness")),
    "max_steps": ((), ("--max_steps", 3), of_steps("step")),
    "max_time_s": ((), ("--max_time_s", 1e-9), of_steps("step")),
    "population_size": ((), ("--population_size", 6), of_steps("seeds")),
    "sigma": ((), ("--sigma", 0.2), of_steps("s", "fitness")),
    "learning_rate": ((), ("--learning_rate", 0.2), of_steps("a", "checksum")),
    "batch_size": ((), ("--batch_size", 3), of_steps("rows", "fitness")),
    "antithetic": ((), ("--antithetic",), of_steps("seeds", "fitness")),
    "noise": ((), ("--noise", "lowrank"), of_steps("fitness", "s_lowrank", "a_lowrank")),
    "rank": (("--noise", "lowrank"), ("--rank", 2), of_steps("fitness", "s_lowrank", "a_lowrank")),
    "noise_distribution": ((), ("--noise_distribution", "rademacher"), of_steps("s", "fitness")),
    "fitness_shaping": ((), ("--fitness_shaping", "centered_rank"), of_steps("q")),
    "step_control": ((), ("--step_control", "reliability"), of_steps("a", "signal")),
    "lr_scheduler_type": ((), ("--lr_scheduler_type", "linear"), of_steps("a")),
    "warmup_steps": ((), ("--warmup_steps", 2), of_steps("a")),
    "sigma_scheduler_type": ((), ("--sigma_scheduler_type", "linear"), of_steps("s")),
    "weight_decay": ((), ("--weight_decay", 0.5), of_steps("decay")),
    "weight_decay_anchor": (("--weight_decay", 0.5, "--model", "base"), ("--weight_decay_anchor", "base"), theta),
    "seed": ((), ("--seed", 1), of_steps("seeds", "rows")),
    "max_completion_length": (
        (),
        ("--max_completion_length", 5),
        logged("completions/clipped_ratio", "completions/mean_length"),
    ),
    "prompts_per_batch": ((*LOGGED, "--eval_steps", 2), ("--prompts_per_batch", 5), n_calls),
    "num_threads": (LOGGED, ("--num_threads", 2), calls(3)),
    "logging_steps": (("--max_steps", 4), ("--logging_steps", 2), logged("step")),
    "log_completions": ((), ("--log_completions",), names("completions/")),
    "eval_steps": ((), ("--eval_steps", 1), names("eval/")),
    "eval_rows": (("--eval_steps", 1), ("--eval_rows", 3), logged("eval_rows")),
    "load_best_model_at_end": (BEST, ("--load_best_model_at_end",), theta),
    "metric_for_best_model": (
        (*BEST, "--load_best_model_at_end"),
        ("--metric_for_best_model", "mean_length_tokens"),
        contents("es_state.json"),
    ),
    "greater_is_better": ((*BEST, "--load_best_model_at_end"), ("--greater_is_better", "false"), theta),
    "early_stopping_patience": (BEST, ("--early_stopping_patience", 1), of_steps("step")),
    "early_stopping_threshold": (
        (*BEST, "--early_stopping_patience", 1),
        ("--early_stopping_threshold", 1),
        of_steps("step"),
    ),
    "save_steps": ((), ("--save_steps", 1), names("checkpoint-")),
    "save_total_limit": (("--save_steps", 1), ("--save_total_limit", 1), names("checkpoint-")),
    "report_to": ((), ("--report_to", "plot", "report"), names("plots/")),
}

TEXT = ("--log_completions", "--sigma", 0.02)
WARM = (*TEXT, "--temperature", 1)
# The same for a random Llama on six rows of data, rewards in the trainer's process.
MODEL_EFFECTS = {
    "dtype": ((), ("--dtype", "bfloat16"), lambda place: (theta(place)[:400], header("engine")(place))),
    "trainable_parameters": ((), ("--trainable_parameters", r"layers\.1\.", "norm"), header("parameters")),
    "apply_chat_template": (
        ("--model", "templated", *TEXT),
        ("--apply_chat_template", "true"),
        contents("completions/"),
    ),
    "chat_template_kwargs": (
        ("--model", "templated", *TEXT, "--apply_chat_template", "true"),
        ("--chat_template_kwargs", '{"mood": "calm"}'),
        contents("completions/"),
    ),
    "stop_strings": (TEXT, ("--stop_strings", *"aeiouthnr0123456789"), logged("completions/mean_length")),
    "num_generations": (WARM, ("--num_generations", 2), contents("completions/")),
    "temperature": (TEXT, ("--temperature", 1), contents("completions/")),
    "top_p": (WARM, ("--top_p", 0.3), contents("completions/")),
    "top_k": (WARM, ("--top_k", 2), contents("completions/")),
}

OTHERWISE = {  # field -> the test below that shows its effect
    "task": "test_task",
    "allow_unsandboxed_code": "test_allow_unsandboxed_code",
    "method": "test_method",
    "eval_greedy": "test_eval_greedy",
    "method_kwargs": "test_method",
    "engine": "test_engine",
    "device": "test_device",
    "revision": "test_revision",
    "trust_remote_code": "test_trust_remote_code",
    "members_per_batch": "test_members_per_batch",
    "output_dir": "test_output_dir",
    "run_name": "test_run_name",
    "resume": "test_resume",
    "overwrite": "test_overwrite",
    "dry_run": "test_dry_run",
    "console": "test_console",
    "push_to_hub": "test_push_to_hub",
    "hub_model_id": "test_push_to_hub",
    "hub_private_repo": "test_push_to_hub",
    **dict.fromkeys(OF_WORKERS, "test_options_of_workers"),  # their effect: tests/integration/test_ray.py
    "column_mapping": "test_column_mapping",
    "tensor_parallel_size": "test_ranks_belong_to_vllm",  # the effect: tests/integration/test_vllm.py
}


def test_every_field_has_an_entry():
    covered = [*TOY_EFFECTS, *MODEL_EFFECTS, *OTHERWISE]
    assert sorted(covered) == sorted(FIELDS)
    assert all(callable(globals()[test]) for test in OTHERWISE.values())


# --- the runs ---------------------------------------------------------------------------------------------------------


def rows(shift, n=8):
    return "".join(json.dumps({"prompt": f"x[{i}]", "wanted": i / 10 + shift}) + "\n" for i in range(n))


def furnish(place, base=None, llama=None):
    """Put what the options above name into a directory."""
    write_rewards(place)
    (place / "data").mkdir()
    for number, split in enumerate(("train", "test", "other")):
        (place / "data" / f"{split}.jsonl").write_text(rows(number))
    (place / "configs").mkdir()
    for number, name in enumerate(("one", "two")):
        (place / "configs" / f"{name}.jsonl").write_text(rows(number))
    (place / "configs" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n  default: true\n"
        "- config_name: two\n  data_files: two.jsonl\n---\n"
    )
    (place / "rows.jsonl").write_text("".join(f'{{"prompt": "count to {i}: "}}\n' for i in range(6)))
    if base is not None:
        shutil.copytree(base, place / "base")
    if llama is not None:
        shutil.copytree(llama, place / "templated")
        (place / "templated" / "chat_template.jinja").write_text(
            "{{ mood | default('plain') }} {% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        )


@pytest.fixture(scope="module")
def toy_base(zygote, tmp_path_factory):
    """A toy model whose weights are not 0."""
    place = tmp_path_factory.mktemp("base")
    assert zygote.run((*RUN, "--max_steps", 1, "--seed", 99), place).code == 0
    return place / "run"


@pytest.fixture(scope="module")
def finished(zygote, torch_zygote, toy_base, tiny_llama, tmp_path_factory):
    """``finished(options)``: the place of a finished run; the runs that changes are compared with are run once."""
    places = {}

    def run(options, model=False):
        key = (*map(str, options), model)
        if key not in places:
            place = places[key] = tmp_path_factory.mktemp("run")
            furnish(place, toy_base, tiny_llama)
            words, process = (*RUN, *options), zygote
            if model:
                words, process = (*MODEL, "--model", tiny_llama, *options), torch_zygote
            done = process.run(words, place, env={"CALLS": "calls"})
            assert done.code == 0, done
        return places[key]

    return run


MODEL = (
    "train",
    "--dataset_name",
    "rows.jsonl",
    "--reward_funcs",
    "rewards.py:vowels",
    "--max_steps",
    2,
    "--population_size",
    2,
    "--batch_size",
    3,
    "--max_completion_length",
    10,
    "--num_threads",
    1,
    "--report_to",
    "none",
    "--reward_isolation",
    "inline",
    "--output_dir",
    "run",
)


@pytest.mark.parametrize("field", TOY_EFFECTS)
def test_toy(finished, field):
    options, change, observed = TOY_EFFECTS[field]
    plain, changed = finished(options), finished((*options, *change))
    assert observed(plain) != observed(changed)


@pytest.mark.parametrize("field", MODEL_EFFECTS)
def test_language_model(finished, field):
    options, change, observed = MODEL_EFFECTS[field]
    plain, changed = finished(options, model=True), finished((*options, *change), model=True)
    assert observed(plain) != observed(changed)


def test_only_trainable_parameters_move(finished):
    from safetensors.numpy import load_file

    options, change, _ = MODEL_EFFECTS["trainable_parameters"]
    place = finished((*options, *change), model=True)
    moving = {name for name, _, perturbed in header("parameters")(place)[0] if perturbed}
    before = load_file(journal(place / "run")[0]["base"]["model"] + "/model.safetensors")
    after = load_file(place / "run" / "model.safetensors")
    assert {name for name in after if (before[name] != after[name]).any()} == moving
    assert 0 < len(moving) < len(after)


def test_completions_end_with_a_stop_string(finished):
    options, change, _ = MODEL_EFFECTS["stop_strings"]
    place = finished((*options, *change), model=True)
    for data in contents("completions/")(place).values():
        for text in (json.loads(line)["completion"] for line in data.decode().splitlines()):
            first = min((text.find(stop) for stop in change[1:] if stop in text), default=len(text))
            assert first >= len(text) - len("<unused299>"), text  # in the last token


def test_the_prompt_is_what_the_options_say(finished):
    options, change, _ = MODEL_EFFECTS["chat_template_kwargs"]
    place = finished((*options, *change), model=True)
    assert b"calm" in contents("completions/")(place)["completions/step_00001.jsonl"]


def test_task(run):
    assert_refused(run("train", "--engine", "toy", "--task", "countdown", "--output_dir", "run"), "quadratic")


def test_allow_unsandboxed_code(run, place):
    """It lets programs run where this system has no sandbox, and is refused where no program runs."""
    row = {"inputs": [[[1, 2]]], "outputs": [[[2, 1]]], "examples": [{"input": [[3, 4]], "output": [[4, 3]]}]}
    code = "<answer>def transform(grid): return [row[::-1] for row in grid]</answer>"
    (place / "rows.jsonl").write_text(json.dumps({**row, "completion": code}) + "\n")
    script = place / "script.py"  # a child without Landlock; rewards inline, for workers would have their own
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom estune.sandbox import host as sandbox\n"
        "text = sandbox.CHILD.read_text()\n"
        "sandbox.CHILD = Path('child.py').resolve()\n"
        "sandbox.CHILD.write_text(text.replace('= 444, 445, 446', '= 444, 445, 9999'))\n"
        "from estune.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    words = (
        "score",
        "--task",
        "arc_agi:python",
        "--completions",
        "rows.jsonl",
        "--json",
        "--reward_isolation",
        "inline",
    )
    assert_refused(run(*words, script=script), "lacks", "Landlock", "--allow_unsandboxed_code")
    done = run(*words, "--allow_unsandboxed_code", script=script)
    assert done.code == 0 and json.loads(done.out)["rewards"] == [1.0] and "runs without Landlock" in done.err, done
    assert_refused(run(*RUN, "--allow_unsandboxed_code"), "allow_unsandboxed_code has no effect")


def test_engine(run, place):
    assert run(*RUN).code == 0
    assert journal(place / "run")[0]["engine"]["engine"] == "toy"
    assert_refused(run("train", "--task", "quadratic", "--output_dir", "hf"), "engine toy")


def test_method(run_model, place, tiny_llama):
    """What each method does is shown in `test_baselines`, `test_rejection` and `test_ppo`."""
    pytest.importorskip("trl", reason="the baselines' trainers")
    furnish(place)
    size = MODEL.index("--population_size")
    words = (*MODEL[:size], *MODEL[size + 2 :], "--model", tiny_llama, "--num_generations", 2, "--learning_rate", 0.01)
    grpo = (*words, "--method", "grpo", "--output_dir")
    found = []
    for name, more in (("plain", ()), ("changed", ("--method_kwargs", '{"max_grad_norm": 0.01}'))):
        done = run_model(*grpo, name, *more)
        assert done.code == 0, done
        found.append(json.loads((place / name / "method.json").read_text())["arguments"]["max_grad_norm"])
    assert found == [1.0, 0.01] and weights(place / "plain") != weights(place / "changed")
    assert not (place / "plain" / "journal.jsonl").exists()


def test_eval_greedy(run_model, place):
    words = ("train", "--task", "countdown", "--model", "tiny", "--max_steps", 0, "--eval_steps", 1, "--eval_rows", 8)
    words += ("--max_completion_length", 24, "--reward_isolation", "inline", "--report_to", "none")
    for name, more in (
        ("greedy", ()),
        ("sampled", ("--temperature", 1)),
        ("asked", ("--temperature", 1, "--eval_greedy")),
    ):
        done = run_model(*words, *more, "--output_dir", name)
        assert done.code == 0, done
    greedy, sampled, asked = ((place / name / "eval" / "step_00000.jsonl").read_text() for name in
                              ("greedy", "sampled", "asked"))  # fmt: skip
    assert asked == greedy != sampled
    assert_refused(run_model(*words, "--eval_greedy", "--output_dir", "idle"), "eval_greedy", "temperature")


def test_device(run_model, place, tiny_llama):
    import torch

    furnish(place)
    done = run_model(*MODEL, "--model", tiny_llama, "--device", "cuda")
    if torch.cuda.is_available():
        assert journal(place / "run")[0]["engine"]["device"].startswith("cuda")
    else:
        assert_refused(done, "device", "cuda")


def test_revision(run_model, place, tiny_llama):
    furnish(place)
    assert_refused(run_model(*MODEL, "--model", tiny_llama, "--revision", "v2"), "revision", "directory")
    hub = place / "hub" / "models--me--llama"  # the hub's cache, with two versions
    (hub / "refs").mkdir(parents=True)
    for name, commit in (("main", "1" * 40), ("v2", "2" * 40)):
        (hub / "refs" / name).write_text(commit)
        shutil.copytree(tiny_llama, hub / "snapshots" / commit)
    data = bytearray(weights(hub / "snapshots" / ("2" * 40)))
    data[-4:] = b"\x00\x00\x80\x3f"
    (hub / "snapshots" / ("2" * 40) / "model.safetensors").write_bytes(data)
    found = []
    script = place / "script.py"  # the cache's place is read at import, which a forked command has behind it
    script.write_text(
        "import sys\nimport huggingface_hub.constants as c\nfor m in list(sys.modules.values()):\n"
        "    if 'HF_HUB_CACHE' in vars(m): m.HF_HUB_CACHE = sys.argv[1]\n"
        "from estune.cli import main\nsys.exit(main(sys.argv[2:]))\n"
    )
    for extra in ((), ("--revision", "v2")):
        done = run_model(
            place / "hub", *MODEL, "--model", "me/llama", *extra, "--max_steps", 0, "--overwrite", script=script
        )
        assert done.code == 0, done
        found.append(journal(place / "run")[0]["base"]["fingerprint"])
    assert found[0] != found[1]


def test_trust_remote_code(run_model, place, tiny_llama):
    furnish(place)
    model = place / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["Mine"],
        "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.Mine"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    assert_refused(run_model(*MODEL, "--model", "model", "--max_steps", 0), "model", "code")
    done = run_model(*MODEL, "--model", "model", "--max_steps", 0, "--trust_remote_code")
    assert done.code == 0, done
    assert (place / "run" / "model.safetensors").exists()


LOWRANK = ("--noise", "lowrank", "--rank", 2)


def test_noise_is_what_the_journal_says(run, place):
    """Matrices have low-rank noise and vectors full noise; a run of full noise is another, and stays as it was."""
    assert run(*RUN, *LOWRANK).code == 0
    line, first = journal(place / "run")[:2]
    kinds = {name: kind for name, _, kind in line["parameters"]}
    assert kinds == {
        "body.weight": "lowrank", "head.weight": "lowrank", "body.bias": "full", "frozen.weight": False,
    }  # fmt: skip
    assert (line["config"]["noise"], line["config"]["rank"]) == ("lowrank", 2)
    assert float.fromhex(first["s_lowrank"]) == pytest.approx(0.1 / 8 / 2**0.5, rel=1e-4)
    assert float.fromhex(first["s"]) == pytest.approx(0.1 / 8**0.5, rel=1e-4)
    assert_refused(run(*RUN, "--rank", 2, "--output_dir", "other"), "rank needs noise lowrank")
    assert_refused(run(*RUN, "--resume", "--max_steps", 3, "--noise", "full", "--rank", 1), "cannot change")
    assert run(*RUN, "--output_dir", "full").code == 0
    header_of_full, step_of_full = journal(place / "full")[:2]
    assert not [name for name in step_of_full if "lowrank" in name]
    assert {kind for _, _, kind in header_of_full["parameters"]} == {"full", False}


@pytest.mark.parametrize("decay", [(), ("--weight_decay", 0.5, "--weight_decay_anchor", "base")], ids=["", "anchored"])
def test_a_low_rank_run_is_resumed_and_replayed_to_the_bit(run, place, decay):
    words = (
        *RUN,
        *LOWRANK,
        *decay,
        "--antithetic",
        "--sigma_scheduler_type",
        "linear",
        "--lr_scheduler_type",
        "cosine",
    )
    assert run(*words, "--max_steps", 6, "--output_dir", "whole", "--num_threads", 2).code == 0
    assert run(*words, "--max_steps", 6, "--save_steps", 2).code == 0
    assert journal(place / "run")[0]["config"]["rank"] == 2
    assert weights(place / "run") == weights(place / "whole")
    for kept in (5, 3, 1):  # killed behind a step line, and its checkpoints up to then
        lines = (place / "run" / "journal.jsonl").read_bytes().splitlines(keepends=True)
        shutil.copytree(place / "run", place / "cut")
        kinds = [json.loads(line)["kind"] for line in lines]
        last = [index for index, kind in enumerate(kinds) if kind == "step"][kept - 1]
        (place / "cut" / "journal.jsonl").write_bytes(b"".join(lines[: last + 1]))
        (place / "cut" / "model.safetensors").unlink()
        done = run("train", "--output_dir", "cut", "--resume")
        assert done.code == 0 and f"resuming after step {kept}" in done.out, done
        assert weights(place / "cut") == weights(place / "whole")
        assert (place / "cut" / "journal.jsonl").read_bytes() == (place / "run" / "journal.jsonl").read_bytes()
        shutil.rmtree(place / "cut")
    for step in (6, 4):
        done = run("replay", "--run", "run", "--step", step, "--output_dir", f"replayed-{step}")
        assert done.code == 0 and "replayed and verified" in done.out, done
    assert weights(place / "replayed-6") == weights(place / "whole")
    assert weights(place / "replayed-4") == weights(place / "run" / "checkpoint-4")


def test_an_engine_that_perturbs_other_parameters_than_the_journals_is_refused(run, place):
    """As after a change of what a model's code counts as a matrix: the same weights, another noise."""
    assert run(*RUN, *LOWRANK).code == 0
    path = place / "run" / "journal.jsonl"
    header, *others = journal(place / "run")
    for entry in header["parameters"]:
        if entry[0] == "body.weight":
            entry[2] = "full"
    path.unlink()
    changed = Journal.create(path, {name: value for name, value in header.items() if name not in ("hash", "kind")})
    for line in others:
        if line["kind"] == "step":
            changed.append_step({name: value for name, value in line.items() if name != "hash"})
    before = path.read_bytes()
    says = "noise of body.weight was full when the journal was written, and is lowrank now"
    assert_refused(run(*RUN, *LOWRANK, "--max_steps", 3, "--resume"), says)
    assert_refused(run("replay", "--run", "run", "--output_dir", "replayed"), says)
    assert path.read_bytes() == before and not (place / "replayed").exists()


def test_members_per_batch(run, place):
    """How many members' groups are lost together; answers and the journal do not depend on it in the toy engine."""
    assert_refused(run(*RUN, "--members_per_batch", 2), "members_per_batch", "noise lowrank")
    assert run(*RUN, *LOWRANK).code == 0
    assert run(*RUN, *LOWRANK, "--members_per_batch", 3, "--output_dir", "three").code == 0
    found = [journal(place / name)[0]["config"]["members_per_batch"] for name in ("run", "three")]
    assert found == [1, 3]  # auto is resolved at the start
    assert steps(place / "run") == steps(place / "three")


def test_console(run, place):
    lines, panel = (run(*RUN, "--console", kind, "--output_dir", kind) for kind in ("lines", "panel"))
    assert lines.code == panel.code == 0
    assert "step 2/2  reward" in lines.out and "this step" not in lines.out
    assert "members' fitness" in panel.out and "step 2/2  reward" not in panel.out
    assert run(*RUN, "--output_dir", "auto").out.replace("auto", "lines") != panel.out  # here is no terminal


def test_options_of_workers(run):
    assert_refused(run(*RUN, "--worker_engine", "hf"), "worker_engine needs engine ray")
    assert_refused(run(*RUN, "--worker_resources", '{"CPU": 1}'), "worker_resources needs num_workers")
    assert_refused(run(*RUN, "--worker_timeout_s", 5), "worker_timeout_s needs num_workers")
    assert_refused(run(*RUN, "--num_workers", -1), "num_workers must not be negative")
    assert_refused(
        run(*RUN, "--num_workers", 1, "--worker_resources", '{"CPU": 0}'),
        "worker_resources has 0 for CPU; it must be a number greater than 0",
    )
    assert_refused(run(*RUN, "--reward_placement", "workers"), "reward_placement needs num_workers")
    assert_refused(
        run(*RUN, "--num_workers", 1, "--reward_placement", "workers", "--reward_isolation", "inline"),
        "reward_isolation inline runs rewards in the process that trains",
    )
    with pytest.raises(UserError, match="worker_engine is the engine that runs in the workers"):
        ESConfig(engine="ray", worker_engine="ray")
    given = ESConfig(engine="ray", worker_engine="vllm")
    assert (given.engine, given.worker_engine, given.num_workers) == ("vllm", None, 1)
    assert ESConfig(engine="ray", num_workers=3).engine == "hf"
    assert ESConfig(engine="ray").trajectory() == ESConfig().trajectory()


def test_ranks_belong_to_vllm(run):
    assert_refused(run(*RUN, "--tensor_parallel_size", 2), "engine toy does not use tensor_parallel_size")


def test_column_mapping(run, place):
    named = [json.loads(line) for line in rows(0).splitlines()]
    others = [{"text": row["prompt"], "aim": row["wanted"], "far": row["wanted"] + 9} for row in named]
    (place / "named.jsonl").write_text(rows(0))
    (place / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    found = {}
    for name, aim in (("named", None), ("others", "aim"), ("others", "far")):
        words = ("--column_mapping", json.dumps({"prompt": "text", "wanted": aim})) if aim else ()
        assert run(*RUN, "--dataset_name", f"{name}.jsonl", *words, "--overwrite").code == 0
        found[aim] = of_steps("fitness", "checksum")(place)
    assert found[None] == found["aim"] != found["far"]


def test_push_to_hub(run, place):
    """What arrives is shown in `test_hub`; without a hub the run does not begin, and names what it wanted."""
    assert_refused(run(*RUN, "--push_to_hub"), "push_to_hub cannot open run")
    assert_refused(run(*RUN, "--push_to_hub", "--hub_model_id", "me/mine", "--hub_private_repo"), "cannot open me/mine")
    for alone in (("--hub_model_id", "me/mine"), ("--hub_private_repo",)):
        assert_refused(run(*RUN, *alone), "need push_to_hub")


def test_output_dir(run, place):
    assert run(*RUN, "--output_dir", "elsewhere/deep").code == 0
    assert (place / "elsewhere" / "deep" / "model.safetensors").exists() and not (place / "run").exists()


def test_run_name(run, place):
    words = RUN[: RUN.index("--output_dir")] + RUN[RUN.index("--output_dir") + 2 :]
    assert run(*words, "--run_name", "mine").code == 0
    assert (place / "runs" / "mine" / "model.safetensors").exists()


def test_run_name_beside_output_dir(run, place):
    """It names the run for trackers and reports; a directory made of a name takes the name along."""
    assert run(*RUN, "--run_name", "mine", "--report_to", "report").code == 0
    page = (place / "run" / "report.html").read_text(encoding="utf-8")
    assert '"name": "mine"' in page
    words = RUN[: RUN.index("--output_dir")] + RUN[RUN.index("--output_dir") + 2 :]
    assert run(*words, "--run_name", "mine").code == 0
    stored = json.loads((place / "runs" / "mine" / "es_config.json").read_text())
    assert (stored["run_name"], stored["output_dir"]) == ("mine", "runs/mine")
    again = ("train", "--config", "runs/mine/es_config.json")
    assert run(*again, "--overwrite").code == 0
    assert run(*again, "--output_dir", "copy").code == 0
    assert weights(place / "copy") == weights(place / "runs" / "mine")
    assert run("train", "--resume", "--output_dir", "runs/mine", "--max_steps", 3).code == 0
    assert len(steps(place / "runs" / "mine")) == 3


def test_a_split_to_evaluate_on_needs_evaluations(run, place):
    furnish(place)
    split = ("--dataset_test_split", "other")
    assert_refused(run(*RUN, *DATA, *split), "dataset_test_split", "eval_steps")
    assert run(*RUN, *DATA, *split, "--eval_steps", 1).code == 0
    resumed = run("train", "--resume", "--output_dir", "run", "--max_steps", 3, "--eval_steps", 0)
    assert resumed.code == 0, resumed
    words = ("evaluate", "--engine", "toy", "--task", "quadratic", "--model", "toy", *DATA)
    assert run(*words, *split).code == 0
    assert_refused(run(*words, "--split", "test"), "split", "dataset_test_split")


def test_resume(run, place):
    assert run(*RUN).code == 0
    assert_refused(run(*RUN, "--max_steps", 3), "--resume")
    assert run(*RUN, "--max_steps", 3, "--resume").code == 0
    assert len(steps(place / "run")) == 3


def test_overwrite(run, place):
    assert run(*RUN, "--save_steps", 1).code == 0
    assert run(*RUN, "--seed", 3, "--overwrite").code == 0
    assert journal(place / "run")[0]["config"]["seed"] == 3 and not list((place / "run").glob("checkpoint-*"))


def test_dry_run(run, place):
    done = run(*RUN, "--dry_run")
    assert done.code == 0 and '"population_size": 4' in done.out
    assert not (place / "run").exists()


# --- how options are written ------------------------------------------------------------------------------------------


def first_words(run, *words):
    """Return the resolved configuration that words lead to."""
    done = run(*RUN, "--population_size", 4, *words, "--dry_run")
    assert done.code == 0, done
    return json.loads(done.out[: done.out.rindex("}") + 1])


def test_booleans(run):
    for words, value in (
        ((), False),
        (("--antithetic",), True),
        (("--antithetic", "true"), True),
        (("--antithetic", "false"), False),
        (("--antithetic=false",), False),
        (("--antithetic", "True"), True),
        (("--no_antithetic",), False),
        (("--no-antithetic",), False),
        (("--antithetic", "--no_antithetic"), False),
        (("--no_antithetic", "--antithetic"), True),
        (("--antithetic", "0"), False),
        (("--antithetic", "yes"), True),
    ):
        assert first_words(run, *words)["antithetic"] is value, words


def test_dashes_and_underscores(run, place):
    (place / "a.yaml").write_text("population-size: 6\nlearning_rate: 0.3\n")
    one = first_words(run, "--weight-decay", 0.5, "--weight-decay-anchor=base", "--response_prefix=--a-b")
    other = first_words(run, "--weight_decay=0.5", "--weight_decay_anchor", "base", "--response-prefix=--a-b")
    assert one == other
    assert (one["weight_decay"], one["weight_decay_anchor"], one["response_prefix"]) == (0.5, "base", "--a-b")


def test_values_that_begin_with_a_dash(run, place):
    assert first_words(run, *LOGGED, "rewards.py:second", "--reward_weights", "1", "-1e-3")["reward_weights"] == [
        1,
        -1e-3,
    ]
    assert first_words(run, *LOGGED, "--reward_weights", "-.5")["reward_weights"] == [-0.5]
    for words in (("--sigma", "-1e-3"), ("--learning_rate", "-1E-3"), ("--warmup-steps", "-1"), ("--sigma", "-inf")):
        assert_refused(run(*RUN, *words), words[0][2:].replace("-", "_") + " must")
    for name, value in (("system_prompt", "---"), ("response-prefix", "--a-b"), ("stop_strings", "--")):
        flag = f"--{name.replace('-', '_')}"
        assert_refused(run(*RUN, f"--{name}", value), f"{flag}=VALUE")
    assert_refused(run(*RUN, "--run_name", "--max_steps", 3), "--run_name", "expected one argument")
    assert first_words(run, "--system-prompt=---")["system_prompt"] == "---"


def test_values_stay_as_they_are(run):
    for value in ("--be-brief and kind", "--be-brief=now or-never", "-a-b c", "--max-steps: 3-4"):
        for words in (("--system_prompt", value), (f"--system-prompt={value}",)):
            assert first_words(run, *words)["system_prompt"] == value
    assert_refused(run(*RUN, "--max-stepz", 3), "--max-stepz", "--max_steps")


def test_flags_win_over_the_file(run, place):
    (place / "a.yaml").write_text("sigma: 0.7\nwarmup_steps: 5\n")
    config = first_words(run, "--config", "a.yaml")
    assert (config["sigma"], config["warmup_steps"]) == (0.1, 5)


def test_aliases(run, place, toy_base):
    shutil.copytree(toy_base, place / "base")
    assert first_words(run, "--model_name_or_path", "base")["model"] == "base"


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_a_flag_that_help_explains(field, help_of_train):
    assert f"--{field} " in help_of_train
    assert FIELDS[field].metadata["help"]


@pytest.fixture(scope="module")
def help_of_train(zygote, tmp_path_factory):
    done = zygote.run(["train", "--help"], tmp_path_factory.mktemp("help"))
    assert done.code == 0
    return done.out


@pytest.mark.parametrize(
    "words",
    [
        ("--dtype", "bfloat16"),
        ("--device", "cuda"),
        ("--trainable_parameters", "head"),
        ("--revision", "v2"),
        ("--trust_remote_code",),
        ("--temperature", 1),
        ("--stop_strings", "."),
        ("--chat_template_kwargs", '{"a": 1}'),
        ("--apply_chat_template", "true"),
    ],
    ids=lambda words: words[0],
)
def test_what_the_toy_would_ignore_is_refused(run, place, words):
    assert_refused(run(*RUN, *words))
    assert not (place / "run").exists()


def test_held_out_rows_are_never_the_training_rows(run, place):
    import datasets

    furnish(place)
    (place / "toy.jsonl").write_text(rows(0))
    datasets.Dataset.from_list([json.loads(line) for line in rows(0).splitlines()]).save_to_disk(place / "saved")
    saved = (*RUN, "--dataset_name", "saved")
    assert_refused(run(*saved, "--eval_steps", 1), "held out", "saved")
    assert_refused(run(*saved, "--dataset_train_split", "other"), "saved", "no splits")
    assert_refused(run(*saved, "--dataset_config", "nonexist"), "saved", "no configurations")
    assert_refused(run(*RUN, "--dataset_name", "toy.jsonl", "--eval_steps", 1), "held out", "toy.jsonl")
    words = ("--dataset_name", "toy.jsonl", "--dataset_test_split", "other", "--eval_steps", 1)
    assert_refused(run(*RUN, *words), "toy.jsonl")
    assert_refused(run(*RUN, "--dataset_name", "data", "--dataset_test_split", "train", "--eval_steps", 1), "train")
    assert_refused(run(*RUN, "--dataset_train_split", "other"), "dataset_name")


# --- configurations that must give one trajectory ---------------------------------------------------------------------

CLASS = {
    "engine": "toy",
    "task": "quadratic",
    "max_steps": 3,
    "population_size": 6,
    "sigma": 0.05,
    "learning_rate": 0.02,
    "antithetic": True,
    "fitness_shaping": "centered_rank",
    "weight_decay": 0.01,
    "batch_size": 5,
    "seed": 7,
    "num_threads": 1,
    "reward_isolation": "inline",
    "report_to": ["none"],
    "output_dir": "run",
}


@pytest.fixture(scope="module")
def wanted(zygote, tmp_path_factory):
    place = tmp_path_factory.mktemp("wanted")
    words = [
        word
        for name, value in CLASS.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]
    assert zygote.run(("train", *words), place).code == 0
    return tree(place / "run")


def test_file_flags_and_python_mean_the_same(zygote, run, place, wanted):
    lines = [f"{name.replace('_', '-')}: {json.dumps(value)}" for name, value in CLASS.items()]
    (place / "all.yaml").write_text("\n".join(lines))
    (place / "half.yaml").write_text("\n".join(lines[:7]))
    (place / "strings.yaml").write_text("\n".join(f"{k}: '{v}'" for k, v in CLASS.items() if k != "report_to"))
    (place / "script.py").write_text(
        f"from estune import ESConfig, ESTrainer\nESTrainer(args=ESConfig(**{CLASS!r})).train()\n"
    )
    flags = [word for name, value in list(CLASS.items())[7:-2] for word in (f"--{name}", value)]
    ways = {
        "file": dict(words=("train", "--config", "all.yaml")),
        "half and half": dict(
            words=("train", *flags, "--config", "half.yaml", "--report_to", "none", "--output_dir=run")
        ),
        "strings": dict(words=("train", "--config", "strings.yaml", "--report-to", "none")),
        "the run's own configuration": dict(words=("train", "--config", "run.yaml", "--overwrite")),
        "python": dict(words=(), script=place / "script.py"),
    }
    for name, way in ways.items():
        done = run(*way.pop("words"), **way)
        assert done.code == 0, (name, done)
        assert tree(place / "run") == wanted, name
        (place / "run.yaml").write_bytes((place / "run" / "es_config.json").read_bytes())  # JSON is YAML
        shutil.rmtree(place / "run")


@pytest.mark.parametrize(
    "words",
    [
        ("--eval_steps", 1),
        ("--eval_steps", 2, "--eval_rows", 3),
        ("--save_steps", 1),
        ("--save_steps", 1, "--save_total_limit", 1),
        ("--logging_steps", 3),
        ("--log_completions", "true"),
        ("--report_to", "plot"),
        ("--prompts_per_batch", 2),
        ("--reward_isolation", "process", "--reward_timeout_s", PATIENCE_S),
        ("--max_completion_length", 100),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_watching_a_run_does_not_change_it(run, place, wanted, words):
    (place / "all.yaml").write_text(json.dumps(CLASS))
    assert run("train", "--config", "all.yaml", *words).code == 0
    assert weights(place / "run") == wanted["model.safetensors"]
    expected = [json.loads(line) for line in wanted["journal.jsonl"].decode().splitlines()]
    assert steps(place / "run") == [
        {k: v for k, v in line.items() if k != "hash"} for line in expected if line["kind"] == "step"
    ]


def test_two_runs_without_a_name_never_share_a_directory(place, monkeypatch):
    """Four runs start in the same second, because the clock stands still."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(request, "time", SimpleNamespace(strftime=lambda _: "20260102-030405"))
    for _ in range(4):
        ESTrainer(args=ESConfig(engine="toy", task="quadratic", max_steps=0, report_to=["none"])).train()
    found = sorted((place / "runs").iterdir())
    assert len(found) == 4 and all((path / "model.safetensors").exists() for path in found)
    assert all(path.name.startswith("quadratic-toy-20") for path in found)


def test_defaults_are_those_of_the_paper():
    config = ESConfig(model="m", task="countdown")
    assert (config.population_size, config.sigma, config.effective_learning_rate) == (30, 1e-3, 5e-4)
    assert (config.fitness_shaping, config.temperature, config.antithetic, config.weight_decay) == (
        "z_score",
        0.0,
        False,
        0.0,
    )
    assert dataclasses.replace(config, sigma=4e-3).effective_learning_rate == 2e-3


def test_through_a_real_interpreter(place, wanted):
    (place / "all.yaml").write_text(json.dumps(CLASS))
    done = estune("train", "--config", "all.yaml", cwd=place)
    assert done.code == 0, done
    assert tree(place / "run") == wanted
