"""Golden layers: flash-linear-attention's Comba around its naive chunks, the rest by Triton's interpreter, in float32.

Of its two naive references the recurrent one subtracts what the decayed state holds; the chunked one, which its kernels
follow, what the state held before. And its layer scales the length of p away, with it the feedback strength of the
paper: here p keeps its length relative to k.
"""

import interpreter  # noqa: F401, before the kernels
from common import check_cache, draw, fla_naive, generator, module_case
from fla.layers import comba
from fla.models.utils import Cache
from parameters import parameters
from torch_norms import inverse_length, unit

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_heads": 2,
    "head_dim": 4,
    "expand_v": 1.5,
    "conv_size": 4,
    "norm_eps": 1e-6,
    "layer_idx": 0,
}

naive = fla_naive("ops/comba/naive.py").naive_chunk_comba


def rule(q, k, v, p, g, beta, initial_state=None, **_):
    q, k, p = unit(q), unit(k), p * inverse_length(k)
    return naive(q, k, v, p, g, beta, chunk_size=32, initial_state=initial_state, output_final_state=True)


def call(apply, x):
    y, cache = apply(x)[0], Cache()
    check_cache(y, lambda part: apply(part, past_key_values=cache, use_cache=True)[0], x)
    return y


def main() -> None:
    comba.chunk_comba = comba.fused_recurrent_comba = rule
    module_case(
        "layer_comba",
        lambda: comba.Comba(**SETTINGS),
        call,
        draw(generator("layer_comba"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="flash-linear-attention 0.6.0 Comba with naive_chunk_comba, p in units of the length of k",
        precision="float32",
    )


if __name__ == "__main__":
    main()
