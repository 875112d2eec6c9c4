"""`estune score`: rewards and accuracy of the completions in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from estune.commands.results import or_none, print_values
from estune.config import ESConfig
from estune.console import note, print_json
from estune.data.datasets import check_columns, load_rows
from estune.data.layouts import with_mapped_columns
from estune.errors import UserError
from estune.es.fitness import mean, weigh
from estune.rewards.contract import reward_inputs
from estune.rewards.pool import RewardBatch
from estune.train import setup
from estune.train.evaluation import interval
from estune.train.setup import Rewards


def score_command(args: ESConfig, completions: Path, as_json: bool) -> int:
    """Score the completions of a file with a task's reward and accuracy, or with the user's own rewards.

    Raises:
        UserError: a row lacks its completion or a column that the rewards need.
    """
    task = setup.task_of(args)
    rewards = setup.resolve_rewards(args, None, task)
    rows = with_mapped_columns(load_rows(str(completions)), args.column_mapping, completions=True)
    for index, row in enumerate(rows):
        if "completion" not in row:
            raise UserError(f"row {index} of {completions} has no column 'completion'")
        if not isinstance(row["completion"], str):
            raise UserError(f"row {index} of {completions}: its completion is {row['completion']!r}, not a string")
    texts: list[str] = [row["completion"] for row in rows]
    columns = [{name: value for name, value in row.items() if name != "completion"} for row in rows]
    if task is not None:
        columns = [task.prepare_row(row) for row in columns]
    columns = [{"prompt": "", **row} for row in columns]
    check_columns(columns, rewards.funcs, rewards.names)
    result, accuracy = _scored(args, rewards, columns, texts)
    values = weigh(np.where(result.failed, np.nan, result.rewards), rewards.weights)  # (rows,)
    output: dict[str, Any] = {"n": len(rows), "reward": or_none(mean(values))}
    if accuracy is not None:
        output["accuracy"] = mean(accuracy)
        output["accuracy_ci95"] = list(interval(accuracy.tolist()))
    output["rewards"] = [or_none(value) for value in values.tolist()]
    output["errors"] = int(result.failed.any(axis=1).sum())
    if as_json:
        print_json(output)
    else:
        print_values({name: value for name, value in output.items() if name != "rewards"}, False)
        for message in result.errors:
            note(message)
    return 0


def _scored(args: ESConfig, rewards: Rewards, columns: list[dict[str, Any]], texts: list[str]) -> Any:
    """Return the reward result, and the accuracy (rows,) or None. Workers that can be killed compute both."""
    prompts, answers, named = reward_inputs(columns, texts, "")
    batch = RewardBatch(prompts, answers, [[] for _ in texts], named, {"global_step": 0, "max_steps": 0})
    with setup.reward_pool(args, rewards.funcs, rewards.names) as pool:
        result = pool.submit(batch).result()
    if rewards.accuracy is None:
        return result, None
    with setup.reward_pool(args, [rewards.accuracy], ["accuracy"]) as pool:
        graded = pool.submit(batch).result()
    return result, np.where(graded.failed, 0.0, np.nan_to_num(graded.rewards))[:, 0]
