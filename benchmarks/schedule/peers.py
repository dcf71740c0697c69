"""Other people's TPU kernels, at the sizes of our table: one row of 4096 tokens, 8 heads of 128 x 128, 1024 channels.

None of them takes documents; recurrences start from zero. Each is called as its README says.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.schedule.compile import Program

B, T, N, H, D = 1, 4096, 8, 128, 1024


def build(name: str, backward: bool, impl: str | None) -> Program:
    """Returns the peer's program; the gradients are those of all its arguments."""
    assert impl is None
    # What was written for the machine it runs on asks this process.
    jax.default_backend = lambda: "tpu"
    peer = PEERS[name]
    function, args = peer.build()
    if not backward:
        return Program(function=function, args=args, packages=(peer.package,))
    out = jax.eval_shape(function, *args)

    def run(cotangent, *args):
        o, pull = jax.vjp(function, *args)
        return o, pull(cotangent)

    return Program(function=run, args=(out, *args), packages=(peer.package,))


def _splash(T: int = T, N: int = N):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    blocks = splash.BlockSizes(
        block_q=1024,
        block_kv=1024,
        block_kv_compute=512,
        block_q_dkv=1024,
        block_kv_dkv=1024,
        block_kv_dkv_compute=512,
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * N), block_sizes=blocks
    )
    return kernel, [jax.ShapeDtypeStruct((N, T, H), jnp.bfloat16)] * 3


def _tokamax():
    import tokamax  # pyright: ignore[reportMissingImports]
    from tokamax._src import config  # pyright: ignore[reportMissingImports]

    # For as long as this process lives: gradients are traced after the function has returned.
    config.cross_compile(True).__enter__()

    def attend(q, k, v, g, beta):
        return tokamax.ops.kimi_delta_attention(q, k, v, g, beta, implementation="mosaic")[0]

    x = jax.ShapeDtypeStruct((N, B, T, H), jnp.bfloat16)
    g = jax.ShapeDtypeStruct((N, B, T, H), jnp.float32)
    return attend, [x, x, x, g, jax.ShapeDtypeStruct((N, B, T), jnp.float32)]


def _deltanet_tpu(variant: str, *gates: tuple[int, ...]):
    from deltanet_tpu import variants  # pyright: ignore[reportMissingImports]

    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    return getattr(variants, variant), [x, x, x, *(jax.ShapeDtypeStruct(gate, jnp.float32) for gate in gates)]


def _recurrentgemma():
    from recurrentgemma.jax import pallas  # pyright: ignore[reportMissingImports]

    x = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    return lambda x, a: pallas.lru_pallas_scan(x, a)[0], [x, x]


@dataclasses.dataclass(frozen=True)
class Peer:
    package: str
    case: str
    """The op of ours that computes the same."""
    build: Callable[[], tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]]
    branches_taken: float | None = None
    """How often its kernels take branches that depend on data, where that is not as in ours."""

    def python(self, environments: pathlib.Path | None) -> str | None:
        """Returns the interpreter that has the peer, or None if there is none."""
        if self.package == "jax":
            return sys.executable
        python = environments and environments.expanduser() / self.package / "bin" / "python"
        return str(python) if python and python.exists() else None


PER_HEAD, PER_CHANNEL = (B, T, N), (B, T, N, H)
PEERS = {
    "splash attention": Peer("jax", "attention", _splash),
    # What all blocks would cost: of 32 x 32 blocks of 1024, those not above the diagonal.
    "splash attention, dense": Peer("jax", "block_sparse_attention", lambda: _splash(2**15, 32), 33 / 64),
    "deltanet-tpu GLA": Peer(
        "deltanet-tpu", "linear_attention_channel", lambda: _deltanet_tpu("chunk_gla", PER_CHANNEL)
    ),
    "deltanet-tpu gated delta": Peer(
        "deltanet-tpu", "delta_rule", lambda: _deltanet_tpu("chunk_gdn", PER_HEAD, PER_HEAD)
    ),
    "deltanet-tpu KDA": Peer(
        "deltanet-tpu", "delta_rule_channel", lambda: _deltanet_tpu("chunk_kda", PER_CHANNEL, PER_HEAD)
    ),
    "tokamax KDA": Peer("tokamax", "delta_rule_channel", _tokamax),
    "recurrentgemma scan": Peer("recurrentgemma", "diagonal_scan", _recurrentgemma),
}
