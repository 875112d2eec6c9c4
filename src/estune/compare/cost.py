"""What a comparison has cost so far, sitting by sitting: `results/cost.json`, written whenever a process has ended."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from estune.files import write_json


class Cost:
    """Processor and wall seconds of a comparison's sittings; the file is a list of them, the present one last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._sittings: list[dict[str, Any]] = []
        self._started = 0.0

    def open(self, file: Path, facts: dict[str, Any]) -> None:
        """Begin a sitting; ``facts`` say what code runs it, on which machine."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._started = file, time.perf_counter()
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        self._sittings = [*before, {"cpu_s": 0.0, "wall_s": 0.0, **facts}]

    def add(self, cpu_s: float) -> None:
        """Count a process that has ended."""
        assert self._file is not None
        with self._lock:
            sitting = self._sittings[-1]
            sitting["cpu_s"] = round(sitting["cpu_s"] + cpu_s, 1)
            sitting["wall_s"] = round(time.perf_counter() - self._started, 1)
            write_json(self._file, self._sittings)
