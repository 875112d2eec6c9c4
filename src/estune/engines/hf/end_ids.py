"""Which tokens end a completion, and which one fills up a batch: ids that exist in the model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from estune.console import note, warn
from estune.engines.hf.model_files import token_ids
from estune.errors import UserError


def vocabulary_rows(model: Any) -> int | None:
    """Return the number of rows of a model's input embedding; ``None`` where the model does not show one."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        weight = None
    if weight is not None and weight.dim() == 2:
        return int(weight.shape[0])
    rows = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def end_ids(model: Any, tokenizer: Any, vocab_size: int | None) -> tuple[frozenset[int], int]:
    """Return the end-of-sequence ids and the padding id; nothing else of generation_config is ever used.

    The end ids are those of generation_config, else the tokenizer's. Ids that the model cannot generate are left out,
    and a padding id that it does not have is replaced.

    Raises:
        UserError: an id is not a whole number.
    """
    settings = getattr(model, "generation_config", None)
    given = _ids("generation_config's eos_token_id", getattr(settings, "eos_token_id", None))
    own = _ids("the tokenizer's eos_token_id", getattr(tokenizer, "eos_token_id", None))
    ends = [token for token in given or own if _exists(token, vocab_size)]
    if not ends and (given or own):
        warn(f"{_named(given or own, tokenizer)} should end a completion and is not in the model's vocabulary of "
             f"{vocab_size}, so that it never does")  # fmt: skip
    elif ends and given and set(given) != set(own):
        instead = f"the tokenizer's own is {_named(own, tokenizer)}" if own else "the tokenizer has none of its own"
        note(f"completions end with {_named(ends, tokenizer)}, as the model's generation_config says; {instead}")
    pads = _ids("generation_config's pad_token_id", getattr(settings, "pad_token_id", None))
    pads += _ids("the tokenizer's pad_token_id", getattr(tokenizer, "pad_token_id", None))
    pad = next(token for token in (*pads, *ends, 0) if _exists(token, vocab_size))
    if pads and pads[0] != pad:
        note(f"the padding token {_named(pads[:1], tokenizer)} is not in the model's vocabulary of {vocab_size}; "
             f"batches are padded with {_named([pad], tokenizer)} instead")  # fmt: skip
    return frozenset(ends), pad


def settings_of(model: Any, ends: frozenset[int], pad: int, vocab_size: int | None) -> dict[str, Any]:
    """Return the ids that a saved generation_config must hold instead of its own, so that it says what was used."""
    settings = model.generation_config
    found: dict[str, Any] = {}
    if set(token_ids(settings.eos_token_id)) != ends:
        found["eos_token_id"] = None if not ends else min(ends) if len(ends) == 1 else sorted(ends)
    if not all(_exists(token, vocab_size) for token in token_ids(settings.pad_token_id)):
        found["pad_token_id"] = pad
    return found


def _ids(what: str, value: Any) -> list[int]:
    try:
        return token_ids(value)
    except ValueError as error:
        raise UserError(f"{what} cannot be used: {error}") from error


def _exists(token: int, vocab_size: int | None) -> bool:
    return token >= 0 and (vocab_size is None or token < vocab_size)


def _named(tokens: Iterable[int], tokenizer: Any) -> str:
    """Return tokens as a user knows them: ``<eos> (258)``."""
    return ", ".join(_name(token, tokenizer) for token in tokens)


def _name(token: int, tokenizer: Any) -> str:
    try:
        text = tokenizer.convert_ids_to_tokens(token)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError):
        text = None
    return f"{text} ({token})" if isinstance(text, str) else str(token)
