"""The known word that an unknown one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: object, known: Iterable[str]) -> str:
    """Return ``; did you mean ...?``, or nothing where no known word is near."""
    bare = {name.lstrip("-"): name for name in known}  # the dashes that all flags share say nothing
    shortened = [name for name in bare if name.startswith(str(word).lstrip("-"))]
    close = shortened or difflib.get_close_matches(str(word).lstrip("-"), list(bare), n=1, cutoff=0.6)
    return f"; did you mean {bare[close[0]]!r}?" if close else ""
