"""What every feed-forward network is: a configuration that builds a module with one call."""

import abc
import dataclasses

from flax import nnx
from jaxtyping import Array, Float, Int

type Aux = dict[str, Float[Array, ""]]
"""What the layer wants reported, by name: measurements, and losses, whose names end in "_loss"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFNConfig(abc.ABC):
    """Hyper-parameters of one kind of feed-forward network."""

    @abc.abstractmethod
    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "FFN":
        """Returns the network for a model of width `d_model`.

        Raises:
          ValueError: sizes that do not fit together.
        """


class FFN(nnx.Module):
    """A map of each token by itself: `y, aux = ffn(x)`.

    `tokens` are their numbers in the vocabulary, which few networks read. Padding (segment id 0) takes no part in what
    is counted or learned; what comes out there means nothing.
    """

    def flops_per_token(self, seq_len: int) -> float:
        """Returns the floating-point operations per token forward, beside products with weights: most have none."""
        del seq_len
        return 0.0

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        raise NotImplementedError
