"""Golden layer: flash-linear-attention's retention around its naive form, the rest by Triton's interpreter, float32."""

import interpreter  # noqa: F401, before the kernels
from common import draw, fla_naive, generator, module_case
from fla.layers import multiscale_retention
from parameters import parameters

B, T, D = 2, 67, 16

SETTINGS = {"hidden_size": D, "num_heads": 2, "expand_k": 1.0, "expand_v": 2.0, "norm_eps": 1e-6}


def main() -> None:
    naive = fla_naive("ops/retention/naive.py").naive_retention

    def retention(q, k, v, **_):
        o = naive(*(x.transpose(1, 2) for x in (q, k, v)))
        return o.transpose(1, 2), None

    # The chunked kernel does not run in the interpreter.
    multiscale_retention.chunk_retention = retention
    module_case(
        "layer_retnet",
        lambda: multiscale_retention.MultiScaleRetention(**SETTINGS),
        lambda apply, x: apply(x)[0],
        draw(generator("layer_retnet"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="flash-linear-attention 0.6.0 MultiScaleRetention with naive_retention",
        precision="float32",
    )


if __name__ == "__main__":
    main()
