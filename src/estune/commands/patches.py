"""A seed patch: a run's whole change to its base model, in kilobytes.

A step is stored as its members' seeds and integer utilities; the noise is regenerated from the seeds. So base model and
patch determine the tuned model, whatever its size. `estune export` makes the patch from a run's journal. `estune apply`
rebuilds the weights on any machine. Fingerprints verify the base and the result. Seeds that follow from the run's seed
are omitted.

Layout: a line that names the format, 16 bytes of blake2b over the rest, and one JSON object compressed by zlib.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from estune.config import ESConfig
from estune.console import counted, say
from estune.engines import ENGINES
from estune.errors import UserError
from estune.es.noise import NOISE_VERSION
from estune.es.population import members_for_step
from estune.es.types import ParameterSpec
from estune.files import replace_file
from estune.models.names import local_directory, public_name
from estune.run.best import chosen_state
from estune.run.journal import JOURNAL_FILE, Base, Coefficients, Journal, StepRecord, canonical_json, recorded_update
from estune.run.origin import located
from estune.train import setup

MAGIC = b"estune patch 1\n"
DIGEST_BYTES = 16
MOST_BYTES = 1 << 30  # bytes of an unpacked patch: thousands of members for a hundred thousand steps
CONTENT = {"noise_version": int, "base": dict, "config": dict, "parameters": str, "steps": list, "fingerprint": str}
STEP_FIELDS = {"q", "e", "a", "decay"}


class KeptOptions(TypedDict):
    """The options that an update, or loading the base, depends on. A patch holds only these, in this order."""

    antithetic: bool
    noise: str
    rank: int
    noise_distribution: str
    weight_decay: float
    weight_decay_anchor: str
    seed: int
    population_size: int
    trainable_parameters: list[str] | None
    dtype: str
    engine: str


KEPT = tuple(KeptOptions.__annotations__)


class PatchStep(Coefficients):
    """The update of one step."""

    seeds: NotRequired[list[str]]  # absent if they follow from the run's seed


class Patch(TypedDict):
    """The JSON object of a patch."""

    noise_version: int
    base: Base
    config: KeptOptions
    parameters: str  # a hash, see `parameters_digest`
    steps: list[PatchStep]
    fingerprint: str  # of the result


def make_patch(run: Path) -> bytes:
    """Return the patch of a finished run's model.

    Raises:
        UserError: there is no journal, or it holds no fingerprint of the last step's weights.
    """
    journal = Journal.open(run / JOURNAL_FILE, repair=False)
    if journal is None:
        raise UserError(f"{run} holds no journal to make a patch of")
    done = len(journal.steps)
    chosen = chosen_state(run, journal)
    if done not in journal.checkpoints:
        raise UserError(
            f"{run} was interrupted after {counted(done, 'step')}: continue it with --resume to its end, then export it"
        )
    header = journal.header
    config = cast(KeptOptions, {name: header["config"][name] for name in KEPT})
    content: Patch = {
        "noise_version": header["noise_version"],
        "base": {
            **header["base"],
            "model": public_name(located(header["base"], run)["model"]),
        },
        "config": config,
        "parameters": parameters_digest(header["parameters"]),
        "steps": [_step(record, config) for record in journal.steps[: chosen["step"] if chosen else done]],
        "fingerprint": chosen["fingerprint"] if chosen else journal.checkpoints[done],
    }
    packed = zlib.compress(canonical_json(content).encode("ascii"), 9)
    return MAGIC + blake2b(packed, digest_size=DIGEST_BYTES).digest() + packed


def _step(record: StepRecord, config: KeptOptions) -> PatchStep:
    kept: PatchStep = {"q": record["q"], "e": record["e"], "a": record["a"], "decay": record["decay"]}
    if "a_lowrank" in record:
        kept["a_lowrank"] = record["a_lowrank"]
    if record["seeds"] != _seeds(config, record["step"], len(record["seeds"])):
        kept["seeds"] = record["seeds"]
    return kept


def _seeds(config: KeptOptions, step: int, count: int) -> list[str]:
    return [f"{member.seed:016x}" for member in members_for_step(config["seed"], step, count, config["antithetic"])]


def parameters_digest(parameters: Sequence[Sequence[Any]]) -> str:
    """Return a hash of (name, shape, kind of noise) of all parameters, as a journal's header lists them."""
    listed = [[name, list(shape), "full" if kind is True else kind] for name, shape, kind in parameters]
    return blake2b(canonical_json(listed).encode("ascii"), digest_size=DIGEST_BYTES).hexdigest()


def read_patch(path: Path) -> Patch:
    """Return the content of a patch.

    Raises:
        OSError: the file cannot be read.
        UserError: the file is not a patch, is damaged, or has another format.
    """
    raw = path.read_bytes()
    if not raw.startswith(MAGIC):
        kind = "a patch of another format" if raw.startswith(b"estune patch ") else "not an estune patch"
        raise UserError(f"{path} is {kind}")
    digest, packed = raw[len(MAGIC) :][:DIGEST_BYTES], raw[len(MAGIC) + DIGEST_BYTES :]
    if blake2b(packed, digest_size=DIGEST_BYTES).digest() != digest:
        raise UserError(f"{path} is damaged: its hash is not the one it was written with")
    content = _unpacked(packed, path)
    if content["noise_version"] != NOISE_VERSION:
        raise UserError(f"{path} needs noise version {content['noise_version']}; this estune has {NOISE_VERSION}")
    return content


def _unpacked(packed: bytes, path: Path) -> Patch:
    """Return a patch's content. The file is untrusted, so its size and its types are checked first."""
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(packed, MOST_BYTES)
        content = json.loads(text) if unpack.eof else None
    except (zlib.error, ValueError, RecursionError):
        content = None
    good = isinstance(content, dict) and all(isinstance(content.get(k), kind) for k, kind in CONTENT.items())
    if not isinstance(content, dict) or not good:
        raise UserError(f"{path} is not an estune patch: its content has other fields or types")
    whole = set(content["config"]) == set(KEPT) and {"model", "fingerprint"} <= set(content["base"])
    if not whole or not all(isinstance(step, dict) and set(step) >= STEP_FIELDS for step in content["steps"]):
        raise UserError(f"{path} is not an estune patch: a field is missing")
    return cast("Patch", content)


def export_command(run: Path, patch: Path) -> int:
    """Write a run's patch and print its size."""
    if patch.is_dir():
        raise UserError(f"patch {patch} is a directory, not a file to write")
    data = make_patch(run)
    patch.parent.mkdir(parents=True, exist_ok=True)
    replace_file(patch, lambda file: file.write(data))
    content = read_patch(patch)
    say(
        f"estune: {patch}: {len(data):,} bytes for {_steps(content)} on {content['base']['model']}; "
        f"fingerprint of the result {content['fingerprint']}"
    )
    return 0


def apply_command(
    patch: Path,
    model: str,
    output_dir: Path | None,
    revision: str | None,
    trust_remote_code: bool,
    engine_name: str | None = None,
) -> int:
    """Rebuild a tuned model from its base and a patch, verify it, and save it.

    The default ``output_dir`` is the patch's path without its suffix. The base's revision, whether its own code may
    run, and the name of an engine outside estune come from the user, never from the patch.

    Raises:
        UserError: the base or the result does not have the patch's fingerprint; nothing is saved.
    """
    content = read_patch(patch)
    output_dir = output_dir or patch.with_suffix("")
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"output_dir {output_dir} is not an empty directory")
    config = {**content["config"], "model": model, "revision": revision, "trust_remote_code": trust_remote_code}
    config["engine"] = _engine_of(patch, content["config"]["engine"], engine_name)
    args = setup.resolve_config(ESConfig.from_mapping(config, str(patch)), 1)
    say(f"estune: loading {model}, then {_steps(content)} of {args.population_size} members")
    engine = setup.load_engine(args)
    base, found = content["base"], engine.fingerprint()
    if found != base["fingerprint"]:
        raise UserError(
            f"{patch} belongs to another base: it was made on {base['model']} with fingerprint {base['fingerprint']}, "
            f"and {model} has {found}; nothing was written"
        )
    if parameters_digest(_listed(engine.specs)) != content["parameters"]:
        raise UserError(f"{patch} perturbs other parameters than this estune would; nothing was written")
    if args.weight_decay_anchor == "base":
        directory = local_directory(model)
        if directory is None or not engine.open_anchor([directory]):
            raise UserError(
                f"{patch} decays towards its base: --model must be a directory with the unchanged base, not {model}"
            )
    for index, step in enumerate(content["steps"]):
        seeds = step.get("seeds") or _seeds(content["config"], index, len(step["q"]))
        engine.apply(recorded_update({**step, "seeds": seeds}, content["config"]))
    found = engine.fingerprint()
    if found != content["fingerprint"]:
        raise UserError(
            f"{patch} applied to {model} gives fingerprint {found}, not {content['fingerprint']}: nothing was written"
        )
    engine.save(output_dir, float32=False)
    say(f"estune: {_steps(content)} applied and verified, fingerprint {found}, in {output_dir}")
    return 0


def _engine_of(patch: Path, recorded: str, given: str | None) -> str:
    """Return the engine that applies a patch; raise UserError if the user must name it, or named another one."""
    if recorded in ENGINES:
        if given not in (None, recorded):
            raise UserError(f"engine {given} has no effect: {patch} was made with engine {recorded}")
        return recorded
    if given is None:
        raise UserError(
            f"{patch} was made with {recorded}, an engine outside estune: name it with --engine, as "
            "package.module:Class or file.py:Class"
        )
    return given


def _steps(content: Patch) -> str:
    return counted(len(content["steps"]), "step")


def _listed(specs: Sequence[ParameterSpec]) -> list[tuple[str, list[int], str | bool]]:
    return [(spec.name, list(spec.shape), spec.kind) for spec in specs]
