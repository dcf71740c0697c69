"""The data of a run: what to read, how to tokenise it, what to hold out."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from efficient_lm.data.corpus import Corpus, digest, held_out
from efficient_lm.data.iterator import TrainIterator
from efficient_lm.data.packing import PackedRows, ValidationBatches
from efficient_lm.data.sources import Source, SourceConfig, StdlibConfig
from efficient_lm.data.tokenizers import BytesConfig, Tokenizer, TokenizerConfig, TrainBPEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Documents from one or more sources, split by a hash of their content and packed into rows."""

    sources: tuple[SourceConfig, ...] = (StdlibConfig(),)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=BytesConfig)
    document_mask: bool = True
    """Whether a document is alone in the world; if not, it sees those before it in its row."""
    validation_fraction: float = 0.05
    prefetch: int = 4
    """Batches made ahead."""
    cache_dir: str = ""
    """Where tokenised text is kept; empty: in the run folder."""

    def build(
        self, *, run_dir: str | Path, batch_size: int, seq_len: int, seed: int, meta_tokens: Sequence[int] = ()
    ) -> "Data":
        """Reads and tokenises everything that is not in the cache yet.

        `batch_size` counts the rows of all hosts together. `meta_tokens` are those that every document begins with:
        `meta_ids` of the model's configuration.

        Raises:
          FileNotFoundError, ValueError: something is missing or is not what the configuration says; the message names
            it and the remedy.
        """
        self._check(batch_size, seq_len)
        run_dir = Path(run_dir)
        sources = [source.build() for source in self.sources]
        tokenizer = self.tokenizer.build(run_dir, lambda: self._training_texts(sources))
        cache_dir = Path(self.cache_dir).expanduser() if self.cache_dir else run_dir / "tokens"
        corpora = [source.corpus(tokenizer, cache_dir) for source in sources]
        masks = [held_out(corpus.digests, self.validation_fraction) for corpus in corpora]
        for source, corpus, mask in zip(self.sources, corpora, masks, strict=True):
            if mask.all():
                raise ValueError(f"{source}: all {len(corpus)} documents are held out; {self._remedy(source)}")
        if not any(mask.any() for mask in masks):
            num = sum(len(corpus) for corpus in corpora)
            raise ValueError(f"none of the {num} documents is held out for validation; {self._remedy(self.sources[0])}")
        return Data(
            config=self,
            tokenizer=tokenizer,
            training=[corpus.select(~mask) for corpus, mask in zip(corpora, masks, strict=True)],
            held_out=[corpus.select(mask) for corpus, mask in zip(corpora, masks, strict=True)],
            batch_size=batch_size,
            seq_len=seq_len,
            seed=seed,
            meta_tokens=meta_tokens,
        )

    def load_tokenizer(self, run_dir: str | Path) -> Tokenizer:
        """Returns the tokenizer of a run without looking at its documents."""
        return self.tokenizer.build(Path(run_dir))

    def _check(self, batch_size: int, seq_len: int) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one, e.g. StdlibConfig()")
        for source in self.sources:
            if not 0 < source.weight < math.inf:
                raise ValueError(f"{source}: weight {source.weight} is not a positive number; drop the source instead")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction {self.validation_fraction} is not between 0 and 1; take e.g. 0.05")
        if self.prefetch < 0:
            raise ValueError(f"prefetch {self.prefetch} is negative; 0 makes no batches ahead")
        if batch_size < 1 or seq_len < 1:
            raise ValueError(f"batch_size {batch_size} and seq_len {seq_len} have to be 1 or more")

    def _remedy(self, source: SourceConfig) -> str:
        how = "change validation_fraction or add documents"
        return f"{how} (separator cuts a file into documents)" if hasattr(source, "separator") else how

    def _training_texts(self, sources: Sequence[Source]) -> Iterator[bytes]:
        """Yields text to learn a tokenizer from."""
        assert isinstance(self.tokenizer, TrainBPEConfig)
        for source in sources:
            size = 0
            for text in source.texts():
                if not held_out(np.array([digest(text)], np.uint64), self.validation_fraction)[0]:
                    yield text
                    size += len(text)
                if size >= self.tokenizer.sample_bytes / len(sources):
                    break


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Tokenised documents, split; made by `DataConfig.build`."""

    config: DataConfig
    tokenizer: Tokenizer
    training: Sequence[Corpus]
    held_out: Sequence[Corpus]
    batch_size: int
    seq_len: int
    seed: int
    meta_tokens: Sequence[int] = ()

    def train(self, rows: Sequence[int] | None = None) -> TrainIterator:
        """Returns the training batches from the start, of all rows or of those that this host feeds."""
        return TrainIterator(
            PackedRows(
                self.training,
                [source.weight for source in self.config.sources],
                rows=self._rows(rows),
                batch_size=self.batch_size,
                seq_len=self.seq_len,
                seed=self.seed,
                meta_tokens=self.meta_tokens,
            ),
            batch_size=self.batch_size,
            document_mask=self.config.document_mask,
            prefetch=self.config.prefetch,
            identity=self.identity,
        )

    def validation(self, rows: Sequence[int] | None = None) -> ValidationBatches:
        """Returns batches that hold each target of the held-out documents once; they can be walked again and again."""
        return ValidationBatches(
            self.held_out,
            rows=self._rows(rows),
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            document_mask=self.config.document_mask,
            meta_tokens=self.meta_tokens,
        )

    def validation_documents(self) -> Iterator[bytes]:
        """Yields the text of the held-out documents in the order of `validation`."""
        return map(self.tokenizer.decode_bytes, self.validation().contents())

    @property
    def num_train_targets(self) -> int:
        """Returns the targets of an epoch over all sources."""
        return sum(corpus.num_targets for corpus in self.training)

    @property
    def num_train_slots(self) -> int:
        """Returns about how many tokens of rows an epoch takes: its targets, and the meta tokens before them."""
        num_meta, targets = len(self.meta_tokens), self.num_train_targets
        num_pieces = sum(map(len, self.training)) + targets / (self.seq_len - num_meta)
        return round(targets + num_meta * num_pieces)

    @property
    def num_validation_targets(self) -> int:
        return sum(corpus.num_targets for corpus in self.held_out)

    @property
    def identity(self) -> dict[str, str]:
        """Says what decides the batches, in words that are compared when a run is resumed."""
        return {
            "training documents": _describe(self.training),
            "held-out documents": _describe(self.held_out),
            "tokenizer": self.tokenizer.fingerprint,
            "weights": str([source.weight for source in self.config.sources]),
            "seed": str(self.seed),
        }

    @property
    def fingerprint(self) -> str:
        """Returns a hash of `identity`."""
        return f"{digest(repr(self.identity).encode()):016x}"

    def _rows(self, rows: Sequence[int] | None) -> Sequence[int]:
        rows = range(self.batch_size) if rows is None else rows
        if not rows or list(rows) != sorted(set(rows) & set(range(self.batch_size))):
            raise ValueError(
                f"{rows} are not rows of a batch of {self.batch_size}; take some of 0 to its size, in order"
            )
        return rows


def _describe(corpora: Sequence[Corpus]) -> str:
    content = hashlib.blake2b(digest_size=8)
    for corpus in corpora:
        content.update(np.stack([corpus.digests, corpus.lengths.astype(np.uint64)]).tobytes())
    return f"{'+'.join(str(len(corpus)) for corpus in corpora)} ({content.hexdigest()})"
