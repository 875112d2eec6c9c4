"""A replica of theta, wherever it lives: in this process, on a GPU, or in a worker process."""

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
        """Use the first directory whose files hold theta as it is now as theta_0 of anchored weight decay.

        Returns:
            Whether one of them does. Theta_0 is read from the files whenever an update needs it.
        """

    def apply(self, update: Update) -> Moved:
        """Move theta by one step.

        Raises:
            ValueError: the update decays towards theta_0 and no anchor is open; theta has not moved then.
        """

    def sums(self) -> dict[str, int]:
        """Return the checksum's sum of every parameter; `estune.es.theta.digest` makes the checksum of them."""

    def checksum(self) -> str:
        """Return the checksum of theta."""

    def fingerprint(self) -> str:
        """Return the fingerprint of theta."""

    def load_weights(self, directory: Path) -> None:
        """Read theta from a directory that holds float32 weights.

        Raises:
            UserError: the file is missing or truncated, or it holds other tensors.
        """

    def save(self, directory: Path, *, float32: bool) -> None:
        """Write the model as Hugging Face files: theta itself, or cast once to the compute dtype.

        Raises:
            UserError: no space left.
        """
