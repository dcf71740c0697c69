"""Mixtures of experts against layers of transformers (tests/golden/make/moe.py), as tests/mixers does for mixers."""

import json
import operator
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import GroupLimitConfig, TopKConfig

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"

type Arrays = dict[str, jax.Array]


def config(case: str, s: dict[str, Any]) -> MoEConfig:
    top_k, num_experts = s["num_experts_per_tok"], s.get("num_experts") or s.get("num_local_experts")
    d_ff = s.get("moe_intermediate_size") or s["intermediate_size"]
    if not case.startswith("deepseek"):
        shared = s.get("shared_expert_intermediate_size")
        return MoEConfig(
            router=TopKConfig(top_k=top_k, renormalize=s.get("norm_topk_prob", True)),
            num_experts=num_experts,
            d_ff=d_ff,
            shared=shared and MLPConfig(d_ff=shared),
            shared_gate=shared is not None,
        )
    is_v3 = case == "deepseek_v3"
    router = TopKConfig(
        top_k=top_k,
        scores="sigmoid" if is_v3 else "softmax",
        renormalize=is_v3,
        scale=s["routed_scaling_factor"],
        groups=GroupLimitConfig(num_groups=s["n_group"], top_k=s["topk_group"], num_best=2 if is_v3 else 1),
        bias_rate=1e-3 if is_v3 else None,
    )
    shared = MLPConfig(d_ff=d_ff * s["n_shared_experts"])
    return MoEConfig(router=router, num_experts=s["n_routed_experts"], d_ff=d_ff, shared=shared)


def parameters(p: Arrays) -> Arrays:
    gate, up = jnp.split(p["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=2)
    ours = {
        "router.proj.kernel": p["gate.weight"].T,
        "experts.gate_proj": gate,
        "experts.up_proj": up,
        "experts.down_proj": p["experts.down_proj"].swapaxes(1, 2),
    }
    for key, x in p.items():
        if key.startswith("shared"):
            *_, name = key.removesuffix(".weight").split(".")
            ours |= {"shared_gate.kernel": x[0]} if "_gate." in key else {f"shared.{name}.kernel": x.T}
    return ours


@pytest.mark.parametrize("case", ["mixtral", "olmoe", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3"])
def test_layer(case: str):
    file = np.load(GOLDEN / f"ffn_{case}.npz")
    settings = json.loads(str(file["meta"]))["settings"]
    inputs = {key.removeprefix("in."): jnp.asarray(file[key]) for key in file.files if key.startswith("in.")}

    @jax.jit
    def run(inputs, dy):
        def layer(inputs):
            ffn = config(case, settings).build(settings["hidden_size"], rngs=nnx.Rngs(0))
            ours = parameters({key: x for key, x in inputs.items() if key != "x"})
            assert len(ours) == len(jax.tree.leaves(nnx.state(ffn, nnx.Param)))
            for path, value in ours.items():
                variable = operator.attrgetter(path)(ffn)
                assert variable.shape == value.shape, path
                variable[...] = value
            if "bias" in settings:
                ffn.router.bias[...] = jnp.asarray(settings["bias"])
            return ffn(inputs["x"])[0]

        y, vjp = jax.vjp(layer, inputs)
        return y, vjp(dy)[0]

    y, grads = run(inputs, jnp.asarray(file["cotangent.y"]))
    errors = {"y": relative_error(y, file["out.y"])}
    errors |= {f"d{key}": relative_error(x, file[f"grad.{key}"]) for key, x in grads.items()}
    # Rounding in float32, of a whole layer.
    assert all(error < 1e-5 for error in errors.values()), f"relative errors: {errors}"


def relative_error(got: jax.Array, want: np.ndarray) -> float:
    assert got.shape == want.shape
    error = np.asarray(got, np.float64) - want
    return float(np.sqrt(np.mean(np.square(error)) / np.mean(np.square(want))))
