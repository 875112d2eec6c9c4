"""`Replica`, the protocol of a full copy of theta: in this process, on a GPU, or in a worker process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from estune.es.theta import Moved
from estune.es.types import ParameterSpec
from estune.es.update import Update


class Replica(Protocol):
    """A full copy of theta in float32 with its files; the journal's updates keep all copies equal.

    An engine is a `Replica`. The engines of this package hold their parameters in an `estune.es.theta.Theta`.
    """

    @property
    def specs(self) -> Sequence[ParameterSpec]:
        """Theta's parameters, in name order."""

    def open_anchor(self, directories: Sequence[Path]) -> bool:
        """Find theta_0, towards which anchored weight decay pulls; call this while theta still is theta_0.

        Later updates read theta_0 from the files of the first directory whose weights equal the current theta.

        Returns:
            Whether one of the directories holds the current theta.
        """

    def load_anchor(self) -> None:
        """Overwrite theta with theta_0 from the files that `open_anchor` found.

        Raises:
            ValueError: no anchor is open.
        """

    def apply(self, update: Update) -> Moved:
        """Move theta by one step.

        Raises:
            ValueError: the update decays towards theta_0, but no anchor is open. Theta is unchanged.
        """

    def sums(self) -> dict[str, int]:
        """Return one 64-bit checksum sum per parameter; `estune.es.theta.digest` hashes the sums into the checksum."""

    @property
    def theta_checksum(self) -> str:
        """The checksum of theta, computed once after each change of theta and then stored."""

    def checksum(self) -> str:
        """Compute the checksum of theta again, from the numbers in memory; 128 bits in hex."""

    def fingerprint(self) -> str:
        """Return the fingerprint of theta: a hash of all its bytes, which identifies saved weights."""

    def load_weights(self, directory: Path) -> None:
        """Overwrite theta with the float32 weights in a directory, as `save` writes them.

        Raises:
            UserError: the file is missing or truncated, or a parameter is absent or has another shape.
        """

    def save(self, directory: Path, *, float32: bool) -> None:
        """Write the model as Hugging Face files: theta in float32, or rounded to the compute dtype.

        Raises:
            UserError: the disk is full.
        """

    def saved(self, directory: Path) -> None:
        """Take note that a checkpoint of the current theta is complete, from which another replica can start."""
