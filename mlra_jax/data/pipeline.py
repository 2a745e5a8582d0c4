"""The input pipeline, from shards to batches on the mesh.

A window is T + 1 consecutive tokens: T inputs and, shifted by one, T targets. A shard of n tokens has (n - 1) // T
windows; window k starts at token k * T. Windows are numbered through all shards, sorted by name. Which window is
sequence i of step s is a pure function of (seed, s, i): there is no iterator state to save, any step can come first,
and each process reads only the rows that its own devices hold, however many processes there are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from grain.experimental import index_shuffle
from jax.sharding import Sharding

from mlra_jax.config import DataConfig
from mlra_jax.data import corpus
from mlra_jax.data.shards import NO_TOKEN, ArrayShards, DataError, Shards, Split, open_shards
from mlra_jax.data.tokenizers import get_tokenizer

IGNORED = NO_TOKEN
"""Target of a position without one; it is left out of the loss and of the token count."""

Batch = dict[str, jax.Array]
"""`inputs` and `targets`, int32, of one shape and sharding."""


class Windows:
    """All windows of T + 1 tokens of some shards.

    Args:
      shards: The shards in order.
      seq_len: T.
      vocab_size: Ids must be below it.
      tails: Include the remainder of each shard as a shorter window, if it holds a target.

    Raises:
      DataError: there is not a single window, or (also when reading) an id is not below `vocab_size`.
    """

    def __init__(self, shards: Shards, seq_len: int, vocab_size: int, *, tails: bool = False):
        self._shards, self._seq_len, self._vocab_size = shards, seq_len, vocab_size
        missing = seq_len - 1 if tails else 0  # targets that a window may lack
        self.per_shard = np.array([(max(n - 1, 0) + missing) // seq_len for n in shards.n_tokens])
        """Windows in each shard."""
        self._ends = np.cumsum(self.per_shard)
        if not len(self):
            if tails:
                raise DataError(
                    f"{shards.names[0]}: no shard here holds two tokens, one to predict the other."
                )
            raise DataError(
                f"No shard holds the {seq_len + 1} tokens (data.seq_len + 1) of one window; the longest of "
                f"{len(shards.names)}, {shards.names[0]} the first, has {max(shards.n_tokens)}."
            )
        self.read([0])  # a vocabulary that does not fit shows before anything is compiled

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def seq_len(self) -> int:
        """T."""
        return self._seq_len

    def first_of_shard(self, shard: int) -> int:
        """Number of the shard's first window."""
        return int(self._ends[shard] - self.per_shard[shard])

    def read(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The windows with these numbers, int32 [n, T + 1]; -1 past the end of a shard."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        starts = (np.asarray(numbers) - self._ends[shards] + self.per_shard[shards]) * self._seq_len
        spans = list(zip(shards.tolist(), starts.tolist(), strict=True))
        tokens = self._shards.read(spans, self._seq_len + 1)
        if tokens.size and tokens.max() >= self._vocab_size:
            row, column = np.unravel_index(tokens.argmax(), tokens.shape)
            shard, start = spans[row]
            raise DataError(
                f"{self._shards.names[shard]}: token {start + column} is id {tokens[row, column]}, but "
                f"model.vocab_size={self._vocab_size}; the shards were made with another tokenizer."
            )
        return tokens


def open_windows(config: DataConfig, split: Split, vocab_size: int) -> Windows:
    """Opens the windows of one split of the data of `config`.

    Raises:
      DataError, ValueError: the data cannot be used; says why.
    """
    return Windows(open_part(config, split, vocab_size), config.seq_len, vocab_size)


def open_part(config: DataConfig, split: Split, vocab_size: int) -> Shards:
    """Opens the shards of one split of the data of `config`.

    Raises:
      DataError, ValueError: the data cannot be used; says why.
    """
    if config.path != "embedded":
        return open_shards(config.path, split, config.verify, config.tokenizer)
    tokenizer = get_tokenizer(config.tokenizer)
    if tokenizer.n_vocab > vocab_size:
        raise DataError(
            f"data.tokenizer={config.tokenizer} has {tokenizer.n_vocab} ids, but model.vocab_size={vocab_size}; "
            "the vocabulary must hold them all."
        )
    tokens = corpus.tokens(tokenizer, split)
    return ArrayShards([f"the embedded corpus ({split})"], [tokens])


class TrainBatches:
    """The training sequences of every step, in the order of `config.order`.

    Args:
      config: What to read, and how.
      vocab_size: Ids must be below it.
      seed: Shuffling seed.

    Raises:
      DataError, ValueError: the data cannot be used; says why.
    """

    def __init__(self, config: DataConfig, vocab_size: int, seed: int):
        self.config = config
        self._windows = open_windows(config, "train", vocab_size)
        self._seed = seed
        if config.order == "official":
            ranks = config.official_ranks
            self._ranks = [_RankFiles(self._windows, rank, ranks) for rank in range(ranks)]
            if idle := [str(rank) for rank, files in enumerate(self._ranks) if not files.n_windows]:
                raise DataError(
                    f"data.order=official deals {len(self._windows.per_shard)} training shards to "
                    f"data.official_ranks={ranks}, which leaves rank(s) {', '.join(idle)} without a window; use fewer "
                    "ranks or another order."
                )

    @property
    def n_windows(self) -> int:
        """Number of windows in one epoch."""
        return len(self._windows)

    def window_number(self, step: int, sequence: int) -> int:
        """The window that is sequence `sequence` (0 to global_batch - 1) of step `step`."""
        config = self.config
        if config.order == "official":
            # As the paper's PyTorch code: rank r has its own files and takes its windows one after the other, a fixed
            # number of them (the micro-steps of accumulation, one sequence each) in every step.
            per_rank = config.global_batch // config.official_ranks
            rank, micro_step = divmod(sequence, per_rank)
            return self._ranks[rank].window_number(step * per_rank + micro_step)
        epoch, k = divmod(step * config.global_batch + sequence, self.n_windows)
        if config.order == "sequential":
            return k
        return index_shuffle(k, max_index=self.n_windows - 1, seed=_epoch_seed(self._seed, epoch), rounds=4)

    def rows(self, step: int, sequences: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """The sequences of a step (None: all of them) as windows, int32 [n, T + 1]."""
        chosen = range(self.config.global_batch) if sequences is None else sequences
        return self._windows.read([self.window_number(step, int(i)) for i in chosen])

    def device_batches(self, sharding: Sharding, accumulation: int, start_step: int = 0) -> BatchIterator:
        """Device batches of steps `start_step`, `start_step` + 1, ..., prefetched by threads.

        Args:
          sharding: Sharding of the arrays, int32 [accumulation, global_batch / accumulation, T]. Sequence i of the
            step is at [i // micro, i % micro] with micro = global_batch / accumulation.
          accumulation: Micro-batches in one step; divides `global_batch`.
          start_step: The first step.

        Returns:
          An endless iterator of {"inputs", "targets"}. Close it, or use it as a context manager, to end its threads.
        """
        config = self.config
        assert config.global_batch % accumulation == 0, (config.global_batch, accumulation)
        shape = (accumulation, config.global_batch // accumulation, config.seq_len)
        place = Placement(sharding, shape)
        # Grain numbers what it reads from 0; the step of number k is start_step + k.
        steps = grain.MapDataset.range(start_step, start_step + 2**40)
        options = grain.ReadOptions(
            num_threads=min(config.read_threads, config.prefetch), prefetch_buffer_size=config.prefetch
        )
        dataset = steps.map(lambda step: self.rows(step, place.sequences)).to_iter_dataset(options)
        rows = iter(dataset)
        rows.start_prefetch()  # the first batches are read while the step is compiled
        return BatchIterator(rows, place)


class BatchIterator(Iterator[Batch]):
    """Puts host rows on the devices; `close` ends the prefetching threads."""

    def __init__(self, rows: grain.DatasetIterator, place: Placement):
        self._rows, self._place = rows, place

    def __next__(self) -> Batch:
        windows = next(self._rows)
        return self._place(windows[:, :-1], windows[:, 1:])

    def close(self) -> None:
        """Ends the threads; the iterator cannot be used afterwards."""
        self._rows.close()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EvalBatches:
    """A fixed sequence of consecutive windows to evaluate.

    Args:
      windows: Windows of the shards.
      n_sequences: How many to take; all, if there are fewer.
      first: Number of the first one.
    """

    def __init__(self, windows: Windows, n_sequences: int, first: int = 0):
        self._windows, self._first = windows, first
        self.n_sequences = min(n_sequences, len(windows) - first)
        """Number of windows in one evaluation."""

    @classmethod
    def held_out(cls, config: DataConfig, vocab_size: int, n_sequences: int) -> EvalBatches:
        """The windows of a run's validation shards.

        Args:
          config: What to read.
          vocab_size: Ids must be below it.
          n_sequences: How many to take; all, if there are fewer.

        Raises:
          DataError, ValueError: the data cannot be used; says why.
        """
        return cls(open_windows(config, "val", vocab_size), n_sequences)

    def device_batches(self, sharding: Sharding, accumulation: int, micro_batch: int) -> Iterator[Batch]:
        """All windows in order, once, as device batches.

        Args:
          sharding: Sharding of the arrays, int32 [accumulation, micro_batch, T]. Sequence i of a batch is at
            [i // micro_batch, i % micro_batch].
          accumulation: Micro-batches in a batch.
          micro_batch: Sequences in each. The last batch, and windows cut short by the end of a shard, are padded with
            targets of -1.
        """
        seq_len = self._windows.seq_len
        place = Placement(sharding, (accumulation, micro_batch, seq_len))
        for first in range(0, self.n_sequences, accumulation * micro_batch):
            numbers = first + place.sequences
            windows = np.full((len(numbers), seq_len + 1), IGNORED, np.int32)
            real = numbers < self.n_sequences
            windows[real] = self._windows.read(self._first + numbers[real])
            yield place(np.maximum(windows[:, :-1], 0), windows[:, 1:])


def one_ahead(results: Iterable[Any]) -> Iterator[Any]:
    """The results of device computations on the host, each fetched once the next one has been started."""
    started = iter(results)
    for pending in started:
        for following in started:
            yield jax.device_get(pending)
            pending = following
        yield jax.device_get(pending)


class Placement:
    """Lays out rows of T tokens as sharded arrays [accumulation, micro, T]; knows which rows this process needs.

    Row i of a batch is at [i // micro, i % micro].
    """

    def __init__(self, sharding: Sharding, shape: tuple[int, int, int]):
        self._sharding, self._shape = sharding, shape
        self._numbers = np.arange(shape[0] * shape[1]).reshape(shape[:2])
        indices = sharding.addressable_devices_indices_map(shape).values()
        needed = [self._numbers[index[:2]].ravel() for index in indices if index is not None]
        self.sequences = np.unique(np.concatenate(needed))
        """Sequences on this process's devices, ascending."""

    def __call__(self, inputs: np.ndarray, targets: np.ndarray) -> Batch:
        """Makes a batch from the rows numbered `sequences`, both int32 [n, T]."""
        return {"inputs": self._put(inputs), "targets": self._put(targets)}

    def _put(self, rows: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            positions = np.searchsorted(self.sequences, self._numbers[index[:2]])
            return np.ascontiguousarray(rows[:, index[2]][positions])

        return jax.make_array_from_callback(self._shape, self._sharding, shard)


class _RankFiles:
    """What one rank of the paper's PyTorch code reads: training files rank, rank + ranks, ..., in order, cyclically."""

    def __init__(self, windows: Windows, rank: int, ranks: int):
        counts = windows.per_shard[rank::ranks]
        self._ends = np.cumsum(counts)
        self._firsts = [windows.first_of_shard(shard) for shard in range(rank, len(windows.per_shard), ranks)]
        self.n_windows = int(counts.sum())

    def window_number(self, k: int) -> int:
        """The number of the k-th window that the rank reads."""
        k %= self.n_windows
        file = int(np.searchsorted(self._ends, k, side="right"))
        before = int(self._ends[file - 1]) if file else 0
        return self._firsts[file] + k - before


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    """A 32-bit hash of (seed, epoch)."""
    return int(np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1)[0])
