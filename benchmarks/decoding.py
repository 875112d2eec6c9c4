"""Measures the time per token: ``generate`` of transformers, plain layers, and estune's layers and attention.

    python benchmarks/decoding.py --model DIRECTORY          # SmolLM2-135M: about 3 minutes

For each number of rows, all variants are timed in turns, token by token, over equal caches. Medians and ratios are
reported. Half of the batches hold a shorter prompt, so that they are padded. ``--compile`` also measures what
transformers offers against the overhead per token: a static cache, alone and with a forward pass compiled by
`torch.compile` (some minutes more). The result is written to `benchmarks/results/decoding.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from record import write_result
from transformers import AutoModelForCausalLM, StaticCache

from estune.engines.hf import attention, callers, small_linear, trials

PROMPT = 64  # tokens
# variant -> whether it uses estune's linear layers, estune's attention
VARIANTS = {"plain": (False, False), "attention": (False, True), "linear": (True, False), "both": (True, True)}


class Parts:
    """A model, and the parts of it that estune can replace: linear layers and attention."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers, self.choices = small_linear.plain_layers(model), attention.find(model)

    @contextmanager
    def use(self, linear: bool, grouped: bool) -> Iterator[None]:
        """Let the model use estune's linear layers and attention within the block, or its own."""
        with (
            small_linear.installed(self.layers if linear else []),
            attention.selected(self.choices if grouped else []),
        ):
            yield


def timed_ms(function: Callable[[], Any]) -> float:
    """Call a function once and return its milliseconds."""
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3


def measure(parts: Parts, rows: int, padded: bool, tokens: int) -> dict[str, float]:
    """Return milliseconds per token of every variant, and of everything except the linear layers."""
    model, grouped = parts.model, bool(parts.choices)
    ids = torch.randint(5, model.config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : PROMPT // 4] = 0
    variants = {name: flags for name, flags in VARIANTS.items() if grouped or not flags[1]}
    caller = callers.AttentionCaller(model, trials.takes_wide_mask(model))
    chosen = caller.prefill(ids, mask, (tokens + 2) * (len(variants) + 1)).argmax(-1)
    times: dict[str, list[float]] = {name: [] for name in [*variants, "all but linear layers"]}
    real = small_linear.linear
    for token in range(tokens + 2):
        for name, flags in variants.items():
            with parts.use(*flags):
                times[name].append(timed_ms(lambda: caller.step(chosen)))
        small_linear.linear = lambda x, weight, bias=None: x.new_zeros((*x.shape[:-1], weight.shape[0]))
        with parts.use(True, grouped):
            times["all but linear layers"].append(timed_ms(lambda: caller.step(chosen)))
        small_linear.linear = real
        if token < 2:  # warm-up
            times = {name: [] for name in times}
    medians = {name: statistics.median(values) for name, values in times.items()}
    spans = {n: [] for n in (4, 4 + tokens)}
    for _ in range(3):
        for n, values in spans.items():
            values.append(
                timed_ms(
                    lambda n=n: model.generate(
                        ids, attention_mask=mask, do_sample=False, min_new_tokens=n, max_new_tokens=n
                    )
                )
            )
    short, long = (statistics.median(values) for values in spans.values())
    return {"generate of transformers": (long - short) / tokens, **medians}


def measure_static(model: Any, rows: int, tokens: int, best: float) -> dict[str, float]:
    """Return milliseconds per token of `generate` with a static cache, plain and compiled, and compile time in s."""
    ids = torch.randint(5, model.config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
    mask, most = torch.ones_like(ids), 4 + tokens

    def generate(n: int) -> float:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + most)
        return timed_ms(
            lambda: model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=n, max_new_tokens=n, past_key_values=cache
            )
        )

    def per_token() -> float:
        generate(4)
        short, long = (statistics.median(generate(n) for _ in range(3)) for n in (4, most))
        return (long - short) / tokens

    result = {"static cache": per_token()}
    plain = model.forward
    model.forward = torch.compile(plain, dynamic=False)
    result["seconds of compiling"] = generate(4) / 1e3
    result["static cache, compiled"] = per_token()
    model.forward = plain
    torch.compiler.reset()
    print(
        f"{rows} rows: " + ", ".join(f"{name} {value:.1f}" for name, value in result.items()) + f"; estune {best:.1f}"
    )
    return result


@torch.inference_mode()
def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 30, 60])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="also time a static cache and a compiled model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    parts = Parts(model)
    results = []
    for rows in options.rows:
        for padded in (False, True):
            if rows == 1 and padded:
                continue
            times = measure(parts, rows, padded, options.tokens)
            best = times["both" if parts.choices else "linear"]
            print(f"{rows} rows{', padded' if padded else ''}: ms per token (as a multiple of estune's)")
            for name, value in times.items():
                print(f"  {name:26s} {value:8.1f}  {value / best:5.2f}")
            results.append({"rows": rows, "padded": padded, "ms_per_token": times})
            if options.compile and not padded:
                results[-1]["static"] = measure_static(model, rows, options.tokens, best)
    print(write_result("decoding", {"model": Path(options.model).name, "threads": options.threads, "results": results}))


if __name__ == "__main__":
    main()
