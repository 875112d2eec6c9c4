"""On which of reasoning-gym's tasks does a real model know more than its answers say?

    estune fetch smollm2-135m
    python benchmarks/scan_reasoning.py            # about 20 minutes on two quiet cores
    python benchmarks/scan_reasoning.py --easy     # the same of the lowest levels of the package's curricula

A model may hold the answer in its text and still score nothing, because it never gives it as asked. Such a task shows
what outcome-only training can bring out. Every generator makes its rows in a process of its own with a time limit; of
those that do, the model answers some rows of the *validation* split greedily (the test split is left alone). Reported
are the exact accuracy, the share of completions that hold the answer as a word somewhere, the share that the most
common answer of the training rows would have, and the lengths. An answer that is a word of its own prompt (True, say,
or the next number of a series that repeats) is not counted as held: a copy of the prompt would hold it.

Tasks are ranked by what is held less what is right or what a constant would have, whichever is more. 32 rows do not
tell neighbours apart: the first five, as far as there is such a gap at all, answer all their validation rows, until
those that are first then have done so. An exact reward can
only bring out what is sometimes right: of the tasks where that gap is a tenth or more, some rows are sampled at
temperature 1, and the first two with 3 right samples of 128 or more are chosen, a threshold on few samples; those with
a full test split come before those of few different problems. There may be none.

No figure of a training run enters a ranking, but its rules were mended between comparisons (docs/log.md): what a
constant would have is subtracted since a first one on `gcd`, and the leading five answer all their rows since one on
`chain_sum:easy` (and whoever takes the place of one that falls back: since both).

The result goes to `benchmarks/results/scan_reasoning.json`, that of the easy problems to `scan_reasoning_easy.json`.
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

from record import write_result

from estune.compare.measure import Scorers
from estune.config import ESConfig
from estune.errors import UserError
from estune.tasks import get_task, reasoning
from estune.train import setup

ROWS, TOKENS, LONGEST_PROMPT = 32, 64, 160  # rows and completion tokens a task; tokens of a prompt, at most
LEADING = 5  # tasks of the largest gap, which answer every row
WHOLE = reasoning.SPLIT_SIZES["validation"]
SECONDS = 90.0  # in which a generator has to make its rows
LEAST_GAP = 0.1  # of answers held less answers given, from which a task is sampled
SAMPLED_ROWS, SAMPLES = 16, 8  # rows of each sampled task, samples of each row
FEWEST_RIGHT = 3  # of those 128 samples: about 2 %, or by its 95 % interval 0.8 to 6.7
CHOSEN = 2


def holds(text: str, wanted: str) -> bool:
    """Say whether a text holds the answer, as a word of its own."""
    return re.search(rf"(?<![\w.-]){re.escape(wanted)}(?!\w|\.\d)", text) is not None


def rows_of(name: str) -> dict[str, list[dict[str, Any]]] | str:
    """Return a generator's rows, or why there are none."""
    try:
        get_task(f"rg:{name}")  # which refuses scorers that run answers
        splits = reasoning.rows_of(name, SECONDS)
    except UserError as error:
        return str(error)
    if any(reasoning.right_answer(row) is None for rows in splits.values() for row in rows):
        return "the package keeps no answer to some of its questions: any that fits is right"
    return splits


def answers(rows: list[dict[str, Any]]) -> list[str]:
    """Return the right answers of rows."""
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
        """Return the length of a row's prompt."""
        return len(self.engine.tokenizer.encode(row["prompt"]))

    def answer(self, name: str, rows: list[dict[str, Any]], **settings: Any) -> Any:
        """Return an evaluation of a task's rows, greedy unless ``settings`` say otherwise."""
        with Scorers() as scorers:
            own = ESConfig(**{**vars(self.args), "task": f"rg:{name}", **settings})
            return scorers.answer(own, self.engine, rows)[0]

    def scan(self, name: str, splits: dict[str, list[dict[str, Any]]], n_rows: int) -> dict[str, Any]:
        """Return what a task's first validation rows show, or why it is left out."""
        rows = splits["validation"][:n_rows]
        lengths = sorted(self.tokens(row) for row in rows)
        middle = lengths[len(lengths) // 2]
        if middle > LONGEST_PROMPT:
            return {"left_out": f"its median prompt has {middle} tokens"}
        rows = [row for row in rows if self.tokens(row) <= 2 * LONGEST_PROMPT]
        started = time.perf_counter()
        evaluation = self.answer(name, rows)
        summary, texts, wanted = evaluation.summary(), [row.completions[0] for row in evaluation.rows], answers(rows)
        constant = collections.Counter(answers(splits["train"])).most_common(1)[0][0]
        copied = [holds(row["prompt"], answer) for row, answer in zip(rows, wanted, strict=True)]
        held = sum(not here and holds(text, answer) for here, text, answer in zip(copied, texts, wanted, strict=True))
        found = {
            "n": len(rows),
            "test_rows": len(splits["test"]),
            "accuracy": summary["accuracy"],
            "reward": summary["reward"],
            "holds_answer": held / len(rows),
            "constant": wanted.count(constant) / len(rows),
            "answer_in_prompt": sum(copied) / len(rows),
            "tagged": sum("<answer>" in text for text in texts) / len(rows),
            "length": summary["mean_length_tokens"],
            "prompt_tokens": middle,
            "example": {"prompt": rows[0]["prompt"], "completion": texts[0], "answer": wanted[0]},
        }
        print(
            f"{name:28} {len(rows):3} rows: right {found['accuracy']:.2f}, holds it {found['holds_answer']:.2f}, "
            f"a constant {found['constant']:.2f}, {found['length']:.0f} tokens, {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        return found


def ranking(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """Return the tasks that were scanned, the largest gap first."""
    return sorted((name for name, found in tasks.items() if "n" in found), key=lambda name: -gap(tasks[name]))


def gap(found: dict[str, Any]) -> float:
    """Return by how much more is held than is right or a constant would have."""
    return float(found["holds_answer"] - max(found["accuracy"], found["constant"]))


def main() -> None:
    """Scan and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--names", nargs="+", default=reasoning.names())
    parser.add_argument("--easy", action="store_true", help="the lowest levels")
    parser.add_argument("--num_threads", type=int, default=2)
    options = parser.parse_args()
    names = [name + reasoning.EASY * options.easy for name in options.names]
    with ThreadPoolExecutor(options.num_threads) as pool:
        generated = dict(zip(names, pool.map(rows_of, names), strict=True))
    scanner = Scanner(options.model, options.num_threads)
    tasks = {
        name: {"left_out": its} if isinstance(its, str) else {**scanner.scan(name, its, ROWS), "all_rows": False}
        for name, its in generated.items()
    }
    ranked = ranking(tasks)
    while few := [name for name in ranked[:LEADING] if gap(tasks[name]) > 0 and not tasks[name]["all_rows"]]:
        for name in few:
            tasks[name] = {**scanner.scan(name, generated[name], WHOLE), "all_rows": True}
        ranked = ranking(tasks)
    sampled = [name for name in ranked if gap(tasks[name]) >= LEAST_GAP]
    for name in sampled:
        rows = [row for row in generated[name]["validation"] if scanner.tokens(row) <= 2 * LONGEST_PROMPT]
        right = scanner.answer(name, rows[:SAMPLED_ROWS], temperature=1.0, num_generations=SAMPLES).right()
        tasks[name] |= {"right_samples": sum(right), "samples": len(right) * SAMPLES}
        print(f"{name:28} {sum(right)} of {len(right) * SAMPLES} samples right", flush=True)
    passed = [name for name in sampled if tasks[name]["right_samples"] >= FEWEST_RIGHT]
    chosen = sorted(passed, key=lambda name: tasks[name]["test_rows"] < reasoning.SPLIT_SIZES["test"])[:CHOSEN]
    found = {
        "model": Path(options.model).name,
        "rows": ROWS,
        "leading": LEADING,
        "tokens": TOKENS,
        "ranked": ranked,
        "passed": passed,
        "chosen": chosen,
        "tasks": tasks,
    }
    path = write_result("scan_reasoning" + "_easy" * options.easy, found)
    print(f"chosen: {', '.join(chosen) or 'none'}; {path}")


if __name__ == "__main__":
    main()
