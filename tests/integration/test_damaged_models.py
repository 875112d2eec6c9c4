"""A damaged model directory is refused in one sentence that names the model and the reason, and warned of where usable.

Each case edits a copy of a small model directory and calls the loader in this process.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiers import few
from tiny_models import EOS, PAD, save_tiny, tiny_tokenizer

from estune.engines.hf.engine import HFEngine
from estune.engines.hf.loading import check_model
from estune.errors import UserError
from estune.es.types import Prompt, Sampling
from estune.models.names import EMBEDDED_MODELS

pytestmark = pytest.mark.miniature

Edit = Callable[[Path], Any]
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "model"
    save_tiny("llama", directory)
    return directory


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """``damaged(edit)``: a copy of a whole model, edited."""

    def make(edit: Edit) -> Path:
        directory = tmp_path / "damaged"
        shutil.copytree(whole, directory)
        edit(directory)
        return directory

    return make


def refusal(directory: Path) -> str:
    """Load a directory, which is refused; return the sentence."""
    with pytest.raises(UserError) as caught:
        HFEngine.load(str(directory))
    sentence = str(caught.value)
    assert str(directory) in sentence and "\n" not in sentence and len(sentence) < 600
    return sentence.replace(str(directory), "")


# --- edits ------------------------------------------------------------------------------------------------------------


def text(name: str, content: str | bytes) -> Edit:
    return lambda d: (d / name).write_bytes(content.encode() if isinstance(content, str) else content)


def values(name: str, **changes: Any) -> Edit:
    def edit(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def config(**changes: Any) -> Edit:
    return values("config.json", **changes)


def ends(**changes: Any) -> Edit:
    return values("generation_config.json", **changes)


def cut(name: str, share: float) -> Edit:
    def edit(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * share)])

    return edit


def as_directory(name: str) -> Edit:
    def edit(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return edit


def dangling(name: str) -> Edit:
    def edit(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to(directory / "nowhere")

    return edit


def absent(name: str) -> Edit:
    return lambda d: (d / name).unlink()


def tensors(**changes: np.ndarray | None) -> Edit:
    """Replace, add, or (``None``) leave out tensors; ``__`` in a name stands for a dot."""

    def edit(directory: Path) -> None:
        found = load_file(directory / WEIGHTS)
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del found[name]
            else:
                found[name] = value
        save_file(found, directory / WEIGHTS, metadata={"format": "pt"})

    return edit


def shards(
    change: Callable[[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]], Any] = lambda *_: None,
    index_text: str | None = None,
) -> Edit:
    """Cut the weights into a.safetensors and b.safetensors; ``change`` edits the index and both shards before."""

    def edit(directory: Path) -> None:
        found = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).unlink()
        names = sorted(found)
        first, second = ({name: found[name] for name in part} for part in (names[:9], names[9:]))
        listed = {**dict.fromkeys(first, "a.safetensors"), **dict.fromkeys(second, "b.safetensors")}
        index = {"metadata": {"total_size": 1}, "weight_map": listed}
        change(index, first, second)
        save_file(first, directory / "a.safetensors", metadata={"format": "pt"})
        save_file(second, directory / "b.safetensors", metadata={"format": "pt"})
        (directory / INDEX).write_text(json.dumps(index) if index_text is None else index_text)

    return edit


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype=dtype)


# --- small files ------------------------------------------------------------------------------------------------------

CONTENTS = {
    "empty": ("", "is empty"),
    "white space": (" \n", "is empty"),
    "truncated": ('{"a": ', "is truncated or not JSON"),
    "a word": ("hello", "is truncated or not JSON"),
    "two objects": ("{} {}", "is truncated or not JSON"),
    "nested too deep": ("[" * 100_000, "is truncated or not JSON"),
    "no text": (b"\xff\xfe\x00", "is not UTF-8 text"),
    "a list": ("[1]", "holds a list"),
    "a number": ("3", "holds a number"),
    "a string": ('"x"', "holds a string"),
    "a boolean": ("true", "holds a boolean"),
    "null": ("null", "holds null"),
}


@pytest.mark.parametrize("name", few(JSON_FILES, ("config.json", "tokenizer.json")))
@pytest.mark.parametrize("how", CONTENTS)
def test_small_files_that_hold_no_object(damaged: Callable[[Edit], Path], name: str, how: str) -> None:
    content, reason = CONTENTS[how]
    sentence = refusal(damaged(text(name, content)))
    assert name in sentence and reason in sentence


@pytest.mark.parametrize("name", [*JSON_FILES, WEIGHTS])
def test_directories_and_dangling_links_in_place_of_files(
    damaged: Callable[[Edit], Path], name: str, tmp_path: Path
) -> None:
    sentence = refusal(damaged(as_directory(name)))
    assert f"{name} is a directory" in sentence
    shutil.rmtree(tmp_path / "damaged")
    sentence = refusal(damaged(dangling(name)))
    assert f"{name} is a symbolic link to nothing" in sentence


@pytest.mark.parametrize("name", [*JSON_FILES, WEIGHTS])
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_files(damaged: Callable[[Edit], Path], name: str) -> None:
    directory = damaged(lambda d: (d / name).chmod(0))
    sentence = refusal(directory)
    assert name in sentence and "ermission" in sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every directory")
def test_an_unreadable_directory(damaged: Callable[[Edit], Path]) -> None:
    directory = damaged(lambda d: d.chmod(0o600))
    try:
        assert "cannot be read (Permission denied)" in refusal(directory)
    finally:
        directory.chmod(0o700)


@pytest.mark.parametrize("name", JSON_FILES)
def test_files_cut_short(damaged: Callable[[Edit], Path], name: str) -> None:
    sentence = refusal(damaged(cut(name, 0.6)))
    assert name in sentence and "truncated or not JSON" in sentence


def test_the_embedded_model_is_checked_like_any_other(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED_MODELS / "tiny", tmp_path / "tiny")
    check_model(str(tmp_path / "tiny"))
    cut(WEIGHTS, 0.9)(tmp_path / "tiny")
    with pytest.raises(UserError, match="truncated or damaged"):
        check_model(str(tmp_path / "tiny"))
    assert "truncated or damaged" in refusal(tmp_path / "tiny")


# --- values of config.json --------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no model type": (text("config.json", "{}"), ("model_type",)),
    "a model type that is a number": (config(model_type=7), ("7",)),
    "an unknown model type": (config(model_type="lama"), ("lama",)),
    "layers in words": (config(num_hidden_layers="two"), ("num_hidden_layers", "two")),
    "fewer than no layers": (config(num_hidden_layers=-1), ("num_hidden_layers", "-1")),
    "no layers": (config(num_hidden_layers=0), ("num_hidden_layers", "0")),
    "layers true": (config(num_hidden_layers=True), ("num_hidden_layers", "True")),
    "a layer more": (config(num_hidden_layers=3), ("lacks the weights", "model.layers.2.", "8 more")),
    "layers without end": (config(num_hidden_layers=10**9), ("num_hidden_layers", "1000000000", "21 tensors")),
    "no width": (config(hidden_size=0), ("hidden_size", "0")),
    "a width that is NaN": (config(hidden_size=float("nan")), ("hidden_size", "nan")),
    "another width": (config(hidden_size=64), ("(300, 32)", "(300, 64)")),
    "a negative inner width": (config(intermediate_size=-3), ("-3",)),
    "no vocabulary": (config(vocab_size=0), ("vocab_size", "0")),
    "a token more": (config(vocab_size=301), (".weight", "(300, 32)", "(301, 32)")),
    "a vocabulary of gigabytes": (config(vocab_size=10**9), (".weight", "(300, 32)", "(1000000000, 32)")),
    "a vocabulary beyond addresses": (config(vocab_size=10**30), ("cannot load the model",)),
    "an inner width of gigabytes": (config(intermediate_size=10**9), ("mlp", "1000000000")),
    "no context": (config(max_position_embeddings=None), ("max_position_embeddings",)),
    "heads that do not divide": (config(num_attention_heads=3), ("32", "3")),
    "other heads": (config(num_key_value_heads=3), ("k_proj.weight", "(16, 32)", "(24, 32)")),
    "a head of no width": (config(head_dim=0), ("ZeroDivisionError",)),
    "an end token in words": (config(eos_token_id="x"), ("eos_token_id", "'x'")),
    "a padding token beyond the vocabulary": (config(pad_token_id=300), ("adding_idx",)),
    "tied perhaps": (config(tie_word_embeddings="yes"), ("tie_word_embeddings", "'yes'")),
    "an unknown activation": (config(hidden_act="nope"), ("nope",)),
    "an unknown dtype": (config(dtype="float99"), ("float99",)),
    "an epsilon in words": (config(rms_norm_eps="x"), ("rms_norm_eps",)),
    "a number for rope": (config(rope_parameters=5), ("rope_parameters",)),
    "an unknown rope": (config(rope_parameters={"rope_type": "nope"}), ("nope",)),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ("quantized",)),
}


@pytest.mark.parametrize("how", CONFIGS)
def test_configurations_that_describe_no_model_or_another(damaged: Callable[[Edit], Path], how: str) -> None:
    edit, parts = CONFIGS[how]
    sentence = refusal(damaged(edit))
    assert all(part in sentence for part in parts), sentence


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "hidden_size"])
def test_sizes_of_a_nested_text_configuration_are_checked(damaged: Callable[[Edit], Path], field: str) -> None:
    sentence = refusal(damaged(config(text_config={field: -5})))
    assert field in sentence and "-5" in sentence


def test_a_far_larger_model_is_refused_before_it_is_allocated(
    damaged: Callable[[Edit], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no name of the files is a name of the model, and where the files have no headers to read."""
    directory = damaged(config(vocab_size=10**9))
    found = load_file(directory / WEIGHTS)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    save_file({f"other.{name}": value for name, value in found.items()}, directory / WEIGHTS)
    assert "describes a model of 64,000,0" in refusal(directory)
    (directory / WEIGHTS).unlink()
    torch.save({name: torch.from_numpy(value) for name, value in found.items()}, directory / "pytorch_model.bin")
    assert "describes a model of 64,000,0" in refusal(directory)


# --- end and padding ids ----------------------------------------------------------------------------------------------

BAD_IDS: list[Any] = [True, 2.0, 2.5, "5", [[3]], ["x"], [True], [2, None], {}, {"a": 1}, "", [1.0]]


@pytest.mark.parametrize("value", BAD_IDS, ids=str)
@pytest.mark.parametrize("field", ["eos_token_id", "pad_token_id"])
def test_ids_that_are_no_numbers(damaged: Callable[[Edit], Path], field: str, value: Any) -> None:
    sentence = refusal(damaged(ends(**{field: value})))
    assert field in sentence and "generation_config.json" in sentence


def test_a_list_of_padding_ids_is_refused(damaged: Callable[[Edit], Path]) -> None:
    assert "pad_token_id" in refusal(damaged(ends(pad_token_id=[PAD])))


def mixed_prompts() -> list[Prompt]:
    """Prompts of several lengths, so that a batch of them is padded."""
    return [Prompt(i, "", tuple(range(1, 3 + i))) for i in range(3)]


@pytest.mark.parametrize("pad", [-1, 300, 10**9])
def test_a_padding_id_that_does_not_exist_is_replaced(
    damaged: Callable[[Edit], Path], capsys: pytest.CaptureFixture[str], pad: int, tmp_path: Path
) -> None:
    sampling = Sampling(seed=0, step=0, max_completion_length=4)
    expected = HFEngine.load(str(damaged(lambda d: None))).generate(None, mixed_prompts(), sampling)
    capsys.readouterr()
    ends(pad_token_id=pad)(tmp_path / "damaged")
    engine = HFEngine.load(str(tmp_path / "damaged"))
    assert engine.facts.vocab_size == 300
    assert engine.generate(None, mixed_prompts(), sampling) == expected
    said = capsys.readouterr().err
    assert str(pad) in said and f"<pad> ({PAD})" in said and said.count("\n") == 1
    engine.assets.save(tmp_path / "saved", "float32")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["pad_token_id"] == PAD and saved["eos_token_id"] == EOS


def test_a_padding_token_added_without_an_embedding_is_replaced(
    damaged: Callable[[Edit], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 300
    engine = HFEngine.load(str(damaged(ends(pad_token_id=None))), tokenizer=tokenizer)
    assert "[PAD] (300)" in capsys.readouterr().err
    engine.generate(None, mixed_prompts(), Sampling(seed=0, step=0, max_completion_length=2))
    engine.token_logprobs(mixed_prompts(), [[1], [2, 3], [4]])


@pytest.mark.parametrize(("given", "left"), [([EOS, 999], {EOS}), ([-4, 7, 300], {7})])
def test_end_ids_that_do_not_exist_are_left_out(
    damaged: Callable[[Edit], Path], capsys: pytest.CaptureFixture[str], given: list[int], left: set[int]
) -> None:
    engine = HFEngine.load(str(damaged(ends(eos_token_id=given))))
    assert engine.assets.end_tokens == left and "warning" not in capsys.readouterr().err
    assert engine.assets.identity()["end_tokens"] == sorted(left)


@pytest.mark.parametrize("given", [300, -1, [10**9, 301]])
def test_a_model_that_no_token_ends_is_warned_of(
    damaged: Callable[[Edit], Path], capsys: pytest.CaptureFixture[str], given: Any, tmp_path: Path
) -> None:
    engine = HFEngine.load(str(damaged(ends(eos_token_id=given))))
    assert engine.assets.end_tokens == frozenset()
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "never does" in said and "vocabulary of 300" in said
    engine.assets.save(tmp_path / "saved", "float32")
    assert "eos_token_id" not in json.loads((tmp_path / "saved" / "generation_config.json").read_text())


@pytest.mark.parametrize("given", [7, [7], [EOS, 7]])
def test_end_ids_that_differ_from_the_tokenizers_get_a_warning(
    damaged: Callable[[Edit], Path], capsys: pytest.CaptureFixture[str], given: Any
) -> None:
    HFEngine.load(str(damaged(ends(eos_token_id=given))))
    said = capsys.readouterr().err
    assert "(7)" in said and f"<eos> ({EOS})" in said and said.count("\n") == 1


@pytest.mark.parametrize("given", [EOS, [EOS], [EOS, EOS], None, []])
def test_end_ids_that_equal_the_tokenizers_get_no_warning(
    damaged: Callable[[Edit], Path], capsys: pytest.CaptureFixture[str], given: Any
) -> None:
    assert HFEngine.load(str(damaged(ends(eos_token_id=given)))).assets.end_tokens == {EOS}
    assert capsys.readouterr().err == ""


# --- weights ----------------------------------------------------------------------------------------------------------

NORM = "model.norm.weight"
WEIGHT_FILES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no bytes": (text(WEIGHTS, ""), (WEIGHTS, "truncated or damaged")),
    "cut in the header": (cut(WEIGHTS, 0.001), (WEIGHTS, "truncated or damaged")),
    "cut in the data": (cut(WEIGHTS, 0.99), (WEIGHTS, "truncated or damaged")),
    "text": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n" * 3), (WEIGHTS, "damaged")),
    "none": (absent(WEIGHTS), ("holds no weights",)),
    "only others": (lambda d: (d / WEIGHTS).rename(d / "training_args.bin"), ("cannot load the model",)),
    "integers": (tensors(model__norm__weight=ones(32, dtype=np.int32)), (NORM, "I32")),
    "bytes": (tensors(lm_head__weight=ones(300, 32, dtype=np.uint8)), ("lm_head.weight", "U8")),
    "booleans": (tensors(model__norm__weight=ones(32, dtype=bool)), (NORM, "BOOL")),
    "another shape": (tensors(model__norm__weight=ones(31)), (NORM, "(31,)", "(32,)")),
    "another rank": (tensors(model__norm__weight=ones(1, 32)), (NORM, "(1, 32)", "(32,)")),
    "transposed": (tensors(lm_head__weight=ones(32, 300)), ("lm_head.weight", "(32, 300)", "(300, 32)")),
    "a tensor less": (tensors(model__norm__weight=None), ("lacks the weights", NORM)),
    "NaN": (tensors(model__norm__weight=np.full(32, np.nan, dtype=np.float32)), ("NaN", NORM)),
    "no shard": (shards(lambda i, a, b: i["weight_map"].update(x="c.safetensors")), ("lacks", "c.safetensors")),
    "a shard elsewhere": (shards(lambda i, a, b: i["weight_map"].update(x="../a.safetensors")), ("../a.safetensors",)),
    "a shard that is no tensor file": (
        shards(lambda i, a, b: i["weight_map"].update(x="config.json")),
        ("config.json", "damaged"),
    ),
    "a shard of another shape": (shards(lambda i, a, b: b.update({NORM: ones(31)})), (NORM, "(31,)", "(32,)")),
    "two shards, two tensors of a name": (
        shards(lambda i, a, b: a.update({NORM: ones(32) * 3})),
        (NORM, "a.safetensors", "b.safetensors"),
    ),
    "an index that is wrong about a shard": (
        shards(lambda i, a, b: i["weight_map"].update({NORM: "a.safetensors"})),
        (NORM, "a.safetensors", INDEX),
    ),
    "an index of a tensor that is nowhere": (
        shards(lambda i, a, b: i["weight_map"].update(nothing="a.safetensors")),
        ("nothing", "a.safetensors", INDEX),
    ),
    "an index that is a list": (shards(index_text="[]"), (INDEX, "a list")),
    "an index that is a number": (shards(index_text="3"), (INDEX, "a number")),
    "an empty index": (shards(index_text=""), (INDEX, "empty")),
    "an index cut short": (shards(index_text='{"weight_map": {"a": "a.saf'), (INDEX, "truncated")),
    "an index without a map": (shards(index_text="{}"), (INDEX, "damaged")),
    "a map that is a list": (shards(index_text='{"weight_map": []}'), (INDEX, "damaged")),
    "a map without tensors": (shards(index_text='{"weight_map": {}}'), (INDEX, "damaged")),
    "a map to numbers": (shards(index_text='{"weight_map": {"a": 3}}'), (INDEX, "damaged")),
}


@pytest.mark.parametrize("how", WEIGHT_FILES)
def test_weight_files_that_are_damaged_or_of_another_model(damaged: Callable[[Edit], Path], how: str) -> None:
    edit, parts = WEIGHT_FILES[how]
    sentence = refusal(damaged(edit))
    assert all(part in sentence for part in parts), sentence


def test_a_damaged_expert_is_named_as_the_file_names_it(tmp_path: Path) -> None:
    """transformers stacks experts, and says of one that does not fit only that a conversion failed."""
    save_tiny("mixtral", tmp_path)
    found = load_file(tmp_path / WEIGHTS)
    name = next(name for name in found if "experts.1." in name)
    found[name] = found[name][:-1].copy()
    save_file(found, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert name in refusal(tmp_path)


@pytest.mark.parametrize("edit", [shards(), shards(lambda i, a, b: a.update({NORM: b[NORM]}))])
def test_whole_shards_load_without_a_word(
    damaged: Callable[[Edit], Path], whole: Path, capsys: pytest.CaptureFixture[str], edit: Edit
) -> None:
    """Also where two shards hold the same tensor twice."""
    engine = HFEngine.load(str(damaged(edit)))
    assert engine.theta.fingerprint() == HFEngine.load(str(whole)).theta.fingerprint()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (tensors(foo__weight=ones(3)), ("foo.weight",)),
        (tensors(foo__weight=ones(3), bar__ids=ones(4, dtype=np.int64)), ("bar.ids", "1 more")),
        (config(num_hidden_layers=1), ("model.layers.1.", "8 more")),
        (shards(lambda i, a, b: b.update(score=ones(2, 32))), ("score",)),
    ],
    ids=["one", "two", "a layer", "a shard"],
)
def test_tensors_that_the_model_does_not_use_get_a_warning(
    damaged: Callable[[Edit], Path], capsys: pytest.CaptureFixture[str], edit: Edit, parts: tuple[str, ...]
) -> None:
    engine = HFEngine.load(str(damaged(edit)))
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "LlamaForCausalLM" in said
    assert all(part in said for part in parts), said
    engine.assets.check()
