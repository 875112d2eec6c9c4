"""Random models of real shapes with the embedded tokenizer, for measurements of memory and time.

python benchmarks/random_models.py 1.5B models/random-1.5b
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "0.5B": dict(
        model_type="llama",
        hidden_size=1280,
        num_hidden_layers=20,
        intermediate_size=3456,
        num_attention_heads=20,
        num_key_value_heads=20,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
    "1.5B": dict(
        model_type="qwen2",
        hidden_size=1536,
        num_hidden_layers=28,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
}
TINY = Path(__file__).resolve().parents[1] / "src" / "estune" / "models" / "tiny"


def save(name: str, directory: Path) -> int:
    """Write a model of ``MODELS`` with random float32 weights; return the number of its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer
    tokenizer = tokenizer.from_pretrained(TINY)
    auto_config: Any = AutoConfig
    auto_model: Any = AutoModelForCausalLM
    config = auto_config.for_model(**MODELS[name], eos_token_id=tokenizer.eos_token_id)
    model = auto_model.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def save_in_child(name: str, directory: Path) -> int:
    """Call `save` in a child process, whose memory ends with it."""
    command = [sys.executable, __file__, name, str(directory)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


if __name__ == "__main__":
    print(save(sys.argv[1], Path(sys.argv[2])))
