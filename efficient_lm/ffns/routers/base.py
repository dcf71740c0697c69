"""What every router is: a configuration that builds a module with one call; and what several of them compute."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from efficient_lm.ffns.base import Aux
from efficient_lm.ffns.experts import Experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig(abc.ABC):
    """Hyper-parameters of one way to bring tokens and experts together."""

    @abc.abstractmethod
    def build(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs) -> "Router":
        """Returns the router for tokens of width `d_model`.

        Raises:
          ValueError: numbers that do not fit together.
        """

    @abc.abstractmethod
    def experts_per_token(self, num_experts: int) -> float:
        """Returns how many experts work on a token, on average; where data decide, how many it is meant to be."""


class Router(nnx.Module):
    """Sends tokens to experts and puts together what these return: `y, aux = router(x, is_real, experts)`."""

    def flops_per_token(self, seq_len: int) -> float:
        """Returns the floating-point operations per token forward, beside products with weights: most have none."""
        del seq_len
        return 0.0

    def __call__(
        self,
        x: Float[Array, "B T D"],
        is_real: Bool[Array, "B T"],
        experts: Experts,
        tokens: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        raise NotImplementedError


def loads(experts: Int[Array, "B T K"], num_experts: int) -> Float[Array, "E"]:
    """Returns how often each expert was chosen, in the whole batch; expert number E is none."""
    return jnp.sum(experts[..., None] == jnp.arange(num_experts), axis=(0, 1, 2), dtype=jnp.float32)


def mean_over_tokens(x: Float[Array, "B T *E"], is_real: Bool[Array, "B T"]) -> Float[Array, "*E"]:
    """Returns the mean over the real tokens of the whole batch."""
    is_real_BT = is_real.reshape(is_real.shape + (1,) * (x.ndim - 2))
    return jnp.sum(jnp.where(is_real_BT, x, 0.0), axis=(0, 1)) / jnp.maximum(jnp.sum(is_real), 1)


def balance(probabilities: Float[Array, "B T E"], load: Float[Array, "E"], is_real: Bool[Array, "B T"]) -> Array:
    """Returns E times the sum of load x mean probability, as shares: 1 if either is even (arXiv 2101.03961)."""
    shares_E = load / jnp.maximum(jnp.sum(load), 1.0)
    return load.size * jnp.sum(shares_E * mean_over_tokens(probabilities, is_real))


def z_value(logits: Float[Array, "B T E"], is_real: Bool[Array, "B T"]) -> Array:
    """Returns the mean square of the log-sum-exp of the logits (arXiv 2202.08906)."""
    return mean_over_tokens(jnp.square(jax.nn.logsumexp(logits, axis=-1)), is_real)


def load_report(load: Float[Array, "E"]) -> Aux:
    """Returns the largest load as a multiple of the mean."""
    return {"max_load": load.size * jnp.max(load) / jnp.maximum(jnp.sum(load), 1.0)}
