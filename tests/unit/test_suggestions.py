"""Unknown words: typos find their word, names of TRL and other programs their answer, and others no suggestion."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from collections import Counter
from typing import Any

import cloudpickle
import pytest

from estune import ESConfig, ESTrainer, cli
from estune.baselines.arguments import PPO_FREE, config_class, is_decided
from estune.baselines.trainer import BaselineTrainer
from estune.config import field_of
from estune.config.hints import (
    ARGUMENT_ANSWERS,
    ATTRIBUTE_ANSWERS,
    OF_A_RUN,
    OPTION_ANSWERS,
    flags_in,
    option_hint,
)
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
# Options of TRL, transformers, verl and vLLM that are near to no option of any command.
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
def test_a_foreign_word_is_no_typo(command: str) -> None:
    known = cli.shown_flags(COMMANDS[command])
    assert {word: hint for word in FOREIGN if (hint := nearest(f"--{word}", known))} == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_answer_names_only_flags_of_the_command(command: str) -> None:
    """A clause with another flag is left out; commands without options of a run give no reasons; `train` has all."""
    known = cli.shown_flags(COMMANDS[command])
    others = {flag for parser in COMMANDS.values() for flag in cli.shown_flags(parser)}
    for name, answer in OPTION_ANSWERS.items():
        hint = option_hint(f"--{name.replace('*', 'x')}", known)
        clauses = hint.split("; ")[1:]
        assert set(flags_in(hint)) <= set(known) and set(flags_in(answer)) <= others, (name, hint)
        assert all(clause in answer.split("; ") for clause in clauses), (name, hint)
        assert OF_A_RUN in known or all(map(flags_in, clauses)), (name, hint)
        assert clauses or command != "train", name
        assert f"--{name}" not in known and "\n" not in answer, name


# --- names of TRL, transformers, vLLM, PEFT and verl ------------------------------------------------------------------


def names_of(*classes: Any) -> set[str]:
    return {spec.name for each in classes for spec in dataclasses.fields(each)}


def test_every_option_of_trl_and_transformers_is_an_option_or_has_an_answer() -> None:
    trl = pytest.importorskip("trl", reason="an optional neighbour")
    import transformers

    names = names_of(
        trl.GRPOConfig, trl.RLOOConfig, trl.ModelConfig, trl.ScriptArguments, transformers.TrainingArguments
    )
    names |= {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    known = cli.shown_flags(COMMANDS["train"])
    hints = {name: option_hint(name, known) for name in names if field_of(name) is None}
    assert len(hints) > 200 and len(OPTION_ANSWERS) > len(hints)
    # An answer is from the table, and not the nearest option, which would stand in quotes.
    assert [name for name, hint in hints.items() if not hint or "did you mean '" in hint] == []


def test_an_argument_goes_where_its_answer_says() -> None:
    """Every argument that an answer sends to --method_kwargs is taken by each method that the answer names."""
    pytest.importorskip("trl", reason="an optional neighbour")
    taken = {
        method: {name for name in names_of(config_class(method)) if not is_decided(name)}
        for method in ("grpo", "rloo", "sft_rejection")
    } | {"ppo": PPO_FREE}
    checked, wrong = 0, []
    for name, answer in OPTION_ANSWERS.items():
        for clause in answer.split("; "):
            if "--method_kwargs" not in clause or "goes into" in clause or "*" in name or "." in name:
                continue
            argument = re.search(r"give (\w+)(?: or \w+)? in --method_kwargs", clause)
            wanted = name if argument is None or argument[1] == "it" else argument[1]
            methods = re.findall(r"\b(grpo|rloo|ppo)\b", clause.split("give")[0])
            checked += 1
            fits = [wanted in taken[method] for method in methods or taken]
            if not (all(fits) if methods else any(fits)):
                wrong.append((name, clause))
    assert checked > 40 and wrong == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.train_files=a.parquet"], r"option data.train_files; use --dataset_name: .*"),
        (["actor_rollout_ref.rollout.n=8", "+critic.model.path=x", "--lr", "3"],
         r"options actor_rollout_ref.rollout.n \(use --num_generations\), critic.model.path \(es has no critic; .*\), "
         r"--lr \(did you mean --learning_rate\?\)"),
        (["--adam_beta1=0.9", "--use_peft", "--adam-beta2", "0.99"],
         r"options --adam_beta1 and --adam-beta2 \(es has no optimizer; .*\), --use_peft \(there are no adapters.*\)"),
        (["--data.shuffle", "false"], r"option --data.shuffle; rows are always shuffled, by --seed"),
        (["--hub_model_i", "x"], r"option --hub_model_i; did you mean '--hub_model_id'\?"),
        (["--vllm_new_option", "x"], r"option --vllm_new_option; estune starts vLLM itself, .*"),
        (["--qqqqqqqq", "a.b=1"], r"option --qqqqqqqq"),
    ],
)  # fmt: skip
def test_all_unknown_options_have_their_answers(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=f"^unknown {says}$"):
        cli.parse_and_run(["train", *words], owns_process=False)


def test_a_setting_of_an_option_is_written_as_an_option() -> None:
    with pytest.raises(UserError, match=r"unexpected word '\+max_steps=5': write --max_steps=5$"):
        cli.parse_and_run(["train", "+max_steps=5"], owns_process=False)


@pytest.mark.parametrize("trainer", [ESTrainer, BaselineTrainer])
def test_every_argument_and_attribute_of_their_trainers_has_an_answer(trainer: Any) -> None:
    trl = pytest.importorskip("trl", reason="an optional neighbour")
    import transformers

    theirs = (transformers.Trainer, trl.GRPOTrainer, trl.RLOOTrainer, trl.SFTTrainer)
    given = {name for each in theirs for name in inspect.signature(each).parameters}
    ours = set(inspect.signature(ESTrainer).parameters) | {"callbacks"}
    for name in given - ours:
        with pytest.raises(UserError, match=f"^{trainer.__name__} has an unknown argument '{name}'; ") as caught:
            trainer("tiny", **{name: None})
        assert ARGUMENT_ANSWERS[name] in str(caught.value)
    # What `Trainer` has under the same name belongs to no answer.
    same = set("evaluate push_to_hub add_callback is_world_process_zero".split()) | set(dir(ESTrainer))
    public = {name for each in theirs for name in dir(each) if not name.startswith("_")} - same
    assert public <= ATTRIBUTE_ANSWERS.keys() and not {"model", "state", "callbacks"} & ATTRIBUTE_ANSWERS.keys()


def test_unknown_arguments_of_a_trainer() -> None:
    with pytest.raises(UserError) as caught:
        ESTrainer("tiny", tokenizer=1, seed=1, lr=1, dataset_streaming=True, reward_fun=1, qqqqqqqq=1)
    assert str(caught.value) == (
        "ESTrainer has unknown arguments 'tokenizer' (use processing_class), "
        "'seed' (give it as args=ESConfig(seed=...)), "
        "'lr' (options belong in args=ESConfig(...): did you mean learning_rate?), "
        "'dataset_streaming' (a run shuffles all rows, so a stream is read to its end), "
        "'reward_fun' (did you mean 'reward_funcs'?), 'qqqqqqqq'"
    )
    with pytest.raises(UserError, match="model must be a name, a directory or a model in memory, not ESConfig; give"):
        ESTrainer(ESConfig())


def test_a_missing_attribute_of_a_trainer_is_an_attribute_error_with_an_answer() -> None:
    class Broken(ESTrainer):
        @property
        def broken(self) -> None:
            raise AttributeError("a reason of its own")

    trainer = Broken("tiny", args=ESConfig(task="countdown"))
    says = {"train_dataset": "; train_rows holds the rows", "learning_rate": "; use args.learning_rate",
            "trian": "; did you mean 'train'?", "qqqqqqqq": "", "_request": ""}  # fmt: skip
    for name, answer in says.items():
        with pytest.raises(AttributeError) as caught:
            getattr(trainer, name)
        assert str(caught.value) == f"'Broken' object has no attribute {name!r}{answer}"
    assert not hasattr(trainer, "optimizer") and hasattr(trainer, "train_rows")
    with pytest.raises(AttributeError, match="a reason of its own"):
        trainer.broken  # noqa: B018


def test_arguments_of_another_program_are_translated() -> None:
    trl = pytest.importorskip("trl", reason="an optional neighbour")
    import transformers

    def answer(args: Any) -> str:
        with pytest.raises(UserError) as caught:
            ESTrainer("tiny", args=args)
        return str(caught.value).removeprefix("args must be an ESConfig, not ")

    grpo = trl.GRPOConfig(use_cpu=True, learning_rate=1e-4, max_steps=3, num_train_epochs=2, beta=0.1)
    assert answer(grpo) == (
        "GRPOConfig; of its changed fields ESConfig has max_steps, learning_rate, but not num_train_epochs (use "
        "max_steps, counted in steps of batch_size prompts), use_cpu (use device cpu), beta (es has no KL term, see "
        "weight_decay with weight_decay_anchor base; for other methods method_kwargs)"
    )
    unchanged = answer(transformers.TrainingArguments(use_cpu=True))
    assert unchanged == "TrainingArguments; of its changed fields ESConfig does not have use_cpu (use device cpu)"
    assert answer({"max_steps": 1}) == "dict: write ESConfig(max_steps=...), where most options have the same names"
    assert answer({"bf16": 1}) == "dict; of its changed fields ESConfig does not have bf16 (use dtype bfloat16)"
    assert answer(7) == "int: write ESConfig(...), where most options have the same names"


def test_hidden_flags_are_never_suggested() -> None:
    """Switches have a `--no_...` that help does not show."""
    hidden = {flag for parser in COMMANDS.values() for action in parser._actions for flag in action.option_strings
              if flag.startswith("--no_")}  # fmt: skip
    assert "--no_antithetic" in hidden
    for command, parser in COMMANDS.items():
        shown = cli.shown_flags(parser)
        assert not hidden & set(shown), command
        for word in ("n", "no", "no_", "no_antithetc", "no_resum", "no_log_completion", "no_allow_unsandboxed"):
            assert "--no_" not in option_hint(f"--{word}", shown), (command, word)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--n", "4"], r"unknown option --n; completions per prompt are --num_generations$"),
        (["train", "--deepspeed", "x.json"], "unknown option --deepspeed; ES has no optimizer to shard: use"),
        (["evaluate", "--use_peft"], "unknown option --use_peft; there are no adapters: all parameters are trained$"),
        (["report", "run", "--max_prompt_length", "9"], "unknown option --max_prompt_length$"),
        (["fetch", "smollm2-135m", "--lr", "1"], "unknown option --lr$"),
        (["evaluate", "--max-new-tokens=9"], "unknown option --max-new-tokens; use --max_completion_length$"),
        (["report", "run", "--max_tokens", "9"], "unknown option --max_tokens$"),
        (["eval"], "unknown command 'eval'; did you mean 'evaluate'"),
        (["tran"], "unknown command 'tran'; did you mean 'train'"),
        (["serve"], "unknown command 'serve'; a run is a directory that transformers and vLLM load"),
        (["grpo"], "unknown command 'grpo'; use estune train: with es, or with --method grpo"),
        (["dance"], "unknown command 'dance'; commands: "),
        (["train", "run.yaml"], "unexpected word 'run.yaml': give the file as --config run.yaml"),
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
