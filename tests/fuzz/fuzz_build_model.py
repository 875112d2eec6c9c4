"""Builds a small random model and its tokenizer in a directory: ``fuzz_build_model.py '{"family": ...}' DIRECTORY``."""

import json
import sys

import torch
import transformers
from tiny_models import tiny_model, tiny_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(family, tied, seed):
    """Return the family's random model; ``tied``: whether its head shares the embedding's weights."""
    model = tiny_model(family, seed)
    if model.config.tie_word_embeddings == tied:
        return model
    model.config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(model.config)


def main():
    options, directory = json.loads(sys.argv[1]), sys.argv[2]
    model = build(options["family"], options["tied"], options["seed"])
    if options["dtype"] == "mixed":
        for index, layer in enumerate(module for module in model.modules() if not list(module.children())):
            layer.to(list(DTYPES.values())[index % 3])
    else:
        model = model.to(DTYPES[options["dtype"]])
    model.save_pretrained(directory, max_shard_size="40KB" if options["sharded"] else "1GB")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<added{index}>" for index in range(options["added_tokens"])])
    tokenizer.save_pretrained(directory)


main()
