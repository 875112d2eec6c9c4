"""Domain B: small model directories with odd configurations, dtypes, tokens and shards, or with damaged files.

Either a step of training succeeds, and `from_pretrained` loads the weights that the run's journal rebuilds; or the
model is refused in one sentence.
"""

from __future__ import annotations

import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from fuzz_forks import Case, Fault, Forks, label, refusal, tail

PROGRAMS = Path(__file__).resolve().parent / "fuzz_programs.py"
REWARD = "def spread(completions, **_):\n    return [len(t) + sum(map(ord, t)) % 7 / 10 for t in completions]\n"
TOKEN_IDS = (None, -1, 0, 257, 299, 300, 10**6, 2**40, [257, 258], [], [300], [None], "x", 1.5, True)
CONFIG: dict[str, tuple[Any, ...]] = {  # of config.json
    "pad_token_id": TOKEN_IDS,
    "eos_token_id": TOKEN_IDS,
    "bos_token_id": TOKEN_IDS,
    "vocab_size": (0, -1, 1, 299, 301, 10**10, "300", None),
    "hidden_size": (0, -1, 31, 33, 10**7, None, "wide"),
    "num_hidden_layers": (0, -1, 1, 3, 500, 1.5, None),
    "num_attention_heads": (0, -1, 3, 5, 10**6, None),
    "num_key_value_heads": (0, 3, 8, None),
    "intermediate_size": (0, 47, 10**9, None),
    "max_position_embeddings": (0, -1, 1, 2, 3, 10**12, None, "long"),
    "n_positions": (0, 1, 2),
    "rms_norm_eps": (0, -1.0, 1e300, "small"),
    "rope_theta": (0, -1, "x"),
    "hidden_act": ("nope", None, 5),
    "tie_word_embeddings": (True, False, None, "no"),
    "dtype": ("float99", "int8", "float8_e4m3fn", None, 5, "float64"),
    "model_type": ("llamma", None, 5, "bert", "t5", "estune-toy"),
    "architectures": ([], None, ["Nothing"], "LlamaForCausalLM"),
    "quantization_config": ({}, {"quant_method": "gptq"}, 5),
    "auto_map": ({"AutoModelForCausalLM": "mine.Model"}, 5),
    "sliding_window": (0, -1, 1),
    "layer_types": ([], ["nope", "nope"], 5),
    "transformers_version": ("99.0", None, 5),
    "use_cache": (False, None),
    "initializer_range": (-1, "x"),
}
GENERATION: dict[str, tuple[Any, ...]] = {  # of generation_config.json
    "pad_token_id": TOKEN_IDS,
    "eos_token_id": TOKEN_IDS,
    "bos_token_id": TOKEN_IDS,
    "temperature": (0, -1, 0.5, "hot"),
    "do_sample": (True, "yes"),
    "max_length": (0, 1, "x"),
    "max_new_tokens": (0, 1),
    "repetition_penalty": (1.5, -1, 0),
    "num_beams": (4, 0),
    "min_new_tokens": (5,),
    "suppress_tokens": ([1, 2], [10**6], 5),
    "forced_eos_token_id": (257, 10**6),
    "cache_implementation": ("static", "nope"),
    "transformers_version": ("99.0", None, 5),
}
TOKENIZER: dict[str, tuple[Any, ...]] = {  # of tokenizer_config.json
    "pad_token": (None, "<none>", "a", 5),
    "eos_token": (None, "<none>", {"content": "<eos>"}, 5),
    "bos_token": (None, "<none>", ""),
    "tokenizer_class": ("Nothing", None, "LlamaTokenizer", "GPT2Tokenizer"),
    "model_max_length": (0, 1, -5, 10**30),
    "chat_template": ("{{ 1 / 0 }}", "{% broken", "", "{{ messages }}", 5),
    "padding_side": ("left", "up"),
    "add_bos_token": (True, "x"),
    "auto_map": ({"AutoTokenizer": ["mine.Tokenizer", None]},),
}
JSON_FILES = {"config.json": CONFIG, "generation_config.json": GENERATION, "tokenizer_config.json": TOKENIZER}
FILES = ("*.safetensors", "*.safetensors", "*.json", "config.json", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json", "*index.json")  # fmt: skip
WRONG = ("", "null", "[]", "{}", "5", '"text"', "{", "[{}]", '{"a": NaN}', "\ufeff{}", "[" * 100000,
         '{"weight_map": {}}', '{"weight_map": 5}', '{"metadata": null}')  # fmt: skip

share = st.integers(0, 1000)  # thousandths
edits = st.sampled_from(sorted(JSON_FILES)).flatmap(
    lambda file: st.sampled_from(sorted(JSON_FILES[file])).flatmap(
        lambda key: st.sampled_from([[file, key, value] for value in JSON_FILES[file][key]] + [[file, key]])
    )
)
damages = st.fixed_dictionaries(
    {
        "files": st.sampled_from(FILES),
        "which": share,  # position among the matching files, sorted by name
        "how": st.sampled_from(["truncate", "zero", "flip", "empty", "delete", "wrong JSON", "dangling", "directory",
                                "swap", "grow"]),
        "where": share,  # position in the file; a tensor file begins with its header
        "near": st.booleans(),  # whether the position is within the first 64 bytes
        "bit": st.integers(0, 7),
        "text": st.sampled_from(WRONG),
    }
)  # fmt: skip
SHORT = 20  # cases in `make test-e2e`
cases = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "family": st.sampled_from(["llama", "gpt2", "qwen2", "gemma3"]),
                "tied": st.booleans(),
                "dtype": st.sampled_from(["float32", "bfloat16", "float16", "mixed"]),
                "sharded": st.booleans(),
                "added_tokens": st.sampled_from([0, 0, 0, 1, 50]),
                "seed": st.integers(0, 3),
            }
        ),
        "edits": st.lists(edits, max_size=2),
        "damage": st.none() | damages,
        "noise": st.sampled_from(["full", "lowrank"]),
        "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
        "temperature": st.sampled_from([0.0, 1.0]),
    }
)


def check(case: Case, place: Path, forks: Forks) -> str:
    """Build the directory, train a step, replay the journal, load the saved model; return the outcome."""
    built = forks.run(["build", json.dumps(case["model"]), "model"], place, script=PROGRAMS)
    if built.code:
        raise Fault(f"the model cannot be built: {tail(built)}")
    for file, key, *values in case["edits"]:
        edit(place / "model" / file, key, values)
    damaged = damage(case["damage"], place / "model") if case["damage"] else "whole"
    (place / "rows.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "12 ="}\n')
    (place / "reward.py").write_text(REWARD)
    words = ["train", "--model", "model", "--dataset_name", "rows.jsonl", "--reward_funcs", "reward.py:spread",
             "--reward_isolation", "inline", "--max_steps", 1, "--population_size", 2, "--batch_size", 2,
             "--sigma", 0.05, "--max_completion_length", 2, "--noise", case["noise"], "--dtype", case["dtype"],
             "--temperature", case["temperature"], "--num_threads", 1, "--report_to", "none",
             "--output_dir", "run"]  # fmt: skip
    sentence = refusal(forks.run(words, place), f"training ({damaged})")
    if sentence is not None:
        if damaged == "whole" and not case["edits"] and not case["model"]["added_tokens"]:
            raise Fault(f"a sound model is refused: {sentence}")
        return f"{damaged}{', edited' * bool(case['edits'])}: refused: {label(sentence)}"
    sentence = refusal(forks.run(["replay", "--run", "run", "--output_dir", "replayed"], place), "the replay")
    if sentence is not None:
        raise Fault(f"the journal of a finished run cannot be replayed: {sentence}")
    weights = "model.safetensors"
    if (place / "run" / weights).read_bytes() != (place / "replayed" / weights).read_bytes():
        raise Fault("the replay gives other weights than the run")
    loaded = forks.run(["load", "run"], place, script=PROGRAMS)
    if loaded.code:
        raise Fault(f"from_pretrained does not give the run's weights: {tail(loaded)}")
    return f"{damaged}{', edited' * bool(case['edits'])}: trains"


def edit(path: Path, key: str, values: list[Any]) -> None:
    """Set a key of a JSON file to the only value of ``values``; delete the key if there is none."""
    if not path.exists():
        return
    content = json.loads(path.read_text())
    content.pop(key, None)
    if values:
        content[key] = values[0]
    path.write_text(json.dumps(content))


def damage(how: Case, directory: Path) -> str:
    """Damage one file of a directory; return a description of the damage."""
    names = sorted(path.name for path in directory.iterdir())
    matching = [name for name in names if fnmatch(name, how["files"])] or names
    name = matching[how["which"] * (len(matching) - 1) // 1000]
    path = directory / name
    data = bytearray(path.read_bytes())
    at = how["where"] * (min(len(data), 64 if how["near"] else len(data)) - 1) // 1000
    kind = how["how"]
    if kind in ("delete", "dangling", "directory"):
        path.unlink()
        if kind == "dangling":
            path.symlink_to("nowhere")
        elif kind == "directory":
            path.mkdir()
    elif kind == "swap" and len(matching) > 1:
        other = directory / matching[(matching.index(name) + 1) % len(matching)]
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "wrong JSON":
        path.write_text(how["text"], encoding="utf-8")
    elif kind == "grow":
        path.write_bytes(data + b"\0" * 100)
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
        path.write_bytes(data)
    elif kind == "flip":
        data[at] ^= 1 << how["bit"]
        path.write_bytes(data)
    else:
        os.truncate(path, at if kind == "truncate" else 0)
    return f"{kind} {'shard' if name.startswith('model-') else name}"
