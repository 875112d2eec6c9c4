"""Token-by-token decoding of one batch: greedy or sampled, with eos and stop strings.

A token costs little more than one forward pass, whereas transformers' ``generate`` supports many more options. Finished
rows leave the batch. Rows are padded on the left. A row's answer depends on the other rows by float rounding only.
Sampling uses the uniforms of `uniform`, which are the same for every member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from estune.engines.hf.callers import Caller, left_pad
from estune.es.population import derive_seed
from estune.es.types import Completion, Interrupted, Sampling

FILLING = -1  # row index of a padding line, which repeats another line of the batch


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to complete."""

    token_ids: tuple[int, ...]  # (P,)
    row_id: int
    completion: int  # index among the completions of the same prompt


def cut(rows: Sequence[Row], size: int) -> list[list[int]]:
    """Return batches of at most ``size`` rows, as lists of row indices; rows of similar length are together.

    Long prompts come first, so that a batch that does not fit into memory fails early. Equal lengths keep their order.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].token_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


class StopStrings:
    """Finds stop strings in the text of a row's new tokens; a stop string may span tokens."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = tuple(string for string in strings if string)
        self._endings = {string[-1] for string in self.strings}
        # A character outside printable ASCII may span tokens, and a space may vanish when its token is decoded alone.
        self._always = any(not ("!" <= ending <= "~" or ending == "\n") for ending in self._endings)
        self._may_end: dict[int, bool] = {}

    def hit(self, token_ids: Sequence[int]) -> bool:
        """Return whether the text of ``token_ids``, whose last token is new, contains a stop string."""
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
    """Return one token per row (R,), chosen from logits (R, V).

    Greedy decoding takes the first index of the largest float32 logit. Sampling applies temperature, top_k and top_p in
    this order, with the meaning they have in transformers. Then it looks up the row's uniform in [0, 1) in the
    cumulative distribution, in token order. For probabilities that tie at the edge of top_p, lower token ids stay; at
    the edge of top_k all tied tokens stay. NaN logits count as minus infinity; `is_sound` reports them.
    """
    if sampling.temperature == 0.0:
        return logits.float().argmax(-1)
    if logits.device.type == "mps":
        logits = logits.cpu()  # MPS has no float64
    scores = logits.double() / sampling.temperature  # (R, V)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float64).max, neginf=-torch.inf)
    if 0 < sampling.top_k < scores.shape[-1]:
        edge = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < edge, -torch.inf)
    probabilities = scores.softmax(-1).nan_to_num(nan=0.0)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        above = ordered.cumsum(-1) - ordered  # total probability of the more likely tokens
        above[:, 0] = -1.0
        ordered = ordered.masked_fill(above >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    cumulative = probabilities.cumsum(-1)
    targets = cumulative[:, -1:] * torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None]
    tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    last = (cumulative < cumulative[:, -1:]).sum(-1)  # last token with a probability; u * total may round up to total
    return torch.minimum(tokens, last)


def is_sound(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return whether each row's logits (R, V) hold no NaN and the logit of its token (R,) is finite: bool (R,).

    Minus infinity is sound for other tokens, because some models mask tokens with it. Plus infinity is always chosen.
    """
    largest = logits.amax(-1)  # NaN if any logit of the row is NaN; five times cheaper than argmax
    chosen = logits.gather(-1, tokens.to(logits.device)[:, None])[:, 0]
    return chosen.isfinite() & ~largest.isnan()


def uniform(sampling: Sampling, row: Row, position: int) -> float:
    """Return the uniform in [0, 1), of 53 bits, that selects a row's token at ``position`` (0: first new token)."""
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
    """Return the completions of one batch of rows; ``caller`` must be new.

    A completion ends with an eos token, with the token that completes a stop string, or at ``max_completion_length``;
    it includes the last token. The caller decides when finished rows leave the batch.

    Raises:
        Interrupted: ``should_stop()`` returned true between two tokens.
    """
    limit = sampling.max_completion_length
    new_tokens: list[list[int]] = [[] for _ in rows]
    finished = [False] * len(rows)
    finite = [True] * len(rows)
    batch = list(range(len(rows)))  # row index of each line of the batch, or FILLING
    greedy = sampling.temperature == 0.0
    ids, mask = left_pad([row.token_ids for row in rows], pad, device)
    logits = caller.prefill(ids, mask, limit)
    for position in range(limit):
        if should_stop():
            raise Interrupted
        uniforms = [] if greedy else [0.0 if r == FILLING else uniform(sampling, rows[r], position) for r in batch]
        tokens = choose(logits, sampling, uniforms)  # (R,)
        sound = is_sound(logits, tokens)  # (R,)
        alive = []  # unfinished lines of the batch
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
        layout = caller.drop_finished(alive, len(batch))
        if layout is not None:
            lines, live = layout
            batch = [batch[line] if is_live else FILLING for line, is_live in zip(lines, live, strict=True)]
            tokens = tokens[torch.tensor(lines, device=device)]
        logits = caller.step(tokens)
    return [Completion(tuple(new_tokens[r]), finished[r], finite[r]) for r in range(len(rows))]
