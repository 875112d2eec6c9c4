"""The baselines train with TRL's own trainers: their bits, their arguments, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from baseline_runs import NO_GRADIENT, SMALL, TRL, tensors, train, trl
from command_line import metrics, write_rewards
from datasets import Dataset
from tiers import few, full

from estune import ESConfig
from estune.baselines import arguments
from estune.baselines.policy_gradient import count_positions_from_the_mask
from estune.errors import UserError
from estune.models.names import local_directory
from estune.tasks import get_task
from estune.train import setup

pytestmark = [pytest.mark.miniature, pytest.mark.usefixtures("in_place")]


# --- a baseline trains as TRL does -----------------------------------------------------------------------------------

EXACT = [
    ("grpo", {}, {"loss_type": "grpo", "scale_rewards": "group"}),
    ("grpo", {"loss_type": "dapo"}, {}),  # what TRL does where it is told nothing
    ("grpo", {"beta": 0.1, "num_iterations": 2}, {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2}),
    ("dr_grpo", {}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    ("rloo", {}, {}),
]
NAMES = ["grpo", "dapo", "kl", "dr_grpo", "rloo"]


def trls_own(method, generated=None, **of_trl):
    """Train by TRL's trainer itself; return it and the rewards of each batch.

    ``generated``: each batch's completions, in the place of its own generation.
    """
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
    if generated is not None:
        left = iter(generated)
        trainer._generate_single_turn = lambda *_: next(left) if method == "rloo" else (next(left), None)
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            count_positions_from_the_mask(model)
    trainer.train()
    return trainer, rewards


def assert_same_run(run, trainer, rewards):
    found = tensors(run)
    for name, parameter in trainer.model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), found[name]), name
    logged = [record["reward"] for record in metrics(run) if "reward" in record]  # not where samples serve twice
    assert logged == [pytest.approx(np.mean(batch), abs=1e-12) for batch in rewards]
    base = tensors(local_directory("tiny"))
    assert any((base[name] != found[name]).any() for name in found)


@pytest.mark.parametrize(("method", "kwargs", "of_trl"), [EXACT[0], *(full(*case) for case in EXACT[1:])], ids=NAMES)
def test_a_run_is_trls_own_bit_for_bit(method, kwargs, of_trl, place):
    trainer, rewards = trls_own(method, **of_trl)
    assert_same_run(train(method, seed=7, method_kwargs={**TRL, **kwargs}), trainer, rewards)


@pytest.mark.parametrize(("method", "kwargs", "of_trl"), [*(full(*case) for case in EXACT[:-1]), EXACT[-1]], ids=NAMES)
def test_with_samples_of_es_engine_the_rest_is_trls_own_bit_for_bit(method, kwargs, of_trl, batches, place):
    """What comparisons run: TRL's trainer, given the same completions and the positions that they were sampled at."""
    run = train(method, seed=7, method_kwargs=kwargs)
    generated = [[list(completion.token_ids) for row in rows for completion in row] for _, rows, _ in batches]
    trainer, rewards = trls_own(method, generated, **of_trl)
    assert_same_run(run, trainer, rewards)


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


@pytest.mark.parametrize("method", few(RESOLVED, ("grpo", "sft_rejection")))
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
    resolved = setup.resolve_config(ESConfig(method="grpo", task="countdown"), 200)
    assert (resolved.batch_size, resolved.learning_rate) == (8, 1e-6)


def test_the_page_names_the_defaults_that_a_run_gets():
    lines = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, text in enumerate(lines) if text.startswith("| | `grpo`"))
    head, _, *body = [[cell.strip() for cell in text.strip("|").split("|")] for text in lines[start : start + 11]]
    table = {cells[0].split(",")[0].strip("`"): dict(zip(head[1:], cells[1:], strict=True)) for cells in body}
    for method in ("grpo", "dr_grpo", "rloo", "ppo", "sft_rejection", "random_search"):
        args = setup.resolve_config(ESConfig(method=method, task="countdown"), 200)
        for name in ("learning_rate", "batch_size", "num_generations", "temperature"):
            told = table[name][f"`{method}`"].split()[:1]
            if (method, name) == ("random_search", "learning_rate"):
                assert not told
            else:
                assert float(told[0]) == getattr(args, name), (method, name)
    for method, own in arguments.OF_METHOD.items():
        for name in ("loss_type", "scale_rewards"):
            assert table[name][f"`{method}`"] == own.get(
                name, "nll" if (method, name) == ("sft_rejection", "loss_type") else ""
            )


def test_a_constant_rate_rises_where_warmup_is_asked_for(trainers):
    train("grpo", warmup_steps=3)
    assert trainers[0].args.lr_scheduler_type == "constant_with_warmup"
    assert [record["learning_rate"] for record in metrics(Path("run"))] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3])


SEARCH = {**NO_GRADIENT, "method_kwargs": {"vote_members": 2}}
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
    ("grpo", {"method_kwargs": {"scale_rewards": "bacth"}}, "did you mean 'batch'"),
    ("grpo", {"method_kwargs": {"importance_sampling_level": "word"}}, "token, sequence"),
    ("grpo", {"method_kwargs": {"per_device_train_batch_size": 3}}, "does not divide the 8 rows"),
    ("grpo", {"method_kwargs": {"epsilon": "wide"}}, "epsilon of method grpo cannot be 'wide'"),
    ("grpo", {"method_kwargs": {"steps_per_generation": 0.5}}, "cannot be 0.5"),
    ("grpo", {"method_kwargs": {"epsilon": 0.3}}, "epsilon has no effect without num_iterations or steps"),
    ("rloo", {"method_kwargs": {"epsilon": 0.3, "num_iterations": 1}}, "epsilon has no effect"),
    ("grpo", {"method_kwargs": {"use_bias_correction_kl": True}}, "no effect without beta"),
    ("grpo", {"method_kwargs": {"sync_ref_model": True}}, "cannot hold sync_ref_model"),
    ("grpo", {"method_kwargs": {"label_smoothing_factor": 0.1}}, "cannot hold label_smoothing_factor"),
    ("dr_grpo", {"method_kwargs": {"loss_type": "grpo"}}, "loss_type defines dr_grpo"),
    ("dr_grpo", {"method_kwargs": {"beta": 0.1}}, "beta defines dr_grpo"),
    ("grpo", {"num_generations": 1}, "num_generations must be 2 or more"),
    ("grpo", {"temperature": 0, "num_generations": 1}, "temperature must be above 0"),
    ("grpo", {"dtype": "bfloat16"}, "float32"),
    ("grpo", {"console": "panel"}, "panel"),
    ("grpo", {"engine": "toy", "task": "quadratic"}, "engine hf"),
    ("grpo", {"sigma": 0.1}, "does not use sigma"),
    ("grpo", {"seed": 1 << 32}, "seeds below 2^32"),
    ("grpo", {"log_completions": True}, "log_completions"),
    ("grpo", {"max_time_s": 1, "lr_scheduler_type": "linear"}, "constant schedules"),
    ("grpo", {"load_best_model_at_end": True, "eval_steps": 1}, "does not use load_best_model_at_end"),
    ("grpo", {"method_kwargs": {"load_best_model_at_end": True}}, "cannot hold load_best_model_at_end"),
    ("sft_rejection", {"method_kwargs": {"min_reward": "much"}}, "min_reward must be a number"),
    ("sft_rejection", {"method_kwargs": {"max_samples": 0}}, "max_samples must be an integer of 1 or more"),
    ("sft_rejection", {"method_kwargs": {"max_samples": 1.5}}, "max_samples must be an integer of 1 or more"),
    ("sft_rejection", {"method_kwargs": {"packing": True}}, "cannot hold packing"),
    ("sft_rejection", {"task": None, "dataset_name": "rows.jsonl", "reward_funcs": ["rewards.py:vowels"]},
     "min_reward in method_kwargs"),
    ("random_search", {"method_kwargs": {"beta": 1}, "learning_rate": None}, "does not use method_kwargs"),
    ("random_search", {}, "does not use learning_rate"),
    ("random_vote", {**SEARCH, "method_kwargs": {"vote_member": 2}}, "did you mean 'vote_members'"),
    ("random_vote", {**SEARCH, "method_kwargs": {"vote_members": 1}}, "vote_members must be an integer of 2 or more"),
    ("random_vote", {**SEARCH, "method_kwargs": {"vote_members": 7}}, "is 7, and the search draws 6 members"),
    ("random_vote", {**SEARCH, "task": "conciseness"}, "task conciseness has no final answer to count"),
    ("random_vote", {**SEARCH, "task": None, "dataset_name": "rows.jsonl", "reward_funcs": ["rewards.py:vowels"]},
     "rewards without a task have no final answer"),
    ("es", {"method_kwargs": {"beta": 1}}, "does not use method_kwargs"),
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
        assert setup.resolve_config(given, 200).dtype == dtype
