"""Sparse upcycling: a trained dense model becomes a mixture of experts (https://arxiv.org/abs/2212.05055).

Every expert starts as a copy of the network that it replaces. As long as they are all the same, it does not matter who
is chosen: if a token's weights sum to one, the model computes what the dense one did, and learns on from there.

    _, leaves = load_weights("runs/llama_350m/checkpoints")
    model = upcycle(leaves, moe_config.model, jax.random.key(0))
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.ffns.moe import MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.leaves import check_same, describe, flatten, unflatten
from efficient_lm.model import LanguageModel, ModelConfig


def upcycle(dense: Mapping[str, jax.Array], cfg: ModelConfig, key: jax.Array) -> LanguageModel:
    """Returns the model of `cfg`, its weights those of `dense` by path, its experts copies, its routers new.

    Raises:
      ValueError: a block's experts would not compute what its dense network did.
      ForeignLeaves: the models differ in more than their feed-forward networks, or in the width of these.
    """
    for letter in dict.fromkeys(cfg.layers.split()):
        ffn = cfg.blocks[letter].ffn
        if isinstance(ffn, MoEConfig):
            _check(letter, ffn)
    build = lambda key: cfg.build(rngs=nnx.Rngs(params=key))
    model = jax.eval_shape(build, key)
    leaves, rest = {}, dict(dense)
    for path, like in flatten(model).items():
        source = f"{path.replace('/ffn/experts/', '/ffn/')}/kernel" if "/ffn/experts/" in path else path
        if "/ffn/router/" in path:
            leaves[path] = like
        elif source in dense:
            rest.pop(source, None)
            leaves[path] = dense[path] if source == path else _copies(dense[source], like.shape)
    # What is missing, and what found no place.
    check_same(describe(leaves | rest), describe(flatten(model)), what="the dense model's weights")
    routers = lambda key: {path: x for path, x in flatten(build(key)).items() if "/ffn/router/" in path}
    return unflatten(model, leaves | jax.jit(routers)(key))


def _check(letter: str, ffn: MoEConfig) -> None:
    router = ffn.router
    if not isinstance(router, TopKConfig) or not router.renormalize or router.scale != 1.0 or ffn.shared is not None:
        raise ValueError(
            f"block {letter}: a token's experts must have weights that sum to one, and no network beside them: "
            "TopKConfig(renormalize=True, scale=1.0), shared=None"
        )
    if router.capacity_factor is not None or ffn.room is not None:
        raise ValueError(f"block {letter}: no token may be dropped: capacity_factor=None, room=None")


def _copies(kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns one kernel of shape [... D F] for each expert, [... E D F]; left as it is where widths differ."""
    fits = kernel.shape == (*shape[:-3], *shape[-2:])
    return jnp.broadcast_to(kernel[..., None, :, :], shape) if fits else kernel
