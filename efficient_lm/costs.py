"""What a model costs before it is built: python -m efficient_lm.costs configs/llama_350m.py --context 32768

Nothing is stated twice: sizes are those of the parameters and states that the modules make, as shapes. Only what a
module computes beside products with its weights it has to say itself, as `flops_per_token`. Work on single channels
does not count: norms, gates, activations, short convolutions. Meta tokens are tokens like others: sequences and rows of
training hold them. What a run reports, tokens per second and MFU, leaves them out, as it does padding.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from rich.table import Table

from efficient_lm.cli import load_config, one_line_errors
from efficient_lm.config import TrainConfig
from efficient_lm.console import console, count
from efficient_lm.console import table as console_table
from efficient_lm.mixers import Mixer
from efficient_lm.mixers.base import State
from efficient_lm.model import BlockConfig, LanguageModel, ModelConfig
from efficient_lm.transformer_call import TransformerCallConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Of a part of a model, for sequences of one length in batches of one size."""

    parameters: int = 0
    active_parameters: float = 0.0
    """Those that one token meets, on average; of experts, its own."""
    training_flops: float = 0.0
    """Per token of a document, on average: forward, and twice that backward. What is computed again does not count."""
    state_bytes: int = 0
    """Caches and recurrent states of the batch."""
    decoding_bytes: float = 0.0
    """Read and written for each token that follows: parameters, which the batch shares, and states, whole even where
    sparse attention reads a part of them."""

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def times(self, number: int) -> "Costs":
        """Returns what so many parts of this kind cost."""
        return Costs(**{name: value * number for name, value in vars(self).items()})


def model_costs(cfg: ModelConfig, *, context: int, batch_size: int = 1) -> Costs:
    """Returns the costs of a whole model, for sequences of `context` tokens.

    Parameters are read in the dtype of activations, as they are held to decode with.
    """
    blocks = block_costs(cfg, context=context, batch_size=batch_size)
    return sum((blocks[letter] for letter in cfg.layers.split()), head_costs(cfg, batch_size=batch_size))


def block_costs(cfg: ModelConfig, *, context: int, batch_size: int = 1) -> dict[str, Costs]:
    """Returns the costs of one block of each kind that the model has, by its letter."""
    itemsize = jnp.dtype(cfg.dtype).itemsize

    def of(letter: str) -> Costs:
        block = jax.eval_shape(lambda: cfg.blocks[letter].build(cfg.d_model, rngs=nnx.Rngs(0)))
        seen = max(round(block.share * context), 1)
        mixing = block.mixer.flops_per_token(seen)
        mixing += 0.0 if block.ffn is None else block.ffn.flops_per_token(seen)
        # Of a state, all is read and one token's part is written; what does not grow is one token's part.
        moved = _nbytes(block.mixer.state_read, cfg, context) + state_bytes(block.mixer, cfg, 1)
        costs = Costs(
            parameters=num_parameters(block),
            active_parameters=block.share * _used_parameters(block),
            training_flops=3.0 * block.share * (2.0 * _multiplied(block) + mixing),
            state_bytes=state_bytes(block.mixer, cfg, context, batch_size),
            decoding_bytes=itemsize * _used_parameters(block, batch_size) / batch_size + moved,
        )
        call = cfg.blocks[letter].call
        return costs if call is None else costs + _call_costs(call, cfg, context=context, batch_size=batch_size)

    return {letter: of(letter) for letter in cfg.blocks if letter in cfg.layers.split()}


def _call_costs(call: TransformerCallConfig, cfg: ModelConfig, *, context: int, batch_size: int) -> Costs:
    """Returns what a block costs more that calls a shared transformer; its parameters are there once, about the blocks.

    What each call's adapters make of them counts as if adapters ran beside them.
    """
    called = jax.eval_shape(lambda: call.build_shared(cfg.d_model, rngs=nnx.Rngs(0)))
    attention, itemsize = called.attention, jnp.dtype(cfg.dtype).itemsize
    moved = state_bytes(attention, cfg, context) + state_bytes(attention, cfg, 1)
    return Costs(
        training_flops=3.0 * (2.0 * _multiplied(called) + attention.flops_per_token(context)),
        state_bytes=state_bytes(attention, cfg, context, batch_size),
        decoding_bytes=itemsize * num_parameters(called) / batch_size + moved,
    )


def head_costs(cfg: ModelConfig, *, batch_size: int = 1) -> Costs:
    """Returns the costs of what is about the blocks: embedding, last norm, head, and parameters that blocks share."""
    model = jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
    head = num_parameters(model.embedding if model.head is None else model.head)
    norm = num_parameters(model.norm)
    parameters = norm + num_parameters(model.embedding) + (0 if model.head is None else head)
    parameters += num_parameters([model.meta, model.called])
    # A token reads its row of the embedding, and the whole head.
    rows = 0 if model.head is None else cfg.d_model
    return Costs(
        parameters=parameters,
        active_parameters=float(parameters),
        training_flops=6.0 * head,
        decoding_bytes=jnp.dtype(cfg.dtype).itemsize * ((head + norm) / batch_size + rows),
    )


def num_parameters(tree: object) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def state_bytes(mixer: Mixer, cfg: ModelConfig, max_len: int, batch_size: int = 1) -> int:
    """Returns the memory of the states of sequences in one layer, with room for `max_len` tokens each."""
    return _nbytes(mixer.init_state, cfg, max_len, batch_size)


def _nbytes(init: Callable[[int, int, str], State], cfg: ModelConfig, max_len: int, batch_size: int = 1) -> int:
    # On no mesh: devices need not be able to share the sequences.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        state = jax.eval_shape(lambda: init(batch_size, max_len, cfg.dtype))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def _multiplied(module: nnx.Module) -> float:
    """Returns how many weights a token is multiplied with."""
    return sum(math.prod(v.shape) * share(v) for v in variables(module) if v.get_metadata().get("contracted"))


def _used_parameters(module: nnx.Module, num_tokens: int = 1) -> float:
    """Returns how many parameters some tokens meet together, if they choose experts evenly and independently."""
    return sum(math.prod(v.shape) * (1.0 - (1.0 - share(v)) ** num_tokens) for v in variables(module))


def share(variable: nnx.Variable) -> float:
    """Returns the part of the weights that one token meets on average: of experts, those of its own."""
    return variable.get_metadata().get("share", 1.0)


def variables(module: Any) -> Iterator[nnx.Variable]:
    """Yields the variables of a module, or of a tree of modules."""
    leaves: list[Any] = jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return iter(leaves)


def model_table(cfg: ModelConfig, model: LanguageModel) -> Table:
    """Returns a table of the blocks, their parameters and what their states take."""
    letters = cfg.layers.split()
    table = console_table(
        title=f"{count(num_parameters(model))} parameters in {len(letters)} blocks: {cfg.layers}",
        caption="each; state: bytes for one sequence, and for every token of it",
        left=("block", "mixer", "ffn"),
        right=("number", "parameters", "state", "per token"),
    )
    for letter in (letter for letter in cfg.blocks if letter in letters):
        block = jax.eval_shape(lambda letter=letter: cfg.blocks[letter].build(cfg.d_model, rngs=nnx.Rngs(0)))
        growth = state_bytes(block.mixer, cfg, 2) - state_bytes(block.mixer, cfg, 1)
        numbers = num_parameters(block), state_bytes(block.mixer, cfg, 0), growth
        table.add_row(letter, *_names(cfg.blocks[letter]), str(letters.count(letter)), *map(count, numbers))
    head = 0 if model.head is None else num_parameters(model.head)
    table.add_row("", _head_name(cfg), "", "", count(num_parameters([model.embedding, model.meta]) + head), "", "")
    return table


def costs_table(cfg: ModelConfig, *, context: int, batch_size: int = 1) -> Table:
    """Returns a table of what blocks of each kind cost together, and all of them."""
    letters = cfg.layers.split()
    table = console_table(
        title=f"sequences of {context} tokens, {batch_size} at a time, in {cfg.dtype}",
        caption="FLOPs: of training on a token. state: bytes, of the batch. decoding: bytes moved for a token",
        left=("blocks",),
        right=("parameters", "active", "FLOPs", "state", "decoding"),
    )

    def add(name: str, costs: Costs) -> None:
        table.add_row(name, *(count(value) for value in vars(costs).values()))

    for letter, costs in block_costs(cfg, context=context, batch_size=batch_size).items():
        number = letters.count(letter)
        add(f"{number} {letter}: {', '.join(_names(cfg.blocks[letter]))}", costs.times(number))
    add(_head_name(cfg), head_costs(cfg, batch_size=batch_size))
    add("all", model_costs(cfg, context=context, batch_size=batch_size))
    return table


def _names(block: BlockConfig) -> tuple[str, str]:
    name = lambda part: "-" if part is None else type(part).__name__.removesuffix("Config")
    return name(block.mixer), name(block.ffn)


def _head_name(cfg: ModelConfig) -> str:
    return "embedding = head" if cfg.tied_embeddings else "embedding, head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    config: Annotated[str, tyro.conf.Positional]
    """File of the configuration; what follows beside these options overrides it, as in train.py."""
    context: int | None = None
    """Tokens of a sequence; if not given, those of a training row."""
    batch_size: int = 1
    """Sequences that are decoded together."""


def main(args: Arguments, overrides: list[str]) -> None:
    cfg: TrainConfig = load_config(args.config, overrides)
    console.print(costs_table(cfg.model, context=args.context or cfg.seq_len, batch_size=args.batch_size))
    tokens = cfg.num_steps * cfg.batch_size * cfg.seq_len
    flops = tokens * model_costs(cfg.model, context=cfg.seq_len).training_flops
    console.print(f"training: {count(tokens)} tokens in rows of {cfg.seq_len}, {flops:.3g} FLOPs")


if __name__ == "__main__":
    with one_line_errors(ValueError, OSError):
        known, rest = tyro.cli(
            Arguments, prog="python -m efficient_lm.costs", description=__doc__, return_unknown_args=True
        )
        main(known, rest)
