"""On which of reasoning-gym's tasks does a real model know more than its answers say?

    estune fetch smollm2-135m
    python benchmarks/scan_reasoning.py            # about 25 minutes on two quiet cores
    python benchmarks/scan_reasoning.py --easy     # the same of the lowest levels of the package's curricula

A model may hold the answer in its text and still score nothing, because it never gives it as asked. Such a task shows
what outcome-only training can bring out. Every generator makes its rows in a process of its own with a time limit; of
those that do, the model answers some rows of the *validation* split greedily (the test split is left alone). Reported
are the exact accuracy, the share of completions that hold the answer as a word somewhere, the share that the most
common answer of the training rows would have, and the lengths. An answer that is a word of its own prompt (True, say,
or the next number of a series that repeats) is not counted as held: a copy of the prompt would hold it.

Tasks are ranked by what is held less what is right or what a constant would have, whichever is more. An exact reward
can only bring out what is sometimes right: of the tasks where that gap is a tenth or more, some rows are sampled at
temperature 1, and the first two with 3 right samples of 128 or more are chosen, a threshold on few samples; those with
a full test split come before those of few different problems. There may be none. No training result has a part in it.
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

from estune import inputs
from estune.compare.measure import Judges
from estune.config import ESConfig
from estune.errors import UserError
from estune.tasks import get_task, reasoning

ROWS, TOKENS, LONGEST_PROMPT = 32, 64, 160  # rows and completion tokens a task; tokens of a prompt, at most
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
    args = ESConfig(model=options.model, task="rg:gcd", max_completion_length=TOKENS, num_threads=options.num_threads,
                    reward_isolation="inline")  # fmt: skip
    args = inputs.resolve_config(args, ROWS)
    engine = inputs.load_engine(args)
    tasks: dict[str, Any] = {}
    asked: dict[str, list[dict[str, Any]]] = {}
    for name, its in generated.items():
        if isinstance(its, str):
            tasks[name] = {"left_out": its}
            continue
        rows, tests = its["validation"][:ROWS], len(its["test"])
        constant = collections.Counter(answers(its["train"])).most_common(1)[0][0]
        lengths = sorted(len(engine.tokenizer.encode(row["prompt"])) for row in rows)
        if lengths[len(lengths) // 2] > LONGEST_PROMPT:
            tasks[name] = {"left_out": f"its median prompt has {lengths[len(lengths) // 2]} tokens"}
            continue
        rows = [row for row in rows if len(engine.tokenizer.encode(row["prompt"])) <= 2 * LONGEST_PROMPT]
        asked[name] = rows
        started = time.perf_counter()
        own = ESConfig(**{**vars(args), "task": f"rg:{name}"})
        with Judges() as judges:
            evaluation, _ = judges.answer(own, engine, rows)
        wanted = answers(rows)
        texts = [row.completions[0] for row in evaluation.rows]
        summary = evaluation.summary()
        copied = [holds(row["prompt"], answer) for row, answer in zip(rows, wanted, strict=True)]
        held = sum(not here and holds(text, answer) for here, text, answer in zip(copied, texts, wanted, strict=True))
        tasks[name] = {
            "n": len(rows),
            "test_rows": tests,
            "accuracy": summary["accuracy"],
            "reward": summary["reward"],
            "holds_answer": held / len(rows),
            "constant": wanted.count(constant) / len(rows),
            "answer_in_prompt": sum(copied) / len(rows),
            "tagged": sum("<answer>" in text for text in texts) / len(rows),
            "length": summary["mean_length_tokens"],
            "prompt_tokens": lengths[len(lengths) // 2],
            "example": {"prompt": rows[0]["prompt"], "completion": texts[0], "answer": wanted[0]},
        }
        found = tasks[name]
        print(
            f"{name:28} right {found['accuracy']:.2f}, holds it {found['holds_answer']:.2f}, tagged "
            f"{found['tagged']:.2f}, {found['length']:.0f} tokens, {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    scanned = [name for name, found in tasks.items() if "n" in found]
    gaps = {
        name: tasks[name]["holds_answer"] - max(tasks[name]["accuracy"], tasks[name]["constant"]) for name in scanned
    }
    ranked = sorted(scanned, key=lambda name: -gaps[name])
    sampled = [name for name in ranked if gaps[name] >= LEAST_GAP]
    for name in sampled:
        own = ESConfig(**{**vars(args), "task": f"rg:{name}", "temperature": 1.0, "num_generations": SAMPLES})
        with Judges() as judges:
            right = judges.answer(own, engine, asked[name][:SAMPLED_ROWS])[0].right()
        tasks[name] |= {"right_samples": sum(right), "samples": len(right) * SAMPLES}
        print(f"{name:28} {sum(right)} of {len(right) * SAMPLES} samples right", flush=True)
    passed = [name for name in sampled if tasks[name]["right_samples"] >= FEWEST_RIGHT]
    chosen = sorted(passed, key=lambda name: tasks[name]["test_rows"] < reasoning.SPLIT_SIZES["test"])[:CHOSEN]
    found = {"model": Path(options.model).name, "rows": ROWS, "tokens": TOKENS, "ranked": ranked, "passed": passed,
             "chosen": chosen, "tasks": tasks}  # fmt: skip
    path = write_result("scan_reasoning" + "_easy" * options.easy, found)
    print(f"chosen: {', '.join(chosen) or 'none'}; {path}")


if __name__ == "__main__":
    main()
