"""A run that begins with the weights of another: of the same model, or of one that becomes another kind.

What is new in the model is drawn: the routers of a mixture that was dense (upcycling.py), the feature maps of linear
attention that was softmax (linearization.py).
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from efficient_lm.checkpoint import load_weights
from efficient_lm.config import TrainConfig
from efficient_lm.data import Tokenizer
from efficient_lm.ffns import MoEConfig
from efficient_lm.leaves import flatten
from efficient_lm.linearization import linearize
from efficient_lm.model import LanguageModel, ModelConfig
from efficient_lm.run_folder import read_config
from efficient_lm.upcycling import upcycle


def check_start(cfg: TrainConfig) -> None:
    """Raises ValueError if the run of `cfg.start_from` has no weights for this model; reads none of them."""
    source, model = _source(cfg), cfg.model
    build = lambda: source.model.build(rngs=nnx.Rngs(params=jax.random.key(0)))
    if not any(path.name.isdigit() for path in Path(cfg.start_from, "checkpoints").glob("*")):
        raise ValueError(f"start_from={cfg.start_from!r} has no checkpoint")
    jax.eval_shape(lambda leaves: _convert(leaves, model, jax.random.key(0)), flatten(jax.eval_shape(build)))


def starting_model(cfg: TrainConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Returns the model with the newest sound weights of the run `cfg.start_from`.

    Raises:
      ValueError: that run has another tokenizer, or weights that do not fit.
      DamagedCheckpoint: all of its checkpoints are.
    """
    theirs = _source(cfg).data.load_tokenizer(Path(cfg.start_from))
    if not np.array_equal(theirs.token_bytes, tokenizer.token_bytes):
        raise ValueError(
            f"start_from={cfg.start_from!r} has a tokenizer of {theirs.vocab_size} tokens that is not this run's, of "
            f"{tokenizer.vocab_size}: set data.tokenizer to the same one"
        )
    _, leaves = load_weights(Path(cfg.start_from, "checkpoints"))
    return _convert(leaves, cfg.model, jax.random.key(cfg.seed))


def _source(cfg: TrainConfig) -> TrainConfig:
    source = read_config(cfg.start_from)
    assert isinstance(source, TrainConfig)
    return source


def _convert(leaves: Mapping[str, jax.Array], model: ModelConfig, key: jax.Array) -> LanguageModel:
    has_experts = any(isinstance(block.ffn, MoEConfig) for block in model.blocks.values())
    was_dense = not any("/ffn/experts/" in path for path in leaves)
    return (upcycle if has_experts and was_dense else linearize)(leaves, model, key)
