"""Every mixer keeps the contract, and the contract notices mixers that do not."""

import dataclasses

import contract
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from pair import PairConfig

from efficient_lm import mixers
from efficient_lm.mixers import (
    AttentionConfig,
    CombaConfig,
    CompressionConfig,
    CrossAttentionConfig,
    DeltaNetConfig,
    DifferentialAttentionConfig,
    ForgettingAttentionConfig,
    GatedDeltaNetConfig,
    GatedDeltaProductConfig,
    GLAConfig,
    GroupedTiedAttentionConfig,
    HGRN2Config,
    HGRNConfig,
    KeyValuesConfig,
    KimiDeltaAttentionConfig,
    LigerConfig,
    LightningConfig,
    LinearTransformerConfig,
    LoLCATsConfig,
    Mamba2Config,
    MambaConfig,
    MesaNetConfig,
    Mixer,
    MixerConfig,
    MLAConfig,
    MLSTMConfig,
    MoBAConfig,
    NativeSparseAttentionConfig,
    ParallelMixerConfig,
    RetNetConfig,
    RGLRUConfig,
    RWKV6Config,
    RWKV7Config,
    S4DConfig,
)
from efficient_lm.sharding import shard

# One line adds a mixer. Sizes differ from one another, so that no two can be mixed up, and divide by two shards.
TINY = [
    AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True, output_gate=True),
    AttentionConfig(num_heads=2, head_dim=8, window_size=4, sink_tokens=3, sink_logits=True, soft_cap=5.0),
    ForgettingAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True, output_gate=True),
    DifferentialAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, lambda_init=0.3),
    GroupedTiedAttentionConfig(num_heads=4, num_kv_heads=2, head_dim=10, rotary_dim=6),
    MLAConfig(num_heads=4, latent_dim=12, query_rank=10, key_dim=8, rotary_dim=6, value_dim=16),
    MLAConfig(num_heads=4, num_latent_heads=2, latent_dim=12, key_dim=8, rotary_dim=6, value_dim=16),
    MoBAConfig(num_heads=4, num_kv_heads=2, head_dim=8, block_size=2, num_blocks=4),
    # Of all blocks but one: a choice among more is so close somewhere that bfloat16 takes another one.
    NativeSparseAttentionConfig(num_heads=8, num_kv_heads=2, head_dim=6, block_size=2, num_blocks=5, window_size=3),
    NativeSparseAttentionConfig(
        num_heads=8,
        num_kv_heads=2,
        head_dim=10,
        block_size=4,
        num_blocks=3,
        window_size=3,
        compression=CompressionConfig(block_size=2, stride=1, d_hidden=12),
    ),
    GatedDeltaNetConfig(num_heads=4, num_key_heads=2, key_dim=8, value_dim=16, beta_max=2.0),
    DeltaNetConfig(num_heads=2, key_dim=8, value_dim=16, beta_max=2.0),
    DeltaNetConfig(num_heads=2, key_dim=8, value_dim=16, conv_size=None),
    KimiDeltaAttentionConfig(num_heads=2, key_dim=8, value_dim=16, decay_rank=4, gate_rank=6, beta_max=2.0),
    GatedDeltaProductConfig(num_steps=3, num_heads=4, num_key_heads=2, key_dim=8, value_dim=16),
    CombaConfig(num_heads=2, key_dim=8, value_dim=16),
    MesaNetConfig(num_heads=2, key_dim=8, value_dim=16, num_iterations=8),
    GLAConfig(num_heads=2, key_dim=8, value_dim=16),
    HGRN2Config(num_heads=2, key_dim=8, value_dim=16, lower_bound=0.25),
    LightningConfig(num_heads=4, key_dim=8, value_dim=16, slope_scale=0.5),
    LinearTransformerConfig(num_heads=2, key_dim=8, value_dim=16),
    LoLCATsConfig(num_heads=4, num_kv_heads=2, head_dim=8, feature_dim=6, window_size=3, window_factor=0.25),
    LigerConfig(num_heads=4, num_kv_heads=2, head_dim=8, window_size=3),
    MLSTMConfig(num_heads=2, key_dim=8, value_dim=16),
    RetNetConfig(num_heads=4, key_dim=8, value_dim=16),
    RetNetConfig(num_heads=4, key_dim=8, value_dim=16, decay_temperature=4.0),
    RWKV6Config(num_heads=2, key_dim=8, value_dim=16, mix_rank=4, decay_rank=6),
    RWKV7Config(num_heads=2, key_dim=8, value_dim=16, decay_rank=4, rate_rank=6, gate_rank=10),
    HGRNConfig(width=48, lower_bound=0.25),
    Mamba2Config(num_heads=4, num_groups=2, key_dim=8, value_dim=16),
    RGLRUConfig(width=48, num_heads=4),
    S4DConfig(state_size=6),
    MambaConfig(d_inner=48, dt_rank=6, state_size=4, inner_norms=True),
    ParallelMixerConfig(
        first=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=10),
        second=Mamba2Config(num_heads=4, num_groups=2, key_dim=8, value_dim=16),
        scale="vector",
        fusion="concatenate",
        joint_projection=True,
    ),
]

RWKV7 = next(cfg for cfg in TINY if isinstance(cfg, RWKV7Config))
KEYS = KeyValuesConfig(num_kv_heads=2, head_dim=8)
# Mixers that need what an earlier layer left, with that layer.
PAIRS = [
    PairConfig(first=RWKV7, second=dataclasses.replace(RWKV7, value_rank=2)),
    PairConfig(first=KEYS, second=CrossAttentionConfig(num_heads=4, keys=KEYS)),
]


def test_every_mixer_is_covered():
    exported = {c for c in vars(mixers).values() if isinstance(c, type) and issubclass(c, MixerConfig)}
    tested = [*TINY, *(cfg for pair in PAIRS for cfg in (pair.first, pair.second))]
    assert exported - {MixerConfig} == {type(cfg) for cfg in tested}


def case(cfg):
    """One process tests all promises of a mixer: they share compiled programs."""
    named = cfg.second if isinstance(cfg, PairConfig) else cfg
    name = type(named).__name__.removesuffix("Config")
    return pytest.param(cfg, id=name, marks=pytest.mark.xdist_group(name))


@pytest.mark.parametrize("promise", contract.PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("cfg", [case(cfg) for cfg in [*TINY, *PAIRS]])
def test_promise(cfg, promise):
    promise(cfg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(MixerConfig):
    """A running mean over the document that breaks one promise."""

    breaks: str | None

    def build(self, d_model, *, rngs):
        return BrokenMixer(self.breaks, d_model, rngs=rngs)


class BrokenMixer(Mixer):
    def __init__(self, breaks, d_model, *, rngs):
        self.breaks = breaks
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (d_model, d_model)) / d_model**0.5)

    def init_state(self, batch_size, max_len, dtype=jnp.float32):
        sums_BLD = jnp.zeros((batch_size, 1, self.kernel.shape[0]))
        return shard(sums_BLD, "BLD"), shard(jnp.zeros((batch_size,), jnp.int32), "B")

    def __call__(self, x, state=None, *, segment_ids=None):
        B, T, _ = x.shape
        ids_BT = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
        if self.breaks == "packed_equals_separate":
            ids_BT = jnp.minimum(ids_BT, 1)
        sum_B1D, last_B = self.init_state(B, 0) if state is None else state
        if self.breaks == "cut_anywhere":
            sum_B1D = jnp.zeros_like(sum_B1D)
        x, ids_BT = shard(x, "BtD"), shard(ids_BT, "Bt")  # All tokens on every device.
        real_BT = ids_BT > 0
        filled_BT = jax.lax.cummax(ids_BT, axis=1)
        same_BTT = (ids_BT[:, :, None] == ids_BT[:, None]) & real_BT[:, :, None]
        causal_TT = jnp.tril(jnp.ones((T, T), bool), 0 if self.breaks != "future_does_not_leak" else 1)
        first_B = jnp.where(last_B > 0, last_B, jnp.min(jnp.where(real_BT, ids_BT, 99), axis=1, initial=99))
        sums_BTD = jnp.einsum("bts,bsd->btd", (same_BTT & causal_TT).astype(x.dtype), x)
        carried_BT = (ids_BT == first_B[:, None]) & real_BT
        sums_BTD = sums_BTD + jnp.where(carried_BT[..., None], sum_B1D, 0).astype(x.dtype)
        if self.breaks == "sharded_equals_single" and not jax.sharding.get_abstract_mesh().empty:
            sums_BTD = sums_BTD * 1.01
        y_BTD = jnp.tanh(sums_BTD) @ self.kernel[...].astype(x.dtype)
        if self.breaks == "bfloat16_is_close" and x.dtype == jnp.bfloat16:
            y_BTD = y_BTD * 1.1
        if self.breaks == "extremes_are_finite":
            y_BTD = y_BTD + 0.0 * jnp.sqrt(jnp.sum(x, axis=-1, keepdims=True) ** 2)
        y_BTD = shard(y_BTD, "BTD")
        if state is None:
            return y_BTD, None
        last_B = jnp.maximum(last_B, jnp.max(filled_BT, axis=1, initial=0))
        keep_B11 = (jnp.max(filled_BT, axis=1, initial=0) <= first_B)[:, None, None]
        total_B1D = jnp.sum(jnp.where((ids_BT == last_B[:, None])[..., None], x, 0), axis=1, keepdims=True)
        return y_BTD, (jnp.where(keep_B11, sum_B1D, 0) + total_B1D.astype(sum_B1D.dtype), last_B)


@pytest.mark.parametrize("promise", contract.PROMISES, ids=lambda promise: promise.__name__)
def test_contract_notices(promise):
    promise(Broken(breaks=None))
    name = "cut_anywhere" if promise is contract.cut_packed else promise.__name__
    with pytest.raises(AssertionError):
        promise(Broken(breaks=name))
