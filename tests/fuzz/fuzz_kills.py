"""Domain C: runs that are killed at random writes, may lose or change one file, and are resumed.

A case must end in the bytes of the uninterrupted run or in one sentence, never in other weights.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from command_line import TOY
from fuzz_forks import NEVER, Case, Fault, Forks, contents, differing, label, refusal

FILES = ("journal.jsonl", "*es_state.json", "*.safetensors", "*metrics.jsonl", "pending.jsonl", "eval/*",
         "completions/*", "es_config.json", "env.json", "README.md", "*config.json", "*")  # fmt: skip
# Files that no command computes weights from. A resume may leave a damaged one as it is. If the rows of an evaluation
# are missing, metrics.jsonl may lose the line of that evaluation.
RECORDS = ("metrics.jsonl", "eval/*", "completions/*", "README.md", "env.json", "trackers.json")
TINY = ("train", "--model", "tiny", "--task", "countdown", "--max_completion_length", 3, "--report_to", "none",
        "--output_dir", "run")  # fmt: skip

options = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["toy"] * 15 + ["tiny"]),
        "noise": st.sampled_from(["full", "lowrank"]),
        "saves": st.sampled_from([(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]).map(list),  # save_steps, save_total_limit
        "eval_steps": st.sampled_from([0, 2]),
        "log_completions": st.booleans(),
    }
)
share = st.integers(0, 1000)  # thousandths
damages = st.fixed_dictionaries(
    {
        "files": st.sampled_from(FILES),
        "which": share,  # position among the matching files, sorted by name
        "how": st.sampled_from(["truncate", "flip", "empty", "delete"]),
        "where": share,  # position in the file
        "bit": st.integers(0, 7),
    }
)
SHORT = 25  # cases in `make test-e2e`
cases = st.fixed_dictionaries(
    {
        "options": options,
        "kills": st.lists(share, min_size=1, max_size=3),  # positions among the writes of the whole run
        "damage": st.none() | damages,
        "resume": st.sampled_from(["with its options", "alone"]),
    }
)

_references: dict[str, tuple[dict[str, Any], int]] = {}  # options -> files and number of writes of the whole run


def words(chosen: Case) -> list[Any]:
    """Return the command line of a run with these options."""
    flags = dict(noise=chosen["noise"], save_steps=chosen["saves"][0], save_total_limit=chosen["saves"][1],
                 eval_steps=chosen["eval_steps"], max_steps=3, population_size=4, batch_size=2, sigma=0.1,
                 num_threads=1, reward_isolation="inline")  # fmt: skip
    if chosen["eval_steps"]:
        flags["eval_rows"] = 2
    if chosen["noise"] == "lowrank":
        flags["rank"] = 2
    start = TOY if chosen["model"] == "toy" else TINY
    log = "--log_completions" if chosen["log_completions"] else "--no_log_completions"
    return [*start, *(word for name, value in flags.items() for word in (f"--{name}", value)), log]


def check(case: Case, place: Path, forks: Forks) -> str:
    """Kill, damage and resume a run; compare it with the whole run; return the outcome."""
    command = words(case["options"])
    whole, n_writes = reference(command, place, forks)
    run = place / "run"
    finished = False
    for kill in case["kills"]:
        at = 1 + kill * n_writes // 1000
        done = forks.run([*command, "--resume"], place, signal_at=(at, signal.SIGKILL))
        if done.code != -signal.SIGKILL and refusal(done, "a resume after a kill"):
            raise Fault(f"a resume after a kill is refused: {done.err[-300:]}")
        finished = done.code == 0
    damaged = damage(case["damage"], run) if case["damage"] and run.exists() else None
    alone = case["resume"] == "alone" and damaged != "es_config.json" and (run / "es_config.json").exists()
    resumed = ["train", "--resume", "--output_dir", "run"] if alone else [*command, "--resume"]
    sentence = refusal(forks.run(resumed, place), f"the resume (damaged: {damaged})")
    if sentence is not None:
        if damaged is None:
            raise Fault(f"a run that was only killed is refused: {sentence}")
        return f"{case['damage']['how']} {generic(damaged)}: refused: {label(sentence)}"
    resumed_files = contents(run)
    stays = compare(resumed_files, whole, damaged)
    if refusal(forks.run([*command, "--resume"], place), "the resume of a finished run"):
        raise Fault("the resume of a finished run is refused")
    if changed := differing(contents(run), resumed_files):
        raise Fault(f"the resume of a finished run changes {changed}")
    if damaged is None:
        return "same bytes"
    outcome = f"{'finished before, and ' * finished}the damaged file stays as it is, the others are the same"
    return f"{case['damage']['how']} {generic(damaged)}: {outcome if stays else 'same bytes'}"


def reference(command: list[Any], place: Path, forks: Forks) -> tuple[dict[str, Any], int]:
    """Return the files of the whole run and its number of writes."""
    key = json.dumps(command)
    if key not in _references:
        whole = place / "whole"
        whole.mkdir()
        done = forks.run(command, whole, signal_at=(NEVER, signal.SIGKILL))
        if refusal(done, "the whole run"):
            raise Fault(f"the whole run is refused: {done.err}")
        _references[key] = contents(whole / "run"), done.writes
        shutil.rmtree(whole)
    return _references[key]


def damage(how: Case, run: Path) -> str | None:
    """Damage one file of a run; return its name, or None where the run has no file or the damage changes nothing."""
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    matching = [name for name in names if fnmatch(name, how["files"])] or names
    if not matching:
        return None
    name = matching[how["which"] * (len(matching) - 1) // 1000]
    path = run / name
    data = bytearray(path.read_bytes())
    at = how["where"] * (len(data) - 1) // 1000
    if how["how"] == "delete":
        path.unlink()
    elif how["how"] == "flip" and data:
        data[at] ^= 1 << how["bit"]
        path.write_bytes(data)
    else:
        os.truncate(path, at if how["how"] == "truncate" and data else 0)
        if not data:
            return None
    return name


def compare(resumed: dict[str, Any], whole: dict[str, Any], damaged: str | None) -> bool:
    """Return whether a damaged file stays damaged, in the cases where that is allowed.

    It is allowed in a checkpoint, which is not read if a newer state is whole, and in a record.

    Raises:
        Fault: other files differ from those of the whole run.
    """
    names = set(differing(resumed, whole))
    allowed: set[str] = set()
    if damaged is not None:
        allowed = {"metrics.jsonl"} if fnmatch(damaged, "eval/*") or damaged == "pending.jsonl" else set()
        if is_record(damaged) or damaged.startswith("checkpoint-"):
            allowed |= {damaged, "README.md"} if is_record(damaged) else {damaged}
    if names - allowed:
        raise Fault(f"damaged: {damaged}; files that differ from the whole run's: {sorted(names - allowed)}")
    return damaged in names


def is_record(name: str) -> bool:
    """Return whether a file is one of `RECORDS`."""
    return any(fnmatch(name, pattern) for pattern in RECORDS)


def generic(name: str) -> str:
    """Return a file's name without its numbers."""
    return "".join("N" if letter.isdigit() else letter for letter in name).replace("NNNNN", "N")
