"""Writes the reference of the command line from the parser: python scripts/cli_reference.py > docs/cli.md"""

from __future__ import annotations

import argparse

from estune.cli import build_parsers

HEAD = """# Command line

Written by `scripts/cli_reference.py` from the parser. `_` and `-` are the same in an option's name. `train` and `probe`
take `--config FILE` (YAML of the same names) first; flags win over it.
"""


def row(action: argparse.Action) -> str:
    """Return a table row for one option."""
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
    text = " ".join((action.help or "").replace("%%", "%").split()).replace("|", "\\|")
    takes_value = action.option_strings and action.nargs != 0
    values = str(action.metavar or (action.dest.upper() if takes_value else "")).replace("|", "\\|")
    if action.choices and not action.metavar:
        values = "\\|".join(map(str, action.choices))
    return f"| {flags} | {values} | {text} |"


def main() -> None:
    """Print the page."""
    _, commands = build_parsers()
    parts = [HEAD]
    for name, parser in commands.items():
        parts.append(f"## estune {name}\n\n{parser.description}\n")
        shown = [a for a in parser._actions if a.help != argparse.SUPPRESS and "--help" not in a.option_strings]
        if shown:
            parts.append("\n".join(["| option | value | |", "|---|---|---|", *map(row, shown)]) + "\n")
    print("\n".join(parts), end="")


if __name__ == "__main__":
    main()
