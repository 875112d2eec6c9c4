"""Which of estune's files does one step of low-rank members enter? `python scripts/step_files.py` lists them.

A run of three steps on the embedded model is traced from the start of its second step to its end, in all threads. The
first step would count what happens once, as loading a file of noise kernels does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import estune
from estune.config import ESConfig
from estune.train.session import Session
from estune.train.trainer import ESTrainer

PACKAGE = Path(estune.__file__).parent
OPTIONS = dict(
    model="tiny", task="countdown", max_steps=3, population_size=4, batch_size=2, noise="lowrank", sigma=0.01,
    max_completion_length=8, num_threads=1, report_to=["none"], console="lines", reward_isolation="inline",
)  # fmt: skip


def main() -> None:
    """Trace the second step and print the files, room by room."""
    entered: set[Path] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            entered.add(path.relative_to(PACKAGE))

    plan = Session.plan

    def traced(self: Session) -> Any:
        tracing = trace if self.run.steps_done == 1 else None
        threading.setprofile_all_threads(tracing) if hasattr(threading, "setprofile_all_threads") else None
        sys.setprofile(tracing)
        return plan(self)

    Session.plan = traced  # type: ignore[method-assign]
    with (
        tempfile.TemporaryDirectory() as place,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        ESTrainer(args=ESConfig(output_dir=f"{place}/run", **OPTIONS)).train()  # type: ignore[arg-type]
    for path in sorted(entered):
        print(path)
    print(f"{len(entered)} files")


if __name__ == "__main__":
    main()
