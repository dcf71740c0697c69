"""What models of the study read: text, pairs to be recalled, and needles in text.

All are rows of `length + 1` tokens, of which each is to be predicted from those before it. Recall gives pairs of key
and value, then the same pairs again and again in random order (after Zoology, https://arxiv.org/abs/2312.04927). A
needle is a mark and a value that stand somewhere in a text; at a later mark, the value is asked for.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, Integer

from efficient_lm.data import Batch, DataConfig, TrainBPEConfig
from efficient_lm.data.corpus import Corpus

type Task = Literal["text", "recall"]
NUM_KEYS = 16
NUM_SYNTHETIC = 1 + 2 * NUM_KEYS  # The mark, keys, values: tokens that follow those of text.
PAIRS = (1, 2, 4, 8)  # Of a row of recall.
NUM_NEEDLES = 4  # Times that the needle stands in a row that is trained on.


@dataclasses.dataclass(frozen=True)
class Text:
    training: Integer[np.ndarray, "_"]
    held_out: Integer[np.ndarray, "_"]
    vocab_size: int

    @property
    def mark(self) -> int:
        return self.vocab_size

    @property
    def keys(self) -> Integer[np.ndarray, "n"]:
        return 1 + self.vocab_size + np.arange(NUM_KEYS)

    @property
    def values(self) -> Integer[np.ndarray, "n"]:
        return self.keys + NUM_KEYS


def load_text(folder: pathlib.Path, vocab_size: int, data: DataConfig) -> Text:
    """Returns all documents as two streams, one to train on; tokens are kept in the folder."""
    data = dataclasses.replace(data, tokenizer=TrainBPEConfig(vocab_size=vocab_size))
    built = data.build(run_dir=folder, batch_size=1, seq_len=1, seed=0)
    return Text(_stream(built.training), _stream(built.held_out), vocab_size)


def _stream(corpora: Sequence[Corpus]) -> Int32[np.ndarray, "_"]:
    return np.concatenate([c.read(i, 0, int(c.lengths[i]) + 2) for c in corpora for i in range(len(c))])


def windows(
    rng: np.random.Generator, stream: Integer[np.ndarray, "_"], num_rows: int, length: int
) -> Int32[np.ndarray, "B T"]:
    starts_B = rng.integers(0, len(stream) - length, num_rows)
    return stream[starts_B[:, None] + np.arange(length + 1)].astype(np.int32)


def recall(
    rng: np.random.Generator, text: Text, num_pairs_B: Integer[np.ndarray, "B"], length: int
) -> Int32[np.ndarray, "B T"]:
    rows_BT = np.zeros((len(num_pairs_B), length + 2 - length % 2), np.int32)
    for row, n in zip(rows_BT, num_pairs_B, strict=True):
        asked = np.concatenate([np.arange(n), rng.integers(0, n, len(row) // 2 - n)])
        row[::2], row[1::2] = rng.permutation(text.keys)[:n][asked], rng.permutation(text.values)[:n][asked]
    return rows_BT[:, : length + 1]


def answers(num_pairs: int, length: int) -> Bool[np.ndarray, "T"]:
    """Says at which tokens of a row of recall the next one is known."""
    at_T = np.arange(length)
    return (at_T % 2 == 0) & (at_T >= 2 * num_pairs)


def needles(
    rng: np.random.Generator, text: Text, rows_BT: Int32[np.ndarray, "B T"], places_BK: Integer[np.ndarray, "B K"]
) -> Int32[np.ndarray, "B T"]:
    """Returns the rows with the mark at the places of each, and behind it the row's value."""
    rows_BT, at_B1 = rows_BT.copy(), np.arange(len(rows_BT))[:, None]
    rows_BT[at_B1, places_BK] = text.mark
    rows_BT[at_B1, places_BK + 1] = rng.choice(text.values, len(rows_BT))[:, None]
    return rows_BT


def training_batch(rng: np.random.Generator, text: Text, task: Task, batch_size: int, length: int) -> Batch:
    """Returns a batch of text; or of recall, with needles in text in a quarter of the rows."""
    if task == "text":
        return batch(windows(rng, text.training, batch_size, length))
    B = batch_size // 4
    places_BK = 2 * np.sort([rng.permutation(length // 2)[:NUM_NEEDLES] for _ in range(B)], axis=1)
    rows = (
        recall(rng, text, rng.choice(PAIRS, batch_size - B), length),
        needles(rng, text, windows(rng, text.training, B, length), places_BK),
    )
    return batch(np.concatenate(rows))


def batch(rows_BT: Int32[np.ndarray, "B T"]) -> Batch:
    return Batch(rows_BT[:, :-1], rows_BT[:, 1:], np.ones_like(rows_BT[:, 1:]))
