"""Linearization: a model trained with softmax attention goes on with mixers of a state that does not grow.

LoLCATs (https://arxiv.org/abs/2410.10254) and Liger (https://arxiv.org/abs/2503.01496) read the queries, keys and
values of the layer that they replace. LoLCATs has feature maps and factors beside them, which are new, and with a
window of all tokens it computes what softmax attention did.

    _, leaves = load_weights("runs/llama_350m/checkpoints")
    model = linearize(leaves, lolcats_config.model, jax.random.key(0))
"""

from collections.abc import Mapping

import jax
from flax import nnx

from efficient_lm.leaves import check_same, describe, flatten, unflatten
from efficient_lm.model import LanguageModel, ModelConfig

NEW = "/mixer/q_features/", "/mixer/k_features/", "/mixer/window_logit"


def linearize(softmax: Mapping[str, jax.Array], cfg: ModelConfig, key: jax.Array) -> LanguageModel:
    """Returns the model of `cfg`, its weights those of `softmax` by path; feature maps and factors are new.

    What weights do not show, rotations for one, has to be the same in both configurations.

    Raises:
      ForeignLeaves: the models differ in more than that.
    """
    build = lambda key: cfg.build(rngs=nnx.Rngs(params=key))
    model = jax.eval_shape(build, key)
    is_new = lambda path: path not in softmax and any(part in path for part in NEW)
    shapes = {path: x for path, x in flatten(model).items() if is_new(path)}
    # What is missing, and what found no place.
    check_same(describe(dict(softmax) | shapes), describe(flatten(model)), what="the softmax model's weights")
    new = jax.jit(lambda key: {path: x for path, x in flatten(build(key)).items() if is_new(path)})
    return unflatten(model, dict(softmax) | new(key))
