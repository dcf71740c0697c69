"""A language model is an embedding, a pattern of blocks, and a head."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_lm.ffns import FFNConfig
from efficient_lm.ffns.base import Aux
from efficient_lm.layers import RMSNorm
from efficient_lm.mixers import MixerConfig
from efficient_lm.mixers.base import Shared, SharingMixer, State
from efficient_lm.sharding import einsum, shard, spec
from efficient_lm.transformer_call import TransformerCall, TransformerCallConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    mixer: MixerConfig
    ffn: FFNConfig | None
    """None: the block is its mixer alone, as in Mamba."""
    skip_scales: tuple[float, float] = (1.0, 1.0)
    """What x is multiplied by before the mixer's output, and the ffn's, is added to it."""
    call: TransformerCallConfig | None = None
    """A transformer shared with other layers; what it returns is added to what the mixer reads."""
    branch_scale: float = 1.0
    """What the outputs of mixer and ffn are multiplied by."""
    post_norm: bool = False
    """The norms are of x itself, not only of what mixer and ffn read, as in MiniMax-01."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "Block":
        return Block(self, d_model, rngs=rngs)


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    share: float = 1.0
    """Part of the tokens that it works on."""

    def __init__(self, cfg: BlockConfig, d_model: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.call: TransformerCall | None = None if cfg.call is None else cfg.call.build(d_model, rngs=rngs)
        self.mixer_norm, self.mixer = RMSNorm(d_model), cfg.mixer.build(d_model, rngs=rngs)
        self.ffn_norm = None if cfg.ffn is None else RMSNorm(d_model)
        self.ffn = None if cfg.ffn is None else cfg.ffn.build(d_model, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State, shared: Shared, *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State, Shared, Aux]:
        """Returns x, the state, what the blocks after this shall see of those before, and what the ffn reports."""
        read_BTD, called = x, None
        if self.call is not None and self.cfg.call is not None:
            called, state = state or (None, None)
            transformer = shared[self.cfg.call.name]
            y_BTD, called = self.call(x, shared["embedding"], transformer, called, segment_ids=segment_ids)
            read_BTD = x + y_BTD
        normed_BTD = self.mixer_norm(read_BTD)
        if isinstance(self.mixer, SharingMixer):
            y_BTD, state, shared = self.mixer.share(normed_BTD, state, shared, segment_ids=segment_ids)
        else:
            y_BTD, state = self.mixer(normed_BTD, state, segment_ids=segment_ids)
        x, aux = self._add(0, x, normed_BTD, y_BTD), {}
        if self.ffn is not None and self.ffn_norm is not None:
            normed_BTD = self.ffn_norm(x)
            y_BTD, aux = self.ffn(normed_BTD, segment_ids=segment_ids, tokens=shared.get("tokens"))
            x = self._add(1, x, normed_BTD, y_BTD)
        return x, state if called is None else (called, state), shared, aux

    def _add(self, i: int, x_BTD: Array, normed_BTD: Array, y_BTD: Array) -> Float[Array, "B T D"]:
        skip_BTD = normed_BTD if self.cfg.post_norm else x_BTD
        return self.cfg.skip_scales[i] * skip_BTD + self.cfg.branch_scale * y_BTD


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    vocab_size: int
    d_model: int
    blocks: dict[str, BlockConfig]
    """The alphabet of the patterns."""
    pattern: str
    """One period of the stack, e.g. "M M M M M A"."""
    num_periods: int
    prefix: str = ""
    """Blocks before the periods."""
    tail: str = ""
    """Blocks after the periods."""
    tied_embeddings: bool = True
    """The head is the transposed embedding."""
    embedding_scale: float = 1.0
    """What the embeddings of tokens are multiplied by; the head stays as it is."""
    logits_scale: float = 1.0
    logits_soft_cap: float | None = None
    """Logits are capped to soft_cap * tanh(logit / soft_cap), after they are scaled."""
    meta_tokens: int = 0
    """Learned tokens before every document (https://arxiv.org/abs/2411.13676), read and never predicted: the numbers
    from vocab_size on. Layers with a window have to have as many sink_tokens to see them always."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations; parameters are float32 always."""
    remat: Literal["nothing", "dots", "everything"] = "everything"
    """What the backward pass computes again to save memory: nothing, all but products with weights, or everything."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("num_periods", "meta_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for field in ("prefix", "pattern", "tail"):
            for letter in getattr(self, field).split():
                if letter not in self.blocks:
                    raise ValueError(
                        f"{field} {getattr(self, field)!r} has the letter {letter!r}, which names no block; "
                        f"the blocks are {', '.join(self.blocks)} (letters are separated by spaces)"
                    )
        calls = [call for block in self.blocks.values() if (call := block.call) is not None]
        for call in calls:
            if call != next(other for other in calls if other.name == call.name):
                raise ValueError(f"calls of {call.name!r} differ; those of one name have one set of weights")
        if not self.layers:
            raise ValueError("the model has no blocks: give pattern and num_periods, prefix or tail")

    @property
    def layers(self) -> str:
        """The letters of all blocks in order."""
        return " ".join([*self.prefix.split(), *self.pattern.split() * self.num_periods, *self.tail.split()])

    @property
    def meta_ids(self) -> range:
        """The numbers of the meta tokens."""
        return range(self.vocab_size, self.vocab_size + self.meta_tokens)

    def build(self, *, rngs: nnx.Rngs) -> "LanguageModel":
        return LanguageModel(self, rngs=rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """The states of all layers; those of the periods are stacked like their weights."""

    prefix: list[State]
    periods: list[State]
    tail: list[State]


class LanguageModel(nnx.Module):
    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        embedding_key, head_key, layers_key = (rngs.params() for _ in range(3))
        draw = lambda key, rows: jax.random.normal(key, (rows, cfg.d_model)) * cfg.d_model**-0.5
        self.embedding = nnx.Param(shard(draw(embedding_key, cfg.vocab_size), "VD"), dims="VD", contracted="")
        draw_meta = lambda: shard(draw(jax.random.fold_in(embedding_key, 0), cfg.meta_tokens), "vD")
        self.meta = nnx.Param(draw_meta(), dims="VD", contracted="") if cfg.meta_tokens else None

        # Layer i draws from fold_in(key, i): walked by a scan or one by one, it is the same layer.
        def build(letters: str, first: Any):
            keys = [jax.random.fold_in(layers_key, first + i) for i in range(len(letters.split()))]
            blocks = [cfg.blocks[letter] for letter in letters.split()]
            return nnx.List(
                [b.build(cfg.d_model, rngs=nnx.Rngs(params=key)) for b, key in zip(blocks, keys, strict=True)]
            )

        num_prefix, period = len(cfg.prefix.split()), len(cfg.pattern.split())
        num_middle = period * cfg.num_periods
        self.prefix = build(cfg.prefix, 0)
        firsts = num_prefix + period * jnp.arange(cfg.num_periods)
        self.periods = jax.vmap(lambda first: build(cfg.pattern, first))(firsts) if num_middle else nnx.List([])
        self.tail = build(cfg.tail, num_prefix + num_middle)
        layers = cfg.layers.split()
        calls = {call.name: call for letter in layers if (call := cfg.blocks[letter].call) is not None}
        keys = {name: jax.random.fold_in(layers_key, len(layers) + i) for i, name in enumerate(sorted(calls))}
        build_shared = lambda name: calls[name].build_shared(cfg.d_model, rngs=nnx.Rngs(params=keys[name]))
        self.called = nnx.Dict({name: build_shared(name) for name in calls})
        self.norm = RMSNorm(cfg.d_model)
        draw_head = lambda: nnx.Param(shard(draw(head_key, cfg.vocab_size).T, "DV"), dims="DV", contracted="D")
        self.head = None if cfg.tied_embeddings else draw_head()

    def init_state(self, batch_size: int, max_len: int) -> ModelState:
        """Returns the state before the first token, for sequences of at most `max_len` tokens, padding included."""
        sizes = batch_size, max_len, self.cfg.dtype

        def init_block(block: Block):
            state, call = block.mixer.init_state(*sizes), block.cfg.call
            return state if call is None else (self.called[call.name].attention.init_state(*sizes), state)

        init = lambda blocks: [init_block(block) for block in blocks]
        stack = lambda x: jnp.broadcast_to(x, (self.cfg.num_periods, *x.shape))
        return ModelState(init(self.prefix), jax.tree.map(stack, init(self.periods)), init(self.tail))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        state: ModelState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], ModelState | None, Aux]:
        """Returns what the head reads, the state, and what the feed-forward networks report, averaged over layers."""
        x_BTD = self.cfg.embedding_scale * self._embed(tokens)

        def walk(x_BTD, shared, layers):
            blocks, states = layers
            new_states, auxes = [], []
            for block, block_state in zip(blocks, states or [None] * len(blocks), strict=True):
                x_BTD, block_state, shared, aux = block(x_BTD, block_state, shared, segment_ids=segment_ids)
                new_states.append(block_state)
                auxes.append(aux)
            return x_BTD, shared, (new_states if states else None, auxes)

        if self.cfg.remat != "nothing":
            policies = jax.checkpoint_policies
            keep = policies.dots_with_no_batch_dims_saveable if self.cfg.remat == "dots" else policies.nothing_saveable
            walk = jax.checkpoint(walk, policy=keep)

        def walk_period(x_BTD, layers):
            x_BTD, _, out = walk(x_BTD, shared, layers)  # What a period's blocks leave, they leave for that period.
            return x_BTD, out

        start = {"tokens": tokens} | ({"embedding": x_BTD, **self.called} if self.called else {})
        x_BTD, shared, (prefix, prefix_aux) = walk(x_BTD, start, (self.prefix, state and state.prefix))
        periods, periods_aux = [], []
        if len(self.periods):
            x_BTD, (periods, periods_aux) = jax.lax.scan(walk_period, x_BTD, (self.periods, state and state.periods))
        x_BTD, _, (tail, tail_aux) = walk(x_BTD, shared, (self.tail, state and state.tail))
        new_state = state and ModelState(prefix or [], periods or [], tail or [])
        return self.cfg.logits_scale * self.norm(x_BTD), new_state, _mean_aux([*prefix_aux, *periods_aux, *tail_aux])

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        def rows(table_VD, dims, tokens):
            # D is split among devices that have tokens of their own: as it is, each would look up the tokens of all.
            table_VD = shard(table_VD[...].astype(self.cfg.dtype), dims)
            if jax.sharding.get_abstract_mesh().empty:
                return table_VD[tokens]
            return table_VD.at[tokens].get(out_sharding=spec("BTD"))

        if self.meta is None:
            return rows(self.embedding, "Vd", tokens)
        last = self.cfg.vocab_size - 1
        word_BTD = rows(self.embedding, "Vd", jnp.minimum(tokens, last))
        meta_BTD = rows(self.meta, "vd", jnp.maximum(tokens - last - 1, 0))
        return jnp.where(tokens[..., None] > last, meta_BTD, word_BTD)

    def head_DV(self) -> Float[Array, "D V"]:
        """Returns the matrix that gives logits, in the dtype of activations."""
        weights_DV = shard(self.embedding[...].T, "DV") if self.head is None else self.head[...]
        return weights_DV.astype(self.cfg.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: ModelState | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], ModelState | None]:
        """Returns the logits of each next token, and the state if one was given."""
        x_BTD, state, _ = self.hidden(tokens, state, segment_ids=segment_ids)
        return self.logits(x_BTD), state

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns the float32 logits for what `hidden` returned."""
        logits_BTV = einsum("BTD,DV->BTV", x, self.head_DV()).astype(jnp.float32)
        cap = self.cfg.logits_soft_cap
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)


def _mean_aux(auxes: list[dict[str, Array]]) -> Aux:
    """Those of the periods have a number for each."""
    names = sorted({name for aux in auxes for name in aux})
    return {name: jnp.mean(jnp.concatenate([jnp.ravel(aux[name]) for aux in auxes if name in aux])) for name in names}
