"""`ESTrainer` in Python, with TRL's keywords, on a tiny random Llama; and the uses of a run directory."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from command_line import assert_same_tree, journal, length, metrics, steps, tree, vowels, weights
from tiny_models import attributes, config_states, process_state, save_tiny, tiny_tokenizer

from estune import ESConfig, ESTrainer
from estune.engines.hf.callers import AttentionCaller
from estune.engines.hf.engine import HFEngine
from estune.errors import UserError

pytestmark = pytest.mark.miniature

ROWS = [{"prompt": f"count to {i}: ", "bonus": i / 10} for i in range(6)]
SMALL = {
    "max_steps": 2,
    "population_size": 4,
    "batch_size": 3,
    "max_completion_length": 10,
    "sigma": 0.05,
    "num_threads": 1,
    "report_to": ["none"],
    "reward_workers": 1,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", directory)
    return directory


@pytest.fixture(autouse=True)
def somewhere(place, monkeypatch):
    monkeypatch.chdir(place)


def train(llama, output_dir="run", **changes):
    trainer = ESTrainer(
        model=str(llama),
        reward_funcs=changes.pop("reward_funcs", vowels),
        args=ESConfig(output_dir=output_dir, **{**SMALL, **changes}),
        train_dataset=ROWS,
    )
    return trainer.train(), trainer


def test_train_and_load(llama):
    run_dir, _ = train(llama, save_steps=1)
    assert run_dir == Path("run")
    model = transformers.AutoModelForCausalLM.from_pretrained(run_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    names = [name for name, _ in base.named_parameters()]
    moved = [name for name in names if not torch.equal(model.get_parameter(name), base.get_parameter(name))]
    assert moved == names  # all parameters
    checkpoint = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "checkpoint-2")
    for name in names:
        assert torch.equal(model.get_parameter(name), checkpoint.get_parameter(name))
    inputs = tokenizer("count to 3: ", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert {path.name for path in run_dir.iterdir() if path.is_file()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "es_config.json",
        "es_state.json",
        "env.json",
        "journal.jsonl",
        "metrics.jsonl",
        "trainer_state.json",
    }
    assert json.loads((run_dir / "config.json").read_text())["model_type"] == "llama"


def test_saved_files_hold_no_paths_and_equal_runs_equal_bytes(llama, place):
    (place / "elsewhere").mkdir()
    train(llama)
    train(llama, "elsewhere/run")
    apart = ("es_config.json",)
    assert_same_tree(tree(place / "elsewhere" / "run", apart), tree(place / "run", apart))
    for name in (
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "model.safetensors",
        "es_state.json",
        "trainer_state.json",
    ):
        assert str(place).encode() not in (place / "run" / name).read_bytes()
        assert str(llama).encode() not in (place / "run" / name).read_bytes()


def test_python_and_the_command_line_write_the_same(llama, place, run_model):
    train(llama, reward_funcs="rewards.py:vowels")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [
        word
        for name, value in SMALL.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]
    done = run_model(
        "train",
        "--model",
        llama,
        "--dataset_name",
        "rows.jsonl",
        "--reward_funcs",
        "rewards.py:vowels",
        *words,
        "--output_dir",
        "cli",
    )
    assert done.code == 0, done
    assert weights(place / "cli") == weights(place / "run")
    assert steps(place / "cli") == steps(place / "run")


def save_classifier(directory: Path, num_labels: int = 1, seed: int = 0) -> None:
    """Save a random classifier of sequences, with the tokenizer of the tiny models."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=num_labels, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_a_reward_model_scores_prompt_and_completion(llama, place, isolation):
    save_classifier(place / "judge")
    options = {"reward_isolation": isolation, "reward_workers": "auto", "log_completions": True, "max_steps": 1}
    train(llama, reward_funcs=["judge"], **options)
    [file] = (place / "run" / "completions").iterdir()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained("judge")
    model = transformers.AutoModelForSequenceClassification.from_pretrained("judge", pad_token_id=0)
    for record in records:
        inputs = tokenizer(record["prompt"] + record["completion"], return_tensors="pt", add_special_tokens=False)
        assert record["rewards"][0] == pytest.approx(model(**inputs).logits.item(), abs=1e-4)
    train(llama, reward_funcs=["judge"], **{**options, "max_steps": 2}, resume=True)
    save_classifier(place / "judge", seed=1)
    with pytest.raises(UserError, match="the source of the reward functions"):
        train(llama, reward_funcs=["judge"], **{**options, "max_steps": 3}, resume=True)


def variety(texts):
    return [len(set(text)) for text in texts]


def beats(completions, opponents, **kwargs):
    """Return the share of opponents with a lower reward, and note whom a completion met."""
    own = variety(completions)
    kwargs["log_extra"]("met", [others or [] for others in opponents])
    return [
        sum((mine > theirs) + 0.5 * (mine == theirs) for theirs in variety(others)) / len(others) if others else None
        for mine, others in zip(own, opponents, strict=True)
    ]


@pytest.mark.parametrize("opponents", ["theta", 2])
@pytest.mark.parametrize("members_per_batch", [1, 2])
def test_members_are_compared_with_theta_or_with_each_other(llama, place, opponents, members_per_batch):
    options = dict(
        reward_funcs=beats, opponents=opponents, log_completions=True, step_control="drift", noise="lowrank",
        members_per_batch=members_per_batch, max_steps=3,
    )  # fmt: skip
    train(llama, **options)
    for line in (line for line in journal(place / "run") if line["kind"] == "step"):
        assert all(0 <= value <= 1 for value in line["fitness"])
        if opponents == 2:  # of N members and theta each meets two others
            assert sum(line["fitness"]) <= 4
    file = place / "run" / "completions" / "step_00001.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    said = {(record["member"], record["row"]): record["completion"] for record in records}
    for record in records:
        model, row = 4 if record["member"] is None else record["member"], record["row"]
        others = [None] if opponents == "theta" else [(model + 1) % 5, (model + 2) % 5]
        assert record["met"] == [said[None if other in (None, 4) else other, row] for other in others]
        mine, theirs = variety([record["completion"]])[0], variety(record["met"])
        wanted = sum((mine > each) + 0.5 * (mine == each) for each in theirs) / len(theirs)
        assert record["rewards"] == [pytest.approx(wanted)]
    whole = steps(place / "run")
    train(llama, output_dir="parts", **{**options, "max_steps": 1})
    train(llama, output_dir="parts", resume=True, **options)
    assert steps(place / "parts") == whole


def test_what_is_no_reward_model(llama, place):
    save_classifier(place / "three", num_labels=3)
    save_classifier(place / "empty")
    (place / "empty" / "model.safetensors").unlink()
    (place / "bare").mkdir()
    wrong = {
        "three": "'three' has 3 labels; a reward needs one", str(llama): "is no sequence classifier: its config.json",
        "empty": "has no weights in", "bare": "has no readable config.json",
        "gone": "nor the directory of a reward model",
        "gone.py": "is neither package.module:function nor path/file.py:function",
    }  # fmt: skip
    for spec, words in wrong.items():
        with pytest.raises(UserError, match=words):
            train(llama, reward_funcs=[spec])
    assert not (place / "run").exists()


def test_several_rewards_with_weights(llama, place):
    _, trainer = train(
        llama,
        reward_funcs=[vowels, length, lambda completions, **_: [0.5] * len(completions)],
        reward_weights=[1, 0.5, 2],
    )
    held_out = trainer.evaluate(trainer.train_rows)
    parts = [held_out[f"eval_rewards/{name}/mean"] for name in ("vowels", "length", "<lambda>")]
    assert held_out["eval_reward"] == pytest.approx(parts[0] + 0.5 * parts[1] + 2 * parts[2]) and parts[2] == 0.5
    record = metrics(place / "run")[0]
    parts = [record["rewards/vowels/mean"], record["rewards/length/mean"], record["rewards/<lambda>/mean"]]
    assert record["reward"] == pytest.approx(parts[0] + 0.5 * parts[1] + 2 * parts[2])
    assert journal(place / "run")[0]["reward_weights"] == [1.0, 0.5, 2.0]
    for name in (
        "reward_std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "num_tokens",
        "learning_rate",
        "es/fitness_best",
        "es/fitness_mean",
        "es/fitness_std",
        "es/reliability",
        "es/sigma",
        "es/update_norm",
        "es/update_ratio",
        "es/reward_errors",
    ):
        assert isinstance(record[name], (int, float)), name
    timed = metrics(place / "run", times=True)[0]
    assert all(timed[name] >= 0 for name in ("step_time", "es/perturb_s", "es/generate_s", "es/score_s", "es/update_s"))


def test_what_a_reward_is_called_with(llama, place):
    seen = place / "seen.jsonl"

    def reward(prompts, completions, completion_ids, bonus, trainer_state, log_extra, log_metric, **others):
        import json

        log_metric("mean_bonus", sum(bonus) / len(bonus))
        line = {
            "prompts": prompts,
            "completions": completions,
            "ids": completion_ids,
            "bonus": bonus,
            "others": sorted(others),
            "step": trainer_state.global_step,
            "max_steps": trainer_state.max_steps,
        }
        with open(seen, "a") as file:
            file.write(json.dumps(line) + "\n")
        return [None if value > 0.4 else value for value in bonus]

    train(llama, reward_funcs=reward)
    calls = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(calls) == 2 * 4 + 1  # one per member and step, and theta in the first
    for call in calls:
        assert len(call["prompts"]) == len(call["completions"]) == len(call["ids"]) == len(call["bonus"]) == 3
        assert all(isinstance(text, str) for text in call["prompts"] + call["completions"])
        assert not any(
            text.startswith(prompt) for prompt, text in zip(call["prompts"], call["completions"], strict=True)
        )
        assert call["others"] == [] and call["max_steps"] == 2
    assert [call["step"] for call in calls] == [0] * 5 + [1] * 4
    assert "mean_bonus" in metrics(place / "run")[0]


def test_a_datasets_dataset_and_held_out_rows(llama, place):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    trainer = ESTrainer(
        model=str(llama),
        reward_funcs=vowels,
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        args=ESConfig(output_dir="run", eval_steps=1, **SMALL),
    )
    trainer.train()
    assert [record["step"] for record in metrics(place / "run") if "eval_reward" in record] == [0, 1, 2]
    with pytest.raises(UserError, match="eval_dataset"):
        ESTrainer(model=str(llama), reward_funcs=vowels, train_dataset=rows, args=ESConfig(eval_steps=1, **SMALL))


def splits_of(kind):
    """Return the rows as a dict of splits whose values are of a kind of dataset."""
    import datasets
    import pandas

    rows = {"train": ROWS, "validation": ROWS[:2]}
    if kind == "lists":
        return rows
    if kind == "frames":
        return {name: pandas.DataFrame(listed) for name, listed in rows.items()}
    whole = datasets.DatasetDict({name: datasets.Dataset.from_list(listed) for name, listed in rows.items()})
    if kind == "DatasetDict":
        return whole
    return datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in whole.items()})


def test_a_dict_of_datasets_gives_both_splits(llama, place, capsys):
    def run(output_dir, train_dataset, eval_dataset=None, **changes):
        args = ESConfig(output_dir=output_dir, **{**SMALL, "max_steps": 1, "eval_steps": 1, **changes})
        trainer = ESTrainer(
            model=str(llama), reward_funcs=vowels, train_dataset=train_dataset, eval_dataset=eval_dataset, args=args
        )  # fmt: skip
        trainer.train()
        return tree(place / output_dir, ("es_config", "README"))

    plain = run("plain", ROWS, ROWS[:2])
    for kind in ("lists", "frames", "DatasetDict", "IterableDatasetDict"):
        capsys.readouterr()
        assert run(kind, splits_of(kind)) == plain, kind
        said = capsys.readouterr().err
        assert "the held-out rows are the split validation" in said
        assert ("the train rows are the 6 rows of a IterableDataset, read to its end" in said) == ("Iter" in kind)
    named = {"learn": ROWS, "test": ROWS[:2]}
    renamed = run("renamed", named, dataset_train_split="learn")
    assert renamed.pop("journal.jsonl") != plain["journal.jsonl"]  # its header has the name of the split
    assert renamed == {name: value for name, value in plain.items() if name != "journal.jsonl"}
    for source, changes, words in (
        (named, {}, r"no split 'train' \(it has learn, test\): set dataset_train_split"),
        ({"train": ROWS}, {}, r"no split 'test' or 'validation' \(it has train\): set dataset_test_split"),
        ({"train": ROWS, "test": ROWS}, {"dataset_test_split": "train"}, "both trained on and held out"),
        ({"train": ROWS, "test": ROWS}, {"load_best_model_at_end": True}, "the split 'test' is for the final"),
        ({"train": {"a": ROWS}, "test": ROWS}, {}, "dict holds several datasets"),
        (ROWS, {"dataset_train_split": "learn"}, "dataset_train_split needs dataset_name, or a dict of datasets"),
    ):
        with pytest.raises(UserError, match=words):
            run("refused", source, **changes)
    assert not (place / "refused").exists()


def test_rewards_get_every_column_of_a_layout(llama, place, capsys):
    """Conversations of text parts, whose last answer is the reference, and a column with a second name."""
    import shutil

    shutil.copytree(llama, place / "chat")
    (place / "chat" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    seen = place / "seen.jsonl"

    def reward(prompts, completions, answer, messages, hint, note, **others):
        import json

        with open(seen, "a") as file:
            file.write(json.dumps([prompts, completions, answer, messages, hint, note, sorted(others)]) + "\n")
        return [len(completion[0]["content"]) for completion in completions]

    asked = [{"role": "user", "content": [{"type": "text", "text": "Count"}, {"type": "text", "text": "to 3."}]}]
    row = {"messages": [*asked, {"role": "assistant", "content": "1 2 3"}], "note": None, "completions": ["theirs"]}
    rows = [row] * 3
    trainer = ESTrainer(
        model=str(place / "chat"), reward_funcs=reward, train_dataset=rows,
        args=ESConfig(output_dir="run", column_mapping={"hint": "note"}, **{**SMALL, "max_steps": 1}),
    )  # fmt: skip
    assert "reward functions do not get the dataset's completions" in capsys.readouterr().err
    assert [prompt.text for prompt in trainer.prepare()] == ["<user>Count to 3."] * 3
    trainer.train()
    for line in seen.read_text().splitlines():
        prompts, completions, answer, messages, hint, note, others = json.loads(line)
        assert prompts == [asked] * 3 and answer == ["1 2 3"] * 3 and messages == [row["messages"] for row in rows]
        assert [completion[0]["role"] for completion in completions] == ["assistant"] * 3
        assert hint == note == [None] * 3
        assert others == ["completion_ids", "log_extra", "log_metric", "trainer_state"]
    hint = "--apply_chat_template true makes each a user message"
    assert hint not in capsys.readouterr().err  # messages go through the template
    for template, is_said in (("auto", True), ("true", False), ("false", False)):
        options = {**SMALL, "max_steps": 0, "apply_chat_template": template}
        ESTrainer(str(place / "chat"), vowels, ESConfig(output_dir=template, **options), ROWS).train()
        assert (hint in capsys.readouterr().err) == is_said


def test_a_model_in_memory(llama, place, run_model):
    """Its weights at the start go into the run, so that the run can be resumed, replayed and evaluated without it."""
    given = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)

    def trainer(max_steps, **changes):
        model = transformers.AutoModelForCausalLM.from_pretrained(llama)
        args = ESConfig(**{**SMALL, "output_dir": "run", "max_steps": max_steps, **changes})
        return ESTrainer(model=model, processing_class=tokenizer, reward_funcs=vowels, args=args, train_dataset=ROWS)

    trainer(2).train()
    trainer(3, resume=True).train()
    config = json.loads((place / "run" / "es_config.json").read_text())
    stored = transformers.AutoModelForCausalLM.from_pretrained(config["model"])
    assert all(torch.equal(parameter, given.get_parameter(name)) for name, parameter in stored.named_parameters())
    train(llama, "other", max_steps=3)
    assert weights(place / "run") == weights(place / "other")
    done = run_model("replay", "--run", "run", "--output_dir", "out")
    assert done.code == 0, done
    assert weights(place / "out") == weights(place / "run")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for model in (config["model"], "run"):
        done = run_model(
            "evaluate",
            "--model",
            model,
            "--dataset_name",
            "rows.jsonl",
            "--reward_funcs",
            "rewards.py:vowels",
            "--json",
            "--max_completion_length",
            10,
        )
        assert done.code == 0 and json.loads(done.out)["n"] == 6, done


def best_first(records):
    """Return the options by which a run's last step is not its best."""
    values = [record["eval_reward"] for record in records]
    greater = max(values[:-1]) > values[-1]
    best = max(values) if greater else min(values)
    assert values.index(best) < len(values) - 1
    return values.index(best), best, {"metric_for_best_model": "reward", "greater_is_better": greater}


@pytest.mark.parametrize("noise", ["full", "lowrank"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_best_step_is_in_the_users_model_and_on_disk(llama, place, noise, in_memory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)

    def trained(output_dir, **changes):
        model = transformers.AutoModelForCausalLM.from_pretrained(llama) if in_memory else str(llama)
        given = {**SMALL, "max_steps": 4, "learning_rate": 0.1, "eval_steps": 1, "noise": noise, **changes}
        trainer = ESTrainer(model=model, processing_class=tokenizer, reward_funcs=vowels, train_dataset=ROWS,
                            eval_dataset=ROWS[:3], args=ESConfig(output_dir=output_dir, **given))  # fmt: skip
        trainer.train()
        return trainer, model

    trained("last", save_steps=1)
    step, value, options = best_first([record for record in metrics(place / "last") if "eval_reward" in record])
    trainer, model = trained("run", load_best_model_at_end=True, **options)
    wanted = place / "last" / f"checkpoint-{step}" if step else llama
    assert weights(place / "run") != weights(place / "last")
    saved = transformers.AutoModelForCausalLM.from_pretrained(place / "run")
    expected = transformers.AutoModelForCausalLM.from_pretrained(wanted)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name))
        assert not in_memory or torch.equal(parameter, model.get_parameter(name))
    trainer.save_model(place / "copy")
    assert weights(place / "copy") == weights(place / "run")
    assert (place / "run" / "base").exists() == in_memory  # the files of a base on disk are read again
    state = transformers.TrainerState.load_from_json(place / "run" / "trainer_state.json")
    assert (state.best_global_step, state.best_metric, state.global_step) == (step, value, 4)
    assert json.loads((place / "run" / "es_state.json").read_text())["step"] == step


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("noise", ["full", "lowrank"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_users_model_and_process_stay_as_they_were(llama, place, monkeypatch, noise, fails, three_threads):
    """Training moves the weights of a model in memory; nothing else of it changes, and no setting of the process."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, attention_dropout=0.25).train()
    model.model.layers[0].eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    args = ESConfig(output_dir="run", noise=noise, **SMALL)
    trainer = ESTrainer(model=model, processing_class=tokenizer, reward_funcs=vowels, args=args, train_dataset=ROWS)
    step, seen = AttentionCaller.step, []

    def observed(self, tokens):
        layer = model.model.layers[1].mlp.up_proj
        seen.append(
            (model.training, torch.get_num_threads(), model.config._attn_implementation, "forward" in vars(layer))
        )
        if fails and len(seen) > 20:
            raise FloatingPointError
        return step(self, tokens)

    monkeypatch.setattr(AttentionCaller, "step", observed)
    of_model, of_config, of_process = attributes(model), config_states(model), process_state()
    text = tokenizer.backend_tokenizer.to_str()
    if fails:
        with pytest.raises(FloatingPointError):
            trainer.train()
    else:
        trainer.train()
    assert seen[-1] == (False, 1, "estune_sdpa", True)
    after = attributes(model)
    assert after.keys() == of_model.keys()
    assert [name for name in after if after[name] is not of_model[name]] == []
    assert config_states(model) == of_config
    assert tokenizer.backend_tokenizer.to_str() == text
    now = process_state()
    assert {name: value for name, value in now.items() if value != of_process[name]} == {}
    wanted = trainer.engine.theta.arrays
    assert all(np.array_equal(parameter.detach(), wanted[name]) for name, parameter in model.named_parameters())


def test_resume_from_python(llama, place):
    train(llama, "whole", max_steps=4)
    train(llama, max_steps=2)
    train(llama, max_steps=4, resume=True)
    assert weights(place / "run") == weights(place / "whole")
    before = hashlib.blake2b(repr(sorted(tree(place / "run").items())).encode()).hexdigest()
    train(llama, max_steps=4, resume=True)
    assert hashlib.blake2b(repr(sorted(tree(place / "run").items())).encode()).hexdigest() == before
    with pytest.raises(UserError, match="reward_funcs"):
        train(llama, max_steps=5, resume=True, reward_funcs=length)


def without_shared_forward(facts):
    return dataclasses.replace(facts, header=facts.header | {"shared_forward": False})


def test_what_auto_became_is_journalled_and_another_engine_is_named(llama, place, capsys, monkeypatch):
    train(llama, noise="lowrank")
    header = journal(place / "run")[0]
    assert (header["config"]["dtype"], header["config"]["members_per_batch"]) == ("float32", 4)
    capsys.readouterr()
    train(llama, noise="lowrank", max_steps=3, resume=True)
    assert "continues with" not in capsys.readouterr().err
    facts = HFEngine.facts.fget
    monkeypatch.setattr(HFEngine, "facts", property(lambda self: without_shared_forward(facts(self))))
    train(llama, noise="lowrank", max_steps=4, resume=True)
    assert "the run began with shared_forward True and continues with False" in capsys.readouterr().err


def test_members_per_batch_is_the_members_of_a_forward_pass(llama, monkeypatch):
    shapes = []
    load, step = HFEngine.load, AttentionCaller.step

    def loaded(*args, **kwargs):  # what is tried at load is not counted
        engine = load(*args, **kwargs)
        shapes.clear()
        return engine

    monkeypatch.setattr(HFEngine, "load", loaded)
    monkeypatch.setattr(AttentionCaller, "step", lambda self, tokens: shapes.append(len(tokens)) or step(self, tokens))
    for members in (1, 2, 4):
        train(llama, f"run{members}", noise="lowrank", members_per_batch=members, max_steps=1)
        assert max(shapes) == members * SMALL["batch_size"]


def test_save_model_is_theta(llama, place):
    _, trainer = train(llama)
    trainer.save_model(place / "saved")
    assert weights(place / "saved") == weights(place / "run")


def test_theta_survives_any_number_of_evaluations(llama):
    """Nothing is restored by subtraction (invariant 1)."""
    trainer = ESTrainer(model=str(llama), reward_funcs=vowels, args=ESConfig(**SMALL), train_dataset=ROWS)
    prompts = trainer.prepare()
    host_theta = trainer.engine.theta
    before = {name: array.copy() for name, array in host_theta.arrays.items()}
    from estune.es.population import members_for_step
    from estune.es.types import Noise, Perturbation
    from estune.train.step import sampling_of

    first = trainer.engine.generate(None, prompts, sampling_of(trainer.args, 0))
    for member in members_for_step(0, 0, 6, True):
        trainer.engine.generate(Perturbation(member, Noise(0.3)), prompts, sampling_of(trainer.args, 0))
    assert trainer.engine.generate(None, prompts, sampling_of(trainer.args, 0)) == first
    assert all(np.array_equal(before[name], array) for name, array in host_theta.arrays.items())


def test_rows_of_a_test_split_choose_no_step(llama, place):
    import datasets

    rows = datasets.Dataset.from_list(ROWS, split="test")
    args = ESConfig(output_dir="run", eval_steps=1, load_best_model_at_end=True, **SMALL)
    with pytest.raises(UserError, match="'test' is for the final measurement"):
        ESTrainer(model=str(llama), reward_funcs=vowels, train_dataset=ROWS, eval_dataset=rows, args=args)
    assert not (place / "run").exists()


def test_a_resume_cannot_decode_otherwise_where_evaluations_choose(llama, place):
    given = {**SMALL, "temperature": 1.0, "eval_steps": 1, "load_best_model_at_end": True, "output_dir": "run"}

    def trainer(**changes):
        args = ESConfig(**{**given, **changes})
        return ESTrainer(model=str(llama), reward_funcs=vowels, train_dataset=ROWS, eval_dataset=ROWS[:2], args=args)

    trainer(max_steps=1).train()
    with pytest.raises(UserError, match="cannot change eval_greedy from False to True, because evaluations choose"):
        trainer(resume=True, eval_greedy=True).train()
    trainer(resume=True).train()
    assert len(steps(place / "run")) == 2


def test_user_errors_come_before_anything_is_written(llama, place):
    for arguments, words in (
        (dict(reward_funcs=None), "reward_funcs"),
        (dict(reward_funcs=[]), "reward"),
        (dict(reward_funcs=3), "callable"),
        (dict(train_dataset=[]), "no rows"),
        (dict(train_dataset=[{"text": "a"}]), "prompt"),
        (dict(train_dataset=[{"prompt": "a"}]), "bonus"),
        (dict(train_dataset=["a"]), "dicts"),
    ):
        given = (
            dict(
                model=str(llama),
                reward_funcs=vowels,
                args=ESConfig(output_dir="run", **{**SMALL, "batch_size": 1}),
                train_dataset=ROWS,
            )
            | arguments
        )
        with pytest.raises(UserError, match=words):
            ESTrainer(**given).train()
    for values, words in (
        (dict(sgima=1), "sigma"),
        (dict(sigma=-1), "sigma"),
        (dict(population_size=1), "population_size"),
    ):
        with pytest.raises(UserError, match=words):
            ESConfig.from_mapping(values)
    assert not (place / "run").exists()


def test_the_default_run_name_says_what_runs(llama, place):
    names = set()
    for _ in range(2):
        args = ESConfig(**{**SMALL, "max_steps": 0})
        names.add(ESTrainer(model=str(llama), reward_funcs=vowels, args=args, train_dataset=ROWS).train())
    assert len(names) == 2
    assert all(path.parent == Path("runs") and "llama" in path.name for path in names)


def test_another_configuration_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="args must be an ESConfig, not dict"):
        ESTrainer(model="tiny", args={"max_steps": 1})
