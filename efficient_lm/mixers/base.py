"""What every sequence mixer is: a configuration that builds a module with one call."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from efficient_lm.layers import Einsum

type State = Any  # A pytree of arrays with the batch in front, one per layer.
type Shared = Mapping[str, Any]  # By name, of the same tokens: their numbers, and what layers leave for later ones.
type Leaf = Any  # An array of a state; or what stands for it: one with layers in front, a shape, a sharding.


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(abc.ABC):
    """Hyper-parameters of one kind of sequence mixer."""

    @abc.abstractmethod
    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Mixer":
        """Returns the mixer for a model of width `d_model`.

        Raises:
          ValueError: sizes that do not fit together.
        """


class Mixer(nnx.Module):
    """A map from sequences to sequences that never looks ahead.

    `y, state = mixer(x, state)`. Without a state (training) it starts from nothing and returns None. With one it
    continues from there and returns the state after the last token, for any number of tokens: prefill, chunked
    prefill and decoding are one path.
    """

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> State:
        """Returns the state before the first token, for sequences of at most `max_len` tokens, padding included.

        `dtype` is that of the activations that the state keeps (keys, values, inputs of a convolution); recurrent
        states are float32.
        """
        raise NotImplementedError

    def state_read(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> State:
        """Returns a state like what is read for each token that follows: its own, or another mixer's."""
        return self.init_state(batch_size, max_len, dtype)

    def flops_per_token(self, seq_len: int) -> float:
        """Returns the floating-point operations per token forward, beside products with weights.

        It counts what the definition needs in a document of `seq_len` tokens, not what an implementation spends.
        """
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B T D"], state: State = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes the tokens of each document.

        `segment_ids` counts the documents of a row from 1, in order; 0 is padding, which changes nothing. A given
        state belongs to the document of the row's first token.
        """
        raise NotImplementedError


class HeadsMixer(Mixer):
    """A mixer that ends with one product, which projects its heads to the width of the model."""

    o_proj: Einsum | None
    """Its kernel is laid out [N P D], or [F D] where there are channels instead of heads. None: others project."""

    def heads(
        self, x: Float[Array, "B T D"], state: State = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T ..."], State]:
        """Mixes as `__call__` does, up to the projection."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B T D"], state: State = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        assert self.o_proj is not None
        o, state = self.heads(x, state, segment_ids=segment_ids)
        return self.o_proj(o), state


class SharingMixer(Mixer):
    """A mixer that sees what earlier layers left for later ones, and may leave something itself.

    What is shared are activations of the tokens at hand, and what the layer that left them remembers, to be read.
    """

    def share(
        self, x: Float[Array, "B T D"], state: State, shared: Shared, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State, Shared]:
        """Mixes as `__call__` does; takes what the layers before left, and returns what those after shall see.

        Raises:
          ValueError: what it needs was not left.
        """
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B T D"], state: State = None, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        y_BTD, state, _ = self.share(x, state, {}, segment_ids=segment_ids)
        return y_BTD, state
