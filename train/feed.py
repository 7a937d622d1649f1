"""Rows and kept features -> batches, in an order that the step number alone decides."""

import jax
import jax.numpy as jnp
import numpy as np

from .data import Rows
from .features import FeatureStore
from .step import Batch


class Feed:
    """Batches of packed rows; with a store they carry their features where these are kept."""

    def __init__(self, rows: Rows, store: FeatureStore | None, *, batch: int, seed: int = 0):
        self.rows = rows
        self.store = store
        self.batch_size = batch
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; an epoch leaves out less than one batch, another each time."""
        return len(self.rows) // self.batch_size

    def row_numbers(self, step: int) -> np.ndarray:
        """The rows of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._order = epoch, generator.permutation(len(self.rows))
        return self._order[1][place * self.batch_size :][: self.batch_size]

    def batch(self, numbers: np.ndarray) -> Batch:
        """The batch of these rows; `features` is None unless all of them are kept."""
        rows = self.rows.take(numbers)
        features = None
        if self.store is not None:
            keys = [rows.key(i) for i in range(len(rows))]
            if all(key in self.store for key in keys):
                features = jnp.asarray(np.stack([self.store.read(key) for key in keys]))
        return Batch(
            tokens=jnp.asarray(rows.tokens),
            segment=jnp.asarray(rows.segment),
            position=jnp.asarray(rows.position),
            weight=jnp.asarray(rows.weight),
            features=features,
        )

    def keep(self, numbers: np.ndarray, features: jax.Array) -> None:
        """Keeps the features that a step computed for these rows."""
        if self.store is None:
            return
        for number, row_features in zip(numbers, np.asarray(features), strict=True):
            self.store.write(self.rows.key(number), row_features)
