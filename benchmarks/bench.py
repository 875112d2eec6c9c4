"""`make bench`: measures kernels, a whole step, other packages, growth of cost, and `--help`; checks the targets.

    python benchmarks/bench.py                             # over an hour on 2 quiet cores, 12 GiB of memory
    python benchmarks/bench.py --peers ~/.cache/estune-peers      # also other packages: 40 minutes and 5 GB more
    python benchmarks/bench.py --check                     # `make bench-check`: only the fast ratios, 5 minutes

There are five sections: `kernels.py`, `step.py` on SmolLM2, `peers.py`, `growth.py`, and the time of `--help`. A run of
all sections (peers aside) writes its result to `benchmarks/results/bench.json`. A run with the sections
kernels and step writes the ratios that ``--check`` compares to `benchmarks/ratios.json`, one entry a processor.
``--check`` measures these ratios again with fewer repetitions. A ratio that is more than a fifth worse than in the
entry of this processor is an error.

A ratio to a limit of the same machine (memory copies) has a target on every machine. A ratio to other code
(`torch.randn`, the paper's loop, generation alone) depends on the processor. It has a target on the processors that
`TARGETS` names, and no verdict on others.

The section growth has verdicts, 1 or 0, instead of ratios. Only a whole run judges them: cost is at most linear in
members and parameters, and only journal and metrics grow with steps.

SmolLM2 is downloaded to `models/smollm2-135m` if it is missing. Without it, ``--check`` can run only ``--sections
kernels``. The exit status is 1 if a target is missed or was not measured, or if a ratio became worse.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "models" / "smollm2-135m"
RATIOS = HERE / "ratios.json"
SECTIONS = ("kernels", "step", "peers", "growth", "help")
BARE = [sys.executable, "-c", "import argparse, numpy"]
HELP_COMMANDS = {"estune --help": ["--help"], "estune train --help": ["train", "--help"]}
LEAST_KEPT = 0.8  # share of a recorded ratio that `--check` requires


@dataclasses.dataclass(frozen=True)
class Target:
    """A figure that must reach its limit.

    Figures with names that end in ``_s`` are seconds: lower is better. All others are ratios: higher is better.
    """

    name: str  # section/figure
    key: tuple[str, ...]  # path to the figure in the section's result
    what: str  # description in the table
    limit: float | Mapping[str, float]  # a mapping: limit by part of the processor's name
    quick: bool = True  # whether `--check` measures the figure

    def limit_on(self, processor: str) -> float | None:
        """Return the limit on a processor; None if there is none."""
        if not isinstance(self.limit, Mapping):
            return self.limit
        return next((limit for name, limit in self.limit.items() if name in processor), None)

    @property
    def section(self) -> str:
        """The section that measures the figure."""
        return self.name.partition("/")[0]


CONCISENESS, COUNTDOWN = ("conciseness", "ratios"), ("countdown", "ratios")
TARGETS = (
    Target(
        "kernels/loop_speedup",
        ("loop_speedup",),
        "perturb + update against the paper's loop of torch.randn",
        {"EPYC": 10.0, "Xeon": 10.0},
    ),
    Target("kernels/update_speedup", ("update_speedup",), "update against torch.randn", {"EPYC": 20.0}),
    Target("kernels/perturb_of_roof", ("perturb_of_roof",), "slower of copy and noise alone / perturb", 0.70),
    Target("kernels/member_s", ("member_s",), "perturb + update of a member of SmolLM2, seconds", {"EPYC": 0.15}),
    Target(
        "step/pure_of_lowrank",
        (*CONCISENESS, "pure / lowrank"),
        "pure generation / low-rank step (N 30, 2 prompts, 32 tokens)",
        {"EPYC": 0.90, "Xeon": 0.80},
    ),
    Target(
        "step/pure_of_lowrank_countdown",
        (*COUNTDOWN, "pure / lowrank"),
        "pure generation / low-rank step (N 30, 24 prompts, 64 tokens)",
        {"EPYC": 0.90, "Xeon": 0.80},
        quick=False,
    ),
    Target(
        "step/paper_of_lowrank",
        (*CONCISENESS, "paper / lowrank"),
        "the paper's loop / low-rank step (N 30, 2 prompts, 32 tokens)",
        {"EPYC": 14.0, "Xeon": 8.0},
    ),
    Target(
        "step/paper_of_full",
        (*CONCISENESS, "paper / full"),
        "the paper's loop / full-rank step (N 30, 2 prompts, 32 tokens)",
        {"EPYC": 2.0, "Xeon": 1.4},
    ),
    Target(
        "growth/members", ("verdicts", "members"), "cost at most linear in members N (1: yes, 0: no)", 1, quick=False
    ),
    Target(
        "growth/parameters",
        ("verdicts", "parameters"),
        "cost at most linear in parameters (1: yes, 0: no)",
        1,
        quick=False,
    ),
    Target(
        "growth/steps",
        ("verdicts", "steps"),
        "nothing but journal and metrics grows with steps (1: yes, 0: no)",
        1,
        quick=False,
    ),
    Target(
        "help/bare_of_help", ("bare_of_help",), "an interpreter that imports numpy / estune --help", 0.4, quick=False
    ),
    Target(
        "help/slowest_s",
        ("slowest_s",),
        "the slower of estune --help and estune train --help, seconds",
        1.0,
        quick=False,
    ),
)
# Shown without a limit: the cost of different weights per member, compared with one model for all rows.
SHARED = (*CONCISENESS, "pure_shared / lowrank")


def lower_is_better(name: str) -> bool:
    """Return whether a lower figure is better: it is in seconds."""
    return name.endswith("_s")


def met(target: Target, value: float | None, processor: str) -> bool | None:
    """Return whether a target is met; None if the processor has no target. Without a value, it is not met."""
    limit = target.limit_on(processor)
    if limit is None:
        return None
    if value is None:
        return False
    return value <= limit if lower_is_better(target.name) else value >= limit


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A figure now and as recorded; ``kept`` is the present speed divided by the recorded speed."""

    name: str
    recorded: float | None
    measured: float | None
    kept: float

    @property
    def good(self) -> bool:
        """Whether the figure fell by at most a fifth."""
        return self.kept >= LEAST_KEPT - 1e-9  # false for NaN

    def __str__(self) -> str:
        if self.recorded is None:
            return f"{self.name}: FAILED: not in the recorded ratios; a whole `make bench` writes them"
        if self.measured is None:
            return f"{self.name}: FAILED: recorded as {self.recorded:.3g}, not measured"
        text = f"{self.name}: {self.measured:.3g}, recorded {self.recorded:.3g}, {self.kept:.0%} of it"
        if lower_is_better(self.name):
            text += " (in speed)"
        return text if self.good else f"{text}: FAILED: it fell by more than {1 - LEAST_KEPT:.0%}"


def compare(recorded: Mapping[str, float], measured: Mapping[str, float]) -> list[Comparison]:
    """Compare figures by name. A figure that is missing on one side fails. Seconds are compared as speeds."""
    comparisons = []
    for name in dict.fromkeys([*recorded, *measured]):
        before, now = recorded.get(name), measured.get(name)
        kept = math.nan
        if before and now:
            kept = before / now if lower_is_better(name) else now / before
        comparisons.append(Comparison(name, before, now, kept))
    return comparisons


def find_model(given: Path | None) -> Path | None:
    """Return SmolLM2's directory, downloaded if it is missing; None if the download fails.

    Raises:
        SystemExit: the directory ``given`` holds no model.
    """
    if given is not None:
        given = given.expanduser().resolve()
        if not (given / "model.safetensors").is_file():
            raise SystemExit(f"bench: {given} holds no model.safetensors")
        return given
    if not (MODEL / "model.safetensors").is_file():
        print(f"bench: downloading SmolLM2 to {MODEL.relative_to(HERE.parent)}", flush=True)
        command = [sys.executable, "-m", "estune", "fetch", "smollm2-135m", "--output_dir", str(MODEL)]
        if subprocess.run(command).returncode or not (MODEL / "model.safetensors").is_file():
            print("bench: SmolLM2 cannot be downloaded (see above)", flush=True)
            return None
    return MODEL


def measure_kernels(quick: bool) -> dict[str, Any]:
    """Measure the section kernels."""
    import kernels

    result = kernels.measure(3 if quick else 7)
    kernels.show("this processor", result)
    return result


def measure_step(model: Path, quick: bool) -> dict[str, Any]:
    """Measure the section step; quick: only the first case, with three repetitions."""
    import step

    cases = step.CASES
    if quick:
        cases = (dataclasses.replace(cases[0], repetitions=3),)
    result = step.measure(model, 30, cases)
    print(step.table(result))
    return result


def measure_peers(model: Path, cache_dir: Path, quick: bool) -> dict[str, Any]:
    """Measure the first case of section (c)."""
    import peers

    options = argparse.Namespace(
        cache_dir=cache_dir.expanduser().resolve(),
        most_members=2 if quick else 6,
        measurements=1 if quick else 3,
        population_size=30,
        num_threads=None,
    )
    result = {}
    for peer in peers.PEERS:
        row = result[peer.name] = peers.time_peer(peer, peers.CASES[0], model, options)
        print(f"{peers.CASES[0].name} {peer.name} {peer.version}: {peers.summary(row)}", flush=True)
    return result


def measure_growth(quick: bool) -> dict[str, Any]:
    """Measure the section growth; quick: at most 20 M parameters and 64 members."""
    import growth

    small: dict[str, Any] = {"models": ("0.6M", "4M", "20M"), "repetitions": 1, "most_members": 64} if quick else {}
    result = growth.measure(**small)
    print(growth.table(result))
    return result


def seconds_of(command: list[str]) -> float:
    """Return the seconds from a command's start to its end.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def time_help(repetitions: int) -> dict[str, Any]:
    """Time `--help` and a bare interpreter in turns; the first turn warms the disk cache and is left out.

    The bare interpreter imports numpy, because `--help` needs it. The ratio is that of the two medians: a slower
    machine changes the seconds, but hardly the ratio.

    Returns:
        By command, ``help_s`` and ``bare_s`` (seconds of each turn), ``medians_s``, and ``bare_of_help`` (bare / help).
        ``slowest_s`` and ``bare_of_help`` over all commands.
    """
    result: dict[str, Any] = {}
    for name, words in HELP_COMMANDS.items():
        turns = [
            (seconds_of(BARE), seconds_of([sys.executable, "-m", "estune", *words])) for _ in range(repetitions + 1)
        ]
        bare, helped = (list(column) for column in zip(*turns[1:], strict=True))
        medians = {"bare": statistics.median(bare), "help": statistics.median(helped)}
        result[name] = {
            "bare_s": bare,
            "help_s": helped,
            "medians_s": medians,
            "bare_of_help": medians["bare"] / medians["help"],
        }
    result["slowest_s"] = max(result[name]["medians_s"]["help"] for name in HELP_COMMANDS)
    result["bare_of_help"] = min(result[name]["bare_of_help"] for name in HELP_COMMANDS)
    return result


def help_table(result: dict[str, Any]) -> str:
    """Return the medians of section (e) as text, one line a command."""
    lines = []
    for name in HELP_COMMANDS:
        medians = result[name]["medians_s"]
        lines.append(
            f"{name:22s} {medians['help']:.3f} s, bare interpreter {medians['bare']:.3f} s, bare / help "
            f"{result[name]['bare_of_help']:.2f}"
        )
    return "\n".join(lines)


def measure_help(quick: bool) -> dict[str, Any]:
    """Measure the section help."""
    result = time_help(5 if quick else 15)
    print(help_table(result))
    return result


def measure_section(section: str, model: Path | None, cache_dir: Path | None, quick: bool) -> dict[str, Any]:
    """Measure one section. Step and peers need a model, peers also a directory for the packages."""
    if section == "kernels":
        return measure_kernels(quick)
    if section == "growth":
        return measure_growth(quick)
    if section == "help":
        return measure_help(quick)
    assert model is not None
    if section == "step":
        return measure_step(model, quick)
    assert cache_dir is not None
    return measure_peers(model, cache_dir, quick)


def measure(sections: Sequence[str], model: Path | None, cache_dir: Path | None, quick: bool) -> dict[str, Any]:
    """Measure and print some sections; return their results by name. Without a model, step and peers are left out.

    If a section raises, its traceback is printed and its result is missing, so that the other sections' results are not
    lost. The targets of a missing section are not met.
    """
    results: dict[str, Any] = {}
    for section in sections:
        print(f"== {section}", flush=True)
        if section in ("step", "peers") and model is None:
            print("not measured: SmolLM2 is missing")
            continue
        try:
            results[section] = measure_section(section, model, cache_dir, quick)
        except Exception:
            traceback.print_exc()
            print(f"not measured: {section} failed", flush=True)
    return results


def figure(results: Mapping[str, Any], section: str, key: Sequence[str]) -> float | None:
    """Return one figure of a section; None if it was not measured."""
    value: Any = results.get(section)
    if section == "kernels" and value is not None:
        value = value["ratios"]
    for name in key:
        value = value.get(name) if value is not None else None
    if isinstance(value, dict):
        value = value["median"]
    return None if value is None else float(value)


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the measured figures of the targets by name."""
    values = {target.name: figure(results, target.section, target.key) for target in TARGETS}
    return {name: value for name, value in values.items() if value is not None}


def targets_of(sections: Sequence[str], quick: bool) -> list[Target]:
    """Return the targets of these sections; quick: only those that `--check` measures."""
    return [target for target in TARGETS if target.section in sections and (target.quick or not quick)]


def table(targets: Sequence[Target], values: Mapping[str, float], processor: str, shared: float | None = None) -> str:
    """Return the targets as a table of text; its last line is the figure `SHARED`, if it was measured."""
    lines = [f"{'what':64s} {'ratio':>8s} {'target':>8s}  met"]
    for target in targets:
        value = values.get(target.name)
        limit = target.limit_on(processor)
        wanted = "-" if limit is None else f"{'<=' if lower_is_better(target.name) else '>='} {limit:g}"
        figure_text = "-" if value is None else number(value)
        verdict = "yes" if met(target, value, processor) else "NO"
        if value is None or limit is None:
            verdict = "not measured" if value is None else "no target for this processor"
        lines.append(f"{target.what:64s} {figure_text:>8s} {wanted:>8s}  {verdict}")
    if shared is not None:
        what = "one model that reads equal prompts once / low-rank step"
        lines.append(f"{what:64s} {number(shared):>8s} {'-':>8s}  members with different weights cannot do that")
    return "\n".join(lines)


def number(value: float) -> str:
    """Return a figure as text."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def processor() -> str:
    """Return the processor's name and the cores that this process may use."""
    from estune.environment import environment

    machine = environment()
    return f"{machine['processor']}, {machine['cores']} cores"


def check(values: Mapping[str, float], sections: Sequence[str]) -> int:
    """Compare measured figures with the recorded ratios of these sections; return the exit status."""
    if not RATIOS.is_file():
        print(f"bench-check: {RATIOS.name} is missing; a whole `make bench` writes it")
        return 1
    recorded, here = json.loads(RATIOS.read_text(encoding="utf-8")), processor()
    if here not in recorded:
        print(
            f"bench-check: no ratios are recorded for {here} (only for {', '.join(recorded)}): only targets are judged"
        )
        judged = [(target, met(target, values.get(target.name), here)) for target in targets_of(sections, quick=True)]
        for target, verdict in judged:
            outcome = {None: "not judged", True: "met", False: "FAILED: missed, or not measured"}[verdict]
            print(f"bench-check: {target.name}: {outcome}")
        return int(any(verdict is False for _, verdict in judged))
    ratios = recorded[here]["ratios"]
    comparisons = compare({name: value for name, value in ratios.items() if name.partition("/")[0] in sections}, values)
    for comparison in comparisons:
        print(f"bench-check: {comparison}")
    return int(not all(comparison.good for comparison in comparisons))


def main() -> int:
    """Measure and print; write the result or check the ratios; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="default: all; peers only with --peers")
    parser.add_argument("--model", type=Path, help="directory of SmolLM2-135M-Instruct; default: models/smollm2-135m")
    parser.add_argument(
        "--peers", type=Path, metavar="CACHE_DIR", help="directory in which other packages are installed (5 GB)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and cases; no file is written")
    parser.add_argument("--check", action="store_true", help="like --quick, and compare with the recorded ratios")
    parser.add_argument("--no_record", action="store_true", help="write no file")
    options = parser.parse_args()
    quick = options.quick or options.check
    default = ("kernels", "step") if options.check else SECTIONS
    sections = [s for s in SECTIONS if s in (options.sections or default)]
    if options.peers is None and "peers" in sections:
        if options.sections:
            parser.error("the section peers needs --peers CACHE_DIR")
        sections.remove("peers")
    import record  # noqa: F401  reads the commit when imported: before the first measurement, but not for --help

    needs_model = any(section in ("step", "peers") for section in sections)
    model = find_model(options.model) if needs_model else None
    if options.check and needs_model and model is None:
        print("bench-check: FAILED: without SmolLM2 no step can be measured; --sections kernels needs no model")
        return 1
    results = measure(sections, model, options.peers, quick)
    values = figures(results)
    targets = targets_of(sections, quick)
    if targets:
        print("\n" + table(targets, values, processor(), figure(results, "step", SHARED)))
    if options.check:
        return check({target.name: values[target.name] for target in targets if target.name in values}, sections)
    if not quick and not options.no_record:
        write(results, targets, values)
    return int(any(met(target, values.get(target.name), processor()) is False for target in targets))


def write(results: Mapping[str, Any], targets: Sequence[Target], values: Mapping[str, float]) -> None:
    """Write the result file if all sections of `TARGETS` were measured, and `ratios.json` if all its ratios were."""
    from record import commit, write_result

    here = processor()
    rows = [
        dataclasses.asdict(target)
        | {
            "limit": target.limit_on(here),
            "value": values.get(target.name),
            "met": met(target, values.get(target.name), here),
        }
        for target in targets
    ]
    if {target.section for target in TARGETS} <= results.keys():
        print(f"written to {write_result('bench', {'targets': rows, **results})}")
    else:
        missing = sorted({target.section for target in TARGETS} - results.keys())
        print(f"bench.json is not written: {', '.join(missing)} not measured")
    quick = [target.name for target in TARGETS if target.quick]
    if all(name in values for name in quick):
        recorded = json.loads(RATIOS.read_text(encoding="utf-8")) if RATIOS.is_file() else {}
        recorded[here] = {"commit": commit(), "ratios": {name: values[name] for name in quick}}
        RATIOS.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
        print(f"written to {RATIOS}")


if __name__ == "__main__":
    sys.exit(main())
