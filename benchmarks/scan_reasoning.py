"""Ranks reasoning-gym's tasks by how often a real model's text holds an answer that it does not give as asked.

    estune fetch smollm2-135m
    python benchmarks/scan_reasoning.py            # about 20 minutes on two quiet cores
    python benchmarks/scan_reasoning.py --easy     # the tasks at the lowest levels of the package's curricula

A model's text may hold the answer, and the model may still score nothing because the answer is not given as asked. On
such a task, training on outcomes alone can improve the model. Every generator makes its rows in its own process with a
time limit. The model answers some rows of the *validation* split greedily; the test split is not used. The scan reports
the exact accuracy, the share of completions that hold the answer as a word, the accuracy of the most common training
answer as a constant, and the lengths. An answer that is a word of its own prompt (True, for example, or the next number
of a series that repeats) does not count as held, because a copy of the prompt would hold it.

Tasks are ranked by a gap: the share of held answers minus the accuracy of the model or of the constant, whichever is
higher. 32 rows do not separate neighbours in the ranking. So the first five tasks with a positive gap answer all their
validation rows, and the ranking is repeated until its first five have done so. An exact reward can only improve tasks
on which the model is sometimes right. So some rows of each task with a gap of at least a tenth are sampled at
temperature 1. The first two tasks with at least 3 right samples of 128 are chosen; tasks with a full test split come
before tasks with few different problems. Possibly no task is chosen. The threshold rests on few samples.

No figure of a training run enters a ranking, but its rules changed between comparisons (docs/log.md). The constant's
accuracy is subtracted since the comparison on `gcd`, and the first five tasks answer all rows since the comparison on
`chain_sum:easy`.

The result is written to `benchmarks/results/scan_reasoning.json`, in two parts: ``default`` and ``easy``.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import write_part

from estune.compare.measure import Scorers
from estune.config import ESConfig
from estune.errors import UserError
from estune.tasks import get_task, reasoning
from estune.train import setup

ROWS, TOKENS, LONGEST_PROMPT = 32, 64, 160  # rows of a task; tokens of a completion and of a prompt, at most
LEADING = 5  # tasks with the largest gaps, which answer all rows
ALL_ROWS = reasoning.SPLIT_SIZES["validation"]
SECONDS = 90.0  # time limit of a generator
LEAST_GAP = 0.1  # share of rows; tasks with a smaller gap are not sampled
SAMPLED_ROWS, SAMPLES = 16, 8  # rows of a sampled task; samples of a row
FEWEST_RIGHT = 3  # samples of 128: about 2 %, with a 95 % interval of 0.8 to 6.7 %
CHOSEN = 2  # tasks, at most


def holds(text: str, wanted: str) -> bool:
    """Return whether a text holds the answer as a separate word."""
    return re.search(rf"(?<![\w.-]){re.escape(wanted)}(?!\w|\.\d)", text) is not None


def rows_of(name: str) -> dict[str, list[dict[str, Any]]] | str:
    """Return a generator's rows by split, or the reason why it has none."""
    try:
        get_task(f"rg:{name}")  # raises for tasks whose scorer executes answers
        splits = reasoning.rows_of(name, SECONDS)
    except UserError as error:
        return str(error)
    if any(reasoning.right_answer(row) is None for rows in splits.values() for row in rows):
        return "the package stores no answer to some of its questions: several answers are right"
    return splits


def answers(rows: list[dict[str, Any]]) -> list[str]:
    """Return the right answer of each row."""
    return [json.loads(row["rg_entry"])["answer"] for row in rows]


class Scanner:
    """A model that answers rows of tasks."""

    def __init__(self, model: str, num_threads: int) -> None:
        args = ESConfig(
            model=model, task="rg:gcd", max_completion_length=TOKENS, num_threads=num_threads, reward_isolation="inline"
        )
        self.args = setup.resolve_config(args, ROWS)
        self.engine = setup.load_engine(self.args)

    def tokens(self, row: dict[str, Any]) -> int:
        """Return the length of a row's prompt in tokens."""
        return len(self.engine.assets.tokenizer.encode(row["prompt"]))

    def answer(self, name: str, rows: list[dict[str, Any]], **settings: Any) -> Any:
        """Return the evaluation of a task's rows, greedy by default; ``settings`` are options of `ESConfig`."""
        with Scorers() as scorers:
            args = ESConfig(**{**vars(self.args), "task": f"rg:{name}", **settings})
            return scorers.answer(args, self.engine, rows)[0]

    def scan(self, name: str, splits: dict[str, list[dict[str, Any]]], n_rows: int) -> dict[str, Any]:
        """Return the figures of a task's first validation rows, or the reason why the task is left out."""
        rows = splits["validation"][:n_rows]
        lengths = sorted(self.tokens(row) for row in rows)
        median = lengths[len(lengths) // 2]
        if median > LONGEST_PROMPT:
            return {"left_out": f"its median prompt has {median} tokens"}
        rows = [row for row in rows if self.tokens(row) <= 2 * LONGEST_PROMPT]
        started = time.perf_counter()
        evaluation = self.answer(name, rows)
        summary, texts, wanted = evaluation.summary(), [row.completions[0] for row in evaluation.rows], answers(rows)
        constant = collections.Counter(answers(splits["train"])).most_common(1)[0][0]
        copied = [holds(row["prompt"], answer) for row, answer in zip(rows, wanted, strict=True)]
        held = sum(not copy and holds(text, answer) for copy, text, answer in zip(copied, texts, wanted, strict=True))
        result = {
            "n": len(rows),
            "test_rows": len(splits["test"]),
            "accuracy": summary["accuracy"],
            "reward": summary["reward"],
            "holds_answer": held / len(rows),
            "constant": wanted.count(constant) / len(rows),
            "answer_in_prompt": sum(copied) / len(rows),
            "tagged": sum("<answer>" in text for text in texts) / len(rows),
            "length": summary["mean_length_tokens"],
            "prompt_tokens": median,
            "example": {"prompt": rows[0]["prompt"], "completion": texts[0], "answer": wanted[0]},
        }
        print(
            f"{name:28} {len(rows):3} rows: right {result['accuracy']:.2f}, holds it {result['holds_answer']:.2f}, "
            f"a constant {result['constant']:.2f}, {result['length']:.0f} tokens, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
        return result


def ranking(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """Return the names of the scanned tasks, the largest gap first."""
    return sorted((name for name, task in tasks.items() if "n" in task), key=lambda name: -gap(tasks[name]))


def gap(task: dict[str, Any]) -> float:
    """Return the share of held answers minus the accuracy of the model or of the constant, whichever is higher."""
    return float(task["holds_answer"] - max(task["accuracy"], task["constant"]))


def main() -> None:
    """Scan all tasks and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--names", nargs="+", default=reasoning.names())
    parser.add_argument("--easy", action="store_true", help="use the lowest levels")
    parser.add_argument("--num_threads", type=int, default=2)
    options = parser.parse_args()
    names = [name + reasoning.EASY * options.easy for name in options.names]
    with ThreadPoolExecutor(options.num_threads) as pool:
        generated = dict(zip(names, pool.map(rows_of, names), strict=True))
    scanner = Scanner(options.model, options.num_threads)
    tasks = {
        name: {"left_out": rows} if isinstance(rows, str) else {**scanner.scan(name, rows, ROWS), "all_rows": False}
        for name, rows in generated.items()
    }
    ranked = ranking(tasks)
    while few := [name for name in ranked[:LEADING] if gap(tasks[name]) > 0 and not tasks[name]["all_rows"]]:
        for name in few:
            tasks[name] = {**scanner.scan(name, generated[name], ALL_ROWS), "all_rows": True}
        ranked = ranking(tasks)
    sampled = [name for name in ranked if gap(tasks[name]) >= LEAST_GAP]
    for name in sampled:
        rows = [row for row in generated[name]["validation"] if scanner.tokens(row) <= 2 * LONGEST_PROMPT]
        right = scanner.answer(name, rows[:SAMPLED_ROWS], temperature=1.0, num_generations=SAMPLES).right()
        tasks[name] |= {"right_samples": sum(right), "samples": len(right) * SAMPLES}
        print(f"{name:28} {sum(right)} of {len(right) * SAMPLES} samples right", flush=True)
    passed = [name for name in sampled if tasks[name]["right_samples"] >= FEWEST_RIGHT]
    chosen = sorted(passed, key=lambda name: tasks[name]["test_rows"] < reasoning.SPLIT_SIZES["test"])[:CHOSEN]
    result = {
        "model": Path(options.model).name,
        "rows": ROWS,
        "leading": LEADING,
        "tokens": TOKENS,
        "ranked": ranked,
        "passed": passed,
        "chosen": chosen,
        "tasks": tasks,
    }
    path = write_part("scan_reasoning", "easy" if options.easy else "default", result)
    print(f"chosen: {', '.join(chosen) or 'none'}; {path}")


if __name__ == "__main__":
    main()
