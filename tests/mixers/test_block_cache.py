"""Attention to chosen blocks where there is a choice: long documents in a row, and a cache in pieces of any length."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.mixers import AttentionConfig, CompressionConfig, MoBAConfig, NativeSparseAttentionConfig
from efficient_lm.sharding import make_mesh, shard, spec

WIDTHS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
CONFIGS = {
    "MoBA": MoBAConfig(**WIDTHS, block_size=4, num_blocks=3),
    "NSA": NativeSparseAttentionConfig(**WIDTHS, block_size=4, num_blocks=4, window_size=6),
    "NSA, compressed": NativeSparseAttentionConfig(
        **WIDTHS,
        block_size=2,
        num_blocks=4,
        window_size=5,
        compression=CompressionConfig(block_size=2, stride=1, d_hidden=10),
    ),
}
# Documents of 29 and 13 tokens with padding in and about them; one of 40. Borders of blocks are nowhere in the row's.
IDS = np.array([[0] * 2 + [1] * 17 + [0] + [1] * 12 + [2] * 13, [1] * 40 + [0] * 5], np.int32)
T = IDS.shape[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_separate_where_blocks_are_chosen(name):
    mixer = contract.build(CONFIGS[name])
    x_BTD, dy_BTD = jax.random.normal(jax.random.key(1), (2, 2, T, contract.D_MODEL))

    def weighted(mixer, x_BTD, ids_BT):
        y_BTD, _ = mixer(x_BTD, segment_ids=ids_BT)
        return jnp.sum(jnp.where(ids_BT[..., None] > 0, y_BTD * dy_BTD, 0)), y_BTD

    run = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))
    grads, y_BTD = run(mixer, x_BTD, jnp.asarray(IDS))
    # Each document by itself, in the places that it has.
    alone = [run(mixer, x_BTD, jnp.asarray(np.where(d == IDS, 1, 0))) for d in (1, 2)]
    want_BTD = sum(y_BTD * (d == IDS)[..., None] for d, (_, y_BTD) in enumerate(alone, 1))
    contract.assert_close(y_BTD * (IDS > 0)[..., None], want_BTD, 1e-5, name)
    contract.assert_close(grads, jax.tree.map(jnp.add, alone[0][0], alone[1][0]), 1e-4, f"{name}, gradient of")

    # The same tokens moved to the row's start.
    first = np.nonzero(IDS[0] == 1)[0]
    y_1TD, _ = contract.call(mixer, x_BTD[:1, first])
    contract.assert_close(y_BTD[0, first], y_1TD[0], 1e-5, f"{name}, moved")


def in_pieces(mixer, x_BTD, ids_BT):
    """A prompt and more of it; tokens one by one, through the second row's end of a block and of the next; the rest."""
    state, parts, start = mixer.init_state(2, T), [], 0
    for size in (11, 11, 1, 1, 1, 1, 1, 1, 1, 16):
        part = slice(start, start + size)
        y_BTD, state = contract.call(mixer, x_BTD[:, part], state, ids_BT[:, part])
        parts.append(y_BTD)
        start += size
    assert start == T
    return jnp.concatenate(parts, axis=1), state


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_equal_one_pass(name):
    mixer = contract.build(CONFIGS[name])
    x_BTD = jax.random.normal(jax.random.key(1), (2, T, contract.D_MODEL))
    want_BTD, _ = contract.call(mixer, x_BTD, None, IDS)
    got_BTD, state = in_pieces(mixer, x_BTD, IDS)
    is_real = IDS[..., None] > 0
    contract.assert_close(got_BTD * is_real, want_BTD * is_real, 1e-5, name)
    assert state.length.tolist() == [13, 40]


@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_mesh(name):
    """Caches and summaries are split like the rows and heads that they serve, through prefill and decoding."""
    x_BTD, is_real = jax.random.normal(jax.random.key(1), (2, T, contract.D_MODEL)), IDS[..., None] > 0
    want_BTD, want_state = in_pieces(contract.build(CONFIGS[name]), x_BTD, IDS)
    with jax.set_mesh(make_mesh({"data": 2, "model": 2}, jax.devices()[:4])):
        mixer = contract.build(CONFIGS[name])
        got_BTD, state = in_pieces(mixer, shard(x_BTD, "BTD"), shard(jnp.asarray(IDS), "BT"))
        pairs = [*zip(state.tokens.arrays, state.tokens.dims, strict=True)]
        pairs += zip(state.summaries, state.summary_dims, strict=True)
        for array, dims in pairs:
            assert array.sharding.spec == spec(dims)
            assert array.addressable_shards[0].data.size == array.size // 4
    contract.assert_close(np.asarray(got_BTD) * is_real, want_BTD * is_real, 1e-5, name)
    contract.assert_close(jax.device_get(state), want_state, 1e-5, f"{name}, state")


def test_moba_that_takes_all_blocks_is_attention():
    x_BTD, dy_BTD = jax.random.normal(jax.random.key(1), (2, 2, T, contract.D_MODEL))

    @jax.jit
    def run(mixer):
        y_BTD, vjp = jax.vjp(lambda mixer, x: mixer(x, segment_ids=jnp.asarray(IDS))[0], mixer, x_BTD)
        return y_BTD, jax.tree.leaves(vjp(dy_BTD * (IDS > 0)[..., None]))

    attention = run(contract.build(AttentionConfig(**WIDTHS)))
    contract.assert_close(
        run(contract.build(MoBAConfig(**WIDTHS, block_size=4, num_blocks=12))), attention, 1e-5, "all"
    )
    with pytest.raises(AssertionError):
        contract.assert_close(run(contract.build(CONFIGS["MoBA"])), attention, 1e-2, "three")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "not a multiple"),
        ({"num_blocks": 0}, "num_blocks=0"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    for cfg in (MoBAConfig, NativeSparseAttentionConfig):
        with pytest.raises(ValueError, match=message):
            contract.build(cfg(**{**WIDTHS, "block_size": 4, "num_blocks": 3, **change}))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"block_size": 4, "stride": 0}, "stride=0"),
        ({"block_size": 12, "stride": 2}, "at most block_size=8"),
        ({"block_size": 6, "stride": 4}, "multiples of compression.stride=4"),
        ({"block_size": 6, "stride": 3}, "multiples of compression.stride=3"),
    ],
)
def test_compression_that_does_not_fit(sizes, message):
    compression = CompressionConfig(**sizes, d_hidden=4)
    with pytest.raises(ValueError, match=message):
        contract.build(NativeSparseAttentionConfig(**WIDTHS, block_size=8, num_blocks=3, compression=compression))
