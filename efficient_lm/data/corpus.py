"""Documents as one flat array of tokens with an index, made once and kept on disk."""

import array
import dataclasses
import hashlib
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Integer, Shaped, UInt64
from rich.console import Console

from efficient_lm.data.tokenizers import Tokenizer


def digest(content: bytes) -> int:
    """Returns 64 bits that depend on the content only: the same on every machine, whatever a file is called."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def held_out(digests: UInt64[np.ndarray, "*n"], fraction: float) -> Bool[np.ndarray, "*n"]:
    """Says which documents are for validation. Copies of a document fall on the same side."""
    return digests < np.uint64(int(fraction * 2**64))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Document i is `tokens[starts[i] : starts[i] + lengths[i]]`; bos and eos are put around it when it is read."""

    tokens: Shaped[np.ndarray, "_"]
    starts: Integer[np.ndarray, "n"]
    lengths: Integer[np.ndarray, "n"]
    digests: UInt64[np.ndarray, "n"]
    bos_id: int
    eos_id: int

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_targets(self) -> int:
        """Returns how many tokens there are to predict: those of the documents and an eos for each."""
        return int(self.lengths.sum()) + len(self)

    def select(self, which: Shaped[np.ndarray, "_"]) -> "Corpus":
        """Returns the documents that a mask or an array of indices picks."""
        return dataclasses.replace(
            self, starts=self.starts[which], lengths=self.lengths[which], digests=self.digests[which]
        )

    def content(self, i: int) -> Shaped[np.ndarray, "_"]:
        """Returns the tokens of document i, without bos and eos."""
        return self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]]

    def read(self, i: int, start: int, stop: int) -> Int32[np.ndarray, "_"]:
        """Returns bos + document i + eos, from position `start` up to `stop` or the end."""
        length = int(self.lengths[i])
        first = int(self.starts[i]) - 1  # Where bos would stand.
        body = self.tokens[first + max(start, 1) : first + min(stop, length + 1)]
        bos = [self.bos_id] if start == 0 else []
        eos = [self.eos_id] if stop >= length + 2 else []
        return np.concatenate([bos, body, eos], dtype=np.int32, casting="unsafe")


def from_texts(texts: Iterable[bytes], tokenizer: Tokenizer, *, name: str, stamp: str, cache_dir: Path) -> Corpus:
    """Tokenises texts, or takes what was kept in `cache_dir` for the same stamp and tokenizer.

    Args:
      texts: the documents; those without a byte are left out.
      name: what to call them in messages.
      stamp: says which version of which files they are.
    """
    index_file = _index_file(cache_dir, stamp, tokenizer)
    data_file = index_file.with_suffix(".bin")
    if not index_file.exists():
        _tokenise(texts, tokenizer, name=name, data_file=data_file, index_file=index_file)
    return _load(np.memmap(data_file, tokenizer.dtype, mode="r"), index_file, tokenizer)


def from_tokens(
    tokens: Integer[np.ndarray, "_"], tokenizer: Tokenizer, *, name: str, stamp: str, cache_dir: Path
) -> Corpus:
    """Returns the documents of a flat array in which every document ends with eos; a bos in front is optional."""
    index_file = _index_file(cache_dir, stamp, tokenizer)
    if not index_file.exists():
        _find_documents(tokens, tokenizer, name=name, index_file=index_file)
    return _load(tokens, index_file, tokenizer)


def _index_file(cache_dir: Path, stamp: str, tokenizer: Tokenizer) -> Path:
    cache_dir.mkdir(parents=True, exist_ok=True)
    return cache_dir / f"{digest(f'{stamp}|{tokenizer.fingerprint}'.encode()):016x}.npy"


def _load(tokens: Integer[np.ndarray, "_"], index_file: Path, tokenizer: Tokenizer) -> Corpus:
    starts, lengths, digests = np.load(index_file, mmap_mode="r")
    return Corpus(
        tokens=tokens,
        starts=starts.view(np.int64),
        lengths=lengths.view(np.int64),
        digests=digests,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def _save_index(
    index_file: Path,
    starts: Integer[np.ndarray, "n"],
    lengths: Integer[np.ndarray, "n"],
    digests: UInt64[np.ndarray, "n"],
    *,
    name: str,
) -> None:
    if not len(starts):
        raise ValueError(f"{name} holds no text; point it at documents that are not empty")
    partial = _partial(index_file)
    with partial.open("wb") as file:
        np.save(file, np.stack([starts.astype(np.uint64), lengths.astype(np.uint64), digests]))
    partial.replace(index_file)


def _partial(file: Path) -> Path:
    """Several hosts may share the folder, and a run may be killed: files appear whole, the index last."""
    return file.with_suffix(f".{platform.node()}.{os.getpid()}.partial")


def _tokenise(texts: Iterable[bytes], tokenizer: Tokenizer, *, name: str, data_file: Path, index_file: Path) -> None:
    lengths, digests = array.array("Q"), array.array("Q")
    partial = _partial(data_file)
    with partial.open("wb") as file:
        for batch in _batches(_show_progress(texts, f"tokenising {name}")):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                file.write(ids.astype(tokenizer.dtype).tobytes())
                lengths.append(len(ids))
                digests.append(digest(text))
    partial.replace(data_file)
    lengths = np.array(lengths, np.int64)
    _save_index(index_file, np.cumsum(lengths) - lengths, lengths, np.array(digests, np.uint64), name=name)


def _find_documents(tokens: Integer[np.ndarray, "_"], tokenizer: Tokenizer, *, name: str, index_file: Path) -> None:
    ends, chunk = [], 1 << 24
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        for extreme in (part.max(), part.min()):
            if not 0 <= extreme < tokenizer.vocab_size:
                raise ValueError(
                    f"{name} holds token {extreme}, but the tokenizer has {tokenizer.vocab_size} tokens; "
                    "give the tokenizer (and dtype) that it was written with"
                )
        ends.append(start + np.flatnonzero(part == tokenizer.eos_id))
    ends = np.concatenate([*ends, [len(tokens)]]).astype(np.int64)
    if len(ends) == 1:
        raise ValueError(f"{name} has no end of document (token {tokenizer.eos_id}); write one after each document")
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    if tokenizer.bos_id != tokenizer.eos_id:
        inside = starts < len(tokens)
        starts[inside] += tokens[starts[inside]] == tokenizer.bos_id
    starts, ends = starts[ends > starts], ends[ends > starts]
    # Hashed as uint32, so that a document falls on the same side whatever type it was written in.
    contents = (tokens[start:end].astype("<u4").tobytes() for start, end in zip(starts, ends, strict=True))
    digests = np.fromiter(map(digest, _show_progress(contents, f"indexing {name}")), np.uint64, len(starts))
    _save_index(index_file, starts, ends - starts, digests, name=name)


def _batches(texts: Iterable[bytes], num_bytes: int = 1 << 20) -> Iterator[list[bytes]]:
    """Gathers documents for the tokenizer's threads; empty ones are left out."""
    batch, size = [], 0
    for text in texts:
        if text:
            batch.append(text)
            size += len(text)
        if size >= num_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _show_progress(texts: Iterable[bytes], what: str) -> Iterator[bytes]:
    """Tells a terminal how far it is, if it takes more than a second."""
    begin, size = time.monotonic(), 0
    status = Console(stderr=True).status(what)
    try:
        for text in texts:
            size += len(text)
            if (seconds := time.monotonic() - begin) > 1:
                status.start()
                status.update(f"{what}: {size / 1e6:.0f} MB, {size / 1e6 / seconds:.1f} MB/s")
            yield text
    finally:
        status.stop()
