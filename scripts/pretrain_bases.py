"""Pretrains the bases on which methods are compared: python scripts/pretrain_bases.py llama qwen2 gpt2 sudoku

A comparison is fair only if no method's results influenced the models. All choices in this script were fixed before it
trained the first base. The hashes of the bases (`benchmarks/bases/SHA256SUMS`) were committed before any method ran on
them. One choice was made with knowledge of a result of ES on another model; see below. The tokenizer.json of qwen2 was
written a second time (docs/log.md).

`llama`, `qwen2` and `gpt2` are Countdown models of three architectures. Their text has the same distribution
(tiny_text.py), with another seed each. In the last fifth of the text 30 % of the completions think first and 70 %
answer at once, for every problem alike. So greedy decoding answers at once, and about 30 % of the samples think.
`tiny`, the demo's model, is not used in comparisons. Its text was shaped for evolution strategies: the preference for
thinking depends on the problem, so that a small change of the weights changes some answers. The text of the bases lacks
this dependence. It was known that ES on `tiny` then finds a flat greedy fitness; the choice favours no other method.

`sudoku` learns mini-Sudoku. Its puzzles are made from the grids of the training split and are in no split. Training
stops at the first evaluation with 3 % of 200 validation puzzles solved: the model knows the format and has little of
the skill.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretrain_tiny import (
    PREFERENCE_LEARNING,
    batches,
    build_tokenizer,
    greedy,
    measure,
    number_features,
    save,
    weighted_loss,
)
from tiny_text import held_out_problems
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from estune.tasks import countdown, sudoku

OUTPUT = Path(__file__).parents[1] / "benchmarks" / "bases"
SEEDS = {"llama": 101, "qwen2": 102, "gpt2": 103, "sudoku": 104}
STEPS, BATCH_SIZE, LEARNING_RATE = 4500, 64, 2.5e-3
SETTLING = 0.2  # last share of the steps, whose text mostly answers at once
SHARE_THINKING = 0.3  # of the completions in that last part
# accuracy at which training stops; steps between evaluations; largest number of steps
SUDOKU_TARGET, SUDOKU_EVAL_STEPS, SUDOKU_MAX_STEPS = 0.03, 5, 4000
SUDOKU_TOKENS = 40  # of a completion, at most
WIDTH, LAYERS, CONTEXT = 128, 4, 512  # hidden size, layers, tokens

Batch = tuple[torch.Tensor, torch.Tensor]


def build_model(shape: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Return an untrained model of one of the three architectures, with 0.8 to 1.1 million parameters."""
    torch.manual_seed(seed)
    common: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    rotary: dict[str, Any] = dict(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=CONTEXT
    )
    make: Any
    config: Any
    if shape == "qwen2":  # biases on queries, keys and values; two key heads for four query heads
        make, config = Qwen2ForCausalLM, Qwen2Config(**common, **rotary, intermediate_size=320, num_key_value_heads=2)
    elif shape == "gpt2":  # learned positions, LayerNorm, GELU; no dropout
        size: dict[str, Any] = dict(n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=CONTEXT, n_inner=384)
        make, config = GPT2LMHeadModel, GPT2Config(**common, **size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    else:
        make, config = LlamaForCausalLM, LlamaConfig(**common, **rotary, intermediate_size=256, num_key_value_heads=4)
    model: PreTrainedModel = make(config)
    with torch.no_grad():
        embedding: Any = model.get_input_embeddings().weight
        for index, feature in number_features(tokenizer, WIDTH).items():
            embedding[index] += 0.05 * feature
    return model


def spelled_out(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the same ids that needs no pre-tokenizer: all texts longer than a byte are added tokens.

    transformers uses Qwen2's pre-tokenizer for every model of type qwen2, whatever the model's files say. That
    pre-tokenizer would split every number into digits.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary: dict[str, int] = settings["model"]["vocab"]
    added = {entry["id"]: entry["content"] for entry in settings["added_tokens"]}
    special = [entry["content"] for entry in settings["added_tokens"] if entry["special"]]
    bytes_ = {text: index for text, index in vocabulary.items() if len(text) == 1 or text in special}
    rest = {index: text.replace("Ġ", " ") for text, index in vocabulary.items() if text not in bytes_}
    rest |= {index: text for index, text in added.items() if text not in special}
    plain = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(special)
    plain.add_tokens([AddedToken(rest[index], normalized=False) for index in sorted(rest)])
    assert all(plain.token_to_id(text) == index for index, text in rest.items())
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=plain,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


class Log:
    """Writes lines of JSON, each with the base's name, to the terminal and to the end of pretrain_logs.jsonl.

    The file is beside the base's ``directory``; it holds the lines of all bases.
    """

    def __init__(self, directory: Path) -> None:
        self._base = directory.name
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory.parent / "pretrain_logs.jsonl").open("a", encoding="utf-8")

    def __call__(self, **entry: Any) -> None:
        line = json.dumps({"base": self._base, **entry})
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


def fit(
    model: PreTrainedModel, source: Callable[[int], Batch], steps: int, log: Log, is_done: Callable[[int], bool]
) -> None:
    """Minimise the loss with AdamW, 200 steps of warm-up and a cosine schedule; stop early if ``is_done(step)``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        rate = LEARNING_RATE * min(1.0, step / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = weighted_loss(model, *source(step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            log(step=step, loss=round(sum(losses) / len(losses), 4), seconds=round(time.perf_counter() - start))
            losses = []
        if is_done(step):
            return


def countdown_base(shape: str, directory: Path, steps: int) -> None:
    """Train one Countdown model, save it, and measure it on validation and test problems."""
    log, tokenizer = Log(directory), build_tokenizer()
    model = build_model(shape, tokenizer, SEEDS[shape])
    log(parameters=model.num_parameters(), seed=SEEDS[shape], steps=steps, torch=torch.__version__)
    held_out = held_out_problems()
    learning = batches(tokenizer, SEEDS[shape], BATCH_SIZE, held_out, PREFERENCE_LEARNING, 32, 0.0)
    preference = math.log(SHARE_THINKING / (1 - SHARE_THINKING))
    settling = batches(tokenizer, SEEDS[shape] + 1000, BATCH_SIZE, held_out, preference, 1, 0.0)
    settling_step = steps - int(SETTLING * steps)
    fit(model, lambda step: next(learning if step < settling_step else settling), steps, log, lambda step: False)
    save(model, spelled_out(tokenizer) if shape == "qwen2" else tokenizer, directory)
    for split in ("validation", "test"):
        log(split=split, **measure(model, tokenizer, countdown.load(split)))


def sudoku_base(directory: Path, steps: int) -> None:
    """Train the mini-Sudoku model until it solves `SUDOKU_TARGET` of the validation puzzles, and save it."""
    rows = {split: sudoku.load_mini(split) for split in sudoku.MINI_SIZES}
    before, after = _sudoku_phrases()
    log, tokenizer = Log(directory), build_tokenizer([before, after])
    model = build_model("llama", tokenizer, SEEDS["sudoku"])
    log(parameters=model.num_parameters(), seed=SEEDS["sudoku"], torch=torch.__version__)
    source = sudoku_batches(tokenizer, rows)

    def solved_enough(step: int) -> bool:
        if step % SUDOKU_EVAL_STEPS:
            return False
        accuracy = solved(model, tokenizer, rows["validation"])
        log(step=step, split="validation", greedy=accuracy)
        return accuracy >= SUDOKU_TARGET

    fit(model, lambda step: next(source), steps, log, solved_enough)
    save(model, tokenizer, directory)
    log(split="test", n=len(rows["test"]), greedy=solved(model, tokenizer, rows["test"]))


def _sudoku_phrases() -> tuple[str, str]:
    before, _, after = sudoku.format_prompt([0] * 16).partition("_ _ _ _\n" * 4)
    assert before.endswith(".\n") and after
    return before, after


def sudoku_batches(tokenizer: PreTrainedTokenizerFast, rows: dict[str, list[dict[str, Any]]]) -> Iterator[Batch]:
    """Yield (token ids, weights in the loss), both (BATCH_SIZE, T), of puzzles in no split.

    All examples have one length, so there is no padding.
    """
    generator = random.Random(SEEDS["sudoku"])
    taken = {tuple(row["puzzle"]) for split in rows.values() for row in split}
    grids = sorted({tuple(row["solution"]) for row in rows["train"]})
    while True:
        ids: list[list[int]] = []
        weights: list[list[float]] = []
        while len(ids) < BATCH_SIZE:
            solution = grids[int(generator.random() * len(grids))]
            puzzle = sudoku.mini_puzzle(generator, solution)
            if puzzle in taken:
                continue
            lines = "\n".join(" ".join(map(str, solution[r : r + 4])) for r in range(0, 16, 4))
            prompt = tokenizer.encode(sudoku.format_prompt(puzzle), add_special_tokens=False)
            answer = tokenizer.encode(f"<answer>\n{lines}\n</answer>", add_special_tokens=False)
            ids.append([*prompt, *answer, tokenizer.eos_token_id])
            weights.append([0.0] * len(prompt) + [1.0] * (len(answer) + 1))
        yield torch.tensor(ids), torch.from_numpy(np.array(weights, dtype=np.float32))


@torch.no_grad()
def solved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> float:
    """Return the share of puzzles that the model solves with greedy decoding."""
    model.eval()  # type: ignore[no-untyped-call]
    texts = greedy(model, tokenizer, rows, "", SUDOKU_TOKENS)
    model.train()
    columns = {name: [row[name] for row in rows] for name in ("puzzle", "solution")}
    return sum(sudoku.accuracy(texts, **columns)) / len(rows)


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the bases in a directory, by relative path."""
    files = sorted(path for path in directory.glob("*/*") if path.suffix in (".safetensors", ".json"))
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """Train the named bases, none of which may exist, and write the hashes of all bases."""
    parser = argparse.ArgumentParser(description="Pretrain the bases on which methods are compared.")
    parser.add_argument("bases", nargs="+", choices=tuple(SEEDS))
    parser.add_argument("--output_dir", type=Path, default=OUTPUT)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="training steps; fewer than the default only to try the script"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for base in options.bases:
        directory = options.output_dir / base
        if (directory / "model.safetensors").exists():
            raise SystemExit(f"{directory} exists; a base is never trained again")
        if base == "sudoku":
            sudoku_base(directory, min(options.steps, SUDOKU_MAX_STEPS))
        else:
            countdown_base(base, directory, options.steps)
    lines = [f"{digest}  {name}" for name, digest in digests(options.output_dir).items()]
    (options.output_dir / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
