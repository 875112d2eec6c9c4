"""Domain D: commands that receive a signal, or whose standard streams are closed, full, terminals, or without a reader.

They must compute the same as with files as streams ("quiet"), and end with a documented exit status.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from command_line import TOY
from fuzz_forks import NEVER, NOT_CLEAN, STREAMS, Case, Done, Fault, Forks, refusal, tail

REWARDS = '''
"""Rewards that write to streams, descriptors, warnings and logs; their values do not depend on it."""

import contextlib
import logging
import os
import sys
import warnings


def _rewards(completions):
    return [len(text) + sum(map(ord, text)) % 7 / 10 for text in completions]


def quiet(completions, **_):
    return _rewards(completions)


def prints(completions, **_):
    print("a reward says: \\u2603")
    print("and on stderr", file=sys.stderr, flush=True)
    return _rewards(completions)


def writes(completions, **_):
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"a reward writes to a descriptor\\n")
    return _rewards(completions)


def warns(completions, **_):
    warnings.warn("a reward warns")
    logging.getLogger("a reward").error("a reward logs")
    return _rewards(completions)


def reads(completions, **_):
    with contextlib.suppress(OSError, ValueError, AttributeError, EOFError):
        sys.stdin.read(1)
    return _rewards(completions)
'''
COMMANDS: dict[str, tuple[Any, ...]] = {
    "train": (*TOY, "--max_steps", 2, "--population_size", 2, "--batch_size", 2, "--sigma", 0.1, "--num_threads", 1),
    "train the panel": (*TOY, "--max_steps", 2, "--population_size", 2, "--batch_size", 2, "--sigma", 0.1,
                        "--num_threads", 1, "--console", "panel"),
    "score": ("score", "--completions", "scored.jsonl", "--json"),
    "score as text": ("score", "--completions", "scored.jsonl"),
    "evaluate": ("evaluate", "--model", "tiny", "--dataset_name", "rows.jsonl", "--max_completion_length", 2, "--json"),
    "env": ("env", "--json"),
    "env as text": ("env",),
    "help": ("train", "--help"),
    "version": ("--version",),
    "nothing": (),
    "bad option": ("train", "--sgima", 1),
    "bad value": (*TOY, "--sigma", -1),
}  # fmt: skip
SCORED = "".join(f'{{"prompt": "p", "completion": "{text}"}}\n' for text in ("a", "bc", "\\u2603"))
ROWS = "".join(f'{{"prompt": "{text}"}}\n' for text in ("a", "bc"))
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")

SHORT = 25  # cases in `make test-e2e`
cases = st.fixed_dictionaries(
    {
        "command": st.sampled_from(["train"] * 6 + ["train the panel"] * 3 + ["score", "evaluate"] * 2 + [*COMMANDS]),
        "streams": st.fixed_dictionaries({name: st.sampled_from(STREAMS) for name in ("stdin", "stdout", "stderr")}),
        "reward": st.sampled_from(["quiet", "prints", "writes", "warns", "reads"]),
        "isolation": st.sampled_from(["inline", "process"]),
        "signal": st.none() | st.tuples(st.sampled_from(SIGNALS), st.integers(0, 1000)).map(list),  # name, thousandths
    }
)

_quiet: dict[str, tuple[Done, bytes]] = {}  # command line -> result and journal with quiet streams


def words(case: Case) -> list[Any]:
    """Return a case's command line."""
    command = list(COMMANDS[case["command"]])
    if case["command"].startswith(("train", "score", "evaluate")):
        command += ["--reward_funcs", f"rewards.py:{case['reward']}", "--reward_isolation", case["isolation"]]
    return command


def check(case: Case, place: Path, forks: Forks) -> str:
    """Run a command with odd streams; compare it with the command with quiet streams; return the outcome."""
    if (case["reward"], case["isolation"], case["streams"]["stdin"]) == ("reads", "inline", "pty"):
        return "an inline reward that reads a terminal waits for its user"
    (place / "rewards.py").write_text(REWARDS)
    (place / "scored.jsonl").write_text(SCORED)
    (place / "rows.jsonl").write_text(ROWS)
    command, trains = words(case), case["command"].startswith("train")
    quiet, quiet_journal = reference(command, place, forks)
    at, number = NEVER, signal.SIGKILL
    if case["signal"] and trains:  # other commands write too little
        at, number = 1 + case["signal"][1] * quiet.writes // 1000, signal.Signals[case["signal"][0]]
    done = forks.run(command, place, streams=case["streams"], signal_at=(at, number))
    check_output(case, done, quiet)
    statuses = {quiet.code}
    if at != NEVER:
        statuses |= {0, -number} | ({130} if number == signal.SIGINT else set())
    elif not trains and case["streams"]["stdout"] in ("broken", "full"):
        statuses |= {1, 2}
    if done.code not in statuses:
        raise Fault(f"exit status {done.code} is none of {sorted(statuses)}: {tail(done)}")
    if not trains:
        return f"{case['command']}: {done.code}"
    if at != NEVER:
        sentence = refusal(forks.run([*command, "--resume"], place), "the resume after a signal")
        if sentence is not None:
            raise Fault(f"the resume after a signal is refused: {sentence}")
    if _journal(place) != quiet_journal:
        raise Fault(f"the journal is not the quiet run's: {tail(done)}")
    return f"{case['command']}: {done.code}, {'resumed to ' if at != NEVER else ''}the same journal"


def reference(command: list[Any], place: Path, forks: Forks) -> tuple[Done, bytes]:
    """Return a command's result and journal with quiet streams."""
    key = json.dumps(command)
    if key not in _quiet:
        done = forks.run(command, place, signal_at=(NEVER, signal.SIGKILL))
        _quiet[key] = done, _journal(place)
        shutil.rmtree(place / "run", ignore_errors=True)
    return _quiet[key]


def _journal(place: Path) -> bytes:
    path = place / "run" / "journal.jsonl"
    return path.read_bytes() if path.exists() else b""


def check_output(case: Case, done: Done, quiet: Done) -> None:
    """Check that the output holds no traceback, and that stdout is as with quiet streams.

    Raises:
        Fault: it is not, or the command hung.
    """
    if done.hung:
        raise Fault(f"it hangs: {tail(done)}")
    output = done.err + done.out
    if any(words in output for words in NOT_CLEAN):
        raise Fault(f"a traceback: {tail(done)} stdout: {done.out[-1500:]}")
    if case["signal"] or not case["command"].startswith(("score", "evaluate", "env", "help", "version")):
        return
    if case["streams"]["stdout"] == "file" and case["command"] not in ("score as text", "env as text"):
        if case["command"] in ("score", "evaluate", "env"):
            json.loads(done.out)  # raises unless stdout is exactly one value
        if done.out != quiet.out:
            raise Fault(f"stdout is not the quiet run's: {done.out[-500:]!r}")
