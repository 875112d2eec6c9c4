"""Errors that the user can act on, the suggestion for an unknown name, and the command for a missing package."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

LEAST_PREFIX = 5  # letters: shortest prefix of an option that gets a suggestion; `save` and `over` are other words
LEAST_PART = 3  # letters: shortest abbreviation of one part of a word


class UserError(Exception):
    """Bad input or an unusable environment, described in one sentence.

    The command line prints it as ``estune: error: <sentence>`` and exits with status 2; from Python it propagates.
    """


class ExternalError(UserError):
    """A run is blocked by something outside it.

    Another process holds its lock, the disk is full, or a resume was given options or data that it cannot change. A
    comparison stops at this error; an error of the run itself becomes one of the comparison's rows.
    """


def install_command(*, extra: str = "", package: str = "") -> str:
    """Return the command that installs an extra of estune, or a package.

    In a checkout, which is how the README installs estune, `constraints.txt` fixes the versions. The command names the
    checkout by its path, so that it works in any directory. Elsewhere the extra is that of the installed version.
    """
    checkout = Path(__file__).resolve().parents[2]
    if not all((checkout / name).is_file() for name in ("constraints.txt", "pyproject.toml")):
        from importlib.metadata import version

        requirement = package or f"'estune[{extra}]=={version('estune')}'"
        return f"python -m pip install {requirement}"
    constraints = shlex.quote(str(checkout / "constraints.txt"))
    what = package or f"-e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"python -m pip install -c {constraints} {what}"


def nearest(word: object, known: Iterable[str], least_prefix: int = LEAST_PREFIX) -> str:
    """Return ``; did you mean ...?``, or an empty string if no known word is near.

    A wrong suggestion is worse than none, so only these four rules count, in this order. If the first rule that matches
    matches two known words, there is no suggestion:

    * The words differ only in case, dashes and underscores (``batchSize``, ``learning-rate``).
    * The words differ by one typing error, or by two if they have seven letters or more: a letter missing, added,
      replaced, or two swapped. The first letters are equal, unless the first letter is the only error and the word has
      five letters or more.
    * The known word continues the unknown one (``max_time``, ``temp`` for a command), see `_continues`.
    * Each part of the unknown word is a prefix of its counterpart, or the reverse (``num_gen``, ``output_directory``).

    Args:
        word: the unknown word.
        known: the known words; flags with their dashes.
        least_prefix: letters, the shortest prefix of a known word that counts.
    """
    names = {_plain(name): name for name in known}
    unknown = _plain(str(word))
    rules: tuple[Callable[[str], bool], ...] = (
        lambda name: name.replace("_", "") == unknown.replace("_", ""),
        lambda name: _slips(unknown, name) == 1 and _is_typo(unknown, name),
        lambda name: _slips(unknown, name) == 2 and _is_typo(unknown, name),
        lambda name: len(unknown) >= least_prefix and _continues(unknown, name),
        lambda name: _abbreviates(unknown, name),
    )
    for rule in rules:
        if matches := [name for name in names if rule(name)]:
            return f"; did you mean {names[matches[0]]!r}?" if len(matches) == 1 else ""
    return ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def _is_typo(word: str, name: str) -> bool:
    """Return whether two words differ by few enough typing errors (one or two) for their length."""
    length, slips = min(len(word), len(name)), _slips(word, name)
    if length < 3 or slips > (1 if length <= 6 else 2):
        return False
    return word[0] == name[0] or (slips == 1 and (max(len(word), len(name)) >= 5 or word[:2] == name[1::-1]))


def _slips(word: str, name: str) -> int:
    """Return the edit distance of two words (add, delete, replace, swap neighbours); 3 means three or more."""
    if abs(len(word) - len(name)) > 2:
        return 3
    before: list[int] = []
    row = list(range(len(name) + 1))  # distances of the empty prefix to the name's prefixes
    for i, letter in enumerate(word, start=1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(name, start=1):
            least = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == name[j - 2] and word[i - 2] == wanted:
                least = min(least, last[j - 2] + 1)
            row.append(least)
    return min(row[-1], 3)


def _continues(word: str, name: str) -> bool:
    """Return whether a name continues a word: by at most one part, or by any number after a word of several parts.

    Names in ``_kwargs`` never count: they hold the arguments of the thing that the word names.
    """
    if not name.startswith(word) or name.endswith("_kwargs"):
        return False
    rest = name[len(word) :]
    return rest.removeprefix("_").count("_") == 0 or ("_" in word and rest.startswith("_"))


def _abbreviates(word: str, name: str) -> bool:
    """Return whether two words have equally many parts (two or more), each a prefix of its counterpart or the reverse.

    The parts of a word stand between underscores.
    """
    parts = list(zip(word.split("_"), name.split("_"), strict=False))
    return (
        word.count("_") == name.count("_") > 0
        and any(len(part) >= LEAST_PART for part, _ in parts)
        and all(
            part == other
            or (min(len(part), len(other)) >= LEAST_PART and (other.startswith(part) or part.startswith(other)))
            for part, other in parts
        )
    )
