"""Models that compute with NaN or infinity: refused at a run's start, counted in it, never written as if whole.

A weight that float32 holds and float16 does not is what breaks them, on the embedded model and on the toy.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, assert_same_tree, journal, metrics, not_json, steps, tree
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer

from estune.compare import worker
from estune.compare.config import from_mapping
from estune.compare.measure import Scorers, divergence, evaluation_config, held_out_rows
from estune.config import ESConfig
from estune.engines.hf.decoding import is_sound
from estune.engines.hf.engine import HFEngine
from estune.errors import UserError
from estune.es.types import Prompt, Sampling
from estune.models.names import local_directory
from estune.train.groups import Group, known_groups
from estune.train.setup import load_engine

pytestmark = pytest.mark.miniature

SHORT = ("--task", "countdown", "--max_completion_length", 12, "--num_threads", 1)
TRAIN = ("train", *SHORT, "--population_size", 4, "--batch_size", 4, "--report_to", "none", "--output_dir", "run")
NOT_FINITE = "not finite in float16"


def scaled(place: Path, part: str, factor: float, name: str = "broken") -> Path:
    """Write the embedded model with the first tensor whose name has ``part`` multiplied by ``factor``."""
    source = local_directory("tiny")
    assert source is not None
    shutil.copytree(source, place / name)
    file = place / name / "model.safetensors"
    tensors = load_file(file)
    chosen = next(key for key in sorted(tensors) if part in key)
    tensors[chosen] = tensors[chosen] * tensors[chosen].dtype.type(factor)
    file.chmod(0o644)
    save_file(tensors, file, metadata={"format": "pt"})
    return place / name


def printed(done: Any) -> dict[str, Any]:
    assert done.code == 0, done
    found: dict[str, Any] = json.loads(done.out, parse_constant=not_json)
    return found


# --- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_counts_as_sound(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [([1, 2, 3, 0], 2, True), ([1, nan, 3, 0], 2, False), ([nan, 2, 3, 0], 2, False), ([1, 2, 3, nan], 2, False),
            ([1, 2, inf, 0], 2, False), ([-inf, 2, 3, -inf], 2, True), ([-inf] * 4, 0, False), ([nan] * 4, 0, False),
            ([1, 2, 3, 0], 3, True)]  # fmt: skip
    logits = torch.tensor([row for row, _, _ in rows], dtype=dtype)
    tokens = torch.tensor([token for _, token, _ in rows])
    assert is_sound(logits, tokens).tolist() == [sound for _, _, sound in rows]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 4, "num_generations": 3},
                                 {"temperature": 0.7, "top_p": 0.5}])  # fmt: skip
def test_one_bad_logit_of_many(value: float, how: dict[str, Any]) -> None:
    """NaN breaks a completion even where sampling passes over it; minus infinity is how some models mask a token."""
    engine = HFEngine.from_model(tiny_model("llama"), tiny_tokenizer())
    prompts = [Prompt(i, "", (40 + i, 41, 42)) for i in range(3)]
    sampling = Sampling(seed=0, step=0, max_completion_length=4, **how)
    assert all(c.finite for row in engine.generate(None, prompts, sampling) for c in row)
    # theta stays in the working model from here on; a logit of 299 is what its row of the head makes of it
    engine.model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([299]), value))
    answers = engine.generate(None, prompts, sampling)
    assert {c.finite for row in answers for c in row} == {value == float("-inf")}
    assert value == float("inf") or not any(299 in c.token_ids[1:] for row in answers for c in row if c.finite)


# --- theta at the start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "factor", "words", "named"),
    [
        ("down_proj", 1e9, ("--dtype", "float16"), "try --dtype bfloat16 or float32"),
        ("model.norm", 1e6, ("--dtype", "float16", "--noise", "lowrank"), NOT_FINITE),  # weights fit, logits do not
        ("embed_tokens", 1e6, ("--dtype", "float16", "--temperature", 0.7, "--num_generations", 2), NOT_FINITE),
        ("layers.1.mlp.up_proj", 1e38, ("--dtype", "bfloat16"), "not finite in bfloat16: try --dtype float32"),
        ("layers.0.self_attn.v_proj", 3e38, (), "not finite in float32: a weight is too large"),
    ],
)
def test_a_run_of_a_broken_model_does_not_start(
    part: str, factor: float, words: tuple[Any, ...], named: str, run_model: Any, place: Path
) -> None:
    scaled(place, part, factor)
    done = run_model(*TRAIN, "--model", "broken", *words)
    errors = [line for line in done.err.splitlines() if "error" in line]
    assert done.code == 2 and len(errors) == 1 and "model broken gives logits that are not finite" in errors[0], done
    assert named in errors[0], errors
    assert not (place / "run").exists()


def test_a_broken_model_overwrites_no_run(run_model: Any, place: Path) -> None:
    scaled(place, "down_proj", 1e9)
    assert run_model(*TRAIN, "--max_steps", 1).code == 0
    before = tree(place / "run")
    done = run_model(*TRAIN, "--model", "broken", "--dtype", "float16", "--overwrite")
    assert done.code == 2 and NOT_FINITE in done.err, done
    assert_same_tree(tree(place / "run"), before)


@pytest.mark.parametrize("words", [("probe",), ("train", "--method", "random_search", "--output_dir", "run")])
def test_neither_probe_nor_random_search_takes_a_broken_model(
    words: tuple[str, ...], run_model: Any, place: Path
) -> None:
    scaled(place, "down_proj", 1e9)
    done = run_model(*words, *SHORT, "--model", "broken", "--dtype", "float16", "--batch_size", 4)
    assert done.code == 2 and done.err.count("model broken gives logits that are not finite in float16") == 1, done
    assert not (place / "run").exists()


# --- members ----------------------------------------------------------------------------------------------------------

# the toy's members at this sigma: about one coordinate in ten is beyond what float32 holds
PARTLY = ("train", "--engine", "toy", "--task", "quadratic", "--reward_funcs", "rewards.py:second", "--sigma", 1.9e38,
          "--learning_rate", 1e-3, "--population_size", 6, "--batch_size", 5, "--max_completion_length", 48,
          "--max_steps", 3, "--save_steps", 1, "--report_to", "none", "--output_dir", "run")  # fmt: skip


@pytest.mark.parametrize(
    "more", [(), ("--noise", "lowrank"), ("--log_completions", "true", "--fitness_shaping", "per_prompt_z")]
)
def test_a_broken_completion_is_a_failed_reward(more: tuple[str, ...], run: Any, place: Path) -> None:
    done = run(*PARTLY, *more)
    assert done.code == 0, done
    assert done.err.count("of the members' completions are not finite") == 1, done.err
    records = metrics(place / "run")
    shares = [record["completions/non_finite_ratio"] for record in records]
    assert any(0 < share < 1 for share in shares) and max(shares) < 1
    for record, share, step in zip(records, shares, steps(place / "run"), strict=True):
        assert record["es/reward_errors"] == step["failures"] == round(share * 30)


def test_a_resume_in_the_middle_of_a_step_counts_the_same(zygote: Any, run: Any, place: Path) -> None:
    """Members that a killed run had finished come back from `pending.jsonl`, with what was not finite."""
    assert run(*PARTLY).code == 0
    wanted = tree(place / "run")
    for kill_at in (30, 60, 90, 130):
        shutil.rmtree(place / "run")
        if zygote.run(PARTLY, place, kill_at=kill_at).code == 0:
            break
        done = run("train", "--resume", "--output_dir", "run")
        if done.code != 0:
            done = run(*PARTLY, "--resume")
        assert done.code == 0, done
        assert_same_tree(tree(place / "run"), wanted)


def test_groups_of_an_older_version_are_evaluated_again() -> None:
    group = Group([[[1.0]]], [], [[3]], [[True]], [[False]], [["ab"]], 4, 0.1)
    stored = json.loads(json.dumps(vars(group)))
    assert known_groups({0: stored}, 2, (1, 1, 1), keep_text=False) == {0: group}
    assert known_groups({0: {k: v for k, v in stored.items() if k != "finite"}}, 2, (1, 1, 1), keep_text=False) == {}


@pytest.mark.parametrize("noise", ["full", "lowrank"])
@pytest.mark.parametrize("how", [(), ("--temperature", 0.8, "--num_generations", 2)])
def test_a_sigma_that_breaks_every_member_stops_the_run(
    noise: str, how: tuple[Any, ...], run_model: Any, place: Path
) -> None:
    words = (*TRAIN, "--dtype", "float16", "--sigma", 1e6, "--learning_rate", 1e-9, "--noise", noise, *how)
    for resume in ((), ("--resume",)):
        done = run_model(*words, *resume)
        assert done.code == 2, done
        assert "step 1: the logits of all members are not finite in float16" in done.err
        assert (
            "lower sigma (1e+06) or try --dtype bfloat16 or float32; the journal holds the 0 earlier steps" in done.err
        )
        assert [line["kind"] for line in journal(place / "run")] == ["header"]
    assert not (place / "run" / "model.safetensors").exists()


# --- theta later ------------------------------------------------------------------------------------------------------

# one step moves theta to where float16 does not reach, and float32 does
BREAKS = (*TRAIN, "--dtype", "float16", "--sigma", 0.01, "--learning_rate", 1e6)


@pytest.mark.parametrize("noise", ["full", "lowrank"])
def test_a_theta_that_its_last_update_broke_is_not_written(noise: str, run_model: Any, place: Path) -> None:
    words = (*BREAKS, "--noise", noise, "--max_steps", 1, "--save_steps", 1)
    for resume in ((), ("--resume",)):
        done = run_model(*words, *resume)
        assert done.code == 2 and done.err.count("error") == 1, done
        assert "theta diverged in step 1: its logits are not finite in float16; lower learning_rate" in done.err
        assert not list((place / "run").glob("*.safetensors")) and not (place / "run" / "es_state.json").exists()
    replayed = run_model("replay", "--run", "run", "--step", 0, "--output_dir", "whole")
    assert replayed.code == 0, replayed


def test_a_theta_that_breaks_during_a_run_stops_it_and_held_out_rows_are_reported(run_model: Any, place: Path) -> None:
    done = run_model(*BREAKS, "--max_steps", 3, "--save_steps", 1, "--eval_steps", 1, "--eval_rows", 4)
    assert done.code == 2, done
    assert "step 2: the logits of all members are not finite in float16" in done.err
    assert "theta itself is broken, lower learning_rate or try --dtype" in done.err
    assert done.err.count("of 100.0% of theta's completions of held-out rows are not finite") == 1
    evaluations = [record for record in metrics(place / "run") if "eval_reward" in record]
    assert "eval_non_finite_ratio" not in evaluations[0] and evaluations[1]["eval_non_finite_ratio"] == 1.0
    assert evaluations[1]["eval_accuracy"] == 0.0 and evaluations[1]["eval_reward"] is None
    assert (place / "run" / "checkpoint-1").exists() and len(steps(place / "run")) == 1
    done = run_model("train", "--resume", "--output_dir", "run")
    assert_refused(done, "theta diverged in step 1", NOT_FINITE)


# --- evaluate ---------------------------------------------------------------------------------------------------------

EVALUATE = ("evaluate", *SHORT, "--limit", 6)


@pytest.mark.parametrize(("part", "factor"), [("down_proj", 1e9), ("model.norm", 1e6)])
@pytest.mark.parametrize("how", [(), ("--temperature", 1.0, "--n_samples", 2)])
def test_evaluate_says_that_a_model_is_broken(
    part: str, factor: float, how: tuple[Any, ...], run_model: Any, place: Path
) -> None:
    scaled(place, part, factor)
    done = run_model(*EVALUATE, *how, "--model", "broken", "--dtype", "float16", "--reference", "tiny", "--json")
    found = printed(done)
    assert 0.5 < found["non_finite_ratio"] <= 1.0
    assert found["accuracy"] == 0.0 and found["reward_failures"] == round(found["non_finite_ratio"] * 6)
    if how:
        assert found["sample_reward_failures"] == round(found["sample_non_finite_ratio"] * 12)
    assert found["against_reference"]["accuracy"]["progressions"] == 0
    assert found["kl"] is None or part == "model.norm"
    assert done.err.count("completions are not finite in float16: these completions count as wrong") == 1, done.err


def test_evaluate_with_a_broken_reference(run_model: Any, place: Path) -> None:
    scaled(place, "down_proj", 1e9)
    words = (*EVALUATE, "--dtype", "float16", "--batch_check", "never")
    done = run_model(*words, "--reference", "broken", "--json")
    found = printed(done)
    assert found["kl"] is None and "non_finite_ratio" not in found
    assert done.err.count("log-probabilities of broken are not finite in float16, so kl is unknown") == 1, done.err
    assert done.err.count("reference broken: the logits of") == 1, done.err
    assert found["reference"]["accuracy"] == 0.0 and found["against_reference"]["accuracy"]["regressions"] == 0
    for name in ("kl", "reference", "against_reference"):
        del found[name]
    assert found == printed(run_model(*words, "--json"))
    text = run_model(*words, "--reference", "broken")
    assert text.code == 0 and "kl                   None" in text.out


def test_a_comparison_measures_no_broken_model(place: Path) -> None:
    comparison = from_mapping({"task": "countdown", "models": {"tiny": "tiny"}, "methods": {"es": {"method": "es"}},
                               "settings": {"dtype": "float16", "max_completion_length": 6, "num_threads": 1},
                               "measuring": {"rows": 4}})  # fmt: skip
    args = evaluation_config(comparison, str(scaled(place, "down_proj", 1e9)))
    engine, rows = load_engine(args), held_out_rows(comparison)
    with Scorers() as scorers:
        with pytest.raises(UserError, match="gives logits that are not finite in float16"):
            scorers.answer(args, engine, rows)
        whole = load_engine(evaluation_config(comparison, "tiny"))
        evaluation, prompts = scorers.answer(evaluation_config(comparison, "tiny"), whole, rows)
    with pytest.raises(UserError, match="there is no KL"):
        divergence(whole, engine, prompts, evaluation)


@pytest.mark.parametrize(("size", "sizes"), [(8, [6, 3]), (4, [4, 2]), (1, [1, 2])])
def test_evaluate_checks_batches_of_another_size(size: int, sizes: list[int], run_model: Any) -> None:
    words = (*EVALUATE, "--prompts_per_batch", size, "--json")
    always = printed(run_model(*words, "--batch_check", "always"))
    check = always.pop("batch_check")
    assert check == {"rows": 6, "changed": 0, "prompts_per_batch": sizes}
    assert always == printed(run_model(*words))  # float32 is not checked unless it is wanted


def test_evaluate_counts_the_rows_that_a_batch_changes(run_model: Any) -> None:
    words = ("evaluate", "--task", "countdown", "--num_threads", 1, "--dtype", "bfloat16", "--limit", 8,
             "--max_completion_length", 32, "--prompts_per_batch")  # fmt: skip
    whole, half = (printed(run_model(*words, size, "--rows", f"{size}.jsonl", "--json")) for size in (8, 4))
    assert whole["batch_check"]["prompts_per_batch"] == [8, 4] and half["batch_check"]["prompts_per_batch"] == [4, 2]
    plain = printed(run_model(*words, 8, "--batch_check", "never", "--json"))
    assert plain == {name: value for name, value in whole.items() if name != "batch_check"}
    text = run_model(*words, 8)
    assert text.code == 0
    changed = whole["batch_check"]["changed"]
    assert (
        f"batch_check          in batches of 4 instead of 8 prompts, {changed} of 8 rows have other tokens" in text.out
    )


def test_a_changed_row_is_counted(run_model: Any, place: Path) -> None:
    """Two runs with batches of 8 and 4 differ in as many rows as the check said."""
    words = ("evaluate", "--task", "countdown", "--num_threads", 1, "--dtype", "bfloat16", "--limit", 24,
             "--max_completion_length", 32, "--batch_check")  # fmt: skip
    found = printed(run_model(*words, "auto", "--prompts_per_batch", 8, "--rows", "8.jsonl", "--json"))
    printed(run_model(*words, "never", "--prompts_per_batch", 4, "--rows", "4.jsonl", "--json"))
    texts = [[json.loads(line)["completions"] for line in (place / name).read_text().splitlines()]
             for name in ("8.jsonl", "4.jsonl")]  # fmt: skip
    differing = sum(one != other for one, other in zip(*texts, strict=True))
    assert found["batch_check"]["changed"] >= differing  # other tokens may have the same text
    assert found["batch_check"]["changed"] > 0 or differing == 0


def test_one_row_shares_its_batch_with_nobody(run_model: Any) -> None:
    done = run_model("evaluate", *SHORT, "--limit", 1, "--batch_check", "always", "--json")
    assert "batch_check" not in printed(done)
    assert "batch_check needs two rows or more" in done.err


# --- theta as the baseline of the first step --------------------------------------------------------------------------


def train(run_model: Any, *words: Any) -> Any:
    done = run_model("train", "--model", "tiny", "--task", "countdown", "--max_completion_length", 48, "--noise",
                     "lowrank", "--report_to", "none", "--output_dir", "run", *words)  # fmt: skip
    assert done.code == 0, done
    return done


def test_a_sigma_that_is_too_large_is_named_in_the_first_step(run_model: Any, place: Path) -> None:
    size = ("--population_size", 8, "--batch_size", 8, "--learning_rate", 1e-3, "--sigma", 0.1)
    done = train(run_model, *size, "--max_steps", 1, "--logging_steps", 3)
    assert done.err.count("warning: sigma 0.1 is too large: the members' mean fitness is ") == 1, done.err
    first = metrics(place / "run")[0]
    assert f"theta's is {first['es/theta_fitness']:.3g}; `estune probe`" in done.err
    assert first["num_evaluations"] == (8 + 1) * 8 and "es/theta_rank" not in first
    again = train(run_model, "--resume", "--max_steps", 3)
    assert "too large" not in again.err  # the resumed run knows theta's fitness, and that it was told
    assert [(line["step"], line["num_evaluations"]) for line in metrics(place / "run")] == [(1, 72), (3, 200)]


@pytest.mark.parametrize(("size", "each"), [((30, 16), 496), ((8, 1), 8)])
def test_the_demos_settings_raise_no_alarm(size: tuple[int, int], each: int, run_model: Any, place: Path) -> None:
    words = ("--sigma", 0.01, "--learning_rate", 0.005, "--population_size", size[0], "--batch_size", size[1])
    done = train(run_model, *words, "--max_steps", 3)
    assert "too large" not in done.err and "halved" not in done.err, done.err
    evaluations = [record["num_evaluations"] for record in metrics(place / "run")]
    first = (size[0] + 1) * size[1]  # theta answers in the first step, and with step control in every one
    assert evaluations == [first + k * each for k in range(3)]


@pytest.mark.parametrize("reward", ["-len(text)", "0.0", "-1e-9 * len(text)", "1e3 - len(text)"])
def test_rewards_of_other_scales_raise_no_alarm(reward: str, run_model: Any, place: Path) -> None:
    (place / "own.py").write_text(f"def own(completions, **_):\n    return [float({reward}) for text in completions]\n")
    words = ("--sigma", 0.01, "--learning_rate", 0.005, "--population_size", 8, "--batch_size", 8, "--max_steps", 2)
    done = train(run_model, *words, "--reward_funcs", "own.py:own")
    assert "too large" not in done.err and "halved" not in done.err, done.err


def test_evaluation_steps_count_theta_once(run: Any, place: Path) -> None:
    toy = ("train", "--engine", "toy", "--task", "quadratic", "--population_size", 4, "--batch_size", 5, "--max_steps",
           4, "--report_to", "none")  # fmt: skip
    for every, wanted in ((0, [25, 45, 65, 85]), (1, [25, 50, 75, 100]), (2, [25, 50, 70, 95])):
        assert run(*toy, "--eval_steps", every, "--output_dir", f"run{every}").code == 0
        records = [record for record in metrics(place / f"run{every}") if "eval_reward" not in record]
        assert [record["num_evaluations"] for record in records] == wanted
        assert ["es/theta_fitness" in record for record in records] == [
            record["step"] == 1 or (every > 0 and record["step"] % every == 0) for record in records
        ]


def test_a_comparison_pays_for_no_baseline(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    args = ESConfig(engine="toy", task="quadratic", population_size=4, batch_size=5, max_steps=2, report_to=["none"],
                    num_threads=1, output_dir="run")  # fmt: skip
    worker.train(vars(args))
    records = metrics(place / "run")
    assert [record["num_evaluations"] for record in records] == [20, 40]
    assert not any("es/theta_fitness" in record for record in records)


# --- what else is known and told --------------------------------------------------------------------------------------


def test_rows_that_all_ask_the_same_and_rewards_that_never_apply(run_model: Any, place: Path) -> None:
    (place / "rows.jsonl").write_text('{"prompt": "2 + 2 ="}\n' * 16)
    (place / "own.py").write_text(
        "def never(completions, **_):\n    return [None] * len(completions)\n"
        "def always(completions, **_):\n    return [float(len(text)) for text in completions]\n"
    )
    done = run_model("train", "--dataset_name", "rows.jsonl", "--reward_funcs", "own.py:always", "own.py:never",
                     "--population_size", 4, "--batch_size", 16, "--max_steps", 2, "--max_completion_length", 3,
                     "--sigma", 0.01, "--report_to", "none", "--output_dir", "run")  # fmt: skip
    assert done.code == 0, done
    for told in ("all 16 prompts have the same tokens", "reward never has returned None for every completion so far",
                 "every completion of every member was cut off"):  # fmt: skip
        assert done.err.count(told) == 1, done.err


def test_a_model_without_an_end_token_gets_a_warning(run_model: Any, place: Path) -> None:
    model = scaled(place, "norm", 1.0, "endless")
    for file in ("generation_config.json", "config.json", "tokenizer_config.json"):
        values = json.loads((model / file).read_text())
        (model / file).chmod(0o644)
        (model / file).write_text(json.dumps({k: v for k, v in values.items() if not k.startswith("eos_token")}))
    done = run_model("evaluate", *SHORT, "--model", "endless", "--limit", 2, "--json")
    found = printed(done)
    assert found["clipped_ratio"] == 1.0
    assert done.err.count("no token ends a completion") == 1 and done.err.count("was cut off") == 1, done.err
    quiet = run_model("evaluate", *SHORT, "--model", "endless", "--limit", 2, "--json", "--stop_strings", "e")
    assert "no token ends" not in quiet.err
