"""Builds tiny random models of several families, and a small tokenizer, without downloads."""

from __future__ import annotations

import copy
import gc
import locale
import logging
import os
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import is_progress_bar_enabled

VOCAB_SIZE = 300
PAD, BOS, EOS = 256, 257, 258
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def _build(name: str, **settings: Any) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **settings})
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def _gemma3() -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(
        **_COMMON,
        **{**_DECODER, "num_hidden_layers": 3},
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return transformers.Gemma3ForCausalLM(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: _build("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "llama": lambda: _build("Llama", **_DECODER, tie_word_embeddings=False),
    "qwen2": lambda: _build("Qwen2", **_DECODER, tie_word_embeddings=True),
    "qwen3": lambda: _build("Qwen3", **_DECODER, head_dim=8),
    "gemma": lambda: _build("Gemma", **_DECODER, head_dim=8),
    "gemma3": _gemma3,
    "opt": lambda: _build(
        "OPT",
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    ),
    "gpt_neox": lambda: _build(
        "GPTNeoX",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "mixtral": lambda: _build("Mixtral", **_DECODER, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: _build(
        "Qwen2Moe",
        **_DECODER,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "deepseek_v3": lambda: _build(  # has a persistent buffer: the router's correction
        "DeepseekV3",
        **{**_DECODER, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=24,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "hrm_text": lambda: _build("HrmText", **_DECODER),  # stored as fused tensors, split in memory
    "mamba": lambda: _build("Mamba", hidden_size=32, num_hidden_layers=2, state_size=8),
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Build a family's random model; weights are spread so that greedy answers vary and no parameter is constant."""
    return _spread(FAMILIES[family], seed)


def _spread(build: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    torch.set_rng_state(state)
    return model


# vLLM's attention on CPUs needs heads of a multiple of 32.
_WIDE: dict[str, Any] = {**_DECODER, "hidden_size": 128}
_FOR_VLLM: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _build("Llama", **_WIDE, tie_word_embeddings=False),
    "qwen2": lambda: _build("Qwen2", **_WIDE, tie_word_embeddings=True),
    "qwen3": lambda: _build("Qwen3", **_WIDE, head_dim=32),
    "gemma3": lambda: _build("Gemma3Text", **_WIDE, head_dim=32, query_pre_attn_scalar=32, sliding_window=64),
    "phi3": lambda: _build("Phi3", **_WIDE, original_max_position_embeddings=128),
    "gpt2": lambda: _build("GPT2", n_embd=128, n_layer=2, n_head=4, n_positions=128),
    "qwen3_moe": lambda: _build(
        "Qwen3Moe", **_WIDE, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}


def save_tiny_for_vllm(family: str, directory: Path) -> None:
    """Write a family's model, in sizes that vLLM runs on a CPU, and a tokenizer to ``directory``."""
    _spread(_FOR_VLLM[family]).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer of 256 bytes, three special tokens and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    vocabulary |= {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("<", "/"), ("e", "r"), ("1", "2"), ("Ġ", "=")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    while len(vocabulary) < VOCAB_SIZE:
        vocabulary[f"<unused{len(vocabulary)}>"] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def save_tiny(family: str, directory: Path, seed: int = 0) -> PreTrainedModel:
    """Write a family's model and tokenizer to ``directory``; return the model."""
    model = tiny_model(family, seed)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model


def attributes(model: PreTrainedModel) -> dict[tuple[str, ...], Any]:
    """Return the class and all attributes of every module, the forward of an instance included."""
    found: dict[tuple[str, ...], Any] = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        for key, value in vars(module).items():
            inner = value if key in ("_parameters", "_buffers", "_modules") else {"": value}
            found |= {(name, key, part): item for part, item in inner.items()}
    return found


def config_states(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return copies of all attributes of a model's configurations."""
    parts = [model.config, model.generation_config, model.config.get_text_config(decoder=True)]
    return [copy.deepcopy(vars(part)) for part in parts]


def process_state() -> dict[str, Any]:
    """Return the settings of this process that a library should leave to its program."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "limits": [resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE)],
        "recursion": sys.getrecursionlimit(),
        "collection": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "locale": locale.setlocale(locale.LC_ALL),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "logging": {name: logging.getLogger(name).level for name in ("", "transformers", "accelerate", "trl")},
        "bars": is_progress_bar_enabled(),
    }
