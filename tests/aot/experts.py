"""Compiles a mixture of experts for 64 chips that are not here, and reads what they send: `python -m tests.aot.experts`.

The dropless form sends rows by a ragged all-to-all and multiplies them in kernels; slots go by an all-to-all. Tokens are
never gathered. Weights are, along the data axis, as all weights are that lie in parts on the devices of that axis.
"""

import dataclasses
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from efficient_lm.ffns import MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.sharding import spec

B, T, D, F, E, K = 64, 1024, 1024, 512, 16, 2
AXES = {"data": 8, "expert": 8}


def compile_layer(cfg: MoEConfig) -> jax.stages.Compiled:
    """Returns the layer, forward and backward, compiled for the mesh."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4")
    explicit = (AxisType.Explicit,) * len(AXES)
    mesh = Mesh(np.array(topology.devices).reshape(tuple(AXES.values())), tuple(AXES), axis_types=explicit)

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
    pattern = r"= (\(?[a-z0-9]+\[.*?) ((?:ragged-)?all-to-all|all-gather|all-reduce|reduce-scatter)(?:-start)?\("
    for shape, kind in re.findall(pattern, text):
        found.setdefault(kind, []).append(re.sub(r"\{[^}]*\}", "", shape))
    return found


def main() -> int:
    """Returns how many promises do not hold."""
    failed = 0
    dropless = TopKConfig(top_k=K)
    tokens = re.compile(rf"\[(\d+,)*{D}\]")
    ideal = 3 * 3 * 2 * (B * T // 64) * K * D * F
    for name, router in (("dropless", dropless), ("slots", dataclasses.replace(dropless, capacity_factor=1.25))):
        compiled = compile_layer(MoEConfig(router=router, num_experts=E, d_ff=F))
        text = compiled.as_text() or ""
        sent = collectives(text)
        flops = (compiled.cost_analysis() or {}).get("flops", 0.0) / ideal
        print(f"{name}: {text.count('tpu_custom_call')} kernels, {flops:.2f} times the FLOPs of the chosen experts")
        for kind, shapes in sorted(sent.items()):
            print(f"  {kind}: {' '.join(sorted(set(shapes)))}")
        wanted = "ragged-all-to-all" if router is dropless else "all-to-all"
        gathered = [s for s in sent.get("all-gather", []) if tokens.search(s) and not is_weight(s)]
        for promise, holds in (
            (f"{wanted} is there", wanted in sent),
            ("no tokens are gathered", not gathered),
            ("grouped matmuls are kernels", router is not dropless or "tpu_custom_call" in text),
        ):
            failed += not holds
            print(f"  {promise}: {'yes' if holds else 'NO'}")
    return failed


def is_weight(shape: str) -> bool:
    """Returns whether this is the part of the experts' weights that a device works with."""
    return bool(re.search(rf"\[({E // AXES['expert']}),({D},{F}|{F},{D})\]", shape))


if __name__ == "__main__":
    sys.exit(main() > 0)
