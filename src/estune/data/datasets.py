"""From rows to prompts: reading datasets, the rows of a step, templating and tokenising, and what rewards are given.

A row is a dict with "prompt" (a string, or a list of chat messages) and any other columns; those go to the reward
functions. Text is templated and tokenised once, here; engines see token ids only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from estune.errors import UserError
from estune.es.population import ROW_PERSON, derive_seed
from estune.es.types import Prompt
from estune.identity import NoIdentityError, encode
from estune.rewards.worker import TRL_KEYWORDS, required_keywords

Row = dict[str, Any]

NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL's rule: every other column goes to the rewards
UNSUPPORTED = ("tools", "image", "images")  # columns that TRL gives to the model; empty ones do no harm


# --- reading ----------------------------------------------------------------------------------------------------------


def load_rows(source: Any, config: str | None = None, split: str = "train") -> list[Row]:
    """Return the rows of a dataset as a list of dicts.

    ``source`` is a JSONL, JSON or parquet file, a directory (saved by ``datasets``, or with files named after their
    splits, or any other that ``load_dataset`` reads), a dataset id on the hub, or rows in memory: a list of dicts, a
    ``datasets.Dataset``, or another sequence with a length. Every row gets every column, None where it had none. What
    has no splits (`has_splits`) gives its rows whatever ``split`` says: refusing names there is the caller's.

    Raises:
        UserError: it does not exist, cannot be read, has no rows, or cannot have the configuration ``config``.
    """
    if not isinstance(source, (str, Path)):
        rows = _rows_in_memory(source)
        source = "the dataset"
    else:
        path = Path(source).expanduser()
        if path.is_file():
            _refuse_config(path, config, "is one file")
            rows = _read_file(path)
        elif path.is_dir():
            rows = _read_directory(path, config, split)
        elif path.suffix in READERS or str(source).startswith((".", "/", "~")):
            raise UserError(f"there is no dataset file or directory {source}")
        else:
            rows = _from_hub(str(source), config, split)
    if not rows:
        raise UserError(f"{source} has no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        if not isinstance(name, str):
            raise UserError(f"{source} has a column named {name!r}: the name of a column must be a string")
    return [row if len(row) == len(names) else {name: row.get(name) for name in names} for row in rows]


def _rows_in_memory(source: Any) -> list[Row]:
    """Return rows that were given from Python.

    Raises:
        UserError: they are a stream, whose end nobody knows, or no dicts.
    """
    if isinstance(source, Mapping):
        raise UserError(
            f"a {type(source).__name__} holds several datasets ({', '.join(map(str, source.keys()))}): give one of them"
        )
    try:
        count = len(source)
    except TypeError:
        raise UserError(
            f"a dataset of type {type(source).__name__} has no length: the order of a run's rows is drawn from all of "
            "them, so a stream is not read; give its rows as a list, such as list(itertools.islice(stream, 10_000))"
        ) from None
    # A sequence such as torch's map-style dataset may answer any index and so never end by itself.
    with _told("the dataset cannot be read"):
        rows = source.to_list() if hasattr(source, "to_list") else list(itertools.islice(source, count))
    if not all(isinstance(row, dict) for row in rows):
        raise UserError("a dataset must be a sequence of dicts, one per row")
    return rows


def has_splits(source: Any) -> bool:
    """Whether ``source`` can hold splits: not rows in memory, one file, or one plain ``Dataset.save_to_disk``."""
    if not isinstance(source, (str, Path)):
        return False
    path = Path(source).expanduser()
    return not path.is_file() and not _is_one_saved(path)


def _is_one_saved(path: Path) -> bool:
    return (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file()


def _read_file(path: Path) -> list[Row]:
    if path.suffix not in READERS:
        raise UserError(f"{path} is no dataset: its name should end in {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_lines(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except _RepeatedName as error:
                raise UserError(f"{path} line {number} gives {error} twice") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number} is a JSON {type(row).__name__}, not an object")
            rows.append(row)
    return rows


class _RepeatedName(ValueError):
    """An object of a JSON text has one name twice, of which JSON's reader would forget the first value."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedName(repr(next(name for name in names if names.count(name) > 1)))
    return values


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("{"):  # JSON lines by another name
        return _read_lines(path)
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except _RepeatedName as error:
        raise UserError(f"{path} has a row that gives {error} twice") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} should hold a list of objects, one per row")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{path} has two columns named {name!r}")
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable parquet file: {' '.join(str(error).split())[:300]}") from error
    return rows


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _read_directory(path: Path, config: str | None, split: str) -> list[Row]:
    for suffix in READERS:
        if config is None and (path / f"{split}{suffix}").is_file():
            return _read_file(path / f"{split}{suffix}")
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        return _from_hub(str(path), config, split)
    _refuse_config(path, config, "was saved by save_to_disk")
    import datasets

    with _told(f"dataset {path} cannot be loaded"):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise UserError(f"{path} has no split {split!r} (it has {', '.join(saved)})")
            saved = saved[split]
        rows: list[Row] = saved.to_list()
    return rows


def _refuse_config(path: Path, config: str | None, why: str) -> None:
    if config is not None:
        raise UserError(f"dataset {path} {why}: it has no configurations, so dataset_config {config} cannot apply")


def _from_hub(name: str, config: str | None, split: str) -> list[Row]:
    import datasets

    with _told(f"dataset {name} (split {split}) cannot be loaded"):
        rows: list[Row] = datasets.load_dataset(name, config, split=split).to_list()
    return rows


@contextlib.contextmanager
def _told(sentence: str) -> Iterator[None]:
    """Tell an error of `datasets` in one sentence.

    They have no common class: a bad card ends in TypeError or AttributeError, a damaged state in KeyError, others in
    OSError, ValueError, RuntimeError, YAMLError, ArrowException, or DatasetsError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{sentence}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


# --- the rows of a step -----------------------------------------------------------------------------------------------


class Batches:
    """Which rows each step uses: a pure function of (run seed, step), without replacement within an epoch.

    An epoch is all rows, sorted by a hash of (run seed, epoch, row). Step k takes positions k*B to (k+1)*B of the
    epochs laid end to end.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= n_rows:
            raise UserError(f"batch_size {batch_size} does not fit {n_rows} rows: use --batch_size {n_rows} or fewer")
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self._orders: dict[int, list[int]] = {}  # the last two epochs used; a batch spans at most two

    def rows_for_step(self, step: int) -> list[int]:
        """Return the row ids of a step, (B,)."""
        first = step * self.batch_size
        positions = range(first, first + self.batch_size)
        return [self._order(position // self.n_rows)[position % self.n_rows] for position in positions]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = sorted(
                range(self.n_rows), key=lambda row: derive_seed(self.seed, epoch, row, person=ROW_PERSON)
            )
        return self._orders[epoch]


# --- prompts ----------------------------------------------------------------------------------------------------------


class PromptBuilder:
    """Makes `Prompt`s of rows, once per row: chat template, system prompt, response prefix, tokens.

    ``apply_chat_template``: ``auto`` templates message lists, and plain strings of built-in tasks where the tokenizer
    has a template (your own strings stay as they are, as in TRL); ``true`` templates strings as one user message too;
    ``false`` never templates. ``tokenizer`` None (the toy engine) makes one token of each UTF-8 byte. Every token must
    be one of the model's, which has ``vocab_size`` of them (None: any).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        apply_chat_template: str,
        chat_template_kwargs: dict[str, Any] | None,
        system_prompt: str | None,
        response_prefix: str,
        max_context: int | None,  # tokens
        max_completion_length: int,  # tokens
        is_builtin_task: bool,
        vocab_size: int | None = None,  # rows of the model's input embedding
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template_kwargs = chat_template_kwargs or {}
        self._system_prompt, self._response_prefix = system_prompt, response_prefix
        self._max_context, self._max_completion_length = max_context, max_completion_length
        self._vocab_size = vocab_size
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._template_messages = apply_chat_template != "false"
        self._template_strings = apply_chat_template == "true" or (
            apply_chat_template == "auto" and is_builtin_task and self._has_template
        )
        if apply_chat_template == "true" and not self._has_template:
            raise UserError("apply_chat_template is true, but the tokenizer has no chat template")

    def build(self, row: Row, row_id: int) -> Prompt:
        """Return the prompt of a row.

        Raises:
            UserError: the row cannot be made into a prompt, or leaves no room for a completion.
        """
        prompt: Any = row.get("prompt")
        for column in UNSUPPORTED:
            if _is_there(row.get(column)):
                raise UserError(f"row {row_id} has a column {column!r}: tools and images are not supported")
        messages: list[dict[str, Any]]
        text: str
        if isinstance(prompt, str):
            templated = self._template_strings
            messages = [{"role": "user", "content": prompt}]
        elif _are_messages(prompt):
            templated, messages = True, prompt
            if not self._template_messages or not self._has_template:
                why = "apply_chat_template is false" if self._has_template else "the tokenizer has no chat template"
                raise UserError(f"row {row_id}: the prompt is a list of messages, but {why}")
        else:
            raise UserError(f"row {row_id}: 'prompt' should be a string, or messages with 'role' and a text 'content'")
        if templated:
            text = self._templated(messages, row_id)
        else:
            text = f"{self._system_prompt}\n\n{prompt}" if self._system_prompt else prompt
        text += self._response_prefix
        token_ids = self._token_ids(text, templated, row_id)
        self._refuse_unknown_tokens(token_ids, row_id)
        if not token_ids:
            raise UserError(f"row {row_id}: the prompt is empty")
        if self._max_context is not None and len(token_ids) + self._max_completion_length > self._max_context:
            raise UserError(
                f"row {row_id}: prompt ({len(token_ids)} tokens) and completion (up to {self._max_completion_length}) "
                f"are longer than the model's context of {self._max_context} tokens"
            )
        asked = [message["content"] for message in messages if message["role"] == "user"] or [messages[-1]["content"]]
        return Prompt(row_id, text, token_ids, asked[-1])

    def _templated(self, messages: list[dict[str, Any]], row_id: int) -> str:
        if self._system_prompt and messages[0]["role"] == "system":  # many templates allow one system message only
            merged = f"{self._system_prompt}\n\n{messages[0]['content']}"
            messages = [{**messages[0], "content": merged}, *messages[1:]]
        elif self._system_prompt:
            messages = [{"role": "system", "content": self._system_prompt}, *messages]
        unfinished = messages[-1]["role"] == "assistant"  # as in TRL, the model goes on with it
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not unfinished,
                continue_final_message=unfinished,
                **self._chat_template_kwargs,
            )
        except Exception as error:  # a template is the model's own program: it raises, divides, and calls what it likes
            raise UserError(f"row {row_id}: the chat template refuses the prompt: {error}") from error
        return text

    def _token_ids(self, text: str, templated: bool, row_id: int) -> tuple[int, ...]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"row {row_id}: the prompt is no text: it holds {text[error.start]!r}, half of a surrogate pair"
            ) from None
        if self._tokenizer is None:
            return tuple(text.encode())
        bos = getattr(self._tokenizer, "bos_token", None)
        try:
            if templated or (bos and text.startswith(bos)):  # its special tokens are in the text: no second BOS
                return tuple(self._tokenizer.encode(text, add_special_tokens=False))
            return tuple(self._tokenizer.encode(text))
        except Exception as error:  # a tokenizer is the model's own program, as a template is
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"row {row_id}: the tokenizer refuses the prompt: {type(error).__name__}: {reason}"
            ) from error

    def _refuse_unknown_tokens(self, token_ids: Sequence[int], row_id: int) -> None:
        """Refuse tokens that the model has no embedding of, as those that a user added to the tokenizer alone."""
        size = self._vocab_size
        unknown = [token for token in token_ids if token < 0 or (size is not None and token >= size)]
        if unknown:
            text = self._tokenizer.convert_ids_to_tokens(unknown[0]) if self._tokenizer is not None else unknown[0]
            raise UserError(
                f"row {row_id}: the prompt holds token {unknown[0]} ({text!r}), and the model's embedding has {size} "
                "rows: resize the embedding to the tokenizer, or take the token out of it"
            )


def _is_there(value: Any) -> bool:
    """Return whether a column says anything: not None, not empty; an array or an image has no truth of its own."""
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def _are_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(m, dict) and "role" in m and isinstance(m.get("content"), str) for m in prompt)
    )


# --- what rewards are given -------------------------------------------------------------------------------------------


def reward_inputs(
    rows: Sequence[Row], completions_text: Sequence[str], response_prefix: str
) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Return (prompts, completions, columns) for reward functions, one entry per completion; row i has completion i.

    Prompts are as in the row. Completions start with the response prefix; they are strings for string prompts and
    lists with one assistant message for conversational ones. A column that a row lacks is None there.
    """
    prompts = [row["prompt"] for row in rows]
    completions: list[Any] = []
    for prompt, text in zip(prompts, completions_text, strict=True):
        whole = response_prefix + text
        completions.append(whole if isinstance(prompt, str) else [{"role": "assistant", "content": whole}])
    columns = {name: [row.get(name) for row in rows] for name in column_names(rows)}
    return prompts, completions, columns


def shared_prompts(trained: Sequence[Row], held_out: Sequence[Row]) -> int:
    """Return how many held-out rows have a prompt that is trained on, word for word."""

    def key(row: Row) -> bytes:
        try:
            return encode(row["prompt"])
        except NoIdentityError:  # no prompt that any row can have in common with another
            return b""

    known = {key(row) for row in trained} - {b""}
    return sum(key(row) in known for row in held_out)


def column_names(rows: Sequence[Row]) -> list[str]:
    """Return the columns that reward functions are given, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in NOT_COLUMNS))


def check_columns(rows: Sequence[Row], reward_funcs: Sequence[Callable[..., Any]], names: Sequence[str]) -> None:
    """Refuse a dataset without the columns that a reward function has to be given (parameters with no default).

    Raises:
        UserError: names the missing columns and the function.
    """
    columns = column_names(rows)
    for function, name in zip(reward_funcs, names, strict=True):
        missing = [word for word in required_keywords(function) if word not in (*TRL_KEYWORDS, *columns)]
        if missing:
            raise UserError(
                f"the dataset lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} that reward {name} "
                f"needs (it has {', '.join(columns) or 'only prompts'})"
            )
