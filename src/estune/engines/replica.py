"""The half of a local engine that owns theta: updates, files, and theta_0 of anchored weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from estune.engines.base import ModelAssets
from estune.errors import UserError
from estune.es.theta import AnchorReader, Moved, Theta, digest, pieces
from estune.es.types import GroupJob, ParameterSpec
from estune.es.update import Update
from estune.files import writing
from estune.models.tensor_files import WEIGHTS_FILE, TensorFile, open_model_files, write_tensors


class LocalReplica:
    """Theta in this process; the base class of local engines. See `estune.es.replica.Replica`.

    Subclasses set ``theta``, ``assets``, ``compute_dtype`` and ``stored_dtypes``, and override `forget` where
    something is derived from theta.
    """

    theta: Theta
    assets: ModelAssets
    compute_dtype: str  # float32, bfloat16 or float16
    stored_dtypes: dict[str, str]  # by stored name: some models keep a few tensors in float32 whatever the rest is
    _anchor: AnchorReader | None = None
    _checksum: tuple[int, str] | None = None  # theta's version and checksum

    @property
    def specs(self) -> Sequence[ParameterSpec]:
        """Theta's parameters, in name order."""
        return self.theta.specs

    def forget(self) -> None:
        """Drop what was derived from theta, which has changed."""

    def open_anchor(self, directories: Sequence[Path]) -> bool:
        """Use the first directory that holds theta as it is now as theta_0; see `Replica.open_anchor`."""
        for directory in directories:
            self._anchor = anchor_reader(directory, self.theta)
            if self._anchor is not None:
                return True
        return False

    def apply(self, update: Update) -> Moved:
        """Move theta by one step; see `Replica.apply`."""
        moved = self.theta.apply(update, self._anchor)
        self.forget()
        self._checksum = self.theta.version, moved.checksum
        return moved

    def sums(self) -> dict[str, int]:
        """Return the checksum's sum of every parameter."""
        return self.theta.sums()

    def checksum(self) -> str:
        """Return the checksum of theta, computed from theta as it lies in memory."""
        found = digest(self.theta.specs, self.theta.sums())
        self._checksum = self.theta.version, found
        return found

    def fingerprint(self) -> str:
        """Return the fingerprint of theta."""
        return self.theta.fingerprint()

    def load_weights(self, directory: Path) -> None:
        """Read float32 weights; see `Replica.load_weights`."""
        file = TensorFile(directory / WEIGHTS_FILE)
        for spec in self.specs:
            if spec.name not in file.entries or file.shape(spec.name) != tuple(spec.shape):
                raise UserError(f"{directory} holds no tensor {spec.name!r} of shape {tuple(spec.shape)}")
        self.theta.load(file.read_into)
        self.forget()

    def assign(self, read: Callable[[str], Any]) -> None:
        """Overwrite theta from tensors; see `LocalEngine.assign`."""
        self.theta.assign(read)
        self.forget()

    def assign_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Overwrite theta from arrays; see `LocalEngine.assign_arrays`."""

        def read_into(name: str, flat: np.ndarray) -> None:
            flat[...] = arrays[name].reshape(-1)

        self.theta.load(read_into)
        self.forget()

    def save(self, directory: Path, *, float32: bool) -> None:
        """Write the model as Hugging Face files; see `Replica.save`."""
        directory.mkdir(parents=True, exist_ok=True)
        with writing(directory):
            self.assets.save(directory, "float32" if float32 else self.compute_dtype)
        arrays = self.theta.arrays
        dtypes = dict.fromkeys(arrays, "float32") if float32 else self.stored_dtypes
        write_tensors(directory / WEIGHTS_FILE, arrays, self.theta.buffers, dtypes)

    def checked(self, jobs: Iterable[GroupJob]) -> Iterator[GroupJob]:
        """Yield jobs that are meant for theta as it is.

        Raises:
            ValueError: a job names another theta.
        """
        for job in jobs:
            known = self._checksum
            held = known[1] if known is not None and known[0] == self.theta.version else self.checksum()
            if job.theta_checksum != held:
                raise ValueError(f"a job for theta {job.theta_checksum} reached a replica that holds {held}")
            yield job

    def stop(self) -> None:
        """Do nothing: a local engine holds memory alone."""


def anchor_reader(directory: Path, theta: Theta) -> AnchorReader | None:
    """Return a memory-mapped reader of theta_0 from a model directory's files.

    ``None`` where the files do not hold, under the stored names, the very values that ``theta`` holds now.
    """
    files = open_model_files(directory) if directory.is_dir() else {}

    def read(name: str, start: int, count: int) -> np.ndarray:
        return files[name].read(name, start, count)

    arrays = theta.arrays
    for spec in theta.specs:
        if spec.name not in files or files[spec.name].shape(spec.name) != tuple(spec.shape):
            return None
        if not files[spec.name].is_readable(spec.name):
            return None
        flat = arrays[spec.name].reshape(-1)
        for start, count, _ in pieces(flat.size):
            if not np.array_equal(read(spec.name, start, count), flat[start : start + count]):
                return None
    return read
