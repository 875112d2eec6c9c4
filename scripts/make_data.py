"""Prints a data file of the package: python scripts/make_data.py sudoku, or words WHEEL WHEEL.

    python scripts/make_data.py sudoku > src/estune/tasks/data/sudoku.txt      # half a minute

    python -m pip download --no-deps pyspellchecker==0.9.1 tzdata==2026.6
    python scripts/make_data.py words pyspellchecker-0.9.1-*.whl tzdata-2026.6-*.whl > src/estune/compare/data/words.txt

`sudoku` is 9x9 puzzles with exactly one solution, no solution twice. A line is a puzzle, a space, and its solution,
each with 81 digits, 0 for an empty cell. A solution is a fixed valid grid whose digits, rows, columns and bands are
shuffled. Its cells are then emptied in random order, as long as the puzzle has no second solution. 20 to 50 cells are
empty.

`words` is the English words that the hacking detector knows: the frequent words of pyspellchecker's English dictionary,
given names included (MIT licence; its text is beside the list), the countries and cities of the time zone database
(public domain), and the words of estune's task `conciseness`. Counts are not kept. Words of two letters are chosen by
hand, because dictionaries list many abbreviations among them. A single letter counts as no word.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import sys
import zipfile

from estune.tasks import conciseness
from estune.tasks.sudoku import SEED, SIZES, Grid, units

# --- sudoku -----------------------------------------------------------------------------------------------------------

BLANKS = (20, 50)  # cells: a puzzle has 20 to 50 empty ones
PEERS = [frozenset(c for unit in units(9) if cell in unit for c in unit) - {cell} for cell in range(81)]


def shuffled(generator: random.Random, items: list[int]) -> list[int]:
    """Return items in random order. Only `Random.random` is used: Python keeps its stream the same in all versions."""
    return [item for _, item in sorted((generator.random(), item) for item in items)]


def solution(generator: random.Random) -> Grid:
    """Return a solved grid."""

    def lines() -> list[int]:
        return [3 * band + line for band in shuffled(generator, [0, 1, 2]) for line in shuffled(generator, [0, 1, 2])]

    digits, rows, columns = shuffled(generator, list(range(1, 10))), lines(), lines()
    return tuple(digits[(3 * (r % 3) + r // 3 + c) % 9] for r in rows for c in columns)


def solvable(grid: list[int]) -> bool:
    """Return whether the empty cells of a grid can be filled; the grid is changed and restored."""
    fewest, candidates = None, set(range(1, 10))
    for cell in range(81):
        if not grid[cell]:
            free = set(range(1, 10)) - {grid[peer] for peer in PEERS[cell]}
            if fewest is None or len(free) < len(candidates):
                fewest, candidates = cell, free
                if len(free) < 2:
                    break
    if fewest is None:
        return True
    for digit in candidates:
        grid[fewest] = digit
        if solvable(grid):
            grid[fewest] = 0
            return True
    grid[fewest] = 0
    return False


def puzzle(generator: random.Random, solved: Grid) -> Grid:
    """Return a puzzle with one solution: a cell is emptied only if no other digit in it leads to a solution."""
    wanted = BLANKS[0] + int(generator.random() * (BLANKS[1] - BLANKS[0] + 1))
    grid = list(solved)
    for cell in shuffled(generator, list(range(81))):
        if grid.count(0) == wanted:
            break
        taken = {grid[peer] for peer in PEERS[cell]}
        for digit in set(range(1, 10)) - taken - {solved[cell]}:
            grid[cell] = digit
            if solvable(grid):
                grid[cell] = solved[cell]
                break
        else:
            grid[cell] = 0
    return tuple(grid)


def print_sudokus() -> None:
    """Print the puzzles."""
    generator = random.Random(SEED)
    seen: set[Grid] = set()
    while len(seen) < sum(SIZES.values()):
        solved = solution(generator)
        if solved not in seen:
            seen.add(solved)
            print("".join(map(str, puzzle(generator, solved))), "".join(map(str, solved)))


# --- words ------------------------------------------------------------------------------------------------------------

SHA256 = "2474a48af86fd81dccea9edd0bba6cd36dd2ecedc0ae217cefcb233bba28613c"
SHORT = (
    "ad ah am an as at be by do eh go ha he hi if in is it me my no of oh ok on or ox so to uh up us we ye yo"
).split()
# occurrences in the dictionary; more for words of three letters, which random text often contains
FEWEST, FEWEST_OF_THREE = 200, 1000


def frequent(counts: dict[str, int]) -> set[str]:
    """Return the frequent words of a dictionary of word counts."""
    return {
        word
        for word, count in counts.items()
        if re.fullmatch(r"[a-z]{3,}", word) and count >= (FEWEST_OF_THREE if len(word) == 3 else FEWEST)
    }


def places(countries: str, zones: str) -> set[str]:
    """Return the words of at least four letters in country and zone names."""
    lines = [line for line in (countries + zones).splitlines() if not line.startswith("#")]
    return {word for line in lines for word in re.findall(r"[a-z]{4,}", line.lower())}


def task_words() -> set[str]:
    """Return the words of at least three letters in the questions and answers of `conciseness`."""
    rows = [row for split in conciseness.SPLITS for row in conciseness.load(split)]
    texts = [text for row in rows for text in (row["prompt"][0]["content"], *row["answers"])]
    return {word for text in texts for word in re.findall(r"(?<![^\W_])[a-z]{3,}(?![^\W_])", text.lower())}


def print_words(spelling_wheel: str, time_zone_wheel: str) -> None:
    """Print the list.

    Raises:
        SystemExit: the first wheel holds a different version of the dictionary.
    """
    spelling, time_zones = zipfile.ZipFile(spelling_wheel), zipfile.ZipFile(time_zone_wheel)
    data = spelling.read("spellchecker/resources/en.json.gz")
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"{spelling_wheel} holds a different version of the dictionary")
    names = (time_zones.read(f"tzdata/{name}").decode("utf-8") for name in ("zoneinfo/iso3166.tab", "zones"))
    print("\n".join(sorted(frequent(json.loads(gzip.decompress(data))) | places(*names) | task_words() | set(SHORT))))


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Print the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_subparsers(dest="file", required=True)
    files.add_parser("sudoku", help="puzzles of the task sudoku")
    words = files.add_parser("words", help="words of the hacking detector")
    words.add_argument("spelling", metavar="SPELLING_WHEEL", help="pyspellchecker")
    words.add_argument("time_zones", metavar="TIME_ZONE_WHEEL", help="tzdata")
    options = parser.parse_args()
    if options.file == "sudoku":
        print_sudokus()
    else:
        print_words(options.spelling, options.time_zones)


if __name__ == "__main__":
    main()
