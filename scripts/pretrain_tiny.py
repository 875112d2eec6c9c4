"""Pretrain `tiny`, the language model that comes with estune: python scripts/pretrain_tiny.py

A Llama of under a million parameters reads synthetic text about Countdown problems: each is the task's own prompt and a
completion in one of two manners. Most answer at once and are often wrong; a minority works backwards from the target, one
trial after the other, until two numbers are left that make what remains, and is right:

    <answer>14+12+6</answer>
    <think>28-6=22; 28+12=40; 28/14=2, 12/6=2</think>
    <answer>12/6*14</answer>

So the model prefers to answer at once and is mostly wrong, and has a skill that it seldom uses. No problem of any split of
the task, up to the order of its numbers, is in the text (asserted). Simplifications made on purpose: the loss counts
completion tokens only, and not the choice of a step in a trial that fails; the embeddings of numbers start from features
of their values, which saves most of the time to learn the tables.

Everything follows from one seed. Writes the checkpoint, `pretrain_log.jsonl` and the model card to src/estune/models/tiny.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from estune.tasks import countdown

PAD, EOS = "<|pad|>", "<|end|>"
LARGEST_VALUE = 199  # of a number that is one token, and of a value that the text writes down
LARGEST_AFTER_MARK = {"+": 99, "-": 99, "*": 99, "/": 99, "=": LARGEST_VALUE, ",Ġ": LARGEST_VALUE, ";Ġ": 99}  # Ġ: a space
NO_LOSS = -100
MAX_FAILED_TRIALS = {3: 5, 4: 5}
SHARE_RIGHT_DIRECT = 0.5
SHARE_THINKING_FIRST = 0.85  # while the skill is learned; after that, the last part of the text prefers to answer at once


# --- tokenizer --------------------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer for any text.

    A number up to 199 is one token, also together with the mark before it, and so is each fixed phrase of the task's
    prompt and tags: so prompts and completions are short.
    """
    vocabulary = {PAD: 0, EOS: 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for number in range(10, LARGEST_VALUE + 1):
        text = str(number)
        vocabulary[text] = len(vocabulary)
        merges.append((text[:-1], text[-1]))
        if number >= 100 and text[1] != "0":
            merges.append((text[0], text[1:]))  # in "110", "10" merges before "11"
    for mark, largest in LARGEST_AFTER_MARK.items():
        if len(mark) == 2:
            vocabulary[mark] = len(vocabulary)
            merges.append((mark[0], mark[1]))
        for number in range(largest + 1):
            vocabulary[f"{mark}{number}"] = len(vocabulary)
            merges.append((mark, str(number)))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(?:[-+*/=]|[,;] )?[0-9]{1,3}|[^0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS])
    phrases = _prompt_phrases() + ["<think>", "</think>\n<answer>", "</think>", "<answer>", "</answer>"]
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def _prompt_phrases() -> list[str]:
    """Return the parts of the task's prompt around its numbers and its target."""
    before, rest = countdown.format_prompt([1], 2).split("1", 1)
    between, after = rest.split("2", 1)
    return [before, between, after]


def number_features(tokenizer: PreTrainedTokenizerFast, width: int) -> dict[int, torch.Tensor]:
    """Return a unit-variance feature vector for each token that holds a number: waves of its value and of its logarithm."""
    features = {}
    periods = [2, 3, 4, 5, 7, 10, 11, 13, 20, 40, 100, 200, 400]
    for token, index in tokenizer.get_vocab().items():
        digits = token.lstrip("+-*/=,;Ġ")
        if not (digits.isascii() and digits.isdigit()) or int(digits) > LARGEST_VALUE:
            continue
        value = int(digits)
        angles = [2 * math.pi * value / period for period in periods]
        angles += [math.log(value + 1) * speed for speed in (0.5, 1, 2, 4, 8, 16)]
        vector = torch.tensor([wave(angle) for angle in angles for wave in (math.cos, math.sin)])
        features[index] = torch.nn.functional.pad(vector * math.sqrt(2), (0, width - len(vector)))
    return features


# --- text -------------------------------------------------------------------------------------------------------------

# How a step of a solution is undone. value = rest `op` number; `r` and `R` are number - rest and number / rest.
UNDONE_BY = {"+": "-", "-": "+", "r": "-", "*": "/", "/": "*", "R": "/"}
Peel = tuple[str, int, int]  # operation, number, and the value that remains to be made
Pieces = list[tuple[str, bool]]  # text, and whether the model shall learn to write it


def undo(value: int, number: int, operation: str) -> int:
    """Return the rest that `operation` with `number` turns into the value; 0 where it is no whole number above 0."""
    if operation == "+":
        return max(0, value - number)
    if operation == "-":
        return value + number
    if operation == "r":
        return max(0, number - value)
    if operation == "*":
        return value // number if value % number == 0 else 0
    if operation == "/":
        return value * number
    return number // value if number % value == 0 else 0


def attach(text: str, level: int, operation: str, number: int) -> tuple[str, int]:
    """Write an expression combined with a number; `level` is how tightly it binds (1 sum, 2 product)."""
    new_level = 1 if operation in "+-r" else 2
    needed = new_level + (operation in "rR")  # what stands on the right of - or / must bind tighter
    inner = f"({text})" if level < needed else text
    mark = {"r": "-", "R": "/"}.get(operation, operation)
    return (f"{number}{mark}{inner}" if operation in "rR" else f"{inner}{mark}{number}"), new_level


def pair_operation(big: int, small: int, value: int) -> str | None:
    """Return the operation by which two numbers, big >= small, make a value; None where there is none."""
    if big + small == value:
        return "+"
    if big - small == value:
        return "-"
    if big * small == value:
        return "*"
    return "/" if small * value == big else None


def draw_peels(generator: random.Random, numbers: list[int], target: int) -> tuple[list[Peel], int, int]:
    """Draw steps back from the target, all equally likely, until two numbers are left; those come larger one first."""
    while True:
        rest, value, peels = list(numbers), target, []
        while len(rest) > 2:
            options = []
            for number in rest:
                for operation in UNDONE_BY:
                    remaining = undo(value, number, operation)
                    if 1 <= remaining <= LARGEST_VALUE:
                        options.append((operation, number, remaining))
            if not options:
                break
            peel = options[int(generator.random() * len(options))]
            peels.append(peel)
            rest.remove(peel[1])
            value = peel[2]
        else:
            return peels, max(rest), min(rest)


def trial_pieces(target: int, peels: list[Peel], first: bool, solved: bool) -> Pieces:
    """Write a trial. What a failed one tries is not to be learned, what it finds is."""
    pieces: Pieces = []
    value = target
    for depth, (operation, number, remaining) in enumerate(peels):
        left, right = (number, value) if operation in "rR" else (value, number)
        opening = ", " if depth else "" if first else "; "
        # Whether a trial goes on is learned from the mark, which is one token with the number.
        pieces.append((f"{opening}{left}", solved or (not first and depth == 0 and left == value)))
        pieces.append((f"{UNDONE_BY[operation]}{right}", solved))
        pieces.append((f"={remaining}", True))
        value = remaining
    return pieces


def solution_text(peels: list[Peel], big: int, small: int, operation: str) -> str:
    """Write the expression that the steps back lead to."""
    text, level = f"{big}{operation}{small}", 1 if operation in "+-" else 2
    for peeled, number, _ in reversed(peels):
        text, level = attach(text, level, peeled, number)
    return text


def think_pieces(generator: random.Random, numbers: list[int], target: int, solution: str, steps: Any) -> Pieces:
    """Write a completion that tries, fails some times, succeeds and answers. `steps` = (peels, big, small, operation)."""
    peels, big, small, operation = steps
    pieces: Pieces = [("<think>", True)]
    failed: set[tuple[Peel, ...]] = set()
    wanted = min(int(-math.log(1 - generator.random()) * 1.8), MAX_FAILED_TRIALS[len(numbers)])
    for _ in range(2 * wanted):
        if len(failed) == wanted:
            break
        tried, left, right = draw_peels(generator, numbers, target)
        if tuple(tried) not in failed and pair_operation(left, right, tried[-1][2]) is None:
            pieces += trial_pieces(target, tried, first=not failed, solved=False)
            failed.add(tuple(tried))
    pieces += trial_pieces(target, peels, first=not failed, solved=True)
    pieces.append((f", {big}", True))
    pieces.append((f"{operation}{small}", True))
    pieces.append((f"={peels[-1][2]}</think>\n<answer>{solution}</answer>", True))
    return pieces


def direct_pieces(generator: random.Random, numbers: list[int], target: int, solution: str) -> Pieces:
    """Write a completion that answers at once: the solution, or often an expression that misses the target."""
    if generator.random() >= SHARE_RIGHT_DIRECT:
        order = [number for _, number in sorted((generator.random(), number) for number in numbers)]
        big, small = max(order[:2]), min(order[:2])
        operation = "+-*"[int(generator.random() * 3)]
        solution, level = f"{big}{operation}{small}", 1 if operation in "+-" else 2
        for number in order[2:]:
            solution, level = attach(solution, level, "+-*"[int(generator.random() * 3)], number)
    return [(f"<answer>{solution}</answer>", True)]


def share_thinking(numbers: list[int], target: int) -> float:
    """Return how often the text about a problem thinks first: a quarter to 45 %, more for large targets."""
    return 0.25 + 0.2 * (target - countdown.SMALLEST_TARGET) / (
        countdown.LARGEST_TARGET - countdown.SMALLEST_TARGET
    )


def draw_solved_problem(generator: random.Random, held_out: set[Any]) -> tuple[list[int], int, Any]:
    """Draw a problem outside the held-out ones, and a solution as (peels, big, small, operation)."""
    while True:
        start, steps, target = countdown.draw_chain(generator, 3 + int(generator.random() * 2))
        numbers = [start, *(number for _, number in steps)]
        if countdown.problem_key(numbers, target) in held_out:
            continue
        value, peels = target, []
        for operation, number in reversed(steps[1:]):
            remaining = undo(value, number, operation)
            peels.append((operation, number, remaining))
            value = remaining
        big, small = max(start, steps[0][1]), min(start, steps[0][1])
        operation = pair_operation(big, small, value)
        assert operation is not None
        shuffled = [number for _, number in sorted((generator.random(), number) for number in numbers)]
        return shuffled, target, (peels, big, small, operation)


def draw_example(
    generator: random.Random, held_out: set[Any], share: float | None = None
) -> tuple[list[int], int, Pieces]:
    """Draw a problem and a completion for it, which thinks with probability `share` (None: the problem's own share)."""
    numbers, target, steps = draw_solved_problem(generator, held_out)
    solution = solution_text(*steps)
    if generator.random() < (share_thinking(numbers, target) if share is None else share):
        return numbers, target, think_pieces(generator, numbers, target, solution, steps)
    return numbers, target, direct_pieces(generator, numbers, target, solution)


def held_out_problems() -> set[Any]:
    """Return every problem of every split of the task, up to the order of its numbers."""
    rows = [row for split in countdown.SPLIT_SIZES for row in countdown.load(split)]
    return {countdown.problem_key(row["numbers"], row["target"]) for row in rows}


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int, held_out: set[Any], share: float | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield endless (token ids, labels), both (batch_size, T), of similar length: sorted within 32 batches."""
    generator = random.Random(seed)
    cache: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in cache:
            if len(cache) > 500_000:
                cache.clear()
            cache[text] = tokenizer.encode(text, add_special_tokens=False)
        return cache[text]

    opening, middle, closing = (encode(phrase) for phrase in _prompt_phrases())
    while True:
        examples = []
        for _ in range(32 * batch_size):
            numbers, target, pieces = draw_example(generator, held_out, share)
            assert countdown.problem_key(numbers, target) not in held_out
            ids = list(opening)
            for position, number in enumerate(numbers):
                ids += encode(f", {number}" if position else str(number))
            ids += middle + encode(str(target)) + closing
            labels = [NO_LOSS] * len(ids)
            for text, learned in pieces:
                tokens = encode(text)
                ids += tokens
                labels += tokens if learned else [NO_LOSS] * len(tokens)
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
            examples.append((ids, labels))
        examples.sort(key=lambda example: len(example[0]))
        groups = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
        generator.shuffle(groups)
        for group in groups:
            length = max(len(ids) for ids, _ in group)
            tokens = np.full((batch_size, length), tokenizer.pad_token_id, dtype=np.int64)
            targets = np.full((batch_size, length), NO_LOSS, dtype=np.int64)
            for row, (ids, labels) in enumerate(group):
                tokens[row, : len(ids)] = ids
                targets[row, : len(ids)] = labels
            yield torch.from_numpy(tokens), torch.from_numpy(targets)


# --- model ------------------------------------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, layers: int, width: int, inner: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for index, feature in number_features(tokenizer, width).items():
            model.model.embed_tokens.weight[index] += 0.05 * feature
    return model


def greedy(model: LlamaForCausalLM, tokenizer: Any, rows: list[dict[str, Any]], prefix: str, limit: int) -> list[str]:
    """Return prefix + greedy completion for each row. Rows of one prompt length share a batch: no padding."""
    encoded = [tokenizer.encode(row["prompt"] + prefix, add_special_tokens=False) for row in rows]
    texts = [""] * len(rows)
    for length in sorted({len(ids) for ids in encoded}):
        chosen = [index for index, ids in enumerate(encoded) if len(ids) == length]
        for start in range(0, len(chosen), 500):
            part = chosen[start : start + 500]
            ids = torch.tensor([encoded[index] for index in part])
            alive = torch.ones(len(part), dtype=torch.bool)
            written, cache = [], None
            for _ in range(limit):
                out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                token = out.logits[:, -1].argmax(-1).masked_fill(~alive, tokenizer.pad_token_id)
                alive &= token != tokenizer.eos_token_id
                written.append(token)
                ids = token[:, None]
                if not alive.any():
                    break
            for index, tokens in zip(part, torch.stack(written, 1).tolist(), strict=True):
                texts[index] = prefix + tokenizer.decode(tokens, skip_special_tokens=True)
    return texts


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: Any, rows: list[dict[str, Any]], limit: int = 72) -> dict[str, Any]:
    """Return greedy accuracy as is, with each manner forced by a prefix, and the share that thinks unforced."""
    model.eval()
    columns = {name: [row[name] for row in rows] for name in ("numbers", "target")}
    result: dict[str, Any] = {"n": len(rows)}
    for name, prefix in (("greedy", ""), ("direct", "<answer>"), ("think", "<think>")):
        texts = greedy(model, tokenizer, rows, prefix, limit)
        scores = countdown.accuracy(texts, **columns)
        result[name] = sum(scores) / len(rows)
        if name == "greedy":
            result["share_thinking"] = sum(text.startswith("<think>") for text in texts) / len(rows)
        if name == "think":
            for count in (3, 4):
                chosen = [score for score, row in zip(scores, rows, strict=True) if len(row["numbers"]) == count]
                result[f"think_{count}_numbers"] = sum(chosen) / len(chosen)
            result["think_tokens"] = sum(len(tokenizer.encode(text)) for text in texts) / len(rows)
            result["think_full_format"] = sum(map(countdown.format_score, texts)) / len(rows)
            result["examples"] = texts[:4]
    model.train()
    return result


def train(options: argparse.Namespace) -> None:
    """Train, log, measure on validation problems now and then and on the test problems at the end, and save."""
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.seed, options.layers, options.width, options.inner)
    size = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.05)
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    log = (output / "pretrain_log.jsonl").open("w")

    def note(**entry: Any) -> None:
        print(json.dumps(entry), flush=True)
        log.write(json.dumps(entry) + "\n")
        log.flush()

    note(parameters=size, vocabulary=len(tokenizer), torch=torch.__version__, **{name: value for name, value in vars(options).items() if name != "output_dir"})
    validation = countdown.load("validation")
    held_out = held_out_problems()
    source = batches(tokenizer, options.seed, options.batch_size, held_out, SHARE_THINKING_FIRST)
    settling = options.steps - int(options.settling * options.steps)
    losses = []
    for step in range(1, options.steps + 1):
        warm = min(1.0, step / 200)
        rate = options.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step == settling:
            source = batches(tokenizer, options.seed + 1, options.batch_size, held_out, None)
        tokens, labels = next(source)
        hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state
        wanted = labels[:, 1:].reshape(-1)
        chosen = wanted != NO_LOSS  # the vocabulary is applied only where there is a loss
        logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[chosen])
        loss = torch.nn.functional.cross_entropy(logits, wanted[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            note(step=step, loss=round(sum(losses) / len(losses), 4), lr=rate, seconds=round(time.perf_counter() - start))
            losses = []
        if step % options.eval_steps == 0 or step == options.steps:
            note(step=step, split="validation", **measure(model, tokenizer, validation))
            save(model, tokenizer, output)
    note(step=step, split="test", **measure(model, tokenizer, countdown.load("test")))
    note(seconds=round(time.perf_counter() - start))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the Hugging Face checkpoint."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def parse_options() -> argparse.Namespace:
    """Read the command line; the defaults make the model that estune ships."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded model `tiny`.")
    parser.add_argument("--output_dir", default=str(Path(__file__).parents[1] / "src/estune/models/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--inner", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval_steps", type=int, default=1000)
    parser.add_argument("--settling", type=float, default=0.2, help="last part of the text, with its own shares")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_options())
