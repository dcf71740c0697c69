"""Loss on held-out documents, in nats per token and bits per byte, and by position in the document."""

import dataclasses
import gzip
import lzma
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jaxtyping import Int32

from efficient_lm.data import Batch
from efficient_lm.model import LanguageModel
from efficient_lm.training import target_bytes


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
    batches: Iterable[Batch],
    token_bytes: Int32[np.ndarray, "V"],
) -> HeldOut:
    """Returns the loss over batches that lie on the devices; `token_bytes` are the bytes that each token stands for."""
    results = [(*eval_step(model, batch), target_bytes(batch, token_bytes)) for batch in batches]
    # Summed in float64: float32 would lose the last digits over many batches.
    nll, tokens, num_bytes = (np.sum([np.asarray(r[i], np.float64) for r in results], axis=0) for i in range(3))
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
