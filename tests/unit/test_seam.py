"""The seam between training and engines: jobs name their theta, answers come in any order, a class is an engine."""

import dataclasses
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from estune import ESConfig, ESTrainer, UserError
from estune.cli import main
from estune.engines.toy import ToyEngine
from estune.es.population import members_for_step, noise_of
from estune.es.types import Completion, GroupAnswer, GroupJob, Interrupted, Perturbation, Prompt, Sampling
from estune.es.update import Update, make_update
from estune.run.origin import refuse_foreign_engine
from estune.train.rollouts import checked_answers
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


def block(name: str) -> str:
    """Return a Python block of `docs/extending.md` by its first line."""
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.findall(rf"```python\n(# {re.escape(name)}\n.*?)```", text, flags=re.DOTALL)[0]


@pytest.fixture
def bigram(tmp_path: Path, monkeypatch) -> Callable[..., Any]:
    """The engine of `docs/extending.md` in a directory, and its reward; returns a function that starts commands."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "bigram.py").write_text(block("bigram.py"))
    (tmp_path / "own" / "vowels.py").write_text(
        "def vowels(completions, **_):\n    return [sum(c in 'aeiou' for c in text) / 16 for text in completions]\n"
    )
    rows = "".join(json.dumps({"prompt": letter}) + "\n" for letter in "abcdefgh")
    (tmp_path / "own" / "rows.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path / "own")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "bigram", raising=False)
    settings = (
        "--population_size 20 --sigma 0.1 --learning_rate 0.3 --max_completion_length 16 --max_steps 4 "
        "--dataset_name rows.jsonl --reward_funcs vowels.py:vowels --reward_isolation inline --report_to none "
        "--console lines --output_dir run"
    )

    def command(*words: str, engine: str = "bigram:BigramEngine") -> int:
        given = ("train", "--engine", engine, *settings.split(), *words) if words[:1] != ("as",) else words[1:]
        return main(list(given))

    return command


@pytest.mark.parametrize("engine", ["bigram:BigramEngine", "bigram.py:BigramEngine"])
def test_an_engine_of_ones_own_is_used_by_every_command(
    bigram, engine: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    assert bigram(engine=engine) == 0
    said = capsys.readouterr()
    assert "loading bigram" in said.out + said.err and "tiny" not in said.out + said.err
    card = Path("run/README.md").read_text()
    assert "`bigram`" in card and "transformers" not in card and "tiny" not in card
    monkeypatch.chdir(tmp_path)  # every command below finds the reward and the rows where the run did
    named = f"--engine {engine.replace('bigram.py', 'own/bigram.py')}"
    assert main(f"evaluate --model own/run {named} --json --reward_isolation inline".split()) == 0
    trained = json.loads(capsys.readouterr().out)["reward"]
    words = f"evaluate {named} --json --reward_isolation inline"
    words += " --max_completion_length 16 --dataset_name own/rows.jsonl --reward_funcs own/vowels.py:vowels"
    assert main(words.split()) == 0
    assert json.loads(capsys.readouterr().out)["reward"] < trained
    assert main(f"evaluate --model own/run {named} --limit 1 --reward_isolation inline".split()) == 0
    assert "vowels.py:vowels" in capsys.readouterr().err.partition("reward is ")[2]
    assert main(f"replay own/run {named} --output_dir again".split()) == 0
    weights = [Path(where, "model.safetensors").read_bytes() for where in ("own/run", "again")]
    assert weights[0] == weights[1]
    assert main("export own/run --patch run.estp".split()) == 0
    assert main("apply run.estp --model bigram".split()) == 2
    assert "name it with --engine" in capsys.readouterr().err
    assert main("apply run.estp --model bigram --engine own/bigram.py:BigramEngine".split()) == 0
    assert Path("run/model.safetensors").read_bytes() == weights[0]
    assert main("train --resume --output_dir own/run --max_steps 5".split()) == 0
    assert main(f"probe --model own/run {named} --dataset_name own/rows.jsonl --reward_funcs own/vowels.py:vowels "
                "--reward_isolation inline --sigmas 0.1 --json --max_completion_length 16".split()) == 0  # fmt: skip


@pytest.mark.parametrize("engine", ["bigram:BigramEngine", "bigram.py:BigramEngine"])
def test_a_run_does_not_choose_the_code_that_runs(bigram, engine: str, tmp_path: Path, monkeypatch, capsys) -> None:
    assert bigram(engine=engine) == 0
    source, journal = Path("bigram.py"), Path("run/journal.jsonl")
    source.write_text(source.read_text() + "open('executed', 'w').close()\n")
    sys.modules.pop("bigram", None)
    capsys.readouterr()
    refused = f"read the engine's code, then give --engine {engine}"
    for words in ("evaluate --model run --reward_isolation inline", "replay run --output_dir again",
                  "probe --model run --dataset_name rows.jsonl --reward_funcs vowels.py:vowels"):  # fmt: skip
        assert main(words.split()) == 2
        assert refused in capsys.readouterr().err
    resume = "train --resume --output_dir run --max_steps 5".split()
    assert main(resume) == 2
    assert "the source of an engine outside estune: since the run began, file bigram" in capsys.readouterr().err
    monkeypatch.setattr("estune.run.resume.check_engine_files", lambda *_: False)  # a header without the files' hashes
    assert main(resume) == 2
    assert refused in capsys.readouterr().err and journal.exists() and not Path("executed").exists()
    assert main([*resume, "--engine", engine]) == 2
    assert "the source of an engine outside estune: since" in capsys.readouterr().err and Path("executed").exists()


def test_a_run_may_name_the_engines_of_estune() -> None:
    for engine in ("hf", "toy", "estune.engines.toy:ToyEngine"):
        refuse_foreign_engine(engine, Path("run"))
    for engine in (
        "evil.py:Base",
        "estune.py:Base",
        "estune.engines.toy.py:Base",
        "estune/engines/toy:Base",
        "evil:Base",
    ):
        with pytest.raises(UserError, match="must not choose the code"):
            refuse_foreign_engine(engine, Path("run"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--model /nonexistent", "knows no model '/nonexistent'"),
        ("--dtype bfloat16", "no use for dtype"),
        ("--trainable_parameters table", "no use for trainable_parameters"),
    ],
)
def test_an_engine_of_ones_own_refuses_what_it_ignores(bigram, words: str, why: str, capsys) -> None:
    assert bigram(*words.split()) == 2
    assert why in capsys.readouterr().err


def test_a_resume_compares_the_source_of_an_engine(bigram, capsys) -> None:
    assert bigram() == 0
    header = json.loads(Path("run/journal.jsonl").read_text().partition("\n")[0])
    assert header["identity"]["engine_source"]["BigramEngine"]
    source = Path("bigram.py")
    source.write_text(source.read_text().replace("argmax()", "argmin()"))
    del sys.modules["bigram"]
    assert bigram("as", "train", "--resume", "--output_dir", "run", "--max_steps", "6") == 2
    assert "the source of an engine outside estune: since the run began, file bigram" in capsys.readouterr().err
    changed = "engine outside estune is not the one that the run began with: file bigram of BigramEngine changed"
    for words in ("evaluate --model run --reward_isolation inline", "replay run --output_dir again"):
        assert main([*words.split(), "--engine", "bigram:BigramEngine"]) == 0
        assert changed in capsys.readouterr().err
    source.write_text(source.read_text().replace("argmin()", "argmax()") + "# a comment\n")
    del sys.modules["bigram"]
    assert main([*words.split()[:-1], "third", "--engine", "bigram:BigramEngine"]) == 0
    assert "is not the one" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("int(table[made[-1]].argmax())", "table[made[-1]].argmax()", "a token id is int64, not int"),
        ("made[-1] == END)", "np.bool_(True))", "finished and finite must be bool"),
        ("tuple(made[1:])", "(2**70,)", "a token id is 1180591620717411303424, not in 0 .. 255"),
        ("tuple(made[1:])", "(97, 256)", "a token id is 256, not in 0 .. 255"),
        ("tuple(made[1:])", "(97, -1)", "a token id is -1, not in 0 .. 255"),
        ("tuple(made[1:])", "tuple(made * 20)", "tokens, more than max_completion_length"),
        ("return answers", "return answers[1:]", "0 instead of 1 prompts"),
        ("return answers", "return None", "NoneType instead of a list of 1 prompts"),
        ("* sampling.num_generations", "* 3", "3 instead of 1 completions of a prompt"),
        ("Completion(tuple(made[1:]), made[-1] == END)", "made", "list instead of Completion"),
        ("self.assets =", "assets =", "has no assets"),
        ("def __init__(self)", "def __init__(self, size)", "cannot be made without arguments"),
    ],
)
def test_a_broken_engine_is_refused_in_one_sentence(bigram, old: str, new: str, why: str, capsys) -> None:
    source = Path("bigram.py").read_text()
    assert old in source
    Path("bigram.py").write_text(source.replace(old, new))
    assert bigram("--batch_size", "1") == 2
    error = capsys.readouterr().err
    assert why in error and "igram" in error and "Traceback" not in error


class Breaking(ToyEngine):
    """Breaks the contract of `answers` or `apply` in the way that ``how`` names."""

    how = ""

    def answers(self, jobs: Iterable[GroupJob], should_stop=lambda: False) -> Any:
        made = list(super().answers(jobs, should_stop))
        if self.how in ("generate_s", "perturb_s"):
            return [dataclasses.replace(answer, **{self.how: self.seconds}) for answer in made]
        changed = {
            "none": None,
            "dropped": made[1:],
            "twice": [*made, made[0]],
            "unasked": [],
            "list": [dataclasses.replace(answer, indices=list(answer.indices)) for answer in made],
            "other": [dataclasses.replace(answer, indices=(99,)) for answer in made],
            "tuples": [dataclasses.astuple(answer) for answer in made],
        }
        return changed.get(self.how, made)

    def apply(self, update: Update) -> Any:
        moved = super().apply(update)
        return None if self.how == "apply" else moved


@pytest.mark.parametrize(
    ("how", "seconds", "why"),
    [
        ("none", 0, "answers returned NoneType, not an iterator"),
        ("dropped", 0, "the job with indices (0,) has no answer"),
        ("unasked", 0, "the job with indices (0,) has no answer"),
        ("twice", 0, "(0,) belongs to no job, or is a second answer"),
        ("list", 0, "indices is list, not a tuple"),
        ("other", 0, "(99,) belongs to no job"),
        ("tuples", 0, "an answer is tuple, not GroupAnswer"),
        ("generate_s", None, "generate_s is None, not a number of seconds"),
        ("generate_s", math.nan, "generate_s is nan, not"),
        ("perturb_s", -1.0, "perturb_s is -1.0, not"),
        ("apply", 0, "apply returned NoneType, not Moved"),
    ],
)
def test_a_breach_of_the_contract_is_one_error(how: str, seconds: Any, why: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Breaking, "how", how)
    monkeypatch.setattr(Breaking, "seconds", seconds, raising=False)
    with pytest.raises(UserError, match=f"engine toy breaks its contract: .*{re.escape(why)}"):
        toy_run(tmp_path, "Breaking")


def test_a_job_that_an_engine_never_takes_has_no_answer() -> None:
    class Lazy(ToyEngine):
        def answers(self, jobs: Iterable[GroupJob], should_stop=lambda: False) -> Iterator[GroupAnswer]:
            return iter(list(super().answers([next(iter(jobs))], should_stop)))

    engine = Lazy()
    with pytest.raises(UserError, match=r"the job with indices \(1,\) has no answer"):
        list(checked_answers(engine, jobs(engine.theta_checksum), lambda: False))


class Random(ToyEngine):
    """Answers with a random digit."""

    def generate(self, *arguments: Any, **options: Any) -> list[list[Completion]]:
        rows = super().generate(*arguments, **options)
        return [[Completion((48 + random.randrange(10),), True)] * len(row) for row in rows]


def test_an_engine_that_answers_at_random_is_not_reproducible(tmp_path: Path, capsys) -> None:
    assert header_of(toy_run(tmp_path, "Random"))["rollouts"] == "not reproducible"
    assert "rollouts are not reproducible here" in capsys.readouterr().err
    engine = ToyEngine()
    members = [job.perturbations[0] for job in jobs(engine.theta_checksum)]
    assert engine.check_reproducible(members, PROMPTS, SAMPLING)


class Moving(ToyEngine):
    """Moves theta in `generate`: from the call with number ``first`` on."""

    first = 0
    calls = 0

    def generate(self, *arguments: Any, **options: Any) -> list[list[Completion]]:
        type(self).calls += 1
        if self.calls > self.first:
            self.theta.arrays["body.weight"][...] += 1
        return super().generate(*arguments, **options)


@pytest.mark.parametrize("first", [0, 7])
def test_an_engine_that_moves_theta_by_itself_is_refused(first: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Moving, "first", first)
    monkeypatch.setattr(Moving, "calls", 0)
    with pytest.raises(UserError, match="engine toy changed theta outside apply"):
        toy_run(tmp_path, "Moving")
    journal = tmp_path / "Moving" / "journal.jsonl"
    assert journal.exists() == bool(first) and (not first or len(journal.read_text().splitlines()) == 1)


def toy_run(tmp_path: Path, engine: str) -> Path:
    """Train one step with an engine of this file, and return the run's directory."""
    args = ESConfig(
        engine=f"{__name__}:{engine}", model="toy", output_dir=str(tmp_path / engine), max_steps=1, sigma=0.1,
        population_size=4, num_threads=1, report_to=["none"], reward_isolation="inline",
    )  # fmt: skip
    return ESTrainer(args=args, reward_funcs=near_one, train_dataset=[{"prompt": f"x[{i}]"} for i in range(4)]).train()


def header_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "journal.jsonl").read_text().partition("\n")[0])


def test_threads_take_few_jobs_ahead() -> None:
    engine, taken = ToyEngine(2), []

    def counted() -> Iterator[GroupJob]:
        for job in jobs(engine.theta_checksum):
            taken.append(job.indices)
            yield job

    answers = engine.answers(counted())
    next(answers)
    assert len(taken) <= 4
    engine.apply(make_update(members_for_step(0, 0, 2, False), [1.0, -1.0], 0.1))
    with pytest.raises(ValueError, match="reached a replica"):
        list(answers)


def test_a_stopped_step_says_how_many_members_are_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    def stopped(self, jobs: Iterable[GroupJob], should_stop=lambda: False) -> Iterator[GroupAnswer]:
        for job in jobs:
            if job.indices[0] == 2:
                raise Interrupted
            yield self.answer(job, should_stop)

    monkeypatch.setattr(ToyEngine, "answers", stopped)
    args = ESConfig(engine="toy", task="quadratic", max_steps=1, population_size=4, report_to=["none"],
                    reward_isolation="inline", output_dir=str(tmp_path / "run"))  # fmt: skip
    ESTrainer(args=args).train()
    assert "stopped after 0 steps, 2 of 4 members of step 1 kept; continue with" in capsys.readouterr().out


def test_low_rank_noise_without_a_low_rank_parameter_is_warned_of(bigram, capsys) -> None:
    assert bigram("--noise", "lowrank") == 0
    said = capsys.readouterr()
    assert "bigram has no parameter with low-rank noise" in said.err and "rank 1" not in said.out


def test_arguments_have_the_order_of_trl(tmp_path: Path) -> None:
    args = ESConfig(output_dir=str(tmp_path / "run"))
    rows = [{"prompt": "x"}, {"prompt": "y"}]
    trainer = ESTrainer("tiny", near_one, args, rows)
    assert trainer.train_rows == rows and trainer.request.rewards.funcs == [near_one]


def test_a_run_may_have_the_name_of_its_engine(bigram, tmp_path: Path, monkeypatch) -> None:
    assert bigram("--output_dir", "bigram") == 0
    assert bigram("--output_dir", "bigram", "--overwrite") == 0
    assert bigram("--output_dir", "second", "--model", "bigram/") == 0
    Path("second").rename("weights")
    assert bigram("--output_dir", "third", "--model", "weights") == 0
    assert json.loads(Path("third/es_config.json").read_text())["model"] == "./weights"
    monkeypatch.chdir(tmp_path)
    for run in ("bigram", "third"):
        words = ["replay", f"own/{run}", "--engine", "bigram:BigramEngine", "--output_dir", f"again-{run}"]
        assert main(words) == 0
        assert Path(f"again-{run}/model.safetensors").read_bytes() == Path(f"own/{run}/model.safetensors").read_bytes()
