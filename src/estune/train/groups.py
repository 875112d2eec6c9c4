"""The rollouts of one member (`Group`), as `pending.jsonl` stores them, and of a whole step (`Rollouts`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any

import numpy as np

from estune.es.types import Prompt
from estune.files import is_count, is_number


@dataclass
class Group:
    """One member's completions of a step, in numbers and rewards; JSON stores it without loss."""

    rewards: list[list[list[float | None]]]  # (B, G, F); None: not applicable, or failed
    failed: list[list[int]]  # (b, g, f) of every failure
    lengths: list[list[int]]  # (B, G), generated tokens
    finished: list[list[bool]]  # (B, G); False: clipped
    finite: list[list[bool]]  # (B, G); False: the logits were not finite, so every reward of the completion failed
    digests: list[list[str]]  # (B, G), hashes of token ids
    prompt_tokens: int
    generate_s: float  # seconds, without ``perturb_s``
    perturb_s: float = 0.0  # seconds
    metrics: dict[str, float] = field(default_factory=dict)  # means of the values given to log_metric
    errors: list[str] = field(default_factory=list)  # the first failure of each reward function
    completions: list[list[str]] | None = None  # (B, G); None unless the text is needed
    extra: dict[str, list[Any]] | None = None  # log_extra columns, (B * G,) each


@dataclass
class Rollouts:
    """The groups of all members of a step, and their rewards as arrays."""

    groups: list[Group]  # (N,)
    rewards: np.ndarray  # (N, B, G, F), NaN: not applicable or failed
    failed: np.ndarray  # (N, B, G, F), bool
    score_wait_s: float  # seconds that the engine waited for scores
    earlier_s: float = 0.0  # seconds spent on groups restored from pending.jsonl
    beside_s: float = 0.0  # seconds after the last member's answer that an evaluation of theta took
    started: float = 0.0  # clock reading, in seconds: the step's start, moved so that only the step's own work counts
    theta: Group | None = None  # theta's completions of the same prompts, if theta answered them and was scored

    def completion_records(self, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any]]:
        """Yield one record a completion: member, row, prompt, completion, rewards, and the log_extra columns.

        The completions of theta, if theta answered and its text was kept, come last, with None as their member.
        ``failed`` is present where reward functions failed: their indices. Other rewards without a value were None.
        """
        models: list[tuple[int | None, Group]] = list(enumerate(self.groups))
        for member, group in models if self.theta is None else [*models, (None, self.theta)]:
            if group.completions is None:
                continue
            failed: dict[tuple[int, int], list[int]] = {}
            for b, g, f in group.failed:
                failed.setdefault((b, g), []).append(f)
            for b, (prompt, answers) in enumerate(zip(prompts, group.completions, strict=True)):
                for g, text in enumerate(answers):
                    extra = {name: values[b * len(answers) + g] for name, values in (group.extra or {}).items()}
                    yield extra | {
                        "member": member,
                        "row": prompt.row_id,
                        "prompt": prompt.text,
                        "completion": text,
                        "rewards": group.rewards[b][g],
                        **({"failed": failed[b, g]} if (b, g) in failed else {}),
                    }

    @property
    def lengths(self) -> np.ndarray:
        """Generated tokens per completion, (N, B, G)."""
        return np.array([group.lengths for group in self.groups])

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens of the step."""
        return sum(group.prompt_tokens for group in self.groups) + int(self.lengths.sum())

    @property
    def modal_ratio(self) -> float:
        """Share of completions that equal the most frequent completion of their prompt among all members.

        A share near 1 means that the perturbations did not change the completions.
        """
        digests = np.array([group.digests for group in self.groups])  # (N, B, G)
        most = [np.unique(digests[:, b, g], return_counts=True)[1].max() for b, g in np.ndindex(digests.shape[1:])]
        return float(np.sum(most)) / digests.size

    @property
    def clipped_ratio(self) -> float:
        """Share of completions that the length limit cut off."""
        return 1.0 - float(np.mean([group.finished for group in self.groups]))

    @property
    def non_finite_ratio(self) -> float:
        """Share of completions whose logits were not finite."""
        return 1.0 - float(np.mean([group.finite for group in self.groups]))


def stack(groups: list[Group], score_wait_s: float = 0.0) -> Rollouts:
    """Stack groups into arrays: rewards and failures (N, B, G, F)."""
    rewards = np.array([group.rewards for group in groups], dtype=np.float64)  # None becomes NaN
    failed = np.zeros(rewards.shape, dtype=bool)
    for index, group in enumerate(groups):
        for b, g, f in group.failed:
            failed[index, b, g, f] = True
    return Rollouts(groups, rewards, failed, score_wait_s)


def tokens_digest(token_ids: Sequence[int]) -> str:
    """Return a short hash of a completion's tokens; equal completions have equal hashes."""
    return blake2b(np.asarray(token_ids, dtype="<i8").tobytes(), digest_size=8).hexdigest()


def known_groups(
    results: Mapping[int, dict[str, Any]], n_members: int, shape: tuple[int, int, int], keep_text: bool
) -> dict[int, Group]:
    """Return the stored groups that a resume can reuse: those with all fields, and with text if it is needed.

    Args:
        results: member -> value read from JSON.
        n_members: number of members of the step.
        shape: (B, G, F) of the step.
        keep_text: whether the completions are needed as text.
    """
    return {
        index: Group(**result)
        for index, result in results.items()
        if index < n_members and _is_group(result, shape) and not (keep_text and result["completions"] is None)
    }


def _is_group(result: Mapping[str, Any], shape: tuple[int, int, int]) -> bool:
    """Return whether a value read from JSON holds all fields of a `Group` of shape (B, G, F)."""
    if set(result) != {item.name for item in fields(Group)}:
        return False
    texts, extra, metrics, errors = (result[name] for name in ("completions", "extra", "metrics", "errors"))
    return (
        _is_array(result["rewards"], shape, lambda value: value is None or is_number(value))
        and all(_is_array(result[name], shape[:2], is_it) for name, is_it in _PER_COMPLETION.items())
        and is_count(result["prompt_tokens"])
        and all(is_number(result[name]) for name in ("generate_s", "perturb_s"))
        and isinstance(result["failed"], list)
        and all(_is_place(place, shape) for place in result["failed"])
        and isinstance(metrics, dict)
        and all(is_number(value) for value in metrics.values())
        and isinstance(errors, list)
        and all(isinstance(error, str) for error in errors)
        and (texts is None or _is_array(texts, shape[:2], lambda value: isinstance(value, str)))
        and (extra is None or (isinstance(extra, dict) and all(_is_column(column, shape) for column in extra.values())))
    )


_PER_COMPLETION: dict[str, Callable[[Any], bool]] = {
    "lengths": is_count,
    "finished": lambda value: isinstance(value, bool),
    "finite": lambda value: isinstance(value, bool),
    "digests": lambda value: isinstance(value, str),
}


def _is_array(value: Any, shape: Sequence[int], is_item: Callable[[Any], bool]) -> bool:
    """Return whether ``value`` is nested lists of this shape whose items satisfy ``is_item``."""
    if not shape:
        return is_item(value)
    return isinstance(value, list) and len(value) == shape[0] and all(_is_array(v, shape[1:], is_item) for v in value)


def _is_place(value: Any, shape: tuple[int, int, int]) -> bool:
    return _is_array(value, (3,), is_count) and all(i < size for i, size in zip(value, shape, strict=True))


def _is_column(value: Any, shape: tuple[int, int, int]) -> bool:
    return isinstance(value, list) and len(value) == shape[0] * shape[1]
