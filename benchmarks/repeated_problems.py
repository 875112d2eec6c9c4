"""Counts test problems of the comparison on one-digit arithmetic that also occur in another split.

    python benchmarks/repeated_problems.py         # a few seconds

In that comparison the splits of `rg:basic_arithmetic:easy` shared no text, but `Calculate 6 / 2.` and `Calculate ( 6 /
2 ).` counted as different problems. Today brackets make no difference (`estune.tasks.reasoning.asked`), so the task has
other splits. This script makes the splits of the comparison again. It counts the test rows that ask the same as a row
of another split or as an earlier test row, and computes every method's accuracy on all other rows. The result is
written to `benchmarks/results/repeated_problems.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
from record import RESULTS, write_result

from estune.compare.archive import read_archive
from estune.compare.statistics import two_level
from estune.tasks import reasoning

TASK, COMPARISON = "basic_arithmetic:easy", "compare_smollm2_basic_arithmetic"


def old_rows() -> dict[str, list[str]]:
    """Return the questions of each split of the comparison, which are distinct by their text."""
    code = f"import json; from estune.tasks import reasoning; print(json.dumps(reasoning.make_rows({TASK!r}, str)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        check=True,
        capture_output=True,
        text=True,
    )
    return {split: [row["prompt"] for row in rows] for split, rows in json.loads(done.stdout).items()}


def main() -> None:
    """Count the repeated problems, print and write the result."""
    asked = {split: [reasoning.asked(prompt) for prompt in prompts] for split, prompts in old_rows().items()}
    test = asked["test"]
    trained_on = [question in set(asked["train"]) for question in test]
    chosen_by = [question in set(asked["validation"]) for question in test]
    again = [question in test[:index] for index, question in enumerate(test)]
    left = ~np.array([trained_on, chosen_by, again]).any(0)  # (P,)
    rows: dict[str, Any] = {}
    answered: dict[str, list[str]] = {"a constant": []}  # method -> one text of 0 and 1 a seed
    for row in read_archive(RESULTS / f"{COMPARISON}.json")["rows"]:
        if row["kind"] == "constant":
            answered["a constant"].append(row["correct"])
        elif row["kind"] == "run" and row["budget"] == "time":
            answered.setdefault(row["method"], []).append(row["correct"])
    for name, seeds in answered.items():
        correct = np.array([[mark == "1" for mark in marks] for marks in seeds])
        estimates = [two_level(marks.astype(float)) for marks in (correct, correct[:, left])]  # (S, P)
        rows[name] = {
            which: {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
            for which, estimate in zip(("all", "left"), estimates, strict=True)
        }
        rows[name]["right_on_trained"] = int(correct[:, np.array(trained_on)].sum())
        rows[name]["right"] = int(correct.sum())
    result = {
        "task": f"rg:{TASK}",
        "test": len(test),
        "trained_on": sum(trained_on),
        "chosen_by": sum(chosen_by),
        "asked_before": sum(again),
        "left": int(left.sum()),
        "methods": rows,
    }
    path = write_result("repeated_problems", result)
    print(json.dumps({name: value for name, value in result.items() if name != "methods"}))
    for name, row in rows.items():
        print(
            f"{name:16} all rows {100 * row['all']['mean']:.1f} %, other rows {100 * row['left']['mean']:.1f} "
            f"[{100 * row['left']['low']:.1f}, {100 * row['left']['high']:.1f}]; right answers {row['right']}, on "
            f"training problems {row['right_on_trained']}"
        )
    print(path)


if __name__ == "__main__":
    main()
