"""Did the comparison on one-digit arithmetic ask what it had trained on? Its problems were told apart by their text.

    python benchmarks/repeated_problems.py         # a few seconds

The splits of `rg:basic_arithmetic:easy` shared no question when they were compared, but `Calculate 6 / 2.` and
`Calculate ( 6 / 2 ).` counted as two. By now brackets tell no questions apart (`estune.tasks.reasoning.asked`), so that
this task's splits are others. Here the old ones are made again, by text; counted are the test rows that ask what a row
of another split asks, or an earlier test row; and every method's accuracy is taken of the rows that are left. The
result goes to `benchmarks/results/repeated_problems.json`.
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
    """Return the questions of each split, told apart by their text."""
    code = f"import json; from estune.tasks import reasoning; print(json.dumps(reasoning._make({TASK!r}, str)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        check=True,
        capture_output=True,
        text=True,
    )
    return {split: [row["prompt"] for row in rows] for split, rows in json.loads(done.stdout).items()}


def main() -> None:
    """Count, and write the result."""
    asked = {split: [reasoning.asked(prompt) for prompt in prompts] for split, prompts in old_rows().items()}
    test = asked["test"]
    trained_on = [question in set(asked["train"]) for question in test]
    chosen_by = [question in set(asked["validation"]) for question in test]
    again = [question in test[:place] for place, question in enumerate(test)]
    left = ~np.array([trained_on, chosen_by, again]).any(0)  # (P,)
    rows: dict[str, Any] = {}
    answered: dict[str, list[str]] = {"a constant": []}  # marks of each seed
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
    found = {
        "task": f"rg:{TASK}",
        "test": len(test),
        "trained_on": sum(trained_on),
        "chosen_by": sum(chosen_by),
        "asked_before": sum(again),
        "left": int(left.sum()),
        "methods": rows,
    }
    path = write_result("repeated_problems", found)
    print(json.dumps({name: value for name, value in found.items() if name != "methods"}))
    for name, its in rows.items():
        print(
            f"{name:16} of all {100 * its['all']['mean']:.1f} %, of those left {100 * its['left']['mean']:.1f} "
            f"[{100 * its['left']['low']:.1f}, {100 * its['left']['high']:.1f}]; right {its['right']}, on "
            f"what was trained on {its['right_on_trained']}"
        )
    print(path)


if __name__ == "__main__":
    main()
