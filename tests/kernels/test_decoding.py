"""One token at a time: every recurrent op has a path of its own for it, which has to agree and must not cost more."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from tests.kernels import recurrent

B, K, N, H, P, D, W = 3, 2, 4, 64, 32, 48, 4


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


def heads(*decay):
    args = {"q": normal(0, B, 1, K, H), "k": normal(1, B, 1, K, H) / 8, "v": normal(2, B, 1, N, P)}
    return args | {"g": -jnp.exp(normal(3, *decay)), "state": normal(4, B, N, H, P)}


def selective():
    args = {"x": normal(0, B, 1, D), "dt": jnp.exp(normal(1, B, 1, D)), "A": -jnp.exp(normal(2, D, 16))}
    return args | {"B": normal(3, B, 1, 16), "C": normal(4, B, 1, 16), "D": normal(5, D), "state": normal(6, B, D, 16)}


def convolution(dtype=jnp.float32):
    args = {"x": normal(0, B, 1, D), "w": normal(1, D, W), "bias": normal(2, D), "state": normal(3, B, W - 1, D)}
    return {name: x.astype(dtype) for name, x in args.items()}


replaced = {"a": normal(9, B, 1, K, H) / 8, "b": normal(10, B, 1, K, H) / 8}
token, channel, beta = (B, 1, N), (B, 1, N, H), {"beta": jnp.abs(normal(7, B, 1, N))}
complex_a = 0.9 * jnp.exp(1j * normal(0, D))
CASES = {
    "linear_attention": (kernels.linear_attention, heads(*token)),
    "linear_attention_head": (kernels.linear_attention, heads(N)),
    "linear_attention_channel": (kernels.linear_attention, heads(*channel)),
    "linear_attention_bonus": (kernels.linear_attention, heads(*channel) | {"bonus": normal(8, N, H)}),
    "delta_rule": (kernels.delta_rule, heads(*token) | beta),
    "delta_rule_channel": (kernels.delta_rule, heads(*channel) | beta),
    "generalized_delta_rule": (kernels.generalized_delta_rule, heads(*token) | replaced),
    "generalized_delta_rule_channel": (kernels.generalized_delta_rule, heads(*channel) | replaced),
    "diagonal_scan": (
        kernels.diagonal_scan,
        {"a": jax.nn.sigmoid(normal(0, B, 1, D)), "x": normal(1, B, 1, D), "state": normal(2, B, D)},
    ),
    "diagonal_scan_complex": (
        functools.partial(kernels.diagonal_scan, reverse=True),
        {"a": complex_a, "x": normal(1, B, 1, D) + 0j, "state": normal(2, B, D) + 1j * normal(3, B, D)},
    ),
    "selective_scan": (kernels.selective_scan, selective()),
    "short_conv": (functools.partial(kernels.short_conv, activation="silu"), convolution()),
    "short_conv_half": (kernels.short_conv, convolution(jnp.bfloat16)),
}


@pytest.mark.parametrize("documents", [None, (5, 0, 1)])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case, documents):
    op, args = CASES[case]
    ids = None if documents is None else jnp.asarray(documents)[:, None]
    got, want = (recurrent.run(functools.partial(op, segment_ids=ids, impl=impl), args) for impl in (None, "ref"))
    if case.endswith("half"):
        assert {name: e for name in want if not (e := recurrent.error(got[name], want[name])) < 1e-2} == {}
    elif case.endswith("complex"):
        for part in (np.real, np.imag):
            recurrent.check(jax.tree.map(part, got), jax.tree.map(part, want))
    else:
        recurrent.check(got, want)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("case", CASES)
def test_neither_loops_nor_chunks(case, platform):
    """No loop over tokens, no kernel for chunks, and no array much larger than the largest argument."""
    op, args = CASES[case]
    ids = jnp.ones((B, 1), jnp.int32)
    run = jax.jit(lambda args: op(**args, segment_ids=ids))
    text = run.trace(args).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" not in text
    assert "custom_call" not in text
    shapes = {tuple(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<((?:\d+x)+)", text)}
    largest = max(x.size for x in args.values())
    assert [shape for shape in shapes if math.prod(shape) > 1.5 * largest] == []


@pytest.mark.parametrize(("case", "most"), [("linear_attention", 3), ("delta_rule", 4)])
def test_bytes_on_a_cpu(case, most):
    """The state is read once for each of the vectors that read it, once to change it, and written once."""
    op, args = CASES[case]
    ids = jnp.ones((B, 1), jnp.int32)
    step = jax.jit(lambda state, args: op(**args, state=state, segment_ids=ids), donate_argnames="state")
    others = {name: x for name, x in args.items() if name != "state"}
    compiled = step.lower(args["state"], others).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert cost is not None
    assert memory is not None
    assert cost["bytes accessed"] < (most + 0.5) * args["state"].nbytes
    assert memory.temp_size_in_bytes < args["state"].nbytes / 2
