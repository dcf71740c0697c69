"""Golden layer: flash-linear-attention's linear attention, elu + 1 and normalized, around its naive recurrence."""

import interpreter  # noqa: F401, before the kernels
from common import draw, fla_naive, generator, module_case
from fla.layers import linear_attn
from parameters import parameters

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_heads": 2,
    "expand_k": 1.0,
    "expand_v": 1.5,
    "feature_map": "elu",
    "output_norm": "identity",
    "do_feature_map_norm": True,
}


def main() -> None:
    naive = fla_naive("ops/linear_attn/naive.py").naive_recurrent_linear_attn
    # The layer's own arithmetic is PyTorch's; only this kernel is not, and it does not do float64.
    linear_attn.chunk_linear_attn = lambda cu_seqlens, **kwargs: naive(**kwargs)
    module_case(
        "layer_linear_transformer",
        lambda: linear_attn.LinearAttention(**SETTINGS),
        lambda apply, x: apply(x)[0],
        draw(generator("layer_linear_transformer"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="flash-linear-attention 0.6.0 LinearAttention with naive_recurrent_linear_attn",
    )


if __name__ == "__main__":
    main()
