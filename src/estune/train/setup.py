"""The parts of a run, made from its configuration: resolved values, rows, reward functions and the engine.

Callers load the engine last, because only the engine needs torch. Mistakes in the other parts then show early.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estune import environment
from estune.config import (
    FIELDS,
    OF_METHODS,
    SAMPLING_METHODS,
    SEARCHES,
    ESConfig,
    ResolvedConfig,
    SizedConfig,
    default_of,
)
from estune.console import note, warn
from estune.data import layouts
from estune.data.batches import Batches
from estune.data.datasets import check_columns, has_splits, load_rows
from estune.data.memory import is_stream
from estune.data.prompts import PromptBuilder
from estune.engines import ENGINES
from estune.engines.base import Engine, EngineClass, EngineOptions
from estune.errors import UserError, install_command
from estune.es.types import Prompt
from estune.identity import encode, rows_digest
from estune.models.names import local_directory
from estune.models.reward_model import RewardModel
from estune.rewards.contract import wants_opponents
from estune.rewards.loading import load_object
from estune.rewards.pool import RewardPool, load_reward
from estune.rewards.sources import source_parts
from estune.rewards.wrappers import wrap
from estune.run.directory import refuse_unfinished
from estune.run.journal import JOURNAL_FILE, Journal
from estune.run.origin import DataIdentity
from estune.run.resume import Facts, warn_of_engine_source
from estune.run.saved_config import run_of
from estune.sandbox import host
from estune.tasks import Task, get_task

if TYPE_CHECKING:
    from estune.engines.ray.cluster import Limits

RewardFunc = Callable[..., Any]
Rows = Sequence[dict[str, Any]]
DATA_VERSION = 2  # version of the data's fingerprint; version 1 compares only the types of values that JSON lacks
LARGE_BYTES = 64 << 20  # bytes of weights above which several threads are faster than one
DEFAULT_BATCH = 32  # prompts a step
SPLIT_OPTIONS = {"dataset_train_split": "train", "dataset_test_split": "test"}  # with their defaults
COMPARING = ("es", "grpo", "dr_grpo", "rloo")  # methods with several completions of a prompt
CONTROLLED_POPULATION = 16  # members from which step_control auto lets theta answer, too: 6 % more completions at most
DEFAULT_GROUPS = 8  # prompts a step, for methods that sample several completions of each prompt
DEFAULT_PROMPTS_PER_BATCH = 64  # prompts a forward pass


@dataclass
class Rewards:
    """The F reward functions of a run, their names and weights, and the accuracy function of evaluations."""

    funcs: list[RewardFunc]
    names: list[str]
    weights: list[float]
    accuracy: RewardFunc | None


def task_of(args: ESConfig) -> Task | None:
    """Return the configured built-in task, or None; check the sandbox if the task runs code.

    Raises:
        UserError: the task is unknown or does not fit the engine, or the sandbox is missing and not waived.
    """
    task = get_task(args.task, args.allow_unsandboxed_code) if args.task else None
    if task is not None and task.runs_code:
        warning = host.require(args.allow_unsandboxed_code)
        if warning:
            warn(warning)
    elif args.allow_unsandboxed_code:
        raise UserError(
            "allow_unsandboxed_code has no effect: this task does not run code that a model wrote, unlike "
            "task arc_agi:python"
        )
    if (args.engine == "toy") != (args.task == "quadratic"):
        raise UserError("engine toy and task quadratic belong together: give both or neither")
    return task


def resolve_rewards(args: ESConfig, reward_funcs: Any, task: Task | None) -> Rewards:
    """Return the run's rewards: ``reward_funcs`` from Python, else the configuration's, else the task's.

    Raises:
        UserError: there is no reward, a reward does not import, or the number of weights differs.
    """
    if reward_funcs is None:
        reward_funcs = args.reward_funcs
    if reward_funcs is None:
        if task is None:
            raise UserError(
                "give --task, or --reward_funcs (package.module:function or file.py:function) for data of your own"
            )
        reward_funcs = task.reward
    listed = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    funcs = [named_reward(item) if isinstance(item, str) else item for item in listed]
    if not funcs:
        raise UserError("reward_funcs is empty: at least one reward function is needed")
    for func in funcs:
        if not callable(func):
            raise UserError(f"a reward must be a callable or package.module:function, not {type(func).__name__}")
    names: list[str] = []
    for func in funcs:
        name = getattr(func, "__name__", type(func).__name__)
        names.append(name if name not in names else f"{name}_{len(names)}")
    funcs = [wrap(func, args.reward_wrappers, args.seed) for func in funcs]
    if args.method not in COMPARING and any(map(wants_opponents, funcs)):
        raise UserError(
            f"a reward compares completions of the same prompt (opponents), and method {args.method} has one for each "
            f"prompt: use {', '.join(COMPARING)}"
        )
    weights = args.reward_weights or [1.0] * len(funcs)
    if len(weights) != len(funcs):
        raise UserError(f"reward_weights has {len(weights)} numbers for {len(funcs)} reward functions")
    return Rewards(funcs, names, weights, task.accuracy if task else None)


def named_reward(spec: str) -> RewardFunc:
    """Return the function that ``package.module:function`` or ``path/file.py:function`` names, or a reward model.

    A name without a colon is the directory of a sequence classifier, or its name on the hub.

    Raises:
        UserError: there is no such function or model.
    """
    return load_reward(spec) if ":" in spec else RewardModel.open(spec)


def no_rewards(args: ESConfig) -> Rewards:
    """Return the rewards of an evaluation without reward functions.

    Raises:
        UserError: an option of reward functions is set.
    """
    for name in ("reward_weights", "reward_timeout_s", "reward_workers", "reward_isolation", "reward_placement"):
        if getattr(args, name) != default_of(name):
            raise UserError(f"{name} has no effect without a reward: give --task or --reward_funcs")
    return Rewards([], [], [], None)


def reward_pool(args: ESConfig, funcs: list[RewardFunc], names: list[str], workers: int | None = None) -> RewardPool:
    """Start a pool for reward functions; ``workers`` defaults to the configuration's number.

    A pool without functions has no workers.

    Raises:
        UserError: a function cannot be sent to another process, or Ray's cluster cannot be used.
    """
    if not funcs:
        return RewardPool([], [], timeout_s=args.reward_timeout_s, workers=1, isolation="inline")
    if workers is None:
        workers = args.reward_workers if isinstance(args.reward_workers, int) else 1
    if args.reward_placement == "workers":
        _require_ray()
        from estune.engines.ray import cluster
        from estune.rewards.remote import RemotePool

        connection = cluster.connect(_limits(args))
        try:
            return RemotePool(
                funcs,
                names,
                timeout_s=args.reward_timeout_s,
                workers=workers,
                actors=args.num_workers,
                connection=connection,
            )
        except UserError:
            connection.close()
            raise
    return RewardPool(funcs, names, timeout_s=args.reward_timeout_s, workers=workers, isolation=args.reward_isolation)


def resolve_rows(
    args: ESConfig, dataset: Any, task: Task | None, split: str, rewards: Rewards, *, for_training: bool = True
) -> list[dict[str, Any]]:
    """Return the rows of ``split`` (``train``, ``validation`` or ``test``), checked for prompts and rewards.

    The rows come from ``dataset`` (from Python), else from ``args.dataset_name``, else from the task. A note says which
    columns make the prompts, unless the column is ``prompt``.

    Raises:
        UserError: there are no rows, or a row lacks a prompt or a column that a reward needs.
    """
    if dataset is not None or args.dataset_name is not None:
        rows = _with_prompts(args, _own_rows(args, dataset, split, for_training), task, split)
    elif task is not None:
        for name in (*SPLIT_OPTIONS, "column_mapping"):
            if getattr(args, name) != default_of(name):
                raise UserError(f"{name} needs dataset_name: it is for rows of your own")
        if split not in task.splits:
            raise UserError(f"task {args.task} has no split {split!r}; it has {', '.join(task.splits)}")
        rows = task.load(split)
    else:
        raise UserError("give --task, or --dataset_name with --reward_funcs")
    if not rows:
        raise UserError(f"the {split} split has no rows")
    for index, row in enumerate(rows):
        if row.get("prompt") is None:
            raise UserError(_no_prompt(row, index, split, task))
    check_columns(rows, rewards.funcs, rewards.names)
    return rows


def _own_rows(args: ESConfig, dataset: Any, split: str, for_training: bool) -> list[dict[str, Any]]:
    """Return the rows of the user's own dataset, given from Python or named by ``args.dataset_name``.

    Raises:
        UserError: the dataset cannot be read, or its splits do not fit.
    """
    source = dataset if dataset is not None else args.dataset_name
    one_set = dataset is None and not has_splits(source)
    named = (args.dataset_config, args.dataset_train_split, args.dataset_test_split)
    if one_set and named != (None, *SPLIT_OPTIONS.values()):
        raise UserError(f"dataset {source} is one set of rows: it has no configurations and no splits")
    same_split = dataset is None and args.dataset_train_split == args.dataset_test_split
    if split != "train" and for_training and same_split:
        raise UserError(f"the split {args.dataset_train_split} would be both trained on and held out")
    if split != "train" and for_training and one_set:
        raise UserError(
            f"{source} is one set of rows, which cannot be both trained on and held out: give a directory with "
            "train.jsonl and test.jsonl, or an eval_dataset from Python"
        )
    rows = load_rows(
        source, args.dataset_config, args.dataset_train_split if split == "train" else args.dataset_test_split
    )
    if dataset is not None and is_stream(dataset):
        note(f"the {split} rows are the {len(rows):,} rows of a {type(dataset).__name__}, read to its end")
    return rows


def _with_prompts(args: ESConfig, rows: list[dict[str, Any]], task: Task | None, split: str) -> list[dict[str, Any]]:
    """Return the user's rows with the names of ``column_mapping``, the task's columns, and prompts if they have any.

    The task makes the prompts if it can. Otherwise the layout of the rows does.

    Raises:
        UserError: the mapping does not fit the columns, several layouts fit, or a row does not fit its layout or task.
    """
    rows = layouts.with_mapped_columns(rows, args.column_mapping)
    hidden = layouts.hidden_columns(rows, args.column_mapping)
    if hidden and split != "validation":  # the warning of the training rows is enough
        warn(
            f"reward functions do not get the dataset's {', '.join(hidden)}, because they get the run's own under "
            "the same name: give the column another name with column_mapping"
        )
    made_by_task = task is not None and any(name in rows[0] for name in ("prompt", *task.problem_columns))
    if task is None or (task.problem_columns and not made_by_task):
        rows = _laid_out(args, rows, split)
    if task is None:
        return rows
    rows = [task.prepare_row(row) for row in rows]
    return rows if any("prompt" in row for row in rows) else _laid_out(args, rows, split)


def _laid_out(args: ESConfig, rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Return rows with the prompts that their layout makes, if it makes any, and say so."""
    layout = layouts.layout_of(rows, args.column_mapping)
    if layout is None:
        return rows
    laid_out = layouts.with_prompts(rows, layout, split)
    if layout != "prompt":
        note(f"{split} rows: {layouts.described(layout, laid_out[0])}")
    return laid_out


def _no_prompt(row: Mapping[str, Any], index: int, split: str, task: Task | None) -> str:
    """Return the error message for a row without a prompt, with a suggestion where its prompt could be."""
    if "prompt" in row:
        return f"row {index} of the {split} split: its prompt is null"
    makes = "".join(f" or '{name}'" for name in (task.problem_columns if task else layouts.LAYOUTS))
    problem = f"row {index} of the {split} split has no column 'prompt'{makes} (it has {', '.join(map(str, row))})"
    asked = next((name for name in layouts.LIKELY_PROMPTS if row.get(name) is not None), None)
    if asked is not None:
        name = task.problem_columns[0] if task and task.problem_columns else "prompt"
        problem += f"; name it with --column_mapping '{json.dumps({name: asked})}'"
    return problem


def resolve_config(args: ESConfig, n_rows: int, module: Any = None) -> SizedConfig:
    """Return the configuration with ``auto`` resolved wherever the options and the number of rows suffice.

    Raises:
        UserError: step control cannot work with the batch size.
    """
    auto: dict[str, Any] = {}
    if args.method in OF_METHODS["learning_rate"]:
        auto["learning_rate"] = args.effective_learning_rate
    if args.batch_size == "auto":
        wanted = {**dict.fromkeys(("es", *SEARCHES), DEFAULT_BATCH), "ppo": 64}.get(args.method, DEFAULT_GROUPS)
        auto["batch_size"] = min(wanted, n_rows)
    batch_size = auto.get("batch_size", args.batch_size)
    if args.step_control == "auto":
        auto["step_control"] = "drift" if args.population_size >= CONTROLLED_POPULATION and batch_size > 1 else "none"
    elif args.step_control != "none" and batch_size == 1:
        raise UserError(
            f"step_control {args.step_control} measures how the ranking of the members differs between prompts: it "
            "needs batch_size 2 or more"
        )
    if args.method in SAMPLING_METHODS and args.dtype == "auto":  # they train in float32, so they sample in float32
        auto["dtype"] = "float32"
    if args.prompts_per_batch == "auto":
        auto["prompts_per_batch"] = DEFAULT_PROMPTS_PER_BATCH
    if args.num_threads == "auto":
        auto["num_threads"] = default_threads(args, module)
    if args.reward_workers == "auto" and args.reward_isolation == "process":
        has_model = any(":" not in name for name in args.reward_funcs or ())  # each worker would load its own
        auto["reward_workers"] = 1 if has_model else min(4, max(1, environment.cores() - 1))
    auto["model"] = model_of(args)
    return SizedConfig(**{name: getattr(args, name) for name in FIELDS} | auto)


def model_of(args: ESConfig) -> str:
    """Return the model's name: the engine's own if ``model`` has its default and the engine has a model of its own.

    With an engine outside estune, a name without ``/`` is the engine's own; a directory gets ``./`` before its name.
    """
    if args.engine in ("hf", "vllm"):
        return args.model
    name = str(getattr(engine_class(args.engine), "name", args.engine))
    if args.model in (name, default_of("model")):
        return name
    is_plain = args.engine not in ENGINES and "/" not in args.model and Path(args.model).is_dir()
    return f"./{args.model}" if is_plain else args.model


def batches_of(args: SizedConfig, n_rows: int) -> Batches:
    """Return the rows of every step.

    Raises:
        UserError: the batch size is larger than the number of rows.
    """
    return Batches(n_rows, args.batch_size, args.seed)


def default_threads(args: ESConfig, module: Any = None) -> int:
    """Return 1 for a small model, otherwise the number of cores that this process may use.

    On an idle machine, a second thread makes a model of a few megabytes 15 % faster. When other processes run, spinning
    threads make it four times slower.
    """
    if args.engine == "toy":
        return environment.cores()
    if module is not None:
        size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    else:
        directory = local_directory(args.model)
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors")) if directory else LARGE_BYTES
    cores = environment.cores()
    if args.num_workers:  # without resources of their own the workers share this machine's cores
        cores = max(1, int(args.worker_resources.get("CPU", cores // args.num_workers)))
    return cores if size >= LARGE_BYTES else 1


def resolve_with_engine(args: SizedConfig, engine: Engine, prompts: Sequence[Prompt]) -> ResolvedConfig:
    """Return the configuration with the values that need the loaded engine: dtype, device, ``members_per_batch``.

    ``members_per_batch`` depends on the memory that is free now. It is 1 for full-rank noise. With low-rank noise, as
    many members share a forward pass as fit into memory and still save time. All batches have nearly equal sizes.
    """
    most = 1
    if args.noise == "lowrank" and args.members_per_batch == "auto":
        wanted = min(args.batch_size, args.prompts_per_batch) * args.num_generations  # sequences per member
        longest = max(len(prompt.token_ids) for prompt in prompts) + args.max_completion_length
        sampled = args.temperature > 0
        models = args.population_size + (args.step_control == "drift")  # theta answers with the members
        most = engine.members_that_fit(models, wanted, longest, args.rank, sampled)
    members = args.members_per_batch
    if members == "auto" and args.method in OF_METHODS["members_per_batch"]:
        batches = -(-args.population_size // most)
        members = -(-args.population_size // batches)
    values = {name: getattr(args, name) for name in FIELDS}
    values |= dict(dtype=engine.facts.dtype, device=engine.facts.device, members_per_batch=members)
    return ResolvedConfig(**values)


def check_model(model: str, revision: str | None = None) -> None:
    """Check that a model exists and that its files are readable, without loading the model.

    Raises:
        UserError: the model is neither a directory nor on the hub, or the directory holds no complete model.
    """
    from estune.engines.hf import loading

    refuse_unfinished(model)
    loading.check_model(model, revision)


def load_engine(args: SizedConfig, module: Any = None, tokenizer: Any = None) -> Engine:
    """Load the engine. ``module`` is a model in memory.

    Raises:
        UserError: the engine does not exist, or the model is missing or damaged.
    """
    model = model_of(args) if module is None else args.model
    options = EngineOptions(
        model=model,
        module=module,
        tokenizer=tokenizer,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        num_threads=default_threads(args, module) if args.num_threads == "auto" else args.num_threads,
        prompts_per_batch=args.prompts_per_batch,
        trainable_parameters=args.trainable_parameters,
        noise=args.noise,
        tensor_parallel_size=args.tensor_parallel_size,
    )
    is_toy = args.engine == "toy" or (args.engine == "hf" and module is None and _is_toy(args.model))
    if is_toy:
        for name, harmless in (("temperature", 0.0), ("stop_strings", [])):
            if getattr(args, name) != harmless:
                raise UserError(f"the toy engine does not support {name}")
    if module is None and (args.engine in ("hf", "vllm") or model != getattr(engine_class(args.engine), "name", None)):
        refuse_unfinished(args.model)
    name = "toy" if is_toy else args.engine
    if args.num_workers:
        return _in_workers(args, engine_class(name), options)
    engine = engine_class(name).open(options)
    for attribute in ("theta", "assets", "facts", "specs", "answers", "generate"):
        if getattr(engine, attribute, None) is None:
            raise UserError(f"engine {name!r} has no {attribute}: its constructor must set it (see docs/extending.md)")
    return engine


def _in_workers(args: SizedConfig, engine: EngineClass, options: EngineOptions) -> Engine:
    """Return an engine whose members answer in Ray's workers.

    Raises:
        UserError: Ray is not installed, or its cluster cannot be used, or the engine cannot be opened.
    """
    _require_ray()
    from estune.engines.ray.engine import RayEngine

    return RayEngine(engine, options, _limits(args))


def _require_ray() -> None:
    """Raise UserError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"num_workers needs the package ray: {install_command(extra='ray')}")


def _limits(args: ESConfig) -> Limits:
    """Return the number of workers and what each takes of the cluster."""
    from estune.engines.ray.cluster import Limits

    resources = dict(args.worker_resources)
    if not resources:
        threads = default_threads(args) if args.num_threads == "auto" else args.num_threads
        share = max(1, environment.cores() // args.num_workers)
        resources["CPU"] = threads if os.environ.get("RAY_ADDRESS") else min(threads, share)
        if _has_gpu(args):
            resources["GPU"] = args.tensor_parallel_size
    return Limits(args.num_workers, resources, args.worker_timeout_s)


def _has_gpu(args: ESConfig) -> bool:
    """Return whether workers need a GPU: with device cuda, or with device auto if this machine has one."""
    import torch

    return args.device == "cuda" or (args.device == "auto" and args.engine != "toy" and torch.cuda.is_available())


def engine_class(name: str) -> EngineClass:
    """Return the class of an engine: one of `ENGINES`, ``package.module:Class``, or ``path/file.py:Class``.

    Raises:
        UserError: the class cannot be imported, or it is no engine.
    """
    if name in ENGINES:
        module, _, attribute = ENGINES[name].partition(":")
        known: EngineClass = getattr(importlib.import_module(module), attribute)
        return known
    found: EngineClass = load_object("engine", name)
    if not hasattr(found, "open"):
        raise UserError(f"engine {name!r} is no engine: it has no method open (see estune.engines.local.LocalBase)")
    return found


def _is_toy(model: str) -> bool:
    from estune.engines.toy import MODEL_TYPE

    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


@dataclass
class Loaded:
    """The loaded inputs of a run: its resolved configuration, engine, rewards, and rows with their prompts."""

    args: ResolvedConfig
    engine: Engine
    rewards: Rewards
    train_rows: Rows
    train_prompts: list[Prompt]
    eval_rows: Rows
    eval_prompts: list[Prompt]


def facts_of(loaded: Loaded) -> Facts:
    """Return the facts about data, rewards and model that a resume compares with the stored run.

    Raises:
        UserError: a value of a column cannot be hashed; the message names row, column and type.
    """
    rewards, rows, prompts = loaded.rewards, loaded.train_rows, loaded.train_prompts
    identity = {
        **loaded.engine.assets.identity(),
        "reward_sources": dict(zip(rewards.names, map(source_parts, rewards.funcs), strict=True)),
        "held_out": data_identity(loaded.eval_rows, loaded.eval_prompts) if loaded.eval_rows else None,
    }
    if source := engine_source(loaded.args, loaded.engine):
        identity["engine_source"] = source
    return Facts(
        data=data_identity(rows, prompts),
        reward_funcs=rewards.names,
        reward_weights=rewards.weights,
        identity=identity,
        unversioned_data=lambda: unversioned_data(rows, prompts),
    )


def engine_source(args: ESConfig, engine: Engine) -> dict[str, dict[str, str]]:
    """Return the parts of the source of an engine outside estune by its class's name; empty for an engine of estune."""
    kind = getattr(engine, "engine_class", type(engine))  # of an engine in workers
    return {} if args.engine in ENGINES else {kind.__name__: source_parts(kind, "engine")}


def warn_of_changed_engine(args: ESConfig, engine: Engine) -> None:
    """Warn if the model is a run whose engine, outside estune, had another source."""
    run_dir = run_of(args.model)
    if run_dir is None or args.engine in ENGINES:
        return
    journal = None
    with suppress(UserError):  # a damaged journal does not prevent an evaluation
        journal = Journal.open(run_dir / JOURNAL_FILE, repair=False)
    if journal is not None:
        warn_of_engine_source(journal.header.get("identity", {}), engine_source(args, engine))


def data_identity(rows: Rows, prompts: Sequence[Prompt]) -> DataIdentity:
    """Return the number of rows, and a hash of all their values and of their prompts' tokens."""
    fingerprint = rows_digest(rows, (prompt.token_ids for prompt in prompts))
    return {"rows": len(rows), "fingerprint": fingerprint, "version": DATA_VERSION}


def unversioned_data(rows: Rows, prompts: Sequence[Prompt]) -> tuple[str, list[str]]:
    """Return the data's fingerprint of version 1, and the columns whose values version 1 does not compare.

    Runs of older versions of estune store version 1. It hashes only the type's name of a value that JSON lacks.
    """
    digest = blake2b(digest_size=16)
    unseen: dict[str, None] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        digest.update(f"{prompt.token_ids}".encode())
        digest.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode())
        unseen |= {name: None for name, value in row.items() if not _is_json(value)}
    return digest.hexdigest(), list(unseen)


def rows_fingerprint(rows: Rows) -> str:
    """Return a hash of rows that does not depend on the model; rows that JSON cannot represent go through `encode`."""
    lines = [json.dumps(row, sort_keys=True) if _is_json(row) else encode(row).hex() for row in rows]
    return blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def build_prompts(
    args: ESConfig, engine: Engine, rows: Sequence[dict[str, Any]], is_builtin_task: bool
) -> list[Prompt]:
    """Return the tokenised prompts of rows, (rows,); ``row_id`` is the row's index.

    Raises:
        UserError: a prompt with its completion does not fit the model's context.
    """
    builder = PromptBuilder(
        engine.assets.tokenizer,
        apply_chat_template=args.apply_chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
        system_prompt=args.system_prompt,
        response_prefix=args.response_prefix,
        max_context=engine.facts.max_context,
        max_completion_length=args.max_completion_length,
        is_builtin_task=is_builtin_task,
        vocab_size=engine.facts.vocab_size,
    )
    if (
        args.chat_template_kwargs
        and rows
        and not (
            args.apply_chat_template == "true"
            or (is_builtin_task and getattr(engine.assets.tokenizer, "chat_template", None))
            or any(not isinstance(row["prompt"], str) for row in rows)
        )
    ):
        raise UserError("chat_template_kwargs have no effect: no prompt goes through a chat template")
    return [builder.build(row, index) for index, row in enumerate(rows)]
