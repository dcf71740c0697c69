"""One step of training and one of evaluation, as pure functions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from efficient_lm import buffers
from efficient_lm.config import TrainConfig
from efficient_lm.data import Batch
from efficient_lm.model import LanguageModel
from efficient_lm.objectives import Objective
from efficient_lm.optimizer import GuardState, guard
from efficient_lm.rotary import document_positions
from efficient_lm.sharding import check_divisible, spec

POSITION_BINS = 16  # Bin i holds positions 2**(i-1) .. 2**i - 1 of a document; the last one, all that follow.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: Int[Array, ""]
    """Steps done."""
    model: LanguageModel
    opt_state: Any
    guard: GuardState


type Metrics = dict[str, Float[Array, ""]]
type TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(cfg: TrainConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step, drawn from the seed."""
    model: Any = cfg.model.build(rngs=nnx.Rngs(params=jax.random.key(cfg.seed)))
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), GuardState.init())


def abstract_state(
    cfg: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> tuple[TrainState, Batch]:
    """Returns shapes, dtypes and layouts of the state and of a batch, as the training step takes them.

    Raises:
      ValueError: they cannot be divided among the devices of the mesh.
    """
    shape_BT = (cfg.batch_size, cfg.seq_len)
    if mesh is None:
        tokens = jax.ShapeDtypeStruct(shape_BT, jnp.int32)
        return jax.eval_shape(lambda: init_state(cfg, optimizer)), Batch(tokens, tokens, tokens)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        try:
            check_divisible((cfg.batch_size // cfg.grad_accumulation, cfg.seq_len), "BT")
        except ValueError as error:
            raise ValueError(
                f"batch_size={cfg.batch_size} / grad_accumulation={cfg.grad_accumulation}: {error}"
            ) from error
        layout = lambda x: NamedSharding(mesh, P() if x.sharding is None else x.sharding.spec)
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout(x))
        state = jax.tree.map(place, jax.eval_shape(lambda: init_state(cfg, optimizer)))
        tokens = jax.ShapeDtypeStruct(shape_BT, jnp.int32, sharding=NamedSharding(mesh, spec("BT")))
    return state, Batch(tokens, tokens, tokens)


def make_train_step(cfg: TrainConfig, objective: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
    """Returns the compiled step; it takes the state's memory over."""

    def gradients(model: LanguageModel, batch: Batch):
        grad = jax.value_and_grad(objective, has_aux=True)
        if cfg.grad_accumulation == 1:
            (loss, sums), grads = grad(model, batch)
            return loss, sums, grads
        # Each part takes every n-th row, so that all devices work on every part.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, cfg.grad_accumulation, x.shape[-1]), 0, 1), batch)

        def add(total, part):
            (loss, sums), grads = grad(model, part)
            return jax.tree.map(jnp.add, total, (loss, sums, grads)), None

        (loss, sums), grads = jax.eval_shape(grad, model, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(jnp.zeros_like, (loss, sums, grads))
        return jax.lax.scan(add, zeros, parts)[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, sums, grads = gradients(state.model, batch)
        # Sums over tokens become means only here: parts of a batch may hold different numbers of them.
        tokens = jnp.maximum(sums["tokens"], 1.0)
        grads, measured = buffers.split(jax.tree.map(lambda x: x / tokens, grads))
        norm = optax.tree.norm(grads)
        accept, guard_state = guard(cfg.guard, state.guard, norm)

        params: Any = state.model  # To optax, a module is a tree of arrays like any other.
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        # A select, not a branch: XLA runs branches on one core of a CPU, and cannot fuse across them anywhere.
        new = (buffers.follow(optax.apply_updates(params, updates), measured), opt_state)
        keep = lambda new, old: jnp.where(accept, new, old)
        model, opt_state = jax.tree.map(keep, new, (params, state.opt_state))
        metrics = {name: value / tokens for name, value in sums.items() if name != "tokens"}
        metrics |= {
            "loss": loss / tokens,
            "tokens": sums["tokens"],
            "grad_norm": norm,
            "skipped": guard_state.skipped,
            "skipped_in_a_row": guard_state.in_a_row,
        }
        return TrainState(state.step + 1, model, opt_state, guard_state), metrics

    return train_step


def make_eval_step(objective: Objective) -> Callable[[LanguageModel, Batch], tuple[jax.Array, jax.Array]]:
    """Returns the compiled evaluation of a batch: nats and number of targets by position in the document."""

    @jax.jit
    def eval_step(model: LanguageModel, batch: Batch):
        nll_BT = objective.token_nll(model, batch)
        positions_BT, _ = document_positions(batch.segment_ids)
        positions_BT = jnp.maximum(positions_BT - model.cfg.meta_tokens, 0)
        bins_BT = jnp.minimum(jnp.ceil(jnp.log2(positions_BT + 1.0)).astype(jnp.int32), POSITION_BINS - 1)
        weights_BT = batch.is_target.astype(jnp.float32)
        is_bin = bins_BT[..., None] == jnp.arange(POSITION_BINS)
        total = lambda x_BT: jnp.sum(jnp.where(is_bin, x_BT[..., None], 0.0), axis=(0, 1))
        return total(nll_BT), total(weights_BT)

    return eval_step


@jax.jit
def target_bytes(batch: Batch, token_bytes: Int[Array, "V"]) -> Int[Array, ""]:
    """Returns how many bytes of text the targets of a batch stand for, with the bytes of each token given."""
    targets_BT = jnp.maximum(batch.targets, 0)
    if jax.sharding.get_abstract_mesh().empty:
        bytes_BT = token_bytes[targets_BT]
    else:
        bytes_BT = token_bytes.at[targets_BT].get(out_sharding=spec("BT"))
    return jnp.sum(jnp.where(batch.is_target, bytes_BT, 0))
