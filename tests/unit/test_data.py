"""Rows, batches, prompts and reward inputs: real files, a real tokenizer, no network."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from estune.data.batches import Batches
from estune.data.datasets import check_columns, has_splits, load_rows
from estune.data.layouts import described, hidden_columns, layout_of, with_mapped_columns, with_prompts
from estune.data.memory import STREAM_ROWS, split_of
from estune.data.prompts import PromptBuilder
from estune.errors import UserError
from estune.rewards.contract import reward_inputs

ROWS = [{"prompt": f"p{i}", "target": i, "numbers": [i, 1.5, None], "text": "é\u2028"} for i in range(5)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if thinking is defined %}think {% endif %}{% endif %}"
)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    """A word tokenizer that prepends a BOS by default, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "<user>", "<assistant>", "<system>", "hello", "be", "brief", "think", "ok"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def plain_tokenizer(tokenizer):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", unk_token="<unk>")


def builder(tokenizer, **changes):
    options = {
        "apply_chat_template": "auto", "chat_template_kwargs": {}, "system_prompt": None, "response_prefix": "",
        "max_context": None, "max_completion_length": 8, "is_builtin_task": False,
    }  # fmt: skip
    return PromptBuilder(tokenizer, **(options | changes))


# --- reading


def test_files_give_equal_rows_with_exact_types(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(ROWS), "utf-8")
    write_lines(tmp_path / "b.json", ROWS)
    lines = write_lines(tmp_path / "a.jsonl", ROWS)
    for name in ("a.parquet", "a.json", "b.json", "a.jsonl"):
        assert load_rows(str(tmp_path / name)) == ROWS, name
    lines.write_bytes(b"\xef\xbb\xbf" + lines.read_bytes() + b"\n\n")  # a BOM, blank lines
    rows = load_rows(lines)
    assert rows == ROWS
    assert [type(value) for value in rows[0]["numbers"]] == [int, float, type(None)]


class Endless:
    """A map-style dataset: it has a length, and answers any index, as many of torch's do."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"prompt": f"p{index}"}


def test_a_sequence_is_read_to_its_length_and_no_further():
    assert [row["prompt"] for row in load_rows(Endless())] == ["p0", "p1", "p2"]
    assert load_rows(tuple(ROWS)) == ROWS


def forever():
    yield from ({"prompt": str(number)} for number in itertools.count())


def test_a_stream_is_read_to_its_end():
    import datasets

    stream = datasets.IterableDataset.from_generator(forever)
    for source in (
        iter(ROWS),
        map(dict, ROWS),
        (row for row in ROWS),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    ):
        assert load_rows(source) == ROWS
    assert load_rows(stream.take(3)) == [{"prompt": "0"}, {"prompt": "1"}, {"prompt": "2"}]
    assert len(load_rows(itertools.islice(forever(), STREAM_ROWS))) == STREAM_ROWS
    for source, first in ((forever(), r"itertools.islice\(stream, 100000\)"), (stream, r"\.take\(100000\)")):
        with pytest.raises(UserError, match=rf"no length and more than 100,000 rows: .*with {first}$"):
            load_rows(source)
    for source, words in (
        (itertools.count(), "must yield dicts, one per row, and a count yielded a int"),
        (iter([]), "has no rows"),
        (7, "type int holds no rows"),
        (None, "type NoneType holds no rows"),
        ((1 / 0 for _ in range(2)), "cannot be read: ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(UserError, match=words):
            load_rows(source)


def test_data_frames_are_read_as_datasets_reads_them():
    import datasets
    import pandas
    import pyarrow

    dates = pandas.to_datetime(["2020-01-01", None, "2021-01-01"])
    frame = pandas.DataFrame({
        "prompt": ["a", None, "c"], "n": [1, 2, 3], "x": [1.5, float("nan"), 2], "whole": [1, None, 3],
        "m": [[{"role": "user", "content": "x"}], None, []], "d": dates,
    })  # fmt: skip
    rows = load_rows(frame)
    assert rows == datasets.Dataset.from_pandas(frame).to_list()
    assert rows[1] == {"prompt": None, "n": 2, "x": None, "whole": None, "m": None, "d": None}
    assert load_rows(frame[frame.n > 1]) == rows[1:]  # an index without a name is no column
    assert load_rows(frame.set_index("n"))[0]["n"] == 1
    assert load_rows(pyarrow.Table.from_pylist(ROWS)) == ROWS

    class Polars:  # its frames have a length and this method
        def __len__(self):
            return 2

        def to_dicts(self):
            return ROWS[:2]

    assert load_rows(Polars()) == ROWS[:2]
    for bad, words in (
        (pandas.DataFrame({5: ["a"]}), "a column named 5"),
        (pandas.DataFrame({"a": [1, "x"]}), "cannot be read: ArrowInvalid"),
        (pandas.concat([frame, frame], axis=1), "Duplicate column names"),
        (pandas.DataFrame(), "no rows"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load_rows(bad)
        assert "\n" not in str(caught.value)


def test_a_dict_of_datasets_is_no_dataset():
    import datasets

    for source in (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), {"train": ROWS}):
        with pytest.raises(UserError, match=rf"a {type(source).__name__} holds several datasets \(train\)"):
            load_rows(source)


TABLES = {
    "a.csv": 'prompt,n,f,s,b,e\nhi,1,1.5,007,True,\n"two\nlines, here",2,3,NA,False,\n',
    "bom.csv": "\ufeffprompt,n\nx,1\n",
    "one.tsv": "prompt\tn\nx, y\t3\n",
    "mixed.csv": "a\n1\nx\n2.5\n",
    "short.csv": "a,b\n1\n",
    "index.csv": ",a\n0,x\n1,y\n",
    "blank.csv": "\n\na,b\n\n1,2\n\n",
}


def test_tables_have_the_values_that_datasets_gives_them(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    for name, text in TABLES.items():
        (tmp_path / name).write_text(text, "utf-8")
        options = {"sep": "\t"} if name.endswith("tsv") else {}
        theirs = datasets.load_dataset("csv", data_files=str(tmp_path / name), cache_dir=str(tmp_path / "c"), **options)
        assert repr(load_rows(tmp_path / name)) == repr(theirs["train"].to_list()), name
        assert not has_splits(tmp_path / name)
    assert load_rows(tmp_path / "a.csv")[1] == (
        {"prompt": "two\nlines, here", "n": 2, "f": 3.0, "s": None, "b": False, "e": None}
    )


def test_names_of_columns_are_strings():
    with pytest.raises(UserError, match="a column named 1"):
        load_rows([{"prompt": "a", 1: 2}])
    with pytest.raises(UserError, match="a column named None"):
        load_rows([{"prompt": "a"}, {"prompt": "a", None: 2}])


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "v": 1, "v": 2}\n')
    with pytest.raises(UserError, match="line 2 gives 'v' twice"):
        load_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text('[{"prompt": "a", "x": {"deep": [{"y": 1, "y": 1}]}}]')
    with pytest.raises(UserError, match="gives 'y' twice"):
        load_rows(tmp_path / "a.json")
    table = pyarrow.table([pyarrow.array(["p"]), pyarrow.array([1]), pyarrow.array([2])], names=["prompt", "v", "v"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns named 'v'"):
        load_rows(tmp_path / "a.parquet")


def test_rows_get_every_column(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b", "target": 1}])
    assert load_rows(path) == [{"prompt": "a", "target": None}, {"prompt": "b", "target": 1}]


def test_directories(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([0, 1])}).save_to_disk(tmp_path / "two")
    (tmp_path / "three").mkdir()
    write_lines(tmp_path / "three" / "train.jsonl", ROWS)
    write_lines(tmp_path / "three" / "test.jsonl", ROWS[:2])
    assert load_rows(tmp_path / "one") == load_rows(saved) == ROWS
    for name in ("two", "three"):
        assert load_rows(tmp_path / name, split="train") == ROWS
        assert load_rows(str(tmp_path / name), split="test") == ROWS[:2]
        with pytest.raises(UserError, match="validation"):
            load_rows(tmp_path / name, split="validation")
    assert load_rows(ROWS) == ROWS


def test_what_has_splits(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "two")
    (tmp_path / "three").mkdir()
    write_lines(tmp_path / "three" / "train.jsonl", ROWS)
    lines = write_lines(tmp_path / "a.jsonl", ROWS)
    for source in ("one", tmp_path / "one", "a.jsonl", lines, ROWS, saved):
        assert not has_splits(source), source
    for source in ("two", tmp_path / "two", "three", "owner/name", "name"):
        assert has_splits(source), source


def test_a_configuration_where_there_can_be_none_is_refused(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "two")
    for source in (tmp_path / "one", tmp_path / "two", write_lines(tmp_path / "a.jsonl", ROWS)):
        assert load_rows(source) == ROWS
        with pytest.raises(UserError, match=rf"{source.name} .*has no configurations.* nonexist"):
            load_rows(source, config="nonexist")


@pytest.mark.parametrize("damage", ["{", "{}", None])
def test_a_damaged_saved_dataset_is_refused_in_one_sentence(tmp_path, damage):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    if damage is None:
        next((tmp_path / "one").glob("*.arrow")).write_bytes(b"junk")
    else:
        (tmp_path / "one" / "state.json").write_text(damage)
    with pytest.raises(UserError, match=r"one cannot be loaded: \w+:") as caught:
        load_rows(tmp_path / "one")
    assert "\n" not in str(caught.value)


def test_a_bad_dataset_card_is_refused_in_one_sentence(tmp_path):
    """`datasets` raises TypeError for the first and AttributeError for the second."""
    for number, card in enumerate(("configs:\n- 3\n", "dataset_info:\n- 3\n")):
        directory = tmp_path / str(number)
        directory.mkdir()
        write_lines(directory / "x.jsonl", ROWS)
        (directory / "README.md").write_text(f"---\n{card}---\n")
        with pytest.raises(UserError, match="cannot be loaded"):
            load_rows(directory)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": 1}\n{"prompt": \n', "line 2"),
        ("a.jsonl", '{"prompt": 1}\n\n[3]\n', "line 3 is a JSON list"),
        ("a.jsonl", "\n", "no rows"),
        ("a.json", "[1, 2]", "list of objects"),
        ("a.json", "[{]", "not JSON"),
        ("a.parquet", "not parquet", "not a readable parquet"),
        ("a.txt", "a,b", "should end in"),
        ("a.csv", "", "no rows"),
        ("a.csv", "a,b\n", "no rows"),
        ("a.csv", "a,a\n1,2\n", "two columns named 'a'"),
        ("a.csv", "a,b\n1,2,3\n", "more cells than its first line"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "not a readable table: .*line 3"),
        ("a.csv", 'a,b\n"x,1\n', "not a readable table"),
        ("a.tsv", "a\tb\n\udcff\t1\n", "cannot be read: 'utf-8' codec"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=words) as caught:
        load_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_dataset_and_wrong_kinds(tmp_path, monkeypatch):
    for name in ("gone.jsonl", "./gone", "/gone", "~/gone"):
        with pytest.raises(UserError, match="no dataset file"):
            load_rows(name)
    with pytest.raises(UserError, match="sequence of dicts"):
        load_rows([1, 2])
    with pytest.raises(UserError, match="no rows"):
        load_rows([])
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_rows(tmp_path / "x")


def test_hub_dataset_without_network():
    code = "from estune.data.datasets import load_rows\nfrom estune.errors import UserError\n"
    code += "try: load_rows('nobody/nothing-here')\nexcept UserError as error: print(error)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "nobody/nothing-here" in done.stdout and "cannot be loaded" in done.stdout, done.stderr


def test_a_split_of_a_dict_of_datasets():
    splits = {"train": ROWS, "validation": ROWS[:2]}
    assert split_of(splits, ["test", "validation"], "dataset_test_split") == ("validation", ROWS[:2])
    with pytest.raises(
        UserError, match=r"dict has no split 'learn' \(it has train, validation\): set dataset_train_split"
    ):
        split_of(splits, ["learn"], "dataset_train_split")


# --- layouts

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "ok", "image": None}]}


@pytest.mark.parametrize(
    ("row", "layout", "prompt", "says"),
    [
        ({"prompt": "a", "question": "b"}, "prompt", "a", None),
        ({"question": "q", "answer": "#### 4"}, "question", "q",
         "the prompt is question, the reference answer is answer"),
        ({"question": [USER]}, "question", [USER], "the prompt is question"),
        ({"instruction": "i", "input": "x", "output": "o"}, "instruction", "i\n\nx",
         "the prompt is instruction with its input, the reference answer is output"),
        ({"instruction": "i", "input": "", "output": "o"}, "instruction", "i", None),
        ({"instruction": "i", "input": None}, "instruction", "i", None),
        ({"problem": "p", "solution": "s", "answer": 4}, "problem", "p",
         "the prompt is problem, the reference answer is solution"),
        ({"problem": "p", "messages": None}, "problem", "p", None),
        ({"messages": [USER, BOT, USER, BOT]}, "messages", [USER, BOT, USER],
         "the prompt is messages without the last answer, and the reference answer is answer"),
        ({"messages": [USER]}, "messages", [USER], "the prompt is messages"),
        ({"text": "t"}, None, None, None),
    ],
)  # fmt: skip
def test_a_layout_is_recognised_by_its_columns(row, layout, prompt, says):
    assert layout_of([row], {}) == layout
    if layout is None:
        return
    [laid_out] = with_prompts([row], layout, "train")
    assert {name: laid_out[name] for name in row} == row and laid_out["prompt"] == prompt
    assert set(laid_out) - set(row) <= {"prompt", "answer"}
    if says is not None:
        assert described(layout, laid_out) == says


def test_the_reference_answer_of_a_conversation_is_a_column():
    rows = [{"messages": [USER, {**BOT, "content": PARTS["content"]}]}, {"messages": [USER]}]
    assert [row["answer"] for row in with_prompts(rows, "messages", "train")] == ["hello ok", None]
    assert "answer" not in with_prompts(rows[1:], "messages", "train")[0]
    own = [{**row, "answer": 7} for row in rows]
    assert [row["answer"] for row in with_prompts(own, "messages", "train")] == [7, 7]


def test_several_layouts_need_a_choice():
    rows = [{"problem": "p", "solution": "s", "messages": [USER, BOT]}]
    with pytest.raises(
        UserError, match=r"messages or problem: choose with --column_mapping '\{\"messages\": \"messages\"\}' or"
    ):
        layout_of(rows, {})
    for mapping, layout in (
        ({"messages": "messages"}, "messages"), ({"problem": "problem"}, "problem"), ({"prompt": "problem"}, "prompt")
    ):  # fmt: skip
        assert layout_of(with_mapped_columns(rows, mapping), mapping) == layout
    chosen = {"question": "problem"}
    assert with_prompts(with_mapped_columns(rows, chosen), "question", "train")[0]["prompt"] == "p"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": None, "answer": "a"}, "its question is null"),
        ({"question": 4}, "its question is a int, not text"),
        ({"problem": {"en": "p"}}, "its problem is a dict, not text"),
        ({"instruction": [USER]}, "its instruction is a list, not text"),
        ({"instruction": "i", "input": 3}, "its input is a int, not text"),
        ({"messages": None}, "its messages are null"),
        ({"messages": "hello"}, "should be a list of objects with 'role' and 'content'"),
        ({"messages": ["hello"]}, "should be a list of objects"),
        ({"messages": [{"from": "human", "value": "x"}]}, "should be a list of objects"),
        ({"messages": []}, "no user turn"),
        ({"messages": [BOT]}, "no user turn"),
        ({"messages": [{"role": "system", "content": "s"}, BOT]}, "no user turn"),
        ({"messages": [USER, BOT, BOT]}, "end with two answers in a row"),
        ({"messages": [{"role": "human", "content": "x"}]}, "has the role 'human'; roles are system"),
        ({"messages": [USER, {"role": ["assistant"], "content": "x"}]}, "has the role"),
        ({"messages": [USER, {**BOT, "tool_calls": [{"name": "f"}]}]}, "calls a tool"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "its last answer should have a 'content'"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": 3}]}]}, "whose text is a int"),
    ],
)
def test_a_row_that_does_not_fit_its_layout_is_refused(row, words):
    layout = next(iter(row))
    for rows, index in (([row], 0), ([{**row, layout: row[layout]}] * 2, 0)):
        with pytest.raises(UserError, match=rf"^row {index} of the test split: .*{words}") as caught:
            with_prompts(rows, layout, "test")
        assert "\n" not in str(caught.value)


# --- the user's names of columns

MAPPED = [{"question": "q", "final": 4, "info": {"answer": 5}, "completion": "c", "completions": ["d"]}]


def test_a_column_keeps_its_name_and_gets_another():
    rows = with_mapped_columns(MAPPED, {"prompt": "question", "answer": "final", "reference": "completion"})
    assert rows == [{**MAPPED[0], "prompt": "q", "answer": 4, "reference": "c"}]
    assert with_mapped_columns(MAPPED, {}) == MAPPED
    assert hidden_columns(MAPPED, {}) == ["completions"] and hidden_columns(MAPPED, {"theirs": "completions"}) == []
    scored = [{"response": "r", "answer": 1}]
    assert with_mapped_columns(scored, {"completion": "response"}, completions=True)[0]["completion"] == "r"


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"prompt": "queston"}, "prompt to 'queston', and the dataset has no such column: it has .*mean 'question'"),
        ({"question": "prompt"}, r'second: {"prompt": "question"}'),
        ({"answer": "info.answer"}, "a value inside the column info has no name"),
        ({"answer": 'info["answer"]'}, "a value inside the column info has no name"),
        ({"prompt": "question", "problem": "question"}, "two names, prompt and problem"),
        ({"question": "final"}, "the dataset has a column 'question'"),
        ({"final": "final"}, "maps final to itself"),
        ({"prompts": "question"}, "cannot name a column 'prompts'"),
        ({"completions": "final"}, "cannot name a column 'completions'"),
        ({"completion": "final"}, "cannot name a column 'completion'"),
        ({"": ""}, "no such column"),
    ],
)
def test_a_name_that_cannot_stand_for_a_column_is_refused(mapping, words):
    with pytest.raises(UserError, match=words) as caught:
        with_mapped_columns(MAPPED, mapping)
    assert "\n" not in str(caught.value)


# --- batches


def test_batches_are_disjoint_within_an_epoch():
    batches = Batches(10, 3, seed=7)
    stream = [row for step in range(20) for row in batches.rows_for_step(step)]
    for epoch in range(6):
        assert sorted(stream[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]
    assert stream[:10] != [row for step in range(4) for row in Batches(10, 3, seed=8).rows_for_step(step)][:10]


def test_batches_depend_on_the_step_alone():
    one, other = Batches(11, 4, seed=3), Batches(11, 4, seed=3)
    forward = {step: one.rows_for_step(step) for step in range(30)}
    assert all(other.rows_for_step(step) == forward[step] for step in reversed(range(30)))
    code = "from estune.data.batches import Batches; print([Batches(11, 4, 3).rows_for_step(s) for s in (0, 17, 29)])"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(text) == [forward[0], forward[17], forward[29]]


def test_batch_larger_than_the_dataset_names_the_number():
    assert sorted(Batches(4, 4, 0).rows_for_step(5)) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="--batch_size 4"):
        Batches(4, 5, 0)


# --- prompts


def test_no_second_bos(tokenizer):
    messages = [{"role": "user", "content": "hello"}]
    assert builder(tokenizer).build({"prompt": messages}, 3).token_ids == (1, 2, 5, 3)
    assert builder(tokenizer).build({"prompt": "hello"}, 3).token_ids == (1, 5)  # its own string, the default BOS
    assert builder(tokenizer).build({"prompt": "<s> hello"}, 3).token_ids == (1, 5)


def test_when_templates_apply(tokenizer, plain_tokenizer):
    row = {"prompt": "hello"}
    assert builder(tokenizer, is_builtin_task=True).build(row, 0).text == "<s><user> hello <assistant> "
    assert builder(tokenizer, apply_chat_template="true").build(row, 0).text == "<s><user> hello <assistant> "
    assert builder(tokenizer).build(row, 0).text == "hello"
    assert builder(tokenizer, apply_chat_template="false", is_builtin_task=True).build(row, 0).text == "hello"
    assert builder(plain_tokenizer, is_builtin_task=True).build(row, 0).text == "hello"
    with pytest.raises(UserError, match="no chat template"):
        builder(plain_tokenizer, apply_chat_template="true")
    messages = {"prompt": [{"role": "user", "content": "hello"}]}
    with pytest.raises(UserError, match=r"row 4.*no chat template"):
        builder(plain_tokenizer).build(messages, 4)
    with pytest.raises(UserError, match=r"row 4.*apply_chat_template is false"):
        builder(tokenizer, apply_chat_template="false").build(messages, 4)


def test_system_prompt_prefix_and_template_arguments(tokenizer):
    options = {"system_prompt": "be brief", "response_prefix": "ok", "chat_template_kwargs": {"thinking": True}}
    user = {"role": "user", "content": "hello"}
    prompt = builder(tokenizer, **options).build({"prompt": [user]}, 0)
    assert prompt.text == "<s><system> be brief <user> hello <assistant> think ok"
    assert prompt.token_ids == (1, 4, 6, 7, 2, 5, 3, 8, 9)
    with_system = [{"role": "system", "content": "ok"}, user]
    assert "<system> be brief\n\nok <user>" in builder(tokenizer, **options).build({"prompt": with_system}, 0).text
    assert builder(tokenizer, **options).build({"prompt": "hello"}, 0).text == "be brief\n\nhellook"
    begun = [user, {"role": "assistant", "content": "ok"}]
    assert builder(tokenizer).build({"prompt": begun}, 0).text == "<s><user> hello <assistant> ok"


def test_context_limit_names_row_and_lengths(tokenizer):
    long = {"prompt": "hello " * 20}
    assert len(builder(tokenizer, max_context=29).build(long, 2).token_ids) == 21
    with pytest.raises(UserError, match=r"row 2: prompt \(21 tokens\) and completion \(up to 8\).*28"):
        builder(tokenizer, max_context=28).build(long, 2)


@pytest.mark.parametrize(
    "prompt",
    [None, 3, [], ["hello"], [{"role": "user"}], [{"role": "user", "content": [1]}], [{"role": "user", "content": []}]],
)
def test_bad_prompts(tokenizer, prompt):
    with pytest.raises(UserError, match="row 7"):
        builder(tokenizer).build({"prompt": prompt}, 7)


def test_parts_are_joined_as_the_chat_template_joins_them(tokenizer):
    """The template of `tokenizer` writes a list as Python does; the second one reads parts, the third also images."""
    from transformers import PreTrainedTokenizerFast

    text = "<s><user> hello ok <assistant> "
    assert builder(tokenizer).build({"prompt": [PARTS]}, 0).text == text
    assert builder(tokenizer).build({"prompt": [PARTS]}, 0).question == "hello ok"
    one = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    assert builder(tokenizer).build({"prompt": [one]}, 0) == builder(tokenizer).build(
        {"prompt": [{**one, "content": "hello"}]}, 0
    )
    reads = (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{% if 'image' in part %}IMAGE{% else %}{{ part.text }};{% endif %}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    for template, expected in ((reads.replace(";", ""), "<user>hellook"), (reads, "<user>hello ok")):
        other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
        assert builder(other).build({"prompt": [PARTS]}, 0).text == expected  # a separator that is text: not read
    system = {"role": "system", "content": PARTS["content"]}
    assert (
        "<system> be\n\nhello ok <user>"
        in builder(tokenizer, system_prompt="be").build({"prompt": [system, PARTS]}, 0).text
    )
    for part, words in (
        ({"type": "image", "url": "x"}, "a part of type 'image': only text parts"),
        ({"type": "input_audio", "input_audio": {}}, "a part of type 'input_audio'"),
        ({"type": "text", "text": None}, "whose text is a NoneType"),
        ({"text": "hello"}, "a part of type None"),
    ):
        with pytest.raises(UserError, match=f"row 5: a message of the prompt has .*{words}"):
            builder(tokenizer).build({"prompt": [{"role": "user", "content": [part]}]}, 5)


def test_refusals(tokenizer):
    with pytest.raises(UserError, match=r"row 1.*no tools here"):
        builder(tokenizer).build({"prompt": [{"role": "tool", "content": "x"}]}, 1)
    with pytest.raises(UserError, match="tools and images are not supported"):
        builder(tokenizer).build({"prompt": "hello", "images": ["x"]}, 1)
    with pytest.raises(UserError, match="empty"):
        builder(None).build({"prompt": ""}, 1)


def test_bytes_without_a_tokenizer():
    prompt = builder(None, is_builtin_task=True, response_prefix="!").build({"prompt": "é"}, 9)
    assert (prompt.row_id, prompt.text, prompt.token_ids) == (9, "é!", (0xC3, 0xA9, 0x21))


# --- rewards


def test_reward_inputs_and_columns():
    messages = [{"role": "user", "content": "b"}]
    rows = [{"prompt": "a", "target": 1, "completion": "x"}, {"prompt": messages, "other": 2, "completion_ids": []}]
    prompts, completions, columns = reward_inputs(rows, ["one", "two"], "> ")
    assert prompts == ["a", messages]
    assert completions == ["> one", [{"role": "assistant", "content": "> two"}]]
    assert columns == {"target": [1, None], "other": [None, 2]}


def test_missing_columns_are_named():
    def needs(completions, target, tests, weight=1.0, *, log_metric, **kwargs):
        return [0.0]

    rows = [{"prompt": "a", "target": 1}]
    check_columns([{**rows[0], "tests": 1}], [needs], ["needs"])
    with pytest.raises(UserError, match=r"lacks the column tests that reward needs needs .it has target."):
        check_columns(rows, [needs], ["needs"])
    with pytest.raises(UserError, match="reward length needs the column completion, which rewards never get"):
        check_columns([{"prompt": "a", "completion": "b"}], [lambda completion: [0.0]], ["length"])


def test_importing_data_and_rewards_imports_no_heavy_library():
    code = "import sys, estune.data.datasets, estune.rewards.pool\n"
    code += "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numba') if m in sys.modules])"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert text.strip() == "[]"


# --- prompts that a model cannot read


@pytest.mark.parametrize("templated", [False, True])
@pytest.mark.parametrize(
    ("size", "text", "token"), [(5, "hello", 5), (9, "be ok", 9), (2, "hello", None), (1, "<s> hello", 1)]
)
def test_a_token_without_an_embedding_is_refused_at_the_door(tokenizer, size, text, token, templated):
    prompt = [{"role": "user", "content": text}] if templated else text
    with pytest.raises(UserError, match=rf"row 7: the prompt holds token \d+ .* embedding has {size} rows") as refused:
        builder(tokenizer, vocab_size=size).build({"prompt": prompt}, 7)
    if token is not None and not templated:
        assert f"token {token} " in str(refused.value)
    assert builder(tokenizer, vocab_size=10).build({"prompt": prompt}, 7).token_ids


def test_tokens_of_a_prefix_and_of_a_system_prompt_count(tokenizer):
    for option in ("response_prefix", "system_prompt"):
        with pytest.raises(UserError, match=r"token 9 \('ok'\)"):
            builder(tokenizer, vocab_size=9, **{option: " ok"}).build({"prompt": "hello"}, 0)


@pytest.mark.parametrize("text", ["Make \ud83d.", "\udc80", "a \ud83d\ud83d b", "\udfff" * 3])
@pytest.mark.parametrize("as_messages", [False, True])
def test_half_a_surrogate_pair_is_refused_with_its_row(tokenizer, text, as_messages):
    for inner in (tokenizer, None):
        if as_messages and inner is None:
            continue
        prompt = [{"role": "user", "content": text}] if as_messages else text
        with pytest.raises(UserError, match=r"row 3: the prompt is not Unicode text: it holds '.ud"):
            builder(inner).build({"prompt": prompt}, 3)


def test_a_tokenizer_that_raises_is_reported_with_the_row(tokenizer):
    class Broken:
        bos_token = None
        chat_template = None

        def encode(self, text, **_):
            raise ZeroDivisionError("no such token")

    with pytest.raises(UserError, match="row 2: the tokenizer refuses the prompt: ZeroDivisionError: no such token"):
        builder(Broken()).build({"prompt": "a"}, 2)


@pytest.mark.parametrize("value", [[1], "x", {"a": 1}])
def test_a_column_of_images_or_tools_is_refused_if_it_says_anything(tokenizer, value):
    import numpy as np

    for name in ("image", "images", "tools"):
        for there in (value, np.zeros(2)):
            with pytest.raises(UserError, match=f"row 0 has a column '{name}'"):
                builder(tokenizer).build({"prompt": "hello", name: there}, 0)
        for nothing in (None, [], "", np.zeros(0)):
            assert builder(tokenizer).build({"prompt": "hello", name: nothing}, 0)
