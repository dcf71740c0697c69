"""Loss on held-out documents, in nats per token and bits per byte, and by position in the document."""

import dataclasses
import gzip
import itertools
import lzma
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from efficient_lm.data import Batch, Data
from efficient_lm.model import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    loss: float
    """Nats per target."""
    bits_per_byte: float
    by_position: list[float]
    """Nats per target at positions 2**(i-1) .. 2**i - 1 of a document; positions that no document has are left out."""


def evaluate(
    eval_step: Callable[[LanguageModel, Batch], tuple[jax.Array, jax.Array]],
    model: LanguageModel,
    data: Data,
    put: Callable[[Batch], Batch],
    max_batches: int | None = None,
) -> HeldOut:
    """Returns the loss over the held-out documents, or over the first `max_batches` batches of them."""
    token_bytes_V = data.tokenizer.token_bytes
    num_bytes, results = 0, []
    for batch in itertools.islice(data.validation(), max_batches):
        num_bytes += int(token_bytes_V[batch.targets[batch.segment_ids > 0]].sum())
        results.append(eval_step(model, put(batch)))
    # Summed in float64: float32 would lose the last digits over many batches.
    nll, tokens = (np.sum([np.asarray(r[i], np.float64) for r in results], axis=0) for i in range(2))
    return HeldOut(
        loss=float(nll.sum() / tokens.sum()),
        bits_per_byte=float(nll.sum() / math.log(2) / num_bytes),
        by_position=[float(n / t) for n, t in zip(nll, tokens, strict=True) if t > 0],
    )


def compressed_bits_per_byte(documents: Iterable[bytes]) -> dict[str, float]:
    """Returns what `gzip -9` and `xz -9e` need for the documents, each as one stream."""
    text = b"".join(documents)
    sizes = {
        "gzip -9": len(gzip.compress(text, 9)),
        "xz -9e": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
