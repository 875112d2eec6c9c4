"""Pretrains `tiny`, the language model that comes with estune: python scripts/pretrain_tiny.py

The model is a Llama of less than a million parameters. Its text is synthetic (tiny_text.py): the prompt of the task
Countdown, and a completion. A completion either answers at once, often wrongly, or works step by step and is right. At
first most completions work step by step, so that the model learns the skill. In the last fifth most answer at once, so
that the model seldom uses the skill. The text contains no problem of the task's splits, up to the order of its numbers
(asserted).

Two simplifications are deliberate. Only completion tokens count in the loss, and the steps chosen in a failed trial
count little. The embeddings of numbers start from features of their values, which saves most of the time for learning
arithmetic.

One seed determines everything, except for rounding, which differs between CPUs. Writes the checkpoint,
`pretrain_log.jsonl` and the model card to src/estune/models/tiny.
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
from tiny_text import LARGEST_VALUE, SPREAD_OF_PREFERENCE, draw_example, held_out_problems
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from estune.tasks import countdown

PAD, EOS = "<|pad|>", "<|end|>"
# mark -> largest number that forms one token with the mark before it; Ġ is a space in byte-level vocabularies
LARGEST_AFTER_MARK = {"+": 99, "-": 99, "*": 99, "/": 99, "=": LARGEST_VALUE, ",Ġ": LARGEST_VALUE, ";Ġ": 99}
# log odds that a text thinks first: in the first part of the text (85 %) and in the last part (35 %)
PREFERENCE_LEARNING, PREFERENCE_SETTLING = 1.7, -0.6
MAX_COMPLETION_TOKENS = 72


# --- tokenizer ---


def build_tokenizer(prompt_phrases: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer for any text; ``prompt_phrases`` are those of a task, by default Countdown's.

    To keep prompts and completions short, these are one token each: a number up to 199, such a number with the mark
    before it (`LARGEST_AFTER_MARK`), and each fixed phrase of the prompt and of the tags.
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
    phrases = [
        *(prompt_phrases or _prompt_phrases()),
        "<think>",
        "</think>\n<answer>",
        "</think>",
        "<answer>",
        "</answer>",
    ]
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _prompt_phrases() -> list[str]:
    """Return the parts of Countdown's prompt before, between and after its numbers and target."""
    before, rest = countdown.format_prompt([1], 2).split("1", 1)
    between, after = rest.split("2", 1)
    return [before, between, after]


def number_features(tokenizer: PreTrainedTokenizerFast, width: int) -> dict[int, torch.Tensor]:
    """Return features (width,) of unit variance, by token id, for each token that contains a number.

    The features are sines and cosines of the number and of its logarithm.
    """
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


# --- batches ---


def batches(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    batch_size: int,
    held_out: set[Any],
    preference: float,
    window: int,
    spread: float = SPREAD_OF_PREFERENCE,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield without end (token ids, weights in the loss), both (batch_size, T), sorted by length in ``window`` batches.

    Sorting saves padding, but then the tokens of short texts have more weight, and short texts are those that answer at
    once. The window must be 1 wherever the model must learn the exact preference.
    """
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
        for _ in range(window * batch_size):
            numbers, target, pieces = draw_example(generator, held_out, preference, spread)
            assert countdown.problem_key(numbers, target) not in held_out
            ids = list(opening)
            for position, number in enumerate(numbers):
                ids += encode(f", {number}" if position else str(number))
            ids += middle + encode(str(target)) + closing
            weights = [0.0] * len(ids)
            for text, weight in pieces:
                tokens = encode(text)
                ids += tokens
                weights += [weight] * len(tokens)
            examples.append(([*ids, tokenizer.eos_token_id], [*weights, 1.0]))
        examples.sort(key=lambda example: len(example[0]))
        groups = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
        generator.shuffle(groups)
        for group in groups:
            length = max(len(ids) for ids, _ in group)
            padded = np.full((batch_size, length), tokenizer.pad_token_id, dtype=np.int64)
            weighted = np.zeros((batch_size, length), dtype=np.float32)
            for row, (ids, weights) in enumerate(group):
                padded[row, : len(ids)] = ids
                weighted[row, : len(ids)] = weights
            yield torch.from_numpy(padded), torch.from_numpy(weighted)


# --- model ---


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
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for index, feature in number_features(tokenizer, width).items():
            model.model.embed_tokens.weight[index] += 0.05 * feature
    return model


def greedy(model: PreTrainedModel, tokenizer: Any, rows: list[dict[str, Any]], prefix: str, limit: int) -> list[str]:
    """Return prefix + greedy completion for each row. All rows of a batch have one prompt length: no padding."""
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
def measure(model: PreTrainedModel, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the greedy accuracy without a prefix and with each manner forced, and the unforced share that thinks."""
    model.eval()  # type: ignore[no-untyped-call]
    columns = {name: [row[name] for row in rows] for name in ("numbers", "target")}
    result: dict[str, Any] = {"n": len(rows)}
    for name, prefix in (("greedy", ""), ("direct", "<answer>"), ("think", "<think>")):
        texts = greedy(model, tokenizer, rows, prefix, MAX_COMPLETION_TOKENS)
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


def weighted_loss(model: PreTrainedModel, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of tokens (batch_size, T), weighted by ``weights`` of the same shape."""
    body: Any = model.base_model
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hidden = body(input_ids=tokens[:, :-1]).last_hidden_state
    chosen = weights[:, 1:] > 0  # the output head runs only on tokens in the loss
    logits = head(hidden[chosen])
    token_losses = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][chosen], reduction="none")
    loss: torch.Tensor = (token_losses * weights[:, 1:][chosen]).sum() / weights.sum()
    return loss


def train(options: argparse.Namespace) -> None:
    """Train, log and save the model; measure it on validation problems meanwhile and on test problems at the end."""
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

    settings = {name: value for name, value in vars(options).items() if name != "output_dir"}
    note(parameters=size, vocabulary=len(tokenizer), torch=torch.__version__, **settings)
    validation = countdown.load("validation")
    held_out = held_out_problems()
    source = batches(tokenizer, options.seed, options.batch_size, held_out, PREFERENCE_LEARNING, 32)
    settling = options.steps - int(options.settling * options.steps)
    losses = []
    for step in range(1, options.steps + 1):
        warm = min(1.0, step / 200)
        rate = options.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step == settling:
            source = batches(tokenizer, options.seed + 1, options.batch_size, held_out, PREFERENCE_SETTLING, 1)
        loss = weighted_loss(model, *next(source))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            seconds = round(time.perf_counter() - start)
            note(step=step, loss=round(sum(losses) / len(losses), 4), lr=round(rate, 6), seconds=seconds)
            losses = []
        if step % options.eval_steps == 0 or step == options.steps:
            note(step=step, split="validation", **measure(model, tokenizer, validation))
            save(model, tokenizer, output)
    result = measure(model, tokenizer, countdown.load("test"))
    note(step=options.steps, split="test", **result)
    minutes = round((time.perf_counter() - start) / 60)
    note(minutes=minutes)
    (output / "README.md").write_text(model_card(size, options, result, minutes), encoding="utf-8")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the Hugging Face checkpoint."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    path = output / "tokenizer_config.json"  # Every version of transformers knows the class name written below.
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def model_card(size: int, options: argparse.Namespace, result: dict[str, Any], minutes: int) -> str:
    """Return the model card, with the figures that this run measured."""
    example = result["examples"][1].replace("\n", "\n    ")
    lowest, highest = countdown.SMALLEST_NUMBER, countdown.LARGEST_NUMBER
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny

A Llama of {size:,} parameters ({options.layers} layers, width {options.width}), to try out estune in minutes on a CPU.
It knows nothing but Countdown problems with numbers from {lowest} to {highest} and targets from \
{countdown.SMALLEST_TARGET} to {countdown.LARGEST_TARGET},
asked in the words of estune's task `countdown`.

It was made by one script, `scripts/pretrain_tiny.py`, from synthetic text, and **made for its purpose**: it can work
step by step but prefers to answer at once, which goes wrong more often. Evolution strategies that are rewarded for the
outcome then bring out a skill that the model already has (elicitation); they do not teach it arithmetic. No problem of
the task's splits, up to the order of its numbers, was in the text.

| greedy decoding, {result["n"]} held-out test problems | accuracy |
|---|---|
| as it is ({result["share_thinking"]:.0%} of its completions think first) | {result["greedy"]:.1%} |
| made to answer at once: response prefix `<answer>` | {result["direct"]:.1%} |
| made to think: response prefix `<think>` | {result["think"]:.1%} |
| of these, problems of 3 numbers / of 4 numbers | \
{result["think_3_numbers"]:.1%} / {result["think_4_numbers"]:.1%} |

Measured by that script at the end of its run, with at most {MAX_COMPLETION_TOKENS} tokens a completion
(`pretrain_log.jsonl`, the line with `"split": "test"`). The run took {minutes} minutes with {options.threads}
thread(s) on a CPU that did other work too. To measure it again:

    estune evaluate --model tiny --task countdown --max_completion_length {MAX_COMPLETION_TOKENS}
    estune evaluate --model tiny --task countdown --max_completion_length {MAX_COMPLETION_TOKENS} \\
        --response_prefix "<think>"

Thinking takes {result["think_tokens"]:.0f} tokens on average and looks like this:

    {example}
"""


def parse_options() -> argparse.Namespace:
    """Read the command line; the defaults produce the model that comes with estune."""
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
    parser.add_argument(
        "--settling", type=float, default=0.2, help="last share of the text, which mostly answers at once"
    )
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_options())
