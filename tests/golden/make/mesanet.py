"""Golden layer: flash-linear-attention's MesaNet around its exact naive form, the rest by Triton's interpreter."""

import interpreter  # noqa: F401, before the kernels
from common import check_cache, draw, fla_naive, generator, module_case
from fla.layers import mesa_net
from fla.models.utils import Cache
from parameters import parameters
from torch_norms import unit

B, T, D = 2, 67, 12

SETTINGS = {"hidden_size": D, "num_heads": 2, "head_dim": 5, "conv_size": 4, "norm_eps": 1e-6, "layer_idx": 0}

naive = fla_naive("ops/mesa_net/naive.py").naive_mesa_net_exact


def regression(q, k, v, g, beta, lamb, h_kk_init=None, h_kv_init=None, **_):
    return naive(unit(q), unit(k), v, g, lamb, beta, h_kk_init, h_kv_init)


def one_step(q, k, v, g, beta, lamb, prev_h_kk, prev_h_kv, **_):
    token = [x[:, None] for x in (q, k, v, g)]
    o, *states = naive(*token, lamb, beta[:, None], prev_h_kk, prev_h_kv)
    return o[:, 0], *states


def call(apply, x):
    y, cache = apply(x)[0], Cache()
    check_cache(y, lambda part: apply(part, past_key_values=cache, use_cache=True)[0], x)
    return y


def main() -> None:
    mesa_net.chunk_mesa_net, mesa_net.mesa_net_decoding_one_step = regression, one_step
    module_case(
        "layer_mesanet",
        lambda: mesa_net.MesaNet(**SETTINGS),
        call,
        draw(generator("layer_mesanet"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="flash-linear-attention 0.6.0 MesaNet with naive_mesa_net_exact",
        precision="float32",
    )


if __name__ == "__main__":
    main()
