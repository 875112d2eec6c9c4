"""Makes `src/estune/compare/data/words.txt`: the English words that the hacking detector knows.

    python -m pip download --no-deps pyspellchecker==0.9.1 tzdata==2026.6
    python scripts/make_words.py pyspellchecker-0.9.1-*.whl tzdata-2026.6-*.whl > src/estune/compare/data/words.txt

The list holds the frequent words of pyspellchecker's English dictionary, given names included (MIT licence; its text is
beside the list), the countries and cities of the time zone database (public domain), and the words of estune's task
`conciseness`. Counts are not kept. Words of two letters are chosen by hand, because dictionaries list many
abbreviations among them. A single letter counts as no word.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import zipfile

from estune.tasks import conciseness

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


def main() -> None:
    """Print the list."""
    spelling, time_zones = (zipfile.ZipFile(path) for path in sys.argv[1:])
    data = spelling.read("spellchecker/resources/en.json.gz")
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"{sys.argv[1]} holds a different version of the dictionary")
    names = (time_zones.read(f"tzdata/{name}").decode("utf-8") for name in ("zoneinfo/iso3166.tab", "zones"))
    print("\n".join(sorted(frequent(json.loads(gzip.decompress(data))) | places(*names) | task_words() | set(SHORT))))


if __name__ == "__main__":
    main()
