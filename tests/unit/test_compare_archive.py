"""Packed comparisons: complete, refused if damaged, and those that the repository tracks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estune.commands.compare import compare_command
from estune.compare import archive
from estune.compare.config import from_mapping
from estune.compare.runner import Runner
from estune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "benchmarks" / "results"
PACKED = sorted(KEPT.glob("compare_*.json"))
MOST_FILES, MOST_BYTES = 60, 2_000_000

EDGES = [-1.0, 0.0, 1.0]
OPTIONS = {"sigma": 0.02, "seed": 0, "top_k": 0, "antithetic": False, "reward_funcs": None}


def measured(correct: str, **values: Any) -> dict[str, Any]:
    return {
        "status": "done", "n": 4, "accuracy": correct.count("1") / 4, "correct": correct, "samples": 2,
        "right_of": [1, 0, 0, 2], "length": 5.0, "kl": 0.125, "reward": 0.5, "discovery": [1],
        "retention": {"at once": {"n": 2, "accuracy": 0.5, "correct": "10"}},
        "hacking": {"hacked": False, "reasons": [], "literal_share_without_words": 0.0},
        "changes": {"norm": 1.0, "relative_norm": 0.1, "walk_ratio": None, "moved_share": 1.0,
                    "histogram": {"edges": EDGES, "density": [0.25, 0.75]}},
        "evaluations": 64, "train_time_s": 1.5, "steps": 2, "curve": [[0, 0.0, 0.25], [64, 1.5, 0.5]],
        "trained_by": ["a"], "code": "a", "fingerprint": "f", **values,
    }  # fmt: skip


def directory_of(place: Path) -> Path:
    """Write a comparison with every kind of row: finished seeds, failed seeds, seeds with other options."""
    methods = {
        "es": {"method": "es", "settings": {"population_size": 4, "batch_size": 8}},
        "grpo": {"method": "grpo"},
        "sft": {"method": "sft_rejection"},
    }
    made = from_mapping({"task": "countdown", "models": {"tiny": "tiny"}, "seeds": [0, 1], "methods": methods,
                         "retention": {"at once": {"task": "countdown"}}, "output_dir": str(place)})  # fmt: skip
    place.mkdir(parents=True)
    Runner(made).write_plan()
    files: dict[str, Any] = {
        "cost.json": [{"cpu_s": 36.0, "wall_s": 18.0, "code": "a", "machine": "fast", "packages": {"torch": "2.13"}}],
        "tiny/base.json": {
            **measured("1000"), "never_solved": [2], "discovery_control": [0], "model": "tiny",
            "judged": {"literal_share_without_words": 0.5},
        },
        "tiny/base-prefix.json": {"n": 4, "accuracy": 0.5, "correct": "1100", "length": 6.0, "response_prefix": "<t>"},
        "tiny/constant.json": {"says": "<b>", "n": 4, "accuracy": 0.0, "correct": "0000", "length": 1, "code": "a"},
    }  # fmt: skip
    for method in methods:
        files[f"tiny/{method}/tuning.json"] = {
            "chosen": {"sigma": 0.02},
            "chosen_time": {"sigma": 0.02},
            "rows": 8,
            "cost": {"evaluations": 32, "train_time_s": 0.5},
        }
        for name in ("trial-0", "trial-0-time"):
            files[f"tiny/{method}/{name}.json"] = {
                "trial": {"sigma": 0.02}, "run": "tuning/x", "status": "done", "accuracy": 0.5, "reward": None,
                "settings": OPTIONS | {"seed": 1000}, "code": "a", "curve": [],
            }  # fmt: skip
        for seed in (0, 1):
            for budget in ("evaluations", "time"):
                known = {"model": "tiny", "method": method, "seed": seed, "run": f"runs/tiny/{method}/seed-{seed}",
                         "settings": OPTIONS | {"seed": seed}}  # fmt: skip
                files[f"tiny/{method}/seed-{seed}-{budget}.json"] = {**measured("1101"), **known}
    grpo, sft = "tiny/grpo/seed-1-time.json", "tiny/sft/seed-0-time.json"
    files[grpo] = {"model": "tiny", "method": "grpo", "seed": 1, "run": "runs/tiny/grpo/seed-1", "settings": {},
                   "status": "failed", "error": "it diverged", "code": "a"}  # fmt: skip
    # one whose options are those of another version, with numbers that only look the same
    files[sft]["settings"] = {"sigma": 0.02, "seed": False, "antithetic": 0, "newer": [1]}
    for name, value in files.items():
        path = place / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return place


def report_only(file: Path, output_dir: Path | None = None) -> Path:
    assert compare_command(file, output_dir, dry_run=False, report_only=True) == 0
    return (output_dir or file.with_suffix("")) / "report.html"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison's directory with its page and its packed results; tests must not change it."""
    made = directory_of(tmp_path_factory.mktemp("compared") / "out")
    plan = json.loads((made / "comparison.json").read_text(encoding="utf-8"))["comparison"]
    assert plan["methods"].pop("random_search")["method"] == "random_search"  # it is there without being named
    file = made.parent / "comparison.yaml"
    file.write_text(json.dumps(plan), encoding="utf-8")
    assert report_only(file, made) == made / "report.html"
    return made


@pytest.fixture
def compared(finished: Path, tmp_path: Path) -> Path:
    """A copy of ``finished``, which a test may change."""
    return shutil.copytree(finished, tmp_path / "out")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_same_page_is_drawn_from_the_file_alone(compared: Path, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "kept.json"
    file.parent.mkdir()
    shutil.copy(compared / archive.ARCHIVE_FILE, file)
    expected = {name: (compared / name).read_bytes() for name in ("report.html", "curves.png", "summary.json")}
    links = re.findall(r'href="(results/[^"]+)"', expected["report.html"].decode("utf-8"))
    shutil.rmtree(compared)
    page = report_only(file)
    assert page == tmp_path / "elsewhere" / "kept" / "report.html"
    assert {name: (page.parent / name).read_bytes() for name in expected} == expected
    assert links and all((page.parent / link).is_file() for link in links)
    assert report_only(file, tmp_path / "elsewhere" / "kept") == page  # once more
    assert page.read_bytes() == expected["report.html"]


def test_packing_loses_nothing_and_stores_common_settings_once(compared: Path, tmp_path: Path) -> None:
    packed = archive.read_archive(compared / archive.ARCHIVE_FILE)
    assert packed["common_settings"] == {**OPTIONS, "seed": 1000, "newer": [1]}
    assert packed["histogram_edges"] == EDGES
    rows = {(row["kind"], row.get("method"), row.get("seed"), row.get("budget")): row for row in packed["rows"]}
    assert len(rows) == len(packed["rows"]) == 3 + 3 * (1 + 2 + 4)
    assert rows["run", "es", 1, "time"]["settings"] == {"seed": 1}
    assert "edges" not in rows["run", "es", 1, "time"]["changes"]["histogram"]
    assert rows["run", "grpo", 1, "time"]["settings"] is None
    assert rows["run", "sft", 0, "time"]["settings_lacking"] == ["top_k", "reward_funcs"]
    assert rows["run", "sft", 0, "time"]["settings"] == {"seed": False, "antithetic": 0}
    archive.unpack(packed, tmp_path / "again")
    before = {path.relative_to(compared): path for path in (compared / "results").rglob("*.json")}
    assert len(before) == len(list((tmp_path / "again" / "results").rglob("*.json")))
    for place, path in [*before.items(), (Path("comparison.json"), compared / "comparison.json")]:
        there, here = (json.loads(file.read_text("utf-8")) for file in (path, tmp_path / "again" / place))
        assert json.dumps(there, sort_keys=True) == json.dumps(here, sort_keys=True), place
    assert archive.pack(tmp_path / "again") == packed


def test_counts_of_samples_are_packed_without_the_run(tmp_path: Path) -> None:
    made = directory_of(tmp_path / "out")
    run = made / "runs" / "tiny" / "sft" / "seed-0"
    run.mkdir(parents=True)
    (run / "method.json").write_text(json.dumps({"arguments": {"a": 1}, "samples_drawn": 96, "samples_kept": 3}))
    drawn = [row for row in archive.pack(made)["rows"] if "samples_drawn" in row]
    assert [(row["budget"], row["samples_drawn"], row["samples_kept"]) for row in drawn] == [
        ("evaluations", 96, 3),
        ("time", 96, 3),
    ]
    archive.unpack(archive.pack(made), tmp_path / "again")
    assert [row for row in archive.pack(tmp_path / "again")["rows"] if "samples_drawn" in row] == drawn


def test_files_that_are_no_results_stay_out(tmp_path: Path) -> None:
    made = directory_of(tmp_path / "out")
    packed = archive.pack(made)
    (made / "results" / "tiny" / "notes.json").write_text("[]")
    (made / "results" / "tiny" / "es" / "seed-x-time.json").write_text("{}")
    assert archive.pack(made) == packed
    with pytest.raises(UserError, match="holds no comparison"):
        archive.pack(tmp_path)


# --- what is refused --------------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], object], sealed: bool) -> Callable[[str], str]:
    """Return an edit of a packed comparison; ``sealed``: with the digest of the edited content."""

    def edit(text: str) -> str:
        content = json.loads(text)
        change(content)
        if sealed:
            content["digest"] = archive.content_digest(content)
        return json.dumps(content)

    return edit


DAMAGES: dict[str, tuple[Callable[[str], str], str]] = {
    "cut off": (lambda text: text[: len(text) // 2], "is not JSON"),
    "empty": (lambda text: "", "is not JSON"),
    "nested": (lambda text: "[" * 100_000, "is not JSON"),
    "a list": (lambda text: "[]", "holds no comparison's results"),
    "another JSON file": (lambda text: '{"comparison": {}}', "holds no comparison's results"),
    "a digit": (lambda text: text.replace('"correct":"1101"', '"correct":"1111"', 1), "damaged or was edited"),
    "a note": (edited(lambda c: c.update(note="mine"), False), "damaged or was edited"),
    "a later schema": (edited(lambda c: c.update(schema=2), True), "schema 2; this estune reads schema 1"),
    "without rows": (edited(lambda c: c.pop("rows"), True), "missing or malformed"),
    "an unknown kind": (edited(lambda c: c["rows"][0].update(kind="x"), True), "missing or malformed"),
    "without a kind": (edited(lambda c: c["rows"][0].pop("kind"), True), "missing or malformed"),
    "a path": (edited(lambda c: c["rows"][0].update(model="../../x"), True), "missing or malformed"),
    "the parent": (edited(lambda c: c["rows"][0].update(model=".."), True), "missing or malformed"),
    "an unknown status": (edited(lambda c: c["rows"][-1].update(status="x"), True), "missing or malformed"),
    "a seed in words": (edited(lambda c: c["rows"][-1].update(seed="1"), True), "missing or malformed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_refused_in_one_sentence(damage: str, compared: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    change, message = DAMAGES[damage]
    text = (compared / archive.ARCHIVE_FILE).read_text(encoding="utf-8")
    file.write_text(change(text), encoding="utf-8")
    assert file.read_text(encoding="utf-8") != text
    with pytest.raises(UserError) as refused:
        report_only(file)
    assert message in str(refused.value) and str(file) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "bad").exists()


def test_binary_and_absent_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not JSON"):
        report_only(tmp_path / "bad.json")
    with pytest.raises(UserError, match="cannot be read"):
        report_only(tmp_path / "absent.json")


def test_results_are_no_comparison_to_run(compared: Path) -> None:
    with pytest.raises(UserError, match="add --report_only"):
        compare_command(compared / archive.ARCHIVE_FILE, None, dry_run=False, report_only=False)


def test_a_page_is_not_drawn_over_anything_else(compared: Path, tmp_path: Path) -> None:
    """Not over another comparison, a continued comparison, other files, or a file."""
    file = tmp_path / "kept.json"
    shutil.copy(compared / archive.ARCHIVE_FILE, file)
    more = tmp_path / "more"
    shutil.copytree(compared, more)
    (more / "results" / "tiny" / "es" / "seed-2-time.json").write_text("{}")
    other = tmp_path / "other"
    shutil.copytree(compared, other)
    (other / "results" / "tiny" / "constant.json").write_text("{}")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.html").write_text("mine")
    for place, message in (
        (more, "other results"),
        (other, "other results"),
        (mine, "not empty"),
        (file, "a directory"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=message):
            report_only(file, place)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert report_only(file, compared) == compared / "report.html"  # its own directory


def test_names_in_a_file_are_text_on_the_page(compared: Path, tmp_path: Path) -> None:
    """A packed file may come from a stranger."""
    content = json.loads((compared / archive.ARCHIVE_FILE).read_text(encoding="utf-8"))
    for row in content["rows"]:
        row |= {name: "<script>alert(1)</script>" for name in ("fingerprint", "run", "error") if name in row}
    content["comparison"]["task"] = content["comparison"]["notes"] = "<script>alert(1)</script>"
    content["comparison"]["measuring"]["discovery_samples"] = "<script>alert(1)</script>"
    content["digest"] = archive.content_digest(content)
    (tmp_path / "bad.json").write_text(json.dumps(content), encoding="utf-8")
    page = report_only(tmp_path / "bad.json").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script") > 5


# --- what the repository keeps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", PACKED, ids=lambda file: file.stem)
def test_the_tracked_comparisons_are_complete(file: Path, tmp_path: Path) -> None:
    packed = archive.read_archive(file)
    archive.unpack(packed, tmp_path / "unpacked")
    again = archive.pack(tmp_path / "unpacked")
    assert again == packed
    archive.write_archive(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    assert archive.summary_of(file)["models"]


def test_tracked_results_are_few_and_small() -> None:
    """Few files, none large, and nothing that can be drawn from them."""
    listed = subprocess.run(["git", "ls-files", "-z", "--", str(KEPT)], cwd=ROOT, capture_output=True, text=True)
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name] if listed.returncode == 0 else []
    files = [path for path in tracked if path.exists()] or [path for path in KEPT.iterdir() if path.is_file()]
    assert PACKED and 10 < len(files) <= MOST_FILES
    assert [path for path in files if path.stat().st_size > MOST_BYTES] == []
    assert [path for path in files if path.parent != KEPT or path.suffix not in (".json", ".jsonl", ".estp")] == []
    assert {path.name for path in files}.isdisjoint({"summary.json", "journal.jsonl", "metrics.jsonl"})
