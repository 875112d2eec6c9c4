"""Bad input to the command line: one clear sentence, a non-zero exit status, and no file changes."""

import json
import shutil
import struct

import pytest
from command_line import TOY, assert_refused, estune, journal, tree

pytestmark = pytest.mark.miniature

RUN = (*TOY, "--max_steps", 1, "--population_size", 4)
DATA = ("--dataset_name", "rows.jsonl", "--reward_funcs", "rewards.py:vowels")


def files(place):
    """Return the files in the test's directory, without the harness's output."""
    return tree(place, without=(".out", ".err", "__pycache__"))


@pytest.fixture
def refused(run, place):
    """``refused(words, *parts)``: the command is refused with these words in its sentence, and writes nothing."""

    def check(words, *parts, run=run):
        before = files(place)
        sentence = assert_refused(run(*words), *parts)
        assert files(place) == before
        assert not (place / "run").exists() or "run/es_config.json" in before
        return sentence

    return check


# --- words on the command line ----------------------------------------------------------------------------------------

WORDS = {
    "unknown flag": (("train", "--sgima", "1"), "unknown option --sgima", "'--sigma'"),
    "unknown flag with =": (("train", "--population-sise=4"), "--population-sise", "'--population_size'"),
    "unknown flag of evaluate": (("evaluate", "--limt", "4"), "--limt", "'--limit'"),
    "a training flag of evaluate": (("evaluate", "--sigma", "4"), "--sigma"),
    "unknown flag without a command": (("--vesion",), "--vesion", "'--version'"),
    "unknown flag that is far from all": (("train", "--qqqqqqqqqqqq", "1"), "--qqqqqqqqqqqq"),
    "abbreviated flag": (("train", "--population", "4"), "--population", "--population_size"),
    "unknown command": (("trian",), "trian", "'train'"),
    "a word too many": (("train", "now"), "now"),
    "flag without its value": ((*RUN, "--sigma"), "sigma"),
    "score without completions": (("score", "--task", "countdown"), "--completions"),
    "replay without a run": (("replay", "--output_dir", "out"), "RUN"),
    "replay with a flag and no run": (("replay", "--run", "--output_dir", "out"), "RUN"),
    "replay of a word": (("replay", "nowhere", "--output_dir", "out"), "nowhere holds no journal"),
    "replay of a word at the end": (("replay", "--output_dir", "out", "nowhere"), "nowhere holds no journal"),
    "export of --run": (("export", "--run", "nowhere", "--patch", "p"), "nowhere holds no journal"),
    "export of --run=": (("export", "--patch", "p", "--run=nowhere"), "nowhere holds no journal"),
    "export of two runs": (("export", "here", "--patch", "p", "--run", "nowhere"), "unexpected word 'nowhere'"),
    "report of --run": (("report", "--run", "nowhere", "--output_dir", "."), "nowhere"),
    "evaluate with a word": (
        ("evaluate", "runs/mine"),
        "'runs/mine': give the model as --model runs/mine",
    ),
    "probe with a word": (("probe", "--seed", "1", "m"), "unexpected word 'm': give the model as --model m"),
    "no command": (("--resume", "--output_dir", "x"), "command is missing: estune train --resume --output_dir x"),
    "no command, dashes": (("--max-steps=3",), "command is missing: estune train --max-steps=3"),
    "no command, one that has it": (("--completions", "c d"), "command is missing: estune score --completions 'c d'"),
    "no command, several that have it": (("--json",), "command is missing; --json is an option of evaluate, score"),
    "a required option misspelt": (("score", "--completion", "c.jsonl"), "--completion;", "'--completions'"),
    "a required option misspelt, another unknown": (
        ("apply", "p", "--modle=m", "--qqqqqqqq", "4"),
        "unknown options --modle (did you mean '--model'?), --qqqqqqqq",
    ),
    "all unknown options": (
        ("train", "--sgima", "-1", "--lr=3", "--qqqqqqqq", "--task", "countdown", "--sgima", "2"),
        "unknown options --sgima (did you mean '--sigma'?), --lr (did you mean --learning_rate?), --qqqqqqqq",
    ),
    "unknown task": (("train", "--task", "cuontdown"), "cuontdown", "'countdown'"),
    "unknown task of evaluate": (("evaluate", "--task", "countdwon"), "countdwon", "'countdown'"),
    "unknown split": (("evaluate", "--split", "tset"), "tset", "test"),
    "unknown engine": ((*RUN, "--engine", "tyo"), "engine", "tyo", "'toy'"),
    "no vllm here": (("train", "--engine", "vllm", "--model", "tiny", "--output_dir", "run"), "vllm", "make vllm"),
    "ranks of another engine": ((*RUN, "--tensor_parallel_size", 2), "tensor_parallel_size", "vllm"),
    "a baseline with vllm": (("train", "--method", "random_search", "--engine", "vllm"), "random_search", "engine hf"),
    "unknown shaping": ((*RUN, "--fitness_shaping", "zscore"), "fitness_shaping", "'z_score'"),
    "unknown monitor": ((*RUN, "--report_to", "plto"), "report_to", "plto", "plot"),
    "unknown noise": ((*RUN, "--noise", "fulll"), "noise", "'full'"),
    "unknown schedule": ((*RUN, "--lr_scheduler_type", "cosin"), "lr_scheduler_type", "'cosine'"),
    "sigma 0": ((*RUN, "--sigma", "0"), "sigma", "greater than 0", "0"),
    "negative sigma": ((*RUN, "--sigma", "-0.1"), "sigma", "greater than 0", "-0.1"),
    "negative sigma with an exponent": ((*RUN, "--sigma=-1e-3"), "sigma", "greater than 0", "-0.001"),
    "sigma NaN": ((*RUN, "--sigma", "nan"), "sigma", "finite"),
    "sigma inf": ((*RUN, "--sigma", "inf"), "sigma", "finite"),
    "sigma text": ((*RUN, "--sigma", "big"), "sigma", "number", "'big'"),
    "population of 1": ((*RUN, "--population_size", "1"), "population_size", "at least 2"),
    "odd population in pairs": ((*RUN, "--population_size", "5", "--antithetic"), "antithetic", "even", "5"),
    "fraction of a step": ((*RUN, "--max_steps", "1.5"), "max_steps", "whole number", "1.5"),
    "negative steps": ((*RUN, "--max_steps", "-1"), "max_steps", "negative"),
    "batch of 0": ((*RUN, "--batch_size", "0"), "batch_size", "greater than 0"),
    "batch larger than the data": ((*RUN, "--batch_size", "99"), "batch_size 99", "rows"),
    "negative seed": ((*RUN, "--seed", "-1"), "seed", "unsigned"),
    "seed of 65 bits": ((*RUN, "--seed", str(2**64)), "seed", "64"),
    "bool that is neither": ((*RUN, "--antithetic", "maybe"), "antithetic", "true or false"),
    "several completions, greedily": ((*RUN, "--num_generations", "2"), "num_generations", "temperature"),
    "top_p, greedily": ((*RUN, "--top_p", "0.5"), "top_p", "temperature"),
    "anchor without decay": ((*RUN, "--weight_decay_anchor", "base"), "weight_decay"),
    "warmup schedule without warmup": ((*RUN, "--lr_scheduler_type", "constant_with_warmup"), "warmup_steps"),
    "two weights for one reward": ((*RUN, "--reward_weights", "1", "2"), "reward_weights", "2", "1"),
    "weights of 0": ((*RUN, "--reward_weights", "0"), "reward_weights", "0"),
    "bad regular expression": ((*RUN, "--trainable_parameters", "layers.("), "trainable_parameters", "layers.("),
    "template arguments that are not JSON": ((*RUN, "--chat_template_kwargs", "{a"), "chat_template_kwargs", "JSON"),
    "resume without a directory": (("train", "--engine", "toy", "--task", "quadratic", "--resume"), "output_dir"),
    "resume and overwrite": ((*RUN, "--resume", "--overwrite"), "resume", "overwrite"),
    "toy engine with another task": ((*RUN, "--task", "countdown"), "toy", "quadratic"),
    "toy task without its engine": (("train", "--task", "quadratic"), "toy", "quadratic"),
    "missing config": (("train", "--config", "no.yaml"), "no.yaml"),
    "missing preset": (("train", "--config", "dmeo"), "dmeo", "demo"),
    "samples, greedily": (("evaluate", "--engine", "toy", "--task", "quadratic", "--n_samples", "4"), "temperature"),
    "replay of nothing": (("replay", "--run", "nowhere", "--output_dir", "out"), "nowhere"),
    "no reward for one's own data": (("train", "--dataset_name", "rows.jsonl"), "reward_funcs"),
    "no data for one's own reward": (
        ("train", "--model", "tiny", "--reward_funcs", "rewards.py:vowels", "--dataset_name", "no.jsonl"),
        "no.jsonl",
    ),
}


@pytest.mark.parametrize(("words", "parts"), [(w, p) for w, *p in WORDS.values()], ids=list(WORDS))
def test_words(refused, place, words, parts):
    (place / "rows.jsonl").write_text('{"prompt": "x[0]"}\n')
    refused(words, *parts)


# --- configuration files ----------------------------------------------------------------------------------------------

CONFIGS = {
    "unknown name": ("sigmaa: 1\n", "sigmaa", "'sigma'"),
    "not a mapping": ("- sigma\n", "mapping"),
    "not YAML": ("sigma: [1\n", "not YAML"),
    "a value of the wrong type": ("warmup_steps: many\n", "warmup_steps", "whole number", "'many'"),
    "a list for a number": ("sigma: [1, 2]\n", "sigma", "number"),
    "a bad value": ("sigma: -1e-3\n", "sigma", "greater than 0"),
}


@pytest.mark.parametrize(("text", "parts"), [(t, p) for t, *p in CONFIGS.values()], ids=list(CONFIGS))
def test_config_files(refused, place, text, parts):
    (place / "my.yaml").write_text(text)
    refused((*RUN, "--config", "my.yaml"), *parts)


def test_yaml_numbers_read_as_strings_are_coerced(run, place):
    """YAML 1.1 reads 1e-3 as a string."""
    (place / "my.yaml").write_text(
        "sigma: 1e-3\nlearning-rate: 2e-2\nmax_steps: 1e0\npopulation_size: '4'\nantithetic: yes\n"
    )
    done = run(*TOY, "--config", "my.yaml")
    assert done.code == 0, done
    config = journal(place / "run")[0]["config"]
    assert (config["sigma"], config["learning_rate"], config["population_size"], config["antithetic"]) == (
        1e-3,
        2e-2,
        4,
        True,
    )


# --- rewards ----------------------------------------------------------------------------------------------------------

REWARDS = {
    "no colon": ("rewards.py", "rewards.py", "module:function"),
    "no file": ("reward.py:logged", "reward.py", "no file"),
    "no function": ("rewards.py:loged", "'loged'", "'logged'"),
    "no module": ("no_such_package.rewards:f", "no_such_package"),
    "not a function": ("broken.py:NUMBER", "int", "not a function"),
    "syntax": ("syntax.py:f", "syntax.py"),
    "raises while it loads": ("raises.py:f", "ZeroDivisionError"),
    "exits while it loads": ("exits.py:f", "exits.py", "SystemExit"),
}


@pytest.mark.parametrize(("reward", "parts"), [(r, p) for r, *p in REWARDS.values()], ids=list(REWARDS))
def test_rewards_that_do_not_load(refused, place, reward, parts):
    for name, text in {
        "broken": "NUMBER = 3",
        "syntax": "def f(:",
        "raises": "1 / 0",
        "exits": "raise SystemExit(0)",
    }.items():
        (place / f"{name}.py").write_text(text)
    refused((*RUN, "--reward_funcs", reward), reward, *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("evaluate", "--rows", "."), ("rows .", "directory")),
        (("evaluate", "--reference", "./nowhere"), ("nowhere", "does not exist")),
        (("export", "run", "--patch", "."), ("patch .", "directory")),
    ],
)
def test_what_a_command_needs_at_its_end_is_tried_at_its_start(run_model, place, words, parts):
    done = run_model(*words)
    assert_refused(done, *parts)
    assert not (place / "run").exists()


# --- datasets ---------------------------------------------------------------------------------------------------------

DATASETS = {
    "empty": ("", "no rows"),
    "not JSON": ('{"prompt": "a"}\n{"prompt"\n', "line 2", "JSON"),
    "not objects": ("[1, 2]\n", "line 1", "object"),
    "without prompts": ('{"sum": "a", "wanted": 1}\n', "prompt"),
    "without the column that the reward needs": ('{"prompt": "x[0]"}\n', "wanted"),
    "a null prompt": (
        '{"prompt": "x[0]", "wanted": 1}\n{"prompt": null, "wanted": 1}\n',
        "row 1",
        "its prompt is null",
    ),
    "half a surrogate pair": ('{"prompt": "x[0] \\ud83d.", "wanted": 1}\n', "row 0", "not Unicode text", "ud83d"),
    "a name given twice": ('{"prompt": "x[0]", "wanted": 1, "wanted": 2}\n', "line 1", "'wanted' twice"),
    "a prompt that is a number": ('{"prompt": 3, "wanted": 1}\n', "row 0", "prompt"),
    "an empty prompt": ('{"prompt": "", "wanted": 1}\n', "row 0", "empty"),
    "messages for a model without a template": (
        '{"prompt": [{"role": "user", "content": "x[0]"}], "wanted": 1}\n',
        "row 0",
        "template",
    ),
    "images": ('{"prompt": "x[0]", "wanted": 1, "images": ["a.png"]}\n', "images", "not supported"),
    "tools": ('{"prompt": "x[0]", "wanted": 1, "tools": [{"name": "f"}]}\n', "tools", "not supported"),
}


@pytest.mark.parametrize(("text", "parts"), [(t, p) for t, *p in DATASETS.values()], ids=list(DATASETS))
def test_datasets(refused, place, text, parts):
    (place / "rows.jsonl").write_text(text)
    refused((*RUN, "--dataset_name", "rows.jsonl"), *parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("none.jsonl", ("none.jsonl", "no dataset")),
        ("none.parquet", ("none.parquet",)),
        ("rewards.py", ("rewards.py", ".jsonl")),
        ("./nowhere", ("nowhere",)),
        ("bad.parquet", ("bad.parquet", "parquet")),
    ],
)
def test_datasets_that_are_not_there(refused, place, name, parts):
    (place / "bad.parquet").write_text("no parquet")
    refused((*RUN, "--dataset_name", name), *parts)


PICTURE = '[{"role": "user", "content": [{"type": "image"}]}]'
OWN_ROWS = {
    "a column that may be the prompt": (
        '{"text": "1 + 1?", "id": 3}\n', (), "no column 'prompt' or 'question'", "it has text, id",
        """--column_mapping '{"prompt": "text"}'""",
    ),
    "no column that may be the prompt": ('{"id": 3}\n', (), "no column 'prompt'", "it has id"),
    "several layouts": (
        '{"question": "a", "problem": "b"}\n', (), "question or problem",
        """--column_mapping '{"question": "question"}' or '{"problem": "problem"}'""",
    ),
    "a question that is null": ('{"question": "a"}\n{"question": null}\n', (), "row 1 of the train split", "null"),
    "a conversation without a question": (
        '{"messages": [{"role": "assistant", "content": "a"}]}\n', (), "row 0", "no user turn",
    ),
    "an image": (
        f'{{"prompt": {PICTURE}}}\n', (), "row 0", "'image'", "only text parts",
    ),
    "a mapping to a missing column": (
        '{"text": "a"}\n', ("--column_mapping", '{"prompt": "txet"}'), "'txet'", "no such column", "'text'",
    ),
    "a mapping onto a column": (
        '{"prompt": "a", "text": "b"}\n', ("--column_mapping", '{"prompt": "text"}'), "has a column 'prompt'",
    ),
    "a mapping that is no object": ('{"text": "a"}\n', ("--column_mapping", "prompt=text"), "column_mapping", "JSON"),
    "a mapping to a number": (
        '{"text": "a"}\n', ("--column_mapping", '{"prompt": 3}'), "maps 'prompt' to 3", "name of a column",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words", "parts"), [(t, w, p) for t, w, *p in OWN_ROWS.values()], ids=list(OWN_ROWS))
def test_own_rows(refused, run_model, place, text, words, parts):
    (place / "rows.jsonl").write_text(text)
    refused(("train", *DATA, *words, "--max_steps", 1, "--output_dir", "run"), *parts, run=run_model)


def test_a_mapping_is_for_rows_of_ones_own(refused):
    refused((*RUN, "--column_mapping", '{"prompt": "text"}'), "column_mapping needs dataset_name")


@pytest.mark.parametrize("option", ["--system_prompt", "--response_prefix", "--stop_strings", "--dataset_name"])
def test_bytes_that_are_no_text_on_the_command_line(call, place, option):
    """The command line reads undecodable bytes as halves of surrogate pairs, which no file of a run could hold."""
    done = call(*RUN, option, b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert_refused(done, option.removeprefix("--"), "cannot be encoded")
    assert not (place / "run").exists()


def test_missing_columns_are_named_with_the_reward(refused, place):
    (place / "rows.jsonl").write_text('{"prompt": "a", "answer": 2}\n')
    words = ("train", "--dataset_name", "rows.jsonl", "--reward_funcs", "rewards.py:needs_target")
    refused(words, "target", "needs_target", "answer")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("no rows",)),
        ('{"completion": "1"\n', ("line 1", "JSON")),
        ('{"numbers": [1, 2], "target": 3}\n', ("row 0", "completion")),
        ('{"completion": "1", "target": 3}\n', ("numbers",)),
        ('{"completion": 5, "numbers": [1, 2], "target": 3}\n', ("completion is 5", "not a string")),
        ('{"completion": "1", "numbers": [1, 2], "target": "x"}\n', ("target",)),
    ],
)
def test_completions_to_score(refused, place, text, parts):
    (place / "c.jsonl").write_text(text)
    refused(("score", "--task", "countdown", "--completions", "c.jsonl"), *parts)
    refused(("score", "--task", "countdown", "--completions", "c.jsonl", "--json"), *parts)
    refused(("score", "--task", "countdown", "--completions", "d.jsonl"), "d.jsonl")


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_directory_that_holds_another_run(run, refused, place):
    assert run(*RUN).code == 0
    before = files(place)
    sentence = refused(RUN, "run", "another run", "--resume", "--overwrite")
    assert files(place) == before, sentence
    assert run(*RUN, "--sigma", 0.5, "--overwrite").code == 0
    assert journal(place / "run")[0]["config"]["sigma"] == 0.5


def test_overwrite_deletes_nothing_before_all_else_is_known_to_work(run, place):
    assert run(*RUN).code == 0
    before = files(place)
    for extra in (
        ("--model", "./nowhere"),
        ("--reward_funcs", "rewards.py:none"),
        ("--batch_size", 999),
        ("--sigma", 0),
    ):
        assert_refused(run(*RUN, "--overwrite", *extra))
        assert files(place) == before


def test_a_directory_that_holds_something_else(run, place):
    (place / "run").mkdir()
    (place / "run" / "es_config.json.txt").write_text("mine")
    before = files(place)
    for extra in ((), ("--overwrite",), ("--resume",)):
        assert_refused(run(*RUN, *extra), "run", "other files")
        assert files(place) == before
    shutil.rmtree(place / "run")
    (place / "run").write_text("a file")
    assert_refused(run(*RUN), "run", "file")
    assert_refused(run(*RUN, "--output_dir", "run/deeper"), "run")
    assert_refused(run(*RUN, "--output_dir", "/proc/nowhere/run"), "/proc/nowhere")
    assert (place / "run").read_text() == "a file"


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tiny_llama, place):
    """``broken(how)``: a copy of the tiny Llama with one thing wrong."""

    def make(how):
        directory = place / "model"
        shutil.copytree(tiny_llama, directory)
        weights, config = directory / "model.safetensors", directory / "config.json"
        data = weights.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        if how == "truncated":
            weights.write_bytes(data[: len(data) // 2])
        elif how == "NaN":
            header = json.loads(data[8:start])
            begin = start + header["model.norm.weight"]["data_offsets"][0]
            weights.write_bytes(data[:begin] + struct.pack("<f", float("nan")) + data[begin + 4 :])
        elif how == "no weights":
            weights.unlink()
        elif how == "no config":
            config.unlink()
        elif how == "bad config":
            config.write_text("{")
        elif how == "unknown architecture":
            config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "unheard-of"}))
        elif how == "no tokenizer":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (directory / name).unlink()
        elif how == "adapter":
            (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
            (directory / "adapter_model.safetensors").write_bytes(data)
            weights.unlink()
            config.unlink()
        return directory

    return make


MODELS = {
    "truncated": ("model.safetensors", "truncated"),
    "NaN": ("NaN", "model.norm.weight"),
    "no weights": ("weights",),
    "no config": ("config.json",),
    "bad config": ("config",),
    "unknown architecture": ("unheard-of",),
    "no tokenizer": ("tokenizer",),
    "adapter": ("adapter",),
}


@pytest.mark.parametrize("how", MODELS)
def test_models(refused, run_model, place, broken, how):
    (place / "rows.jsonl").write_text('{"prompt": "a"}\n')
    broken(how)
    sentence = refused(
        ("train", "--model", "model", *DATA, "--output_dir", "run"), "model", *MODELS[how], run=run_model
    )
    assert len(sentence) < 400


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("./nowhere", ("nowhere", "does not exist")),
        ("no-such-model-here", ("no-such-model-here",)),
        ("rows.jsonl", ("rows.jsonl",)),
    ],
)
def test_models_that_are_not_there(refused, run_model, place, model, parts):
    (place / "rows.jsonl").write_text('{"prompt": "a"}\n')
    for command in (("train", "--output_dir", "run"), ("evaluate",)):
        refused((*command, "--model", model, *DATA), *parts, run=run_model)


def test_a_run_without_a_finished_model(run, place, monkeypatch):
    """The run has a checkpoint, or only a journal."""
    from estune.errors import UserError
    from estune.run.directory import refuse_unfinished

    monkeypatch.chdir(place)
    assert run(*TOY, "--max_steps", 2, "--population_size", 4, "--save_steps", 1).code == 0
    (place / "run" / "config.json").unlink(missing_ok=True)
    said = "run is a run that stopped after 2 of 2 steps and has no finished model: finish it with --resume, or "
    with pytest.raises(UserError, match=said + "evaluate run/checkpoint-2$"):
        refuse_unfinished("run")
    for directory in (place / "run").glob("checkpoint-*"):
        shutil.rmtree(directory)
    with pytest.raises(UserError, match=said + "rebuild its weights with estune replay --run run --output_dir OUT$"):
        refuse_unfinished("run")


@pytest.mark.parametrize(("word", "near"), [("tiyn", "tiny"), ("./mymodel", "mymodle"), ("mymodel", "mymodle")])
def test_a_model_that_is_nearly_there(place, monkeypatch, word, near):
    from estune.engines.hf.loading import near_models

    monkeypatch.chdir(place)
    (place / "mymodle").mkdir()
    assert near_models(word) == f"; did you mean {near!r}?"
    assert near_models("org/unlike") == ""


def test_a_prompt_longer_than_the_context(refused, run_model, place, tiny_llama):
    """The random Llama has room for 128 tokens."""
    (place / "rows.jsonl").write_text('{"prompt": "short"}\n' + json.dumps({"prompt": "q" * 120}) + "\n")
    words = ("--model", tiny_llama, *DATA, "--max_completion_length", 20)
    refused(("train", *words, "--output_dir", "run"), "row 1", "120", "20", "128", run=run_model)
    refused(("evaluate", *words), "row 1", "128", run=run_model)


def test_a_pattern_that_matches_no_parameter(refused, run_model, place, tiny_llama):
    (place / "rows.jsonl").write_text('{"prompt": "short"}\n')
    words = ("train", "--model", tiny_llama, *DATA, "--trainable_parameters", "atention", "--output_dir", "run")
    refused(words, "atention", "no parameter", run=run_model)


def test_through_a_real_interpreter(place):
    """The same in a new process."""
    assert_refused(estune("train", "--sgima", "1", cwd=place), "--sigma")
    assert_refused(estune(*RUN, "--antithetic", "--population_size", 5, cwd=place), "even")
    assert not list(place.iterdir())
