"""Times an ES step of other packages from the registry on the same model, prompts, members and tokens.

    estune fetch smollm2-135m
    python benchmarks/peers.py --model models/smollm2-135m --cache_dir ~/.cache/estune-peers       # about 40 minutes

Each package is installed into its own environment in ``--cache_dir`` (1 GB each; needs the registry), with the versions
of `constraints.txt`. `peers/driver.py` uses its public interface. A few members are timed, with the package's noise and
update, and the time is multiplied by N / members. Completions have exactly as many tokens as in `step.py`. Directly
before and after each package, whole low-rank steps of estune are timed on the same work in a child process. The ratio
is to the mean of the two. A package that fails is recorded with its error. The result is written to
`benchmarks/results/peers.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from environments import CONSTRAINTS, make_environment
from record import write_result
from step import CASES, Bench, Case, Place, endless_model

from estune import ESConfig, environment
from estune.data.batches import Batches
from estune.engines.hf.loading import load_tokenizer
from estune.train import setup

HERE = Path(__file__).resolve().parent
TIME_LIMIT_S = 3600.0
REQUIRED = ("torch", "transformers", "numpy")  # installed into every environment before its package


@dataclasses.dataclass(frozen=True)
class Peer:
    """A package that can train a Hugging Face causal language model with ES on a CPU."""

    name: str
    version: str
    licence: str
    note: str
    members: int = 6  # timed in one measurement
    with_dependencies: bool = True


PEERS = (
    Peer(
        "eggroll-es",
        "0.2.0",
        "MIT",
        "members one after another; keeps the noise of all members, 0.54 GB each on this model",
    ),
    Peer(
        "torcheggroll",
        "0.2.0",
        "MIT",
        "keeps noise and weights of all members, 1.1 GB each on this model: N = 30 does not fit into 24 GiB",
    ),
    Peer(
        "mezo",
        "0.0.1",
        "MIT",
        "pairs of members, an update after each; installed without its dependencies, which ask for transformers 4",
        members=2,
        with_dependencies=False,
    ),
    Peer(
        "evotorch", "0.6.1", "Apache-2.0", "a general library; keeps all members as vectors, 0.54 GB each on this model"
    ),
)

# other packages that were considered -> why they are not measured
LOOKED_AT = {
    "eggroll": "another thing of the same name: client and server of a federated-computing framework",
    "eggroll-trainer": "listed (0.1.0), but no file of it can be downloaded: No matching distribution found",
    "evosax, shardes": "JAX arrays; no model of transformers 5 runs on JAX",
    "cma, cmaes": "a covariance matrix of parameters squared",
    "polystep": "optimal transport between weight candidates, not ES; for supervised costs of small networks",
    "zeroth-learn": "networks of its own in NumPy",
    "estorch, evostrat, nes-torch, pepg-es, pytorch-es, evostra": "2018 to 2021, small policies; by their summary only",
}


def tokenised(case: Case, model: Path) -> list[list[int]]:
    """Return the token ids of the prompts of the case's first step, one list a prompt."""
    args = ESConfig(model=str(model), batch_size=case.prompts, max_completion_length=case.tokens, task=case.task)
    task = setup.task_of(args)
    rows = setup.resolve_rows(args, None, task, "train", setup.resolve_rewards(args, None, task))
    assets = argparse.Namespace(tokenizer=load_tokenizer(str(model)))
    engine: Any = argparse.Namespace(assets=assets, facts=argparse.Namespace(max_context=None, vocab_size=None))
    prompts = setup.build_prompts(args, engine, rows, task is not None)
    return [list(prompts[row].token_ids) for row in Batches(len(rows), case.prompts, args.seed).rows_for_step(0)]


def environment_of(peer: Peer, cache_dir: Path) -> Path:
    """Return the Python of the peer's environment; create it at first use.

    Raises:
        subprocess.CalledProcessError: pip failed; ``stderr`` holds its message.
    """
    alone = [] if peer.with_dependencies else ["--no-deps"]
    pinned = ["-c", str(CONSTRAINTS)]
    return make_environment(
        cache_dir / f"{peer.name}-{peer.version}",
        [
            [*pinned, *REQUIRED],
            [*pinned, *alone, f"{peer.name}=={peer.version}"],
        ],
    )


def time_peer(peer: Peer, case: Case, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of a peer's step in one case and their ratio to estune's low-rank step, or the error."""
    facts = {"version": peer.version, "licence": peer.licence, "note": peer.note}
    try:
        python = environment_of(peer, options.cache_dir)
    except subprocess.CalledProcessError as error:
        return facts | {"error": failure(error)}
    before = estune_step_s(case, model, options)
    try:
        seconds = drive(peer, python, case, model, options)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return facts | {"error": failure(error)}
    after = estune_step_s(case, model, options)
    per_member = statistics.median(seconds)
    step_s = options.population_size * per_member
    return facts | {
        "how": f"{members_of(peer, options)} members together, {len(seconds)} times: the median per member, times "
        f"{options.population_size}",
        "seconds_per_member": per_member,
        "seconds_per_member_of_each_measurement": seconds,
        "step_seconds": step_s,
        "tokens_per_s": case.prompts * case.tokens / per_member,
        "estune_lowrank_step_seconds": {"before": before, "after": after},
        "peer / estune low-rank": step_s / statistics.mean([before, after]),
    }


def members_of(peer: Peer, options: argparse.Namespace) -> int:
    """Return how many members of a peer are timed in one measurement."""
    return min(peer.members, int(options.most_members))


def threads_of(options: argparse.Namespace) -> int:
    """Return the number of threads of peers and estune."""
    return environment.cores() if options.num_threads is None else int(options.num_threads)


def drive(peer: Peer, python: Path, case: Case, model: Path, options: argparse.Namespace) -> list[float]:
    """Time a peer in its own environment; return seconds per member of each measurement after a warm-up.

    Raises:
        subprocess.CalledProcessError: the peer failed; ``stderr`` holds its message.
        subprocess.TimeoutExpired: the peer took more than `TIME_LIMIT_S`.
    """
    with tempfile.TemporaryDirectory() as name:
        job, result = Path(name) / "job.json", Path(name) / "result.json"
        values = {
            "model": str(model),
            "prompts": tokenised(case, model),
            "tokens": case.tokens,
            "members": members_of(peer, options),
            "measurements": 1 + options.measurements,
            "num_threads": threads_of(options),
        }
        job.write_text(json.dumps(values), encoding="utf-8")
        subprocess.run(
            [str(python), str(HERE / "peers" / "driver.py"), peer.name, str(job), str(result)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIME_LIMIT_S,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        seconds: list[float] = json.loads(result.read_text(encoding="utf-8"))["seconds_per_member"]
    return seconds[1:]


def failure(error: subprocess.CalledProcessError | subprocess.TimeoutExpired) -> str:
    """Return the reason why a peer has no figure, in one line."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not done after {TIME_LIMIT_S:.0f} s"
    lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
    return f"exit status {error.returncode}: " + " | ".join(lines[-3:])


def estune_step_s(case: Case, model: Path, options: argparse.Namespace) -> float:
    """Return the median seconds of estune's low-rank step, timed in a child process, whose memory ends with it."""
    values = {
        "case": case.name,
        "tokens": case.tokens,
        "model": str(model),
        "num_threads": threads_of(options),
        "population_size": options.population_size,
        "measurements": options.measurements,
    }
    command = [sys.executable, __file__, "--child", json.dumps(values)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds: list[float] = json.loads(output.splitlines()[-1])
    return statistics.median(seconds)


def estune_child(values: dict[str, Any]) -> list[float]:
    """Time whole low-rank steps of estune after a warm-up; return their seconds."""
    case = next(case for case in CASES if case.name == values["case"])
    case = dataclasses.replace(case, tokens=values["tokens"])
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        model = endless_model(Path(values["model"]), Path(name) / "model")
        bench = Bench(case, stack, model, Path(name), values["population_size"], Place(values["num_threads"]))
        bench.lowrank_pass()
        return [bench.lowrank_step()["step"] for _ in range(values["measurements"])]


def summary(row: dict[str, Any]) -> str:
    """Return a peer's result in one line."""
    if "error" in row:
        return str(row["error"])
    return (
        f"{row['step_seconds']:.1f} s a step, {row['tokens_per_s']:.1f} tokens/s, "
        f"peer / estune low-rank {row['peer / estune low-rank']:.1f}"
    )


def main() -> int:
    """Time every peer in every case; print and write the result."""
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        print(json.dumps(estune_child(json.loads(sys.argv[2]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--cache_dir", type=Path, required=True, help="directory for the environments")
    parser.add_argument("--peers", nargs="+", choices=[peer.name for peer in PEERS])
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=["conciseness"])
    parser.add_argument("--measurements", type=int, default=3, help="number of measurements after the warm-up")
    parser.add_argument("--population_size", type=int, default=30)
    parser.add_argument("--most_members", type=int, default=6, help="most members in one measurement")
    parser.add_argument("--tokens", type=int, help="tokens a completion instead of the case's, for trials")
    parser.add_argument("--num_threads", type=int, help="default: the number of cores")
    parser.add_argument("--no_record", action="store_true", help="print only")
    options = parser.parse_args()
    model = options.model.expanduser().resolve()
    options.cache_dir = options.cache_dir.expanduser().resolve()
    results: dict[str, dict[str, Any]] = {}
    for case in CASES:
        if case.name not in options.cases:
            continue
        if options.tokens:
            case = dataclasses.replace(case, tokens=options.tokens)
        results[case.name] = {}
        for peer in PEERS:
            if options.peers and peer.name not in options.peers:
                continue
            row = results[case.name][peer.name] = time_peer(peer, case, model, options)
            print(f"{case.name} {peer.name} {peer.version}: {summary(row)}", flush=True)
    if not options.no_record:
        write_result(
            "peers",
            {"model": model.name, "population_size": options.population_size, "cases": results, "looked_at": LOOKED_AT},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
