"""ES's rivals: they are TRL's own trainers, on ES's prompts, samples and rewards, in a run directory like ES's."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from command_line import metrics, weights, write_rewards
from datasets import Dataset
from safetensors.numpy import load_file
from tiny_models import save_tiny

from estune import ESConfig
from estune.errors import UserError
from estune.model_paths import local_directory
from estune.tasks import get_task

trl = pytest.importorskip("trl", reason="the rivals' trainers")

from estune import inputs  # noqa: E402
from estune.baselines import BaselineTrainer, arguments, policy_gradient, rejection  # noqa: E402
from estune.baselines.ground import Ground  # noqa: E402

SMALL = {
    "model": "tiny",
    "task": "countdown",
    "max_steps": 3,
    "batch_size": 2,
    "num_generations": 4,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "num_threads": 1,
    "report_to": ["none"],
    "reward_isolation": "inline",
    "output_dir": "run",
}
TRL = {"generation": "trl"}


@pytest.fixture(autouse=True)
def somewhere(place, monkeypatch):
    monkeypatch.chdir(place)


def train(method, train_dataset=None, reward_funcs=None, **changes):
    """Train in this process; return the run directory."""
    args = ESConfig(**{**SMALL, "method": method, **changes})
    return BaselineTrainer(args=args, train_dataset=train_dataset, reward_funcs=reward_funcs).train()


@pytest.fixture
def trainers(monkeypatch):
    """The trainers of transformers that runs make, as they make them."""
    made = []
    drive = policy_gradient.drive

    def spied(ground, make):
        def kept(driver):
            made.append(make(driver))
            return made[-1]

        return drive(ground, kept)

    monkeypatch.setattr(policy_gradient, "drive", spied)
    monkeypatch.setattr(rejection, "drive", spied)
    return made


# --- a rival is TRL's -------------------------------------------------------------------------------------------------

EXACT = [
    ("grpo", {}, {"loss_type": "grpo", "scale_rewards": "group"}),
    ("grpo", {"loss_type": "dapo"}, {}),  # what TRL does where it is told nothing
    ("grpo", {"beta": 0.1, "num_iterations": 2}, {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2}),
    ("dr_grpo", {}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    ("rloo", {}, {}),
]


@pytest.mark.parametrize(("method", "kwargs", "of_trl"), EXACT, ids=["grpo", "dapo", "kl", "dr_grpo", "rloo"])
def test_a_run_is_trls_own_bit_for_bit(method, kwargs, of_trl, place):
    trainer_class, config_class = (
        (trl.RLOOTrainer, trl.RLOOConfig) if method == "rloo" else (trl.GRPOTrainer, trl.GRPOConfig)
    )
    task, rewards = get_task("countdown"), []

    def reward(**given):
        rewards.append(task.reward(**given))
        return rewards[-1]

    trainer = trainer_class(
        model=transformers.AutoModelForCausalLM.from_pretrained(local_directory("tiny"), dtype=torch.float32),
        reward_funcs=reward,
        processing_class=transformers.AutoTokenizer.from_pretrained(local_directory("tiny")),
        train_dataset=Dataset.from_list(task.load("train")),
        args=config_class(
            output_dir="trl", max_steps=3, num_generations=4, max_completion_length=16, learning_rate=1e-3, seed=7,
            per_device_train_batch_size=8, lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False,
            use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, **of_trl,
        ),
    )  # fmt: skip
    trainer.train()
    run = train(method, seed=7, method_kwargs={**TRL, **kwargs})
    found = load_file(run / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), found[name]), name
    logged = [record["reward"] for record in metrics(run) if "reward" in record]  # not where samples serve twice
    assert logged == [pytest.approx(np.mean(batch), abs=1e-12) for batch in rewards]
    base = load_file(Path(local_directory("tiny")) / "model.safetensors")
    assert any((base[name] != found[name]).any() for name in found)


# --- arguments --------------------------------------------------------------------------------------------------------

GIVEN = {"lr_scheduler_type": "linear", "warmup_steps": 1, "weight_decay": 0.01, "seed": 3, "top_p": 0.9, "top_k": 20,
         "temperature": 0.8, "max_steps": 2, "reward_funcs": ["rewards.py:vowels"]}  # fmt: skip
OF_ALL = {
    "learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 1, "weight_decay": 0.01, "seed": 3,
    "max_steps": 2, "bf16": False, "fp16": False, "gradient_checkpointing": False, "use_cpu": True,
    "logging_nan_inf_filter": False, "report_to": [],
}  # fmt: skip
OF_SAMPLING = {"num_generations": 4, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "max_completion_length": 16,
               "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_iterations": 1}  # fmt: skip
RESOLVED = {
    "grpo": {**OF_SAMPLING, "loss_type": "grpo", "scale_rewards": "group", "beta": 0.0, "epsilon": 0.3},
    "dr_grpo": {**OF_SAMPLING, "loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "epsilon": 0.3},
    "rloo": {**OF_SAMPLING, "beta": 0.05, "normalize_advantages": False, "epsilon": 0.3},
    "sft_rejection": {"per_device_train_batch_size": 2, "max_length": None, "adam_beta2": 0.98},
}


@pytest.mark.parametrize("method", RESOLVED)
def test_what_a_method_was_told_is_kept_and_true(method, trainers, place):
    write_rewards(place)
    own = {"adam_beta2": 0.98, "min_reward": 0.0} if method == "sft_rejection" else {"epsilon": 0.3}
    run = train(method, **GIVEN, method_kwargs=own)
    kept = json.loads((run / "method.json").read_text())
    assert kept["method"] == method and kept["trl"] == trl.__version__
    assert kept["trainer"] == {"rloo": "trl.RLOOTrainer", "sft_rejection": "trl.SFTTrainer"}.get(
        method, "trl.GRPOTrainer"
    )
    [trainer] = trainers
    assert type(trainer).__mro__[method != "sft_rejection"].__module__.startswith("trl.")
    for name, value in {**OF_ALL, **RESOLVED[method]}.items():
        assert getattr(trainer.args, name) == value, name
        assert kept["arguments"][name] == value, name
    for name in ("beta", "loss_type", "scale_rewards", "num_iterations", "num_generations"):
        if method in ("grpo", "dr_grpo"):
            assert getattr(trainer, name) == RESOLVED[method][name], name
    assert next(trainer.model.parameters()).dtype == torch.float32
    assert kept["base"]["model"] == "tiny" and kept["data"]["rows"] == 200
    assert not any(str(place) in str(value) for value in kept["arguments"].values())


def test_the_defaults_of_methods_are_trls():
    for method, config_class in (("grpo", trl.GRPOConfig), ("rloo", trl.RLOOConfig), ("sft_rejection", trl.SFTConfig)):
        args = ESConfig(method=method, task="countdown")
        theirs = {spec.name: spec.default for spec in dataclasses.fields(config_class)}
        assert args.effective_learning_rate == theirs["learning_rate"]
        if method != "sft_rejection":
            assert (args.temperature, args.top_p, args.top_k) == (1.0, theirs["top_p"], theirs["top_k"])
            assert (theirs["temperature"], args.num_generations) == (1.0, 8)  # TRL's RLOO has 2
    resolved = inputs.resolve_config(ESConfig(method="grpo", task="countdown"), 200)
    assert (resolved.batch_size, resolved.learning_rate) == (8, 1e-6)


def test_a_constant_rate_rises_where_warmup_is_asked_for(trainers):
    train("grpo", warmup_steps=3)
    assert trainers[0].args.lr_scheduler_type == "constant_with_warmup"
    assert [record["learning_rate"] for record in metrics(Path("run"))] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3])


REFUSED = [
    ("grpo", {"method_kwargs": {"epsilom": 0.1}}, "epsilon"),
    ("grpo", {"method_kwargs": {"normalize_advantages": True}}, "no argument 'normalize_advantages'"),
    ("grpo", {"method_kwargs": {"learning_rate": 0.1}}, "cannot hold learning_rate"),
    ("grpo", {"method_kwargs": {"num_generations": 2}}, "cannot hold num_generations"),
    ("grpo", {"method_kwargs": {"gradient_accumulation_steps": 2}}, "cannot hold gradient_accumulation_steps"),
    ("grpo", {"method_kwargs": {"vllm_mode": "server"}}, "cannot hold vllm_mode"),
    ("grpo", {"method_kwargs": {"min_p": 0.1}}, "min_p, which has no effect without generation trl"),
    ("grpo", {"method_kwargs": {"generation": "vllm"}}, "estune or trl"),
    ("grpo", {"method_kwargs": TRL, "stop_strings": ["."]}, "stop_strings have no effect"),
    ("grpo", {"method_kwargs": {"mask_truncated_completions": True}, "stop_strings": ["."]}, "stop string"),
    ("grpo", {"method_kwargs": {"loss_type": "drgrpo"}}, "dr_grpo"),
    ("grpo", {"method_kwargs": {"scale_rewards": "batches"}}, "did you mean 'batch'"),
    ("grpo", {"method_kwargs": {"importance_sampling_level": "word"}}, "token, sequence"),
    ("grpo", {"method_kwargs": {"per_device_train_batch_size": 3}}, "does not divide the 8 rows"),
    ("grpo", {"method_kwargs": {"epsilon": "wide"}}, "epsilon of method grpo cannot be 'wide'"),
    ("grpo", {"method_kwargs": {"steps_per_generation": 0.5}}, "cannot be 0.5"),
    ("grpo", {"num_generations": 1}, "num_generations must be 2 or more"),
    ("grpo", {"temperature": 0, "num_generations": 1}, "temperature must be above 0"),
    ("grpo", {"dtype": "bfloat16"}, "float32"),
    ("grpo", {"console": "panel"}, "panel"),
    ("grpo", {"engine": "toy", "task": "quadratic"}, "engine hf"),
    ("grpo", {"sigma": 0.1}, "no use for sigma"),
    ("grpo", {"seed": 1 << 32}, "seeds below 2^32"),
    ("grpo", {"log_completions": True}, "log_completions"),
    ("grpo", {"max_time_s": 1, "lr_scheduler_type": "linear"}, "constant schedules"),
    ("sft_rejection", {"method_kwargs": {"min_reward": "much"}}, "min_reward must be a number"),
    ("sft_rejection", {"method_kwargs": {"packing": True}}, "cannot hold packing"),
    ("sft_rejection", {"task": None, "dataset_name": "rows.jsonl", "reward_funcs": ["rewards.py:vowels"]},
     "min_reward in method_kwargs"),
    ("random_search", {"method_kwargs": {"beta": 1}, "learning_rate": None}, "no use for method_kwargs"),
    ("random_search", {}, "no use for learning_rate"),
    ("es", {"method_kwargs": {"beta": 1}}, "no use for method_kwargs"),
    ("gpro", {}, "did you mean 'grpo'"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "changes", "words"), REFUSED, ids=[f"{m}-{words}" for m, _, words in REFUSED])
def test_what_cannot_work_is_refused_before_anything_is_written(method, changes, words, place):
    write_rewards(place)
    (place / "rows.jsonl").write_text('{"prompt": "a"}\n' * 4)
    with pytest.raises(UserError, match=re.escape(words)) as told:
        train(method, **changes)
    assert "\n" not in str(told.value)
    assert not (place / "run").exists()


def test_a_seed_of_64_bits_is_one_like_any_other_to_random_search():
    assert ESConfig(method="random_search", task="countdown", seed=1 << 40).seed == 1 << 40
    assert trl_seed_limit() == 1 << 32


def trl_seed_limit():
    transformers.set_seed((1 << 32) - 1)
    with pytest.raises(ValueError, match="Seed must be between"):
        transformers.set_seed(1 << 32)
    return 1 << 32


def test_trl_knows_the_loss_types():
    source = Path(trl.trainer.grpo_trainer.__file__).read_text()
    told = set(re.findall(r'self\.loss_type == "(\w+)"', source))
    for group in re.findall(r"self\.loss_type in \[(.*?)\]", source):
        told |= set(re.findall(r'"(\w+)"', group))
    assert told == set(arguments.CHOICES["loss_type"])


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch):
    """What runs had scored: (rows, completions (B, G), rewards (B, G)) of each batch."""
    seen = []
    score = Ground.score

    def spied(self, row_ids, completions):
        seen.append((list(row_ids), completions, score(self, row_ids, completions)))
        return seen[-1][2]

    monkeypatch.setattr(Ground, "score", spied)
    return seen


@pytest.mark.parametrize("method", ["grpo", "rloo", "sft_rejection"])
def test_samples_are_what_es_engine_gives_for_theta(method, batches, place):
    """Of the weights as they are in that step, with that step's numbers."""
    changes = {"temperature": 0.7, "top_k": 5, "max_steps": 2, "save_steps": 1, "seed": 5}
    if method == "sft_rejection":
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in get_task("countdown").load("train")[:6]))
        changes |= {"dataset_name": "rows.jsonl", "method_kwargs": {"min_reward": 0.0}, "prompts_per_batch": 4}
    run = train(method, **changes)
    indices = (0, 4) if method == "sft_rejection" else (0, 1)
    assert len(batches) == 2
    for index, (rows, completions, _) in zip(indices, batches, strict=True):
        model = "tiny" if method == "sft_rejection" or index == 0 else run / f"checkpoint-{index}"
        args = ESConfig(**{**SMALL, "method": method, **changes, "model": str(model), "save_steps": 0})
        trainer = BaselineTrainer(args=args)
        prompts = [trainer.prepare()[row] for row in rows]
        wanted = trainer.engine.generate(None, prompts, inputs.sampling(trainer.args, index))
        assert [[c.token_ids for c in row] for row in completions] == [[c.token_ids for c in row] for row in wanted]
        assert [[c.finished for c in row] for row in completions] == [[c.finished for c in row] for row in wanted]
        assert len({c.token_ids for c in wanted[0]}) > 1  # samples of a prompt differ


@pytest.mark.parametrize("generation", ["estune", "trl"])
def test_samples_have_the_distribution_that_was_asked_for(generation, batches):
    """The first token's frequencies are the model's probabilities at that temperature, among the k most likely."""
    count = 400
    row = get_task("countdown").load("train")[:1]
    train("grpo", row, max_steps=1, batch_size=1, num_generations=count, max_completion_length=1, temperature=1.7, top_k=4,
          method_kwargs={"generation": generation})  # fmt: skip
    [(_, [answers], _)] = batches
    first = np.array([completion.token_ids[0] for completion in answers])
    model = transformers.AutoModelForCausalLM.from_pretrained(local_directory("tiny"), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_directory("tiny"))
    with torch.no_grad():
        logits = model(**tokenizer(row[0]["prompt"], return_tensors="pt")).logits[0, -1] / 1.7
    top = logits.topk(4)
    wanted = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
    assert set(first.tolist()) <= wanted.keys()
    for token, probability in wanted.items():
        assert (first == token).mean() == pytest.approx(probability, abs=4 * np.sqrt(probability / count) + 1e-3)


def test_rows_with_the_same_prompt_are_sampled_apart(batches):
    prompt = get_task("countdown").load("train")[0]
    train("grpo", [prompt, dict(prompt)], max_steps=1)
    [(rows, (one, other), _)] = batches
    assert sorted(rows) == [0, 1] and [c.token_ids for c in one] != [c.token_ids for c in other]


def test_prompt_options_are_those_of_es(batches, place):
    """Rewards see the prefix and the completion; a stop string ends a completion, which then is not cut off."""
    seen = []

    def reward(prompts, completions, completion_ids, **_):
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        return [float(len(text)) for text in completions]

    rows = get_task("countdown").load("train")[:2]
    train("grpo", rows, reward, response_prefix="<think>", stop_strings=["=", "1", "2"], max_steps=1,
          max_completion_length=40)  # fmt: skip
    assert len(seen) == 8
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_directory("tiny"))
    for prompt, text, ids in seen:
        assert prompt in {row["prompt"] for row in rows} and text.startswith("<think>")
        assert tokenizer.decode(ids, skip_special_tokens=True) in text
        assert not re.search("[=12].", text.removeprefix("<think>"), flags=re.DOTALL)
    [record] = metrics(place / "run")
    ended = [text for _, text, _ in seen if text[-1] in "=12"]
    assert ended and record["completions/clipped_ratio"] == 1 - np.mean([c.finished for row in batches[0][1] for c in row])
    assert record["completions/clipped_ratio"] < 1
    assert record["completions/mean_length"] == np.mean([len(ids) for _, _, ids in seen])


def test_conversations_reach_rewards_as_in_trl(place):
    """As messages; the chat template is applied once, and the tokens begin with one BOS."""
    save_tiny("llama", place / "model")
    (place / "model" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    seen = []

    def reward(prompts, completions, **_):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": f"count to {i}"}]} for i in range(3)]
    for generation in ("estune", "trl"):
        seen.clear()
        run = train("grpo", rows, reward, model="model", task=None, max_steps=1, output_dir=generation,
                    method_kwargs={"generation": generation})  # fmt: skip
        for prompt, completion in seen:
            assert {"prompt": prompt} in rows
            [message] = completion
            assert message["role"] == "assistant" and isinstance(message["content"], str)
        [record] = metrics(run)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
        texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt, _ in seen]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        assert all(row.count(tokenizer.bos_token_id) == 1 for row in ids)
        assert record["num_tokens"] == sum(map(len, ids)) + 8 * record["completions/mean_length"]


# --- rewards ----------------------------------------------------------------------------------------------------------


def last_step_rewards(batches):
    return batches[-1][2]  # (B, G)


@pytest.mark.parametrize("kind", ["raising", "hanging", "nan", "dying"])
def test_a_reward_that_fails_does_not_pay(kind, batches, place):
    """It gets the lowest reward of its prompt's group, is counted, and the run goes on."""
    (place / "bad.py").write_text(BAD)
    rows = get_task("countdown").load("train")[:2]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"reward_isolation": "process", "reward_timeout_s": 1.5 if kind == "hanging" else 60, "reward_workers": 1}
    run = train("grpo", dataset_name="rows.jsonl", reward_funcs=[f"bad.py:{kind}"], max_steps=1, max_completion_length=24,
                **changes)  # fmt: skip
    [(_, completions, found)] = batches
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_directory("tiny"))
    failures = 0
    for answers, rewards in zip(completions, found, strict=True):
        texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in answers]
        bad = [len(text) % 2 == 0 for text in texts]
        given = [float(len(text)) for text, is_bad in zip(texts, bad, strict=True) if not is_bad]
        failures += sum(bad)
        wanted = [(min(given) if given else np.nan) if b else float(len(t)) for t, b in zip(texts, bad, strict=True)]
        np.testing.assert_array_equal(rewards, wanted)
    assert 0 < failures < 8
    assert metrics(run)[0]["reward_errors"] == failures


BAD = """
import os
import time


def _each(completions, what):
    return [what() if len(text) % 2 == 0 else float(len(text)) for text in completions]


def _raise():
    raise ValueError("this one is too much for me")


def raising(completions, **_):
    return _each(completions, _raise)


def hanging(completions, **_):
    return _each(completions, lambda: time.sleep(1000))


def dying(completions, **_):
    return _each(completions, lambda: os.kill(os.getpid(), 9))


def nan(completions, **_):
    return _each(completions, lambda: float("nan"))
"""


def test_several_rewards_are_weighed_and_none_is_left_out(batches, place):
    def length(completions, **_):
        return [float(len(text)) for text in completions]

    def even(completions, **_):
        return [None if len(text) % 2 else 1.0 for text in completions]

    def never(completions, **_):
        return [None] * len(completions)

    run = train("rloo", get_task("countdown").load("train")[:4], [length, even], reward_weights=[0.5, 2.0], max_steps=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_directory("tiny"))
    [(_, completions, found)] = batches
    for answers, rewards in zip(completions, found, strict=True):
        for completion, reward in zip(answers, rewards, strict=True):
            size = len(tokenizer.decode(completion.token_ids, skip_special_tokens=True))
            # where one does not apply, the other's weight grows to the same total
            assert reward == pytest.approx(0.5 * size + 2.0 if size % 2 == 0 else 2.5 * size)
    record = metrics(run)[0]
    assert record["reward"] == pytest.approx(found.mean()) and record["rewards/even/mean"] == 1.0
    run = train("grpo", get_task("countdown").load("train")[:4], never, max_steps=1, output_dir="never")
    assert weights(run) == weights_of_base()  # no advantage, no gradient
    assert metrics(run)[0]["reward"] is None
    run = train("grpo", get_task("countdown").load("train")[:4], even, max_steps=1, output_dir="even")
    assert metrics(run)[0]["reward"] == 1.0


def weights_of_base():
    model = BaselineTrainer(args=ESConfig(**{**SMALL, "method": "grpo", "max_steps": 0, "output_dir": "base"})).train()
    return weights(model)
