"""The known word that an unknown one was probably meant to be: a typo or an abbreviation of it, never just a relative.

A wrong suggestion is worse than none. So a known word is near in these cases only, and where two are equally near in
the first case that applies, none is:

* It differs in case, dashes and underscores alone (``batchSize``, ``learning-rate``).
* It is a few slips of the keyboard away: a letter missing, added, replaced, or two swapped. Words of 3 to 6 letters may
  have one, longer ones two. The first letter is right, or it is the only slip in a word of 5 letters or more.
* It goes on where the unknown word ends (``max_time``, ``temp`` for a command), see `_continues`.
* Each of its parts is begun by the unknown word's part, or the other way round (``num_gen``, ``output_directory``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

LEAST_PREFIX = 5  # letters, of an option: shorter ones begin foreign words (`save`, `over`)
LEAST_PART = 3  # letters, of an abbreviated part of a word


def nearest(word: object, known: Iterable[str], least_prefix: int = LEAST_PREFIX) -> str:
    """Return ``; did you mean ...?``, or nothing where no known word is near.

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
