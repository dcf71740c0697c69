"""Compiles mixtures of experts for 64 chips that are not here, and reads what is sent: `python -m tests.aot.experts`.

Rows of different numbers go by a ragged all-to-all and are multiplied in kernels; slots go by an all-to-all. Tokens are
never gathered. Weights are, along the data axis, as all weights are that lie in parts on the devices of that axis.

FLOPs are XLA's count, which takes a kernel to work on all rows that there is room for. It works on those that came.
"""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from efficient_lm.ffns import MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.sharding import make_mesh, spec
from efficient_lm.topologies import parse_target, prepare_compilers

B, T, D, F, E, K = 64, 1024, 1024, 512, 16, 2
AXES = {"data": 8, "expert": 8}


def compile_layer(cfg: MoEConfig) -> jax.stages.Compiled:
    """Returns the layer, forward and backward, compiled for the mesh."""
    mesh = make_mesh(AXES, parse_target("v5p:4x4x4").devices())

    def step(ffn, x, dy):
        y, pull = jax.vjp(lambda ffn, x: ffn(x)[0], ffn, x)
        return y, pull(dy)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, a.sharding.spec))
        ffn = jax.tree.map(place, jax.eval_shape(lambda: cfg.build(D, rngs=nnx.Rngs(0))))
        x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16, sharding=NamedSharding(mesh, spec("BTD")))
        return jax.jit(step).trace(ffn, x, x).lower(lowering_platforms=("tpu",)).compile()


def collectives(text: str) -> dict[str, list[str]]:
    """Returns the shapes that each kind of collective of a compiled program gives."""
    found: dict[str, list[str]] = {}
    pattern = r"= (.*) ((?:ragged-)?all-to-all|all-gather|all-reduce|reduce-scatter)(?:-start)?\("
    for shapes, kind in re.findall(pattern, text):
        found.setdefault(kind, []).extend(re.findall(r"[a-z0-9]+\[[\d,]+\]", shapes))
    return found


def main() -> int:
    """Returns how many promises do not hold."""
    prepare_compilers()
    failed, ideal = 0, 3 * 3 * 2 * (B * T // 64) * K * D * F
    by_sorting = MoEConfig(router=TopKConfig(top_k=K), num_experts=E, d_ff=F)
    by_slots = dataclasses.replace(by_sorting, router=TopKConfig(top_k=K, capacity_factor=1.25))
    for name, cfg, kind, most_flops in (
        ("dropless", by_sorting, "ragged-all-to-all", 1.05 * AXES["expert"]),
        ("room for 1.25", dataclasses.replace(by_sorting, room=1.25), "ragged-all-to-all", 1.3),
        ("slots, 1.25", by_slots, "all-to-all", 1.3),
    ):
        compiled = compile_layer(cfg)
        text, flops = compiled.as_text() or "", (compiled.cost_analysis() or {})["flops"] / ideal
        sent, num_kernels = collectives(text), text.count('custom_call_target="tpu_custom_call"')
        print(f"{name}: {num_kernels} kernels, {flops:.2f} times the FLOPs of the chosen experts")
        for sent_kind, shapes in sorted(sent.items()):
            print(f"  {sent_kind}: {' '.join(sorted(set(shapes)))}")
        tokens = [shape for shape in sent.get("all-gather", []) if shape.endswith(f"{D}]") and not is_weight(shape)]
        for promise, holds in (
            (f"{kind} is there", kind in sent),
            ("no tokens are gathered", not tokens),
            # Three products forward, six backward.
            ("grouped matmuls are kernels", num_kernels == (0 if cfg is by_slots else 9)),
            (f"at most {most_flops:.2f} times the FLOPs", flops <= most_flops),
        ):
            failed += not holds
            print(f"  {promise}: {'yes' if holds else 'NO'}", flush=True)
    return failed


def is_weight(shape: str) -> bool:
    """Returns whether this is the part of the experts' weights that a device works with."""
    return bool(re.search(rf"\[({E // AXES['expert']}),({D},{F}|{F},{D})\]", shape))


if __name__ == "__main__":
    sys.exit(main() > 0)
