"""Golden layers: flash-linear-attention's Gated DeltaProduct around its naive recurrence, by Triton's interpreter."""

import interpreter  # noqa: F401, before the kernels
from common import check_cache, draw, fla_naive, generator, module_case
from fla.layers import gated_deltaproduct
from fla.models.utils import Cache
from parameters import parameters
from torch_norms import unit

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_v_heads": 4,
    "head_dim": 4,
    "expand_v": 1.5,
    "conv_size": 4,
    "norm_eps": 1e-6,
    "layer_idx": 0,
}

naive = fla_naive("ops/gated_delta_product/naive.py").naive_recurrent_gated_delta_product


def delta_product(q, k, v, g, beta, num_householder, initial_state=None, **_):
    scale = q.shape[-1] ** -0.5
    return naive(unit(q), unit(k), v, g, beta, scale, initial_state=initial_state, num_householder=num_householder)


def call(apply, x):
    y, cache = apply(x)[0], Cache()
    check_cache(y, lambda part: apply(part, past_key_values=cache, use_cache=True)[0], x)
    return y


def main() -> None:
    # The chunked kernel does not run in the interpreter; the one that decodes does, and is what the cache is for.
    gated_deltaproduct.chunk_gated_delta_product = delta_product
    for name, options in (
        ("layer_gated_deltaproduct", {"num_householder": 2, "num_heads": 2, "allow_neg_eigval": True}),
        ("layer_gated_deltaproduct_three", {"num_householder": 3, "num_heads": 4, "allow_neg_eigval": False}),
    ):
        settings = SETTINGS | options
        module_case(
            name,
            lambda settings=settings: gated_deltaproduct.GatedDeltaProduct(**settings),
            call,
            draw(generator(name), B, T, D),
            parameters,
            settings=settings,
            source="flash-linear-attention 0.6.0 GatedDeltaProduct with naive_recurrent_gated_delta_product",
            precision="float32",
        )


if __name__ == "__main__":
    main()
