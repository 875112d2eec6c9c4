"""Suggestions for unknown words and names of tasks: typos find their word, foreign words find none."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter

import cloudpickle
import pytest

from estune import ESConfig, cli
from estune.errors import UserError, nearest
from estune.tasks import TASKS, get_task, mixture
from estune.tasks.other_names import OTHER_NAMES
from estune.train.setup import resolve_rewards, resolve_rows

COMMANDS = cli.build_parsers()[1]
TYPOS = {  # of the options of `estune train`
    "sigma": "sgima sigam sigm siggma SIGMA sigma-",
    "model": "modle modl mdoel odel",
    "temperature": "temprature temperture tempreature temperatur temper",
    "learning_rate": "learning_rat learnig_rate learningrate learn_rate lerning_rate larning_raet learningRate",
    "population_size": "population_sise populationsize pop_size population popualtion_size PopulationSize",
    "max_steps": "max_step maxsteps max_stpes mx_steps",
    "batch_size": "batchsize batch_sise batch bach_size bacth_size",
    "seed": "sed sead sede",
    "task": "tasks taks",
    "eval_steps": "eval_step evalsteps eval_stpes",
    "eval_rows": "eval_row",
    "load_best_model_at_end": "load_best_model load_best",
    "metric_for_best_model": "metric_for_best",
    "early_stopping_patience": "early_stopping_patiance",
    "save_steps": "save_step",
    "save_total_limit": "save_total save_total_limt",
    "output_dir": "output outputdir output_directory out_dir ouput_dir",
    "overwrite": "overwrit overwirte",
    "resume": "resum reusme",
    "report_to": "report_too report",
    "reward_funcs": "reward_func rewardfuncs reward_fucns",
    "reward_weights": "reward_weight",
    "rank": "ranks",
    "antithetic": "antithetc anti_thetic",
    "noise": "nois",
    "noise_distribution": "noise_dist noise_distributions",
    "fitness_shaping": "fitnes_shaping fitness",
    "num_generations": "num_gen num_generation numgenerations",
    "max_completion_length": "max_completion max_completion_len max_completion_lenght",
    "top_p": "topp top-pp",
    "top_k": "topk",
    "lr_scheduler_type": "lr_scheduler lr_schedular_type",
    "weight_decay": "weigth_decay weight_dacay",
    "trust_remote_code": "trust_remote trust-remote-cod",
    "dataset_name": "datset_name dataset_nmae",
    "max_time_s": "max_time",
    "model_name_or_path": "model_name",
}
# Options of TRL, transformers, verl and vLLM for which no option of any command stands.
FOREIGN = """
    fsdp_config adam_beta1 adam_beta2 adam_epsilon beta1 kl_coef init_kl_coef kl_loss_coef use_kl_loss kl_ctrl gamma lam
    tau eps delta epsilon_high gpu_memory_utilization pipeline_parallel_size max_model_len
    max_num_seqs enforce_eager swap_space kv_cache_dtype quantization max_grad_norm optim optim_args warmup_ratio
    logging_dir logging_strategy eval_strategy evaluation_strategy save_strategy save_safetensors save_only_model
    save_freq test_freq eval_delay eval_on_start per_device_eval_batch_size dataloader_num_workers
    num_processes remove_unused_columns group_by_length label_names hub_token hub_strategy push_to_hub_token ddp_backend
    local_rank tf32 fp8 use_cpu no_cuda gpus cpu cuda data_seed full_determinism torch_compile neftune_noise_alpha
    lora_r lora_alpha lora_dropout use_peft load_in_4bit load_in_8bit min_p top_n repetition_penalty length_penalty
    presence_penalty num_beams do_sample max_length max_seq_length stop_token_ids best_of logprobs prompt_logprobs
    vllm_mode vllm_server_host ppo_epochs num_ppo_epochs mini_batch_size micro_batch_size train_batch_size
    ppo_mini_batch_size val_batch_size rollout_n entropy_coef vf_coef cliprange whiten_rewards missing_eos_penalty
    ref_model sync_ref_model reward_model reward_model_path value_model sft_model_path disable_dropout num_mini_batches
    total_episodes total_epochs max_epochs response_length block_size group_size world_size packing nnodes critic_lr
    actor_lr project_name experiment_name logger tokenizer attn_implementation device_map prompts adv_estimator
    save eval trust x q v
""".split()


@pytest.mark.parametrize(("option", "typos"), TYPOS.items(), ids=str)
def test_a_typo_or_an_abbreviation_finds_its_option(option: str, typos: str) -> None:
    known = cli.shown_flags(COMMANDS["train"])
    found = {word: nearest(f"--{word}", known) for word in typos.split()}
    assert found == dict.fromkeys(typos.split(), f"; did you mean '--{option}'?")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_foreign_word_finds_nothing(command: str) -> None:
    known = cli.shown_flags(COMMANDS[command])
    found = {word: hint for word in FOREIGN if (hint := cli.hint_for(f"--{word}", known))}
    assert found == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hint_names_only_flags_of_the_command(command: str) -> None:
    """`ELSEWHERE` gives a hint only if the command has every flag that the hint names; `train` has them all."""
    known = cli.shown_flags(COMMANDS[command])
    for word in cli.ELSEWHERE:
        hint = cli.hint_for(f"--{word}", known)
        assert hint in ("", cli.ELSEWHERE[word]), (word, hint)
        assert hint == cli.ELSEWHERE[word] or command != "train", word


def test_hidden_flags_are_never_suggested() -> None:
    """Switches have a `--no_...` that help does not show."""
    hidden = {flag for parser in COMMANDS.values() for action in parser._actions for flag in action.option_strings
              if flag.startswith("--no_")}  # fmt: skip
    assert "--no_antithetic" in hidden
    for command, parser in COMMANDS.items():
        shown = cli.shown_flags(parser)
        assert not hidden & set(shown), command
        for word in ("n", "no", "no_", "no_antithetc", "no_resum", "no_log_completion", "no_allow_unsandboxed"):
            assert "--no_" not in cli.hint_for(f"--{word}", shown), (command, word)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--n", "4"], r"unknown option --n; completions per prompt are --num_generations$"),
        (["train", "--deepspeed", "x.json"], "unknown option --deepspeed; ES has no optimizer to shard: use"),
        (["fetch", "smollm2-135m", "--lr", "1"], "unknown option --lr$"),
        (["evaluate", "--max-new-tokens=9"], "unknown option --max-new-tokens; use --max_completion_length$"),
        (["report", "run", "--max_tokens", "9"], "unknown option --max_tokens$"),
        (["eval"], "unknown command 'eval'; did you mean 'evaluate'"),
        (["tran"], "unknown command 'tran'; did you mean 'train'"),
        (["serve"], "unknown command 'serve'; commands: "),
        (["re"], "unknown command 're'; commands: "),
    ],
)
def test_the_command_line_says_it(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        cli.parse_and_run(words, owns_process=False)


@pytest.mark.parametrize(
    ("word", "known", "told"),
    [
        ("gpu", ["auto", "cpu", "cuda", "mps"], ""),  # the first letter of a short word is no typo
        ("cude", ["auto", "cpu", "cuda", "mps"], "'cuda'"),
        ("gpro", ["es", "grpo", "rloo"], "'grpo'"),
        ("rpgo", ["es", "grpo", "rloo"], ""),
        ("top_x", ["top_p", "top_k"], ""),  # equally near to both
        ("re", ["report", "replay"], ""),
        ("repl", ["report", "replay"], ""),
        ("FLOAT32", ["float32", "float16"], "'float32'"),
        ("float8", ["float32", "float16"], ""),
        ("", ["a", "b"], ""),
        (7, ["8", "9"], ""),
    ],
)
def test_words_of_other_kinds(word: object, known: list[str], told: str) -> None:
    assert nearest(word, known) == (f"; did you mean {told}?" if told else "")


# --- names of tasks from elsewhere, and mixtures of tasks -------------------------------------------------------------

needs_reasoning_gym = pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="wants reasoning-gym")


def told(name: str) -> str:
    with pytest.raises(UserError, match="there is no task") as caught:
        get_task(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NAMES = {
    "gsm_symbolic": "gsm8k GSM8K gsm-8k openai/gsm8k GSM-Symbolic gsmsymbolic",
    "math": "MATH math500 MATH-500 HuggingFaceH4/MATH-500 hendrycks_math AIME24 olympiadbench",
    "arc_agi": "arc ARC arc-agi ARC-AGI ARC_AGI_1 arcagi",
    "arc_agi:python": "arc-agi:python ARC_AGI:python",
    "arc_agi:1500": "arc:1500",
    "arc_1d": "1d-arc ARC-1D arc1d",
    "mini_sudoku": "sudoku4 4x4_sudoku mini-sudoku MiniSudoku Mini_Sudoku sudoku-4x4",
    "sudoku": "SUDOKU sudoku9x9 9x9-sudoku",
    "countdown": "countdown-tasks Jiayi-Pan/Countdown-Tasks-3to4 Countdown TinyZero cuontdown",
    "chain:4": "Chain:4 CHAIN:4",
    "conciseness": "concise Conciseness concisenes",
    "quadratic": "quadratics Quadratic",
}


@pytest.mark.parametrize(("task", "names"), NAMES.items(), ids=str)
def test_a_name_from_elsewhere_names_our_task(task: str, names: str) -> None:
    for name in names.split():
        assert f"; did you mean '{task}'?" in told(name), name


@needs_reasoning_gym
@pytest.mark.parametrize(
    ("task", "names"),
    {
        "rg:leg_counting": "leg_counting LEG_COUNTING leg-counting leg_countin rg_leg_counting RG:leg_counting "
        "reasoning_gym/leg_counting reasoning-gym:leg_counting",
        "rg:gcd": "gcd GCD rg/gcd",
        "rg:chain_sum": "chain_sum chainsum",
        "rg:chain_sum:easy": "chain_sum:easy Chain-Sum:easy",
    }.items(),
    ids=str,
)
def test_a_generators_name_needs_its_prefix(task: str, names: str) -> None:
    for name in names.split():
        assert f"; did you mean '{task}'?" in told(name), name


def test_a_users_data_get_a_message() -> None:
    for name in ("gsm8k", "math500", "countdown=2,GSM8K=1"):
        assert "--dataset_name" in told(name), name
    assert "write rg:NAME" in told("reasoning_gym") and "write rg:NAME" in told("rg")


@pytest.mark.parametrize("name", "foo x mmlu gpqa hellaswag humaneval mbpp hotpotqa arc_challenge arc_easy".split())
def test_a_foreign_task_is_none_of_ours(name: str) -> None:
    assert "did you mean" not in told(name)


def test_without_reasoning_gym_its_names_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert "did you mean" not in told("leg_counting")


def test_the_table_names_tasks_there_are() -> None:
    for name, (task, _) in OTHER_NAMES.items():
        assert task in TASKS and name not in TASKS
        assert name == "".join(filter(str.isalnum, name.lower()))


def test_names_and_weights() -> None:
    assert mixture.parse("countdown=2, conciseness=0.5,rg:gcd") == [
        ("countdown", 2.0), ("conciseness", 0.5), ("rg:gcd", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["a=0", "a=-1,b=1", "a=x,b=1", "=1", "a=1,", "a=nan,b=1", "a=inf,b=1", "a,a"])
def test_what_is_no_mixture(text: str) -> None:
    with pytest.raises(UserError):
        mixture.parse(text)


def test_shares_of_rows() -> None:
    rows = [[{"n": i} for i in range(100)], [{"n": i} for i in range(10)]]
    trained = mixture.blend(rows, [1, 1], ["a", "b"], repeat=True)
    assert Counter(row["task"] for row in trained) == {"a": 55, "b": 55}
    assert Counter(row["task"] for row in trained[:10]) == {"a": 5, "b": 5}
    assert {row["n"] for row in trained if row["task"] == "b"} == set(range(10))
    held_out = mixture.blend(rows, [1, 1], ["a", "b"], repeat=False)
    assert Counter(row["task"] for row in held_out) == {"a": 10, "b": 10}
    assert len({(row["task"], row["n"]) for row in held_out}) == 20
    assert Counter(row["task"] for row in mixture.blend(rows, [30, 1], ["a", "b"], repeat=True)) == {"a": 106, "b": 4}


def test_every_completion_is_judged_by_its_own_task() -> None:
    task = get_task("countdown=1,conciseness=1")
    rows = task.load("validation")
    assert Counter(row["task"] for row in rows) == {"countdown": 8, "conciseness": 8}
    columns = {name: [row.get(name) for row in rows] for name in ("task", "numbers", "target", "answer", "answers")}
    said = ["<answer>1+1</answer>" if row["task"] == "countdown" else row["answer"] for row in rows]
    assert [value for value, row in zip(task.reward(completions=said, **columns), rows, strict=True)
            if row["task"] == "conciseness"] == [0.0] * 8  # fmt: skip
    right = task.accuracy(completions=said, **columns)
    assert [value for value, row in zip(right, rows, strict=True) if row["task"] == "countdown"] == [0.0] * 8
    again = cloudpickle.loads(cloudpickle.dumps(task.accuracy))  # as it travels to a worker
    assert again(completions=said, **columns) == right
    assert again.__name__ == "accuracy"


def test_what_does_not_mix() -> None:
    with pytest.raises(UserError, match="cannot be part of a mixture"):
        get_task("quadratic=1,countdown=1")
    with pytest.raises(UserError, match="did you mean 'countdown'"):
        get_task("countdwn=1,conciseness=1")


def test_a_split_that_a_task_lacks_is_refused_by_name() -> None:
    task = dataclasses.replace(get_task("countdown"), splits=("train",))
    with pytest.raises(UserError, match="task countdown has no split 'validation'; it has train"):
        resolve_rows(ESConfig(task="countdown"), None, task, "validation", resolve_rewards(ESConfig(), None, task))
