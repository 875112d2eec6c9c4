"""Baselines of ES, trained with the same tasks, prompts, rewards, splits, evaluations and token limits.

`estune train --method M` runs this package for every M except `es`. GRPO, Dr.GRPO, RLOO, PPO and the fine-tuning of
`sft_rejection` are TRL's trainers, which estune connects to the parts of an ES run. Importing this package imports
torch.
"""

from estune.baselines.trainer import BaselineTrainer

__all__ = ["BaselineTrainer"]
