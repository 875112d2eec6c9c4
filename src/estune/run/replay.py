"""Replay: apply a journal's steps to theta, after a comparison of the base model with the journal's."""

from __future__ import annotations

from collections.abc import Sequence

from estune.console import counted
from estune.errors import UserError
from estune.es.replica import Replica
from estune.es.theta import Moved, checked_moved
from estune.es.types import ParameterSpec
from estune.run.journal import Journal, recorded_update


def check_base(journal: Journal, fingerprint: str, model: str) -> None:
    """Raise UserError if the base model is not the journal's."""
    wanted = journal.header["base"]["fingerprint"]
    if fingerprint != wanted:
        raise UserError(f"model {model} has fingerprint {fingerprint}, the journal was written on {wanted}")


def check_parameters(journal: Journal, specs: Sequence[ParameterSpec]) -> None:
    """Raise UserError if the engine would perturb other parameters than the journal's, or with another noise."""
    words = {False: "none", "full": "full", "lowrank": "lowrank"}
    # Journals of older versions store `true` for full noise.
    stored = {name: "full" if kind is True else kind for name, _, kind in journal.header["parameters"]}
    present = {spec.name: spec.kind for spec in specs}
    for name in sorted(stored.keys() | present.keys()):
        then, now = stored.get(name, False), present.get(name, False)
        if then != now:
            raise UserError(
                f"the noise of {name} was {words[then]} when the journal was written, and is {words[now]} now"
            )


def replay_steps(journal: Journal, replica: Replica, start: int, stop: int) -> Moved | None:
    """Apply the journal's steps ``start`` to ``stop`` - 1 to theta; verify theta's checksum before each step.

    Returns:
        The last update's `Moved`, or None if there is no step.

    Raises:
        UserError: theta does not have the journal's checksum or fingerprint; the message names the step.
    """
    checksum = replica.checksum()
    moved = None
    for record in journal.steps[start:stop]:
        if checksum != record["checksum"]:
            raise UserError(f"theta before step {record['step']} is not what the journal says it was")
        moved = checked_moved(replica.apply(recorded_update(record, journal.header["config"])), replica)
        checksum = moved.checksum
        if record["step"] + 1 < len(journal.steps) and checksum != journal.steps[record["step"] + 1]["checksum"]:
            raise UserError(f"theta after step {record['step']} is not what the journal says it was")
    if stop in journal.checkpoints and replica.fingerprint() != journal.checkpoints[stop]:
        raise UserError(
            f"theta after {counted(stop, 'step')} does not have the journal's fingerprint {journal.checkpoints[stop]}"
        )
    return moved
