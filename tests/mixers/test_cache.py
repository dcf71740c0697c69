"""Caches that are full, rings, or sinks and rings: exact in chunks of any length, and no larger than they say."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.mixers import (
    AttentionConfig,
    CompressionConfig,
    DifferentialAttentionConfig,
    ForgettingAttentionConfig,
    GroupedTiedAttentionConfig,
    MLAConfig,
    MoBAConfig,
    NativeSparseAttentionConfig,
)
from efficient_lm.sharding import make_mesh, shard, spec

T = 33
CONFIGS = {
    "full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    "ring": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window_size=5),
    "itself": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window_size=1),
    "sinks": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window_size=5, sink_tokens=3, sink_logits=True),
}
# Documents longer and shorter than window and sinks; padding on the left, in a document, between two, on the right.
# Chunks end within documents: a state belongs to the document of the next token.
IDS = np.array(
    [[0] * 2 + [1] * 7 + [0] * 3 + [1] * 9 + [2] * 2 + [0] + [3] * 7 + [0] * 2, [1] * 21 + [2] * 12, [0] * 33], np.int32
)
CHUNKS = {"long": [11] * 3, "around a window": [4, 7, 4, 7, 4, 7], "one by one": [11] + [1] * 22}


def in_chunks(mixer, x_BTD, ids_BT, sizes, max_len=T):
    state, parts, start = mixer.init_state(x_BTD.shape[0], max_len), [], 0
    for size in sizes:
        part = slice(start, start + size)
        y_BTD, state = contract.call(mixer, x_BTD[:, part], state, None if ids_BT is None else ids_BT[:, part])
        parts.append(y_BTD)
        start += size
    return jnp.concatenate(parts, axis=1), state


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_equal_one_pass(name, chunks):
    mixer = contract.build(CONFIGS[name])
    x_BTD = jax.random.normal(jax.random.key(1), (3, T, contract.D_MODEL))
    ids_BT = np.minimum(IDS, 1) if chunks == "one by one" else IDS
    want_BTD, _ = contract.call(mixer, x_BTD, None, ids_BT)
    got_BTD, state = in_chunks(mixer, x_BTD, ids_BT, CHUNKS[chunks])
    is_real = IDS[..., None] > 0
    contract.assert_close(got_BTD * is_real, want_BTD * is_real, 1e-5, chunks)
    assert state.length.tolist() == ([25, 33, 0] if chunks == "one by one" else [7, 12, 0])
    want_slots = {"full": T, "ring": 5, "itself": 1, "sinks": 8}[name]
    assert {a.shape for a in state.arrays} == {(3, want_slots, 2, 8)}


def test_gradients_go_through_a_cache():
    mixer = contract.build(CONFIGS["sinks"])
    x_BTD, dy_BTD = jax.random.normal(jax.random.key(1), (2, 3, T, contract.D_MODEL))
    cotangents_BTD, ids_BT = dy_BTD * (IDS[..., None] > 0), jnp.asarray(IDS)
    whole = lambda mixer, x: jnp.sum(mixer(x, segment_ids=ids_BT)[0] * cotangents_BTD)
    cut = lambda mixer, x: jnp.sum(in_chunks(mixer, x, ids_BT, [14, 5, 14])[0] * cotangents_BTD)
    gradient = lambda loss: jax.jit(jax.grad(loss, argnums=(0, 1)))(mixer, x_BTD)
    contract.assert_close(gradient(cut), gradient(whole), 1e-4, "gradient of")


def test_state_belongs_to_the_first_document_of_the_next_row():
    """Ids count anew in each call: what matters is which tokens share one."""
    mixer = contract.build(CONFIGS["ring"])
    x_BTD = jax.random.normal(jax.random.key(1), (3, T, contract.D_MODEL))
    want_BTD, _ = contract.call(mixer, x_BTD, None, IDS)
    _, state = contract.call(mixer, x_BTD[:, :24], mixer.init_state(3, T), IDS[:, :24])
    renamed = np.maximum(IDS[:, 24:] - np.array([[2], [1], [0]]), 0)
    got_BTD, _ = contract.call(mixer, x_BTD[:, 24:], state, renamed)
    is_real = renamed[1:2, :, None] > 0
    contract.assert_close(got_BTD[1:2] * is_real, want_BTD[1:2, 24:] * is_real, 1e-5, "renamed")


@pytest.mark.parametrize("max_len", [0, 2, 3, 7])
def test_fewer_tokens_than_window_and_sinks(max_len):
    mixer = contract.build(CONFIGS["sinks"])
    x_BTD = jax.random.normal(jax.random.key(1), (3, max_len, contract.D_MODEL))
    got_BTD, state = in_chunks(mixer, x_BTD, None, [max_len // 2, *[1] * (max_len - max_len // 2)], max_len)
    contract.assert_close(got_BTD, contract.call(mixer, x_BTD)[0], 1e-5, "short")
    assert state.arrays[0].shape[1] == max_len


@pytest.mark.parametrize("name", ["sinks", "latent", "latents", "forgetting"])
def test_on_a_mesh(name):
    """Caches are split like the heads that they serve."""
    others = {
        "latent": MLAConfig(**MLA),
        "latents": MLAConfig(**MLA, num_latent_heads=2),
        "forgetting": ForgettingAttentionConfig(**WIDTHS),
    }
    cfg = (CONFIGS | others)[name]
    x_BTD, ids_BT = contract.inputs(), jnp.asarray(contract.PACKED)
    run = lambda x_BTD, ids_BT: in_chunks(contract.build(cfg), x_BTD, ids_BT, [3, 8, 1], contract.T)
    want_BTD, _ = jax.jit(run)(x_BTD, ids_BT)
    with jax.set_mesh(make_mesh({"data": 4, "model": 2})):
        got_BTD, state = jax.jit(run)(shard(x_BTD, "BTD"), shard(ids_BT, "BT"))
        assert [a.sharding.spec for a in state.arrays] == [spec(dims) for dims in state.dims]
    contract.assert_close(np.asarray(got_BTD), want_BTD, 1e-5, name)


WIDTHS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MLA = {"num_heads": 4, "latent_dim": 12, "key_dim": 8, "rotary_dim": 6, "value_dim": 16}
# Numbers in bfloat16 and in float32 that each token of the cache takes; tokens of 100.
NUMBERS = {
    "GQA": (AttentionConfig(**WIDTHS), 2 * 2 * 8, 0, 100),
    "MQA": (AttentionConfig(**(WIDTHS | {"num_kv_heads": 1})), 2 * 8, 0, 100),
    "window": (AttentionConfig(**WIDTHS, window_size=30), 2 * 2 * 8, 0, 30),
    "window and sinks": (AttentionConfig(**WIDTHS, window_size=30, sink_tokens=4), 2 * 2 * 8, 0, 34),
    "wide window": (AttentionConfig(**WIDTHS, window_size=300, sink_tokens=4), 2 * 2 * 8, 0, 100),
    "MLA": (MLAConfig(**MLA), 12 + 6, 0, 100),
    "grouped latent": (MLAConfig(**MLA, num_latent_heads=2), 2 * (12 + 6), 0, 100),
    "grouped tied": (GroupedTiedAttentionConfig(**WIDTHS, rotary_dim=4), 2 * 8 + 4, 0, 100),
    "differential": (DifferentialAttentionConfig(**WIDTHS), 2 * (2 * 8 + 16), 0, 100),
    "forgetting": (ForgettingAttentionConfig(**WIDTHS), 2 * 2 * 8, 4, 100),
    # Whole blocks of 16, and per block one key, or a key and a value: a 16th of it for each token.
    "MoBA": (MoBAConfig(**WIDTHS, block_size=16, num_blocks=3), 2 * 2 * 8 + 2 * 8 // 16, 0, 112),
    "NSA": (NativeSparseAttentionConfig(**WIDTHS, block_size=16), 2 * 2 * 8 + 2 * 2 * 8 // 16, 0, 112),
    "NSA, compressed": (
        NativeSparseAttentionConfig(
            **WIDTHS, block_size=16, compression=CompressionConfig(block_size=8, stride=4, d_hidden=8)
        ),
        2 * 2 * 8 + 2 * 2 * 8 // 4,
        0,
        112,
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_bytes(name):
    """A cache takes what its formula says, and 4 bytes per row: the length of its document."""
    cfg, narrow, wide, tokens = NUMBERS[name]
    state = contract.build(cfg).init_state(3, 100, jnp.bfloat16)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 3 * (tokens * (2 * narrow + 4 * wide) + 4)
