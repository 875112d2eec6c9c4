"""ES's rivals on ES's session: the same tasks, prompts, rewards, splits, evaluations, token limits and run directory.

`estune train --method M` comes here for every M but `es`. GRPO, Dr.GRPO, RLOO, PPO and the fine-tuning of
`sft_rejection` are TRL's trainers; what estune adds around them is what ES has, too. It loads torch: import it
once a method is run.
"""

from estune.baselines.trainer import BaselineTrainer

__all__ = ["BaselineTrainer"]
