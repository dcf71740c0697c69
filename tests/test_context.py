"""Sequences in parts on several devices: the same loss and gradients as on one, and little to send."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm import context
from efficient_lm.hlo import Program, collectives
from efficient_lm.mixers import (
    AttentionConfig,
    CombaConfig,
    GatedDeltaNetConfig,
    HGRNConfig,
    Mamba2Config,
    MambaConfig,
    MesaNetConfig,
    MLSTMConfig,
    RetNetConfig,
    RGLRUConfig,
    RWKV7Config,
    S4DConfig,
)
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.sampling import SamplingConfig, generate
from efficient_lm.sharding import make_mesh, per_shard, shard, sharding, undivided

# Eight parts of four tokens: documents that pass through several, end on a border or lie inside of a part; parts that
# are all padding, between documents and inside of one.
T = 32
IDS = np.array(
    [
        [1] * 32,
        [0] * 5 + [1] * 4 + [2] * 3 + [3] * 14 + [0] * 6,
        [1] * 2 + [0] * 11 + [1] * 5 + [2] + [3] + [0] * 8 + [4] * 4,
    ],
    np.int32,
)
B, N, K, H, P = len(IDS), 4, 2, 5, 3


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def logs(seed, *shape):
    return -np.exp(normal(seed, *shape) - 1)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


q, k, v = normal(0, B, T, K, H), unit(normal(1, B, T, K, H)), normal(2, B, T, N, P)
beta, S = 1 / (1 + np.exp(normal(3, B, T, N))), normal(4, B, N, H, P)
heads = "BTNH,BTNH,BTNP"
a = np.exp(logs(5, B, T, 6) + 3j * normal(6, B, T, 6)).astype(np.complex64)
wide_q, wide_k = normal(7, B, T, N, H), unit(normal(8, B, T, N, H))
# What the op gets, by letters: one argument for each, the state before the last, and the documents.
OPS = {
    "linear_attention": (context.linear_attention, "BTKH,BTKH,BTNP", (q, k, v), "BTNP,BNHP", S),
    "linear_attention, heads": (
        lambda q, k, v, g, **rest: context.linear_attention(q, k, v, g, **rest),
        "BTKH,BTKH,BTNP,N",
        (q, k, v, logs(9, N)),
        "BTNP,BNHP",
        S,
    ),
    "linear_attention, channels and bonus": (
        lambda q, k, v, g, u, **rest: context.linear_attention(q, k, v, g, bonus=u, **rest),
        "BTKH,BTKH,BTNP,BTNH,NH",
        (q, k, v, logs(10, B, T, N, H), normal(11, N, H)),
        "BTNP,BNHP",
        S,
    ),
    "delta_rule": (
        context.delta_rule,
        "BTKH,BTKH,BTNP,BTN,BTN",
        (q, k, v, beta, logs(12, B, T, N)),
        "BTNP,BNHP",
        S,
    ),
    "generalized_delta_rule": (
        context.generalized_delta_rule,
        "BTNH,BTNH,BTNP,BTNH,BTNH,BTNH",
        (wide_q, wide_k, v, -wide_k, wide_k * beta[..., None], logs(13, B, T, N, H)),
        "BTNP,BNHP",
        S,
    ),
    "diagonal_scan": (context.diagonal_scan, "BTF,BTF", (a, a[:, ::-1]), "BTF,BF", a[:, 0]),
    "diagonal_scan, fixed": (context.diagonal_scan, "F,BTF", (a[0, 0], a), "BTF,BF", a[:, 0]),
    "selective_scan": (
        context.selective_scan,
        "BTF,BTF,FH,BTH,BTH",
        (normal(14, B, T, 6), -logs(15, B, T, 6), logs(16, 6, H), normal(17, B, T, H), normal(18, B, T, H)),
        "BTF,BFH",
        normal(19, B, 6, H),
    ),
    "short_conv": (
        context.short_conv,
        "BTF,FW",
        (normal(20, B, T, 6), normal(21, 6, 7)),
        "BTF,BWF",
        normal(22, B, 6, 6),
    ),
    "attention": (
        lambda q, k, v, g, state, **rest: context.attention(q, k, v, g, **rest),
        "BTNH,BSKH,BSKP,BSN",
        (wide_q, k, normal(23, B, T, K, P), logs(24, B, T, N)),
        "BTNP,BNT",
        None,
    ),
    "attention, window": (
        lambda q, k, v, state, **rest: context.attention(q, k, v, window_size=9, sink_tokens=2, **rest),
        "BTNH,BSKH,BSKP",
        (wide_q, k, normal(23, B, T, K, P)),
        "BTNP,BNT",
        None,
    ),
}


# Of two rules of matrices, which are one to context.py, the one that compiles for half a minute is left to -m meshes.
SLOW = pytest.param("generalized_delta_rule", marks=pytest.mark.meshes)


@pytest.mark.parametrize("name", [SLOW if name == "generalized_delta_rule" else name for name in OPS])
def test_op_in_eight_parts(name):
    """Outputs, states and every gradient are those of all tokens on one device."""
    op, ins, args, outs, state = OPS[name]

    def run(args, state, ids):
        def loss(args, state):
            call = lambda *xs: op(*xs[:-2], state=xs[-2], segment_ids=xs[-1])
            state_dims = outs.split(",")[1] if state is not None else "B"
            out = per_shard(call, f"{ins},{state_dims},BT", outs, split_tokens=True)(*args, state, ids)
            # The log of no weight at all, at padding, is -inf.
            finite = [jnp.where(jnp.abs(x) < jnp.inf, x, 0) for x in out]
            return sum(jnp.sum(jnp.sin(x.real + 0.3) + jnp.cos(x.imag)) for x in finite), finite

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(args, state)
        return out, grads

    one = jax.jit(run)(args, state, IDS)
    with jax.set_mesh(make_mesh({"context": 8})):
        put = lambda dims, x: None if x is None else shard(jnp.asarray(x), dims)
        placed = tuple(put(dims.replace("S", "T"), x) for dims, x in zip(ins.split(","), args, strict=True))
        parts = jax.device_get(jax.jit(run)(placed, put(outs.split(",")[1], state), put("BT", IDS)))
    for got, want in zip(jax.tree.leaves(parts), jax.tree.leaves(one), strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


RECURRENT = [
    RetNetConfig(num_heads=2, key_dim=8, value_dim=4),
    GatedDeltaNetConfig(num_heads=2, key_dim=8, value_dim=4),
    Mamba2Config(num_heads=2, num_groups=2, key_dim=8, value_dim=4),
    MambaConfig(d_inner=16, dt_rank=2, state_size=4),
    S4DConfig(state_size=4),
    HGRNConfig(width=16),
    RGLRUConfig(width=16, num_heads=2),
    MLSTMConfig(num_heads=2, key_dim=8, value_dim=4),
    CombaConfig(num_heads=2, key_dim=8, value_dim=4),
    RWKV7Config(num_heads=2, key_dim=8, value_dim=4, decay_rank=4, rate_rank=4, gate_rank=4),
    MesaNetConfig(num_heads=2, key_dim=8, value_dim=4, num_iterations=2),
]
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rotary=None)


def sent(cfg, num_tokens):
    """Returns what a mixer, forward and backward, sends along eight parts of a row."""
    mesh = make_mesh({"context": 8})
    with jax.set_mesh(mesh):
        mixer = jax.eval_shape(lambda: cfg.build(16, rngs=nnx.Rngs(0)))
        x = jax.ShapeDtypeStruct((1, num_tokens, 16), jnp.float32, sharding=sharding("BTD"))
        ids = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32, sharding=sharding("BT"))
        grad = jax.jit(jax.grad(lambda mixer, x, ids: jnp.sum(mixer(x, segment_ids=ids)[0] ** 2), argnums=(0, 1)))
        return collectives(Program(grad.lower(mixer, x, ids).compile().as_text() or ""), mesh.shape)


def of_mixer(cfg, **options):
    return pytest.param(cfg, id=type(cfg).__name__, **options)


# Those that have all there is: positions and a product of decays, one of matrices and convolutions.
@pytest.mark.parametrize(
    "cfg", [*map(of_mixer, RECURRENT[:2]), *(of_mixer(cfg, marks=pytest.mark.meshes) for cfg in RECURRENT[2:])]
)
def test_recurrences_send_states_not_tokens(cfg):
    """What recurrent mixers send does not grow with the number of tokens, to the byte."""
    short, long = sent(cfg, 2**13), sent(cfg, 2**17)
    print(f"\n{type(cfg).__name__} {sum(collective.bytes for collective in short):.0f} bytes")
    assert short == long
    assert short
    assert sum(collective.bytes for collective in short) < 2**17


def test_attention_sends_keys_and_values():
    """Each device receives the others' keys and values, and sends back their gradients: what a ring would send."""
    num_tokens = 2**13
    found = {collective.kind: collective.bytes for collective in sent(ATTENTION, num_tokens)}
    others = 7 / 8 * num_tokens
    keys_and_values = others * 2 * 2 * 8 * 4  # Of two heads of eight channels in float32.
    assert found["all-gather"] == keys_and_values + others * 4  # The documents.
    assert found["reduce-scatter"] == keys_and_values
    assert found.keys() <= {"all-gather", "reduce-scatter", "all-reduce"}
    assert found["all-reduce"] < 2**14  # The weights' gradients.


def test_samples_one_prompt():
    """Neither its row nor its tokens can be divided among devices; what comes is what one device says."""
    blocks = {"M": BlockConfig(mixer=RECURRENT[2], ffn=None), "A": BlockConfig(mixer=ATTENTION, ffn=None)}
    cfg = ModelConfig(vocab_size=32, d_model=16, blocks=blocks, pattern="M A", num_periods=1, dtype="float32")
    make = jax.jit(lambda: cfg.build(rngs=nnx.Rngs(params=jax.random.key(0))))
    sample = lambda model: next(
        generate(model, [[1, 2, 3]], jax.random.key(0), SamplingConfig(max_tokens=3, temperature=0.0), tokens_at_once=3)
    )
    one = sample(make())
    with jax.set_mesh(make_mesh({"data": 2, "model": 2, "context": 2})), undivided(make()) as model:
        np.testing.assert_array_equal(sample(model), one)
