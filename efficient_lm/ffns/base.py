"""What every feed-forward network is: a configuration that builds a module with one call."""

import abc
import dataclasses

from flax import nnx
from jaxtyping import Array, Float

type Aux = dict[str, Float[Array, ""]]  # Losses and measurements that the layer wants reported, by name.


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFNConfig(abc.ABC):
    """Hyper-parameters of one kind of feed-forward network."""

    @abc.abstractmethod
    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "FFN":
        """Returns the network for a model of width `d_model`."""


class FFN(nnx.Module):
    """A map of each token by itself: `y, aux = ffn(x)`."""

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Aux]:
        raise NotImplementedError
