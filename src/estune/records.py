"""The files of JSON lines in a run: metrics, evaluated rows, completions; written, read, and cut back on a resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from estune.engines.base import Prompt
from estune.evaluation import Evaluation
from estune.files import is_count, is_number, parse_json, replace_file
from estune.rollouts import Rollouts

METRICS_FILE = "metrics.jsonl"


def evaluation_path(run_dir: Path, step: int) -> Path:
    """Return where the held-out rows are kept that were answered after ``step`` steps."""
    return run_dir / "eval" / f"step_{step:05d}.jsonl"


def write_rows(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation's rows as JSON lines; the file appears whole."""
    path.parent.mkdir(exist_ok=True)
    rows = [dataclasses.asdict(row) for row in evaluation.rows]
    lines = [json.dumps({k: v for k, v in row.items() if k != "token_ids"}, ensure_ascii=False) for row in rows]
    _write_lines(path, lines)


def write_completions(path: Path, rollouts: Rollouts, prompts: Sequence[Prompt]) -> None:
    """Write the population's completions as JSON lines: member, row, prompt, completion, rewards, log_extra columns."""
    path.parent.mkdir(exist_ok=True)
    lines = []
    for member, group in enumerate(rollouts.groups):
        if group.completions is None:
            continue
        for b, (prompt, answers) in enumerate(zip(prompts, group.completions, strict=True)):
            for g, text in enumerate(answers):
                line = {"member": member, "row": prompt.row_id, "prompt": prompt.text, "completion": text,
                        "rewards": group.rewards[b][g]}  # fmt: skip
                extra = {name: values[b * len(answers) + g] for name, values in (group.extra or {}).items()}
                lines.append(json.dumps(extra | line, ensure_ascii=False, default=str))
    _write_lines(path, lines)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    data = "".join(line + "\n" for line in lines).encode("utf-8", errors="backslashreplace")
    replace_file(path, lambda file: file.write(data))


def cut_back(run_dir: Path, steps_done: int) -> None:
    """Drop metrics and completions of steps after ``steps_done``, and evaluations whose rows were not written."""
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
    """Return the record of a line of metrics; None where the line is torn or damaged."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not is_count(record.get("step")):
        return None
    return record if is_number(record.get("train_time_s") or 0.0) else None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run's `metrics.jsonl`, torn and damaged lines left out."""
    if not (run_dir / METRICS_FILE).exists():
        return []
    records = map(_record, (run_dir / METRICS_FILE).read_bytes().splitlines())
    return [record for record in records if record is not None]
