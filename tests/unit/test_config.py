"""ESConfig: coercion by field type, unknown names, every rule of validation, and the paper's defaults."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from estune.config import (
    FIELDS,
    IN_HEADER_IF_SET,
    METHODS,
    RESUMABLE,
    ESConfig,
    ResolvedConfig,
    SizedConfig,
    coerce,
    default_of,
    field_of,
    read_config_file,
)
from estune.errors import UserError
from estune.train.setup import resolve_config


def test_defaults_are_the_papers() -> None:
    config = ESConfig()
    assert (config.population_size, config.sigma, config.effective_learning_rate) == (30, 1e-3, 5e-4)
    assert config.fitness_shaping == "z_score" and config.temperature == 0.0 and not config.antithetic
    assert config.weight_decay == 0.0 and config.lr_scheduler_type == config.sigma_scheduler_type == "constant"
    assert (config.noise, config.rank, config.members_per_batch) == ("full", 1, "auto")
    assert config.noise_distribution == "normal" and config.trainable_parameters is None
    assert (config.max_steps, config.num_generations, config.seed, config.warmup_steps) == (500, 1, 0, 0)
    assert ESConfig(sigma=5e-4).effective_learning_rate == 2.5e-4  # alpha follows sigma ...
    assert ESConfig(sigma=5e-4, learning_rate=1e-3).effective_learning_rate == 1e-3  # ... unless given
    assert ESConfig(learning_rate=0).effective_learning_rate == 0.0


def test_lists_and_dicts_are_not_shared() -> None:
    one, other = ESConfig(), ESConfig()
    one.stop_strings.append("x")
    one.chat_template_kwargs["y"] = 1
    one.report_to.append("z")
    assert other.stop_strings == [] and other.chat_template_kwargs == {} and "z" not in other.report_to


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sigma", "1e-3", 1e-3), ("sigma", "0.002", 0.002), ("sigma", 1, 1.0), ("learning_rate", "5E-4", 5e-4),
        ("learning_rate", None, None), ("learning_rate", "none", None), ("learning_rate", "null", None),
        ("population_size", "30", 30), ("population_size", 30.0, 30), ("population_size", "1e2", 100),
        ("seed", str(2**64 - 1), 2**64 - 1), ("seed", 2**64 - 1, 2**64 - 1), ("seed", 0, 0), ("seed", "0", 0),
        ("members_per_batch", "auto", "auto"), ("members_per_batch", "8", 8), ("rank", "4", 4),
        ("max_steps", "+7", 7), ("batch_size", "auto", "auto"), ("batch_size", "64", 64), ("batch_size", 64, 64),
        ("antithetic", True, True), ("antithetic", "true", True), ("antithetic", "False", False),
        ("antithetic", "no", False), ("antithetic", "yes", True), ("antithetic", 1, True), ("antithetic", "0", False),
        ("apply_chat_template", True, "true"), ("apply_chat_template", False, "false"),
        ("apply_chat_template", "auto", "auto"),
        ("reward_weights", [1, "0.5"], [1.0, 0.5]), ("reward_weights", "2", [2.0]), ("reward_weights", 2, [2.0]),
        ("reward_weights", None, None), ("reward_weights", (1.0, 2.0), [1.0, 2.0]),
        ("reward_funcs", "mod:f", ["mod:f"]), ("reward_funcs", ["a:b", "c.py:d"], ["a:b", "c.py:d"]),
        ("stop_strings", "</answer>", ["</answer>"]), ("stop_strings", [], []),
        ("chat_template_kwargs", '{"enable_thinking": false}', {"enable_thinking": False}),
        ("chat_template_kwargs", {"a": [1]}, {"a": [1]}), ("chat_template_kwargs", {1: 2}, {"1": 2}),
        ("model", Path("/some/where"), "/some/where"), ("run_name", "0123", "0123"), ("task", None, None),
    ],
)  # fmt: skip
def test_values_take_the_type_of_their_field(name: str, value: Any, expected: Any) -> None:
    found = coerce(name, value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("sigma", "abc", "sigma must be a number, not 'abc'"), ("sigma", True, "a number"), ("sigma", [1], "a number"),
        ("sigma", None, "a number"), ("population_size", 2.5, "a whole number"), ("population_size", "2.5", "whole"),
        ("population_size", "nan", "whole"), ("population_size", "inf", "whole"), ("population_size", True, "whole"),
        ("population_size", None, "whole"), ("batch_size", "all", "a whole number or 'auto'"),
        ("antithetic", "maybe", "true or false"), ("antithetic", 2, "true or false"), ("antithetic", None, "true or"),
        ("reward_weights", ["x"], "list of numbers"), ("reward_weights", {"a": 1}, "list"),
        ("stop_strings", None, "list"),
        ("stop_strings", [["a"]], "list of strings"), ("reward_weights", [True], "list"),
        ("reward_weights", [None], "list"),
        ("chat_template_kwargs", "{broken", "a JSON object"), ("chat_template_kwargs", "[1]", "a JSON object"),
        ("chat_template_kwargs", [1], "a JSON object"), ("chat_template_kwargs", {"a": object()}, "a JSON object"),
        ("chat_template_kwargs", {"a": float("nan")}, "a JSON object"), ("model", ["a"], "a string"),
        ("model", None, "string"), ("run_name", 7, "a string, not 7; if it is meant as text, write it in quotes"),
        ("system_prompt", False, "not False; .* quotes"), ("response_prefix", True, "not True; .* quotes"),
        ("stop_strings", [True, 1.1], "a list of strings, not .*; .* quotes"), ("stop_strings", 4, "not 4; .* quotes"),
        ("report_to", False, "not False; .* quotes"), ("fitness_shaping", True, "a string, not True; .* quotes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(name: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=f"^{name} must be .*{says.split(' must be ')[-1]}"):
        coerce(name, value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sigma": 0}, "sigma must be greater than 0, not 0.0"), ({"sigma": -1e-3}, "sigma must be greater than 0"),
        ({"sigma": "nan"}, "sigma must be a finite number"), ({"sigma": "inf"}, "sigma must be a finite number"),
        ({"learning_rate": "nan"}, "learning_rate must be a finite number"),
        ({"learning_rate": -1}, "learning_rate must not be negative"),
        ({"population_size": 1}, "population_size must be at least 2, not 1"),
        ({"population_size": 0}, "population_size must be at least 2"),
        ({"population_size": 31, "antithetic": True}, "antithetic needs an even population_size, not 31"),
        ({"population_size": 2**26}, "population_size must be below"),
        ({"noise": "low_rank"}, "noise is 'low_rank'; it can be full, lowrank; did you mean 'lowrank'"),
        ({"rank": 2}, "rank needs noise lowrank"), ({"rank": 0}, "rank must be greater than 0, not 0"),
        ({"rank": -1, "noise": "lowrank"}, "rank must be greater than 0, not -1"),
        ({"members_per_batch": 2}, "members_per_batch above 1 needs noise lowrank"),
        ({"members_per_batch": 0, "noise": "lowrank"}, "members_per_batch must be greater than 0, not 0"),
        ({"noise": "lowrank", "population_size": 2**19, "rank": 16}, "population_size times rank must be below 2"),
        ({"seed": -1}, "seed must be an unsigned 64-bit integer"), ({"seed": 2**64}, "seed must be an unsigned"),
        ({"max_steps": -1}, "max_steps must not be negative"), ({"warmup_steps": -1}, "warmup_steps must not be"),
        ({"batch_size": 0}, "batch_size must be greater than 0"), ({"batch_size": -3}, "batch_size must be greater"),
        ({"prompts_per_batch": 0}, "prompts_per_batch must be"), ({"num_threads": 0}, "num_threads must be"),
        ({"reward_workers": 0}, "reward_workers must be"), ({"reward_timeout_s": 0}, "reward_timeout_s must be"),
        ({"max_completion_length": 0}, "max_completion_length must be"), ({"num_generations": 0}, "num_generations"),
        ({"logging_steps": 0}, "logging_steps must be"), ({"eval_steps": -1}, "eval_steps must not be negative"),
        ({"eval_rows": -1}, "eval_rows must not"), ({"save_steps": -1}, "save_steps must not"),
        ({"save_total_limit": -1}, "save_total_limit must not"),
        ({"early_stopping_patience": -1}, "early_stopping_patience must not"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs eval_steps"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs eval_steps"),
        ({"early_stopping_threshold": 0.1, "eval_steps": 1}, "early_stopping_threshold needs early_stopping_patience"),
        ({"metric_for_best_model": "reward", "eval_steps": 1}, "metric_for_best_model needs load_best_model_at_end"),
        ({"greater_is_better": False, "eval_steps": 1}, "greater_is_better needs load_best_model_at_end"),
        ({"load_best_model_at_end": True, "eval_steps": 1, "method": "grpo"}, "grpo does not use load_best_model"),
        ({"early_stopping_patience": 2, "eval_steps": 1, "method": "random_search"}, "does not use early_stopping"),
        ({"weight_decay": -1}, "weight_decay must not"),
        ({"temperature": -0.1}, "temperature must not be negative"), ({"top_k": -2}, "top_k must not"),
        ({"top_p": 0, "temperature": 1}, "top_p must be greater than 0"),
        ({"top_p": 1.5, "temperature": 1}, "top_p must be at most 1"),
        ({"top_p": 0.9}, "top_p and top_k need temperature above 0"),
        ({"top_k": 5}, "top_p and top_k need temperature"),
        ({"num_generations": 2}, "num_generations above 1 needs temperature above 0"),
        ({"weight_decay_anchor": "base"}, "weight_decay_anchor base needs weight_decay above 0"),
        ({"lr_scheduler_type": "constant_with_warmup"}, "constant_with_warmup needs warmup_steps above 0"),
        ({"resume": True, "overwrite": True, "output_dir": "x"}, "exclude each other"),
        ({"resume": True}, "resume needs output_dir"),
        ({"reward_funcs": ["a:b"], "reward_weights": [1, 2]}, "reward_weights has 2 numbers for 1 reward functions"),
        ({"reward_weights": [0, 0]}, "reward_weights are all 0"),
        ({"reward_weights": ["nan"]}, "reward_weights must be a finite number"),
        ({"trainable_parameters": ["("]}, "not a regular expression"),
        ({"fitness_shaping": "zscore"}, "fitness_shaping is 'zscore'; it can be .*did you mean 'z_score'"),
        ({"noise_distribution": "gaussian"}, "noise_distribution is 'gaussian'; it can be normal, rademacher"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"), ({"device": "gpu"}, "device is 'gpu'"),
        ({"sigma_scheduler_type": "polynomial"}, "sigma_scheduler_type is"), ({"engine": "tgi"}, "engine is 'tgi'"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"), ({"weight_decay_anchor": "bas"}, "did you mean 'base'"),
        ({"chat_template_kwargs": {"a": 1}, "apply_chat_template": False}, "chat_template_kwargs have no effect"),
        ({"report_to": ["mlfow"]}, "report_to has 'mlfow'.*did you mean 'mlflow'"),
        ({"report_to": ["none", "plot"]}, "none stands alone"),
        ({"hub_model_id": "me/x"}, "need push_to_hub"), ({"console": "pannel"}, "did you mean 'panel'"),
        ({"reward_isolation": "thread"}, "reward_isolation is"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_sentence(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        ESConfig(**options)
    assert "\n" not in str(caught.value)


def test_values_of_other_libraries_are_read_and_shares_are_named() -> None:
    args = ESConfig(top_k=None, report_to=None, dtype=torch.bfloat16)
    assert (args.top_k, args.report_to, args.dtype) == (0, ["none"], "bfloat16") and ESConfig(top_k=-1).top_k == 0
    with pytest.raises(UserError, match=r"eval_steps must be a whole number, not 0.1; shares of max_steps"):
        ESConfig(eval_steps=0.1)
    with pytest.raises(UserError, match=r"sigma must be a number, not 'x'; and eval_steps must be a whole number"):
        ESConfig(sigma="x", eval_steps="y")
    with pytest.raises(UserError, match=r"sigma must be .*; and antithetic needs an even population_size"):
        ESConfig(sigma=-1, antithetic=True, population_size=5)
    with pytest.raises(UserError, match="ESConfig takes options by name, such as"):
        ESConfig("runs/first")


@pytest.mark.parametrize(
    "options",
    [
        {"population_size": 2, "antithetic": True}, {"max_steps": 0}, {"top_p": 0.9, "temperature": 0.7, "top_k": 20},
        {"num_generations": 4, "temperature": 1}, {"weight_decay": 10, "weight_decay_anchor": "base"},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, {"resume": True, "output_dir": "x"},
        {"reward_weights": [-1, 0.5]}, {"trainable_parameters": [r"\.mlp\.", "norm"]}, {"report_to": ["none"]},
        {"noise": "lowrank"}, {"noise": "lowrank", "rank": 16, "members_per_batch": 30, "antithetic": True},
        {"noise": "full", "rank": 1, "members_per_batch": 1}, {"members_per_batch": "auto"},
        {"noise": "lowrank", "population_size": 2**19 - 1, "rank": 16}, {"population_size": 2**26 - 1},
        {"load_best_model_at_end": True, "eval_steps": 2, "metric_for_best_model": "reward", "greater_is_better": True},
        {"early_stopping_patience": 3, "early_stopping_threshold": 0.01, "eval_steps": 5},
        {"lr_scheduler_type": "cosine", "max_time_s": 60.0}, {"sigma_scheduler_type": "linear", "max_time_s": 60.0},
        {"seed": 2**64 - 1}, {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)  # fmt: skip
def test_what_can_work_is_accepted(options: dict[str, Any]) -> None:
    config = ESConfig(**options)
    assert all(getattr(config, name) == value for name, value in options.items())


def test_help_names_the_defaults_of_methods() -> None:
    for name, spec in FIELDS.items():
        others = [value for value in spec.metadata.get("by_method", {}).values() if value != default_of(name)]
        if name != "step_control":  # of other methods it is refused
            assert all(f": {value:g}." in spec.metadata["help"] for value in others), name
    text = FIELDS["batch_size"].metadata["help"].partition("auto: ")[2]
    sizes = {name: size for names, size in re.findall(r"with (.+?) (\d+)", text) for name in re.findall(r"\w+", names)}
    for method in METHODS:
        resolved = resolve_config(ESConfig(method=method, task="countdown"), 10**6)
        assert str(resolved.batch_size) == sizes.get(method, text.partition(",")[0]), method


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("sigam", "sigma"), ("learning-rat", "learning_rate"), ("populationsize", "population_size"),
        ("max_step", "max_steps"),
        ("anti_thetic", "antithetic"), ("temprature", "temperature"), ("model_name", "model_name_or_path|model"),
    ],
)  # fmt: skip
def test_unknown_names_tell_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=rf"unknown option '{wrong}'; did you mean '({right})'\?"):
        ESConfig.from_mapping({wrong: 1})


def test_an_unknown_name_like_no_other_is_still_named() -> None:
    with pytest.raises(UserError, match=r"has an unknown option 'qqqqqqqq'$"):
        ESConfig.from_mapping({"qqqqqqqq": 1})


def test_dashes_and_aliases() -> None:
    config = ESConfig.from_mapping({"learning-rate": "1e-4", "model_name_or_path": "some/model", "max-steps": 3})
    assert (config.learning_rate, config.model, config.max_steps) == (1e-4, "some/model", 3)
    assert field_of("model-name-or-path") == "model" and field_of("model_revision") == "revision"
    assert field_of("lr") is None


@pytest.mark.parametrize("twice", [{"model": "a", "model_name_or_path": "b"}, {"max-steps": 1, "max_steps": 2}])
def test_one_option_under_two_names_is_refused(twice: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"gives (model|max_steps) twice"):
        ESConfig.from_mapping(twice)


def test_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: some/model\nsigma: 1e-3\nlearning-rate: 5e-4\nantithetic: yes\npopulation_size: 8\n"
        "apply_chat_template: true\nreward_weights: [1, 1e-1]\nsystem_prompt: null\nbatch_size: auto\n"
        "chat_template_kwargs: {enable_thinking: false}\nseed: 18446744073709551615\n"
    )
    values = read_config_file(str(path))
    assert values["sigma"] == "1e-3"  # this is what YAML makes of it
    config = ESConfig.from_mapping(values)
    assert (config.sigma, config.learning_rate, config.antithetic, config.population_size) == (1e-3, 5e-4, True, 8)
    assert config.apply_chat_template == "true" and config.reward_weights == [1.0, 0.1] and config.system_prompt is None
    assert config.chat_template_kwargs == {"enable_thinking": False} and config.seed == 2**64 - 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sigma: [1", "is not YAML"), ("- sigma\n", "must be a mapping"), ("just text", "must be a mapping"),
        ("sigam: 1\n", "unknown option 'sigam'; did you mean 'sigma'"), ("1: 2\n", "unknown option '1'"),
        ("model: a\nmodel_name_or_path: b\n", "gives model twice"),
        (
            "sigam: 1\nbf16: true\nqqqqqqqq: 2\n",
            "unknown options 'sigam' \\(did you mean 'sigma'\\?\\), 'bf16' \\(use dtype bfloat16\\), 'qqqqqqqq'$",
        ),
    ],
)  # fmt: skip
def test_bad_yaml_is_refused_in_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read_config_file(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("response_prefix: yes", "yes"), ("system_prompt: no", "no"), ("run_name: 0123", "0123"),
        ("run_name: 2026-01-01", "2026-01-01"), ("revision: 1234567", "1234567"), ("dataset_config: 1:30", "1:30"),
    ],
)  # fmt: skip
def test_text_that_yaml_reads_as_something_else_is_asked_for_in_quotes(tmp_path: Path, line: str, text: str) -> None:
    """The text cannot be restored: YAML has read it as `True`, 83 or a date."""
    path = tmp_path / "run.yaml"
    name, value = line.split(": ")
    path.write_text(f"{line}\ndataset_name: d\n")
    with pytest.raises(UserError, match=rf"^{name} must be a string, not .*; if it is meant as text, .* in quotes$"):
        ESConfig.from_mapping(read_config_file(str(path)))
    path.write_text(f"{name}: '{value}'\ndataset_name: d\n")
    assert getattr(ESConfig.from_mapping(read_config_file(str(path))), name) == text


def test_stop_strings_in_yaml_keep_their_text_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("stop_strings: [on, 1.10]\n")
    with pytest.raises(UserError, match=r"stop_strings must be a list of strings, .* in quotes"):
        ESConfig.from_mapping(read_config_file(str(path)))
    path.write_text('stop_strings: ["on", "1.10"]\n')
    assert ESConfig.from_mapping(read_config_file(str(path))).stop_strings == ["on", "1.10"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sigma: 1\nseed: 2\nsigma: 3\n", "gives 'sigma' in line 1 and again in line 3"),
        ("chat_template_kwargs: {a: 1, a: 2}\n", "gives 'a' in line 1 and again in line 1"),
        ('"sigma": 1\nsigma: 1\n', "gives 'sigma' in line 1 and again in line 2"),
        ("run_name: 2026-99-99\n", "is not YAML"),
    ],
)
def test_a_yaml_file_says_everything_once(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_config_file(str(path))


def test_yaml_may_repeat_by_reference(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("chat_template_kwargs: {a: &b {x: 1}, c: *b, d: {<<: *b, x: 2}}\n")
    values = read_config_file(str(path))["chat_template_kwargs"]
    assert values == {"a": {"x": 1}, "c": {"x": 1}, "d": {"x": 2}}


def test_a_config_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"run_name: \xff\xfe\n")
    with pytest.raises(UserError, match="is not YAML"):
        read_config_file(str(path))


def test_training_needs_evaluations_for_a_split_to_evaluate_on() -> None:
    given = {"dataset_name": "d", "dataset_test_split": "zzz"}
    with pytest.raises(UserError, match="dataset_test_split has no effect in training without eval_steps"):
        ESConfig(**given).validate_training()  # `estune evaluate` may have it
    ESConfig(**given, eval_steps=1).validate_training()
    ESConfig(**given, resume=True, output_dir="run").validate_training()  # its evaluations turned off
    ESConfig().validate_training()


def test_empty_and_missing_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\n")
    assert read_config_file(str(path)) == {}
    with pytest.raises(UserError, match="cannot be read"):
        read_config_file(str(tmp_path / "missing.yaml"))
    with pytest.raises(UserError, match="cannot be read"):
        read_config_file("no_such_preset")


def test_json_gives_the_configuration_back() -> None:
    config = ESConfig(
        model="m", sigma=1 / 3, seed=2**64 - 1, reward_weights=[0.1, -2], stop_strings=["ä"], antithetic=True,
        chat_template_kwargs={"a": [1, None]}, batch_size=7,
    )  # fmt: skip
    assert ESConfig.from_mapping(json.loads(config.to_json())) == config
    assert ESConfig.from_mapping(json.loads(ESConfig().to_json())) == ESConfig()


def test_what_a_resume_may_change_is_not_part_of_the_trajectory() -> None:
    names = {spec.name for spec in dataclasses.fields(ESConfig)}
    assert names >= RESUMABLE
    trajectory = ESConfig().trajectory()
    assert set(trajectory) == names - RESUMABLE - IN_HEADER_IF_SET
    assert (
        set(ESConfig(column_mapping={"prompt": "text"}, reward_wrappers=["drop(share=1)"], opponents=2).trajectory())
        == names - RESUMABLE
    )
    json.dumps(trajectory, allow_nan=False)
    for name in ("model", "sigma", "learning_rate", "population_size", "seed", "batch_size", "prompts_per_batch",
                 "num_threads", "weight_decay", "lr_scheduler_type", "dtype", "temperature",
                 "noise", "rank", "members_per_batch"):  # fmt: skip
        assert name in trajectory
    for name in ("max_steps", "save_steps", "eval_steps", "logging_steps", "report_to"):
        assert name not in trajectory


def test_every_field_has_help() -> None:
    assert all(len(spec.metadata["help"]) > 10 for spec in FIELDS.values())


def test_the_core_is_free_of_torch_and_transformers() -> None:
    """So `--help` is fast, and a crash test of the toy engine needs no torch."""
    modules = (
        "noise es.population es.fitness es.update es.theta run.journal models.tensor_files train.evaluation "
        "config files cli"
    ).split()
    script = "import sys\n" + "\n".join(f"import estune.{module}" for module in modules)
    script += "\nassert not {'torch', 'transformers', 'vllm', 'ray'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_options_from_python_have_the_command_lines_hints() -> None:
    hints = {
        "use_vllm": "use engine vllm",
        "num_train_epochs": "use max_steps, counted in steps of batch_size prompts",
        "sigam": "did you mean 'sigma'?",
        "model_name_or_path": "use model",
    }
    for name, hint in hints.items():
        with pytest.raises(UserError, match=re.escape(f"ESConfig has an unknown option '{name}'; {hint}") + "$"):
            ESConfig(**{name: 1})
    with pytest.raises(UserError) as caught:
        ESConfig(**dict.fromkeys([*hints, "qqqqqqqq"], 1), max_steps=2)
    named = ", ".join(f"'{name}' ({hint})" for name, hint in hints.items())
    assert str(caught.value) == f"ESConfig has unknown options {named}, 'qqqqqqqq'"


def test_a_resolved_configuration_has_numbers_and_does_not_change() -> None:
    sizes = {"batch_size": 4, "prompts_per_batch": 8, "num_threads": 1}
    with pytest.raises(UserError, match="batch_size must be a number in a resolved configuration, not 'auto'"):
        SizedConfig(prompts_per_batch=8)
    with pytest.raises(UserError, match="step_control must not be auto"):
        SizedConfig(**sizes)
    with pytest.raises(UserError, match="members_per_batch must be a number"):
        ResolvedConfig(**sizes, step_control="none")
    es = ResolvedConfig(**sizes, members_per_batch=1, step_control="none")
    grpo = ResolvedConfig(**sizes, method="grpo", num_generations=4, temperature=1.0)
    search = ResolvedConfig(**sizes, method="random_search", members_per_batch=1)
    assert (es.group_size, es.step_rate) == (1, es.sigma / 2)
    assert (grpo.group_size, grpo.members_per_batch, grpo.step_rate) == (1, "auto", 1e-6)
    assert (search.step_rate, search.learning_rate) == (0.0, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        es.sigma = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        del es.sigma
    copy = pickle.loads(pickle.dumps(es))
    assert copy == es and vars(copy) == dataclasses.asdict(es)
    assert es.to_json() == ESConfig(**sizes, members_per_batch=1, step_control="none").to_json()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_name": "../../x"}, "no name of a directory below runs"),
        ({"run_name": ""}, "no name of a directory below runs"),
        ({"run_name": ".."}, "no name of a directory below runs"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"stop_strings": [""]}, "stop_strings has an empty string"),
    ],
)
def test_a_directory_has_a_name_and_a_stop_string_has_text(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ESConfig(**options)


def test_a_run_name_may_hold_a_slash_where_it_names_no_directory() -> None:
    assert ESConfig(run_name="team/x", output_dir="runs/x").run_name == "team/x"
