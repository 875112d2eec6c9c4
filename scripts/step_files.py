"""Lists the files of estune that one step with low-rank members executes: python scripts/step_files.py

A run of three steps on the embedded model is traced during its second step: in all threads from Python 3.12 on, and
in the main thread before. The first step is left out, because it also executes code that runs once, such as the
compilation of the noise kernels. docs/architecture.md gives the reason for each file.
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
    """Trace the second step and print the files."""
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
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stdout(devnull),
        contextlib.redirect_stderr(devnull),
    ):
        ESTrainer(args=ESConfig(output_dir=f"{place}/run", **OPTIONS)).train()  # type: ignore[arg-type]
    for path in sorted(entered):
        print(path)
    print(f"{len(entered)} files")


if __name__ == "__main__":
    main()
