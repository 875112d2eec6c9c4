"""Programs that a fuzz case runs in a process of its own: ``fuzz_programs.py PROGRAM ARGUMENTS``.

build '{"family": ...}' DIRECTORY     save a small random model and its tokenizer
load DIRECTORY                        load a run with `from_pretrained` and compare every tensor with its file
train DIRECTORY MAX_STEPS [resume]    train from Python on the rows of ./case.json
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def build(options, directory):
    import torch
    from tiny_models import tiny_tokenizer

    options = json.loads(options)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    model = random_model(options["family"], options["tied"], options["seed"])
    if options["dtype"] == "mixed":
        for index, layer in enumerate(module for module in model.modules() if not list(module.children())):
            layer.to(list(dtypes.values())[index % 3])
    else:
        model = model.to(dtypes[options["dtype"]])
    model.save_pretrained(directory, max_shard_size="40KB" if options["sharded"] else "1GB")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<added{index}>" for index in range(options["added_tokens"])])
    tokenizer.save_pretrained(directory)


def random_model(family, tied, seed):
    """Return the family's random model; ``tied``: whether its head shares the embedding's weights."""
    import torch
    import transformers
    from tiny_models import tiny_model

    model = tiny_model(family, seed)
    if model.config.tie_word_embeddings == tied:
        return model
    model.config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(model.config)


def load(directory):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(directory)
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    stored, loaded = load_file(Path(directory) / "model.safetensors"), model.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name
    for name, tensor in loaded.items():
        if name not in stored:  # a tied parameter is stored once
            assert any(tensor.data_ptr() == loaded[other].data_ptr() for other in stored), name


def train(directory, max_steps, *resume):
    case = json.loads(Path("case.json").read_text())
    try:
        rows = dataset(case)
    except Exception as error:  # the rows fit no dataset, so the case does not test estune
        print(f"estune: error: NO DATASET: {type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    from estune import ESConfig, ESTrainer
    from estune.errors import UserError

    try:
        options = dict(case["options"], output_dir=directory, max_steps=int(max_steps), resume=bool(resume))
        ESTrainer(args=ESConfig(**options), train_dataset=rows).train()
    except UserError as error:
        print(f"estune: error: {error}", file=sys.stderr)
        sys.exit(2)


def dataset(case):
    """Return the case's rows, as a list of dicts or a `datasets.Dataset`."""
    from fuzz_values import arrow_array, rows_of

    if case["source"] == "list of dicts":
        return rows_of(case["columns"])
    import datasets
    import pyarrow as pa

    if case["source"] == "Dataset of dicts":
        return datasets.Dataset.from_list(rows_of(case["columns"]))
    arrays = [arrow_array(column["kind"], column["values"]) for column in case["columns"]]
    return datasets.Dataset(pa.table(arrays, names=[column["name"] for column in case["columns"]]))


PROGRAMS = {"build": build, "load": load, "train": train}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
