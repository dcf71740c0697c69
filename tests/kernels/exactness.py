"""How exact float32 is where tokens undo most of what others wrote: `python -m tests.kernels.exactness`.

Keys of correlation 0.9 and beta 1.9: a chunk sums up what is large and cancels, which one token after another never
sees. An error is the relative root mean square of a tensor against the definition in float64; it is divided by that of
the definition in float32. Gates are 0, or 0 and at every 50th token -30 (per channel, in every third channel), or all
kinds from 0 to -30.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import delta_rule, generalized_delta_rule
from tests.kernels import recurrent

OPS = {"delta_rule": delta_rule, "generalized_delta_rule": generalized_delta_rule}
DECAYS, GATES, WIDTHS = ("none", "token", "channel"), ("open", "closed", "mixed"), (16, 32, 64, 128)


def log_decays(decay: str, gate: str, T: int, H: int, rng: np.random.Generator) -> np.ndarray:
    g = np.zeros((1, T, 1) if decay == "token" else (1, T, 1, H))
    if gate == "closed":
        g[(slice(None), slice(None, None, 50), slice(None), slice(None, None, 3))[: g.ndim]] = -30
    return -30 * rng.uniform(size=g.shape) ** 6 if gate == "mixed" else g


def arguments(op: str, decay: str, gate: str, T: int, H: int, P: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    k = np.sqrt(0.9) * rng.normal(size=H) + np.sqrt(0.1) * rng.normal(size=(1, T, 1, H))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    args = {"q": rng.normal(size=k.shape), "k": k, "v": rng.normal(size=(1, T, 1, P))}
    if decay != "none":
        args["g"] = log_decays(decay, gate, T, H, rng)
    if op == "delta_rule":
        args["beta"] = np.full((1, T, 1), 1.9)
    else:  # as in RWKV-7: b is -a times rates per channel, other keys are written
        g = args.get("g", np.zeros((1, T, 1)))
        args["a"] = -k * np.exp(g if g.ndim == 4 else g[..., None])
        args["b"] = k * rng.uniform(1.7, 1.9, size=k.shape)
        args["k"] = k * rng.uniform(0.5, 1, size=k.shape)
    args["state"] = rng.normal(size=(1, 1, H, P))
    return {name: x.astype(np.float32) for name, x in args.items()}


# Compiling takes most of the time, and without LLVM's optimisations a quarter of it.
@functools.partial(jax.jit, static_argnames=("op", "impl"), compiler_options={"xla_backend_optimization_level": 0})
def _run(op, impl, args, cotangents):
    outputs, vjp = jax.vjp(lambda args: OPS[op](**args, impl=impl), args)
    return dict(zip(("o", "state"), outputs, strict=True)) | {f"d{name}": d for name, d in vjp(cotangents)[0].items()}


def ratios(op: str, decay: str, gate: str, T: int, H: int, P: int, impls=("xla", "tpu")) -> dict[str, dict[str, float]]:
    """Returns for each implementation how much larger the error of each tensor is than that of the definition."""
    args, rng = arguments(op, decay, gate, T, H, P), np.random.default_rng(1)
    cotangents = tuple(rng.normal(size=args[name].shape).astype(np.float32) for name in ("v", "state"))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (args, cotangents))
        exact = jax.tree.map(np.asarray, _run(op, "ref", *wide))
    assert exact["o"].dtype == exact["dk"].dtype == np.float64
    definition = _run(op, "ref", args, cotangents)
    found = {}
    for impl in impls:
        with pltpu.force_tpu_interpret_mode(True):
            got = _run(op, impl, args, cotangents)
        error = lambda of, name: recurrent.error(of[name], exact[name])
        found[impl] = {name: error(got, name) / error(definition, name) for name in exact}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    parser.add_argument("--decays", nargs="+", default=DECAYS, choices=DECAYS)
    parser.add_argument("--gates", nargs="+", default=GATES, choices=GATES)
    parser.add_argument("--impls", nargs="+", default=("xla", "tpu"))
    cfg = parser.parse_args()
    for op in cfg.ops:
        for decay in cfg.decays:
            for H in cfg.widths:
                for gate in cfg.gates if decay != "none" else ["open"]:
                    for impl, found in ratios(op, decay, gate, cfg.tokens, H, min(H, 64), cfg.impls).items():
                        tensors = " ".join(f"{name} {ratio:.1f}" for name, ratio in found.items())
                        case = f"{op:23}{decay:8}{gate:7}{H:4} {impl:4}"
                        print(f"{case}{max(found.values()):5.1f}   {tensors}", flush=True)


if __name__ == "__main__":
    main()
