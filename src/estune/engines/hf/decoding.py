"""Token-by-token decoding of one batch: greedy or sampled, with eos and stop strings.

``generate`` of transformers is made for every option it has; here a token costs one forward call and little else, and
finished rows leave the batch. Rows are padded on the left. What a row answers depends on its neighbours by float
rounding only, and sampled tokens are a pure function of what `uniform` hashes, the same for every member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from estune.engines.hf.callers import Caller, left_pad
from estune.es.population import derive_seed
from estune.es.types import Completion, Interrupted, Sampling

FILLING = -1  # in place of a row: a line of the batch that repeats another


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to complete; ``completion`` is its index among the completions of the same prompt."""

    token_ids: tuple[int, ...]
    row_id: int
    completion: int


def cut(rows: Sequence[Row], size: int) -> list[list[int]]:
    """Cut rows into batches of at most ``size``: lists of their indices, rows of similar length together.

    Long prompts come first, so that a batch which does not fit into memory fails at once; equal lengths stay in order.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].token_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


class StopStrings:
    """Finds stop strings in the text of a row's new tokens; a stop string may span tokens."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = tuple(string for string in strings if string)
        self._endings = {string[-1] for string in self.strings}
        # outside printable ASCII one character may be several tokens, and a space may not survive decoding alone
        self._always = any(not ("!" <= ending <= "~" or ending == "\n") for ending in self._endings)
        self._may_end: dict[int, bool] = {}

    def hit(self, token_ids: Sequence[int]) -> bool:
        """Say whether the text of ``token_ids``, whose last token is new, holds a stop string."""
        if not self.strings:
            return False
        last = token_ids[-1]
        if last not in self._may_end:
            text = self.tokenizer.decode([last], skip_special_tokens=False)
            self._may_end[last] = self._always or any(ending in text for ending in self._endings)
        if not self._may_end[last]:
            return False
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        return any(string in text for string in self.strings)


def choose(logits: torch.Tensor, sampling: Sampling, uniforms: Sequence[float]) -> torch.Tensor:
    """Choose one token per row from logits (R, V): (R,).

    Greedy takes the first index of the largest float32 logit. Otherwise temperature, top_k and top_p are applied in
    that order with the meaning they have in transformers, and the row's uniform in [0, 1) is looked up in the
    cumulative distribution in token order. Where probabilities tie at the edge of top_p, lower token ids stay; at the
    edge of top_k all tied tokens stay. NaN counts as minus infinity here; `is_sound` reports it.
    """
    if sampling.temperature == 0.0:
        return logits.float().argmax(-1)
    if logits.device.type == "mps":
        logits = logits.cpu()  # no float64 there
    scores = logits.double() / sampling.temperature  # (R, V)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float64).max, neginf=-torch.inf)
    if 0 < sampling.top_k < scores.shape[-1]:
        edge = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < edge, -torch.inf)
    probabilities = scores.softmax(-1).nan_to_num(nan=0.0)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        above = ordered.cumsum(-1) - ordered  # the mass of likelier tokens
        above[:, 0] = -1.0
        ordered = ordered.masked_fill(above >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    cumulative = probabilities.cumsum(-1)
    targets = cumulative[:, -1:] * torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None]
    tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    last = (cumulative < cumulative[:, -1:]).sum(-1)  # the last token with a probability: u * total can round to total
    return torch.minimum(tokens, last)


def is_sound(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return whether each row's logits (R, V) hold no NaN and its token (R,) was chosen by a finite one: bool (R,).

    Minus infinity is sound where it was not chosen: some models mask tokens with it. Plus infinity is always chosen.
    """
    largest = logits.amax(-1)  # NaN where any logit of the row is NaN; a fifth of what argmax costs
    chosen = logits.gather(-1, tokens.to(logits.device)[:, None])[:, 0]
    return chosen.isfinite() & ~largest.isnan()


def uniform(sampling: Sampling, row: Row, position: int) -> float:
    """Return the uniform in [0, 1), of 53 bits, that decides a row's token at ``position`` (0 = first new token)."""
    bits = derive_seed(sampling.seed, sampling.step, row.row_id, row.completion, position, person=sampling.person)
    return (bits >> 11) * 2.0**-53


@torch.inference_mode()
def complete(
    caller: Caller,
    rows: Sequence[Row],
    sampling: Sampling,
    eos: frozenset[int],
    pad: int,
    stop: StopStrings,
    should_stop: Callable[[], bool],
    device: torch.device,
) -> list[Completion]:
    """Complete one batch of rows with a fresh ``caller``.

    A row ends with an eos token (kept), with the token that completes a stop string (kept), or at
    ``max_completion_length``. The caller decides when finished rows leave the batch.

    Raises:
        Interrupted: ``should_stop()`` turned true between two tokens.
    """
    limit = sampling.max_completion_length
    new_tokens: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    finite = [True] * len(rows)
    batch = list(range(len(rows)))  # the row behind each line of the batch
    greedy = sampling.temperature == 0.0
    ids, mask = left_pad([row.token_ids for row in rows], pad, device)
    logits = caller.prefill(ids, mask, limit)
    for position in range(limit):
        if should_stop():
            raise Interrupted
        uniforms = [] if greedy else [0.0 if r == FILLING else uniform(sampling, rows[r], position) for r in batch]
        tokens = choose(logits, sampling, uniforms)  # (R,)
        sound = is_sound(logits, tokens)  # (R,)
        alive = []  # lines of the batch that go on
        for line, (token, is_finite) in enumerate(zip(tokens.tolist(), sound.tolist(), strict=True)):
            r = batch[line]
            if r == FILLING or finished[r]:
                continue
            finite[r] &= is_finite
            new_tokens[r].append(token)
            if token in eos or stop.hit(new_tokens[r]):
                finished[r] = True
            else:
                alive.append(line)
        if not alive or position == limit - 1:
            break
        tokens = tokens.to(device)
        shrunk = caller.drop_finished(alive, len(batch))
        if shrunk is not None:
            lines, live = shrunk
            batch = [batch[line] if is_live else FILLING for line, is_live in zip(lines, live, strict=True)]
            tokens = tokens[torch.tensor(lines, device=device)]
        logits = caller.step(tokens)
    return [Completion(tuple(new_tokens[r]), finished[r], finite[r]) for r in range(len(rows))]
