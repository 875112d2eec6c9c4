"""What a baseline receives: the samples of ES's engine for ES's prompts, and their rewards."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from baseline_runs import NO_GRADIENT, SMALL, easy_rows, train, weights_of_base, write_few
from command_line import PATIENCE_S, metrics, weights
from tiers import few
from tiny_models import save_tiny

from estune import ESConfig
from estune.baselines import BaselineTrainer
from estune.models.names import local_directory
from estune.tasks import get_task
from estune.train.step import sampling_of

pytestmark = [pytest.mark.miniature, pytest.mark.usefixtures("in_place")]


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", few(["grpo", "rloo", "sft_rejection"], ("grpo",)))
def test_samples_are_what_es_engine_gives_for_theta(method, batches, place):
    """Of the weights as they are in that step, with that step's numbers."""
    changes = {"temperature": 0.7, "top_k": 5, "max_steps": 2, "save_steps": 1, "seed": 5}
    if method == "sft_rejection":
        write_few(place, 6)
        changes |= {"dataset_name": "rows.jsonl", "method_kwargs": {"min_reward": 0.0}, "prompts_per_batch": 4}
        changes |= {"num_generations": 2}
    run = train(method, **changes)
    indices = (0, 0, 0) if method == "sft_rejection" else (0, 1)  # two rounds of six rows, four at a time
    drawn = 0
    for index, (rows, completions, _) in zip(indices, batches, strict=True):
        model = "tiny" if method == "sft_rejection" or index == 0 else run / f"checkpoint-{index}"
        args = ESConfig(**{**SMALL, "method": method, **changes, "model": str(model), "save_steps": 0})
        trainer = BaselineTrainer(args=args)
        prompts = [trainer.prepare()[row] for row in rows]
        sampling = sampling_of(trainer.args, index)
        if method == "sft_rejection":
            sampling = dataclasses.replace(sampling, num_generations=1)
            rounds = [(drawn + place) // 6 for place in range(len(rows))]
            prompts = [dataclasses.replace(prompt, row_id=6 * each + prompt.row_id)
                       for prompt, each in zip(prompts, rounds, strict=True)]  # fmt: skip
            drawn += len(rows)
        wanted = trainer.engine.generate(None, prompts, sampling)
        assert [[c.token_ids for c in row] for row in completions] == [[c.token_ids for c in row] for row in wanted]
        assert [[c.finished for c in row] for row in completions] == [[c.finished for c in row] for row in wanted]
        if method != "sft_rejection":
            assert len({c.token_ids for c in wanted[0]}) > 1  # samples of a prompt differ
    if method == "sft_rejection":
        found = [(row, answer) for rows, answers, _ in batches for row, [answer] in zip(rows, answers, strict=True)]
        once, again = dict(found[:6]), dict(found[6:])
        assert sorted(once) == sorted(again) == list(range(6))
        assert any(once[row].token_ids != again[row].token_ids for row in range(6))


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


@pytest.mark.parametrize("kind", few(["raising", "hanging", "nan", "dying"], ("raising",)))
def test_a_reward_that_fails_does_not_pay(kind, batches, place):
    """It gets the lowest reward of its prompt's group, is counted, and the run goes on."""
    (place / "bad.py").write_text(BAD)
    write_few(place, 2)
    limit_s, workers = (3, 8) if kind == "hanging" else (PATIENCE_S, 1)  # calls that hang, hang at the same time
    changes = {"reward_isolation": "process", "reward_timeout_s": limit_s, "reward_workers": workers}
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
    assert metrics(run)[0]["reward_errors"] == metrics(run)[0][f"rewards/{kind}/errors"] == failures


@pytest.mark.parametrize("method", ["grpo", "random_search"])
def test_failures_are_counted_for_each_function(method, place, capsys):
    """Over all batches of a step; they are no means."""

    def failing(completions, **_):
        if "never" not in completions:
            raise ValueError("none is good enough")

    def fine(completions, **_):
        return [float(len(text)) for text in completions]

    more = NO_GRADIENT if method == "random_search" else {"method_kwargs": {"steps_per_generation": 1}}
    run = train(method, easy_rows(), [failing, fine], max_steps=2, **more)
    records = metrics(run)
    told, evaluations = capsys.readouterr().out, 0
    for record in records:
        scored, evaluations = record["num_evaluations"] - evaluations, record["num_evaluations"]
        assert record["rewards/failing/errors"] == record["reward_errors"] == scored > 0
        assert record["rewards/fine/errors"] == 0
        assert f"failed {scored} (failing {scored})" in told


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
