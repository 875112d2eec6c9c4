"""Types options and calls of TRL and transformers at estune, and prints what each answers.

    python scripts/answers.py [--write | --check]

`--write` puts the answers as a table into docs/trl.md, and `--check` compares the table there.

Options are typed on the command line and in `ESConfig`. Calls are made on a trainer of the embedded model after one
step. An answer is a value, a `UserError`, or an `AttributeError` whose message says what to use instead. The exit
status is 1 if anything else is raised, such as a bare TypeError, and if a call of `WORKING` returns no value. TRL and
transformers only provide arguments of calls.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from estune import ESConfig, ESTrainer, UserError, cli
from estune.baselines.trainer import BaselineTrainer
from estune.tasks import countdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "trl.md"
MARKS = ("<!-- answers -->\n", "<!-- end of answers -->\n")  # around the table in the page

# Options with values, as a user of TRL, transformers, PEFT, vLLM or verl types them.
OPTIONS = """
    output_dir=run learning_rate=1e-4 num_train_epochs=3 max_steps=5 per_device_train_batch_size=8
    per_device_eval_batch_size=8 gradient_accumulation_steps=4 gradient_checkpointing=true bf16=true fp16=true tf32=true
    torch_dtype=bfloat16 dtype=bfloat16 optim=adamw_torch adam_beta1=0.9 max_grad_norm=1.0 weight_decay=0.1
    warmup_ratio=0.1 warmup_steps=10 lr_scheduler_type=cosine eval_strategy=steps save_strategy=epoch
    logging_strategy=steps logging_steps=10 logging_dir=logs report_to=none run_name=first disable_tqdm=true
    remove_unused_columns=false dataloader_num_workers=4 seed=42 data_seed=42 resume_from_checkpoint=true
    load_best_model_at_end=false push_to_hub=false hub_token=x hub_strategy=end deepspeed=zero3.json fsdp=full_shard
    ddp_find_unused_parameters=false torch_compile=true use_cpu=true local_rank=0 beta=0.04 epsilon=0.2
    loss_type=dr_grpo num_iterations=2 scale_rewards=group num_generations=1 generation_batch_size=64
    max_prompt_length=512 max_completion_length=64 temperature=0 top_p=1 top_k=0 min_p=0.05 repetition_penalty=1.1
    use_vllm=true vllm_mode=colocate vllm_gpu_memory_utilization=0.3 mask_truncated_completions=true
    log_completions=true sync_ref_model=true model_name_or_path=tiny model_revision=main attn_implementation=sdpa
    use_peft=true lora_r=16 load_in_4bit=true dataset_name=rows.jsonl dataset_streaming=true max_new_tokens=64
    do_sample=true num_beams=4 num_return_sequences=4 eos_token_id=2 tensor_parallel_size=1 gpu_memory_utilization=0.9
    max_model_len=2048 data.train_files=a.parquet actor_rollout_ref.rollout.n=8 algorithm.kl_ctrl.kl_coef=0.001
    trainer.total_epochs=15 critic.optim.lr=1e-5 lr=1e-4 leraning_rate=1e-4
""".split()

# Calls that work as in TRL. `trainer` has trained one step, and `rows` are rows of its task.
WORKING = """
    trainer.train(resume_from_checkpoint=True).metrics
    trainer.args.learning_rate
    trainer.save_model('saved')
    trainer.save_model()
    trainer.evaluate()
    trainer.evaluate(eval_dataset=rows)
    trainer.push_to_hub
    trainer.state.log_history
    trainer.state.global_step
    trainer.model.generate
    trainer.processing_class
    trainer.is_world_process_zero()
    trainer.add_callback(transformers.TrainerCallback())
    trainer.pop_callback(transformers.TrainerCallback)
    trainer.remove_callback(transformers.TrainerCallback)
    ESTrainer(model='tiny', args=small, callbacks=[transformers.TrainerCallback()])
    ESTrainer('tiny', countdown.reward, small, rows, rows)
""".strip().splitlines()

# Other calls.
CALLS = """
    trainer.predict(rows)
    trainer.get_train_dataloader()
    trainer.get_eval_dataloader()
    trainer.train_dataset
    trainer.optimizer
    trainer.lr_scheduler
    trainer.create_optimizer()
    trainer.accelerator
    trainer.tokenizer
    trainer.data_collator
    trainer.log({'loss': 0.1})
    trainer.log_metrics('train', {})
    trainer.save_metrics('train', {})
    trainer.save_state()
    trainer.create_model_card()
    trainer.hyperparameter_search()
    trainer.compute_loss(None, None)
    trainer.ref_model
    trainer.num_generations
    trainer.trian()
    ESTrainer(model='tiny', args=trl.GRPOConfig(use_cpu=True, num_train_epochs=2, beta=0.1))
    ESTrainer(model='tiny', args=transformers.TrainingArguments(use_cpu=True, fp16=True))
    ESTrainer(model='tiny', args={'max_steps': 1, 'bf16': True})
    ESTrainer('tiny', ESConfig())
    ESTrainer(ESConfig())
    ESTrainer(model='tiny', peft_config={'r': 8})
    ESTrainer(model='tiny', optimizers=(None, None))
    ESTrainer(model='tiny', data_collator=list, compute_metrics=len, tokenizer=None)
    ESTrainer(model='tiny', reward_processing_classes=[])
    ESTrainer(model='tiny', rollout_func=len, environment_factory=dict, tools=[])
    ESTrainer(model='tiny', preprocess_logits_for_metrics=len, model_init=dict)
    ESTrainer(model='tiny', learning_rate=1e-4, num_train_epochs=3)
    ESTrainer(model='tiny', nonsense=1)
    BaselineTrainer('tiny', args=ESConfig(method='random_search', max_steps=1), peft_config=None)
    ESConfig(num_train_epochs=1, bf16=True, use_vllm=True)
""".strip().splitlines()


def optional(name: str) -> Any:
    """Return a module, or None if it is not installed."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


def answer(call: Callable[[], Any]) -> tuple[str, str]:
    """Return what a call answers, in one line, and its kind: ``value``, ``sentence``, or ``none`` for no answer."""
    try:
        value = call()
    except UserError as error:
        return str(error), "sentence"
    except AttributeError as error:
        return f"AttributeError: {error}", "sentence" if "; " in str(error) else "none"
    except Exception as error:  # a failure, which this program reports
        return f"{type(error).__name__}: {error}", "none"
    return " ".join(repr(value).split())[:60], "value"


def options_typed(words: str) -> dict[str, Callable[[], Any]]:
    """Return the calls that give an option ``name=value`` at each door, by their text; none starts a run."""
    name, _, value = words.partition("=")
    given: dict[str, Any] = {name: value}
    calls: dict[str, Callable[[], Any]] = {f"ESConfig({name}={value!r})": lambda: ESConfig(**given)}
    if f"--{name}" not in cli.shown_flags(cli.build_parsers()[1]["train"]):
        line = ["train", words] if "." in name else ["train", f"--{name}", value]
        calls[f"estune {' '.join(line)}"] = lambda: cli.parse_and_run(line, owns_process=False)
    return calls


def trained(args: ESConfig) -> ESTrainer:
    """Return a trainer that has trained the embedded model."""
    trainer = ESTrainer("tiny", countdown.reward, args, countdown.load("train")[:4], countdown.load("validation")[:4])
    trainer.train()
    return trainer


def asked(place: str) -> list[tuple[str, str, str, bool]]:
    """Return for each text that is typed: the text, the answer, its kind, and whether the answer helps a user.

    ``place`` is an empty directory, the present one.
    """
    small = ESConfig(
        output_dir=f"{place}/run", max_steps=1, population_size=2, batch_size=2, max_completion_length=8, num_threads=1,
        eval_steps=1, report_to=["none"], console="lines", reward_isolation="inline",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trained(small)
    names = dict(
        trainer=trainer, rows=trainer.train_rows, small=small, countdown=countdown, trl=optional("trl"),
        transformers=transformers, ESTrainer=ESTrainer, ESConfig=ESConfig,
        BaselineTrainer=BaselineTrainer,
    )  # fmt: skip
    calls = {text: call for words in OPTIONS for text, call in options_typed(words).items()}
    typed = [text.strip() for text in (*WORKING, *CALLS) if names["trl"] is not None or "trl." not in text]
    calls |= {text: partial(eval, text, names) for text in typed}
    works = {text.strip() for text in WORKING}
    found = []
    for text, call in calls.items():
        with contextlib.redirect_stdout(io.StringIO()):
            said, kind = answer(call)
        found.append((text, said, kind, kind != "none" and (kind == "value" or text not in works)))
    return found


def table(found: list[tuple[str, str, str, bool]]) -> str:
    """Return the answers as a table; of an option's two doors the command line is shown."""
    counts = f"{len(OPTIONS)} options and {len(WORKING) + len(CALLS)} calls"
    lines = [f"A program types {counts} of TRL and transformers at estune:", "", "| typed | answer |", "|---|---|"]
    texts = {text for text, *_ in found}
    for text, said, kind, _ in found:
        option = text.removeprefix("ESConfig(").removesuffix("')").replace("='", " ")
        if f"estune train --{option}" in texts or f"estune train {option.replace(' ', '=')}" in texts:
            continue
        shown = "works" if kind == "value" else said.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{text}` | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print all answers; return 1 if one of them does not help a user, or if the page's table is another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    logging.getLogger("estune").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        found = asked(place)
    for text, said, _, helps in found:
        print(f"{text}\n    {'' if helps else 'FAILS: '}{said}")
    failures = sum(not helps for *_, helps in found)
    print(f"{len(OPTIONS)} options, {len(WORKING) + len(CALLS)} calls, {failures} failures")
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    page = before + MARKS[0] + table(found) + MARKS[1] + rest.split(MARKS[1])[1]
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    is_other = options.check and PAGE.read_text(encoding="utf-8") != page
    if is_other:
        print("docs/trl.md has other answers: python scripts/answers.py --write")
    return int(failures > 0 or is_other)


if __name__ == "__main__":
    raise SystemExit(main())
