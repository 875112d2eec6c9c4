"""Compares the bytes that two versions of estune write for the same commands: python scripts/same_bytes.py OTHER

OTHER is another checkout, for example of an older commit (`git worktree add ../old COMMIT`). Every command runs once
with each version's sources, in the same environment. The step lines of journals, all weights, and the seed patches are
compared. The exit status is 1 if any of them differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from hashlib import blake2b
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
TRAIN = "train --num_threads 1 --report_to none --output_dir run"
TINY = f"{TRAIN} --model tiny --task countdown --population_size 6 --batch_size 2 --max_completion_length 12"
TOY = f"{TRAIN} --engine toy --task quadratic --population_size 6 --batch_size 4 --sigma 0.1"
# name -> commands that run one after another in an empty directory
CASES: dict[str, list[str]] = {
    "demo": [f"{TRAIN} --config demo --max_steps 3 --eval_steps 0"],
    "full noise": [f"{TINY} --max_steps 3 --sigma 0.01"],
    "low-rank noise": [f"{TINY} --max_steps 3 --sigma 0.01 --noise lowrank --rank 2 --members_per_batch 3"],
    "Rademacher, antithetic": [f"{TINY} --max_steps 2 --noise_distribution rademacher --antithetic true"],
    "sampled, two completions": [f"{TINY} --max_steps 2 --temperature 0.8 --num_generations 2 --top_p 0.9"],
    "anchored decay, schedules": [
        f"{TINY} --max_steps 3 --weight_decay 0.1 --weight_decay_anchor base "
        "--lr_scheduler_type cosine --warmup_steps 1 --sigma_scheduler_type linear"
    ],
    "shaping by prompt": [f"{TINY} --max_steps 2 --fitness_shaping per_prompt_z"],
    "checkpoints, resumed": [f"{TOY} --max_steps 2 --save_steps 1", f"{TOY} --max_steps 5 --save_steps 1 --resume"],
    "toy, low rank": [f"{TOY} --max_steps 4 --noise lowrank --rank 2"],
    "patch": [f"{TOY} --max_steps 3", "export run --patch toy.estp"],
    "random search": [f"{TINY} --method random_search --max_steps 2 --sigma 0.01"],
}


def run_case(commands: list[str], source: Path, place: Path) -> None:
    """Run commands in the directory ``place`` with the estune of the checkout ``source``.

    Raises:
        SystemExit: a command failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    for command in commands:
        words = [sys.executable, "-m", "estune", *shlex.split(command)]
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{source}: {command}: exit {done.returncode}\n{done.stderr[-2000:]}")


def contents(place: Path) -> dict[str, str]:
    """Return the digest of each file that must be equal, by its path."""
    digests = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.suffix == ".safetensors":
            digests[name] = blake2b(path.read_bytes(), digest_size=8).hexdigest()
        elif path.name == "journal.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            steps = [{k: v for k, v in line.items() if k != "hash"} for line in lines[1:]]
            digests[name] = blake2b(json.dumps(steps, sort_keys=True).encode(), digest_size=8).hexdigest()
        elif path.suffix == ".estp":
            digests[name] = blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return digests


def main() -> int:
    """Run all cases with both versions and compare the files; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout of estune")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    n_differing = 0
    for name in options.case:
        trees = []
        for source in (options.other.resolve(), HERE):
            with tempfile.TemporaryDirectory(prefix="estune-same-") as place:
                run_case(CASES[name], source, Path(place))
                trees.append(contents(Path(place)))
        differing = sorted(
            file for file in trees[0].keys() | trees[1].keys() if trees[0].get(file) != trees[1].get(file)
        )
        n_differing += bool(differing)
        print(
            f"{name}: {'differs in ' + ', '.join(differing) if differing else f'{len(trees[0])} files equal'}",
            flush=True,
        )
    return int(n_differing > 0)


if __name__ == "__main__":
    sys.exit(main())
