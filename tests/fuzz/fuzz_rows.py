"""Domain A: datasets of every format with columns of every type, and prompts in columns of every layout.

A run on such a dataset succeeds or is refused in one sentence, and its rewards receive the values of the dataset.
Resumed on equal values, it ends in the bytes of an uninterrupted run. Resumed on a dataset with one changed value, it
is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from fuzz_forks import Case, Fault, Forks, contents, differing, label, refusal
from fuzz_values import ARROW, JSON, PYTHON, arrow_array, rows_of, value

PROGRAMS = Path(__file__).resolve().parent / "fuzz_programs.py"
REWARDS = '''
"""A reward that records its columns and depends on them, and a reward that ignores them."""

import json
from zlib import crc32


def _texts(completions):
    return [text if isinstance(text, str) else text[0]["content"] for text in completions]


def _see(columns):
    with open("seen.jsonl", "a") as file:
        file.write(json.dumps({name: [repr(v) for v in values] for name, values in columns.items()}) + "\\n")


KEYWORDS = ("completion_ids", "trainer_state", "log_extra", "log_metric")


def reads(prompts, completions, **others):
    columns = {name: values for name, values in others.items() if name not in KEYWORDS}
    _see(columns)
    rows = zip(*columns.values()) if columns else [()] * len(completions)
    return [len(text) + crc32(repr(row).encode("utf-8", "backslashreplace")) % 7 / 10
            for text, row in zip(_texts(completions), rows)]


def ignores(completions, **_):
    return [len(text) + sum(map(ord, text)) % 7 / 10 for text in _texts(completions)]
'''
FILES = ("jsonl", "json", "parquet")  # one file; with a slash: a directory with one file for each split
SOURCES = (*FILES, "jsonl/", "parquet/", "save_to_disk", "save_to_disk of a dict", "list of dicts", "Dataset of dicts",
           "Dataset of arrow")  # fmt: skip
QUIRKS = {
    "jsonl": ("BOM", "CRLF", "blank lines", "a key twice", "no ASCII", "keys missing where null"),
    "json": ("BOM", "CRLF", "a key twice", "no ASCII", "keys missing where null"),
    "parquet": ("a column twice", "row groups", "no compression"),
}
NAMES = ("answer", "a b", "", "class", "1", "caf\u00e9", "prompts", "completions", "completion", "completion_ids",
         "trainer_state", "log_extra", "log_metric", "self", "args", "tools", "images", "row_id", "\U0001f600",
         "numbers", "__class__", "a.b", "None")  # fmt: skip
# Name of the column that makes the prompt -> the run's column_mapping.
LAYOUTS = {"prompt": {}, "question": {}, "problem": {}, "instruction": {}, "messages": {}, "text": {"prompt": "text"},
           "input": {"problem": "input"}}  # fmt: skip
RESERVED = ("prompts", "completions", "completion", "completion_ids", "trainer_state", "log_extra", "log_metric")
MESSAGES = ("[{'role': 'user', 'content': 'a'}]", "[{'role': 'user'}]", "[]", "[{'role': 'user', 'content': None}]",
            "[{'role': 'system', 'content': 's'}, {'role': 'user', 'content': ''}]", "[1]",
            "[{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}]}]",
            "[{'role': 'user', 'content': [{'type': 'image'}]}]", "[{'role': 'user', 'content': [[]]}]",
            "[{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]",
            "[{'role': [], 'content': 'a'}]", "{'role': 'user'}")  # fmt: skip

any_text = st.text(st.characters(codec=None), max_size=12).map(ascii)  # of every plane, with lone surrogates
plain_text = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=5).map(ascii)


def column_of(kinds: dict[str, list[str]], n_rows: int, name: st.SearchStrategy[str]) -> st.SearchStrategy[Case]:
    """Return the strategy for a column: its name, its kind, and for each row a value of that kind or None."""

    def filled(kind: str) -> st.SearchStrategy[Case]:
        values = st.sampled_from(kinds[kind])
        if kind in ("text", "string", "large string") and "text" in kinds:
            values = values | any_text
        value = values | values | values | st.just("None")
        return st.fixed_dictionaries(
            {"name": name, "kind": st.just(kind), "values": st.lists(value, min_size=n_rows, max_size=n_rows)}
        )

    return st.sampled_from(sorted(kinds)).flatmap(filled)


def kinds_of(source: str) -> dict[str, list[str]]:
    """Return the kinds of values that a source can hold, with the values of each kind."""
    if source in ("jsonl", "json", "jsonl/"):
        return JSON
    if source in ("list of dicts", "Dataset of dicts"):
        return JSON | PYTHON
    return {kind: values for kind, (_, values) in ARROW.items()}


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    """Return a case."""
    source = draw(st.sampled_from(SOURCES))
    n_rows = draw(st.sampled_from([1, 2, 3, 4, 5, 9] if draw(st.integers(0, 9)) else [0]))
    kinds = kinds_of(source)
    if draw(st.integers(0, 3)):
        prompts = st.lists(plain_text, min_size=n_rows, max_size=n_rows)
    elif "text" in kinds:
        odd = any_text | st.sampled_from(["''", "' '", "'\\n'", "None", "5", "True", *MESSAGES])
        prompts = st.lists(plain_text | odd, min_size=n_rows, max_size=n_rows)
    else:
        odd = st.sampled_from(["''", "' '", "'\\x00'", "None", "'\\u202e'"])
        prompts = st.lists(plain_text | odd, min_size=n_rows, max_size=n_rows)
    kind = "text" if "text" in kinds else "string"
    layout = "prompt" if draw(st.integers(0, 2)) else draw(st.sampled_from(sorted(LAYOUTS)))
    first = {"name": layout, "kind": kind, "values": draw(prompts)}
    usual = st.sampled_from(["answer", "target", "numbers", "other"])
    name = usual if draw(st.integers(0, 3)) else st.sampled_from(NAMES) | any_text.map(value)
    others = draw(st.lists(column_of(kinds, n_rows, name), max_size=3, unique_by=lambda column: column["name"]))
    columns = [first, *others]
    suffix = source.strip("/")
    changed = draw(st.integers(0, len(columns) - 1))
    replacement = plain_text if changed == 0 else st.sampled_from([*kinds[columns[changed]["kind"]], "None"])
    return {
        "source": source,
        "columns": columns,
        "quirks": draw(st.lists(st.sampled_from(QUIRKS[suffix]), max_size=2, unique=True)) if suffix in QUIRKS else [],
        "batch_size": draw(st.integers(1, n_rows + 1) if draw(st.integers(0, 3)) else st.just(n_rows or 1)),
        "reward": draw(st.sampled_from(["reads", "ignores"])),
        "isolation": draw(st.sampled_from(["inline", "inline", "process"])),
        "change": {
            "column": changed,
            "row": draw(st.integers(0, max(0, n_rows - 1))),
            "value": draw(replacement),
        },
    }


SHORT = 25  # cases in `make test-e2e`
cases = drawn()


def check(case: Case, place: Path, forks: Forks) -> str:
    """Train on the dataset, then resume on equal values or on a changed one; return the outcome."""
    (place / "rewards.py").write_text(REWARDS)
    try:
        write(case, place)
    except Exception as error:  # the rows fit no such dataset, so the case does not test estune
        return f"{case['source']}: cannot be made ({type(error).__name__})"
    sentence = train(case, place, forks, "run", 1)
    if sentence is not None:
        return f"{case['source']}: refused: {label(sentence)}"
    check_seen(case, place)
    changed = with_change(case)
    if not case["columns"][0]["values"]:
        raise Fault("a dataset without rows is trained on")
    if changed is not None:
        try:
            write(changed, place)
        except Exception as error:
            return f"{case['source']}: cannot be changed so ({type(error).__name__})"
        if train(changed, place, forks, "run", 2) is None:
            raise Fault(f"a resume on a changed dataset is accepted: {change_text(case)}")
        return f"{case['source']}: trains, and a change is refused"
    write(case | {"quirks": [*case["quirks"], "rewritten"]}, place)
    sentence = train(case, place, forks, "run", 2)
    if sentence is not None:
        raise Fault(f"a resume on equal values is refused: {sentence}")
    sentence = train(case, place, forks, "whole", 2)
    if sentence is not None:
        raise Fault(f"a second run on the same dataset is refused: {sentence}")
    resumed, whole = contents(place / "run"), contents(place / "whole")
    expected = {"journal.jsonl", "es_config.json", "README.md", "origin.json"}  # hold the run's name or first max_steps
    if names := set(differing(resumed, whole)) - expected:
        raise Fault(f"the resumed run differs from the uninterrupted one: {sorted(names)}")
    if steps(place / "run") != steps(place / "whole"):
        raise Fault("the steps of the resumed run differ from those of the uninterrupted one")
    return f"{case['source']}: trains, and resumes on equal values"


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """Return the journal's steps without their hashes."""
    records = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [{name: v for name, v in record.items() if name != "hash"} for record in records if record["kind"] == "step"]


def train(case: Case, place: Path, forks: Forks, directory: str, max_steps: int) -> str | None:
    """Train or resume up to ``max_steps``; return the sentence of a refusal, or None."""
    resume = (place / directory / "journal.jsonl").exists()
    options = dict(model="tiny", reward_funcs=["rewards.py:" + case["reward"]], reward_isolation=case["isolation"],
                   batch_size=case["batch_size"], population_size=2, sigma=0.05, max_completion_length=2,
                   report_to=["none"], num_threads=1, reward_workers="auto",
                   column_mapping=LAYOUTS[case["columns"][0]["name"]])  # fmt: skip
    what = f"the {'resume' if resume else 'run'} on {case['source']} {case['quirks']}"
    if is_python(case):
        (place / "case.json").write_text(json.dumps(case | {"options": options}))
        words = ["train", directory, max_steps, *(["resume"] if resume else [])]
        return refusal(forks.run(words, place, script=PROGRAMS), what)
    words = [word for name, v in options.items() if not isinstance(v, dict)
             for word in (f"--{name}", *(v if isinstance(v, list) else [v]))]  # fmt: skip
    words += ["--column_mapping", json.dumps(options["column_mapping"])]
    words += ["--dataset_name", path_of(case), "--max_steps", max_steps, "--output_dir", directory]
    return refusal(forks.run(["train", *words, *(["--resume"] if resume else [])], place), what)


# --- writing datasets -------------------------------------------------------------------------------------------------


def is_python(case: Case) -> bool:
    """Return whether the rows are passed in Python instead of a file."""
    return case["source"] in ("list of dicts", "Dataset of dicts", "Dataset of arrow")


def path_of(case: Case) -> str:
    """Return the value of ``--dataset_name``."""
    source = case["source"]
    return f"./rows.{source}" if source in FILES else "./rows"


def write(case: Case, place: Path) -> None:
    """Write the dataset of a case; nothing for rows that are passed in Python."""
    if is_python(case):
        return
    path = place / path_of(case)
    if path.is_dir():
        shutil.rmtree(path)
    if case["source"].endswith("/"):
        path.mkdir()
        write_file(case, path / f"train.{case['source'].strip('/')}")
    elif path.suffix:
        write_file(case, path)
    else:
        import datasets

        datasets.disable_progress_bars()
        saved = datasets.Dataset(table_of(case))
        dataset = datasets.DatasetDict(train=saved) if case["source"] == "save_to_disk of a dict" else saved
        dataset.save_to_disk(str(path))


def write_file(case: Case, path: Path) -> None:
    """Write a dataset as one file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        quirks, table = case["quirks"], table_of(case)
        if "a column twice" in quirks and len(case["columns"]) > 1:
            table = table.append_column(case["columns"][-1]["name"], table.column(0))
        rewritten = "rewritten" in quirks
        pyarrow.parquet.write_table(
            table, path, row_group_size=1 if ("row groups" in quirks) != rewritten else None,
            compression="none" if ("no compression" in quirks) != rewritten else "snappy",
        )  # fmt: skip
        return
    path.write_bytes(json_text(case, path.suffix == ".json"))


def table_of(case: Case) -> Any:
    """Return a dataset as an Arrow table."""
    import pyarrow as pa

    columns = case["columns"]
    return pa.table(
        [arrow_array(column["kind"], column["values"]) for column in columns], [column["name"] for column in columns]
    )


def json_text(case: Case, as_list: bool) -> bytes:
    """Return a dataset as JSON lines, or as a list of objects."""
    quirks = case["quirks"]
    rows = rows_of(case["columns"])
    if "keys missing where null" in quirks:
        rows = [{name: v for name, v in row.items() if v is not None} for row in rows]
    space = {"separators": (",  ", ":  ")} if "rewritten" in quirks else {}
    lines = [json.dumps(row, ensure_ascii="no ASCII" not in quirks, **space) for row in rows]
    if "a key twice" in quirks:
        lines = [line.replace("{", '{"prompt": "first", ', 1) for line in lines]
    end = "\r\n" if "CRLF" in quirks else "\n"
    text = f"[{(',' + end).join(lines)}]" if as_list else "".join(line + end for line in lines)
    if "blank lines" in quirks:
        text = end + text.replace(end, end * 2)
    return (b"\xef\xbb\xbf" if "BOM" in quirks else b"") + text.encode("utf-8", "surrogatepass")


# --- the change, and the columns of the rewards -----------------------------------------------------------------------


def with_change(case: Case) -> Case | None:
    """Return the case with one value changed; None if the new value equals the old one."""
    change = case["change"]
    column = case["columns"][change["column"]]
    if not column["values"]:
        return None
    old, new = value(column["values"][change["row"]]), value(change["value"])
    if type(old) is type(new) and repr(old) == repr(new):
        return None
    values = list(column["values"])
    values[change["row"]] = change["value"]
    columns = list(case["columns"])
    columns[change["column"]] = column | {"values": values}
    return case | {"columns": columns}


def change_text(case: Case) -> str:
    """Return a description of the change."""
    change = case["change"]
    column = case["columns"][change["column"]]
    return f"{column['name']!r} ({column['kind']}): {column['values'][change['row']]} -> {change['value']}"


def check_seen(case: Case, place: Path) -> None:
    """Check that the rewards received every column, with values that the column holds.

    Raises:
        Fault: they did not.
    """
    path = place / "seen.jsonl"
    if not path.exists() or case["source"] == "Dataset of dicts" or "a column twice" in case["quirks"]:
        return  # `datasets` converts Python's values to its own types
    for line in path.read_text().splitlines():
        seen = json.loads(line)
        for column in case["columns"]:
            name = column["name"]
            if name == "prompt" or name in RESERVED:
                continue
            held = {repr(v) for v in held_values(case, column)}
            if name not in seen and "keys missing where null" in case["quirks"] and set(held) <= {"None"}:
                continue  # a key that no row has is no column
            if name not in seen:
                raise Fault(f"a reward did not receive column {name!r}")
            if not set(seen[name]) <= held:
                raise Fault(f"column {name!r} ({column['kind']}) holds {sorted(held)}, a reward received {seen[name]}")


def held_values(case: Case, column: Case) -> list[Any]:
    """Return the values of a column as the dataset's reader returns them."""
    if column["kind"] in ARROW and case["source"] not in ("jsonl", "json", "jsonl/", "list of dicts"):
        held: list[Any] = arrow_array(column["kind"], column["values"]).to_pylist()
        return held
    values = [value(expression) for expression in column["values"]]
    return values if case["source"] == "list of dicts" else json.loads(json.dumps(values))
