"""Loads a run with `from_pretrained` and compares every tensor with its file: ``fuzz_load_model.py DIRECTORY``."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    directory = Path(sys.argv[1])
    AutoTokenizer.from_pretrained(directory)
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    stored, loaded = load_file(directory / "model.safetensors"), model.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name
    for name, tensor in loaded.items():
        if name not in stored:  # a tied parameter is stored once
            assert any(tensor.data_ptr() == loaded[other].data_ptr() for other in stored), name


main()
