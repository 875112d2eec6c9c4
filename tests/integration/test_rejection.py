"""Rejection sampling and random search: their samples, the ones they keep, and their cost."""

import json

import numpy as np
import pytest
import transformers
from baseline_runs import NO_GRADIENT, SMALL, always_right, easy_rows, letters, tensors, train
from command_line import metrics, weights

from estune import ESConfig
from estune.baselines import BaselineTrainer, random_search, rejection
from estune.baselines.session import BaselineSession
from estune.compare import job
from estune.compare.plan import evaluations_per_step
from estune.data.batches import Batches
from estune.errors import UserError
from estune.es.types import Interrupted
from estune.models.names import local_directory
from estune.run.records import read_metrics
from estune.tasks import get_task
from estune.train.step import plan_step, sampling_of

pytestmark = [pytest.mark.miniature, pytest.mark.usefixtures("in_place")]


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
    assert [len(rows) for rows, _, _ in batches] == [5] * 14 + [2]  # on from round to round
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


@pytest.mark.e2e
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


@pytest.mark.e2e
def test_rejection_of_few_prompts_fills_its_passes_and_draws_the_same(batches):
    """The samples do not depend on the batches, and a bound keeps the first samples."""
    given = {**DRAWN, "reward_funcs": always_right}
    found = {}
    for name, size, most in (("two", 2, 100), ("thirteen", 13, 100), ("bound", 13, 14)):
        batches.clear()
        train("sft_rejection", **{**given, "prompts_per_batch": size}, output_dir=name,
              method_kwargs={"min_reward": 1.0, "max_samples": most})  # fmt: skip
        found[name] = [(row, answers) for rows, completions, _ in batches
                       for row, answers in zip(rows, completions, strict=True)]  # fmt: skip
        if name == "thirteen":
            assert [len(rows) for rows, _, _ in batches] == [13, 5]
    drawn = found["thirteen"]
    assert drawn == found["two"] and drawn[:14] == found["bound"]
    own = [[answer.token_ids for row, [answer] in drawn if row == wanted] for wanted in range(6)]
    assert all(len(set(texts)) == 3 for texts in own)  # each round has its own samples


def test_a_sample_whose_reward_fails_is_not_learnt_from(batches):
    """Not even beside right samples of its prompt, in one forward pass."""

    def moody(completions, **_):
        if any(len(completion) % 2 for completion in completions):
            raise ValueError("odd")
        return [1.0] * len(completions)

    run = train(
        "sft_rejection", **{**DRAWN, "prompts_per_batch": 18}, reward_funcs=moody, method_kwargs={"min_reward": 1.0}
    )
    [(_, completions, rewards)] = batches
    right = [bool(value == 1.0) for [value] in rewards]
    assert any(right) and not all(right)
    kept = [json.loads(line)["completion_ids"] for line in (run / "trainer" / "samples.jsonl").read_text().splitlines()]
    wrong = [list(completion.token_ids) for [completion], its in zip(completions, right, strict=True) if not its]
    assert kept and not [tokens for tokens in kept if tokens in wrong]


def test_rejection_draws_for_half_of_its_time(batches, monkeypatch):
    """The current batch is kept, the steps use the remaining time, and a run with more time draws no more samples."""
    sample = BaselineSession.sample

    def slow(self, *given):
        self.clock -= 10_000  # next to which the real seconds are nothing
        return sample(self, *given)

    monkeypatch.setattr(BaselineSession, "sample", slow)
    given = {**DRAWN, "reward_funcs": always_right, "method_kwargs": {"min_reward": 1.0}}
    run = train("sft_rejection", **given, max_time_s=50_000)
    assert len(batches) == 3
    records = metrics(run, times=True)
    assert [record["num_evaluations"] for record in records] == [6, 6] and 30_000 < records[-1]["train_time_s"] < 40_000
    train("sft_rejection", **{**given, "max_steps": 3}, max_time_s=5_000_000, resume=True)
    assert len(batches) == 3 and metrics(run)[-1]["num_evaluations"] == 6


def test_rejection_that_has_drawn_does_not_draw_again(batches, monkeypatch):
    """A run killed before its first step was saved continues with the same samples, and counts them and their time."""
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


def test_rejection_of_all_samples_is_reported(place):
    with pytest.raises(UserError, match="none of 24 samples of the base was right"):
        train("sft_rejection", train_dataset=easy_rows(6), method_kwargs={"min_reward": 2.0})
    assert not (place / "run" / "model.safetensors").exists()
    told = json.loads((place / "run" / "method.json").read_text())
    assert told["samples_drawn"] == 24 and told["drawing_s"] > 0  # a comparison counts what it has cost
    used = job.read_usage(place / "run")
    assert (used["evaluations"], used["train_time_s"], used["steps"]) == (24, told["drawing_s"], 0)
    args = ESConfig(**{**SMALL, "method": "sft_rejection", "method_kwargs": {"min_reward": 2.0}, "eval_steps": 1,
                       "output_dir": "curve"})  # fmt: skip
    with pytest.raises(UserError, match="none of 24 samples of the base was right"):  # also beside a curve
        BaselineTrainer(args=args, train_dataset=easy_rows(6), eval_dataset=easy_rows(2)).train()
    assert read_metrics(place / "curve")[0]["step"] == 0
    assert job.read_usage(place / "curve")["evaluations"] == 24
    with pytest.raises(UserError, match="none of 16 samples of the base was right"):
        train("sft_rejection", train_dataset=easy_rows(4), max_completion_length=1, output_dir="other")


@pytest.mark.parametrize("noise", ["full", "lowrank"])
def test_random_search_is_theta_and_the_luckiest_member(noise, place):
    run = train("random_search", max_steps=3, train_dataset=easy_rows(8), reward_funcs=letters, noise=noise,
                **NO_GRADIENT)  # fmt: skip
    best = json.loads((run / "trainer" / "best.json").read_text())
    args = ESConfig(**{**SMALL, **NO_GRADIENT, "method": "random_search", "noise": noise})
    trainer = BaselineTrainer(args=args, train_dataset=easy_rows(8), reward_funcs=letters)
    prompts, host_theta = trainer.prepare(), trainer.engine.theta
    order = [row for epoch in range(2) for row in Batches(8, 8, 0).rows_for_step(epoch)]

    def fitness(perturbation, first, index):  # two prompts from a place of the run's order
        rows = [prompts[row] for row in order[first : first + 2]]
        answers = trainer.engine.generate(perturbation, rows, sampling_of(trainer.args, index))
        return np.mean(letters([trainer.engine.assets.decode(a.token_ids) for [a] in answers]))

    place_of, holder, fitnesses = (-1, -1), None, []
    for index in range(3):
        step = plan_step(trainer.args, Batches(8, 2, 0), index)
        drawn = step.perturbations[:2]
        first = [fitness(one, 4 * index, 2 * index) for one in drawn]
        luckiest = int(np.argmax(first))
        then, now = (fitness(one, 4 * index + 2, 2 * index + 1) for one in (holder, drawn[luckiest]))
        if now > then:
            place_of, holder = (index, luckiest), drawn[luckiest]
        fitnesses.append(max(then, now))
    assert (best["step"], best["member"]) == place_of != (-1, -1)
    stored = tensors(run)
    for name in host_theta.arrays:
        assert np.array_equal(stored[name], host_theta.perturb(name, holder))
    records = metrics(run)
    assert [record["num_evaluations"] for record in records] == [8, 16, 24]
    assert [record["es/fitness_best"] for record in records] == pytest.approx(fitnesses)


@pytest.mark.parametrize("noise", ["full", "lowrank"])
def test_random_vote_is_the_same_search_and_names_its_best_members(noise, place):
    """A search that is stopped and continued names the same members."""
    changes = {"train_dataset": easy_rows(8), "task": "countdown", "noise": noise, **NO_GRADIENT, "max_steps": 3}
    alone = train("random_search", **changes, output_dir="alone")
    votes = {"method_kwargs": {"vote_members": 4}}
    run = train("random_vote", **changes, **votes)
    assert weights(run) == weights(alone)
    record = json.loads((run / "method.json").read_text())
    assert record["estune"] == {"vote_members": 4} and "vote" not in json.loads((alone / "method.json").read_text())
    state = json.loads((run / "trainer" / "best.json").read_text())
    best = json.loads((alone / "trainer" / "best.json").read_text())
    assert {name: state[name] for name in best} == best and len(state["ranked"]) == 4
    members = random_search.voting_members(record["vote"])
    args = ESConfig(**{**SMALL, **NO_GRADIENT, "method": "random_vote", "noise": noise})
    batches = Batches(8, 2, 0)
    places = [(each["step"], each["member"]) for each in record["vote"]["members"]]
    assert members == [plan_step(args, batches, step).perturbations[member] for step, member in places]
    assert len(set(places)) == 4 and (best["step"] < 0 or places[0] == (best["step"], best["member"]))
    parts = train("random_vote", **{**changes, "max_steps": 2}, **votes, output_dir="parts")
    early = json.loads((parts / "method.json").read_text())["vote"]
    assert {each["step"] for each in early["members"]} == {0, 1} and early["fingerprint"] != record["vote"][
        "fingerprint"
    ]
    train("random_vote", **changes, **votes, output_dir="parts", resume=True)
    assert json.loads((parts / "method.json").read_text())["vote"] == record["vote"]


def test_members_are_ranked_by_their_second_look_and_then_by_their_first(monkeypatch):
    """N is 8: four members a step. A first look counts from the mean of its step."""
    nan = float("nan")
    looks = iter([[0.1, 0.5, 0.3, nan], [0.2, 0.4],  # 1 is the best so far
                  [1.0, 0.9, 0.8, 0.7], [0.6, 0.5],  # 0 is not better
                  [nan, nan, nan, nan], [0.6, nan]])  # fmt: skip
    monkeypatch.setattr(random_search, "members_fitness", lambda *_: np.array(next(looks)))
    run = train("random_vote", max_steps=3, **{**NO_GRADIENT, "population_size": 8}, method_kwargs={"vote_members": 5})
    record = json.loads((run / "method.json").read_text())
    places = [(each["step"], each["member"]) for each in record["vote"]["members"]]
    assert places == [(0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]


def test_a_damaged_rank_of_members_is_refused(place):
    changes = {**NO_GRADIENT, "method_kwargs": {"vote_members": 2}}
    run = train("random_vote", max_steps=2, **changes)
    file = run / "trainer" / "best.json"
    state = json.loads(file.read_text())
    for ranked in (None, [3], [{**state["ranked"][0], "step": 9}], [{**state["ranked"][0], "fitness": None}]):
        file.write_text(json.dumps({**state, "ranked": ranked}))
        with pytest.raises(UserError, match="is missing or damaged"):
            train("random_vote", **{**changes, "max_steps": 3, "resume": True})


def test_a_full_score_on_few_prompts_does_not_end_a_random_search(monkeypatch):
    """Each step uses new prompts; its best member is accepted if it is better on further prompts."""
    nan = float("nan")
    looks = iter([[1.0, 1.0], [0.5, 0.75],  # the first of two full scores, better than theta
                  [1.0, 0.5], [0.5, 0.5],  # no better
                  [0.5, 1.0], [0.5, 0.75],  # better
                  [1.0, nan], [0.25, nan], [nan, nan], [nan, nan]])  # fmt: skip
    seen, plain = [], random_search.members_fitness

    def scripted(session, contestants, rows, index):
        plain(session, contestants, rows, index)
        seen.append(rows)
        return np.array(next(looks))

    kept, write = [], random_search.write_json
    monkeypatch.setattr(random_search, "members_fitness", scripted)
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
