"""Errors that the user can act on, and the suggestion that an unknown name's error ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

LEAST_PREFIX = 5  # letters, of an option: shorter ones begin foreign words (`save`, `over`)
LEAST_PART = 3  # letters, of an abbreviated part of a word


class UserError(Exception):
    """Bad input or an unusable environment, told in one clear sentence.

    The command line prints it as ``estune: error: <sentence>`` and exits with status 2; from Python it propagates.
    """


class ExternalError(UserError):
    """What keeps a run from going on and is none of its doing.

    Another process that holds it, a full disk, options or data that a resume cannot change. A comparison stops at it,
    where an error of the run itself is one of its rows.
    """


def nearest(word: object, known: Iterable[str], least_prefix: int = LEAST_PREFIX) -> str:
    """Return ``; did you mean ...?``, or an empty string where no known word is near.

    A wrong suggestion is worse than none, so a known word is near in four cases only. Where two known words are equally
    near in the first case that applies, there is no suggestion:

    * They differ in case, dashes and underscores alone (``batchSize``, ``learning-rate``).
    * They differ by one slip of the keyboard, or by two in words of seven letters or more: a letter missing, added,
      replaced, or two swapped. The first letter is equal, or it is the only slip in a word of five letters or more.
    * The known word continues the unknown one (``max_time``, ``temp`` for a command), see `_continues`.
    * Each part of the unknown word begins its counterpart, or the reverse (``num_gen``, ``output_directory``).

    Args:
        word: the unknown word.
        known: the words that there are, with their dashes where they are flags.
        least_prefix: letters that a beginning of a known word has at least.
    """
    names = {_plain(name): name for name in known}  # the dashes that all flags share say nothing
    asked = _plain(str(word))
    rules: tuple[Callable[[str], bool], ...] = (
        lambda name: name.replace("_", "") == asked.replace("_", ""),
        lambda name: _slips(asked, name) == 1 and _is_typo(asked, name),
        lambda name: _slips(asked, name) == 2 and _is_typo(asked, name),
        lambda name: len(asked) >= least_prefix and _continues(asked, name),
        lambda name: _abbreviates(asked, name),
    )
    for rule in rules:
        if found := [name for name in names if rule(name)]:
            return f"; did you mean {names[found[0]]!r}?" if len(found) == 1 else ""
    return ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def _is_typo(word: str, name: str) -> bool:
    """Return whether the slips between two words, one or two, are few enough for their length."""
    length, slips = min(len(word), len(name)), _slips(word, name)
    if length < 3 or slips > (1 if length <= 6 else 2):
        return False
    return word[0] == name[0] or (slips == 1 and (max(len(word), len(name)) >= 5 or word[:2] == name[1::-1]))


def _slips(word: str, name: str) -> int:
    """Return the least number of letters to add, leave out, replace or swap with their neighbour; 3 stands for more."""
    if abs(len(word) - len(name)) > 2:
        return 3
    before: list[int] = []
    row = list(range(len(name) + 1))  # distances of the empty beginning of the word to those of the name
    for i, letter in enumerate(word, start=1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(name, start=1):
            least = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == name[j - 2] and word[i - 2] == wanted:
                least = min(least, last[j - 2] + 1)
            row.append(least)
    return min(row[-1], 3)


def _continues(word: str, name: str) -> bool:
    """Return whether a name goes on where a word ends: after a part of several, by one part, or within its last one.

    ``..._kwargs`` are given to what they continue, so they are something else.
    """
    if not name.startswith(word) or name.endswith("_kwargs"):
        return False
    rest = name[len(word) :]
    return rest.removeprefix("_").count("_") == 0 or ("_" in word and rest.startswith("_"))


def _abbreviates(word: str, name: str) -> bool:
    """Return whether two words have as many parts, more than one, and each part begins its counterpart."""
    parts = list(zip(word.split("_"), name.split("_"), strict=False))
    return (
        word.count("_") == name.count("_") > 0
        and any(len(own) >= LEAST_PART for own, _ in parts)
        and all(
            own == its or (min(len(own), len(its)) >= LEAST_PART and (its.startswith(own) or own.startswith(its)))
            for own, its in parts
        )
    )
