"""ES's rivals: they are TRL's own trainers, on ES's prompts, samples and rewards, in a run directory like ES's."""

import dataclasses
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from command_line import Zygote, assert_same_tree, metrics, steps, tree, weights, write_rewards
from datasets import Dataset
from safetensors.numpy import load_file
from tiny_models import save_tiny

from estune import ESConfig, ESTrainer
from estune.cli import main
from estune.data import Batches
from estune.engines.base import Interrupted
from estune.errors import UserError
from estune.model_paths import local_directory
from estune.report.data import read_runs
from estune.session import plan_step
from estune.tasks import get_task

trl = pytest.importorskip("trl", reason="the rivals' trainers")

from estune import inputs  # noqa: E402
from estune.baselines import BaselineTrainer, arguments, policy_gradient, random_search, rejection  # noqa: E402
from estune.baselines.ground import Ground  # noqa: E402
from estune.compare.plan import evaluations_per_step  # noqa: E402

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


@pytest.mark.miniature
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
    found = tensors(run)
    for name, parameter in trainer.model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), found[name]), name
    logged = [record["reward"] for record in metrics(run) if "reward" in record]  # not where samples serve twice
    assert logged == [pytest.approx(np.mean(batch), abs=1e-12) for batch in rewards]
    base = tensors(local_directory("tiny"))
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
               "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_iterations": 2}  # fmt: skip
RESOLVED = {
    "grpo": {**OF_SAMPLING, "loss_type": "grpo", "scale_rewards": "group", "beta": 0.0, "epsilon": 0.3},
    "dr_grpo": {**OF_SAMPLING, "loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "epsilon": 0.3},
    "rloo": {**OF_SAMPLING, "beta": 0.05, "normalize_advantages": False, "epsilon": 0.3},
    "sft_rejection": {"per_device_train_batch_size": 2, "max_length": None, "adam_beta2": 0.98},
}


@pytest.mark.parametrize("method", RESOLVED)
def test_what_a_method_was_told_is_kept_and_true(method, trainers, place):
    write_rewards(place)
    own = (
        {"adam_beta2": 0.98, "min_reward": 0.0} if method == "sft_rejection" else {"epsilon": 0.3, "num_iterations": 2}
    )
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
    ("grpo", {"method_kwargs": {"epsilon": 0.3}}, "epsilon has no effect without num_iterations or steps"),
    ("rloo", {"method_kwargs": {"epsilon": 0.3, "num_iterations": 1}}, "epsilon has no effect"),
    ("grpo", {"method_kwargs": {"use_bias_correction_kl": True}}, "no effect without beta"),
    ("grpo", {"method_kwargs": {"sync_ref_model": True}}, "cannot hold sync_ref_model"),
    ("grpo", {"method_kwargs": {"label_smoothing_factor": 0.1}}, "cannot hold label_smoothing_factor"),
    ("dr_grpo", {"method_kwargs": {"loss_type": "grpo"}}, "loss_type is what makes dr_grpo"),
    ("dr_grpo", {"method_kwargs": {"beta": 0.1}}, "beta is what makes dr_grpo"),
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
    ("sft_rejection", {"method_kwargs": {"max_samples": 0}}, "max_samples must be a whole number from 1"),
    ("sft_rejection", {"method_kwargs": {"max_samples": 1.5}}, "max_samples must be a whole number from 1"),
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


@pytest.mark.parametrize(("rows", "size"), [(24, 12), (64, 16), (20, 10), (17, 1), (7, 7)])
def test_a_large_model_takes_any_batch_in_whole_parts(rows, size):
    """Of itself: what nobody asked for is no reason to refuse a batch."""
    args = ESConfig(method="sft_rejection", task="countdown", batch_size=rows, learning_rate=1e-3, device="cpu")
    config, _ = arguments.trl_config(args, "trainer", rows, 135_000_000)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (size, rows // size)
    asked = dataclasses.replace(args, method_kwargs={"per_device_train_batch_size": 16})
    if rows % 16:
        with pytest.raises(UserError, match="does not divide"):
            arguments.trl_config(asked, "trainer", rows, 135_000_000)


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
        write_few(place, 6)
        changes |= {"dataset_name": "rows.jsonl", "method_kwargs": {"min_reward": 0.0}, "prompts_per_batch": 4}
        changes |= {"num_generations": 2}
    run = train(method, **changes)
    indices = (0, 0, 1, 1) if method == "sft_rejection" else (0, 1)  # two rounds of six rows, four at a time
    for index, (rows, completions, _) in zip(indices, batches, strict=True):
        model = "tiny" if method == "sft_rejection" or index == 0 else run / f"checkpoint-{index}"
        args = ESConfig(**{**SMALL, "method": method, **changes, "model": str(model), "save_steps": 0})
        trainer = BaselineTrainer(args=args)
        prompts = [trainer.prepare()[row] for row in rows]
        sampling = inputs.sampling(trainer.args, index)
        if method == "sft_rejection":
            sampling = dataclasses.replace(sampling, num_generations=1)
        wanted = trainer.engine.generate(None, prompts, sampling)
        assert [[c.token_ids for c in row] for row in completions] == [[c.token_ids for c in row] for row in wanted]
        assert [[c.finished for c in row] for row in completions] == [[c.finished for c in row] for row in wanted]
        if method != "sft_rejection":
            assert len({c.token_ids for c in wanted[0]}) > 1  # samples of a prompt differ
    if method == "sft_rejection":
        rounds = [
            {row: answers for rows, found, _ in part for row, [answers] in zip(rows, found, strict=True)}
            for part in (batches[:2], batches[2:])
        ]
        assert all(sorted(one) == list(range(6)) for one in rounds)
        assert any(rounds[0][row].token_ids != rounds[1][row].token_ids for row in range(6))


@pytest.mark.parametrize("generation", ["estune", "trl"])
def test_samples_have_the_distribution_that_was_asked_for(generation, batches):
    """The first token's frequencies are the model's probabilities at that temperature, among the k most likely."""
    count = 400
    row = get_task("countdown").load("train")[:1]
    train(
        "grpo",
        row,
        max_steps=1,
        batch_size=1,
        num_generations=count,
        max_completion_length=1,
        temperature=1.7,
        top_k=4,
        method_kwargs={"generation": generation},
    )
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

    rows = easy_rows(2)
    train("grpo", rows, reward, response_prefix="<think>", stop_strings=["="], max_steps=1, max_completion_length=8)
    assert len(seen) == 8
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_directory("tiny"))
    for prompt, text, ids in seen:
        assert prompt in {row["prompt"] for row in rows} and text.startswith("<think>")
        assert text == "<think>" + tokenizer.decode(ids, skip_special_tokens=True)
        assert "=" not in tokenizer.decode(ids[:-1])
    [record] = metrics(place / "run")
    ended = ["=" in text or len(ids) < 8 for _, text, ids in seen]
    assert any("=" in text for _, text, _ in seen)  # TRL, who looks for the end token, takes them for cut off
    assert record["completions/clipped_ratio"] == 1 - np.mean(ended)
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
        texts = [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt, _ in seen
        ]
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
    write_few(place, 2)
    changes = {"reward_isolation": "process", "reward_timeout_s": 0.7 if kind == "hanging" else 60, "reward_workers": 1}
    run = train(
        "grpo",
        dataset_name="rows.jsonl",
        reward_funcs=[f"bad.py:{kind}"],
        max_steps=1,
        max_completion_length=24,
        **changes,
    )
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

    run = train("rloo", easy_rows(), [length, even], reward_weights=[0.5, 2.0], max_steps=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_directory("tiny"))
    [(_, completions, found)] = batches
    for answers, rewards in zip(completions, found, strict=True):
        for completion, reward in zip(answers, rewards, strict=True):
            size = len(tokenizer.decode(completion.token_ids, skip_special_tokens=True))
            # where one does not apply, the other's weight grows to the same total
            assert reward == pytest.approx(0.5 * size + 2.0 if size % 2 == 0 else 2.5 * size)
    record = metrics(run)[0]
    assert record["reward"] == pytest.approx(found.mean()) and record["rewards/even/mean"] == 1.0
    run = train("grpo", easy_rows(), never, max_steps=1, output_dir="never")
    assert weights(run) == weights_of_base()  # no advantage, no gradient
    assert metrics(run)[0]["reward"] is None
    run = train("grpo", easy_rows(), even, max_steps=1, output_dir="even")
    assert metrics(run)[0]["reward"] == 1.0


def weights_of_base():
    model = BaselineTrainer(args=ESConfig(**{**SMALL, "method": "grpo", "max_steps": 0, "output_dir": "base"})).train()
    return weights(model)


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
    assert "tags: [estune, grpo]" in card and f"trl.GRPOTrainer of TRL {trl.__version__}" in card
    assert "--method grpo" in card and "estune replay" not in card and "| after | 3 |" in card
    assert '"name": "run"' in (whole / "report.html").read_text(encoding="utf-8")
    [shown] = read_runs([whole])["runs"]  # what `estune watch` serves
    assert (shown["steps_done"], shown["config"]["method"], shown["base"]["model"]) == (3, "grpo", "tiny")
    assert shown["fingerprint"] == json.loads((whole / "es_state.json").read_text())["fingerprint"]
    assert len(shown["steps"]) == len(shown["evaluations"]) == 3


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


def easy_rows(count=4):
    return get_task("countdown").load("train")[:count]


def always_right(completions, **_):
    return [1.0] * len(completions)


def test_a_run_of_no_steps_is_the_base():
    base = tensors(local_directory("tiny"))
    for method in ("grpo", "sft_rejection", "random_search"):
        run = train(method, max_steps=0, output_dir=method, **NO_GRADIENT if method == "random_search" else {})
        assert tensors(run).keys() == base.keys()
        assert all(np.array_equal(value, base[name]) for name, value in tensors(run).items())
        assert (run / "README.md").exists()


def tensors(directory):
    return load_file(Path(directory) / "model.safetensors")


NO_GRADIENT = {"learning_rate": None, "num_generations": None, "population_size": 4, "sigma": 0.02}


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
            "learning_rate": 1e6,
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

FEW = {"task": "countdown", "dataset_name": "rows.jsonl", "max_steps": 4}  # two steps an epoch
KILLER = """
import os, signal, sys
from estune.baselines import ground, policy_gradient, random_search, trainer
from estune.cli import main

where, step, *words = sys.argv[1:]
owner, name = {
    "metrics": (ground.Ground, "after_step"),  # the step's metrics are written
    "saving": (policy_gradient.Driver, "on_save"),  # the trainer's state is there, but nothing says that it is whole
    "kept": (ground.Progress, "keep"),  # it is whole, and nothing says so
    "final": (ground.Ground, "save"),
    "scoring": (ground.Ground, "score"),  # of what was sampled
    "method": (ground.Ground, "keep_method"),  # what rejection sampling drew is kept, and no step was taken
}[where]
plain = getattr(owner, name)


def doomed(self, *given, **named):
    done = self.steps_done if hasattr(self, "steps_done") else self.ground.steps_done
    if done == int(step) and (where != "final" or named.get("final")):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *given, **named)


setattr(owner, name, doomed)
sys.exit(main(words))
"""


@pytest.fixture(scope="module")
def rivals():
    """A process that has the rivals' trainers imported, too."""
    with Zygote(rivals=True) as process:
        yield process


def words_of(method, **changes):
    values = {**SMALL, **FEW, "save_steps": 1, "save_total_limit": 1, "method": method, **changes}
    if method == "random_search":
        values |= NO_GRADIENT
    words = ["train"]
    for name, value in values.items():
        if value is not None:
            value = json.dumps(value) if isinstance(value, dict) else value
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return words


def write_few(place, count=4):
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in easy_rows(count)))


def assert_same_run(found, wanted):
    assert weights(found) == weights(wanted)
    assert metrics(found) == metrics(wanted)
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (found, wanted)]
    assert names[0] == names[1]


SFT = {"method_kwargs": {"min_reward": 0.0}}
KILLED = [
    ("grpo", {}, [("metrics", 2), ("saving", 3), ("kept", 4), ("final", 4)]),
    ("grpo", {"method_kwargs": TRL, "logging_steps": 3}, [("metrics", 1), ("saving", 3)]),
    ("sft_rejection", SFT, [("scoring", 0), ("method", 0), ("saving", 2), ("metrics", 4)]),
    ("random_search", {"logging_steps": 2}, [("metrics", 2), ("kept", 3), ("final", 4)]),
]


@pytest.mark.parametrize(("method", "changes", "kills"), KILLED, ids=["grpo", "trl", "sft_rejection", "random_search"])
def test_a_killed_run_ends_in_the_same_bits(method, changes, kills, rivals, place):
    """Killed again and again, in one run; SIGKILL, as the out-of-memory killer does it."""
    write_few(place)
    (place / "killer.py").write_text(KILLER)
    words = words_of(method, **changes)
    assert rivals.run([*words, "--output_dir", "whole"], place).code == 0
    for where, step in kills:
        done = rivals.run([where, step, *words, "--resume"], place, script=place / "killer.py")
        assert done.code == -signal.SIGKILL, done
    done = rivals.run([*words, "--resume"], place)
    assert done.code == 0, done
    assert_same_run(place / "run", place / "whole")
    before = tree(place / "run")
    done = rivals.run(["train", "--resume", "--output_dir", "run"], place)
    assert done.code == 0 and "is finished" in done.out, done
    assert_same_tree(tree(place / "run"), before)


@pytest.mark.parametrize("generation", ["estune", "trl"])
@pytest.mark.parametrize("when", ["sampling", "scoring"])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(generation, when, place, monkeypatch):
    """In the midst of a step, which is then begun again; no checkpoints were asked for."""
    write_few(place)
    changes = {**FEW, "method_kwargs": {"generation": generation}}
    whole = train("grpo", **changes, output_dir="whole")
    owner, name = (Ground, "sample") if when == "sampling" and generation == "estune" else (Ground, "score")
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
    with pytest.raises(UserError, match="cannot change data"):
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


@pytest.mark.parametrize("method", ["es", "grpo", "sft_rejection", "random_search"])
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


# --- rejection sampling and random search -----------------------------------------------------------------------------


def test_rejection_learns_right_samples_once_and_completions_alone(trainers, batches, place):
    run = train(
        "sft_rejection",
        num_generations=6,
        max_completion_length=48,
        temperature=1.0,
        max_steps=2,
        batch_size=2,
        train_dataset=easy_rows(12),
        prompts_per_batch=5,
    )
    assert [len(rows) for rows, _, _ in batches] == [5, 5, 2] * 6
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_directory("tiny"))
    task, wanted = get_task("countdown"), {}
    for rows, completions, _ in batches:
        for row, answers in zip(rows, completions, strict=True):
            for completion in answers:
                text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                columns = {name: [value] for name, value in easy_rows(12)[row].items() if name != "prompt"}
                [right] = task.accuracy(prompts=[""], completions=[text], completion_ids=[[]], **columns)
                if right == 1 and completion.finished:
                    wanted[row, completion.token_ids] = None
    kept = [json.loads(line) for line in (run / "trainer" / "samples.jsonl").read_text().splitlines()]
    assert wanted and [(line["row"], tuple(line["completion_ids"])) for line in kept] == list(wanted)
    assert json.loads((run / "method.json").read_text())["samples_kept"] == len(kept)
    assert [record["num_evaluations"] for record in metrics(run)] == [72, 72]
    [trainer] = trainers
    assert len(trainer.train_dataset) == len(kept)
    for line, given in zip(kept, trainer.train_dataset, strict=True):
        prompt = tokenizer.encode(easy_rows(12)[line["row"]]["prompt"])
        assert given["input_ids"] == prompt + line["completion_ids"]
        assert given["labels"] == [-100] * len(prompt) + line["completion_ids"]
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[len(kept) - 1]])
    learned = [[label for label in row if label != -100] for row in batch["labels"].tolist()]
    assert learned == [kept[0]["completion_ids"], kept[-1]["completion_ids"]]
    assert batch["labels"].shape == batch["input_ids"].shape


DRAWN = {"train_dataset": easy_rows(6), "seed": 3, "max_steps": 2, "prompts_per_batch": 2, "num_generations": 3,
         "max_completion_length": 48}  # fmt: skip


def test_rejection_draws_in_rounds_and_stops_at_its_samples(batches):
    """A bound leaves the first samples of the whole draw, to the sample; a part of a round follows the run's order."""

    def drawn(name, **own):
        batches.clear()
        run = train("sft_rejection", **DRAWN, reward_funcs=always_right, output_dir=name,
                    method_kwargs={"min_reward": 1.0, **own})  # fmt: skip
        told = json.loads((run / "method.json").read_text())
        found = [
            (row, answers) for rows, completions, _ in batches for row, answers in zip(rows, completions, strict=True)
        ]
        assert len(found) == told["samples_drawn"] == metrics(run)[-1]["num_evaluations"]
        return found

    whole = drawn("whole")
    order = Batches(6, 6, 3)
    assert [row for row, _ in whole] == [row for index in range(3) for row in order.rows_for_step(index)]
    assert all(len(answers) == 1 for _, answers in whole)
    for most in (1, 7, 12):
        assert drawn(f"first{most}", max_samples=most) == whole[:most]
    assert drawn("all", max_samples=100) == whole


def test_rejection_draws_for_half_of_its_time(batches, monkeypatch):
    """The batch in hand is kept; the steps have the rest, and a run with more time draws no more."""
    sample = Ground.sample

    def slow(self, *given):
        self.clock -= 10
        return sample(self, *given)

    monkeypatch.setattr(Ground, "sample", slow)
    given = {**DRAWN, "reward_funcs": always_right, "method_kwargs": {"min_reward": 1.0}}
    run = train("sft_rejection", **given, max_time_s=50)
    assert len(batches) == 3
    records = metrics(run, times=True)
    assert [record["num_evaluations"] for record in records] == [6, 6] and 30 < records[-1]["train_time_s"] < 50
    train("sft_rejection", **{**given, "max_steps": 3}, max_time_s=5000, resume=True)
    assert len(batches) == 3 and metrics(run)[-1]["num_evaluations"] == 6


def test_rejection_that_has_drawn_does_not_draw_again(batches, monkeypatch):
    """Killed before its first step was kept, it goes on with the same samples, and counts them and their time."""
    given = {**DRAWN, "reward_funcs": always_right, "method_kwargs": {"min_reward": 1.0}}
    whole = train("sft_rejection", **given, output_dir="whole")

    def stopped(*_):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(rejection, "drive", stopped)
        run = train("sft_rejection", **given)
    batches.clear()
    train("sft_rejection", **given, resume=True)
    assert not batches
    assert weights(run) == weights(whole) and metrics(run) == metrics(whole)
    cost = json.loads((run / "trainer" / "drawing.json").read_text())
    assert metrics(run, times=True)[0]["train_time_s"] >= cost["seconds"] > 0


def test_rejection_of_all_samples_is_told(place):
    with pytest.raises(UserError, match="none of 24 samples of the base was right"):
        train("sft_rejection", train_dataset=easy_rows(6), method_kwargs={"min_reward": 2.0})
    assert not (place / "run" / "model.safetensors").exists()
    with pytest.raises(UserError, match="none of 16 samples of the base was right"):
        train("sft_rejection", train_dataset=easy_rows(4), max_completion_length=1, output_dir="other")


@pytest.mark.parametrize("noise", ["full", "lowrank"])
def test_random_search_is_theta_and_the_luckiest_member(noise, place):
    run = train("random_search", max_steps=3, train_dataset=easy_rows(8), reward_funcs=letters, noise=noise,
                **NO_GRADIENT)  # fmt: skip
    best = json.loads((run / "trainer" / "best.json").read_text())
    args = ESConfig(**{**SMALL, **NO_GRADIENT, "method": "random_search", "noise": noise})
    trainer = BaselineTrainer(args=args, train_dataset=easy_rows(8), reward_funcs=letters)
    prompts, master = trainer.prepare(), trainer.engine.master
    order = [row for epoch in range(2) for row in Batches(8, 8, 0).rows_for_step(epoch)]

    def fitness(perturbation, first, index):  # two prompts from a place of the run's order
        rows = [prompts[row] for row in order[first : first + 2]]
        answers = trainer.engine.generate(perturbation, rows, inputs.sampling(trainer.args, index))
        return np.mean(letters([trainer.engine.decode(a.token_ids) for [a] in answers]))

    place_of, holder, fitnesses = (-1, -1), None, []
    for index in range(3):
        step = plan_step(trainer.args, Batches(8, 2, 0), index)
        drawn = [step.perturbation(member) for member in step.members[:2]]
        first = [fitness(one, 4 * index, 2 * index) for one in drawn]
        luckiest = int(np.argmax(first))
        then, now = (fitness(one, 4 * index + 2, 2 * index + 1) for one in (holder, drawn[luckiest]))
        if now > then:
            place_of, holder = (index, luckiest), drawn[luckiest]
        fitnesses.append(max(then, now))
    assert (best["step"], best["member"]) == place_of != (-1, -1)
    stored = tensors(run)
    for name in master.arrays:
        assert np.array_equal(stored[name], master.perturb(name, holder))
    records = metrics(run)
    assert [record["num_evaluations"] for record in records] == [8, 16, 24]
    assert [record["es/fitness_best"] for record in records] == pytest.approx(fitnesses)


def test_a_full_score_on_few_prompts_does_not_end_a_random_search(monkeypatch):
    """Each step looks at new prompts, and its best member is taken where it is better on yet others."""
    nan = float("nan")
    looks = iter([[1.0, 1.0], [0.5, 0.75],  # the first of two full scores, better than theta
                  [1.0, 0.5], [0.5, 0.5],  # no better
                  [0.5, 1.0], [0.5, 0.75],  # better
                  [1.0, nan], [0.25, nan], [nan, nan], [nan, nan]])  # fmt: skip
    seen, plain = [], random_search._fitness

    def scripted(ground, contestants, rows, index):
        plain(ground, contestants, rows, index)
        seen.append(rows)
        return np.array(next(looks))

    kept, write = [], random_search.write_json
    monkeypatch.setattr(random_search, "_fitness", scripted)
    monkeypatch.setattr(random_search, "write_json", lambda path, value: (kept.append({**value}), write(path, value)))
    train("random_search", max_steps=5, train_dataset=easy_rows(8), reward_funcs=letters, **NO_GRADIENT)
    assert [tuple(best.values()) for best in kept] == [
        (0, 0, 0.75), (0, 0, 0.5), (2, 1, 0.75), (2, 1, 0.25), (2, 1, None)
    ]  # fmt: skip
    rows = [row for epoch in range(3) for row in Batches(8, 8, 0).rows_for_step(epoch)]
    assert [row for look in seen for row in look] == rows[:20]


@pytest.mark.parametrize(("population", "batch"), [(4, 2), (30, 32), (6, 3), (3, 1), (2, 1)])
def test_a_step_of_random_search_costs_what_one_of_es_does(population, batch):
    args = {"task": "countdown", "population_size": population, "batch_size": batch, "antithetic": False}
    cost = evaluations_per_step(ESConfig(method="random_search", **args))
    of_es = evaluations_per_step(ESConfig(method="es", **args))
    assert cost == {(6, 3): 17, (2, 1): 3}.get((population, batch), of_es)
    if population < 30:
        run = train("random_search", max_steps=1, reward_funcs=letters, train_dataset=easy_rows(8), batch_size=batch,
                    **{**NO_GRADIENT, "population_size": population, "antithetic": False})  # fmt: skip
        assert metrics(run)[0]["num_evaluations"] == cost


def letters(completions, **_):
    return [sum(map(ord, text)) / 1e4 for text in completions]


@pytest.mark.parametrize(("method", "trainer"), [("grpo", "GRPOTrainer"), ("rloo", "RLOOTrainer")])
def test_what_is_trained_is_the_model_that_answered(method, trainer, monkeypatch):
    """On a model of absolute positions, with prompts of several lengths: log-probabilities of model and reference."""
    seen, base = [], Path(__file__).parents[2] / "benchmarks" / "bases" / "gpt2"
    spied = getattr(trl, trainer)._get_per_token_logps_and_entropies

    def spy(self, model, ids, mask, keep, *rest, **given):
        found = spied(self, model, ids, mask, keep, *rest, **given)
        seen.append((ids, mask, keep, found[0].detach()))
        return found

    monkeypatch.setattr(getattr(trl, trainer), "_get_per_token_logps_and_entropies", spy)
    train(method, model=str(base), max_steps=1, batch_size=4, num_generations=2, method_kwargs={"beta": 0.05})
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert len(seen) >= 2  # the model and its reference
    for ids, mask, keep, found in seen:
        assert len({int(row[:-keep].sum()) for row in mask}) > 1, "prompts of one length show nothing"
        for row, used, own in zip(ids, mask.bool(), found, strict=True):
            with torch.no_grad():
                logits = model(row[used][None]).logits[0, :-1].log_softmax(-1)  # no padding at all
            count = int(used[-keep:].sum())
            wanted = logits.gather(-1, row[used][1:, None])[:, 0][-count:]
            assert torch.allclose(own[:count], wanted, atol=2e-4)


def test_a_method_that_trains_in_float32_samples_in_it_wherever_it_runs():
    """On a GPU `auto` is otherwise what a checkpoint of 16 bits has."""
    for method, dtype in (("grpo", "float32"), ("sft_rejection", "float32"), ("random_search", "auto")):
        given = ESConfig(**{**SMALL, "method": method, **(NO_GRADIENT if method == "random_search" else {})})
        assert inputs.resolve_config(given, 200).dtype == dtype
