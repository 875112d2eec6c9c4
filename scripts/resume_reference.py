"""Write the rules of a resume, `docs/resuming.md`: python scripts/resume_reference.py > docs/resuming.md"""

from estune.run.resume import table

HEAD = """# Resuming a run

Written by `scripts/resume_reference.py` from the rules that a resume follows (`estune.run.resume`).

A run that was stopped, killed, or finished with too few steps continues with

    estune train --resume --output_dir RUN

and ends in the same bytes as a run that was never interrupted. For that it has to be the same run: the same weights to
begin with, the same rows, the same rewards. What a run is made of is compared **by what it is, not by its name**: a
model may have moved, a dataset may be a copy, a reward file may have another comment. `origin.json` in the run
directory remembers where every name led to. So a run is resumed, replayed and evaluated from any directory, also after
it was moved together with its files.

What is damaged is said in one warning, and does not end the run while the journal and the base model are whole: the
newest checkpoint that holds what its fingerprint says is the start, the journal rebuilds the rest, and damaged
checkpoints are written again.

## What is compared

*Refused*: the resume ends with one sentence that names the difference, and the run stays as it was. *Warned*: the run
continues with one warning.

"""
TAIL = """
Files that a reward reads, and objects in it that are no plain values (a loaded model, a client), are not compared. Runs
of an older estune are compared by what they wrote down; where values of a column are not in it, a warning says so.
"""


def main() -> None:
    """Print the page."""
    print(HEAD + table() + TAIL, end="")


if __name__ == "__main__":
    main()
