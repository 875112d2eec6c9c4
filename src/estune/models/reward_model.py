"""Reward models: a sequence classifier with one label, from a directory or the hub, as a reward function.

As in TRL, the reward is the classifier's logit for the text of prompt and completion. The model is loaded where rewards
run: in a worker process, on a GPU if there is one. This module loads torch and transformers only then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

from estune.errors import UserError
from estune.models.hub import client_errors
from estune.models.names import local_directory, public_name

ROWS = 16  # texts in one forward pass
OF_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")  # names in TRL's commands
WEIGHTS = ("*.safetensors", "*.bin")  # patterns of the files that hold weights


class RewardModel:
    """A sequence classifier as a reward function with TRL's contract."""

    def __init__(self, directory: Path, name: str) -> None:
        """Keep where the model is; `prepare` loads it.

        Args:
            directory: holds ``config.json``, the weights and the tokenizer.
            name: of the reward.
        """
        self.directory, self.__name__ = directory, name
        self._loaded: tuple[Any, Any] | None = None  # tokenizer and model

    @classmethod
    def open(cls, spec: str) -> Self:
        """Return the reward model in a directory, or of this name on the hub, and check its configuration.

        Raises:
            UserError: there is no such model, or it is not a sequence classifier with one label.
        """
        directory = local_directory(spec) or _downloaded(spec)
        try:
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            architecture = ", ".join(config.get("architectures") or ())
            n_labels = len(config.get("id2label") or (0, 1))  # transformers' default: two labels
        except (OSError, ValueError, AttributeError):
            raise UserError(f"reward model {spec!r} has no readable config.json") from None
        if "SequenceClassification" not in architecture:
            found = f"its config.json names {architecture}" if architecture else "its config.json names no architecture"
            raise UserError(f"reward model {spec!r} is no sequence classifier: {found}")
        if n_labels != 1:
            raise UserError(f"reward model {spec!r} has {n_labels} labels; a reward needs one (num_labels=1)")
        if not any(path for pattern in WEIGHTS for path in directory.glob(pattern)):
            raise UserError(f"reward model {spec!r} has no weights in {directory}")
        return cls(directory, public_name(spec).rpartition("/")[2])

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker process needs: not the loaded model."""
        return {**self.__dict__, "_loaded": None}

    def identity_parts(self) -> dict[str, str]:
        """Return a hash of each file that decides the reward, by its name; a resume compares them."""
        names = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "*.model")
        files = sorted({path for pattern in (*names, *WEIGHTS) for path in self.directory.glob(pattern)})
        return {path.name: _digest(path) for path in files}

    def prepare(self) -> None:
        """Load the model, on one thread of a CPU or on a GPU; a worker calls this before its first request."""
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        torch.set_num_threads(1)  # other workers and the trainer use the other cores
        self._load()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """Return the logit of each prompt with its completion, texts or lists of messages, (rows,)."""
        import torch

        tokenizer, model = self._load()
        texts = [_text(prompt, completion, tokenizer) for prompt, completion in zip(prompts, completions, strict=True)]
        rewards: list[float] = []
        for start in range(0, len(texts), ROWS):
            part = tokenizer(
                texts[start : start + ROWS], padding=True, padding_side="right", add_special_tokens=False,
                return_tensors="pt",
            )  # fmt: skip
            with torch.inference_mode():
                rewards += model(**part.to(model.device)).logits[:, 0].float().tolist()
        return rewards

    def _load(self) -> tuple[Any, Any]:
        """Return tokenizer and model, loaded once."""
        if self._loaded is None:
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            place = str(self.directory)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = "auto" if device == "cuda" else torch.float32
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
            model = AutoModelForSequenceClassification.from_pretrained(place, local_files_only=True, dtype=dtype)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id
            self._loaded = tokenizer, model.to(device).eval()
        return self._loaded


def _text(prompt: Any, completion: Any, tokenizer: Any) -> str:
    """Return prompt and completion as one text; the tokenizer's chat template joins messages."""
    if isinstance(prompt, str):
        return prompt + str(completion)
    return str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))


def _downloaded(spec: str) -> Path:
    """Return the directory of a model in the hub's cache, where its files are downloaded if needed."""
    if spec.count("/") != 1 or spec.startswith((".", "/", "~")) or spec.endswith(".py"):
        module, _, function = spec.rpartition(".")
        hint = ""
        if spec in OF_TRL:
            hint = f"; TRL's is trl.rewards:{spec}"
        elif module and function.isidentifier() and not spec.endswith(".py"):
            hint = f"; did you mean {module}:{function}?"
        raise UserError(
            f"reward {spec!r} is neither package.module:function nor path/file.py:function, nor the directory of a "
            f"reward model{hint}"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(spec))
    except client_errors() as error:
        raise UserError(
            f"reward model {spec!r} is no directory, and the hub does not give it: {' '.join(str(error).split())[:200]}"
        ) from None


def _digest(path: Path) -> str:
    digest = blake2b(digest_size=8)
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
