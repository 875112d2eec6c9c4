"""PPO by TRL 1.12's trainer: its inputs, its updates, and the files of a run."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import assert_refused, metrics
from tiers import few
from tiny_models import EOS, save_tiny, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from estune import ESConfig
from estune.baselines import BaselineTrainer, arguments, ppo, trl_ppo
from estune.errors import UserError

pytestmark = [
    pytest.mark.miniature,
    pytest.mark.skipif(not trl_ppo.directory().exists(), reason="`make install` installs its TRL"),
]

ROWS = [{"prompt": f"count to {'1' * i}: ", "bonus": i / 10} for i in range(8)]
COMMON = {
    "method": "ppo", "max_steps": 2, "batch_size": 4, "max_completion_length": 8, "learning_rate": 1e-3,
    "report_to": ["none"], "reward_isolation": "inline",
}  # fmt: skip


def vowels(completions, bonus, **_):
    return [sum(text.count(v) for v in "aeiou") + own for text, own in zip(completions, bonus, strict=True)]


@pytest.fixture
def seen(monkeypatch):
    """The trainer of a run, and copies of its models before the first step."""
    kept = SimpleNamespace()
    make = ppo.make_trainer

    def making(ground):
        kept.ground, kept.trainer = ground, make(ground)
        kept.policy, kept.reference, kept.value = (
            copy.deepcopy(model.state_dict())
            for model in (kept.trainer.policy_model, kept.trainer.ref_model, kept.trainer.value_model)
        )
        return kept.trainer

    monkeypatch.setattr(ppo, "make_trainer", making)
    return kept


def train(model, directory, rows=ROWS, reward=vowels, **options) -> Path:
    args = ESConfig(output_dir=str(directory), **{**COMMON, **options})
    return BaselineTrainer(model=str(model), reward_funcs=reward, args=args, train_dataset=rows).train()


def trainers_module():
    with trl_ppo.in_place():
        return sys.modules[trl_ppo.load()[1].__module__]


def moved(before, model) -> list[str]:
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("family", few(["gpt2", "qwen2"], ("qwen2",)))
def test_policy_and_value_model_move_and_the_reference_does_not(family, seen, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    run = train(tmp_path / "model", tmp_path / "run", prompts_per_batch=3, method_kwargs={"num_mini_batches": 2})
    trainer = seen.trainer
    assert not torch.any(seen.value["score.weight"])  # the head starts at zero
    assert torch.equal(seen.policy[next(iter(seen.policy))], seen.reference[next(iter(seen.reference))])
    assert "score.weight" in moved(seen.value, trainer.value_model)
    assert len(moved(seen.value, trainer.value_model)) > 10 and len(moved(seen.policy, trainer.policy_model)) > 10
    assert not moved(seen.reference, trainer.ref_model)
    saved = AutoModelForCausalLM.from_pretrained(run).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.policy_model.state_dict().items())
    records = metrics(run)
    assert [record["num_evaluations"] for record in records] == [4, 8]
    assert trainer.state.episode == seen.ground.evaluations == 8
    assert all(record["objective/scores"] == pytest.approx(record["reward"], abs=1e-6) for record in records)
    told = json.loads((run / "method.json").read_text())
    assert told["method"] == "ppo" and told["trl"] == trl_ppo.VERSION
    assert told["arguments"].keys() == arguments.PPO_READ
    wanted = {
        "num_mini_batches": 2, "mini_batch_size": 2, "num_ppo_epochs": 4, "total_episodes": 8, "num_total_batches": 2,
        "local_rollout_forward_batch_size": 3, "learning_rate": 1e-3, "temperature": 1.0, "stop_token_id": EOS,
        "response_length": 8, "kl_coef": 0.05, "lam": 0.95, "gamma": 1.0,
    }  # fmt: skip
    assert {name: told["arguments"][name] for name in wanted} == wanted


@pytest.mark.e2e
def test_a_run_repeats_and_leaves_what_grpo_leaves(tmp_path: Path) -> None:
    """In one process with the other TRL, before and after."""
    options = {"eval_steps": 2, "save_steps": 1, "task": "countdown", "eval_rows": 4, "max_completion_length": 16}
    runs = {}
    for name, own in (("grpo", {"num_generations": 2}), ("first", {}), ("again", {}), ("other", {"seed": 1})):
        args = ESConfig(**{**COMMON, "method": "ppo", **options, "output_dir": str(tmp_path / name), **own,
                           **({"method": "grpo"} if name == "grpo" else {})})  # fmt: skip
        runs[name] = BaselineTrainer(args=args).train()
        import trl

        assert trl.__version__ != trl_ppo.VERSION and Path(trl.__file__).parents[1] != trl_ppo.directory()
    files = {
        name: {str(path.relative_to(run)) for path in run.rglob("*") if "trainer/" not in str(path.relative_to(run))}
        for name, run in runs.items()
    }
    assert files["first"] == files["grpo"]
    weights = {name: (run / "model.safetensors").read_bytes() for name, run in runs.items()}
    assert weights["first"] == weights["again"] != weights["other"]
    assert metrics(runs["first"]) == metrics(runs["again"])
    evaluated = [record for record in metrics(runs["first"]) if "eval_reward" in record]
    assert [(record["step"], record["num_evaluations"]) for record in evaluated] == [(0, 0), (2, 8)]


def test_only_trl_comes_from_its_separate_directory() -> None:
    with trl_ppo.in_place():
        trl_ppo.load()
        import accelerate
        import transformers
        import trl

        assert trl.__version__ == trl_ppo.VERSION and Path(trl.__file__).parents[1] == trl_ppo.directory()
        for other in (accelerate, transformers, torch):
            assert trl_ppo.directory() not in Path(other.__file__).parents
    assert str(trl_ppo.directory()) not in sys.path
    assert trl_ppo.load()[1] is trl_ppo.load()[1]
    assert f"trl=={trl_ppo.VERSION}" in (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")


def test_advantages_are_those_of_gae_and_the_first_ratio_is_one(seen, tmp_path: Path, monkeypatch) -> None:
    """Advantages and returns of two updates, against the sums that define them; temperature is not 1."""
    save_tiny("llama", tmp_path / "model")
    caught = []
    module = trainers_module()
    whiten = module.masked_whiten

    def catching(values, mask, *rest, **named):
        local = sys._getframe(1).f_locals
        names = ("rewards", "values", "advantages", "returns", "scores", "kl", "sequence_lengths", "padding_mask")
        caught.append({name: local[name].clone() for name in names})
        caught[-1]["whitened"] = whiten(values, mask, *rest, **named)
        return caught[-1]["whitened"]

    monkeypatch.setattr(module, "masked_whiten", catching)
    gamma, lam, kl_coef = 0.9, 0.8, 0.3
    own = {"gamma": gamma, "lam": lam, "kl_coef": kl_coef, "num_ppo_epochs": 1}
    run = train(tmp_path / "model", tmp_path / "run", batch_size=8, temperature=0.7, method_kwargs=own)
    for record, found in zip(metrics(run), caught, strict=True):
        assert record["val/ratio"] == pytest.approx(1, abs=1e-5) and record["policy/approxkl_avg"] < 1e-8
        assert record["reward"] == pytest.approx(float(found["scores"].mean()), abs=1e-6)
        rewards, values = found["rewards"].double().numpy(), found["values"].double().numpy()
        batch, steps = rewards.shape
        for b in range(batch):
            last = min(int(found["sequence_lengths"][b]) + 1, steps - 1)  # after the end token, or at the last one
            placed = -kl_coef * found["kl"][b].double().numpy()
            placed[last] += float(found["scores"][b])
            np.testing.assert_allclose(rewards[b], placed, atol=1e-6)
            after = np.append(values[b], 0.0)
            delta = [rewards[b, t] + gamma * after[t + 1] - after[t] for t in range(steps)]
            wanted = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, steps)) for t in range(steps)]
            np.testing.assert_allclose(found["advantages"][b].numpy(), wanted, atol=1e-5)
            np.testing.assert_allclose(found["returns"][b].numpy(), np.add(wanted, values[b]), atol=1e-5)
        kept = found["whitened"][~found["padding_mask"]]
        assert abs(float(kept.mean())) < 1e-5 and float(kept.std()) == pytest.approx(1, abs=1e-3)
    assert len(caught) == 2


def test_completions_are_sampled_from_the_whole_distribution(seen, tmp_path: Path, monkeypatch) -> None:
    """Whatever the model's generation_config.json says; scores that the sampler saw are the model's logits."""
    model = save_tiny("gpt2", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"do_sample": True, "top_k": 2, "top_p": 0.5, "repetition_penalty": 3.0,
                                         "min_p": 0.2, "no_repeat_ngram_size": 1}))  # fmt: skip
    module = trainers_module()
    generate, caught = module.batch_generation, []

    def catching(*given):
        caught.append((given[1].shape[1], *generate(*given)))
        return caught[-1][1:]

    monkeypatch.setattr(module, "batch_generation", catching)
    train(tmp_path / "model", tmp_path / "run", max_steps=1, temperature=0.8)
    ((width, tokens, scores),) = caught
    pad = seen.trainer.processing_class.pad_token_id
    compared = 0
    for sequence, score in zip(tokens, scores, strict=True):
        start = int((sequence != pad).nonzero()[0])
        with torch.no_grad():
            logits = model(sequence[None, start:]).logits[0, width - start - 1 : -1] / 0.8
        length = next((t + 1 for t, token in enumerate(sequence[width:].tolist()) if token in (EOS, pad)), len(score))
        torch.testing.assert_close(score[:length], logits[:length], atol=1e-4, rtol=1e-4)
        compared += length
    assert compared > 8


def bandit(directory: Path) -> None:
    """Write a random model of two layers whose whole vocabulary is two answers, a question and what tokenizers need."""
    words = ["<pad>", "<eos>", "left", "right", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )).save_pretrained(directory)  # fmt: skip


def goes_right(completions, **_):
    return [float(text.strip() == "right") for text in completions]


def probabilities(directory: Path) -> torch.Tensor:
    """Return the next token's distribution after the bandit's question: (5,)."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([[4]])).logits[0, -1].softmax(-1)


BANDIT = {"rows": [{"prompt": "?"}] * 32, "reward": goes_right, "max_completion_length": 1, "batch_size": 32}


def test_it_solves_a_bandit(tmp_path: Path) -> None:
    bandit(tmp_path / "model")
    assert probabilities(tmp_path / "model")[3] < 0.4
    run = train(tmp_path / "model", tmp_path / "run", **BANDIT, max_steps=15, learning_rate=1e-2)
    assert probabilities(run)[3] > 0.9
    assert metrics(run)[-1]["reward"] > 0.8


def test_without_a_learning_rate_answers_come_as_the_model_gives_them(tmp_path: Path) -> None:
    bandit(tmp_path / "model")
    counts: Counter = Counter()

    def counting(completion_ids, **_):
        counts.update(tuple(ids) for ids in completion_ids)
        return [0.0] * len(completion_ids)

    options = {**BANDIT, "reward": counting, "method_kwargs": {"num_ppo_epochs": 1}}
    run = train(tmp_path / "model", tmp_path / "run", **options, max_steps=30, learning_rate=0.0)
    wanted = probabilities(tmp_path / "model")
    assert torch.equal(wanted, probabilities(run))
    n = sum(counts.values())
    assert n == 30 * 32
    for token, p in enumerate(wanted.tolist()):
        found = counts[(token,) if token else ()]  # a pad ends a completion
        assert abs(found - n * p) < 4 * (n * p * (1 - p)) ** 0.5, (token, found, n * p)


def test_where_the_end_token_is_the_padding_another_one_pads(seen, tmp_path: Path) -> None:
    """As with SmolLM2, whose chat prompts are full of its end token."""
    save_tiny("qwen2", tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{**row, "prompt": f"say<eos>{row['prompt']}"} for row in ROWS]
    run = train(tmp_path / "model", tmp_path / "run", rows, batch_size=8, max_completion_length=20)
    pad = seen.trainer.processing_class.pad_token_id
    assert seen.trainer.processing_class.eos_token_id == EOS != pad
    assert all(EOS in prompt.token_ids and pad not in prompt.token_ids for prompt in seen.ground.train_prompts)
    for record in metrics(run):
        assert record["val/num_eos_tokens"] == round(8 * (1 - record["completions/clipped_ratio"]))


def test_a_reward_that_fails_never_pays(seen, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")

    def failing(completions, bonus, **_):
        if 0.3 in bonus:
            raise ValueError("not this one")
        return [own - 1 for own in bonus]

    run = train(tmp_path / "model", tmp_path / "run", reward=failing, batch_size=8, max_steps=1)
    (record,) = metrics(run)
    assert record["reward_errors"] == 1
    known = [i / 10 - 1 for i in range(8) if i != 3]
    assert record["reward"] == pytest.approx(np.mean(known))
    assert record["objective/scores"] == pytest.approx(np.mean([*known, -1.0]), abs=1e-6)


def test_a_failure_among_strangers_of_its_chunk_gets_the_lowest_of_the_run(seen, tmp_path: Path) -> None:
    """TRL scores as many completions at a time as a forward pass has: here each is alone, and rewards are negative."""
    save_tiny("llama", tmp_path / "model")

    def failing(completions, bonus, **_):
        if 0.7 in bonus:
            raise ValueError("not this one")
        return [own - 1 for own in bonus]

    run = train(tmp_path / "model", tmp_path / "run", reward=failing, batch_size=8, prompts_per_batch=1, max_steps=2)
    for record in metrics(run):
        known = [i / 10 - 1 for i in range(8) if i != 7]
        assert min(known) - 1e-5 <= 8 * record["objective/scores"] - sum(known) <= 1e-5
    assert 8 * record["objective/scores"] - sum(known) == pytest.approx(min(known), abs=1e-5)  # by now it was seen


def test_it_stops_when_its_time_is_used_up(tmp_path: Path) -> None:
    bandit(tmp_path / "model")
    run = train(tmp_path / "model", tmp_path / "run", **BANDIT, max_steps=1000, max_time_s=0.2)
    assert 0 < len(metrics(run)) < 1000
    assert json.loads((run / "es_state.json").read_text())["step"] == len(metrics(run))


def test_a_stopped_run_starts_again_and_a_finished_one_stays(tmp_path: Path, capsys) -> None:
    """The bits are those of an uninterrupted run."""
    bandit(tmp_path / "model")
    options = {**BANDIT, "max_steps": 3, "save_steps": 2}
    wanted = train(tmp_path / "model", tmp_path / "whole", **options)
    steps = []

    def interrupting(completions, **_):
        steps.append(len(completions))
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return goes_right(completions)

    interrupting.__name__ = "goes_right"
    stopped = train(tmp_path / "model", tmp_path / "run", **{**options, "reward": interrupting})
    assert not (stopped / "model.safetensors").exists() and (stopped / "checkpoint-2").exists()
    assert "start again with: estune train --resume" in capsys.readouterr().out
    run = train(tmp_path / "model", tmp_path / "run", **options, resume=True)
    assert "starting again from step 0" in capsys.readouterr().out
    assert (run / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    assert metrics(run) == metrics(wanted)
    train(tmp_path / "model", tmp_path / "run", **options, resume=True)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot continue a finished run"):
        train(tmp_path / "model", tmp_path / "run", **{**options, "max_steps": 4}, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 4}, "num_generations must be 1"),
        ({"top_k": 5}, "leave top_p at 1"),
        ({"top_p": 0.9}, "leave top_p at 1"),
        ({"stop_strings": ["."]}, "has no stop_strings"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"batch_size": 9}, "does not fit 8 rows"),
        ({"batch_size": 1}, "batch_size of 2 or more"),
        ({"method_kwargs": {"kl_coeff": 0.1}}, "did you mean 'kl_coef'"),
        ({"method_kwargs": {"max_grad_norm": 1.0}}, "it does not clip gradients"),
        ({"method_kwargs": {"eval_on_start": True}}, "it does not read the argument"),
        ({"method_kwargs": {"learning_rate": 0.1}}, "the configuration or estune decides it"),
        ({"method_kwargs": {"num_mini_batches": 3}}, "does not divide the 4 rows"),
        ({"method_kwargs": {"whiten_rewards": True}}, "8 rows or more"),
        ({"method_kwargs": {"lam": "high"}}, "must be a number"),
        ({"method_kwargs": {"kl_estimator": "k2"}}, "k1 or k3"),
    ],
    ids=str,
)
def test_what_would_have_no_effect_or_cannot_work_is_refused(options, message, tmp_path: Path) -> None:
    bandit(tmp_path / "model")
    rows = [{"prompt": "?"}] * 8
    with pytest.raises(UserError, match=message):
        train(tmp_path / "model", tmp_path / "run", rows, goes_right, **options)


def test_a_model_without_a_value_head_is_refused(tmp_path: Path) -> None:
    save_tiny("mamba", tmp_path / "model")
    with pytest.raises(UserError, match="needs a value model, but transformers has none for mamba"):
        train(tmp_path / "model", tmp_path / "run")


def test_without_its_trl_the_error_names_the_command_that_installs_it(run_model, place: Path) -> None:
    words = ("train", "--method", "ppo", "--task", "countdown", "--output_dir", "run")
    done = run_model(*words, env={"ESTUNE_PPO_TRL": str(place / "nowhere")})
    assert_refused(done, f"python -m pip install --no-deps --target {place}/nowhere trl=={trl_ppo.VERSION}")
    (place / "trl-1.13.0.dist-info").mkdir()
    (place / "trl-1.13.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.13.0\n")
    assert_refused(run_model(*words, env={"ESTUNE_PPO_TRL": str(place)}), "which holds trl 1.13.0")
    assert not (place / "run").exists()


def test_by_the_command_line(run_model, place: Path) -> None:
    """The embedded model, with rewards in workers."""
    words = ("--method", "ppo", "--task", "countdown", "--max_completion_length", 16, "--batch_size", 4)
    done = run_model("train", *words, "--max_steps", 2, "--output_dir", "run", "--report_to", "none")
    assert done.code == 0 and not done.err, done
    assert [line.split()[:2] for line in done.out.splitlines() if line.startswith("step")] == [
        ["step", "1/2"],
        ["step", "2/2"],
    ]
    assert all(line.startswith(("estune: ", "step ")) for line in done.out.splitlines()), done.out
