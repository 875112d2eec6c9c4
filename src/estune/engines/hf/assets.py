"""The parts of a transformers model that are not weights: configuration, tokenizer, end tokens, code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from estune.engines.hf import end_ids, identity
from estune.engines.hf.callers import Model
from estune.engines.hf.saved_model import check_assets, save_assets
from estune.engines.local import TextAssets


class HFAssets(TextAssets):
    """The assets of a model in memory; see `estune.engines.base.ModelAssets`."""

    def __init__(
        self, model: Model, tokenizer: Any, dtype: str, *, digests: dict[str, str] | None = None, is_mixed: bool = False
    ) -> None:
        """Read the end tokens and the padding token of a model.

        Args:
            model: the model in memory.
            tokenizer: the tokenizer of its prompts.
            dtype: the compute dtype.
            digests: digests of the model's files for `identity`; None: they are computed from the module.
            is_mixed: whether the weights have several dtypes, so that only float32 describes them all.

        Raises:
            UserError: an end token or padding token is not an integer.
        """
        self.model = model
        self.vocab_size = end_ids.vocabulary_rows(model)
        end_tokens, self.pad = end_ids.end_ids(model, tokenizer, self.vocab_size)
        super().__init__(tokenizer, end_tokens)
        self._dtype, self._digests, self._is_mixed = dtype, digests, is_mixed

    def save(self, directory: Path, dtype: str) -> None:
        """Write configuration, generation configuration, tokenizer and code; see `ModelAssets.save`."""
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
        """Save into a temporary directory, and compare the files with the model; see `ModelAssets.check`."""
        check_assets(self.model, lambda directory: self.save(directory, self._dtype))

    def identity(self) -> dict[str, Any]:
        """Return values that determine the answers beside the weights; see `ModelAssets.identity`."""
        digests = identity.module_identity(self.model) if self._digests is None else self._digests
        values = {"end_tokens": sorted(self.end_tokens), **digests}
        if "tokenizer" not in values:
            values["tokenizer"] = identity.tokenizer_identity(self.tokenizer)
        return values
