"""Golden layer: flash-linear-attention's RWKV-6, its Triton kernels run by Triton's interpreter, in float32."""

import interpreter  # noqa: F401, before the kernels
from common import draw, generator, module_case
from fla.layers.rwkv6 import RWKV6Attention
from parameters import parameters

# Up to 64 tokens the layer runs its recurrent kernel.
B, T, D = 2, 37, 16

SETTINGS = {
    "hidden_size": D,
    "num_heads": 2,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "proj_low_rank_dim": 4,
    "gate_low_rank_dim": 6,
    "norm_eps": 64e-5,
}


def main() -> None:
    module_case(
        "layer_rwkv6",
        lambda: RWKV6Attention(**SETTINGS),
        lambda apply, x: apply(x)[0],
        draw(generator("layer_rwkv6"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="flash-linear-attention 0.6.0 RWKV6Attention",
        precision="float32",
    )


if __name__ == "__main__":
    main()
