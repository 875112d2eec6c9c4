"""Measures the coverage of the comparisons' intervals on simulated answers, whose true accuracy is known.

    python benchmarks/interval_coverage.py          # about 10 minutes on one core
    python benchmarks/interval_coverage.py --few    # hard cases: few problems, rare answers, two kinds of seeds

A logistic model decides whether an answer is right. It has normal effects of the seed, of the problem, and of the pair
of both; for two methods also of the method on the problem. The true accuracy is the model's mean over seeds and
problems, by quadrature. Each table of answers gets the interval of `two_level` and Student's t over seed means; every
tenth of the smaller tables also gets a bootstrap over seeds and problems. The result is written to
`benchmarks/results/interval_coverage.json`, in two parts: ``common`` and ``few``, the hard cases.
Shares are in per cent.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
from record import write_part

from estune.compare import statistics
from estune.compare.statistics import over_seeds, paired_difference, tango, two_level

PROBLEMS = (200, 1000)
# mean log-odds; standard deviations of the effects of seeds, of problems, of seeds on problems
TABLES = [
    (0, 0, 1.5, 0.5),
    (0, 0.05, 1.5, 0.5),
    (0, 0.1, 1.5, 0.5),
    (0, 0.2, 1.5, 0.5),
    (0, 0.4, 1.5, 0.5),
    (0, 1, 1, 0.5),
    (2, 0.2, 2, 1),
    (-3, 0.3, 1, 0.5),
    (-3, 0, 2, 0.5),
    (0, 0.2, 5, 0),
]
# mean log-odds; the first method's lead; standard deviations of the effects of seeds, of problems, of methods on
# problems, of seeds on problems
PAIRS = [
    (0, 0.3, 0, 1.5, 0.3, 0.5),
    (0, 0.3, 0.1, 1.5, 0.3, 0.5),
    (0, 0.3, 0.2, 1.5, 0.3, 0.5),
    (0, 0, 0.4, 1.5, 0.3, 0.5),
    (-2, 0.3, 0.2, 2, 0.5, 1),
    (-3, 0, 0.2, 1, 0.3, 0.5),
]
# Probabilities that an answer is gained, lost.
SINGLE = [(0.1, 0.1), (0.2, 0.1), (0.02, 0.01), (0.02, 0.0), (0.15, 0.05)]
FEW = (24, 142, 1000)  # numbers of problems in the hard cases
RARE = [(-3, 0.3, 1, 0.5), (-4, 0.3, 1, 0.5), (-5, 0.3, 1, 0.5), (-4, 1, 1, 0.5)]  # as in TABLES
# Log-odds of two kinds of seeds, and the share of the second kind.
GROUPS = [(-1, 1, 0.5), (-1, 1, 0.2), (-2, 1, 0.5), (-4, -1, 0.5)]
RESAMPLES = 400
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)


def chance(logits: np.ndarray) -> np.ndarray:
    """Return the logistic function."""
    return np.asarray(1 / (1 + np.exp(-logits)))


def expected(mean: float, *spreads: float) -> float:
    """Return the mean accuracy over normal effects with these standard deviations."""
    return float(WEIGHTS @ chance(mean + math.hypot(*spreads) * NODES) / WEIGHTS.sum())


def answers(rng: np.random.Generator, seeds: int, logits: np.ndarray, spread: float, pair_spread: float) -> np.ndarray:
    """Return a table (seeds, P) of 0 and 1, for problems with these log-odds (P,).

    ``spread`` and ``pair_spread`` are the standard deviations of the effects of seeds, and of seeds on problems.
    """
    effects = rng.normal(0, spread, (seeds, 1)) + rng.normal(0, pair_spread, (seeds, logits.size))
    return (rng.random(effects.shape) < chance(logits + effects)).astype(np.float64)


def bootstrap(rng: np.random.Generator, table: np.ndarray) -> tuple[float, float]:
    """Return the bootstrap's 95 % interval of the mean over seeds and problems."""
    weights = [rng.multinomial(n, [1 / n] * n, RESAMPLES) / n for n in table.shape]
    low, high = np.percentile(((weights[0] @ table) * weights[1]).sum(1), [2.5, 97.5])
    return float(low), float(high)


def one_level(rng: np.random.Generator, seeds: int, problems: int, case: tuple[float, ...], repeats: int) -> Any:
    """Return the coverage of the three intervals of a mean."""
    mean, spread, difficulty, pair_spread = case
    truth, hits = expected(mean, spread, difficulty, pair_spread), np.zeros(3)
    for i in range(repeats):
        table = answers(rng, seeds, mean + rng.normal(0, difficulty, problems), spread, pair_spread)
        estimate = two_level(table)
        over = over_seeds(table.mean(1).tolist()).interval
        assert over is not None
        resampled = [bootstrap(rng, table)] if problems == PROBLEMS[0] and i % 10 == 0 else []
        bounds = [(estimate.low, estimate.high), over, *resampled]
        hits[: len(bounds)] += [low <= truth <= high for low, high in bounds]
    counts = np.array([repeats, repeats, len(range(0, repeats, 10))])
    shares = dict(zip(("two_level", "t_of_seed_means", "bootstrap"), percent(hits / counts), strict=True))
    if problems != PROBLEMS[0]:
        del shares["bootstrap"]
    return {"seeds": seeds, "problems": problems, "case": case, "truth": round(truth, 4), **shares}


def grouped(rng: np.random.Generator, seeds: int, problems: int, case: tuple[float, ...], repeats: int) -> Any:
    """Return the coverage for seeds of two kinds, such as runs that learned and runs that did not."""
    low, high, share = case
    truth, hits, alike = (1 - share) * expected(low, 1.5) + share * expected(high, 1.5), 0, 0
    for _ in range(repeats):
        kinds = rng.random((seeds, 1)) < share
        odds = np.where(kinds, high, low) + rng.normal(0, 1.5, problems)
        estimate = two_level((rng.random((seeds, problems)) < chance(odds)).astype(np.float64))
        hits += estimate.low <= truth <= estimate.high
        alike += bool(kinds.all() or not kinds.any())
    return {
        "seeds": seeds,
        "problems": problems,
        "case": case,
        "truth": round(truth, 4),
        **named(hits / repeats),
        "all_of_one_kind": percent([alike / repeats])[0],
    }


def hard(rng: np.random.Generator, repeats: int) -> dict[str, Any]:
    """Print and return the coverage of the hard cases."""
    rare = [one_level(rng, n, p, case, repeats) for n in (3, 5) for p in FEW for case in RARE]
    groups = [grouped(rng, n, p, case, repeats) for n in (3, 5) for p in FEW for case in GROUPS]
    for seeds in (3, 5):
        for problems in FEW:
            where = {"seeds": seeds, "problems": problems}
            print(
                f"{seeds} seeds, {problems} problems: rare answers {span(rare, 'two_level', **where)}, seeds in two "
                f"groups {span(groups, **where)}"
            )
    return {"rare": rare, "groups": groups}


def pair(rng: np.random.Generator, seeds: tuple[int, int], problems: int, case: tuple[float, ...], repeats: int) -> Any:
    """Return the coverage of a paired difference. A method with one seed is a base, without an effect of the seed."""
    mean, lead, spread, difficulty, method_spread, pair_spread = case
    spreads = [spread if n > 1 else 0.0 for n in seeds]
    truths = [
        expected(m, s, difficulty, method_spread, pair_spread)
        for m, s in zip((mean + lead, mean), spreads, strict=True)
    ]
    truth, hits = truths[0] - truths[1], 0
    for _ in range(repeats):
        shared = rng.normal(0, difficulty, problems)
        tables = [
            answers(rng, n, m + shared + rng.normal(0, method_spread, problems), s, pair_spread)
            for n, m, s in zip(seeds, (mean + lead, mean), spreads, strict=True)
        ]
        difference = paired_difference(*tables)
        hits += difference.low <= truth <= difference.high
    return {"seeds": seeds, "problems": problems, "case": case, "truth": round(truth, 4), **named(hits / repeats)}


def single(rng: np.random.Generator, problems: int, case: tuple[float, float], repeats: int) -> Any:
    """Return the coverage of Tango's interval for the difference of two runs."""
    gains, losses = case
    draws = rng.multinomial(problems, [gains, losses, 1 - gains - losses], repeats)[:, :2].tolist()
    bounds = {pair: tango(*pair, problems) for pair in {(g, x) for g, x in draws}}
    hits = sum(bounds[g, x][0] <= gains - losses <= bounds[g, x][1] for g, x in draws)
    return {"problems": problems, "case": case, **named(hits / repeats)}


def percent(shares: Any) -> list[float]:
    """Return shares in per cent, rounded to two digits."""
    return [round(100 * float(share), 2) for share in shares]


def named(share: float) -> dict[str, float]:
    """Return a coverage as a field of the result."""
    return {"coverage": percent([share])[0]}


def span(rows: list[Any], name: str = "coverage", **where: Any) -> str:
    """Return the lowest and the highest coverage of the rows with these fields, as text."""
    values = [row[name] for row in rows if name in row and all(row[key] == value for key, value in where.items())]
    return f"{min(values):.1f} to {max(values):.1f} % ({len(values)} cases)"


def main() -> None:
    """Run all cases, print and write the coverages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8000)
    parser.add_argument("--few", action="store_true", help="only the hard cases")
    options = parser.parse_args()
    repeats = options.repeats
    rng = np.random.default_rng(1)
    statistics.p_value_of = lambda *_: 1.0  # slow, and not needed here
    error = round(100 * math.sqrt(0.95 * 0.05 / repeats), 2)
    if options.few:
        cases = hard(rng, repeats)
        print(write_part("interval_coverage", "few", {"repeats": repeats, "error_points": error, **cases}))
        return
    levels = [one_level(rng, n, p, case, repeats) for n in (2, 3, 5) for p in PROBLEMS for case in TABLES]
    pairs = [pair(rng, n, p, case, repeats) for n in ((3, 3), (5, 5), (1, 3)) for p in PROBLEMS for case in PAIRS]
    singles = [single(rng, p, case, repeats) for p in (50, *PROBLEMS) for case in SINGLE]
    for seeds in (2, 3, 5):
        for name in ("two_level", "t_of_seed_means", "bootstrap"):
            print(f"{seeds} seeds, {name}: {span(levels, name, seeds=seeds)}")
    for both in ((3, 3), (5, 5), (1, 3)):
        print(f"{both[0]} against {both[1]} seeds: {span(pairs, seeds=both)}")
    for problems in (50, *PROBLEMS):
        print(f"one run against one, {problems} problems: {span(singles, problems=problems)}")
    values = {"repeats": repeats, "error_points": error, "two_level": levels, "pairs": pairs, "single": singles}
    print(write_part("interval_coverage", "common", values))


if __name__ == "__main__":
    main()
