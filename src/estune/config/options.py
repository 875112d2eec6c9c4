"""ESConfig: one dataclass with all options of a run. The command line's flags are its field names.

Three checks catch mistakes before a run starts: every value is converted to its field's type (YAML reads `1e-3` as a
string), unknown names are an error with a hint for each (`hints`), and `validate` refuses values that cannot work.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from estune.config.coercion import convert, is_text
from estune.config.hints import in_python, option_hint, unknown_in
from estune.engines import ENGINES
from estune.errors import UserError, nearest
from estune.es.update import SCHEDULES, SIGMA_SCHEDULES, STEP_CONTROLS

# Options by which held-out evaluations choose the run's model or its end; named as in transformers.
BEST_STEP = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "early_stopping_patience",
             "early_stopping_threshold")  # fmt: skip
RAY = "ray"  # a value of `engine`
REPORTS = ("plot", "report", "tensorboard", "trackio", "wandb", "mlflow", "none")

# Training methods: `es`, and the baselines of `estune.baselines`, which share its tasks, rewards and evaluation.
METHODS = ("es", "grpo", "dr_grpo", "rloo", "ppo", "sft_rejection", "random_search", "random_vote")
SEARCHES = ("random_search", "random_vote")  # draw members and never update theta
SAMPLING_METHODS = ("grpo", "dr_grpo", "rloo", "ppo", "sft_rejection")  # train on sampled completions
# Option -> the methods that use it, for options that not every method uses.
OF_METHODS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("population_size", "sigma", "antithetic", "noise", "rank", "noise_distribution",
                     "members_per_batch", "sigma_scheduler_type"), ("es", *SEARCHES)),
    **dict.fromkeys(("fitness_shaping", "weight_decay_anchor", "step_control", "opponents", *BEST_STEP), ("es",)),
    **dict.fromkeys(("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
                    tuple(method for method in METHODS if method not in SEARCHES)),
    "method_kwargs": tuple(method for method in METHODS if method not in ("es", "random_search")),
}  # fmt: skip

# Options that say where an engine runs.
OF_WORKERS = ("num_workers", "worker_engine", "worker_resources", "worker_timeout_s", "reward_placement")

# Options that a resume may change. All others define the trajectory and are written into the journal's header.
RESUMABLE = frozenset(
    "max_steps max_time_s save_steps save_total_limit eval_steps eval_rows eval_greedy logging_steps report_to "
    "console log_completions output_dir run_name resume overwrite dry_run push_to_hub hub_model_id "
    "hub_private_repo tensor_parallel_size".split()
) | frozenset((*OF_WORKERS, *BEST_STEP))

# Options that the journal's header holds only if they are set; so all other runs have the header of older versions.
IN_HEADER_IF_SET = frozenset(("column_mapping", "reward_wrappers", "opponents"))

# Options that runs of older versions lack. They had the default's meaning, or that of `OLDER_VALUES`.
LATER_OPTIONS = frozenset(("tensor_parallel_size", "step_control", *OF_WORKERS, *BEST_STEP, *IN_HEADER_IF_SET))
OLDER_VALUES = {"step_control": "none"}

# The fields of `ESConfig` that each command takes; `train` takes all of them.
# `estune evaluate`: the options that decide its result.
EVALUATE_FIELDS = (
    "model revision trust_remote_code dtype device engine task dataset_name dataset_config dataset_test_split "
    "column_mapping reward_funcs reward_weights reward_timeout_s reward_workers reward_isolation "
    "allow_unsandboxed_code apply_chat_template chat_template_kwargs system_prompt response_prefix stop_strings seed "
    "max_completion_length num_generations temperature top_p top_k prompts_per_batch num_threads tensor_parallel_size "
    "num_workers worker_engine worker_resources worker_timeout_s reward_placement"
).split()
# `estune probe` and `estune plan`: the options that decide the members' completions and their rewards.
_MEMBER_FIELDS = (
    "model revision trust_remote_code dtype device engine trainable_parameters task dataset_name dataset_config "
    "dataset_train_split column_mapping reward_funcs reward_wrappers reward_weights reward_timeout_s reward_workers "
    "reward_isolation allow_unsandboxed_code apply_chat_template chat_template_kwargs system_prompt response_prefix "
    "stop_strings batch_size noise rank noise_distribution seed max_completion_length num_generations temperature "
    "top_p top_k prompts_per_batch members_per_batch num_threads tensor_parallel_size num_workers worker_engine "
    "worker_resources worker_timeout_s reward_placement"
).split()
# `estune probe`: also those that decide a step's gain.
PROBE_FIELDS = (*_MEMBER_FIELDS, "population_size", "antithetic", "learning_rate")
# `estune plan`: the options that decide what a run costs.
PLAN_FIELDS = (
    *_MEMBER_FIELDS,
    *"population_size antithetic sigma learning_rate max_steps eval_steps eval_rows eval_greedy".split(),
)
# `estune score`: the options that decide the rewards of given completions.
SCORE_FIELDS = (
    "task column_mapping reward_funcs reward_weights reward_timeout_s reward_workers reward_isolation "
    "allow_unsandboxed_code"
).split()


def _option(
    default: Any,
    help: str,
    choices: Iterable[str] = (),
    aliases: Iterable[str] = (),
    by_method: Mapping[str, Any] | None = None,
) -> Any:
    """Declare a field with its help text; lists and dicts become default factories.

    ``by_method`` names defaults of methods other than `es`; the field is filled in when the configuration is made.
    """
    metadata = {"help": help, "choices": tuple(choices), "aliases": tuple(aliases)}
    if by_method is not None:
        return field(default=None, metadata={**metadata, "by_method": {"es": default, **by_method}})
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ESConfig:
    """The configuration of a run. Defaults are those of arXiv 2509.24372."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse unknown options with hints, where a dataclass would raise TypeError.

        Raises:
            UserError: options are unknown, or given by an alias.
        """
        if args:
            raise UserError("ESConfig takes options by name, such as ESConfig(output_dir='runs/first')")
        wrong = {name: field_of(name) for name in options if name not in FIELDS}
        if wrong:
            hints = {name: f"; use {known}" if known else hint_of(name) for name, known in wrong.items()}
            raise unknown_in("ESConfig", "option", hints)
        return super().__new__(cls)

    if not TYPE_CHECKING:  # a type checker then still finds misspelt options

        def __getattr__(self, name: str) -> Any:
            """Raise AttributeError; for an option of TRL or transformers the message says what to use instead."""
            hint = "" if name.startswith("_") else hint_of(name)
            raise AttributeError(f"ESConfig has no option {name!r}{hint}")

    # Model
    model: str = _option(
        "tiny", "Model id on the hub, a local directory, or the embedded `tiny`.", aliases=("model_name_or_path",)
    )
    revision: str | None = _option(None, "Revision of the model on the hub.", aliases=("model_revision",))
    trust_remote_code: bool = _option(False, "Run the Python code that comes with the model.")
    dtype: str = _option(
        "auto",
        "Compute dtype; theta itself is always float32. auto: float32; with es, random_search and random_vote on CUDA "
        "bfloat16 for a checkpoint of 16 bits.",
        ("auto", "float32", "bfloat16", "float16"),
    )
    device: str = _option("auto", "Where the model runs.", ("auto", "cpu", "cuda", "mps"))
    engine: str = _option(
        "hf",
        "Generation backend: hf (transformers), vllm, toy (a function of a vector), package.module:Class, or "
        "file.py:Class. ray: the worker_engine in Ray's workers, as with num_workers.",
    )
    tensor_parallel_size: int = _option(1, "Processes that share one model, with engine vllm.")
    num_workers: int = _option(
        0, "Ray workers, each with the engine and a replica of theta; 0: the engine runs in this process."
    )
    worker_engine: str | None = _option(None, "The workers' engine, with engine ray. Default: hf.")
    worker_resources: dict[str, Any] = _option(
        {},
        'JSON object of what each worker takes of Ray\'s cluster, such as {"CPU": 4, "GPU": 1}. Default: num_threads '
        "CPUs, and with a GPU tensor_parallel_size GPUs.",
    )
    worker_timeout_s: float = _option(600.0, "Seconds without progress after which a worker is replaced.")
    reward_placement: str = _option(
        "driver",
        "Where rewards run, with num_workers. driver: on the machine of the process that trains; workers: spread over "
        "the cluster, reward_workers processes for each Ray worker.",
        ("driver", "workers"),
    )
    trainable_parameters: list[str] | None = _option(
        None, "Regular expressions; only parameters whose stored name matches one of them are trained. Default: all."
    )

    # Task, data, reward
    task: str | None = _option(None, "Built-in task. Without one: --dataset_name, --reward_funcs.")
    dataset_name: str | None = _option(
        None, "Rows: a JSONL, CSV, TSV or parquet file, a directory, or a dataset id on the hub."
    )
    dataset_config: str | None = _option(None, "Configuration name of the dataset.")
    dataset_train_split: str = _option("train", "Split to train on.")
    dataset_test_split: str = _option("test", "Split to evaluate on, for your own dataset.")
    column_mapping: dict[str, Any] = _option(
        {},
        "JSON object of further names for columns: the name that estune or a reward uses, then the dataset's column, "
        'such as {"prompt": "question"}.',
    )
    reward_funcs: list[str] | None = _option(
        None,
        "Rewards as package.module:function or path/file.py:function, or a reward model: a directory or a hub id of a "
        "sequence classifier with one label. Default: the task's.",
    )
    reward_wrappers: list[str] = _option(
        [],
        "Calls that make the reward unreliable in training, the first of them innermost: noisy(flip=0.2), "
        "noisy(std=0.1, per=row), drop(share=0.1), hackable(exploit='sorry', bonus=1).",
    )
    opponents: int | Literal["theta"] = _option(
        "theta",
        "Whose completions a reward function with the argument opponents gets, too: theta's, or those of this many "
        "other members.",
    )
    reward_weights: list[float] | None = _option(None, "One weight per reward function. Default: all 1.")
    reward_timeout_s: float = _option(60.0, "Seconds one reward call may take before its worker is killed.")
    reward_workers: int | Literal["auto"] = _option("auto", "Worker processes for rewards. auto: cores - 1, 1 to 4.")
    reward_isolation: str = _option(
        "process", "process: rewards run in killable workers; inline: no limits at all.", ("process", "inline")
    )
    allow_unsandboxed_code: bool = _option(
        False,
        "Run code that the model writes without a sandbox: for arc_agi:python if this system has no sandbox, and for "
        "rg: tasks whose scorer evaluates answers.",
    )

    # Prompt
    apply_chat_template: str = _option(
        "auto",
        "auto: for conversational rows and built-in tasks, if the tokenizer has a template; true: always.",
        ("auto", "true", "false"),
    )
    chat_template_kwargs: dict[str, Any] = _option({}, "JSON object of extra arguments for the chat template.")
    system_prompt: str | None = _option(None, "System message, or text before a plain prompt.")
    response_prefix: str = _option("", "First text of every response; rewards see it as part of the completion.")
    stop_strings: list[str] = _option([], "Strings that end a completion.")

    # Method
    method: str = _option(
        "es",
        "es, or a baseline with the same task, prompts, rewards and evaluation: grpo, dr_grpo, rloo (TRL's), ppo, "
        "sft_rejection (on correct samples of the base), random_search (the best member, no update), random_vote (the "
        "same; in a comparison the best members vote on each answer).",
        METHODS,
    )
    method_kwargs: dict[str, Any] = _option(
        {}, "JSON object of arguments for a baseline's trainer, such as TRL's beta, or vote_members of random_vote."
    )

    # Evolution strategy
    max_steps: int = _option(500, "Number of steps (updates).")
    max_time_s: float = _option(
        0.0, "Seconds of training, without evaluations and saving, after which the run ends; 0: no limit."
    )
    population_size: int = _option(30, "Members per step, N, mirrored members included.")
    sigma: float = _option(1e-3, "Standard deviation of the perturbations.")
    learning_rate: float | None = _option(
        None, "Step size alpha, which includes the factor 1/sigma. Default: sigma / 2; for other methods TRL's."
    )
    batch_size: int | Literal["auto"] = _option(
        "auto",
        "Prompts per step, B. auto: 32, with grpo, dr_grpo, rloo and sft_rejection 8, with ppo 64; at most all rows.",
    )
    antithetic: bool = _option(False, "Mirrored pairs: each seed is used with both signs.")
    noise: str = _option(
        "full",
        "full: every element has independent noise; lowrank: the noise of a matrix is a product of two thin ones, "
        "so that several members share a forward pass.",
        ("full", "lowrank"),
    )
    rank: int = _option(1, "Rank of a matrix's noise in one member, with noise lowrank.")
    noise_distribution: str = _option("normal", "Distribution of the noise.", ("normal", "rademacher"))
    fitness_shaping: str = _option(
        "z_score", "How fitness becomes utilities.", ("z_score", "centered_rank", "per_prompt_z", "none")
    )
    step_control: str = _option(
        "auto",
        "Bound on each step's learning rate. reliability: times the share of the ranking beyond chance; drift: while "
        "the fitness does not rise, at most what loses a fiftieth of the step's gain to its random part (theta answers "
        "every step, too). auto: drift with population_size 16 or more and batch_size 2 or more, else none.",
        ("auto", *STEP_CONTROLS),
        by_method=dict.fromkeys(METHODS[1:], "none"),
    )
    lr_scheduler_type: str = _option(
        "constant", "Schedule of the learning rate over max_steps, or over max_time_s if time runs faster.", SCHEDULES
    )
    warmup_steps: int = _option(
        0,
        "Steps over which the learning rate rises to its full value, with every schedule (transformers: not with "
        "constant). Where schedules run over max_time_s, so does the rise: warmup_steps of max_steps.",
    )
    sigma_scheduler_type: str = _option(
        "constant", "Schedule of sigma over max_steps, or over max_time_s if time runs faster.", SIGMA_SCHEDULES
    )
    weight_decay: float = _option(
        0.0,
        "Lambda of theta -= learning_rate * lambda * (theta - anchor), before the step's own change. With es, a step "
        "in which all members tie writes nothing, not even this.",
    )
    weight_decay_anchor: str = _option(
        "zero", "What weight decay pulls towards: zero, or base (theta_0).", ("zero", "base")
    )
    seed: int = _option(0, "Seed of noise, row order and sampling.")

    # Generation
    max_completion_length: int = _option(256, "Maximum number of tokens of a completion.")
    num_generations: int = _option(
        1,
        "Completions per prompt and member, G; more than 1 needs temperature > 0. Default with grpo, dr_grpo, rloo and "
        "sft_rejection: 8.",
        by_method={
            **dict.fromkeys(("grpo", "dr_grpo", "rloo", "sft_rejection"), 8),
            **dict.fromkeys(("ppo", *SEARCHES), 1),
        },
    )
    temperature: float = _option(
        0.0,
        "Sampling temperature; 0 decodes greedily. Default with methods that learn from samples: 1. Methods other "
        "than es sample only in training; their evaluations are greedy.",
        by_method={**dict.fromkeys(SAMPLING_METHODS, 1.0), **dict.fromkeys(SEARCHES, 0.0)},
    )
    top_p: float = _option(1.0, "Nucleus sampling: smallest set of tokens with this probability.")
    top_k: int = _option(0, "Sample among the k most likely tokens; 0: all.")
    prompts_per_batch: int | Literal["auto"] = _option("auto", "Prompts in one forward pass, at most. auto: 64.")
    members_per_batch: int | Literal["auto"] = _option(
        "auto", "Members in one forward pass, with noise lowrank. auto: chosen by memory and speed."
    )
    num_threads: int | Literal["auto"] = _option(
        "auto", "CPU threads. auto: 1 for a model under 64 MB, else the number of cores."
    )

    # Run
    output_dir: str | None = _option(None, "Run directory. Default: runs/<run_name>.")
    run_name: str | None = _option(
        None, "The run's name for trackers and reports. Default: the directory's, or task-model-date-time."
    )
    resume: bool = _option(False, "Continue the run in --output_dir.")
    overwrite: bool = _option(False, "Delete the run in --output_dir first.")
    dry_run: bool = _option(False, "Resolve everything, print it, write nothing.")
    logging_steps: int = _option(
        1, "Steps between lines on the terminal and in metrics.jsonl; es also logs its first step."
    )
    log_completions: bool = _option(False, "Write the population's completions every logging_steps.")
    eval_steps: int = _option(0, "Steps between held-out evaluations; the first is before step 1; 0: none.")
    eval_rows: int = _option(0, "Held-out rows in evaluations within a run; 0: all.")
    eval_greedy: bool = _option(
        False, "Evaluate greedily within a run whose training samples; methods other than es always do."
    )
    load_best_model_at_end: bool = _option(
        False,
        "Save the step with the best held-out evaluation (the base model, at step 0, included), not the last step. "
        "Needs eval_steps, and no checkpoints.",
    )
    metric_for_best_model: str | None = _option(
        None,
        "Field of the evaluations in metrics.jsonl that decides, with or without eval_. Default: eval_accuracy if the "
        "task has one, else eval_reward.",
    )
    greater_is_better: bool | None = _option(
        None, "Whether higher values of metric_for_best_model are better. Default: unless its name ends with loss."
    )
    early_stopping_patience: int = _option(
        0, "End the run after so many evaluations in a row without improvement; 0: never. Needs eval_steps."
    )
    early_stopping_threshold: float = _option(0.0, "Smaller improvements do not count for early_stopping_patience.")
    save_steps: int = _option(0, "Steps between checkpoints; 0: only the final model.")
    save_total_limit: int = _option(0, "Checkpoints to keep, newest first; 0: all.")
    push_to_hub: bool = _option(False, "Upload the finished model, with the hub client's token (HF_TOKEN).")
    hub_model_id: str | None = _option(None, "Repository to upload to. Default: the run directory's name.")
    hub_private_repo: bool = _option(False, "Make the repository of hub_model_id private.")
    report_to: list[str] = _option(
        ["plot", "report"],
        "Beside metrics.jsonl: plot (PNG curves), report (report.html), tensorboard, trackio, wandb, mlflow; or none.",
    )
    console: str = _option(
        "auto",
        "Display of a run: a panel, or one line a step; auto: a panel with es on a terminal.",
        ("auto", "panel", "lines"),
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method is {self.method!r}; it can be {', '.join(METHODS)}"
                            f"{nearest(str(self.method), METHODS)}")  # fmt: skip
        wrong = []
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value is None and "by_method" in spec.metadata:
                value = default_of(spec.name, self.method)
            try:
                setattr(self, spec.name, coerce(spec.name, value))
            except UserError as error:
                wrong.append(str(error))
        if wrong:
            raise UserError("; and ".join(wrong))
        if self.worker_engine == RAY:
            raise UserError("worker_engine is the engine that runs in the workers, such as hf or vllm")
        if self.engine == RAY:  # another spelling: the engine says what computes the answers, num_workers says where
            self.engine, self.worker_engine = self.worker_engine or "hf", None
            self.num_workers = self.num_workers or 1
        self.validate()

    def validate(self) -> None:
        """Raise UserError for values that cannot work, alone or together."""
        for spec in dataclasses.fields(self):
            value, choices = getattr(self, spec.name), spec.metadata["choices"]
            if choices and value not in choices:
                raise UserError(f"{spec.name} is {value!r}; it can be {', '.join(choices)}{nearest(value, choices)}")
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, float) and not math.isfinite(item):
                    raise UserError(f"{spec.name} must be a finite number, not {item}")
                if not is_text(item):
                    raise UserError(
                        f"{spec.name} cannot be encoded as UTF-8: {item!r} holds half of a surrogate pair, as "
                        "undecodable bytes on a command line do"
                    )
        wrong = []
        for check in (self._validate_numbers, self._validate_method, self._validate_population, self._validate_run):
            try:
                check()
            except UserError as error:
                wrong.append(str(error))
        if wrong:
            raise UserError("; and ".join(wrong))

    def _validate_numbers(self) -> None:
        """Refuse numbers out of their range."""
        positive = (
            "sigma",
            "reward_timeout_s",
            "max_completion_length",
            "num_generations",
            "logging_steps",
            "batch_size",
            "prompts_per_batch",
            "members_per_batch",
            "rank",
            "num_threads",
            "tensor_parallel_size",
            "reward_workers",
            "worker_timeout_s",
            "top_p",
        )
        for name in positive:
            value = getattr(self, name)
            if value != "auto" and value <= 0:
                raise UserError(f"{name} must be greater than 0, not {value}")
        for name in (
            "max_steps",
            "learning_rate",
            "warmup_steps",
            "weight_decay",
            "temperature",
            "max_time_s",
            "num_workers",
            "top_k",
            "eval_steps",
            "eval_rows",
            "early_stopping_patience",
            "early_stopping_threshold",
            "save_steps",
            "save_total_limit",
        ):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} must not be negative, not {value}")

    def _validate_population(self) -> None:
        """Refuse members, noise and decoding that cannot work together."""
        if self.population_size < 2:
            raise UserError(f"population_size must be at least 2, not {self.population_size}")
        if self.antithetic and self.population_size % 2:
            raise UserError(f"antithetic needs an even population_size, not {self.population_size}")
        if self.step_control not in ("auto", "none") and self.population_size < (4 if self.antithetic else 2):
            raise UserError(f"step_control {self.step_control} needs two or more members, or two or more pairs")
        if isinstance(self.opponents, int) and not 1 <= self.opponents < self.population_size:
            raise UserError(f"opponents must be theta, or from 1 to population_size - 1, not {self.opponents}")
        if self.population_size >= 1 << 26:
            raise UserError("population_size must be below 2^26, where integer utilities would lose all precision")
        if self.noise == "full":
            if self.rank != 1:
                raise UserError("rank needs noise lowrank")
            if self.members_per_batch not in ("auto", 1):
                raise UserError("members_per_batch above 1 needs noise lowrank: other members share no forward pass")
        elif self.population_size * self.rank >= 1 << 23:
            raise UserError("population_size times rank must be below 2^23, where integer utilities would lose all "
                            "precision")  # fmt: skip
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed must be an unsigned 64-bit integer, not {self.seed}")
        if self.top_p > 1:
            raise UserError(f"top_p must be at most 1, not {self.top_p}")
        if self.num_generations > 1 and self.temperature == 0:
            raise UserError("num_generations above 1 needs temperature above 0: greedy completions would all be equal")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise UserError("top_p and top_k need temperature above 0: greedy decoding ignores them")
        if self.weight_decay_anchor == "base" and self.weight_decay == 0:
            raise UserError("weight_decay_anchor base needs weight_decay above 0")
        if self.lr_scheduler_type == "constant_with_warmup" and self.warmup_steps == 0:
            raise UserError("lr_scheduler_type constant_with_warmup needs warmup_steps above 0")

    def _validate_run(self) -> None:
        """Refuse data, rewards and files that cannot work together."""
        if self.eval_rows and not self.eval_steps:
            raise UserError("eval_rows has no effect without eval_steps")
        if self.eval_greedy and not (self.eval_steps and self.temperature and self.method == "es"):
            raise UserError("eval_greedy needs eval_steps, method es and temperature above 0: else it has no effect")
        self._validate_best_step()
        if self.save_total_limit and not self.save_steps:
            raise UserError("save_total_limit has no effect without save_steps")
        if self.reward_isolation == "inline" and (self.reward_workers != "auto" or self.reward_timeout_s != 60.0):
            raise UserError("reward_isolation inline has no workers and no time limit: leave both at their defaults")
        if self.chat_template_kwargs and self.apply_chat_template == "false":
            raise UserError("chat_template_kwargs have no effect with apply_chat_template false")
        if self.dataset_name is None and self.dataset_config is not None:
            raise UserError("dataset_config needs dataset_name")
        for name, column in self.column_mapping.items():
            if not isinstance(column, str):
                raise UserError(f"column_mapping maps {name!r} to {column!r}, which is not the name of a column")
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private_repo):
            raise UserError("hub_model_id and hub_private_repo need push_to_hub")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other")
        if self.output_dir == "":
            raise UserError("output_dir is empty: give a directory, or . for the working directory")
        name = "run" if self.output_dir is not None or self.run_name is None else self.run_name
        if name in ("", ".", "..") or "/" in name:  # the name makes a directory if there is no output_dir
            raise UserError(f"run_name {name!r} is no name of a directory below runs: give a name without /, or the "
                            "directory as output_dir")  # fmt: skip
        if "" in self.stop_strings:
            raise UserError("stop_strings has an empty string, which would end no completion")
        if self.resume and self.output_dir is None:
            raise UserError("resume needs output_dir, the directory of the run to continue")
        if self.reward_weights is not None:
            n_funcs = len(self.reward_funcs) if self.reward_funcs is not None else 1
            if self.reward_funcs is not None and len(self.reward_weights) != n_funcs:
                raise UserError(f"reward_weights has {len(self.reward_weights)} numbers for {n_funcs} reward functions")
            if not any(self.reward_weights):
                raise UserError("reward_weights are all 0: nothing would be learned")
        if self.engine not in ENGINES and ":" not in self.engine:
            known = (*ENGINES, RAY)
            raise UserError(f"engine is {self.engine!r}; it can be {', '.join(known)}, package.module:Class, or "
                            f"file.py:Class{nearest(self.engine, known)}")  # fmt: skip
        if self.tensor_parallel_size > 1 and self.engine != "vllm":
            raise UserError(f"engine {self.engine} does not use tensor_parallel_size; engine vllm does")
        self._validate_workers()
        for pattern in self.trainable_parameters or []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"trainable_parameters has {pattern!r}, not a regular expression: {error}") from None
        for name in self.report_to:
            if name not in REPORTS:
                raise UserError(f"report_to has {name!r}; it can be {', '.join(REPORTS)}{nearest(name, REPORTS)}")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise UserError("report_to none stands alone")

    def _validate_best_step(self) -> None:
        """Refuse options of the best step and of early stopping that have no effect."""
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, name) and not self.eval_steps:
                raise UserError(f"{name} needs eval_steps: evaluations decide")
        if self.early_stopping_threshold and not self.early_stopping_patience:
            raise UserError("early_stopping_threshold needs early_stopping_patience")
        if not (self.load_best_model_at_end or self.early_stopping_patience):
            for name in ("metric_for_best_model", "greater_is_better"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name} needs load_best_model_at_end or early_stopping_patience")

    def _validate_workers(self) -> None:
        """Refuse options of Ray's workers that have no effect or are no amounts."""
        if self.worker_engine is not None:
            raise UserError("worker_engine needs engine ray; with num_workers, engine names what the workers run")
        if not self.num_workers:
            for name in ("worker_resources", "worker_timeout_s", "reward_placement"):
                if getattr(self, name) != default_of(name):
                    raise UserError(f"{name} needs num_workers")
        if self.reward_placement == "workers" and self.reward_isolation == "inline":
            raise UserError(
                "reward_isolation inline runs rewards in the process that trains: not with reward_placement workers"
            )
        for name, amount in self.worker_resources.items():
            if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 < amount < math.inf:
                raise UserError(f"worker_resources has {amount!r} for {name}; it must be a number greater than 0")
            if name == "object_store_memory":
                raise UserError("worker_resources cannot have object_store_memory: workers keep nothing in Ray's store")

    def _validate_method(self) -> None:
        """Refuse options that the method would ignore, and values that it cannot use."""
        for name, methods in OF_METHODS.items():
            if self.method not in methods and getattr(self, name) != default_of(name, self.method):
                raise UserError(f"method {self.method} does not use {name}")
        if self.method == "es":
            return
        if self.max_time_s and self.has_falling_schedule:
            raise UserError(
                f"max_time_s of method {self.method} needs constant schedules: its others depend on the number of steps"
            )
        if self.engine != "hf":
            raise UserError(f"method {self.method} trains the model of transformers itself: it needs engine hf")
        if self.num_workers:
            raise UserError(f"method {self.method} trains in this process: num_workers is for es")
        if self.console == "panel":
            raise UserError(f"console panel shows a population: with method {self.method} use console lines")
        if self.log_completions:
            raise UserError(f"method {self.method} keeps no completions of training: log_completions is for es")
        if self.method in SAMPLING_METHODS:
            if self.temperature == 0:
                raise UserError(f"method {self.method} learns from samples: temperature must be above 0")
            if self.method in ("grpo", "dr_grpo", "rloo") and self.num_generations < 2:
                raise UserError(f"method {self.method} compares completions of a prompt: num_generations must be 2 or "
                                "more")  # fmt: skip
            if self.method == "ppo":
                if self.num_generations != 1:
                    raise UserError("method ppo learns from one completion of each prompt: num_generations must be 1")
                if self.top_p < 1 or self.top_k > 0:
                    raise UserError("method ppo samples from the whole distribution: leave top_p at 1 and top_k at 0")
                if self.stop_strings:
                    raise UserError("method ppo has no stop_strings: its completions end at the model's own end tokens")
            if self.dtype not in ("auto", "float32"):
                raise UserError(f"method {self.method} trains in float32: leave dtype at auto")
            if self.seed >= 1 << 32:
                raise UserError(f"method {self.method} takes seeds below 2^32, as NumPy's generator does")

    def validate_training(self) -> None:
        """Raise UserError for an option that only an evaluation uses.

        A resume is exempt: it keeps the run's options, and may turn evaluations off.
        """
        if self.dataset_test_split != FIELDS["dataset_test_split"].default and not self.eval_steps and not self.resume:
            raise UserError("dataset_test_split has no effect in training without eval_steps")

    @property
    def effective_learning_rate(self) -> float:
        """The learning rate; by default sigma / 2 (the paper's rule), and for other methods TRL's default."""
        rates = {"grpo": 1e-6, "dr_grpo": 1e-6, "rloo": 1e-6, "ppo": 3e-6, "sft_rejection": 2e-5}
        return rates.get(self.method, self.sigma / 2) if self.learning_rate is None else self.learning_rate

    @property
    def step_rate(self) -> float:
        """The learning rate of the first update, before any schedule; 0 for a method that makes no updates."""
        return self.effective_learning_rate if self.method in OF_METHODS["learning_rate"] else 0.0

    @property
    def has_falling_schedule(self) -> bool:
        """Whether the learning rate or sigma falls towards the end of the run."""
        return self.lr_scheduler_type in ("linear", "cosine") or self.sigma_scheduler_type != "constant"

    def trajectory(self) -> dict[str, Any]:
        """Return the fields that define the trajectory, for the journal's header."""
        unset = RESUMABLE.union(name for name in IN_HEADER_IF_SET if getattr(self, name) == default_of(name))
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unset}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return dataclasses.asdict(self)

    def to_json_string(self) -> str:
        """Return `to_json`, under the name that callbacks of transformers call."""
        return self.to_json()

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return the options with lists and dicts as text, as transformers' callbacks for trackers expect them."""
        plain = (bool, int, float, str, type(None))
        return {name: value if isinstance(value, plain) else str(value) for name, value in self.to_dict().items()}

    def to_json(self) -> str:
        """Return the whole configuration as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "configuration") -> Self:
        """Build a configuration from names and values; unknown names raise UserError with a hint for each."""
        return cls(**canonical(values, source))


class SizedConfig(ESConfig):
    """A configuration with numbers as batch sizes and with its step control chosen.

    It is immutable; its lists and dicts are shared with no other.

    `estune.train.setup.resolve_config` makes it from an `ESConfig` and the number of rows. The lists and dicts are
    plain ones, because `es_config.json` and the journal's header store them.
    """

    __slots__ = ("_is_frozen",)  # beside the fields' dict, which `vars` returns

    batch_size: int
    prompts_per_batch: int

    _numbers: ClassVar[tuple[str, ...]] = ("batch_size", "prompts_per_batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self._numbers:
            if not isinstance(getattr(self, name), int):
                raise UserError(f"{name} must be a number in a resolved configuration, not {getattr(self, name)!r}")
        if self.step_control == "auto":
            raise UserError("step_control must not be auto in a resolved configuration")
        object.__setattr__(self, "_is_frozen", True)

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_is_frozen", False):
            raise dataclasses.FrozenInstanceError(f"cannot assign to {name} of a resolved configuration")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete {name} of a resolved configuration")


class ResolvedConfig(SizedConfig):
    """The configuration of an open run: each ``auto`` that its method uses is replaced by a number.

    `estune.train.setup.resolve_with_engine` makes it once, when the engine is loaded. A field that the method does not
    use keeps its default, which the run's files store: ``members_per_batch`` of a method without members, and
    ``reward_workers`` with inline rewards, are ``auto``. Code reads `group_size` instead.
    """

    __slots__ = ()

    num_threads: int

    _numbers: ClassVar[tuple[str, ...]] = (*SizedConfig._numbers, "num_threads")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method in OF_METHODS["members_per_batch"] and self.members_per_batch == "auto":
            raise UserError("members_per_batch must be a number in a resolved configuration, not 'auto'")

    @property
    def group_size(self) -> int:
        """The number of members that share a forward pass, at most; 1 for a method without members."""
        return 1 if self.members_per_batch == "auto" else self.members_per_batch


FIELDS = {spec.name: spec for spec in dataclasses.fields(ESConfig)}
FIELD_TYPES = typing.get_type_hints(ESConfig)


def with_absent_options(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a journal's header with those that it lacks, because an older version wrote it."""
    return {name: default_of(name) for name in IN_HEADER_IF_SET} | OLDER_VALUES | dict(stored)


def default_of(name: str, method: str = "es") -> Any:
    """Return the default of a field for a method."""
    spec = FIELDS[name]
    if "by_method" in spec.metadata:
        return spec.metadata["by_method"].get(method)
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


def field_of(name: str) -> str | None:
    """Return the field of a name (`-` reads as `_`, aliases resolved), or None."""
    wanted = name.replace("-", "_")
    return next((spec.name for spec in FIELDS.values() if wanted in (spec.name, *spec.metadata["aliases"])), None)


def hint_of(name: str) -> str:
    """Return ``; HINT`` for an unknown option of a file or of Python, or an empty string."""
    known = [f"--{word}" for spec in FIELDS.values() for word in (spec.name, *spec.metadata["aliases"])]
    return in_python(option_hint(name, known))


def canonical(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return values by field name; raise UserError for unknown names, all together, or a field given twice."""
    fields = {str(name): field_of(str(name)) for name in values}
    if wrong := [name for name, field_name in fields.items() if field_name is None]:
        raise unknown_in(source, "option", {name: hint_of(name) for name in wrong})
    named: dict[str, Any] = {}
    for name, value in values.items():
        key = fields[str(name)]
        assert key is not None
        if key in named:
            raise UserError(f"{source} gives {key} twice, once as {name!r}")
        named[key] = value
    return named


def coerce(name: str, value: Any) -> Any:
    """Convert ``value`` to the type of field ``name``; raise UserError if it does not fit."""
    if isinstance(value, bool) and "true" in FIELDS[name].metadata["choices"]:  # YAML's `true` for the word
        value = "true" if value else "false"
    return convert(name, value, FIELD_TYPES[name])
