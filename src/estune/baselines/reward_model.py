"""estune's rewards behind the interface that TRL's PPO trainer has for a reward model.

The trainer asks a reward model for a number at every token and takes the one at a completion's last. Which row a
sequence belongs to it does not say; but it scores prompts in the order in which the data loader gave them out, so the
loader's collator is here, too, and remembers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from estune.baselines.session import BaselineSession
from estune.es.types import Completion

PAD = -1  # in what `score` gets


class RewardModel(nn.Module):
    """Gives every completion what `BaselineSession.score` says."""

    base_model_prefix = "backbone"

    def __init__(self, session: BaselineSession, pad: int) -> None:
        super().__init__()
        self.session, self.pad = session, pad
        self.backbone = _Tokens()
        self.handed_out: deque[tuple[int, int]] = deque()  # row, tokens of its padded prompt; of those not scored yet
        self.lowest = 0.0  # reward of the run so far, and 0 at most

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the prompts of some rows, padded on the left: (B, T)."""
        prompts = [self.session.train_prompts[row].token_ids for row in rows]
        width = max(len(prompt) for prompt in prompts)
        self.handed_out.extend((row, width) for row in rows)
        return {"input_ids": torch.tensor([[self.pad] * (width - len(prompt)) + [*prompt] for prompt in prompts])}

    def score(self, tokens: Tensor) -> Tensor:
        """Return the rewards (B, T, 1) of prompts with their completions (B, T), the same number at every token.

        A completion without a reward (it failed, or none applies) gets the lowest of the run so far, 0 at most.
        """
        rows, answers, ends = [], [], self.session.engine.assets.end_tokens
        for sequence in tokens.tolist():
            row, width = self.handed_out.popleft()
            prompt = self.session.train_prompts[row].token_ids
            assert tuple(sequence[width - len(prompt) : width]) == prompt, "a completion of another prompt"
            answer = sequence[width:]
            if PAD in answer:
                answer = answer[: answer.index(PAD)]
            rows.append(row)
            answers.append([Completion(tuple(answer), bool(answer) and answer[-1] in ends)])
        rewards = self.session.score(rows, answers)[:, 0]  # (B,)
        known = np.isfinite(rewards)
        if known.any():
            self.lowest = min(self.lowest, float(rewards[known].min()))
        rewards = np.where(known, rewards, self.lowest)
        given = torch.tensor(rewards, dtype=torch.float32, device=tokens.device)
        return given[:, None, None].expand(-1, tokens.shape[1], 1)


class _Tokens(nn.Module):
    """Stands where a reward model's transformer stands: its "hidden states" are the tokens themselves."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=(torch.where(attention_mask.bool(), input_ids, PAD),))
