"""The rows of each training step."""

from __future__ import annotations

from estune.errors import UserError
from estune.es.population import ROW_PERSON, derive_seed


class Batches:
    """The rows of each step: a pure function of (run seed, step), without replacement within an epoch.

    An epoch is all rows, sorted by a hash of (run seed, epoch, row). Step k takes positions k*B to (k+1)*B - 1 of the
    concatenated epochs.

    Raises:
        UserError: the batch is larger than the dataset.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= n_rows:
            raise UserError(f"batch_size {batch_size} does not fit {n_rows} rows: use --batch_size {n_rows} or fewer")
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self._orders: dict[int, list[int]] = {}  # row orders of the last two epochs; a batch spans at most two

    def rows_for_step(self, step: int) -> list[int]:
        """Return the row ids of a step, (B,)."""
        first = step * self.batch_size
        positions = range(first, first + self.batch_size)
        return [self._order(position // self.n_rows)[position % self.n_rows] for position in positions]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = sorted(
                range(self.n_rows), key=lambda row: derive_seed(self.seed, epoch, row, person=ROW_PERSON)
            )
        return self._orders[epoch]
