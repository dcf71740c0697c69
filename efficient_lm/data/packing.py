"""Documents one after another, cut into rows: every token is kept, and where a run stands is a few integers per row.

Meta tokens (https://arxiv.org/abs/2411.13676) come before every document, and again where one goes on in the next row:
whatever part of it a row holds begins with them. They are read and not predicted, so that every target is there once,
and a position in the documents is the same with them and without.

Row r of the global batch is a stream of its own. It takes the documents r, r + B, r + 2B, ... of each source's shuffled
order (B rows), whichever host feeds it, so the batches do not depend on how many hosts there are.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Integer

from efficient_lm.data.batch import Batch
from efficient_lm.data.corpus import Corpus, digest

type Piece = Integer[np.ndarray, "_"]  # A stretch of bos + document + eos: one more token than there are targets in it.


def _fill_row(batch: Batch, row: int, next_piece: Callable[[int], Piece | None], meta_tokens: Sequence[int]) -> None:
    """Fills a row. `next_piece(n)` goes on with the current document for at most n targets, or begins the next one.

    Where there is no room for meta tokens and a target, padding is left.
    """
    begin, segment, length, num_meta = 0, 0, batch.tokens.shape[1], len(meta_tokens)
    while begin + num_meta < length and (piece := next_piece(length - begin - num_meta)) is not None:
        first, segment = begin + num_meta, segment + 1
        end = first + len(piece) - 1
        batch.tokens[row, begin:first], batch.targets[row, begin:first] = meta_tokens, -1
        batch.tokens[row, first:end], batch.targets[row, first:end] = piece[:-1], piece[1:]
        batch.segment_ids[row, begin:end] = segment
        begin = end


def _empty_batch(num_rows: int, seq_len: int) -> Batch:
    return Batch(*(np.zeros((num_rows, seq_len), np.int32) for _ in range(3)))


def see_each_other(batch: Batch) -> Batch:
    """Makes the documents of a row one segment."""
    return Batch(batch.tokens, batch.targets, np.minimum(batch.segment_ids, 1))


class PackedRows:
    """Endless batches of some rows of the global batch, one packed stream per row.

    A row goes on with the source that is furthest behind its share of tokens, counted in tokens whatever the length of
    the documents. The state of a row is: its source, how far it is in the document, and for each source how many
    documents and tokens it has taken.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        weights: Sequence[float],
        *,
        rows: Sequence[int],
        batch_size: int,
        seq_len: int,
        seed: int,
        meta_tokens: Sequence[int] = (),
    ):
        self._corpora = corpora
        self._weights = np.array(weights, np.float64)
        self._rows = rows
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._seed = seed
        self._meta_tokens = meta_tokens
        # A row enters each source's sequence of documents at random, or all rows would begin with the same source.
        mean_lengths = np.array([corpus.num_targets / len(corpus) for corpus in corpora])
        starts = [[_seed(seed, row, source, "head start") / 2**32 for source in range(len(corpora))] for row in rows]
        self._head_starts = np.array(starts) * mean_lengths
        self._source = np.zeros(len(rows), np.int64)
        self._offset = np.zeros(len(rows), np.int64)
        self._documents = np.zeros((len(rows), len(corpora)), np.int64)
        self._tokens = np.zeros((len(rows), len(corpora)), np.int64)
        self._current = [self._begin_document(i) for i in range(len(rows))]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = _empty_batch(len(self._rows), self._seq_len)
        for i in range(len(self._rows)):
            _fill_row(batch, i, lambda size, i=i: self._next_piece(i, size), self._meta_tokens)
        return batch

    def _next_piece(self, i: int, size: int) -> Piece:
        corpus = self._corpora[self._source[i]]
        if self._offset[i] > corpus.lengths[self._current[i]]:
            self._current[i] = self._begin_document(i)
            corpus = self._corpora[self._source[i]]
        start = int(self._offset[i])
        piece = corpus.read(self._current[i], start, start + size + 1)
        self._offset[i] += len(piece) - 1
        return piece

    def _begin_document(self, i: int) -> int:
        source = int(np.argmin((self._head_starts[i] + self._tokens[i]) / self._weights))
        self._source[i], self._offset[i] = source, 0
        self._documents[i, source] += 1
        document = self._current_document(i)
        self._tokens[i, source] += self._corpora[source].lengths[document] + 1
        return document

    def _current_document(self, i: int) -> int:
        # A bijection on the documents, another one in each epoch: nothing to keep in memory or in a checkpoint.
        source = int(self._source[i])
        number = self._rows[i] + (int(self._documents[i, source]) - 1) * self._batch_size
        epoch, number = divmod(number, len(self._corpora[source]))
        last = len(self._corpora[source]) - 1
        return index_shuffle(number, max_index=last, seed=_seed(self._seed, source, epoch), rounds=4)

    def get_state(self) -> dict[int, list[int]]:
        """Returns the state of each row, by its number in the global batch."""
        columns = [self._source[:, None], self._offset[:, None], self._documents, self._tokens]
        return dict(zip(self._rows, np.concatenate(columns, axis=1).tolist(), strict=True))

    def set_state(self, state: dict[int, list[int]]) -> None:
        """Goes to where `state` was taken; it may hold rows of other hosts too."""
        columns = np.array([state[row] for row in self._rows], np.int64)
        self._source, self._offset = columns[:, 0].copy(), columns[:, 1].copy()
        self._documents, self._tokens = (part.copy() for part in np.split(columns[:, 2:], 2, axis=1))
        self._current = [self._current_document(i) for i in range(len(self._rows))]


def _seed(*what: int | str) -> int:
    """Returns 32 bits that look random: the same on every machine and with every version of NumPy."""
    return digest(repr(what).encode()) % 2**32


class ValidationBatches:
    """All documents once, one after another, cut into rows; the last batch is filled up with padding.

    A row goes on where the one before it ended, so a loss over all batches does not depend on the batch size.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        *,
        rows: Sequence[int],
        batch_size: int,
        seq_len: int,
        document_mask: bool,
        meta_tokens: Sequence[int] = (),
    ):
        self._corpora = corpora
        self._rows = rows
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._document_mask = document_mask
        self._meta_tokens = meta_tokens
        # In the order of their digests: the first batches are a fair sample of all sources.
        keys = np.concatenate([corpus.digests for corpus in corpora])
        order = np.argsort(keys, kind="stable")
        self._source = np.repeat(np.arange(len(corpora)), [len(corpus) for corpus in corpora])[order]
        self._document = np.concatenate([np.arange(len(corpus)) for corpus in corpora])[order]
        self._ends = np.cumsum(np.concatenate([corpus.lengths for corpus in corpora])[order] + 1)

    def __len__(self) -> int:
        return -(-sum(1 for _ in self._row_starts()) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for starts in itertools.batched(self._row_starts(), self._batch_size):
            batch = _empty_batch(len(self._rows), self._seq_len)
            for i, row in enumerate(self._rows):
                if row < len(starts):
                    _fill_row(batch, i, self._pieces_from(starts[row]), self._meta_tokens)
            yield batch if self._document_mask else see_each_other(batch)

    def contents(self) -> Iterator[Integer[np.ndarray, "_"]]:
        """Yields the tokens of the documents, in order."""
        for source, document in zip(self._source, self._document, strict=True):
            yield self._corpora[source].content(int(document))

    def _row_starts(self) -> Iterator[int]:
        """Yields which of all targets each row begins with."""
        num_meta, ends, position = len(self._meta_tokens), self._ends, 0
        # Where documents would end if they lay in one long row.
        slots = ends + num_meta * np.arange(1, len(ends) + 1)
        while position < ends[-1]:
            yield position
            going_on = int(np.searchsorted(ends, position, side="right"))
            past = position + num_meta * going_on  # The same of the slots before this row.
            num_ended = int(np.searchsorted(slots, past + self._seq_len, side="right"))
            room = self._seq_len
            if num_ended > going_on:
                position, room = int(ends[num_ended - 1]), room - int(slots[num_ended - 1]) + past
            position += max(room - num_meta, 0)

    def _pieces_from(self, position: int) -> Callable[[int], Piece | None]:
        def next_piece(size: int) -> Piece | None:
            nonlocal position
            n = int(np.searchsorted(self._ends, position, side="right"))
            if n == len(self._ends):
                return None
            start = position - (int(self._ends[n - 1]) if n else 0)
            piece = self._corpora[self._source[n]].read(int(self._document[n]), start, start + size + 1)
            position += len(piece) - 1
            return piece

        return next_piece
