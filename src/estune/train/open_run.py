"""What every open run has, of ES or of a rival: who answers and scores, what is held out, who watches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from estune.config import ResolvedConfig
from estune.engines.base import Engine
from estune.es.types import Prompt
from estune.monitor.monitors import Monitors
from estune.rewards.pool import RewardPool
from estune.run import records
from estune.run.directory import Run
from estune.train import setup
from estune.train.evaluation import Evaluation, evaluate
from estune.train.rollouts import Evaluator
from estune.train.setup import Rewards

Rows = list[dict[str, Any]]


@dataclass
class OpenRun:
    """The parts of a run while it is open; how many steps are done its method knows (``steps_done``)."""

    args: ResolvedConfig
    run: Run
    engine: Engine
    evaluator: Evaluator
    accuracy_pool: RewardPool | None
    rewards: Rewards
    train_rows: Rows
    train_prompts: list[Prompt]
    eval_rows: Rows
    eval_prompts: list[Prompt]
    monitors: Monitors
    train_time_s: float  # of the steps done, evaluations and saving not counted

    def has_ended(self, steps_done: int) -> bool:
        """Say whether a run of so many steps has all of them, or has used up its time."""
        args = self.args
        return steps_done >= args.max_steps or bool(args.max_time_s and self.train_time_s >= args.max_time_s)

    def is_evaluation_due(self, steps_done: int) -> bool:
        """Say whether the held-out rows are to be answered after so many steps, and were not yet."""
        every = self.args.eval_steps
        due = bool(every) and (steps_done % every == 0 or self.has_ended(steps_done))
        return due and not records.evaluation_path(self.run.path, steps_done).exists()

    def answer_held_out(self, steps_done: int) -> Evaluation:
        """Answer the held-out rows with the model that the engine holds, and score the answers."""
        return evaluate(
            self.evaluator,
            self.eval_rows,
            self.eval_prompts,
            setup.evaluation_sampling(self.args),
            self.rewards.weights,
            self.accuracy_pool,
            batch=self.args.prompts_per_batch,
            trainer_state=self.trainer_state(steps_done),
        )

    def trainer_state(self, steps_done: int) -> dict[str, Any]:
        """Return what reward functions are told after so many steps."""
        epoch = steps_done * self.args.batch_size / len(self.train_rows)
        return {"global_step": steps_done, "max_steps": self.args.max_steps, "epoch": epoch}
