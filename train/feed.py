"""Corpus -> batches, in an order that corpus, settings and seed alone decide.

Segments are packed once, in an order drawn from the seed; grain shuffles the rows anew in each
epoch, puts the epochs one after the other and prepares batches ahead in a thread. As rows are known
from the start, so is the number of batches, any batch can be made by its number, and the state of a
feed is how many it has given. Hosts take their rows of the same global batches, however many there
are.

A batch is a dict of arrays [B, T]:
  tokens    int32
  segment   int32, from 1 in each row; 0 is padding
  position  int32, from 0 in each segment
  weight    float32, the loss weight of row i, which predicts token i+1: what the source says for
            that token, learnt or given; 0 for padding, for a segment's first row (no feature comes
            before its token) and for its last (no token comes behind)
  source    int32, the number of the source; 0 for padding
  index     int64, the number of the token in the corpus; -1 for padding
The last batch is filled up with rows of padding, so an epoch holds every token once.
"""

from typing import Any

import grain
import numpy as np

from jax_eagle.config import ConfigError

from .config import DataConfig
from .corpus import Corpus
from .rows import pack

Batch = dict[str, np.ndarray]
AHEAD = 4
"""Batches prepared before they are asked for."""


class Feed:
    """An iterator over batches that can be stopped and gone on with."""

    def __init__(
        self,
        corpus: Corpus,
        config: DataConfig,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """A feed of the training segments.

        Args:
          process_index, process_count: this host's share: rows
            index * B / count to (index + 1) * B / count of each global batch.

        Raises:
          ConfigError: no segments, or a batch that the hosts cannot share evenly.
        """
        if config.batch % process_count:
            raise ConfigError(
                f"a batch of {config.batch} rows over {process_count} hosts: expected a multiple"
            )
        self.rows_per_host = config.batch // process_count
        self._first_row = process_index * self.rows_per_host
        self._corpus, self._config = corpus, config
        self._weight_K2 = np.array(
            [[source.prompt_weight, source.answer_weight] for source in config.sources], np.float32
        )
        segments = np.flatnonzero(~corpus.validation_S)
        if not len(segments):
            raise ConfigError("no segments for training: change validation_share, or add data")
        np.random.default_rng(seed).shuffle(segments)
        self._rows = pack(segments.tolist(), corpus.length_S, config.length)
        rows = grain.MapDataset.range(len(self._rows))
        self._order = rows.shuffle(seed=seed % 2**32).repeat(config.epochs)
        self._identity = {"corpus": corpus.fingerprint, "seed": seed, "batch": config.batch}
        self._batches = grain.MapDataset.range(self.num_batches).map(self.batch)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        self._iterator = iter(self._batches.to_iter_dataset(options))

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    @property
    def num_batches(self) -> int:
        """Batches in all epochs."""
        return -(-len(self._order) // self._config.batch)

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on behind the last batch given: a small JSON object."""
        return {**self._identity, "given": self._iterator.get_state()["next_index"]}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where a feed of the same data stood.

        Raises:
          ConfigError: the state is of other data, another seed or another batch size.
        """
        for name, own in self._identity.items():
            if state.get(name) != own:
                raise ConfigError(f"state of the data: {name} {state.get(name)!r}, here {own!r}")
        if not 0 <= state["given"] <= self.num_batches:
            raise ConfigError(f"state of the data: batch {state['given']} of {self.num_batches}")
        self._iterator.set_state({"next_index": state["given"]})

    def close(self) -> None:
        """Ends the thread that prepares batches."""
        self._iterator.close()

    def batch(self, number: int) -> Batch:
        """This host's rows of a global batch, by the batch's number."""
        shape = (self.rows_per_host, self._config.length)
        tokens, segment, position, source = np.zeros((4, *shape), np.int32)
        weight, index = np.zeros(shape, np.float32), np.full(shape, -1, np.int64)
        batch = {
            "tokens": tokens,
            "segment": segment,
            "position": position,
            "weight": weight,
            "source": source,
            "index": index,
        }
        first = number * self._config.batch + self._first_row
        for place in range(self.rows_per_host):
            if first + place < len(self._order):
                number_of_row = self._order[first + place]
                assert number_of_row is not None  # grain's word for a filtered one: there is none
                row = {name: array[place] for name, array in batch.items()}
                self._fill(row, int(number_of_row))
        return batch

    def _fill(self, row: Batch, number: int) -> None:
        """Writes the segments of a packed row side by side."""
        corpus, begin = self._corpus, 0
        for place, segment in enumerate(self._rows[number], start=1):
            first, end = (int(i) for i in corpus.start_S[segment : segment + 2])
            here = slice(begin, begin + end - first)
            source = corpus.source_S[segment]
            row["tokens"][here] = corpus.tokens_N[first:end]
            row["segment"][here] = place
            row["position"][here] = np.arange(end - first)
            learnt = corpus.learnt_N[first + 2 : end].astype(np.int8)
            row["weight"][begin + 1 : here.stop - 1] = self._weight_K2[source, learnt]
            row["source"][here] = source
            row["index"][here] = np.arange(first, end)
            begin = here.stop
