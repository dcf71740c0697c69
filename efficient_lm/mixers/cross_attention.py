"""Attention of many layers to keys and values that are made, and cached, once (https://arxiv.org/abs/2405.05254).

`KeyValues` is a block's mixer that leaves the keys and values of its input; `CrossAttention` reads what the last of
these left with queries of its own, and has no state. In YOCO the first stands at the end of a self-decoder without any
other cache that grows: `prefix="R R R K", pattern="C"`. Nothing that is remembered depends on the readers, so a
compiled program that returns only the state leaves them out: prompts but for their last token take the prefix alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import pallas_kernels as kernels
from efficient_lm import context
from efficient_lm.layers import Einsum
from efficient_lm.mixers.base import MixerConfig, Shared, SharingMixer, State
from efficient_lm.mixers.cache import Cache, Memory, Places, init_cache, remember
from efficient_lm.rotary import RotaryConfig, document_positions, rotate
from efficient_lm.sharding import per_shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValuesConfig(MixerConfig):
    """Of a block without a feed-forward network, whose norm is that of the keys and values: it adds nothing to x."""

    num_kv_heads: int
    head_dim: int
    rotary: RotaryConfig | None = RotaryConfig()
    """Of keys and of the queries that read them. None: no positions at all."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "KeyValues":
        if self.rotary is not None and int(self.head_dim * self.rotary.fraction) % 2:
            raise ValueError(
                f"rotary turns pairs of channels: head_dim={self.head_dim} times "
                f"fraction={self.rotary.fraction} must be even"
            )
        return KeyValues(self, d_model, rngs=rngs)

    def init_cache(self, batch_size: int, max_len: int, dtype: DTypeLike) -> Cache:
        sizes = {"K": self.num_kv_heads, "H": self.head_dim}
        return init_cache(("BSKH", dtype), ("BSKH", dtype), batch_size=batch_size, max_len=max_len, **sizes)


class KeyValues(SharingMixer):
    def __init__(self, cfg: KeyValuesConfig, d_model: int, *, rngs: nnx.Rngs):
        D, K, H = d_model, cfg.num_kv_heads, cfg.head_dim
        self.cfg = cfg
        self.k_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)
        self.v_proj = Einsum("BTD,DKH->BTKH", D=D, K=K, H=H, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> Cache:
        return self.cfg.init_cache(batch_size, max_len, dtype)

    def state_read(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> State:
        return ()  # Only its readers do.

    def flops_per_token(self, seq_len: int) -> float:
        del seq_len
        return 0.0

    @jax.named_scope("key_values")
    def share(
        self,
        x: Float[Array, "B T D"],
        state: Cache | None,
        shared: Shared,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, Shared]:
        ids_BT = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        positions_BT, length_B = document_positions(ids_BT, state and state.length)
        k_BTKH = self.k_proj(x)
        if self.cfg.rotary is not None:
            k_BTKH = rotate(k_BTKH, positions_BT, self.cfg.rotary)
        memory, state = remember((k_BTKH, self.v_proj(x)), state, ids_BT, positions_BT, length_B)
        if context.num_parts() > 1:
            memory = _gather(memory)
        return jnp.zeros_like(x), state, {**shared, "key_values": memory}


def _gather(memory: Memory) -> Memory:
    """Returns it with the keys and values of all parts of the sequence in each: they are sent once, for all readers."""

    def gather(k, v, ids, *past):
        (k, v), places = context.gather_keys((k, v), ids, *past)
        return k, v, places["kv_segment_ids"]

    past = () if memory.cache is None else (None, memory.positions)  # To be refused.
    run = per_shard(gather, "BTKH,BTKH,BT" + ",BT" * len(past), "BSKH,BSKH,BS", split_tokens=True)
    *arrays, kv_ids_BS = run(*memory.arrays, memory.segment_ids, *past)
    return dataclasses.replace(memory, arrays=tuple(arrays), kv_segment_ids=kv_ids_BS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig(MixerConfig):
    num_heads: int
    keys: KeyValuesConfig
    """Those that it reads: the same as that block's."""

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> "CrossAttention":
        if self.num_heads % self.keys.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.keys.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        return CrossAttention(self, d_model, rngs=rngs)


class CrossAttention(SharingMixer):
    """Causal: a token reads the keys and values of its document up to its own."""

    def __init__(self, cfg: CrossAttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        D, N, H = d_model, cfg.num_heads, cfg.keys.head_dim
        self.cfg = cfg
        self.q_proj = Einsum("BTD,DNH->BTNH", D=D, N=N, H=H, rngs=rngs)
        self.o_proj = Einsum("BTNH,NHD->BTD", N=N, H=H, D=D, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> State:
        return ()

    def state_read(self, batch_size: int, max_len: int, dtype: DTypeLike = jnp.float32) -> Cache:
        return self.cfg.keys.init_cache(batch_size, max_len, dtype)

    def flops_per_token(self, seq_len: int) -> float:
        return 2.0 * self.cfg.num_heads * self.cfg.keys.head_dim * (seq_len + 1.0)

    @jax.named_scope("cross_attention")
    def share(
        self,
        x: Float[Array, "B T D"],
        state: State,
        shared: Shared,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], State, Shared]:
        del segment_ids  # As the keys have them.
        memory, keys = shared.get("key_values"), self.cfg.keys
        if memory is None:
            raise ValueError("CrossAttention reads what KeyValues leaves: put a block of these before it")
        assert isinstance(memory, Memory)
        if (found := memory.arrays[0].shape[2:]) != (keys.num_kv_heads, keys.head_dim):
            raise ValueError(
                f"CrossAttention is for num_kv_heads={keys.num_kv_heads} and head_dim={keys.head_dim}, "
                f"the keys before it have {found[0]} and {found[1]}"
            )
        q_BTNH = self.q_proj(x)
        if keys.rotary is not None:
            q_BTNH = rotate(q_BTNH, memory.positions, keys.rotary)

        def op(q, k, v, *places):
            return kernels.attention(q, k, v, **Places(*places)._asdict())

        def read(arrays, places, is_cache):
            del is_cache
            run = per_shard(op, f"BTNH,BSKH,BSKH,{Places.dims}", "BTNH,BNT", split_tokens=True)
            return run(q_BTNH, *arrays, *places)

        return self.o_proj(memory.attend(read)), state, shared
