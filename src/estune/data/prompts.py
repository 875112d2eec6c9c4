"""Rows to prompts: chat template, system prompt, response prefix, tokens. Engines receive token ids only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from estune.data.datasets import Row
from estune.data.layouts import text_of
from estune.errors import UserError
from estune.es.types import Prompt

UNSUPPORTED = ("tools", "image", "images")  # columns that TRL passes to the model; they must be empty


class PromptBuilder:
    """Builds the `Prompt` of a row: chat template, system prompt, response prefix, tokens.

    ``apply_chat_template`` selects the prompts that are templated:

    * ``auto``: message lists, and the strings of built-in tasks if the tokenizer has a template. Other strings are not
      templated, as in TRL.
    * ``true``: message lists and strings; a string becomes one user message.
    * ``false``: none.

    A message's content is text, or a list of text parts. The chat template joins the parts if it reads them; otherwise
    they are joined by a space, as in transformers' server.

    Without a tokenizer (toy engine) each UTF-8 byte is one token. Token ids must be below ``vocab_size`` (None: any
    id).

    Raises:
        UserError: ``apply_chat_template`` is ``true``, and the tokenizer has no chat template.
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
        self._template_reads_parts: bool | None = None  # None: no message with parts was seen yet
        self._template_messages = apply_chat_template != "false"
        self._template_strings = apply_chat_template == "true" or (
            apply_chat_template == "auto" and is_builtin_task and self._has_template
        )
        if apply_chat_template == "true" and not self._has_template:
            raise UserError("apply_chat_template is true, but the tokenizer has no chat template")

    def build(self, row: Row, row_id: int) -> Prompt:
        """Return the prompt of a row.

        Raises:
            UserError: the row has no valid prompt, or its prompt leaves no room for a completion.
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
            templated, messages = True, self._with_text(prompt, row_id)
            if not self._template_messages or not self._has_template:
                why = "apply_chat_template is false" if self._has_template else "the tokenizer has no chat template"
                advice = "" if self._has_template else "; give prompts as text, or use a model with a chat template"
                raise UserError(f"row {row_id}: the prompt is a list of messages, but {why}{advice}")
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
        asked = [message for message in messages if message["role"] == "user"] or messages
        return Prompt(row_id, text, token_ids, text_of(asked[-1]["content"], f"row {row_id}"))

    def _with_text(self, messages: list[dict[str, Any]], row_id: int) -> list[dict[str, Any]]:
        """Return messages whose text parts are joined, unless the chat template reads parts itself.

        Raises:
            UserError: a part is an image or another thing that is no text.
        """
        if all(isinstance(message["content"], str) for message in messages):
            return messages
        where = f"row {row_id}: a message of the prompt"
        texts = [text_of(message["content"], where) for message in messages]
        if self._template_reads_parts is None:
            self._template_reads_parts = self._has_template and self._joins_parts()
        if not self._template_reads_parts:
            return [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
        # `datasets` fills the keys of other parts with None, and templates ask whether a part has the key `image`.
        return [
            message if isinstance(message["content"], str)
            else {**message, "content": [{"type": "text", "text": part["text"]} for part in message["content"]]}
            for message in messages
        ]  # fmt: skip

    def _joins_parts(self) -> bool:
        """Return whether the chat template writes two text parts one after the other, and not as a Python list."""
        marks = ("FIRSTPART", "SECONDPART")
        parts = [{"type": "text", "text": mark} for mark in marks]
        try:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], tokenize=False, **self._chat_template_kwargs
            )
        except Exception:  # a template is a program that comes with the model and may raise anything
            return False
        between, second, _ = text.partition(marks[0])[2].partition(marks[1])
        return bool(second) and not between.strip()

    def _templated(self, messages: list[dict[str, Any]], row_id: int) -> str:
        if self._system_prompt and messages[0]["role"] == "system":  # many templates allow one system message only
            merged = f"{self._system_prompt}\n\n{text_of(messages[0]['content'], f'row {row_id}')}"
            messages = [{**messages[0], "content": merged}, *messages[1:]]
        elif self._system_prompt:
            messages = [{"role": "system", "content": self._system_prompt}, *messages]
        unfinished = messages[-1]["role"] == "assistant"  # as in TRL, the model continues this message
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not unfinished,
                continue_final_message=unfinished,
                **self._chat_template_kwargs,
            )
        except Exception as error:  # a template is a program that comes with the model and may raise anything
            raise UserError(f"row {row_id}: the chat template refuses the prompt: {error}") from error
        return text

    def _token_ids(self, text: str, templated: bool, row_id: int) -> tuple[int, ...]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"row {row_id}: the prompt is not Unicode text: it holds {text[error.start]!r}, half a surrogate pair"
            ) from None
        if self._tokenizer is None:
            return tuple(text.encode())
        bos = getattr(self._tokenizer, "bos_token", None)
        try:
            if templated or (bos and text.startswith(bos)):  # the text holds its special tokens: add no second BOS
                return tuple(self._tokenizer.encode(text, add_special_tokens=False))
            return tuple(self._tokenizer.encode(text))
        except Exception as error:  # a tokenizer may be a program that comes with the model
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"row {row_id}: the tokenizer refuses the prompt: {type(error).__name__}: {reason}"
            ) from error

    def _refuse_unknown_tokens(self, token_ids: Sequence[int], row_id: int) -> None:
        """Raise UserError for tokens without an embedding, such as tokens that were added to the tokenizer only."""
        size = self._vocab_size
        unknown = [token for token in token_ids if token < 0 or (size is not None and token >= size)]
        if unknown:
            text = self._tokenizer.convert_ids_to_tokens(unknown[0]) if self._tokenizer is not None else unknown[0]
            raise UserError(
                f"row {row_id}: the prompt holds token {unknown[0]} ({text!r}), and the model's embedding has {size} "
                "rows: resize the embedding to the tokenizer, or remove the token from the tokenizer"
            )


def _is_there(value: Any) -> bool:
    """Return whether a column's value is neither None nor empty; `bool` would raise for an array."""
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def _are_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(m, dict) and "role" in m and _is_content(m.get("content")) for m in prompt)
    )


def _is_content(content: Any) -> bool:
    """Return whether a message's content is text or a list of parts."""
    are_parts = isinstance(content, list) and bool(content) and all(isinstance(part, dict) for part in content)
    return isinstance(content, str) or are_parts
