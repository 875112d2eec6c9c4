"""The protocol of a replica of theta: in this process, on a GPU, or in a worker process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from estune.es.theta import Moved
from estune.es.types import ParameterSpec
from estune.es.update import Update


class Replica(Protocol):
    """Owns a full float32 theta and applies the journal's updates to it."""

    @property
    def specs(self) -> Sequence[ParameterSpec]:
        """Theta's parameters, in name order."""

    def open_anchor(self, directories: Sequence[Path]) -> bool:
        """Take theta_0 of anchored weight decay from the first directory whose weights equal the current theta.

        Later updates read theta_0 from these files.

        Returns:
            Whether a directory holds the current theta.
        """

    def apply(self, update: Update) -> Moved:
        """Move theta by one step.

        Raises:
            ValueError: the update decays towards theta_0, but no anchor is open. Theta is unchanged.
        """

    def sums(self) -> dict[str, int]:
        """Return the sum of every parameter; `estune.es.theta.digest` hashes the sums into the checksum."""

    @property
    def theta_checksum(self) -> str:
        """The checksum of theta since its last change; `checksum` computes it again from memory."""

    def checksum(self) -> str:
        """Return the checksum of theta."""

    def fingerprint(self) -> str:
        """Return the fingerprint of theta."""

    def load_weights(self, directory: Path) -> None:
        """Read theta from a directory that holds float32 weights.

        Raises:
            UserError: the file is missing or truncated, or lacks a parameter of the right shape.
        """

    def save(self, directory: Path, *, float32: bool) -> None:
        """Write the model as Hugging Face files: theta in float32, or cast once to the compute dtype.

        Raises:
            UserError: the disk is full.
        """
