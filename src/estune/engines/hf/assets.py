"""What belongs to a transformers model beside its weights: configuration, tokenizer, end tokens, code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estune.engines.hf import end_ids, identity
from estune.engines.hf.callers import Model
from estune.engines.hf.saved_model import check_assets, save_assets


class HFAssets:
    """The assets of a model in memory; see `estune.engines.base.ModelAssets`."""

    def __init__(
        self, model: Model, tokenizer: Any, dtype: str, *, digests: dict[str, str] | None = None, is_mixed: bool = False
    ) -> None:
        """Read end tokens and padding of a model.

        Args:
            model: with its configuration.
            tokenizer: that makes its prompts.
            dtype: that the model computes in.
            digests: those of `identity` that come from a model's files.
            is_mixed: whether a module was cast in part, so that only float32 describes all its weights.

        Raises:
            UserError: an end or padding token is none of the model's.
        """
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = end_ids.vocabulary_rows(model)
        self.end_tokens, self.pad = end_ids.end_ids(model, tokenizer, self.vocab_size)
        self._dtype, self._digests, self._is_mixed = dtype, digests, is_mixed

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion's tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def save(self, directory: Path, dtype: str) -> None:
        """Write configuration, generation configuration and tokenizer; see `ModelAssets.save`."""
        save_assets(
            self.model,
            self.tokenizer,
            "float32" if self._is_mixed else dtype,
            Path(directory),
            ends=self.end_tokens,
            pad=self.pad,
            vocab_size=self.vocab_size,
        )

    def check(self) -> None:
        """Try `save`, and compare what it writes with the weights; see `ModelAssets.check`."""
        check_assets(self.model, lambda directory: self.save(directory, self._dtype))

    def identity(self) -> dict[str, Any]:
        """Return what decides answers beside the weights; see `ModelAssets.identity`."""
        digests = identity.module_identity(self.model) if self._digests is None else self._digests
        found = {"end_tokens": sorted(self.end_tokens), **digests}
        if "tokenizer" not in found:
            found["tokenizer"] = identity.tokenizer_identity(self.tokenizer)
        return found
