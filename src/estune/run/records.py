"""A run's files of JSON lines (metrics, evaluated rows, completions): write, read, and truncate them on a resume."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from estune.files import is_count, is_number, parse_json, replace_file

METRICS_FILE = "metrics.jsonl"


def evaluation_path(run_dir: Path, step: int) -> Path:
    """Return the file of the held-out rows evaluated after ``step`` steps."""
    return run_dir / "eval" / f"step_{step:05d}.jsonl"


def completions_path(run_dir: Path, step: int) -> Path:
    """Return the file of the members' completions in step ``step`` (1-based)."""
    return run_dir / "completions" / f"step_{step:05d}.jsonl"


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines; the file is complete or absent. A value without a JSON type is written as text."""
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    data = text.encode("utf-8", errors="backslashreplace")
    replace_file(path, lambda file: file.write(data))


def is_right(accuracy: float) -> bool:
    """Return whether a completion's accuracy, 1.0 or 0.0, says that the completion is right."""
    return accuracy == 1.0


def cut_back(run_dir: Path, steps_done: int) -> None:
    """Delete metrics and completions of steps after ``steps_done``, and metrics of evaluations without their rows."""
    path = run_dir / METRICS_FILE
    if path.exists():
        kept = [line for line in path.read_bytes().splitlines() if _keep(line, run_dir, steps_done)]
        text = b"".join(line + b"\n" for line in kept)
        if text != path.read_bytes():
            replace_file(path, lambda file: file.write(text))
    for folder in ("completions", "eval"):
        for file in (run_dir / folder).glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > steps_done:
                file.unlink()


def _keep(line: bytes, run_dir: Path, steps_done: int) -> bool:
    record = _record(line)
    if record is None:
        return False
    step = record["step"]
    if "eval_reward" in record and not evaluation_path(run_dir, step).exists():
        return False
    return bool(step <= steps_done)


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line of metrics; None if the line is torn or damaged."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not is_count(record.get("step")):
        return None
    return record if is_number(record.get("train_time_s") or 0.0) else None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run's `metrics.jsonl`, without torn and damaged lines."""
    if not (run_dir / METRICS_FILE).exists():
        return []
    records = map(_record, (run_dir / METRICS_FILE).read_bytes().splitlines())
    return [record for record in records if record is not None]


def train_time_s(path: Path) -> float:
    """Return the seconds of training in a run's metrics: steps, without evaluations and saving."""
    return max((record.get("train_time_s") or 0.0 for record in read_metrics(path)), default=0.0)
