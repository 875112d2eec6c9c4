"""What is saved beside the weights describes those weights, for directories and for modules given from Python."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiers import few
from tiny_models import EOS, FAMILIES, PAD, save_tiny, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from estune.engines.hf.engine import HFEngine
from estune.engines.hf.loading import load_model
from estune.engines.toy import ToyEngine
from estune.errors import UserError
from estune.es.types import Prompt, Sampling

pytestmark = pytest.mark.miniature

GREEDY = Sampling(seed=0, step=0, max_completion_length=6)
PROMPTS = [Prompt(i, "", tuple(range(5, 8 + i))) for i in range(3)]


def engine_of(model: Any, tokenizer: Any = None) -> HFEngine:
    return HFEngine.from_model(model, tokenizer or tiny_tokenizer())


def saved_values(engine: HFEngine, directory: Path, *, float32: bool = True) -> dict[str, Any]:
    """Write a model as a run does; return its config.json."""
    engine.save(directory, float32=float32)
    values: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return values


def assert_loads_as(directory: Path, engine: HFEngine) -> None:
    """transformers loads the same model from a saved directory; no tensor is missing or newly initialised."""
    loaded, report = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = HFEngine.from_model(loaded, engine.assets.tokenizer)
    assert again.theta.fingerprint() == engine.theta.fingerprint()
    assert again.generate(None, PROMPTS, GREEDY) == engine.generate(None, PROMPTS, GREEDY)


# --- tied weights -----------------------------------------------------------------------------------------------------


def untied_head(directory: Path) -> None:
    """Add a head of its own to a file whose configuration says tied."""
    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] * 1.5
    save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_whose_head_is_its_own_is_saved_as_untied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    save_tiny("qwen2", tmp_path / "base")
    untied_head(tmp_path / "base")
    engine = HFEngine.load(str(tmp_path / "base"), dtype=dtype)
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "tie_word_embeddings" in said and str(tmp_path / "base") in said
    assert "lm_head.weight" in engine.theta.arrays
    assert saved_values(engine, tmp_path / "saved")["tie_word_embeddings"] is False
    engine.assets.check()
    assert_loads_as(tmp_path / "saved", HFEngine.load(str(tmp_path / "base")))


def test_weights_that_only_a_coarse_dtype_makes_equal_stay_apart(tmp_path: Path) -> None:
    """Loaded in bfloat16 alone, transformers would find both equal and tie them."""
    save_tiny("qwen2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].bfloat16().float()
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding * (1 + 2**-20)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engine = HFEngine.load(str(tmp_path), dtype="bfloat16")
    assert {binding.name for binding in engine.working.bindings} == engine.theta.arrays.keys()
    assert engine.model.lm_head.weight is not engine.model.model.embed_tokens.weight
    engine.assets.check()


def test_the_module_that_a_baseline_trains_says_the_truth(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    untied_head(tmp_path)
    module, _, _ = load_model(
        str(tmp_path),
        dtype="float32",
        device=torch.device("cpu"),
        revision=None,
        trust_remote_code=False,
        num_threads=1,
        trainable_parameters=None,
    )
    assert module.config.tie_word_embeddings is False


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.5)


def tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def tie_memory(model: Any) -> None:
    """Share the memory, but not the parameter."""
    model.lm_head.weight.data = model.model.embed_tokens.weight.data


@pytest.mark.parametrize(
    ("family", "edit", "truth"),
    [("qwen2", untie, False), ("llama", tie, True), ("llama", tie_memory, True), ("gemma", untie, False)],
    ids=["untied", "tied", "tied by memory", "untied gemma"],
)
def test_a_head_tied_or_untied_by_hand_is_saved_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, edit: Callable[[Any], None], truth: bool
) -> None:
    model = tiny_model(family)
    before = model.config.tie_word_embeddings
    assert before is not truth
    edit(model)
    engine = engine_of(model)
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "tie_word_embeddings" in said
    assert ("lm_head.weight" in engine.theta.arrays) is not truth
    assert saved_values(engine, tmp_path / "saved")["tie_word_embeddings"] is truth
    assert model.config.tie_word_embeddings is before  # the user's object
    engine.assets.check()
    assert_loads_as(tmp_path / "saved", engine)


def composite() -> Any:
    """A model whose configuration nests that of its text model, and says tied in both places."""
    text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, eos_token_id=EOS, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def test_flags_and_dtypes_of_a_nested_configuration_are_saved_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = composite().bfloat16()
    model.config.dtype = model.config.text_config.dtype = torch.bfloat16
    untie(model)
    engine = engine_of(model)
    assert capsys.readouterr().err.count("warning") == 1
    for float32, dtype in ((True, "float32"), (False, "bfloat16")):
        values = saved_values(engine, tmp_path / dtype, float32=float32)
        assert values["tie_word_embeddings"] is values["text_config"]["tie_word_embeddings"] is False
        assert {part["dtype"] for part in (values, values["text_config"]) if "dtype" in part} == {dtype}
    engine.assets.check()


@pytest.mark.parametrize("family", few(FAMILIES, ("gpt2", "llama", "mamba")))
def test_models_of_every_family_agree_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    engine = engine_of(save_tiny(family, tmp_path))
    engine.assets.check()
    loaded = HFEngine.load(str(tmp_path), dtype="bfloat16")
    loaded.assets.check()
    assert saved_values(loaded, tmp_path / "saved", float32=False)["dtype"] == "bfloat16"
    assert "warning" not in capsys.readouterr().err
    assert engine.facts.vocab_size == loaded.facts.vocab_size == 300


# --- what cannot be mended --------------------------------------------------------------------------------------------


def pruned(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def layer_added(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


def embeddings_grown(model: Any) -> None:
    for owner, name in ((model.model, "embed_tokens"), (model, "lm_head")):
        weight = getattr(owner, name).weight
        getattr(owner, name).weight = nn.Parameter(torch.cat([weight, weight[:10]]).detach())


def head_grown(model: Any) -> None:
    model.lm_head = nn.Linear(32, 310, bias=False)


def bias_added(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.zeros(300))


def layers_shared(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def buffer_added(model: Any) -> None:
    model.register_buffer("scale", torch.ones(3))


def other_vocabulary(model: Any) -> None:
    model.config.vocab_size = 299


def other_heads(model: Any) -> None:
    model.config.num_key_value_heads = 1


def padding_beyond(model: Any) -> None:
    model.config.pad_token_id = 300  # as after `model.config.pad_token_id = tokenizer.pad_token_id`


CONTRADICTIONS: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {
    "layers pruned": (pruned, ("no model.layers.1.",)),
    "a layer added": (layer_added, ("no model.layers.2.",)),
    "embeddings grown": (embeddings_grown, ("(310, 32)", "(300, 32)")),
    "a head grown": (head_grown, ("lm_head.weight", "(310, 32)", "(300, 32)")),
    "a bias added": (bias_added, ("lm_head.bias", "(300,)")),
    "weights shared": (layers_shared, ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")),
    "a buffer added": (buffer_added, ("scale", "(3,)")),
    "another vocabulary": (other_vocabulary, ("(299, 32)", "(300, 32)")),
    "other heads": (other_heads, ("k_proj.weight", "(8, 32)", "(16, 32)")),
    "padding beyond the vocabulary": (padding_beyond, ("adding_idx",)),
}


@pytest.mark.parametrize("how", CONTRADICTIONS)
def test_a_module_that_its_configuration_does_not_describe_is_refused(how: str) -> None:
    edit, parts = CONTRADICTIONS[how]
    model = tiny_model("llama")
    edit(model)
    with pytest.raises(UserError) as caught:
        engine_of(model).assets.check()
    sentence = str(caught.value)
    assert "LlamaForCausalLM" in sentence and "configuration" in sentence and "\n" not in sentence
    assert all(part in sentence for part in parts), sentence


def test_a_module_whose_configuration_was_changed_with_it_is_accepted(tmp_path: Path) -> None:
    model = tiny_model("llama")
    pruned(model)
    embeddings_grown(model)
    model.config.num_hidden_layers, model.config.vocab_size = 1, 310
    engine = engine_of(model)
    engine.assets.check()
    assert engine.facts.vocab_size == 310
    saved_values(engine, tmp_path)
    assert_loads_as(tmp_path, engine)


class Wider(transformers.LlamaForCausalLM):
    """A class of a user's script, which no saved run can name."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Linear(32, 32)


def test_a_class_that_a_saved_run_would_not_be_loaded_as_is_refused() -> None:
    with pytest.raises(UserError, match=r"extra\.bias of shape"):
        engine_of(Wider(tiny_model("llama").config)).assets.check()


# --- dtypes and end tokens --------------------------------------------------------------------------------------------


def test_a_module_cast_in_part_is_described_so_that_loading_rounds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama").bfloat16()
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    engine = engine_of(model)
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and "float32" in said
    assert engine.compute_dtype == "bfloat16"
    assert saved_values(engine, tmp_path / "saved", float32=False)["dtype"] == "float32"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    for name, tensor in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert torch.equal(loaded.state_dict()[name], tensor.float())


@pytest.mark.parametrize("said", [None, "bfloat16", torch.float16])
def test_the_saved_dtype_is_that_of_the_saved_weights(tmp_path: Path, said: Any) -> None:
    """Whatever the configuration of the module says."""
    model = tiny_model("llama").bfloat16()
    model.config.dtype = said
    engine = engine_of(model)
    for float32, dtype in ((True, "float32"), (False, "bfloat16")):
        assert saved_values(engine, tmp_path / dtype, float32=float32)["dtype"] == dtype
        tensors = load_file(tmp_path / dtype / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("given", "pad", "saved_eos", "saved_pad"),
    [(None, None, EOS, None), ([EOS, 7], PAD, [EOS, 7], PAD), ([EOS, 700], 700, EOS, PAD), (9, -1, 9, PAD)],
)
def test_the_saved_generation_config_says_which_tokens_ended_completions(
    tmp_path: Path, given: Any, pad: Any, saved_eos: Any, saved_pad: Any
) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = given, pad
    engine = engine_of(model)
    engine.assets.save(tmp_path, "float32")
    values = json.loads((tmp_path / "generation_config.json").read_text())
    assert values.get("eos_token_id") == saved_eos and values.get("pad_token_id") == saved_pad
    saved = saved_eos if isinstance(saved_eos, list) else [saved_eos]
    assert engine.assets.end_tokens == set(saved)
    assert model.generation_config.eos_token_id == given  # the user's object


@pytest.mark.parametrize("value", [True, 2.0, "5", [[3]]], ids=str)
def test_ids_of_a_module_that_are_no_numbers_are_refused(value: Any) -> None:
    for name in ("eos_token_id", "pad_token_id"):
        model = tiny_model("llama")
        setattr(model.generation_config, name, value)
        with pytest.raises(UserError, match=f"{name}.* is not a token id"):
            engine_of(model)


# --- assets that cannot be saved --------------------------------------------------------------------------------------


def unserialisable(engine: HFEngine) -> None:
    engine.model.config.note = object()


def uncopyable(engine: HFEngine) -> None:
    engine.model.config.note = (item for item in ())


def generation_parameters(engine: HFEngine) -> None:
    engine.model.config.do_sample = True  # save_pretrained of a configuration refuses it


def unserialisable_settings(engine: HFEngine) -> None:
    engine.model.generation_config.note = {1, 2}


def broken_tokenizer(engine: HFEngine) -> None:
    def save_pretrained(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no vocabulary file")

    engine.assets.tokenizer.save_pretrained = save_pretrained


@pytest.mark.parametrize(
    "spoil",
    [unserialisable, uncopyable, generation_parameters, unserialisable_settings, broken_tokenizer],
)
def test_assets_that_cannot_be_saved_are_found_before_a_run(spoil: Callable[[HFEngine], None]) -> None:
    engine = engine_of(tiny_model("llama"))
    engine.assets.check()
    spoil(engine)
    with pytest.raises(UserError, match=r"could not be saved at the end of a run: .+") as caught:
        engine.assets.check()
    assert "\n" not in str(caught.value)


def test_checking_assets_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine_of(tiny_model("llama")).assets.check()
    ToyEngine().assets.check()
    assert list(tmp_path.iterdir()) == []


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("identity") / "base"
    save_tiny("llama", directory)
    return directory


def identity(directory: Path, **options: Any) -> dict[str, Any]:
    return HFEngine.load(str(directory), **options).assets.identity()


def changed(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / name
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, **changes}))

    return edit


def replaced_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new))

    return edit


SAME: dict[str, Callable[[Path], None]] = {
    "a copy": lambda d: None,
    "another transformers": changed("config.json", transformers_version="4.1.0"),
    "another transformers of end tokens": changed("generation_config.json", transformers_version="4.1.0"),
    "another dtype": changed("config.json", dtype="bfloat16", torch_dtype="bfloat16"),
    "a path": changed("config.json", _name_or_path="/elsewhere"),
    "a private field": changed("config.json", _comment="mine"),
    "another class name": changed("config.json", architectures=["Nope"]),
    "spaces": lambda d: (d / "config.json").write_text(
        json.dumps(json.loads((d / "config.json").read_text()), indent=7)
    ),
    "a chat template": lambda d: (d / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
    "a chat template within": changed("tokenizer_config.json", chat_template="{{ messages[0]['content'] }}"),
    "other notes": lambda d: (d / "README.md").write_text("mine"),
    "code that is not run": lambda d: (d / "modeling_mine.py").write_text("x = 1\n"),
    "how to sample": changed("generation_config.json", temperature=0.3, do_sample=True),
}
OTHER: dict[str, tuple[str, Callable[[Path], None]]] = {
    "an epsilon": ("config", changed("config.json", rms_norm_eps=1e-5)),
    "an activation": ("config", changed("config.json", hidden_act="gelu")),
    "a rope": ("config", changed("config.json", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})),
    "a new field": ("config", changed("config.json", attention_temperature=2)),
    "end tokens": ("end_tokens", changed("generation_config.json", eos_token_id=[EOS, 9])),
    "a token's text": ("tokenizer", replaced_text("tokenizer.json", "<unused299>", "<unused-299>")),
    "spaces cleaned": ("tokenizer", changed("tokenizer_config.json", clean_up_tokenization_spaces=True)),
    "a special token": ("tokenizer", changed("tokenizer_config.json", unk_token="<unused299>")),
}


@pytest.mark.parametrize("how", SAME)
def test_identity_stays_the_same(base: Path, tmp_path: Path, how: str) -> None:
    shutil.copytree(base, tmp_path / "elsewhere")
    SAME[how](tmp_path / "elsewhere")
    found = identity(base)
    assert set(found) == {"end_tokens", "config", "tokenizer", "code"} and found["code"] == ""
    assert identity(tmp_path / "elsewhere") == found
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("how", OTHER)
def test_identity_changes_with_what_decides_answers(base: Path, tmp_path: Path, how: str) -> None:
    shutil.copytree(base, tmp_path / "elsewhere")
    part, edit = OTHER[how]
    edit(tmp_path / "elsewhere")
    before, after = identity(base), identity(tmp_path / "elsewhere")
    assert [name for name in before if before[name] != after[name]] == [part]


def test_identity_holds_the_code_that_is_run(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "elsewhere")
    code = tmp_path / "elsewhere" / "modeling_mine.py"
    code.write_text("x = 1\n")
    first = identity(tmp_path / "elsewhere", trust_remote_code=True)
    code.write_text("x = 2\n")
    second = identity(tmp_path / "elsewhere", trust_remote_code=True)
    assert first["code"] and second["code"] and first["code"] != second["code"]
    assert {**first, "code": ""} == {**second, "code": ""} == identity(base, trust_remote_code=True)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "estune-mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_that_comes_with_a_model_is_saved_and_agrees(base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    shutil.copytree(base, directory)
    (directory / "modeling_mine.py").write_text(REMOTE)
    classes = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    changed("config.json", auto_map=classes, model_type="estune-mine")(directory)
    with pytest.raises(UserError, match="trust_remote_code"):
        HFEngine.load(str(directory))
    engine = HFEngine.load(str(directory), trust_remote_code=True)
    engine.assets.check()
    assert engine.assets.identity()["code"]
    saved_values(engine, tmp_path / "saved")
    again = HFEngine.load(str(tmp_path / "saved"), trust_remote_code=True)
    assert type(again.model).__name__ == "MineForCausalLM"
    assert again.generate(None, PROMPTS, GREEDY) == engine.generate(None, PROMPTS, GREEDY)
    module = engine_of(again.model)
    module.assets.check()
    assert module.assets.identity()["code"]


def test_identity_of_modules_and_tokenizer_objects(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(edit: Callable[[Any, Any], Any] = lambda *_: None, family: str = "llama") -> dict[str, Any]:
        model, tokenizer = tiny_model(family), tiny_tokenizer()
        edit(model, tokenizer)
        return engine_of(model, tokenizer).assets.identity()

    plain = found()
    assert plain == found() and plain["code"] == ""
    assert found(lambda m, t: t(["a", "the cat"], padding=True, truncation=True, max_length=4)) == plain
    assert found(lambda m, t: setattr(t, "chat_template", "{{ messages }}")) == plain
    assert found(lambda m, t: setattr(m.config, "transformers_version", "4.1.0")) == plain
    monkeypatch.setattr("transformers.configuration_utils.__version__", "9.9.9")
    assert found() == plain
    for part, edit in {
        "config": lambda m, t: setattr(m.config, "rms_norm_eps", 1e-5),
        "end_tokens": lambda m, t: setattr(m.generation_config, "eos_token_id", 9),
        "tokenizer": lambda m, t: t.add_tokens(["new"]),
    }.items():
        other = found(edit)
        assert [name for name in plain if plain[name] != other[name]] == [part]
    assert found(family="qwen2")["config"] != plain["config"]
    object_of_directory = HFEngine.load(str(base), tokenizer=AutoTokenizer.from_pretrained(base)).assets.identity()
    assert object_of_directory["tokenizer"] == plain["tokenizer"]  # an object's own, wherever it came from
    assert object_of_directory["config"] == identity(base)["config"]


def test_a_saved_run_keeps_its_identity(base: Path, tmp_path: Path) -> None:
    """A model that is saved and loaded answers the same, so its digests stay the same from then on."""
    HFEngine.load(str(base)).assets.save(tmp_path / "one", "float32")
    shutil.copy(base / "model.safetensors", tmp_path / "one")
    HFEngine.load(str(tmp_path / "one")).assets.save(tmp_path / "two", "bfloat16")
    shutil.copy(base / "model.safetensors", tmp_path / "two")
    assert identity(tmp_path / "one") == identity(tmp_path / "two")


def test_the_toy_has_no_identity_and_no_vocabulary() -> None:
    toy = ToyEngine()
    assert toy.assets.identity() == {} and toy.facts.vocab_size is None
