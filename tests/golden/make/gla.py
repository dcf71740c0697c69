"""Golden layer: flash-linear-attention's GLA, its Triton kernels run by Triton's interpreter, in float32."""

import interpreter  # noqa: F401, before the kernels
from common import draw, generator, module_case
from fla.layers.gla import GatedLinearAttention
from parameters import parameters

# Up to 64 tokens the layer runs its recurrent kernel; the chunked one does not run in the interpreter.
B, T, D = 2, 37, 16

SETTINGS = {
    "hidden_size": D,
    "num_heads": 2,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "gate_logit_normalizer": 16,
    "gate_low_rank_dim": 4,
    "norm_eps": 1e-6,
}


def main() -> None:
    module_case(
        "layer_gla",
        lambda: GatedLinearAttention(**SETTINGS),
        lambda apply, x: apply(x)[0],
        draw(generator("layer_gla"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="flash-linear-attention 0.6.0 GatedLinearAttention",
        precision="float32",
    )


if __name__ == "__main__":
    main()
