"""From a configuration to what a run works on: resolved values, rows, reward functions, and the engine.

Everything torch-free comes first (rows, rewards, the reward pool's processes); the engine is loaded last.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from estune import environment
from estune.config import FIELDS, OF_METHODS, SAMPLING_METHODS, ESConfig, ResolvedConfig
from estune.console import warn
from estune.data.batches import Batches
from estune.data.columns import check_columns
from estune.data.datasets import has_splits, load_rows
from estune.data.prompts import PromptBuilder
from estune.engines import ENGINES
from estune.engines.base import Engine, EngineOptions, LocalEngine, ModelAssets
from estune.errors import UserError
from estune.es.types import Prompt, Sampling
from estune.identity import encode, rows_digest
from estune.models.names import local_directory
from estune.rewards.pool import RewardPool, load_reward
from estune.rewards.sources import source_parts
from estune.run.directory import refuse_unfinished
from estune.run.resume import Facts
from estune.sandbox import host
from estune.tasks import Task, get_task

RewardFunc = Callable[..., Any]
Rows = Sequence[dict[str, Any]]
DATA_VERSION = 2  # of the data's fingerprint; version 1 noted none, and compared only the types of what is no JSON
LARGE_BYTES = 64 << 20  # from here on a model's matrix products are worth several threads
DEFAULT_BATCH = 32
PROBLEM_COLUMNS = ("question", "problem", "instruction", "input", "text", "query", "messages")  # where prompts hide
DEFAULT_GROUPS = 8  # prompts a step of methods that sample several completions of each
DEFAULT_PROMPTS_PER_BATCH = 64


@dataclass
class Rewards:
    """The reward functions of a run, their names and weights, and the accuracy that evaluations report."""

    funcs: list[RewardFunc]
    names: list[str]
    weights: list[float]
    accuracy: RewardFunc | None


def task_of(args: ESConfig) -> Task | None:
    """Return the configured built-in task, if any, after a look whether code that it has to run can be run safely.

    Raises:
        UserError: an unknown task, an impossible pairing, or no sandbox and no leave to do without.
    """
    task = get_task(args.task, args.allow_unsandboxed_code) if args.task else None
    if task is not None and task.runs_code:
        warning = host.require(args.allow_unsandboxed_code)
        if warning:
            warn(warning)
    elif args.allow_unsandboxed_code:
        raise UserError(
            "allow_unsandboxed_code has no effect: no code that a model writes is run here, as it is for "
            "task arc_agi:python"
        )
    if (args.engine == "toy") != (args.task == "quadratic"):
        raise UserError("engine toy and task quadratic belong together: give both or neither")
    return task


def resolve_rewards(args: ESConfig, given: Any, task: Task | None) -> Rewards:
    """Return the run's rewards: those ``given`` from Python, else the configuration's, else the task's.

    Raises:
        UserError: there is none, one does not import, or the weights do not fit.
    """
    if given is None:
        given = args.reward_funcs
    if given is None:
        if task is None:
            raise UserError(
                "give --task, or --reward_funcs (package.module:function or file.py:function) for data of your own"
            )
        given = task.reward
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    funcs = [load_reward(item) if isinstance(item, str) else item for item in listed]
    if not funcs:
        raise UserError("reward_funcs is empty: at least one reward function is needed")
    for func in funcs:
        if not callable(func):
            raise UserError(f"a reward must be a callable or package.module:function, not {type(func).__name__}")
    names: list[str] = []
    for func in funcs:
        name = getattr(func, "__name__", type(func).__name__)
        names.append(name if name not in names else f"{name}_{len(names)}")
    weights = args.reward_weights or [1.0] * len(funcs)
    if len(weights) != len(funcs):
        raise UserError(f"reward_weights has {len(weights)} numbers for {len(funcs)} reward functions")
    return Rewards(funcs, names, weights, task.accuracy if task else None)


def reward_pool(args: ESConfig, funcs: list[RewardFunc], names: list[str], workers: int | None = None) -> RewardPool:
    """Start the pool for some reward functions; ``workers`` defaults to the configuration's."""
    if workers is None:
        workers = args.reward_workers if isinstance(args.reward_workers, int) else 1
    return RewardPool(funcs, names, timeout_s=args.reward_timeout_s, workers=workers, isolation=args.reward_isolation)


def resolve_rows(
    args: ESConfig, given: Any, task: Task | None, split: str, rewards: Rewards, *, for_training: bool = True
) -> list[dict[str, Any]]:
    """Return the rows of ``split`` (``train``, ``validation`` or ``test``), ready for prompts and rewards.

    Raises:
        UserError: no rows, no prompt column, or a column that a reward needs is missing.
    """
    if given is not None or args.dataset_name is not None:
        source = given if given is not None else args.dataset_name
        one_set = given is None and not has_splits(source)
        named = (args.dataset_config, args.dataset_train_split, args.dataset_test_split)
        if one_set and named != (None, "train", "test"):
            raise UserError(f"dataset {source} is one set of rows: it has no configurations and no splits")
        if split != "train" and given is None and for_training and args.dataset_train_split == args.dataset_test_split:
            raise UserError(f"the split {args.dataset_train_split} would be trained on and held out")
        if split != "train" and for_training and one_set:
            raise UserError(
                f"{source} is one set of rows: trained on, they cannot be held out; give a directory with "
                "train.jsonl and test.jsonl, or an eval_dataset from Python"
            )
        name = args.dataset_train_split if split == "train" else args.dataset_test_split
        rows = load_rows(source, args.dataset_config, name)
        if task is not None:
            rows = [task.prepare_row(row) for row in rows]
    elif task is not None:
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


def _no_prompt(row: Mapping[str, Any], index: int, split: str, task: Task | None) -> str:
    """Return what is missing in a row without a prompt, and where a prompt could come from."""
    if "prompt" in row:
        return f"row {index} of the {split} split: its prompt is null"
    makes = "".join(f" or '{name}'" for name in (task.problem_columns if task else ()))
    problem = f"row {index} of the {split} split has no column 'prompt'{makes} (it has {', '.join(map(str, row))})"
    asked = next((name for name in PROBLEM_COLUMNS if row.get(name) is not None), None)
    if task is None and asked is not None:
        problem += f"; rename {asked!r} to 'prompt'"
        if row.get("answer") is not None:
            problem += (
                ", or let a task make the prompts and score the answers: --task math, or --task gsm_symbolic for "
                "answers that are one number"
            )
    return problem


def resolve_config(args: ESConfig, n_rows: int, module: Any = None) -> ESConfig:
    """Return the configuration with every ``auto`` and every default that depends on others filled in, once."""
    auto: dict[str, Any] = {}
    if args.method in OF_METHODS["learning_rate"]:
        auto["learning_rate"] = args.effective_learning_rate
    if args.batch_size == "auto":
        wanted = {"es": DEFAULT_BATCH, "random_search": DEFAULT_BATCH, "ppo": 64}.get(args.method, DEFAULT_GROUPS)
        auto["batch_size"] = min(wanted, n_rows)
    if args.method in SAMPLING_METHODS and args.dtype == "auto":  # they train in it, and so they sample
        auto["dtype"] = "float32"
    if args.prompts_per_batch == "auto":
        auto["prompts_per_batch"] = DEFAULT_PROMPTS_PER_BATCH
    if args.num_threads == "auto":
        auto["num_threads"] = default_threads(args, module)
    if args.reward_workers == "auto" and args.reward_isolation == "process":
        auto["reward_workers"] = min(4, max(1, environment.cores() - 1))
    if args.engine == "toy" and args.model == "tiny":
        auto["model"] = "toy"
    return dataclasses.replace(args, **auto)


def batches_of(args: ESConfig, n_rows: int) -> Batches:
    """Return the rows of each step, for a configuration whose batch size is resolved.

    Raises:
        UserError: the batch is larger than the rows.
    """
    assert isinstance(args.batch_size, int)
    return Batches(n_rows, args.batch_size, args.seed)


def default_threads(args: ESConfig, module: Any = None) -> int:
    """Return 1 for a small model, else the cores this process may use.

    A model of a few megabytes gains little from a second thread (15 % measured on an idle machine) and loses a factor
    of four to spinning threads as soon as anything else runs.
    """
    if args.engine == "toy":
        return environment.cores()
    if module is not None:
        size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    else:
        directory = local_directory(args.model)
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors")) if directory else LARGE_BYTES
    return environment.cores() if size >= LARGE_BYTES else 1


def resolve_with_engine(args: ESConfig, engine: Engine, prompts: Sequence[Prompt]) -> ResolvedConfig:
    """Return the configuration with what only the loaded engine can tell: dtype, device, ``members_per_batch``.

    The last one comes from the memory that is free now. Full-rank members always answer one at a time. Of low-rank ones
    as many share a forward pass as fit and are worth it; the population is cut into batches of nearly equal size.
    """
    most = 1
    if args.noise == "lowrank" and args.members_per_batch == "auto":
        assert isinstance(args.batch_size, int) and isinstance(args.prompts_per_batch, int)
        wanted = min(args.batch_size, args.prompts_per_batch) * args.num_generations  # rows of a member
        longest = max(len(prompt.token_ids) for prompt in prompts) + args.max_completion_length
        sampled = args.temperature > 0
        most = engine.members_that_fit(args.population_size, wanted, longest, args.rank, sampled)
    members = args.members_per_batch
    if members == "auto" and args.method in OF_METHODS["members_per_batch"]:
        batches = -(-args.population_size // most)
        members = -(-args.population_size // batches)
    values = {name: getattr(args, name) for name in FIELDS}
    values |= dict(dtype=engine.facts.dtype, device=engine.facts.device, members_per_batch=members)
    return ResolvedConfig(**values)


def check_model(model: str, revision: str | None = None) -> None:
    """Check that a model exists and that its files can be read, without loading it.

    Raises:
        UserError: it is no directory and not on the hub, or its directory holds no whole model.
    """
    from estune.engines.hf import loading

    refuse_unfinished(model)
    loading.check_model(model, revision)


def load_engine(args: ESConfig, module: Any = None, tokenizer: Any = None) -> LocalEngine:
    """Load the engine of a configuration whose threads and batches are resolved; ``module`` is a model in memory.

    Raises:
        UserError: the engine does not exist, or the model is missing, damaged, or not a model.
    """
    assert isinstance(args.num_threads, int) and isinstance(args.prompts_per_batch, int)
    options = EngineOptions(
        model=args.model,
        module=module,
        tokenizer=tokenizer,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        num_threads=args.num_threads,
        prompts_per_batch=args.prompts_per_batch,
        trainable_parameters=args.trainable_parameters,
        noise=args.noise,
    )
    is_toy = args.engine == "toy" or (args.engine == "hf" and module is None and _is_toy(args.model))
    if is_toy:
        for name, harmless in (("temperature", 0.0), ("stop_strings", [])):
            if getattr(args, name) != harmless:
                raise UserError(f"the toy engine has no use for {name}")
    elif module is None:
        refuse_unfinished(args.model)
    engine: LocalEngine = engine_class("toy" if is_toy else args.engine).open(options)
    return engine


def engine_class(name: str) -> Any:
    """Return the class of an engine: one of `ENGINES`, or ``package.module:Class``.

    Raises:
        UserError: there is no such class.
    """
    where = ENGINES.get(name, name)
    module, _, attribute = where.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"engine {name!r} does not import: {error}") from error


def _is_toy(model: str) -> bool:
    from estune.engines.toy import MODEL_TYPE

    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def facts_of(
    rewards: Rewards,
    assets: ModelAssets,
    rows: Rows,
    prompts: Sequence[Prompt],
    held_out: Rows,
    held_out_prompts: Sequence[Prompt],
) -> Facts:
    """Return what a run is made of beside its options, for the comparison at a resume.

    Raises:
        UserError: a value of a column cannot be compared; the sentence names row, column and type.
    """
    identity = {
        **assets.identity(),
        "reward_sources": dict(zip(rewards.names, map(source_parts, rewards.funcs), strict=True)),
        "held_out": data_identity(held_out, held_out_prompts) if held_out else None,
    }
    return Facts(
        data=data_identity(rows, prompts),
        reward_funcs=rewards.names,
        reward_weights=rewards.weights,
        identity=identity,
        unversioned_data=lambda: unversioned_data(rows, prompts),
    )


def data_identity(rows: Rows, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return how many rows there are, and a hash of every value in them and of their prompts' tokens."""
    fingerprint = rows_digest(rows, (prompt.token_ids for prompt in prompts))
    return {"rows": len(rows), "fingerprint": fingerprint, "version": DATA_VERSION}


def unversioned_data(rows: Rows, prompts: Sequence[Prompt]) -> tuple[str, list[str]]:
    """Return the data's fingerprint of version 1, and the columns whose values that version does not compare.

    Version 1 stands in runs of an older estune. Of a value that JSON lacks it holds the name of the type alone.
    """
    digest = blake2b(digest_size=16)
    unseen: dict[str, None] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        digest.update(f"{prompt.token_ids}".encode())
        digest.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode())
        unseen |= {name: None for name, value in row.items() if not _is_json(value)}
    return digest.hexdigest(), list(unseen)


def rows_fingerprint(rows: Rows) -> str:
    """Return a hash of rows, whatever model is asked them: of their JSON, or where JSON lacks a value of all bytes."""
    lines = [json.dumps(row, sort_keys=True) if _is_json(row) else encode(row).hex() for row in rows]
    return blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def sampling(args: ESConfig, step: int) -> Sampling:
    """Return the decoding settings of a training step."""
    return Sampling(
        seed=args.seed,
        step=step,
        max_completion_length=args.max_completion_length,
        num_generations=args.num_generations,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        stop_strings=tuple(args.stop_strings),
    )


def evaluation_sampling(args: ESConfig) -> Sampling:
    """Return how held-out rows are answered within a run: as in training, or greedily."""
    if args.method == "es" and not args.eval_greedy:
        return sampling(args, 0)
    return dataclasses.replace(sampling(args, 0), num_generations=1, temperature=0.0, top_p=1.0, top_k=0)


def build_prompts(
    args: ESConfig, engine: LocalEngine, rows: Sequence[dict[str, Any]], is_builtin_task: bool
) -> list[Prompt]:
    """Tokenise rows once: (rows,) prompts with ``row_id`` the index.

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
