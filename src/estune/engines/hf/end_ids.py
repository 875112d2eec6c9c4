"""The tokens that end a completion, and the padding token: ids that exist in the model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from estune.console import note, warn
from estune.engines.hf.model_files import token_ids
from estune.errors import UserError


def vocabulary_rows(model: Any) -> int | None:
    """Return the number of rows of a model's input embedding; ``None`` if it cannot be determined."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        weight = None
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[0])
    rows = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def end_ids(model: Any, tokenizer: Any, vocab_size: int | None) -> tuple[frozenset[int], int]:
    """Return the end-of-sequence ids and the padding id. No other field of generation_config is used.

    The end ids are those of generation_config, or else the tokenizer's. Ids outside the vocabulary are dropped, and a
    padding id outside the vocabulary is replaced.

    Raises:
        UserError: an id is not an integer.
    """
    settings = getattr(model, "generation_config", None)
    configured = _ids("generation_config's eos_token_id", getattr(settings, "eos_token_id", None))
    of_tokenizer = _ids("the tokenizer's eos_token_id", getattr(tokenizer, "eos_token_id", None))
    ends = [token for token in configured or of_tokenizer if _exists(token, vocab_size)]
    if not ends and (configured or of_tokenizer):
        warn(
            f"{_named(configured or of_tokenizer, tokenizer)} should end a completion, but is not in the model's "
            f"vocabulary of {vocab_size}, so it never does"
        )
    elif ends and configured and set(configured) != set(of_tokenizer):
        other = f"the tokenizer's is {_named(of_tokenizer, tokenizer)}" if of_tokenizer else "the tokenizer has none"
        note(f"completions end with {_named(ends, tokenizer)}, the eos_token_id of generation_config; {other}")
    pads = _ids("generation_config's pad_token_id", getattr(settings, "pad_token_id", None))
    pads += _ids("the tokenizer's pad_token_id", getattr(tokenizer, "pad_token_id", None))
    pad = next(token for token in (*pads, *ends, 0) if _exists(token, vocab_size))
    if pads and pads[0] != pad:
        note(
            f"the padding token {_named(pads[:1], tokenizer)} is not in the model's vocabulary of {vocab_size}; "
            f"batches are padded with {_named([pad], tokenizer)} instead"
        )
    return frozenset(ends), pad


def settings_of(model: Any, ends: frozenset[int], pad: int, vocab_size: int | None) -> dict[str, Any]:
    """Return the fields of generation_config that differ from the ids in use, with these ids as values."""
    settings = model.generation_config
    changes: dict[str, Any] = {}
    if set(token_ids(settings.eos_token_id)) != ends:
        changes["eos_token_id"] = None if not ends else min(ends) if len(ends) == 1 else sorted(ends)
    if not all(_exists(token, vocab_size) for token in token_ids(settings.pad_token_id)):
        changes["pad_token_id"] = pad
    return changes


def _ids(what: str, value: Any) -> list[int]:
    try:
        return token_ids(value)
    except ValueError as error:
        raise UserError(f"{what} cannot be used: {error}") from error


def _exists(token: int, vocab_size: int | None) -> bool:
    return token >= 0 and (vocab_size is None or token < vocab_size)


def _named(tokens: Iterable[int], tokenizer: Any) -> str:
    """Return tokens as text and id, for messages: ``<eos> (258)``."""
    return ", ".join(_name(token, tokenizer) for token in tokens)


def _name(token: int, tokenizer: Any) -> str:
    try:
        text = tokenizer.convert_ids_to_tokens(token)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError):
        text = None
    return f"{text} ({token})" if isinstance(text, str) else str(token)
