"""The task conciseness: its reward depends on length only, its accuracy on content; its splits share no rows."""

from __future__ import annotations

import json

import pytest

from estune.errors import UserError
from estune.tasks import TASKS, conciseness


def test_the_reward_is_the_distance_in_characters() -> None:
    said = ["100", "It boils at 100 degrees.", "", [{"role": "assistant", "content": "10"}]]
    assert conciseness.reward(completions=said, answer=["100"] * 4) == [0.0, -21.0, -3.0, -1.0]


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        ("Paris", ["Paris"], 1), ("The capital of France is **Paris**.", ["Paris"], 1), ("paris!", ["Paris"], 1),
        ("PARIS", ["Paris"], 1), ("Parisian", ["Paris"], 0), ("", ["Paris"], 0), ("   ", ["Paris"], 0),
        ("Yes", ["Paris"], 0), ("?", ["Paris"], 0), ("Water is H2O.", ["H2O"], 1), ("H\u2082O", ["H2O"], 1),
        ("There are 1,000 metres.", ["1000"], 1), ("1000000", ["1000"], 0), ("100.", ["100"], 1), ("0.5", ["5"], 0),
        ("twenty-four hours", ["24", "Twenty-four"], 1), ("twenty four", ["Twenty-four"], 1),
        ("24", ["24", "Twenty-four"], 1), ("four twenty", ["Twenty-four"], 0), ("blue  whale", ["Blue whale"], 1),
        ("a blue-whale", ["Blue whale"], 1), ("whale blue", ["Blue whale"], 0), ("Leonardo da Vinci", ["Da Vinci"], 1),
        ("man's best friend is a dog", ["Dog"], 1), ("hot_dog", ["Dog"], 1), ("\u200bParis", ["Paris"], 1),
        ("4.5", ["4"], 0), ("-4", ["4"], 0), ("\u22124", ["4"], 0), ("1/2", ["2"], 0), ("-4.", ["-4"], 1),
        ("3-4", ["4"], 1), ("It is 4.", ["4"], 1), ("two hundred", ["Hundred"], 0), ("Twenty-six", ["Six"], 0),
        ("six or so", ["Six"], 1), ("Penguins", ["Penguin"], 1), ("foxes", ["Fox"], 1), ("4s", ["4"], 0),
        ("one hundred years", ["100", "Hundred"], 1), ("hundreds of years", ["Hundred"], 0), ("one six", ["Six"], 0),
        ("One thousand", ["Thousand"], 1), ("He is a gas", ["He"], 1), ("here he is", ["He"], 0), ("e.g. F", ["E"], 0),
        ("It is Fe.", ["Fe"], 1), ("FE", ["Fe"], 0), ("z", ["Z", "z"], 1),
    ],
)  # fmt: skip
def test_an_accepted_answer_has_to_stand_there_as_whole_words(said: str, answers: list[str], right: int) -> None:
    assert conciseness.accuracy(completions=[said], answers=[answers]) == [right]
    chat = [{"role": "assistant", "content": said}]
    assert conciseness.accuracy(completions=[chat], answers=[answers]) == [right]


def test_a_long_text_takes_no_long_time() -> None:
    said = ["Paris " * 200_000, "a" * 1_000_000, "1," * 300_000]
    assert conciseness.accuracy(completions=said, answers=[["Rome"]] * 3) == [0, 0, 0]


def test_splits_have_their_sizes_and_share_no_question() -> None:
    rows = {split: conciseness.load(split) for split in TASKS["conciseness"].splits}
    assert {split: len(own) for split, own in rows.items()} == {
        "train": 2, "validation": 8, "test": 8, "knowledge": 200, "knowledge_validation": 100,
    }  # fmt: skip
    questions = [row["prompt"][0]["content"] for own in rows.values() for row in own]
    assert len(set(questions)) == len(questions)
    assert rows["train"][0]["answer"] == rows["train"][0]["answers"][0]


@pytest.mark.parametrize("split", conciseness.SPLITS)
def test_no_question_holds_its_answer(split: str) -> None:
    """Otherwise a model that repeats the question would be right. Two questions, as in the paper, offer a choice."""
    for row in conciseness.load(split):
        question = row["prompt"][0]["content"]
        if " or " not in question:
            assert conciseness.accuracy(completions=[question], answers=[row["answers"]]) == [0], question


def test_what_always_answers_the_same_is_not_right() -> None:
    rows = conciseness.load("knowledge")
    answers = [row["answers"] for row in rows]
    for said in ("Yes", "No", "1", "4", "The", "I don't know", "a"):
        assert sum(conciseness.accuracy(completions=[said] * 200, answers=answers)) <= 10, said
    shortest = [row["answer"] for row in rows]
    assert conciseness.accuracy(completions=shortest, answers=answers) == [1] * 200
    assert conciseness.reward(completions=shortest, answer=shortest) == [0.0] * 200


def test_a_users_rows() -> None:
    assert conciseness.prepare_row({"prompt": "?", "answer": 7}) == {"prompt": "?", "answer": "7", "answers": ["7"]}
    assert conciseness.prepare_row({"prompt": "?", "answers": ["a", "b"]})["answer"] == "a"
    for wrong in ({}, {"answer": None}, {"answers": []}, {"answers": "text"}, {"answers": [" "]}):
        with pytest.raises(UserError, match="needs the column answer"):
            conciseness.prepare_row({"prompt": "?", **wrong})


def test_rows_are_json() -> None:
    for split in conciseness.SPLITS:
        rows = conciseness.load(split)
        assert rows and json.loads(json.dumps(rows)) == rows
