"""The seam between training and engines: jobs name their theta, answers come in any order, a class is an engine."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from estune import ESConfig, ESTrainer, UserError
from estune.engines.toy import ToyEngine
from estune.es.population import members_for_step, noise_of
from estune.es.types import GroupAnswer, GroupJob, Perturbation, Prompt, Sampling
from estune.es.update import make_update
from estune.train.setup import engine_class

PROMPTS = tuple(Prompt(index, f"x[{index}]", (1,)) for index in range(4))
SAMPLING = Sampling(seed=0, step=0, max_completion_length=40)


class Reversed(ToyEngine):
    """Yields the answers of a step in the reverse order of its jobs."""

    def answers(self, jobs: Iterable[GroupJob], should_stop=lambda: False) -> Iterator[GroupAnswer]:
        yield from reversed(list(super().answers(jobs, should_stop)))


def jobs(checksum: str) -> list[GroupJob]:
    members = [Perturbation(member, noise_of(0.1)) for member in members_for_step(0, 0, 12, False)]
    return [GroupJob((index,), (member,), checksum, PROMPTS, SAMPLING) for index, member in enumerate(members)]


def test_a_job_for_another_theta_is_refused() -> None:
    engine = ToyEngine()
    first = engine.theta_checksum
    assert first == engine.checksum() and len(list(engine.answers(jobs(first)))) == 12
    moved = engine.apply(make_update(members_for_step(0, 0, 2, False), [1.0, -1.0], 0.1))
    assert engine.theta_checksum == moved.checksum == engine.checksum() != first
    with pytest.raises(ValueError, match=f"{first} reached a replica that holds {moved.checksum}"):
        next(iter(engine.answers(jobs(first))))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_change_no_answer(threads: int) -> None:
    engine = ToyEngine(threads)
    found = {answer.indices: answer.completions for answer in engine.answers(jobs(engine.theta_checksum))}
    alone = ToyEngine()
    assert found == {answer.indices: answer.completions for answer in alone.answers(jobs(alone.theta_checksum))}


def test_the_order_of_answers_changes_no_journal(tmp_path: Path) -> None:
    lines = []
    for name in ("estune.engines.toy:ToyEngine", f"{__name__}:Reversed"):
        options = ESConfig(
            engine=name, model="toy", output_dir=str(tmp_path / name), max_steps=3, population_size=6, sigma=0.1,
            num_threads=1, report_to=["none"], reward_isolation="inline",
        )  # fmt: skip
        rows = [{"prompt": f"x[{index}]"} for index in range(8)]
        run = ESTrainer(args=options, reward_funcs=near_one, train_dataset=rows).train()
        journal = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        lines.append([{k: v for k, v in line.items() if k != "hash"} for line in journal[1:]])
    assert len(lines[0]) >= 3 and lines[0] == lines[1]


def near_one(completions: list[str], **_: object) -> list[float]:
    return [-abs(float(text) - 1) for text in completions]


def test_an_engine_of_ones_own_is_found_where_the_command_runs(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_engine.py").write_text("from estune.engines.toy import ToyEngine as Mine\nnothing = 1\n")
    (tmp_path / "broken_engine.py").write_text("def\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert engine_class("my_engine:Mine") is ToyEngine
    for name, why in {"my_engine:Absent": "Absent", "no_engine:X": "no_engine", "my_engine:nothing": "no engine",
                      "broken_engine:X": "invalid syntax"}.items():  # fmt: skip
        with pytest.raises(UserError, match=why):
            engine_class(name)
